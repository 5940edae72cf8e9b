//! Log lines of which there may be many: the first few in a while are written, and
//! the others counted.

use std::time::{Duration, Instant};

/// Lines in one window.
const LINES_MAX: u32 = 5;

/// Lets the first lines of a window pass and counts the others. What was left out is
/// logged at the window's end, or when this is dropped.
pub(crate) struct RateLimitedLog {
    /// What the lines are about, in the plural.
    what: String,
    window: Duration,
    /// When the window ends; `None` before the next line begins one.
    end: Option<Instant>,
    lines: u32,
    left_out: u64,
}

impl RateLimitedLog {
    /// An empty one. `what`: what its lines are about, in the plural.
    pub(crate) fn new(what: impl Into<String>, window: Duration) -> Self {
        Self {
            what: what.into(),
            window,
            end: None,
            lines: 0,
            left_out: 0,
        }
    }

    /// Whether a line may be written now; otherwise it is counted.
    pub(crate) fn admits(&mut self, now: Instant) -> bool {
        self.flush(now);
        self.end.get_or_insert(now + self.window);
        let is_admitted = self.lines < LINES_MAX;
        match is_admitted {
            true => self.lines += 1,
            false => self.left_out += 1,
        }
        is_admitted
    }

    /// Counts what gets no lines.
    pub(crate) fn leave_out(&mut self, count: u64, now: Instant) {
        self.flush(now);
        if count > 0 {
            self.end.get_or_insert(now + self.window);
            self.left_out += count;
        }
    }

    /// Ends a window that is over.
    pub(crate) fn flush(&mut self, now: Instant) {
        if self.end.is_some_and(|end| end <= now) {
            self.end_window();
        }
    }

    fn end_window(&mut self) {
        if self.left_out > 0 {
            tracing::warn!(
                count = self.left_out,
                what = self.what,
                window_seconds = self.window.as_secs(),
                "{} more {} within {} s were not logged",
                self.left_out,
                self.what,
                self.window.as_secs()
            );
        }
        (self.end, self.lines, self.left_out) = (None, 0, 0);
    }
}

impl Drop for RateLimitedLog {
    fn drop(&mut self) {
        self.end_window();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::log::captured;

    #[test]
    fn a_window_has_few_lines_and_a_count_of_the_others() {
        let (start, window) = (Instant::now(), Duration::from_secs(10));
        let said = captured(|| {
            let mut log = RateLimitedLog::new("events", window);
            let admitted = (0..100).filter(|_| log.admits(start)).count();
            assert_eq!(admitted, 5);
            log.leave_out(5, start);
            log.flush(start + window / 2);
            log.flush(start + window);
            assert!(log.admits(start + window));
            log.leave_out(7, start + window);
        });
        let expected = [
            "WARN 100 more events within 10 s were not logged",
            "WARN 7 more events within 10 s were not logged",
        ];
        assert_eq!(said, expected);
    }
}
