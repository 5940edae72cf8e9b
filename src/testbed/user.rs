//! The right to make network namespaces, with or without being root.

use std::fs;

use nix::sched::{CloneFlags, unshare};
use nix::unistd::{getegid, geteuid};

use crate::error::{Error, Result};

/// The rights that namespaces, interfaces and raw sockets take: CAP_NET_ADMIN,
/// CAP_NET_RAW and CAP_SYS_ADMIN (linux/capability.h).
const CAPABILITIES: u64 = 1 << 12 | 1 << 13 | 1 << 21;

/// Makes sure that this process may create network namespaces: does nothing if
/// it may already, and otherwise enters a user namespace of its own, in which
/// it is root (user_namespaces(7)).
///
/// Call it while the process has one thread.
///
/// # Errors
/// When user namespaces are switched off or restricted, or when the process has
/// more than one thread.
pub fn enter_user_namespace_if_needed() -> Result<()> {
    if effective_capabilities()? & CAPABILITIES == CAPABILITIES {
        return Ok(());
    }
    let (uid, gid) = (geteuid(), getegid());
    unshare(CloneFlags::CLONE_NEWUSER).map_err(|errno| {
        Error::os("cannot create a user namespace", errno.into()).hint(
            "run as root, or allow it: sysctl user.max_user_namespaces=10000 \
             kernel.unprivileged_userns_clone=1 (a container's seccomp profile may forbid it, too)",
        )
    })?;
    // Without "deny" an unprivileged process may not map its group.
    for (file, text) in [
        ("setgroups", "deny".into()),
        ("uid_map", format!("0 {uid} 1")),
        ("gid_map", format!("0 {gid} 1")),
    ] {
        fs::write(format!("/proc/self/{file}"), text).map_err(|cause| {
            Error::os(format!("cannot write /proc/self/{file}"), cause).hint(
                "run as root, or lift AppArmor's restriction: \
                 sysctl kernel.apparmor_restrict_unprivileged_userns=0",
            )
        })?;
    }
    Ok(())
}

/// What this process may do: `CapEff` of proc_pid_status(5), a bit for each.
pub(crate) fn effective_capabilities() -> Result<u64> {
    let path = "/proc/self/status";
    let status = fs::read_to_string(path)
        .map_err(|cause| Error::os(format!("cannot read {path}"), cause))?;
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    line.and_then(|digits| u64::from_str_radix(digits.trim(), 16).ok())
        .ok_or_else(|| Error::new(format!("cannot find CapEff in {path}")))
}
