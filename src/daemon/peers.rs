//! The peers of a running tunnel: who they are and where, and what was last seen
//! of each.

mod last_seen;
mod path;
mod ports;
mod probes;

use std::collections::{BTreeSet, HashMap};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use crossbeam_channel::Receiver;

use self::last_seen::{LastSeen, News};
use self::path::PeerPath;
use self::ports::PeerPorts;
use self::probes::Probes;
pub use self::probes::probe_channel;
use super::host::Host;
use super::workers::Workers;
use super::{reach, resolve};
use crate::counters::PeerCounters;
use crate::dataplane::inbound::ReceivedProbe;
use crate::host::netlink::Netlink;
use crate::log::rate_limited::RateLimitedLog;
use crate::packet::batch::NextHop;
use crate::routing::dns::{Lookup, Names, SILENCE_MIN};
use crate::routing::overlay::{Overlay, Peer};

/// Peers whose paths are seen to in one poll. The others have their turn later.
const TURN_MAX: usize = 1024;

/// Most paths that are being probed at a time: each takes a descriptor.
const PATH_PROBES_MAX: usize = 64;

/// What was last seen of one peer.
struct PeerState {
    /// The peer's counters: another peer in its place has others.
    traffic: Arc<[PeerCounters]>,
    last_seen: LastSeen,
    ports: PeerPorts,
    /// `None` while nothing is sent there.
    path: Option<PeerPath>,
    /// We have sent to it since its path was looked at.
    is_path_used: bool,
}

impl PeerState {
    fn new(peer: &Peer, now: Instant) -> Self {
        Self {
            traffic: Arc::clone(&peer.traffic),
            last_seen: LastSeen::default(),
            ports: PeerPorts::new(now),
            path: None,
            is_path_used: false,
        }
    }
}

/// See the module's documentation.
pub struct Peers {
    /// The peers and their prefixes, as they are in force.
    pub overlay: Overlay,
    names: Names,
    states: HashMap<NextHop, PeerState>,
    probes: Probes,
    /// Whose path's turn it is.
    cursor: usize,
    /// Paths that are being probed.
    path_probes: usize,
    /// Of silent peers.
    silence_log: RateLimitedLog,
    ports_log: RateLimitedLog,
}

impl Peers {
    /// Nothing was seen yet. `probes`: those that the workers receive.
    pub fn new(overlay: Overlay, names: Names, probes: Receiver<ReceivedProbe>) -> Self {
        Self {
            overlay,
            names,
            states: HashMap::new(),
            probes: Probes::new(probes),
            cursor: 0,
            path_probes: 0,
            silence_log: RateLimitedLog::new("peers that went quiet or answered again"),
            ports_log: RateLimitedLog::new("changes of ports"),
        }
    }

    /// Puts a changed overlay in the place of the one in force.
    pub fn replace(&mut self, overlay: Overlay, now: Instant) {
        self.overlay = overlay;
        let overlay = &self.overlay;
        let names = overlay.peers().map(|(_, peer)| &peer.name);
        self.names
            .watch(names.filter(|name| name.literal().is_none()), now);
        self.names.tick(now);
        self.states.retain(|&hop, _| overlay.peer(hop).is_some());
    }

    /// Asks for all peers' names anew.
    pub fn resolve_again(&mut self) {
        self.names.ask_all(Instant::now());
    }

    /// Answers about names, for [`Self::take_answer`].
    pub fn answers(&self) -> Receiver<Lookup> {
        self.names.answers().clone()
    }

    /// A peer's name has an address, or still none; tells whether it has moved.
    pub fn take_answer(&mut self, answer: Lookup, listen: SocketAddr, host: &mut Host) -> bool {
        let (overlay, names) = (&mut self.overlay, &mut self.names);
        let state = overlay
            .find(&answer.name)
            .and_then(|(hop, _)| self.states.get(&hop));
        let is_silent = state
            .and_then(|state| state.last_seen.silence(Instant::now()))
            .is_some_and(|silence| silence >= SILENCE_MIN);
        let check = |overlay: &Overlay, endpoint| {
            reach::check_endpoint(listen, overlay, endpoint)?;
            host.check_outside(endpoint)
        };
        let taken = resolve::take_answer(overlay, names, answer, is_silent, check);
        match taken {
            None => return false,
            Some((_, Err(error))) => {
                tracing::warn!("{error}; trying again");
                return false;
            }
            Some((_, Ok((old, new)))) if old == Some(new) => return false,
            Some((name, Ok((Some(old), new)))) => {
                tracing::info!("peer {name} has moved from {old} to {new}");
            }
            Some((name, Ok((None, new)))) => tracing::info!("peer {name} is {new}"),
        }
        learn_route_mtus(&mut self.overlay, &mut host.netlink);
        true
    }

