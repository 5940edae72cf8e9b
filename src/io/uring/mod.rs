//! The io_uring engine.
//!
//! One ring per worker. Sends and writes are one request each, submitted together;
//! they complete while they are submitted, since neither may wait. Buffers are owned: a
//! batch or vnet packet that the kernel works on is in the engine's tables and comes
//! back to the free list with its completion.
//!
//! The TUN queue and the socket are read by system calls until they are empty, and then
//! polled through the ring. Multishot requests with buffers provided would spare the
//! calls, but either gives one GSO packet a read, and what a multishot costs for it (a
//! poll, a buffer picked, a completion posted) is more than the call; what is worse, it
//! reads up to a mebibyte ahead, out of the second-level cache, before the worker sees
//! the first of it. docs/performance.md has the figures.
//!
//! Needs Linux 6.1 (`IORING_SETUP_DEFER_TASKRUN`).

mod token;

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;

use io_uring::types::{self, CancelBuilder, Fd};
use io_uring::{IoUring, cqueue, opcode, squeue};
use nix::sys::eventfd::EventFd;

use self::token::Token;
use crate::counters::Counters;
use crate::error::{Error, Result};
use crate::io::engine::{Destination, Engine, Event, Received};
use crate::io::message::SendMessage;
use crate::io::sides::{BATCHES, FAILURE_PAUSE, Sides, VNET_PACKETS};
use crate::io::tun::Queue;
use crate::io::udp::{PORTS, Port, WorkerSockets};
use crate::packet::batch::{Batch, Limits};
use crate::packet::vnet_packet::{VnetPacket, VnetSink};

/// Entries of the submission queue: more than all requests that can be under
/// way, so that it never fills before a turn ends.
const SUBMISSION_ENTRIES: u32 = 256;

/// Completions taken from the ring at a time.
const COMPLETIONS_MAX: usize = 256;

/// Output bytes given to the kernel at once at the latest: what is staged
/// should still be in the second-level cache when the kernel copies it.
const STAGED_BYTES_MAX: usize = 256 << 10;

/// How often, and how long each time, to wait for cancelled requests.
const DRAIN_TRIES_MAX: usize = 100;
const DRAIN_WAIT_NS: u32 = 1_000_000;

/// An engine on io_uring; see the module's documentation.
pub struct Uring {
    ring: IoUring,
    sides: Sides,
    armed: Armed,
    /// By batch id: the batches that the kernel has.
    sends: Vec<Option<(Batch, Destination)>>,
    /// By batch id. Boxed: the kernel reads it where it is.
    messages: Box<[SendMessage]>,
    /// By vnet packet id: the vnet packets that the kernel has.
    writes: Vec<Option<VnetPacket>>,
    /// Whether the kernel takes `RWF_NOWAIT` on a TUN queue, as far as is known:
    /// 6.1 does not, 6.12 does.
    is_nowait: bool,
    /// Sends and writes without a completion yet.
    in_flight: usize,
    /// Bytes of those that are not submitted yet.
    staged_bytes: usize,
    completions: Vec<cqueue::Entry>,
}

/// Requests for events that are under way.
#[derive(Clone, Copy, Default)]
struct Armed {
    wake: bool,
    tun: bool,
    /// One bit for each receiver.
    udp: u8,
    /// By port.
    send_room: [bool; PORTS],
}

// SAFETY: the pointers in the messages point into the engine itself; nothing is shared
// between threads.
unsafe impl Send for Uring {}

