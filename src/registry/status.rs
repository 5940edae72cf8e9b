//! What operators are told of the registry.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use super::view::Unused;
use crate::config::PeerId;

/// See the module's documentation.
#[derive(Clone, Debug, Default)]
pub(crate) struct Status {
    /// The member that this host is connected to, or was last.
    pub(crate) url: String,
    /// Whether it is connected now.
    pub(crate) is_connected: bool,
    /// Why not, if something failed.
    pub(crate) error: Option<String>,
    /// What somebody has to do something about.
    pub(crate) alarm: Option<String>,
    /// The network's configuration is not the one that this host runs by.
    pub(crate) is_config_changed: bool,
    /// The cluster's identity.
    pub(crate) cluster: u64,
    /// The last revision known.
    pub(crate) revision: i64,
    /// The time to live of this host's lease in seconds, and when it was last renewed.
    pub(crate) lease: Option<(i64, Instant)>,
    /// Hosts, this one among them.
    pub(crate) hosts: usize,
    /// Hosts that are kept although the registry does not know them.
    pub(crate) held: usize,
    /// What was not used.
    pub(crate) unused: Unused,
    /// Connections that were made, from each of which all of the registry was listed.
    pub(crate) connections: u64,
    /// Changes of keys that etcd has reported since.
    pub(crate) events: u64,
}

/// How long the hosts' leases last, as etcd said when it was last asked.
#[derive(Debug, Default)]
pub(crate) struct Leases {
    /// When that was, if ever.
    pub(crate) asked_at: Option<Instant>,
    /// By peer: when its lease ends, if it is not renewed.
    pub(super) ends: HashMap<PeerId, Instant>,
}

impl Leases {
    /// How long etcd has not been asked.
    pub(crate) fn age(&self) -> Option<Duration> {
        self.asked_at.map(|at| at.elapsed())
    }

    /// How long a peer's lease lasts, if that is known.
    pub(crate) fn left(&self, id: &PeerId) -> Option<Duration> {
        let end = self.ends.get(id)?;
        Some(end.saturating_duration_since(Instant::now()))
    }
}
