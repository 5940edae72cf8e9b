//! Both sides of a worker, its TUN queue and its UDP socket, with all that the
//! engines do alike: buffers, whose turn it is, what failed reads and refused
//! sends mean.

use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::eventfd::EventFd;

use super::engine::{Destination, Event, OPEN_BATCHES_MAX, ROOM_WAIT, ReceiveMeta, Received};
use super::message;
use super::path_limits::PathLimits;
use super::receivers::Receivers;
use super::tun::Queue;
use super::udp::{self, PORTS, Port, WorkerSockets};
use crate::counters::Counters;
use crate::error::{Error, Result};
use crate::packet::batch::{Batch, Limits};
use crate::packet::virtio;
use crate::packet::vnet_packet::VnetPacket;

/// Buffers to read into by system calls: the worker has one at a time, and one
/// may be read ahead.
const READ_BUFFERS: usize = 4;

/// Bytes of a receive buffer: the longest vnet packet or datagram with its headers.
/// The odd cache line keeps the starts of neighbouring buffers from falling
/// into the same cache sets.
pub const BUFFER_BYTES: usize = (64 << 10) + 192;
const _: () = assert!(BUFFER_BYTES >= virtio::HEADER_BYTES + 65536);

/// Batches: those that can be open at a time, and a turn under way.
pub const BATCHES: u16 = OPEN_BATCHES_MAX as u16 + 8;
/// Vnet packets: the flows that can be open at a time, and a turn under way.
pub const VNET_PACKETS: u16 = 64;

/// So many reads in a row that failed, for reasons that pass as a rule, are no
/// passing matter: from then on there is a pause after each.
const FAILURES_MAX: u32 = 16;

/// That pause.
pub const FAILURE_PAUSE: Duration = Duration::from_millis(1);

/// See the module's documentation.
pub struct Sides {
    pub queue: Arc<Queue>,
    pub sockets: Arc<WorkerSockets>,
    /// Those of the other workers.
    others: Vec<Arc<WorkerSockets>>,
    pub counters: Arc<Counters>,
    pub wake: Arc<EventFd>,
    wake_pending: bool,
    /// There may be a vnet packet: the kernel has said so, and the queue has not been
    /// found empty since.
    pub tun_ready: bool,
    /// Where datagrams come from.
    pub receivers: Receivers,
    /// Whose turn it is when both sides have something.
    tun_is_next: bool,
    /// What was read ahead.
    next: Option<Event>,
    /// Nothing is read any more.
    pub is_quiet: bool,
    /// By port: since when its socket is full, and no vnet packet is read until it has
    /// room.
    full_since: [Option<Instant>; PORTS],
    /// There has been room again since the worker was last told.
    has_found_room: bool,
    paths: PathLimits,
    /// Last in, first out, like the other two: the buffer used last is warmest.
    free_buffers: Vec<Box<[u8]>>,
    free_batches: Vec<Batch>,
    free_vnet_packets: Vec<VnetPacket>,
    /// Reads in a row that failed for no reason known.
    failures: u32,
    /// The first error that ends the worker.
    error: Option<Error>,
}

impl Sides {
    pub fn new(
        queue: Arc<Queue>,
        sockets: Arc<WorkerSockets>,
        others: Vec<Arc<WorkerSockets>>,
        wake: Arc<EventFd>,
        limits: Limits,
        counters: Arc<Counters>,
    ) -> Self {
        let buffer = |_| vec![0; BUFFER_BYTES].into_boxed_slice();
        Self {
            queue,
            receivers: Receivers::new(Arc::clone(&sockets)),
            sockets,
            others,
            counters,
            wake,
            wake_pending: false,
            // It is tried before it is waited for.
            tun_ready: true,
            tun_is_next: true,
            next: None,
            is_quiet: false,
            full_since: [None; PORTS],
            has_found_room: false,
            paths: PathLimits::new(limits),
            free_buffers: (0..READ_BUFFERS).map(buffer).collect(),
            free_batches: (0..BATCHES).rev().map(Batch::new).collect(),
            free_vnet_packets: (0..VNET_PACKETS).rev().map(VnetPacket::new).collect(),
            failures: 0,
            error: None,
        }
    }

