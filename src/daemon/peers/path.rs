//! Whether there is a path to a peer, whether it leads through the tunnel itself, and how
//! long packets may be on it. This host's route says where to begin, and packets that
//! are sent to find out say what the path beyond takes. docs/mtu.md says why.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use super::Peers;
use crate::counters::PeerCounters;
use crate::daemon::host::Host;
use crate::host::mtu_probe::MtuProbe;
use crate::host::netlink::RouteMtu;
use crate::host::path::Source;
use crate::io::random;
use crate::packet::batch::NextHop;
use crate::wire::Mode;

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
pub(super) const PATH_PROBES_MAX: usize = 64;

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
                %endpoint,
                "this host has no route to peer {endpoint}: nothing reaches it until there is one"
            ),
            Route::Inside => tracing::warn!(
                %endpoint,
                "the path to peer {endpoint} leads through the tunnel itself: nothing is sent to \
                 it until there is another"
            ),
            Route::Outside => {
                tracing::info!(%endpoint, "this host has a route to peer {endpoint} again")
            }
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
        let is_used = std::mem::take(&mut state.is_path_used);
        let is_due = is_used || peer.path_mtu_bytes.is_none();
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
        // As the workers' datagrams leave.
        let source = Source {
            listen: peer.called().unwrap_or(listen),
            mark: host.netlink.fwmark,
        };
        let path = state
            .path
            .get_or_insert_with(|| PeerPath::new(endpoint, source, route));
        path.set_route(endpoint, source, route);
        if is_used {
            self.start_probe(hop, now);
        }
        self.use_path(hop, now);
        1
    }

    /// Probes the path to a peer if it is time to, and there are not too many probes.
    fn start_probe(&mut self, hop: NextHop, now: Instant) {
        let Some((peer, state)) = self.overlay.peer(hop).zip(self.states.get_mut(&hop)) else {
            return;
        };
        let sent = peer.traffic.iter().map(PeerCounters::bytes_sent);
        let sent_bytes = sent.sum();
        if self.path_probes < PATH_PROBES_MAX
            && let Some(path) = &mut state.path
            && path.is_due(sent_bytes, now)
        {
            path.start_probe(sent_bytes, peer.mode(), now);
            self.path_probes += usize::from(path.is_probed());
        }
    }

    /// Takes in what has become of all probes, not only of the peers in turn, so that
    /// their descriptors are free again soon.
    pub(super) fn poll_path_probes(&mut self, now: Instant) {
        self.path_probes = 0;
        let mut polled = Vec::new();
        for (&hop, state) in &mut self.states {
            if let Some(path) = state.path.as_mut().filter(|path| path.is_probed()) {
                path.poll();
                self.path_probes += usize::from(path.is_probed());
                polled.push(hop);
            }
        }
        for hop in polled {
            self.use_path(hop, now);
        }
    }

    /// Puts in force what is known of the path to a peer, if it is still there.
    fn use_path(&mut self, hop: NextHop, now: Instant) {
        let known = self.states.get(&hop).and_then(|state| state.path.as_ref());
        let Some((peer, path)) = self.overlay.in_use(hop).zip(known) else {
            return;
        };
        let (endpoint, mtu_bytes) = (path.endpoint, path.mtu_bytes());
        if peer.endpoint != Some(endpoint) {
            return;
        }
        let before = peer.path_mtu_bytes;
        let is_narrow = mtu_bytes < path.route.mtu_bytes;
        self.has_changed |= self.overlay.set_path_mtu(hop, mtu_bytes, is_narrow);
        if let Some(before) = before.filter(|before| *before != mtu_bytes)
            && self.log.admits(now)
        {
            tracing::info!(%endpoint, mtu_bytes, old_bytes = before, "the path to {endpoint} takes {mtu_bytes} bytes, no longer {before}");
        }
    }
}

/// What is known of the path to one peer.
pub struct PeerPath {
    /// Where it leads.
    endpoint: SocketAddr,
    /// Where it begins.
    source: Source,
    /// What this host's route says.
    route: RouteMtu,
    /// What a router on it takes, if that is less than the route said.
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
    /// Packets of this size that nobody has objected to.
    silent: u32,
}

