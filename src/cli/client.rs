//! What an operator can ask of a running tunnel, or tell it.

use std::net::IpAddr;
use std::path::PathBuf;

use clap::{Args, Subcommand};
use ipnet::IpNet;

use crate::config::default_control_path;
use crate::config::parse::{parse_peer, parse_peer_name, parse_route, parse_tun_name};
use crate::config::{PeerName, PeerSpec, TUN_NAME_DEFAULT};

/// Commands for a running tunnel.
#[derive(Clone, Debug, Subcommand)]
#[allow(missing_docs, reason = "each says what it is in its help")]
pub enum ClientCommand {
    /// Show the running tunnel, its workers and what they count; of several, a line for each
    Status {
        #[command(flatten)]
        target: Target,
    },
    /// Show the running tunnel's peers
    Peers {
        #[command(flatten)]
        target: Target,
    },
    /// Show or change which peer a prefix goes to
    #[command(subcommand)]
    Route(RouteCommand),
    /// Add or remove a peer
    #[command(subcommand)]
    Peer(PeerCommand),
    /// Have the running tunnel read its configuration file again
    Reload {
        #[command(flatten)]
        target: Target,
    },
    /// End the running tunnel
    Stop {
        #[command(flatten)]
        target: Target,
    },
}

/// `fastvpn route …`.
#[derive(Clone, Debug, Subcommand)]
#[allow(missing_docs, reason = "each says what it is in its help")]
pub enum RouteCommand {
    /// Send prefixes to a peer
    Add {
        /// Prefixes behind the peer
        #[arg(required = true, value_name = "PREFIX", value_parser = parse_route)]
        prefixes: Vec<IpNet>,
        /// The peer, named as when it was added
        #[arg(long, value_name = "HOST[:PORT]", value_parser = parse_peer_name)]
        peer: PeerName,
        /// Take the prefixes from the peers that have them now
        #[arg(long)]
        replace: bool,
        #[command(flatten)]
        target: Target,
    },
    /// Take prefixes from the peer that has them
    Del {
        /// Prefixes that no peer is to have
        #[arg(required = true, value_name = "PREFIX", value_parser = parse_route)]
        prefixes: Vec<IpNet>,
        #[command(flatten)]
        target: Target,
    },
    /// Show all prefixes and their peers
    List {
        #[command(flatten)]
        target: Target,
    },
    /// Show the peer that packets to an address go to
    Get {
        /// An inner destination address
        #[arg(value_name = "ADDRESS")]
        address: IpAddr,
        #[command(flatten)]
        target: Target,
    },
}

/// `fastvpn peer …`.
#[derive(Clone, Debug, Subcommand)]
#[allow(missing_docs, reason = "each says what it is in its help")]
pub enum PeerCommand {
    /// Add a peer
    Add {
        /// The peer and the prefixes behind it
        #[arg(value_name = "HOST[:PORT][=PREFIX,...]", value_parser = parse_peer)]
        peer: PeerSpec,
        #[command(flatten)]
        target: Target,
    },
    /// Remove a peer and its prefixes
    Del {
        /// The peer, named as when it was added
        #[arg(value_name = "HOST[:PORT]", value_parser = parse_peer_name)]
        peer: PeerName,
        #[command(flatten)]
        target: Target,
    },
}

impl ClientCommand {
    /// Which tunnel is meant, and how it is to answer.
    pub(crate) fn target(&self) -> &Target {
        match self {
            Self::Status { target }
            | Self::Peers { target }
            | Self::Reload { target }
            | Self::Stop { target }
            | Self::Route(
                RouteCommand::Add { target, .. }
                | RouteCommand::Del { target, .. }
                | RouteCommand::List { target }
                | RouteCommand::Get { target, .. },
            )
            | Self::Peer(PeerCommand::Add { target, .. } | PeerCommand::Del { target, .. }) => {
                target
            }
        }
    }
}

/// Which tunnel is meant, and how it is to answer.
#[derive(Clone, Debug, Args)]
pub struct Target {
    /// Print JSON
    #[arg(long)]
    pub json: bool,

    /// Name of the tunnel's TUN device [default: fastvpn0]
    #[arg(long, value_name = "NAME", value_parser = parse_tun_name)]
    pub tun: Option<String>,

    /// Path of the tunnel's control socket [default: /run/fastvpn/, named after the TUN]
    #[arg(long, value_name = "PATH")]
    pub control: Option<PathBuf>,
}

impl Target {
    /// Path of the control socket.
    pub(crate) fn socket(&self) -> PathBuf {
        match &self.control {
            Some(path) => path.clone(),
            None => default_control_path(self.tun.as_deref().unwrap_or(TUN_NAME_DEFAULT)),
        }
    }

    /// Whether no tunnel in particular is meant.
    pub(crate) fn is_any(&self) -> bool {
        self.tun.is_none() && self.control.is_none()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Cli, Command};
    use clap::Parser;

    fn command(words: &str) -> Option<ClientCommand> {
        let words = std::iter::once("fastvpn").chain(words.split_whitespace());
        match Cli::try_parse_from(words).ok()?.command? {
            Command::Client(command) => Some(command),
            _ => None,
        }
    }

    #[test]
    fn reads_every_command() {
        for words in [
            "status",
            "peers --json",
            "route add 10.1.0.0/16 fd00::/64 --peer vpn.example:9 --replace",
            "route del 10.1.0.0/16",
            "route list",
            "route get fd00::1",
            "peer add 10.0.0.1=10.1.0.0/16",
            "peer del 10.0.0.1",
            "reload",
            "stop",
        ] {
            let words = format!("{words} --tun other0 --control /tmp/x.sock");
            let command = command(&words).unwrap_or_else(|| panic!("{words}"));
            assert_eq!(command.target().tun.as_deref(), Some("other0"));
            assert_eq!(command.target().socket(), PathBuf::from("/tmp/x.sock"));
            assert_eq!(command.target().json, words.contains("--json"));
        }
        for words in [
            "route add --peer 10.0.0.1",
            "route add 10.1.0.0/16",
            "route add 10.1.0.1/16 --peer 10.0.0.1",
            "route del",
            "route get 10.1.0.0/16",
            "peer del 10.0.0.1=10.1.0.0/16",
            "--tun fastvpn1 status",
        ] {
            assert!(command(words).is_none(), "{words}");
        }
    }

    /// One that would be taken.
    #[test]
    fn a_prefix_is_shown_to_who_writes_something_else() {
        let words = ["fastvpn", "route", "add", "bogus", "--peer", "10.0.0.1"];
        let error = Cli::try_parse_from(words).unwrap_err().to_string();
        let example = error
            .split("such as ")
            .nth(1)
            .and_then(|rest| rest.split_whitespace().next());
        assert!(parse_route(example.unwrap()).is_ok(), "{error}");
    }

    #[test]
    fn the_socket_is_named_after_the_device() {
        let target = command("stop --tun other0").unwrap().target().clone();
        assert_eq!(target.socket(), default_control_path("other0"));
    }
}
