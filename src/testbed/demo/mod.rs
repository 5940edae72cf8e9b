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

mod end;

use std::io::Write;
use std::net::{IpAddr, Ipv4Addr};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use super::namespace::join;
use super::traffic::{
    Between, Bulk, BulkLimit, BulkReport, Pinger, Watch, ping, ping_up_to, tcp_bulk,
};
use super::{Pair, enter_user_namespace_if_needed, pair};
use crate::error::{Error, Result};
use end::End;

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

/// How long the tunnel may take to answer its first ping.
const READY_MAX: Duration = Duration::from_secs(10);
const READY_PING_TIMEOUT: Duration = Duration::from_millis(200);

/// How often signals and the tunnel's ends are checked.
const CHECK_INTERVAL: Duration = Duration::from_millis(50);

/// How often the rate of a transfer is shown.
const RATE_INTERVAL: Duration = Duration::from_secs(1);

/// Payloads of the pings that must come back: one usual, one that just fills a
/// packet, one in many fragments.
const PING_BYTES: [usize; 3] = [56, 1400, 20_000];
const PING_TIMEOUT: Duration = Duration::from_secs(1);
const PING_ATTEMPTS: usize = 3;

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
    /// Show what the two tunnel ends print while they run
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
    let commands = [1, 0].map(|peer| {
        let mut command = Command::new(&program);
        command
            .args(["--queues", &options.queues.to_string()])
            .args(["--peer", &format!("{}:{PORT}", UNDERLAY[peer])]);
        command
    });
    let interrupted = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        signal_hook::flag::register(signal, Arc::clone(&interrupted))
            .map_err(|cause| Error::os(format!("cannot catch signal {signal}"), cause))?;
    }
    play(commands, TUNNEL, options, interrupted)
}

/// The demo with any two programs as the tunnel's ends.
fn play(
    commands: [Command; 2],
    tunnel: [Ipv4Addr; 2],
    options: &DemoOptions,
    interrupted: Arc<AtomicBool>,
) -> Result<Measured> {
    let [net_a, net_b] = UNDERLAY.map(|ip| IpNet::new_assert(ip.into(), UNDERLAY_PREFIX));
    let pair = pair(&[(net_a, net_b)], UNDERLAY_MTU)?;
    let [command_a, command_b] = commands;
    let ends = vec![
        End::start(&pair.a, 'a', command_a, options.verbose)?,
        End::start(&pair.b, 'b', command_b, options.verbose)?,
    ];
    let mut stage = Stage {
        pair: &pair,
        ends,
        interrupted,
        options,
        tunnel: tunnel.map(IpAddr::from),
    };
    let measured = stage.perform();
    if measured.is_err() && !stage.interrupted() {
        stage.ends.iter_mut().for_each(End::show_output);
    }
    // Whether it went well or not, the ends are asked to end, and both at once.
    stage.ends.iter().for_each(End::ask_to_end);
    let ended = stage.ends.iter_mut().try_for_each(End::end);
    measured.and_then(|measured| ended.map(|()| measured))
}

/// The two hosts with the tunnel between them.
struct Stage<'a> {
    pair: &'a Pair,
    ends: Vec<End>,
    interrupted: Arc<AtomicBool>,
    options: &'a DemoOptions,
    tunnel: [IpAddr; 2],
}

