//! A scripted mix of packets: many flows of every kind, interleaved in bursts,
//! the same in every run. Whoever carries them may merge and cut them again,
//! but must give back these very packets, each flow's in their order.

use std::net::{Ipv4Addr, Ipv6Addr};

use crate::packets::{Tcp, V4, V6, udp};
use crate::support::noise;

/// Source addresses, of nobody. What comes from elsewhere is not the script's.
pub const SOURCE_V4: Ipv4Addr = Ipv4Addr::new(10, 244, 9, 1);
/// As [`SOURCE_V4`].
pub const SOURCE_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x244, 0, 0, 9, 0, 0, 1);
/// Destination addresses, of nobody either.
pub const DESTINATION_V4: Ipv4Addr = Ipv4Addr::new(10, 99, 0, 2);
/// As [`DESTINATION_V4`].
pub const DESTINATION_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x99, 0, 0, 0, 0, 0, 2);

/// Bytes of most packets: equal across flows, so that one batch holds several.
const PACKET_BYTES: usize = 1000;

const ACK: u8 = 0x10;
const PSH: u8 = 0x08;

/// A packet and the flow whose order it must keep.
pub struct Scripted {
    /// Number of the flow.
    pub flow: usize,
    /// The packet.
    pub packet: Vec<u8>,
}

/// A flow's packet of a number. All packets of a flow differ.
type Maker = fn(usize) -> Vec<u8>;

const FLOWS: [Maker; 28] = [
    // TCP as it mostly is, in runs that end with PSH.
    |n| tcp_v4(0, n, |_, _| {}),
    // "Don't fragment"; timestamps that change; a mark; a jump.
    |n| tcp_v4(1, n, |ip, _| ip.fragment = 0x4000),
    |n| tcp_v4(2, n, |_, tcp| tcp.options = timestamps(n / 10)),
    |n| tcp_v4(3, n, |ip, _| ip.tos = if n % 6 == 5 { 3 } else { 2 }),
    |n| tcp_v4(4, n, |ip, _| ip.ttl = if n % 9 == 8 { 33 } else { 64 }),
    |n| tcp_v4(5, n, |_, tcp| tcp.sequence += 77 * (n as u32 / 5)),
    |n| {
        tcp_v4(6, n, |_, tcp| {
            tcp.flags = [0x10, 0x02, 0x18, 0x11, 0x14, 0x30, 0x50, 0x90][n % 8]
        })
    },
    |n| {
        tcp_v4(7, n, |ip, _| {
            ip.id = 0x5555 ^ (n as u16).wrapping_mul(0x1234)
        })
    },
    // The identification wraps, and so does the sequence number.
    |n| tcp_v4(8, n, |ip, _| ip.id = 0xff80_u16.wrapping_add(n as u16)),
    |n| {
        tcp_v4(9, n, |_, tcp| {
            tcp.sequence = tcp.sequence.wrapping_sub(12_000)
        })
    },
    |n| tcp_v4(10, n, |_, tcp| tcp.ack = n as u32 / 8),
    // Damaged on the way into the tunnel: not ours to repair, nor to merge.
    |n| damaged(n, tcp_v4(11, n, |_, _| {})),
    |n| tcp_v6(12, n, |_, _| {}),
    |n| {
        tcp_v6(13, n, |ip, _| {
            ip.class_and_label = (n as u32 / 6) << 20 | 0x12345
        })
    },
    |n| {
        tcp_v6(14, n, |ip, _| {
            ip.hop_limit = if n % 9 == 8 { 33 } else { 64 }
        })
    },
    |n| damaged(n, tcp_v6(15, n, |_, _| {})),
    // UDP of one size, of many sizes, of one byte, of the largest.
    |n| udp_v4(16, n, 972, |_| {}),
    |n| udp_v4(17, n, (n * 389) % 1400, |_| {}),
    |n| udp_v4(18, n, 1, |_| {}),
    |n| udp_v4(19, n, 1444, |ip| ip.fragment = 0x4000),
    |n| udp_v4(20, n, 972, |ip| ip.options = vec![1, 1, 1, 0]),
    |n| without_checksum(udp_v4(21, n, 972, |_| {})),
    |n| damaged(n, udp_v4(22, n, 972, |_| {})),
    |n| udp_v6(23, n, 952),
    |n| udp_v6(24, n, 16 + (n * 389) % 1400),
    |n| damaged(n, udp_v6(25, n, 952)),
    // Neither: another protocol, and fragments of UDP.
    |n| v4(26, n, 253).packet(&noise(n as u64, PACKET_BYTES - 20)),
    fragment,
];

