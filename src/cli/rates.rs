//! What a tunnel does per second, from two of its answers.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::control::protocol::{PeerStatus, Status};

/// What a tunnel, a worker or a peer has counted so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Totals {
    pub(super) packets_sent: u64,
    pub(super) bytes_sent: u64,
    pub(super) packets_received: u64,
    pub(super) bytes_received: u64,
    /// Packets dropped for any reason.
    pub(super) drops: u64,
}

impl Totals {
    /// Those of all workers together.
    pub(super) fn of_tunnel(status: &Status) -> Self {
        Self::of_counters(&status.counters, sum(drops(status).values()))
    }

    /// Those of a worker.
    pub(super) fn of_worker(counters: &BTreeMap<String, u64>) -> Self {
        let drops = counters
            .iter()
            .filter(|(name, _)| name.starts_with("drop_"));
        Self::of_counters(counters, sum(drops.map(|(_, count)| count)))
    }

    fn of_counters(counters: &BTreeMap<String, u64>, drops: u64) -> Self {
        let of = |name: &str| counters.get(name).copied().unwrap_or(0);
        Self {
            packets_sent: of("packets_sent"),
            bytes_sent: of("bytes_sent"),
            packets_received: of("packets_received"),
            bytes_received: of("bytes_received"),
            drops,
        }
    }

    /// Those of a peer.
    pub(super) fn of_peer(peer: &PeerStatus) -> Self {
        Self {
            packets_sent: peer.packets_sent,
            bytes_sent: peer.bytes_sent,
            packets_received: peer.packets_received,
            bytes_received: peer.bytes_received,
            drops: sum(peer.drops.values()),
        }
    }
}

/// What the drops before the TUN queue are called.
const TUN_QUEUE_FULL: &str = "tun_queue_full";

/// A tunnel's drops by reason, those before the TUN queue among them.
fn drops(status: &Status) -> BTreeMap<String, u64> {
    let mut drops = status.drops.clone();
    if let Some(count) = status.tun_queue_drops.filter(|count| *count > 0) {
        drops.insert(TUN_QUEUE_FULL.into(), count);
    }
    drops
}

/// A tunnel's drops for one reason.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct ReasonDrops {
    pub(super) reason: String,
    /// So far.
    pub(super) count: u64,
    /// Per second, if that is known.
    pub(super) rate: Option<f64>,
}

/// All drops by reason. `before`: an earlier answer of the same process, and the seconds since.
pub(super) fn drops_by_reason(before: Option<(&Status, f64)>, after: &Status) -> Vec<ReasonDrops> {
    let earlier = before.map(|(status, _)| drops(status)).unwrap_or_default();
    let of = |(reason, count): (String, u64)| {
        // The device's statistics are not always there: what it had dropped before they came
        // was not dropped at once.
        let is_known =
            |before: &Status| reason != TUN_QUEUE_FULL || before.tun_queue_drops.is_some();
        let before = before.filter(|(before, _)| is_known(before));
        let rate = before.map(|(_, seconds)| {
            let earlier = earlier.get(&reason).copied().unwrap_or(0);
            per_second(earlier, count, seconds)
        });
        ReasonDrops {
            reason,
            count,
            rate,
        }
    };
    drops(after).into_iter().map(of).collect()
}

fn sum<'a>(counts: impl Iterator<Item = &'a u64>) -> u64 {
    counts.fold(0, |sum, count| sum.saturating_add(*count))
}

/// The same per second.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Rates {
    pub(super) packets_sent: f64,
    pub(super) bits_sent: f64,
    pub(super) packets_received: f64,
    pub(super) bits_received: f64,
    pub(super) drops: f64,
}

impl Rates {
    /// Those of a tunnel in `seconds`, which are more than none.
    pub(super) fn of_tunnel(before: &Status, after: &Status, seconds: f64) -> Self {
        let totals = [before, after].map(Totals::of_tunnel);
        let drops = drops_by_reason(Some((before, seconds)), after);
        Self {
            // A sum of none would be -0.0.
            drops: drops
                .iter()
                .filter_map(|drops| drops.rate)
                .fold(0.0, |sum, rate| sum + rate),
            ..Self::between(&totals[0], &totals[1], seconds)
        }
    }

    /// Those of `seconds`, which are more than none.
    pub(super) fn between(before: &Totals, after: &Totals, seconds: f64) -> Self {
        let rate = |of: fn(&Totals) -> u64| per_second(of(before), of(after), seconds);
        Self {
            packets_sent: rate(|totals| totals.packets_sent),
            bits_sent: 8.0 * rate(|totals| totals.bytes_sent),
            packets_received: rate(|totals| totals.packets_received),
            bits_received: 8.0 * rate(|totals| totals.bytes_received),
            drops: rate(|totals| totals.drops),
        }
    }
}

