//! TUN to UDP: a packet's way out of the host. It meets, in this order,
//!
//! 1. [`Outbound::push`]: a vnet packet from the TUN queue. Where the tunnel counts as a
//!    hop, one is taken from it ([`hop`]); then it is checked and, if it is a GSO
//!    packet, planned to be cut ([`Segments::new`]).
//! 2. `next_hop`: the peer with the longest prefix that matches the destination
//!    ([`Table::peer`]), if that can be reached and the packet is not too long.
//! 3. `append`: each packet of the vnet packet is written where its next hop's batch has
//!    room ([`Batch::reserve`], [`Segments::write`]). Batches stay open across the
//!    vnet packets of a turn, which is what makes small packets fast.
//!    Where a peer has no session to seal with, the vnet packet is held until it has one.
//! 4. [`Outbound::send_closed`] at the end of a turn, for batches that cannot grow
//!    any more, and [`Outbound::flush`] when nothing more arrives.
//! 5. [`SendQueue::send`]: the batch goes to the engine. What its socket has no room
//!    for waits, and goes with [`Outbound::pump`].
//!
//! A packet that cannot be carried ends at `refuse`, where its sender is told, as
//! any router would; what the kernel would not send comes back to
//! [`Outbound::failed`].

use std::net::SocketAddr;
use std::time::Instant;

use super::Queueing;
use super::report::Reporter;
use super::send_queue::{Account, SendQueue};
use super::sessions::{Held, Sessions};
use super::table::{PeerSnapshot, Table};
use super::tapped::{self, Tapped};
use crate::capture::{Direction, Note, Reason};
use crate::clock;
use crate::counters::Counters;
use crate::io::engine::{Destination, Engine, OPEN_BATCHES_MAX, SendFailure};
use crate::io::udp::{PORTS, Port};
use crate::packet::batch::{BATCH_BYTES_MAX, Batch, NextHop};
use crate::packet::ecn;
use crate::packet::fq_codel::Aqm;
use crate::packet::hop::{self, Hop};
use crate::packet::icmp::Problem;
use crate::packet::ip;
use crate::packet::segment::Segments;
use crate::wire::Mode;

/// Bits of the ECN field in a TOS.
const ECN_MASK: u8 = 3;

/// The batches being filled, at most one per next hop, oldest first.
#[derive(Debug)]
pub struct Outbound {
    open: Vec<(Batch, Destination)>,
    /// By port.
    queues: [SendQueue; PORTS],
    reporter: Reporter,
    /// Index of the worker.
    worker: usize,
    /// What the outer TOS has of the inner one.
    tos_mask: u8,
    is_fifo: bool,
    mode: Mode,
    /// In WireGuard mode.
    sessions: Option<Sessions>,
    /// What waits for a session, and what has waited so far, while it is tried again.
    held: Held,
    held_before: Held,
}

/// Where a vnet packet's packets go.
#[derive(Clone, Copy)]
struct To<'a> {
    next_hop: NextHop,
    endpoint: SocketAddr,
    peer: &'a PeerSnapshot,
}

/// Why they go nowhere.
enum Refusal {
    Expired,
    NoRoute,
    Unresolved,
    TooBig { mtu_bytes: u32 },
    Oversize,
}

impl Refusal {
    /// What the packet's sender is told, if anything.
    fn problem(&self) -> Option<Problem> {
        match *self {
            Self::Expired => Some(Problem::TimeExceeded),
            Self::NoRoute | Self::Unresolved => Some(Problem::NoRoute),
            Self::TooBig { mtu_bytes } => Some(Problem::TooBig { mtu_bytes }),
            Self::Oversize => None,
        }
    }
}

/// Notes a vnet packet that has a way to go, once if it is held.
#[inline]
fn note_taken(vnet_packet: &[u8], to: To<'_>, held_since_ns: Option<u64>, counters: &Counters) {
    if counters.tap.is_on() && held_since_ns.is_none() {
        let note = || tapped::outbound(vnet_packet, Some(to.next_hop));
        counters.tap.note(note);
    }
}

/// Notes that there is no buffer for a vnet packet, or for the rest of it.
#[cold]
fn note_no_buffer(segments: &Segments<'_>, to: To<'_>, counters: &Counters) {
    counters.tap.note(|| {
        let note = Note::carried(Direction::Out, Some(to.next_hop), segments.packet());
        note.dropped(Reason::NoBuffer)
    });
}

