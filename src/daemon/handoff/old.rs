//! The old process's side: it serves a new one that gets ready, and leaves the
//! tunnel to it.
//!
//! A thread of its own waits for the new process, so that the control thread goes on
//! with what it does. Only changes that the new process would miss are refused
//! meanwhile, and reloads wait.

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, bounded, never};
use ipnet::IpNet;
use signal_hook::consts::SIGHUP;

use super::manifest::Manifest;
use super::wire::{Ended, Go, Kept, Ready, Taken, hear, in_words, say};
use super::{PATIENCE, PROTOCOL};
use crate::control::codec::Lines;
use crate::control::credentials::Asker;
use crate::daemon::control_socket::ControlSocket;
use crate::daemon::tunnel::Tunnel;
use crate::daemon::workers::WorkerFds;
use crate::error::{Error, Result};
use crate::host::link;

/// How long this process waits, stopped, for the new one to start.
const TAKE_TIME_MAX: Duration = Duration::from_secs(5);

/// How long an end waits for a manifest that is being sent.
const SENT_WAIT_MAX: Duration = Duration::from_millis(100);

/// Longest line of addresses: thousands.
const READY_BYTES_MAX: usize = 256 << 10;

/// A new process that has everything ready.
pub struct NewProcess {
    pub(super) lines: Lines,
    /// The addresses that it will give the device.
    pub(super) adds: Vec<IpNet>,
}

/// A new process that gets ready. Dropped, it is told that this process keeps the
/// tunnel, unless it has it by then.
pub struct Handoff {
    /// The connection, of which the thread has a duplicate.
    lines: Lines,
    thread: Option<JoinHandle<()>>,
    ready: Receiver<Result<NewProcess>>,
    /// Tells that the whole manifest has been sent.
    sent: Receiver<()>,
    /// A reload by signal waits for the end of it.
    pub is_reload_due: bool,
}

impl Handoff {
    /// Begins to serve a new process; `None` if it is refused.
    pub fn begin(
        tunnel: &Tunnel,
        control: &ControlSocket,
        lines: Lines,
        protocol: u32,
    ) -> Option<Self> {
        if let Ok(asker) = Asker::of(lines.stream()) {
            tracing::info!("{asker} asks to take over");
        }
        let mut handoff = Self::new(lines);
        let started = check_protocol(protocol).and_then(|()| {
            let workers = Arc::clone(tunnel.workers.descriptors());
            handoff.start(Manifest::of(tunnel), workers, control.listener()?)
        });
        match started {
            Ok(()) => Some(handoff),
            Err(error) => {
                keep(&mut handoff.lines, &error);
                tracing::error!("not handed over: {error}");
                None
            }
        }
    }

    pub(super) fn new(lines: Lines) -> Self {
        Self {
            lines,
            thread: None,
            ready: never(),
            sent: bounded(1).1,
            is_reload_due: false,
        }
    }

    /// Starts the thread that waits for the new process.
    pub(super) fn start(
        &mut self,
        manifest: Manifest,
        workers: Arc<Vec<WorkerFds>>,
        listener: Option<OwnedFd>,
    ) -> Result<()> {
        let failed = |error| Error::os("cannot serve a new process", error);
        let stream = self.lines.stream().try_clone().map_err(failed)?;
        let ((note_sent, sent), (sender, ready)) = (bounded(1), bounded(1));
        let serve = move || {
            let descriptors = descriptors(&workers, listener.as_ref());
            let note_sent = || {
                let _ = note_sent.send(());
            };
            let _ = sender.send(serve(stream, &manifest, &descriptors, note_sent));
        };
        let thread = std::thread::Builder::new().name("handoff".into());
        self.thread = Some(thread.spawn(serve).map_err(failed)?);
        (self.ready, self.sent) = (ready, sent);
        Ok(())
    }

    /// Refuses a process that wants to take over while another one does.
    pub fn refuse_second(mut lines: Lines) {
        let error = Error::new("another process is taking over already").hint("try again");
        keep(&mut lines, &error);
    }

    /// Where it comes once that the new process is ready, or has failed.
    pub fn ready(&self) -> &Receiver<Result<NewProcess>> {
        &self.ready
    }

