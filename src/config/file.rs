//! The configuration file: TOML, a key for each flag of the same name, and a
//! `[[peer]]` table for each peer. `docs/fastvpn.example.toml` shows them all.

use std::fmt;
use std::io::Read;
use std::marker::PhantomData;
use std::ops::Range;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ipnet::IpNet;
use serde::de::{self, Deserialize, Deserializer, Visitor};
use toml::Spanned;

use super::peers;
use crate::config::parse::{
    BUSY_POLL_US_MAX, ParseResult, parse_address, parse_busy_poll, parse_choice, parse_cores,
    parse_listen, parse_peer_name, parse_route, parse_tun_name,
};
use crate::config::{
    CoreList, Feature, Io, Listen, LogFormat, MTU_BYTES_MAX, MTU_BYTES_MIN, PeerName, PeerSpec,
    QUEUES_MAX, TXQUEUELEN_MAX, TunnelArgs,
};
use crate::dataplane::idle::BusyPoll;
use crate::error::{Error, Result};

/// Largest file that is read: some 700 000 prefixes. Reading one takes 15 times
/// its size in memory, and one that is made to hurt up to 100 times.
pub const FILE_BYTES_MAX: u64 = 16 << 20;

/// What a file says.
#[derive(Debug, Default)]
pub(super) struct Parsed {
    /// Its settings.
    pub args: TunnelArgs,
    /// Where some of them are.
    pub places: Places,
    /// It says that there are no peers, rather than nothing of them.
    pub has_no_peers: bool,
}

/// `FILE:LINE:COLUMN` of the settings that are checked only together with the
/// flags, which may override them; `None` of those that are not there.
#[derive(Debug, Default)]
pub(super) struct Places {
    /// The first of the routes.
    pub route: Option<String>,
    pub no_routes: Option<String>,
    pub cores: Option<String>,
}

/// Reads a configuration file.
///
/// # Errors
/// When it cannot be read, or `FILE:LINE:COLUMN: what is wrong`.
pub(super) fn parse_file(path: &Path) -> Result<Parsed> {
    parse(&path.display().to_string(), &read(path)?)
}

/// A pipe, which could not be read again, is refused rather than waited for.
fn read(path: &Path) -> Result<Vec<u8>> {
    let name = path.display();
    let cannot = |error| Error::os(format!("cannot read --config {name}"), error);
    let file = std::fs::OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open(path)
        .map_err(cannot)?;
    if !file.metadata().map_err(cannot)?.is_file() {
        return Err(Error::new(format!("--config {name} is no regular file")));
    }
    let mut bytes = Vec::new();
    file.take(FILE_BYTES_MAX + 1)
        .read_to_end(&mut bytes)
        .map_err(cannot)?;
    if bytes.len() as u64 > FILE_BYTES_MAX {
        return Err(Error::new(format!(
            "--config {name} has more than {FILE_BYTES_MAX} bytes"
        )));
    }
    Ok(bytes)
}

/// What a file with these bytes says; for fuzzing.
#[doc(hidden)]
pub fn parse_bytes(name: &str, bytes: &[u8]) -> Result<TunnelArgs> {
    parse(name, bytes).map(|parsed| parsed.args)
}

/// `name`: of the file, for errors.
fn parse(name: &str, bytes: &[u8]) -> Result<Parsed> {
    let at = |offset: usize| format!("{name}:{}", Place::of(bytes, offset));
    let text = std::str::from_utf8(bytes).map_err(|error| {
        let place = at(error.valid_up_to());
        Error::new(format!("{place}: this is not UTF-8"))
    })?;
    let file: File = toml::from_str(text).map_err(|error| {
        let place = at(error.span().map_or(0, |span| span.start));
        Error::new(format!("{place}: {}", one_line(error.message())))
    })?;
    if let (true, Some(verbose)) = (file.quiet, &file.verbose)
        && verbose.get_ref().0 > 0
    {
        let place = at(verbose.span().start);
        return Err(Error::new(format!("{place}: verbose contradicts quiet")));
    }
    let places = Places {
        route: file.route.first().map(|route| at(route.span().start)),
        no_routes: file.no_routes.as_ref().map(|key| at(key.span().start)),
        cores: file.cores.as_ref().map(|cores| at(cores.span().start)),
    };
    let peers = file.peer.as_deref();
    let has_no_peers = peers.is_some_and(<[_]>::is_empty);
    let spans = PeerSpans::of(peers.unwrap_or_default());
    let args = TunnelArgs::from(file);
    if let Some(fault) = peers::find_fault(&args.peer) {
        let place = at(spans.of_fault(&fault).start);
        return Err(Error::new(format!("{place}: {}", fault.error)));
    }
    Ok(Parsed {
        args,
        places,
        has_no_peers,
    })
}

