//! One vnet packet from the TUN queue into the packets it stands for.
//!
//! With TSO and USO on, the host's stack hands over up to 64 KiB of one flow
//! with one set of headers and leaves the cutting to the "hardware": us. What
//! is written here is what the kernel's own software fallback would produce
//! (`net/ipv4/tcp_offload.c`, `net/ipv4/udp_offload.c`): the headers again in
//! front of each piece, lengths, sequence numbers and IPv4 identification
//! moved on, FIN and PSH on the last segment only, CWR on the first only, and
//! every checksum complete.

use super::checksum::Sum;
use super::ip::{self, Malformed, Version};
use super::virtio::{self, Header};
use super::{
    IPV6_HEADER_BYTES, PACKET_BYTES_MAX, TCP_CHECKSUM_OFFSET, TCP_HEADER_BYTES,
    UDP_CHECKSUM_OFFSET, UDP_HEADER_BYTES, be16, be32, put_be16, put_be32, tcp_flags,
};

/// Why a vnet packet was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Invalid {
    /// No virtio-net header in front.
    Header,
    /// Not one whole IP packet.
    Packet(Malformed),
    /// The offload fields contradict the packet.
    Offload,
}

/// The packets that a vnet packet stands for. Nothing is copied until
/// [`Self::write`] is called with the place where a packet shall go.
#[derive(Debug)]
pub struct Segments<'a> {
    vnet_packet: &'a [u8],
    version: Version,
    count: usize,
    plan: Plan,
}

