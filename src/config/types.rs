//! What can be said of a tunnel: addresses and choices, and how each is written.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use clap::ValueEnum;
use ipnet::IpNet;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;
use zeroize::Zeroizing;

/// Default UDP port, that of flannel's udp backend.
pub const DEFAULT_PORT: u16 = 8285;

/// A value, or what is wrong with its text.
pub(crate) type ParseResult<T> = Result<T, String>;

/// A password. It is wiped when it goes, and never shown.
#[derive(Clone, PartialEq, Eq)]
pub struct Password(pub(crate) Zeroizing<String>);

impl fmt::Debug for Password {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(hidden)")
    }
}

/// How the workers do their I/O.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
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
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Feature {
    /// TCP segmentation offload on the TUN device
    Tso,
    /// UDP segmentation offload on the TUN device
    Uso,
    /// UDP_SEGMENT on the UDP socket
    UdpSegment,
    /// UDP_GRO on the UDP socket
    UdpGro,
}

/// How long a worker polls for arrivals before it sleeps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub enum BusyPoll {
    /// Not at all.
    Off,
    /// As long as has lately been worth it, while there is little traffic.
    #[default]
    Auto,
    /// This long after the last arrival.
    For(Duration),
}

/// How many bytes a socket holds before packets wait outside it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub enum QueueLimit {
    /// As few as keep the link busy.
    #[default]
    Auto,
    /// This many.
    Bytes(usize),
}

/// As the option takes it.
impl fmt::Display for QueueLimit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Bytes(bytes) => write!(f, "{bytes}"),
        }
    }
}

/// How packets wait for a socket to have room.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Aqm {
    /// By flows that take turns, none of which may wait for long (RFC 8290)
    #[default]
    #[value(name = "fq_codel")]
    FqCodel,
    /// All in one queue
    Off,
}

/// As the option takes it.
impl fmt::Display for Aqm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::FqCodel => "fq_codel",
            Self::Off => "off",
        })
    }
}

/// The DSCP of datagrams.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize)]
pub enum Dscp {
    /// 0: what is inside is nobody's business
    #[default]
    #[value(name = "0")]
    Zero,
    /// That of the packet inside
    Inherit,
}

/// Core numbers, in the order of the workers that get them; empty for no pinning.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct CoreList(pub Vec<usize>);

/// Splits `host:port`, `[v6]:port`, or a host alone.
pub(super) fn split_port(text: &str) -> ParseResult<(&str, u16)> {
    let (host, port) = match text.strip_prefix('[') {
        Some(rest) => rest
            .split_once(']')
            .ok_or("the closing bracket is missing")?,
        // More than one colon and no brackets: an IPv6 address.
        None if text.matches(':').count() != 1 => (text, ""),
        None => text.split_at(text.find(':').unwrap_or(text.len())),
    };
    if port.is_empty() {
        return Ok((host, DEFAULT_PORT));
    }
    match port.strip_prefix(':').and_then(|port| port.parse().ok()) {
        Some(port) if port > 0 => Ok((host, port)),
        _ => Err(format!("{port:?} is not a UDP port: expected :1 to :65535")),
    }
}

/// An address of this host, and the port unless it is the default one.
pub(super) fn parse_listen(text: &str) -> ParseResult<SocketAddr> {
    let (host, port) = split_port(text)?;
    let ip = host.parse::<IpAddr>();
    let ip = ip.map_err(|_| format!("{host:?} is not an IP address of this host"))?;
    Ok(SocketAddr::new(ip, port))
}

/// Where metrics are served: an address of this host and a port, or a port of the loopback
/// interface.
pub(super) fn parse_metrics(text: &str) -> ParseResult<SocketAddr> {
    let port = text.strip_prefix(':').unwrap_or(text);
    let is_number = !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit());
    let place = match is_number {
        true => port
            .parse()
            .ok()
            .map(|port| (Ipv4Addr::LOCALHOST, port).into()),
        false => text.parse().ok(),
    };
    place
        .filter(|place: &SocketAddr| place.port() > 0)
        .ok_or_else(|| "expected a TCP port, or ADDRESS:PORT such as 10.0.0.1:9285".into())
}

/// `http://HOST:PORT`, or the same with `https`.
pub(super) fn parse_url(text: &str) -> ParseResult<String> {
    let host = ["http://", "https://"]
        .iter()
        .find_map(|scheme| text.strip_prefix(scheme));
    let host = host.map(|host| host.strip_suffix('/').unwrap_or(host));
    let is_bad = |c: char| c.is_control() || c.is_whitespace() || "/@?#,".contains(c);
    match host.filter(|host| !host.is_empty() && !host.contains(is_bad)) {
        Some(_) => Ok(text.trim_end_matches('/').to_string()),
        None => Err("expected a URL such as https://10.0.0.1:2379".into()),
    }
}

