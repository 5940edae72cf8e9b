//! The network's configuration, and what of the registry this host takes because of it.

use tokio::time::timeout;

use super::Worker;
use crate::error::{Error, Result};
use crate::registry::access::host_of;
use crate::registry::client::CONNECT_TIME_MAX;
use crate::registry::key;
use crate::registry::network::{Backend, Network};
use crate::registry::view::Policy;
use crate::wire::wireguard::keys::PrivateKey;

impl Worker {
    /// Makes the network's configuration that which this host runs by, or notes that it has
    /// become another.
    pub(super) fn follow_config(&mut self) -> Result<()> {
        let key = self.keys.config();
        let value = self.view.config();
        if let Some(policy) = &self.policy {
            let network = value.and_then(|value| Network::parse(value).ok());
            let is_changed = network.is_none_or(|network| network != policy.network);
            if is_changed && !self.status.is_config_changed {
                let what = value.map_or("is gone", |_| "has changed");
                tracing::warn!(
                    key,
                    "registry: the network's configuration at {key} {what}; this host goes on \
                     with the old one until it is started again"
                );
            }
            self.status.is_config_changed = is_changed;
            return Ok(());
        }
        let Some(value) = value else {
            let what = format!("there is no network in etcd at {key}");
            return Err(Error::new(what).hint("`fastvpn registry init` makes one"));
        };
        let network = Network::parse(value).map_err(|error| {
            let what = format!("the network's configuration at {key}: {}", error.fault());
            error.about(what)
        })?;
        if matches!(network.backend, Backend::WireGuard { .. }) {
            self.private_key = Some(match self.options.private_key.clone() {
                Some(given) => given,
                None => key::read_or_make(&self.options.key_file)?,
            });
        } else if self.options.private_key.is_some() {
            let what = "the network's backend is udp, which has no keys, but this host has one";
            return Err(Error::new(what).hint("leave --private-key out"));
        }
        self.policy = Some(Policy {
            network,
            own_ip: self.options.public_ip,
            own_key: self.private_key.as_ref().map(PrivateKey::public),
            allowed: self.options.allowed.clone(),
            allowed_prefixes: self.options.allowed_prefixes.clone(),
            reserved: self.options.reserved.clone(),
        });
        Ok(())
    }

    /// Has no host of the network draw to it what is for the etcd at `url`, which may be there
    /// by name.
    pub(super) async fn reserve(&mut self, url: &str) {
        let found = tokio::net::lookup_host((host_of(url), 0));
        if let (Ok(Ok(found)), Some(policy)) =
            (timeout(CONNECT_TIME_MAX, found).await, &mut self.policy)
        {
            policy.reserved.extend(found.map(|address| address.ip()));
        }
    }
}
