//! One end of the tunnel: a program in its namespace, and what it says.

use std::io::{Read, Write};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use super::progress::say;
use crate::error::{Error, Result};
use crate::testbed::{Child, Namespace, cpu_seconds};

/// Bytes of its output that are kept: the last ones.
const OUTPUT_BYTES_MAX: usize = 64 * 1024;

/// How long the end of a dead program's output is waited for.
const OUTPUT_WAIT_MAX: Duration = Duration::from_millis(500);

pub(super) struct Endpoint {
    name: char,
    child: Child,
    output: Arc<Mutex<Vec<u8>>>,
    readers: Vec<JoinHandle<()>>,
}

impl Endpoint {
    pub(super) fn start(
        namespace: &Namespace,
        name: char,
        mut command: Command,
        verbose: bool,
    ) -> Result<Self> {
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            // Ctrl-C is for the demo alone, which then ends its programs in order.
            .process_group(0);
        let mut child = namespace.spawn(command)?;
        let output = Arc::new(Mutex::new(Vec::new()));
        let mut readers = Vec::new();
        if let Some(stdout) = child.process().stdout.take() {
            let output = Arc::clone(&output);
            readers.push(thread::spawn(move || keep(stdout, &output, verbose)));
        }
        if let Some(stderr) = child.process().stderr.take() {
            let output = Arc::clone(&output);
            readers.push(thread::spawn(move || keep(stderr, &output, verbose)));
        }
        Ok(Self {
            name,
            child,
            output,
            readers,
        })
    }

    /// An error if the program has ended by itself.
    pub(super) fn check(&mut self) -> Result<()> {
        match self.child.try_wait()? {
            None => Ok(()),
            Some(status) => Err(Error::new(format!(
                "tunnel end {} ended by itself: {status}",
                self.name
            ))),
        }
    }

    /// CPU time of all its threads so far.
    pub(super) fn cpu_seconds(&self) -> Result<f64> {
        cpu_seconds(self.child.pid())
    }

    pub(super) fn ask_to_end(&self) {
        self.child.signal(Signal::SIGTERM);
    }

    /// Waits until it has ended, by force after `grace`.
    pub(super) fn end(&mut self, grace: Duration) -> Result<()> {
        let start = Instant::now();
        self.child.terminate(grace)?;
        if start.elapsed() >= grace {
            let seconds = grace.as_secs_f64();
            say(&format!(
                "tunnel end {} was killed: SIGTERM had not ended it within {seconds} s",
                self.name
            ));
        }
        Ok(())
    }

    /// Prints the last of what it has said.
    pub(super) fn show_output(&mut self) {
        if matches!(self.child.try_wait(), Ok(Some(_))) {
            let deadline = Instant::now() + OUTPUT_WAIT_MAX;
            while self.readers.iter().any(|reader| !reader.is_finished())
                && Instant::now() < deadline
            {
                thread::sleep(Duration::from_millis(5));
            }
        }
        let output = self.output.lock().unwrap_or_else(PoisonError::into_inner);
        say(&format!("--- output of tunnel end {}:", self.name));
        say(String::from_utf8_lossy(&output).trim_end());
        say("---");
    }
}

/// Reads a pipe until its end, so that the program never waits for us.
fn keep(mut pipe: impl Read, output: &Mutex<Vec<u8>>, verbose: bool) {
    let mut chunk = [0; 4096];
    while let Ok(length) = pipe.read(&mut chunk) {
        if length == 0 {
            return;
        }
        if verbose {
            let _ = std::io::stderr().write_all(&chunk[..length]);
        }
        let mut output = output.lock().unwrap_or_else(PoisonError::into_inner);
        output.extend_from_slice(&chunk[..length]);
        let excess = output.len().saturating_sub(OUTPUT_BYTES_MAX);
        output.drain(..excess);
    }
}
