//! The epoll engine: for hosts whose kernel has no io_uring, or an old one, or
//! one that forbids it (`kernel.io_uring_disabled`, containers' seccomp
//! profiles).
//!
//! It has the same offloads, and so the same few system calls per megabyte:
//! `read(2)` of the TUN queue, `recvmsg(2)` with `UDP_GRO`, `sendmsg(2)` with
//! `UDP_SEGMENT`, `write(2)` to the TUN queue, one for each frame or train.
//!
//! Nothing is read ahead: a frame or train is read when the worker asks for the
//! next one, and output goes out the moment it is given. So a few buffers do,
//! and what the processor touches next is what it touched last.
//!
//! The kernel reports edges (`EPOLLET`), and each side is read until it is
//! empty. Under load `epoll_wait(2)` is thus called only now and then, to learn
//! of the other side; both sides have their turns while both have something.
//!
//! Needs Linux 4.18 (`UDP_SEGMENT`) to be fast, and goes on without.

mod interest;
mod output;

use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::sync::Arc;

use nix::sys::epoll::EpollTimeout;
use nix::sys::eventfd::EventFd;

use self::interest::Interest;
use self::output::Output;
use crate::counters::Counters;
use crate::error::{Error, Result};
use crate::io::engine::{Destination, Engine, Event, Received, Source};
use crate::io::message::{self, PAYLOAD_START};
use crate::io::tun::Queue;
use crate::io::udp::WorkerSockets;
use crate::io::{FAILURE_PAUSE, FAILURES_MAX, queue_error, socket_error};
use crate::packet::coalesce::{Frame, FrameSink};
use crate::packet::train::{Limits, Train};
use crate::packet::virtio;

/// Receive buffers on each side: one that waits for the worker, one that the
/// worker has.
const BUFFERS: usize = 2;

/// Bytes of a receive buffer: the longest frame or datagram with its headers.
/// The odd cache line keeps the starts of neighbouring buffers from falling
/// into the same cache sets.
const BUFFER_BYTES: usize = (64 << 10) + 192;
const _: () = assert!(BUFFER_BYTES >= virtio::HEADER_BYTES + 65536);
const _: () = assert!(BUFFER_BYTES >= PAYLOAD_START + 65535);

/// What may be taken in before the kernel is asked again for news of the other
/// side and of the control thread: some hundred microseconds' work.
const UNASKED_BYTES_MAX: usize = 256 << 10;

/// What an event counts for at least, against [`UNASKED_BYTES_MAX`].
const EVENT_BYTES_MIN: usize = 4 << 10;

/// One side that data comes from.
struct Side {
    /// Last in, first out: the buffer used last is warmest.
    free: Vec<Box<[u8]>>,
    /// There may be something to read: the kernel has said so, and it has not
    /// been found empty since.
    ready: bool,
}

impl Side {
    fn new() -> Self {
        Self {
            free: (0..BUFFERS)
                .map(|_| vec![0; BUFFER_BYTES].into_boxed_slice())
                .collect(),
            // It is tried before it is waited for.
            ready: true,
        }
    }

    fn can_read(&self) -> bool {
        self.ready && !self.free.is_empty()
    }

    /// Nothing is read any more.
    fn close(&mut self) {
        self.free.clear();
    }
}

/// An engine on epoll; see the module's documentation.
pub struct Epoll {
    interest: Interest,
    queue: Queue,
    sockets: WorkerSockets,
    wake: Arc<EventFd>,
    wake_pending: bool,
    tun: Side,
    udp: Side,
    /// Whose turn it is when both sides have something.
    tun_is_next: bool,
    /// What [`Engine::poll`] has found.
    next: Option<Event>,
    /// Nothing is read any more.
    is_quiet: bool,
    /// Taken in since the kernel was last asked for news.
    unasked_bytes: usize,
    output: Output,
    /// Reads in a row that failed for no reason known.
    failures: u32,
    /// The first error met where none could be returned.
    error: Option<Error>,
    counters: Arc<Counters>,
}

