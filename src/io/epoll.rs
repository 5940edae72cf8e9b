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
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::{self, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::eventfd::EventFd;

use crate::counters::Counters;
use crate::error::{Error, Result};
use crate::io::engine::{Destination, Engine, Event, Received};
use crate::io::message::{self, SendMessage};
use crate::io::receivers::RECEIVERS;
use crate::io::sides::{FAILURE_PAUSE, Sides};
use crate::io::tun::Queue;
use crate::io::udp::{Port, WorkerSockets};
use crate::packet::batch::{Batch, Limits};
use crate::packet::vnet_packet::{VnetPacket, VnetSink};

/// What may be taken in before the kernel is asked again for events of the other
/// side and of the control thread: some hundred microseconds' work.
const UNASKED_BYTES_MAX: usize = 256 << 10;

/// What an event counts for at least, against [`UNASKED_BYTES_MAX`].
const EVENT_BYTES_MIN: usize = 4 << 10;

/// What the kernel calls the descriptors.
const TUN: u64 = 0;
const WAKE: u64 = 1;
/// The first receiver; the others follow.
const UDP: u64 = 2;
const WATCHED: usize = 2 + RECEIVERS;

/// An engine on epoll; see the module's documentation.
pub struct Epoll {
    epoll: epoll::Epoll,
    sides: Sides,
    /// Taken in since the kernel was last asked for events.
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
        others: Vec<Arc<WorkerSockets>>,
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
            sides: Sides::new(queue, sockets, others, wake, limits, counters),
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
        if let Some(rest) = self.sides.room_wait() {
            // In whole milliseconds, and not before it is over.
            let rest = PollTimeout::try_from(rest + Duration::from_millis(1));
            let rest = rest.unwrap_or(PollTimeout::ZERO);
            return self.ask_for_room(if timeout.is_none() { rest } else { timeout });
        }
        if self.sides.has_found_room() {
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
                WAKE => self.sides.woken(),
                receiver => self.sides.receivers.set_ready((receiver - UDP) as usize),
            }
        }
        Ok(())
    }

    /// As [`Self::ask_epoll`] while sockets are full. Not through epoll: it would wake
    /// the worker for each datagram that has left, and for each vnet packet that has
    /// come and is not to be read yet.
    fn ask_for_room(&mut self, timeout: PollTimeout) -> nix::Result<()> {
        let sides = &self.sides;
        let sender = |port: Port| {
            let events = match sides.is_full(port) {
                true => PollFlags::POLLOUT,
                false => PollFlags::empty(),
            };
            PollFd::new(sides.sockets.sender(port).as_fd(), events)
        };
        let wake = sides.wake.as_fd();
        let receiver = |receiver| match sides.receivers.socket(receiver) {
            Some(socket) => PollFd::new(socket, PollFlags::POLLIN),
            None => PollFd::new(wake, PollFlags::empty()),
        };
        let mut polled: [_; 3 + RECEIVERS] = std::array::from_fn(|index| match index {
            0 => PollFd::new(wake, PollFlags::POLLIN),
            1 => sender(Port::Listen),
            2 => sender(Port::Own),
            _ => receiver(index - 3),
        });
        match poll(&mut polled, timeout) {
            Err(Errno::EINTR) => return Ok(()),
            result => result?,
        };
        // Whatever is amiss with one of them, reading or sending will tell.
        let [wake, listen, own, receivers @ ..] = polled.map(|polled| polled.any() == Some(true));
        if wake {
            self.sides.woken();
        }
        for (receiver, is_ready) in receivers.into_iter().enumerate() {
            if is_ready {
                self.sides.receivers.set_ready(receiver);
            }
        }
        for (port, has_room) in [(Port::Listen, listen), (Port::Own, own)] {
            if has_room {
                self.sides.found_room(port);
            }
        }
        Ok(())
    }
}

fn arrivals(name: u64) -> EpollEvent {
    EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, name)
}

/// Has the kernel report what arrives from now on.
fn watch(queue: &Queue, sockets: &WorkerSockets, wake: &EventFd) -> nix::Result<epoll::Epoll> {
    let epoll = epoll::Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    epoll.add(queue, arrivals(TUN))?;
    epoll.add(&sockets.receive, arrivals(UDP))?;
    epoll.add(wake, arrivals(WAKE))?;
    Ok(epoll)
}

impl Engine for Epoll {
    #[inline]
    fn next_event(&mut self) -> Option<Event> {
        if self.unasked_bytes >= UNASKED_BYTES_MAX
            && let Err(error) = self.ask(PollTimeout::ZERO)
        {
            self.sides.fail(error);
        }
        let event = self.sides.next_event();
        if let Some(Event::VnetPacket(received) | Event::Datagrams { received, .. }) = &event {
            self.unasked_bytes += received.bytes().len().max(EVENT_BYTES_MIN);
        }
        event
    }

    #[inline]
    fn has_event(&mut self) -> bool {
        self.sides.has_event()
    }

    #[inline]
    fn recycle(&mut self, received: Received) {
        self.sides.recycle(received);
    }

    #[inline]
    fn take_batch(&mut self) -> Option<Batch> {
        self.sides.take_batch()
    }

    #[inline]
    fn limits(&self, destination: SocketAddr) -> Limits {
        self.sides.limits(destination)
    }

    #[inline]
    fn put_back(&mut self, batch: Batch) {
        self.sides.put_back(batch);
    }

    fn unsent_bytes(&mut self, from: Port) -> usize {
        self.sides.unsent_bytes(from)
    }

    fn others_hold_unsent(&self) -> bool {
        self.sides.others_hold_unsent()
    }

    fn set_send_buffer(&mut self, from: Port, bytes: usize) -> usize {
        self.sides.set_send_buffer(from, bytes)
    }

    fn wait_for_room(&mut self, from: Port) {
        self.sides.wait_for_room(from);
    }

    fn is_waiting_for_room(&self, from: Port) -> bool {
        self.sides.is_full(from)
    }

    #[inline]
    fn port(&self, wanted: Port) -> Port {
        self.sides.sockets.port(wanted)
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
        self.sides.room_wait();
        if self.has_event() {
            return Ok(true);
        }
        self.ask(PollTimeout::ZERO)?;
        Ok(self.has_event() || self.sides.take_found_room())
    }

    fn wait(&mut self) -> Result<()> {
        self.sides.room_wait();
        if self.has_event() || self.sides.take_found_room() {
            return Ok(());
        }
        if self.sides.is_failing() {
            // Not as fast as the processor can fail.
            let pause = PollTimeout::try_from(FAILURE_PAUSE).unwrap_or(PollTimeout::ZERO);
            return self.ask(pause);
        }
        if self.sides.may_receive() || self.sides.may_read_vnet_packet() {
            // A read has failed, and the next one may do better. But other events must
            // not wait for that.
            return self.ask(PollTimeout::ZERO);
        }
        self.ask(PollTimeout::NONE)
    }

    fn note_sender(&mut self, sender: SocketAddr, bytes: usize, is_shared: bool) {
        let receivers = &mut self.sides.receivers;
        let Some(receiver) = receivers.note_sender(sender, bytes, is_shared) else {
            return;
        };
        let added = receivers.socket(receiver).map(|socket| {
            let name = UDP + receiver as u64;
            self.epoll.add(socket, arrivals(name))
        });
        if let Some(Err(errno)) = added {
            tracing::debug!("no socket of its own for {sender}: {errno}");
            receivers.give_up(receiver);
        }
    }

    fn quiesce(&mut self) {
        self.sides.quiesce();
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
