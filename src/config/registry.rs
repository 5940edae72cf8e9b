//! How a registry is reached, and what must hold among the options about one.

use std::ffi::OsString;
use std::fmt::Display;
use std::net::Ipv4Addr;
use std::path::PathBuf;

use clap::Args;
use ipnet::{IpNet, Ipv4Net};

use super::options::Config;
use super::types::parse_url;
use crate::error::{Error, Result};

/// The prefix of the keys in etcd that flannel has.
pub(crate) const REGISTRY_PREFIX_DEFAULT: &str = "/coreos.com/network";

/// Seconds that a host stays in the registry after it was last heard of, as with flannel.
const TTL_SECONDS_DEFAULT: u32 = 86_400;

/// Where container tools look for this host's subnet, as with flannel.
const SUBNET_FILE_DEFAULT: &str = "/run/flannel/subnet.env";

/// How etcd is reached.
#[derive(Clone, Debug, Default, Args)]
pub struct RegistryFiles {
    /// URLs of etcd's members, separated by commas
    #[arg(long = "registry", value_name = "URL,...", value_delimiter = ',', required = true, value_parser = parse_url, env = "FLANNELD_ETCD_ENDPOINTS")]
    pub urls: Vec<String>,

    /// Prefix of the network's keys [default: /coreos.com/network]
    #[arg(
        long = "registry-prefix",
        value_name = "PREFIX",
        env = "FLANNELD_ETCD_PREFIX"
    )]
    pub prefix: Option<String>,

    /// Certificates of those who sign etcd's, in PEM
    #[arg(
        long = "registry-ca",
        value_name = "FILE",
        env = "FLANNELD_ETCD_CAFILE"
    )]
    pub ca: Option<PathBuf>,

    /// This host's certificate for etcd, in PEM
    #[arg(
        long = "registry-cert",
        value_name = "FILE",
        env = "FLANNELD_ETCD_CERTFILE"
    )]
    pub cert: Option<PathBuf>,

    /// Its private key, in PEM
    #[arg(
        long = "registry-key",
        value_name = "FILE",
        env = "FLANNELD_ETCD_KEYFILE"
    )]
    pub key: Option<PathBuf>,

    /// A user of etcd's
    #[arg(
        long = "registry-user",
        value_name = "NAME",
        env = "FLANNELD_ETCD_USERNAME"
    )]
    pub user: Option<String>,

    /// A file with the user's password
    #[arg(long = "registry-password-file", value_name = "FILE")]
    pub password_file: Option<PathBuf>,
}

impl RegistryFiles {
    /// The prefix of the network's keys.
    pub(crate) fn prefix(&self) -> &str {
        self.prefix.as_deref().unwrap_or(REGISTRY_PREFIX_DEFAULT)
    }

    /// Makes sure that options that belong together are all there.
    ///
    /// # Errors
    /// Names the one that is missing.
    pub(crate) fn check(&self) -> Result<()> {
        let pairs = [
            (
                "registry-cert",
                self.cert.is_some(),
                "registry-key",
                self.key.is_some(),
            ),
            (
                "registry-user",
                self.user.is_some(),
                "registry-password-file",
                self.password_file.is_some(),
            ),
        ];
        for (one, has_one, other, has_other) in pairs {
            if has_one != has_other {
                let (given, missing) = if has_one { (one, other) } else { (other, one) };
                let what = format!("{given} is of no use without {missing}");
                return Err(Error::new(what).hint("give both, or none"));
            }
        }
        let is_tls = |url: &String| url.starts_with("https://");
        if self.ca.is_none() && self.urls.iter().any(is_tls) {
            let what = "an https:// registry needs registry-ca: the certificates that sign etcd's";
            return Err(Error::new(what));
        }
        if self.cert.is_some() && !self.urls.iter().all(is_tls) {
            let what = "registry-cert is of no use with http://";
            return Err(Error::new(what).hint("write https://"));
        }
        let is_bad = |c: char| c.is_control() || c.is_whitespace();
        if self.prefix().contains(is_bad) || self.prefix().trim_matches('/').is_empty() {
            let what = "registry-prefix is not a prefix of keys: expected one such as";
            return Err(Error::new(format!("{what} {REGISTRY_PREFIX_DEFAULT}")));
        }
        Ok(())
    }
}

