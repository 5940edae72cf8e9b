//! Routes: which packets leave by which interface.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use ipnet::IpNet;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol, RouteScope,
    RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::address::family;
use super::{Netlink, Refusal};
use crate::error::{Error, Result};

/// What happens to a packet that a route matches (`rtm_type`, rtnetlink(7)).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RouteKind {
    /// It is sent on.
    Unicast,
    /// It is dropped without a word.
    Blackhole,
    /// It is dropped; the sender hears "host unreachable".
    Unreachable,
    /// It is dropped; the sender hears "administratively prohibited".
    Prohibit,
}

/// A route as the kernel lists it. A route with several next hops is listed
/// once for each of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// The packets' destination, masked.
    pub destination: IpNet,
    /// The router that they are sent to, if they are sent to one.
    pub via: Option<IpAddr>,
    /// Index of the interface that they leave by.
    pub oif: Option<u32>,
    /// What happens to them.
    pub kind: RouteKind,
    /// Routing table; the main one is 254.
    pub table: u32,
}

/// How the host would reach an address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Way {
    /// By this route. Of several next hops it has the first.
    Route(Route),
    /// There is a route, which drops all packets.
    Dropped,
    /// There is none.
    None,
}

/// What the kernel says where there is no route, or one of the types
/// unreachable, blackhole and prohibit, in this order (`fib_props` in
/// net/ipv4/fib_semantics.c; `ip6_rt_type_to_error()` in net/ipv6/route.c).
pub(super) const NO_WAY: [i32; 4] = [
    libc::ENETUNREACH,
    libc::EHOSTUNREACH,
    libc::EINVAL,
    libc::EACCES,
];

impl Netlink {
    /// Adds a route to the main table. Without `via` the destination is on the
    /// link itself.
    ///
    /// # Errors
    /// `EEXIST` when there is a route to the same prefix already; when there is
    /// no such interface, or it is down; when prefix and router are of
    /// different families.
    pub fn add_route(
        &mut self,
        prefix: IpNet,
        via: Option<IpAddr>,
        oif: Option<u32>,
    ) -> Result<()> {
        let mut message = route_message(prefix, via, oif)?;
        message.header.protocol = RouteProtocol::Static;
        message.header.kind = RouteType::Unicast;
        if matches!(prefix, IpNet::V4(_)) && via.is_none() {
            message.header.scope = RouteScope::Link;
        }
        self.execute(
            RouteNetlinkMessage::NewRoute(message),
            NLM_F_CREATE | NLM_F_EXCL,
        )
        .map_err(|refusal| {
            let hop = self.hop_for_error(via, oif);
            refusal.describe(format!("cannot add route {prefix}{hop}"))
        })
    }

    /// Deletes a route from the main table; `via` and `oif` narrow the choice.
    ///
    /// # Errors
    /// `ESRCH` when there is no such route.
    pub fn del_route(
        &mut self,
        prefix: IpNet,
        via: Option<IpAddr>,
        oif: Option<u32>,
    ) -> Result<()> {
        let mut message = route_message(prefix, via, oif)?;
        // "Nowhere" and a type and protocol of zero match whatever is there.
        message.header.scope = RouteScope::NoWhere;
        self.execute(RouteNetlinkMessage::DelRoute(message), 0)
            .map_err(|refusal| {
                let hop = self.hop_for_error(via, oif);
                refusal.describe(format!("cannot delete route {prefix}{hop}"))
            })
    }

