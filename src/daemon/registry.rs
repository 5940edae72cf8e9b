//! A tunnel in a registry's network: what it takes from there at its start, and how it follows
//! what changes there.

mod address;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, select};
use signal_hook::consts::SIGHUP;

use self::address::local_address;
use super::settings::default_mtu_bytes;
use crate::config::{Config, DEFAULT_PORT, NetworkSettings, check_mode};
use crate::control::protocol::RegistryStatus;
use crate::error::{Error, Result};
use crate::host::netlink::Netlink;
use crate::host::path::{self, Path};
use crate::log::rate_limited::RateLimitedLog;
use crate::registry::access::Access;
use crate::registry::agent::Agent;
use crate::registry::network::Backend;
use crate::registry::shared::{Joined, Options};
use crate::registry::subnet_env;
use crate::registry::view::Snapshot;
use crate::routing::overlay::Overlay;
use crate::wire::wireguard::keys::PrivateKey;

/// How long a few lines about the registry's hosts stand for all.
const LOG_WINDOW: Duration = Duration::from_secs(10);

/// See the module's documentation.
pub struct Registry {
    /// What keeps up with it.
    pub(super) agent: Agent,
    /// What the network says of this host.
    pub(super) settings: NetworkSettings,
    private_key: Option<PrivateKey>,
    /// What is in force.
    pub(super) applied: Arc<Snapshot>,
    /// Few lines for many changes.
    pub(super) log: RateLimitedLog,
}

/// Joins the network, and waits until that has succeeded: `None` if a signal ends the process
/// first. What the network says and `config` does not is put there.
///
/// # Errors
/// When the options cannot be used here.
pub fn join(config: &mut Config, signals: &Receiver<i32>) -> Result<Option<Registry>> {
    let access = Access::read(&config.registry_files())?;
    let mut netlink = Netlink::open()?;
    let local = local_address(config, &access, &mut netlink)?;
    let public_ip = config.public_ip.unwrap_or(local);
    let own = netlink.addresses()?.into_iter();
    let own = own.map(|(_, net)| net.addr());
    let reserved = own.chain(access.addresses()).collect();
    let agent = Agent::start(Options {
        access,
        prefix: config.registry_files().prefix().to_string(),
        public_ip,
        allowed: config.registry_allow.clone(),
        allowed_prefixes: config.registry_allow_prefix.clone(),
        reserved,
        ttl_s: config.registry_ttl_seconds().into(),
        private_key: config.private_key.clone(),
        key_file: config.registry_key_file(),
        published: config.registry_publish.clone(),
        subnet_file: config.subnet_file(),
        cache: config.registry_cache(),
    })?;
    let joined = loop {
        select! {
            recv(agent.joined) -> joined => match joined {
                Ok(joined) => break joined,
                Err(_) => return Err(Error::new("the registry's thread has ended")),
            },
            recv(agent.changed) -> _ => if let Some(error) = agent.end() {
                return Err(error);
            },
            // There is nothing yet to read anew.
            recv(signals) -> signal => if signal != Ok(SIGHUP) {
                return Ok(None);
            },
        }
    };
    let settings = settings(&joined, local, public_ip, &mut netlink)?;
    let registry = Registry {
        agent,
        settings,
        private_key: joined.private_key,
        applied: Arc::default(),
        log: RateLimitedLog::new("changes of the registry", LOG_WINDOW),
    };
    registry.settle(config)?;
    let NetworkSettings {
        network, subnet, ..
    } = registry.settings;
    let backend = joined.network.backend.name();
    tracing::info!(%network, backend, %public_ip, %subnet, "joined {network} ({backend}) as {public_ip}, with the subnet {subnet}");
    Ok(Some(registry))
}

/// Makes sure of what can be known of the registry's options without etcd, and puts something
/// in the place of what only the network says.
///
/// # Errors
/// When the options cannot be used here.
pub fn rehearse(config: &mut Config) -> Result<()> {
    let access = Access::read(&config.registry_files())?;
    let local = local_address(config, &access, &mut Netlink::open()?)?;
    config.listen.get_or_insert((local, DEFAULT_PORT).into());
    config.mtu_bytes.get_or_insert(path::MTU_BYTES_DEFAULT);
    if config.addresses.is_empty() {
        // A loopback address is in nobody's way.
        config.addresses = vec![IpAddr::V4(Ipv4Addr::new(127, 255, 255, 1)).into()];
    }
    Ok(())
}

