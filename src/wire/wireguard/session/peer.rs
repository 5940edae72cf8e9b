//! What the handshake thread and the workers share of one peer.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use arc_swap::{ArcSwapOption, Guard};

use super::Session;
use crate::wire::Endpoint;

/// A session that was looked up, or none. Taking it out costs no more than a few loads, and
/// no write to memory that threads share. A thread should have a few of them at most, and
/// not for longer than it takes to handle one run of datagrams.
pub type Found = Guard<Option<Arc<Session>>>;

/// The sessions of one peer, and what was last seen of it. It belongs to the peer and
/// outlives tables (see `dataplane/table.rs`).
///
/// All times are nanoseconds of `CLOCK_BOOTTIME`; 0 stands for never. They are as exact as
/// the workers' clocks, which are read once per turn.
#[derive(Debug, Default)]
pub struct PeerSessions {
    /// The one to send with.
    pub current: ArcSwapOption<Session>,
    /// As the responder: the one to send with once the initiator has used it.
    pub next: ArcSwapOption<Session>,
    /// Where its datagrams go: as configured, then wherever it last sent from.
    pub endpoint: ArcSwapOption<Endpoint>,
    /// An endpoint that the kernel would not send to from there: it is not tried again before
    /// the next handshake.
    refused: ArcSwapOption<Endpoint>,
    /// A worker has asked for a session, and the handshake thread has not seen it yet.
    pub is_wanted: AtomicBool,
    /// This host wants a session with it, be there one or not, and knows its endpoint: so the
    /// handshake thread says.
    pub is_due: AtomicBool,
    /// When anything was last sent to it in a session.
    pub sent_ns: AtomicU64,
    /// The same, of what was no keepalive.
    pub data_sent_ns: AtomicU64,
    /// When anything that is authentic last came from it in a session.
    pub received_ns: AtomicU64,
    /// The same, of what was no keepalive.
    pub data_received_ns: AtomicU64,
    /// What was dropped of what came in its sessions.
    pub drops: InboundDrops,
    /// Keeps [`Self::clear`] out of the midst of [`Self::confirm`].
    change: Mutex<()>,
}

/// Data messages that named a session of one peer, and came to nothing. Any worker counts
/// here, as it is not usual.
#[derive(Debug, Default)]
pub struct InboundDrops {
    /// The session was too old.
    pub session_unknown: AtomicU64,
    /// They were not made with its keys, or were changed since.
    pub forged: AtomicU64,
    /// They had come before, or were too late to tell.
    pub replayed: AtomicU64,
    /// The packet's source does not belong to the peer.
    pub source_not_allowed: AtomicU64,
}

impl InboundDrops {
    /// Names and values. The names are those of the workers' counters.
    pub fn values(&self) -> [(&'static str, u64); 4] {
        let value = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        [
            ("session_unknown", value(&self.session_unknown)),
            ("forged", value(&self.forged)),
            ("replayed", value(&self.replayed)),
            ("source_not_allowed", value(&self.source_not_allowed)),
        ]
    }
}

impl PeerSessions {
    /// The session to send with, if there is one that may.
    #[inline]
    pub fn usable(&self, now_ns: u64) -> Found {
        let current = self.current.load();
        if current
            .as_ref()
            .is_some_and(|current| current.may_send(now_ns))
        {
            current
        } else {
            Guard::from_inner(None)
        }
    }

    /// Whether there is a session to send with, for those who only ask: the handshake thread
    /// takes those out that have become too old.
    pub fn has_session(&self) -> bool {
        self.current.load().is_some()
    }

    /// Notes that a datagram was opened with `session`. The first one that comes in the next
    /// session shows that the initiator has it, and makes it the current one. The old one
    /// stays in the map until the handshake thread removes it.
    ///
    /// Returns true for the one call that did so: packets that wait may leave now.
    #[inline]
    pub fn confirm(&self, session: &Session) -> bool {
        let next = self.next.load();
        match next.as_ref() {
            Some(next) if std::ptr::eq(&**next, session) => self.promote(next),
            _ => false,
        }
    }

    /// Makes the next session the current one, if it still is the next. The lock is taken
    /// once for each session, and not on the way of other packets.
    #[cold]
    fn promote(&self, next: &Arc<Session>) -> bool {
        let _change = self.change.lock();
        let found = self.next.compare_and_swap(next, None);
        if !found.as_ref().is_some_and(|found| Arc::ptr_eq(found, next)) {
            return false;
        }
        // The handshake thread may have put a later one there meanwhile.
        self.current.rcu(|current| match current {
            Some(current) if current.established_ns() > next.established_ns() => {
                Some(Arc::clone(current))
            }
            _ => Some(Arc::clone(next)),
        });
        true
    }

    /// Takes its sessions out; a worker that is about to confirm one does not put it back.
    /// This is due when the peer is removed, as each session keeps its peer alive. They stay
    /// in the map until they are removed there.
    pub fn clear(&self) {
        let _change = self.change.lock();
        self.next.store(None);
        self.current.store(None);
    }

    /// Notes where an authentic datagram came from: what is sent goes there from now on.
    #[inline]
    pub fn note_sender(&self, from: Endpoint) {
        let endpoint = self.endpoint.load();
        if endpoint.as_deref() != Some(&from) {
            self.note_move(from);
        }
    }

    #[cold]
    fn note_move(&self, from: Endpoint) {
        let is_refused = self.refused.load().as_deref() == Some(&from);
        let to = match is_refused {
            true => from.address.into(),
            false => from,
        };
        if self.endpoint.load().as_deref() != Some(&to) {
            self.endpoint.store(Some(Arc::new(to)));
        }
    }

    /// The same of a handshake message, after which all is tried again.
    pub fn note_handshake(&self, from: Endpoint) {
        self.refused.store(None);
        self.note_sender(from);
    }

    /// The address that its datagrams go to.
    #[inline]
    pub fn address(&self) -> Option<SocketAddr> {
        self.endpoint.load().as_deref().map(|to| to.address)
    }

    /// Has the kernel choose the address that datagrams leave from, until the peer calls
    /// another one, or there is a handshake: this host may have lost the one that the peer has
    /// called.
    #[cold]
    pub fn forget_source(&self) {
        let endpoint = self.endpoint.load_full();
        if let Some(refused) = endpoint.filter(|to| to.source.is_some()) {
            let to = refused.address.into();
            self.refused.store(Some(refused));
            self.note_sender(to);
        }
    }

    /// Notes that something was sent in a session; `has_data`: not only keepalives.
    #[inline]
    pub fn note_sent(&self, now_ns: u64, has_data: bool) {
        note(&self.sent_ns, now_ns);
        if has_data {
            note(&self.data_sent_ns, now_ns);
        }
    }

    /// Notes that something authentic was received in a session; `has_data`: not only
    /// keepalives.
    #[inline]
    pub fn note_received(&self, now_ns: u64, has_data: bool) {
        note(&self.received_ns, now_ns);
        if has_data {
            note(&self.data_received_ns, now_ns);
        }
    }
}

/// Moves a time on. Workers share it, so it is only written when that changes something.
#[inline]
fn note(time_ns: &AtomicU64, now_ns: u64) {
    if time_ns.load(Ordering::Relaxed) < now_ns {
        time_ns.store(now_ns, Ordering::Relaxed);
    }
}

#[cfg(test)]
#[path = "peer_tests.rs"]
mod tests;
