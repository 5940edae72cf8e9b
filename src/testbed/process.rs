//! Programs in a namespace: started, watched, stopped, and what they cost.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{self, Command, ExitStatus};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Sender, bounded};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, getpid, getppid};

use super::namespace::enter;
use crate::error::{Error, Result};

/// `USER_HZ`: ticks per second in /proc/PID/stat, the same on every
/// architecture that we run on (asm-generic/param.h).
const TICKS_PER_SECOND: f64 = 100.0;

/// How often a child that was asked to end is looked at.
const WAIT_STEP: Duration = Duration::from_millis(10);

type Job = Box<dyn FnOnce() + Send>;

/// A thread that lives in a namespace and starts programs there.
///
/// It has to outlive them: a child's `PR_SET_PDEATHSIG` goes off when the
/// *thread* that started it ends (prctl(2)), so a short-lived one will not do.
pub(super) struct Spawner {
    jobs: Sender<Job>,
}

impl Spawner {
    pub(super) fn start(namespace: OwnedFd) -> Result<Self> {
        let (jobs, queue) = bounded::<Job>(0);
        let (ready, entered) = bounded(1);
        thread::Builder::new()
            .name("lab-spawner".into())
            .spawn(move || {
                let result = enter(namespace.as_fd());
                drop(namespace);
                let failed = result.is_err();
                // The maker waits for this answer, and only for this one.
                let _ = ready.send(result);
                if failed {
                    return;
                }
                for job in queue {
                    job();
                }
            })
            .map_err(cannot_start)?;
        match entered.recv() {
            Ok(result) => result.map_err(cannot_start)?,
            Err(_) => return Err(Error::new("the namespace's thread ended before it began")),
        }
        Ok(Self { jobs })
    }

    pub(super) fn spawn(spawner: &Arc<Self>, mut command: Command) -> Result<Child> {
        let program = command.get_program().to_string_lossy().into_owned();
        let (answer, started) = bounded(1);
        let job = move || {
            die_with_parent(&mut command);
            let _ = answer.send(command.spawn());
        };
        let gone = || Error::new(format!("cannot start {program}: its namespace is gone"));
        spawner.jobs.send(Box::new(job)).map_err(|_| gone())?;
        let process = started
            .recv()
            .map_err(|_| gone())?
            .map_err(|cause| Error::os(format!("cannot start {program}"), cause))?;
        Ok(Child {
            process,
            program,
            _spawner: Arc::clone(spawner),
        })
    }
}

fn cannot_start(cause: io::Error) -> Error {
    Error::os("cannot start a thread in the namespace", cause)
}

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
    // Keeps the thread alive on whose end the program would be killed.
    _spawner: Arc<Spawner>,
}

impl Child {
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

