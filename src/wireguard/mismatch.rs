//! Handshakes that fail between hosts whose keys follow from a shared secret: who takes whom
//! for somebody else. It would be silence otherwise, since strangers get no answer.
//!
//! Each end says what it can know. The one that calls knows only that nobody answers, which
//! the log has of any peer. The one that is called sees a call from a peer's address that is
//! for another key; or one for its own key, which takes the secret, from nobody it knows.

use std::collections::HashMap;
use std::net::SocketAddr;

use super::peers::Peers;
use crate::wire::wireguard::keys::PublicKey;

/// The least time between two searches for a peer, which go through all of them.
const SEARCH_INTERVAL_NS: u64 = 1_000_000_000;

/// The least time between two lines of the log: anybody can cause them who forges a peer's
/// address.
const LOG_INTERVAL_NS: u64 = 30_000_000_000;

/// Who is who.
#[derive(Debug)]
pub(crate) struct Identities {
    /// This host's.
    pub own: String,
    /// The peers'.
    pub peers: HashMap<PublicKey, String>,
}

/// See the module's documentation.
#[derive(Default)]
pub(super) struct Mismatches {
    /// `None`: keys do not follow from a secret.
    pub identities: Option<Identities>,
    next_ns: u64,
}

impl Mismatches {
    /// A handshake message has come that is for another key than this host's.
    pub(super) fn note_other_key(&mut self, peers: &mut Peers, from: SocketAddr, now_ns: u64) {
        let Some(identities) = self.identities.as_ref().filter(|_| now_ns >= self.next_ns) else {
            return;
        };
        self.next_ns = now_ns + SEARCH_INTERVAL_NS;
        let Some(peer) = identities.at(peers, from) else {
            return;
        };
        self.next_ns = now_ns + LOG_INTERVAL_NS;
        tracing::warn!(
            %from,
            %peer,
            "a handshake from {from} (peer {peer}) is meant for another host than this host, {}: \
             that peer has another secret, or another identity for this host",
            identities.own
        );
    }

    /// Somebody has called who has the secret, and whose key no peer has.
    pub(super) fn note_stranger(&mut self, peers: &mut Peers, from: SocketAddr, now_ns: u64) {
        let Some(identities) = self.identities.as_ref().filter(|_| now_ns >= self.next_ns) else {
            return;
        };
        self.next_ns = now_ns + LOG_INTERVAL_NS;
        match identities.at(peers, from) {
            Some(peer) => tracing::warn!(
                %from,
                %peer,
                "a handshake from {from} has the secret, but not the identity {peer} of the peer \
                 that is there: start it with --identity {peer}, or correct its identity here"
            ),
            None => tracing::warn!(
                %from,
                "a handshake from {from} has the secret, but the identity of no peer: add it as \
                 one, by the identity that it has"
            ),
        }
    }
}

impl Identities {
    /// The identity of a peer that is at an address, whatever its port.
    fn at(&self, peers: &mut Peers, from: SocketAddr) -> Option<&str> {
        let is_there = |at: SocketAddr| at.ip() == from.ip();
        let peer = peers
            .all()
            .find(|peer| peer.shared.address().is_some_and(is_there))?;
        self.peers.get(&peer.key).map(String::as_str)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::peers::PeerConfig;
    use super::super::timers::Intervals;
    use super::*;
    use crate::log::captured;
    use crate::wire::wireguard::keys::PresharedKey;
    use crate::wire::wireguard::sessions::PeerSessions;

    const KEY: PublicKey = PublicKey([7; 32]);

    fn at(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    fn peers() -> Peers {
        let sessions = Arc::<PeerSessions>::default();
        sessions
            .endpoint
            .store(Some(Arc::new(at("10.0.0.2:8285").into())));
        let mut peers = Peers::default();
        let peer = PeerConfig {
            public_key: KEY,
            preshared_key: PresharedKey::default(),
            is_suspended: false,
            persistent_keepalive: None,
            sessions,
        };
        peers.configure(vec![peer], Intervals::of_this_build());
        peers
    }

    #[test]
    fn a_mismatch_is_named_now_and_then() {
        let mut peers = peers();
        let mut mismatches = Mismatches::default();
        let (peer, other) = (at("10.0.0.2:9"), at("10.0.0.3:8285"));
        // Without a secret there are no identities to name.
        let silent = captured(|| mismatches.note_other_key(&mut peers, peer, 0));
        assert_eq!(silent, [""; 0]);
        mismatches.identities = Some(Identities {
            own: "10.0.0.1".into(),
            peers: HashMap::from([(KEY, "gate".into())]),
        });
        let second = 1_000_000_000;
        // Of strangers only those that have the secret are worth a line.
        let lines = captured(|| mismatches.note_other_key(&mut peers, other, 0));
        assert_eq!(lines, [""; 0]);
        let lines = captured(|| {
            for time in 0..45 {
                mismatches.note_other_key(&mut peers, peer, time * second);
            }
        });
        assert_eq!(lines.len(), 2, "{lines:?}");
        for part in ["10.0.0.2:9", "peer gate", "this host, 10.0.0.1", "secret"] {
            assert!(lines[0].contains(part), "{lines:?}");
        }
        for (from, part) in [(peer, "--identity gate"), (other, "of no peer")] {
            mismatches.next_ns = 0;
            let lines = captured(|| {
                mismatches.note_stranger(&mut peers, from, 0);
                mismatches.note_stranger(&mut peers, from, second);
            });
            assert!(lines.len() == 1 && lines[0].contains(part), "{lines:?}");
        }
    }
}
