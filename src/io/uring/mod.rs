//! The io_uring engine. All `unsafe` of the data path lives here and in
//! [`crate::io`].
//!
//! One ring per worker. A multishot receive on the UDP socket stays armed and
//! brings trains into provided buffers; the TUN queue is read by system calls
//! while it has frames (`source.rs` says why) and polled when it has none.
//! Sends and writes are one request each, submitted in batches; they complete
//! while they are submitted, since neither may wait. Buffers are owned: a
//! train or frame that the kernel works on is in the engine's tables and comes
//! back to the free list with its completion.
//!
//! Needs Linux 6.1 (`IORING_SETUP_DEFER_TASKRUN`).

mod buffers;
mod output;
mod source;
mod token;

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;

use io_uring::types::{self, CancelBuilder, Fd};
use io_uring::{IoUring, cqueue, opcode, squeue};
use nix::sys::eventfd::EventFd;

use self::output::Output;
use self::source::Sources;
use self::token::Token;
use crate::counters::Counters;
use crate::error::{Error, Result};
use crate::io::FAILURE_PAUSE;
use crate::io::engine::{Destination, Engine, Event, Received, Source};
use crate::io::tun::Queue;
use crate::io::udp::WorkerSockets;
use crate::packet::coalesce::{Frame, FrameSink};
use crate::packet::train::{Limits, Train};

/// Entries of the submission queue: more than all requests that can be under
/// way, so that it never fills before a batch ends.
const SUBMISSION_ENTRIES: u32 = 256;

/// Completions taken from the ring at a time.
const COMPLETIONS_MAX: usize = 256;

/// Output bytes given to the kernel at once at the latest: what is staged
/// should still be in the second-level cache when the kernel copies it.
const STAGED_BYTES_MAX: usize = 512 << 10;

/// An engine on io_uring; see the module's documentation.
pub struct Uring {
    ring: IoUring,
    queue: Queue,
    sockets: WorkerSockets,
    wake: Arc<EventFd>,
    wake_armed: bool,
    wake_pending: bool,
    /// Nothing new is asked for any more.
    is_quiet: bool,
    sources: Sources,
    output: Output,
    completions: Vec<cqueue::Entry>,
    counters: Arc<Counters>,
}

impl Uring {
    /// Sets the ring up. To be called on the thread that will use it
    /// (`IORING_SETUP_SINGLE_ISSUER`).
    ///
    /// # Errors
    /// When io_uring is missing, too old or forbidden.
    pub fn new(
        queue: Queue,
        sockets: WorkerSockets,
        wake: Arc<EventFd>,
        limits: Limits,
        counters: Arc<Counters>,
    ) -> Result<Self> {
        let ring = build_ring()?;
        let sources = Sources::new(&ring.submitter()).map_err(buffers_error)?;
        Ok(Self {
            ring,
            queue,
            sockets,
            wake,
            wake_armed: false,
            wake_pending: false,
            is_quiet: false,
            sources,
            output: Output::new(limits),
            completions: Vec::with_capacity(COMPLETIONS_MAX),
            counters,
        })
    }

    /// Queues a request. The queue is larger than all that can be under way,
    /// but should it be full, what it holds is submitted first.
    fn push(&mut self, entry: &squeue::Entry) -> Result<()> {
        loop {
            // SAFETY: every entry built in this module refers to descriptors
            // and memory that the engine owns, and that stay in place until
            // the request's completion has been seen or all requests have been
            // cancelled (`Drop`).
            if unsafe { self.ring.submission().push(entry) }.is_ok() {
                return Ok(());
            }
            self.submit_and_reap(0)?;
        }
    }

    /// Submits what is queued and waits for `completions`.
    fn submit(&mut self, completions: usize) -> Result<()> {
        match self.ring.submit_and_wait(completions) {
            Ok(_) => Ok(()),
            // A signal, completions that have to be taken first, or no memory
            // for a request just now: all pass.
            Err(error)
                if matches!(
                    error.raw_os_error(),
                    Some(libc::EINTR | libc::EBUSY | libc::EAGAIN)
                ) =>
            {
                Ok(())
            }
            Err(error) => Err(Error::os("io_uring_enter failed", error)
                .hint("io_uring has stopped working here; start fastvpn again")),
        }
    }

    /// Starts all output and takes in whatever has completed.
    fn submit_and_reap(&mut self, completions: usize) -> Result<()> {
        self.output.staged_bytes = 0;
        self.submit(completions)?;
        self.reap()
    }

    fn reap(&mut self) -> Result<()> {
        loop {
            let mut completions = std::mem::take(&mut self.completions);
            completions.extend(self.ring.completion().take(COMPLETIONS_MAX));
            // All of them, whatever one says: each gives a buffer back.
            let mut result = Ok(());
            for completion in &completions {
                result = result.and(self.complete(completion));
            }
            let last = completions.len() < COMPLETIONS_MAX;
            completions.clear();
            self.completions = completions;
            result?;
            if last {
                return Ok(());
            }
        }
    }

