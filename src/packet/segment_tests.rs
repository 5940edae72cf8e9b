//! Every packet that a vnet packet is cut into is compared with what
//! [`oracle`](super::super::oracle) makes of the vnet packet, and with the vnet packet's
//! fields as etherparse reads them.

use etherparse::{NetSlice, SlicedPacket, TransportSlice};
use proptest::collection::vec;
use proptest::prelude::*;

use super::super::batch::{BATCH_BYTES_MAX, Batch, Limits};
use super::super::ip;
use super::super::oracle;
use super::super::test_support::*;
use super::*;

/// All packets of a vnet packet.
fn cut(vnet_packet: &[u8]) -> Vec<Vec<u8>> {
    let segments = Segments::new(vnet_packet).expect("vnet packet refused");
    (0..segments.count())
        .map(|index| {
            // What is not written shows.
            let mut out = vec![0xee; segments.packet_bytes(index)];
            segments.write(index, &mut out);
            out
        })
        .collect()
}

/// Sequence number, flags and the whole header with options.
fn tcp_of(packet: &[u8]) -> (u32, u8, Vec<u8>) {
    let sliced = SlicedPacket::from_ip(packet).expect("etherparse");
    let Some(TransportSlice::Tcp(tcp)) = sliced.transport else {
        panic!("not TCP: {packet:02x?}");
    };
    let header = tcp.header_slice();
    (tcp.sequence_number(), header[13], header.to_vec())
}

fn payload_of(packet: &[u8]) -> Vec<u8> {
    match SlicedPacket::from_ip(packet).expect("etherparse").transport {
        Some(TransportSlice::Tcp(tcp)) => tcp.payload().to_vec(),
        Some(TransportSlice::Udp(udp)) => udp.payload().to_vec(),
        other => panic!("{other:?}"),
    }
}

/// Checksums as etherparse computes them.
fn assert_checksums(packet: &[u8]) {
    let sliced = SlicedPacket::from_ip(packet).expect("etherparse");
    match (sliced.net.unwrap(), sliced.transport.unwrap()) {
        (NetSlice::Ipv4(ip), transport) => {
            let header = ip.header().to_header();
            assert_eq!(header.header_checksum, header.calc_header_checksum());
            match transport {
                TransportSlice::Tcp(tcp) => assert_eq!(
                    tcp.checksum(),
                    nonzero(tcp.to_header().calc_checksum_ipv4(&header, tcp.payload()))
                ),
                TransportSlice::Udp(udp) => assert_eq!(
                    udp.checksum(),
                    nonzero(udp.to_header().calc_checksum_ipv4(&header, udp.payload()))
                ),
                other => panic!("{other:?}"),
            }
        }
        (NetSlice::Ipv6(ip), transport) => {
            let header = ip.header().to_header();
            match transport {
                TransportSlice::Tcp(tcp) => assert_eq!(
                    tcp.checksum(),
                    nonzero(tcp.to_header().calc_checksum_ipv6(&header, tcp.payload()))
                ),
                TransportSlice::Udp(udp) => assert_eq!(
                    udp.checksum(),
                    nonzero(udp.to_header().calc_checksum_ipv6(&header, udp.payload()))
                ),
                other => panic!("{other:?}"),
            }
        }
        other => panic!("{other:?}"),
    }
}

/// Zero is written as 0xffff, TCP or UDP; as a sum they are the same.
fn nonzero<E: std::fmt::Debug>(checksum: Result<u16, E>) -> u16 {
    match checksum.unwrap() {
        0 => 0xffff,
        checksum => checksum,
    }
}

fn options(bytes_max: usize) -> impl Strategy<Value = Vec<u8>> {
    (0..=bytes_max / 4).prop_flat_map(|words| vec(any::<u8>(), words * 4))
}

