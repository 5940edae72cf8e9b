use std::collections::{BTreeMap, BTreeSet};

use super::*;
use crate::control::protocol::{Liveness, PeerStatus, RegistryStatus, Status, WireGuardStatus};
use crate::counters;
use crate::wireguard::HandshakeCounters;

const KEY: &str = "xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg=";

/// Seconds since 1970.
const TAKEN_AT_S: u64 = 1_700_000_000;

/// All of a worker's counters, with values of their own.
fn worker(first: u64) -> BTreeMap<String, u64> {
    let names = counters::Snapshot::default();
    let named = names.iter().zip(first..);
    named
        .map(|((name, _), value)| (name.into(), value))
        .collect()
}

fn peer(name: &str) -> PeerStatus {
    PeerStatus {
        peer: name.into(),
        wireguard: Some(WireGuardStatus {
            identity: Some("gate".into()),
            latest_handshake_seconds: Some(75),
            ..WireGuardStatus::default()
        }),
        origin: "config".into(),
        path_mtu_bytes: Some(1500),
        packets_sent: 7,
        bytes_sent: 7000,
        packets_enqueued: 9,
        bytes_enqueued: 9000,
        last_seen_seconds: Some(5),
        state: Some(Liveness::Silent),
        drops: BTreeMap::from([("forged".into(), 2)]),
        ..PeerStatus::default()
    }
}

/// A tunnel that has everything.
fn snapshot() -> Snapshot {
    let handshakes = HandshakeCounters::default();
    handshakes.responses_received.add(3);
    let handshakes = handshakes.values().chain([("drop_at_socket", 7)]);
    Snapshot {
        taken_at: UNIX_EPOCH + Duration::from_millis(1000 * TAKEN_AT_S + 999),
        status: Status {
            version: "1.2.3".into(),
            tun: "fastvpn0".into(),
            engine: "io_uring".into(),
            public_key: Some(KEY.into()),
            mtu_bytes: 1420,
            tun_queue_drops: Some(5),
            uptime_seconds: 60,
            peers: 1,
            workers: vec![worker(1000), worker(2000)],
            handshakes: handshakes
                .map(|(name, value)| (name.to_string(), value))
                .collect(),
            registry: Some(RegistryStatus {
                url: "https://10.0.0.10:2379".into(),
                is_connected: true,
                error: None,
                alarm: None,
                is_config_changed: false,
                cluster: "c1".into(),
                revision: 4711,
                network: "10.50.0.0/16".parse().unwrap(),
                subnet: "10.50.1.0/24".parse().unwrap(),
                public_ip: "10.0.0.2".parse().unwrap(),
                lease_ttl_seconds: Some(86_400),
                lease_renewed_seconds: Some(100),
                hosts: 3,
                held: 0,
                malformed: 1,
                not_allowed: 0,
                out_of_place: 0,
                other_backend: 0,
                connections: 2,
                events: 12,
            }),
            ..Status::default()
        },
        peers: vec![peer(KEY)],
        readiness: Ok(()),
    }
}

/// The lines of `# TYPE`: names and types.
fn families(text: &str) -> BTreeMap<&str, &str> {
    let lines = text.lines().filter_map(|line| line.strip_prefix("# TYPE "));
    lines.map(|line| line.split_once(' ').unwrap()).collect()
}

/// The names of a sample's labels, in order. No value has a quotation mark.
fn labels(sample: &str) -> Vec<&str> {
    let (_, labels) = sample.split_once('{').unwrap_or_default();
    let names = labels.split('"').step_by(2);
    let names = names.filter_map(|part| part.strip_suffix('='));
    names.map(|name| name.trim_start_matches(',')).collect()
}

#[test]
fn numbers_have_their_names() {
    let text = to_text(snapshot()).unwrap();
    let sent = |first: u64| worker(first)["packets_sent"];
    let sojourn_s = worker(1000)["queue_sojourn_ns"] as f64 / 1e9;
    for line in [
        "fastvpn_build_info{version=\"1.2.3\"} 1".to_string(),
        "fastvpn_tunnel_info{tun=\"fastvpn0\",engine=\"io_uring\",mode=\"wireguard\"} 1".into(),
        "fastvpn_ready 1".into(),
        "fastvpn_mtu_bytes 1420".into(),
        "fastvpn_tun_queue_overrun_packets_total 5".into(),
        "fastvpn_uptime_seconds 60".into(),
        format!(
            "fastvpn_worker_sent_packets_total{{worker=\"0\"}} {}",
            sent(1000)
        ),
        format!(
            "fastvpn_worker_sent_packets_total{{worker=\"1\"}} {}",
            sent(2000)
        ),
        format!("fastvpn_worker_queue_sojourn_seconds_total{{worker=\"0\"}} {sojourn_s}"),
        // What was dropped is not taken back: a counter only grows.
        format!("fastvpn_peer_sent_packets_total{{peer=\"{KEY}\"}} 9"),
        format!("fastvpn_peer_sent_bytes_total{{peer=\"{KEY}\"}} 9000"),
        format!("fastvpn_peer_dropped_packets_total{{peer=\"{KEY}\",reason=\"forged\"}} 2"),
        format!("fastvpn_peer_info{{peer=\"{KEY}\",origin=\"config\",identity=\"gate\"}} 1"),
        format!(
            "fastvpn_peer_last_seen_timestamp_seconds{{peer=\"{KEY}\"}} {}",
            TAKEN_AT_S - 5
        ),
        format!(
            "fastvpn_peer_latest_handshake_timestamp_seconds{{peer=\"{KEY}\"}} {}",
            TAKEN_AT_S - 75
        ),
        "fastvpn_handshake_received_messages_total{type=\"response\"} 3".into(),
        "fastvpn_handshake_dropped_messages_total{reason=\"at_socket\"} 7".into(),
        format!("fastvpn_peer_state{{peer=\"{KEY}\",state=\"silent\"}} 1"),
        "fastvpn_registry_revision 4711".into(),
        "fastvpn_registry_unused_entries{reason=\"malformed\"} 1".into(),
        "fastvpn_registry_events_total 12".into(),
    ] {
        assert!(
            text.lines().any(|it| it == line),
            "{line} is not in\n{text}"
        );
    }
}

