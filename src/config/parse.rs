//! Readers of the values of flags and keys. Each says in one line what is wrong
//! with a text that it does not take.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use ipnet::IpNet;

use super::types::{BusyPoll, CoreList, DEFAULT_PORT, Listen, PeerName, PeerSpec};

/// A value, or what is wrong with the text.
pub(super) type ParseResult<T> = Result<T, String>;

/// Longest host: a DNS name (RFC 1035, section 2.3.4), or an IPv6 address with
/// its zone.
const HOST_BYTES_MAX: usize = 255;

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

pub(crate) fn parse_peer_name(text: &str) -> ParseResult<PeerName> {
    // First of all, so that nothing of any length is said again.
    if text.len() > HOST_BYTES_MAX + "[]:65535".len() {
        return Err(format!("a host has at most {HOST_BYTES_MAX} bytes"));
    }
    let (host, port) = split_port(text)?;
    let bad =
        |c: char| c.is_whitespace() || c.is_control() || matches!(c, '/' | '=' | ',' | '[' | ']');
    if host.is_empty() || host.len() > HOST_BYTES_MAX || host.contains(bad) {
        return Err("expected an address or a DNS name, and a port if it is not 8285".into());
    }
    if (host.contains(':') || host.contains('%')) && !is_ipv6(host) {
        return Err(format!("{host:?} is no IPv6 address"));
    }
    Ok(PeerName {
        host: host.to_string(),
        port,
    })
}

/// Whether a host is an IPv6 address, with its zone or without.
fn is_ipv6(host: &str) -> bool {
    let (address, has_zone) = match host.split_once('%') {
        Some((address, zone)) => (address, !zone.is_empty()),
        None => (host, true),
    };
    has_zone && address.parse::<Ipv6Addr>().is_ok()
}

pub(crate) fn parse_listen(text: &str) -> ParseResult<Listen> {
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

/// `HOST[:PORT][=PREFIX[,PREFIX…]]`.
pub(crate) fn parse_peer(text: &str) -> ParseResult<PeerSpec> {
    let (name, prefixes) = match text.split_once('=') {
        None => (text, Vec::new()),
        Some((name, "")) => {
            return Err(format!("expected prefixes after {name}="));
        }
        Some((name, list)) => {
            let prefix = |text| parse_route(text).map_err(|error| format!("{text:?}: {error}"));
            let prefixes: ParseResult<_> = list.split(',').map(prefix).collect();
            (name, prefixes?)
        }
    };
    Ok(PeerSpec {
        name: parse_peer_name(name)?,
        prefixes,
    })
}

/// What the kernel takes as an interface name (`dev_valid_name`).
pub(crate) fn parse_tun_name(text: &str) -> ParseResult<String> {
    let bad = |c: char| c.is_whitespace() || c.is_control() || matches!(c, '/' | ':' | '%');
    if text.is_empty() || text.len() > 15 || text.contains(bad) || text == "." || text == ".." {
        return Err("expected 1 to 15 characters without /, :, % and spaces".into());
    }
    Ok(text.to_string())
}

fn parse_cidr(text: &str, example: &str) -> ParseResult<IpNet> {
    if let Ok(address) = text.parse::<IpAddr>() {
        return Ok(IpNet::from(address));
    }
    text.parse()
        .map_err(|_| format!("expected ADDRESS/LENGTH, such as {example}"))
}

pub(crate) fn parse_address(text: &str) -> ParseResult<IpNet> {
    let net = parse_cidr(text, "10.244.2.2/24")?;
    let address = net.addr();
    if address.is_unspecified() || address.is_multicast() {
        return Err(format!("{address} is not the address of a host"));
    }
    Ok(net)
}

pub(crate) fn parse_route(text: &str) -> ParseResult<IpNet> {
    checked_route(parse_cidr(text, "10.244.2.0/24")?)
}

/// A prefix as it is, unless it is an address with a length.
pub(crate) fn checked_route(net: IpNet) -> ParseResult<IpNet> {
    match net.trunc() {
        prefix if prefix == net => Ok(net),
        prefix => Err(format!(
            "bits beyond the prefix length; did you mean {prefix}?"
        )),
    }
}

pub(crate) fn parse_cores(text: &str) -> ParseResult<CoreList> {
    const CORES_MAX: usize = 4096;
    let number = |digits: &str| match digits.trim().parse::<usize>() {
        Ok(core) if core < CORES_MAX => Ok(core),
        _ => Err(format!("{digits:?} is no core number")),
    };
    let mut cores = Vec::new();
    for part in text.split(',') {
        let range = match part.split_once('-') {
            None => number(part).map(|core| core..=core)?,
            Some((first, last)) => number(first)?..=number(last)?,
        };
        if range.is_empty() {
            return Err(format!("{part:?} counts down"));
        }
        // Ranges of a few characters each may be repeated without end.
        if cores.len() + range.clone().count() > CORES_MAX {
            return Err(format!("the list has more than {CORES_MAX} cores"));
        }
        cores.extend(range);
    }
    Ok(CoreList(cores))
}

pub(crate) fn parse_busy_poll(text: &str) -> ParseResult<BusyPoll> {
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

    #[test]
    fn reads_peers_and_gives_their_text_back() {
        let peer = parse_peer("vpn.example.org:99=10.1.0.0/16,fd00:1::/64").unwrap();
        assert_eq!(
            (&peer.name.host[..], peer.name.port),
            ("vpn.example.org", 99)
        );
        assert_eq!(peer.prefixes.len(), 2);
        for (text, shown) in [
            ("10.0.0.2", "10.0.0.2:8285"),
            ("fd00::1=10.1.2.3", "[fd00::1]:8285=10.1.2.3/32"),
            ("[fe80::1%eth0]:9=::/0", "[fe80::1%eth0]:9=::/0"),
            (
                "a.example:9=10.1.0.0/16,10.2.0.0/16",
                "a.example:9=10.1.0.0/16,10.2.0.0/16",
            ),
        ] {
            let peer = parse_peer(text).unwrap();
            assert_eq!(peer.to_string(), shown);
            assert_eq!(parse_peer(shown), Ok(peer));
        }
        let bits = parse_peer("10.0.0.2=10.1.2.3/16").unwrap_err();
        assert!(
            bits.contains("10.1.2.3/16") && bits.contains("10.1.0.0/16"),
            "{bits}"
        );
        for bad in [
            "=10.1.0.0/16",
            "a=",
            "a=10.1.0.0/16,",
            "a=b",
            "a=10.1.0.0/33",
            "a,b",
            "[a]]",
            "a%eth0",
            "10.0.0.2%eth0",
            "a:%eth0:b",
            "[fe80::1%]",
        ] {
            assert!(parse_peer(bad).is_err(), "{bad:?}");
        }
        // What is too long is not said again.
        let long = "9".repeat(1 << 20);
        for long in [long.clone(), format!("a:{long}"), format!("[a]{long}")] {
            assert!(parse_peer_name(&long).unwrap_err().len() < 100);
        }
    }

    #[test]
    fn reads_endpoints() {
        let parse = |text: &str| parse_peer_name(text).map(|e| (e.host, e.port));
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
