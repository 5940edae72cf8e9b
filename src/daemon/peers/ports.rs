//! Which of our ports reach a peer, and which port the peer is to be sent to.
//!
//! Toward a peer every worker sends from the listen port until the peer has said
//! that the worker's own port reaches it: stateful firewalls admit answers to
//! that one port alone, and NATs may rewrite any. The peer is asked from each
//! own port ([`crate::packet::probe`]) and answers to where it sends packets
//! anyway, with the port that it has seen the request come from. What a worker
//! may do stands in the peer's counters, which the worker reads whenever it begins
//! a GSO batch; so no table is made anew for it.

mod proof;
mod seen;

use std::net::SocketAddr;
use std::time::Instant;

use self::proof::Proof;
use self::seen::Seen;
use super::last_seen::Traffic;
use crate::counters::PeerCounters;
use crate::daemon::workers::WorkerFds;
use crate::io::random;
use crate::io::udp::Port;
use crate::packet::probe::{Kind, Probe};
use crate::routing::overlay::Peer;

/// What is known of one peer.
pub struct PeerPorts {
    /// Where it is sent to: what was proven is proven there.
    endpoint: Option<SocketAddr>,
    /// By worker.
    proofs: Vec<Proof>,
    /// When something came from it, or was sent to it from a port that is proven.
    used: Option<Instant>,
    seen: Seen,
}

impl PeerPorts {
    /// Nothing is known yet.
    pub fn new(now: Instant) -> Self {
        Self {
            endpoint: None,
            proofs: Vec::new(),
            used: None,
            seen: Seen::new(now),
        }
    }

    /// Forgets what is not about where the peer is now.
    pub fn follow(&mut self, peer: &Peer, now: Instant) {
        let endpoint = peer.endpoint_in_use();
        if self.endpoint == endpoint {
            return;
        }
        let ip = |endpoint: Option<SocketAddr>| endpoint.map(|endpoint| endpoint.ip());
        if ip(self.endpoint) != ip(endpoint) {
            self.seen = Seen::new(now);
        }
        (self.endpoint, self.used) = (endpoint, None);
        self.proofs = vec![Proof::default(); peer.traffic.len()];
    }

    /// Takes in what the workers have seen; returns the port to send to from now on,
    /// if it is another one.
    pub fn poll(&mut self, peer: &Peer, traffic: Traffic, now: Instant) -> Option<u16> {
        let is_proven = || peer.traffic.iter().any(PeerCounters::is_own_port_proven);
        if traffic.received || traffic.sent && is_proven() {
            self.used = Some(now);
        }
        let mut others = Vec::new();
        for worker in peer.traffic.iter() {
            let (is_in_use, other) = worker.take_ports();
            if is_in_use {
                self.seen.note_in_use(now);
            }
            others.extend(other);
        }
        let (in_use, configured) = (self.endpoint?.port(), peer.endpoint?.port());
        self.seen.poll(now, others, configured, in_use)
    }

    /// A port that the peer was lately seen at, if not at the one in use.
    pub fn seen_port(&self) -> Option<u16> {
        self.seen.other(Instant::now())
    }

    /// Asks the peer from the own ports for which it is time; returns how many
    /// these are.
    pub fn ask(&mut self, peer: &Peer, workers: &[WorkerFds], now: Instant) -> usize {
        let mut asked = 0;
        let Some(endpoint) = self.endpoint else {
            return asked;
        };
        let workers = workers.iter().zip(peer.traffic.iter());
        for ((worker, traffic), proof) in workers.zip(&mut self.proofs) {
            let Some(port) = worker.own_port else {
                continue;
            };
            let is_proven = traffic.is_own_port_proven();
            if !proof.is_due(now, is_proven, self.used) {
                continue;
            }
            if is_proven && proof.is_lost() {
                traffic.set_own_port_proven(false);
                tracing::debug!("port {port} reaches peer {} no more", peer.name);
            }
            let Ok(fresh) = random() else {
                break;
            };
            let nonce = proof.ask(now, fresh);
            let kind = Kind::Request { port };
            worker.send_probe(Port::Own, Probe { kind, nonce }, endpoint);
            asked += 1;
        }
        asked
    }

    /// A probe has come from the peer's address, at this port.
    pub fn note_probe(&mut self, from_port: u16, now: Instant) {
        self.used = Some(now);
        let in_use = self.endpoint.map(|endpoint| endpoint.port());
        if in_use == Some(from_port) {
            self.seen.note_in_use(now);
        }
    }

    /// The peer has asked from its own `port`, and the request came from `from_port`: it
    /// does not receive on that if it is the same. And a peer that asks can answer, so it
    /// is asked soon. Returns the port to send to from now on, if it is another one.
    pub fn take_request(
        &mut self,
        peer: &Peer,
        (port, from_port): (u16, u16),
        now: Instant,
    ) -> Option<u16> {
        for (proof, traffic) in self.proofs.iter_mut().zip(peer.traffic.iter()) {
            if !traffic.is_own_port_proven() {
                proof.hurry();
            }
        }
        let configured = peer.endpoint?.port();
        if port != from_port || port == configured {
            return None;
        }
        self.seen.note_own(port, now);
        (peer.learned_port == Some(port)).then_some(configured)
    }

    /// The peer has answered the request with this nonce, which it has seen come from
    /// `seen_port`.
    pub fn take_reply(&mut self, peer: &Peer, nonce: u64, seen_port: u16, workers: &[WorkerFds]) {
        let mut proofs = self.proofs.iter_mut();
        let Some(worker) = proofs.position(|proof| proof.is_answer(nonce)) else {
            return;
        };
        let own_port = workers.get(worker).and_then(|worker| worker.own_port);
        let is_proven = own_port == Some(seen_port);
        peer.traffic[worker].set_own_port_proven(is_proven);
        if !is_proven {
            self.proofs[worker].give_up();
        }
        tracing::debug!(
            "port {own_port:?} reaches peer {} as {seen_port}",
            peer.name
        );
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::config::parse_peer;
    use crate::routing::overlay::{Origin, Overlay};

    #[test]
    fn a_port_that_is_blocked_is_not_sent_from_any_more() {
        let (mut overlay, now) = (Overlay::default(), Instant::now());
        overlay.count_for(1);
        let spec = parse_peer("127.0.0.1:9").unwrap();
        overlay.add_peer(&spec, true, Origin::Config).unwrap();
        let peer = overlay.peer(0).unwrap();
        peer.traffic[0].set_own_port_proven(true);
        let workers = [WorkerFds::on_loopback()];
        let mut ports = PeerPorts::new(now);
        let mut lost_at = None;
        for second in 0..30 {
            let now = now + Duration::from_secs(second);
            let traffic = Traffic {
                received: true,
                sent: true,
            };
            ports.follow(peer, now);
            ports.poll(peer, traffic, now);
            ports.ask(peer, &workers, now);
            if !peer.traffic[0].is_own_port_proven() {
                lost_at = lost_at.or(Some(second));
            }
        }
        // Asked at 0, 1, 2, 3 and 4.
        assert_eq!(lost_at, Some(5));
    }
}
