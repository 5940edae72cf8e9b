//! Log lines on standard error.

pub(crate) mod rate_limited;

use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};
pub use tracing::level_filters::LevelFilter;

/// Form of the log lines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// Lines for people.
    #[default]
    Text,
    /// One JSON object per line.
    Json,
}

/// Sends log lines of these levels to standard error.
pub fn init(level: LevelFilter, format: LogFormat) {
    let builder = tracing_subscriber::fmt()
        .with_max_level(level)
        .with_target(false)
        // It would report a closed standard error there, and panic.
        .log_internal_errors(false)
        .with_writer(std::io::stderr);
    // A second call, as tests make it, changes nothing.
    let _ = match format {
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
        LogFormat::Text => {
            let text = builder.compact().with_ansi(false);
            match journald_reads(io::stderr()).unwrap_or(false) {
                true => text.without_time().try_init(),
                false => text.try_init(),
            }
        }
    };
}

/// Whether what is written to `stream` goes to journald, which adds the time
/// itself: systemd then names the stream's device and inode in the environment
/// (systemd.exec(5)).
fn journald_reads(stream: impl AsFd) -> io::Result<bool> {
    let named = std::env::var("JOURNAL_STREAM").unwrap_or_default();
    let file = std::fs::File::from(stream.as_fd().try_clone_to_owned()?);
    let metadata = file.metadata()?;
    Ok(named == format!("{}:{}", metadata.dev(), metadata.ino()))
}

/// The lines that `work` logs on this thread, without debug messages: each begins with
/// its level.
#[cfg(test)]
pub(crate) fn captured(work: impl FnOnce()) -> Vec<String> {
    let file = tempfile::NamedTempFile::new().unwrap();
    let subscriber = tracing_subscriber::fmt()
        .compact()
        .with_ansi(false)
        .with_target(false)
        .without_time()
        .with_writer(std::sync::Arc::new(file.reopen().unwrap()))
        .finish();
    tracing::subscriber::with_default(subscriber, work);
    let text = std::fs::read_to_string(file.path()).unwrap();
    text.lines().map(|line| line.trim().to_string()).collect()
}
