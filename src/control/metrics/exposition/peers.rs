//! What there is of each peer. Its label is its name, as `peers` shows it.

use std::fmt;
use std::time::SystemTime;

use super::{BYTES, Families, Family, SECONDS, Value, counter, flag, gauge, timestamp, whole};
use crate::control::protocol::{Liveness, PeerStatus};

static INFO: Family = gauge(
    "peer_info",
    None,
    "A peer: where it comes from, and its identity, if it has one.",
);

static STATE: Family = gauge(
    "peer_state",
    None,
    "How the peer is doing, if that is known: alive, silent or unreachable.",
);

/// What a snapshot of a certain time says of a peer.
type Read = fn(&PeerStatus, SystemTime) -> Option<Value>;

static NUMBERS: [(Family, Read); 9] = [
    (
        counter(
            "peer_sent_packets",
            None,
            "Packets sent to the peer, those among them that were dropped while they waited or \
             by the kernel.",
        ),
        |peer, _| whole(peer.packets_enqueued),
    ),
    (
        counter("peer_sent", BYTES, "Bytes of these packets."),
        |peer, _| whole(peer.bytes_enqueued),
    ),
    (
        counter(
            "peer_received_packets",
            None,
            "Packets received from the peer.",
        ),
        |peer, _| whole(peer.packets_received),
    ),
    (
        counter(
            "peer_received",
            BYTES,
            "Bytes of the packets received from the peer.",
        ),
        |peer, _| whole(peer.bytes_received),
    ),
    (
        gauge("peer_prefixes", None, "Number of the peer's prefixes."),
        |peer, _| whole(peer.prefixes),
    ),
    (
        gauge(
            "peer_suspended",
            None,
            "Whether nothing is sent to the peer, as the path leads through the tunnel itself.",
        ),
        |peer, _| flag(peer.is_suspended),
    ),
    (
        gauge(
            "peer_path_mtu",
            BYTES,
            "MTU of the path to the peer, if it is known.",
        ),
        |peer, _| whole(peer.path_mtu_bytes?),
    ),
    (
        gauge(
            "peer_last_seen_timestamp",
            SECONDS,
            "When something last came from the peer, if ever.",
        ),
        |peer, taken_at| timestamp(taken_at, peer.last_seen_seconds?),
    ),
    (
        gauge(
            "peer_latest_handshake_timestamp",
            SECONDS,
            "When the latest handshake with the peer was, if there was one.",
        ),
        |peer, taken_at| timestamp(taken_at, peer.wireguard.as_ref()?.latest_handshake_seconds?),
    ),
];

static DROPPED: Family = counter(
    "peer_dropped_packets",
    None,
    "Packets to and from the peer that were dropped, by reason; without those that are zero.",
);

/// Writes it all.
pub(super) fn write(
    families: &mut Families<'_>,
    peers: &[PeerStatus],
    taken_at: SystemTime,
) -> fmt::Result {
    let info = peers.iter().map(|peer| {
        let wireguard = peer.wireguard.as_ref();
        let identity = wireguard.and_then(|it| it.identity.as_deref());
        let labels = [
            ("peer", &peer.peer[..]),
            ("origin", &peer.origin),
            ("identity", identity.unwrap_or_default()),
        ];
        (labels, flag(true))
    });
    families.write(&INFO, info)?;
    let states = peers.iter().filter_map(|peer| {
        let state = match peer.state? {
            Liveness::Alive => "alive",
            Liveness::Silent => "silent",
            Liveness::Unreachable => "unreachable",
        };
        Some(([("peer", &peer.peer[..]), ("state", state)], flag(true)))
    });
    families.write(&STATE, states)?;
    for (family, read) in &NUMBERS {
        let values = peers.iter();
        let values = values.map(|peer| ([("peer", &peer.peer[..])], read(peer, taken_at)));
        families.write(family, values)?;
    }
    let drops = peers.iter().flat_map(|peer| {
        peer.drops.iter().map(|(reason, count)| {
            let labels = [("peer", &peer.peer[..]), ("reason", reason)];
            (labels, whole(*count))
        })
    });
    families.write(&DROPPED, drops)
}
