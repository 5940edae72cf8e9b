//! Where it is counted what becomes of packets that wait.

use super::Queued;
use crate::capture::{Direction, Note, Reason as Dropped};
use crate::counters::Counters;
use crate::dataplane::table::Table;
use crate::dataplane::tapped;
use crate::packet::batch::{Batch, NextHop};
use crate::packet::fq_codel::{self, Reason};
use crate::wire::Mode;

/// See the module's documentation.
pub struct Account<'a> {
    /// Index of the worker.
    worker: usize,
    /// Their peers.
    pub(super) table: &'a Table,
    /// The worker's counters.
    counters: &'a Counters,
}

impl<'a> Account<'a> {
    /// With the counters of this worker.
    #[inline]
    pub fn new(worker: usize, table: &'a Table, counters: &'a Counters) -> Self {
        Self {
            worker,
            table,
            counters,
        }
    }

    /// A batch cannot be sealed.
    #[cold]
    pub(super) fn lost(&self, batch: &Batch) {
        let packets = batch.count() as u64;
        self.counters.drop_no_session.add(packets);
        let peer = self.table.at(batch.next_hop());
        if let Some(traffic) = peer.and_then(|peer| peer.traffic.get(self.worker)) {
            traffic.packets_unsent.add(packets);
            traffic.bytes_unsent.add(batch.bytes().len() as u64);
            traffic.drop_no_session.add(packets);
        }
    }

    /// A vnet packet was held for a session in vain.
    #[cold]
    pub fn given_up(&self, next_hop: NextHop, vnet_packet: &[u8]) {
        self.counters.drop_no_session.add(1);
        let note = || tapped::outbound(vnet_packet, Some(next_hop)).dropped(Dropped::NoSession);
        self.counters.tap.note(note);
        let peer = self.table.at(next_hop);
        if let Some(traffic) = peer.and_then(|peer| peer.traffic.get(self.worker)) {
            traffic.drop_no_session.add(1);
        }
    }

    /// A packet that has waited so long leaves.
    pub(super) fn left(&self, sojourn_ns: u64) {
        self.counters.queue_packets.add(1);
        self.counters.queue_sojourn_ns.add(sojourn_ns);
    }
}

impl fq_codel::Observer<Queued> for Account<'_> {
    fn dropped(&self, queued: &Queued, head: &[u8], packet_bytes: usize, reason: Reason) {
        let (counter, dropped) = match reason {
            Reason::Aqm => (&self.counters.drop_queue_aqm, Dropped::QueueAqm),
            Reason::Overlimit => (&self.counters.drop_queue_full, Dropped::QueueFull),
        };
        counter.add(1);
        // The table may have changed since, and have another peer there. One with sessions is
        // the same, wherever it has moved: all that waits leaves before another takes its place.
        let peer = self.table.at(queued.next_hop).filter(|peer| {
            peer.sessions.is_some() || peer.endpoint == Some(queued.to.endpoint.address)
        });
        self.counters.tap.note(|| Note {
            packet_bytes,
            ..Note::carried(Direction::Out, peer.and(Some(queued.next_hop)), head).dropped(dropped)
        });
        if let Some(traffic) = peer.and_then(|peer| peer.traffic.get(self.worker)) {
            traffic.packets_unsent.add(1);
            let mode = Mode::with_keys(peer.is_some_and(|peer| peer.sessions.is_some()));
            let datagram_bytes = mode.datagram_bytes(packet_bytes, queued.segment_bytes_max);
            traffic.bytes_unsent.add(datagram_bytes as u64);
            match reason {
                Reason::Aqm => traffic.drop_queue_aqm.add(1),
                Reason::Overlimit => traffic.drop_queue_full.add(1),
            }
        }
    }

    fn marked(&self) {
        self.counters.queue_marked.add(1);
    }
}
