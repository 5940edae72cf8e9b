//! UDP packets as fast as they go, or at a given rate.

use std::io;
use std::io::{IoSlice, IoSliceMut};
use std::net::UdpSocket;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use fastvpn::error::Result;
use fastvpn::testbed::result_of;
use fastvpn::testbed::traffic::{is_timeout, pattern};
use nix::errno::Errno;
use nix::sys::socket::{
    MsgFlags, MultiHeaders, recvmmsg, sendmmsg, setsockopt, sockopt::RcvBufForce,
};
use socket2::SockRef;

use super::{Between, Watch, failed, udp_pair};

/// Each datagram begins with its number.
const NUMBER_BYTES: usize = 8;

/// Datagrams per system call.
const BATCH: usize = 64;

/// The sink's receive buffer: it must not be the first to drop.
const SINK_BYTES: usize = 16 * 1024 * 1024;

/// How long the sink waits for stragglers once all is sent.
const QUIET: Duration = Duration::from_millis(200);

/// A flood to be made.
#[derive(Debug, Clone, Copy)]
pub struct Flood {
    /// Bytes of UDP payload, at least 8.
    pub bytes: usize,
    /// How long to send.
    pub time: Duration,
    /// Datagrams per second, or as many as go.
    pub rate_pps: Option<u64>,
}

/// A flood that was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct FloodReport {
    /// Datagrams that the sender's kernel took.
    pub offered: u64,
    /// Datagrams that arrived.
    pub delivered: u64,
    /// Of these, how many came after one that was sent later.
    pub reordered: u64,
    /// Of these, how many were changed.
    pub corrupt: u64,
    /// How far the times between two arrivals were from those between two sends, all
    /// but one in a hundred at the most, in nanoseconds; 0 unless a rate was given.
    pub jitter_p99_ns: u64,
    /// How long sending took.
    pub elapsed: Duration,
}

/// Floods the server with UDP datagrams.
///
/// # Errors
/// When a socket fails or [`Watch::stop`] is set. Loss is no error but a report.
pub fn udp_flood(between: Between<'_>, flood: Flood, watch: &Watch) -> Result<FloodReport> {
    let run = || {
        let (source, sink) = udp_pair(between)?;
        if setsockopt(&sink, RcvBufForce, &SINK_BYTES).is_err() {
            // Without CAP_NET_ADMIN: as much as net.core.rmem_max allows.
            SockRef::from(&sink).set_recv_buffer_size(SINK_BYTES)?;
        }
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            let receiver = scope.spawn(|| drain(&sink, flood, &done));
            let sent = send(&source, flood, watch);
            thread::sleep(QUIET);
            done.store(true, Ordering::Relaxed);
            let received = result_of(receiver);
            let (offered, elapsed) = sent?;
            received.map(|report| FloodReport {
                offered,
                elapsed,
                ..report
            })
        })
    };
    run().map_err(|cause| failed("UDP flood", between, cause))
}

