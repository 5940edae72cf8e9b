//! Routes: which packets leave by which interface.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use ipnet::IpNet;
use netlink_packet_core::NLM_F_CREATE;
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric,
    RoutePreference, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::Netlink;
use super::address::family;
use crate::error::{Error, Result};

/// What happens to a packet that a route matches (`rtm_type`, rtnetlink(7)).
pub use netlink_packet_route::route::RouteType as RouteKind;

/// The `rtm_protocol` of our routes (rtnetlink(7)): not one of those that
/// linux/rtnetlink.h and iproute2's rt_protos assign. `ip route show proto 82`
/// lists our routes.
pub const PROTOCOL: u8 = 82;

/// The main routing table (`RT_TABLE_MAIN`, linux/rtnetlink.h).
pub(crate) const MAIN_TABLE: u32 = RouteHeader::RT_TABLE_MAIN as u32;

/// The table that comes after the main one (`RT_TABLE_DEFAULT`).
pub(crate) const DEFAULT_TABLE: u32 = 253;

/// Metric of our IPv6 routes, the lowest there is (zero means 1024, and the
/// kernel's own have 256, linux/ipv6_route.h). IPv4 routes have metric 0.
pub(crate) const IPV6_METRIC: u32 = 1;

/// Index of the loopback interface (`LOOPBACK_IFINDEX` in include/net/flow.h),
/// by which the host reaches its own addresses.
const LOOPBACK_INDEX: u32 = 1;

/// What the kernel says of routes of the types unreachable, blackhole and prohibit
/// (`fib_props` in net/ipv4/fib_semantics.c; `ip6_rt_type_to_error()` in
/// net/ipv6/route.c).
const DROPPED: [i32; 3] = [libc::EHOSTUNREACH, libc::EINVAL, libc::EACCES];

/// How the host would reach an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way<R = Route> {
    /// By this route.
    Route(R),
    /// There is a route, which drops all packets.
    Dropped,
    /// There is no route.
    None,
}

impl<R> Way<R> {
    fn route(self) -> Option<R> {
        match self {
            Self::Route(route) => Some(route),
            Self::Dropped | Self::None => None,
        }
    }
}

/// A route as the kernel lists it: what decides whether it is ours, whether it
/// wins, and where it leads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Route {
    /// The packets' destination, masked.
    pub destination: IpNet,
    /// Routing table.
    pub table: u32,
    /// Who made it (`rtm_protocol`, rtnetlink(7)).
    pub protocol: u8,
    /// What happens to the packets.
    pub kind: RouteKind,
    /// The interface that packets leave by, the first one if there are several.
    pub oif: Option<u32>,
    /// Whether there are several next hops.
    pub is_multipath: bool,
    /// Routes with a lower metric win over others of the same prefix.
    pub metric: u32,
    /// IPv6: among equal metrics the greater preference wins (-1, 0 or 1).
    pub preference: i8,
    /// Whether it is for all packets: not for one type of service or some
    /// sources alone, and not the cached copy of another route.
    pub is_general: bool,
}

impl Route {
    /// Whether it is one of ours through this device.
    pub(crate) fn is_ours(&self, device: Option<u32>) -> bool {
        self.protocol == PROTOCOL && self.table == MAIN_TABLE && self.leads_into(device)
    }

    /// Whether all its packets leave by this interface.
    pub(crate) fn leads_into(&self, device: Option<u32>) -> bool {
        let is_plain = self.kind == RouteKind::Unicast && !self.is_multipath;
        is_plain && device.is_some() && self.oif == device
    }

