//! Sends that the kernel refuses: what still can be sent is, and what the
//! refusal says of the path is remembered for a while.

use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::sync::Once;

use nix::errno::Errno;

use crate::counters::Counters;
use crate::io::engine::SendFailure;
use crate::io::message;
use crate::packet::batch::{Batch, Limits};
use crate::wire::Endpoint;

/// Older kernels' `UDP_MAX_SEGMENTS`.
const SEGMENTS_MAX_OLD: usize = 64;

/// Most paths to remember limits of.
const PATHS_MAX: usize = 64;

/// Most failures that wait to be told. They are taken after each turn.
const FAILURES_MAX: usize = 64;

/// How long batches may be on each path.
pub struct PathLimits {
    /// Limits of a path that nothing has been learnt of.
    base: Limits,
    full: Limits,
    /// By destination, where something has been learnt.
    paths: Vec<(SocketAddr, Limits)>,
    failures: Failures,
}

impl PathLimits {
    /// Nothing has been learnt: `limits` hold everywhere.
    pub fn new(limits: Limits) -> Self {
        Self {
            base: limits,
            full: limits,
            paths: Vec::with_capacity(PATHS_MAX),
            failures: Failures(Vec::with_capacity(FAILURES_MAX)),
        }
    }

    /// How long batches toward `destination` may be.
    #[inline]
    pub fn get(&self, destination: SocketAddr) -> Limits {
        self.paths
            .iter()
            .find(|(to, _)| *to == destination)
            .map_or(self.base, |(_, limits)| *limits)
    }

    /// Forgets what has been learnt.
    pub fn reset(&mut self) {
        self.base = self.full;
        self.paths.clear();
    }

    /// Packets that were not sent, once.
    #[inline]
    pub fn next_failure(&mut self) -> Option<SendFailure> {
        self.failures.0.pop()
    }

    /// Deals with a batch that the kernel refused with `errno`, counts its
    /// packets, and tells whether the socket's send buffer has no room.
    #[cold]
    pub fn refused(
        &mut self,
        batch: &Batch,
        to: Endpoint,
        errno: i32,
        socket: &impl AsFd,
        counters: &Counters,
    ) -> bool {
        match errno {
            libc::EIO | libc::EINVAL | libc::EMSGSIZE if batch.count() > 1 => {
                let failures = &mut self.failures;
                let (sent, no_room) = send_one_by_one(batch, to, socket, counters, failures);
                // What goes through one by one was refused for being a batch.
                if sent > 0 {
                    self.learn(batch, to.address, errno);
                }
                no_room
            }
            _ => {
                self.failures
                    .note(batch, to.address, errno, batch.datagrams(), counters);
                errno == libc::EAGAIN
            }
        }
    }

    /// Remembers what the kernel will not take, so that later batches are short
    /// enough from the start.
    fn learn(&mut self, batch: &Batch, to: SocketAddr, errno: i32) {
        static NO_CHECKSUM_OFFLOAD: Once = Once::new();
        if errno == libc::EIO {
            NO_CHECKSUM_OFFLOAD.call_once(|| {
                tracing::warn!(
                    endpoint = %to,
                    "UDP_SEGMENT off: the way to the peer takes no segmentation offload \
                     (IPsec, or a device without checksums); sending one datagram at a time"
                );
            });
            self.base.segments_max = 1;
            self.paths.clear();
        } else if errno == libc::EINVAL && batch.count() > SEGMENTS_MAX_OLD {
            // The kernel's own limit: not to be tried again.
            self.base.segments_max = SEGMENTS_MAX_OLD;
            self.full.segments_max = SEGMENTS_MAX_OLD;
            self.paths.clear();
        } else {
            let mut limits = self.get(to);
            let refused_bytes = batch.segment_bytes();
            limits.segment_bytes_max = limits.segment_bytes_max.min(refused_bytes - 1);
            self.paths.retain(|(known, _)| *known != to);
            if self.paths.len() == PATHS_MAX {
                self.paths.remove(0);
            }
            self.paths.push((to, limits));
            tracing::debug!(
                "datagrams over {} bytes are sent alone: the path's MTU is smaller",
                limits.segment_bytes_max
            );
        }
    }
}

