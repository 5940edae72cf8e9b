//! The results as one HTML file: charts, and every figure below them.
//!
//! Nothing in it is fetched from anywhere: style and charts are inline, and it
//! runs no script.
//!
//! - [`figures`]: the samples as they are drawn, without what is not a number.
//! - [`findings`]: what a reader in a hurry wants to know.
//! - [`palette`]: a colour for each target, by day and by night.
//! - [`chart`]: one figure as a picture.
//! - [`page`]: all of it in order.

mod chart;
mod figures;
mod findings;
mod page;
mod palette;

use std::fs;
use std::path::Path;

use fastvpn::error::{Error, Result};

use crate::results::Results;

/// Writes the report of a run to `path`, and makes the directories it is in.
///
/// # Errors
/// When a chart cannot be drawn or the file cannot be written.
pub fn write_html(results: &Results, path: &Path) -> Result<()> {
    write(path, &page::render(results)?)
}

/// Writes the chart of the first figure to `path`, as a picture by itself.
///
/// # Errors
/// As [`write_html`], and when nothing was measured.
pub fn write_svg(results: &Results, path: &Path) -> Result<()> {
    write(path, &page::render_picture(results)?)
}

fn write(path: &Path, text: &str) -> Result<()> {
    let failed = |cause| Error::os(format!("cannot write {}", path.display()), cause);
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory).map_err(failed)?;
    }
    fs::write(path, text).map_err(failed)
}

#[cfg(test)]
mod tests;
