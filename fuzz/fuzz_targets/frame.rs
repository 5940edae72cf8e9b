//! Bytes as a frame from the TUN queue: cut it, and write every packet.
#![no_main]

use fastvpn::packet::ip;
use fastvpn::packet::segment::Segments;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    check(data);
    // Lengths that agree are hard to guess: set them.
    let mut frame = data.to_vec();
    if frame.len() < 50 {
        return;
    }
    let packet_bytes = (frame.len() - 10) as u16;
    match frame[10] >> 4 {
        4 => frame[12..14].copy_from_slice(&packet_bytes.to_be_bytes()),
        6 => frame[14..16].copy_from_slice(&(packet_bytes - 40).to_be_bytes()),
        _ => return,
    }
    check(&frame);
});

fn check(frame: &[u8]) {
    let Ok(segments) = Segments::new(frame) else {
        return;
    };
    assert_eq!(ip::verify(segments.packet()), Ok(segments.version()));
    let mut out = vec![];
    for index in 0..segments.count() {
        out.clear();
        out.resize(segments.packet_bytes(index), 0);
        segments.write(index, &mut out);
        let whole = segments.count() == 1;
        // A checksum may point into the IP header of a frame nobody cut.
        assert!(whole || ip::verify(&out) == Ok(segments.version()));
    }
}
