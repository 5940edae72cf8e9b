//! The Internet checksum over pieces of several sizes, all of them in cache.

use std::hint::black_box;

use fastvpn::packet::PACKET_BYTES_MAX;
use fastvpn::packet::checksum::Sum;

use super::{Case, Kernel};

/// Bytes summed up in one run, whatever the size of the pieces.
const RUN_BYTES: usize = 64 * 1024;

pub const CASES: &[Case] = &[
    ("checksum/64", || sum(64)),
    ("checksum/128", || sum(128)),
    ("checksum/256", || sum(256)),
    ("checksum/1420", || sum(1420)),
    ("checksum/8192", || sum(8192)),
    ("checksum/65535", || sum(PACKET_BYTES_MAX)),
];

/// The same piece again and again, so that even the longest stays in the
/// second-level cache.
fn sum(piece_bytes: usize) -> Kernel {
    let pieces = RUN_BYTES / piece_bytes;
    let bytes: Vec<u8> = (0..piece_bytes).map(|at| (at / 251 + at) as u8).collect();
    let work = move || {
        let checksums = (0..pieces).map(|_| Sum::ZERO.add_bytes(black_box(&bytes)).checksum());
        checksums.map(black_box).count() as u64
    };
    Kernel::new(pieces, piece_bytes, pieces, work)
}
