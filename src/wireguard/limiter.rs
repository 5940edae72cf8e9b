//! How much is done for strangers: initiations per source, and when this host counts as
//! under load (sections 5.3 and 5.4.7 of the WireGuard paper). Without a clock: times are
//! nanoseconds of one monotonic clock.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};

const SECOND_NS: u64 = 1_000_000_000;

/// Initiations a second that one source may send for long.
const PER_SECOND: u64 = 20;

/// Initiations that it may send at once.
const BURST: u64 = 5;

/// What one initiation takes of a source's time.
const COST_NS: u64 = SECOND_NS / PER_SECOND;

/// Sources that are remembered. One is forgotten when it has been silent for
/// [`BURST`] times [`COST_NS`], a quarter of a second: the table is full for no longer than
/// that many addresses, all of them proven by cookies, send at the same time.
const SOURCES_MAX: usize = 8192;

/// How often a full table is searched for sources to forget.
const PURGE_INTERVAL_NS: u64 = SECOND_NS / 100;

/// Who sends: an IPv4 address, or the /64 that an IPv6 address is in, since a host has all
/// of that to choose from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Source(u64, bool);

impl Source {
    fn of(address: IpAddr) -> Self {
        match address.to_canonical() {
            IpAddr::V4(address) => Self(u32::from(address).into(), true),
            IpAddr::V6(address) => Self((u128::from(address) >> 64) as u64, false),
        }
    }
}

/// Limits initiations by their source address. It means nothing until a cookie has proven
/// that address: before that, anybody could use up what is somebody else's.
#[derive(Debug, Default)]
pub(crate) struct Limiter {
    /// When each source will have paid for all it has sent.
    paid_at_ns: HashMap<Source, u64>,
    purged_ns: u64,
}

impl Limiter {
    /// Whether an initiation from there may be looked at. If so, it is counted.
    pub(crate) fn admits(&mut self, from: SocketAddr, now_ns: u64) -> bool {
        let source = Source::of(from.ip());
        if let Some(paid_at_ns) = self.paid_at_ns.get_mut(&source) {
            let debt_ns = paid_at_ns.saturating_sub(now_ns);
            if debt_ns > (BURST - 1) * COST_NS {
                return false;
            }
            *paid_at_ns = now_ns + debt_ns + COST_NS;
            return true;
        }
        self.purge(now_ns);
        if self.paid_at_ns.len() >= SOURCES_MAX {
            return false;
        }
        self.paid_at_ns.insert(source, now_ns + COST_NS);
        true
    }

    /// Makes room in a full table.
    fn purge(&mut self, now_ns: u64) {
        let is_recent = now_ns.saturating_sub(self.purged_ns) < PURGE_INTERVAL_NS;
        if self.paid_at_ns.len() >= SOURCES_MAX && !is_recent {
            self.purged_ns = now_ns;
            self.paid_at_ns.retain(|_, paid_at_ns| *paid_at_ns > now_ns);
        }
    }
}

/// Handshake messages a second, each of which costs Diffie-Hellman operations, that this
/// host takes from anybody: about half a millisecond each, so this is a tenth of a core.
const LOAD_PER_SECOND: u64 = 200;

/// For how long the load is over before it counts as such.
const LOAD_REST_NS: u64 = SECOND_NS;

/// Whether so much comes that senders must prove their addresses.
#[derive(Debug, Default)]
pub(crate) struct Load {
    /// When what has come so far would have come at [`LOAD_PER_SECOND`].
    level_ns: u64,
    until_ns: u64,
}

impl Load {
    /// A message has come that is worth an answer.
    pub(crate) fn note(&mut self, now_ns: u64) {
        self.level_ns = self.level_ns.max(now_ns) + SECOND_NS / LOAD_PER_SECOND;
        if self.level_ns > now_ns + SECOND_NS {
            // More would only make the memory of it longer.
            self.level_ns = now_ns + SECOND_NS;
            self.note_backlog(now_ns);
        }
    }

    /// More messages wait than are handled at once.
    pub(crate) fn note_backlog(&mut self, now_ns: u64) {
        self.until_ns = now_ns + LOAD_REST_NS;
    }

