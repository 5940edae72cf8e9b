//! A session: the keys that one handshake has made, and their use. Packets are sealed and
//! opened in place with ChaCha20-Poly1305, from any thread and without a lock; sections
//! 5.4.6 and 6.1 of the paper.

mod aead;
mod peer;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use self::aead::Aead;
use super::handshake::TransportKeys;
use super::message::{DATA, DATA_HEADER_BYTES, TAG_BYTES};
use super::replay::ReplayWindow;

pub use self::peer::{Found, InboundDrops, PeerSessions};

/// Messages after which the sender asks for a new session.
pub const REKEY_AFTER_MESSAGES: u64 = 1 << 60;

/// Counters from here on are neither sent nor accepted.
pub const REJECT_AFTER_MESSAGES: u64 = u64::MAX - (1 << 13);

/// Age at which a session is of no more use.
pub const REJECT_AFTER_NS: u64 = 180_000_000_000;

/// Bytes of a datagram beside the packet: header and tag.
pub const OVERHEAD_BYTES: usize = DATA_HEADER_BYTES + TAG_BYTES;

/// Why datagrams were not sealed. None of them may leave: some may still be in clear.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SealError {
    /// The session has no counters left for them.
    Exhausted,
    /// One of them has no room for header and tag: a fault of the caller.
    Layout,
}

/// Why a datagram was not opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpenError {
    /// It is shorter than header and tag.
    Short,
    /// The peer has not made it with this session's keys, or it was changed since.
    Forged,
    /// It is authentic, and was received before or is older than the window.
    Replayed,
}

/// The keys of one handshake, this host's counter, and the window of the peer's counters.
///
/// A session keeps its peer alive, and the peer keeps its sessions: whoever removes a peer
/// calls [`PeerSessions::clear`], or neither is ever freed.
pub struct Session {
    send: Aead,
    receive: Aead,
    /// All datagrams that are sealed take their counters here.
    next_counter: NextCounter,
    received: ReplayWindow,
    local_index: u32,
    remote_index: u32,
    is_initiator: bool,
    established_ns: u64,
    peer: Arc<PeerSessions>,
}

/// Written for each batch, so not on a line with the keys (128: x86 fetches lines in pairs).
#[repr(align(128))]
struct NextCounter(AtomicU64);

impl Session {
    /// The session of a handshake that was completed at `established_ns`. The peer names it
    /// by `local_index`. `is_initiator` says whether this host began the handshake.
    pub fn new(
        keys: TransportKeys,
        local_index: u32,
        is_initiator: bool,
        established_ns: u64,
        peer: Arc<PeerSessions>,
    ) -> Self {
        Self {
            send: Aead::new(&keys.send),
            receive: Aead::new(&keys.receive),
            next_counter: NextCounter(AtomicU64::new(0)),
            received: ReplayWindow::new(),
            local_index,
            remote_index: keys.remote_index,
            is_initiator,
            established_ns,
            peer,
        }
    }

    /// Seals datagrams that lie back to back, each of `datagram_bytes` but the last, which
    /// may be shorter. Each is room for the header, the padded packet, room for the tag. Their
    /// counters follow one another, and no other datagram of this session has or gets them.
    ///
    /// # Errors
    /// See [`SealError`]. Nothing may be sent then.
    pub fn seal(&self, datagrams: &mut [u8], datagram_bytes: usize) -> Result<(), SealError> {
        if datagram_bytes < OVERHEAD_BYTES {
            return Err(SealError::Layout);
        }
        let count = datagrams.len().div_ceil(datagram_bytes) as u64;
        let first = self.reserve(count)?;
        for (counter, datagram) in (first..).zip(datagrams.chunks_mut(datagram_bytes)) {
            self.seal_one(datagram, counter)?;
        }
        Ok(())
    }

    /// The first of `count` counters that are the caller's alone.
    #[inline]
    fn reserve(&self, count: u64) -> Result<u64, SealError> {
        // One exchange for all of them. An addition without the check would pass the limit
        // when several threads are there at once, and wrap around in the end.
        let reserve = |next: u64| {
            let end = next.checked_add(count)?;
            (end <= REJECT_AFTER_MESSAGES).then_some(end)
        };
        let reserved =
            self.next_counter
                .0
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, reserve);
        reserved.map_err(|_| SealError::Exhausted)
    }

    #[inline]
    fn seal_one(&self, datagram: &mut [u8], counter: u64) -> Result<(), SealError> {
        let (header, sealed) = datagram
            .split_first_chunk_mut::<DATA_HEADER_BYTES>()
            .ok_or(SealError::Layout)?;
        let (packet, room) = sealed
            .split_last_chunk_mut::<TAG_BYTES>()
            .ok_or(SealError::Layout)?;
        let start = u64::from(DATA) | u64::from(self.remote_index) << 32;
        header[..8].copy_from_slice(&start.to_le_bytes());
        header[8..].copy_from_slice(&counter.to_le_bytes());
        let sealed = self.send.seal(counter, packet);
        *room = sealed.map_err(|_| SealError::Layout)?;
        Ok(())
    }

    /// Opens a datagram whose type and index the caller has looked at, in place. What comes
    /// back is the padded packet, empty if it is a keepalive. Whatever is wrong with it, the
    /// datagram's bytes are of no more use.
    ///
    /// # Errors
    /// See [`OpenError`]. The window only moves for what is authentic.
    pub fn open<'a>(&self, datagram: &'a mut [u8]) -> Result<&'a mut [u8], OpenError> {
        let (header, sealed) = datagram
            .split_first_chunk_mut::<DATA_HEADER_BYTES>()
            .ok_or(OpenError::Short)?;
        if sealed.len() < TAG_BYTES {
            return Err(OpenError::Short);
        }
        let [.., a, b, c, d, e, f, g, h] = *header;
        let counter = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
        if counter >= REJECT_AFTER_MESSAGES {
            return Err(OpenError::Forged);
        }
        let opened = self.receive.open(counter, sealed);
        let packet = opened.map_err(|_| OpenError::Forged)?;
        match self.received.take(counter) {
            Ok(()) => Ok(packet),
            Err(_) => Err(OpenError::Replayed),
        }
    }

    /// By which the peer's messages name this session.
    pub fn local_index(&self) -> u32 {
        self.local_index
    }

    /// By which messages to the peer name this session.
    pub fn remote_index(&self) -> u32 {
        self.remote_index
    }

    /// Whether this host began the handshake.
    pub fn is_initiator(&self) -> bool {
        self.is_initiator
    }

    /// When the handshake was completed here.
    pub fn established_ns(&self) -> u64 {
        self.established_ns
    }

    /// How many datagrams were sealed.
    pub fn counter(&self) -> u64 {
        self.next_counter.0.load(Ordering::Relaxed)
    }

    /// Whose session it is.
    pub fn peer(&self) -> &Arc<PeerSessions> {
        &self.peer
    }

    /// Whether it may still seal.
    #[inline]
    pub fn may_send(&self, now_ns: u64) -> bool {
        self.may_receive(now_ns) && self.counter() < REJECT_AFTER_MESSAGES
    }

    /// Whether it may still open.
    #[inline]
    pub fn may_receive(&self, now_ns: u64) -> bool {
        now_ns.saturating_sub(self.established_ns) < REJECT_AFTER_NS
    }
}

/// Shows no keys; nor the peer, which would show this session in turn.
impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session")
            .field("local_index", &self.local_index)
            .field("remote_index", &self.remote_index)
            .field("is_initiator", &self.is_initiator)
            .field("established_ns", &self.established_ns)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
#[path = "session_tests.rs"]
mod tests;
