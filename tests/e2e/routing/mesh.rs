//! Many hosts: hub and spokes, a full mesh, and which peer a packet goes to.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::Duration;

use fastvpn::error::{Error, Result};
use ipnet::IpNet;
use testbed::{Namespace, StaticRoutes};

use crate::operator::Operator;
use crate::packets::{Tap, hop_limit, is_udp_to};
use crate::routing::plain_peer::{PORT, PlainPeer};
use crate::site::{
    ALL_PREFIXES, Site, addresses, all_went_well, inside, large_ping, peer, peer_v6, prefixes,
    sites, transfer, tunnel, underlay, underlay_v6, wait_for_each_other,
};
use crate::support::{check, enlarge_receive_buffer, link, stop, tried, udp, wait_for, wait_until};

/// The hop limit with which a packet of 64 arrives from one site's container at
/// another's.
pub fn hop_limit_between(from: &Site, to: &Site, family: usize) -> Result<u8> {
    let address = inside(to.number)[family];
    let tap = Tap::on_ethernet(&to.container, "eth0", address.is_ipv4())?;
    let any: IpAddr = match address {
        IpAddr::V4(_) => [0; 4].into(),
        IpAddr::V6(_) => [0; 16].into(),
    };
    let source = udp(&from.container, any, 0)?;
    let port = 33_000 + u16::from(from.number);
    let mut packet = None;
    wait_until("a packet arrives", || {
        tried("send", source.send_to(b"how far?", (address, port)))?;
        let is_it = |packet: &[u8]| is_udp_to(packet, port);
        packet = tap.next_within(Duration::from_millis(500), is_it)?;
        Ok(packet.is_some())
    })?;
    packet
        .as_deref()
        .and_then(hop_limit)
        .ok_or_else(|| Error::new("no packet"))
}

/// Packets that a host has sent into a device and got out of it.
fn device_packets(namespace: &Namespace, name: &str) -> Result<u64> {
    let stats = link(namespace, name)?.stats;
    Ok(stats.rx_packets + stats.tx_packets)
}

/// What spokes say to each other goes through the hub, whose kernel forwards
/// it. One of them is reached over IPv6.
#[testbed::trial(each_engine)]
fn hub_and_spokes() -> Result<()> {
    let network = sites(5)?;
    let (hub, spokes) = network.all.split_at(1);
    let (hub, over_v6) = (&hub[0], &spokes[3]);
    let mut peers: Vec<_> = spokes.iter().map(|spoke| peer(spoke.number)).collect();
    peers[3] = peer_v6(over_v6.number);
    let flags: &[&str] = &["--queues", "2"];
    let mut tunnels = vec![hub.start(&peers, flags)?];
    for spoke in spokes {
        let hub = match spoke.number == over_v6.number {
            true => format!("[{}]={ALL_PREFIXES}", underlay_v6(hub.number)),
            false => format!("{}={ALL_PREFIXES}", underlay(hub.number)),
        };
        tunnels.push(spoke.start(&[hub], flags)?);
    }
    // Each with each other, and the hub's container as well.
    for (place, a) in network.all.iter().enumerate() {
        for b in &network.all[..place] {
            wait_for_each_other(a, b)?;
        }
    }
    for family in [0, 1] {
        // Three hosts forward; the switch does not count.
        let hop_limit = hop_limit_between(&spokes[0], &spokes[1], family)?;
        check(hop_limit == 61, || {
            format!("hop limit {hop_limit} from spoke to spoke")
        })?;
        let hop_limit = hop_limit_between(over_v6, hub, family)?;
        check(hop_limit == 62, || {
            format!("hop limit {hop_limit} from spoke to hub")
        })?;
    }
    for (from, to, family) in [
        (&spokes[0], &spokes[1], 0),
        (&spokes[1], &spokes[0], 1),
        (&spokes[2], over_v6, 1),
        (over_v6, &spokes[0], 0),
        (over_v6, hub, 1),
        (hub, &spokes[2], 0),
    ] {
        transfer(from, to, family, 10)?;
    }
    // Longer than any path, there and back.
    large_ping(&spokes[0].container, inside(over_v6.number)[0], 20_000)?;
    large_ping(&over_v6.container, inside(spokes[1].number)[1], 20_000)?;
    for (tunnel, site) in tunnels.into_iter().zip(&network.all) {
        let ended = stop(tunnel)?;
        if site.number == hub.number {
            all_went_well(&ended)?;
        }
        check(ended.dropped("sender-unknown") == 0, || ended.log.clone())?;
        // The hub's kernel tells spokes of a shorter way (RFC 4861, section 8),
        // from a link-local address, which nobody has as a prefix.
        check(ended.dropped("source-not-allowed") < 50, || {
            ended.log.clone()
        })?;
        let (sent, received) = ended.packets("total")?;
        check(sent > 0 && received > 0, || ended.log)?;
    }
    Ok(())
}

