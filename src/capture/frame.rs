//! What follows the answer to a request to capture, on the control socket: frames, each a
//! header of [`HEADER_BYTES`] and a body. Numbers are little-endian. `docs/control.md`
//! describes it for those who write programs.

use super::tap::{Direction, Reason};
use crate::packet::batch::NextHop;

/// Bytes of a header.
pub const HEADER_BYTES: usize = 32;

/// Longest body: the names of all peers that there can be.
pub const BODY_BYTES_MAX: usize = 16 << 20;

/// No peer.
pub(super) const NO_PEER: u16 = u16::MAX;

/// A packet, cut to the snapshot length.
pub const PACKET: u8 = 0;
/// What a worker has noted and lost so far: two numbers of 64 bits.
pub const COUNTS: u8 = 1;
/// The peers' names by their numbers, as JSON. It holds for the packets that follow.
pub const PEERS: u8 = 2;
/// The last one: why the capture ends, as text.
pub const END: u8 = 3;

/// What it says when the client has ended the capture.
pub const END_BY_CLIENT: &str = "its client has ended it";

/// A frame's header. Fields that say nothing about a kind of frame are 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// What the frame is.
    pub kind: u8,
    /// 0: out of the host; 1: into the host.
    pub direction: u8,
    /// Why the packet was dropped; 0 if it was not.
    pub reason: u8,
    /// Index of the worker.
    pub worker: u16,
    /// The peer's number; 65535 if there is none.
    pub peer: u16,
    /// Nanoseconds since 1970.
    pub timestamp_ns: u64,
    /// Bytes of the whole packet.
    pub packet_bytes: u32,
    /// Bytes of the body.
    pub body_bytes: u32,
    /// Of a GSO packet, the payload bytes of each of its packets but the last; else 0.
    pub gso_bytes: u16,
}

impl Header {
    /// Appends the header's bytes.
    pub(crate) fn write(&self, frames: &mut Vec<u8>) {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..3].copy_from_slice(&[self.kind, self.direction, self.reason]);
        bytes[4..6].copy_from_slice(&self.worker.to_le_bytes());
        bytes[6..8].copy_from_slice(&self.peer.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.timestamp_ns.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.packet_bytes.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.body_bytes.to_le_bytes());
        bytes[24..26].copy_from_slice(&self.gso_bytes.to_le_bytes());
        frames.extend_from_slice(&bytes);
    }

    /// Reads a header.
    pub(crate) fn read(bytes: &[u8; HEADER_BYTES]) -> Self {
        let half = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let word = |at: usize| u32::from(half(at)) | u32::from(half(at + 2)) << 16;
        Self {
            kind: bytes[0],
            direction: bytes[1],
            reason: bytes[2],
            worker: half(4),
            peer: half(6),
            timestamp_ns: u64::from(word(8)) | u64::from(word(12)) << 32,
            packet_bytes: word(16),
            body_bytes: word(20),
            gso_bytes: half(24),
        }
    }

    /// The peer's number, if there is one.
    pub(crate) fn peer(&self) -> Option<NextHop> {
        (self.peer != NO_PEER).then_some(self.peer)
    }

    /// Which way the packet goes; `None` of a number that is none.
    pub(crate) fn direction(&self) -> Option<Direction> {
        [Direction::Out, Direction::In]
            .get(usize::from(self.direction))
            .copied()
    }

    /// Why the packet was dropped, if it was, in the counters' words.
    pub(crate) fn reason_name(&self) -> Option<&'static str> {
        let index = usize::from(self.reason).checked_sub(1)?;
        let reason = Reason::ALL.get(index);
        // A newer tunnel may have more.
        Some(reason.map_or("unknown", |reason| reason.name()))
    }
}

/// Appends a frame that is not a packet.
pub(crate) fn write(kind: u8, worker: u16, body: &[u8], frames: &mut Vec<u8>) {
    let header = Header {
        kind,
        worker,
        body_bytes: body.len() as u32,
        ..Header::default()
    };
    header.write(frames);
    frames.extend(body);
}

/// Appends what a worker has noted and lost.
pub(crate) fn write_counts(worker: u16, (noted, lost): (u64, u64), frames: &mut Vec<u8>) {
    let mut body = [0; 16];
    body[..8].copy_from_slice(&noted.to_le_bytes());
    body[8..].copy_from_slice(&lost.to_le_bytes());
    write(COUNTS, worker, &body, frames);
}

/// What a worker has noted and lost; `None` if the body is something else.
pub(crate) fn read_counts(body: &[u8]) -> Option<(u64, u64)> {
    let (noted, rest) = body.split_first_chunk()?;
    let (lost, _) = rest.split_first_chunk()?;
    Some((u64::from_le_bytes(*noted), u64::from_le_bytes(*lost)))
}

#[cfg(test)]
mod tests {
    use super::*;

    proptest::proptest! {
        #[test]
        fn any_bytes_are_a_header(bytes: [u8; HEADER_BYTES]) {
            let header = Header::read(&bytes);
            let mut written = Vec::new();
            header.write(&mut written);
            assert_eq!(Header::read(written[..].try_into().unwrap()), header);
            header.reason_name();
            header.direction();
        }

        #[test]
        fn counts_are_read_as_they_were_written(noted: u64, lost: u64) {
            let mut frames = Vec::new();
            write_counts(1, (noted, lost), &mut frames);
            assert_eq!(read_counts(&frames[HEADER_BYTES..]), Some((noted, lost)));
            assert_eq!(read_counts(&frames[HEADER_BYTES + 1..]), None);
        }
    }
}
