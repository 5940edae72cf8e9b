//! The tunnel's options: each is a flag, and a key of the configuration file.
//!
//! [`Config`] says all that there is to say of an option: name, help, reader and
//! default. clap fills it from flags, and serde from the file.

use std::net::{Ipv4Addr, SocketAddr};
use std::ops::RangeInclusive;
use std::path::PathBuf;

use clap::{ArgAction, ArgMatches, Args};
use ipnet::{IpNet, Ipv4Net};
use serde::{Deserialize, Serialize};

use super::peer::{self, PeerSpec, parse_identity, parse_peer};
use super::types::{
    self, Aqm, BusyPoll, CoreList, Dscp, Feature, Io, Password, QueueLimit, parse_busy_poll,
    parse_cores, parse_fwmark, parse_interface, parse_listen, parse_metrics, parse_prefix,
    parse_queue_limit, parse_regex, parse_url,
};
use crate::log::LogFormat;
use crate::wire::Mode;
use crate::wire::wireguard::keys::{PrivateKey, PublicKey};
use crate::wire::wireguard::secret::SharedSecret;

/// Name of the TUN device unless another is given.
pub(crate) const TUN_NAME_DEFAULT: &str = "fastvpn0";

/// Values of `--queues`: up to the kernel's `MAX_TAP_QUEUES` (`linux/if_tun.h`).
pub(crate) const QUEUES: RangeInclusive<i64> = 1..=256;