/// A counter that is new has to be given a name.
#[test]
fn nothing_that_is_counted_is_left_out() {
    let known: BTreeSet<_> = workers::COUNTERS.iter().map(|(name, _)| *name).collect();
    for (name, _) in counters::Snapshot::default().iter() {
        let is_known = name.starts_with(workers::DROP) || known.contains(name);
        assert!(is_known, "{name}");
    }
    let known: BTreeSet<_> = tunnel::handshake_counters().collect();
    for (name, _) in HandshakeCounters::default().values() {
        let is_known = name.starts_with(workers::DROP) || known.contains(name);
        assert!(is_known, "{name}");
    }
}

/// <https://prometheus.io/docs/practices/naming>, and what promtool looks for.
#[test]
fn names_follow_the_conventions() {
    let text = to_text(snapshot()).unwrap();
    let helped: BTreeSet<_> = text
        .lines()
        .filter_map(|line| line.strip_prefix("# HELP ")?.split_once(' '))
        .filter(|(_, help)| help.ends_with('.'))
        .map(|(name, _)| name)
        .collect();
    for (name, kind) in families(&text) {
        assert!(
            name.starts_with("fastvpn_") && helped.contains(name),
            "{name}"
        );
        assert_eq!(kind == "counter", name.ends_with("_total"), "{name}");
        assert!(!name.contains("_ns") && !name.contains("_ms"), "{name}");
    }
    for sample in text.lines().filter(|line| !line.starts_with('#')) {
        let name = sample.split(['{', ' ']).next().unwrap();
        assert!(families(&text).contains_key(name), "{sample}");
    }
}

/// What is not there has no lines, and not even a heading.
#[test]
fn a_tunnel_without_all_that_says_so_by_silence() {
    let mut bare = snapshot();
    bare.status.registry = None;
    bare.status.handshakes.clear();
    bare.status.public_key = None;
    bare.status.tun_queue_drops = None;
    bare.status.reload_error = Some("bad".into());
    bare.peers = vec![PeerStatus {
        peer: "10.0.0.2:8285".into(),
        ..PeerStatus::default()
    }];
    bare.readiness = Err("no");
    let text = to_text(bare).unwrap();
    for part in [
        "_registry_",
        "_handshake",
        "_last_seen",
        "tun_queue_overrun",
        "peer_dropped",
        "path_mtu",
    ] {
        assert!(!text.contains(part), "{part} is in\n{text}");
    }
    for line in ["fastvpn_ready 0", "fastvpn_last_reload_successful 0"] {
        assert!(text.lines().any(|it| it == line), "{line}");
    }
    assert!(text.contains("mode=\"plain\""));
}

/// A name may come from a configuration or from the network.
#[test]
fn labels_are_escaped() {
    let mut odd = snapshot();
    odd.peers = vec![peer("a\"} 1\nevil 1\\")];
    let text = to_text(odd).unwrap();
    assert!(!text.lines().any(|line| line.starts_with("evil")), "{text}");
    assert!(text.contains(r#"{peer="a\"} 1\nevil 1\\"}"#), "{text}");
}

/// What a scrape of many peers comes to.
#[test]
fn the_size_is_bounded() {
    let mut large = snapshot();
    large.peers = vec![peer(KEY); super::super::PEERS_SHOWN_MAX];
    let bytes = to_text(large).unwrap().len();
    assert!(bytes < 8_000_000, "{bytes}");
}

/// docs/metrics.md has a line for each family, with its type and its labels, and no others.
#[test]
fn the_documentation_has_them_all() {
    let text = to_text(snapshot()).unwrap();
    let types = families(&text);
    let mut served = BTreeMap::new();
    for sample in text.lines().filter(|line| !line.starts_with('#')) {
        let name = sample.split(['{', ' ']).next().unwrap();
        let labels = labels(sample)
            .iter()
            .map(|it| format!("`{it}`"))
            .collect::<Vec<_>>();
        served.insert(
            name.to_string(),
            (types[name].to_string(), labels.join(", ")),
        );
    }
    let page = include_str!("../../../../docs/metrics.md");
    let mut documented = BTreeMap::new();
    for line in page.lines().filter(|line| line.starts_with("| `fastvpn_")) {
        let mut cells = line.split('|').map(str::trim).skip(1);
        let mut cell = || cells.next().unwrap().to_string();
        let (name, kind, labels, meaning) = (cell(), cell(), cell(), cell());
        assert!(!meaning.is_empty(), "{name}");
        documented.insert(name.trim_matches('`').to_string(), (kind, labels));
    }
    assert_eq!(documented, served);
}
