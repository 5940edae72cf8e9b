//! What follows from the peers that can be reached now: where to listen, and
//! the TUN device's address and MTU.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};

use ipnet::IpNet;

use super::Config;
use super::DEFAULT_PORT;
use crate::config::{Listen, PeerName};
use crate::error::{Error, Result};
use crate::host::link::{self, IPV4_MTU_BYTES_MIN, IPV6_MTU_BYTES_MIN};
use crate::host::netlink::Netlink;
use crate::host::path::{self, Path};
use crate::wire;

/// What was left open in a [`Config`], for as long as the process runs.
#[derive(Debug)]
pub struct Settled {
    /// Address and port of the UDP sockets.
    pub listen: SocketAddr,
    /// MTU, addresses, routes and queue length of the TUN device. The peers'
    /// prefixes are not among the routes.
    pub link: link::LinkConfig,
    /// Whether the address was derived rather than given.
    pub address_is_derived: bool,
    /// The tunnel address of the one peer, if this host could derive it too.
    pub peer_address: Option<IpAddr>,
    /// Why some peers could not be reached, when others could.
    pub unreachable: Vec<Error>,
}

impl Config {
    /// Asks the kernel for what was left open. `resolved`: the endpoints of the
    /// peers whose names resolve now.
    ///
    /// # Errors
    /// When a peer is this host or no host at all, when none can be reached
    /// though some resolve, or when something that has no default without a
    /// reachable peer was not given.
    pub fn settle(&self, resolved: &[SocketAddr]) -> Result<Settled> {
        let listen = self.listen_address(resolved)?;
        let no_host = |peer: &&SocketAddr| peer.ip().is_unspecified() || peer.ip().is_multicast();
        if let Some(peer) = resolved.iter().find(no_host) {
            return Err(Error::new(format!("peer {peer} is no address of a host")));
        }
        let (paths, unreachable) = paths(listen, resolved)?;
        let (addresses, peer_address) = if self.addresses.is_empty() {
            self.derived_address(&paths)?
        } else {
            (self.addresses.clone(), None)
        };
        let mtu_bytes = self.tunnel_mtu_bytes(listen, &paths)?;
        let prefixes = self.peers.iter().flat_map(|peer| &peer.prefixes);
        let inside = addresses.iter().chain(&self.routes).chain(prefixes);
        check_ipv6_mtu(mtu_bytes, inside.copied())?;
        Ok(Settled {
            listen,
            link: link::LinkConfig {
                addresses,
                routes: self.routes.clone(),
                mtu_bytes,
                txqueuelen: self.txqueuelen,
            },
            address_is_derived: self.addresses.is_empty(),
            peer_address,
            unreachable,
        })
    }

    /// The device's settings once this configuration, read again, takes `old`'s
    /// place in a tunnel that runs. What both say alike stays as it is
    /// `in_force`; what is left open now is asked of the kernel as at a start.
    /// `resolved`: the endpoints of this configuration's peers; `prefixes`: what
    /// will be behind all peers. An MTU that both leave open follows the routes to
    /// the peers, as long as there are any and it is not too small.
    ///
    /// # Errors
    /// When something was left open and none of the peers that resolve can be
    /// reached, or when the MTU is too small for what is inside.
    pub fn settle_again(
        &self,
        old: &Self,
        in_force: &Settled,
        resolved: &[SocketAddr],
        prefixes: impl Iterator<Item = IpNet>,
    ) -> Result<link::LinkConfig> {
        let (is_same_mtu, is_same_address) = (
            self.mtu_bytes == old.mtu_bytes,
            self.addresses == old.addresses,
        );
        let derives_mtu = !is_same_mtu && self.mtu_bytes.is_none();
        let derives_address = !is_same_address && self.addresses.is_empty();
        let follows_routes = is_same_mtu && self.mtu_bytes.is_none();
        let (paths, _) = match derives_mtu || derives_address {
            true => paths(in_force.listen, resolved)?,
            false if follows_routes => paths(in_force.listen, resolved).unwrap_or_default(),
            false => Default::default(),
        };
        let addresses = match derives_address {
            _ if is_same_address => in_force.link.addresses.clone(),
            true => self.derived_address(&paths)?.0,
            false => self.addresses.clone(),
        };
        let given = addresses.iter().chain(&self.routes).copied();
        let inside: Vec<_> = given.chain(prefixes).collect();
        let is_usable =
            |mtu_bytes: &u32| check_ipv6_mtu(*mtu_bytes, inside.iter().copied()).is_ok();
        let mtu_bytes = match is_same_mtu {
            true if follows_routes && !paths.is_empty() => {
                let now = self.tunnel_mtu_bytes(in_force.listen, &paths);
                now.ok()
                    .filter(is_usable)
                    .unwrap_or(in_force.link.mtu_bytes)
            }
            true => in_force.link.mtu_bytes,
            false => self.tunnel_mtu_bytes(in_force.listen, &paths)?,
        };
        check_ipv6_mtu(mtu_bytes, inside.iter().copied())?;
        Ok(link::LinkConfig {
            addresses,
            routes: self.routes.clone(),
            mtu_bytes,
            txqueuelen: self.txqueuelen,
        })
    }

    /// What was given, and no other: peers of the other family may come later,
    /// or are not wanted. Else IPv4 alone if no peer has another address, or may
    /// have one some day, or else dual-stack.
    fn listen_address(&self, resolved: &[SocketAddr]) -> Result<SocketAddr> {
        let Some(Listen { ip, port }) = self.listen else {
            let ip = match self.needs_dual_stack(resolved) {
                true => Ipv6Addr::UNSPECIFIED.into(),
                false => Ipv4Addr::UNSPECIFIED.into(),
            };
            return Ok(SocketAddr::new(ip, DEFAULT_PORT));
        };
        let is_dual_stack = ip == Ipv6Addr::UNSPECIFIED;
        let other_family = resolved.iter().find(|peer| peer.is_ipv6() != ip.is_ipv6());
        if let Some(peer) = other_family.filter(|_| !is_dual_stack) {
            return Err(Error::new(format!(
                "--listen {ip} and peer {peer} are of different IP versions"
            ))
            .hint("--listen [::] takes both"));
        }
        Ok(SocketAddr::new(ip, port))
    }

