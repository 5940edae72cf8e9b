//! The command line.
//!
//! The tunnel's flags have no defaults here, so that it shows which were given:
//! what is left open may come from the configuration file, and
//! [`crate::config`] fills in the rest.

pub mod client;
pub(crate) mod parse;

use std::ffi::OsString;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;

use clap::{ArgAction, Args, Parser, Subcommand, ValueEnum, value_parser};
use ipnet::IpNet;

use crate::transport;
use crate::worker::idle::BusyPoll;
use parse::{
    parse_address, parse_busy_poll, parse_listen, parse_peer, parse_route, parse_tun_name,
};
pub(crate) use parse::{parse_cores, parse_endpoint};

/// Name of the TUN device unless another is given.
pub const TUN_NAME_DEFAULT: &str = "fastvpn0";

/// Values of `--mtu`, in bytes: from what IPv4 asks for (RFC 791) to what fits a
/// UDP datagram.
pub(crate) const MTU_BYTES_MIN: u32 = 68;
pub(crate) const MTU_BYTES_MAX: u32 = 65507;

/// Most packets that `--txqueuelen` takes.
pub(crate) const TXQUEUELEN_MAX: u32 = 100_000;

/// Most workers: the kernel's `MAX_TAP_QUEUES` (`linux/if_tun.h`).
pub(crate) const QUEUES_MAX: u16 = transport::steering::WORKERS_MAX;

/// A fast userspace network tunnel: IP packets in plain UDP datagrams.
///
/// Run it the same way on both hosts, each naming the other, as in
/// `fastvpn --queues 4 --peer 10.211.55.123:8285`.
#[derive(Debug, Parser)]
#[command(
    version,
    args_conflicts_with_subcommands = true,
    arg_required_else_help = true
)]
pub struct Cli {
    /// What to do other than run a tunnel.
    #[command(subcommand)]
    pub command: Option<Command>,

    /// The tunnel's options.
    #[command(flatten)]
    pub tunnel: TunnelArgs,
}

impl Cli {
    /// What the process was started with. Ends it where that is wrong, or asks for
    /// help or the version.
    pub fn from_command_line() -> Self {
        Self::parse_from(without_help_of_help(std::env::args_os().collect()))
    }
}

/// `fastvpn help --help`, also of a subcommand's `help`, is as good as without the
/// flag, which clap does not know there.
fn without_help_of_help(mut words: Vec<OsString>) -> Vec<OsString> {
    let is_flag = |word: &OsString| word.as_encoded_bytes().starts_with(b"-");
    let first_flag = words.iter().position(is_flag).unwrap_or(words.len());
    let asks = words
        .get(first_flag)
        .is_some_and(|flag| flag == "--help" || flag == "-h");
    if asks && first_flag > 1 && words[first_flag - 1] == "help" {
        words.remove(first_flag);
    }
    words
}

/// What to do other than run a tunnel.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Show a tunnel at work between two network namespaces of this machine
    Demo(crate::demo::DemoOptions),
    /// Say what this host offers a tunnel, what is missing, and how to mend it
    Check(crate::check::CheckOptions),
    /// Ask a running tunnel, or tell it something.
    #[command(flatten)]
    Client(client::ClientCommand),
}

/// The tunnel's options, as given: on the command line or in a file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Args)]
pub struct TunnelArgs {
    /// Take the options from this file, which a flag of the same name overrides
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,

    /// Workers, each with a TUN queue, a UDP socket and a thread [default: one per core, at most 4]
    #[arg(long, value_name = "N", value_parser = value_parser!(u16).range(1..=QUEUES_MAX as i64))]
    pub queues: Option<u16>,

    /// Another host, repeatable: IPv4 or IPv6 address or DNS name, port 8285 unless given, and the
    /// prefixes behind it; without any, it takes what no other peer's prefixes match
    #[arg(long, value_name = "HOST[:PORT][=PREFIX,...]", value_parser = parse_peer)]
    pub peer: Vec<PeerSpec>,

    /// Address and UDP port to listen on: 0.0.0.0 for all of IPv4, :: for all of both IP versions
    /// [default: 0.0.0.0 if all peers are IPv4 addresses, else ::; port 8285]
    #[arg(long, value_name = "ADDR[:PORT]", value_parser = parse_listen)]
    pub listen: Option<Listen>,

    /// Name of the TUN device [default: fastvpn0]
    #[arg(long, value_name = "NAME", value_parser = parse_tun_name)]
    pub tun: Option<String>,

    /// MTU of the TUN device in bytes [default: smallest path MTU to a peer less 28 (IPv4) or 48 (IPv6)]
    #[arg(long, value_name = "N", value_parser = value_parser!(u32).range(MTU_BYTES_MIN as i64..=MTU_BYTES_MAX as i64))]
    pub mtu: Option<u32>,

    /// Address of the TUN device, repeatable [default: 10.244.x.y/16 from the underlay address a.b.x.y]
    #[arg(long, value_name = "CIDR", value_parser = parse_address)]
    pub address: Vec<IpNet>,