    /// Notes who answers, asks for the names of those who do not, and sees to ports
    /// and paths; tells whether the workers need a new table.
    pub fn poll(&mut self, listen: SocketAddr, host: &mut Host, workers: &Workers) -> bool {
        let now = Instant::now();
        let mut has_changed = self.poll_traffic(now);
        for hop in self.poll_paths(now) {
            has_changed |= self.set_path_mtu(hop, host, workers, now);
        }
        for hop in self.next_turn() {
            has_changed |= self.check_path(hop, listen, host, workers, now);
        }
        self.ask_about_ports(workers.descriptors(), now);
        has_changed
    }

    /// Takes in what the workers have counted and seen of each peer; tells whether one
    /// is to be sent to at another port.
    fn poll_traffic(&mut self, now: Instant) -> bool {
        let mut learned = Vec::new();
        for (hop, peer) in self.overlay.peers() {
            let new = || PeerState::new(peer, now);
            let state = self.states.entry(hop).or_insert_with(new);
            if !Arc::ptr_eq(&state.traffic, &peer.traffic) {
                *state = PeerState::new(peer, now);
            }
            let traffic = state.last_seen.poll(&peer.traffic, now);
            state.is_path_used |= traffic.sent;
            if traffic.received {
                self.names.note_traffic(&peer.name);
            }
            if let Some(news) = traffic.news.filter(|_| self.silence_log.admits(now)) {
                log_news(peer, news);
            }
            if let Some(silence) = state.last_seen.silence(now) {
                self.names.note_silence(&peer.name, silence, now);
            }
            state.ports.follow(peer, now);
            learned.extend(state.ports.poll(peer, traffic, now).map(|port| (hop, port)));
        }
        self.names.tick(now);
        self.silence_log.flush(now);
        self.ports_log.flush(now);
        let used = learned
            .into_iter()
            .map(|(hop, port)| self.use_port(hop, port, now));
        used.fold(false, |any, is_news| any | is_news)
    }

    /// Takes in what has become of path probes; returns the peers whose paths take
    /// something else now.
    fn poll_paths(&mut self, now: Instant) -> Vec<NextHop> {
        let mut changed = Vec::new();
        self.path_probes = 0;
        for (&hop, state) in &mut self.states {
            if let Some(path) = &mut state.path {
                changed.extend(path.poll(now).then_some(hop));
                self.path_probes += usize::from(path.is_probed());
            }
        }
        changed
    }

    fn next_turn(&mut self) -> Vec<NextHop> {
        let count = self.overlay.peers().count();
        let start = self.cursor.checked_rem(count).unwrap_or(0);
        self.cursor = start + TURN_MAX;
        let all = || self.overlay.peers().map(|(hop, _)| hop);
        let rotated = all().skip(start).chain(all().take(start));
        rotated.take(TURN_MAX).collect()
    }

    /// Checks the path to a peer if something was sent there: where it leads, and what
    /// it takes. Not all that decides on it is told, such as policy rules.
    fn check_path(
        &mut self,
        hop: NextHop,
        listen: SocketAddr,
        host: &mut Host,
        workers: &Workers,
        now: Instant,
    ) -> bool {
        let Some((peer, state)) = self.overlay.peer(hop).zip(self.states.get_mut(&hop)) else {
            return false;
        };
        let is_used = std::mem::take(&mut state.is_path_used);
        let Some(endpoint) = peer.endpoint.filter(|_| is_used || peer.is_suspended) else {
            return false;
        };
        let has_changed = self.check_ways(&[(hop, endpoint)], host, workers);
        let Some((peer, state)) = self.overlay.in_use(hop).zip(self.states.get_mut(&hop)) else {
            return has_changed;
        };
        let Ok(Some(route)) = host.netlink.route_mtu(endpoint) else {
            return has_changed;
        };
        let path = state
            .path
            .get_or_insert_with(|| PeerPath::new(endpoint, route));
        path.set_route(endpoint, route);
        let sent_bytes = peer
            .traffic
            .iter()
            .map(|worker| worker.bytes_sent.get())
            .sum();
        if path.is_due(sent_bytes, now) && self.path_probes < PATH_PROBES_MAX {
            self.path_probes += 1;
            path.start_probe(sent_bytes, listen.ip(), now);
        }
        has_changed | self.set_path_mtu(hop, host, workers, now)
    }

