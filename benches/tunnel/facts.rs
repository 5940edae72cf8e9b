//! When, what and on what machine a run was.

use std::fs;
use std::process::{Command, Stdio};
use std::thread;

/// Now, RFC 3339, UTC, in whole seconds.
pub fn now() -> String {
    let seconds = jiff::Timestamp::now().as_second();
    jiff::Timestamp::from_second(seconds).map_or_else(|_| String::new(), |now| now.to_string())
}

/// Version of fastvpn, with the commit if this is a checkout.
pub fn version() -> String {
    let version = env!("CARGO_PKG_VERSION");
    let git = |arguments: &[&str]| {
        let output = Command::new("git")
            .args(["-C", env!("CARGO_MANIFEST_DIR")])
            .args(arguments)
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .output()
            .ok()?;
        let text = String::from_utf8_lossy(&output.stdout).trim().to_string();
        output.status.success().then_some(text)
    };
    let Some(commit) = git(&["rev-parse", "--short", "HEAD"]) else {
        return version.into();
    };
    let changed = git(&["status", "--porcelain", "--untracked-files=no"])
        .is_some_and(|status| !status.is_empty());
    let changed = if changed { ", changed" } else { "" };
    format!("{version} ({commit}{changed})")
}

/// Facts about the machine, as name and value; what is not known is left out.
pub fn machine() -> Vec<(String, String)> {
    let read = |path| fs::read_to_string(path).ok();
    let cpu_info = read("/proc/cpuinfo").unwrap_or_default();
    let virtual_machine = field(&cpu_info, "flags").map(|flags| {
        let is = flags.split_whitespace().any(|flag| flag == "hypervisor");
        if is { "yes" } else { "no" }.to_string()
    });
    let memory = read("/proc/meminfo").and_then(|text| field(&text, "MemTotal").and_then(gib));
    let facts = [
        (
            "kernel",
            read("/proc/sys/kernel/osrelease").map(|text| text.trim().into()),
        ),
        ("architecture", Some(std::env::consts::ARCH.into())),
        ("CPU", field(&cpu_info, "model name").map(String::from)),
        (
            "cores",
            thread::available_parallelism()
                .ok()
                .map(|cores| cores.to_string()),
        ),
        ("memory", memory),
        ("virtual machine", virtual_machine),
    ];
    facts
        .into_iter()
        .filter_map(|(name, value)| Some((name.to_string(), value?)))
        .collect()
}

/// The value of the first line `NAME : VALUE`.
fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines().find_map(|line| {
        let (found, value) = line.split_once(':')?;
        (found.trim() == name).then_some(value.trim())
    })
}

/// `"24601 kB"` as GiB.
fn gib(kibibytes: &str) -> Option<String> {
    let kibibytes: f64 = kibibytes.strip_suffix("kB")?.trim().parse().ok()?;
    Some(format!("{:.1} GiB", kibibytes / 1024.0 / 1024.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found() {
        let text = "processor\t: 0\nmodel name\t: Some CPU: fast\n\nprocessor : 1\n";
        assert_eq!(field(text, "model name"), Some("Some CPU: fast"));
        assert_eq!(field(text, "processor"), Some("0"));
        assert_eq!(field(text, "model"), None);
        assert_eq!(gib("25165824 kB").as_deref(), Some("24.0 GiB"));
        assert_eq!(gib("many"), None);
    }

    #[test]
    fn now_is_a_time_in_utc() {
        let now = now();
        assert!(now.len() == 20 && now.ends_with('Z'), "{now}");
        assert!(now.parse::<jiff::Timestamp>().is_ok(), "{now}");
    }
}
