//! The kernel's routes to the peers' prefixes: there, put back, and gone in
//! time; and nobody else's.

use std::collections::BTreeSet;
use std::net::IpAddr;

use fastvpn::error::{Error, Result};
use fastvpn::host::netlink::{Route, RouteKind};
use ipnet::IpNet;
use nix::sys::signal::Signal;
use testbed::{Namespace, UNDERLAY_NAME};

use crate::operator::Operator;
use crate::packets::TUNNEL_NAME;
use crate::site::{Site, inside, peer, prefixes, sites, underlay, wait_for_each_other};
use crate::support::{check, fastvpn, link, stop, wait_for, wait_until};
use crate::tools::{RouteCommand, inventory, ip_route, main_routes, nothing_left};

/// A prefix in words.
pub fn net(text: &str) -> Result<IpNet> {
    text.parse()
        .map_err(|_| Error::new(format!("{text} is no network")))
}

fn nets(list: &str) -> Result<BTreeSet<IpNet>> {
    list.split(',').map(net).collect()
}

/// The protocols of routes that a kernel or ip(8) makes: redirect, kernel,
/// boot, static (linux/rtnetlink.h).
const COMMON_PROTOCOLS: std::ops::RangeInclusive<u8> = 0..=4;

/// The routes that fastvpn has made: through its device, by a protocol of its
/// own.
pub fn own_routes(namespace: &Namespace) -> Result<BTreeSet<IpNet>> {
    let index = link(namespace, TUNNEL_NAME)?.index;
    let is_own = |route: &Route| {
        route.oif == Some(index)
            && route.kind == RouteKind::Unicast
            && !COMMON_PROTOCOLS.contains(&route.protocol)
    };
    let routes = main_routes(namespace)?;
    let own = routes.iter().filter(|route| is_own(route));
    Ok(own.map(|route| route.destination).collect())
}

/// All other routes of the main table.
fn foreign_routes(namespace: &Namespace) -> Result<BTreeSet<String>> {
    let routes = main_routes(namespace)?;
    let foreign = routes
        .iter()
        .filter(|route| COMMON_PROTOCOLS.contains(&route.protocol));
    Ok(foreign.map(|route| format!("{route:?}")).collect())
}

/// The kernel has routes of ours to what is in the table, and to nothing else.
pub fn kernel_agrees(namespace: &Namespace, operator: &Operator) -> Result<()> {
    let table = operator.routes()?;
    let prefixes: BTreeSet<_> = table.iter().map(|(prefix, _)| *prefix).collect();
    check(prefixes.len() == table.len(), || {
        format!("a prefix is there twice: {table:?}")
    })?;
    let own = own_routes(namespace)?;
    check(own == prefixes, || {
        let missing: Vec<_> = prefixes.difference(&own).collect();
        let extra: Vec<_> = own.difference(&prefixes).collect();
        format!("no route for {missing:?}, routes for {extra:?}")
    })
}

/// Whether packets to `address` go into the tunnel.
pub fn goes_in(namespace: &Namespace, address: IpAddr) -> Result<bool> {
    let mut netlink = namespace.netlink()?;
    match netlink.link_index(TUNNEL_NAME)? {
        Some(index) => Ok(netlink.interface_to((address, 0).into())? == Some(index)),
        None => Ok(false),
    }
}

fn has_exactly(site: &Site, wanted: &BTreeSet<IpNet>) -> Result<()> {
    let own = own_routes(&site.host)?;
    check(own == *wanted, || format!("routes {own:?}, not {wanted:?}"))
}

