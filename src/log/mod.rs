//! Log lines on standard error.
//!
//! An event has its message, which is made for people, and what the message is about in
//! fields: `peer`, `endpoint`, `reason`, `count` and so on (docs/log.md lists them). Lines of
//! text have the message alone, JSON has both.

pub(crate) mod rate_limited;

use std::fmt::{self, Write as _};
use std::io::{self, Write as _};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use tracing::field::Field;
pub use tracing::level_filters::LevelFilter;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::fmt::format::{
    self, FieldFn, FormatEvent, FormatFields, JsonFields, Writer, debug_fn,
};
use tracing_subscriber::fmt::{FmtContext, MakeWriter, SubscriberBuilder};
use tracing_subscriber::registry::LookupSpan;

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
    let has_priority = journald_reads(io::stderr()).unwrap_or(false);
    let builder = tracing_subscriber::fmt()
        .with_max_level(level)
        // It would report a closed standard error there, and panic.
        .log_internal_errors(false)
        .with_writer(io::stderr);
    let event = format::format().with_target(false).with_ansi(false);
    // A second call, as tests make it, changes nothing.
    let _ = match (format, has_priority) {
        (LogFormat::Json, _) => with_json(builder, has_priority).try_init(),
        (LogFormat::Text, false) => builder
            .fmt_fields(message_alone())
            .event_format(event.compact())
            .try_init(),
        // journald has the time and the level itself.
        (LogFormat::Text, true) => builder
            .fmt_fields(message_alone())
            .event_format(Prioritized {
                event: event.compact().without_time().with_level(false),
                has_priority,
            })
            .try_init(),
    };
}

/// Says on standard error why the process ends.
pub fn report_end(error: &dyn fmt::Display) {
    let has_priority = journald_reads(io::stderr()).unwrap_or(false);
    // Not eprintln!, which panics when standard error is closed.
    let _ = writeln!(io::stderr(), "{}", end_line(error, has_priority));
}

/// The last line, without its end. Paths and values of options are part of errors.
fn end_line(error: &dyn fmt::Display, has_priority: bool) -> String {
    let mut line = match has_priority {
        true => format!("<{}>", priority(Level::ERROR)),
        false => String::new(),
    };
    // A string takes all.
    let _ = write!(OneLine(&mut line), "fastvpn: {error}");
    line
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

/// Lines of JSON.
fn with_json<N, E, F, W>(
    builder: SubscriberBuilder<N, E, F, W>,
    has_priority: bool,
) -> SubscriberBuilder<JsonFields, Prioritized<format::Format<format::Json>>, F, W>
where
    N: for<'a> FormatFields<'a> + 'static,
    W: for<'a> MakeWriter<'a> + 'static,
{
    let event = format::format().with_target(false).json();
    builder
        .fmt_fields(JsonFields::new())
        .event_format(Prioritized {
            event: event.flatten_event(true),
            has_priority,
        })
}

/// Lines that begin with their priority if journald reads them, as sd-daemon(3) has it.
///
/// Its other protocol would take the fields, too. But journald finds the unit of what comes by
/// that from the process, and has lost the last words of one that ends at once; standard error
/// it knows from the start. Nor does this take another socket, which a sandbox or a container
/// may not have.
struct Prioritized<F> {
    event: F,
    has_priority: bool,
}

impl<S, N, F> FormatEvent<S, N> for Prioritized<F>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
    F: FormatEvent<S, N>,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        if self.has_priority {
            write!(writer, "<{}>", priority(*event.metadata().level()))?;
        }
        self.event.format_event(context, writer, event)
    }
}

/// The priority of a level (syslog(3)).
fn priority(level: Level) -> u8 {
    match level {
        Level::ERROR => 3,
        Level::WARN => 4,
        Level::INFO => 6,
        _ => 7,
    }
}

type WriteField = fn(&mut Writer<'_>, &Field, &dyn fmt::Debug) -> fmt::Result;

/// Leaves the fields out, which the message tells.
fn message_alone() -> FieldFn<WriteField> {
    debug_fn(|writer, field, value| match field.name() {
        "message" => write!(OneLine(writer), "{value:?}"),
        _ => Ok(()),
    })
}

/// Escapes what would end a line or steer a terminal: some of a message may come from others.
struct OneLine<W>(W);

impl<W: fmt::Write> fmt::Write for OneLine<W> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for part in text.split_inclusive(char::is_control) {
            let mut others = part.chars();
            match others.next_back().filter(|last| last.is_control()) {
                Some(control) => write!(self.0, "{}{}", others.as_str(), control.escape_default())?,
                None => self.0.write_str(part)?,
            }
        }
        Ok(())
    }
}

/// The lines that `work` logs on this thread, without debug messages: each begins with
/// its level.
#[cfg(test)]
pub(crate) fn captured(work: impl FnOnce()) -> Vec<String> {
    let file = tempfile::NamedTempFile::new().unwrap();
    let event = format::format().with_target(false).with_ansi(false);
    let subscriber = tracing_subscriber::fmt()
        .fmt_fields(message_alone())
        .event_format(event.compact().without_time())
        .with_writer(std::sync::Arc::new(file.reopen().unwrap()))
        .finish();
    tracing::subscriber::with_default(subscriber, work);
    let text = std::fs::read_to_string(file.path()).unwrap();
    text.lines().map(|line| line.trim().to_string()).collect()
}

/// The same as objects of `--log-format json`.
#[cfg(test)]
pub(crate) fn captured_json(work: impl FnOnce()) -> Vec<serde_json::Value> {
    let file = tempfile::NamedTempFile::new().unwrap();
    let writer = std::sync::Arc::new(file.reopen().unwrap());
    let builder = tracing_subscriber::fmt().with_writer(writer);
    tracing::subscriber::with_default(with_json(builder, false).finish(), work);
    let text = std::fs::read_to_string(file.path()).unwrap();
    let lines = text.lines();
    lines
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
