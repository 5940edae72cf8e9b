//! Which of our ports reach which peer, and which port a peer is to be sent to.
//!
//! Toward a peer every worker sends from the listen port until the peer has said
//! that the worker's own port reaches it: stateful firewalls admit answers to
//! that one port alone, and NATs may rewrite any. The peer is asked from each
//! own port ([`crate::packet::probe`]) and answers to where it sends packets
//! anyway, with the port that it has seen the request come from. What a worker
//! may do stands in the peer's counters, of which it looks at its own whenever
//! it begins a train; so no table is made anew for it.

mod proof;
mod seen;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, at, bounded, never};

use self::proof::Proof;
use self::seen::Seen;
use super::Peers;
use crate::config::PeerName;
use crate::counters::PeerCounters;
use crate::daemon::workers::{WorkerFds, Workers};
use crate::dataplane::inbound::ReceivedProbe;
use crate::io::random;
use crate::io::udp::Port;
use crate::log::rate_limited::Journal;
use crate::packet::probe::{Kind, Probe};
use crate::packet::train::NextHop;
use crate::routing::overlay::{Overlay, Peer};

/// Probes that may wait to be read. More are lost, and come again.
const WAITING_MAX: usize = 1024;

/// Probes that are read within a second. More are lost, too: whoever floods us
/// with them costs no more than this.
const READ_MAX: usize = 1024;

/// Pause after reading, in which more probes wake nobody.
const READ_PAUSE: Duration = Duration::from_millis(20);

/// Requests at a time. Other peers have their turn the next time.
const ASKED_MAX: usize = 512;

/// Most peers at one address that a probe may be from.
const SHARERS_MAX: usize = 16;

/// How long ago a peer may have been heard for its silence to tell something of
/// our ports, and not of the peer.
const HEARD_LATELY: Duration = Duration::from_secs(5);

/// Takes the probes that workers receive.
pub fn probe_channel() -> (Sender<ReceivedProbe>, Receiver<ReceivedProbe>) {
    bounded(WAITING_MAX)
}

/// See the module's documentation.
pub struct Ports {
    /// Each worker's own port.
    own: Vec<Option<u16>>,
    peers: HashMap<NextHop, PeerPorts>,
    received: Receiver<ReceivedProbe>,
    /// When probes are read again; `None`: when one comes.
    read_at: Option<Instant>,
    /// Probes that may still be read before the next look.
    read_left: usize,
    /// Whose turn it is to be asked.
    cursor: usize,
    journal: Journal,
}

/// What is known of one peer.
struct PeerPorts {
    /// The peer's counters: another peer in its place has others.
    traffic: Arc<[PeerCounters]>,
    /// Where it is sent to: what was proven is proven there.
    endpoint: SocketAddr,
    /// By worker.
    proofs: Vec<Proof>,
    /// When it was last heard, or sent to from a port that is proven.
    used: Option<Instant>,
    heard: Option<Instant>,
    seen: Seen,
    /// It was told that a NAT rewrites our ports.
    is_rewriting_told: bool,
}

impl PeerPorts {
    fn new(peer: &Peer, endpoint: SocketAddr, now: Instant) -> Self {
        Self {
            traffic: Arc::clone(&peer.traffic),
            endpoint,
            proofs: vec![Proof::default(); peer.traffic.len()],
            used: None,
            heard: None,
            seen: Seen::new(now),
            is_rewriting_told: false,
        }
    }

    /// Whether this is about a peer as it is now.
    fn is_of(&self, peer: &Peer, endpoint: SocketAddr) -> bool {
        self.endpoint == endpoint && Arc::ptr_eq(&self.traffic, &peer.traffic)
    }

    fn note_heard(&mut self, now: Instant) {
        (self.used, self.heard) = (Some(now), Some(now));
    }
}

impl Ports {
    /// For workers with these own ports, which receive these probes.
    pub fn new(own: Vec<Option<u16>>, received: Receiver<ReceivedProbe>) -> Self {
        Self {
            own,
            peers: HashMap::new(),
            received,
            read_at: None,
            read_left: READ_MAX,
            cursor: 0,
            journal: Journal::new("changes of ports"),
        }
    }

    /// The workers' own ports.
    pub fn own(&self) -> Vec<u16> {
        self.own.iter().flatten().copied().collect()
    }

    /// A port that a peer was lately seen at, if not at the one in use.
    pub fn seen(&self, hop: NextHop) -> Option<u16> {
        self.peers.get(&hop)?.seen.other(Instant::now())
    }

    /// Gives a probe, and the time when more are due.
    pub fn received(&self) -> (Receiver<ReceivedProbe>, Receiver<Instant>) {
        match self.read_at {
            Some(time) => (never(), at(time)),
            None => (self.received.clone(), never()),
        }
    }

    /// Notes that packets came from a peer, or went there, since the last look.
    pub fn note_traffic(&mut self, hop: NextHop, received: bool, sent: bool, now: Instant) {
        let Some(known) = self.peers.get_mut(&hop) else {
            return;
        };
        let is_proven = known.traffic.iter().any(PeerCounters::is_own_port_proven);
        if received {
            known.note_heard(now);
        } else if sent && is_proven {
            known.used = Some(now);
        }
    }

