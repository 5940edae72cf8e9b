//! A worker's side of WireGuard's sessions: it seals and opens with those that are there,
//! asks the handshake thread for those that are not, and holds packets meanwhile.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use crossbeam_channel::Sender;
use nix::sys::eventfd::EventFd;

use super::table::Table;
use crate::clock;
use crate::counters::Counters;
use crate::packet::batch::Batch;
use crate::wire::wireguard::sessions::{PeerSessions, SessionMap, WorkerRequest};

/// Bytes of the packets that a worker holds for peers without a session, and how many they
/// may be.
const HELD_BYTES_MAX: usize = 256 << 10;
const HELD_MAX: usize = 128;

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
    /// others.
    #[cold]
    pub fn pass_on(&self, sender: SocketAddr, message: &[u8]) {
        self.tell(WorkerRequest::Message(sender, message.into()));
    }

    /// Says that a peer has a session now, for packets that other workers hold.
    #[cold]
    pub fn confirmed(&self, peer: &Arc<PeerSessions>) {
        self.tell(WorkerRequest::Session(Arc::clone(peer)));
    }

    /// Whether there was room for what the handshake thread is told.
    fn tell(&self, request: WorkerRequest) -> bool {
        let is_told = self.requests.try_send(request).is_ok();
        // The counter cannot overflow: the thread empties it each time.
        let _ = self.wake.write(1);
        is_told
    }

    /// Seals a batch with its peer's session, and returns where it goes; `None` if there is
    /// no session any more.
    pub fn seal(&self, batch: &mut Batch, table: &Table) -> Option<SocketAddr> {
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
    /// Where each ends.
    ends: Vec<usize>,
}

impl Held {
    /// Holds one more. Where there is no room, those before it are dropped and counted: what
    /// is new is of more use.
    #[cold]
    pub fn push(&mut self, vnet_packet: &[u8], counters: &Counters) {
        if self.ends.len() == HELD_MAX || self.bytes.len() + vnet_packet.len() > HELD_BYTES_MAX {
            counters.drop_no_session.add(self.ends.len() as u64);
            self.clear();
        }
        self.bytes.reserve_exact(HELD_BYTES_MAX - self.bytes.len());
        self.ends.reserve_exact(HELD_MAX - self.ends.len());
        self.bytes.extend_from_slice(vnet_packet);
        self.ends.push(self.bytes.len());
    }

    /// The vnet packets, in order.
    pub fn vnet_packets(&mut self) -> impl Iterator<Item = &mut [u8]> {
        let mut rest = &mut self.bytes[..];
        let mut start = 0;
        self.ends.iter().map(move |&end| {
            let (packet, after) = std::mem::take(&mut rest).split_at_mut(end - start);
            (rest, start) = (after, end);
            packet
        })
    }

    /// Forgets all.
    pub fn clear(&mut self) {
        self.bytes.clear();
        self.ends.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_held_comes_out_in_order() {
        let (mut held, counters) = (Held::default(), Counters::default());
        for packet in [&[1; 3][..], &[2], &[3; 2]] {
            held.push(packet, &counters);
        }
        let packets: Vec<_> = held.vnet_packets().map(|packet| packet.to_vec()).collect();
        assert_eq!(packets, [vec![1; 3], vec![2], vec![3; 2]]);
        held.clear();
        assert!(held.vnet_packets().next().is_none());
        assert_eq!(counters.drop_no_session.get(), 0);
    }

    #[test]
    fn what_is_new_takes_the_place_of_what_is_old() {
        let (mut held, counters) = (Held::default(), Counters::default());
        for _ in 0..=HELD_MAX {
            held.push(&[1], &counters);
        }
        assert_eq!(counters.drop_no_session.get(), HELD_MAX as u64);
        held.push(&vec![2; HELD_BYTES_MAX], &counters);
        assert_eq!(counters.drop_no_session.get(), HELD_MAX as u64 + 1);
        assert_eq!(held.vnet_packets().count(), 1);
        assert!(held.bytes.capacity() < 2 * HELD_BYTES_MAX);
    }
}
