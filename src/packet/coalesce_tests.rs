//! What goes into the coalescer must come out, whatever it is: each output
//! vnet packet is cut up again by [`oracle`](super::super::oracle) and compared with
//! the packets that went in. A second set of tests says what must be merged.

use std::fmt::Debug;

use proptest::collection::vec;
use proptest::prelude::*;

use super::super::batch::{Batch, Limits};
use super::super::ip;
use super::super::oracle;
use super::super::segment::Segments;
use super::super::test_support::*;
use super::*;

const ALL: TunOffloads = TunOffloads {
    tcp: true,
    udp: true,
};
const NONE: TunOffloads = TunOffloads {
    tcp: false,
    udp: false,
};

/// Gives out vnet packets that still hold other bytes, as recycled ones do.
struct Sink {
    vnet_packets_left: usize,
    vnet_packets: Vec<Vec<u8>>,
}

impl VnetSink for Sink {
    fn take_vnet_packet(&mut self) -> Option<VnetPacket> {
        self.vnet_packets_left = self.vnet_packets_left.checked_sub(1)?;
        let mut vnet_packet = VnetPacket::new(0);
        vnet_packet.bytes[..200].fill(0xee);
        Some(vnet_packet)
    }

    fn write(&mut self, vnet_packet: VnetPacket) {
        self.vnet_packets.push(vnet_packet.bytes().to_vec());
    }
}

/// What comes out, with a flush wherever `flush_after` says so.
fn coalesce_into(
    vnet_packets_max: usize,
    offloads: TunOffloads,
    packets: &[Vec<u8>],
    flush_after: impl Fn(usize) -> bool,
) -> Vec<Vec<u8>> {
    let mut sink = Sink {
        vnet_packets_left: vnet_packets_max,
        vnet_packets: vec![],
    };
    let mut coalescer = Coalescer::new(offloads);
    for (index, packet) in packets.iter().enumerate() {
        let version = ip::verify(packet).expect("no packet");
        coalescer.push(version, packet, &mut sink);
        if flush_after(index) {
            coalescer.flush(&mut sink);
        }
    }
    coalescer.flush(&mut sink);
    sink.vnet_packets
}

fn coalesce(packets: &[Vec<u8>]) -> Vec<Vec<u8>> {
    coalesce_into(usize::MAX, ALL, packets, |_| false)
}

/// How many packets each vnet packet holds, having checked that they are the ones
/// that went in.
#[track_caller]
fn merged(packets: &[Vec<u8>]) -> Vec<usize> {
    let vnet_packets = coalesce(packets);
    if let Err(why) = oracle::same_traffic(packets, &vnet_packets, false) {
        panic!("{why}");
    }
    vnet_packets
        .iter()
        .map(|f| oracle::expand(f).len())
        .collect()
}

// Arbitrary traffic.

/// One sender's side of a flow.
struct Sender {
    next: Packet,
    /// How the IPv4 identification goes on: by this much per packet.
    id_step: u16,
    payload_bytes: usize,
}

/// Flows that share addresses, ports, both or neither.
fn senders() -> Vec<Sender> {
    let sender = |next: Packet, id_step, payload_bytes| Sender {
        next,
        id_step,
        payload_bytes,
    };
    let elsewhere = |p: &mut Packet| p.hosts = [3, 4];
    let back = |p: &mut Packet| p.hosts = [2, 1];
    let same_ports = |p: &mut Packet| {
        p.transport = Layer4::Udp {
            ports: [40000, 443],
        };
    };
    vec![
        sender(Packet::tcp(false, vec![]), 1, 33),
        sender(Packet::udp(false, vec![]), 1, 20),
        sender(
            Packet::tcp(false, vec![]).with_tcp(|tcp| tcp.ports[0] = 40001),
            0,
            10,
        ),
        sender(Packet::tcp(true, vec![]), 0, 33),
        sender(Packet::udp(true, vec![]), 0, 7),
        sender(Packet::udp(false, vec![]).with(same_ports), 0, 33),
        sender(Packet::tcp(false, vec![]).with(back), 1, 32),
        sender(
            Packet::tcp(false, vec![])
                .with(elsewhere)
                .with(|p| p.fragment = 0)
                .with_tcp(|tcp| {
                    tcp.options.clear();
                    tcp.sequence = u32::MAX - 100;
                }),
            1,
            64,
        ),
        sender(
            Packet::udp(false, vec![])
                .with(elsewhere)
                .with(|p| p.fragment = 0),
            0,
            1,
        ),
        sender(Packet::tcp(true, vec![]).with(elsewhere), 0, 5),
    ]
}

