//! What operators are told of the registry.

use std::time::Instant;

use super::view::Unused;

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
}
