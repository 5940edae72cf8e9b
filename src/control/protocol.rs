//! What is said on the control socket: one JSON object a line, each way.
//! `docs/control.md` describes it for those who write programs.
//!
//! Clients skip what they do not know of an answer, so answers may grow. A client
//! of a later version may still meet an earlier tunnel: give fields that are new a
//! default (`#[serde(default)]`).

mod status;

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

pub use self::status::{CaptureStatus, RegistryStatus, Status};
use crate::error::shortened;

/// Longest request in bytes: some 200 000 prefixes.
pub const REQUEST_BYTES_MAX: usize = 4 << 20;

/// Longest answer that is read: several times that of a tunnel with as many prefixes as
/// there can be.
pub const ANSWER_BYTES_MAX: usize = 256 << 20;

/// What an operator may ask for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(
    tag = "command",
    rename_all = "kebab-case",
    deny_unknown_fields,
    expecting = "the name of a command"
)]
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
    /// Gives prefixes to a peer: [`Changed`].
    RouteAdd {
        /// The peer: `HOST[:PORT]`, or its public key.
        peer: String,
        /// The prefixes.
        prefixes: Vec<IpNet>,
        /// Whether to take them from other peers that have them.
        #[serde(default)]
        replace: bool,
    },
    /// Removes prefixes from the peers that have them: [`Changed`].
    RouteDel {
        /// The prefixes.
        prefixes: Vec<IpNet>,
    },
    /// Adds a peer: [`Changed`].
    PeerAdd {
        /// The peer: `HOST[:PORT]`, or its public key.
        peer: String,
        /// `HOST[:PORT]` of a peer with a key; none to wait until it calls.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        endpoint: Option<String>,
        /// Its prefixes; none for what no prefix matches.
        #[serde(default)]
        prefixes: Vec<IpNet>,
    },
    /// Removes a peer and its prefixes: [`Changed`].
    PeerDel {
        /// The peer: `HOST[:PORT]`, or its public key.
        peer: String,
    },
    /// Reads the configuration file again: [`Reloaded`].
    Reload {
        /// Whether to only say what that would come to.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        dry_run: bool,
    },
    /// Starts the program that is installed by now, which takes over: [`Upgrading`]. What
    /// comes of it, [`Status`] tells.
    Upgrade {},
    /// Copies packets to the one who asks, as [`Capturing`] and what follows it say.
    Capture {
        /// Bytes of each packet that are wanted, at most.
        snaplen_bytes: u32,
    },
    /// Ends the tunnel: [`Changed`].
    Stop {},
    /// Hands the tunnel over to the process that asks.
    Takeover {
        /// The version of what follows.
        protocol: u32,
    },
}

impl Request {
    /// Reads a request's line.
    ///
    /// # Errors
    /// What is wrong with it, in one line of bounded length.
    pub fn read(line: &[u8]) -> Result<Self, String> {
        // serde would take an array for the keys' values in their order.
        if line.trim_ascii_start().first() != Some(&b'{') {
            return Err("expected an object with a `command`".into());
        }
        serde_json::from_slice(line).map_err(|error| {
            // It may quote a key or a value, line feeds and all.
            let one_line = error.to_string().replace(char::is_control, " ");
            shortened(&one_line).into_owned()
        })
    }
}

/// A capture has begun. Behind the line follow frames ([`crate::capture::frame`]), until the
/// connection is closed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capturing {
    /// Version of the program.
    pub version: String,
    /// Name of the TUN device.
    pub tun: String,
    /// Number of workers.
    pub workers: u16,
    /// Bytes of each packet that come, at most.
    pub snaplen_bytes: u32,
}

/// Shortest snapshot length: all headers of a TCP packet over IPv6, with all options.
pub const SNAPLEN_BYTES_MIN: u32 = 128;

/// Longest snapshot length: the longest packet.
pub const SNAPLEN_BYTES_MAX: u32 = 65535;

/// All peers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Peers {
    /// As that of [`Status`].
    #[serde(default)]
    pub boottime_ns: Option<u64>,
    /// In the order of their names.
    pub peers: Vec<PeerStatus>,
}

