//! Where peers are: two on one address, and either family over the other.

use std::net::{IpAddr, Ipv4Addr};

use fastvpn::error::{Error, Result};
use ipnet::IpNet;
use serde_json::json;
use testbed::Namespace;

use crate::datagrams::{Order, exchange, exchange_batches};
use crate::dataplane::traffic::batches;
use crate::operator::Operator;
use crate::site::{MTU_BYTES, all_went_well, underlay, underlay_v6};
use crate::support::{
    Ended, FAMILIES, Tunnel, answers, bulk, check, fail, fastvpn, link, stop, tried, udp, wait_for,
    wait_until,
};

/// Port of the second tunnel on the shared host.
const OTHER_PORT: u16 = 9000;

/// Payload of the largest UDP datagram over IPv4 that the tunnel takes whole.
const FULL_BYTES: usize = 1444;

/// Datagrams of an exchange, each of another size.
const DATAGRAMS: u64 = 100;

/// Two processes on one host, each on a port of its own, and one on another
/// host that has both as peers.
struct OneAddress {
    /// What joins the hosts.
    _bridge: Namespace,
    /// The host with one process.
    alone: Namespace,
    /// The host with two.
    shared: Namespace,
    /// What the lone process calls its peers.
    peers: [String; 2],
    asker: Operator,
    answerers: [Operator; 2],
    tunnels: [Tunnel; 3],
}

/// Addresses in the tunnel of the lone process and of one of the two, for each
/// of these.
const INSIDE: [[Ipv4Addr; 2]; 2] = [
    [Ipv4Addr::new(10, 244, 1, 1), Ipv4Addr::new(10, 244, 1, 2)],
    [Ipv4Addr::new(10, 244, 2, 1), Ipv4Addr::new(10, 244, 2, 2)],
];

impl OneAddress {
    fn start() -> Result<Self> {
        let underlays = [1, 2].map(|number| vec![IpNet::new_assert(underlay(number).into(), 24)]);
        let switch = testbed::switch(&underlays, MTU_BYTES)?;
        let mut hosts = switch.hosts.into_iter();
        let (Some(alone), Some(shared)) = (hosts.next(), hosts.next()) else {
            return fail("two hosts");
        };
        let [first, second] = INSIDE;
        let peers = [8285, OTHER_PORT].map(|port| format!("{}:{port}", underlay(2)));
        let (asker, answerers) = (Operator::new()?, [Operator::new()?, Operator::new()?]);
        let [one, two] = &peers;
        let socket = asker.socket_text();
        let asking = fastvpn(
            &alone,
            &format!(
                "--queues 2 --control {socket} --address {}/32 --address {}/32 \
                 --peer {one}={}/32 --peer {two}={}/32",
                first[0], second[0], first[1], second[1],
            ),
        )?;
        let start = |place: usize, tun: &str, port: u16, prefix: &str| {
            let socket = answerers[place].socket_text();
            let flags = format!(
                "--queues 2 --control {socket} --tun {tun} --listen 0.0.0.0:{port} \
                 --address {}/32 --peer {}={prefix}",
                INSIDE[place][1],
                underlay(1),
            );
            fastvpn(&shared, &flags)
        };
        let tunnels = [
            asking,
            // All sources may come to the first: a packet that goes to the wrong
            // port arrives nevertheless, and is counted there.
            start(0, "fastvpn0", 8285, "10.244.0.0/16")?,
            start(1, "fastvpn1", OTHER_PORT, &format!("{}/32", second[0]))?,
        ];
        for operator in [&asker, &answerers[0], &answerers[1]] {
            operator.wait_for_own_ports()?;
        }
        Ok(Self {
            _bridge: switch.bridge,
            alone,
            shared,
            peers,
            asker,
            answerers,
            tunnels,
        })
    }

    /// Sends from the lone host to the shared one (or back) between the
    /// addresses of one of the two processes.
    fn exchange(&self, pair: usize, is_back: bool) -> Result<()> {
        let sizes: Vec<usize> = (0..DATAGRAMS as usize).map(|n| n * 14).collect();
        let [near, far] = INSIDE[pair].map(IpAddr::from);
        let (near, far) = ((&self.alone, near), (&self.shared, far));
        let (from, to) = if is_back { (far, near) } else { (near, far) };
        let sent = exchange(from, to, &sizes, Order::Kept)
            .and_then(|()| exchange_batches(from, to, &batches(FULL_BYTES)));
        sent.map_err(|error| Error::new(format!("from {} to {}: {error}", from.1, to.1)))
    }

