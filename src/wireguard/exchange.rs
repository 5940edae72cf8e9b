//! The protocol for all peers: handles each message and each timer, without a socket or a
//! clock. Messages and times go in, and what comes out goes to an [`Outside`].
//!
//! # Who sends first in a new session
//!
//! A responder may not send before the initiator has (section 5.4.6 of the paper). So the
//! initiator sends at once: when packets wait with the workers, which have said so by
//! [`PeerSessions::is_wanted`], the workers are woken and send those, and otherwise a
//! keepalive is sent from here. Should the workers have given up what waited, a keepalive
//! follows at the next tick: nothing has been sealed in the session by then.

mod receive;

use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use super::counters::HandshakeCounters;
use super::limiter::{Limiter, Load};
use super::mismatch::{Identities, Mismatches};
use super::outside::{Now, Outside};
use super::peers::{Peer, PeerConfig, PeerTimestamps, Peers, as_seen_by_timers};
use super::timers::Intervals;
use crate::wire::wireguard::cookie::MacChecker;
use crate::wire::wireguard::handshake::Initiator;
use crate::wire::wireguard::keys::{PrivateKey, PublicKey};
use crate::wire::wireguard::session::{OVERHEAD_BYTES, Session};
use crate::wire::wireguard::sessions::{PeerSessions, SessionMap};
use crate::wire::wireguard::timestamp::Timestamp;

/// Peers that are called in one tick after a takeover: their answers fit the socket's buffer.
const RENEWALS_MAX: usize = 64;

/// How many ticks there may be in the time of one.
const TICKS_AT_ONCE: u64 = 10;

/// When the latest handshake of each peer was completed.
pub(crate) type Latest = Mutex<HashMap<PublicKey, SystemTime>>;

/// See the module's documentation.
pub(crate) struct Exchange {
    peers: Peers,
    mismatches: Mismatches,
    state: State,
}

/// What all peers have in common.
struct State {
    intervals: Intervals,
    identity: Option<Identity>,
    map: Arc<SessionMap>,
    /// Handshakes that this host has begun, by its index.
    in_flight: HashMap<u32, InFlight>,
    limiter: Limiter,
    load: Load,
    counters: Arc<HandshakeCounters>,
    latest: Arc<Latest>,
    /// Peers to call, as nobody knows of the sessions that they may have.
    renewals: Vec<PublicKey>,
    /// Peers that are gone. A worker that was confirming a session of theirs may put it
    /// back, so they are cleared once more.
    gone: Vec<Arc<PeerSessions>>,
    /// The latest wall clock time: timestamps do not go back, even if that does.
    wall: SystemTime,
    /// When the next tick is due.
    next_ns: u64,
}

/// This host's key, and what comes of it.
struct Identity {
    key: PrivateKey,
    checker: MacChecker,
}

impl Identity {
    fn new(key: PrivateKey) -> Self {
        Self {
            checker: MacChecker::new(&key.public()),
            key,
        }
    }
}

struct InFlight {
    peer: PublicKey,
    initiator: Initiator,
}

impl Exchange {
    /// A host without peers.
    pub(crate) fn new(
        intervals: Intervals,
        private_key: Option<PrivateKey>,
        map: Arc<SessionMap>,
        counters: Arc<HandshakeCounters>,
        latest: Arc<Latest>,
    ) -> Self {
        Self {
            peers: Peers::default(),
            mismatches: Mismatches::default(),
            state: State {
                intervals,
                identity: private_key.map(Identity::new),
                map,
                in_flight: HashMap::new(),
                limiter: Limiter::default(),
                load: Load::default(),
                counters,
                latest,
                renewals: Vec::new(),
                gone: Vec::new(),
                wall: SystemTime::UNIX_EPOCH,
                next_ns: u64::MAX,
            },
        }
    }

    /// Goes on behind the initiations that there were before this process, of peers that are
    /// configured later.
    pub(crate) fn go_on_after(&mut self, earlier: Vec<PeerTimestamps>) {
        let earlier = earlier.into_iter();
        self.peers.earlier = earlier.map(|peer| (peer.peer, peer)).collect();
    }

    /// The timestamps of the peers so far, and those from before of peers that are not
    /// configured yet.
    pub(crate) fn timestamps(&mut self) -> Vec<PeerTimestamps> {
        let earlier: Vec<_> = self.peers.earlier.values().copied().collect();
        let now = self.peers.all().map(|peer| peer.timestamps());
        now.chain(earlier).collect()
    }

    /// When the next tick is due, unless something happens before that. `None`: never.
    pub(crate) fn next_ns(&self) -> Option<u64> {
        Some(self.state.next_ns).filter(|ns| *ns < u64::MAX)
    }

