//! Several queues: all of them work, and no flow overtakes itself.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use fastvpn::error::{Error, Result};
use fastvpn::lab::{Namespace, Pair};
use nix::sys::socket::{setsockopt, sockopt};

use crate::support::{
    Ended, FAMILIES, Test, all_cores, backlog_drops, check, dual_stack_tunnels, fail, hosts,
    stop_all,
};
use crate::traffic::{directions, transfer_both_ways};

/// The tests of this file.
pub fn tests() -> Vec<Test> {
    vec![
        ("queues_2_and_2", || queues(2, 2)),
        ("queues_4_and_4", || queues(4, 4)),
        ("queues_4_and_1", || queues(4, 1)),
        ("queues_3_and_2", || queues(3, 2)),
    ]
}

/// UDP flows in each direction of each family: 64 in all.
const FLOWS: usize = 16;

/// Datagrams of each flow.
const DATAGRAMS: u64 = 1500;

/// Datagrams of the flows of one direction and family under way at most.
const UNDER_WAY_MAX: u64 = 256;

/// How long those under way may take before they are held for lost.
const LOST_AFTER: Duration = Duration::from_secs(2);

/// TCP bytes per stream, and streams in each direction of each family.
const STREAMS: usize = 4;
const STREAM_BYTES: u64 = 10_000_000;

fn queues(queues_a: u16, queues_b: u16) -> Result<()> {
    let hosts = hosts(1500)?;
    let cores = all_cores();
    let counts = [queues_a.to_string(), queues_b.to_string()];
    let flags = counts
        .each_ref()
        .map(|count| ["--queues", count.as_str(), "--cores", &cores]);
    let before = drops_of_others(&hosts)?;
    let tunnels = dual_stack_tunnels(&hosts, [&flags[0], &flags[1]])?;
    let lost = mixed_traffic(&hosts)?;
    let ended = stop_all(tunnels)?;
    if queues_a == queues_b {
        for (end, queue) in ended
            .iter()
            .flat_map(|end| (0..queues_a).map(move |q| (end, q)))
        {
            works(end, queue)?;
        }
    }
    let explained =
        drops_of_others(&hosts)? - before + ended.iter().map(Ended::all_dropped).sum::<u64>();
    check(lost == 0 || explained > 0, || {
        format!("{lost} datagrams lost, and nobody has counted them")
    })
}

/// A queue that does its share: of 80 flows no queue of four gets none.
fn works(end: &Ended, queue: u16) -> Result<()> {
    let (sent, received) = end.packets(&format!("queue {queue}"))?;
    check(sent >= DATAGRAMS && received >= DATAGRAMS, || {
        format!(
            "queue {queue} sent {sent} and received {received}:\n{}",
            end.log
        )
    })
}

/// UDP flows and TCP streams in both directions and families at once; returns
/// how many datagrams were lost.
fn mixed_traffic(hosts: &Pair) -> Result<u64> {
    thread::scope(|scope| {
        let flows: Vec<_> = directions(hosts)
            .into_iter()
            .map(|[from, to]| scope.spawn(move || Flows::open(from, to)?.run()))
            .collect();
        let transfers: Vec<_> = FAMILIES
            .into_iter()
            .map(|family| {
                let bytes = STREAMS as u64 * STREAM_BYTES;
                scope.spawn(move || transfer_both_ways(hosts, family, STREAMS, bytes))
            })
            .collect();
        let panicked = || fail("traffic panicked");
        for transfer in transfers {
            transfer.join().unwrap_or_else(|_| panicked())?;
        }
        let mut lost = 0;
        for flow in flows {
            lost += flow.join().unwrap_or_else(|_| fail("traffic panicked"))?;
        }
        Ok(lost)
    })
}

/// Some UDP flows from different ports to one.
struct Flows {
    senders: Vec<UdpSocket>,
    receiver: UdpSocket,
}

impl Flows {
    fn open(from: (&Namespace, IpAddr), to: (&Namespace, IpAddr)) -> Result<Self> {
        let open = || -> io::Result<Self> {
            let receiver = to.0.run(|| UdpSocket::bind((to.1, 0)))?;
            receiver.set_read_timeout(Some(Duration::from_millis(100)))?;
            // Without CAP_NET_ADMIN over the machine: as much as there is.
            let _ = setsockopt(&receiver, sockopt::RcvBufForce, &(4 << 20));
            let address = receiver.local_addr()?;
            let sender = || {
                let socket = UdpSocket::bind((from.1, 0))?;
                socket.connect(address)?;
                Ok(socket)
            };
            let senders = from
                .0
                .run(|| (0..FLOWS).map(|_| sender()).collect::<io::Result<_>>())?;
            Ok(Self { senders, receiver })
        };
        open().map_err(|cause| Error::os("no sockets for UDP flows", cause))
    }

