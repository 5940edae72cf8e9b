//! What one thread at a time may do.

use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, bounded};

/// One turn, taken by whoever comes first and given back when it is dropped.
/// Unlike a mutex's guard, it may be waited for within a time, and given back
/// by another thread than that which took it.
#[derive(Debug)]
pub struct Turns {
    /// Full while the turn is taken.
    taken: Sender<()>,
    given_back: Receiver<()>,
}

/// The turn, until it is dropped.
#[derive(Debug)]
pub struct Turn(Receiver<()>);

impl Default for Turns {
    fn default() -> Self {
        let (taken, given_back) = bounded(1);
        Self { taken, given_back }
    }
}

impl Turns {
    /// Takes the turn; `None` if it is not free within `wait_max`.
    pub fn take(&self, wait_max: Duration) -> Option<Turn> {
        self.taken.send_timeout((), wait_max).ok()?;
        Some(Turn(self.given_back.clone()))
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let _ = self.0.try_recv();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_one_turn_and_it_comes_back() {
        let turns = Turns::default();
        for _ in 0..3 {
            let turn = turns.take(Duration::ZERO).unwrap();
            assert!(turns.take(Duration::ZERO).is_none());
            std::thread::spawn(move || drop(turn)).join().unwrap();
        }
        assert!(turns.take(Duration::ZERO).is_some());
    }
}