impl Config {
    /// Takes over what the environment says in flannel's names, where neither a flag nor the file
    /// says anything. It counts with a registry alone: with one that flags or file ask for, or
    /// that the environment names where nothing else says whom to talk to. A host that also has
    /// flannel's variables has other tunnels, too. `is_in_registry`: this one has joined already.
    ///
    /// # Errors
    /// Names the variable whose value is of no use.
    pub(super) fn use_flannel_environment(
        &mut self,
        is_in_registry: bool,
        variable: impl Fn(&str) -> Option<OsString>,
    ) -> Result<()> {
        // An empty one is none, as with flannel.
        let set = |name: &str| variable(name).filter(|value| !value.is_empty());
        let text = |name: &str| set(name).map(|value| value.to_string_lossy().into_owned());
        let path = |name: &str| set(name).map(PathBuf::from);
        if !self.has_registry() {
            let Some(urls) = text("FLANNELD_ETCD_ENDPOINTS") else {
                return Ok(());
            };
            if !is_in_registry && self.is_for_peers_by_hand() {
                return Ok(());
            }
            let urls: std::result::Result<_, _> = urls.split(',').map(parse_url).collect();
            self.registry = urls.map_err(|why| bad("FLANNELD_ETCD_ENDPOINTS", &why))?;
        }
        or_else(&mut self.registry_prefix, || text("FLANNELD_ETCD_PREFIX"));
        or_else(&mut self.registry_ca, || path("FLANNELD_ETCD_CAFILE"));
        or_else(&mut self.registry_cert, || path("FLANNELD_ETCD_CERTFILE"));
        or_else(&mut self.registry_key, || path("FLANNELD_ETCD_KEYFILE"));
        or_else(&mut self.registry_user, || text("FLANNELD_ETCD_USERNAME"));
        or_else(&mut self.iface, || text("FLANNELD_IFACE"));
        or_else(&mut self.subnet_file, || path("FLANNELD_SUBNET_FILE"));
        if let (None, Some(value)) = (self.public_ip, text("FLANNELD_PUBLIC_IP")) {
            let address = value.parse();
            self.public_ip = Some(address.map_err(|why| bad("FLANNELD_PUBLIC_IP", &why))?);
        }
        if let (None, Some(value)) = (self.flags.value_source("ip_masq"), text("FLANNELD_IP_MASQ"))
        {
            self.ip_masq = match &*value.to_lowercase() {
                "true" | "t" | "1" => true,
                "false" | "f" | "0" => false,
                _ => return Err(bad("FLANNELD_IP_MASQ", &"expected true or false")),
            };
        }
        Ok(())
    }

    /// Whether the options say whom this tunnel talks to, or that somebody else will.
    fn is_for_peers_by_hand(&self) -> bool {
        !self.peers.is_empty()
            || self.wg_config_file.is_some()
            || self.interface.is_some()
            || self.secret_file.is_some()
            || self.lists_no_peers()
    }

    /// Whether hosts find each other in a registry.
    pub(crate) fn has_registry(&self) -> bool {
        !self.registry.is_empty()
    }

    /// How the registry is reached.
    pub(crate) fn registry_files(&self) -> RegistryFiles {
        RegistryFiles {
            urls: self.registry.clone(),
            prefix: self.registry_prefix.clone(),
            ca: self.registry_ca.clone(),
            cert: self.registry_cert.clone(),
            key: self.registry_key.clone(),
            user: self.registry_user.clone(),
            password_file: self.registry_password_file.clone(),
        }
    }

    /// Seconds that this host stays in the registry after it was last heard of.
    pub(crate) fn registry_ttl_seconds(&self) -> u32 {
        self.registry_ttl.unwrap_or(TTL_SECONDS_DEFAULT)
    }

    /// The file that container tools read.
    pub(crate) fn subnet_file(&self) -> PathBuf {
        let given = self.subnet_file.clone();
        given.unwrap_or_else(|| SUBNET_FILE_DEFAULT.into())
    }

    /// The file with what was last known of the registry.
    pub(crate) fn registry_cache(&self) -> PathBuf {
        let given = self.registry_cache.clone();
        given.unwrap_or_else(|| format!("/var/lib/fastvpn/{}.registry.json", self.tun).into())
    }

