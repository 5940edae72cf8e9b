//! fastvpn, with any flags, of any version.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use fastvpn::error::{Error, Result};
use testbed::Pair;
use testbed::wireguard::{self, Key};

use super::crowd::Crowd;
use super::others::{mtu_bytes, private_directory, write};
use super::{Link, TUNNEL, TUNNEL_PREFIX, Target, UNDERLAY, daemon};
use crate::variant::{self, Variant};

/// The program that was built together with this bench.
pub(super) const PROGRAM: &str = env!("CARGO_BIN_EXE_fastvpn");

/// Key, title and flags of those that are always compared.
const BUILT_IN: [(&str, &str, &str); 6] = [
    ("uring", "fastvpn, io_uring", ""),
    ("uring-encrypted", "fastvpn, encrypted", ""),
    (PEERS, "fastvpn, encrypted, many peers", ""),
    ("epoll", "fastvpn, epoll", "--io epoll"),
    ("busy-poll", "fastvpn, busy polling", "--busy-poll auto"),
    (
        "no-offloads",
        "fastvpn without offloads",
        "--without tso,uso,udp-segment,udp-gro",
    ),
];

/// The one with [`MORE_PEERS`].
const PEERS: &str = "peers-encrypted";

/// Peers of each host besides the other one. At host `b` each of them has a session.
const MORE_PEERS: u32 = 999;

/// What the keys end in of those that have keys in the other sense, too: WireGuard's.
const ENCRYPTED: &str = "-encrypted";

/// What the variants' names end in of which all packets are captured at both hosts.
const CAPTURED: &str = "-captured";

/// What they end in of which metrics are scraped every second, and `top` is open, at both hosts.
const WATCHED: &str = "-watched";

/// A client of metrics, and `top` on a terminal.
const WATCHERS: [&str; 2] = [
    "while sleep 1; do \
       exec 3<>/dev/tcp/127.0.0.1/9285; printf 'GET /metrics HTTP/1.0\r\n\r\n' >&3; cat <&3; \
     done",
    "TERM=xterm exec script -qec \"$FASTVPN top\" /dev/null",
];

/// The flag that such a program has to know.
const KEY_FLAG: &str = "--private-key";

/// The default of --listen.
const PORT: u16 = 8285;

/// Type, receiver, counter and authentication tag of WireGuard's.
const HEADER_BYTES: u32 = 4 + 4 + 8 + 16;

/// fastvpn with some flags.
pub struct Fastvpn {
    key: &'static str,
    title: &'static str,
    program: PathBuf,
    flags: Vec<String>,
    missing: Option<String>,
}

/// fastvpn as built, in the ways that are always compared.
///
/// # Errors
/// When the program cannot be started.
pub fn built_in() -> Result<Vec<Fastvpn>> {
    let program = PathBuf::from(PROGRAM);
    let help = help(&program)?;
    let make = |(key, title, flags): (&'static str, &'static str, &str)| {
        let flags: Vec<String> = flags.split_whitespace().map(String::from).collect();
        Fastvpn {
            key,
            title,
            program: program.clone(),
            missing: missing(key, &flags, &help),
            flags,
        }
    };
    Ok(BUILT_IN.map(make).into())
}

/// fastvpn as the command line wants it.
///
/// # Errors
/// When the program cannot be started, or does not know one of the flags.
pub fn from_variant(variant: Variant) -> Result<Fastvpn> {
    let program = variant.program.unwrap_or_else(|| PathBuf::from(PROGRAM));
    if let Some(reason) = missing(&variant.name, &variant.flags, &help(&program)?) {
        return Err(Error::new(format!(
            "cannot measure variant {}: {reason}",
            variant.name
        )));
    }
    // For the whole run, like the other targets' names.
    let key: &'static str = variant.name.leak();
    Ok(Fastvpn {
        key,
        title: key,
        program,
        flags: variant.flags,
        missing: None,
    })
}

