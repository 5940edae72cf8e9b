//! Log lines on standard error.

use tracing::level_filters::LevelFilter;

use crate::cli::LogFormat;

/// Sends log lines to standard error. `verbose` counts `-v` flags.
pub fn init(verbose: u8, quiet: bool, format: LogFormat) {
    let level = match (quiet, verbose) {
        (true, _) => LevelFilter::WARN,
        (false, 0) => LevelFilter::INFO,
        (false, 1) => LevelFilter::DEBUG,
        (false, _) => LevelFilter::TRACE,
    };
    let builder = tracing_subscriber::fmt()
        .with_max_level(level)
        .with_target(false)
        // It would report a closed standard error there, and panic.
        .log_internal_errors(false)
        .with_writer(std::io::stderr);
    // A second call, as tests make it, changes nothing.
    let _ = match format {
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
        LogFormat::Text => builder.without_time().compact().with_ansi(false).try_init(),
    };
}
