//! One sample: some traffic over a link, and what it cost the link's processes.

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use fastvpn::error::{Error, Result};
use testbed::traffic::{
    Between, Bulk, BulkLimit, Flood, FloodReport, Latency, PingPong, TransferReport, Watch,
    snmp_counter, tcp_bulk, tcp_ping_pong, udp_flood, udp_ping_pong,
};
use testbed::{Child, Pair, UNDERLAY_NAME, cpu_ns, ip, rss_bytes, rss_peak_bytes};

use crate::blast::{Blast, strangers};
use crate::targets::overlay::{CHANGE_INTERVAL, Changes};
use crate::targets::{Link, UNDERLAY_PREFIX};
use crate::traffic::{Direction, Flooder, Kind};
use crate::underlay::Slow;

/// Bytes of a ping-pong's request and of its answer.
const PING_BYTES: usize = 64;

/// How long a loading stream runs before and after what it loads.
const LOAD_MARGIN: Duration = Duration::from_millis(300);

/// How long an answer is waited for.
const PATIENCE: Duration = Duration::from_millis(100);
/// … where queues stand.
const PATIENCE_QUEUED: Duration = Duration::from_secs(2);

/// How long streams run on a slow cable before what they load.
const SLOW_MARGIN: Duration = Duration::from_millis(1500);

/// How long after a change of the cable's rate the queue may take to follow.
const CHANGE_MARGIN: Duration = Duration::from_secs(2);

/// The paced datagrams: 1000 in a second, 1 Mbit/s.
const PACED_BYTES: usize = 125;
const PACED_PPS: u64 = 1000;

/// A port of host `b` that nobody receives on.
const CLOSED_PORT: u16 = 9;

/// How often a signal is looked for while nothing is to be done.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);

const MIB: f64 = 1024.0 * 1024.0;

/// Figures of one sample, by the second part of their rows' keys.
pub type Sample = Vec<(&'static str, f64)>;

/// How samples are taken.
#[derive(Clone)]
pub struct Method {
    /// How long traffic goes on.
    pub time: Duration,
    /// Whether every byte of TCP is compared; UDP's always are.
    pub verify: bool,
    /// Set when a signal wants the run to end.
    pub stop: Arc<AtomicBool>,
}

/// A link, and how to measure it.
pub struct Stage<'a> {
    /// The hosts.
    pub pair: &'a Pair,
    /// What joins them.
    pub link: &'a Link,
    /// The port that it receives on, if it is known.
    pub port: Option<u16>,
    /// How samples are taken.
    pub method: &'a Method,
}

/// Whether the error says that bytes did not arrive as they were sent.
pub fn is_damage(error: &Error) -> bool {
    error
        .cause()
        .is_some_and(|cause| cause.kind() == std::io::ErrorKind::InvalidData)
}

fn damaged(what: &str, address: IpAddr) -> Error {
    let what = format!("{what} to {address} did not arrive as it was sent");
    Error::os(what, std::io::ErrorKind::InvalidData.into())
}

/// CPU time that the link's processes used meanwhile, at host `a` and at host
/// `b`; `None` when it has no processes.
struct Cost(Option<[f64; 2]>);

impl Cost {
    /// The figures `both`, `sender` and `receiver`: nanoseconds divided by `amount`.
    fn per(&self, amount: f64, keys: [&'static str; 3], reverse: bool) -> Sample {
        let Some([a, b]) = self.0 else {
            return Vec::new();
        };
        let (sender, receiver) = if reverse { (b, a) } else { (a, b) };
        let values = [a + b, sender, receiver].map(|ns| ns / amount);
        keys.into_iter().zip(values).collect()
    }
}

impl Stage<'_> {
    /// Takes one sample; [`Kind::SystemCalls`] has none, see [`crate::syscalls`].
    ///
    /// # Errors
    /// When traffic fails, or is damaged on its way (see [`is_damage`]).
    pub fn sample(&self, kind: Kind) -> Result<Sample> {
        let changes = || self.link.changes.as_ref().map(Changes::made).transpose();
        let before = changes()?;
        let sample = self.sample_of(kind)?;
        // A figure beside changes that nobody made would be of something else.
        let none = before.is_some() && changes()? == before;
        if none && kind != Kind::Memory && self.method.time > CHANGE_INTERVAL {
            return Err(Error::new("no prefixes changed meanwhile"));
        }
        Ok(sample)
    }

