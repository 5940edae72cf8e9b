//! The kernel's routes to what is behind the peers: there, put back, gone again,
//! and nobody else's touched.

use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;

use fastvpn::error::{Error, Result};
use fastvpn::lab::{Namespace, Pair, UNDERLAY_NAME};
use fastvpn::netlink::{DeviceRoute, RouteChange, RouteEntry};
use ipnet::IpNet;
use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage,
    NetlinkPayload,
};
use netlink_packet_route::route::{
    RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::{Socket, SocketAddr};

use crate::operator::Operator;
use crate::packets::TUNNEL_NAME;
use crate::support::{
    FAMILIES, Test, Tunnel, UNDERLAY, answers, bulk, check, fail, hosts, link, stop, tried,
    wait_for, wait_until,
};
use crate::tools::Stream;

/// The tests of this file that carry traffic.
pub fn tests() -> Vec<Test> {
    vec![("a_device_set_down_and_up", a_device_set_down_and_up)]
}

/// The tests of this file that do not.
pub fn tests_of_no_engine() -> Vec<Test> {
    vec![
        ("kernel_routes_come_and_go", kernel_routes_come_and_go),
        ("deleted_routes_come_back", deleted_routes_come_back),
        ("replaced_routes_come_back", replaced_routes_come_back),
        ("no_routes_are_left_alone", no_routes_are_left_alone),
    ]
}

/// `rtm_protocol` of the tunnel's routes.
const PROTOCOL: u8 = 82;

/// What is behind the peer.
const PREFIXES: &str = "10.91.0.0/16,10.92.7.128/25,fd00:91::/32";

/// What other programs have routed elsewhere: beside, above and below that.
const FOREIGN: [&str; 5] = [
    "10.93.0.0/16",
    "10.0.0.0/8",
    "10.91.4.0/24",
    "fd00:93::/32",
    "fd00:91:4::/48",
];

fn nets(list: &str) -> Result<BTreeSet<IpNet>> {
    let net = |text: &str| {
        text.parse()
            .map_err(|_| Error::new(format!("{text} is no network")))
    };
    list.split(',').map(net).collect()
}

/// Host A, with routes of its own, and what fastvpn does there.
struct Host {
    hosts: Pair,
    operator: Operator,
    /// All routes before there was a tunnel.
    before: Vec<RouteEntry>,
}

impl Host {
    fn new() -> Result<Self> {
        let hosts = hosts(1500)?;
        let underlay = link(&hosts.a, UNDERLAY_NAME)?.index;
        let mut netlink = hosts.a.netlink()?;
        for net in nets(&FOREIGN.join(","))? {
            netlink.add_route(net, None, Some(underlay))?;
        }
        let before = netlink.main_routes(&|_| true)?;
        Ok(Self {
            hosts,
            operator: Operator::new()?,
            before,
        })
    }

    /// Starts a tunnel to host B, and waits until it has its operators' socket:
    /// then it has its routes, too.
    fn start(&self, flags: &[&str]) -> Result<Tunnel> {
        let peer = format!("{}={PREFIXES}", UNDERLAY[1]);
        let socket = self.operator.socket_text();
        let own = [
            "--peer",
            &peer,
            "--address=10.244.55.122/32",
            "--address=fd00:244::122/128",
            "--control",
            &socket,
        ];
        let tunnel = Tunnel::start(&self.hosts.a, &[&own, flags].concat())?;
        wait_until("the operators' socket answers", || {
            Ok(self.operator.connect().is_ok())
        })?;
        Ok(tunnel)
    }

    fn tunnel_index(&self) -> Result<u32> {
        Ok(link(&self.hosts.a, TUNNEL_NAME)?.index)
    }

    /// The tunnel's routes; all must lead there.
    fn ours(&self) -> Result<BTreeSet<IpNet>> {
        ours(&self.hosts.a)
    }

    /// Everybody else's routes, but for those that the kernel makes for the
    /// device, are what they were.
    fn others_are_untouched(&self) -> Result<()> {
        let device = self.hosts.a.netlink()?.link_index(TUNNEL_NAME)?;
        let mut netlink = self.hosts.a.netlink()?;
        let is_other = |entry: &RouteEntry| {
            entry.protocol != PROTOCOL && (device.is_none() || entry.oif != device)
        };
        let now = netlink.main_routes(&is_other)?;
        check(now == self.before, || {
            format!("routes of others: {:#?}, now {now:#?}", self.before)
        })
    }

    /// One request on the operators' socket, which must be granted.
    fn ask(&self, request: &str) -> Result<()> {
        let answer = self.operator.request(request)?;
        check(answer["ok"] == true, || format!("{request}: {answer}"))
    }

    /// Whether the kernel would send what is for this address into the tunnel.
    fn leads_into_tunnel(&self, address: IpAddr) -> Result<bool> {
        let tunnel = self.tunnel_index()?;
        let interface = self.hosts.a.netlink()?.interface_to(address)?;
        Ok(interface == Some(tunnel))
    }
}

/// The tunnel's routes in a namespace; all must lead into the tunnel.
fn ours(namespace: &Namespace) -> Result<BTreeSet<IpNet>> {
    let mut netlink = namespace.netlink()?;
    let device = netlink.link_index(TUNNEL_NAME)?;
    let entries = netlink.main_routes(&|entry| entry.protocol == PROTOCOL)?;
    for entry in &entries {
        check(entry.unicast && entry.oif == device, || {
            format!("a route that leads elsewhere: {entry:?}")
        })?;
    }
    let found: BTreeSet<_> = entries.iter().map(|entry| entry.destination).collect();
    check(found.len() == entries.len(), || {
        format!("a route twice: {entries:?}")
    })?;
    Ok(found)
}

fn expect(found: BTreeSet<IpNet>, expected: &str) -> Result<()> {
    let expected = match expected {
        "" => BTreeSet::new(),
        list => nets(list)?,
    };
    check(found == expected, || {
        format!("routes {found:?}, expected {expected:?}")
    })
}

/// An address in a prefix, in none of the foreign ones.
fn address_in(prefix: IpNet) -> Result<IpAddr> {
    match prefix.hosts().nth(5) {
        Some(address) => Ok(address),
        None => fail(format!("{prefix} is too small")),
    }
}

fn kernel_routes_come_and_go() -> Result<()> {
    let host = Host::new()?;
    let tunnel = host.start(&["--route", "10.94.0.0/16"])?;
    let configured = format!("{PREFIXES},10.94.0.0/16");
    expect(host.ours()?, &configured)?;
    host.others_are_untouched()?;
    for prefix in nets(&configured)? {
        let is_there = host.leads_into_tunnel(address_in(prefix)?)?;
        check(is_there, || format!("{prefix} leads elsewhere"))?;
    }
    // Each is in force when the answer is there.
    let peer = format!("{}:8285", UNDERLAY[1]);
    for (request, expected) in [
        (
            format!(
                r#"{{"command":"route-add","peer":"{peer}","prefixes":["10.95.1.0/24","fd00:95::/48"]}}"#
            ),
            format!("{configured},10.95.1.0/24,fd00:95::/48"),
        ),
        (
            r#"{"command":"peer-add","peer":"10.211.55.200","prefixes":["10.96.0.0/16","fd00:96::/32"]}"#
                .to_string(),
            format!("{configured},10.95.1.0/24,fd00:95::/48,10.96.0.0/16,fd00:96::/32"),
        ),
        (
            r#"{"command":"route-del","prefixes":["10.95.1.0/24","10.91.0.0/16"]}"#.to_string(),
            "10.92.7.128/25,fd00:91::/32,10.94.0.0/16,fd00:95::/48,10.96.0.0/16,fd00:96::/32"
                .to_string(),
        ),
        (
            r#"{"command":"peer-del","peer":"10.211.55.200"}"#.to_string(),
            "10.92.7.128/25,fd00:91::/32,10.94.0.0/16,fd00:95::/48".to_string(),
        ),
        (
            format!(r#"{{"command":"peer-del","peer":"{peer}"}}"#),
            // What nobody is behind was asked for with --route.
            "10.94.0.0/16".to_string(),
        ),
    ] {
        host.ask(&request)?;
        expect(host.ours()?, &expected)
            .map_err(|error| Error::new(format!("after {request}: {error}")))?;
        host.others_are_untouched()?;
    }
    stop(tunnel)?;
    // Nothing but what was there before, of no protocol.
    expect(host.ours()?, "")?;
    host.others_are_untouched()
}

fn deleted_routes_come_back() -> Result<()> {
    let host = Host::new()?;
    let tunnel = host.start(&[])?;
    expect(host.ours()?, PREFIXES)?;
    let route = DeviceRoute {
        oif: host.tunnel_index()?,
        protocol: PROTOCOL,
    };
    let changes: Vec<_> = nets(PREFIXES)?
        .into_iter()
        .map(RouteChange::Delete)
        .collect();
    let mut netlink = host.hosts.a.netlink()?;
    for _ in 0..2 {
        // Each was there, and the kernel took it away.
        let refused = netlink.change_device_routes(route, &changes)?;
        check(refused.is_empty(), || {
            format!("not there to delete: {refused:?}")
        })?;
        wait_until(
            "the routes are back",
            || Ok(host.ours()? == nets(PREFIXES)?),
        )?;
    }
    // What is not wanted any more stays away.
    host.ask(r#"{"command":"route-del","prefixes":["10.91.0.0/16"]}"#)?;
    let refused = netlink.change_device_routes(route, &changes[1..])?;
    check(refused.is_empty(), || format!("{refused:?}"))?;
    let left = "10.92.7.128/25,fd00:91::/32";
    wait_until("the routes are back", || Ok(host.ours()? == nets(left)?))?;
    host.others_are_untouched()?;
    stop(tunnel)?;
    host.others_are_untouched()
}

/// Does as `ip route replace PREFIX dev NAME [metric N]` does.
fn replace_route(
    namespace: &Namespace,
    prefix: IpNet,
    oif: u32,
    metric: Option<u32>,
) -> Result<()> {
    let mut route = RouteMessage::default();
    route.header.destination_prefix_length = prefix.prefix_len();
    route.header.table = RouteHeader::RT_TABLE_MAIN;
    route.header.protocol = RouteProtocol::Boot;
    route.header.kind = RouteType::Unicast;
    (route.header.address_family, route.header.scope) = match prefix {
        IpNet::V4(_) => (AddressFamily::Inet, RouteScope::Link),
        IpNet::V6(_) => (AddressFamily::Inet6, RouteScope::Universe),
    };
    route.attributes = vec![
        RouteAttribute::Destination(prefix.network().into()),
        RouteAttribute::Oif(oif),
    ];
    route
        .attributes
        .extend(metric.map(RouteAttribute::Priority));
    let mut request = NetlinkMessage::new(
        NetlinkHeader::default(),
        NetlinkPayload::from(RouteNetlinkMessage::NewRoute(route)),
    );
    request.header.flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE;
    request.finalize();
    let mut bytes = vec![0; request.buffer_len()];
    request.serialize(&mut bytes);
    let transact = || {
        let mut socket = Socket::new(netlink_sys::protocols::NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.send_to(&bytes, &SocketAddr::new(0, 0), 0)?;
        let mut answer = Vec::with_capacity(4096);
        socket.recv(&mut answer, 0)?;
        let answer = NetlinkMessage::<RouteNetlinkMessage>::deserialize(&answer);
        match answer.map_err(io::Error::other)?.payload {
            NetlinkPayload::Error(error) if error.code.is_none() => Ok(()),
            NetlinkPayload::Error(error) => Err(error.to_io()),
            other => Err(io::Error::other(format!("{other:?}"))),
        }
    };
    tried(
        &format!("replace the route {prefix}"),
        namespace.run(transact),
    )
}

/// Somebody's `ip route replace` takes ours away and leaves theirs. Ours comes
/// back, wins, and goes again; theirs stays.
fn replaced_routes_come_back() -> Result<()> {
    let host = Host::new()?;
    let tunnel = host.start(&[])?;
    let underlay = link(&host.hosts.a, UNDERLAY_NAME)?.index;
    let prefixes = nets(PREFIXES)?;
    let theirs = || {
        let mut netlink = host.hosts.a.netlink()?;
        let is_theirs = |entry: &RouteEntry| {
            entry.oif == Some(underlay) && prefixes.contains(&entry.destination)
        };
        let entries = netlink.main_routes(&is_theirs)?;
        Ok::<BTreeSet<_>, Error>(entries.iter().map(|entry| entry.destination).collect())
    };
    for prefix in &prefixes {
        // The metric of ours: with another, both are there and ours wins.
        let metric = matches!(prefix, IpNet::V6(_)).then_some(1);
        replace_route(&host.hosts.a, *prefix, underlay, metric)?;
    }
    wait_until("the routes are back and in front", || {
        let mut is_so = host.ours()? == prefixes;
        for prefix in &prefixes {
            is_so &= host.leads_into_tunnel(address_in(*prefix)?)?;
        }
        Ok(is_so)
    })?;
    expect(theirs()?, PREFIXES)?;
    // Once given up, the kernel follows theirs.
    host.ask(r#"{"command":"route-del","prefixes":["10.91.0.0/16","fd00:91::/32"]}"#)?;
    for prefix in nets("10.91.0.0/16,fd00:91::/32")? {
        let is_there = host.leads_into_tunnel(address_in(prefix)?)?;
        check(!is_there, || {
            format!("{prefix} still leads into the tunnel")
        })?;
    }
    expect(theirs()?, PREFIXES)?;
    stop(tunnel)?;
    expect(host.ours()?, "")?;
    expect(theirs()?, PREFIXES)
}

fn no_routes_are_left_alone() -> Result<()> {
    let host = Host::new()?;
    let tunnel = host.start(&["--no-routes"])?;
    expect(host.ours()?, "")?;
    let peer = format!("{}:8285", UNDERLAY[1]);
    host.ask(&format!(
        r#"{{"command":"route-add","peer":"{peer}","prefixes":["10.95.1.0/24"]}}"#
    ))?;
    expect(host.ours()?, "")?;
    host.others_are_untouched()?;
    // The tunnel knows the prefixes all the same.
    let found = host
        .operator
        .request(r#"{"command":"route-get","address":"10.95.1.9"}"#)?;
    check(found["peer"] == peer.as_str(), || found.to_string())?;
    stop(tunnel)?;
    host.others_are_untouched()
}

/// The kernel drops all routes, and the IPv6 addresses, of a device that goes
/// down.
fn a_device_set_down_and_up() -> Result<()> {
    let hosts = hosts(1500)?;
    let start = |host: usize| {
        let [own, other] = [host, 1 - host].map(|host| FAMILIES.map(|family| family[host]));
        let peer = format!("{}={},{}", UNDERLAY[1 - host], other[0], other[1]);
        let addresses = own.map(|address| format!("--address={address}"));
        let flags = ["--peer", &peer, &addresses[0], &addresses[1]];
        Tunnel::start([&hosts.a, &hosts.b][host], &flags)
    };
    let tunnels = [start(0)?, start(1)?];
    let far: BTreeSet<_> = FAMILIES
        .iter()
        .map(|family| IpNet::from(family[1]))
        .collect();
    for family in FAMILIES {
        wait_for(&hosts.a, family[1])?;
    }
    let stream = Stream::start(&hosts.a, &hosts.b, FAMILIES[0][1])?;
    let index = link(&hosts.a, TUNNEL_NAME)?.index;
    let mut netlink = hosts.a.netlink()?;
    for _ in 0..2 {
        stream.wait_for_progress()?;
        netlink.set_down(index)?;
        check(ours(&hosts.a)?.is_empty(), || {
            "routes through a device that is down".into()
        })?;
        netlink.set_up(index)?;
        wait_until("routes and addresses are back", || {
            let addresses = netlink.addresses()?;
            let is_there = |address: IpAddr| addresses.contains(&(index, IpNet::from(address)));
            Ok(ours(&hosts.a)? == far && FAMILIES.iter().all(|family| is_there(family[0])))
        })?;
        stream.wait_for_progress()?;
    }
    stream.finish()?;
    for [near, far] in FAMILIES {
        wait_for(&hosts.a, far)?;
        answers(&hosts.b, near, 1400)?;
        bulk(&hosts.a, &hosts.b, far, 5)?;
    }
    tunnels.into_iter().try_for_each(|end| stop(end).map(drop))
}