impl Outbound {
    /// No batch yet, and room for all that can be open. `worker`: the worker's
    /// index. `sessions`: those of WireGuard mode.
    pub fn new(
        worker: usize,
        queueing: Queueing,
        sessions: Option<Sessions>,
        engine: &mut impl Engine,
    ) -> Self {
        let queue = |port| SendQueue::new(port, queueing, sessions.clone(), engine);
        Self {
            mode: Mode::with_keys(sessions.is_some()),
            open: Vec::with_capacity(OPEN_BATCHES_MAX),
            queues: [Port::Listen, Port::Own].map(queue),
            reporter: Reporter::new(),
            worker,
            tos_mask: match queueing.inherits_dscp {
                true => 0xff,
                false => ECN_MASK,
            },
            is_fifo: queueing.aqm == Aqm::Off,
            held: Held::default(),
            held_before: Held::default(),
            sessions,
        }
    }

    /// Takes in one vnet packet: virtio-net header and packet. The packet's hop limit
    /// is changed in place if the tunnel counts as a hop.
    #[inline]
    pub fn push(
        &mut self,
        vnet_packet: &mut [u8],
        table: &Table,
        counters: &Counters,
        engine: &mut impl Engine,
    ) {
        counters.tun_reads.add(1);
        // What is not a packet is left for the next step to refuse.
        let is_expired =
            table.is_hop() && hop::decrement_vnet_packet(vnet_packet) == Some(Hop::Expired);
        self.forward(vnet_packet, is_expired, None, table, counters, engine);
    }

    /// Forwards one vnet packet. `held_since_ns`: since when it has been held for lack of a
    /// session, if it has.
    #[inline]
    fn forward(
        &mut self,
        vnet_packet: &[u8],
        is_expired: bool,
        held_since_ns: Option<u64>,
        table: &Table,
        counters: &Counters,
        engine: &mut impl Engine,
    ) {
        let Ok(segments) = Segments::new(vnet_packet) else {
            counters.drop_tun_malformed.add(1);
            let note = || tapped::outbound(vnet_packet, None).dropped(Reason::TunMalformed);
            counters.tap.note(note);
            return;
        };
        let to = if is_expired {
            Err(Refusal::Expired)
        } else {
            self.next_hop(&segments, table)
        };
        match to {
            Ok(to) if to.peer.lacks_session() => {
                note_taken(vnet_packet, to, held_since_ns, counters);
                let account = Account::new(self.worker, table, counters);
                self.hold(vnet_packet, to, held_since_ns, &account);
            }
            Ok(to) => {
                note_taken(vnet_packet, to, held_since_ns, counters);
                self.append(&segments, to, table, counters, engine);
            }
            Err(refusal) => self.refuse(refusal, vnet_packet, &segments, table, counters, engine),
        }
    }

    /// Writes a vnet packet's packets into batches.
    #[inline]
    fn append(
        &mut self,
        segments: &Segments<'_>,
        to: To<'_>,
        table: &Table,
        counters: &Counters,
        engine: &mut impl Engine,
    ) {
        let count = segments.count();
        let account = Account::new(self.worker, table, counters);
        let mut found = self.open.iter().position(|(batch, destination)| {
            // The endpoint of a next hop changes with the table, and as it roams.
            batch.next_hop() == to.next_hop && destination.endpoint.address == to.endpoint
        });
        // The outer header gets what the inner one has (RFC 6040, section 4.1).
        let tos = ecn::tos(segments.version(), segments.packet()) & self.tos_mask;
        if let Some(index) = found
            && self.open[index].0.tos() != tos
        {
            self.send(index, &account, engine);
            found = None;
        }
        let Some(mut index) = found.or_else(|| self.start_batch(to, tos, &account, engine)) else {
            counters.drop_no_buffer.add(count as u64);
            note_no_buffer(segments, to, counters);
            return;
        };
        let (mode, datagram_bytes_max) = (self.mode, self.datagram_bytes_max(to.peer));
        let (mut packets, mut bytes) = (0, 0);
        for packet in 0..count {
            let packet_bytes = segments.packet_bytes(packet);
            let datagram_bytes = mode.datagram_bytes(packet_bytes, datagram_bytes_max);
            let mut datagram = self.open[index].0.reserve(datagram_bytes);
            if datagram.is_none() {
                // Full, or of another size: on with the next batch.
                self.send(index, &account, engine);
                match self.start_batch(to, tos, &account, engine) {
                    Some(fresh) => index = fresh,
                    None => {
                        counters.drop_no_buffer.add((count - packet) as u64);
                        note_no_buffer(segments, to, counters);
                        break;
                    }
                }
                datagram = self.open[index].0.reserve(datagram_bytes);
            }
            if let Some(datagram) = datagram {
                segments.write(packet, mode.packet_room(datagram, packet_bytes));
                packets += 1;
                bytes += datagram_bytes as u64;
            }
        }
        if let Some(traffic) = to.peer.traffic.get(self.worker) {
            traffic.packets_enqueued.add(packets);
            traffic.bytes_enqueued.add(bytes);
        }
    }

