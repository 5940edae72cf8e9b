//! Both sides, over a socket pair.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, UdpSocket};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use serde_json::json;
use socket2::{Domain, SockAddr, Socket, Type};

use super::new::{Inherited, OldProcess, ask, has_other_file};
use super::*;
use crate::config::Config;
use crate::control::codec::Lines;
use crate::daemon::manifest::KnownPeer;
use crate::error::Result;

const LINE_BYTES_MAX: usize = 1 << 20;

const PATIENCE: Duration = Duration::from_secs(30);

fn manifest(workers: usize) -> Manifest {
    Manifest {
        ok: true,
        pid: 4711,
        version: "0.1.0".into(),
        tun: "fastvpn0".into(),
        tun_index: Some(7),
        own_ports: (0..workers).map(|worker| worker % 2 == 1).collect(),
        listen: "0.0.0.0:8285".parse().unwrap(),
        is_encrypted: false,
        is_interface: false,
        private_key: None,
        is_listen_set: false,
        fwmark: None,
        identity: None,
        tun_offloads: [true, false],
        udp_offloads: [false, true],
        metrics: None,
        without: Vec::new(),
        is_steered: true,
        addresses: vec!["10.244.0.1/16".parse().unwrap()],
        peers: vec![KnownPeer {
            peer: "10.0.0.9:8285".into(),
            identity: None,
            place: None,
            is_moved: false,
            preshared_key: None,
            keepalive_seconds: None,
            endpoint: "10.0.0.9:8286".parse().ok(),
            has_roamed: false,
            is_suspended: false,
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
        let mut new = serve(ours, &manifest(WORKERS), &descriptors).unwrap();
        new.let_go(Vec::new()).unwrap();
        new.leave();
    });
    let mut inherited = receive(theirs).unwrap();
    assert_eq!(inherited.manifest, manifest(WORKERS));
    let claimed = inherited.claimed;
    assert!(claimed.device.offloads.tcp && !claimed.device.offloads.udp);
    assert!(!claimed.sockets.offloads.segment && claimed.sockets.offloads.gro);
    assert_eq!(claimed.device.queues.len(), WORKERS);
    assert_eq!(claimed.sockets.workers.len(), WORKERS);
    assert!(inherited.listener.is_some());
    let local = |socket: &Socket| socket.local_addr().unwrap().as_socket().unwrap();
    assert_eq!(local(&claimed.sockets.workers[0].receive), address);
    for (index, sockets) in claimed.sockets.workers.iter().enumerate() {
        assert_eq!(sockets.send.is_some(), index % 2 == 1);
    }
    inherited.old.stop().unwrap();
    old.join().unwrap();
}

/// Both sides, as they are when the manifest has been sent.
fn both() -> (NewProcess, OldProcess) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let lines = |stream| Lines::new(stream, LINE_BYTES_MAX);
    (NewProcess(lines(ours)), OldProcess(lines(theirs)))
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
        ("nonsense\n", false),
    ] {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        let mut old = OldProcess(Lines::new(theirs, LINE_BYTES_MAX));
        let taking = std::thread::spawn(move || old.stop());
        assert_eq!(heard(&ours), json!({"ready": true}));
        ours.write_all(said.as_bytes()).unwrap();
        drop(ours);
        let result = taking.join().unwrap();
        assert_eq!(result.is_ok(), carries_on, "{said:?}: {result:?}");
    }
}

/// Also one that has said so before the new process was ready.
#[test]
fn a_new_process_that_is_dropped_is_told_so() {
    let (new, mut old) = both();
    drop(new);
    let text = old.stop().unwrap_err().to_string();
    assert!(text.contains("keeps the tunnel"), "{text}");
}

/// Whether it has died or does not listen any more.
#[test]
fn a_new_process_that_has_gone_does_not_get_the_tunnel() {
    let (mut new, old) = both();
    drop(old);
    let text = new.let_go(Vec::new()).unwrap_err().to_string();
    assert!(text.contains("closed the connection"), "{text}");
    let (mut new, old) = both();
    old.0.stream().shutdown(Shutdown::Read).unwrap();
    assert!(new.let_go(Vec::new()).is_err());
}

/// It has been told to go on, and dies before it says that it does.
#[test]
fn a_new_process_that_dies_before_it_goes_on_is_outlived() {
    for said in ["", "{\"taken\":", "nonsense\n"] {
        let (mut new, old) = both();
        let leaving = std::thread::spawn(move || new.let_go(Vec::new()));
        let mut stream = old.0.stream();
        assert_eq!(heard(stream), json!({"go": true, "timestamps": []}));
        stream.write_all(said.as_bytes()).unwrap();
        drop(old);
        assert!(leaving.join().unwrap().is_err(), "{said:?}");
    }
    // One that says so has the tunnel, also if it dies then.
    let (mut new, old) = both();
    let taken = b"{\"taken\":true}\n";
    old.0.stream().write_all(taken).unwrap();
    old.0.stream().shutdown(Shutdown::Write).unwrap();
    new.let_go(Vec::new()).unwrap();
}