    /// What of a listed route matters; `None` if it is not an IP route.
    pub(super) fn read(message: &RouteMessage) -> Option<Self> {
        let header = &message.header;
        let mut address: IpAddr = match header.address_family {
            AddressFamily::Inet => Ipv4Addr::UNSPECIFIED.into(),
            AddressFamily::Inet6 => Ipv6Addr::UNSPECIFIED.into(),
            _ => return None,
        };
        let mut table = u32::from(header.table);
        let (mut metric, mut preference) = (0, 0);
        for attribute in &message.attributes {
            match attribute {
                RouteAttribute::Destination(RouteAddress::Inet(v4)) => address = (*v4).into(),
                RouteAttribute::Destination(RouteAddress::Inet6(v6)) => address = (*v6).into(),
                // The header has one byte for the table; larger numbers stand here.
                RouteAttribute::Table(number) => table = *number,
                RouteAttribute::Priority(number) => metric = *number,
                RouteAttribute::Preference(RoutePreference::High) => preference = 1,
                RouteAttribute::Preference(RoutePreference::Low) => preference = -1,
                _ => {}
            }
        }
        let hops = next_hops(message);
        let is_cached = header.flags.contains(RouteFlags::Cloned);
        Some(Self {
            destination: IpNet::new(address, header.destination_prefix_length)
                .ok()?
                .trunc(),
            table,
            protocol: header.protocol.into(),
            kind: header.kind,
            oif: hops.first().map(|(oif, _)| *oif),
            is_multipath: hops.len() > 1,
            metric,
            preference,
            is_general: header.tos == 0 && header.source_prefix_length == 0 && !is_cached,
        })
    }
}

/// The interfaces that a route leads to, and whether packets go to a router there, and
/// not to their destination itself.
fn next_hops(route: &RouteMessage) -> Vec<(u32, bool)> {
    let has_router = |attributes: &[RouteAttribute]| {
        let is_router = |one: &RouteAttribute| {
            matches!(one, RouteAttribute::Gateway(_) | RouteAttribute::Via(_))
        };
        attributes.iter().any(is_router)
    };
    let mut hops = Vec::new();
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Oif(index) => hops.push((*index, has_router(&route.attributes))),
            RouteAttribute::MultiPath(all) => hops.extend(
                all.iter()
                    .map(|hop| (hop.interface_index, has_router(&hop.attributes))),
            ),
            _ => {}
        }
    }
    hops
}

/// How long packets toward an address may be, as far as this host's own settings
/// say: the route and the interface. What the kernel has learnt by ICMP is
/// left aside, since anybody can send that.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RouteMtu {
    /// Largest packet in bytes.
    pub(crate) mtu_bytes: u32,
    /// The address is on the link itself: no router comes in between.
    pub(crate) is_direct: bool,
}

/// One change to our routes in the main table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RouteChange {
    /// Adds a route and leaves others of the same prefix where they are. In
    /// IPv4 it goes in front of them (`fib_table_insert()` in
    /// net/ipv4/fib_trie.c), in IPv6 it wins by [`IPV6_METRIC`] and, where
    /// another has that, by its preference (RFC 4191; `rt6_score_route()` in
    /// net/ipv6/route.c). `EEXIST` if the very same route is there already.
    Add(IpNet),
    /// Deletes a route; `ESRCH` if it is not there. Those of others stay.
    Delete(IpNet),
}

impl RouteChange {
    fn prefix(&self) -> IpNet {
        match self {
            Self::Add(prefix) | Self::Delete(prefix) => *prefix,
        }
    }

    fn request(&self, device: u32) -> (RouteNetlinkMessage, u16) {
        let mut message = prefix_message(self.prefix());
        message.attributes.push(RouteAttribute::Oif(device));
        message.header.protocol = RouteProtocol::from(PROTOCOL);
        message.header.kind = RouteType::Unicast;
        match self.prefix() {
            IpNet::V4(_) => message.header.scope = RouteScope::Link,
            IpNet::V6(_) => message.attributes.extend([
                RouteAttribute::Priority(IPV6_METRIC),
                RouteAttribute::Preference(RoutePreference::High),
            ]),
        }
        match self {
            Self::Add(_) => (RouteNetlinkMessage::NewRoute(message), NLM_F_CREATE),
            Self::Delete(_) => (RouteNetlinkMessage::DelRoute(message), 0),
        }
    }
}

