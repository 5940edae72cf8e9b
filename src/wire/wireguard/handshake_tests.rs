use std::time::{Duration, SystemTime, UNIX_EPOCH};

use proptest::prelude::*;

use super::*;
use crate::wire::wireguard::cookie::{MacChecker, MacWriter};
use crate::wire::wireguard::message::{MAC_BYTES, Message};

/// Two hosts' keys, and what they share.
struct Ends {
    initiator: PrivateKey,
    responder: PrivateKey,
    preshared: PresharedKey,
}

impl Ends {
    fn new() -> Self {
        Self {
            initiator: PrivateKey::generate(),
            responder: PrivateKey::generate(),
            preshared: PresharedKey::generate(),
        }
    }

    /// Begins a handshake by the index 7. The initiation has its MACs.
    fn start(&self) -> (Initiator, [u8; INITIATION_BYTES]) {
        let remote = self.responder.public();
        let (initiator, mut initiation) =
            Initiator::start(&self.initiator, &remote, &self.preshared, 7, now()).unwrap();
        MacWriter::new(&remote).fill(&mut initiation, 0);
        (initiator, initiation)
    }

    /// What the responder reads of a datagram, if it lets it pass.
    fn read(&self, datagram: &[u8]) -> Option<Incoming> {
        let Message::Initiation(initiation) = Message::parse(datagram)? else {
            return None;
        };
        let checker = MacChecker::new(&self.responder.public());
        let is_for_us = checker.has_mac1(initiation);
        is_for_us.then(|| Incoming::read(&self.responder, initiation).ok())?
    }

    /// Answers by the index 8. The response has its MACs.
    fn respond(&self, incoming: Incoming) -> ([u8; RESPONSE_BYTES], TransportKeys) {
        let (mut response, keys) = incoming.respond(&self.preshared, 8).unwrap();
        MacWriter::new(&self.initiator.public()).fill(&mut response, 0);
        (response, keys)
    }

    /// What the initiator makes of a datagram, if it lets it pass.
    fn finish(&self, initiator: &mut Initiator, datagram: &[u8]) -> Option<TransportKeys> {
        let Message::Response(response) = Message::parse(datagram)? else {
            return None;
        };
        let checker = MacChecker::new(&self.initiator.public());
        let is_for_us = checker.has_mac1(response);
        is_for_us.then(|| initiator.finish(response).ok())?
    }
}

fn now() -> Timestamp {
    let time: SystemTime = UNIX_EPOCH + Duration::from_secs(1_700_000_000);
    Timestamp::next(time, None)
}

fn read_initiation(bytes: &[u8]) -> Initiation<'_> {
    match Message::parse(bytes) {
        Some(Message::Initiation(initiation)) => initiation,
        other => panic!("{other:?} is no initiation"),
    }
}

fn read_response(bytes: &[u8]) -> Response<'_> {
    match Message::parse(bytes) {
        Some(Message::Response(response)) => response,
        other => panic!("{other:?} is no response"),
    }
}

#[test]
fn both_ends_have_the_same_keys() {
    let mut ends = Ends::new();
    for preshared in [PresharedKey::default(), PresharedKey::generate()] {
        ends.preshared = preshared;
        let (mut initiator, initiation) = ends.start();
        let incoming = ends.read(&initiation).unwrap();
        assert_eq!(incoming.public_key(), ends.initiator.public());
        assert_eq!(incoming.timestamp(), now());
        let (response, theirs) = ends.respond(incoming);
        let ours = ends.finish(&mut initiator, &response).unwrap();
        assert_eq!(*ours.send, *theirs.receive);
        assert_eq!(*ours.receive, *theirs.send);
        assert_ne!(*ours.send, *ours.receive);
        assert_eq!((ours.remote_index, theirs.remote_index), (8, 7));
    }
}

