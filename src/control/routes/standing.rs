//! What the main table says of the prefixes that matter.

use std::collections::{BTreeSet, HashMap};

use ipnet::IpNet;

use crate::netlink::{DeviceRoute, RouteEntry};

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
    /// Nothing seen so far.
    pub fn new(ours: DeviceRoute) -> Self {
        Self {
            prefixes: HashMap::new(),
            ours,
        }
    }

    /// Takes in a route, in the kernel's order.
    pub fn note(&mut self, entry: RouteEntry, wanted: &BTreeSet<IpNet>) {
        let matters = wanted.contains(&entry.destination) || entry.belongs_to(self.ours);
        if matters && entry.general {
            let standing = self.prefixes.entry(entry.destination).or_default();
            standing.note(entry, self.ours);
        }
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
