//! A process in the background (daemon(7)): one process starts another, waits until that has a
//! tunnel, and ends.
//!
//! The other one is this program again, and not a fork: so it begins with one thread and knows
//! nothing of this process but a pipe in place of standard output, on which it says that it is
//! ready. Until then it says on standard error what is wrong.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{BorrowedFd, RawFd};
use std::process::{Command, Stdio};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::unistd::{dup2_stderr, dup2_stdout, setsid};

use crate::config::Config;
use crate::error::{Error, Result};

/// What the other process says when it is ready.
const READY: &[u8] = b"ready\n";

/// Starts a process that runs the tunnel in the background, and waits until it does. Tells
/// whether that has gone well; the other process has said why not.
///
/// # Errors
/// When it cannot be started, or has ended without a word.
pub fn launch(config: &Config) -> Result<bool> {
    let failed = |error| Error::os("cannot start a process in the background", error);
    close_others_on_exec();
    let program = std::env::current_exe().map_err(failed)?;
    let mut child = Command::new(program)
        .arg("--detached")
        .args(std::env::args_os().skip(1))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    let mut said = Vec::new();
    if let Some(mut stdout) = child.stdout.take() {
        // To its end: it is ready then, or has ended.
        stdout.read_to_end(&mut said).map_err(failed)?;
    }
    let tun = &config.tun;
    if said == READY {
        // Logging is off, so say here what was made: the command may have been mistyped.
        let _ = writeln!(
            std::io::stderr(),
            "fastvpn: {tun} is ready for `wg`, in process {}; `ip link del {tun}` ends it",
            child.id()
        );
        return Ok(true);
    }
    let status = child.wait().map_err(failed)?;
    match status.code() {
        Some(_) => Ok(false),
        None => Err(Error::new(format!(
            "the process for {tun} has ended: {status}"
        ))),
    }
}

/// Has descriptors that this process was given, and knows nothing of, end with it.
fn close_others_on_exec() {
    const OTHERS_MIN: RawFd = 3;
    let entries = std::fs::read_dir("/proc/self/fd").into_iter().flatten();
    let number = |entry: std::fs::DirEntry| entry.file_name().to_str()?.parse::<RawFd>().ok();
    let others = entries.flatten().filter_map(number);
    for fd in others.filter(|fd| *fd >= OTHERS_MIN) {
        // SAFETY: the kernel has just listed it, and this process, which has one thread, does not
        // close it meanwhile.
        let fd = unsafe { BorrowedFd::borrow_raw(fd) };
        if let Err(error) = fcntl(fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)) {
            tracing::debug!("a descriptor stays open: {error}");
        }
    }
}

/// This process, in the background.
pub(super) struct Detached {
    /// Somebody wants its log.
    is_logging: bool,
}

impl Detached {
    /// Leaves the session of whoever has started it.
    pub(super) fn begin(config: &Config) -> Self {
        // It fails for the leader of a group: where there is nothing to leave.
        let _ = setsid();
        Self {
            is_logging: !config.is_silent,
        }
    }

    /// Says that all is ready, and lets go of the terminal.
    ///
    /// # Errors
    /// Without /dev/null.
    pub(super) fn report_ready(self) -> Result<()> {
        let failed = |error| Error::os("cannot open /dev/null", error);
        let nowhere = File::options()
            .write(true)
            .open("/dev/null")
            .map_err(failed)?;
        if !self.is_logging {
            let done = dup2_stderr(&nowhere);
            done.map_err(|error| failed(error.into()))?;
        }
        // Whoever has started it may have ended.
        let mut stdout = std::io::stdout();
        let _ = stdout.write_all(READY).and_then(|()| stdout.flush());
        let done = dup2_stdout(&nowhere);
        done.map_err(|error| failed(error.into()))
    }
}
