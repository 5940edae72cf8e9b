//! A tunnel follows a registry: snapshots become peers, prefixes and routes.

use std::time::{Duration, Instant};

use super::plan::kernel_routes;
use super::reach;
use super::registry::Registry;
use super::tunnel::Tunnel;
use crate::error::Result;
use crate::host::masquerade::Masquerade;
use crate::registry::view::Change;
use crate::routing::overlay::{Origin, Overlay, RegistryChange};

/// How long what etcd has said of leases is good enough: each of them is a question.
const LEASES_AGE_MAX: Duration = Duration::from_secs(30);

fn changes(changes: &[Change]) -> impl Iterator<Item = RegistryChange<'_>> + Clone {
    let both = changes.iter();
    both.map(|(old, new)| (old.as_deref(), new.as_deref()))
}

impl Tunnel {
    /// Goes on in a registry's network, with the peers that are known there.
    ///
    /// # Errors
    /// When this host has to leave it.
    pub fn enter_registry(&mut self, registry: Option<Registry>) -> Result<()> {
        self.registry = registry;
        self.take_registry()
    }

    /// Has this host's containers use the network, if it is a registry's: masquerades, if that is
    /// wanted, and tells container tools about this host's subnet.
    ///
    /// # Errors
    /// When the rules cannot be made, or the file cannot be written.
    pub fn open_to_containers(&mut self) -> Result<()> {
        self.masquerade = self.new_masquerade(self.config.ip_masq)?;
        self.write_subnet_file()
    }

    /// Masquerades for this host's containers, if that is wanted and it has a registry's network.
    ///
    /// # Errors
    /// When the rules cannot be made.
    pub(super) fn new_masquerade(&self, is_wanted: bool) -> Result<Option<Masquerade>> {
        let registry = self.registry.as_ref().filter(|_| is_wanted);
        let settings = registry.map(|registry| &registry.settings);
        settings
            .map(|settings| Masquerade::start(settings.network, settings.subnet))
            .transpose()
    }

    /// Tells container tools about this host's subnet, if it is a registry's.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write_subnet_file(&self) -> Result<()> {
        match &self.registry {
            Some(registry) => {
                registry.write_subnet_file(&self.config, self.settings.link.mtu_bytes)
            }
            None => Ok(()),
        }
    }

    /// Has etcd asked for the leases of a registry's hosts, if they are not known well enough to be
    /// shown. Returns whether that is worth waiting for.
    pub fn ask_for_leases(&self) -> bool {
        let registry = self.registry.as_ref();
        let agent = registry.map(|registry| &registry.agent);
        let stale = agent.filter(|agent| {
            let age = agent.leases().age();
            agent.status().is_connected && age.is_none_or(|age| age > LEASES_AGE_MAX)
        });
        if let Some(agent) = stale {
            agent.ask_for_leases();
        }
        stale.is_some()
    }

    /// What is to be done for a registry's network every second.
    pub fn poll_registry(&mut self) {
        if let Some(registry) = &mut self.registry {
            registry.poll();
        }
        if let Some(masquerade) = &mut self.masquerade {
            masquerade.poll(Instant::now());
        }
    }

    /// Puts in force what has changed in the registry.
    ///
    /// # Errors
    /// When this host has to leave it.
    pub fn take_registry(&mut self) -> Result<()> {
        let Some(registry) = &mut self.registry else {
            return Ok(());
        };
        if let Some(error) = registry.agent.end() {
            return Err(error);
        }
        let started = Instant::now();
        let snapshot = registry.agent.snapshot();
        let all = snapshot.changes_since(&registry.applied);
        registry.applied = snapshot;
        if all.is_empty() {
            return Ok(());
        }
        let mut next = self.peers.overlay.clone();
        next.apply_registry(changes(&all));
        let listen = self.settings.listen;
        for (hop, endpoint) in next.registry_peers(changes(&all)) {
            if let Err(error) = reach::check_endpoint(listen, &next, endpoint) {
                next.set_endpoint(hop, None);
                if registry.log.admits(started) {
                    tracing::warn!(%endpoint, %error, "registry: a host cannot be used: {error}");
                }
                continue;
            }
            // Its route is looked at again while packets are sent there.
            let device = self.host.device.index;
            let interface = self.host.netlink.interface_to(endpoint);
            let is_inside = device.is_some() && interface.is_ok_and(|it| it == device);
            next.set_suspended(hop, is_inside);
        }
        if registry.log.admits(started) {
            let words = words(&all);
            tracing::info!(changes = words, "registry: {words}");
        }
        self.put_registry_in_force(next);
        if let Some(registry) = &self.registry {
            let (cost, count) = (started.elapsed(), all.len());
            registry.agent.note_cost(cost);
            tracing::debug!("registry: changes of {count} peers took {cost:?}");
        }
        Ok(())
    }

    /// Puts the peers and prefixes of the registry in force. Where somebody else's routes are in
    /// the way of the kernel's, those stay.
    pub fn put_registry_in_force(&mut self, mut next: Overlay) {
        self.publish_table_of(&mut next);
        if !self.host.lacks_routes() {
            let wanted = kernel_routes(&self.config, &next);
            self.host.set_routes_that_can_be(&wanted);
        }
        self.peers.replace(next, Instant::now());
        self.follow_peers();
    }

    /// Has the kernel route what it should, for the first time.
    ///
    /// # Errors
    /// When somebody else's route is in the way of one that was configured, or of the
    /// registry's network.
    pub fn set_first_routes(&mut self) -> Result<()> {
        let overlay = &self.peers.overlay;
        let mut wanted = kernel_routes(&self.config, overlay);
        let is_registrys = |origin| origin == Origin::Registry;
        let lenient = overlay
            .prefixes()
            .filter(|(.., origin)| is_registrys(*origin));
        for (prefix, ..) in lenient {
            wanted.remove(&prefix);
        }
        self.host.set_routes(wanted)?;
        if self.registry.is_some() {
            let wanted = self.kernel_routes();
            self.host.set_routes_that_can_be(&wanted);
        }
        Ok(())
    }
}

/// What has changed, in a few words.
fn words(all: &[Change]) -> String {
    const NAMED_MAX: usize = 4;
    let name = |(old, new): &Change| match (old, new) {
        (None, Some(new)) => format!("host {} has joined", new.name),
        (Some(old), None) => format!("host {} is gone", old.name),
        (_, Some(new)) => format!("host {} has changed", new.name),
        (None, None) => String::new(),
    };
    let named: Vec<_> = all.iter().take(NAMED_MAX).map(name).collect();
    match all.len() - named.len() {
        0 => named.join(", "),
        more => format!("{}, and {more} more changes", named.join(", ")),
    }
}