#[test]
fn each_handshake_has_keys_of_its_own() {
    let ends = Ends::new();
    let keys = || {
        let (_, initiation) = ends.start();
        ends.respond(ends.read(&initiation).unwrap()).1
    };
    assert_ne!(*keys().send, *keys().send);
    // Also two answers to one initiation.
    let (_, initiation) = ends.start();
    let keys = || ends.respond(ends.read(&initiation).unwrap()).1;
    assert_ne!(*keys().send, *keys().send);
}

#[test]
fn ends_with_different_preshared_keys_have_no_session() {
    let mut ends = Ends::new();
    let (mut initiator, initiation) = ends.start();
    let incoming = ends.read(&initiation).unwrap();
    ends.preshared = PresharedKey::default();
    let (response, _) = ends.respond(incoming);
    assert!(ends.finish(&mut initiator, &response).is_none());
}

#[test]
fn an_initiation_to_another_host_is_refused() {
    let ends = Ends::new();
    let (_, mut initiation) = ends.start();
    let other = PrivateKey::generate();
    let checker = MacChecker::new(&other.public());
    assert!(!checker.has_mac1(read_initiation(&initiation)));
    // Even if somebody on the way makes the MAC right.
    MacWriter::new(&other.public()).fill(&mut initiation, 0);
    let initiation = read_initiation(&initiation);
    assert!(checker.has_mac1(initiation));
    assert!(Incoming::read(&other, initiation).is_err());
}

#[test]
fn a_forged_response_does_not_end_the_handshake() {
    let ends = Ends::new();
    let (mut initiator, initiation) = ends.start();
    let (response, theirs) = ends.respond(ends.read(&initiation).unwrap());
    let mut forged = response;
    forged[12 + RESPONSE_NOISE_BYTES - 1] ^= 1;
    assert!(initiator.finish(read_response(&forged)).is_err());
    // One to an initiation that came later.
    let (_, later) = ends.start();
    let (later, _) = ends.respond(ends.read(&later).unwrap());
    assert!(initiator.finish(read_response(&later)).is_err());
    // One by another index.
    let mut renamed = response;
    renamed[8] ^= 1;
    assert!(initiator.finish(read_response(&renamed)).is_err());
    let ours = initiator.finish(read_response(&response)).unwrap();
    assert_eq!(*ours.send, *theirs.receive);
    // It is over now.
    assert!(initiator.finish(read_response(&response)).is_err());
}

#[test]
fn a_key_of_low_order_gets_no_initiation() {
    let (local, none) = (PrivateKey::generate(), PresharedKey::default());
    let started = Initiator::start(&local, &PublicKey([0; KEY_BYTES]), &none, 7, now());
    assert_eq!(started.err(), Some(InvalidHandshake));
}

#[test]
fn identities_and_times_are_not_in_clear() {
    let ends = Ends::new();
    let (_, initiation) = ends.start();
    let (response, _) = ends.respond(ends.read(&initiation).unwrap());
    let messages = [&initiation[..], &response].concat();
    let hidden = [ends.initiator.public(), ends.responder.public()];
    for key in hidden {
        assert!(!messages.windows(8).any(|bytes| bytes == &key.0[..8]));
    }
    let time = now().to_bytes();
    assert!(!messages.windows(8).any(|bytes| bytes == &time[..8]));
}

#[test]
fn transport_keys_are_not_shown() {
    let keys = TransportKeys {
        send: Zeroizing::new([123; KEY_BYTES]),
        receive: Zeroizing::new([124; KEY_BYTES]),
        remote_index: 8,
    };
    assert_eq!(format!("{keys:?}"), "TransportKeys { remote_index: 8, .. }");
}

/// What may happen to a message on its way.
#[derive(Clone, Debug)]
enum Damage {
    Flip {
        at: prop::sample::Index,
        bits: u8,
    },
    Cut {
        to: prop::sample::Index,
    },
    Extend {
        by: Vec<u8>,
    },
    Replace {
        from: prop::sample::Index,
        with: Vec<u8>,
    },
}

