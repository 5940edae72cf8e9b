//! Programs in a namespace: started, watched, stopped.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{self, Command, ExitStatus};
use std::sync::LazyLock;
use std::sync::mpsc::{Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::time::{ClockId, clock_getcpuclockid};
use nix::unistd::{Pid, getpid, getppid};

use super::enter;
use crate::error::{Error, Result};

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
        let started = start().map(|process| Self { process });
        started.map_err(|cause| Error::os(format!("cannot start {program}"), cause))
    }

    /// The process id.
    pub fn pid(&self) -> u32 {
        self.process.id()
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
        let status = self.process.try_wait();
        status.map_err(|cause| Error::os(format!("cannot wait for process {}", self.pid()), cause))
    }

    fn as_pid(&self) -> Pid {
        Pid::from_raw(self.pid() as i32)
    }

    /// Sends a signal; a program that has ended does not mind.
    pub fn signal(&self, signal: Signal) {
        // The id cannot be another's: until it is waited for, it stays taken.
        let _ = kill(self.as_pid(), signal);
    }

    /// CPU time that all its threads have used so far, user and system.
    ///
    /// # Errors
    /// When the kernel does not tell.
    pub fn cpu_time(&self) -> Result<Duration> {
        let time = clock_getcpuclockid(self.as_pid()).and_then(ClockId::now);
        let what = || format!("cannot read the CPU time of process {}", self.pid());
        let time = time.map_err(|errno| Error::os(what(), errno.into()))?;
        Ok(time.into())
    }

    /// Asks the program to end (SIGTERM), waits at most `grace`, then kills it.
    ///
    /// # Errors
    /// As [`Child::try_wait`].
    pub fn terminate(&mut self, grace: Duration) -> Result<ExitStatus> {
        let start = Instant::now();
        let mut signal = Some(Signal::SIGTERM);
        loop {
            if let Some(status) = self.try_wait()? {
                return Ok(status);
            }
            if let Some(signal) = signal.take() {
                self.signal(signal);
            } else if start.elapsed() > grace {
                self.signal(Signal::SIGKILL);
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
