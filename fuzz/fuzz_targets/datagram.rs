//! Bytes as a batch of datagrams from the network: whatever passes
//! `ip::verify` goes through the coalescer, and what comes out must be what
//! went in.
//!
//! The input is cut into packets: a byte each says where the next one comes
//! from, and the packets after the first may be made from the one before, for
//! runs of one flow are what a fuzzer would never guess.
#![no_main]

use fastvpn::packet::coalesce::{Coalescer, TunOffloads};
use fastvpn::packet::vnet_packet::{VnetPacket, VnetSink};
use fastvpn::packet::ip;
use libfuzzer_sys::fuzz_target;

#[path = "../../src/packet/oracle.rs"]
mod oracle;

/// Enough to fill vnet packets and the table of flows.
const PACKETS_MAX: usize = 80;

#[derive(Default)]
struct Sink {
    spare: Vec<VnetPacket>,
    vnet_packets: Vec<Vec<u8>>,
}

impl VnetSink for Sink {
    fn take_vnet_packet(&mut self) -> Option<VnetPacket> {
        Some(self.spare.pop().unwrap_or_else(|| VnetPacket::new(0)))
    }

    fn write(&mut self, vnet_packet: VnetPacket) {
        self.vnet_packets.push(vnet_packet.bytes().to_vec());
        self.spare.push(vnet_packet);
    }
}

fuzz_target!(|data: &[u8]| {
    // As they are.
    let _ = ip::verify(data);
    let packets = packets(data);
    let mut sink = Sink::default();
    let mut coalescer = Coalescer::new(TunOffloads {
        tcp: true,
        udp: true,
    });
    let mut passed = vec![];
    for packet in packets {
        if let Ok(version) = ip::verify(&packet) {
            ip::destination(version, &packet);
            coalescer.push(version, &packet, &mut sink);
            passed.push(packet);
        }
    }
    coalescer.flush(&mut sink);
    if let Err(why) = oracle::same_traffic(&passed, &sink.vnet_packets, false) {
        panic!("{why}");
    }
});

fn packets(mut data: &[u8]) -> Vec<Vec<u8>> {
    let mut packets: Vec<Vec<u8>> = vec![];
    while let Some((&command, rest)) = data.split_first() {
        data = rest;
        if packets.len() == PACKETS_MAX {
            break;
        }
        let packet = match (command >> 6, packets.last()) {
            // New bytes, as they are.
            (0, _) | (_, None) => take(&mut data, usize::from(command & 0x3f) * 4),
            // New bytes with lengths and checksums made right.
            (1, _) => with_lengths_set(take(&mut data, usize::from(command & 0x3f) * 4)),
            // The next of the same flow, with one byte changed perhaps.
            (kind, Some(last)) => {
                let mut packet = successor(last);
                if kind == 3 && !packet.is_empty() {
                    let change = take(&mut data, 2);
                    if let [at, value] = change[..] {
                        let at = usize::from(at) % packet.len();
                        packet[at] ^= value;
                    }
                }
                match command & 3 {
                    0 => packet,
                    1 => {
                        let shorter = packet.len().saturating_sub(1);
                        packet.truncate(shorter);
                        with_lengths_set(packet)
                    }
                    _ => with_lengths_set(packet),
                }
            }
        };
        packets.push(packet);
    }
    packets
}

fn take(data: &mut &[u8], bytes: usize) -> Vec<u8> {
    let (taken, rest) = data.split_at(bytes.min(data.len()));
    *data = rest;
    taken.to_vec()
}

/// Sets length fields and checksums, if there is room for them.
fn with_lengths_set(mut packet: Vec<u8>) -> Vec<u8> {
    let len = packet.len() as u16;
    match packet.first().map(|first| first >> 4) {
        Some(4) if len >= 20 => packet[2..4].copy_from_slice(&len.to_be_bytes()),
        Some(6) if len >= 40 => packet[4..6].copy_from_slice(&(len - 40).to_be_bytes()),
        _ => return packet,
    }
    if packet[0] >> 4 == 4 {
        let header_bytes = usize::from(packet[0] & 15) * 4;
        if header_bytes < 20 || packet.len() < header_bytes {
            return packet;
        }
    }
    let view = oracle::view(&packet);
    let at = view.transport_at;
    let transport_bytes_min = if view.protocol == 6 { 20 } else { 8 };
    if matches!(view.protocol, 6 | 17) && packet.len() >= at + transport_bytes_min {
        if view.protocol == 17 {
            let udp_bytes = (packet.len() - at) as u16;
            packet[at + 4..at + 6].copy_from_slice(&udp_bytes.to_be_bytes());
        }
        oracle::fill_transport_checksum(&mut packet);
    }
    oracle::fill_ip_checksum(&mut packet);
    packet
}

/// The packet that a sender would send next: sequence number and IPv4
/// identification moved on.
fn successor(packet: &[u8]) -> Vec<u8> {
    let mut next = packet.to_vec();
    if ip::verify(packet).is_err() {
        return next;
    }
    let view = oracle::view(packet);
    if !view.v6 {
        let id = u16::from_be_bytes([next[4], next[5]]).wrapping_add(1);
        next[4..6].copy_from_slice(&id.to_be_bytes());
    }
    let at = view.transport_at;
    if view.protocol == 6 && packet.len() >= at + 20 {
        let header_bytes = usize::from(packet[at + 12] >> 4) * 4;
        let payload_bytes = packet.len().saturating_sub(at + header_bytes) as u32;
        let mut sequence = [0; 4];
        sequence.copy_from_slice(&packet[at + 4..at + 8]);
        let sequence = u32::from_be_bytes(sequence).wrapping_add(payload_bytes);
        next[at + 4..at + 8].copy_from_slice(&sequence.to_be_bytes());
    }
    with_lengths_set(next)
}
