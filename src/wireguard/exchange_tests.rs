//! The protocol between hosts of a simulated network; see `test_network.rs`.

use std::net::SocketAddr;
use std::sync::Weak;
use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::wire::Endpoint;
use crate::wire::wireguard::cookie::MacWriter;
use crate::wire::wireguard::keys::PresharedKey;
use crate::wire::wireguard::message::{COOKIE_REPLY, DATA, INITIATION, RESPONSE};
use crate::wireguard::test_network::{Datagram, Network, Output, Weather};

/// Two hosts, of which the first has sent a packet and both have a session.
fn pair() -> Network {
    let mut network = Network::new(2, 1);
    network.send(0, 1);
    network.run(1.0);
    assert!(network.agree(0, 1));
    network
}

fn value(network: &Network, host: usize, name: &str) -> u64 {
    let mut values = network.hosts[host].counters.values();
    values.find(|(it, _)| *it == name).unwrap().1
}

/// The latest datagram of a kind that a host has sent.
fn latest(network: &Network, host: usize, kind: u8) -> Datagram {
    let from = network.hosts[host].address;
    let mut log = network.log.iter().rev().map(|(_, datagram)| datagram);
    let found = log.find(|it| it.from == from && it.kind() == kind);
    found.unwrap().clone()
}

/// An initiation by anybody, to a host of the network.
fn initiation(network: &mut Network, to: usize, by: &PrivateKey, index: u32) -> Vec<u8> {
    let (remote, now) = (network.key(to), network.now());
    let timestamp = Timestamp::next(now.wall, None);
    let none = PresharedKey::default();
    let (_, mut message) = Initiator::start(by, &remote, &none, index, timestamp).unwrap();
    MacWriter::new(&remote).fill(&mut message, now.ns);
    message.to_vec()
}

/// What a host does about a datagram from elsewhere.
fn answer(network: &mut Network, host: usize, from: &str, mut datagram: Vec<u8>) -> Output {
    let (now, mut output) = (network.now(), Output::default());
    let exchange = &mut network.hosts[host].exchange;
    let from: SocketAddr = from.parse().unwrap();
    exchange.receive(now, from.into(), &mut datagram, &mut output);
    output
}

const ELSEWHERE: &str = "203.0.113.9:9";

#[test]
fn a_packet_makes_a_session_and_arrives_in_it() {
    let mut network = Network::new(2, 1);
    let there = network.send(0, 1);
    network.run(1.0);
    assert!(network.hosts[1].received.contains(&there));
    assert!(network.agree(0, 1));
    let back = network.send(1, 0);
    network.run(1.0);
    assert!(network.hosts[0].received.contains(&back));
    let kinds: Vec<_> = network.log.iter().map(|(_, it)| it.kind()).collect();
    assert_eq!(kinds, [INITIATION, RESPONSE, DATA, DATA]);
    let is_initiator = |host: usize| {
        network.hosts[host]
            .current(1 - host)
            .unwrap()
            .is_initiator()
    };
    assert!(is_initiator(0) && !is_initiator(1));
    for host in 0..2 {
        let key = network.key(1 - host);
        assert!(
            network.hosts[host]
                .latest
                .lock()
                .unwrap()
                .contains_key(&key)
        );
        assert_eq!(network.hosts[host].indices(), 1);
    }
}

#[test]
fn a_keepalive_comes_first_when_nothing_waits() {
    let mut network = Network::new(2, 1);
    let host = &mut network.hosts[0];
    host.peers.get_mut(&1).unwrap().config.persistent_keepalive = Some(Duration::from_secs(25));
    network.configure(0);
    network.run(1.0);
    let kinds: Vec<_> = network.log.iter().map(|(_, it)| it.kind()).collect();
    assert_eq!(kinds, [INITIATION, RESPONSE, DATA]);
    assert!(network.log[2].1.is_keepalive());
    assert!(network.agree(0, 1));
    network.run(100.0);
    assert_eq!(network.count(0, DATA), 1 + 4);
}

#[test]
fn a_keepalive_follows_when_what_waited_was_given_up() {
    let mut network = Network::new(2, 1);
    network.hosts[0].has_given_up = true;
    network.send(0, 1);
    network.run(1.0);
    assert_eq!(network.count(0, DATA), 1);
    assert!(latest(&network, 0, DATA).is_keepalive());
    assert!(network.agree(0, 1));
}

