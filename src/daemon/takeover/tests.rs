//! Both sides, over a socket pair.

use std::io::{Read, Write};
use std::net::UdpSocket;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::OnceLock;

use socket2::{Domain, SockAddr, Socket, Type};

use super::predecessor::{ask_within, receive_or_outlive};
use super::wire::{hear, say, send_descriptors};
use super::*;

fn manifest(workers: u16) -> Manifest {
    Manifest {
        ok: true,
        pid: 4711,
        version: "0.1.0".into(),
        protocol: PROTOCOL,
        tun: "fastvpn0".into(),
        workers,
        listen: "0.0.0.0:8285".parse().unwrap(),
        tun_offloads: [true, false],
        udp_offloads: [false, true],
        tun_wanted: [true, true],
        udp_wanted: [false, true],
        is_steered: true,
        addresses: vec!["10.244.0.1/16".parse().unwrap()],
        runtime_peers: vec![RuntimePeer {
            peer: "10.0.0.9:8285".into(),
            is_default: false,
            prefixes: vec!["10.9.0.0/16".parse().unwrap()],
        }],
        runtime_prefixes: Vec::new(),
    }
}

/// Eats the request that [`receive`] sends first.
fn asked(stream: &mut UnixStream) {
    let mut byte = [0];
    while byte != [b'\n'] {
        stream.read_exact(&mut byte).unwrap();
    }
}

#[test]
fn descriptors_change_hands() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let listener = UdpSocket::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let predecessor = std::thread::spawn(move || {
        let mut stream = ours;
        asked(&mut stream);
        let successor = Successor::new(stream);
        successor.check(PROTOCOL).unwrap();
        let workers = (0..2).map(|index| WorkerDescriptors {
            queue: listener.as_fd(),
            receive: listener.as_fd(),
            send: (index == 1).then_some(listener.as_fd()),
        });
        let adding = OnceLock::new();
        successor
            .hand_over(&manifest(2), workers, Some(listener.as_fd()), &adding)
            .unwrap();
        successor.done(true).unwrap();
        adding.into_inner()
    });
    let mut inherited = receive_or_outlive(theirs).unwrap().unwrap();
    assert_eq!(inherited.manifest, manifest(2));
    assert!(inherited.device.offloads.tcp && !inherited.device.offloads.udp);
    assert!(!inherited.udp.segment && inherited.udp.gro);
    assert_eq!(inherited.device.queues.len(), 2);
    assert!(inherited.listener.is_some());
    let [first, second] = &inherited.sockets[..] else {
        panic!("two workers")
    };
    let local = |socket: &Socket| socket.local_addr().unwrap().as_socket().unwrap();
    assert_eq!(local(&first.receive), address);
    assert!(first.send.is_none() && second.send.is_some());
    let adding = vec!["10.250.0.9/24".parse().unwrap()];
    inherited.predecessor.will_add(&adding).unwrap();
    let is_reload_due = inherited.predecessor.stop().unwrap();
    assert!(is_reload_due);
    assert_eq!(predecessor.join().unwrap(), Some(adding));
}

/// Both sides, as they are before [`Step::Go`].
fn ready() -> (Successor, Predecessor) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    for stream in [&ours, &theirs] {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
    }
    (Successor::new(ours), Predecessor(theirs))
}

/// Whatever the old process has said before it dies: who has everything goes on, unless
/// it was told that the old one does.
#[test]
fn a_predecessor_that_dies_is_outlived() {
    for (said, carries_on) in [
        ("", true),
        ("d", true),
        ("h", true),
        ("k", false),
        ("dk", false),
        ("x", false),
    ] {
        let (ours, predecessor) = ready();
        let successor = std::thread::spawn(move || predecessor.stop());
        hear(&ours.0, Step::Go).unwrap();
        ours.0.shutdown(std::net::Shutdown::Read).unwrap();
        (&*ours.0).write_all(said.as_bytes()).unwrap();
        drop(ours);
        let result = successor.join().unwrap();
        assert_eq!(result.is_ok(), carries_on, "{said:?}: {result:?}");
    }
}

