//! Packets as bytes: no I/O, no `unsafe`, nothing that knows of sockets or rings.
//!
//! Outbound, a packet meets these in turn: [`virtio`] (what the kernel says of
//! the vnet packet it handed over), [`segment`] (one TSO/USO vnet packet into packets),
//! [`batch`] (packets into one UDP GSO send). Inbound: [`ip`] (does the
//! datagram hold one whole IP packet?), [`coalesce`] (packets of one flow into
//! a [`vnet_packet`] that the kernel takes in one write). [`checksum`] serves both, and so
//! does [`lpm`] (which next hop has an address?). Where the tunnel counts as a
//! hop, [`hop`] comes before [`segment`]; what cannot be sent on is answered by
//! [`icmp`].
#![forbid(unsafe_code)]

pub mod batch;
pub mod checksum;
pub mod coalesce;
mod codel;
pub mod ecn;
pub mod flow;
pub mod fq_codel;
pub mod hop;
pub mod icmp;
pub mod ip;
pub mod lpm;
pub mod probe;
pub mod segment;
pub mod virtio;
pub mod vnet_packet;

#[cfg(test)]
mod oracle;
#[cfg(test)]
mod test_support;

/// Most bytes of an IPv4 packet, and of any vnet packet a TUN device delivers:
/// the total length field has 16 bits (RFC 791).
pub const PACKET_BYTES_MAX: usize = 65535;

/// IP protocol number of TCP (RFC 9293).
pub const TCP: u8 = 6;
/// IP protocol number of UDP (RFC 768).
pub const UDP: u8 = 17;

/// Bytes of an IPv4 header without options (RFC 791).
pub const IPV4_HEADER_BYTES: usize = 20;
/// Bytes of an IPv6 header (RFC 8200).
pub const IPV6_HEADER_BYTES: usize = 40;
/// Bytes of a TCP header without options (RFC 9293).
pub const TCP_HEADER_BYTES: usize = 20;
/// Bytes of a UDP header (RFC 768).
pub const UDP_HEADER_BYTES: usize = 8;

/// Offset of the checksum within a TCP header.
pub const TCP_CHECKSUM_OFFSET: usize = 16;
/// Offset of the checksum within a UDP header.
pub const UDP_CHECKSUM_OFFSET: usize = 6;

/// Bits of the TCP flags byte (offset 13 of the header).
pub mod tcp_flags {
    /// No more data from the sender.
    pub const FIN: u8 = 0x01;
    /// Push: the receiver should hand over what it has.
    pub const PSH: u8 = 0x08;
    /// The acknowledgment number is valid.
    pub const ACK: u8 = 0x10;
    /// Congestion window reduced (RFC 3168).
    pub const CWR: u8 = 0x80;
}

/// Big-endian `u16` at `offset`. The caller has checked the length.
#[inline]
pub(crate) fn be16(bytes: &[u8], offset: usize) -> u16 {
    u16::from_be_bytes([bytes[offset], bytes[offset + 1]])
}

/// Big-endian `u32` at `offset`. The caller has checked the length.
#[inline]
pub(crate) fn be32(bytes: &[u8], offset: usize) -> u32 {
    u32::from_be_bytes([
        bytes[offset],
        bytes[offset + 1],
        bytes[offset + 2],
        bytes[offset + 3],
    ])
}

/// Stores `value` big-endian at `offset`.
#[inline]
pub(crate) fn put_be16(bytes: &mut [u8], offset: usize, value: u16) {
    bytes[offset..offset + 2].copy_from_slice(&value.to_be_bytes());
}

/// Stores `value` big-endian at `offset`.
#[inline]
pub(crate) fn put_be32(bytes: &mut [u8], offset: usize, value: u32) {
    bytes[offset..offset + 4].copy_from_slice(&value.to_be_bytes());
}
