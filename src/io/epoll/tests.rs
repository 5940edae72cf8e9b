//! The engine between a pair of Unix sockets, in the place of a TUN queue and
//! its device, and UDP sockets of the loopback interface.

use std::collections::VecDeque;
use std::net::UdpSocket;
use std::os::fd::OwnedFd;
use std::time::Duration;

use nix::sys::eventfd::EfdFlags;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, setsockopt, socketpair, sockopt};
use nix::unistd::{read, write};
use proptest::prelude::*;
use socket2::{Domain, SockAddr, Socket, Type};

use super::*;
use crate::io::engine::Port;

/// An engine and what is at the other ends of its descriptors.
struct Bench {
    engine: Epoll,
    device: OwnedFd,
    peer: UdpSocket,
    address: SocketAddr,
    wake: Arc<EventFd>,
    counters: Arc<Counters>,
}

fn from_listen(endpoint: SocketAddr) -> Destination {
    Destination {
        endpoint,
        from: Port::Listen,
    }
}

fn bench() -> Bench {
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let (queue, device) =
        socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).unwrap();
    let receive = Socket::new(Domain::IPV4, Type::DGRAM, None).unwrap();
    receive.set_nonblocking(true).unwrap();
    let any: SocketAddr = "127.0.0.1:0".parse().unwrap();
    receive.bind(&SockAddr::from(any)).unwrap();
    setsockopt(&receive, sockopt::UdpGroSegment, &true).unwrap();
    let address = receive.local_addr().unwrap().as_socket().unwrap();
    let peer = UdpSocket::bind("127.0.0.1:0").unwrap();
    peer.set_read_timeout(Some(Duration::from_secs(10)))
        .unwrap();
    let wake = EventFd::from_value_and_flags(0, EfdFlags::EFD_NONBLOCK).unwrap();
    let wake = Arc::new(wake);
    let counters = Arc::new(Counters::default());
    let engine = Epoll::new(
        Queue::from(queue),
        WorkerSockets {
            receive,
            send: None,
        },
        Arc::clone(&wake),
        Limits::FULL,
        Arc::clone(&counters),
    );
    Bench {
        engine: engine.unwrap(),
        device,
        peer,
        address,
        wake,
        counters,
    }
}

impl Bench {
    /// Takes events, and gives their buffers back, until there are no more.
    fn drain(&mut self) -> Vec<(Source, Vec<u8>)> {
        let mut seen = Vec::new();
        loop {
            let had = self.engine.poll().unwrap();
            match self.engine.next_event() {
                Some(Event::Frame(received)) => {
                    seen.push((Source::Tun, received.bytes().to_vec()));
                    self.engine.recycle(received, Source::Tun);
                }
                Some(Event::Datagrams { received, .. }) => {
                    seen.push((Source::Udp, received.bytes().to_vec()));
                    self.engine.recycle(received, Source::Udp);
                }
                Some(Event::Wake | Event::SendFailed(_)) => panic!("nobody has called"),
                None => {
                    assert!(!had, "an event was promised");
                    // What came while the engine was not looking: an edge.
                    self.engine.ask(EpollTimeout::ZERO).unwrap();
                    if !self.engine.poll().unwrap() {
                        return seen;
                    }
                }
            }
        }
    }

    fn train(&mut self, sizes: &[usize]) -> Train {
        let mut train = self.engine.take_train().unwrap();
        train.start(0, self.engine.limits(([127, 0, 0, 1], 1).into()));
        for (index, &bytes) in sizes.iter().enumerate() {
            train.reserve(bytes).unwrap().fill(index as u8);
        }
        train
    }
}

