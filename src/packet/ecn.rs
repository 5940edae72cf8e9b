//! Explicit congestion notification in the IP header (RFC 3168, section 5), and what
//! becomes of it in a tunnel (RFC 6040).

use super::ip::Version;
use super::{be16, put_be16};

/// The ECN field: the lower two bits of the IPv4 TOS and of the IPv6 traffic class.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Ecn {
    /// Not ECN-capable.
    #[default]
    NotEct = 0,
    /// ECN-capable, ECT(1).
    Ect1 = 1,
    /// ECN-capable, ECT(0).
    Ect0 = 2,
    /// Congestion experienced.
    Ce = 3,
}

impl Ecn {
    /// The field in a TOS or traffic class.
    #[inline]
    pub fn from_tos(tos: u8) -> Self {
        match tos & 3 {
            0 => Self::NotEct,
            1 => Self::Ect1,
            2 => Self::Ect0,
            _ => Self::Ce,
        }
    }
}

/// TOS or traffic class of a packet that [`super::ip::verify`] passed.
#[inline]
pub fn tos(version: Version, packet: &[u8]) -> u8 {
    match version {
        Version::V4 => packet[1],
        Version::V6 => packet[0] << 4 | packet[1] >> 4,
    }
}

/// Marks a packet that [`super::ip::verify`] passed as having experienced
/// congestion. `false`, and nothing is changed, if it is not ECN-capable: it has to
/// be dropped instead. The IPv4 header checksum stays as right as it was.
#[inline]
#[must_use = "a packet that cannot be marked has to be dropped"]
pub fn mark_ce(version: Version, packet: &mut [u8]) -> bool {
    match Ecn::from_tos(tos(version, packet)) {
        Ecn::NotEct => return false,
        Ecn::Ce => {}
        Ecn::Ect0 | Ecn::Ect1 => set(version, packet, Ecn::Ce),
    }
    true
}

/// Gives the packet of a tunnel's datagram what `outer`, the field in the datagram's
/// own header, has learnt on the way (RFC 6040, section 4.2). `false` if it has to be
/// dropped: it experienced congestion, and its ends would not learn of it.
#[inline]
#[must_use = "a packet that cannot be marked has to be dropped"]
pub fn decapsulate(version: Version, packet: &mut [u8], outer: Ecn) -> bool {
    match outer {
        Ecn::NotEct | Ecn::Ect0 => true,
        Ecn::Ect1 => {
            if Ecn::from_tos(tos(version, packet)) == Ecn::Ect0 {
                set(version, packet, Ecn::Ect1);
            }
            true
        }
        Ecn::Ce => mark_ce(version, packet),
    }
}

/// Sets the field. The IPv4 header checksum stays as right as it was.
fn set(version: Version, packet: &mut [u8], ecn: Ecn) {
    match version {
        Version::V6 => packet[1] = packet[1] & !(3 << 4) | (ecn as u8) << 4,
        Version::V4 => {
            // RFC 1624, equation 3: HC' = ~(~HC + ~m + m').
            let old = be16(packet, 0);
            packet[1] = packet[1] & !3 | ecn as u8;
            let new = be16(packet, 0);
            let sum = u32::from(!be16(packet, 10)) + u32::from(!old) + u32::from(new);
            let sum = (sum & 0xffff) + (sum >> 16);
            let sum = (sum & 0xffff) + (sum >> 16);
            put_be16(packet, 10, !(sum as u16));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::checksum::Sum;
    use proptest::prelude::*;

    #[test]
    fn only_capable_packets_are_marked() {
        for (tos, marked) in [
            (0, None),
            (0xfc, None),
            (1, Some(3)),
            (2, Some(3)),
            (3, Some(3)),
            (0xb9, Some(0xbb)),
        ] {
            let mut v4 = [0; 20];
            v4[0] = 0x45;
            v4[1] = tos;
            let mut v6 = [0; 40];
            v6[0] = 0x60 | tos >> 4;
            v6[1] = tos << 4 | 0x0a;
            assert_eq!(super::tos(Version::V6, &v6), tos);
            assert_eq!(mark_ce(Version::V4, &mut v4), marked.is_some());
            assert_eq!(mark_ce(Version::V6, &mut v6), marked.is_some());
            let expected = marked.unwrap_or(tos);
            assert_eq!(super::tos(Version::V4, &v4), expected);
            assert_eq!(super::tos(Version::V6, &v6), expected);
            assert_eq!((v6[0] >> 4, v6[1] & 0x0f), (6, 0x0a));
        }
    }

    /// The table of RFC 6040, section 4.2, figure 4: inner, outer, what comes out.
    #[test]
    fn a_tunnel_hands_on_what_was_marked_on_its_way() {
        use Ecn::{Ce, Ect0, Ect1, NotEct};
        let all = [NotEct, Ect0, Ect1, Ce];
        let table = [
            (NotEct, [Some(NotEct), Some(NotEct), Some(NotEct), None]),
            (Ect0, [Some(Ect0), Some(Ect0), Some(Ect1), Some(Ce)]),
            (Ect1, [Some(Ect1), Some(Ect1), Some(Ect1), Some(Ce)]),
            (Ce, [Some(Ce), Some(Ce), Some(Ce), Some(Ce)]),
        ];
        for (inner, results) in table {
            for (outer, expected) in all.into_iter().zip(results) {
                let dscp = 0xb8;
                let mut v4 = [0x45, dscp | inner as u8, 0, 20, 0, 0, 0, 0, 64, 6, 0, 0];
                let checksum = Sum::ZERO.add_bytes(&v4).checksum();
                v4[10..12].copy_from_slice(&checksum);
                let mut v6 = [0x60 | dscp >> 4, (dscp | inner as u8) << 4 | 7];
                let passes = [
                    decapsulate(Version::V4, &mut v4, outer),
                    decapsulate(Version::V6, &mut v6, outer),
                ];
                assert_eq!(passes, [expected.is_some(); 2], "{inner:?} in {outer:?}");
                let Some(expected) = expected else {
                    continue;
                };
                let tos = dscp | expected as u8;
                assert_eq!(super::tos(Version::V4, &v4), tos, "{inner:?} in {outer:?}");
                assert_eq!(super::tos(Version::V6, &v6), tos, "{inner:?} in {outer:?}");
                assert_eq!(v6[1] & 0x0f, 7);
                assert!(Sum::ZERO.add_bytes(&v4).is_valid());
            }
        }
    }

    proptest! {
        #[test]
        fn the_checksum_stays_right(mut header: [u8; 20]) {
            header[0] = 0x45;
            header[10..12].fill(0);
            let checksum = Sum::ZERO.add_bytes(&header).checksum();
            header[10..12].copy_from_slice(&checksum);
            let _ = mark_ce(Version::V4, &mut header);
            prop_assert!(Sum::ZERO.add_bytes(&header).is_valid());
        }
    }
}
