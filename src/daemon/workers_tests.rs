use std::net::UdpSocket;
use std::os::fd::OwnedFd;
use std::time::Instant;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use nix::unistd::{read, write};

use super::*;
use crate::packet::coalesce::TunOffloads;
use crate::packet::icmp::TunnelAddresses;
use crate::routing::overlay::Overlay;

const PATIENCE: Duration = Duration::from_secs(30);

fn table() -> Arc<Table> {
    Arc::new(Overlay::default().table(TunnelAddresses::default(), false))
}

/// A worker with this queue and this socket.
fn worker(io: Io, queue: OwnedFd, receive: OwnedFd) -> Result<Workers> {
    let mut config = Config::default();
    config.io = io;
    let claimed = Claimed {
        device: Tun {
            queues: vec![Queue::from(queue)],
            offloads: TunOffloads {
                tcp: true,
                udp: true,
            },
            steered: true,
        },
        sockets: udp::Sockets {
            workers: vec![WorkerSockets::new(receive.into(), None)],
            handshake: None,
            offloads: UdpOffloads {
                segment: false,
                gro: false,
            },
        },
    };
    Workers::new(&config, claimed, table(), bounded(1).0, None)
}

fn socket() -> UdpSocket {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.set_nonblocking(true).unwrap();
    socket
}

/// Workers, and another descriptor of each thing that they have.
struct Scene {
    workers: Workers,
    queue: OwnedFd,
    /// The other end of the queue.
    device: OwnedFd,
    socket: UdpSocket,
}

impl Scene {
    /// One for each engine that this host has.
    fn for_each_engine(test: impl Fn(Self)) {
        for io in [Io::Epoll, Io::Uring] {
            if io == Io::Uring && uring::probe(1).is_err() {
                continue;
            }
            let flags = SockFlag::SOCK_NONBLOCK;
            let (queue, device) =
                socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).unwrap();
            let socket = socket();
            let receive = socket.try_clone().unwrap();
            let other = queue.try_clone().unwrap();
            test(Self {
                workers: worker(io, queue, receive.into()).unwrap(),
                queue: other,
                device,
                socket,
            });
        }
    }

    /// Sends the worker a datagram from an address that no peer has.
    fn send(&self) {
        let to = self.socket.local_addr().unwrap();
        self.socket.send_to(&[1; 60], to).unwrap();
    }

    /// Waits until the worker has received so many of them.
    fn wait_for(&self, count: u64) {
        let deadline = Instant::now() + PATIENCE;
        while self.workers.snapshots()[0].drop_sender_unknown < count {
            assert!(Instant::now() < deadline);
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// Another process goes on with what they have not read.
#[test]
fn workers_that_never_started_read_nothing() {
    Scene::for_each_engine(|scene| {
        write(&scene.device, &[1; 60]).unwrap();
        scene.send();
        drop(scene.workers);
        assert_eq!(read(&scene.queue, &mut [0; 100]), Ok(60));
        assert_eq!(scene.socket.recv(&mut [0; 100]).unwrap(), 60);
    });
}

/// As after a takeover that came to nothing: what has come meanwhile waits.
#[test]
fn stopped_workers_start_again_with_their_counters() {
    Scene::for_each_engine(|mut scene| {
        scene.workers.go();
        scene.send();
        scene.wait_for(1);
        scene.workers.stop();
        scene.send();
        scene.workers.publish(table());
        scene.workers.start().unwrap();
        scene.workers.go();
        scene.wait_for(2);
    });
}

#[test]
fn no_worker_keeps_the_table_before_a_published_one() {
    Scene::for_each_engine(|mut scene| {
        scene.workers.go();
        for _ in 0..3 {
            let old = Arc::downgrade(&scene.workers.setup.table);
            scene.workers.publish(table());
            assert!(old.upgrade().is_none());
        }
    });
}

/// A service manager's watchdog hears nothing of a worker that is stuck.
#[test]
fn a_worker_answers_when_it_runs() {
    Scene::for_each_engine(|mut scene| {
        let asked = scene.workers.ask_all();
        // It waits for the word to start.
        let none = asked.recv_timeout(Duration::from_millis(50));
        assert_eq!(none, Err(RecvTimeoutError::Timeout));
        scene.workers.go();
        for asked in [asked, scene.workers.ask_all()] {
            let ended = asked.recv_timeout(PATIENCE);
            assert_eq!(ended, Err(RecvTimeoutError::Disconnected));
        }
    });
}

/// One that is stuck keeps no table but the newest, which it takes at last.
#[test]
fn commands_do_not_pile_up() {
    Scene::for_each_engine(|mut scene| {
        let workers = &mut scene.workers;
        let first = Arc::downgrade(&workers.setup.table);
        let offered: Vec<_> = (0..10)
            .map(|_| {
                let table = table();
                let weak = Arc::downgrade(&table);
                workers.reset_limits();
                (workers.offer(table), weak)
            })
            .collect();
        assert_eq!(lock(&workers.handles)[0].commands.len(), 2);
        workers.setup.table = table();
        let kept = offered.iter().filter(|(_, weak)| weak.strong_count() > 0);
        assert_eq!(kept.count(), 1);
        workers.go();
        let (in_force, older) = &offered[0];
        assert!(in_force.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Disconnected));
        assert!(older.upgrade().is_none());
        let deadline = Instant::now() + PATIENCE;
        while first.upgrade().is_some() {
            assert!(Instant::now() < deadline);
            std::thread::sleep(Duration::from_millis(1));
        }
        let newest = &offered[9].1;
        // What is published, and the worker's.
        assert_eq!(newest.strong_count(), 2);
    });
}

/// Its queue is as unreadable as that of a device that was deleted.
#[test]
fn a_worker_that_fails_says_why() {
    let (_readable, unreadable) = nix::unistd::pipe().unwrap();
    let mut workers = worker(Io::Epoll, unreadable, socket().into()).unwrap();
    workers.go();
    let failure = workers.failures.recv_timeout(PATIENCE).unwrap();
    let text = failure.unwrap().to_string();
    assert!(text.contains("TUN queue"), "{text}");
    // A table for a worker that has ended is not waited for.
    workers.publish(table());
    assert!(workers.failures.recv().is_err());
}

/// No epoll takes a file.
#[test]
fn a_worker_that_cannot_start_leaves_nothing_open() {
    let socket = socket();
    let address = socket.local_addr().unwrap();
    let file = tempfile::tempfile().unwrap();
    let text = worker(Io::Epoll, file.into(), socket.into()).err().unwrap();
    let text = text.to_string();
    assert!(text.contains("epoll"), "{text}");
    UdpSocket::bind(address).unwrap();
}

#[test]
fn the_engine_asked_for_is_used() {
    assert!(!is_uring(Io::Epoll));
    assert!(is_uring(Io::Uring));
}
