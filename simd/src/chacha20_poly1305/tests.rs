use proptest::prelude::*;
use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};

use super::*;

/// What ring makes of a packet.
fn sealed_by_ring(key: &[u8; KEY_BYTES], counter: u64, packet: &[u8]) -> (Vec<u8>, Vec<u8>) {
    let key = LessSafeKey::new(UnboundKey::new(&CHACHA20_POLY1305, key).unwrap());
    let mut nonce = [0; 12];
    nonce[4..].copy_from_slice(&counter.to_le_bytes());
    let nonce = Nonce::assume_unique_for_key(nonce);
    let mut packet = packet.to_vec();
    let tag = key.seal_in_place_separate_tag(nonce, Aad::empty(), &mut packet);
    (packet, tag.unwrap().as_ref().to_vec())
}

/// Compares one packet with ring's, there and back.
fn compare(key: &[u8; KEY_BYTES], counter: u64, packet: &[u8]) {
    let Some(ours) = Key::new(key) else {
        return;
    };
    let mut bytes = packet.to_vec();
    let tag = ours.seal(counter, &mut bytes);
    let sealed = (bytes.clone(), tag.to_vec());
    assert!(
        sealed == sealed_by_ring(key, counter, packet),
        "{} bytes",
        packet.len()
    );
    // Whatever is changed, nothing is opened or touched.
    let mut other = tag;
    other[packet.len() % TAG_BYTES] ^= 1 << (packet.len() % 8);
    assert!(!ours.open(counter, &mut bytes, &other) && bytes == sealed.0);
    assert!(!ours.open(counter ^ 1, &mut bytes, &tag) && bytes == sealed.0);
    if let Some(last) = bytes.last_mut() {
        *last ^= 0x80;
        assert!(!ours.open(counter, &mut bytes, &tag));
        bytes.clone_from(&sealed.0);
    }
    assert!(ours.open(counter, &mut bytes, &tag));
    assert!(bytes == packet);
}

#[test]
fn all_lengths_are_sealed_as_by_ring() {
    if !has_instructions() {
        eprintln!("not tested: this processor lacks the instructions");
        return;
    }
    for bytes in (0..2200).chain([4095, 4096, 9000, 65_507]) {
        let key = std::array::from_fn(|index| (index * 7 + bytes) as u8);
        let packet: Vec<u8> = (0..bytes)
            .map(|index| (index * index + bytes) as u8)
            .collect();
        compare(&key, (bytes as u64) << 29 | 3, &packet);
    }
}

mod tags {
    use ::poly1305::Poly1305;
    use ::poly1305::universal_hash::{KeyInit, UniversalHash};

    use super::*;

    /// What RustCrypto's Poly1305 says of a packet and its lengths.
    fn reference(key: &[u8; KEY_BYTES], packet: &[u8]) -> [u8; TAG_BYTES] {
        let mut state = Poly1305::new(key.into());
        state.update_padded(packet);
        let lengths = u128::from(packet.len() as u64) << 64;
        state.update(&[lengths.to_le_bytes().into()]);
        state.finalize().into()
    }

    fn tag(key: &[u8; KEY_BYTES], packet: &[u8]) -> [u8; TAG_BYTES] {
        // SAFETY: callers have asked for the instructions.
        unsafe { super::super::poly1305::tag_of(key, packet) }
    }

    /// Sums around the modulus, which packets hardly ever have: keys and blocks of bytes that
    /// are all clear, all set, or both in turn.
    #[test]
    fn tags_are_right_where_carries_run() {
        if !has_instructions() {
            return;
        }
        let bytes = [0x00, 0xff, 0xfb, 0xfc, 0x01, 0x80];
        for (r, s) in bytes.into_iter().flat_map(|r| bytes.map(|s| (r, s))) {
            let mut key = [r; KEY_BYTES];
            key[16..].fill(s);
            for (first, next) in bytes.into_iter().flat_map(|a| bytes.map(|b| (a, b))) {
                for count in [0, 1, 15, 16, 17, 100, 111, 112, 113, 128, 240, 256, 1424] {
                    let mut packet = vec![next; count];
                    packet.iter_mut().step_by(16).for_each(|byte| *byte = first);
                    assert_eq!(tag(&key, &packet), reference(&key, &packet));
                }
            }
        }
    }

    proptest! {
        #[test]
        fn tags_are_right(key: [u8; KEY_BYTES], packet in prop::collection::vec(any::<u8>(), 0..700)) {
            if has_instructions() {
                prop_assert_eq!(tag(&key, &packet), reference(&key, &packet));
            }
        }
    }
}

proptest! {
    #[test]
    fn packets_are_sealed_as_by_ring(
        key: [u8; KEY_BYTES],
        counter: u64,
        packet in prop::collection::vec(any::<u8>(), 0..4000),
    ) {
        compare(&key, counter, &packet);
    }
}
