//! What can be measured: links between the two hosts of a [`Pair`].

mod crowd;
pub mod daemon;
pub mod fastd;
pub mod fastvpn;
pub mod kernel;
pub mod one_packet;
pub mod openvpn;
pub mod others;
pub mod overlay;
pub mod tinc;
pub mod wireguard;

use std::net::{IpAddr, Ipv4Addr};

use ::fastvpn::error::Result;
use tempfile::TempDir;
use testbed::wireguard::Key;
use testbed::{Child, Pair};

pub use others::others;
use overlay::{Changes, Overlay};

/// Addresses of host `a` and host `b` on the cable between them, in one /24.
pub const UNDERLAY: [Ipv4Addr; 2] = [
    Ipv4Addr::new(10, 211, 55, 122),
    Ipv4Addr::new(10, 211, 55, 123),
];

/// Other addresses of host `a`, that no link knows: this one, and those after it.
pub const STRANGER: Ipv4Addr = Ipv4Addr::new(10, 211, 55, 200);

/// How many.
pub const STRANGERS: u8 = 16;

/// Length of the underlay's prefix.
pub const UNDERLAY_PREFIX: u8 = 24;

/// MTU of the cable, in bytes: that of the Internet.
pub const UNDERLAY_MTU_BYTES: u32 = 1500;

/// Addresses of host `a` and host `b` in a tunnel. fastvpn derives them from
/// [`UNDERLAY`]; the others are given the same.
pub const TUNNEL: [Ipv4Addr; 2] = [
    Ipv4Addr::new(10, 244, 55, 122),
    Ipv4Addr::new(10, 244, 55, 123),
];

/// Length of the tunnel's prefix.
pub const TUNNEL_PREFIX: u8 = 16;

/// A link that is up. Dropping it takes it down and leaves nothing behind.
pub struct Link {
    /// Address of host `b` at the far end of the link, as host `a` reaches it.
    pub address: IpAddr,
    /// What keeps changing while the link is up.
    pub changes: Option<Changes>,
    /// Processes that carry the link, at host `a` and at host `b`; empty when
    /// the kernel does it.
    pub processes: [Vec<Child>; 2],
    /// Host `b`'s key, where hosts know each other by WireGuard's.
    pub public_key: Option<Key>,
    /// What the processes were configured with, removed after they have ended.
    pub configuration: Option<TempDir>,
}

/// A way to link two hosts.
pub trait Target {
    /// Short and unique, as in `uring` or `vxlan`.
    fn key(&self) -> &'static str;
    /// As shown to a person.
    fn title(&self) -> &'static str;
    /// How it is run: flags, MTU, version.
    fn detail(&self) -> String;
    /// Why it cannot be measured on this machine, such as that its program is
    /// not installed; `None` when it can.
    fn missing(&self) -> Option<String>;
    /// The UDP port that it receives on, if it is known.
    fn port(&self) -> Option<u16> {
        None
    }
    /// Sets the link up and waits until it carries packets both ways.
    ///
    /// # Errors
    /// One line that names what failed.
    fn start(&self, pair: &Pair) -> Result<Link>;
}

/// All that this bench can set up, in the order in which it is measured.
///
/// # Errors
/// When fastvpn's program cannot be asked what it can do.
pub fn all() -> Result<Vec<Box<dyn Target>>> {
    let mut all: Vec<Box<dyn Target>> = vec![Box::new(kernel::Veth), Box::new(kernel::Vxlan)];
    for target in fastvpn::built_in()? {
        all.push(Box::new(target));
    }
    all.push(Box::new(Overlay::Prefixes));
    all.push(Box::new(Overlay::Changes));
    all.push(Box::new(one_packet::OnePacket));
    all.extend(others());
    Ok(all)
}
