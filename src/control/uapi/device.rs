//! What there is to say of a tunnel, as text.

use std::fmt::Write;
use std::net::SocketAddr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ipnet::IpNet;
use nix::errno::Errno;
use zeroize::Zeroizing;

use crate::wire::wireguard::keys::{KEY_BYTES, PresharedKey, PrivateKey, PublicKey};

/// Bytes that the lines take at most: of the tunnel itself and the end, of a peer without its
/// allowed IPs, and of each of these.
const DEVICE_BYTES_MAX: usize = 256;
const PEER_BYTES_MAX: usize = 512;
const ALLOWED_IP_BYTES_MAX: usize = 64;

/// A tunnel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Device {
    pub(crate) private_key: Option<PrivateKey>,
    /// The UDP port.
    pub(crate) listen_port: u16,
    /// The mark of the datagrams; 0 for none.
    pub(crate) firewall_mark: u32,
    pub(crate) peers: Vec<Peer>,
}

/// One of its peers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Peer {
    pub(crate) public_key: PublicKey,
    pub(crate) preshared_key: PresharedKey,
    pub(crate) endpoint: Option<SocketAddr>,
    pub(crate) latest_handshake: Option<SystemTime>,
    pub(crate) bytes_sent: u64,
    pub(crate) bytes_received: u64,
    pub(crate) persistent_keepalive: Option<Duration>,
    pub(crate) allowed_ips: Vec<IpNet>,
}

impl Device {
    /// The answer to `get=1`.
    pub(crate) fn to_text(&self) -> Zeroizing<String> {
        // As much as there may be, so that no copy is left behind when it grows.
        let of_peer = |peer: &Peer| PEER_BYTES_MAX + ALLOWED_IP_BYTES_MAX * peer.allowed_ips.len();
        let bytes = DEVICE_BYTES_MAX + self.peers.iter().map(of_peer).sum::<usize>();
        let mut text = Zeroizing::new(String::with_capacity(bytes));
        if let Some(key) = &self.private_key {
            push_key(&mut text, "private_key", key.as_bytes());
        }
        push(&mut text, "listen_port", self.listen_port);
        if self.firewall_mark != 0 {
            push(&mut text, "fwmark", self.firewall_mark);
        }
        for peer in &self.peers {
            peer.push_to(&mut text);
        }
        text.push_str("errno=0\n\n");
        debug_assert!(text.len() <= bytes);
        text
    }
}

impl Peer {
    fn push_to(&self, text: &mut String) {
        push_key(text, "public_key", self.public_key.as_bytes());
        push_key(text, "preshared_key", self.preshared_key.as_bytes());
        push(text, "protocol_version", 1);
        if let Some(endpoint) = self.endpoint {
            push(text, "endpoint", resolvable(endpoint));
        }
        // A clock may have been before 1970.
        let since = |at: SystemTime| at.duration_since(UNIX_EPOCH).ok();
        let handshake = self.latest_handshake.and_then(since).unwrap_or_default();
        push(text, "last_handshake_time_sec", handshake.as_secs());
        push(text, "last_handshake_time_nsec", handshake.subsec_nanos());
        push(text, "tx_bytes", self.bytes_sent);
        push(text, "rx_bytes", self.bytes_received);
        let every = self.persistent_keepalive.unwrap_or_default();
        push(text, "persistent_keepalive_interval", every.as_secs());
        for prefix in &self.allowed_ips {
            push(text, "allowed_ip", prefix);
        }
    }
}

/// Why a request was not done, or `errno=0`.
pub(crate) fn refusal(errno: Option<Errno>) -> String {
    // Negative, as wg(8) and the kernel have it.
    format!("errno={}\n\n", errno.map_or(0, |errno| -(errno as i32)))
}

fn push(text: &mut String, key: &str, value: impl std::fmt::Display) {
    // Writing to a string does not fail.
    let _ = writeln!(text, "{key}={value}");
}

fn push_key(text: &mut String, name: &str, key: &[u8; KEY_BYTES]) {
    text.push_str(name);
    text.push('=');
    for nibble in key.iter().flat_map(|byte| [byte >> 4, byte & 0xf]) {
        text.push(char::from_digit(nibble.into(), 16).unwrap_or('0'));
    }
    text.push('\n');
}

/// The same without a zone where none belongs: some versions of wg(8) crash over an address
/// that does not resolve.
fn resolvable(mut endpoint: SocketAddr) -> SocketAddr {
    if let SocketAddr::V6(v6) = &mut endpoint
        && !v6.ip().is_unicast_link_local()
    {
        v6.set_scope_id(0);
    }
    endpoint
}
