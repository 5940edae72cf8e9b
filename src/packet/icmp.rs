//! ICMP errors about packets that cannot be sent on (RFC 792, RFC 4443):
//! whether one may be sent, and its bytes.
//!
//! The rules on when to keep silent are there so that errors never breed
//! errors and one packet never makes many hosts answer: RFC 1122, section
//! 3.2.2, RFC 1812, section 4.3.2.7, and RFC 4443, section 2.4 (e). How many
//! errors leave in a second is for `dataplane::report`.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{Ipv4Net, Ipv6Net};

use super::checksum::{Sum, pseudo_header};
use super::ip::Version;
use super::{IPV4_HEADER_BYTES, IPV6_HEADER_BYTES, be16, put_be16, put_be32};

/// IP protocol number of ICMP (RFC 792).
pub const ICMPV4: u8 = 1;
/// Next header number of ICMPv6 (RFC 4443).
pub const ICMPV6: u8 = 58;

/// Most bytes of an ICMPv4 error, its IP header included (RFC 1812, section
/// 4.3.2.3): what every host takes.
pub const IPV4_ERROR_BYTES_MAX: usize = 576;
/// Most bytes of an ICMPv6 error, its IP header included: the smallest MTU
/// that IPv6 allows (RFC 4443, section 2.4 (c)).
pub const IPV6_ERROR_BYTES_MAX: usize = 1280;
/// Most bytes of an error of either version.
pub const ERROR_BYTES_MAX: usize = IPV6_ERROR_BYTES_MAX;

/// Bytes of the header of an ICMP error, in front of the quote (RFC 792,
/// RFC 4443).
const ICMP_HEADER_BYTES: usize = 8;
/// Fewest bytes of an ICMPv6 message: type, code and checksum.
const ICMPV6_MESSAGE_BYTES_MIN: usize = 4;

/// Precedence 6, internetwork control, which an error has that does not take
/// on its offender's (RFC 1812, section 4.3.2.5). The same bits are class
/// selector 6 in IPv6 (RFC 2474, section 4.2.2).
const INTERNETWORK_CONTROL: u8 = 0xc0;
/// Hops that an error may make: the recommended default of RFC 1700.
const HOP_LIMIT: u8 = 64;
/// IPv4: do not fragment. With it the identification says nothing and may be
/// the same in all errors (RFC 6864, section 4.1).
const DONT_FRAGMENT: u16 = 0x4000;

/// Smallest MTU of IPv4 (RFC 791, section 3.2).
const IPV4_MTU_BYTES_MIN: u32 = 68;
/// Smallest MTU of IPv6 (RFC 8200, section 5).
const IPV6_MTU_BYTES_MIN: u32 = 1280;

/// IPv6 extension headers that are walked over in search of an ICMPv6 header.
/// More than that no sender has a use for (RFC 8200, section 4.1: each at most
/// once, destination options twice).
const EXTENSION_HEADERS_MAX: usize = 8;

/// Why a packet could not be sent on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Problem {
    /// No peer has a prefix for the destination: network unreachable (type 3,
    /// code 0), no route to destination (type 1, code 0).
    NoRoute,
    /// Longer than the next hop takes: fragmentation needed (type 3, code 4,
    /// RFC 1191), packet too big (type 2, RFC 8201).
    TooBig {
        /// The longest packet that it does take. A value under the smallest
        /// that the IP version allows (68, 1280) is reported as that.
        mtu_bytes: u32,
    },
    /// The last hop was taken: time to live exceeded (type 11, code 0), hop
    /// limit exceeded (type 3, code 0).
    TimeExceeded,
}

/// The host's own addresses on the tunnel. Errors are sent from them, and none
/// where there is no address of the packet's version.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TunnelAddresses {
    /// IPv4 address, and the prefix whose last address is a broadcast.
    pub v4: Option<Ipv4Net>,
    /// IPv6 address.
    pub v6: Option<Ipv6Net>,
    /// Whether the kernel takes IPv4 packets from the TUN that come from one of
    /// its own addresses: `accept_local` of the interface (`ip-sysctl`). As a
    /// rule it does not, and drops an error from [`Self::v4`] as a martian,
    /// whoever it is for. While this is `false`, IPv4 errors are therefore sent
    /// in the name of the offender's destination, which passes strict
    /// reverse-path filtering too, for the route there is through the tunnel.
    /// `traceroute` then shows that address instead of the tunnel's.
    pub accept_local: bool,
}

/// An ICMP error that may be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ErrorMessage {
    problem: Problem,
    ends: Ends,
}

/// From where to where it goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ends {
    V4 { from: Ipv4Addr, to: Ipv4Addr },
    V6 { from: Ipv6Addr, to: Ipv6Addr },
}

