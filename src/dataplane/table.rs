//! The forwarding table: which peer a packet goes to, and what each peer may
//! send.
//!
//! Workers hold a read-only snapshot; the control thread replaces it as a
//! whole ([`super::WorkerCommand::Table`]), so nothing in a packet's way waits for a
//! change, and no packet sees half of one.
//!
//! # State that outlives a snapshot
//!
//! What workers write to belongs to a peer and not to a snapshot of it: it is
//! behind an [`Arc`] that the control thread makes with the peer, keeps, and puts
//! into each snapshot that has the peer in it. So it lives as long as the peer
//! does, no new table resets it, and the peer's going ends it when the last worker
//! has let go of the last such table. Workers change it by atomics alone.
//!
//! That is what is counted, [`PeerSnapshot::traffic`], and in WireGuard mode
//! [`PeerSnapshot::sessions`] with the endpoint as it roams. A session that begins or ends is
//! no new snapshot: the handshake thread puts it where all workers find it at once.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use crate::counters::PeerCounters;
use crate::packet::batch::NextHop;
use crate::packet::icmp::TunnelAddresses;
use crate::packet::ip::Version;
use crate::packet::lpm::Prefixes;
use crate::wire::plain::Senders;
use crate::wire::wireguard::sessions::PeerSessions;

/// Smallest MTU of any IPv6 link (RFC 8200, section 5): packets of this length
/// are carried whatever the path, in fragments if need be.
const IPV6_MTU_BYTES_MIN: usize = 1280;

/// A far end of the tunnel, as workers see it.
#[derive(Clone, Debug, Default)]
pub struct PeerSnapshot {
    /// Where its datagrams go; `None` while its name does not resolve, or while
    /// they would come back into the tunnel. Not of a peer with [`Self::sessions`].
    pub endpoint: Option<SocketAddr>,
    /// In WireGuard mode: its sessions, and the endpoint as it roams.
    pub sessions: Option<Arc<PeerSessions>>,
    /// The path to it leads through the tunnel itself.
    pub is_suspended: bool,
    /// Longest inner packet that reaches it in one piece: the path MTU less
    /// the outer headers.
    pub mtu_bytes: usize,
    /// Whether longer ones are fragmented on their way, so that they arrive.
    pub is_fragmented: bool,
    /// What each worker has carried to and from it, by the worker's index.
    pub traffic: Arc<[PeerCounters]>,
}

impl PeerSnapshot {
    /// Where its datagrams go now, if anywhere.
    #[inline]
    pub fn endpoint_in_use(&self) -> Option<SocketAddr> {
        match &self.sessions {
            Some(_) if self.is_suspended => None,
            Some(sessions) => sessions.address(),
            None => self.endpoint,
        }
    }

    /// Whether it has keys, and no session to send in.
    #[inline]
    pub fn lacks_session(&self) -> bool {
        let sessions = self.sessions.as_ref();
        sessions.is_some_and(|sessions| sessions.current.load().is_none())
    }

    /// Longest packet of this IP version that is not reported as too big.
    #[inline]
    pub fn packet_bytes_max(&self, version: Version) -> usize {
        match version {
            Version::V4 => self.mtu_bytes,
            Version::V6 => self.mtu_bytes.max(IPV6_MTU_BYTES_MIN),
        }
    }
}

/// A snapshot of all peers and of the prefixes behind them.
#[derive(Debug)]
pub struct Table {
    /// By next hop.
    peers: Vec<PeerSnapshot>,
    prefixes: Arc<Prefixes>,
    senders: Senders,
    addresses: TunnelAddresses,
    is_hop: bool,
    generation: u16,
}

impl Table {
    /// A table in which `prefixes` lead to `peers` by their index.
    ///
    /// `addresses` are this host's in the tunnel, which errors are reported
    /// from; `is_hop` makes the tunnel count as an IP hop.
    pub fn new(
        peers: Vec<PeerSnapshot>,
        prefixes: Arc<Prefixes>,
        addresses: TunnelAddresses,
        is_hop: bool,
    ) -> Self {
        // Of one with a key nothing is taken that does not prove it.
        let plain = peers.iter().zip(0..);
        let plain = plain.filter(|(peer, _)| peer.sessions.is_none());
        let senders = plain.filter_map(|(peer, next_hop)| Some((peer.endpoint?.ip(), next_hop)));
        Self {
            senders: Senders::new(senders),
            peers,
            prefixes,
            addresses,
            is_hop,
            generation: 0,
        }
    }

