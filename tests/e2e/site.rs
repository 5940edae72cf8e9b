//! The hosts of an overlay: all on one switch, each with a container behind it,
//! and addresses that follow from its number.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use fastvpn::error::Result;
use ipnet::IpNet;
use testbed::Namespace;
use testbed::traffic::ping;

use crate::support::{Ended, Tunnel, bulk, check, wait_for, wait_until};

/// MTU of the switch and of the containers, in bytes.
pub const MTU_BYTES: u32 = 1500;

/// Name of the interface toward the container.
pub const INSIDE_NAME: &str = "inside0";

/// A host and what is behind it.
pub struct Site {
    /// From 1.
    pub number: u8,
    /// The host.
    pub host: Namespace,
    /// The container, for which the host forwards.
    pub container: Namespace,
}

/// All of them.
pub struct Sites {
    /// The switch that joins them.
    _bridge: Namespace,
    /// In the order of their numbers.
    pub all: Vec<Site>,
}

/// Address of a host on the switch.
pub fn underlay(number: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 211, 55, number)
}

/// Address of a host on the switch.
pub fn underlay_v6(number: u8) -> Ipv6Addr {
    Ipv6Addr::new(0xfd00, 0x55, 0, 0, 0, 0, 0, number.into())
}

/// A host's addresses in the tunnel: IPv4, IPv6.
pub fn tunnel(number: u8) -> [IpAddr; 2] {
    [
        Ipv4Addr::new(10, 244, 0, number).into(),
        Ipv6Addr::new(0xfd00, 0x244, 0, 0, 0, 0, 0, number.into()).into(),
    ]
}

/// The addresses of the container behind a host: IPv4, IPv6.
pub fn inside(number: u8) -> [IpAddr; 2] {
    of_site(number, 10)
}

/// A host's addresses toward its container: IPv4, IPv6.
pub fn router(number: u8) -> [IpAddr; 2] {
    of_site(number, 1)
}

fn of_site(site: u8, host: u8) -> [IpAddr; 2] {
    [
        Ipv4Addr::new(172, 18, site, host).into(),
        Ipv6Addr::new(0xfd00, 0x18, site.into(), 0, 0, 0, 0, host.into()).into(),
    ]
}

/// All that is behind a host, as `--peer` takes it.
pub fn prefixes(number: u8) -> String {
    let [v4, v6] = tunnel(number);
    format!("{v4}/32,172.18.{number}.0/24,{v6}/128,fd00:18:{number}::/64")
}

/// The prefixes of all sites together.
pub const ALL_PREFIXES: &str = "10.244.0.0/16,172.18.0.0/16,fd00:244::/32,fd00:18::/32";

/// A host as a peer, over IPv4.
pub fn peer(number: u8) -> String {
    format!("{}={}", underlay(number), prefixes(number))
}

/// A host as a peer, over IPv6.
pub fn peer_v6(number: u8) -> String {
    format!("[{}]={}", underlay_v6(number), prefixes(number))
}

/// `count` sites, numbered from 1.
pub fn sites(count: u8) -> Result<Sites> {
    let addresses: Vec<_> = (1..=count)
        .map(|number| {
            vec![
                IpNet::new_assert(underlay(number).into(), 24),
                IpNet::new_assert(underlay_v6(number).into(), 64),
            ]
        })
        .collect();
    let switch = testbed::switch(&addresses, MTU_BYTES)?;
    let all = switch.hosts.into_iter().zip(1..).map(|(host, number)| {
        Ok(Site {
            number,
            container: container(&host, number)?,
            host,
        })
    });
    Ok(Sites {
        _bridge: switch.bridge,
        all: all.collect::<Result<_>>()?,
    })
}

/// Puts the container of this number behind a host.
pub fn container(host: &Namespace, number: u8) -> Result<Namespace> {
    let (router, inside) = (router(number), inside(number));
    let net = |address, length| IpNet::new_assert(address, length);
    let addresses = [
        (net(router[0], 24), net(inside[0], 24)),
        (net(router[1], 64), net(inside[1], 64)),
    ];
    testbed::container(host, INSIDE_NAME, &addresses, MTU_BYTES)
}

impl Site {
    /// Starts fastvpn on the host, with the addresses of its number.
    pub fn start(&self, peers: &[impl AsRef<str>], flags: &[&str]) -> Result<Tunnel> {
        let addresses = addresses(self.number);
        let mut all: Vec<&str> = flags.to_vec();
        all.extend(addresses.iter().flat_map(|net| ["--address", net]));
        all.extend(peers.iter().flat_map(|peer| ["--peer", peer.as_ref()]));
        Tunnel::start(&self.host, &all)
    }
}

/// A host's addresses in the tunnel, as `--address` takes them. They bring no
/// routes of their own.
pub fn addresses(number: u8) -> [String; 2] {
    let [v4, v6] = tunnel(number);
    [format!("{v4}/32"), format!("{v6}/128")]
}

/// Each of `sites` with each other as a peer.
pub fn full_mesh(sites: &[Site], flags: &[&str]) -> Result<Vec<Tunnel>> {
    let start = |site: &Site| {
        let others = sites.iter().filter(|other| other.number != site.number);
        let peers: Vec<_> = others.map(|other| peer(other.number)).collect();
        site.start(&peers, flags)
    };
    sites.iter().map(start).collect()
}

/// Waits until the containers of two sites hear each other.
pub fn wait_for_each_other(a: &Site, b: &Site) -> Result<()> {
    for (from, to) in [(a, b), (b, a)] {
        for address in inside(to.number) {
            wait_for(&from.container, address)?;
        }
    }
    Ok(())
}

/// Pings with `bytes` of payload, more than a packet holds, until an answer
/// comes: each narrower link on the way costs an attempt.
pub fn large_ping(from: &Namespace, to: IpAddr, bytes: usize) -> Result<()> {
    wait_until(&format!("{to} answers a ping of {bytes} bytes"), || {
        Ok(ping(from, to, bytes, Duration::from_millis(400)).is_ok())
    })
}

/// Sends megabytes over TCP from one site's container to another's, IPv4 (0) or
/// IPv6 (1) inside, and checks every byte.
pub fn transfer(from: &Site, to: &Site, family: usize, megabytes: u64) -> Result<()> {
    let address = inside(to.number)[family];
    bulk(&from.container, &to.container, address, megabytes)
}

/// Nothing came from where it should not, and nothing was mangled on its way.
/// What the hosts say to multicast groups of their own has no route, and some of
/// it a hop limit of 1.
pub fn all_went_well(ended: &Ended) -> Result<()> {
    for reason in [
        "sender-unknown",
        "source-not-allowed",
        "peer-unresolved",
        "tun-malformed",
        "too-big",
        "short",
        "version",
        "length",
        "truncated",
        "send-error",
    ] {
        check(ended.dropped(reason) == 0, || {
            format!("dropped for {reason}:\n{}", ended.log)
        })?;
    }
    for reason in ["no-route", "ttl"] {
        check(ended.dropped(reason) < 50, || ended.log.clone())?;
    }
    Ok(())
}
