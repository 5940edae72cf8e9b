//! What of a configuration that was read again a running tunnel can take over.

use serde_json::{Map, Value};

use super::options::Config;

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
            takeover: new.takeover,
            ..self.clone()
        }
    }

    /// Keys of the options in which `new` differs and that only a start can change.
    pub(crate) fn needs_restart(&self, new: &Self) -> Vec<String> {
        let in_force = self.with_changes_of(new.clone()).keys();
        let new = new.keys().into_iter();
        new.filter(|(key, value)| in_force.get(key) != Some(value))
            .map(|(key, _)| key)
            .collect()
    }

    /// All options but the peers, by their keys.
    fn keys(&self) -> Map<String, Value> {
        match serde_json::to_value(self) {
            Ok(Value::Object(keys)) => keys,
            // There is nothing in it that cannot be written.
            _ => Map::new(),
        }
    }
}
