//! Trains and frames on their way out: free, or waiting for room to be sent.

use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd;

use super::held::{HELD_TRAINS_MAX, Held};
use crate::io::message::{self, SendMessage};
use crate::io::refusal::PathLimits;
use crate::packet::coalesce::{FLOWS_MAX, Frame};
use crate::packet::train::{Limits, Train};
use crate::worker::counters::Counters;
use crate::worker::outbound::OPEN_TRAINS_MAX;

/// Trains per worker: those that can be open, and those that can wait for room.
pub const TRAINS: usize = OPEN_TRAINS_MAX + HELD_TRAINS_MAX;

/// Frames per worker: those that can be open, and one that passes by.
pub const FRAMES: usize = FLOWS_MAX + 1;

/// See the module's documentation.
pub struct Output {
    /// Last in, first out: the buffer used last is warmest.
    pub free_trains: Vec<Train>,
    pub free_frames: Vec<Frame>,
    pub limits: PathLimits,
    message: SendMessage,
    held: Held,
    /// The socket's send buffer is full: nothing is tried until it is not.
    blocked: bool,
}

/// What became of a train.
enum Outcome {
    /// It is sent, or counted for lost.
    Settled,
    /// The socket's send buffer has no room for it.
    NoRoom(Train),
}

impl Output {
    pub fn new(limits: Limits) -> Self {
        Self {
            free_trains: (0..TRAINS as u16).rev().map(Train::new).collect(),
            free_frames: (0..FRAMES as u16).rev().map(Frame::new).collect(),
            limits: PathLimits::new(limits),
            message: SendMessage::new(),
            held: Held::new(),
            blocked: false,
        }
    }

    /// Whether trains wait for room, or would have to.
    #[inline]
    pub fn is_blocked(&self) -> bool {
        self.blocked
    }

    /// Sends a train, or keeps it until there is room.
    #[inline]
    pub fn send(&mut self, train: Train, to: SocketAddr, socket: &impl AsFd, counters: &Counters) {
        if train.count() == 0 {
            self.free_trains.push(train);
        } else if self.blocked {
            self.hold(train, to, counters);
        } else if let Outcome::NoRoom(train) = self.try_send(train, to, socket, counters) {
            self.blocked = true;
            self.hold(train, to, counters);
        }
    }

    #[inline]
    fn try_send(
        &mut self,
        train: Train,
        to: SocketAddr,
        socket: &impl AsFd,
        counters: &Counters,
    ) -> Outcome {
        match message::send(socket.as_fd(), &mut self.message, &train, to) {
            Ok(()) => {
                counters.trains_sent.add(1);
                counters.packets_sent.add(train.count() as u64);
                counters.bytes_sent.add(train.bytes().len() as u64);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                return Outcome::NoRoom(train);
            }
            Err(error) => {
                let errno = error.raw_os_error().unwrap_or(0);
                self.blocked |= self.limits.refused(&train, to, errno, socket, counters);
            }
        }
        self.free_trains.push(train);
        Outcome::Settled
    }

    #[cold]
    fn hold(&mut self, train: Train, to: SocketAddr, counters: &Counters) {
        if let Err(train) = self.held.push(train, to) {
            self.drop_full(train, counters);
        }
    }

    fn drop_full(&mut self, train: Train, counters: &Counters) {
        counters.drop_send_full.add(train.count() as u64);
        self.free_trains.push(train);
    }

    /// Goes on: the kernel says that there is room.
    ///
    /// Whom it refuses in spite of that is dropped, so that no train waits
    /// forever for what may never come.
    pub fn resume(&mut self, socket: &impl AsFd, counters: &Counters) {
        self.blocked = false;
        let mut is_first = true;
        while !self.blocked
            && let Some((train, to)) = self.held.pop()
        {
            if let Outcome::NoRoom(train) = self.try_send(train, to, socket, counters) {
                self.blocked = true;
                if is_first {
                    self.drop_full(train, counters);
                } else {
                    self.held.put_back(train, to);
                }
            }
            is_first = false;
        }
    }

    /// Gives up what waits for room.
    pub fn drop_held(&mut self, counters: &Counters) {
        while let Some((train, _)) = self.held.pop() {
            self.drop_full(train, counters);
        }
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