impl Epoll {
    /// Sets the engine up.
    ///
    /// # Errors
    /// When there is no descriptor left.
    pub fn new(
        queue: Queue,
        sockets: WorkerSockets,
        wake: Arc<EventFd>,
        limits: Limits,
        counters: Arc<Counters>,
    ) -> Result<Self> {
        let interest = Interest::new(&queue, &sockets, &wake).map_err(|errno| {
            Error::os("cannot set up epoll", errno.into())
                .hint("raise the limit on open files (ulimit -n), or ask for fewer --queues")
        })?;
        Ok(Self {
            interest,
            queue,
            sockets,
            wake,
            wake_pending: false,
            tun: Side::new(),
            udp: Side::new(),
            tun_is_next: true,
            next: None,
            is_quiet: false,
            unasked_bytes: 0,
            output: Output::new(limits),
            failures: 0,
            error: None,
            counters,
        })
    }

    /// Asks the kernel what is ready, and waits for it as long as `timeout`.
    fn ask(&mut self, timeout: EpollTimeout) -> Result<()> {
        self.unasked_bytes = 0;
        let failed = |errno: nix::Error| {
            Error::os("epoll has failed", errno.into()).hint("start fastvpn again")
        };
        self.interest
            .watch_room(&self.sockets, self.output.blocked)
            .map_err(failed)?;
        let ready = self.interest.wait(timeout).map_err(failed)?;
        self.tun.ready |= ready.tun;
        self.udp.ready |= ready.udp;
        if ready.wake {
            // Only empties the counter: the command queue says what is up.
            let _ = self.wake.read();
            self.wake_pending = true;
        }
        if ready.room {
            self.output.blocked = None;
        }
        Ok(())
    }

    fn has_event(&self) -> bool {
        self.wake_pending || self.next.is_some() || self.output.limits.has_failure()
    }

    /// Frames only make more output: none while there is no room for it.
    fn can_read_tun(&self) -> bool {
        self.tun.can_read() && self.output.blocked.is_none()
    }

    /// Reads from the side whose turn it is, or else from the other.
    #[inline]
    fn read(&mut self) -> Option<Event> {
        for _ in 0..2 {
            let is_tuns_turn = self.tun_is_next;
            self.tun_is_next = !is_tuns_turn;
            let event = if is_tuns_turn {
                self.read_tun()
            } else {
                self.receive_udp()
            };
            if event.is_some() {
                return event;
            }
        }
        None
    }

    #[inline]
    fn read_tun(&mut self) -> Option<Event> {
        if !self.can_read_tun() {
            return None;
        }
        let mut buffer = self.tun.free.pop()?;
        match nix::unistd::read(&self.queue, &mut buffer) {
            Ok(end) => {
                self.unasked_bytes += end.max(EVENT_BYTES_MIN);
                self.failures = 0;
                Some(Event::Frame(received(buffer, 0, end)))
            }
            Err(errno) => {
                self.tun.free.push(buffer);
                match errno as i32 {
                    libc::EAGAIN => self.tun.ready = false,
                    // A frame that the driver could not describe; it is gone.
                    libc::EINVAL => self.counters.drop_frame_malformed.add(1),
                    libc::EINTR | libc::ENOMEM => self.failed_oddly(),
                    errno => self.fail(queue_error(errno)),
                }
                None
            }
        }
    }

    #[inline]
    fn receive_udp(&mut self) -> Option<Event> {
        if !self.udp.can_read() {
            return None;
        }
        let mut buffer = self.udp.free.pop()?;
        match message::receive(self.sockets.receive.as_fd(), &mut buffer) {
            Ok(Some(message)) => {
                let payload_bytes = message.end - PAYLOAD_START;
                self.unasked_bytes += payload_bytes.max(EVENT_BYTES_MIN);
                self.failures = 0;
                return Some(Event::Datagrams {
                    received: received(buffer, PAYLOAD_START, message.end),
                    sender: message.sender,
                    segment_bytes: message.segment_bytes.unwrap_or(payload_bytes),
                });
            }
            Ok(None) => self.counters.drop_truncated.add(1),
            Err(error) => match error.raw_os_error().unwrap_or(0) {
                libc::EAGAIN => self.udp.ready = false,
                errno @ (libc::EBADF | libc::ENOTSOCK | libc::EFAULT | libc::EINVAL) => {
                    self.fail(socket_error(errno));
                }
                // What the network says of earlier sends (ECONNREFUSED,
                // EHOSTUNREACH ...) is no reason to stop.
                _ => self.failed_oddly(),
            },
        }
        self.udp.free.push(buffer);
        None
    }

