//! `fastvpn demo`: two hosts in one, a tunnel between them, and what it is worth.
//!
//! 1. Two network namespaces joined by a veth pair stand for two hosts.
//! 2. In each of them this very program runs as it would on a real host.
//! 3. Pings go across in both directions, in several sizes.
//! 4. TCP goes through the tunnel and every byte is compared; then the same
//!    over the bare veth pair, which is what the tunnel has to be measured by.
//! 5. Small requests go back and forth over both.
//! 6. A table says what came out.
//!
//! Nothing is left behind: see [`crate::testbed`]. What the demo does goes to
//! standard error, the table to standard output.

mod endpoint;
mod progress;
mod table;

use std::net::{IpAddr, Ipv4Addr};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use ipnet::{IpNet, Ipv4Net};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use crate::error::{Error, Result};
use crate::testbed::traffic::{
    Between, Bulk, BulkLimit, BulkReport, Latency, PingPong, Watch, ping, ping_up_to, tcp_bulk,
    tcp_ping_pong,
};
use crate::testbed::{self, Namespace, Pair, enter_user_namespace_if_needed};
use endpoint::Endpoint;
use progress::{Progress, say};
use table::{Measured, table};

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

/// How long a tunnel end may take to end after SIGTERM.
const GRACE: Duration = Duration::from_secs(2);

/// How often signals and the tunnel's ends are looked at.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);

/// Payloads of the pings that must come back: one usual, one that just fills a
/// packet, one in many fragments.
const PING_BYTES: [usize; 3] = [56, 1400, 20_000];
const PING_TIMEOUT: Duration = Duration::from_secs(1);
const PING_ATTEMPTS: usize = 3;

const PING_PONG: PingPong = PingPong {
    bytes: 64,
    time: Duration::from_secs(2),
};

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

/// Runs the demo until its end, SIGINT, SIGTERM or SIGHUP.
///
/// Call it while the process has one thread, or as root.
///
/// # Errors
/// When rights are missing, a tunnel end dies or does not answer, bytes do not
/// arrive as they were sent, or a signal interrupts.
pub fn run(options: DemoOptions) -> Result<()> {
    enter_user_namespace_if_needed()?;
    let program = std::env::current_exe()
        .map_err(|cause| Error::os("cannot find the path of this program", cause))?;
    let commands = UNDERLAY.map(|own| {
        let peer = UNDERLAY[usize::from(own == UNDERLAY[0])];
        let mut command = Command::new(&program);
        command
            .args(["--queues", &options.queues.to_string()])
            .args(["--peer", &format!("{peer}:{PORT}")]);
        command
    });
    let interrupted = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        signal_hook::flag::register(signal, Arc::clone(&interrupted))
            .map_err(|cause| Error::os(format!("cannot catch signal {signal}"), cause))?;
    }
    play(commands, TUNNEL, &options, interrupted)
}

/// The demo with any two programs as the tunnel's ends.
fn play(
    commands: [Command; 2],
    tunnel: [Ipv4Addr; 2],
    options: &DemoOptions,
    interrupted: Arc<AtomicBool>,
) -> Result<()> {
    let [underlay_a, underlay_b] = UNDERLAY.map(underlay_network);
    let pair = testbed::pair(&[(underlay_a?, underlay_b?)], UNDERLAY_MTU)?;
    let [command_a, command_b] = commands;
    say(&format!("a: {}", words(&command_a)));
    say(&format!("b: {}", words(&command_b)));
    let ends = vec![
        Endpoint::start(&pair.a, 'a', command_a, options.verbose)?,
        Endpoint::start(&pair.b, 'b', command_b, options.verbose)?,
    ];
    let mut stage = Stage {
        pair: &pair,
        ends,
        interrupted,
        options,
        tunnel: tunnel.map(IpAddr::from),
    };
    let result = stage.perform();
    // Whether it went well or not, the ends are asked to end, and both at once.
    let stopped = stage.clear();
    let results = result.and_then(|results| stopped.map(|()| results))?;
    progress::print(&results.table);
    if !results.intact {
        return Err(Error::new("bytes did not arrive as they were sent"));
    }
    Ok(())
}

struct Results {
    table: String,
    intact: bool,
}

/// The two hosts with the tunnel between them.
struct Stage<'a> {
    pair: &'a Pair,
    ends: Vec<Endpoint>,
    interrupted: Arc<AtomicBool>,
    options: &'a DemoOptions,
    tunnel: [IpAddr; 2],
}