/// A regular expression, as text.
pub(super) fn parse_regex(text: &str) -> ParseResult<String> {
    match regex_lite::Regex::new(text) {
        Ok(_) => Ok(text.into()),
        Err(error) => Err(format!("expected a regular expression: {error}")),
    }
}

/// `ADDRESS/LENGTH`, or an address alone with all its bits.
pub(crate) fn parse_prefix(text: &str) -> ParseResult<IpNet> {
    match text.parse::<IpAddr>() {
        Ok(address) => Ok(address.into()),
        Err(_) => text
            .parse()
            .map_err(|_| "expected ADDRESS/LENGTH, such as 10.244.2.0/24".into()),
    }
}

/// Whether a host can have this address.
pub(super) fn is_host(ip: IpAddr) -> bool {
    !ip.is_unspecified() && !ip.is_multicast()
}

/// What the kernel takes as an interface name (`dev_valid_name`).
pub(crate) fn parse_tun_name(text: &str) -> ParseResult<String> {
    let is_bad = |c: char| c.is_whitespace() || c.is_control() || "/:%".contains(c);
    if !(1..=15).contains(&text.len()) || text.contains(is_bad) || [".", ".."].contains(&text) {
        return Err("expected 1 to 15 characters without /, :, % and spaces".into());
    }
    Ok(text.to_string())
}

/// A name that stands alone: not an address that belongs to a flag.
pub(super) fn parse_interface(text: &str) -> ParseResult<String> {
    if text.parse::<IpAddr>().is_ok() {
        return Err("an address is not the name of an interface; each peer takes a --peer".into());
    }
    parse_tun_name(text)
}

/// Numbers and ranges, as in `0,2-3`.
pub(super) fn parse_cores(text: &str) -> ParseResult<CoreList> {
    /// Ranges of a few characters each could be repeated without end.
    const CORES_MAX: usize = 4096;
    let mut cores = Vec::new();
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let ends = first
            .trim()
            .parse::<u16>()
            .ok()
            .zip(last.trim().parse().ok());
        let Some((first, last)) = ends.filter(|(first, last)| first <= last) else {
            return Err(format!("{part:?} is not a core number or a range of them"));
        };
        cores.extend((first..=last).map(usize::from));
        if cores.len() > CORES_MAX {
            return Err(format!("the list has more than {CORES_MAX} cores"));
        }
    }
    Ok(CoreList(cores))
}

pub(super) fn parse_busy_poll(text: &str) -> ParseResult<BusyPoll> {
    const US_MAX: u64 = 1_000_000;
    match (text, text.parse()) {
        ("off", _) | (_, Ok(0)) => Ok(BusyPoll::Off),
        ("auto", _) => Ok(BusyPoll::Auto),
        (_, Ok(us @ 1..=US_MAX)) => Ok(BusyPoll::For(Duration::from_micros(us))),
        _ => Err(format!("expected off, auto, or 1 to {US_MAX} microseconds")),
    }
}

pub(super) fn parse_queue_limit(text: &str) -> ParseResult<QueueLimit> {
    // A packet of an Ethernet's MTU, as the kernel counts it; a whole receive buffer.
    const BYTES: std::ops::RangeInclusive<usize> = 2304..=8 << 20;
    match (text, text.parse()) {
        ("auto", _) => Ok(QueueLimit::Auto),
        (_, Ok(bytes)) if BYTES.contains(&bytes) => Ok(QueueLimit::Bytes(bytes)),
        _ => Err(format!(
            "expected auto, or {} to {} bytes",
            BYTES.start(),
            BYTES.end()
        )),
    }
}

/// A mark of the kernel's (`SO_MARK`); 0 or `off` for none.
pub(super) fn parse_fwmark(text: &str) -> ParseResult<u32> {
    let hex = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X"));
    let mark = match hex {
        _ if text.starts_with('+') => None,
        Some(digits) if !digits.starts_with('+') => u32::from_str_radix(digits, 16).ok(),
        Some(_) => None,
        None if text == "off" => Some(0),
        None => text.parse().ok(),
    };
    mark.ok_or_else(|| "expected off, or 32 bits as a number such as 51820 or 0xca6c".into())
}

/// Reads a key of the configuration file as the flag's text is read.
pub(super) fn from_text<'de, D, T>(key: D, read: fn(&str) -> ParseResult<T>) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
{
    let text = match Value::deserialize(key)? {
        Value::String(text) => text,
        other => other.to_string(),
    };
    read(&text).map_err(|why| D::Error::custom(format!("{text:?}: {why}")))
}

pub(super) fn listen<'de, D: Deserializer<'de>>(key: D) -> Result<Option<SocketAddr>, D::Error> {
    from_text(key, parse_listen).map(Some)
}

pub(super) fn metrics<'de, D: Deserializer<'de>>(key: D) -> Result<Option<SocketAddr>, D::Error> {
    from_text(key, parse_metrics).map(Some)
}

