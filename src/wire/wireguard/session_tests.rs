use std::collections::BTreeSet;
use std::sync::Barrier;
use std::thread;

use chacha20poly1305::ChaCha20Poly1305;
use chacha20poly1305::aead::{Aead, KeyInit};
use proptest::prelude::*;
use zeroize::Zeroizing;

use super::*;

const MINUTE_NS: u64 = 60_000_000_000;
const HERE: u32 = 0x0a0b_0c0d;
const THERE: u32 = 0x1020_3040;

fn session(send: u8, receive: u8, local_index: u32, remote_index: u32) -> Session {
    let keys = TransportKeys {
        send: Zeroizing::new([send; 32]),
        receive: Zeroizing::new([receive; 32]),
        remote_index,
    };
    Session::new(keys, local_index, true, MINUTE_NS, Arc::default())
}

/// Both ends of a session.
fn pair() -> (Session, Session) {
    (session(1, 2, HERE, THERE), session(2, 1, THERE, HERE))
}

/// A datagram with this packet, not sealed yet.
fn room(packet: &[u8]) -> Vec<u8> {
    [&[0xee; DATA_HEADER_BYTES], packet, &[0xee; TAG_BYTES]].concat()
}

fn sealed(by: &Session, packet: &[u8]) -> Vec<u8> {
    let mut datagram = room(packet);
    let datagram_bytes = datagram.len();
    assert_eq!(by.seal(&mut datagram, datagram_bytes), Ok(()));
    datagram
}

/// The same by another implementation, with a counter of its own choice.
fn sealed_with(key: u8, counter: u64, packet: &[u8]) -> Vec<u8> {
    let cipher = ChaCha20Poly1305::new(&[key; 32].into());
    let nonce = [&[0; 4], &counter.to_le_bytes()[..]].concat();
    let sealed = cipher.encrypt(nonce.as_slice().into(), packet).unwrap();
    let header = [
        &[4, 0, 0, 0],
        &HERE.to_le_bytes()[..],
        &counter.to_le_bytes(),
    ];
    [header.concat(), sealed].concat()
}

fn counter_of(datagram: &[u8]) -> u64 {
    u64::from_le_bytes(datagram[8..16].try_into().unwrap())
}

#[test]
fn a_sealed_packet_is_what_another_implementation_makes_of_it() {
    let there = session(2, 1, THERE, HERE);
    for (counter, packet) in [&b"first"[..], b"", &[7; 1420]].into_iter().enumerate() {
        assert_eq!(
            sealed(&there, packet),
            sealed_with(2, counter as u64, packet)
        );
    }
    assert_eq!(there.counter(), 3);
}

#[test]
fn what_another_implementation_sealed_is_opened() {
    let (here, _) = pair();
    for counter in [0, 5, 1 << 33, REJECT_AFTER_MESSAGES - 1] {
        let mut datagram = sealed_with(2, counter, b"packet");
        assert_eq!(here.open(&mut datagram), Ok(&mut b"packet".to_owned()[..]));
    }
}

proptest! {
    /// Batches of all shapes, received in any order.
    #[test]
    fn batches_are_opened_as_they_were_sealed(
        packet_bytes in 0..100usize,
        last_bytes in 0..100usize,
        count in 1..70usize,
        order in any::<prop::sample::Index>(),
    ) {
        let (here, there) = pair();
        let mut packets: Vec<Vec<u8>> = (0..count).map(|n| vec![n as u8; packet_bytes]).collect();
        packets[count - 1].truncate(last_bytes);
        let mut batch: Vec<u8> = packets.iter().flat_map(|packet| room(packet)).collect();
        let datagram_bytes = packet_bytes + OVERHEAD_BYTES;
        prop_assert_eq!(here.seal(&mut batch, datagram_bytes), Ok(()));
        prop_assert_eq!(here.counter(), count as u64);

        let mut datagrams: Vec<_> = batch.chunks_mut(datagram_bytes).zip(packets).enumerate().collect();
        for (counter, (datagram, _)) in &datagrams {
            prop_assert_eq!(&datagram[..4], &[4, 0, 0, 0]);
            prop_assert_eq!(&datagram[4..8], &THERE.to_le_bytes());
            prop_assert_eq!(counter_of(datagram), *counter as u64);
        }
        datagrams.rotate_left(order.index(count));
        for (_, (datagram, packet)) in datagrams {
            let mut replay = datagram.to_vec();
            let opened = there.open(datagram).map(|packet| packet.to_vec());
            prop_assert_eq!(opened, Ok(packet));
            prop_assert_eq!(there.open(&mut replay), Err(OpenError::Replayed));
        }
    }

    /// A bit that is flipped in the counter, in the packet or in the tag.
    #[test]
    fn a_changed_datagram_is_forged(packet_bytes in 0..80usize, bit in any::<prop::sample::Index>()) {
        let (here, there) = pair();
        let mut datagram = sealed(&here, &vec![3; packet_bytes]);
        let original = datagram.clone();
        let bit = 64 + bit.index(8 * (datagram.len() - 8));
        datagram[bit / 8] ^= 1 << (bit % 8);
        prop_assert_eq!(there.open(&mut datagram), Err(OpenError::Forged));
        // It has not taken the true one's place.
        prop_assert!(there.open(&mut original.clone()).is_ok());
    }

    #[test]
    fn garbage_is_not_opened(mut datagram in proptest::collection::vec(any::<u8>(), 0..200)) {
        let (here, _) = pair();
        let is_short = datagram.len() < OVERHEAD_BYTES;
        let error = if is_short { OpenError::Short } else { OpenError::Forged };
        prop_assert_eq!(here.open(&mut datagram), Err(error));
    }
}

