//! What both engines do alike, run on both: between a pair of Unix sockets, in
//! the place of a TUN queue and its device, and UDP sockets of the loopback
//! interface.

use std::collections::VecDeque;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, setsockopt, socketpair, sockopt};
use nix::unistd::{read, write};
use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use socket2::{Domain, SockAddr, Socket, Type};

use super::engine::{Destination, Engine, Event, ReceiveMeta, Received};
use super::epoll::Epoll;
use super::sides::{BATCHES, VNET_PACKETS};
use super::tun::Queue;
use super::udp::{Port, WorkerSockets};
use super::uring::{self, Uring};
use crate::counters::Counters;
use crate::packet::batch::{Batch, Limits};
use crate::packet::ecn::Ecn;
use crate::packet::vnet_packet::VnetSink;
use crate::testbed::{self, UNDERLAY_NAME};

/// Runs tests on both engines, or on epoll alone where there is no io_uring.
macro_rules! on_both {
    ($($test:ident),+ $(,)?) => {
        mod on_uring {
            $(#[test]
            fn $test() {
                match super::uring::probe(1) {
                    Ok(()) => super::$test(super::uring_parts),
                    Err(error) => eprintln!("not tested: {error}"),
                }
            })+
        }
        mod on_epoll {
            $(#[test]
            fn $test() {
                super::$test(super::epoll_parts);
            })+
        }
    };
}

on_both!(
    both_sides_have_their_turns,
    sleeps_until_something_comes,
    a_call_is_heard_under_load,
    failed_reads_keep_nothing_else_waiting,
    batches_go_out_and_come_in_whole,
    an_empty_batch_is_not_sent_and_not_lost,
    a_full_tun_queue_costs_vnet_packets_and_no_buffers,
    a_full_socket_stops_vnet_packets_and_nothing_else,
    without_a_buffer_packets_are_dropped_and_counted,
    a_device_that_goes_is_an_error,
    nothing_is_missed,
    polling_hears_of_news,
    once_quiet_nothing_new_is_read,
);

mod receivers;

/// What an engine is made of.
struct Parts {
    queue: Queue,
    sockets: WorkerSockets,
    wake: Arc<EventFd>,
    counters: Arc<Counters>,
}

fn uring_parts(parts: Parts) -> Uring {
    let Parts {
        queue,
        sockets,
        wake,
        counters,
    } = parts;
    Uring::new(
        queue.into(),
        sockets.into(),
        Vec::new(),
        wake,
        Limits::FULL,
        counters,
    )
    .unwrap()
}

fn epoll_parts(parts: Parts) -> Epoll {
    let Parts {
        queue,
        sockets,
        wake,
        counters,
    } = parts;
    Epoll::new(
        queue.into(),
        sockets.into(),
        Vec::new(),
        wake,
        Limits::FULL,
        counters,
    )
    .unwrap()
}

/// An engine and what is at the other ends of its descriptors.
struct Bench<E> {
    engine: E,
    device: OwnedFd,
    peer: UdpSocket,
    address: SocketAddr,
    wake: Arc<EventFd>,
    counters: Arc<Counters>,
}

fn from_listen(endpoint: SocketAddr) -> Destination {
    Destination {
        endpoint: endpoint.into(),
        from: Port::Listen,
    }
}

fn bind(address: &str) -> Socket {
    let socket = Socket::new(Domain::IPV4, Type::DGRAM, None).unwrap();
    socket.set_nonblocking(true).unwrap();
    let address: SocketAddr = address.parse().unwrap();
    socket.bind(&SockAddr::from(address)).unwrap();
    setsockopt(&socket, sockopt::UdpGroSegment, &true).unwrap();
    socket
}

fn connect(address: &str) -> UdpSocket {
    let peer = UdpSocket::bind(address).unwrap();
    let timeout = Some(Duration::from_secs(10));
    peer.set_read_timeout(timeout).unwrap();
    peer
}

fn bench<E>(make: impl FnOnce(Parts) -> E) -> Bench<E> {
    let any = "127.0.0.1:0";
    bench_on(make, bind(any), connect(any))
}

fn bench_on<E>(make: impl FnOnce(Parts) -> E, receive: Socket, peer: UdpSocket) -> Bench<E> {
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let (queue, device) =
        socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).unwrap();
    let address = receive.local_addr().unwrap().as_socket().unwrap();
    let wake = EventFd::from_value_and_flags(0, EfdFlags::EFD_NONBLOCK).unwrap();
    let (wake, counters) = (Arc::new(wake), Arc::new(Counters::default()));
    let engine = make(Parts {
        queue: Queue::from(queue),
        sockets: WorkerSockets::new(receive, None),
        wake: Arc::clone(&wake),
        counters: Arc::clone(&counters),
    });
    Bench {
        engine,
        device,
        peer,
        address,
        wake,
        counters,
    }
}

