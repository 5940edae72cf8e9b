//! What the tables and lines look like.

use super::*;
use crate::control::protocol::{RegistryStatus, RouteEntry, WireGuardStatus};
use crate::testbed::demo::Figures;

fn counters(named: &[(&str, u64)]) -> BTreeMap<String, u64> {
    let named = named.iter().map(|(name, value)| (name.to_string(), *value));
    named.collect()
}

fn a_status() -> Status {
    Status {
        version: "0.1.0".into(),
        pid: 4711,
        uptime_seconds: 277_200,
        boottime_ns: None,
        tun: "fastvpn0".into(),
        addresses: vec![
            "10.244.2.2/24".parse().unwrap(),
            "fd00:244:2::2/64".parse().unwrap(),
        ],
        tun_index: Some(7),
        mtu_bytes: 1472,
        listen: "0.0.0.0:8285".into(),
        own_ports: vec![61118, 61119],
        public_key: None,
        handshakes: BTreeMap::new(),
        engine: "io_uring".into(),
        offloads: "TSO on, USO off, UDP_SEGMENT on, UDP_GRO on".into(),
        aqm: "fq_codel".into(),
        queue_limit: "auto".into(),
        hop: false,
        keeps_routes: true,
        config_file: Some("/etc/fastvpn.toml".into()),
        reload_error: None,
        upgrade_error: None,
        registry: None,
        peers: 2,
        prefixes: 1,
        counters: counters(&[
            ("packets_sent", 1_500_000),
            ("bytes_sent", 12_345_678_901),
            ("udp_sends", 23_100),
            ("packets_received", 1),
            ("bytes_received", 84),
            ("udp_receives", 1),
            ("tun_reads", 23_100),
            ("tun_writes", 1),
            ("icmp_sent", 0),
            ("receive_failed", 5),
        ]),
        drops: counters(&[("no_route", 12), ("send_full", 3_400)]),
        tun_queue_drops: Some(7),
        workers: vec![
            counters(&[
                ("packets_sent", 1_500_000),
                ("bytes_sent", 12_345_678_901),
                ("drop_no_route", 12),
                ("drop_send_full", 3_400),
            ]),
            counters(&[("packets_received", 1), ("bytes_received", 84)]),
        ],
        capture: None,
    }
}

#[test]
fn who_captures_is_seen() {
    let shown = super::status(&Status {
        capture: Some(CaptureStatus {
            pid: 77,
            uid: 0,
            seconds: 12,
            packets: 1_200_000,
            lost: 3,
        }),
        ..a_status()
    });
    let line = "capture        by process 77 of user 0 for 12 s: 1.2 M packets, 3 lost";
    assert!(shown.lines().any(|shown| shown == line), "{shown}");
}

#[test]
fn status_in_full() {
    let expected = "
fastvpn 0.1.0, process 4711, up 3 d 5 h

device         fastvpn0, MTU 1472 bytes
addresses      10.244.2.2/24, fd00:244:2::2/64
listening on   0.0.0.0:8285
sending from   port 8285, and 61118, 61119 to peers that these are known to reach
engine         io_uring
offloads       TSO on, USO off, UDP_SEGMENT on, UDP_GRO on
queues         aqm fq_codel, limit auto
IP hop         no
kernel routes  one per prefix
configuration  /etc/fastvpn.toml
peers          2, with 1 prefix
sent           1.5 M packets (12.3 GB) in 23.1 k sends
received       1 packet (84 B) in 1 receive
TUN            23.1 k vnet packets read, 1 written
dropped        no-route 12, send-full 3400, tun-queue-full 7
also counted   receive-failed 5

WORKER     SENT  PACKETS  RECEIVED  PACKETS  DROPPED
     0  12.3 GB    1.5 M       0 B        0     3412
     1      0 B        0      84 B        1        0
";
    assert_eq!(status(&a_status()), expected.trim_start_matches('\n'));
}

