//! Where control sockets are unless something else is asked for.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use super::options::Config;

/// The directory of all of them.
pub(crate) const CONTROL_DIRECTORY: &str = "/run/fastvpn";

impl Config {
    /// Path of the control socket.
    pub(crate) fn control_path(&self) -> PathBuf {
        let given = self.control.clone();
        given.unwrap_or_else(|| default_control_path(&self.tun))
    }
}

/// `/run/fastvpn/NAME.sock`; in another network namespace than the host's also
/// with the namespace's number, since `/run` may be shared and the name is
/// unique in its namespace only.
pub(crate) fn default_control_path(tun: &str) -> PathBuf {
    let name = match namespace_of_its_own() {
        Some(inode) => format!("{tun}-{inode}.sock"),
        None => format!("{tun}.sock"),
    };
    Path::new(CONTROL_DIRECTORY).join(name)
}

/// The sockets in [`CONTROL_DIRECTORY`] that are named as [`default_control_path`]
/// names them in this network namespace.
pub(crate) fn default_control_paths() -> Vec<PathBuf> {
    let suffix = default_control_path("");
    let suffix = suffix.file_name().unwrap_or_default().as_encoded_bytes();
    let entries = std::fs::read_dir(CONTROL_DIRECTORY).into_iter().flatten();
    let mut paths: Vec<PathBuf> = entries
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.as_os_str().as_encoded_bytes().ends_with(suffix))
        .collect();
    paths.sort();
    paths
}

/// The number of this process's network namespace, unless it is the host's: that
/// of process 1, for those that may inspect it (ptrace(2)), as in a container of
/// its own. For others the kernel's first namespace, the only one with the
/// settings of net/core/sysctl_net_core.c's `net_core_table`.
///
/// Once for the process, with the rights that it has when it asks first.
fn namespace_of_its_own() -> Option<u64> {
    static INODE: OnceLock<Option<u64>> = OnceLock::new();
    *INODE.get_or_init(look_for_namespace_of_its_own)
}

fn look_for_namespace_of_its_own() -> Option<u64> {
    use std::os::unix::fs::MetadataExt;
    let inode = |path: &str| std::fs::metadata(path).map(|metadata| metadata.ino());
    let own = inode("/proc/self/ns/net").ok()?;
    let is_the_hosts = match inode("/proc/1/ns/net") {
        Ok(first) => own == first,
        Err(_) => Path::new("/proc/sys/net/core/netdev_budget").exists(),
    };
    (!is_the_hosts).then_some(own)
}
