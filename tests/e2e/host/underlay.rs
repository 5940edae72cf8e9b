//! Underlays of other sizes and kinds: what the tunnel's MTU makes of them, and
//! what happens when a path shrinks.

use std::net::{IpAddr, Ipv4Addr};

use fastvpn::error::{Error, Result};
use ipnet::IpNet;
use testbed::{Namespace, Pair, StaticRoutes, UNDERLAY_NAME, pair};

use crate::support::{
    TUNNEL, TUNNEL_V6, answers, bulk, check, fastvpn, hosts, link, stop, tunnel_between, wait_for,
};
use crate::tools::Stream;

fn net(text: &str) -> Result<IpNet> {
    text.parse()
        .map_err(|_| Error::new(format!("{text} is no network")))
}

/// Sets an interface's MTU.
pub fn set_mtu(namespace: &Namespace, name: &str, mtu_bytes: u32) -> Result<()> {
    let index = link(namespace, name)?.index;
    namespace.netlink()?.set_mtu(index, mtu_bytes)
}

/// Bulk data and pings, both ways.
fn both_ways(hosts: &Pair, tunnel: [IpAddr; 2]) -> Result<()> {
    bulk(&hosts.a, &hosts.b, tunnel[1], 20)?;
    bulk(&hosts.b, &hosts.a, tunnel[0], 20)?;
    answers(&hosts.a, tunnel[1], 20_000)?;
    answers(&hosts.b, tunnel[0], 1400)
}

#[testbed::trial(each_engine)]
fn the_mtu_follows_the_underlay() -> Result<()> {
    for (underlay, tunnel) in [(1280, 1252), (1500, 1472), (9000, 8972)] {
        let hosts = hosts(underlay)?;
        let ends = tunnel_between(&hosts, &[])?;
        for namespace in [&hosts.a, &hosts.b] {
            let mtu = link(namespace, "fastvpn0")?.mtu;
            check(mtu == tunnel, || format!("MTU {mtu} over {underlay}"))?;
        }
        both_ways(&hosts, TUNNEL.map(IpAddr::from))?;
        ends.into_iter().try_for_each(|end| stop(end).map(drop))?;
    }
    Ok(())
}

/// The kernel fragments what does not fit, and puts it together again.
#[testbed::trial(each_engine)]
fn an_mtu_larger_than_the_path() -> Result<()> {
    let hosts = hosts(1500)?;
    let ends = tunnel_between(&hosts, &["--mtu", "4000"])?;
    let mtu = link(&hosts.a, "fastvpn0")?.mtu;
    check(mtu == 4000, || format!("MTU {mtu}"))?;
    both_ways(&hosts, TUNNEL.map(IpAddr::from))?;
    ends.into_iter().try_for_each(|end| stop(end).map(drop))
}

/// Two hosts in two networks with a router between them.
pub struct Routed {
    /// The hosts, each with one neighbour: the router.
    pub hosts: Pair,
    /// Its interface toward host B is `right`.
    pub router: Namespace,
}

/// Makes them, with 10.211.55.122 and 10.211.56.123 for the hosts.
pub fn routed() -> Result<Routed> {
    let (a, b, router) = (Namespace::new()?, Namespace::new()?, Namespace::new()?);
    router.sysctl("net/ipv4/ip_forward", "1")?;
    for (host, far_side, own, gateway) in [
        (&a, "left", "10.211.55.122/24", "10.211.55.1/24"),
        (&b, "right", "10.211.56.123/24", "10.211.56.1/24"),
    ] {
        testbed::join(host, &router, UNDERLAY_NAME, far_side)?;
        for (namespace, name, address) in [(host, UNDERLAY_NAME, own), (&router, far_side, gateway)]
        {
            let mut netlink = namespace.netlink()?;
            let index = link(namespace, name)?.index;
            netlink.set_up(index)?;
            netlink.add_address(index, net(address)?)?;
        }
        let gateway = net(gateway)?.addr();
        host.netlink()?
            .add_route(net("10.211.0.0/16")?, Some(gateway), None)?;
    }
    Ok(Routed {
        hosts: Pair { a, b },
        router,
    })
}

