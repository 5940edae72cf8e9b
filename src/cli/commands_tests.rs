//! Commands against servers of the tests': what they send, and what they make of
//! the answers.

use std::io::{BufRead, BufReader, Read};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::thread::JoinHandle;

use clap::Parser;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::*;
use crate::cli::{Cli, Command};
use crate::control::client::refused;

/// Long enough not to matter to what goes right.
const PATIENT: Duration = Duration::from_secs(60);

/// For clients that wait in vain.
const HASTY: Duration = Duration::from_millis(50);

const NOTHING_CHANGED: &str =
    r#"{"ok":true,"prefixes_added":0,"prefixes_removed":0,"peers_added":0,"peers_removed":0}"#;

fn command(words: &str) -> ClientCommand {
    let words = std::iter::once("fastvpn").chain(words.split_whitespace());
    match Cli::try_parse_from(words).unwrap().command {
        Some(Command::Client(command)) => command,
        other => panic!("{other:?}"),
    }
}

/// A socket in a directory of its own.
struct Place {
    directory: TempDir,
}

impl Place {
    fn new() -> Self {
        Self {
            directory: tempfile::tempdir().unwrap(),
        }
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("test.sock")
    }

    fn listen(&self) -> UnixListener {
        UnixListener::bind(self.path()).unwrap()
    }

    /// Takes one connection, reads a request, and goes on with `serve`. Returns
    /// the request at the end.
    fn serve(
        &self,
        serve: impl FnOnce(UnixStream, UnixListener) + Send + 'static,
    ) -> JoinHandle<Value> {
        let listener = self.listen();
        std::thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            let mut line = String::new();
            BufReader::new(&stream).read_line(&mut line).unwrap();
            serve(stream, listener);
            serde_json::from_str(&line).unwrap()
        })
    }
}

/// What a command makes of an answer: its result, its output, and the request
/// that it sent.
fn exchange(words: &str, answer: impl Into<String>) -> (Result<()>, String, Value) {
    let place = Place::new();
    let answer = answer.into() + "\n";
    let server = place.serve(move |mut stream, _| {
        // A client that refuses what it reads may not read to the end.
        let _ = stream.write_all(answer.as_bytes());
    });
    let mut out = Vec::new();
    let result = perform(&command(words), &place.path(), &mut out, PATIENT);
    let request = server.join().unwrap();
    (result, String::from_utf8(out).unwrap(), request)
}

fn error_of(result: Result<()>) -> String {
    result.unwrap_err().to_string()
}

#[test]
fn every_command_is_a_request_and_its_answer_is_shown() {
    let changed = |key: &str| {
        let mut answer: Value = serde_json::from_str(NOTHING_CHANGED).unwrap();
        answer[key] = json!(2);
        answer.to_string()
    };
    let found = json!({
        "ok": true, "address": "10.1.2.3", "prefix": "10.1.0.0/16",
        "peer": "10.0.0.2:8285", "endpoint": "10.0.0.2:8285",
    });
    for (words, request, answer, shown) in [
        (
            "peers",
            json!({"command": "peers"}),
            r#"{"ok":true,"peers":[]}"#.into(),
            "no peers\n",
        ),
        (
            "route list",
            json!({"command": "route-list"}),
            r#"{"ok":true,"routes":[]}"#.into(),
            "no prefixes\n",
        ),
        (
            "route get 10.1.2.3",
            json!({"command": "route-get", "address": "10.1.2.3"}),
            found.to_string(),
            "10.1.2.3 to 10.0.0.2:8285, by prefix 10.1.0.0/16\n",
        ),
        (
            "route add 10.1.0.0/16 fd00::/64 --peer vpn.example --replace",
            json!({
                "command": "route-add", "peer": "vpn.example:8285",
                "prefixes": ["10.1.0.0/16", "fd00::/64"], "replace": true,
            }),
            changed("prefixes_added"),
            "2 prefixes added\n",
        ),
        (
            "route del 10.1.0.0/16 10.2.0.0/16",
            json!({"command": "route-del", "prefixes": ["10.1.0.0/16", "10.2.0.0/16"]}),
            changed("prefixes_removed"),
            "2 prefixes removed\n",
        ),
        (
            "peer add [fd00::1]:9=10.1.0.0/16",
            json!({"command": "peer-add", "peer": "[fd00::1]:9", "prefixes": ["10.1.0.0/16"]}),
            changed("peers_added"),
            "2 peers added\n",
        ),
        (
            "peer del 10.0.0.2",
            json!({"command": "peer-del", "peer": "10.0.0.2:8285"}),
            changed("peers_removed"),
            "2 peers removed\n",
        ),
    ] {
        let (result, out, sent) = exchange(words, answer);
        assert!(result.is_ok(), "{words}: {result:?}");
        assert_eq!(out, shown, "{words}");
        assert_eq!(sent, request, "{words}");
    }
    let reloaded = r#"{"ok":true,"prefixes_added":1,"prefixes_removed":0,"peers_added":0,
        "peers_removed":0,"settings_changed":["hop"],"needs_restart":[]}"#;
    let (result, out, sent) = exchange("reload", reloaded.replace('\n', ""));
    assert!(result.is_ok(), "{result:?}");
    assert_eq!(out, "reloaded: 1 prefix added; changed: hop\n");
    assert_eq!(sent, json!({"command": "reload"}));
}

