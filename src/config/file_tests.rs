use super::*;
use crate::config::DEFAULT_PORT;
use clap::{Args, Command};
use proptest::prelude::*;
use std::net::Ipv4Addr;

fn parse(text: impl AsRef<[u8]>) -> Result<Config> {
    parse_bytes("f.toml", text.as_ref())
}

fn fault(text: impl AsRef<[u8]>) -> String {
    parse(text).map(drop).unwrap_err().to_string()
}

#[test]
fn faults_have_their_place() {
    for (text, place, parts) in [
        // TOML's own.
        ("queues = 1\nmtu == 2", "2:6", &[][..]),
        ("mtu = 1400\nmtu = 1400", "2:1", &["duplicate"]),
        ("tun = \"a", "1:9", &[]),
        ("# é\r\n\ttun =", "2:7", &[]),
        ("tun = \"é\"; ", "1:10", &[]),
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
        ("queues = \"2\"", "1:10", &["string", "u16"]),
        ("queues = -1", "1:10", &["u16"]),
        ("mtu = 1400.0", "1:7", &["floating point"]),
        ("mtu = 99999999999999999999", "1:7", &[]),
        ("hop = 1", "1:7", &["boolean"]),
        ("tun = 5", "1:7", &["a string"]),
        ("address = \"10.9.0.1/24\"", "1:11", &["sequence"]),
        ("busy-poll = true", "1:13", &["microseconds"]),
        ("peer = [\"a\"]", "1:9", &[]),
        (
            "[[peer]]\nprefixes = []",
            "1:1",
            &["endpoint", "public-key"],
        ),
        (
            "[[peer]]\nendpoint = \"a\"\npersistent-keepalive = 25",
            "1:1",
            &["persistent-keepalive", "public-key"],
        ),
        (
            "[[peer]]\nendpoint = \"a\"\npreshared-key-file = \"/f\"",
            "1:1",
            &["preshared-key-file", "public-key"],
        ),
        ("[[peer]]\npublic-key = \"x\"", "2:14", &["44 characters"]),
        ("[[peer]]\npersistent-keepalive = 65536", "2:24", &["65535"]),
        // Values.
        ("busy-poll = 1000001", "1:13", &["1000000"]),
        ("busy-poll = \"on\"", "1:13", &["auto"]),
        ("listen = \"localhost\"", "1:10", &["localhost"]),
        (
            "route = [\"10.8.0.0/16\",\n  \"10.9/24\"]",
            "2:3",
            &["10.9/24"],
        ),
        ("cores = \"3-1\"", "1:9", &["3-1"]),
        ("io = \"aio\"", "1:6", &["`uring`, `epoll`"]),
        ("without = [\"uso\", \"luck\"]", "1:19", &["udp-segment"]),
        ("log-format = \"xml\"", "1:14", &["json"]),
        // Peers.
        ("[[peer]]\nendpoint = \"a:0\"", "2:12", &["a:0"]),
        (
            "[[peer]]\nendpoint = \"a\"\nprefixes = [\n  \"10.1.0.0/16\",\n  \"10.1.2.3/33\",\n]",
            "5:3",
            &["10.1.2.3/33"],
        ),
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
    assert!(text.contains("`a b `"), "{text}");
    let text = fault(format!("listen = \"{}\"", "x".repeat(100_000)));
    assert!(text.chars().count() < 350, "{text}");
    assert_eq!(
        fault(b"tun = \"a\"\nmtu = \xff"),
        "f.toml:2:7: this is not UTF-8"
    );
}

#[test]
fn peers_with_keys_are_read() {
    const KEY: &str = "xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg=";
    let text = format!(
        "private-key = \"/etc/own.key\"\n[[peer]]\npublic-key = \"{KEY}\"\n\
         endpoint = \"vpn.example:51820\"\npersistent-keepalive = 25\n\
         preshared-key-file = \"/etc/psk\"\nprefixes = [\"10.1.0.0/16\"]\n\
         [[peer]]\npublic-key = \"{}=\"\npersistent-keepalive = \"off\"",
        "A".repeat(43)
    );
    let config = parse(text).unwrap();
    assert_eq!(config.private_key_file, Some("/etc/own.key".into()));
    let [first, second] = &config.peers[..] else {
        panic!("{:?}", config.peers);
    };
    assert_eq!(first.name.to_string(), KEY);
    let endpoint = first.endpoint.as_ref().map(ToString::to_string);
    assert_eq!(endpoint.as_deref(), Some("vpn.example:51820"));
    assert_eq!(first.persistent_keepalive.unwrap().as_secs(), 25);
    assert_eq!(first.preshared_key_file, Some("/etc/psk".into()));
    assert_eq!(first.prefixes.len(), 1);
    assert_eq!(
        (&second.endpoint, second.persistent_keepalive),
        (&None, None)
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
        assert_eq!(parse(text).unwrap(), parse("").unwrap());
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
    let peers = parse(text).unwrap().peers;
    assert_eq!(peers.len(), 1000);
    let prefixes = peers.iter().flat_map(|peer| &peer.prefixes);
    assert_eq!(prefixes.count(), PREFIXES as usize);
    assert_eq!(peers[999].prefixes[99].addr(), prefix(PREFIXES - 1));
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
    let example = parse(EXAMPLE).unwrap();
    assert!(example.peers.len() > 1);
    let peers_alone = Config {
        peers: example.peers.clone(),
        ..parse("").unwrap()
    };
    assert_eq!(example, peers_alone);
}

#[test]
fn the_docs_have_every_option_and_the_defaults() {
    let text = example_in_full();
    let full = parse(&text).unwrap();
    let table: toml::Table = toml::from_str(&text).unwrap();
    let command = Config::augment_args(Command::new("fastvpn"));
    for flag in command.get_arguments().filter_map(|flag| flag.get_long()) {
        let is_flag_alone = ["config", "wg-config", "foreground", "detached"].contains(&flag);
        assert_eq!(table.contains_key(flag), !is_flag_alone, "{flag}");
    }
    let options = include_str!("../../docs/options.md");
    for flag in command.get_arguments().filter(|flag| !flag.is_hide_set()) {
        let name = match (flag.get_long(), flag.get_short()) {
            (_, Some(short)) => format!("`-{short}"),
            (Some(long), None) => format!("`--{long}"),
            (None, None) => "`NAME".into(),
        };
        let is_there = |end| options.contains(&format!("{name}{end}"));
        assert!(is_there('`') || is_there(' '), "{name}");
    }
    // What it calls the default of a key is what there is without the key, but for
    // those that depend on the host.
    let without = Config {
        queues: full.queues,
        peers: full.peers.clone(),
        listen: full.listen,
        mtu_bytes: full.mtu_bytes,
        addresses: full.addresses.clone(),
        routes: full.routes.clone(),
        cores: full.cores.clone(),
        without: full.without.clone(),
        control: full.control.clone(),
        metrics: full.metrics,
        private_key_file: full.private_key_file.clone(),
        secret_file: full.secret_file.clone(),
        identity: full.identity.clone(),
        registry: full.registry.clone(),
        registry_ca: full.registry_ca.clone(),
        registry_cert: full.registry_cert.clone(),
        registry_key: full.registry_key.clone(),
        registry_user: full.registry_user.clone(),
        registry_password_file: full.registry_password_file.clone(),
        registry_allow: full.registry_allow.clone(),
        registry_allow_prefix: full.registry_allow_prefix.clone(),
        registry_publish: full.registry_publish.clone(),
        public_ip: full.public_ip,
        iface: full.iface.clone(),
        iface_regex: full.iface_regex.clone(),
        iface_can_reach: full.iface_can_reach,
        ..parse("").unwrap()
    };
    assert!(full.is_encrypted() && full.peers.iter().any(|peer| peer.name.key().is_some()));
    // These are not there until they are asked for.
    let without = Config {
        registry_prefix: Some(without.registry_files().prefix().to_string()),
        registry_ttl: Some(without.registry_ttl_seconds()),
        // There is no default.
        keepalive_seconds: full.keepalive_seconds,
        registry_cache: Some(without.registry_cache()),
        subnet_file: Some(without.subnet_file()),
        ..without
    };
    assert_eq!(full, without);
    assert_eq!(full.listen.unwrap().port(), DEFAULT_PORT);
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
        "keepalive",
        "private-key",
        "peer",
        "endpoint",
        "public-key",
        "preshared-key-file",
        "persistent-keepalive",
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
    if let Err(error) = parse(bytes) {
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
}
