//! TUN to UDP: a frame from the TUN queue is segmented, its destination looked
//! up, and every packet appended to its next hop's train. Trains stay open
//! across the frames of a batch, which is what makes small packets fast. Who
//! sent what cannot be carried is told so, as any router would.

use std::net::SocketAddr;

use super::report::Reporter;
use super::table::{Peer, Table};
use crate::counters::Counters;
use crate::io::engine::{Destination, Engine, OPEN_TRAINS_MAX, SendFailure};
use crate::io::udp::Port;
use crate::packet::hop::{self, Hop};
use crate::packet::icmp::Problem;
use crate::packet::ip;
use crate::packet::segment::Segments;
use crate::packet::train::{NextHop, TRAIN_BYTES_MAX, Train};

/// The trains being filled, at most one per next hop, oldest first.
#[derive(Debug)]
pub struct Outbound {
    open: Vec<(Train, Destination)>,
    reporter: Reporter,
    /// Index of the worker.
    worker: usize,
}

impl Outbound {
    /// No train yet, and room for all that can be open. `worker`: the worker's
    /// index.
    pub fn new(worker: usize) -> Self {
        Self {
            open: Vec::with_capacity(OPEN_TRAINS_MAX),
            reporter: Reporter::new(),
            worker,
        }
    }

    /// Takes in one frame: virtio-net header and packet. The packet's hop limit
    /// is changed in place if the tunnel counts as a hop.
    #[inline]
    pub fn push(
        &mut self,
        frame: &mut [u8],
        table: &Table,
        counters: &Counters,
        engine: &mut impl Engine,
    ) {
        counters.tun_frames_read.add(1);
        // What is no packet is left for the next step to refuse.
        let is_spent = table.is_hop() && hop::decrement_frame(frame) == Some(Hop::Expired);
        let Ok(segments) = Segments::new(frame) else {
            counters.drop_frame_malformed.add(1);
            return;
        };
        let count = segments.count();
        let (version, packet) = (segments.version(), segments.packet());
        if is_spent {
            counters.drop_ttl.add(count as u64);
            self.report(Problem::TimeExceeded, &segments, table, counters, engine);
            return;
        }
        let Some((next_hop, peer)) = table.peer(ip::destination(version, packet)) else {
            counters.drop_no_route.add(count as u64);
            self.report(Problem::NoRoute, &segments, table, counters, engine);
            return;
        };
        let Some(endpoint) = peer.endpoint else {
            counters.drop_peer_unresolved.add(count as u64);
            self.report(Problem::NoRoute, &segments, table, counters, engine);
            return;
        };
        let packet_bytes_max = peer.packet_bytes_max(version);
        let is_too_big = segments.packet_bytes(0) > packet_bytes_max
            && (!peer.is_fragmented || ip::is_unfragmentable(version, packet));
        if is_too_big {
            counters.drop_too_big.add(count as u64);
            let mtu_bytes = packet_bytes_max as u32;
            let problem = Problem::TooBig { mtu_bytes };
            self.report(problem, &segments, table, counters, engine);
            return;
        }
        if segments.packet_bytes(0) > TRAIN_BYTES_MAX {
            counters.drop_oversize.add(count as u64);
            return;
        }
        let to = NextHopPeer {
            next_hop,
            endpoint,
            peer,
        };
        let Some(mut index) = self.train_to(to, engine) else {
            counters.drop_no_buffer.add(count as u64);
            return;
        };
        let (mut packets, mut bytes) = (0, 0);
        for packet in 0..count {
            let packet_bytes = segments.packet_bytes(packet);
            let mut room = self.open[index].0.reserve(packet_bytes);
            if room.is_none() {
                // Full, or of another size: on with the next train.
                let (train, destination) = self.open.remove(index);
                engine.send(train, destination);
                match self.start_train(to, engine) {
                    Some(fresh) => index = fresh,
                    None => {
                        counters.drop_no_buffer.add((count - packet) as u64);
                        break;
                    }
                }
                room = self.open[index].0.reserve(packet_bytes);
            }
            if let Some(room) = room {
                segments.write(packet, room);
                packets += 1;
                bytes += packet_bytes as u64;
            }
        }
        if let Some(traffic) = peer.traffic.get(self.worker) {
            traffic.packets_sent.add(packets);
            traffic.bytes_sent.add(bytes);
        }
    }

    /// Sends the trains that cannot grow any more.
    #[inline]
    pub fn send_closed(&mut self, engine: &mut impl Engine) {
        while let Some(index) = self.open.iter().position(|(train, _)| train.is_closed()) {
            let (train, destination) = self.open.remove(index);
            engine.send(train, destination);
        }
    }

    /// Sends all open trains: no more frames are at hand.
    #[inline]
    pub fn flush(&mut self, engine: &mut impl Engine) {
        for (train, destination) in self.open.drain(..) {
            engine.send(train, destination);
        }
    }

    /// Takes note of packets that have not been sent after all.
    #[cold]
    pub fn failed(&self, failure: &SendFailure, table: &Table, counters: &Counters) {
        if !failure.is_full() {
            let about = (failure.destination, failure.errno);
            counters.first.send_error.give(about);
        }
        // The table may have changed since.
        let peer = table
            .at(failure.next_hop)
            .filter(|peer| peer.endpoint == Some(failure.destination));
        if let Some(traffic) = peer.and_then(|peer| peer.traffic.get(self.worker)) {
            traffic.packets_sent.sub(failure.packets);
            traffic.bytes_sent.sub(failure.bytes);
            let drops = match failure.is_full() {
                true => &traffic.drop_send_full,
                false => &traffic.drop_send_error,
            };
            drops.add(failure.packets);
        }
    }

    /// Index of the open train toward a peer, a fresh one if there is none.
    #[inline]
    fn train_to(&mut self, to: NextHopPeer<'_>, engine: &mut impl Engine) -> Option<usize> {
        let found = self.open.iter().position(|(train, destination)| {
            // The endpoint of a next hop changes with the table.
            train.next_hop() == to.next_hop && destination.endpoint == to.endpoint
        });
        found.or_else(|| self.start_train(to, engine))
    }

    fn start_train(&mut self, to: NextHopPeer<'_>, engine: &mut impl Engine) -> Option<usize> {
        if self.open.len() == OPEN_TRAINS_MAX {
            let (train, destination) = self.open.remove(0);
            engine.send(train, destination);
        }
        let mut train = engine.take_train()?;
        let mut limits = engine.limits(to.endpoint);
        // What is longer than the path takes travels alone, in fragments.
        limits.segment_bytes_max = limits.segment_bytes_max.min(to.peer.mtu_bytes);
        train.start(to.next_hop, limits);
        let from = match to.peer.traffic.get(self.worker) {
            Some(traffic) if traffic.is_own_port_proven() => Port::Own,
            _ => Port::Listen,
        };
        let destination = Destination {
            endpoint: to.endpoint,
            from,
        };
        self.open.push((train, destination));
        Some(self.open.len() - 1)
    }

    /// Tells the sender of a frame that is not carried.
    #[cold]
    fn report(
        &mut self,
        problem: Problem,
        segments: &Segments<'_>,
        table: &Table,
        counters: &Counters,
        engine: &mut impl Engine,
    ) {
        self.reporter
            .report(problem, segments, table.addresses(), counters, engine);
    }
}

/// What a train toward a peer needs to know of it.
#[derive(Clone, Copy)]
struct NextHopPeer<'a> {
    next_hop: NextHop,
    endpoint: SocketAddr,
    peer: &'a Peer,
}
