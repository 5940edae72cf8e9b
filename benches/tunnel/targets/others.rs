//! Other people's tunnels, as far as they are installed, and what starting them
//! has in common.
//!
//! Each is run as it is meant to be run for speed: without cipher where it can
//! do without, with its defaults otherwise, and with the largest MTU whose
//! packets, wrapped, fit the cable.

use std::fs;
use std::net::IpAddr;
use std::path::Path;

use fastvpn::error::{Error, Result};
use ipnet::IpNet;
use tempfile::TempDir;
use testbed::Namespace;
pub(super) use testbed::program::Program;

use super::fastd::Fastd;
use super::openvpn::OpenVpn;
use super::tinc::Tinc;
use super::wireguard::{BORINGTUN, GOTATUN, WIREGUARD_GO};
use super::{TUNNEL, TUNNEL_PREFIX, Target, UNDERLAY_MTU_BYTES};

/// IPv4 and UDP headers: what every one of them puts around a packet.
const UDP_OVERHEAD_BYTES: u32 = 20 + 8;

/// All that are known, installed or not.
pub fn others() -> Vec<Box<dyn Target>> {
    vec![
        Box::new(OpenVpn),
        Box::new(Fastd),
        Box::new(Tinc),
        Box::new(WIREGUARD_GO),
        Box::new(BORINGTUN),
        Box::new(GOTATUN),
    ]
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