    /// Asks the program to end (SIGTERM), waits at most `grace`, then kills it.
    ///
    /// # Errors
    /// As [`Child::try_wait`].
    pub fn terminate(&mut self, grace: Duration) -> Result<ExitStatus> {
        if let Some(status) = self.try_wait()? {
            return Ok(status);
        }
        self.signal(Signal::SIGTERM);
        let deadline = Instant::now() + grace;
        while Instant::now() < deadline {
            if let Some(status) = self.try_wait()? {
                return Ok(status);
            }
            thread::sleep(WAIT_STEP);
        }
        self.signal(Signal::SIGKILL);
        self.process
            .wait()
            .map_err(|cause| Error::os(format!("cannot wait for {}", self.program), cause))
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // Both fail only if it has ended and was waited for.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// CPU time in seconds that all threads of a process have used so far, user and
/// system, in steps of 10 ms (proc_pid_stat(5)).
///
/// # Errors
/// When there is no such process.
pub fn cpu_seconds(pid: u32) -> Result<f64> {
    let path = format!("/proc/{pid}/stat");
    let stat = fs::read_to_string(&path)
        .map_err(|cause| Error::os(format!("cannot read {path}"), cause))?;
    parse_cpu_seconds(&stat).ok_or_else(|| Error::new(format!("cannot make sense of {path}")))
}

/// As [`cpu_seconds`], but of the threads that run now only, and exact:
/// nanoseconds on a CPU as the scheduler counts them (`/proc/PID/task/*/schedstat`).
/// Includes the network work that the kernel did for others in these threads'
/// time, and io_uring's own workers.
///
/// # Errors
/// When there is no such process, or the kernel was built without
/// `CONFIG_SCHED_INFO`.
pub fn cpu_ns(pid: u32) -> Result<u64> {
    let tasks = format!("/proc/{pid}/task");
    let entries =
        fs::read_dir(&tasks).map_err(|cause| Error::os(format!("cannot read {tasks}"), cause))?;
    let mut total_ns = 0;
    for entry in entries {
        let path = entry
            .map_err(|cause| Error::os(format!("cannot read {tasks}"), cause))?
            .path()
            .join("schedstat");
        let shown = path.display();
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            // The thread has ended, the process has not.
            Err(_) if path.parent().is_some_and(|task| !task.exists()) => continue,
            Err(cause) => return Err(Error::os(format!("cannot read {shown}"), cause)),
        };
        total_ns += parse_schedstat_ns(&text)
            .ok_or_else(|| Error::new(format!("cannot make sense of {shown}")))?;
    }
    Ok(total_ns)
}

/// Bytes of physical memory that a process occupies (`VmRSS`, proc_pid_status(5)).
///
/// # Errors
/// When there is no such process.
pub fn rss_bytes(pid: u32) -> Result<u64> {
    status_bytes(pid, "VmRSS:")
}

/// The most physical memory that a process has occupied so far (`VmHWM`).
///
/// # Errors
/// When there is no such process.
pub fn rss_peak_bytes(pid: u32) -> Result<u64> {
    status_bytes(pid, "VmHWM:")
}

fn status_bytes(pid: u32, field: &str) -> Result<u64> {
    let path = format!("/proc/{pid}/status");
    let status = fs::read_to_string(&path)
        .map_err(|cause| Error::os(format!("cannot read {path}"), cause))?;
    parse_status_bytes(&status, field)
        .ok_or_else(|| Error::new(format!("cannot make sense of {path}")))
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

/// The first of the three numbers: time on a CPU, time waiting for one, and
/// how often (`Documentation/scheduler/sched-stats.rst`).
fn parse_schedstat_ns(text: &str) -> Option<u64> {
    text.split_ascii_whitespace().next()?.parse().ok()
}

fn parse_status_bytes(status: &str, field: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix(field))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kibibytes * 1024)
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

    #[test]
    fn reads_memory() {
        let status = "VmHWM:\t   20 kB\nVmRSS:\t   12 kB\n";
        assert_eq!(parse_status_bytes(status, "VmRSS:"), Some(12 * 1024));
        assert_eq!(parse_status_bytes(status, "VmHWM:"), Some(20 * 1024));
        assert_eq!(parse_status_bytes(status, "VmLck:"), None);
        let rss_bytes = rss_bytes(process::id()).unwrap();
        assert!(rss_bytes > 0);
        assert!(rss_peak_bytes(process::id()).unwrap() >= rss_bytes);
    }

    #[test]
    fn reads_time_on_the_cpu() {
        assert_eq!(parse_schedstat_ns("669386 42053 1\n"), Some(669_386));
        assert_eq!(parse_schedstat_ns(""), None);
        let mut busy = Command::new("sh");
        let mut busy = busy.args(["-c", "while :; do :; done"]).spawn().unwrap();
        let start = Instant::now();
        while cpu_seconds(busy.id()).unwrap() < 0.1 && start.elapsed() < Duration::from_secs(30) {
            thread::sleep(WAIT_STEP);
        }
        let used_ns = cpu_ns(busy.id()).unwrap();
        busy.kill().unwrap();
        busy.wait().unwrap();
        // Two ticks less, for what the coarser clock rounds up.
        assert!(used_ns >= 80_000_000, "{used_ns}");
        assert!(cpu_ns(u32::MAX).is_err());
    }
}
