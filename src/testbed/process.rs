//! Programs in a namespace: started, watched, stopped.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{self, Command, ExitStatus};
use std::sync::LazyLock;
use std::sync::mpsc::{Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, getpid, getppid};

use super::enter;
use crate::error::{Error, Result};

/// `USER_HZ`: ticks per second in /proc/PID/stat, the same on every
/// architecture that we run on (asm-generic/param.h).
const TICKS_PER_SECOND: f64 = 100.0;

/// How often a child that was asked to end is checked.
const WAIT_STEP: Duration = Duration::from_millis(10);

/// What the thread that starts all programs is sent: a namespace, a program for
/// it, and where the answer goes.
type Job = (OwnedFd, Command, Sender<io::Result<process::Child>>);

/// That thread, which never ends: a child's `PR_SET_PDEATHSIG` goes off when the
/// *thread* that started it ends (prctl(2)), so a caller's will not do.
static SPAWNER: LazyLock<Sender<Job>> = LazyLock::new(|| {
    let (jobs, queue) = channel::<Job>();
    thread::spawn(move || {
        for (namespace, mut command, answer) in queue {
            die_with_parent(&mut command);
            let started = enter(namespace.as_fd()).and_then(|()| command.spawn());
            // The asker waits for this answer, and only for this one.
            let _ = answer.send(started);
        }
    });
    jobs
});

/// Lets the kernel kill the child when the calling thread ends, however it ends.
fn die_with_parent(command: &mut Command) {
    let parent = getpid();
    let arrange = move || {
        nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
        // The parent may have died before the line above.
        if getppid() != parent {
            return Err(io::Error::from_raw_os_error(libc::ESRCH));
        }
        Ok(())
    };
    // SAFETY: between fork and exec the closure only makes two system calls,
    // prctl and getppid; it neither allocates nor takes locks.
    unsafe {
        command.pre_exec(arrange);
    }
}

/// A running program; dropped, it is killed and waited for.
pub struct Child {
    process: process::Child,
    program: String,
}

impl Child {
    /// See [`Namespace::spawn`](super::Namespace::spawn).
    pub(super) fn start(namespace: BorrowedFd<'_>, command: Command) -> Result<Self> {
        let program = command.get_program().to_string_lossy().into_owned();
        let start = || {
            let (answer, started) = channel();
            let job = (namespace.try_clone_to_owned()?, command, answer);
            SPAWNER.send(job).map_err(io::Error::other)?;
            started.recv().map_err(io::Error::other)?
        };
        let process =
            start().map_err(|cause| Error::os(format!("cannot start {program}"), cause))?;
        Ok(Self { process, program })
    }

    /// The process id.
    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// The program that was started, as it was named.
    pub fn program(&self) -> &str {
        &self.program
    }

    /// The standard library's handle: its pipes.
    pub fn process(&mut self) -> &mut process::Child {
        &mut self.process
    }

    /// How the program ended, `None` while it runs.
    ///
    /// # Errors
    /// When the kernel does not know the child (nobody else may wait for it).
    pub fn try_wait(&mut self) -> Result<Option<ExitStatus>> {
        self.process
            .try_wait()
            .map_err(|cause| Error::os(format!("cannot wait for {}", self.program), cause))
    }

    /// Sends a signal; a program that has ended does not mind.
    pub fn signal(&self, signal: Signal) {
        // The id cannot be another's: until it is waited for, it stays taken.
        if let Ok(pid) = i32::try_from(self.process.id()) {
            let _ = kill(Pid::from_raw(pid), signal);
        }
    }

    /// CPU time in seconds that all its threads have used so far, user and system,
    /// in steps of 10 ms (proc_pid_stat(5)).
    ///
    /// # Errors
    /// When /proc does not show it.
    pub fn cpu_seconds(&self) -> Result<f64> {
        let path = format!("/proc/{}/stat", self.pid());
        let stat = fs::read_to_string(&path)
            .map_err(|cause| Error::os(format!("cannot read {path}"), cause))?;
        parse_cpu_seconds(&stat).ok_or_else(|| Error::new(format!("cannot make sense of {path}")))
    }

    /// Asks the program to end (SIGTERM), waits at most `grace`, then kills it.
    ///
    /// # Errors
    /// As [`Child::try_wait`].
    pub fn terminate(&mut self, grace: Duration) -> Result<ExitStatus> {
        let mut deadline = None;
        loop {
            if let Some(status) = self.try_wait()? {
                return Ok(status);
            }
            match deadline {
                None => {
                    self.signal(Signal::SIGTERM);
                    deadline = Some(Instant::now() + grace);
                }
                Some(deadline) if Instant::now() >= deadline => self.signal(Signal::SIGKILL),
                Some(_) => {}
            }
            thread::sleep(WAIT_STEP);
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // Both fail only if it has ended and was waited for.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn parse_cpu_seconds(stat: &str) -> Option<f64> {
    // The program's name in parentheses may contain anything, so the fields are
    // counted from its end: state is field 3, utime 14 and stime 15.
    let (_, fields) = stat.rsplit_once(')')?;
    let mut fields = fields.split_ascii_whitespace().skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    Some((user + system) as f64 / TICKS_PER_SECOND)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_cpu_time_behind_a_strange_name() {
        let stat = "7 (a) b) R 1 7 7 0 -1 4194304 90 0 0 0 150 50 0 0 20 0 1 0 123";
        assert_eq!(parse_cpu_seconds(stat), Some(2.0));
        assert_eq!(parse_cpu_seconds("7 (a"), None);
    }
}
