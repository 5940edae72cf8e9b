//! The command line.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use ipnet::IpNet;

use crate::transport::DEFAULT_PORT;
use crate::worker::idle::BusyPoll;

/// Name of the TUN device unless another is given.
pub const TUN_NAME_DEFAULT: &str = "fastvpn0";

/// A fast userspace network tunnel: IP packets in plain UDP datagrams.
///
/// Run it the same way on both hosts, each naming the other, as in
/// `fastvpn --queues 4 --peer 10.211.55.123:8285`.
#[derive(Debug, Parser)]
#[command(
    version,
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true
)]
pub struct Cli {
    /// What to do other than run a tunnel.
    #[command(subcommand)]
    pub command: Option<Command>,

    /// The tunnel's options.
    #[command(flatten)]
    pub tunnel: TunnelArgs,
}

/// What to do other than run a tunnel.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Show a tunnel at work between two network namespaces of this machine
    Demo(crate::demo::DemoOptions),
    /// Say what this host offers a tunnel, what is missing, and how to mend it
    Check(crate::check::CheckOptions),
}

/// The tunnel's options.
#[derive(Clone, Debug, Args)]
pub struct TunnelArgs {
    /// Workers, each with a TUN queue, a UDP socket and a thread [default: one per core, at most 4]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    pub queues: Option<u16>,

    /// The other host: IPv4 or IPv6 address or DNS name, port 8285 unless given
    #[arg(long, value_name = "HOST[:PORT]", required = true, value_parser = parse_endpoint)]
    pub peer: Vec<Endpoint>,

    /// Address and UDP port to listen on [default: all addresses, port 8285]
    #[arg(long, value_name = "ADDR[:PORT]", value_parser = parse_listen)]
    pub listen: Option<Listen>,

    /// Name of the TUN device
    #[arg(long, value_name = "NAME", default_value = TUN_NAME_DEFAULT, value_parser = parse_tun_name)]
    pub tun: String,

    /// MTU of the TUN device in bytes [default: path MTU to the peer less 28 (IPv4) or 48 (IPv6)]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(68..=65507))]
    pub mtu: Option<u32>,

    /// Address of the TUN device, repeatable [default: 10.244.x.y/16 from the underlay address a.b.x.y]
    #[arg(long, value_name = "CIDR", value_parser = parse_address)]
    pub address: Vec<IpNet>,

    /// Route through the tunnel, repeatable; gone again at exit
    #[arg(long, value_name = "CIDR", value_parser = parse_route)]
    pub route: Vec<IpNet>,

    /// Pin workers to these cores, as in 0,2-3 [default: no pinning]
    #[arg(long, value_name = "LIST", value_parser = parse_cores)]
    pub cores: Option<CoreList>,

    /// Look for arrivals this many microseconds before sleeping: off, auto, or 1 to 1000000
    #[arg(long, value_name = "US", default_value = "off", value_parser = parse_busy_poll)]
    pub busy_poll: BusyPoll,

    /// Packets that may wait in a TUN queue for its worker
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub txqueuelen: u32,

    /// How the workers do their I/O
    #[arg(long, value_enum, value_name = "ENGINE", default_value_t = Io::Auto)]
    pub io: Io,

    /// Do without some kernel features, as on a kernel that lacks them
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    pub without: Vec<Feature>,

    /// Path of the operators' socket [default: /run/fastvpn/, named after the TUN]
    #[arg(long, value_name = "PATH")]
    pub control: Option<PathBuf>,

    /// Say more; twice for even more
    #[arg(short, long, action = clap::ArgAction::Count, conflicts_with = "quiet")]
    pub verbose: u8,

    /// Say nothing but warnings and errors
    #[arg(short, long)]
    pub quiet: bool,

    /// Form of the log lines
    #[arg(long, value_enum, default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,
}

/// Form of the log lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// Lines for people.
    Text,
    /// One JSON object per line.
    Json,
}

