//! Trains and frames on their way out: free, or with the kernel.

use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::sync::Once;

use io_uring::types::Fd;
use io_uring::{opcode, squeue};
use nix::sys::socket::{MsgFlags, SockaddrStorage, sendto};

use super::token::Token;
use crate::error::{Error, Result};
use crate::io::message::SendMessage;
use crate::packet::coalesce::Frame;
use crate::packet::train::{Limits, NextHop, Train};
use crate::worker::counters::Counters;

/// Trains per worker: those that can be open at a time and a batch under way.
pub const TRAINS: u16 = 16;
/// Frames per worker: the flows that can be open at a time and a batch under way.
pub const FRAMES: u16 = 64;

/// Older kernels' `UDP_MAX_SEGMENTS`.
const SEGMENTS_MAX_OLD: usize = 64;

/// See the module's documentation.
pub struct Output {
    pub free_trains: Vec<Train>,
    pub free_frames: Vec<Frame>,
    /// By train id: the train that the kernel has.
    sends: Vec<Option<(Train, SocketAddr)>>,
    /// By train id. Boxed: the kernel reads it where it is.
    messages: Box<[SendMessage]>,
    /// By frame id: the frame that the kernel has.
    writes: Vec<Option<Frame>>,
    in_flight: usize,
    /// Bytes given to requests that are not submitted yet.
    pub staged_bytes: usize,
    /// The socket's send buffer is full: read no more frames until it is not.
    pub blocked: bool,
    pub room_poll_armed: bool,
    /// Limits of a path that nothing has been learnt of.
    base: Limits,
    full: Limits,
    /// By next hop, where something has been learnt.
    paths: Vec<(NextHop, Limits)>,
    /// The first error met where none could be returned.
    error: Option<Error>,
}

impl Output {
    pub fn new(limits: Limits) -> Self {
        Self {
            // Last in, first out: the buffer used last is warmest.
            free_trains: (0..TRAINS).rev().map(Train::new).collect(),
            free_frames: (0..FRAMES).rev().map(Frame::new).collect(),
            sends: (0..TRAINS).map(|_| None).collect(),
            messages: (0..TRAINS).map(|_| SendMessage::new()).collect(),
            writes: (0..FRAMES).map(|_| None).collect(),
            in_flight: 0,
            staged_bytes: 0,
            blocked: false,
            room_poll_armed: false,
            base: limits,
            full: limits,
            paths: Vec::with_capacity(PATHS_MAX),
            error: None,
        }
    }

    /// Number of sends and writes without a completion yet.
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    pub fn keep_error(&mut self, result: Result<()>) {
        if let Err(error) = result {
            self.error.get_or_insert(error);
        }
    }

    pub fn take_error(&mut self) -> Result<()> {
        self.error.take().map_or(Ok(()), Err)
    }

    /// Takes a train over and makes the request that sends it.
    #[inline]
    pub fn prepare_send(&mut self, train: Train, to: SocketAddr, socket: Fd) -> squeue::Entry {
        let id = train.id();
        let place = usize::from(id);
        let header = self.messages[place].prepare(&train, to);
        self.sends[place] = Some((train, to));
        self.in_flight += 1;
        opcode::SendMsg::new(socket, header)
            .flags(libc::MSG_DONTWAIT as u32)
            .build()
            .user_data(Token::Send(id).to_user_data())
    }

    /// Takes a frame over and makes the request that writes it.
    #[inline]
    pub fn prepare_write(&mut self, frame: Frame, queue: Fd) -> squeue::Entry {
        let id = frame.id();
        let bytes = frame.bytes();
        let entry = opcode::Write::new(queue, bytes.as_ptr(), bytes.len() as u32)
            .build()
            .user_data(Token::Write(id).to_user_data());
        self.writes[usize::from(id)] = Some(frame);
        self.in_flight += 1;
        entry
    }

    /// A write has completed: the frame is free again.
    #[inline]
    pub fn written(&mut self, id: u16, result: i32, counters: &Counters) {
        let Some(frame) = self.writes.get_mut(usize::from(id)).and_then(Option::take) else {
            return;
        };
        self.in_flight -= 1;
        self.free_frames.push(frame);
        match -result {
            ..=0 => counters.tun_frames_written.add(1),
            libc::EAGAIN | libc::ENOBUFS | libc::ENOMEM => counters.drop_tun_full.add(1),
            _ => counters.drop_tun_error.add(1),
        }
    }

