//! ChaCha20's key stream (RFC 8439, section 2.4): sixteen blocks at a time, or eight where
//! those suffice. Each vector has one word of all of them, until they are transposed.

use std::arch::x86_64::*;

use zeroize::{Zeroize, Zeroizing};

use super::KEY_BYTES;

/// Bytes of a block.
pub(super) const BLOCK_BYTES: usize = 64;

/// Bytes that are made at a time, and at the end of a packet.
const PASS_BYTES: usize = 16 * BLOCK_BYTES;
const HALF_PASS_BYTES: usize = 8 * BLOCK_BYTES;

/// "expand 32-byte k", little-endian.
const CONSTANTS: [u32; 4] = [0x6170_7865, 0x3320_646e, 0x7962_2d32, 0x6b20_6574];

/// Where the block's number is in the initial words.
const BLOCK_NUMBER: usize = 12;

/// The key stream of one packet, as far as it was made. The first block makes the key of the
/// tag (section 2.6), the others are for the packet.
#[repr(align(64))]
pub(super) struct Stream {
    bytes: [u8; PASS_BYTES],
    /// Those of the next pass.
    words: [u32; 16],
}

impl Stream {
    /// That of a packet, of which nothing is made yet.
    #[inline]
    pub(super) fn new(key: &[u32; KEY_BYTES / 4], counter: u64) -> Self {
        let mut words = [0; 16];
        words[..4].copy_from_slice(&CONSTANTS);
        words[4..BLOCK_NUMBER].copy_from_slice(key);
        words[14] = counter as u32;
        words[15] = (counter >> 32) as u32;
        Self {
            bytes: [0; PASS_BYTES],
            words,
        }
    }

    /// Makes what a packet of so many bytes begins with, and returns the key of its tag.
    #[inline]
    #[target_feature(enable = "avx512f,avx512vl")]
    pub(super) fn start(&mut self, packet_bytes: usize) -> Zeroizing<[u8; KEY_BYTES]> {
        self.make(BLOCK_BYTES + packet_bytes);
        let mut key = Zeroizing::new([0; KEY_BYTES]);
        key.copy_from_slice(&self.bytes[..KEY_BYTES]);
        key
    }

    /// Encrypts or decrypts the packet, after [`Self::start`].
    #[inline]
    #[target_feature(enable = "avx512f,avx512vl")]
    pub(super) fn apply(&mut self, packet: &mut [u8]) {
        let first_bytes = packet.len().min(PASS_BYTES - BLOCK_BYTES);
        let (first, rest) = packet.split_at_mut(first_bytes);
        combine(first, &self.bytes[BLOCK_BYTES..]);
        for part in rest.chunks_mut(PASS_BYTES) {
            self.make(part.len());
            combine(part, &self.bytes);
        }
    }

    /// Makes the next bytes, so many of them at least, if a pass makes as many.
    #[inline]
    #[target_feature(enable = "avx512f,avx512vl")]
    fn make(&mut self, bytes: usize) {
        if bytes <= HALF_PASS_BYTES {
            make_half_pass(&self.words, &mut self.bytes);
        } else {
            make_pass(&self.words, &mut self.bytes);
        }
        self.words[BLOCK_NUMBER] = self.words[BLOCK_NUMBER].wrapping_add(16);
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // The key is among them.
        self.words.zeroize();
    }
}

/// Adds the key stream to bytes, of which there are no more than of it.
#[inline]
#[target_feature(enable = "avx512f,avx512vl")]
fn combine(bytes: &mut [u8], stream: &[u8]) {
    let (blocks, rest) = bytes.as_chunks_mut::<BLOCK_BYTES>();
    let (stream, stream_rest) = stream.split_at(blocks.len() * BLOCK_BYTES);
    let (stream, _) = stream.as_chunks::<BLOCK_BYTES>();
    for (block, stream) in blocks.iter_mut().zip(stream) {
        // SAFETY: both have 64 bytes; the instructions take any alignment.
        unsafe {
            let sum = _mm512_xor_si512(
                _mm512_loadu_si512(block.as_ptr().cast()),
                _mm512_loadu_si512(stream.as_ptr().cast()),
            );
            _mm512_storeu_si512(block.as_mut_ptr().cast(), sum);
        }
    }
    for (byte, stream) in rest.iter_mut().zip(stream_rest) {
        *byte ^= stream;
    }
}

/// A quarter round of all blocks (section 2.1). All indices are written out, here and below:
/// of a loop over them the compiler keeps the words in memory, which takes twice the time.
macro_rules! quarter_round {
    ($words:ident, $operations:tt, $a:literal, $b:literal, $c:literal, $d:literal) => {
        quarter_round!(@half $words, $operations, $a, $b, $c, $d, 16, 12);
        quarter_round!(@half $words, $operations, $a, $b, $c, $d, 8, 7);
    };
    (
        @half $words:ident, ($add:ident, $xor:ident, $rotate_left:ident),
        $a:literal, $b:literal, $c:literal, $d:literal, $first:literal, $second:literal
    ) => {
        $words[$a] = $add($words[$a], $words[$b]);
        $words[$d] = $rotate_left::<$first>($xor($words[$d], $words[$a]));
        $words[$c] = $add($words[$c], $words[$d]);
        $words[$b] = $rotate_left::<$second>($xor($words[$b], $words[$c]));
    };
}

/// Twenty rounds (section 2.3).
macro_rules! twenty_rounds {
    ($words:ident, $operations:tt) => {
        for _ in 0..10 {
            quarter_round!($words, $operations, 0, 4, 8, 12);
            quarter_round!($words, $operations, 1, 5, 9, 13);
            quarter_round!($words, $operations, 2, 6, 10, 14);
            quarter_round!($words, $operations, 3, 7, 11, 15);
            quarter_round!($words, $operations, 0, 5, 10, 15);
            quarter_round!($words, $operations, 1, 6, 11, 12);
            quarter_round!($words, $operations, 2, 7, 8, 13);
            quarter_round!($words, $operations, 3, 4, 9, 14);
        }
    };
}

