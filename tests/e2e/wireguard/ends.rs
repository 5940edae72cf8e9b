//! Both ends of a WireGuard tunnel, each of them fastvpn or another program: their
//! keys, what they are told of each other, and how they are started.

use std::fs::{self, Permissions};
use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use fastvpn::error::{Error, Result};
use ipnet::IpNet;
use serde_json::Value;
use tempfile::TempDir;
use testbed::wireguard::{self, Implementation, Interface, Key, Peer, base64};
use testbed::{Child, Namespace, Pair, configure, pair};

use crate::operator::connect;
use crate::support::{
    FAMILIES, PATIENCE, Tunnel, UNDERLAY, check, dual_stack, fail, link, tried, wait_for,
    wait_until,
};

/// The port that all ends listen on.
pub const PORT: u16 = 8285;

/// Name of the TUN device of a program that is not fastvpn.
pub const OTHER_NAME: &str = "wg0";

/// The MTU inside: what is left of 1500 bytes over IPv6, and fastvpn's own default.
pub const MTU_BYTES: u32 = 1420;

/// IPv6 addresses of host A and host B on the cable.
const UNDERLAY_V6: [Ipv6Addr; 2] = [
    Ipv6Addr::new(0xfd00, 0x55, 0, 0, 0, 0, 0, 0x122),
    Ipv6Addr::new(0xfd00, 0x55, 0, 0, 0, 0, 0, 0x123),
];

/// Two hosts on a cable that carries both families.
pub fn hosts() -> Result<Pair> {
    let v4 = |host: usize| IpNet::new_assert(UNDERLAY[host].into(), 24);
    let v6 = |host: usize| IpNet::new_assert(UNDERLAY_V6[host].into(), 64);
    pair(&[(v4(0), v4(1)), (v6(0), v6(1))], 1500)
}

/// The IP version on the cable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Underlay {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Underlay {
    /// Where a host listens.
    pub fn endpoint(self, host: usize) -> SocketAddr {
        match self {
            Self::V4 => (UNDERLAY[host], PORT).into(),
            Self::V6 => (UNDERLAY_V6[host], PORT).into(),
        }
    }
}

/// What runs at an end.
#[derive(Clone, Copy, Debug)]
pub enum Kind {
    /// The program under test, on the trial's engine.
    Fastvpn,
    /// The same with one worker: what it gets later is seen to later.
    OneWorker,
    /// The same as the first with timers that are a hundredth as long, so that sessions
    /// change all the time; but only in a build with debug assertions.
    ShortTimers,
    /// Somebody else's.
    Other(&'static Implementation),
}

/// How an end finds the other one.
#[derive(Clone, Copy, Debug, Default)]
pub struct Reach {
    /// Where it is, unless it has to call.
    pub endpoint: Option<SocketAddr>,
    /// Seconds between two datagrams at the most.
    pub keepalive_s: Option<u16>,
}

impl Reach {
    /// By waiting for its call.
    pub const UNKNOWN: Self = Self {
        endpoint: None,
        keepalive_s: None,
    };

    /// By calling it here.
    pub const fn at(endpoint: SocketAddr) -> Self {
        Self {
            endpoint: Some(endpoint),
            keepalive_s: None,
        }
    }
}

/// The keys of host A and host B, and files with them.
pub struct Keys {
    private: [Key; 2],
    preshared: Option<Key>,
    directory: TempDir,
}

impl Keys {
    /// New ones, with a preshared key if wanted.
    pub fn new(is_preshared: bool) -> Result<Self> {
        let random = wireguard::random_key;
        Ok(Self {
            private: [random()?, random()?],
            preshared: is_preshared.then(random).transpose()?,
            directory: tried("make a directory", tempfile::tempdir())?,
        })
    }

    /// The same, but for the preshared key.
    pub fn with_preshared(&self, preshared: Option<Key>) -> Result<Self> {
        Ok(Self {
            private: self.private,
            preshared,
            directory: tried("make a directory", tempfile::tempdir())?,
        })
    }

    /// The same, but for the keys of host A.
    pub fn with_another_caller(&self) -> Result<Self> {
        Ok(Self {
            private: [wireguard::random_key()?, self.private[1]],
            ..self.with_preshared(self.preshared)?
        })
    }

    /// A host's public key.
    pub fn public(&self, host: usize) -> Key {
        wireguard::public_key(&self.private[host])
    }

    /// Writes a file that only its owner can read.
    pub fn write(&self, name: &str, text: &str) -> Result<PathBuf> {
        let path = self.directory.path().join(name);
        let write = || {
            fs::write(&path, text)?;
            fs::set_permissions(&path, Permissions::from_mode(0o600))
        };
        tried("write a file", write())?;
        Ok(path)
    }

    /// A file with a host's private key.
    pub fn private_file(&self, own: usize) -> Result<PathBuf> {
        let text = format!("{}\n", base64(&self.private[own]));
        self.write(&format!("{own}.key"), &text)
    }

