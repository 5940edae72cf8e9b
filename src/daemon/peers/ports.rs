//! Which of our ports reach a peer, and which port the peer is to be sent to.
//!
//! Toward a peer every worker sends from the listen port until the peer has said
//! that the worker's own port reaches it: stateful firewalls admit answers to
//! that one port alone, and NATs may rewrite any. The peer is asked from each
//! own port ([`crate::packet::probe`]) and answers to where it sends packets
//! anyway, with the port that it has seen the request come from. What a worker
//! may do stands in the peer's counters, of which it looks at its own whenever
//! it begins a GSO batch; so no table is made anew for it.

mod proof;
mod seen;

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use self::proof::Proof;
use self::seen::Seen;
use super::last_seen::Traffic;
use crate::counters::PeerCounters;
use crate::daemon::workers::WorkerFds;
use crate::io::random;
use crate::io::udp::Port;
use crate::log::rate_limited::RateLimitedLog;
use crate::packet::probe::{Kind, Probe};
use crate::routing::overlay::Peer;

/// How long ago a peer may have been heard for its silence to say something of
/// our ports, and not of the peer.
const HEARD_LATELY: Duration = Duration::from_secs(5);

/// What is known of one peer.
pub struct PeerPorts {
    /// Where it is sent to: what was proven is proven there.
    endpoint: Option<SocketAddr>,
    /// By worker.
    proofs: Vec<Proof>,
    /// When it was last seen, or sent to from a port that is proven.
    used: Option<Instant>,
    /// When it was last seen.
    heard: Option<Instant>,
    seen: Seen,
    /// It was told that a NAT rewrites our ports.
    is_rewriting_told: bool,
}

impl PeerPorts {
    /// Nothing is known yet.
    pub fn new(now: Instant) -> Self {
        Self {
            endpoint: None,
            proofs: Vec::new(),
            used: None,
            heard: None,
            seen: Seen::new(now),
            is_rewriting_told: false,
        }
    }

    /// Forgets what is not about where the peer is now.
    pub fn follow(&mut self, peer: &Peer, now: Instant) {
        let endpoint = peer.endpoint_in_use();
        if self.endpoint == endpoint {
            return;
        }
        let ip = |endpoint: Option<SocketAddr>| endpoint.map(|endpoint| endpoint.ip());
        let old = std::mem::replace(self, Self::new(now));
        if ip(old.endpoint) == ip(endpoint) {
            self.seen = old.seen;
        }
        self.endpoint = endpoint;
        self.proofs = vec![Proof::default(); peer.traffic.len()];
    }

