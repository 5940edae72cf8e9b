//! One end of the tunnel: a program in its namespace, and what it says.

use std::fs::File;
use std::io::{Read, Seek};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::Signal;

use super::say;
use crate::error::{Error, Result};
use crate::testbed::{Child, Namespace};

/// How long it may take to end after SIGTERM.
const GRACE: Duration = Duration::from_secs(2);

pub(super) struct End {
    name: char,
    child: Child,
    /// What it prints, unless that is shown at once.
    output: Option<File>,
}

impl End {
    pub(super) fn start(
        namespace: &Namespace,
        name: char,
        mut command: Command,
        verbose: bool,
    ) -> Result<Self> {
        say(&format!("{name}: {}", words(&command)));
        // Ctrl-C is for the demo alone, which then ends its programs in order.
        command.stdin(Stdio::null()).process_group(0);
        let mut output = None;
        if !verbose {
            let cannot = |cause| Error::os("cannot keep a program's output", cause);
            let file = memfd_create(c"output", MFdFlags::MFD_CLOEXEC);
            let file = File::from(file.map_err(|errno| cannot(errno.into()))?);
            command.stdout(file.try_clone().map_err(cannot)?);
            command.stderr(file.try_clone().map_err(cannot)?);
            output = Some(file);
        }
        let child = namespace.spawn(command)?;
        Ok(Self {
            name,
            child,
            output,
        })
    }

    /// An error if the program has ended by itself.
    pub(super) fn check(&mut self) -> Result<()> {
        let name = self.name;
        match self.child.try_wait()? {
            None => Ok(()),
            Some(status) => Err(Error::new(format!(
                "tunnel end {name} ended by itself: {status}"
            ))),
        }
    }

    /// CPU time of all its threads so far.
    pub(super) fn cpu_time(&self) -> Result<Duration> {
        self.child.cpu_time()
    }

    pub(super) fn ask_to_end(&self) {
        self.child.signal(Signal::SIGTERM);
    }

    /// Waits until it has ended, by force after [`GRACE`].
    pub(super) fn end(&mut self) -> Result<()> {
        let start = Instant::now();
        self.child.terminate(GRACE)?;
        if start.elapsed() >= GRACE {
            let (name, seconds) = (self.name, GRACE.as_secs());
            say(&format!(
                "tunnel end {name} was killed: SIGTERM had not ended it within {seconds} s"
            ));
        }
        Ok(())
    }

    /// Prints what it has said.
    pub(super) fn show_output(&mut self) {
        if let Some(file) = &mut self.output {
            let mut output = Vec::new();
            let _ = file.rewind().and_then(|()| file.read_to_end(&mut output));
            say(&format!("--- output of tunnel end {}:", self.name));
            say(String::from_utf8_lossy(&output).trim_end());
            say("---");
        }
    }
}

/// A command as one would type it.
fn words(command: &Command) -> String {
    let program = std::path::Path::new(command.get_program());
    let name = program.file_name().unwrap_or(program.as_os_str());
    let words = std::iter::once(name).chain(command.get_args());
    let words: Vec<_> = words.map(|word| word.to_string_lossy()).collect();
    words.join(" ")
}
