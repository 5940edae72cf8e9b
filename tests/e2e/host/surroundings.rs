//! The host changes around a running tunnel: ways, addresses and interfaces come
//! and go, and nobody tells fastvpn but the kernel.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use fastvpn::error::{Error, Result};
use ipnet::IpNet;
use serde_json::Value;
use testbed::{Namespace, Pair, UNDERLAY_NAME, pair};

use crate::host::routes::{net, own_routes};
use crate::operator::Operator;
use crate::packets::TUNNEL_NAME;
use crate::support::{
    Tunnel, check, fail, fastvpn, hosts, link, stop, stop_all, tried, udp, wait_for, wait_until,
};

/// Two hosts with a tunnel, and who asks that of host A.
struct Scene {
    hosts: Pair,
    operator: Operator,
    tunnels: [Tunnel; 2],
}

/// The addresses in the tunnel.
const INSIDE: [Ipv4Addr; 2] = [Ipv4Addr::new(10, 244, 1, 1), Ipv4Addr::new(10, 244, 1, 2)];

/// Starts them; returns once both carry, without a packet.
fn scene(hosts: Pair, flags: [&str; 2]) -> Result<Scene> {
    let operators = [Operator::new()?, Operator::new()?];
    let start = |host: &Namespace, place: usize| {
        let socket = operators[place].socket_text();
        let tunnel = fastvpn(host, &format!("--control {socket} {}", flags[place]))?;
        operators[place].wait()?;
        Ok(tunnel)
    };
    let tunnels = [start(&hosts.a, 0)?, start(&hosts.b, 1)?];
    let [operator, _] = operators;
    Ok(Scene {
        hosts,
        operator,
        tunnels,
    })
}

/// The only peer, as operators see it.
pub fn only_peer(operator: &Operator) -> Result<Value> {
    let answer = operator.ask("peers")?;
    match answer["peers"].as_array().map(Vec::as_slice) {
        Some([peer]) => Ok(peer.clone()),
        _ => fail(format!("not one peer in {answer}")),
    }
}

pub fn set_up(namespace: &Namespace, name: &str, is_up: bool) -> Result<()> {
    let state = if is_up { "up" } else { "down" };
    testbed::ip(namespace, &format!("link set {name} {state}"))
}

/// Gives the loopback interface an address.
fn add_to_loopback(namespace: &Namespace, address: &str) -> Result<()> {
    set_up(namespace, "lo", true)?;
    let index = link(namespace, "lo")?.index;
    namespace.netlink()?.add_address(index, net(address)?)
}

fn addresses_of(namespace: &Namespace, name: &str) -> Result<Vec<IpNet>> {
    let index = link(namespace, name)?.index;
    let all = namespace.netlink()?.addresses()?.into_iter();
    Ok(all
        .filter_map(|(owner, address)| (owner == index).then_some(address))
        .collect())
}

