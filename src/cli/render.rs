//! Answers as a person reads them.

use std::collections::BTreeMap;

use super::table::Table;
use super::units::{count, counted, duration, exactly};
use crate::control::protocol::{
    CaptureStatus, Changed, Found, Liveness, PeerStatus, Peers, RegistryStatus, Reloaded, Routes,
    Status, Upgrading,
};
use crate::control::summary::bytes;
use crate::control::text::printable;
use crate::testbed::demo::Measured;

/// What stands where an address would, if none is known of a peer: its name may not
/// resolve, or a peer with a key has not called yet.
fn no_endpoint(peer: &str) -> &'static str {
    // There is no `:` in keys.
    match peer.contains(':') {
        true => "not resolved",
        false => "no endpoint yet",
    }
}

/// Counters by name, as answers have them.
type Counters = BTreeMap<String, u64>;

/// The tunnel as a whole, then a line for each worker.
pub(super) fn status(status: &Status) -> String {
    let device = match status.tun_index {
        Some(_) => format!("{}, MTU {} bytes", status.tun, status.mtu_bytes),
        None => format!("{}, in another network namespace", status.tun),
    };
    let kernel_routes = match status.keeps_routes {
        true => "one per prefix",
        false => "none for prefixes",
    };
    let prefixes = exactly(status.prefixes, "prefix");
    let mut drops = status.drops.clone();
    let tun_queue_drops = status.tun_queue_drops.unwrap_or_default();
    drops.insert("tun_queue_full".into(), tun_queue_drops);
    let mut others = status.counters.clone();
    let [sent, received, tun] = traffic(&mut others);
    let reload_error = status.reload_error.as_ref();
    let registry = status.registry.as_ref().map(registry).unwrap_or_default();
    let capture = status.capture.as_ref().map(capture).unwrap_or_default();
    let mut table = Table::without_names();
    for (label, text) in [
        ("device", device),
        ("addresses", addresses(status)),
        ("listening on", status.listen.clone()),
        ("sending from", sending_from(status)),
        ("public key", status.public_key.clone().unwrap_or_default()),
        ("engine", status.engine.clone()),
        ("offloads", status.offloads.clone()),
        ("queues", queues(status)),
        ("IP hop", if status.hop { "yes" } else { "no" }.into()),
        ("kernel routes", kernel_routes.into()),
        (
            "configuration",
            status.config_file.clone().unwrap_or_default(),
        ),
        (
            "last reload",
            reload_error.map_or(String::new(), |error| format!("changed nothing: {error}")),
        ),
        (
            "last upgrade",
            status.upgrade_error.clone().unwrap_or_default(),
        ),
        ("registry", registry.0),
        ("network", registry.1),
        ("lease", registry.2),
        ("not used", registry.3),
        ("alarm", registry.4),
        ("capture", capture),
        ("peers", format!("{}, with {prefixes}", status.peers)),
        ("sent", sent),
        ("received", received),
        ("TUN", tun),
        ("dropped", or_none(&named_counts(&drops))),
        ("handshakes", named_counts(&status.handshakes).join(", ")),
        ("also counted", named_counts(&others).join(", ")),
    ] {
        if !text.is_empty() {
            table.push([label.into(), text]);
        }
    }
    format!(
        "fastvpn {}, process {}, up {}\n\n{}\n{}",
        printable(&status.version),
        status.pid,
        duration(status.uptime_seconds),
        table.text(),
        workers(&status.workers)
    )
}

/// The state of the registry, its network, this host's lease, what was not used, and what
/// somebody has to do something about.
fn registry(registry: &RegistryStatus) -> (String, String, String, String, String) {
    let state = match (registry.is_connected, &registry.error) {
        (true, _) => format!("connected to {}", registry.url),
        (false, Some(error)) => format!("not connected: {error}"),
        (false, None) => "not connected".into(),
    };
    let hosts = exactly(registry.hosts, "host");
    let changed = match registry.is_config_changed {
        true => "; its configuration has changed since the start",
        false => "",
    };
    let network = format!(
        "{}, {hosts}, this one {} with {}{changed}",
        registry.network, registry.public_ip, registry.subnet
    );
    let seconds = |seconds: i64| duration(seconds.try_into().unwrap_or(0));
    let lease = match (registry.lease_ttl_seconds, registry.lease_renewed_seconds) {
        (Some(ttl), Some(since)) => {
            format!("{}, renewed {} ago", seconds(ttl), duration(since))
        }
        _ => "none".into(),
    };
    let unused = [
        (registry.malformed, "cannot be read"),
        (registry.not_allowed, "not allowed"),
        (registry.out_of_place, "out of place"),
        (registry.other_backend, "of another backend"),
        (
            registry.held,
            "kept although the registry does not know them",
        ),
    ];
    let unused = unused.iter().filter(|(number, _)| *number > 0);
    let unused: Vec<_> = unused
        .map(|(number, what)| format!("{number} {what}"))
        .collect();
    let alarm = registry.alarm.clone().unwrap_or_default();
    (state, network, lease, unused.join(", "), alarm)
}