#[test]
fn a_keepalive_is_an_empty_packet() {
    let (here, there) = pair();
    let mut datagram = sealed(&here, b"");
    assert_eq!(datagram.len(), OVERHEAD_BYTES);
    assert_eq!(there.open(&mut datagram), Ok(&mut [][..]));
}

#[test]
fn a_truncated_datagram_is_not_opened() {
    let (here, there) = pair();
    let datagram = sealed(&here, b"a packet");
    for bytes in 0..datagram.len() {
        let is_short = bytes < OVERHEAD_BYTES;
        let error = if is_short {
            OpenError::Short
        } else {
            OpenError::Forged
        };
        assert_eq!(
            there.open(&mut datagram[..bytes].to_vec()),
            Err(error),
            "{bytes}"
        );
    }
    let mut longer = [datagram.as_slice(), &[0]].concat();
    assert_eq!(there.open(&mut longer), Err(OpenError::Forged));
    assert!(there.open(&mut datagram.clone()).is_ok());
}

#[test]
fn replayed_and_too_old_datagrams_are_told_from_late_ones() {
    let (here, there) = pair();
    let datagrams: Vec<_> = (0..10_000).map(|_| sealed(&here, b"")).collect();
    let open = |counter: usize| there.open(&mut datagrams[counter].clone()).map(|_| ());
    assert_eq!(open(0), Ok(()));
    assert_eq!(open(0), Err(OpenError::Replayed));
    assert_eq!(open(9_999), Ok(()));
    assert_eq!(open(9_999), Err(OpenError::Replayed));
    assert_eq!(open(2_000), Ok(()));
    assert_eq!(open(2_000), Err(OpenError::Replayed));
    // Fresh, but older than the window.
    assert_eq!(open(1_000), Err(OpenError::Replayed));
}

#[test]
fn a_forger_does_not_move_the_window() {
    let (here, there) = pair();
    let mut first = sealed(&here, b"first");
    for counter in [0, 1, 9_000, 1 << 40, REJECT_AFTER_MESSAGES - 1] {
        let mut forged = sealed_with(9, counter, b"first");
        assert_eq!(there.open(&mut forged), Err(OpenError::Forged));
    }
    assert!(there.open(&mut first).is_ok());
}

#[test]
fn a_datagram_of_another_session_is_forged() {
    let (here, there) = pair();
    let other = session(3, 4, THERE, HERE);
    assert_eq!(other.open(&mut sealed(&here, b"")), Err(OpenError::Forged));
    // Reflected.
    assert_eq!(here.open(&mut sealed(&here, b"")), Err(OpenError::Forged));
    assert!(there.open(&mut sealed(&here, b"")).is_ok());
}

/// What a nonce is must not happen twice with a key, whoever seals.
#[test]
fn counters_are_unique_across_threads() {
    const THREADS: usize = 4;
    const BATCHES: usize = 300;
    let (here, _) = pair();
    let start = Barrier::new(THREADS);
    let seal = |thread: usize| {
        start.wait();
        let batches = (0..BATCHES).flat_map(|batch| {
            let count = 1 + (batch * 7 + thread) % 5;
            let mut batch = room(b"").repeat(count);
            assert_eq!(here.seal(&mut batch, OVERHEAD_BYTES), Ok(()));
            let counters: Vec<_> = batch.chunks(OVERHEAD_BYTES).map(counter_of).collect();
            assert!(counters.windows(2).all(|pair| pair[0] + 1 == pair[1]));
            counters
        });
        batches.collect::<Vec<_>>()
    };
    let counters: Vec<u64> = thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS).map(|n| scope.spawn(move || seal(n))).collect();
        threads
            .into_iter()
            .flat_map(|thread| thread.join().unwrap())
            .collect()
    });
    let unique: BTreeSet<_> = counters.iter().copied().collect();
    assert_eq!(unique.len(), counters.len());
    assert_eq!(unique.last(), Some(&(counters.len() as u64 - 1)));
    assert_eq!(here.counter(), counters.len() as u64);
}