    /// The configuration file of a host that runs fastvpn.
    pub fn file(&self, own: usize, reach: Reach) -> Result<PathBuf> {
        let peer = 1 - own;
        let private = self.private_file(own)?;
        let addresses: Vec<_> = dual_stack(own)
            .into_iter()
            .filter(|word| word != "--address")
            .collect();
        let prefixes: Vec<_> = prefixes(peer).iter().map(ToString::to_string).collect();
        let mut text = format!(
            "private-key = {private:?}\n\
             listen = \"[::]:{PORT}\"\n\
             address = {addresses:?}\n\n\
             [[peer]]\n\
             public-key = {:?}\n\
             prefixes = {prefixes:?}\n",
            base64(&self.public(peer)),
        );
        if let Some(key) = &self.preshared {
            let name = format!("{own}.preshared.key");
            let path = self.write(&name, &format!("{}\n", base64(key)))?;
            text += &format!("preshared-key-file = {path:?}\n");
        }
        if let Some(endpoint) = reach.endpoint {
            text += &format!("endpoint = \"{endpoint}\"\n");
        }
        if let Some(seconds) = reach.keepalive_s {
            text += &format!("persistent-keepalive = {seconds}\n");
        }
        self.write(&format!("{own}.toml"), &text)
    }

    /// The configuration of a host as wg-quick(8) has it, with `more` lines in its first
    /// section.
    pub fn wg_quick_file(&self, own: usize, reach: Reach, more: &str) -> Result<PathBuf> {
        let peer = 1 - own;
        let list = |nets: &[String]| nets.join(", ");
        let addresses = dual_stack(own);
        let addresses: Vec<_> = addresses
            .into_iter()
            .filter(|it| it != "--address")
            .collect();
        let prefixes: Vec<_> = prefixes(peer).iter().map(ToString::to_string).collect();
        let mut text = format!(
            "[Interface]\nPrivateKey = {}\nListenPort = {PORT}\nAddress = {}\n{more}\n\
             [Peer]\nPublicKey = {}\nAllowedIPs = {}\n",
            base64(&self.private[own]),
            list(&addresses),
            base64(&self.public(peer)),
            list(&prefixes),
        );
        if let Some(key) = &self.preshared {
            text += &format!("PresharedKey = {}\n", base64(key));
        }
        if let Some(endpoint) = reach.endpoint {
            text += &format!("Endpoint = {endpoint}\n");
        }
        if let Some(seconds) = reach.keepalive_s {
            text += &format!("PersistentKeepalive = {seconds}\n");
        }
        self.write(&format!("{own}.conf"), &text)
    }

    /// What a host is told that runs another program.
    fn interface(&self, own: usize, reach: Reach) -> Interface {
        let peer = 1 - own;
        Interface {
            private_key: self.private[own],
            port: PORT,
            peers: vec![Peer {
                public_key: self.public(peer),
                preshared_key: self.preshared,
                endpoint: reach.endpoint,
                prefixes: prefixes(peer),
                keepalive_s: reach.keepalive_s,
            }],
        }
    }

    /// Starts an end.
    pub fn start(&self, host: &Namespace, own: usize, kind: Kind, reach: Reach) -> Result<End> {
        match kind {
            Kind::Fastvpn => self.start_fastvpn(host, own, reach, &[]),
            Kind::OneWorker => self.start_fastvpn(host, own, reach, &["--queues", "1"]),
            Kind::ShortTimers => {
                let mut command = self.fastvpn(own, reach, &[])?;
                command.env("FASTVPN_SHORTEN_TIMERS", "100");
                Ok(End::Fastvpn(Tunnel::spawn(host, command)?))
            }
            Kind::Other(implementation) => {
                let other = Other::start(host, implementation)?;
                other.configure(&self.interface(own, reach))?;
                let nets: Vec<IpNet> = dual_stack(own)
                    .iter()
                    .filter_map(|net| net.parse().ok())
                    .collect();
                wait_until("the other program makes its device", || {
                    Ok(host.netlink()?.link_index(OTHER_NAME)?.is_some())
                })?;
                configure(host, OTHER_NAME, &nets, MTU_BYTES)?;
                Ok(End::Other(other))
            }
        }
    }

    /// Starts a new process at an end that runs, and waits for the end of the old one.
    pub fn take_over(&self, host: &Namespace, own: usize, old: End, reach: Reach) -> Result<End> {
        let new = self.start_fastvpn(host, own, reach, &["--takeover"])?;
        let End::Fastvpn(old) = old else {
            return fail("only fastvpn takes over from itself");
        };
        let ended = old.wait()?;
        check(ended.status.code() == Some(0), || ended.log)?;
        Ok(new)
    }

