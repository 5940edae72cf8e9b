//! The IP header as far as a tunnel needs it (RFC 791, RFC 8200).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::{IPV4_HEADER_BYTES, IPV6_HEADER_BYTES, be16};

/// An IPv4 address that a dual-stack socket shows as `::ffff:a.b.c.d`, as
/// plain IPv4 again (RFC 4291, section 2.5.5.2).
pub fn canonical(address: SocketAddr) -> SocketAddr {
    match address {
        // Anything else keeps its scope: fe80::1%eth0.
        SocketAddr::V6(v6) => match v6.ip().to_ipv4_mapped() {
            Some(v4) => SocketAddr::new(v4.into(), v6.port()),
            None => address,
        },
        SocketAddr::V4(_) => address,
    }
}

/// IP version of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// RFC 791.
    V4,
    /// RFC 8200.
    V6,
}

/// Why bytes are not one whole IP packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Malformed {
    /// Fewer bytes than the header they claim to have, or none at all.
    Short,
    /// Neither version 4 nor version 6.
    Version,
    /// The length field in the header and the bytes at hand disagree, or the
    /// IPv4 header length is under 20.
    Length,
}

/// Checks that `bytes` are exactly one IP packet as far as its fixed header
/// tells. The header checksum is left to the kernel, which checks it anyway.
///
/// # Errors
/// The first thing found wrong.
#[inline]
pub fn verify(bytes: &[u8]) -> Result<Version, Malformed> {
    let Some(first) = bytes.first() else {
        return Err(Malformed::Short);
    };
    match first >> 4 {
        4 => {
            let header_bytes = usize::from(first & 0x0f) * 4;
            if bytes.len() < IPV4_HEADER_BYTES || bytes.len() < header_bytes {
                return Err(Malformed::Short);
            }
            if header_bytes < IPV4_HEADER_BYTES || usize::from(be16(bytes, 2)) != bytes.len() {
                return Err(Malformed::Length);
            }
            Ok(Version::V4)
        }
        6 => {
            if bytes.len() < IPV6_HEADER_BYTES {
                return Err(Malformed::Short);
            }
            // A jumbogram (RFC 2675) says 0 here and fits no UDP datagram.
            if usize::from(be16(bytes, 4)) + IPV6_HEADER_BYTES != bytes.len() {
                return Err(Malformed::Length);
            }
            Ok(Version::V6)
        }
        _ => Err(Malformed::Version),
    }
}

/// Length of the IP packet that `bytes` begin with, as its header tells; 0 if they hold
/// no header.
#[inline]
pub fn total_bytes(bytes: &[u8]) -> usize {
    match bytes.first().map(|first| first >> 4) {
        Some(4) if bytes.len() >= IPV4_HEADER_BYTES => be16(bytes, 2).into(),
        Some(6) if bytes.len() >= IPV6_HEADER_BYTES => {
            usize::from(be16(bytes, 4)) + IPV6_HEADER_BYTES
        }
        _ => 0,
    }
}

/// Destination address of a packet that [`verify`] passed.
#[inline]
pub fn destination(version: Version, packet: &[u8]) -> IpAddr {
    match version {
        Version::V4 => {
            let mut octets = [0; 4];
            octets.copy_from_slice(&packet[16..20]);
            IpAddr::V4(Ipv4Addr::from(octets))
        }
        Version::V6 => {
            let mut octets = [0; 16];
            octets.copy_from_slice(&packet[24..40]);
            IpAddr::V6(Ipv6Addr::from(octets))
        }
    }
}

/// Source address of a packet that [`verify`] passed.
#[inline]
pub fn source(version: Version, packet: &[u8]) -> IpAddr {
    match version {
        Version::V4 => {
            let mut octets = [0; 4];
            octets.copy_from_slice(&packet[12..16]);
            IpAddr::V4(Ipv4Addr::from(octets))
        }
        Version::V6 => {
            let mut octets = [0; 16];
            octets.copy_from_slice(&packet[8..24]);
            IpAddr::V6(Ipv6Addr::from(octets))
        }
    }
}

