//! How long packets may be on the path to a peer. This host's route says where to
//! begin, and packets that are sent to find out say what the path beyond takes.
//! docs/mtu.md says why.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use crate::host::mtu_probe::MtuProbe;
use crate::host::netlink::RouteMtu;
use crate::io::random;

/// How often the path to a peer in use is probed: once in so long if much is sent
/// there, and else less often, so that probes are a small part of what is sent.
const PROBE_INTERVAL_BUSY: Duration = Duration::from_secs(3);
/// Over IPv6, where routers do not fragment: as long as a narrower path may go
/// unnoticed while what is too long for it is lost.
const PROBE_INTERVAL_V6: Duration = Duration::from_secs(10);
const PROBE_INTERVAL_V4: Duration = Duration::from_secs(600);

/// Bytes sent to a peer since the last probe that make it a busy one.
const BUSY_BYTES: u64 = 64 << 10;

/// How long the answer to a probe may take.
const ANSWER_WAIT: Duration = Duration::from_millis(500);

/// Probes that nobody has objected to, until a path counts as wider than it did:
/// one of them, or the objection, may have been lost.
const SILENT_PROBES_TO_GROW: u32 = 3;

/// What no path has less of: RFC 791's datagram that every host takes, and RFC
/// 8200's smallest MTU.
const MTU_BYTES_MIN_V4: u32 = 576;
const MTU_BYTES_MIN_V6: u32 = 1280;

/// What is known of the path to one peer.
pub struct PeerPath {
    /// Where it leads.
    pub endpoint: SocketAddr,
    /// What this host's route says.
    pub route: RouteMtu,
    /// What a router on it takes, if that is less than the route says.
    narrow_bytes: Option<u32>,
    /// When it was probed last, and how many bytes had been sent by then; `None`: it
    /// is to be probed at once.
    probed: Option<(Instant, u64)>,
    probe: Option<Probe>,
}

/// A path that is being probed.
struct Probe {
    socket: MtuProbe,
    packet_bytes: u32,
    sent: Instant,
    /// Packets of this size that nobody has objected to.
    silent: u32,
}

impl PeerPath {
    /// A path of which only the route is known.
    pub fn new(endpoint: SocketAddr, route: RouteMtu) -> Self {
        Self {
            endpoint,
            route,
            narrow_bytes: None,
            probed: None,
            probe: None,
        }
    }

    /// Notes what the route says now. Another way to the same place may share the
    /// narrow part.
    pub fn set_route(&mut self, endpoint: SocketAddr, route: RouteMtu) {
        if self.endpoint != endpoint {
            *self = Self::new(endpoint, route);
        } else if self.route != route {
            (self.route, self.probed, self.probe) = (route, None, None);
        }
    }

    /// What it takes, as far as is known.
    pub fn mtu_bytes(&self) -> u32 {
        let route = self.route.mtu_bytes;
        self.narrow_bytes.map_or(route, |narrow| narrow.min(route))
    }

    /// Whether it is time to probe, after `sent_bytes` to this peer in all.
    pub fn is_due(&self, sent_bytes: u64, now: Instant) -> bool {
        let Some((at, sent_before)) = self.probed else {
            return !self.route.is_direct;
        };
        let interval = match self.endpoint {
            _ if sent_bytes.saturating_sub(sent_before) >= BUSY_BYTES => PROBE_INTERVAL_BUSY,
            SocketAddr::V6(_) => PROBE_INTERVAL_V6,
            SocketAddr::V4(_) => PROBE_INTERVAL_V4,
        };
        !self.route.is_direct && now - at >= interval
    }

    /// Whether it is being probed, which takes a descriptor.
    pub fn is_probed(&self) -> bool {
        self.probe.is_some()
    }

    /// Sends a packet as long as the route takes.
    pub fn start_probe(&mut self, sent_bytes: u64, listen: IpAddr, now: Instant) {
        self.probed = Some((now, sent_bytes));
        match random().and_then(|nonce| MtuProbe::open(listen, self.endpoint, nonce)) {
            Ok(socket) => {
                self.probe = Some(Probe {
                    socket,
                    packet_bytes: self.route.mtu_bytes,
                    sent: now,
                    silent: 0,
                });
                self.send(now);
            }
            Err(error) => tracing::debug!("cannot probe the path to {}: {error}", self.endpoint),
        }
    }

