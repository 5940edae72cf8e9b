//! Packets of one flow into vnet packets that the kernel takes in one TUN write:
//! generic receive offload, on the way in.
//!
//! The rules are those of the kernel's own GRO (`net/ipv4/tcp_offload.c`,
//! `net/ipv4/udp_offload.c`, `net/core/gro.c`), where they differ on the
//! strict side: what is merged here, cut again by [`super::segment`], gives
//! the packets that came in. (One thing a receiver must ignore may differ: the
//! IPv4 identification of unfragmentable packets, RFC 6864, when the sender
//! left it the same in all of them.) All that is not a plain TCP or UDP data
//! packet passes as it is. Packets of one flow never overtake each other.

use std::ops::Range;

use super::checksum::{Sum, pseudo_header};
use super::ip::Version;
use super::virtio::{self, Header};
use super::vnet_packet::{VnetPacket, VnetSink};
use super::{
    IPV4_HEADER_BYTES, IPV6_HEADER_BYTES, PACKET_BYTES_MAX, TCP, TCP_CHECKSUM_OFFSET,
    TCP_HEADER_BYTES, UDP, UDP_CHECKSUM_OFFSET, UDP_HEADER_BYTES, be16, be32, put_be16, tcp_flags,
};

/// Flows that can be open at a time. The oldest makes room for a new one.
pub const FLOWS_MAX: usize = 16;

/// Most UDP datagrams of one vnet packet: the kernel's `UDP_GRO_CNT_MAX`. A receiver
/// with `UDP_GRO` on may have sized its buffers for that.
pub const UDP_SEGMENTS_MAX: usize = 64;

/// Which GSO packets the TUN device takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TunOffloads {
    /// TCP, IPv4 and IPv6 (`TUN_F_TSO4`, `TUN_F_TSO6`).
    pub tcp: bool,
    /// UDP (`TUN_F_USO4`, `TUN_F_USO6`; Linux 6.2).
    pub udp: bool,
}

/// Merges packets; see the module's documentation.
#[derive(Debug)]
pub struct Coalescer {
    offloads: TunOffloads,
    /// At most [`FLOWS_MAX`], at most one per flow, oldest first.
    open: Vec<Open>,
}

impl Coalescer {
    /// An empty coalescer.
    pub fn new(offloads: TunOffloads) -> Self {
        Self {
            offloads,
            open: Vec::with_capacity(FLOWS_MAX),
        }
    }

    /// Takes in one packet that [`super::ip::verify`] passed as `version`.
    /// Whatever becomes final by it goes to `sink`.
    #[inline]
    pub fn push(&mut self, version: Version, packet: &[u8], sink: &mut impl VnetSink) {
        let data = match classify(version, packet) {
            Class::Data(data) if self.wants(&data) => data,
            Class::Data(Data { flow, .. }) | Class::Flow(flow) => {
                self.close_if(sink, |open| open.is_of(&flow, packet));
                return pass(packet, sink);
            }
            Class::Other => {
                self.close_if(sink, |open| open.is_between_same(version, packet));
                return pass(packet, sink);
            }
        };
        // The newest is the likeliest: traffic comes in bursts of one flow.
        let found = self
            .open
            .iter()
            .rposition(|open| open.is_of(&data.flow, packet));
        if let Some(index) = found {
            let open = &mut self.open[index];
            if open.append(&data, packet) {
                if open.is_full(&data) {
                    sink.write(self.open.remove(index).finish());
                }
                return;
            }
            sink.write(self.open.remove(index).finish());
        }
        let Some(vnet_packet) = sink.take_vnet_packet() else {
            return;
        };
        let open = Open::new(vnet_packet, &data, packet);
        if data.closes() {
            sink.write(open.finish());
            return;
        }
        if self.open.len() == FLOWS_MAX {
            sink.write(self.open.remove(0).finish());
        }
        self.open.push(open);
    }

    /// Hands all that is open to `sink`. To be called when no more packets are
    /// at hand, so that none waits for company.
    #[inline]
    pub fn flush(&mut self, sink: &mut impl VnetSink) {
        for open in self.open.drain(..) {
            sink.write(open.finish());
        }
    }

