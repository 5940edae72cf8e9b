//! What errors say is read by etherparse; whether there may be one is listed
//! case by case.

use etherparse::icmpv4::{DestUnreachableHeader, TimeExceededCode as TimeExceededV4};
use etherparse::icmpv6::{DestUnreachableCode, TimeExceededCode as TimeExceededV6};
use etherparse::{Icmpv4Type, Icmpv6Type, IpNumber, NetSlice, SlicedPacket, TransportSlice};
use proptest::prelude::*;

use super::super::oracle;
use super::super::test_support::*;
use super::*;

const PROBLEMS: [Problem; 3] = [
    Problem::NoRoute,
    Problem::TooBig { mtu_bytes: 1400 },
    Problem::TimeExceeded,
];

fn addresses() -> TunnelAddresses {
    TunnelAddresses {
        v4: Some("10.0.0.77/24".parse().unwrap()),
        v6: Some("fd00::77/64".parse().unwrap()),
        accept_local: true,
    }
}

fn version_of(packet: &[u8]) -> Version {
    super::super::ip::verify(packet).expect("not a packet")
}

fn about(problem: Problem, packet: &[u8]) -> Option<ErrorMessage> {
    ErrorMessage::about(problem, version_of(packet), packet, &addresses())
}

/// The error's bytes, written over bytes that show where nothing is written.
fn written(error: &ErrorMessage, offender: &[u8]) -> Vec<u8> {
    let mut out = [0xee; ERROR_BYTES_MAX];
    let bytes = error.write(offender, &mut out);
    assert!(out[bytes..].iter().all(|byte| *byte == 0xee));
    out[..bytes].to_vec()
}

/// The problems that may be reported about a packet.
fn reportable(packet: &[u8]) -> Vec<Problem> {
    let may = |problem: &Problem| about(*problem, packet).is_some();
    PROBLEMS.into_iter().filter(may).collect()
}

fn assert_reportable(packet: &[u8], what: &str) {
    assert_eq!(reportable(packet), PROBLEMS, "{what}: {packet:02x?}");
}

fn assert_silent(packet: &[u8], what: &str) {
    assert_eq!(reportable(packet), [], "{what}: {packet:02x?}");
}

/// Checks an error with etherparse and returns its quote.
fn check(problem: Problem, error: &[u8], offender: &[u8]) -> Vec<u8> {
    let sliced = SlicedPacket::from_ip(error).expect("etherparse");
    match (sliced.net.unwrap(), sliced.transport.unwrap()) {
        (NetSlice::Ipv4(ip), TransportSlice::Icmpv4(icmp)) => {
            let header = ip.header();
            assert_eq!(header.source(), [10, 0, 0, 77]);
            assert_eq!(header.destination(), offender[12..16]);
            assert_eq!(usize::from(header.total_len()), error.len());
            assert_eq!((header.ttl(), header.slice()[1]), (64, 0xc0));
            assert!(header.dont_fragment() && !ip.is_payload_fragmented());
            assert_eq!(
                header.header_checksum(),
                header.to_header().calc_header_checksum()
            );
            let expected = match problem {
                Problem::NoRoute => {
                    Icmpv4Type::DestinationUnreachable(DestUnreachableHeader::Network)
                }
                Problem::TooBig { mtu_bytes } => {
                    Icmpv4Type::DestinationUnreachable(DestUnreachableHeader::FragmentationNeeded {
                        next_hop_mtu: mtu_bytes as u16,
                    })
                }
                Problem::TimeExceeded => {
                    Icmpv4Type::TimeExceeded(TimeExceededV4::TtlExceededInTransit)
                }
            };
            assert_eq!(icmp.icmp_type(), expected);
            assert_eq!(icmp.checksum(), expected.calc_checksum(icmp.payload()));
            assert_eq!(error.len(), (28 + offender.len()).min(576));
            icmp.payload().to_vec()
        }
        (NetSlice::Ipv6(ip), TransportSlice::Icmpv6(icmp)) => {
            let header = ip.header();
            assert_eq!(
                header.source_addr(),
                "fd00::77".parse::<Ipv6Addr>().unwrap()
            );
            assert_eq!(header.destination(), offender[8..24]);
            assert_eq!(usize::from(header.payload_length()) + 40, error.len());
            assert_eq!((header.hop_limit(), header.traffic_class()), (64, 0xc0));
            assert_eq!(header.next_header(), IpNumber::IPV6_ICMP);
            let expected = match problem {
                Problem::NoRoute => {
                    Icmpv6Type::DestinationUnreachable(DestUnreachableCode::NoRoute)
                }
                Problem::TooBig { mtu_bytes } => Icmpv6Type::PacketTooBig { mtu: mtu_bytes },
                Problem::TimeExceeded => Icmpv6Type::TimeExceeded(TimeExceededV6::HopLimitExceeded),
            };
            assert_eq!(icmp.icmp_type(), expected);
            assert!(icmp.is_checksum_valid(header.source(), header.destination()));
            assert_eq!(error.len(), (48 + offender.len()).min(1280));
            icmp.payload().to_vec()
        }
        other => panic!("{other:?}"),
    }
}

