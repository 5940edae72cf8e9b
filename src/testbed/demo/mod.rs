//! `fastvpn demo`: two hosts in one, a tunnel between them, and what it is worth.
//!
//! 1. Two network namespaces joined by a veth pair stand for two hosts.
//! 2. In each of them this very program runs as it would on a real host.
//! 3. Pings go across in both directions, in several sizes.
//! 4. TCP goes through the tunnel and every byte is compared; then the same
//!    over the bare veth pair, which is what the tunnel has to be measured by.
//! 5. Small pings go back and forth over both.
//!
//! Nothing is left behind: see [`crate::testbed`]. What the demo does goes to
//! standard error.

use std::fs::{File, Permissions};
use std::io::Write;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use nix::sys::memfd::{MFdFlags, memfd_create};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use super::traffic::{Between, Pinger, Transfer, TransferReport, Watch, connect, ping};
use super::{Child, Pair, enter_user_namespace_if_needed, pair};
use crate::error::{Error, Result};
use crate::wire::wireguard::keys::{PrivateKey, PublicKey};

/// The two hosts' addresses, and those that the tunnel derives from them.
const UNDERLAY: [Ipv4Addr; 2] = [
    Ipv4Addr::new(10, 211, 55, 122),
    Ipv4Addr::new(10, 211, 55, 123),
];
const TUNNEL: [Ipv4Addr; 2] = [
    Ipv4Addr::new(10, 244, 55, 122),
    Ipv4Addr::new(10, 244, 55, 123),
];
const UNDERLAY_PREFIX: u8 = 24;
const UNDERLAY_MTU: u32 = 1500;
const PORT: u16 = 8285;

/// How long the tunnel may take to answer a ping.
const ANSWER_MAX: Duration = Duration::from_secs(10);
const PING_TIMEOUT: Duration = Duration::from_millis(200);
const PING_PAUSE: Duration = Duration::from_millis(50);

/// How long a tunnel end may take to end after SIGTERM.
const GRACE: Duration = Duration::from_secs(2);

/// Payloads of the pings that must come back: one usual, one that just fills a
/// packet, one in many fragments.
const PING_BYTES: [usize; 3] = [56, 1400, 20_000];

/// How long small pings are sent, one after another, to see how long they take.
const LATENCY_TIME: Duration = Duration::from_secs(2);
const LATENCY_BYTES: usize = 64;

/// Options of `fastvpn demo`.
#[derive(Debug, Clone, clap::Args)]
pub struct DemoOptions {
    /// Worker threads, each with a TUN queue, of each tunnel end
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=256))]
    pub queues: u16,
    /// TCP connections that carry the bulk data in parallel
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=256))]
    pub streams: u16,
    /// How long each of the two TCP transfers lasts, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=3600))]
    pub seconds: u16,
    /// Encrypt and authenticate (WireGuard)
    #[arg(long)]
    pub encrypted: bool,
    /// Show all that the two tunnel ends log, not only warnings and errors
    #[arg(long)]
    pub verbose: bool,
}

/// What the demo has measured.
pub struct Measured {
    /// Through the tunnel.
    pub tunnel: Figures,
    /// Over the veth pair alone.
    pub veth: Figures,
    /// CPU time of the tunnel's two ends together while TCP went through.
    pub cpu_seconds_per_gb: f64,
}

/// What was measured on one way.
pub struct Figures {
    /// Payload of TCP in 10⁹ bits per second.
    pub gigabits_per_second: f64,
    /// Half of the pings took at most this, in microseconds.
    pub ping_p50_us: f64,
    /// All but one in a hundred took at most this.
    pub ping_p99_us: f64,
}

