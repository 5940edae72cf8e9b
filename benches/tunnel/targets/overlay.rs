//! fastvpn in an overlay of many hosts: with 100 000 prefixes, and with prefixes
//! that change by the ten thousand while traffic flows.

use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Write as _};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use fastvpn::control::protocol::Request;
use fastvpn::error::{Error, Result};
use ipnet::IpNet;
use testbed::{Child, Pair};

use super::fastvpn::PROGRAM;
use super::others::{private_directory, write};
use super::{Link, TUNNEL, Target, UNDERLAY, daemon};

/// Prefixes of a large overlay.
const MANY: u32 = 100_000;

/// Prefixes that change at a time.
const CHANGED: u32 = 10_000;

/// How often they change at either host: ten times in a sample of five seconds.
pub const CHANGE_INTERVAL: Duration = Duration::from_millis(500);

/// How long a change may take.
const ANSWER_MAX: Duration = Duration::from_secs(10);

/// A peer that is not there: prefixes move between it and the other host.
const ABSENT: Ipv4Addr = Ipv4Addr::new(10, 211, 55, 99);

/// Where the numbered prefixes of each family begin. None holds an address that
/// the hosts have.
const IPV4_START: u32 = u32::from_be_bytes([20, 0, 0, 0]);
const IPV6_START: u128 = 0xfd01 << 112;

/// An overlay, larger or livelier than two hosts need.
pub enum Overlay {
    /// The other host has [`MANY`] prefixes.
    Prefixes,
    /// [`CHANGED`] prefixes move to another peer or back, every [`CHANGE_INTERVAL`].
    Changes,
}

impl Target for Overlay {
    fn key(&self) -> &'static str {
        match self {
            Self::Prefixes => "prefixes",
            Self::Changes => "changes",
        }
    }

    fn title(&self) -> &'static str {
        match self {
            Self::Prefixes => "fastvpn, many prefixes",
            Self::Changes => "fastvpn, changing prefixes",
        }
    }

    fn detail(&self) -> String {
        match self {
            Self::Prefixes => format!("{MANY} prefixes at both hosts, four of five IPv4"),
            Self::Changes => format!(
                "{CHANGED} prefixes replaced at both hosts every {} ms",
                CHANGE_INTERVAL.as_millis()
            ),
        }
    }

    fn missing(&self) -> Option<String> {
        None
    }

    fn start(&self, pair: &Pair) -> Result<Link> {
        let count = match self {
            Self::Prefixes => MANY,
            Self::Changes => CHANGED,
        };
        let directory = private_directory()?;
        let path = |own: usize, kind: &str| directory.path().join(format!("{own}.{kind}"));
        for own in [0, 1] {
            write(&path(own, "toml"), &configuration(own, count))?;
        }
        let sockets = [0, 1].map(|own| path(own, "sock"));
        let commands = [0, 1].map(|own| {
            let mut command = Command::new(PROGRAM);
            command.arg("--config").arg(path(own, "toml"));
            command.arg("--control").arg(&sockets[own]);
            command
        });
        let listens = |own: usize, _: &Child| Ok(sockets[own].exists());
        let mut link = daemon::start_and_set_up(pair, commands, listens)?;
        link.configuration = Some(directory);
        if let Self::Changes = self {
            link.changes = Some(Changes::start(sockets)?);
        }
        Ok(link)
    }
}

/// One of the prefixes: every fifth is IPv6, the others are of several lengths.
fn prefix(number: u32) -> IpNet {
    if number % 5 == 4 {
        let address = Ipv6Addr::from(IPV6_START | u128::from(number) << 80);
        return IpNet::new_assert(address.into(), 48);
    }
    // 1024 addresses for each, so that none holds another.
    let address = Ipv4Addr::from(IPV4_START + number * 1024);
    IpNet::new_assert(address.into(), 22 + (number % 8) as u8)
}

fn prefixes(count: u32) -> Vec<IpNet> {
    (0..count).map(prefix).collect()
}

/// The configuration file of host `own`, to whose peer the first prefixes belong.
fn configuration(own: usize, count: u32) -> String {
    let other = 1 - own;
    let mut text = format!(
        "[[peer]]\nendpoint = \"{}\"\nprefixes = [\"{}/32\"",
        UNDERLAY[other], TUNNEL[other]
    );
    for prefix in prefixes(count) {
        // Writing to a string cannot fail.
        let _ = write!(text, ", \"{prefix}\"");
    }
    let absent = "[[peer]]\nprefixes = [\"10.245.0.0/24\"]\nendpoint";
    let _ = writeln!(text, "]\n{absent} = \"{ABSENT}\"");
    text
}

/// Prefixes that keep changing, in a thread of its own. Ends when dropped.
pub struct Changes {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    made: AtomicU64,
    /// Why no more are made.
    failure: OnceLock<String>,
}

