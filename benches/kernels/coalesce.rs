//! Inbound: the datagrams of a batch, verified, into vnet packets for the TUN queue.

use std::hint::black_box;

use fastvpn::packet::coalesce::{Coalescer, FLOWS_MAX, TunOffloads, UDP_SEGMENTS_MAX};
use fastvpn::packet::ip::{self, Version};
use fastvpn::packet::vnet_packet::{VnetPacket, VnetSink};
use fastvpn::packet::{TCP, UDP};

use super::inputs::{self, ESP, MTU_BYTES, TCP_WITH_TIMESTAMP_BYTES};
use super::{Case, Kernel};

/// Datagrams of a batch of full-size ones.
const BATCH_PACKETS: usize = 44;

/// Datagrams of a batch of small ones.
const SMALL_PACKETS: usize = 128;

const SMALL_BYTES: usize = 64;

/// Packets in a row of each of many flows.
const RUN_PACKETS: usize = 4;

pub const CASES: &[Case] = &[
    ("coalesce/tcp4-batch", || tcp_batch(Version::V4)),
    ("coalesce/tcp6-batch", || tcp_batch(Version::V6)),
    // All open at a time, packet by packet in turn.
    ("coalesce/tcp4-16-flows", || {
        many_flows(FLOWS_MAX, FLOWS_MAX)
    }),
    // More than can be open: each packet closes another flow's vnet packet.
    ("coalesce/tcp4-32-flows", || {
        many_flows(2 * FLOWS_MAX, 2 * FLOWS_MAX * RUN_PACKETS)
    }),
    ("coalesce/udp4-64", udp_small),
    // Acknowledgments and ESP are copied one by one.
    ("coalesce/tcp4-acks", acknowledgments),
    ("coalesce/esp4-1472", || {
        let first = inputs::packet(Version::V4, ESP, 0);
        merge(
            &inputs::flow(first, MTU_BYTES, BATCH_PACKETS),
            BATCH_PACKETS,
        )
    }),
];

/// One full batch of one bulk stream.
fn tcp_batch(version: Version) -> Kernel {
    let first = inputs::packet(version, TCP, 0);
    merge(&inputs::flow(first, MTU_BYTES, BATCH_PACKETS), 1)
}

/// [`RUN_PACKETS`] of each of `flows`, packet by packet in turn.
fn many_flows(flows: usize, vnet_packets: usize) -> Kernel {
    let packet = |flow| inputs::packet(Version::V4, TCP, flow as u16).filling(MTU_BYTES);
    let packets: Vec<_> = (0..RUN_PACKETS)
        .flat_map(|index| (0..flows).map(move |flow| packet(flow).at(index).bytes()))
        .collect();
    merge(&packets, vnet_packets)
}

fn udp_small() -> Kernel {
    let first = inputs::packet(Version::V4, UDP, 0);
    let packets = inputs::flow(first, SMALL_BYTES, SMALL_PACKETS);
    merge(&packets, SMALL_PACKETS / UDP_SEGMENTS_MAX)
}

fn acknowledgments() -> Kernel {
    let first = inputs::packet(Version::V4, TCP, 0);
    let packet_bytes = fastvpn::packet::IPV4_HEADER_BYTES + TCP_WITH_TIMESTAMP_BYTES;
    let packets = inputs::flow(first, packet_bytes, SMALL_PACKETS);
    merge(&packets, SMALL_PACKETS)
}

/// Packets of equal size, back to back in one buffer, merged into `vnet_packets`
/// vnet packets.
fn merge(packets: &[Vec<u8>], vnet_packets: usize) -> Kernel {
    let packet_bytes = packets.first().map_or(1, Vec::len);
    let payload = packets.concat();
    let offloads = TunOffloads {
        tcp: true,
        udp: true,
    };
    let mut coalescer = Coalescer::new(offloads);
    let mut sink = Pool::new(vnet_packets.max(2 * FLOWS_MAX));
    let work = move || {
        for datagram in black_box(payload.as_slice()).chunks(packet_bytes) {
            if let Ok(version) = ip::verify(datagram) {
                coalescer.push(version, datagram, &mut sink);
            }
        }
        coalescer.flush(&mut sink);
        sink.empty()
    };
    Kernel::new(packets.len(), packet_bytes, vnet_packets, work)
}

/// A sink that uses the same vnet packets again in every run.
struct Pool {
    free: Vec<VnetPacket>,
    finished: Vec<VnetPacket>,
}

impl Pool {
    fn new(vnet_packets: usize) -> Self {
        Self {
            free: (0..vnet_packets)
                .map(|id| VnetPacket::new(id as u16))
                .collect(),
            finished: Vec::with_capacity(vnet_packets),
        }
    }

    /// Takes the finished vnet packets as written; returns how many there were.
    fn empty(&mut self) -> u64 {
        let count = self.finished.len();
        for vnet_packet in self.finished.drain(..) {
            black_box(vnet_packet.bytes());
            self.free.push(vnet_packet);
        }
        count as u64
    }
}

impl VnetSink for Pool {
    fn take_vnet_packet(&mut self) -> Option<VnetPacket> {
        self.free.pop()
    }

    fn write(&mut self, vnet_packet: VnetPacket) {
        self.finished.push(vnet_packet);
    }
}