prop_compose! {
    fn any_packet()(
        (v6, is_tcp, tos, ttl, id) in any::<(bool, bool, u8, u8, u16)>(),
        hosts in [1u8..255, 1u8..255],
        option_words in 0usize..=10,
        is_extended in any::<bool>(),
        payload in proptest::collection::vec(any::<u8>(), 0..2000),
    ) -> Packet {
        let packet = match is_tcp {
            true => Packet::tcp(v6, payload),
            false => Packet::udp(v6, payload),
        };
        packet.with(|packet| {
            packet.hosts = hosts;
            packet.tos = tos;
            packet.ttl = ttl;
            packet.id = id;
            packet.ip_options = vec![1; option_words * 4];
            if is_extended {
                packet.extensions = vec![(60, vec![0, 0, 1, 4, 0, 0, 0, 0])];
            }
        })
    }
}

fn any_problem() -> impl Strategy<Value = Problem> {
    prop_oneof![
        Just(Problem::NoRoute),
        (1280u32..=65535).prop_map(|mtu_bytes| Problem::TooBig { mtu_bytes }),
        Just(Problem::TimeExceeded),
    ]
}

proptest! {
    #[test]
    fn errors_are_whole_and_quote_the_offender(packet in any_packet(), problem in any_problem()) {
        let offender = packet.bytes();
        let error = about(problem, &offender).expect("silent");
        let bytes = written(&error, &offender);
        let quote = check(problem, &bytes, &offender);
        prop_assert_eq!(&offender[..quote.len()], &quote[..]);
        prop_assert_eq!(oracle::intact(&bytes), Ok(()));
        // No error about the error.
        prop_assert_eq!(reportable(&bytes), vec![]);
    }

    #[test]
    fn any_bytes_do_not_panic(mut bytes in proptest::collection::vec(any::<u8>(), 40..200), v6 in any::<bool>()) {
        let (first, at, len) = match v6 {
            true => (0x60, 4, bytes.len() - 40),
            false => (0x45 + bytes[0] % 6, 2, bytes.len()),
        };
        bytes[0] = first;
        bytes[at..at + 2].copy_from_slice(&(len as u16).to_be_bytes());
        for problem in PROBLEMS {
            if let Ok(version) = super::super::ip::verify(&bytes)
                && let Some(error) = ErrorMessage::about(problem, version, &bytes, &addresses())
            {
                written(&error, &bytes);
            }
        }
    }
}

#[test]
fn quotes_fill_what_every_host_takes() {
    for (v6, bytes_max) in [(false, 576), (true, 1280)] {
        let offender = Packet::udp(v6, payload(3000)).bytes();
        let error = about(Problem::NoRoute, &offender).unwrap();
        assert_eq!(written(&error, &offender).len(), bytes_max);
    }
}

#[test]
fn an_mtu_is_never_under_what_the_version_allows() {
    let reported = |v6: bool, mtu_bytes: u32| {
        let offender = Packet::udp(v6, vec![]).bytes();
        let bytes = written(
            &about(Problem::TooBig { mtu_bytes }, &offender).unwrap(),
            &offender,
        );
        let at = if v6 { 44 } else { 24 };
        u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap())
    };
    assert_eq!([reported(false, 0), reported(true, 0)], [68, 1280]);
    assert_eq!([reported(false, 67), reported(true, 1279)], [68, 1280]);
    assert_eq!([reported(false, 1472), reported(true, 1452)], [1472, 1452]);
    assert_eq!(
        [reported(false, 70_000), reported(true, 70_000)],
        [65535, 70_000]
    );
}

