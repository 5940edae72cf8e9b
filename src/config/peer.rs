//! Another host: what it is known by, where it is to be found, and what else is said of
//! it.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use ipnet::IpNet;
use serde::{Deserialize, Deserializer};

use super::types::{self, DEFAULT_PORT, ParseResult, parse_prefix, split_port};
use crate::error::shortened;
use crate::packet::ip::canonical;
use crate::wire::wireguard::keys::{KEY_FORM, PresharedKey, PublicKey};

/// Characters of a key in base64, of which the last is a `=`. No host has one.
const KEY_CHARS: usize = 44;

/// A DNS name (RFC 1035, section 2.3.4), or an IPv6 address with its zone.
const HOST_BYTES_MAX: usize = 255;

/// A host to resolve and a UDP port, as they were given.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct HostPort {
    /// Address or DNS name.
    pub host: String,
    /// UDP port.
    pub port: u16,
}

impl HostPort {
    /// The address, if the host is one; `None` for a DNS name, and for an IPv6
    /// address with a zone, as in `fe80::1%eth0`, which the resolver reads.
    pub(crate) fn literal(&self) -> Option<SocketAddr> {
        let ip: IpAddr = self.host.parse().ok()?;
        Some(canonical(SocketAddr::new(ip, self.port)))
    }
}

impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

/// What a peer is called, wherever it is spoken of.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum PeerName {
    /// A plain peer is where it is found.
    Host(HostPort),
    /// A peer with a key is whoever has it, and may be anywhere.
    Key(PublicKey),
}

/// Equal if two names mean the same peer.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PeerId {
    /// An address and a port.
    Address(IpAddr, u16),
    /// A DNS name in one spelling, and a port.
    Host(String, u16),
    /// A key.
    Key(PublicKey),
}

impl PeerName {
    /// Equal if two names mean the same peer: the case of a DNS name and the dot at
    /// its end do not matter (RFC 4343, RFC 1034), nor how an address is written.
    pub(crate) fn id(&self) -> PeerId {
        let place = match self {
            Self::Host(place) => place,
            Self::Key(key) => return PeerId::Key(*key),
        };
        if let Some(address) = place.literal() {
            return PeerId::Address(address.ip(), address.port());
        }
        let name = place.host.strip_suffix('.').unwrap_or(&place.host);
        PeerId::Host(name.to_ascii_lowercase(), place.port)
    }

    /// The key of a peer that has one.
    pub(crate) fn key(&self) -> Option<PublicKey> {
        match self {
            Self::Host(_) => None,
            Self::Key(key) => Some(*key),
        }
    }
}

impl fmt::Display for PeerName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Host(place) => place.fmt(f),
            Self::Key(key) => key.fmt(f),
        }
    }
}

/// A peer and its prefixes, as they are configured.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "PeerTable")]
pub struct PeerSpec {
    /// What it is called.
    pub name: PeerName,
    /// Where its datagrams go at first. A plain peer always has one, which is its name;
    /// one with a key is else waited for.
    pub endpoint: Option<HostPort>,
    /// What its keys follow from, together with a secret that all hosts share.
    pub identity: Option<String>,
    /// Inner addresses that it has; none for whatever no peer's prefixes match.
    pub prefixes: Vec<IpNet>,
    /// File with a secret that both ends share besides their keys.
    pub preshared_key_file: Option<PathBuf>,
    /// What that file says, once it has been read.
    pub preshared_key: PresharedKey,
    /// How often something is sent, to keep a NAT's mapping alive.
    pub persistent_keepalive: Option<Duration>,
}

impl PeerSpec {
    /// A peer of which no more is known than its name and where it is.
    pub(crate) fn new(name: PeerName, endpoint: Option<HostPort>) -> Self {
        Self {
            name,
            endpoint,
            identity: None,
            prefixes: Vec::new(),
            preshared_key_file: None,
            preshared_key: PresharedKey::default(),
            persistent_keepalive: None,
        }
    }
}