impl Changes {
    fn start(sockets: [PathBuf; 2]) -> Result<Self> {
        // Made beforehand: what the asking costs is not the tunnel's.
        let mut hosts = Vec::new();
        for (own, socket) in sockets.iter().enumerate() {
            let requests = [
                request(ABSENT, prefixes(CHANGED))?,
                request(UNDERLAY[1 - own], prefixes(CHANGED))?,
            ];
            hosts.push((Operator::connect(socket)?, requests));
        }
        let shared = Arc::new(Shared::default());
        let worker = Arc::clone(&shared);
        let thread = thread::spawn(move || {
            if let Err(error) = change(&mut hosts, &worker) {
                // Nobody else sets it.
                let _ = worker.failure.set(error.to_string());
            }
        });
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    /// How many changes have been made at both hosts.
    ///
    /// # Errors
    /// When one was refused: then no more are made.
    pub fn made(&self) -> Result<u64> {
        match self.shared.failure.get() {
            Some(reason) => Err(Error::new(reason.as_str())),
            None => Ok(self.shared.made.load(Ordering::Relaxed)),
        }
    }
}

impl Drop for Changes {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            // Nobody asks it any more.
            let _ = thread.join();
        }
    }
}

/// Moves the prefixes of all hosts to and fro until it has to stop.
fn change(hosts: &mut [(Operator, [Vec<u8>; 2])], shared: &Shared) -> Result<()> {
    for turn in (0..2).cycle() {
        let start = Instant::now();
        for (operator, requests) in hosts.iter_mut() {
            operator.ask(&requests[turn])?;
            shared.made.fetch_add(1, Ordering::Relaxed);
        }
        // On a slow machine a change takes longer than the interval.
        loop {
            if shared.stop.load(Ordering::Relaxed) {
                return Ok(());
            }
            match CHANGE_INTERVAL.checked_sub(start.elapsed()) {
                Some(rest) => thread::park_timeout(rest),
                None => break,
            }
        }
    }
    Ok(())
}

/// A line that moves prefixes to a peer.
fn request(peer: Ipv4Addr, prefixes: Vec<IpNet>) -> Result<Vec<u8>> {
    let request = Request::RouteAdd {
        peer: peer.to_string(),
        prefixes,
        replace: true,
    };
    let mut line = serde_json::to_vec(&request)
        .map_err(|error| Error::new(format!("cannot write a request: {error}")))?;
    line.push(b'\n');
    Ok(line)
}

/// A connection to a tunnel's control socket.
struct Operator {
    stream: BufReader<UnixStream>,
}

impl Operator {
    fn connect(socket: &Path) -> Result<Self> {
        let failed =
            |cause| Error::os(format!("no fastvpn answers at {}", socket.display()), cause);
        let stream = UnixStream::connect(socket).map_err(failed)?;
        stream.set_read_timeout(Some(ANSWER_MAX)).map_err(failed)?;
        stream.set_write_timeout(Some(ANSWER_MAX)).map_err(failed)?;
        Ok(Self {
            stream: BufReader::new(stream),
        })
    }

    /// Has a change made; that all the prefixes have changed is checked.
    fn ask(&mut self, request: &[u8]) -> Result<()> {
        let failed = |cause| Error::os("cannot ask fastvpn for a change", cause);
        self.stream.get_mut().write_all(request).map_err(failed)?;
        let mut answer = String::new();
        self.stream.read_line(&mut answer).map_err(failed)?;
        match answer.contains(&format!("\"prefixes_added\":{CHANGED},")) {
            true => Ok(()),
            false => Err(Error::new(format!(
                "fastvpn does not change {CHANGED} prefixes, but answers {}",
                answer.trim()
            ))),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::net::IpAddr;

    use super::*;

    #[test]
    fn prefixes_are_distinct_and_hold_no_address_of_the_hosts() {
        let prefixes = prefixes(MANY);
        let distinct: HashSet<IpNet> = prefixes.iter().map(IpNet::trunc).collect();
        assert_eq!(distinct.len(), MANY as usize);
        assert!(prefixes.iter().all(|prefix| *prefix == prefix.trunc()));
        for address in [UNDERLAY, TUNNEL, [ABSENT; 2]].concat() {
            let address = IpAddr::from(address);
            assert!(!prefixes.iter().any(|prefix| prefix.contains(&address)));
        }
    }

    #[test]
    fn requests_are_lines_that_move_all_prefixes() {
        let line = request(ABSENT, prefixes(3)).unwrap();
        let text = String::from_utf8(line).unwrap();
        assert!(text.ends_with("}\n") && text.lines().count() == 1, "{text}");
        assert!(text.contains("\"command\":\"route-add\""), "{text}");
        assert!(text.contains("\"replace\":true"), "{text}");
        assert!(text.contains("20.0.8.0/24"), "{text}");
    }
}
