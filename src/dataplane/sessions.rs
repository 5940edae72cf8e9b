//! A worker's side of WireGuard's sessions: it seals and opens with those that are there,
//! asks the handshake thread for those that are not, and holds packets meanwhile.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crossbeam_channel::{Receiver, Sender, bounded};
use nix::sys::eventfd::EventFd;

use super::table::Table;
use crate::clock;
use crate::packet::batch::{Batch, NextHop};
use crate::wire::Endpoint;
use crate::wire::wireguard::sessions::{PeerSessions, SessionMap, WorkerRequest};

/// Bytes of the packets that a worker holds for peers without a session, and how many they
/// may be.
const HELD_BYTES_MAX: usize = 256 << 10;
const HELD_MAX: usize = 128;

/// How many of them may be for one peer, so that one that is gone leaves room for others.
const HELD_PER_PEER_MAX: usize = 32;

/// How long they are held: no handshake is tried for longer (the paper's Rekey-Attempt-Time).
const HELD_NS_MAX: u64 = 90_000_000_000;

/// Strays that may wait for a worker.
const STRAYS_MAX: usize = 8;

/// A datagram that has come to the handshake socket, and its sender.
type Stray = (Endpoint, Box<[u8]>);

/// What the handshake thread has for a worker. Who puts something in wakes the worker then.
#[derive(Debug)]
pub struct Inbox {
    has_sessions: AtomicBool,
    strays: (Sender<Stray>, Receiver<Stray>),
}

impl Default for Inbox {
    fn default() -> Self {
        Self {
            has_sessions: AtomicBool::new(false),
            strays: bounded(STRAYS_MAX),
        }
    }
}

impl Inbox {
    /// Says that there are sessions that were asked for.
    pub fn put_sessions(&self) {
        self.has_sessions.store(true, Ordering::Release);
    }

    /// Whether there are, since the last call.
    pub fn take_sessions(&self) -> bool {
        self.has_sessions.swap(false, Ordering::AcqRel)
    }

    /// Leaves a datagram to be taken in. It is lost if some wait already.
    pub fn put_stray(&self, sender: Endpoint, datagram: &[u8]) {
        let (strays, _) = &self.strays;
        if !strays.is_full() {
            let _ = strays.try_send((sender, datagram.into()));
        }
    }

    /// The datagrams that were left.
    pub fn strays(&self) -> impl Iterator<Item = Stray> {
        self.strays.1.try_iter().take(STRAYS_MAX)
    }
}

/// What workers and the handshake thread have in common.
#[derive(Clone, Debug)]
pub struct Sessions {
    /// All sessions, by this host's index.
    pub map: Arc<SessionMap>,
    /// To the handshake thread.
    pub requests: Sender<WorkerRequest>,
    /// Wakes it.
    pub wake: Arc<EventFd>,
}

impl Sessions {
    /// Asks for a session with a peer, once until the handshake thread has seen it.
    pub fn request(&self, peer: &Arc<PeerSessions>) {
        if peer.is_wanted.swap(true, Ordering::AcqRel) {
            return;
        }
        if !self.tell(WorkerRequest::Session(Arc::clone(peer))) {
            // The next packet asks again.
            peer.is_wanted.store(false, Ordering::Release);
        }
    }

    /// Passes a handshake message on that has come here: the kernel may have merged it with
    /// others. A flood of them leaves room for what workers ask for.
    #[cold]
    pub fn pass_on(&self, sender: Endpoint, message: &[u8]) {
        let room = self.requests.capacity().unwrap_or(0) / 2;
        if self.requests.len() < room {
            self.tell(WorkerRequest::Message(sender, message.into()));
        }
    }

    /// Says that a peer has a session now, for packets that other workers hold.
    #[cold]
    pub fn confirmed(&self, peer: &Arc<PeerSessions>) {
        self.tell(WorkerRequest::Session(Arc::clone(peer)));
    }

    /// Whether there was room for what the handshake thread is told.
    fn tell(&self, request: WorkerRequest) -> bool {
        let is_told = self.requests.try_send(request).is_ok();
        if is_told {
            // The counter cannot overflow: the thread empties it each time.
            let _ = self.wake.write(1);
        }
        is_told
    }

    /// Seals a batch with its peer's session, and returns where it goes; `None` if there is
    /// no session any more.
    pub fn seal(&self, batch: &mut Batch, table: &Table) -> Option<Endpoint> {
        let peer = table.at(batch.next_hop())?.sessions.as_ref()?;
        let now_ns = clock::now_ns();
        let segment_bytes = batch.segment_bytes();
        let session = peer.usable(now_ns);
        let sealed = session
            .as_ref()
            .map(|session| session.seal(batch.bytes_mut(), segment_bytes));
        if !matches!(sealed, Some(Ok(()))) {
            self.request(peer);
            return None;
        }
        peer.note_sent(now_ns, true);
        peer.endpoint.load().as_deref().copied()
    }
}

/// Vnet packets that wait for a session. Its memory is taken when the first one does, and kept.
#[derive(Debug, Default)]
pub struct Held {
    bytes: Vec<u8>,
    packets: Vec<HeldPacket>,
}

#[derive(Debug)]
struct HeldPacket {
    /// Where it ends.
    end: usize,
    next_hop: NextHop,
    since_ns: u64,
}