/// Whether two packets of one version that [`verify`] passed have the same
/// source address.
#[inline]
pub fn same_source(version: Version, one: &[u8], other: &[u8]) -> bool {
    match version {
        Version::V4 => one[12..16] == other[12..16],
        Version::V6 => one[8..24] == other[8..24],
    }
}

/// Whether routers may not cut a packet that [`verify`] passed: those of IPv6
/// never, those of IPv4 with the flag DF.
#[inline]
pub fn is_unfragmentable(version: Version, packet: &[u8]) -> bool {
    match version {
        Version::V4 => packet[6] & 0x40 != 0,
        Version::V6 => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn v4(len: u16) -> Vec<u8> {
        let mut packet = vec![0; usize::from(len)];
        packet[0] = 0x45;
        packet[2..4].copy_from_slice(&len.to_be_bytes());
        packet
    }

    #[test]
    fn takes_whole_packets_only() {
        assert_eq!(verify(&v4(20)), Ok(Version::V4));
        assert_eq!(verify(&v4(1472)), Ok(Version::V4));
        let mut v6 = vec![0; 48];
        v6[0] = 0x60;
        v6[5] = 8;
        assert_eq!(verify(&v6), Ok(Version::V6));
        assert_eq!(verify(&v6[..40]), Err(Malformed::Length));
        assert_eq!(verify(&v6[..39]), Err(Malformed::Short));
    }

    #[test]
    fn names_what_is_wrong() {
        assert_eq!(verify(&[]), Err(Malformed::Short));
        assert_eq!(verify(&[0x45; 19]), Err(Malformed::Short));
        for version in [0x05, 0x35, 0x55, 0x75, 0xf5] {
            assert_eq!(verify(&[version; 64]), Err(Malformed::Version));
        }
        let mut packet = v4(40);
        assert_eq!(verify(&packet[..39]), Err(Malformed::Length));
        packet.push(0);
        assert_eq!(verify(&packet), Err(Malformed::Length));
        let mut options_missing = v4(20);
        options_missing[0] = 0x4f;
        assert_eq!(verify(&options_missing), Err(Malformed::Short));
        let mut header_too_small = v4(20);
        header_too_small[0] = 0x44;
        assert_eq!(verify(&header_too_small), Err(Malformed::Length));
    }

    #[test]
    fn reads_addresses_and_the_flag_df() {
        let mut packet = v4(20);
        packet[12..16].copy_from_slice(&[10, 0, 0, 1]);
        packet[16..20].copy_from_slice(&[10, 0, 0, 2]);
        let text = |address: IpAddr| address.to_string();
        assert_eq!(text(source(Version::V4, &packet)), "10.0.0.1");
        assert_eq!(text(destination(Version::V4, &packet)), "10.0.0.2");
        assert!(!is_unfragmentable(Version::V4, &packet));
        let mut other = packet.clone();
        other[16..20].copy_from_slice(&[10, 9, 9, 9]);
        assert!(same_source(Version::V4, &packet, &other));
        other[15] ^= 1;
        assert!(!same_source(Version::V4, &packet, &other));
        packet[6] = 0x40;
        assert!(is_unfragmentable(Version::V4, &packet));
        let mut v6 = vec![0; 40];
        v6[23] = 1;
        v6[39] = 2;
        let mut other = v6.clone();
        other[39] ^= 1;
        assert!(same_source(Version::V6, &v6, &other));
        other[8] ^= 1;
        assert!(!same_source(Version::V6, &v6, &other));
        assert_eq!(text(source(Version::V6, &v6)), "::1");
        assert_eq!(text(destination(Version::V6, &v6)), "::2");
        assert!(is_unfragmentable(Version::V6, &v6));
    }

    proptest::proptest! {
        #[test]
        fn never_panics(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..100)) {
            if let Ok(version) = verify(&bytes) {
                destination(version, &bytes);
                source(version, &bytes);
                is_unfragmentable(version, &bytes);
            }
        }
    }
}
