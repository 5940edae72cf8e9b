//! A worker's whole way each way, but for the kernel's part: what is done to packets, and what
//! is done for each of them besides. Nobody captures.

use std::hint::black_box;
use std::net::SocketAddr;
use std::sync::Arc;

use fastvpn::counters::{Counters, PeerCounters};
use fastvpn::dataplane::Queueing;
use fastvpn::dataplane::inbound::Inbound;
use fastvpn::dataplane::outbound::Outbound;
use fastvpn::dataplane::table::{PeerSnapshot, Table};
use fastvpn::error::Result;
use fastvpn::io::Port;
use fastvpn::io::engine::{Destination, Engine, Event, OPEN_BATCHES_MAX, ReceiveMeta, Received};
use fastvpn::packet::batch::{Batch, Limits, NextHop};
use fastvpn::packet::coalesce::{FLOWS_MAX, TunOffloads, UDP_SEGMENTS_MAX};
use fastvpn::packet::ecn::Ecn;
use fastvpn::packet::fq_codel::Aqm;
use fastvpn::packet::icmp::TunnelAddresses;
use fastvpn::packet::ip::Version;
use fastvpn::packet::lpm::Prefixes;
use fastvpn::packet::vnet_packet::{VnetPacket, VnetSink};
use fastvpn::packet::{TCP, UDP};

use super::inputs::{self, MTU_BYTES};
use super::segment::{SMALL_BYTES, SMALL_VNET_PACKETS, VNET_PACKET_PACKETS, gso_packet};
use super::{Case, Kernel};

pub const CASES: &[Case] = &[
    ("worker/out-tcp4-1472", || {
        let vnet_packets = vec![gso_packet(Version::V4, TCP)];
        send(vnet_packets, VNET_PACKET_PACKETS, MTU_BYTES)
    }),
    ("worker/out-udp4-64", || {
        let packet = inputs::packet(Version::V4, UDP, 0).filling(SMALL_BYTES);
        let packets = 0..SMALL_VNET_PACKETS;
        let vnet_packets = packets.map(|index| packet.at(index).vnet_packet(0));
        send(vnet_packets.collect(), SMALL_VNET_PACKETS, SMALL_BYTES)
    }),
    ("worker/in-tcp4-1472", || {
        receive(TCP, MTU_BYTES, VNET_PACKET_PACKETS, 1)
    }),
    ("worker/in-udp4-64", || {
        let merged = SMALL_VNET_PACKETS / UDP_SEGMENTS_MAX;
        receive(UDP, SMALL_BYTES, SMALL_VNET_PACKETS, merged)
    }),
];

/// Vnet packets as the TUN queue gives them, of so many packets in all.
fn send(mut vnet_packets: Vec<Vec<u8>>, packets: usize, packet_bytes: usize) -> Kernel {
    let mut worker = Worker::new();
    let work = move || {
        for vnet_packet in &mut vnet_packets {
            worker.send(black_box(vnet_packet));
        }
        worker.flush()
    };
    Kernel::new(packets, packet_bytes, packets, work)
}

/// Datagrams that come together, into so many vnet packets.
fn receive(protocol: u8, packet_bytes: usize, packets: usize, vnet_packets: usize) -> Kernel {
    let first = inputs::packet(Version::V4, protocol, 0);
    let mut datagrams = inputs::flow(first, packet_bytes, packets).concat();
    let mut worker = Worker::new();
    let work = move || {
        worker.receive(black_box(&mut datagrams), packet_bytes);
        worker.flush()
    };
    Kernel::new(packets, packet_bytes, vnet_packets, work)
}

/// A worker with one plain peer, behind which everything is.
struct Worker {
    outbound: Outbound,
    inbound: Inbound,
    table: Table,
    counters: Counters,
    engine: Nowhere,
    peer: SocketAddr,
}