/// The underlay's interface goes down, and the widest prefix of the peer covers
/// its own address. What is sent to the peer must not go round and round.
#[testbed::trial]
fn a_way_into_the_tunnel() -> Result<()> {
    let Scene {
        hosts,
        operator,
        tunnels,
    } = scene(
        hosts(1500)?,
        [
            "--address 10.244.1.1/24 --peer 10.211.55.123=10.0.0.0/8",
            "--address 10.244.1.2/24 --peer 10.211.55.122=10.244.1.1/32",
        ],
    )?;
    wait_for(&hosts.a, INSIDE[1].into())?;
    let nowhere = (Ipv4Addr::new(10, 5, 5, 5), 9);
    let sender = udp(&hosts.a, INSIDE[0], 0)?;
    for _ in 0..2 {
        set_up(&hosts.a, UNDERLAY_NAME, false)?;
        // Before anybody can know.
        tried("send a datagram", sender.send_to(&[0; 64], nowhere))?;
        wait_until("the peer is suspended", || {
            Ok(only_peer(&operator)?["is_suspended"] == true)
        })?;
        let text = operator.tell("peers")?;
        check(text.contains("10.211.55.123:8285 (suspended)"), || text)?;
        // Senders are not told of any path: there is none.
        check(only_peer(&operator)?["path_mtu_bytes"].is_null(), || {
            "a path".into()
        })?;
        let dropped = operator.dropped("peer-unresolved")?;
        let sent = only_peer(&operator)?["packets_sent"].clone();
        tried("send a datagram", sender.send_to(&[0; 64], nowhere))?;
        wait_until("it is dropped", || {
            Ok(operator.dropped("peer-unresolved")? > dropped)
        })?;
        let peer = only_peer(&operator)?;
        check(peer["packets_sent"] == sent, || format!("{sent}: {peer}"))?;

        // Other changes can be made, but none that adds to it.
        operator.tell("route add 192.0.2.0/24 --peer 10.211.55.123")?;
        operator.tell("route del 192.0.2.0/24")?;
        let more = "peer add 10.211.55.99=172.30.0.0/16";
        operator.refuses(more, &["10.211.55.99", "through the tunnel"])?;

        set_up(&hosts.a, UNDERLAY_NAME, true)?;
        wait_for(&hosts.a, INSIDE[1].into())?;
        let peer = only_peer(&operator)?;
        check(
            peer["is_suspended"] == false && peer["path_mtu_bytes"] == 1500,
            || peer.to_string(),
        )?;
    }
    // A way that an operator makes is as good.
    set_up(&hosts.a, UNDERLAY_NAME, false)?;
    wait_until("the peer is suspended", || {
        Ok(only_peer(&operator)?["is_suspended"] == true)
    })?;
    operator.tell("route del 10.0.0.0/8")?;
    wait_until("the peer is not suspended", || {
        Ok(only_peer(&operator)?["is_suspended"] == false)
    })?;
    let [a, _] = stop_all(tunnels)?;
    let count = |words: &str| a.log.lines().filter(|line| line.contains(words)).count();
    let inside = count("leads through the tunnel itself");
    let outside = count("has a route to peer");
    // The last change: the path ends in the tunnel no more, and the underlay is down.
    let nowhere = count("has no route to peer");
    // From the sixth change within ten seconds on, they are counted, as is that the peer is
    // silent. On a slow machine all have their lines.
    let left_out: usize = a
        .log
        .lines()
        .filter_map(|line| {
            let (before, _) = line.split_once(" more changes of peers")?;
            before.rsplit(' ').next()?.parse::<usize>().ok()
        })
        .sum();
    check(
        (2..=3).contains(&inside) && outside <= 3 && inside + outside + nowhere + left_out >= 6,
        || format!("{inside}, {outside}, {nowhere} and {left_out}:\n{}", a.log),
    )?;
    Ok(())
}

