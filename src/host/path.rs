//! The underlay path toward a peer: its name, the local address that reaches
//! it, and the path MTU.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs, UdpSocket};

use socket2::SockRef;

use crate::error::{Error, Result};
use crate::host::netlink::Netlink;

/// Path MTU that is counted on while no path is known: Ethernet's.
pub(crate) const MTU_BYTES_DEFAULT: u32 = 1500;

/// Most addresses of a peer that are looked at.
const ADDRESSES_MAX: usize = 16;

/// How datagrams leave this host, as far as its routes depend on that.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Source {
    /// The address that sockets are on.
    pub(crate) listen: IpAddr,
    /// Their mark (`SO_MARK`), which policy rules may ask for; 0 for none.
    pub(crate) mark: u32,
}

impl Source {
    /// Without a mark.
    pub(crate) fn unmarked(listen: IpAddr) -> Self {
        Self { listen, mark: 0 }
    }
}

/// What this host's routes say about a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Path {
    /// The source address that datagrams to the peer will carry.
    pub(crate) local: IpAddr,
    /// MTU in bytes of the route, or else of the interface. The path beyond may
    /// have less.
    pub(crate) mtu_bytes: u32,
}

/// Addresses of `host`, a literal or a DNS name, with `port`: one at least, at most
/// [`ADDRESSES_MAX`], the best first. `listen`'s family is better if it is a particular
/// address, else IPv4 is; apart from that the resolver's order stands. An address that
/// cannot be reached from `listen` now is there only if none can.
///
/// # Errors
/// When the name does not resolve, or only to what is not the address of a host:
/// 0.0.0.0 is how some name servers block a name, and would lead to this host.
pub(crate) fn resolve(host: &str, port: u16, listen: Option<IpAddr>) -> Result<Vec<SocketAddr>> {
    let resolved: Vec<SocketAddr> = (host, port)
        .to_socket_addrs()
        .map_err(|error| {
            Error::new(format!("cannot resolve peer {host}: {error}"))
                .hint("check the name, or give the address")
        })?
        .collect();
    let is_reached = |address: &SocketAddr| is_reached(listen, *address);
    let wanted_v6 = listen.is_some_and(|ip| ip.is_ipv6() && !ip.is_unspecified());
    let addresses = usable(&resolved, is_reached, wanted_v6);
    if addresses.is_empty() {
        return Err(Error::new(format!("peer {host} has no address of a host")));
    }
    Ok(addresses)
}

/// Whether there is a way now from sockets on `listen`.
fn is_reached(listen: Option<IpAddr>, peer: SocketAddr) -> bool {
    let any = Ipv6Addr::UNSPECIFIED.into();
    let listen = listen.unwrap_or(any);
    // Sockets on 0.0.0.0 are for IPv4 alone, those on :: for both.
    let is_of_family = listen == any || listen.is_ipv6() == peer.is_ipv6();
    is_of_family && local_address(Source::unmarked(listen), peer).is_ok()
}

/// What [`resolve`] makes of the resolver's answer.
fn usable(
    resolved: &[SocketAddr],
    is_reached: impl Fn(&SocketAddr) -> bool,
    wanted_v6: bool,
) -> Vec<SocketAddr> {
    let mut seen = BTreeSet::new();
    let mut addresses: Vec<SocketAddr> = resolved
        .iter()
        .map(|&address| crate::packet::ip::canonical(address))
        .filter(|&address| is_host(address) && seen.insert(address))
        .collect();
    if addresses.iter().any(&is_reached) {
        addresses.retain(is_reached);
    }
    let is_other_family = |address: &SocketAddr| address.is_ipv6() != wanted_v6;
    addresses.sort_by_key(is_other_family);
    // The same ones whatever the name server begins with: the address in use must not
    // come and go.
    let mut kept = addresses.clone();
    kept.sort_by_key(|address| (is_other_family(address), *address));
    kept.truncate(ADDRESSES_MAX);
    addresses.retain(|address| kept.contains(address));
    addresses
}

/// Whether this can be the address of a host.
pub(crate) fn is_host(address: SocketAddr) -> bool {
    !address.ip().is_unspecified() && !address.ip().is_multicast()
}

/// Asks the kernel how it would reach `peer` from `listen`'s address. Nothing
/// is sent.
///
/// # Errors
/// As [`local_address`], or when the kernel refuses to tell the route.
pub(crate) fn discover(netlink: &mut Netlink, listen: IpAddr, peer: SocketAddr) -> Result<Path> {
    let mark = netlink.fwmark;
    let local = local_address(Source { listen, mark }, peer)?;
    let route = netlink.route_mtu(peer)?;
    Ok(Path {
        local,
        mtu_bytes: route.map_or(MTU_BYTES_DEFAULT, |route| route.mtu_bytes),
    })
}

