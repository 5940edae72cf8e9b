//! The packet code's kernels, each with fixed inputs: what `cargo bench --bench
//! packet` times, and what `cargo bench --bench instructions` counts.
//!
//! A kernel is one piece of the data path on the packets of one buffer, such
//! as a TSO vnet packet cut into 45 packets. Inputs are the same on every machine
//! and in every run, and all memory is taken before the first one.

mod coalesce;
mod inputs;
mod lookup;
mod segment;
mod sum;
mod worker;

/// One kernel, ready to run.
pub struct Kernel {
    /// Packets of one run.
    pub packets: u64,
    /// Bytes of one run: of whole IP packets, or those summed up.
    pub bytes: u64,
    /// What one run returns if it does what it should; see [`Kernel::run`].
    pub outputs: u64,
    work: Box<dyn FnMut() -> u64>,
}

impl Kernel {
    fn new(
        packets: usize,
        packet_bytes: usize,
        outputs: usize,
        work: impl FnMut() -> u64 + 'static,
    ) -> Self {
        Self {
            packets: packets as u64,
            bytes: (packets * packet_bytes) as u64,
            outputs: outputs as u64,
            work: Box::new(work),
        }
    }

    /// Runs it once, over all its packets. Returns how many outputs that gave:
    /// packets written, vnet packets finished, lookups that found something.
    pub fn run(&mut self) -> u64 {
        (self.work)()
    }
}

/// A kernel's unique name, group and case as in `segment/tcp4-1472`, and how
/// to make it ready.
type Case = (&'static str, fn() -> Kernel);

/// All kernels' names, in the order in which they are shown.
pub fn names() -> impl Iterator<Item = &'static str> {
    cases().map(|(name, _)| name)
}

/// Makes the kernel of this name ready, and nothing else: its memory is laid
/// out alike whatever other kernels there are.
pub fn kernel(name: &str) -> Option<Kernel> {
    let (_, make) = cases().find(|(case, _)| *case == name)?;
    Some(make())
}

/// A worker's kernels are a binary's of their own; see `benches/worker/main.rs`.
const GROUPS: &[&[Case]] = match env!("CARGO_CRATE_NAME").as_bytes() {
    b"worker" => &[worker::CASES],
    _ => &[segment::CASES, coalesce::CASES, sum::CASES, lookup::CASES],
};

fn cases() -> impl Iterator<Item = Case> {
    GROUPS.iter().copied().flatten().copied()
}
