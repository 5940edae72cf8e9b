//! How a registry scales: one real fastvpn, a real etcd, and hosts that are not there.
//!
//! `cargo bench --bench registry [-- HOSTS PREFIXES]`, as root. docs/registry.md has figures.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, Ipv4Addr};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use fastvpn::error::{Error, Result};
use fastvpn::registry::load::{Load, LoadHost};
use ipnet::{IpNet, Ipv4Net};
use serde_json::{Value, json};
use testbed::etcd::{self, Etcd};
use testbed::traffic::{Between, Bulk, BulkLimit, Watch, tcp_bulk};
use testbed::{Child, Pair, cpu_ns, pair, rss_bytes, rss_peak_bytes};

const PREFIX: &str = "/coreos.com/network";

/// Keys in the same etcd that no tunnel follows.
const PREFIX_ELSEWHERE: &str = "/elsewhere/network";

/// The measured host, and the other one that carries traffic and has etcd.
const HOSTS: [Ipv4Addr; 2] = [
    Ipv4Addr::new(10, 212, 255, 253),
    Ipv4Addr::new(10, 212, 255, 254),
];

/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(120);

/// Changes each second beside what is measured.
const RATE: u32 = 100;

/// The address in the tunnel of the host that is a peer by hand.
const FAR: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 70, 0, 1));

/// How often a stream has changes beside it and none, how long each lasts, and how long the stream
/// has to come up to speed.
const TURNS: usize = 60;
const TURN: Duration = Duration::from_millis(400);
const WARM_UP: Duration = Duration::from_secs(2);

fn main() -> Result<()> {
    if let Some(missing) = etcd::missing() {
        println!("not measured: {missing}");
        return Ok(());
    }
    testbed::enter_user_namespace_if_needed()?;
    // cargo adds --bench.
    let numbers = std::env::args().filter_map(|word| word.parse().ok());
    let mut numbers: Vec<usize> = numbers.collect();
    numbers.resize(2, 0);
    let hosts = if numbers[0] > 0 { numbers[0] } else { 1000 };
    let prefixes = if numbers[1] > 0 { numbers[1] } else { 100_000 };
    measure(hosts)?;
    join_with_prefixes(hosts, prefixes)
}

/// A host that is not there, by number; `generation` moves it.
fn load_host(number: usize, generation: u32, prefixes: usize) -> LoadHost {
    let number = number as u32;
    let address = |base: u32, number: u32| Ipv4Addr::from(base + number);
    // 10.64.0.0/10 has room for 16384 subnets.
    let subnet = Ipv4Net::new_assert(address(0x0a40_0000, (number + 512) << 8), 24);
    let prefix = |at: u32| {
        let first = number * prefixes as u32 + at;
        IpNet::from(Ipv4Net::new_assert(address(0x1400_0000, first << 4), 28))
    };
    LoadHost {
        subnet,
        public_ip: address(0x0ad4_0002, 2 * number + generation % 2),
        prefixes: (0..prefixes as u32).map(prefix).collect(),
    }
}

/// Two hosts, etcd at the second, and many that are not there.
struct Site {
    hosts: Pair,
    etcd: Etcd,
    directory: tempfile::TempDir,
}

impl Site {
    fn new(all: &[LoadHost]) -> Result<Self> {
        let net = |address: Ipv4Addr| IpNet::new_assert(address.into(), 16);
        let hosts = pair(&[(net(HOSTS[0]), net(HOSTS[1]))], 1500)?;
        let etcd = Etcd::start(&hosts.b, HOSTS[1].into())?;
        // The first subnets are for those that are there.
        let config = r#"{"Network":"10.64.0.0/10","SubnetLen":24,"SubnetMin":"10.64.1.0","SubnetMax":"10.64.255.0"}"#;
        etcd.put(&hosts.b, &format!("{PREFIX}/config"), config)?;
        let site = Self {
            hosts,
            etcd,
            directory: tempfile::tempdir()
                .map_err(|cause| Error::os("cannot make a directory", cause))?,
        };
        site.load(PREFIX)?.write(all)?;
        Ok(site)
    }