    fn needs_dual_stack(&self, resolved: &[SocketAddr]) -> bool {
        if resolved.iter().any(SocketAddr::is_ipv6) {
            return true;
        }
        let is_ipv4 = |name: &PeerName| name.literal().is_some_and(|peer| peer.is_ipv4());
        let ipv4_for_good = self.peers.iter().all(|peer| is_ipv4(&peer.name));
        // A host without IPv6 still has its IPv4 peers.
        (self.peers.is_empty() || !ipv4_for_good)
            && UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0)).is_ok()
    }

    /// The address of who reaches the first peer, and what that peer would make
    /// of its own if it is the only one.
    fn derived_address(
        &self,
        paths: &[(SocketAddr, Path)],
    ) -> Result<(Vec<IpNet>, Option<IpAddr>)> {
        let Some(&(first, path)) = paths.first() else {
            return Err(self.no_address());
        };
        let own = link::derive_address(path.local)?;
        for &(peer, _) in paths {
            let is_only = self.peers.len() == 1;
            let far = match link::derive_address(peer.ip()) {
                Ok(far) => far,
                Err(error) if is_only => return Err(error),
                // It must have been given one, as others may have been.
                Err(_) => continue,
            };
            if own == far {
                return Err(Error::new(format!(
                    "both {} and the peer {} would derive the tunnel address {}",
                    path.local,
                    peer.ip(),
                    own.addr()
                ))
                .hint("give each host an --address"));
            }
        }
        let peer_address = match self.peers.len() {
            1 => Some(link::derive_address(first.ip())?.addr().into()),
            _ => None,
        };
        Ok((vec![own.into()], peer_address))
    }

    fn no_address(&self) -> Error {
        match &self.peers[..] {
            [] => Error::new("there is no --peer to derive a tunnel address from")
                .hint("name the other host with --peer, or give this host's --address"),
            [peer] => Error::new(format!("cannot resolve peer {}", peer.name.host))
                .hint("check the name; given an --address, the tunnel starts and tries again"),
            [first, ..] => Error::new(format!(
                "cannot resolve peer {}, nor any of the other {}",
                first.name.host,
                self.peers.len() - 1
            ))
            .hint("check the names; given an --address, the tunnel starts and tries again"),
        }
    }

    /// What was given, or as large as the smallest path lets it be.
    fn tunnel_mtu_bytes(&self, listen: SocketAddr, paths: &[(SocketAddr, Path)]) -> Result<u32> {
        let of_path = |&(peer, path): &(SocketAddr, Path)| default_mtu_bytes(path, peer.ip());
        let smallest = paths.iter().min_by_key(|path| of_path(path));
        let mtu_bytes = self.mtu_bytes.unwrap_or_else(|| match smallest {
            Some(smallest) => of_path(smallest),
            None => path::MTU_BYTES_DEFAULT - wire::overhead_bytes(listen.ip()),
        });
        match smallest {
            Some((peer, path)) if mtu_bytes < IPV4_MTU_BYTES_MIN => Err(Error::new(format!(
                "the path MTU to {peer} is {}: too small for a tunnel",
                path.mtu_bytes
            ))),
            _ => Ok(mtu_bytes),
        }
    }
}

/// Makes sure that IPv6 works with the MTU if it is `inside` the tunnel: a device
/// with a smaller one has no IPv6 addresses and routes.
///
/// # Errors
/// Names an IPv6 address or prefix, and the MTU.
pub fn check_ipv6_mtu(mtu_bytes: u32, inside: impl IntoIterator<Item = IpNet>) -> Result<()> {
    if mtu_bytes >= IPV6_MTU_BYTES_MIN {
        return Ok(());
    }
    let mut inside = inside.into_iter();
    let Some(net) = inside.find(|net| net.addr().is_ipv6()) else {
        return Ok(());
    };
    Err(Error::new(format!(
        "{net} needs an MTU of {IPV6_MTU_BYTES_MIN} for IPv6, and the tunnel's is {mtu_bytes}"
    ))
    .hint("give --mtu 1280: the kernel fragments what the path cannot carry"))
}

/// The paths to those that can be reached, and why the others cannot.
#[expect(clippy::type_complexity, reason = "two lists that belong together")]
fn paths(
    listen: SocketAddr,
    resolved: &[SocketAddr],
) -> Result<(Vec<(SocketAddr, Path)>, Vec<Error>)> {
    let mut netlink = Netlink::open()?;
    let mut paths = Vec::new();
    let mut unreachable = Vec::new();
    for &peer in resolved {
        match path::discover(&mut netlink, listen.ip(), peer) {
            Ok(path) => {
                path::check_other(listen, peer, path.local)?;
                paths.push((peer, path));
            }
            Err(error) => unreachable.push(error),
        }
    }
    if paths.is_empty() && !unreachable.is_empty() {
        return Err(unreachable.swap_remove(0));
    }
    Ok((paths, unreachable))
}

/// The TUN device's MTU on this path to `peer`.
pub(crate) fn default_mtu_bytes(path: Path, peer: IpAddr) -> u32 {
    // A loopback path has 65536: no datagram is that long.
    let datagram_bytes_max = path.mtu_bytes.min(65535);
    datagram_bytes_max.saturating_sub(wire::overhead_bytes(peer))
}
