//! The configuration file: TOML, a key for each flag of the same name, and a
//! `[[peer]]` table for each peer. `docs/fastvpn.example.toml` shows them all.

use std::fs;
use std::path::Path;

use super::options::Config;
use crate::error::{Error, Result, shortened};

/// Largest file that is read: some 700 000 prefixes. Reading one takes 15 times
/// its size in memory, and one that is made to hurt up to 100 times.
pub(super) const FILE_BYTES_MAX: u64 = 16 << 20;

/// What a configuration file says, and the defaults for the rest.
///
/// # Errors
/// When it cannot be read, or `FILE:LINE:COLUMN: what is wrong`.
pub(super) fn read_file(path: &Path) -> Result<Config> {
    let name = path.display();
    let cannot = |error| Error::os(format!("cannot read --config {name}"), error);
    let metadata = fs::metadata(path).map_err(cannot)?;
    // A pipe would have to be waited for, and could not be read again.
    if !metadata.is_file() || metadata.len() > FILE_BYTES_MAX {
        return Err(Error::new(format!(
            "--config {name} is not a regular file of at most {FILE_BYTES_MAX} bytes"
        )));
    }
    parse_bytes(&name.to_string(), &fs::read(path).map_err(cannot)?)
}

/// What a file with these bytes says. `name`: of the file, for errors.
///
/// # Errors
/// As [`read_file`].
#[doc(hidden)]
pub fn parse_bytes(name: &str, bytes: &[u8]) -> Result<Config> {
    let fault = |at: usize, what: &str| {
        // It may quote a key or a value, line feeds and all.
        let what = what.trim().replace(char::is_control, " ");
        let place = line_and_column(&bytes[..at.min(bytes.len())]);
        Error::new(format!("{name}:{place}: {}", shortened(&what)))
    };
    let text = std::str::from_utf8(bytes);
    let text = text.map_err(|error| fault(error.valid_up_to(), "this is not UTF-8"))?;
    toml::from_str(text).map_err(|error| {
        let at = error.span().map_or(0, |span| span.start);
        fault(at, error.message())
    })
}

/// `LINE:COLUMN` of what follows, both from 1; columns are characters.
fn line_and_column(before: &[u8]) -> String {
    let before = String::from_utf8_lossy(before);
    let line = before.matches('\n').count() + 1;
    let on_line = before.rsplit('\n').next().unwrap_or_default();
    format!("{line}:{}", on_line.chars().count() + 1)
}

#[cfg(test)]
#[path = "file_tests.rs"]
mod tests;