impl Uring {
    /// Sets the ring up. To be called on the thread that will use it
    /// (`IORING_SETUP_SINGLE_ISSUER`).
    ///
    /// # Errors
    /// When io_uring is missing, too old or forbidden.
    pub fn new(
        queue: Arc<Queue>,
        sockets: Arc<WorkerSockets>,
        others: Vec<Arc<WorkerSockets>>,
        wake: Arc<EventFd>,
        limits: Limits,
        counters: Arc<Counters>,
    ) -> Result<Self> {
        Ok(Self {
            ring: build()?,
            sides: Sides::new(queue, sockets, others, wake, limits, counters),
            armed: Armed::default(),
            sends: (0..BATCHES).map(|_| None).collect(),
            messages: (0..BATCHES).map(|_| SendMessage::new()).collect(),
            writes: (0..VNET_PACKETS).map(|_| None).collect(),
            is_nowait: true,
            in_flight: 0,
            staged_bytes: 0,
            completions: Vec::with_capacity(COMPLETIONS_MAX),
        })
    }

    /// Queues an output request. All output is started when much of it is
    /// staged, and when there is no buffer left to go on with.
    #[inline]
    fn stage(&mut self, request: &squeue::Entry, bytes: usize) {
        self.in_flight += 1;
        self.staged_bytes += bytes;
        let mut result = self.push(request);
        if self.staged_bytes >= STAGED_BYTES_MAX || self.sides.is_out_of_buffers() {
            result = result.and_then(|()| self.enter(0));
        }
        if let Err(error) = result {
            self.sides.fail(error);
        }
    }

    /// Queues a request. The queue is larger than all that can be under way,
    /// but should it be full, what it holds is submitted first.
    fn push(&mut self, request: &squeue::Entry) -> Result<()> {
        loop {
            // SAFETY: every request built in this module refers to descriptors
            // and memory that the engine owns, and that stay in place until
            // the request's completion has been seen or all requests have been
            // cancelled (`Drop`).
            if unsafe { self.ring.submission().push(request) }.is_ok() {
                return Ok(());
            }
            self.enter(0)?;
        }
    }

    /// Submits what is queued, waits for `completions`, and takes in those that
    /// there are.
    fn enter(&mut self, completions: usize) -> Result<()> {
        self.staged_bytes = 0;
        match self.ring.submit_and_wait(completions) {
            Ok(_) => {}
            Err(error) => match error.raw_os_error() {
                // A signal, completions that have to be taken first, or no memory
                // for a request just now: all pass.
                Some(libc::EINTR | libc::EBUSY | libc::EAGAIN) => {}
                _ => {
                    return Err(Error::os("io_uring_enter failed", error)
                        .hint("io_uring has stopped working here; start fastvpn again"));
                }
            },
        }
        let mut completions = std::mem::take(&mut self.completions);
        loop {
            completions.extend(self.ring.completion().take(COMPLETIONS_MAX));
            let is_last = completions.len() < COMPLETIONS_MAX;
            for completion in completions.drain(..) {
                self.complete(&completion);
            }
            if is_last {
                self.completions = completions;
                return Ok(());
            }
        }
    }

    #[inline]
    fn complete(&mut self, completion: &cqueue::Entry) {
        let errno = Some(-completion.result()).filter(|&errno| errno > 0);
        match Token::from_user_data(completion.user_data()) {
            Some(Token::Send(id)) => {
                let place = self.sends.get_mut(usize::from(id));
                if let Some((batch, to)) = place.and_then(Option::take) {
                    self.in_flight -= 1;
                    self.sides.sent(batch, to, errno);
                }
            }
            Some(Token::Write(id)) => {
                let place = self.writes.get_mut(usize::from(id));
                if let Some(vnet_packet) = place.and_then(Option::take) {
                    self.in_flight -= 1;
                    if errno == Some(libc::EOPNOTSUPP) {
                        self.is_nowait = false;
                        self.sides.write_now(vnet_packet);
                    } else {
                        self.sides.written(vnet_packet, errno);
                    }
                }
            }
            Some(Token::TunPoll) => {
                self.armed.tun = false;
                self.sides.tun_ready = true;
            }
            Some(Token::UdpPoll(receiver)) => {
                self.armed.udp &= !(1 << receiver);
                self.sides.receivers.set_ready(receiver.into());
            }
            Some(Token::Wake) => {
                self.armed.wake = false;
                self.sides.woken();
            }
            Some(Token::SendRoom(port)) => {
                self.armed.send_room[port as usize] = false;
                self.sides.found_room(port);
            }
            None => {}
        }
    }

