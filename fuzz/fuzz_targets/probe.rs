//! Bytes as a probe, as they are and made to look like one: what is read is what
//! was meant, and is written again the same where it says anything.
#![no_main]

use fastvpn::packet::ip;
use fastvpn::packet::probe::{PROBE_BYTES_MIN, Probe};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    check(data);
    if data.len() < PROBE_BYTES_MIN {
        return;
    }
    // Fixed bytes are hard to guess: set all but the kind.
    let mut packet = data.to_vec();
    packet[0] = 0x45;
    packet[2..4].copy_from_slice(&(data.len() as u16).to_be_bytes());
    packet[8..10].copy_from_slice(&[1, 59]);
    packet[12..20].fill(0);
    packet[20..24].copy_from_slice(b"fvpn");
    let is_kind = matches!(packet[24], 1..=3);
    assert_eq!(check(&packet), is_kind);
});

fn check(packet: &[u8]) -> bool {
    let Some(probe) = Probe::from_packet(packet) else {
        return false;
    };
    let written = probe.to_packet(packet.len());
    assert_eq!(written.len(), packet.len());
    assert_eq!(ip::verify(&written), Ok(ip::Version::V4));
    assert_eq!(Probe::from_packet(&written), Some(probe));
    // Magic and kind, then the nonce.
    assert_eq!(written[20..25], packet[20..25]);
    assert_eq!(written[28..PROBE_BYTES_MIN], packet[28..PROBE_BYTES_MIN]);
    true
}
