//! How often a prefix is put right when somebody insists on another route.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use ipnet::IpNet;

/// Answers to one prefix that come at once; later ones wait.
const AT_ONCE_MAX: u32 = 3;

/// The first wait; each further one is twice as long.
const WAIT_MIN: Duration = Duration::from_millis(100);

/// The longest wait. So long at most does a route stay wrong in a fight.
const WAIT_MAX: Duration = Duration::from_secs(5);

/// A prefix that was left alone for so long is at peace again.
const PEACE: Duration = Duration::from_secs(30);

/// Prefixes that were put right lately; none that is not wanted.
#[derive(Default)]
pub struct Backoff {
    prefixes: HashMap<IpNet, Fight>,
}

struct Fight {
    answers: u32,
    not_before: Instant,
}

impl Backoff {
    /// When `prefix` may be put right again; `None` if it may be now.
    pub fn wait_until(&self, prefix: &IpNet, now: Instant) -> Option<Instant> {
        let not_before = self.prefixes.get(prefix)?.not_before;
        (not_before > now).then_some(not_before)
    }

    /// Notes that `prefix` was put right. Returns when it may be again.
    pub fn answered(&mut self, prefix: IpNet, now: Instant) -> Instant {
        let fight = self.prefixes.entry(prefix).or_insert(Fight {
            answers: 0,
            not_before: now,
        });
        if now.saturating_duration_since(fight.not_before) > PEACE {
            fight.answers = 0;
        }
        fight.answers = fight.answers.saturating_add(1);
        let wait = match fight.answers.checked_sub(AT_ONCE_MAX) {
            None => Duration::ZERO,
            // Twice as long until it is certainly longer than the longest.
            Some(doublings) => (WAIT_MIN * (1 << doublings.min(10))).min(WAIT_MAX),
        };
        fight.not_before = now + wait;
        fight.not_before
    }

    /// Forgets prefixes at peace and those that `keep` does not want.
    pub fn forget(&mut self, now: Instant, keep: impl Fn(&IpNet) -> bool) {
        self.prefixes.retain(|prefix, fight| {
            keep(prefix) && now.saturating_duration_since(fight.not_before) <= PEACE
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_answers_come_at_once_and_later_ones_wait_ever_longer_up_to_a_bound() {
        let prefix: IpNet = "10.1.0.0/16".parse().unwrap();
        let mut backoff = Backoff::default();
        let mut now = Instant::now();
        let mut waits = Vec::new();
        for _ in 0..20 {
            let next = backoff.answered(prefix, now);
            assert_eq!(
                backoff.wait_until(&prefix, now),
                (next > now).then_some(next)
            );
            waits.push((next - now).as_millis());
            now = next;
        }
        assert_eq!(waits[..6], [0, 0, 100, 200, 400, 800]);
        assert_eq!(waits[19], 5000);
    }

    #[test]
    fn peace_is_made_after_a_while_and_what_is_not_wanted_is_forgotten() {
        let prefix: IpNet = "10.1.0.0/16".parse().unwrap();
        let mut backoff = Backoff::default();
        let now = Instant::now();
        for _ in 0..10 {
            backoff.answered(prefix, now);
        }
        let later = now + WAIT_MAX + PEACE + Duration::from_millis(1);
        assert_eq!(backoff.answered(prefix, later), later);
        backoff.forget(later, |_| true);
        assert_eq!(backoff.prefixes.len(), 1);
        backoff.forget(later, |_| false);
        assert!(backoff.prefixes.is_empty());
    }
}
