//! The samples as they are drawn, without what is not a number.

use crate::results::{Cell, Results, Row, Target};
use crate::table::has_ratio;

/// Key of the target that ratios are taken to.
pub const BASELINE: &str = "vxlan";

/// Larger than anything measured, and far from where sums overflow.
const SAMPLE_ABS_MAX: f64 = 1e15;

/// Rows of one kind of traffic.
pub struct Group<'a> {
    /// The kind of traffic.
    pub title: &'a str,
    /// Its figures.
    pub figures: Vec<Figure<'a>>,
}

/// One figure of all targets that have it, in the order of the targets.
pub struct Figure<'a> {
    /// What it is.
    pub row: &'a Row,
    /// Who has it.
    pub bars: Vec<Bar<'a>>,
}

/// One figure of one target.
#[derive(Clone)]
pub struct Bar<'a> {
    /// Whose it is.
    pub target: &'a Target,
    /// Half of the samples are below.
    pub median: f64,
    /// The least sample.
    pub min: f64,
    /// The greatest sample.
    pub max: f64,
    /// All samples, in the order measured.
    pub samples: Vec<f64>,
    /// The median's ratio to that of [`BASELINE`], where that means anything.
    pub ratio: Option<f64>,
}

/// All that can be drawn, in the order in which it is shown.
pub fn groups(results: &Results) -> Vec<Group<'_>> {
    results
        .rows
        .chunk_by(|a, b| a.group == b.group)
        .map(|rows| Group {
            title: &rows[0].group,
            figures: rows.iter().map(|row| figure(results, row)).collect(),
        })
        .collect()
}

/// One figure of all targets.
pub fn figure<'a>(results: &'a Results, row: &'a Row) -> Figure<'a> {
    let base = results
        .cell(&row.key, BASELINE)
        .and_then(|cell| numbers(cell).median())
        .filter(|median| *median > 0.0 && has_ratio(row));
    let bars = results
        .targets
        .iter()
        .filter_map(|target| {
            let cell = numbers(results.cell(&row.key, &target.key)?);
            let median = cell.median()?;
            let (mut min, mut max) = (median, median);
            for sample in &cell.samples {
                min = min.min(*sample);
                max = max.max(*sample);
            }
            Some(Bar {
                target,
                median,
                min,
                max,
                samples: cell.samples,
                ratio: base.map(|base| median / base).filter(|r| r.is_finite()),
            })
        })
        .collect();
    Figure { row, bars }
}

fn numbers(cell: &Cell) -> Cell {
    let mut cell = cell.clone();
    cell.samples.retain(|sample| sample.abs() <= SAMPLE_ABS_MAX);
    cell
}

impl Figure<'_> {
    /// The bar of a target.
    pub fn bar(&self, target: &str) -> Option<&Bar<'_>> {
        self.bars.iter().find(|bar| bar.target.key == target)
    }

    /// Whether any bar has a ratio.
    pub fn has_ratios(&self) -> bool {
        self.bars.iter().any(|bar| bar.ratio.is_some())
    }
}