/// Hop-by-hop and destination options, with or without a routing header that
/// has the final destination.
fn extensions() -> impl Strategy<Value = Vec<(u8, Vec<u8>)>> {
    let options = |kind: u8| {
        (0usize..4, any::<u8>()).prop_map(move |(units, fill)| {
            let mut bytes = vec![fill; (units + 1) * 8];
            bytes[1] = units as u8;
            (kind, bytes)
        })
    };
    let routing = any::<[u8; 16]>().prop_map(|address| {
        let segment_routing = [0, 2, 4, 1, 0, 0, 0, 0];
        (43, [&segment_routing[..], &address].concat())
    });
    (
        proptest::option::weighted(0.3, options(0)),
        proptest::option::weighted(0.2, options(60)),
        proptest::option::weighted(0.2, routing),
    )
        .prop_map(|(a, b, c)| [a, b, c].into_iter().flatten().collect())
}

prop_compose! {
    fn any_packet(payload_bytes: std::ops::Range<usize>)(
        (v6, is_tcp, hosts, ports) in any::<(bool, bool, [u8; 2], [u16; 2])>(),
        (tos, ttl, flow_label, id) in any::<(u8, u8, u32, u16)>(),
        dont_fragment in any::<bool>(),
        ip_options in prop_oneof![3 => Just(vec![]), 1 => options(40)],
        extensions in extensions(),
        (sequence, acknowledgment, flags, window, urgent) in
            (prop_oneof![any::<u32>(), Just(u32::MAX - 1000)], any::<u32>(), any::<u8>(),
             any::<u16>(), any::<u16>()),
        reserved in 0u8..16,
        options in options(40),
        payload in vec(any::<u8>(), payload_bytes),
    ) -> Packet {
        let transport = if is_tcp {
            Layer4::Tcp(Tcp {
                ports, sequence, acknowledgment, reserved, flags, window, urgent, options,
            })
        } else {
            Layer4::Udp { ports }
        };
        Packet {
            v6, hosts, tos, ttl, flow_label, id,
            fragment: if dont_fragment { DF } else { 0 },
            ip_options, extensions, transport, payload,
        }
    }
}

