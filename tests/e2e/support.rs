//! What the tests have in common: hosts, tunnels between them, and what the
//! tunnels said.

use std::io::{self, Read};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::process::{Command, ExitStatus, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use fastvpn::error::{Error, Result};
use fastvpn::lab::traffic::{Between, Bulk, BulkLimit, Watch, ping, ping_up_to, tcp_bulk};
use fastvpn::lab::{Child, Namespace, Pair, pair};
use fastvpn::netlink::Link;
use ipnet::IpNet;

/// A test's name and body.
pub type Test = (&'static str, fn() -> Result<()>);

/// Underlay addresses of host A and host B: the mission's.
pub const UNDERLAY: [Ipv4Addr; 2] = [
    Ipv4Addr::new(10, 211, 55, 122),
    Ipv4Addr::new(10, 211, 55, 123),
];

/// Tunnel addresses that the hosts derive.
pub const TUNNEL: [Ipv4Addr; 2] = [
    Ipv4Addr::new(10, 244, 55, 122),
    Ipv4Addr::new(10, 244, 55, 123),
];

/// IPv6 tunnel addresses, given by hand.
pub const TUNNEL_V6: [&str; 2] = ["fd00:244::122", "fd00:244::123"];

/// How long anything that must happen may take before the test fails. Far more
/// than it ever takes: no test passes or fails by being fast.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// The program under test.
pub const FASTVPN: &str = env!("CARGO_BIN_EXE_fastvpn");

/// Fails a test with a message.
pub fn fail<T>(message: impl Into<String>) -> Result<T> {
    Err(Error::new(message))
}

/// Fails a test unless `condition` holds.
pub fn check(condition: bool, message: impl FnOnce() -> String) -> Result<()> {
    if condition { Ok(()) } else { fail(message()) }
}

/// Two hosts with the mission's addresses and an underlay of this MTU.
pub fn hosts(mtu_bytes: u32) -> Result<Pair> {
    let net = |address: Ipv4Addr| IpNet::new_assert(address.into(), 24);
    pair(&[(net(UNDERLAY[0]), net(UNDERLAY[1]))], mtu_bytes)
}

/// A fastvpn process and what it says.
pub struct Tunnel {
    child: Child,
    log: Option<JoinHandle<String>>,
}

/// How a tunnel ended.
pub struct Ended {
    /// Its exit status.
    pub status: ExitStatus,
    /// All it wrote to standard error.
    pub log: String,
}

impl Tunnel {
    /// Starts `fastvpn FLAGS` in a namespace.
    pub fn start(namespace: &Namespace, flags: &[&str]) -> Result<Self> {
        let mut command = Command::new(FASTVPN);
        command
            .args(flags)
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        Self::spawn(namespace, command)
    }

    /// Starts a command that is fastvpn's, and reads what it says.
    pub fn spawn(namespace: &Namespace, mut command: Command) -> Result<Self> {
        command.stderr(Stdio::piped());
        let mut child = namespace.spawn(command)?;
        let stderr = child.process().stderr.take();
        let log = std::thread::spawn(move || {
            let mut text = String::new();
            if let Some(mut stderr) = stderr {
                let _ = stderr.read_to_string(&mut text);
            }
            text
        });
        Ok(Self {
            child,
            log: Some(log),
        })
    }

    /// The process.
    pub fn child(&mut self) -> &mut Child {
        &mut self.child
    }

    /// Asks it to end and returns what it said.
    pub fn stop(mut self) -> Result<Ended> {
        let status = self.child.terminate(PATIENCE)?;
        Ok(self.ended(status))
    }

    /// Waits for it to end by itself.
    pub fn wait(mut self) -> Result<Ended> {
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            if let Some(status) = self.child.try_wait()? {
                return Ok(self.ended(status));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        fail("fastvpn did not end by itself")
    }

    fn ended(&mut self, status: ExitStatus) -> Ended {
        let log = self.log.take().and_then(|log| log.join().ok());
        Ended {
            status,
            log: log.unwrap_or_default(),
        }
    }
}

impl Ended {
    /// The counters of the line that starts with `who` ("total" or "queue 0"):
    /// (packets sent, packets received).
    pub fn packets(&self, who: &str) -> Result<(u64, u64)> {
        let prefix = format!("{who}: sent ");
        let line = self.log.lines().find(|line| line.contains(&prefix));
        let Some(line) = line else {
            return fail(format!("no line {prefix:?} in:\n{}", self.log));
        };
        let number_after = |word: &str| -> Option<u64> {
            let rest = &line[line.find(word)? + word.len()..];
            rest.split_whitespace().next()?.parse().ok()
        };
        match (number_after(": sent "), number_after(" received ")) {
            (Some(sent), Some(received)) => Ok((sent, received)),
            _ => fail(format!("cannot read {line:?}")),
        }
    }

    /// How many packets were dropped for `reason`, as the summary names it.
    pub fn dropped(&self, reason: &str) -> u64 {
        let line = self.log.lines().find(|line| line.contains("dropped: "));
        line.and_then(|line| {
            let start = line.find(&format!("{reason} "))? + reason.len() + 1;
            line[start..].split([',', ' ']).next()?.parse().ok()
        })
        .unwrap_or(0)
    }
}

/// Both ends of a tunnel, started as the mission's command line does, with
/// `flags` added at both ends, and waited for until they answer.
pub fn tunnel_between(hosts: &Pair, flags: &[&str]) -> Result<[Tunnel; 2]> {
    let start = |namespace: &Namespace, peer: Ipv4Addr| {
        let peer = peer.to_string();
        Tunnel::start(namespace, &[&["--peer", &peer], flags].concat())
    };
    let tunnels = [start(&hosts.a, UNDERLAY[1])?, start(&hosts.b, UNDERLAY[0])?];
    wait_for(&hosts.a, TUNNEL[1].into())?;
    Ok(tunnels)
}

/// Pings until an answer comes.
pub fn wait_for(from: &Namespace, to: IpAddr) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match ping(from, to, 56, Duration::from_millis(500)) {
            Ok(_) => return Ok(()),
            Err(error) if Instant::now() > deadline => return Err(error),
            Err(_) => std::thread::sleep(Duration::from_millis(10)),
        }
    }
}

/// Starts `fastvpn` with flags as one would type them.
pub fn fastvpn(namespace: &Namespace, flags: &str) -> Result<Tunnel> {
    Tunnel::start(namespace, &flags.split_whitespace().collect::<Vec<_>>())
}

/// Ends a tunnel in order and checks that this went well.
pub fn stop(tunnel: Tunnel) -> Result<Ended> {
    let ended = tunnel.stop()?;
    check(ended.status.success(), || {
        format!("{}:\n{}", ended.status, ended.log)
    })?;
    Ok(ended)
}

/// Sends megabytes over TCP and checks every byte.
pub fn bulk(client: &Namespace, server: &Namespace, address: IpAddr, megabytes: u64) -> Result<()> {
    let between = Between {
        client,
        server,
        address,
    };
    let bulk = Bulk {
        streams: 1,
        limit: BulkLimit::BytesPerStream(megabytes * 1_000_000),
    };
    let report = tcp_bulk(between, bulk, &Watch::default())?;
    check(
        report.intact && report.bytes == megabytes * 1_000_000,
        || format!("TCP to {address} was damaged: {report:?}"),
    )
}

/// An interface that must be there.
pub fn link(namespace: &Namespace, name: &str) -> Result<Link> {
    let mut netlink = namespace.netlink()?;
    let index = netlink.link_index(name)?;
    match index.map(|index| netlink.link_by_index(index)) {
        Some(link) => link?.ok_or_else(|| Error::new(format!("no interface {name}"))),
        None => fail(format!("no interface {name}")),
    }
}

/// Waits until something is so.
pub fn wait_until(what: &str, mut is_so: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while !is_so()? {
        check(Instant::now() < deadline, || {
            format!("waited in vain: {what}")
        })?;
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// A number from /proc/net/snmp of a namespace (RFC 1213 and others).
pub fn snmp(namespace: &Namespace, protocol: &str, name: &str) -> Result<u64> {
    // /proc/net is the namespace of the process's first thread.
    let path = "/proc/thread-self/net/snmp";
    let text = namespace
        .run(|| std::fs::read_to_string(path))
        .map_err(|cause| Error::os(format!("cannot read {path}"), cause))?;
    let mut lines = text
        .lines()
        .filter_map(|line| line.strip_prefix(protocol)?.strip_prefix(':'));
    let (names, values) = (lines.next(), lines.next());
    let place = names.and_then(|names| names.split_whitespace().position(|word| word == name));
    place
        .and_then(|place| values?.split_whitespace().nth(place)?.parse().ok())
        .ok_or_else(|| Error::new(format!("no {protocol} {name} in {path}")))
}

/// A UDP socket in a namespace whose reads wait as long as a test does.
pub fn udp(namespace: &Namespace, address: impl Into<IpAddr>, port: u16) -> Result<UdpSocket> {
    let address = SocketAddr::new(address.into(), port);
    let open = || {
        let socket = UdpSocket::bind(address)?;
        socket.set_read_timeout(Some(PATIENCE))?;
        Ok(socket)
    };
    namespace
        .run(open)
        .map_err(|cause| Error::os(format!("cannot open UDP socket on {address}"), cause))
}

/// Attaches an error to what was tried.
pub fn tried<T>(what: &str, result: io::Result<T>) -> Result<T> {
    result.map_err(|cause| Error::os(format!("cannot {what}"), cause))
}

/// Pings with `bytes` of payload until an answer comes: on a busy host one
/// fragment lost from a backlog takes a whole large ping with it, and so does
/// path MTU discovery at its first step.
pub fn answers(from: &Namespace, to: IpAddr, bytes: usize) -> Result<()> {
    const ATTEMPTS: u32 = 20;
    ping_up_to(ATTEMPTS as usize, from, to, bytes, PATIENCE / ATTEMPTS).map(drop)
}