/// What the server sends is what the client reads, field by field.
#[test]
fn status_is_read_as_the_server_writes_it() {
    use crate::control::protocol::{Answer, Line, Status};
    let status = Status {
        version: "9.8.7".into(),
        workers: vec![Default::default(); 2],
        ..Status::default()
    };
    let line = Line::from(Ok(Answer::Status(Box::new(status.clone()))));
    let (result, out, sent) = exchange("status", serde_json::to_string(&line).unwrap());
    assert!(result.is_ok(), "{result:?}");
    assert_eq!(out, render::status(&status));
    assert_eq!(sent, json!({"command": "status"}));
}

#[test]
fn keys_that_a_newer_tunnel_adds_are_skipped() {
    let (result, out, _) = exchange(
        "peers",
        r#"{"ok":true,"shape":{"round":[1]},"peers":[{"colour":"blue","peer":"a:1",
           "endpoint":null,"origin":"elsewhere","is_default":false,"prefixes":1,
           "path_mtu_bytes":null,"packets_sent":0,"bytes_sent":0,"packets_received":0,
           "bytes_received":0,"last_seen_seconds":null}]}"#
            .replace('\n', ""),
    );
    assert!(result.is_ok(), "{result:?}");
    assert!(
        out.contains("\na:1   not resolved  -      listen port  elsewhere"),
        "{out}"
    );
}

#[test]
fn json_is_printed_as_it_came() {
    let answer = r#"{ "ok":true,"new":[1, 2],"peers":[]}"#;
    let (result, out, _) = exchange("peers --json", answer);
    assert!(result.is_ok(), "{result:?}");
    assert_eq!(out, format!("{answer}\n"));
    // Refusals, too: then the exit status tells.
    let answer = r#"{"ok":false,"error":"no such peer"}"#;
    let (result, out, _) = exchange("peer del a --json", answer);
    assert_eq!(error_of(result), "no such peer");
    assert_eq!(out, format!("{answer}\n"));
    // But nothing that only looks like it.
    let (result, out, _) = exchange("peers --json", "\x1b[2J");
    assert!(error_of(result).starts_with("cannot understand the answer at "));
    assert_eq!(out, "");
}

