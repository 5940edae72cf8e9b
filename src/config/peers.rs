//! What must hold among all peers, wherever they came from.

use std::collections::{HashMap, HashSet};

use super::types::PeerSpec;
use crate::error::{Error, Result};

/// Most peers: workers number them in 16 bits, and need some numbers for
/// themselves.
pub(crate) const PEERS_MAX: usize = 65_000;

/// What is wrong, and with which of the peers.
#[derive(Debug)]
pub(super) struct Fault {
    /// Index of the peer.
    pub peer: usize,
    /// Index of its prefix, if it is that.
    pub prefix: Option<usize>,
    /// The fault, and what to do about it.
    pub error: Error,
}

/// Makes sure that no endpoint and no prefix is there twice, that one peer at
/// most is without prefixes, and that each may be a host.
///
/// # Errors
/// Names the two peers, and the prefix.
pub(super) fn check_peers(peers: &[PeerSpec]) -> Result<()> {
    find_fault(peers).map_or(Ok(()), |fault| Err(fault.error))
}

pub(super) fn find_fault(peers: &[PeerSpec]) -> Option<Fault> {
    let fault = |peer, prefix, what: String, hint: &str| {
        let error = Error::new(what).hint(hint);
        Some(Fault {
            peer,
            prefix,
            error,
        })
    };
    if peers.len() > PEERS_MAX {
        let what = format!("{} times --peer: {PEERS_MAX} is the most", peers.len());
        return fault(PEERS_MAX, None, what, "leave some out");
    }
    let mut endpoints = HashSet::with_capacity(peers.len());
    let mut prefixes = HashMap::new();
    let mut without_prefixes: Option<&PeerSpec> = None;
    for (index, peer) in peers.iter().enumerate() {
        let endpoint = &peer.name;
        let ip = endpoint.literal().map(|address| address.ip());
        if ip.is_some_and(|ip| ip.is_unspecified() || ip.is_multicast()) {
            let what = format!("--peer {endpoint} is not the address of a host");
            return fault(index, None, what, "name the other host");
        }
        if !endpoints.insert(endpoint.key()) {
            let what = format!("--peer {endpoint} is there twice");
            return fault(index, None, what, "name it once, with all its prefixes");
        }
        if peer.prefixes.is_empty()
            && let Some(first) = without_prefixes.replace(peer)
        {
            let what = format!(
                "--peer {} and --peer {endpoint} are both without prefixes",
                first.name
            );
            let hint = format!("say which goes where, as in --peer {endpoint}=PREFIX");
            return fault(index, None, what, &hint);
        }
        for (position, &prefix) in peer.prefixes.iter().enumerate() {
            if let Some(first) = prefixes.insert(prefix, endpoint) {
                let what = format!("{prefix} is given to --peer {first} and to --peer {endpoint}");
                return fault(index, Some(position), what, "give it to one of them, once");
            }
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::parse::parse_peer;

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
        let parts = ["10.1.0.0/16", "--peer a:8285", "--peer b:8285"];
        fault_has(&["a=10.1.0.0/16", "b=10.2.0.0/16,10.1.0.0/16"], &parts);
        fault_has(&["a=::/0,::/0"], &["::/0", "--peer a:8285"]);
        // The longer one wins; that is no contradiction.
        assert_eq!(fault(&["a=10.1.0.0/16", "b=10.1.0.0/17", "c"]), None);
        assert_eq!(fault(&[]), None);
    }

    #[test]
    fn one_peer_may_take_the_rest() {
        fault_has(
            &["a", "b=10.0.0.0/8", "c"],
            &["--peer a:8285", "--peer c:8285"],
        );
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
    fn their_number_is_bounded() {
        let peer = |number: usize| parse_peer(&format!("p{number}=10.0.0.{}/32", number % 256));
        let peers: Vec<_> = (0..=PEERS_MAX)
            .map(|number| peer(number).unwrap())
            .collect();
        let text = check_peers(&peers).unwrap_err().to_string();
        assert!(text.contains("65001") && text.contains("65000"), "{text}");
    }
}
