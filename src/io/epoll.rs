//! The epoll engine: for hosts whose kernel has no io_uring, or an old one, or
//! one that forbids it (`kernel.io_uring_disabled`, containers' seccomp
//! profiles).
//!
//! It has the same offloads, and so the same few system calls per megabyte:
//! `read(2)` of the TUN queue, `recvmsg(2)` with `UDP_GRO`, `sendmsg(2)` with
//! `UDP_SEGMENT`, `write(2)` to the TUN queue, one for each vnet packet or batch.
//!
//! Nothing is read ahead but one event, and output goes out the moment it is
//! given. So few buffers are touched, and what the processor touches next is what
//! it touched last.
//!
//! The kernel reports edges (`EPOLLET`), and each side is read until it is
//! empty. Under load `epoll_wait(2)` is thus called only now and then, to learn
//! of the other side; both sides have their turns while both have something.
//!
//! Needs Linux 4.18 (`UDP_SEGMENT`) to be fast, and goes on without.

use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::sync::Arc;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::{self, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::eventfd::EventFd;

use crate::counters::Counters;
use crate::error::{Error, Result};
use crate::io::engine::{Destination, Engine, Event, Received};
use crate::io::message::{self, PAYLOAD_START, SendMessage};
use crate::io::sides::{FAILURE_PAUSE, Sides};
use crate::io::tun::Queue;
use crate::io::udp::WorkerSockets;
use crate::packet::batch::{Batch, Limits};
use crate::packet::vnet_packet::{VnetPacket, VnetSink};

/// What may be taken in before the kernel is asked again for news of the other
/// side and of the control thread: some hundred microseconds' work.
const UNASKED_BYTES_MAX: usize = 256 << 10;

/// What an event counts for at least, against [`UNASKED_BYTES_MAX`].
const EVENT_BYTES_MIN: usize = 4 << 10;

/// What the kernel calls the descriptors.
const TUN: u64 = 0;
const UDP: u64 = 1;
const WAKE: u64 = 2;
const WATCHED: usize = 3;

/// An engine on epoll; see the module's documentation.
pub struct Epoll {
    epoll: epoll::Epoll,
    sides: Sides,
    /// There may be datagrams: the kernel has said so, and the socket has not
    /// been found empty since.
    udp_ready: bool,
    /// Taken in since the kernel was last asked for news.
    unasked_bytes: usize,
    message: SendMessage,
}

impl Epoll {
    /// Sets the engine up.
    ///
    /// # Errors
    /// When there is no descriptor left.
    pub fn new(
        queue: Arc<Queue>,
        sockets: Arc<WorkerSockets>,
        wake: Arc<EventFd>,
        limits: Limits,
        counters: Arc<Counters>,
    ) -> Result<Self> {
        let epoll = watch(&queue, &sockets, &wake).map_err(|errno| {
            Error::os("cannot set up epoll", errno.into())
                .hint("raise the limit on open files (ulimit -n), or ask for fewer --queues")
        })?;
        Ok(Self {
            epoll,
            sides: Sides::new(queue, sockets, wake, limits, counters),
            // It is tried before it is waited for.
            udp_ready: true,
            unasked_bytes: 0,
            message: SendMessage::new(),
        })
    }

    /// Asks the kernel what is ready, and waits for it as long as `timeout`, in
    /// milliseconds.
    fn ask(&mut self, timeout: PollTimeout) -> Result<()> {
        self.unasked_bytes = 0;
        self.ask_epoll(timeout).map_err(|errno| {
            Error::os("epoll has failed", errno.into()).hint("start fastvpn again")
        })
    }

    fn ask_epoll(&mut self, mut timeout: PollTimeout) -> nix::Result<()> {
        if let Some(port) = self.sides.blocked {
            // Not among what epoll watches: the kernel would wake the worker for
            // each datagram that has left.
            let socket = self.sides.sockets.sender(port);
            let mut both = [
                PollFd::new(self.epoll.0.as_fd(), PollFlags::POLLIN),
                PollFd::new(socket.as_fd(), PollFlags::POLLOUT),
            ];
            match poll(&mut both, timeout) {
                Err(Errno::EINTR) => return Ok(()),
                result => result?,
            };
            // Whatever is amiss with it, sending will tell.
            if both[1].any() == Some(true) {
                self.sides.blocked = None;
            }
            timeout = PollTimeout::ZERO;
        }
        let mut events = [EpollEvent::empty(); WATCHED];
        let count = match self.epoll.wait(&mut events, timeout) {
            Err(Errno::EINTR) => 0,
            result => result?,
        };
        // Whatever is amiss with one of them, reading it will tell.
        for event in &events[..count] {
            match event.data() {
                TUN => self.sides.tun_ready = true,
                UDP => self.udp_ready = true,
                _ => self.sides.woken(),
            }
        }
        Ok(())
    }
}

/// Has the kernel report what arrives from now on.
fn watch(queue: &Queue, sockets: &WorkerSockets, wake: &EventFd) -> nix::Result<epoll::Epoll> {
    let arrivals = |name| EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, name);
    let epoll = epoll::Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    epoll.add(queue, arrivals(TUN))?;
    epoll.add(&sockets.receive, arrivals(UDP))?;
    epoll.add(wake, arrivals(WAKE))?;
    Ok(epoll)
}

