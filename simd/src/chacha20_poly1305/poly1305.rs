//! The tag: Poly1305 (RFC 8439, section 2.5) of the padded packet and the block of lengths
//! (section 2.8), eight blocks at a time.
//!
//! Numbers modulo p = 2^130 - 5 are three limbs, which count 1, 2^44 and 2^88: their products
//! fit what the processor multiplies. Each vector has one limb of eight numbers. Number j
//! sums up every eighth block, times r^8 each step; in the end each is multiplied by the power
//! of r that its last block is due, and all are added.

use std::arch::x86_64::*;

use super::{KEY_BYTES, TAG_BYTES};

const BLOCK_BYTES: usize = 16;
const GROUP: usize = 8;
const GROUP_BYTES: usize = GROUP * BLOCK_BYTES;

/// The block of a group that each number of a vector has, after [`Numbers::add`] has taken
/// them apart.
const BLOCK_OF: [usize; GROUP] = [0, 4, 1, 5, 2, 6, 3, 7];

/// Where each number finds its power in `powers`: block 0 is due r^8, block 7 r. The first
/// four powers are at 0 to 3, the others at 8 to 11.
const DUE: [i64; GROUP] = {
    let mut due = [0; GROUP];
    let mut number = 0;
    while number < GROUP {
        let power = GROUP - 1 - BLOCK_OF[number];
        due[number] = (power + power / 4 * 4) as i64;
        number += 1;
    }
    due
};

/// By how many blocks are missing at the front of a group: the numbers that have one.
const PRESENT: [u8; GROUP] = {
    let mut present = [0; GROUP];
    let mut place = 0;
    while place < GROUP * GROUP {
        let (missing, number) = (place / GROUP, place % GROUP);
        present[missing] |= ((BLOCK_OF[number] >= missing) as u8) << number;
        place += 1;
    }
    present
};

const MASK_44: u64 = (1 << 44) - 1;
const MASK_42: u64 = (1 << 42) - 1;

/// What every whole block has above its 128 bits, in its upper limb.
const HIGH_BIT: i64 = 1 << 40;

/// The bits of r that may be set (section 2.5).
const R_MASK: u128 = 0x0fff_fffc_0fff_fffc_0fff_fffc_0fff_ffff;

/// Eight numbers. Limbs have 44, 44 and 42 bits after a multiplication, and one or two more
/// before it.
#[derive(Clone, Copy)]
struct Numbers([__m512i; 3]);

/// Eight factors: their limbs, and twenty times the upper two, which is what a limb at 2^132
/// or 2^176 counts at 1 or 2^44.
#[derive(Clone, Copy)]
struct Factors([__m512i; 3], [__m512i; 2]);

impl Numbers {
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn factors(self) -> Factors {
        let times_20 = |x| _mm512_add_epi64(_mm512_slli_epi64::<4>(x), _mm512_slli_epi64::<2>(x));
        Factors(self.0, [times_20(self.0[1]), times_20(self.0[2])])
    }

