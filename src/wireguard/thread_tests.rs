//! Two threads with sockets on the loopback interface. The test is their workers.

use std::net::SocketAddr;
use std::sync::atomic::Ordering;

use crossbeam_channel::{Receiver, Sender, bounded};
use nix::sys::eventfd::EfdFlags;

use super::*;
use crate::wire::wireguard::keys::{PresharedKey, PublicKey};
use crate::wire::wireguard::session::OVERHEAD_BYTES;
use crate::wire::wireguard::sessions::{PeerSessions, SessionMap};
use crate::wireguard::{Handshakes, Intervals, Setup};

/// Longer than anything takes, even on a machine that has other things to do.
const WAIT_MAX: Duration = Duration::from_secs(60);

struct End {
    handshakes: Handshakes,
    key: PublicKey,
    socket: Arc<Socket>,
    map: Arc<SessionMap>,
    requests: Sender<WorkerRequest>,
    wake: Arc<EventFd>,
    woken: Receiver<()>,
    passed_on: Receiver<(SocketAddr, Vec<u8>)>,
}

impl End {
    fn start() -> Self {
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.set_nonblocking(true).unwrap();
        let socket = Arc::new(Socket::from(socket));
        let map = Arc::new(SessionMap::new(64));
        let wake = EventFd::from_value_and_flags(0, EfdFlags::EFD_NONBLOCK).unwrap();
        let wake = Arc::new(wake);
        let (requests, receiver) = bounded(16);
        let (wake_workers, woken) = bounded(16);
        let (pass_on, passed_on) = bounded(16);
        let private_key = PrivateKey::generate();
        let key = private_key.public();
        let setup = Setup {
            private_key: Some(private_key),
            earlier: Vec::new(),
            intervals: Intervals::STANDARD,
            socket: Arc::clone(&socket),
            map: Arc::clone(&map),
            requests: receiver,
            wake: Arc::clone(&wake),
            wake_workers: Box::new(move || {
                let _ = wake_workers.try_send(());
            }),
            pass_on: Box::new(move |from, datagram| {
                let _ = pass_on.try_send((from.address, datagram.to_vec()));
            }),
        };
        Self {
            handshakes: Handshakes::start(setup).unwrap(),
            key,
            socket,
            map,
            requests,
            wake,
            woken,
            passed_on,
        }
    }

    fn address(&self) -> SocketAddr {
        self.socket.local_addr().unwrap().as_socket().unwrap()
    }

    fn peer(&self, far: &Self) -> PeerConfig {
        let sessions = PeerSessions::default();
        sessions
            .endpoint
            .store(Some(Arc::new(far.address().into())));
        PeerConfig {
            public_key: far.key,
            preshared_key: PresharedKey::default(),
            is_suspended: false,
            persistent_keepalive: None,
            sessions: Arc::new(sessions),
        }
    }

    fn ask(&self, request: WorkerRequest) {
        self.requests.send(request).unwrap();
        self.wake.write(1).unwrap();
    }

    fn value(&self, name: &str) -> u64 {
        let mut values = self.handshakes.counters().values();
        values.find(|(it, _)| *it == name).unwrap().1
    }
}

#[test]
fn two_threads_make_a_session_and_end_it() {
    let (near, far) = (End::start(), End::start());
    let (to_far, to_near) = (near.peer(&far), far.peer(&near));
    near.handshakes.set_peers(vec![to_far.clone()]);
    far.handshakes.set_peers(vec![to_near.clone()]);
    // A worker wants a session, and is woken when it is there.
    to_far.sessions.is_wanted.store(true, Ordering::Release);
    near.ask(WorkerRequest::Session(Arc::clone(&to_far.sessions)));
    near.woken.recv_timeout(WAIT_MAX).unwrap();
    assert!(near.handshakes.latest_handshake(&far.key).is_some());
    assert!(far.handshakes.latest_handshake(&near.key).is_none());
    let session = to_far.sessions.usable(clock::now_ns()).clone().unwrap();
    let mut datagram = vec![0; OVERHEAD_BYTES + 16];
    let datagram_bytes = datagram.len();
    session.seal(&mut datagram, datagram_bytes).unwrap();
    let to = far.address().into();
    near.socket.send_to(&datagram, &to).unwrap();
    // There are no other sockets on its port, so it comes to the thread, which passes it on.
    let (from, mut datagram) = far.passed_on.recv_timeout(WAIT_MAX).unwrap();
    assert_eq!(from, near.address());
    let far_session = far.map.get(session.remote_index()).clone().unwrap();
    assert!(far_session.open(&mut datagram).is_ok());
    assert!(to_near.sessions.confirm(&far_session));
    far.handshakes.set_peers(vec![to_near.clone()]);
    assert!(far.handshakes.latest_handshake(&near.key).is_some());
    // A removed peer's session goes, and those of a thread that ends.
    far.handshakes.set_peers(vec![]);
    assert!(far.map.get(far_session.local_index()).is_none());
    assert!(to_near.sessions.current.load().is_none());
    drop(near.handshakes);
    assert!(near.map.get(session.local_index()).is_none());
    assert!(to_far.sessions.current.load().is_none());
}

#[test]
fn what_workers_pass_on_is_as_what_comes_to_the_socket() {
    let end = End::start();
    let message = vec![1, 0, 0, 0, 9].into_boxed_slice();
    let (from, other) = (end.address(), End::start());
    end.ask(WorkerRequest::Message(from.into(), message));
    other.socket.send_to(&[1, 2, 3], &from.into()).unwrap();
    while end.value("drop_malformed") < 2 {
        std::thread::yield_now();
    }
}

#[test]
fn another_socket_takes_the_place_of_the_first() {
    let (end, other) = (End::start(), End::start());
    let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.set_nonblocking(true).unwrap();
    let address = socket.local_addr().unwrap();
    end.handshakes.set_socket(Arc::new(Socket::from(socket)));
    other.socket.send_to(&[1, 2, 3], &address.into()).unwrap();
    while end.value("drop_malformed") < 1 {
        std::thread::yield_now();
    }
}
