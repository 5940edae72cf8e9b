//! CoDel (RFC 8289): when a queue has stood for too long, and how often packets of
//! it are marked or dropped until it does not.

/// Time that packets may wait without anything being wrong (RFC 8289, section 4.3).
/// Twice the usual value: what waits here has a send buffer of about a millisecond
/// before it, and 5 ms cost throughput at 100 Mbit/s while 10 ms did not.
pub const TARGET_NS: u64 = 10_000_000;

/// For how long they may wait longer than that: the longest round-trip time that
/// is usual (RFC 8289, section 4.2).
pub const INTERVAL_NS: u64 = 100_000_000;

/// The state of one queue. All times are in nanoseconds since the same start.
#[derive(Clone, Copy, Debug, Default)]
pub struct Codel {
    /// When the queue will have been above the target for an interval; 0 while it
    /// is below.
    stands_from_ns: u64,
    is_dropping: bool,
    /// Packets marked or dropped since that began, and in the time before.
    count: u32,
    last_count: u32,
    next_drop_ns: u64,
}

impl Codel {
    /// Whether to mark or drop the packet at the head, which has waited for
    /// `sojourn_ns`. `is_short`: it is the last one, or nearly so, and nothing would
    /// be gained.
    pub fn is_due(&mut self, sojourn_ns: u64, is_short: bool, now_ns: u64) -> bool {
        if !self.has_stood(sojourn_ns, is_short, now_ns) {
            self.is_dropping = false;
            return false;
        }
        if !self.is_dropping {
            self.is_dropping = true;
            // Soon after the last time: go on at the rate that was right then.
            let recent = self.count.wrapping_sub(self.last_count);
            let is_recent = now_ns.saturating_sub(self.next_drop_ns) < 16 * INTERVAL_NS;
            self.count = if recent > 1 && is_recent { recent } else { 1 };
            self.last_count = self.count;
            self.next_drop_ns = self.control_law(now_ns);
            return true;
        }
        if now_ns < self.next_drop_ns {
            return false;
        }
        self.count = self.count.saturating_add(1);
        self.next_drop_ns = self.control_law(self.next_drop_ns);
        true
    }

    /// Whether packets have waited for longer than the target for an interval.
    fn has_stood(&mut self, sojourn_ns: u64, is_short: bool, now_ns: u64) -> bool {
        if sojourn_ns < TARGET_NS || is_short {
            self.stands_from_ns = 0;
            return false;
        }
        if self.stands_from_ns == 0 {
            self.stands_from_ns = now_ns + INTERVAL_NS;
            return false;
        }
        now_ns >= self.stands_from_ns
    }

    /// The time of the next drop (RFC 8289, section 3.3): the throughput of a TCP
    /// flow goes by the inverse square root of its drop rate.
    fn control_law(&self, from_ns: u64) -> u64 {
        from_ns + (INTERVAL_NS as f64 / f64::from(self.count).sqrt()) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    /// The times, in milliseconds, at which packets are due when each has waited
    /// for `sojourn_ms` until then.
    fn due(codel: &mut Codel, times_ms: std::ops::Range<u64>, sojourn_ms: u64) -> Vec<u64> {
        let is_due = |time: &u64| codel.is_due(sojourn_ms * MS, false, time * MS);
        times_ms.filter(is_due).collect()
    }

    #[test]
    fn a_queue_that_drains_in_time_is_left_alone() {
        let mut codel = Codel::default();
        assert_eq!(due(&mut codel, 1..5_000, 9), [0; 0]);
        // Above the target, but never for an interval.
        for start in (5_000..10_000).step_by(100) {
            assert_eq!(due(&mut codel, start..start + 99, 50), [0; 0]);
            assert_eq!(due(&mut codel, start + 99..start + 100, 1), [0; 0]);
        }
        // All that there is.
        assert!(!(10_000..11_000).any(|time| codel.is_due(500 * MS, true, time * MS)));
    }

    #[test]
    fn drops_come_faster_until_the_queue_drains() {
        let mut codel = Codel::default();
        let times = due(&mut codel, 1..600, 20);
        // 100, then 100/√1, 100/√2, 100/√3 ... apart.
        assert_eq!(times, [101, 201, 272, 330, 380, 425, 465, 503, 539, 572]);
        assert_eq!(due(&mut codel, 600..610, 1), [0; 0]);
        // It stands again: an interval later, at the rate that was right before.
        let times = due(&mut codel, 610..800, 20);
        assert_eq!(times[0], 710);
        assert!(times[1] - times[0] <= 36, "{times:?}");
        // Long after, from the start.
        assert_eq!(due(&mut codel, 800..801, 1), [0; 0]);
        let times = due(&mut codel, 10_000..10_250, 20);
        assert_eq!(times, [10_100, 10_200]);
    }
}
