//! Both halves of two workers in WireGuard mode, without a handshake and without a network.

use std::net::SocketAddr;
use std::sync::Arc;

use crossbeam_channel::{Receiver, bounded};
use ipnet::IpNet;
use nix::sys::eventfd::EventFd;
use zeroize::Zeroizing;

use super::Queueing;
use super::inbound::Inbound;
use super::outbound::Outbound;
use super::sessions::Sessions;
use super::table::{PeerSnapshot, Table};
use super::test_support::Fake;
use crate::clock;
use crate::counters::{Counters, PeerCounters, Snapshot};
use crate::io::engine::{ReceiveMeta, SendFailure};
use crate::packet::coalesce::TunOffloads;
use crate::packet::ecn::Ecn;
use crate::packet::fq_codel::Aqm;
use crate::packet::icmp::TunnelAddresses;
use crate::packet::lpm::Prefixes;
use crate::packet::virtio;
use crate::wire::Endpoint;
use crate::wire::wireguard::handshake::TransportKeys;
use crate::wire::wireguard::message;
use crate::wire::wireguard::session::{REJECT_AFTER_NS, Session};
use crate::wire::wireguard::sessions::{PeerSessions, SessionMap, WorkerRequest};

const NEAR: u8 = 1;
const FAR: u8 = 2;
const OTHER: u8 = 3;

fn endpoint(host: u8) -> SocketAddr {
    ([192, 0, 2, host], 51820).into()
}

/// A host whose peers each have the prefix 10.0.HOST.0/24.
struct Host {
    number: u8,
    map: Arc<SessionMap>,
    requests: Receiver<WorkerRequest>,
    peers: Vec<(u8, Arc<PeerSessions>)>,
    traffic: Arc<[PeerCounters]>,
    table: Table,
    outbound: Outbound,
    inbound: Inbound,
    engine: Fake,
    counters: Counters,
}

fn host(number: u8, peers: &[u8], limit: Option<usize>) -> Host {
    let (sender, requests) = bounded(8);
    let map = Arc::new(SessionMap::new(16));
    let sessions = Sessions {
        map: Arc::clone(&map),
        requests: sender,
        wake: Arc::new(EventFd::new().unwrap()),
    };
    let queueing = Queueing {
        limit,
        aqm: Aqm::FqCodel,
        inherits_dscp: false,
    };
    let offloads = TunOffloads {
        tcp: false,
        udp: false,
    };
    let mut engine = Fake::default();
    let peers: Vec<_> = peers
        .iter()
        .map(|&peer| {
            let sessions = PeerSessions::default();
            sessions
                .endpoint
                .store(Some(Arc::new(endpoint(peer).into())));
            (peer, Arc::new(sessions))
        })
        .collect();
    let traffic: Arc<[PeerCounters]> = Arc::new([PeerCounters::default()]);
    Host {
        number,
        table: table(&peers, &traffic),
        map,
        requests,
        peers,
        traffic,
        outbound: Outbound::new(0, queueing, Some(sessions.clone()), &mut engine),
        inbound: Inbound::new(offloads, 0, bounded(1).0, Some(sessions)),
        engine,
        counters: Counters::default(),
    }
}

fn table(peers: &[(u8, Arc<PeerSessions>)], traffic: &Arc<[PeerCounters]>) -> Table {
    table_of(peers, traffic, false)
}

fn table_of(
    peers: &[(u8, Arc<PeerSessions>)],
    traffic: &Arc<[PeerCounters]>,
    is_hop: bool,
) -> Table {
    let prefix = |host: u8| -> IpNet { format!("10.0.{host}.0/24").parse().unwrap() };
    let prefixes = peers.iter().map(|(peer, _)| prefix(*peer)).zip(0..);
    let snapshots = peers.iter().map(|(_, sessions)| PeerSnapshot {
        sessions: Some(Arc::clone(sessions)),
        mtu_bytes: 1420,
        traffic: Arc::clone(traffic),
        ..PeerSnapshot::default()
    });
    Table::new(
        snapshots.collect(),
        Arc::new(Prefixes::new(prefixes)),
        TunnelAddresses::default(),
        is_hop,
    )
}

/// Gives two hosts a session, as a handshake does.
fn connect(initiator: &mut Host, responder: &mut Host) {
    connect_at(initiator, responder, clock::now_ns());
}

