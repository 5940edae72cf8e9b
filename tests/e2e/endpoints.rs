//! Where peers are: two on one address, and either family over the other.

use std::net::IpAddr;

use fastvpn::error::Result;
use fastvpn::lab::{self, Namespace};
use ipnet::IpNet;
use serde_json::{Value, json};

use crate::datagrams::{Order, exchange, exchange_trains};
use crate::operator::Operator;
use crate::site::{MTU_BYTES, all_went_well, sites, underlay, underlay_v6};
use crate::support::{
    Ended, FAMILIES, Test, Tunnel, answers, bulk, check, fail, fastvpn, link, stop, tried, udp,
    wait_for, wait_until,
};
use crate::traffic::trains;

/// The tests of this file.
pub fn tests() -> Vec<Test> {
    vec![
        (
            "two_peers_on_one_address_by_port",
            two_peers_on_one_address_by_port,
        ),
        (
            "each_family_over_the_other_alone",
            each_family_over_the_other_alone,
        ),
    ]
}

/// Port of the second tunnel on the shared host.
const OTHER_PORT: u16 = 9000;

/// Payload of the largest UDP datagram over IPv4 that the tunnel takes whole.
const FULL_BYTES: usize = 1444;

/// The peers of a tunnel as its operators see them: by `HOST:PORT`.
fn peer_counter(operator: &Operator, peer: &str, counter: &str) -> Result<u64> {
    let answer = operator.request(&json!({"command": "peers"}).to_string())?;
    let peers = answer["peers"].as_array();
    let found = peers.and_then(|peers| peers.iter().find(|one| one["peer"] == peer));
    let value = found.and_then(|found| found[counter].as_u64());
    value.map_or_else(|| fail(format!("no {counter} of {peer} in {answer}")), Ok)
}

fn request(operator: &Operator, request: &Value) -> Result<Value> {
    let answer = operator.request(&request.to_string())?;
    check(answer["ok"] == true, || format!("refused: {answer}"))?;
    Ok(answer)
}

/// Two processes share a host's address, and so are told apart by the port on
/// the way out, and by the inner source on the way in.
fn two_peers_on_one_address_by_port() -> Result<()> {
    const DATAGRAMS: u64 = 100;
    let network = sites(2)?;
    let [alone, shared] = &network.all[..] else {
        return fail("two sites");
    };
    // Pairs of addresses: the lone host's and the shared one's, of each tunnel.
    let [first, second]: [[IpAddr; 2]; 2] = [
        [[10, 244, 1, 1].into(), [10, 244, 1, 2].into()],
        [[10, 244, 2, 1].into(), [10, 244, 2, 2].into()],
    ];
    let operator = Operator::new()?;
    let socket = operator.socket_text();
    let (here, there) = (underlay(alone.number), underlay(shared.number));
    let (one, two) = (format!("{there}:8285"), format!("{there}:{OTHER_PORT}"));
    let asker = fastvpn(
        &alone.host,
        &format!(
            "--queues 2 --control {socket} --address {}/32 --address {}/32 \
             --peer {one}={}/32 --peer {two}={}/32",
            first[0], second[0], first[1], second[1],
        ),
    )?;
    let start = |tun: &str, port: u16, near: IpAddr, far: IpNet| {
        fastvpn(
            &shared.host,
            &format!(
                "--queues 2 --tun {tun} --listen 0.0.0.0:{port} --address {near}/32 \
                 --peer {here}={far}"
            ),
        )
    };
    let all = IpNet::new_assert([10, 244, 0, 0].into(), 16);
    let tunnels = [
        start("fastvpn0", 8285, first[1], all)?,
        start("fastvpn1", OTHER_PORT, second[1], second[0].into())?,
    ];
    let (alone, shared): (&Namespace, &Namespace) = (&alone.host, &shared.host);
    let sizes: Vec<usize> = (0..DATAGRAMS as usize).map(|n| n * 14).collect();
    for [near, far] in [first, second] {
        wait_until("both ends are up", || {
            // From this very address: the other belongs to the other tunnel.
            Ok(exchange((alone, near), (shared, far), &[1], Order::Kept).is_ok())
        })?;
    }
    let rose = |peer: &str, counter: &str, work: &dyn Fn() -> Result<()>| -> Result<u64> {
        let before = peer_counter(&operator, peer, counter)?;
        work()?;
        Ok(peer_counter(&operator, peer, counter)? - before)
    };
    for ([near, far], peer, other) in [(first, &one, &two), (second, &two, &one)] {
        for (from, to, counter) in [
            ((alone, near), (shared, far), "packets_sent"),
            ((shared, far), (alone, near), "packets_received"),
        ] {
            let work = || exchange(from, to, &sizes, Order::Kept);
            let others = || {
                let rose = rose(peer, counter, &work)?;
                check(rose >= DATAGRAMS, || {
                    format!("{peer}: {counter} rose by {rose}")
                })
            };
            // Some neighbour discovery of the hosts' own may come in between.
            let rose = rose(other, counter, &others)?;
            check(rose < DATAGRAMS / 2, || {
                format!("{other}: {counter} rose by {rose}")
            })?;
            exchange_trains(from, to, &trains(FULL_BYTES))?;
        }
    }

    // The second's address moves to the first, whose host has it as well, and
    // back.
    let move_to = |peer: &str| {
        let change = json!({
            "command": "route-add", "peer": peer, "replace": true,
            "prefixes": [IpNet::from(second[1])],
        });
        request(&operator, &change).map(drop)
    };
    for peer in [&one, &two] {
        move_to(peer)?;
        let found = json!({"command": "route-get", "address": second[1]});
        let found = request(&operator, &found)?;
        check(found["peer"] == **peer, || found.to_string())?;
        let work = || exchange((alone, second[0]), (shared, second[1]), &sizes, Order::Kept);
        let rose = rose(peer, "packets_sent", &work)?;
        check(rose >= DATAGRAMS, || {
            format!("{peer} was sent {rose} packets")
        })?;
    }

    // Without the first peer its address is still the second's: no stranger's,
    // but what was behind the first may not come any more.
    request(&operator, &json!({"command": "peer-del", "peer": one}))?;
    let source = udp(shared, first[1], 0)?;
    let dropped = || -> Result<u64> {
        let status = request(&operator, &json!({"command": "status"}))?;
        check(status["drops"]["sender-unknown"].is_null(), || {
            status.to_string()
        })?;
        Ok(status["drops"]["source-not-allowed"].as_u64().unwrap_or(0))
    };
    let before = dropped()?;
    wait_until("packets from behind no peer are counted", || {
        tried("send", source.send_to(b"still here?", (first[0], 9)))?;
        Ok(dropped()? >= before + 10)
    })?;
    exchange((shared, second[1]), (alone, second[0]), &sizes, Order::Kept)?;

    let ended = stop(asker)?;
    check(ended.dropped("sender-unknown") == 0, || ended.log.clone())?;
    for tunnel in tunnels {
        let ended = stop(tunnel)?;
        all_went_well(&ended)?;
        let (sent, received) = ended.packets("total")?;
        check(sent >= DATAGRAMS && received >= DATAGRAMS, || ended.log)?;
    }
    Ok(())
}

