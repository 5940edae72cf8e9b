use super::*;
use crate::capture::frame::{HEADER_BYTES, Header};
use crate::capture::{Direction, Note};
use crate::config::parse_peer;
use crate::routing::overlay::Origin;

fn overlay(peer: &str, generation: u16) -> Overlay {
    let mut overlay = Overlay::default();
    let spec = parse_peer(peer).unwrap();
    overlay.add_peer(&spec, true, Origin::Config).unwrap();
    overlay.generation = generation;
    overlay
}

/// A capture without its thread, and what that would do.
fn capture(counters: &[Arc<Counters>], overlay: &Overlay) -> (Capture, Sender) {
    let asker = Asker { pid: 1, uid: 0 };
    let shared = Arc::<Shared>::default();
    let capture = Capture {
        asker,
        begun: Instant::now(),
        shared: Arc::clone(&shared),
        thread: None,
    };
    capture.set_peers(overlay);
    let (stream, _) = UnixStream::pair().unwrap();
    let sender = Sender {
        taps: Taps::attach(counters.to_vec(), 128),
        stream,
        shared,
        out: Vec::new(),
        sent: 0,
        told: Told {
            generation: overlay.generation,
            lost: 0,
        },
    };
    (capture, sender)
}

/// What is sent next: lengths of packets, and names.
fn sent(sender: &mut Sender) -> Vec<String> {
    sender.out.clear();
    sender.fill();
    let (mut rest, mut all) = (&sender.out[..], Vec::new());
    while let Some((header, behind)) = rest.split_first_chunk::<HEADER_BYTES>() {
        let header = Header::read(header);
        let (body, behind) = behind.split_at(header.body_bytes as usize);
        rest = behind;
        match header.kind {
            frame::PACKET => all.push(body.len().to_string()),
            frame::PEERS => all.push(String::from_utf8_lossy(body).into_owned()),
            _ => {}
        }
    }
    all
}

/// A packet that has waited while its peer's number became another's keeps its peer.
#[test]
fn packets_have_the_names_of_their_time() {
    let all: Vec<Arc<Counters>> = vec![Arc::default(), Arc::default()];
    let (old, new) = (overlay("10.0.0.2", 7), overlay("10.0.0.3", 8));
    let (capture, mut sender) = capture(&all, &old);
    let note = |worker: usize, bytes: usize| {
        let packet = vec![0x45; bytes];
        let note = Note::carried(Direction::Out, Some(0), &packet);
        all[worker].tap.note(|| note);
    };
    all.iter().for_each(|it| it.tap.set_generation(7));
    note(0, 1);
    capture.set_peers(&new);
    all[0].tap.set_generation(8);
    note(0, 2);
    note(1, 3);
    note(0, 4);
    // One that has not changed yet does not have the names sent again and again.
    let names = r#"{"0":"10.0.0.3:8285"}"#;
    assert_eq!(sent(&mut sender), ["1", "3", names, "2", "4"]);
    all[1].tap.set_generation(8);
    note(1, 5);
    assert_eq!(sent(&mut sender), ["5"]);
    // The change was undone.
    capture.set_peers(&old);
    all[0].tap.set_generation(7);
    note(0, 6);
    let names = r#"{"0":"10.0.0.2:8285"}"#;
    assert_eq!(sent(&mut sender), [names, "6"]);
    // Those of long ago have none, and not those of now.
    note(0, 7);
    for generation in 9..9 + GENERATIONS_MAX as u16 {
        capture.set_peers(&overlay("10.0.0.4", generation));
    }
    all[0].tap.set_generation(9);
    note(0, 8);
    let names = r#"{"0":"10.0.0.4:8285"}"#;
    assert_eq!(sent(&mut sender), ["7", names, "8"]);
    all[0].tap.set_generation(7);
    note(0, 9);
    assert_eq!(sent(&mut sender), ["{}", "9"]);
}
