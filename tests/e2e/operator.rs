//! An operator: fastvpn's commands for a running tunnel, and what they answer.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::Duration;

use fastvpn::error::{Error, Result};
use ipnet::IpNet;
use serde_json::Value;
use tempfile::TempDir;
use testbed::Namespace;

use crate::support::{FASTVPN, PATIENCE, check, fail, tried, wait_until};

/// A directory with a tunnel's control socket and configuration file, gone
/// when this is.
pub struct Operator {
    directory: TempDir,
    // Nobody in there needs a network.
    desk: Namespace,
}

/// What a command said.
#[derive(Debug)]
pub struct Said {
    /// Its exit status.
    pub status: ExitStatus,
    /// All of its standard output.
    pub stdout: String,
    /// All of its standard error.
    pub stderr: String,
}

impl Operator {
    /// One with an empty directory.
    pub fn new() -> Result<Self> {
        Ok(Self {
            directory: tried("make a directory", tempfile::tempdir())?,
            desk: Namespace::new()?,
        })
    }

    /// Path of the control socket.
    pub fn socket(&self) -> PathBuf {
        self.directory.path().join("control.sock")
    }

    /// The same for a command line.
    pub fn socket_text(&self) -> String {
        self.socket().display().to_string()
    }

    /// Path of a file in the directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Writes a file in the directory; returns its path.
    pub fn write(&self, name: &str, text: &str) -> Result<String> {
        let path = self.path(name);
        tried("write a file", std::fs::write(&path, text))?;
        Ok(path.display().to_string())
    }

    /// Runs `fastvpn WORDS --control SOCKET`.
    pub fn run(&self, words: &[&str]) -> Result<Said> {
        let mut command = Command::new(FASTVPN);
        command.args(words).arg("--control").arg(self.socket());
        said(&self.desk, command)
    }

    /// As [`Operator::run`], with words as one would type them; it must succeed.
    pub fn tell(&self, words: &str) -> Result<String> {
        let said = self.run(&words.split_whitespace().collect::<Vec<_>>())?;
        let went_well = said.status.success() && said.stderr.is_empty();
        check(went_well, || format!("{words}: {said:?}"))?;
        Ok(said.stdout)
    }

    /// The same with `--json`: an object in which `ok` is true.
    pub fn ask(&self, words: &str) -> Result<Value> {
        let text = self.tell(&format!("{words} --json"))?;
        let answer: Value = serde_json::from_str(&text)
            .map_err(|error| Error::new(format!("{words}: {error} in {text:?}")))?;
        check(answer["ok"] == true, || format!("{words}: {answer}"))?;
        Ok(answer)
    }

    /// The command must fail with status 1 and one line that has these parts.
    pub fn refuses(&self, words: &str, parts: &[&str]) -> Result<()> {
        for json in ["", " --json"] {
            let words = format!("{words}{json}");
            let said = self.run(&words.split_whitespace().collect::<Vec<_>>())?;
            is_refusal(&said, parts).map_err(|error| Error::new(format!("{words}: {error}")))?;
        }
        Ok(())
    }

    /// All prefixes and their peers, sorted, as the running tunnel has them.
    pub fn routes(&self) -> Result<Vec<(IpNet, String)>> {
        let answer = self.ask("route list")?;
        let Some(entries) = answer["routes"].as_array() else {
            return fail(format!("no routes in {answer}"));
        };
        let entry = |entry: &Value| {
            let prefix = entry["prefix"].as_str()?.parse().ok()?;
            Some((prefix, entry["peer"].as_str()?.to_string()))
        };
        let routes: Option<Vec<_>> = entries.iter().map(entry).collect();
        let Some(mut routes) = routes else {
            return fail(format!("a strange route in {answer}"));
        };
        routes.sort();
        Ok(routes)
    }

    /// The peer that packets to an address go to.
    pub fn peer_of(&self, address: &str) -> Result<String> {
        let answer = self.ask(&format!("route get {address}"))?;
        match answer["peer"].as_str() {
            Some(peer) => Ok(peer.to_string()),
            None => fail(format!("no peer in {answer}")),
        }
    }

    /// How many packets were dropped for this reason, as logs write it, so far.
    pub fn dropped(&self, reason: &str) -> Result<u64> {
        let answer = self.ask("status")?;
        check(answer["drops"].is_object(), || {
            format!("no drops in {answer}")
        })?;
        Ok(answer["drops"][reason.replace('-', "_")]
            .as_u64()
            .unwrap_or(0))
    }

