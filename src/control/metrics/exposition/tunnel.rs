//! What there is once: the program, the tunnel, and the handshake thread.

use std::fmt;

use super::workers::reasons;
use super::{BYTES, Families, Family, SECONDS, Value, counter, flag, gauge, whole};
use crate::control::metrics::Snapshot;

static BUILD: Family = gauge("build_info", None, "The program, by its version.");

static TUNNEL: Family = gauge("tunnel_info", None, "The tunnel: device, engine and mode.");

/// What a snapshot says.
type Read = fn(&Snapshot) -> Option<Value>;

static NUMBERS: [(Family, Read); 8] = [
    (
        gauge(
            "uptime",
            SECONDS,
            "How long this process has run the tunnel.",
        ),
        |tunnel| whole(tunnel.status.uptime_seconds),
    ),
    (
        gauge(
            "ready",
            None,
            "Whether the tunnel is ready, as /readyz says.",
        ),
        |tunnel| flag(tunnel.readiness.is_ok()),
    ),
    (
        gauge(
            "last_reload_successful",
            None,
            "Whether the last reload of the configuration, if any, has succeeded.",
        ),
        |tunnel| flag(tunnel.status.reload_error.is_none()),
    ),
    (gauge("mtu", BYTES, "MTU of the TUN device."), |tunnel| {
        whole(tunnel.status.mtu_bytes)
    }),
    (gauge("peers", None, "Number of peers."), |tunnel| {
        whole(tunnel.status.peers)
    }),
    (gauge("prefixes", None, "Number of prefixes."), |tunnel| {
        whole(tunnel.status.prefixes)
    }),
    (
        counter(
            "tun_queue_overrun_packets",
            None,
            "Packets that found a TUN queue full, since the device was made.",
        ),
        |tunnel| whole(tunnel.status.tun_queue_drops?),
    ),
    (
        gauge(
            "shown_peers",
            None,
            "Number of peers that have metrics of their own: the first ones by name.",
        ),
        |tunnel| whole(tunnel.peers.len()),
    ),
];

static SENT: Family = counter(
    "handshake_sent_messages",
    None,
    "Messages that the handshake thread has sent.",
);

/// The counters of messages sent, with the types of these.
const SENT_TYPES: [(&str, &str); 4] = [
    ("initiations_sent", "initiation"),
    ("responses_sent", "response"),
    ("cookie_replies_sent", "cookie_reply"),
    ("keepalives_sent", "keepalive"),
];

static RECEIVED: Family = counter(
    "handshake_received_messages",
    None,
    "Messages that the handshake thread has taken; each response completes a handshake.",
);

const RECEIVED_TYPES: [(&str, &str); 4] = [
    ("initiations_received", "initiation"),
    ("responses_received", "response"),
    ("cookie_replies_received", "cookie_reply"),
    ("data_passed_on", "data"),
];

static DROPPED: Family = counter(
    "handshake_dropped_messages",
    None,
    "Messages that the handshake thread has dropped, by reason.",
);

/// Writes it all.
pub(super) fn write(families: &mut Families<'_>, tunnel: &Snapshot) -> fmt::Result {
    let status = &tunnel.status;
    families.write(&BUILD, [([("version", &status.version[..])], flag(true))])?;
    let mode = match status.public_key {
        Some(_) => "wireguard",
        None => "plain",
    };
    let labels = [
        ("tun", &status.tun[..]),
        ("engine", &status.engine),
        ("mode", mode),
    ];
    families.write(&TUNNEL, [(labels, flag(true))])?;
    for (family, value) in &NUMBERS {
        families.write_one(family, value(tunnel))?;
    }
    for (family, types) in [(&SENT, &SENT_TYPES), (&RECEIVED, &RECEIVED_TYPES)] {
        let counts = types.iter().map(|(counter, kind)| {
            let count = status.handshakes.get(*counter);
            ([("type", *kind)], count.copied().and_then(whole))
        });
        families.write(family, counts)?;
    }
    families.write(&DROPPED, reasons(&status.handshakes))
}

#[cfg(test)]
pub(super) fn handshake_counters() -> impl Iterator<Item = &'static str> {
    let counters = SENT_TYPES.iter().chain(&RECEIVED_TYPES);
    counters.map(|(counter, _)| *counter)
}
