//! Routes: which packets leave by which interface.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use netlink_packet_core::NLM_F_CREATE;
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RoutePreference,
    RouteProtocol, RouteScope, RouteType,
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
pub(super) fn next_hops(route: &RouteMessage) -> Vec<(u32, bool)> {
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