    #[inline]
    fn wants(&self, data: &Data) -> bool {
        match data.flow.protocol {
            TCP => self.offloads.tcp,
            _ => self.offloads.udp,
        }
    }

    fn close_if(&mut self, sink: &mut impl VnetSink, matches: impl Fn(&Open) -> bool) {
        while let Some(index) = self.open.iter().position(&matches) {
            sink.write(self.open.remove(index).finish());
        }
    }
}

/// Copies a packet out as it is.
#[inline]
fn pass(packet: &[u8], sink: &mut impl VnetSink) {
    if let Some(mut vnet_packet) = sink.take_vnet_packet() {
        vnet_packet.set(packet);
        sink.write(vnet_packet);
    }
}

/// What tells flows apart, but for addresses and ports: those are compared
/// where they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Flow {
    version: Version,
    protocol: u8,
}

impl Flow {
    /// Where the transport header starts: neither IPv4 options nor IPv6
    /// extension headers are part of a flow here.
    #[inline]
    fn ip_bytes(self) -> usize {
        match self.version {
            Version::V4 => IPV4_HEADER_BYTES,
            Version::V6 => IPV6_HEADER_BYTES,
        }
    }
}

/// Where the addresses are in a packet.
#[inline]
fn addresses(version: Version) -> Range<usize> {
    match version {
        Version::V4 => 12..20,
        Version::V6 => 8..40,
    }
}

/// What a packet is to the coalescer.
enum Class {
    /// A TCP or UDP packet whose headers allow merging.
    Data(Data),
    /// Any other packet of a TCP or UDP flow.
    Flow(Flow),
    /// Something else between two addresses.
    Other,
}

/// A packet that may be merged.
#[derive(Debug)]
struct Data {
    flow: Flow,
    header_bytes: usize,
    payload_bytes: usize,
    /// TCP: ends with PSH.
    push: bool,
}

impl Data {
    /// Whether nothing may follow it in a vnet packet.
    #[inline]
    fn closes(&self) -> bool {
        self.push
    }
}

#[inline]
fn classify(version: Version, packet: &[u8]) -> Class {
    let protocol = match version {
        Version::V4 => {
            // Options, or a fragment (more to come, or an offset), or the
            // reserved bit.
            if packet[0] != 0x45 || be16(packet, 6) & !DONT_FRAGMENT != 0 {
                return Class::Other;
            }
            packet[9]
        }
        Version::V6 => packet[6],
    };
    let flow = Flow { version, protocol };
    let ip_bytes = flow.ip_bytes();
    let transport = &packet[ip_bytes..];
    let transport_bytes_min = match protocol {
        TCP => TCP_HEADER_BYTES,
        UDP => UDP_HEADER_BYTES,
        _ => return Class::Other,
    };
    if transport.len() < transport_bytes_min {
        return Class::Other;
    }
    let (transport_bytes, push, mergeable) = if protocol == TCP {
        let flags = transport[13];
        let transport_bytes = usize::from(transport[12] >> 4) * 4;
        let plain = flags & !tcp_flags::PSH == tcp_flags::ACK
            && transport[12] & 0x0f == 0
            && transport_bytes >= TCP_HEADER_BYTES;
        (transport_bytes, flags & tcp_flags::PSH != 0, plain)
    } else {
        let whole = usize::from(be16(transport, 4)) == transport.len();
        let has_checksum = be16(transport, UDP_CHECKSUM_OFFSET) != 0;
        (UDP_HEADER_BYTES, false, whole && has_checksum)
    };
    // Without payload (a bare acknowledgment) there is nothing to merge.
    if !mergeable || transport_bytes >= transport.len() {
        return Class::Flow(flow);
    }
    Class::Data(Data {
        flow,
        header_bytes: ip_bytes + transport_bytes,
        payload_bytes: transport.len() - transport_bytes,
        push,
    })
}

const DONT_FRAGMENT: u16 = 0x4000;

/// How the IPv4 identification goes on from packet to packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Identification {
    /// Only one packet so far.
    Unknown,
    /// Up by one each: the kernel's TSO does that, and so shall we.
    Counts,
    /// The same in all, allowed with "don't fragment" set.
    Fixed,
}

