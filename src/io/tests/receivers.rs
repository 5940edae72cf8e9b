//! Sockets of busy senders come and go, and nobody who looks at the datagrams can tell.

use std::collections::HashSet;
use std::sync::atomic::{AtomicU64, Ordering};

use super::*;
use crate::io::receivers::ROUND_BYTES;
use crate::io::udp::{UdpOffloads, open};
use crate::wire::Mode;

on_both!(
    a_busy_sender_gets_a_socket_of_its_own,
    senders_take_turns_as_the_busiest,
    once_quiet_what_connected_sockets_hold_is_read,
    a_sender_that_is_gone_harms_nothing,
);

/// Bytes of each datagram.
const DATAGRAM_BYTES: usize = 8000;
const ROUND_DATAGRAMS: usize = ROUND_BYTES / DATAGRAM_BYTES;

/// An engine on a port as workers have it.
fn on_a_port<E: Engine>(make: impl Fn(Parts) -> E) -> Bench<E> {
    let peer = connect("127.0.0.1:0");
    let free = UdpSocket::bind("127.0.0.1:0").unwrap();
    let listen = free.local_addr().unwrap();
    drop(free);
    let all = UdpOffloads {
        segment: true,
        gro: true,
    };
    let mut sockets = open(listen, 1, all, Mode::Plain).unwrap();
    bench_on(make, sockets.workers.remove(0).receive, peer)
}

fn send(peer: &UdpSocket, number: u64, to: SocketAddr) {
    let mut datagram = [0; DATAGRAM_BYTES];
    datagram[..8].copy_from_slice(&number.to_ne_bytes());
    assert_eq!(peer.send_to(&datagram, to).unwrap(), DATAGRAM_BYTES);
}

fn number(datagram: &[u8]) -> u64 {
    u64::from_ne_bytes(datagram[..8].try_into().unwrap())
}

impl<E: Engine> Bench<E> {
    /// Takes what there is, as a worker does whose peers all senders are: sender and number
    /// of each datagram, and whether it came through the shared socket.
    fn take(&mut self) -> Vec<(SocketAddr, u64, bool)> {
        let mut taken = Vec::new();
        // The first poll may only prepare what the second one starts.
        while self.engine.poll().unwrap() || self.engine.poll().unwrap() {
            let (received, meta) = match self.engine.next_event() {
                Some(Event::Datagrams { received, meta }) => (received, meta),
                // A poll that has ended for whatever reason.
                Some(Event::Wake) => continue,
                event => panic!("{event:?}"),
            };
            for datagram in received.bytes().chunks(meta.segment_bytes) {
                taken.push((meta.sender, number(datagram), meta.is_shared));
            }
            let bytes = received.bytes().len();
            self.engine.recycle(received);
            self.engine.note_sender(meta.sender, bytes, meta.is_shared);
        }
        taken
    }

    /// Has a peer send until it has a socket of its own; returns the next number.
    fn make_busy(&mut self, peer: &UdpSocket) -> u64 {
        for number in 0..3 * ROUND_DATAGRAMS as u64 {
            send(peer, number, self.address);
            if self.take().iter().any(|&(_, _, is_shared)| !is_shared) {
                return number + 1;
            }
        }
        panic!("no socket of its own after three rounds");
    }
}

/// The sender goes on all the while: whatever is under way meanwhile is neither lost nor
/// overtaken.
fn a_busy_sender_gets_a_socket_of_its_own<E: Engine>(make: impl Fn(Parts) -> E) {
    const COUNT: u64 = 3 * ROUND_DATAGRAMS as u64;
    /// Fewer than any buffer holds.
    const UNDER_WAY_MAX: u64 = 100;
    let mut bench = on_a_port(make);
    let taken = AtomicU64::new(0);
    let (peer, to) = (bench.peer.try_clone().unwrap(), bench.address);
    let mut own = 0;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for number in 0..COUNT {
                while number - taken.load(Ordering::Relaxed) >= UNDER_WAY_MAX {
                    std::thread::yield_now();
                }
                send(&peer, number, to);
            }
        });
        let mut expected = 0;
        while expected < COUNT {
            for (_, number, is_shared) in bench.take() {
                assert_eq!(number, expected);
                expected += 1;
                own += u64::from(!is_shared);
            }
            taken.store(expected, Ordering::Relaxed);
            if expected < COUNT {
                bench.engine.wait().unwrap();
            }
        }
    });
    assert!(own > COUNT / 3, "{own} of {COUNT}");
    assert_eq!(bench.counters.snapshot().drops().next(), None);
}

fn senders_take_turns_as_the_busiest<E: Engine>(make: impl Fn(Parts) -> E) {
    let mut bench = on_a_port(make);
    let peers: Vec<_> = (0..7).map(|_| connect("127.0.0.1:0")).collect();
    let addresses: Vec<_> = peers.iter().map(|it| it.local_addr().unwrap()).collect();
    let mut next = vec![0; peers.len()];
    let mut with_own = HashSet::new();
    for busiest in 0..peers.len() {
        // Enough for one to be given up, and for the next to be opened.
        for count in 0..3 * ROUND_DATAGRAMS {
            let others = (0..peers.len()).filter(|_| count % 64 == 0);
            let mut expected: Vec<_> = others.chain([busiest; 8]).collect();
            for &sender in &expected {
                send(&peers[sender], next[sender], bench.address);
                next[sender] += 1;
            }
            let mut numbers: Vec<_> = next.clone();
            for &sender in &expected {
                numbers[sender] -= 1;
            }
            for (sender, number, is_shared) in bench.take() {
                let sender = addresses.iter().position(|&it| it == sender).unwrap();
                assert_eq!(number, numbers[sender]);
                numbers[sender] += 1;
                let place = expected.iter().position(|&it| it == sender).unwrap();
                expected.swap_remove(place);
                if !is_shared {
                    with_own.insert(sender);
                }
            }
            assert_eq!(expected, [0; 0], "lost");
            if with_own.contains(&busiest) {
                break;
            }
        }
    }
    assert_eq!(with_own.len(), peers.len());
    assert_eq!(bench.counters.snapshot().drops().next(), None);
}

/// They go with the worker, and what comes from then on may be for another process.
fn once_quiet_what_connected_sockets_hold_is_read<E: Engine>(make: impl Fn(Parts) -> E) {
    let mut bench = on_a_port(make);
    let peer = bench.peer.try_clone().unwrap();
    let next = bench.make_busy(&peer);
    (next..next + 5).for_each(|number| send(&peer, number, bench.address));
    bench.engine.quiesce();
    (next + 5..next + 8).for_each(|number| send(&peer, number, bench.address));
    let numbers = bench.take().into_iter().map(|(_, number, _)| number);
    assert_eq!(numbers.collect::<Vec<_>>(), Vec::from_iter(next..next + 5));
}

fn a_sender_that_is_gone_harms_nothing<E: Engine>(make: impl Fn(Parts) -> E) {
    let mut bench = on_a_port(make);
    let peer = connect("127.0.0.1:0");
    let address = peer.local_addr().unwrap();
    bench.make_busy(&peer);
    drop(peer);
    for _ in 0..100 {
        // The host answers that nobody is there.
        let batch = bench.batch(&[100]);
        bench.engine.send(batch, from_listen(address));
        assert_eq!(bench.take(), []);
    }
    let peer = UdpSocket::bind(address).unwrap();
    send(&peer, 7, bench.address);
    assert_eq!(bench.take(), [(address, 7, false)]);
    assert_eq!(bench.counters.snapshot().receive_failed, 0);
}
