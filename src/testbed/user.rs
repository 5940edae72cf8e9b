//! The rights that the lab needs, with or without being root.

use std::fs::{self, OpenOptions};
use std::io;

use nix::sched::{CloneFlags, unshare};
use nix::unistd::{getegid, geteuid};

use crate::error::{Error, Result};

/// Bits of `CapEff` in /proc/self/status (linux/capability.h).
pub(crate) const CAP_NET_ADMIN: u32 = 12;
const CAP_NET_RAW: u32 = 13;
pub(crate) const CAP_SYS_ADMIN: u32 = 21;

const TUN_DEVICE: &str = "/dev/net/tun";

/// Makes sure that this process may create network namespaces: does nothing if
/// it may already, and otherwise enters a user namespace of its own, in which
/// it is root (user_namespaces(7)).
///
/// Call it while the process has one thread.
///
/// # Errors
/// When user namespaces are switched off or restricted, when the process has
/// more than one thread, or when /dev/net/tun is not ours to open. The error
/// says which, and what to do.
pub fn enter_user_namespace_if_needed() -> Result<()> {
    if capable()? {
        return Ok(());
    }
    // Root of a user namespace is nobody outside it, so the device's own
    // permissions decide. Found out here, it is a clear error.
    OpenOptions::new()
        .read(true)
        .write(true)
        .open(TUN_DEVICE)
        .map_err(|cause| {
            Error::os(format!("cannot open {TUN_DEVICE}"), cause).hint(
                "run as root, or load the module tun and let everybody use the device \
                 (chmod 666), which is safe: making interfaces needs CAP_NET_ADMIN all the same",
            )
        })?;
    if thread_count()? > 1 {
        return Err(Error::new(
            "cannot enter a user namespace: the process has more than one thread",
        ));
    }
    let (uid, gid) = (geteuid(), getegid());
    unshare(CloneFlags::CLONE_NEWUSER).map_err(|errno| {
        Error::os("cannot create a user namespace", errno.into()).hint(
            "run as root, or allow it: sysctl user.max_user_namespaces=10000 \
             kernel.unprivileged_userns_clone=1 (a container's seccomp profile may forbid it, too)",
        )
    })?;
    // Without "deny" an unprivileged process may not map its group.
    write_map("/proc/self/setgroups", "deny")?;
    write_map("/proc/self/uid_map", &format!("0 {uid} 1"))?;
    write_map("/proc/self/gid_map", &format!("0 {gid} 1"))
}

fn write_map(path: &str, text: &str) -> Result<()> {
    fs::write(path, text).map_err(|cause| {
        Error::os(format!("cannot write {path}"), cause).hint(
            "run as root, or lift AppArmor's restriction: \
             sysctl kernel.apparmor_restrict_unprivileged_userns=0",
        )
    })
}

/// Whether the process has all rights that namespaces, interfaces and raw
/// sockets take.
fn capable() -> Result<bool> {
    let path = "/proc/self/status";
    let status = fs::read_to_string(path)
        .map_err(|cause| Error::os(format!("cannot read {path}"), cause))?;
    let effective = parse_capabilities(&status).ok_or_else(|| {
        Error::os(
            format!("cannot find CapEff in {path}"),
            io::ErrorKind::InvalidData.into(),
        )
    })?;
    Ok([CAP_NET_ADMIN, CAP_NET_RAW, CAP_SYS_ADMIN]
        .iter()
        .all(|bit| effective & (1 << bit) != 0))
}

/// The effective capabilities in the text of /proc/PID/status.
pub(crate) fn parse_capabilities(status: &str) -> Option<u64> {
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(line.trim(), 16).ok()
}

fn thread_count() -> Result<usize> {
    let path = "/proc/self/task";
    fs::read_dir(path)
        .map(Iterator::count)
        .map_err(|cause| Error::os(format!("cannot read {path}"), cause))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_effective_capabilities() {
        let status = "Name:\tx\nCapPrm:\t0\nCapEff:\t0000000000203000\n";
        assert_eq!(
            parse_capabilities(status),
            Some(1 << CAP_NET_ADMIN | 1 << CAP_NET_RAW | 1 << CAP_SYS_ADMIN)
        );
        assert_eq!(parse_capabilities("CapEff:\tnonsense"), None);
    }
}
