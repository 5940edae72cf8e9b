//! What the operator sees meanwhile.

use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

/// How often the rate is shown: on a terminal in place, elsewhere line by line.
const TERMINAL_INTERVAL: Duration = Duration::from_millis(250);
const PLAIN_INTERVAL: Duration = Duration::from_secs(1);

/// ECMA-48: carriage return, erase to the end of the line.
const ERASE_LINE: &str = "\r\x1b[K";

/// Says a line on standard error. Nobody listening is no reason to stop.
pub(super) fn say(line: &str) {
    let _ = writeln!(io::stderr(), "{line}");
}

/// Prints the result on standard output.
pub(super) fn print(text: &str) {
    let _ = io::stdout().write_all(text.as_bytes());
}

/// A rate that is shown while it is measured.
pub(super) struct Progress {
    label: Option<String>,
    terminal: bool,
    start: Instant,
    shown_at: Instant,
    shown_bytes: u64,
}

impl Progress {
    pub(super) fn new(label: String) -> Self {
        Self {
            label: Some(label),
            ..Self::silent()
        }
    }

    pub(super) fn silent() -> Self {
        let now = Instant::now();
        Self {
            label: None,
            terminal: io::stderr().is_terminal(),
            start: now,
            shown_at: now,
            shown_bytes: 0,
        }
    }

    /// Shows the rate since it was last shown, if it is time.
    pub(super) fn show(&mut self, bytes: u64) {
        let Some(label) = &self.label else { return };
        let interval = if self.terminal {
            TERMINAL_INTERVAL
        } else {
            PLAIN_INTERVAL
        };
        let since = self.shown_at.elapsed();
        if since < interval {
            return;
        }
        let bits = (bytes - self.shown_bytes) as f64 * 8.0;
        let rate = bits / since.as_secs_f64() / 1e9;
        let seconds = self.start.elapsed().as_secs_f64();
        let line = format!("{label}: {rate:5.1} Gbit/s, {seconds:.0} s");
        if self.terminal {
            let _ = write!(io::stderr(), "{ERASE_LINE}{line}");
        } else {
            say(&line);
        }
        self.shown_at = Instant::now();
        self.shown_bytes = bytes;
    }

    /// Makes room for the next line.
    pub(super) fn clear(&self) {
        if self.terminal && self.label.is_some() {
            let _ = write!(io::stderr(), "{ERASE_LINE}");
        }
    }
}
