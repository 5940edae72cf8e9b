//! The packets and vnet packets that kernels are fed: plain, valid, and always the
//! same.

use fastvpn::packet::checksum::{Sum, pseudo_header};
use fastvpn::packet::ip::Version;
use fastvpn::packet::virtio::{self, Header};
use fastvpn::packet::{
    IPV4_HEADER_BYTES, IPV6_HEADER_BYTES, TCP, TCP_CHECKSUM_OFFSET, UDP, UDP_CHECKSUM_OFFSET,
    UDP_HEADER_BYTES, tcp_flags,
};

/// MTU of a tunnel over Ethernet and IPv4: 1500 - 28.
pub const MTU_BYTES: usize = 1472;

/// A TCP header with the timestamp option, as Linux sends it.
pub const TCP_WITH_TIMESTAMP_BYTES: usize = 32;

/// IP protocol number of ESP (RFC 4303): traffic that nobody can merge.
pub const ESP: u8 = 50;

/// One packet to build.
#[derive(Clone, Copy)]
pub struct Packet {
    /// Of its IP header.
    pub version: Version,
    /// IP protocol: TCP, UDP or [`ESP`].
    pub protocol: u8,
    /// Tells flows apart: goes into the source port.
    pub flow: u16,
    /// Number within its flow: IPv4 identification, and TCP sequence number
    /// as if all before had the same payload.
    pub index: usize,
    /// Bytes behind the transport header.
    pub payload_bytes: usize,
}

impl Packet {
    /// Bytes of all headers.
    pub fn header_bytes(&self) -> usize {
        self.ip_bytes() + self.transport_bytes()
    }

    /// The payload that fills a packet of `packet_bytes`.
    #[must_use]
    pub fn filling(mut self, packet_bytes: usize) -> Self {
        self.payload_bytes = packet_bytes - self.header_bytes();
        self
    }

    /// The `index`th packet of the flow.
    #[must_use]
    pub fn at(mut self, index: usize) -> Self {
        self.index = index;
        self
    }

    fn ip_bytes(&self) -> usize {
        match self.version {
            Version::V4 => IPV4_HEADER_BYTES,
            Version::V6 => IPV6_HEADER_BYTES,
        }
    }

    fn transport_bytes(&self) -> usize {
        match self.protocol {
            TCP => TCP_WITH_TIMESTAMP_BYTES,
            UDP => UDP_HEADER_BYTES,
            _ => 0,
        }
    }

    fn checksum_offset(&self) -> Option<usize> {
        match self.protocol {
            TCP => Some(TCP_CHECKSUM_OFFSET),
            UDP => Some(UDP_CHECKSUM_OFFSET),
            _ => None,
        }
    }

    /// The packet with right checksums, as a datagram brings it.
    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = self.without_transport_checksum();
        if let Some(offset) = self.checksum_offset() {
            let (ip, transport) = bytes.split_at_mut(self.ip_bytes());
            let checksum = self
                .pseudo(ip, transport.len())
                .add_bytes(transport)
                .checksum_nonzero();
            transport[offset..offset + 2].copy_from_slice(&checksum);
        }
        bytes
    }

    /// The vnet packet of a kernel that leaves the checksum, and the cutting into
    /// packets of `gso_bytes` of payload if that is not 0, to the device.
    pub fn vnet_packet(&self, gso_bytes: usize) -> Vec<u8> {
        let mut bytes = self.without_transport_checksum();
        let ip_bytes = self.ip_bytes();
        let mut header = Header::default();
        if let Some(offset) = self.checksum_offset() {
            let (ip, transport) = bytes.split_at_mut(ip_bytes);
            let partial = self.pseudo(ip, transport.len()).partial();
            transport[offset..offset + 2].copy_from_slice(&partial);
            header = Header {
                flags: virtio::NEEDS_CHECKSUM,
                gso_type: match (gso_bytes, self.protocol, self.version) {
                    (0, ..) => virtio::GSO_NONE,
                    (_, TCP, Version::V4) => virtio::GSO_TCPV4,
                    (_, TCP, Version::V6) => virtio::GSO_TCPV6,
                    _ => virtio::GSO_UDP_L4,
                },
                header_bytes: self.header_bytes() as u16,
                gso_bytes: gso_bytes as u16,
                checksum_start: ip_bytes as u16,
                checksum_offset: offset as u16,
            };
        }
        [header.to_bytes().as_slice(), &bytes].concat()
    }

    fn pseudo(&self, ip_header: &[u8], transport_bytes: usize) -> Sum {
        pseudo_header(self.version, ip_header, self.protocol).add_u16(transport_bytes as u16)
    }

    fn without_transport_checksum(&self) -> Vec<u8> {
        let mut bytes = self.ip_header();
        match self.protocol {
            TCP => self.push_tcp_header(&mut bytes),
            UDP => {
                let udp_bytes = (UDP_HEADER_BYTES + self.payload_bytes) as u16;
                for half in [5000 + self.flow, 53, udp_bytes, 0] {
                    bytes.extend(half.to_be_bytes());
                }
            }
            _ => {}
        }
        bytes.extend((0..self.payload_bytes).map(|at| (at / 251 + at) as u8));
        bytes
    }

    fn ip_header(&self) -> Vec<u8> {
        let behind = self.transport_bytes() + self.payload_bytes;
        if self.version == Version::V6 {
            let mut bytes = vec![0x60, 0, 0, 0];
            bytes.extend((behind as u16).to_be_bytes());
            bytes.extend([self.protocol, 64]);
            for host in [1, 2] {
                bytes.extend([0xfd; 15]);
                bytes.push(host);
            }
            return bytes;
        }
        let mut bytes = vec![0x45, 0];
        bytes.extend(((IPV4_HEADER_BYTES + behind) as u16).to_be_bytes());
        bytes.extend((self.index as u16).to_be_bytes());
        // "Don't fragment", TTL, protocol.
        bytes.extend([0x40, 0, 64, self.protocol, 0, 0]);
        bytes.extend([10, 244, 55, 122, 10, 244, 55, 123]);
        let checksum = Sum::ZERO.add_bytes(&bytes).checksum();
        bytes[10..12].copy_from_slice(&checksum);
        bytes
    }

    fn push_tcp_header(&self, bytes: &mut Vec<u8>) {
        let sequence = 1_000_000 + (self.index * self.payload_bytes) as u32;
        bytes.extend((40000 + self.flow).to_be_bytes());
        bytes.extend(443u16.to_be_bytes());
        bytes.extend(sequence.to_be_bytes());
        bytes.extend(77u32.to_be_bytes());
        bytes.extend([(TCP_WITH_TIMESTAMP_BYTES / 4) as u8 * 16, tcp_flags::ACK]);
        for half in [502u16, 0, 0] {
            bytes.extend(half.to_be_bytes());
        }
        // Two "no operation", then the timestamp (RFC 7323).
        bytes.extend([1, 1, 8, 10, 0, 0, 1, 2, 0, 0, 3, 4]);
    }
}

/// The first packet of a flow, without payload.
pub fn packet(version: Version, protocol: u8, flow: u16) -> Packet {
    Packet {
        version,
        protocol,
        flow,
        index: 0,
        payload_bytes: 0,
    }
}

/// `count` packets of one flow, each of `packet_bytes`, in order.
pub fn flow(first: Packet, packet_bytes: usize, count: usize) -> Vec<Vec<u8>> {
    let first = first.filling(packet_bytes);
    (0..count).map(|index| first.at(index).bytes()).collect()
}
