//! The sockets that a worker receives from, and whose turn it is: the one on the port that
//! all senders share, and a few that are connected to one busy sender each.
//!
//! The worker tells which senders are peers ([`Receivers::note_sender`]). Each time that so
//! many bytes have come ([`ROUND_BYTES`]), one of them that has sent a good part of all gets
//! a socket of its own. If all places are taken, the one that has brought the least is given
//! up, if that is less than half.
//!
//! Nothing is lost or overtaken at a change. A new socket is read once the shared one has
//! been found empty: what came before is in there. One that is given up is disconnected, read
//! until it is empty, before any other, and then closed.

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

/// Most receives from the shared socket until all is read that was in it at some time: the
/// kernel doubles the size of the buffer, and counts more than this for each datagram.
const RECEIVES_MAX: usize = 2 * SOCKET_BUFFER_BYTES / 512;

/// A set of receivers, one bit each.
type Bits = u8;

const fn bit(receiver: usize) -> Bits {
    1 << receiver
}

/// What becomes of a connected socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// It is read when the shared one has been found empty, or been read so often.
    New(usize),
    /// It is read in its turn.
    Open,
    /// It is read until it is empty.
    Last,
}

#[derive(Debug)]
struct Connected {
    socket: Arc<Socket>,
    sender: SocketAddr,
    stage: Stage,
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
                self.count_down();
            }
        } else if let Some(Some(connected)) = self.connected.get_mut(receiver - 1) {
            connected.bytes += bytes;
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
        } else if let Some(place) = self.connected.get_mut(empty - 1)
            && let Some(connected) = place.take_if(|it| it.stage == Stage::Last)
        {
            self.sockets.close(&connected.socket);
        }
        self.update();
    }

    #[cold]
    fn count_down(&mut self) {
        for connected in self.connected.iter_mut().flatten() {
            match connected.stage {
                Stage::New(1) => self.open_new(),
                Stage::New(left) => connected.stage = Stage::New(left - 1),
                Stage::Open | Stage::Last => continue,
            }
            return self.update();
        }
    }

    /// What came before is read: the new one's turn has come.
    fn open_new(&mut self) {
        for connected in self.connected.iter_mut().flatten() {
            if matches!(connected.stage, Stage::New(_)) {
                connected.stage = match self.is_quiet {
                    true => Stage::Last,
                    false => Stage::Open,
                };
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
        let last = at(|stage| stage == Stage::Last);
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
        // One that is connected to it, and brings nothing, is of no use: this host would
        // answer from another address by now.
        let is_its = |it: &Option<Connected>| it.as_ref().is_some_and(|it| it.sender == sender);
        let place = self.connected.iter().position(is_its);
        let place = place.or_else(|| self.connected.iter().position(Option::is_none));
        if let Some(place) = place
            && self.connected[place].is_none()
        {
            return self.connect(place, sender);
        }
        // It makes room for the next round.
        let place = place.or_else(|| (0..CONNECTED_MAX).min_by_key(|&place| brought[place]))?;
        if brought[place]? < lead_bytes / 2 {
            self.give_up(1 + place);
        }
        None
    }

    fn connect(&mut self, place: usize, sender: SocketAddr) -> Option<usize> {
        let socket = match self.sockets.connect(sender) {
            Ok(socket) => socket,
            Err(error) => {
                tracing::debug!("no socket of its own for {sender}: {error}");
                return None;
            }
        };
        *self.connected.get_mut(place)? = Some(Connected {
            socket,
            sender,
            stage: Stage::New(RECEIVES_MAX),
            bytes: 0,
        });
        let receiver = 1 + place;
        // Either may have something by now.
        self.ready |= bit(SHARED) | bit(receiver);
        self.update();
        Some(receiver)
    }

    /// Receives nothing new by a connected socket, and reads what it holds.
    pub fn give_up(&mut self, receiver: usize) {
        if let Some(Some(connected)) = self.connected.get_mut(receiver.wrapping_sub(1)) {
            if let Err(error) = connected::disconnect(&connected.socket, connected.sender) {
                tracing::debug!("{} keeps its socket for now: {error}", connected.sender);
            }
            if connected.stage == Stage::Open {
                connected.stage = Stage::Last;
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

impl Drop for Receivers {
    fn drop(&mut self) {
        for connected in self.connected.iter().flatten() {
            self.sockets.close(&connected.socket);
        }
    }
}
