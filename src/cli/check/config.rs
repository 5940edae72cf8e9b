//! The configuration file: what a start or a reload would say of it.

use std::path::Path;

use super::item::Item;
use crate::config::Config;
use crate::config::TunnelArgs;
use crate::daemon;
use crate::error::{Error, Result};

/// The name of the item.
pub const NAME: &str = "configuration";

/// What was found.
#[derive(Debug)]
pub struct Facts {
    /// What is in the file.
    content: String,
    /// The peers that could not be used, or what is wrong with all of it.
    outcome: Result<Vec<Error>>,
}

/// Reads a file as a start would.
///
/// # Errors
/// As a start.
pub fn read(path: &Path) -> Result<Config> {
    Config::from_args(&TunnelArgs {
        config: Some(path.to_path_buf()),
        ..TunnelArgs::default()
    })
}

/// Does what a start does before it changes anything; may wait for name servers.
pub fn probe(config: Config) -> Facts {
    let prefixes: usize = config.peers.iter().map(|peer| peer.prefixes.len()).sum();
    Facts {
        content: format!("{} peers, {prefixes} prefixes", config.peers.len()),
        outcome: daemon::rehearse(config),
    }
}

/// What it means.
pub fn items(facts: &Facts) -> Vec<Item> {
    let content = &facts.content;
    vec![match &facts.outcome {
        Err(error) => refused(error),
        Ok(unusable) => match &unusable[..] {
            [] => Item::ok(NAME, content),
            [first, more @ ..] => {
                let more = match more.len() {
                    0 => String::new(),
                    count => format!(" (and {count} more peers)"),
                };
                Item::degraded(
                    NAME,
                    format!("{content}; {}{more}", first.fault()),
                    "the tunnel starts without that peer, and tries it again and again",
                    first
                        .remedy()
                        .unwrap_or("correct the peer's name or address"),
                )
            }
        },
    }]
}

/// That neither a start nor a reload would take it.
pub fn refused(error: &Error) -> Item {
    let cost = "fastvpn does not start with it, and a reload changes nothing";
    let remedy = error.remedy().unwrap_or("correct the file");
    Item::missing(NAME, error.fault(), cost, remedy)
}
