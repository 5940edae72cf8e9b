//! Who else uses the machine: other processes, and on a virtual machine its host.

use std::fs;
use std::process;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use fastvpn::error::{Error, Result};

/// `USER_HZ`, see [`testbed::cpu_ns`].
const TICKS_PER_SECOND: f64 = 100.0;

/// `PF_KTHREAD` (linux/sched.h): the kernel's threads work for whoever causes
/// the work, mostly the traffic that is measured.
const KERNEL_THREAD: u64 = 0x0020_0000;

/// A sample is disturbed when others used more of one core than this.
pub const OTHERS_PERCENT_MAX: f64 = 5.0;

/// How long the machine is watched at a time, and how long it may take until
/// it is quiet.
const WINDOW: Duration = Duration::from_millis(200);
const QUIET_WAIT_MAX: Duration = Duration::from_secs(5);

/// CPU time that others had used at some moment.
pub struct Others {
    at: Instant,
    ticks: u64,
}

impl Others {
    /// Reads it.
    ///
    /// # Errors
    /// When /proc is not what it should be.
    pub fn now() -> Result<Self> {
        let processes = read_processes()?;
        let stat = fs::read_to_string("/proc/stat")
            .map_err(|cause| Error::os("cannot read /proc/stat", cause))?;
        Ok(Self {
            at: Instant::now(),
            ticks: others_ticks(&processes, process::id()) + parse_steal_ticks(&stat).unwrap_or(0),
        })
    }

    /// What they have used since, in percent of one core.
    ///
    /// # Errors
    /// As [`Others::now`].
    pub fn percent_since(&self) -> Result<f64> {
        let now = Self::now()?;
        let used_seconds = now.ticks.saturating_sub(self.ticks) as f64 / TICKS_PER_SECOND;
        Ok(used_seconds / (now.at - self.at).as_secs_f64() * 100.0)
    }
}

/// Waits until others leave the machine alone, or [`QUIET_WAIT_MAX`] is over.
///
/// # Errors
/// As [`Others::now`].
pub fn wait(stop: &AtomicBool) -> Result<()> {
    let start = Instant::now();
    while start.elapsed() < QUIET_WAIT_MAX && !stop.load(Ordering::Relaxed) {
        let before = Others::now()?;
        thread::sleep(WINDOW);
        if before.percent_since()? <= OTHERS_PERCENT_MAX {
            break;
        }
    }
    Ok(())
}

/// A line of /proc/PID/stat, as far as it matters here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct ProcessTimes {
    pid: u32,
    parent: u32,
    is_kernel: bool,
    /// Of its threads, and of the children that it has waited for: so the sum
    /// over all processes loses nothing when one ends.
    ticks: u64,
}

fn read_processes() -> Result<Vec<ProcessTimes>> {
    let entries = fs::read_dir("/proc").map_err(|cause| Error::os("cannot read /proc", cause))?;
    let mut processes = Vec::new();
    for entry in entries {
        let entry = entry.map_err(|cause| Error::os("cannot read /proc", cause))?;
        let name = entry.file_name();
        if !name
            .to_string_lossy()
            .bytes()
            .all(|byte| byte.is_ascii_digit())
        {
            continue;
        }
        // A process that has just ended is not an error.
        let stat = fs::read_to_string(entry.path().join("stat"));
        processes.extend(stat.ok().as_deref().and_then(parse_process));
    }
    Ok(processes)
}

/// proc_pid_stat(5): fields 1 pid, 4 ppid, 9 flags, 14 to 17 times.
fn parse_process(stat: &str) -> Option<ProcessTimes> {
    let (pid, rest) = stat.split_once(" (")?;
    // The name may contain anything.
    let (_, fields) = rest.rsplit_once(')')?;
    let fields: Vec<&str> = fields.split_ascii_whitespace().collect();
    let number = |field: usize| fields.get(field - 3)?.parse::<u64>().ok();
    Some(ProcessTimes {
        pid: pid.parse().ok()?,
        parent: u32::try_from(number(4)?).ok()?,
        is_kernel: number(9)? & KERNEL_THREAD != 0,
        ticks: number(14)? + number(15)? + number(16)? + number(17)?,
    })
}

/// Ticks of all processes but the kernel's, `own`, and its descendants.
fn others_ticks(processes: &[ProcessTimes], own: u32) -> u64 {
    let parent = |pid: u32| {
        let found = processes.iter().find(|process| process.pid == pid);
        found.map(|process| process.parent)
    };
    let is_ours = |process: &ProcessTimes| {
        // As many steps as there are processes, should they form a ring while
        // they are read one by one.
        std::iter::successors(Some(process.pid), |&pid| parent(pid))
            .take(processes.len() + 1)
            .any(|pid| pid == own)
    };
    processes
        .iter()
        .filter(|process| !process.is_kernel && !is_ours(process))
        .map(|process| process.ticks)
        .sum()
}

/// Time that the host of a virtual machine gave to others (proc_stat(5)).
fn parse_steal_ticks(stat: &str) -> Option<u64> {
    let line = stat.lines().find_map(|line| line.strip_prefix("cpu "))?;
    line.split_ascii_whitespace().nth(7)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(pid: u32, parent: u32, ticks: u64) -> ProcessTimes {
        ProcessTimes {
            pid,
            parent,
            is_kernel: false,
            ticks,
        }
    }

    #[test]
    fn a_process_is_read() {
        let stat = "42 (a) (b c) S 7 1 1 0 -1 2129984 9 9 9 9 1 20 300 4000 20 0 1 0 55";
        let expected = ProcessTimes {
            is_kernel: true,
            ..process(42, 7, 4321)
        };
        assert_eq!(parse_process(stat), Some(expected));
        assert_eq!(parse_process("42 (a) S 7"), None);
        assert_eq!(parse_process(""), None);
    }

    #[test]
    fn only_others_count() {
        let mut processes = vec![
            process(1, 0, 1),
            process(10, 1, 20),
            process(11, 10, 300),
            process(12, 11, 4000),
            process(13, 1, 50_000),
        ];
        processes.push(ProcessTimes {
            is_kernel: true,
            ..process(2, 0, 600_000)
        });
        assert_eq!(others_ticks(&processes, 10), 50_001);
        let ring = [process(5, 6, 1), process(6, 5, 1)];
        assert_eq!(others_ticks(&ring, 10), 2);
    }

    #[test]
    fn stolen_time_is_read() {
        let stat = "cpu  1 2 3 4 5 6 7 88 9 10\ncpu0 1 2 3 4 5 6 7 8 9 10\n";
        assert_eq!(parse_steal_ticks(stat), Some(88));
        assert_eq!(parse_steal_ticks("cpu0 1"), None);
    }
}
