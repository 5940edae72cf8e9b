//! FQ-CoDel (RFC 8290): packets that wait until a socket has room for them. Each
//! flow has a queue of its own, which [`Codel`] keeps short, and the flows take
//! turns (deficit round robin), those that have little to send first.
//!
//! Memory is taken at the start: [`CELLS`] cells of [`CELL_BYTES`]. A packet lies
//! in a chain of them. When there is no cell left, the flow that holds most loses
//! packets from its head.

use std::hash::{BuildHasher, RandomState};
use std::ops::Range;

use super::codel::Codel;
use super::ecn;
use super::flow::flow_hash;
use super::ip::Version;

/// Queues that flows share by their hash (RFC 8290, section 5.3).
const FLOWS: usize = 1024;

/// Cells for packets.
pub const CELLS: usize = 4096;

/// Bytes of a cell: a packet of an Ethernet's MTU.
pub const CELL_BYTES: usize = 1536;

/// Bytes that a flow may send in its turn, at the least: a packet of an Ethernet's
/// MTU (RFC 8290, section 5.2).
pub const QUANTUM_BYTES_MIN: usize = 1514;

/// Packets that the flow that holds most loses at a time, when there is no cell
/// left: looking for it is not cheap.
const OVERLIMIT_DROPS_MAX: usize = 64;

/// No cell, or no flow.
const NONE: u16 = u16::MAX;
const _: () = assert!(CELLS < NONE as usize);
const _: () = assert!(FLOWS < NONE as usize);

/// How packets wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Aqm {
    /// By flows, each kept short.
    FqCodel,
    /// All in one queue that nothing is dropped from while there is room.
    Off,
}

/// Why a packet was dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// Its flow's queue has stood for too long.
    Aqm,
    /// There was no room, and its flow held most.
    Overlimit,
}

/// What became of packets, besides being sent. `tag` is what they were queued with.
pub trait Observer<T> {
    /// A packet was dropped. `head`: its first bytes, as many as a cell has.
    fn dropped(&self, tag: &T, head: &[u8], packet_bytes: usize, reason: Reason);
    /// A packet was marked as having experienced congestion.
    fn marked(&self);
}

/// What is known of a packet, by its first cell.
#[derive(Clone, Copy, Debug)]
struct Packet<T> {
    tag: T,
    version: Version,
    packet_bytes: usize,
    enqueued_ns: u64,
    /// First cell of the next packet of its queue.
    next: u16,
}

#[derive(Clone, Copy, Debug)]
struct Flow {
    first: u16,
    last: u16,
    /// Bytes that it may still send in this turn.
    deficit: isize,
    /// The next flow of the list that it is in.
    next: u16,
    is_listed: bool,
    codel: Codel,
}

/// Flows in the order of their turns, linked by [`Flow::next`].
#[derive(Clone, Copy, Debug)]
struct List {
    first: u16,
    last: u16,
}

/// See the module's documentation. Packets have a `tag` of the caller's.
#[derive(Debug)]
pub struct FqCodel<T> {
    aqm: Aqm,
    key: u64,
    cells: Box<[u8]>,
    /// By cell: the next one, of its packet or of the free cells.
    next_cells: Box<[u16]>,
    first_free: u16,
    free: usize,
    /// By first cell.
    packets: Box<[Option<Packet<T>>]>,
    flows: Box<[Flow]>,
    /// By flow, apart from the rest to be scanned fast.
    backlog_bytes: Box<[u32]>,
    new: List,
    old: List,
    quantum_bytes: usize,
    /// The flow whose first packet goes next.
    ready: Option<u16>,
    packets_waiting: usize,
    total_bytes: u64,
}

/// Where the first bytes of a packet are, by its first cell.
fn head_of(cell: u16, packet_bytes: usize) -> Range<usize> {
    let start = usize::from(cell) * CELL_BYTES;
    start..start + packet_bytes.min(CELL_BYTES)
}

impl<T: Copy> FqCodel<T> {
    /// Nothing waits.
    pub fn new(aqm: Aqm) -> Self {
        let flow = Flow {
            first: NONE,
            last: NONE,
            deficit: 0,
            next: NONE,
            is_listed: false,
            codel: Codel::default(),
        };
        let empty = List {
            first: NONE,
            last: NONE,
        };
        let last = CELLS as u16 - 1;
        Self {
            aqm,
            key: RandomState::new().hash_one(0),
            cells: vec![0; CELLS * CELL_BYTES].into_boxed_slice(),
            next_cells: (0..last).map(|cell| cell + 1).chain([NONE]).collect(),
            first_free: 0,
            free: CELLS,
            packets: vec![None; CELLS].into_boxed_slice(),
            flows: vec![flow; FLOWS].into_boxed_slice(),
            backlog_bytes: vec![0; FLOWS].into_boxed_slice(),
            new: empty,
            old: empty,
            quantum_bytes: QUANTUM_BYTES_MIN,
            ready: None,
            packets_waiting: 0,
            total_bytes: 0,
        }
    }