#[test]
fn the_responder_sends_what_waits_once_the_session_is_confirmed() {
    let mut network = Network::new(2, 1);
    // The second host does not know where the first is, and has to wait for it.
    network.hosts[1].sessions(0).endpoint.store(None);
    let back = network.send(1, 0);
    network.run(1.0);
    assert!(network.log.is_empty());
    network.send(0, 1);
    network.run(1.0);
    assert!(network.hosts[0].received.contains(&back));
}

#[test]
fn no_packet_is_lost_when_sessions_change() {
    let mut network = pair();
    let mut sent = vec![];
    for _ in 0..12_000 {
        let (near, far) = if sent.len() % 2 == 0 { (0, 1) } else { (1, 0) };
        sent.push((far, network.send(near, far)));
        network.run(0.1);
    }
    network.run(1.0);
    for (far, number) in sent {
        assert!(
            network.hosts[far].received.contains(&number),
            "lost {number}"
        );
    }
    // Every 120 s and a tick, by the one that began: it is the initiator of each.
    let initiations = network.count(0, INITIATION);
    assert!(
        (10..=11).contains(&initiations),
        "{initiations} initiations"
    );
    assert_eq!(network.count(1, INITIATION), 0);
    for host in 0..2 {
        assert!((1..=2).contains(&network.hosts[host].indices()));
    }
}

#[test]
fn who_only_receives_renews_the_session_before_it_ends() {
    let mut network = pair();
    // The responder sends, the initiator does not but for keepalives; its own 120 s
    // never come, as it sends one at 115 s and then only at 125 s.
    for _ in 0..1000 {
        network.send(1, 0);
        network.run(1.0);
    }
    let first = network
        .log
        .iter()
        .skip(1)
        .find(|(_, it)| it.kind() == INITIATION);
    let (at_ns, datagram) = first.unwrap();
    assert_eq!(datagram.from, network.hosts[0].address);
    let age = (at_ns - network.log[0].0) / 1_000_000_000;
    assert!((120..=166).contains(&age), "renewed after {age} s");
    assert_eq!(network.count(1, INITIATION), 0);
}

#[test]
fn without_traffic_all_is_forgotten_and_the_thread_sleeps() {
    let mut network = pair();
    let current = network.hosts[0].current(1);
    let session = Arc::downgrade(&current.unwrap());
    network.run(179.5);
    assert!(session.upgrade().is_none() || network.seconds() < 181.0);
    network.run(2.0);
    assert_eq!(session.strong_count(), 0, "its keys are still there");
    for host in 0..2 {
        assert_eq!(network.hosts[host].indices(), 0);
        assert_eq!(network.hosts[host].exchange.next_ns(), None);
    }
    // One packet, one keepalive ten seconds later, and nothing else.
    assert_eq!((network.count(0, DATA), network.count(1, DATA)), (1, 1));
    let sent = network.send(0, 1);
    network.run(1.0);
    assert!(network.hosts[1].received.contains(&sent));
}

#[test]
fn a_host_that_is_not_there_is_given_up_after_ninety_seconds() {
    let mut network = Network::new(2, 1);
    network.weather.loss_percent = 100;
    network.send(0, 1);
    network.run(1000.0);
    let count = network.count(0, INITIATION);
    assert!((17..=18).contains(&count), "{count} initiations");
    assert_eq!(network.hosts[0].exchange.next_ns(), None);
    assert_eq!(network.hosts[0].indices(), 0);
    // Whoever sends again has it tried again.
    network.weather = Weather::FAIR;
    let sent = network.send(0, 1);
    network.run(1.0);
    assert!(network.hosts[1].received.contains(&sent));
}

#[test]
fn who_has_lost_the_session_gets_a_new_one_after_fifteen_seconds() {
    let mut network = pair();
    network.restart(1);
    let mut sent = vec![];
    for _ in 0..20 {
        sent.push(network.send(0, 1));
        network.run(1.0);
    }
    let received = &network.hosts[1].received;
    let lost = sent.iter().filter(|number| !received.contains(number));
    let lost = lost.count();
    assert!((14..=17).contains(&lost), "{lost} lost");
}