    /// Connects to etcd, in its namespace, for keys with a prefix.
    fn load(&self, prefix: &str) -> Result<Load> {
        self.hosts.b.run(|| Load::connect(self.etcd.url(), prefix))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Starts the measured tunnel, without what was known before.
    fn start(&self, flags: &[&str]) -> Result<Child> {
        let mut command = Command::new(env!("CARGO_BIN_EXE_fastvpn"));
        command.args(["--registry", self.etcd.url(), "--quiet"]);
        command.args(["--public-ip", &HOSTS[0].to_string()]);
        command.args(["--registry-allow-prefix", "20.0.0.0/8"]);
        command.args(flags);
        for (flag, name) in [
            ("--control", "control"),
            ("--subnet-file", "subnet"),
            ("--registry-cache", "cache"),
        ] {
            let path = self.path(name);
            let _ = std::fs::remove_file(&path);
            command.arg(flag).arg(path);
        }
        command.stdin(Stdio::null()).stdout(Stdio::null());
        self.hosts.a.spawn(command)
    }

    /// Starts the tunnel of a host that is not in the registry, and is a peer by hand.
    fn start_far(&self) -> Result<Child> {
        let mut command = Command::new(env!("CARGO_BIN_EXE_fastvpn"));
        command.args(["--quiet", "--address", &format!("{FAR}/32")]);
        command.args(["--listen", &HOSTS[1].to_string()]);
        command.args(["--peer", &format!("{}=10.64.0.0/10", HOSTS[0])]);
        command.arg("--control").arg(self.path("control-far"));
        command.stdin(Stdio::null()).stdout(Stdio::null());
        self.hosts.b.spawn(command)
    }

    /// Asks the measured tunnel.
    fn control(&self) -> Result<Control> {
        Control::open(&self.path("control"))
    }
}

/// A connection to a tunnel's control socket.
struct Control(BufReader<UnixStream>);

impl Control {
    fn open(path: &Path) -> Result<Self> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match UnixStream::connect(path) {
                Ok(stream) => return Ok(Self(BufReader::new(stream))),
                Err(cause) if Instant::now() > deadline => {
                    return Err(Error::os("cannot connect to the tunnel", cause));
                }
                Err(_) => thread::sleep(Duration::from_micros(500)),
            }
        }
    }

    fn ask(&mut self, request: &Value) -> Result<Value> {
        let cannot = |cause| Error::os("the tunnel does not answer", cause);
        writeln!(self.0.get_mut(), "{request}").map_err(cannot)?;
        let mut line = String::new();
        self.0.read_line(&mut line).map_err(cannot)?;
        serde_json::from_str(&line).map_err(|error| Error::new(format!("{error}: {line}")))
    }

    /// Where packets to an address go.
    fn endpoint(&mut self, address: IpAddr) -> Result<Value> {
        let answer = self.ask(&json!({"command": "route-get", "address": address}))?;
        Ok(answer["endpoint"].clone())
    }

    /// Waits until packets to a host's containers go to it.
    fn wait_for(&mut self, host: &LoadHost) -> Result<()> {
        let expected = json!(format!("{}:8285", host.public_ip));
        let deadline = Instant::now() + PATIENCE;
        while self.endpoint(host.subnet.addr().into())? != expected {
            if Instant::now() > deadline {
                return Err(Error::new(format!("waited in vain for {expected}")));
            }
            thread::sleep(Duration::from_micros(500));
        }
        Ok(())
    }

    /// Waits until packets to all hosts' containers go to these. One question is for all: a
    /// connection has a thousand a second.
    fn wait_for_all(&mut self, hosts: &[LoadHost]) -> Result<()> {
        let expected: HashMap<_, _> = hosts
            .iter()
            .map(|host| (host.subnet.to_string(), format!("{}:8285", host.public_ip)))
            .collect();
        let deadline = Instant::now() + PATIENCE;
        loop {
            let answer = self.ask(&json!({"command": "route-list"}))?;
            let routes = answer["routes"].as_array().into_iter().flatten();
            let is_there = |route: &&Value| {
                let prefix = route["prefix"].as_str().unwrap_or_default();
                let endpoint = expected.get(prefix);
                endpoint.is_some_and(|endpoint| route["endpoint"] == endpoint[..])
            };
            if routes.filter(is_there).count() == expected.len() {
                return Ok(());
            }
            if Instant::now() > deadline {
                return Err(Error::new("waited in vain for all hosts to move"));
            }
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Bytes that have left by the tunnel.
    fn bytes_sent(&mut self) -> Result<u64> {
        let status = self.ask(&json!({"command": "status"}))?;
        let bytes = status["counters"]["bytes_sent"].as_u64();
        bytes.ok_or_else(|| Error::new(format!("no bytes in {status}")))
    }

    /// Waits until there are so many prefixes.
    fn wait_for_prefixes(&mut self, count: usize) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let status = self.ask(&json!({"command": "status"}))?;
            if status["prefixes"].as_u64() >= Some(count as u64) {
                return Ok(());
            }
            if Instant::now() > deadline {
                return Err(Error::new(format!("waited in vain for {count}: {status}")));
            }
            thread::sleep(Duration::from_millis(2));
        }
    }
}

/// The value that so many of a hundred are at most.
fn percentile(sorted: &[Duration], percent: usize) -> Duration {
    let at = (sorted.len() * percent).div_ceil(100).saturating_sub(1);
    sorted.get(at).copied().unwrap_or_default()
}

