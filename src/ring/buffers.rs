//! A ring of provided buffers (`io_uring_register_buf_ring(3)`): the kernel
//! takes a buffer when data is there, not when the request is made.

use std::io;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU16, Ordering};

use io_uring::Submitter;
use io_uring::types::BufRingEntry;

/// Page-aligned anonymous memory.
struct Pages {
    start: NonNull<libc::c_void>,
    bytes: usize,
}

impl Pages {
    fn new(bytes: usize) -> io::Result<Self> {
        // SAFETY: an anonymous private mapping at an address of the kernel's
        // choice touches no memory of ours.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start).ok_or_else(|| io::Error::from(io::ErrorKind::Other))?;
        Ok(Self { start, bytes })
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and this is its only owner.
        unsafe { libc::munmap(self.start.as_ptr(), self.bytes) };
    }
}

/// Buffers that are either with the kernel or, taken out by value, with the
/// caller. A buffer that is never given back is lost to the ring, no more.
pub struct BufferRing {
    pages: Pages,
    group: u16,
    tail: u16,
    mask: u16,
    /// `None` while the caller has the buffer.
    buffers: Vec<Option<Box<[u8]>>>,
    /// Buffers with the kernel.
    available: usize,
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
            count.is_power_of_two(),
            "a buffer ring's size is a power of two"
        );
        let pages = Pages::new(usize::from(count) * size_of::<BufRingEntry>())?;
        // SAFETY: the ring's memory is page-aligned, large enough for `count`
        // entries, and lives until `unregister` (see there).
        unsafe {
            submitter.register_buf_ring_with_flags(pages.start.as_ptr() as u64, count, group, 0)?;
        }
        let mut ring = Self {
            pages,
            group,
            tail: 0,
            mask: count - 1,
            buffers: (0..count).map(|_| None).collect(),
            available: 0,
        };
        for id in 0..count {
            ring.give_back(id, vec![0; buffer_bytes].into_boxed_slice());
        }
        Ok(ring)
    }

    /// Takes the group back from the kernel. To be called before the memory
    /// goes away, when no request uses the group any more.
    pub fn unregister(&self, submitter: &Submitter<'_>) -> io::Result<()> {
        submitter.unregister_buf_ring(self.group)
    }

    /// The buffer that a completion names. `None` if the kernel does not hold
    /// it, which would be a fault of ours or the kernel's.
    pub fn take(&mut self, id: u16) -> Option<Box<[u8]>> {
        let buffer = self.buffers.get_mut(usize::from(id))?.take()?;
        self.available -= 1;
        Some(buffer)
    }

    /// Gives a buffer to the kernel.
    pub fn give_back(&mut self, id: u16, mut buffer: Box<[u8]>) {
        let Some(place) = self.buffers.get_mut(usize::from(id)) else {
            return;
        };
        let base = self.pages.start.as_ptr().cast::<BufRingEntry>();
        // SAFETY: `tail & mask` is below the number of entries in `pages`. The
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
