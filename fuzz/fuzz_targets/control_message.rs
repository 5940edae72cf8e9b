//! Bytes as what recvmsg(2) returns beside the payload, a sender's address and
//! control messages: as they are, and as well-formed messages made of them, of
//! which the last segment size counts.
#![no_main]

use fastvpn::io::{Control, parse_name};
use libfuzzer_sys::fuzz_target;

const SOL_UDP: i32 = 17;
const UDP_GRO: i32 = 104;

fuzz_target!(|data: &[u8]| {
    let _ = parse_name(data);
    let _ = Control::parse(data);
    check_names(data);
    check_messages(data);
});

/// The kernel's own addresses are always read.
fn check_names(data: &[u8]) {
    const FAMILIES: [(u16, usize); 2] = [(2, 16), (10, 28)];
    for (family, bytes) in FAMILIES {
        let mut name = data.to_vec();
        name.resize(bytes, 0);
        name[..2].copy_from_slice(&family.to_ne_bytes());
        assert!(parse_name(&name).is_some());
    }
}

/// Each message: a byte that says whether it is a segment size, a length, data.
fn check_messages(mut data: &[u8]) {
    let mut control = Vec::new();
    let mut expected = None;
    while let [kind, length, rest @ ..] = data {
        let (payload, rest) = rest.split_at(rest.len().min(usize::from(length % 32)));
        data = rest;
        let is_size = kind % 4 == 0 && payload.len() >= 4;
        let (level, kind) = match is_size {
            true => (SOL_UDP, UDP_GRO),
            false => (i32::from(*kind), UDP_GRO + 1),
        };
        if let (true, Some(size)) = (is_size, payload.first_chunk()) {
            expected = Some(i32::from_ne_bytes(*size));
        }
        control.extend((16 + payload.len()).to_ne_bytes());
        control.extend(level.to_ne_bytes());
        control.extend(kind.to_ne_bytes());
        control.extend(payload);
        control.resize(control.len().next_multiple_of(8), 0);
    }
    let expected = expected.and_then(|size| usize::try_from(size).ok());
    assert_eq!(Control::parse(&control).segment_bytes, expected);
}
