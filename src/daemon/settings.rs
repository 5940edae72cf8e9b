//! What a tunnel runs with: what its configuration says, and what follows from
//! the paths to its peers for what that leaves open.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};

use ipnet::IpNet;

use crate::config::{Config, DEFAULT_PORT, PeerName};
use crate::error::{Error, Result};
use crate::host::link::{self, IPV4_MTU_BYTES_MIN, IPV6_MTU_BYTES_MIN};
use crate::host::netlink::Netlink;
use crate::host::path::{self, Path};
use crate::wire;

/// What a tunnel runs with.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Address and port of the UDP sockets.
    pub listen: SocketAddr,
    /// MTU, addresses and queue length of the TUN device.
    pub link: link::LinkConfig,
    /// Whether the address was derived rather than given.
    pub address_is_derived: bool,
    /// The tunnel address of the one peer, if this host could derive it too.
    pub peer_address: Option<IpAddr>,
}

impl Settings {
    /// The settings of a tunnel that starts. `endpoints`: of the peers whose names
    /// resolve now. Tells also why some of these cannot be reached.
    ///
    /// # Errors
    /// When a peer is this host, when none can be reached
    /// though some resolve, or when something that has no default without a
    /// reachable peer was not given.
    pub fn at_start(
        config: &Config,
        endpoints: &[SocketAddr],
        netlink: &mut Netlink,
    ) -> Result<(Self, Vec<Error>)> {
        let listen = listen_address(config, endpoints)?;
        let (paths, mut unreachable) = paths(listen, endpoints, netlink)?;
        if paths.is_empty() && !unreachable.is_empty() {
            return Err(unreachable.swap_remove(0));
        }
        let prefixes = config.peers.iter().flat_map(|peer| &peer.prefixes);
        let settings = Self::new(config, listen, &paths, prefixes.copied(), None)?;
        Ok((settings, unreachable))
    }

    /// The settings once `config` takes the place of the `old` one in a tunnel that
    /// runs. What both say alike stays as it is; but an MTU that is left open
    /// follows the routes to the peers, as long as there are any and it is not too
    /// small. `prefixes`: what will be behind all peers.
    ///
    /// # Errors
    /// When something is left open from now on and no peer can be reached, or when
    /// the MTU is too small for what is inside.
    pub fn again(
        &self,
        (old, config): (&Config, &Config),
        endpoints: &[SocketAddr],
        prefixes: impl Iterator<Item = IpNet>,
        netlink: &mut Netlink,
    ) -> Result<Self> {
        let is_left_open = config.mtu_bytes.is_none() || config.addresses.is_empty();
        let (paths, mut unreachable) = match is_left_open {
            true => paths(self.listen, endpoints, netlink)?,
            false => Default::default(),
        };
        let keeps_addresses = config.addresses == old.addresses;
        let derives_address = !keeps_addresses && config.addresses.is_empty();
        let derives_mtu = old.mtu_bytes.is_some() && config.mtu_bytes.is_none();
        if (derives_address || derives_mtu) && paths.is_empty() && !unreachable.is_empty() {
            return Err(unreachable.swap_remove(0));
        }
        let in_force = Some((self, keeps_addresses));
        Self::new(config, self.listen, &paths, prefixes, in_force)
    }

    /// `in_force`: the settings in force, if there are any, and whether their
    /// addresses stay.
    fn new(
        config: &Config,
        listen: SocketAddr,
        paths: &[(SocketAddr, Path)],
        prefixes: impl Iterator<Item = IpNet>,
        in_force: Option<(&Self, bool)>,
    ) -> Result<Self> {
        let (addresses, peer_address) = match in_force {
            Some((old, true)) => (old.link.addresses.clone(), old.peer_address),
            _ if config.addresses.is_empty() => derived_address(config, paths)?,
            _ => (config.addresses.clone(), None),
        };
        let given = addresses.iter().chain(&config.routes).copied();
        let inside: Vec<IpNet> = given.chain(prefixes).collect();
        let mut mtu_bytes = tunnel_mtu_bytes(config, listen, paths);
        if let (Some((old, _)), None) = (in_force, config.mtu_bytes) {
            let is_usable =
                |mtu_bytes: &u32| check_ipv6_mtu(*mtu_bytes, inside.iter().copied()).is_ok();
            let of_paths = mtu_bytes
                .ok()
                .filter(|_| !paths.is_empty())
                .filter(is_usable);
            mtu_bytes = Ok(of_paths.unwrap_or(old.link.mtu_bytes));
        }
        let mtu_bytes = mtu_bytes?;
        check_ipv6_mtu(mtu_bytes, inside.iter().copied())?;
        Ok(Self {
            listen,
            link: link::LinkConfig {
                addresses,
                mtu_bytes,
                txqueuelen: config.txqueuelen,
            },
            address_is_derived: config.addresses.is_empty(),
            peer_address,
        })
    }
}