impl ErrorMessage {
    /// The error about `offender`, a packet that [`super::ip::verify`] passed
    /// as `version`; its headers will do for all segments of a GSO packet.
    /// `None` if there may be no error about it, or there is no address to send
    /// it from.
    ///
    /// There is none about
    /// - ICMP errors and ICMPv6 redirects, also when too little is there to
    ///   tell (a later fragment, a cut header, too many extension headers);
    /// - packets to multicast and broadcast destinations, but for IPv6 packets
    ///   that are too big: path MTU discovery needs that one for multicast too
    ///   (RFC 4443, section 2.4 (e.3));
    /// - packets whose source is not a single host.
    pub fn about(
        problem: Problem,
        version: Version,
        offender: &[u8],
        addresses: &TunnelAddresses,
    ) -> Option<Self> {
        let ends = match version {
            Version::V4 => ends_v4(offender, addresses)?,
            Version::V6 => ends_v6(problem, offender, addresses)?,
        };
        Some(Self { problem, ends })
    }

    /// Whom it goes to: the offender's source.
    pub fn destination(&self) -> IpAddr {
        match self.ends {
            Ends::V4 { to, .. } => IpAddr::V4(to),
            Ends::V6 { to, .. } => IpAddr::V6(to),
        }
    }

    /// Writes the whole error to `out`: IP header, ICMP header, and as much of
    /// `offender` as fits. Returns its bytes.
    ///
    /// `offender` is the packet that this error is [`about`](Self::about), or
    /// the first segment if that was a GSO packet.
    pub fn write(&self, offender: &[u8], out: &mut [u8; ERROR_BYTES_MAX]) -> usize {
        let (header_bytes, error_bytes_max) = match self.ends {
            Ends::V4 { .. } => (IPV4_HEADER_BYTES, IPV4_ERROR_BYTES_MAX),
            Ends::V6 { .. } => (IPV6_HEADER_BYTES, IPV6_ERROR_BYTES_MAX),
        };
        let quote_bytes = offender
            .len()
            .min(error_bytes_max - header_bytes - ICMP_HEADER_BYTES);
        let message_bytes = ICMP_HEADER_BYTES + quote_bytes;
        let error_bytes = header_bytes + message_bytes;
        let (header, message) = out[..error_bytes].split_at_mut(header_bytes);
        message[..ICMP_HEADER_BYTES].copy_from_slice(&self.icmp_header());
        message[ICMP_HEADER_BYTES..].copy_from_slice(&offender[..quote_bytes]);
        let sum = Sum::ZERO.add_bytes(message);
        let sum = match self.ends {
            Ends::V4 { from, to } => {
                write_ipv4_header(header, error_bytes, from, to);
                sum
            }
            Ends::V6 { from, to } => {
                write_ipv6_header(header, message_bytes, from, to);
                // The pseudo-header counts in ICMPv6 (RFC 4443, section 2.3).
                pseudo_header(Version::V6, header, ICMPV6)
                    .add_u16(message_bytes as u16)
                    .add_sum(sum)
            }
        };
        message[2..4].copy_from_slice(&sum.checksum());
        error_bytes
    }

    /// Type, code and the field behind the checksum, which is still zero.
    fn icmp_header(&self) -> [u8; ICMP_HEADER_BYTES] {
        let mut header = [0; ICMP_HEADER_BYTES];
        (header[0], header[1]) = match (self.problem, self.ends) {
            (Problem::NoRoute, Ends::V4 { .. }) => (3, 0),
            (Problem::NoRoute, Ends::V6 { .. }) => (1, 0),
            (Problem::TooBig { .. }, Ends::V4 { .. }) => (3, 4),
            (Problem::TooBig { .. }, Ends::V6 { .. }) => (2, 0),
            (Problem::TimeExceeded, Ends::V4 { .. }) => (11, 0),
            (Problem::TimeExceeded, Ends::V6 { .. }) => (3, 0),
        };
        if let Problem::TooBig { mtu_bytes } = self.problem {
            // In IPv4 the upper half of the field is unused (RFC 1191).
            let field = match self.ends {
                Ends::V4 { .. } => mtu_bytes.clamp(IPV4_MTU_BYTES_MIN, u32::from(u16::MAX)),
                Ends::V6 { .. } => mtu_bytes.max(IPV6_MTU_BYTES_MIN),
            };
            put_be32(&mut header, 4, field);
        }
        header
    }
}

fn write_ipv4_header(header: &mut [u8], total_bytes: usize, from: Ipv4Addr, to: Ipv4Addr) {
    header.fill(0);
    header[0] = 0x45;
    header[1] = INTERNETWORK_CONTROL;
    put_be16(header, 2, total_bytes as u16);
    put_be16(header, 6, DONT_FRAGMENT);
    header[8] = HOP_LIMIT;
    header[9] = ICMPV4;
    header[12..16].copy_from_slice(&from.octets());
    header[16..20].copy_from_slice(&to.octets());
    let checksum = Sum::ZERO.add_bytes(header).checksum();
    header[10..12].copy_from_slice(&checksum);
}

fn write_ipv6_header(header: &mut [u8], payload_bytes: usize, from: Ipv6Addr, to: Ipv6Addr) {
    put_be32(header, 0, 6 << 28 | u32::from(INTERNETWORK_CONTROL) << 20);
    put_be16(header, 4, payload_bytes as u16);
    header[6] = ICMPV6;
    header[7] = HOP_LIMIT;
    header[8..24].copy_from_slice(&from.octets());
    header[24..40].copy_from_slice(&to.octets());
}