#[derive(Debug)]
enum Plan {
    /// One packet as it is; the checksum to finish, if any: (start, offset).
    Whole { checksum: Option<(usize, usize)> },
    /// Cut the payload behind `header_bytes` into `payload_bytes` pieces.
    Cut {
        transport: Transport,
        /// Offset of the transport header.
        ip_bytes: usize,
        /// Offset of the payload.
        header_bytes: usize,
        /// Payload of every segment but the last.
        payload_bytes: usize,
        /// What the transport checksums have in common.
        transport_sum: Sum,
        /// What the IPv4 header checksums have in common.
        ip_sum: Sum,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Transport {
    Tcp,
    Udp,
}

impl<'a> Segments<'a> {
    /// Reads a vnet packet: virtio-net header and packet, as a TUN queue gives it.
    ///
    /// # Errors
    /// [`Invalid`] when the vnet packet is not what a kernel hands over.
    #[inline]
    pub fn new(vnet_packet: &'a [u8]) -> Result<Self, Invalid> {
        let (header, packet) = Header::parse(vnet_packet).ok_or(Invalid::Header)?;
        let version = ip::verify(packet).map_err(Invalid::Packet)?;
        let transport = match (header.gso_type & !virtio::GSO_ECN, version) {
            (virtio::GSO_NONE, _) => return Self::whole(header, packet, version),
            (virtio::GSO_TCPV4, Version::V4) | (virtio::GSO_TCPV6, Version::V6) => Transport::Tcp,
            (virtio::GSO_UDP_L4, _) => Transport::Udp,
            _ => return Err(Invalid::Offload),
        };
        Self::cut(header, packet, version, transport)
    }

    fn whole(header: Header, packet: &'a [u8], version: Version) -> Result<Self, Invalid> {
        let checksum = if header.flags & virtio::NEEDS_CHECKSUM == 0 {
            None
        } else {
            let start = usize::from(header.checksum_start);
            let offset = usize::from(header.checksum_offset);
            if start + offset + 2 > packet.len() {
                return Err(Invalid::Offload);
            }
            Some((start, offset))
        };
        Ok(Self {
            vnet_packet: packet,
            version,
            count: 1,
            plan: Plan::Whole { checksum },
        })
    }

    fn cut(
        header: Header,
        packet: &'a [u8],
        version: Version,
        transport: Transport,
    ) -> Result<Self, Invalid> {
        // `header_bytes` is the kernel's linear length, not that of the
        // headers: the TCP data offset tells where the payload starts.
        let ip_bytes = usize::from(header.checksum_start);
        let payload_bytes = usize::from(header.gso_bytes);
        let ip_is_whole = match version {
            Version::V4 => ip_bytes == usize::from(packet[0] & 0x0f) * 4,
            // Extension headers may stand in between.
            Version::V6 => ip_bytes >= IPV6_HEADER_BYTES,
        };
        let transport_bytes_min = match transport {
            Transport::Tcp => TCP_HEADER_BYTES,
            Transport::Udp => UDP_HEADER_BYTES,
        };
        if header.flags & virtio::NEEDS_CHECKSUM == 0
            || payload_bytes == 0
            || !ip_is_whole
            || ip_bytes + transport_bytes_min > packet.len()
        {
            return Err(Invalid::Offload);
        }
        let transport_bytes = match transport {
            Transport::Tcp => usize::from(packet[ip_bytes + 12] >> 4) * 4,
            Transport::Udp => UDP_HEADER_BYTES,
        };
        let header_bytes = ip_bytes + transport_bytes;
        if transport_bytes < transport_bytes_min
            || header_bytes >= packet.len()
            || header_bytes + payload_bytes > PACKET_BYTES_MAX
        {
            return Err(Invalid::Offload);
        }
        let count = (packet.len() - header_bytes).div_ceil(payload_bytes);
        let (ip_header, transport_header) = packet[..header_bytes].split_at(ip_bytes);
        let checksum_offset = match transport {
            Transport::Tcp => TCP_CHECKSUM_OFFSET,
            Transport::Udp => UDP_CHECKSUM_OFFSET,
        };
        // The field holds the pseudo-header's sum, which counts the whole
        // length: taken out again, as the kernel does. Addresses are not
        // summed up anew, for an IPv6 routing header keeps the destination
        // that counts elsewhere.
        let vnet_packet_bytes = (packet.len() - ip_bytes) as u16;
        let pseudo = Sum::ZERO
            .add_bytes(&transport_header[checksum_offset..checksum_offset + 2])
            .add_u16(!vnet_packet_bytes);
        let transport_sum = match transport {
            // All but sequence number, flags and checksum.
            Transport::Tcp => pseudo
                .add_bytes(&transport_header[..4])
                .add_bytes(&transport_header[8..12])
                .add_u16(u16::from(transport_header[12]) << 8)
                .add_bytes(&transport_header[14..TCP_CHECKSUM_OFFSET])
                .add_bytes(&transport_header[TCP_CHECKSUM_OFFSET + 2..]),
            // All but length and checksum: the ports.
            Transport::Udp => pseudo.add_bytes(&transport_header[..4]),
        };
        let ip_sum = match version {
            // All but total length, identification and checksum.
            Version::V4 => Sum::ZERO
                .add_bytes(&ip_header[..2])
                .add_bytes(&ip_header[6..10])
                .add_bytes(&ip_header[12..usize::from(ip_header[0] & 0x0f) * 4]),
            Version::V6 => Sum::ZERO,
        };
        Ok(Self {
            vnet_packet: packet,
            version,
            count,
            plan: Plan::Cut {
                transport,
                ip_bytes,
                header_bytes,
                payload_bytes,
                transport_sum,
                ip_sum,
            },
        })
    }

    /// The vnet packet's packet with its shared headers, as [`ip::verify`] passed it.
    #[inline]
    pub fn packet(&self) -> &'a [u8] {
        self.vnet_packet
    }

    /// IP version of the packets.
    #[inline]
    pub fn version(&self) -> Version {
        self.version
    }

    /// How many packets there are; at least one.
    #[inline]
    pub fn count(&self) -> usize {
        self.count
    }

    /// Bytes of packet `index`. All but the last have the same.
    #[inline]
    pub fn packet_bytes(&self, index: usize) -> usize {
        match self.plan {
            Plan::Whole { .. } => self.vnet_packet.len(),
            Plan::Cut {
                header_bytes,
                payload_bytes,
                ..
            } => {
                let rest = self.vnet_packet.len() - header_bytes - index * payload_bytes;
                header_bytes + rest.min(payload_bytes)
            }
        }
    }

    /// Writes packet `index` to `out`, which has [`Self::packet_bytes`] bytes.
    #[inline]
    pub fn write(&self, index: usize, out: &mut [u8]) {
        match self.plan {
            Plan::Whole { checksum } => {
                out.copy_from_slice(self.vnet_packet);
                if let Some((start, offset)) = checksum {
                    // The field holds the pseudo-header's sum already.
                    let checksum = Sum::ZERO.add_bytes(&out[start..]).checksum_nonzero();
                    out[start + offset..start + offset + 2].copy_from_slice(&checksum);
                }
            }
            Plan::Cut {
                transport,
                ip_bytes,
                header_bytes,
                payload_bytes,
                transport_sum,
                ip_sum,
            } => {
                let (header, payload) = out.split_at_mut(header_bytes);
                header.copy_from_slice(&self.vnet_packet[..header_bytes]);
                let at = header_bytes + index * payload_bytes;
                let payload_sum =
                    Sum::ZERO.add_copied(&self.vnet_packet[at..at + payload.len()], payload);
                let (ip_header, transport_header) = header.split_at_mut(ip_bytes);
                let ip_payload_bytes = transport_header.len() + payload.len();
                self.write_ip_header(index, ip_header, ip_payload_bytes, ip_sum);
                // The pseudo-header counts from the transport header on, also
                // behind IPv6 extension headers.
                let sum = transport_sum
                    .add_u16(ip_payload_bytes as u16)
                    .add_sum(payload_sum);
                match transport {
                    Transport::Tcp => {
                        let offset = (index * payload_bytes) as u32;
                        self.write_tcp_header(index, transport_header, offset, sum);
                    }
                    Transport::Udp => {
                        put_be16(transport_header, 4, ip_payload_bytes as u16);
                        let checksum = sum.add_u16(ip_payload_bytes as u16).checksum_nonzero();
                        transport_header[UDP_CHECKSUM_OFFSET..UDP_CHECKSUM_OFFSET + 2]
                            .copy_from_slice(&checksum);
                    }
                }
            }
        }
    }

    #[inline]
    fn write_ip_header(&self, index: usize, header: &mut [u8], payload_bytes: usize, sum: Sum) {
        let total_bytes = (header.len() + payload_bytes) as u16;
        match self.version {
            Version::V4 => {
                let identification = be16(header, 4).wrapping_add(index as u16);
                put_be16(header, 2, total_bytes);
                put_be16(header, 4, identification);
                let checksum = sum.add_u16(total_bytes).add_u16(identification).checksum();
                header[10..12].copy_from_slice(&checksum);
            }
            Version::V6 => put_be16(header, 4, total_bytes - IPV6_HEADER_BYTES as u16),
        }
    }

    #[inline]
    fn write_tcp_header(&self, index: usize, header: &mut [u8], offset: u32, sum: Sum) {
        let sequence = be32(header, 4).wrapping_add(offset);
        put_be32(header, 4, sequence);
        if index > 0 {
            header[13] &= !tcp_flags::CWR;
        }
        if index + 1 < self.count {
            header[13] &= !(tcp_flags::FIN | tcp_flags::PSH);
        }
        let checksum = sum
            .add_u32(sequence)
            .add_u16(u16::from(header[13]))
            .checksum_nonzero();
        header[TCP_CHECKSUM_OFFSET..TCP_CHECKSUM_OFFSET + 2].copy_from_slice(&checksum);
    }
}

#[cfg(test)]
#[path = "segment_tests.rs"]
mod tests;
