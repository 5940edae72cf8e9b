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
pub enum ClientCommand {
    /// Show the running tunnel, its workers and what they count; of several, a line for each
    Status(StatusArgs),
    /// Show the running tunnel's peers
    Peers(PeersArgs),
    /// Show or change which peer a prefix goes to
    #[command(subcommand)]
    Route(RouteCommand),
    /// Add or remove a peer
    #[command(subcommand)]
    Peer(PeerCommand),
    /// Have the running tunnel read its configuration file again
    Reload(ReloadArgs),
    /// End the running tunnel
    Stop(StopArgs),
}

impl ClientCommand {
    /// Which tunnel is meant, and how it is to answer.
    pub fn target(&self) -> &Target {
        match self {
            Self::Status(args) => &args.target,
            Self::Peers(args) => &args.target,
            Self::Route(RouteCommand::Add(args)) => &args.target,
            Self::Route(RouteCommand::Del(args)) => &args.target,
            Self::Route(RouteCommand::List(args)) => &args.target,
            Self::Route(RouteCommand::Get(args)) => &args.target,
            Self::Peer(PeerCommand::Add(args)) => &args.target,
            Self::Peer(PeerCommand::Del(args)) => &args.target,
            Self::Reload(args) => &args.target,
            Self::Stop(args) => &args.target,
        }
    }
}

/// `fastvpn route …`.
#[derive(Clone, Debug, Subcommand)]
pub enum RouteCommand {
    /// Send prefixes to a peer
    Add(RouteAddArgs),
    /// Take prefixes from the peer that has them
    Del(RouteDelArgs),
    /// Show all prefixes and their peers
    List(RouteListArgs),
    /// Show the peer that packets to an address go to
    Get(RouteGetArgs),
}

/// `fastvpn peer …`.
#[derive(Clone, Debug, Subcommand)]
pub enum PeerCommand {
    /// Add a peer
    Add(PeerAddArgs),
    /// Remove a peer and its prefixes
    Del(PeerDelArgs),
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

    /// Path of the tunnel's operators' socket [default: /run/fastvpn/, named after the TUN]
    #[arg(long, value_name = "PATH")]
    pub control: Option<PathBuf>,
}

impl Target {
    /// Path of the operators' socket.
    pub fn socket(&self) -> PathBuf {
        match &self.control {
            Some(path) => path.clone(),
            None => default_control_path(self.tun.as_deref().unwrap_or(TUN_NAME_DEFAULT)),
        }
    }

    /// Whether no tunnel in particular is meant.
    pub fn is_any(&self) -> bool {
        self.tun.is_none() && self.control.is_none()
    }
}

/// `fastvpn status`.
#[derive(Clone, Debug, Args)]
pub struct StatusArgs {
    /// Whom to ask.
    #[command(flatten)]
    pub target: Target,
}

/// `fastvpn peers`.
#[derive(Clone, Debug, Args)]
pub struct PeersArgs {
    /// Whom to ask.
    #[command(flatten)]
    pub target: Target,
}

/// `fastvpn route add`.
#[derive(Clone, Debug, Args)]
pub struct RouteAddArgs {
    /// Prefixes behind the peer
    #[arg(required = true, value_name = "PREFIX", value_parser = parse_route)]
    pub prefixes: Vec<IpNet>,

    /// The peer, named as when it was added
    #[arg(long, value_name = "HOST[:PORT]", value_parser = parse_peer_name)]
    pub peer: PeerName,

    /// Take the prefixes from the peers that have them now
    #[arg(long)]
    pub replace: bool,

    /// Whom to tell.
    #[command(flatten)]
    pub target: Target,
}

/// `fastvpn route del`.
#[derive(Clone, Debug, Args)]
pub struct RouteDelArgs {
    /// Prefixes that no peer is to have
    #[arg(required = true, value_name = "PREFIX", value_parser = parse_route)]
    pub prefixes: Vec<IpNet>,

    /// Whom to tell.
    #[command(flatten)]
    pub target: Target,
}

/// `fastvpn route list`.
#[derive(Clone, Debug, Args)]
pub struct RouteListArgs {
    /// Whom to ask.
    #[command(flatten)]
    pub target: Target,
}

/// `fastvpn route get`.
#[derive(Clone, Debug, Args)]
pub struct RouteGetArgs {
    /// An inner destination address
    #[arg(value_name = "ADDRESS")]
    pub address: IpAddr,

    /// Whom to ask.
    #[command(flatten)]
    pub target: Target,
}

/// `fastvpn peer add`.
#[derive(Clone, Debug, Args)]
pub struct PeerAddArgs {
    /// The peer and the prefixes behind it
    #[arg(value_name = "HOST[:PORT][=PREFIX,...]", value_parser = parse_peer)]
    pub peer: PeerSpec,

    /// Whom to tell.
    #[command(flatten)]
    pub target: Target,
}

/// `fastvpn peer del`.
#[derive(Clone, Debug, Args)]
pub struct PeerDelArgs {
    /// The peer, named as when it was added
    #[arg(value_name = "HOST[:PORT]", value_parser = parse_peer_name)]
    pub peer: PeerName,

    /// Whom to tell.
    #[command(flatten)]
    pub target: Target,
}

/// `fastvpn reload`.
#[derive(Clone, Debug, Args)]
pub struct ReloadArgs {
    /// Whom to tell.
    #[command(flatten)]
    pub target: Target,
}

/// `fastvpn stop`.
#[derive(Clone, Debug, Args)]
pub struct StopArgs {
    /// Whom to tell.
    #[command(flatten)]
    pub target: Target,
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