#[test]
fn none_without_an_address_of_the_version() {
    let [v4, v6] = [false, true].map(|v6| Packet::udp(v6, vec![]).bytes());
    let only_v4 = TunnelAddresses {
        v6: None,
        ..addresses()
    };
    let only_v6 = TunnelAddresses {
        v4: None,
        ..addresses()
    };
    let may = |packet: &[u8], addresses| {
        ErrorMessage::about(Problem::NoRoute, version_of(packet), packet, addresses).is_some()
    };
    assert!(may(&v4, &only_v4) && !may(&v6, &only_v4));
    assert!(may(&v6, &only_v6) && !may(&v4, &only_v6));
}

/// A kernel that takes nothing from its own addresses gets IPv4 errors from
/// the offender's destination; IPv6 knows no such check.
#[test]
fn without_accept_local_the_destination_reports() {
    let addresses = TunnelAddresses {
        accept_local: false,
        ..addresses()
    };
    let offender = Packet::udp(false, vec![]).bytes();
    let error = ErrorMessage::about(Problem::NoRoute, Version::V4, &offender, &addresses).unwrap();
    assert_eq!(error.destination(), IpAddr::from([10, 0, 0, 1]));
    let bytes = written(&error, &offender);
    assert_eq!(bytes[12..16], [10, 0, 0, 2]);
    assert_eq!(oracle::intact(&bytes), Ok(()));
    let offender = Packet::udp(true, vec![]).bytes();
    let error = ErrorMessage::about(Problem::NoRoute, Version::V6, &offender, &addresses).unwrap();
    let bytes = written(&error, &offender);
    assert_eq!(bytes[8..24], addresses.v6.unwrap().addr().octets());
}

fn v4_between(source: [u8; 4], destination: [u8; 4]) -> Vec<u8> {
    let mut packet = Packet::udp(false, payload(32)).bytes();
    packet[12..16].copy_from_slice(&source);
    packet[16..20].copy_from_slice(&destination);
    packet
}

#[test]
fn ipv4_ends_that_are_no_single_host_are_not_answered() {
    let host = [192, 168, 1, 2];
    for source in [
        [0, 0, 0, 0],
        [0, 1, 2, 3],
        [127, 0, 0, 1],
        [224, 0, 0, 1],
        [239, 1, 2, 3],
        [240, 0, 0, 1],
        [255, 255, 255, 255],
        [10, 0, 0, 255],
    ] {
        assert_silent(&v4_between(source, host), "source");
    }
    for destination in [
        [0, 0, 0, 0],
        [224, 0, 0, 1],
        [239, 255, 255, 255],
        [255, 255, 255, 255],
        [10, 0, 0, 255],
    ] {
        assert_silent(&v4_between(host, destination), "destination");
    }
    for other in [
        [10, 0, 0, 77],
        [10, 0, 1, 255],
        [126, 0, 0, 1],
        [223, 9, 9, 9],
    ] {
        assert_reportable(&v4_between(host, other), "destination");
        assert_reportable(&v4_between(other, host), "source");
    }
}

#[test]
fn prefixes_of_31_and_32_bits_have_no_broadcast() {
    for (prefix, expected) in [
        ("10.9.9.1/30", false),
        ("10.9.9.2/31", true),
        ("10.9.9.3/32", true),
    ] {
        let addresses = TunnelAddresses {
            v4: Some(prefix.parse().unwrap()),
            ..addresses()
        };
        let packet = v4_between([192, 168, 1, 2], [10, 9, 9, 3]);
        let error = ErrorMessage::about(Problem::NoRoute, Version::V4, &packet, &addresses);
        assert_eq!(error.is_some(), expected, "{prefix}");
    }
}

#[test]
fn ipv4_fragments_after_the_first_are_not_answered() {
    for (fragment, may) in [
        (0x0000, true),
        (0x4000, true),
        (0x2000, true),
        (0x0001, false),
        (0x2001, false),
        (0x1fff, false),
    ] {
        let packet = Packet::udp(false, payload(64)).with(|packet| packet.fragment = fragment);
        assert_eq!(
            reportable(&packet.bytes()).len() == 3,
            may,
            "{fragment:04x}"
        );
    }
}

#[test]
fn icmpv4_errors_are_not_answered() {
    for kind in 0..=255u8 {
        for options in [0, 40] {
            let packet = Packet::other(false, 1, [&[kind][..], &[0; 35]].concat())
                .with(|packet| packet.ip_options = vec![1; options])
                .bytes();
            let is_error = [3, 4, 5, 11, 12].contains(&kind);
            assert_eq!(reportable(&packet).is_empty(), is_error, "type {kind}");
        }
    }
    for bytes in 0..8 {
        let echo = Packet::other(false, 1, vec![8; bytes]).bytes();
        assert_silent(&echo, "too short to tell");
    }
    // The same bytes under another protocol are not ICMP.
    assert_reportable(&Packet::other(false, 6, vec![3; 3]).bytes(), "not ICMP");
}

