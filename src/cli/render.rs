//! Answers as a person reads them.

use std::collections::BTreeMap;

use super::table::Table;
use super::units::{ago, count, counted, duration, exactly};
use crate::control::protocol::{Changed, Found, PeerStatus, Peers, Reloaded, Routes, Status};
use crate::control::summary::bytes;
use crate::control::text::printable;
use crate::testbed::demo::{Figures, Measured};

/// What stands where an address would, if the name server knows none.
const NOT_RESOLVED: &str = "not resolved";

/// Counters that [`status`] has words for. It lists others by their names.
const COUNTERS_IN_WORDS: [&str; 8] = [
    "packets_sent",
    "bytes_sent",
    "trains_sent",
    "packets_received",
    "bytes_received",
    "trains_received",
    "tun_frames_read",
    "tun_frames_written",
];

/// The tunnel as a whole, then a line for each worker.
pub(super) fn status(status: &Status) -> String {
    let Status {
        version, pid, tun, ..
    } = status;
    let mut text = format!(
        "fastvpn {}, process {pid}, up {}\n\n",
        printable(version),
        duration(status.uptime_seconds)
    );
    let addresses: Vec<String> = status.addresses.iter().map(ToString::to_string).collect();
    let device = match status.tun_index {
        Some(_) => format!("{tun}, MTU {} bytes", status.mtu_bytes),
        None => format!("{tun}, in another network namespace"),
    };
    let kernel_routes = match status.keeps_routes {
        true => "one per prefix",
        false => "none for prefixes",
    };
    let prefixes = exactly(status.prefixes, "prefix", "prefixes");
    let mut lines: Vec<(&str, String)> = vec![
        ("device", device),
        ("addresses", or_none(&addresses)),
        ("listening on", status.listen.clone()),
        ("sending from", sending_from(status)),
        ("engine", status.engine.clone()),
        ("offloads", status.offloads.clone()),
        ("IP hop", if status.hop { "yes" } else { "no" }.into()),
        ("kernel routes", kernel_routes.into()),
    ];
    if let Some(file) = &status.config_file {
        lines.push(("configuration", file.clone()));
    }
    if let Some(error) = &status.reload_error {
        lines.push(("last reload", format!("changed nothing: {error}")));
    }
    lines.push(("peers", format!("{}, with {prefixes}", status.peers)));
    lines.extend(traffic(&status.counters));
    lines.push(("dropped", drops(status)));
    let mut others = status.counters.clone();
    others.retain(|name, _| !COUNTERS_IN_WORDS.contains(&name.as_str()));
    let others = named_counts(&others);
    if !others.is_empty() {
        lines.push(("also counted", others.join(", ")));
    }
    text += &labelled(&lines);
    text.push('\n');
    text += &workers(&status.workers);
    text
}

/// A line for each of several tunnels.
pub(super) fn tunnels<'a>(all: impl Iterator<Item = &'a Status>) -> String {
    let mut table = Table::new([
        "TUNNEL",
        ">PROCESS",
        ">UP",
        "LISTENING ON",
        ">PEERS",
        ">PREFIXES",
        "ADDRESSES",
    ]);
    for status in all {
        let addresses: Vec<String> = status.addresses.iter().map(ToString::to_string).collect();
        table.push([
            status.tun.clone(),
            status.pid.to_string(),
            duration(status.uptime_seconds),
            status.listen.clone(),
            status.peers.to_string(),
            status.prefixes.to_string(),
            or_none(&addresses),
        ]);
    }
    table.text() + "\n`fastvpn status --tun TUNNEL` shows one of them\n"
}

/// Label and text, the texts below each other.
fn labelled(lines: &[(&str, String)]) -> String {
    let width = lines.iter().map(|(label, _)| label.len()).max();
    let width = width.unwrap_or(0);
    let lines = lines
        .iter()
        .map(|(label, line)| format!("{label:<width$}  {}\n", printable(line)));
    lines.collect()
}

/// The ports that a firewall sees.
fn sending_from(status: &Status) -> String {
    let listen = status.listen.rsplit(':').next().unwrap_or_default();
    let own: Vec<String> = status.own_ports.iter().map(u16::to_string).collect();
    match own.is_empty() {
        true => format!("port {listen}"),
        false => format!(
            "port {listen}, and {} to peers that these are known to reach",
            own.join(", ")
        ),
    }
}

