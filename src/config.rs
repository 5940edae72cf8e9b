//! Flags into one checked configuration.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;

use ipnet::IpNet;

use crate::cli::{Feature, Io, TunnelArgs};
use crate::device::link::{self, IPV4_MTU_BYTES_MIN, IPV6_MTU_BYTES_MIN};
use crate::error::{Error, Result};
use crate::packet::coalesce;
use crate::ring;
use crate::transport::path::{self, Path};
use crate::transport::{self, DEFAULT_PORT, socket};
use crate::worker::idle::BusyPoll;

/// Queues that are used unless more are asked for.
const QUEUES_DEFAULT_MAX: usize = 4;

/// All that a tunnel needs to know, resolved and checked.
#[derive(Clone, Debug)]
pub struct Config {
    /// Workers.
    pub queues: u16,
    /// Endpoints of the peers.
    pub peers: Vec<SocketAddr>,
    /// Address and port of the UDP sockets.
    pub listen: SocketAddr,
    /// Name of the TUN device.
    pub tun: String,
    /// MTU, addresses, routes and queue length of the TUN device.
    pub link: link::LinkConfig,
    /// Whether the address was derived rather than given.
    pub address_is_derived: bool,
    /// The peer's tunnel address, if this host could derive it too.
    pub peer_address: Option<IpAddr>,
    /// How long to look for arrivals without sleeping.
    pub busy_poll: BusyPoll,
    /// Cores to pin workers to, in turn.
    pub cores: Option<Vec<usize>>,
    /// The I/O engine asked for.
    pub io: Io,
    /// Kernel features to try.
    pub wanted: Wanted,
    /// Path of the operators' socket.
    pub control: PathBuf,
}

/// Kernel features to try.
#[derive(Clone, Copy, Debug)]
pub struct Wanted {
    /// On the TUN device.
    pub tun: coalesce::Offloads,
    /// On the UDP sockets.
    pub udp: socket::Offloads,
    /// In io_uring.
    pub uring: ring::Features,
}

impl Config {
    /// Checks the flags, resolves the peer, and asks the kernel for what was
    /// left open.
    ///
    /// # Errors
    /// One line that names the flag.
    pub fn from_args(args: &TunnelArgs) -> Result<Self> {
        let [peer] = &args.peer[..] else {
            return Err(
                Error::new("--peer was given more than once").hint("one peer is supported for now")
            );
        };
        let listen_ip = args.listen.map(|listen| listen.ip);
        let peer = path::resolve(&peer.host, peer.port, listen_ip)?;
        let listen = listen_address(args, &[peer])?;
        if peer.ip().is_unspecified() || peer.ip().is_multicast() {
            return Err(Error::new(format!("--peer {peer} is no address of a host")));
        }
        let path = path::discover(listen.ip(), peer)?;
        if path.local == peer.ip() && listen.port() == peer.port() {
            return Err(Error::new(format!("--peer {peer} is this host itself"))
                .hint("name the other host"));
        }
        let (addresses, peer_address) = if args.address.is_empty() {
            let (own, peer) = derive_addresses(path, peer)?;
            (vec![IpNet::from(own)], Some(IpAddr::V4(peer)))
        } else {
            (args.address.clone(), None)
        };
        let mtu_bytes = tunnel_mtu(args, path, peer, &addresses)?;
        Ok(Self {
            queues: args.queues.unwrap_or_else(default_queues),
            peers: vec![peer],
            listen,
            tun: args.tun.clone(),
            link: link::LinkConfig {
                addresses,
                routes: args.route.clone(),
                mtu_bytes,
                txqueuelen: args.txqueuelen,
            },
            address_is_derived: args.address.is_empty(),
            peer_address,
            busy_poll: args.busy_poll,
            cores: checked_cores(args)?,
            io: args.io,
            wanted: wanted(&args.without),
            control: args
                .control
                .clone()
                .unwrap_or_else(|| default_control_path(&args.tun)),
        })
    }
}

/// One family serves all peers: IPv4 alone, or else dual-stack.
fn listen_address(args: &TunnelArgs, peers: &[SocketAddr]) -> Result<SocketAddr> {
    let port = args.listen.map_or(DEFAULT_PORT, |listen| listen.port);
    let any_v6 = peers.iter().any(SocketAddr::is_ipv6);
    let ip = match args.listen.map(|listen| listen.ip) {
        Some(ip) if !ip.is_unspecified() => {
            if let Some(peer) = peers.iter().find(|peer| peer.is_ipv6() != ip.is_ipv6()) {
                return Err(Error::new(format!(
                    "--listen {ip} and --peer {peer} are of different IP versions"
                )));
            }
            ip
        }
        _ if any_v6 => Ipv6Addr::UNSPECIFIED.into(),
        _ => Ipv4Addr::UNSPECIFIED.into(),
    };
    Ok(SocketAddr::new(ip, port))
}

fn derive_addresses(path: Path, peer: SocketAddr) -> Result<(ipnet::Ipv4Net, Ipv4Addr)> {
    let own = link::derive_address(path.local)?;
    let far = link::derive_address(peer.ip())?;
    if own == far {
        return Err(Error::new(format!(
            "both {} and the peer {} would derive the tunnel address {}",
            path.local,
            peer.ip(),
            own.addr()
        ))
        .hint("give each host an --address"));
    }
    Ok((own, far.addr()))
}