/// Either the predecessor hears that its successor starts, or the successor
/// hears that it must not.
#[test]
fn a_late_successor_does_not_start() {
    let (ours, predecessor) = ready();
    let late = ours.done_within(Step::Done, Duration::from_millis(20));
    let error = late.unwrap_err().to_string();
    assert!(error.contains("does not answer"), "{error}");
    ours.keep();
    hear(&predecessor.0, Step::Done).unwrap();
    assert!(say(&predecessor.0, Step::Taken).is_err());
    let kept = hear(&predecessor.0, Step::Taken).unwrap_err().to_string();
    assert!(kept.contains("keeps the tunnel"), "{kept}");
    // One that is gone is not waited for, one that has just said so counts.
    let (ours, predecessor) = ready();
    drop(predecessor);
    assert!(ours.done(false).is_err());
    let (ours, predecessor) = ready();
    say(&predecessor.0, Step::Taken).unwrap();
    drop(predecessor);
    ours.done(false).unwrap();
}

/// How far an old process comes, in steps.
fn old_process(stream: UnixStream, steps: usize) {
    let mut stream = stream;
    asked(&mut stream);
    let line = serde_json::to_string(&manifest(2)).unwrap() + "\n";
    let mut wrote = |bytes: &[u8]| stream.write_all(bytes).unwrap();
    match steps {
        0 => return,
        1 => return wrote(&line.as_bytes()[..9]),
        _ => wrote(line.as_bytes()),
    }
    hear(&stream, Step::Ready).unwrap();
    let any = UdpSocket::bind("127.0.0.1:0").unwrap();
    for _ in 2..steps {
        send_descriptors(&stream, [any.as_fd(); 2].into_iter()).unwrap();
    }
}

/// Before it has sent everything: what there is of it is closed, and the new process
/// starts as if there had been nobody.
#[test]
fn a_predecessor_that_dies_early_was_never_there() {
    // The manifest, its end, and three messages with descriptors.
    const ALL: usize = 5;
    for steps in 0..=ALL {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let old = std::thread::spawn(move || old_process(ours, steps));
        let inherited = receive_or_outlive(theirs).unwrap();
        old.join().unwrap();
        assert_eq!(inherited.is_some(), steps == ALL, "{steps} steps");
    }
}

#[test]
fn who_fails_changes_nothing() {
    // A successor that goes away when it has seen the manifest.
    let (ours, theirs) = UnixStream::pair().unwrap();
    drop(theirs);
    let successor = Successor::new(ours);
    let nobody = std::iter::empty();
    assert!(
        successor
            .hand_over(&manifest(1), nobody, None, &OnceLock::new())
            .is_err()
    );
    // A predecessor that talks nonsense, refuses, or thinks better of it.
    let whole = serde_json::to_string(&manifest(1)).unwrap() + "\n";
    for (answer, says) in [
        ("nonsense\n", "cannot take over"),
        ("{\"ok\":false,\"error\":\"busy\"}\n", "busy"),
        (&(whole.clone() + "k"), "keeps the tunnel"),
    ] {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (manifest, rest) = answer.split_at(answer.find('\n').unwrap() + 1);
        let old = std::thread::spawn({
            let (manifest, rest) = (manifest.to_string(), rest.to_string());
            move || {
                let mut ours = ours;
                asked(&mut ours);
                ours.write_all(manifest.as_bytes()).unwrap();
                if !rest.is_empty() {
                    hear(&ours, Step::Ready).unwrap();
                    ours.write_all(rest.as_bytes()).unwrap();
                }
            }
        });
        let text = receive_or_outlive(theirs).err().unwrap().to_string();
        old.join().unwrap();
        assert!(text.contains(says), "{text}");
    }
}

#[test]
fn other_versions_are_told_so() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let successor = Successor::new(ours);
    successor.refuse(&successor.check(PROTOCOL + 1).unwrap_err());
    drop(successor);
    let mut answer = String::new();
    theirs.read_to_string(&mut answer).unwrap();
    assert!(answer.contains("\"ok\":false"), "{answer}");
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    let old = Manifest {
        protocol: PROTOCOL + 1,
        ..manifest(1)
    };
    let line = serde_json::to_string(&old).unwrap() + "\n";
    ours.write_all(line.as_bytes()).unwrap();
    let text = receive_or_outlive(theirs).err().unwrap().to_string();
    assert!(text.contains("another version"), "{text}");
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
