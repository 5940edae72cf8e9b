//! Both sides, over a socket pair.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, UdpSocket};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use serde_json::json;
use socket2::{Domain, SockAddr, Socket, Type};

use super::manifest::{Manifest, RuntimePeer};
use super::new::{Inherited, OldProcess, ask_within, receive_or_outlive};
use super::old::{Handoff, NewProcess, keep, serve};
use super::*;
use crate::control::codec::Lines;
use crate::control::protocol::Answer;
use crate::control::server::{Call, Server};
use crate::error::{Error, Result};

/// Where nobody serves a control socket.
const NOBODY: &str = "/nowhere/test.sock";

const LINE_BYTES_MAX: usize = 1 << 20;

fn manifest(workers: usize) -> Manifest {
    Manifest {
        ok: true,
        pid: 4711,
        version: "0.1.0".into(),
        tun: "fastvpn0".into(),
        own_ports: (0..workers).map(|worker| worker % 2 == 1).collect(),
        listen: "0.0.0.0:8285".parse().unwrap(),
        tun_offloads: [true, false],
        udp_offloads: [false, true],
        tun_wanted: [true, true],
        udp_wanted: [false, true],
        is_steered: true,
        addresses: vec!["10.244.0.1/16".parse().unwrap()],
        runtime_peers: vec![RuntimePeer {
            peer: "10.0.0.9:8285".into(),
            is_added: true,
            is_default: false,
            prefixes: vec!["10.9.0.0/16".parse().unwrap()],
        }],
    }
}

/// Reads a line; what it says.
fn heard(stream: &UnixStream) -> serde_json::Value {
    let mut line = String::new();
    // Nothing follows it before it is answered.
    BufReader::new(stream).read_line(&mut line).unwrap();
    serde_json::from_str(&line).unwrap()
}

/// More workers than one message has descriptors for.
#[test]
fn descriptors_change_hands() {
    const WORKERS: usize = 256;
    let (ours, theirs) = UnixStream::pair().unwrap();
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let address = socket.local_addr().unwrap();
    let old = std::thread::spawn(move || {
        let request = json!({"command": "takeover", "protocol": PROTOCOL});
        assert_eq!(heard(&ours), request);
        let count = WORKERS / 2 * 5 + 1;
        let descriptors: Vec<_> = std::iter::repeat_n(socket.as_fd(), count).collect();
        let mut new = serve(ours, &manifest(WORKERS), &descriptors, || {}).unwrap();
        new.let_go(PATIENCE).unwrap();
        new.end(true);
        new.adds
    });
    let mut inherited = receive_or_outlive(theirs, NOBODY.as_ref())
        .unwrap()
        .unwrap();
    assert_eq!(inherited.manifest, manifest(WORKERS));
    let claimed = inherited.claimed;
    assert!(claimed.device.offloads.tcp && !claimed.device.offloads.udp);
    assert!(!claimed.udp.segment && claimed.udp.gro);
    assert_eq!(claimed.device.queues.len(), WORKERS);
    assert_eq!(claimed.sockets.len(), WORKERS);
    assert!(inherited.listener.is_some());
    let local = |socket: &Socket| socket.local_addr().unwrap().as_socket().unwrap();
    assert_eq!(local(&claimed.sockets[0].receive), address);
    for (index, sockets) in claimed.sockets.iter().enumerate() {
        assert_eq!(sockets.send.is_some(), index % 2 == 1);
    }
    let adds = vec!["10.250.0.9/24".parse().unwrap()];
    inherited.old.stop(&adds).unwrap();
    inherited.old.taken().unwrap();
    assert!(inherited.old.last_word());
    assert_eq!(old.join().unwrap(), adds);
}

/// Both sides, as they are when the manifest has been sent.
fn both() -> (NewProcess, OldProcess) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let new = NewProcess {
        lines: Lines::new(ours, LINE_BYTES_MAX),
        adds: Vec::new(),
    };
    let old = OldProcess {
        lines: Lines::new(theirs, LINE_BYTES_MAX),
    };
    (new, old)
}

/// Whatever the old process has said before it dies: the new one, which has
/// everything, goes on, unless it was told that the old one does.
#[test]
fn an_old_process_that_dies_is_outlived() {
    const GO: &str = "{\"go\":true}\n";
    const KEPT: &str = "{\"ok\":false,\"error\":\"it is busy\"}\n";
    for (said, carries_on) in [
        ("", true),
        (GO, true),
        ("{\"go\":", true),
        (KEPT, false),
        (&[GO, KEPT].concat(), false),
        ("nonsense\n", false),
    ] {
        let (new, mut old) = both();
        let taking = std::thread::spawn(move || old.stop(&[]).and_then(|()| old.taken()));
        let mut stream = new.lines.stream();
        assert_eq!(heard(stream), json!({"adds": []}));
        stream.shutdown(Shutdown::Read).unwrap();
        stream.write_all(said.as_bytes()).unwrap();
        drop(new);
        let result = taking.join().unwrap();
        assert_eq!(result.is_ok(), carries_on, "{said:?}: {result:?}");
    }
}