    /// Says how many log lines were left out, for the last time.
    pub fn end_log(&mut self) {
        self.journal.end();
    }

    /// Keeps step with the peers that there are.
    fn follow(&mut self, overlay: &Overlay, now: Instant) {
        self.peers.retain(|&hop, _| overlay.in_use(hop).is_some());
        for (hop, peer) in overlay.peers() {
            let Some(endpoint) = peer.endpoint_in_use() else {
                continue;
            };
            let known = self
                .peers
                .entry(hop)
                .or_insert_with(|| PeerPorts::new(peer, endpoint, now));
            if !known.is_of(peer, endpoint) {
                let seen = known.seen.clone();
                let is_same_peer = Arc::ptr_eq(&known.traffic, &peer.traffic)
                    && known.endpoint.ip() == endpoint.ip();
                *known = PeerPorts::new(peer, endpoint, now);
                if is_same_peer {
                    known.seen = seen;
                }
            }
        }
    }

    /// Asks a peer from the ports for which it is time; returns how many that are.
    fn ask(
        &mut self,
        hop: NextHop,
        name: &PeerName,
        descriptors: &[WorkerFds],
        now: Instant,
    ) -> usize {
        let Some(known) = self.peers.get_mut(&hop) else {
            return 0;
        };
        let mut asked = 0;
        for (worker, proof) in known.proofs.iter_mut().enumerate() {
            let (Some(&Some(port)), Some(traffic)) =
                (self.own.get(worker), known.traffic.get(worker))
            else {
                continue;
            };
            let is_proven = traffic.is_own_port_proven();
            if !proof.is_due(now, is_proven, known.used) {
                continue;
            }
            if is_proven && proof.is_lost() {
                traffic.set_own_port_proven(false);
                let is_heard = known.heard.is_some_and(|heard| now < heard + HEARD_LATELY);
                if is_heard && self.journal.admits(now) {
                    tracing::info!(
                        "port {port} reaches peer {name} no more: sending from the listen port"
                    );
                }
            }
            let fresh = match random() {
                Ok(fresh) => fresh,
                Err(error) => {
                    tracing::debug!("no random numbers: {error}");
                    break;
                }
            };
            let nonce = proof.ask(now, fresh);
            let kind = Kind::Request { port };
            descriptors[worker].send_probe(Port::Own, Probe { kind, nonce }, known.endpoint);
            asked += 1;
        }
        asked
    }
}

impl Peers {
    /// Looks at the ports that peers were seen at, and asks them about ours.
    pub(super) fn poll_ports(&mut self, now: Instant, workers: &Workers) -> bool {
        self.ports.journal.flush(now);
        self.ports.read_left = READ_MAX;
        self.ports.follow(&self.overlay, now);
        let mut learned = Vec::new();
        for (hop, peer) in self.overlay.peers() {
            let (Some(known), Some(configured)) = (self.ports.peers.get_mut(&hop), peer.endpoint)
            else {
                continue;
            };
            let mut others = Vec::new();
            for worker in peer.traffic.iter() {
                let (is_in_use, other) = worker.take_ports();
                if is_in_use {
                    known.seen.note_in_use(now);
                }
                others.extend(other);
            }
            let in_use = known.endpoint.port();
            let wanted = known
                .seen
                .look(now, others.into_iter(), configured.port(), in_use);
            learned.extend(wanted.map(|port| (hop, port)));
        }
        let mut is_news = false;
        for (hop, port) in learned {
            is_news |= self.use_port(hop, port, now);
        }
        self.ask_about_ports(now, workers);
        is_news
    }

    /// Has a peer sent to at this port; tells whether that is news.
    fn use_port(&mut self, hop: NextHop, port: u16, now: Instant) -> bool {
        let Some((name, configured)) = self
            .overlay
            .in_use(hop)
            .and_then(|peer| Some((peer.name.to_string(), peer.endpoint?)))
        else {
            return false;
        };
        // What comes from another port may be the other peer's.
        let at_address = self.overlay.peers().filter_map(|(_, peer)| peer.endpoint);
        let is_shared = at_address.filter(|to| to.ip() == configured.ip()).count() > 1;
        let is_back = port == configured.port();
        if is_shared && !is_back {
            return false;
        }
        let learned = (!is_back).then_some(port);
        let is_news = self.overlay.set_learned_port(hop, learned);
        if is_news && self.ports.journal.admits(now) {
            match is_back {
                true => tracing::info!("peer {name} sends from port {port} again; sending there"),
                false => tracing::warn!(
                    "peer {name} sends from port {port}, which its address was not configured \
                     with; sending there"
                ),
            }
        }
        is_news
    }

