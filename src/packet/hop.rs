//! The tunnel as a hop: the time to live of IPv4, the hop limit of IPv6.

use super::ip::{self, Version};
use super::{be16, put_be16, virtio};

/// Offset of the time to live in an IPv4 header (RFC 791).
const TTL_OFFSET: usize = 8;
/// Offset of the hop limit in an IPv6 header (RFC 8200).
const HOP_LIMIT_OFFSET: usize = 7;
/// Offset of the checksum in an IPv4 header (RFC 791).
const IPV4_CHECKSUM_OFFSET: usize = 10;

/// What became of a packet that was to make one more hop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "an expired packet must not go on"]
pub enum Hop {
    /// It may: one hop fewer is left to it.
    Counted,
    /// It had none left, and is unchanged.
    Expired,
}

/// Takes one hop from a packet that [`ip::verify`] passed as `version`, and
/// keeps the IPv4 header checksum as right, or as wrong, as it was. The
/// headers of a GSO packet are those of its segments, so that one call
/// before [`super::segment`] serves them all.
#[inline]
pub fn decrement(version: Version, packet: &mut [u8]) -> Hop {
    let offset = match version {
        Version::V4 => TTL_OFFSET,
        Version::V6 => HOP_LIMIT_OFFSET,
    };
    if packet[offset] <= 1 {
        return Hop::Expired;
    }
    packet[offset] -= 1;
    if version == Version::V4 {
        // RFC 1624, equation 3: HC' = ~(~HC + ~m + m'). The time to live is
        // the upper half of its word, so that m' is m - 0x0100, and ~m + m' is
        // the same for all packets. The sum is never zero, as one's-complement
        // addition yields zero from zeros only: HC' is never 0xffff, which
        // is what a checksum computed anew never is either.
        let sum = u32::from(!be16(packet, IPV4_CHECKSUM_OFFSET)) + 0xfeff;
        let folded = (sum & 0xffff) + (sum >> 16);
        put_be16(packet, IPV4_CHECKSUM_OFFSET, !(folded as u16));
    }
    Hop::Counted
}

/// [`decrement`] for a vnet packet as a TUN queue gives it: virtio-net header and
/// packet. `None`, and nothing is changed, if it is not a whole IP packet; it is
/// then for [`super::segment::Segments::new`] to say why.
#[inline]
#[must_use = "an expired packet must not go on"]
pub fn decrement_vnet_packet(vnet_packet: &mut [u8]) -> Option<Hop> {
    let packet = vnet_packet.get_mut(virtio::HEADER_BYTES..)?;
    let version = ip::verify(packet).ok()?;
    Some(decrement(version, packet))
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::super::oracle;
    use super::super::segment::Segments;
    use super::super::test_support::*;
    use super::*;

    fn cut(vnet_packet: &[u8]) -> Vec<Vec<u8>> {
        let segments = Segments::new(vnet_packet).expect("vnet packet refused");
        (0..segments.count())
            .map(|index| {
                let mut out = vec![0xee; segments.packet_bytes(index)];
                segments.write(index, &mut out);
                out
            })
            .collect()
    }

    /// A decrement the obvious way: the checksum is computed anew.
    fn decremented(packet: &[u8]) -> Vec<u8> {
        let mut packet = packet.to_vec();
        let offset = if packet[0] >> 4 == 4 { 8 } else { 7 };
        packet[offset] -= 1;
        oracle::fill_ip_checksum(&mut packet);
        packet
    }

    prop_compose! {
        fn any_packet()(
            v6 in any::<bool>(),
            is_tcp in any::<bool>(),
            (hosts, tos, ttl, id) in any::<([u8; 2], u8, u8, u16)>(),
            option_words in prop_oneof![3 => Just(0usize), 1 => 1usize..=10],
            fill in any::<u8>(),
            is_extended in any::<bool>(),
            flags in any::<u8>(),
            payload in vec(any::<u8>(), 1..4000),
        ) -> Packet {
            let packet = if is_tcp {
                Packet::tcp(v6, payload).with_tcp(|tcp| tcp.flags = flags)
            } else {
                Packet::udp(v6, payload)
            };
            packet.with(|packet| {
                packet.hosts = hosts;
                packet.tos = tos;
                packet.ttl = ttl;
                packet.id = id;
                packet.ip_options = vec![fill; option_words * 4];
                if is_extended {
                    packet.extensions = vec![(60, vec![0, 0, 1, 4, 0, 0, 0, 0])];
                }
            })
        }
    }

    proptest! {
        /// Decrement, then cut, is cut, then decrement; also where only the
        /// checksum is left to do (`gso_bytes` 0).
        #[test]
        fn every_segment_of_a_vnet_packet_is_one_hop_on(
            packet in any_packet(),
            gso_bytes in prop_oneof![1 => Just(0u16), 5 => 1u16..1500],
        ) {
            let before = packet.vnet_packet(gso_bytes);
            let mut vnet_packet = before.clone();
            let hop = decrement_vnet_packet(&mut vnet_packet);
            if packet.ttl <= 1 {
                prop_assert_eq!(hop, Some(Hop::Expired));
                prop_assert_eq!(vnet_packet, before);
                return Ok(());
            }
            prop_assert_eq!(hop, Some(Hop::Counted));
            let packets = cut(&vnet_packet);
            let expected: Vec<_> = cut(&before).iter().map(|p| decremented(p)).collect();
            prop_assert_eq!(&packets, &expected);
            prop_assert_eq!(&packets, &oracle::expand(&vnet_packet));
            for packet in &packets {
                prop_assert_eq!(oracle::intact(packet), Ok(()));
            }
        }

        #[test]
        fn bytes_that_are_no_packet_are_left_alone(vnet_packet in vec(any::<u8>(), 0..100)) {
            let mut after = vnet_packet.clone();
            if decrement_vnet_packet(&mut after) != Some(Hop::Counted) {
                prop_assert_eq!(after, vnet_packet);
            }
        }
    }

    /// Every checksum that a header can have, the corners of one's complement
    /// among them: what is computed anew is what is kept up to date.
    #[test]
    fn all_checksums_come_out_as_if_computed_anew() {
        for ttl in [2, 3, 64, 128, 255] {
            let packet = Packet::udp(false, vec![]).with(|packet| packet.ttl = ttl);
            let mut packet = packet.bytes();
            for id in 0..=u16::MAX {
                packet[4..6].copy_from_slice(&id.to_be_bytes());
                oracle::fill_ip_checksum(&mut packet);
                let mut counted = packet.clone();
                assert_eq!(decrement(Version::V4, &mut counted), Hop::Counted);
                assert_eq!(counted, decremented(&packet), "id {id}");
            }
        }
    }

    #[test]
    fn a_wrong_checksum_stays_wrong() {
        let mut packet = Packet::udp(false, vec![1, 2]).bytes();
        packet[10] ^= 0x40;
        assert_eq!(decrement(Version::V4, &mut packet), Hop::Counted);
        assert!(oracle::intact(&packet).is_err());
        packet[10] = 0xff;
        packet[11] = 0xff;
        assert_eq!(decrement(Version::V4, &mut packet), Hop::Counted);
        assert!(oracle::intact(&packet).is_err());
    }
}