/// As after a pause for which the old process has not waited. It carries on, or it has
/// died over it.
#[test]
fn a_new_process_that_comes_too_late_does_not_get_the_tunnel() {
    for dies in [false, true] {
        let (mut new, mut old) = both();
        let go = wire::Go {
            go: true,
            timestamps: Vec::new(),
        };
        wire::send(&mut new.0, &go, Instant::now()).unwrap();
        new.0.stream().shutdown(Shutdown::Read).unwrap();
        let taking = std::thread::spawn(move || old.stop());
        match dies {
            true => new.0.stream().shutdown(Shutdown::Both).unwrap(),
            false => drop(new),
        }
        let result = taking.join().unwrap();
        assert_eq!(result.is_ok(), dies, "{result:?}");
    }
}

/// Its connection stays open for as long as it runs.
#[test]
fn the_end_of_the_old_process_is_waited_for() {
    let (mut new, mut old) = both();
    let taking = std::thread::spawn(move || old.stop().map(|_| old));
    assert_eq!(heard(new.0.stream()), json!({"ready": true}));
    new.let_go(Vec::new()).unwrap();
    new.leave();
    let mut old = taking.join().unwrap().unwrap();
    assert!(old.0.receive(Instant::now()).is_err());
    let (new, old) = both();
    drop(new);
    old.wait_for_end();
}

/// Has an old process send a part of its manifest and close the connection. It dies
/// then, or does so each time that it is asked.
fn break_off(part: &str, dies: bool) -> Result<Option<Inherited>> {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("test.sock");
    let listener = UnixListener::bind(&path).unwrap();
    listener.set_nonblocking(true).unwrap();
    std::thread::scope(|scope| {
        let new = scope.spawn(|| ask(&path, PATIENCE));
        let mut listener = Some(listener);
        while !new.is_finished() {
            std::thread::sleep(Duration::from_millis(1));
            let Some((mut stream, _)) = listener.as_ref().and_then(|one| one.accept().ok()) else {
                continue;
            };
            heard(&stream);
            stream.write_all(part.as_bytes()).unwrap();
            if dies {
                listener = None;
            }
        }
        new.join().unwrap()
    })
}

/// Before it has sent everything: what there is of it is closed, and the new process
/// starts as if there had been nobody. But one that lives has given the new one up.
#[test]
fn an_old_process_that_dies_early_was_never_there() {
    let line = serde_json::to_string(&manifest(2)).unwrap();
    for part in ["", " ", &line[..9], &line] {
        assert!(break_off(part, true).unwrap().is_none(), "{part:?}");
    }
    let text = break_off(&line, false).err().unwrap().to_string();
    assert!(text.contains("does not hand over"), "{text}");
}

/// Its refusal comes after the manifest, or not at all.
#[test]
fn an_old_process_that_gives_up_says_nothing_in_the_middle_of_the_manifest() {
    for prefix_count in [1, 100_000] {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut manifest = manifest(2);
        // Longer than the socket's buffer, or not.
        let prefix = manifest.peers[0].prefixes[0];
        manifest.peers[0].prefixes = vec![prefix; prefix_count];
        let mut handoff = Handoff::new(Lines::new(ours, LINE_BYTES_MAX));
        handoff.start(manifest, Vec::new(), None, &[]).unwrap();
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
fn a_process_that_fails_changes_nothing() {
    // A new process that goes away when it has seen the manifest.
    let (ours, theirs) = UnixStream::pair().unwrap();
    drop(theirs);
    assert!(serve(ours, &manifest(1), &[]).is_err());
    // An old one that talks nonsense, refuses, or has no descriptors.
    let whole = serde_json::to_string(&manifest(1)).unwrap();
    let kept = "{\"ok\":false,\"error\":\"busy\"}";
    for (answer, says) in [
        ("nonsense", "expected"),
        (kept, "busy"),
        (&whole, "invalid data"),
    ] {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        writeln!(ours, "{answer}").unwrap();
        let text = receive(theirs).err().unwrap().to_string();
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
    let text = ask(&path, Duration::from_millis(20)).err().unwrap();
    let text = text.to_string();
    assert!(text.contains("it does not answer"), "{text}");
}

/// A reload without need would undo what operators have moved from peer to peer.
#[test]
fn a_configuration_file_is_read_again_only_if_it_has_changed() {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("fastvpn.toml");
    let write = |text: &str| std::fs::write(&path, text).unwrap();
    let config = |words: &[&OsStr]| Config::from_words(words.iter().copied()).unwrap();
    write("hop = true\nwithout = [\"uso\"]\n");
    let mut with_file = config(&["--config".as_ref(), path.as_ref(), "--queues=2".as_ref()]);
    // As with the offloads of a tunnel that was taken over.
    with_file.without.clear();
    assert!(!has_other_file(&with_file));
    write("hop = false\nwithout = [\"uso\"]\n");
    assert!(has_other_file(&with_file));
    write("hop = \n");
    assert!(has_other_file(&with_file));
    // What `wg` has set does not make it another file.
    write("fwmark = 3\n");
    let mut changed = config(&["--config".as_ref(), path.as_ref()]);
    (changed.fwmark, changed.by_wg.fwmark) = (7, true);
    assert!(!has_other_file(&changed));
    let without_file = config(&["--peer=10.0.0.1".as_ref()]);
    assert!(!has_other_file(&without_file));
}
