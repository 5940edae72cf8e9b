//! UDP to TUN: a packet's way into the host. It meets, in this order,
//!
//! 1. [`Inbound::push`]: the datagrams of one receive. In plain mode a peer has to send from
//!    their address ([`plain::Senders`]); in WireGuard mode each names its session, which
//!    opens it in place ([`Session::open`]).
//! 2. [`ip::verify`]: it holds one whole IP packet.
//! 3. `Allowed::admits`: its source is one that this peer may send from; if not,
//!    `refuse` looks whether it is a probe.
//! 4. [`Coalescer::push`]: packets of one flow become one vnet packet, and a vnet packet that
//!    cannot grow any more goes to the engine ([`VnetSink::write`]).
//! 5. [`Inbound::flush`] when nothing more arrives: so do all others.
//!
//! [`plain::Senders`]: crate::wire::plain::Senders

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crossbeam_channel::Sender;

use super::sessions::Sessions;
use super::table::{PeerSnapshot, Table};
use super::tapped::{self, Tapped};
use crate::capture::Reason;
use crate::clock;
use crate::counters::Counters;
use crate::io::engine::{Engine, ReceiveMeta};
use crate::packet::batch::NextHop;
use crate::packet::coalesce::{Coalescer, TunOffloads};
use crate::packet::ecn;
use crate::packet::ip::{self, Malformed, Version};
use crate::packet::probe::{Kind, Probe};
use crate::packet::vnet_packet::VnetSink;
use crate::wire::Endpoint;
use crate::wire::wireguard::message::{Data, Message};
use crate::wire::wireguard::session::{OpenError, Session};
use crate::wire::wireguard::sessions::{InboundDrops, PeerSessions};

/// A probe, and where it came from: for the control thread.
pub type ReceivedProbe = (SocketAddr, Probe);

/// The inbound half of a worker.
#[derive(Debug)]
pub struct Inbound {
    coalescer: Coalescer,
    /// Index of the worker.
    worker: usize,
    probes: Sender<ReceivedProbe>,
    /// In WireGuard mode.
    sessions: Option<Sessions>,
}

impl Inbound {
    /// `offloads`: the GSO packets that the TUN device takes. `worker`: the
    /// worker's index. `probes`: takes those that come. `sessions`: those of WireGuard mode.
    pub fn new(
        offloads: TunOffloads,
        worker: usize,
        probes: Sender<ReceivedProbe>,
        sessions: Option<Sessions>,
    ) -> Self {
        Self {
            coalescer: Coalescer::new(offloads),
            worker,
            probes,
            sessions,
        }
    }

