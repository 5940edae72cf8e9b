//! Other people's WireGuard in user space: keys, the programs, and the socket that
//! configures them (<https://www.wireguard.com/xplatform/>).

use std::fmt::Write as _;
use std::fs;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use blake2::digest::consts::U16;
use blake2::digest::{Digest, KeyInit, Mac};
use blake2::{Blake2s256, Blake2sMac};
use fastvpn::error::{Error, Result};
use ipnet::IpNet;
use x25519_dalek::{PublicKey, StaticSecret};

use crate::program::{Program, Source};

/// A key, of any kind.
pub type Key = [u8; 32];

/// Runs a program in a mount namespace of its own.
const UNSHARE: Program = Program::debian("unshare", "util-linux");

/// Runs a program in another process's mount namespace.
const NSENTER: Program = Program::debian("nsenter", "util-linux");

/// Where the programs have their sockets, in `wireguard/NAME.sock`.
const RUN: &str = "/var/run";

/// How long a program may take to answer on its socket.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// A program that speaks WireGuard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Implementation {
    /// The program.
    pub program: Program,
    /// What its version stands behind.
    version: &'static str,
    arguments: &'static [&'static str],
}

/// The original, in Go.
pub const WIREGUARD_GO: Implementation = Implementation {
    program: Program::debian("wireguard-go", "wireguard-go"),
    version: "wireguard-go",
    arguments: &["--foreground"],
};

/// Cloudflare's, in Rust.
pub const BORINGTUN: Implementation = Implementation {
    program: Program {
        name: "boringtun-cli",
        source: Source::Crate("boringtun-cli"),
    },
    version: "boringtun",
    arguments: &["--foreground", "--disable-drop-privileges"],
};

/// Mullvad's, in Rust.
pub const GOTATUN: Implementation = Implementation {
    program: Program {
        name: "gotatun",
        source: Source::Crate("gotatun-cli"),
    },
    version: "gotatun-cli",
    arguments: &["--foreground", "--disable-drop-privileges"],
};

/// wg(8), which shows and configures all the others.
pub const WG: Implementation = Implementation {
    program: Program::debian("wg", "wireguard-tools"),
    version: "wireguard-tools",
    arguments: &[],
};

impl Implementation {
    /// Why it cannot be run here.
    pub fn missing(&self) -> Option<String> {
        self.program.missing().or_else(|| UNSHARE.missing())
    }

    /// Its name and version.
    pub fn title_and_version(&self) -> String {
        let Self {
            program, version, ..
        } = self;
        program.title_and_version(program.name, version)
    }

    /// A command that runs it with a TUN device of this name, [`with_own_run`].
    ///
    /// # Errors
    /// When it is not installed.
    pub fn command(&self, interface: &str) -> Result<Command> {
        let mut program = self.program.command()?;
        program.args(self.arguments).arg(interface);
        let mut command = with_own_run(&program)?;
        // wireguard-go sees that the kernel has WireGuard, and would say so at length.
        command.env("LOG_LEVEL", "error");
        command.env("WG_LOG_LEVEL", "error");
        Ok(command)
    }
}

/// A command that runs a program whose socket is only seen through its own mounts, by
/// [`socket_of`] and [`beside`]: the place is fixed, and a killed program leaves the socket
/// behind, so each has a /run of its own that goes with it.
///
/// # Errors
/// When unshare(1) is not installed, or this machine has no /var/run.
pub fn with_own_run(program: &Command) -> Result<Command> {
    let mut command = UNSHARE.command()?;
    let script = "mount -t tmpfs tmpfs \"$1\" && shift && exec \"$@\"";
    command.args(["--mount", "sh", "-c", script, "sh"]);
    command.args([run()?.as_os_str(), program.get_program()]);
    command.args(program.get_args());
    Ok(command)
}

/// A command that runs a program with the mounts of the process `pid`.
///
/// # Errors
/// When nsenter(1) is not installed.
pub fn beside(pid: u32, program: &Command) -> Result<Command> {
    let mut command = NSENTER.command()?;
    command.arg(format!("--mount=/proc/{pid}/ns/mnt"));
    command.arg(program.get_program()).args(program.get_args());
    Ok(command)
}

fn run() -> Result<PathBuf> {
    fs::canonicalize(RUN).map_err(|cause| Error::os(format!("cannot find {RUN}"), cause))
}

/// The socket of a process with a TUN device of this name.
///
/// # Errors
/// When this machine has no /var/run.
pub fn socket_of(pid: u32, interface: &str) -> Result<PathBuf> {
    let run = run()?;
    let run = run.strip_prefix("/").unwrap_or(&run);
    let root = PathBuf::from(format!("/proc/{pid}/root"));
    Ok(root
        .join(run)
        .join("wireguard")
        .join(format!("{interface}.sock")))
}

/// A random key.
///
/// # Errors
/// When the system has no randomness.
pub fn random_key() -> Result<Key> {
    let path = "/dev/urandom";
    let mut key = [0; 32];
    fs::File::open(path)
        .and_then(|mut file| file.read_exact(&mut key))
        .map_err(|cause| Error::os(format!("cannot read {path}"), cause))?;
    Ok(key)
}

/// The public key of a private one.
pub fn public_key(private: &Key) -> Key {
    PublicKey::from(&StaticSecret::from(*private)).to_bytes()
}

/// A key as `wg(8)` and configuration files write it.
pub fn base64(key: &Key) -> String {
    BASE64.encode(key)
}