/// What is odd about a packet. `u16`s choose a variant of it.
#[derive(Clone, Copy, Debug)]
enum Odd {
    Nothing,
    Flags(u8),
    Push,
    Reserved(u8),
    Sequence(u16),
    Duplicate,
    Acknowledgment,
    Window,
    Urgent,
    OptionValue,
    OptionsLonger,
    Tos,
    Ttl,
    FragmentBits(u16),
    Identification(u16),
    FlowLabel,
    IpChecksum,
    TransportChecksum,
    ZeroUdpChecksum,
    FlippedChecksumZero,
    Payload(u16),
    IpOptions,
    Extension(u16),
    Icmp,
    Protocol(u8),
    CutTransport(u16),
    UdpLength(u16),
    DataOffset(u8),
    PaddedUdp,
}

fn odd() -> impl Strategy<Value = Odd> {
    let ordinary = prop_oneof![
        12 => Just(Odd::Nothing),
        1 => Just(Odd::Push),
        1 => (0u16..80).prop_map(Odd::Payload),
    ];
    let tcp = prop_oneof![
        any::<u8>().prop_map(Odd::Flags),
        (0u32..8).prop_map(|bit| Odd::Flags(ACK ^ (1 << bit))),
        (1u8..16).prop_map(Odd::Reserved),
        any::<u16>().prop_map(Odd::Sequence),
        Just(Odd::Duplicate),
        Just(Odd::Acknowledgment),
        Just(Odd::Window),
        Just(Odd::Urgent),
        Just(Odd::OptionValue),
        Just(Odd::OptionsLonger),
        any::<u8>().prop_map(Odd::DataOffset),
    ];
    let ip = prop_oneof![
        Just(Odd::Tos),
        Just(Odd::Ttl),
        prop_oneof![
            Just(0),
            Just(0x4000),
            Just(0x2000),
            Just(0x8000),
            any::<u16>()
        ]
        .prop_map(Odd::FragmentBits),
        (0u16..6).prop_map(Odd::Identification),
        Just(Odd::FlowLabel),
        Just(Odd::IpOptions),
        (0u16..4).prop_map(Odd::Extension),
        Just(Odd::Icmp),
        any::<u8>().prop_map(Odd::Protocol),
        (0u16..30).prop_map(Odd::CutTransport),
    ];
    let checksums = prop_oneof![
        Just(Odd::IpChecksum),
        Just(Odd::TransportChecksum),
        Just(Odd::ZeroUdpChecksum),
        Just(Odd::FlippedChecksumZero),
        (0u16..40).prop_map(Odd::UdpLength),
        Just(Odd::PaddedUdp),
    ];
    prop_oneof![9 => ordinary, 1 => tcp, 1 => ip, 1 => checksums]
}