/// The same, at another time.
fn connect_at(initiator: &mut Host, responder: &mut Host, now_ns: u64) {
    let keys = [[1; 32], [2; 32]].map(Zeroizing::new);
    let indices = [&initiator, &responder].map(|host| host.map.reserve().unwrap());
    for (host, other, own, is_initiator) in [
        (&*initiator, &*responder, 0, true),
        (&*responder, &*initiator, 1, false),
    ] {
        let peer = host.sessions_of(other.number);
        let keys = TransportKeys {
            send: keys[own].clone(),
            receive: keys[1 - own].clone(),
            remote_index: indices[1 - own],
        };
        let index = indices[own];
        let session = Session::new(keys, index, is_initiator, now_ns, Arc::clone(&peer));
        let session = Arc::new(session);
        assert!(host.map.store(Arc::clone(&session)));
        match is_initiator {
            true => peer.current.store(Some(session)),
            false => peer.next.store(Some(session)),
        }
    }
}

impl Host {
    fn sessions_of(&self, peer: u8) -> Arc<PeerSessions> {
        let mut peers = self.peers.iter();
        Arc::clone(&peers.find(|(number, _)| *number == peer).unwrap().1)
    }

    fn push(&mut self, packet: &[u8]) {
        let mut vnet_packet = [&[0; virtio::HEADER_BYTES], packet].concat();
        let (table, counters) = (&self.table, &self.counters);
        self.outbound
            .push(&mut vnet_packet, table, counters, &mut self.engine);
        self.outbound.flush(table, counters, &mut self.engine);
    }

    fn pump(&mut self) {
        self.engine.unsent_bytes = 0;
        self.engine.is_waiting = false;
        self.outbound
            .pump(&self.table, &self.counters, &mut self.engine);
    }

    fn retry(&mut self) {
        let (table, counters) = (&self.table, &self.counters);
        self.outbound.retry(table, counters, &mut self.engine);
        self.outbound.flush(table, counters, &mut self.engine);
    }

    fn receive(&mut self, datagram: &[u8], from: SocketAddr) {
        let meta = ReceiveMeta {
            is_shared: true,
            sender: from,
            called: None,
            segment_bytes: datagram.len(),
            ecn: Ecn::NotEct,
        };
        let mut datagram = datagram.to_vec();
        let (table, counters) = (&self.table, &self.counters);
        self.inbound
            .push(&mut datagram, meta, table, counters, &mut self.engine);
        self.inbound
            .flush(&self.table, &self.counters, &mut self.engine);
    }

    fn sent(&mut self) -> Vec<(SocketAddr, Vec<u8>)> {
        std::mem::take(&mut self.engine.datagrams)
    }

    fn written(&mut self) -> Vec<Vec<u8>> {
        std::mem::take(&mut self.engine.written)
    }

    /// What was dropped of what came in the sessions of a peer, without zeros.
    fn refused_of(&self, peer: u8) -> Vec<(&'static str, u64)> {
        let all = self.sessions_of(peer).drops.values();
        all.into_iter().filter(|(_, count)| *count > 0).collect()
    }

    fn counters(&self) -> Snapshot {
        self.counters.snapshot()
    }
}

/// A packet between the prefixes of two hosts.
fn packet(from: u8, to: u8, number: u8, bytes: u8) -> Vec<u8> {
    let mut packet = vec![number; bytes.into()];
    packet[..12].copy_from_slice(&[0x45, 0, 0, bytes, 0, 0, 0x40, 0, 64, 253, 0, 0]);
    packet[12..20].copy_from_slice(&[10, 0, from, 1, 10, 0, to, 1]);
    packet
}

fn two_hosts() -> (Host, Host) {
    let (mut near, mut far) = (host(NEAR, &[FAR], None), host(FAR, &[NEAR, OTHER], None));
    connect(&mut near, &mut far);
    (near, far)
}

#[test]
fn a_packet_arrives_as_it_was_sent() {
    let (mut near, mut far) = two_hosts();
    for bytes in [20, 64, 65, 200] {
        let packet = packet(NEAR, FAR, 7, bytes);
        near.push(&packet);
        let [(to, datagram)] = &near.sent()[..] else {
            panic!("one datagram");
        };
        assert_eq!(*to, endpoint(FAR));
        assert_eq!((datagram.len() - 32) % 16, 0, "padded");
        let is_inside = datagram.windows(12).any(|bytes| packet.ends_with(bytes));
        assert!(!is_inside, "sealed");
        far.receive(datagram, endpoint(NEAR));
        assert_eq!(far.written(), [packet]);
    }
    assert_eq!(near.traffic[0].packets_sent(), 4);
    assert_eq!(far.traffic[0].packets_received.get(), 4);
    assert_eq!(far.engine.noted, [], "handshakes need the group's program");
    // Both ends count the same.
    let sent_bytes = near.traffic[0].bytes_sent();
    assert_eq!(far.traffic[0].bytes_received.get(), sent_bytes);
    assert_eq!(far.counters().drops().next(), None);
    // And back: the responder's session is in force since the initiator has used it.
    let answer = packet(FAR, NEAR, 8, 100);
    far.push(&answer);
    let sent = far.sent();
    near.receive(&sent[0].1, endpoint(FAR));
    assert_eq!(near.written(), [answer]);
}