    fn sample_of(&self, kind: Kind) -> Result<Sample> {
        match kind {
            Kind::Tcp { streams, direction } => self.tcp(streams, direction),
            Kind::Udp { bytes } => self.udp(bytes),
            Kind::Ping { udp, loaded } => self.ping(udp, loaded),
            Kind::Queue {
                mbit_per_s,
                streams,
            } => self.queue(mbit_per_s, streams),
            Kind::Changing => self.changing(),
            Kind::Paced { mbit_per_s } => self.paced(mbit_per_s),
            Kind::Flooded { by } => self.flooded(by),
            Kind::Idle => self.idle(),
            Kind::Memory => self.memory(),
            Kind::SystemCalls => Ok(Vec::new()),
        }
    }

    fn watch(&self) -> Watch {
        Watch {
            stop: Arc::clone(&self.method.stop),
        }
    }

    fn between(&self) -> Between<'_> {
        Between {
            client: &self.pair.a,
            server: &self.pair.b,
            address: self.link.address,
        }
    }

    fn with_cost<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<(T, Cost)> {
        let before = self.cpu_ns()?;
        let result = work()?;
        let after = self.cpu_ns()?;
        let has_processes = self.link.processes.iter().any(|list| !list.is_empty());
        let used = [0, 1].map(|host| after[host].saturating_sub(before[host]) as f64);
        Ok((result, Cost(has_processes.then_some(used))))
    }

    fn cpu_ns(&self) -> Result<[u64; 2]> {
        let of =
            |list: &[Child]| -> Result<u64> { list.iter().map(|child| cpu_ns(child.pid())).sum() };
        let [a, b] = &self.link.processes;
        Ok([of(a)?, of(b)?])
    }

    /// TCP in one direction.
    ///
    /// # Errors
    /// As [`Stage::sample`].
    pub fn bulk(&self, streams: usize, time: Duration, reverse: bool) -> Result<TransferReport> {
        let bulk = Bulk {
            streams,
            limit: BulkLimit::Time(time),
            reverse,
            verify: self.method.verify,
        };
        let report = tcp_bulk(self.between(), bulk, &self.watch())?;
        if report.bytes == 0 {
            let address = self.link.address;
            return Err(Error::new(format!("no byte of TCP arrived at {address}")));
        }
        Ok(report)
    }

    fn tcp(&self, streams: usize, direction: Direction) -> Result<Sample> {
        let time = self.method.time;
        let one_way = |reverse| move || self.bulk(streams, time, reverse);
        let retransmitted = || -> Result<u64> {
            let hosts = [&self.pair.a, &self.pair.b].into_iter();
            hosts
                .map(|host| snmp_counter(host, "Tcp", "RetransSegs"))
                .sum()
        };
        let before = retransmitted()?;
        let (reports, cost) = self.with_cost(|| match direction {
            Direction::Forward => Ok(vec![one_way(false)()?]),
            Direction::Reverse => Ok(vec![one_way(true)()?]),
            Direction::Both => {
                let (forward, reverse) = beside(one_way(true), one_way(false));
                Ok(vec![forward?, reverse?])
            }
        })?;
        let bytes: u64 = reports.iter().map(|report| report.bytes).sum();
        let throughput: f64 = reports
            .iter()
            .map(TransferReport::gigabits_per_second)
            .sum();
        let retransmits = retransmitted()?.saturating_sub(before);
        let mut sample = vec![
            ("gbit_per_s", throughput),
            ("retransmits", retransmits as f64),
        ];
        // Nanoseconds per byte are seconds per GB.
        let keys = [
            "cpu_s_per_gb",
            "cpu_s_per_gb_sender",
            "cpu_s_per_gb_receiver",
        ];
        let mut costs = cost.per(bytes as f64, keys, direction == Direction::Reverse);
        if direction == Direction::Both {
            costs.truncate(1);
        }
        sample.append(&mut costs);
        Ok(sample)
    }

    /// UDP from host `a` to host `b`.
    ///
    /// # Errors
    /// As [`Stage::sample`].
    pub fn flood(&self, bytes: usize) -> Result<FloodReport> {
        let flood = Flood {
            bytes,
            time: self.method.time,
            rate_pps: None,
        };
        let report = udp_flood(self.between(), flood, &self.watch())?;
        if report.corrupt > 0 {
            return Err(damaged("a UDP datagram", self.link.address));
        }
        if report.delivered == 0 {
            let address = self.link.address;
            return Err(Error::new(format!("no UDP datagram arrived at {address}")));
        }
        Ok(report)
    }

    fn udp(&self, bytes: usize) -> Result<Sample> {
        let (report, cost) = self.with_cost(|| self.flood(bytes))?;
        let (offered, delivered) = (report.offered as f64, report.delivered as f64);
        let mut sample = vec![
            (
                "delivered_kpps",
                delivered / report.elapsed.as_secs_f64() / 1e3,
            ),
            ("loss_percent", (1.0 - delivered / offered) * 100.0),
        ];
        let keys = [
            "cpu_ns_per_packet",
            "cpu_ns_per_packet_sender",
            "cpu_ns_per_packet_receiver",
        ];
        sample.extend(cost.per(delivered, keys, false));
        Ok(sample)
    }

    fn ping(&self, udp: bool, loaded: bool) -> Result<Sample> {
        let test = PingPong {
            bytes: PING_BYTES,
            time: self.method.time,
            patience: PATIENCE,
        };
        let exchange = || match udp {
            false => tcp_ping_pong(self.between(), test, &self.watch()),
            true => udp_ping_pong(self.between(), test, &self.watch()),
        };
        let latency: Latency = if loaded {
            let load_time = self.method.time + 2 * LOAD_MARGIN;
            let (latency, load) = beside(
                || self.bulk(1, load_time, false),
                || {
                    thread::sleep(LOAD_MARGIN);
                    exchange()
                },
            );
            load?;
            latency?
        } else {
            exchange()?
        };
        if latency.exchanges == 0 {
            let address = self.link.address;
            return Err(Error::new(format!("{address} answered no request")));
        }
        let mut sample = vec![
            ("p50_us", latency.p50_ns as f64 / 1e3),
            ("p99_us", latency.p99_ns as f64 / 1e3),
            ("p999_us", latency.p999_ns as f64 / 1e3),
        ];
        if udp {
            sample.push(("lost", latency.lost as f64));
        }
        Ok(sample)
    }

    /// Loads a slow cable, and does something else meanwhile.
    fn beside_streams<T>(
        &self,
        mbit_per_s: u32,
        streams: usize,
        work: impl FnOnce() -> Result<T>,
    ) -> Result<(T, TransferReport, Cost)> {
        let slow = Slow::new(self.pair, mbit_per_s)?;
        self.beside_streams_on(&slow, streams, self.method.time, work)
    }

    /// The same for work that takes so long.
    fn beside_streams_on<T>(
        &self,
        _: &Slow<'_>,
        streams: usize,
        time: Duration,
        work: impl FnOnce() -> Result<T>,
    ) -> Result<(T, TransferReport, Cost)> {
        let load_time = time + SLOW_MARGIN + LOAD_MARGIN;
        let ((result, load), cost) = self.with_cost(|| {
            Ok(beside(
                || self.bulk(streams, load_time, false),
                || {
                    thread::sleep(SLOW_MARGIN);
                    work()
                },
            ))
        })?;
        Ok((result?, load?, cost))
    }

    fn queued_ping_pong(&self) -> Result<Latency> {
        let test = PingPong {
            bytes: PING_BYTES,
            time: self.method.time,
            patience: PATIENCE_QUEUED,
        };
        udp_ping_pong(self.between(), test, &self.watch())
    }

    fn changing(&self) -> Result<Sample> {
        let slow = Slow::new(self.pair, 100)?;
        let after_change_to = |mbit_per_s: u32| {
            slow.set_rate(mbit_per_s)?;
            thread::sleep(CHANGE_MARGIN);
            self.queued_ping_pong()
        };
        let work = || Ok([after_change_to(20)?, after_change_to(500)?]);
        let time = 2 * (CHANGE_MARGIN + self.method.time);
        let ([at_20, at_500], ..) = self.beside_streams_on(&slow, 8, time, work)?;
        let ms = |ns: u64| ns as f64 / 1e6;
        Ok(vec![
            ("p50_ms_20m", ms(at_20.p50_ns)),
            ("p99_ms_20m", ms(at_20.p99_ns)),
            ("p50_ms_500m", ms(at_500.p50_ns)),
            ("p99_ms_500m", ms(at_500.p99_ns)),
            ("lost", (at_20.lost + at_500.lost) as f64),
        ])
    }

    fn queue(&self, mbit_per_s: u32, streams: usize) -> Result<Sample> {
        let ping = || self.queued_ping_pong();
        let (latency, load, cost) = self.beside_streams(mbit_per_s, streams, ping)?;
        let mut sample = vec![
            ("p50_ms", latency.p50_ns as f64 / 1e6),
            ("p99_ms", latency.p99_ns as f64 / 1e6),
            ("lost", latency.lost as f64),
            ("gbit_per_s", load.gigabits_per_second()),
        ];
        let keys = [
            "cpu_s_per_gb",
            "cpu_s_per_gb_sender",
            "cpu_s_per_gb_receiver",
        ];
        sample.extend(cost.per(load.bytes as f64, keys, false).first());
        Ok(sample)
    }

    fn paced(&self, mbit_per_s: u32) -> Result<Sample> {
        let flood = Flood {
            bytes: PACED_BYTES,
            time: self.method.time,
            rate_pps: Some(PACED_PPS),
        };
        let pace = || udp_flood(self.between(), flood, &self.watch());
        let (report, ..) = self.beside_streams(mbit_per_s, 8, pace)?;
        if report.corrupt > 0 {
            return Err(damaged("a UDP datagram", self.link.address));
        }
        let delivered = report.delivered as f64 / report.offered as f64;
        Ok(vec![
            ("loss_percent", (1.0 - delivered) * 100.0),
            ("jitter_p99_ms", report.jitter_p99_ns as f64 / 1e6),
        ])
    }

    /// Throughput beside a flood, and the ratio to that beside one to a closed port; nothing
    /// where the port is not known, or the key that the flood is for.
    fn flooded(&self, by: Flooder) -> Result<Sample> {
        let Some((port, flood)) = self.port.zip(Blast::new(by, self.link.public_key.as_ref()))
        else {
            return Ok(Vec::new());
        };
        let beside_flood_to = |port: u16| -> Result<f64> {
            let done = AtomicBool::new(false);
            let (report, flood) = beside(
                || flood.send(&self.pair.a, port, &done),
                || {
                    thread::sleep(LOAD_MARGIN);
                    let report = self.bulk(1, self.method.time, false);
                    done.store(true, Ordering::Relaxed);
                    report
                },
            );
            flood?;
            Ok(report?.gigabits_per_second())
        };
        for stranger in strangers() {
            let net = format!("{stranger}/{UNDERLAY_PREFIX} dev {UNDERLAY_NAME}");
            ip(&self.pair.a, &format!("address replace {net}"))?;
        }
        let (closed, open) = (beside_flood_to(CLOSED_PORT)?, beside_flood_to(port)?);
        Ok(vec![("ratio", open / closed), ("gbit_per_s", open)])
    }

    fn idle(&self) -> Result<Sample> {
        let start = Instant::now();
        let ((), cost) = self.with_cost(|| {
            while start.elapsed() < self.method.time {
                if self.method.stop.load(Ordering::Relaxed) {
                    return Err(Error::new("stopped"));
                }
                thread::sleep(LOOK_INTERVAL);
            }
            Ok(())
        })?;
        let elapsed_ns = start.elapsed().as_nanos() as f64;
        let percent = |[a, b]: [f64; 2]| ("cpu_percent", (a + b) / elapsed_ns * 100.0);
        Ok(cost.0.map(percent).into_iter().collect())
    }

    fn memory(&self) -> Result<Sample> {
        let mut largest: Option<(u64, u64)> = None;
        for processes in &self.link.processes {
            let (mut now, mut peak) = (0, 0);
            for process in processes {
                now += rss_bytes(process.pid())?;
                peak += rss_peak_bytes(process.pid())?;
            }
            if !processes.is_empty() {
                largest = largest.max(Some((now, peak)));
            }
        }
        Ok(largest.map_or_else(Vec::new, |(now, peak)| {
            vec![
                ("rss_mib", now as f64 / MIB),
                ("rss_peak_mib", peak as f64 / MIB),
            ]
        }))
    }
}

