//! Programs that carry a link: started so that their last words are known.

use std::fs::File;
use std::io::{Read, Seek};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use fastvpn::error::{Error, Result};
use nix::sys::memfd::{MFdFlags, memfd_create};
use testbed::traffic::ping;
use testbed::{Child, Namespace, Pair};

use super::{Link, TUNNEL};

/// How long a link may take to carry its first packet.
const UP_MAX: Duration = Duration::from_secs(60);

/// How long one ping is waited for, and how long between two looks.
const PING_TIMEOUT: Duration = Duration::from_millis(100);
const LOOK_INTERVAL: Duration = Duration::from_millis(10);

/// Payload of the ping that must be answered.
const PING_BYTES: usize = 56;

/// Bytes of a program's output that an error quotes.
const LAST_WORDS_BYTES_MAX: usize = 300;

/// A program in its namespace, and what it says.
struct Daemon {
    child: Child,
    program: String,
    /// A file in memory that both its outputs go to.
    output: File,
}

/// Starts a program at each host, and waits until host `a` and host `b` reach
/// each other at the addresses [`TUNNEL`].
///
/// # Errors
/// When a program cannot be started or ends by itself, or the link is not up
/// after [`UP_MAX`]; with the last words of the program.
pub fn start(pair: &Pair, commands: [Command; 2]) -> Result<Link> {
    start_and_set_up(pair, commands, |_, _| Ok(true))
}

/// As [`start`], for programs that leave something to be done once they run:
/// `set_up` is called for host `a` (0) and host `b` (1) until it returns `true`,
/// which it does not while what it needs is not there yet.
///
/// # Errors
/// As [`start`], and those of `set_up`.
pub fn start_and_set_up(
    pair: &Pair,
    commands: [Command; 2],
    set_up: impl Fn(usize, &Child) -> Result<bool>,
) -> Result<Link> {
    let [at_a, at_b] = commands;
    let mut daemons = [Daemon::start(&pair.a, at_a)?, Daemon::start(&pair.b, at_b)?];
    let start = Instant::now();
    for own in [0, 1] {
        while !set_up(own, &daemons[own].child)? {
            look_again(&mut daemons, start, "nothing to set up has appeared")?;
        }
    }
    wait_until_up(pair, &mut daemons, start)?;
    Ok(Link {
        address: TUNNEL[1].into(),
        processes: daemons.map(|daemon| vec![daemon.child]),
        public_key: None,
        configuration: None,
        changes: None,
    })
}

impl Daemon {
    fn start(namespace: &Namespace, mut command: Command) -> Result<Self> {
        let failed = |cause| Error::os("cannot make a file in memory", cause);
        let file =
            memfd_create(c"output", MFdFlags::MFD_CLOEXEC).map_err(|errno| failed(errno.into()))?;
        let output = File::from(file);
        command
            .stdin(Stdio::null())
            .stdout(output.try_clone().map_err(failed)?)
            .stderr(output.try_clone().map_err(failed)?)
            // Ctrl-C is for the bench alone, which then ends its programs.
            .process_group(0);
        let program = command.get_program().display().to_string();
        let child = namespace.spawn(command)?;
        Ok(Self {
            child,
            program,
            output,
        })
    }

    /// An error if the program has ended by itself.
    fn check(&mut self) -> Result<()> {
        match self.child.try_wait()? {
            None => Ok(()),
            Some(status) => {
                let words = self.last_words();
                let program = &self.program;
                let what = format!("{program} ended by itself: {status}{words}");
                Err(Error::new(what))
            }
        }
    }

    /// The end of what it has said, on one line.
    fn last_words(&mut self) -> String {
        let mut bytes = Vec::new();
        let read = self
            .output
            .rewind()
            .and_then(|()| self.output.read_to_end(&mut bytes));
        let from = bytes.len().saturating_sub(LAST_WORDS_BYTES_MAX);
        let text = String::from_utf8_lossy(&bytes[from..]);
        let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
        match read {
            Ok(_) if !text.is_empty() => format!("; it said: {text}"),
            _ => String::new(),
        }
    }
}

fn wait_until_up(pair: &Pair, daemons: &mut [Daemon; 2], start: Instant) -> Result<()> {
    let ways = [(&pair.a, TUNNEL[1]), (&pair.b, TUNNEL[0])];
    for (from, to) in ways {
        while let Err(error) = ping(from, to.into(), PING_BYTES, PING_TIMEOUT) {
            look_again(daemons, start, &error.to_string())?;
        }
    }
    Ok(())
}

/// Waits a moment; an error when a program has ended or it takes too long.
fn look_again(daemons: &mut [Daemon; 2], start: Instant, why: &str) -> Result<()> {
    daemons.iter_mut().try_for_each(Daemon::check)?;
    if start.elapsed() > UP_MAX {
        let words: String = daemons.iter_mut().map(Daemon::last_words).collect();
        let seconds = UP_MAX.as_secs();
        return Err(Error::new(format!(
            "the link was not up after {seconds} s: {why}{words}"
        )));
    }
    thread::sleep(LOOK_INTERVAL);
    Ok(())
}