    /// Queues the requests for events that are not under way but should be.
    fn arm(&mut self) -> Result<()> {
        if self.sides.is_quiet {
            return Ok(());
        }
        if !self.armed.wake {
            self.armed.wake = true;
            let wake = Fd(self.sides.wake.as_fd().as_raw_fd());
            self.push_poll(wake, libc::POLLIN, Token::Wake)?;
        }
        if !self.armed.tun && !self.sides.tun_ready {
            self.armed.tun = true;
            let queue = Fd(self.sides.queue.as_fd().as_raw_fd());
            self.push_poll(queue, libc::POLLIN, Token::TunPoll)?;
        }
        for port in self.sides.full_ports() {
            if !std::mem::replace(&mut self.armed.send_room[port as usize], true) {
                let socket = Fd(self.sides.sockets.sender(port).as_raw_fd());
                self.push_poll(socket, libc::POLLOUT, Token::SendRoom(port))?;
            }
        }
        let mut udp = self.sides.receivers.awaited() & !self.armed.udp;
        while udp != 0 {
            let receiver = udp.trailing_zeros() as u16;
            udp &= udp - 1;
            self.armed.udp |= 1 << receiver;
            if let Some(socket) = self.sides.receivers.socket(receiver.into()) {
                let socket = Fd(socket.as_raw_fd());
                self.push_poll(socket, libc::POLLIN, Token::UdpPoll(receiver))?;
            }
        }
        Ok(())
    }

    fn push_poll(&mut self, fd: Fd, events: libc::c_short, token: Token) -> Result<()> {
        let request = opcode::PollAdd::new(fd, events as u32).build();
        self.push(&request.user_data(token.to_user_data()))
    }

    /// Starts what is queued, cancels what waits, and takes in the completions
    /// of both.
    fn cancel_all(&mut self) {
        let _ = self.enter(0);
        let submitter = self.ring.submitter();
        match submitter.register_sync_cancel(None, CancelBuilder::any()) {
            Err(error) if error.raw_os_error() != Some(libc::ENOENT) => {
                tracing::debug!("cannot cancel io_uring requests: {error}");
            }
            _ => {}
        }
        for _ in 0..DRAIN_TRIES_MAX {
            let _ = self.enter(0);
            let Armed {
                wake,
                tun,
                udp,
                send_room,
            } = self.armed;
            if self.in_flight == 0 && !(wake || tun || udp != 0) && send_room == [false; PORTS] {
                break;
            }
            // Cancelled requests complete in task work, which only runs here.
            let timespec = types::Timespec::new().nsec(DRAIN_WAIT_NS);
            let args = types::SubmitArgs::new().timespec(&timespec);
            let _ = self.ring.submitter().submit_with_args(1, &args);
        }
    }
}