    /// A counter of all workers together, also named as logs write it.
    pub fn counter(&self, name: &str) -> Result<u64> {
        let answer = self.ask("status")?;
        let value = answer["counters"][name.replace('-', "_")].as_u64();
        value.map_or_else(|| fail(format!("no counter {name} in {answer}")), Ok)
    }

    /// Waits until the running tunnel answers operators.
    pub fn wait(&self) -> Result<()> {
        wait_until("the control socket answers", || {
            Ok(self.run(&["status"])?.status.success())
        })
    }

    /// Waits until the running tunnel's workers send to all peers from their own
    /// ports.
    pub fn wait_for_own_ports(&self) -> Result<()> {
        self.wait()?;
        let own_ports = &self.ask("status")?["own_ports"];
        let count = own_ports.as_array().map_or(0, Vec::len);
        wait_until("own ports are proven", || {
            let answer = self.ask("peers")?;
            let mut peers = answer["peers"].as_array().into_iter().flatten();
            Ok(peers.all(|peer| peer["own_ports_proven"] == count))
        })
    }

    /// A bare connection.
    pub fn connect(&self) -> Result<UnixStream> {
        connect(&self.socket())
    }

    /// One request as a program would make it; the answer's line.
    pub fn request(&self, line: &str) -> Result<Value> {
        let mut stream = self.connect()?;
        let mut answer = String::new();
        tried("send a request", in_time(writeln!(stream, "{line}")))?;
        let read = BufReader::new(stream).read_line(&mut answer);
        tried("read an answer", in_time(read))?;
        serde_json::from_str(&answer)
            .map_err(|error| Error::new(format!("{line}: {error} in {answer:?}")))
    }
}

/// Connects to an control socket, with patience.
pub fn connect(path: &Path) -> Result<UnixStream> {
    let stream = tried("connect to the control socket", UnixStream::connect(path))?;
    tried("set a timeout", stream.set_read_timeout(Some(PATIENCE)))?;
    tried("set a timeout", stream.set_write_timeout(Some(PATIENCE)))?;
    Ok(stream)
}

/// What a socket's timeout is, in words instead of EAGAIN.
pub fn in_time<T>(result: io::Result<T>) -> io::Result<T> {
    result.map_err(|error| match error.kind() {
        io::ErrorKind::WouldBlock => io::Error::other(format!("nothing within {PATIENCE:?}")),
        _ => error,
    })
}

/// Whether a command failed with status 1 and one line with these parts.
pub fn is_refusal(said: &Said, parts: &[&str]) -> Result<()> {
    let is_one_line = said.stderr.starts_with("fastvpn: ") && said.stderr.lines().count() == 1;
    let has_all = parts.iter().all(|part| said.stderr.contains(part));
    check(
        said.status.code() == Some(1) && is_one_line && has_all,
        || format!("not one line with {parts:?}: {said:?}"),
    )
}

/// Runs a command to its end, which must come.
pub fn said(namespace: &Namespace, mut command: Command) -> Result<Said> {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = namespace.spawn(command)?;
    let (stdout, stderr) = (child.process().stdout.take(), child.process().stderr.take());
    let text = |pipe: Option<Box<dyn Read + Send>>| {
        std::thread::spawn(move || {
            let mut bytes = Vec::new();
            if let Some(mut pipe) = pipe {
                let _ = pipe.read_to_end(&mut bytes);
            }
            String::from_utf8_lossy(&bytes).into_owned()
        })
    };
    let stdout = text(stdout.map(|pipe| Box::new(pipe) as _));
    let stderr = text(stderr.map(|pipe| Box::new(pipe) as _));
    let mut status = None;
    wait_until("the command ends", || {
        status = child.try_wait()?;
        if status.is_none() {
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(status.is_some())
    })?;
    let joined = |text: std::thread::JoinHandle<String>| text.join().unwrap_or_default();
    match status {
        Some(status) => Ok(Said {
            status,
            stdout: joined(stdout),
            stderr: joined(stderr),
        }),
        None => fail("the command did not end"),
    }
}

impl Operator {
    /// As [`Operator::request`], for what must be done.
    pub fn must(&self, request: &Value) -> Result<Value> {
        let answer = self.request(&request.to_string())?;
        check(answer["ok"] == true, || format!("refused: {answer}"))?;
        Ok(answer)
    }
}

/// An answer has these members.
pub fn has(answer: &Value, members: &[(&str, Value)]) -> Result<()> {
    for (key, expected) in members {
        check(answer[key] == *expected, || {
            format!("{key} is not {expected} in {answer}")
        })?;
    }
    Ok(())
}