/// An event that brought bytes, and whether they were a vnet packet.
fn bytes_of(event: Event) -> (bool, Received) {
    match event {
        Event::VnetPacket(received) => (true, received),
        Event::Datagrams { received, .. } => (false, received),
        event => panic!("{event:?}"),
    }
}

impl<E: Engine> Bench<E> {
    /// Takes events, and gives their buffers back, until there are no more.
    fn drain(&mut self) -> Vec<(bool, Vec<u8>)> {
        let mut seen = Vec::new();
        // The first poll may only prepare what the second one starts.
        while self.engine.poll().unwrap() || self.engine.poll().unwrap() {
            let event = self.engine.next_event().expect("an event was promised");
            let (is_vnet_packet, received) = bytes_of(event);
            seen.push((is_vnet_packet, received.bytes().to_vec()));
            self.engine.recycle(received);
        }
        seen
    }

    /// Sleeps until there is an event, and takes it.
    fn wait(&mut self) -> Event {
        loop {
            self.engine.submit().unwrap();
            self.engine.wait().unwrap();
            if let Some(event) = self.engine.next_event() {
                return event;
            }
        }
    }

    fn batch(&mut self, sizes: &[usize]) -> Batch {
        let mut batch = self.engine.take_batch().unwrap();
        batch.start(0, self.engine.limits(([127, 0, 0, 1], 1).into()));
        for (index, &bytes) in sizes.iter().enumerate() {
            batch.reserve(bytes).unwrap().fill(index as u8);
        }
        batch
    }
}

fn both_sides_have_their_turns<E: Engine>(make: impl Fn(Parts) -> E) {
    let mut bench = bench(make);
    // Receives are under way before anything comes.
    assert!(bench.drain().is_empty());
    for number in 0..5 {
        write(&bench.device, &[number; 30]).unwrap();
        // Unequal, lest the kernel merge them.
        let datagram = vec![number; 100 - usize::from(number)];
        bench.peer.send_to(&datagram, bench.address).unwrap();
    }
    let seen = bench.drain();
    let vnet_packets: Vec<bool> = seen
        .iter()
        .map(|(is_vnet_packet, _)| *is_vnet_packet)
        .collect();
    let first = vnet_packets[0];
    assert_eq!(vnet_packets, [first, !first].repeat(5));
    let numbers: Vec<u8> = seen.iter().map(|(_, bytes)| bytes[0]).collect();
    assert_eq!(numbers, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]);
}

fn sleeps_until_something_comes<E: Engine>(make: impl Fn(Parts) -> E) {
    let mut bench = bench(make);
    assert!(bench.drain().is_empty());
    let device = bench.device.try_clone().unwrap();
    let late = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(20));
        write(device, &[7; 30]).unwrap();
    });
    let (is_vnet_packet, received) = bytes_of(bench.wait());
    late.join().unwrap();
    assert_eq!((is_vnet_packet, received.bytes()), (true, &[7; 30][..]));
    bench.engine.recycle(received);
    // Once for all commands: the worker takes all there are.
    for _ in 0..3 {
        bench.wake.write(1).unwrap();
    }
    assert!(matches!(bench.wait(), Event::Wake));
    assert!(bench.drain().is_empty());
}

/// A worker's turn has a bounded number of events.
fn a_call_is_heard_under_load<E: Engine>(make: impl Fn(Parts) -> E) {
    let mut bench = bench(make);
    assert!(bench.drain().is_empty());
    bench.wake.write(1).unwrap();
    let mut vnet_packets = 0;
    loop {
        assert!(vnet_packets <= 256, "unheard");
        write(&bench.device, &[1; 1500]).unwrap();
        match bench.engine.next_event() {
            Some(Event::VnetPacket(received)) => bench.engine.recycle(received),
            Some(Event::Wake) => break,
            None => bench.engine.wait().unwrap(),
            event => panic!("{event:?}"),
        }
        vnet_packets += 1;
        if vnet_packets % 64 == 0 {
            bench.engine.submit().unwrap();
        }
    }
}

