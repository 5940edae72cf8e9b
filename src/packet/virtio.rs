//! The virtio-net header that goes with every vnet packet of a TUN queue opened
//! with `IFF_VNET_HDR` (`linux/virtio_net.h`, legacy layout of 10 bytes in the
//! machine's own byte order).

/// Bytes of the header on a TUN queue unless `TUNSETVNETHDRSZ` says otherwise.
pub const HEADER_BYTES: usize = 10;

/// `VIRTIO_NET_HDR_F_NEEDS_CSUM`: the transport checksum holds only the sum of
/// the pseudo-header; finish it from `checksum_start` on.
pub const NEEDS_CHECKSUM: u8 = 1;

/// `VIRTIO_NET_HDR_GSO_NONE`: one packet.
pub const GSO_NONE: u8 = 0;
/// `VIRTIO_NET_HDR_GSO_TCPV4`: a TCP over IPv4 GSO packet.
pub const GSO_TCPV4: u8 = 1;
/// `VIRTIO_NET_HDR_GSO_TCPV6`: a TCP over IPv6 GSO packet.
pub const GSO_TCPV6: u8 = 4;
/// `VIRTIO_NET_HDR_GSO_UDP_L4`: UDP datagrams of equal size (USO).
pub const GSO_UDP_L4: u8 = 5;
/// `VIRTIO_NET_HDR_GSO_ECN`: bit that says that CWR is set on the first segment.
pub const GSO_ECN: u8 = 0x80;

/// The header's fields.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// [`NEEDS_CHECKSUM`] or 0.
    pub flags: u8,
    /// One of the `GSO_*` values.
    pub gso_type: u8,
    /// Bytes of all headers of a GSO packet. A hint only: the kernel sets it
    /// to the linear part of its buffer, so readers must not trust it.
    pub header_bytes: u16,
    /// Payload bytes of each segment but the last.
    pub gso_bytes: u16,
    /// Offset of the transport header, where summing starts.
    pub checksum_start: u16,
    /// Offset of the checksum field from `checksum_start`.
    pub checksum_offset: u16,
}

impl Header {
    /// Reads the header of a vnet packet; `None` if it is shorter than that.
    #[inline]
    pub fn parse(vnet_packet: &[u8]) -> Option<(Self, &[u8])> {
        let (header, packet) = vnet_packet.split_first_chunk::<HEADER_BYTES>()?;
        let half = |at: usize| u16::from_ne_bytes([header[at], header[at + 1]]);
        Some((
            Self {
                flags: header[0],
                gso_type: header[1],
                header_bytes: half(2),
                gso_bytes: half(4),
                checksum_start: half(6),
                checksum_offset: half(8),
            },
            packet,
        ))
    }

    /// The header's bytes.
    #[inline]
    pub fn to_bytes(self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[0] = self.flags;
        bytes[1] = self.gso_type;
        bytes[2..4].copy_from_slice(&self.header_bytes.to_ne_bytes());
        bytes[4..6].copy_from_slice(&self.gso_bytes.to_ne_bytes());
        bytes[6..8].copy_from_slice(&self.checksum_start.to_ne_bytes());
        bytes[8..10].copy_from_slice(&self.checksum_offset.to_ne_bytes());
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_it_writes() {
        let header = Header {
            flags: NEEDS_CHECKSUM,
            gso_type: GSO_TCPV6,
            header_bytes: 72,
            gso_bytes: 1400,
            checksum_start: 40,
            checksum_offset: 16,
        };
        let mut vnet_packet = header.to_bytes().to_vec();
        vnet_packet.push(7);
        assert_eq!(Header::parse(&vnet_packet), Some((header, &[7u8][..])));
        assert_eq!(Header::parse(&vnet_packet[..9]), None);
    }
}
