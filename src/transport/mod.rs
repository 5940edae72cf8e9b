//! The network's side: UDP sockets, their offloads, and the path to a peer.

pub mod mtu_probe;
pub mod path;
pub mod socket;
mod sockopt;
pub mod steering;

use std::net::{IpAddr, SocketAddr};

/// Default UDP port, flannel's and the teaching VPN's.
pub const DEFAULT_PORT: u16 = 8285;

/// Bytes that the plain wire format adds to an inner packet: the outer IP
/// header without options, and the UDP header.
pub fn overhead_bytes(underlay: IpAddr) -> u32 {
    match underlay {
        IpAddr::V4(_) => 28,
        IpAddr::V6(_) => 48,
    }
}

/// An IPv4 address that a dual-stack socket shows as `::ffff:a.b.c.d`, as
/// plain IPv4 again (RFC 4291, section 2.5.5.2).
pub fn canonical(address: SocketAddr) -> SocketAddr {
    match address {
        // Anything else keeps its scope: fe80::1%eth0.
        SocketAddr::V6(v6) => match v6.ip().to_ipv4_mapped() {
            Some(v4) => SocketAddr::new(v4.into(), v6.port()),
            None => address,
        },
        SocketAddr::V4(_) => address,
    }
}
