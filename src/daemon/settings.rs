//! What a tunnel runs with: what its configuration says, and what follows from
//! the paths to its peers for what that leaves open.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};

use ipnet::{IpNet, Ipv4Net};

use crate::config::{Config, DEFAULT_PORT, HostPort, PeerSpec};
use crate::error::{Error, Result};
use crate::host::link::{self, IPV4_MTU_BYTES_MIN, IPV6_MTU_BYTES_MIN, LinkConfig};
use crate::host::netlink::Netlink;
use crate::host::path::{self, Path, Source};
use crate::routing::overlay::Overlay;
use crate::wire::Mode;

/// What a tunnel runs with.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Address and port of the UDP sockets.
    pub listen: SocketAddr,
    /// MTU, addresses and queue length of the TUN device.
    pub link: LinkConfig,
}

impl Settings {
    /// The settings of a tunnel that starts. `endpoints`: of the configured peers whose
    /// names resolve now. `prefixes`: those of all peers. Tells also why some of the
    /// peers cannot be reached.
    ///
    /// # Errors
    /// When a peer is this host, when none can be reached
    /// though some resolve, or when something that has no default without a
    /// reachable peer was not given.
    pub fn at_start(
        config: &Config,
        endpoints: &[SocketAddr],
        prefixes: impl Iterator<Item = IpNet>,
        netlink: &mut Netlink,
    ) -> Result<(Self, Vec<Error>)> {
        let listen = listen_address(config, endpoints);
        let (paths, unreachable) = paths(listen, endpoints, netlink)?;
        let given = (&config.addresses[..], config.mtu_bytes);
        let link = link_config(config, given, listen, &paths, prefixes)?;
        Ok((Self { listen, link }, unreachable))
    }

    /// The settings once `config` takes the place of the `old` one in a tunnel that
    /// runs, with the peers of `overlay`. What both say alike stays as it is; but an MTU
    /// that is left open follows the routes to the peers, as long as there are any and
    /// it is not too small.
    ///
    /// # Errors
    /// When something is left open from now on and no peer can be reached, or when
    /// the MTU is too small for what is inside.
    pub fn again(
        &self,
        (old, config): (&Config, &Config),
        overlay: &Overlay,
        netlink: &mut Netlink,
    ) -> Result<Self> {
        let listen = self.listen;
        let addresses = match config.addresses == old.addresses {
            true => &self.link.addresses[..],
            false => &config.addresses[..],
        };
        let is_open = addresses.is_empty() || config.mtu_bytes.is_none();
        let was_open = !addresses.is_empty() && old.mtu_bytes.is_none();
        let endpoints = endpoints(config, overlay);
        let paths = match is_open.then(|| paths(listen, &endpoints, netlink)) {
            Some(Err(error)) if !was_open => return Err(error),
            Some(Ok((paths, _))) => paths,
            _ => Vec::new(),
        };
        let in_force = Some(self.link.mtu_bytes);
        let given = config.mtu_bytes.or(in_force.filter(|_| paths.is_empty()));
        let with_mtu = |mtu_bytes| {
            let prefixes = overlay.prefixes().map(|(prefix, ..)| prefix);
            link_config(config, (addresses, mtu_bytes), listen, &paths, prefixes)
        };
        let link = with_mtu(given).or_else(|_| with_mtu(given.or(in_force)))?;
        Ok(Self { listen, link })
    }
}

/// Endpoints of the configured peers that have one, in the order of the
/// configuration.
pub fn endpoints(config: &Config, overlay: &Overlay) -> Vec<SocketAddr> {
    let peers = config.peers.iter();
    peers
        .filter_map(|spec| overlay.find(&spec.name)?.1.endpoint_in_use())
        .collect()
}

/// The address that this host's peers know it by.
///
/// # Errors
/// When no peer can be reached, or when they are reached from several addresses.
pub fn own_identity(source: Source, endpoints: &[SocketAddr]) -> Result<IpAddr> {
    let locals = endpoints.iter();
    let locals: BTreeSet<_> = locals
        .filter_map(|&peer| path::local_address(source, peer).ok())
        .collect();
    let mut all = locals.iter();
    let what = match (all.next(), all.next()) {
        (Some(only), None) => return Ok(*only),
        (Some(one), Some(other)) => {
            format!("peers know this host by {one} and by {other}, so its identity is not clear")
        }
        (None, _) => "cannot tell this host's identity while no peer can be reached".into(),
    };
    Err(Error::new(what).hint("give it one with --identity, and in its entry at each peer"))
}

/// The settings of the device. Without a given address or MTU they follow from the
/// paths to the peers.
fn link_config(
    config: &Config,
    (addresses, mtu_bytes): (&[IpNet], Option<u32>),
    listen: SocketAddr,
    paths: &[(SocketAddr, Path)],
    prefixes: impl Iterator<Item = IpNet>,
) -> Result<LinkConfig> {
    let addresses = match addresses {
        // Others give it some.
        [] if config.interface.is_some() => Vec::new(),
        [] => vec![derived_address(paths)?.into()],
        given => given.to_vec(),
    };
    let mtu_bytes = match mtu_bytes {
        Some(given) => given,
        None => tunnel_mtu_bytes(config.mode(), listen, paths)?,
    };
    let inside = addresses.iter().chain(&config.routes).copied();
    check_ipv6_mtu(mtu_bytes, inside.chain(prefixes))?;
    Ok(LinkConfig {
        addresses,
        mtu_bytes,
        txqueuelen: config.txqueuelen,
    })
}