    /// More messages wait than are handled at once.
    pub(crate) fn note_backlog(&mut self, now: Now) {
        self.state.load.note_backlog(now.ns);
    }

    /// Makes the peers those that are configured.
    pub(crate) fn set_peers(&mut self, now: Now, configs: Vec<PeerConfig>, out: &mut impl Outside) {
        let (state, mut gone) = (&mut self.state, Vec::new());
        let changes = self.peers.configure(configs, state.intervals);
        for index in changes.outdated {
            state.abandon(index);
        }
        for mut peer in changes.gone {
            state.cancel(&mut peer);
            peer.clear(&state.map);
            state.latest().remove(&peer.key);
            if self.peers.of_shared(&peer.shared).is_none() {
                gone.push(peer.shared);
            }
        }
        self.tick(now, out);
        if !gone.is_empty() {
            self.state.next_ns = self
                .state
                .next_ns
                .min(now.ns + self.state.intervals.tick_ns);
            self.state.gone = gone;
        }
    }

    /// Changes this host's key. All sessions and handshakes of the old one go, and peers
    /// that had a session get a new one.
    pub(crate) fn set_private_key(
        &mut self,
        now: Now,
        private_key: Option<PrivateKey>,
        out: &mut impl Outside,
    ) {
        let state = &mut self.state;
        let is_same = match (&state.identity, &private_key) {
            (Some(old), Some(new)) => old.key == *new,
            (old, new) => old.is_none() && new.is_none(),
        };
        if is_same {
            return;
        }
        state.identity = private_key.map(Identity::new);
        for peer in self.peers.all() {
            state.cancel(peer);
            peer.timers.cancel();
            if peer.clear(&state.map) {
                peer.timers.want(now.ns);
            }
        }
        self.tick(now, out);
    }

    /// Says who is who, for the log.
    pub(crate) fn set_identities(&mut self, identities: Option<Identities>) {
        self.mismatches.identities = identities;
    }

    /// A worker asks to look at a peer.
    pub(crate) fn request(&mut self, now: Now, peer: &Arc<PeerSessions>, out: &mut impl Outside) {
        if let Some(peer) = self.peers.of_shared(peer) {
            self.state.attend(peer, now, out);
        }
    }

    /// Makes a session with each peer whose endpoint is known, though nothing is to be sent:
    /// peers may have sessions with this host that it does not know of any more.
    pub(crate) fn renew(&mut self, now: Now, out: &mut impl Outside) {
        let peers = self.peers.all();
        let found = peers.filter(|peer| peer.endpoint_in_use().is_some());
        self.state.renewals = found.map(|peer| peer.key).collect();
        self.tick(now, out);
    }

    /// Does what is due.
    pub(crate) fn tick(&mut self, now: Now, out: &mut impl Outside) {
        self.state.next_ns = u64::MAX;
        for peer in self.state.gone.drain(..) {
            peer.clear();
        }
        let renewals = &mut self.state.renewals;
        for key in renewals.drain(renewals.len().saturating_sub(RENEWALS_MAX)..) {
            if let Some(peer) = self.peers.get_mut(&key) {
                peer.timers.want(now.ns);
            }
        }
        for peer in self.peers.all() {
            self.state.attend(peer, now, out);
        }
        if !self.state.renewals.is_empty() {
            self.state.next_ns = now.ns;
        }
        // However many things are due one after the other, all peers are gone through now
        // and then only.
        let pause_ns = self.state.intervals.tick_ns / TICKS_AT_ONCE;
        self.state.next_ns = self.state.next_ns.max(now.ns + pause_ns);
    }
}

impl Drop for Exchange {
    /// Nobody would end its sessions in time: they go now.
    fn drop(&mut self) {
        for peer in self.peers.all() {
            self.state.cancel(peer);
            peer.clear(&self.state.map);
        }
    }
}

