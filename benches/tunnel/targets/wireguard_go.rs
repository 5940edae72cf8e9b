//! wireguard-go: WireGuard in user space, always with its cipher.

use std::fs;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use fastvpn::error::{Error, Result};
use testbed::Pair;
use x25519_dalek::{PublicKey, StaticSecret};

use super::others::{Program, mtu_bytes, set_up_interface};
use super::{Link, TUNNEL, Target, UNDERLAY, daemon};

const PROGRAM: Program = Program {
    name: "wireguard-go",
    package: "wireguard-go",
};

/// Runs a program in a mount namespace of its own.
const UNSHARE: Program = Program {
    name: "unshare",
    package: "util-linux",
};

const TUN_NAME: &str = "wireguard0";
const PORT: u16 = 51_820;

/// Type, receiver, counter and authentication tag.
const HEADER_BYTES: u32 = 4 + 4 + 8 + 16;
const MTU_BYTES: u32 = mtu_bytes(HEADER_BYTES);

/// Where the program has its control socket, below [`RUN`].
const SOCKET: &str = "wireguard/wireguard0.sock";
const RUN: &str = "/var/run";

/// How long it may take to answer on its control socket.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);

/// wireguard-go.
pub struct WireguardGo;

impl Target for WireguardGo {
    fn key(&self) -> &'static str {
        "wireguard-go"
    }

    fn title(&self) -> &'static str {
        "wireguard-go"
    }

    fn detail(&self) -> String {
        let version = PROGRAM.title_and_version("wireguard-go", "wireguard-go");
        format!("{version}, ChaCha20-Poly1305 as always; MTU {MTU_BYTES}")
    }

    fn missing(&self) -> Option<String> {
        PROGRAM.missing().or_else(|| UNSHARE.missing())
    }

    fn start(&self, pair: &Pair) -> Result<Link> {
        let secrets = [secret()?, secret()?];
        let public = [&secrets[0], &secrets[1]].map(PublicKey::from);
        let run = fs::canonicalize(RUN)
            .map_err(|cause| Error::os(format!("cannot find {RUN}"), cause))?;
        let mut commands = [UNSHARE.command()?, UNSHARE.command()?];
        for command in &mut commands {
            let program = PROGRAM.command()?;
            // The socket's place is fixed, and a killed program leaves it
            // behind: so each end has a /run of its own that goes with it.
            let script = "mount -t tmpfs tmpfs \"$1\" && exec \"$2\" --foreground \"$3\"";
            command.args(["--mount", "sh", "-c", script, "sh"]);
            command.args([run.as_os_str(), program.get_program(), TUN_NAME.as_ref()]);
            // It sees that the kernel has WireGuard, and would say so at length.
            command.env("LOG_LEVEL", "error");
        }
        daemon::start_and_set_up(pair, commands, |own, child| {
            let socket = socket_of(child.pid(), &run);
            let request = request(own, &secrets[own], &public[1 - own]);
            Ok(configure(&socket, &request)?
                && set_up_interface([&pair.a, &pair.b][own], own, TUN_NAME, MTU_BYTES)?)
        })
    }
}

fn secret() -> Result<StaticSecret> {
    let path = "/dev/urandom";
    let mut bytes = [0; 32];
    fs::File::open(path)
        .and_then(|mut file| file.read_exact(&mut bytes))
        .map_err(|cause| Error::os(format!("cannot read {path}"), cause))?;
    Ok(StaticSecret::from(bytes))
}

/// The control socket of a process, through its own mounts.
fn socket_of(pid: u32, run: &Path) -> PathBuf {
    let run = run.strip_prefix("/").unwrap_or(run);
    Path::new(&format!("/proc/{pid}/root"))
        .join(run)
        .join(SOCKET)
}

/// What host `own` is told: keys in hexadecimal, ended by an empty line.
fn request(own: usize, secret: &StaticSecret, peer: &PublicKey) -> String {
    format!(
        "set=1\n\
         private_key={}\n\
         listen_port={PORT}\n\
         public_key={}\n\
         endpoint={}:{PORT}\n\
         allowed_ip={}/32\n\n",
        hex(secret.as_bytes()),
        hex(peer.as_bytes()),
        UNDERLAY[1 - own],
        TUNNEL[1 - own],
    )
}

/// Sends a request; `false` while nobody listens.
fn configure(socket: &Path, request: &str) -> Result<bool> {
    let mut stream = match UnixStream::connect(socket) {
        Ok(stream) => stream,
        Err(error) => {
            return match error.kind() {
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => Ok(false),
                _ => Err(failed(error)),
            };
        }
    };
    let mut exchange = || {
        stream.set_read_timeout(Some(ANSWER_TIMEOUT))?;
        stream.write_all(request.as_bytes())?;
        stream.shutdown(Shutdown::Write)?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    };
    let answer = exchange().map_err(failed)?;
    match answer.trim() {
        "errno=0" => Ok(true),
        other => Err(Error::new(format!(
            "wireguard-go did not take its configuration: {other}"
        ))),
    }
}

fn failed(cause: io::Error) -> Error {
    Error::os("cannot talk to wireguard-go", cause)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_ends_with_an_empty_line_and_has_no_other() {
        let secret = StaticSecret::from([0xab; 32]);
        let request = request(0, &secret, &PublicKey::from([1; 32]));
        assert!(request.starts_with("set=1\nprivate_key=abab"));
        assert_eq!(request.find("\n\n"), Some(request.len() - 2));
        assert!(request.contains("\nendpoint=10.211.55.123:51820\n"));
        assert!(request.contains("\nallowed_ip=10.244.55.123/32\n"));
    }
}