fn or_none(list: &[String]) -> String {
    if list.is_empty() {
        "none".into()
    } else {
        list.join(", ")
    }
}

fn traffic(counters: &BTreeMap<String, u64>) -> [(&'static str, String); 3] {
    let of = |name: &str| counters.get(name).copied().unwrap_or(0);
    let moved = |direction: &str, one, many| {
        let packets = counted(of(&format!("packets_{direction}")), "packet", "packets");
        let bytes = bytes(of(&format!("bytes_{direction}")));
        let calls = counted(of(&format!("trains_{direction}")), one, many);
        format!("{packets} ({bytes}) in {calls}")
    };
    let read = counted(of("tun_frames_read"), "frame", "frames");
    let written = count(of("tun_frames_written"));
    [
        ("sent", moved("sent", "send", "sends")),
        ("received", moved("received", "receive", "receives")),
        ("TUN", format!("{read} read, {written} written")),
    ]
}

/// Counts that are not zero, by names as the log writes them.
fn named_counts(counts: &BTreeMap<String, u64>) -> Vec<String> {
    counts
        .iter()
        .filter(|(_, count)| **count > 0)
        .map(|(name, count)| format!("{} {count}", name.replace('_', "-")))
        .collect()
}

/// Exact: a few drops among many are what one looks for.
fn drops(status: &Status) -> String {
    let mut reasons = status.drops.clone();
    reasons.insert("tun_queue_full".into(), status.tun_queue_drops);
    or_none(&named_counts(&reasons))
}

fn workers(workers: &[BTreeMap<String, u64>]) -> String {
    let mut table = Table::new([
        ">WORKER",
        ">SENT",
        ">PACKETS",
        ">RECEIVED",
        ">PACKETS",
        ">DROPPED",
    ]);
    for (index, counters) in workers.iter().enumerate() {
        let of = |name: &str| counters.get(name).copied().unwrap_or(0);
        let dropped = counters
            .iter()
            .filter(|(name, _)| name.starts_with("drop_"))
            .fold(0, |sum: u64, (_, count)| sum.saturating_add(*count));
        table.push([
            index.to_string(),
            bytes(of("bytes_sent")),
            count(of("packets_sent")),
            bytes(of("bytes_received")),
            count(of("packets_received")),
            dropped.to_string(),
        ]);
    }
    table.text()
}

/// A line for each peer.
pub(super) fn peers(peers: &Peers) -> String {
    if peers.peers.is_empty() {
        return "no peers\n".into();
    }
    let mut table = Table::new([
        "PEER",
        "ADDRESS",
        "SENT FROM",
        "ORIGIN",
        ">PREFIXES",
        ">PATH MTU",
        ">SENT",
        ">PACKETS",
        ">RECEIVED",
        ">PACKETS",
        ">LAST HEARD",
        "DROPPED",
    ]);
    for peer in &peers.peers {
        table.push([
            peer.peer.clone(),
            address(peer),
            sent_from(peer).into(),
            peer.origin.clone(),
            behind(peer),
            peer.path_mtu_bytes
                .map_or("-".into(), |mtu_bytes| mtu_bytes.to_string()),
            bytes(peer.bytes_sent),
            count(peer.packets_sent),
            bytes(peer.bytes_received),
            count(peer.packets_received),
            peer.last_heard_seconds.map_or("never".into(), ago),
            or_none(&named_counts(&peer.drops)),
        ]);
    }
    table.text()
}

fn address(peer: &PeerStatus) -> String {
    match peer.endpoint {
        None => NOT_RESOLVED.into(),
        Some(endpoint) if peer.is_suspended => format!("{endpoint} (suspended)"),
        Some(endpoint) => match peer.seen_port {
            Some(port) if port != endpoint.port() => format!("{endpoint} (seen at port {port})"),
            _ => endpoint.to_string(),
        },
    }
}

/// Which of our ports its datagrams come from.
fn sent_from(peer: &PeerStatus) -> &'static str {
    match peer.own_ports_proven {
        0 => "listen port",
        _ => "own ports",
    }
}

/// How many prefixes a peer has. The one that was given none takes the rest,
/// though it may have got some since.
fn behind(peer: &PeerStatus) -> String {
    match (peer.is_default, peer.prefixes) {
        (false, count) => count.to_string(),
        (true, 0) => "the rest".into(),
        (true, count) => format!("{count} + the rest"),
    }
}