#[test]
fn both_sides_have_their_turns() {
    let mut bench = bench();
    for number in 0..5 {
        write(&bench.device, &[number; 30]).unwrap();
        // Unequal, lest the kernel merge them.
        let datagram = vec![number; 100 - usize::from(number)];
        bench.peer.send_to(&datagram, bench.address).unwrap();
    }
    let seen = bench.drain();
    let sides: Vec<Source> = seen.iter().map(|(source, _)| *source).collect();
    assert_eq!(sides, [Source::Tun, Source::Udp].repeat(5));
    let numbers: Vec<u8> = seen.iter().map(|(_, bytes)| bytes[0]).collect();
    assert_eq!(numbers, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]);
}

#[test]
fn sleeps_until_something_comes() {
    let mut bench = bench();
    assert!(bench.drain().is_empty());
    let device = bench.device.try_clone().unwrap();
    let late = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(20));
        write(device, &[7; 30]).unwrap();
    });
    bench.engine.wait().unwrap();
    late.join().unwrap();
    assert_eq!(bench.drain(), [(Source::Tun, vec![7; 30])]);
    // Once for all commands: the worker takes all there are.
    for _ in 0..3 {
        bench.wake.write(1).unwrap();
    }
    bench.engine.wait().unwrap();
    assert!(bench.engine.poll().unwrap());
    assert!(matches!(bench.engine.next_event(), Some(Event::Wake)));
    assert!(bench.drain().is_empty());
}

#[test]
fn a_call_is_heard_under_load() {
    let mut bench = bench();
    bench.wake.write(1).unwrap();
    let frame = [1; 1500];
    let mut frames = 0;
    loop {
        assert!(frames * EVENT_BYTES_MIN <= 2 * UNASKED_BYTES_MAX, "unheard");
        write(&bench.device, &frame).unwrap();
        match bench.engine.next_event() {
            Some(Event::Frame(received)) => bench.engine.recycle(received, Source::Tun),
            Some(Event::Wake) => break,
            event => panic!("{event:?}"),
        }
        frames += 1;
    }
    assert!(frames > 1);
}

#[test]
fn trains_go_out_and_come_in_whole() {
    let mut bench = bench();
    let peer = bench.peer.local_addr().unwrap();
    for sizes in [&[500; 3][..], &[400, 400, 100], &[700], &[20; 128]] {
        let train = bench.train(sizes);
        bench.engine.send(train, from_listen(peer));
        let mut buffer = [0; 2000];
        for (index, &bytes) in sizes.iter().enumerate() {
            let (received, from) = bench.peer.recv_from(&mut buffer).unwrap();
            assert_eq!((received, from), (bytes, bench.address));
            assert!(buffer[..bytes].iter().all(|&byte| byte == index as u8));
        }
        // The same to itself: the loopback interface does not cut it up.
        let train = bench.train(sizes);
        bench.engine.send(train, from_listen(bench.address));
        bench.engine.wait().unwrap();
        let Some(Event::Datagrams {
            received,
            sender,
            segment_bytes,
        }) = bench.engine.next_event()
        else {
            panic!("nothing came in");
        };
        assert_eq!(sender, bench.address);
        assert_eq!(segment_bytes, sizes[0]);
        assert_eq!(received.bytes().len(), sizes.iter().sum::<usize>());
        bench.engine.recycle(received, Source::Udp);
    }
    let snapshot = bench.counters.snapshot();
    assert_eq!((snapshot.trains_sent, snapshot.packets_sent), (8, 270));
    assert_eq!(snapshot.drops().next(), None);
}

#[test]
fn an_empty_train_is_not_sent_and_not_lost() {
    let mut bench = bench();
    for _ in 0..2 * output::TRAINS {
        let train = bench.train(&[]);
        bench.engine.send(train, from_listen(bench.address));
    }
    assert_eq!(bench.counters.snapshot(), Counters::default().snapshot());
}