/// The source address that datagrams to `peer` will carry. Nothing is sent.
///
/// # Errors
/// When there is no route to the peer, or the source is not an address of this
/// host.
pub(crate) fn local_address(source: Source, peer: SocketAddr) -> Result<IpAddr> {
    let listen = source.listen;
    let socket = bind_toward(source, peer).map_err(|error| {
        Error::os(format!("cannot use the listen address {listen}"), error)
            .hint("--listen takes an address of this host")
    })?;
    let connected = socket.connect(peer).and_then(|()| socket.local_addr());
    let local = connected.map_err(|error| {
        let (from, hint) = match listen.is_unspecified() {
            true => (String::new(), "check the address and this host's routes"),
            false => (
                format!(" from the listen address {listen}"),
                "check this host's routes; --listen takes the address of an interface toward the \
                 peers, or 0.0.0.0",
            ),
        };
        Error::os(format!("cannot reach peer {peer}{from}"), error).hint(hint)
    })?;
    Ok(local.ip())
}

/// A socket to send to `peer`, from a port that nobody knows, as the tunnel's sockets
/// would.
///
/// # Errors
/// When there is no descriptor left, or the source is not an address of this host.
pub(crate) fn bind_toward(source: Source, peer: SocketAddr) -> io::Result<UdpSocket> {
    let Source { listen, mark } = source;
    let any: IpAddr = match peer {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let from = if listen.is_unspecified() { any } else { listen };
    let socket = UdpSocket::bind((from, 0))?;
    if mark != 0 {
        SockRef::from(&socket).set_mark(mark)?;
    }
    Ok(socket)
}

/// That `peer`, which sockets on `listen` reach from the address `local`, is not
/// this process.
///
/// # Errors
/// When it is, names it.
pub(crate) fn check_other(listen: SocketAddr, peer: SocketAddr, local: IpAddr) -> Result<()> {
    if local != peer.ip() || listen.port() != peer.port() {
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
            &mut Netlink::open().unwrap(),
            Ipv4Addr::UNSPECIFIED.into(),
            "127.0.0.1:8285".parse().unwrap(),
        )
        .unwrap();
        assert_eq!(path.local, IpAddr::from(Ipv4Addr::LOCALHOST));
        assert!(path.mtu_bytes >= 1280);
    }

    #[test]
    fn what_is_not_a_hosts_address_is_not_an_answer() {
        for host in ["0.0.0.0", "::", "224.0.0.1", "ff02::1"] {
            let text = resolve(host, 1, None).unwrap_err().to_string();
            assert!(text.contains(host), "{text}");
        }
        assert!(resolve("127.0.0.1", 1, None).is_ok());
    }

    #[test]
    fn the_best_addresses_come_first() {
        let parse = |texts: &[&str]| -> Vec<SocketAddr> {
            texts.iter().map(|text| text.parse().unwrap()).collect()
        };
        let resolved = parse(&[
            "[fd00::1]:1",
            "10.0.0.2:1",
            "0.0.0.0:1",
            "10.0.0.1:1",
            "[::ffff:10.0.0.2]:1",
        ]);
        let all = |_: &SocketAddr| true;
        let v4_first = parse(&["10.0.0.2:1", "10.0.0.1:1", "[fd00::1]:1"]);
        assert_eq!(usable(&resolved, all, false), v4_first);
        assert_eq!(usable(&resolved, all, true)[0], resolved[0]);
        // One that cannot be reached is left out, unless none can.
        assert_eq!(usable(&resolved, SocketAddr::is_ipv6, false), [resolved[0]]);
        assert_eq!(usable(&resolved, |_| false, false), v4_first);
    }

    #[test]
    fn of_many_addresses_the_same_ones_are_kept_in_any_order() {
        let address = |last: u8| SocketAddr::from(([10, 0, 0, last], 1));
        let mut resolved: Vec<_> = (1..=40).map(address).collect();
        for _ in 0..resolved.len() {
            resolved.rotate_left(1);
            let mut kept = usable(&resolved, |_| true, false);
            let is_kept = |one: &&SocketAddr| kept.contains(one);
            let in_their_order: Vec<_> = resolved.iter().filter(is_kept).copied().collect();
            assert_eq!(kept, in_their_order);
            kept.sort();
            assert_eq!(kept, (1..=16).map(address).collect::<Vec<_>>());
        }
    }

    #[test]
    fn sockets_reach_the_families_that_they_are_for() {
        let [v4, v6] = ["127.0.0.1:1", "[::1]:1"].map(|text| text.parse().unwrap());
        let listen = |text: &str| Some(text.parse().unwrap());
        for dual_stack in [None, listen("::")] {
            assert!(is_reached(dual_stack, v4));
        }
        assert!(is_reached(listen("0.0.0.0"), v4));
        assert!(!is_reached(listen("0.0.0.0"), v6));
        assert!(!is_reached(listen("::1"), v4));
    }

    #[test]
    fn a_bad_name_is_one_clear_line() {
        let error = resolve("no-such-host.invalid", 1, None).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("no-such-host.invalid"), "{text}");
        assert!(!text.contains('\n'));
    }
}
