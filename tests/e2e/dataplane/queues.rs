//! Several queues: all of them work, and no flow overtakes itself.

use std::fs;
use std::io;
use std::net::{IpAddr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use fastvpn::error::{Error, Result};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, recv};
use testbed::{Namespace, Pair};

use crate::dataplane::traffic::{directions, transfer_both_ways};
use crate::support::{
    Ended, FAMILIES, all_cores, backlog_drops, check, dual_stack_tunnels, enlarge_receive_buffer,
    fail, hosts, stop_all,
};

#[testbed::trial(each_engine)]
fn queues_2_and_2() -> Result<()> {
    queues(2, 2, Ways::Apart)
}

#[testbed::trial(each_engine)]
fn queues_4_and_4() -> Result<()> {
    queues(4, 4, Ways::Apart)
}

#[testbed::trial(each_engine)]
fn queues_4_and_1() -> Result<()> {
    queues(4, 1, Ways::Apart)
}

#[testbed::trial(each_engine)]
fn queues_3_and_2() -> Result<()> {
    queues(3, 2, Ways::Apart)
}

#[testbed::trial(each_engine)]
fn queues_4_and_4_answering() -> Result<()> {
    queues(4, 4, Ways::Together)
}

#[testbed::trial(each_engine, needs_root)]
fn queues_4_and_1_answering() -> Result<()> {
    queues(4, 1, Ways::Together)
}

#[testbed::trial(each_engine, needs_root)]
fn queues_3_and_2_answering() -> Result<()> {
    queues(3, 2, Ways::Together)
}

/// UDP flows in each direction of each family: 64 in all.
const FLOWS: usize = 16;

/// Datagrams of each flow.
const DATAGRAMS: u64 = 1500;

/// Datagrams of the flows of one direction and family under way at most.
const UNDER_WAY_MAX: u64 = 256;

/// How long those under way may take before they are held for lost.
const LOST_AFTER: Duration = Duration::from_secs(5);

/// TCP bytes per stream, and streams in each direction of each family.
const STREAMS: usize = 4;
const STREAM_BYTES: u64 = 10_000_000;

/// How the two directions' flows relate.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Ways {
    /// They are different flows.
    Apart,
    /// They are the two directions of the same flows.
    Together,
}

