//! What the tests have in common: hosts, tunnels between them, and what the
//! tunnels said.

use std::cell::Cell;
use std::io::{self, BufRead, BufReader};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use fastvpn::error::{Error, Result};
use fastvpn::host::netlink::Link;
use ipnet::IpNet;
use testbed::traffic::{Between, Bulk, BulkLimit, Watch, ping, ping_up_to, tcp_bulk};
use testbed::{Child, Namespace, Pair, pair};

use crate::operator::Operator;

/// The I/O engines of a trial's tunnels, as `--io` names them.
#[derive(Clone, Copy)]
pub enum Engines {
    /// The default: for trials in which it does not matter.
    Any,
    /// io_uring.
    Uring,
    /// epoll.
    Epoll,
    /// io_uring for the first tunnel that is started, epoll for the second, and
    /// so on: one for each end.
    Mixed,
}

thread_local! {
    /// What the next tunnels started on this thread, a trial's, get.
    static ENGINES: Cell<[Option<&'static str>; 2]> = const { Cell::new([None; 2]) };
}

impl Engines {
    /// Puts the tunnels that this thread starts from now on onto these.
    pub fn use_here(self) {
        ENGINES.set(match self {
            Self::Any => [None; 2],
            Self::Uring => [Some("uring"); 2],
            Self::Epoll => [Some("epoll"); 2],
            Self::Mixed => [Some("uring"), Some("epoll")],
        });
    }
}

/// What a tunnel that is started next would call its engine.
pub fn engine_name() -> Option<&'static str> {
    ENGINES.get()[0].map(|io| if io == "uring" { "io_uring" } else { io })
}

/// The engine of the tunnel that is started next, as `--io` names it.
pub fn next_engine() -> Option<&'static str> {
    let [next, other] = ENGINES.get();
    ENGINES.set([other, next]);
    next
}

/// Underlay addresses of host A and host B: those of README.md.
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
pub const PATIENCE: Duration = Duration::from_secs(60);

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

/// Two hosts with an underlay of this MTU.
pub fn hosts(mtu_bytes: u32) -> Result<Pair> {
    let net = |address: Ipv4Addr| IpNet::new_assert(address.into(), 24);
    pair(&[(net(UNDERLAY[0]), net(UNDERLAY[1]))], mtu_bytes)
}

/// A fastvpn process and what it says.
pub struct Tunnel {
    child: Child,
    log: Arc<Mutex<String>>,
    reader: Option<JoinHandle<()>>,
}

/// How a tunnel ended.
pub struct Ended {
    /// Its exit status.
    pub status: ExitStatus,
    /// All it wrote to standard error.
    pub log: String,
}

impl Tunnel {
    /// Starts `fastvpn FLAGS` in a namespace, on the trial's engine.
    pub fn start(namespace: &Namespace, flags: &[&str]) -> Result<Self> {
        Self::spawn(namespace, Self::command(flags))
    }

    /// `fastvpn FLAGS` on the trial's engine, to be spawned.
    pub fn command(flags: &[&str]) -> Command {
        let mut command = Command::new(FASTVPN);
        command
            .args(next_engine().iter().flat_map(|io| ["--io", io]))
            .args(flags)
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        command
    }

    /// Starts a command that is fastvpn's, and reads what it says.
    pub fn spawn(namespace: &Namespace, mut command: Command) -> Result<Self> {
        command.stderr(Stdio::piped());
        let mut child = namespace.spawn(command)?;
        let stderr = child.process().stderr.take();
        let log = Arc::<Mutex<String>>::default();
        let written = Arc::clone(&log);
        let reader = std::thread::spawn(move || {
            let lines = stderr.into_iter().flat_map(|it| BufReader::new(it).lines());
            for line in lines.map_while(io::Result::ok) {
                let mut log = written.lock().unwrap_or_else(PoisonError::into_inner);
                log.push_str(&line);
                log.push('\n');
            }
        });
        Ok(Self {
            child,
            log,
            reader: Some(reader),
        })
    }

    /// The process.
    pub fn pid(&self) -> u32 {
        self.child.pid()
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
        let _ = self.reader.take().map(JoinHandle::join);
        Ended {
            status,
            log: self.said(),
        }
    }