/// Vnet packets that the driver cannot describe, without an end.
fn failed_reads_keep_nothing_else_waiting<E: Engine>(make: impl Fn(Parts) -> E) {
    // A stream socket without a peer: reading it is EINVAL, as it is with these.
    let queue = Queue::from(OwnedFd::from(
        Socket::new(Domain::UNIX, Type::STREAM, None).unwrap(),
    ));
    let mut bench = bench(|parts| make(Parts { queue, ..parts }));
    // As a worker's turn does, and what a turn gives.
    let mut turn = || {
        let event = bench.engine.next_event();
        bench.engine.submit().unwrap();
        bench.engine.wait().unwrap();
        event
    };
    for _ in 0..10 {
        assert!(turn().is_none());
    }
    bench.wake.write(1).unwrap();
    assert!((0..10).any(|_| matches!(turn(), Some(Event::Wake))));
    bench.peer.send_to(&[3; 60], bench.address).unwrap();
    assert!((0..10).any(|_| matches!(turn(), Some(Event::Datagrams { .. }))));
    assert!(bench.counters.drop_tun_malformed.get() >= 10);
}

fn batches_go_out_and_come_in_whole<E: Engine>(make: impl Fn(Parts) -> E) {
    let mut bench = bench(make);
    let peer = bench.peer.local_addr().unwrap();
    for sizes in [&[500; 3][..], &[400, 400, 100], &[700], &[20; 128]] {
        let batch = bench.batch(sizes);
        bench.engine.send(batch, from_listen(peer));
        bench.engine.submit().unwrap();
        let mut buffer = [0; 2000];
        for (index, &bytes) in sizes.iter().enumerate() {
            let (received, from) = bench.peer.recv_from(&mut buffer).unwrap();
            assert_eq!((received, from), (bytes, bench.address));
            assert!(buffer[..bytes].iter().all(|&byte| byte == index as u8));
        }
        // The same to itself: the loopback interface does not cut it up.
        let batch = bench.batch(sizes);
        bench.engine.send(batch, from_listen(bench.address));
        let Event::Datagrams { received, meta } = bench.wait() else {
            panic!("no datagrams");
        };
        let expected = ReceiveMeta {
            sender: bench.address,
            called: None,
            is_shared: true,
            segment_bytes: sizes[0],
            ecn: Ecn::NotEct,
        };
        assert_eq!(meta, expected);
        assert_eq!(received.bytes().len(), sizes.iter().sum::<usize>());
        bench.engine.recycle(received);
    }
    let snapshot = bench.counters.snapshot();
    assert_eq!((snapshot.udp_sends, snapshot.packets_sent), (8, 270));
    assert_eq!(snapshot.drops().next(), None);
}

fn an_empty_batch_is_not_sent_and_not_lost<E: Engine>(make: impl Fn(Parts) -> E) {
    let mut bench = bench(make);
    for _ in 0..2 * BATCHES {
        let batch = bench.batch(&[]);
        bench.engine.send(batch, from_listen(bench.address));
    }
    bench.engine.submit().unwrap();
    assert_eq!(bench.counters.snapshot(), Counters::default().snapshot());
}

fn a_full_tun_queue_costs_vnet_packets_and_no_buffers<E: Engine>(make: impl Fn(Parts) -> E) {
    let mut bench = bench(make);
    let mut written = 0;
    let mut snapshot = bench.counters.snapshot();
    while snapshot.drop_tun_full < 3 {
        let vnet_packet = bench.engine.take_vnet_packet().unwrap();
        bench.engine.write(vnet_packet);
        // A ring may tell of a failure with the next call only.
        bench.engine.submit().unwrap();
        bench.engine.submit().unwrap();
        written += 1;
        assert!(
            written < 10_000,
            "the socket holds any number of vnet packets"
        );
        snapshot = bench.counters.snapshot();
    }
    assert_eq!(snapshot.tun_writes, written - 3);
    let mut buffer = [0; 100];
    let there = std::iter::from_fn(|| read(&bench.device, &mut buffer).ok());
    assert_eq!(there.take(10_000).count() as u64, written - 3);
    // Nothing waits for the queue, on either side.
    write(&bench.device, &[7; 30]).unwrap();
    bench.peer.send_to(&[8; 30], bench.address).unwrap();
    let mut seen = bench.drain();
    seen.sort();
    assert_eq!(seen, [(false, vec![8; 30]), (true, vec![7; 30])]);
}