#[testbed::trial]
fn routes_come_and_go_with_prefixes() -> Result<()> {
    let network = sites(3)?;
    let site = &network.all[0];
    let before = inventory(&site.host)?;
    let operator = Operator::new()?;
    let socket = operator.socket_text();
    let tunnel = site.start(&[peer(2), peer(3)], &["--control", &socket])?;
    operator.wait()?;
    let mut wanted = nets(&prefixes(2))?;
    wanted.extend(nets(&prefixes(3))?);
    has_exactly(site, &wanted)?;

    // When a command returns, its routes are there.
    operator.tell(&format!(
        "route add 172.30.0.0/16 fd00:30::/32 --peer {}",
        underlay(2)
    ))?;
    wanted.extend(nets("172.30.0.0/16,fd00:30::/32")?);
    has_exactly(site, &wanted)?;
    operator.tell(&format!(
        "route add 172.30.0.0/16 --replace --peer {}",
        underlay(3)
    ))?;
    has_exactly(site, &wanted)?;
    operator.tell("route del fd00:30::/32")?;
    wanted.remove(&net("fd00:30::/32")?);
    has_exactly(site, &wanted)?;
    operator.tell(&format!("peer del {}", underlay(3)))?;
    has_exactly(site, &nets(&prefixes(2))?)?;
    operator.tell(&format!("peer add {}=172.31.0.0/16", underlay(3)))?;
    wanted = nets(&prefixes(2))?;
    wanted.insert(net("172.31.0.0/16")?);
    has_exactly(site, &wanted)?;
    // Default routes of either family are routes, too.
    operator.tell(&format!("route add ::/0 --peer {}", underlay(3)))?;
    wanted.insert(net("::/0")?);
    has_exactly(site, &wanted)?;
    stop(tunnel)?;
    nothing_left(&site.host, &before)?;

    // Nor is there anything left of one that was killed.
    let mut tunnel = site.start(&[peer(2), peer(3)], &["--control", &socket])?;
    operator.wait()?;
    check(own_routes(&site.host)?.len() == 8, || "no routes".into())?;
    tunnel.child().signal(Signal::SIGKILL);
    tunnel.wait()?;
    wait_until("all of it goes", || {
        Ok(nothing_left(&site.host, &before).is_ok())
    })
}

#[testbed::trial]
fn routes_are_put_back() -> Result<()> {
    let network = sites(2)?;
    let [a, b] = &network.all[..] else {
        return Err(Error::new("two sites"));
    };
    let tunnels = [a.start(&[peer(2)], &[])?, b.start(&[peer(1)], &[])?];
    wait_for_each_other(a, b)?;
    let wanted = nets(&prefixes(2))?;
    let is_back = |prefix: &IpNet, address: IpAddr| {
        wait_until(&format!("the route {prefix} is back"), || {
            Ok(own_routes(&a.host)? == wanted && goes_in(&a.host, address)?)
        })
    };
    let behind = [net("172.18.2.0/24")?, net("fd00:18:2::/64")?];
    for _ in 0..2 {
        for (prefix, address) in behind.iter().zip(inside(2)) {
            ip_route(&a.host, RouteCommand::Delete, *prefix, TUNNEL_NAME, None)?;
            is_back(prefix, address)?;
            wait_for(&a.container, address)?;
            // In IPv6 routes of another metric are other routes: ours has 1.
            let metric = Some(1).filter(|_| address.is_ipv6());
            let replace = RouteCommand::Replace;
            ip_route(&a.host, replace, *prefix, UNDERLAY_NAME, metric)?;
            is_back(prefix, address)?;
            wait_for(&a.container, address)?;
            // The other one stays, behind ours, until its owner takes it away.
            let delete = RouteCommand::Delete;
            ip_route(&a.host, delete, *prefix, UNDERLAY_NAME, metric)?;
            is_back(prefix, address)?;
        }
    }
    // Whoever insists is outlasted, and is answered in the end.
    for (prefix, address) in behind.iter().zip(inside(2)) {
        for _ in 0..30 {
            // Whether it is there at the moment or not.
            let _ = ip_route(&a.host, RouteCommand::Delete, *prefix, TUNNEL_NAME, None);
        }
        is_back(prefix, address)?;
        wait_for(&a.container, address)?;
    }
    // All at once.
    for prefix in &wanted {
        ip_route(&a.host, RouteCommand::Delete, *prefix, TUNNEL_NAME, None)?;
    }
    for (prefix, address) in behind.iter().zip(inside(2)) {
        is_back(prefix, address)?;
    }
    wait_for_each_other(a, b)?;
    tunnels.into_iter().try_for_each(|end| stop(end).map(drop))
}

