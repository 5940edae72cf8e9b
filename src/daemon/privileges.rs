//! What the process may do (capabilities(7)): what a tunnel needs, now and later, and nothing
//! else that it was started with.
//!
//! There is no filter of system calls here. The processes that this one starts would have it,
//! too: nft(8), and after an upgrade another fastvpn, which may need calls that this one does
//! not know of. A service manager's filter is each program's own, see docs/systemd.md.

use caps::errors::CapsError;
use caps::{CapSet, Capability, CapsHashSet};
use nix::sys::prctl::set_no_new_privs;

/// What a tunnel needs, also after its start:
/// - `CAP_NET_ADMIN`: the TUN device, addresses, routes, marks, large socket buffers; nft(8).
/// - `CAP_BPF`: programs that choose TUN queues and sockets.
/// - `CAP_NET_BIND_SERVICE`: ports below 1024, which `wg` may set later.
/// - `CAP_DAC_READ_SEARCH`: what a start by root could read, a reload and an upgrade can, too.
const NEEDED: [Capability; 4] = [
    Capability::CAP_NET_ADMIN,
    Capability::CAP_BPF,
    Capability::CAP_NET_BIND_SERVICE,
    Capability::CAP_DAC_READ_SEARCH,
];

/// Gives up what the process has and a tunnel does not need, and the way to more by exec(2):
/// for this thread and those that it starts. `CAP_DAC_OVERRIDE` goes as well: root then
/// writes what is root's own.
pub fn reduce() {
    // Before Linux 5.8 it takes CAP_SYS_ADMIN to load a program.
    let has_bpf = caps::runtime::thread_all_supported().contains(&Capability::CAP_BPF);
    if has_bpf && let Err(error) = keep(&CapsHashSet::from(NEEDED)) {
        tracing::warn!(%error, "running with more privileges than needed: {error}");
    }
    if let Err(errno) = set_no_new_privs() {
        tracing::warn!(error = %errno, "programs that are started may gain privileges: {errno}");
    }
}

fn keep(needed: &CapsHashSet) -> Result<(), CapsError> {
    if caps::has_cap(None, CapSet::Effective, Capability::CAP_SETPCAP)? {
        for more in caps::read(None, CapSet::Bounding)?.difference(needed) {
            caps::drop(None, CapSet::Bounding, *more)?;
        }
    }
    // Effective ones have to be permitted.
    for set in [
        CapSet::Ambient,
        CapSet::Inheritable,
        CapSet::Effective,
        CapSet::Permitted,
    ] {
        let kept = &caps::read(None, set)? & needed;
        caps::set(None, set, &kept)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rights are a thread's own: those of other tests stay.
    #[test]
    fn a_thread_keeps_what_it_needs_of_what_it_has() {
        let rights = || {
            use CapSet::{Ambient, Bounding, Effective, Inheritable, Permitted};
            [Ambient, Bounding, Effective, Inheritable, Permitted]
                .map(|set| caps::read(None, set).unwrap())
        };
        // What only some rights open, also to root.
        let file = tempfile::NamedTempFile::new().unwrap();
        let shut = std::os::unix::fs::PermissionsExt::from_mode(0o000);
        file.as_file().set_permissions(shut).unwrap();
        let path = file.path().to_path_buf();
        let can_read = move || std::fs::read(&path).is_ok();
        let reduced = std::thread::spawn(move || {
            let before = (rights(), can_read());
            reduce();
            (before, (rights(), can_read()))
        });
        let ((before, could_read), (after, can_read)) = reduced.join().unwrap();
        assert_eq!(can_read, could_read);
        let needed = CapsHashSet::from(NEEDED);
        let can_bound = before[2].contains(&Capability::CAP_SETPCAP);
        for (index, (before, after)) in before.iter().zip(&after).enumerate() {
            if index != 1 || can_bound {
                assert_eq!(*after, before & &needed);
            }
        }
    }
}
