//! Requests, read line by line.

use std::net::IpAddr;
use std::time::Duration;

use ipnet::IpNet;
use nix::errno::Errno;
use zeroize::Zeroizing;

use crate::config::{HostPort, PEERS_MAX};
use crate::wire::wireguard::keys::{KEY_BYTES, PresharedKey, PrivateKey, PublicKey};

/// Most allowed IPs in one request, over all peers: bounds the memory that it takes.
const ALLOWED_IPS_MAX: usize = 1_000_000;

/// Longest name of a network interface, which may be an address's zone (`IFNAMSIZ` without its
/// zero).
const ZONE_BYTES_MAX: usize = 15;

/// What somebody wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// All that there is to say of the tunnel.
    Get,
    /// A change, as a whole or not at all.
    Set(Box<Set>),
}

/// What is to be different. What is `None` stays as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Set {
    /// This host's key; `Some(None)` for none.
    pub(crate) private_key: Option<Option<PrivateKey>>,
    /// The UDP port; 0 for any.
    pub(crate) listen_port: Option<u16>,
    /// The mark of the datagrams (`SO_MARK`); 0 for none.
    pub(crate) firewall_mark: Option<u32>,
    /// All peers go first.
    pub(crate) replaces_peers: bool,
    /// Peers, in the request's order. One may be there more than once.
    pub(crate) peers: Vec<PeerChange>,
}

/// What is to be different of a peer. One that is not there is added.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PeerChange {
    pub(crate) public_key: PublicKey,
    /// It is removed, and all else that is said of it does not matter.
    pub(crate) is_removed: bool,
    /// It is not added if it is not there.
    pub(crate) updates_only: bool,
    /// Zeros for none.
    pub(crate) preshared_key: Option<PresharedKey>,
    /// An address, with its zone if it needs one; never a DNS name.
    pub(crate) endpoint: Option<HostPort>,
    /// `Some(None)`: nothing is sent to keep a NAT's mapping alive.
    pub(crate) persistent_keepalive: Option<Option<Duration>>,
    /// All its allowed IPs go first.
    pub(crate) replaces_allowed_ips: bool,
    /// In the request's order.
    pub(crate) allowed_ips: Vec<AllowedIp>,
}

/// A prefix that is given to a peer, whoever has it now, or taken from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct AllowedIp {
    pub(crate) prefix: IpNet,
    /// Taken, if it has it.
    pub(crate) is_removed: bool,
}

impl PeerChange {
    /// Nothing is to be different yet.
    pub(crate) fn new(public_key: PublicKey) -> Self {
        Self {
            public_key,
            is_removed: false,
            updates_only: false,
            preshared_key: None,
            endpoint: None,
            persistent_keepalive: None,
            replaces_allowed_ips: false,
            allowed_ips: Vec::new(),
        }
    }
}

/// Reads one request. After the first line that it does not understand, it ignores the rest.
#[derive(Debug, Default)]
pub struct Parser {
    request: Option<Request>,
    allowed_ips: usize,
    error: Option<Errno>,
}

impl Parser {
    /// Reads a line, without its line feed. An empty one ends the request, and is not given.
    pub fn take(&mut self, line: &[u8]) {
        if self.error.is_none() {
            self.error = self.read(line).err();
        }
    }

    /// What all lines together say.
    ///
    /// # Errors
    /// `EINVAL` for what is not understood, `E2BIG` for too much at once.
    pub fn finish(self) -> Result<Request, Errno> {
        match (self.error, self.request) {
            (None, Some(request)) => Ok(request),
            (error, _) => Err(error.unwrap_or(Errno::EINVAL)),
        }
    }

    fn read(&mut self, line: &[u8]) -> Result<(), Errno> {
        let text = std::str::from_utf8(line).ok();
        let pair = text.and_then(|text| text.split_once('='));
        let (key, value) = pair.ok_or(Errno::EINVAL)?;
        let Some(request) = &mut self.request else {
            self.request = Some(match (key, value) {
                ("get", "1") => Request::Get,
                ("set", "1") => Request::Set(Box::default()),
                _ => return Err(Errno::EINVAL),
            });
            return Ok(());
        };
        let Request::Set(set) = request else {
            return Err(Errno::EINVAL);
        };
        if key == "public_key" {
            if set.peers.len() >= PEERS_MAX {
                return Err(Errno::E2BIG);
            }
            let key = PublicKey(*self::key(value)?);
            set.peers.push(PeerChange::new(key));
            return Ok(());
        }
        match set.peers.last_mut() {
            None => set_device(set, key, value),
            Some(peer) => {
                if key == "allowed_ip" {
                    self.allowed_ips += 1;
                    if self.allowed_ips > ALLOWED_IPS_MAX {
                        return Err(Errno::E2BIG);
                    }
                }
                set_peer(peer, key, value)
            }
        }
    }
}