/// Each host reaches each other without a third; one of them is no fastvpn.
#[testbed::trial(each_engine)]
fn a_full_mesh_with_a_plain_peer() -> Result<()> {
    const PLAIN: u8 = 5;
    let network = sites(PLAIN)?;
    let all = &network.all;
    let plain = &all[usize::from(PLAIN) - 1];
    let parsed = |text: &str| -> Result<IpNet> {
        let failed = |_| Error::new(format!("{text} is no network"));
        text.parse().map_err(failed)
    };
    let nets = addresses(PLAIN)
        .iter()
        .map(|net| parsed(net))
        .collect::<Result<Vec<_>>>()?;
    let mut table = Vec::new();
    for other in 1..PLAIN {
        for prefix in prefixes(other).split(',') {
            table.push((parsed(prefix)?, SocketAddr::from((underlay(other), PORT))));
        }
    }
    let plain_peer = PlainPeer::start_with(&plain.host, underlay(PLAIN), &nets, table)?;
    let mut tunnels = Vec::new();
    for site in all.iter().filter(|site| site.number != PLAIN) {
        let others = all.iter().filter(|other| other.number != site.number);
        let peers: Vec<_> = others.map(|other| peer(other.number)).collect();
        tunnels.push(site.start(&peers, &["--queues", "2"])?);
    }
    for (place, a) in all.iter().enumerate() {
        for b in &all[..place] {
            wait_for_each_other(a, b)?;
            // Hosts among themselves, as well.
            for family in [0, 1] {
                wait_for(&a.host, tunnel(b.number)[family])?;
            }
        }
    }
    for (from, to, family) in [
        (&all[0], &all[1], 0),
        (&all[2], &all[3], 1),
        (&all[3], &all[0], 0),
        (&all[1], plain, 0),
        (plain, &all[2], 1),
        (plain, &all[0], 0),
    ] {
        // Only the two hosts forward.
        let hop_limit = hop_limit_between(from, to, family)?;
        check(hop_limit == 62, || {
            let (from, to) = (from.number, to.number);
            format!("hop limit {hop_limit} from {from} to {to}")
        })?;
        // 10 MB are far more packets than this.
        const BYSTANDERS_MAX: u64 = 100;
        let bystanders = all[..4]
            .iter()
            .filter(|site| ![from.number, to.number].contains(&site.number));
        let count = || -> Result<Vec<u64>> {
            let counts = bystanders.clone();
            counts
                .map(|site| device_packets(&site.host, "fastvpn0"))
                .collect()
        };
        let before = count()?;
        transfer(from, to, family, 10)?;
        for (before, after) in before.into_iter().zip(count()?) {
            check(after - before < BYSTANDERS_MAX, || {
                format!("a bystander saw {} packets", after - before)
            })?;
        }
    }
    plain_peer.stop()?;
    for tunnel in tunnels {
        all_went_well(&stop(tunnel)?)?;
    }
    Ok(())
}

/// Sockets with one address and port at several hosts.
pub struct Sinks(Vec<UdpSocket>);

impl Sinks {
    /// Gives `address` to each host and opens a socket there.
    pub fn open(hosts: &[&Namespace], address: IpAddr, port: u16) -> Result<Self> {
        let sockets = hosts.iter().map(|host| {
            let mut netlink = host.netlink()?;
            let loopback = link(host, "lo")?.index;
            netlink.add_address(loopback, IpNet::from(address))?;
            let socket = udp(host, address, port)?;
            enlarge_receive_buffer(&socket, 4 << 20);
            tried("set", socket.set_nonblocking(true))?;
            Ok(socket)
        });
        Ok(Self(sockets.collect::<Result<_>>()?))
    }

    /// Which host got a datagram with this number.
    fn find(&self, number: u64) -> Option<usize> {
        let mut found = None;
        for (place, socket) in self.0.iter().enumerate() {
            let mut bytes = [0; 8];
            while socket.recv(&mut bytes).is_ok() {
                if u64::from_le_bytes(bytes) == number {
                    found = Some(place);
                }
            }
        }
        found
    }
}

