//! How long packets may be on the paths to the peers. This host's routes say where
//! to begin, and packets that are sent to find out say what the path beyond takes.
//! docs/mtu.md says why.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use super::Peers;
use crate::daemon::host::Host;
use crate::daemon::workers::Workers;
use crate::host::mtu_probe::MtuProbe;
use crate::host::netlink::{Netlink, RouteMtu};
use crate::io::random;
use crate::packet::train::NextHop;
use crate::routing::overlay::Overlay;

/// Most paths that are looked at in one turn. The others have theirs later.
const PATHS_MAX: usize = 256;

/// How often the path to a peer in use is probed: once in so long if much is sent
/// there, and else less often, so that probes are a small part of what is sent.
const PROBE_INTERVAL_BUSY: Duration = Duration::from_secs(3);
/// Over IPv6, where routers do not fragment: as long as a narrower path may go
/// unnoticed while what is too long for it is lost.
const PROBE_INTERVAL_V6: Duration = Duration::from_secs(10);
const PROBE_INTERVAL_V4: Duration = Duration::from_secs(600);

/// Bytes sent to a peer since the last probe that make it a busy one.
const BUSY_BYTES: u64 = 64 << 10;

/// Most paths that are being probed at a time: each takes a descriptor.
const PROBES_MAX: usize = 64;

/// How long the answer to a probe may take.
const ANSWER_WAIT: Duration = Duration::from_millis(500);

/// Probes that nobody has objected to, until a path counts as wider than it did:
/// one of them, or the objection, may have been lost.
const SILENT_PROBES_TO_GROW: u32 = 3;

/// What no path has less of: RFC 791's datagram that every host takes, and RFC
/// 8200's smallest MTU.
const MTU_BYTES_MIN_V4: u32 = 576;
const MTU_BYTES_MIN_V6: u32 = 1280;

/// What is known of the paths.
#[derive(Default)]
pub struct Paths {
    known: HashMap<NextHop, Known>,
    probes: Vec<Probe>,
    cursor: usize,
}

/// A path.
struct Known {
    endpoint: SocketAddr,
    route: RouteMtu,
    /// What a router on it takes, if that is less than the route says.
    narrow_bytes: Option<u32>,
    /// When it was probed last, and how many bytes had been sent by then; `None`: it
    /// is to be probed at once.
    probed: Option<(Instant, u64)>,
}

impl Known {
    fn mtu_bytes(&self) -> u32 {
        let route = self.route.mtu_bytes;
        self.narrow_bytes.map_or(route, |narrow| narrow.min(route))
    }

    /// Whether it is time to probe, after `sent_bytes` to this peer in all.
    fn is_due(&self, sent_bytes: u64, now: Instant) -> bool {
        let Some((at, sent_before)) = self.probed else {
            return true;
        };
        let interval = match self.endpoint {
            _ if sent_bytes.saturating_sub(sent_before) >= BUSY_BYTES => PROBE_INTERVAL_BUSY,
            SocketAddr::V6(_) => PROBE_INTERVAL_V6,
            SocketAddr::V4(_) => PROBE_INTERVAL_V4,
        };
        now - at >= interval
    }
}

/// A path that is being probed.
struct Probe {
    hop: NextHop,
    endpoint: SocketAddr,
    socket: MtuProbe,
    packet_bytes: u32,
    sent: Instant,
    /// Packets of this size that nobody has objected to.
    silent: u32,
}

impl Probe {
    /// Tells whether it was sent.
    fn send(&mut self, now: Instant) -> bool {
        self.sent = now;
        let sent = self.socket.send(self.packet_bytes);
        sent.inspect_err(|error| {
            tracing::debug!("cannot probe the path to {}: {error}", self.endpoint)
        })
        .is_ok()
    }
}