/// Packets that were not sent, those of one next hop and errno together.
struct Failures(Vec<SendFailure>);

impl Failures {
    /// Counts some of a batch's datagrams as dropped.
    fn note<'a>(
        &mut self,
        batch: &Batch,
        destination: SocketAddr,
        errno: i32,
        datagrams: impl Iterator<Item = &'a [u8]>,
        counters: &Counters,
    ) {
        let (packets, bytes) = datagrams.fold((0, 0), |(packets, bytes), datagram| {
            (packets + 1, bytes + datagram.len() as u64)
        });
        let failure = SendFailure {
            next_hop: batch.next_hop(),
            destination,
            errno,
            packets,
            bytes,
        };
        let drops = match failure.is_full() {
            true => &counters.drop_send_full,
            false => &counters.drop_send_error,
        };
        drops.add(packets);
        let same = self.0.iter().position(|other| {
            other.next_hop == failure.next_hop
                && other.destination == destination
                && other.errno == errno
        });
        match same {
            Some(same) => {
                self.0[same].packets += packets;
                self.0[same].bytes += bytes;
            }
            None if self.0.len() < FAILURES_MAX => self.0.push(failure),
            None => {}
        }
    }
}

/// Sends a batch's datagrams without `UDP_SEGMENT`; tells how many went, and
/// whether the socket's send buffer had no room for the rest.
fn send_one_by_one(
    batch: &Batch,
    to: Endpoint,
    socket: &impl AsFd,
    counters: &Counters,
    failures: &mut Failures,
) -> (usize, bool) {
    let mut sent = 0;
    for (index, datagram) in batch.datagrams().enumerate() {
        match message::send_datagram(socket.as_fd(), datagram, to) {
            Ok(_) => {
                sent += 1;
                counters.udp_sends.add(1);
                counters.packets_sent.add(1);
                counters.bytes_sent.add(datagram.len() as u64);
            }
            Err(Errno::EAGAIN) => {
                let rest = batch.datagrams().skip(index);
                failures.note(batch, to.address, libc::EAGAIN, rest, counters);
                return (sent, true);
            }
            Err(errno) => {
                let this = std::iter::once(datagram);
                failures.note(batch, to.address, errno as i32, this, counters);
            }
        }
    }
    (sent, false)
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;

    use super::*;

    fn batch(sizes: &[usize]) -> Batch {
        let mut batch = Batch::new(0);
        batch.start(7, Limits::FULL);
        for (index, &bytes) in sizes.iter().enumerate() {
            batch.reserve(bytes).unwrap().fill(index as u8);
        }
        batch
    }

    fn receiver() -> UdpSocket {
        let receiver = UdpSocket::bind("127.0.0.1:0").unwrap();
        receiver.set_nonblocking(true).unwrap();
        receiver
    }

    fn elsewhere() -> SocketAddr {
        "127.0.0.1:1".parse().unwrap()
    }

    /// Refuses a batch to `receiver` and returns the first bytes of the
    /// datagrams that arrive.
    fn refuse(
        limits: &mut PathLimits,
        batch: &Batch,
        receiver: &UdpSocket,
        errno: i32,
        counters: &Counters,
    ) -> Vec<u8> {
        let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
        let to = receiver.local_addr().unwrap();
        assert!(!limits.refused(batch, to.into(), errno, &sender, counters));
        let mut buffer = [0; 2000];
        let mut arrived = Vec::new();
        while let Ok(bytes) = receiver.recv(&mut buffer) {
            assert!(bytes > 0);
            arrived.push(buffer[0]);
        }
        arrived
    }

    #[test]
    fn what_is_too_long_for_a_path_is_sent_alone_and_remembered_for_that_path() {
        let receiver = receiver();
        let to = receiver.local_addr().unwrap();
        let mut limits = PathLimits::new(Limits::FULL);
        let counters = Counters::default();
        let refused = batch(&[1000, 1000, 500]);
        let arrived = refuse(&mut limits, &refused, &receiver, libc::EMSGSIZE, &counters);
        assert_eq!(arrived, [0, 1, 2]);
        assert_eq!(limits.get(to).segment_bytes_max, 999);
        assert_eq!(limits.get(elsewhere()), Limits::FULL);
        let snapshot = counters.snapshot();
        assert_eq!((snapshot.packets_sent, snapshot.bytes_sent), (3, 2500));
        assert_eq!(snapshot.drops().next(), None);
        // Only ever shorter, until it is forgotten.
        refuse(
            &mut limits,
            &batch(&[1200; 2]),
            &receiver,
            libc::EINVAL,
            &counters,
        );
        assert_eq!(limits.get(to).segment_bytes_max, 999);
        limits.reset();
        assert_eq!(limits.get(to), Limits::FULL);
    }

    #[test]
    fn a_device_without_checksums_gets_no_batches_until_that_is_forgotten() {
        let receiver = receiver();
        let mut limits = PathLimits::new(Limits::FULL);
        let counters = Counters::default();
        refuse(
            &mut limits,
            &batch(&[100; 3]),
            &receiver,
            libc::EIO,
            &counters,
        );
        assert_eq!(limits.get(elsewhere()).segments_max, 1);
        limits.reset();
        assert_eq!(limits.get(elsewhere()), Limits::FULL);
    }

    #[test]
    fn an_older_kernels_limit_is_never_forgotten() {
        let receiver = receiver();
        let to = receiver.local_addr().unwrap();
        let mut limits = PathLimits::new(Limits::FULL);
        let counters = Counters::default();
        let arrived = refuse(
            &mut limits,
            &batch(&[30; 65]),
            &receiver,
            libc::EINVAL,
            &counters,
        );
        assert_eq!(arrived.len(), 65);
        limits.reset();
        assert_eq!(limits.get(to).segments_max, SEGMENTS_MAX_OLD);
    }

    #[test]
    fn what_cannot_go_is_counted_and_teaches_nothing() {
        let receiver = receiver();
        let to = receiver.local_addr().unwrap();
        let mut limits = PathLimits::new(Limits::FULL);
        let counters = Counters::default();
        for (sizes, errno) in [
            (&[100; 2][..], libc::ENETUNREACH),
            (&[100; 2], libc::ENOBUFS),
            // A single datagram is not a batch that could be taken apart.
            (&[100], libc::EMSGSIZE),
        ] {
            assert!(refuse(&mut limits, &batch(sizes), &receiver, errno, &counters).is_empty());
        }
        assert_eq!(limits.get(to), Limits::FULL);
        let snapshot = counters.snapshot();
        let dropped = (snapshot.drop_send_error, snapshot.drop_send_full);
        assert_eq!((snapshot.packets_sent, dropped), (0, (3, 2)));
        // Once, and all that is alike together.
        refuse(
            &mut limits,
            &batch(&[200; 2]),
            &receiver,
            libc::ENETUNREACH,
            &counters,
        );
        let mut failures = std::iter::from_fn(|| limits.next_failure())
            .map(|failure| (failure.errno, failure.packets, failure.bytes))
            .collect::<Vec<_>>();
        failures.sort();
        let expected = [
            (libc::EMSGSIZE, 1, 100),
            (libc::ENETUNREACH, 4, 600),
            (libc::ENOBUFS, 2, 200),
        ];
        assert_eq!(failures, expected);
        assert_eq!(limits.next_failure(), None);
    }

    #[test]
    fn remembers_a_bounded_number_of_paths() {
        let mut limits = PathLimits::new(Limits::FULL);
        let to = |port: u16| SocketAddr::from(([127, 0, 0, 1], port));
        for port in 1..=2 * PATHS_MAX as u16 {
            limits.learn(&batch(&[900; 2]), to(port), libc::EMSGSIZE);
        }
        assert_eq!(limits.paths.len(), PATHS_MAX);
        assert_eq!(limits.get(to(1)), Limits::FULL);
        let last = limits.get(to(2 * PATHS_MAX as u16));
        assert_eq!(last.segment_bytes_max, 899);
    }
}