    /// Asks peers about the ports of which something is to be found out.
    pub fn ask_about_ports(&mut self, now: Instant, workers: &Workers) {
        self.ports.follow(&self.overlay, now);
        if self.ports.own.iter().all(Option::is_none) {
            return;
        }
        let count = self.overlay.peer_count().max(1);
        let start = self.ports.cursor % count;
        let (mut asked, mut turns) = (0, 0);
        let all = || self.overlay.peers();
        for (hop, peer) in all().skip(start).chain(all().take(start)) {
            if asked >= ASKED_MAX {
                break;
            }
            asked += self.ports.ask(hop, &peer.name, workers.descriptors(), now);
            turns += 1;
        }
        self.ports.cursor = start + turns;
    }

    /// Gives a probe, and the time when more are due, for [`Self::read_probes`].
    pub fn probes(&self) -> (Receiver<ReceivedProbe>, Receiver<Instant>) {
        self.ports.received()
    }

    /// Reads the probes that have come, of which `first` is one; tells whether the
    /// workers need a new table.
    pub fn read_probes(&mut self, first: Option<ReceivedProbe>, workers: &Workers) -> bool {
        let now = Instant::now();
        let waiting: Vec<_> = self.ports.received.try_iter().take(WAITING_MAX).collect();
        let has_come = first.is_some() || !waiting.is_empty();
        self.ports.read_at = has_come.then(|| now + READ_PAUSE);
        let mut has_changed = false;
        for (from, probe) in first.into_iter().chain(waiting) {
            if self.ports.read_left == 0 {
                break;
            }
            self.ports.read_left -= 1;
            has_changed |= self.read_probe(from, probe, now, workers);
        }
        has_changed
    }

    /// Takes in a probe from an address that a peer has. Several may share it: it
    /// is as if each of them had sent it, and the nonce tells who was meant.
    fn read_probe(
        &mut self,
        from: SocketAddr,
        probe: Probe,
        now: Instant,
        workers: &Workers,
    ) -> bool {
        let mut has_changed = false;
        let at_address: Vec<_> = self
            .overlay
            .peers()
            .filter(|(_, peer)| peer.endpoint.is_some_and(|to| to.ip() == from.ip()))
            .filter_map(|(hop, peer)| Some((hop, peer.endpoint_in_use()?)))
            .take(SHARERS_MAX)
            .collect();
        for (hop, endpoint) in at_address {
            if let Some(known) = self.ports.peers.get_mut(&hop) {
                known.note_heard(now);
                if from.port() == endpoint.port() {
                    known.seen.note_in_use(now);
                }
            }
            match probe.kind {
                Kind::Request { port } => {
                    let kind = Kind::Reply { port: from.port() };
                    let reply = Probe { kind, ..probe };
                    if let Some(any) = workers.descriptors().first() {
                        any.send_probe(Port::Listen, reply, endpoint);
                    }
                    has_changed |= self.was_asked(hop, (port, from.port()), now, workers);
                }
                Kind::Reply { port } => self.was_answered(hop, probe.nonce, port, now),
                Kind::Size => {}
            }
        }
        has_changed
    }

    /// A peer has asked from `port`, and the request came from `seen_port`.
    fn was_asked(
        &mut self,
        hop: NextHop,
        (port, seen_port): (u16, u16),
        now: Instant,
        workers: &Workers,
    ) -> bool {
        let Some((known, peer)) = self.ports.peers.get_mut(&hop).zip(self.overlay.in_use(hop))
        else {
            return false;
        };
        let mut has_changed = false;
        let configured = peer.endpoint.map(|endpoint| endpoint.port());
        if port == seen_port && configured != Some(port) {
            known.seen.note_own(port, now);
            if let Some(configured) = configured.filter(|_| peer.learned_port == Some(port)) {
                has_changed = self.use_port(hop, configured, now);
            }
        }
        // Who asks can answer.
        if let Some(known) = self.ports.peers.get_mut(&hop) {
            for (proof, traffic) in known.proofs.iter_mut().zip(known.traffic.iter()) {
                if !traffic.is_own_port_proven() {
                    proof.hurry();
                }
            }
        }
        if let Some(peer) = self.overlay.in_use(hop) {
            self.ports.ask(hop, &peer.name, workers.descriptors(), now);
        }
        has_changed
    }

    /// A peer has answered the request with this nonce, which it has seen come
    /// from `seen_port`.
    fn was_answered(&mut self, hop: NextHop, nonce: u64, seen_port: u16, now: Instant) {
        let Some((known, peer)) = self.ports.peers.get_mut(&hop).zip(self.overlay.in_use(hop))
        else {
            return;
        };
        let mut proofs = known.proofs.iter_mut();
        let Some(worker) = proofs.position(|proof| proof.is_answer(nonce)) else {
            return;
        };
        let own = self.ports.own.get(worker).copied().flatten();
        let is_proven = own == Some(seen_port);
        known.traffic[worker].set_own_port_proven(is_proven);
        if is_proven {
            tracing::debug!("port {seen_port} reaches peer {}", peer.name);
            return;
        }
        known.proofs[worker].give_up();
        let is_told = std::mem::replace(&mut known.is_rewriting_told, true);
        if !is_told && self.ports.journal.admits(now) {
            tracing::info!(
                "a NAT on the way to peer {} rewrites ports ({} arrives as {seen_port}): sending \
                 from the listen port alone",
                peer.name,
                own.unwrap_or_default(),
            );
        }
    }
}
