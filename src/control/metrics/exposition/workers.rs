//! What each worker counts.

use std::collections::BTreeMap;
use std::fmt;

use super::{BYTES, Families, Family, SECONDS, Value, counter, gauge, whole};
use crate::control::protocol::Status;

/// The counters, each with what it is written as. All others are drops.
pub(super) static COUNTERS: [(&str, Family); 18] = [
    (
        "tun_reads",
        counter(
            "worker_tun_reads",
            None,
            "Packets read from the TUN queue; a GSO packet is one.",
        ),
    ),
    (
        "udp_sends",
        counter(
            "worker_udp_sends",
            None,
            "Sends that the kernel took; a GSO batch is one.",
        ),
    ),
    (
        "packets_sent",
        counter("worker_sent_packets", None, "Packets sent to peers."),
    ),
    (
        "bytes_sent",
        counter("worker_sent", BYTES, "Bytes of the packets sent to peers."),
    ),
    (
        "udp_receives",
        counter("worker_udp_receives", None, "Receives; a GRO batch is one."),
    ),
    (
        "packets_received",
        counter(
            "worker_received_packets",
            None,
            "Packets received from peers.",
        ),
    ),
    (
        "bytes_received",
        counter(
            "worker_received",
            BYTES,
            "Bytes of the packets received from peers.",
        ),
    ),
    (
        "tun_writes",
        counter(
            "worker_tun_writes",
            None,
            "Packets written to the TUN queue; a GSO packet is one.",
        ),
    ),
    (
        "queue_packets",
        counter(
            "worker_queued_packets",
            None,
            "Packets that waited for the socket to have room, and were sent.",
        ),
    ),
    (
        // Nanoseconds: the only one that is written in another unit.
        SOJOURN_NS,
        counter(
            "worker_queue_sojourn",
            SECONDS,
            "For how long these packets waited, together.",
        ),
    ),
    (
        "queue_backlog_bytes",
        gauge(
            "worker_queue_backlog",
            BYTES,
            "Bytes that wait for the socket to have room.",
        ),
    ),
    (
        "queue_limit_bytes",
        gauge(
            "worker_queue_limit",
            BYTES,
            "Bytes that the sockets may hold now before packets wait.",
        ),
    ),
    (
        "queue_marked",
        counter(
            "worker_queue_marked_packets",
            None,
            "Packets marked as having experienced congestion (ECN).",
        ),
    ),
    (
        "icmp_sent",
        counter(
            "worker_icmp_errors_sent",
            None,
            "ICMP errors to the senders of packets that were dropped.",
        ),
    ),
    (
        "icmp_suppressed",
        counter(
            "worker_icmp_errors_suppressed",
            None,
            "ICMP errors that the rate limit held back.",
        ),
    ),
    (
        "keepalives_received",
        counter("worker_received_keepalives", None, "Keepalives received."),
    ),
    (
        "probes_received",
        counter(
            "worker_received_probes",
            None,
            "Probes received from peers.",
        ),
    ),
    (
        "receive_failed",
        counter(
            "worker_receive_failures",
            None,
            "Receives that failed for reasons that pass.",
        ),
    ),
];

const SOJOURN_NS: &str = "queue_sojourn_ns";

/// What the names of all others begin with.
pub(super) const DROP: &str = "drop_";

static DROPPED: Family = counter(
    "worker_dropped_packets",
    None,
    "Packets dropped, by reason.",
);

/// Writes the counters of all workers.
pub(super) fn write(families: &mut Families<'_>, status: &Status) -> fmt::Result {
    let workers = || status.workers.iter().enumerate();
    for (counter, family) in &COUNTERS {
        let counts = workers().map(|(worker, counters)| {
            let count = counters.get(*counter).copied();
            let value = count.map(|count| match *counter {
                SOJOURN_NS => Value::Real(count as f64 / 1e9),
                _ => Value::Whole(count),
            });
            ([("worker", worker)], value)
        });
        families.write(family, counts)?;
    }
    let drops = workers().flat_map(|(worker, counters)| {
        reasons(counters).map(move |(reason, count)| (([("worker", worker)], reason), count))
    });
    families.write(&DROPPED, drops)
}

/// The drop counters among others: the reason as a label, and the count.
pub(super) fn reasons(
    counters: &BTreeMap<String, u64>,
) -> impl Iterator<Item = ([(&'static str, &str); 1], Option<Value>)> {
    counters.iter().filter_map(|(counter, count)| {
        let reason = counter.strip_prefix(DROP)?;
        Some(([("reason", reason)], whole(*count)))
    })
}