/// Routes that look like ours but are not.
#[testbed::trial]
fn routes_of_others_stay() -> Result<()> {
    let network = sites(2)?;
    let site = &network.all[0];
    let operator = Operator::new()?;
    let socket = operator.socket_text();
    // In the way of nobody: a longer and a shorter prefix than the peer's, and
    // the same one with a metric, where ours wins.
    for (prefix, metric) in [
        ("172.18.2.128/25", None),
        ("172.18.0.0/16", None),
        ("172.18.2.0/24", Some(5000)),
        ("fd00:18:2:0:8000::/65", None),
        ("fd00:18:2::/64", Some(5000)),
        ("172.29.0.0/16", None),
    ] {
        ip_route(
            &site.host,
            RouteCommand::Add,
            net(prefix)?,
            UNDERLAY_NAME,
            metric,
        )?;
    }
    let before = foreign_routes(&site.host)?;
    let tunnel = site.start(&[peer(2)], &["--control", &socket])?;
    operator.wait()?;
    let [v4, v6] = inside(2);
    check(goes_in(&site.host, v4)? && goes_in(&site.host, v6)?, || {
        "a route with a metric wins".into()
    })?;
    // An operator's own route through the tunnel.
    let own_way = [net("172.28.0.0/16")?, net("fd00:28::/32")?];
    for prefix in own_way {
        ip_route(&site.host, RouteCommand::Add, prefix, TUNNEL_NAME, None)?;
    }
    let with_tunnel = foreign_routes(&site.host)?;
    let same = || -> Result<()> {
        let now = foreign_routes(&site.host)?;
        check(now == with_tunnel, || {
            let lost: Vec<_> = with_tunnel.difference(&now).collect();
            let new: Vec<_> = now.difference(&with_tunnel).collect();
            format!("routes of others: lost {lost:?}, new {new:?}")
        })
    };
    operator.tell(&format!("route add 172.27.0.0/16 --peer {}", underlay(2)))?;
    same()?;
    ip_route(
        &site.host,
        RouteCommand::Delete,
        net("172.27.0.0/16")?,
        TUNNEL_NAME,
        None,
    )?;
    wait_until("the route is back", || {
        Ok(own_routes(&site.host)?.contains(&net("172.27.0.0/16")?))
    })?;
    same()?;
    operator.tell("route del 172.27.0.0/16 172.18.2.0/24 fd00:18:2::/64")?;
    same()?;
    // One who deletes his own route through the tunnel finds it gone.
    ip_route(
        &site.host,
        RouteCommand::Delete,
        own_way[0],
        TUNNEL_NAME,
        None,
    )?;
    operator.tell(&format!("route add 172.27.0.0/16 --peer {}", underlay(2)))?;
    check(
        !goes_in(&site.host, "172.28.1.1".parse().unwrap_or(v4))?,
        || "somebody's route came back".into(),
    )?;
    stop(tunnel)?;
    let after = foreign_routes(&site.host)?;
    check(after == before, || {
        format!("routes of others: {before:?} before, {after:?} after")
    })
}

/// A prefix to which somebody has a route already is not taken from him.
#[testbed::trial]
fn routes_that_others_have() -> Result<()> {
    let network = sites(2)?;
    let site = &network.all[0];
    let operator = Operator::new()?;
    let socket = operator.socket_text();
    let taken = ["172.30.0.0/16", "fd00:30::/32"];
    for prefix in taken {
        ip_route(
            &site.host,
            RouteCommand::Add,
            net(prefix)?,
            UNDERLAY_NAME,
            None,
        )?;
    }
    let before = foreign_routes(&site.host)?;
    let tunnel = site.start(&[peer(2)], &["--control", &socket])?;
    operator.wait()?;
    let with_tunnel = foreign_routes(&site.host)?;
    let table = operator.routes()?;
    for prefix in taken {
        operator.refuses(
            &format!("route add 172.26.0.0/16 {prefix} --peer {}", underlay(2)),
            &[prefix],
        )?;
        // All or nothing.
        let now = operator.routes()?;
        check(now == table, || format!("the table has changed: {now:?}"))?;
        has_exactly(site, &nets(&prefixes(2))?)?;
        let now = foreign_routes(&site.host)?;
        check(now == with_tunnel, || format!("{now:?}"))?;
    }
    stop(tunnel)?;
    let after = foreign_routes(&site.host)?;
    check(after == before, || format!("{after:?}"))
}

