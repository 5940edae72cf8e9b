//! The handshake.

use zeroize::Zeroizing;

/// What a handshake gives.
pub struct TransportKeys {
    /// Seals what this host sends.
    pub send: Zeroizing<[u8; 32]>,
    /// Opens what the peer sends.
    pub receive: Zeroizing<[u8; 32]>,
    /// How the peer names the session.
    pub remote_index: u32,
}