impl Sender {
    /// The next packet; with `stay`, later ones are like it where that can be.
    fn send(&mut self, odd: Odd, stay: bool) -> Vec<u8> {
        let mut packet = self.next.clone();
        packet.payload = payload(self.payload_bytes);
        packet.payload[0] = packet.id as u8;
        let is_tcp = matches!(packet.transport, Layer4::Tcp(_));
        if is_tcp {
            change_tcp(packet.tcp_mut(), odd);
        }
        match odd {
            Odd::Tos => packet.tos ^= 1,
            Odd::Ttl => packet.ttl -= 1,
            Odd::FragmentBits(bits) => packet.fragment = bits,
            Odd::Identification(step) => packet.id = packet.id.wrapping_add(step).wrapping_sub(3),
            Odd::FlowLabel => packet.flow_label ^= 1,
            Odd::Payload(bytes) => packet.payload.resize(bytes.into(), 9),
            Odd::IpOptions => packet.ip_options = vec![1; 4],
            Odd::Extension(kind) => {
                let kind = [0, 60, 43, 44][usize::from(kind)];
                packet.extensions = vec![(kind, vec![0; 8])];
            }
            Odd::Icmp => {
                let protocol = if packet.v6 { 58 } else { 1 };
                packet.transport = Layer4::Other { protocol };
            }
            Odd::Protocol(protocol) => packet.transport = Layer4::Other { protocol },
            _ => {}
        }
        if stay {
            let Packet { payload, .. } = std::mem::replace(&mut self.next, packet.clone());
            self.next.payload = payload;
            self.next.fragment &= DF;
            self.next.ip_options.clear();
            self.next.extensions.clear();
            if matches!(packet.transport, Layer4::Other { .. }) {
                self.next.transport = senders()[0].next.transport.clone();
            }
        }
        self.next.id = packet.id.wrapping_add(self.id_step);
        if let Layer4::Tcp(tcp) = &packet.transport {
            let advanced = tcp.sequence.wrapping_add(packet.payload.len() as u32);
            if !matches!(odd, Odd::Sequence(_)) || stay {
                self.next.tcp_mut().sequence = advanced;
            }
        }
        spoil(packet.bytes(), odd)
    }
}

fn change_tcp(tcp: &mut Tcp, odd: Odd) {
    match odd {
        Odd::Flags(flags) => tcp.flags = flags,
        Odd::Push => tcp.flags |= PSH,
        Odd::Reserved(bits) => tcp.reserved = bits,
        Odd::Sequence(jump) => tcp.sequence = tcp.sequence.wrapping_add(jump.into()),
        Odd::Duplicate => tcp.sequence = tcp.sequence.wrapping_sub(33),
        Odd::Acknowledgment => tcp.acknowledgment += 1,
        Odd::Window => tcp.window += 1,
        Odd::Urgent => tcp.urgent += 1,
        Odd::OptionValue => {
            if let Some(byte) = tcp.options.last_mut() {
                *byte = byte.wrapping_add(1);
            }
        }
        Odd::OptionsLonger if tcp.options.len() < 36 => tcp.options.extend([1; 4]),
        _ => {}
    }
}

/// What no sender does, done to the bytes.
fn spoil(mut bytes: Vec<u8>, odd: Odd) -> Vec<u8> {
    let view = oracle::view(&bytes);
    let at = view.transport_at;
    let is_whole = matches!(view.protocol, 6 | 17) && !view.fragment && !view.decorated;
    let checksum = at + oracle::checksum_offset(view.protocol);
    let last = bytes.len() - 1;
    match odd {
        Odd::IpChecksum if !view.v6 => bytes[10] ^= 0x40,
        Odd::TransportChecksum => bytes[last] ^= 0x10,
        Odd::ZeroUdpChecksum if view.protocol == 17 && is_whole => {
            bytes[checksum..checksum + 2].fill(0);
        }
        // Adds up to the same, but says "none" in UDP.
        Odd::FlippedChecksumZero if is_whole && bytes.len() >= checksum + 4 => {
            let even = (last - at) & !1;
            if at + even > checksum + 2 && even > 8 {
                let sum = [bytes[checksum], bytes[checksum + 1]];
                let word = u16::from_be_bytes([bytes[at + even - 2], bytes[at + even - 1]]);
                let moved = u32::from(word) + u32::from(u16::from_be_bytes(sum));
                let moved = (moved & 0xffff) + (moved >> 16);
                let payload_at = if view.protocol == 17 { 8 } else { 32 };
                if even - 2 >= payload_at {
                    bytes[at + even - 2..at + even].copy_from_slice(&(moved as u16).to_be_bytes());
                    bytes[checksum..checksum + 2].fill(0);
                }
            }
        }
        Odd::CutTransport(keep) => {
            bytes.truncate(at + usize::from(keep));
            set_length(&mut bytes);
        }
        Odd::UdpLength(length) if view.protocol == 17 && is_whole => {
            bytes[at + 4..at + 6].copy_from_slice(&length.to_be_bytes());
            oracle::fill_transport_checksum(&mut bytes);
        }
        // The IP packet goes on behind the datagram.
        Odd::PaddedUdp if is_whole => {
            bytes.extend([0; 3]);
            set_length(&mut bytes);
            oracle::fill_transport_checksum(&mut bytes);
        }
        Odd::DataOffset(value) if view.protocol == 6 && is_whole => {
            bytes[at + 12] = value;
            oracle::fill_transport_checksum(&mut bytes);
        }
        _ => {}
    }
    bytes
}