fn tunnel_mtu(args: &TunnelArgs, path: Path, peer: SocketAddr, addresses: &[IpNet]) -> Result<u32> {
    let mtu_bytes = args
        .mtu
        .unwrap_or_else(|| default_mtu_bytes(path, peer.ip()));
    let wants_v6 = addresses
        .iter()
        .chain(&args.route)
        .find(|net| net.addr().is_ipv6());
    if let Some(net) = wants_v6.filter(|_| mtu_bytes < IPV6_MTU_BYTES_MIN) {
        return Err(Error::new(format!(
            "{net} needs an MTU of {IPV6_MTU_BYTES_MIN} for IPv6, and the tunnel's is {mtu_bytes}"
        ))
        .hint("give --mtu 1280: the kernel fragments what the path cannot carry"));
    }
    if mtu_bytes < IPV4_MTU_BYTES_MIN {
        return Err(Error::new(format!(
            "the path MTU to {peer} is {}: too small for a tunnel",
            path.mtu_bytes
        )));
    }
    Ok(mtu_bytes)
}

/// The TUN device's MTU on this path to `peer`.
pub(crate) fn default_mtu_bytes(path: Path, peer: IpAddr) -> u32 {
    // A loopback path has 65536: no datagram is that long.
    let datagram_bytes_max = path.mtu_bytes.min(65535);
    datagram_bytes_max.saturating_sub(transport::overhead_bytes(peer))
}

pub(crate) fn default_queues() -> u16 {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    cores.min(QUEUES_DEFAULT_MAX) as u16
}

fn checked_cores(args: &TunnelArgs) -> Result<Option<Vec<usize>>> {
    let Some(list) = &args.cores else {
        return Ok(None);
    };
    let available: Vec<usize> = core_affinity::get_core_ids()
        .unwrap_or_default()
        .iter()
        .map(|core| core.id)
        .collect();
    if let Some(missing) = list.0.iter().find(|core| !available.contains(core)) {
        return Err(
            Error::new(format!("--cores: core {missing} is not available"))
                .hint(format!("this process may use {available:?}")),
        );
    }
    Ok(Some(list.0.clone()))
}

fn wanted(without: &[Feature]) -> Wanted {
    let with = |feature| !without.contains(&feature);
    Wanted {
        tun: coalesce::Offloads {
            tcp: with(Feature::Tso),
            udp: with(Feature::Uso),
        },
        udp: socket::Offloads {
            segment: with(Feature::UdpSegment),
            gro: with(Feature::UdpGro),
        },
        uring: ring::Features {
            receive_multishot: with(Feature::RecvMultishot),
        },
    }
}

/// `/run/fastvpn/NAME.sock`; in another network namespace than that of the
/// first process also with the namespace's number, since `/run` may be shared
/// and the name is unique in its namespace only.
fn default_control_path(tun: &str) -> PathBuf {
    use std::os::unix::fs::MetadataExt;
    let inode = |path: &str| std::fs::metadata(path).map(|metadata| metadata.ino()).ok();
    let own = inode("/proc/self/ns/net");
    let name = match own {
        Some(own) if inode("/proc/1/ns/net") != Some(own) => format!("{tun}-{own}.sock"),
        _ => format!("{tun}.sock"),
    };
    PathBuf::from("/run/fastvpn").join(name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::Cli;
    use clap::Parser;

    fn config(flags: &str) -> Result<Config> {
        let words = std::iter::once("fastvpn").chain(flags.split_whitespace());
        let cli = Cli::try_parse_from(words).expect("flags that parse");
        Config::from_args(&cli.tunnel)
    }

    #[test]
    fn fills_in_what_was_left_open() {
        let config = config("--queues 3 --peer 127.0.1.9 --address 10.9.0.1/24").unwrap();
        assert_eq!(config.queues, 3);
        assert_eq!(config.peers, ["127.0.1.9:8285".parse().unwrap()]);
        assert_eq!(config.listen, "0.0.0.0:8285".parse().unwrap());
        assert_eq!(config.link.mtu_bytes, 65507);
        assert!(config.wanted.tun.udp && config.wanted.udp.gro);
        assert_eq!(config.io, Io::Auto);
    }

    #[test]
    fn names_the_flag_at_fault() {
        let text = |flags: &str| config(flags).unwrap_err().to_string();
        assert!(text("--peer 127.0.0.1 --listen 127.0.0.1").contains("this host itself"));
        assert!(text("--peer 127.0.0.2 --listen ::1").contains("--listen ::1"));
        assert!(text("--peer 0.0.0.0").contains("--peer 0.0.0.0"));
        let mtu = text("--peer 127.0.0.2 --mtu 1200 --address fd00::1/64");
        assert!(
            mtu.contains("fd00::1/64") && mtu.contains("--mtu 1280"),
            "{mtu}"
        );
        let cores = text("--peer 127.0.0.2 --address 10.9.0.1/24 --cores 4000");
        assert!(cores.contains("core 4000"), "{cores}");
    }

    #[test]
    fn leaves_out_what_it_is_told_to() {
        let flags = "--peer 127.0.0.2 --address 10.9.0.1/24 --without uso,udp-gro";
        let wanted = config(flags).unwrap().wanted;
        assert!(!wanted.tun.udp && !wanted.udp.gro);
        assert!(wanted.tun.tcp && wanted.udp.segment);
    }
}
