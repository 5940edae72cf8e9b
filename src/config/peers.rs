//! What must hold among all peers, wherever they came from.

use std::collections::{HashMap, HashSet};

use ipnet::IpNet;

use super::peer::{HostPort, PeerName, PeerSpec};
use super::types::is_host;
use crate::error::{Error, Result};

/// Most peers: workers number them in 16 bits, and need some numbers for
/// themselves.
pub(crate) const PEERS_MAX: usize = 65_000;

/// Makes sure that no peer and no prefix is there twice, that one peer at most is
/// without prefixes, that each may be a host, and that all have keys if the tunnel
/// `is_encrypted`, and none has if not; `None` where that is not known yet.
///
/// # Errors
/// Names the two peers, and the prefix.
pub(super) fn check_peers(peers: &[PeerSpec], is_encrypted: Option<bool>) -> Result<()> {
    let refuse = |what: String, hint: &str| Err(Error::new(what).hint(hint));
    if peers.len() > PEERS_MAX {
        let what = format!("{} peers are more than {PEERS_MAX}", peers.len());
        return refuse(what, "leave some out");
    }
    let mut ids = HashSet::with_capacity(peers.len());
    let mut prefixes = HashMap::new();
    let mut without_prefixes: Option<&PeerName> = None;
    for peer in peers {
        let name = &peer.name;
        if let Some(is_encrypted) = is_encrypted {
            check_mode(name, is_encrypted)?;
        }
        let endpoint = peer.endpoint.as_ref().and_then(HostPort::literal);
        if let Some(endpoint) = endpoint.filter(|endpoint| !is_host(endpoint.ip())) {
            let of_key = name.key().map(|_| format!(": {endpoint}"));
            let of_key = of_key.unwrap_or_default();
            let what = format!("peer {name}{of_key} is not the address of a host");
            return refuse(what, "name the other host");
        }
        if !ids.insert(name.id()) {
            let what = format!("peer {name} is there twice");
            return refuse(what, "name it once, with all its prefixes");
        }
        if peer.prefixes.is_empty()
            && let Some(first) = without_prefixes.replace(name)
        {
            let what = format!("peers {first} and {name} are both without prefixes");
            return refuse(
                what,
                "give one of them its prefixes, as in --peer HOST=PREFIX",
            );
        }
        for prefix in &peer.prefixes {
            check_prefix(prefix)?;
            if let Some(first) = prefixes.insert(prefix, name) {
                let what = format!("{prefix} is given to peer {first} and to peer {name}");
                return refuse(what, "give it to one of them, once");
            }
        }
    }
    Ok(())
}

/// Makes sure that a peer has a key in a tunnel that `is_encrypted`, and none in one that
/// is not: nothing is ever sent in clear by mistake.
///
/// # Errors
/// Names the peer.
pub(crate) fn check_mode(name: &PeerName, is_encrypted: bool) -> Result<()> {
    match (name.key(), is_encrypted) {
        (Some(_), true) | (None, false) => Ok(()),
        (Some(_), false) => {
            let what = format!("peer {name} has a public key, but this host has no private key");
            Err(Error::new(what).hint("give --private-key FILE (`fastvpn genkey` makes one)"))
        }
        (None, true) => {
            let what = format!("peer {name} has no public key, but this host has a private key");
            Err(Error::new(what).hint(
                "put its public key before it, as in KEY@HOST: a tunnel is encrypted as a whole",
            ))
        }
    }
}