/// A `[[peer]]` table of the configuration file.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct PeerTable {
    #[serde(default, deserialize_with = "public_key")]
    public_key: Option<PublicKey>,
    #[serde(default, deserialize_with = "endpoint")]
    endpoint: Option<HostPort>,
    #[serde(default, deserialize_with = "identity")]
    identity: Option<String>,
    #[serde(default, deserialize_with = "types::prefixes")]
    prefixes: Vec<IpNet>,
    preshared_key_file: Option<PathBuf>,
    #[serde(default, deserialize_with = "keepalive")]
    persistent_keepalive: Option<Duration>,
}

impl TryFrom<PeerTable> for PeerSpec {
    type Error = String;

    fn try_from(table: PeerTable) -> ParseResult<Self> {
        let identity = table.identity.as_ref();
        let name = match (table.public_key, &table.endpoint, identity) {
            (Some(_), _, Some(_)) => {
                return Err(
                    "`identity` stands for the peer's `public-key`: give one of them".into(),
                );
            }
            (Some(key), ..) => PeerName::Key(key),
            (None, Some(endpoint), _) => PeerName::Host(endpoint.clone()),
            // Until the key is known that follows from it.
            (None, None, Some(identity)) => PeerName::Host(HostPort {
                host: identity.clone(),
                port: DEFAULT_PORT,
            }),
            (None, None, None) => {
                return Err("a peer needs `endpoint`, `public-key`, or both".into());
            }
        };
        let options = [
            ("preshared-key-file", table.preshared_key_file.is_some()),
            (
                "persistent-keepalive",
                table.persistent_keepalive.is_some() && identity.is_none(),
            ),
        ];
        if table.public_key.is_none()
            && let Some((option, _)) = options.iter().find(|(_, is_given)| *is_given)
        {
            return Err(match (*option, identity) {
                // It follows from the shared secret.
                ("preshared-key-file", Some(_)) => {
                    format!("`{option}` contradicts `identity`: leave one of them out")
                }
                ("persistent-keepalive", _) => format!(
                    "`{option}` needs the peer's `public-key`, or with a secret-file its `identity`"
                ),
                _ => format!("`{option}` needs the peer's `public-key`"),
            });
        }
        Ok(Self {
            prefixes: table.prefixes,
            identity: table.identity,
            preshared_key_file: table.preshared_key_file,
            persistent_keepalive: table.persistent_keepalive,
            ..Self::new(name, table.endpoint)
        })
    }
}

/// `HOST[:PORT]`.
pub(crate) fn parse_host_port(text: &str) -> ParseResult<HostPort> {
    // First, so that no text of any length is quoted.
    if text.len() > HOST_BYTES_MAX + "[]:65535".len() {
        return Err(format!("a host has at most {HOST_BYTES_MAX} bytes"));
    }
    let (host, port) = split_port(text)?;
    let is_bad = |c: char| c.is_whitespace() || c.is_control() || "/=,[]@".contains(c);
    if host.is_empty() || host.contains(is_bad) {
        return Err("expected an address or a DNS name, and a port if it is not 8285".into());
    }
    let (address, zone) = host.split_once('%').unwrap_or((host, "none"));
    let is_ipv6 = !zone.is_empty() && address.parse::<Ipv6Addr>().is_ok();
    if host.contains([':', '%']) && !is_ipv6 {
        return Err(format!("{host:?} is not an IPv6 address"));
    }
    Ok(HostPort {
        host: host.to_string(),
        port,
    })
}

/// Splits a key off the beginning of a text. What follows it begins with `@` or `=`, if
/// there is anything, so no text about a plain peer is taken for one.
fn split_key(text: &str) -> Option<(PublicKey, &str)> {
    let (key, rest) = text.split_at_checked(KEY_CHARS)?;
    let is_end = rest.is_empty() || rest.starts_with(['@', '=']);
    Some((key.parse().ok().filter(|_| is_end)?, rest))
}

