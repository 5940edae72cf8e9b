use super::*;
use crate::cli::Cli;
use crate::config::{Config, DEFAULT_PORT};
use clap::CommandFactory;
use proptest::prelude::*;
use std::net::Ipv4Addr;

fn fault(text: impl AsRef<[u8]>) -> String {
    let error = parse("f.toml", text.as_ref()).map(drop).unwrap_err();
    error.to_string()
}

#[test]
fn faults_have_their_place() {
    for (text, place, parts) in [
        // TOML's own.
        ("queues = 1\nmtu == 2", "2:6", &[][..]),
        ("mtu = 1400\nmtu = 1400", "2:1", &["duplicate"]),
        ("tun = \"a", "1:9", &[]),
        ("# é\r\n\ttun =", "2:7", &[]),
        // Keys that there are not.
        ("queues = 1\nqueue = 2", "2:1", &["queue", "queues"]),
        ("config = \"x\"", "1:1", &["config"]),
        (
            "[[peer]]\nendpoint = \"a\"\nkey = 1",
            "3:1",
            &["key", "endpoint"],
        ),
        ("[peers]", "1:2", &["peers"]),
        // Types.
        ("queues = \"2\"", "1:10", &["integer", "string"]),
        ("mtu = 1400.0", "1:7", &["integer"]),
        ("hop = 1", "1:7", &["boolean"]),
        ("tun = 5", "1:7", &["a string"]),
        ("address = \"10.9.0.1/24\"", "1:11", &["an array"]),
        ("busy-poll = true", "1:13", &["integer"]),
        ("peer = [\"a\"]", "1:9", &[]),
        ("[[peer]]\nprefixes = []", "1:1", &["endpoint"]),
        // Values.
        ("queues = 0", "1:10", &["1..=256"]),
        ("queues = 257", "1:10", &["1..=256"]),
        ("mtu = 99999999999999999999", "1:7", &[]),
        ("txqueuelen = -1", "1:14", &["1..=100000"]),
        ("busy-poll = 1000001", "1:13", &["1000000"]),
        ("busy-poll = \"on\"", "1:13", &["auto"]),
        ("listen = \"localhost\"", "1:10", &["localhost"]),
        ("tun = \"a/b\"", "1:7", &["a/b"]),
        ("tun = \"é\"; ", "1:10", &[]),
        (
            "address = [\"10.9.0.1/24\",\n  \"0.0.0.0/0\"]",
            "2:3",
            &["0.0.0.0"],
        ),
        ("route = [\"10.9.0.1/24\"]", "1:10", &["10.9.0.0/24"]),
        ("cores = \"3-1\"", "1:9", &["3-1"]),
        ("io = \"aio\"", "1:6", &["uring, epoll"]),
        ("without = [\"uso\", \"luck\"]", "1:19", &["udp-segment"]),
        ("log-format = \"xml\"", "1:14", &["json"]),
        ("quiet = true\nverbose = 1", "2:11", &["quiet"]),
        // Peers.
        ("[[peer]]\nendpoint = \"a:0\"", "2:12", &["a:0"]),
        (
            "[[peer]]\nendpoint = \"a\"\nprefixes = [\n  \"10.1.0.0/16\",\n  \"10.1.2.3/16\",\n]",
            "5:3",
            &["10.1.0.0/16"],
        ),
        // Peers among themselves.
        (
            "peer = [{ endpoint = \"a\" }, { endpoint = \"b\" }]",
            "1:42",
            &["a:8285", "b:8285"],
        ),
        (
            "[[peer]]\nendpoint = \"a\"\n[[peer]]\nendpoint = \"A.\"\nprefixes = [\"::/0\"]",
            "4:12",
            &["twice"],
        ),
        (
            "[[peer]]\nendpoint = \"a\"\nprefixes = [\"::/0\"]\n\
             [[peer]]\nendpoint = \"b\"\nprefixes = [\"::/1\", \"::/0\"]",
            "6:21",
            &["::/0", "a:8285", "b:8285"],
        ),
        ("[[peer]]\nendpoint = \"224.0.0.1\"", "2:12", &["224.0.0.1"]),
    ] {
        let fault = fault(text);
        let rest = fault.strip_prefix(&format!("f.toml:{place}: "));
        let rest = rest.unwrap_or_else(|| panic!("{text:?}, not at {place}: {fault}"));
        assert!(
            parts.iter().all(|part| rest.contains(part)),
            "{text:?}: {rest}"
        );
        assert!(
            !rest.is_empty() && !fault.contains(char::is_control),
            "{fault:?}"
        );
    }
}