/// Receives a batch, if there is one.
#[inline]
fn receive(sides: &mut Sides, udp_ready: &mut bool) -> Option<Event> {
    if !*udp_ready || sides.is_quiet {
        return None;
    }
    let mut buffer = sides.take_buffer()?;
    match message::receive(sides.sockets.receive.as_fd(), &mut buffer) {
        Ok(Some(message)) => {
            return Some(Event::Datagrams {
                received: sides.filled(buffer, PAYLOAD_START, message.end),
                sender: message.sender,
                segment_bytes: message.segment_bytes.unwrap_or(message.end - PAYLOAD_START),
            });
        }
        Ok(None) => sides.counters.drop_truncated.add(1),
        Err(Errno::EAGAIN) => *udp_ready = false,
        Err(errno) => sides.receive_failed(errno as i32),
    }
    sides.recycle(buffer);
    None
}

impl Engine for Epoll {
    #[inline]
    fn next_event(&mut self) -> Option<Event> {
        if self.unasked_bytes >= UNASKED_BYTES_MAX
            && let Err(error) = self.ask(PollTimeout::ZERO)
        {
            self.sides.fail(error);
        }
        let event = self
            .sides
            .next_event(|sides| receive(sides, &mut self.udp_ready));
        if let Some(Event::VnetPacket(received) | Event::Datagrams { received, .. }) = &event {
            self.unasked_bytes += received.bytes().len().max(EVENT_BYTES_MIN);
        }
        event
    }

    #[inline]
    fn has_event(&mut self) -> bool {
        self.sides
            .has_event(|sides| receive(sides, &mut self.udp_ready))
    }

    #[inline]
    fn recycle(&mut self, received: Received) {
        self.sides.recycle(received.buffer);
    }

    #[inline]
    fn take_batch(&mut self) -> Option<Batch> {
        self.sides.take_batch()
    }

    #[inline]
    fn limits(&self, destination: SocketAddr) -> Limits {
        self.sides.limits(destination)
    }

    /// Sends at once.
    #[inline]
    fn send(&mut self, batch: Batch, to: Destination) {
        let mut errno = None;
        if batch.count() > 0 {
            let socket = self.sides.sockets.sender(to.from).as_fd();
            let sent = message::send(socket, &mut self.message, &batch, to.endpoint);
            errno = sent.err().map(|errno| errno as i32);
        }
        self.sides.sent(batch, to, errno);
    }

    /// Everything has gone out already.
    #[inline]
    fn submit(&mut self) -> Result<()> {
        self.sides.take_error()
    }

    fn poll(&mut self) -> Result<bool> {
        if self.has_event() {
            return Ok(true);
        }
        self.ask(PollTimeout::ZERO)?;
        Ok(self.has_event())
    }

    fn wait(&mut self) -> Result<()> {
        if self.has_event() {
            return Ok(());
        }
        if self.sides.is_failing() {
            // Not as fast as the processor can fail.
            let pause = PollTimeout::try_from(FAILURE_PAUSE).unwrap_or(PollTimeout::ZERO);
            return self.ask(pause);
        }
        if self.udp_ready || self.sides.may_read_vnet_packet() {
            // A read has failed, and the next one may do better. But other news must
            // not wait for that.
            return self.ask(PollTimeout::ZERO);
        }
        self.ask(PollTimeout::NONE)
    }

    fn quiesce(&mut self) {
        self.sides.is_quiet = true;
    }

    fn reset_limits(&mut self) {
        self.sides.reset_limits();
    }
}

impl VnetSink for Epoll {
    #[inline]
    fn take_vnet_packet(&mut self) -> Option<VnetPacket> {
        self.sides.take_vnet_packet()
    }

    /// Writes at once.
    #[inline]
    fn write(&mut self, vnet_packet: VnetPacket) {
        self.sides.write_now(vnet_packet);
    }
}
