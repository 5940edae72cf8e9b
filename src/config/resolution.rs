//! Flags over file over defaults, checked.
//!
//! [`Config`] is what can be said without asking the network. Names may not
//! resolve yet and links may not be up yet; `daemon::settings` adds what follows
//! from the peers that can be reached now.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::ops::RangeInclusive;
use std::path::PathBuf;

use clap::{ArgMatches, Args, Command, FromArgMatches};

use super::file::{parse_bytes, read_file};
use super::options::{Config, QUEUES};
use super::peers::{check_peers, check_prefix};
use super::types::{is_host, parse_tun_name};
use super::wg_quick;
use crate::error::{Error, Result};
use crate::packet::probe::KEEPALIVE_SECONDS_MAX;

/// Values of `--mtu`, in bytes: from what IPv4 asks for (RFC 791) to what fits a
/// UDP datagram.
const MTU_BYTES: RangeInclusive<i64> = 68..=65507;

/// Values of `--txqueuelen`, in packets.
const TXQUEUELEN: RangeInclusive<i64> = 1..=100_000;

/// Values of `--keepalive`.
const KEEPALIVE_SECONDS: RangeInclusive<i64> = 1..=KEEPALIVE_SECONDS_MAX as i64;

/// Values of `--registry-ttl`: from what several attempts to renew a lease take.
const REGISTRY_TTL_SECONDS: RangeInclusive<i64> = 5..=86_400;

impl Config {
    /// Reads the file that the flags name, if any; puts the flags in place of what
    /// it says, and checks the result. `flags`: of a command with the arguments of
    /// [`Config`].
    ///
    /// # Errors
    /// One line that names the option, or the place in the file.
    pub fn from_flags(flags: &ArgMatches) -> Result<Self> {
        Self::from_flags_in(flags, false, |name| std::env::var_os(name))
    }

    /// As [`Self::from_flags`], with what the environment says. `is_in_registry`: the options of
    /// a tunnel that has joined a registry are read again.
    pub(super) fn from_flags_in(
        flags: &ArgMatches,
        is_in_registry: bool,
        variable: impl Fn(&str) -> Option<OsString>,
    ) -> Result<Self> {
        let file = |id| flags.get_one::<PathBuf>(id);
        let mut config = match (file("config_file"), file("wg_config_file")) {
            (Some(path), _) => read_file(path)?,
            (None, Some(path)) => wg_quick::read_file(path)?,
            (None, None) => parse_bytes("", b"")?,
        };
        let of_file = (config.verbose, config.quiet);
        let merged = config.update_from_arg_matches(flags);
        merged.map_err(|error| Error::new(error.to_string()))?;
        // clap has a value for these also when they are not given.
        if (config.verbose, config.quiet) == (0, false) {
            (config.verbose, config.quiet) = of_file;
        }
        config.flags = flags.clone();
        config.use_flannel_environment(is_in_registry, variable)?;
        config.use_interface();
        match (config.check_and_read(), config.file()) {
            (Ok(()), _) => Ok(config),
            // Flags or the file may be at fault: what is wrong is named with its value.
            (Err(error), Some(file)) => {
                let what = format!("with {}, {}", file.display(), error.fault());
                Err(error.about(what))
            }
            (Err(error), None) => Err(error),
        }
    }