    /// Bytes of the longest datagram that reaches a peer in one piece.
    #[inline]
    fn datagram_bytes_max(&self, peer: &PeerSnapshot) -> usize {
        self.mode
            .datagram_bytes(peer.mtu_bytes, 0)
            .min(BATCH_BYTES_MAX)
    }

    /// Opens a batch toward a peer, and returns its index.
    fn start_batch(
        &mut self,
        to: To<'_>,
        tos: u8,
        account: &Account<'_>,
        engine: &mut impl Engine,
    ) -> Option<usize> {
        if self.open.len() == OPEN_BATCHES_MAX {
            self.send(0, account, engine);
        }
        let mut batch = engine.take_batch()?;
        let mut limits = engine.limits(to.endpoint);
        // What is longer than the path takes travels alone, in fragments.
        limits.segment_bytes_max = limits
            .segment_bytes_max
            .min(self.datagram_bytes_max(to.peer));
        batch.start(to.next_hop, limits);
        batch.set_tos(tos);
        let from = match to.peer.traffic.get(self.worker) {
            Some(traffic) if traffic.is_own_port_proven() => Port::Own,
            _ => Port::Listen,
        };
        let destination = Destination {
            endpoint: to.endpoint.into(),
            from: engine.port(from),
        };
        self.open.push((batch, destination));
        Some(self.open.len() - 1)
    }

    /// Sends the batches that cannot grow any more.
    #[inline]
    pub fn send_closed(&mut self, table: &Table, counters: &Counters, engine: &mut impl Engine) {
        let account = Account::new(self.worker, table, counters);
        while let Some(index) = self.open.iter().position(|(batch, _)| batch.is_closed()) {
            self.send(index, &account, engine);
        }
    }

    /// Sends all open batches: no more vnet packets are at hand.
    #[inline]
    pub fn flush(&mut self, table: &Table, counters: &Counters, engine: &mut impl Engine) {
        let account = Account::new(self.worker, table, counters);
        while !self.open.is_empty() {
            self.send(0, &account, engine);
        }
    }

    /// Hands an open batch on. All packets leave by here, complete and in their order.
    #[inline]
    fn send(&mut self, index: usize, account: &Account<'_>, engine: &mut impl Engine) {
        let (batch, to) = self.open.remove(index);
        self.queues[to.from as usize].send(batch, to, account, engine);
    }

    /// Whether packets wait in one queue, so that no more are to be read than there is
    /// room for.
    #[inline]
    pub fn is_fifo(&self) -> bool {
        self.is_fifo
    }

    /// Whether packets wait for a socket to have room.
    #[inline]
    pub fn is_backlogged(&self) -> bool {
        self.queues.iter().any(|queue| !queue.is_empty())
    }

    /// Sends what has waited, as far as there is room now.
    #[inline]
    pub fn pump(&mut self, table: &Table, counters: &Counters, engine: &mut impl Engine) {
        let account = Account::new(self.worker, table, counters);
        for (queue, from) in self.queues.iter_mut().zip([Port::Listen, Port::Own]) {
            queue.pump(from, &account, engine);
        }
        let backlog_bytes = self.queues.iter().map(SendQueue::backlog_bytes).sum();
        counters.queue_backlog_bytes.set(backlog_bytes);
        let limits = self.queues.iter().map(SendQueue::limit_bytes);
        counters
            .queue_limit_bytes
            .set(limits.fold(0, u64::saturating_add));
    }

    /// Sends all there is, whether there is room or not, now and from now on: the
    /// worker stops.
    pub fn release(&mut self, table: &Table, counters: &Counters, engine: &mut impl Engine) {
        self.flush(table, counters, engine);
        let account = Account::new(self.worker, table, counters);
        for (queue, from) in self.queues.iter_mut().zip([Port::Listen, Port::Own]) {
            queue.release(from, &account, engine);
        }
        let dropped = |next_hop, vnet_packet: &[u8]| account.given_up(next_hop, vnet_packet);
        self.held.drop_all(dropped);
    }

    /// Sends all that waits, whether there is room or not.
    pub fn drain(&mut self, table: &Table, counters: &Counters, engine: &mut impl Engine) {
        let account = Account::new(self.worker, table, counters);
        for (queue, from) in self.queues.iter_mut().zip([Port::Listen, Port::Own]) {
            queue.drain(from, &account, engine);
        }
    }

