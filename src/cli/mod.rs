//! The command line: the tunnel's flags, which [`Config`] has, and commands.

pub mod capture;
pub mod check;
pub mod client;
pub mod commands;
pub mod generate;
pub mod keys;
mod poller;
mod rates;
pub mod registry;
mod render;
mod table;
pub mod top;
mod units;
mod watch;

use clap::{Args, Parser, Subcommand};

use crate::config::Config;
use crate::error::{Error, Result};

/// A fast userspace network tunnel: IP packets in UDP datagrams, plain or encrypted (WireGuard).
///
/// Run it the same way on both hosts, each naming the other, as in
/// `fastvpn --queues 4 --peer 10.211.55.123:8285`.
#[derive(Debug, Parser)]
#[command(
    version,
    long_version = env!("FASTVPN_VERSION"),
    args_conflicts_with_subcommands = true,
    arg_required_else_help = true
)]
pub struct Cli {
    /// What to do other than run a tunnel.
    #[command(subcommand)]
    pub command: Option<Command>,
}

/// All that the program understands: a tunnel's flags, or a command.
pub fn command() -> clap::Command {
    // None of the flags must be given: the file may have it.
    let flags = Config::augment_args_for_update(clap::Command::new("fastvpn"));
    Cli::augment_args(flags)
}

/// Makes sure that an interface does not have the name of a command: behind a flag it is not taken
/// for one.
///
/// # Errors
/// Names it.
pub fn check_interface_name(config: &Config) -> Result<()> {
    let is_command = |name: &&String| {
        let commands = command();
        let mut names = commands.get_subcommands().map(clap::Command::get_name);
        names.any(|command| command == *name) || *name == "help"
    };
    match config.interface.as_ref().filter(is_command) {
        None => Ok(()),
        Some(name) => {
            let what = format!("{name} is a command of fastvpn's, and no name for an interface");
            Err(Error::new(what).hint("a command comes before its flags; or choose another name"))
        }
    }
}

/// What to do other than run a tunnel.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Show a tunnel at work between two network namespaces of this machine
    Demo(crate::testbed::demo::DemoOptions),
    /// Check what this host has for a tunnel, what is missing, and how to fix it (tuning/host.sh
    /// shows NICs, queues and cores)
    Check(crate::cli::check::CheckOptions),
    /// Make keys.
    #[command(flatten)]
    Key(keys::KeyCommand),
    /// Make a network in a registry (etcd), show it, or leave it
    #[command(subcommand)]
    Registry(registry::RegistryCommand),
    /// Show or save packets of a running tunnel, with direction, worker, peer and why they were
    /// dropped
    Capture(capture::CaptureOptions),
    /// Ask a running tunnel, or tell it something.
    #[command(flatten)]
    Client(client::ClientCommand),
    /// Watch a running tunnel on the whole terminal: throughput, workers, peers, drops
    Top(top::TopOptions),
    /// Make completions and manual pages.
    #[command(flatten)]
    Generate(generate::GenerateCommand),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_is_no_interface() {
        let flags = |words: &[&str]| command().try_get_matches_from(words).unwrap();
        let is_refused = |words: &[&str]| {
            let config = Config::from_flags(&flags(words)).unwrap();
            check_interface_name(&config).is_err()
        };
        assert!(flags(&["fastvpn", "status"]).subcommand_name().is_some());
        assert!(is_refused(&["fastvpn", "-f", "status"]));
        assert!(!is_refused(&["fastvpn", "-f", "wg0"]));
    }

    #[test]
    fn the_definition_is_sound() {
        command().debug_assert();
    }
}