fn ends_v4(offender: &[u8], addresses: &TunnelAddresses) -> Option<Ends> {
    let tunnel = addresses.v4?;
    let source = Ipv4Addr::from(octets(offender, 12));
    let destination = Ipv4Addr::from(octets(offender, 16));
    let is_allowed = !is_later_fragment(offender)
        && is_host(source, tunnel)
        && !destination.is_multicast()
        && !is_broadcast(destination, tunnel)
        && !is_icmpv4_error(offender);
    let from = match addresses.accept_local {
        true => tunnel.addr(),
        false => destination,
    };
    is_allowed.then_some(Ends::V4 { from, to: source })
}

fn ends_v6(problem: Problem, offender: &[u8], addresses: &TunnelAddresses) -> Option<Ends> {
    let tunnel = addresses.v6?;
    let source = Ipv6Addr::from(octets(offender, 8));
    let destination = Ipv6Addr::from(octets(offender, 24));
    let is_host = !source.is_unspecified() && !source.is_loopback() && !source.is_multicast();
    let is_allowed = is_host
        && (!destination.is_multicast() || matches!(problem, Problem::TooBig { .. }))
        && may_answer_ipv6_payload(offender);
    is_allowed.then_some(Ends::V6 {
        from: tunnel.addr(),
        to: source,
    })
}

/// The address at `offset` of a fixed IP header.
fn octets<const BYTES: usize>(header: &[u8], offset: usize) -> [u8; BYTES] {
    let mut octets = [0; BYTES];
    octets.copy_from_slice(&header[offset..offset + BYTES]);
    octets
}

/// Whether an IPv4 source is one host that can be reached: not in 0.0.0.0/8,
/// 127.0.0.0/8 or above 224.0.0.0, and no broadcast (RFC 1812, section 5.3.7).
fn is_host(source: Ipv4Addr, tunnel: Ipv4Net) -> bool {
    !matches!(source.octets()[0], 0 | 127 | 224..) && !is_broadcast(source, tunnel)
}

/// Whether an IPv4 address is a broadcast, as far as can be known here: the
/// limited one, its old form of zeros (RFC 1122, section 3.3.6), and that of
/// the tunnel's own prefix, which one of 31 or 32 bits does not have (RFC 3021).
fn is_broadcast(address: Ipv4Addr, tunnel: Ipv4Net) -> bool {
    address.is_broadcast()
        || address.is_unspecified()
        || (tunnel.prefix_len() < 31 && address == tunnel.broadcast())
}

/// Whether an IPv4 packet is a fragment other than the first.
fn is_later_fragment(packet: &[u8]) -> bool {
    be16(packet, 6) & 0x1fff != 0
}

/// Whether an IPv4 packet, the first fragment at least, is an ICMP error, or
/// is too short to tell.
fn is_icmpv4_error(packet: &[u8]) -> bool {
    if packet[9] != ICMPV4 {
        return false;
    }
    let message = packet.get(usize::from(packet[0] & 0x0f) * 4..);
    match message {
        Some(message) if message.len() >= ICMP_HEADER_BYTES => {
            // Destination unreachable, source quench, redirect, time exceeded,
            // parameter problem.
            matches!(message[0], 3 | 4 | 5 | 11 | 12)
        }
        _ => true,
    }
}

/// Whether what an IPv6 packet carries, behind its extension headers, is known
/// not to be an ICMPv6 error or redirect (RFC 4443, section 2.4 (e.1, e.2)).
fn may_answer_ipv6_payload(packet: &[u8]) -> bool {
    let mut next_header = packet[6];
    let mut rest = &packet[IPV6_HEADER_BYTES..];
    for _ in 0..=EXTENSION_HEADERS_MAX {
        // Lengths: RFC 8200, section 4; RFC 4302, section 2.2.
        let header_bytes = match (next_header, rest) {
            (ICMPV6, _) => {
                // Types under 128 are errors; 137 is the redirect.
                return rest.len() >= ICMPV6_MESSAGE_BYTES_MIN && rest[0] >= 128 && rest[0] != 137;
            }
            // Hop-by-hop options, routing, destination options, mobility,
            // host identity, shim6.
            (0 | 43 | 60 | 135 | 139 | 140, [_, units, ..]) => (usize::from(*units) + 1) * 8,
            // Authentication.
            (51, [_, words, ..]) => (usize::from(*words) + 2) * 4,
            // Fragment: only the first tells what follows.
            (44, [_, _, high, low, ..]) if u16::from_be_bytes([*high, *low]) & 0xfff8 == 0 => 8,
            (0 | 43 | 44 | 51 | 60 | 135 | 139 | 140, _) => return false,
            // Something else, or encrypted, or nothing.
            _ => return true,
        };
        let Some(behind) = rest.get(header_bytes..) else {
            return false;
        };
        next_header = rest[0];
        rest = behind;
    }
    false
}

#[cfg(test)]
#[path = "icmp_tests.rs"]
mod tests;
