//! The old process's side: it serves a new one that gets ready, and leaves the
//! tunnel to it.
//!
//! A thread waits for the new process, so that the control thread can go on with its
//! work. Only changes that the new process would miss are refused meanwhile, and
//! reloads wait.

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, bounded};
use socket2::Socket;

use super::PROTOCOL;
use super::wire::{self, Go, Ready, Taken, failure, keep};
use crate::control::codec::{Lines, to_line};
use crate::control::credentials::Asker;
use crate::control::metrics::Server as MetricsServer;
use crate::control::server::Server;
use crate::daemon::manifest::Manifest;
use crate::daemon::tunnel::Tunnel;
use crate::daemon::workers::WorkerFds;
use crate::error::{Error, Result};
use crate::wireguard::PeerTimestamps;

/// How long this process waits for the new one to be ready: names that do not resolve
/// take it 5 s, and many prefixes some more.
const READY_TIME_MAX: Duration = Duration::from_secs(20);

/// How long this process, whose workers have stopped, waits for the new one to take the
/// tunnel. Nobody carries packets meanwhile.
const TAKE_TIME_MAX: Duration = Duration::from_secs(5);

/// Longest line that a new process says.
const READY_BYTES_MAX: usize = 4 << 10;

/// How long a handoff that is given up waits for a manifest that is being sent.
const SENT_WAIT_MAX: Duration = Duration::from_millis(100);

/// A new process that has the manifest. Dropping this tells it that this process keeps
/// the tunnel.
pub struct NewProcess(pub(super) Lines);

impl NewProcess {
    /// This process has stopped: lets the new one start, and waits until it does.
    ///
    /// # Errors
    /// When it does not, and never will: this process has to carry on.
    pub(super) fn let_go(&mut self, timestamps: Vec<PeerTimestamps>) -> Result<()> {
        let lines = &mut self.0;
        let deadline = Instant::now() + TAKE_TIME_MAX;
        let go = true;
        wire::send(lines, &Go { go, timestamps }, deadline)
            .and_then(|()| wire::receive_or_close(lines, deadline))
            .map(|Taken { .. }| ())
            .map_err(|error| failure(GONE, error))
    }

    /// Leaves the connection open until this process has ended, which tells the new one
    /// that it has.
    pub(super) fn leave(self) {
        std::mem::forget(self);
    }
}

impl Drop for NewProcess {
    fn drop(&mut self) {
        let what = "it keeps the tunnel, or was told to stop; its log may say more";
        keep(&mut self.0, &Error::new(what));
    }
}

const GONE: &str = "the process that wanted to take over has failed";

/// A new process that is getting ready. Dropping this tells it that this process keeps
/// the tunnel.
pub struct Handoff {
    /// The connection, of which the thread has a duplicate.
    lines: Lines,
    thread: Option<JoinHandle<()>>,
    /// Gives the new process when it is ready, or why it is not.
    pub ready: Receiver<Result<NewProcess>>,
    /// A reload by signal waits.
    pub is_reload_due: bool,
    /// The new process's id; none if it cannot be seen.
    pub pid: Option<u32>,
}

impl Handoff {
    /// Begins to serve a new process; `None` if it is refused.
    pub fn begin(
        tunnel: &mut Tunnel,
        (control, metrics): (Option<&Server>, Option<&MetricsServer>),
        lines: Lines,
        protocol: u32,
    ) -> Option<Self> {
        let asker = Asker::of(lines.stream()).ok();
        if let Some(asker) = asker {
            tracing::info!(by = %asker, "{asker} asks to take over");
        }
        let mut handoff = Self::new(lines);
        handoff.pid = asker.and_then(|asker| asker.pid.try_into().ok());
        let started = check_protocol(protocol).and_then(|()| {
            let workers = tunnel.workers.descriptors.clone();
            // The new process is to find peers where they are now.
            tunnel.peers.follow_endpoints(Instant::now());
            let handshake = tunnel.encryption.as_ref().map(|it| Arc::clone(it.socket()));
            let control = control.map(|server| server.listener.as_fd());
            let listeners = control.into_iter();
            let listeners = listeners.chain(metrics.map(|server| server.listener.as_fd()));
            let manifest = Manifest {
                metrics: metrics.map(|server| server.listener.address),
                ..Manifest::of(tunnel)
            };
            let listeners: Vec<_> = listeners.collect();
            let started = handoff.start(manifest, workers, handshake, &listeners);
            started.map_err(|error| Error::os("cannot serve a new process", error))
        });
        if let Err(error) = started {
            keep(&mut handoff.lines, &error);
            tracing::error!(%error, "not handed over: {error}");
            return None;
        }
        Some(handoff)
    }