#[test]
fn simultaneous_initiations_converge() {
    for seed in 1..30 {
        let mut network = Network::new(2, seed);
        let mut sent = vec![(1, network.send(0, 1)), (0, network.send(1, 0))];
        network.run(0.5);
        assert!(network.agree(0, 1));
        for _ in 0..110 {
            sent.push((1, network.send(0, 1)));
            sent.push((0, network.send(1, 0)));
            network.run(1.0);
        }
        for (far, number) in sent {
            assert!(network.hosts[far].received.contains(&number));
        }
        let count = network.count(0, INITIATION) + network.count(1, INITIATION);
        assert_eq!(count, 2, "handshakes go on");
    }
}

#[test]
fn a_stranger_gets_no_answer() {
    let mut network = pair();
    let stranger = PrivateKey::generate();
    let good = initiation(&mut network, 1, &stranger, 7);
    assert!(
        answer(&mut network, 1, ELSEWHERE, good.clone())
            .sent
            .is_empty()
    );
    assert_eq!(value(&network, 1, "drop_unknown_peer"), 1);
    // Wrong MACs, lengths and types: whatever is changed.
    for byte in 0..good.len() - 16 {
        let mut bad = good.clone();
        bad[byte] ^= 1;
        let output = answer(&mut network, 1, ELSEWHERE, bad);
        assert!(output.sent.is_empty() && output.passed_on == 0);
    }
    for bytes in 0..good.len() {
        let output = answer(&mut network, 1, ELSEWHERE, good[..bytes].to_vec());
        assert!(output.sent.is_empty() && output.passed_on == 0);
    }
    assert_eq!(value(&network, 1, "drop_mac1"), good.len() as u64 - 16 - 4);
    assert_eq!(value(&network, 1, "drop_malformed"), good.len() as u64 + 4);
    let endpoint = network.hosts[1].sessions(0).address();
    assert_eq!(endpoint, Some(network.hosts[0].address));
}

#[test]
fn what_was_recorded_is_not_answered() {
    let mut network = pair();
    let current = network.hosts[1].current(0).unwrap();
    for (host, kind, drop) in [
        (0, INITIATION, "drop_replayed"),
        (1, RESPONSE, "drop_unknown_index"),
    ] {
        let recorded = latest(&network, host, kind);
        let output = answer(&mut network, 1 - host, ELSEWHERE, recorded.bytes);
        assert!(output.sent.is_empty());
        assert_eq!(value(&network, 1 - host, drop), 1);
        let endpoint = network.hosts[1 - host].sessions(host).address();
        assert_eq!(endpoint, Some(network.hosts[host].address));
    }
    assert!(Arc::ptr_eq(&current, &network.hosts[1].current(0).unwrap()));
    assert!(network.hosts[1].sessions(0).next.load().is_none());
}

#[test]
fn an_initiation_with_a_wrong_preshared_key_makes_no_session() {
    let mut network = Network::new(2, 1);
    let peers = &mut network.hosts[1].peers;
    peers.get_mut(&0).unwrap().config.preshared_key = PresharedKey::generate();
    network.configure(1);
    network.send(0, 1);
    network.run(4.0);
    assert!(network.hosts[0].current(1).is_none());
    assert!(value(&network, 0, "drop_forged") > 0);
    // The next handshake uses the changed one.
    let key = network.hosts[1].peers[&0].config.preshared_key.clone();
    let peers = &mut network.hosts[0].peers;
    peers.get_mut(&1).unwrap().config.preshared_key = key;
    network.configure(0);
    network.run(6.0);
    assert!(network.agree(0, 1));
}

#[test]
fn a_forged_response_does_not_end_the_handshake() {
    let mut network = Network::new(2, 1);
    network.weather.loss_percent = 100;
    network.send(0, 1);
    let initiation = latest(&network, 0, INITIATION);
    let output = answer(&mut network, 1, "192.0.2.1:51820", initiation.bytes);
    let good = output.sent[0].1.clone();
    let mut forged: [u8; 92] = good.clone().try_into().unwrap();
    forged[50] ^= 1;
    let now = network.now();
    MacWriter::new(&network.key(0)).fill(&mut forged, now.ns);
    answer(&mut network, 0, ELSEWHERE, forged.to_vec());
    assert_eq!(value(&network, 0, "drop_forged"), 1);
    assert!(network.hosts[0].current(1).is_none());
    answer(&mut network, 0, "192.0.2.2:51820", good);
    assert!(network.hosts[0].current(1).is_some());
}

