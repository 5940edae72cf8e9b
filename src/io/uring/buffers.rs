//! A ring of provided buffers (`io_uring_register_buf_ring(3)`): the kernel
//! takes a buffer when data is there, not when the request is made.
//!
//! The kernel uses buffers in the order given, so all that it holds pass
//! through the cache in turn. Bulk traffic fills whole buffers and wants few of
//! them; small packets take one each and want many for a good turn. So the
//! kernel is given as many as hold a turn's bytes at the size of what arrived
//! lately, and the rest wait here, the one used last on top.

use std::io;
use std::sync::atomic::{AtomicU16, Ordering};

use io_uring::Submitter;
use io_uring::types::BufRingEntry;

/// The entries of the ring, in memory as the kernel wants it: a page by itself.
#[repr(C, align(4096))]
struct Page([u8; PAGE_BYTES]);

const PAGE_BYTES: usize = 4096;

/// Most buffers of a ring: those that a page has entries for.
const BUFFERS_MAX: usize = PAGE_BYTES / size_of::<BufRingEntry>();

/// Bytes that one turn should bring at the most. One stream on a processor
/// with 1 MiB of second-level cache, CPU seconds per GB, medians in two runs: 8
/// full buffers 0.68, 32 0.81, 128 0.98; 300 kB 0.545, 600 kB 0.567, 1.2 MB 0.536
/// (within the noise of each other).
const BATCH_BYTES: usize = 1 << 20;

/// Fewest buffers that the kernel is given.
const PROVIDED_MIN: usize = 4;

/// Buffers that are with the kernel, spare, or, taken out by value, with the
/// caller. A buffer that is never given back is lost to the ring, no more.
pub struct BufferRing {
    entries: Box<Page>,
    group: u16,
    tail: u16,
    mask: u16,
    /// By id: the buffers with the kernel.
    provided: Vec<Option<Box<[u8]>>>,
    /// How many these are.
    available: usize,
    /// Neither with the kernel nor with the caller.
    spare: Vec<(u16, Box<[u8]>)>,
    /// Bytes per filled buffer, a moving average.
    filled_bytes: usize,
}

impl BufferRing {
    /// Registers `count` buffers (a power of two) of `buffer_bytes` as `group`.
    pub fn register(
        submitter: &Submitter<'_>,
        group: u16,
        count: u16,
        buffer_bytes: usize,
    ) -> io::Result<Self> {
        assert!(
            count.is_power_of_two() && usize::from(count) <= BUFFERS_MAX,
            "a buffer ring's size is a power of two, and a page holds it"
        );
        let mut entries = Box::new(Page([0; PAGE_BYTES]));
        let start = entries.0.as_mut_ptr() as u64;
        // SAFETY: the ring's memory is page-aligned, large enough for `count`
        // entries, and lives until `unregister` (see there).
        unsafe { submitter.register_buf_ring_with_flags(start, count, group, 0)? };
        let buffer = |id| (id, vec![0; buffer_bytes].into_boxed_slice());
        Ok(Self {
            entries,
            group,
            tail: 0,
            mask: count - 1,
            provided: (0..count).map(|_| None).collect(),
            available: 0,
            spare: (0..count).rev().map(buffer).collect(),
            filled_bytes: 0,
        })
    }

    /// Takes the group back from the kernel. To be called before the memory
    /// goes away, when no request uses the group any more.
    pub fn unregister(&self, submitter: &Submitter<'_>) -> io::Result<()> {
        submitter.unregister_buf_ring(self.group)
    }

    /// The buffer that a completion names and has filled with `bytes`. `None`
    /// if the kernel does not hold it, which would be a fault of ours or the
    /// kernel's.
    pub fn take(&mut self, id: u16, bytes: usize) -> Option<Box<[u8]>> {
        let buffer = self.provided.get_mut(usize::from(id))?.take()?;
        self.available -= 1;
        self.filled_bytes = (self.filled_bytes * 7 + bytes) / 8;
        Some(buffer)
    }

    /// Takes a buffer back from the caller.
    #[inline]
    pub fn give_back(&mut self, id: u16, buffer: Box<[u8]>) {
        self.spare.push((id, buffer));
    }

    /// Gives the kernel what it shall have, as far as there are buffers.
    #[inline]
    pub fn provide(&mut self) {
        let target = (BATCH_BYTES / self.filled_bytes.max(1)).max(PROVIDED_MIN);
        while self.available < target {
            let Some((id, buffer)) = self.spare.pop() else {
                return;
            };
            self.provide_one(id, buffer);
        }
    }

    fn provide_one(&mut self, id: u16, mut buffer: Box<[u8]>) {
        let Some(place) = self.provided.get_mut(usize::from(id)) else {
            return;
        };
        let base = self.entries.0.as_mut_ptr().cast::<BufRingEntry>();
        // SAFETY: `tail & mask` is below the number of entries in the page. The
        // kernel reads only entries before the published tail, and this one is
        // not: at most `mask + 1` buffers exist, and this one is not with it.
        let entry = unsafe { &mut *base.add(usize::from(self.tail & self.mask)) };
        entry.set_addr(buffer.as_mut_ptr() as u64);
        entry.set_len(buffer.len() as u32);
        entry.set_bid(id);
        *place = Some(buffer);
        self.available += 1;
        self.tail = self.tail.wrapping_add(1);
        // SAFETY: `base` is the start of the ring, where the tail lies in the
        // reserved field of the first entry; it is aligned and only ever
        // written here. The release order publishes the entry before the tail.
        unsafe {
            let tail = BufRingEntry::tail(base).cast::<AtomicU16>();
            (*tail).store(self.tail, Ordering::Release);
        }
    }

    /// Number of buffers that the kernel can fill.
    pub fn available(&self) -> usize {
        self.available
    }

    /// The group's number, for requests.
    pub fn group(&self) -> u16 {
        self.group
    }
}
