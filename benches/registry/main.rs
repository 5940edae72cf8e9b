//! How a registry scales: one real fastvpn, a real etcd, and hosts that are not there.
//!
//! `cargo bench --bench registry [-- HOSTS PREFIXES]`, as root. docs/registry.md has figures.

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
use testbed::{Child, Namespace, Pair, cpu_ns, pair, rss_bytes, rss_peak_bytes};

const PREFIX: &str = "/coreos.com/network";

/// The measured host, and the other one that carries traffic and has etcd.
const HOSTS: [Ipv4Addr; 2] = [
    Ipv4Addr::new(10, 212, 255, 253),
    Ipv4Addr::new(10, 212, 255, 254),
];

/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(120);

/// Changes each second beside the one that is measured.
const RATE: u32 = 100;

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
        site.load()?.write(all)?;
        Ok(site)
    }

    /// Connects to etcd, in its namespace.
    fn load(&self) -> Result<Load> {
        self.hosts.b.run(|| Load::connect(self.etcd.url(), PREFIX))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Starts a tunnel, without what was known before.
    fn start(&self, number: usize) -> Result<Child> {
        let mut command = Command::new(env!("CARGO_BIN_EXE_fastvpn"));
        let namespace: &Namespace = [&self.hosts.a, &self.hosts.b][number];
        command.args(["--registry", self.etcd.url(), "--quiet"]);
        command.args(["--public-ip", &HOSTS[number].to_string()]);
        command.args(["--registry-allow-prefix", "20.0.0.0/8"]);
        for (flag, name) in [
            ("--control", "control"),
            ("--subnet-file", "subnet"),
            ("--registry-cache", "cache"),
        ] {
            let path = self.path(&format!("{name}{number}"));
            let _ = std::fs::remove_file(&path);
            command.arg(flag).arg(path);
        }
        command.stdin(Stdio::null()).stdout(Stdio::null());
        namespace.spawn(command)
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
    changes: Arc<AtomicUsize>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Churn {
    fn start(site: &Site, numbers: std::ops::Range<usize>) -> Result<Self> {
        let (is_over, changes) = (Arc::<AtomicBool>::default(), Arc::<AtomicUsize>::default());
        let (over, count) = (Arc::clone(&is_over), Arc::clone(&changes));
        let mut load = site.load()?;
        let thread = thread::spawn(move || {
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
                if over.load(Relaxed) || load.write(&[load_host(number, round, 0)]).is_err() {
                    return;
                }
                count.fetch_add(1, Relaxed);
            }
        });
        Ok(Self {
            is_over,
            changes,
            thread: Some(thread),
        })
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
        let mut tunnel = site.start(0)?;
        Control::open(&site.path("control0"))?.wait_for_prefixes(count)?;
        joins.push(start.elapsed());
        tunnel.terminate(PATIENCE)?;
    }
    joins.sort();
    println!(
        "join {count} hosts, from the process's start: median {:?} of {joins:?}",
        joins[2]
    );
    let tunnel = site.start(0)?;
    let mut control = Control::open(&site.path("control0"))?;
    control.wait_for_prefixes(count)?;
    println!(
        "memory with {count} hosts: {} MB",
        rss_bytes(tunnel.pid())? / 1_000_000
    );
    // Paths to all are looked at in turns, once.
    thread::sleep(Duration::from_secs(10));
    let (start, before) = (Instant::now(), cpu_ns(tunnel.pid())?);
    thread::sleep(Duration::from_secs(20));
    let used = Duration::from_nanos(cpu_ns(tunnel.pid())? - before);
    let share = 100.0 * used.as_secs_f64() / start.elapsed().as_secs_f64();
    println!("CPU while nothing happens: {share:.2} % of a core");
    let mut load = site.load()?;
    let (mut single, mut among) = (Vec::new(), Vec::new());
    for generation in 1..=100 {
        single.push(one_change(&mut load, &mut control, generation)?);
    }
    let churn = Churn::start(&site, 100..count)?;
    let before = cpu_ns(tunnel.pid())?;
    let start = Instant::now();
    for generation in 101..=300 {
        among.push(one_change(&mut load, &mut control, generation)?);
    }
    let used = Duration::from_nanos(cpu_ns(tunnel.pid())? - before);
    let share = 100.0 * used.as_secs_f64() / start.elapsed().as_secs_f64();
    let rate = churn.changes.load(Relaxed) as f64 / start.elapsed().as_secs_f64();
    drop(churn);
    single.sort();
    among.sort();
    for (what, times) in [("alone", &single), ("among others", &among)] {
        println!(
            "one change, {what}: median {:?}, p99 {:?}",
            percentile(times, 50),
            percentile(times, 99)
        );
    }
    println!("others: {rate:.0} changes a second; CPU then: {share:.1} % of a core");
    let round = u32::MAX - 1;
    let mut at_once = Vec::new();
    for generation in [round, round + 1, round] {
        let new: Vec<_> = (0..count)
            .map(|number| load_host(number, generation, 0))
            .collect();
        let start = Instant::now();
        load.write(&new)?;
        let written = start.elapsed();
        for host in &new {
            control.wait_for(host)?;
        }
        at_once.push((start.elapsed(), written));
    }
    at_once.sort();
    println!("{count} changes at once: (all in force, of that written) {at_once:?}");
    traffic(&site, count)
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

/// What a stream loses by changes.
fn traffic(site: &Site, count: usize) -> Result<()> {
    let _far = site.start(1)?;
    let mut control = Control::open(&site.path("control1"))?;
    control.wait_for_prefixes(count)?;
    let status = control.ask(&json!({"command": "status"}))?;
    let address = status["registry"]["subnet"]
        .as_str()
        .and_then(|net| net.parse::<IpNet>().ok());
    let address = address
        .ok_or_else(|| Error::new(format!("no subnet in {status}")))?
        .addr();
    let stream = || -> Result<f64> {
        let between = Between {
            client: &site.hosts.a,
            server: &site.hosts.b,
            address,
        };
        let bulk = Bulk::new(1, BulkLimit::Time(Duration::from_secs(5)));
        let start = Instant::now();
        let report = tcp_bulk(between, bulk, &Watch::default())?;
        Ok(report.bytes as f64 * 8e-9 / start.elapsed().as_secs_f64())
    };
    stream()?;
    let mut ratios = Vec::new();
    for _ in 0..7 {
        let calm = stream()?;
        let churn = Churn::start(site, 100..count)?;
        let busy = stream()?;
        drop(churn);
        ratios.push((busy / calm, calm, busy));
    }
    ratios.sort_by(|one, other| one.0.total_cmp(&other.0));
    println!(
        "traffic beside {RATE} changes a second: median {:.3} of {ratios:.3?}",
        ratios[3].0
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
        let mut tunnel = site.start(0)?;
        let mut control = Control::open(&site.path("control0"))?;
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
