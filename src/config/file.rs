//! The configuration file: TOML, a key for each flag of the same name, and a
//! `[[peer]]` table for each peer. `docs/fastvpn.example.toml` shows them all.
//!
//! A key's value is read as the flag's would be, by the same reader with the same
//! bounds: [`TunnelArgs`] is where both are defined.

use std::any::TypeId;
use std::collections::HashMap;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use clap::error::{ContextKind, ContextValue};
use clap::{Arg, ArgAction, Args, Command, FromArgMatches};
use toml::Spanned;
use toml::de::{DeArray, DeTable, DeValue};

use super::options::TunnelArgs;
use super::parse::{ParseResult, parse_peer_name, parse_route};
use super::peers;
use super::types::{BusyPoll, PeerSpec};
use crate::error::{Error, Result};

/// Largest file that is read: some 700 000 prefixes. Reading one takes 15 times
/// its size in memory, and one that is made to hurt up to 100 times.
pub(super) const FILE_BYTES_MAX: u64 = 16 << 20;

/// What a file says.
#[derive(Debug, Default)]
pub(super) struct Parsed {
    /// Its settings.
    pub args: TunnelArgs,
    /// It says that there are no peers, rather than nothing of them.
    pub has_no_peers: bool,
    /// `FILE:LINE:COLUMN` of the keys that are there of those in [`CHECKED_LATER`],
    /// in a list that of the first element.
    pub places: HashMap<&'static str, String>,
}

/// Keys whose values are checked only together with the flags, which may override
/// them.
const CHECKED_LATER: [&str; 3] = ["route", "no-routes", "cores"];

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
    let place = |at| format!("{name}:{}", line_and_column(bytes, at));
    let error = |Fault { at, what }| Error::new(format!("{}: {}", place(at), one_line(&what)));
    let text = std::str::from_utf8(bytes)
        .map_err(|fault| error(Fault::new(fault.valid_up_to(), "this is not UTF-8")))?;
    let table = DeTable::parse(text).map_err(|fault| {
        let at = fault.span().map_or(0, |span| span.start);
        error(Fault::new(at, fault.message()))
    })?;
    let table = table.get_ref();
    let (args, has_no_peers) = args_of(table).map_err(error)?;
    let place_of = |key: &'static str| {
        let value = table.get(key)?;
        let value = value.get_ref().get(0).unwrap_or(value);
        Some((key, place(value.span().start)))
    };
    Ok(Parsed {
        args,
        has_no_peers,
        places: CHECKED_LATER.into_iter().filter_map(place_of).collect(),
    })
}

/// What is wrong, and the byte of the file where it begins.
struct Fault {
    at: usize,
    what: String,
}

impl Fault {
    fn new(at: usize, what: impl Into<String>) -> Self {
        let what = what.into();
        Self { at, what }
    }

    /// A value of another type than is wanted.
    fn of_type(value: &Value<'_>, expected: &str) -> Self {
        let (at, found) = (value.span().start, value.get_ref());
        let what = format!("expected {expected}, not {}", found.type_str());
        match found.as_str() {
            Some(text) => Self::of_value(at, text, &what),
            None => Self::new(at, what),
        }
    }

    /// A value that its reader does not take.
    fn of_value(at: usize, value: &str, why: &str) -> Self {
        /// Characters of a value that are shown.
        const SHOWN_MAX: usize = 80;
        let shown: String = value.chars().take(SHOWN_MAX).collect();
        let more = if shown.len() < value.len() { "…" } else { "" };
        Self::new(at, format!("{shown:?}{more}: {why}"))
    }
}

type Value<'i> = Spanned<DeValue<'i>>;
type Checked<T> = std::result::Result<T, Fault>;

/// A word of a command line, and where in the file it comes from.
type Word = (usize, String);

/// The settings in a table, and whether it says that there are no peers.
fn args_of(table: &DeTable<'_>) -> Checked<(TunnelArgs, bool)> {
    let command = Command::new("file").no_binary_name(true);
    let mut command = TunnelArgs::augment_args(command.disable_help_flag(true));
    let mut words = Vec::new();
    let mut peers = None;
    for (key, value) in table.iter() {
        let name = key.get_ref().as_ref();
        if name == "peer" {
            peers = Some(peers_of(value)?);
            continue;
        }
        let is_key = |arg: &&Arg| arg.get_long() == Some(name) && name != "config";
        let Some(arg) = command.get_arguments().find(is_key) else {
            let keys = command.get_arguments().filter_map(Arg::get_long);
            let keys: Vec<_> = keys.filter(|key| *key != "config").collect();
            let what = format!("unknown key {name:?}, expected one of {}", keys.join(", "));
            return Err(Fault::new(key.span().start, what));
        };
        match arg.get_action() {
            ArgAction::Append => {
                for item in array(value)? {
                    words_of(arg, item, &mut words)?;
                }
            }
            _ => words_of(arg, value, &mut words)?,
        }
    }
    let place_of = |flag: &str| words.iter().find(|(_, word)| word == flag);
    if let (Some(_), Some((at, _))) = (place_of("--quiet"), place_of("--verbose")) {
        return Err(Fault::new(*at, "verbose contradicts quiet"));
    }
    let matches = command.try_get_matches_from_mut(words.iter().map(|(_, word)| word));
    let matches = matches.map_err(|error| fault_in(&words, &mut command, &error))?;
    let mut args =
        TunnelArgs::from_arg_matches(&matches).map_err(|error| Fault::new(0, error.to_string()))?;
    let has_no_peers = peers.as_ref().is_some_and(Vec::is_empty);
    args.peer = peers.unwrap_or_default();
    Ok((args, has_no_peers))
}