/// A line for each prefix.
pub(super) fn routes(routes: &Routes) -> String {
    if routes.routes.is_empty() {
        return "no prefixes\n".into();
    }
    let mut table = Table::new(["PREFIX", "PEER", "ORIGIN"]);
    for route in &routes.routes {
        let peer = match route.endpoint {
            Some(_) => route.peer.clone(),
            None => format!("{} ({NOT_RESOLVED})", route.peer),
        };
        table.push([route.prefix.to_string(), peer, route.origin.clone()]);
    }
    table.text()
}

/// Where packets to an address go, in one line.
pub(super) fn found(found: &Found) -> String {
    let Found { address, peer, .. } = found;
    let why = match found.prefix {
        Some(prefix) => format!("by prefix {prefix}"),
        None => "as no prefix matches".into(),
    };
    let at = match found.endpoint.map(|endpoint| endpoint.to_string()) {
        None => format!(" ({NOT_RESOLVED})"),
        Some(endpoint) if endpoint == *peer => String::new(),
        Some(endpoint) => format!(" ({endpoint})"),
    };
    format!("{address} to {}{at}, {why}\n", printable(peer))
}

/// What a change came to, in one line.
pub(super) fn changed(changed: &Changed) -> String {
    counts(changed).unwrap_or_else(|| "nothing has changed".into()) + "\n"
}

/// `None` if nothing has changed.
fn counts(changed: &Changed) -> Option<String> {
    let peers = |number| (number, exactly(number, "peer", "peers"));
    let prefixes = |number| (number, exactly(number, "prefix", "prefixes"));
    let parts = [
        (peers(changed.peers_added), "added"),
        (peers(changed.peers_removed), "removed"),
        (prefixes(changed.prefixes_added), "added"),
        (prefixes(changed.prefixes_removed), "removed"),
    ];
    let some = parts.into_iter().filter(|((number, _), _)| *number > 0);
    let some: Vec<_> = some
        .map(|((_, what), done)| format!("{what} {done}"))
        .collect();
    (!some.is_empty()).then(|| some.join(", "))
}

/// What a reload came to, in one line.
pub(super) fn reloaded(reloaded: &Reloaded) -> String {
    let mut parts: Vec<_> = counts(&reloaded.changed).into_iter().collect();
    if !reloaded.settings_changed.is_empty() {
        parts.push(format!("changed: {}", reloaded.settings_changed.join(", ")));
    }
    if parts.is_empty() {
        parts.push("nothing has changed".into());
    }
    if !reloaded.needs_restart.is_empty() {
        let settings = reloaded.needs_restart.join(", ");
        parts.push(format!("only after a restart: {settings}"));
    }
    format!("reloaded: {}\n", printable(&parts.join("; ")))
}