/// Either the old process hears that the new one starts, or the new one hears that
/// it must not.
#[test]
fn a_late_new_process_does_not_start() {
    let (mut new, mut old) = both();
    let (wake, woken) = std::sync::mpsc::channel::<()>();
    let taking = std::thread::spawn(move || {
        old.stop(&[]).unwrap();
        woken.recv().unwrap_err();
        old.taken()
    });
    heard(new.lines.stream());
    let late = new.let_go(Duration::from_millis(20));
    let error = late.unwrap_err().to_string();
    assert!(error.contains("does not answer"), "{error}");
    keep(&mut new.lines, &Error::new("it keeps the tunnel"));
    drop(new);
    drop(wake);
    let kept = taking.join().unwrap().unwrap_err().to_string();
    assert!(kept.contains("keeps the tunnel"), "{kept}");
    // One that is gone is not waited for, one that has just said so counts.
    let (mut new, old) = both();
    drop(old);
    assert!(new.let_go(PATIENCE).is_err());
    let (mut new, mut old) = both();
    old.taken().unwrap();
    drop(old);
    new.let_go(PATIENCE).unwrap();
}

/// The connection of an old process that has just ended, or has died, says nothing.
#[test]
fn no_reload_is_due_without_a_word() {
    for (said, is_due) in [("", false), ("false", false), ("true", true)] {
        let (new, old) = both();
        if !said.is_empty() {
            let mut stream = new.lines.stream();
            writeln!(stream, "{{\"reload_due\":{said}}}").unwrap();
        }
        drop(new);
        assert_eq!(old.last_word(), is_due);
    }
}

/// Has the old process send a part of its manifest and close the connection.
fn break_off(part: &str, path: &Path) -> Result<Option<Inherited>> {
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    std::thread::scope(|scope| {
        let new = scope.spawn(|| receive_or_outlive(theirs, path));
        heard(&ours);
        ours.write_all(part.as_bytes()).unwrap();
        drop(ours);
        new.join().unwrap()
    })
}

/// Before it has sent everything: what there is of it is closed, and the new process
/// starts as if there had been nobody. But one that lives has given the new one up.
#[test]
fn an_old_process_that_dies_early_was_never_there() {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("test.sock");
    let line = serde_json::to_string(&manifest(2)).unwrap();
    let parts = ["", " ", &line[..9], &line];
    for part in parts {
        let inherited = break_off(part, &path);
        assert!(inherited.unwrap().is_none(), "{part:?}");
    }
    let server = Server::start(&path).unwrap();
    let (calls, count) = (server.calls.clone(), parts.len());
    let old = std::thread::spawn(move || {
        for call in calls.iter().take(count) {
            let Call::Request(_, reply) = call else {
                panic!("{call:?}");
            };
            reply.send(Ok(Answer::Status(Box::default())));
        }
    });
    for part in parts {
        let text = break_off(part, &path).err().unwrap().to_string();
        assert!(text.contains("does not hand over"), "{text}");
    }
    old.join().unwrap();
}

/// Its refusal comes after the manifest, or not at all.
#[test]
fn an_old_process_that_gives_up_says_nothing_in_the_midst_of_the_manifest() {
    for prefix_count in [1, 100_000] {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut manifest = manifest(2);
        // Longer than the socket's buffer, or not.
        let prefix = manifest.runtime_peers[0].prefixes[0];
        manifest.runtime_peers[0].prefixes = vec![prefix; prefix_count];
        let mut handoff = Handoff::new(Lines::new(ours, LINE_BYTES_MAX));
        handoff.start(manifest, Arc::default(), None).unwrap();
        let is_short = prefix_count == 1;
        match is_short {
            true => assert_eq!(heard(&theirs)["ok"], true),
            false => {
                // It is full, and then has room for a word, but not for much more.
                theirs.read_exact(&mut [0; 1000]).unwrap();
                std::thread::sleep(Duration::from_millis(20));
                theirs.read_exact(&mut [0; 120_000]).unwrap();
            }
        }
        drop(handoff);
        let mut rest = String::new();
        theirs.read_to_string(&mut rest).unwrap();
        assert_eq!(rest.contains("it keeps the tunnel"), is_short, "{rest}");
        assert_eq!(rest.ends_with('\n'), is_short);
    }
}

#[test]
fn a_second_new_process_is_told_to_come_again() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    Handoff::refuse_second(Lines::new(ours, LINE_BYTES_MAX));
    let kept = heard(&theirs);
    let error = "another process is taking over already; try again";
    assert_eq!(kept, json!({"ok": false, "error": error}));
}

#[test]
fn who_fails_changes_nothing() {
    // A new process that goes away when it has seen the manifest.
    let (ours, theirs) = UnixStream::pair().unwrap();
    drop(theirs);
    assert!(serve(ours, &manifest(1), &[], || {}).is_err());
    // An old one that talks nonsense, refuses, or has no descriptors.
    let whole = serde_json::to_string(&manifest(1)).unwrap();
    let kept = "{\"ok\":false,\"error\":\"busy\"}";
    for (answer, says) in [
        ("nonsense", "expected"),
        (kept, "busy"),
        (&whole, "does not hand over"),
    ] {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        writeln!(ours, "{answer}").unwrap();
        let text = receive_or_outlive(theirs, NOBODY.as_ref())
            .err()
            .unwrap()
            .to_string();
        assert!(text.contains(says), "{text}");
    }
}

/// connect(2) says EAGAIN then, which says nothing to anybody.
#[test]
fn one_that_lets_nobody_in_does_not_answer() {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("test.sock");
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None).unwrap();
    socket.bind(&SockAddr::unix(&path).unwrap()).unwrap();
    socket.listen(0).unwrap();
    let _first = UnixStream::connect(&path).unwrap();
    let text = ask_within(&path, Duration::from_millis(20)).err().unwrap();
    let text = text.to_string();
    assert!(text.contains("it does not answer"), "{text}");
}