/// How fast a counter went up; not at all, if it began anew.
fn per_second(before: u64, after: u64, seconds: f64) -> f64 {
    after.saturating_sub(before) as f64 / seconds
}

/// Whether two answers are of one process, whose counters go on.
pub(super) fn is_same_process(before: &Status, after: &Status) -> bool {
    // In a container, a process that was started again may have the same id.
    before.pid == after.pid && before.uptime_seconds <= after.uptime_seconds
}

/// Seconds between two answers: by the tunnel's clock if they have its time, else `elapsed`,
/// the time between their arrivals. None if no time has passed.
pub(super) fn seconds_between(
    before_ns: Option<u64>,
    after_ns: Option<u64>,
    elapsed: Duration,
) -> Option<f64> {
    let elapsed = match (before_ns, after_ns) {
        (Some(before), Some(after)) => Duration::from_nanos(after.saturating_sub(before)),
        _ => elapsed,
    };
    Some(elapsed.as_secs_f64()).filter(|seconds| *seconds > 0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counters(pairs: &[(&str, u64)]) -> BTreeMap<String, u64> {
        let pairs = pairs.iter();
        pairs
            .map(|(name, count)| ((*name).into(), *count))
            .collect()
    }

    #[test]
    fn totals_have_all_drops() {
        let status = Status {
            counters: counters(&[("packets_sent", 5), ("bytes_sent", 500)]),
            drops: counters(&[("no_route", 2), ("queue_aqm", u64::MAX)]),
            tun_queue_drops: Some(1),
            ..Status::default()
        };
        let totals = Totals::of_tunnel(&status);
        assert_eq!((totals.packets_sent, totals.bytes_sent), (5, 500));
        assert_eq!(totals.drops, u64::MAX);
        assert_eq!(drops(&status).get("tun_queue_full"), Some(&1));
        let worker = counters(&[("drop_ttl", 3), ("drop_short", 4), ("packets_received", 9)]);
        let totals = Totals::of_worker(&worker);
        assert_eq!((totals.packets_received, totals.drops), (9, 7));
    }

    #[test]
    fn what_the_device_dropped_before_it_was_asked_is_no_rate() {
        let status = |no_route, tun_queue_drops| Status {
            drops: counters(&[("no_route", no_route)]),
            tun_queue_drops,
            ..Status::default()
        };
        for (before, after, of_device, of_all) in [
            (Some(1000), Some(1020), Some(10.0), 15.0),
            (None, Some(1000), None, 5.0),
            (Some(0), Some(20), Some(10.0), 15.0),
        ] {
            let (before, after) = (status(7, before), status(17, after));
            let drops = drops_by_reason(Some((&before, 2.0)), &after);
            let rates: Vec<_> = drops.iter().map(|drops| drops.rate).collect();
            assert_eq!(rates, [Some(5.0), of_device], "{before:?}");
            assert_eq!(Rates::of_tunnel(&before, &after, 2.0).drops, of_all);
        }
        // Nor do they hide other drops when they are not there for once.
        let (before, after) = (status(7, Some(1000)), status(17, None));
        assert_eq!(Rates::of_tunnel(&before, &after, 2.0).drops, 5.0);
        assert_eq!(drops_by_reason(None, &before)[1].rate, None);
    }

    #[test]
    fn rates_are_by_the_time_that_has_passed() {
        let after = Totals {
            packets_sent: 30,
            bytes_sent: 3000,
            packets_received: 0,
            bytes_received: 0,
            drops: 1,
        };
        let rates = Rates::between(&Totals::default(), &after, 2.0);
        assert_eq!((rates.packets_sent, rates.bits_sent), (15.0, 12_000.0));
        assert_eq!((rates.bits_received, rates.drops), (0.0, 0.5));
        // Counters that began anew.
        let rates = Rates::between(&after, &Totals::default(), 2.0);
        assert_eq!(rates, Rates::default());
    }

    #[test]
    fn the_tunnels_clock_counts_if_it_is_known() {
        let second = Duration::from_secs(1);
        let between = |before, after| seconds_between(before, after, second);
        assert_eq!(between(Some(5), Some(2_000_000_005)), Some(2.0));
        assert_eq!(between(None, Some(2_000_000_005)), Some(1.0));
        assert_eq!(between(Some(5), Some(5)), None);
        assert_eq!(between(Some(5), Some(4)), None);
        assert_eq!(seconds_between(None, None, Duration::ZERO), None);
    }

    #[test]
    fn another_process_is_noticed() {
        let status = |pid, uptime_seconds| Status {
            pid,
            uptime_seconds,
            ..Status::default()
        };
        assert!(is_same_process(&status(1, 5), &status(1, 5)));
        assert!(!is_same_process(&status(1, 5), &status(2, 6)));
        assert!(!is_same_process(&status(1, 5), &status(1, 0)));
    }
}
