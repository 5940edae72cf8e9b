//! fastd with its method `null`: peers know each other by their keys, but
//! packets are neither encrypted nor authenticated.

use fastvpn::error::{Error, Result};
use testbed::Pair;

use super::others::{Program, mtu_bytes, private_directory, set_up_interface, write};
use super::{Link, Target, UNDERLAY, daemon};

const PROGRAM: Program = Program::debian("fastd", "fastd");

const TUN_NAME: &str = "fastd0";
const PORT: u16 = 10_000;

/// The type of the datagram.
const HEADER_BYTES: u32 = 1;
const MTU_BYTES: u32 = mtu_bytes(HEADER_BYTES);

/// fastd.
pub struct Fastd;

impl Target for Fastd {
    fn key(&self) -> &'static str {
        "fastd"
    }

    fn title(&self) -> &'static str {
        "fastd, no cipher"
    }

    fn detail(&self) -> String {
        let version = PROGRAM.title_and_version("fastd", "fastd");
        format!("{version}, method null: no cipher, no authentication of packets; MTU {MTU_BYTES}")
    }

    fn missing(&self) -> Option<String> {
        PROGRAM.missing()
    }

    fn start(&self, pair: &Pair) -> Result<Link> {
        let directory = private_directory()?;
        let file = |own: usize| directory.path().join(format!("{own}.conf"));
        let secrets = [secret()?, secret()?];
        let mut public = Vec::new();
        for (own, secret) in secrets.iter().enumerate() {
            let text = format!("secret \"{secret}\";\n");
            write(&file(own), &text)?;
            let path = file(own).display().to_string();
            let key = PROGRAM.ask(&["--show-key", "--machine-readable", "--config", &path])?;
            public.push(checked(key)?);
        }
        let mut commands = [PROGRAM.command()?, PROGRAM.command()?];
        for (own, command) in commands.iter_mut().enumerate() {
            let peer = 1 - own;
            let text = format!(
                "log level warn;\n\
                 mode tun;\n\
                 interface \"{TUN_NAME}\";\n\
                 mtu {MTU_BYTES};\n\
                 method \"null\";\n\
                 bind {}:{PORT};\n\
                 secret \"{}\";\n\
                 peer \"peer\" {{\n  key \"{}\";\n  remote {}:{PORT};\n}}\n",
                UNDERLAY[own], secrets[own], public[peer], UNDERLAY[peer],
            );
            write(&file(own), &text)?;
            command.arg("--config").arg(file(own));
        }
        let mut link = daemon::start_and_set_up(pair, commands, |own, _| {
            set_up_interface([&pair.a, &pair.b][own], own, TUN_NAME, MTU_BYTES)
        })?;
        link.configuration = Some(directory);
        Ok(link)
    }
}

fn secret() -> Result<String> {
    checked(PROGRAM.ask(&["--generate-key", "--machine-readable"])?)
}

fn checked(key: String) -> Result<String> {
    match key.len() == 64 && key.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        true => Ok(key),
        false => Err(Error::new("fastd made no key: not 64 hexadecimal digits")),
    }
}
