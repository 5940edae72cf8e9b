//! Routes through one device that carry a protocol number of their own: added
//! and deleted by the thousand, and told from everybody else's.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NlasIterator};
use netlink_packet_route::route::{
    RouteAttribute, RouteHeader, RouteMessage, RoutePreference, RouteProtocol, RouteScope,
    RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::route::prefix_message;
use super::{Netlink, Refusal};
use crate::error::{Error, Result};

/// The main routing table (`RT_TABLE_MAIN`, linux/rtnetlink.h).
pub const MAIN_TABLE: u32 = RouteHeader::RT_TABLE_MAIN as u32;

/// Metric of our IPv6 routes, the lowest there is (zero means 1024, and the
/// kernel's own have 256, linux/ipv6_route.h). IPv4 routes have metric 0.
pub const IPV6_METRIC: u32 = 1;

/// Requests that failed and why, by their place.
pub type Refusals = Vec<(usize, Error)>;

/// How often a listing is repeated because the table changed underneath it.
/// Not for ever: who needs to know better hears of the changes from
/// [`Watch`](super::watch::Watch).
const LISTINGS_MAX: usize = 3;

// Attributes and sizes of linux/rtnetlink.h and linux/icmpv6.h.
const RTMSG_BYTES: usize = 12;
const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_PRIORITY: u16 = 6;
const RTA_TABLE: u16 = 15;
const RTA_PREF: u16 = 20;
const RTM_F_CLONED: u32 = 0x200;
const ICMPV6_ROUTER_PREF_HIGH: u8 = 1;
const ICMPV6_ROUTER_PREF_LOW: u8 = 3;

/// Whose routes are meant: those of one protocol through one device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceRoute {
    /// Index of the device.
    pub oif: u32,
    /// Who made the route (`rtm_protocol`, rtnetlink(7)).
    pub protocol: u8,
}

/// One change to the main table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RouteChange {
    /// Adds a route; refused with `EEXIST` if there is one of the same prefix
    /// and metric, whoever has made it.
    Add(IpNet),
    /// Adds a route and leaves others of the same prefix where they are. In
    /// IPv4 it goes in front of them (`fib_table_insert()` in
    /// net/ipv4/fib_trie.c), in IPv6 it wins by [`IPV6_METRIC`] and, where
    /// another has that, by its preference (RFC 4191; `rt6_score_route()` in
    /// net/ipv6/route.c). `EEXIST` if the very same route is there already.
    Prepend(IpNet),
    /// Deletes a route; `ESRCH` if it is not there. Those of others stay.
    Delete(IpNet),
}

impl RouteChange {
    /// The destination of the route.
    pub fn prefix(&self) -> IpNet {
        match self {
            Self::Add(prefix) | Self::Prepend(prefix) | Self::Delete(prefix) => *prefix,
        }
    }

    fn request(&self, route: DeviceRoute) -> (RouteNetlinkMessage, u16) {
        let mut message = prefix_message(self.prefix());
        message.attributes.push(RouteAttribute::Oif(route.oif));
        message.header.protocol = RouteProtocol::from(route.protocol);
        message.header.kind = RouteType::Unicast;
        match self.prefix() {
            IpNet::V4(_) => message.header.scope = RouteScope::Link,
            IpNet::V6(_) => message.attributes.extend([
                RouteAttribute::Priority(IPV6_METRIC),
                RouteAttribute::Preference(RoutePreference::High),
            ]),
        }
        match self {
            Self::Add(_) => (
                RouteNetlinkMessage::NewRoute(message),
                NLM_F_CREATE | NLM_F_EXCL,
            ),
            Self::Prepend(_) => (RouteNetlinkMessage::NewRoute(message), NLM_F_CREATE),
            Self::Delete(_) => (RouteNetlinkMessage::DelRoute(message), 0),
        }
    }
}

/// What of a route decides whether it is ours and whether it wins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RouteEntry {
    /// The packets' destination, masked.
    pub destination: IpNet,
    /// Routing table.
    pub table: u32,
    /// Who made it (`rtm_protocol`).
    pub protocol: u8,
    /// Whether packets are sent on, not dropped or answered with an error.
    pub unicast: bool,
    /// The interface that packets leave by; none if there are several.
    pub oif: Option<u32>,
    /// Routes with a lower metric win over others of the same prefix.
    pub metric: u32,
    /// IPv6: among equal metrics the greater preference wins (-1, 0 or 1).
    pub preference: i8,
    /// Whether it is for all packets: not for one type of service or some
    /// sources alone, and not the cached copy of another route.
    pub general: bool,
}

impl RouteEntry {
    /// Whether it is one of `route`'s in the main table.
    pub fn belongs_to(&self, route: DeviceRoute) -> bool {
        self.protocol == route.protocol && self.oif == Some(route.oif) && self.table == MAIN_TABLE
    }