/// What is wanted of a tunnel. A new option is a field here, and a use of it. A
/// default other than the type's own is named at the field; bounds are in
/// `resolution`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Args, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct Config {
    /// Make an encrypted interface for wg and wg-quick, in the background: key, port and peers
    /// come by `wg setconf`, addresses and routes from elsewhere
    #[arg(
        value_name = "NAME",
        value_parser = parse_interface,
        conflicts_with_all = [
            "config_file", "wg_config_file", "private_key_file", "secret_file", "identity",
            "peers", "tun", "mtu_bytes", "addresses", "routes", "no_routes",
        ]
    )]
    #[serde(skip)]
    pub interface: Option<String>,

    /// With NAME: stay in the foreground, as without
    #[arg(short, long)]
    #[serde(skip)]
    pub foreground: bool,

    /// This process was started to run in the background.
    #[arg(long, hide = true)]
    #[serde(skip)]
    pub(crate) detached: bool,

    /// Take the options from this file, which a flag of the same name overrides
    #[arg(long = "config", value_name = "FILE")]
    #[serde(skip)]
    pub config_file: Option<PathBuf>,

    /// Take the options from this file, which is in the format of wg-quick(8)
    #[arg(
        long = "wg-config",
        value_name = "FILE",
        conflicts_with = "config_file"
    )]
    #[serde(skip)]
    pub wg_config_file: Option<PathBuf>,

    /// Workers, each with a TUN queue, a UDP socket and a thread [default: one per core, at most 4]
    #[arg(long, value_name = "N")]
    #[serde(default = "default_queues")]
    pub queues: u16,

    /// Encrypt and authenticate (WireGuard): a file with this host's private key, as genkey makes
    /// it; each peer then has a public key
    #[arg(long = "private-key", value_name = "FILE")]
    #[serde(rename = "private-key")]
    pub private_key_file: Option<PathBuf>,

    /// Encrypt (WireGuard) with keys that follow from a secret which all hosts share: its file, as
    /// gensecret makes it; peers are named as without
    #[arg(long, value_name = "FILE")]
    pub secret_file: Option<PathBuf>,

    /// With --secret-file: what its peers know this host by [default: its address toward the peers]
    #[arg(long, value_name = "NAME", value_parser = parse_identity)]
    #[serde(deserialize_with = "peer::identity")]
    pub identity: Option<String>,

    /// Another host, repeatable: IPv4 or IPv6 address or DNS name, port 8285 unless given, and its
    /// prefixes; without any, it takes what no other peer's prefixes match. With --private-key:
    /// KEY@HOST or KEY, its public key first; without HOST it has to call
    #[arg(long = "peer", value_name = "[KEY@]HOST[:PORT][=PREFIX,...]", value_parser = parse_peer)]
    #[serde(rename = "peer", skip_serializing)]
    pub peers: Vec<PeerSpec>,

    /// Address and UDP port to listen on: 0.0.0.0 for all of IPv4, :: for all of both IP versions
    /// [default: 0.0.0.0 if all peers are IPv4 addresses, else ::; port 8285]
    #[arg(long, value_name = "ADDR[:PORT]", value_parser = parse_listen)]
    #[serde(deserialize_with = "types::listen")]
    pub listen: Option<SocketAddr>,

    /// Name of the TUN device [default: fastvpn0]
    #[arg(long, value_name = "NAME")]
    #[serde(default = "default_tun")]
    pub tun: String,

    /// MTU of the TUN device in bytes [default: smallest path MTU to a peer less 28 (IPv4), 48 (IPv6), or 80 with keys]
    #[arg(long = "mtu", value_name = "N")]
    #[serde(rename = "mtu")]
    pub mtu_bytes: Option<u32>,

    /// Address of the TUN device, repeatable [default: 10.244.x.y/16 from the underlay address a.b.x.y]
    #[arg(long = "address", value_name = "CIDR", value_parser = parse_prefix)]
    #[serde(rename = "address", deserialize_with = "types::prefixes")]
    pub addresses: Vec<IpNet>,

    /// Join the network in this registry: URLs of etcd's members, separated by commas [env: FLANNELD_ETCD_ENDPOINTS]
    #[arg(long, value_name = "URL,...", value_delimiter = ',', value_parser = parse_url)]
    pub registry: Vec<String>,

    /// Prefix of the network's keys there [default: /coreos.com/network] [env: FLANNELD_ETCD_PREFIX]
    #[arg(long, value_name = "PREFIX")]
    pub registry_prefix: Option<String>,

    /// Certificates of those who sign etcd's, in PEM; needed with https:// [env: FLANNELD_ETCD_CAFILE]
    #[arg(long, value_name = "FILE")]
    pub registry_ca: Option<PathBuf>,

    /// This host's certificate for etcd, in PEM [env: FLANNELD_ETCD_CERTFILE]
    #[arg(long, value_name = "FILE")]
    pub registry_cert: Option<PathBuf>,

    /// Its private key, in PEM [env: FLANNELD_ETCD_KEYFILE]
    #[arg(long, value_name = "FILE")]
    pub registry_key: Option<PathBuf>,

    /// A user of etcd's [env: FLANNELD_ETCD_USERNAME]
    #[arg(long, value_name = "NAME")]
    pub registry_user: Option<String>,

    /// A file with the user's password
    #[arg(long, value_name = "FILE")]
    pub registry_password_file: Option<PathBuf>,

    /// Seconds that this host stays in the registry after it was last heard of, 5 to 86400
    /// [default: 86400]
    #[arg(long, value_name = "SECONDS")]
    pub registry_ttl: Option<u32>,

    /// Take only hosts of the registry with addresses in this prefix, repeatable [default: all]
    #[arg(long, value_name = "CIDR", value_parser = parse_prefix)]
    #[serde(deserialize_with = "types::prefixes")]
    pub registry_allow: Vec<IpNet>,

    /// A prefix that this host has besides its subnet, for the others to know, repeatable
    #[arg(long, value_name = "CIDR", value_parser = parse_prefix)]
    #[serde(deserialize_with = "types::prefixes")]
    pub registry_publish: Vec<IpNet>,

    /// Take prefixes that the registry's hosts publish if they are in this one, repeatable
    /// [default: none]
    #[arg(long, value_name = "CIDR", value_parser = parse_prefix)]
    #[serde(deserialize_with = "types::prefixes")]
    pub registry_allow_prefix: Vec<IpNet>,

    /// File with what was last known of the registry, for boots without it [default:
    /// /var/lib/fastvpn/, named after the TUN]
    #[arg(long, value_name = "FILE")]
    pub registry_cache: Option<PathBuf>,

    /// With --registry: this host's IPv4 address, as the others are to find it [default: that of
    /// --iface] [env: FLANNELD_PUBLIC_IP]
    #[arg(long, value_name = "ADDRESS")]
    pub public_ip: Option<Ipv4Addr>,

    /// With --registry: the interface, or this host's address, toward the others; repeatable, the
    /// first that there is [default: that of the default route] [env: FLANNELD_IFACE]
    #[arg(long, value_name = "NAME|ADDRESS")]
    pub iface: Vec<String>,

    /// With --registry: the same, if none of those is there: the first of which the address or else
    /// the name matches this regular expression, repeatable [env: FLANNELD_IFACE_REGEX]
    #[arg(long, value_name = "REGEX", value_parser = parse_regex)]
    #[serde(deserialize_with = "types::regexes")]
    pub iface_regex: Vec<String>,

    /// With --registry: the same, if none of those is there: the one that the route to this
    /// address leads through [env: FLANNELD_IFACE_CAN_REACH]
    #[arg(long, value_name = "ADDRESS")]
    pub iface_can_reach: Option<Ipv4Addr>,

    /// With --registry: masquerade what containers send to other networks (nftables) [env: FLANNELD_IP_MASQ]
    #[arg(long, value_name = "BOOL", action = ArgAction::Set, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub ip_masq: bool,

    /// With --registry: the file that container tools read of this host's subnet [default:
    /// /run/flannel/subnet.env] [env: FLANNELD_SUBNET_FILE]
    #[arg(long, value_name = "FILE")]
    pub subnet_file: Option<PathBuf>,

    /// Without keys: send each peer a keepalive every so many seconds, 1 to 300, so that it can
    /// tell that this host is there [default: none]
    #[arg(long = "keepalive", value_name = "SECONDS")]
    #[serde(rename = "keepalive")]
    pub keepalive_seconds: Option<u16>,

    /// Route through the tunnel besides the peers' prefixes, repeatable; gone again at exit
    #[arg(long = "route", value_name = "CIDR", value_parser = parse_prefix)]
    #[serde(rename = "route", deserialize_with = "types::prefixes")]
    pub routes: Vec<IpNet>,

    /// Leave the kernel's routes alone: none for the peers' prefixes
    #[arg(long, value_name = "BOOL", action = ArgAction::Set, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub no_routes: bool,

    /// Count as an IP hop: decrement the TTL of what goes into the tunnel
    #[arg(long, value_name = "BOOL", action = ArgAction::Set, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub hop: bool,

    /// Pin workers to these cores, as in 0,2-3 [default: no pinning]
    #[arg(long, value_name = "LIST", value_parser = parse_cores)]
    #[serde(deserialize_with = "types::cores")]
    pub cores: CoreList,

    /// Poll for arrivals this many microseconds before sleeping: off, auto, or 1 to 1000000 [default: auto]
    #[arg(long, value_name = "US", value_parser = parse_busy_poll)]
    #[serde(deserialize_with = "types::busy_poll")]
    pub busy_poll: BusyPoll,

    /// Packets that may wait in a TUN queue for its worker [default: 1000]
    #[arg(long, value_name = "N")]
    #[serde(default = "default_txqueuelen")]
    pub txqueuelen: u32,

    /// Bytes that a UDP socket holds before packets wait outside it: auto, or 2304 to 8388608
    /// [default: auto]
    #[arg(long, value_name = "BYTES", value_parser = parse_queue_limit)]
    #[serde(deserialize_with = "types::queue_limit")]
    pub queue_limit: QueueLimit,

    /// How packets wait there [default: fq_codel]
    #[arg(long, value_enum, value_name = "HOW")]
    pub aqm: Aqm,

    /// DSCP of the datagrams [default: 0]
    #[arg(long, value_enum, value_name = "DSCP")]
    #[serde(deserialize_with = "types::dscp")]
    pub dscp: Dscp,

    /// Mark the datagrams, for rules of routing and of firewalls: 32 bits, decimal or as in 0xca6c
    /// [default: 0, no mark]
    #[arg(long, value_name = "MARK", value_parser = parse_fwmark)]
    #[serde(deserialize_with = "types::fwmark")]
    pub fwmark: u32,

    /// How the workers do their I/O [default: auto]
    #[arg(long, value_enum, value_name = "ENGINE")]
    pub io: Io,

    /// Do without some kernel features, as on a kernel that lacks them
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    pub without: Vec<Feature>,

    /// Path of the control socket [default: /run/fastvpn/, named after the TUN]
    #[arg(long, value_name = "PATH")]
    pub control: Option<PathBuf>,

    /// Serve metrics for Prometheus, /healthz and /readyz over HTTP there; a port alone is one of
    /// 127.0.0.1 [default: none]
    #[arg(long, value_name = "[ADDR:]PORT", value_parser = parse_metrics)]
    #[serde(deserialize_with = "types::metrics")]
    pub metrics: Option<SocketAddr>,

    /// Take over from the running process of the same TUN device, which then ends
    #[arg(long, value_name = "BOOL", action = ArgAction::Set, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub takeover: bool,

    /// Log more; twice for even more
    #[arg(short, long, action = ArgAction::Count, conflicts_with = "quiet")]
    pub verbose: u8,

    /// Log nothing but warnings and errors
    #[arg(short, long)]
    pub quiet: bool,

    /// Form of the log lines [default: text]
    #[arg(long, value_enum)]
    pub log_format: LogFormat,

    /// Nothing is logged.
    #[arg(skip)]
    #[serde(skip)]
    pub(crate) is_silent: bool,

    /// UDP port to listen on where no address is given with it.
    #[arg(skip)]
    #[serde(skip_deserializing)]
    pub(crate) listen_port: Option<u16>,

    /// The registry's network, once it is known.
    #[arg(skip)]
    #[serde(skip)]
    pub(crate) registry_network: Option<Ipv4Net>,

    /// The password of the user of etcd's, if the environment has it.
    #[arg(skip)]
    #[serde(skip)]
    pub(crate) registry_password: Option<Password>,

    /// What of the file is not done, for the log.
    #[arg(skip)]
    #[serde(skip)]
    pub(crate) notes: Vec<String>,

    /// What the file with the private key says, once it has been read.
    #[arg(skip)]
    #[serde(skip)]
    pub(crate) private_key: Option<PrivateKey>,

    /// What the file with the shared secret says, once it has been read.
    #[arg(skip)]
    #[serde(skip)]
    pub(super) secret: Option<SharedSecret>,

    /// The identity that this host has, once it is known.
    #[arg(skip)]
    #[serde(skip)]
    pub(crate) own_identity: Option<String>,

    /// What of it `wg` has set since.
    #[arg(skip)]
    #[serde(skip)]
    pub(crate) by_wg: ByWg,

    /// The flags, which override the file again when it is read again.
    #[arg(skip)]
    #[serde(skip)]
    pub(super) flags: ArgMatches,
}

