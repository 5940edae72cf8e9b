//! The key of one direction: ChaCha20-Poly1305, by ring, and for packets that are long enough
//! by `fastvpn_simd`, on processors that it is made for.

use std::hint;

use fastvpn_simd::chacha20_poly1305::Key as WideKey;
use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};

use super::super::message::TAG_BYTES;

/// Shorter packets are faster by ring, which does not make as many blocks at a time.
const WIDE_BYTES_MIN: usize = 512;

pub(super) struct Aead {
    ring: LessSafeKey,
    wide: Option<WideKey>,
}

/// A packet that cannot be sealed, or that was not sealed with this key.
#[derive(Debug)]
pub(super) struct Failed;

impl Aead {
    pub(super) fn new(key: &[u8; 32]) -> Self {
        Self {
            ring: ring_key(key),
            wide: WideKey::new(key),
        }
    }

    /// Encrypts a packet in place, and returns its tag.
    #[inline]
    pub(super) fn seal(&self, counter: u64, packet: &mut [u8]) -> Result<[u8; TAG_BYTES], Failed> {
        match &self.wide {
            Some(wide) if packet.len() >= WIDE_BYTES_MIN => Ok(wide.seal(counter, packet)),
            _ => {
                let sealed =
                    self.ring
                        .seal_in_place_separate_tag(nonce(counter), Aad::empty(), packet);
                let tag = sealed.map_err(|_| Failed)?;
                tag.as_ref().try_into().map_err(|_| Failed)
            }
        }
    }

    /// Decrypts a packet in place; `sealed` ends with its tag.
    #[inline]
    pub(super) fn open<'a>(
        &self,
        counter: u64,
        sealed: &'a mut [u8],
    ) -> Result<&'a mut [u8], Failed> {
        match &self.wide {
            Some(wide) if sealed.len() >= WIDE_BYTES_MIN + TAG_BYTES => {
                let (packet, tag) = sealed.split_last_chunk_mut().ok_or(Failed)?;
                match wide.open(counter, packet, tag) {
                    true => Ok(packet),
                    false => Err(Failed),
                }
            }
            _ => {
                let opened = self
                    .ring
                    .open_in_place(nonce(counter), Aad::empty(), sealed);
                opened.map_err(|_| Failed)
            }
        }
    }

    /// Overwrites the key with zeros. ring's keys do not do so when they are dropped; but one
    /// is no more than its bytes, so that another one in its place leaves nothing of it.
    ///
    /// What this does not reach are copies that were left on the stack when the session was
    /// made and moved, which the thread's next calls overwrite, and what is on the stack while
    /// a packet is sealed or opened. A process that must not leave keys in a core dump forbids
    /// the dump.
    pub(super) fn erase(&mut self) {
        self.wide = None;
        self.ring = ring_key(&[0; 32]);
        // Or the compiler would drop a write that nobody reads.
        hint::black_box(&mut self.ring);
    }
}

impl Drop for Aead {
    fn drop(&mut self) {
        self.erase();
    }
}

fn ring_key(bytes: &[u8; 32]) -> LessSafeKey {
    let key = UnboundKey::new(&CHACHA20_POLY1305, bytes);
    LessSafeKey::new(key.expect("a key has 32 bytes"))
}

/// Four zero bytes and the counter, little-endian.
#[inline]
fn nonce(counter: u64) -> Nonce {
    let mut nonce = [0; NONCE_LEN];
    nonce[4..].copy_from_slice(&counter.to_le_bytes());
    Nonce::assume_unique_for_key(nonce)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whatever seals a packet, either can open it.
    #[test]
    fn both_ways_are_one() {
        let aead = Aead::new(&[5; 32]);
        let mut by_ring = Aead::new(&[5; 32]);
        by_ring.wide = None;
        for packet_bytes in (0..2 * WIDE_BYTES_MIN).chain([1424, 9000]) {
            for (seals, opens) in [(&aead, &by_ring), (&by_ring, &aead)] {
                let (counter, packet) = (packet_bytes as u64, vec![7; packet_bytes]);
                let mut sealed = packet.clone();
                let tag = seals.seal(counter, &mut sealed).unwrap();
                sealed.extend(tag);
                let mut again = sealed.clone();
                assert!(opens.open(counter + 1, &mut again).is_err());
                assert_eq!(*opens.open(counter, &mut sealed).unwrap(), packet);
            }
        }
    }
}
