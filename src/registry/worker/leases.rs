//! How long the hosts' leases last, when somebody wants to know.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Worker;
use crate::config::PeerId;
use crate::registry::client::Client;
use crate::registry::status::Leases;

/// The longest time to live that etcd grants, in seconds: `MaxLeaseTTL` in its
/// server/lease/lessor.go. More would not fit into an [`Instant`].
const TTL_SECONDS_MAX: i64 = 9_000_000_000;

impl Worker {
    /// Asks etcd, beside what else is to be done, unless it is being asked already.
    pub(super) fn look_at_leases(&mut self, client: &Client) {
        let is_under_way = self.lease_look.as_ref();
        let is_under_way = is_under_way.is_some_and(|look| !look.is_finished());
        let (Some(policy), false) = (&self.policy, is_under_way) else {
            return;
        };
        let hosts = self.view.leases(policy);
        let (client, shared) = (client.clone(), Arc::clone(&self.shared));
        self.lease_look = Some(tokio::spawn(async move {
            let distinct: BTreeSet<i64> = hosts.iter().map(|(_, lease)| *lease).collect();
            let distinct: Vec<i64> = distinct.into_iter().collect();
            match client.times_left(&distinct).await {
                Ok(times) => shared.leases.store(Arc::new(leases(hosts, &times))),
                Err(error) => tracing::debug!("registry: {error}"),
            }
            let _ = shared.leases_known.try_send(());
        }));
    }
}

/// When the leases of peers end, as etcd has just said.
fn leases(hosts: Vec<(PeerId, i64)>, times: &HashMap<i64, (i64, i64)>) -> Leases {
    let now = Instant::now();
    let mut leases = Leases {
        asked_at: Some(now),
        ..Leases::default()
    };
    for (id, lease) in hosts {
        let left_s = times.get(&lease).map_or(0, |(left_s, _)| *left_s);
        let left_s = left_s.clamp(0, TTL_SECONDS_MAX);
        let end = now + Duration::from_secs(left_s.unsigned_abs());
        // A host with several is there as long as one of them is.
        let known = leases.ends.entry(id).or_insert(end);
        *known = end.max(*known);
    }
    leases
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A server may say anything.
    #[test]
    fn times_out_of_bounds_are_brought_into_them() {
        let hosts: Vec<_> = [1, 2, 3]
            .map(|lease| (PeerId::Host(format!("host{lease}"), 8285), lease))
            .into();
        let times = [(1, i64::MAX), (2, i64::MIN), (3, 60)];
        let times = times.map(|(lease, left_s)| (lease, (left_s, 60))).into();
        let leases = leases(hosts.clone(), &times);
        let left = |index: usize| leases.left(&hosts[index].0).unwrap().as_secs();
        assert!(left(0) > 8_000_000_000 && left(1) == 0 && left(2) <= 60);
    }
}