/// A GSO packet and its segment size.
fn any_super() -> impl Strategy<Value = (Packet, u16)> {
    let sizes = prop_oneof![
        4 => (Just(1..4000usize), 20..1500u16),
        2 => (Just(1..60usize), 1..50u16),
        1 => (Just(40_000..65_300usize), 500..9000u16),
    ];
    sizes.prop_flat_map(|(payload_bytes, gso_bytes)| {
        let packet = any_packet(payload_bytes).prop_filter("longer than a packet", |packet| {
            packet.header_bytes() + packet.payload.len() <= PACKET_BYTES_MAX
        });
        (packet, Just(gso_bytes))
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    #[test]
    fn super_packets_are_cut_as_the_oracle_cuts_them((packet, gso_bytes) in any_super()) {
        let vnet_packet = packet.vnet_packet(gso_bytes);
        let segments = Segments::new(&vnet_packet).unwrap();
        prop_assert_eq!(segments.packet(), &vnet_packet[virtio::HEADER_BYTES..]);
        prop_assert_eq!(segments.version() == Version::V6, packet.v6);
        let packets = cut(&vnet_packet);
        prop_assert_eq!(&packets, &oracle::expand(&vnet_packet));
        for bytes in &packets {
            prop_assert_eq!(oracle::intact(bytes), Ok(()));
            prop_assert!(ip::verify(bytes).is_ok());
        }
    }

    /// The same in terms of what it means, read by etherparse.
    #[test]
    fn segments_carry_on_where_the_last_one_ended((mut packet, gso_bytes) in any_super()) {
        // Etherparse computes checksums for the header's destination.
        packet.extensions.retain(|(kind, _)| *kind != 43);
        // And without the reserved bits, but for the one that once was NS.
        if let Layer4::Tcp(tcp) = &mut packet.transport {
            tcp.reserved &= 1;
        }
        let packets = cut(&packet.vnet_packet(gso_bytes));
        let last = packets.len() - 1;
        prop_assert_eq!(packets.len(), packet.payload.len().div_ceil(gso_bytes.into()));
        let payloads: Vec<_> = packets.iter().map(|bytes| payload_of(bytes)).collect();
        prop_assert!(payloads[..last].iter().all(|part| part.len() == usize::from(gso_bytes)));
        prop_assert_eq!(payloads.concat(), packet.payload.clone());
        let alone = packet.bytes();
        for (index, bytes) in packets.iter().enumerate() {
            assert_checksums(bytes);
            let mut expected = alone[..packet.header_bytes()].to_vec();
            if packet.v6 {
                expected[4..6].copy_from_slice(&((bytes.len() - 40) as u16).to_be_bytes());
            } else {
                let id = packet.id.wrapping_add(index as u16);
                expected[2..4].copy_from_slice(&(bytes.len() as u16).to_be_bytes());
                expected[4..6].copy_from_slice(&id.to_be_bytes());
                expected[10..12].copy_from_slice(&bytes[10..12]);
            }
            let transport_at = oracle::view(bytes).transport_at;
            prop_assert_eq!(&bytes[..transport_at], &expected[..transport_at]);
            let Layer4::Tcp(tcp) = &packet.transport else { continue };
            let (sequence, flags, header) = tcp_of(bytes);
            let offset = index * usize::from(gso_bytes);
            prop_assert_eq!(sequence, tcp.sequence.wrapping_add(offset as u32));
            let mut dropped = 0;
            if index > 0 {
                dropped |= CWR;
            }
            if index < last {
                dropped |= PSH | FIN;
            }
            prop_assert_eq!(flags, tcp.flags & !dropped);
            prop_assert_eq!(&header[20..], &tcp.options[..]);
            prop_assert_eq!(&header[14..16], tcp.window.to_be_bytes());
        }
    }

    #[test]
    fn a_single_packet_gets_its_checksum(packet in any_packet(0..1500)) {
        let mut expected = packet.bytes();
        prop_assert_eq!(&cut(&packet.vnet_packet(0)), &[expected.clone()]);
        // And without an offload flag it stays as it is, right or wrong.
        expected[9] ^= 1;
        let vnet_packet = [&[0; virtio::HEADER_BYTES][..], &expected].concat();
        prop_assert_eq!(&cut(&vnet_packet), &[expected]);
    }

    /// Batches close and start again; what they carry are the packets in order.
    #[test]
    fn batches_carry_the_packets(
        supers in vec(any_super(), 1..6),
        segments_max in 1usize..130,
        segment_bytes_max in prop_oneof![Just(1472usize), Just(BATCH_BYTES_MAX)],
    ) {
        let limits = Limits { segments_max, segment_bytes_max };
        let mut expected = vec![];
        let mut carried = vec![];
        let mut batch = Batch::new(0);
        batch.start(1, limits);
        for (packet, gso_bytes) in supers {
            let vnet_packet = packet.vnet_packet(gso_bytes);
            expected.extend(oracle::expand(&vnet_packet));
            let segments = Segments::new(&vnet_packet).unwrap();
            for index in 0..segments.count() {
                let bytes = segments.packet_bytes(index);
                if bytes > BATCH_BYTES_MAX {
                    expected.remove(expected.len() - segments.count() + index);
                    continue;
                }
                if batch.reserve(bytes).map(|out| segments.write(index, out)).is_none() {
                    check_batch(&batch, limits)?;
                    carried.extend(batch.datagrams().map(<[u8]>::to_vec));
                    batch.start(1, limits);
                    segments.write(index, batch.reserve(bytes).unwrap());
                }
            }
        }
        check_batch(&batch, limits)?;
        carried.extend(batch.datagrams().map(<[u8]>::to_vec));
        prop_assert_eq!(carried, expected);
    }

    #[test]
    fn garbage_does_not_panic(vnet_packet in vec(any::<u8>(), 0..200)) {
        write_all(&vnet_packet);
    }

    /// Vnet packets that are right but for a few bytes, and get past the first check.
    #[test]
    fn damaged_vnet_packets_do_not_panic(
        (packet, gso_bytes) in any_super(),
        damage in vec((0usize..120, any::<u8>()), 0..6),
        cut_off in prop_oneof![3 => Just(0usize), 1 => 0usize..100],
    ) {
        let mut vnet_packet = packet.vnet_packet(gso_bytes);
        let bytes = vnet_packet.len();
        for (at, value) in damage {
            vnet_packet[at % bytes] = value;
        }
        vnet_packet.truncate(bytes - cut_off.min(bytes));
        write_all(&vnet_packet);
        // The same with lengths that let it pass.
        if vnet_packet.len() >= virtio::HEADER_BYTES + 40 {
            let packet_bytes = (vnet_packet.len() - virtio::HEADER_BYTES) as u16;
            vnet_packet[virtio::HEADER_BYTES] = 0x45;
            vnet_packet[12..14].copy_from_slice(&packet_bytes.to_be_bytes());
            write_all(&vnet_packet);
            vnet_packet[virtio::HEADER_BYTES] = 0x60;
            vnet_packet[14..16].copy_from_slice(&(packet_bytes - 40).to_be_bytes());
            write_all(&vnet_packet);
        }
    }
}

fn check_batch(batch: &Batch, limits: Limits) -> Result<(), TestCaseError> {
    let sizes: Vec<_> = batch.datagrams().map(<[u8]>::len).collect();
    prop_assert_eq!(sizes.len(), batch.count());
    prop_assert!(sizes.len() <= limits.segments_max);
    prop_assert!(batch.bytes().len() <= BATCH_BYTES_MAX);
    if let [rest @ .., last] = &sizes[..] {
        prop_assert!(rest.iter().all(|size| *size == batch.segment_bytes()));
        prop_assert!(*last <= batch.segment_bytes());
        prop_assert!(rest.is_empty() || *last <= limits.segment_bytes_max);
    }
    Ok(())
}

/// Whatever is accepted can be written and is a packet.
fn write_all(vnet_packet: &[u8]) {
    let Ok(segments) = Segments::new(vnet_packet) else {
        return;
    };
    let mut out = vec![];
    for index in 0..segments.count() {
        out.resize(segments.packet_bytes(index), 0);
        segments.write(index, &mut out);
        assert!(index == 0 || segments.packet_bytes(index) <= segments.packet_bytes(index - 1));
        if segments.count() > 1 {
            assert_eq!(ip::verify(&out), Ok(segments.version()));
        }
    }
}

#[test]
fn a_full_tcp_vnet_packet_is_45_packets() {
    for (v6, header_bytes, per_packet) in [(false, 52, 1448), (true, 72, 1428)] {
        let packet = Packet::tcp(v6, payload(44 * per_packet + 500))
            .with_tcp(|tcp| tcp.flags = ACK | PSH | FIN | CWR | ECE);
        let packets = cut(&packet.vnet_packet(per_packet as u16));
        assert_eq!(packets.len(), 45);
        let sizes: Vec<_> = packets.iter().map(Vec::len).collect();
        assert_eq!(sizes[..44], [header_bytes + per_packet; 44]);
        assert_eq!(sizes[44], header_bytes + 500);
        let flags: Vec<_> = packets.iter().map(|bytes| tcp_of(bytes).1).collect();
        assert_eq!(flags[0], ACK | CWR | ECE);
        assert_eq!(flags[1..44], [ACK | ECE; 43]);
        assert_eq!(flags[44], ACK | PSH | FIN | ECE);
    }
}

#[test]
fn identification_and_sequence_wrap() {
    let packet = Packet::tcp(false, payload(30))
        .with(|packet| packet.id = 0xffff)
        .with_tcp(|tcp| tcp.sequence = u32::MAX - 4);
    let packets = cut(&packet.vnet_packet(10));
    let ids: Vec<_> = packets.iter().map(|bytes| be16(bytes, 4)).collect();
    assert_eq!(ids, [0xffff, 0, 1]);
    let sequences: Vec<_> = packets.iter().map(|bytes| tcp_of(bytes).0).collect();
    assert_eq!(sequences, [u32::MAX - 4, 5, 15]);
}

/// A UDP checksum of zero would say that there is none (RFC 768).
#[test]
fn a_zero_checksum_is_written_as_ffff() {
    for v6 in [false, true] {
        // The last two bytes make up for all the rest.
        let mut packet = Packet::udp(v6, vec![0; 4]);
        let checksum = oracle::view(&packet.bytes()).transport_at + 6;
        let missing = packet.bytes()[checksum..checksum + 2].to_vec();
        packet.payload[2..].copy_from_slice(&missing);
        let packets = cut(&packet.vnet_packet(0));
        assert_eq!(packets[0][checksum..checksum + 2], [0xff, 0xff]);
        // As the second of two segments.
        let twice = Packet::udp(v6, [packet.payload.clone(), packet.payload].concat());
        let packets = cut(&twice.vnet_packet(4));
        assert_eq!(packets.len(), 2);
        for packet in packets {
            assert_eq!(packet[checksum..checksum + 2], [0xff, 0xff]);
        }
    }
}

/// With a routing header, the pseudo-header has the final destination
/// (RFC 8200, section 8.1), and the kernel left its sum in the checksum field.
#[test]
fn a_routing_header_tells_the_destination() {
    let routing = [&[0, 2, 4, 1, 0, 0, 0, 0][..], &[7; 16]].concat();
    let packet = Packet::tcp(true, payload(3000)).with(|p| p.extensions = vec![(43, routing)]);
    for bytes in cut(&packet.vnet_packet(1000)) {
        assert_eq!(oracle::intact(&bytes), Ok(()));
    }
}

#[test]
fn contradictions_are_refused() {
    let tcp = Packet::tcp(false, payload(100));
    let packet = tcp.vnet_packet(0)[virtio::HEADER_BYTES..].to_vec();
    let vnet_packet = |gso_type, gso_bytes, start, offset| {
        Segments::new(&virtio_vnet_packet(
            gso_type, gso_bytes, start, offset, &packet,
        ))
        .map(|_| ())
    };
    assert_eq!(vnet_packet(1, 50, 20, 16), Ok(()));
    assert_eq!(vnet_packet(0x81, 50, 20, 16), Ok(()), "with GSO_ECN");
    for (what, result) in [
        ("IPv6 type", vnet_packet(4, 50, 20, 16)),
        ("UFO", vnet_packet(3, 50, 20, 16)),
        ("unknown type", vnet_packet(9, 50, 20, 16)),
        ("no segment size", vnet_packet(1, 0, 20, 16)),
        ("transport in the IP header", vnet_packet(1, 50, 19, 16)),
        ("transport at the end", vnet_packet(1, 50, 133, 16)),
        ("transport behind the end", vnet_packet(1, 50, 60000, 16)),
        ("checksum behind the end", vnet_packet(0, 0, 151, 0)),
        (
            "checksum far behind the end",
            vnet_packet(0, 0, 65535, 65535),
        ),
        ("segments over 65535 bytes", vnet_packet(1, 65500, 20, 16)),
    ] {
        assert_eq!(result, Err(Invalid::Offload), "{what}");
    }
    let mut no_flag = virtio_vnet_packet(1, 50, 20, 16, &packet);
    no_flag[0] = 0;
    assert_eq!(Segments::new(&no_flag).err(), Some(Invalid::Offload));
    let mut header_only = Packet::tcp(false, vec![]).vnet_packet(50);
    assert_eq!(Segments::new(&header_only).err(), Some(Invalid::Offload));
    header_only.pop();
    let malformed = Invalid::Packet(Malformed::Length);
    assert_eq!(Segments::new(&header_only).err(), Some(malformed));
    assert_eq!(
        Segments::new(&header_only[..9]).err(),
        Some(Invalid::Header)
    );
    for data_offset in [0x40, 0xf0] {
        let mut vnet_packet = tcp.vnet_packet(50);
        vnet_packet[virtio::HEADER_BYTES + 32] = data_offset;
        vnet_packet.truncate(virtio::HEADER_BYTES + 60);
        vnet_packet[12..14].copy_from_slice(&60u16.to_be_bytes());
        assert_eq!(Segments::new(&vnet_packet).err(), Some(Invalid::Offload));
    }
}
