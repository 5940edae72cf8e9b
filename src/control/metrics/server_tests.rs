//! Real connections over the loopback interface, with a control thread of the test's.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown};

use super::*;
use crate::control::metrics::{Readiness, Snapshot};
use crate::control::protocol::{PeerStatus, Status as TunnelStatus};

/// How long anything that must happen may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// A server, and a thread that answers what it asks.
struct Scene {
    address: SocketAddr,
    server: Option<Server>,
    answering: Option<JoinHandle<usize>>,
}

impl Scene {
    /// One whose snapshots have so many peers.
    fn new(readiness: Readiness, peers: usize) -> Self {
        let socket = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = socket.local_addr().unwrap();
        let server = Server::start(Listener::new(socket, address)).unwrap();
        let calls = server.calls.clone();
        let answering = std::thread::spawn(move || {
            let answer = |call| match call {
                Call::Snapshot(answer) => answer.send(Box::new(snapshot(readiness, peers))).is_ok(),
                Call::Readiness(answer) => answer.send(readiness).is_ok(),
            };
            calls.iter().map(answer).count()
        });
        Self {
            address,
            server: Some(server),
            answering: Some(answering),
        }
    }

    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    /// What is answered to a request, all of it.
    fn ask(&self, request: impl AsRef<[u8]>) -> String {
        let mut stream = self.connect();
        stream.write_all(request.as_ref()).unwrap();
        rest(stream)
    }

    /// Ends the server: how many calls there were.
    fn end(mut self) -> usize {
        drop(self.server.take());
        self.answering.take().unwrap().join().unwrap()
    }
}

fn snapshot(readiness: Readiness, peers: usize) -> Snapshot {
    let peer = |number: usize| PeerStatus {
        peer: format!("10.0.{}.{}:8285", number / 256, number % 256),
        ..PeerStatus::default()
    };
    Snapshot {
        taken_at: std::time::SystemTime::now(),
        status: TunnelStatus::default(),
        peers: (0..peers).map(peer).collect(),
        readiness,
    }
}

/// All that comes until the end.
fn rest(mut stream: TcpStream) -> String {
    let mut text = Vec::new();
    stream.read_to_end(&mut text).unwrap();
    String::from_utf8(text).unwrap()
}

fn get(path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n")
}

#[test]
fn pages_are_served() {
    let scene = Scene::new(Ok(()), 3);
    let page = scene.ask(get("/metrics"));
    assert!(page.starts_with("HTTP/1.1 200 OK\r\nContent-Type: text/plain; version=0.0.4;"));
    assert!(page.contains("\nfastvpn_ready 1\n"), "{page}");
    assert!(page.contains("fastvpn_peer_sent_packets_total{peer=\"10.0.0.2:8285\"} 0\n"));
    let (head, body) = page.split_once("\r\n\r\n").unwrap();
    assert!(
        head.contains(&format!("Content-Length: {}", body.len())),
        "{head}"
    );
    let only_head = scene.ask("HEAD /metrics HTTP/1.1\r\n\r\n");
    assert_eq!(only_head, format!("{head}\r\n\r\n"));
    assert!(scene.ask(get("/readyz")).ends_with("\r\n\r\nready\n"));
    assert!(scene.ask(get("/healthz")).ends_with("\r\n\r\nok\n"));
    for (request, status) in [
        (get("/"), "404"),
        (get("/metrics").replace("GET", "DELETE"), "405"),
        ("nonsense\r\n\r\n".into(), "400"),
        ("x".repeat(100_000), "400"),
    ] {
        let answer = scene.ask(&request);
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status} ")),
            "{answer}"
        );
    }
    // HEAD is answered from what GET has made, unless that has taken too long.
    assert!((3..=4).contains(&scene.end()));
}

/// However often they are asked for, the control thread makes them once a second; and nobody
/// gets older ones.
#[test]
fn numbers_are_shared_for_a_second() {
    const TIMES: usize = 100;
    let scene = Scene::new(Ok(()), 3);
    let begun = Instant::now();
    for _ in 0..TIMES / 2 {
        let page = scene.ask(get("/metrics"));
        let head = scene.ask("HEAD /metrics HTTP/1.1\r\n\r\n");
        assert!(page.starts_with(&head) && page.len() > head.len());
    }
    let made_max = 1 + begun.elapsed().as_secs() as usize;
    let made = scene.end();
    assert!((1..=made_max).contains(&made), "{made} of {TIMES}");

    let scene = Scene::new(Ok(()), 3);
    scene.ask(get("/metrics"));
    let answered = Instant::now();
    while answered.elapsed() <= PAGE_TIME_MAX {
        scene.ask(get("/metrics"));
    }
    scene.ask(get("/metrics"));
    assert!(scene.end() > 1);
}

