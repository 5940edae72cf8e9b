//! boringtun, in both roles, on the other end of handshakes of ours.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::SystemTime;

use boringtun::noise::rate_limiter::RateLimiter;
use boringtun::noise::{Tunn, TunnResult};
use boringtun::x25519;
use chacha20poly1305::aead::{Aead, Payload};
use chacha20poly1305::{ChaCha20Poly1305, KeyInit};

use super::cookie::{MacChecker, MacWriter};
use super::handshake::{Incoming, Initiator, TransportKeys};
use super::keys::{PresharedKey, PrivateKey};
use super::message::{
    CookieReply, DATA_HEADER_BYTES, Data, Initiation, MAC_BYTES, Message, Response,
};
use super::timestamp::Timestamp;

/// What we call the sessions.
const INDEX: u32 = 0x1234_5678;

const SOURCE: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)), 51820);

/// A host of ours, and boringtun as its peer.
struct Ends {
    ours: PrivateKey,
    theirs: PrivateKey,
    preshared: PresharedKey,
    /// MACs on what we send, and on what comes.
    writer: MacWriter,
    checker: MacChecker,
    tunn: Tunn,
    /// When the last initiation was made.
    last: Option<Timestamp>,
}

impl Ends {
    /// boringtun is under load from its first message on if `is_loaded`.
    fn new(preshared: PresharedKey, is_loaded: bool) -> Self {
        let (ours, theirs) = (PrivateKey::generate(), PrivateKey::generate());
        let public = |key: &PrivateKey| x25519::PublicKey::from(key.public().0);
        let limiter = Arc::new(RateLimiter::new(&public(&theirs), 0));
        Self {
            writer: MacWriter::new(&theirs.public()),
            checker: MacChecker::new(&ours.public()),
            tunn: Tunn::new(
                x25519::StaticSecret::from(*theirs.as_bytes()),
                public(&ours),
                preshared.is_set().then(|| *preshared.as_bytes()),
                None,
                1,
                is_loaded.then_some(limiter),
            ),
            ours,
            theirs,
            preshared,
            last: None,
        }
    }

    fn start(&mut self) -> (Initiator, Vec<u8>) {
        let timestamp = Timestamp::next(SystemTime::now(), self.last);
        self.last = Some(timestamp);
        let remote = self.theirs.public();
        let (initiator, mut initiation) =
            Initiator::start(&self.ours, &remote, &self.preshared, INDEX, timestamp).unwrap();
        self.writer.fill(&mut initiation, 0);
        (initiator, initiation.to_vec())
    }

    fn their_initiation(&mut self) -> Vec<u8> {
        let mut room = [0; 200];
        sent(self.tunn.format_handshake_initiation(&mut room, true))
    }

    /// What boringtun answers to a datagram.
    fn answer(&mut self, datagram: &[u8]) -> Vec<u8> {
        let mut room = [0; 200];
        let result = self
            .tunn
            .decapsulate(Some(SOURCE.ip()), datagram, &mut room);
        sent(result)
    }

    fn refuses(&mut self, datagram: &[u8]) -> bool {
        let mut room = [0; 200];
        let result = self
            .tunn
            .decapsulate(Some(SOURCE.ip()), datagram, &mut room);
        matches!(result, TunnResult::Err(_))
    }

    /// Sends a packet each way.
    fn exchange(&mut self, keys: &TransportKeys, counter: u64) {
        let packet = packet();
        let mut room = [0; 200];
        match self
            .tunn
            .decapsulate(None, &seal(keys, counter, &packet), &mut room)
        {
            TunnResult::WriteToTunnelV4(received, _) => assert_eq!(received, packet),
            other => panic!("{other:?}"),
        }
        let datagram = sent(self.tunn.encapsulate(&packet, &mut room));
        assert_eq!(open(keys, &datagram), packet);
    }
}

fn sent(result: TunnResult<'_>) -> Vec<u8> {
    match result {
        TunnResult::WriteToNetwork(datagram) => datagram.to_vec(),
        other => panic!("{other:?} where a datagram was expected"),
    }
}

/// An IPv4 packet that needs no padding.
fn packet() -> Vec<u8> {
    let mut packet = vec![0; 32];
    packet[0] = 0x45;
    packet[3] = 32;
    packet
}

fn nonce(counter: u64) -> [u8; 12] {
    let mut nonce = [0; 12];
    nonce[4..].copy_from_slice(&counter.to_le_bytes());
    nonce
}

fn seal(keys: &TransportKeys, counter: u64, packet: &[u8]) -> Vec<u8> {
    let mut header = [0; DATA_HEADER_BYTES];
    let receiver_index = keys.remote_index;
    let data = Data {
        receiver_index,
        counter,
    };
    data.write(&mut header);
    let cipher = ChaCha20Poly1305::new((&*keys.send).into());
    let sealed = cipher.encrypt(&nonce(counter).into(), packet).unwrap();
    [&header[..], &sealed].concat()
}

