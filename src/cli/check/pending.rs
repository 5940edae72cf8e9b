//! Probes that the kernel or the network might keep waiting.

use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, bounded};

/// A probe under way on a thread of its own.
pub struct Pending<T>(Receiver<T>);

/// Starts a probe. One that cannot be started never answers.
pub fn start<T: Send + 'static>(probe: impl FnOnce() -> T + Send + 'static) -> Pending<T> {
    let (sender, receiver) = bounded(1);
    let work = move || {
        // Who no longer waits no longer minds.
        let _ = sender.send(probe());
    };
    // Without the thread the sender is gone, and with it the answer.
    let _ = thread::Builder::new().name("check".into()).spawn(work);
    Pending(receiver)
}

impl<T> Pending<T> {
    /// The probe's result, `None` if it is not there at `deadline`. The thread
    /// is then left alone; it ends with the process at the latest.
    pub fn until(self, deadline: Instant) -> Option<T> {
        // Should the deadline have passed, what is there still counts.
        let left = deadline.saturating_duration_since(Instant::now());
        self.0.recv_timeout(left.max(Duration::from_millis(1))).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_for_an_answer_and_not_for_ever() {
        let patient = Instant::now() + Duration::from_secs(60);
        assert_eq!(start(|| 7).until(patient), Some(7));
        let (hold, held) = bounded::<()>(0);
        let stuck = start(move || held.recv().is_ok());
        assert_eq!(stuck.until(Instant::now()), None);
        drop(hold);
    }
}