    /// Takes in the datagrams of one receive: `payload` holds them back to back. They are
    /// opened in place.
    #[inline]
    pub fn push<'a>(
        &mut self,
        payload: &'a mut [u8],
        meta: ReceiveMeta,
        table: &'a Table,
        counters: &Counters,
        engine: &mut impl Engine,
    ) {
        counters.udp_receives.add(1);
        let (sender, segment_bytes) = (meta.sender, meta.segment_bytes.max(1));
        let received_bytes = payload.len();
        if payload.is_empty() {
            counters.drop_short.add(1);
            return;
        }
        let datagrams = payload.chunks_mut(segment_bytes);
        if self.sessions.is_some() {
            self.push_sealed(datagrams, meta, table, counters, engine);
            return;
        }
        if !table.senders().has(sender.ip()) {
            counters.drop_sender_unknown.add(datagrams.len() as u64);
            counters.first.sender_unknown.give(sender.ip());
            if counters.tap.is_on() {
                let note = |packet| tapped::refused(packet, None, Reason::SenderUnknown);
                datagrams.for_each(|packet| counters.tap.note(|| note(packet)));
            }
            return;
        }
        let mut allowed = Allowed::none(self.worker, Origin::Address(sender));
        let mut sink = tapped(engine, table, counters);
        for packet in datagrams {
            self.take(packet, meta, &mut allowed, table, counters, &mut sink);
        }
        allowed.settle(counters);
        engine.note_sender(sender, received_bytes, meta.is_shared);
    }

    /// Takes in the datagrams of one receive in WireGuard mode. Senders get no sockets of their
    /// own there: handshakes would come to workers by them.
    #[inline]
    fn push_sealed<'a>(
        &mut self,
        datagrams: impl Iterator<Item = &'a mut [u8]>,
        meta: ReceiveMeta,
        table: &'a Table,
        counters: &Counters,
        engine: &mut impl Engine,
    ) {
        let now_ns = clock::now_ns();
        let mut sink = tapped(engine, table, counters);
        let mut run: Option<Run<'a>> = None;
        for datagram in datagrams {
            let Some(Data {
                receiver_index: index,
                ..
            }) = Data::read(datagram)
            else {
                self.take_message(datagram, meta.endpoint(), counters);
                continue;
            };
            if run
                .as_ref()
                .is_none_or(|run| run.session.local_index() != index)
            {
                if let Some(run) = run.take() {
                    run.end(meta.endpoint(), now_ns, self.sessions.as_ref(), counters);
                }
                run = self.start_run(index, now_ns);
            }
            let Some(run) = &mut run else {
                counters.drop_session_unknown.add(1);
                continue;
            };
            let datagram_bytes = datagram.len();
            match run.session.open(datagram) {
                Ok(padded) => {
                    run.is_authentic = true;
                    if padded.is_empty() {
                        counters.keepalives_received.add(1);
                        continue;
                    }
                    run.has_data = true;
                    let packet_bytes = ip::total_bytes(padded).min(padded.len());
                    let packet = &mut padded[..packet_bytes];
                    run.allowed.around_bytes = datagram_bytes - packet_bytes;
                    self.take(packet, meta, &mut run.allowed, table, counters, &mut sink);
                }
                Err(OpenError::Short) => counters.drop_short.add(1),
                Err(OpenError::Forged) => {
                    counters.drop_forged.add(1);
                    run.count(1, |drops| &drops.forged);
                }
                Err(OpenError::Replayed) => {
                    counters.drop_replayed.add(1);
                    run.count(1, |drops| &drops.replayed);
                }
            }
        }
        if let Some(run) = run {
            run.end(meta.endpoint(), now_ns, self.sessions.as_ref(), counters);
        }
    }

    /// Finds the session that datagrams name.
    #[inline]
    fn start_run<'a>(&self, index: u32, now_ns: u64) -> Option<Run<'a>> {
        let session = Arc::clone(self.sessions.as_ref()?.map.get(index).as_ref()?);
        let from = Origin::Session(Arc::as_ptr(session.peer()));
        let run = Run {
            allowed: Allowed::none(self.worker, from),
            session,
            is_authentic: false,
            has_data: false,
        };
        if !run.session.may_receive(now_ns) {
            run.count(1, |drops| &drops.session_unknown);
            return None;
        }
        Some(run)
    }

    /// Takes in a datagram that is not a data message.
    #[cold]
    fn take_message(&self, datagram: &[u8], sender: Endpoint, counters: &Counters) {
        match (Message::parse(datagram), &self.sessions) {
            (Some(_), Some(sessions)) => sessions.pass_on(sender, datagram),
            _ => counters.drop_not_wireguard.add(1),
        }
    }

    /// Takes in a packet of the peer that `allowed` is about.
    #[inline]
    fn take<'a>(
        &mut self,
        packet: &'a mut [u8],
        meta: ReceiveMeta,
        allowed: &mut Allowed<'a>,
        table: &'a Table,
        counters: &Counters,
        sink: &mut impl VnetSink,
    ) {
        let version = match ip::verify(packet) {
            Ok(version) => version,
            Err(malformed) => return refuse_malformed(malformed, packet, counters),
        };
        if !ecn::decapsulate(version, packet, meta.ecn) {
            counters.drop_ecn.add(1);
            let note = || tapped::refused(packet, allowed.sender(table), Reason::Ecn);
            counters.tap.note(note);
            return;
        }
        let packet = &*packet;
        if allowed.admits(version, packet, table, counters) {
            allowed.count(packet.len());
            self.coalescer.push(version, packet, sink);
        } else {
            self.refuse(version, packet, meta.sender, allowed, table, counters);
        }
    }

    /// Writes all that is still held for merging: no more datagrams are at hand.
    #[inline]
    pub fn flush(&mut self, table: &Table, counters: &Counters, engine: &mut impl Engine) {
        self.coalescer.flush(&mut tapped(engine, table, counters));
    }

    /// Takes in a probe: the control thread answers, and reads of keepalives in the counters.
    #[cold]
    fn take_probe(&self, probe: Probe, sender: SocketAddr, table: &Table, counters: &Counters) {
        let Kind::Keepalive { seconds } = probe.kind else {
            counters.probes_received.add(1);
            if probe.kind != Kind::Size {
                // One that finds no room is as good as lost on its way.
                let _ = self.probes.try_send((sender, probe));
            }
            return;
        };
        counters.keepalives_received.add(1);
        let hops = table.senders().peers(sender.ip()).iter().take(SHARERS_MAX);
        let all = hops.filter_map(|hop| table.at(*hop));
        let all = all.map(|peer| (peer, peer.endpoint.map_or(0, |endpoint| endpoint.port())));
        // Peers at one address are told apart by their ports. A NAT may have rewritten that of
        // one that is there alone.
        let exact = all.clone().find(|(_, port)| *port == sender.port());
        let (mut others, is_alone) = (all.clone(), all.count() == 1);
        let Some((peer, port)) = exact.or_else(|| others.next().filter(|_| is_alone)) else {
            return;
        };
        if let Some(traffic) = peer.traffic.get(self.worker) {
            traffic.note_keepalive(seconds);
            traffic.note_port(sender.port(), port);
        }
    }

    /// Takes in a packet that its sender may not send, unless it is a probe.
    #[cold]
    fn refuse(
        &self,
        version: Version,
        packet: &[u8],
        sender: SocketAddr,
        allowed: &mut Allowed<'_>,
        table: &Table,
        counters: &Counters,
    ) {
        if self.sessions.is_none()
            && let Some(probe) = Probe::from_packet(packet)
        {
            return self.take_probe(probe, sender, table, counters);
        }
        let (sender, source) = (sender.ip(), ip::source(version, packet));
        counters.drop_source_not_allowed.add(1);
        let note = || tapped::refused(packet, allowed.sender(table), Reason::SourceNotAllowed);
        counters.tap.note(note);
        allowed.refused += 1;
        counters.first.source_not_allowed.give((sender, source));
        let peer = table.senders().peer(sender).and_then(|peer| table.at(peer));
        if let Some(traffic) = peer.and_then(|peer| peer.traffic.get(self.worker)) {
            traffic.drop_source_not_allowed.add(1);
        }
    }
}