#[test]
fn the_endpoint_follows_valid_handshake_messages() {
    let mut network = Network::new(2, 1);
    network.weather.loss_percent = 100;
    network.send(0, 1);
    let initiation = latest(&network, 0, INITIATION);
    let endpoint = |network: &Network, host: usize| {
        let endpoint = network.hosts[host].sessions(1 - host).address();
        endpoint.unwrap().to_string()
    };
    let output = answer(&mut network, 1, "203.0.113.1:1", initiation.bytes);
    assert_eq!(output.sent[0].0.to_string(), "203.0.113.1:1");
    assert_eq!(endpoint(&network, 1), "203.0.113.1:1");
    answer(&mut network, 0, "[2001:db8::1]:2", output.sent[0].1.clone());
    assert_eq!(endpoint(&network, 0), "[2001:db8::1]:2");
}

/// The address that a peer has called is no good any more when nobody answers from there.
#[test]
fn the_kernel_chooses_the_source_of_what_is_sent_again() {
    let mut network = Network::new(2, 1);
    network.weather.loss_percent = 100;
    let shared = Arc::clone(network.hosts[0].sessions(1));
    let address = network.hosts[1].address;
    let source = Some([192, 0, 2, 9].into());
    shared.note_sender(Endpoint { address, source });
    network.send(0, 1);
    assert_eq!(shared.endpoint.load_full().unwrap().source, source);
    network.run(6.0);
    assert_eq!(value(&network, 0, "initiations_sent"), 2);
    assert_eq!(*shared.endpoint.load_full().unwrap(), address.into());
}

#[test]
fn a_removed_peer_leaves_nothing() {
    let mut network = Network::new(3, 1);
    for far in 1..3 {
        network.send(0, far);
    }
    network.run(1.0);
    let far = network.hosts[0].peers.remove(&1).unwrap();
    let (peer, session) = (
        Arc::downgrade(&far.config.sessions),
        weak(&far.config.sessions),
    );
    let raced = far.config.sessions.current.load_full();
    network.configure(0);
    assert!(far.config.sessions.current.load().is_none());
    assert_eq!(network.hosts[0].indices(), 1);
    let key = network.key(1);
    assert!(!network.hosts[0].latest.lock().unwrap().contains_key(&key));
    // A worker that has just confirmed it puts it back.
    far.config.sessions.current.store(raced);
    network.run(1.0);
    drop(far);
    assert_eq!((peer.strong_count(), session.strong_count()), (0, 0));
    // The other stays, and the removed one gets no answer.
    assert!(network.agree(0, 2));
    network.allow_initiation();
    network.hosts[1].sessions(0).clear();
    network.send(1, 0);
    network.run(6.0);
    assert!(value(&network, 0, "drop_unknown_peer") > 0);
}

fn weak(sessions: &PeerSessions) -> Weak<Session> {
    Arc::downgrade(&sessions.current.load_full().unwrap())
}

#[test]
fn a_new_private_key_ends_all_sessions_and_makes_new_ones() {
    let mut network = pair();
    let old = weak(network.hosts[0].sessions(1));
    let key = PrivateKey::generate();
    // The far host learns of it first.
    let far = network.hosts[1].peers.get_mut(&0).unwrap();
    far.config.public_key = key.public();
    network.configure(1);
    network.hosts[0].private_key = key.clone();
    network.allow_initiation();
    network.with(0, |exchange, now, out| {
        exchange.set_private_key(now, Some(key), out);
    });
    assert_eq!(old.strong_count(), 0);
    network.run(1.0);
    assert!(network.agree(0, 1));
    // Without a key there is nothing at all.
    network.with(0, |exchange, now, out| {
        exchange.set_private_key(now, None, out);
    });
    assert_eq!(network.hosts[0].indices(), 0);
    let sent = network.log.len();
    network.send(0, 1);
    network.run(20.0);
    let from = network.hosts[0].address;
    assert!(network.log[sent..].iter().all(|(_, it)| it.from != from));
}