impl Damage {
    /// Does it to all but mac2, which is only looked at under load. Returns whether the
    /// message is another then.
    fn apply(&self, message: &mut Vec<u8>) -> bool {
        let intact = message.clone();
        let covered = message.len() - MAC_BYTES;
        match self {
            Self::Flip { at, bits } => message[at.index(covered)] ^= bits,
            Self::Cut { to } => message.truncate(to.index(message.len())),
            Self::Extend { by } => message.extend(by),
            Self::Replace { from, with } => {
                let places = message[..covered].iter_mut().skip(from.index(covered));
                for (place, byte) in places.zip(with) {
                    *place = *byte;
                }
            }
        }
        *message != intact
    }
}

fn damages() -> impl Strategy<Value = Damage> {
    let bytes = || prop::collection::vec(any::<u8>(), 1..60);
    let at = any::<prop::sample::Index>;
    prop_oneof![
        4 => (at(), 1u8..).prop_map(|(at, bits)| Damage::Flip { at, bits }),
        1 => at().prop_map(|to| Damage::Cut { to }),
        1 => bytes().prop_map(|by| Damage::Extend { by }),
        2 => (at(), bytes()).prop_map(|(from, with)| Damage::Replace { from, with }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    /// With the MAC as it was, and with it made right again, as anybody could who knows the
    /// responder's public key.
    #[test]
    fn a_damaged_initiation_is_refused(damage in damages()) {
        let ends = Ends::new();
        let (_, initiation) = ends.start();
        let mut damaged = initiation.to_vec();
        prop_assume!(damage.apply(&mut damaged));
        prop_assert!(ends.read(&damaged).is_none());
        let is_sealed_part_intact = damaged.get(8..116) == Some(&initiation[8..116]);
        if let Ok(mut damaged) = <[u8; INITIATION_BYTES]>::try_from(damaged) {
            MacWriter::new(&ends.responder.public()).fill(&mut damaged, 0);
            let incoming = ends.read(&damaged);
            // The index is by the MAC alone; it only says what the answer is to name.
            let is_header_intact = damaged[..4] == initiation[..4];
            prop_assert_eq!(incoming.is_some(), is_sealed_part_intact && is_header_intact);
        }
    }

    #[test]
    fn a_damaged_response_is_refused(damage in damages()) {
        let ends = Ends::new();
        let (mut initiator, initiation) = ends.start();
        let (response, _) = ends.respond(ends.read(&initiation).unwrap());
        let mut damaged = response.to_vec();
        prop_assume!(damage.apply(&mut damaged));
        prop_assert!(ends.finish(&mut initiator, &damaged).is_none());
        let is_intact = damaged.get(8..60) == Some(&response[8..60]);
        if let Ok(mut damaged) = <[u8; RESPONSE_BYTES]>::try_from(damaged) {
            MacWriter::new(&ends.initiator.public()).fill(&mut damaged, 0);
            let is_header_intact = damaged[..4] == response[..4];
            let keys = ends.finish(&mut initiator, &damaged);
            prop_assert_eq!(keys.is_some(), is_intact && is_header_intact);
        }
    }

    #[test]
    fn random_bytes_begin_and_end_no_handshake(
        initiation in prop::collection::vec(any::<u8>(), INITIATION_BYTES - 4),
        response in prop::collection::vec(any::<u8>(), RESPONSE_BYTES - 4),
    ) {
        let ends = Ends::new();
        let initiation = [&[1, 0, 0, 0], &initiation[..]].concat();
        let initiation = read_initiation(&initiation);
        prop_assert!(Incoming::read(&ends.responder, initiation).is_err());
        let (mut initiator, _) = ends.start();
        let mut response = [&[2, 0, 0, 0], &response[..]].concat();
        response[8..12].copy_from_slice(&7u32.to_le_bytes());
        prop_assert!(initiator.finish(read_response(&response)).is_err());
    }
}