/// Reads a request that is there as a whole.
#[cfg(test)]
pub(super) fn parse(text: &[u8]) -> Result<Request, Errno> {
    let mut parser = Parser::default();
    let lines = text.split(|byte| *byte == b'\n');
    for line in lines.take_while(|line| !line.is_empty()) {
        parser.take(line);
    }
    parser.finish()
}

fn set_device(set: &mut Set, key: &str, value: &str) -> Result<(), Errno> {
    match key {
        "private_key" => {
            let bytes = self::key(value)?;
            let is_key = *bytes != [0; KEY_BYTES];
            set.private_key = Some(is_key.then(|| PrivateKey::from_bytes(&bytes)));
        }
        "listen_port" => set.listen_port = Some(number(value)?),
        "fwmark" => set.firewall_mark = Some(number(value)?),
        "replace_peers" => set.replaces_peers = is_true(value)?,
        _ => return Err(Errno::EINVAL),
    }
    Ok(())
}

fn set_peer(peer: &mut PeerChange, key: &str, value: &str) -> Result<(), Errno> {
    match key {
        "remove" => peer.is_removed = is_true(value)?,
        "update_only" => peer.updates_only = is_true(value)?,
        "preshared_key" => {
            peer.preshared_key = Some(PresharedKey::from_bytes(&*self::key(value)?));
        }
        "endpoint" => peer.endpoint = Some(endpoint(value)?),
        "persistent_keepalive_interval" => {
            let seconds: u16 = number(value)?;
            let every = Duration::from_secs(seconds.into());
            peer.persistent_keepalive = Some((seconds > 0).then_some(every));
        }
        "replace_allowed_ips" => peer.replaces_allowed_ips = is_true(value)?,
        "allowed_ip" => peer.allowed_ips.push(allowed_ip(value)?),
        "protocol_version" if value == "1" => {}
        _ => return Err(Errno::EINVAL),
    }
    Ok(())
}

/// A key in hexadecimal.
fn key(text: &str) -> Result<Zeroizing<[u8; KEY_BYTES]>, Errno> {
    let mut key = Zeroizing::new([0; KEY_BYTES]);
    if text.len() != 2 * KEY_BYTES {
        return Err(Errno::EINVAL);
    }
    for (byte, digits) in key.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
        for digit in digits {
            let value = char::from(*digit).to_digit(16).ok_or(Errno::EINVAL)?;
            *byte = *byte << 4 | value as u8;
        }
    }
    Ok(key)
}

/// A number in decimal digits alone.
fn number<T: std::str::FromStr>(text: &str) -> Result<T, Errno> {
    let is_digits = text.bytes().all(|byte| byte.is_ascii_digit());
    let value = text.parse().ok().filter(|_| is_digits);
    value.ok_or(Errno::EINVAL)
}

fn is_true(text: &str) -> Result<bool, Errno> {
    match text {
        "true" => Ok(true),
        _ => Err(Errno::EINVAL),
    }
}

/// `ADDRESS:PORT`, `[ADDRESS]:PORT`, or `[ADDRESS%ZONE]:PORT`.
fn endpoint(text: &str) -> Result<HostPort, Errno> {
    let (host, port) = text.rsplit_once(':').ok_or(Errno::EINVAL)?;
    let bracketed = host
        .strip_prefix('[')
        .and_then(|rest| rest.strip_suffix(']'));
    let host = bracketed.unwrap_or(host);
    let (address, zone) = match host.split_once('%') {
        Some((address, zone)) => (address, Some(zone)),
        None => (host, None),
    };
    let is_address = match address.parse() {
        Ok(IpAddr::V4(_)) => bracketed.is_none() && zone.is_none(),
        Ok(IpAddr::V6(_)) => bracketed.is_some() && zone.is_none_or(is_zone),
        Err(_) => false,
    };
    let port = number(port)?;
    match is_address && port > 0 {
        true => Ok(HostPort {
            host: host.into(),
            port,
        }),
        false => Err(Errno::EINVAL),
    }
}

fn is_zone(text: &str) -> bool {
    let is_bad = |c: char| c.is_whitespace() || c.is_control() || "/=,[]@%".contains(c);
    (1..=ZONE_BYTES_MAX).contains(&text.len()) && !text.contains(is_bad)
}

/// `[-]ADDRESS/LENGTH`. Bits beyond the length do not count.
fn allowed_ip(text: &str) -> Result<AllowedIp, Errno> {
    let (text, is_removed) = match text.strip_prefix('-') {
        Some(rest) => (rest, true),
        None => (text, false),
    };
    let prefix: IpNet = text.parse().map_err(|_| Errno::EINVAL)?;
    Ok(AllowedIp {
        prefix: prefix.trunc(),
        is_removed,
    })
}
