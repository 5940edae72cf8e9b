//! `fastvpn check`: whether a tunnel can run on this host and how fast, what is
//! missing, what that costs, and how to fix it.
//!
//! - `machine`: the kernel's version, rights and limits.
//! - `features`: what the kernel has for a tunnel, tried with the tunnel's own code.
//! - `peer`: the way to the other host, and what it answers.
//! - `place`: what exists once, and another tunnel may have; the configuration.
//! - `report`: what all of them say, as a table and as JSON.
//!
//! Nothing on the host is changed: devices are made in a network namespace of
//! their own. What the network may keep waiting runs on a thread that is given up
//! when time is over. What NICs, queues and cores could do better is the matter
//! of `tuning/host.sh`.

mod features;
mod machine;
mod peer;
mod place;
mod report;

use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use self::place::Place;
use self::report::Item;
use crate::config::{Config, PeerName, QUEUES, TunnelArgs, default_queues, parse_peer_name};

/// How long what may wait may take, all of it together.
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
    let text = match options.json {
        true => report::json(&items),
        false => report::table(&items),
    };
    // Nobody listening is no reason to fail: the status says it, too.
    let _ = io::stdout().write_all(text.as_bytes());
    report::can_run(&items)
}

/// All items, in the order in which they are shown.
fn check(options: &CheckOptions) -> Vec<Item> {
    let deadline = Instant::now() + TIME_MAX;
    let config = options.config.as_ref().map(|path| {
        Config::from_args(&TunnelArgs {
            config: Some(path.clone()),
            ..TunnelArgs::default()
        })
    });
    let readable = config.as_ref().and_then(|config| config.as_ref().ok());
    let place = Place::of(readable);
    let queues = options.queues.or(readable.map(|config| config.queues));
    let queues = queues.unwrap_or_else(default_queues);
    let own = place.running.as_ref().map(|running| running.index);
    let peer = options.peer.clone();
    let peer = peer.map(|peer| pending(move || peer::items(&peer, own)));
    let config = config.map(|config| pending(move || vec![place::configuration(config)]));

    let mut items = machine::items(queues);
    items.extend(features::items(queues));
    for (pending, names) in [(peer, &peer::NAMES[..]), (config, &[place::CONFIGURATION])] {
        let Some(pending) = pending else { continue };
        // Should the deadline have passed, what is there still counts.
        let left = deadline.saturating_duration_since(Instant::now());
        let answer = pending.recv_timeout(left.max(Duration::from_millis(1)));
        let late = || {
            names
                .iter()
                .map(|name| Item::unknown(name, "no answer in time"))
        };
        items.extend(answer.unwrap_or_else(|_| late().collect()));
    }
    items.extend(place.items());
    items
}

/// Starts what may wait. One that cannot be started never answers, and one that is
/// given up ends with the process at the latest.
fn pending(work: impl FnOnce() -> Vec<Item> + Send + 'static) -> Receiver<Vec<Item>> {
    let (sender, receiver) = channel();
    let work = move || {
        // Who no longer waits no longer minds.
        let _ = sender.send(work());
    };
    let _ = thread::Builder::new().name("check".into()).spawn(work);
    receiver
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
}
