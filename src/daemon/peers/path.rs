//! Whether there is a path to a peer, whether it leads through the tunnel itself, and how
//! long packets may be on it. This host's route says where to begin, and packets that
//! are sent to find out say what the path beyond takes. docs/mtu.md says why.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use super::Peers;
use crate::daemon::host::Host;
use crate::host::mtu_probe::MtuProbe;
use crate::host::netlink::RouteMtu;
use crate::io::random;
use crate::packet::batch::NextHop;

/// How often the path to a peer in use is probed: once in so long if much is sent
/// there, and else less often, so that probes are a small part of what is sent.
const PROBE_INTERVAL_BUSY: Duration = Duration::from_secs(3);
/// Over IPv6, where routers do not fragment: as long as a narrower path may go
/// unnoticed while what is too long for it is lost.
const PROBE_INTERVAL_V6: Duration = Duration::from_secs(10);
const PROBE_INTERVAL_V4: Duration = Duration::from_secs(600);

/// Bytes sent to a peer since the last probe that make it a busy one.
const BUSY_BYTES: u64 = 64 << 10;

/// Probes that nobody has objected to, until a path counts as wider than it did:
/// one of them, or the objection, may have been lost.
const SILENT_PROBES_TO_GROW: u32 = 3;

/// What no path has less of: RFC 791's datagram that every host takes, and RFC
/// 8200's smallest MTU.
const MTU_BYTES_MIN_V4: u32 = 576;
const MTU_BYTES_MIN_V6: u32 = 1280;

/// Where the path to a peer leads.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Route {
    /// There is none.
    None,
    /// Through the tunnel itself.
    Inside,
    /// Outside the tunnel, as it should.
    Outside,
}

impl Peers {
    /// Checks where the paths to all peers lead.
    pub fn check_routes(&mut self, host: &mut Host) {
        let hops: Vec<_> = self.overlay.peers().map(|(hop, _)| hop).collect();
        for hop in hops {
            self.check_route(hop, host, Instant::now());
        }
    }

    /// Suspends a peer when the path to it leads through the tunnel itself, where each
    /// datagram would be wrapped again and again, and resumes it when the path leads
    /// outside again.
    fn check_route(&mut self, hop: NextHop, host: &mut Host, now: Instant) {
        let Some((peer, state)) = self.overlay.peer(hop).zip(self.states.get_mut(&hop)) else {
            return;
        };
        let Some(endpoint) = peer.endpoint else {
            return;
        };
        let route = match host.netlink.interface_to(endpoint) {
            Ok(None) => Route::None,
            Ok(interface) if interface == host.device.index => Route::Inside,
            Ok(_) => Route::Outside,
            Err(error) => {
                tracing::debug!("{error}");
                return;
            }
        };
        self.has_changed |= self.overlay.set_suspended(hop, route == Route::Inside);
        let is_new = std::mem::replace(&mut state.route, route) != route;
        if !is_new || !self.log.admits(now) {
            return;
        }
        match route {
            Route::None => tracing::warn!(
                "this host has no route to peer {endpoint}: nothing reaches it until there is one"
            ),
            Route::Inside => tracing::warn!(
                "the path to peer {endpoint} leads through the tunnel itself: nothing is sent to \
                 it until there is another"
            ),
            Route::Outside => tracing::info!("this host has a route to peer {endpoint} again"),
        }
    }

