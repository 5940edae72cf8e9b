//! How long the hosts' leases last, when somebody wants to know.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Worker;
use crate::config::PeerId;
use crate::registry::client::Client;
use crate::registry::status::Leases;

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
        let end = now + Duration::from_secs(left_s.try_into().unwrap_or(0));
        // A host with several is there as long as one of them is.
        let known = leases.ends.entry(id).or_insert(end);
        *known = end.max(*known);
    }
    leases
}