/// How the workers do their I/O.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Io {
    /// By io_uring if the kernel has and allows it, else by epoll
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
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Address or DNS name.
    pub host: String,
    /// UDP port.
    pub port: u16,
}

/// Where to listen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Listen {
    /// Address of this host, or the unspecified address for all.
    pub ip: IpAddr,
    /// UDP port.
    pub port: u16,
}

/// Core numbers, in the order of the workers that get them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CoreList(pub Vec<usize>);

type ParseResult<T> = Result<T, String>;

/// Splits `host:port`, `[v6]:port`, or a host alone.
fn split_port(text: &str) -> ParseResult<(&str, u16)> {
    let port = |digits: &str| match digits.parse::<u16>() {
        Ok(port) if port > 0 => Ok(port),
        _ => Err(format!("{digits:?} is no UDP port (1 to 65535)")),
    };
    if let Some(rest) = text.strip_prefix('[') {
        let (host, rest) = rest
            .split_once(']')
            .ok_or_else(|| "the closing bracket is missing".to_string())?;
        return match rest.strip_prefix(':') {
            Some(digits) => Ok((host, port(digits)?)),
            None if rest.is_empty() => Ok((host, DEFAULT_PORT)),
            None => Err(format!("{rest:?} after the bracket: expected :PORT")),
        };
    }
    match text.split_once(':') {
        // More than one colon and no brackets: an IPv6 address.
        Some((_, rest)) if rest.contains(':') => Ok((text, DEFAULT_PORT)),
        Some((host, digits)) => Ok((host, port(digits)?)),
        None => Ok((text, DEFAULT_PORT)),
    }
}

pub(crate) fn parse_endpoint(text: &str) -> ParseResult<Endpoint> {
    let (host, port) = split_port(text)?;
    if host.is_empty() || host.contains(|c: char| c.is_whitespace() || c.is_control() || c == '/') {
        return Err("expected an address or a DNS name, and a port if it is not 8285".into());
    }
    if host.contains(':') && host.parse::<IpAddr>().is_err() && !host.contains('%') {
        return Err(format!("{host:?} is no IPv6 address"));
    }
    Ok(Endpoint {
        host: host.to_string(),
        port,
    })
}

fn parse_listen(text: &str) -> ParseResult<Listen> {
    if let Ok(address) = text.parse::<SocketAddr>() {
        if address.port() == 0 {
            return Err("0 is no UDP port (1 to 65535)".into());
        }
        return Ok(Listen {
            ip: address.ip(),
            port: address.port(),
        });
    }
    let (host, port) = split_port(text)?;
    let ip = host
        .parse()
        .map_err(|_| format!("{host:?} is no IP address of this host"))?;
    Ok(Listen { ip, port })
}

/// What the kernel takes as an interface name (`dev_valid_name`).
fn parse_tun_name(text: &str) -> ParseResult<String> {
    let bad = |c: char| c.is_whitespace() || c.is_control() || matches!(c, '/' | ':' | '%');
    if text.is_empty() || text.len() > 15 || text.contains(bad) || text == "." || text == ".." {
        return Err("expected 1 to 15 characters without /, :, % and spaces".into());
    }
    Ok(text.to_string())
}

fn parse_cidr(text: &str) -> ParseResult<IpNet> {
    if let Ok(address) = text.parse::<IpAddr>() {
        return Ok(IpNet::from(address));
    }
    text.parse()
        .map_err(|_| "expected ADDRESS/LENGTH, such as 10.244.2.2/24".to_string())
}

fn parse_address(text: &str) -> ParseResult<IpNet> {
    let net = parse_cidr(text)?;
    let address = net.addr();
    if address.is_unspecified() || address.is_multicast() {
        return Err(format!("{address} is no address of a host"));
    }
    Ok(net)
}