fn array<'v, 'i>(value: &'v Value<'i>) -> Checked<&'v DeArray<'i>> {
    let array = value.get_ref().as_array();
    array.ok_or_else(|| Fault::of_type(value, "an array"))
}

/// Adds a value in the words of its flag.
fn words_of(arg: &Arg, value: &Value<'_>, words: &mut Vec<Word>) -> Checked<()> {
    let kind = arg.get_value_parser().type_id();
    let is_one_of = |types: &[TypeId]| types.iter().any(|of_value| kind == *of_value);
    let numbers = [TypeId::of::<u8>(), TypeId::of::<u16>(), TypeId::of::<u32>()];
    let (takes_number, takes_bool) = (is_one_of(&numbers), kind == TypeId::of::<bool>());
    let takes_both = kind == TypeId::of::<BusyPoll>();
    let text = match value.get_ref() {
        DeValue::Boolean(is) if takes_bool => is.to_string(),
        DeValue::Integer(number) if takes_number || takes_both => {
            let decimal = i64::from_str_radix(number.as_str(), number.radix());
            decimal.map_or_else(|_| number.to_string(), |number| number.to_string())
        }
        DeValue::String(text) if !takes_bool && !takes_number => text.to_string(),
        _ if takes_bool => return Err(Fault::of_type(value, "a boolean")),
        _ if takes_number => return Err(Fault::of_type(value, "an integer")),
        _ if takes_both => return Err(Fault::of_type(value, "a string or an integer")),
        _ => return Err(Fault::of_type(value, "a string")),
    };
    let at = value.span().start;
    let flag = format!("--{}", arg.get_long().unwrap_or_default());
    match arg.get_action() {
        ArgAction::Count => {
            let times = text.parse::<u8>();
            let times = times.map_err(|_| Fault::of_value(at, &text, "not in 0..=255"))?;
            words.extend((0..times).map(|_| (at, flag.clone())));
        }
        ArgAction::SetTrue => words.extend((text == "true").then_some((at, flag))),
        _ => words.push((at, format!("{flag}={text}"))),
    }
    Ok(())
}

/// The first word that is not taken by itself; `error` is of all together.
fn fault_in(words: &[Word], command: &mut Command, error: &clap::Error) -> Fault {
    let fault = words.iter().find_map(|(at, word)| {
        let error = command.try_get_matches_from_mut([word]).err()?;
        let (_, value) = word.split_once('=').unwrap_or_default();
        Some(Fault::of_value(*at, value, &reason(&error)))
    });
    fault.unwrap_or_else(|| Fault::new(0, reason(error)))
}

/// Why a flag's value is refused, without the flag.
fn reason(error: &clap::Error) -> String {
    if let Some(source) = std::error::Error::source(error) {
        return source.to_string();
    }
    match error.get(ContextKind::ValidValue) {
        Some(ContextValue::Strings(values)) => format!("expected {}", values.join(", ")),
        _ => {
            let text = error.to_string();
            let line = text.lines().next().unwrap_or_default();
            line.trim_start_matches("error: ").into()
        }
    }
}

/// The peers, each by itself and all of them together.
fn peers_of(value: &Value<'_>) -> Checked<Vec<PeerSpec>> {
    let mut peers = Vec::new();
    let mut places = Vec::new();
    for table in array(value)? {
        let keys = table.get_ref().as_table();
        let keys = keys.ok_or_else(|| Fault::of_type(table, "a table"))?;
        let mut name = None;
        let (mut prefixes, mut prefix_places) = (Vec::new(), Vec::new());
        for (key, value) in keys.iter() {
            match key.get_ref().as_ref() {
                "endpoint" => name = Some((read_text(value, parse_peer_name)?, value)),
                "prefixes" => {
                    for prefix in array(value)? {
                        prefixes.push(read_text(prefix, parse_route)?);
                        prefix_places.push(prefix.span().start);
                    }
                }
                other => {
                    let what = format!("unknown key {other:?}, expected endpoint or prefixes");
                    return Err(Fault::new(key.span().start, what));
                }
            }
        }
        let Some((name, value)) = name else {
            let what = "the peer's endpoint is missing";
            return Err(Fault::new(table.span().start, what));
        };
        peers.push(PeerSpec { name, prefixes });
        places.push((value.span().start, prefix_places));
    }
    let Some(fault) = peers::find_fault(&peers) else {
        return Ok(peers);
    };
    let at = places.get(fault.peer).map_or(0, |(name, prefixes)| {
        let prefix = fault.prefix.and_then(|index| prefixes.get(index));
        *prefix.unwrap_or(name)
    });
    Err(Fault::new(at, fault.error.to_string()))
}

fn read_text<T>(value: &Value<'_>, read: impl FnOnce(&str) -> ParseResult<T>) -> Checked<T> {
    let text = value.get_ref().as_str();
    let text = text.ok_or_else(|| Fault::of_type(value, "a string"))?;
    read(text).map_err(|why| Fault::of_value(value.span().start, text, &why))
}

/// `LINE:COLUMN`, both from 1; columns are characters.
fn line_and_column(bytes: &[u8], offset: usize) -> String {
    let before = String::from_utf8_lossy(&bytes[..offset.min(bytes.len())]);
    let line = before.matches('\n').count() + 1;
    let on_line = before.rsplit('\n').next().unwrap_or_default();
    format!("{line}:{}", on_line.chars().count() + 1)
}

/// Messages may quote the file, control characters and all.
fn one_line(message: &str) -> String {
    let mut line = String::new();
    for c in message.trim().chars() {
        match c.is_control() {
            true => line.extend(c.escape_default()),
            false => line.push(c),
        }
    }
    line
}

#[cfg(test)]
#[path = "file_tests.rs"]
mod tests;
