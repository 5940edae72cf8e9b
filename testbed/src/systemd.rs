//! systemd, as process 1 of namespaces of its own.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use fastvpn::error::{Error, Result};
use fastvpn::testbed::{Child, Namespace};

use crate::program::Program;

const PROGRAM: &str = "/usr/lib/systemd/systemd";

/// Becomes systemd: see there.
const BOOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/systemd/boot");

/// dpkg(1) wants to find what administrators use.
const ADMINISTRATORS_PATH: &str = "/usr/sbin:/usr/bin:/sbin:/bin";

/// Tells how safe a unit is.
pub const ANALYZE: Program = Program::debian("systemd-analyze", "systemd");

/// How long it may take to come up, and its control groups to go.
const PATIENCE: Duration = Duration::from_secs(60);
const PAUSE: Duration = Duration::from_millis(20);

/// Targets that every unit comes after.
const TARGETS: [&str; 5] = [
    "sysinit",
    "basic",
    "shutdown",
    "network-online",
    "nss-lookup",
];

/// Why it cannot be run here.
pub fn missing() -> Option<String> {
    if !Path::new(PROGRAM).exists() {
        return Some("systemd is not installed (Debian package systemd)".into());
    }
    let filesystems = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    if !filesystems.contains("overlay") {
        return Some("this kernel has no overlayfs".into());
    }
    control_groups()
        .is_none()
        .then(|| "no cgroup2 is mounted".into())
}

/// Where the second version of control groups is mounted.
fn control_groups() -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").ok()?;
    let of_line = |line: &str| {
        let mut words = line.split(' ');
        let (_, place, kind) = (words.next()?, words.next()?, words.next()?);
        (kind == "cgroup2").then(|| place.into())
    };
    mounts.lines().find_map(of_line)
}

/// A systemd with units of the test's own, and none of this machine's. Dropped, it ends with all
/// that it has started.
pub struct Systemd {
    /// unshare(1), whose only child is systemd.
    unshare: Option<Child>,
    /// systemd's process id, here.
    pid: u32,
    group: PathBuf,
}

impl Systemd {
    /// Starts it in a network namespace. Each of `files` is a path below `directory` and a text:
    /// units in `units`, and in `etc` what is to be in /etc/fastvpn. `wanted` are the units that
    /// it starts, and `program` is what it has as /usr/bin/fastvpn. If `directory` has
    /// `packages`, they are in /run/packages.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn boot(
        namespace: &Namespace,
        directory: &Path,
        files: &[(&str, &str)],
        wanted: &str,
        program: Option<&Path>,
    ) -> Result<Self> {
        let failed = |cause| Error::os("cannot prepare systemd", cause);
        for name in ["root", "writable", "units"] {
            fs::create_dir(directory.join(name)).map_err(failed)?;
        }
        let target = "[Unit]\nDefaultDependencies=no\n";
        let default = format!("{target}Wants={wanted}\n");
        let targets = TARGETS.map(|name| (format!("units/{name}.target"), target));
        let targets = targets.iter().map(|(path, text)| (path.as_str(), *text));
        let default = [("units/default.target", default.as_str())];
        for (path, text) in files.iter().copied().chain(targets).chain(default) {
            let path = directory.join(path);
            if let Some(parent) = path.parent() {
                fs::create_dir_all(parent).map_err(failed)?;
            }
            fs::write(path, text).map_err(failed)?;
        }
        let groups = control_groups().ok_or_else(|| Error::new("no cgroup2 is mounted"))?;
        let name = directory.file_name().unwrap_or(OsStr::new("test"));
        let group = groups.join(format!("fastvpn{}", name.to_string_lossy()));
        fs::create_dir(&group).map_err(failed)?;
        let mut booted = Self {
            unshare: None,
            pid: 0,
            group,
        };
        let mut command = Command::new("sh");
        command
            .args(["-c", "echo $$ > \"$0/cgroup.procs\" && exec unshare \"$@\""])
            .arg(&booted.group)
            .args([
                "--pid",
                "--fork",
                "--kill-child",
                "--cgroup",
                "--uts",
                "--ipc",
            ])
            .args(["--mount", "--propagation", "private", BOOT])
            .arg(directory)
            .args(program)
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        let unshare = booted.unshare.insert(namespace.spawn(command)?).pid();
        booted.wait_for_start(unshare)?;
        Ok(booted)
    }

    fn wait_for_start(&mut self, unshare: u32) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            self.pid = child_of(unshare).unwrap_or_default();
            if self.pid != 0 && self.systemctl("is-system-running").is_ok() {
                return Ok(());
            }
            std::thread::sleep(PAUSE);
        }
        Err(Error::new("systemd does not come up"))
    }

    /// Runs a command in its namespaces.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn run(&self, words: &[&str]) -> Result<Output> {
        let mut command = Command::new("nsenter");
        command.args(["--target", &self.pid.to_string(), "--all", "--"]);
        command.args(words).env("PATH", ADMINISTRATORS_PATH);
        command.stdin(Stdio::null());
        let output = command.output();
        output.map_err(|cause| Error::os("cannot start nsenter", cause))
    }

    /// The same, for a command that must succeed; returns its output.
    ///
    /// # Errors
    /// With what it has said.
    pub fn tell(&self, words: &str) -> Result<String> {
        let output = self.run(&words.split_whitespace().collect::<Vec<_>>())?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_string();
        match output.status.success() {
            true => Ok(text(&output.stdout)),
            false => {
                let (said, complaint) = (text(&output.stdout), text(&output.stderr));
                Err(Error::new(format!("{words}: {said} {complaint}")))
            }
        }
    }

    /// `systemctl WORDS`.
    ///
    /// # Errors
    /// As [`Self::tell`].
    pub fn systemctl(&self, words: &str) -> Result<String> {
        self.tell(&format!("systemctl {words}"))
    }

    /// A property of a unit.
    ///
    /// # Errors
    /// As [`Self::tell`].
    pub fn property(&self, unit: &str, name: &str) -> Result<String> {
        self.systemctl(&format!("show --value --property {name} {unit}"))
    }
}

impl Drop for Systemd {
    fn drop(&mut self) {
        // All others end with process 1 of their namespace.
        self.unshare = None;
        let deadline = Instant::now() + PATIENCE;
        while !is_removed(&self.group) && Instant::now() < deadline {
            std::thread::sleep(PAUSE);
        }
    }
}

/// Removes a control group with those below it, unless there are processes.
fn is_removed(group: &Path) -> bool {
    let entries = fs::read_dir(group).into_iter().flatten().flatten();
    let mut below = entries
        .map(|entry| entry.path())
        .filter(|path| path.is_dir());
    below.all(|path| is_removed(&path)) && fs::remove_dir(group).is_ok()
}

/// The first child of a process (proc_pid_stat(5)).
fn child_of(parent: u32) -> Option<u32> {
    let entries = fs::read_dir("/proc").ok()?.flatten();
    let mut pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.find(|pid| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let words = stat
            .rsplit_once(')')
            .map(|(_, rest)| rest.split_whitespace());
        let found = words.and_then(|mut words| words.nth(1)?.parse::<u32>().ok());
        found == Some(parent)
    })
}