/// The TUN queue, with what it is given noted for those who capture.
#[inline]
fn tapped<'a, E: Engine>(
    engine: &'a mut E,
    table: &'a Table,
    counters: &'a Counters,
) -> Tapped<'a, E> {
    Tapped {
        sink: engine,
        tap: &counters.tap,
        table: Some(table),
    }
}

/// Most peers at one address that a keepalive may be from.
const SHARERS_MAX: usize = 16;

/// Drops what is not one whole IP packet.
#[cold]
fn refuse_malformed(malformed: Malformed, bytes: &[u8], counters: &Counters) {
    let (drops, reason) = match malformed {
        Malformed::Short => (&counters.drop_short, Reason::Short),
        Malformed::Version => (&counters.drop_version, Reason::Version),
        Malformed::Length => (&counters.drop_length, Reason::Length),
    };
    drops.add(1);
    let tap = &counters.tap;
    tap.note(|| tapped::refused(bytes, None, reason));
}

/// Datagrams of one session that came together.
struct Run<'a> {
    session: Arc<Session>,
    allowed: Allowed<'a>,
    /// One of them could be opened.
    is_authentic: bool,
    /// One of those was not a keepalive.
    has_data: bool,
}

impl Run<'_> {
    /// Counts datagrams that came to nothing.
    #[cold]
    fn count(&self, datagrams: u64, of: impl Fn(&InboundDrops) -> &AtomicU64) {
        of(&self.session.peer().drops).fetch_add(datagrams, Ordering::Relaxed);
    }

    /// Takes note of what came, and from where.
    #[inline]
    fn end(
        mut self,
        sender: Endpoint,
        now_ns: u64,
        sessions: Option<&Sessions>,
        counters: &Counters,
    ) {
        self.allowed.settle(counters);
        if !self.is_authentic {
            return;
        }
        if self.allowed.refused > 0 {
            self.count(self.allowed.refused, |drops| &drops.source_not_allowed);
        }
        let peer = self.session.peer();
        peer.note_received(now_ns, self.has_data);
        peer.note_sender(sender);
        if peer.confirm(&self.session)
            && let Some(sessions) = sessions
        {
            sessions.confirmed(peer);
        }
    }
}