/// Sends numbered datagrams to the sinks until one arrives; returns where, and
/// how many were sent.
fn who_gets(
    source: &UdpSocket,
    sinks: &Sinks,
    to: (IpAddr, u16),
    number: &mut u64,
) -> Result<usize> {
    let mut found = None;
    wait_until("a datagram arrives somewhere", || {
        *number += 1;
        tried("send", source.send_to(&number.to_le_bytes(), to))?;
        let deadline = std::time::Instant::now() + Duration::from_millis(500);
        while found.is_none() && std::time::Instant::now() < deadline {
            found = sinks.find(*number);
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(found.is_some())
    })?;
    found.ok_or_else(|| Error::new("nowhere"))
}

/// Hosts 2 to 4 all have the addresses that are sent to; the peers' prefixes
/// alone tell which of them gets a packet, and changes count at once.
#[testbed::trial(each_engine)]
fn the_longest_prefix_wins() -> Result<()> {
    const ASKER: u8 = 1;
    const PORT: u16 = 7000;
    let network = sites(4)?;
    let operator = Operator::new()?;
    let socket = operator.socket_text();
    let peers = [
        format!("{}={},172.30.0.0/16,fd00:30::/32", underlay(2), prefixes(2)),
        format!(
            "{}={},172.30.5.0/24,fd00:30:5::/48",
            underlay(3),
            prefixes(3)
        ),
        underlay(4).to_string(),
    ];
    // What no prefix matches needs a route of its own.
    let flags = [
        "--control",
        &socket,
        "--route",
        "172.31.0.0/16",
        "--route",
        "fd00:31::/32",
    ];
    let asker = network.all[0].start(&peers, &flags)?;
    let mut others = Vec::new();
    for site in &network.all[1..] {
        others.push(site.start(&[peer(ASKER)], &[])?);
    }
    operator.wait()?;
    let hosts = network.all[1..]
        .iter()
        .map(|site| &site.host)
        .collect::<Vec<_>>();
    let ip = |text: &str| -> Result<IpAddr> {
        text.parse()
            .map_err(|_| Error::new(format!("{text} is no address")))
    };
    let peer_name = |place: usize| format!("{}:8285", underlay(2 + place as u8));

    let mut number = 0;
    let mut expect = |sinks: &Sinks, to: IpAddr, place: usize| -> Result<()> {
        let source = udp(
            &network.all[0].host,
            tunnel(ASKER)[usize::from(to.is_ipv6())],
            0,
        )?;
        let named = operator.peer_of(&to.to_string())?;
        check(named == peer_name(place), || {
            format!("{to} is said to go to {named}, not to {}", peer_name(place))
        })?;
        for _ in 0..20 {
            let found = who_gets(&source, sinks, (to, PORT), &mut number)?;
            check(found == place, || {
                format!(
                    "{to} went to {}, not to {}",
                    peer_name(found),
                    peer_name(place)
                )
            })?;
        }
        Ok(())
    };
    let [short, long, near, default] = [
        ["172.30.9.9", "fd00:30:9::9"],
        ["172.30.5.9", "fd00:30:5::9"],
        ["172.30.5.8", "fd00:30:5::8"],
        ["172.31.1.1", "fd00:31::1"],
    ];
    for family in [0, 1] {
        let [short, long, near, default] = [
            ip(short[family])?,
            ip(long[family])?,
            ip(near[family])?,
            ip(default[family])?,
        ];
        let [short_sinks, long_sinks, near_sinks, default_sinks] =
            [short, long, near, default].map(|address| Sinks::open(&hosts, address, PORT));
        let (short_sinks, long_sinks) = (short_sinks?, long_sinks?);
        let (near_sinks, default_sinks) = (near_sinks?, default_sinks?);
        expect(&short_sinks, short, 0)?;
        expect(&long_sinks, long, 1)?;
        expect(&default_sinks, default, 2)?;

        // Longer still, for one address only.
        let one = IpNet::from(long);
        operator.tell(&format!("route add {one} --peer {}", underlay(2)))?;
        expect(&long_sinks, long, 0)?;
        expect(&near_sinks, near, 1)?;
        operator.tell(&format!("route del {one}"))?;
        expect(&long_sinks, long, 1)?;

        // Without the longer one the shorter one takes over.
        let longer = ["172.30.5.0/24", "fd00:30:5::/48"][family];
        operator.tell(&format!("route del {longer}"))?;
        expect(&long_sinks, long, 0)?;
        expect(&near_sinks, near, 0)?;
        // Without that as well, what no prefix matches; by a route of ours.
        let shorter = ["172.30.0.0/16", "fd00:30::/32"][family];
        operator.tell(&format!("route del {shorter}"))?;
        let index = link(&network.all[0].host, "fastvpn0")?.index;
        let net: IpNet = shorter.parse().map_err(|_| Error::new("no network"))?;
        network.all[0]
            .host
            .netlink()?
            .add_route(net, None, Some(index))?;
        expect(&long_sinks, long, 2)?;
    }
    stop(asker)?;
    others
        .into_iter()
        .try_for_each(|tunnel| stop(tunnel).map(drop))
}