impl Netlink {
    /// The routes of the main table that `matters` picks, IPv4 before IPv6.
    /// Routes to the same prefix stand in the order in which the kernel tries
    /// them. A table that changes all the time may be listed with gaps.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn main_routes(&mut self, matters: &dyn Fn(&Route) -> bool) -> Result<Vec<Route>> {
        // Kernels before 4.20 do not filter by table.
        self.list_routes(RouteHeader::RT_TABLE_MAIN, &|route| {
            route.table == MAIN_TABLE && matters(route)
        })
    }

    /// The routes of all tables that are for all packets and decide whether other hosts
    /// are reached: not the kernel's own for this host's addresses.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub(crate) fn all_routes(&mut self) -> Result<Vec<Route>> {
        self.list_routes(RouteHeader::RT_TABLE_UNSPEC, &|route| {
            let is_for_others = matches!(
                route.kind,
                RouteKind::Unicast
                    | RouteKind::BlackHole
                    | RouteKind::Unreachable
                    | RouteKind::Prohibit
            );
            route.is_general && is_for_others
        })
    }

    fn list_routes(&mut self, table: u8, matters: &dyn Fn(&Route) -> bool) -> Result<Vec<Route>> {
        let mut routes = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut message = RouteMessage::default();
            message.header.address_family = family;
            message.header.table = table;
            let listed = self.dump(
                RouteNetlinkMessage::GetRoute(message),
                &|object| match object {
                    RouteNetlinkMessage::NewRoute(route) => Route::read(&route).filter(matters),
                    _ => None,
                },
            );
            match listed {
                Ok(listed) => routes.extend(listed),
                // A kernel without IPv6, or a table without routes so far.
                Err(error) if matches!(error.errno(), Some(libc::EOPNOTSUPP | libc::ENOENT)) => {}
                Err(error) => return Err(error.about("cannot list the routes")),
            }
        }
        Ok(routes)
    }

    /// The interface through which the host would send to `endpoint` now, as
    /// `ip route get` tells; `None` if it would not, be it that there is no
    /// route or that the route drops all packets. A link-local address with a zone
    /// leads nowhere but through that.
    ///
    /// # Errors
    /// When the kernel refuses for another reason.
    pub fn interface_to(&mut self, endpoint: SocketAddr) -> Result<Option<u32>> {
        let route = self.look_up(endpoint, RouteFlags::empty())?;
        Ok(route
            .route()
            .and_then(|route| Some(next_hops(&route).first()?.0)))
    }

    /// How the host would reach `endpoint` now, as `ip route get fibmatch` tells.
    ///
    /// # Errors
    /// As [`Self::interface_to`].
    pub(crate) fn route_to(&mut self, endpoint: SocketAddr) -> Result<Way> {
        Ok(match self.look_up(endpoint, fib_match(endpoint))? {
            Way::Route(route) => Route::read(&route).map_or(Way::None, Way::Route),
            Way::Dropped => Way::Dropped,
            Way::None => Way::None,
        })
    }

    /// The MTU of the route to `endpoint`: that which an administrator gave it,
    /// or else that of its interface. Of several next hops the smallest counts.
    /// `None` if there is no route.
    ///
    /// # Errors
    /// When the kernel refuses for another reason.
    pub(crate) fn route_mtu(&mut self, endpoint: SocketAddr) -> Result<Option<RouteMtu>> {
        let Some(route) = self.look_up(endpoint, fib_match(endpoint))?.route() else {
            return Ok(None);
        };
        let hops = match route.header.kind {
            RouteKind::Local => vec![(LOOPBACK_INDEX, false)],
            _ => next_hops(&route),
        };
        let given = given_mtu_bytes(&route.attributes);
        let mut found: Option<RouteMtu> = None;
        for (oif, has_router) in hops {
            let Some(link) = self.link_by_index(oif)? else {
                continue;
            };
            let own = link.mtu_bytes_of(endpoint.ip());
            let mtu_bytes = given.map_or(own, |given| given.min(own));
            // A point-to-point link, such as that of a modem or another tunnel, rarely
            // leads to its other end alone.
            let is_direct = !has_router && !link.is_point_to_point;
            found = Some(RouteMtu {
                mtu_bytes: found.map_or(mtu_bytes, |other| other.mtu_bytes.min(mtu_bytes)),
                is_direct: is_direct && found.is_none_or(|other| other.is_direct),
            });
        }
        Ok(found)
    }

    /// Asks the kernel how it would reach `endpoint`.
    fn look_up(&mut self, endpoint: SocketAddr, flags: RouteFlags) -> Result<Way<RouteMessage>> {
        let mut message = prefix_message(IpNet::from(endpoint.ip()));
        message.header.table = RouteHeader::RT_TABLE_UNSPEC;
        message.header.flags = flags;
        if self.fwmark != 0 {
            message.attributes.push(RouteAttribute::Mark(self.fwmark));
        }
        // The interface that the address is good for, if it is not for all.
        if let SocketAddr::V6(endpoint) = endpoint
            && endpoint.scope_id() != 0
        {
            let zone = RouteAttribute::Oif(endpoint.scope_id());
            message.attributes.push(zone);
        }
        match self.get(RouteNetlinkMessage::GetRoute(message)) {
            Ok(Some(RouteNetlinkMessage::NewRoute(route))) => Ok(Way::Route(route)),
            Ok(_) => Ok(Way::None),
            Err(error) if error.errno() == Some(libc::ENETUNREACH) => Ok(Way::None),
            Err(error) if DROPPED.map(Some).contains(&error.errno()) => Ok(Way::Dropped),
            Err(error) => {
                let address = endpoint.ip();
                Err(error.about(format!("cannot look up the route to {address}")))
            }
        }
    }

    /// Makes many changes to our routes through a device, in their order, a hundred
    /// per system call. Returns the prefixes of those that the kernel refused; the
    /// others are in force.
    ///
    /// # Errors
    /// When the socket fails; it is then unknown which changes are in force.
    pub(crate) fn change_device_routes(
        &mut self,
        device: u32,
        changes: &[RouteChange],
    ) -> Result<Vec<(IpNet, Error)>> {
        let mut refused = Vec::new();
        let requests = changes.iter().map(|change| change.request(device));
        self.execute_batch(requests, &mut |place, error| refused.push((place, error)))
            .map_err(|error| error.about("cannot change routes"))?;
        let describe = |(place, error): (usize, Error)| {
            let (verb, prefix) = match changes[place] {
                RouteChange::Delete(prefix) => ("delete", prefix),
                RouteChange::Add(prefix) => ("add", prefix),
            };
            let what = format!("cannot {verb} the tunnel's route {prefix}");
            (prefix, error.about(what))
        };
        Ok(refused.into_iter().map(describe).collect())
    }
}