fn set_length(bytes: &mut [u8]) {
    let len = bytes.len() as u16;
    if bytes[0] >> 4 == 4 {
        bytes[2..4].copy_from_slice(&len.to_be_bytes());
        oracle::fill_ip_checksum(bytes);
    } else {
        bytes[4..6].copy_from_slice(&(len - 40).to_be_bytes());
    }
}

/// Packets of up to `flows` flows, in bursts and interleaved.
fn traffic() -> impl Strategy<Value = Vec<Vec<u8>>> {
    let flows = prop_oneof![Just(1usize), Just(2), Just(10)];
    (
        flows,
        0usize..10,
        vec((0usize..10, odd(), any::<bool>()), 1..60),
    )
        .prop_map(|(flows, first, steps)| {
            let mut senders = senders();
            let count = senders.len();
            steps
                .into_iter()
                .map(|(flow, odd, stay)| senders[(first + flow % flows) % count].send(odd, stay))
                .collect()
        })
}

fn check<E: Debug>(result: Result<(), E>) -> Result<(), TestCaseError> {
    result.map_err(|why| TestCaseError::fail(format!("{why:?}")))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]

    #[test]
    fn a_receiver_sees_no_difference(packets in traffic()) {
        check(oracle::same_traffic(&packets, &coalesce(&packets), false))?;
    }

    #[test]
    fn nor_with_one_kind_of_offload_and_flushes(
        packets in traffic(), tcp in any::<bool>(), every in 1usize..20,
    ) {
        let offloads = TunOffloads { tcp, udp: !tcp };
        let vnet_packets = coalesce_into(usize::MAX, offloads, &packets, |index| index % every == 0);
        check(oracle::same_traffic(&packets, &vnet_packets, false))?;
        let unwanted = if tcp { virtio::GSO_UDP_L4 } else { virtio::GSO_TCPV4 };
        prop_assert!(vnet_packets.iter().all(|vnet_packet| vnet_packet[1] != unwanted));
        prop_assert!(tcp || vnet_packets.iter().all(|vnet_packet| vnet_packet[1] != virtio::GSO_TCPV6));
    }

    #[test]
    fn a_starved_sink_loses_packets_but_keeps_order(packets in traffic(), vnet_packets_max in 0usize..20) {
        let vnet_packets = coalesce_into(vnet_packets_max, ALL, &packets, |_| false);
        prop_assert!(vnet_packets.len() <= vnet_packets_max);
        check(oracle::same_traffic(&packets, &vnet_packets, true))?;
    }

    #[test]
    fn without_offloads_packets_pass_in_order(packets in traffic()) {
        let vnet_packets = coalesce_into(usize::MAX, NONE, &packets, |_| false);
        let expected: Vec<_> =
            packets.iter().map(|packet| [&[0; virtio::HEADER_BYTES][..], packet].concat()).collect();
        prop_assert_eq!(vnet_packets, expected);
    }

    /// Bytes that are IP packets only as far as `ip::verify` looks.
    #[test]
    fn garbage_passes(packets in vec(vec(any::<u8>(), 40..120), 1..20), protocols in any::<u32>()) {
        let mut packets = packets;
        for (index, packet) in packets.iter_mut().enumerate() {
            let protocol = if protocols >> index & 1 == 0 { 6 } else { 17 };
            if protocols >> (index + 8) & 1 == 0 {
                packet[0] = 0x45;
                packet[6] &= 0x40;
                packet[7] = 0;
                packet[9] = protocol;
                packet[12..20].fill(1);
            } else {
                packet[0] = 0x60;
                packet[6] = protocol;
                packet[8..40].fill(1);
            }
            set_length(packet);
        }
        check(oracle::same_traffic(&packets, &coalesce(&packets), false))?;
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    /// Near the limits of a vnet packet: long packets, and many of them.
    #[test]
    fn long_runs_stay_within_a_vnet_packet(
        v6 in any::<bool>(), tcp in any::<bool>(), payload_bytes in 900usize..20_000,
        total_bytes in 60_000usize..140_000, id_step in 0u16..2,
    ) {
        let packet = if tcp { Packet::tcp(v6, vec![]) } else { Packet::udp(v6, vec![]) };
        let mut sender = Sender { next: packet, id_step, payload_bytes };
        let packets: Vec<_> = (0..total_bytes / payload_bytes)
            .map(|_| sender.send(Odd::Nothing, false))
            .collect();
        let vnet_packets = coalesce(&packets);
        check(oracle::same_traffic(&packets, &vnet_packets, false))?;
        // As few vnet packets as there can be.
        let per_read = (PACKET_BYTES_MAX + payload_bytes - packets[0].len()) / payload_bytes;
        let per_read = if tcp { per_read } else { per_read.min(UDP_SEGMENTS_MAX) };
        prop_assert_eq!(vnet_packets.len(), packets.len().div_ceil(per_read));
    }

    /// Out one side of the tunnel in a batch, in at the other, and out again.
    /// (A vnet packet is closed when another full segment would not fit, so this
    /// keeps away from the limit, where a short last one would come alone.)
    #[test]
    fn what_is_cut_merges_into_the_same_vnet_packet(
        v6 in any::<bool>(), tcp in any::<bool>(),
        payload_bytes in 1usize..56_000, gso_bytes in 1000u16..9000, push in any::<bool>(),
    ) {
        let bytes = payload(payload_bytes);
        let packet = if tcp { Packet::tcp(v6, bytes) } else { Packet::udp(v6, bytes) };
        let packet = packet.with(|p| if tcp && push { p.tcp_mut().flags |= PSH });
        let vnet_packet = packet.vnet_packet(gso_bytes);
        let segments = Segments::new(&vnet_packet).unwrap();
        let mut batch = Batch::new(0);
        batch.start(0, Limits::FULL);
        for index in 0..segments.count() {
            let out = batch.reserve(segments.packet_bytes(index)).expect("fits");
            segments.write(index, out);
        }
        let packets: Vec<_> = batch.datagrams().map(<[u8]>::to_vec).collect();
        let vnet_packets = coalesce(&packets);
        prop_assert_eq!(vnet_packets.len(), 1);
        prop_assert_eq!(oracle::expand(&vnet_packets[0]), packets);
        if segments.count() > 1 {
            // The header's length is right now; all else is as the kernel gave it.
            prop_assert_eq!(&vnet_packets[0][..2], &vnet_packet[..2]);
            prop_assert_eq!(&vnet_packets[0][4..], &vnet_packet[4..]);
        }
    }
}

