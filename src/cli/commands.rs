//! Commands for a running tunnel: one request over its control socket
//! ([`crate::control::protocol`]), one answer, shown as a table or as it came.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::de::DeserializeOwned;

use super::render;
use crate::cli::client::{ClientCommand, PeerCommand, RouteCommand};
use crate::config::{default_control_path, default_control_paths};
use crate::control::client::{Connection, Verdict, parse};
use crate::control::protocol::{Request, Status};
use crate::control::text::printable_json;
use crate::error::{Error, Result};
use crate::testbed::demo::{self, DemoOptions};

/// How long the client waits.
#[derive(Clone, Copy, Debug)]
struct Patience {
    /// For the socket to take a request, for the answer to begin, and then for
    /// its end.
    answer: Duration,
    /// For a process that was told to stop to end.
    end: Duration,
}

impl Patience {
    const DEFAULT: Self = Self {
        answer: Duration::from_secs(30),
        end: Duration::from_secs(10),
    };
}

/// Carries out one command. What came of it goes to standard output.
///
/// # Errors
/// When no tunnel answers, when it refuses, or when it does not answer as it
/// should. Not when standard output is closed.
pub fn run(command: &ClientCommand) -> Result<()> {
    let target = command.target();
    let mut path = target.socket();
    let mut out = io::BufWriter::new(io::stdout().lock());
    if matches!(command, ClientCommand::Status { .. }) && target.is_any() {
        let paths = default_control_paths().into_iter();
        let mut found = running(paths, default_control_path, Patience::DEFAULT.answer)?;
        match found.len() {
            0 => {}
            1 => path = found.remove(0).path,
            _ => return show_all(&found, target.json, &mut out),
        }
    }
    perform(command, &path, &mut out, Patience::DEFAULT)
}

/// Plays the demo and shows what it has measured.
///
/// # Errors
/// As [`demo::run`].
pub fn demo(options: &DemoOptions) -> Result<()> {
    let text = render::measured(&demo::run(options)?);
    show(&mut io::stdout(), |out| out.write_all(text.as_bytes()))
}

/// A tunnel that runs.
struct Running {
    path: PathBuf,
    /// Its answer to `status`, as it came and read.
    line: String,
    status: Status,
}

/// The tunnels that answer at `paths` where `default_path` says that one of their
/// name does: others are those of other network namespaces.
fn running(
    paths: impl Iterator<Item = PathBuf>,
    default_path: impl Fn(&str) -> PathBuf,
    patience: Duration,
) -> Result<Vec<Running>> {
    let mut found = Vec::new();
    for path in paths {
        // A killed process leaves its socket behind.
        let answer =
            Connection::open(&path, patience).and_then(|mut it| it.ask(&Request::Status {}));
        let Ok(line) = answer else {
            continue;
        };
        let Ok(status) = parse::<Status>(&line, &path) else {
            continue;
        };
        if default_path(&status.tun) == path {
            found.push(Running { path, line, status });
        }
    }
    Ok(found)
}

/// A line for each of several tunnels.
fn show_all(found: &[Running], json: bool, out: &mut impl Write) -> Result<()> {
    let text = match json {
        true => found
            .iter()
            .map(|tunnel| printable_json(&tunnel.line).into_owned() + "\n")
            .collect(),
        false => render::tunnels(found.iter().map(|tunnel| &tunnel.status)),
    };
    show(out, |out| out.write_all(text.as_bytes()))
}

/// [`run`] on any socket, with any output.
fn perform(
    command: &ClientCommand,
    path: &Path,
    out: &mut impl Write,
    patience: Patience,
) -> Result<()> {
    let mut connection = Connection::open(path, patience.answer)?;
    let line = connection.ask(&request(command))?;
    show_answer(command, path, &line, out, || {
        connection.wait_for_end(patience.end)
    })
}

/// Shows a command's answer. `wait_for_end`: when it is that the tunnel ends.
///
/// # Errors
/// When the answer is a refusal, or none to this command.
#[doc(hidden)]
pub fn show_answer(
    command: &ClientCommand,
    path: &Path,
    line: &str,
    out: &mut impl Write,
    wait_for_end: impl FnOnce() -> Result<()>,
) -> Result<()> {
    let verdict: Verdict = parse(line, path)?;
    if command.target().json {
        show(out, |out| writeln!(out, "{}", printable_json(line)))?;
    }
    verdict.check()?;
    if let ClientCommand::Stop { .. } = command {
        wait_for_end()?;
    }
    if command.target().json {
        return Ok(());
    }
    match command {
        ClientCommand::Status { .. } => render_as(line, path, out, render::status),
        ClientCommand::Peers { .. } => render_as(line, path, out, render::peers),
        ClientCommand::Route(RouteCommand::List { .. }) => {
            render_as(line, path, out, render::routes)
        }
        ClientCommand::Route(RouteCommand::Get { .. }) => render_as(line, path, out, render::found),
        ClientCommand::Route(_) | ClientCommand::Peer(_) => {
            render_as(line, path, out, render::changed)
        }
        ClientCommand::Reload { .. } => render_as(line, path, out, render::reloaded),
        ClientCommand::Stop { .. } => show(out, |out| writeln!(out, "stopped")),
    }
}

fn request(command: &ClientCommand) -> Request {
    match command.clone() {
        ClientCommand::Status { .. } => Request::Status {},
        ClientCommand::Peers { .. } => Request::Peers {},
        ClientCommand::Reload { .. } => Request::Reload {},
        ClientCommand::Stop { .. } => Request::Stop {},
        ClientCommand::Route(RouteCommand::List { .. }) => Request::RouteList {},
        ClientCommand::Route(RouteCommand::Get { address, .. }) => Request::RouteGet { address },
        ClientCommand::Route(RouteCommand::Add {
            prefixes,
            peer,
            replace,
            ..
        }) => Request::RouteAdd {
            peer: peer.to_string(),
            prefixes,
            replace,
        },
        ClientCommand::Route(RouteCommand::Del { prefixes, .. }) => Request::RouteDel { prefixes },
        ClientCommand::Peer(PeerCommand::Add { peer, .. }) => Request::PeerAdd {
            peer: peer.name.to_string(),
            prefixes: peer.prefixes,
        },
        ClientCommand::Peer(PeerCommand::Del { peer, .. }) => Request::PeerDel {
            peer: peer.to_string(),
        },
    }
}

fn render_as<T: DeserializeOwned>(
    line: &str,
    path: &Path,
    out: &mut impl Write,
    render: impl FnOnce(&T) -> String,
) -> Result<()> {
    let text = render(&parse(line, path)?);
    show(out, |out| out.write_all(text.as_bytes()))
}

/// Writes and flushes. A reader that has seen enough, such as `head`, is none
/// of our errors.
fn show<W: Write>(out: &mut W, write: impl FnOnce(&mut W) -> io::Result<()>) -> Result<()> {
    match write(out).and_then(|()| out.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(Error::os("cannot write to standard output", error))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
#[path = "commands_tests.rs"]
mod tests;
