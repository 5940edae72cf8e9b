//! Which counters of a session have been received: each passes once. Lock-free, since all
//! workers may receive datagrams of one session.
//!
//! This is the sliding window of RFC 6479, over atomics. Counters are cut into blocks of 32,
//! and block `b` has word `b % 256`. A word holds which round of the 256 words its block
//! belongs to (the upper 32 bits) and which of its 32 counters were received (the lower),
//! so that one compare-and-swap both checks and takes a counter, and whoever comes first
//! to a word in a new round clears it on the way.
//!
//! The newest block is kept apart, and is moved ahead of the first change to its word. So
//! whoever sees a word of a later round also sees a newest block that makes its own counter
//! too old: words never go back. tests/replay_window.rs has loom try all interleavings.
//!
//! A round has 32 bits, so a word that was last used exactly 2^32 rounds ago, 2^45 counters,
//! is taken for one of this round. That can only make a fresh counter fail, and no session
//! lives for so many.

use super::atomic::{AtomicU64, Ordering};

/// Counters in a word.
const BLOCK: u64 = 32;

/// Words of a session's window. It covers this many blocks, the newest of which may have begun
/// just now: it reaches back over 8161 counters at least, and 8192 at most.
const WORDS: usize = 256;

/// A replay window. `W` is a power of two, and smaller in tests alone.
#[derive(Debug)]
pub struct ReplayWindow<const W: usize = WORDS> {
    newest_block: Newest,
    words: [AtomicU64; W],
}

/// Block of the highest counter so far. All threads read it for each datagram, and few
/// write it: not on a line with words (128: x86 fetches lines in pairs).
#[derive(Debug)]
#[repr(align(128))]
struct Newest(AtomicU64);

/// The counter was received before, or may have been: it is older than the window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Replayed;

impl<const W: usize> ReplayWindow<W> {
    /// A window in which every counter is fresh.
    pub fn new() -> Self {
        const { assert!(W.is_power_of_two()) };
        Self {
            newest_block: Newest(AtomicU64::new(0)),
            words: std::array::from_fn(|_| AtomicU64::new(0)),
        }
    }

    /// Takes `counter`: of all calls with it, on any thread, one succeeds at most. Only for
    /// counters of authentic datagrams, as it moves the window.
    ///
    /// # Errors
    /// When it was taken before or is too old. A fresh counter may fail, too, if others
    /// move the window past it meanwhile.
    #[inline]
    pub fn take(&self, counter: u64) -> Result<(), Replayed> {
        let block = counter / BLOCK;
        let bit = 1 << (counter % BLOCK);
        let round = ((block / W as u64) as u32 as u64) << 32;
        if block > self.newest_block.0.load(Ordering::Relaxed) {
            self.newest_block.0.fetch_max(block, Ordering::Relaxed);
        }
        let word = &self.words[block as usize % W];
        let mut found = word.load(Ordering::Acquire);
        loop {
            // After the word was read, as explained above.
            let newest = self.newest_block.0.load(Ordering::Relaxed);
            if newest.saturating_sub(block) >= W as u64 {
                return Err(Replayed);
            }
            let same_round = found >> 32 == round >> 32;
            let taken = if same_round { found as u32 as u64 } else { 0 };
            if taken & bit != 0 {
                return Err(Replayed);
            }
            let new = round | taken | bit;
            let done = word.compare_exchange_weak(found, new, Ordering::AcqRel, Ordering::Acquire);
            match done {
                Ok(_) => return Ok(()),
                Err(other) => found = other,
            }
        }
    }
}

impl<const W: usize> Default for ReplayWindow<W> {
    fn default() -> Self {
        Self::new()
    }
}
