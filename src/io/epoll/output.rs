//! Trains and frames on their way out.

use std::os::fd::AsFd;

use crate::counters::Counters;
use crate::io::engine::OPEN_TRAINS_MAX;
use crate::io::engine::{Destination, Port};
use crate::io::message::{self, SendMessage};
use crate::io::path_limits::PathLimits;
use crate::io::udp::WorkerSockets;
use crate::packet::coalesce::{FLOWS_MAX, Frame};
use crate::packet::train::{Limits, Train};

/// Trains per worker: those that can be open.
pub const TRAINS: usize = OPEN_TRAINS_MAX;

/// Frames per worker: those that can be open, and one that passes by.
pub const FRAMES: usize = FLOWS_MAX + 1;

/// See the module's documentation.
pub struct Output {
    /// Last in, first out: the buffer used last is warmest.
    pub free_trains: Vec<Train>,
    pub free_frames: Vec<Frame>,
    pub limits: PathLimits,
    message: SendMessage,
    /// The socket on this port has a full send buffer: read no more frames until
    /// it is not.
    pub blocked: Option<Port>,
}

impl Output {
    pub fn new(limits: Limits) -> Self {
        Self {
            free_trains: (0..TRAINS as u16).rev().map(Train::new).collect(),
            free_frames: (0..FRAMES as u16).rev().map(Frame::new).collect(),
            limits: PathLimits::new(limits),
            message: SendMessage::new(),
            blocked: None,
        }
    }

    /// Sends a train. What the socket has no room for is dropped.
    #[inline]
    pub fn send(
        &mut self,
        train: Train,
        to: Destination,
        sockets: &WorkerSockets,
        counters: &Counters,
    ) {
        if train.count() > 0 {
            let socket = sockets.sender(to.from);
            match message::send(socket.as_fd(), &mut self.message, &train, to.endpoint) {
                Ok(()) => {
                    counters.trains_sent.add(1);
                    counters.packets_sent.add(train.count() as u64);
                    counters.bytes_sent.add(train.bytes().len() as u64);
                }
                Err(error) => {
                    let errno = error.raw_os_error().unwrap_or(0);
                    let has_no_room =
                        self.limits
                            .refused(&train, to.endpoint, errno, socket, counters);
                    if has_no_room {
                        self.blocked = Some(to.from);
                    }
                }
            }
        }
        self.free_trains.push(train);
    }

    /// Writes a frame to the TUN queue, which takes it at once or not at all.
    #[inline]
    pub fn write(&mut self, frame: Frame, queue: &impl AsFd, counters: &Counters) {
        match nix::unistd::write(queue, frame.bytes()) {
            Ok(_) => counters.tun_frames_written.add(1),
            Err(errno) => match errno as i32 {
                libc::EAGAIN | libc::ENOBUFS | libc::ENOMEM => counters.drop_tun_full.add(1),
                _ => counters.drop_tun_error.add(1),
            },
        }
        self.free_frames.push(frame);
    }
}