/// Who captures packets, and what came of it so far.
fn capture(capture: &CaptureStatus) -> String {
    format!(
        "by process {} of user {} for {}: {}, {} lost",
        capture.pid,
        capture.uid,
        duration(capture.seconds),
        counted(capture.packets, "packet"),
        capture.lost
    )
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
        table.push([
            status.tun.clone(),
            status.pid.to_string(),
            duration(status.uptime_seconds),
            status.listen.clone(),
            status.peers.to_string(),
            status.prefixes.to_string(),
            addresses(status),
        ]);
    }
    table.text() + "\n`fastvpn status --tun TUNNEL` shows one of them\n"
}

fn addresses(status: &Status) -> String {
    let addresses: Vec<String> = status.addresses.iter().map(ToString::to_string).collect();
    or_none(&addresses)
}

/// How packets wait for room, if the tunnel tells.
fn queues(status: &Status) -> String {
    let (aqm, limit) = (printable(&status.aqm), printable(&status.queue_limit));
    match status.aqm.is_empty() {
        true => String::new(),
        false => format!("aqm {aqm}, limit {limit}"),
    }
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

fn of(counters: &Counters, name: &str) -> u64 {
    counters.get(name).copied().unwrap_or(0)
}

/// What was sent, what was received, and what crossed the TUN device. Takes these
/// counters out of all.
fn traffic(counters: &mut Counters) -> [String; 3] {
    let mut take = |name: &str| counters.remove(name).unwrap_or(0);
    let mut moved = |direction: &str, call: &str| {
        format!(
            "{} ({}) in {}",
            counted(take(&format!("packets_{direction}")), "packet"),
            bytes(take(&format!("bytes_{direction}"))),
            counted(take(&format!("udp_{call}s")), call)
        )
    };
    let (sent, received) = (moved("sent", "send"), moved("received", "receive"));
    let read = counted(take("tun_reads"), "vnet packet");
    let written = count(take("tun_writes"));
    [sent, received, format!("{read} read, {written} written")]
}

/// Counts that are not zero, by names as the log writes them. They are exact: a few
/// drops among many matter.
fn named_counts(counts: &Counters) -> Vec<String> {
    let some = counts.iter().filter(|(_, count)| **count > 0);
    some.map(|(name, count)| format!("{} {count}", name.replace('_', "-")))
        .collect()
}

fn workers(workers: &[Counters]) -> String {
    let mut table = Table::new([
        ">WORKER",
        ">SENT",
        ">PACKETS",
        ">RECEIVED",
        ">PACKETS",
        ">DROPPED",
    ]);
    for (index, counters) in workers.iter().enumerate() {
        let drops = counters
            .iter()
            .filter(|(name, _)| name.starts_with("drop_"));
        let dropped = drops.fold(0, |sum: u64, (_, count)| sum.saturating_add(*count));
        table.push([
            index.to_string(),
            bytes(of(counters, "bytes_sent")),
            count(of(counters, "packets_sent")),
            bytes(of(counters, "bytes_received")),
            count(of(counters, "packets_received")),
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
    if peers.peers.iter().any(|peer| peer.wireguard.is_some()) {
        return peers_with_keys(peers);
    }
    let mut table = Table::new([
        "PEER",
        "ADDRESS",
        "STATE",
        "SENT FROM",
        "ORIGIN",
        ">PREFIXES",
        ">PATH MTU",
        ">SENT",
        ">PACKETS",
        ">RECEIVED",
        ">PACKETS",
        ">LAST SEEN",
        "DROPPED",
    ]);
    for peer in &peers.peers {
        let sent_from = match peer.own_ports_proven {
            0 => "listen port",
            _ => "own ports",
        };
        table.push([
            peer.peer.clone(),
            address(peer),
            state(peer),
            sent_from.into(),
            origin(peer),
            prefixes(peer),
            path_mtu(peer),
            bytes(peer.bytes_sent),
            count(peer.packets_sent),
            bytes(peer.bytes_received),
            count(peer.packets_received),
            ago(peer.last_seen_seconds),
            or_none(&named_counts(&peer.drops)),
        ]);
    }
    table.text()
}

/// A line for each peer of an encrypted tunnel.
fn peers_with_keys(peers: &Peers) -> String {
    let mut table = Table::new([
        "PEER",
        "ENDPOINT",
        "ORIGIN",
        ">PREFIXES",
        ">PATH MTU",
        ">SENT",
        ">PACKETS",
        ">RECEIVED",
        ">PACKETS",
        ">LATEST HANDSHAKE",
        ">LAST SEEN",
        ">KEEPALIVE",
        "DROPPED",
    ]);
    for peer in &peers.peers {
        let wireguard = peer.wireguard.clone().unwrap_or_default();
        let keepalive = wireguard.persistent_keepalive_seconds;
        table.push([
            wireguard.identity.unwrap_or_else(|| peer.peer.clone()),
            address(peer),
            origin(peer),
            prefixes(peer),
            path_mtu(peer),
            bytes(peer.bytes_sent),
            count(peer.packets_sent),
            bytes(peer.bytes_received),
            count(peer.packets_received),
            ago(wireguard.latest_handshake_seconds),
            ago(peer.last_seen_seconds),
            keepalive.map_or("off".into(), |seconds| format!("{seconds} s")),
            or_none(&named_counts(&peer.drops)),
        ]);
    }
    table.text()
}

fn state(peer: &PeerStatus) -> String {
    let state = match peer.state {
        None => "-",
        Some(Liveness::Alive) => "alive",
        Some(Liveness::Silent) => "silent",
        Some(Liveness::Unreachable) => "unreachable",
    };
    let reason = peer.state_reason.as_ref();
    let reason = reason.map(|reason| format!(" ({reason})"));
    state.to_string() + &reason.unwrap_or_default()
}

/// Where it comes from; of a host in a registry also how long its lease lasts.
fn origin(peer: &PeerStatus) -> String {
    let left = peer.lease_left_seconds.map(duration);
    let left = left.map(|left| format!(", {left} left"));
    format!("{}{}", peer.origin, left.unwrap_or_default())
}

fn path_mtu(peer: &PeerStatus) -> String {
    let known = peer.path_mtu_bytes.map(|bytes| bytes.to_string());
    known.unwrap_or("-".into())
}

fn ago(seconds: Option<u64>) -> String {
    match seconds {
        None => "never".into(),
        Some(0) => "now".into(),
        Some(seconds) => duration(seconds) + " ago",
    }
}

fn address(peer: &PeerStatus) -> String {
    match (peer.endpoint, peer.seen_port) {
        (None, _) => no_endpoint(&peer.peer).into(),
        (Some(endpoint), _) if peer.is_suspended => format!("{endpoint} (suspended)"),
        (Some(endpoint), Some(port)) if port != endpoint.port() => {
            format!("{endpoint} (seen at port {port})")
        }
        (Some(endpoint), _) => endpoint.to_string(),
    }
}

/// How many prefixes a peer has. The one that was given none takes the rest,
/// though it may have got some since.
fn prefixes(peer: &PeerStatus) -> String {
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
            None => format!("{} ({})", route.peer, no_endpoint(&route.peer)),
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
        None => format!(" ({})", no_endpoint(peer)),
        Some(endpoint) if endpoint == *peer => String::new(),
        Some(endpoint) => format!(" ({endpoint})"),
    };
    format!("{address} to {}{at}, {why}\n", printable(peer))
}

/// What a change came to, in one line.
pub(super) fn changed(changed: &Changed) -> String {
    // As of a reload that changes no settings.
    Reloaded::default().words(counts(changed)) + "\n"
}

/// What an upgrade came to, in one line.
pub(super) fn upgraded(upgrading: &Upgrading) -> String {
    format!("upgraded: process {} has the tunnel\n", upgrading.pid)
}

/// What a reload came to, in one line.
pub(super) fn reloaded(reloaded: &Reloaded) -> String {
    format!("reloaded: {}\n", reload_words(reloaded))
}

/// What a reload comes to.
pub(super) fn reload_words(reloaded: &Reloaded) -> String {
    printable(&reloaded.words(counts(&reloaded.changed)))
}

/// Empty if nothing has changed.
fn counts(changed: &Changed) -> String {
    let parts = [
        (changed.peers_added, "peer", "added"),
        (changed.peers_removed, "peer", "removed"),
        (changed.peers_changed, "peer", "changed"),
        (changed.prefixes_added, "prefix", "added"),
        (changed.prefixes_removed, "prefix", "removed"),
    ];
    let some = parts.into_iter().filter(|(number, ..)| *number > 0);
    let some = some.map(|(number, what, done)| format!("{} {done}", exactly(number, what)));
    some.collect::<Vec<_>>().join(", ")
}

/// What the demo has measured: a line for each kind of figure.
pub(super) fn measured(measured: &Measured) -> String {
    let mut table = Table::new(["", ">tunnel", ">bare veth", ">ratio"]);
    let Measured { tunnel, veth, .. } = measured;
    let rate = [tunnel.gigabits_per_second, veth.gigabits_per_second];
    for (name, [tunnel, veth]) in [
        ("TCP throughput, Gbit/s", rate),
        ("ping p50, µs", [tunnel.ping_p50_us, veth.ping_p50_us]),
        ("ping p99, µs", [tunnel.ping_p99_us, veth.ping_p99_us]),
    ] {
        table.push([
            name.into(),
            format!("{tunnel:.1}"),
            format!("{veth:.1}"),
            format!("{:.2}", tunnel / veth),
        ]);
    }
    table.push([
        "tunnel CPU seconds per GB".into(),
        format!("{:.2}", measured.cpu_seconds_per_gb),
        "-".into(),
        String::new(),
    ]);
    table.text()
}

#[cfg(test)]
#[path = "render_tests.rs"]
mod tests;
