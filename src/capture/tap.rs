//! Where a worker leaves copies of packets.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use arc_swap::ArcSwapOption;

use super::Ring;
use crate::packet::batch::NextHop;

/// Which way a packet goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Direction {
    /// Out of the host: TUN to UDP.
    Out = 0,
    /// Into the host: UDP to TUN.
    In = 1,
}

macro_rules! reasons {
    ($($reason:ident $name:literal),+ $(,)?) => {
        /// Why a packet was dropped, by the counters' names.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[allow(missing_docs, reason = "the counters say what each means")]
        pub enum Reason {
            $($reason,)+
        }

        impl Reason {
            /// All of them, by [`Self::code`].
            pub const ALL: &[Self] = &[$(Self::$reason,)+];

            /// The counter's name, without `drop_`.
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$reason => $name,)+
                }
            }
        }
    };
}

reasons! {
    TunMalformed "tun_malformed",
    NoRoute "no_route",
    PeerUnresolved "peer_unresolved",
    Ttl "ttl",
    TooBig "too_big",
    Oversize "oversize",
    NoBuffer "no_buffer",
    NoSession "no_session",
    QueueAqm "queue_aqm",
    QueueFull "queue_full",
    SenderUnknown "sender_unknown",
    SourceNotAllowed "source_not_allowed",
    Short "short",
    Version "version",
    Length "length",
    Ecn "ecn",
}

impl Reason {
    /// Its number in frames; 0 is none.
    pub(super) fn code(self) -> u8 {
        self as u8 + 1
    }
}

/// What is noted of a packet.
#[derive(Clone, Copy, Debug)]
pub struct Note<'a> {
    /// Which way it goes.
    pub direction: Direction,
    /// The peer that it goes to or comes from, if that is known.
    pub peer: Option<NextHop>,
    /// Why it goes no further, if it does not.
    pub dropped: Option<Reason>,
    /// Of a GSO packet, the payload bytes of each of its packets but the last; else 0.
    pub gso_bytes: u16,
    /// Bytes of the whole packet.
    pub packet_bytes: usize,
    /// The packet, or as much of it as is at hand.
    pub packet: &'a [u8],
}

impl<'a> Note<'a> {
    /// A packet that is carried.
    pub fn carried(direction: Direction, peer: Option<NextHop>, packet: &'a [u8]) -> Self {
        Self {
            direction,
            peer,
            dropped: None,
            gso_bytes: 0,
            packet_bytes: packet.len(),
            packet,
        }
    }

    /// The same, dropped.
    #[must_use]
    pub fn dropped(self, reason: Reason) -> Self {
        Self {
            dropped: Some(reason),
            ..self
        }
    }

    /// The same, a GSO packet.
    #[must_use]
    pub fn gso(self, gso_bytes: u16) -> Self {
        Self { gso_bytes, ..self }
    }
}

/// See the module's documentation. One worker notes, one thread turns it on and off.
#[derive(Debug, Default)]
pub struct Tap {
    is_on: AtomicBool,
    /// Of the table that the worker forwards by.
    generation: AtomicU16,
    ring: ArcSwapOption<Ring>,
}

impl Tap {
    /// Whether somebody captures.
    #[inline]
    pub fn is_on(&self) -> bool {
        self.is_on.load(Ordering::Relaxed)
    }

    /// Notes a packet if somebody captures. For the worker alone.
    #[inline]
    pub fn note<'a>(&self, note: impl FnOnce() -> Note<'a>) {
        if self.is_on() {
            self.put(&note());
        }
    }

    /// The worker forwards by a table of this generation from now on: peers have other numbers
    /// than before. For the worker alone.
    pub fn set_generation(&self, generation: u16) {
        self.generation.store(generation, Ordering::Relaxed);
    }

    #[cold]
    fn put(&self, note: &Note<'_>) {
        if let Some(ring) = &*self.ring.load() {
            let now = SystemTime::now().duration_since(UNIX_EPOCH);
            let timestamp_ns = now.unwrap_or_default().as_nanos() as u64;
            ring.put(note, timestamp_ns, self.generation.load(Ordering::Relaxed));
        }
    }

    /// Has the worker note packets in a ring from now on.
    pub(crate) fn attach(&self, ring: Arc<Ring>) {
        self.ring.store(Some(ring));
        self.is_on.store(true, Ordering::Release);
    }

    /// Has the worker note nothing from now on but the packet that it is at.
    pub(crate) fn turn_off(&self) {
        self.is_on.store(false, Ordering::Release);
    }

    /// The same, and takes the ring away. `ring`: the last handle to it besides.
    pub(crate) fn detach(&self, ring: Arc<Ring>) {
        self.turn_off();
        self.ring.store(None);
        // Freed here, and not by the worker.
        while Arc::strong_count(&ring) > 1 {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_noted_unless_somebody_captures() {
        let (tap, ring) = (Tap::default(), Arc::new(Ring::new(1024, 128)));
        let note = || tap.note(|| Note::carried(Direction::In, None, &[7; 100]));
        note();
        tap.attach(Arc::clone(&ring));
        note();
        let count = ring.counts();
        tap.detach(ring);
        note();
        assert_eq!((count, tap.is_on()), ((1, 0), false));
    }
}
