//! Any bytes as a packet that cannot be sent on: an error about it, if there
//! may be one, is whole and is not answered in turn. And as a packet that
//! makes a hop: its IPv4 checksum is as right as it was.
//!
//! The first byte chooses the problem; the rest is the packet.
#![no_main]

use fastvpn::packet::hop::{self, Hop};
use fastvpn::packet::icmp::{ERROR_BYTES_MAX, ErrorMessage, Problem, TunnelAddresses};
use fastvpn::packet::ip::{self, Version};
use fastvpn::packet::virtio;
use libfuzzer_sys::fuzz_target;

#[path = "../../src/packet/oracle.rs"]
mod oracle;

fuzz_target!(|data: &[u8]| {
    let Some((&choice, bytes)) = data.split_first() else {
        return;
    };
    check_vnet_packet(bytes);
    let mut packet = bytes.to_vec();
    // Lengths that agree are hard to guess: set them.
    let len = packet.len() as u16;
    match packet.first().map(|first| first >> 4) {
        Some(4) if len >= 20 => packet[2..4].copy_from_slice(&len.to_be_bytes()),
        Some(6) if len >= 40 => packet[4..6].copy_from_slice(&(len - 40).to_be_bytes()),
        _ => return,
    }
    if let Ok(version) = ip::verify(&packet) {
        check_error(choice, version, &packet);
        check_hop(version, packet);
    }
});

fn check_error(choice: u8, version: Version, packet: &[u8]) {
    let problem = match choice & 3 {
        0 => Problem::NoRoute,
        1 => Problem::TimeExceeded,
        _ => Problem::TooBig {
            mtu_bytes: u32::from(choice) << 6,
        },
    };
    let addresses = TunnelAddresses {
        v4: "10.0.0.77/24".parse().ok(),
        v6: "fd00::77/64".parse().ok(),
        accept_local: choice & 0x80 != 0,
    };
    let Some(error) = ErrorMessage::about(problem, version, packet, &addresses) else {
        return;
    };
    let mut out = [0xee; ERROR_BYTES_MAX];
    let error_bytes = error.write(packet, &mut out);
    let written = &out[..error_bytes];
    assert_eq!(ip::verify(written), Ok(version));
    oracle::intact(written).unwrap();
    // The ICMP checksum, with the pseudo-header in IPv6.
    let header_bytes = oracle::view(written).transport_at;
    let (header, message) = written.split_at(header_bytes);
    let (error_bytes_max, pseudo_header) = match version {
        Version::V4 => (576, vec![]),
        Version::V6 => {
            let length = (message.len() as u32).to_be_bytes();
            (1280, [&header[8..40], &length, &[0, 0, 0, 58]].concat())
        }
    };
    assert!(error_bytes <= error_bytes_max);
    assert_eq!(oracle::ones_sum(&[&pseudo_header, message]), 0xffff);
    // The quote, and all of it that fits.
    let quote = &message[8..];
    assert_eq!(quote, &packet[..quote.len()]);
    assert!(quote.len() == packet.len() || error_bytes == error_bytes_max);
    for problem in [problem, Problem::TooBig { mtu_bytes: 1280 }] {
        assert_eq!(
            ErrorMessage::about(problem, version, written, &addresses),
            None
        );
    }
}

fn check_hop(version: Version, packet: Vec<u8>) {
    let offset = match version {
        Version::V4 => 8,
        Version::V6 => 7,
    };
    // With the checksum that it has.
    let mut counted = packet.clone();
    let hop = hop::decrement(version, &mut counted);
    if packet[offset] <= 1 {
        assert_eq!((hop, counted), (Hop::Expired, packet));
        return;
    }
    assert_eq!(hop, Hop::Counted);
    let is_right = |packet: &[u8]| {
        let header_bytes = usize::from(packet[0] & 15) * 4;
        version == Version::V6 || oracle::ones_sum(&[&packet[..header_bytes]]) == 0xffff
    };
    assert_eq!(is_right(&counted), is_right(&packet));
    // With the right one.
    let mut packet = packet;
    oracle::fill_ip_checksum(&mut packet);
    let mut counted = packet.clone();
    assert_eq!(hop::decrement(version, &mut counted), Hop::Counted);
    packet[offset] -= 1;
    oracle::fill_ip_checksum(&mut packet);
    assert_eq!(counted, packet);
}

/// A vnet packet is changed only if it is a whole packet with a hop left.
fn check_vnet_packet(vnet_packet: &[u8]) {
    let mut counted = vnet_packet.to_vec();
    let hop = hop::decrement_vnet_packet(&mut counted);
    let packet = vnet_packet.get(virtio::HEADER_BYTES..).unwrap_or_default();
    assert_eq!(hop.is_some(), ip::verify(packet).is_ok());
    assert_eq!(counted != vnet_packet, hop == Some(Hop::Counted));
}
