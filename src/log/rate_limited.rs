//! Log lines of what others do to the host, of which there may be many.

use std::time::{Duration, Instant};

/// Lines in one window.
const LINES_MAX: u32 = 5;

/// The window's length.
const WINDOW: Duration = Duration::from_secs(10);

/// Lets the first lines of a window pass and counts the others.
pub struct RateLimitedLog {
    /// What the lines are about, in the plural.
    what: &'static str,
    window: Option<Window>,
}

struct Window {
    end: Instant,
    lines: u32,
    left_out: u64,
}

impl RateLimitedLog {
    /// An empty one. `what`: what its lines are about, in the plural.
    pub fn new(what: &'static str) -> Self {
        Self { what, window: None }
    }

    /// Whether a line may be written now; otherwise it is counted.
    pub fn admits(&mut self, now: Instant) -> bool {
        self.flush(now);
        let window = self.window.get_or_insert(Window {
            end: now + WINDOW,
            lines: 0,
            left_out: 0,
        });
        if window.lines < LINES_MAX {
            window.lines += 1;
            return true;
        }
        window.left_out += 1;
        false
    }

    /// Ends a window that is over; says how many lines it has left out.
    pub fn flush(&mut self, now: Instant) {
        if self.window.as_ref().is_some_and(|window| window.end <= now) {
            self.end();
        }
    }

    /// Ends the window before its time.
    pub fn end(&mut self) {
        if let Some(window) = self.window.take()
            && window.left_out > 0
        {
            tracing::warn!(
                "{} more {} within {} s were not logged",
                window.left_out,
                self.what,
                WINDOW.as_secs()
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_has_few_lines_and_a_count_of_the_others() {
        let mut journal = RateLimitedLog::new("events");
        let now = Instant::now();
        let admitted = (0..100).filter(|_| journal.admits(now)).count();
        assert_eq!(admitted, 5);
        assert_eq!(journal.window.as_ref().unwrap().left_out, 95);
        journal.flush(now + WINDOW);
        assert!(journal.window.is_none());
        assert!(journal.admits(now + WINDOW));
    }
}
