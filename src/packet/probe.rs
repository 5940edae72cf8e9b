//! Probes: what the two ends of a tunnel ask each other about the path between
//! them, in packets that no other receiver minds.
//!
//! Plain mode has no header of its own, so a probe is an IPv4 packet like any
//! other. Its addresses are 0.0.0.0, which no host has and no peer may send
//! from; its time to live is 1 and its protocol "no next header". A peer that
//! does not know probes either drops it as expired (flannel's `udp` backend) or
//! hands it to its kernel, which drops it without an answer.
//!
//! The nonce of a [`Kind::Request`] comes back in the [`Kind::Reply`]: who has
//! not seen the request cannot answer it. The ports that both carry tell whether
//! a NAT on the way rewrites them. A [`Kind::Keepalive`] needs no answer: it says that its
//! sender is there, and when to expect the next one.

use super::checksum::Sum;
use super::{IPV4_HEADER_BYTES, PACKET_BYTES_MAX, be16, be32, put_be16, put_be32};

/// Bytes of the shortest probe.
pub const PROBE_BYTES_MIN: usize = IPV4_HEADER_BYTES + 16;

/// "No next header" (RFC 8200, section 4.7); nothing listens to it.
const PROTOCOL: u8 = 59;
const TTL: u8 = 1;
/// First payload bytes of every probe.
const MAGIC: u32 = u32::from_be_bytes(*b"fvpn");

/// The longest time between keepalives, in seconds: a NAT need not remember anybody for longer
/// (RFC 4787, section 4.3), and whoever forges one cannot have a peer be waited for much longer.
pub const KEEPALIVE_SECONDS_MAX: u16 = 300;

/// What a probe is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Asks for a [`Kind::Reply`].
    Request {
        /// The UDP port that it is sent from.
        port: u16,
    },
    /// Answers a [`Kind::Request`].
    Reply {
        /// The UDP port that the request was seen to come from.
        port: u16,
    },
    /// Asks for nothing: its size is what matters.
    Size,
    /// Says that its sender is there. Who does not know of it takes it for a [`Self::Size`].
    Keepalive {
        /// How often it comes; more than 0.
        seconds: u16,
    },
}

/// What a probe says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Probe {
    /// What it is for.
    pub kind: Kind,
    /// Random number of the request.
    pub nonce: u64,
}

impl Probe {
    /// The probe as a packet of `packet_bytes`, brought into
    /// [`PROBE_BYTES_MIN`] to [`PACKET_BYTES_MAX`] and padded with zeros.
    pub fn to_packet(self, packet_bytes: usize) -> Vec<u8> {
        let packet_bytes = packet_bytes.clamp(PROBE_BYTES_MIN, PACKET_BYTES_MAX);
        let mut packet = vec![0; packet_bytes];
        packet[0] = 0x45;
        put_be16(&mut packet, 2, packet_bytes as u16);
        packet[8] = TTL;
        packet[9] = PROTOCOL;
        let header = Sum::ZERO.add_bytes(&packet[..IPV4_HEADER_BYTES]);
        packet[10..12].copy_from_slice(&header.checksum());
        put_be32(&mut packet, IPV4_HEADER_BYTES, MAGIC);
        let (kind, port) = match self.kind {
            Kind::Request { port } => (1, port),
            Kind::Reply { port } => (2, port),
            Kind::Size => (3, 0),
            Kind::Keepalive { seconds } => (3, seconds),
        };
        packet[IPV4_HEADER_BYTES + 4] = kind;
        put_be16(&mut packet, IPV4_HEADER_BYTES + 6, port);
        packet[IPV4_HEADER_BYTES + 8..PROBE_BYTES_MIN].copy_from_slice(&self.nonce.to_be_bytes());
        packet
    }

    /// The probe that a packet is; `None` if it is not one.
    pub fn from_packet(packet: &[u8]) -> Option<Self> {
        let is_probe = packet.len() >= PROBE_BYTES_MIN
            && packet[0] == 0x45
            && usize::from(be16(packet, 2)) == packet.len()
            && packet[9] == PROTOCOL
            && packet[12..IPV4_HEADER_BYTES] == [0; 8]
            && be32(packet, IPV4_HEADER_BYTES) == MAGIC;
        if !is_probe {
            return None;
        }
        let port = be16(packet, IPV4_HEADER_BYTES + 6);
        let kind = match packet[IPV4_HEADER_BYTES + 4] {
            1 => Kind::Request { port },
            2 => Kind::Reply { port },
            3 => match port {
                0 => Kind::Size,
                seconds => Kind::Keepalive { seconds },
            },
            _ => return None,
        };
        let (high, low) = (IPV4_HEADER_BYTES + 8, IPV4_HEADER_BYTES + 12);
        let nonce = u64::from(be32(packet, high)) << 32 | u64::from(be32(packet, low));
        Some(Self { kind, nonce })
    }
}

#[cfg(test)]
mod tests {
    use etherparse::Ipv4HeaderSlice;
    use proptest::prelude::*;

    use super::*;
    use crate::packet::ip;

    fn kinds() -> impl Strategy<Value = Kind> {
        prop_oneof![
            any::<u16>().prop_map(|port| Kind::Request { port }),
            any::<u16>().prop_map(|port| Kind::Reply { port }),
            Just(Kind::Size),
            (1..=u16::MAX).prop_map(|seconds| Kind::Keepalive { seconds }),
        ]
    }

    proptest! {
        #[test]
        fn comes_back_from_its_packet(kind in kinds(), nonce: u64, packet_bytes in 0usize..70_000) {
            let probe = Probe { kind, nonce };
            let packet = probe.to_packet(packet_bytes);
            let expected_bytes = packet_bytes.clamp(PROBE_BYTES_MIN, PACKET_BYTES_MAX);
            prop_assert_eq!(packet.len(), expected_bytes);
            prop_assert_eq!(Probe::from_packet(&packet), Some(probe));
            // A whole IP packet, to whoever reads it.
            prop_assert_eq!(ip::verify(&packet), Ok(ip::Version::V4));
            let header = Ipv4HeaderSlice::from_slice(&packet).unwrap();
            prop_assert_eq!(header.header_checksum(), header.to_header().calc_header_checksum());
            prop_assert_eq!((header.ttl(), header.protocol().0), (TTL, PROTOCOL));
            prop_assert!(header.source_addr().is_unspecified());
            prop_assert!(header.destination_addr().is_unspecified());
        }

        #[test]
        fn other_bytes_are_no_probe(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            prop_assert_eq!(Probe::from_packet(&bytes), None);
        }

        #[test]
        fn a_probe_that_was_damaged_is_none(at in 0usize..PROBE_BYTES_MIN - 8, flip in 1u8..) {
            let mut packet = Probe { kind: Kind::Size, nonce: 7 }.to_packet(0);
            packet[at] ^= flip;
            // These say nothing about what the probe is for.
            let is_ignored = matches!(at, 1 | 4..=8 | 10 | 11 | 25..);
            let other_kind = at == 24 && matches!(packet[24], 1 | 2);
            prop_assert_eq!(Probe::from_packet(&packet).is_none(), !is_ignored && !other_kind);
        }
    }
}
