//! The counts that are kept in the tree, and what a new count means next to
//! them.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// All that decides the counts other than our code. Counts from different
/// surroundings can be read side by side, but do not tell a regression.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Surroundings {
    /// Architecture.
    pub target: String,
    /// The compiler's version.
    pub rustc: String,
    /// The C library's version: its memcpy is counted too.
    pub libc: String,
    /// Valgrind's version: it decides which CPU the code sees.
    pub valgrind: String,
    /// The code path that this CPU led to.
    pub simd: String,
}

impl Surroundings {
    /// What differs, as `name: then, now`.
    pub fn differences(&self, now: &Self) -> Vec<String> {
        let fields = [
            ("target", &self.target, &now.target),
            ("rustc", &self.rustc, &now.rustc),
            ("libc", &self.libc, &now.libc),
            ("valgrind", &self.valgrind, &now.valgrind),
            ("SIMD", &self.simd, &now.simd),
        ];
        fields
            .into_iter()
            .filter(|(_, then, now)| then != now)
            .map(|(name, then, now)| format!("{name}: baseline {then:?}, now {now:?}"))
            .collect()
    }
}

/// What one run of a kernel took.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Count {
    /// Instructions executed.
    pub instructions: u64,
    /// Packets that they were for.
    pub packets: u64,
    /// Bytes of these packets.
    pub bytes: u64,
}

impl Count {
    /// Instructions for each packet.
    pub fn per_packet(&self) -> f64 {
        self.instructions as f64 / self.packets as f64
    }

    /// Instructions for each byte.
    pub fn per_byte(&self) -> f64 {
        self.instructions as f64 / self.bytes as f64
    }
}

/// Counts of all kernels by name.
pub type Counts = BTreeMap<String, Count>;

/// The file `baseline.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Baseline {
    /// What the counts were obtained with.
    pub surroundings: Surroundings,
    /// Change per packet that is let pass, in percent.
    pub tolerance_percent: f64,
    /// The counts.
    pub counts: Counts,
}

/// What a count means.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Verdict {
    /// Within tolerance; the change in percent.
    Same(f64),
    /// Fewer instructions per packet; the change in percent, negative.
    Better(f64),
    /// More instructions per packet; the change in percent.
    Worse(f64),
    /// The kernel is not in the baseline.
    New,
}

impl Verdict {
    /// Whether the gate must not pass with it. A kernel that nobody recorded
    /// would never be watched.
    pub fn is_failure(self) -> bool {
        matches!(self, Self::Worse(_) | Self::New)
    }
}

impl Baseline {
    /// Judges one kernel's count.
    pub fn judge(&self, name: &str, now: &Count) -> Verdict {
        let Some(then) = self.counts.get(name) else {
            return Verdict::New;
        };
        let change_percent = (now.per_packet() / then.per_packet() - 1.0) * 100.0;
        if change_percent > self.tolerance_percent {
            Verdict::Worse(change_percent)
        } else if change_percent < -self.tolerance_percent {
            Verdict::Better(change_percent)
        } else {
            Verdict::Same(change_percent)
        }
    }

    /// Kernels of the baseline that are not among `names`.
    pub fn gone<'a>(&'a self, names: &[&str]) -> Vec<&'a str> {
        let kept = self.counts.keys().map(String::as_str);
        kept.filter(|name| !names.contains(name)).collect()
    }
}