#[test]
fn refusals_are_errors_and_nothing_is_printed_raw() {
    let (result, out, _) = exchange("reload", r#"{"ok":false,"error":"line 3: no\n\u001b[31m"}"#);
    assert_eq!(error_of(result), "line 3: no\\n\\u{1b}[31m");
    assert_eq!(out, "");
    let (result, _, _) = exchange("reload", r#"{"ok":false}"#);
    assert!(error_of(result).contains("does not say why"));
}

#[test]
fn nonsense_in_place_of_an_answer_is_an_error() {
    for answer in ["", "nonsense", "[]", r#"{"ok":true}"#, r#"{"ok":1}"#] {
        let (result, out, _) = exchange("peers", answer);
        let text = error_of(result);
        assert!(
            text.starts_with("cannot understand the answer at ") && !text.contains('\n'),
            "{answer:?}: {text}"
        );
        assert_eq!(out, "");
    }
    let deep = format!(r#"{{"ok":true,"peers":{}"#, "[".repeat(100_000));
    let (result, ..) = exchange("peers", deep);
    assert!(error_of(result).contains("cannot understand"));
}

#[test]
fn long_answers_are_read_whole() {
    let routes: Vec<Value> = (0..100_000_u32)
        .map(|index| {
            let address = std::net::Ipv4Addr::from_bits(0x0a00_0000 + index);
            json!({
                "prefix": format!("{address}/32"), "peer": "10.0.0.2:8285",
                "endpoint": "10.0.0.2:8285", "origin": "config",
            })
        })
        .collect();
    let answer = json!({"ok": true, "routes": routes}).to_string();
    let (result, out, _) = exchange("route list", answer);
    assert!(result.is_ok(), "{result:?}");
    assert_eq!(out.lines().count(), 100_001);
    assert_eq!(
        out.lines().last(),
        Some("10.1.134.159/32  10.0.0.2:8285  config")
    );
}

#[test]
fn answers_have_a_bound() {
    let place = Place::new();
    let server = place.serve(|mut stream, _| {
        let chunk = vec![b' '; 1 << 20];
        // Until the client has had enough.
        let written = (0..300).take_while(|_| stream.write_all(&chunk).is_ok());
        assert!(written.count() < 300);
    });
    let mut out = Vec::new();
    let result = perform(&command("peers"), &place.path(), &mut out, PATIENT);
    server.join().unwrap();
    let text = error_of(result);
    assert!(text.contains("more than 268435456 bytes"), "{text}");
}

#[test]
fn a_connection_that_closes_without_a_whole_answer_says_so() {
    for partly in ["", r#"{"ok":true,"peers":["#] {
        let place = Place::new();
        let server = place.serve(move |mut stream, _| {
            stream.write_all(partly.as_bytes()).unwrap();
        });
        let result = perform(&command("peers"), &place.path(), &mut Vec::new(), PATIENT);
        server.join().unwrap();
        let text = error_of(result);
        assert!(
            text.contains("no whole answer from the fastvpn at") && text.contains("end of file"),
            "{text}"
        );
    }
}

/// A server that has too many connections, or does not trust us, answers
/// without a request and closes: ours then meets a closed connection.
#[test]
fn a_refusal_sent_before_the_request_is_read() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    theirs
        .write_all(b"{\"ok\":false,\"error\":\"too many connections\"}\n")
        .unwrap();
    drop(theirs);
    let mut connection = Connection::over(ours, Path::new("x"), PATIENT);
    let line = connection.ask(&Request::Peers {}).unwrap();
    assert!(line.contains("too many connections"), "{line}");
}

#[test]
fn a_silent_server_times_out() {
    let place = Place::new();
    let server = place.serve(|mut stream, _| {
        // Until the client has gone.
        let _ = stream.read_to_end(&mut Vec::new());
    });
    let result = perform(&command("peers"), &place.path(), &mut Vec::new(), HASTY);
    server.join().unwrap();
    let text = error_of(result);
    assert!(text.contains("timed out"), "{text}");
}

#[test]
fn a_server_that_takes_no_connections_times_out() {
    let place = Place::new();
    let socket = socket2::Socket::new(socket2::Domain::UNIX, socket2::Type::STREAM, None).unwrap();
    socket
        .bind(&socket2::SockAddr::unix(place.path()).unwrap())
        .unwrap();
    socket.listen(0).unwrap();
    // listen(2): a backlog of 0 has room for one.
    let _first = UnixStream::connect(place.path()).unwrap();
    let result = perform(&command("peers"), &place.path(), &mut Vec::new(), HASTY);
    let text = error_of(result);
    assert!(text.contains("takes no connections"), "{text}");
}

#[test]
fn a_tunnel_that_does_not_run_is_told_from_one_that_may_not_be_asked() {
    let place = Place::new();
    let ask = |path: &Path| error_of(perform(&command("status"), path, &mut Vec::new(), PATIENT));
    let shown = place.path().display().to_string();
    assert_eq!(
        ask(&place.path()),
        format!(
            "no fastvpn answers at {shown}: no such file or directory; \
             is it running? --tun names another"
        )
    );
    // What a killed process leaves behind.
    drop(place.listen());
    assert_eq!(
        ask(&place.path()),
        format!(
            "no fastvpn answers at {shown}: connection refused; is it running? --tun names another"
        )
    );
    // No socket's name is longer than 107 bytes.
    let long = place.directory.path().join("x".repeat(200));
    let text = ask(&long);
    assert!(text.ends_with("--control names another path"), "{text}");
}

/// Root may connect to any socket, so this asks for what no socket gives.
#[test]
fn permission_denied_says_what_to_do() {
    let error = refused(
        Path::new("/run/x.sock"),
        io::Error::from_raw_os_error(libc::EACCES),
    );
    assert_eq!(
        error.to_string(),
        "no fastvpn answers at /run/x.sock: permission denied; \
         run as root, or as the user it runs as"
    );
}

#[test]
fn stop_waits_until_the_socket_is_gone() {
    for (words, shown) in [
        ("stop", "stopped\n".to_string()),
        ("stop --json", format!("{NOTHING_CHANGED}\n")),
    ] {
        let place = Place::new();
        let path = place.path();
        let (ended, has_ended) = std::sync::mpsc::channel();
        let server = place.serve(move |mut stream, listener| {
            writeln!(stream, "{NOTHING_CHANGED}").unwrap();
            // The client waits for this.
            std::thread::sleep(HASTY);
            std::fs::remove_file(path).unwrap();
            ended.send(()).unwrap();
            drop((stream, listener));
        });
        let mut out = Vec::new();
        let result = perform(&command(words), &place.path(), &mut out, PATIENT);
        assert!(result.is_ok(), "{result:?}");
        assert!(has_ended.try_recv().is_ok(), "not before the end");
        assert_eq!(server.join().unwrap(), json!({"command": "stop"}));
        assert_eq!(String::from_utf8(out).unwrap(), shown);
    }
}

#[test]
fn stop_does_not_wait_for_a_new_process_on_the_same_path() {
    let place = Place::new();
    let path = place.path();
    let (hand_over, new_process) = std::sync::mpsc::channel();
    let server = place.serve(move |mut stream, old| {
        writeln!(stream, "{NOTHING_CHANGED}").unwrap();
        // Renamed into place while the old one is there: their inodes differ.
        let fresh = path.with_extension("new");
        let new = UnixListener::bind(&fresh).unwrap();
        std::fs::rename(&fresh, &path).unwrap();
        hand_over.send(new).unwrap();
        drop((old, stream));
    });
    let result = perform(&command("stop"), &place.path(), &mut Vec::new(), PATIENT);
    assert!(result.is_ok(), "{result:?}");
    server.join().unwrap();
    // Nobody has asked the new one anything.
    let new: UnixListener = new_process.recv().unwrap();
    new.set_nonblocking(true).unwrap();
    let error = new.accept().unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
}

#[test]
fn stop_takes_a_killed_process_for_ended() {
    let place = Place::new();
    let server = place.serve(|mut stream, listener| {
        writeln!(stream, "{NOTHING_CHANGED}").unwrap();
        // The name stays.
        drop((stream, listener));
    });
    let result = perform(&command("stop"), &place.path(), &mut Vec::new(), PATIENT);
    assert!(result.is_ok(), "{result:?}");
    server.join().unwrap();
    assert!(place.path().exists());
}

#[test]
fn stop_gives_up_on_a_process_that_does_not_end() {
    let place = Place::new();
    let (done, is_done) = std::sync::mpsc::channel();
    let server = place.serve(move |mut stream, listener| {
        writeln!(stream, "{NOTHING_CHANGED}").unwrap();
        is_done.recv().unwrap();
        drop((stream, listener));
    });
    let mut out = Vec::new();
    let patience = Duration::from_millis(500);
    let result = perform(&command("stop"), &place.path(), &mut out, patience);
    done.send(()).unwrap();
    server.join().unwrap();
    let text = error_of(result);
    assert!(text.contains("has not ended: timed out"), "{text}");
    assert_eq!(out, b"");
}

/// Standard output that fails.
struct Closed(io::ErrorKind);

impl Write for Closed {
    fn write(&mut self, _: &[u8]) -> io::Result<usize> {
        Err(self.0.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Err(self.0.into())
    }
}

#[test]
fn a_closed_standard_output_is_not_an_error() {
    let with = |words: &str, kind, answer: &'static str| {
        let place = Place::new();
        let server = place.serve(move |mut stream, _| writeln!(stream, "{answer}").unwrap());
        let result = perform(&command(words), &place.path(), &mut Closed(kind), PATIENT);
        server.join().unwrap();
        result
    };
    let answer = r#"{"ok":true,"peers":[]}"#;
    for words in ["peers", "peers --json"] {
        let result = with(words, io::ErrorKind::BrokenPipe, answer);
        assert!(result.is_ok(), "{result:?}");
        let text = error_of(with(words, io::ErrorKind::StorageFull, answer));
        assert!(
            text.starts_with("cannot write to standard output"),
            "{text}"
        );
    }
    // Whether it was done still counts.
    let refused = r#"{"ok":false,"error":"no"}"#;
    let result = with("peers --json", io::ErrorKind::BrokenPipe, refused);
    assert_eq!(error_of(result), "no");
}

/// The server says so before it has read all of it, and closes the connection.
#[test]
fn a_request_that_is_too_long_is_refused() {
    use crate::control::server::Server;
    let prefixes: Vec<ipnet::IpNet> = (0..300_000_u32)
        .map(|index| std::net::IpAddr::from(std::net::Ipv4Addr::from_bits(0x0a00_0000 + index)))
        .map(ipnet::IpNet::from)
        .collect();
    let place = Place::new();
    let _server = Server::start(&place.path()).unwrap();
    let mut connection = Connection::open(&place.path(), PATIENT).unwrap();
    let line = connection.ask(&Request::RouteDel { prefixes }).unwrap();
    assert!(line.contains("at most 4194304 bytes"), "{line}");
}

/// The server that the program has, and not one of ours.
#[test]
fn client_and_server_understand_each_other() {
    use crate::control::protocol::{Answer, Peers};
    use crate::control::server::{Call, Server};
    let place = Place::new();
    let server = Server::start(&place.path()).unwrap();
    let calls = server.calls.clone();
    let control = std::thread::spawn(move || {
        let Ok(Call::Request(Request::Peers {}, reply)) = calls.recv() else {
            panic!("expected one request")
        };
        reply.send(Ok(Answer::Peers(Peers::default())));
        let Ok(Call::Request(Request::Stop {}, reply)) = calls.recv() else {
            panic!("expected to be stopped")
        };
        reply.send(Ok(Answer::Changed(Default::default())));
        server.close(true);
    });
    let mut out = Vec::new();
    perform(&command("peers"), &place.path(), &mut out, PATIENT).unwrap();
    perform(&command("stop"), &place.path(), &mut out, PATIENT).unwrap();
    assert!(!place.path().exists());
    control.join().unwrap();
    assert_eq!(out, b"no peers\nstopped\n");
}

/// The examples are what the program writes and reads, key by key.
#[test]
fn the_documented_examples_are_the_protocol() {
    use crate::control::protocol::{
        Capturing, Changed, Found, Peers, Reloaded, Routes, Status, Upgrading,
    };
    use serde::Serialize;
    use serde::de::DeserializeOwned;

    fn read_and_written<T: DeserializeOwned + Serialize>(answer: &Value) -> Value {
        let read: T = serde_json::from_value(answer.clone()).unwrap();
        let mut written = serde_json::to_value(read).unwrap();
        written["ok"] = json!(true);
        written
    }

    let text = include_str!("../../docs/control.md");
    let mut seen = Vec::new();
    for block in text.split("```json\n").skip(1) {
        let block = block.split("```").next().unwrap();
        let values = serde_json::Deserializer::from_str(block).into_iter::<Value>();
        let values: Vec<_> = values.map(|value| value.unwrap()).collect();
        let is_request = |value: &&Value| value.get("command").is_some();
        let (requests, answers): (Vec<_>, Vec<_>) = values.iter().partition(is_request);
        let mut written = Vec::new();
        for example in requests {
            let request = Request::read(example.to_string().as_bytes()).unwrap();
            assert_eq!(serde_json::to_value(&request).unwrap(), *example);
            seen.push(example["command"].as_str().unwrap().to_string());
            // They all have the same kind of answer.
            for answer in &answers {
                written.push(match request {
                    Request::Status {} => read_and_written::<Status>(answer),
                    Request::Peers {} => read_and_written::<Peers>(answer),
                    Request::RouteList {} => read_and_written::<Routes>(answer),
                    Request::RouteGet { .. } => read_and_written::<Found>(answer),
                    Request::Reload { .. } => read_and_written::<Reloaded>(answer),
                    Request::Upgrade {} => read_and_written::<Upgrading>(answer),
                    Request::Capture { .. } => read_and_written::<Capturing>(answer),
                    _ => read_and_written::<Changed>(answer),
                });
            }
        }
        assert!(written.iter().all(|line| *line == *answers[0]), "{block}");
        for answer in answers {
            let verdict: Verdict = serde_json::from_value(answer.clone()).unwrap();
            assert_eq!(verdict.ok, verdict.error.is_none());
        }
    }
    assert_eq!(
        seen,
        [
            "status",
            "peers",
            "route-list",
            "route-get",
            "route-add",
            "route-del",
            "peer-add",
            "peer-add",
            "peer-del",
            "stop",
            "reload",
            "upgrade",
            "capture",
            "takeover",
        ]
    );
}