    /// The same, of a generation.
    #[must_use]
    pub fn of_generation(self, generation: u16) -> Self {
        Self { generation, ..self }
    }

    /// Changes when a next hop may have become another peer's.
    pub fn generation(&self) -> u16 {
        self.generation
    }

    /// The peer with the longest prefix that matches an inner address: where
    /// packets to it go, and who may send packets from it.
    #[inline]
    pub fn peer(&self, address: IpAddr) -> Option<(NextHop, &PeerSnapshot)> {
        let next_hop = self.prefixes.lookup(address)?;
        Some((next_hop, self.at(next_hop)?))
    }

    /// The peer with this next hop.
    #[inline]
    pub fn at(&self, next_hop: NextHop) -> Option<&PeerSnapshot> {
        self.peers.get(usize::from(next_hop))
    }

    /// The first peer that is as wanted. It looks at all of them.
    pub fn find(&self, is_wanted: impl Fn(&PeerSnapshot) -> bool) -> Option<NextHop> {
        let mut peers = self.peers.iter().zip(0..);
        peers.find_map(|(peer, next_hop)| is_wanted(peer).then_some(next_hop))
    }

    /// Whether each peer of `old` that has sessions is still here, with the same next hop.
    pub fn has_sessions_of(&self, old: &Self) -> bool {
        let sessions = |peer: &PeerSnapshot| peer.sessions.as_ref().map(Arc::as_ptr);
        old.peers.iter().zip(0..).all(|(peer, next_hop)| {
            let now = self.at(next_hop).and_then(sessions);
            sessions(peer).is_none_or(|before| Some(before) == now)
        })
    }

    /// Whom datagrams come from.
    #[inline]
    pub fn senders(&self) -> &Senders {
        &self.senders
    }

    /// This host's addresses in the tunnel.
    #[inline]
    pub fn addresses(&self) -> &TunnelAddresses {
        &self.addresses
    }

    /// Whether packets into the tunnel spend one of their hops.
    #[inline]
    pub fn is_hop(&self) -> bool {
        self.is_hop
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(endpoint: &str) -> PeerSnapshot {
        PeerSnapshot {
            endpoint: endpoint.parse().ok(),
            mtu_bytes: 1000,
            is_fragmented: true,
            ..PeerSnapshot::default()
        }
    }

    fn table(peers: &[&str], prefixes: &[(&str, NextHop)]) -> Table {
        let prefixes = prefixes
            .iter()
            .map(|(prefix, hop)| (prefix.parse().unwrap(), *hop));
        Table::new(
            peers.iter().map(|endpoint| peer(endpoint)).collect(),
            Arc::new(Prefixes::new(prefixes)),
            TunnelAddresses::default(),
            false,
        )
    }

    #[test]
    fn knows_its_senders() {
        let table = table(&["10.0.0.2:8285", "[fd00::2]:8285", "unresolved"], &[]);
        for (sender, peer) in [("10.0.0.2", Some(0)), ("fd00::2", Some(1)), ("::", None)] {
            assert_eq!(table.senders().peer(sender.parse().unwrap()), peer);
        }
        assert!(table.peer("10.0.0.2".parse().unwrap()).is_none());
    }

    #[test]
    fn the_longest_prefix_wins() {
        let table = table(
            &["10.0.0.2:1", "10.0.0.3:1", "unresolved"],
            &[
                ("10.244.0.0/16", 0),
                ("10.244.7.0/24", 1),
                ("fd00::/8", 2),
                // A next hop that is not there leads nowhere.
                ("10.99.0.0/16", 9),
            ],
        );
        let hop = |address: &str| table.peer(address.parse().unwrap()).map(|(hop, _)| hop);
        assert_eq!(hop("10.244.1.1"), Some(0));
        assert_eq!(hop("10.244.7.1"), Some(1));
        assert_eq!(hop("fd01::1"), Some(2));
        assert_eq!(hop("10.99.1.1"), None);
        assert_eq!(hop("192.0.2.1"), None);
        let (_, peer) = table.peer("10.244.7.1".parse().unwrap()).unwrap();
        assert_eq!(peer.endpoint, "10.0.0.3:1".parse().ok());
    }

    #[test]
    fn every_path_carries_the_smallest_ipv6_packets() {
        let peer = peer("10.0.0.2:1");
        assert_eq!(peer.packet_bytes_max(Version::V4), 1000);
        assert_eq!(peer.packet_bytes_max(Version::V6), 1280);
    }
}