impl Worker {
    /// All memory is taken here.
    fn new() -> Self {
        let queueing = Queueing {
            limit: None,
            aqm: Aqm::FqCodel,
            inherits_dscp: false,
        };
        let peer = SocketAddr::from(([10, 0, 0, 2], 8285));
        let snapshot = PeerSnapshot {
            endpoint: Some(peer),
            mtu_bytes: MTU_BYTES,
            is_fragmented: true,
            traffic: Arc::new([PeerCounters::default()]),
            ..PeerSnapshot::default()
        };
        let all: (_, NextHop) = ("0.0.0.0/0".parse().expect("a prefix"), 0);
        let prefixes = Arc::new(Prefixes::new([all]));
        let offloads = TunOffloads {
            tcp: true,
            udp: true,
        };
        let mut engine = Nowhere {
            batches: (0..OPEN_BATCHES_MAX as u16).map(Batch::new).collect(),
            vnet_packets: (0..FLOWS_MAX as u16 + 1).map(VnetPacket::new).collect(),
            outputs: 0,
        };
        Self {
            outbound: Outbound::new(0, queueing, None, &mut engine),
            inbound: Inbound::new(offloads, 0, crossbeam_channel::bounded(1).0, None),
            table: Table::new(vec![snapshot], prefixes, TunnelAddresses::default(), false),
            counters: Counters::default(),
            engine,
            peer,
        }
    }

    fn send(&mut self, vnet_packet: &mut [u8]) {
        let (table, counters) = (&self.table, &self.counters);
        self.outbound
            .push(vnet_packet, table, counters, &mut self.engine);
    }

    fn receive(&mut self, datagrams: &mut [u8], segment_bytes: usize) {
        let meta = ReceiveMeta {
            sender: self.peer,
            called: None,
            is_shared: false,
            segment_bytes,
            ecn: Ecn::NotEct,
        };
        let (table, counters) = (&self.table, &self.counters);
        self.inbound
            .push(datagrams, meta, table, counters, &mut self.engine);
    }

    /// Nothing more arrives. Returns how many packets and vnet packets have left since the last
    /// call.
    fn flush(&mut self) -> u64 {
        let (table, counters) = (&self.table, &self.counters);
        self.outbound.flush(table, counters, &mut self.engine);
        self.inbound.flush(table, counters, &mut self.engine);
        std::mem::take(&mut self.engine.outputs)
    }
}

/// An engine whose output goes nowhere, at once.
struct Nowhere {
    batches: Vec<Batch>,
    vnet_packets: Vec<VnetPacket>,
    outputs: u64,
}

impl Engine for Nowhere {
    fn send(&mut self, batch: Batch, _: Destination) {
        black_box(batch.bytes());
        self.outputs += batch.count() as u64;
        self.batches.push(batch);
    }
    fn take_batch(&mut self) -> Option<Batch> {
        self.batches.pop()
    }
    fn put_back(&mut self, batch: Batch) {
        self.batches.push(batch);
    }
    fn unsent_bytes(&mut self, _: Port) -> usize {
        0
    }
    fn others_hold_unsent(&self) -> bool {
        false
    }
    fn set_send_buffer(&mut self, _: Port, bytes: usize) -> usize {
        bytes
    }
    fn wait_for_room(&mut self, _: Port) {}
    fn is_waiting_for_room(&self, _: Port) -> bool {
        false
    }
    fn port(&self, wanted: Port) -> Port {
        wanted
    }
    fn limits(&self, _: SocketAddr) -> Limits {
        Limits::FULL
    }
    fn next_event(&mut self) -> Option<Event> {
        None
    }
    fn has_event(&mut self) -> bool {
        false
    }
    fn recycle(&mut self, _: Received) {}
    fn submit(&mut self) -> Result<()> {
        Ok(())
    }
    fn poll(&mut self) -> Result<bool> {
        Ok(false)
    }
    fn wait(&mut self) -> Result<()> {
        Ok(())
    }
    fn note_sender(&mut self, _: SocketAddr, _: usize, _: bool) {}
    fn quiesce(&mut self) {}
    fn reset_limits(&mut self) {}
}

impl VnetSink for Nowhere {
    fn take_vnet_packet(&mut self) -> Option<VnetPacket> {
        self.vnet_packets.pop()
    }
    fn write(&mut self, vnet_packet: VnetPacket) {
        self.outputs += 1;
        black_box(vnet_packet.bytes());
        self.vnet_packets.push(vnet_packet);
    }
}
