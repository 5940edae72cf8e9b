//! Operators and their tools rename the TUN device, move it, and set its MTU.

use std::collections::BTreeSet;
use std::net::IpAddr;

use fastvpn::error::Result;
use fastvpn::host::netlink::Route;
use fastvpn::host::routes::PROTOCOL;
use ipnet::IpNet;
use serde_json::{Value, json};
use testbed::{Namespace, Pair, ip, move_link};

use crate::host::routes::net;
use crate::host::surroundings::only_peer;
use crate::host::underlay::set_mtu;
use crate::operator::{Operator, has};
use crate::packets::TUNNEL_NAME;
use crate::support::{
    TUNNEL, Tunnel, UNDERLAY, bulk, check, fastvpn, hosts, link, snmp, stop, tried, udp, wait_for,
    wait_until,
};
use crate::tools::{RouteCommand, attribute, ip_route, transact};

const RENAMED: &str = "ren0";

/// Two hosts with a tunnel; host A's has a configuration file and somebody who asks.
struct Scene {
    hosts: Pair,
    operator: Operator,
    far: Tunnel,
}

impl Scene {
    /// Returns with host A's tunnel, once both carry.
    fn start() -> Result<(Self, Tunnel)> {
        let hosts = hosts(1500)?;
        let scene = Self {
            far: fastvpn(&hosts.b, "--peer 10.211.55.122")?,
            hosts,
            operator: Operator::new()?,
        };
        scene.write(1400, "")?;
        let near = scene.tunnel("")?;
        scene.operator.wait()?;
        wait_for(&scene.hosts.a, TUNNEL[1].into())?;
        Ok((scene, near))
    }

    /// Host A's, which may take over from the last one.
    fn tunnel(&self, more: &str) -> Result<Tunnel> {
        let file = self.operator.path("fastvpn.toml");
        let (file, socket) = (file.display(), self.operator.socket_text());
        fastvpn(
            &self.hosts.a,
            &format!("--control {socket} --config {file} {more}"),
        )
    }

    /// Host A's file, with one more prefix perhaps.
    fn write(&self, mtu_bytes: u32, more: &str) -> Result<()> {
        let text = format!(
            "address = [\"{}/32\"]\nmtu = {mtu_bytes}\n[[peer]]\nendpoint = \"{}\"\n\
             prefixes = [\"{}/32\"{more}]\n",
            TUNNEL[0], UNDERLAY[1], TUNNEL[1]
        );
        self.operator.write("fastvpn.toml", &text).map(drop)
    }

    fn status(&self) -> Result<Value> {
        self.operator.ask("status")
    }

    fn take_over(&self, near: &mut Tunnel) -> Result<String> {
        let old = std::mem::replace(near, self.tunnel("--takeover")?);
        let ended = old.wait()?;
        check(ended.status.success(), || {
            format!("no takeover:\n{}", ended.log)
        })?;
        self.operator.wait()?;
        Ok(ended.log)
    }
}

/// `ip link set NAME name NEW`, on kernels that want it down for that, too.
fn rename(host: &Namespace, name: &str, new: &str) -> Result<()> {
    ip(host, &format!("link set {name} down"))?;
    ip(host, &format!("link set {name} name {new}"))?;
    ip(host, &format!("link set {new} up"))
}

/// `struct ifinfomsg` (rtnetlink(7)).
fn link_message(index: u32) -> Vec<u8> {
    let mut message = vec![0; 4];
    message.extend(index.to_ne_bytes());
    message.extend([0; 8]);
    message
}

/// Prefixes to which the tunnel has made routes, through whatever device.
fn own_routes(namespace: &Namespace) -> Result<BTreeSet<IpNet>> {
    let is_own = |route: &Route| route.protocol == PROTOCOL;
    let routes = namespace.netlink()?.main_routes(&is_own)?;
    Ok(routes.iter().map(|route| route.destination).collect())
}

fn addresses_of(namespace: &Namespace, name: &str) -> Result<Vec<IpNet>> {
    let index = link(namespace, name)?.index;
    let all = namespace.netlink()?.addresses()?.into_iter();
    let own = all.filter_map(|(owner, net)| (owner == index).then_some(net));
    Ok(own.filter(|net| net.addr().is_ipv4()).collect())
}

