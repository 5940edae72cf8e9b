//! UDP to TUN: a packet's way into the host. It meets, in this order,
//!
//! 1. [`Inbound::push`]: the datagrams of one receive, if a peer sends from their
//!    address ([`plain::Senders`]).
//! 2. [`plain::open`]: the datagram holds one whole IP packet.
//! 3. `Allowed::admits`: its source is one that this peer may send from; if not,
//!    `refuse` looks whether it is a probe.
//! 4. [`Coalescer::push`]: packets of one flow become one vnet packet, and a vnet packet that
//!    cannot grow any more goes to the engine ([`VnetSink::write`]).
//! 5. [`Inbound::flush`] when nothing more arrives: so do all others.
//!
//! [`VnetSink::write`]: crate::packet::vnet_packet::VnetSink::write

use std::net::SocketAddr;

use crossbeam_channel::Sender;

use super::table::{PeerSnapshot, Table};
use crate::counters::Counters;
use crate::io::engine::{Engine, ReceiveMeta};
use crate::packet::coalesce::{Coalescer, TunOffloads};
use crate::packet::ecn;
use crate::packet::ip::{self, Malformed, Version};
use crate::packet::probe::{Kind, Probe};
use crate::wire::plain;

/// A probe, and where it came from: for the control thread.
pub type ReceivedProbe = (SocketAddr, Probe);

/// The inbound half of a worker.
#[derive(Debug)]
pub struct Inbound {
    coalescer: Coalescer,
    /// Index of the worker.
    worker: usize,
    probes: Sender<ReceivedProbe>,
}

impl Inbound {
    /// `offloads`: the GSO packets that the TUN device takes. `worker`: the
    /// worker's index. `probes`: takes those that come.
    pub fn new(offloads: TunOffloads, worker: usize, probes: Sender<ReceivedProbe>) -> Self {
        Self {
            coalescer: Coalescer::new(offloads),
            worker,
            probes,
        }
    }

    /// Takes in the datagrams of one receive: `payload` holds them back to back. They are
    /// opened in place.
    #[inline]
    pub fn push(
        &mut self,
        payload: &mut [u8],
        meta: ReceiveMeta,
        table: &Table,
        counters: &Counters,
        engine: &mut impl Engine,
    ) {
        counters.udp_receives.add(1);
        let (sender, segment_bytes) = (meta.sender, meta.segment_bytes.max(1));
        if !table.senders().has(sender.ip()) {
            let datagrams = payload.len().div_ceil(segment_bytes).max(1);
            counters.drop_sender_unknown.add(datagrams as u64);
            counters.first.sender_unknown.give(sender.ip());
            return;
        }
        if payload.is_empty() {
            counters.drop_short.add(1);
            return;
        }
        let mut allowed = Allowed::none(self.worker, sender);
        for datagram in payload.chunks_mut(segment_bytes) {
            match plain::open(datagram) {
                Ok((version, packet)) => {
                    if !ecn::decapsulate(version, packet, meta.ecn) {
                        counters.drop_ecn.add(1);
                        continue;
                    }
                    let packet = &*packet;
                    if allowed.admits(version, packet, table, counters) {
                        allowed.count(packet.len());
                        self.coalescer.push(version, packet, engine);
                    } else {
                        self.refuse(version, packet, sender, table, counters);
                    }
                }
                Err(Malformed::Short) => counters.drop_short.add(1),
                Err(Malformed::Version) => counters.drop_version.add(1),
                Err(Malformed::Length) => counters.drop_length.add(1),
            }
        }
        allowed.settle(counters);
    }

    /// Writes all that is still held for merging: no more datagrams are at hand.
    #[inline]
    pub fn flush(&mut self, engine: &mut impl Engine) {
        self.coalescer.flush(engine);
    }

    /// Takes in a packet that its sender may not send, unless it is a probe.
    #[cold]
    fn refuse(
        &self,
        version: Version,
        packet: &[u8],
        sender: SocketAddr,
        table: &Table,
        counters: &Counters,
    ) {
        if let Some(probe) = Probe::from_packet(packet) {
            counters.probes_received.add(1);
            if probe.kind != Kind::Size {
                // One that finds no room is as good as lost on its way.
                let _ = self.probes.try_send((sender, probe));
            }
            return;
        }
        let (sender, source) = (sender.ip(), ip::source(version, packet));
        counters.drop_source_not_allowed.add(1);
        counters.first.source_not_allowed.give((sender, source));
        let peer = table.senders().peer(sender).and_then(|peer| table.at(peer));
        if let Some(traffic) = peer.and_then(|peer| peer.traffic.get(self.worker)) {
            traffic.drop_source_not_allowed.add(1);
        }
    }
}

/// The reverse path check: packets must come from the peer that packets to
/// their source would go to (RFC 3704, section 2.2). Neighbours in a batch
/// mostly have one source, so the last verdict is kept.
struct Allowed<'a> {
    worker: usize,
    sender: SocketAddr,
    /// The packet that the verdict was about.
    last: Option<(Version, &'a [u8])>,
    /// The peer behind which its source is, if it is the sender.
    peer: Option<&'a PeerSnapshot>,
    /// Packets and bytes of this peer that are not in its counters yet.
    packets: u64,
    bytes: u64,
}

impl<'a> Allowed<'a> {
    #[inline]
    fn none(worker: usize, sender: SocketAddr) -> Self {
        Self {
            worker,
            sender,
            last: None,
            peer: None,
            packets: 0,
            bytes: 0,
        }
    }

    /// Whether a packet that [`ip::verify`] passed may come from the sender.
    #[inline]
    fn admits(
        &mut self,
        version: Version,
        packet: &'a [u8],
        table: &'a Table,
        counters: &Counters,
    ) -> bool {
        let is_known = self
            .last
            .is_some_and(|(last, other)| last == version && ip::same_source(last, other, packet));
        if !is_known {
            self.settle(counters);
            self.last = Some((version, packet));
            let sender = self.sender.ip();
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
        if let Some(peer) = self.peer
            && let Some(traffic) = peer.traffic.get(self.worker)
        {
            traffic.packets_received.add(packets);
            traffic.bytes_received.add(bytes);
            let expected = peer.endpoint.map_or(0, |endpoint| endpoint.port());
            traffic.note_port(self.sender.port(), expected);
        }
    }
}