impl Paths {
    /// Notes what the route to a peer says.
    fn set_route(&mut self, hop: NextHop, endpoint: SocketAddr, route: RouteMtu) {
        let fresh = Known {
            endpoint,
            route,
            narrow_bytes: None,
            probed: None,
        };
        match self.known.get_mut(&hop) {
            Some(known) if known.endpoint == endpoint && known.route == route => return,
            // Another way to the same place may share the narrow part.
            Some(known) if known.endpoint == endpoint => {
                known.route = route;
                known.probed = None;
            }
            _ => {
                self.known.insert(hop, fresh);
            }
        }
        self.probes.retain(|probe| probe.hop != hop);
    }

    /// Probes a path if it is time to, with a packet as long as the route takes.
    fn probe(&mut self, hop: NextHop, sent_bytes: u64, listen: IpAddr, now: Instant) {
        let Some(known) = self.known.get_mut(&hop) else {
            return;
        };
        if known.route.is_direct
            || !known.is_due(sent_bytes, now)
            || self.probes.len() >= PROBES_MAX
        {
            return;
        }
        known.probed = Some((now, sent_bytes));
        let endpoint = known.endpoint;
        match random().and_then(|nonce| MtuProbe::open(listen, endpoint, nonce)) {
            Ok(socket) => {
                let mut probe = Probe {
                    hop,
                    endpoint,
                    socket,
                    packet_bytes: known.route.mtu_bytes,
                    sent: now,
                    silent: 0,
                };
                if probe.send(now) {
                    self.probes.push(probe);
                }
            }
            Err(error) => tracing::debug!("cannot probe the path to {endpoint}: {error}"),
        }
    }

    /// Takes in what has become of the probes; returns the peers whose paths take
    /// something else now.
    fn take_answers(&mut self, now: Instant) -> Vec<NextHop> {
        let mut changed = Vec::new();
        let known = &mut self.known;
        self.probes.retain_mut(|probe| {
            let Some(known) = known.get_mut(&probe.hop) else {
                return false;
            };
            let min_bytes = match probe.endpoint {
                SocketAddr::V4(_) => MTU_BYTES_MIN_V4,
                SocketAddr::V6(_) => MTU_BYTES_MIN_V6,
            };
            let told = probe.socket.too_long_for();
            let told = told.map(|mtu_bytes| mtu_bytes.max(min_bytes));
            if let Some(mtu_bytes) = told.filter(|bytes| *bytes < probe.packet_bytes) {
                if mtu_bytes < known.mtu_bytes() {
                    known.narrow_bytes = Some(mtu_bytes);
                    changed.push(probe.hop);
                }
                // There may be others further on that take less.
                probe.packet_bytes = mtu_bytes;
                probe.silent = 0;
                return probe.send(now);
            }
            if now - probe.sent < ANSWER_WAIT {
                return true;
            }
            probe.silent += 1;
            if probe.packet_bytes > known.mtu_bytes() {
                if probe.silent < SILENT_PROBES_TO_GROW {
                    return probe.send(now);
                }
                let is_narrow = probe.packet_bytes < known.route.mtu_bytes;
                known.narrow_bytes = is_narrow.then_some(probe.packet_bytes);
                changed.push(probe.hop);
            }
            false
        });
        changed
    }

    /// Forgets the paths to peers that are not there any more.
    pub fn retain(&mut self, is_there: impl Fn(NextHop) -> bool) {
        self.known.retain(|&hop, _| is_there(hop));
    }
}

/// Gives peers whose paths nothing is known of what the routes say.
pub fn learn_route_mtus(overlay: &mut Overlay, netlink: &mut Netlink) {
    let unknown: Vec<_> = overlay
        .peers()
        .filter(|(_, peer)| peer.path_mtu_bytes.is_none())
        .filter_map(|(hop, peer)| Some((hop, peer.endpoint_in_use()?)))
        .collect();
    for (hop, endpoint) in unknown {
        if let Ok(Some(route)) = netlink.route_mtu(endpoint) {
            overlay.set_path_mtu(hop, route.mtu_bytes, false);
        }
    }
}

