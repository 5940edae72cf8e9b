//! OpenVPN in the mode that it still has for tests: no keys, so neither cipher
//! nor authentication, and nothing around a packet but the UDP header.

use fastvpn::error::Result;
use testbed::Pair;

use super::others::{Program, mtu_bytes, set_up_interface};
use super::{Link, Target, UNDERLAY, daemon};

const PROGRAM: Program = Program::debian("openvpn", "openvpn");

const TUN_NAME: &str = "openvpn0";
const PORT: &str = "1194";
const MTU_BYTES: u32 = mtu_bytes(0);

/// OpenVPN.
pub struct OpenVpn;

impl Target for OpenVpn {
    fn key(&self) -> &'static str {
        "openvpn"
    }

    fn title(&self) -> &'static str {
        "OpenVPN, no cipher"
    }

    fn detail(&self) -> String {
        let version = PROGRAM.title_and_version("OpenVPN", "OpenVPN");
        format!("{version} over UDP without keys: no cipher, no authentication; MTU {MTU_BYTES}")
    }

    fn missing(&self) -> Option<String> {
        PROGRAM.missing()
    }

    fn start(&self, pair: &Pair) -> Result<Link> {
        let mut commands = [PROGRAM.command()?, PROGRAM.command()?];
        for (own, command) in commands.iter_mut().enumerate() {
            let (local, peer) = (UNDERLAY[own].to_string(), UNDERLAY[1 - own].to_string());
            command.args(["--dev", TUN_NAME, "--dev-type", "tun", "--proto", "udp4"]);
            command.args(["--local", &local, "--lport", PORT]);
            command.args(["--remote", &peer, "--rport", PORT]);
            // Its default buffers for packets follow the MTU; the rest is its own.
            command.args(["--tun-mtu", &MTU_BYTES.to_string()]);
            command.args(["--disable-dco", "--verb", "1"]);
        }
        daemon::start_and_set_up(pair, commands, |own, _| {
            set_up_interface([&pair.a, &pair.b][own], own, TUN_NAME, MTU_BYTES)
        })
    }
}