    /// The products. Each is below 2^130 but for a carry in the middle limb.
    #[inline]
    #[target_feature(enable = "avx512f,avx512ifma")]
    fn times(self, Factors([r0, r1, r2], [s1, s2]): Factors) -> Self {
        let zero = _mm512_setzero_si512();
        let [h0, h1, h2] = self.0;
        // The products of two limbs have up to 104 bits: the lower 52 of three of them added
        // up, and the upper ones.
        let sum = |pairs: [(__m512i, __m512i); 3]| {
            let (mut low, mut high) = (zero, zero);
            for (a, b) in pairs {
                low = _mm512_madd52lo_epu64(low, a, b);
                high = _mm512_madd52hi_epu64(high, a, b);
            }
            (low, high)
        };
        let (low_0, high_0) = sum([(h2, s1), (h1, s2), (h0, r0)]);
        let (low_1, high_1) = sum([(h2, s2), (h0, r1), (h1, r0)]);
        let (low_2, high_2) = sum([(h2, r0), (h0, r2), (h1, r1)]);
        let (mask_44, mask_42) = (
            _mm512_set1_epi64(MASK_44 as i64),
            _mm512_set1_epi64(MASK_42 as i64),
        );
        // What is at 2^52 of a limb counts 2^8 in the next, and 2^10 above the last.
        let limb_0 = _mm512_and_si512(low_0, mask_44);
        let carry = _mm512_add_epi64(
            _mm512_srli_epi64::<44>(low_0),
            _mm512_slli_epi64::<8>(high_0),
        );
        let sum_1 = _mm512_add_epi64(low_1, carry);
        let limb_1 = _mm512_and_si512(sum_1, mask_44);
        let carry = _mm512_add_epi64(
            _mm512_srli_epi64::<44>(sum_1),
            _mm512_slli_epi64::<8>(high_1),
        );
        let sum_2 = _mm512_add_epi64(low_2, carry);
        let limb_2 = _mm512_and_si512(sum_2, mask_42);
        let carry = _mm512_add_epi64(
            _mm512_srli_epi64::<42>(sum_2),
            _mm512_slli_epi64::<10>(high_2),
        );
        // 2^130 is 5.
        let times_5 = _mm512_add_epi64(carry, _mm512_slli_epi64::<2>(carry));
        let limb_0 = _mm512_add_epi64(limb_0, times_5);
        Self([
            _mm512_and_si512(limb_0, mask_44),
            _mm512_add_epi64(limb_1, _mm512_srli_epi64::<44>(limb_0)),
            limb_2,
        ])
    }

    /// Adds eight blocks, in the order of [`BLOCK_OF`]. `high`: [`HIGH_BIT`] where there is
    /// one.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn add(self, group: &[u8; GROUP_BYTES], high: __m512i) -> Self {
        let (first, second) = group.split_at(GROUP_BYTES / 2);
        // SAFETY: each half has 64 bytes; the instructions take any alignment.
        let (first, second) = unsafe {
            (
                _mm512_loadu_si512(first.as_ptr().cast()),
                _mm512_loadu_si512(second.as_ptr().cast()),
            )
        };
        let low = _mm512_unpacklo_epi64(first, second);
        let upper = _mm512_unpackhi_epi64(first, second);
        let mask = _mm512_set1_epi64(MASK_44 as i64);
        let middle = _mm512_or_si512(_mm512_srli_epi64::<44>(low), _mm512_slli_epi64::<20>(upper));
        let limbs = [
            _mm512_and_si512(low, mask),
            _mm512_and_si512(middle, mask),
            _mm512_or_si512(_mm512_srli_epi64::<24>(upper), high),
        ];
        Self([0, 1, 2].map(|limb| _mm512_add_epi64(self.0[limb], limbs[limb])))
    }

    /// Those of `other` where `mask` has a bit.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn or(self, other: Self, mask: u8) -> Self {
        Self([0, 1, 2].map(|limb| _mm512_mask_blend_epi64(mask, self.0[limb], other.0[limb])))
    }

    /// The fourth of the numbers, eight times.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn fourth(self) -> Self {
        let index = _mm512_set1_epi64(3);
        Self(self.0.map(|limb| _mm512_permutexvar_epi64(index, limb)))
    }
}

/// The powers of r: the eighth for each step, and for the last one those that the blocks of a
/// group are due.
#[inline]
#[target_feature(enable = "avx512f,avx512ifma")]
fn powers(r: u128) -> [Factors; 2] {
    let limbs = [
        r as u64 & MASK_44,
        (r >> 44) as u64 & MASK_44,
        (r >> 88) as u64,
    ];
    let r1 = Numbers(limbs.map(|limb| _mm512_set1_epi64(limb as i64)));
    let r2 = r1.times(r1.factors());
    // 1 2 1 2, then 3 4 3 4, then 1 2 3 4 and 5 6 7 8.
    let first_two = r1.or(r2, 0b1010_1010);
    let next_two = first_two.times(r2.factors());
    let first_four = first_two.or(next_two, 0b1100_1100);
    let next_four = first_four.times(first_four.fourth().factors());
    let [a, b, c, d, e, f, g, h] = DUE;
    let index = _mm512_set_epi64(h, g, f, e, d, c, b, a);
    let due = [0, 1, 2]
        .map(|limb| _mm512_permutex2var_epi64(first_four.0[limb], index, next_four.0[limb]));
    [next_four.fourth().factors(), Numbers(due).factors()]
}

