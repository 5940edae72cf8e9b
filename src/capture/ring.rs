//! A bounded queue of copies of packets between one worker and one thread, without a lock.
//!
//! It is made of words that both sides read and write atomically, so that whatever either
//! does, the other one reads numbers and nothing worse.

use std::sync::atomic::{AtomicU64, Ordering};

use super::frame;
use super::tap::Note;

/// Words before a packet's bytes: time; lengths; peer, GSO size, direction, reason and
/// generation.
const HEADER_WORDS: usize = 3;

const WORD_BYTES: usize = size_of::<u64>();

/// What one side writes. Of cache lines of its own (128: x86 fetches lines in pairs).
#[derive(Debug, Default)]
#[repr(align(128))]
struct Side {
    /// Words that it has put in or taken out.
    position: AtomicU64,
    /// The worker's: the reader's position when it was last looked at, which costs more.
    seen: AtomicU64,
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

    /// So many words from a position on: those up to the end of memory, and those from its
    /// start on.
    #[inline]
    fn span(&self, position: u64, words: usize) -> [&[AtomicU64]; 2] {
        let (before, after) = self
            .words
            .split_at(position as usize & (self.words.len() - 1));
        let first = words.min(after.len());
        [&after[..first], &before[..words - first]]
    }

    /// Copies a packet in, or counts it as lost. For the worker alone. `generation`: of the
    /// table by which its peer has its number.
    pub(super) fn put(&self, note: &Note<'_>, timestamp_ns: u64, generation: u16) {
        let captured_bytes = note.packet.len().min(self.snaplen_bytes);
        let words = captured_bytes.div_ceil(WORD_BYTES);
        let start = self.worker.position.load(Ordering::Relaxed);
        let data = start.wrapping_add(HEADER_WORDS as u64);
        let end = data.wrapping_add(words as u64);
        if !self.is_free(end) {
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
                | u64::from(reason) << 40
                | u64::from(generation) << 48,
        ];
        for (word, position) in header.into_iter().zip(start..) {
            self.word(position).store(word, Ordering::Relaxed);
        }
        let (whole, rest) = note.packet[..captured_bytes].as_chunks();
        let [first, second] = self.span(data, whole.len());
        let (head, tail) = whole.split_at(first.len());
        for (words, data) in [(first, head), (second, tail)] {
            for (word, bytes) in words.iter().zip(data) {
                word.store(u64::from_ne_bytes(*bytes), Ordering::Relaxed);
            }
        }
        if !rest.is_empty() {
            let mut bytes = [0; WORD_BYTES];
            bytes[..rest.len()].copy_from_slice(rest);
            let last = self.word(data.wrapping_add(whole.len() as u64));
            last.store(u64::from_ne_bytes(bytes), Ordering::Relaxed);
        }
        add(&self.worker.noted);
        // Release: the words are there before it.
        self.worker.position.store(end, Ordering::Release);
    }

    /// Whether the worker may write up to a position.
    #[inline]
    fn is_free(&self, end: u64) -> bool {
        let is_free = |taken| end.wrapping_sub(taken) <= self.words.len() as u64;
        is_free(self.worker.seen.load(Ordering::Relaxed)) || {
            // Acquire: what was read before is read.
            let taken = self.reader.position.load(Ordering::Acquire);
            self.worker.seen.store(taken, Ordering::Relaxed);
            is_free(taken)
        }
    }

    /// What there is by now. For one thread alone.
    pub(crate) fn unread(&self) -> Unread<'_> {
        Unread {
            ring: self,
            start: self.reader.position.load(Ordering::Relaxed),
            end: self.worker.position.load(Ordering::Acquire),
        }
    }

    /// How many packets were noted, and how many were lost.
    pub(crate) fn counts(&self) -> (u64, u64) {
        let Side { noted, lost, .. } = &self.worker;
        (noted.load(Ordering::Relaxed), lost.load(Ordering::Relaxed))
    }
}

