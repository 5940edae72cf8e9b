//! The sockets that a worker receives from, and which is read next: the one on the port that
//! all senders share, and a few that are connected to one busy sender each.
//!
//! The worker tells which senders are peers ([`Receivers::note_sender`]). Each time that so
//! many bytes have come ([`ROUND_BYTES`]), one of them that has sent a good part of all gets
//! a socket of its own. If all slots are taken, the one that has brought the least is given
//! up, if that is less than half.
//!
//! Datagrams of one sender stay in order at a change. A new socket is read once the shared one
//! has been found empty: what came before is in there. One that is given up is disconnected,
//! read until it is empty, before any other, and then closed. Either ends with as many bytes as
//! a receive buffer can hold, lest somebody who sends all the time keeps the worker at it. The
//! only datagrams that are lost are those for which the kernel had looked up the socket before
//! it was disconnected, and which it delivers after it was found empty: microseconds.

use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use socket2::Socket;

use super::udp::{SOCKET_BUFFER_BYTES, WorkerSockets, connected};

/// Most sockets with one sender. Each is one more to read when all have something, and has a
/// receive buffer of its own.
const CONNECTED_MAX: usize = 4;

/// Most sockets in all.
pub const RECEIVERS: usize = 1 + CONNECTED_MAX;

/// The shared one; the others follow.
const SHARED: usize = 0;

/// Bytes received between two decisions: at full rate a tenth of a second's.
pub const ROUND_BYTES: usize = 64 << 20;

/// Bytes to read from a socket until all is read that was in it at some time: the kernel
/// doubles the size of the buffer.
const HELD_BYTES_MAX: usize = 2 * SOCKET_BUFFER_BYTES;

/// What the kernel counts for a datagram at least (`truesize` of a `struct sk_buff`).
const DATAGRAM_BYTES_MIN: usize = 512;

/// A set of receivers, one bit each.
type Bits = u8;

const fn bit(receiver: usize) -> Bits {
    1 << receiver
}

/// What becomes of a connected socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// It is read when the shared one has been found empty, or so many bytes have come by it.
    New(usize),
    /// It is read in its turn.
    Open,
    /// It is disconnected, and read until it is empty, or so many bytes have come by it.
    Last(usize),
}

#[derive(Debug)]
struct Connected {
    socket: Arc<Socket>,
    sender: SocketAddr,
    stage: Stage,
    /// It is of no use. While it is new it waits for its turn, as all else would be overtaken.
    is_given_up: bool,
    /// What it has brought in this round.
    bytes: usize,
}

/// See the module's documentation.
#[derive(Debug)]
pub struct Receivers {
    sockets: Arc<WorkerSockets>,
    connected: [Option<Connected>; CONNECTED_MAX],
    /// Those that may have datagrams: the kernel has said so, and they have not been found
    /// empty since.
    ready: Bits,
    /// Those that are read at this stage.
    readable: Bits,
    /// Those that are read once the shared one has been found empty.
    new: Bits,
    /// The one that was read last.
    last: usize,
    /// Nothing new is received any more.
    is_quiet: bool,
    /// What all have brought in this round.
    round_bytes: usize,
    /// The sender of the shared socket's that may have sent the most, and by how many bytes
    /// at least it is ahead of all others together.
    busiest: Option<SocketAddr>,
    lead_bytes: usize,
}

impl Receivers {
    pub fn new(sockets: Arc<WorkerSockets>) -> Self {
        Self {
            sockets,
            connected: [const { None }; CONNECTED_MAX],
            // It is tried before it is waited for.
            ready: bit(SHARED),
            readable: bit(SHARED),
            new: 0,
            last: SHARED,
            is_quiet: false,
            round_bytes: 0,
            busiest: None,
            lead_bytes: 0,
        }
    }

    /// Whether one of them is to be read.
    #[inline]
    pub fn is_ready(&self) -> bool {
        self.ready & self.readable != 0
    }

    /// The one to read next: they take turns.
    #[inline]
    pub fn next(&self) -> Option<usize> {
        let ready = self.ready & self.readable;
        // Those behind the last one, and then from the first on.
        let behind = ready & (Bits::MAX << self.last << 1);
        let first = if behind != 0 { behind } else { ready };
        (first != 0).then_some(first.trailing_zeros() as usize)
    }

