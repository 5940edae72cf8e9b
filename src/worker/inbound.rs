//! UDP to TUN: the sender of a received train is checked, each datagram
//! verified to be one whole IP packet that its sender may send, packets of a
//! flow coalesced, and the result written to the TUN queue.

use std::net::IpAddr;

use super::counters::Counters;
use super::engine::Engine;
use super::table::{Peer, Table};
use crate::packet::coalesce::{Coalescer, Offloads};
use crate::packet::ip::{self, Malformed, Version};

/// The inbound half of a worker.
#[derive(Debug)]
pub struct Inbound {
    coalescer: Coalescer,
    /// Index of the worker.
    worker: usize,
}

impl Inbound {
    /// `offloads`: the super-packets that the TUN device takes. `worker`: the
    /// worker's index.
    pub fn new(offloads: Offloads, worker: usize) -> Self {
        Self {
            coalescer: Coalescer::new(offloads),
            worker,
        }
    }

    /// Takes in the datagrams of one receive: `payload` holds them back to
    /// back, each of `segment_bytes` but the last.
    #[inline]
    pub fn push(
        &mut self,
        payload: &[u8],
        segment_bytes: usize,
        sender: IpAddr,
        table: &Table,
        counters: &Counters,
        engine: &mut impl Engine,
    ) {
        counters.trains_received.add(1);
        let datagrams = payload.chunks(segment_bytes.max(1));
        if !table.is_sender(sender) {
            counters
                .drop_sender_unknown
                .add(datagrams.len().max(1) as u64);
            counters.first.sender_unknown.give(sender);
            return;
        }
        if payload.is_empty() {
            counters.drop_short.add(1);
            return;
        }
        let mut allowed = Allowed::none(self.worker);
        for datagram in datagrams {
            match ip::verify(datagram) {
                Ok(version) => {
                    if allowed.admits(version, datagram, sender, table, counters) {
                        allowed.count(datagram.len());
                        self.coalescer.push(version, datagram, engine);
                    } else {
                        let source = ip::source(version, datagram);
                        self.not_allowed(sender, source, table, counters);
                    }
                }
                Err(Malformed::Short) => counters.drop_short.add(1),
                Err(Malformed::Version) => counters.drop_version.add(1),
                Err(Malformed::Length) => counters.drop_length.add(1),
            }
        }
        allowed.settle(counters);
    }

    /// Counts a packet that its sender may not send.
    #[cold]
    fn not_allowed(&self, sender: IpAddr, source: IpAddr, table: &Table, counters: &Counters) {
        counters.drop_source_not_allowed.add(1);
        counters.first.source_not_allowed.give((sender, source));
        let traffic = table
            .sender(sender)
            .and_then(|peer| peer.traffic.get(self.worker));
        if let Some(traffic) = traffic {
            traffic.drop_source_not_allowed.add(1);
        }
    }

    /// Writes all that is still held for merging: no more datagrams are at hand.
    #[inline]
    pub fn flush(&mut self, engine: &mut impl Engine) {
        self.coalescer.flush(engine);
    }
}

/// The reverse path check: packets must come from the peer that packets to
/// their source would go to (RFC 3704, section 2.2). Neighbours in a train
/// mostly have one source, so the last verdict is kept.
struct Allowed<'a> {
    worker: usize,
    /// The packet that the verdict was about.
    last: Option<(Version, &'a [u8])>,
    /// The peer behind which its source is, if it is the sender.
    peer: Option<&'a Peer>,
    /// Packets and bytes of this peer that are not in its counters yet.
    packets: u64,
    bytes: u64,
}

impl<'a> Allowed<'a> {
    #[inline]
    fn none(worker: usize) -> Self {
        Self {
            worker,
            last: None,
            peer: None,
            packets: 0,
            bytes: 0,
        }
    }

    /// Whether a packet that [`ip::verify`] passed may come from `sender`.
    #[inline]
    fn admits(
        &mut self,
        version: Version,
        packet: &'a [u8],
        sender: IpAddr,
        table: &'a Table,
        counters: &Counters,
    ) -> bool {
        let is_known = self
            .last
            .is_some_and(|(last, other)| last == version && ip::same_source(last, other, packet));
        if !is_known {
            self.settle(counters);
            self.last = Some((version, packet));
            self.peer = table
                .peer(ip::source(version, packet))
                .map(|(_, peer)| peer)
                .filter(|peer| peer.endpoint.is_some_and(|to| to.ip() == sender));
        }
        self.peer.is_some()
    }

    #[inline]
    fn count(&mut self, packet_bytes: usize) {
        self.packets += 1;
        self.bytes += packet_bytes as u64;
    }

    /// Brings the counters up to date.
    #[inline]
    fn settle(&mut self, counters: &Counters) {
        let (packets, bytes) = (
            std::mem::take(&mut self.packets),
            std::mem::take(&mut self.bytes),
        );
        if packets == 0 {
            return;
        }
        counters.packets_received.add(packets);
        counters.bytes_received.add(bytes);
        if let Some(traffic) = self.peer.and_then(|peer| peer.traffic.get(self.worker)) {
            traffic.packets_received.add(packets);
            traffic.bytes_received.add(bytes);
        }
    }
}
