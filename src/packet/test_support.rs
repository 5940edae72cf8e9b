//! Packets and vnet packets for tests: [`Packet`] names every header field, and
//! turns into bytes with right lengths and checksums, or into the super-vnet packet
//! that a kernel hands over.

use super::oracle;

pub(super) const FIN: u8 = 0x01;
pub(super) const SYN: u8 = 0x02;
pub(super) const RST: u8 = 0x04;
pub(super) const PSH: u8 = 0x08;
pub(super) const ACK: u8 = 0x10;
pub(super) const URG: u8 = 0x20;
pub(super) const ECE: u8 = 0x40;
pub(super) const CWR: u8 = 0x80;

/// One IP packet, field by field.
#[derive(Clone, Debug)]
pub(super) struct Packet {
    pub(super) v6: bool,
    /// Last byte of the source and of the destination address.
    pub(super) hosts: [u8; 2],
    /// Type of service or traffic class.
    pub(super) tos: u8,
    /// TTL or hop limit.
    pub(super) ttl: u8,
    pub(super) flow_label: u32,
    pub(super) id: u16,
    /// IPv4 flags and fragment offset.
    pub(super) fragment: u16,
    /// IPv4 options, a multiple of 4 bytes.
    pub(super) ip_options: Vec<u8>,
    /// IPv6 extension headers: type, and bytes whose first is made the next
    /// header's type.
    pub(super) extensions: Vec<(u8, Vec<u8>)>,
    pub(super) transport: Layer4,
    pub(super) payload: Vec<u8>,
}

#[derive(Clone, Debug)]
pub(super) enum Layer4 {
    Tcp(Tcp),
    Udp { ports: [u16; 2] },
    Other { protocol: u8 },
}

#[derive(Clone, Debug)]
pub(super) struct Tcp {
    pub(super) ports: [u16; 2],
    pub(super) sequence: u32,
    pub(super) acknowledgment: u32,
    /// The four bits next to the data offset.
    pub(super) reserved: u8,
    pub(super) flags: u8,
    pub(super) window: u16,
    pub(super) urgent: u16,
    /// A multiple of 4 bytes.
    pub(super) options: Vec<u8>,
}

/// IPv4: do not fragment.
pub(super) const DF: u16 = 0x4000;

impl Packet {
    fn new(v6: bool, transport: Layer4, payload: Vec<u8>) -> Self {
        Self {
            v6,
            hosts: [1, 2],
            tos: 0,
            ttl: 64,
            flow_label: 0,
            id: 100,
            fragment: DF,
            ip_options: vec![],
            extensions: vec![],
            transport,
            payload,
        }
    }

    /// A data packet with the options of a usual connection: a timestamp.
    pub(super) fn tcp(v6: bool, payload: Vec<u8>) -> Self {
        let tcp = Tcp {
            ports: [40000, 443],
            sequence: 1_000_000,
            acknowledgment: 77,
            reserved: 0,
            flags: ACK,
            window: 502,
            urgent: 0,
            options: vec![1, 1, 8, 10, 0, 0, 1, 2, 0, 0, 3, 4],
        };
        Self::new(v6, Layer4::Tcp(tcp), payload)
    }

    pub(super) fn udp(v6: bool, payload: Vec<u8>) -> Self {
        let ports = [5000, 53];
        Self::new(v6, Layer4::Udp { ports }, payload)
    }

    pub(super) fn other(v6: bool, protocol: u8, payload: Vec<u8>) -> Self {
        Self::new(v6, Layer4::Other { protocol }, payload)
    }

    /// The TCP header's fields of what is a TCP packet.
    pub(super) fn tcp_mut(&mut self) -> &mut Tcp {
        match &mut self.transport {
            Layer4::Tcp(tcp) => tcp,
            other => panic!("{other:?}"),
        }
    }

    pub(super) fn with(mut self, change: impl FnOnce(&mut Self)) -> Self {
        change(&mut self);
        self
    }

    pub(super) fn with_tcp(mut self, change: impl FnOnce(&mut Tcp)) -> Self {
        change(self.tcp_mut());
        self
    }

    fn protocol(&self) -> u8 {
        match self.transport {
            Layer4::Tcp(_) => 6,
            Layer4::Udp { .. } => 17,
            Layer4::Other { protocol } => protocol,
        }
    }