/// Makes sure that a prefix has no bits beyond its length.
///
/// # Errors
/// Names the prefix that may be meant.
pub(crate) fn check_prefix(net: &IpNet) -> Result<()> {
    match net.trunc() {
        prefix if prefix == *net => Ok(()),
        prefix => Err(Error::new(format!(
            "{net} has bits beyond the prefix length; did you mean {prefix}?"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::parse_peer;

    fn fault(peers: &[&str]) -> Option<String> {
        let peers: Vec<_> = peers.iter().map(|text| parse_peer(text).unwrap()).collect();
        check_peers(&peers, Some(false))
            .err()
            .map(|error| error.to_string())
    }

    fn fault_has(peers: &[&str], parts: &[&str]) {
        let text = fault(peers).unwrap_or_else(|| panic!("{peers:?} pass"));
        assert!(parts.iter().all(|part| text.contains(part)), "{text}");
    }

    #[test]
    fn each_prefix_has_one_peer() {
        let parts = ["10.1.0.0/16", "peer a:8285", "peer b:8285"];
        fault_has(&["a=10.1.0.0/16", "b=10.2.0.0/16,10.1.0.0/16"], &parts);
        fault_has(&["a=::/0,::/0"], &["::/0", "peer a:8285"]);
        // The longer one wins; that is not a contradiction.
        assert_eq!(fault(&["a=10.1.0.0/16", "b=10.1.0.0/17", "c"]), None);
        assert_eq!(fault(&[]), None);
    }

    #[test]
    fn one_peer_may_take_the_rest() {
        fault_has(&["a", "b=10.0.0.0/8", "c"], &["peers a:8285 and c:8285"]);
    }

    #[test]
    fn each_peer_is_named_once() {
        fault_has(
            &["a=10.0.0.0/8", "A.:8285=10.0.0.0/9"],
            &["A.:8285", "twice"],
        );
        fault_has(
            &["fd00::1", "fd00::0:1=::/0"],
            &["[fd00::0:1]:8285", "twice"],
        );
        assert_eq!(fault(&["a=10.0.0.0/8", "a:1=10.0.0.0/9"]), None);
    }

    #[test]
    fn a_peer_is_a_host() {
        for peer in ["0.0.0.0", "::", "224.0.0.1", "ff02::1", "::ffff:0.0.0.0"] {
            fault_has(&[peer], &["not the address of a host"]);
        }
    }

    #[test]
    fn a_prefix_has_no_bits_beyond_its_length() {
        fault_has(&["a=10.1.2.3/16"], &["10.1.2.3/16", "10.1.0.0/16?"]);
    }

    /// Whether it is plain peers in an encrypted tunnel, or the other way round.
    #[test]
    fn all_have_keys_or_none_has() {
        let key = format!("{}=", "A".repeat(43));
        let check = |texts: &[&str], is_encrypted| {
            let read = |text: &&str| parse_peer(text).unwrap();
            let peers: Vec<_> = texts.iter().map(read).collect();
            let checked = check_peers(&peers, Some(is_encrypted));
            checked.map_err(|error| error.to_string())
        };
        assert_eq!(check(&[&key], true), Ok(()));
        let refused = check(&[&key], false).unwrap_err();
        for part in [&key, "no private key", "--private-key", "genkey"] {
            assert!(refused.contains(part), "{refused}");
        }
        let refused = check(&["a=10.1.0.0/16", &key], true).unwrap_err();
        for part in ["a:8285", "no public key", "KEY@HOST"] {
            assert!(refused.contains(part), "{refused}");
        }
        let twice = [&format!("{key}@a=10.1.0.0/16")[..], &format!("{key}@b")];
        assert!(check(&twice, true).unwrap_err().contains("twice"));
        let nowhere = check(&[&format!("{key}@0.0.0.0")], true).unwrap_err();
        for part in [&key, "0.0.0.0:8285 is not the address of a host"] {
            assert!(nowhere.contains(part), "{nowhere}");
        }
    }

    #[test]
    fn their_number_is_bounded() {
        let peer = |number: usize| parse_peer(&format!("p{number}=10.0.0.{}/32", number % 256));
        let peers: Vec<_> = (0..=PEERS_MAX)
            .map(|number| peer(number).unwrap())
            .collect();
        let text = check_peers(&peers, Some(false)).unwrap_err().to_string();
        assert!(text.contains("65001") && text.contains("65000"), "{text}");
    }
}
