//! The process that takes over, as its predecessor sees it.

use std::io;
use std::net::Shutdown;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use ipnet::IpNet;

use super::wire::{
    hear, hear_addresses_until, hear_until, say, say_at_once, send_descriptors, write_all_until,
};
use super::{Manifest, PATIENCE, PROTOCOL, Step, in_words};
use crate::error::{Error, Result};

/// How long the predecessor waits, stopped, for the successor to start.
const TAKE_TIME_MAX: Duration = Duration::from_secs(5);

/// The predecessor's side.
#[derive(Clone)]
pub struct Successor(pub(super) Arc<UnixStream>);

/// The descriptors of one worker.
pub struct WorkerDescriptors<'a> {
    /// Its TUN queue.
    pub queue: BorrowedFd<'a>,
    /// Its sockets.
    pub receive: BorrowedFd<'a>,
    /// Its socket to send from, if it has one.
    pub send: Option<BorrowedFd<'a>>,
}

impl Successor {
    /// Who asked on this connection.
    pub fn new(stream: UnixStream) -> Self {
        Self(Arc::new(stream))
    }

    /// Makes sure that it speaks this version.
    ///
    /// # Errors
    /// When it speaks another, or is gone.
    pub fn check(&self, protocol: u32) -> Result<()> {
        let timeouts_set = self.0.set_read_timeout(Some(PATIENCE));
        timeouts_set
            .and_then(|()| self.0.set_write_timeout(Some(PATIENCE)))
            .map_err(lost)?;
        if protocol == PROTOCOL {
            return Ok(());
        }
        Err(Error::new(format!(
            "this process hands over by protocol {PROTOCOL}, not {protocol}; \
             stop it, and start the other without --takeover"
        )))
    }

    /// Answers that nothing is handed over, in place of everything else.
    pub fn refuse(&self, error: &Error) {
        let answer = serde_json::json!({ "ok": false, "error": error.to_string() });
        let answer = format!("{answer}\n");
        let _ = write_all_until(&self.0, answer.as_bytes(), Instant::now() + PATIENCE);
    }

    /// Says that this process does not hand over after all, and closes the
    /// connection. Without that it would pass for dead.
    pub fn keep(&self) {
        let _ = say_at_once(&self.0, Step::Kept);
        let _ = self.0.shutdown(Shutdown::Both);
    }

    /// Hands everything over, and returns when the successor is ready to go on.
    /// Up to then nothing has changed but for the addresses that the device may
    /// have been given: `adding`, as soon as the successor says them.
    ///
    /// # Errors
    /// When the successor fails or does not answer.
    pub fn hand_over<'a>(
        &self,
        manifest: &Manifest,
        workers: impl Iterator<Item = WorkerDescriptors<'a>>,
        listener: Option<BorrowedFd<'_>>,
        adding: &OnceLock<Vec<IpNet>>,
    ) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        let stream = &*self.0;
        let mut line = serde_json::to_vec(manifest).map_err(|error| lost(error.into()))?;
        line.push(b'\n');
        write_all_until(stream, &line, deadline).map_err(lost)?;
        hear_until(stream, Step::Ready, deadline).map_err(lost)?;
        for worker in workers {
            let given = [Some(worker.queue), Some(worker.receive), worker.send];
            send_descriptors(stream, given.into_iter().flatten()).map_err(lost)?;
        }
        send_descriptors(stream, listener.into_iter()).map_err(lost)?;
        let addresses = hear_addresses_until(stream, deadline).map_err(lost)?;
        // It is the first time that they are said.
        let _ = adding.set(addresses);
        hear_until(stream, Step::Go, deadline).map_err(lost)
    }

    /// This process has stopped: lets the successor start, and reload if that is
    /// due; returns when it starts.
    ///
    /// # Errors
    /// When it does not, and never will: this process has to carry on.
    pub fn done(&self, is_reload_due: bool) -> Result<()> {
        let step = match is_reload_due {
            true => Step::DoneReloadDue,
            false => Step::Done,
        };
        self.done_within(step, TAKE_TIME_MAX)
    }

    pub(super) fn done_within(&self, step: Step, time_max: Duration) -> Result<()> {
        let stream = &*self.0;
        let deadline = Instant::now() + time_max;
        let heard = say(stream, step).and_then(|()| hear_until(stream, Step::Taken, deadline));
        let Err(error) = heard else {
            return Ok(());
        };
        // What it has said by now counts. More it cannot say.
        let _ = stream.shutdown(Shutdown::Read);
        hear(stream, Step::Taken).map_err(|_| lost(error))
    }
}

fn lost(error: io::Error) -> Error {
    let what = "the process that wanted to take over has failed";
    Error::os(what, in_words(error))
}