impl Stage<'_> {
    fn perform(&mut self) -> Result<Measured> {
        self.wait_until_ready()?;
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

    fn wait_until_ready(&mut self) -> Result<()> {
        let start = Instant::now();
        loop {
            self.check()?;
            match ping(&self.pair.a, self.tunnel[1], 8, READY_PING_TIMEOUT) {
                Ok(_) => break,
                Err(error) if start.elapsed() > READY_MAX => {
                    let seconds = READY_MAX.as_secs();
                    let what = format!("the tunnel was not there after {seconds} s: {error}");
                    return Err(Error::new(what));
                }
                Err(_) => thread::sleep(CHECK_INTERVAL),
            }
        }
        let milliseconds = start.elapsed().as_millis();
        say(&format!("tunnel answers after {milliseconds} ms"));
        Ok(())
    }

    fn ping_across(&mut self) -> Result<()> {
        for bytes in PING_BYTES {
            for (from, to) in [(&self.pair.a, 1), (&self.pair.b, 0)] {
                let to = self.tunnel[to];
                let time = ping_up_to(PING_ATTEMPTS, from, to, bytes, PING_TIMEOUT)?;
                let microseconds = time.as_micros();
                say(&format!("ping {to}, {bytes} bytes: {microseconds} µs"));
            }
            self.check()?;
        }
        Ok(())
    }

    /// Sends TCP from a to `address` at b; stops when a signal comes or a tunnel
    /// end dies.
    fn transfer(&mut self, name: &str, address: IpAddr) -> Result<BulkReport> {
        let time = Duration::from_secs(self.options.seconds.into());
        let bulk = Bulk::new(self.options.streams.into(), BulkLimit::Time(time));
        let between = Between {
            client: &self.pair.a,
            server: &self.pair.b,
            address,
        };
        let watch = Watch::default();
        let (mut shown_at, mut shown_bytes) = (Instant::now(), 0);
        let mut checked = Ok(());
        let result = thread::scope(|scope| {
            let running = scope.spawn(|| tcp_bulk(between, bulk, &watch));
            while !running.is_finished() {
                thread::sleep(CHECK_INTERVAL);
                if checked.is_ok() {
                    checked = self.check();
                }
                watch.stop.store(checked.is_err(), Ordering::Relaxed);
                let since = shown_at.elapsed();
                if since >= RATE_INTERVAL {
                    let bytes = watch.bytes.load(Ordering::Relaxed);
                    let rate = (bytes - shown_bytes) as f64 * 8e-9 / since.as_secs_f64();
                    say(&format!("TCP over {name}: {rate:.1} Gbit/s"));
                    (shown_at, shown_bytes) = (Instant::now(), bytes);
                }
            }
            join(running)
        });
        // Why it was stopped says more than that it was stopped.
        checked?;
        let report = result?;
        if !report.intact {
            let what = format!("TCP over {name}: bytes did not arrive as they were sent");
            return Err(Error::new(what));
        }
        let (gigabytes, seconds) = (report.bytes as f64 / 1e9, report.elapsed.as_secs_f64());
        say(&format!(
            "TCP over {name}: {gigabytes:.2} GB in {seconds:.1} s, every byte intact"
        ));
        Ok(report)
    }

    /// What a transfer and pings to `address` at b come to.
    fn figures(&mut self, name: &str, address: IpAddr, report: &BulkReport) -> Result<Figures> {
        let mut pinger = Pinger::open(&self.pair.a, address)?;
        let mut times = Vec::new();
        let start = Instant::now();
        let mut checked_at = start;
        while start.elapsed() < LATENCY_TIME {
            // A lost one is no measure of time.
            times.extend(pinger.ping(LATENCY_BYTES, PING_TIMEOUT).ok());
            if checked_at.elapsed() >= CHECK_INTERVAL {
                self.check()?;
                checked_at = Instant::now();
            }
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
        if self.interrupted() {
            return Err(Error::new("interrupted"));
        }
        self.ends.iter_mut().try_for_each(End::check)
    }

    fn interrupted(&self) -> bool {
        self.interrupted.load(Ordering::Relaxed)
    }

    fn cpu_seconds(&self) -> Result<f64> {
        let times = self.ends.iter().map(End::cpu_time);
        Ok(times.sum::<Result<Duration>>()?.as_secs_f64())
    }
}

/// Says a line on standard error. Nobody listening is no reason to stop.
fn say(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

#[cfg(test)]
mod tests;
