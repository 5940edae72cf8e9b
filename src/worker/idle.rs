//! What a worker does when nothing has arrived: sleep at once, or look again and
//! again for a while.

use std::time::{Duration, Instant};

use super::engine::Engine;
use crate::error::Result;

/// How long to look for arrivals without sleeping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BusyPoll {
    /// Not at all.
    Off,
    /// As long as has lately been worth it, up to 100 µs.
    Auto,
    /// This long after the last arrival.
    For(Duration),
}

/// Longest spin of [`BusyPoll::Auto`]: two wake-ups of a sleeping core, which
/// is what there is to win.
const AUTO_MAX: Duration = Duration::from_micros(100);
/// Shortest one, and what a spin starts with.
const AUTO_MIN: Duration = Duration::from_micros(10);

/// The state behind those choices.
#[derive(Debug)]
pub struct Idle {
    busy_poll: BusyPoll,
    /// How long [`BusyPoll::Auto`] spins now.
    auto: Duration,
}

impl Idle {
    /// Nothing has been seen yet.
    pub fn new(busy_poll: BusyPoll) -> Self {
        Self {
            busy_poll,
            auto: Duration::ZERO,
        }
    }

    /// Nothing is at hand and nothing open: sleeps until there is something.
    ///
    /// # Errors
    /// As [`Engine::wait`].
    pub fn wait(&mut self, engine: &mut impl Engine) -> Result<()> {
        let spin = match self.busy_poll {
            BusyPoll::Off => return engine.wait(),
            BusyPoll::Auto => self.auto,
            BusyPoll::For(duration) => duration,
        };
        let start = Instant::now();
        if engine.poll()? {
            return Ok(());
        }
        while !spin.is_zero() {
            for _ in 0..16 {
                std::hint::spin_loop();
            }
            if engine.poll()? {
                return Ok(());
            }
            if start.elapsed() >= spin {
                break;
            }
        }
        engine.wait()?;
        if self.busy_poll == BusyPoll::Auto {
            self.auto = if start.elapsed() <= AUTO_MAX {
                (self.auto * 2).clamp(AUTO_MIN, AUTO_MAX)
            } else if self.auto > AUTO_MIN {
                self.auto / 2
            } else {
                Duration::ZERO
            };
        }
        Ok(())
    }
}