fn queues(queues_a: u16, queues_b: u16, ways: Ways) -> Result<()> {
    let hosts = hosts(1500)?;
    let cores = all_cores();
    let counts = [queues_a.to_string(), queues_b.to_string()];
    let flags = counts
        .each_ref()
        .map(|count| ["--queues", count.as_str(), "--cores", &cores]);
    let before = drops_of_others(&hosts)?;
    let tunnels = dual_stack_tunnels(&hosts, [&flags[0], &flags[1]])?;
    let lost = mixed_traffic(&hosts, ways)?;
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
fn mixed_traffic(hosts: &Pair, ways: Ways) -> Result<u64> {
    thread::scope(|scope| {
        let flows: Vec<_> = all_flows(hosts, ways)?
            .into_iter()
            .map(|flows| scope.spawn(move || flows.run()))
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

/// One set of flows for each direction of each family.
fn all_flows(hosts: &Pair, ways: Ways) -> Result<Vec<Flows>> {
    let mut all: Vec<Flows> = Vec::new();
    for [from, to] in directions(hosts) {
        let is_back = all.len() % 2 == 1;
        all.push(match all.last() {
            Some(there) if is_back && ways == Ways::Together => there.back()?,
            _ => Flows::open(from, to)?,
        });
    }
    Ok(all)
}

/// UDP flows from one host to the other, in the order of their sockets.
struct Flows {
    senders: Vec<UdpSocket>,
    receivers: Vec<UdpSocket>,
}

impl Flows {
    fn open(from: (&Namespace, IpAddr), to: (&Namespace, IpAddr)) -> Result<Self> {
        let open = || -> io::Result<Self> {
            let sockets = |(namespace, address): (&Namespace, IpAddr)| {
                let bind = |_| UdpSocket::bind((address, 0));
                namespace.run(|| (0..FLOWS).map(bind).collect::<io::Result<_>>())
            };
            let flows = Self {
                senders: sockets(from)?,
                receivers: sockets(to)?,
            };
            for (sender, receiver) in flows.senders.iter().zip(&flows.receivers) {
                sender.connect(receiver.local_addr()?)?;
                receiver.connect(sender.local_addr()?)?;
                for socket in [sender, receiver] {
                    // Without CAP_NET_ADMIN over the machine: as much as there is.
                    enlarge_receive_buffer(socket, 1 << 20);
                }
            }
            Ok(flows)
        };
        open().map_err(|cause| Error::os("no sockets for UDP flows", cause))
    }

    /// The same flows the other way: each direction answers the other.
    fn back(&self) -> Result<Self> {
        let clone = |sockets: &[UdpSocket]| -> io::Result<Vec<_>> {
            sockets.iter().map(UdpSocket::try_clone).collect()
        };
        let back = || -> io::Result<Self> {
            Ok(Self {
                senders: clone(&self.receivers)?,
                receivers: clone(&self.senders)?,
            })
        };
        back().map_err(|cause| Error::os("no more sockets", cause))
    }

    /// Sends all flows' datagrams in turn and looks at their order; returns
    /// how many never came.
    fn run(&self) -> Result<u64> {
        let (accounted, done) = (AtomicU64::new(0), AtomicBool::new(false));
        let received = thread::scope(|scope| {
            let receiver = scope.spawn(|| {
                // After a fault the sender need not wait for anything.
                let all = |_: &Error| accounted.store(u64::MAX, Ordering::Relaxed);
                self.receive(&accounted, &done).inspect_err(all)
            });
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
            let datagram = datagram(number);
            for socket in &self.senders {
                let since = Instant::now();
                loop {
                    let known = written_off.max(accounted.load(Ordering::Relaxed));
                    if sent.saturating_sub(known) < UNDER_WAY_MAX {
                        break;
                    }
                    if since.elapsed() > LOST_AFTER {
                        written_off = sent;
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
        let failed = |cause: io::Error| Error::os("cannot receive UDP flows", cause);
        let mut next = [0; FLOWS];
        let mut buffer = [0; 2048];
        let mut received = 0;
        let mut last_arrival = Instant::now();
        while accounted.load(Ordering::Relaxed) < FLOWS as u64 * DATAGRAMS {
            if done.load(Ordering::Relaxed) && last_arrival.elapsed() > LOST_AFTER {
                break;
            }
            let sockets = self.receivers.iter().map(UdpSocket::as_fd);
            let mut ready: Vec<_> = sockets
                .map(|fd| PollFd::new(fd, PollFlags::POLLIN))
                .collect();
            poll(&mut ready, PollTimeout::from(100u8)).map_err(|errno| failed(errno.into()))?;
            let ready = ready.iter().map(|fd| fd.any() == Some(true));
            for (flow, _) in ready.enumerate().filter(|(_, is_ready)| *is_ready) {
                let fd = self.receivers[flow].as_raw_fd();
                let length = match recv(fd, &mut buffer, MsgFlags::MSG_DONTWAIT) {
                    Ok(length) => length,
                    Err(Errno::EAGAIN) => continue,
                    Err(errno) => return Err(failed(errno.into())),
                };
                let number = datagram_number(&buffer[..length])?;
                check(number >= next[flow], || {
                    format!("flow {flow}: {number} came after {}", next[flow] - 1)
                })?;
                accounted.fetch_add(number + 1 - next[flow], Ordering::Relaxed);
                next[flow] = number + 1;
                received += 1;
                last_arrival = Instant::now();
            }
        }
        Ok(received)
    }
}

/// The datagram of a number. Sizes change, so that batches close and begin all
/// the time.
fn datagram(number: u64) -> Vec<u8> {
    let mut datagram = vec![number as u8; 8 + (number as usize * 37) % 1200];
    datagram[..8].copy_from_slice(&number.to_le_bytes());
    datagram
}

/// The number of a datagram that is intact.
fn datagram_number(bytes: &[u8]) -> Result<u64> {
    let number = bytes.first_chunk().map(|first| u64::from_le_bytes(*first));
    match number.filter(|&number| number < DATAGRAMS) {
        Some(number) if datagram(number) == bytes => Ok(number),
        _ => fail(format!("a datagram of {} bytes changed", bytes.len())),
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