    fn complete(&mut self, completion: &cqueue::Entry) -> Result<()> {
        match Token::from_user_data(completion.user_data()) {
            Some(Token::Send(id)) => {
                self.output
                    .sent(id, completion.result(), &self.sockets, &self.counters);
                Ok(())
            }
            Some(Token::Write(id)) => {
                self.output.written(id, completion.result(), &self.counters);
                Ok(())
            }
            Some(Token::TunPoll) => {
                self.sources.tun_polled();
                Ok(())
            }
            Some(Token::UdpReceive) => self.sources.udp_completed(completion, &self.counters),
            Some(Token::Wake) => {
                self.wake_armed = false;
                // Only empties the counter: the command queue says what is up.
                let _ = self.wake.read();
                self.wake_pending = true;
                Ok(())
            }
            Some(Token::SendRoom) => {
                self.output.blocked = None;
                self.output.room_poll_armed = false;
                Ok(())
            }
            None => Ok(()),
        }
    }

    /// Starts the requests that are not under way but should be.
    fn arm(&mut self) -> Result<()> {
        if self.is_quiet {
            return Ok(());
        }
        if !self.wake_armed {
            let poll = opcode::PollAdd::new(Fd(self.wake.as_fd().as_raw_fd()), libc::POLLIN as u32);
            self.push(&poll.build().user_data(Token::Wake.to_user_data()))?;
            self.wake_armed = true;
        }
        if let Some(entry) = self.sources.arm_tun(self.queue.as_fd()) {
            self.push(&entry)?;
        }
        if let Some(entry) = self.sources.arm_udp(self.sockets.receive.as_fd()) {
            self.push(&entry)?;
        }
        if let Some(port) = self.output.blocked
            && !self.output.room_poll_armed
        {
            let socket = self.sockets.sender(port);
            let poll = opcode::PollAdd::new(Fd(socket.as_raw_fd()), libc::POLLOUT as u32);
            self.push(&poll.build().user_data(Token::SendRoom.to_user_data()))?;
            self.output.room_poll_armed = true;
        }
        Ok(())
    }

    /// Reads ahead what is read by system calls: one frame, one train.
    #[inline]
    fn refill(&mut self) -> Result<()> {
        if self.is_quiet {
            return Ok(());
        }
        self.sources
            .refill(self.takes_frames(), self.queue.as_fd(), &self.counters)
    }

    /// Starts what is queued, cancels what waits, and takes in the completions
    /// of both.
    fn cancel_all(&mut self) {
        let _ = self.ring.submit();
        let submitter = self.ring.submitter();
        match submitter.register_sync_cancel(None, CancelBuilder::any()) {
            Err(error) if error.raw_os_error() != Some(libc::ENOENT) => {
                tracing::debug!("cannot cancel io_uring requests: {error}");
            }
            _ => {}
        }
        for _ in 0..DRAIN_TRIES_MAX {
            // Cancelled requests complete in task work, which only runs here.
            let _ = self.reap();
            if self.is_idle() {
                break;
            }
            let timespec = types::Timespec::new().nsec(DRAIN_WAIT_NS);
            let args = types::SubmitArgs::new().timespec(&timespec);
            let _ = self.ring.submitter().submit_with_args(1, &args);
        }
    }

    /// Whether no request is under way.
    fn is_idle(&self) -> bool {
        !self.wake_armed
            && !self.output.room_poll_armed
            && !self.sources.is_armed()
            && self.output.in_flight() == 0
    }

    /// Frames only make more output: none while there is no room for it. The
    /// last one at the end has no later turn.
    #[inline]
    fn takes_frames(&self) -> bool {
        self.is_quiet || self.output.blocked.is_none()
    }

    fn has_event(&self) -> bool {
        self.wake_pending
            || self.output.paths.has_failure()
            || self.sources.has_event(self.takes_frames())
    }

    /// Queues an output request; starts all output when much is staged.
    fn push_output(&mut self, entry: &squeue::Entry, bytes: usize) {
        self.output.staged_bytes += bytes;
        let result = self.push(entry).and_then(|()| {
            if self.output.staged_bytes >= STAGED_BYTES_MAX {
                self.submit_and_reap(0)
            } else {
                Ok(())
            }
        });
        self.output.keep_error(result);
    }
}

impl Engine for Uring {
    #[inline]
    fn poll(&mut self) -> Result<bool> {
        self.output.take_error()?;
        // What an earlier call has left in the queue must not wait for output
        // to come, or the kernel would never hear of it.
        let has_left_over = !self.ring.submission().is_empty();
        self.arm()?;
        if has_left_over || self.output.in_flight() > 0 || self.ring.submission().taskrun() {
            self.submit_and_reap(0)?;
        }
        self.refill()?;
        Ok(self.has_event())
    }

