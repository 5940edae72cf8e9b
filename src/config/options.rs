//! The tunnel's options, as the command line and the configuration file give them.
//!
//! They have no defaults here, so that it shows which were given: what is left
//! open may come from the file, and [`super::Config`] fills in the rest.

use std::ops::RangeInclusive;
use std::path::PathBuf;

use clap::{ArgAction, Args, value_parser};
use ipnet::IpNet;

use super::parse::{
    parse_address, parse_busy_poll, parse_cores, parse_listen, parse_peer, parse_route,
    parse_tun_name,
};
use super::types::{BusyPoll, CoreList, Feature, Io, Listen, PeerSpec};
use crate::log::LogFormat;

/// Name of the TUN device unless another is given.
pub const TUN_NAME_DEFAULT: &str = "fastvpn0";

/// Values of `--mtu`, in bytes: from what IPv4 asks for (RFC 791) to what fits a
/// UDP datagram.
const MTU_BYTES: RangeInclusive<i64> = 68..=65507;

/// Values of `--queues`: up to the kernel's `MAX_TAP_QUEUES` (`linux/if_tun.h`).
pub(crate) const QUEUES: RangeInclusive<i64> = 1..=256;

/// The tunnel's options, as given: on the command line or in a file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Args)]
pub struct TunnelArgs {
    /// Take the options from this file, which a flag of the same name overrides
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,

    /// Workers, each with a TUN queue, a UDP socket and a thread [default: one per core, at most 4]
    #[arg(long, value_name = "N", value_parser = value_parser!(u16).range(QUEUES))]
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
    #[arg(long, value_name = "N", value_parser = value_parser!(u32).range(MTU_BYTES))]
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
    #[arg(long, value_name = "N", value_parser = value_parser!(u32).range(1..=100_000))]
    pub txqueuelen: Option<u32>,

    /// How the workers do their I/O [default: auto]
    #[arg(long, value_enum, value_name = "ENGINE")]
    pub io: Option<Io>,

    /// Do without some kernel features, as on a kernel that lacks them
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    pub without: Vec<Feature>,

    /// Path of the control socket [default: /run/fastvpn/, named after the TUN]
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
