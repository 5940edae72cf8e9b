//! `fastvpn check`: what this host offers a tunnel, what that costs where it
//! is not all, and how to mend it.
//!
//! Every area has a file of its own, with a `probe` that finds facts out and
//! an `items` that says what they mean and touches nothing: `machine`,
//! `rights`, `limits`, `uring`, `tun`, `udp`, `host`, `peer`,
//! `interface`, `names`, `config`. `item` is what they say and `render` how it is
//! shown.
//!
//! What can be tried is tried, with the tunnel's own code, in network
//! namespaces that the host does not see (`scratch`). Nothing on the host is
//! changed. What takes rights that the process lacks is said not to have been
//! probed. What might wait runs on a thread that is given up when time is over
//! (`pending`).

mod ask;
mod config;
mod ethtool;
mod host;
mod interface;
mod item;
mod limits;
mod machine;
mod names;
mod peer;
mod pending;
mod read;
mod render;
mod rights;
mod scratch;
mod tun;
mod udp;
mod uring;

use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use self::item::Item;
use crate::config::{PeerName, parse_peer_name};
use crate::config::{QUEUES, default_queues};

/// How long all of it may take.
const TIME_MAX: Duration = Duration::from_millis(1800);

/// Options of `fastvpn check`.
#[derive(Debug, Clone, clap::Args)]
pub struct CheckOptions {
    /// Also check the way to this host: address or DNS name, port 8285 unless given
    #[arg(long, value_name = "HOST[:PORT]", value_parser = parse_peer_name)]
    pub peer: Option<PeerName>,
    /// Also check this configuration file, as a start or a reload would read it
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Check for this many workers [default: one per core, at most 4]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(QUEUES))]
    pub queues: Option<u16>,
    /// Print a JSON array with an object per item instead of the table
    #[arg(long)]
    pub json: bool,
}

/// Checks, prints, and tells whether fastvpn can run here.
pub fn run(options: &CheckOptions) -> bool {
    let items = check(options);
    let text = if options.json {
        render::json(&items)
    } else {
        render::table(&items, wants_colour())
    };
    // Nobody listening is no reason to fail: the status says it, too.
    let _ = io::stdout().write_all(text.as_bytes());
    item::can_run(&items)
}

/// On a terminal, unless the environment asks for none (no-color.org).
fn wants_colour() -> bool {
    let refused = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    io::stdout().is_terminal() && !refused
}

/// All items, in the order in which they are shown.
fn check(options: &CheckOptions) -> Vec<Item> {
    let deadline = Instant::now() + TIME_MAX;
    let config = options.config.as_deref().map(config::read);
    let (config, config_error) = match config.transpose() {
        Ok(config) => (config, None),
        Err(error) => (None, Some(error)),
    };
    let wanted = names::Wanted::of(config.as_ref());
    let running = names::running(&wanted);
    let queues = config.as_ref().map(|config| config.queues);
    let queues = options.queues.or(queues).unwrap_or_else(default_queues);
    let config = config.map(|config| pending::start(move || config::probe(config)));
    let peer = options.peer.clone();
    let own = running.as_ref().map(|running| running.index);
    let peer = peer.map(|endpoint| pending::start(move || peer::probe(&endpoint, own)));
    let rights = rights::probe();
    let may_make_node = rights.has(rights::CAP_MKNOD);
    let node = tun::probe_node();
    let uring = pending::start(uring::probe);
    let tun = pending::start(move || tun::probe(node, queues, may_make_node));
    let udp = pending::start(udp::probe);

    let may_lock = rights.has(rights::CAP_IPC_LOCK) && rights.in_first_user_namespace();
    let mut items = machine::items(&machine::probe(queues));
    items.extend(rights::items(&rights));
    items.extend(limits::items(&limits::probe(queues, may_lock)));
    items.extend(answer(uring.until(deadline), uring::items, &uring::NAMES));
    items.extend(answer(tun.until(deadline), tun::items, &tun::NAMES));
    items.extend(answer(udp.until(deadline), udp::items, &udp::NAMES));

    let has_peer = peer.is_some();
    let peer = peer.and_then(|peer| peer.until(deadline));
    let address = peer.as_ref().and_then(|peer| peer.address.clone().ok());
    let address = address.map(|address| address.ip());
    if has_peer {
        items.extend(answer(peer, peer::items, &peer::NAMES));
    }
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let interface = interface::probe(address, cores.min(usize::from(queues)));
    let name = interface
        .interface
        .as_ref()
        .map(|found| found.name.as_str());
    let host = host::probe(name);
    items.extend(interface::items(&interface));
    items.extend(host::items(&host));
    let has_ipv6_peer = address.is_some_and(|address| address.is_ipv6());
    items.extend(names::items(&names::probe(wanted, running, has_ipv6_peer)));
    items.extend(config_error.as_ref().map(config::refused));
    if let Some(config) = config {
        items.extend(answer(
            config.until(deadline),
            config::items,
            &[config::NAME],
        ));
    }
    items
}

/// An area's items, or that it did not answer.
fn answer<Facts>(
    facts: Option<Facts>,
    items: impl FnOnce(&Facts) -> Vec<Item>,
    names: &[&'static str],
) -> Vec<Item> {
    match facts {
        Some(facts) => items(&facts),
        None => {
            let late = |&name| Item::unknown(name, "no answer in time");
            names.iter().map(late).collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(options: &CheckOptions) -> Vec<&'static str> {
        check(options).iter().map(|item| item.name).collect()
    }

    #[test]
    fn names_are_stable_and_occur_once() {
        let mut options = CheckOptions {
            peer: None,
            config: None,
            queues: Some(1),
            json: false,
        };
        let without_peer = names(&options);
        options.peer = parse_peer_name("127.0.0.1").ok();
        let with_peer = names(&options);
        let mut unique = with_peer.clone();
        unique.sort_unstable();
        unique.dedup();
        assert_eq!(unique.len(), with_peer.len());
        let others: Vec<_> = with_peer
            .into_iter()
            .filter(|name| !peer::NAMES.contains(name))
            .collect();
        assert_eq!(others, without_peer);
    }

    #[test]
    fn what_does_not_answer_is_shown_as_unknown() {
        let late = answer(None, tun::items, &tun::NAMES);
        assert!(late.iter().all(|item| item.found.contains("in time")));
        assert_eq!(late.len(), tun::NAMES.len());
    }
}
