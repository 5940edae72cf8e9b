//! The command line.
//!
//! The tunnel's flags have no defaults here, so that it shows which were given:
//! what is left open may come from the configuration file, and
//! [`crate::config`] fills in the rest.

pub mod check;
pub mod client;
pub mod commands;
mod render;
mod table;
mod units;

use clap::{Parser, Subcommand};

use crate::config::TunnelArgs;

/// A fast userspace network tunnel: IP packets in plain UDP datagrams.
///
/// Run it the same way on both hosts, each naming the other, as in
/// `fastvpn --queues 4 --peer 10.211.55.123:8285`.
#[derive(Debug, Parser)]
#[command(
    version,
    args_conflicts_with_subcommands = true,
    arg_required_else_help = true
)]
pub struct Cli {
    /// What to do other than run a tunnel.
    #[command(subcommand)]
    pub command: Option<Command>,

    /// The tunnel's options.
    #[command(flatten)]
    pub tunnel: TunnelArgs,
}

/// What to do other than run a tunnel.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Show a tunnel at work between two network namespaces of this machine
    Demo(crate::testbed::demo::DemoOptions),
    /// Say what this host offers a tunnel, what is missing, and how to fix it; NICs, queues and cores
    /// are the matter of tuning/host.sh
    Check(crate::cli::check::CheckOptions),
    /// Ask a running tunnel, or tell it something.
    #[command(flatten)]
    Client(client::ClientCommand),
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn switches_can_be_switched_off() {
        let hop = |flag: &str| {
            Cli::try_parse_from(["fastvpn", "-q", flag])
                .unwrap()
                .tunnel
                .hop
        };
        assert_eq!(hop("--hop"), Some(true));
        assert_eq!(hop("--hop=false"), Some(false));
        assert_eq!(hop("--no-routes"), None);
    }
}