impl State {
    /// Does what is due for a peer.
    fn attend(&mut self, peer: &mut Peer, now: Now, out: &mut impl Outside) {
        if peer.refresh(now.ns, self.intervals.reject_after_ns, &self.map) {
            self.cancel(peer);
            self.complete(peer, now, out);
        }
        let usable = peer.usable(now.ns);
        if peer.shared.is_wanted.load(Ordering::Relaxed) {
            match &usable {
                Some(_) => drop(let_through(peer, out)),
                None => peer.timers.want(now.ns),
            }
        }
        let facts = usable.as_deref().map(as_seen_by_timers);
        let (activity, is_quiet) = peer.take_activity();
        let due = peer.timers.poll(now.ns, activity, facts);
        if due.is_over {
            self.cancel(peer);
            peer.is_awaited = false;
            peer.shared.is_wanted.store(false, Ordering::Relaxed);
            tracing::debug!("{} does not answer", peer.key);
        }
        if due.initiation {
            self.initiate(peer, now, out);
        }
        let unused = peer.take_unused(now.ns);
        if let Some(session) = unused.or(usable.filter(|_| due.keepalive)) {
            self.send_keepalive(peer, &session, now, out);
        }
        // Without an endpoint it is for the peer to begin.
        let is_due = peer.timers.wants_session() && peer.endpoint_in_use().is_some();
        peer.shared.is_due.store(is_due, Ordering::Relaxed);
        let interval_ns = match is_quiet {
            true => self.intervals.quiet_tick_ns,
            false => self.intervals.tick_ns,
        };
        let tick_ns = peer.has_sessions().then_some(now.ns + interval_ns);
        for ns in [tick_ns, peer.timers.next_ns()].into_iter().flatten() {
            self.next_ns = self.next_ns.min(ns);
        }
    }

    /// Begins a handshake in place of the one under way, if there is one. Without a key or
    /// an endpoint nothing is sent; there may be one by the next time.
    fn initiate(&mut self, peer: &mut Peer, now: Now, out: &mut impl Outside) {
        if peer.in_flight.is_some() {
            // Nobody has answered the last one: the way may have changed since the peer called.
            peer.shared.forget_source();
        }
        self.cancel(peer);
        peer.timers.initiated(now.ns, random());
        // Workers for which packets still come ask again, and have it go on for longer.
        peer.is_awaited |= peer.shared.is_wanted.swap(false, Ordering::AcqRel);
        let (Some(identity), Some(endpoint)) = (&self.identity, peer.endpoint_in_use()) else {
            return;
        };
        if peer.key == identity.key.public() {
            return;
        }
        let Some(index) = self.map.reserve() else {
            self.counters.drop_no_index.add(1);
            return;
        };
        self.wall = self.wall.max(now.wall);
        let timestamp = Timestamp::next(self.wall, peer.timestamp_sent);
        let (key, preshared_key) = (&identity.key, &peer.preshared_key);
        let begun = Initiator::start(key, &peer.key, preshared_key, index, timestamp);
        let Ok((initiator, mut message)) = begun else {
            self.map.remove(index);
            return;
        };
        peer.timestamp_sent = Some(timestamp);
        peer.in_flight = Some(index);
        let in_flight = InFlight {
            peer: peer.key,
            initiator,
        };
        self.in_flight.insert(index, in_flight);
        peer.macs.fill(&mut message, now.ns);
        out.send(endpoint, &message);
        self.counters.initiations_sent.add(1);
    }

    /// A session is in force that may be sent in.
    fn complete(&mut self, peer: &mut Peer, now: Now, out: &mut impl Outside) {
        peer.timers.completed(now.ns);
        self.latest().insert(peer.key, now.wall);
        if let_through(peer, out) {
            peer.defer_first(now.ns + self.intervals.tick_ns);
        }
        tracing::debug!("a new session with {}", peer.key);
    }

    fn send_keepalive(
        &mut self,
        peer: &mut Peer,
        session: &Session,
        now: Now,
        out: &mut impl Outside,
    ) {
        let mut datagram = [0; OVERHEAD_BYTES];
        let Some(endpoint) = peer.endpoint_in_use() else {
            return;
        };
        if session.seal(&mut datagram, OVERHEAD_BYTES).is_ok() {
            peer.shared.note_sent(now.ns, false);
            out.send(endpoint, &datagram);
            self.counters.keepalives_sent.add(1);
        }
    }

    /// Forgets the handshake that this host has begun with a peer.
    fn cancel(&mut self, peer: &mut Peer) {
        if let Some(index) = peer.in_flight.take() {
            self.abandon(index);
        }
    }

    fn abandon(&mut self, index: u32) {
        self.in_flight.remove(&index);
        self.map.remove(index);
    }

    fn latest(&self) -> MutexGuard<'_, HashMap<PublicKey, SystemTime>> {
        self.latest.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Has packets that wait for a session sent. Returns whether there are any.
fn let_through(peer: &mut Peer, out: &mut impl Outside) -> bool {
    let is_wanted = peer.shared.is_wanted.swap(false, Ordering::AcqRel);
    let is_awaited = std::mem::take(&mut peer.is_awaited) || is_wanted;
    if is_awaited {
        out.wake_workers();
    }
    is_awaited
}

/// For the jitter of the timers.
fn random() -> u64 {
    getrandom::u64().unwrap_or(0)
}

#[cfg(test)]
#[path = "exchange_tests.rs"]
mod tests;
