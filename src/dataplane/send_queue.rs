//! Between batches and their socket: what the socket has no room for waits here,
//! where flows take turns, and not in the socket, where it would delay them all.
//!
//! While nothing waits, a batch goes straight on to the engine, and all it costs is
//! a comparison: the kernel is asked how much the socket holds only when as much has
//! been sent as it may hold. When it is full, the engine waits for room and leaves
//! the TUN queue alone; when there is room, all that the TUN queue has is read first,
//! so that flows with little to send go first, and then the socket is filled again.
//!
//! Each socket has a queue of its own, so that one that is full does not stop what
//! goes out of another for longer than it takes to drain a limit's worth.

mod account;

use std::time::Instant;

pub use self::account::Account;

use super::Queueing;
use super::in_flight::InFlight;
use super::sessions::Sessions;
use crate::io::engine::{Destination, Engine};
use crate::io::udp::{Port, SOCKET_BUFFER_BYTES};
use crate::packet::batch::{Batch, NextHop};
use crate::packet::fq_codel::FqCodel;
use crate::packet::ip;
use crate::wire::Mode;

/// What waits for one socket.
#[derive(Debug)]
pub struct SendQueue {
    waiting: FqCodel<Queued>,
    in_flight: InFlight,
    /// The socket was full when it was last asked.
    is_full: bool,
    /// The send buffer that was set; `None` while it is as it was.
    send_buffer_bytes: Option<usize>,
    /// What times are counted from.
    start: Instant,
    mode: Mode,
    /// In WireGuard mode: those to seal with.
    sessions: Option<Sessions>,
}

/// What is known of a packet that waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Queued {
    next_hop: NextHop,
    to: Destination,
    segment_bytes_max: usize,
    tos: u8,
}

impl SendQueue {
    /// Nothing waits. `from`: the port whose socket it is. What another process or an
    /// earlier worker has left in it counts.
    /// `sessions`: those of WireGuard mode.
    pub fn new(
        from: Port,
        queueing: Queueing,
        sessions: Option<Sessions>,
        engine: &mut impl Engine,
    ) -> Self {
        let mut in_flight = InFlight::new(queueing.limit);
        in_flight.refresh(engine.unsent_bytes(from));
        Self {
            waiting: FqCodel::new(queueing.aqm),
            in_flight,
            is_full: false,
            send_buffer_bytes: None,
            start: Instant::now(),
            mode: Mode::with_keys(sessions.is_some()),
            sessions,
        }
    }

    /// Sends a batch, or queues its packets behind others or for lack of room.
    #[inline]
    pub fn send(
        &mut self,
        batch: Batch,
        to: Destination,
        account: &Account<'_>,
        engine: &mut impl Engine,
    ) {
        let bytes = batch.bytes().len();
        let fits = bytes <= self.in_flight.batch_bytes() || batch.count() == 1;
        if self.waiting.is_empty() && fits && self.has_room(to.from, engine) {
            self.give(batch, to, account, engine);
        } else {
            self.queue(batch, to, account, engine);
        }
    }

    /// Hands a batch to the engine.
    #[inline]
    fn give(
        &mut self,
        batch: Batch,
        to: Destination,
        account: &Account<'_>,
        engine: &mut impl Engine,
    ) {
        let bytes = batch.bytes().len();
        if bytes > self.in_flight.limit_bytes() && batch.count() == 1 {
            // One long datagram, of which the kernel makes fragments: all of them have to
            // find room at once.
            self.set_send_buffer(to.from, SOCKET_BUFFER_BYTES, engine);
        }
        self.in_flight.sent(bytes, batch.count());
        self.seal_and_send(batch, to, account, engine);
    }

    /// Sends a batch, which is sealed first in WireGuard mode: what waits is not, so that no
    /// counter grows old.
    #[inline]
    fn seal_and_send(
        &self,
        mut batch: Batch,
        mut to: Destination,
        account: &Account<'_>,
        engine: &mut impl Engine,
    ) {
        if let Some(sessions) = &self.sessions {
            let Some(endpoint) = sessions.seal(&mut batch, account.table) else {
                account.lost(&batch);
                engine.put_back(batch);
                return;
            };
            // It may have moved while packets waited.
            to.endpoint = endpoint;
        }
        engine.send(batch, to);
    }

