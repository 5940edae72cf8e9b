//! The time that many leases have left: etcd tells it of one at a time.

use std::collections::HashMap;

use tokio::task::JoinSet;

use super::Client;
use crate::error::{Error, Result};

/// Leases that are asked for at a time.
const AT_ONCE: usize = 32;

impl Client {
    /// How many seconds each of these leases has left, and how many it was granted. Those that
    /// have ended are left out.
    ///
    /// # Errors
    /// As [`Self::get`].
    pub(crate) async fn times_left(&self, leases: &[i64]) -> Result<HashMap<i64, (i64, i64)>> {
        let mut all = HashMap::new();
        let Some((first, others)) = leases.split_first() else {
            return Ok(all);
        };
        // If the token was forgotten, one gets another for all.
        let mut asked = self.clone();
        all.extend(asked.time_left(*first).await?.map(|time| (*first, time)));
        let mut tasks = JoinSet::new();
        for some in others.chunks(others.len().div_ceil(AT_ONCE).max(1)) {
            let (mut client, some) = (asked.clone(), some.to_vec());
            tasks.spawn(async move {
                let mut found = Vec::with_capacity(some.len());
                for lease in some {
                    found.extend(client.time_left(lease).await?.map(|time| (lease, time)));
                }
                Ok::<_, Error>(found)
            });
        }
        while let Some(done) = tasks.join_next().await {
            all.extend(done.map_err(|_| Error::new("a question to etcd was cut short"))??);
        }
        Ok(all)
    }
}