#[test]
fn faults_are_one_line_whatever_they_quote() {
    let text = fault("\"a\\nb\\u001b\" = 1");
    assert!(text.contains("a\\nb\\u{1b}"), "{text}");
    let text = fault(format!("tun = \"{}\"", "x".repeat(100_000)));
    assert!(text.len() < 300, "{text}");
    assert_eq!(
        fault(b"tun = \"a\"\nmtu = \xff"),
        "f.toml:2:7: this is not UTF-8"
    );
}

/// However deep a file goes, the stack does not.
#[test]
fn depth_is_refused() {
    for text in [
        format!("tun = {}", "[".repeat(100_000)),
        format!("tun = {}", "{a=".repeat(100_000)),
        format!("tun{} = 1", ".a".repeat(100_000)),
        format!("[tun{}]", ".a".repeat(100_000)),
    ] {
        assert!(fault(text).contains("recur"));
    }
}

#[test]
fn an_empty_file_says_nothing() {
    for text in ["", "\u{feff}# Nothing yet.\n", "\r\n"] {
        assert_eq!(
            parse("f.toml", text.as_bytes()).unwrap().args,
            TunnelArgs::default()
        );
    }
}

#[test]
fn large_tables_load() {
    const PREFIXES: u32 = 100_000;
    const PREFIXES_PER_PEER: u32 = 100;
    let prefix = |number: u32| Ipv4Addr::from(0x0a00_0000 + number);
    let peer = |first: u32| {
        let prefixes = first..first + PREFIXES_PER_PEER;
        let list: String = prefixes
            .map(|n| format!("  \"{}/32\",\n", prefix(n)))
            .collect();
        format!("[[peer]]\nendpoint = \"p{first}.example\"\nprefixes = [\n{list}]\n")
    };
    let peers = (0..PREFIXES).step_by(PREFIXES_PER_PEER as usize);
    let text: String = peers.map(peer).collect();
    let args = parse("f.toml", text.as_bytes()).unwrap().args;
    assert_eq!(args.peer.len(), 1000);
    let prefixes = args.peer.iter().flat_map(|peer| &peer.prefixes);
    assert_eq!(prefixes.count(), PREFIXES as usize);
    assert_eq!(args.peer[999].prefixes[99].addr(), prefix(PREFIXES - 1));
}

const EXAMPLE: &str = include_str!("../../docs/fastvpn.example.toml");

/// Whether a comment is a line of TOML.
fn is_setting(comment: &str) -> bool {
    let key = comment.split(" = ").next().unwrap_or_default();
    let is_key = |c: char| c.is_ascii_lowercase() || c == '-';
    comment.starts_with("[[") || (comment.contains(" = ") && key.chars().all(is_key))
}

fn example_in_full() -> String {
    let lines = EXAMPLE.lines().map(|line| match line.strip_prefix("# ") {
        Some(comment) if is_setting(comment) => comment,
        _ => line,
    });
    lines.map(|line| format!("{line}\n")).collect()
}

/// As it is, it says no more than who the peers are.
#[test]
fn the_example_is_a_file_to_start_from() {
    let args = parse("example", EXAMPLE.as_bytes()).unwrap().args;
    assert!(args.peer.len() > 1);
    let peers_alone = TunnelArgs {
        peer: args.peer.clone(),
        address: args.address.clone(),
        ..TunnelArgs::default()
    };
    assert_eq!(args, peers_alone);
}

