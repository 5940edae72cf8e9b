//! tinc without cipher, digest and compression. Its daemons know each other by
//! RSA keys and keep a TCP connection, whose traffic stays encrypted; packets go
//! by UDP.

use std::path::Path;
use std::process::Stdio;

use fastvpn::error::{Error, Result};
use testbed::Pair;

use super::others::{
    Program, make_directory, mtu_bytes, private_directory, set_up_interface, write,
};
use super::{Link, TUNNEL, Target, UNDERLAY, daemon};

const PROGRAM: Program = Program::debian("tincd", "tinc");

const TUN_NAME: &str = "tinc0";
const RSA_BITS: &str = "2048";

/// Sequence number, and an Ethernet header even around IP packets.
const HEADER_BYTES: u32 = 4 + 14;
const MTU_BYTES: u32 = mtu_bytes(HEADER_BYTES);

/// Names of host `a` and host `b`.
const NAMES: [&str; 2] = ["a", "b"];

/// tinc.
pub struct Tinc;

impl Target for Tinc {
    fn key(&self) -> &'static str {
        "tinc"
    }

    fn title(&self) -> &'static str {
        "tinc, no cipher"
    }

    fn detail(&self) -> String {
        let version = PROGRAM.title_and_version("tinc", "tinc version");
        format!(
            "{version}, packets by UDP with no cipher, no digest, no compression; MTU {MTU_BYTES}"
        )
    }

    fn missing(&self) -> Option<String> {
        PROGRAM.missing()
    }

    fn start(&self, pair: &Pair) -> Result<Link> {
        let directory = private_directory()?;
        let homes = NAMES.map(|name| directory.path().join(name));
        let mut cards = Vec::new();
        for (own, home) in homes.iter().enumerate() {
            make_directory(home)?;
            make_directory(&home.join("hosts"))?;
            cards.push(make_card(home, own)?);
        }
        let mut commands = [PROGRAM.command()?, PROGRAM.command()?];
        for (own, (command, home)) in commands.iter_mut().zip(&homes).enumerate() {
            for (name, card) in NAMES.iter().zip(&cards) {
                write(&home.join("hosts").join(name), card)?;
            }
            write(&home.join("tinc.conf"), &settings(own))?;
            command.arg("--config").arg(home);
            command.arg(format!("--pidfile={}", home.join("pid").display()));
            command.args(["--no-detach", "--debug=0"]);
        }
        let mut link = daemon::start_and_set_up(pair, commands, |own, _| {
            set_up_interface([&pair.a, &pair.b][own], own, TUN_NAME, MTU_BYTES)
        })?;
        link.configuration = Some(directory);
        Ok(link)
    }
}

/// What a host says of itself.
fn settings(own: usize) -> String {
    // One of the two calls the other, so that they cannot cross.
    let connect = match own {
        0 => format!("ConnectTo = {}\n", NAMES[1]),
        _ => String::new(),
    };
    format!(
        "Name = {}\n\
         Mode = router\n\
         AddressFamily = ipv4\n\
         DeviceType = tun\n\
         Interface = {TUN_NAME}\n\
         BindToAddress = {}\n\
         {connect}",
        NAMES[own], UNDERLAY[own]
    )
}

/// Makes a host's keys; returns what the other has to know of it.
fn make_card(home: &Path, own: usize) -> Result<String> {
    // It wants a name to file the public key under.
    write(&home.join("tinc.conf"), &format!("Name = {}\n", NAMES[own]))?;
    let failed = |cause| Error::os("cannot make RSA keys with tincd", cause);
    let made = PROGRAM
        .command()?
        .arg("--config")
        .arg(home)
        // Without a terminal it asks nothing and puts the keys where they belong.
        .arg(format!("--generate-keys={RSA_BITS}"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .map_err(failed)?;
    if !made.success() {
        return Err(Error::new(format!(
            "cannot make RSA keys: tincd ended with {made}"
        )));
    }
    let public = std::fs::read_to_string(home.join("hosts").join(NAMES[own])).map_err(failed)?;
    // Path MTU discovery takes its time, during which large packets would go by
    // TCP; here the MTU is known.
    Ok(format!(
        "Address = {}\n\
         Subnet = {}/32\n\
         Cipher = none\n\
         Digest = none\n\
         MACLength = 0\n\
         Compression = 0\n\
         PMTUDiscovery = no\n\
         {public}",
        UNDERLAY[own], TUNNEL[own]
    ))
}
