//! The process that takes over, as its predecessor sees it.

use std::io::{self, Write};
use std::net::Shutdown;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use ipnet::IpNet;

use super::wire::{hear, hear_addresses_until, hear_until, say, send_descriptors, write_all_until};
use super::{Manifest, PATIENCE, PROTOCOL, Step, in_words};
use crate::error::{Error, Result};

/// How long the predecessor waits, stopped, for the successor to start.
const TAKE_TIME_MAX: Duration = Duration::from_secs(5);

/// The predecessor's side.
pub struct Successor(pub(super) UnixStream);

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
    ///
    /// # Errors
    /// When it speaks another version, or is gone.
    pub fn new(mut stream: UnixStream, protocol: u32) -> Result<Self> {
        stream
            .set_read_timeout(Some(PATIENCE))
            .and_then(|()| stream.set_write_timeout(Some(PATIENCE)))
            .map_err(lost)?;
        if protocol == PROTOCOL {
            return Ok(Self(stream));
        }
        let error = format!(
            "this process hands over by protocol {PROTOCOL}, not {protocol}; \
             stop it, and start the other without --takeover"
        );
        let answer = serde_json::json!({ "ok": false, "error": error });
        let _ = writeln!(stream, "{answer}");
        Err(Error::new(error))
    }

    /// Hands everything over, and returns when the successor is ready to go on.
    /// Up to then nothing has changed but for the addresses that the device may
    /// have been given: `adding`, as soon as the successor says them.
    ///
    /// # Errors
    /// When the successor fails or does not answer.
    pub fn hand_over<'a>(
        &mut self,
        manifest: &Manifest,
        workers: impl Iterator<Item = WorkerDescriptors<'a>>,
        listener: Option<BorrowedFd<'_>>,
        adding: &OnceLock<Vec<IpNet>>,
    ) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        let stream = &mut self.0;
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

    /// Tells the successor that this process stops now.
    ///
    /// # Errors
    /// When it is gone.
    pub fn stopping(&mut self) -> Result<()> {
        say(&mut self.0, Step::Stopping).map_err(lost)
    }

    /// This process has stopped: lets the successor start, and reload if that is
    /// due; returns when it starts.
    ///
    /// # Errors
    /// When it does not, and never will: this process has to carry on.
    pub fn done(self, is_reload_due: bool) -> Result<()> {
        let step = match is_reload_due {
            true => Step::DoneReloadDue,
            false => Step::Done,
        };
        self.done_within(step, TAKE_TIME_MAX)
    }

    pub(super) fn done_within(mut self, step: Step, time_max: Duration) -> Result<()> {
        let stream = &mut self.0;
        let deadline = Instant::now() + time_max;
        let heard = say(stream, step).and_then(|()| hear_until(stream, Step::Taken, deadline));
        let Err(error) = heard else {
            return Ok(());
        };
        // What it has said by now counts. More it cannot say.
        let _ = stream.shutdown(Shutdown::Read);
        if hear(stream, Step::Taken).is_ok() {
            return Ok(());
        }
        let _ = say(stream, Step::Kept);
        Err(lost(error))
    }
}

fn lost(error: io::Error) -> Error {
    let what = "the process that wanted to take over has failed";
    Error::os(what, in_words(error))
}