    /// The socket of a receiver, if there is one.
    #[inline]
    pub fn socket(&self, receiver: usize) -> Option<BorrowedFd<'_>> {
        if receiver == SHARED {
            return Some(self.sockets.receive.as_fd());
        }
        let connected = self.connected.get(receiver - 1)?.as_ref()?;
        Some(connected.socket.as_fd())
    }

    /// Whether all senders share it.
    #[inline]
    pub fn is_shared(receiver: usize) -> bool {
        receiver == SHARED
    }

    /// Those that have been found empty, and are to be waited for.
    #[inline]
    pub fn awaited(&self) -> Bits {
        self.readable & !self.ready
    }

    /// The kernel says that one of them has something.
    #[inline]
    pub fn set_ready(&mut self, receiver: usize) {
        self.ready |= bit(receiver);
    }

    /// One of them has brought so many bytes.
    #[inline]
    pub fn received(&mut self, receiver: usize, bytes: usize) {
        self.last = receiver;
        self.round_bytes += bytes;
        if receiver == SHARED {
            if self.new != 0 {
                self.count_down_new(bytes);
            }
        } else if let Some(Some(connected)) = self.connected.get_mut(receiver - 1) {
            connected.bytes += bytes;
            if let Stage::Last(left) = &mut connected.stage {
                *left = left.saturating_sub(bytes.max(DATAGRAM_BYTES_MIN));
                if *left == 0 {
                    self.move_on(receiver);
                }
            }
        }
    }

    /// One of them has nothing at present.
    #[inline]
    pub fn found_empty(&mut self, receiver: usize) {
        self.ready &= !bit(receiver);
        if self.connected.iter().any(Option::is_some) {
            self.move_on(receiver);
        }
    }

    #[cold]
    fn move_on(&mut self, empty: usize) {
        if empty == SHARED {
            self.open_new();
        } else if let Some(slot) = self.connected.get_mut(empty - 1)
            && let Some(connected) = slot.take_if(|it| matches!(it.stage, Stage::Last(_)))
        {
            self.sockets.close(&connected.socket);
        }
        self.update();
    }

    /// The shared one has brought so many bytes.
    #[cold]
    fn count_down_new(&mut self, bytes: usize) {
        let mut is_read = false;
        for connected in self.connected.iter_mut().flatten() {
            if let Stage::New(left) = &mut connected.stage {
                *left = left.saturating_sub(bytes.max(DATAGRAM_BYTES_MIN));
                is_read |= *left == 0;
            }
        }
        if is_read {
            self.open_new();
            self.update();
        }
    }

    /// What came before is read: the new one's turn has come. There is one at the most.
    fn open_new(&mut self) {
        for connected in self.connected.iter_mut().flatten() {
            if matches!(connected.stage, Stage::New(_)) {
                connected.open();
            }
        }
    }

    /// Brings [`Self::readable`] up to date.
    fn update(&mut self) {
        let at = |is: fn(Stage) -> bool| {
            let numbered = self.connected.iter().zip(1..);
            let there = numbered.filter_map(|(it, receiver)| Some((it.as_ref()?, receiver)));
            let chosen = there.filter(|(it, _)| is(it.stage));
            chosen.fold(0, |bits, (_, receiver)| bits | bit(receiver))
        };
        let last = at(|stage| matches!(stage, Stage::Last(_)));
        let open = at(|stage| stage == Stage::Open);
        self.new = at(|stage| matches!(stage, Stage::New(_)));
        self.readable = match (last, self.is_quiet) {
            (0, false) => bit(SHARED) | open,
            (0, true) if self.new != 0 => bit(SHARED),
            (last, _) => last,
        };
    }

    /// Takes note that a peer has sent so many bytes, through the shared socket or not.
    /// Returns a receiver that is new.
    #[inline]
    pub fn note_sender(
        &mut self,
        sender: SocketAddr,
        bytes: usize,
        is_shared: bool,
    ) -> Option<usize> {
        if is_shared {
            // The majority vote of Boyer and Moore: what is left is a lower bound.
            if self.busiest == Some(sender) {
                self.lead_bytes += bytes;
            } else if bytes <= self.lead_bytes {
                self.lead_bytes -= bytes;
            } else {
                self.busiest = Some(sender);
                self.lead_bytes = bytes - self.lead_bytes;
            }
        }
        if self.round_bytes < ROUND_BYTES {
            return None;
        }
        self.end_round()
    }

    #[cold]
    fn end_round(&mut self) -> Option<usize> {
        let round_bytes = std::mem::take(&mut self.round_bytes);
        let lead_bytes = std::mem::take(&mut self.lead_bytes);
        let busiest = self.busiest.take();
        let mut brought = self.connected.iter_mut();
        let brought: [_; CONNECTED_MAX] = std::array::from_fn(|_| {
            let connected = brought.next()?.as_mut()?;
            Some(std::mem::take(&mut connected.bytes))
        });
        if self.is_quiet || self.new != 0 || lead_bytes < round_bytes / 8 {
            return None;
        }
        let sender = busiest?;
        if self
            .connected
            .iter()
            .flatten()
            .any(|it| it.sender == sender)
        {
            // It sends to another address than this host would answer from.
            return None;
        }
        if let Some(slot) = self.connected.iter().position(Option::is_none) {
            return self.connect(slot, sender);
        }
        // The one that has brought the least makes room for the next round.
        let slot = (0..CONNECTED_MAX).min_by_key(|&slot| brought[slot])?;
        if brought[slot]? < lead_bytes / 2 {
            self.give_up(1 + slot);
        }
        None
    }

    fn connect(&mut self, slot: usize, sender: SocketAddr) -> Option<usize> {
        let socket = match self.sockets.connect(sender) {
            Ok(socket) => socket,
            Err(error) => {
                tracing::debug!("no socket of its own for {sender}: {error}");
                return None;
            }
        };
        *self.connected.get_mut(slot)? = Some(Connected {
            socket,
            sender,
            stage: Stage::New(HELD_BYTES_MAX),
            is_given_up: false,
            bytes: 0,
        });
        let receiver = 1 + slot;
        // Either may have something by now.
        self.ready |= bit(SHARED) | bit(receiver);
        self.update();
        Some(receiver)
    }

    /// Receives nothing new by a connected socket, and reads what it holds.
    pub fn give_up(&mut self, receiver: usize) {
        if let Some(Some(connected)) = self.connected.get_mut(receiver.wrapping_sub(1)) {
            connected.is_given_up = true;
            if connected.stage == Stage::Open {
                connected.open();
            }
            self.ready |= bit(receiver);
            self.update();
        }
    }

    /// Receives nothing new, and reads what connected sockets hold: nobody else can.
    pub fn quiesce(&mut self) {
        self.is_quiet = true;
        (1..RECEIVERS).for_each(|receiver| self.give_up(receiver));
        if self.new != 0 {
            self.ready |= bit(SHARED);
        }
        self.update();
    }
}

