//! What the handshake thread and the workers share of sessions. The handshake thread puts
//! them in force and takes them out; workers look them up, without a lock, and note what
//! they have seen. A session that is stored here is in force for all workers at once, which
//! is why a response may leave as soon as its session is stored.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use arc_swap::{ArcSwapOption, Guard};

use super::session::Session;
use crate::wire::Endpoint;

pub use super::session::{Found, InboundDrops, PeerSessions};

/// What workers tell the handshake thread.
#[derive(Debug)]
pub enum WorkerRequest {
    /// Packets wait for a session with this peer. If there is one by now, all workers are to
    /// be told.
    Session(Arc<PeerSessions>),
    /// A message of a handshake has come to a worker, from there: the kernel may merge it with
    /// data messages.
    Message(Endpoint, Box<[u8]>),
}

/// Slots that are allocated together: 4 KiB.
const CHUNK: usize = 512;

type Slot = ArcSwapOption<Session>;

/// Sessions by the index that their messages name: this host's own. The low bits of an index
/// say the slot, the others are random, so that indices cannot be guessed or confused with
/// earlier ones of the same slot.
///
/// The handshake thread alone reserves, stores and removes.
#[derive(Debug)]
pub struct SessionMap {
    /// Made when a slot in them is first used.
    chunks: Box<[OnceLock<Box<[Slot]>>]>,
    /// Slots that are reserved or have a session, with its index.
    taken: Mutex<HashMap<usize, u32>>,
}

impl SessionMap {
    /// Room for `capacity` sessions and handshakes in flight, rounded up to a power of two;
    /// 2^24 at most. Memory is taken as they come.
    pub fn new(capacity: usize) -> Self {
        let capacity = capacity.clamp(CHUNK, 1 << 24).next_power_of_two();
        Self {
            chunks: (0..capacity / CHUNK).map(|_| OnceLock::new()).collect(),
            taken: Mutex::default(),
        }
    }

    /// An index for a handshake that starts: nobody else gets it until it is removed. `None`
    /// when the map is full, or the system has no random numbers.
    pub fn reserve(&self) -> Option<u32> {
        let mut taken = self.taken();
        // Half of the slots that are drawn from are free, or more, and few chunks are in
        // use. Only when the map is nearly full, fewer are free.
        let drawn_from = (2 * taken.len() + 2).next_power_of_two();
        let mask = drawn_from.clamp(CHUNK, self.capacity()) - 1;
        let random = getrandom::u32().ok()?;
        let first = random as usize & mask;
        let mut slots = (0..=mask).map(|step| (first + step) & mask);
        let slot = slots.find(|slot| !taken.contains_key(slot))?;
        let index = random & !self.slot_mask() | slot as u32;
        taken.insert(slot, index);
        Some(index)
    }

    /// Puts a session in force for what is received with its index, if that is reserved.
    /// Returns whether it is.
    pub fn store(&self, session: Arc<Session>) -> bool {
        let index = session.local_index();
        let slot = self.slot(index);
        let is_reserved = self.taken().get(&slot) == Some(&index);
        if let Some(chunk) = self.chunks.get(slot / CHUNK).filter(|_| is_reserved) {
            let chunk = chunk.get_or_init(|| (0..CHUNK).map(|_| Slot::empty()).collect());
            chunk[slot % CHUNK].store(Some(session));
        }
        is_reserved
    }

    /// Gives an index back, and takes its session out, if it has one. Other indices of the
    /// same slot are left alone.
    pub fn remove(&self, index: u32) -> Option<Arc<Session>> {
        let slot = self.slot(index);
        let mut taken = self.taken();
        if taken.get(&slot) != Some(&index) {
            return None;
        }
        taken.remove(&slot);
        let chunk = self.chunks.get(slot / CHUNK)?.get()?;
        chunk[slot % CHUNK].swap(None)
    }

    /// The session that a message names.
    #[inline]
    pub fn get(&self, index: u32) -> Found {
        let slot = self.slot(index);
        let chunk = self.chunks.get(slot / CHUNK).and_then(OnceLock::get);
        let Some(slot) = chunk.and_then(|chunk| chunk.get(slot % CHUNK)) else {
            return Guard::from_inner(None);
        };
        let found = slot.load();
        match found.as_ref() {
            Some(session) if session.local_index() == index => found,
            _ => Guard::from_inner(None),
        }
    }

    /// How many indices are taken.
    #[cfg(test)]
    pub(crate) fn taken_count(&self) -> usize {
        self.taken().len()
    }

    fn capacity(&self) -> usize {
        self.chunks.len() * CHUNK
    }

    /// The bits of an index that say its slot.
    #[inline]
    fn slot_mask(&self) -> u32 {
        (self.capacity() - 1) as u32
    }

    #[inline]
    fn slot(&self, index: u32) -> usize {
        (index & self.slot_mask()) as usize
    }

    fn taken(&self) -> MutexGuard<'_, HashMap<usize, u32>> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
#[path = "sessions_tests.rs"]
mod tests;