    /// As [`Self::from_flags`], of a command line without the program's name.
    ///
    /// # Errors
    /// Also when the words are not flags.
    pub(crate) fn from_words<'a>(words: impl IntoIterator<Item = &'a OsStr>) -> Result<Self> {
        let command = Command::new("fastvpn").no_binary_name(true);
        let flags = Self::augment_args_for_update(command).try_get_matches_from(words);
        Self::from_flags(&flags.map_err(|error| Error::new(error.to_string()))?)
    }

    /// The configuration as it would be at a start now: the same flags, and the
    /// file as it is today.
    ///
    /// # Errors
    /// As [`Self::from_flags`]; and when there were peers, and the file says nothing
    /// of any: it is more likely half written, or another one, than meant.
    pub(crate) fn reread(&self) -> Result<Self> {
        let variable = |name: &str| std::env::var_os(name);
        let mut new = Self::from_flags_in(&self.flags, self.has_registry(), variable)?;
        let peers = self.peers.len();
        if new.needs_identity()
            && let Some(identity) = &self.own_identity
        {
            new.set_identity(identity.clone())?;
        }
        if peers > 0 && new.peers.is_empty() && !new.lists_no_peers() {
            let file = new.file().cloned().unwrap_or_default();
            let what = format!(
                "{} has no peers any more, and {peers} would be removed",
                file.display()
            );
            return Err(Error::new(what).hint(match new.wg_config_file {
                None => "if that is meant, write `peer = []`",
                Some(_) => "if that is meant, start fastvpn again",
            }));
        }
        Ok(new)
    }

    /// Whether the file has an empty list of peers, rather than none.
    pub(super) fn lists_no_peers(&self) -> bool {
        let text = self
            .config_file
            .as_ref()
            .and_then(|file| fs::read_to_string(file).ok());
        let keys = text.and_then(|text| toml::from_str::<toml::Table>(&text).ok());
        keys.is_some_and(|keys| keys.contains_key("peer"))
    }

    fn check_and_read(&mut self) -> Result<()> {
        self.check()?;
        self.use_secret()?;
        self.read_keys()
    }

    /// What flags and file must be checked for alike.
    fn check(&self) -> Result<()> {
        in_range("queues", self.queues.into(), QUEUES)?;
        in_range("txqueuelen", self.txqueuelen.into(), TXQUEUELEN)?;
        if let Some(mtu_bytes) = self.mtu_bytes {
            in_range("mtu", mtu_bytes.into(), MTU_BYTES)?;
        }
        self.check_keepalive()?;
        parse_tun_name(&self.tun)
            .map_err(|why| Error::new(format!("tun {:?}: {why}", self.tun)))?;
        if let Some(bad) = self.addresses.iter().find(|net| !is_host(net.addr())) {
            return Err(Error::new(format!(
                "address {bad} is not the address of a host"
            )));
        }
        self.routes.iter().try_for_each(check_prefix)?;
        if let Some(route) = self.routes.first().filter(|_| self.no_routes) {
            return Err(Error::new(format!("route {route} contradicts no-routes"))
                .hint("leave one of them out"));
        }
        self.check_cores()?;
        if self.wg_config_file.is_some() && !self.is_encrypted() {
            let what = "there is no private key, and all would be sent in clear";
            return Err(Error::new(what)
                .hint("its [Interface] takes PrivateKey; --private-key names a file with one"));
        }
        self.check_secret()?;
        self.check_registry()?;
        if let Some(ttl) = self.registry_ttl {
            in_range("registry-ttl", ttl.into(), REGISTRY_TTL_SECONDS)?;
        }
        // With a shared secret they are named as in plain mode.
        let is_encrypted = self.is_encrypted() && self.secret_file.is_none();
        // With a registry it is its network that says so.
        check_peers(&self.peers, (!self.has_registry()).then_some(is_encrypted))
    }

    fn check_keepalive(&self) -> Result<()> {
        let Some(seconds) = self.keepalive_seconds else {
            return Ok(());
        };
        if self.is_encrypted() {
            let what = "keepalive is for tunnels without keys";
            return Err(Error::new(what)
                .hint("with keys, each [[peer]] takes persistent-keepalive in the file"));
        }
        in_range("keepalive", seconds.into(), KEEPALIVE_SECONDS)
    }

    fn check_cores(&self) -> Result<()> {
        let available = core_affinity::get_core_ids().unwrap_or_default();
        let available: Vec<usize> = available.iter().map(|core| core.id).collect();
        match self.cores.0.iter().find(|core| !available.contains(core)) {
            Some(missing) => Err(Error::new(format!("core {missing} is not available"))
                .hint(format!("--cores may use {available:?}"))),
            None => Ok(()),
        }
    }
}

fn in_range(option: &str, value: i64, range: RangeInclusive<i64>) -> Result<()> {
    match range.contains(&value) {
        true => Ok(()),
        false => Err(Error::new(format!("{option} {value} is not in {range:?}"))),
    }
}

#[cfg(test)]
#[path = "resolution_tests.rs"]
mod tests;
