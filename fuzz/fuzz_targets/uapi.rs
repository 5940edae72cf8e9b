//! Bytes as what `wg` asks of a tunnel, line by line: about the tunnel itself, and about a peer.
//! A line that is wrong spoils the request whatever follows it.
#![no_main]

use fastvpn::control::uapi::{Parser, Request};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let peer = format!("public_key={}", "5a".repeat(32));
    for beginning in [&[][..], &["set=1"], &["set=1", &peer]] {
        let mut parser = Parser::default();
        beginning.iter().for_each(|line| parser.take(line.as_bytes()));
        for line in data.split(|byte| *byte == b'\n') {
            parser.take(line);
        }
        let request = parser.finish();
        if !beginning.is_empty() {
            assert!(request != Ok(Request::Get));
        }
    }
});
