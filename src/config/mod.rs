//! Flags and a configuration file into one checked configuration.
//!
//! - `types`: what can be said of a tunnel, as plain types, and their text.
//! - `options`: each option, for flags and file alike.
//! - `file`: reads the file.
//! - `wg_quick`: reads a file in the format of wg-quick(8).
//! - `peer`: what can be said of a peer.
//! - `peers`: what must hold among all peers.
//! - `interface`: what an interface has that `wg` and wg-quick(8) configure.
//! - `keys`: reads key files.
//! - `secret`: keys that follow from a secret and from identities.
//! - `registry`: how a registry is reached.
//! - `flannel`: what the environment says in flannel's names.
//! - `resolution`: flags over file over defaults.
//! - `reload`: what of a file that was read again a running tunnel can take over.
//! - `control_path`: where the control socket is.

mod control_path;
mod file;
mod flannel;
mod interface;
mod keys;
mod options;
mod peer;
mod peers;
mod registry;
mod reload;
mod resolution;
mod secret;
mod types;
mod wg_quick;

pub(crate) use control_path::{CONTROL_DIRECTORY, default_control_path, default_control_paths};
pub use file::parse_bytes;
#[cfg(feature = "registry")]
pub(crate) use flannel::password_of_environment;
pub(crate) use keys::{hide_memory, read_text as read_secret_text};
pub use options::Config;
pub(crate) use options::{QUEUES, TUN_NAME_DEFAULT};
pub(crate) use peer::{
    HostPort, PeerId, PeerName, PeerSpec, parse_host_port, parse_peer, parse_peer_name,
};
pub(crate) use peers::{PEERS_MAX, check_mode, check_prefix};
pub(crate) use registry::{NetworkSettings, RegistryFiles};
pub(crate) use types::{
    Aqm, BusyPoll, DEFAULT_PORT, Dscp, Feature, Io, QueueLimit, parse_prefix, parse_tun_name,
};
pub use wg_quick::parse as parse_wg_quick;
