//! Longest-prefix match: which next hop an address goes to.
//!
//! A table never changes; whoever has other prefixes builds another one. So it
//! need not hold prefixes at all. They are flattened into address ranges, each
//! with the next hop of its longest prefix, and a lookup finds the last range
//! that does not start beyond the address. Where to look for it says an index:
//! a trie whose nodes take as many bits of the address at once as they have
//! ranges to tell apart, and which skips the bits that these have in common
//! (level and path compression, as in Nilsson and Karlsson's LC-trie, "IP-address
//! lookup using LC-tries", 1999). Dense and sparse parts of the address space are
//! thus alike to it: a few steps, then a search in a few neighbours.
//!
//! # Why not a crate
//!
//! The bound is 50 ns for one lookup among 100 000 prefixes, and no crate keeps
//! to it with IPv6. Each figure is the best of several runs on an AMD EPYC with
//! 1 MiB of L2 cache; the prefixes and addresses are like those of `cargo bench
//! --bench packet -- prefixes/`, which has the up-to-date figures of this module.
//!
//! | IPv4 / IPv6                            | lookup, ns | load, ms | MiB       |
//! |----------------------------------------|------------|----------|-----------|
//! | this module                            | 19 / 28    | 5 / 13   | 2.0 / 4.3 |
//! | iptrie 0.11.2 (level-compressed)       | 28 / 61    | 20 / 26  | 1.9 / 3.2 |
//! | prefix-trie 0.10.1                     | 45 / 148   | 10 / 21  | 4.3 / 8.3 |
//! | poptrie 0.2.1                          | 44 / 152   | 35 / 60  | 20 / 35   |
//! | ts_bart 0.6.1                          | 57 / 153   | 12 / 21  | 7.0 / 9.9 |
//! | ip_network_table-deps-treebitmap 0.5.0 | 79 / 217   | 10 / 23  | 3.4 / 8.3 |
//!
//! These are lookups one after the other that need not wait for each other, as
//! with the packets of a burst. Where each waits for the one before, this module
//! takes 46 / 66 ns, iptrie 54 / 79 and prefix-trie 66 / 160. Also, iptrie and
//! prefix-trie use `unsafe` code.

use std::net::IpAddr;
use std::ops::Range;

use ipnet::IpNet;

use super::batch::NextHop;

/// Most ranges that are searched without a further node of the index.
const LEAF_RANGES_MAX: usize = 32;

/// Most bits of an address that one node takes: 512 KiB of slots.
const STRIDE_BITS_MAX: u32 = 16;

/// Prefixes of both families with the next hops of their addresses.
///
/// Of equal prefixes the last one counts. Bits of a prefix beyond its length
/// do not matter. An IPv4-mapped IPv6 address is an IPv6 address like any
/// other.
#[derive(Clone, Debug)]
pub struct Prefixes {
    v4: Ranges<u32>,
    v6: Ranges<u128>,
}

impl Prefixes {
    /// The table of these prefixes, in any order. Takes time in proportion to
    /// `n log n`, and memory to their number; the caller bounds it.
    pub fn new(prefixes: impl IntoIterator<Item = (IpNet, NextHop)>) -> Self {
        let (mut v4, mut v6) = (Vec::new(), Vec::new());
        for (prefix, next_hop) in prefixes {
            match prefix {
                IpNet::V4(net) => v4.push(Prefix {
                    first: net.network().to_bits(),
                    last: net.broadcast().to_bits(),
                    next_hop,
                }),
                IpNet::V6(net) => v6.push(Prefix {
                    first: net.network().to_bits(),
                    last: net.broadcast().to_bits(),
                    next_hop,
                }),
            }
        }
        Self {
            v4: Ranges::new(v4),
            v6: Ranges::new(v6),
        }
    }

    /// The next hop of the longest prefix that holds the address.
    // Always inline: an `IpAddr` handed over in memory is read back in other
    // pieces than it was written in, the processor waits for that, and lookups
    // no longer overlap. With IPv6 they took 70 ns instead of 28.
    #[inline(always)]
    pub fn lookup(&self, address: IpAddr) -> Option<NextHop> {
        match address {
            IpAddr::V4(address) => self.v4.lookup(address.to_bits()),
            IpAddr::V6(address) => self.v6.lookup(address.to_bits()),
        }
    }

    /// Prefixes of both families, equal ones counted once.
    pub fn len(&self) -> usize {
        self.v4.prefixes + self.v6.prefixes
    }

    /// Whether there is no prefix, so that no address has a next hop.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The prefixes that an address is in, the longest first.
pub(crate) fn covering(address: IpAddr) -> impl Iterator<Item = IpNet> {
    let lengths = (0..=IpNet::from(address).max_prefix_len()).rev();
    lengths.filter_map(move |length| Some(IpNet::new(address, length).ok()?.trunc()))
}

/// An address as a number in host byte order.
trait Address: Copy + Ord {
    /// The first bits, as many as fit a register.
    type High: Copy + Ord;
    /// The other ones.
    type Low: Copy + Ord;