impl Probe {
    fn start(
        source: Source,
        endpoint: SocketAddr,
        mode: Mode,
        packet_bytes: u32,
    ) -> io::Result<Self> {
        let probe = Self {
            socket: MtuProbe::open(source, endpoint, mode, random()?)?,
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
    fn new(endpoint: SocketAddr, source: Source, route: RouteMtu) -> Self {
        Self {
            endpoint,
            source,
            route,
            narrow_bytes: None,
            probed: None,
            probe: None,
        }
    }

    /// Notes where it begins, and what the route says now. Another way to the same place may
    /// share the narrow part.
    fn set_route(&mut self, endpoint: SocketAddr, source: Source, route: RouteMtu) {
        if self.endpoint != endpoint {
            *self = Self::new(endpoint, source, route);
        } else if (self.source, self.route) != (source, route) {
            (self.source, self.route) = (source, route);
            (self.probed, self.probe) = (None, None);
        }
    }

    /// What it takes, as far as is known.
    fn mtu_bytes(&self) -> u32 {
        let narrow = self.narrow_bytes.filter(|_| !self.route.is_direct);
        narrow.map_or(self.route.mtu_bytes, |narrow| {
            narrow.min(self.route.mtu_bytes)
        })
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
    fn start_probe(&mut self, sent_bytes: u64, mode: Mode, now: Instant) {
        self.probed = Some((now, sent_bytes));
        match Probe::start(self.source, self.endpoint, mode, self.route.mtu_bytes) {
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
        let mtu_bytes = self.mtu_bytes();
        let objection = probe.socket.too_long_for();
        let objection = objection.map(|bytes| bytes.max(min_bytes));
        if let Some(bytes) = objection.filter(|bytes| *bytes < probe.packet_bytes) {
            // There may be others further on that take less.
            (probe.packet_bytes, probe.silent) = (bytes, 0);
            self.narrow_bytes = Some(mtu_bytes.min(bytes));
        } else {
            probe.silent += 1;
            if probe.packet_bytes <= mtu_bytes || probe.silent >= SILENT_PROBES_TO_GROW {
                let is_narrow = probe.packet_bytes < self.route.mtu_bytes;
                self.narrow_bytes = is_narrow.then_some(probe.packet_bytes);
                return;
            }
        }
        // It ends if that fails.
        self.probe = probe.send().ok();
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, UdpSocket};
    use std::os::fd::AsFd;
    use std::sync::Arc;

    use super::*;
    use crate::config::parse_peer;
    use crate::daemon::peers::probe_channel;
    use crate::host::netlink::Netlink;
    use crate::io::tun;
    use crate::packet::coalesce::TunOffloads;
    use crate::routing::dns::Names;
    use crate::routing::overlay::{Origin, Overlay};
    use crate::testbed::{UNDERLAY_NAME, pair};
    use crate::wire::Endpoint;

    fn route(mtu_bytes: u32) -> RouteMtu {
        RouteMtu {
            mtu_bytes,
            is_direct: false,
        }
    }

    fn anywhere() -> Source {
        Source::unmarked(Ipv4Addr::UNSPECIFIED.into())
    }

    #[test]
    fn a_path_is_probed_by_how_much_is_sent_there() {
        let start = Instant::now();
        for (endpoint, rest) in [
            ("10.0.0.1:1", PROBE_INTERVAL_V4),
            ("[fd00::1]:1", PROBE_INTERVAL_V6),
        ] {
            let mut path = PeerPath::new(endpoint.parse().unwrap(), anywhere(), route(1500));
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

    #[test]
    fn another_route_is_probed_at_once_and_never_exceeded() {
        let endpoint = "10.0.0.1:1".parse().unwrap();
        let mut path = PeerPath::new(endpoint, anywhere(), route(1500));
        let mut set = |route: RouteMtu, endpoint: SocketAddr| {
            path.set_route(endpoint, anywhere(), route);
            let was_probed = path.probed.replace((Instant::now(), 0)).is_some();
            let mtu_before = path.mtu_bytes();
            path.narrow_bytes = Some(1400);
            (was_probed, mtu_before, path.mtu_bytes())
        };
        assert_eq!(set(route(1500), endpoint), (false, 1500, 1400));
        assert_eq!(set(route(1500), endpoint), (true, 1400, 1400));
        assert_eq!(set(route(1300), endpoint), (false, 1300, 1300));
        assert_eq!(set(route(1500), endpoint), (false, 1400, 1400));
        // There is nothing narrow on a link.
        let direct = RouteMtu {
            is_direct: true,
            ..route(1500)
        };
        assert_eq!(set(direct, endpoint), (false, 1500, 1500));
        // Nothing is known of the path to another place.
        let elsewhere = "10.0.0.2:1".parse().unwrap();
        assert_eq!(set(route(1500), elsewhere), (false, 1500, 1400));
    }

    #[test]
    fn few_paths_are_probed_at_a_time_and_all_in_their_turn() {
        let (start, count) = (Instant::now(), 150);
        let mut overlay = Overlay::default();
        for number in 0..count {
            let host = Ipv4Addr::from([127, 1, 0, number]);
            let spec = parse_peer(&host.to_string()).unwrap();
            overlay.add_peer(&spec, false, Origin::Config).unwrap();
        }
        let (names, ..) = Names::without_threads();
        let mut peers = Peers::new(overlay, names, probe_channel().1);
        for (number, hop) in (0..count).zip(0..) {
            let endpoint = SocketAddr::from(([127, 1, 0, number], 8285));
            peers.overlay.set_endpoint(hop, Some(endpoint));
            let path = PeerPath::new(endpoint, anywhere(), route(1500));
            peers.states.get_mut(&hop).unwrap().path = Some(path);
        }
        for outstanding in [64, 64, 22, 0] {
            peers.poll_path_probes(start);
            assert_eq!(peers.path_probes, 0);
            peers.take_turns(|peers, hop| {
                peers.start_probe(hop, start);
                1
            });
            let paths = peers.states.values().flat_map(|state| &state.path);
            let probed = paths.filter(|path| path.is_probed()).count();
            assert_eq!((probed, peers.path_probes), (outstanding, outstanding));
        }
        assert_eq!(peers.overlay.peer(0).unwrap().path_mtu_bytes, Some(1500));
    }

    /// A firewall or NAT in between may let no others through, and policy rules may lead
    /// elsewhere from there.
    #[test]
    fn probes_leave_from_the_address_that_the_peer_has_called() {
        const KEY: &str = "xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg=";
        let nets = ["10.1.0.1/24", "10.1.0.2/24"].map(|net| net.parse().unwrap());
        let hosts = pair(&[(nets[0], nets[1])], 1500).unwrap();
        let [mut near, mut far] = [&hosts.a, &hosts.b].map(|host| host.netlink().unwrap());
        let [index, far_index] =
            [&mut near, &mut far].map(|host| host.link_index(UNDERLAY_NAME).unwrap().unwrap());
        near.add_address(index, "10.1.0.7/24".parse().unwrap())
            .unwrap();
        let behind = "10.9.9.9/32".parse().unwrap();
        near.add_route(behind, Some(nets[1].addr()), Some(index))
            .unwrap();
        far.add_address(far_index, behind).unwrap();
        let receiver = hosts.b.run(|| UdpSocket::bind("10.9.9.9:0")).unwrap();
        let wait = Some(Duration::from_secs(30));
        receiver.set_read_timeout(wait).unwrap();
        let address = receiver.local_addr().unwrap();

        let mut overlay = Overlay::default();
        let spec = parse_peer(&format!("{KEY}@{address}")).unwrap();
        overlay.add_peer(&spec, true, Origin::Config).unwrap();
        let sessions = Arc::clone(&overlay.peer(0).unwrap().secure.as_ref().unwrap().sessions);
        let (names, ..) = Names::without_threads();
        let mut peers = Peers::new(overlay, names, probe_channel().1);
        let called = Some([10, 1, 0, 7].into());
        let endpoint = Endpoint {
            address,
            source: called,
        };
        sessions.endpoint.store(Some(Arc::new(endpoint)));
        let senders = hosts.a.run(|| {
            let none = TunOffloads {
                tcp: false,
                udp: false,
            };
            let device = tun::create("tun0", 1, none).unwrap();
            let queue = device.queues[0].as_fd();
            let mut host = Host::new(Netlink::open().unwrap(), queue, "tun0").unwrap();
            let mut probe = || {
                peers.states.get_mut(&0).unwrap().is_path_used = true;
                let any = Ipv4Addr::UNSPECIFIED.into();
                peers.check_path(0, any, &mut host, Instant::now());
                receiver.recv_from(&mut [0; 2000]).unwrap().1.ip()
            };
            let first = probe();
            // From another address it is another path: it is probed at once.
            sessions.forget_source();
            [first, probe()]
        });
        assert_eq!(senders.map(Some), [called, Some(nets[0].addr())]);
    }
}