#[test]
fn without_a_session_packets_wait_and_one_is_asked_for_once() {
    let (mut near, mut far) = (host(NEAR, &[FAR], None), host(FAR, &[NEAR], None));
    let packets: Vec<_> = (0..3).map(|number| packet(NEAR, FAR, number, 60)).collect();
    for packet in &packets {
        near.push(packet);
    }
    assert!(near.sent().is_empty());
    let peer = near.sessions_of(FAR);
    let Ok(WorkerRequest::Session(asked)) = near.requests.try_recv() else {
        panic!("none was asked for");
    };
    assert!(Arc::ptr_eq(&asked, &peer) && near.requests.is_empty());
    // Woken for the sake of another peer.
    near.retry();
    assert!(near.sent().is_empty() && near.requests.is_empty());
    connect(&mut near, &mut far);
    near.retry();
    for (_, datagram) in near.sent() {
        far.receive(&datagram, endpoint(NEAR));
    }
    assert_eq!(far.written(), packets, "in order");
    assert_eq!(near.counters().drops().next(), None);
}

/// A tunnel that counts as a hop takes one from what it holds, however often it tries.
#[test]
fn held_packets_spend_one_hop() {
    let (mut near, mut far) = (host(NEAR, &[FAR], None), host(FAR, &[NEAR], None));
    let peers = near.peers.clone();
    near.table = table_of(&peers, &near.traffic, true);
    near.push(&packet(NEAR, FAR, 1, 60));
    for _ in 0..10 {
        near.retry();
    }
    connect(&mut near, &mut far);
    near.retry();
    far.receive(&near.sent()[0].1, endpoint(NEAR));
    assert_eq!(far.written()[0][8], 63);
    assert_eq!(near.counters().tun_reads, 1);
}

#[test]
fn packets_that_are_held_when_the_worker_stops_are_counted() {
    let mut near = host(NEAR, &[FAR], None);
    for number in 0..3 {
        near.push(&packet(NEAR, FAR, number, 60));
    }
    let (table, counters) = (&near.table, &near.counters);
    near.outbound.release(table, counters, &mut near.engine);
    assert_eq!(near.counters().drop_no_session, 3);
    assert_eq!(near.traffic[0].drop_no_session.get(), 3);
}

#[test]
fn the_responder_waits_until_the_initiator_has_used_the_session() {
    let (mut near, mut far) = two_hosts();
    let answer = packet(FAR, NEAR, 1, 60);
    far.push(&answer);
    assert!(far.sent().is_empty());
    far.requests.try_iter().for_each(drop);
    near.push(&packet(NEAR, FAR, 2, 60));
    far.receive(&near.sent()[0].1, endpoint(NEAR));
    // The handshake thread hears of it, and has all workers try again.
    let requests: Vec<_> = far.requests.try_iter().collect();
    assert!(matches!(requests[..], [WorkerRequest::Session(_)]));
    far.retry();
    near.receive(&far.sent()[0].1, endpoint(FAR));
    assert_eq!(near.written(), [answer]);
}

#[test]
fn what_waits_for_room_is_sealed_as_it_leaves() {
    let (mut near, mut far) = (host(NEAR, &[FAR], Some(1000)), host(FAR, &[NEAR], None));
    connect(&mut near, &mut far);
    let packets: Vec<_> = (0..30)
        .map(|number| packet(NEAR, FAR, number, 200))
        .collect();
    for packet in &packets {
        near.push(packet);
    }
    let before = near.sent();
    assert!(before.len() < packets.len());
    let session = near.sessions_of(FAR).current.load_full().unwrap();
    assert_eq!(session.counter(), before.len() as u64);
    // It moves meanwhile: what waits goes to where it is now.
    near.sessions_of(FAR)
        .endpoint
        .store(Some(Arc::new(endpoint(99).into())));
    let mut later = Vec::new();
    for _ in 0..100 {
        near.pump();
        later.extend(near.sent());
    }
    assert!(later.iter().all(|(to, _)| *to == endpoint(99)));
    for (counter, (_, datagram)) in before.iter().chain(&later).enumerate() {
        assert_eq!(datagram[8..16], (counter as u64).to_le_bytes());
        far.receive(datagram, endpoint(NEAR));
    }
    assert_eq!(far.written(), packets);
}