    /// All it has said so far.
    pub fn said(&self) -> String {
        let log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        log.clone()
    }

    /// Whether it has said this so far, in one line.
    pub fn has_said(&self, part: &str) -> bool {
        self.said().lines().any(|line| line.contains(part))
    }

    /// Waits until it has.
    pub fn wait_for_line(&self, part: &str) -> Result<()> {
        wait_until(part, || Ok(self.has_said(part)))
            .map_err(|error| Error::new(format!("{error}; it said:\n{}", self.said())))
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

    /// Its warnings, but for the one that every start gives.
    pub fn warnings(&self) -> Vec<&str> {
        let warnings = self.log.lines().filter(|line| line.contains(" WARN "));
        warnings
            .filter(|line| !line.contains("neither encrypted nor authenticated"))
            .collect()
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

/// Both ends of a tunnel, started as README.md's command lines do, with
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
    let bulk = Bulk::new(1, BulkLimit::BytesPerStream(megabytes * 1_000_000));
    let report = tcp_bulk(between, bulk, &Watch::default())?;
    check(report.bytes == megabytes * 1_000_000, || {
        format!("TCP to {address}: {report:?}")
    })
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
    // One that was closed lives on in processes that other trials start just then, until these
    // have begun with their programs.
    let mut opened = namespace.run(open);
    let _ = wait_until("the port is free", || {
        let is_in_use = |error: &io::Error| error.kind() == io::ErrorKind::AddrInUse;
        if opened.as_ref().is_err_and(is_in_use) {
            opened = namespace.run(open);
        }
        Ok(!opened.as_ref().is_err_and(is_in_use))
    });
    opened.map_err(|cause| Error::os(format!("cannot open UDP socket on {address}"), cause))
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

/// Tunnel addresses of host A and host B in both families.
pub const FAMILIES: [[IpAddr; 2]; 2] = [
    [IpAddr::V4(TUNNEL[0]), IpAddr::V4(TUNNEL[1])],
    [
        IpAddr::V6(Ipv6Addr::new(0xfd00, 0x244, 0, 0, 0, 0, 0, 0x122)),
        IpAddr::V6(Ipv6Addr::new(0xfd00, 0x244, 0, 0, 0, 0, 0, 0x123)),
    ],
];

/// The flags that give host A (0) or host B (1) its addresses of both families.
pub fn dual_stack(host: usize) -> [String; 4] {
    let address = |net: String| ["--address".to_string(), net];
    let [v4, v6] = [
        address(format!("{}/16", TUNNEL[host])),
        address(format!("{}/64", TUNNEL_V6[host])),
    ];
    let [[a, b], [c, d]] = [v4, v6];
    [a, b, c, d]
}

/// Starts one end of a tunnel that carries both families.
pub fn start_dual_stack(hosts: &Pair, host: usize, flags: &[&str]) -> Result<Tunnel> {
    let namespace = [&hosts.a, &hosts.b][host];
    let peer = UNDERLAY[1 - host].to_string();
    let addresses = dual_stack(host);
    let mut all = vec!["--peer", &peer];
    all.extend(addresses.iter().map(String::as_str));
    all.extend(flags);
    Tunnel::start(namespace, &all)
}

/// Both ends of a tunnel that carries both families, host A's with `flags[0]`
/// and host B's with `flags[1]`, waited for until they answer, and until all
/// workers send from the ports that they stay with: what is sent before may be
/// overtaken.
pub fn dual_stack_tunnels(hosts: &Pair, flags: [&[&str]; 2]) -> Result<[Tunnel; 2]> {
    let operators = [Operator::new()?, Operator::new()?];
    let start = |host: usize| {
        let socket = operators[host].socket_text();
        start_dual_stack(
            hosts,
            host,
            &[flags[host], &["--control", &socket]].concat(),
        )
    };
    let tunnels = [start(0)?, start(1)?];
    for family in FAMILIES {
        wait_for(&hosts.a, family[1])?;
    }
    operators
        .iter()
        .try_for_each(Operator::wait_for_own_ports)?;
    Ok(tunnels)
}

/// Ends tunnels; each must end well.
pub fn stop_all<const N: usize>(tunnels: [Tunnel; N]) -> Result<[Ended; N]> {
    let mut ended = Vec::with_capacity(N);
    for tunnel in tunnels {
        let end = tunnel.stop()?;
        check(end.status.success(), || {
            format!("ended badly:\n{}", end.log)
        })?;
        ended.push(end);
    }
    match ended.try_into() {
        Ok(ended) => Ok(ended),
        Err(_) => fail("one result for each tunnel"),
    }
}

/// Packets that this machine's kernel threw away for lack of room in a CPU's
/// backlog (second column of `softnet_stat`). A veth puts every packet there,
/// and all namespaces share it: a loss there is not the tunnel's.
pub fn backlog_drops() -> Result<u64> {
    let path = "/proc/net/softnet_stat";
    let text =
        std::fs::read_to_string(path).map_err(|cause| Error::os(format!("no {path}"), cause))?;
    let drops = |line: &str| u64::from_str_radix(line.split_whitespace().nth(1)?, 16).ok();
    Ok(text.lines().filter_map(drops).sum())
}

/// Does work that must lose nothing; once more if it failed while the
/// machine's backlog, shared with all else that runs, overflowed.
pub fn without_backlog_drops<T>(mut work: impl FnMut() -> Result<T>) -> Result<T> {
    const ATTEMPTS: usize = 3;
    for _ in 1..ATTEMPTS {
        let before = backlog_drops()?;
        match work() {
            Err(_) if backlog_drops()? != before => {}
            result => return result,
        }
    }
    work()
}

/// `bytes` pseudo-random bytes that differ from seed to seed.
pub fn noise(seed: u64, bytes: usize) -> Vec<u8> {
    // splitmix64 (Steele and others, 2014): good from the first word on,
    // whatever the seed.
    let mut state = seed;
    let mut out = Vec::with_capacity(bytes + 8);
    while out.len() < bytes {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = state;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        out.extend((word ^ (word >> 31)).to_le_bytes());
    }
    out.truncate(bytes);
    out
}

/// All cores, as `--cores` takes them. A worker that moves between CPUs may
/// overtake itself in the veth's backlog, of which each CPU has its own; a
/// test that looks at order has to pin it.
pub fn all_cores() -> String {
    let cores = core_affinity::get_core_ids().unwrap_or_default();
    let numbers: Vec<String> = cores.iter().map(|core| core.id.to_string()).collect();
    numbers.join(",")
}

impl Ended {
    /// How many packets were dropped for any reason.
    pub fn all_dropped(&self) -> u64 {
        let line = self
            .log
            .lines()
            .find_map(|line| line.split_once("dropped: "));
        let (_, reasons) = line.unwrap_or_default();
        let count = |reason: &str| reason.rsplit(' ').next()?.parse::<u64>().ok();
        reasons.split(", ").filter_map(count).sum()
    }

    /// The number that stands before `words` in the line of all queues, such
    /// as "receives".
    pub fn total_before(&self, words: &str) -> Result<u64> {
        let line = self.log.lines().find(|line| line.contains("total: sent "));
        let before = line.and_then(|line| line.split(words).next());
        let number = before.and_then(|text| text.split_whitespace().next_back()?.parse().ok());
        number.map_or_else(|| fail(format!("no {words:?} in:\n{}", self.log)), Ok)
    }
}

/// Gives a socket a receive buffer of `bytes`, or as much of it as a user
/// without rights over the machine may have (`net.core.rmem_max`).
pub fn enlarge_receive_buffer(socket: &impl std::os::fd::AsFd, bytes: usize) {
    use nix::sys::socket::{setsockopt, sockopt};
    if setsockopt(socket, sockopt::RcvBufForce, &bytes).is_err() {
        let _ = setsockopt(socket, sockopt::RcvBuf, &bytes);
    }
}

/// Whether this process is in a user namespace of its own, where the kernel
/// loads no eBPF programs for it.
pub fn is_in_user_namespace() -> bool {
    let map = std::fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    map.split_whitespace().ne(["0", "0", "4294967295"])
}
