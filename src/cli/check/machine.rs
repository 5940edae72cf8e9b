//! The kernel, the processor, and the cores that this process may use.

use super::item::Item;
use super::read;
use crate::config;
use crate::config::parse_cores;

/// Linux with all that fastvpn can use, and with io_uring as fastvpn needs it.
const KERNEL_FULL: (u32, u32) = (6, 2);
const KERNEL_URING: (u32, u32) = (6, 1);

/// What was found.
#[derive(Clone, Debug)]
pub struct Facts {
    release: String,
    architecture: &'static str,
    has_avx2: bool,
    /// Cores that are switched on.
    cores_online: Option<usize>,
    /// Those that this process may run on (`sched_getaffinity(2)`).
    cores_allowed: usize,
    /// The same less what a cgroup's CPU quota takes away.
    parallelism: usize,
    /// `--queues`, given or default.
    queues: u16,
}

/// Reads it all; never waits.
pub fn probe(queues: u16) -> Facts {
    let online = std::fs::read_to_string("/sys/devices/system/cpu/online").ok();
    let online = online.and_then(|list| parse_cores(list.trim()).ok());
    Facts {
        release: read::sysctl("kernel/osrelease").unwrap_or_default(),
        architecture: std::env::consts::ARCH,
        has_avx2: has_avx2(),
        cores_online: online.map(|list| list.0.len()),
        cores_allowed: core_affinity::get_core_ids().map_or(1, |cores| cores.len()),
        parallelism: std::thread::available_parallelism().map_or(1, usize::from),
        queues,
    }
}

fn has_avx2() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        std::arch::is_x86_feature_detected!("avx2")
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        false
    }
}

/// What it means.
pub fn items(facts: &Facts) -> Vec<Item> {
    vec![kernel(&facts.release), processor(facts), cores(facts)]
}

fn kernel(release: &str) -> Item {
    const NAME: &str = "kernel";
    let found = format!("Linux {release}");
    let remedy = "Linux 6.2 or later";
    match parse_release(release) {
        None => Item::unknown(NAME, format!("{release:?} is no kernel release")),
        Some(version) if version >= KERNEL_FULL => Item::ok(NAME, found),
        Some(version) if version >= KERNEL_URING => {
            let cost = "no USO (6.2): UDP crosses the TUN packet by packet";
            Item::degraded(NAME, found, cost, remedy)
        }
        Some(_) => {
            let cost = "io_uring is too old (6.1): epoll instead, with more system calls";
            Item::degraded(NAME, found, cost, remedy)
        }
    }
}

/// The first two numbers of a release such as "6.18.44-fc-v669".
fn parse_release(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    let mut number = || numbers.next()?.parse().ok();
    Some((number()?, number()?))
}

fn processor(facts: &Facts) -> Item {
    const NAME: &str = "processor";
    match (facts.architecture, facts.has_avx2) {
        ("x86_64", true) => Item::ok(NAME, "x86_64 with AVX2"),
        ("x86_64", false) => Item::degraded(
            NAME,
            "x86_64 without AVX2",
            "checksums take narrower instructions",
            "a virtual machine's processor model with AVX2 (often called \"host\")",
        ),
        (other, _) => Item::info(NAME, format!("{other}; fastvpn has run on x86_64 only")),
    }
}

fn cores(facts: &Facts) -> Item {
    const NAME: &str = "cores";
    let allowed = facts.cores_allowed;
    let mut found = match facts.cores_online {
        Some(online) if online != allowed => format!("{allowed} of {online} for this process"),
        _ => format!("{allowed}"),
    };
    if facts.parallelism < allowed {
        found += &format!(", {} by CPU quota", facts.parallelism);
    }
    let default = config::default_queues();
    if facts.queues == default {
        found += &format!("; --queues {default} by default");
    } else {
        found += &format!("; --queues {} asked for", facts.queues);
    }
    if usize::from(facts.queues) > facts.parallelism {
        let cost = "more queues than cores make small packets slower";
        let remedy = format!("--queues {}", facts.parallelism);
        return Item::degraded(NAME, found, cost, remedy);
    }
    Item::ok(NAME, found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::check::item::Status;

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
        for (release, cost) in [("6.1.0", "USO"), ("5.15.0", "epoll")] {
            let item = kernel(release);
            assert_eq!(item.status, Status::Degraded, "{release}");
            assert!(item.cost.unwrap().contains(cost), "{release}");
        }
        assert_eq!(status("strange"), Status::Unknown);
    }

    #[test]
    fn counts_cores() {
        let facts = Facts {
            release: String::new(),
            architecture: "x86_64",
            has_avx2: true,
            cores_online: Some(8),
            cores_allowed: 3,
            parallelism: 2,
            queues: 7,
        };
        let item = cores(&facts);
        assert_eq!(item.status, Status::Degraded);
        assert_eq!(
            item.found,
            "3 of 8 for this process, 2 by CPU quota; --queues 7 asked for"
        );
        let enough = cores(&Facts { queues: 2, ..facts });
        assert_eq!(enough.status, Status::Ok);
    }
}
