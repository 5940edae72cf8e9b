//! The prefixes that hosts have besides their subnets, and which of them are used: whoever may
//! write one host's keys must not draw others' traffic to it.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;

use ipnet::{IpNet, Ipv4Net};

use super::{Policy, Unused, View};

impl View {
    /// The prefixes besides its subnet that each host has: of two that claim the same one, it
    /// is that of the one who came first.
    pub(super) fn extra_owners(
        &self,
        policy: &Policy,
        unused: &mut Unused,
    ) -> HashMap<Ipv4Net, Vec<IpNet>> {
        let live = self.extras.iter().filter_map(|(subnet, extra)| {
            let host = self.hosts.get(subnet)?;
            // They end together; one that is left over is not this host's.
            (host.lease == extra.lease).then_some((subnet, host, extra))
        });
        let held = self.held.iter();
        let held = held.filter_map(|(subnet, (host, extra))| Some((subnet, host, extra.as_ref()?)));
        if self.extras.is_empty() && self.held.values().all(|(_, extra)| extra.is_none()) {
            return HashMap::new();
        }
        let reserved = self.reserved(policy);
        let mut first: HashMap<IpNet, (i64, Ipv4Net)> = HashMap::new();
        for (subnet, host, extra) in live.chain(held) {
            let claim = (extra.create_revision, *subnet);
            // What this host publishes is by its own options, and has its own addresses.
            let is_own = host.value.public_ip == policy.own_ip;
            for prefix in &extra.prefixes {
                if overlaps(*prefix, policy.network.network) {
                    unused.out_of_place += 1;
                    continue;
                }
                if !is_own && !policy.allows_prefix(*prefix, &reserved) {
                    unused.prefixes_refused += 1;
                    continue;
                }
                let mut is_second = false;
                first
                    .entry(*prefix)
                    .and_modify(|other| {
                        is_second = true;
                        *other = claim.min(*other);
                    })
                    .or_insert(claim);
                unused.out_of_place += usize::from(is_second);
            }
        }
        let mut owners: HashMap<Ipv4Net, Vec<IpNet>> = HashMap::new();
        for (prefix, (_, subnet)) in first {
            owners.entry(subnet).or_default().push(prefix);
        }
        owners
    }

    /// Addresses without which hosts or etcd could not be reached.
    fn reserved(&self, policy: &Policy) -> BTreeSet<IpAddr> {
        let live = self.hosts.values();
        let held = self.held.values().map(|(host, _)| host);
        let all = live.chain(held).map(|host| host.value.public_ip);
        // A host that is not a peer is in nobody's way.
        let all = all.filter(|address| policy.allows(*address));
        let own = policy.reserved.iter().copied();
        let all = all.chain([policy.own_ip]).map(IpAddr::V4);
        own.chain(all).collect()
    }
}

impl Policy {
    /// Whether hosts may have a prefix besides their subnets.
    fn allows_prefix(&self, prefix: IpNet, reserved: &BTreeSet<IpAddr>) -> bool {
        let mut covered = reserved.range(prefix.network()..=prefix.broadcast());
        covered.next().is_none()
            && self
                .allowed_prefixes
                .iter()
                .any(|net| net.contains(&prefix))
    }
}

/// Whether a prefix has addresses of the network.
fn overlaps(prefix: IpNet, network: Ipv4Net) -> bool {
    match prefix {
        IpNet::V4(prefix) => prefix.contains(&network) || network.contains(&prefix),
        IpNet::V6(_) => false,
    }
}