    /// A send has completed: the train is free again.
    #[inline]
    pub fn sent(&mut self, id: u16, result: i32, socket: &impl AsFd, counters: &Counters) {
        let Some((train, to)) = self.sends.get_mut(usize::from(id)).and_then(Option::take) else {
            return;
        };
        self.in_flight -= 1;
        if result >= 0 {
            counters.trains_sent.add(1);
            counters.packets_sent.add(train.count() as u64);
            counters.bytes_sent.add(train.bytes().len() as u64);
        } else {
            self.refused(&train, to, -result, socket, counters);
        }
        self.free_trains.push(train);
    }

    #[cold]
    fn refused(
        &mut self,
        train: &Train,
        to: SocketAddr,
        errno: i32,
        socket: &impl AsFd,
        counters: &Counters,
    ) {
        match errno {
            libc::EAGAIN | libc::ENOBUFS => {
                counters.drop_send_full.add(train.count() as u64);
                self.blocked |= errno == libc::EAGAIN;
            }
            libc::EIO | libc::EINVAL | libc::EMSGSIZE if train.count() > 1 => {
                // What goes through one by one was refused for being a train.
                if self.send_one_by_one(train, to, socket, counters) {
                    self.learn(train, errno);
                }
            }
            _ => counters.drop_send_error.add(train.count() as u64),
        }
    }

    /// Remembers what the kernel will not take, so that later trains are short
    /// enough from the start.
    fn learn(&mut self, train: &Train, errno: i32) {
        static NO_CHECKSUM_OFFLOAD: Once = Once::new();
        if errno == libc::EIO {
            NO_CHECKSUM_OFFLOAD.call_once(|| {
                tracing::warn!(
                    "UDP_SEGMENT off: the way to the peer takes no segmentation offload \
                     (IPsec, or a device without checksums); sending one datagram at a time"
                );
            });
            self.base.segments_max = 1;
            self.paths.clear();
        } else if errno == libc::EINVAL && train.count() > SEGMENTS_MAX_OLD {
            // The kernel's own limit: not to be tried again.
            self.base.segments_max = SEGMENTS_MAX_OLD;
            self.full.segments_max = SEGMENTS_MAX_OLD;
            self.paths.clear();
        } else {
            let mut limits = self.limits(train.next_hop());
            let refused_bytes = train.segment_bytes();
            limits.segment_bytes_max = limits.segment_bytes_max.min(refused_bytes - 1);
            self.paths.retain(|(hop, _)| *hop != train.next_hop());
            if self.paths.len() == PATHS_MAX {
                self.paths.remove(0);
            }
            self.paths.push((train.next_hop(), limits));
            tracing::debug!(
                "datagrams over {} bytes are sent alone: the path's MTU is smaller",
                limits.segment_bytes_max
            );
        }
    }

    /// Sends a train's datagrams without `UDP_SEGMENT`; tells whether any went.
    fn send_one_by_one(
        &mut self,
        train: &Train,
        to: SocketAddr,
        socket: &impl AsFd,
        counters: &Counters,
    ) -> bool {
        let mut sent = 0;
        use std::os::fd::AsRawFd;
        let fd = socket.as_fd().as_raw_fd();
        let to = SockaddrStorage::from(to);
        for datagram in train.datagrams() {
            match sendto(fd, datagram, &to, MsgFlags::MSG_DONTWAIT) {
                Ok(_) => {
                    sent += 1;
                    counters.trains_sent.add(1);
                    counters.packets_sent.add(1);
                    counters.bytes_sent.add(datagram.len() as u64);
                }
                Err(nix::errno::Errno::EAGAIN) => {
                    self.blocked = true;
                    counters.drop_send_full.add((train.count() - sent) as u64);
                    break;
                }
                Err(_) => counters.drop_send_error.add(1),
            }
        }
        sent > 0
    }

    /// How long trains toward `next_hop` may be.
    #[inline]
    pub fn limits(&self, next_hop: NextHop) -> Limits {
        self.paths
            .iter()
            .find(|(hop, _)| *hop == next_hop)
            .map_or(self.base, |(_, limits)| *limits)
    }

    /// Forgets what has been learnt.
    pub fn reset_limits(&mut self) {
        self.base = self.full;
        self.paths.clear();
    }
}

/// Most paths to remember limits of.
const PATHS_MAX: usize = 64;