    /// Packets so far, as the lone process counts them for each peer, and as
    /// each of the two processes does.
    fn packets(&self, is_back: bool) -> Result<[u64; 4]> {
        let (of_peer, of_process) = match is_back {
            false => ("packets_sent", "packets_received"),
            true => ("packets_received", "packets_sent"),
        };
        let answer = self.asker.must(&json!({"command": "peers"}))?;
        let count = |name: &String| -> Result<u64> {
            let peers = answer["peers"].as_array();
            let found = peers.and_then(|peers| peers.iter().find(|one| one["peer"] == **name));
            match found {
                Some(found) => found[of_peer]
                    .as_u64()
                    .ok_or_else(|| Error::new(format!("no {of_peer} in {found}"))),
                // Removed in the meantime.
                None => Ok(0),
            }
        };
        Ok([
            count(&self.peers[0])?,
            count(&self.peers[1])?,
            self.answerers[0].counter(of_process)?,
            self.answerers[1].counter(of_process)?,
        ])
    }

    /// Sends between the addresses of a process, which must go by way of this
    /// process, or of the other, and of no other.
    fn exchange_by(&self, pair: usize, is_back: bool, process: usize) -> Result<()> {
        /// What the hosts say of their own accord.
        const OTHERS_MAX: u64 = 20;
        let before = self.packets(is_back)?;
        self.exchange(pair, is_back)?;
        let after = self.packets(is_back)?;
        for (place, (before, after)) in before.into_iter().zip(after).enumerate() {
            let rose = after - before;
            let is_right = match place % 2 == process {
                true => rose >= DATAGRAMS,
                false => rose < OTHERS_MAX,
            };
            check(is_right, || {
                let who = ["peer", "process"][place / 2];
                format!(
                    "pair {pair} by process {process}: {rose} packets at {who} {}",
                    place % 2
                )
            })?;
        }
        Ok(())
    }
}

/// Two processes share a host's address, and so are told apart by the port on
/// the way out, and by the inner source on the way in.
#[testbed::trial(each_engine)]
fn two_peers_on_one_address_by_port() -> Result<()> {
    let set_up = OneAddress::start()?;
    for pair in [0, 1] {
        set_up.exchange_by(pair, false, pair)?;
        set_up.exchange_by(pair, true, pair)?;
    }

    // The second's address moves to the first, whose host has it as well, and
    // back. The way back does not depend on it: the sender's address is right.
    let moving = INSIDE[1][1];
    for process in [0, 1] {
        let peer = &set_up.peers[process];
        let change = json!({
            "command": "route-add", "peer": peer, "replace": true,
            "prefixes": [IpNet::from(IpAddr::from(moving))],
        });
        set_up.asker.must(&change)?;
        let found = json!({"command": "route-get", "address": moving});
        let found = set_up.asker.must(&found)?;
        check(found["peer"] == **peer, || found.to_string())?;
        set_up.exchange_by(1, false, process)?;
        set_up.exchange(1, true)?;
    }

    // Without the first peer its address is still the second's: no stranger's,
    // but what was behind the first may not come any more.
    let asker = &set_up.asker;
    asker.must(&json!({"command": "peer-del", "peer": set_up.peers[0]}))?;
    let source = udp(&set_up.shared, INSIDE[0][1], 0)?;
    let before = asker.dropped("source-not-allowed")?;
    wait_until("packets from behind no peer are counted", || {
        tried("send", source.send_to(b"still here?", (INSIDE[0][0], 9)))?;
        Ok(asker.dropped("source-not-allowed")? >= before + 10)
    })?;
    set_up.exchange_by(1, true, 1)?;
    set_up.exchange_by(1, false, 1)?;
    let [asking, one, two] = set_up.tunnels;
    let ended = stop(asking)?;
    check(ended.dropped("sender-unknown") == 0, || ended.log)?;
    [one, two]
        .into_iter()
        .try_for_each(|tunnel| all_went_well(&stop(tunnel)?))
}

/// A peer that is reached over IPv4 and has nothing but IPv6 behind it, and one
/// the other way around. Neither host has addresses of the other family.
#[testbed::trial(each_engine)]
fn each_family_over_the_other_alone() -> Result<()> {
    let net = |address: IpAddr, length| IpNet::new_assert(address, length);
    let v4 = |number| net(underlay(number).into(), 24);
    let v6 = |number| net(underlay_v6(number).into(), 64);
    let addresses = [vec![v4(1), v6(1)], vec![v4(2)], vec![v6(3)]];
    let network = testbed::switch(&addresses, MTU_BYTES)?;
    let [middle, over_v4, over_v6] = &network.hosts[..] else {
        return fail("three hosts");
    };
    // The middle's address and that of the peer over the other family.
    let [inside_v4, inside_v6] = FAMILIES;
    let operators = [Operator::new()?, Operator::new()?, Operator::new()?];
    let mut sockets = operators.iter().map(Operator::socket_text);
    let mut start = |host: &Namespace, addresses: &[IpAddr], peers: &[String]| -> Result<Tunnel> {
        let socket = sockets.next().unwrap_or_default();
        let mut flags = format!("--queues 2 --control {socket}");
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
    operators
        .iter()
        .try_for_each(Operator::wait_for_own_ports)?;
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
            exchange_batches(from, to, &batches(full))?;
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