    /// Starts fastvpn with these flags on top.
    fn start_fastvpn(
        &self,
        host: &Namespace,
        own: usize,
        reach: Reach,
        flags: &[&str],
    ) -> Result<End> {
        let command = self.fastvpn(own, reach, flags)?;
        Ok(End::Fastvpn(Tunnel::spawn(host, command)?))
    }

    /// What fastvpn is started by.
    fn fastvpn(&self, own: usize, reach: Reach, flags: &[&str]) -> Result<Command> {
        let file = self.file(own, reach)?.display().to_string();
        let control = self.control_socket(own).display().to_string();
        let all = [&["--config", &file, "--control", &control][..], flags].concat();
        Ok(Tunnel::command(&all))
    }

    /// The control socket of a host that runs fastvpn.
    fn control_socket(&self, own: usize) -> PathBuf {
        self.directory.path().join(format!("{own}.sock"))
    }

    /// What the fastvpn of a host answers to a command on its control socket.
    pub fn ask(&self, own: usize, command: &str) -> Result<Value> {
        let mut stream = connect(&self.control_socket(own))?;
        let asked = writeln!(stream, "{{\"command\":\"{command}\"}}");
        tried("ask", asked)?;
        let mut line = String::new();
        tried("hear", BufReader::new(stream).read_line(&mut line))?;
        serde_json::from_str(&line).map_err(|error| Error::new(format!("{line:?}: {error}")))
    }
}

/// What is behind a host: its addresses in the tunnel.
fn prefixes(host: usize) -> Vec<IpNet> {
    FAMILIES.map(|family| family[host].into()).to_vec()
}

/// An end that runs.
pub enum End {
    /// fastvpn.
    Fastvpn(Tunnel),
    /// Somebody else's.
    Other(Other),
}

impl End {
    /// Ends it in order.
    pub fn stop(self) -> Result<()> {
        match self {
            Self::Fastvpn(tunnel) => crate::support::stop(tunnel).map(drop),
            Self::Other(mut other) => {
                // Those programs do not agree on the status of an end that was asked for.
                other.child.terminate(PATIENCE).map(drop)
            }
        }
    }

    /// What it has said so far.
    pub fn said(&self) -> String {
        match self {
            Self::Fastvpn(tunnel) => tunnel.said(),
            Self::Other(other) => format!("{} says nothing", other.name),
        }
    }

    /// Name of its device.
    pub fn device(&self) -> &'static str {
        match self {
            Self::Fastvpn(_) => crate::packets::TUNNEL_NAME,
            Self::Other(_) => OTHER_NAME,
        }
    }
}

/// Somebody else's program.
pub struct Other {
    child: Child,
    name: &'static str,
}

impl Other {
    fn start(host: &Namespace, implementation: &'static Implementation) -> Result<Self> {
        let mut command = implementation.command(OTHER_NAME)?;
        let null = [Stdio::null(), Stdio::null(), Stdio::null()];
        let [stdin, stdout, stderr] = null;
        command.stdin(stdin).stdout(stdout).stderr(stderr);
        Ok(Self {
            child: host.spawn(command)?,
            name: implementation.program.name,
        })
    }

    fn socket(&self) -> Result<PathBuf> {
        wireguard::socket_of(self.child.pid(), OTHER_NAME)
    }

    fn configure(&self, interface: &Interface) -> Result<()> {
        let socket = self.socket()?;
        wait_until(&format!("{} takes its configuration", self.name), || {
            wireguard::configure(&socket, interface)
        })
    }

    /// What it says of its peer.
    pub fn says(&self, key: &str) -> Result<String> {
        let state = wireguard::state(&self.socket()?)?;
        let found = state.into_iter().find(|(name, _)| name == key);
        match found {
            Some((_, value)) => Ok(value),
            None => fail(format!("{} says nothing of {key}", self.name)),
        }
    }
}

/// Starts both ends of a tunnel: host A calls, and host B waits for the call.
pub fn tunnel(hosts: &Pair, keys: &Keys, kinds: [Kind; 2], underlay: Underlay) -> Result<[End; 2]> {
    let called = keys.start(&hosts.b, 1, kinds[1], Reach::UNKNOWN)?;
    let calls = Reach::at(underlay.endpoint(1));
    let caller = keys.start(&hosts.a, 0, kinds[0], calls)?;
    for addresses in FAMILIES {
        wait_for(&hosts.a, addresses[1])?;
        wait_for(&hosts.b, addresses[0])?;
    }
    Ok([caller, called])
}

/// Ends both.
pub fn stop(ends: [End; 2]) -> Result<()> {
    ends.into_iter().try_for_each(End::stop)
}

/// The MTU is what it has to be.
pub fn has_mtu(host: &Namespace, end: &End) -> Result<()> {
    let link = link(host, end.device())?;
    check(link.mtu == MTU_BYTES, || format!("{link:?}"))
}

/// A host's own address in the tunnel, IPv4.
pub fn inside(host: usize) -> IpAddr {
    FAMILIES[0][host]
}
