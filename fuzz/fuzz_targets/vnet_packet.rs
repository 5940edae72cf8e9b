//! Bytes as a vnet packet from the TUN queue: cut it, and write every packet.
#![no_main]

use fastvpn::packet::ip;
use fastvpn::packet::segment::Segments;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    check(data);
    // Lengths that agree are hard to guess: set them.
    let mut vnet_packet = data.to_vec();
    if vnet_packet.len() < 50 {
        return;
    }
    let packet_bytes = (vnet_packet.len() - 10) as u16;
    match vnet_packet[10] >> 4 {
        4 => vnet_packet[12..14].copy_from_slice(&packet_bytes.to_be_bytes()),
        6 => vnet_packet[14..16].copy_from_slice(&(packet_bytes - 40).to_be_bytes()),
        _ => return,
    }
    check(&vnet_packet);
});

fn check(vnet_packet: &[u8]) {
    let Ok(segments) = Segments::new(vnet_packet) else {
        return;
    };
    assert_eq!(ip::verify(segments.packet()), Ok(segments.version()));
    let mut out = vec![];
    for index in 0..segments.count() {
        out.clear();
        out.resize(segments.packet_bytes(index), 0);
        segments.write(index, &mut out);
        let whole = segments.count() == 1;
        // A checksum may point into the IP header of a vnet packet nobody cut.
        assert!(whole || ip::verify(&out) == Ok(segments.version()));
    }
}
