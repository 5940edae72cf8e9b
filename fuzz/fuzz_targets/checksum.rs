//! Any bytes: the fast sum equals the definition, however it is split, and
//! the virtio-net header reads what it writes.
#![no_main]

use fastvpn::packet::checksum::Sum;
use fastvpn::packet::virtio::Header;
use libfuzzer_sys::fuzz_target;

#[path = "../../src/packet/oracle.rs"]
mod oracle;

fuzz_target!(|data: &[u8]| {
    if let Some((header, packet)) = Header::parse(data) {
        assert_eq!([&header.to_bytes(), packet].concat(), data);
    }
    let sum = oracle::ones_sum(&[data]);
    let whole = Sum::ZERO.add_bytes(data);
    assert_eq!(whole.partial(), sum.to_be_bytes());
    assert_eq!(whole.checksum(), (!sum).to_be_bytes());
    assert_eq!(whole.is_valid(), sum == 0xffff);
    let half = data.len() / 4 * 2;
    let split = Sum::ZERO.add_bytes(&data[..half]).add_bytes(&data[half..]);
    assert_eq!(split.partial(), whole.partial());
});
