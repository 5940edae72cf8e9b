//! The forwarding table: which peer a packet goes to, and which peers may send.
//!
//! Workers hold a read-only snapshot; the control thread replaces it as a
//! whole.

use std::net::{IpAddr, SocketAddr};

use crate::packet::train::NextHop;

/// A far end of the tunnel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Where its datagrams go.
    pub endpoint: SocketAddr,
}

/// A snapshot of all peers.
#[derive(Clone, Debug)]
pub struct Table {
    peers: Vec<Peer>,
    /// Addresses that peers send from, sorted.
    senders: Vec<IpAddr>,
}

impl Table {
    /// A table of `peers`. The first takes all destinations: prefixes are not
    /// configurable yet.
    pub fn new(peers: Vec<Peer>) -> Self {
        let mut senders: Vec<IpAddr> = peers.iter().map(|peer| peer.endpoint.ip()).collect();
        senders.sort_unstable();
        senders.dedup();
        Self { peers, senders }
    }

    /// The next hop for an inner destination address.
    #[inline]
    pub fn next_hop(&self, _destination: IpAddr) -> Option<(NextHop, SocketAddr)> {
        self.peers.first().map(|peer| (0, peer.endpoint))
    }

    /// Whether datagrams from `address` may enter. The source port says
    /// nothing: a peer's workers send from several.
    #[inline]
    pub fn is_sender(&self, address: IpAddr) -> bool {
        self.senders.binary_search(&address).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn knows_its_senders() {
        let peer = |text: &str| Peer {
            endpoint: text.parse().unwrap(),
        };
        let table = Table::new(vec![peer("10.0.0.2:8285"), peer("[fd00::2]:8285")]);
        assert!(table.is_sender("10.0.0.2".parse().unwrap()));
        assert!(table.is_sender("fd00::2".parse().unwrap()));
        assert!(!table.is_sender("10.0.0.3".parse().unwrap()));
        let (hop, endpoint) = table.next_hop("10.244.1.1".parse().unwrap()).unwrap();
        assert_eq!((hop, endpoint), (0, "10.0.0.2:8285".parse().unwrap()));
        assert!(
            Table::new(vec![])
                .next_hop("10.0.0.1".parse().unwrap())
                .is_none()
        );
    }
}