    /// Route through the tunnel besides the peers' prefixes, repeatable; gone again at exit
    #[arg(long, value_name = "CIDR", value_parser = parse_route)]
    pub route: Vec<IpNet>,

    /// Leave the kernel's routes alone: none for the peers' prefixes
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub no_routes: Option<bool>,

    /// Count as an IP hop: decrement the TTL of what goes into the tunnel
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub hop: Option<bool>,

    /// Pin workers to these cores, as in 0,2-3 [default: no pinning]
    #[arg(long, value_name = "LIST", value_parser = parse_cores)]
    pub cores: Option<CoreList>,

    /// Look for arrivals this many microseconds before sleeping: off, auto, or 1 to 1000000 [default: off]
    #[arg(long, value_name = "US", value_parser = parse_busy_poll)]
    pub busy_poll: Option<BusyPoll>,

    /// Packets that may wait in a TUN queue for its worker [default: 1000]
    #[arg(long, value_name = "N", value_parser = value_parser!(u32).range(1..=TXQUEUELEN_MAX as i64))]
    pub txqueuelen: Option<u32>,

    /// How the workers do their I/O [default: auto]
    #[arg(long, value_enum, value_name = "ENGINE")]
    pub io: Option<Io>,

    /// Do without some kernel features, as on a kernel that lacks them
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    pub without: Vec<Feature>,

    /// Path of the operators' socket [default: /run/fastvpn/, named after the TUN]
    #[arg(long, value_name = "PATH")]
    pub control: Option<PathBuf>,

    /// Take over from the running process of the same TUN device, which then ends
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub takeover: Option<bool>,

    /// Say more; twice for even more
    #[arg(short, long, action = ArgAction::Count, conflicts_with = "quiet")]
    pub verbose: u8,

    /// Say nothing but warnings and errors
    #[arg(short, long)]
    pub quiet: bool,

    /// Form of the log lines [default: text]
    #[arg(long, value_enum)]
    pub log_format: Option<LogFormat>,
}

/// Form of the log lines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// Lines for people.
    #[default]
    Text,
    /// One JSON object per line.
    Json,
}

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
    /// io_uring's multishot receive on the UDP socket
    RecvMultishot,
}

/// A host to resolve and a port.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Endpoint {
    /// Address or DNS name.
    pub host: String,
    /// UDP port.
    pub port: u16,
}

impl Endpoint {
    /// The address, if the host is one; `None` for a DNS name, and for an IPv6
    /// address with a zone, as in `fe80::1%eth0`, which the resolver reads.
    pub fn literal(&self) -> Option<SocketAddr> {
        let ip: IpAddr = self.host.parse().ok()?;
        Some(transport::canonical(SocketAddr::new(ip, self.port)))
    }

    /// Whether the host is a DNS name, whose addresses may change.
    pub fn is_name(&self) -> bool {
        // Only IPv6 addresses have colons.
        !self.host.contains(':') && self.host.parse::<Ipv4Addr>().is_err()
    }

    /// Whether both say the same, though perhaps in other words: the case of a
    /// DNS name and the dot behind it do not matter (RFC 4343, RFC 1034), nor
    /// how an address is written.
    pub fn is_same(&self, other: &Self) -> bool {
        self.key() == other.key()
    }

    /// Equal if and only if [`Self::is_same`].
    pub fn key(&self) -> (String, u16) {
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

impl fmt::Display for Endpoint {
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
    pub endpoint: Endpoint,
    /// Inner addresses that it has; none for whatever no peer's prefixes match.
    pub prefixes: Vec<IpNet>,
}

impl fmt::Display for PeerSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.endpoint.fmt(f)?;
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
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn help_has_help() {
        for words in [
            "fastvpn help --help",
            "fastvpn route help -h",
            "fastvpn help",
        ] {
            let words = words.split(' ').map(OsString::from).collect();
            let error = Cli::try_parse_from(without_help_of_help(words)).unwrap_err();
            assert_eq!(error.kind(), clap::error::ErrorKind::DisplayHelp, "{error}");
        }
        let value = "fastvpn --tun help --help"
            .split(' ')
            .map(OsString::from)
            .collect();
        assert_eq!(without_help_of_help(value).len(), 4);
    }

    #[test]
    fn switches_can_be_switched_off() {
        let hop = |flag: &str| {
            Cli::try_parse_from(["fastvpn", "-q", flag])
                .unwrap()
                .tunnel
                .hop
        };
        assert_eq!(hop("--hop"), Some(true));
        assert_eq!(hop("--hop=false"), Some(false));
        assert_eq!(hop("--no-routes"), None);
    }

    #[test]
    fn tells_names_from_addresses() {
        let endpoint = |text: &str| parse_endpoint(text).unwrap();
        assert!(endpoint("vpn.example.org").is_name());
        for literal in ["10.0.0.1", "fd00::1", "fe80::1%eth0"] {
            assert!(!endpoint(literal).is_name(), "{literal}");
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
