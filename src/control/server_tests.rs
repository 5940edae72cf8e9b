use std::io::{BufRead, BufReader};
use std::thread;

use super::super::protocol::{Changed, RouteEntry, Routes};
use super::*;

/// Ends a test that would otherwise wait for ever; nothing is measured by it.
const PATIENCE: Duration = Duration::from_secs(20);

/// A server with a control thread that answers `stop` with nothing changed,
/// `route-list` with a long list, and the rest with an error.
struct Fixture {
    directory: tempfile::TempDir,
    server: Option<Server>,
}

impl Fixture {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let server = Server::start(&directory.path().join("s")).unwrap();
        let calls = server.calls().clone();
        thread::spawn(move || calls.iter().for_each(serve));
        Self {
            directory,
            server: Some(server),
        }
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("s")
    }

    fn client(&self) -> Client {
        Client::new(&self.path())
    }
}

fn serve(call: Call) {
    match call {
        Call::Request(Request::Stop {}, reply) => {
            reply.send(Ok(Answer::Changed(Changed::default())));
        }
        Call::Request(Request::RouteList {}, reply) => {
            let entry = RouteEntry {
                prefix: "10.0.0.0/8".parse().unwrap(),
                peer: "10.0.0.1:8285".into(),
                endpoint: None,
                origin: "config".into(),
            };
            let routes = vec![entry; LONG_ENTRIES];
            reply.send(Ok(Answer::Routes(Routes { routes })));
        }
        // Forgotten.
        Call::Request(Request::Peers {}, _) => {}
        Call::Request(..) => {}
        Call::Takeover {
            mut stream,
            protocol,
        } => {
            let _ = writeln!(stream, "taken {protocol}");
        }
    }
}

/// Entries of an answer that no socket buffer holds.
const LONG_ENTRIES: usize = 50_000;

struct Client(BufReader<UnixStream>);

impl Client {
    fn new(path: &Path) -> Self {
        let stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        Self(BufReader::new(stream))
    }

    fn say(&mut self, bytes: &[u8]) {
        // Who is turned away may be closed before all is written.
        let _ = self.0.get_mut().write_all(bytes);
    }

    /// The next line; empty at the end.
    fn line(&mut self) -> String {
        let mut line = String::new();
        match self.0.read_line(&mut line) {
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => String::new(),
            result => {
                result.unwrap();
                line
            }
        }
    }

    fn ask(&mut self, request: &str) -> String {
        self.say(format!("{request}\n").as_bytes());
        self.line()
    }
}

const STOP: &str = r#"{"command":"stop"}"#;
const GOOD: &str = r#"{"ok":true,"#;
const BAD: &str = r#"{"ok":false,"error":""#;

