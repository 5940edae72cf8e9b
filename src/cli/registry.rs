//! `fastvpn registry …`: what operators do to a registry, whether a tunnel runs or not.

use std::net::Ipv4Addr;

use clap::Subcommand;
use ipnet::Ipv4Net;

use crate::config::RegistryFiles;

/// Commands about a registry.
#[derive(Clone, Debug, Subcommand)]
#[allow(missing_docs, reason = "each says what it is in its help")]
pub enum RegistryCommand {
    /// Make a network, which hosts then join with --registry
    Init {
        #[command(flatten)]
        files: RegistryFiles,
        /// All hosts' containers are in it
        #[arg(long, value_name = "CIDR")]
        network: Ipv4Net,
        /// Length of each host's subnet [default: 24, or 2 more than the network's]
        #[arg(long, value_name = "N")]
        subnet_length: Option<u8>,
        /// How hosts carry packets: udp, or wireguard
        #[arg(long, value_name = "BACKEND", default_value = "udp", value_parser = ["udp", "wireguard"])]
        backend: String,
        /// All hosts' UDP port [default: 8285, or 51820 with wireguard]
        #[arg(long, value_name = "PORT")]
        port: Option<u16>,
    },
    /// Show a network's hosts, their subnets and leases
    Show {
        #[command(flatten)]
        files: RegistryFiles,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Take a host out of its network for good; a tunnel that runs there ends
    Leave {
        #[command(flatten)]
        files: RegistryFiles,
        /// The host's address in the registry
        #[arg(long, value_name = "ADDRESS", env = "FLANNELD_PUBLIC_IP")]
        public_ip: Ipv4Addr,
    },
}

#[cfg(feature = "registry")]
pub use with_registry::run;

#[cfg(feature = "registry")]
mod with_registry {
    use std::io;

    use super::RegistryCommand;
    use crate::cli::commands::show;
    use crate::cli::table::Table;
    use crate::cli::units::{duration, exactly};
    use crate::config::{RegistryFiles, password_of_environment};
    use crate::error::{Error, Result};
    use crate::registry::access::Access;
    use crate::registry::commands::{self, Shown};
    use crate::registry::network::new_value;

    /// Carries out one command.
    ///
    /// # Errors
    /// When etcd does not do it, or refuses.
    pub fn run(command: &RegistryCommand) -> Result<()> {
        let mut out = io::stdout();
        match command {
            RegistryCommand::Init {
                files,
                network,
                subnet_length,
                backend,
                port,
            } => {
                let value = new_value(*network, *subnet_length, backend, *port)?;
                commands::init(&access(files)?, files.prefix(), &value)?;
                show(&mut out, &format!("{value}\n"))
            }
            RegistryCommand::Show { files, json } => {
                let shown = commands::show(&access(files)?, files.prefix())?;
                let text = match json {
                    true => serde_json::to_string(&shown)
                        .map(|json| json + "\n")
                        .map_err(|error| Error::new(format!("cannot write JSON: {error}")))?,
                    false => text(&shown),
                };
                show(&mut out, &text)
            }
            RegistryCommand::Leave { files, public_ip } => {
                let left = commands::leave(&access(files)?, files.prefix(), *public_ip)?;
                let subnets: Vec<_> = left.iter().map(ToString::to_string).collect();
                let text = format!("{public_ip} has left, and {} is free\n", subnets.join(", "));
                show(&mut out, &text)
            }
        }
    }

    /// How etcd is reached, also by a password that the environment has.
    fn access(files: &RegistryFiles) -> Result<Access> {
        let mut files = files.clone();
        files.password = password_of_environment(|name| std::env::var_os(name));
        Access::read(&files)
    }

    fn text(shown: &Shown) -> String {
        let head = match (shown.network, shown.backend) {
            (Some(network), Some(backend)) => format!("{network}, {backend}"),
            _ => "no network that can be read".into(),
        };
        let columns = [
            "SUBNET",
            "HOST",
            "BACKEND",
            ">PREFIXES",
            ">LEASE",
            ">RENEWED",
        ];
        let mut table = Table::new(columns);
        let time = |seconds: Option<i64>| match seconds {
            Some(seconds) => duration(seconds.try_into().unwrap_or(0)),
            None => "-".into(),
        };
        for host in &shown.hosts {
            table.push([
                host.subnet.to_string(),
                host.public_ip.to_string(),
                host.backend.clone(),
                host.prefixes.to_string(),
                time(host.lease_left_seconds),
                time(host.renewed_seconds),
            ]);
        }
        let hosts = exactly(shown.hosts.len(), "host");
        format!("{head}, {hosts}\n\n{}", table.text())
    }
}

/// In a build without the feature `registry` nothing can be done.
///
/// # Errors
/// Always.
#[cfg(not(feature = "registry"))]
pub fn run(_: &RegistryCommand) -> crate::error::Result<()> {
    Err(crate::registry::left_out())
}

#[cfg(test)]
mod tests {
    use clap::FromArgMatches;

    use crate::cli::{Cli, Command, command};
    use crate::config::Config;

    /// The flags of the DaemonSet are fastvpn's, and the CNI configuration is JSON.
    #[test]
    fn what_kubernetes_is_given_can_be_read() {
        let set = include_str!("../../docs/kubernetes/daemonset.yaml");
        let flags = set
            .lines()
            .filter_map(|line| line.trim().strip_prefix("- --"));
        let flags = flags.map(|flag| format!("--{}", flag.replace("$(NODE_IP)", "10.0.0.2")));
        let words: Vec<_> = std::iter::once("fastvpn".into()).chain(flags).collect();
        assert!(words.len() > 4, "{words:?}");
        let matches = command().try_get_matches_from(words).unwrap();
        let config = Config::from_flags(&matches).unwrap();
        assert_eq!(config.public_ip, "10.0.0.2".parse().ok());
        let cni = include_str!("../../docs/kubernetes/10-fastvpn.conflist");
        let cni: serde_json::Value = serde_json::from_str(cni).unwrap();
        assert_eq!(cni["plugins"][0]["type"], "flannel");
        let file = cni["plugins"][0]["subnetFile"].as_str().unwrap();
        assert_eq!(std::path::Path::new(file), config.subnet_file());
    }

    #[test]
    fn commands_take_what_a_tunnel_takes() {
        for words in [
            "init --registry http://a:2379 --network 10.50.0.0/16 --backend wireguard",
            "show --registry https://a --registry-ca ca --json",
            "leave --registry http://a --registry-prefix /n --public-ip 10.0.0.2",
        ] {
            let words = ["fastvpn", "registry"].into_iter().chain(words.split(' '));
            let matches = command().try_get_matches_from(words).unwrap();
            let cli = Cli::from_arg_matches(&matches).unwrap();
            assert!(matches!(cli.command, Some(Command::Registry(_))));
        }
        for words in [
            "show",
            "init --registry http://a",
            "leave --registry http://a",
        ] {
            let words = ["fastvpn", "registry"].into_iter().chain(words.split(' '));
            assert!(command().try_get_matches_from(words).is_err());
        }
    }
}