/// Asks for the route as it stands in its table, without what the kernel has
/// learnt since. Of IPv6 the answer has the table without being asked for.
fn fib_match(endpoint: SocketAddr) -> RouteFlags {
    match endpoint {
        SocketAddr::V4(_) => RouteFlags::FibMatch | RouteFlags::LookupTable,
        SocketAddr::V6(_) => RouteFlags::FibMatch,
    }
}

/// `ip route add … mtu N`.
fn given_mtu_bytes(attributes: &[RouteAttribute]) -> Option<u32> {
    attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Metrics(metrics) => metrics.iter().find_map(|metric| match metric {
            RouteMetric::Mtu(mtu_bytes) => Some(*mtu_bytes).filter(|bytes| *bytes > 0),
            _ => None,
        }),
        _ => None,
    })
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

#[cfg(test)]
mod tests {
    use netlink_packet_core::NLM_F_REPLACE;

    use super::*;
    use crate::testbed::{self, Namespace};

    #[test]
    fn a_route_that_drops_packets_leads_nowhere() {
        let namespace = Namespace::new().unwrap();
        let mut netlink = namespace.netlink().unwrap();
        testbed::join(&namespace, &namespace, "one", "two").unwrap();
        let one = netlink.link_index("one").unwrap().unwrap();
        netlink.set_up(one).unwrap();
        let endpoint = |address: &str| SocketAddr::new(address.parse().unwrap(), 1);
        for (prefix, address) in [("10.1.0.0/16", "10.1.2.3"), ("fd01::/64", "fd01::7")] {
            let endpoint = endpoint(address);
            assert_eq!(netlink.interface_to(endpoint).unwrap(), None);
            assert_eq!(netlink.route_to(endpoint).unwrap(), Way::None);
            netlink
                .add_route(prefix.parse().unwrap(), None, Some(one))
                .unwrap();
            assert_eq!(netlink.interface_to(endpoint).unwrap(), Some(one));
            let route = netlink.route_to(endpoint).unwrap().route().unwrap();
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
                netlink
                    .block(prefix.parse().unwrap(), kind, MAIN_TABLE)
                    .unwrap();
                let endpoint = endpoint(address);
                let oif = netlink.interface_to(endpoint).unwrap();
                assert_eq!(oif, None, "{kind:?} {prefix}");
                let way = netlink.route_to(endpoint).unwrap();
                // The type throw goes on to other tables, and finds nothing there.
                if kind != RouteType::Throw {
                    assert_eq!(way, Way::Dropped, "{kind:?} {prefix}");
                }
                netlink
                    .del_route(prefix.parse().unwrap(), None, None)
                    .unwrap();
            }
        }
    }

    fn mtu(netlink: &mut Netlink, address: &str) -> Option<RouteMtu> {
        let endpoint = SocketAddr::new(address.parse().unwrap(), 1);
        netlink.route_mtu(endpoint).unwrap()
    }

    fn direct(mtu_bytes: u32) -> Option<RouteMtu> {
        Some(RouteMtu {
            mtu_bytes,
            is_direct: true,
        })
    }

    fn routed(mtu_bytes: u32) -> Option<RouteMtu> {
        direct(mtu_bytes).map(|mtu| RouteMtu {
            is_direct: false,
            ..mtu
        })
    }

    #[test]
    fn the_route_comes_before_the_interface_and_the_smaller_counts() {
        let namespace = Namespace::new().unwrap();
        namespace
            .sysctl("net/ipv6/conf/default/accept_dad", "0")
            .unwrap();
        let mut netlink = namespace.netlink().unwrap();
        testbed::join(&namespace, &namespace, "one", "two").unwrap();
        let index = netlink.link_index("one").unwrap().unwrap();
        netlink.set_mtu(index, 1400).unwrap();
        netlink.set_up(index).unwrap();
        for net in ["10.1.0.1/24", "fd01::1/64"] {
            netlink.add_address(index, net.parse().unwrap()).unwrap();
        }
        for (far, near, gateway) in [
            ("10.2.0.1", "10.1.0.2", "10.1.0.254"),
            ("fd02::1", "fd01::2", "fd01::254"),
        ] {
            assert_eq!(mtu(&mut netlink, near), direct(1400));
            assert_eq!(mtu(&mut netlink, far), None);
            let prefix = format!("{far}/{}", if far.contains(':') { 128 } else { 32 });
            let gateway = gateway.parse().unwrap();
            netlink
                .add_route(prefix.parse().unwrap(), Some(gateway), None)
                .unwrap();
            assert_eq!(mtu(&mut netlink, far), routed(1400));
            for (given, expected) in [(1300, 1300), (1450, 1400)] {
                let mut message = prefix_message(prefix.parse().unwrap());
                message.header.protocol = RouteProtocol::Static;
                message.header.kind = RouteType::Unicast;
                message.attributes.extend([
                    RouteAttribute::Gateway(gateway.into()),
                    RouteAttribute::Metrics(vec![RouteMetric::Mtu(given)]),
                ]);
                let flags = NLM_F_CREATE | NLM_F_REPLACE;
                netlink
                    .execute(RouteNetlinkMessage::NewRoute(message), flags)
                    .unwrap();
                assert_eq!(mtu(&mut netlink, far), routed(expected), "{prefix} {given}");
            }
        }
        namespace.sysctl("net/ipv6/conf/one/mtu", "1290").unwrap();
        assert_eq!(mtu(&mut netlink, "fd01::2"), direct(1290));
        assert_eq!(mtu(&mut netlink, "10.1.0.2"), direct(1400));
        // The host's own addresses are behind the loopback interface.
        let loopback = netlink.link_by_index(LOOPBACK_INDEX).unwrap().unwrap();
        netlink.set_up(LOOPBACK_INDEX).unwrap();
        assert_eq!(loopback.name, "lo");
        for own in ["127.0.0.1", "10.1.0.1", "::1", "fd01::1"] {
            // The kernel adds IPv6 routes to them from a work queue.
            for _ in 0..3000 {
                if mtu(&mut netlink, own) == direct(loopback.mtu) {
                    break;
                }
                std::thread::sleep(std::time::Duration::from_millis(10));
            }
            assert_eq!(mtu(&mut netlink, own), direct(loopback.mtu), "{own}");
        }
    }
}
