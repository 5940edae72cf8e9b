//! Limits on this process (`getrlimit(2)`).

use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};

use super::item::Item;

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

/// What was found.
#[derive(Clone, Copy, Debug)]
pub struct Facts {
    /// Hard limit on open files: fastvpn raises its own to it.
    descriptors: Option<u64>,
    /// Soft limit on locked memory.
    locked_bytes: Option<u64>,
    /// CAP_IPC_LOCK: the limit does not apply.
    may_lock: bool,
    queues: u16,
}

/// Reads it all; never waits.
pub fn probe(queues: u16, may_lock: bool) -> Facts {
    let finite = |limit| (limit != RLIM_INFINITY).then_some(limit);
    let limits = |resource| getrlimit(resource).unwrap_or((RLIM_INFINITY, RLIM_INFINITY));
    Facts {
        descriptors: finite(limits(Resource::RLIMIT_NOFILE).1),
        locked_bytes: finite(limits(Resource::RLIMIT_MEMLOCK).0),
        may_lock,
        queues,
    }
}

/// What it means.
pub fn items(facts: &Facts) -> Vec<Item> {
    vec![descriptors(facts), locked_memory(facts)]
}

fn descriptors(facts: &Facts) -> Item {
    const NAME: &str = "open files";
    let queues = facts.queues;
    let needed = DESCRIPTORS_BESIDES + DESCRIPTORS_PER_QUEUE * u64::from(queues);
    let needs = format!("--queues {queues} takes {needed}");
    match facts.descriptors {
        None => Item::ok(NAME, format!("no limit; {needs}")),
        Some(limit) if limit >= needed => Item::ok(NAME, format!("at most {limit}; {needs}")),
        Some(limit) => Item::missing(
            NAME,
            format!("at most {limit}; {needs}"),
            "fastvpn does not start with so many queues",
            "raise the limit (ulimit -Hn), or ask for fewer --queues",
        ),
    }
}

fn locked_memory(facts: &Facts) -> Item {
    const NAME: &str = "locked memory";
    let queues = facts.queues;
    let needed = LOCKED_BYTES_PER_QUEUE * (u64::from(queues) + RINGS_BESIDES);
    let needs = format!("--queues {queues} takes up to {} KiB", needed >> 10);
    match facts.locked_bytes {
        _ if facts.may_lock => Item::ok(NAME, "no limit (CAP_IPC_LOCK)"),
        None => Item::ok(NAME, "no limit"),
        Some(limit) if limit >= needed => {
            Item::ok(NAME, format!("at most {} KiB; {needs}", limit >> 10))
        }
        Some(limit) => Item::degraded(
            NAME,
            format!("at most {} KiB; {needs}", limit >> 10),
            "io_uring may be refused to some workers: fastvpn may not start",
            "raise the limit (ulimit -l), ask for fewer --queues, or use --io epoll",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::check::item::Status;

    #[test]
    fn limits_count_with_the_queues() {
        let few = Facts {
            descriptors: Some(100),
            locked_bytes: Some(96 << 10),
            may_lock: false,
            queues: 1,
        };
        let many = Facts { queues: 64, ..few };
        assert_eq!(descriptors(&few).status, Status::Ok);
        assert_eq!(descriptors(&many).status, Status::Missing);
        assert_eq!(locked_memory(&few).status, Status::Ok);
        assert_eq!(locked_memory(&many).status, Status::Degraded);
        let unlimited = Facts {
            descriptors: None,
            may_lock: true,
            ..many
        };
        assert_eq!(descriptors(&unlimited).status, Status::Ok);
        assert_eq!(locked_memory(&unlimited).status, Status::Ok);
    }
}
