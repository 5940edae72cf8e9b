//! What of a configuration that was read again a running tunnel can take over.

use super::resolution::Config;

impl Config {
    /// This one, with all of `new` that can change while the tunnel runs.
    #[must_use]
    pub(crate) fn with_changes_of(&self, new: Self) -> Self {
        Self {
            peers: new.peers,
            addresses: new.addresses,
            routes: new.routes,
            mtu_bytes: new.mtu_bytes,
            txqueuelen: new.txqueuelen,
            hop: new.hop,
            no_routes: new.no_routes,
            ..self.clone()
        }
    }

    /// Keys of the settings in which `new` differs and that only a start can
    /// change.
    pub(crate) fn needs_restart(&self, new: &Self) -> Vec<&'static str> {
        [
            ("queues", self.queues != new.queues),
            ("listen", self.listen != new.listen),
            ("tun", self.tun != new.tun),
            ("cores", self.cores != new.cores),
            ("busy-poll", self.busy_poll != new.busy_poll),
            ("io", self.io != new.io),
            ("without", self.wanted != new.wanted),
            ("control", self.control != new.control),
            ("verbose", self.log.verbose != new.log.verbose),
            ("quiet", self.log.quiet != new.log.quiet),
            ("log-format", self.log.format != new.log.format),
        ]
        .into_iter()
        .filter_map(|(key, differs)| differs.then_some(key))
        .collect()
    }
}