    /// A read failed, and the next one may do better. It counts as one for the
    /// purpose of asking the kernel for other news.
    #[cold]
    fn failed_oddly(&mut self) {
        self.counters.receive_failed.add(1);
        self.failures = self.failures.saturating_add(1);
        self.unasked_bytes += EVENT_BYTES_MIN;
    }

    #[cold]
    fn fail(&mut self, error: Error) {
        self.error.get_or_insert(error);
    }

    fn take_error(&mut self) -> Result<()> {
        self.error.take().map_or(Ok(()), Err)
    }
}

fn received(buffer: Box<[u8]>, start: usize, end: usize) -> Received {
    Received {
        buffer,
        start,
        end,
        id: 0,
    }
}

impl Engine for Epoll {
    #[inline]
    fn poll(&mut self) -> Result<bool> {
        if self.next.is_none() && !self.wake_pending {
            self.next = self.read();
        }
        self.take_error()?;
        Ok(self.has_event())
    }

    fn look(&mut self) -> Result<bool> {
        if self.poll()? {
            return Ok(true);
        }
        self.ask(EpollTimeout::ZERO)?;
        self.poll()
    }

    fn wait(&mut self) -> Result<()> {
        self.take_error()?;
        if self.failures >= FAILURES_MAX {
            // Not as fast as the processor can fail.
            let pause = EpollTimeout::try_from(FAILURE_PAUSE).unwrap_or(EpollTimeout::ZERO);
            return self.ask(pause);
        }
        let may_go_on = self.has_event() || self.udp.can_read() || self.can_read_tun();
        if may_go_on {
            return Ok(());
        }
        self.ask(EpollTimeout::NONE)
    }

    #[inline]
    fn next_event(&mut self) -> Option<Event> {
        if self.unasked_bytes >= UNASKED_BYTES_MAX
            && let Err(error) = self.ask(EpollTimeout::ZERO)
        {
            self.fail(error);
        }
        if std::mem::take(&mut self.wake_pending) {
            return Some(Event::Wake);
        }
        if let Some(failure) = self.output.limits.next_failure() {
            return Some(Event::SendFailed(failure));
        }
        self.next.take().or_else(|| self.read())
    }

    #[inline]
    fn recycle(&mut self, received: Received, source: Source) {
        let side = match source {
            Source::Tun => &mut self.tun,
            Source::Udp => &mut self.udp,
        };
        if !self.is_quiet {
            side.free.push(received.buffer);
        }
    }

    #[inline]
    fn take_train(&mut self) -> Option<Train> {
        self.output.free_trains.pop()
    }

    #[inline]
    fn send(&mut self, train: Train, destination: Destination) {
        self.output
            .send(train, destination, &self.sockets, &self.counters);
    }

    #[inline]
    fn limits(&self, destination: SocketAddr) -> Limits {
        self.output.limits.get(destination)
    }

    fn quiesce(&mut self) {
        self.tun.close();
        self.udp.close();
        self.is_quiet = true;
    }

    fn reset_limits(&mut self) {
        self.output.limits.reset();
    }
}

impl FrameSink for Epoll {
    #[inline]
    fn take(&mut self) -> Option<Frame> {
        let frame = self.output.free_frames.pop();
        if frame.is_none() {
            self.counters.drop_no_buffer.add(1);
        }
        frame
    }

    #[inline]
    fn put(&mut self, frame: Frame) {
        self.output.write(frame, &self.queue, &self.counters);
    }
}

#[cfg(test)]
mod tests;