/// A line and a column, both from 1; columns are characters.
struct Place {
    line: usize,
    column: usize,
}

impl Place {
    fn of(bytes: &[u8], offset: usize) -> Self {
        let before = &bytes[..offset.min(bytes.len())];
        let line_start = before
            .iter()
            .rposition(|&byte| byte == b'\n')
            .map_or(0, |newline| newline + 1);
        let on_line = String::from_utf8_lossy(&before[line_start..]);
        Self {
            line: before.iter().filter(|&&byte| byte == b'\n').count() + 1,
            column: on_line.chars().count() + 1,
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.line, self.column)
    }
}

/// Messages may quote the file, control characters and all.
fn one_line(message: &str) -> String {
    let escape = |c: char| -> Box<dyn Iterator<Item = char>> {
        if c.is_control() {
            Box::new(c.escape_default())
        } else {
            Box::new(std::iter::once(c))
        }
    };
    message.trim().chars().flat_map(escape).collect()
}

/// The keys.
#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct File {
    queues: Option<Number<1, { QUEUES_MAX as u64 }>>,
    listen: Option<Text<Listen>>,
    tun: Option<Text<TunName>>,
    mtu: Option<Number<{ MTU_BYTES_MIN as u64 }, { MTU_BYTES_MAX as u64 }>>,
    #[serde(default)]
    address: Vec<Text<Address>>,
    #[serde(default)]
    route: Vec<Spanned<Text<Prefix>>>,
    no_routes: Option<Spanned<bool>>,
    hop: Option<bool>,
    cores: Option<Spanned<Text<CoreList>>>,
    busy_poll: Option<BusyPollKey>,
    txqueuelen: Option<Number<1, { TXQUEUELEN_MAX as u64 }>>,
    io: Option<Text<Io>>,
    #[serde(default)]
    without: Vec<Text<Feature>>,
    control: Option<PathBuf>,
    takeover: Option<bool>,
    verbose: Option<Spanned<Number<0, { u8::MAX as u64 }>>>,
    #[serde(default)]
    quiet: bool,
    log_format: Option<Text<LogFormat>>,
    peer: Option<Vec<PeerTable>>,
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct PeerTable {
    endpoint: Spanned<Text<PeerName>>,
    #[serde(default)]
    prefixes: Vec<Spanned<Text<Prefix>>>,
}

impl From<File> for TunnelArgs {
    fn from(file: File) -> Self {
        // Their ranges fit.
        let number = |value: u64| u32::try_from(value).unwrap_or(u32::MAX);
        let prefixes = |spanned: Vec<Spanned<Text<Prefix>>>| {
            let prefixes = spanned.into_iter().map(|prefix| prefix.into_inner().0.0);
            prefixes.collect()
        };
        let peer = |table: PeerTable| PeerSpec {
            name: table.endpoint.into_inner().0,
            prefixes: prefixes(table.prefixes),
        };
        Self {
            config: None,
            queues: file.queues.map(|n| u16::try_from(n.0).unwrap_or(u16::MAX)),
            peer: file.peer.into_iter().flatten().map(peer).collect(),
            listen: file.listen.map(|text| text.0),
            tun: file.tun.map(|text| text.0.0),
            mtu: file.mtu.map(|n| number(n.0)),
            address: file.address.into_iter().map(|text| text.0.0).collect(),
            route: prefixes(file.route),
            no_routes: file.no_routes.map(Spanned::into_inner),
            hop: file.hop,
            cores: file.cores.map(|text| text.into_inner().0),
            busy_poll: file.busy_poll.map(|key| key.0),
            txqueuelen: file.txqueuelen.map(|n| number(n.0)),
            io: file.io.map(|text| text.0),
            without: file.without.into_iter().map(|text| text.0).collect(),
            control: file.control,
            takeover: file.takeover,
            verbose: file
                .verbose
                .map_or(0, |n| u8::try_from(n.into_inner().0).unwrap_or(u8::MAX)),
            quiet: file.quiet,
            log_format: file.log_format.map(|text| text.0),
        }
    }
}

/// Where the peers are in the file.
struct PeerSpans(Vec<(Range<usize>, Vec<Range<usize>>)>);

impl PeerSpans {
    fn of(peers: &[PeerTable]) -> Self {
        let of_peer = |peer: &PeerTable| {
            let prefixes = peer.prefixes.iter().map(Spanned::span).collect();
            (peer.endpoint.span(), prefixes)
        };
        Self(peers.iter().map(of_peer).collect())
    }

    fn of_fault(&self, fault: &peers::Fault) -> Range<usize> {
        let Some((endpoint, prefixes)) = self.0.get(fault.peer) else {
            return 0..0;
        };
        let prefix = fault.prefix.and_then(|index| prefixes.get(index));
        prefix.unwrap_or(endpoint).clone()
    }
}