#[test]
fn one_that_is_not_ready_says_why() {
    let scene = Scene::new(Err("it snows"), 0);
    let answer = scene.ask(get("/readyz"));
    assert!(
        answer.starts_with("HTTP/1.1 503 ") && answer.ends_with("\nit snows\n"),
        "{answer}"
    );
    assert!(scene.ask(get("/healthz")).starts_with("HTTP/1.1 200 "));
    assert!(scene.ask(get("/metrics")).contains("\nfastvpn_ready 0\n"));
}

/// Those that say nothing, half of something, or do not read what they are told.
#[test]
fn slow_clients_keep_nobody_waiting_for_long() {
    let scene = Scene::new(Ok(()), 5_000);
    for say in ["", "GET /metr", &get("/metrics")] {
        let crowd: Vec<_> = (0..3 * CLIENTS_MAX).map(|_| scene.connect()).collect();
        for mut stream in &crowd {
            // One that has lost its place may be told so already.
            let _ = stream.write_all(say.as_bytes());
        }
        // On a busy machine it may take so long that it loses its place, too.
        let (mut answer, deadline) = (String::new(), Instant::now() + PATIENCE);
        while !answer.starts_with("HTTP/1.1 200 ") {
            assert!(Instant::now() < deadline, "{answer}");
            answer.clear();
            let mut stream = scene.connect();
            let sent = stream.write_all(get("/healthz").as_bytes());
            let _ = sent.and_then(|()| stream.read_to_string(&mut answer));
        }
        drop(crowd);
    }
    // Alone, they are given up all the same.
    assert_eq!(rest(scene.connect()), "");
}

/// A client may close its side early, and may send more than it should.
#[test]
fn a_response_is_not_lost_over_what_else_a_client_sends() {
    let scene = Scene::new(Ok(()), 5_000);
    let mut early = scene.connect();
    early.write_all(get("/metrics").as_bytes()).unwrap();
    early.shutdown(Shutdown::Write).unwrap();
    let whole = rest(early);
    assert!(whole.ends_with('\n') && whole.len() > 1_000_000);
    let more = scene.ask(get("/metrics") + &"x".repeat(30_000));
    assert_eq!(more.len(), whole.len());
}

/// As at the end, or in a takeover.
#[test]
fn who_gets_no_answer_is_told() {
    let socket = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = socket.local_addr().unwrap();
    let asked = || {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(get("/healthz").as_bytes()).unwrap();
        stream
    };
    let first = Server::start(Listener::new(socket, address)).unwrap();
    let stream = asked();
    while first.calls.is_empty() {
        std::thread::yield_now();
    }
    let listener = first.end();
    assert!(rest(stream).starts_with("HTTP/1.1 503 "));
    // Whoever comes now waits for the next one who serves.
    let stream = asked();
    let next = Server::start(listener).unwrap();
    match next.calls.recv_timeout(PATIENCE).unwrap() {
        Call::Readiness(answer) => answer.send(Ok(())).unwrap(),
        call => panic!("{call:?}"),
    }
    assert!(rest(stream).starts_with("HTTP/1.1 200 "));
}

#[test]
fn a_taken_port_is_an_error() {
    let socket = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = socket.local_addr().unwrap();
    let everywhere = SocketAddr::from((Ipv4Addr::UNSPECIFIED, address.port()));
    for (wanted, old, hint) in [
        (address, None, "another process listens there".into()),
        // A takeover, from or to all addresses of the port.
        (
            everywhere,
            Some(address),
            format!("has the port, at {address}: "),
        ),
    ] {
        let error = Listener::bind(wanted, old).err().unwrap().to_string();
        let expected = format!("cannot serve metrics at {wanted}: address already in use; ");
        assert!(error.starts_with(&expected), "{error}");
        assert!(error.contains(&hint), "{error}");
    }
    drop(socket);
    assert!(Listener::bind(address, None).is_ok());
}