/// A vnet packet that may still grow.
#[derive(Debug)]
struct Open {
    vnet_packet: VnetPacket,
    flow: Flow,
    header_bytes: usize,
    /// Payload of the first packet, and so of every segment but the last.
    segment_bytes: usize,
    count: usize,
    push: bool,
    identification: Identification,
    /// The first packet's checksums are good. Checked when a second one comes:
    /// a packet that stays alone is the kernel's to check.
    verified: bool,
}

impl Open {
    #[inline]
    fn new(mut vnet_packet: VnetPacket, data: &Data, packet: &[u8]) -> Self {
        vnet_packet.set(packet);
        Self {
            vnet_packet,
            flow: data.flow,
            header_bytes: data.header_bytes,
            segment_bytes: data.payload_bytes,
            count: 1,
            push: data.push,
            identification: Identification::Unknown,
            verified: false,
        }
    }

    /// Whether `packet`, which is of a `flow`'s kind, is of this very flow.
    #[inline]
    fn is_of(&self, flow: &Flow, packet: &[u8]) -> bool {
        // Addresses and, right behind them, ports. Constant lengths spare a
        // call for each packet.
        const V4_ENDPOINTS: Range<usize> = 12..IPV4_HEADER_BYTES + 4;
        const V6_ENDPOINTS: Range<usize> = 8..IPV6_HEADER_BYTES + 4;
        let first = self.vnet_packet.packet();
        self.flow == *flow
            && match flow.version {
                Version::V4 => first[V4_ENDPOINTS] == packet[V4_ENDPOINTS],
                Version::V6 => first[V6_ENDPOINTS] == packet[V6_ENDPOINTS],
            }
    }

    /// Whether `packet`, of whatever kind, has the same addresses.
    #[inline]
    fn is_between_same(&self, version: Version, packet: &[u8]) -> bool {
        let addresses = addresses(version);
        self.flow.version == version
            && self.vnet_packet.packet()[addresses.clone()] == packet[addresses]
    }

    /// Appends `packet`, of the same flow, as the next segment if it may be.
    #[inline]
    fn append(&mut self, data: &Data, packet: &[u8]) -> bool {
        let first = self.vnet_packet.packet();
        let fits = data.header_bytes == self.header_bytes
            && data.payload_bytes <= self.segment_bytes
            && first.len() + data.payload_bytes <= PACKET_BYTES_MAX;
        if !fits || !same_ip_header(self.flow.version, first, packet) {
            return false;
        }
        let headers = self.flow.ip_bytes()..self.header_bytes;
        if self.flow.protocol == TCP
            && !continues_tcp(&first[headers.clone()], &packet[headers], {
                first.len() - self.header_bytes
            })
        {
            return false;
        }
        let Some(identification) = self.next_identification(packet) else {
            return false;
        };
        // Summing up comes last: it is the part that costs.
        if !self.verified {
            let (headers, payload) = first.split_at(self.header_bytes);
            let payload_sum = Sum::ZERO.add_bytes(payload);
            if !checksums_are_valid(self.flow, headers, payload.len(), payload_sum) {
                return false;
            }
            self.verified = true;
        }
        let (headers, payload) = packet.split_at(data.header_bytes);
        let payload_sum = self.vnet_packet.copy_behind(payload);
        if !checksums_are_valid(self.flow, headers, payload.len(), payload_sum) {
            return false;
        }
        self.vnet_packet.extend(payload.len());
        self.identification = identification;
        self.count += 1;
        self.push = data.push;
        true
    }

    /// How the identification would go on with `packet`; `None` if it jumps.
    #[inline]
    fn next_identification(&self, packet: &[u8]) -> Option<Identification> {
        if self.flow.version == Version::V6 {
            return Some(Identification::Unknown);
        }
        let first = self.vnet_packet.packet();
        let step = be16(packet, 4).wrapping_sub(be16(first, 4));
        let counts = usize::from(step) == self.count;
        let fixed = step == 0 && be16(first, 6) & DONT_FRAGMENT != 0;
        match self.identification {
            Identification::Unknown | Identification::Counts if counts => {
                Some(Identification::Counts)
            }
            Identification::Unknown | Identification::Fixed if fixed => Some(Identification::Fixed),
            _ => None,
        }
    }