/// What the program says about its flags.
fn help(program: &PathBuf) -> Result<String> {
    let output = Command::new(program)
        .arg("--help")
        .stdin(Stdio::null())
        .output()
        .map_err(|cause| Error::os(format!("cannot start {}", program.display()), cause))?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn missing(key: &str, flags: &[String], help: &str) -> Option<String> {
    let mut flags = flags.to_vec();
    if key.ends_with(ENCRYPTED) {
        flags.push(KEY_FLAG.into());
    }
    variant::unknown_flag(&flags, help).map(|flag| format!("this fastvpn has no {flag}"))
}

/// Writes the configuration file of host `own`, and the key that it names.
fn write_configuration(
    directory: &Path,
    own: usize,
    keys: &[Key; 2],
    crowd: &Crowd,
) -> Result<PathBuf> {
    let peer = 1 - own;
    let (key, file) = (format!("{own}.key"), format!("{own}.toml"));
    let (key, file) = (directory.join(key), directory.join(file));
    let text = wireguard::base64(&keys[own]) + "\n";
    write(&key, &text)?;
    // Others may not read it, or it is refused.
    fs::set_permissions(&key, Permissions::from_mode(0o600))
        .map_err(|cause| Error::os(format!("cannot protect {}", key.display()), cause))?;
    let public = wireguard::base64(&wireguard::public_key(&keys[peer]));
    let text = format!(
        "private-key = {key:?}\n\
         mtu = {}\n\
         address = [\"{}/{TUNNEL_PREFIX}\"]\n\
         [[peer]]\n\
         public-key = \"{public}\"\n\
         endpoint = \"{}\"\n\
         prefixes = [\"{}/32\"]\n{}",
        mtu_bytes(HEADER_BYTES),
        TUNNEL[own],
        UNDERLAY[peer],
        TUNNEL[peer],
        crowd.configuration(),
    );
    write(&file, &text)?;
    Ok(file)
}

impl Target for Fastvpn {
    fn key(&self) -> &'static str {
        self.key
    }

    fn title(&self) -> &'static str {
        self.title
    }

    fn detail(&self) -> String {
        let flags = match self.flags.join(" ") {
            _ if self.key == PEERS => {
                format!("{MORE_PEERS} more peers at both hosts, each with a session at one")
            }
            flags if flags.is_empty() => "default flags".to_string(),
            flags => flags,
        };
        match self.program.as_os_str() == PROGRAM {
            true => flags,
            false => format!("{} with {flags}", self.program.display()),
        }
    }

    fn missing(&self) -> Option<String> {
        self.missing.clone()
    }

    fn port(&self) -> Option<u16> {
        Some(PORT)
    }

    fn start(&self, pair: &Pair) -> Result<Link> {
        if self.key.ends_with(ENCRYPTED) {
            return self.start_encrypted(pair);
        }
        // Tunnel addresses and MTU are those that fastvpn gives itself.
        let commands = [UNDERLAY[1], UNDERLAY[0]].map(|peer| {
            let mut command = Command::new(&self.program);
            command.args(["--peer", &peer.to_string()]);
            command.args(&self.flags);
            if self.key.ends_with(WATCHED) {
                command.args(["--metrics", "9285"]);
            }
            command
        });
        let mut link = daemon::start(pair, commands)?;
        let hosts = [&pair.a, &pair.b].into_iter();
        for (host, processes) in hosts.zip(&mut link.processes) {
            // What they cost counts.
            for mut command in self.observers() {
                command.stdout(Stdio::null()).stderr(Stdio::null());
                processes.push(host.spawn(command)?);
            }
        }
        Ok(link)
    }
}

impl Fastvpn {
    /// Those who look at a host's tunnel.
    fn observers(&self) -> Vec<Command> {
        let mut capture = Command::new(&self.program);
        capture.args(["capture", "-w", "/dev/null"]);
        match self.key {
            key if key.ends_with(CAPTURED) => vec![capture],
            key if key.ends_with(WATCHED) => {
                let watchers = WATCHERS.iter().map(|script| {
                    let mut command = Command::new("bash");
                    command.args(["-c", script]).env("FASTVPN", &self.program);
                    command
                });
                watchers.collect()
            }
            _ => Vec::new(),
        }
    }

    /// As the other programs that encrypt are started: with the same addresses and MTU.
    fn start_encrypted(&self, pair: &Pair) -> Result<Link> {
        let directory = private_directory()?;
        let keys = [wireguard::random_key()?, wireguard::random_key()?];
        let crowd = Crowd::new(if self.key == PEERS { MORE_PEERS } else { 0 })?;
        let command = |own: usize| -> Result<Command> {
            let mut command = Command::new(&self.program);
            let file = write_configuration(directory.path(), own, &keys, &crowd)?;
            command.arg("--config").arg(file).args(&self.flags);
            Ok(command)
        };
        let mut link = daemon::start(pair, [command(0)?, command(1)?])?;
        let public_key = wireguard::public_key(&keys[1]);
        crowd.call(&pair.a, (UNDERLAY[1], PORT).into(), &public_key)?;
        link.public_key = Some(public_key);
        link.configuration = Some(directory);
        Ok(link)
    }
}