impl Held {
    /// Holds one more, unless too many wait for the same peer. Where there is no room for
    /// it, those before it are dropped: what is new is of more use. `dropped` is told of each
    /// that is, and its peer.
    #[cold]
    pub fn push(
        &mut self,
        vnet_packet: &[u8],
        next_hop: NextHop,
        since_ns: u64,
        dropped: impl Fn(NextHop, &[u8]),
    ) {
        let same = self.packets.iter().filter(|one| one.next_hop == next_hop);
        if same.count() >= HELD_PER_PEER_MAX {
            dropped(next_hop, vnet_packet);
            return;
        }
        if self.packets.len() == HELD_MAX || self.bytes.len() + vnet_packet.len() > HELD_BYTES_MAX {
            self.drop_all(dropped);
        }
        self.bytes.reserve_exact(HELD_BYTES_MAX - self.bytes.len());
        self.packets.reserve_exact(HELD_MAX - self.packets.len());
        self.bytes.extend_from_slice(vnet_packet);
        self.packets.push(HeldPacket {
            end: self.bytes.len(),
            next_hop,
            since_ns,
        });
    }

    /// The vnet packets that are not too old, in order, each with the time since when it is
    /// held. `dropped` is told of each of the others, and its peer.
    pub fn vnet_packets(
        &mut self,
        now_ns: u64,
        dropped: impl Fn(NextHop, &[u8]),
    ) -> impl Iterator<Item = (&mut [u8], u64)> {
        let mut rest = &mut self.bytes[..];
        let mut start = 0;
        self.packets.iter().filter_map(move |one| {
            let (packet, after) = std::mem::take(&mut rest).split_at_mut(one.end - start);
            (rest, start) = (after, one.end);
            if now_ns.saturating_sub(one.since_ns) >= HELD_NS_MAX {
                dropped(one.next_hop, packet);
                return None;
            }
            Some((packet, one.since_ns))
        })
    }

    /// Drops all. `dropped` is told of each.
    pub fn drop_all(&mut self, dropped: impl Fn(NextHop, &[u8])) {
        let mut start = 0;
        for one in &self.packets {
            dropped(one.next_hop, &self.bytes[start..one.end]);
            start = one.end;
        }
        self.clear();
    }

    /// Forgets all.
    pub fn clear(&mut self) {
        self.bytes.clear();
        self.packets.clear();
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::net::SocketAddr;

    use super::*;

    fn packets(held: &mut Held, now_ns: u64, dropped: impl Fn(NextHop, &[u8])) -> Vec<Vec<u8>> {
        let packets = held.vnet_packets(now_ns, dropped);
        packets.map(|(packet, _)| packet.to_vec()).collect()
    }

    /// The peers of packets that were dropped.
    #[derive(Default)]
    struct Dropped(RefCell<Vec<NextHop>>);

    impl Dropped {
        fn note(&self, next_hop: NextHop) {
            self.0.borrow_mut().push(next_hop);
        }

        fn take(&self) -> Vec<NextHop> {
            self.0.take()
        }
    }

    #[test]
    fn what_is_held_comes_out_in_order() {
        let (mut held, dropped) = (Held::default(), Dropped::default());
        for packet in [&[1; 3][..], &[2], &[3; 2]] {
            held.push(packet, 0, 1, |peer, _| dropped.note(peer));
        }
        let all = [vec![1; 3], vec![2], vec![3; 2]];
        assert_eq!(packets(&mut held, 1, |peer, _| dropped.note(peer)), all);
        held.clear();
        assert!(packets(&mut held, 1, |peer, _| dropped.note(peer)).is_empty());
        assert!(dropped.take().is_empty());
    }

    #[test]
    fn what_is_new_takes_the_place_of_what_is_old() {
        let (mut held, dropped) = (Held::default(), Dropped::default());
        let peers: Vec<_> = (0..=HELD_MAX as NextHop).collect();
        for &peer in &peers {
            held.push(&[1], peer, 1, |peer, _| dropped.note(peer));
        }
        assert_eq!(dropped.take(), peers[..HELD_MAX]);
        held.push(&vec![2; HELD_BYTES_MAX], 0, 1, |peer, _| dropped.note(peer));
        assert_eq!(dropped.take(), [HELD_MAX as NextHop]);
        assert_eq!(packets(&mut held, 1, |peer, _| dropped.note(peer)).len(), 1);
        assert!(held.bytes.capacity() < 2 * HELD_BYTES_MAX);
    }

    #[test]
    fn a_peer_that_is_gone_leaves_room_for_others_and_is_not_waited_for_in_vain() {
        let (mut held, dropped) = (Held::default(), Dropped::default());
        held.push(&[1], 1, 1, |peer, _| dropped.note(peer));
        for _ in 0..1000 {
            held.push(&[2], 2, 2, |peer, _| dropped.note(peer));
        }
        assert_eq!(held.packets.len(), 1 + HELD_PER_PEER_MAX);
        assert_eq!(dropped.take(), vec![2; 1000 - HELD_PER_PEER_MAX]);
        let later = packets(&mut held, 1 + HELD_NS_MAX, |peer, _| dropped.note(peer));
        assert_eq!(later, vec![vec![2]; HELD_PER_PEER_MAX]);
        assert_eq!(dropped.take(), [1]);
    }

    #[test]
    fn strays_are_few_and_sessions_are_told_of_once() {
        let inbox = Inbox::default();
        for number in 0..100 {
            let sender = SocketAddr::from(([10, 0, 0, 1], 1));
            inbox.put_stray(sender.into(), &[number]);
            inbox.put_sessions();
        }
        assert_eq!(inbox.strays().count(), STRAYS_MAX);
        assert_eq!(inbox.strays().count(), 0);
        assert!(inbox.take_sessions() && !inbox.take_sessions());
    }
}