/// What was given, and no other: peers of the other family may come later,
/// or are not wanted. Else IPv4 alone if no peer has another address, or may
/// have one some day, or else dual-stack.
pub(crate) fn listen_address(config: &Config, endpoints: &[SocketAddr]) -> SocketAddr {
    if let Some(listen) = config.listen {
        return listen;
    }
    let is_v4 = |peer: &PeerSpec| {
        let literal = peer.endpoint.as_ref().and_then(HostPort::literal);
        literal.is_some_and(|endpoint| endpoint.is_ipv4())
    };
    let may_be_v6 = config.peers.is_empty() || !config.peers.iter().all(is_v4);
    let port = config.listen_port.unwrap_or(DEFAULT_PORT);
    // A host without IPv6 still has its IPv4 peers.
    let is_dual_stack = endpoints.iter().any(SocketAddr::is_ipv6)
        || may_be_v6 && UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0)).is_ok();
    match is_dual_stack {
        true => (Ipv6Addr::UNSPECIFIED, port).into(),
        false => (Ipv4Addr::UNSPECIFIED, port).into(),
    }
}

/// The tunnel address of the host that reaches the first peer.
fn derived_address(paths: &[(SocketAddr, Path)]) -> Result<Ipv4Net> {
    let Some((_, path)) = paths.first() else {
        let what = "cannot derive a tunnel address without a peer";
        return Err(
            Error::new(what).hint("name the other host with --peer, or give this host's --address")
        );
    };
    let own = link::derive_address(path.local)?;
    let derives_same = |(peer, _): &&(SocketAddr, Path)| {
        link::derive_address(peer.ip()).is_ok_and(|far| far == own)
    };
    if let Some((peer, _)) = paths.iter().find(derives_same) {
        return Err(Error::new(format!(
            "both {} and the peer {} would derive the tunnel address {}",
            path.local,
            peer.ip(),
            own.addr()
        ))
        .hint("give each host an --address"));
    }
    Ok(own)
}

/// As large as the smallest path lets the TUN device's MTU be.
fn tunnel_mtu_bytes(mode: Mode, listen: SocketAddr, paths: &[(SocketAddr, Path)]) -> Result<u32> {
    let of_path = |(peer, path): &(SocketAddr, Path)| default_mtu_bytes(mode, *path, peer.ip());
    let Some(smallest) = paths.iter().min_by_key(|path| of_path(path)) else {
        return Ok(path::MTU_BYTES_DEFAULT - overhead_bytes(mode, listen.ip()));
    };
    let mtu_bytes = of_path(smallest);
    if mtu_bytes < IPV4_MTU_BYTES_MIN {
        let (peer, path) = smallest;
        return Err(Error::new(format!(
            "the path MTU to {peer} is {}: too small for a tunnel",
            path.mtu_bytes
        )));
    }
    Ok(mtu_bytes)
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
///
/// # Errors
/// When none can be reached, or a peer is this host.
fn paths(
    listen: SocketAddr,
    endpoints: &[SocketAddr],
    netlink: &mut Netlink,
) -> Result<(Paths, Vec<Error>)> {
    let (mut paths, mut unreachable) = (Vec::new(), Vec::new());
    for &peer in endpoints {
        match path::discover(netlink, listen.ip(), peer) {
            Ok(path) => {
                path::check_other(listen, peer, path.local)?;
                paths.push((peer, path));
            }
            Err(error) => unreachable.push(error),
        }
    }
    match paths.is_empty() && !unreachable.is_empty() {
        true => Err(unreachable.swap_remove(0)),
        false => Ok((paths, unreachable)),
    }
}

/// Bytes that datagrams to `peer` take besides the packet inside. A peer with a key may
/// roam from IPv4 to IPv6, so that IPv6's are left in any case, as by wg-quick(8).
fn overhead_bytes(mode: Mode, peer: IpAddr) -> u32 {
    match mode {
        Mode::Plain => mode.overhead_bytes(peer),
        Mode::WireGuard => mode.overhead_bytes(Ipv6Addr::UNSPECIFIED.into()),
    }
}

/// The TUN device's MTU on this path to `peer`.
pub(crate) fn default_mtu_bytes(mode: Mode, path: Path, peer: IpAddr) -> u32 {
    // A loopback path has 65536: no datagram is that long.
    let datagram_bytes_max = path.mtu_bytes.min(65535);
    datagram_bytes_max.saturating_sub(overhead_bytes(mode, peer))
}

#[cfg(test)]
#[path = "settings_tests.rs"]
mod tests;