/// Host A learns of it from the router's ICMP, host B from its own interface.
#[testbed::trial(each_engine)]
fn a_path_that_shrinks() -> Result<()> {
    let Routed { hosts, router } = routed()?;
    let tunnel = [
        Ipv4Addr::new(10, 244, 55, 122).into(),
        Ipv4Addr::new(10, 244, 56, 123).into(),
    ];
    let ends = [
        fastvpn(&hosts.a, "--peer 10.211.56.123")?,
        fastvpn(&hosts.b, "--peer 10.211.55.122")?,
    ];
    wait_for(&hosts.a, tunnel[1])?;
    let streams = [
        Stream::start(&hosts.a, &hosts.b, tunnel[1])?,
        Stream::start(&hosts.b, &hosts.a, tunnel[0])?,
    ];
    for mtu_bytes in [1400, 1000] {
        streams.iter().try_for_each(Stream::wait_for_progress)?;
        set_mtu(&hosts.b, UNDERLAY_NAME, mtu_bytes)?;
        set_mtu(&router, "right", mtu_bytes)?;
        streams.iter().try_for_each(Stream::wait_for_progress)?;
    }
    for stream in streams {
        stream.finish()?;
    }
    both_ways(&hosts, tunnel)?;
    ends.into_iter().try_for_each(|end| stop(end).map(drop))
}

/// The host's own interface, in the middle of a transfer, down and up again.
#[testbed::trial(each_engine)]
fn an_underlay_that_shrinks() -> Result<()> {
    let hosts = hosts(9000)?;
    let ends = tunnel_between(&hosts, &[])?;
    let stream = Stream::start(&hosts.a, &hosts.b, TUNNEL[1].into())?;
    for mtu_bytes in [1500, 700, 9000] {
        stream.wait_for_progress()?;
        set_mtu(&hosts.a, UNDERLAY_NAME, mtu_bytes)?;
    }
    stream.wait_for_progress()?;
    stream.finish()?;
    both_ways(&hosts, TUNNEL.map(IpAddr::from))?;
    ends.into_iter().try_for_each(|end| stop(end).map(drop))
}

#[testbed::trial(each_engine)]
fn an_underlay_of_ipv6() -> Result<()> {
    let underlay = (net("fd00:55::122/64")?, net("fd00:55::123/64")?);
    let hosts = pair(&[underlay], 1500)?;
    let ends = [
        fastvpn(&hosts.a, "--peer fd00:55::123")?,
        fastvpn(&hosts.b, "--peer [fd00:55::122]:8285")?,
    ];
    // Derived from the last two bytes of the underlay's, 0x0122 and 0x0123.
    let tunnel = [Ipv4Addr::new(10, 244, 1, 34), Ipv4Addr::new(10, 244, 1, 35)];
    wait_for(&hosts.a, tunnel[1].into())?;
    let mtu = link(&hosts.a, "fastvpn0")?.mtu;
    check(mtu == 1452, || format!("MTU {mtu} over IPv6"))?;
    both_ways(&hosts, tunnel.map(IpAddr::from))?;

    let mut inner = tunnel.map(IpAddr::from);
    for (place, namespace) in [&hosts.a, &hosts.b].into_iter().enumerate() {
        let address = net(&format!("{}/64", TUNNEL_V6[place]))?;
        let index = link(namespace, "fastvpn0")?.index;
        namespace.netlink()?.add_address(index, address)?;
        inner[place] = address.addr();
    }
    wait_for(&hosts.a, inner[1])?;
    both_ways(&hosts, inner)?;
    for end in ends {
        let ended = stop(end)?;
        check(ended.dropped("sender-unknown") == 0, || ended.log)?;
    }
    Ok(())
}