fn parse_route(text: &str) -> ParseResult<IpNet> {
    let net = parse_cidr(text)?;
    if net.trunc() != net {
        return Err(format!(
            "bits beyond the prefix length; did you mean {}?",
            net.trunc()
        ));
    }
    Ok(net)
}

pub(crate) fn parse_cores(text: &str) -> ParseResult<CoreList> {
    const CORES_MAX: usize = 4096;
    let number = |digits: &str| match digits.trim().parse::<usize>() {
        Ok(core) if core < CORES_MAX => Ok(core),
        _ => Err(format!("{digits:?} is no core number")),
    };
    let mut cores = Vec::new();
    for part in text.split(',') {
        match part.split_once('-') {
            None => cores.push(number(part)?),
            Some((first, last)) => {
                let (first, last) = (number(first)?, number(last)?);
                if first > last {
                    return Err(format!("{part:?} counts down"));
                }
                cores.extend(first..=last);
            }
        }
    }
    Ok(CoreList(cores))
}

fn parse_busy_poll(text: &str) -> ParseResult<BusyPoll> {
    const US_MAX: u64 = 1_000_000;
    match text {
        "off" => Ok(BusyPoll::Off),
        "auto" => Ok(BusyPoll::Auto),
        _ => match text.parse() {
            Ok(0) => Ok(BusyPoll::Off),
            Ok(us @ 1..=US_MAX) => Ok(BusyPoll::For(Duration::from_micros(us))),
            _ => Err(format!("expected off, auto, or 1 to {US_MAX} microseconds")),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn reads_endpoints() {
        let parse = |text: &str| parse_endpoint(text).map(|e| (e.host, e.port));
        let ok = |host: &str, port| Ok((host.to_string(), port));
        assert_eq!(parse("10.211.55.123:8285"), ok("10.211.55.123", 8285));
        assert_eq!(parse("10.211.55.123"), ok("10.211.55.123", 8285));
        assert_eq!(parse("vpn.example.org:99"), ok("vpn.example.org", 99));
        assert_eq!(parse("fd00::1"), ok("fd00::1", 8285));
        assert_eq!(parse("[fd00::1]:77"), ok("fd00::1", 77));
        assert_eq!(parse("[fd00::1]"), ok("fd00::1", 8285));
        for bad in [
            "",
            ":99",
            "host:0",
            "host:70000",
            "[fd00::1",
            "[fd00::1]x",
            "a b",
            "1:2:x",
        ] {
            assert!(parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn reads_listen_addresses() {
        let parse = |text: &str| parse_listen(text).map(|l| (l.ip.to_string(), l.port));
        assert_eq!(parse("10.0.0.1"), Ok(("10.0.0.1".into(), 8285)));
        assert_eq!(parse("[::]:9"), Ok(("::".into(), 9)));
        assert_eq!(parse("fd00::1"), Ok(("fd00::1".into(), 8285)));
        assert!(parse("localhost").is_err());
        assert!(parse("10.0.0.1:0").is_err());
    }

    #[test]
    fn reads_cores_names_and_prefixes() {
        assert_eq!(parse_cores("0,2-4"), Ok(CoreList(vec![0, 2, 3, 4])));
        for bad in ["", "a", "3-1", "0-99999", "-1"] {
            assert!(parse_cores(bad).is_err(), "{bad:?}");
        }
        assert!(parse_tun_name("sixteen-letters-").is_err());
        assert!(parse_tun_name("a/b").is_err());
        assert!(parse_tun_name("flannel99").is_ok());
        assert!(
            parse_route("10.1.2.3/16")
                .unwrap_err()
                .contains("10.1.0.0/16")
        );
        assert_eq!(
            parse_route("10.1.0.0/16").unwrap().to_string(),
            "10.1.0.0/16"
        );
        assert_eq!(parse_address("fd00::2").unwrap().to_string(), "fd00::2/128");
        assert!(parse_address("0.0.0.0/0").is_err());
    }
}
