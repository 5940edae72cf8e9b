//! The kernel's version, the process's rights, and its limits.

use std::fs;
use std::net::{Ipv4Addr, UdpSocket};

use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};
use nix::sys::socket::{setsockopt, sockopt};

use super::report::Item;
use crate::host::netlink::Netlink;
use crate::io::udp::SOCKET_BUFFER_BYTES;
use crate::testbed::effective_capabilities;

/// Linux with all that fastvpn can use, and with io_uring as fastvpn needs it.
const KERNEL_FULL: (u32, u32) = (6, 2);
const KERNEL_URING: (u32, u32) = (6, 1);

/// Descriptors of a worker: its TUN queue, two sockets, its ring, and the
/// counter that wakes it.
const DESCRIPTORS_PER_QUEUE: u64 = 5;

/// Descriptors of the process besides: standard streams, netlink, signals, and
/// some for a moment at the start.
const DESCRIPTORS_BESIDES: u64 = 16;

/// Memory that a worker's ring and buffer rings lock, where the kernel charges
/// it to the user: submission entries, completions, and a page for each buffer
/// ring. 44 KiB on Linux 6.18; a page to spare.
const LOCKED_BYTES_PER_QUEUE: u64 = 48 << 10;

/// Rings more than there are queues: the kernel takes the charge for one that
/// was only tried out back some time later.
const RINGS_BESIDES: u64 = 1;

/// Its bit in `CapEff` (linux/capability.h).
const CAP_IPC_LOCK: u32 = 14;

/// All items.
pub(super) fn items(queues: u16) -> Vec<Item> {
    let limits = |resource| getrlimit(resource).unwrap_or((RLIM_INFINITY, RLIM_INFINITY));
    // fastvpn raises its own limit on open files to the hard one.
    let (_, descriptors) = limits(Resource::RLIMIT_NOFILE);
    let (locked_bytes, _) = limits(Resource::RLIMIT_MEMLOCK);
    let may_lock = effective_capabilities().is_ok_and(|all| all & 1 << CAP_IPC_LOCK != 0);
    let locked_bytes = if may_lock {
        RLIM_INFINITY
    } else {
        locked_bytes
    };
    vec![
        kernel(&sysctl("kernel/osrelease").unwrap_or_default()),
        net_admin(),
        open_files(queues, descriptors),
        locked_memory(queues, locked_bytes),
        socket_buffers(),
    ]
}

/// A kernel parameter: `path` is below /proc/sys. `None` where this kernel or this
/// network namespace has none of that name.
fn sysctl(path: &str) -> Option<String> {
    let text = fs::read_to_string(format!("/proc/sys/{path}")).ok()?;
    Some(text.trim().to_string())
}

fn kernel(release: &str) -> Item {
    const NAME: &str = "kernel";
    let found = format!("Linux {release}");
    let cost = match parse_release(release) {
        None => return Item::unknown(NAME, format!("{release:?} is no kernel release")),
        Some(version) if version >= KERNEL_FULL => return Item::ok(NAME, found),
        Some(version) if version >= KERNEL_URING => {
            "no USO (6.2): UDP crosses the TUN packet by packet"
        }
        Some(_) => "io_uring is too old (6.1): epoll instead, with more system calls",
    };
    Item::degraded(NAME, found, cost, "Linux 6.2 or later")
}

/// The first two numbers of a release such as "6.18.44-fc-v669".
fn parse_release(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    let mut number = || numbers.next()?.parse().ok();
    Some((number()?, number()?))
}

/// Asks the kernel to change an interface that there is not: it checks the right to
/// do so first, and says `EPERM` or `ENODEV`.
fn net_admin() -> Item {
    const NAME: &str = "CAP_NET_ADMIN";
    let tried = Netlink::open().and_then(|mut netlink| netlink.set_up(i32::MAX as u32));
    match tried {
        Err(error) if error.errno() == Some(libc::EPERM) => Item::missing(
            NAME,
            "not effective in this network namespace",
            "no TUN device can be made: fastvpn does not start",
            "run as root, or: setcap cap_net_admin,cap_bpf+ep FASTVPN; in a user namespace, use \
             a network namespace of its own",
        ),
        _ => Item::ok(NAME, "effective"),
    }
}

