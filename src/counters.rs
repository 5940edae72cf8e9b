//! What a worker counts, and what it shows of its packets besides: written by the worker
//! alone, read by anyone.

pub mod first;

use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering};

use self::first::FirstDrops;
use crate::capture::Tap;

/// A counter with one writer. The writer pays for a plain load and store; a
/// reader sees some recent value.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `n`. Only the counter's one writer may call this: the worker, or the
    /// control thread for what it asks the kernel.
    #[inline]
    pub fn add(&self, n: u64) {
        self.0.store(
            self.0.load(Ordering::Relaxed).wrapping_add(n),
            Ordering::Relaxed,
        );
    }

    /// Sets the value of what goes up and down. For the writer alone, as [`Self::add`].
    pub fn set(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }

    /// The value now.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

macro_rules! counters {
    ($($(#[doc = $doc:literal])+ $name:ident),+ $(,)?) => {
        /// The counters of one worker. Aligned so that two workers never
        /// write to one cache line (128: x86 fetches lines in pairs).
        #[derive(Debug, Default)]
        #[repr(align(128))]
        pub struct Counters {
            $($(#[doc = $doc])+ pub $name: Counter,)+
            /// What some of the drops were about.
            pub first: FirstDrops,
            /// Where it notes packets while somebody captures them.
            pub tap: Tap,
        }

        /// The counters' values at one time.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct Snapshot {
            $($(#[doc = $doc])+ pub $name: u64,)+
        }

        impl Counters {
            /// Reads all counters.
            pub fn snapshot(&self) -> Snapshot {
                Snapshot { $($name: self.$name.get(),)+ }
            }
        }

        impl Snapshot {
            /// The sum of two workers' values.
            #[must_use]
            pub fn plus(&self, other: &Self) -> Self {
                Self { $($name: self.$name.wrapping_add(other.$name),)+ }
            }

            /// Names and values in order of declaration.
            pub fn iter(&self) -> impl Iterator<Item = (&'static str, u64)> + use<> {
                [$((stringify!($name), self.$name),)+].into_iter()
            }
        }
    };
}

counters! {
    /// Vnet packets read from the TUN queue (a GSO packet is one).
    tun_reads,
    /// Sends that the kernel took (a batch is one).
    udp_sends,
    /// Packets in them: one datagram each.
    packets_sent,
    /// Bytes of those packets.
    bytes_sent,
    /// Receives (a GRO batch is one).
    udp_receives,
    /// Packets taken from known senders, well formed.
    packets_received,
    /// Bytes of those packets.
    bytes_received,
    /// Vnet packets written to the TUN queue (a GSO packet is one).
    tun_writes,
    /// Outbound: vnet packets that are not a whole IP packet or contradict their offloads.
    drop_tun_malformed,
    /// Outbound: packets to which no peer's prefix matches.
    drop_no_route,
    /// Outbound: packets to a peer whose name has not resolved, or to
    /// whom the path leads through the tunnel itself.
    drop_peer_unresolved,
    /// Outbound: packets whose hop limit ran out (`--hop`).
    drop_ttl,
    /// Outbound: unfragmentable packets longer than their peer's path takes.
    drop_too_big,
    /// Outbound: packets longer than any UDP datagram.
    drop_oversize,
    /// Outbound: packets for which the socket's send buffer had no room.
    drop_send_full,
    /// Outbound: packets whose send the kernel refused for another reason.
    drop_send_error,
    /// Outbound: packets that were dropped because their flow has waited for too long.
    drop_queue_aqm,
    /// Outbound: packets for which there was no room to wait.
    drop_queue_full,
    /// Outbound: packets to a peer without a session, when there was no room to wait for one,
    /// or it ended while they waited (WireGuard).
    drop_no_session,
    /// Inbound: datagrams that the kernel dropped at the socket: its receive buffer
    /// was full, or they came out of the tunnel itself. (Written by the control
    /// thread; a GRO batch is one.)
    drop_at_socket,
    /// Inbound: datagrams from an address that does not belong to a peer.
    drop_sender_unknown,
    /// Inbound: packets from an inner address that is not behind their sender.
    drop_source_not_allowed,
    /// Inbound: datagrams shorter than the IP header they claim.
    drop_short,
    /// Inbound: datagrams that are neither IPv4 nor IPv6.
    drop_version,
    /// Inbound: datagrams whose IP length is not theirs.
    drop_length,
    /// Inbound: datagrams that are not messages of WireGuard.
    drop_not_wireguard,
    /// Inbound: data messages of a session that is not, or no longer, there (WireGuard).
    drop_session_unknown,
    /// Inbound: data messages that do not come from the session's peer (WireGuard).
    drop_forged,
    /// Inbound: data messages that have come before, or are too late to tell (WireGuard).
    drop_replayed,
    /// Inbound: packets marked on their way as having experienced congestion, which do
    /// not take part in ECN, so that their ends would not learn of it (RFC 6040).
    drop_ecn,
    /// Inbound: receives cut short by the kernel.
    drop_truncated,
    /// Inbound: vnet packets that the TUN queue had no room for.
    drop_tun_full,
    /// Inbound: vnet packets that the TUN device refused, such as while it is down.
    drop_tun_error,
    /// Either way: packets for which no output buffer was free.
    drop_no_buffer,
    /// Packets that waited for the socket to have room, and were sent.
    queue_packets,
    /// For how long they waited, together.
    queue_sojourn_ns,
    /// Bytes that wait now.
    queue_backlog_bytes,
    /// Bytes that the sockets may hold now before packets wait.
    queue_limit_bytes,
    /// Packets marked as having experienced congestion, since their flow has waited
    /// for too long (RFC 3168).
    queue_marked,
    /// ICMP errors written into the TUN queue about packets that were dropped.
    icmp_sent,
    /// ICMP errors that were due, but held back by the rate limit.
    icmp_suppressed,
    /// Keepalives: data messages without a packet (WireGuard), or probes that say so (plain
    /// mode).
    keepalives_received,
    /// Probes from known senders ([`crate::packet::probe`]).
    probes_received,
    /// Receives that failed for reasons that pass, such as errors of earlier sends.
    receive_failed,
}

/// What one worker has carried to and from one peer. Of a cache line of its
/// own, as another worker writes to the next one.
#[derive(Debug, Default)]
#[repr(align(64))]
pub struct PeerCounters {
    /// Packets handed over for sending, those that were not sent after all among them.
    pub packets_enqueued: Counter,
    /// Bytes of those packets.
    pub bytes_enqueued: Counter,
    /// Packets that passed all checks.
    pub packets_received: Counter,
    /// Bytes of those packets.
    pub bytes_received: Counter,
    /// Packets that had been handed over, and were dropped.
    pub packets_unsent: Counter,
    /// Bytes of those packets.
    pub bytes_unsent: Counter,
    /// As in [`Counters`], of packets to this peer.
    pub drop_send_full: Counter,
    /// As in [`Counters`], of packets to this peer.
    pub drop_send_error: Counter,
    /// As in [`Counters`], of packets to this peer.
    pub drop_queue_aqm: Counter,
    /// As in [`Counters`], of packets to this peer.
    pub drop_queue_full: Counter,
    /// As in [`Counters`], of packets to this peer.
    pub drop_no_session: Counter,
    /// As in [`Counters`], of packets from this peer's address. Of several peers
    /// at one address, one counts for all. What a peer with a key sends is counted with its
    /// sessions instead.
    pub drop_source_not_allowed: Counter,
    is_endpoint_seen: AtomicBool,
    other_port: AtomicU16,
    is_own_port_proven: AtomicBool,
    keepalive_seconds: AtomicU16,
}

impl PeerCounters {
    /// Names and values of the drop counters, as those of a [`Snapshot`].
    pub fn drops(&self) -> [(&'static str, u64); 6] {
        [
            ("send_full", self.drop_send_full.get()),
            ("send_error", self.drop_send_error.get()),
            ("queue_aqm", self.drop_queue_aqm.get()),
            ("queue_full", self.drop_queue_full.get()),
            ("no_session", self.drop_no_session.get()),
            ("source_not_allowed", self.drop_source_not_allowed.get()),
        ]
    }

    /// Packets that were sent: what was handed over without what was dropped. A peer that is
    /// removed and added again while packets to it wait may see only that they are dropped.
    pub fn packets_sent(&self) -> u64 {
        let enqueued = self.packets_enqueued.get();
        enqueued.saturating_sub(self.packets_unsent.get())
    }

    /// Bytes of those packets.
    pub fn bytes_sent(&self) -> u64 {
        let enqueued = self.bytes_enqueued.get();
        enqueued.saturating_sub(self.bytes_unsent.get())
    }

    /// Packets that were to be sent, whatever became of them.
    pub fn packets_tried(&self) -> u64 {
        let failed = self.drop_send_full.get()
            + self.drop_send_error.get()
            + self.drop_queue_aqm.get()
            + self.drop_queue_full.get()
            + self.drop_no_session.get();
        self.packets_sent() + failed
    }

    /// Notes the port that packets have come from, `expected` being that of the
    /// peer's endpoint. For the worker; it writes only what is new.
    #[inline]
    pub fn note_port(&self, port: u16, expected: u16) {
        if port == expected {
            if !self.is_endpoint_seen.load(Ordering::Relaxed) {
                self.is_endpoint_seen.store(true, Ordering::Relaxed);
            }
        } else if self.other_port.load(Ordering::Relaxed) != port {
            self.other_port.store(port, Ordering::Relaxed);
        }
    }

    /// What [`Self::note_port`] has noted since the last call: whether packets
    /// came from the endpoint's port, and the last other port.
    pub fn take_ports(&self) -> (bool, Option<u16>) {
        let other = self.other_port.swap(0, Ordering::Relaxed);
        (
            self.is_endpoint_seen.swap(false, Ordering::Relaxed),
            (other != 0).then_some(other),
        )
    }

    /// Notes a keepalive, which comes every so many seconds. For the worker; it writes only what
    /// is new.
    pub fn note_keepalive(&self, seconds: u16) {
        if self.keepalive_seconds.load(Ordering::Relaxed) != seconds {
            self.keepalive_seconds.store(seconds, Ordering::Relaxed);
        }
    }

    /// How often keepalives come, if one has come since the last call.
    pub fn take_keepalive(&self) -> Option<u16> {
        let seconds = self.keepalive_seconds.swap(0, Ordering::Relaxed);
        (seconds != 0).then_some(seconds)
    }

    /// Whether the worker's own port is known to reach the peer, so that it may
    /// send from there ([`crate::io::udp::reuseport`]).
    #[inline]
    pub fn is_own_port_proven(&self) -> bool {
        self.is_own_port_proven.load(Ordering::Relaxed)
    }

    /// Says whether it is.
    pub fn set_own_port_proven(&self, is_proven: bool) {
        self.is_own_port_proven.store(is_proven, Ordering::Relaxed);
    }
}

impl Snapshot {
    /// The drop counters that are not zero.
    pub fn drops(&self) -> impl Iterator<Item = (&'static str, u64)> + use<> {
        self.iter()
            .filter_map(|(name, value)| Some((name.strip_prefix("drop_")?, value)))
            .filter(|(_, value)| *value > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_and_names() {
        let counters = Counters::default();
        counters.packets_sent.add(3);
        counters.drop_version.add(2);
        let sum = counters.snapshot().plus(&counters.snapshot());
        assert_eq!(sum.packets_sent, 6);
        assert_eq!(sum.drops().collect::<Vec<_>>(), [("version", 4)]);
        assert_eq!(size_of::<Counters>() % 128, 0);
    }

    #[test]
    fn what_capture_calls_a_drop_is_counted_by_that_name() {
        let names: Vec<_> = Snapshot::default().iter().map(|(name, _)| name).collect();
        for reason in crate::capture::Reason::ALL {
            let name = format!("drop_{}", reason.name());
            assert!(names.contains(&&*name), "{name}");
        }
    }

    /// As for a peer that was removed and added again while packets to it waited.
    #[test]
    fn drops_of_what_was_never_enqueued_leave_nothing_sent() {
        let peer = PeerCounters::default();
        peer.packets_unsent.add(2);
        peer.bytes_unsent.add(200);
        assert_eq!((peer.packets_sent(), peer.bytes_sent()), (0, 0));
        peer.packets_enqueued.add(5);
        peer.bytes_enqueued.add(500);
        assert_eq!((peer.packets_sent(), peer.bytes_sent()), (3, 300));
    }
}