/// Runs `other` on a thread of its own beside `main`; gives main's result first.
fn beside<M, O: Send>(other: impl FnOnce() -> O + Send, main: impl FnOnce() -> M) -> (M, O) {
    thread::scope(|scope| {
        let other = scope.spawn(other);
        let main = main();
        let other = other
            .join()
            .unwrap_or_else(|payload| std::panic::resume_unwind(payload));
        (main, other)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn damage_is_told_from_failure() {
        let address = IpAddr::from([10, 0, 0, 1]);
        let error = damaged("a TCP stream", address);
        assert!(is_damage(&error), "{error}");
        assert!(error.to_string().contains("10.0.0.1"), "{error}");
        assert!(!is_damage(&Error::new("stopped")));
        assert!(!is_damage(&Error::os(
            "TCP transfer",
            std::io::ErrorKind::TimedOut.into()
        )));
    }

    #[test]
    fn cost_goes_to_the_end_that_sends() {
        let keys = ["both", "sender", "receiver"];
        let cost = Cost(Some([30.0, 10.0]));
        let forward = [("both", 20.0), ("sender", 15.0), ("receiver", 5.0)];
        assert_eq!(cost.per(2.0, keys, false), forward);
        let reverse = [("both", 20.0), ("sender", 5.0), ("receiver", 15.0)];
        assert_eq!(cost.per(2.0, keys, true), reverse);
        assert!(Cost(None).per(2.0, keys, false).is_empty());
    }
}