/// What the demo has measured: a line for each kind of figure.
pub(super) fn measured(measured: &Measured) -> String {
    let mut table = Table::new(["", ">tunnel", ">bare veth", ">ratio"]);
    let Measured { tunnel, veth, .. } = measured;
    let throughput = |figures: &Figures| figures.gigabits_per_second;
    let (p50, p99) = ("ping p50, µs", "ping p99, µs");
    for (name, [tunnel, veth]) in [
        ("TCP throughput, Gbit/s", [tunnel, veth].map(throughput)),
        (p50, [tunnel.ping_p50_us, veth.ping_p50_us]),
        (p99, [tunnel.ping_p99_us, veth.ping_p99_us]),
    ] {
        let [of_tunnel, of_veth] = [tunnel, veth].map(|figure| format!("{figure:.1}"));
        table.push([
            name.into(),
            of_tunnel,
            of_veth,
            format!("{:.2}", tunnel / veth),
        ]);
    }
    let cpu = format!("{:.2}", measured.cpu_seconds_per_gb);
    table.push([
        "tunnel CPU seconds per GB".into(),
        cpu,
        "-".into(),
        String::new(),
    ]);
    table.text()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::protocol::RouteEntry;
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
            tun: "fastvpn0".into(),
            addresses: vec![
                "10.244.2.2/24".parse().unwrap(),
                "fd00:244:2::2/64".parse().unwrap(),
            ],
            tun_index: Some(7),
            mtu_bytes: 1472,
            listen: "0.0.0.0:8285".into(),
            own_ports: vec![61118, 61119],
            engine: "io_uring".into(),
            offloads: "TSO on, USO off, UDP_SEGMENT on, UDP_GRO on".into(),
            hop: false,
            keeps_routes: true,
            config_file: Some("/etc/fastvpn.toml".into()),
            reload_error: None,
            peers: 2,
            prefixes: 1,
            counters: counters(&[
                ("packets_sent", 1_500_000),
                ("bytes_sent", 12_345_678_901),
                ("trains_sent", 23_100),
                ("packets_received", 1),
                ("bytes_received", 84),
                ("trains_received", 1),
                ("tun_frames_read", 23_100),
                ("tun_frames_written", 1),
                ("icmp_sent", 0),
                ("receive_failed", 5),
            ]),
            drops: counters(&[("no_route", 12), ("send_full", 3_400)]),
            tun_queue_drops: 7,
            workers: vec![
                counters(&[
                    ("packets_sent", 1_500_000),
                    ("bytes_sent", 12_345_678_901),
                    ("drop_no_route", 12),
                    ("drop_send_full", 3_400),
                ]),
                counters(&[("packets_received", 1), ("bytes_received", 84)]),
            ],
        }
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
IP hop         no
kernel routes  one per prefix
configuration  /etc/fastvpn.toml
peers          2, with 1 prefix
sent           1.5 M packets (12.3 GB) in 23.1 k sends
received       1 packet (84 B) in 1 receive
TUN            23.1 k frames read, 1 written
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
    fn status_tells_of_a_failed_reload_on_one_line() {
        let failed = Status {
            reload_error: Some("line 3: \x1b[31mno\npeer".into()),
            ..a_status()
        };
        let line = "\nlast reload    changed nothing: line 3: \\u{1b}[31mno\\npeer\n";
        assert!(status(&failed).contains(line), "{}", status(&failed));
    }

    #[test]
    fn drop_counts_of_any_size_are_no_reason_to_panic() {
        let full = Status {
            workers: vec![counters(&[("drop_a", u64::MAX), ("drop_b", 1)])],
            ..Status::default()
        };
        assert!(status(&full).ends_with(&format!("{}\n", u64::MAX)));
    }

    #[test]
    fn a_line_per_peer() {
        let all = Peers {
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
                    last_heard_seconds: Some(215),
                    drops: counters(&[("send_error", 3), ("source_not_allowed", 12)]),
                    own_ports_proven: 3,
                    ..PeerStatus::default()
                },
                PeerStatus {
                    peer: "hub.example:9000".into(),
                    endpoint: "[fd00::1]:9000".parse().ok(),
                    seen_port: Some(9001),
                    origin: "runtime".into(),
                    is_default: true,
                    last_heard_seconds: Some(0),
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
PEER                       ADDRESS                             SENT FROM    ORIGIN   PREFIXES  PATH MTU     SENT  PACKETS  RECEIVED  PACKETS  LAST HEARD  DROPPED
10.0.0.2:8285              10.0.0.2:8285                       own ports    config          1      1500  12.3 GB    1.2 M   84.0 kB      999   3 min ago  send-error 3, source-not-allowed 12
hub.example:9000           [fd00::1]:9000 (seen at port 9001)  listen port  runtime  the rest         -      0 B        0       0 B        0         now  none
no\\u{1b}such.invalid:8285  not resolved                        listen port  config        100         -      0 B        0       0 B        0       never  none
";
        assert_eq!(peers(&all), expected.trim_start_matches('\n'));
        assert_eq!(peers(&Peers::default()), "no peers\n");
        let both = PeerStatus {
            is_default: true,
            prefixes: 2,
            ..PeerStatus::default()
        };
        assert_eq!(behind(&both), "2 + the rest");
        let suspended = PeerStatus {
            endpoint: "10.0.0.2:8285".parse().ok(),
            is_suspended: true,
            ..PeerStatus::default()
        };
        assert_eq!(address(&suspended), "10.0.0.2:8285 (suspended)");
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
    fn reloads_say_what_waits_for_a_restart() {
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
            "reloaded: 1 peer added; changed: hop, mtu; only after a restart: queues\n"
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
            "reloaded: nothing has changed; only after a restart: io\n"
        );
    }

    #[test]
    fn the_demo_compares_two_ways() {
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
}