fn v6_between(source: &str, destination: &str) -> Vec<u8> {
    let mut packet = Packet::udp(true, payload(32)).bytes();
    packet[8..24].copy_from_slice(&source.parse::<Ipv6Addr>().unwrap().octets());
    packet[24..40].copy_from_slice(&destination.parse::<Ipv6Addr>().unwrap().octets());
    packet
}

#[test]
fn ipv6_ends_that_are_no_single_host_are_not_answered() {
    for source in ["::", "::1", "ff02::1", "ff0e::1"] {
        assert_silent(&v6_between(source, "2001:db8::1"), source);
    }
    for other in ["2001:db8::2", "fe80::1", "fd00::77"] {
        assert_reportable(&v6_between(other, "2001:db8::1"), other);
        assert_reportable(&v6_between("2001:db8::1", other), other);
    }
}

#[test]
fn ipv6_multicast_only_hears_that_it_is_too_big() {
    for group in ["ff02::1", "ff0e::1234"] {
        let packet = v6_between("2001:db8::1", group);
        assert_eq!(reportable(&packet), [PROBLEMS[1]], "{group}");
    }
}

/// An extension header of the given type and bytes, whose length field says so.
fn extension(kind: u8, bytes: usize) -> (u8, Vec<u8>) {
    let mut header = vec![0; bytes];
    header[1] = match kind {
        44 => 0,
        51 => (bytes / 4 - 2) as u8,
        _ => (bytes / 8 - 1) as u8,
    };
    (kind, header)
}

#[test]
fn icmpv6_errors_are_found_behind_extension_headers() {
    let chains = [
        vec![],
        vec![extension(0, 8)],
        vec![extension(0, 16), extension(60, 8), extension(43, 24)],
        vec![extension(44, 8)],
        vec![extension(51, 12)],
        vec![extension(51, 24), extension(60, 2048)],
        vec![extension(135, 8), extension(139, 8), extension(140, 8)],
        vec![extension(60, 8); 8],
    ];
    for chain in chains {
        for kind in 0..=255u8 {
            let packet = Packet::other(true, 58, [&[kind][..], &[0; 35]].concat())
                .with(|packet| packet.extensions = chain.clone())
                .bytes();
            let may = kind >= 128 && kind != 137;
            assert_eq!(
                reportable(&packet).len(),
                if may { 3 } else { 0 },
                "type {kind} behind {chain:?}"
            );
        }
        let udp = Packet::udp(true, payload(20)).with(|packet| packet.extensions = chain);
        assert_reportable(&udp.bytes(), "UDP");
    }
}

#[test]
fn ipv6_packets_that_hide_what_they_carry_are_not_answered() {
    let echo = |extensions| {
        Packet::other(true, 58, vec![128; 36])
            .with(|packet| packet.extensions = extensions)
            .bytes()
    };
    assert_silent(&echo(vec![extension(60, 8); 9]), "nine headers");
    for offset in [0x0008u16, 0x0009, 0xfff8] {
        let mut later = extension(44, 8);
        later.1[2..4].copy_from_slice(&offset.to_be_bytes());
        assert_silent(&echo(vec![later]), "later fragment");
    }
    let mut first = extension(44, 8);
    first.1[3] = 1;
    assert_reportable(&echo(vec![first]), "first fragment, more to come");
    // A header that goes on behind the packet's end, and ones cut anywhere.
    let mut long = extension(60, 8);
    long.1[1] = 255;
    assert_silent(&echo(vec![long]), "header behind the end");
    for kind in [0, 43, 44, 51, 60, 135] {
        for bytes in 0..8 {
            let packet = Packet::other(true, kind, vec![0; bytes]).bytes();
            assert_silent(&packet, "cut header");
        }
    }
    for bytes in 0..4 {
        let echo = Packet::other(true, 58, vec![128; bytes]).bytes();
        assert_silent(&echo, "cut message");
    }
    // Encrypted, or nothing at all: no ICMPv6 message that could be an error.
    for protocol in [50, 59] {
        assert_reportable(&Packet::other(true, protocol, vec![]).bytes(), "no ICMPv6");
    }
}
