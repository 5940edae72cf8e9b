//! Trains and frames on their way out: free, or with the kernel.

use std::net::SocketAddr;

use io_uring::types::Fd;
use io_uring::{opcode, squeue};

use super::token::Token;
use crate::counters::Counters;
use crate::error::{Error, Result};
use crate::io::engine::OPEN_TRAINS_MAX;
use crate::io::engine::{Destination, Port};
use crate::io::message::SendMessage;
use crate::io::path_limits::PathLimits;
use crate::io::udp::WorkerSockets;
use crate::packet::coalesce::Frame;
use crate::packet::train::{Limits, Train};

/// Trains per worker: those that can be open at a time and a batch under way.
pub const TRAINS: u16 = OPEN_TRAINS_MAX as u16 + 8;
/// Frames per worker: the flows that can be open at a time and a batch under way.
pub const FRAMES: u16 = 64;

/// See the module's documentation.
pub struct Output {
    pub free_trains: Vec<Train>,
    pub free_frames: Vec<Frame>,
    /// By train id: the train that the kernel has.
    sends: Vec<Option<(Train, Destination)>>,
    /// By train id. Boxed: the kernel reads it where it is.
    messages: Box<[SendMessage]>,
    /// By frame id: the frame that the kernel has.
    writes: Vec<Option<Frame>>,
    in_flight: usize,
    /// Bytes given to requests that are not submitted yet.
    pub staged_bytes: usize,
    /// The socket on this port has a full send buffer: read no more frames until
    /// it is not.
    pub blocked: Option<Port>,
    pub room_poll_armed: bool,
    pub paths: PathLimits,
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
            blocked: None,
            room_poll_armed: false,
            paths: PathLimits::new(limits),
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
    pub fn prepare_send(&mut self, train: Train, to: Destination, socket: Fd) -> squeue::Entry {
        let id = train.id();
        let place = usize::from(id);
        let header = self.messages[place].prepare(&train, to.endpoint);
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
    pub fn sent(&mut self, id: u16, result: i32, sockets: &WorkerSockets, counters: &Counters) {
        let Some((train, to)) = self.sends.get_mut(usize::from(id)).and_then(Option::take) else {
            return;
        };
        self.in_flight -= 1;
        if result >= 0 {
            counters.trains_sent.add(1);
            counters.packets_sent.add(train.count() as u64);
            counters.bytes_sent.add(train.bytes().len() as u64);
        } else {
            let socket = sockets.sender(to.from);
            let has_no_room = self
                .paths
                .refused(&train, to.endpoint, -result, socket, counters);
            if has_no_room {
                self.blocked = Some(to.from);
            }
        }
        self.free_trains.push(train);
    }

    /// How long trains toward `destination` may be.
    #[inline]
    pub fn limits(&self, destination: SocketAddr) -> Limits {
        self.paths.get(destination)
    }

    /// Forgets what has been learnt.
    pub fn reset_limits(&mut self) {
        self.paths.reset();
    }
}
