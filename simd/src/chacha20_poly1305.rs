//! ChaCha20-Poly1305 (RFC 8439) for WireGuard's data messages, with AVX-512: no additional
//! data, and a nonce of four zero bytes and a counter. Half of an encrypted tunnel's time is
//! this; libraries stop at AVX2, or ask for a call that costs more than it saves.
//!
//! It takes the same time for all keys and packets of one length: no branch and no address
//! depends on either. Its tests hold it against two other implementations.

#[cfg(target_arch = "x86_64")]
mod chacha20;
#[cfg(target_arch = "x86_64")]
mod poly1305;

use zeroize::Zeroize;

/// Bytes of a key.
pub const KEY_BYTES: usize = 32;

/// Bytes of a tag.
pub const TAG_BYTES: usize = 16;

/// A key, on a processor that has the instructions. It is overwritten when it is dropped.
pub struct Key([u32; KEY_BYTES / 4]);

impl Key {
    /// `None` where the processor lacks AVX-512 with multiplication of 52-bit numbers (Intel
    /// since Ice Lake, AMD since Zen 4).
    pub fn new(bytes: &[u8; KEY_BYTES]) -> Option<Self> {
        if !has_instructions() {
            return None;
        }
        let (words, _) = bytes.as_chunks::<4>();
        let mut key = Self([0; KEY_BYTES / 4]);
        for (word, bytes) in key.0.iter_mut().zip(words) {
            *word = u32::from_le_bytes(*bytes);
        }
        Some(key)
    }

    /// Encrypts a packet in place and returns its tag. No two packets may have one counter.
    #[inline]
    pub fn seal(&self, counter: u64, packet: &mut [u8]) -> [u8; TAG_BYTES] {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: there are keys only where the processor has the instructions.
        return unsafe { wide::seal(&self.0, counter, packet) };
        #[cfg(not(target_arch = "x86_64"))]
        unreachable!("there are no keys for {counter} and {} bytes", packet.len());
    }

    /// Decrypts a packet in place if the tag is right for it, and leaves it alone if not.
    /// Returns whether it is.
    #[inline]
    #[must_use]
    pub fn open(&self, counter: u64, packet: &mut [u8], tag: &[u8; TAG_BYTES]) -> bool {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: there are keys only where the processor has the instructions.
        return unsafe { wide::open(&self.0, counter, packet, tag) };
        #[cfg(not(target_arch = "x86_64"))]
        unreachable!("there are no keys for {counter}, {packet:?} and {tag:?}");
    }
}

impl Drop for Key {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

fn has_instructions() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        std::arch::is_x86_feature_detected!("avx512f")
            && std::arch::is_x86_feature_detected!("avx512vl")
            && std::arch::is_x86_feature_detected!("avx512ifma")
    }
    #[cfg(not(target_arch = "x86_64"))]
    false
}

#[cfg(target_arch = "x86_64")]
mod wide {
    use super::chacha20::{BLOCK_BYTES, Stream};
    use super::poly1305::tag_of;
    use super::{KEY_BYTES, TAG_BYTES};

    #[target_feature(enable = "avx512f,avx512vl,avx512ifma")]
    pub(super) fn seal(
        key: &[u32; KEY_BYTES / 4],
        counter: u64,
        packet: &mut [u8],
    ) -> [u8; TAG_BYTES] {
        let mut stream = Stream::new(key, counter, BLOCK_BYTES + packet.len());
        let one_time = stream.one_time_key();
        stream.apply(packet);
        tag_of(&one_time, packet)
    }

    #[target_feature(enable = "avx512f,avx512vl,avx512ifma")]
    pub(super) fn open(
        key: &[u32; KEY_BYTES / 4],
        counter: u64,
        packet: &mut [u8],
        tag: &[u8; TAG_BYTES],
    ) -> bool {
        let mut stream = Stream::new(key, counter, BLOCK_BYTES + packet.len());
        let expected = tag_of(&stream.one_time_key(), packet);
        // One comparison: it takes the same time wherever they differ.
        let is_right = u128::from_ne_bytes(expected) == u128::from_ne_bytes(*tag);
        if is_right {
            stream.apply(packet);
        }
        is_right
    }
}

#[cfg(test)]
#[path = "chacha20_poly1305/tests.rs"]
mod tests;
