//! What an operator can ask of a running tunnel, or tell it.

use std::net::IpAddr;
use std::path::PathBuf;

use clap::{Args, Subcommand};
use ipnet::IpNet;

use crate::config::{
    PeerName, PeerSpec, TUN_NAME_DEFAULT, default_control_path, parse_peer, parse_peer_name,
    parse_prefix, parse_tun_name,
};
use crate::control::protocol::Request;

/// Commands for a running tunnel.
#[derive(Clone, Debug, Subcommand)]
#[allow(missing_docs, reason = "each says what it is in its help")]
pub enum ClientCommand {
    /// Show the running tunnel, its workers and what they count; of several, a line for each
    Status {
        #[command(flatten)]
        target: Target,
        /// Show packets, bits and drops per second beside the totals: a line every so many
        /// seconds (1 if it is not said), until the tunnel ends
        #[arg(
            long = "watch",
            value_name = "SECONDS",
            num_args = 0..=1,
            default_missing_value = "1",
            value_parser = clap::value_parser!(u32).range(1..=86_400),
        )]
        watch_seconds: Option<u32>,
    },
    /// Show the running tunnel's peers
    Peers(Target),
    /// Show or change which peer a prefix goes to
    Route {
        #[command(flatten)]
        target: Target,
        #[command(subcommand)]
        command: RouteCommand,
    },
    /// Add or remove a peer
    Peer {
        #[command(flatten)]
        target: Target,
        #[command(subcommand)]
        command: PeerCommand,
    },
    /// Have the running tunnel read its configuration file again
    Reload(Target),
    /// Have the program that is installed by now take over, without an outage
    Upgrade(Target),
    /// End the running tunnel
    Stop(Target),
}

/// `fastvpn route …`.
#[derive(Clone, Debug, Subcommand)]
#[allow(missing_docs, reason = "each says what it is in its help")]
pub enum RouteCommand {
    /// Send prefixes to a peer
    Add {
        /// The peer's prefixes
        #[arg(required = true, value_name = "PREFIX", value_parser = parse_prefix)]
        prefixes: Vec<IpNet>,
        /// The peer, named as when it was added
        #[arg(long, value_name = "HOST[:PORT]|KEY", value_parser = parse_peer_name)]
        peer: PeerName,
        /// Take the prefixes from the peers that have them now
        #[arg(long)]
        replace: bool,
    },
    /// Take prefixes from the peer that has them
    Del {
        /// Prefixes that no peer is to have
        #[arg(required = true, value_name = "PREFIX", value_parser = parse_prefix)]
        prefixes: Vec<IpNet>,
    },
    /// Show all prefixes and their peers
    List,
    /// Show the peer that packets to an address go to
    Get {
        /// An inner destination address
        #[arg(value_name = "ADDRESS")]
        address: IpAddr,
    },
}

/// `fastvpn peer …`.
#[derive(Clone, Debug, Subcommand)]
#[allow(missing_docs, reason = "each says what it is in its help")]
pub enum PeerCommand {
    /// Add a peer
    Add {
        /// The peer and its prefixes
        #[arg(value_name = "[KEY@]HOST[:PORT][=PREFIX,...]", value_parser = parse_peer)]
        peer: PeerSpec,
    },
    /// Remove a peer and its prefixes
    Del {
        /// The peer, named as when it was added
        #[arg(value_name = "HOST[:PORT]|KEY", value_parser = parse_peer_name)]
        peer: PeerName,
    },
}

impl ClientCommand {
    /// Which tunnel is meant, and how it is to answer.
    pub(crate) fn target(&self) -> &Target {
        match self {
            Self::Peers(target)
            | Self::Reload(target)
            | Self::Upgrade(target)
            | Self::Stop(target)
            | Self::Status { target, .. }
            | Self::Route { target, .. }
            | Self::Peer { target, .. } => target,
        }
    }

    /// What is asked of the tunnel.
    pub(crate) fn request(&self) -> Request {
        match self.clone() {
            Self::Status { .. } => Request::Status {},
            Self::Peers(_) => Request::Peers {},
            Self::Reload(_) => Request::Reload { dry_run: false },
            Self::Upgrade(_) => Request::Upgrade {},
            Self::Stop(_) => Request::Stop {},
            Self::Route { command, .. } => match command {
                RouteCommand::List => Request::RouteList {},
                RouteCommand::Get { address } => Request::RouteGet { address },
                RouteCommand::Add {
                    prefixes,
                    peer,
                    replace,
                } => Request::RouteAdd {
                    peer: peer.to_string(),
                    prefixes,
                    replace,
                },
                RouteCommand::Del { prefixes } => Request::RouteDel { prefixes },
            },
            Self::Peer { command, .. } => match command {
                PeerCommand::Add { peer } => Request::PeerAdd {
                    endpoint: match peer.name {
                        // Its name says it.
                        PeerName::Host(_) => None,
                        PeerName::Key(_) => peer.endpoint.map(|place| place.to_string()),
                    },
                    peer: peer.name.to_string(),
                    prefixes: peer.prefixes,
                },
                PeerCommand::Del { peer } => Request::PeerDel {
                    peer: peer.to_string(),
                },
            },
        }
    }
}

/// Which tunnel is meant, and how it is to answer.
#[derive(Clone, Debug, Args)]
pub struct Target {
    /// Print JSON
    #[arg(long, global = true)]
    pub json: bool,

    /// Name of the tunnel's TUN device [default: fastvpn0]
    #[arg(long, value_name = "NAME", value_parser = parse_tun_name, global = true)]
    pub tun: Option<String>,

    /// Path of the tunnel's control socket [default: /run/fastvpn/, named after the TUN]
    #[arg(long, value_name = "PATH", global = true)]
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
    fn every_command_takes_a_target() {
        for words in [
            "status",
            "status --watch",
            "status --watch 5 --json",
            "peers --json",
            "route add 10.1.0.0/16 fd00::/64 --peer vpn.example:9 --replace",
            "route del 10.1.0.0/16",
            "route list",
            "route get fd00::1",
            "peer add 10.0.0.1=10.1.0.0/16",
            "peer del 10.0.0.1",
            "reload",
            "upgrade",
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
            "route add 10.1.0.1/33 --peer 10.0.0.1",
            "route del",
            "route get 10.1.0.0/16",
            "status --watch 0",
            "peer del 10.0.0.1=10.1.0.0/16",
            "--tun fastvpn1 status",
        ] {
            assert!(command(words).is_none(), "{words}");
        }
    }

    #[test]
    fn the_error_about_a_prefix_shows_a_good_one() {
        let words = ["fastvpn", "route", "add", "bogus", "--peer", "10.0.0.1"];
        let error = Cli::try_parse_from(words).unwrap_err().to_string();
        let example = error
            .split("such as ")
            .nth(1)
            .and_then(|rest| rest.split_whitespace().next());
        assert!(parse_prefix(example.unwrap()).is_ok(), "{error}");
    }

    #[test]
    fn the_socket_is_named_after_the_device() {
        let target = command("stop --tun other0").unwrap().target().clone();
        assert_eq!(target.socket(), default_control_path("other0"));
    }
}