#[test]
fn what_is_dropped_is_counted_for_its_peer_wherever_that_has_moved() {
    let (mut near, mut far) = (host(NEAR, &[FAR], Some(1000)), host(FAR, &[NEAR], None));
    connect(&mut near, &mut far);
    near.push(&packet(NEAR, FAR, 1, 200));
    // What is dropped first has waited since before.
    for port in 0.. {
        let moved = SocketAddr::from(([192, 0, 2, FAR], port));
        let sessions = near.sessions_of(FAR);
        sessions.endpoint.store(Some(Arc::new(moved.into())));
        near.push(&packet(NEAR, FAR, 1, 200));
        if near.counters().drop_queue_full > 10 {
            break;
        }
    }
    let (dropped, traffic) = (near.counters().drop_queue_full, &near.traffic[0]);
    assert_eq!(traffic.drop_queue_full.get(), dropped);
    assert_eq!(traffic.packets_unsent.get(), dropped);
    assert_eq!(traffic.bytes_unsent.get(), dropped * (208 + 32));
}

#[test]
fn a_session_that_ends_takes_what_waits_with_it() {
    let (mut near, mut far) = (host(NEAR, &[FAR], Some(1000)), host(FAR, &[NEAR], None));
    connect(&mut near, &mut far);
    for number in 0..30 {
        near.push(&packet(NEAR, FAR, number, 200));
    }
    let sent = near.sent().len() as u64;
    near.sessions_of(FAR).clear();
    for _ in 0..100 {
        near.pump();
    }
    assert!(near.sent().is_empty());
    assert_eq!(near.counters().drop_no_session, 30 - sent);
    assert_eq!(near.traffic[0].drop_no_session.get(), 30 - sent);
    assert_eq!(near.traffic[0].packets_sent(), sent);
    assert_eq!(near.traffic[0].bytes_sent(), sent * (208 + 32));
}

#[test]
fn a_peer_sends_only_from_its_own_prefixes() {
    let (mut near, mut far) = two_hosts();
    // What a peer claims inside is what another one has.
    near.push(&packet(OTHER, FAR, 1, 60));
    far.receive(&near.sent()[0].1, endpoint(NEAR));
    assert!(far.written().is_empty());
    assert_eq!(far.counters().drop_source_not_allowed, 1);
    assert_eq!(far.refused_of(NEAR), [("source_not_allowed", 1)]);
    assert!(far.refused_of(OTHER).is_empty());
}

#[test]
fn what_is_not_authentic_comes_to_nothing() {
    let (mut near, mut far) = two_hosts();
    near.push(&packet(NEAR, FAR, 1, 60));
    let (_, good) = near.sent().remove(0);
    let stranger = endpoint(66);
    let changed = |at: usize| {
        let mut bytes = good.clone();
        bytes[at] ^= 1;
        bytes
    };
    far.receive(&changed(good.len() - 1), stranger);
    far.receive(&changed(20), stranger);
    assert_eq!(far.counters().drop_forged, 2);
    far.receive(&changed(5), stranger);
    assert_eq!(far.counters().drop_session_unknown, 1);
    far.receive(&good[..31], stranger);
    assert_eq!(far.counters().drop_short, 1);
    // Plain packets, and probes of plain mode, which are packets.
    far.receive(&packet(NEAR, FAR, 1, 60), endpoint(NEAR));
    assert_eq!(far.counters().drop_not_wireguard, 1);
    far.receive(&[], stranger);
    let peer = far.sessions_of(NEAR);
    assert!(far.written().is_empty() && peer.current.load().is_none());
    assert_eq!(peer.address(), Some(endpoint(NEAR)));
    // The good one is as good as before.
    far.receive(&good, endpoint(NEAR));
    assert_eq!(far.written().len(), 1);
    far.receive(&good, stranger);
    assert_eq!(far.counters().drop_replayed, 1);
    assert_eq!(far.refused_of(NEAR), [("forged", 2), ("replayed", 1)]);
    assert!(far.written().is_empty());
    assert_eq!(peer.address(), Some(endpoint(NEAR)));
}