/// A key as the programs' sockets take it.
pub fn hex(key: &Key) -> String {
    key.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Bytes of a message that starts a handshake, and of one that answers it.
pub const INITIATION_BYTES: usize = 148;
/// See [`INITIATION_BYTES`].
pub const RESPONSE_BYTES: usize = 92;

/// The two codes at the end of both.
const MAC_BYTES: usize = 16;

/// A message of a handshake that anybody can make who knows a public key: type and first
/// code are right, so that its owner has to look further, and all else is `filling`,
/// over and over. `bytes`: [`INITIATION_BYTES`] or [`RESPONSE_BYTES`].
pub fn forged_handshake(public_key: &Key, bytes: usize, filling: &[u8]) -> Vec<u8> {
    let mut message = vec![0; bytes];
    message[0] = if bytes == INITIATION_BYTES { 1 } else { 2 };
    let authentic = bytes - 2 * MAC_BYTES;
    for (byte, fill) in message[4..authentic].iter_mut().zip(filling.iter().cycle()) {
        *byte = *fill;
    }
    let key = Blake2s256::new()
        .chain_update(b"mac1----")
        .chain_update(public_key);
    // A key of 32 bytes is one that it takes.
    let mac = <Blake2sMac<U16> as KeyInit>::new_from_slice(&key.finalize());
    if let Ok(mac) = mac {
        let mac = mac.chain_update(&message[..authentic]).finalize();
        message[authentic..][..MAC_BYTES].copy_from_slice(&mac.into_bytes());
    }
    message
}

/// What one end is told.
#[derive(Clone, Debug)]
pub struct Interface {
    /// Its own key.
    pub private_key: Key,
    /// The UDP port that it listens on.
    pub port: u16,
    /// Whom it knows.
    pub peers: Vec<Peer>,
}

/// What it is told of a peer.
#[derive(Clone, Debug)]
pub struct Peer {
    /// The peer's key.
    pub public_key: Key,
    /// What both have besides.
    pub preshared_key: Option<Key>,
    /// Where it is, unless that is to be learned.
    pub endpoint: Option<SocketAddr>,
    /// The addresses behind it.
    pub prefixes: Vec<IpNet>,
    /// Seconds between two datagrams at the most.
    pub keepalive_s: Option<u16>,
}

impl Interface {
    /// The request that makes a program, which knows nothing yet, know all this.
    pub fn request(&self) -> String {
        let mut text = format!("set=1\nprivate_key={}\n", hex(&self.private_key));
        // Writing to a string does not fail.
        let _ = writeln!(text, "listen_port={}", self.port);
        for peer in &self.peers {
            let _ = writeln!(text, "public_key={}", hex(&peer.public_key));
            if let Some(key) = &peer.preshared_key {
                let _ = writeln!(text, "preshared_key={}", hex(key));
            }
            if let Some(endpoint) = peer.endpoint {
                let _ = writeln!(text, "endpoint={endpoint}");
            }
            if let Some(seconds) = peer.keepalive_s {
                let _ = writeln!(text, "persistent_keepalive_interval={seconds}");
            }
            for prefix in &peer.prefixes {
                let _ = writeln!(text, "allowed_ip={prefix}");
            }
        }
        text + "\n"
    }
}

/// Tells a program what it is to know; `false` while nobody listens.
///
/// # Errors
/// When it does not take it.
pub fn configure(socket: &Path, interface: &Interface) -> Result<bool> {
    match exchange(socket, &interface.request()) {
        Ok(answer) if answer.trim() == "errno=0" => Ok(true),
        Ok(answer) => Err(Error::new(format!(
            "the WireGuard program did not take its configuration: {}",
            answer.trim()
        ))),
        Err(error) => match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => Ok(false),
            _ => Err(failed(error)),
        },
    }
}

/// What a program says of itself and its peers: its lines `KEY=VALUE`.
///
/// # Errors
/// When nobody listens.
pub fn state(socket: &Path) -> Result<Vec<(String, String)>> {
    let text = exchange(socket, "get=1\n\n").map_err(failed)?;
    let pairs = text.lines().filter_map(|line| line.split_once('='));
    Ok(pairs
        .map(|(key, value)| (key.into(), value.into()))
        .collect())
}

/// One request, and all of its answer: up to an empty line.
fn exchange(socket: &Path, request: &str) -> io::Result<String> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(ANSWER_TIMEOUT))?;
    stream.write_all(request.as_bytes())?;
    stream.shutdown(Shutdown::Write)?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

fn failed(cause: io::Error) -> Error {
    Error::os("cannot talk to a WireGuard program", cause)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_ends_with_an_empty_line_and_has_no_other() {
        let interface = Interface {
            private_key: [0xab; 32],
            port: 51_820,
            peers: vec![Peer {
                public_key: [1; 32],
                preshared_key: Some([2; 32]),
                endpoint: Some(([10, 211, 55, 123], 51_820).into()),
                prefixes: vec![IpNet::new_assert([10, 244, 55, 123].into(), 32)],
                keepalive_s: Some(25),
            }],
        };
        let request = interface.request();
        assert!(request.starts_with("set=1\nprivate_key=abab"));
        assert_eq!(request.find("\n\n"), Some(request.len() - 2));
        for line in [
            "listen_port=51820",
            "endpoint=10.211.55.123:51820",
            "allowed_ip=10.244.55.123/32",
            "persistent_keepalive_interval=25",
        ] {
            assert!(request.contains(&format!("\n{line}\n")), "{line}");
        }
    }

    /// RFC 7748, section 6.1.
    #[test]
    fn public_keys_are_derived() {
        let private = "dwdtCnMYpX08FsFyUbJmRd9ML4frwJkqsXf7pR25LCo=";
        let private: Key = BASE64.decode(private).unwrap().try_into().unwrap();
        let public = "hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=";
        assert_eq!(base64(&public_key(&private)), public);
    }
}
