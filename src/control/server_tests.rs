//! The server with a control thread of the tests' own: clients that are many, slow,
//! hostile or gone.

use std::io::{BufRead, BufReader, Write};
use std::net::Shutdown;
use std::path::PathBuf;
use std::sync::mpsc;

use serde_json::Value;
use tempfile::TempDir;

use super::*;
use crate::control::protocol::{Changed, Found, Status};
use crate::control::socket_name::inode;
use crate::control::socket_name::tests::{entries, place, without_calls};

/// How long anything that must happen may take before a test fails.
const PATIENCE: Duration = Duration::from_secs(30);

const STATUS: &[u8] = b"{\"command\":\"status\"}\n";
const PEERS: &[u8] = b"{\"command\":\"peers\"}\n";

/// A server whose control thread answers, until the end of the test.
struct Served {
    path: PathBuf,
    end: Option<mpsc::Sender<()>>,
    control: Option<JoinHandle<()>>,
    _directory: TempDir,
}

impl Served {
    fn new(answer: impl Fn(Request) -> Result<Answer> + Send + 'static) -> Self {
        Self::with_unread_bytes_max(UNREAD_BYTES_MAX, answer)
    }

    fn with_unread_bytes_max(
        unread_bytes_max: usize,
        answer: impl Fn(Request) -> Result<Answer> + Send + 'static,
    ) -> Self {
        let (directory, path) = place();
        let (listener, name) = socket_name::listen(&path, CONNECTIONS_MAX as i32).unwrap();
        let server = Server::serve(listener, name, unread_bytes_max).unwrap();
        let (end, ended) = mpsc::channel();
        let control = std::thread::spawn(move || {
            while ended.try_recv() == Err(mpsc::TryRecvError::Empty) {
                match server.calls.recv_timeout(Duration::from_millis(5)) {
                    Ok(Call::Request(request, reply)) => reply.send(answer(request)),
                    Ok(Call::Takeover(..) | Call::Capture(..)) | Err(_) => {}
                }
            }
        });
        Self {
            path,
            end: Some(end),
            control: Some(control),
            _directory: directory,
        }
    }

    fn client(&self) -> Client {
        Client::new(&self.path)
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        drop(self.end.take());
        let ended = self.control.take().map(JoinHandle::join);
        if !std::thread::panicking() {
            assert!(matches!(ended, Some(Ok(()))));
        }
    }
}

/// Bytes of the answer to `peers` of [`answer`], at least: more than the
/// socket's buffers hold, many times.
const LONG_BYTES: usize = 2 << 20;

/// `status` names this test; `peers` gets a long answer of another kind;
/// `route-get` gets the address back; everything else is refused.
fn answer(request: Request) -> Result<Answer> {
    match request {
        Request::Status {} => Ok(Answer::Status(Box::new(Status {
            tun: "unit0".into(),
            ..Status::default()
        }))),
        Request::Peers {} => Ok(Answer::Status(Box::new(Status {
            offloads: "x".repeat(LONG_BYTES),
            ..Status::default()
        }))),
        Request::RouteGet { address } => Ok(Answer::Found(Found {
            address,
            prefix: None,
            peer: "somebody".into(),
            endpoint: None,
        })),
        other => Err(Error::new(format!("no: {other:?}"))),
    }
}

struct Client(BufReader<UnixStream>);

impl Client {
    fn new(path: &Path) -> Self {
        let stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        Self(BufReader::new(stream))
    }

    fn send(&mut self, bytes: &[u8]) {
        self.0.get_mut().write_all(bytes).unwrap();
    }

    /// The next line; `None` at the end.
    fn line(&mut self) -> Option<Value> {
        let mut line = String::new();
        match self.0.read_line(&mut line) {
            Ok(0) => None,
            // Closed with something of ours unread.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => None,
            Ok(_) => Some(serde_json::from_str(&line).unwrap()),
            Err(error) => panic!("no line: {error}"),
        }
    }

    fn is_served(&mut self) {
        self.send(STATUS);
        let answer = self.line().unwrap();
        assert_eq!(
            (&answer["ok"], &answer["tun"]),
            (&true.into(), &"unit0".into())
        );
    }

