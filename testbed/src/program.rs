//! Programs that somebody else may have installed.

use std::env;
use std::fs::OpenOptions;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use fastvpn::error::{Error, Result};

/// Where daemons are, although ordinary users' `PATH` may not say so.
const SYSTEM_DIRECTORIES: [&str; 3] = ["/usr/local/sbin", "/usr/sbin", "/sbin"];

/// Where `tests/programs.sh` installs what Debian does not have.
const OWN_DIRECTORY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/programs/bin");

const TUN: &str = "/dev/net/tun";

/// Where a program comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// A package of Debian's.
    Debian(&'static str),
    /// A crate on crates.io, which `tests/programs.sh` installs.
    Crate(&'static str),
}

/// Shows manual pages, and what is wrong with them.
pub const MANDOC: Program = Program::debian("mandoc", "mandoc");

/// Terminals without a screen.
pub const TMUX: Program = Program::debian("tmux", "tmux");

/// Wireshark's reader of captures.
pub const TSHARK: Program = Program::debian("tshark", "tshark");

/// A program that somebody else may have installed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Program {
    /// Its file name.
    pub name: &'static str,
    /// What has it.
    pub source: Source,
}

/// Prometheus.
pub const PROMETHEUS: Program = Program::debian("prometheus", "prometheus");

/// Its tool, which judges metrics and rules.
pub const PROMTOOL: Program = Program::debian("promtool", "prometheus");

impl Program {
    /// A program of one of Debian's packages.
    pub const fn debian(name: &'static str, package: &'static str) -> Self {
        let source = Source::Debian(package);
        Self { name, source }
    }

    /// Where it is, if it is installed.
    pub fn path(&self) -> Option<PathBuf> {
        let path = env::var_os("PATH").unwrap_or_default();
        env::split_paths(&path)
            .chain(SYSTEM_DIRECTORIES.map(PathBuf::from))
            .chain([Path::new(OWN_DIRECTORY).into()])
            .map(|directory| directory.join(self.name))
            .find(|file| file.is_file())
    }

    /// Why it cannot be run here.
    pub fn missing(&self) -> Option<String> {
        if self.path().is_none() {
            let Self { name, source } = self;
            return Some(match source {
                Source::Debian(package) => {
                    format!("{name} is not installed (Debian package {package})")
                }
                Source::Crate(_) => format!("{name} is not installed (tests/programs.sh)"),
            });
        }
        let tun = OpenOptions::new().read(true).write(true).open(TUN);
        tun.err()
            .map(|cause| Error::os(format!("cannot open {TUN}"), cause).to_string())
    }

    /// A command that starts it.
    ///
    /// # Errors
    /// When it is not installed.
    pub fn command(&self) -> Result<Command> {
        let path = self.path().ok_or_else(|| {
            let error = Error::new(format!("{} is not installed", self.name));
            error.hint(match self.source {
                Source::Debian(package) => format!("install Debian's package {package}"),
                Source::Crate(name) => {
                    format!("tests/programs.sh installs the crate {name}")
                }
            })
        })?;
        Ok(Command::new(path))
    }

    /// What it prints when it is started with some arguments, without the ends' spaces.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn ask(&self, arguments: &[&str]) -> Result<String> {
        let name = self.name;
        let output = self
            .command()?
            .args(arguments)
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .output()
            .map_err(|cause| Error::os(format!("cannot start {name}"), cause))?;
        // The status says little: OpenVPN's is 1 when asked for its version.
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_string())
    }

    /// Title and version, as the word after `before` in what it prints.
    pub fn title_and_version(&self, title: &str, before: &str) -> String {
        let version = self
            .ask(&["--version"])
            .ok()
            .and_then(|text| word_after(&text, before));
        match version {
            Some(version) => format!("{title} {version}"),
            None => title.to_string(),
        }
    }
}

fn word_after(text: &str, before: &str) -> Option<String> {
    let (_, rest) = text.split_once(before)?;
    let word = rest.split_whitespace().next()?;
    Some(word.trim_start_matches('v').to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_found() {
        let found = |text, before| word_after(text, before);
        let openvpn = "OpenVPN 2.6.14 x86_64-pc-linux-gnu [SSL (OpenSSL)]";
        assert_eq!(found(openvpn, "OpenVPN").as_deref(), Some("2.6.14"));
        assert_eq!(found("fastd v22", "fastd").as_deref(), Some("22"));
        assert_eq!(found("fastd", "fastd"), None);
        assert_eq!(found("", "tinc version"), None);
    }

    #[test]
    fn what_is_not_installed_is_named_with_its_package() {
        let program = Program::debian("no-such-tunnel", "a-package");
        let expected = "no-such-tunnel is not installed (Debian package a-package)";
        assert_eq!(program.missing().as_deref(), Some(expected));
        assert!(program.command().is_err());
        assert_eq!(program.title_and_version("Tunnel", "v"), "Tunnel");
    }
}
