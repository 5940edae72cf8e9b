//! Asks a tunnel once a second, whichever process is behind its socket.

use std::path::PathBuf;
use std::thread::{Builder, sleep};
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;
use serde::de::DeserializeOwned;

use super::Event;
use super::model::{Sample, Update};
use crate::cli::poller::Poller;
use crate::control::client::{Verdict, parse};
use crate::control::protocol::Request;
use crate::error::{Error, Result};

/// Between one sample and the next.
const INTERVAL: Duration = Duration::from_secs(1);

/// How long the tunnel may take for an answer before the screen says that there is none.
const PATIENCE: Duration = Duration::from_secs(5);

/// A tunnel's control socket.
pub(super) struct Source {
    path: PathBuf,
    poller: Poller,
}

impl Source {
    /// One that asks at `path`.
    pub(super) fn new(path: PathBuf) -> Self {
        let poller = Poller::new(path.clone(), PATIENCE);
        Self { path, poller }
    }

    /// Asks for all that is shown.
    ///
    /// # Errors
    /// When the tunnel does not answer as it should.
    pub(super) fn sample(&mut self) -> Result<Box<Sample>> {
        Ok(Box::new(Sample {
            status: self.ask(&Request::Status {})?,
            peers: self.ask(&Request::Peers {})?,
            arrival: Instant::now(),
        }))
    }

    fn ask<T: DeserializeOwned>(&mut self, request: &Request) -> Result<T> {
        let line = self.poller.ask(request)?;
        parse::<Verdict>(&line, &self.path)?.check()?;
        parse(&line, &self.path)
    }

    /// Waits until the next sample is due, or the tunnel ends.
    fn next(&mut self, due: Instant) -> Update {
        let waited = self.poller.wait(due);
        match waited.and_then(|()| self.sample()) {
            Ok(sample) => Update::Sample(sample),
            Err(error) => Update::Lost(error.fault()),
        }
    }
}

/// Sends what a tunnel answers, until nobody takes it any more. `source` has been asked just
/// now.
///
/// # Errors
/// When there are no more threads.
pub(super) fn start(mut source: Source, events: Sender<Event>) -> Result<()> {
    let poll = move || {
        let mut due = Instant::now() + INTERVAL;
        loop {
            let update = source.next(due);
            if events.send(Event::Tunnel(update)).is_err() {
                return;
            }
            let now = Instant::now();
            // Not at once after a failure, nor many times after a slow answer.
            sleep(due.saturating_duration_since(now));
            due = due.max(now) + INTERVAL;
        }
    };
    let started = Builder::new().name("poll".into()).spawn(poll);
    let failed = |error| Error::os("cannot start a thread", error);
    started.map(drop).map_err(failed)
}
