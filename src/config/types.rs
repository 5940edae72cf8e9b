//! What can be said of a tunnel: peers, addresses and choices, as types without
//! behaviour. They are below everything else.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use clap::ValueEnum;
use ipnet::IpNet;

use crate::log::LogFormat;

use crate::packet::ip::canonical;

/// Default UDP port, that of flannel's udp backend.
pub const DEFAULT_PORT: u16 = 8285;

/// How the workers do their I/O.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Io {
    /// By io_uring if the kernel has and allows it, else by epoll
    #[default]
    Auto,
    /// By io_uring (Linux 6.1), or not at all
    Uring,
    /// By epoll, which any kernel has and allows
    Epoll,
}

/// A kernel feature that can be left unused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Feature {
    /// TCP segmentation offload on the TUN device
    Tso,
    /// UDP segmentation offload on the TUN device
    Uso,
    /// UDP_SEGMENT on the UDP socket
    UdpSegment,
    /// UDP_GRO on the UDP socket
    UdpGro,
}

/// Kernel features to try.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// TCP segmentation offload on the TUN device.
    pub tso: bool,
    /// UDP segmentation offload on the TUN device.
    pub uso: bool,
    /// `UDP_SEGMENT` on the UDP sockets.
    pub udp_segment: bool,
    /// `UDP_GRO` on the UDP sockets.
    pub udp_gro: bool,
}

/// How long a worker looks for arrivals without sleeping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BusyPoll {
    /// Not at all.
    Off,
    /// As long as has lately been worth it.
    Auto,
    /// This long after the last arrival.
    For(Duration),
}

/// What to log, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Log {
    /// How much more than usual.
    pub verbose: u8,
    /// Warnings and errors alone.
    pub quiet: bool,
    /// Form of the lines.
    pub format: LogFormat,
}

/// What a peer is called: the host to resolve and the port, as they were given.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct PeerName {
    /// Address or DNS name.
    pub host: String,
    /// UDP port.
    pub port: u16,
}

impl PeerName {
    /// The address, if the host is one; `None` for a DNS name, and for an IPv6
    /// address with a zone, as in `fe80::1%eth0`, which the resolver reads.
    pub(crate) fn literal(&self) -> Option<SocketAddr> {
        let ip: IpAddr = self.host.parse().ok()?;
        Some(canonical(SocketAddr::new(ip, self.port)))
    }

    /// Whether both say the same, though perhaps in other words: the case of a
    /// DNS name and the dot behind it do not matter (RFC 4343, RFC 1034), nor
    /// how an address is written.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        self.key() == other.key()
    }

    /// Equal if and only if [`Self::is_same`].
    pub(crate) fn key(&self) -> (String, u16) {
        let host = match self.literal() {
            Some(address) => address.ip().to_string(),
            None => {
                let name = self.host.strip_suffix('.').unwrap_or(&self.host);
                name.to_ascii_lowercase()
            }
        };
        (host, self.port)
    }
}

impl fmt::Display for PeerName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

/// A peer, and what lies behind it. Its text is `HOST:PORT[=PREFIX[,PREFIX…]]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerSpec {
    /// Where its datagrams go.
    pub name: PeerName,
    /// Inner addresses that it has; none for whatever no peer's prefixes match.
    pub prefixes: Vec<IpNet>,
}

impl fmt::Display for PeerSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.name.fmt(f)?;
        for (index, prefix) in self.prefixes.iter().enumerate() {
            let separator = if index == 0 { '=' } else { ',' };
            write!(f, "{separator}{prefix}")?;
        }
        Ok(())
    }
}

/// Where to listen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Listen {
    /// Address of this host, 0.0.0.0 for all of its IPv4 addresses, or :: for all
    /// that it has.
    pub ip: IpAddr,
    /// UDP port.
    pub port: u16,
}

/// Core numbers, in the order of the workers that get them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CoreList(pub Vec<usize>);

#[cfg(test)]
mod tests {
    use super::super::parse::parse_peer_name;

    #[test]
    fn tells_names_from_addresses() {
        let endpoint = |text: &str| parse_peer_name(text).unwrap();
        for name in ["vpn.example.org", "fe80::1%eth0"] {
            assert_eq!(endpoint(name).literal(), None, "{name}");
        }
        assert_eq!(
            endpoint("::ffff:10.0.0.1").literal(),
            "10.0.0.1:8285".parse().ok()
        );
        assert!(endpoint("fd00::0:1").is_same(&endpoint("[fd00::1]:8285")));
        assert!(endpoint("VPN.example.").is_same(&endpoint("vpn.example")));
        assert!(!endpoint("vpn.example:1").is_same(&endpoint("vpn.example:2")));
    }
}