#[test]
fn what_is_set_to_what_it_is_changes_nothing() {
    let mut network = pair();
    let session = network.hosts[0].current(1).unwrap();
    network.configure(0);
    let key = network.hosts[0].private_key.clone();
    network.with(0, |exchange, now, out| {
        exchange.set_private_key(now, Some(key), out);
    });
    assert!(Arc::ptr_eq(&session, &network.hosts[0].current(1).unwrap()));
}

#[test]
fn the_end_of_the_thread_is_the_end_of_its_sessions() {
    let mut network = pair();
    let session = weak(network.hosts[0].sessions(1));
    // One more handshake is under way.
    network.hosts[0].sessions(1).clear();
    network.run(5.0);
    network.weather.loss_percent = 100;
    network.send(0, 1);
    network.restart(0);
    assert_eq!(session.strong_count(), 0);
    assert_eq!(network.hosts[0].indices(), 0);
}

#[test]
fn under_load_senders_prove_their_addresses() {
    let mut network = Network::new(2, 1);
    let stranger = PrivateKey::generate();
    // Of the same message: what is known of it is only that its sender knows the key.
    let flood = initiation(&mut network, 1, &stranger, 7);
    let mut cookies = vec![];
    for n in 0..400 {
        let output = answer(&mut network, 1, ELSEWHERE, flood.clone());
        cookies.extend(output.sent.into_iter().map(|sent| (n, sent)));
    }
    assert_eq!(cookies[0].0, 200, "asked for too early or too late");
    assert_eq!(cookies.len(), 200);
    assert!(cookies.iter().all(|(_, (to, bytes))| {
        to.to_string() == ELSEWHERE && bytes[0] == COOKIE_REPLY && bytes.len() == 64
    }));
    // A peer takes longer for it, and is served while the flood goes on.
    let sent = network.send(0, 1);
    for _ in 0..700 {
        answer(&mut network, 1, ELSEWHERE, vec![0; 10]);
        for _ in 0..4 {
            answer(&mut network, 1, ELSEWHERE, flood.clone());
        }
        network.run(0.01);
    }
    assert_eq!(network.count(1, COOKIE_REPLY), 1);
    assert_eq!(value(&network, 0, "cookie_replies_received"), 1);
    assert!(network.hosts[1].received.contains(&sent));
    assert_eq!(network.count(0, INITIATION), 2);
}

#[test]
fn a_cookie_is_of_one_address_and_port_and_moves_nobody() {
    let mut network = Network::new(2, 1);
    network.with(1, |exchange, now, _| exchange.note_backlog(now));
    network.weather.loss_percent = 100;
    network.send(0, 1);
    let first = latest(&network, 0, INITIATION);
    let output = answer(&mut network, 1, "192.0.2.1:51820", first.bytes);
    // The cookie reply comes from elsewhere: that is of no account.
    answer(&mut network, 0, ELSEWHERE, output.sent[0].1.clone());
    assert_eq!(value(&network, 0, "cookie_replies_received"), 1);
    let endpoint = network.hosts[0].sessions(1).address();
    assert_eq!(endpoint, Some(network.hosts[1].address));
    network.run(6.0);
    network.with(1, |exchange, now, _| exchange.note_backlog(now));
    let second = latest(&network, 0, INITIATION);
    assert_ne!(second.bytes[132..], [0; 16]);
    let kind = |output: &Output| output.sent[0].1[0];
    for wrong in ["192.0.2.1:51821", "192.0.2.3:51820"] {
        let output = answer(&mut network, 1, wrong, second.bytes.clone());
        assert_eq!(kind(&output), COOKIE_REPLY);
    }
    let output = answer(&mut network, 1, "192.0.2.1:51820", second.bytes);
    assert_eq!(kind(&output), RESPONSE);
}

#[test]
fn a_data_message_that_went_astray_is_passed_on() {
    let mut network = pair();
    let data = latest(&network, 0, DATA);
    let output = answer(&mut network, 1, "192.0.2.1:51820", data.bytes);
    assert_eq!((output.passed_on, output.sent.len()), (1, 0));
}

