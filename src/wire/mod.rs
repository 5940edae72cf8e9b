//! What a datagram is.

use std::net::IpAddr;

/// Bytes that the plain wire format adds to an inner packet: the outer IP
/// header without options, and the UDP header.
pub fn overhead_bytes(underlay: IpAddr) -> u32 {
    match underlay {
        IpAddr::V4(_) => 28,
        IpAddr::V6(_) => 48,
    }
}
