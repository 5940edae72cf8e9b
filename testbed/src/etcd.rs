//! etcd inside a namespace, with its data in a directory that goes with it, and etcdctl(1).

use std::io::Read;
use std::net::IpAddr;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use fastvpn::error::{Error, Result};
use tempfile::TempDir;

use crate::program::Program;
use crate::{Child, Namespace};

/// The server.
pub const ETCD: Program = Program::debian("etcd", "etcd-server");

/// What asks it.
pub const ETCDCTL: Program = Program::debian("etcdctl", "etcd-client");

/// How long etcd may take to begin, and to answer.
const PATIENCE: Duration = Duration::from_secs(60);

/// Why neither can be run here.
pub fn missing() -> Option<String> {
    ETCD.missing().or_else(|| ETCDCTL.missing())
}

/// One etcd, a cluster by itself.
pub struct Etcd {
    directory: TempDir,
    /// More flags: of the server, and of etcdctl.
    flags: [Vec<String>; 2],
    url: String,
    server: Option<Child>,
}

impl Etcd {
    /// Starts one that listens on an address of the namespace, and waits until it answers.
    ///
    /// # Errors
    /// When it is not installed, or does not answer.
    pub fn start(namespace: &Namespace, address: IpAddr) -> Result<Self> {
        Self::start_with(
            namespace,
            format!("http://{address}:2379"),
            [Vec::new(), Vec::new()],
        )
    }

    /// The same at a URL, with more flags of the server and of etcdctl.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn start_with(namespace: &Namespace, url: String, flags: [Vec<String>; 2]) -> Result<Self> {
        let directory = tempfile::tempdir();
        let cannot = |cause| Error::os("cannot make a directory for etcd", cause);
        let mut etcd = Self {
            directory: directory.map_err(cannot)?,
            flags,
            url,
            server: None,
        };
        etcd.restart(namespace)?;
        Ok(etcd)
    }

    /// Where it is.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Has etcdctl use other flags from now on.
    pub fn set_client_flags(&mut self, flags: Vec<String>) {
        self.flags[1] = flags;
    }

    /// Kills it. What it knows is on disk.
    pub fn kill(&mut self) {
        self.server = None;
    }

    /// Forgets all that it knows, as one that is made anew.
    ///
    /// # Errors
    /// When its directory cannot be made again.
    pub fn wipe(&mut self) -> Result<()> {
        self.kill();
        let directory = tempfile::tempdir();
        self.directory =
            directory.map_err(|cause| Error::os("cannot make a directory for etcd", cause))?;
        Ok(())
    }

    /// Starts it again, and waits until it answers.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn restart(&mut self, namespace: &Namespace) -> Result<()> {
        self.kill();
        let mut command = ETCD.command()?;
        let data = self.directory.path().join("data");
        command.arg("--data-dir").arg(data);
        command.args([
            "--listen-client-urls",
            &self.url,
            "--advertise-client-urls",
            &self.url,
        ]);
        // Nobody else is in its cluster.
        let peer = "http://127.0.0.1:2380";
        command.args([
            "--listen-peer-urls",
            peer,
            "--initial-advertise-peer-urls",
            peer,
        ]);
        command.args(["--initial-cluster", &format!("default={peer}")]);
        // Its time is the tests'; a disk that is busy is none of theirs.
        command.args([
            "--unsafe-no-fsync",
            "--log-level",
            "error",
            "--logger",
            "zap",
        ]);
        command.args(&self.flags[0]);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        self.server = Some(namespace.spawn(command)?);
        let deadline = Instant::now() + PATIENCE;
        loop {
            // A key that nobody has: a user may have no rights to look at others.
            match self.ask(namespace, &["endpoint", "health"]) {
                Ok(_) => return Ok(()),
                Err(error) if Instant::now() > deadline => return Err(error),
                Err(_) => thread::sleep(Duration::from_millis(50)),
            }
        }
    }

    /// Runs etcdctl with these words, and returns what it prints.
    ///
    /// # Errors
    /// What it says when it fails.
    pub fn ask(&self, namespace: &Namespace, words: &[&str]) -> Result<String> {
        let mut command = ETCDCTL.command()?;
        command
            .env("ETCDCTL_API", "3")
            .args(["--endpoints", &self.url, "--command-timeout", "20s"])
            .args(&self.flags[1])
            .args(words)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        run(namespace, command, &words.join(" "))
    }

    /// Puts a value under a key.
    ///
    /// # Errors
    /// As [`Self::ask`].
    pub fn put(&self, namespace: &Namespace, key: &str, value: &str) -> Result<()> {
        self.ask(namespace, &["put", "--", key, value]).map(drop)
    }

    /// The value of a key; empty if there is none.
    ///
    /// # Errors
    /// As [`Self::ask`].
    pub fn get(&self, namespace: &Namespace, key: &str) -> Result<String> {
        let text = self.ask(namespace, &["get", "--print-value-only", key])?;
        Ok(text.trim_end_matches('\n').to_string())
    }

    /// All keys and values whose keys begin so.
    ///
    /// # Errors
    /// As [`Self::ask`].
    pub fn list(&self, namespace: &Namespace, prefix: &str) -> Result<Vec<(String, String)>> {
        let text = self.ask(namespace, &["get", "--prefix", prefix])?;
        let lines: Vec<&str> = text.lines().collect();
        let pairs = lines.chunks_exact(2);
        Ok(pairs
            .map(|pair| (pair[0].to_string(), pair[1].to_string()))
            .collect())
    }
}

/// Runs a program in a namespace, and returns what it prints.
fn run(namespace: &Namespace, command: Command, words: &str) -> Result<String> {
    let mut child = namespace.spawn(command)?;
    let (mut said, mut wrong) = (String::new(), String::new());
    if let Some(mut stdout) = child.process().stdout.take() {
        let _ = stdout.read_to_string(&mut said);
    }
    if let Some(mut stderr) = child.process().stderr.take() {
        let _ = stderr.read_to_string(&mut wrong);
    }
    match child.process().wait() {
        Ok(status) if status.success() => Ok(said),
        _ => Err(Error::new(format!(
            "etcdctl {words}: {said} {}",
            wrong.trim()
        ))),
    }
}
