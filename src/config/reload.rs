//! What of a configuration that was read again a running tunnel can take over.

use std::path::PathBuf;

use clap::ValueEnum;
use serde_json::{Map, Value};

use super::control_path::default_control_path;
use super::options::{ByWg, Config};
use super::types::Feature;

impl Config {
    /// This one, with all of `new` that can change while the tunnel runs.
    #[must_use]
    pub(crate) fn with_changes_of(&self, new: Self) -> Self {
        Self {
            peers: new.peers,
            private_key_file: new.private_key_file,
            private_key: new.private_key,
            secret_file: new.secret_file,
            secret: new.secret,
            identity: new.identity,
            own_identity: new.own_identity,
            addresses: new.addresses,
            routes: new.routes,
            registry_network: new.registry_network,
            ip_masq: new.ip_masq,
            mtu_bytes: new.mtu_bytes,
            txqueuelen: new.txqueuelen,
            hop: new.hop,
            keepalive_seconds: new.keepalive_seconds,
            no_routes: new.no_routes,
            takeover: new.takeover,
            notes: new.notes,
            by_wg: ByWg {
                private_key: false,
                ..self.by_wg
            },
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

    /// All options but the peers, by their keys; what means the same is the same.
    fn keys(&self) -> Map<String, Value> {
        let default = default_control_path(&self.tun);
        let control = self.control.as_ref().filter(|path| **path != default);
        // JSON is UTF-8, which a path need not be: quoted and escaped it is.
        let quoted = |path: &PathBuf| format!("{path:?}").into();
        let features = Feature::value_variants().iter();
        let effective = Self {
            control: control.map(quoted),
            private_key_file: self.private_key_file.as_ref().map(quoted),
            secret_file: self.secret_file.as_ref().map(quoted),
            without: features
                .filter(|&&feature| !self.uses(feature))
                .copied()
                .collect(),
            ..self.clone()
        };
        match serde_json::to_value(&effective) {
            Ok(Value::Object(keys)) => keys,
            // Nothing is left that cannot be written. If there were, no change must be missed.
            _ => Map::from_iter([("options".into(), format!("{effective:?}").into())]),
        }
    }
}
