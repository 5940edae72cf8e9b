//! What must hold among all peers, wherever they came from.

use std::collections::{HashMap, HashSet};

use ipnet::IpNet;

use super::types::{PeerName, PeerSpec, is_host};
use crate::error::{Error, Result};

/// Most peers: workers number them in 16 bits, and need some numbers for
/// themselves.
pub(crate) const PEERS_MAX: usize = 65_000;

/// Makes sure that no peer and no prefix is there twice, that one peer at most is
/// without prefixes, and that each may be a host.
///
/// # Errors
/// Names the two peers, and the prefix.
pub(super) fn check_peers(peers: &[PeerSpec]) -> Result<()> {
    let refuse = |what: String, hint: &str| Err(Error::new(what).hint(hint));
    if peers.len() > PEERS_MAX {
        let what = format!("{} peers are more than {PEERS_MAX}", peers.len());
        return refuse(what, "leave some out");
    }
    let mut names = HashSet::with_capacity(peers.len());
    let mut prefixes = HashMap::new();
    let mut without_prefixes: Option<&PeerName> = None;
    for PeerSpec {
        name,
        prefixes: its,
    } in peers
    {
        if name.literal().is_some_and(|peer| !is_host(peer.ip())) {
            let what = format!("peer {name} is not the address of a host");
            return refuse(what, "name the other host");
        }
        if !names.insert(name.key()) {
            let what = format!("peer {name} is there twice");
            return refuse(what, "name it once, with all its prefixes");
        }
        if its.is_empty()
            && let Some(first) = without_prefixes.replace(name)
        {
            let what = format!("peers {first} and {name} are both without prefixes");
            return refuse(
                what,
                "give one of them its prefixes, as in --peer HOST=PREFIX",
            );
        }
        for prefix in its {
            check_prefix(prefix)?;
            if let Some(first) = prefixes.insert(prefix, name) {
                let what = format!("{prefix} is given to peer {first} and to peer {name}");
                return refuse(what, "give it to one of them, once");
            }
        }
    }
    Ok(())
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
        check_peers(&peers).err().map(|error| error.to_string())
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
        // The longer one wins; that is no contradiction.
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

    #[test]
    fn their_number_is_bounded() {
        let peer = |number: usize| parse_peer(&format!("p{number}=10.0.0.{}/32", number % 256));
        let peers: Vec<_> = (0..=PEERS_MAX)
            .map(|number| peer(number).unwrap())
            .collect();
        let text = check_peers(&peers).unwrap_err().to_string();
        assert!(text.contains("65001") && text.contains("65000"), "{text}");
    }
}
