//! How a registry is reached, and what must hold among the options about one.

use std::net::Ipv4Addr;
use std::path::PathBuf;

use clap::Args;
use ipnet::{IpNet, Ipv4Net};

use super::options::Config;
use super::types::{Password, parse_url};
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

    /// The user's password, if it does not come from a file.
    #[arg(skip)]
    pub(crate) password: Option<Password>,
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
                self.password_file.is_some() || self.password.is_some(),
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
            password: self.registry_password.clone(),
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

    /// The file with the key that is made for this host: it outlasts a boot, as the cache does.
    pub(crate) fn registry_key_file(&self) -> PathBuf {
        self.registry_cache().with_extension("key")
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

    use super::*;

    fn fault(flags: &str) -> Option<String> {
        let config = Config::from_words(flags.split_whitespace().map(OsStr::new));
        config.err().map(|error| error.to_string())
    }

    #[test]
    fn what_is_kept_outlasts_a_boot() {
        let files = |flags: &str| {
            let config = Config::from_words(flags.split_whitespace().map(OsStr::new)).unwrap();
            [config.registry_cache(), config.registry_key_file()]
        };
        let kept = [
            "/var/lib/fastvpn/a0.registry.json",
            "/var/lib/fastvpn/a0.registry.key",
        ];
        assert_eq!(
            files("--registry http://a --tun a0"),
            kept.map(PathBuf::from)
        );
        let given = files("--registry http://a --registry-cache /srv/b.json");
        assert_eq!(given, ["/srv/b.json", "/srv/b.key"].map(PathBuf::from));
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
