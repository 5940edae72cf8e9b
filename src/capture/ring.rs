//! A bounded queue of copies of packets between one worker and one thread, without a lock.
//!
//! It is made of words that both sides read and write atomically, so that whatever either
//! does, the other one reads numbers and nothing worse.

use std::sync::atomic::{AtomicU64, Ordering};

use super::frame;
use super::tap::Note;

/// Words before a packet's bytes: time; lengths; peer, GSO size, direction and reason.
const HEADER_WORDS: usize = 3;

const WORD_BYTES: usize = size_of::<u64>();

/// What one side writes. Of cache lines of its own (128: x86 fetches lines in pairs).
#[derive(Debug, Default)]
#[repr(align(128))]
struct Side {
    /// Words that it has put in or taken out.
    position: AtomicU64,
    /// Packets put in.
    noted: AtomicU64,
    /// Packets for which there was no room.
    lost: AtomicU64,
}

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Ring {
    /// As many as a power of two.
    words: Box<[AtomicU64]>,
    snaplen_bytes: usize,
    worker: Side,
    reader: Side,
}

impl Ring {
    /// An empty one of at most so many bytes, a power of two. Of each packet it keeps at most
    /// `snaplen_bytes`.
    pub(crate) fn new(bytes: usize, snaplen_bytes: usize) -> Self {
        let words = (bytes / WORD_BYTES).max(HEADER_WORDS).next_power_of_two();
        Self {
            words: (0..words).map(|_| AtomicU64::new(0)).collect(),
            snaplen_bytes,
            worker: Side::default(),
            reader: Side::default(),
        }
    }

    #[inline]
    fn word(&self, position: u64) -> &AtomicU64 {
        &self.words[position as usize & (self.words.len() - 1)]
    }

    /// Copies a packet in, or counts it as lost. For the worker alone.
    pub(super) fn put(&self, note: &Note<'_>, timestamp_ns: u64) {
        let captured_bytes = note.packet.len().min(self.snaplen_bytes);
        let words = HEADER_WORDS + captured_bytes.div_ceil(WORD_BYTES);
        let start = self.worker.position.load(Ordering::Relaxed);
        // Acquire: what was read before is read.
        let taken = self.reader.position.load(Ordering::Acquire);
        let free = self.words.len() as u64 - start.wrapping_sub(taken);
        if words as u64 > free {
            add(&self.worker.lost);
            return;
        }
        let peer = note.peer.unwrap_or(frame::NO_PEER);
        let reason = note.dropped.map_or(0, |reason| reason.code());
        let header = [
            timestamp_ns,
            note.packet_bytes as u64 & 0xffff_ffff | (captured_bytes as u64) << 32,
            u64::from(peer)
                | u64::from(note.gso_bytes) << 16
                | (note.direction as u64) << 32
                | u64::from(reason) << 40,
        ];
        let data = note.packet[..captured_bytes].chunks(WORD_BYTES);
        let data = data.map(|bytes| {
            let mut word = [0; WORD_BYTES];
            match bytes.try_into() {
                Ok(whole) => word = whole,
                Err(_) => word[..bytes.len()].copy_from_slice(bytes),
            }
            u64::from_ne_bytes(word)
        });
        for (word, position) in header.into_iter().chain(data).zip(start..) {
            self.word(position).store(word, Ordering::Relaxed);
        }
        add(&self.worker.noted);
        // Release: the words are there before it.
        let end = start.wrapping_add(words as u64);
        self.worker.position.store(end, Ordering::Release);
    }

    /// When the next packet was noted, in nanoseconds since 1970; `None` if there is none.
    pub(crate) fn peek(&self) -> Option<u64> {
        let (start, end) = self.unread();
        (start != end).then(|| self.word(start).load(Ordering::Relaxed))
    }

    /// Takes the next packet, if there is one, and appends it to `frames`. For one thread
    /// alone. `worker`: whose ring it is.
    pub(crate) fn take(&self, worker: u16, frames: &mut Vec<u8>) {
        let (start, end) = self.unread();
        if start == end {
            return;
        }
        let word = |position| self.word(position).load(Ordering::Relaxed);
        let (lengths, rest) = (word(start.wrapping_add(1)), word(start.wrapping_add(2)));
        let captured_bytes = (lengths >> 32) as usize;
        let header = frame::Header {
            kind: frame::PACKET,
            direction: (rest >> 32) as u8,
            reason: (rest >> 40) as u8,
            worker,
            peer: rest as u16,
            timestamp_ns: word(start),
            packet_bytes: lengths as u32,
            body_bytes: captured_bytes as u32,
            gso_bytes: (rest >> 16) as u16,
        };
        header.write(frames);
        let body = frames.len();
        let data = start.wrapping_add(HEADER_WORDS as u64);
        let words = captured_bytes.div_ceil(WORD_BYTES) as u64;
        frames.extend((0..words).flat_map(|at| word(data.wrapping_add(at)).to_ne_bytes()));
        frames.truncate(body + captured_bytes);
        let next = data.wrapping_add(words);
        self.reader.position.store(next, Ordering::Release);
    }