/// Whoever asks whether the tunnel is ready is told by this.
#[test]
fn a_session_is_due_until_there_is_one() {
    let mut network = Network::new(2, 1);
    let state = |network: &Network| {
        let sessions = network.hosts[0].sessions(1);
        (
            sessions.is_due.load(Ordering::Relaxed),
            sessions.has_session(),
        )
    };
    assert_eq!(state(&network), (false, false));
    network.send(0, 1);
    assert_eq!(state(&network), (true, false));
    network.run(1.0);
    assert_eq!(state(&network), (false, true));
}

#[test]
fn a_clock_that_goes_back_locks_nobody_out() {
    let mut network = pair();
    network.restart(1);
    let now = network.now();
    for second in 1..40 {
        let wall = now.wall - Duration::from_secs(1000 * second);
        let peer = Arc::clone(network.hosts[0].sessions(1));
        peer.clear();
        peer.is_wanted.store(true, Ordering::Relaxed);
        network.run(1.0);
        let ns = network.now().ns;
        network.with(0, |exchange, _, out| {
            exchange.request(Now { ns, wall }, &peer, out);
        });
    }
    assert_eq!(value(&network, 1, "drop_replayed"), 0);
    assert!(network.count(0, INITIATION) > 5);
}

/// By another process, on a host whose clock has gone back meanwhile.
#[test]
fn after_a_takeover_initiations_are_in_order() {
    let mut network = pair();
    let recorded = latest(&network, 0, INITIATION);
    network.run(1.0);
    for _ in 0..3 {
        network.take_over(0);
        network.take_over(1);
        let before = value(&network, 1, "drop_replayed");
        let answered = answer(&mut network, 1, ELSEWHERE, recorded.bytes.clone());
        assert_eq!(answered.sent.len(), 0);
        assert_eq!(value(&network, 1, "drop_replayed"), before + 1);
        let (ns, wall) = (network.now().ns, SystemTime::UNIX_EPOCH);
        let peer = Arc::clone(network.hosts[0].sessions(1));
        peer.is_wanted.store(true, Ordering::Relaxed);
        network.with(0, |exchange, _, out| {
            exchange.request(Now { ns, wall }, &peer, out);
        });
        network.run(1.0);
        assert!(network.agree(0, 1));
        assert_eq!(value(&network, 1, "drop_replayed"), before + 1);
    }
    // One that does not know of them is refused.
    network.restart(0);
    let (ns, wall) = (network.now().ns, SystemTime::UNIX_EPOCH);
    let peer = Arc::clone(network.hosts[0].sessions(1));
    peer.is_wanted.store(true, Ordering::Relaxed);
    let before = value(&network, 1, "drop_replayed");
    network.with(0, |exchange, _, out| {
        exchange.request(Now { ns, wall }, &peer, out);
    });
    network.run(1.0);
    assert_eq!(value(&network, 1, "drop_replayed"), before + 1);
}

#[derive(Clone, Copy, Debug)]
enum Event {
    Send(bool),
    Restart(usize),
    Quiet(u64),
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        8 => any::<bool>().prop_map(Event::Send),
        1 => (0_usize..2).prop_map(Event::Restart),
        2 => (0_u64..200).prop_map(Event::Quiet),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    /// Whatever the network did to them: once it carries what is sent, packets arrive, in both
    /// directions, and both hosts stay within their room. (The network itself checks that no
    /// counter is used twice, no packet delivered twice, and that initiations keep their
    /// distance.)
    #[test]
    fn sessions_come_up_whenever_messages_get_through(
        seed in any::<u64>(),
        loss_percent in 0_u64..90,
        duplicate_percent in 0_u64..50,
        delay_max_ms in 1_u64..8000,
        events in prop::collection::vec((event(), 0_u64..3000), 1..60),
    ) {
        let mut network = Network::new(2, seed);
        network.weather = Weather {
            loss_percent,
            duplicate_percent,
            delay_max_ns: delay_max_ms * 1_000_000,
        };
        for (event, wait_ms) in events {
            match event {
                Event::Send(is_back) => {
                    let near = usize::from(is_back);
                    network.send(near, 1 - near);
                }
                Event::Restart(host) => network.restart(host),
                Event::Quiet(seconds) => network.run(seconds as f64),
            }
            network.run(wait_ms as f64 / 1000.0);
            for host in &network.hosts {
                prop_assert!(host.indices() <= 4);
            }
        }
        // What is still on its way may be as late as it likes.
        network.weather = Weather::FAIR;
        let mut sent = vec![];
        for second in 0..60 {
            for near in 0..2 {
                let number = network.send(near, 1 - near);
                if second >= 35 {
                    sent.push((1 - near, number));
                }
            }
            network.run(1.0);
        }
        for (far, number) in sent {
            prop_assert!(network.hosts[far].received.contains(&number));
        }
        prop_assert!(network.agree(0, 1));
        network.run(400.0);
        for host in &network.hosts {
            prop_assert_eq!(host.indices(), 0);
            prop_assert_eq!(host.exchange.next_ns(), None);
        }
    }
}

