//! What a datagram is: a wire mode turns packets into datagrams and back. It does
//! no I/O.

pub mod plain;
pub mod wireguard;

use std::net::{IpAddr, SocketAddr};

use self::wireguard::message::{DATA_HEADER_BYTES, PADDING_BYTES, TAG_BYTES};
use crate::packet::ip;

/// Where a peer is reached, and from where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// The peer's address and port.
    pub address: SocketAddr,
    /// The address of this host that the peer sends to. It gets its answers from there: a
    /// firewall or NAT in between lets no others through. `None`: the kernel chooses.
    pub source: Option<IpAddr>,
}

impl From<SocketAddr> for Endpoint {
    fn from(address: SocketAddr) -> Self {
        Self {
            address,
            source: None,
        }
    }
}

/// How packets travel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// As they are; see [`plain`].
    #[default]
    Plain,
    /// Sealed; see [`wireguard`].
    WireGuard,
}

impl Mode {
    /// That of a tunnel with keys, or without.
    #[inline]
    pub fn with_keys(has_keys: bool) -> Self {
        match has_keys {
            true => Self::WireGuard,
            false => Self::Plain,
        }
    }

    /// Bytes that it adds to an inner packet: the outer IP header without options, the UDP
    /// header, and what is around the packet in the datagram.
    pub fn overhead_bytes(self, underlay: IpAddr) -> u32 {
        let headers_bytes = match underlay {
            IpAddr::V4(_) => 28,
            IpAddr::V6(_) => 48,
        };
        headers_bytes + self.datagram_bytes(0, 0) as u32
    }

    /// Bytes of the datagram that carries a packet. Padding hides the packet's exact length
    /// as far as it does not make the datagram longer than `datagram_bytes_max`.
    #[inline]
    pub fn datagram_bytes(self, packet_bytes: usize, datagram_bytes_max: usize) -> usize {
        const AROUND_BYTES: usize = DATA_HEADER_BYTES + TAG_BYTES;
        match self {
            Self::Plain => packet_bytes,
            Self::WireGuard => {
                let bytes = packet_bytes + AROUND_BYTES;
                let padded_bytes = packet_bytes.next_multiple_of(PADDING_BYTES) + AROUND_BYTES;
                padded_bytes.min(datagram_bytes_max).max(bytes)
            }
        }
    }

    /// Where a packet goes in a datagram of [`Self::datagram_bytes`]; the padding behind it
    /// is written.
    #[inline]
    pub fn packet_room(self, datagram: &mut [u8], packet_bytes: usize) -> &mut [u8] {
        match self {
            Self::Plain => datagram,
            Self::WireGuard => {
                let end = datagram.len() - TAG_BYTES;
                let (packet, padding) = datagram[DATA_HEADER_BYTES..end].split_at_mut(packet_bytes);
                padding.fill(0);
                packet
            }
        }
    }

    /// The packet in a datagram of ours that is not sealed yet.
    #[inline]
    pub fn packet(self, datagram: &[u8]) -> &[u8] {
        match self {
            Self::Plain => datagram,
            Self::WireGuard => {
                let end = datagram.len() - TAG_BYTES;
                let padded = &datagram[DATA_HEADER_BYTES..end];
                &padded[..ip::total_bytes(padded).min(padded.len())]
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_packet_is_padded_as_far_as_its_path_takes_it() {
        let bytes = |packet_bytes| Mode::WireGuard.datagram_bytes(packet_bytes, 1452);
        // Keepalive, short, a multiple of 16, as long as it may be, and too long.
        assert_eq!([0, 1, 64, 1420, 1421].map(bytes), [32, 48, 96, 1452, 1453]);
        assert_eq!(Mode::Plain.datagram_bytes(1421, 1452), 1421);
        assert_eq!(Mode::WireGuard.overhead_bytes([10, 0, 0, 1].into()), 60);
        assert_eq!(Mode::WireGuard.overhead_bytes([0; 16].into()), 80);
        assert_eq!(Mode::Plain.overhead_bytes([0; 16].into()), 48);
    }

    #[test]
    fn the_packet_comes_out_where_it_was_put() {
        for mode in [Mode::Plain, Mode::WireGuard] {
            for packet_bytes in [20_u8, 31, 32] {
                let mut packet = vec![7; packet_bytes.into()];
                packet[..4].copy_from_slice(&[0x45, 0, 0, packet_bytes]);
                let mut datagram = vec![1; mode.datagram_bytes(packet.len(), 1000)];
                let room = mode.packet_room(&mut datagram, packet.len());
                room.copy_from_slice(&packet);
                assert_eq!(mode.packet(&datagram), packet);
            }
        }
    }

    #[test]
    fn padding_is_zeros() {
        let mut datagram = vec![1; Mode::WireGuard.datagram_bytes(20, 1000)];
        Mode::WireGuard.packet_room(&mut datagram, 20);
        assert_eq!(datagram[36..48], [0; 12]);
    }
}