fn open_files(queues: u16, limit: u64) -> Item {
    const NAME: &str = "open files";
    let needed = DESCRIPTORS_BESIDES + DESCRIPTORS_PER_QUEUE * u64::from(queues);
    let found = format!("at most {limit}; --queues {queues} takes {needed}");
    match limit {
        RLIM_INFINITY => Item::ok(NAME, "no limit"),
        limit if limit >= needed => Item::ok(NAME, found),
        _ => Item::missing(
            NAME,
            found,
            "fastvpn does not start with so many queues",
            "raise the limit (ulimit -Hn), or ask for fewer --queues",
        ),
    }
}

fn locked_memory(queues: u16, limit: u64) -> Item {
    const NAME: &str = "locked memory";
    let needed = LOCKED_BYTES_PER_QUEUE * (u64::from(queues) + RINGS_BESIDES);
    let (limit_kib, needed_kib) = (limit >> 10, needed >> 10);
    let found = format!("at most {limit_kib} KiB; --queues {queues} takes up to {needed_kib} KiB");
    match limit {
        RLIM_INFINITY => Item::ok(NAME, "no limit"),
        limit if limit >= needed => Item::ok(NAME, found),
        _ => Item::degraded(
            NAME,
            found,
            "io_uring may be refused to some workers: fastvpn may not start",
            "raise the limit (ulimit -l), ask for fewer --queues, or use --io epoll",
        ),
    }
}

fn socket_buffers() -> Item {
    const NAME: &str = "socket buffers";
    let wanted = SOCKET_BUFFER_BYTES;
    let may_force = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))
        .is_ok_and(|socket| setsockopt(&socket, sockopt::RcvBufForce, &wanted).is_ok());
    if may_force {
        let found = format!("{} MiB, whatever net.core.rmem_max says", wanted >> 20);
        return Item::ok(NAME, found);
    }
    let limit = |path| sysctl(path).and_then(|text| text.parse::<usize>().ok());
    let limits = limit("net/core/rmem_max").zip(limit("net/core/wmem_max"));
    let Some((receive, send)) = limits else {
        return Item::unknown(NAME, "net.core.rmem_max and wmem_max do not show here");
    };
    let found = format!("net.core.rmem_max={receive}, wmem_max={send}");
    if receive >= wanted && send >= wanted {
        return Item::ok(NAME, found);
    }
    Item::degraded(
        NAME,
        found,
        "datagrams are lost when a worker has to wait for its core",
        &format!("sysctl -w net.core.rmem_max={wanted} net.core.wmem_max={wanted}"),
    )
}

#[cfg(test)]
mod tests {
    use super::super::report::Status;
    use super::*;

    #[test]
    fn reads_releases() {
        assert_eq!(parse_release("6.18.44-fc-v669"), Some((6, 18)));
        assert_eq!(parse_release("6.1-rc3"), Some((6, 1)));
        assert_eq!(parse_release("5.10.0-28-amd64"), Some((5, 10)));
        assert_eq!(parse_release("6"), None);
        assert_eq!(parse_release(""), None);
    }

    #[test]
    fn the_kernel_stands_where_the_readme_says() {
        let status = |release| kernel(release).status;
        for release in ["6.2.0", "6.18.44", "7.0.1"] {
            assert_eq!(status(release), Status::Ok, "{release}");
        }
        for release in ["6.1.0-50-cloud-amd64", "5.10.0"] {
            assert_eq!(status(release), Status::Degraded, "{release}");
        }
        assert_eq!(status("BSD"), Status::Unknown);
    }

    #[test]
    fn limits_count_with_the_queues() {
        assert_eq!(open_files(1, 100).status, Status::Ok);
        assert_eq!(open_files(64, 100).status, Status::Missing);
        assert_eq!(open_files(64, RLIM_INFINITY).status, Status::Ok);
        assert_eq!(locked_memory(1, 96 << 10).status, Status::Ok);
        assert_eq!(locked_memory(64, 96 << 10).status, Status::Degraded);
        assert_eq!(locked_memory(64, RLIM_INFINITY).status, Status::Ok);
    }
}