/// What is written as a string and read as a flag's value is. The error comes
/// while the string is being visited, so it has the string's place.
struct Text<T>(T);

trait FromText: Sized {
    /// What it is, for who has written something other than a string.
    const EXPECTED: &'static str;

    fn from_text(text: &str) -> ParseResult<Self>;
}

impl<'de, T: FromText> Deserialize<'de> for Text<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct TextVisitor<T>(PhantomData<T>);

        impl<T: FromText> Visitor<'_> for TextVisitor<T> {
            type Value = Text<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(T::EXPECTED)
            }

            fn visit_str<E: de::Error>(self, text: &str) -> std::result::Result<Self::Value, E> {
                let value = T::from_text(text);
                value.map(Text).map_err(|error| refused(text, &error))
            }
        }

        deserializer.deserialize_str(TextVisitor(PhantomData))
    }
}

fn refused<E: de::Error>(text: &str, error: &str) -> E {
    /// Characters of a value that are shown.
    const SHOWN_MAX: usize = 80;
    let shown: String = text.chars().take(SHOWN_MAX).collect();
    let more = if shown.len() < text.len() { "…" } else { "" };
    E::custom(format_args!("{shown:?}{more}: {error}"))
}

struct TunName(String);
struct Address(IpNet);
struct Prefix(IpNet);

macro_rules! from_text {
    ($($type:ty: $expected:literal, $parse:expr;)*) => {$(
        impl FromText for $type {
            const EXPECTED: &'static str = $expected;

            fn from_text(text: &str) -> ParseResult<Self> {
                $parse(text)
            }
        }
    )*};
}

from_text! {
    Listen: "a string \"ADDR[:PORT]\"", parse_listen;
    PeerName: "a string \"HOST[:PORT]\"", parse_peer_name;
    TunName: "a string with an interface name", |text| parse_tun_name(text).map(Self);
    Address: "a string \"ADDRESS/LENGTH\"", |text| parse_address(text).map(Self);
    Prefix: "a string \"ADDRESS/LENGTH\"", |text| parse_route(text).map(Self);
    CoreList: "a string with core numbers, as in \"0,2-3\"", parse_cores;
    Io: "a string with an engine", parse_choice;
    Feature: "a string with a kernel feature", parse_choice;
    LogFormat: "a string with a form of log lines", parse_choice;
}

/// An integer in a range.
struct Number<const MIN: u64, const MAX: u64>(u64);

impl<'de, const MIN: u64, const MAX: u64> Deserialize<'de> for Number<MIN, MAX> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct NumberVisitor<const MIN: u64, const MAX: u64>;

        impl<const MIN: u64, const MAX: u64> Visitor<'_> for NumberVisitor<MIN, MAX> {
            type Value = Number<MIN, MAX>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "an integer from {MIN} to {MAX}")
            }

            fn visit_i64<E: de::Error>(self, value: i64) -> std::result::Result<Self::Value, E> {
                match u64::try_from(value) {
                    Ok(number) if (MIN..=MAX).contains(&number) => Ok(Number(number)),
                    _ => Err(E::invalid_value(de::Unexpected::Signed(value), &self)),
                }
            }
        }

        deserializer.deserialize_i64(NumberVisitor)
    }
}

/// A string as the flag takes it, or a number of microseconds.
struct BusyPollKey(BusyPoll);

impl<'de> Deserialize<'de> for BusyPollKey {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct BusyPollVisitor;

        impl Visitor<'_> for BusyPollVisitor {
            type Value = BusyPollKey;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(
                    f,
                    "\"off\", \"auto\", or 0 to {BUSY_POLL_US_MAX} microseconds"
                )
            }

            fn visit_str<E: de::Error>(self, text: &str) -> std::result::Result<Self::Value, E> {
                let value = parse_busy_poll(text);
                value
                    .map(BusyPollKey)
                    .map_err(|error| refused(text, &error))
            }

            fn visit_i64<E: de::Error>(self, value: i64) -> std::result::Result<Self::Value, E> {
                match u64::try_from(value) {
                    Ok(0) => Ok(BusyPollKey(BusyPoll::Off)),
                    Ok(us @ 1..=BUSY_POLL_US_MAX) => {
                        Ok(BusyPollKey(BusyPoll::For(Duration::from_micros(us))))
                    }
                    _ => Err(E::invalid_value(de::Unexpected::Signed(value), &self)),
                }
            }
        }

        deserializer.deserialize_any(BusyPollVisitor)
    }
}

#[cfg(test)]
#[path = "file_tests.rs"]
mod tests;
