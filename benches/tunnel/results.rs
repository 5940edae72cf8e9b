//! What a run of the bench measured: the data behind table, JSON and report.

use serde::{Deserialize, Serialize};

/// A whole run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Results {
    /// When it began, RFC 3339, UTC.
    pub started: String,
    /// Version of fastvpn, with the commit if known.
    pub version: String,
    /// Facts about the machine, as name and value: kernel, CPU, cores, memory.
    pub machine: Vec<(String, String)>,
    /// Settings of the run, as name and value: rounds, seconds per sample, flags.
    pub settings: Vec<(String, String)>,
    /// What was compared, in the order in which it was measured.
    pub targets: Vec<Target>,
    /// What was measured, in the order in which it is shown.
    pub rows: Vec<Row>,
    /// The samples; a pair of row and target that was not measured is absent.
    pub cells: Vec<Cell>,
}

/// One of the things compared.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Target {
    /// Short and unique, as in `uring` or `vxlan`.
    pub key: String,
    /// As shown to a person.
    pub title: String,
    /// How it was run: flags, MTU, version.
    pub detail: String,
    /// Why it was left out, if it was.
    pub missing: Option<String>,
}

/// One figure of one kind of traffic.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Row {
    /// Unique, traffic and figure, as in `tcp-1/gbit_per_s` or `udp-64/cpu_ns_per_packet`.
    pub key: String,
    /// The kind of traffic, as shown: `TCP, 1 stream`. Rows of one kind follow each other.
    pub group: String,
    /// The figure, as shown: `throughput`.
    pub title: String,
    /// Its unit, as shown: `Gbit/s`.
    pub unit: String,
    /// Which way is better.
    pub better: Better,
}

/// Which way a figure is better.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Better {
    /// The more, the better.
    Higher,
    /// The less, the better.
    Lower,
}

/// All samples of one row and one target.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Cell {
    /// Key of the row.
    pub row: String,
    /// Key of the target.
    pub target: String,
    /// One value per round, in the order measured.
    pub samples: Vec<f64>,
}

impl Cell {
    /// The median; the mean of the middle two of an even number. `None` without samples.
    pub fn median(&self) -> Option<f64> {
        let mut sorted = self.samples.clone();
        sorted.sort_by(f64::total_cmp);
        let middle = sorted.len() / 2;
        match sorted.len() {
            0 => None,
            odd if odd % 2 == 1 => Some(sorted[middle]),
            _ => Some(f64::midpoint(sorted[middle - 1], sorted[middle])),
        }
    }
}

impl Results {
    /// The cell of a row and a target, if it was measured.
    pub fn cell(&self, row: &str, target: &str) -> Option<&Cell> {
        self.cells
            .iter()
            .find(|cell| cell.row == row && cell.target == target)
    }
}
