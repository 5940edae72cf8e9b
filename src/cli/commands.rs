//! Commands for a running tunnel: one request over its control socket
//! ([`crate::control::protocol`]), one answer, shown as a table or as it came.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::client::{ClientCommand, RouteCommand, Target};
use super::{render, watch};
use crate::config::{TUN_NAME_DEFAULT, default_control_path, default_control_paths};
use crate::control::client::{self, Connection, Verdict, parse};
use crate::control::protocol::{Request, Status, Upgrading};
use crate::control::text::{printable, printable_json};
use crate::error::{Error, Result};
use crate::testbed::demo::{self, DemoOptions};

/// How long a tunnel may take to answer, and one that was told to stop to end.
const PATIENCE: Duration = Duration::from_secs(30);

/// How long a new process may take to take over: more than the old one waits for it.
const UPGRADE_TIME_MAX: Duration = Duration::from_secs(70);
const UPGRADE_PAUSE: Duration = Duration::from_millis(20);

/// Carries out one command. What came of it goes to standard output.
///
/// # Errors
/// When no tunnel answers, when it refuses, or when it does not answer as it
/// should. Not when standard output is closed.
pub fn run(command: &ClientCommand) -> Result<()> {
    let mut path = command.target().socket();
    let mut out = io::BufWriter::new(io::stdout().lock());
    if let ClientCommand::Status {
        target:
            Target {
                json,
                tun: None,
                control: None,
            },
        watch_seconds,
    } = command
    {
        let mut found = running();
        if found.len() > 1 {
            return match watch_seconds {
                None => show_all(&found, *json, &mut out),
                Some(_) => Err(several(&found).hint("--tun names one")),
            };
        }
        if let Some(only) = found.pop() {
            path = only.path;
        }
    }
    if let ClientCommand::Status {
        target,
        watch_seconds: Some(seconds),
    } = command
    {
        let every = Duration::from_secs((*seconds).into());
        return watch::run(&path, every, target.json, &mut out);
    }
    perform(command, &path, &mut out, PATIENCE)
}

/// Plays the demo and shows what it has measured.
///
/// # Errors
/// As [`demo::run`].
pub fn demo(options: &DemoOptions) -> Result<()> {
    show(&mut io::stdout(), &render::measured(&demo::run(options)?))
}

/// A tunnel that runs.
struct Running {
    path: PathBuf,
    /// Its answer to `status`, as it came and read.
    line: String,
    status: Status,
}

/// The tunnels that answer where [`default_control_path`] says that one of their
/// name does: others are those of other network namespaces.
fn running() -> Vec<Running> {
    let status = |path: PathBuf| {
        // A killed process leaves its socket behind.
        let mut connection = Connection::open(&path, PATIENCE).ok()?;
        let line = connection.ask(&Request::Status {}).ok()?;
        let status: Status = parse(&line, &path).ok()?;
        let is_here = default_control_path(&status.tun) == path;
        is_here.then_some(Running { path, line, status })
    };
    default_control_paths()
        .into_iter()
        .filter_map(status)
        .collect()
}

/// Of several tunnels, somebody has to choose.
fn several(found: &[Running]) -> Error {
    let names = found.iter().map(|tunnel| printable(&tunnel.status.tun));
    let names = names.collect::<Vec<_>>().join(", ");
    Error::new(format!("several tunnels run here: {names}"))
}

/// The socket of the tunnel that runs here, if it is the only one; the default name's, if
/// none does.
///
/// # Errors
/// When there are several.
pub(super) fn only_tunnel() -> Result<PathBuf> {
    let found = running();
    match &found[..] {
        [] => Ok(default_control_path(TUN_NAME_DEFAULT)),
        [only] => Ok(only.path.clone()),
        _ => Err(several(&found).hint("name one: `fastvpn top NAME`")),
    }
}

/// A line for each of several tunnels.
fn show_all(found: &[Running], json: bool, out: &mut impl Write) -> Result<()> {
    let lines = found.iter();
    let text = match json {
        true => lines
            .map(|tunnel| printable_json(&tunnel.line) + "\n")
            .collect(),
        false => render::tunnels(lines.map(|tunnel| &tunnel.status)),
    };
    show(out, &text)
}

/// [`run`] on any socket, with any output.
fn perform(
    command: &ClientCommand,
    path: &Path,
    out: &mut impl Write,
    patience: Duration,
) -> Result<()> {
    let mut connection = Connection::open(path, patience)?;
    let line = connection.ask(&command.request())?;
    show_answer(command, path, &line, out, || match command {
        ClientCommand::Upgrade(_) => wait_for_upgrade(parse(&line, path)?, path, patience),
        _ => connection.wait_for_end(patience),
    })
}

/// Waits until a new process answers, or the old one says that it will not.
fn wait_for_upgrade(new: Upgrading, path: &Path, patience: Duration) -> Result<()> {
    let deadline = Instant::now() + UPGRADE_TIME_MAX;
    loop {
        // Nobody may answer for a moment.
        let status = client::status(path, patience);
        match &status {
            Ok(status) if status.pid == new.pid => return Ok(()),
            Ok(Status {
                upgrade_error: Some(error),
                ..
            }) => return Err(Error::new(printable(error))),
            _ => {}
        }
        if Instant::now() > deadline {
            status?;
            let what = format!("process {} has not taken over", new.pid);
            return Err(Error::new(what).hint("its log may say why"));
        }
        std::thread::sleep(UPGRADE_PAUSE);
    }
}

/// Shows a command's answer. `wait`: when it is that the tunnel ends, or that another process
/// takes over.
///
/// # Errors
/// When the answer is a refusal, or none to this command.
#[doc(hidden)]
pub fn show_answer(
    command: &ClientCommand,
    path: &Path,
    line: &str,
    out: &mut impl Write,
    wait: impl FnOnce() -> Result<()>,
) -> Result<()> {
    let verdict: Verdict = parse(line, path)?;
    if command.target().json {
        show(out, &(printable_json(line) + "\n"))?;
    }
    verdict.check()?;
    if let ClientCommand::Stop(_) | ClientCommand::Upgrade(_) = command {
        wait()?;
    }
    if command.target().json {
        return Ok(());
    }
    let text = match command {
        ClientCommand::Status { .. } => render::status(&parse(line, path)?),
        ClientCommand::Peers(_) => render::peers(&parse(line, path)?),
        ClientCommand::Route { command, .. } => match command {
            RouteCommand::List => render::routes(&parse(line, path)?),
            RouteCommand::Get { .. } => render::found(&parse(line, path)?),
            _ => render::changed(&parse(line, path)?),
        },
        ClientCommand::Peer { .. } => render::changed(&parse(line, path)?),
        ClientCommand::Reload(_) => render::reloaded(&parse(line, path)?),
        ClientCommand::Upgrade(_) => render::upgraded(&parse(line, path)?),
        ClientCommand::Stop(_) => "stopped\n".into(),
    };
    show(out, &text)
}

/// Writes and flushes. A reader that has seen enough, such as `head`, is not an
/// error of ours.
pub(super) fn show(out: &mut impl Write, text: &str) -> Result<()> {
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(Error::os("cannot write to standard output", error))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
#[path = "commands_tests.rs"]
mod tests;