/// The script: `count` packets.
pub fn script(count: usize) -> Vec<Scripted> {
    let mut sent = [0; FLOWS.len()];
    let mut script = Vec::with_capacity(count);
    let mut chance = noise(2026, 2 * count).into_iter().map(usize::from);
    let mut next = || chance.next().unwrap_or(0);
    while script.len() < count {
        let flow = next() % FLOWS.len();
        // Some flows in turn, most in bursts.
        for _ in 0..1 + next() % 24 {
            let packet = FLOWS[flow](sent[flow]);
            sent[flow] += 1;
            script.push(Scripted { flow, packet });
        }
    }
    script.truncate(count);
    script
}

fn ports(flow: usize) -> [u16; 2] {
    [1000 + flow as u16, 2000 + flow as u16]
}

fn v4(flow: usize, n: usize, protocol: u8) -> V4 {
    let mut ip = V4::new(SOURCE_V4, DESTINATION_V4, protocol);
    ip.id = (flow * 1000 + n) as u16;
    ip
}

fn v6(next_header: u8) -> V6 {
    V6::new(SOURCE_V6, DESTINATION_V6, next_header)
}

fn tcp(flow: usize, n: usize, payload_bytes: usize) -> Tcp {
    Tcp {
        ports: ports(flow),
        sequence: (n * payload_bytes) as u32,
        ack: 1,
        flags: if n % 12 == 11 { ACK | PSH } else { ACK },
        options: Vec::new(),
    }
}

fn timestamps(value: usize) -> Vec<u8> {
    let mut options = vec![1, 1, 8, 10];
    options.extend((value as u32).to_be_bytes());
    options.extend(9u32.to_be_bytes());
    options
}

fn tcp_v4(flow: usize, n: usize, change: impl Fn(&mut V4, &mut Tcp)) -> Vec<u8> {
    let options_bytes = if flow == 2 { 12 } else { 0 };
    let payload_bytes = PACKET_BYTES - 40 - options_bytes;
    let (mut ip, mut tcp) = (v4(flow, n, 6), tcp(flow, n, payload_bytes));
    change(&mut ip, &mut tcp);
    let payload = noise((flow << 20 | n) as u64, payload_bytes);
    ip.packet(&tcp.segment(&ip.pseudo(), &payload))
}

fn tcp_v6(flow: usize, n: usize, change: impl Fn(&mut V6, &mut Tcp)) -> Vec<u8> {
    let payload_bytes = PACKET_BYTES - 60;
    let (mut ip, mut tcp) = (v6(6), tcp(flow, n, payload_bytes));
    change(&mut ip, &mut tcp);
    let payload = noise((flow << 20 | n) as u64, payload_bytes);
    ip.packet(&tcp.segment(&ip.pseudo(6), &payload))
}

fn udp_v4(flow: usize, n: usize, bytes: usize, change: impl Fn(&mut V4)) -> Vec<u8> {
    let mut ip = v4(flow, n, 17);
    change(&mut ip);
    let payload = noise((flow << 20 | n) as u64, bytes);
    ip.packet(&udp(ports(flow), &ip.pseudo(), &payload))
}

fn udp_v6(flow: usize, n: usize, bytes: usize) -> Vec<u8> {
    let ip = v6(17);
    let payload = noise((flow << 20 | n) as u64, bytes);
    ip.packet(&udp(ports(flow), &ip.pseudo(17), &payload))
}

/// Every fourth packet with a bit of its payload turned.
fn damaged(n: usize, mut packet: Vec<u8>) -> Vec<u8> {
    if n % 4 == 3 {
        packet[500] ^= 0x10;
    }
    packet
}

/// A UDP packet over IPv4 with nothing in the checksum field.
fn without_checksum(mut packet: Vec<u8>) -> Vec<u8> {
    packet[26..28].fill(0);
    packet
}

/// The three fragments of a datagram, in turn.
fn fragment(n: usize) -> Vec<u8> {
    let mut ip = v4(27, n / 3, 17);
    let payload = noise(n as u64, PACKET_BYTES - 24);
    // Offsets count in units of 8 bytes.
    let offset = (n % 3 * (PACKET_BYTES - 24) / 8) as u16;
    ip.fragment = offset | if n % 3 == 2 { 0 } else { 0x2000 };
    match n % 3 {
        0 => ip.packet(&udp(ports(27), &ip.pseudo(), &payload[8..])),
        _ => ip.packet(&payload),
    }
}