// What is merged, and what is not.

fn tcp_run(count: usize, payload_bytes: usize) -> Vec<Packet> {
    run(Packet::tcp(false, vec![]), count, payload_bytes)
}

fn udp_run(count: usize, payload_bytes: usize) -> Vec<Packet> {
    run(Packet::udp(false, vec![]), count, payload_bytes)
}

/// `count` packets in a row.
fn run(template: Packet, count: usize, payload_bytes: usize) -> Vec<Packet> {
    (0..count)
        .map(|index| {
            let mut packet = template.clone();
            packet.payload = payload(payload_bytes);
            packet.id = packet.id.wrapping_add(index as u16);
            if let Layer4::Tcp(tcp) = &mut packet.transport {
                let offset = (index * payload_bytes) as u32;
                tcp.sequence = tcp.sequence.wrapping_add(offset);
            }
            packet
        })
        .collect()
}

fn bytes(packets: &[Packet]) -> Vec<Vec<u8>> {
    packets.iter().map(Packet::bytes).collect()
}

#[test]
fn a_run_of_one_flow_is_one_vnet_packet() {
    for v6 in [false, true] {
        let tcp = run(Packet::tcp(v6, vec![]), 45, 1420);
        assert_eq!(merged(&bytes(&tcp)), [45]);
        let udp = run(Packet::udp(v6, vec![]), 64, 1000);
        assert_eq!(merged(&bytes(&udp)), [64]);
        let udp = run(Packet::udp(v6, vec![]), 130, 100);
        assert_eq!(merged(&bytes(&udp)), [64, 64, 2]);
    }
    // Small TCP packets have no limit but the bytes.
    assert_eq!(merged(&bytes(&tcp_run(300, 100))), [300]);
    // 52 + 46 * 1420 = 65372 is the most that fits 65535.
    assert_eq!(merged(&bytes(&tcp_run(100, 1420))), [46, 46, 8]);
    // To the last byte: 40 + 5 * 13099 = 65535.
    for (payload_bytes, expected) in [(13099, [5, 5]), (13100, [4, 4])] {
        let template = Packet::tcp(false, vec![]).with_tcp(|tcp| tcp.options.clear());
        let packets = bytes(&run(template, 10, payload_bytes));
        assert_eq!(merged(&packets)[..2], expected);
        let longest = coalesce(&packets)[0].len() - virtio::HEADER_BYTES;
        assert_eq!(longest == PACKET_BYTES_MAX, payload_bytes == 13099);
    }
}

