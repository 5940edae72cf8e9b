//! The kernel's main table, compared with what is wanted.

use std::collections::{BTreeSet, HashMap};

use ipnet::IpNet;

use super::NO_DEVICE;
use crate::error::{Error, Result};
use crate::host::netlink::{DeviceRoute, Netlink, Route, RouteChange, RouteKind};

/// Metric of the IPv6 routes that the kernel makes for an address
/// (`IP6_RT_PRIO_ADDRCONF`, linux/ipv6_route.h).
const IPV6_METRIC_KERNEL: u32 = 256;

/// Metric of an IPv6 route that was added without one (`IP6_RT_PRIO_USER`).
const IPV6_METRIC_USUAL: u32 = 1024;

/// The routes to one prefix.
#[derive(Debug, Clone, Copy, Default)]
pub struct Routes {
    /// The route that wins.
    pub(crate) winner: Option<Route>,
    /// Whether there is a route of ours, winning or not.
    pub(crate) has_ours: bool,
    /// A route of somebody else's that is in the way of a new one of ours.
    pub(crate) obstacle: Option<Route>,
}

impl Routes {
    fn note(&mut self, route: &Route, ours: DeviceRoute) {
        self.has_ours |= route.belongs_to(ours);
        if self.winner.is_none_or(|winner| wins(route, &winner)) {
            self.winner = Some(*route);
        }
        let is_in_the_way = match route.destination {
            IpNet::V4(_) => route.metric == 0,
            IpNet::V6(_) => route.metric <= IPV6_METRIC_USUAL,
        };
        if is_in_the_way && !route.leads_into(ours.oif) && self.obstacle.is_none() {
            self.obstacle = Some(*route);
        }
    }
}

/// Whether the kernel prefers `later` to `earlier`, which it lists before.
fn wins(later: &Route, earlier: &Route) -> bool {
    (later.metric, -later.preference) < (earlier.metric, -earlier.preference)
}

/// The routes to the wanted prefixes, and to those with routes of ours.
pub struct RouteTable {
    prefixes: HashMap<IpNet, Routes>,
    ours: DeviceRoute,
}

impl RouteTable {
    /// Reads the kernel's main table.
    ///
    /// # Errors
    /// When the kernel refuses to list it.
    pub(crate) fn read(
        netlink: &mut Netlink,
        ours: DeviceRoute,
        wanted: &BTreeSet<IpNet>,
    ) -> Result<Self> {
        let routes = netlink.main_routes(&|route| {
            route.is_general && (wanted.contains(&route.destination) || route.belongs_to(ours))
        })?;
        Ok(Self::new(&routes, ours))
    }

    /// `routes`: those that matter, in the kernel's order.
    fn new(routes: &[Route], ours: DeviceRoute) -> Self {
        let mut prefixes: HashMap<IpNet, Routes> = HashMap::new();
        for route in routes {
            let routes = prefixes.entry(route.destination).or_default();
            routes.note(route, ours);
        }
        Self { prefixes, ours }
    }

    /// The routes to one prefix.
    pub(crate) fn to(&self, prefix: &IpNet) -> Routes {
        self.prefixes.get(prefix).copied().unwrap_or_default()
    }

    /// Whether packets to the prefix go into the device, by a route of ours or
    /// by one that is as good.
    pub(crate) fn is_right(&self, prefix: &IpNet) -> bool {
        let is_strong = |route: &Route| match route.destination {
            IpNet::V4(_) => route.metric == 0,
            IpNet::V6(_) => route.metric <= IPV6_METRIC_KERNEL,
        };
        self.to(prefix)
            .winner
            .is_some_and(|winner| winner.leads_into(self.ours.oif) && is_strong(&winner))
    }

    /// What deletes our routes to prefixes that are not wanted.
    pub(crate) fn deletions(&self, wanted: &BTreeSet<IpNet>) -> Vec<RouteChange> {
        self.prefixes
            .iter()
            .filter(|(prefix, routes)| routes.has_ours && !wanted.contains(prefix))
            .map(|(prefix, _)| RouteChange::Delete(*prefix))
            .collect()
    }

