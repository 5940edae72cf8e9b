//! Capabilities, over what they extend, and whether eBPF programs load.

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use super::item::Item;
use super::read::{self, Tried};
use crate::io::tun::steering;
use crate::testbed::effective_capabilities;

/// Bits of `CapEff` (linux/capability.h).
const CAP_NET_ADMIN: u32 = 12;
const CAP_SYS_ADMIN: u32 = 21;
pub const CAP_IPC_LOCK: u32 = 14;
pub const CAP_MKNOD: u32 = 27;
const CAP_BPF: u32 = 39;

/// The map of a process that is in the first user namespace
/// (user_namespaces(7)).
const IDENTITY_MAP: [&str; 3] = ["0", "0", "4294967295"];

/// What was found.
#[derive(Clone, Debug)]
pub struct Facts {
    effective: u64,
    /// Whether capabilities here extend to this network namespace.
    owns_network: bool,
    /// /proc/self/uid_map.
    uid_map: String,
    /// The kernel's answer to the program that picks TUN queues.
    program: Tried<()>,
}

impl Facts {
    /// Whether this process has a capability, by its bit.
    pub fn has(&self, capability: u32) -> bool {
        self.effective & (1 << capability) != 0
    }

    /// Whether it may make interfaces in this network namespace.
    pub fn may_make_interfaces(&self) -> bool {
        self.has(CAP_NET_ADMIN) && self.owns_network
    }

    /// Whether its capabilities extend to the machine, not to a user namespace
    /// of its own alone.
    pub fn in_first_user_namespace(&self) -> bool {
        self.uid_map.split_whitespace().eq(IDENTITY_MAP)
    }
}

/// Reads it all; never waits.
pub fn probe() -> Facts {
    Facts {
        effective: effective_capabilities().unwrap_or(0),
        owns_network: owns_network(),
        uid_map: std::fs::read_to_string("/proc/self/uid_map").unwrap_or_default(),
        program: steering::probe().map_err(|error| read::errno(&error)),
    }
}

mod ioctl {
    // NS_GET_USERNS, `linux/nsfs.h`.
    nix::ioctl_none!(owner, 0xb7, 0x1);
}

/// Whether the network namespace belongs to this process's user namespace or
/// one below it: the kernel names no other (ioctl_ns(2)).
fn owns_network() -> bool {
    let Ok(namespace) = File::open("/proc/thread-self/ns/net") else {
        // Nothing says that it does not.
        return true;
    };
    // SAFETY: the descriptor is open, and the request takes no argument.
    match unsafe { ioctl::owner(namespace.as_raw_fd()) } {
        Ok(descriptor) => {
            // SAFETY: the request returned a new descriptor that nobody else has.
            drop(unsafe { OwnedFd::from_raw_fd(descriptor) });
            true
        }
        Err(error) => error != nix::errno::Errno::EPERM,
    }
}

/// What it means.
pub fn items(facts: &Facts) -> Vec<Item> {
    vec![net_admin(facts), bpf(facts), user_namespace(facts)]
}

fn net_admin(facts: &Facts) -> Item {
    const NAME: &str = "CAP_NET_ADMIN";
    let cost = "no TUN device can be made: fastvpn does not start";
    if facts.may_make_interfaces() {
        return Item::ok(NAME, "effective");
    }
    if facts.has(CAP_NET_ADMIN) {
        let found = "effective, but not over this network namespace, which is another user \
                     namespace's";
        let remedy = "run it in a network namespace of its own user namespace, or as root outside";
        return Item::missing(NAME, found, cost, remedy);
    }
    let remedy = "run as root, or: setcap cap_net_admin,cap_bpf+ep FASTVPN";
    Item::missing(NAME, "not effective", cost, remedy)
}

fn bpf(facts: &Facts) -> Item {
    const NAME: &str = "CAP_BPF";
    let held = if facts.has(CAP_BPF) {
        "effective"
    } else if facts.has(CAP_SYS_ADMIN) {
        "effective by CAP_SYS_ADMIN"
    } else {
        "not effective"
    };
    let Err(errno) = facts.program else {
        return Item::ok(NAME, format!("{held}; the steering program loads"));
    };
    let found = format!(
        "{held}; the steering program does not load: {}",
        read::errno_text(errno)
    );
    let cost = "the TUN driver picks queues: flows may be reordered unless both ends have the \
                same --queues";
    let remedy = match held {
        "not effective" => "run as root, or: setcap cap_net_admin,cap_bpf+ep FASTVPN",
        _ if !facts.in_first_user_namespace() => "run it outside of a user namespace",
        _ => "see the container's seccomp profile and the kernel's lockdown",
    };
    Item::degraded(NAME, found, cost, remedy)
}

fn user_namespace(facts: &Facts) -> Item {
    const NAME: &str = "user namespace";
    if facts.in_first_user_namespace() {
        return Item::info(NAME, "the machine's first");
    }
    Item::info(NAME, "one of its own: rights end at what belongs to it")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::check::item::Status;

    fn facts(capabilities: &[u32], program: Tried<()>) -> Facts {
        Facts {
            effective: capabilities.iter().map(|bit| 1 << bit).sum(),
            owns_network: true,
            uid_map: "         0          0 4294967295\n".into(),
            program,
        }
    }

    #[test]
    fn without_net_admin_nothing_runs() {
        let none = net_admin(&facts(&[CAP_BPF], Ok(())));
        assert_eq!(none.status, Status::Missing);
        assert!(none.remedy.unwrap().contains("setcap cap_net_admin"));
        let held = facts(&[CAP_NET_ADMIN], Ok(()));
        assert_eq!(net_admin(&held).status, Status::Ok);
        let elsewhere = Facts {
            owns_network: false,
            ..held
        };
        assert_eq!(net_admin(&elsewhere).status, Status::Missing);
    }

    #[test]
    fn what_loads_counts_not_what_is_held() {
        let refused = Err(libc::EPERM);
        assert_eq!(bpf(&facts(&[], Ok(()))).status, Status::Ok);
        let without = bpf(&facts(&[], refused));
        assert_eq!(without.status, Status::Degraded);
        assert!(without.remedy.unwrap().contains("cap_bpf"));
        let inside = Facts {
            uid_map: "0 1000 1".into(),
            ..facts(&[CAP_BPF], refused)
        };
        assert!(bpf(&inside).remedy.unwrap().contains("user namespace"));
        assert!(
            bpf(&facts(&[CAP_BPF], refused))
                .remedy
                .unwrap()
                .contains("seccomp")
        );
    }

    #[test]
    fn this_process_owns_its_network_if_it_is_root() {
        // In the first user namespace everything is ours or below.
        let found = probe();
        assert!(!found.in_first_user_namespace() || found.owns_network);
    }
}
