//! What the environment says in flannel's names, so that fastvpn can take flanneld's place.

use std::ffi::OsString;
use std::fmt::Display;
use std::path::PathBuf;

use zeroize::Zeroizing;

use super::keys::hide_memory;
use super::options::Config;
use super::types::{Password, parse_regex, parse_url};
use crate::error::{Error, Result};

/// The password for etcd that the environment has in flannel's name, if it has one.
pub(crate) fn password_of_environment(
    variable: impl Fn(&str) -> Option<OsString>,
) -> Option<Password> {
    let value = variable("FLANNELD_ETCD_PASSWORD")?.into_string().ok()?;
    (!value.is_empty()).then(|| {
        // With the environment itself.
        hide_memory();
        Password(Zeroizing::new(value))
    })
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
        let address = |name: &str| {
            let parsed = text(name).map(|value| value.parse().map_err(|why| bad(name, &why)));
            parsed.transpose()
        };
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
        if self.registry_password_file.is_none() {
            self.registry_password = password_of_environment(&variable);
        }
        if self.lacks_iface() {
            self.iface = text("FLANNELD_IFACE").into_iter().collect();
            let regex = text("FLANNELD_IFACE_REGEX").map(|text| parse_regex(&text));
            let regex = regex.transpose();
            let regex = regex.map_err(|why| bad("FLANNELD_IFACE_REGEX", &why))?;
            self.iface_regex = regex.into_iter().collect();
            self.iface_can_reach = address("FLANNELD_IFACE_CAN_REACH")?;
        }
        or_else(&mut self.subnet_file, || path("FLANNELD_SUBNET_FILE"));
        if self.public_ip.is_none() {
            self.public_ip = address("FLANNELD_PUBLIC_IP")?;
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

    /// Whether the options leave open which interface leads to the other hosts.
    fn lacks_iface(&self) -> bool {
        self.iface.is_empty() && self.iface_regex.is_empty() && self.iface_can_reach.is_none()
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

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use clap::{Args, Command};

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

    const FLANNEL: [(&str, &str); 13] = [
        ("FLANNELD_ETCD_ENDPOINTS", "http://a:2379,http://b:2379"),
        ("FLANNELD_ETCD_PREFIX", "/n"),
        ("FLANNELD_ETCD_CAFILE", "ca"),
        ("FLANNELD_ETCD_CERTFILE", ""),
        ("FLANNELD_ETCD_KEYFILE", ""),
        ("FLANNELD_ETCD_USERNAME", ""),
        ("FLANNELD_PUBLIC_IP", "10.0.0.2"),
        ("FLANNELD_ETCD_PASSWORD", ""),
        ("FLANNELD_IFACE", "eth0"),
        ("FLANNELD_IFACE_REGEX", "^eth"),
        ("FLANNELD_IFACE_CAN_REACH", "10.0.0.9"),
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
        assert_eq!(
            (&config.iface[..], &config.iface_regex[..]),
            (&["eth0".into()][..], &["^eth".into()][..])
        );
        assert_eq!(config.iface_can_reach, "10.0.0.9".parse().ok());
        assert_eq!(config.subnet_file(), PathBuf::from("subnet"));
        assert!(config.ip_masq && config.registry_user.is_none());
        assert!(config.registry_password.is_none());
        // Flags go before it.
        let flags = "--registry http://c --ip-masq=false --registry-prefix /m --public-ip 10.0.0.3";
        let config = with_environment(flags, &FLANNEL).unwrap();
        assert_eq!(config.registry, ["http://c"]);
        assert_eq!(config.registry_prefix.as_deref(), Some("/m"));
        assert_eq!(config.public_ip, Some(Ipv4Addr::new(10, 0, 0, 3)));
        assert!(!config.ip_masq && config.iface == ["eth0"]);
        // One way to choose an interface leaves no room for another.
        let config = with_environment("--iface-regex ^wl", &FLANNEL).unwrap();
        assert_eq!(
            (config.iface.len(), &config.iface_regex[..]),
            (0, &["^wl".into()][..])
        );
    }

    #[test]
    fn a_password_of_the_environment_is_used_and_not_shown() {
        let variables = [
            ("FLANNELD_ETCD_ENDPOINTS", "http://a:2379"),
            ("FLANNELD_ETCD_USERNAME", "host"),
            ("FLANNELD_ETCD_PASSWORD", "hush"),
        ];
        let config = with_environment("", &variables).unwrap();
        let password = config.registry_files().password.unwrap();
        assert_eq!(password.0.as_str(), "hush");
        assert!(!format!("{config:?} {password:?}").contains("hush"));
        // One in a file goes before it.
        let config = with_environment("--registry-password-file f", &variables).unwrap();
        assert_eq!(config.registry_files().password, None);
        // Without a user it is of no use.
        let variables = [variables[0], variables[2]];
        let fault = with_environment("", &variables).unwrap_err().to_string();
        assert!(fault.contains("registry-user"), "{fault}");
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
}