pub(super) fn cores<'de, D: Deserializer<'de>>(key: D) -> Result<CoreList, D::Error> {
    from_text(key, parse_cores)
}

pub(super) fn busy_poll<'de, D: Deserializer<'de>>(key: D) -> Result<BusyPoll, D::Error> {
    from_text(key, parse_busy_poll)
}

pub(super) fn queue_limit<'de, D: Deserializer<'de>>(key: D) -> Result<QueueLimit, D::Error> {
    from_text(key, parse_queue_limit)
}

pub(super) fn dscp<'de, D: Deserializer<'de>>(key: D) -> Result<Dscp, D::Error> {
    from_text(key, |text| Dscp::from_str(text, false))
}

pub(super) fn fwmark<'de, D: Deserializer<'de>>(key: D) -> Result<u32, D::Error> {
    from_text(key, parse_fwmark)
}

fn prefix<'de, D: Deserializer<'de>>(key: D) -> Result<IpNet, D::Error> {
    from_text(key, parse_prefix)
}

pub(super) fn regexes<'de, D: Deserializer<'de>>(key: D) -> Result<Vec<String>, D::Error> {
    #[derive(Deserialize)]
    struct Regex(#[serde(deserialize_with = "regex")] String);
    let regexes = Vec::<Regex>::deserialize(key)?;
    Ok(regexes.into_iter().map(|Regex(text)| text).collect())
}

fn regex<'de, D: Deserializer<'de>>(key: D) -> Result<String, D::Error> {
    from_text(key, parse_regex)
}

pub(super) fn prefixes<'de, D: Deserializer<'de>>(key: D) -> Result<Vec<IpNet>, D::Error> {
    #[derive(Deserialize)]
    struct Prefix(#[serde(deserialize_with = "prefix")] IpNet);
    let prefixes = Vec::<Prefix>::deserialize(key)?;
    Ok(prefixes.into_iter().map(|Prefix(net)| net).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listen_addresses_are_read() {
        let parse = |text: &str| parse_listen(text).map(|address| address.to_string());
        assert_eq!(parse("10.0.0.1"), Ok("10.0.0.1:8285".into()));
        assert_eq!(parse("[::]:9"), Ok("[::]:9".into()));
        assert_eq!(parse("fd00::1"), Ok("[fd00::1]:8285".into()));
        assert!(parse("localhost").is_err());
        assert!(parse("10.0.0.1:0").is_err());
    }

    #[test]
    fn places_of_metrics_are_read() {
        let parse = |text: &str| parse_metrics(text).map(|address| address.to_string());
        for (text, place) in [
            ("9285", "127.0.0.1:9285"),
            (":9285", "127.0.0.1:9285"),
            ("0.0.0.0:9285", "0.0.0.0:9285"),
            ("[::1]:9285", "[::1]:9285"),
        ] {
            assert_eq!(parse(text), Ok(place.into()));
        }
        for bad in [
            "",
            ":",
            "0",
            "+1",
            "65536",
            "localhost:9285",
            "10.0.0.1",
            "10.0.0.1:0",
            "::1",
        ] {
            assert!(parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn marks_are_read() {
        for (text, mark) in [
            ("0", 0),
            ("off", 0),
            ("51820", 51820),
            ("0xCa6c", 51820),
            ("0xffffffff", u32::MAX),
        ] {
            assert_eq!(parse_fwmark(text), Ok(mark), "{text}");
        }
        for bad in [
            "",
            "0x",
            "-1",
            "+1",
            "0x+1",
            "4294967296",
            "0x100000000",
            "ca6c",
        ] {
            assert!(parse_fwmark(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn cores_tun_names_and_prefixes_are_read() {
        assert_eq!(parse_cores("0,2-4"), Ok(CoreList(vec![0, 2, 3, 4])));
        for bad in ["", "a", "3-1", "0-99999", "-1"] {
            assert!(parse_cores(bad).is_err(), "{bad:?}");
        }
        assert_eq!(parse_cores("0-4095").unwrap().0.len(), 4096);
        for long in ["0-4095,0", "0-4095,0-4095", &"7,".repeat(4097)] {
            assert!(parse_cores(long).unwrap_err().contains("more than 4096"));
        }
        for bad in [
            "sixteen-letters-",
            "a/b",
            "",
            "with space",
            ".",
            "..",
            "a\0b",
        ] {
            assert!(parse_tun_name(bad).is_err(), "{bad:?}");
        }
        assert!(parse_tun_name("flannel99").is_ok());
        assert!(parse_tun_name("fifteen-letters").is_ok());
        let prefix = |text: &str| parse_prefix(text).map(|prefix| prefix.to_string());
        assert_eq!(prefix("10.1.0.0/16"), Ok("10.1.0.0/16".into()));
        assert_eq!(prefix("fd00::2"), Ok("fd00::2/128".into()));
        assert!(prefix("default").is_err());
    }
}
