//! Interfaces that are made and configured like those of the kernel's WireGuard: `fastvpn NAME`,
//! as wg-quick(8) calls a program in user space. Keys, port and peers come by `wg(8)`, addresses,
//! MTU and routes by `ip(8)`.

use std::ffi::OsString;
use std::net::Ipv6Addr;

use super::options::Config;
use crate::error::{Error, Result};
use crate::log::LevelFilter;
use crate::wire::Mode;

/// MTU that such an interface has at first: what wg-quick(8) gives it on Ethernet.
fn mtu_bytes() -> u32 {
    const ETHERNET_BYTES: u32 = 1500;
    ETHERNET_BYTES - Mode::WireGuard.overhead_bytes(Ipv6Addr::UNSPECIFIED.into())
}

impl Config {
    /// Fills in what an interface by a name of its own leaves open.
    pub(super) fn use_interface(&mut self) {
        let Some(name) = &self.interface else {
            return;
        };
        self.tun.clone_from(name);
        self.no_routes = true;
        // Until somebody sets another.
        self.listen_port = Some(0);
        self.mtu_bytes = Some(mtu_bytes());
    }

    /// Takes over what the environment says of an interface by a name of its own, in the words
    /// of wireguard-go; a flag that says otherwise counts.
    ///
    /// # Errors
    /// When it says something that cannot be done.
    pub fn use_environment(&mut self, variable: impl Fn(&str) -> Option<OsString>) -> Result<()> {
        if self.interface.is_none() {
            return Ok(());
        }
        for name in ["WG_TUN_FD", "WG_UAPI_FD"] {
            if variable(name).is_some_and(|value| !value.is_empty()) {
                let what = format!("{name} is set, and fastvpn opens its device and socket itself");
                return Err(Error::new(what).hint(format!("unset {name}")));
            }
        }
        self.foreground |= variable("WG_PROCESS_FOREGROUND").is_some_and(|value| value == "1");
        if self.verbose == 0 && !self.quiet {
            match variable("LOG_LEVEL")
                .as_ref()
                .and_then(|value| value.to_str())
            {
                Some("verbose" | "debug") => self.verbose = 1,
                Some("error") => self.quiet = true,
                Some("silent") => self.is_silent = true,
                // Nobody reads what nobody has asked for.
                _ => self.is_silent = !self.foreground,
            }
        }
        Ok(())
    }

    /// Whether this process is only to start another one, which runs the tunnel.
    pub fn is_launcher(&self) -> bool {
        self.interface.is_some() && !self.foreground && !self.detached
    }

    /// How much is logged.
    pub fn log_level(&self) -> LevelFilter {
        match (self.is_silent, self.quiet, self.verbose) {
            (true, ..) => LevelFilter::OFF,
            (_, true, _) => LevelFilter::WARN,
            (.., 0) => LevelFilter::INFO,
            (.., 1) => LevelFilter::DEBUG,
            _ => LevelFilter::TRACE,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;

    use super::*;

    fn config(words: &str) -> Result<Config> {
        Config::from_words(words.split_whitespace().map(OsStr::new))
    }

    #[test]
    fn an_interface_has_only_a_name() {
        let config = config("wg0 --queues 2").unwrap();
        assert_eq!(config.tun, "wg0");
        assert!(config.is_encrypted() && config.private_key.is_none());
        assert!(config.addresses.is_empty() && config.no_routes);
        assert_eq!(
            (config.listen_port, config.mtu_bytes),
            (Some(0), Some(1420))
        );
        assert!(config.is_launcher());
    }

    #[test]
    fn what_contradicts_an_interface_is_refused() {
        for words in [
            "wg0 --tun wg1",
            "wg0 --peer 10.0.0.1",
            "wg0 --private-key file",
            "wg0 --secret-file file",
            "wg0 --config file",
            "wg0 --route 10.0.0.0/8",
            "wg0 --address 10.0.0.1/8",
            "wg0 --mtu 1300",
            "wg0 wg1",
            "a/b",
            "far-too-long-a-name",
        ] {
            assert!(config(words).is_err(), "{words}");
        }
    }

    fn level(words: &str, variables: &[(&str, &str)]) -> (bool, LevelFilter) {
        let mut config = config(words).unwrap();
        let variable = |name: &str| {
            let found = variables.iter().find(|(key, _)| *key == name);
            found.map(|(_, value)| OsString::from(value))
        };
        config.use_environment(variable).unwrap();
        (config.is_launcher(), config.log_level())
    }

    #[test]
    fn the_environment_is_that_of_wireguard_go() {
        let foreground = ("WG_PROCESS_FOREGROUND", "1");
        for (words, variables, expected) in [
            ("wg0", &[][..], (true, LevelFilter::OFF)),
            ("wg0", &[foreground], (false, LevelFilter::INFO)),
            ("-f wg0", &[], (false, LevelFilter::INFO)),
            ("wg0", &[("LOG_LEVEL", "error")], (true, LevelFilter::WARN)),
            ("wg0", &[("LOG_LEVEL", "debug")], (true, LevelFilter::DEBUG)),
            (
                "-f wg0",
                &[("LOG_LEVEL", "silent")],
                (false, LevelFilter::OFF),
            ),
            (
                "-vv wg0",
                &[("LOG_LEVEL", "error")],
                (true, LevelFilter::TRACE),
            ),
            ("-q wg0", &[], (true, LevelFilter::WARN)),
            // An empty one is none.
            (
                "wg0",
                &[("WG_PROCESS_FOREGROUND", "")],
                (true, LevelFilter::OFF),
            ),
            // Other tunnels have nothing to do with it.
            (
                "--peer 10.0.0.1",
                &[("LOG_LEVEL", "silent")],
                (false, LevelFilter::INFO),
            ),
        ] {
            assert_eq!(level(words, variables), expected, "{words} {variables:?}");
        }
    }

    #[test]
    fn descriptors_of_others_are_refused() {
        let mut config = config("wg0").unwrap();
        let set = |name: &str| (name == "WG_TUN_FD").then(|| OsString::from("3"));
        let refused = config.use_environment(set).unwrap_err().to_string();
        assert!(refused.contains("WG_TUN_FD"), "{refused}");
    }
}