#[test]
fn interleaved_flows_merge_up_to_the_limit() {
    let interleaved = |flows: usize| -> Vec<Vec<u8>> {
        (0..5 * flows)
            .map(|index| {
                let (round, flow) = (index / flows, index % flows);
                let mut packet = tcp_run(5, 100).swap_remove(round);
                packet.tcp_mut().ports[0] += flow as u16;
                packet.bytes()
            })
            .collect()
    };
    assert_eq!(merged(&interleaved(FLOWS_MAX)), [5; FLOWS_MAX]);
    // One more, and each makes the one that comes next leave.
    assert_eq!(merged(&interleaved(FLOWS_MAX + 1)).len(), 85);
}

#[test]
fn push_and_a_shorter_packet_close() {
    let mut packets = tcp_run(6, 100);
    packets[2].tcp_mut().flags |= PSH;
    assert_eq!(merged(&bytes(&packets)), [3, 3]);
    let vnet_packets = coalesce(&bytes(&packets));
    let flags = |vnet_packet: &[u8]| vnet_packet[virtio::HEADER_BYTES + 33];
    assert_eq!(
        [flags(&vnet_packets[0]), flags(&vnet_packets[1])],
        [ACK | PSH, ACK]
    );

    packets[0].tcp_mut().flags |= PSH;
    assert_eq!(merged(&bytes(&packets)), [1, 2, 3]);

    let mut packets = udp_run(6, 100);
    packets[2].payload.truncate(99);
    assert_eq!(merged(&bytes(&packets)), [3, 3]);
    packets[4].payload.push(7);
    assert_eq!(merged(&bytes(&packets)), [3, 1, 2]);

    // A shorter packet first: the longer one starts anew.
    let mut packets = tcp_run(3, 100);
    packets[0].payload.truncate(60);
    for packet in &mut packets[1..] {
        packet.tcp_mut().sequence -= 40;
    }
    assert_eq!(merged(&bytes(&packets)), [1, 2]);
}

