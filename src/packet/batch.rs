//! Datagrams for one next hop, back to back: what one `sendmsg(2)` with
//! `UDP_SEGMENT` carries (`udp(7)`).
//!
//! All datagrams of a batch have the same size, but the last may be shorter
//! and then closes it. The kernel takes at most [`SEGMENTS_MAX`] of them and
//! [`BATCH_BYTES_MAX`] together.

use super::PACKET_BYTES_MAX;

/// Most datagrams of one send: the kernel's `UDP_MAX_SEGMENTS`
/// (`linux/udp.h`). Older kernels take 64.
pub const SEGMENTS_MAX: usize = 128;

/// Most payload bytes of one UDP send over IPv4: 65535 - 20 - 8. IPv6 would
/// take 20 more; one limit for both keeps batches alike.
pub const BATCH_BYTES_MAX: usize = PACKET_BYTES_MAX - 20 - 8;

/// Index of a next hop in the table that the workers look destinations up in.
pub type NextHop = u16;

/// How long batches toward one next hop may be. What the path or the host
/// cannot do is learnt from refused sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Most datagrams of a batch; 1 where `UDP_SEGMENT` is missing.
    pub segments_max: usize,
    /// A datagram longer than this travels alone (and the kernel fragments it
    /// if it must): a batch of them would be refused with `EMSGSIZE`.
    pub segment_bytes_max: usize,
}

impl Limits {
    /// What a current kernel takes on a path of any MTU.
    pub const FULL: Self = Self {
        segments_max: SEGMENTS_MAX,
        segment_bytes_max: BATCH_BYTES_MAX,
    };
}

/// A buffer that fills with datagrams. It has room for one whole batch and is
/// used again and again.
#[derive(Debug)]
pub struct Batch {
    bytes: Box<[u8]>,
    len: usize,
    count: usize,
    segment_bytes: usize,
    next_hop: NextHop,
    limits: Limits,
    tos: u8,
    closed: bool,
    id: u16,
}

impl Batch {
    /// An empty batch. `id` is the owner's name for it and never changes.
    pub fn new(id: u16) -> Self {
        Self {
            bytes: vec![0; BATCH_BYTES_MAX].into_boxed_slice(),
            len: 0,
            count: 0,
            segment_bytes: 0,
            next_hop: 0,
            limits: Limits::FULL,
            tos: 0,
            closed: false,
            id,
        }
    }

    /// Empties the batch for datagrams toward `next_hop`.
    pub fn start(&mut self, next_hop: NextHop, limits: Limits) {
        self.len = 0;
        self.count = 0;
        self.segment_bytes = 0;
        self.closed = false;
        self.next_hop = next_hop;
        self.limits = limits;
        self.tos = 0;
    }

    /// Sets TOS or traffic class of the datagrams' own header, which is 0 else.
    #[inline]
    pub fn set_tos(&mut self, tos: u8) {
        self.tos = tos;
    }

    /// TOS or traffic class of the datagrams' own header.
    #[inline]
    pub fn tos(&self) -> u8 {
        self.tos
    }

    /// Room for a datagram of `datagram_bytes` at the end, or `None` if it
    /// cannot be part of this batch. An empty batch takes any datagram of up
    /// to [`BATCH_BYTES_MAX`].
    #[inline]
    pub fn reserve(&mut self, datagram_bytes: usize) -> Option<&mut [u8]> {
        if self.count == 0 {
            self.segment_bytes = datagram_bytes;
            self.closed =
                self.limits.segments_max <= 1 || datagram_bytes > self.limits.segment_bytes_max;
        } else if self.closed
            || datagram_bytes > self.segment_bytes
            || self.count >= self.limits.segments_max
        {
            return None;
        } else {
            self.closed = datagram_bytes < self.segment_bytes;
        }
        let start = self.len;
        let end = start + datagram_bytes;
        if end > BATCH_BYTES_MAX {
            self.closed = true;
            return None;
        }
        self.len = end;
        self.count += 1;
        Some(&mut self.bytes[start..end])
    }

    /// Whether no datagram fits any more.
    #[inline]
    pub fn is_closed(&self) -> bool {
        self.closed || self.count >= self.limits.segments_max
    }

    /// The datagrams, back to back.
    #[inline]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }

    /// The datagrams, back to back, for changing them in place.
    #[inline]
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[..self.len]
    }

    /// The datagrams one by one.
    pub fn datagrams(&self) -> impl Iterator<Item = &[u8]> {
        self.bytes().chunks(self.segment_bytes.max(1))
    }

    /// Number of datagrams.
    #[inline]
    pub fn count(&self) -> usize {
        self.count
    }

    /// Bytes of every datagram but the last.
    #[inline]
    pub fn segment_bytes(&self) -> usize {
        self.segment_bytes
    }

    /// Where the batch goes.
    #[inline]
    pub fn next_hop(&self) -> NextHop {
        self.next_hop
    }

    /// How long it may be.
    #[inline]
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// The owner's name for this buffer.
    #[inline]
    pub fn id(&self) -> u16 {
        self.id
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fill(batch: &mut Batch, sizes: impl IntoIterator<Item = usize>) -> usize {
        sizes
            .into_iter()
            .take_while(|&size| batch.reserve(size).is_some())
            .count()
    }

    fn batch(limits: Limits) -> Batch {
        let mut batch = Batch::new(3);
        batch.start(9, limits);
        batch
    }

    #[test]
    fn a_shorter_datagram_closes_and_a_longer_one_does_not_fit() {
        let mut t = batch(Limits::FULL);
        assert_eq!(fill(&mut t, [100, 100, 99, 99]), 3);
        assert_eq!(
            (t.bytes().len(), t.count(), t.segment_bytes()),
            (299, 3, 100)
        );
        let lens: Vec<_> = t.datagrams().map(<[u8]>::len).collect();
        assert_eq!(lens, [100, 100, 99]);
        t.start(1, Limits::FULL);
        assert_eq!(fill(&mut t, [100, 101]), 1);
        assert_eq!(fill(&mut t, [100]), 1, "a refused datagram closes nothing");
    }

    #[test]
    fn counts_and_bytes_are_bounded() {
        let mut t = batch(Limits::FULL);
        assert_eq!(fill(&mut t, [20; 200]), SEGMENTS_MAX);
        t.start(0, Limits::FULL);
        assert_eq!(fill(&mut t, [1472; 200]), 44);
        t.start(0, Limits::FULL);
        assert_eq!(fill(&mut t, [BATCH_BYTES_MAX + 1]), 0);
        t.start(0, Limits::FULL);
        assert_eq!(fill(&mut t, [BATCH_BYTES_MAX, 1]), 1);
    }

    #[test]
    fn keeps_what_the_path_cannot_segment_alone() {
        let mut t = batch(Limits {
            segments_max: 1,
            ..Limits::FULL
        });
        assert_eq!(fill(&mut t, [64, 64]), 1);
        let limits = Limits {
            segment_bytes_max: 1252,
            ..Limits::FULL
        };
        t.start(0, limits);
        assert_eq!(fill(&mut t, [1253, 1253]), 1);
        t.start(0, limits);
        assert_eq!(fill(&mut t, [1252, 1252]), 2);
    }
}