    /// Has the kernel say that there is room while the socket holds less than this, and take
    /// twice as much.
    fn set_send_buffer(&mut self, from: Port, bytes: usize, engine: &mut impl Engine) {
        if self.send_buffer_bytes != Some(bytes) {
            self.send_buffer_bytes = Some(bytes);
            let actual_bytes = engine.set_send_buffer(from, bytes);
            if actual_bytes < bytes {
                self.in_flight.cap(actual_bytes);
            }
        }
    }

    /// Whether the socket may be given more.
    #[inline]
    fn has_room(&mut self, from: Port, engine: &mut impl Engine) -> bool {
        self.in_flight.has_room() || self.in_flight.refresh(engine.unsent_bytes(from))
    }

    /// Queues a batch's packets, each in its flow.
    fn queue(
        &mut self,
        batch: Batch,
        to: Destination,
        account: &Account<'_>,
        engine: &mut impl Engine,
    ) {
        let now_ns = self.now_ns();
        let queued = Queued {
            next_hop: batch.next_hop(),
            to,
            segment_bytes_max: batch.limits().segment_bytes_max,
            tos: batch.tos(),
        };
        for datagram in batch.datagrams() {
            let packet = self.mode.packet(datagram);
            // It was checked when it came.
            if let Ok(version) = ip::verify(packet) {
                self.waiting.push(version, packet, queued, now_ns, account);
            }
        }
        engine.put_back(batch);
    }

    /// Fills the socket from what waits, as far as there is room.
    pub fn pump(&mut self, from: Port, account: &Account<'_>, engine: &mut impl Engine) {
        if self.waiting.is_empty() || engine.is_waiting_for_room(from) {
            return;
        }
        let now_ns = self.now_ns();
        if std::mem::take(&mut self.is_full)
            && self.in_flight.drained(
                engine.unsent_bytes(from),
                engine.others_hold_unsent(),
                now_ns,
            )
        {
            self.set_send_buffer(from, self.in_flight.limit_bytes(), engine);
            // Half a batch each, so that flows are mixed and yet come in runs.
            self.waiting.set_quantum(self.in_flight.batch_bytes() / 2);
        }
        while self.has_room(from, engine) {
            let Some((batch, to)) = self.next_batch(now_ns, account, engine) else {
                return;
            };
            self.give(batch, to, account, engine);
        }
        // What drains while nothing waits says nothing about the link.
        self.is_full = !self.waiting.is_empty();
        if self.is_full {
            self.in_flight.found_full(self.now_ns());
        }
        // The limit may have become shorter since.
        self.set_send_buffer(from, self.in_flight.limit_bytes(), engine);
        engine.wait_for_room(from);
    }

    /// A batch of the packets whose turn it is.
    fn next_batch(
        &mut self,
        now_ns: u64,
        account: &Account<'_>,
        engine: &mut impl Engine,
    ) -> Option<(Batch, Destination)> {
        let (first, _) = self.waiting.peek(now_ns, account)?;
        let mut batch = engine.take_batch()?;
        let mut limits = engine.limits(first.to.endpoint.address);
        limits.segment_bytes_max = limits.segment_bytes_max.min(first.segment_bytes_max);
        batch.start(first.next_hop, limits);
        batch.set_tos(first.tos);
        while let Some((queued, packet_bytes)) = self.waiting.peek(now_ns, account) {
            let datagram_bytes = self
                .mode
                .datagram_bytes(packet_bytes, first.segment_bytes_max);
            let is_long = batch.bytes().len() + datagram_bytes > self.in_flight.batch_bytes();
            if queued != first || (is_long && batch.count() > 0) {
                break;
            }
            let Some(datagram) = batch.reserve(datagram_bytes) else {
                break;
            };
            let room = self.mode.packet_room(datagram, packet_bytes);
            let sojourn_ns = self.waiting.take(room, now_ns);
            account.left(sojourn_ns);
        }
        Some((batch, first.to))
    }