/// What follows from the network for this host.
fn settings(
    joined: &Joined,
    local: Ipv4Addr,
    public_ip: Ipv4Addr,
    netlink: &mut Netlink,
) -> Result<NetworkSettings> {
    let addresses = netlink.addresses()?.into_iter();
    let mut own = addresses.filter(|(_, net)| net.addr() == local);
    let link = match own.next() {
        Some((index, _)) => netlink.link_by_index(index)?,
        None => None,
    };
    let path = Path {
        local: local.into(),
        mtu_bytes: link.map_or(path::MTU_BYTES_DEFAULT, |link| link.mtu),
    };
    let backend = &joined.network.backend;
    let listen = match backend {
        // Its address is what its peers know this host by.
        Backend::Udp { .. } => local,
        Backend::WireGuard { .. } => Ipv4Addr::UNSPECIFIED,
    };
    Ok(NetworkSettings {
        network: joined.network.network,
        subnet: joined.subnet,
        listen: SocketAddr::new(listen.into(), backend.port()),
        mtu_bytes: default_mtu_bytes(backend.mode(), path, local.into()),
        public_ip,
    })
}

impl Registry {
    /// Puts what the network says where a configuration does not say otherwise.
    ///
    /// # Errors
    /// When the configured peers do not fit the network's backend.
    pub(super) fn settle(&self, config: &mut Config) -> Result<()> {
        let settings = &self.settings;
        config.registry_network = Some(settings.network);
        if config.addresses.is_empty() {
            // As flanneld has it: the subnet's own address, which no container has.
            config.addresses = vec![IpAddr::V4(settings.subnet.network()).into()];
        }
        config.listen.get_or_insert(settings.listen);
        config.mtu_bytes.get_or_insert(settings.mtu_bytes);
        if config.private_key.is_none() {
            config.private_key.clone_from(&self.private_key);
        }
        let is_encrypted = config.is_encrypted();
        let mut peers = config.peers.iter();
        peers.try_for_each(|peer| check_mode(&peer.name, is_encrypted))?;
        config.read_keys()
    }

    /// Adds to an overlay what is in force of the registry: another change may have made room
    /// for it, or removed it.
    pub(super) fn fill(&self, overlay: &mut Overlay) {
        let peers = self.applied.peers.values();
        overlay.apply_registry(peers.map(|spec| (None, Some(&**spec))));
    }

    /// What is to be done every second.
    pub(super) fn poll(&mut self) {
        self.log.flush(Instant::now());
    }

    /// What operators are told of it.
    pub(super) fn status(&self) -> RegistryStatus {
        let (status, settings) = (self.agent.status(), &self.settings);
        let unused = status.unused;
        RegistryStatus {
            url: status.url.clone(),
            is_connected: status.is_connected,
            error: status.error.clone(),
            alarm: status.alarm.clone(),
            is_config_changed: status.is_config_changed,
            cluster: format!("{:x}", status.cluster),
            revision: status.revision,
            network: settings.network.into(),
            subnet: settings.subnet.into(),
            public_ip: settings.public_ip.into(),
            lease_ttl_seconds: status.lease.map(|(ttl_s, _)| ttl_s),
            lease_renewed_seconds: status.lease.map(|(_, at)| at.elapsed().as_secs()),
            hosts: status.hosts,
            held: status.held,
            malformed: unused.malformed,
            not_allowed: unused.not_allowed + unused.prefixes_refused,
            out_of_place: unused.out_of_place,
            other_backend: unused.other_backend,
            connections: status.connections,
            events: status.events,
        }
    }

    /// Writes the file that container tools read.
    pub(super) fn write_subnet_file(&self, config: &Config, mtu_bytes: u32) -> Result<()> {
        let NetworkSettings {
            network, subnet, ..
        } = self.settings;
        let text = subnet_env::text(network, subnet, mtu_bytes, config.ip_masq);
        subnet_env::replace(&config.subnet_file(), text.as_bytes(), 0o644)
    }
}
