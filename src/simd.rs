//! A loop over many bytes, compiled for the instruction sets that the machine
//! may have and picked at run time. The choice needs `unsafe`, which is why
//! this is not in [`crate::packet`].

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
const WIDE_BYTES_MIN: usize = 128;

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn sum_words_avx2(bytes: &[u8]) -> u64 {
    sum_words_portable(bytes)
}

/// Both halves of each 64-bit word into a sum each: no carry to mind, and the
/// compiler turns the loop into vector instructions of whatever width there is.
#[inline(always)]
fn sum_words_portable(bytes: &[u8]) -> u64 {
    let (words, rest) = bytes.as_chunks::<8>();
    let (mut low, mut high) = (0, 0);
    for word in words {
        let word = u64::from_ne_bytes(*word);
        low += word & 0xffff_ffff;
        high += word >> 32;
    }
    let mut last = [0; 8];
    last[..rest.len()].copy_from_slice(rest);
    let last = u64::from_ne_bytes(last);
    low + high + (last & 0xffff_ffff) + (last >> 32)
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
}