/// What of a configuration `wg` has set, in place of what flags and file say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct ByWg {
    /// This host's key; a reload reads its file again.
    pub private_key: bool,
    /// The port.
    pub listen: bool,
    /// The mark of the datagrams.
    pub fwmark: bool,
}

impl Config {
    /// Gives this one what `wg` has set of another.
    pub(crate) fn keep_changes_of_wg(&mut self, other: &Self) {
        self.by_wg = other.by_wg;
        if other.by_wg.private_key {
            self.private_key.clone_from(&other.private_key);
        }
        if other.by_wg.listen {
            self.listen = other.listen;
        }
        if other.by_wg.fwmark {
            self.fwmark = other.fwmark;
        }
    }

    /// Whether a kernel feature is used where there is one.
    pub(crate) fn uses(&self, feature: Feature) -> bool {
        !self.without.contains(&feature)
    }

    /// This host's public key, if the tunnel is encrypted.
    pub(crate) fn public_key(&self) -> Option<PublicKey> {
        self.private_key.as_ref().map(PrivateKey::public)
    }

    /// How datagrams are made.
    pub(crate) fn mode(&self) -> Mode {
        Mode::with_keys(self.is_encrypted())
    }

    /// Whether the tunnel is encrypted: it and all its peers have keys, or none has.
    pub(crate) fn is_encrypted(&self) -> bool {
        self.interface.is_some()
            || self.private_key_file.is_some()
            || self.private_key.is_some()
            || self.secret_file.is_some()
    }

    /// The file that the options come from, besides the flags.
    pub(crate) fn file(&self) -> Option<&PathBuf> {
        self.config_file.as_ref().or(self.wg_config_file.as_ref())
    }
}

/// One per core, and no more than are of use to most.
fn default_queues() -> u16 {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    cores.min(4) as u16
}

fn default_tun() -> String {
    TUN_NAME_DEFAULT.into()
}

fn default_txqueuelen() -> u32 {
    1000
}
