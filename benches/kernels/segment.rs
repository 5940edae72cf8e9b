//! Outbound: vnet packets from the TUN queue into packets, packets into batches.

use std::hint::black_box;

use fastvpn::packet::batch::{BATCH_BYTES_MAX, Batch, Limits};
use fastvpn::packet::ip::Version;
use fastvpn::packet::segment::Segments;
use fastvpn::packet::{TCP, UDP};

use super::inputs::{self, MTU_BYTES};
use super::{Case, Kernel};

/// Packets of a full TSO or USO vnet packet at [`MTU_BYTES`].
pub const VNET_PACKET_PACKETS: usize = 44;

/// Small vnet packets that follow each other in a batch: one full batch of them.
pub const SMALL_VNET_PACKETS: usize = 128;

pub const SMALL_BYTES: usize = 64;

pub const CASES: &[Case] = &[
    ("segment/tcp4-1472", || cut(Version::V4, TCP)),
    ("segment/tcp6-1472", || cut(Version::V6, TCP)),
    ("segment/udp4-1472", || cut(Version::V4, UDP)),
    ("segment/whole4-1472", || whole(MTU_BYTES)),
    ("segment/whole4-64", || whole(SMALL_BYTES)),
    ("batch/1472", || append(VNET_PACKET_PACKETS, MTU_BYTES)),
    ("batch/64", || append(SMALL_VNET_PACKETS, SMALL_BYTES)),
    ("outbound/tcp4-1472", vnet_packet_to_batch),
    ("outbound/udp4-64", small_vnet_packets_to_batch),
];

/// One super-vnet packet into packets, back to back.
fn cut(version: Version, protocol: u8) -> Kernel {
    let vnet_packet = gso_packet(version, protocol);
    let mut out = vec![0; VNET_PACKET_PACKETS * MTU_BYTES];
    let work = move || write_all(black_box(&vnet_packet), black_box(&mut out)) as u64;
    Kernel::new(VNET_PACKET_PACKETS, MTU_BYTES, VNET_PACKET_PACKETS, work)
}

/// Vnet packets of one packet each, whose checksum is left to us.
fn whole(packet_bytes: usize) -> Kernel {
    let packet = inputs::packet(Version::V4, UDP, 0).filling(packet_bytes);
    let vnet_packet = packet.vnet_packet(0);
    let mut out = vec![0; packet_bytes];
    let work = move || {
        let written = (0..SMALL_VNET_PACKETS)
            .map(|_| write_all(black_box(&vnet_packet), black_box(&mut out)));
        written.sum::<usize>() as u64
    };
    Kernel::new(SMALL_VNET_PACKETS, packet_bytes, SMALL_VNET_PACKETS, work)
}

/// Ready packets into one batch: room found, bytes copied.
fn append(packets: usize, packet_bytes: usize) -> Kernel {
    let packet = inputs::packet(Version::V4, UDP, 0);
    let packet = packet.filling(packet_bytes).bytes();
    let mut batch = Batch::new(0);
    let work = move || {
        batch.start(0, Limits::FULL);
        for _ in 0..packets {
            let packet = black_box(packet.as_slice());
            if let Some(room) = batch.reserve(packet.len()) {
                room.copy_from_slice(packet);
            }
        }
        black_box(batch.bytes());
        batch.count() as u64
    };
    Kernel::new(packets, packet_bytes, packets, work)
}

/// Both steps, as a worker does them: each packet is written where its batch
/// has room.
fn vnet_packet_to_batch() -> Kernel {
    let vnet_packet = gso_packet(Version::V4, TCP);
    let mut batch = Batch::new(0);
    let work = move || {
        batch.start(0, Limits::FULL);
        fill(black_box(&vnet_packet), &mut batch);
        black_box(batch.bytes());
        batch.count() as u64
    };
    Kernel::new(VNET_PACKET_PACKETS, MTU_BYTES, VNET_PACKET_PACKETS, work)
}

fn small_vnet_packets_to_batch() -> Kernel {
    let packet = inputs::packet(Version::V4, UDP, 0).filling(SMALL_BYTES);
    let vnet_packets: Vec<_> = (0..SMALL_VNET_PACKETS)
        .map(|index| packet.at(index).vnet_packet(0))
        .collect();
    let mut batch = Batch::new(0);
    let work = move || {
        batch.start(0, Limits::FULL);
        for vnet_packet in &vnet_packets {
            fill(black_box(vnet_packet), &mut batch);
        }
        black_box(batch.bytes());
        batch.count() as u64
    };
    Kernel::new(SMALL_VNET_PACKETS, SMALL_BYTES, SMALL_VNET_PACKETS, work)
}

pub fn gso_packet(version: Version, protocol: u8) -> Vec<u8> {
    let whole = inputs::packet(version, protocol, 0);
    let gso_bytes = MTU_BYTES - whole.header_bytes();
    let payload_bytes = VNET_PACKET_PACKETS * gso_bytes;
    whole
        .filling(whole.header_bytes() + payload_bytes)
        .vnet_packet(gso_bytes)
}

/// Writes a vnet packet's packets one behind the other; returns how many.
fn write_all(vnet_packet: &[u8], out: &mut [u8]) -> usize {
    let Ok(segments) = Segments::new(vnet_packet) else {
        return 0;
    };
    let mut rest = out;
    for index in 0..segments.count() {
        let (packet, behind) = rest.split_at_mut(segments.packet_bytes(index));
        segments.write(index, packet);
        rest = behind;
    }
    segments.count()
}

/// Writes a vnet packet's packets into a batch, as long as they fit.
fn fill(vnet_packet: &[u8], batch: &mut Batch) {
    let Ok(segments) = Segments::new(vnet_packet) else {
        return;
    };
    for index in 0..segments.count() {
        if let Some(room) = batch.reserve(segments.packet_bytes(index)) {
            segments.write(index, room);
        }
    }
}

const _: () = assert!(VNET_PACKET_PACKETS * MTU_BYTES <= BATCH_BYTES_MAX);