/// Runs the demo until its end, SIGINT, SIGTERM or SIGHUP.
///
/// Call it while the process has one thread, or as root.
///
/// # Errors
/// When rights are missing, a tunnel end dies or does not answer, bytes do not
/// arrive as they were sent, or a signal interrupts.
pub fn run(options: &DemoOptions) -> Result<Measured> {
    enter_user_namespace_if_needed()?;
    let program = std::env::current_exe()
        .map_err(|cause| Error::os("cannot find the path of this program", cause))?;
    let keys = options.encrypted.then(|| [Keys::make(), Keys::make()]);
    let keys = keys.map(|[a, b]| Ok([a?, b?])).transpose()?;
    let commands = [('a', 0, 1), ('b', 1, 0)].map(|(name, own, peer)| {
        let mut flags = format!("--queues {}", options.queues);
        flags += &match &keys {
            None => format!(" --peer {}:{PORT}", UNDERLAY[peer]),
            Some(keys) => format!(
                " --private-key {} --peer {}@{}:{PORT}",
                keys[own].path(),
                keys[peer].public,
                UNDERLAY[peer]
            ),
        };
        if !options.verbose {
            flags += " --quiet";
        }
        say(&format!("{name}: fastvpn {flags}"));
        let mut command = Command::new(&program);
        command.args(flags.split(' '));
        command
    });
    let watch = Watch::default();
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        signal_hook::flag::register(signal, Arc::clone(&watch.stop))
            .map_err(|cause| Error::os(format!("cannot catch signal {signal}"), cause))?;
    }
    play(commands, TUNNEL, options, watch)
}

/// A tunnel end's keys: the private one in a file that has no name, which goes with the
/// programs that have it open.
struct Keys {
    file: File,
    public: PublicKey,
}

impl Keys {
    fn make() -> Result<Self> {
        let private = PrivateKey::generate();
        let write = || {
            // It stays open in the programs that are started.
            let mut file = File::from(memfd_create("private-key", MFdFlags::empty())?);
            file.set_permissions(Permissions::from_mode(0o600))?;
            file.write_all(private.to_base64().as_bytes())?;
            Ok(file)
        };
        let cannot = |error| Error::os("cannot make a key for a tunnel end", error);
        Ok(Self {
            file: write().map_err(cannot)?,
            public: private.public(),
        })
    }

    /// For a program that has been started by this one.
    fn path(&self) -> String {
        format!("/proc/self/fd/{}", self.file.as_raw_fd())
    }
}

/// The demo with any two programs as the tunnel's ends.
fn play(
    commands: [Command; 2],
    tunnel: [Ipv4Addr; 2],
    options: &DemoOptions,
    watch: Watch,
) -> Result<Measured> {
    let [net_a, net_b] = UNDERLAY.map(|ip| IpNet::new_assert(ip.into(), UNDERLAY_PREFIX));
    let pair = pair(&[(net_a, net_b)], UNDERLAY_MTU)?;
    let mut ends = Vec::new();
    for (namespace, mut command) in [&pair.a, &pair.b].into_iter().zip(commands) {
        // Ctrl-C is for the demo alone, which then ends its programs in order.
        command.stdin(Stdio::null()).process_group(0);
        ends.push(namespace.spawn(command)?);
    }
    let mut stage = Stage {
        pair: &pair,
        ends,
        watch,
        options,
        tunnel: tunnel.map(IpAddr::from),
    };
    let measured = stage.perform();
    // Whether it went well or not; one that does not end is killed.
    for end in &mut stage.ends {
        end.terminate(GRACE)?;
    }
    measured
}

/// The two hosts with the tunnel between them.
struct Stage<'a> {
    pair: &'a Pair,
    ends: Vec<Child>,
    watch: Watch,
    options: &'a DemoOptions,
    tunnel: [IpAddr; 2],
}