    /// The next event. Arrivals come from the side whose turn it is, or else from
    /// the other.
    #[inline]
    pub fn next_event(&mut self) -> Option<Event> {
        if let Some(event) = self.next.take() {
            return Some(event);
        }
        if std::mem::take(&mut self.wake_pending) {
            return Some(Event::Wake);
        }
        if let Some(failure) = self.paths.next_failure() {
            return Some(Event::SendFailed(failure));
        }
        let arrival = if self.tun_is_next {
            self.read_vnet_packet().or_else(|| self.receive())
        } else {
            self.receive().or_else(|| self.read_vnet_packet())
        };
        self.tun_is_next = !matches!(arrival, Some(Event::VnetPacket(_)));
        arrival
    }

    /// Whether there is a [`Self::next_event`]: it is read ahead.
    #[inline]
    pub fn has_event(&mut self) -> bool {
        if self.next.is_none() {
            self.next = self.next_event();
        }
        self.next.is_some()
    }

    /// Whether the TUN queue is to be read.
    #[inline]
    pub fn may_read_vnet_packet(&self) -> bool {
        self.tun_ready
            && self.full_since == [None; PORTS]
            && !self.is_quiet
            && !self.free_buffers.is_empty()
    }

    #[inline]
    fn read_vnet_packet(&mut self) -> Option<Event> {
        if !self.may_read_vnet_packet() {
            return None;
        }
        let mut buffer = self.free_buffers.pop()?;
        let errno = match nix::unistd::read(&self.queue, &mut buffer) {
            Ok(bytes) => return Some(Event::VnetPacket(self.filled(buffer, bytes))),
            Err(errno) => errno as i32,
        };
        self.free_buffers.push(buffer);
        match errno {
            libc::EAGAIN => self.tun_ready = false,
            // A vnet packet that the driver could not describe; it is gone.
            libc::EINVAL => self.counters.drop_tun_malformed.add(1),
            libc::EINTR | libc::ENOMEM => self.failed_oddly(),
            errno => self.fail(
                Error::os("cannot read the TUN queue", from_errno(errno))
                    .hint("was the interface deleted?"),
            ),
        }
        None
    }

    /// Whether datagrams are to be received.
    #[inline]
    pub fn may_receive(&self) -> bool {
        self.receivers.is_ready() && !self.free_buffers.is_empty()
    }

    /// The datagrams of one receive.
    #[inline]
    fn receive(&mut self) -> Option<Event> {
        if !self.may_receive() {
            return None;
        }
        let mut buffer = self.free_buffers.pop()?;
        while let Some(receiver) = self.receivers.next()
            && let Some(socket) = self.receivers.socket(receiver)
        {
            match message::receive(socket, &mut buffer) {
                Ok(Some(message)) => {
                    self.receivers.received(receiver, message.bytes);
                    return Some(Event::Datagrams {
                        received: self.filled(buffer, message.bytes),
                        meta: ReceiveMeta {
                            sender: message.sender,
                            called: message.control.called,
                            is_shared: Receivers::is_shared(receiver),
                            segment_bytes: message.control.segment_bytes.unwrap_or(message.bytes),
                            ecn: message.control.ecn,
                        },
                    });
                }
                Err(Errno::EAGAIN) => self.receivers.found_empty(receiver),
                Ok(None) => {
                    self.counters.drop_truncated.add(1);
                    break;
                }
                Err(errno) => {
                    self.receive_failed(errno as i32, Receivers::is_shared(receiver));
                    break;
                }
            }
        }
        self.free_buffers.push(buffer);
        None
    }