#[test]
fn status_of_a_tunnel_that_has_just_started() {
    let new = Status {
        keeps_routes: false,
        hop: true,
        ..Status::default()
    };
    let text = status(&new);
    for line in [
        "up 0 s\n",
        "addresses      none\n",
        "IP hop         yes\n",
        "kernel routes  none for prefixes\n",
        "peers          0, with 0 prefixes\n",
        "sent           0 packets (0 B) in 0 sends\n",
        "dropped        none\n",
    ] {
        assert!(text.contains(line), "{line:?} in {text}");
    }
    for absent in ["configuration", "last reload", "also counted"] {
        assert!(!text.contains(absent), "{absent} in {text}");
    }
}

#[test]
fn status_shows_a_failed_reload_on_one_line() {
    let failed = Status {
        reload_error: Some("line 3: \x1b[31mno\npeer".into()),
        upgrade_error: Some("process 7 has not taken over".into()),
        ..a_status()
    };
    let line = "\nlast reload    changed nothing: line 3: \\u{1b}[31mno\\npeer\n";
    assert!(status(&failed).contains(line), "{}", status(&failed));
    let line = "\nlast upgrade   process 7 has not taken over\n";
    assert!(status(&failed).contains(line), "{}", status(&failed));
}

#[test]
fn drop_counts_of_any_size_are_shown() {
    let full = Status {
        workers: vec![counters(&[("drop_a", u64::MAX), ("drop_b", 1)])],
        ..Status::default()
    };
    assert!(status(&full).ends_with(&format!("{}\n", u64::MAX)));
}

#[test]
fn a_line_per_peer() {
    let all = Peers {
        boottime_ns: None,
        peers: vec![
            PeerStatus {
                peer: "10.0.0.2:8285".into(),
                endpoint: "10.0.0.2:8285".parse().ok(),
                origin: "config".into(),
                prefixes: 1,
                path_mtu_bytes: Some(1500),
                packets_sent: 1_234_567,
                bytes_sent: 12_345_678_901,
                packets_received: 999,
                bytes_received: 84_000,
                last_seen_seconds: Some(215),
                drops: counters(&[("send_error", 3), ("source_not_allowed", 12)]),
                own_ports_proven: 3,
                state: Some(Liveness::Unreachable),
                state_reason: Some("connection refused".into()),
                ..PeerStatus::default()
            },
            PeerStatus {
                peer: "hub.example:9000".into(),
                endpoint: "[fd00::1]:9000".parse().ok(),
                seen_port: Some(9001),
                origin: "runtime".into(),
                is_default: true,
                last_seen_seconds: Some(0),
                state: Some(Liveness::Alive),
                ..PeerStatus::default()
            },
            PeerStatus {
                peer: "no\x1bsuch.invalid:8285".into(),
                origin: "config".into(),
                prefixes: 100,
                ..PeerStatus::default()
            },
        ],
    };
    let expected = "
PEER                       ADDRESS                             STATE                             SENT FROM    ORIGIN   PREFIXES  PATH MTU     SENT  PACKETS  RECEIVED  PACKETS       LAST SEEN  DROPPED
10.0.0.2:8285              10.0.0.2:8285                       unreachable (connection refused)  own ports    config          1      1500  12.3 GB    1.2 M   84.0 kB      999  3 min 35 s ago  send-error 3, source-not-allowed 12
hub.example:9000           [fd00::1]:9000 (seen at port 9001)  alive                             listen port  runtime  the rest         -      0 B        0       0 B        0             now  none
no\\u{1b}such.invalid:8285  not resolved                        -                                 listen port  config        100         -      0 B        0       0 B        0           never  none
";
    assert_eq!(peers(&all), expected.trim_start_matches('\n'));
    assert_eq!(peers(&Peers::default()), "no peers\n");
    let both = PeerStatus {
        is_default: true,
        prefixes: 2,
        ..PeerStatus::default()
    };
    assert_eq!(prefixes(&both), "2 + the rest");
    let suspended = PeerStatus {
        endpoint: "10.0.0.2:8285".parse().ok(),
        is_suspended: true,
        ..PeerStatus::default()
    };
    assert_eq!(address(&suspended), "10.0.0.2:8285 (suspended)");
}