    fn transport_header(&self) -> Vec<u8> {
        let mut bytes = vec![];
        match &self.transport {
            Layer4::Tcp(tcp) => {
                bytes.extend(tcp.ports[0].to_be_bytes());
                bytes.extend(tcp.ports[1].to_be_bytes());
                bytes.extend(tcp.sequence.to_be_bytes());
                bytes.extend(tcp.acknowledgment.to_be_bytes());
                let words = 5 + tcp.options.len() / 4;
                bytes.push((words as u8) << 4 | tcp.reserved);
                bytes.push(tcp.flags);
                bytes.extend(tcp.window.to_be_bytes());
                bytes.extend([0, 0]);
                bytes.extend(tcp.urgent.to_be_bytes());
                bytes.extend(&tcp.options);
            }
            Layer4::Udp { ports } => {
                bytes.extend(ports[0].to_be_bytes());
                bytes.extend(ports[1].to_be_bytes());
                // Too long for the field is what the kernel never sends.
                bytes.extend(((8 + self.payload.len()) as u16).to_be_bytes());
                bytes.extend([0, 0]);
            }
            Layer4::Other { .. } => {}
        }
        bytes
    }

    fn ip_header(&self, transport_bytes: usize) -> Vec<u8> {
        if !self.v6 {
            let header_bytes = 20 + self.ip_options.len();
            let mut bytes = vec![0x40 | (header_bytes / 4) as u8, self.tos];
            bytes.extend(((header_bytes + transport_bytes) as u16).to_be_bytes());
            bytes.extend(self.id.to_be_bytes());
            bytes.extend(self.fragment.to_be_bytes());
            bytes.extend([self.ttl, self.protocol(), 0, 0]);
            bytes.extend([10, 0, 0, self.hosts[0], 10, 0, 0, self.hosts[1]]);
            bytes.extend(&self.ip_options);
            return bytes;
        }
        let mut types: Vec<_> = self.extensions.iter().map(|(kind, _)| *kind).collect();
        types.push(self.protocol());
        let extensions: Vec<u8> = self
            .extensions
            .iter()
            .zip(&types[1..])
            .flat_map(|((_, bytes), next)| [&[*next], &bytes[1..]].concat())
            .collect();
        let word = 6 << 28 | u32::from(self.tos) << 20 | self.flow_label & 0xf_ffff;
        let mut bytes = word.to_be_bytes().to_vec();
        bytes.extend(((extensions.len() + transport_bytes) as u16).to_be_bytes());
        bytes.extend([types[0], self.ttl]);
        for host in self.hosts {
            bytes.extend([0xfd; 15]);
            bytes.push(host);
        }
        bytes.extend(extensions);
        bytes
    }

    fn without_checksums(&self) -> Vec<u8> {
        let transport = self.transport_header();
        let ip = self.ip_header(transport.len() + self.payload.len());
        [ip, transport, self.payload.clone()].concat()
    }

    /// Bytes of all headers.
    pub(super) fn header_bytes(&self) -> usize {
        self.without_checksums().len() - self.payload.len()
    }

    /// The packet with right checksums. A fragment has no transport checksum.
    pub(super) fn bytes(&self) -> Vec<u8> {
        let mut bytes = self.without_checksums();
        let whole = self.v6 || self.fragment & 0x3fff == 0;
        let whole = whole && !self.extensions.iter().any(|(kind, _)| *kind == 44);
        if !matches!(self.transport, Layer4::Other { .. }) && whole {
            oracle::fill_transport_checksum(&mut bytes);
        }
        oracle::fill_ip_checksum(&mut bytes);
        bytes
    }

    /// The vnet packet of a kernel that leaves cutting into `gso_bytes` pieces to
    /// the device; with 0, it leaves only the checksum.
    pub(super) fn vnet_packet(&self, gso_bytes: u16) -> Vec<u8> {
        let mut packet = self.without_checksums();
        oracle::fill_partial_checksum(&mut packet);
        oracle::fill_ip_checksum(&mut packet);
        let transport_at = self.header_bytes() - self.transport_header().len();
        let gso_type = match (&self.transport, self.v6) {
            _ if gso_bytes == 0 => 0,
            (Layer4::Tcp(_), false) => 1,
            (Layer4::Tcp(_), true) => 4,
            _ => 5,
        };
        virtio_vnet_packet(
            gso_type,
            gso_bytes,
            transport_at as u16,
            oracle::checksum_offset(self.protocol()) as u16,
            &packet,
        )
    }
}

/// A vnet packet that needs its checksum, with a header length that is of no use.
pub(super) fn virtio_vnet_packet(
    gso_type: u8,
    gso_bytes: u16,
    checksum_start: u16,
    checksum_offset: u16,
    packet: &[u8],
) -> Vec<u8> {
    let mut vnet_packet = vec![1, gso_type];
    for half in [0xbad, gso_bytes, checksum_start, checksum_offset] {
        vnet_packet.extend(half.to_ne_bytes());
    }
    vnet_packet.extend(packet);
    vnet_packet
}

/// Payload whose bytes tell where they were.
pub(super) fn payload(bytes: usize) -> Vec<u8> {
    (0..bytes).map(|at| (at / 251 + at) as u8).collect()
}