    /// Whether the kernel is to route this prefix by itself: what is in the registry's network
    /// has one route together.
    pub(crate) fn is_in_network(&self, prefix: IpNet) -> bool {
        let network = self.registry_network.map(IpNet::V4);
        network.is_some_and(|network: IpNet| network.contains(&prefix))
    }

    /// Makes sure that the options about a registry go together, and that there is one.
    ///
    /// # Errors
    /// Names the option.
    pub(super) fn check_registry(&self) -> Result<()> {
        if self.has_registry() {
            self.registry_files().check()?;
            let contradicted = [
                ("secret-file", self.secret_file.is_some()),
                ("wg-config", self.wg_config_file.is_some()),
                ("an interface for wg", self.interface.is_some()),
            ];
            if let Some((option, _)) = contradicted.iter().find(|(_, is_given)| *is_given) {
                let what = format!("{option} contradicts registry, whose network has the keys");
                return Err(Error::new(what).hint("leave one of them out"));
            }
            if let Some(bad) = self
                .registry_publish
                .iter()
                .find(|net| net.trunc() != **net)
            {
                let what = format!("registry-publish {bad} has bits beyond the prefix length");
                return Err(Error::new(what));
            }
            return Ok(());
        }
        let alone = [
            ("registry-publish", !self.registry_publish.is_empty()),
            ("registry-allow", !self.registry_allow.is_empty()),
            (
                "registry-allow-prefix",
                !self.registry_allow_prefix.is_empty(),
            ),
            ("registry-ttl", self.registry_ttl.is_some()),
            ("ip-masq", self.ip_masq),
        ];
        match alone.iter().find(|(_, is_given)| *is_given) {
            Some((option, _)) => Err(Error::new(format!(
                "{option} is of no use without registry"
            ))),
            None => Ok(()),
        }
    }
}

/// Has an option that is not given be what the environment says.
fn or_else<T>(option: &mut Option<T>, variable: impl FnOnce() -> Option<T>) {
    if option.is_none() {
        *option = variable();
    }
}

fn bad(variable: &str, why: &dyn Display) -> Error {
    Error::new(format!("the environment's {variable}: {why}"))
}

