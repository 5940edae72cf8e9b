//! Peers, and the sessions of each: which there are, and which of them are in force.
//!
//! A peer has three sessions at the most, as in the kernel's implementation: the current one,
//! to send in; the next one, which a peer has initiated and not used yet; and the previous
//! one, in which packets may still be on their way. All of them are in the [`SessionMap`], to
//! receive in. None stays there for longer than it may be used, and with the last reference
//! its keys go: no timer is needed that wipes them later (section 6.3 of the paper asks for
//! it after 540 s).

use std::collections::HashMap;
use std::collections::hash_map::ValuesMut;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use arc_swap::ArcSwapOption;
use serde::{Deserialize, Serialize};

use super::timers::{Activity, Intervals, Timers, Usable};
use crate::wire::Endpoint;
use crate::wire::wireguard::cookie::MacWriter;
use crate::wire::wireguard::keys::{PresharedKey, PublicKey};
use crate::wire::wireguard::session::{REKEY_AFTER_MESSAGES, Session};
use crate::wire::wireguard::sessions::{PeerSessions, SessionMap};
use crate::wire::wireguard::timestamp::Timestamp;

/// A peer as it is configured.
#[derive(Clone, Debug)]
pub(crate) struct PeerConfig {
    /// By which it is known.
    pub public_key: PublicKey,
    /// All zeros if there is none.
    pub preshared_key: PresharedKey,
    /// The path to it leads through the tunnel itself: nothing is to be sent.
    pub is_suspended: bool,
    /// How long it may be silent on the path before a keepalive is sent.
    pub persistent_keepalive: Option<Duration>,
    /// What the workers share with the handshake thread. It has the endpoint, if one is
    /// known.
    pub sessions: Arc<PeerSessions>,
}

impl PeerConfig {
    fn persistent_ns(&self) -> Option<u64> {
        let keepalive = self.persistent_keepalive?;
        u64::try_from(keepalive.as_nanos())
            .ok()
            .filter(|ns| *ns > 0)
    }
}

/// The timestamps of the latest initiations between this host and a peer. Whoever goes on with
/// this host's key has to know them: the peer refuses an earlier one, and this host is to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerTimestamps {
    /// The peer's key.
    pub peer: PublicKey,
    /// Of the last one sent.
    pub sent: Option<Timestamp>,
    /// The greatest one received.
    pub received: Option<Timestamp>,
}

/// A peer's state.
pub(crate) struct Peer {
    /// By which it is known.
    pub key: PublicKey,
    /// For the next handshake.
    pub preshared_key: PresharedKey,
    /// What workers see of it.
    pub shared: Arc<PeerSessions>,
    /// Nothing is to be sent to it.
    is_suspended: bool,
    /// What is due.
    pub timers: Timers,
    /// The MACs of what is sent to it.
    pub macs: MacWriter,
    /// The index of the handshake that this host has begun.
    pub in_flight: Option<u32>,
    /// The timestamp of the last initiation sent.
    pub timestamp_sent: Option<Timestamp>,
    /// The greatest timestamp of an initiation received, and when that was.
    pub initiation_received: Option<(Timestamp, u64)>,
    /// Packets wait for a session: a worker has said so.
    pub is_awaited: bool,
    /// All sessions in the map, in the order of their birth.
    sessions: Vec<Arc<Session>>,
    /// The next session, unless it has been confirmed, as far as is known here.
    next: Option<Arc<Session>>,
    /// A session that this host has initiated, and when a keepalive is due in it unless
    /// something else was sent before.
    unused: Option<(Arc<Session>, u64)>,
    /// What workers had noted when that was last looked at.
    seen: Activity,
}

impl Peer {
    fn new(config: PeerConfig, intervals: Intervals) -> Self {
        Self {
            key: config.public_key,
            timers: Timers::new(intervals, config.persistent_ns()),
            macs: MacWriter::new(&config.public_key),
            preshared_key: config.preshared_key,
            shared: config.sessions,
            is_suspended: config.is_suspended,
            in_flight: None,
            timestamp_sent: None,
            initiation_received: None,
            is_awaited: false,
            sessions: Vec::new(),
            next: None,
            unused: None,
            seen: Activity::default(),
        }
    }

    /// Goes on behind the initiations that there were before this process.
    fn go_on_after(&mut self, earlier: PeerTimestamps) {
        self.timestamp_sent = earlier.sent;
        self.initiation_received = earlier.received.map(|timestamp| (timestamp, 0));
    }