    /// A buffer that a read has filled with so many bytes.
    #[inline]
    fn filled(&mut self, buffer: Box<[u8]>, bytes: usize) -> Received {
        self.failures = 0;
        Received { buffer, bytes }
    }

    /// Takes a buffer back.
    #[inline]
    pub fn recycle(&mut self, received: Received) {
        self.free_buffers.push(received.buffer);
    }

    /// A receive from a UDP socket has failed.
    #[cold]
    fn receive_failed(&mut self, errno: i32, is_shared: bool) {
        match errno {
            // What ICMP says of earlier sends: a connected socket is told, and told once.
            libc::ECONNREFUSED
            | libc::EHOSTUNREACH
            | libc::ENETUNREACH
            | libc::EHOSTDOWN
            | libc::EMSGSIZE
            | libc::ENONET
            | libc::ENOPROTOOPT
            | libc::EPROTO
            | libc::EACCES
            | libc::EOPNOTSUPP
                if !is_shared => {}
            libc::EBADF | libc::ENOTSOCK | libc::EFAULT | libc::EINVAL | libc::EOPNOTSUPP => self
                .fail(
                    Error::os("cannot receive from the UDP socket", from_errno(errno))
                        .hint("start fastvpn again"),
                ),
            _ => self.failed_oddly(),
        }
    }

    /// A read failed, and the next one may do better.
    #[cold]
    fn failed_oddly(&mut self) {
        self.counters.receive_failed.add(1);
        self.failures = self.failures.saturating_add(1);
    }

    /// Whether nothing but failures has come of many reads.
    pub fn is_failing(&self) -> bool {
        self.failures >= FAILURES_MAX
    }

    /// Keeps an error that ends the worker until it can be returned.
    #[cold]
    pub fn fail(&mut self, error: Error) {
        self.error.get_or_insert(error);
    }

    /// Returns it.
    #[inline]
    pub fn take_error(&mut self) -> Result<()> {
        self.error.take().map_or(Ok(()), Err)
    }

    /// The control thread has a command.
    pub fn woken(&mut self) {
        // Only empties the counter: the command queue says what is up.
        let _ = self.wake.read();
        self.wake_pending = true;
    }

    #[inline]
    pub fn take_batch(&mut self) -> Option<Batch> {
        self.free_batches.pop()
    }

    #[inline]
    pub fn take_vnet_packet(&mut self) -> Option<VnetPacket> {
        let vnet_packet = self.free_vnet_packets.pop();
        if vnet_packet.is_none() {
            self.counters.drop_no_buffer.add(1);
        }
        vnet_packet
    }

    /// Whether the next batch or vnet packet cannot be had.
    #[inline]
    pub fn is_out_of_buffers(&self) -> bool {
        self.free_batches.is_empty() || self.free_vnet_packets.is_empty()
    }

    /// The kernel has taken a batch, or refused it: it is free again.
    #[inline]
    pub fn sent(&mut self, batch: Batch, to: Destination, errno: Option<i32>) {
        match errno {
            None if batch.count() == 0 => {}
            None => {
                self.counters.udp_sends.add(1);
                self.counters.packets_sent.add(batch.count() as u64);
                self.counters.bytes_sent.add(batch.bytes().len() as u64);
            }
            Some(errno) => {
                let socket = self.sockets.sender(to.from);
                let has_no_room =
                    self.paths
                        .refused(&batch, to.endpoint, errno, socket, &self.counters);
                if has_no_room {
                    self.wait_for_room(to.from);
                }
            }
        }
        self.free_batches.push(batch);
    }

    /// Writes to the TUN queue by a system call of its own.
    #[inline]
    pub fn write_now(&mut self, vnet_packet: VnetPacket) {
        let written = nix::unistd::write(&self.queue, vnet_packet.bytes());
        let errno = written.err().map(|errno| errno as i32);
        self.written(vnet_packet, errno);
    }

