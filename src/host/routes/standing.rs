//! What the main table says of the prefixes that matter.

use std::collections::{BTreeSet, HashMap};

use ipnet::IpNet;

use crate::error::Result;
use crate::host::netlink::{DeviceRoute, Netlink, RouteEntry};

/// Metric of the IPv6 routes that the kernel makes for an address
/// (`IP6_RT_PRIO_ADDRCONF`, linux/ipv6_route.h).
const IPV6_METRIC_KERNEL: u32 = 256;

/// Metric of an IPv6 route that was added without one (`IP6_RT_PRIO_USER`).
const IPV6_METRIC_USUAL: u32 = 1024;

/// How a prefix stands.
#[derive(Debug, Clone, Copy, Default)]
pub struct Standing {
    /// The route that wins.
    pub winner: Option<RouteEntry>,
    /// Whether there is a route of ours, winning or not.
    pub has_ours: bool,
    /// A route of somebody else's that is in the way of a new one of ours.
    pub obstacle: Option<RouteEntry>,
}

impl Standing {
    /// Whether packets to the prefix go into the device, by a route of ours or
    /// by one that is as good.
    pub fn is_right(&self, ours: DeviceRoute) -> bool {
        self.winner
            .is_some_and(|winner| leads_into(&winner, ours) && is_strong(&winner))
    }

    fn note(&mut self, entry: RouteEntry, ours: DeviceRoute) {
        self.has_ours |= entry.belongs_to(ours);
        if self.winner.is_none_or(|winner| wins(&entry, &winner)) {
            self.winner = Some(entry);
        }
        let in_the_way = match entry.destination {
            IpNet::V4(_) => entry.metric == 0,
            IpNet::V6(_) => entry.metric <= IPV6_METRIC_USUAL,
        };
        if in_the_way && !leads_into(&entry, ours) && self.obstacle.is_none() {
            self.obstacle = Some(entry);
        }
    }
}

/// Whether news of a route that was added can mean that a wanted prefix is not
/// right any more.
pub fn may_harm(entry: &RouteEntry, ours: DeviceRoute) -> bool {
    entry.general
        && !leads_into(entry, ours)
        && match entry.destination {
            IpNet::V4(_) => entry.metric == 0,
            IpNet::V6(_) => is_strong(entry),
        }
}

fn leads_into(entry: &RouteEntry, ours: DeviceRoute) -> bool {
    entry.unicast && entry.oif == Some(ours.oif)
}

/// Whether a route stands up to those that are added without a metric.
fn is_strong(entry: &RouteEntry) -> bool {
    match entry.destination {
        IpNet::V4(_) => entry.metric == 0,
        IpNet::V6(_) => entry.metric <= IPV6_METRIC_KERNEL,
    }
}

/// Whether the kernel prefers `later` to `earlier`, which it lists before.
fn wins(later: &RouteEntry, earlier: &RouteEntry) -> bool {
    (later.metric, -later.preference) < (earlier.metric, -earlier.preference)
}

/// How the wanted prefixes stand, and those with routes of ours.
pub struct Standings {
    prefixes: HashMap<IpNet, Standing>,
    ours: DeviceRoute,
}

impl Standings {
    /// Reads the kernel's main table.
    ///
    /// # Errors
    /// When the kernel refuses to list it.
    pub fn read(
        netlink: &mut Netlink,
        ours: DeviceRoute,
        wanted: &BTreeSet<IpNet>,
    ) -> Result<Self> {
        let routes = netlink.main_routes(&|entry| {
            entry.general && (wanted.contains(&entry.destination) || entry.belongs_to(ours))
        })?;
        Ok(Self::new(&routes, ours))
    }

    /// `routes`: those that matter, in the kernel's order.
    fn new(routes: &[RouteEntry], ours: DeviceRoute) -> Self {
        let mut prefixes: HashMap<IpNet, Standing> = HashMap::new();
        for entry in routes {
            let standing = prefixes.entry(entry.destination).or_default();
            standing.note(*entry, ours);
        }
        Self { prefixes, ours }
    }

    /// How one prefix stands.
    pub fn of(&self, prefix: &IpNet) -> Standing {
        self.prefixes.get(prefix).copied().unwrap_or_default()
    }

    /// Whether one prefix is as it should be.
    pub fn is_right(&self, prefix: &IpNet) -> bool {
        self.of(prefix).is_right(self.ours)
    }

    /// The prefixes that have routes of ours.
    pub fn ours(&self) -> impl Iterator<Item = IpNet> {
        self.prefixes
            .iter()
            .filter(|(_, standing)| standing.has_ours)
            .map(|(prefix, _)| *prefix)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::netlink::device_route::MAIN_TABLE;

    const OURS: DeviceRoute = DeviceRoute {
        oif: 7,
        protocol: 82,
    };

    fn entry(prefix: &str, oif: u32, protocol: u8, metric: u32) -> RouteEntry {
        RouteEntry {
            destination: prefix.parse().unwrap(),
            table: MAIN_TABLE,
            protocol,
            unicast: true,
            oif: Some(oif),
            metric,
            preference: 0,
            general: true,
        }
    }

    fn stand(routes: &[RouteEntry]) -> (bool, Standing) {
        let standings = Standings::new(routes, OURS);
        let prefix = routes[0].destination;
        (standings.is_right(&prefix), standings.of(&prefix))
    }

    #[test]
    fn in_ipv4_the_first_without_metric_wins() {
        let ours = entry("10.1.0.0/16", 7, 82, 0);
        let foreign = entry("10.1.0.0/16", 3, 3, 0);
        assert!(stand(&[ours, foreign]).0);
        let (right, standing) = stand(&[foreign, ours]);
        assert!(!right && standing.has_ours);
        assert_eq!(standing.obstacle, Some(foreign));
        let harmless = entry("10.1.0.0/16", 3, 3, 100);
        assert_eq!(stand(&[harmless]).1.obstacle, None);
        assert!(may_harm(&foreign, OURS) && !may_harm(&harmless, OURS));
    }

    #[test]
    fn in_ipv6_metric_decides_and_then_preference() {
        let ours = RouteEntry {
            preference: 1,
            ..entry("fd00::/64", 7, 82, 1)
        };
        let foreign = entry("fd00::/64", 3, 3, 1);
        assert!(stand(&[foreign, ours]).0);
        let strong = RouteEntry {
            preference: 1,
            ..foreign
        };
        assert!(!stand(&[strong, ours]).0);
        let usual = entry("fd00::/64", 3, 3, 1024);
        assert_eq!(stand(&[usual]).1.obstacle, Some(usual));
        assert!(may_harm(&foreign, OURS) && !may_harm(&usual, OURS));
    }

    #[test]
    fn a_route_into_the_device_is_as_good_as_ours_unless_it_drops() {
        let kernels = entry("10.1.0.0/16", 7, 2, 0);
        let (right, standing) = stand(&[kernels]);
        assert!(right && !standing.has_ours && standing.obstacle.is_none());
        assert!(stand(&[entry("fd00::/64", 7, 2, 256)]).0);
        let drops = RouteEntry {
            unicast: false,
            ..kernels
        };
        assert!(!stand(&[drops]).0);
    }
}