/// Changes some hosts `RATE` times a second, until it is dropped.
struct Churn {
    is_over: Arc<AtomicBool>,
    /// Set it, and as much is written to keys that no tunnel follows.
    is_elsewhere: Arc<AtomicBool>,
    changes: Arc<AtomicUsize>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Churn {
    fn start(site: &Site, numbers: std::ops::Range<usize>) -> Result<Self> {
        let mut loads = [site.load(PREFIX)?, site.load(PREFIX_ELSEWHERE)?];
        let mut churn = Self {
            is_over: Arc::default(),
            is_elsewhere: Arc::default(),
            changes: Arc::default(),
            thread: None,
        };
        let (over, count) = (Arc::clone(&churn.is_over), Arc::clone(&churn.changes));
        let elsewhere = Arc::clone(&churn.is_elsewhere);
        churn.thread = Some(thread::spawn(move || {
            let start = Instant::now();
            for (generation, change) in (1..).zip(0u32..) {
                thread::sleep(
                    (start
                        + change / RATE * Duration::from_secs(1)
                        + change % RATE * Duration::from_secs(1) / RATE)
                        .saturating_duration_since(Instant::now()),
                );
                let number = numbers.start + change as usize % numbers.len();
                let round = generation / numbers.len() as u32 + 1;
                let load = &mut loads[usize::from(elsewhere.load(Relaxed))];
                if over.load(Relaxed) || load.write(&[load_host(number, round, 0)]).is_err() {
                    return;
                }
                count.fetch_add(1, Relaxed);
            }
        }));
        Ok(churn)
    }
}

impl Drop for Churn {
    fn drop(&mut self) {
        self.is_over.store(true, Relaxed);
        let _ = self.thread.take().map(thread::JoinHandle::join);
    }
}

fn measure(count: usize) -> Result<()> {
    let all: Vec<_> = (0..count).map(|number| load_host(number, 0, 0)).collect();
    let site = Site::new(&all)?;
    let mut joins = Vec::new();
    for _ in 0..5 {
        let start = Instant::now();
        let mut tunnel = site.start(&[])?;
        site.control()?.wait_for_prefixes(count)?;
        joins.push(start.elapsed());
        tunnel.terminate(PATIENCE)?;
    }
    joins.sort();
    println!(
        "join {count} hosts, from the process's start: median {:?} of {joins:?}",
        joins[2]
    );
    let mut tunnel = site.start(&[])?;
    site.control()?.wait_for_prefixes(count)?;
    println!(
        "memory with {count} hosts: {} MB",
        rss_bytes(tunnel.pid())? / 1_000_000
    );
    // Paths to all are looked at in turns, once.
    thread::sleep(Duration::from_secs(10));
    let share = cpu_percent(&tunnel, Duration::from_secs(20))?;
    println!("CPU while nothing happens: {share:.2} % of a core");
    // A connection on which nobody asks anything is closed.
    let mut control = site.control()?;
    let mut load = site.load(PREFIX)?;
    let (mut single, mut among) = (Vec::new(), Vec::new());
    for generation in 1..=100 {
        single.push(one_change(&mut load, &mut control, generation)?);
    }
    let churn = Churn::start(&site, 100..count)?;
    for generation in 101..=300 {
        among.push(one_change(&mut load, &mut control, generation)?);
    }
    single.sort();
    among.sort();
    for (what, times) in [("alone", &single), ("among others", &among)] {
        println!(
            "one change, {what}: median {:?}, p99 {:?}",
            percentile(times, 50),
            percentile(times, 99)
        );
    }
    // Nobody asks anything meanwhile: an answer takes as much as a change.
    let (start, before) = (Instant::now(), churn.changes.load(Relaxed));
    let share = cpu_percent(&tunnel, Duration::from_secs(10))?;
    let changes = churn.changes.load(Relaxed) - before;
    let rate = changes as f64 / start.elapsed().as_secs_f64();
    drop(churn);
    println!("CPU at {rate:.0} changes a second: {share:.1} % of a core");
    all_at_once(&mut load, &mut control, count)?;
    tunnel.terminate(PATIENCE)?;
    traffic(&site, count)
}

/// How much of a core a tunnel takes for so long.
fn cpu_percent(tunnel: &Child, time: Duration) -> Result<f64> {
    let (start, before) = (Instant::now(), cpu_ns(tunnel.pid())?);
    thread::sleep(time);
    let used = Duration::from_nanos(cpu_ns(tunnel.pid())? - before);
    Ok(100.0 * used.as_secs_f64() / start.elapsed().as_secs_f64())
}

/// All hosts move: how long it takes to write that, and how long from then on until packets
/// follow.
fn all_at_once(load: &mut Load, control: &mut Control, count: usize) -> Result<()> {
    let round = u32::MAX - 1;
    let mut times = Vec::new();
    for generation in [round, round + 1, round, round + 1, round] {
        let moved = (0..count).map(|number| load_host(number, generation, 0));
        let moved: Vec<_> = moved.collect();
        let start = Instant::now();
        load.write(&moved)?;
        let written = start.elapsed();
        control.wait_for_all(&moved)?;
        times.push((start.elapsed(), written));
    }
    times.sort();
    println!("{count} changes at once: (all in force, of that writing) {times:?}");
    Ok(())
}

/// One host moves: how long until packets follow.
fn one_change(load: &mut Load, control: &mut Control, generation: u32) -> Result<Duration> {
    let host = load_host(generation as usize % 50, generation, 0);
    let host = LoadHost {
        // Never where it is already.
        public_ip: Ipv4Addr::from(0x0ad4_8000 + generation),
        ..host
    };
    thread::sleep(Duration::from_millis(u64::from(generation % 37)));
    let start = Instant::now();
    load.write(std::slice::from_ref(&host))?;
    control.wait_for(&host)?;
    Ok(start.elapsed())
}

/// What a stream loses by changes. All share this machine, so what it is compared with is the
/// same load on etcd by keys that the tunnel does not follow, in turns that are short beside
/// what else happens here. The other end is a host by hand, for which nothing changes.
fn traffic(site: &Site, count: usize) -> Result<()> {
    let _far = site.start_far()?;
    Control::open(&site.path("control-far"))?;
    let peer = format!("{}={FAR}/32", HOSTS[1]);
    let _near = site.start(&["--peer", &peer])?;
    let mut control = site.control()?;
    control.wait_for_prefixes(count + 1)?;
    let churn = Churn::start(site, 100..count)?;
    let between = Between {
        client: &site.hosts.a,
        server: &site.hosts.b,
        address: FAR,
    };
    let time = WARM_UP + 2 * TURNS as u32 * TURN + WARM_UP;
    let bulk = Bulk::new(1, BulkLimit::Time(time));
    let rates = thread::scope(|scope| {
        let stream = scope.spawn(|| tcp_bulk(between, bulk, &Watch::default()));
        thread::sleep(WARM_UP);
        let mut rates = Vec::new();
        for turn in 0..2 * TURNS {
            // With, without, without, with: what drifts is in both.
            churn
                .is_elsewhere
                .store(turn % 4 == 1 || turn % 4 == 2, Relaxed);
            // What was changed before is still being followed.
            thread::sleep(TURN / 4);
            let (start, before) = (Instant::now(), control.bytes_sent()?);
            thread::sleep(TURN - TURN / 4);
            let bytes = control.bytes_sent()? - before;
            rates.push(bytes as f64 * 8e-9 / start.elapsed().as_secs_f64());
        }
        let report = stream.join();
        let report = report.map_err(|_| Error::new("the stream's thread has panicked"))?;
        report.map(|_| rates)
    })?;
    let pairs = rates.chunks_exact(2).enumerate();
    let mut ratios: Vec<f64> = pairs
        .map(|(number, pair)| match number % 2 {
            0 => pair[0] / pair[1],
            _ => pair[1] / pair[0],
        })
        .collect();
    ratios.sort_by(f64::total_cmp);
    let mean = rates.iter().sum::<f64>() / rates.len() as f64;
    println!(
        "TCP beside {RATE} changes a second, against the same load on etcd elsewhere: median {:.3}, \
         quartiles {:.3} and {:.3} of {TURNS} pairs; {mean:.1} Gbit/s",
        ratios[TURNS / 2],
        ratios[TURNS / 4],
        ratios[TURNS - 1 - TURNS / 4]
    );
    Ok(())
}

fn join_with_prefixes(count: usize, prefixes: usize) -> Result<()> {
    let each = prefixes / count;
    let all: Vec<_> = (0..count)
        .map(|number| load_host(number, 0, each))
        .collect();
    let site = Site::new(&all)?;
    let mut joins = Vec::new();
    for _ in 0..3 {
        let start = Instant::now();
        let mut tunnel = site.start(&[])?;
        let mut control = site.control()?;
        control.wait_for_prefixes(count + count * each)?;
        joins.push(start.elapsed());
        let (now, peak) = (rss_bytes(tunnel.pid())?, rss_peak_bytes(tunnel.pid())?);
        println!(
            "memory: {} MB, at most {} MB",
            now / 1_000_000,
            peak / 1_000_000
        );
        tunnel.terminate(PATIENCE)?;
    }
    joins.sort();
    println!(
        "join {count} hosts with {} prefixes: median {:?} of {joins:?}",
        count + count * each,
        joins[1]
    );
    Ok(())
}