    /// Drops a vnet packet's packets, and tells their sender.
    #[cold]
    fn refuse(
        &mut self,
        refusal: Refusal,
        vnet_packet: &[u8],
        segments: &Segments<'_>,
        table: &Table,
        counters: &Counters,
        engine: &mut impl Engine,
    ) {
        let (drops, reason) = match refusal {
            Refusal::Expired => (&counters.drop_ttl, Reason::Ttl),
            Refusal::NoRoute => (&counters.drop_no_route, Reason::NoRoute),
            Refusal::Unresolved => (&counters.drop_peer_unresolved, Reason::PeerUnresolved),
            Refusal::TooBig { .. } => (&counters.drop_too_big, Reason::TooBig),
            Refusal::Oversize => (&counters.drop_oversize, Reason::Oversize),
        };
        drops.add(segments.count() as u64);
        let tap = &counters.tap;
        tap.note(|| {
            let destination = ip::destination(segments.version(), segments.packet());
            let peer = table.peer(destination).map(|(next_hop, _)| next_hop);
            tapped::outbound(vnet_packet, peer).dropped(reason)
        });
        if let Some(problem) = refusal.problem() {
            let (now, addresses) = (Instant::now(), table.addresses());
            let mut sink = Tapped {
                sink: engine,
                tap,
                table: None,
            };
            self.reporter
                .report(now, problem, segments, addresses, counters, &mut sink);
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
            .filter(|peer| peer.endpoint_in_use() == Some(failure.destination));
        // The address to send from may be this host's no more (EINVAL, ENETUNREACH), or lead
        // nowhere now. What is too long is so from any.
        if !failure.is_full()
            && failure.errno != libc::EMSGSIZE
            && let Some(sessions) = peer.and_then(|peer| peer.sessions.as_ref())
        {
            sessions.forget_source();
        }
        if let Some(traffic) = peer.and_then(|peer| peer.traffic.get(self.worker)) {
            traffic.packets_unsent.add(failure.packets);
            traffic.bytes_unsent.add(failure.bytes);
            let drops = match failure.is_full() {
                true => &traffic.drop_send_full,
                false => &traffic.drop_send_error,
            };
            drops.add(failure.packets);
        }
    }

    /// Holds a vnet packet until its peer has a session. `since_ns`: since when it is held
    /// already.
    #[cold]
    fn hold(
        &mut self,
        vnet_packet: &[u8],
        to: To<'_>,
        since_ns: Option<u64>,
        account: &Account<'_>,
    ) {
        // What was held before was asked for then: asking again would go on for longer.
        if since_ns.is_none()
            && let (Some(sessions), Some(peer)) = (&self.sessions, &to.peer.sessions)
        {
            sessions.request(peer);
        }
        let since_ns = since_ns.unwrap_or_else(clock::now_ns);
        let dropped = |next_hop, vnet_packet: &[u8]| account.given_up(next_hop, vnet_packet);
        self.held.push(vnet_packet, to.next_hop, since_ns, dropped);
    }

    /// Takes in again what was held for lack of a session.
    pub fn retry(&mut self, table: &Table, counters: &Counters, engine: &mut impl Engine) {
        std::mem::swap(&mut self.held, &mut self.held_before);
        let mut before = std::mem::take(&mut self.held_before);
        let account = Account::new(self.worker, table, counters);
        let dropped = |next_hop, vnet_packet: &[u8]| account.given_up(next_hop, vnet_packet);
        for (vnet_packet, since_ns) in before.vnet_packets(clock::now_ns(), dropped) {
            // Its hop was taken when it came.
            self.forward(vnet_packet, false, Some(since_ns), table, counters, engine);
        }
        before.clear();
        self.held_before = before;
    }

    /// Where a vnet packet's packets go, by their destination and length.
    #[inline]
    fn next_hop<'a>(&self, segments: &Segments<'_>, table: &'a Table) -> Result<To<'a>, Refusal> {
        let (version, packet) = (segments.version(), segments.packet());
        let destination = ip::destination(version, packet);
        let (next_hop, peer) = table.peer(destination).ok_or(Refusal::NoRoute)?;
        let endpoint = peer.endpoint_in_use().ok_or(Refusal::Unresolved)?;
        // All but the last packet have the same length.
        let packet_bytes = segments.packet_bytes(0);
        let packet_bytes_max = peer.packet_bytes_max(version);
        if packet_bytes > packet_bytes_max
            && (!peer.is_fragmented || ip::is_unfragmentable(version, packet))
        {
            let mtu_bytes = packet_bytes_max as u32;
            return Err(Refusal::TooBig { mtu_bytes });
        }
        if self.mode.datagram_bytes(packet_bytes, 0) > BATCH_BYTES_MAX {
            return Err(Refusal::Oversize);
        }
        Ok(To {
            next_hop,
            endpoint,
            peer,
        })
    }
}