    /// Makes sure that nobody's route is in the way of one to any of the prefixes.
    ///
    /// # Errors
    /// Names the first one with such a route.
    pub(crate) fn check_free<'a>(
        &self,
        netlink: &mut Netlink,
        prefixes: impl Iterator<Item = &'a IpNet>,
    ) -> Result<()> {
        let mut blocked = prefixes.filter_map(|prefix| {
            let routes = self.to(prefix);
            // A route that we have already, or one that is as good, stands.
            let is_free = routes.has_ours || self.is_right(prefix);
            routes.obstacle.filter(|_| !is_free)
        });
        let Some(obstacle) = blocked.next() else {
            return Ok(());
        };
        let more = match blocked.count() {
            0 => String::new(),
            others => format!(" (and {others} more prefixes have routes)"),
        };
        let (prefix, way) = (obstacle.destination, way(netlink, &obstacle));
        Err(
            Error::new(format!("route {prefix} exists already {way}{more}")).hint(
                "remove it, leave it out of --peer and --route, or leave routes alone with \
                 --no-routes",
            ),
        )
    }
}

/// Where a route leads, in words.
pub(crate) fn way(netlink: &mut Netlink, route: &Route) -> String {
    match route.oif {
        _ if route.kind != RouteKind::Unicast => "that drops packets".to_string(),
        Some(index) if !route.is_multipath && index != NO_DEVICE => {
            format!("on {}", netlink.name_for_error(index))
        }
        _ => "with several next hops".to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::netlink::route::MAIN_TABLE;

    const OURS: DeviceRoute = DeviceRoute {
        oif: 7,
        protocol: 82,
    };

    fn entry(prefix: &str, oif: u32, protocol: u8, metric: u32) -> Route {
        Route {
            destination: prefix.parse().unwrap(),
            table: MAIN_TABLE,
            protocol,
            kind: RouteKind::Unicast,
            oif: Some(oif),
            metric,
            preference: 0,
            is_multipath: false,
            is_general: true,
        }
    }

    fn stand(routes: &[Route]) -> (bool, Routes) {
        let table = RouteTable::new(routes, OURS);
        let prefix = routes[0].destination;
        (table.is_right(&prefix), table.to(&prefix))
    }

    #[test]
    fn in_ipv4_the_first_without_metric_wins() {
        let ours = entry("10.1.0.0/16", 7, 82, 0);
        let foreign = entry("10.1.0.0/16", 3, 3, 0);
        assert!(stand(&[ours, foreign]).0);
        let (right, routes) = stand(&[foreign, ours]);
        assert!(!right && routes.has_ours);
        assert_eq!(routes.obstacle, Some(foreign));
        let harmless = entry("10.1.0.0/16", 3, 3, 100);
        assert_eq!(stand(&[harmless]).1.obstacle, None);
    }

    #[test]
    fn in_ipv6_metric_decides_and_then_preference() {
        let ours = Route {
            preference: 1,
            ..entry("fd00::/64", 7, 82, 1)
        };
        let foreign = entry("fd00::/64", 3, 3, 1);
        assert!(stand(&[foreign, ours]).0);
        let strong = Route {
            preference: 1,
            ..foreign
        };
        assert!(!stand(&[strong, ours]).0);
        let usual = entry("fd00::/64", 3, 3, 1024);
        assert_eq!(stand(&[usual]).1.obstacle, Some(usual));
    }

    #[test]
    fn a_route_into_the_device_is_as_good_as_ours_unless_it_drops() {
        let kernels = entry("10.1.0.0/16", 7, 2, 0);
        let (right, routes) = stand(&[kernels]);
        assert!(right && !routes.has_ours && routes.obstacle.is_none());
        assert!(stand(&[entry("fd00::/64", 7, 2, 256)]).0);
        let drops = Route {
            kind: RouteKind::BlackHole,
            ..kernels
        };
        assert!(!stand(&[drops]).0);
    }
}