    /// The TUN queue has taken a vnet packet, or refused it: it is free again.
    #[inline]
    pub fn written(&mut self, vnet_packet: VnetPacket, errno: Option<i32>) {
        match errno {
            None => self.counters.tun_writes.add(1),
            Some(libc::EAGAIN | libc::ENOBUFS | libc::ENOMEM) => self.counters.drop_tun_full.add(1),
            Some(_) => self.counters.drop_tun_error.add(1),
        }
        self.free_vnet_packets.push(vnet_packet);
    }

    /// How long batches toward `destination` may be.
    #[inline]
    pub fn limits(&self, destination: SocketAddr) -> Limits {
        self.paths.get(destination)
    }

    /// Takes back a batch that is not to be sent.
    #[inline]
    pub fn put_back(&mut self, batch: Batch) {
        self.free_batches.push(batch);
    }

    /// Bytes that the socket of a port holds.
    pub fn unsent_bytes(&self, from: Port) -> usize {
        udp::unsent_bytes(self.sockets.sender(from).as_fd())
    }

    /// Whether a socket of another worker holds anything.
    pub fn others_hold_unsent(&self) -> bool {
        let mut all = self.others.iter().flat_map(|worker| worker.all());
        all.any(|socket| udp::unsent_bytes(socket.as_fd()) > 0)
    }

    /// Sets how many bytes the socket of a port may hold and yet have room.
    pub fn set_send_buffer(&self, from: Port, bytes: usize) -> usize {
        let socket = self.sockets.sender(from);
        // What cannot be is as it was.
        let _ = udp::set_send_buffer(socket, bytes);
        // The kernel doubles it, and has a least value (socket(7)).
        let actual = socket.send_buffer_size().map_or(bytes, |twice| twice / 2);
        actual.min(bytes)
    }

    /// Reads no vnet packet until the socket of a port has room.
    pub fn wait_for_room(&mut self, from: Port) {
        self.full_since[from as usize].get_or_insert_with(Instant::now);
        // It is tried then, and not waited for meanwhile.
        self.tun_ready = true;
    }

    /// Whether the socket of a port is full.
    #[inline]
    pub fn is_full(&self, from: Port) -> bool {
        self.full_since[from as usize].is_some()
    }

    /// The socket of a port has room, or was waited for long enough.
    pub fn found_room(&mut self, from: Port) {
        if self.full_since[from as usize].take().is_some() {
            self.has_found_room = true;
        }
    }

    /// Ends waits that have lasted for [`ROOM_WAIT`], and returns how long the others may
    /// still last; `None` if there is none.
    pub fn room_wait(&mut self) -> Option<Duration> {
        let mut rest = None;
        for port in self.full_ports() {
            let since = self.full_since[port as usize]?;
            match ROOM_WAIT.checked_sub(since.elapsed()) {
                Some(left) => rest = Some(rest.map_or(left, |rest: Duration| rest.min(left))),
                None => self.found_room(port),
            }
        }
        rest
    }

    /// Whether [`Self::take_found_room`] would say so.
    pub fn has_found_room(&self) -> bool {
        self.has_found_room
    }

    /// Whether there has been room since this was last asked.
    #[inline]
    pub fn take_found_room(&mut self) -> bool {
        std::mem::take(&mut self.has_found_room)
    }

    /// The ports whose sockets are waited for.
    pub fn full_ports(&self) -> impl Iterator<Item = Port> + use<> {
        let since = self.full_since;
        let ports = [Port::Listen, Port::Own];
        ports
            .into_iter()
            .filter(move |&port| since[port as usize].is_some())
    }

    /// Takes nothing new from the kernel any more.
    pub fn quiesce(&mut self) {
        self.is_quiet = true;
        self.receivers.quiesce();
    }

    /// Forgets what refused sends taught.
    pub fn reset_limits(&mut self) {
        self.paths.reset();
    }
}

fn from_errno(errno: i32) -> std::io::Error {
    std::io::Error::from_raw_os_error(errno)
}