impl Stage<'_> {
    fn perform(&mut self) -> Result<Results> {
        let result = self.perform_acts();
        if result.is_err() && !self.interrupted() {
            for end in &mut self.ends {
                end.show_output();
            }
        }
        result
    }

    fn perform_acts(&mut self) -> Result<Results> {
        self.wait_until_ready()?;
        self.ping_across()?;
        let (tunnel, bare) = (self.tunnel[1], UNDERLAY[1].into());

        let cpu_before = self.cpu_seconds()?;
        let through_tunnel = self.transfer("tunnel", tunnel)?;
        let cpu_seconds = self.cpu_seconds()? - cpu_before;
        let over_veth = self.transfer("bare veth", bare)?;
        let [tunnel_latency, veth_latency] = [("tunnel", tunnel), ("bare veth", bare)]
            .map(|(name, address)| self.ping_pong(name, address));

        Ok(Results {
            intact: through_tunnel.intact && over_veth.intact,
            table: table(
                &Measured {
                    bulk: through_tunnel,
                    latency: tunnel_latency?,
                    cpu_seconds_per_gb: Some(cpu_seconds / (through_tunnel.bytes as f64 / 1e9)),
                },
                &Measured {
                    bulk: over_veth,
                    latency: veth_latency?,
                    cpu_seconds_per_gb: None,
                },
            ),
        })
    }

    fn wait_until_ready(&mut self) -> Result<()> {
        let start = Instant::now();
        loop {
            self.check()?;
            match ping(&self.pair.a, self.tunnel[1], 8, READY_PING_TIMEOUT) {
                Ok(_) => break,
                Err(error) if start.elapsed() > READY_MAX => {
                    return Err(Error::new(format!(
                        "the tunnel was not there after {} s: {error}",
                        READY_MAX.as_secs()
                    )));
                }
                Err(_) => thread::sleep(LOOK_INTERVAL),
            }
        }
        let milliseconds = start.elapsed().as_millis();
        say(&format!("tunnel answers after {milliseconds} ms"));
        Ok(())
    }

    fn ping_across(&mut self) -> Result<()> {
        let ways: [(&Namespace, IpAddr); 2] = [
            (&self.pair.a, self.tunnel[1]),
            (&self.pair.b, self.tunnel[0]),
        ];
        for (from, to) in ways {
            for bytes in PING_BYTES {
                self.check()?;
                let time = ping_up_to(PING_ATTEMPTS, from, to, bytes, PING_TIMEOUT)?;
                let microseconds = time.as_micros();
                say(&format!("ping {to}, {bytes} bytes: {microseconds} µs"));
            }
        }
        Ok(())
    }

    fn transfer(&mut self, name: &str, address: IpAddr) -> Result<BulkReport> {
        let bulk = Bulk {
            streams: usize::from(self.options.streams),
            limit: BulkLimit::Time(Duration::from_secs(self.options.seconds.into())),
        };
        let mut progress = Progress::new(format!("TCP over {name}"));
        let report = self.supervise(&mut progress, address, |between, watch| {
            tcp_bulk(between, bulk, watch)
        })?;
        say(&format!(
            "TCP over {name}: {:.2} GB in {:.1} s, {}",
            report.bytes as f64 / 1e9,
            report.elapsed.as_secs_f64(),
            if report.intact {
                "every byte intact"
            } else {
                "BYTES DAMAGED"
            }
        ));
        Ok(report)
    }

    fn ping_pong(&mut self, name: &str, address: IpAddr) -> Result<Latency> {
        let latency = self.supervise(&mut Progress::silent(), address, |between, watch| {
            tcp_ping_pong(between, PING_PONG, watch)
        })?;
        let exchanges = latency.exchanges;
        say(&format!("ping-pong over {name}: {exchanges} exchanges"));
        Ok(latency)
    }

    /// Runs traffic from a to `address` at b, and stops it when a signal comes
    /// or a tunnel end dies.
    fn supervise<T: Send>(
        &mut self,
        progress: &mut Progress,
        address: IpAddr,
        traffic: impl FnOnce(Between<'_>, &Watch) -> Result<T> + Send,
    ) -> Result<T> {
        let watch = Watch::default();
        let between = Between {
            client: &self.pair.a,
            server: &self.pair.b,
            address,
        };
        let (result, checked) = thread::scope(|scope| {
            let running = scope.spawn(|| traffic(between, &watch));
            let mut checked = Ok(());
            while !running.is_finished() {
                progress.show(watch.bytes.load(Ordering::Relaxed));
                if checked.is_ok() {
                    checked = self.check();
                }
                if checked.is_err() {
                    watch.stop.store(true, Ordering::Relaxed);
                }
                thread::sleep(LOOK_INTERVAL);
            }
            let result = running
                .join()
                .unwrap_or_else(|payload| std::panic::resume_unwind(payload));
            (result, checked)
        });
        progress.clear();
        // Why it was stopped says more than that it was stopped.
        checked.and(result)
    }

    fn check(&mut self) -> Result<()> {
        if self.interrupted() {
            return Err(Error::new("interrupted"));
        }
        self.ends.iter_mut().try_for_each(Endpoint::check)
    }

    fn interrupted(&self) -> bool {
        self.interrupted.load(Ordering::Relaxed)
    }

    fn cpu_seconds(&self) -> Result<f64> {
        self.ends.iter().map(Endpoint::cpu_seconds).sum()
    }

    fn clear(&mut self) -> Result<()> {
        self.ends.iter().for_each(Endpoint::ask_to_end);
        self.ends.iter_mut().try_for_each(|end| end.end(GRACE))
    }
}

fn underlay_network(address: Ipv4Addr) -> Result<IpNet> {
    Ipv4Net::new(address, UNDERLAY_PREFIX)
        .map(IpNet::from)
        .map_err(|error| Error::new(format!("{address}/{UNDERLAY_PREFIX}: {error}")))
}

/// A command as one would type it.
fn words(command: &Command) -> String {
    let program = std::path::Path::new(command.get_program());
    let name = program.file_name().unwrap_or(program.as_os_str());
    std::iter::once(name)
        .chain(command.get_args())
        .map(|word| word.to_string_lossy())
        .collect::<Vec<_>>()
        .join(" ")
}

#[cfg(test)]
mod tests;
