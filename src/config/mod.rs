//! Flags and a configuration file into one checked configuration.
//!
//! - `types`: what can be said of a tunnel, as plain types below everything else.
//! - `parse`: their text.
//! - `options`: each option's name, help and bounds, for flags and file alike.
//! - `file`: the file, key by key with its place.
//! - `peers`: what must hold among all peers.
//! - `resolution`: flags over file over defaults.
//! - `reload`: what of a file that was read again a running tunnel can take over.

mod file;
mod options;
pub(crate) mod parse;
mod peers;
mod reload;
mod resolution;
mod types;

pub use file::parse_bytes;
pub use options::TunnelArgs;
pub(crate) use options::{QUEUES, TUN_NAME_DEFAULT};
pub(crate) use parse::parse_peer_name;
pub(crate) use peers::PEERS_MAX;
pub use resolution::Config;
pub(crate) use resolution::{
    CONTROL_DIRECTORY, default_control_path, default_control_paths, default_queues,
};
pub(crate) use types::{BusyPoll, DEFAULT_PORT, Io, Listen, PeerName, PeerSpec, Wanted};