#[testbed::trial]
fn a_way_into_the_tunnel_at_a_takeover() -> Result<()> {
    // The MTU follows from the path, but not from that through the tunnel.
    let flags = "--address 10.244.1.1/24 --peer 10.211.55.123=10.0.0.0/8";
    let far = "--address 10.244.1.2/24 --peer 10.211.55.122=10.244.1.1/32";
    let Scene {
        hosts,
        operator,
        tunnels: [old, far],
    } = scene(hosts(1500)?, [flags, far])?;
    set_up(&hosts.a, UNDERLAY_NAME, false)?;
    let is_suspended = |wanted: bool| {
        wait_until("the peer is suspended, or is not", || {
            Ok(only_peer(&operator)?["is_suspended"] == wanted)
        })
    };
    is_suspended(true)?;
    let mtu_bytes = link(&hosts.a, TUNNEL_NAME)?.mtu;
    let flags = format!("--control {} {flags} --takeover", operator.socket_text());
    // One more that is in the tunnel for certain is one too many.
    let refused = fastvpn(&hosts.a, &format!("{flags} --peer 10.5.5.5=172.30.0.0/16"))?.wait()?;
    let is_refused = refused.status.code() == Some(1)
        && refused
            .log
            .contains("peer 10.5.5.5 would lead through the tunnel");
    check(is_refused, || refused.log)?;
    operator.wait()?;

    // All the time somebody sends, which must not go round and round.
    let sender = udp(&hosts.a, INSIDE[0], 0)?;
    let is_over = AtomicBool::new(false);
    let send = || -> Result<()> {
        while !is_over.load(Ordering::SeqCst) {
            // It may be that there is no room for the moment.
            let _ = sender.send_to(&[0; 64], (Ipv4Addr::new(10, 5, 5, 5), 9));
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    };
    let new = std::thread::scope(|scope| {
        let sending = scope.spawn(send);
        let new = fastvpn(&hosts.a, &flags).and_then(|new| {
            old.wait()?;
            is_suspended(true)?;
            Ok(new)
        });
        is_over.store(true, Ordering::SeqCst);
        let _ = sending.join();
        new
    })?;
    let peer = only_peer(&operator)?;
    check(peer["packets_sent"] == 0, || peer.to_string())?;
    check(link(&hosts.a, TUNNEL_NAME)?.mtu == mtu_bytes, || {
        "another MTU".into()
    })?;
    set_up(&hosts.a, UNDERLAY_NAME, true)?;
    is_suspended(false)?;
    wait_for(&hosts.a, INSIDE[1].into())?;
    let ended = stop(new)?;
    check(!ended.log.contains("not in full"), || ended.log)?;
    stop(far).map(drop)
}

/// An address moves from this host to one behind the peer, and nothing else
/// happens: the peer has nothing to say until it is asked.
#[testbed::trial]
fn an_address_that_moves() -> Result<()> {
    let hosts = hosts(1500)?;
    add_to_loopback(&hosts.a, "10.9.9.9/32")?;
    let Scene { hosts, tunnels, .. } = scene(
        hosts,
        [
            "--address 10.244.1.1/32 --peer 10.211.55.123=10.9.0.0/16",
            "--address 10.244.1.2/32 --peer 10.211.55.122=10.244.1.1/32",
        ],
    )?;
    let index = link(&hosts.a, "lo")?.index;
    hosts.a.netlink()?.del_address(index, net("10.9.9.9/32")?)?;
    add_to_loopback(&hosts.b, "10.9.9.9/32")?;
    wait_for(&hosts.a, Ipv4Addr::new(10, 9, 9, 9).into())?;
    // And back: nobody sends in this host's name.
    hosts
        .b
        .netlink()?
        .del_address(link(&hosts.b, "lo")?.index, net("10.9.9.9/32")?)?;
    add_to_loopback(&hosts.a, "10.9.9.9/32")?;
    wait_for(&hosts.a, Ipv4Addr::new(10, 9, 9, 9).into())?;
    stop_all(tunnels).map(drop)
}

/// What was this host's address may be another's from the reload on; and nobody
/// puts it back on the device.
#[testbed::trial]
fn an_own_address_reloaded() -> Result<()> {
    let hosts = hosts(1500)?;
    add_to_loopback(&hosts.b, "10.1.0.5/32")?;
    let operator = Operator::new()?;
    let text = |address: &str| {
        format!(
            "address = [\"{address}\"]\n[[peer]]\nendpoint = \"10.211.55.123\"\n\
             prefixes = [\"10.1.0.0/16\"]\n"
        )
    };
    let file = operator.write("fastvpn.toml", &text("10.1.0.5/32"))?;
    let socket = operator.socket_text();
    let tunnels = [
        fastvpn(&hosts.a, &format!("--control {socket} --config {file}"))?,
        fastvpn(
            &hosts.b,
            "--address 10.244.1.2/32 --peer 10.211.55.122=10.1.0.6/32",
        )?,
    ];
    operator.wait()?;
    operator.write("fastvpn.toml", &text("10.1.0.6/32"))?;
    operator.tell("reload")?;
    let is_new = || -> Result<bool> {
        let addresses = addresses_of(&hosts.a, TUNNEL_NAME)?;
        Ok(addresses.contains(&net("10.1.0.6/32")?) && !addresses.contains(&net("10.1.0.5/32")?))
    };
    check(is_new()?, || "other addresses than were asked for".into())?;
    wait_for(&hosts.a, Ipv4Addr::new(10, 1, 0, 5).into())?;
    check(is_new()?, || "an address that is not wanted is back".into())?;
    stop_all(tunnels).map(drop)
}

/// The kernel drops all IPv4 routes of a device with its last IPv4 address, and
/// says nothing of them.
#[testbed::trial]
fn addresses_are_put_back() -> Result<()> {
    let Scene { hosts, tunnels, .. } = scene(
        hosts(1500)?,
        [
            "--address 10.244.1.1/24 --address fd01::1/64 \
             --peer 10.211.55.123=10.1.0.0/16,10.244.1.2/32,fd02::/64",
            "--address 10.244.1.2/24 --peer 10.211.55.122=10.244.1.1/32",
        ],
    )?;
    let routes = own_routes(&hosts.a)?;
    check(routes.len() == 3, || format!("{routes:?}"))?;
    let index = link(&hosts.a, TUNNEL_NAME)?.index;
    let given = ["10.244.1.1/24", "fd01::1/64"];
    for address in given {
        hosts.a.netlink()?.del_address(index, net(address)?)?;
        wait_until("address and routes are back", || {
            let addresses = addresses_of(&hosts.a, TUNNEL_NAME)?;
            Ok(addresses.contains(&net(address)?) && own_routes(&hosts.a)? == routes)
        })?;
    }
    wait_for(&hosts.a, INSIDE[1].into())?;
    let [a, _] = stop_all(tunnels)?;
    for address in given {
        let line = format!("address {address} on {TUNNEL_NAME} was gone; put back");
        check(a.log.contains(&line), || a.log.clone())?;
    }
    Ok(())
}

/// A link-local address and its zone. The tunnel's device has such addresses,
/// too, and after a while the older route to them.
#[testbed::trial]
fn a_peer_on_a_link() -> Result<()> {
    // With a global address comes a link-local one that is usable at once.
    let hosts = pair(&[(net("fd00:55::1/64")?, net("fd00:55::2/64")?)], 1500)?;
    let on_link = |host: &Namespace| -> Result<String> {
        let is_on_link = |address: &IpAddr| address.to_string().starts_with("fe80:");
        let mut addresses = addresses_of(host, UNDERLAY_NAME)?.into_iter();
        let found = addresses.find_map(|net| Some(net.addr()).filter(is_on_link));
        let found = found.ok_or_else(|| Error::new("no link-local address"))?;
        Ok(format!("[{found}%{UNDERLAY_NAME}]"))
    };
    let peers = [on_link(&hosts.b)?, on_link(&hosts.a)?];
    let Scene {
        hosts,
        operator,
        tunnels,
    } = scene(
        hosts,
        [
            &format!("--address 10.244.1.1/32 --peer {}=10.244.1.2/32", peers[0]),
            &format!("--address 10.244.1.2/32 --peer {}=10.244.1.1/32", peers[1]),
        ],
    )?;
    wait_for(&hosts.a, INSIDE[1].into())?;
    set_up(&hosts.a, UNDERLAY_NAME, false)?;
    set_up(&hosts.a, UNDERLAY_NAME, true)?;
    wait_for(&hosts.a, INSIDE[1].into())?;
    let peer = only_peer(&operator)?;
    check(peer["is_suspended"] == false, || peer.to_string())?;
    operator.tell(&format!("route add 10.3.0.0/16 --peer {}", peers[0]))?;
    let [a, b] = tunnels;
    let ended = stop(a)?;
    check(!ended.log.contains("through the tunnel"), || ended.log)?;
    stop(b).map(drop)
}