    const BITS: u32;
    const ZERO: Self;
    /// All ones.
    const MAX: Self;

    fn split(self) -> (Self::High, Self::Low);

    /// The address behind this one, or `None` after the last.
    fn next(self) -> Option<Self>;
    /// How many leading bits both have in common.
    fn common_bits(self, other: Self) -> u32;
    /// The lowest bits after a shift to the right by less than `BITS`.
    fn low_bits(self, shift: u32) -> u32;
    /// The first `bits` bits, the others zero.
    fn truncate(self, bits: u32) -> Self;
    /// Whether both have the same bits where `mask` has ones.
    fn is_equal_under(self, other: Self, mask: Self) -> bool;
}

macro_rules! address {
    ($number:ty, $high:ty, $low:ty, $split:expr) => {
        impl Address for $number {
            type High = $high;
            type Low = $low;

            const BITS: u32 = <$number>::BITS;
            const ZERO: Self = 0;
            const MAX: Self = <$number>::MAX;

            #[inline]
            fn split(self) -> ($high, $low) {
                $split(self)
            }

            fn next(self) -> Option<Self> {
                self.checked_add(1)
            }

            fn common_bits(self, other: Self) -> u32 {
                (self ^ other).leading_zeros()
            }

            #[inline]
            fn low_bits(self, shift: u32) -> u32 {
                (self >> (shift % Self::BITS)) as u32
            }

            fn truncate(self, bits: u32) -> Self {
                let host_mask = Self::MAX.checked_shr(bits).unwrap_or(0);
                self & !host_mask
            }

            #[inline]
            fn is_equal_under(self, other: Self, mask: Self) -> bool {
                (self ^ other) & mask == 0
            }
        }
    };
}

address!(u32, u32, (), |bits| (bits, ()));
address!(u128, u64, u64, |bits| ((bits >> 64) as u64, bits as u64));

/// A prefix as its first and last address.
struct Prefix<A> {
    first: A,
    last: A,
    next_hop: NextHop,
}

/// Part of the ranges' starts, or the node that divides it further.
#[derive(Clone, Copy, Debug)]
struct Slot {
    /// Index of the first start, or of the node.
    at: u32,
    /// How many starts, or [`Slot::NODE`].
    len: u32,
}

impl Slot {
    const NODE: u32 = u32::MAX;
}

/// Divides neighbouring starts by some bits of theirs.
#[derive(Clone, Copy, Debug)]
struct Node<A> {
    /// The bits that all the starts have in common, ahead of the stride.
    common: A,
    /// Ones where `common` counts.
    mask: A,
    /// Bits behind the stride.
    shift: u32,
    /// As many ones as the stride has bits.
    stride_mask: u32,
    /// Index of the first of the `stride_mask + 1` slots.
    slots: u32,
    /// The starts are those from here ...
    first: u32,
    /// ... up to and without this one.
    end: u32,
}

/// All addresses of a family, in ranges of one next hop or none.
#[derive(Clone, Debug)]
struct Ranges<A: Address> {
    /// All the starts.
    root: Slot,
    nodes: Box<[Node<A>]>,
    slots: Box<[Slot]>,
    /// First bits of the starts: the first addresses of all ranges but the
    /// first, which starts at zero. Few prefixes are longer than /64, and so
    /// their other bits seldom matter: a search reads half as much memory.
    highs: Box<[A::High]>,
    /// The other bits of the starts.
    lows: Box<[A::Low]>,
    /// Next hops of all ranges: one more than there are starts.
    next_hops: Box<[Option<NextHop>]>,
    /// Prefixes that the ranges were made of.
    prefixes: usize,
}

impl<A: Address> Ranges<A> {
    fn new(mut prefixes: Vec<Prefix<A>>) -> Self {
        // A prefix comes behind those that hold it. The sort is stable: equal
        // ones stay in order, and the last of them overrides the others.
        prefixes.sort_by(|a, b| a.first.cmp(&b.first).then(b.last.cmp(&a.last)));
        let mut flat = Flat::default();
        // Those that hold the current address, the longest last.
        let mut open: Vec<Prefix<A>> = Vec::new();
        let mut count = 0;
        for prefix in prefixes {
            while let Some(closed) = open.pop_if(|top| top.last < prefix.first) {
                flat.close(closed, open.last());
            }
            flat.range(prefix.first, Some(prefix.next_hop));
            match open.last_mut() {
                Some(top) if (top.first, top.last) == (prefix.first, prefix.last) => *top = prefix,
                _ => {
                    count += 1;
                    open.push(prefix);
                }
            }
        }
        while let Some(closed) = open.pop() {
            flat.close(closed, open.last());
        }
        let (starts, next_hops) = flat.finish();
        let (root, nodes, slots) = index(&starts);
        Self {
            root,
            nodes: nodes.into(),
            slots: slots.into(),
            highs: starts.iter().map(|start| start.split().0).collect(),
            lows: starts.iter().map(|start| start.split().1).collect(),
            next_hops: next_hops.into(),
            prefixes: count,
        }
    }