/// Whatever it is called, it is the same device: for what must not go through it,
/// for its routes, at a reload and at a takeover.
#[testbed::trial]
fn a_renamed_device() -> Result<()> {
    let (scene, mut near) = Scene::start()?;
    let (host, operator) = (&scene.hosts.a, &scene.operator);
    rename(host, TUNNEL_NAME, RENAMED)?;
    let index = link(host, RENAMED)?.index;
    wait_for(host, TUNNEL[1].into())?;
    let into_the_tunnel: IpNet = IpAddr::from(UNDERLAY[1]).into();
    let sender = udp(host, TUNNEL[0], 0)?;
    for is_taken_over in [false, true] {
        if is_taken_over {
            scene.take_over(&mut near)?;
        }
        has(
            &scene.status()?,
            &[("tun", json!(RENAMED)), ("tun_index", json!(index))],
        )?;

        // The way to the peer leads into the tunnel. What is sent before anybody
        // knows goes round at most once.
        let before = snmp(host, "Udp", "OutDatagrams")?;
        ip_route(host, RouteCommand::Add, into_the_tunnel, RENAMED, None)?;
        for _ in 0..20 {
            tried("send", sender.send_to(b"round and round", (TUNNEL[1], 9)))?;
        }
        wait_until("the peer is suspended", || {
            let sent = snmp(host, "Udp", "OutDatagrams")? - before;
            check(sent < 1000, || {
                format!("20 packets became {sent} datagrams")
            })?;
            Ok(only_peer(operator)?["is_suspended"] == true)
        })?;
        operator.refuses(
            "peer add 10.211.55.123:9=10.7.0.0/16",
            &["through the tunnel itself"],
        )?;
        ip_route(host, RouteCommand::Delete, into_the_tunnel, RENAMED, None)?;
        wait_for(host, TUNNEL[1].into())?;

        let (mtu_bytes, prefix) = match is_taken_over {
            false => (1300, "10.8.0.0/16"),
            true => (1350, "10.9.0.0/16"),
        };
        scene.write(mtu_bytes, &format!(", \"{prefix}\""))?;
        operator.tell("reload")?;
        check(link(host, RENAMED)?.mtu == mtu_bytes, || {
            "another MTU".into()
        })?;
        has(&scene.status()?, &[("mtu_bytes", json!(mtu_bytes))])?;
        check(own_routes(host)?.contains(&net(prefix)?), || {
            "no route".into()
        })?;
        // Who takes it away finds it back.
        ip_route(host, RouteCommand::Delete, net(prefix)?, RENAMED, None)?;
        wait_until("the route is back", || {
            Ok(own_routes(host)?.contains(&net(prefix)?))
        })?;
    }
    let ended = stop(near)?;
    let line = format!("route 10.9.0.0/16 on {RENAMED} was gone; put back");
    check(ended.log.contains(&line), || ended.log)?;
    check(
        link(host, RENAMED).is_err() && own_routes(host)?.is_empty(),
        || "something is left".into(),
    )?;
    stop(scene.far).map(drop)
}

/// Gives the device of another namespace what it needs there.
fn set_up_inside(namespace: &Namespace) -> Result<()> {
    let index = link(namespace, TUNNEL_NAME)?.index;
    let mut netlink = namespace.netlink()?;
    netlink.add_address(index, IpNet::new_assert(TUNNEL[0].into(), 16))?;
    netlink.set_up(index)
}

/// As a container runtime has it that gives a container the tunnel: the sockets
/// stay with the host. All that concerns the device is not the process's any more,
/// until it comes back.
#[testbed::trial(each_engine)]
fn the_device_in_another_namespace() -> Result<()> {
    let (scene, mut near) = Scene::start()?;
    let (host, operator) = (&scene.hosts.a, &scene.operator);
    let inside = Namespace::new()?;
    move_link(host, TUNNEL_NAME, &inside)?;
    set_up_inside(&inside)?;
    wait_for(&inside, TUNNEL[1].into())?;
    bulk(&inside, &scene.hosts.b, TUNNEL[1].into(), 5)?;
    check(scene.status()?["tun_index"].is_null(), || {
        "it is here".into()
    })?;
    let text = operator.tell("status")?;
    check(
        text.contains("fastvpn0, in another network namespace"),
        || text,
    )?;

    let mut logs = String::new();
    for is_taken_over in [false, true] {
        if is_taken_over {
            logs += &scene.take_over(&mut near)?;
            check(scene.status()?["tun_index"].is_null(), || {
                "it is here".into()
            })?;
        }
        // Peers and prefixes may still change, the device may not.
        operator.tell(&format!("route add 10.8.0.0/16 --peer {}", UNDERLAY[1]))?;
        operator.tell("route del 10.8.0.0/16")?;
        scene.write(1400, ", \"10.9.0.0/16\"")?;
        operator.tell("reload")?;
        scene.write(1300, "")?;
        operator.refuses("reload", &["in another network namespace"])?;
        scene.write(1400, "")?;
        operator.tell("reload")?;
        check(own_routes(host)?.is_empty(), || "routes of nobody".into())?;
        wait_for(&inside, TUNNEL[1].into())?;
    }

    // Back again it is as it was, once it is up.
    move_link(&inside, TUNNEL_NAME, host)?;
    let index = link(host, TUNNEL_NAME)?.index;
    host.netlink()?.set_up(index)?;
    wait_for(host, TUNNEL[1].into())?;
    has(
        &scene.status()?,
        &[("tun_index", json!(index)), ("tun", json!(TUNNEL_NAME))],
    )?;
    let (addresses, routes) = (addresses_of(host, TUNNEL_NAME)?, own_routes(host)?);
    check(
        addresses == [IpNet::from(IpAddr::from(TUNNEL[0]))] && routes.len() == 1,
        || format!("{addresses:?} {routes:?}"),
    )?;
    let ended = stop(near)?;
    for (log, words) in [
        (&logs, "fastvpn0 is in another network namespace now"),
        (&ended.log, "fastvpn0 is in another network namespace now"),
        (&ended.log, "fastvpn0 is in this network namespace again"),
    ] {
        check(log.matches(words).count() == 1, || {
            format!("{words:?}:\n{log}")
        })?;
    }
    stop(scene.far).map(drop)
}

