//! What the registry's thread and its owner share.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::AtomicU64;

use arc_swap::ArcSwap;
use crossbeam_channel::Sender;
use ipnet::{IpNet, Ipv4Net};

use super::access::Access;
use super::network::Network;
use super::status::{Leases, Status};
use super::view::Snapshot;
use crate::error::Error;
use crate::wire::wireguard::keys::PrivateKey;

/// What the agent needs to know.
pub(crate) struct Options {
    /// How etcd is reached.
    pub(crate) access: Access,
    /// The prefix of the network's keys.
    pub(crate) prefix: String,
    /// This host's address, as the others are to find it.
    pub(crate) public_ip: Ipv4Addr,
    /// Addresses that hosts may have; empty for all.
    pub(crate) allowed: Vec<IpNet>,
    /// What prefixes that hosts have besides their subnets have to be in; empty for none.
    pub(crate) allowed_prefixes: Vec<IpNet>,
    /// Addresses that none of these may cover: etcd's, and this host's.
    pub(crate) reserved: BTreeSet<IpAddr>,
    /// Seconds that this host stays in the registry after it was last heard of.
    pub(crate) ttl_s: i64,
    /// This host's private key, if the wireguard backend is to use this one.
    pub(crate) private_key: Option<PrivateKey>,
    /// Where it is kept if not; it is made where there is none.
    pub(crate) key_file: PathBuf,
    /// Prefixes that this host has besides its subnet.
    pub(crate) published: Vec<IpNet>,
    /// The file that names the subnet that this host had before.
    pub(crate) subnet_file: PathBuf,
    /// Where is kept what is known, for boots without etcd.
    pub(crate) cache: PathBuf,
}

/// What a host gets that joins.
#[derive(Clone)]
pub(crate) struct Joined {
    /// The network.
    pub(crate) network: Network,
    /// This host's subnet.
    pub(crate) subnet: Ipv4Net,
    /// This host's key, with the wireguard backend.
    pub(crate) private_key: Option<PrivateKey>,
}

/// What the agent's thread and its owner share.
pub(super) struct Shared {
    pub(super) snapshot: ArcSwap<Snapshot>,
    pub(super) status: ArcSwap<Status>,
    pub(super) leases: ArcSwap<Leases>,
    /// Somebody wants to know of the leases.
    pub(super) leases_wanted: Bell,
    /// Etcd has been asked for them.
    pub(super) leases_known: Sender<()>,
    /// Why this host has to leave the network.
    pub(super) end: Mutex<Option<Error>>,
    /// How long the last snapshot took to apply.
    pub(super) apply_us: AtomicU64,
    /// Something of the above is new. A second word says nothing more.
    pub(super) changed: Sender<()>,
    pub(super) joined: Sender<Joined>,
}

/// Wakes the agent's thread.
#[cfg(feature = "registry")]
pub(super) type Bell = tokio::sync::Notify;
#[cfg(not(feature = "registry"))]
#[derive(Default)]
pub(super) struct Bell(());

/// The agent ends when this is dropped.
#[cfg(feature = "registry")]
pub(super) type Stop = tokio::sync::oneshot::Sender<()>;
#[cfg(not(feature = "registry"))]
pub(super) struct Stop;
