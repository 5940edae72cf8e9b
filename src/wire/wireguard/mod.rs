//! WireGuard's protocol, without I/O: what its messages look like, who may make them, and
//! how packets are sealed and opened. After J. A. Donenfeld, "WireGuard: Next Generation
//! Kernel Network Tunnel", and <https://www.wireguard.com/protocol/>.

pub(crate) mod cookie;
pub mod fuzz;
pub(crate) mod handshake;
pub(crate) mod keys;
pub(crate) mod message;
mod noise;
#[cfg(test)]
mod oracle;
pub(crate) mod replay;
pub(crate) mod secret;
pub(crate) mod session;
pub(crate) mod sessions;
pub(crate) mod timestamp;

/// What the replay window is made of; tests/replay_window.rs has loom's in its place.
mod atomic {
    pub(super) use std::sync::atomic::{AtomicU64, Ordering};
}

#[cfg(test)]
mod replay_tests;