    /// Whether packets wait.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Bytes of the packets that wait.
    pub fn backlog_bytes(&self) -> u64 {
        self.waiting.total_bytes()
    }

    /// Bytes that the socket may hold now.
    pub fn limit_bytes(&self) -> u64 {
        self.in_flight.limit_bytes() as u64
    }

    /// Sends all that waits, whether there is room or not: the worker stops.
    pub fn release(&mut self, from: Port, account: &Account<'_>, engine: &mut impl Engine) {
        self.in_flight.lift();
        self.drain(from, account, engine);
    }

    /// Sends all that waits, whether there is room or not.
    pub fn drain(&mut self, from: Port, account: &Account<'_>, engine: &mut impl Engine) {
        if self.send_buffer_bytes.is_some() {
            self.set_send_buffer(from, SOCKET_BUFFER_BYTES, engine);
        }
        let now_ns = self.now_ns();
        while let Some((batch, to)) = self.next_batch(now_ns, account, engine) {
            self.in_flight.sent(batch.bytes().len(), batch.count());
            self.seal_and_send(batch, to, account, engine);
        }
    }

    fn now_ns(&self) -> u64 {
        self.start.elapsed().as_nanos() as u64
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;
    use std::sync::Arc;

    use super::*;
    use crate::capture::Ring;
    use crate::capture::frame::Header;
    use crate::counters::{Counters, PeerCounters};
    use crate::dataplane::table::{PeerSnapshot, Table};
    use crate::dataplane::test_support::Fake;
    use crate::packet::batch::Limits;
    use crate::packet::fq_codel::Aqm;
    use crate::packet::icmp::TunnelAddresses;
    use crate::packet::lpm::Prefixes;

    const PACKET_BYTES: usize = 1400;

    fn endpoint() -> SocketAddr {
        ([10, 0, 0, 2], 8285).into()
    }

    struct Bench {
        engine: Fake,
        queue: SendQueue,
        table: Table,
        counters: Counters,
        traffic: Arc<[PeerCounters]>,
    }

    fn bench(limit: Option<usize>, aqm: Aqm) -> Bench {
        let traffic: Arc<[PeerCounters]> = Arc::new([PeerCounters::default()]);
        let peer = PeerSnapshot {
            endpoint: Some(endpoint()),
            mtu_bytes: 1472,
            is_fragmented: true,
            traffic: Arc::clone(&traffic),
            ..PeerSnapshot::default()
        };
        let none = Arc::new(Prefixes::new([]));
        let queueing = Queueing {
            limit,
            aqm,
            inherits_dscp: false,
        };
        let mut engine = Fake::default();
        Bench {
            queue: SendQueue::new(Port::Listen, queueing, None, &mut engine),
            engine,
            table: Table::new(vec![peer], none, TunnelAddresses::default(), false),
            counters: Counters::default(),
            traffic,
        }
    }

    impl Bench {
        /// Sends packets of a flow, with these numbers, in one batch.
        fn send(&mut self, flow: u8, numbers: std::ops::Range<u8>) {
            let mut batch = Batch::new(0);
            batch.start(0, Limits::FULL);
            for number in numbers {
                let packet = batch.reserve(PACKET_BYTES).unwrap();
                packet.fill(0);
                packet[0] = 0x45;
                packet[2..4].copy_from_slice(&(PACKET_BYTES as u16).to_be_bytes());
                packet[15] = flow;
                packet[20] = number;
            }
            let to = Destination {
                endpoint: endpoint().into(),
                from: Port::Listen,
            };
            self.traffic[0].packets_enqueued.add(batch.count() as u64);
            let account = Account::new(0, &self.table, &self.counters);
            self.queue.send(batch, to, &account, &mut self.engine);
        }

        fn pump(&mut self) {
            let account = Account::new(0, &self.table, &self.counters);
            self.queue.pump(Port::Listen, &account, &mut self.engine);
        }

        /// The socket has sent all it held.
        fn drain(&mut self) {
            self.engine.unsent_bytes = 0;
            self.engine.is_waiting = false;
        }
    }

    #[test]
    fn while_there_is_room_batches_go_on_as_they_are() {
        let mut bench = bench(None, Aqm::FqCodel);
        for _ in 0..3 {
            bench.send(1, 0..20);
        }
        assert_eq!(bench.engine.sent.len(), 3);
        assert_eq!(bench.engine.asked, 1, "once, at the start");
        bench.pump();
        assert!(bench.queue.is_empty() && !bench.engine.is_waiting);
        // Sent without an end, into a socket that drains.
        for _ in 0..100 {
            bench.drain();
            bench.send(1, 0..20);
        }
        assert_eq!(bench.engine.sent.len(), 103);
        let once_in = 103 / bench.engine.asked;
        assert!(once_in >= 2, "asked once in {once_in} batches");
    }

    #[test]
    fn what_finds_no_room_waits_by_flow_and_in_order() {
        let mut bench = bench(Some(30_000), Aqm::FqCodel);
        for first in (0..40).step_by(10) {
            bench.send(1, first..first + 10);
        }
        bench.pump();
        assert!(bench.engine.is_waiting);
        assert_eq!(bench.engine.send_buffer_bytes, 30_000);
        // 14 000 bytes each: the third finds the socket with 28 000 and is the last.
        assert_eq!(bench.engine.sent.len(), 3);
        bench.pump();
        assert_eq!(bench.engine.sent.len(), 3, "there is no room yet");
        bench.send(2, 0..1);
        bench.drain();
        bench.pump();
        // The flow with one packet does not wait for all of the other, which goes on where
        // it was.
        let sent = bench.engine.sent.concat();
        assert!(sent[30..33].contains(&(2, 0)), "{sent:?}");
        let others: Vec<u8> = sent
            .iter()
            .filter(|(flow, _)| *flow == 1)
            .map(|(_, number)| *number)
            .collect();
        assert_eq!(others, (0..40).collect::<Vec<_>>());
        assert!(bench.queue.is_empty());
        let snapshot = bench.counters.snapshot();
        assert_eq!(snapshot.queue_packets, 11);
        assert_eq!(snapshot.drops().next(), None);
    }

    #[test]
    fn a_batch_that_is_too_long_for_the_link_is_sent_in_parts() {
        let mut bench = bench(Some(10_000), Aqm::FqCodel);
        bench.send(1, 0..30);
        bench.pump();
        while !bench.queue.is_empty() {
            bench.drain();
            bench.pump();
        }
        assert!(bench.engine.sent.iter().all(|batch| batch.len() <= 3));
        assert_eq!(bench.engine.sent.concat().len(), 30);
    }

    #[test]
    fn what_is_dropped_was_not_sent_to_its_peer() {
        let mut bench = bench(Some(30_000), Aqm::Off);
        let ring = Arc::new(Ring::new(1 << 20, 128));
        bench.counters.tap.attach(Arc::clone(&ring));
        bench.engine.unsent_bytes = 1 << 20;
        let mut pushed = 0;
        while bench.counters.drop_queue_full.get() == 0 {
            bench.send(1, 0..40);
            pushed += 40;
        }
        let dropped = bench.counters.drop_queue_full.get();
        assert_eq!(bench.traffic[0].drop_queue_full.get(), dropped);
        // Whoever captures sees them.
        assert_eq!(ring.counts(), (dropped, 0));
        let mut frame = Vec::new();
        ring.unread().take(0, &mut frame);
        let (header, packet) = frame.split_first_chunk().unwrap();
        let header = Header::read(header);
        assert_eq!(header.reason_name(), Some("queue_full"));
        assert_eq!(header.packet_bytes as usize, PACKET_BYTES);
        assert_eq!((packet[0], packet[15], packet.len()), (0x45, 1, 128));
        bench.drain();
        let account = Account::new(0, &bench.table, &bench.counters);
        bench
            .queue
            .release(Port::Listen, &account, &mut bench.engine);
        let sent = bench.engine.sent.concat().len() as u64;
        assert_eq!(sent, pushed - dropped);
        assert_eq!(bench.traffic[0].packets_sent(), sent);
        assert_eq!(bench.traffic[0].packets_enqueued.get(), pushed);
        assert_eq!(bench.engine.send_buffer_bytes, 0, "nobody has set it");
    }
}