/// A peer, in numbers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerStatus {
    /// `HOST:PORT` as it was given, or a public key.
    pub peer: String,
    /// What there is of a peer with a key besides; none of a plain one.
    #[serde(default)]
    pub wireguard: Option<WireGuardStatus>,
    /// Where datagrams go; none while its name does not resolve.
    pub endpoint: Option<SocketAddr>,
    /// A port that it lately sent from, if that is neither the one that it was
    /// given nor one of its workers' own.
    #[serde(default)]
    pub seen_port: Option<u16>,
    /// How many workers send to it from their own ports.
    #[serde(default)]
    pub own_ports_proven: usize,
    /// Whether nothing is sent there, as the path leads through the tunnel itself.
    #[serde(default)]
    pub is_suspended: bool,
    /// `config`, `runtime` or `registry`.
    pub origin: String,
    /// Seconds until its lease in the registry ends if it does not renew it; none if it has
    /// none, or etcd did not say.
    #[serde(default)]
    pub lease_left_seconds: Option<u64>,
    /// Whether it takes what no prefix matches.
    pub is_default: bool,
    /// Number of its prefixes.
    pub prefixes: usize,
    /// MTU of the path to it in bytes, as far as the kernel knows it.
    pub path_mtu_bytes: Option<u32>,
    /// Packets sent to it, which the kernel took.
    pub packets_sent: u64,
    /// Bytes of those packets.
    pub bytes_sent: u64,
    /// Packets that were to be sent to it, those among them that were dropped after all: unlike
    /// `packets_sent`, it only grows.
    #[serde(default)]
    pub packets_enqueued: u64,
    /// Bytes of those packets.
    #[serde(default)]
    pub bytes_enqueued: u64,
    /// Packets received from it.
    pub packets_received: u64,
    /// Bytes of those packets.
    pub bytes_received: u64,
    /// Seconds since something came from it; none if nothing has.
    pub last_seen_seconds: Option<u64>,
    /// How it is doing; none while that is not known, as of one that need not send anything.
    #[serde(default)]
    pub state: Option<Liveness>,
    /// Why it is unreachable.
    #[serde(default)]
    pub state_reason: Option<String>,
    /// Packets to and from it that were dropped, by reason; zeros are left out.
    #[serde(default)]
    pub drops: BTreeMap<String, u64>,
}

/// How a peer is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Liveness {
    /// Something has come from it lately.
    Alive,
    /// Nothing comes from it that should.
    Silent,
    /// Its host or a router has said by ICMP that nothing gets there, or there is no route.
    Unreachable,
}

/// A peer with a key, which is its name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WireGuardStatus {
    /// What its key follows from, if that is a secret that all hosts share.
    #[serde(default)]
    pub identity: Option<String>,
    /// Whether a preshared key protects it besides.
    pub has_preshared_key: bool,
    /// Seconds between packets that keep a NAT's mapping alive; none if there are none.
    pub persistent_keepalive_seconds: Option<u64>,
    /// Seconds since the latest handshake; none if there was none.
    pub latest_handshake_seconds: Option<u64>,
}

/// All prefixes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Routes {
    /// In the order of their addresses.
    pub routes: Vec<RouteEntry>,
}

/// A prefix and its peer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RouteEntry {
    /// The prefix.
    pub prefix: IpNet,
    /// The peer's `HOST:PORT` as it was given, or its public key.
    pub peer: String,
    /// The peer's address; none while its name does not resolve.
    pub endpoint: Option<SocketAddr>,
    /// `config`, `runtime` or `registry`.
    pub origin: String,
}

/// Where packets to an address go.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Found {
    /// The address.
    pub address: IpAddr,
    /// The longest prefix that matches; none if the peer takes the rest.
    pub prefix: Option<IpNet>,
    /// The peer's `HOST:PORT` as it was given, or its public key.
    pub peer: String,
    /// The peer's address; none while its name does not resolve.
    pub endpoint: Option<SocketAddr>,
}

/// What a change came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Changed {
    /// Prefixes that are new to their peer.
    pub prefixes_added: usize,
    /// Prefixes that are gone.
    pub prefixes_removed: usize,
    /// Peers that are new.
    pub peers_added: usize,
    /// Peers that are gone.
    pub peers_removed: usize,
    /// Peers of which other than prefixes has changed: endpoint, preshared key, keepalive.
    #[serde(default)]
    pub peers_changed: usize,
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

impl Reloaded {
    /// In words, after those about the `changes` of peers and prefixes.
    pub(crate) fn words(&self, changes: String) -> String {
        let mut words = vec![changes];
        if !self.settings_changed.is_empty() {
            words.push(format!("changed: {}", self.settings_changed.join(", ")));
        }
        words.retain(|part| !part.is_empty());
        if words.is_empty() {
            words.push("nothing has changed".into());
        }
        if !self.needs_restart.is_empty() {
            words.push(format!(
                "at the next start: {}",
                self.needs_restart.join(", ")
            ));
        }
        words.join("; ")
    }
}

/// An upgrade that has begun.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Upgrading {
    /// Process id of the new process.
    pub pid: u32,
}

/// An answer to a request that was done.
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
    /// To [`Request::Upgrade`].
    Upgrading(Upgrading),
    /// To [`Request::Capture`].
    Capturing(Capturing),
}

/// A line of the control socket: an answer with `"ok":true`, or an error with `"ok":false`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Line {
    ok: bool,
    #[serde(flatten)]
    answer: Option<Answer>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

impl From<crate::error::Result<Answer>> for Line {
    fn from(result: crate::error::Result<Answer>) -> Self {
        let error = result.as_ref().err().map(ToString::to_string);
        Self {
            ok: error.is_none(),
            answer: result.ok(),
            error,
        }
    }
}

#[cfg(test)]
mod tests;
