//! What a reader in a hurry wants to know, computed from the figures.

use super::figures::{BASELINE, Bar, Figure, figure};
use super::palette::{Family, family};
use crate::results::{Better, Results, Target};
use crate::table::{number, ratio_text};

/// One finding.
#[derive(Debug, PartialEq, Eq)]
pub struct Finding {
    /// What it is about.
    pub title: String,
    /// The figure.
    pub value: String,
    /// Its unit.
    pub unit: String,
    /// What it is beside: spread, ratios.
    pub notes: Vec<String>,
}

/// Rows that findings are made of, and what to call them.
const ROWS: [(&str, &str); 5] = [
    ("tcp-1/gbit_per_s", "One TCP stream"),
    ("tcp-1/cpu_s_per_gb", "CPU time for it"),
    ("udp-64/delivered_kpps", "Small UDP packets delivered"),
    ("udp-64/cpu_ns_per_packet", "CPU time per small packet"),
    ("tcp-ping/p50_us", "TCP round trip, p50"),
];

/// The one that findings are about: fastvpn as it comes, or the first of its
/// ways that was measured.
pub fn subject(results: &Results) -> Option<&Target> {
    let measured = |target: &&Target| {
        let mut cells = results.cells.iter();
        cells.any(|cell| cell.target == target.key && cell.median().is_some())
    };
    let mut candidates = results
        .targets
        .iter()
        .filter(|target| family(target) == Family::Fastvpn)
        .filter(measured);
    let first = candidates.clone().next();
    candidates.find(|target| target.key == "uring").or(first)
}

/// What can be said about the subject; empty when nothing was measured.
pub fn findings(results: &Results, subject: &Target) -> Vec<Finding> {
    ROWS.iter()
        .filter_map(|(key, title)| {
            let row = results.rows.iter().find(|row| row.key == *key)?;
            finding(&figure(results, row), subject, title)
        })
        .collect()
}

fn finding(figure: &Figure<'_>, subject: &Target, title: &str) -> Option<Finding> {
    let own = figure.bar(&subject.key)?;
    let mut notes = Vec::new();
    if own.max > own.min {
        notes.push(format!("{} to {}", number(own.min), number(own.max)));
    }
    if let Some(ratio) = own.ratio
        && own.target.key != BASELINE
    {
        notes.push(format!("{} kernel VXLAN", ratio_text(ratio)));
    }
    if let Some(rival) = best_rival(figure)
        && rival.median > 0.0
    {
        let ratio = ratio_text(own.median / rival.median);
        notes.push(format!("{ratio} {}", rival.target.title));
    }
    Some(Finding {
        title: title.to_string(),
        value: number(own.median),
        unit: unit(&figure.row.unit),
        notes,
    })
}

/// A unit as it stands behind a number.
fn unit(unit: &str) -> String {
    match unit.starts_with(|first: char| first.is_ascii_digit()) {
        true => format!("× {unit}"),
        false => unit.to_string(),
    }
}

/// The best of the other programs: neither fastvpn nor the kernel.
fn best_rival<'a>(figure: &'a Figure<'_>) -> Option<&'a Bar<'a>> {
    let rivals = figure
        .bars
        .iter()
        .filter(|bar| family(bar.target) == Family::Others);
    let by_median = |a: &&Bar<'_>, b: &&Bar<'_>| a.median.total_cmp(&b.median);
    match figure.row.better {
        Better::Higher => rivals.max_by(by_median),
        Better::Lower => rivals.min_by(by_median),
    }
}
