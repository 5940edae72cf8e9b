//! Hosts as operators have them: routes, containers, NAT, several tunnels.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use fastvpn::error::{Error, Result};
use ipnet::IpNet;
use socket2::{Domain, Protocol, Socket, Type};
use testbed::traffic::{
    Between, Flood, PingPong, Watch, ping, tcp_ping_pong, udp_flood, udp_ping_pong,
};
use testbed::{CONTAINER_NAME, Namespace, Pair, StaticRoutes};

use crate::support::{
    TUNNEL, UNDERLAY, answers, bulk, check, fail, fastvpn, hosts, link, stop, tried,
    tunnel_between, udp, wait_for, wait_until,
};
use crate::tools::{fetch, nft};

#[testbed::trial(each_engine)]
fn the_teaching_vpn_with_routes() -> Result<()> {
    let hosts = hosts(1500)?;
    let addresses = [Ipv4Addr::new(10, 244, 2, 2), Ipv4Addr::new(10, 244, 3, 3)];
    let tunnels = [
        fastvpn(
            &hosts.a,
            "--peer 10.211.55.123:8285 --tun flannel99 --address 10.244.2.2/24 --route 10.244.3.0/24",
        )?,
        fastvpn(
            &hosts.b,
            "--peer 10.211.55.122:8285 --tun flannel99 --address 10.244.3.3/24 --route 10.244.2.0/24",
        )?,
    ];
    wait_for(&hosts.a, addresses[1].into())?;
    answers(&hosts.b, addresses[0].into(), 56)?;
    let web = SocketAddr::from((addresses[1], 9090));
    let from = fetch(&hosts.b, web, &hosts.a, web, 1)?;
    check(from == addresses[0], || {
        format!("the request came from {from}")
    })?;
    bulk(&hosts.a, &hosts.b, addresses[1].into(), 20)?;
    tunnels.into_iter().try_for_each(|end| stop(end).map(drop))
}

/// Addresses of the host and its container, behind host A and behind host B.
const BEHIND: [[Ipv4Addr; 2]; 2] = [
    [Ipv4Addr::new(172, 18, 2, 1), Ipv4Addr::new(172, 18, 2, 10)],
    [Ipv4Addr::new(172, 18, 3, 1), Ipv4Addr::new(172, 18, 3, 10)],
];

fn net(address: Ipv4Addr) -> IpNet {
    IpNet::new_assert(address.into(), 24)
}

/// A container behind each host.
fn containers(hosts: &Pair) -> Result<[Namespace; 2]> {
    let behind = |host: &Namespace, [router, container]: [Ipv4Addr; 2]| {
        testbed::container(host, "veth0", &[(net(router), net(container))], 1500)
    };
    Ok([behind(&hosts.a, BEHIND[0])?, behind(&hosts.b, BEHIND[1])?])
}

/// As Docker has them: the host's address is on a bridge, of which the
/// container's veth is a port.
fn bridged_container(host: &Namespace, [router, address]: [Ipv4Addr; 2]) -> Result<Namespace> {
    let container = Namespace::new()?;
    testbed::join(host, &container, "port0", CONTAINER_NAME)?;
    for words in [
        "link add docker0 type bridge",
        "link set port0 master docker0",
        "link set port0 up",
        "link set docker0 up",
        &format!("address add {} dev docker0", net(router)),
    ] {
        testbed::ip(host, words)?;
    }
    host.sysctl("net/ipv4/ip_forward", "1")?;
    let mut netlink = container.netlink()?;
    let index = link(&container, CONTAINER_NAME)?.index;
    netlink.set_up(index)?;
    netlink.add_address(index, net(address))?;
    netlink.add_route(IpNet::V4(Default::default()), Some(router.into()), None)?;
    Ok(container)
}

/// Tunnels that lead to the containers.
fn route_between(hosts: &Pair) -> Result<[crate::support::Tunnel; 2]> {
    let tunnels = [
        fastvpn(&hosts.a, "--peer 10.211.55.123 --route 172.18.3.0/24")?,
        fastvpn(&hosts.b, "--peer 10.211.55.122 --route 172.18.2.0/24")?,
    ];
    wait_for(&hosts.a, TUNNEL[1].into())?;
    Ok(tunnels)
}