/// The tag of an encrypted packet without additional data.
#[target_feature(enable = "avx512f,avx512vl,avx512ifma")]
pub(super) fn tag_of(one_time_key: &[u8; KEY_BYTES], packet: &[u8]) -> [u8; TAG_BYTES] {
    let (halves, _) = one_time_key.as_chunks::<16>();
    let [r, s] = [halves[0], halves[1]].map(u128::from_le_bytes);
    let [eighth, due] = powers(r & R_MASK);
    let mut lengths = [0; BLOCK_BYTES];
    lengths[8..].copy_from_slice(&(packet.len() as u64).to_le_bytes());
    // The last group ends with the lengths, so the first one may be short: it has zeros in
    // front, which count nothing.
    let count = packet.len().div_ceil(BLOCK_BYTES) + 1;
    let missing = count.next_multiple_of(GROUP) - count;
    let high = _mm512_set1_epi64(HIGH_BIT);
    let first_bytes = packet.len().min((GROUP - missing) * BLOCK_BYTES);
    let (first, rest) = match missing {
        0 => (&[][..], packet),
        _ => packet.split_at(first_bytes),
    };
    let mut sums = Numbers([_mm512_setzero_si512(); 3]);
    if missing > 0 {
        let mut group = [0; GROUP_BYTES];
        group[missing * BLOCK_BYTES..][..first.len()].copy_from_slice(first);
        if count < GROUP {
            group[GROUP_BYTES - BLOCK_BYTES..].copy_from_slice(&lengths);
        }
        sums = sums.add(&group, _mm512_maskz_mov_epi64(PRESENT[missing], high));
        if count < GROUP {
            return finish(sums.times(due), s);
        }
        sums = sums.times(eighth);
    }
    let (groups, last) = rest.as_chunks::<GROUP_BYTES>();
    for group in groups {
        sums = sums.add(group, high).times(eighth);
    }
    let mut group = [0; GROUP_BYTES];
    group[..last.len()].copy_from_slice(last);
    group[GROUP_BYTES - BLOCK_BYTES..].copy_from_slice(&lengths);
    finish(sums.add(&group, high).times(due), s)
}

/// The sum of eight numbers modulo p, and s.
#[inline]
#[target_feature(enable = "avx512f")]
fn finish(numbers: Numbers, s: u128) -> [u8; TAG_BYTES] {
    let [mut h0, mut h1, mut h2] = numbers.0.map(|limb| _mm512_reduce_add_epi64(limb) as u64);
    for _ in 0..2 {
        h1 += h0 >> 44;
        h2 += h1 >> 44;
        (h0, h1) = (h0 & MASK_44, h1 & MASK_44);
        h0 += (h2 >> 42) * 5;
        h2 &= MASK_42;
    }
    // Less p, if that is not below zero: then its uppermost bit is clear.
    let g0 = h0 + 5;
    let g1 = h1 + (g0 >> 44);
    let g2 = (h2 + (g1 >> 44)).wrapping_sub(1 << 42);
    let is_below = (g2 >> 63).wrapping_neg();
    let choose = |h: u64, g: u64| (h & is_below) | (g & !is_below);
    let h0 = choose(h0, g0 & MASK_44);
    let h1 = choose(h1, g1 & MASK_44);
    let h2 = choose(h2, g2);
    let h = u128::from(h0) | u128::from(h1) << 44 | u128::from(h2) << 88;
    h.wrapping_add(s).to_le_bytes()
}
