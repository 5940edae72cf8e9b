//! Bytes as a request for metrics. Whatever comes, it is never waited for more than there may
//! be, and what follows a whole request changes nothing.
#![no_main]

use fastvpn::control::metrics::{Parsed, parse};
use libfuzzer_sys::fuzz_target;

/// Longest request.
const REQUEST_BYTES_MAX: usize = 4 << 10;

fuzz_target!(|data: &[u8]| {
    let parsed = parse(data);
    if parsed == Parsed::Partial {
        let mut long = data.to_vec();
        long.resize(REQUEST_BYTES_MAX.max(data.len()), b'x');
        assert_ne!(parse(&long), Parsed::Partial);
    } else if let Parsed::Request { .. } = parsed {
        let more = [data, &[0xff; 9]].concat();
        assert_eq!(parse(&more), parsed);
    }
});
