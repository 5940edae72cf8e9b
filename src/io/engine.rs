//! What the packet work needs of an I/O engine, and nothing more.
//!
//! An engine moves buffers between one TUN queue, one UDP socket and its
//! caller. Buffers change owner by value: whoever holds one may touch it, and
//! what the kernel is working on is held by the engine.

use std::net::SocketAddr;

use crate::error::Result;
use crate::packet::coalesce::FrameSink;
use crate::packet::train::{Limits, NextHop, Train};

/// Next hops whose trains can be open at a time. The oldest makes room.
pub const OPEN_TRAINS_MAX: usize = 32;

/// A filled receive buffer. Give it back with [`Engine::recycle`].
#[derive(Debug)]
pub struct Received {
    pub(crate) buffer: Box<[u8]>,
    pub(crate) start: usize,
    pub(crate) end: usize,
    pub(crate) id: u16,
}

impl Received {
    /// The bytes received.
    #[inline]
    pub fn bytes(&self) -> &[u8] {
        &self.buffer[self.start..self.end]
    }

    /// The bytes received, for changing them in place.
    #[inline]
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.buffer[self.start..self.end]
    }
}

/// Something that a worker has to act on.
#[derive(Debug)]
pub enum Event {
    /// A frame read from the TUN queue: virtio-net header and packet.
    Frame(Received),
    /// Datagrams of one sender, back to back, each of `segment_bytes` but the
    /// last.
    Datagrams {
        /// The datagrams' payload.
        received: Received,
        /// Where they came from.
        sender: SocketAddr,
        /// Bytes of every datagram but the last.
        segment_bytes: usize,
    },
    /// Packets that were given to [`Engine::send`] have not been sent.
    SendFailed(SendFailure),
    /// The control thread has a command.
    Wake,
}

/// Packets that the kernel did not take, and that the engine has counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SendFailure {
    /// The next hop of their train.
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

/// A port that a worker sends from; see [`crate::io::udp::reuseport`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Port {
    /// The port that all workers receive on.
    Listen,
    /// The worker's own, if it has one.
    Own,
}

/// Where a train goes, and from which port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Destination {
    /// The peer's address and port.
    pub endpoint: SocketAddr,
    /// The port to send from.
    pub from: Port,
}

/// See the module's documentation.
pub trait Engine: FrameSink {
    /// Starts all output given so far, takes in what has arrived, and tells
    /// whether there is an event. Does not sleep.
    ///
    /// # Errors
    /// As [`Self::wait`].
    fn poll(&mut self) -> Result<bool>;

    /// As [`Self::poll`], for one who does nothing but look: also asks the
    /// kernel for news where that takes a system call.
    ///
    /// # Errors
    /// As [`Self::wait`].
    fn look(&mut self) -> Result<bool> {
        self.poll()
    }

    /// Starts all output given so far and sleeps until there is something new,
    /// as a rule an event.
    ///
    /// # Errors
    /// When the device is gone or the kernel interface fails for good.
    fn wait(&mut self) -> Result<()>;

    /// The next event, in the order in which the kernel reported them.
    fn next_event(&mut self) -> Option<Event>;

    /// Gives a receive buffer back.
    fn recycle(&mut self, received: Received, source: Source);

    /// An empty train, or `None` when all are under way: the packet is then
    /// dropped, and the caller counts it.
    fn take_train(&mut self) -> Option<Train>;

    /// Sends a train. Trains toward one destination leave in the order given.
    fn send(&mut self, train: Train, destination: Destination);

    /// How long trains toward a destination may be.
    fn limits(&self, destination: SocketAddr) -> Limits;

    /// Takes nothing new from the kernel any more. What was taken before is still
    /// to be asked for, and output is still carried out.
    fn quiesce(&mut self);

    /// Forgets what refused sends taught about paths.
    fn reset_limits(&mut self);
}

/// Which side a receive buffer belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// The TUN queue.
    Tun,
    /// The UDP socket.
    Udp,
}
