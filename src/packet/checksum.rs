//! The Internet checksum (RFC 1071).
//!
//! Sums are kept in the machine's own byte order: the one's-complement sum
//! does not care, as long as the result is stored the way the words were
//! loaded (RFC 1071, section 2 (B)). That spares a byte swap per word.

use super::ip::Version;
use super::{IPV4_HEADER_BYTES, IPV6_HEADER_BYTES};
use fastvpn_simd::{copy_and_sum, sum_words};

/// A one's-complement sum in progress. Words are added in native byte order;
/// 64 bits leave room for far more than the longest packet before folding.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sum(u64);

impl Sum {
    /// The empty sum.
    pub const ZERO: Self = Self(0);

    /// Adds bytes that start at an even offset of the summed data.
    #[inline]
    #[must_use]
    pub fn add_bytes(self, bytes: &[u8]) -> Self {
        Self(self.0 + sum_words(bytes))
    }

    /// Adds bytes that start at an even offset of the summed data, and copies
    /// them to `to`, which has the same length.
    #[inline]
    #[must_use]
    pub fn add_copied(self, bytes: &[u8], to: &mut [u8]) -> Self {
        Self(self.0 + copy_and_sum(bytes, to))
    }

    /// Adds the bytes of another sum, which start at an even offset.
    #[inline]
    #[must_use]
    pub fn add_sum(self, other: Self) -> Self {
        Self(self.0 + other.0)
    }

    /// Adds a 16-bit field, given in host order.
    #[inline]
    #[must_use]
    pub fn add_u16(self, value: u16) -> Self {
        Self(self.0 + u64::from(value.to_be()))
    }

    /// Adds a 32-bit field, given in host order.
    #[inline]
    #[must_use]
    pub fn add_u32(self, value: u32) -> Self {
        Self(self.0 + u64::from(value.to_be()))
    }

    /// Folds the carries in: the 16-bit one's-complement sum, native order.
    #[inline]
    fn fold(self) -> u16 {
        let mut sum = (self.0 >> 32) + (self.0 & 0xffff_ffff);
        sum = (sum >> 32) + (sum & 0xffff_ffff);
        sum = (sum >> 16) + (sum & 0xffff);
        sum = (sum >> 16) + (sum & 0xffff);
        sum = (sum >> 16) + (sum & 0xffff);
        sum as u16
    }

    /// The checksum field's two bytes: the complement of the sum.
    #[inline]
    pub fn checksum(self) -> [u8; 2] {
        (!self.fold()).to_ne_bytes()
    }

    /// As [`Self::checksum`], but a computed zero becomes 0xffff: in UDP a zero
    /// field says "no checksum" (RFC 768), and TCP takes either.
    #[inline]
    pub fn checksum_nonzero(self) -> [u8; 2] {
        match self.checksum() {
            [0, 0] => [0xff, 0xff],
            checksum => checksum,
        }
    }

    /// The sum itself, not complemented: what a checksum field holds while the
    /// rest is left to an offload (`CHECKSUM_PARTIAL`, `linux/skbuff.h`).
    #[inline]
    pub fn partial(self) -> [u8; 2] {
        self.fold().to_ne_bytes()
    }

    /// Whether data summed together with its own checksum is intact.
    #[inline]
    pub fn is_valid(self) -> bool {
        self.fold() == 0xffff
    }
}

/// Sum of the pseudo-header without its length field: addresses and protocol
/// (RFC 9293, section 3.1 for IPv4; RFC 8200, section 8.1 for IPv6).
/// `header` is at least the fixed IP header.
#[inline]
pub fn pseudo_header(version: Version, header: &[u8], protocol: u8) -> Sum {
    let addresses = match version {
        Version::V4 => &header[12..IPV4_HEADER_BYTES],
        Version::V6 => &header[8..IPV6_HEADER_BYTES],
    };
    Sum::ZERO.add_bytes(addresses).add_u16(u16::from(protocol))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 1071's definition, word by word in network order.
    fn reference(bytes: &[u8]) -> [u8; 2] {
        let mut sum = 0u32;
        for pair in bytes.chunks(2) {
            sum += u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
            sum = (sum & 0xffff) + (sum >> 16);
        }
        (!(sum as u16)).to_be_bytes()
    }

    proptest::proptest! {
        #[test]
        fn equals_the_definition(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..3000)) {
            proptest::prop_assert_eq!(Sum::ZERO.add_bytes(&bytes).checksum(), reference(&bytes));
        }

        #[test]
        fn splits_at_even_offsets(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..300), cut in 0usize..150) {
            let (a, b) = bytes.split_at((cut * 2).min(bytes.len() & !1));
            proptest::prop_assert_eq!(Sum::ZERO.add_bytes(a).add_bytes(b).checksum(), reference(&bytes));
        }
    }

    #[test]
    fn longest_packet_of_ones_does_not_overflow() {
        let bytes = vec![0xff; 65535];
        assert_eq!(Sum::ZERO.add_bytes(&bytes).checksum(), reference(&bytes));
    }

    #[test]
    fn fields_count_like_their_bytes() {
        let sum = Sum::ZERO.add_u16(0x1234).add_u32(0x89ab_cdef);
        let bytes = [0x12, 0x34, 0x89, 0xab, 0xcd, 0xef];
        assert_eq!(sum.checksum(), reference(&bytes));
    }
}
