//! `fastvpn check`: whether a tunnel can run on this host and how fast, what is
//! missing, what that costs, and how to fix it.
//!
//! - `host`: what the kernel has for a tunnel, tried with the tunnel's own code.
//! - `peer`: the path to the other host, and what it answers.
//! - `place`: what exists once, and another tunnel may have; the configuration.
//! - `item`: what all of them say, as a table and as JSON.
//!
//! Nothing on the host is changed: devices are made in a network namespace of
//! their own. `tuning/host.sh` shows what NICs, queues and cores could do better.

mod host;
mod item;
mod peer;
mod place;

use std::ffi::OsStr;
use std::io::{self, Write};
use std::path::PathBuf;

use self::item::Item;
use crate::config::{Config, HostPort, QUEUES, parse_host_port};
use crate::error::Result;

/// Options of `fastvpn check`.
#[derive(Debug, Clone, clap::Args)]
pub struct CheckOptions {
    /// Also check the path to this host: address or DNS name, port 8285 unless given
    #[arg(long, value_name = "HOST[:PORT]", value_parser = parse_host_port)]
    pub peer: Option<HostPort>,
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
///
/// # Errors
/// None that the host is to blame for.
pub fn run(options: &CheckOptions) -> Result<bool> {
    let items = check(options)?;
    let text = match options.json {
        true => item::json(&items),
        false => item::table(&items),
    };
    // The exit status says it, too, if nobody reads this.
    let _ = io::stdout().write_all(text.as_bytes());
    Ok(item::can_run(&items))
}

/// All items, in the order in which they are shown.
fn check(options: &CheckOptions) -> Result<Vec<Item>> {
    let flags = |path: &PathBuf| Config::from_words([OsStr::new("--config"), path.as_os_str()]);
    let given = options.config.as_ref().map(flags);
    let (config, configuration) = match given {
        None => (Config::from_words([])?, None),
        Some(Ok(config)) => (config.clone(), Some(Ok(config))),
        Some(Err(error)) => (Config::from_words([])?, Some(Err(error))),
    };
    let file = options.config.as_deref();
    let running = place::running(&config, file);
    let mut items = host::items(options.queues.unwrap_or(config.queues));
    if let Some(peer) = &options.peer {
        let own = running.as_ref().map(|running| running.index);
        items.extend(peer::items(peer, own));
    }
    let is_read = configuration.as_ref().is_some_and(Result::is_ok);
    items.extend(configuration.map(|it| place::configuration(it, running.as_ref())));
    // One that cannot be read has been shown as such.
    let reload = file.filter(|_| is_read).zip(running.as_ref());
    items.extend(reload.map(|(file, running)| place::reload(file, running)));
    items.push(place::port(&config, running.as_ref()));
    items.push(place::tun_name(&config, running.as_ref()));
    Ok(items)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_stable_and_occur_once() {
        let mut options = CheckOptions {
            peer: None,
            config: None,
            queues: Some(1),
            json: false,
        };
        let names = |options: &CheckOptions| -> Vec<&'static str> {
            let items = check(options).unwrap();
            items.iter().map(|item| item.name).collect()
        };
        let without_peer = names(&options);
        options.peer = parse_host_port("127.0.0.1:9").ok();
        let mut with_peer = names(&options);
        let mut unique = with_peer.clone();
        unique.sort_unstable();
        unique.dedup();
        assert_eq!(unique.len(), with_peer.len());
        let of_peer = [peer::PEER, peer::PATH_MTU, peer::TUNNEL_ADDRESS];
        assert!(of_peer.iter().all(|name| with_peer.contains(name)));
        with_peer.retain(|name| !of_peer.contains(name));
        assert_eq!(with_peer, without_peer);
    }
}
