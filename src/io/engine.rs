//! What the data plane needs of an I/O engine, and nothing more.
//!
//! An engine moves buffers between one TUN queue, one UDP port and its
//! caller. Buffers change owner by value: whoever holds one may touch it, and
//! what the kernel is working on is held by the engine.
//!
//! # A turn
//!
//! [`Engine::next_event`] takes in, [`Engine::send`] and [`VnetSink::write`]
//! hand output over, [`Engine::submit`] starts what has not gone out yet, and
//! [`Engine::wait`] sleeps. Nothing else sends. Batches toward one destination
//! leave in the order in which they are given, and so do vnet packets.
//!
//! # When there is no room
//!
//! Both engines do the same; `io/sides.rs` has the code and `io/tests.rs` the
//! tests of both.
//!
//! - *The socket's send buffer is full.* The caller asks what it holds
//!   ([`Engine::unsent_bytes`]), stops sending, and has the engine wait for room
//!   ([`Engine::wait_for_room`]). Until there is, no vnet packet is read: what the
//!   host sends meanwhile waits in the TUN queue. Datagrams are received and written
//!   to the TUN queue all the while. Packets that are sent all the same and do not
//!   fit are dropped, counted ([`drop_send_full`]) and told ([`Event::SendFailed`]).
//! - *The TUN queue has no room for a vnet packet.* The vnet packet is dropped and counted
//!   ([`drop_tun_full`]). Nothing waits for the queue: the kernel would have
//!   dropped the packets at this place, too.
//! - *No output buffer is left.* The packet is dropped and counted
//!   ([`drop_no_buffer`]). There are more buffers than can be open at a time, and
//!   the engine gets them back as it hands them to the kernel.
//!
//! [`drop_send_full`]: crate::counters::Counters::drop_send_full
//! [`drop_tun_full`]: crate::counters::Counters::drop_tun_full
//! [`drop_no_buffer`]: crate::counters::Counters::drop_no_buffer

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use crate::error::Result;
use crate::io::udp::Port;
use crate::packet::batch::{Batch, Limits, NextHop};
use crate::packet::ecn::Ecn;
use crate::packet::vnet_packet::VnetSink;
use crate::wire::Endpoint;

/// Next hops whose batches can be open at a time. The oldest makes room.
pub const OPEN_BATCHES_MAX: usize = 32;

/// Longest wait for a socket to have room: who waits looks again whether it is worth it.
pub const ROOM_WAIT: Duration = Duration::from_millis(10);

/// A filled receive buffer. Give it back with [`Engine::recycle`].
#[derive(Debug)]
pub struct Received {
    pub(super) buffer: Box<[u8]>,
    pub(super) bytes: usize,
}

impl Received {
    /// A buffer with these bytes.
    #[cfg(test)]
    pub fn from_bytes(bytes: Vec<u8>) -> Self {
        Self {
            bytes: bytes.len(),
            buffer: bytes.into_boxed_slice(),
        }
    }

    /// The bytes received.
    #[inline]
    pub fn bytes(&self) -> &[u8] {
        &self.buffer[..self.bytes]
    }

    /// The bytes received, for changing them in place.
    #[inline]
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.buffer[..self.bytes]
    }
}

/// Something that a worker has to act on.
#[derive(Debug)]
pub enum Event {
    /// A vnet packet read from the TUN queue: virtio-net header and packet.
    VnetPacket(Received),
    /// Datagrams of one sender, back to back, each of `segment_bytes` but the
    /// last.
    Datagrams {
        /// The datagrams' payload.
        received: Received,
        /// What is known of them.
        meta: ReceiveMeta,
    },
    /// Packets that were given to [`Engine::send`] have not been sent.
    SendFailed(SendFailure),
    /// The control thread has a command.
    Wake,
}

/// What is known of the datagrams of one receive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReceiveMeta {
    /// Where they came from.
    pub sender: SocketAddr,
    /// The address of this host that they were sent to, where the socket tells
    /// ([`udp::set_options`](super::udp::set_options)).
    pub called: Option<IpAddr>,
    /// Whether through the socket that all senders share.
    pub is_shared: bool,
    /// Bytes of every datagram but the last.
    pub segment_bytes: usize,
    /// The ECN field of their own header.
    pub ecn: Ecn,
}

