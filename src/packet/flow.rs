//! Which flow a packet belongs to: what has the same addresses, protocol and ports
//! (RFC 6437, section 1).

use super::ip::Version;
use super::{IPV4_HEADER_BYTES, IPV6_HEADER_BYTES, TCP, UDP, be16};

/// IP protocol number of SCTP (RFC 9260).
const SCTP: u8 = 132;

/// A hash of a packet's flow. Packets of one flow have the same hash; `key` is
/// secret, so that nobody can choose flows that share one.
///
/// The packet has passed [`super::ip::verify`]. Fragments are told apart by their
/// addresses and protocol alone, as only the first one has ports.
#[inline]
pub fn flow_hash(version: Version, packet: &[u8], key: u64) -> u64 {
    let (addresses, protocol, ports_at) = match version {
        Version::V4 => {
            let is_fragment = be16(packet, 6) & 0x3fff != 0;
            let header_bytes = usize::from(packet[0] & 0x0f) * 4;
            let ports_at = (!is_fragment).then_some(header_bytes);
            (&packet[12..IPV4_HEADER_BYTES], packet[9], ports_at)
        }
        Version::V6 => {
            let addresses = &packet[8..IPV6_HEADER_BYTES];
            (addresses, packet[6], Some(IPV6_HEADER_BYTES))
        }
    };
    let ports = match (protocol, ports_at) {
        (TCP | UDP | SCTP, Some(at)) => packet.get(at..at + 4),
        _ => None,
    };
    let start = mix(key, u64::from(protocol));
    let words = addresses.chunks_exact(4).chain(ports);
    words.fold(start, |hash, word| {
        let word = u32::from_ne_bytes([word[0], word[1], word[2], word[3]]);
        mix(hash, u64::from(word))
    })
}

/// Multiplies both to 128 bits and folds them: each bit of the result depends on
/// many of both.
#[inline]
fn mix(hash: u64, word: u64) -> u64 {
    let product = u128::from(hash ^ word) * 0x9e37_79b9_7f4a_7c15;
    (product >> 64) as u64 ^ product as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn v4(protocol: u8, ports: [u8; 4]) -> Vec<u8> {
        let mut packet = vec![0; 40];
        packet[0] = 0x45;
        packet[3] = 40;
        packet[9] = protocol;
        packet[12..20].copy_from_slice(&[10, 0, 0, 1, 10, 0, 0, 2]);
        packet[20..24].copy_from_slice(&ports);
        packet
    }

    #[test]
    fn a_flow_has_addresses_protocol_and_ports() {
        let hash = |packet: &[u8]| flow_hash(Version::V4, packet, 7);
        let packet = v4(TCP, [0, 1, 0, 2]);
        let mut other = packet.clone();
        other[24..].fill(9);
        other[4] = 1;
        other[8] = 3;
        assert_eq!(hash(&packet), hash(&other), "the rest does not matter");
        assert_ne!(hash(&packet), hash(&v4(TCP, [0, 1, 0, 3])));
        assert_ne!(hash(&packet), hash(&v4(UDP, [0, 1, 0, 2])));
        assert_ne!(hash(&packet), flow_hash(Version::V4, &packet, 8));
        let mut elsewhere = packet.clone();
        elsewhere[19] = 3;
        assert_ne!(hash(&packet), hash(&elsewhere));
        // What has no ports is told apart by its addresses.
        assert_eq!(hash(&v4(1, [0; 4])), hash(&v4(1, [8; 4])));
    }

    #[test]
    fn fragments_of_a_packet_are_one_flow() {
        let hash = |packet: &[u8]| flow_hash(Version::V4, packet, 7);
        let mut first = v4(UDP, [0, 1, 0, 2]);
        first[6] = 0x20;
        let mut second = v4(UDP, [5; 4]);
        second[7] = 100;
        assert_eq!(hash(&first), hash(&second));
    }

    proptest! {
        #[test]
        fn never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..100), key: u64) {
            if let Ok(version) = super::super::ip::verify(&bytes) {
                flow_hash(version, &bytes, key);
            }
        }
    }
}