/// A peer that is reached over IPv4 and has nothing but IPv6 behind it, and one
/// the other way around. Neither host has addresses of the other family.
fn each_family_over_the_other_alone() -> Result<()> {
    let net = |address: IpAddr, length| IpNet::new_assert(address, length);
    let v4 = |number| net(underlay(number).into(), 24);
    let v6 = |number| net(underlay_v6(number).into(), 64);
    let addresses = [vec![v4(1), v6(1)], vec![v4(2)], vec![v6(3)]];
    let network = lab::switch(&addresses, MTU_BYTES)?;
    let [middle, over_v4, over_v6] = &network.hosts[..] else {
        return fail("three hosts");
    };
    // The middle's address and that of the peer over the other family.
    let [inside_v4, inside_v6] = FAMILIES;
    let start = |host: &Namespace, addresses: &[IpAddr], peers: &[String]| -> Result<Tunnel> {
        let mut flags = "--queues 2".to_string();
        for address in addresses {
            flags += &format!(" --address {}", IpNet::from(*address));
        }
        for peer in peers {
            flags += &format!(" --peer {peer}");
        }
        fastvpn(host, &flags)
    };
    let host = |address: IpAddr| IpNet::from(address).to_string();
    let tunnels = [
        start(
            middle,
            &[inside_v4[0], inside_v6[0]],
            &[
                format!("{}={}", underlay(2), host(inside_v6[1])),
                format!("[{}]={}", underlay_v6(3), host(inside_v4[1])),
            ],
        )?,
        start(
            over_v4,
            &[inside_v6[1]],
            &[format!("{}={}", underlay(1), host(inside_v6[0]))],
        )?,
        start(
            over_v6,
            &[inside_v4[1]],
            &[format!("[{}]={}", underlay_v6(1), host(inside_v4[0]))],
        )?,
    ];
    // The largest datagram that goes whole: the middle's MTU is that of its
    // worse path, the others' that of their only one.
    let tun_mtu = |host: &Namespace| link(host, "fastvpn0").map(|link| link.mtu);
    for (far_host, inside, outer_bytes, inner_bytes) in
        [(over_v4, inside_v6, 28, 48), (over_v6, inside_v4, 48, 28)]
    {
        wait_for(middle, inside[1])?;
        let (near, far) = ((middle, inside[0]), (far_host, inside[1]));
        for (from, to, mtu_bytes) in [
            (near, far, MTU_BYTES - 48),
            (far, near, MTU_BYTES - outer_bytes),
        ] {
            let has = tun_mtu(from.0)?;
            check(has == mtu_bytes, || {
                format!("an MTU of {has} bytes, not {mtu_bytes}")
            })?;
            let full = mtu_bytes as usize - inner_bytes;
            let whole: Vec<usize> = (0..full).step_by(13).chain([full - 1, full]).collect();
            exchange(from, to, &whole, Order::Kept)?;
            exchange(from, to, &[full + 1, 9000, 65_000], Order::Any)?;
            exchange_trains(from, to, &trains(full))?;
            bulk(from.0, to.0, to.1, 20)?;
            for bytes in [0, full, full + 1, 20_000] {
                answers(from.0, to.1, bytes)?;
            }
        }
    }
    for tunnel in tunnels {
        let ended: Ended = stop(tunnel)?;
        all_went_well(&ended)?;
    }
    Ok(())
}