#[test]
fn nothing_is_sent_to_a_peer_that_is_suspended() {
    let mut network = Network::new(2, 1);
    let suspend = |network: &mut Network, is_suspended| {
        let peer = network.hosts[0].peers.get_mut(&1).unwrap();
        peer.config.is_suspended = is_suspended;
        network.configure(0);
    };
    suspend(&mut network, true);
    network.send(0, 1);
    network.run(20.0);
    assert!(network.log.is_empty(), "{:?}", network.log);
    suspend(&mut network, false);
    network.run(20.0);
    assert!(network.agree(0, 1));
}

/// A thread that sleeps costs nothing.
#[test]
fn quiet_sessions_are_looked_at_once_in_a_second() {
    let mut network = Network::new(2, 1);
    network.send(0, 1);
    // The last word is a keepalive, ten seconds later.
    network.run(15.0);
    assert!(network.agree(0, 1));
    let ticks = network.ticks;
    network.run(60.0);
    let ticks = network.ticks - ticks;
    assert!(
        (110..=125).contains(&ticks),
        "{ticks} ticks of two hosts in 60 s"
    );
    // What wakes them is answered in time, all the same.
    let keepalives = network
        .log
        .iter()
        .filter(|(_, one)| one.is_keepalive())
        .count();
    network.send(0, 1);
    network.run(11.1);
    let all = network
        .log
        .iter()
        .filter(|(_, one)| one.is_keepalive())
        .count();
    assert_eq!(all, keepalives + 1);
}

/// Their answers have to fit the socket's buffer.
#[test]
fn after_a_takeover_peers_are_called_some_at_a_time() {
    const PEERS: usize = 2 * RENEWALS_MAX + 2;
    let mut exchange = Exchange::new(
        Intervals::STANDARD,
        Some(PrivateKey::generate()),
        Arc::new(SessionMap::new(4 * PEERS)),
        Arc::default(),
        Arc::default(),
    );
    let peers = (0..PEERS).map(|number| {
        let sessions = Arc::<PeerSessions>::default();
        let endpoint = SocketAddr::from(([10, 0, 0, 1], number as u16));
        // The last one is not known to be anywhere.
        let is_known = number < PEERS - 1;
        sessions
            .endpoint
            .store(is_known.then(|| Arc::new(endpoint.into())));
        PeerConfig {
            public_key: PrivateKey::generate().public(),
            preshared_key: PresharedKey::default(),
            is_suspended: false,
            persistent_keepalive: None,
            sessions,
        }
    });
    let mut now = Now {
        ns: 1_000_000_000,
        wall: SystemTime::now(),
    };
    let mut output = Output::default();
    exchange.set_peers(now, peers.collect(), &mut output);
    assert!(output.sent.is_empty() && exchange.next_ns().is_none());
    exchange.renew(now, &mut output);
    let mut called = vec![output.sent.len()];
    for _ in 0..2 {
        let next_ns = exchange.next_ns().unwrap();
        assert!(next_ns >= now.ns + Intervals::STANDARD.tick_ns / TICKS_AT_ONCE);
        now.ns = next_ns;
        exchange.tick(now, &mut output);
        called.push(output.sent.len());
    }
    assert_eq!(called, [RENEWALS_MAX, 2 * RENEWALS_MAX, PEERS - 1]);
}
