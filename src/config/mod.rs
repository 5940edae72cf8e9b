//! Flags and a configuration file into one checked configuration.
//!
//! - [`types`]: what can be said of a tunnel, as plain types below everything else.
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

pub use file::{FILE_BYTES_MAX, parse_bytes};
pub(crate) use options::QUEUES;
pub use options::{TUN_NAME_DEFAULT, TunnelArgs};
pub(crate) use parse::parse_peer_name;
pub use peers::{PEERS_MAX, check_peers};
pub(crate) use resolution::default_queues;
pub use resolution::{CONTROL_DIRECTORY, Config, default_control_path, default_control_paths};
pub use types::{
    BusyPoll, CoreList, DEFAULT_PORT, Feature, Io, Listen, Log, LogFormat, PeerName, PeerSpec,
    Wanted,
};