/// Who has sent packets.
#[derive(Clone, Copy)]
enum Origin {
    /// Whatever peer has this address.
    Address(SocketAddr),
    /// The peer with these sessions; they are only compared.
    Session(*const PeerSessions),
}

impl Origin {
    #[inline]
    fn is(self, peer: &PeerSnapshot) -> bool {
        match self {
            Self::Address(sender) => peer.endpoint.is_some_and(|to| to.ip() == sender.ip()),
            Self::Session(sessions) => {
                let its = peer.sessions.as_ref();
                its.is_some_and(|its| std::ptr::eq(Arc::as_ptr(its), sessions))
            }
        }
    }
}

/// The reverse path check: packets must come from the peer that packets to
/// their source would go to (RFC 3704, section 2.2). Neighbours in a batch
/// mostly have one source, so the last verdict is kept.
struct Allowed<'a> {
    worker: usize,
    from: Origin,
    /// The packet that the verdict was about.
    last: Option<(Version, &'a [u8])>,
    /// The peer behind which its source is, if it is the sender.
    peer: Option<&'a PeerSnapshot>,
    /// Packets and bytes of this peer that are not in its counters yet.
    packets: u64,
    bytes: u64,
    /// What a datagram has around the packet, and counts as well.
    around_bytes: usize,
    /// Packets that its sender may not send.
    refused: u64,
}

impl<'a> Allowed<'a> {
    #[inline]
    fn none(worker: usize, from: Origin) -> Self {
        Self {
            worker,
            from,
            last: None,
            peer: None,
            packets: 0,
            bytes: 0,
            around_bytes: 0,
            refused: 0,
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
            self.peer = table
                .peer(ip::source(version, packet))
                .map(|(_, peer)| peer)
                .filter(|peer| self.from.is(peer));
        }
        self.peer.is_some()
    }

    /// The peer that has sent the packets, for those who capture; the first of several at one
    /// address.
    #[cold]
    fn sender(&self, table: &Table) -> Option<NextHop> {
        table.find(|peer| self.from.is(peer))
    }

    #[inline]
    fn count(&mut self, packet_bytes: usize) {
        self.packets += 1;
        self.bytes += (packet_bytes + self.around_bytes) as u64;
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
            if let Origin::Address(sender) = self.from {
                let expected = peer.endpoint.map_or(0, |endpoint| endpoint.port());
                traffic.note_port(sender.port(), expected);
            }
        }
    }
}