    fn wait(&mut self) -> Result<()> {
        // First without waiting: sends and writes complete in passing, and
        // their completions must not count as news.
        if self.poll()? {
            return Ok(());
        }
        if self.sources.is_failing() {
            // Not as fast as the processor can fail.
            std::thread::sleep(FAILURE_PAUSE);
            self.arm()?;
            return self.submit_and_reap(0);
        }
        if self.sources.may_refill(self.takes_frames()) {
            return Ok(());
        }
        self.arm()?;
        self.submit_and_reap(1)
    }

    #[inline]
    fn next_event(&mut self) -> Option<Event> {
        if std::mem::take(&mut self.wake_pending) {
            return Some(Event::Wake);
        }
        if let Some(failure) = self.output.paths.next_failure() {
            return Some(Event::SendFailed(failure));
        }
        let result = self.refill();
        self.output.keep_error(result);
        self.sources.next_event(self.takes_frames())
    }

    #[inline]
    fn recycle(&mut self, received: Received, source: Source) {
        self.sources.recycle(received, source);
    }

    #[inline]
    fn take_train(&mut self) -> Option<Train> {
        if self.output.free_trains.is_empty() {
            let result = self.submit_and_reap(0);
            self.output.keep_error(result);
        }
        self.output.free_trains.pop()
    }

    #[inline]
    fn send(&mut self, train: Train, destination: Destination) {
        if train.count() == 0 {
            self.output.free_trains.push(train);
            return;
        }
        let fd = Fd(self.sockets.sender(destination.from).as_raw_fd());
        let bytes = train.bytes().len();
        let entry = self.output.prepare_send(train, destination, fd);
        self.push_output(&entry, bytes);
    }

    #[inline]
    fn limits(&self, destination: SocketAddr) -> Limits {
        self.output.limits(destination)
    }

    fn quiesce(&mut self) {
        self.is_quiet = true;
        self.cancel_all();
    }

    fn reset_limits(&mut self) {
        self.output.reset_limits();
    }
}

impl FrameSink for Uring {
    #[inline]
    fn take(&mut self) -> Option<Frame> {
        if self.output.free_frames.is_empty() {
            let result = self.submit_and_reap(0);
            self.output.keep_error(result);
            if self.output.free_frames.is_empty() {
                self.counters.drop_no_buffer.add(1);
            }
        }
        self.output.free_frames.pop()
    }

    #[inline]
    fn put(&mut self, frame: Frame) {
        let bytes = frame.bytes().len();
        let entry = self
            .output
            .prepare_write(frame, Fd(self.queue.as_fd().as_raw_fd()));
        self.push_output(&entry, bytes);
    }
}

impl Drop for Uring {
    /// Ends all requests before any memory they use goes away, and waits until
    /// they have let go of the TUN queue and the socket: left to the kernel's
    /// own cleaning up, that would come some time after the process has ended,
    /// and a successor would find name and port still in use.
    fn drop(&mut self) {
        self.cancel_all();
        self.sources.unregister(&self.ring.submitter());
    }
}

/// How often, and how long each time, to wait for cancelled requests.
const DRAIN_TRIES_MAX: usize = 100;
const DRAIN_WAIT_NS: u32 = 1_000_000;

/// Whether this process may use io_uring, and as much of it as a worker does.
///
/// # Errors
/// As [`Uring::new`].
pub fn probe() -> Result<()> {
    let ring = build_ring()?;
    let sources = Sources::new(&ring.submitter()).map_err(buffers_error)?;
    sources.unregister(&ring.submitter());
    Ok(())
}

fn build_ring() -> Result<IoUring> {
    IoUring::builder()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_taskrun_flag()
        .setup_submit_all()
        .build(SUBMISSION_ENTRIES)
        .map_err(setup_error)
}

fn buffers_error(error: io::Error) -> Error {
    Error::os("cannot register io_uring buffers", error)
        .hint("raise the limit on locked memory (ulimit -l), or ask for fewer --queues")
}

fn setup_error(error: io::Error) -> Error {
    let hint = match error.raw_os_error() {
        Some(libc::EPERM) => {
            "io_uring is forbidden here: see the sysctl kernel.io_uring_disabled, \
             or the container's seccomp profile"
        }
        Some(libc::ENOSYS) => {
            "this kernel has no io_uring, or a seccomp profile hides it; \
             it takes Linux 6.1 or later"
        }
        Some(libc::EINVAL) => "it takes io_uring of Linux 6.1 or later",
        Some(libc::EMFILE) => "raise the limit on open files (ulimit -n)",
        Some(libc::ENOMEM) => "raise the limit on locked memory (ulimit -l)",
        _ => "it takes io_uring of Linux 6.1 or later",
    };
    Error::os("cannot set up io_uring", error).hint(hint)
}