    /// Puts in force what is known of the path to a peer; tells whether that is
    /// news.
    fn set_path_mtu(
        &mut self,
        hop: NextHop,
        host: &mut Host,
        workers: &Workers,
        now: Instant,
    ) -> bool {
        let path = self.states.get(&hop).and_then(|state| state.path.as_ref());
        let Some((path, peer)) = path.zip(self.overlay.in_use(hop)) else {
            return false;
        };
        let (endpoint, mtu_bytes) = (path.endpoint, path.mtu_bytes());
        let (before, is_narrow) = (peer.path_mtu_bytes, mtu_bytes < path.route.mtu_bytes);
        let is_there = peer.endpoint == Some(endpoint);
        if !is_there || !self.overlay.set_path_mtu(hop, mtu_bytes, is_narrow) {
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
            tracing::info!("the path to {endpoint} takes {mtu_bytes} bytes{no_longer}");
        }
        true
    }

    /// What was last seen of a peer, if anything was.
    pub fn last_seen(&self, hop: NextHop) -> Option<&LastSeen> {
        self.states.get(&hop).map(|state| &state.last_seen)
    }

    /// A port that a peer was lately seen at, if not at the one in use.
    pub fn seen_port(&self, hop: NextHop) -> Option<u16> {
        self.states.get(&hop)?.ports.seen_port()
    }

    /// Says how many log lines were left out, for the last time.
    pub fn end_log(&mut self) {
        self.silence_log.end();
        self.ports_log.end();
    }

    /// Suspends those of these peers to whom the way leads through the tunnel
    /// itself, where each datagram would be wrapped again and again, and ends the
    /// suspension of those to whom it leads outside again; tells whether there
    /// were any.
    pub fn check_ways(
        &mut self,
        peers: &[(NextHop, SocketAddr)],
        host: &mut Host,
        workers: &Workers,
    ) -> bool {
        let (mut has_changed, mut has_resumed) = (false, false);
        for &(hop, endpoint) in peers {
            let Some(is_inside) = host.is_inside(endpoint) else {
                continue;
            };
            if !self.overlay.set_suspended(hop, is_inside) {
                continue;
            }
            has_changed = true;
            has_resumed |= !is_inside;
            if !host.log.admits(Instant::now()) {
                continue;
            }
            match is_inside {
                true => tracing::warn!(
                    "the way to peer {endpoint} leads through the tunnel itself: nothing is \
                     sent to it until there is another"
                ),
                false => {
                    tracing::info!("the way to peer {endpoint} leads outside the tunnel again");
                }
            }
        }
        if has_resumed {
            learn_route_mtus(&mut self.overlay, &mut host.netlink);
            // What was learnt of the way through the tunnel says nothing of this.
            workers.reset_limits();
        }
        has_changed
    }