#[test]
fn no_counter_is_given_out_beyond_the_limit() {
    let (mut here, there) = pair();
    here.next_counter = NextCounter(AtomicU64::new(REJECT_AFTER_MESSAGES - 3));
    assert_eq!(
        here.seal(&mut room(b"").repeat(4), OVERHEAD_BYTES),
        Err(SealError::Exhausted)
    );
    assert!(here.may_send(MINUTE_NS));
    let mut batch = room(b"").repeat(3);
    assert_eq!(here.seal(&mut batch, OVERHEAD_BYTES), Ok(()));
    assert_eq!(
        counter_of(&batch[2 * OVERHEAD_BYTES..]),
        REJECT_AFTER_MESSAGES - 1
    );
    assert!(
        batch
            .chunks_mut(OVERHEAD_BYTES)
            .all(|datagram| there.open(datagram).is_ok())
    );
    assert_eq!(
        here.seal(&mut room(b""), OVERHEAD_BYTES),
        Err(SealError::Exhausted)
    );
    assert!(!here.may_send(MINUTE_NS) && here.may_receive(MINUTE_NS));
    assert_eq!(here.seal(&mut [], OVERHEAD_BYTES), Ok(()));

    let mut beyond = sealed_with(1, REJECT_AFTER_MESSAGES, b"");
    assert_eq!(there.open(&mut beyond), Err(OpenError::Forged));
}

#[test]
fn threads_at_the_limit_do_not_pass_it_together() {
    const LEFT: u64 = 1000;
    let (mut here, _) = pair();
    here.next_counter = NextCounter(AtomicU64::new(REJECT_AFTER_MESSAGES - LEFT));
    let start = Barrier::new(4);
    let seal = || {
        start.wait();
        let mut batch = room(b"").repeat(3);
        (0..LEFT)
            .filter(|_| here.seal(&mut batch, OVERHEAD_BYTES).is_ok())
            .count() as u64
    };
    let batches: u64 = thread::scope(|scope| {
        let threads: Vec<_> = (0..4).map(|_| scope.spawn(seal)).collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .sum()
    });
    assert_eq!(batches, LEFT / 3);
    assert_eq!(here.counter(), REJECT_AFTER_MESSAGES - LEFT % 3);
}

#[test]
fn what_has_no_room_is_not_sealed() {
    let (here, _) = pair();
    let whole = room(b"packet");
    for datagram_bytes in [0, 1, OVERHEAD_BYTES - 1] {
        assert_eq!(
            here.seal(&mut whole.clone(), datagram_bytes),
            Err(SealError::Layout)
        );
    }
    let mut batch = [whole.as_slice(), &whole[..OVERHEAD_BYTES - 1]].concat();
    assert_eq!(here.seal(&mut batch, whole.len()), Err(SealError::Layout));
}

#[test]
fn a_session_ends_after_three_minutes() {
    let (here, _) = pair();
    // A clock that another thread read earlier.
    for now_ns in [0, MINUTE_NS, 4 * MINUTE_NS - 1] {
        assert!(here.may_send(now_ns) && here.may_receive(now_ns));
    }
    assert!(!here.may_send(4 * MINUTE_NS) && !here.may_receive(4 * MINUTE_NS));
}

#[test]
fn a_session_shows_no_keys() {
    let here = Arc::new(session(77, 78, HERE, THERE));
    here.peer().current.store(Some(Arc::clone(&here)));
    let shown = format!("{here:?} {:?}", here.peer());
    assert!(!shown.contains("77") && !shown.contains("78"), "{shown}");
    here.peer().clear();
}

#[test]
fn an_erased_key_is_all_zeros() {
    for packet in [&b"x"[..], &[0; 1424]] {
        let mut copy = session(1, 2, HERE, THERE);
        copy.send.erase();
        assert_eq!(sealed(&copy, packet)[16..], sealed_with(0, 0, packet)[16..]);
    }
}