#[test]
fn a_line_per_peer_with_a_key() {
    let all = Peers {
        boottime_ns: None,
        peers: vec![
            PeerStatus {
                peer: "xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg=".into(),
                wireguard: Some(WireGuardStatus {
                    identity: None,
                    has_preshared_key: true,
                    persistent_keepalive_seconds: Some(25),
                    latest_handshake_seconds: Some(75),
                }),
                endpoint: "192.0.2.2:51820".parse().ok(),
                origin: "config".into(),
                prefixes: 1,
                path_mtu_bytes: Some(1500),
                packets_sent: 12,
                bytes_sent: 8400,
                packets_received: 9,
                bytes_received: 840,
                last_seen_seconds: Some(2),
                ..PeerStatus::default()
            },
            PeerStatus {
                peer: "hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=".into(),
                wireguard: Some(WireGuardStatus::default()),
                origin: "runtime".into(),
                prefixes: 2,
                ..PeerStatus::default()
            },
        ],
    };
    let expected = "
PEER                                          ENDPOINT         ORIGIN   PREFIXES  PATH MTU    SENT  PACKETS  RECEIVED  PACKETS  LATEST HANDSHAKE  LAST SEEN  KEEPALIVE  DROPPED
xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg=  192.0.2.2:51820  config          1      1500  8.4 kB       12     840 B        9    1 min 15 s ago    2 s ago       25 s  none
hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=  no endpoint yet  runtime         2         -     0 B        0       0 B        0             never      never        off  none
";
    assert_eq!(peers(&all), expected.trim_start_matches('\n'));
}

#[test]
fn a_line_per_prefix() {
    let entry = |prefix: &str, peer: &str, is_resolved: bool, origin: &str| RouteEntry {
        prefix: prefix.parse().unwrap(),
        peer: peer.into(),
        endpoint: is_resolved.then(|| "192.0.2.1:8285".parse().unwrap()),
        origin: origin.into(),
    };
    let all = Routes {
        routes: vec![
            entry("10.1.0.0/16", "10.0.0.2:8285", true, "config"),
            entry("fd00:1::/64", "vpn.invalid:8285", false, "runtime"),
        ],
    };
    let expected = "
PREFIX       PEER                             ORIGIN
10.1.0.0/16  10.0.0.2:8285                    config
fd00:1::/64  vpn.invalid:8285 (not resolved)  runtime
";
    assert_eq!(routes(&all), expected.trim_start_matches('\n'));
    assert_eq!(routes(&Routes::default()), "no prefixes\n");
}

#[test]
fn one_line_for_an_address() {
    let by = |prefix: Option<&str>, peer: &str, endpoint: Option<&str>| {
        found(&Found {
            address: "10.1.2.3".parse().unwrap(),
            prefix: prefix.map(|prefix| prefix.parse().unwrap()),
            peer: peer.into(),
            endpoint: endpoint.map(|endpoint| endpoint.parse().unwrap()),
        })
    };
    assert_eq!(
        by(Some("10.1.0.0/16"), "10.0.0.2:8285", Some("10.0.0.2:8285")),
        "10.1.2.3 to 10.0.0.2:8285, by prefix 10.1.0.0/16\n"
    );
    assert_eq!(
        by(None, "vpn.example:8285", Some("192.0.2.1:8285")),
        "10.1.2.3 to vpn.example:8285 (192.0.2.1:8285), as no prefix matches\n"
    );
    assert_eq!(
        by(Some("10.1.2.3/32"), "vpn.invalid:8285", None),
        "10.1.2.3 to vpn.invalid:8285 (not resolved), by prefix 10.1.2.3/32\n"
    );
}

#[test]
fn changes_are_counted() {
    let of = |peers_added, peers_removed, prefixes_added, prefixes_removed| Changed {
        prefixes_added,
        prefixes_removed,
        peers_added,
        peers_removed,
        peers_changed: 0,
    };
    for (change, line) in [
        (of(0, 0, 2, 0), "2 prefixes added\n"),
        (of(0, 0, 0, 1), "1 prefix removed\n"),
        (of(1, 0, 1, 0), "1 peer added, 1 prefix added\n"),
        (of(0, 2, 0, 3), "2 peers removed, 3 prefixes removed\n"),
        (of(0, 0, 0, 0), "nothing has changed\n"),
    ] {
        assert_eq!(changed(&change), line);
    }
}