    /// Checks the path to a peer if something was sent there, or nothing is known of it:
    /// the kernel does not report all that decides on it, such as policy rules. Returns
    /// how many paths that were.
    pub(super) fn check_path(
        &mut self,
        hop: NextHop,
        listen: IpAddr,
        host: &mut Host,
        now: Instant,
    ) -> usize {
        let Some((peer, state)) = self.overlay.peer(hop).zip(self.states.get_mut(&hop)) else {
            return 0;
        };
        let is_probed = state.path.as_ref().is_some_and(PeerPath::is_probed);
        let is_used = std::mem::take(&mut state.is_path_used);
        let is_due = is_used || is_probed || peer.path_mtu_bytes.is_none();
        let Some(endpoint) = peer.endpoint.filter(|_| is_due) else {
            return 0;
        };
        self.check_route(hop, host, now);
        let Some((peer, state)) = self.overlay.in_use(hop).zip(self.states.get_mut(&hop)) else {
            return 1;
        };
        let Ok(Some(route)) = host.netlink.route_mtu(endpoint) else {
            return 1;
        };
        let known = state.path.take();
        let known = known.filter(|path| (path.endpoint, path.route) == (endpoint, route));
        let path = known.unwrap_or_else(|| PeerPath::new(endpoint, route));
        let path = state.path.insert(path);
        path.poll();
        let sent = peer.traffic.iter().map(|worker| worker.bytes_sent.get());
        let sent_bytes = sent.sum();
        if is_used && path.is_due(sent_bytes, now) {
            path.start_probe(sent_bytes, listen, now);
        }
        let (before, mtu_bytes) = (peer.path_mtu_bytes, path.mtu_bytes);
        let is_narrow = mtu_bytes < route.mtu_bytes;
        self.has_changed |= self.overlay.set_path_mtu(hop, mtu_bytes, is_narrow);
        if let Some(before) = before.filter(|before| *before != mtu_bytes)
            && self.log.admits(now)
        {
            tracing::info!("the path to {endpoint} takes {mtu_bytes} bytes, no longer {before}");
        }
        1
    }
}

/// What is known of the path to one peer.
pub struct PeerPath {
    /// Where it leads.
    endpoint: SocketAddr,
    /// What this host's route says.
    route: RouteMtu,
    /// What it takes, as far as is known: what the route says, or less.
    mtu_bytes: u32,
    /// When it was probed last, and how many bytes had been sent by then; `None`: it
    /// is to be probed at once.
    probed: Option<(Instant, u64)>,
    probe: Option<Probe>,
}

/// A path that is being probed.
struct Probe {
    socket: MtuProbe,
    packet_bytes: u32,
    /// Packets of this size that nobody has objected to.
    silent: u32,
}

impl Probe {
    fn start(listen: IpAddr, endpoint: SocketAddr, packet_bytes: u32) -> io::Result<Self> {
        let probe = Self {
            socket: MtuProbe::open(listen, endpoint, random()?)?,
            packet_bytes,
            silent: 0,
        };
        probe.send()
    }

    fn send(mut self) -> io::Result<Self> {
        self.socket.send(self.packet_bytes)?;
        Ok(self)
    }
}

impl PeerPath {
    /// A path of which only the route is known.
    fn new(endpoint: SocketAddr, route: RouteMtu) -> Self {
        Self {
            endpoint,
            route,
            mtu_bytes: route.mtu_bytes,
            probed: None,
            probe: None,
        }
    }

    fn is_probed(&self) -> bool {
        self.probe.is_some()
    }

    /// Whether it is time to probe, after `sent_bytes` to this peer in all.
    fn is_due(&self, sent_bytes: u64, now: Instant) -> bool {
        if self.route.is_direct || self.is_probed() {
            return false;
        }
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

    /// Sends a packet as long as the route takes.
    fn start_probe(&mut self, sent_bytes: u64, listen: IpAddr, now: Instant) {
        self.probed = Some((now, sent_bytes));
        match Probe::start(listen, self.endpoint, self.route.mtu_bytes) {
            Ok(probe) => self.probe = Some(probe),
            Err(error) => tracing::debug!("cannot probe the path to {}: {error}", self.endpoint),
        }
    }

    /// Takes in what has become of the probe: somebody has objected by now, or nobody
    /// does.
    fn poll(&mut self) {
        let Some(mut probe) = self.probe.take() else {
            return;
        };
        let min_bytes = match self.endpoint {
            SocketAddr::V4(_) => MTU_BYTES_MIN_V4,
            SocketAddr::V6(_) => MTU_BYTES_MIN_V6,
        };
        let objection = probe.socket.too_long_for();
        let objection = objection.map(|bytes| bytes.max(min_bytes));
        if let Some(bytes) = objection.filter(|bytes| *bytes < probe.packet_bytes) {
            // There may be others further on that take less.
            (probe.packet_bytes, probe.silent) = (bytes, 0);
            self.mtu_bytes = self.mtu_bytes.min(bytes);
        } else {
            probe.silent += 1;
            if probe.packet_bytes <= self.mtu_bytes || probe.silent >= SILENT_PROBES_TO_GROW {
                self.mtu_bytes = probe.packet_bytes;
                return;
            }
        }
        // It ends if that fails.
        self.probe = probe.send().ok();
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
            path.route.is_direct = true;
            assert!(!path.is_due(1000, start + rest));
        }
    }
}
