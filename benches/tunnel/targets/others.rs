//! Other people's tunnels, as far as they are installed, and what starting them
//! has in common.
//!
//! Each is run as it is meant to be run for speed: without cipher where it can
//! do without, with its defaults otherwise, and with the largest MTU whose
//! packets, wrapped, fit the cable.

use std::env;
use std::fs::{self, OpenOptions};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use fastvpn::error::{Error, Result};
use ipnet::IpNet;
use tempfile::TempDir;
use testbed::Namespace;

use super::fastd::Fastd;
use super::openvpn::OpenVpn;
use super::tinc::Tinc;
use super::wireguard_go::WireguardGo;
use super::{TUNNEL, TUNNEL_PREFIX, Target, UNDERLAY_MTU_BYTES};

/// IPv4 and UDP headers: what every one of them puts around a packet.
const UDP_OVERHEAD_BYTES: u32 = 20 + 8;

/// Where daemons are, although ordinary users' `PATH` may not say so.
const SYSTEM_DIRECTORIES: [&str; 3] = ["/usr/local/sbin", "/usr/sbin", "/sbin"];

const TUN: &str = "/dev/net/tun";

/// All that are known, installed or not.
pub fn others() -> Vec<Box<dyn Target>> {
    vec![
        Box::new(OpenVpn),
        Box::new(Fastd),
        Box::new(Tinc),
        Box::new(WireguardGo),
    ]
}

/// A program that somebody else may have installed.
pub(super) struct Program {
    /// Its file name.
    pub name: &'static str,
    /// Debian's package that has it.
    pub package: &'static str,
}

impl Program {
    /// Where it is, if it is installed.
    pub fn path(&self) -> Option<PathBuf> {
        let path = env::var_os("PATH").unwrap_or_default();
        env::split_paths(&path)
            .chain(SYSTEM_DIRECTORIES.map(PathBuf::from))
            .map(|directory| directory.join(self.name))
            .find(|file| file.is_file())
    }

    /// Why it cannot be run here.
    pub fn missing(&self) -> Option<String> {
        let Self { name, package } = self;
        if self.path().is_none() {
            return Some(format!(
                "{name} is not installed (Debian package {package})"
            ));
        }
        let tun = OpenOptions::new().read(true).write(true).open(TUN);
        tun.err()
            .map(|cause| Error::os(format!("cannot open {TUN}"), cause).to_string())
    }

    /// A command that starts it.
    pub fn command(&self) -> Result<Command> {
        let path = self.path().ok_or_else(|| {
            let Self { name, package } = self;
            Error::new(format!("{name} is not installed"))
                .hint(format!("install Debian's package {package}"))
        })?;
        Ok(Command::new(path))
    }

    /// What it prints when it is started with some arguments, without the ends' spaces.
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

/// The MTU of a tunnel that puts so many bytes into each datagram beside the packet.
pub(super) const fn mtu_bytes(overhead_bytes: u32) -> u32 {
    UNDERLAY_MTU_BYTES - UDP_OVERHEAD_BYTES - overhead_bytes
}

/// A directory that nobody else may look into.
pub(super) fn private_directory() -> Result<TempDir> {
    // Mode 0700 is tempfile's default.
    TempDir::with_prefix("tunnel-bench-")
        .map_err(|cause| Error::os("cannot make a temporary directory", cause))
}

/// Writes a file of its configuration.
pub(super) fn write(file: &Path, text: &str) -> Result<()> {
    fs::write(file, text)
        .map_err(|cause| Error::os(format!("cannot write {}", file.display()), cause))
}

/// Makes one of its directories.
pub(super) fn make_directory(directory: &Path) -> Result<()> {
    fs::create_dir(directory)
        .map_err(|cause| Error::os(format!("cannot make {}", directory.display()), cause))
}

/// Gives the interface of host `own` its MTU and address; `false` while there is none.
pub(super) fn set_up_interface(
    host: &Namespace,
    own: usize,
    name: &str,
    mtu_bytes: u32,
) -> Result<bool> {
    let mut netlink = host.netlink()?;
    let Some(index) = netlink.link_index(name)? else {
        return Ok(false);
    };
    netlink.set_mtu(index, mtu_bytes)?;
    let address = IpAddr::from(TUNNEL[own]);
    netlink.add_address(index, IpNet::new_assert(address, TUNNEL_PREFIX))?;
    netlink.set_up(index)?;
    Ok(true)
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
        let program = Program {
            name: "no-such-tunnel",
            package: "a-package",
        };
        let expected = "no-such-tunnel is not installed (Debian package a-package)";
        assert_eq!(program.missing().as_deref(), Some(expected));
        assert!(program.command().is_err());
        assert_eq!(program.title_and_version("Tunnel", "v"), "Tunnel");
    }
}