#[testbed::trial]
fn routes_left_alone() -> Result<()> {
    let network = sites(2)?;
    let [a, b] = &network.all[..] else {
        return Err(Error::new("two sites"));
    };
    let operator = Operator::new()?;
    let socket = operator.socket_text();
    let tunnels = [
        a.start(&[peer(2)], &["--no-routes", "--control", &socket])?,
        b.start(&[peer(1)], &[])?,
    ];
    operator.wait()?;
    let before = main_routes(&a.host)?;
    check(own_routes(&a.host)?.is_empty(), || format!("{before:?}"))?;
    operator.tell(&format!("route add 172.30.0.0/16 --peer {}", underlay(2)))?;
    let after = main_routes(&a.host)?;
    check(after == before, || format!("{after:?}"))?;
    // The operator's own routes do.
    let own: Vec<_> = nets(&prefixes(2))?.into_iter().collect();
    for prefix in &own {
        ip_route(&a.host, RouteCommand::Add, *prefix, TUNNEL_NAME, None)?;
    }
    wait_for_each_other(a, b)?;
    for prefix in &own {
        ip_route(&a.host, RouteCommand::Delete, *prefix, TUNNEL_NAME, None)?;
    }
    operator.tell("route del 172.30.0.0/16")?;
    operator.tell(&format!("route add 172.30.0.0/16 --peer {}", underlay(2)))?;
    let after = main_routes(&a.host)?;
    check(after == before, || format!("{after:?}"))?;
    tunnels.into_iter().try_for_each(|end| stop(end).map(drop))
}

/// The kernel drops routes with the interface that goes down, and IPv6
/// addresses with them.
#[testbed::trial]
fn routes_return_with_the_interface() -> Result<()> {
    let network = sites(2)?;
    let [a, b] = &network.all[..] else {
        return Err(Error::new("two sites"));
    };
    let tunnels = [a.start(&[peer(2)], &[])?, b.start(&[peer(1)], &[])?];
    wait_for_each_other(a, b)?;
    let wanted = nets(&prefixes(2))?;
    let index = link(&a.host, TUNNEL_NAME)?.index;
    for _ in 0..2 {
        testbed::ip(&a.host, &format!("link set {TUNNEL_NAME} down"))?;
        check(own_routes(&a.host)?.is_empty(), || {
            "the kernel has changed".into()
        })?;
        a.host.netlink()?.set_up(index)?;
        wait_until("the routes are back", || Ok(own_routes(&a.host)? == wanted))?;
        wait_for_each_other(a, b)?;
    }
    tunnels.into_iter().try_for_each(|end| stop(end).map(drop))
}