impl Peers {
    /// Looks at the paths in use: where they lead, and what they take. Not all that
    /// decides on it is told, such as policy rules.
    pub(super) fn poll_paths(
        &mut self,
        now: Instant,
        listen: SocketAddr,
        host: &mut Host,
        workers: &Workers,
    ) -> bool {
        let mut changed = self.paths.take_answers(now);
        let is_used = |hop| {
            self.states
                .get(&hop)
                .is_some_and(|state| state.is_path_used)
        };
        let used: Vec<_> = self
            .overlay
            .peers()
            .filter(|&(hop, peer)| peer.is_suspended || is_used(hop))
            .filter_map(|(hop, peer)| Some((hop, peer.endpoint?)))
            .collect();
        let start = self.paths.cursor.checked_rem(used.len()).unwrap_or(0);
        self.paths.cursor = start + PATHS_MAX;
        let (before, after) = used.split_at(start);
        let turn: Vec<_> = after
            .iter()
            .chain(before)
            .take(PATHS_MAX)
            .copied()
            .collect();
        let mut is_news = !turn.is_empty() && self.check_ways(&turn, host, workers);
        for (hop, endpoint) in turn {
            if let Some(state) = self.states.get_mut(&hop) {
                state.is_path_used = false;
            }
            let Some(peer) = self.overlay.in_use(hop) else {
                continue;
            };
            let sent = peer.traffic.iter().map(|worker| worker.bytes_sent.get());
            let sent_bytes = sent.sum();
            if let Ok(Some(route)) = host.netlink.route_mtu(endpoint) {
                self.paths.set_route(hop, endpoint, route);
                self.paths.probe(hop, sent_bytes, listen.ip(), now);
                changed.push(hop);
            }
        }
        for hop in changed {
            is_news |= self.set_path_mtu(hop, now, host, workers);
        }
        is_news
    }

    /// Puts in force what is known of the path to a peer; tells whether that is
    /// news.
    fn set_path_mtu(
        &mut self,
        hop: NextHop,
        now: Instant,
        host: &mut Host,
        workers: &Workers,
    ) -> bool {
        let (Some(known), Some(peer)) = (self.paths.known.get(&hop), self.overlay.in_use(hop))
        else {
            return false;
        };
        if peer.endpoint != Some(known.endpoint) {
            return false;
        }
        let (before, mtu_bytes) = (peer.path_mtu_bytes, known.mtu_bytes());
        let is_narrow = mtu_bytes < known.route.mtu_bytes;
        if !self.overlay.set_path_mtu(hop, mtu_bytes, is_narrow) {
            return false;
        }
        if before.is_some_and(|before| before < mtu_bytes) {
            // What was refused for its length may pass now.
            workers.reset_limits();
        }
        // That a path is as wide as its route, where nothing was known of it, is no news.
        let is_told = before.map_or(is_narrow, |before| before != mtu_bytes);
        if is_told && host.log.admits(now) {
            let no_longer =
                before.map_or_else(String::new, |before| format!(", no longer {before}"));
            let endpoint = known.endpoint;
            tracing::info!("the path to {endpoint} takes {mtu_bytes} bytes{no_longer}");
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known(endpoint: &str, mtu_bytes: u32) -> Known {
        let route = RouteMtu {
            mtu_bytes,
            is_direct: false,
        };
        Known {
            endpoint: endpoint.parse().unwrap(),
            route,
            narrow_bytes: None,
            probed: None,
        }
    }

    #[test]
    fn a_path_is_probed_by_how_much_is_sent_there() {
        let start = Instant::now();
        for (endpoint, rest) in [
            ("10.0.0.1:1", PROBE_INTERVAL_V4),
            ("[fd00::1]:1", PROBE_INTERVAL_V6),
        ] {
            let mut path = known(endpoint, 1500);
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
        let mut paths = Paths::default();
        let endpoint = "10.0.0.1:1".parse().unwrap();
        let mut set = |mtu_bytes: u32, endpoint: SocketAddr| {
            paths.set_route(7, endpoint, known("10.0.0.1:1", mtu_bytes).route);
            let path = paths.known.get_mut(&7).unwrap();
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