/// Another interface may get the index of a device that has left, and nothing is
/// done to that one.
#[testbed::trial]
fn the_index_of_a_device_that_has_left() -> Result<()> {
    // linux/if_link.h.
    const IFLA_IFNAME: u16 = 3;
    const IFLA_LINKINFO: u16 = 18;
    const IFLA_INFO_KIND: u16 = 1;
    const OTHER: &str = "other0";

    let (scene, near) = Scene::start()?;
    let host = &scene.hosts.a;
    let inside = Namespace::new()?;
    let index = link(host, TUNNEL_NAME)?.index;
    move_link(host, TUNNEL_NAME, &inside)?;
    let kind = attribute(IFLA_LINKINFO, &attribute(IFLA_INFO_KIND, b"bridge\0"));
    let name = attribute(IFLA_IFNAME, format!("{OTHER}\0").as_bytes());
    let message = [link_message(index), name, kind].concat();
    let flags = libc::NLM_F_CREATE | libc::NLM_F_EXCL;
    tried(
        "make an interface",
        transact(host, libc::RTM_NEWLINK, flags, &message),
    )?;
    check(link(host, OTHER)?.index == index, || "another index".into())?;
    host.netlink()?.set_up(index)?;
    // The peer is behind that interface, which is not the tunnel.
    let peer: IpNet = IpAddr::from(UNDERLAY[1]).into();
    ip_route(host, RouteCommand::Add, peer, OTHER, None)?;
    check(scene.status()?["tun_index"].is_null(), || {
        "it is here".into()
    })?;
    // All that would be done has been done by the second change that is told.
    scene
        .operator
        .tell(&format!("route add 10.8.0.0/16 --peer {}", UNDERLAY[1]))?;
    host.netlink()?.set_mtu(index, 1300)?;
    for _ in 0..2 {
        let at = scene.status()?["uptime_seconds"].clone();
        wait_until("a second goes by", || {
            Ok(scene.status()?["uptime_seconds"] != at)
        })?;
    }
    check(only_peer(&scene.operator)?["is_suspended"] == false, || {
        "the peer is suspended".into()
    })?;
    let addresses = addresses_of(host, OTHER)?;
    let routes = own_routes(host)?;
    check(addresses.is_empty() && routes.is_empty(), || {
        format!("{addresses:?} {routes:?}")
    })?;
    ip_route(host, RouteCommand::Delete, peer, OTHER, None)?;
    set_up_inside(&inside)?;
    wait_for(&inside, TUNNEL[1].into())?;

    // With its index taken, the device gets another one when it comes back.
    move_link(&inside, TUNNEL_NAME, host)?;
    let back = link(host, TUNNEL_NAME)?.index;
    check(back != index, || "the same index".into())?;
    host.netlink()?.set_up(back)?;
    wait_for(host, TUNNEL[1].into())?;
    let routes = own_routes(host)?;
    let expected = [net("10.8.0.0/16")?, IpAddr::from(TUNNEL[1]).into()];
    check(
        expected.iter().all(|prefix| routes.contains(prefix)),
        || format!("{routes:?}"),
    )?;
    has(&scene.status()?, &[("tun_index", json!(back))])?;
    stop(near)?;
    stop(scene.far).map(drop)
}

/// It is left as it is, and shown.
#[testbed::trial]
fn an_mtu_set_by_hand() -> Result<()> {
    let (scene, near) = Scene::start()?;
    let host = &scene.hosts.a;
    has(&scene.status()?, &[("mtu_bytes", json!(1400))])?;
    for mtu_bytes in [1300, 1290, 1400] {
        set_mtu(host, TUNNEL_NAME, mtu_bytes)?;
        has(&scene.status()?, &[("mtu_bytes", json!(mtu_bytes))])?;
    }
    // What a file asks for is nobody's hand.
    scene.write(1350, "")?;
    scene.operator.tell("reload")?;
    has(&scene.status()?, &[("mtu_bytes", json!(1350))])?;
    stop(near)?;
    check(link(host, TUNNEL_NAME).is_err(), || {
        "it is still there".into()
    })?;
    stop(scene.far).map(drop)
}