    /// The routes of all tables, IPv4 and IPv6, that decide where packets of
    /// others go; not the host's own, broadcast, anycast and multicast
    /// addresses.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn routes(&mut self) -> Result<Vec<Route>> {
        let mut routes = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut message = RouteMessage::default();
            message.header.address_family = family;
            let listed = match self.dump(RouteNetlinkMessage::GetRoute(message)) {
                Ok(listed) => listed,
                // A kernel without IPv6 has no such table.
                Err(refusal) if refusal.is(libc::EOPNOTSUPP) => continue,
                Err(refusal) => return Err(refusal.describe("cannot list the routes")),
            };
            for message in &listed {
                if let RouteNetlinkMessage::NewRoute(route) = message {
                    read_route(route, &mut routes);
                }
            }
        }
        Ok(routes)
    }

    /// The interface through which the host would reach `address` now, as
    /// `ip route get` tells; `None` if it would not, be it that there is no
    /// route or that the route drops all packets.
    ///
    /// # Errors
    /// When the kernel refuses for another reason.
    pub fn interface_to(&mut self, address: IpAddr) -> Result<Option<u32>> {
        self.find_way(address, None)
    }

    /// As [`Self::interface_to`], for datagrams to `endpoint`: a link-local
    /// address with a zone leads nowhere but through that.
    ///
    /// # Errors
    /// As [`Self::interface_to`].
    pub fn interface_to_endpoint(&mut self, endpoint: SocketAddr) -> Result<Option<u32>> {
        self.find_way(endpoint.ip(), zone(endpoint))
    }

    fn find_way(&mut self, address: IpAddr, oif: Option<u32>) -> Result<Option<u32>> {
        let mut message = route_message(IpNet::from(address), None, oif)?;
        message.header.table = 0;
        match self.get(RouteNetlinkMessage::GetRoute(message)) {
            Ok(Some(RouteNetlinkMessage::NewRoute(route))) => {
                Ok(route
                    .attributes
                    .iter()
                    .find_map(|attribute| match attribute {
                        RouteAttribute::Oif(index) => Some(*index),
                        _ => None,
                    }))
            }
            Ok(_) => Ok(None),
            Err(refusal) if NO_WAY.iter().any(|errno| refusal.is(*errno)) => Ok(None),
            Err(refusal) => Err(refusal.describe(format!("cannot look up the route to {address}"))),
        }
    }

    /// The route by which the host would reach `endpoint` now, as `ip route get
    /// fibmatch` tells.
    ///
    /// # Errors
    /// When the kernel refuses for another reason than that there is no way.
    pub fn way_to(&mut self, endpoint: SocketAddr) -> Result<Way> {
        let address = endpoint.ip();
        match self.fib_match(endpoint) {
            Ok(Some(found)) => {
                let mut routes = Vec::new();
                read_route(&found, &mut routes);
                Ok(routes.into_iter().next().map_or(Way::None, Way::Route))
            }
            Ok(None) => Ok(Way::None),
            Err(refusal) if refusal.is(libc::ENETUNREACH) => Ok(Way::None),
            Err(refusal) if NO_WAY.iter().any(|errno| refusal.is(*errno)) => Ok(Way::Dropped),
            Err(refusal) => Err(refusal.describe(format!("cannot look up the route to {address}"))),
        }
    }

    /// The route to `endpoint` as it stands in its table, without what the kernel
    /// has learnt since.
    pub(super) fn fib_match(
        &mut self,
        endpoint: SocketAddr,
    ) -> std::result::Result<Option<RouteMessage>, Refusal> {
        let mut message = prefix_message(IpNet::from(endpoint.ip()));
        message
            .attributes
            .extend(zone(endpoint).map(RouteAttribute::Oif));
        message.header.table = 0;
        // Of IPv6 the table is told without being asked for.
        message.header.flags = match endpoint {
            SocketAddr::V4(_) => RouteFlags::FibMatch | RouteFlags::LookupTable,
            SocketAddr::V6(_) => RouteFlags::FibMatch,
        };
        match self.get(RouteNetlinkMessage::GetRoute(message))? {
            Some(RouteNetlinkMessage::NewRoute(found)) => Ok(Some(found)),
            _ => Ok(None),
        }
    }

    fn hop_for_error(&mut self, via: Option<IpAddr>, oif: Option<u32>) -> String {
        let via = via.map(|via| format!(" via {via}")).unwrap_or_default();
        let oif = oif
            .map(|index| format!(" on interface {}", self.name_for_error(index)))
            .unwrap_or_default();
        via + &oif
    }
}

/// The interface that an endpoint's address is good for, if it is not for all.
fn zone(endpoint: SocketAddr) -> Option<u32> {
    match endpoint {
        SocketAddr::V6(endpoint) => Some(endpoint.scope_id()).filter(|zone| *zone != 0),
        SocketAddr::V4(_) => None,
    }
}

impl fmt::Display for RouteKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            RouteKind::Unicast => "unicast",
            RouteKind::Blackhole => "blackhole",
            RouteKind::Unreachable => "unreachable",
            RouteKind::Prohibit => "prohibit",
        })
    }
}

fn route_message(prefix: IpNet, via: Option<IpAddr>, oif: Option<u32>) -> Result<RouteMessage> {
    let mut message = prefix_message(prefix);
    if let Some(via) = via {
        if via.is_ipv4() != prefix.addr().is_ipv4() {
            return Err(Error::new(format!(
                "route {prefix} via {via} mixes IPv4 and IPv6"
            )));
        }
        message.attributes.push(RouteAttribute::Gateway(via.into()));
    }
    if let Some(index) = oif {
        message.attributes.push(RouteAttribute::Oif(index));
    }
    Ok(message)
}

/// A route to a prefix in the main table, without a way to it.
pub(super) fn prefix_message(prefix: IpNet) -> RouteMessage {
    let prefix = prefix.trunc();
    let mut message = RouteMessage::default();
    message.header.address_family = family(&prefix);
    message.header.destination_prefix_length = prefix.prefix_len();
    message.header.table = RouteHeader::RT_TABLE_MAIN;
    message
        .attributes
        .push(RouteAttribute::Destination(prefix.network().into()));
    message
}