    /// [`Self::check_ways`] to all peers.
    pub fn check_all_ways(&mut self, host: &mut Host, workers: &Workers) -> bool {
        let all = self.overlay.peers();
        let peers: Vec<_> = all
            .filter_map(|(hop, peer)| Some((hop, peer.endpoint?)))
            .collect();
        let present: BTreeSet<_> = peers.iter().map(|&(_, endpoint)| endpoint).collect();
        host.retain(|peer| present.contains(peer));
        self.check_ways(&peers, host, workers)
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

fn log_news(peer: &Peer, news: News) {
    let name = &peer.name;
    match news {
        News::Back => tracing::info!("peer {name} answers again"),
        News::Silent(Some(age)) => tracing::warn!(
            "peer {name} has gone quiet: packets are sent to it, but it was last seen {} s ago",
            age.as_secs()
        ),
        News::Silent(None) => tracing::warn!(
            "peer {name} does not answer: packets are sent to it, but it has never answered; \
             does it run, and do firewalls let UDP through both ways?"
        ),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use crossbeam_channel::Sender;

    use super::*;
    use crate::config::PeerName;
    use crate::routing::overlay::Origin;

    fn name() -> PeerName {
        PeerName {
            host: "far".into(),
            port: 8285,
        }
    }

    fn overlay() -> Overlay {
        let mut overlay = Overlay::default();
        overlay.count_for(1);
        overlay
            .add_peer(&name(), true, &[], Origin::Config)
            .unwrap();
        overlay.set_endpoint(0, "10.0.0.2:8285".parse().ok());
        overlay
    }

    /// One peer, whose name resolves; what is asked for, and where answers go.
    fn peers(now: Instant) -> (Peers, Receiver<PeerName>, Sender<Lookup>) {
        let (mut names, asked, answers) = Names::without_threads();
        names.watch([name()].iter(), now);
        names.tick(now);
        asked.recv().unwrap();
        names.note_answer(&name(), true, now);
        let (_, probes) = probe_channel();
        (Peers::new(overlay(), names, probes), asked, answers)
    }

    fn only(peers: &Peers) -> &Peer {
        peers.overlay.peer(0).unwrap()
    }

    #[test]
    fn the_name_of_a_silent_peer_is_asked_for() {
        let start = Instant::now();
        let (mut peers, asked, _answers) = peers(start);
        let mut asked_at = None;
        for second in 0..30 {
            only(&peers).traffic[0].packets_sent.add(1);
            assert!(!peers.poll_traffic(start + Duration::from_secs(second)));
            if asked.try_recv().is_ok() {
                asked_at = asked_at.or(Some(second));
            }
        }
        assert_eq!(asked_at, Some(10));
        // Who answers is not asked about.
        only(&peers).traffic[0].packets_received.add(1);
        peers.poll_traffic(start + Duration::from_secs(30));
        let now = start + Duration::from_secs(33);
        assert_eq!(
            peers.last_seen(0).unwrap().age(&only(&peers).traffic, now),
            Some(Duration::from_secs(3))
        );
    }

    #[test]
    fn a_peer_is_sent_to_where_it_sends_from() {
        let now = Instant::now();
        let (mut peers, ..) = peers(now);
        peers.poll_traffic(now);
        only(&peers).traffic[0].note_port(21224, 8285);
        assert!(peers.poll_traffic(now));
        let endpoint = only(&peers).endpoint_learned();
        assert_eq!(endpoint, "10.0.0.2:21224".parse().ok());
    }

    #[test]
    fn another_peer_in_the_same_place_is_not_known() {
        let now = Instant::now();
        let (mut peers, ..) = peers(now);
        only(&peers).traffic[0].packets_received.add(1);
        peers.poll_traffic(now);
        let age = |peers: &Peers| {
            let seen = peers.last_seen(0)?;
            seen.age(&only(peers).traffic, now)
        };
        assert_eq!(age(&peers), Some(Duration::ZERO));
        peers.replace(overlay(), now);
        peers.poll_traffic(now);
        assert_eq!(age(&peers), None);
        peers.replace(Overlay::default(), now);
        assert!(peers.last_seen(0).is_none());
    }

    #[test]
    fn each_peer_has_its_turn() {
        let now = Instant::now();
        let (mut peers, ..) = peers(now);
        for number in 1..3000u32 {
            let name = PeerName {
                host: format!("peer{number}"),
                port: 1,
            };
            let prefix = ipnet::IpNet::from(std::net::IpAddr::V4(number.into()));
            peers
                .overlay
                .add_peer(&name, false, &[prefix], Origin::Runtime)
                .unwrap();
        }
        let turns: Vec<_> = (0..3).map(|_| peers.next_turn()).collect();
        assert!(turns.iter().all(|turn| turn.len() == TURN_MAX));
        let all: BTreeSet<_> = turns.concat().into_iter().collect();
        assert_eq!(all.len(), 3000);
    }
}