#[test]
fn a_full_queue_costs_frames_and_no_buffers() {
    let mut bench = bench();
    let mut written = 0;
    while bench.counters.snapshot().drop_tun_full < 3 {
        let frame = bench.engine.take().unwrap();
        bench.engine.put(frame);
        written += 1;
        assert!(written < 10_000, "the socket holds any number of frames");
    }
    let snapshot = bench.counters.snapshot();
    assert_eq!(snapshot.tun_frames_written, written - 3);
    let mut buffer = [0; 100];
    let there = std::iter::from_fn(|| read(&bench.device, &mut buffer).ok());
    assert_eq!(there.take(10_000).count() as u64, written - 3);
}

#[test]
fn a_device_that_goes_is_an_error() {
    let mut bench = bench();
    // As unreadable as the queue of a device that was deleted.
    let unreadable = std::fs::File::options()
        .write(true)
        .open("/dev/null")
        .unwrap();
    bench.engine.queue = Queue::from(OwnedFd::from(unreadable));
    let text = bench.engine.poll().unwrap_err().to_string();
    assert!(
        text.contains("TUN queue") && text.contains("interface"),
        "{text}"
    );
}

#[derive(Clone, Debug)]
enum Step {
    Frame(usize),
    Datagram(usize),
    /// Ask for an event; keep its buffer until the next step that takes one.
    Take,
    Ask,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        (1usize..1500).prop_map(Step::Frame),
        (0usize..1500).prop_map(Step::Datagram),
        Just(Step::Take),
        Just(Step::Ask),
    ];
    prop::collection::vec(step, 0..60)
}

proptest! {
    /// However arrivals, questions and late returns of buffers mix, all that
    /// arrives is seen, once, unchanged and in the order of its side.
    #[test]
    fn nothing_is_missed(steps in steps()) {
        let mut bench = bench();
        let (mut frames, mut datagrams) = (VecDeque::new(), VecDeque::new());
        let mut kept = None;
        for (number, step) in steps.into_iter().enumerate() {
            match step {
                Step::Frame(bytes) => {
                    let frame = vec![number as u8; bytes];
                    write(&bench.device, &frame).unwrap();
                    frames.push_back(frame);
                }
                Step::Datagram(bytes) => {
                    let datagram = vec![number as u8; bytes];
                    bench.peer.send_to(&datagram, bench.address).unwrap();
                    datagrams.push_back(datagram);
                }
                Step::Take => {
                    let event = bench.engine.next_event();
                    if let Some((received, source)) = kept.take() {
                        bench.engine.recycle(received, source);
                    }
                    match event {
                        Some(Event::Frame(received)) => {
                            prop_assert_eq!(received.bytes(), frames.pop_front().unwrap());
                            kept = Some((received, Source::Tun));
                        }
                        Some(Event::Datagrams { received, .. }) => {
                            prop_assert_eq!(received.bytes(), datagrams.pop_front().unwrap());
                            kept = Some((received, Source::Udp));
                        }
                        Some(Event::Wake | Event::SendFailed(_)) => prop_assert!(false, "nobody has called"),
                        None => {}
                    }
                }
                Step::Ask => {
                    bench.engine.poll().unwrap();
                    bench.engine.ask(EpollTimeout::ZERO).unwrap();
                }
            }
        }
        if let Some((received, source)) = kept.take() {
            bench.engine.recycle(received, source);
        }
        for (source, bytes) in bench.drain() {
            let expected = match source {
                Source::Tun => frames.pop_front(),
                Source::Udp => datagrams.pop_front(),
            };
            prop_assert_eq!(Some(bytes), expected);
        }
        prop_assert!(frames.is_empty() && datagrams.is_empty());
    }
}

#[test]
fn looking_hears_of_news() {
    let mut bench = bench();
    // Both sides are found empty.
    assert!(!bench.engine.look().unwrap());
    write(&bench.device, &[7; 60]).unwrap();
    assert!(bench.engine.look().unwrap());
    assert!(matches!(bench.engine.next_event(), Some(Event::Frame(_))));
    bench.wake.write(1).unwrap();
    assert!(bench.engine.look().unwrap());
    assert!(matches!(bench.engine.next_event(), Some(Event::Wake)));
}