/// Everything that one container may want of another, both ways.
fn containers_talk(containers: &[Namespace; 2]) -> Result<()> {
    let [a, b] = containers;
    for (client, server, address) in [(a, b, BEHIND[1][1]), (b, a, BEHIND[0][1])] {
        let between = Between {
            client,
            server,
            address: address.into(),
        };
        wait_for(client, address.into())?;
        answers(client, address.into(), 20_000)?;
        bulk(client, server, address.into(), 20)?;
        let watch = Watch::default();
        let time = Duration::from_millis(200);
        let test = PingPong {
            bytes: 1400,
            time,
            patience: time,
        };
        tcp_ping_pong(between, test, &watch)?;
        let latency = udp_ping_pong(between, test, &watch)?;
        check(latency.exchanges > 0, || format!("{latency:?}"))?;
        let flood = Flood {
            bytes: 1400,
            time,
            rate_pps: Some(10_000),
        };
        let report = udp_flood(between, flood, &watch)?;
        check(report.corrupt == 0 && report.delivered > 0, || {
            format!("{report:?}")
        })?;
    }
    Ok(())
}

#[testbed::trial(each_engine)]
fn forwarded_from_containers() -> Result<()> {
    let hosts = hosts(1500)?;
    let containers = containers(&hosts)?;
    let tunnels = route_between(&hosts)?;
    containers_talk(&containers)?;
    tunnels.into_iter().try_for_each(|end| stop(end).map(drop))
}

#[testbed::trial(each_engine)]
fn forwarded_from_bridged_containers() -> Result<()> {
    let hosts = hosts(1500)?;
    let containers = [
        bridged_container(&hosts.a, BEHIND[0])?,
        bridged_container(&hosts.b, BEHIND[1])?,
    ];
    let tunnels = route_between(&hosts)?;
    containers_talk(&containers)?;
    tunnels.into_iter().try_for_each(|end| stop(end).map(drop))
}

/// A's container goes out behind A's tunnel address and reaches, at B's tunnel
/// address, a web server in B's container. Neither host knows of the other's
/// containers.
#[testbed::trial(each_engine, long)]
fn masquerade_and_dnat() -> Result<()> {
    let hosts = hosts(1500)?;
    let containers = containers(&hosts)?;
    let tunnels = tunnel_between(&hosts, &[])?;
    nft(
        &hosts.a,
        "table ip nat { chain after { type nat hook postrouting priority 100; \
         oifname fastvpn0 masquerade; }; }",
    )?;
    nft(
        &hosts.b,
        "table ip nat { chain before { type nat hook prerouting priority -100; \
         iifname fastvpn0 tcp dport 8080 dnat to 172.18.3.10:80; }; }",
    )?;
    let web = SocketAddr::from((BEHIND[1][1], 80));
    let published = SocketAddr::from((TUNNEL[1], 8080));
    let from = fetch(&containers[1], web, &containers[0], published, 320)?;
    check(from == TUNNEL[0], || {
        format!("the request came from {from}")
    })?;
    answers(&containers[0], TUNNEL[1].into(), 1400)?;
    tunnels.into_iter().try_for_each(|end| stop(end).map(drop))
}

/// Sends a datagram with this TTL until a packet that fits has come to the raw
/// socket, which sees whole IP packets (raw(7)).
fn send_until_seen(
    sender: (&Namespace, u32, SocketAddr),
    observer: (&Namespace, Protocol),
    fits: impl Fn(&[u8]) -> bool,
) -> Result<Vec<u8>> {
    use std::io::Read;
    let (from, ttl, to) = sender;
    let source = udp(from, Ipv4Addr::UNSPECIFIED, 0)?;
    tried("set the TTL", source.set_ttl(ttl))?;
    let open = || Socket::new(Domain::IPV4, Type::RAW, Some(observer.1));
    let mut raw = tried("open a raw socket", observer.0.run(open))?;
    let timeout = Some(Duration::from_millis(200));
    tried("set a timeout", raw.set_read_timeout(timeout))?;
    let mut packet = vec![0; 2048];
    let mut seen = 0;
    wait_until("a packet arrives", || {
        tried("send", source.send_to(b"how far?", to))?;
        seen = raw.read(&mut packet).unwrap_or(0);
        Ok(seen >= HEADER_BYTES + 8 && fits(&packet[..seen]))
    })?;
    Ok(packet[..seen].to_vec())
}

const TTL: usize = 8;
const SOURCE: std::ops::Range<usize> = 12..16;
const HEADER_BYTES: usize = 20;

