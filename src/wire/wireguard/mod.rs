//! WireGuard's protocol, without I/O: what its messages look like, who may make them, and
//! how packets are sealed and opened. After J. A. Donenfeld, "WireGuard: Next Generation
//! Kernel Network Tunnel", and <https://www.wireguard.com/protocol/>.

pub mod keys;
pub mod message;
pub mod sessions;