#[test]
fn answers_one_request_after_the_other() {
    let fixture = Fixture::new();
    let mut client = fixture.client();
    for _ in 0..3 {
        assert!(client.ask(STOP).starts_with(GOOD));
    }
    // Two in one write, the second in two.
    client.say(format!("{STOP}\n{STOP}").as_bytes());
    assert!(client.line().starts_with(GOOD));
    client.say(b"\n");
    assert!(client.line().starts_with(GOOD));
    let text = client.ask(r#"{"command":"peers"}"#);
    assert!(
        text.starts_with(BAD) && text.contains("no answer"),
        "{text}"
    );
}

#[test]
fn only_its_owner_may_connect() {
    let fixture = Fixture::new();
    let mode = fs::metadata(fixture.path()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[test]
fn what_is_no_request_is_an_error_that_says_so() {
    let fixture = Fixture::new();
    let deep = "[".repeat(100_000);
    for bad in [
        "",
        "stop",
        "{}",
        r#"{"command":"fly"}"#,
        r#"{"command":"stop","now":true}"#,
        r#"{"command":"route-add","peer":"a","prefixes":["10.0.0.0/99"]}"#,
        r#"{"command":"route-get","address":7}"#,
        "\0\0\0",
        &deep,
    ] {
        // On one connection: it goes on.
        let mut client = fixture.client();
        for _ in 0..2 {
            let text = client.ask(bad);
            assert!(text.starts_with(BAD), "{bad:.40}: {text}");
        }
        assert!(client.ask(STOP).starts_with(GOOD));
    }
    let mut client = fixture.client();
    client.say(b"\xff\xfe{\n");
    assert!(client.line().starts_with(BAD));
}

#[test]
fn a_request_that_is_too_long_ends_the_connection() {
    let fixture = Fixture::new();
    let mut client = fixture.client();
    let chunk = vec![b' '; 1 << 20];
    for _ in 0..=REQUEST_BYTES_MAX >> 20 {
        client.say(&chunk);
    }
    client.say(&chunk);
    let text = client.line();
    // It is closed with bytes unread, which may overtake the line.
    assert!(text.is_empty() || text.starts_with(BAD), "{text}");
    assert!(client.line().is_empty());
    assert!(fixture.client().ask(STOP).starts_with(GOOD));
}

#[test]
fn connections_are_bounded_and_places_become_free() {
    let fixture = Fixture::new();
    let mut clients: Vec<_> = (0..CONNECTIONS_MAX).map(|_| fixture.client()).collect();
    for client in &mut clients {
        assert!(client.ask(STOP).starts_with(GOOD));
    }
    let mut one_more = fixture.client();
    let text = one_more.line();
    assert!(text.contains("too many connections"), "{text}");
    assert!(one_more.line().is_empty());
    clients.pop();
    // The place is free when its thread has ended.
    let deadline = Instant::now() + PATIENCE;
    while !fixture.client().ask(STOP).starts_with(GOOD) {
        assert!(Instant::now() < deadline);
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn who_is_stuck_keeps_nobody_waiting() {
    let fixture = Fixture::new();
    // Half a line, and silence.
    let mut half = fixture.client();
    half.say(b"{\"command\":");
    // Asks for a long answer, and never reads it.
    let mut deaf = fixture.client();
    deaf.say(b"{\"command\":\"route-list\"}\n");
    // Gone in the middle of either.
    for text in ["{\"comm", "{\"command\":\"route-list\"}\n"] {
        fixture.client().say(text.as_bytes());
    }
    let mut client = fixture.client();
    for _ in 0..10 {
        assert!(client.ask(STOP).starts_with(GOOD));
    }
    let list = client.ask(r#"{"command":"route-list"}"#);
    assert!(list.starts_with(GOOD));
    assert_eq!(list.matches("10.0.0.0/8").count(), LONG_ENTRIES);
    // Who has been slow is served all the same.
    half.say(b"\"stop\"}\n");
    assert!(half.line().starts_with(GOOD));
}

#[test]
fn long_answers_are_bounded_together() {
    let fixture = Fixture::new();
    let shared = &fixture.server.as_ref().unwrap().shared;
    shared
        .answers_bytes
        .fetch_add(ANSWERS_BYTES_MAX, Ordering::SeqCst);
    let mut client = fixture.client();
    let text = client.ask(r#"{"command":"route-list"}"#);
    assert!(text.contains("too many long answers"), "{text}");
    shared
        .answers_bytes
        .fetch_sub(ANSWERS_BYTES_MAX, Ordering::SeqCst);
    let list = client.ask(r#"{"command":"route-list"}"#);
    assert!(list.starts_with(GOOD));
    assert!(client.ask(STOP).starts_with(GOOD));
    let under_way = shared.answers_bytes.load(Ordering::SeqCst);
    assert_eq!(under_way, 0, "all are accounted for");
}

#[test]
fn a_successors_connection_is_handed_on() {
    let fixture = Fixture::new();
    let mut client = fixture.client();
    let text = client.ask(r#"{"command":"takeover","protocol":7}"#);
    assert_eq!(text, "taken 7\n");
}

#[test]
fn the_last_answer_arrives_and_the_name_goes() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let server = Server::start(&path).unwrap();
    let mut client = Client::new(&path);
    let mut idle = Client::new(&path);
    client.say(format!("{STOP}\n").as_bytes());
    // The control thread answers and ends at once.
    serve(server.calls().recv_timeout(PATIENCE).unwrap());
    server.close(true);
    assert!(client.line().starts_with(GOOD));
    assert!(client.line().is_empty());
    assert!(idle.line().is_empty());
    assert!(!path.exists());
}

#[test]
fn a_successors_name_is_left() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    // Handed over: the same socket goes on.
    let first = Server::start(&path).unwrap();
    let listener = first.listener().try_clone_to_owned().unwrap();
    first.close(false);
    let second = Server::from_listener(listener, &path).unwrap();
    let calls = second.calls().clone();
    thread::spawn(move || calls.iter().for_each(serve));
    assert!(Client::new(&path).ask(STOP).starts_with(GOOD));
    // Somebody else's socket is at the path by now.
    fs::remove_file(&path).unwrap();
    let _other = UnixListener::bind(&path).unwrap();
    drop(second);
    assert!(path.exists());
}

#[test]
fn the_socket_of_the_dead_is_replaced_and_no_other() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("new/directory/s");
    let text = |path: &Path| Server::start(path).err().unwrap().to_string();
    // What a killed process leaves.
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    let server = Server::start(&path).unwrap();
    // One that lives.
    assert!(
        text(&path).contains("another fastvpn serves"),
        "{}",
        text(&path)
    );
    assert!(UnixStream::connect(&path).is_ok());
    drop(server);
    // What is no socket.
    fs::write(&path, "precious").unwrap();
    assert!(text(&path).contains("is no socket"));
    assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
    // What cannot be.
    let long = directory.path().join("x".repeat(200));
    assert!(text(&long).contains("--control"));
    let below_a_file = path.join("s");
    assert!(text(&below_a_file).contains("--control"));
}

#[test]
fn one_that_does_not_let_in_is_not_dead() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None).unwrap();
    socket.bind(&SockAddr::unix(&path).unwrap()).unwrap();
    socket.listen(0).unwrap();
    let mut waiting = Vec::new();
    while let Ok(()) = {
        let client = Socket::new(Domain::UNIX, Type::STREAM, None).unwrap();
        client.set_nonblocking(true).unwrap();
        let result = client.connect(&SockAddr::unix(&path).unwrap());
        waiting.push(client);
        result
    } {}
    let text = Server::start(&path).err().unwrap().to_string();
    assert!(text.contains("very busy"), "{text}");
}

#[test]
fn of_many_that_start_at_once_one_serves() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    drop(UnixListener::bind(&path).unwrap());
    let servers: Vec<_> = thread::scope(|scope| {
        let starts: Vec<_> = (0..8)
            .map(|_| scope.spawn(|| Server::start(&path)))
            .collect();
        let ended = starts.into_iter().map(|start| start.join().unwrap());
        ended.filter_map(Result::ok).collect()
    });
    assert_eq!(servers.len(), 1);
    let calls = servers[0].calls().clone();
    thread::spawn(move || calls.iter().for_each(serve));
    assert!(Client::new(&path).ask(STOP).starts_with(GOOD));
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(64))]
    /// Whatever is sent: every line gets one line, and the server lives.
    #[test]
    fn garbage_is_answered_line_by_line(
        lines in proptest::collection::vec(proptest::collection::vec(1u8..=255, 0..200), 1..5)
    ) {
        let fixture = Fixture::new();
        let mut client = fixture.client();
        for mut line in lines {
            line.retain(|byte| *byte != b'\n');
            line.push(b'\n');
            client.say(&line);
            assert!(client.line().starts_with(BAD));
        }
        assert!(client.ask(STOP).starts_with(GOOD));
    }
}
