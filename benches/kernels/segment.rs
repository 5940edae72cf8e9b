//! Outbound: frames from the TUN queue into packets, packets into trains.

use std::hint::black_box;

use fastvpn::packet::ip::Version;
use fastvpn::packet::segment::Segments;
use fastvpn::packet::train::{Limits, TRAIN_BYTES_MAX, Train};
use fastvpn::packet::{TCP, UDP};

use super::inputs::{self, MTU_BYTES};
use super::{Case, Kernel};

/// Packets of a full TSO or USO frame at [`MTU_BYTES`].
const FRAME_PACKETS: usize = 44;

/// Small frames that follow each other in a batch: one full train of them.
const SMALL_FRAMES: usize = 128;

const SMALL_BYTES: usize = 64;

pub const CASES: &[Case] = &[
    ("segment/tcp4-1472", || cut(Version::V4, TCP)),
    ("segment/tcp6-1472", || cut(Version::V6, TCP)),
    ("segment/udp4-1472", || cut(Version::V4, UDP)),
    ("segment/whole4-1472", || whole(MTU_BYTES)),
    ("segment/whole4-64", || whole(SMALL_BYTES)),
    ("train/1472", || append(FRAME_PACKETS, MTU_BYTES)),
    ("train/64", || append(SMALL_FRAMES, SMALL_BYTES)),
    ("outbound/tcp4-1472", frame_to_train),
    ("outbound/udp4-64", small_frames_to_train),
];

/// One super-frame into packets, back to back.
fn cut(version: Version, protocol: u8) -> Kernel {
    let frame = super_frame(version, protocol);
    let mut out = vec![0; FRAME_PACKETS * MTU_BYTES];
    let work = move || write_all(black_box(&frame), black_box(&mut out)) as u64;
    Kernel::new(FRAME_PACKETS, MTU_BYTES, FRAME_PACKETS, work)
}

/// Frames of one packet each, whose checksum is left to us.
fn whole(packet_bytes: usize) -> Kernel {
    let packet = inputs::packet(Version::V4, UDP, 0).filling(packet_bytes);
    let frame = packet.frame(0);
    let mut out = vec![0; packet_bytes];
    let work = move || {
        let written = (0..SMALL_FRAMES).map(|_| write_all(black_box(&frame), black_box(&mut out)));
        written.sum::<usize>() as u64
    };
    Kernel::new(SMALL_FRAMES, packet_bytes, SMALL_FRAMES, work)
}

/// Ready packets into one train: room found, bytes copied.
fn append(packets: usize, packet_bytes: usize) -> Kernel {
    let packet = inputs::packet(Version::V4, UDP, 0);
    let packet = packet.filling(packet_bytes).bytes();
    let mut train = Train::new(0);
    let work = move || {
        train.start(0, Limits::FULL);
        for _ in 0..packets {
            let packet = black_box(packet.as_slice());
            if let Some(room) = train.reserve(packet.len()) {
                room.copy_from_slice(packet);
            }
        }
        black_box(train.bytes());
        train.count() as u64
    };
    Kernel::new(packets, packet_bytes, packets, work)
}

/// Both steps, as a worker does them: each packet is written where its train
/// has room.
fn frame_to_train() -> Kernel {
    let frame = super_frame(Version::V4, TCP);
    let mut train = Train::new(0);
    let work = move || {
        train.start(0, Limits::FULL);
        fill(black_box(&frame), &mut train);
        black_box(train.bytes());
        train.count() as u64
    };
    Kernel::new(FRAME_PACKETS, MTU_BYTES, FRAME_PACKETS, work)
}

fn small_frames_to_train() -> Kernel {
    let packet = inputs::packet(Version::V4, UDP, 0).filling(SMALL_BYTES);
    let frames: Vec<_> = (0..SMALL_FRAMES)
        .map(|index| packet.at(index).frame(0))
        .collect();
    let mut train = Train::new(0);
    let work = move || {
        train.start(0, Limits::FULL);
        for frame in &frames {
            fill(black_box(frame), &mut train);
        }
        black_box(train.bytes());
        train.count() as u64
    };
    Kernel::new(SMALL_FRAMES, SMALL_BYTES, SMALL_FRAMES, work)
}

fn super_frame(version: Version, protocol: u8) -> Vec<u8> {
    let whole = inputs::packet(version, protocol, 0);
    let gso_bytes = MTU_BYTES - whole.header_bytes();
    let payload_bytes = FRAME_PACKETS * gso_bytes;
    whole
        .filling(whole.header_bytes() + payload_bytes)
        .frame(gso_bytes)
}

/// Writes a frame's packets one behind the other; returns how many.
fn write_all(frame: &[u8], out: &mut [u8]) -> usize {
    let Ok(segments) = Segments::new(frame) else {
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

/// Writes a frame's packets into a train, as long as they fit.
fn fill(frame: &[u8], train: &mut Train) {
    let Ok(segments) = Segments::new(frame) else {
        return;
    };
    for index in 0..segments.count() {
        if let Some(room) = train.reserve(segments.packet_bytes(index)) {
            segments.write(index, room);
        }
    }
}

const _: () = assert!(FRAME_PACKETS * MTU_BYTES <= TRAIN_BYTES_MAX);
