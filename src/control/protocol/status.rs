//! What `status` answers.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

/// The tunnel, in numbers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Version of the program.
    pub version: String,
    /// Process id.
    pub pid: u32,
    /// Seconds since the process began to carry packets.
    pub uptime_seconds: u64,
    /// When the counters were read, in nanoseconds of the host's `CLOCK_BOOTTIME`; none of
    /// earlier versions.
    #[serde(default)]
    pub boottime_ns: Option<u64>,
    /// Name of the TUN device.
    pub tun: String,
    /// Its index; none while it is in another network namespace.
    #[serde(default)]
    pub tun_index: Option<u32>,
    /// Its addresses.
    pub addresses: Vec<IpNet>,
    /// Its MTU in bytes.
    pub mtu_bytes: u32,
    /// Address and port of the UDP sockets.
    pub listen: String,
    /// The workers' own ports. Each sends from its own to peers that it is known to
    /// reach from there.
    #[serde(default)]
    pub own_ports: Vec<u16>,
    /// This host's public key; none in plain mode.
    #[serde(default)]
    pub public_key: Option<String>,
    /// What the handshake thread counts; empty in plain mode.
    #[serde(default)]
    pub handshakes: BTreeMap<String, u64>,
    /// I/O engine, in words.
    pub engine: String,
    /// Offloads, in words.
    pub offloads: String,
    /// How packets wait for a socket to have room, as `--aqm` takes it.
    #[serde(default)]
    pub aqm: String,
    /// How many bytes a socket holds before packets wait, as `--queue-limit` takes it.
    #[serde(default)]
    pub queue_limit: String,
    /// Whether the tunnel counts as an IP hop.
    pub hop: bool,
    /// Whether the prefixes are kept as kernel routes.
    pub keeps_routes: bool,
    /// The configuration file, if there is one.
    pub config_file: Option<String>,
    /// Why the last reload changed nothing, if it did not.
    pub reload_error: Option<String>,
    /// Why the last upgrade left this process running, if it did.
    #[serde(default)]
    pub upgrade_error: Option<String>,
    /// The registry that the tunnel is in, if there is one.
    #[serde(default)]
    pub registry: Option<RegistryStatus>,
    /// Number of peers.
    pub peers: usize,
    /// Number of prefixes.
    pub prefixes: usize,
    /// Counters of all workers together, without drops.
    pub counters: BTreeMap<String, u64>,
    /// Packets dropped, by reason; zeros are left out.
    pub drops: BTreeMap<String, u64>,
    /// Packets that found the TUN queue full, as the kernel counts them; none while it does not
    /// tell, as while the device is in another network namespace.
    #[serde(default)]
    pub tun_queue_drops: Option<u64>,
    /// Counters of each worker, drops included.
    pub workers: Vec<BTreeMap<String, u64>>,
    /// Who captures packets, if somebody does.
    #[serde(default)]
    pub capture: Option<CaptureStatus>,
}

/// Somebody who captures packets.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CaptureStatus {
    /// The process id; 0 if it is in a PID namespace that cannot be seen.
    pub pid: i32,
    /// The user.
    pub uid: u32,
    /// Seconds since the capture began.
    pub seconds: u64,
    /// Packets copied so far.
    pub packets: u64,
    /// Packets that were not copied, as there was no room.
    pub lost: u64,
}

/// The registry that a tunnel is in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegistryStatus {
    /// The member of etcd that this host is connected to, or was last.
    pub url: String,
    /// Whether it is connected now.
    pub is_connected: bool,
    /// Why not, if something failed.
    #[serde(default)]
    pub error: Option<String>,
    /// What somebody has to do something about.
    #[serde(default)]
    pub alarm: Option<String>,
    /// Whether the network's configuration is not the one that this host runs by.
    pub is_config_changed: bool,
    /// The cluster's identity, in hexadecimal digits.
    pub cluster: String,
    /// The last revision known.
    pub revision: i64,
    /// All hosts' containers are in it.
    pub network: IpNet,
    /// This host's subnet.
    pub subnet: IpNet,
    /// This host's address in the registry.
    pub public_ip: IpAddr,
    /// Seconds that this host's lease lasts after it is renewed.
    #[serde(default)]
    pub lease_ttl_seconds: Option<i64>,
    /// Seconds since it was renewed.
    #[serde(default)]
    pub lease_renewed_seconds: Option<u64>,
    /// Hosts in the registry, this one among them.
    pub hosts: usize,
    /// Hosts that are kept although the registry does not know them.
    pub held: usize,
    /// Keys and values that cannot be read.
    pub malformed: usize,
    /// Hosts, and prefixes besides their subnets, that are not allowed.
    pub not_allowed: usize,
    /// Subnets outside the network, and prefixes of others.
    pub out_of_place: usize,
    /// Hosts with another backend.
    pub other_backend: usize,
    /// Connections that were made, from each of which all of the registry was listed.
    #[serde(default)]
    pub connections: u64,
    /// Changes of keys that etcd has reported since.
    #[serde(default)]
    pub events: u64,
}
