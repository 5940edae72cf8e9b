//! TAI64N timestamps: the payload of an initiation, by which the responder refuses replayed
//! ones (paper, sections 5.1 and 5.4.2).
//!
//! They count in steps of 2^24 ns (about 17 ms), as the kernel's do, so that they tell
//! little of this host's clock. They never go back, even if the clock does: a peer that has
//! seen a later one would refuse all initiations until the clock has caught up.

use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

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
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
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

    /// A timestamp as it came. Any bytes are one: they are only ever compared.
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

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    fn unix(seconds: u64, nanoseconds: u32) -> SystemTime {
        UNIX_EPOCH + Duration::new(seconds, nanoseconds)
    }

    fn parts(timestamp: Timestamp) -> (u64, u32) {
        let (seconds, fraction) = timestamp.0.split_at(8);
        (
            u64::from_be_bytes(seconds.try_into().unwrap()),
            u32::from_be_bytes(fraction.try_into().unwrap()),
        )
    }

    #[test]
    fn time_is_written_as_tai64n() {
        let epoch = [0x40, 0, 0, 0, 0, 0, 0, 10, 0, 0, 0, 0];
        assert_eq!(Timestamp::next(UNIX_EPOCH, None).to_bytes(), epoch);
        let later = Timestamp::next(unix(0x1234_5678, 0x0300_1234), None);
        let expected = [0x40, 0, 0, 0, 0x12, 0x34, 0x56, 0x82, 3, 0, 0, 0];
        assert_eq!(later.to_bytes(), expected);
        // A clock that was never set.
        let before = UNIX_EPOCH - Duration::from_secs(1);
        assert_eq!(Timestamp::next(before, None).to_bytes(), epoch);
    }

    #[test]
    fn a_clock_that_stands_still_goes_on_by_steps() {
        let now = unix(1000, 999_999_999);
        let first = Timestamp::next(now, None);
        assert_eq!(parts(first), (UNIX_EPOCH_TAI + 1000, 59 * STEP_NS));
        let second = Timestamp::next(now, Some(first));
        assert_eq!(parts(second), (UNIX_EPOCH_TAI + 1001, 0));
        let third = Timestamp::next(now, Some(second));
        assert_eq!(parts(third), (UNIX_EPOCH_TAI + 1001, STEP_NS));
    }

    #[test]
    fn a_stored_time_at_the_end_of_time_is_no_panic() {
        let last = Timestamp::from_bytes([0xff; TIMESTAMP_BYTES]);
        assert_eq!(
            parts(Timestamp::next(UNIX_EPOCH, Some(last))),
            (u64::MAX, 0)
        );
    }

    proptest! {
        /// Also if the clock goes back, and if what was stored is off the steps.
        #[test]
        fn a_timestamp_is_later_than_the_last_and_on_a_step(
            last_seconds in 0..u64::MAX,
            last_nanoseconds: u32,
            seconds in 0u64..1 << 40,
            nanoseconds in 0u32..SECOND_NS,
        ) {
            let last = Timestamp::new(last_seconds, last_nanoseconds);
            let next = Timestamp::next(unix(seconds, nanoseconds), Some(last));
            prop_assert!(next > last);
            prop_assert_eq!(parts(next).1 % STEP_NS, 0);
            prop_assert!(parts(next).1 < SECOND_NS);
        }

        #[test]
        fn the_clock_is_followed_where_it_goes_on(
            seconds in 0u64..1 << 40,
            nanoseconds in 0u32..SECOND_NS,
            passed_ns in u64::from(STEP_NS)..1 << 60,
        ) {
            let last = Timestamp::next(unix(seconds, nanoseconds), None);
            let now = unix(seconds, nanoseconds) + Duration::from_nanos(passed_ns);
            let next = Timestamp::next(now, Some(last));
            let since = now.duration_since(UNIX_EPOCH).unwrap();
            let (next_seconds, fraction) = parts(next);
            prop_assert_eq!(next_seconds, UNIX_EPOCH_TAI + since.as_secs());
            prop_assert!(since.subsec_nanos() - fraction < STEP_NS);
        }
    }
}
