//! The kernel's main table, compared with what is wanted.

use std::collections::{BTreeSet, HashMap, HashSet};

use ipnet::IpNet;

use crate::error::{Error, Result};
use crate::host::netlink::{Netlink, Route, RouteChange, RouteKind};

/// Metric of the IPv6 routes that the kernel makes for an address
/// (`IP6_RT_PRIO_ADDRCONF`, linux/ipv6_route.h).
const IPV6_METRIC_KERNEL: u32 = 256;

/// Metric of an IPv6 route that was added without one (`IP6_RT_PRIO_USER`).
const IPV6_METRIC_USUAL: u32 = 1024;

/// The routes to the wanted prefixes, and to those with routes of ours.
pub struct RouteTable {
    device: Option<u32>,
    /// The route that wins, by prefix.
    pub(super) winners: HashMap<IpNet, Route>,
    /// The prefixes with a route of ours, winning or not.
    pub(super) ours: HashSet<IpNet>,
}

impl RouteTable {
    /// Reads the kernel's main table. `device`: the one that our routes go through.
    ///
    /// # Errors
    /// When the kernel refuses to list it.
    pub(crate) fn read(
        netlink: &mut Netlink,
        device: Option<u32>,
        wanted: &BTreeSet<IpNet>,
    ) -> Result<Self> {
        let routes = netlink.main_routes(&|route| {
            route.is_general && (route.is_ours(device) || wanted.contains(&route.destination))
        })?;
        Ok(Self::new(&routes, device))
    }

    /// `routes`: those that matter, in the kernel's order.
    fn new(routes: &[Route], device: Option<u32>) -> Self {
        // The kernel prefers the first of those that are alike.
        let rank = |route: &Route| (route.metric, -route.preference);
        let mut winners: HashMap<IpNet, Route> = HashMap::new();
        for route in routes {
            let winner = winners.entry(route.destination).or_insert(*route);
            if rank(route) < rank(winner) {
                *winner = *route;
            }
        }
        let ours = routes.iter().filter(|route| route.is_ours(device));
        Self {
            device,
            winners,
            ours: ours.map(|route| route.destination).collect(),
        }
    }

    /// Whether packets to the prefix go into the device, by a route of ours or
    /// by one that is as good.
    pub(crate) fn is_right(&self, prefix: &IpNet) -> bool {
        self.winners.get(prefix).is_some_and(|winner| {
            winner.leads_into(self.device) && is_as_strong(winner, IPV6_METRIC_KERNEL)
        })
    }

    /// What deletes our routes to prefixes that are not wanted.
    pub(crate) fn deletions(&self, wanted: &BTreeSet<IpNet>) -> impl Iterator<Item = RouteChange> {
        let unwanted = self.ours.iter().filter(|prefix| !wanted.contains(prefix));
        unwanted.copied().map(RouteChange::Delete)
    }

    /// Makes sure that nobody's route is in the way of a new one to any of the
    /// prefixes. Where there is one of ours already, that stands.
    ///
    /// # Errors
    /// Names the first one with such a route.
    pub(crate) fn check_free<'a>(
        &self,
        netlink: &mut Netlink,
        prefixes: impl Iterator<Item = &'a IpNet>,
    ) -> Result<()> {
        let is_in_the_way = |winner: &&Route| {
            !winner.leads_into(self.device)
                && is_as_strong(winner, IPV6_METRIC_USUAL)
                && !self.ours.contains(&winner.destination)
        };
        let mut winners = prefixes.filter_map(|prefix| self.winners.get(prefix));
        let Some(obstacle) = winners.find(is_in_the_way) else {
            return Ok(());
        };
        let (prefix, by_way) = (obstacle.destination, by_way(netlink, obstacle));
        Err(
            Error::new(format!("route {prefix} exists already {by_way}")).hint(
                "remove it, leave it out of --peer and --route, or leave routes alone with \
                 --no-routes",
            ),
        )
    }
}

/// Whether a route has no metric, or in IPv6 one up to `ipv6_metric`.
fn is_as_strong(route: &Route, ipv6_metric: u32) -> bool {
    match route.destination {
        IpNet::V4(_) => route.metric == 0,
        IpNet::V6(_) => route.metric <= ipv6_metric,
    }
}

/// Where a route leads, in words.
pub(crate) fn by_way(netlink: &mut Netlink, route: &Route) -> String {
    match route.oif {
        Some(index) if route.kind == RouteKind::Unicast => {
            format!("on {}", netlink.name_for_error(index))
        }
        _ => "that drops packets".to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::netlink::route::{MAIN_TABLE, PROTOCOL};

    const DEVICE: Option<u32> = Some(7);

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

    /// Whether all is right, whether there is a route of ours, and whether one could
    /// be added.
    fn state(routes: &[Route]) -> (bool, bool, bool) {
        let table = RouteTable::new(routes, DEVICE);
        let prefix = routes[0].destination;
        let mut netlink = Netlink::open().unwrap();
        let is_free = table.check_free(&mut netlink, [prefix].iter()).is_ok();
        (
            table.is_right(&prefix),
            table.ours.contains(&prefix),
            is_free,
        )
    }

    #[test]
    fn in_ipv4_the_first_without_metric_wins() {
        let ours = entry("10.1.0.0/16", 7, PROTOCOL, 0);
        let foreign = entry("10.1.0.0/16", 3, 3, 0);
        assert_eq!(state(&[ours, foreign]), (true, true, true));
        assert_eq!(state(&[foreign, ours]), (false, true, true));
        assert_eq!(state(&[foreign]), (false, false, false));
        let harmless = entry("10.1.0.0/16", 3, 3, 100);
        assert_eq!(state(&[harmless]), (false, false, true));
    }

    #[test]
    fn in_ipv6_metric_decides_and_then_preference() {
        let ours = Route {
            preference: 1,
            ..entry("fd00::/64", 7, PROTOCOL, 1)
        };
        let foreign = entry("fd00::/64", 3, 3, 1);
        assert!(state(&[foreign, ours]).0);
        let strong = Route {
            preference: 1,
            ..foreign
        };
        assert!(!state(&[strong, ours]).0);
        for (metric, is_free) in [(1024, false), (1025, true)] {
            let usual = entry("fd00::/64", 3, 3, metric);
            assert_eq!(state(&[usual]), (false, false, is_free));
        }
    }

    #[test]
    fn a_route_into_the_device_is_as_good_as_ours_unless_it_drops() {
        let kernels = entry("10.1.0.0/16", 7, 2, 0);
        assert_eq!(state(&[kernels]), (true, false, true));
        assert!(state(&[entry("fd00::/64", 7, 2, 256)]).0);
        let drops = Route {
            kind: RouteKind::BlackHole,
            ..kernels
        };
        assert_eq!(state(&[drops]), (false, false, false));
    }
}