    /// Whether it is so now.
    pub(crate) fn is_high(&self, now_ns: u64) -> bool {
        now_ns < self.until_ns
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const START_NS: u64 = 1 << 40;

    fn from(address: &str) -> SocketAddr {
        SocketAddr::new(address.parse().unwrap(), 51820)
    }

    /// How many of so many initiations at this time are admitted.
    fn admitted(limiter: &mut Limiter, from: SocketAddr, count: usize, now_ns: u64) -> usize {
        (0..count).filter(|_| limiter.admits(from, now_ns)).count()
    }

    #[test]
    fn a_source_has_twenty_a_second_and_five_at_once() {
        let mut limiter = Limiter::default();
        for address in ["192.0.2.1", "2001:db8::1"] {
            let from = from(address);
            assert_eq!(admitted(&mut limiter, from, 100, START_NS), 5);
            let mut total = 0;
            for millisecond in 1..=1000 {
                total += admitted(&mut limiter, from, 3, START_NS + millisecond * 1_000_000);
            }
            assert_eq!(total, 20);
            let later_ns = START_NS + 10 * SECOND_NS;
            assert_eq!(admitted(&mut limiter, from, 100, later_ns), 5);
        }
    }

    #[test]
    fn a_source_is_an_ipv4_address_or_an_ipv6_prefix() {
        let mut limiter = Limiter::default();
        assert_eq!(admitted(&mut limiter, from("2001:db8::1"), 9, START_NS), 5);
        let same = from("2001:db8::ffff:0:0:1");
        assert_eq!(admitted(&mut limiter, same, 9, START_NS), 0);
        let next = from("2001:db8:0:1::1");
        assert_eq!(admitted(&mut limiter, next, 9, START_NS), 5);
        assert_eq!(admitted(&mut limiter, from("192.0.2.1"), 9, START_NS), 5);
        let mapped = from("::ffff:192.0.2.1");
        assert_eq!(admitted(&mut limiter, mapped, 9, START_NS), 0);
        assert_eq!(admitted(&mut limiter, from("192.0.2.2"), 9, START_NS), 5);
        // Not the IPv6 prefix of the same bits.
        assert_eq!(
            admitted(&mut limiter, from("0:0:c000:201::"), 9, START_NS),
            5
        );
    }

    #[test]
    fn the_table_is_bounded_and_forgets_the_silent() {
        let mut limiter = Limiter::default();
        let address = |n: u32| SocketAddr::from((std::net::Ipv4Addr::from(n), 1));
        let all = 0..3 * SOURCES_MAX as u32;
        let first = all
            .clone()
            .filter(|n| limiter.admits(address(*n), START_NS));
        assert_eq!(first.count(), SOURCES_MAX);
        assert_eq!(limiter.paid_at_ns.len(), SOURCES_MAX);
        let later_ns = START_NS + SECOND_NS;
        assert!(limiter.admits(address(u32::MAX), later_ns));
        assert_eq!(limiter.paid_at_ns.len(), 1);
    }

    #[test]
    fn load_is_a_rate_or_a_backlog_and_goes_after_a_second() {
        let mut load = Load::default();
        // A burst that the rate allows within a second, and then the rate itself.
        for _ in 0..LOAD_PER_SECOND {
            load.note(START_NS);
        }
        assert!(!load.is_high(START_NS));
        for n in 1..1000 {
            load.note(START_NS + n * SECOND_NS / LOAD_PER_SECOND);
        }
        let now_ns = START_NS + 1000 * SECOND_NS / LOAD_PER_SECOND;
        assert!(!load.is_high(now_ns));
        load.note(now_ns);
        load.note(now_ns);
        assert!(load.is_high(now_ns));
        assert!(load.is_high(now_ns + SECOND_NS - 1));
        assert!(!load.is_high(now_ns + SECOND_NS));
        load.note_backlog(now_ns + 5 * SECOND_NS);
        assert!(load.is_high(now_ns + 5 * SECOND_NS));
    }

    proptest! {
        #[test]
        fn no_window_has_more_than_its_share(
            waits_ms in prop::collection::vec(0_u64..200, 1..300),
        ) {
            let (mut limiter, mut now_ns, mut times) = (Limiter::default(), START_NS, vec![]);
            for wait_ms in waits_ms {
                now_ns += wait_ms * 1_000_000;
                if limiter.admits(from("192.0.2.1"), now_ns) {
                    times.push(now_ns);
                }
            }
            for (at, first_ns) in times.iter().enumerate() {
                for (more, last_ns) in times[at..].iter().enumerate() {
                    let share = BURST + (last_ns - first_ns) / COST_NS;
                    prop_assert!((more as u64) < share);
                }
            }
        }
    }
}
