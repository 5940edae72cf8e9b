//! Bytes as a configuration file: what is wrong is said in one line that begins
//! with a place in the file.
#![no_main]

use fastvpn::config::parse_bytes;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Err(error) = parse_bytes("file", data) else {
        return;
    };
    let error = error.to_string();
    assert!(!error.chars().any(char::is_control), "{error:?}");
    let mut parts = error.splitn(4, ':');
    assert_eq!(parts.next(), Some("file"));
    let mut number = || parts.next().unwrap().parse::<usize>().unwrap();
    let (line, column) = (number(), number());
    let lines: Vec<_> = data.split(|byte| *byte == b'\n').collect();
    assert!((1..=lines.len()).contains(&line), "{error:?}");
    assert!((1..=lines[line - 1].len() + 1).contains(&column), "{error:?}");
});