    /// Sends all flows' datagrams in turn and looks at their order; returns
    /// how many never came.
    fn run(&self) -> Result<u64> {
        let (accounted, done) = (AtomicU64::new(0), AtomicBool::new(false));
        let received = thread::scope(|scope| {
            let receiver = scope.spawn(|| self.receive(&accounted, &done));
            let sent = self.send(&accounted);
            done.store(true, Ordering::Relaxed);
            let received = receiver
                .join()
                .unwrap_or_else(|_| fail("a receiver panicked"));
            sent.and(received)
        })?;
        Ok(FLOWS as u64 * DATAGRAMS - received)
    }

    /// Keeps a bounded number of datagrams under way. Those lost at the end of
    /// a flow leave no gap to be known by: after a while they are written off.
    fn send(&self, accounted: &AtomicU64) -> Result<()> {
        let (mut sent, mut written_off) = (0u64, 0);
        for number in 0..DATAGRAMS {
            // Sizes change, so that trains close and begin all the time.
            let bytes = 8 + (number as usize * 37) % 1200;
            let mut datagram = vec![number as u8; bytes];
            datagram[..8].copy_from_slice(&number.to_le_bytes());
            for socket in &self.senders {
                let since = Instant::now();
                while sent - written_off - accounted.load(Ordering::Relaxed).min(sent - written_off)
                    >= UNDER_WAY_MAX
                {
                    if since.elapsed() > LOST_AFTER {
                        written_off = sent - accounted.load(Ordering::Relaxed);
                    }
                    thread::sleep(Duration::from_micros(100));
                }
                let result = socket.send(&datagram);
                result.map_err(|cause| Error::os("cannot send to a UDP flow", cause))?;
                sent += 1;
            }
        }
        Ok(())
    }

    /// Takes datagrams in until all are accounted for, or sending is done and
    /// no more come. `accounted` counts those that came and those that did not
    /// come before a later one of their flow.
    fn receive(&self, accounted: &AtomicU64, done: &AtomicBool) -> Result<u64> {
        let mut next: HashMap<SocketAddr, u64> = HashMap::new();
        let mut buffer = [0; 2048];
        let mut received = 0;
        let mut last_arrival = Instant::now();
        loop {
            let all = FLOWS as u64 * DATAGRAMS;
            let waited = done.load(Ordering::Relaxed) && last_arrival.elapsed() > LOST_AFTER;
            if waited || accounted.load(Ordering::Relaxed) == all {
                return Ok(received);
            }
            let (length, from) = match self.receiver.recv_from(&mut buffer) {
                Ok(arrival) => arrival,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
                Err(cause) => return Err(Error::os("cannot receive UDP flows", cause)),
            };
            let datagram = &buffer[..length];
            let number = datagram
                .first_chunk()
                .map_or(u64::MAX, |first| u64::from_le_bytes(*first));
            let intact = number < DATAGRAMS
                && length == 8 + (number as usize * 37) % 1200
                && datagram[8..].iter().all(|&byte| byte == number as u8);
            check(intact, || {
                format!("flow of {from}: a datagram of {length} bytes changed")
            })?;
            let expected = next.entry(from).or_default();
            check(number >= *expected, || {
                format!("flow of {from}: {number} came after {}", *expected - 1)
            })?;
            accounted.fetch_add(number + 1 - *expected, Ordering::Relaxed);
            *expected = number + 1;
            received += 1;
            last_arrival = Instant::now();
        }
    }
}

/// Packets that the hosts' kernels dropped, outside the tunnel's ends: in the
/// backlog and in UDP sockets' receive buffers.
fn drops_of_others(hosts: &Pair) -> Result<u64> {
    Ok(backlog_drops()? + receive_buffer_errors(&hosts.a)? + receive_buffer_errors(&hosts.b)?)
}

/// `UdpRcvbufErrors` and `Udp6RcvbufErrors` of a namespace.
fn receive_buffer_errors(namespace: &Namespace) -> Result<u64> {
    let read = |path: &str| {
        namespace
            .run(|| fs::read_to_string(path))
            .map_err(|cause| Error::os(format!("no {path}"), cause))
    };
    let v4 = read("/proc/thread-self/net/snmp")?;
    let mut udp = v4.lines().filter(|line| line.starts_with("Udp: "));
    let (names, values) = (udp.next().unwrap_or(""), udp.next().unwrap_or(""));
    let v4 = names
        .split_whitespace()
        .zip(values.split_whitespace())
        .find(|(name, _)| *name == "RcvbufErrors");
    let v6 = read("/proc/thread-self/net/snmp6")?;
    let v6 = v6
        .lines()
        .find_map(|line| line.strip_prefix("Udp6RcvbufErrors"));
    match (
        v4.map(|(_, value)| value.parse()),
        v6.map(|value| value.trim().parse()),
    ) {
        (Some(Ok::<u64, _>(v4)), Some(Ok::<u64, _>(v6))) => Ok(v4 + v6),
        (v4, v6) => fail(format!(
            "cannot read UDP's receive buffer errors: {v4:?} {v6:?}"
        )),
    }
}