/// Sixteen blocks.
#[target_feature(enable = "avx512f,avx512vl")]
fn make_pass(initial: &[u32; 16], stream: &mut [u8; PASS_BYTES]) {
    let numbers = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    let start = |index: usize| {
        let word = _mm512_set1_epi32(initial[index] as i32);
        match index {
            BLOCK_NUMBER => _mm512_add_epi32(word, numbers),
            _ => word,
        }
    };
    let mut words = [_mm512_setzero_si512(); 16];
    for (index, word) in words.iter_mut().enumerate() {
        *word = start(index);
    }
    twenty_rounds!(
        words,
        (_mm512_add_epi32, _mm512_xor_si512, _mm512_rol_epi32)
    );
    for (index, word) in words.iter_mut().enumerate() {
        *word = _mm512_add_epi32(*word, start(index));
    }
    // Four words of four blocks in each vector: those of blocks 0, 4, 8 and 12 in the first
    // of four, those of 1, 5, 9 and 13 in the second.
    let mut quads = [_mm512_setzero_si512(); 16];
    for (quad, word) in quads.chunks_exact_mut(4).zip(words.chunks_exact(4)) {
        let (a, b) = (
            _mm512_unpacklo_epi32(word[0], word[1]),
            _mm512_unpackhi_epi32(word[0], word[1]),
        );
        let (c, d) = (
            _mm512_unpacklo_epi32(word[2], word[3]),
            _mm512_unpackhi_epi32(word[2], word[3]),
        );
        quad[0] = _mm512_unpacklo_epi64(a, c);
        quad[1] = _mm512_unpackhi_epi64(a, c);
        quad[2] = _mm512_unpacklo_epi64(b, d);
        quad[3] = _mm512_unpackhi_epi64(b, d);
    }
    for block in 0..4 {
        let [a, b, c, d] = [0, 4, 8, 12].map(|word| quads[word + block]);
        let even = [
            _mm512_shuffle_i32x4::<0x88>(a, b),
            _mm512_shuffle_i32x4::<0x88>(c, d),
        ];
        let odd = [
            _mm512_shuffle_i32x4::<0xdd>(a, b),
            _mm512_shuffle_i32x4::<0xdd>(c, d),
        ];
        let blocks = [
            _mm512_shuffle_i32x4::<0x88>(even[0], even[1]),
            _mm512_shuffle_i32x4::<0x88>(odd[0], odd[1]),
            _mm512_shuffle_i32x4::<0xdd>(even[0], even[1]),
            _mm512_shuffle_i32x4::<0xdd>(odd[0], odd[1]),
        ];
        for (place, value) in blocks.into_iter().enumerate() {
            let at = (4 * place + block) * BLOCK_BYTES;
            let to = &mut stream[at..at + BLOCK_BYTES];
            // SAFETY: there are 64 bytes.
            unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), value) };
        }
    }
}

/// The first eight blocks of a pass.
#[target_feature(enable = "avx512f,avx512vl")]
fn make_half_pass(initial: &[u32; 16], stream: &mut [u8; PASS_BYTES]) {
    let numbers = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
    let start = |index: usize| {
        let word = _mm256_set1_epi32(initial[index] as i32);
        match index {
            BLOCK_NUMBER => _mm256_add_epi32(word, numbers),
            _ => word,
        }
    };
    let mut words = [_mm256_setzero_si256(); 16];
    for (index, word) in words.iter_mut().enumerate() {
        *word = start(index);
    }
    twenty_rounds!(
        words,
        (_mm256_add_epi32, _mm256_xor_si256, _mm256_rol_epi32)
    );
    for (index, word) in words.iter_mut().enumerate() {
        *word = _mm256_add_epi32(*word, start(index));
    }
    // Four words of two blocks in each vector: those of blocks 0 and 4 in the first of four.
    let mut quads = [_mm256_setzero_si256(); 16];
    for (quad, word) in quads.chunks_exact_mut(4).zip(words.chunks_exact(4)) {
        let (a, b) = (
            _mm256_unpacklo_epi32(word[0], word[1]),
            _mm256_unpackhi_epi32(word[0], word[1]),
        );
        let (c, d) = (
            _mm256_unpacklo_epi32(word[2], word[3]),
            _mm256_unpackhi_epi32(word[2], word[3]),
        );
        quad[0] = _mm256_unpacklo_epi64(a, c);
        quad[1] = _mm256_unpackhi_epi64(a, c);
        quad[2] = _mm256_unpacklo_epi64(b, d);
        quad[3] = _mm256_unpackhi_epi64(b, d);
    }
    for block in 0..4 {
        let [a, b, c, d] = [0, 4, 8, 12].map(|word| quads[word + block]);
        let halves = [
            (block, _mm256_permute2x128_si256::<0x20>(a, b)),
            (block, _mm256_permute2x128_si256::<0x20>(c, d)),
            (block + 4, _mm256_permute2x128_si256::<0x31>(a, b)),
            (block + 4, _mm256_permute2x128_si256::<0x31>(c, d)),
        ];
        for (number, (block, value)) in halves.into_iter().enumerate() {
            let at = block * BLOCK_BYTES + number % 2 * (BLOCK_BYTES / 2);
            let to = &mut stream[at..at + BLOCK_BYTES / 2];
            // SAFETY: there are 32 bytes.
            unsafe { _mm256_storeu_si256(to.as_mut_ptr().cast(), value) };
        }
    }
}
