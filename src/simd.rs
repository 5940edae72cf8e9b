//! Loops over many bytes, compiled for the instruction sets that the machine
//! may have and picked at run time. Both the choice and the
//! instructions need `unsafe`, which is why this is not in [`crate::packet`].

/// The sum of `bytes` as 32-bit words in native order, for the Internet
/// checksum: a multiple of 2^16 - 1 away from the sum of the 16-bit words.
/// Bytes missing in the last word count as zero.
///
/// 64 KiB of ones give less than 2^47: sums of several packets still fit.
#[inline]
pub fn sum_words(bytes: &[u8]) -> u64 {
    #[cfg(target_arch = "x86_64")]
    if bytes.len() >= WIDE_BYTES_MIN && std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has just been found to have AVX2.
        return unsafe { sum_words_avx2(bytes) };
    }
    sum_words_portable(bytes)
}

/// Shorter pieces are summed before a call would return.
#[cfg(target_arch = "x86_64")]
const WIDE_BYTES_MIN: usize = 64;

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn sum_words_avx2(bytes: &[u8]) -> u64 {
    use std::arch::x86_64::{
        __m256i, _mm256_add_epi64, _mm256_and_si256, _mm256_loadu_si256, _mm256_set1_epi64x,
        _mm256_setzero_si256, _mm256_srli_epi64, _mm256_storeu_si256,
    };
    const VECTORS: usize = 4;
    let (blocks, rest) = bytes.as_chunks::<{ VECTORS * 32 }>();
    let low_half = _mm256_set1_epi64x(0xffff_ffff);
    let mut low = [_mm256_setzero_si256(); VECTORS];
    let mut high = [_mm256_setzero_si256(); VECTORS];
    for block in blocks {
        for vector in 0..VECTORS {
            // SAFETY: 32 bytes from `vector * 32` on are within the block, and
            // the load takes any alignment.
            let words =
                unsafe { _mm256_loadu_si256(block.as_ptr().add(vector * 32).cast::<__m256i>()) };
            low[vector] = _mm256_add_epi64(low[vector], _mm256_and_si256(words, low_half));
            high[vector] = _mm256_add_epi64(high[vector], _mm256_srli_epi64::<32>(words));
        }
    }
    let mut total = _mm256_setzero_si256();
    for vector in low.into_iter().chain(high) {
        total = _mm256_add_epi64(total, vector);
    }
    let mut lanes = [0u64; 4];
    // SAFETY: `lanes` has 32 bytes, and the store takes any alignment.
    unsafe { _mm256_storeu_si256(lanes.as_mut_ptr().cast::<__m256i>(), total) };
    lanes.iter().sum::<u64>() + sum_words_portable(rest)
}

/// Halves of 64-bit words into 64-bit lanes: no carry to mind, and the
/// compiler turns the inner loop into vector instructions of any width.
#[inline(always)]
fn sum_words_portable(bytes: &[u8]) -> u64 {
    const LANES: usize = 16;
    let (blocks, rest) = bytes.as_chunks::<{ LANES * 8 }>();
    let mut low = [0u64; LANES];
    let mut high = [0u64; LANES];
    for block in blocks {
        let (words, _) = block.as_chunks::<8>();
        for lane in 0..LANES {
            let word = u64::from_ne_bytes(words[lane]);
            low[lane] += word & 0xffff_ffff;
            high[lane] += word >> 32;
        }
    }
    let mut sum: u64 = low.iter().chain(&high).sum();
    let (words, rest) = rest.as_chunks::<4>();
    for word in words {
        sum += u64::from(u32::from_ne_bytes(*word));
    }
    let mut last = [0; 4];
    last[..rest.len()].copy_from_slice(rest);
    sum + u64::from(u32::from_ne_bytes(last))
}

#[cfg(test)]
mod tests {
    use super::*;

    proptest::proptest! {
        #[test]
        fn both_versions_agree(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..3000)) {
            let naive: u64 = bytes
                .chunks(4)
                .map(|chunk| {
                    let mut word = [0; 4];
                    word[..chunk.len()].copy_from_slice(chunk);
                    u64::from(u32::from_ne_bytes(word))
                })
                .sum();
            proptest::prop_assert_eq!(sum_words(&bytes), naive);
            proptest::prop_assert_eq!(sum_words_portable(&bytes), naive);
        }
    }

    #[test]
    #[ignore = "prints a figure: run with --release --ignored --nocapture"]
    fn speed() {
        let bytes = vec![0xa5u8; 1420];
        for (name, f) in [
            ("dispatched", sum_words as fn(&[u8]) -> u64),
            ("portable", |b: &[u8]| sum_words_portable(b)),
        ] {
            let start = std::time::Instant::now();
            let mut sum = 0u64;
            for _ in 0..2_000_000 {
                sum = sum.wrapping_add(f(std::hint::black_box(&bytes)));
            }
            let ns = start.elapsed().as_nanos() as f64 / 2e6;
            println!("{name}: {ns:.1} ns, {:.1} GB/s ({sum})", 1420.0 / ns);
        }
    }
}