    /// The next line is a refusal with these words.
    fn is_refused(&mut self, words: &str) {
        let answer = self.line().expect("a line");
        assert_eq!(answer["ok"], false, "{answer}");
        let error = answer["error"].as_str().unwrap();
        assert!(error.contains(words), "{error}");
        assert!(!error.contains('\n'), "{error}");
    }
}

fn wait_until(what: &str, is_so: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < deadline, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn one_connection_too_many_is_told_so() {
    let served = Served::new(answer);
    let mut clients: Vec<_> = (0..CONNECTIONS_MAX).map(|_| served.client()).collect();
    clients.iter_mut().for_each(Client::is_served);
    for _ in 0..100 {
        let mut late = served.client();
        late.is_refused("too many connections");
        assert!(late.line().is_none());
    }
    clients.iter_mut().for_each(Client::is_served);
    // One place is free again, and it is one place.
    drop(clients.pop());
    wait_until("the place of one that left", || {
        let mut next = served.client();
        let _ = next.0.get_mut().write_all(STATUS);
        next.line().is_some_and(|answer| answer["ok"] == true)
    });
    clients.iter_mut().for_each(Client::is_served);
}

#[test]
fn requests_have_a_longest_length() {
    let served = Served::new(answer);
    let mut other = served.client();
    let mut client = served.client();
    // As long as may be, most of it space.
    let mut request = STATUS.to_vec();
    request.splice(
        1..1,
        std::iter::repeat_n(b' ', REQUEST_BYTES_MAX + 1 - STATUS.len()),
    );
    assert_eq!(request.len(), REQUEST_BYTES_MAX + 1);
    client.send(&request);
    assert_eq!(client.line().unwrap()["tun"], "unit0");
    // Without end: the server closes while we still write.
    let mut writer = client.0.get_ref().try_clone().unwrap();
    let endless = std::thread::spawn(move || {
        let block = [b' '; 64 << 10];
        let mut sent_bytes = 0;
        while writer.write_all(&block).is_ok() {
            sent_bytes += block.len();
            assert!(sent_bytes < 4 * REQUEST_BYTES_MAX, "it takes everything");
        }
    });
    client.is_refused("4194304 bytes");
    assert!(client.line().is_none());
    endless.join().unwrap();
    other.is_served();
}

#[test]
fn half_a_request_keeps_only_itself_waiting() {
    let served = Served::new(answer);
    let (half, rest) = STATUS.split_at(STATUS.len() / 2);
    let mut waiting: Vec<_> = (1..CONNECTIONS_MAX).map(|_| served.client()).collect();
    waiting.iter_mut().for_each(|client| client.send(half));
    let mut other = served.client();
    for _ in 0..100 {
        other.is_served();
    }
    for client in &mut waiting {
        client.send(rest);
        assert_eq!(client.line().unwrap()["tun"], "unit0");
    }
}

#[test]
fn a_client_that_does_not_read_keeps_only_itself_waiting() {
    let served = Served::new(answer);
    let mut lazy: Vec<_> = (0..3).map(|_| served.client()).collect();
    lazy.iter_mut().for_each(|client| client.send(PEERS));
    let mut other = served.client();
    for _ in 0..100 {
        other.is_served();
    }
    for client in &mut lazy {
        let answer = client.line().unwrap();
        let long = answer["offloads"].as_str().unwrap();
        assert_eq!(long.len(), LONG_BYTES);
        assert!(long.bytes().all(|byte| byte == b'x'));
        client.is_served();
    }
}

/// While answers of so many bytes are not read, other requests wait; they are served
/// when somebody has read them, or has gone.
#[test]
fn long_answers_are_bounded_together() {
    let served = Served::with_unread_bytes_max(3 * LONG_BYTES, answer);
    let mut lazy: Vec<_> = (0..3).map(|_| served.client()).collect();
    let mut other = served.client();
    for client in &mut lazy {
        other.is_served();
        client.send(PEERS);
        // It is being written.
        assert_eq!(client.0.fill_buf().unwrap()[0], b'{');
    }
    other.send(STATUS);
    let mut late = served.client();
    late.send(STATUS);
    std::thread::sleep(Duration::from_millis(50));
    other.0.get_ref().set_nonblocking(true).unwrap();
    let error = other.0.fill_buf().unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
    other.0.get_ref().set_nonblocking(false).unwrap();
    lazy.pop();
    for client in [&mut other, &mut late] {
        assert_eq!(client.line().unwrap()["tun"], "unit0");
    }
}

#[test]
fn garbage_is_answered_and_forgotten() {
    let served = Served::new(answer);
    let mut client = served.client();
    let deep = |open: &str, close: &str| {
        let depth = 200_000;
        [open.repeat(depth), close.repeat(depth)].concat()
    };
    let in_request = |value: &str| format!("{{\"command\":\"route-del\",\"prefixes\":{value}}}");
    let texts = [
        String::new(),
        " ".into(),
        "\0\0\0".into(),
        "status".into(),
        "null".into(),
        "[]".into(),
        "{}".into(),
        "1e999999".into(),
        "{\"command\":\"status\"".into(),
        "{\"command\":\"status\"}{\"command\":\"status\"}".into(),
        "{\"command\":\"status\"}\0".into(),
        "{\"command\":\"status\",\"command\":\"stop\"}".into(),
        "{\"command\":\"status\",\"more\":1}".into(),
        "{\"command\":\"status\",\"peer\":\"10.0.0.1\"}".into(),
        "{\"command\":\"route-get\"}".into(),
        "{\"command\":\"route-get\",\"address\":null}".into(),
        "{\"command\":\"route-get\",\"address\":1e999}".into(),
        "{\"command\":\"peer-add\",\"peer\":\"a\",\"prefixes\":null}".into(),
        "[\"status\"]".into(),
        "[\"route-get\",\"10.0.0.1\"]".into(),
        "{\"command\":{\"status\":null}}".into(),
        "{\"command\":0}".into(),
        "{\"command\":\"sudo\"}".into(),
        "{\"command\":[\"stop\"]}".into(),
        "{\"command\":\"route-get\",\"address\":\"10.0.0.256\"}".into(),
        "{\"command\":\"route-get\",\"address\":\"\\ud800\"}".into(),
        "{\"command\":\"takeover\",\"protocol\":-1}".into(),
        "{\"command\":\"takeover\",\"protocol\":4294967296}".into(),
        in_request("\"10.0.0.0/8\""),
        in_request("[\"10.0.0.0/33\"]"),
        in_request("[\"10.0.0.0/8\\u0000\"]"),
        deep("[", "]"),
        deep("{\"a\":", "}"),
        "[".repeat(REQUEST_BYTES_MAX / 2),
        in_request(&deep("[", "]")),
        in_request(&deep("{\"a\":", "}")),
        // As deep as is read at all.
        in_request(&["[".repeat(126), "]".repeat(126)].concat()),
        "x".repeat(100_000),
    ];
    let not_utf8: [&[u8]; 4] = [
        b"\xff\xfe\xfd",
        b"\"\xc3\x28\"",
        b"{\"command\":\"\xf0\x28\x8c\x28\"}",
        b"\x1b[2J\x07\r",
    ];
    for bytes in texts.iter().map(String::as_bytes).chain(not_utf8) {
        client.send(bytes);
        client.send(b"\n");
        client.is_refused("cannot read the request");
    }
    client.is_served();
    // However much there is that cannot be read, little of it is said again.
    for long in ["{\"command\":\"", "{\"command\":\"status\",\""] {
        client.send(format!("{long}{}\":1}}\n", "x".repeat(1 << 20)).as_bytes());
        let error = client.line().unwrap()["error"].to_string();
        assert!(error.len() < 1000, "{error}");
    }
    client.is_served();
}

#[test]
fn requests_may_come_together_and_in_pieces() {
    let served = Served::new(answer);
    let mut client = served.client();
    let request = |number: usize| {
        format!("{{\"command\":\"route-get\",\"address\":\"10.0.0.{number}\"}}\r\n")
    };
    let all: String = (0..200).map(request).collect();
    client.send(all.as_bytes());
    for number in 0..200 {
        assert_eq!(
            client.line().unwrap()["address"],
            format!("10.0.0.{number}")
        );
    }
    for byte in all.as_bytes()[..200].chunks(1) {
        client.send(byte);
    }
    let whole = all[..200].matches('\n').count();
    for number in 0..whole {
        assert_eq!(
            client.line().unwrap()["address"],
            format!("10.0.0.{number}")
        );
    }
    // What has no end of line is not a request.
    client.0.get_ref().shutdown(Shutdown::Write).unwrap();
    assert!(client.line().is_none());
}

#[test]
fn a_client_that_stops_sending_is_still_answered() {
    let served = Served::new(answer);
    let mut client = served.client();
    client.send(&[STATUS, PEERS, STATUS].concat());
    client.0.get_ref().shutdown(Shutdown::Write).unwrap();
    for expected in ["unit0", "", "unit0"] {
        assert_eq!(client.line().unwrap()["tun"], expected);
    }
    assert!(client.line().is_none());
}

/// Those that went away while they were answered leave no connection behind.
#[test]
fn a_client_that_goes_away_is_forgotten() {
    let served = Served::new(answer);
    for round in 0..10 * CONNECTIONS_MAX {
        let mut client = served.client();
        // Refused while those before it are not forgotten yet.
        let request = [STATUS, PEERS, &STATUS[..5]][round % 3];
        let _ = client.0.get_mut().write_all(request);
    }
    wait_until("all places are free", || {
        let mut clients: Vec<_> = (0..CONNECTIONS_MAX).map(|_| served.client()).collect();
        clients.iter_mut().all(|client| {
            let _ = client.0.get_mut().write_all(STATUS);
            client.line().is_some_and(|answer| answer["ok"] == true)
        })
    });
}

#[test]
fn a_start_that_fails_leaves_nothing_behind() {
    let (directory, path) = place();
    for calls in [
        &[libc::SYS_listen][..],
        &[libc::SYS_socketpair],
        &[libc::SYS_clone, libc::SYS_clone3],
    ] {
        let error = without_calls(calls, || Server::start(&path).err());
        let error = error.expect("it fails").to_string();
        assert!(error.contains("the control socket"), "{error}");
        assert!(entries(&directory).is_empty(), "{error}");
    }
    drop(Server::start(&path).unwrap());
}

/// Though the end comes at once, as after `stop`.
#[test]
fn answers_given_before_the_end_arrive() {
    let (_directory, path) = place();
    for round in 0..20 {
        let server = Server::start(&path).unwrap();
        let mut client = Client::new(&path);
        // More than fits the socket's buffer, every other time.
        let request = if round % 2 == 0 { STATUS } else { PEERS };
        client.send(request);
        let Ok(Call::Request(request, reply)) = server.calls.recv_timeout(PATIENCE) else {
            panic!("no request");
        };
        let reader = std::thread::spawn(move || (client.line(), client.line()));
        reply.send(answer(request));
        server.close(true);
        let (line, end) = reader.join().unwrap();
        assert_eq!(line.unwrap()["ok"], true);
        assert!(end.is_none());
    }
}

/// Whatever clients are doing; and a request that waits for the control thread is
/// answered.
#[test]
fn the_end_closes_every_connection() {
    let (_directory, path) = place();
    for _ in 0..10 {
        let server = Server::start(&path).unwrap();
        let mut idle = Client::new(&path);
        let mut half = Client::new(&path);
        half.send(b"{\"comm");
        let mut first = Client::new(&path);
        first.send(STATUS);
        wait_until("a request waits", || server.calls.len() == 1);
        let mut second = Client::new(&path);
        second.send(STATUS);
        server.close(true);
        assert!(idle.line().is_none());
        assert!(half.line().is_none());
        first.is_refused("it may be ending");
        assert!(first.line().is_none());
        // It was read, or it was not.
        if let Some(answer) = second.line() {
            assert_eq!(answer["ok"], false);
            assert!(second.line().is_none());
        }
        assert!(!path.exists());
    }
}

#[test]
fn a_client_that_never_reads_does_not_hold_up_the_end() {
    let (_directory, path) = place();
    let server = Server::start(&path).unwrap();
    let mut client = Client::new(&path);
    client.send(PEERS);
    let Ok(Call::Request(request, reply)) = server.calls.recv_timeout(PATIENCE) else {
        panic!("no request");
    };
    reply.send(answer(request));
    // It is being written.
    assert_eq!(client.0.fill_buf().unwrap()[0], b'{');
    let began = Instant::now();
    server.close(true);
    let took = began.elapsed();
    assert!(took < CLIENT_TIME_MAX / 2, "{took:?}");
    assert!(!path.exists());
}

/// One that sends without end is served no more often than others.
#[test]
fn requests_without_end_keep_nobody_waiting() {
    let served = Served::new(answer);
    let mut client = served.client();
    let stream = client.0.get_ref().try_clone().unwrap();
    let mut sender = stream.try_clone().unwrap();
    let asker = std::thread::spawn(move || while sender.write_all(STATUS).is_ok() {});
    let reader = std::thread::spawn(move || while client.line().is_some() {});
    let mut other = served.client();
    for _ in 0..100 {
        other.is_served();
    }
    stream.shutdown(Shutdown::Both).unwrap();
    asker.join().unwrap();
    reader.join().unwrap();
}

/// A client that connects while the listening socket changes hands is served by one or
/// the other.
#[test]
fn a_new_process_goes_on_with_the_listener() {
    let (_directory, path) = place();
    let mut server = Server::start(&path).unwrap();
    let before = inode(&path);
    for _ in 0..5 {
        let listener = server.listener.try_clone().unwrap().into();
        let mut old = Client::new(&path);
        old.send(STATUS);
        let Ok(Call::Request(..)) = server.calls.recv_timeout(PATIENCE) else {
            panic!("no request");
        };
        old.is_refused("no answer");
        server.close(false);
        assert!(old.line().is_none());
        assert_eq!(inode(&path), before);
        // There is nobody to accept it at this moment.
        let mut between = Client::new(&path);
        between.send(STATUS);
        server = Server::from_listener(listener, &path).unwrap();
        let Ok(Call::Request(request, reply)) = server.calls.recv_timeout(PATIENCE) else {
            panic!("no request");
        };
        reply.send(answer(request));
        assert_eq!(between.line().unwrap()["tun"], "unit0");
    }
    server.close(true);
    assert!(!path.exists());
}

/// Nobody else writes to it, nor closes it.
#[test]
fn the_control_thread_gets_the_connection_of_a_takeover() {
    let (_directory, path) = place();
    let server = Server::start(&path).unwrap();
    let mut client = Client::new(&path);
    client.send(b"no request\n");
    client.is_refused("cannot read the request");
    client.send(b"{\"command\":\"takeover\",\"protocol\":7}\n");
    let Ok(Call::Takeover(mut connection, protocol)) = server.calls.recv_timeout(PATIENCE) else {
        panic!("no call");
    };
    assert_eq!(protocol, 7);
    server.close(false);
    let soon = Instant::now() + PATIENCE;
    connection.send(b"{\"ok\":true}".to_vec(), soon).unwrap();
    assert_eq!(client.line().unwrap()["ok"], true);
    client.send(b"go\n");
    assert_eq!(*connection.receive(soon).unwrap().unwrap(), b"go");
}

/// A control thread that drops a request has said all that it will.
#[test]
fn a_request_without_an_answer_is_refused() {
    let (_directory, path) = place();
    let server = Server::start(&path).unwrap();
    let mut client = Client::new(&path);
    client.send(STATUS);
    drop(server.calls.recv_timeout(PATIENCE).unwrap());
    client.is_refused("no answer");
    client.send(b"{\"command\":\"stop\"}\n");
    match server.calls.recv_timeout(PATIENCE).unwrap() {
        Call::Request(Request::Stop {}, reply) => {
            reply.send(Ok(Answer::Changed(Changed::default())));
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(client.line().unwrap()["peers_added"], 0);
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(64))]
    /// Whatever is sent: every line gets one line, and the server lives.
    #[test]
    fn garbage_is_answered_line_by_line(
        lines in proptest::collection::vec(proptest::collection::vec(1u8..=255, 0..200), 1..5)
    ) {
        let served = Served::new(answer);
        let mut client = served.client();
        for mut line in lines {
            line.retain(|byte| *byte != b'\n');
            line.push(b'\n');
            client.send(&line);
            client.is_refused("cannot read the request");
        }
        client.is_served();
    }
}