impl Stage<'_> {
    fn perform(&mut self) -> Result<Measured> {
        self.ping_across()?;
        let (tunnel, veth) = (self.tunnel[1], UNDERLAY[1].into());
        let cpu_before = self.cpu_seconds()?;
        let through_tunnel = self.transfer("tunnel", tunnel)?;
        let cpu_seconds = self.cpu_seconds()? - cpu_before;
        let over_veth = self.transfer("bare veth", veth)?;
        Ok(Measured {
            tunnel: self.figures("tunnel", tunnel, &through_tunnel)?,
            veth: self.figures("bare veth", veth, &over_veth)?,
            cpu_seconds_per_gb: cpu_seconds / (through_tunnel.bytes as f64 / 1e9),
        })
    }

    /// Waits until pings of all sizes are answered in both directions.
    fn ping_across(&mut self) -> Result<()> {
        for bytes in PING_BYTES {
            for (from, to) in [
                (&self.pair.a, self.tunnel[1]),
                (&self.pair.b, self.tunnel[0]),
            ] {
                let start = Instant::now();
                let time = loop {
                    self.check()?;
                    match ping(from, to, bytes, PING_TIMEOUT) {
                        Ok(time) => break time,
                        Err(error) if start.elapsed() > ANSWER_MAX => return Err(error),
                        Err(_) => thread::sleep(PING_PAUSE),
                    }
                };
                let microseconds = time.as_micros();
                say(&format!("ping {to}, {bytes} bytes: {microseconds} µs"));
            }
        }
        Ok(())
    }

    /// Sends TCP from a to `address` at b.
    fn transfer(&mut self, name: &str, address: IpAddr) -> Result<TransferReport> {
        let transfer = Transfer {
            time_max: Duration::from_secs(self.options.seconds.into()),
            bytes_max: u64::MAX,
            verify: true,
        };
        let between = Between {
            client: &self.pair.a,
            server: &self.pair.b,
            address,
        };
        let connections = (0..self.options.streams).map(|_| connect(between));
        let result = connections
            .collect::<std::io::Result<Vec<_>>>()
            .and_then(|connections| transfer.run(&connections, &self.watch));
        // Why it was stopped says more than that it was stopped.
        self.check()?;
        let report = result.map_err(|cause| Error::os(format!("TCP over {name}"), cause))?;
        let (gigabytes, seconds) = (report.bytes as f64 / 1e9, report.elapsed.as_secs_f64());
        say(&format!(
            "TCP over {name}: {gigabytes:.2} GB in {seconds:.1} s, every byte intact"
        ));
        Ok(report)
    }

    /// What a transfer and pings to `address` at b come to.
    fn figures(&mut self, name: &str, address: IpAddr, report: &TransferReport) -> Result<Figures> {
        let mut pinger = Pinger::open(&self.pair.a, address)?;
        let mut times = Vec::new();
        let start = Instant::now();
        while start.elapsed() < LATENCY_TIME {
            self.check()?;
            // A lost one measures nothing.
            times.extend(pinger.ping(LATENCY_BYTES, PING_TIMEOUT).ok());
        }
        times.sort_unstable();
        let microseconds = |percent: usize| {
            let time = times.get(times.len() * percent / 100);
            time.map_or(f64::NAN, |time| time.as_secs_f64() * 1e6)
        };
        say(&format!("{} pings over {name}", times.len()));
        Ok(Figures {
            gigabits_per_second: report.gigabits_per_second(),
            ping_p50_us: microseconds(50),
            ping_p99_us: microseconds(99),
        })
    }

    /// Whether the show can go on.
    fn check(&mut self) -> Result<()> {
        self.watch
            .check()
            .map_err(|error| Error::new(error.to_string()))?;
        for (name, end) in ['a', 'b'].into_iter().zip(&mut self.ends) {
            if let Some(status) = end.try_wait()? {
                let what = format!("tunnel end {name} ended by itself: {status}");
                return Err(Error::new(what));
            }
        }
        Ok(())
    }

    fn cpu_seconds(&self) -> Result<f64> {
        let times = self.ends.iter().map(Child::cpu_time);
        Ok(times.sum::<Result<Duration>>()?.as_secs_f64())
    }
}

/// Says a line on standard error. Nobody listening is no reason to stop.
fn say(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

#[cfg(test)]
mod tests;
