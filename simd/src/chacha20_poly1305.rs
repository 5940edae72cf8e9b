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
pub struct Key {
    #[cfg_attr(not(target_arch = "x86_64"), expect(dead_code))]
    words: [u32; KEY_BYTES / 4],
    /// There are none on other architectures.
    #[cfg(not(target_arch = "x86_64"))]
    never: std::convert::Infallible,
}

impl Key {
    /// `None` where the processor lacks AVX-512 with multiplication of 52-bit numbers (Intel
    /// since Ice Lake, AMD since Zen 4).
    #[cfg(target_arch = "x86_64")]
    pub fn new(bytes: &[u8; KEY_BYTES]) -> Option<Self> {
        if !has_instructions() {
            return None;
        }
        let (words, _) = bytes.as_chunks::<4>();
        let mut key = Self {
            words: [0; KEY_BYTES / 4],
        };
        for (word, bytes) in key.words.iter_mut().zip(words) {
            *word = u32::from_le_bytes(*bytes);
        }
        Some(key)
    }

    /// `None`: it is not written for this architecture.
    #[cfg(not(target_arch = "x86_64"))]
    pub fn new(_: &[u8; KEY_BYTES]) -> Option<Self> {
        None
    }

    /// Encrypts a packet in place and returns its tag. No two packets may have one counter.
    #[cfg(target_arch = "x86_64")]
    #[inline]
    pub fn seal(&self, counter: u64, packet: &mut [u8]) -> [u8; TAG_BYTES] {
        // SAFETY: there are keys only where the processor has the instructions.
        unsafe { wide::seal(&self.words, counter, packet) }
    }

    /// Decrypts a packet in place if the tag is right for it, and leaves it alone if not.
    /// Returns whether it is.
    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[must_use]
    pub fn open(&self, counter: u64, packet: &mut [u8], tag: &[u8; TAG_BYTES]) -> bool {
        // SAFETY: there are keys only where the processor has the instructions.
        unsafe { wide::open(&self.words, counter, packet, tag) }
    }

    /// There is no key.
    #[cfg(not(target_arch = "x86_64"))]
    pub fn seal(&self, _: u64, _: &mut [u8]) -> [u8; TAG_BYTES] {
        match self.never {}
    }

    /// There is no key.
    #[cfg(not(target_arch = "x86_64"))]
    pub fn open(&self, _: u64, _: &mut [u8], _: &[u8; TAG_BYTES]) -> bool {
        match self.never {}
    }
}

impl Drop for Key {
    fn drop(&mut self) {
        self.words.zeroize();
    }
}

#[cfg(target_arch = "x86_64")]
fn has_instructions() -> bool {
    std::arch::is_x86_feature_detected!("avx512f")
        && std::arch::is_x86_feature_detected!("avx512vl")
        && std::arch::is_x86_feature_detected!("avx512ifma")
}

#[cfg(target_arch = "x86_64")]
mod wide {
    use std::hint::black_box;

    use super::chacha20::Stream;
    use super::poly1305::tag_of;
    use super::{KEY_BYTES, TAG_BYTES};

    #[target_feature(enable = "avx512f,avx512vl,avx512ifma")]
    pub(super) fn seal(
        key: &[u32; KEY_BYTES / 4],
        counter: u64,
        packet: &mut [u8],
    ) -> [u8; TAG_BYTES] {
        let mut stream = Stream::new(key, counter);
        let one_time_key = stream.start(packet.len());
        stream.apply(packet);
        tag_of(&one_time_key, packet)
    }

    #[target_feature(enable = "avx512f,avx512vl,avx512ifma")]
    pub(super) fn open(
        key: &[u32; KEY_BYTES / 4],
        counter: u64,
        packet: &mut [u8],
        tag: &[u8; TAG_BYTES],
    ) -> bool {
        let mut stream = Stream::new(key, counter);
        let one_time_key = stream.start(packet.len());
        let expected = tag_of(&one_time_key, packet);
        // It takes the same time wherever they differ, whatever the compiler knows of tags.
        let difference = u128::from_ne_bytes(expected) ^ u128::from_ne_bytes(*tag);
        let is_right = black_box(difference) == 0;
        if is_right {
            stream.apply(packet);
        }
        is_right
    }
}

#[cfg(all(test, target_arch = "x86_64"))]
#[path = "chacha20_poly1305/tests.rs"]
mod tests;
