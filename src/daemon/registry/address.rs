//! Which of this host's addresses leads to the other hosts, by flannel's options and in its order.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use regex_lite::Regex;

use crate::config::Config;
use crate::error::{Error, Result};
use crate::host::netlink::Netlink;
use crate::host::path::{self, Source};
use crate::registry::access::Access;

/// An address that nobody has (RFC 5737): where the default route leads.
const ELSEWHERE: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1));

/// An interface's name, and an address that it has.
type Candidate = (String, Ipv4Addr);

/// This host's address toward the other hosts.
///
/// # Errors
/// When the options lead to no address of this host, or its routes to none.
pub(super) fn local_address(
    config: &Config,
    access: &Access,
    netlink: &mut Netlink,
) -> Result<Ipv4Addr> {
    let own = candidates(netlink)?;
    let source = Source {
        listen: Ipv4Addr::UNSPECIFIED.into(),
        mark: config.fwmark,
    };
    let toward = |far: IpAddr| match path::local_address(source, SocketAddr::new(far, 9)) {
        Ok(IpAddr::V4(address)) if !address.is_loopback() => Some(address),
        _ => None,
    };
    let reach = config.iface_can_reach;
    if !config.iface.is_empty() || !config.iface_regex.is_empty() || reach.is_some() {
        let found = by_options(config, &own).or_else(|| toward(reach?.into()));
        return found.ok_or_else(|| no_match(config));
    }
    let is_own = |address: &Ipv4Addr| own.iter().any(|(_, other)| other == address);
    if let Some(public_ip) = config.public_ip.filter(is_own) {
        return Ok(public_ip);
    }
    let mut far = std::iter::once(ELSEWHERE).chain(access.addresses());
    far.find_map(toward).ok_or_else(|| {
        let what = "cannot tell this host's address: there is no default route";
        Error::new(what).hint("give --public-ip or --iface")
    })
}

/// All IPv4 addresses of this host, in the kernel's order.
fn candidates(netlink: &mut Netlink) -> Result<Vec<Candidate>> {
    let mut all = Vec::new();
    for (index, net) in netlink.addresses()? {
        if let (IpAddr::V4(address), Some(link)) = (net.addr(), netlink.link_by_index(index)?) {
            all.push((link.name, address));
        }
    }
    Ok(all)
}

/// The first address that `--iface` names, or `--iface-regex` matches.
fn by_options(config: &Config, own: &[Candidate]) -> Option<Ipv4Addr> {
    let named = |iface: &String| {
        let given: Option<Ipv4Addr> = iface.parse().ok();
        let mut own = own.iter();
        own.find(|(name, address)| name == iface || given == Some(*address))
    };
    // One that only this host can reach is never meant by a pattern.
    let usable = |address: &Ipv4Addr| !address.is_loopback() && !address.is_link_local();
    let matching = |regex: &String| {
        // It was read when the options were.
        let regex = Regex::new(regex).ok()?;
        let all = || own.iter().filter(|(_, address)| usable(address));
        let by_address = all().find(|(_, address)| regex.is_match(&address.to_string()));
        by_address.or_else(|| all().find(|(name, _)| regex.is_match(name)))
    };
    let mut named = config.iface.iter().filter_map(named);
    let mut matching = config.iface_regex.iter().filter_map(matching);
    let found = named.next().or_else(|| matching.next());
    found.map(|(_, address)| *address)
}

fn no_match(config: &Config) -> Error {
    let all = config.iface.iter().chain(&config.iface_regex).cloned();
    let all = all.chain(config.iface_can_reach.map(|far| far.to_string()));
    let what = format!(
        "no IPv4 address of this host is what --iface, --iface-regex or --iface-can-reach says: {}",
        all.collect::<Vec<_>>().join(", ")
    );
    Error::new(what).hint("`ip -4 address` lists them")
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;

    use super::*;

    #[test]
    fn options_are_tried_in_order() {
        let own = [
            ("lo", "127.0.0.1"),
            ("eth0", "10.0.0.2"),
            ("eth1", "10.1.0.2"),
            ("eth1", "192.168.7.2"),
        ];
        let own = own.map(|(name, address)| (name.to_string(), address.parse().unwrap()));
        for (flags, expected) in [
            ("", None),
            ("--iface eth1", Some("10.1.0.2")),
            ("--iface 192.168.7.2", Some("192.168.7.2")),
            ("--iface eth9 --iface eth0 --iface eth1", Some("10.0.0.2")),
            ("--iface eth9", None),
            ("--iface 10.0.0.9", None),
            // An address goes before a name, and what is named before both.
            ("--iface-regex ^192[.]168", Some("192.168.7.2")),
            ("--iface-regex ^eth|^192", Some("192.168.7.2")),
            (
                "--iface-regex ^wl --iface-regex ^eth[1-9]",
                Some("10.1.0.2"),
            ),
            ("--iface-regex .*", Some("10.0.0.2")),
            ("--iface-regex ^lo$", None),
            ("--iface eth1 --iface-regex ^eth0", Some("10.1.0.2")),
            ("--iface eth9 --iface-regex ^eth0", Some("10.0.0.2")),
        ] {
            let flags = format!("--registry http://127.0.0.1:2379 {flags}");
            let config = Config::from_words(flags.split_whitespace().map(OsStr::new)).unwrap();
            let expected = expected.map(|address| address.parse().unwrap());
            assert_eq!(by_options(&config, &own), expected, "{flags}");
        }
        let bad = ["--registry", "http://a", "--iface-regex", "["];
        assert!(Config::from_words(bad.map(OsStr::new)).is_err());
    }
}
