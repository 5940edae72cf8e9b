//! What processes cost.

use std::fs;

use fastvpn::error::{Error, Result};

/// CPU time that the threads of a process that run now have used so far, user
/// and system: nanoseconds as the scheduler counts them (`/proc/PID/task/*/schedstat`).
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
    use std::process;
    use std::time::{Duration, Instant};

    use super::*;

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
        let mut busy = process::Command::new("sh");
        let mut busy = busy.args(["-c", "while :; do :; done"]).spawn().unwrap();
        let start = Instant::now();
        while cpu_ns(busy.id()).unwrap() < 80_000_000 {
            assert!(start.elapsed() < Duration::from_secs(30));
        }
        busy.kill().unwrap();
        busy.wait().unwrap();
        assert!(cpu_ns(u32::MAX).is_err());
    }
}