    /// The timestamps so far.
    pub(crate) fn timestamps(&self) -> PeerTimestamps {
        PeerTimestamps {
            peer: self.key,
            sent: self.timestamp_sent,
            received: self.initiation_received.map(|(timestamp, _)| timestamp),
        }
    }

    /// Puts a session in force that this host has initiated: it is current at once. A next
    /// one that the peer has initiated at the same time stays, to receive in.
    pub(crate) fn begin_as_initiator(&mut self, session: Arc<Session>, map: &SessionMap) {
        map.store(Arc::clone(&session));
        self.shared.next.store(None);
        self.shared.current.store(Some(Arc::clone(&session)));
        self.next = None;
        self.unused = Some((Arc::clone(&session), 0));
        self.sessions.push(session);
        self.prune(map);
    }

    /// Puts a session in force that the peer has initiated: it is received in, and becomes
    /// current by the first message in it.
    pub(crate) fn begin_as_responder(&mut self, session: Arc<Session>, map: &SessionMap) {
        map.store(Arc::clone(&session));
        self.shared.next.store(Some(Arc::clone(&session)));
        self.next = Some(Arc::clone(&session));
        self.sessions.push(session);
        self.prune(map);
    }

    /// Takes out what has become too old, and finds out what workers have done. Returns
    /// whether the next session was confirmed.
    pub(crate) fn refresh(&mut self, now_ns: u64, reject_after_ns: u64, map: &SessionMap) -> bool {
        let next = &self.shared.next;
        let is_confirmed = self.next.take_if(|one| !holds(next, one)).is_some();
        let is_old =
            |session: &Session| now_ns.saturating_sub(session.established_ns()) >= reject_after_ns;
        self.next.take_if(|session| is_old(session));
        let old = self.sessions.extract_if(.., |session| is_old(session));
        for session in old {
            retire(&session, &self.shared, map);
        }
        self.prune(map);
        is_confirmed
    }

    /// Takes out all sessions but the current, the next and the latest others, three in all. A
    /// current one that is not in the map is one that a worker has confirmed while it was
    /// taken out: it goes.
    fn prune(&mut self, map: &SessionMap) {
        let current = self.shared.current.load_full();
        let is_current =
            |one: &Arc<Session>| current.as_ref().is_some_and(|it| Arc::ptr_eq(it, one));
        let is_next =
            |one: &Arc<Session>| self.next.as_ref().is_some_and(|it| Arc::ptr_eq(it, one));
        let is_other = |one: &Arc<Session>| !is_current(one) && !is_next(one);
        let others = self.sessions.iter().filter(|one| is_other(one)).count();
        // After initiations that have crossed, the peer may send in another one than this host
        // does until the next handshake, and that makes another.
        let kept = if self.next.is_some() { 1 } else { 2 };
        let mut surplus = others.saturating_sub(kept);
        let out = self.sessions.extract_if(.., |one| {
            let is_out = surplus > 0 && is_other(one);
            surplus -= usize::from(is_out);
            is_out
        });
        for session in out {
            retire(&session, &self.shared, map);
        }
        if let Some(stray) =
            current.filter(|it| !self.sessions.iter().any(|one| Arc::ptr_eq(it, one)))
        {
            retire(&stray, &self.shared, map);
        }
    }

    /// Takes out all sessions. Returns whether there was one.
    pub(crate) fn clear(&mut self, map: &SessionMap) -> bool {
        (self.next, self.unused) = (None, None);
        self.shared.clear();
        let had_one = !self.sessions.is_empty();
        for session in self.sessions.drain(..) {
            map.remove(session.local_index());
        }
        had_one
    }

    /// Where datagrams go to it, if anywhere.
    pub(crate) fn endpoint_in_use(&self) -> Option<Endpoint> {
        let endpoint = self.shared.endpoint.load();
        endpoint.as_deref().copied().filter(|_| !self.is_suspended)
    }

    /// The session to send in, if there is one.
    pub(crate) fn usable(&self, now_ns: u64) -> Option<Arc<Session>> {
        self.shared.usable(now_ns).clone()
    }

    /// Packets that wait are about to be sent in the session that has just begun.
    pub(crate) fn defer_first(&mut self, until_ns: u64) {
        if let Some((_, due_ns)) = &mut self.unused {
            *due_ns = until_ns;
        }
    }