/// Datagrams wait in the kernel, and take up the send buffer, while it asks for
/// the link-layer address of a host that does not answer.
fn a_full_socket_stops_vnet_packets_and_nothing_else<E: Engine>(make: impl Fn(Parts) -> E) {
    let net = |text: &str| text.parse().unwrap();
    let hosts = testbed::pair(&[(net("10.9.0.1/24"), net("10.9.0.3/24"))], 1500).unwrap();
    for (setting, value) in [("unres_qlen_bytes", "268435456"), ("mcast_solicit", "1000")] {
        let path = format!("net/ipv4/neigh/{UNDERLAY_NAME}/{setting}");
        hosts.a.sysctl(&path, value).unwrap();
    }
    let (receive, peer) = hosts.a.run(|| (bind("10.9.0.1:0"), connect("10.9.0.1:0")));
    receive.set_send_buffer_size(16_000).unwrap();
    let mut bench = bench_on(make, receive, peer);
    assert!(bench.drain().is_empty());

    let silent = from_listen("10.9.0.2:9".parse().unwrap());
    let (mut packets, mut refused) = (0, 0);
    while refused == 0 {
        let batch = bench.batch(&[1000; 4]);
        bench.engine.send(batch, silent);
        bench.engine.submit().unwrap();
        packets += 4;
        assert!(packets < 10_000, "the send buffer holds any number");
        while bench.engine.has_event() {
            let Some(Event::SendFailed(failure)) = bench.engine.next_event() else {
                panic!("nothing has come");
            };
            assert!(failure.is_full() && failure.destination == silent.endpoint.address);
            refused += failure.packets;
        }
    }
    let snapshot = bench.counters.snapshot();
    assert_eq!(snapshot.drop_send_full, refused);
    assert_eq!(snapshot.packets_sent, packets - refused);

    // No vnet packet is read, while datagrams come and vnet packets go.
    for number in 0..3 {
        write(&bench.device, &[number; 30]).unwrap();
        bench.peer.send_to(&[number; 60], bench.address).unwrap();
        assert_eq!(bench.drain(), [(false, vec![number; 60])]);
    }
    let vnet_packet = bench.engine.take_vnet_packet().unwrap();
    bench.engine.write(vnet_packet);
    bench.engine.submit().unwrap();
    assert_eq!(bench.counters.snapshot().tun_writes, 1);

    // Somebody answers: there is room, and the worker wakes.
    let mut netlink = hosts.b.netlink().unwrap();
    let index = netlink.link_index(UNDERLAY_NAME).unwrap().unwrap();
    netlink.add_address(index, net("10.9.0.2/24")).unwrap();
    for number in 0..3 {
        let (is_vnet_packet, received) = bytes_of(bench.wait());
        assert_eq!(
            (is_vnet_packet, received.bytes()),
            (true, &[number; 30][..])
        );
        bench.engine.recycle(received);
    }
}

fn without_a_buffer_packets_are_dropped_and_counted<E: Engine>(make: impl Fn(Parts) -> E) {
    let mut bench = bench(make);
    let batches: Vec<_> = (0..BATCHES).map(|_| bench.batch(&[100])).collect();
    assert!(bench.engine.take_batch().is_none());
    let vnet_packets: Vec<_> = (0..VNET_PACKETS)
        .map(|_| bench.engine.take_vnet_packet())
        .collect();
    assert!(vnet_packets.iter().all(Option::is_some));
    assert!(bench.engine.take_vnet_packet().is_none());
    // Whoever asked for a batch counts for itself.
    assert_eq!(bench.counters.snapshot().drop_no_buffer, 1);
    let peer = bench.peer.local_addr().unwrap();
    for (batch, vnet_packet) in batches.into_iter().zip(vnet_packets) {
        bench.engine.send(batch, from_listen(peer));
        bench.engine.write(vnet_packet.unwrap());
    }
    // All that the kernel has taken is there again.
    assert!(bench.engine.take_batch().is_some());
    assert!(bench.engine.take_vnet_packet().is_some());
}

fn a_device_that_goes_is_an_error<E: Engine>(make: impl Fn(Parts) -> E) {
    // As unreadable as the queue of a device that was deleted.
    let (_readable, unreadable) = nix::unistd::pipe().unwrap();
    let queue = Queue::from(unreadable);
    let mut bench = bench(|parts| make(Parts { queue, ..parts }));
    assert!(!bench.engine.has_event());
    let text = bench.engine.submit().unwrap_err().to_string();
    assert!(
        text.contains("TUN queue") && text.contains("interface"),
        "{text}"
    );
}

#[derive(Clone, Debug)]
enum Step {
    VnetPacket(usize),
    Datagram(usize),
    /// Ask for an event; keep its buffer until the next step that takes one.
    Take,
    Poll,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        (1usize..1500).prop_map(Step::VnetPacket),
        (0usize..1500).prop_map(Step::Datagram),
        Just(Step::Take),
        Just(Step::Poll),
    ];
    prop::collection::vec(step, 0..60)
}

