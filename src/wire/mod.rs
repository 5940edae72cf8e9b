//! What a datagram is: a wire mode turns packets into datagrams and back. It does
//! no I/O. The modes are [`plain`] and [`wireguard`].

pub mod plain;
pub mod wireguard;

use std::net::IpAddr;

/// Bytes that the plain wire format adds to an inner packet: the outer IP
/// header without options, and the UDP header.
pub fn overhead_bytes(underlay: IpAddr) -> u32 {
    match underlay {
        IpAddr::V4(_) => 28 + plain::datagram_bytes(0) as u32,
        IpAddr::V6(_) => 48 + plain::datagram_bytes(0) as u32,
    }
}