/// The address that the peer called is kept while sends from there fail for what is not its
/// fault, and forgotten when they cannot leave from there.
#[test]
fn a_source_that_the_kernel_refuses_is_forgotten() {
    let near = host(NEAR, &[FAR], None);
    let (sessions, counters) = (near.sessions_of(FAR), Counters::default());
    let (address, source) = (endpoint(FAR), Some([10, 9, 9, 9].into()));
    for (errno, is_kept) in [
        (libc::EAGAIN, true),
        (libc::ENOBUFS, true),
        (libc::EMSGSIZE, true),
        (libc::EINVAL, false),
        (libc::ENETUNREACH, false),
    ] {
        sessions.note_handshake(Endpoint { address, source });
        let failure = SendFailure {
            next_hop: 0,
            destination: address,
            errno,
            packets: 1,
            bytes: 100,
        };
        near.outbound.failed(&failure, &near.table, &counters);
        let endpoint = sessions.endpoint.load_full().unwrap();
        assert_eq!(
            (endpoint.address, endpoint.source),
            (address, source.filter(|_| is_kept))
        );
    }
}

#[test]
fn what_comes_in_a_session_that_is_too_old_is_counted_for_its_peer() {
    let (mut near, mut far) = (host(NEAR, &[FAR], None), host(FAR, &[NEAR], None));
    let old_ns = clock::now_ns().checked_sub(REJECT_AFTER_NS);
    let old_ns = old_ns.expect("this machine was started three minutes ago");
    connect_at(&mut near, &mut far, old_ns);
    let session = near.sessions_of(FAR).current.load_full().unwrap();
    let mut keepalive = vec![0; 32];
    session.seal(&mut keepalive, 32).unwrap();
    far.receive(&keepalive, endpoint(NEAR));
    assert_eq!(far.counters().drop_session_unknown, 1);
    assert_eq!(far.refused_of(NEAR), [("session_unknown", 1)]);
}

#[test]
fn a_peer_is_sent_to_where_it_last_sent_from() {
    let (mut near, mut far) = two_hosts();
    near.push(&packet(NEAR, FAR, 1, 60));
    let moved = endpoint(77);
    far.receive(&near.sent()[0].1, moved);
    far.push(&packet(FAR, NEAR, 1, 60));
    assert_eq!(far.sent()[0].0, moved);
}

#[test]
fn keepalives_are_noted_and_go_nowhere() {
    let (near, mut far) = two_hosts();
    let mut keepalive = vec![0; 32];
    let session = near.sessions_of(FAR).current.load_full().unwrap();
    session.seal(&mut keepalive, 32).unwrap();
    far.receive(&keepalive, endpoint(NEAR));
    let (peer, snapshot) = (far.sessions_of(NEAR), far.counters());
    assert_eq!(snapshot.keepalives_received, 1);
    assert_eq!(snapshot.drops().next(), None);
    use std::sync::atomic::Ordering::Relaxed;
    assert_ne!(peer.received_ns.load(Relaxed), 0);
    assert_eq!(peer.data_received_ns.load(Relaxed), 0);
    assert!(far.written().is_empty());
}

#[test]
fn handshake_messages_that_come_to_a_worker_are_passed_on() {
    let mut far = host(FAR, &[NEAR], None);
    let mut initiation = vec![0; message::INITIATION_BYTES];
    initiation[0] = message::INITIATION;
    for _ in 0..20 {
        far.receive(&initiation, endpoint(NEAR));
    }
    let passed: Vec<_> = far.requests.try_iter().collect();
    assert_eq!(
        passed.len(),
        4,
        "half of the room is for what workers ask for"
    );
    let is_it = |request: &WorkerRequest| {
        matches!(request, WorkerRequest::Message(from, bytes)
            if from.address == endpoint(NEAR) && **bytes == initiation)
    };
    assert!(passed.iter().all(is_it));
}

/// A next hop that another peer has by now must not get what was meant for the one before.
#[test]
fn a_table_with_another_peer_in_the_same_place_is_told_apart() {
    let near = host(NEAR, &[FAR], None);
    let same = table(&near.peers, &near.traffic);
    assert!(same.has_sessions_of(&near.table));
    let other = [(OTHER, Arc::new(PeerSessions::default()))];
    let more = [near.peers.clone(), other.to_vec()].concat();
    assert!(table(&more, &near.traffic).has_sessions_of(&near.table));
    for peers in [&other[..], &[]] {
        assert!(!table(peers, &near.traffic).has_sessions_of(&near.table));
    }
}