    /// Sends a packet of the probe, which ends if that fails.
    fn send(&mut self, now: Instant) {
        let Some(probe) = &mut self.probe else {
            return;
        };
        probe.sent = now;
        if let Err(error) = probe.socket.send(probe.packet_bytes) {
            tracing::debug!("cannot probe the path to {}: {error}", self.endpoint);
            self.probe = None;
        }
    }

    /// Takes in what has become of the probe; tells whether the path takes something
    /// else now.
    pub fn poll(&mut self, now: Instant) -> bool {
        let mtu_bytes = self.mtu_bytes();
        let Some(probe) = &mut self.probe else {
            return false;
        };
        let min_bytes = match self.endpoint {
            SocketAddr::V4(_) => MTU_BYTES_MIN_V4,
            SocketAddr::V6(_) => MTU_BYTES_MIN_V6,
        };
        let told = probe
            .socket
            .too_long_for()
            .map(|bytes| bytes.max(min_bytes));
        if let Some(told_bytes) = told.filter(|bytes| *bytes < probe.packet_bytes) {
            // There may be others further on that take less.
            (probe.packet_bytes, probe.silent) = (told_bytes, 0);
            self.send(now);
            if told_bytes < mtu_bytes {
                self.narrow_bytes = Some(told_bytes);
            }
            return told_bytes < mtu_bytes;
        }
        if now - probe.sent < ANSWER_WAIT {
            return false;
        }
        probe.silent += 1;
        let packet_bytes = probe.packet_bytes;
        if packet_bytes > mtu_bytes && probe.silent < SILENT_PROBES_TO_GROW {
            self.send(now);
            return false;
        }
        self.probe = None;
        if packet_bytes > mtu_bytes {
            self.narrow_bytes = (packet_bytes < self.route.mtu_bytes).then_some(packet_bytes);
        }
        packet_bytes > mtu_bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn route(mtu_bytes: u32) -> RouteMtu {
        RouteMtu {
            mtu_bytes,
            is_direct: false,
        }
    }

    #[test]
    fn a_path_is_probed_by_how_much_is_sent_there() {
        let start = Instant::now();
        for (endpoint, rest) in [
            ("10.0.0.1:1", PROBE_INTERVAL_V4),
            ("[fd00::1]:1", PROBE_INTERVAL_V6),
        ] {
            let mut path = PeerPath::new(endpoint.parse().unwrap(), route(1500));
            assert!(path.is_due(0, start));
            path.probed = Some((start, 1000));
            let almost = Duration::from_nanos(1);
            assert!(!path.is_due(1000 + BUSY_BYTES, start + PROBE_INTERVAL_BUSY - almost));
            assert!(path.is_due(1000 + BUSY_BYTES, start + PROBE_INTERVAL_BUSY));
            assert!(!path.is_due(999 + BUSY_BYTES, start + rest - almost));
            assert!(path.is_due(1000, start + rest));
        }
    }

    #[test]
    fn another_route_is_probed_at_once_and_never_exceeded() {
        let endpoint = "10.0.0.1:1".parse().unwrap();
        let mut path = PeerPath::new(endpoint, route(1500));
        let mut set = |mtu_bytes: u32, endpoint: SocketAddr| {
            path.set_route(endpoint, route(mtu_bytes));
            let was_probed = path.probed.replace((Instant::now(), 0)).is_some();
            let mtu_before = path.mtu_bytes();
            path.narrow_bytes = Some(1400);
            (was_probed, mtu_before, path.mtu_bytes())
        };
        assert_eq!(set(1500, endpoint), (false, 1500, 1400));
        assert_eq!(set(1500, endpoint), (true, 1400, 1400));
        assert_eq!(set(1300, endpoint), (false, 1300, 1300));
        assert_eq!(set(1500, endpoint), (false, 1400, 1400));
        // Nothing is known of the path to another place.
        let elsewhere = "10.0.0.2:1".parse().unwrap();
        assert_eq!(set(1500, elsewhere), (false, 1500, 1400));
    }
}