/// However arrivals, questions and late returns of buffers mix, all that
/// arrives is seen, once, unchanged and in the order of its side.
fn nothing_is_missed<E: Engine>(make: impl Fn(Parts) -> E) {
    let config = ProptestConfig::with_cases(100);
    let result = TestRunner::new(config).run(&steps(), |steps| {
        let mut bench = bench(&make);
        let mut expected = [VecDeque::new(), VecDeque::new()];
        let mut kept: Option<Received> = None;
        for (number, step) in steps.into_iter().enumerate() {
            match step {
                Step::VnetPacket(bytes) => {
                    let vnet_packet = vec![number as u8; bytes];
                    write(&bench.device, &vnet_packet).unwrap();
                    expected[1].push_back(vnet_packet);
                }
                Step::Datagram(bytes) => {
                    let datagram = vec![number as u8; bytes];
                    bench.peer.send_to(&datagram, bench.address).unwrap();
                    expected[0].push_back(datagram);
                }
                Step::Take => {
                    let event = bench.engine.next_event();
                    if let Some(received) = kept.take() {
                        bench.engine.recycle(received);
                    }
                    if let Some(event) = event {
                        let (is_vnet_packet, received) = bytes_of(event);
                        let expected = expected[usize::from(is_vnet_packet)].pop_front();
                        prop_assert_eq!(received.bytes(), expected.unwrap());
                        kept = Some(received);
                    }
                }
                Step::Poll => drop(bench.engine.poll().unwrap()),
            }
        }
        if let Some(received) = kept.take() {
            bench.engine.recycle(received);
        }
        for (is_vnet_packet, bytes) in bench.drain() {
            let expected = expected[usize::from(is_vnet_packet)].pop_front();
            prop_assert_eq!(Some(bytes), expected);
        }
        prop_assert!(expected.iter().all(VecDeque::is_empty));
        Ok(())
    });
    result.unwrap();
}

fn polling_hears_of_news<E: Engine>(make: impl Fn(Parts) -> E) {
    let mut bench = bench(make);
    // Both sides are found empty, and waited for.
    assert!(!bench.engine.poll().unwrap());
    assert!(!bench.engine.poll().unwrap());
    write(&bench.device, &[7; 60]).unwrap();
    assert!(bench.engine.poll().unwrap());
    let (is_vnet_packet, received) = bytes_of(bench.engine.next_event().unwrap());
    assert!(is_vnet_packet);
    bench.engine.recycle(received);
    bench.wake.write(1).unwrap();
    assert!(bench.engine.poll().unwrap());
    assert!(matches!(bench.engine.next_event(), Some(Event::Wake)));
}

fn once_quiet_nothing_new_is_read<E: Engine>(make: impl Fn(Parts) -> E) {
    let mut bench = bench(make);
    write(&bench.device, &[1; 60]).unwrap();
    assert!(bench.engine.has_event());
    bench.engine.quiesce();
    write(&bench.device, &[2; 60]).unwrap();
    bench.peer.send_to(&[3; 60], bench.address).unwrap();
    // What was taken before is still there, and output is carried out.
    let (_, received) = bytes_of(bench.engine.next_event().unwrap());
    assert_eq!(received.bytes(), [1; 60]);
    bench.engine.recycle(received);
    let peer = bench.peer.local_addr().unwrap();
    let batch = bench.batch(&[9]);
    bench.engine.send(batch, from_listen(peer));
    bench.engine.submit().unwrap();
    assert_eq!(bench.peer.recv(&mut [0; 10]).unwrap(), 9);
    assert!(!bench.engine.has_event());
}

/// Only [`Engine::submit`] makes system calls for little output.
#[test]
fn on_a_ring_output_waits_for_submit() {
    if let Err(error) = uring::probe(1) {
        eprintln!("not tested: {error}");
        return;
    }
    let mut bench = bench(uring_parts);
    assert!(bench.drain().is_empty());
    bench.peer.set_nonblocking(true).unwrap();
    let peer = bench.peer.local_addr().unwrap();
    let batch = bench.batch(&[100]);
    bench.engine.send(batch, from_listen(peer));
    let vnet_packet = bench.engine.take_vnet_packet().unwrap();
    bench.engine.write(vnet_packet);
    assert!(!bench.engine.has_event() && bench.engine.next_event().is_none());
    assert!(bench.engine.take_batch().is_some());
    let mut buffer = [0; 200];
    assert!(bench.peer.recv(&mut buffer).is_err() && read(&bench.device, &mut buffer).is_err());
    bench.engine.submit().unwrap();
    assert_eq!(bench.peer.recv(&mut buffer).unwrap(), 100);
    assert!(read(&bench.device, &mut buffer).is_ok());
}
