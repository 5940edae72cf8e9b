//! Bytes as a request on the control socket, and as the answer to each command.
//! A request that is read is written again the same; what is wrong is said in one
//! line of bounded length; and no answer puts control characters on a terminal.
#![no_main]

use std::path::Path;

use clap::Parser;
use fastvpn::cli::client::ClientCommand;
use fastvpn::cli::commands::show_answer;
use fastvpn::control::protocol::Request;
use libfuzzer_sys::fuzz_target;

const ERROR_BYTES_MAX: usize = 1000;

const COMMANDS: [&[&str]; 7] = [
    &["status"],
    &["status", "--json"],
    &["peers"],
    &["route", "list"],
    &["route", "get", "10.0.0.1"],
    &["reload"],
    &["stop"],
];

#[derive(Parser)]
struct Cli {
    #[command(subcommand)]
    command: ClientCommand,
}

fuzz_target!(|data: &[u8]| {
    match Request::read(data) {
        Ok(request) => {
            let written = serde_json::to_vec(&request).unwrap();
            assert_eq!(Request::read(&written), Ok(request));
        }
        Err(error) => assert!(error.len() <= ERROR_BYTES_MAX && !error.contains('\n'), "{error}"),
    }
    let Ok(line) = std::str::from_utf8(data) else {
        return;
    };
    // The connection cuts the answer off at the line's end.
    let line = line.lines().next().unwrap_or_default();
    for words in COMMANDS {
        let words = std::iter::once("fastvpn").chain(words.iter().copied());
        let command = Cli::parse_from(words).command;
        let mut shown = Vec::new();
        let result = show_answer(&command, Path::new("x"), line, &mut shown, || Ok(()));
        let shown = String::from_utf8(shown).unwrap();
        let said = shown + &result.err().map(|error| error.to_string()).unwrap_or_default();
        assert!(!said.chars().any(|c| c.is_control() && c != '\n'), "{said:?}");
    }
});