    /// Leaves the tunnel to the new process, and tells whether it is the new one's now.
    /// If that comes to nothing, the tunnel runs on. `signals`: those that this process
    /// has not seen to.
    ///
    /// # Errors
    /// When the tunnel cannot run on.
    pub fn finish(
        self,
        tunnel: &mut Tunnel,
        control: &mut ControlSocket,
        ready: Result<NewProcess>,
        signals: &Receiver<i32>,
    ) -> Result<bool> {
        let (mut listener, mut adds) = (None, Vec::new());
        let left = ready.and_then(|mut new| {
            adds = std::mem::take(&mut new.adds);
            listener = control.listener()?;
            tunnel.leave();
            control.close(false);
            // Last: from here until the new process starts nobody carries packets.
            tunnel.workers.stop();
            new.let_go(TAKE_TIME_MAX)?;
            Ok(new)
        });
        let error = match left {
            Ok(mut new) => {
                let has_signal = signals.try_iter().any(|signal| signal == SIGHUP);
                let reload_due = self.is_reload_due || has_signal;
                new.end(reload_due);
                return Ok(true);
            }
            Err(error) => error,
        };
        tracing::error!("not handed over: {error}");
        if tunnel.workers.are_stopped() {
            // First, so that the socket's name goes if the rest fails.
            if listener.is_some() {
                control.open(&tunnel.config, listener)?;
            }
            tunnel.resume()?;
            take_back(tunnel, &adds);
            tracing::warn!("carrying on");
        }
        // The new process is told now that the tunnel runs: if this one died before it
        // said that it keeps it, the new one would carry on.
        drop(self);
        Ok(false)
    }
}

impl Drop for Handoff {
    fn drop(&mut self) {
        // In the midst of the manifest a word would be garbage. Who has taken the tunnel
        // does not listen any more.
        if self.sent.recv_timeout(SENT_WAIT_MAX).is_ok() {
            let what = "it keeps the tunnel, or was told to stop; its log may say more";
            keep(&mut self.lines, &Error::new(what));
        }
        let _ = self.lines.stream().shutdown(Shutdown::Both);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that serves a new process panicked");
        }
    }
}

fn check_protocol(protocol: u32) -> Result<()> {
    if protocol == PROTOCOL {
        return Ok(());
    }
    Err(Error::new(format!(
        "this process hands over by protocol {PROTOCOL}, not {protocol}; \
         stop it, and start the other without --takeover"
    )))
}

/// All of them, in the order of the manifest's workers.
fn descriptors<'a>(workers: &'a [WorkerFds], listener: Option<&'a OwnedFd>) -> Vec<BorrowedFd<'a>> {
    let of_workers = workers
        .iter()
        .flat_map(|worker| [Some(worker.queue()), Some(worker.receive()), worker.send()])
        .flatten();
    of_workers.chain(listener.map(AsFd::as_fd)).collect()
}

/// Hands everything over, and returns when the new process is ready. Up to then
/// nothing has changed. `note_sent` is called in between.
///
/// # Errors
/// When the new process fails or does not answer.
#[doc(hidden)]
pub fn serve(
    stream: UnixStream,
    manifest: &Manifest,
    descriptors: &[BorrowedFd<'_>],
    note_sent: impl FnOnce(),
) -> Result<NewProcess> {
    let deadline = Instant::now() + PATIENCE;
    let mut lines = Lines::new(stream, READY_BYTES_MAX);
    let line = serde_json::to_vec(manifest).map_err(|error| lost(error.into()))?;
    lines
        .send_with_descriptors(line, descriptors, deadline)
        .map_err(lost)?;
    note_sent();
    let Ready { adds } = hear(&mut lines, deadline).map_err(lost)?;
    Ok(NewProcess { lines, adds })
}

impl NewProcess {
    /// This process has stopped: lets the new one start, and returns when it does.
    ///
    /// # Errors
    /// When it does not, and never will: this process has to carry on.
    #[doc(hidden)]
    pub fn let_go(&mut self, time_max: Duration) -> Result<()> {
        let deadline = Instant::now() + time_max;
        let lines = &mut self.lines;
        let heard = say(lines, &Go { go: true }, deadline).and_then(|()| hear(lines, deadline));
        let error = match heard {
            Ok(Taken { .. }) => return Ok(()),
            Err(error) => error,
        };
        // What it has said by now counts. More it cannot say.
        let _ = lines.stream().shutdown(Shutdown::Read);
        match hear(lines, Instant::now()) {
            Ok(Taken { .. }) => Ok(()),
            Err(_) => Err(lost(error)),
        }
    }

    /// The last word: the new process carries the tunnel.
    pub(super) fn end(&mut self, reload_due: bool) {
        let _ = say(&mut self.lines, &Ended { reload_due }, Instant::now());
    }
}

/// Says that this process keeps the tunnel.
pub(super) fn keep(lines: &mut Lines, error: &Error) {
    // It fits a fresh connection's buffer.
    let _ = say(lines, &Kept::because(error), Instant::now());
}

fn lost(error: io::Error) -> Error {
    let what = "the process that wanted to take over has failed";
    Error::os(what, in_words(error))
}

/// Takes from the device what the new process has given it. Who runs the tunnel
/// from now on does not have those addresses.
fn take_back(tunnel: &mut Tunnel, adds: &[IpNet]) {
    let own = &tunnel.settings.link.addresses;
    let others = adds.iter().filter(|net| !own.contains(net));
    let others: Vec<_> = others.copied().collect();
    if let Some(index) = tunnel.host.device.index {
        link::remove_addresses(&mut tunnel.host.netlink, index, &others);
    }
}