/// `HOST[:PORT]`, or a public key.
pub(crate) fn parse_peer_name(text: &str) -> ParseResult<PeerName> {
    match split_key(text) {
        Some((key, "")) => Ok(PeerName::Key(key)),
        Some(_) => Err("a peer with a key is named by that alone".into()),
        None => parse_host_port(text).map(PeerName::Host),
    }
}

/// `HOST[:PORT][=PREFIX[,PREFIX…]]`, or `KEY[@HOST[:PORT]][=PREFIX[,PREFIX…]]`.
pub(crate) fn parse_peer(text: &str) -> ParseResult<PeerSpec> {
    let (key, rest) = match (split_key(text), text.split_once('@')) {
        (Some((key, rest)), _) => (Some(key), rest),
        // No host has one.
        (None, Some((bad, _))) => {
            let bad = shortened(bad);
            return Err(format!("{bad:?} is not a public key: expected {KEY_FORM}"));
        }
        (None, None) => (None, text),
    };
    let (place, prefixes) = match rest.split_once('=') {
        None => (rest, Vec::new()),
        Some((place, list)) => {
            let prefix = |text| parse_prefix(text).map_err(|why| format!("{text:?}: {why}"));
            let prefixes: ParseResult<_> = list.split(',').map(prefix).collect();
            (place, prefixes?)
        }
    };
    let (name, endpoint) = match (key, place.strip_prefix('@')) {
        (Some(key), None) => (PeerName::Key(key), None),
        (Some(key), Some(place)) => (PeerName::Key(key), Some(parse_host_port(place)?)),
        (None, _) => {
            let endpoint = parse_host_port(place)?;
            (PeerName::Host(endpoint.clone()), Some(endpoint))
        }
    };
    Ok(PeerSpec {
        prefixes,
        ..PeerSpec::new(name, endpoint)
    })
}

/// Seconds, or `off`.
pub(super) fn parse_keepalive(text: &str) -> ParseResult<Option<Duration>> {
    match (text, text.parse::<u16>()) {
        ("off", _) | (_, Ok(0)) => Ok(None),
        (_, Ok(seconds)) => Ok(Some(Duration::from_secs(seconds.into()))),
        _ => Err(format!("expected off, or 1 to {} seconds", u16::MAX)),
    }
}

/// A host's identity in one spelling: an address, or a name in lower case.
pub(super) fn parse_identity(text: &str) -> ParseResult<String> {
    let is_bad = |c: char| c.is_whitespace() || c.is_control() || "/=,[]@".contains(c);
    if text.is_empty() || text.len() > HOST_BYTES_MAX || text.contains(is_bad) {
        return Err(format!(
            "expected a name or an address of 1 to {HOST_BYTES_MAX} bytes"
        ));
    }
    Ok(identity_at(text))
}

/// The identity of a host that is found there, unless another is given.
pub(super) fn identity_at(host: &str) -> String {
    let (host, port) = (host.to_string(), DEFAULT_PORT);
    match PeerName::Host(HostPort { host, port }).id() {
        PeerId::Address(address, _) => address.to_string(),
        PeerId::Host(host, _) => host,
        PeerId::Key(key) => key.to_string(),
    }
}

pub(super) fn identity<'de, D: Deserializer<'de>>(key: D) -> Result<Option<String>, D::Error> {
    types::from_text(key, parse_identity).map(Some)
}

fn endpoint<'de, D: Deserializer<'de>>(key: D) -> Result<Option<HostPort>, D::Error> {
    types::from_text(key, parse_host_port).map(Some)
}

fn public_key<'de, D: Deserializer<'de>>(key: D) -> Result<Option<PublicKey>, D::Error> {
    let parse = |text: &str| {
        let key = text.parse::<PublicKey>();
        key.map_err(|_| format!("expected a public key: {KEY_FORM}"))
    };
    types::from_text(key, parse).map(Some)
}

fn keepalive<'de, D: Deserializer<'de>>(key: D) -> Result<Option<Duration>, D::Error> {
    types::from_text(key, parse_keepalive)
}

#[cfg(test)]
#[path = "peer_tests.rs"]
mod tests;