/// The kernel takes IPv6 away from an interface with an MTU below 1280 bytes;
/// IPv4 goes on as ever, and IPv6 comes back with the MTU.
#[testbed::trial]
fn routes_without_ipv6() -> Result<()> {
    let network = sites(2)?;
    let [a, b] = &network.all[..] else {
        return Err(Error::new("two sites"));
    };
    let operator = Operator::new()?;
    let socket = operator.socket_text();
    let tunnels = [
        a.start(&[peer(2)], &["--control", &socket])?,
        b.start(&[peer(1)], &[])?,
    ];
    operator.wait()?;
    wait_for_each_other(a, b)?;
    let (mut both, mut v4) = (nets(&prefixes(2))?, nets(&prefixes(2))?);
    v4.retain(|prefix| matches!(prefix, IpNet::V4(_)));
    let link = link(&a.host, TUNNEL_NAME)?;
    a.host.netlink()?.set_mtu(link.index, 1200)?;
    check(own_routes(&a.host)? == v4, || {
        "the kernel has changed".into()
    })?;
    for _ in 0..2 {
        let prefix = net("172.18.2.0/24")?;
        ip_route(&a.host, RouteCommand::Delete, prefix, TUNNEL_NAME, None)?;
        wait_until("the IPv4 route is back", || Ok(own_routes(&a.host)? == v4))?;
        wait_for(&a.container, inside(2)[0])?;
    }
    // Operators can change what the kernel takes. What it does not waits for the MTU.
    for prefix in ["172.30.0.0/16", "fd00:30::/32"] {
        operator.tell(&format!("route add {prefix} --peer {}", underlay(2)))?;
    }
    operator.tell("route del 172.30.0.0/16")?;
    check(own_routes(&a.host)? == v4, || "routes are left".into())?;

    a.host.netlink()?.set_mtu(link.index, link.mtu)?;
    both.insert(net("fd00:30::/32")?);
    wait_until("IPv6 is back", || Ok(own_routes(&a.host)? == both))?;
    wait_for_each_other(a, b)?;
    tunnels.into_iter().try_for_each(|end| stop(end).map(drop))
}

/// A prefix that leads datagrams to a peer, whichever, into the tunnel itself is
/// refused, at the start and later.
#[testbed::trial]
fn prefixes_that_swallow_a_peer() -> Result<()> {
    let routed = crate::host::underlay::routed()?;
    let (host, far) = (&routed.hosts.a, "10.211.56.123");
    let operator = Operator::new()?;
    let socket = operator.socket_text();
    let addresses = "--address 10.244.0.1/32";
    for peers in [
        format!("--peer {far}=10.211.56.123/32"),
        format!("--peer {far}=10.244.0.2/32,10.211.56.0/25"),
        format!("--peer {far}=10.211.56.128/25 --peer 10.211.56.200=172.30.0.0/16"),
    ] {
        let before = inventory(host)?;
        let ended = fastvpn(host, &format!("{addresses} --control {socket} {peers}"))?.wait()?;
        let is_one_line = ended
            .log
            .lines()
            .filter(|line| line.starts_with("fastvpn: "))
            .count();
        check(ended.status.code() == Some(1) && is_one_line == 1, || {
            format!("{peers}: {}:\n{}", ended.status, ended.log)
        })?;
        nothing_left(host, &before)?;
    }
    let ends = [
        fastvpn(
            host,
            &format!("{addresses} --control {socket} --peer {far}=10.244.0.2/32"),
        )?,
        fastvpn(
            &routed.hosts.b,
            "--address 10.244.0.2/32 --peer 10.211.55.122=10.244.0.1/32",
        )?,
    ];
    operator.wait()?;
    wait_for(host, [10, 244, 0, 2].into())?;
    let (table, routes) = (operator.routes()?, own_routes(host)?);
    for words in [
        format!("route add 10.211.56.123/32 --peer {far}"),
        format!("route add 10.211.56.0/25 --peer {far}"),
        "peer add 10.211.56.200=10.211.56.192/26".into(),
        "peer add 10.211.55.99=10.211.56.123/32".into(),
        "peer add 10.244.0.2:9=172.30.0.0/16".into(),
    ] {
        operator.refuses(&words, &["10.2"])?;
        let unchanged = operator.routes()? == table && own_routes(host)? == routes;
        check(unchanged, || format!("{words} has changed something"))?;
        wait_for(host, [10, 244, 0, 2].into())?;
    }
    // Beside it is fine.
    operator.tell(&format!("route add 10.211.56.128/25 --peer {far}"))?;
    wait_for(host, [10, 244, 0, 2].into())?;
    ends.into_iter().try_for_each(|end| stop(end).map(drop))
}
