//! TAI64N timestamps: the payload of an initiation, by which the responder refuses replayed
//! ones (paper, sections 5.1 and 5.4.2).
//!
//! They count in steps of 2^24 ns (about 17 ms), as the kernel's do, so that they tell
//! little of this host's clock. They never go back, even if the clock does: a peer that has
//! seen a later one would refuse all initiations until the clock has caught up.

use std::time::{SystemTime, UNIX_EPOCH};

/// Bytes of a timestamp.
pub const TIMESTAMP_BYTES: usize = 12;

/// The second at which Unix time began, in TAI64: 2^62, and the 10 seconds that TAI was
/// ahead (<https://cr.yp.to/libtai/tai64.html>). Leap seconds since then are left out, as
/// all implementations do.
const UNIX_EPOCH_TAI: u64 = (1 << 62) + 10;

/// Nanoseconds that two timestamps differ by at least, if they do.
const STEP_NS: u32 = 1 << 24;

const SECOND_NS: u32 = 1_000_000_000;

/// When an initiation was made, as its initiator says. A later one is greater.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp([u8; TIMESTAMP_BYTES]);

impl Timestamp {
    /// The timestamp of the next initiation toward a peer: of `now`, or one step after the
    /// `last` that this peer was sent, whichever is later.
    pub fn next(now: SystemTime, last: Option<Timestamp>) -> Self {
        let now = Self::of(now);
        match last {
            Some(last) if last >= now => last.following(),
            _ => now,
        }
    }

    /// A timestamp as it came, or as it was stored. Any bytes are one: they are only ever
    /// compared.
    pub fn from_bytes(bytes: [u8; TIMESTAMP_BYTES]) -> Self {
        Self(bytes)
    }

    /// Eight bytes of seconds and four of nanoseconds, big-endian.
    pub fn to_bytes(self) -> [u8; TIMESTAMP_BYTES] {
        self.0
    }

    /// A time on a step. What was before 1970 counts as 1970.
    fn of(time: SystemTime) -> Self {
        let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
        let seconds = UNIX_EPOCH_TAI.saturating_add(since.as_secs());
        Self::new(seconds, since.subsec_nanos() / STEP_NS * STEP_NS)
    }

    fn new(seconds: u64, nanoseconds: u32) -> Self {
        let mut bytes = [0; TIMESTAMP_BYTES];
        bytes[..8].copy_from_slice(&seconds.to_be_bytes());
        bytes[8..].copy_from_slice(&nanoseconds.to_be_bytes());
        Self(bytes)
    }

    /// The next step after it.
    fn following(self) -> Self {
        let [a, b, c, d, e, f, g, h, fraction @ ..] = self.0;
        let seconds = u64::from_be_bytes([a, b, c, d, e, f, g, h]);
        let nanoseconds = u32::from_be_bytes(fraction);
        match nanoseconds.checked_add(STEP_NS) {
            Some(next) if next < SECOND_NS => Self::new(seconds, next / STEP_NS * STEP_NS),
            _ => Self::new(seconds.saturating_add(1), 0),
        }
    }
}