#[test]
fn reloads_name_options_that_wait_for_a_restart() {
    let some = Reloaded {
        changed: Changed {
            peers_added: 1,
            ..Changed::default()
        },
        settings_changed: vec!["hop".into(), "mtu".into()],
        needs_restart: vec!["queues".into()],
    };
    assert_eq!(
        reloaded(&some),
        "reloaded: 1 peer added; changed: hop, mtu; at the next start: queues\n"
    );
    assert_eq!(
        reloaded(&Reloaded::default()),
        "reloaded: nothing has changed\n"
    );
    let later = Reloaded {
        needs_restart: vec!["io".into()],
        ..Reloaded::default()
    };
    assert_eq!(
        reloaded(&later),
        "reloaded: nothing has changed; at the next start: io\n"
    );
}

#[test]
fn the_demo_compares_the_tunnel_with_veth() {
    let figures = |gigabits_per_second, ping_p50_us| Figures {
        gigabits_per_second,
        ping_p50_us,
        ping_p99_us: 120.0,
    };
    let measured = Measured {
        tunnel: figures(16.0, 60.0),
        veth: figures(32.0, 30.0),
        cpu_seconds_per_gb: 0.5,
    };
    let expected = "
                           tunnel  bare veth  ratio
TCP throughput, Gbit/s       16.0       32.0   0.50
ping p50, µs                 60.0       30.0   2.00
ping p99, µs                120.0      120.0   1.00
tunnel CPU seconds per GB    0.50          -
";
    assert_eq!(
        super::measured(&measured),
        expected.trim_start_matches('\n')
    );
}

#[test]
fn a_registry_has_its_lines() {
    let registry = RegistryStatus {
        url: "http://10.0.0.9:2379".into(),
        is_connected: true,
        error: None,
        alarm: Some("taken".into()),
        is_config_changed: true,
        cluster: "1f".into(),
        revision: 7,
        network: "10.50.0.0/16".parse().unwrap(),
        subnet: "10.50.7.0/24".parse().unwrap(),
        public_ip: "10.0.0.2".parse().unwrap(),
        lease_ttl_seconds: Some(86_400),
        lease_renewed_seconds: Some(5),
        hosts: 1000,
        held: 0,
        malformed: 2,
        not_allowed: 0,
        out_of_place: 0,
        other_backend: 1,
        connections: 1,
        events: 0,
    };
    let with = |registry| {
        super::status(&Status {
            registry,
            ..a_status()
        })
    };
    let text = with(Some(registry.clone()));
    for part in [
        "connected to http://10.0.0.9:2379",
        "10.50.0.0/16, 1000 hosts, this one 10.0.0.2 with 10.50.7.0/24; its configuration",
        "renewed 5 s ago",
        "2 cannot be read, 1 of another backend",
        "taken",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    let lost = RegistryStatus {
        is_connected: false,
        error: Some("no answer".into()),
        ..registry
    };
    assert!(with(Some(lost)).contains("not connected: no answer"));
    assert!(!with(None).contains("registry"));
}

#[test]
fn a_host_of_a_registry_has_the_time_of_its_lease() {
    let peer = |lease_left_seconds, wireguard| PeerStatus {
        peer: "10.0.0.2:8285".into(),
        origin: "registry".into(),
        lease_left_seconds,
        wireguard,
        ..PeerStatus::default()
    };
    for wireguard in [None, Some(WireGuardStatus::default())] {
        let with = |left| {
            let peers = vec![peer(left, wireguard.clone())];
            super::peers(&Peers {
                peers,
                ..Peers::default()
            })
        };
        assert!(with(Some(86_340)).contains("registry, 23 h 59 min left"));
        assert!(with(None).contains("registry "));
    }
}
