//! Bytes as a file of wg-quick(8): what is wrong is said in one line that begins with the
//! number of a line of the file.
#![no_main]

use fastvpn::config::parse_wg_quick;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Err(error) = parse_wg_quick("file", data) else {
        return;
    };
    let error = error.to_string();
    assert!(!error.chars().any(char::is_control), "{error:?}");
    let rest = error.strip_prefix("file:").unwrap();
    let line: usize = rest.split_once(": ").unwrap().0.parse().unwrap();
    let lines = data.split(|byte| *byte == b'\n').count();
    assert!((1..=lines).contains(&line), "{error:?}");
});