    /// The session that this host has initiated, if a keepalive is due in it: nothing has
    /// been sent in it so far, and the peer waits for something before it may send itself.
    pub(crate) fn take_unused(&mut self, now_ns: u64) -> Option<Arc<Session>> {
        let (session, _) = self.unused.take_if(|(_, due_ns)| *due_ns <= now_ns)?;
        Some(session).filter(|session| session.counter() == 0)
    }

    /// Whether there are sessions, so that workers may note something.
    pub(crate) fn has_sessions(&self) -> bool {
        !self.sessions.is_empty()
    }

    /// What workers have noted, and whether that is nothing new, and nothing is waited for.
    pub(crate) fn take_activity(&mut self) -> (Activity, bool) {
        let shared = &self.shared;
        let activity = Activity {
            sent_ns: shared.sent_ns.load(Ordering::Relaxed),
            data_sent_ns: shared.data_sent_ns.load(Ordering::Relaxed),
            received_ns: shared.received_ns.load(Ordering::Relaxed),
            data_received_ns: shared.data_received_ns.load(Ordering::Relaxed),
        };
        let before = std::mem::replace(&mut self.seen, activity);
        (activity, activity == before && self.unused.is_none())
    }
}

/// A session as the timers see it.
pub(crate) fn as_seen_by_timers(session: &Session) -> Usable {
    Usable {
        established_ns: session.established_ns(),
        is_initiator: session.is_initiator(),
        is_worn: session.counter() >= REKEY_AFTER_MESSAGES,
    }
}

/// Whether a slot has this session.
fn holds(slot: &ArcSwapOption<Session>, session: &Arc<Session>) -> bool {
    slot.load()
        .as_ref()
        .is_some_and(|it| Arc::ptr_eq(it, session))
}

/// Takes a session out of wherever it is.
fn retire(session: &Arc<Session>, shared: &PeerSessions, map: &SessionMap) {
    for slot in [&shared.current, &shared.next] {
        slot.compare_and_swap(session, None);
    }
    map.remove(session.local_index());
}

/// All peers, by their keys and by what workers know them by.
#[derive(Default)]
pub(crate) struct Peers {
    by_key: HashMap<PublicKey, Peer>,
    /// By the address of what is shared with workers, which the peer keeps alive.
    by_shared: HashMap<usize, PublicKey>,
    /// What is known of peers that have not been configured yet.
    pub earlier: HashMap<PublicKey, PeerTimestamps>,
}

impl Peers {
    /// The peer of this key.
    pub(crate) fn get_mut(&mut self, key: &PublicKey) -> Option<&mut Peer> {
        self.by_key.get_mut(key)
    }

    /// The peer that workers mean.
    pub(crate) fn of_shared(&mut self, shared: &Arc<PeerSessions>) -> Option<&mut Peer> {
        let key = self.by_shared.get(&address(shared))?;
        self.by_key.get_mut(key)
    }

    /// All of them.
    pub(crate) fn all(&mut self) -> ValuesMut<'_, PublicKey, Peer> {
        self.by_key.values_mut()
    }

    /// Makes the peers those that are configured. What is known of those that stay is kept.
    pub(crate) fn configure(&mut self, configs: Vec<PeerConfig>, intervals: Intervals) -> Changes {
        let mut old = std::mem::take(&mut self.by_key);
        self.by_shared.clear();
        let mut changes = Changes::default();
        for config in configs {
            let key = config.public_key;
            self.by_shared.insert(address(&config.sessions), key);
            let peer = match old.remove(&key) {
                Some(mut peer) if Arc::ptr_eq(&peer.shared, &config.sessions) => {
                    peer.timers.set_persistent(config.persistent_ns());
                    peer.is_suspended = config.is_suspended;
                    if peer.preshared_key != config.preshared_key {
                        peer.preshared_key = config.preshared_key;
                        changes.outdated.extend(peer.in_flight.take());
                    }
                    peer
                }
                other => {
                    changes.gone.extend(other);
                    let mut peer = Peer::new(config, intervals);
                    if let Some(earlier) = self.earlier.remove(&key) {
                        peer.go_on_after(earlier);
                    }
                    peer
                }
            };
            changes.gone.extend(self.by_key.insert(key, peer));
        }
        changes.gone.extend(old.into_values());
        changes
    }
}

/// What a new configuration leaves to be taken out.
#[derive(Default)]
pub(crate) struct Changes {
    /// Peers that are no longer there.
    pub gone: Vec<Peer>,
    /// Handshakes under way with another preshared key.
    pub outdated: Vec<u32>,
}

fn address(shared: &Arc<PeerSessions>) -> usize {
    Arc::as_ptr(shared).addr()
}
