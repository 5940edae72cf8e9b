//! What the first of many dropped packets was about, for the log.

use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

/// Keeps the first value that it is given until somebody takes it. As long as
/// there is one, giving another costs a load: a flood of them is nothing.
#[derive(Debug)]
pub struct First<T> {
    is_full: AtomicBool,
    value: Mutex<Option<T>>,
}

impl<T> Default for First<T> {
    fn default() -> Self {
        Self {
            is_full: AtomicBool::new(false),
            value: Mutex::new(None),
        }
    }
}

impl<T> First<T> {
    /// Gives a value. Never waits: it is lost while another is being taken.
    #[inline]
    pub fn give(&self, value: T) {
        if !self.is_full.load(Ordering::Relaxed)
            && let Ok(mut place) = self.value.try_lock()
        {
            *place = Some(value);
            self.is_full.store(true, Ordering::Relaxed);
        }
    }

    /// Takes the value, and makes room for the next one.
    pub fn take(&self) -> Option<T> {
        let mut place = self.value.lock().unwrap_or_else(PoisonError::into_inner);
        self.is_full.store(false, Ordering::Relaxed);
        place.take()
    }
}

/// The first drop of some kinds since somebody last took them.
#[derive(Debug, Default)]
pub struct FirstDrops {
    /// Who sent it, without being a peer.
    pub sender_unknown: First<IpAddr>,
    /// The peer's address that it came from, and its inner source.
    pub source_not_allowed: First<(IpAddr, IpAddr)>,
    /// Where it was to go, and the error.
    pub send_error: First<(SocketAddr, i32)>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_stays_until_it_is_taken() {
        let first = First::default();
        assert_eq!(first.take(), None);
        for value in 1..=3 {
            first.give(value);
        }
        assert_eq!((first.take(), first.take()), (Some(1), None));
        first.give(4);
        assert_eq!(first.take(), Some(4));
    }
}