    pub(super) fn new(lines: Lines) -> Self {
        Self {
            lines,
            thread: None,
            ready: bounded(1).1,
            is_reload_due: false,
            pid: None,
        }
    }

    /// Starts the thread that waits for the new process.
    pub(super) fn start(
        &mut self,
        manifest: Manifest,
        workers: Vec<WorkerFds>,
        handshake: Option<Arc<Socket>>,
        listeners: &[BorrowedFd<'_>],
    ) -> io::Result<()> {
        let stream = self.lines.stream().try_clone()?;
        let listeners = listeners.iter().map(BorrowedFd::try_clone_to_owned);
        let listeners = listeners.collect::<io::Result<Vec<_>>>()?;
        let (sender, ready) = bounded(1);
        let serve = move || {
            let descriptors = descriptors(&workers, handshake.as_deref(), &listeners);
            let _ = sender.send(serve(stream, &manifest, &descriptors));
        };
        let thread = std::thread::Builder::new().name("handoff".into());
        self.thread = Some(thread.spawn(serve)?);
        self.ready = ready;
        Ok(())
    }

    /// Refuses a process that wants to take over while another one does.
    pub fn refuse_second(mut lines: Lines) {
        let error = Error::new("another process is taking over already").hint("try again");
        keep(&mut lines, &error);
    }
}

impl Drop for Handoff {
    fn drop(&mut self) {
        // The thread takes this for the end of the new process, and tells it that the
        // tunnel is kept. But if it is still sending the manifest, a message in the
        // middle would be garbage.
        let stream = self.lines.stream();
        let _ = stream.shutdown(Shutdown::Read);
        if let Err(RecvTimeoutError::Timeout) = self.ready.recv_timeout(SENT_WAIT_MAX) {
            let _ = stream.shutdown(Shutdown::Both);
        }
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
fn descriptors<'a>(
    workers: &'a [WorkerFds],
    handshake: Option<&'a Socket>,
    listeners: &'a [OwnedFd],
) -> Vec<BorrowedFd<'a>> {
    let of_workers = workers.iter().flat_map(|worker| {
        let own = worker.sockets.send.as_ref().map(AsFd::as_fd);
        [Some(worker.queue.as_fd()), Some(worker.receive()), own]
    });
    let of_workers = of_workers.flatten().chain(handshake.map(AsFd::as_fd));
    of_workers
        .chain(listeners.iter().map(AsFd::as_fd))
        .collect()
}

/// Hands everything over, and returns when the new process is ready. Up to then
/// nothing has changed.
///
/// # Errors
/// When the new process fails or does not answer.
#[doc(hidden)]
pub fn serve(
    stream: UnixStream,
    manifest: &Manifest,
    descriptors: &[BorrowedFd<'_>],
) -> Result<NewProcess> {
    let deadline = Instant::now() + READY_TIME_MAX;
    let mut lines = Lines::new(stream, READY_BYTES_MAX);
    let sent =
        to_line(manifest).and_then(|line| lines.send_with_descriptors(line, descriptors, deadline));
    sent.map_err(|error| failure(GONE, error))?;
    let mut new = NewProcess(lines);
    let ready = wire::receive(&mut new.0, deadline);
    ready
        .map(|Ready { .. }| new)
        .map_err(|error| failure(GONE, error))
}

/// Leaves the tunnel to a process that is ready, and tells whether it is the new
/// one's now. If that comes to nothing, the tunnel runs on.
///
/// # Errors
/// When the tunnel cannot run on.
pub fn hand_over(
    mut new: NewProcess,
    tunnel: &mut Tunnel,
    control: &mut Option<Server>,
) -> Result<bool> {
    tunnel.workers.count_socket_drops();
    tunnel.host.stop_routes();
    // Last: from here on packets wait until the new process starts. Sessions end, whose keys
    // no process has from then on.
    tunnel.stop();
    let encryption = tunnel.encryption.as_ref();
    let timestamps = encryption.map(|it| it.timestamps.clone());
    let Err(error) = new.let_go(timestamps.unwrap_or_default()) else {
        if let Some(server) = control.take() {
            server.close(false);
        }
        new.leave();
        if let Some(capture) = tunnel.capture.take() {
            capture.end("another process has taken the tunnel over: capture there");
        }
        return Ok(true);
    };
    tracing::error!(%error, "not handed over, carrying on: {error}");
    tunnel.workers.start()?;
    tunnel.go_on()?;
    // It hears only now that the tunnel is kept: if this process had died before, it
    // would carry on.
    drop(new);
    // The next poll has the routes kept again.
    Ok(false)
}
