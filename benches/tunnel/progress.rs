//! How far the run is, on standard error: a bar on a terminal, else lines.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

const TEMPLATE: &str = "{bar:20} {percent:>3} %  {elapsed_precise}, about {left} left  {wide_msg}";

/// How far the run is.
pub struct Progress {
    bar: Option<ProgressBar>,
    start: Instant,
    steps: usize,
    done: usize,
}

impl Progress {
    /// Of a run that takes so many steps, each of about the same time.
    pub fn new(steps: usize) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new(steps as u64);
            let left = |state: &indicatif::ProgressState, out: &mut dyn std::fmt::Write| {
                let left = time_left(state.elapsed(), state.pos(), state.len().unwrap_or(0));
                let _ = out.write_str(&left);
            };
            if let Ok(style) = ProgressStyle::with_template(TEMPLATE) {
                bar.set_style(style.with_key("left", left));
            }
            bar.enable_steady_tick(Duration::from_millis(500));
            bar
        });
        Self {
            bar,
            start: Instant::now(),
            steps,
            done: 0,
        }
    }

    /// Says what begins now: a link. One line each where there is no terminal.
    pub fn begin(&self, what: &str) {
        match &self.bar {
            Some(bar) => bar.set_message(what.to_string()),
            None => {
                let left = time_left(self.start.elapsed(), self.done as u64, self.steps as u64);
                self.say(&format!(
                    "{what}: {} of {} samples done, about {left} left",
                    self.done, self.steps
                ));
            }
        }
    }

    /// Says what is measured now; seen on a terminal only.
    pub fn detail(&self, what: &str) {
        if let Some(bar) = &self.bar {
            bar.set_message(what.to_string());
        }
    }

    /// So many steps are done.
    pub fn advance(&mut self, steps: usize) {
        self.done += steps;
        if let Some(bar) = &self.bar {
            bar.set_position(self.done as u64);
        }
    }

    /// How many steps are done.
    pub fn done(&self) -> usize {
        self.done
    }

    /// So many steps are done in all.
    pub fn advance_to(&mut self, done: usize) {
        self.advance(done.saturating_sub(self.done()));
    }

    /// Says a line that stays.
    pub fn say(&self, line: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| write_line(line)),
            None => write_line(line),
        }
    }

    /// Makes room for what comes after the run.
    pub fn clear(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// Nobody listening is no reason to stop.
fn write_line(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// If it goes on as so far.
fn time_left(elapsed: Duration, done: u64, steps: u64) -> String {
    if done == 0 {
        return "?".into();
    }
    let left = steps.saturating_sub(done);
    let seconds = (elapsed.as_secs_f64() * left as f64 / done as f64).round() as u64;
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min {:02} s", seconds / 60, seconds % 60),
        _ => format!("{} h {:02} min", seconds / 3600, seconds / 60 % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_left_follows_from_time_spent() {
        let elapsed = Duration::from_secs(30);
        assert_eq!(time_left(elapsed, 0, 10), "?");
        assert_eq!(time_left(elapsed, 3, 8), "50 s");
        assert_eq!(time_left(elapsed, 3, 10), "1 min 10 s");
        assert_eq!(time_left(elapsed, 1, 242), "2 h 00 min");
        assert_eq!(time_left(elapsed, 10, 10), "0 s");
    }
}