    /// Where what is not read yet begins and ends.
    fn unread(&self) -> (u64, u64) {
        (
            self.reader.position.load(Ordering::Relaxed),
            self.worker.position.load(Ordering::Acquire),
        )
    }

    /// How many packets were noted, and how many were lost.
    pub(crate) fn counts(&self) -> (u64, u64) {
        let Side { noted, lost, .. } = &self.worker;
        (noted.load(Ordering::Relaxed), lost.load(Ordering::Relaxed))
    }
}

/// Counts one more, for the one who writes it.
fn add(counter: &AtomicU64) {
    counter.store(
        counter.load(Ordering::Relaxed).wrapping_add(1),
        Ordering::Relaxed,
    );
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::super::frame::{HEADER_BYTES, Header};
    use super::super::tap::{Direction, Reason};
    use super::*;

    /// The next packet: its header and bytes.
    fn next(ring: &Ring) -> Option<(Header, Vec<u8>)> {
        let mut frames = Vec::new();
        ring.take(3, &mut frames);
        let (header, body) = frames.split_first_chunk::<HEADER_BYTES>()?;
        let header = Header::read(header);
        assert_eq!(header.body_bytes as usize, body.len());
        Some((header, body.to_vec()))
    }

    #[test]
    fn what_is_noted_comes_out() {
        let ring = Ring::new(1024, 128);
        let bytes: Vec<u8> = (0..200).collect();
        let note = Note::carried(Direction::In, Some(9), &bytes);
        ring.put(&note.dropped(Reason::Ecn).gso(1400), 77);
        ring.put(&Note::carried(Direction::Out, None, &bytes[..13]), 78);
        assert_eq!((ring.peek(), ring.counts()), (Some(77), (2, 0)));
        let (header, body) = next(&ring).unwrap();
        assert_eq!(body, bytes[..128]);
        assert_eq!((header.packet_bytes, header.gso_bytes), (200, 1400));
        assert_eq!((header.worker, header.peer()), (3, Some(9)));
        assert_eq!(header.direction(), Some(Direction::In));
        assert_eq!(header.reason_name(), Some("ecn"));
        let (header, body) = next(&ring).unwrap();
        assert_eq!((header.timestamp_ns, body), (78, bytes[..13].to_vec()));
        assert_eq!((header.peer(), header.reason_name()), (None, None));
        assert_eq!((ring.peek(), next(&ring)), (None, None));
    }

    proptest! {
        /// A queue that loses what finds no room, and nothing else.
        #[test]
        fn it_is_a_bounded_queue(
            steps in prop::collection::vec(prop::option::of(0..300_usize), 0..200),
            snaplen_bytes in 1..200_usize,
        ) {
            const BYTES: usize = 512;
            let ring = Ring::new(BYTES, snaplen_bytes);
            let (mut expected, mut used, mut lost, mut noted) = (VecDeque::new(), 0, 0, 0);
            for (number, step) in steps.into_iter().enumerate() {
                match step {
                    Some(bytes) => {
                        let packet = vec![number as u8; bytes];
                        let kept = bytes.min(snaplen_bytes);
                        let room = (HEADER_WORDS + kept.div_ceil(WORD_BYTES)) * WORD_BYTES;
                        ring.put(&Note::carried(Direction::Out, None, &packet), number as u64);
                        if used + room <= BYTES {
                            used += room;
                            noted += 1;
                            expected.push_back((number as u64, packet[..kept].to_vec(), room));
                        } else {
                            lost += 1;
                        }
                    }
                    None => {
                        let found = next(&ring).map(|(header, body)| (header.timestamp_ns, body));
                        let wanted = expected.pop_front().map(|(time, packet, room)| {
                            used -= room;
                            (time, packet)
                        });
                        prop_assert_eq!(found, wanted);
                    }
                }
                prop_assert_eq!(ring.counts(), (noted, lost));
            }
        }
    }

    /// Two threads: what comes out is whole and in order, and the counts add up.
    #[test]
    fn both_sides_may_be_at_work() {
        const PACKETS: u64 = 100_000;
        let ring = Arc::new(Ring::new(4096, 256));
        let writer = {
            let ring = Arc::clone(&ring);
            std::thread::spawn(move || {
                for number in 0..PACKETS {
                    let packet = vec![number as u8; 1 + number as usize % 150];
                    ring.put(&Note::carried(Direction::In, None, &packet), number);
                }
            })
        };
        let (mut taken, mut last) = (0, None);
        loop {
            let is_over = writer.is_finished();
            while let Some((header, body)) = next(&ring) {
                let number = header.timestamp_ns;
                assert!(last < Some(number), "{last:?} before {number}");
                assert_eq!(body.len() as u64, 1 + number % 150);
                assert!(body.iter().all(|byte| *byte == number as u8));
                (taken, last) = (taken + 1, Some(number));
            }
            if is_over {
                break;
            }
        }
        writer.join().unwrap();
        let (noted, lost) = ring.counts();
        assert_eq!((taken, taken + lost), (noted, PACKETS));
    }
}