    /// Whether nothing waits.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.packets_waiting == 0
    }

    /// Bytes of the packets that wait.
    pub fn total_bytes(&self) -> u64 {
        self.total_bytes
    }

    /// How much each flow may send in its turn.
    pub fn set_quantum(&mut self, bytes: usize) {
        self.quantum_bytes = bytes.max(QUANTUM_BYTES_MIN);
    }

    /// Queues a packet that [`super::ip::verify`] passed as `version`.
    pub fn push(
        &mut self,
        version: Version,
        packet: &[u8],
        tag: T,
        now_ns: u64,
        observer: &impl Observer<T>,
    ) {
        let needed = packet.len().div_ceil(CELL_BYTES);
        while self.free < needed {
            self.drop_overlimit(observer);
        }
        let first = self.first_free;
        let mut last = first;
        for bytes in packet.chunks(CELL_BYTES) {
            last = self.first_free;
            let start = usize::from(last) * CELL_BYTES;
            self.cells[start..start + bytes.len()].copy_from_slice(bytes);
            self.first_free = self.next_cells[usize::from(last)];
        }
        self.free -= needed;
        self.next_cells[usize::from(last)] = NONE;
        self.packets[usize::from(first)] = Some(Packet {
            tag,
            version,
            packet_bytes: packet.len(),
            enqueued_ns: now_ns,
            next: NONE,
        });
        let flow = match self.aqm {
            Aqm::FqCodel => flow_hash(version, packet, self.key) as usize % FLOWS,
            Aqm::Off => 0,
        };
        self.append(flow, first);
        self.packets_waiting += 1;
        self.total_bytes += packet.len() as u64;
    }

    /// Appends the packet at `cell` to a flow's queue.
    fn append(&mut self, index: usize, cell: u16) {
        let packet_bytes = self.packet(cell).map_or(0, |packet| packet.packet_bytes);
        self.backlog_bytes[index] += packet_bytes as u32;
        let flow = &mut self.flows[index];
        let last = std::mem::replace(&mut flow.last, cell);
        if last == NONE {
            flow.first = cell;
        }
        if !flow.is_listed {
            flow.is_listed = true;
            flow.deficit = self.quantum_bytes as isize;
            self.new.push(index as u16, &mut self.flows);
        }
        if let Some(last) = self.packet_mut(last) {
            last.next = cell;
        }
    }

    /// Tag and length of the packet that goes next. Packets on the way to it that
    /// have to be dropped are. The same is returned until it is taken.
    pub fn peek(&mut self, now_ns: u64, observer: &impl Observer<T>) -> Option<(T, usize)> {
        if self.ready.is_none() {
            self.ready = self.next_flow(now_ns, observer);
        }
        let flow = usize::from(self.ready?);
        let packet = self.packet(self.flows[flow].first)?;
        Some((packet.tag, packet.packet_bytes))
    }

    /// Takes the packet of the last [`Self::peek`]: writes it to `out`, which has
    /// its length, and returns for how long it has waited.
    pub fn take(&mut self, out: &mut [u8], now_ns: u64) -> u64 {
        let Some(flow) = self.ready.take() else {
            return 0;
        };
        let flow = usize::from(flow);
        let mut cell = self.flows[flow].first;
        for bytes in out.chunks_mut(CELL_BYTES) {
            let start = usize::from(cell) * CELL_BYTES;
            bytes.copy_from_slice(&self.cells[start..start + bytes.len()]);
            cell = self.next_cells[usize::from(cell)];
        }
        self.flows[flow].deficit -= out.len() as isize;
        let packet = self.remove_first(flow);
        packet.map_or(0, |packet| now_ns.saturating_sub(packet.enqueued_ns))
    }

    /// The flow whose turn it is, with a packet at its head that may go.
    fn next_flow(&mut self, now_ns: u64, observer: &impl Observer<T>) -> Option<u16> {
        loop {
            let is_new = self.new.first != NONE;
            let list = if is_new { self.new } else { self.old };
            let flow = self.flows.get_mut(usize::from(list.first))?;
            let index = list.first;
            if flow.deficit <= 0 {
                flow.deficit += self.quantum_bytes as isize;
                self.rotate(is_new, true);
            } else if self.clear_head(usize::from(index), now_ns, observer) {
                return Some(index);
            } else {
                // A new flow that has run empty waits out a round, lest it come back
                // as a new one at once and starve the others (RFC 8290, section 4.2).
                self.rotate(is_new, is_new && self.old.first != NONE);
            }
        }
    }

    /// Takes the first flow from a list, and appends it to the old ones or lets it go.
    fn rotate(&mut self, is_new: bool, stays: bool) {
        let list = if is_new { &mut self.new } else { &mut self.old };
        let Some(index) = list.pop(&self.flows) else {
            return;
        };
        if stays {
            self.old.push(index, &mut self.flows);
        } else {
            self.flows[usize::from(index)].is_listed = false;
        }
    }

    /// Drops packets from the head of a flow's queue until one may go; `false` if
    /// none is left.
    fn clear_head(&mut self, flow: usize, now_ns: u64, observer: &impl Observer<T>) -> bool {
        loop {
            let cell = self.flows[flow].first;
            let Some(packet) = self.packet(cell).copied() else {
                return false;
            };
            let sojourn_ns = now_ns.saturating_sub(packet.enqueued_ns);
            let least = QUANTUM_BYTES_MIN.max(packet.packet_bytes);
            let is_short = self.aqm == Aqm::Off || self.backlog_bytes[flow] as usize <= least;
            if !self.flows[flow].codel.is_due(sojourn_ns, is_short, now_ns) {
                return true;
            }
            let head = head_of(cell, packet.packet_bytes);
            if ecn::mark_ce(packet.version, &mut self.cells[head.clone()]) {
                observer.marked();
                return true;
            }
            self.remove_first(flow);
            let (head, bytes) = (&self.cells[head], packet.packet_bytes);
            observer.dropped(&packet.tag, head, bytes, Reason::Aqm);
        }
    }

    /// Makes room: the flow that holds most loses half of it, or so many packets.
    #[cold]
    fn drop_overlimit(&mut self, observer: &impl Observer<T>) {
        let most = self.backlog_bytes.iter().enumerate();
        let Some((flow, &bytes)) = most.max_by_key(|(_, bytes)| **bytes) else {
            return;
        };
        if self.ready == Some(flow as u16) {
            self.ready = None;
        }
        for _ in 0..OVERLIMIT_DROPS_MAX {
            let cell = self.flows[flow].first;
            let Some(packet) = self.remove_first(flow) else {
                return;
            };
            let head = &self.cells[head_of(cell, packet.packet_bytes)];
            let (tag, packet_bytes) = (&packet.tag, packet.packet_bytes);
            observer.dropped(tag, head, packet_bytes, Reason::Overlimit);
            if self.backlog_bytes[flow] <= bytes / 2 {
                return;
            }
        }
    }

    /// Takes the first packet out of a flow's queue and frees its cells.
    fn remove_first(&mut self, flow: usize) -> Option<Packet<T>> {
        let first = self.flows[flow].first;
        let packet = self.packets.get_mut(usize::from(first))?.take()?;
        self.flows[flow].first = packet.next;
        if packet.next == NONE {
            self.flows[flow].last = NONE;
        }
        self.backlog_bytes[flow] -= packet.packet_bytes as u32;
        self.packets_waiting -= 1;
        self.total_bytes -= packet.packet_bytes as u64;
        let cells = packet.packet_bytes.div_ceil(CELL_BYTES);
        let mut last = first;
        for _ in 1..cells {
            last = self.next_cells[usize::from(last)];
        }
        self.next_cells[usize::from(last)] = self.first_free;
        self.first_free = first;
        self.free += cells;
        Some(packet)
    }

    fn packet(&self, cell: u16) -> Option<&Packet<T>> {
        self.packets.get(usize::from(cell))?.as_ref()
    }

    fn packet_mut(&mut self, cell: u16) -> Option<&mut Packet<T>> {
        self.packets.get_mut(usize::from(cell))?.as_mut()
    }
}

impl List {
    fn push(&mut self, index: u16, flows: &mut [Flow]) {
        flows[usize::from(index)].next = NONE;
        match flows.get_mut(usize::from(self.last)) {
            Some(last) => last.next = index,
            None => self.first = index,
        }
        self.last = index;
    }

    fn pop(&mut self, flows: &[Flow]) -> Option<u16> {
        let first = self.first;
        self.first = flows.get(usize::from(first))?.next;
        if self.first == NONE {
            self.last = NONE;
        }
        Some(first)
    }
}

#[cfg(test)]
#[path = "fq_codel_tests.rs"]
mod tests;