fn open(keys: &TransportKeys, datagram: &[u8]) -> Vec<u8> {
    let data = Data::read(datagram).unwrap();
    assert_eq!(data.receiver_index, INDEX);
    let cipher = ChaCha20Poly1305::new((&*keys.receive).into());
    let sealed = Payload::from(&datagram[DATA_HEADER_BYTES..]);
    let packet = cipher.decrypt(&nonce(data.counter).into(), sealed);
    packet.expect("it is authentic")
}

fn initiation(datagram: &[u8]) -> Initiation<'_> {
    match Message::parse(datagram) {
        Some(Message::Initiation(initiation)) => initiation,
        other => panic!("{other:?} is no initiation"),
    }
}

fn response(datagram: &[u8]) -> Response<'_> {
    match Message::parse(datagram) {
        Some(Message::Response(response)) => response,
        other => panic!("{other:?} is no response"),
    }
}

fn cookie_reply(datagram: &[u8]) -> CookieReply<'_> {
    match Message::parse(datagram) {
        Some(Message::CookieReply(reply)) => reply,
        other => panic!("{other:?} is no cookie reply"),
    }
}

#[test]
fn boringtun_answers_our_handshake() {
    for preshared in [PresharedKey::default(), PresharedKey::generate()] {
        let mut ends = Ends::new(preshared, false);
        let (mut initiator, initiation) = ends.start();
        let answer = ends.answer(&initiation);
        let response = response(&answer);
        assert!(ends.checker.has_mac1(response));
        let keys = initiator.finish(response).unwrap();
        ends.exchange(&keys, 0);
        ends.exchange(&keys, 1);
        // It has seen this timestamp, and the next step is later.
        assert!(ends.refuses(&initiation));
        let (mut initiator, initiation) = ends.start();
        let answer = ends.answer(&initiation);
        let keys = initiator.finish(self::response(&answer)).unwrap();
        ends.exchange(&keys, 0);
    }
}

#[test]
fn boringtun_takes_our_answer() {
    for preshared in [PresharedKey::default(), PresharedKey::generate()] {
        let mut ends = Ends::new(preshared, false);
        let first = ends.their_initiation();
        let second = ends.their_initiation();
        let read = |datagram| Incoming::read(&ends.ours, initiation(datagram)).unwrap();
        assert!(ends.checker.has_mac1(initiation(&second)));
        let incoming = read(&second);
        assert_eq!(incoming.public_key(), ends.theirs.public());
        assert!(incoming.timestamp() > read(&first).timestamp());
        let (mut response, keys) = incoming.respond(&ends.preshared, INDEX).unwrap();
        ends.writer.fill(&mut response, 0);
        // A keepalive, which confirms the keys.
        let keepalive = ends.answer(&response);
        assert!(open(&keys, &keepalive).is_empty());
        ends.exchange(&keys, 0);
    }
}

#[test]
fn boringtun_with_another_preshared_key_gets_no_session() {
    let mut ends = Ends::new(PresharedKey::generate(), false);
    let their_key = std::mem::take(&mut ends.preshared);
    let (mut initiator, initiation) = ends.start();
    let answer = ends.answer(&initiation);
    assert!(initiator.finish(response(&answer)).is_err());
    let theirs = ends.their_initiation();
    let answer = |key: &PresharedKey| {
        let incoming = Incoming::read(&ends.ours, self::initiation(&theirs)).unwrap();
        incoming.respond(key, INDEX).unwrap().0
    };
    let (mut wrong, mut right) = (answer(&ends.preshared), answer(&their_key));
    ends.writer.fill(&mut wrong, 0);
    ends.writer.fill(&mut right, 0);
    assert!(ends.refuses(&wrong));
    assert_eq!(ends.answer(&right).len(), 32);
}

#[test]
fn a_cookie_of_boringtun_gets_us_an_answer() {
    let mut ends = Ends::new(PresharedKey::default(), true);
    let (_, first) = ends.start();
    let reply = ends.answer(&first);
    let reply = cookie_reply(&reply);
    assert_eq!(reply.receiver_index(), INDEX);
    ends.writer.receive(reply, 0).unwrap();
    let (mut initiator, second) = ends.start();
    assert_ne!(second[second.len() - MAC_BYTES..], [0; MAC_BYTES]);
    let answer = ends.answer(&second);
    let keys = initiator.finish(response(&answer)).unwrap();
    ends.exchange(&keys, 0);
}

#[test]
fn boringtun_comes_back_with_our_cookie() {
    let mut ends = Ends::new(PresharedKey::default(), false);
    let first = ends.their_initiation();
    let first = initiation(&first);
    assert!(!ends.checker.has_mac2(first, SOURCE, 0));
    let reply = ends.checker.reply(first, SOURCE, 0);
    let mut room = [0; 200];
    let result = ends.tunn.decapsulate(None, &reply, &mut room);
    assert!(matches!(result, TunnResult::Done));
    let second = ends.their_initiation();
    let second = initiation(&second);
    assert!(ends.checker.has_mac1(second));
    assert!(ends.checker.has_mac2(second, SOURCE, 0));
    let elsewhere = SocketAddr::new(SOURCE.ip(), 51821);
    assert!(!ends.checker.has_mac2(second, elsewhere, 0));
}