impl Engine for Uring {
    #[inline]
    fn next_event(&mut self) -> Option<Event> {
        self.sides.next_event()
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
        if self.in_flight > 0
            && let Err(error) = self.enter(0)
        {
            self.sides.fail(error);
        }
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

    /// Stages the batch's send.
    #[inline]
    fn send(&mut self, batch: Batch, to: Destination) {
        if batch.count() == 0 {
            return self.sides.sent(batch, to, None);
        }
        let (id, bytes) = (batch.id(), batch.bytes().len());
        let socket = Fd(self.sides.sockets.sender(to.from).as_raw_fd());
        let message = self.messages[usize::from(id)].prepare(&batch, to.endpoint);
        let request = opcode::SendMsg::new(socket, message)
            .flags(libc::MSG_DONTWAIT as u32)
            .build()
            .user_data(Token::Send(id).to_user_data());
        self.sends[usize::from(id)] = Some((batch, to));
        self.stage(&request, bytes);
    }

    /// Submits what is staged, and the requests for events along with it.
    #[inline]
    fn submit(&mut self) -> Result<()> {
        self.sides.take_error()?;
        // What an earlier call has left in the queue must not wait for output
        // to come, or the kernel would never hear of it.
        let has_left_over = !self.ring.submission().is_empty();
        self.arm()?;
        if has_left_over || self.in_flight > 0 || self.ring.submission().taskrun() {
            self.enter(0)?;
        }
        Ok(())
    }

    fn poll(&mut self) -> Result<bool> {
        self.sides.room_wait();
        self.submit()?;
        Ok(self.has_event() || self.sides.take_found_room())
    }

    fn wait(&mut self) -> Result<()> {
        let room_wait = self.sides.room_wait();
        if self.has_event() || self.sides.take_found_room() {
            return Ok(());
        }
        self.arm()?;
        if self.sides.is_failing() {
            // Not as fast as the processor can fail.
            std::thread::sleep(FAILURE_PAUSE);
            return self.enter(0);
        }
        if self.sides.may_read_vnet_packet() || self.sides.may_receive() {
            // A read has failed, and the next one may do better.
            return Ok(());
        }
        let Some(room_wait) = room_wait else {
            return self.enter(1);
        };
        let timespec = types::Timespec::from(room_wait);
        let args = types::SubmitArgs::new().timespec(&timespec);
        // Whatever ends it, the completions tell.
        let _ = self.ring.submitter().submit_with_args(1, &args);
        self.enter(0)
    }

    fn note_sender(&mut self, sender: SocketAddr, bytes: usize, is_shared: bool) {
        // One that is new is polled in its turn.
        let receivers = &mut self.sides.receivers;
        let _ = receivers.note_sender(sender, bytes, is_shared);
    }

    fn quiesce(&mut self) {
        self.sides.quiesce();
        self.cancel_all();
    }

    fn reset_limits(&mut self) {
        self.sides.reset_limits();
    }
}

impl VnetSink for Uring {
    #[inline]
    fn take_vnet_packet(&mut self) -> Option<VnetPacket> {
        self.sides.take_vnet_packet()
    }

    /// Stages the vnet packet's write.
    #[inline]
    fn write(&mut self, vnet_packet: VnetPacket) {
        if !self.is_nowait {
            return self.sides.write_now(vnet_packet);
        }
        let (id, bytes) = (vnet_packet.id(), vnet_packet.bytes().len());
        let queue = Fd(self.sides.queue.as_fd().as_raw_fd());
        // Without the flag, a queue without room would be waited for, although it
        // is set not to block.
        let request = opcode::Write::new(queue, vnet_packet.bytes().as_ptr(), bytes as u32)
            .rw_flags(libc::RWF_NOWAIT)
            .build()
            .user_data(Token::Write(id).to_user_data());
        self.writes[usize::from(id)] = Some(vnet_packet);
        self.stage(&request, bytes);
    }
}

impl Drop for Uring {
    /// Ends all requests before any memory they use goes away, and waits until
    /// they have let go of the TUN queue and the socket: left to the kernel's
    /// own cleaning up, that would come some time after the process has ended,
    /// and the next process would find name and port still in use.
    fn drop(&mut self) {
        self.cancel_all();
    }
}

/// Whether this process may have so many rings at once, each as a worker has it.
///
/// # Errors
/// As [`Uring::new`].
pub fn probe(rings: u16) -> Result<()> {
    let tried: Vec<_> = (0..rings).map(|_| build()).collect();
    tried.into_iter().try_for_each(|built| built.map(drop))
}

fn build() -> Result<IoUring> {
    IoUring::builder()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_taskrun_flag()
        .setup_submit_all()
        .build(SUBMISSION_ENTRIES)
        .map_err(setup_error)
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
        Some(libc::EMFILE) => "raise the limit on open files (ulimit -n)",
        Some(libc::ENOMEM) => "raise the limit on locked memory (ulimit -l)",
        _ => "it takes io_uring of Linux 6.1 or later",
    };
    Error::os("cannot set up io_uring", error).hint(hint)
}