/// What of a network in the registry the options do not say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct NetworkSettings {
    /// All hosts' containers are in it.
    pub(crate) network: Ipv4Net,
    /// This host's subnet.
    pub(crate) subnet: Ipv4Net,
    /// The address to listen on, unless another is given.
    pub(crate) listen: std::net::SocketAddr,
    /// The device's MTU in bytes, unless another is given.
    pub(crate) mtu_bytes: u32,
    /// This host's address, as the others are to find it.
    pub(crate) public_ip: Ipv4Addr,
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;

    use clap::Command;

    use super::*;

    /// What the flags come to where the environment has these variables.
    fn with_environment(flags: &str, variables: &[(&str, &str)]) -> Result<Config> {
        let command = Command::new("fastvpn").no_binary_name(true);
        let command = Config::augment_args_for_update(command);
        let flags = command.try_get_matches_from(flags.split_whitespace());
        Config::from_flags_in(&flags.unwrap(), false, |name| {
            let found = variables.iter().find(|(key, _)| *key == name);
            found.map(|(_, value)| OsString::from(value))
        })
    }

    const FLANNEL: [(&str, &str); 10] = [
        ("FLANNELD_ETCD_ENDPOINTS", "http://a:2379,http://b:2379"),
        ("FLANNELD_ETCD_PREFIX", "/n"),
        ("FLANNELD_ETCD_CAFILE", "ca"),
        ("FLANNELD_ETCD_CERTFILE", ""),
        ("FLANNELD_ETCD_KEYFILE", ""),
        ("FLANNELD_ETCD_USERNAME", ""),
        ("FLANNELD_PUBLIC_IP", "10.0.0.2"),
        ("FLANNELD_IFACE", "eth0"),
        ("FLANNELD_IP_MASQ", "true"),
        ("FLANNELD_SUBNET_FILE", "subnet"),
    ];

    #[test]
    fn flannels_environment_joins_its_network() {
        let config = with_environment("", &FLANNEL).unwrap();
        assert_eq!(config.registry, ["http://a:2379", "http://b:2379"]);
        assert_eq!(config.registry_prefix.as_deref(), Some("/n"));
        assert_eq!(config.registry_ca, Some("ca".into()));
        assert_eq!(config.public_ip, Some(Ipv4Addr::new(10, 0, 0, 2)));
        assert_eq!(config.iface.as_deref(), Some("eth0"));
        assert_eq!(config.subnet_file(), PathBuf::from("subnet"));
        assert!(config.ip_masq && config.registry_user.is_none());
        // Flags go before it.
        let flags = "--registry http://c --ip-masq=false --registry-prefix /m --public-ip 10.0.0.3";
        let config = with_environment(flags, &FLANNEL).unwrap();
        assert_eq!(config.registry, ["http://c"]);
        assert_eq!(config.registry_prefix.as_deref(), Some("/m"));
        assert_eq!(config.public_ip, Some(Ipv4Addr::new(10, 0, 0, 3)));
        assert!(!config.ip_masq && config.iface.as_deref() == Some("eth0"));
    }

    #[test]
    fn other_tunnels_have_nothing_to_do_with_flannels_environment() {
        let bad = FLANNEL.map(|(name, _)| (name, "?"));
        let no_endpoints = &bad[1..];
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "peer = []").unwrap();
        let empty = format!("--config {}", file.path().display());
        for (flags, variables) in [
            ("--peer 10.0.0.1", &FLANNEL[..]),
            ("--peer 10.0.0.1", &bad),
            ("wg0", &FLANNEL),
            ("wg0", &bad),
            (&empty, &FLANNEL),
            // Nothing asks for a registry.
            ("", no_endpoints),
            ("", &FLANNEL[1..]),
        ] {
            let config = with_environment(flags, variables).unwrap();
            let without = with_environment(flags, &[]).unwrap();
            assert_eq!(config, without, "{flags}");
        }
        for (name, value) in [
            ("FLANNELD_ETCD_ENDPOINTS", "a:2379"),
            ("FLANNELD_PUBLIC_IP", "::1"),
            ("FLANNELD_IP_MASQ", "perhaps"),
            ("FLANNELD_ETCD_USERNAME", "u"),
        ] {
            let joins = ("FLANNELD_ETCD_ENDPOINTS", "http://a");
            let fault = with_environment("", &[(name, value), joins]).unwrap_err();
            let known = [name, "registry-password-file"];
            let fault = fault.to_string();
            assert!(known.iter().any(|it| fault.contains(it)), "{fault}");
        }
    }

    fn fault(flags: &str) -> Option<String> {
        let config = Config::from_words(flags.split_whitespace().map(OsStr::new));
        config.err().map(|error| error.to_string())
    }

    #[test]
    fn options_that_belong_together_are_given_together() {
        for good in [
            "--registry http://127.0.0.1:2379",
            "--registry http://a:2379,http://b:2379/ --registry-prefix /n --registry-ttl 60",
            "--registry https://a:2379 --registry-ca ca --registry-cert c --registry-key k",
            "--registry http://a --registry-user u --registry-password-file f",
        ] {
            assert_eq!(fault(good), None, "{good}");
        }
        for (bad, part) in [
            ("--registry a:2379", "such as https://"),
            ("--registry ftp://a", "such as https://"),
            ("--registry http://", "such as https://"),
            ("--registry http://a/b", "such as https://"),
            ("--registry https://a", "registry-ca"),
            ("--registry http://a --registry-cert c", "registry-key"),
            (
                "--registry http://a --registry-cert c --registry-key k",
                "https://",
            ),
            (
                "--registry http://a --registry-user u",
                "registry-password-file",
            ),
            ("--registry http://a --registry-prefix /", "registry-prefix"),
            ("--registry http://a --registry-ttl 1", "registry-ttl 1"),
            (
                "--registry http://a --registry-publish 10.0.0.1/8",
                "bits beyond",
            ),
            (
                "--registry http://a --secret-file s",
                "secret-file contradicts",
            ),
            ("--peer a --registry-publish 10.0.0.0/8", "without registry"),
            (
                "--peer a --registry-allow-prefix 10.0.0.0/8",
                "without registry",
            ),
            ("--peer a --registry-ttl 60", "without registry"),
            ("--peer a --ip-masq", "without registry"),
        ] {
            let fault = fault(bad).unwrap_or_default();
            assert!(fault.contains(part), "{bad}: {fault}");
        }
    }
}
