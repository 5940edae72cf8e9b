//! ICMP errors as a host gets them (RFC 792, RFC 4443).

use std::net::IpAddr;

use crate::packets::{checksum, destination, source, transport};

/// Protocol numbers.
pub const ICMP: u8 = 1;
/// Of ICMPv6.
pub const ICMP_V6: u8 = 58;

/// What went wrong, in the numbers of one family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kind {
    /// Type.
    pub kind: u8,
    /// Code.
    pub code: u8,
}

/// Network unreachable (IPv4), no route to destination (IPv6).
pub const NO_ROUTE: [Kind; 2] = [Kind { kind: 3, code: 0 }, Kind { kind: 1, code: 0 }];

/// Hop limit exceeded in transit.
pub const TIME_EXCEEDED: [Kind; 2] = [Kind { kind: 11, code: 0 }, Kind { kind: 3, code: 0 }];

/// Fragmentation needed (IPv4), packet too big (IPv6).
pub const TOO_BIG: [Kind; 2] = [Kind { kind: 3, code: 4 }, Kind { kind: 2, code: 0 }];

/// An ICMP error.
#[derive(Clone, Debug)]
pub struct IcmpError {
    /// Who reports.
    pub from: IpAddr,
    /// Who is told.
    pub to: IpAddr,
    /// What happened.
    pub kind: Kind,
    /// Bytes 4 to 7: for "too big" they say how long a packet may be.
    pub rest: [u8; 4],
    /// The beginning of the packet that it is about.
    pub quote: Vec<u8>,
    /// Whether all checksums are right.
    pub intact: bool,
    /// Length of the whole packet.
    pub packet_bytes: usize,
}

impl IcmpError {
    /// Reads a packet; `None` if it is no ICMP error.
    pub fn parse(packet: &[u8]) -> Option<Self> {
        let (protocol, message) = transport(packet)?;
        let is_error = match protocol {
            ICMP => [3, 4, 5, 11, 12].contains(message.first()?),
            ICMP_V6 => *message.first()? < 128,
            _ => false,
        };
        if !is_error || message.len() < 8 {
            return None;
        }
        let sums_right = match protocol {
            ICMP => checksum(&packet[..20]) == [0, 0] && checksum(message) == [0, 0],
            _ => {
                let length = (message.len() as u32).to_be_bytes();
                let pseudo = [&packet[8..40], &length, &[0, 0, 0, ICMP_V6]].concat();
                checksum(&[&pseudo, message].concat()) == [0, 0]
            }
        };
        Some(Self {
            from: source(packet)?,
            to: destination(packet)?,
            kind: Kind {
                kind: message[0],
                code: message[1],
            },
            rest: [message[4], message[5], message[6], message[7]],
            quote: message[8..].to_vec(),
            intact: sums_right,
            packet_bytes: packet.len(),
        })
    }

    /// Whether it is about a UDP or TCP packet to this port.
    pub fn is_about_port(&self, port: u16) -> bool {
        transport(&self.quote)
            .is_some_and(|(_, payload)| payload.get(2..4) == Some(&port.to_be_bytes()))
    }

    /// For "too big": how long a packet may be, in bytes.
    pub fn mtu_bytes(&self) -> u32 {
        match self.from {
            // RFC 1191: the second half.
            IpAddr::V4(_) => u32::from(u16::from_be_bytes([self.rest[2], self.rest[3]])),
            IpAddr::V6(_) => u32::from_be_bytes(self.rest),
        }
    }
}
