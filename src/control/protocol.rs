//! What operators and the running tunnel say to each other: one JSON object a
//! line, each way. `docs/control.md` describes it for those who write programs.
//!
//! Clients skip what they do not know of an answer, so answers may grow. A client
//! of a later version may still meet an earlier tunnel: give fields that are new a
//! default (`#[serde(default)]`).

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

/// What an operator may ask for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// How the tunnel is doing: [`Status`].
    Status {},
    /// All peers: [`Peers`].
    Peers {},
    /// All prefixes: [`Routes`].
    RouteList {},
    /// Where packets to an address go: [`Found`].
    RouteGet {
        /// The inner address.
        address: IpAddr,
    },
    /// Puts prefixes behind a peer: [`Changed`].
    RouteAdd {
        /// The peer, `HOST[:PORT]`.
        peer: String,
        /// The prefixes.
        prefixes: Vec<IpNet>,
        /// Whether to take them from other peers that have them.
        #[serde(default)]
        replace: bool,
    },
    /// Removes prefixes, whosever they are: [`Changed`].
    RouteDel {
        /// The prefixes.
        prefixes: Vec<IpNet>,
    },
    /// Adds a peer: [`Changed`].
    PeerAdd {
        /// The peer, `HOST[:PORT]`.
        peer: String,
        /// Its prefixes; none for what no prefix matches.
        #[serde(default)]
        prefixes: Vec<IpNet>,
    },
    /// Removes a peer and its prefixes: [`Changed`].
    PeerDel {
        /// The peer, `HOST[:PORT]`.
        peer: String,
    },
    /// Reads the configuration file again: [`Reloaded`].
    Reload {},
    /// Ends the tunnel: [`Changed`].
    Stop {},
    /// Hands the tunnel over to the process that asks (`crate::tunnel::takeover`).
    Takeover {
        /// The version of what follows.
        protocol: u32,
    },
}

/// The tunnel, in numbers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Version of the program.
    pub version: String,
    /// Process id.
    pub pid: u32,
    /// Seconds since the process started to carry packets.
    pub uptime_seconds: u64,
    /// Name of the TUN device.
    pub tun: String,
    /// Its addresses.
    pub addresses: Vec<IpNet>,
    /// Its MTU in bytes.
    pub mtu_bytes: u32,
    /// Address and port of the UDP sockets.
    pub listen: String,
    /// I/O engine, in words.
    pub engine: String,
    /// Offloads, in words.
    pub offloads: String,
    /// Whether the tunnel counts as an IP hop.
    pub hop: bool,
    /// Whether the prefixes are kept as kernel routes.
    pub keeps_routes: bool,
    /// The configuration file, if there is one.
    pub config_file: Option<String>,
    /// Why the last reload changed nothing, if it did not.
    pub reload_error: Option<String>,
    /// Number of peers.
    pub peers: usize,
    /// Number of prefixes.
    pub prefixes: usize,
    /// Counters of all workers together, without drops.
    pub counters: BTreeMap<String, u64>,
    /// Packets dropped, by reason; zeros are left out.
    pub drops: BTreeMap<String, u64>,
    /// Packets that found the TUN queue full, as the kernel counts them.
    pub tun_queue_drops: u64,
    /// Counters of each worker, drops included.
    pub workers: Vec<BTreeMap<String, u64>>,
}

/// All peers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Peers {
    /// In the order of their names.
    pub peers: Vec<PeerStatus>,
}

/// A peer, in numbers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerStatus {
    /// `HOST:PORT` as it was given.
    pub peer: String,
    /// Its address; none while its name does not resolve.
    pub endpoint: Option<SocketAddr>,
    /// Whether nothing is sent there, as the way would lead through the tunnel
    /// itself.
    #[serde(default)]
    pub is_suspended: bool,
    /// `config` or `runtime`.
    pub origin: String,
    /// Whether it takes what no prefix matches.
    pub is_default: bool,
    /// Number of its prefixes.
    pub prefixes: usize,
    /// MTU of the path to it in bytes, as far as the kernel knows it.
    pub path_mtu_bytes: Option<u32>,
    /// Packets sent to it.
    pub packets_sent: u64,
    /// Bytes of those packets.
    pub bytes_sent: u64,
    /// Packets received from it.
    pub packets_received: u64,
    /// Bytes of those packets.
    pub bytes_received: u64,
    /// Seconds since something came from it; none if nothing has.
    pub last_heard_seconds: Option<u64>,
}

/// All prefixes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Routes {
    /// In the order of their addresses.
    pub routes: Vec<RouteEntry>,
}

/// A prefix and the peer behind which it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RouteEntry {
    /// The prefix.
    pub prefix: IpNet,
    /// `HOST:PORT` of the peer as it was given.
    pub peer: String,
    /// The peer's address; none while its name does not resolve.
    pub endpoint: Option<SocketAddr>,
    /// `config` or `runtime`.
    pub origin: String,
}

/// Where packets to an address go.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Found {
    /// The address.
    pub address: IpAddr,
    /// The longest prefix that matches; none if no prefix does, and the peer is
    /// the one without.
    pub prefix: Option<IpNet>,
    /// `HOST:PORT` of the peer as it was given.
    pub peer: String,
    /// The peer's address; none while its name does not resolve.
    pub endpoint: Option<SocketAddr>,
}

/// What a change came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Changed {
    /// Prefixes that are new behind their peer.
    pub prefixes_added: usize,
    /// Prefixes that are gone.
    pub prefixes_removed: usize,
    /// Peers that are new.
    pub peers_added: usize,
    /// Peers that are gone.
    pub peers_removed: usize,
}

/// What a reload came to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reloaded {
    /// Peers and prefixes.
    #[serde(flatten)]
    pub changed: Changed,
    /// Other settings that have changed, by their keys.
    pub settings_changed: Vec<String>,
    /// Settings that differ from the file's until the process is started again.
    pub needs_restart: Vec<String>,
}

/// An answer to a request that could be done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum Answer {
    /// To [`Request::Status`].
    Status(Box<Status>),
    /// To [`Request::Peers`].
    Peers(Peers),
    /// To [`Request::RouteList`].
    Routes(Routes),
    /// To [`Request::RouteGet`].
    Found(Found),
    /// To requests that change peers and prefixes, and to [`Request::Stop`].
    Changed(Changed),
    /// To [`Request::Reload`].
    Reloaded(Reloaded),
}

/// A line of the operators' socket: an answer with `"ok":true`, or the reason
/// why there is none, with `"ok":false`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum Line {
    /// It is done.
    Done {
        /// Always true.
        ok: bool,
        /// What it came to.
        #[serde(flatten)]
        answer: Answer,
    },
    /// It is not, and nothing has changed.
    Failed {
        /// Always false.
        ok: bool,
        /// Why, in one line.
        error: String,
    },
}

impl From<Result<Answer, String>> for Line {
    fn from(result: Result<Answer, String>) -> Self {
        match result {
            Ok(answer) => Self::Done { ok: true, answer },
            Err(error) => Self::Failed { ok: false, error },
        }
    }
}