    #[inline(always)]
    fn lookup(&self, address: A) -> Option<NextHop> {
        self.next_hops.get(self.range(address)).copied().flatten()
    }

    /// Index of the address's range: how many starts are not beyond it.
    #[inline]
    fn range(&self, address: A) -> usize {
        let mut slot = self.root;
        // A node's slots name later nodes only: this ends.
        while slot.len == Slot::NODE {
            let node = &self.nodes[slot.at as usize];
            if !address.is_equal_under(node.common, node.mask) {
                // Ahead of all the starts or behind them.
                let range = if address < node.common {
                    node.first
                } else {
                    node.end
                };
                return range as usize;
            }
            let stride = address.low_bits(node.shift) & node.stride_mask;
            slot = self.slots[(node.slots + stride) as usize];
        }
        let at = slot.at as usize;
        let part = at..at + slot.len as usize;
        let (high, low) = address.split();
        let highs = &self.highs[part.clone()];
        let before = highs.partition_point(|start| *start < high);
        if highs.get(before) != Some(&high) {
            return at + before;
        }
        let equal = highs[before..].partition_point(|start| *start == high);
        let lows = &self.lows[part][before..before + equal];
        at + before + lows.partition_point(|start| *start <= low)
    }
}

/// Ranges while they are made, in the order of their addresses.
struct Flat<A>(Vec<(A, Option<NextHop>)>);

impl<A: Address> Default for Flat<A> {
    fn default() -> Self {
        Self(vec![(A::ZERO, None)])
    }
}

impl<A: Address> Flat<A> {
    /// Starts a range, in place of one that starts at the same address.
    fn range(&mut self, start: A, next_hop: Option<NextHop>) {
        self.0.pop_if(|range| range.0 == start);
        self.0.push((start, next_hop));
    }

    /// Behind a prefix, the one around it goes on.
    fn close(&mut self, closed: Prefix<A>, around: Option<&Prefix<A>>) {
        if let Some(start) = closed.last.next() {
            self.range(start, around.map(|prefix| prefix.next_hop));
        }
    }

    /// All starts but the first, and all next hops. Neighbours with the same
    /// next hop become one range.
    fn finish(mut self) -> (Vec<A>, Vec<Option<NextHop>>) {
        self.0.dedup_by_key(|range| range.1);
        let starts = self.0.iter().skip(1).map(|range| range.0).collect();
        let next_hops = self.0.iter().map(|range| range.1).collect();
        (starts, next_hops)
    }
}

/// The index of starts in ascending order: its root, nodes and slots.
fn index<A: Address>(starts: &[A]) -> (Slot, Vec<Node<A>>, Vec<Slot>) {
    let (mut nodes, mut slots) = (Vec::new(), Vec::new());
    // The starts of each node, of those not yet made too.
    let mut parts: Vec<Range<usize>> = Vec::new();
    let root = slot_of(0..starts.len(), &mut parts);
    while let Some(part) = parts.get(nodes.len()).cloned() {
        nodes.push(divide(starts, part, &mut slots, &mut parts));
    }
    (root, nodes, slots)
}

/// The slot of some starts; if they need a node, it is added to `parts`.
fn slot_of(part: Range<usize>, parts: &mut Vec<Range<usize>>) -> Slot {
    if part.len() <= LEAF_RANGES_MAX {
        return Slot {
            at: part.start as u32,
            len: part.len() as u32,
        };
    }
    parts.push(part);
    Slot {
        at: parts.len() as u32 - 1,
        len: Slot::NODE,
    }
}

/// The node of at least two starts; adds its slots to `slots`.
fn divide<A: Address>(
    starts: &[A],
    part: Range<usize>,
    slots: &mut Vec<Slot>,
    parts: &mut Vec<Range<usize>>,
) -> Node<A> {
    // In ascending order, what the first and the last have in common all have.
    let common_bits = starts[part.start].common_bits(starts[part.end - 1]);
    // One slot for one or two starts. Every node tells some apart, and takes at
    // most as many slots as it has starts.
    let stride_bits = part
        .len()
        .ilog2()
        .min(STRIDE_BITS_MAX)
        .min(A::BITS - common_bits);
    let node = Node {
        common: starts[part.start].truncate(common_bits),
        mask: A::MAX.truncate(common_bits),
        shift: A::BITS - common_bits - stride_bits,
        stride_mask: (1 << stride_bits) - 1,
        slots: slots.len() as u32,
        first: part.start as u32,
        end: part.end as u32,
    };
    let mut rest = part;
    for stride in 0..=node.stride_mask {
        let len = starts[rest.clone()]
            .iter()
            .take_while(|start| start.low_bits(node.shift) & node.stride_mask == stride)
            .count();
        let next = rest.start + len;
        slots.push(slot_of(rest.start..next, parts));
        rest.start = next;
    }
    node
}

#[cfg(test)]
#[path = "lpm_tests.rs"]
mod tests;