impl ReceiveMeta {
    /// Where answers go, and from where.
    #[inline]
    pub fn endpoint(&self) -> Endpoint {
        Endpoint {
            address: self.sender,
            source: self.called,
        }
    }
}

/// Packets that the kernel did not take, and that the engine has counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SendFailure {
    /// The next hop of their batch.
    pub next_hop: NextHop,
    /// Where they were to go.
    pub destination: SocketAddr,
    /// Why they did not.
    pub errno: i32,
    /// How many they are.
    pub packets: u64,
    /// Their bytes.
    pub bytes: u64,
}

impl SendFailure {
    /// Whether there was no room for them, and nothing else was wrong.
    pub fn is_full(&self) -> bool {
        matches!(self.errno, libc::EAGAIN | libc::ENOBUFS)
    }
}

/// Where a batch goes, and from which port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Destination {
    /// The peer's.
    pub endpoint: Endpoint,
    /// The port to send from.
    pub from: Port,
}

/// See the module's documentation.
pub trait Engine: VnetSink {
    /// The next event, from both sides in turn. Does not sleep, and sends
    /// nothing.
    fn next_event(&mut self) -> Option<Event>;

    /// Whether there is a [`Self::next_event`]; it is read ahead, if need be.
    fn has_event(&mut self) -> bool;

    /// Gives a receive buffer back.
    fn recycle(&mut self, received: Received);

    /// An empty batch, or `None` when all are under way: the packet is then
    /// dropped, and the caller counts it.
    fn take_batch(&mut self) -> Option<Batch>;

    /// Takes back a batch that is not to be sent.
    fn put_back(&mut self, batch: Batch);

    /// How long batches toward a destination may be.
    fn limits(&self, destination: SocketAddr) -> Limits;

    /// Sends a batch, now or with [`Self::submit`].
    fn send(&mut self, batch: Batch, to: Destination);

    /// Starts all output that was given, and returns how many bytes the socket of a
    /// port holds, by the kernel's count.
    fn unsent_bytes(&mut self, from: Port) -> usize;

    /// Whether the kernel holds anything that other workers have sent: then the link is busy
    /// without this one.
    fn others_hold_unsent(&self) -> bool;

    /// Sets how many bytes the socket of a port may hold and yet have room, and returns how
    /// many that are: the kernel may not let it be so many.
    fn set_send_buffer(&mut self, from: Port, bytes: usize) -> usize;

    /// Reads no vnet packet until the socket of a port has room, or
    /// [`ROOM_WAIT`] has passed. [`Self::wait`] ends then.
    fn wait_for_room(&mut self, from: Port);

    /// Whether that is so.
    fn is_waiting_for_room(&self, from: Port) -> bool;

    /// The port that is used when `wanted` is.
    fn port(&self, wanted: Port) -> Port;

    /// Starts all output that was given, and takes in what has come of it.
    ///
    /// # Errors
    /// When the device is gone or the kernel interface fails for good, now or at
    /// any call before.
    fn submit(&mut self) -> Result<()>;

    /// Asks the kernel what has happened, and tells whether there is an event, or room that was
    /// waited for. Does not sleep.
    ///
    /// # Errors
    /// As [`Self::submit`].
    fn poll(&mut self) -> Result<bool>;

    /// Sleeps until there is something new, as a rule an event; not at all if
    /// there is one already.
    ///
    /// # Errors
    /// As [`Self::submit`].
    fn wait(&mut self) -> Result<()>;

    /// Takes note of a peer that has sent so many bytes, and whether they came through the
    /// socket that all share: who sends much gets one of its own.
    fn note_sender(&mut self, sender: SocketAddr, bytes: usize, is_shared: bool);

    /// Takes nothing new from the kernel any more. What was taken before is still
    /// to be asked for, and output is still carried out.
    fn quiesce(&mut self);

    /// Forgets what refused sends taught about paths.
    fn reset_limits(&mut self);
}