pub(super) fn read_route(message: &RouteMessage, routes: &mut Vec<Route>) {
    let kind = match message.header.kind {
        RouteType::Unicast => RouteKind::Unicast,
        RouteType::BlackHole => RouteKind::Blackhole,
        RouteType::Unreachable => RouteKind::Unreachable,
        RouteType::Prohibit => RouteKind::Prohibit,
        _ => return,
    };
    // A cached copy of a route (path MTU, redirect) is not a route of its own.
    if message.header.flags.contains(RouteFlags::Cloned) {
        return;
    }
    let mut address: IpAddr = match message.header.address_family {
        AddressFamily::Inet => Ipv4Addr::UNSPECIFIED.into(),
        AddressFamily::Inet6 => Ipv6Addr::UNSPECIFIED.into(),
        _ => return,
    };
    let mut table = u32::from(message.header.table);
    let mut hops = Vec::new();
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(RouteAddress::Inet(v4)) => address = (*v4).into(),
            RouteAttribute::Destination(RouteAddress::Inet6(v6)) => address = (*v6).into(),
            // The header has one byte for the table; larger numbers stand here.
            RouteAttribute::Table(number) => table = *number,
            RouteAttribute::MultiPath(next_hops) => {
                hops.extend(
                    next_hops
                        .iter()
                        .map(|hop| (Some(hop.interface_index), find_gateway(&hop.attributes))),
                );
            }
            _ => {}
        }
    }
    if hops.is_empty() {
        let oif = message
            .attributes
            .iter()
            .find_map(|attribute| match attribute {
                RouteAttribute::Oif(index) => Some(*index),
                _ => None,
            });
        hops.push((oif, find_gateway(&message.attributes)));
    }
    let Ok(destination) = IpNet::new(address, message.header.destination_prefix_length) else {
        return;
    };
    routes.extend(hops.into_iter().map(|(oif, via)| Route {
        destination,
        via,
        oif,
        kind,
        table,
    }));
}

fn find_gateway(attributes: &[RouteAttribute]) -> Option<IpAddr> {
    attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Gateway(RouteAddress::Inet(v4)) => Some((*v4).into()),
        RouteAttribute::Gateway(RouteAddress::Inet6(v6)) => Some((*v6).into()),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testbed::Namespace;

    /// Adds a route that leads nowhere.
    fn block(netlink: &mut Netlink, prefix: &str, kind: RouteType) {
        let mut message = prefix_message(prefix.parse().unwrap());
        message.header.protocol = RouteProtocol::Static;
        message.header.kind = kind;
        let flags = NLM_F_CREATE | NLM_F_EXCL;
        let added = netlink.execute(RouteNetlinkMessage::NewRoute(message), flags);
        added.map_err(|refusal| refusal.describe("block")).unwrap();
    }

    #[test]
    fn routes_that_drop_packets_are_no_way() {
        let namespace = Namespace::new().unwrap();
        let mut netlink = namespace.netlink().unwrap();
        netlink.create_veth("one", "two", None).unwrap();
        let one = netlink.link_index("one").unwrap().unwrap();
        netlink.set_up(one).unwrap();
        for (prefix, address) in [("10.1.0.0/16", "10.1.2.3"), ("fd01::/64", "fd01::7")] {
            let address = address.parse().unwrap();
            assert_eq!(netlink.interface_to(address).unwrap(), None);
            assert_eq!(netlink.way_to((address, 1).into()).unwrap(), Way::None);
            netlink
                .add_route(prefix.parse().unwrap(), None, Some(one))
                .unwrap();
            assert_eq!(netlink.interface_to(address).unwrap(), Some(one));
            let Way::Route(route) = netlink.way_to((address, 1).into()).unwrap() else {
                panic!("no route to {address}")
            };
            assert_eq!(route.destination.to_string(), prefix);
            assert_eq!((route.oif, route.table), (Some(one), 254));
        }
        for kind in [
            RouteType::BlackHole,
            RouteType::Unreachable,
            RouteType::Prohibit,
            RouteType::Throw,
        ] {
            for (prefix, address) in [("10.1.2.3/32", "10.1.2.3"), ("fd01::7/128", "fd01::7")] {
                block(&mut netlink, prefix, kind);
                let way = netlink.interface_to(address.parse().unwrap()).unwrap();
                assert_eq!(way, None, "{kind:?} {prefix}");
                // What the type throw finds elsewhere, here nothing, is no drop.
                if kind != RouteType::Throw {
                    let address: IpAddr = address.parse().unwrap();
                    let way = netlink.way_to((address, 1).into()).unwrap();
                    assert!(matches!(way, Way::Dropped), "{kind:?} {prefix}: {way:?}");
                }
                netlink
                    .del_route(prefix.parse().unwrap(), None, None)
                    .unwrap();
            }
        }
    }
}