/// Packets of a ring that are to be taken out. The worker gets their room back when it is
/// dropped, and not one by one: both sides would wait for each other's cache lines.
pub(crate) struct Unread<'a> {
    ring: &'a Ring,
    start: u64,
    end: u64,
}

impl Unread<'_> {
    /// When the next packet was noted, in nanoseconds since 1970, and the generation of its
    /// peer's number; `None` if there is none.
    #[inline]
    pub(crate) fn peek(&self) -> Option<(u64, u16)> {
        let is_there = self.start != self.end;
        is_there.then(|| (self.word(0), (self.word(2) >> 48) as u16))
    }

    /// Takes the next packet, if there is one, and appends it to `frames`. `worker`: whose ring
    /// it is.
    pub(crate) fn take(&mut self, worker: u16, frames: &mut Vec<u8>) {
        let Some((timestamp_ns, _)) = self.peek() else {
            return;
        };
        let (lengths, rest) = (self.word(1), self.word(2));
        let captured_bytes = (lengths >> 32) as usize;
        let header = frame::Header {
            kind: frame::PACKET,
            direction: (rest >> 32) as u8,
            reason: (rest >> 40) as u8,
            worker,
            peer: rest as u16,
            timestamp_ns,
            packet_bytes: lengths as u32,
            body_bytes: captured_bytes as u32,
            gso_bytes: (rest >> 16) as u16,
        };
        header.write(frames);
        let data = self.start.wrapping_add(HEADER_WORDS as u64);
        let words = captured_bytes.div_ceil(WORD_BYTES);
        let body = frames.len();
        frames.resize(body + words * WORD_BYTES, 0);
        let (room, _) = frames[body..].as_chunks_mut();
        let [first, second] = self.ring.span(data, words);
        let (head, tail) = room.split_at_mut(first.len());
        for (words, room) in [(first, head), (second, tail)] {
            for (word, bytes) in words.iter().zip(room) {
                *bytes = word.load(Ordering::Relaxed).to_ne_bytes();
            }
        }
        frames.truncate(body + captured_bytes);
        self.start = data.wrapping_add(words as u64);
    }

    #[inline]
    fn word(&self, offset: u64) -> u64 {
        let word = self.ring.word(self.start.wrapping_add(offset));
        word.load(Ordering::Relaxed)
    }
}

impl Drop for Unread<'_> {
    fn drop(&mut self) {
        // Release: the words are read before it.
        let position = &self.ring.reader.position;
        position.store(self.start, Ordering::Release);
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
        ring.unread().take(3, &mut frames);
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
        ring.put(&note.dropped(Reason::Ecn).gso(1400), 77, 65_535);
        ring.put(&Note::carried(Direction::Out, None, &bytes[..13]), 78, 5);
        assert_eq!(ring.unread().peek(), Some((77, 65_535)));
        assert_eq!(ring.counts(), (2, 0));
        let (header, body) = next(&ring).unwrap();
        assert_eq!(body, bytes[..128]);
        assert_eq!((header.packet_bytes, header.gso_bytes), (200, 1400));
        assert_eq!((header.worker, header.peer()), (3, Some(9)));
        assert_eq!(header.direction(), Some(Direction::In));
        assert_eq!(header.reason_name(), Some("ecn"));
        assert_eq!(ring.unread().peek(), Some((78, 5)));
        let (header, body) = next(&ring).unwrap();
        assert_eq!((header.timestamp_ns, body), (78, bytes[..13].to_vec()));
        assert_eq!((header.peer(), header.reason_name()), (None, None));
        assert_eq!((ring.unread().peek(), next(&ring)), (None, None));
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
                        let note = Note::carried(Direction::Out, None, &packet);
                        ring.put(&note, number as u64, 0);
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
                    ring.put(&Note::carried(Direction::In, None, &packet), number, 0);
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
