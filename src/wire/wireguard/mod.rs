//! WireGuard's protocol, without I/O: what its messages look like, who may make them, and
//! how packets are sealed and opened. After J. A. Donenfeld, "WireGuard: Next Generation
//! Kernel Network Tunnel", and <https://www.wireguard.com/protocol/>.

pub mod cookie;
pub mod handshake;
pub mod keys;
pub mod message;
mod noise;
pub mod replay;
pub mod session;
pub mod sessions;
pub mod timestamp;

/// What the replay window is made of; tests/replay_window.rs has loom's in its place.
mod atomic {
    pub(super) use std::sync::atomic::{AtomicU64, Ordering};
}