    /// Reads `struct rtmsg` and its attributes; `None` if it is no IP route.
    pub(super) fn parse(bytes: &[u8]) -> Option<Self> {
        let (header, attributes) = bytes.split_at_checked(RTMSG_BYTES)?;
        let &[
            family,
            prefix_len,
            source_len,
            tos,
            table,
            protocol,
            _,
            kind,
            f0,
            f1,
            f2,
            f3,
        ] = header
        else {
            return None;
        };
        let mut address: IpAddr = match AddressFamily::from(family) {
            AddressFamily::Inet => Ipv4Addr::UNSPECIFIED.into(),
            AddressFamily::Inet6 => Ipv6Addr::UNSPECIFIED.into(),
            _ => return None,
        };
        let mut table = u32::from(table);
        let mut oif = None;
        let (mut metric, mut preference) = (0, 0);
        for attribute in NlasIterator::new(attributes) {
            let attribute = attribute.ok()?;
            let value = attribute.value();
            let number = || Some(u32::from_ne_bytes(value.try_into().ok()?));
            match attribute.kind() {
                RTA_DST => {
                    address = match address {
                        IpAddr::V4(_) => <[u8; 4]>::try_from(value).ok()?.into(),
                        IpAddr::V6(_) => <[u8; 16]>::try_from(value).ok()?.into(),
                    }
                }
                // The header has one byte for the table; larger numbers stand here.
                RTA_TABLE => table = number()?,
                RTA_OIF => oif = Some(number()?),
                RTA_PRIORITY => metric = number()?,
                RTA_PREF => {
                    preference = match value.first() {
                        Some(&ICMPV6_ROUTER_PREF_HIGH) => 1,
                        Some(&ICMPV6_ROUTER_PREF_LOW) => -1,
                        _ => 0,
                    }
                }
                _ => {}
            }
        }
        let flags = u32::from_ne_bytes([f0, f1, f2, f3]);
        Some(Self {
            destination: IpNet::new(address, prefix_len).ok()?.trunc(),
            table,
            protocol,
            unicast: RouteType::from(kind) == RouteType::Unicast,
            oif,
            metric,
            preference,
            general: tos == 0 && source_len == 0 && flags & RTM_F_CLONED == 0,
        })
    }
}

impl Netlink {
    /// Makes many changes, in their order, a hundred per system call. Returns
    /// those that the kernel refused; the others are in force.
    ///
    /// # Errors
    /// When the socket fails; it is then unknown which changes are in force.
    pub fn change_device_routes(
        &mut self,
        route: DeviceRoute,
        changes: &[RouteChange],
    ) -> Result<Refusals> {
        let mut refusals = Vec::new();
        let requests = changes.iter().map(|change| change.request(route));
        self.execute_batch(requests, &mut |place, refusal| {
            refusals.push((place, refusal));
        })
        .map_err(|cause| Error::os("cannot change routes", cause))?;
        if refusals.is_empty() {
            return Ok(Vec::new());
        }
        let name = self.name_for_error(route.oif);
        let describe = |(place, refusal): (usize, Refusal)| {
            let what = match changes[place] {
                RouteChange::Delete(prefix) => format!("cannot delete route {prefix} on {name}"),
                RouteChange::Add(prefix) | RouteChange::Prepend(prefix) => {
                    format!("cannot add route {prefix} on {name}")
                }
            };
            (place, refusal.describe(what))
        };
        Ok(refusals.into_iter().map(describe).collect())
    }

    /// The routes of the main table that `matters` picks, IPv4 before IPv6.
    /// Routes to the same prefix stand in the order in which the kernel looks
    /// at them. A table that changes all the time may be listed with gaps.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn main_routes(
        &mut self,
        matters: &dyn Fn(&RouteEntry) -> bool,
    ) -> Result<Vec<RouteEntry>> {
        let mut routes = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let start = routes.len();
            for _ in 0..LISTINGS_MAX {
                routes.truncate(start);
                match self.list_main_routes(family, matters, &mut routes) {
                    Ok(true) => continue,
                    Ok(false) => break,
                    // A kernel without IPv6, or a table without routes so far.
                    Err(refusal) if refusal.is(libc::EOPNOTSUPP) || refusal.is(libc::ENOENT) => {
                        break;
                    }
                    Err(refusal) => return Err(refusal.describe("cannot list the routes")),
                }
            }
        }
        Ok(routes)
    }

    /// `true` when the table changed while it was listed.
    fn list_main_routes(
        &mut self,
        family: AddressFamily,
        matters: &dyn Fn(&RouteEntry) -> bool,
        routes: &mut Vec<RouteEntry>,
    ) -> std::result::Result<bool, Refusal> {
        let mut message = RouteMessage::default();
        message.header.address_family = family;
        message.header.table = RouteHeader::RT_TABLE_MAIN;
        self.visit_dump(RouteNetlinkMessage::GetRoute(message), &mut |bytes| {
            // Kernels before 4.20 do not filter by table.
            let entry = RouteEntry::parse(bytes).filter(|entry| entry.table == MAIN_TABLE);
            routes.extend(entry.filter(matters));
        })
    }
}

/// What somebody else does to a route, with the flags that iproute2 uses.
#[cfg(test)]
#[derive(Clone, Copy)]
pub(crate) enum Meddling {
    /// `ip route replace`
    Replace,
    /// `ip route prepend`
    Prepend,
    /// `ip route append`
    Append,
}

#[cfg(test)]
impl Netlink {
    /// Does as iproute2 does, with protocol "boot". Metric 0 means the usual.
    pub(crate) fn meddle(
        &mut self,
        meddling: Meddling,
        prefix: IpNet,
        oif: u32,
        metric: u32,
    ) -> Result<()> {
        use netlink_packet_core::{NLM_F_APPEND, NLM_F_REPLACE};
        let mut message = prefix_message(prefix);
        message.header.protocol = RouteProtocol::Boot;
        message.header.kind = RouteType::Unicast;
        message.attributes.push(RouteAttribute::Oif(oif));
        if metric != 0 {
            message.attributes.push(RouteAttribute::Priority(metric));
        }
        if matches!(prefix, IpNet::V4(_)) {
            message.header.scope = RouteScope::Link;
        }
        let flags = match meddling {
            Meddling::Replace => NLM_F_CREATE | NLM_F_REPLACE,
            Meddling::Prepend => NLM_F_CREATE,
            Meddling::Append => NLM_F_CREATE | NLM_F_APPEND,
        };
        self.execute(RouteNetlinkMessage::NewRoute(message), flags)
            .map_err(|refusal| refusal.describe(format!("cannot meddle with {prefix}")))
    }
}