#[testbed::trial(each_engine)]
fn only_hosts_decrement_ttl() -> Result<()> {
    let hosts = hosts(1500)?;
    let containers = containers(&hosts)?;
    let tunnels = route_between(&hosts)?;
    let port = 9999_u16;
    let has_port = |packet: &[u8]| packet[HEADER_BYTES + 2..][..2] == port.to_be_bytes();
    for (from, to, address, expected) in [
        (&containers[0], &containers[1], BEHIND[1][1], 62),
        (&hosts.a, &containers[1], BEHIND[1][1], 63),
        (&hosts.a, &hosts.b, TUNNEL[1], 64),
    ] {
        let sender = (from, 64, (address, port).into());
        let packet = send_until_seen(sender, (to, Protocol::UDP), has_port)?;
        check(packet[TTL] == expected, || {
            format!("TTL {} at {address}, expected {expected}", packet[TTL])
        })?;
    }
    // What runs out on the way is reported by the host where it did.
    for (ttl, reporter) in [(1, BEHIND[0][0]), (2, TUNNEL[1])] {
        let sender = (&containers[0], ttl, (BEHIND[1][1], port).into());
        let observer = (&containers[0], Protocol::ICMPV4);
        let is_time_exceeded = |packet: &[u8]| packet[HEADER_BYTES] == 11;
        let report = send_until_seen(sender, observer, is_time_exceeded)?;
        check(report[SOURCE] == reporter.octets(), || {
            format!("TTL {ttl} ran out at {:?}", &report[SOURCE])
        })?;
    }
    tunnels.into_iter().try_for_each(|end| stop(end).map(drop))
}

/// The same names, addresses and ports, in namespaces of their own.
#[testbed::trial(each_engine)]
fn tunnels_side_by_side() -> Result<()> {
    let pairs = [hosts(1500)?, hosts(1500)?];
    let tunnels = [
        tunnel_between(&pairs[0], &[])?,
        tunnel_between(&pairs[1], &[])?,
    ];
    std::thread::scope(|scope| {
        let runs = pairs
            .each_ref()
            .map(|pair| scope.spawn(|| bulk(&pair.a, &pair.b, TUNNEL[1].into(), 20)));
        runs.into_iter().try_for_each(|run| match run.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        })
    })?;
    for tunnel in tunnels.into_iter().flatten() {
        let (sent, received) = stop(tunnel)?.packets("total")?;
        check(sent > 0 && received > 0, || "one tunnel stood still".into())?;
    }
    Ok(())
}

#[testbed::trial(each_engine)]
fn two_tunnels_on_one_host() -> Result<()> {
    let hosts = hosts(1500)?;
    let third = Namespace::new()?;
    testbed::join(&hosts.a, &third, "underlay1", "underlay0")?;
    for (namespace, name, address) in [
        (&hosts.a, "underlay1", "10.211.56.122/24"),
        (&third, "underlay0", "10.211.56.124/24"),
    ] {
        let mut netlink = namespace.netlink()?;
        let index = link(namespace, name)?.index;
        netlink.set_up(index)?;
        let address = address.parse().map_err(|_| Error::new("a bad address"))?;
        netlink.add_address(index, address)?;
    }
    let first = tunnel_between(&hosts, &[])?;
    let second = [
        fastvpn(
            &hosts.a,
            "--peer 10.211.56.124:9000 --listen 0.0.0.0:8286 --tun fastvpn1 --address 10.245.0.1/24",
        )?,
        fastvpn(
            &third,
            "--peer 10.211.56.122:8286 --listen 10.211.56.124:9000 --address 10.245.0.2/24",
        )?,
    ];
    let far: IpAddr = Ipv4Addr::new(10, 245, 0, 2).into();
    wait_for(&hosts.a, far)?;
    std::thread::scope(|scope| {
        let runs = [
            scope.spawn(|| bulk(&hosts.a, &hosts.b, TUNNEL[1].into(), 20)),
            scope.spawn(|| bulk(&hosts.a, &third, far, 20)),
        ];
        runs.into_iter().try_for_each(|run| match run.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        })
    })?;
    // One ends, the other does not mind.
    first.into_iter().try_for_each(|end| stop(end).map(drop))?;
    bulk(&third, &hosts.a, Ipv4Addr::new(10, 245, 0, 1).into(), 20)?;
    if ping(&hosts.a, TUNNEL[1].into(), 8, Duration::from_millis(200)).is_ok() {
        return fail(format!("{} answers without a tunnel", UNDERLAY[1]));
    }
    second.into_iter().try_for_each(|end| stop(end).map(drop))
}
