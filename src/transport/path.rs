//! The underlay path toward a peer: its name, the local address that reaches
//! it, and the path MTU.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs, UdpSocket};
use std::os::fd::AsFd;

use super::sockopt;
use crate::error::{Error, Result};

/// `IPV6_MTU` (`linux/in6.h`), which the libc crate lacks for some targets.
const IPV6_MTU: i32 = 24;

/// What the kernel's routing says about a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Path {
    /// The source address that datagrams to the peer will carry.
    pub local: IpAddr,
    /// Path MTU in bytes, as far as the kernel knows it.
    pub mtu_bytes: u32,
}

/// Addresses of `host`, a literal or a DNS name, with `port`. `listen`'s
/// family comes first if it is a particular address, else IPv4 does.
///
/// # Errors
/// When the name does not resolve, or only to what is no address of a host:
/// 0.0.0.0 is how some name servers block a name, and would lead to this host.
pub fn resolve(host: &str, port: u16, listen: Option<IpAddr>) -> Result<SocketAddr> {
    let mut addresses: Vec<SocketAddr> = (host, port)
        .to_socket_addrs()
        .map_err(|error| {
            Error::new(format!("cannot resolve peer {host}: {error}"))
                .hint("check the name, or give the address")
        })?
        .collect();
    for address in &mut addresses {
        *address = super::canonical(*address);
    }
    addresses.retain(|address| !address.ip().is_unspecified() && !address.ip().is_multicast());
    let wanted_v6 = listen.is_some_and(|ip| ip.is_ipv6() && !ip.is_unspecified());
    addresses.sort_by_key(|address| address.is_ipv6() != wanted_v6);
    addresses
        .first()
        .copied()
        .ok_or_else(|| Error::new(format!("peer {host} has no address of a host")))
}

/// Asks the kernel how it would reach `peer` from `listen`'s address. Nothing
/// is sent.
///
/// # Errors
/// When there is no route to the peer, or `listen` is not an address of this
/// host.
pub fn discover(listen: IpAddr, peer: SocketAddr) -> Result<Path> {
    let any: IpAddr = match peer {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let from = if listen.is_unspecified() { any } else { listen };
    let socket = UdpSocket::bind((from, 0)).map_err(|error| {
        Error::os(format!("cannot use the listen address {from}"), error)
            .hint("--listen takes an address of this host")
    })?;
    let unreachable = |error| {
        Error::os(format!("cannot reach peer {peer}"), error)
            .hint("check the address and this host's routes")
    };
    socket.connect(peer).map_err(unreachable)?;
    let local = socket.local_addr().map_err(unreachable)?.ip();
    let mtu = match peer {
        SocketAddr::V4(_) => sockopt::get_int(socket.as_fd(), libc::IPPROTO_IP, libc::IP_MTU),
        SocketAddr::V6(_) => sockopt::get_int(socket.as_fd(), libc::IPPROTO_IPV6, IPV6_MTU),
    };
    let mtu = mtu.map_err(unreachable)?;
    Ok(Path {
        local,
        mtu_bytes: u32::try_from(mtu).unwrap_or(1500),
    })
}

/// That `peer`, to which `path` leads from sockets on `listen`, is not this
/// process.
///
/// # Errors
/// When it is, names it.
pub fn check_other(listen: SocketAddr, peer: SocketAddr, path: Path) -> Result<()> {
    if path.local != peer.ip() || listen.port() != peer.port() {
        return Ok(());
    }
    Err(Error::new(format!("peer {peer} is this host itself")).hint("name the other host"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_is_reached_from_itself() {
        let path = discover(
            Ipv4Addr::UNSPECIFIED.into(),
            "127.0.0.1:8285".parse().unwrap(),
        )
        .unwrap();
        assert_eq!(path.local, IpAddr::from(Ipv4Addr::LOCALHOST));
        assert!(path.mtu_bytes >= 1280);
    }

    #[test]
    fn what_is_no_host_is_no_answer() {
        for host in ["0.0.0.0", "::", "224.0.0.1", "ff02::1"] {
            let text = resolve(host, 1, None).unwrap_err().to_string();
            assert!(text.contains(host), "{text}");
        }
        assert!(resolve("127.0.0.1", 1, None).is_ok());
    }

    #[test]
    fn a_bad_name_is_one_clear_line() {
        let error = resolve("no-such-host.invalid", 1, None).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("no-such-host.invalid"), "{text}");
        assert!(!text.contains('\n'));
    }
}
