//! What a worker does when nothing has arrived: sleep at once, or look again and
//! again for a while.

use std::time::{Duration, Instant};

use crate::error::Result;
use crate::io::engine::Engine;

/// How long to look for arrivals without sleeping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spin {
    /// Not at all.
    Off,
    /// As long as has lately been worth it, up to 100 µs, while there is little traffic.
    Auto,
    /// This long after the last arrival.
    For(Duration),
}

/// Longest spin of [`Spin::Auto`]: two wake-ups of a sleeping core, which
/// is what there is to win.
const AUTO_MAX: Duration = Duration::from_micros(100);
/// Shortest one, and what a spin starts with.
const AUTO_MIN: Duration = Duration::from_micros(10);

/// Bytes taken in by a turn, and half of those before it, from which on
/// [`Spin::Auto`] does not spin: a core that has more to do than to wait for an answer has
/// better uses. A request of some hundred bytes and its acknowledgment are less.
const BUSY_BYTES: usize = 1 << 10;

/// The state behind those choices.
#[derive(Debug)]
pub struct Idle {
    spin: Spin,
    /// How long [`Spin::Auto`] spins now.
    auto: Duration,
    /// Bytes of the last turns, each counting half as much as the next.
    recent_bytes: usize,
}

impl Idle {
    /// Nothing has been seen yet.
    pub fn new(spin: Spin) -> Self {
        Self {
            spin,
            auto: Duration::ZERO,
            recent_bytes: 0,
        }
    }

    /// Sleeps until there is something, unless there is already. `turn_bytes`: what was
    /// taken in since the last time.
    ///
    /// # Errors
    /// As [`Engine::wait`].
    pub fn wait(&mut self, turn_bytes: usize, engine: &mut impl Engine) -> Result<()> {
        self.recent_bytes = self.recent_bytes / 2 + turn_bytes;
        let spin = match self.spin {
            Spin::Off => return engine.wait(),
            Spin::Auto if self.recent_bytes > BUSY_BYTES => return engine.wait(),
            Spin::Auto => self.auto,
            Spin::For(duration) => duration,
        };
        let start = Instant::now();
        loop {
            if engine.poll()? {
                return Ok(());
            }
            if start.elapsed() >= spin {
                break;
            }
            for _ in 0..PAUSES {
                std::hint::spin_loop();
            }
        }
        engine.wait()?;
        self.auto = adapted(self.auto, start.elapsed());
        Ok(())
    }
}

/// Pauses of the processor between two polls: some hundred nanoseconds, which
/// is little against what they wait for and leaves a sibling thread room.
const PAUSES: usize = 16;

/// How long to spin next time, when nothing came while spinning for `auto` and
/// something after `waited` in all. Longer if a longer spin would have met it,
/// else shorter, down to nothing: traffic that comes now and then costs no
/// spinning, and silence costs nothing at all.
fn adapted(auto: Duration, waited: Duration) -> Duration {
    if waited <= AUTO_MAX {
        (auto * 2).clamp(AUTO_MIN, AUTO_MAX)
    } else if auto > AUTO_MIN {
        auto / 2
    } else {
        Duration::ZERO
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dataplane::test_support::Fake;

    /// Has an event from the given poll on.
    fn fake(ready_from: usize) -> Fake {
        Fake {
            ready_from: Some(ready_from),
            ..Fake::default()
        }
    }

    #[test]
    fn sleeps_at_once_when_off() {
        let mut engine = fake(1);
        Idle::new(Spin::Off).wait(0, &mut engine).unwrap();
        assert_eq!((engine.polls, engine.waits), (0, 1));
    }

    #[test]
    fn what_comes_while_spinning_spares_the_sleep() {
        let mut engine = fake(50);
        let hour = Duration::from_secs(3600);
        Idle::new(Spin::For(hour)).wait(0, &mut engine).unwrap();
        assert_eq!((engine.polls, engine.waits), (50, 0));
    }

    #[test]
    fn spins_no_longer_than_told() {
        let mut engine = fake(usize::MAX);
        let duration = Duration::from_millis(3);
        let start = Instant::now();
        Idle::new(Spin::For(duration)).wait(0, &mut engine).unwrap();
        assert!(start.elapsed() >= duration);
        assert_eq!(engine.waits, 1);
    }

    #[test]
    fn auto_follows_the_traffic() {
        let us = Duration::from_micros;
        let mut auto = Duration::ZERO;
        for expected in [10, 20, 40, 80, 100, 100] {
            auto = adapted(auto, us(60));
            assert_eq!(auto, us(expected));
        }
        for expected in [50_000, 25_000, 12_500, 6_250, 0, 0] {
            auto = adapted(auto, us(5_000));
            assert_eq!(auto, Duration::from_nanos(expected));
        }
        // Bulk traffic: asleep at once, and for some turns after it.
        let mut engine = fake(usize::MAX);
        let mut idle = Idle::new(Spin::Auto);
        for bytes in [64 << 10, 100, 100] {
            idle.wait(bytes, &mut engine).unwrap();
        }
        assert_eq!((engine.polls, engine.waits), (0, 3));
        // Silence: looked at once, then asleep.
        let mut engine = fake(usize::MAX);
        Idle::new(Spin::Auto).wait(0, &mut engine).unwrap();
        assert_eq!((engine.polls, engine.waits), (1, 1));
    }
}
