//! How many ICMP errors a worker sends: RFC 1812, section 4.3.2.8, and RFC
//! 4443, section 2.4 (f), both ask for a limit, and recommend token buckets.
//!
//! There are two, and an error needs a token from both: one bucket for all, so
//! that a flood of packets to nowhere is not answered by a flood; and one for
//! each source, so that a single host cannot use up what all share. Sources
//! share [`SLOTS`] buckets by a hash with a key of this run: a source whose
//! bucket another one empties gets fewer errors, never more.

use std::hash::{BuildHasher, RandomState};
use std::net::IpAddr;
use std::time::{Duration, Instant};

/// All sources together: 1000 in a second, 50 at once, the kernel's defaults of
/// `icmp_msgs_per_sec` and `icmp_msgs_burst` (`ip-sysctl`), but per worker.
const ALL: Rate = Rate {
    interval: Duration::from_millis(1),
    burst: 50,
};

/// One source: 50 in a second, 25 at once. Half of the burst and a twentieth of
/// the rate of all, so that one host leaves most of it to others. The kernel
/// allows one in a second and 6 at once (`icmp_ratelimit`), which is known to
/// put gaps into traces, and leaves flows waiting for their path MTU. Here the
/// three probes of a `traceroute` that expire at one hop get their answer, from
/// eight of them at the same time, and so does the first packet that is too
/// long toward each of 25 destinations. RFC 4443 suggests 10 and 10 for a small
/// device.
const EACH: Rate = Rate {
    interval: Duration::from_millis(20),
    burst: 25,
};

/// Buckets that the sources share, in 2 KiB.
pub const SLOTS: usize = 256;

/// What a token bucket holds and how fast it fills.
#[derive(Clone, Copy, Debug)]
struct Rate {
    /// Time in which one token is added.
    interval: Duration,
    /// Most tokens it holds.
    burst: u32,
}

impl Rate {
    /// Nanoseconds for one token.
    const fn token_ns(self) -> u64 {
        self.interval.as_nanos() as u64
    }
}

/// A token bucket, as the time at which it will be full again if nothing more
/// is taken; each token that is missing is one interval of waiting.
#[derive(Clone, Copy, Debug, Default)]
struct Bucket {
    full_at_ns: u64,
}

impl Bucket {
    /// Whether there is a token.
    fn has_token(self, rate: Rate, now_ns: u64) -> bool {
        let missing_ns = self.full_at_ns.saturating_sub(now_ns);
        missing_ns <= u64::from(rate.burst - 1) * rate.token_ns()
    }

    fn take_token(&mut self, rate: Rate, now_ns: u64) {
        self.full_at_ns = self.full_at_ns.max(now_ns).saturating_add(rate.token_ns());
    }
}

/// See the module's documentation. Its memory is fixed.
#[derive(Debug)]
pub struct RateLimit {
    /// What times are counted from.
    start: Instant,
    key: RandomState,
    all: Bucket,
    each: Box<[Bucket; SLOTS]>,
}

impl RateLimit {
    /// All buckets are full. `now` is the earliest time that
    /// [`Self::allow`] will be asked about.
    pub fn new(now: Instant) -> Self {
        Self {
            start: now,
            key: RandomState::new(),
            all: Bucket::default(),
            each: Box::new([Bucket::default(); SLOTS]),
        }
    }

    /// Whether an error may be sent to `source` now, the source of the packet
    /// that it is about. If so, its tokens are taken.
    pub fn allow(&mut self, source: IpAddr, now: Instant) -> bool {
        let now_ns = now.saturating_duration_since(self.start).as_nanos() as u64;
        let slot = self.slot(source);
        let each = &mut self.each[slot];
        // Both or none: what one bucket refuses costs nothing in the other.
        let allowed = self.all.has_token(ALL, now_ns) && each.has_token(EACH, now_ns);
        if allowed {
            self.all.take_token(ALL, now_ns);
            each.take_token(EACH, now_ns);
        }
        allowed
    }

    fn slot(&self, source: IpAddr) -> usize {
        self.key.hash_one(source) as usize % SLOTS
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn host(index: u16) -> IpAddr {
        IpAddr::from([10, 0, (index >> 8) as u8, index as u8])
    }

    /// How many of `tries` are allowed at one time.
    fn allowed(limit: &mut RateLimit, source: IpAddr, now: Instant, tries: usize) -> usize {
        (0..tries).filter(|_| limit.allow(source, now)).count()
    }

    /// Hosts whose buckets are not the same.
    fn apart(limit: &RateLimit, count: usize) -> Vec<IpAddr> {
        let mut slots = vec![];
        (0..u16::MAX)
            .map(host)
            .filter(|source| {
                let slot = limit.slot(*source);
                let is_new = !slots.contains(&slot);
                slots.push(slot);
                is_new
            })
            .take(count)
            .collect()
    }

    #[test]
    fn one_source_gets_its_burst_and_then_its_rate() {
        let start = Instant::now();
        let mut limit = RateLimit::new(start);
        assert_eq!(allowed(&mut limit, host(1), start, 100), 25);
        assert_eq!(allowed(&mut limit, host(1), start + 19 * MS, 100), 0);
        assert_eq!(allowed(&mut limit, host(1), start + 20 * MS, 100), 1);
        assert_eq!(allowed(&mut limit, host(1), start + 100 * MS, 100), 4);
        // A bucket never holds more than the burst.
        let later = start + Duration::from_secs(3600);
        assert_eq!(allowed(&mut limit, host(1), later, 100), 25);
        let second: usize = (1..=1000)
            .map(|ms| allowed(&mut limit, host(1), later + ms * MS, 3))
            .sum();
        assert_eq!(second, 50);
    }

    #[test]
    fn one_source_does_not_use_up_what_others_need() {
        let start = Instant::now();
        let mut limit = RateLimit::new(start);
        let hosts = apart(&limit, 2);
        assert_eq!(allowed(&mut limit, hosts[0], start, 100_000), 25);
        assert_eq!(allowed(&mut limit, hosts[1], start, 100), 25);
    }

    #[test]
    fn all_together_get_a_thousand_in_a_second() {
        let start = Instant::now();
        let mut limit = RateLimit::new(start);
        let hosts = apart(&limit, 200);
        let at = |limit: &mut RateLimit, now| -> usize {
            hosts.iter().map(|host| allowed(limit, *host, now, 1)).sum()
        };
        assert_eq!(at(&mut limit, start), 50);
        let second: usize = (1..=1000).map(|ms| at(&mut limit, start + ms * MS)).sum();
        assert_eq!(second, 1000);
        // However often a host was turned away, its own bucket is still full.
        let rested = start + Duration::from_secs(60);
        assert_eq!(allowed(&mut limit, hosts[199], rested, 100), 25);
    }

    #[test]
    fn refused_by_all_costs_a_source_nothing() {
        let start = Instant::now();
        let mut limit = RateLimit::new(start);
        let hosts = apart(&limit, 3);
        assert_eq!(allowed(&mut limit, hosts[0], start, 25), 25);
        assert_eq!(allowed(&mut limit, hosts[1], start, 25), 25);
        assert_eq!(allowed(&mut limit, hosts[2], start, 1000), 0);
        assert_eq!(allowed(&mut limit, hosts[2], start + 50 * MS, 1000), 25);
    }

    #[test]
    fn a_clock_that_stands_before_the_start_refills_nothing() {
        let start = Instant::now();
        let mut limit = RateLimit::new(start + MS);
        assert_eq!(allowed(&mut limit, host(1), start, 100), 25);
        assert_eq!(allowed(&mut limit, host(1), start + MS, 100), 0);
    }
}
