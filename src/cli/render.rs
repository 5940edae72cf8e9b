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
    "udp_sends",
    "packets_received",
    "bytes_received",
    "udp_receives",
    "tun_reads",
    "tun_writes",
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
    let moved = |direction: &str, calls: &str, one, many| {
        let packets = counted(of(&format!("packets_{direction}")), "packet", "packets");
        let bytes = bytes(of(&format!("bytes_{direction}")));
        let calls = counted(of(calls), one, many);
        format!("{packets} ({bytes}) in {calls}")
    };
    let read = counted(of("tun_reads"), "vnet packet", "vnet packets");
    let written = count(of("tun_writes"));
    [
        ("sent", moved("sent", "udp_sends", "send", "sends")),
        (
            "received",
            moved("received", "udp_receives", "receive", "receives"),
        ),
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
            peer.last_seen_seconds.map_or("never".into(), ago),
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
#[path = "render_tests.rs"]
mod tests;
