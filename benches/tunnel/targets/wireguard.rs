//! Other people's WireGuard in user space, always with its cipher.

use fastvpn::error::Result;
use ipnet::IpNet;
use testbed::Pair;
use testbed::wireguard::{self, Implementation, Interface, Key, Peer};

use super::others::{mtu_bytes, set_up_interface};
use super::{Link, TUNNEL, Target, UNDERLAY, daemon};

const TUN_NAME: &str = "wireguard0";
const PORT: u16 = 51_820;

/// Type, receiver, counter and authentication tag.
const HEADER_BYTES: u32 = 4 + 4 + 8 + 16;
const MTU_BYTES: u32 = mtu_bytes(HEADER_BYTES);

/// One of them.
pub struct Wireguard {
    key: &'static str,
    implementation: Implementation,
}

/// wireguard-go, the original.
pub const WIREGUARD_GO: Wireguard = Wireguard {
    key: "wireguard-go",
    implementation: wireguard::WIREGUARD_GO,
};

/// boringtun.
pub const BORINGTUN: Wireguard = Wireguard {
    key: "boringtun",
    implementation: wireguard::BORINGTUN,
};

/// GotaTun.
pub const GOTATUN: Wireguard = Wireguard {
    key: "gotatun",
    implementation: wireguard::GOTATUN,
};

impl Target for Wireguard {
    fn key(&self) -> &'static str {
        self.key
    }

    fn title(&self) -> &'static str {
        self.key
    }

    fn detail(&self) -> String {
        let version = self.implementation.title_and_version();
        format!("{version}, ChaCha20-Poly1305 as always; MTU {MTU_BYTES}")
    }

    fn missing(&self) -> Option<String> {
        self.implementation.missing()
    }

    fn port(&self) -> Option<u16> {
        Some(PORT)
    }

    fn start(&self, pair: &Pair) -> Result<Link> {
        let keys = [wireguard::random_key()?, wireguard::random_key()?];
        let command = || self.implementation.command(TUN_NAME);
        let commands = [command()?, command()?];
        let mut link = daemon::start_and_set_up(pair, commands, |own, child| {
            let socket = wireguard::socket_of(child.pid(), TUN_NAME)?;
            Ok(wireguard::configure(&socket, &interface(own, &keys))?
                && set_up_interface([&pair.a, &pair.b][own], own, TUN_NAME, MTU_BYTES)?)
        })?;
        link.public_key = Some(wireguard::public_key(&keys[1]));
        Ok(link)
    }
}

/// What host `own` is told.
fn interface(own: usize, keys: &[Key; 2]) -> Interface {
    let peer = 1 - own;
    Interface {
        private_key: keys[own],
        port: PORT,
        peers: vec![Peer {
            public_key: wireguard::public_key(&keys[peer]),
            preshared_key: None,
            endpoint: Some((UNDERLAY[peer], PORT).into()),
            prefixes: vec![IpNet::new_assert(TUNNEL[peer].into(), 32)],
            keepalive_s: None,
        }],
    }
}