#[test]
fn identification_counts_or_stands_still() {
    let ids = |fragment: u16, ids: [u16; 5]| {
        let mut packets = udp_run(5, 100);
        for (packet, id) in packets.iter_mut().zip(ids) {
            packet.id = id;
            packet.fragment = fragment;
        }
        merged(&bytes(&packets))
    };
    assert_eq!(ids(0, [0xfffe, 0xffff, 0, 1, 2]), [5]);
    assert_eq!(ids(DF, [5, 6, 7, 8, 9]), [5]);
    assert_eq!(ids(DF, [7; 5]), [5]);
    assert_eq!(ids(0, [7; 5]), [1; 5]);
    assert_eq!(ids(DF, [7, 7, 8, 9, 10]), [2, 3]);
    assert_eq!(ids(DF, [7, 8, 8, 8, 8]), [2, 3]);
    assert_eq!(ids(DF, [7, 7, 9, 9, 9]), [2, 3]);
    assert_eq!(ids(DF, [7, 8, 7, 8, 9]), [2, 3]);
    assert_eq!(ids(DF, [9, 8, 7, 6, 5]), [1; 5]);
}

/// A change to one of the packets of a run.
type Change = fn(&mut Packet);

/// The third of five differs: it stands alone, or what follows it does not
/// carry on from it. Nobody overtakes anybody, as `merged` makes sure.
#[test]
fn any_difference_ends_a_vnet_packet() {
    let both: [(&str, Change); 4] = [
        ("type of service", |p| p.tos = 3),
        ("TTL", |p| p.ttl -= 1),
        ("don't fragment", |p| p.fragment = 0),
        ("identification", |p| p.id += 7),
    ];
    let tcp: [(&str, Change); 13] = [
        ("FIN", |p| p.tcp_mut().flags |= FIN),
        ("SYN", |p| p.tcp_mut().flags |= SYN),
        ("RST", |p| p.tcp_mut().flags |= RST),
        ("URG", |p| p.tcp_mut().flags |= URG),
        ("ECE", |p| p.tcp_mut().flags |= ECE),
        ("CWR", |p| p.tcp_mut().flags |= CWR),
        ("no ACK", |p| p.tcp_mut().flags = 0),
        ("reserved bit", |p| p.tcp_mut().reserved = 1),
        ("acknowledgment", |p| p.tcp_mut().acknowledgment += 1),
        ("window", |p| p.tcp_mut().window += 1),
        ("urgent pointer", |p| p.tcp_mut().urgent += 1),
        ("sequence", |p| p.tcp_mut().sequence += 1),
        ("timestamp", |p| p.tcp_mut().options[7] += 1),
    ];
    for (what, change) in both.iter().chain(&tcp) {
        let mut packets = tcp_run(5, 100);
        change(&mut packets[2]);
        assert_eq!(merged(&bytes(&packets)), [2, 1, 2], "{what}");
    }
    // A whole packet that is shorter than the headers before it.
    let mut packets = tcp_run(3, 100);
    packets[2].tcp_mut().options.clear();
    packets[2].payload.truncate(1);
    assert_eq!(merged(&bytes(&packets)), [2, 1]);
    for (what, change) in both {
        let mut packets = udp_run(5, 100);
        change(&mut packets[2]);
        assert_eq!(merged(&bytes(&packets)), [2, 1, 2], "{what}");
    }
    let v6: [(&str, Change); 3] = [
        ("traffic class", |p| p.tos = 3),
        ("flow label", |p| p.flow_label = 1),
        ("hop limit", |p| p.ttl -= 1),
    ];
    for (what, change) in v6 {
        let mut packets = run(Packet::tcp(true, vec![]), 5, 100);
        change(&mut packets[2]);
        assert_eq!(merged(&bytes(&packets)), [2, 1, 2], "{what}");
    }
}