#[test]
fn the_example_has_every_key_and_the_defaults() {
    let text = example_in_full();
    let full = parse("example", text.as_bytes()).unwrap().args;
    let table: toml::Table = toml::from_str(&text).unwrap();
    let command = Cli::command();
    for flag in command.get_arguments().filter_map(|flag| flag.get_long()) {
        let is_key = !["config", "help", "version"].contains(&flag);
        assert_eq!(table.contains_key(flag), is_key, "{flag}");
    }
    // What it calls the default of a key is what there is without the key.
    let with = Config::from_args(&TunnelArgs {
        // These have none to show: they depend on the host.
        queues: None,
        mtu: None,
        cores: None,
        route: Vec::new(),
        without: Vec::new(),
        ..full.clone()
    });
    let without = Config::from_args(&TunnelArgs {
        peer: full.peer.clone(),
        address: full.address.clone(),
        listen: full.listen,
        control: full.control.clone(),
        ..TunnelArgs::default()
    });
    let (mut with, without) = (with.unwrap(), without.unwrap());
    with.args = without.args.clone();
    assert_eq!(with, without);
    assert_eq!(full.listen.unwrap().port, DEFAULT_PORT);
}

/// Lines of a file, good ones and bad ones.
fn line() -> impl Strategy<Value = String> {
    let key = prop::sample::select(vec![
        "queues",
        "listen",
        "tun",
        "mtu",
        "address",
        "route",
        "no-routes",
        "hop",
        "cores",
        "busy-poll",
        "txqueuelen",
        "io",
        "without",
        "control",
        "takeover",
        "verbose",
        "quiet",
        "log-format",
        "peer",
        "endpoint",
        "prefixes",
        "peer.endpoint",
        "\"\"",
    ]);
    let value = prop_oneof![
        any::<i64>().prop_map(|number| number.to_string()),
        any::<f64>().prop_map(|number| number.to_string()),
        any::<bool>().prop_map(|value| value.to_string()),
        any::<String>().prop_map(|text| format!("{text:?}")),
        "[0-9a-f.:/\\[\\],\\-%=]{0,24}".prop_map(|text| format!("\"{text}\"")),
        "[0-9.:/]{0,12}".prop_map(|text| format!("[\"{text}\", 1]")),
        "[\\[\\]{}\"',=# a0]{0,24}",
        Just("1979-05-27T07:32:00Z".to_string()),
        Just("[".repeat(10_000)),
    ];
    prop_oneof![
        8 => (key, value).prop_map(|(key, value)| format!("{key} = {value}")),
        1 => Just("[[peer]]".to_string()),
        1 => Just("[peer]".to_string()),
        1 => any::<String>(),
    ]
}

fn never_more_than_one_line(bytes: &[u8]) {
    if let Err(error) = parse("f.toml", bytes) {
        let text = error.to_string();
        let mut parts = text.splitn(4, ':').skip(1);
        let mut number = || parts.next().and_then(|part| part.parse::<usize>().ok());
        let place = number().zip(number());
        assert!(
            place.is_some_and(|(line, column)| line > 0 && column > 0),
            "{text}"
        );
        assert!(!text.contains(char::is_control), "{text:?}");
    }
}

proptest! {
    #[test]
    fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        never_more_than_one_line(&bytes);
    }

    #[test]
    fn any_text_is_read_or_refused(text in any::<String>()) {
        never_more_than_one_line(text.as_bytes());
    }

    #[test]
    fn any_lines_are_read_or_refused(lines in prop::collection::vec(line(), 0..6)) {
        never_more_than_one_line(lines.join("\n").as_bytes());
    }

    /// On the command line, too.
    #[test]
    fn any_peer_is_read_or_refused(text in "[a-z0-9.:/\\[\\],%=\\-]{0,40}") {
        if let Ok(peer) = crate::config::parse::parse_peer(&text) {
            prop_assert_eq!(crate::config::parse::parse_peer(&peer.to_string()), Ok(peer));
        }
    }
}
