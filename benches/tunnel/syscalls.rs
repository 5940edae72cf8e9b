//! How many system calls the link's processes make.
//!
//! Counting slows every system call of the machine a little, so it has a pass
//! of its own, after all that is timed. `perf` counts at the kernel's own
//! tracepoint; tracers such as strace stop the process at each call and so
//! change what is to be counted.

use std::io::Read;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use fastvpn::error::{Error, Result};
use nix::sys::signal::Signal;
use testbed::Child;

use crate::measure::{Sample, Stage};

const EVENT: &str = "raw_syscalls:sys_enter";

/// How long perf may take to attach to running processes.
const ATTACH_TIME: Duration = Duration::from_millis(500);

/// Payload of the UDP packets.
const UDP_BYTES: usize = 64;

/// Why system calls cannot be counted on this machine, if they cannot.
pub fn missing() -> Option<String> {
    let output = Command::new("perf")
        .args(["stat", "-x,", "-e", EVENT, "true"])
        .stdin(Stdio::null())
        .output();
    let output = match output {
        Ok(output) => output,
        Err(cause) => {
            return Some(Error::os("cannot start perf", cause).to_string());
        }
    };
    match parse_count(&String::from_utf8_lossy(&output.stderr)) {
        Some(_) => None,
        None => Some(format!("perf may not count {EVENT} here")),
    }
}

/// System calls per packet and per 10⁶ bytes; nothing if the link has no processes.
///
/// # Errors
/// When traffic or perf fails.
pub fn sample(stage: &Stage<'_>) -> Result<Sample> {
    let pids: Vec<String> = stage
        .link
        .processes
        .iter()
        .flatten()
        .map(|process| process.pid().to_string())
        .collect();
    if pids.is_empty() {
        return Ok(Vec::new());
    }
    let pids = pids.join(",");
    let (calls, flood) = counted(stage, &pids, || stage.flood(UDP_BYTES))?;
    let per_packet = calls / flood.delivered as f64;
    let time = stage.method.time;
    let (calls, bulk) = counted(stage, &pids, || stage.bulk(1, time, false))?;
    let per_mb = calls / (bulk.bytes as f64 / 1e6);
    Ok(vec![
        ("udp_64_per_packet", per_packet),
        ("tcp_1_per_mb", per_mb),
    ])
}

/// Runs `work` and counts the system calls of the processes meanwhile.
fn counted<T>(stage: &Stage<'_>, pids: &str, work: impl FnOnce() -> Result<T>) -> Result<(f64, T)> {
    let mut command = Command::new("perf");
    command
        .args(["stat", "-x,", "-e", EVENT, "-p", pids])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    // In a namespace only because what is started there ends with this process.
    let mut perf: Child = stage.pair.a.spawn(command)?;
    thread::sleep(ATTACH_TIME);
    let result = work()?;
    perf.signal(Signal::SIGINT);
    let mut output = String::new();
    if let Some(mut stderr) = perf.process().stderr.take() {
        stderr
            .read_to_string(&mut output)
            .map_err(|cause| Error::os("cannot read what perf says", cause))?;
    }
    let calls = parse_count(&output)
        .ok_or_else(|| Error::new(format!("perf counted nothing: {}", output.trim())))?;
    Ok((calls as f64, result))
}

/// The first field of perf's line about the event (perf-stat(1), CSV FORMAT).
fn parse_count(output: &str) -> Option<u64> {
    let line = output.lines().find(|line| line.contains(EVENT))?;
    line.split(',').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_count_is_read() {
        let output = "warning\n1234,,raw_syscalls:sys_enter,999,100.00,,\n";
        assert_eq!(parse_count(output), Some(1234));
        let output = "<not counted>,,raw_syscalls:sys_enter,0,100.00,,\n";
        assert_eq!(parse_count(output), None);
        assert_eq!(parse_count(""), None);
    }
}