impl Connected {
    /// What came before is read. Reads it in its turn, or for the last time.
    fn open(&mut self) {
        self.stage = Stage::Open;
        if self.is_given_up {
            if let Err(error) = connected::disconnect(&self.socket, self.sender) {
                tracing::debug!("{} cannot be disconnected: {error}", self.sender);
            }
            self.stage = Stage::Last(HELD_BYTES_MAX);
        }
    }
}

impl Drop for Receivers {
    fn drop(&mut self) {
        for connected in self.connected.iter().flatten() {
            self.sockets.close(&connected.socket);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;

    use super::*;
    use crate::io::udp::{UdpOffloads, open};
    use crate::wire::Mode;

    /// Of the receives here.
    const BYTES: usize = 64_000;

    /// A sender has just got a socket, which is this receiver.
    fn with_new() -> (Receivers, usize) {
        let free = UdpSocket::bind("127.0.0.1:0").unwrap();
        let listen = free.local_addr().unwrap();
        drop(free);
        let none = UdpOffloads {
            segment: false,
            gro: false,
        };
        let mut sockets = open(listen, 1, none, Mode::Plain).unwrap();
        let mut receivers = Receivers::new(Arc::new(sockets.workers.remove(0)));
        receivers.received(SHARED, ROUND_BYTES);
        let sender = "127.0.0.1:7".parse().unwrap();
        let new = receivers.note_sender(sender, ROUND_BYTES, true).unwrap();
        assert_ne!(new, SHARED);
        (receivers, new)
    }

    /// How many receives from one socket there are until another's turn has come.
    fn receives(receivers: &mut Receivers, receiver: usize) -> usize {
        let most = HELD_BYTES_MAX / BYTES + 1;
        let count = (0..=most).take_while(|_| {
            let is_next = receivers.next() == Some(receiver);
            receivers.received(receiver, BYTES);
            is_next
        });
        let count = count.count();
        assert!(count <= most, "it has no end");
        count
    }

    #[test]
    fn a_new_socket_is_read_once_the_shared_one_was_found_empty() {
        let (mut receivers, new) = with_new();
        assert_eq!(receivers.next(), Some(SHARED));
        receivers.found_empty(SHARED);
        assert_eq!(receivers.next(), Some(new));
        receivers.set_ready(SHARED);
        receivers.received(new, 1);
        assert_eq!(receivers.next(), Some(SHARED), "they take turns");
    }

    #[test]
    fn a_shared_socket_that_never_runs_empty_keeps_no_new_one_from_being_read() {
        let (mut receivers, new) = with_new();
        assert!(receives(&mut receivers, SHARED) > 1);
        receivers.last = SHARED;
        assert_eq!(receivers.next(), Some(new));
    }

    #[test]
    fn a_socket_that_never_runs_empty_keeps_no_worker_from_stopping() {
        let (mut receivers, new) = with_new();
        receivers.found_empty(SHARED);
        receivers.quiesce();
        assert!(receives(&mut receivers, new) > 1);
        assert_eq!(
            (receivers.next(), receivers.socket(new).is_some()),
            (None, false)
        );
    }

    #[test]
    fn a_worker_that_stops_reads_what_came_before_a_new_socket_first() {
        let (mut receivers, new) = with_new();
        receivers.quiesce();
        assert_eq!(receivers.next(), Some(SHARED));
        receivers.found_empty(SHARED);
        assert_eq!(receivers.next(), Some(new));
        receivers.found_empty(new);
        assert_eq!(receivers.next(), None);
    }

    /// As when it cannot be waited for.
    #[test]
    fn a_new_socket_that_is_given_up_is_read_and_closed() {
        let (mut receivers, new) = with_new();
        receivers.give_up(new);
        assert_eq!(receivers.next(), Some(SHARED));
        receivers.found_empty(SHARED);
        assert_eq!(receivers.next(), Some(new));
        receivers.found_empty(new);
        assert!(receivers.socket(new).is_none());
    }
}