/// What was given, and no other: peers of the other family may come later,
/// or are not wanted. Else IPv4 alone if no peer has another address, or may
/// have one some day, or else dual-stack.
fn listen_address(config: &Config, endpoints: &[SocketAddr]) -> Result<SocketAddr> {
    let Some(listen) = config.listen else {
        let ip = match needs_dual_stack(config, endpoints) {
            true => Ipv6Addr::UNSPECIFIED.into(),
            false => Ipv4Addr::UNSPECIFIED.into(),
        };
        return Ok(SocketAddr::new(ip, DEFAULT_PORT));
    };
    let ip = listen.ip();
    let is_dual_stack = ip == Ipv6Addr::UNSPECIFIED;
    let other_family = endpoints.iter().find(|peer| peer.is_ipv6() != ip.is_ipv6());
    if let Some(peer) = other_family.filter(|_| !is_dual_stack) {
        return Err(Error::new(format!(
            "--listen {ip} and peer {peer} are of different IP versions"
        ))
        .hint("--listen [::] takes both"));
    }
    Ok(listen)
}

fn needs_dual_stack(config: &Config, endpoints: &[SocketAddr]) -> bool {
    if endpoints.iter().any(SocketAddr::is_ipv6) {
        return true;
    }
    let is_ipv4 = |endpoint: &PeerName| endpoint.literal().is_some_and(|peer| peer.is_ipv4());
    let ipv4_for_good = config.peers.iter().all(|peer| is_ipv4(&peer.name));
    // A host without IPv6 still has its IPv4 peers.
    (config.peers.is_empty() || !ipv4_for_good)
        && UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0)).is_ok()
}

/// The address of who reaches the first peer, and what that peer would make
/// of its own if it is the only one.
fn derived_address(
    config: &Config,
    paths: &[(SocketAddr, Path)],
) -> Result<(Vec<IpNet>, Option<IpAddr>)> {
    let Some(&(first, path)) = paths.first() else {
        return Err(no_address(config));
    };
    let own = link::derive_address(path.local)?;
    let is_only = config.peers.len() == 1;
    for &(peer, _) in paths {
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
    let peer_address = match is_only {
        true => Some(link::derive_address(first.ip())?.addr().into()),
        false => None,
    };
    Ok((vec![own.into()], peer_address))
}

fn no_address(config: &Config) -> Error {
    match &config.peers[..] {
        [] => Error::new("there is no --peer to derive a tunnel address from")
            .hint("name the other host with --peer, or give this host's --address"),
        [peer] => Error::new(format!("cannot resolve peer {}", peer.name.host))
            .hint("check the name; given an --address, the tunnel starts and tries again"),
        [first, ..] => Error::new(format!(
            "cannot resolve peer {}, nor any of the other {}",
            first.name.host,
            config.peers.len() - 1
        ))
        .hint("check the names; given an --address, the tunnel starts and tries again"),
    }
}

/// What was given, or as large as the smallest path lets it be.
fn tunnel_mtu_bytes(
    config: &Config,
    listen: SocketAddr,
    paths: &[(SocketAddr, Path)],
) -> Result<u32> {
    let of_path = |&(peer, path): &(SocketAddr, Path)| default_mtu_bytes(path, peer.ip());
    let smallest = paths.iter().min_by_key(|path| of_path(path));
    let mtu_bytes = config.mtu_bytes.unwrap_or_else(|| match smallest {
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

/// Peers' addresses with the paths there.
type Paths = Vec<(SocketAddr, Path)>;

/// The paths to the peers that can be reached, and why the others cannot.
fn paths(
    listen: SocketAddr,
    endpoints: &[SocketAddr],
    netlink: &mut Netlink,
) -> Result<(Paths, Vec<Error>)> {
    let mut paths = Vec::new();
    let mut unreachable = Vec::new();
    for &peer in endpoints {
        match path::discover(netlink, listen.ip(), peer) {
            Ok(path) => {
                path::check_other(listen, peer, path.local)?;
                paths.push((peer, path));
            }
            Err(error) => unreachable.push(error),
        }
    }
    Ok((paths, unreachable))
}

/// The TUN device's MTU on this path to `peer`.
pub(crate) fn default_mtu_bytes(path: Path, peer: IpAddr) -> u32 {
    // A loopback path has 65536: no datagram is that long.
    let datagram_bytes_max = path.mtu_bytes.min(65535);
    datagram_bytes_max.saturating_sub(wire::overhead_bytes(peer))
}

#[cfg(test)]
#[path = "settings_tests.rs"]
mod tests;