    /// Whether the packet just appended was the last that fits.
    #[inline]
    fn is_full(&self, last: &Data) -> bool {
        last.closes()
            || last.payload_bytes < self.segment_bytes
            || (self.flow.protocol == UDP && self.count == UDP_SEGMENTS_MAX)
    }

    /// Completes the headers. A lone packet stays as it came.
    #[inline]
    fn finish(mut self) -> VnetPacket {
        if self.count == 1 {
            return self.vnet_packet;
        }
        let Flow { version, protocol } = self.flow;
        let ip_bytes = self.flow.ip_bytes();
        let packet = self.vnet_packet.packet_mut();
        let total_bytes = packet.len();
        let (ip_header, transport) = packet.split_at_mut(ip_bytes);
        match version {
            Version::V4 => {
                put_be16(ip_header, 2, total_bytes as u16);
                ip_header[10..12].fill(0);
                let checksum = Sum::ZERO.add_bytes(ip_header).checksum();
                ip_header[10..12].copy_from_slice(&checksum);
            }
            Version::V6 => put_be16(ip_header, 4, (total_bytes - IPV6_HEADER_BYTES) as u16),
        }
        let checksum_offset = if protocol == TCP {
            if self.push {
                transport[13] |= tcp_flags::PSH;
            }
            TCP_CHECKSUM_OFFSET
        } else {
            put_be16(transport, 4, transport.len() as u16);
            UDP_CHECKSUM_OFFSET
        };
        let partial = pseudo_header(version, ip_header, protocol)
            .add_u16(transport.len() as u16)
            .partial();
        transport[checksum_offset..checksum_offset + 2].copy_from_slice(&partial);
        self.vnet_packet.set_header(Header {
            flags: virtio::NEEDS_CHECKSUM,
            gso_type: match (protocol, version) {
                (TCP, Version::V4) => virtio::GSO_TCPV4,
                (TCP, Version::V6) => virtio::GSO_TCPV6,
                _ => virtio::GSO_UDP_L4,
            },
            header_bytes: self.header_bytes as u16,
            gso_bytes: self.segment_bytes as u16,
            checksum_start: ip_bytes as u16,
            checksum_offset: checksum_offset as u16,
        });
        self.vnet_packet
    }
}

/// Type of service, TTL, "don't fragment" (IPv4); traffic class, flow label,
/// hop limit (IPv6). Addresses and protocol are part of the flow.
#[inline]
fn same_ip_header(version: Version, a: &[u8], b: &[u8]) -> bool {
    match version {
        Version::V4 => a[1] == b[1] && a[8] == b[8] && a[6..8] == b[6..8],
        Version::V6 => a[..4] == b[..4] && a[7] == b[7],
    }
}

/// Whether `next` carries on after `first` and `offset` bytes of payload: the
/// sequence number, and equal acknowledgment, offset, window, urgent pointer
/// and options. The flags were found plain already.
#[inline]
fn continues_tcp(first: &[u8], next: &[u8], offset: usize) -> bool {
    be32(next, 4) == be32(first, 4).wrapping_add(offset as u32)
        && next[8..13] == first[8..13]
        && next[14..16] == first[14..16]
        && next[18..] == first[18..]
}

/// Whether a packet of `headers` and payload is intact, by what its payload
/// sums up to.
#[inline]
fn checksums_are_valid(flow: Flow, headers: &[u8], payload_bytes: usize, payload_sum: Sum) -> bool {
    // Constant lengths let the short sums be unrolled.
    let (ip_is_valid, pseudo, transport) = match flow.version {
        Version::V4 => {
            let (header, transport) = headers.split_at(IPV4_HEADER_BYTES);
            let pseudo = pseudo_header(Version::V4, header, flow.protocol);
            (Sum::ZERO.add_bytes(header).is_valid(), pseudo, transport)
        }
        Version::V6 => {
            let (header, transport) = headers.split_at(IPV6_HEADER_BYTES);
            let pseudo = pseudo_header(Version::V6, header, flow.protocol);
            (true, pseudo, transport)
        }
    };
    ip_is_valid
        && pseudo
            .add_u16((transport.len() + payload_bytes) as u16)
            .add_bytes(transport)
            .add_sum(payload_sum)
            .is_valid()
}

#[cfg(test)]
#[path = "coalesce_tests.rs"]
mod tests;