fn send(socket: &UdpSocket, flood: Flood, watch: &Watch) -> io::Result<(u64, Duration)> {
    let mut datagrams = vec![pattern(flood.bytes); BATCH];
    let mut headers = MultiHeaders::<()>::preallocate(BATCH, None);
    let no_addresses = [None; BATCH];
    let mut offered = 0u64;
    let start = Instant::now();
    while start.elapsed() < flood.time {
        watch.check()?;
        let batch = match flood.rate_pps {
            None => BATCH,
            Some(rate) => due(rate, start.elapsed(), offered),
        };
        if batch == 0 {
            thread::sleep(Duration::from_micros(100));
            continue;
        }
        for (number, datagram) in (offered..).zip(&mut datagrams[..batch]) {
            datagram[..NUMBER_BYTES].copy_from_slice(&number.to_le_bytes());
        }
        let slices: Vec<_> = datagrams[..batch]
            .iter()
            .map(|datagram| [IoSlice::new(datagram)])
            .collect();
        let sent = sendmmsg(
            socket.as_raw_fd(),
            &mut headers,
            &slices,
            no_addresses,
            [],
            MsgFlags::empty(),
        );
        match sent {
            Ok(results) => offered += results.count() as u64,
            // A full queue, and a refusal that ICMP brought for an earlier
            // datagram: both are loss, and loss is what a flood measures.
            Err(Errno::EAGAIN | Errno::ENOBUFS | Errno::ECONNREFUSED | Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok((offered, start.elapsed()))
}

/// How many datagrams are due to keep the rate, at most a batch.
fn due(rate_pps: u64, elapsed: Duration, offered: u64) -> usize {
    let target = (elapsed.as_secs_f64() * rate_pps as f64) as u64;
    usize::try_from(target.saturating_sub(offered)).map_or(BATCH, |due| due.min(BATCH))
}

fn drain(socket: &UdpSocket, flood: Flood, done: &AtomicBool) -> io::Result<FloodReport> {
    let bytes = flood.bytes;
    let expected = pattern(bytes);
    let mut jitter = Jitter::new(flood);
    // One byte more than is sent, so that a datagram that has grown is seen.
    let mut datagrams = vec![vec![0u8; bytes + 1]; BATCH];
    let mut lengths = [0; BATCH];
    let mut headers = MultiHeaders::<()>::preallocate(BATCH, None);
    let mut report = FloodReport::default();
    let mut next = 0u64;
    loop {
        // Read before the socket: what is in it by then is still counted, however late
        // this thread gets to run.
        let is_done = done.load(Ordering::Relaxed);
        let count = match receive_batch(socket, &mut headers, &mut datagrams, &mut lengths) {
            Ok(count) => count,
            Err(error) if is_timeout(&error) && is_done => break,
            Err(error) if is_timeout(&error) => continue,
            Err(error) => return Err(error),
        };
        for (datagram, length) in datagrams.iter().zip(&lengths[..count]) {
            report.delivered += 1;
            let datagram = &datagram[..*length];
            if *length != bytes || datagram[NUMBER_BYTES..] != expected[NUMBER_BYTES..] {
                report.corrupt += 1;
                continue;
            }
            let number = datagram[..NUMBER_BYTES]
                .try_into()
                .map_or(0, u64::from_le_bytes);
            jitter.arrived(number);
            report.reordered += u64::from(number < next);
            next = next.max(number + 1);
        }
    }
    report.jitter_p99_ns = jitter.p99_ns();
    Ok(report)
}

/// Times between arrivals, of datagrams that are sent at a steady rate.
struct Jitter {
    interval_ns: Option<u64>,
    last: Option<(u64, Instant)>,
    deviations_ns: Vec<u64>,
}

impl Jitter {
    fn new(flood: Flood) -> Self {
        Self {
            interval_ns: flood.rate_pps.map(|rate| 1_000_000_000 / rate.max(1)),
            last: None,
            deviations_ns: Vec::new(),
        }
    }

    fn arrived(&mut self, number: u64) {
        let Some(interval_ns) = self.interval_ns else {
            return;
        };
        let now = Instant::now();
        if let Some((last, time)) = self.last.replace((number, now)) {
            let due_ns = number.saturating_sub(last) * interval_ns;
            let ns = now.duration_since(time).as_nanos() as u64;
            self.deviations_ns.push(ns.abs_diff(due_ns));
        }
    }

    fn p99_ns(mut self) -> u64 {
        self.deviations_ns.sort_unstable();
        let at = self.deviations_ns.len() * 99 / 100;
        self.deviations_ns.get(at).copied().unwrap_or(0)
    }
}

fn receive_batch(
    socket: &UdpSocket,
    headers: &mut MultiHeaders<()>,
    datagrams: &mut [Vec<u8>],
    lengths: &mut [usize; BATCH],
) -> io::Result<usize> {
    let mut slices: Vec<_> = datagrams
        .iter_mut()
        .map(|datagram| [IoSliceMut::new(datagram)])
        .collect();
    let results = recvmmsg(
        socket.as_raw_fd(),
        headers,
        slices.iter_mut(),
        MsgFlags::MSG_WAITFORONE,
        None,
    )?;
    let mut count = 0;
    for (result, length) in results.zip(lengths.iter_mut()) {
        *length = result.bytes;
        count += 1;
    }
    Ok(count)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_kept_in_batches() {
        let second = Duration::from_secs(1);
        assert_eq!(due(1000, second, 1000), 0);
        assert_eq!(due(1000, second, 990), 10);
        assert_eq!(due(1000, second, 0), BATCH);
        assert_eq!(due(1000, second, 5000), 0);
    }
}