/// What must not be merged at all, even when every packet is like that.
#[test]
fn what_is_not_plain_data_passes() {
    let none: [(&str, Change); 11] = [
        ("IP options", |p| p.ip_options = vec![1; 4]),
        ("reserved bit", |p| p.fragment = 0x8000),
        ("first fragment", |p| p.fragment = 0x2000),
        ("later fragment", |p| p.fragment = 0x0010),
        ("FIN", |p| p.tcp_mut().flags |= FIN),
        ("URG", |p| p.tcp_mut().flags |= URG),
        ("ECE", |p| p.tcp_mut().flags |= ECE),
        ("CWR", |p| p.tcp_mut().flags |= CWR),
        ("reserved bit", |p| p.tcp_mut().reserved = 1),
        ("no payload", |p| p.payload.clear()),
        ("ESP", |p| p.transport = Layer4::Other { protocol: 50 }),
    ];
    for (what, change) in none {
        let mut packets = tcp_run(3, 100);
        packets.iter_mut().for_each(change);
        assert_eq!(merged(&bytes(&packets)), [1, 1, 1], "{what}");
    }
    for kind in [0, 43, 44, 60] {
        let mut packets = run(Packet::tcp(true, vec![]), 3, 100);
        for packet in &mut packets {
            packet.extensions = vec![(kind, vec![0; 8])];
        }
        assert_eq!(merged(&bytes(&packets)), [1, 1, 1], "extension {kind}");
    }
    let mut no_checksum = bytes(&udp_run(3, 100));
    for packet in &mut no_checksum {
        packet[26..28].fill(0);
    }
    assert_eq!(merged(&no_checksum), [1, 1, 1]);
    // Data offsets that reach back into the TCP header.
    for words in 0..5 {
        let template = Packet::tcp(false, vec![]).with_tcp(|tcp| tcp.options.clear());
        let mut packets = run(template, 3, 100);
        for (index, packet) in packets.iter_mut().enumerate() {
            packet.tcp_mut().sequence += index as u32 * (20 - words * 4);
        }
        let mut packets = bytes(&packets);
        for packet in &mut packets {
            packet[32] = (words << 4) as u8;
            oracle::fill_transport_checksum(packet);
        }
        assert_eq!(merged(&packets), [1, 1, 1], "data offset {words}");
    }
}

/// The kernel trusts a merged vnet packet: a wrong checksum must not vanish in it.
#[test]
fn bad_checksums_stay_visible() {
    for (what, at) in [("IP", 11), ("transport", 151)] {
        let expected: [&[usize]; 4] = [&[1, 3], &[1, 1, 2], &[2, 1, 1], &[3, 1]];
        for (bad, expected) in expected.iter().enumerate() {
            let mut packets = bytes(&tcp_run(4, 100));
            packets[bad][at] ^= 1;
            assert_eq!(merged(&packets), *expected, "{what} checksum of {bad}");
        }
    }
}

/// An acknowledgment or an ICMP message in between goes out after what came
/// before it and before what came after; other flows do not mind.
#[test]
fn packets_that_pass_close_what_they_belong_to() {
    let tcp = tcp_run(4, 100);
    let other: Vec<_> = tcp_run(4, 100)
        .into_iter()
        .map(|packet| packet.with_tcp(|tcp| tcp.ports[1] = 80))
        .collect();
    let around = |between: Packet| {
        let packets = [&tcp[..2], &other[..2], &[between], &tcp[2..], &other[2..]].concat();
        merged(&bytes(&packets))
    };
    let acknowledgment = Packet::tcp(false, vec![]);
    assert_eq!(around(acknowledgment), [2, 1, 4, 2]);
    let fragment = Packet::udp(false, payload(50)).with(|p| p.fragment = 0x2000);
    assert_eq!(around(fragment), [2, 2, 1, 2, 2]);
    let icmp = Packet::other(false, 1, payload(64));
    assert_eq!(around(icmp.clone()), [2, 2, 1, 2, 2]);
    let icmp_elsewhere = icmp.with(|p| p.hosts = [2, 1]);
    assert_eq!(around(icmp_elsewhere), [1, 4, 4]);
}

#[test]
fn no_vnet_packet_no_packet() {
    let packets = bytes(&[tcp_run(3, 100), udp_run(3, 100)].concat());
    assert!(coalesce_into(0, ALL, &packets, |_| false).is_empty());
    let vnet_packets = coalesce_into(1, ALL, &packets, |_| false);
    assert_eq!(vnet_packets.len(), 1);
    assert_eq!(oracle::expand(&vnet_packets[0]), packets[..3]);
}