    /// Takes in what the workers have seen; returns the port to send to from now on,
    /// if it is another one.
    pub fn poll(&mut self, peer: &Peer, traffic: Traffic, now: Instant) -> Option<u16> {
        let is_proven = peer.traffic.iter().any(PeerCounters::is_own_port_proven);
        if traffic.received {
            self.note_heard(now);
        } else if traffic.sent && is_proven {
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
        self.seen.look(now, others.into_iter(), configured, in_use)
    }

    fn note_heard(&mut self, now: Instant) {
        (self.used, self.heard) = (Some(now), Some(now));
    }

    /// A port that the peer was lately seen at, if not at the one in use.
    pub fn seen_port(&self) -> Option<u16> {
        self.seen.other(Instant::now())
    }

    /// Asks the peer from the own ports for which it is time; returns how many
    /// these are.
    pub fn ask(
        &mut self,
        peer: &Peer,
        workers: &[WorkerFds],
        log: &mut RateLimitedLog,
        now: Instant,
    ) -> usize {
        let mut asked = 0;
        let Some(endpoint) = self.endpoint else {
            return asked;
        };
        let workers = workers.iter().zip(peer.traffic.iter());
        for ((worker, traffic), proof) in workers.zip(&mut self.proofs) {
            let Some(port) = worker.own_port() else {
                continue;
            };
            let is_proven = traffic.is_own_port_proven();
            if !proof.is_due(now, is_proven, self.used) {
                continue;
            }
            if is_proven && proof.is_lost() {
                traffic.set_own_port_proven(false);
                // A peer that is gone answers no port.
                let is_heard = self.heard.is_some_and(|heard| now < heard + HEARD_LATELY);
                if is_heard && log.admits(now) {
                    tracing::info!(
                        "port {port} reaches peer {} no more: sending from the listen port",
                        peer.name
                    );
                }
            }
            match random() {
                Ok(fresh) => {
                    let nonce = proof.ask(now, fresh);
                    let kind = Kind::Request { port };
                    worker.send_probe(Port::Own, Probe { kind, nonce }, endpoint);
                    asked += 1;
                }
                Err(error) => {
                    tracing::debug!("no random numbers: {error}");
                    break;
                }
            }
        }
        asked
    }

    /// A probe has come from the peer's address, at this port.
    pub fn note_probe(&mut self, from_port: u16, now: Instant) {
        self.note_heard(now);
        if self
            .endpoint
            .is_some_and(|endpoint| endpoint.port() == from_port)
        {
            self.seen.note_in_use(now);
        }
    }

    /// The peer has asked from its own `port`, and the request came from there: it does
    /// not receive on it. Returns the port to send to from now on, if it is another
    /// one.
    pub fn note_own_port(&mut self, peer: &Peer, port: u16, now: Instant) -> Option<u16> {
        let configured = peer.endpoint?.port();
        if configured == port {
            return None;
        }
        self.seen.note_own(port, now);
        (peer.learned_port == Some(port)).then_some(configured)
    }

    /// Who asks can answer: it is asked soon.
    pub fn hurry(&mut self, peer: &Peer) {
        for (proof, traffic) in self.proofs.iter_mut().zip(peer.traffic.iter()) {
            if !traffic.is_own_port_proven() {
                proof.hurry();
            }
        }
    }

    /// The peer has answered the request with this nonce, which it has seen come from
    /// `seen_port`.
    pub fn take_reply(
        &mut self,
        peer: &Peer,
        (nonce, seen_port): (u64, u16),
        workers: &[WorkerFds],
        log: &mut RateLimitedLog,
        now: Instant,
    ) {
        let mut proofs = self.proofs.iter_mut();
        let Some(worker) = proofs.position(|proof| proof.is_answer(nonce)) else {
            return;
        };
        let own = workers.get(worker).and_then(WorkerFds::own_port);
        let is_proven = own == Some(seen_port);
        peer.traffic[worker].set_own_port_proven(is_proven);
        if is_proven {
            tracing::debug!("port {seen_port} reaches peer {}", peer.name);
            return;
        }
        self.proofs[worker].give_up();
        let is_told = std::mem::replace(&mut self.is_rewriting_told, true);
        if !is_told && log.admits(now) {
            tracing::info!(
                "a NAT on the way to peer {} rewrites ports ({} arrives as {seen_port}): sending \
                 from the listen port alone",
                peer.name,
                own.unwrap_or_default(),
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::config::PeerName;
    use crate::routing::overlay::{Origin, Overlay};

    /// The log of a peer that answers no more, and may still be heard.
    fn log_of_silence(is_heard: bool) -> String {
        let (mut overlay, now) = (Overlay::default(), Instant::now());
        overlay.count_for(1);
        let name = PeerName {
            host: "127.0.0.1".into(),
            port: 9,
        };
        overlay.add_peer(&name, true, &[], Origin::Config).unwrap();
        overlay.set_endpoint(0, "127.0.0.1:9".parse().ok());
        let peer = overlay.peer(0).unwrap();
        peer.traffic[0].set_own_port_proven(true);
        let workers = [WorkerFds::on_loopback()];
        let (mut ports, mut journal) =
            (PeerPorts::new(now), RateLimitedLog::new("changes of ports"));
        let log = tempfile::NamedTempFile::new().unwrap();
        let subscriber = tracing_subscriber::fmt()
            .with_writer(Arc::new(log.reopen().unwrap()))
            .finish();
        tracing::subscriber::with_default(subscriber, || {
            for second in 0..30 {
                let now = now + Duration::from_secs(second);
                let traffic = Traffic {
                    received: is_heard || second == 0,
                    sent: true,
                    news: None,
                };
                ports.follow(peer, now);
                ports.poll(peer, traffic, now);
                ports.ask(peer, &workers, &mut journal, now);
            }
        });
        assert!(!peer.traffic[0].is_own_port_proven());
        std::fs::read_to_string(log.path()).unwrap()
    }

    #[test]
    fn a_blocked_port_is_told_and_a_peer_that_is_gone_is_not() {
        let (blocked, gone) = (log_of_silence(true), log_of_silence(false));
        assert_eq!(blocked.matches("reaches peer").count(), 1, "{blocked}");
        assert_eq!(gone, "");
    }
}
