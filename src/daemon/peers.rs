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
use super::reach;
use super::workers::Workers;
use crate::counters::PeerCounters;
use crate::dataplane::inbound::ReceivedProbe;
use crate::host::netlink::Netlink;
use crate::log::rate_limited::Journal;
use crate::packet::train::NextHop;
use crate::routing::dns::{self, Lookup, Names};
use crate::routing::overlay::{Overlay, Peer};

/// Peers whose ports and paths are seen to in one poll. The others have their turn
/// later.
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
    /// Whose turn it is.
    cursor: usize,
    /// Paths that are being probed.
    path_probes: usize,
    /// Of silent peers.
    silence_log: Journal,
    ports_log: Journal,
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
            silence_log: Journal::new("peers that went quiet or were heard again"),
            ports_log: Journal::new("changes of ports"),
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
        let Lookup { name, result } = answer;
        let Some((hop, peer)) = self.overlay.find(&name) else {
            return false;
        };
        let old = peer.endpoint;
        let is_silent = self.names.is_for_silence(&name);
        // Addresses that cannot be the peer's are as good as none: the name is
        // asked for again until it has another.
        let result = result.and_then(|addresses| {
            let addresses = dns::in_order(addresses, old, is_silent);
            dns::first_usable(&name, addresses, |endpoint| {
                reach::check_endpoint(listen, &self.overlay, endpoint)?;
                host.check_outside(endpoint)
            })
        });
        if !self.names.heard(&name, result.is_ok(), Instant::now()) {
            return false;
        }
        let endpoint = match result {
            Ok(endpoint) => endpoint,
            Err(error) => {
                tracing::warn!("{error}; trying again");
                return false;
            }
        };
        match old {
            Some(old) if old == endpoint => return false,
            Some(old) => tracing::info!("peer {name} has moved from {old} to {endpoint}"),
            None => tracing::info!("peer {name} is {endpoint}"),
        }
        self.overlay.set_endpoint(hop, Some(endpoint));
        learn_route_mtus(&mut self.overlay, &mut host.netlink);
        true
    }

    /// Notes who answers, asks for the names of those who do not, and sees to ports
    /// and paths; tells whether the workers need a new table.
    pub fn poll(&mut self, listen: SocketAddr, host: &mut Host, workers: &Workers) -> bool {
        let now = Instant::now();
        let (mut learned, mut grown_or_shrunk) = (Vec::new(), Vec::new());
        self.path_probes = 0;
        for (hop, peer) in self.overlay.peers() {
            let new = || PeerState::new(peer, now);
            let state = self.states.entry(hop).or_insert_with(new);
            if !Arc::ptr_eq(&state.traffic, &peer.traffic) {
                *state = PeerState::new(peer, now);
            }
            let traffic = state.last_seen.poll(&peer.traffic, now);
            state.is_path_used |= traffic.sent;
            if traffic.received {
                self.names.answered(&peer.name);
            }
            if let Some(news) = traffic.news.filter(|_| self.silence_log.admits(now)) {
                log_news(peer, news);
            }
            if let Some(silence) = state.last_seen.silence(now) {
                self.names.silent(&peer.name, silence, now);
            }
            state.ports.follow(peer, now);
            learned.extend(state.ports.poll(peer, traffic, now).map(|port| (hop, port)));
            if let Some(path) = &mut state.path {
                grown_or_shrunk.extend(path.poll(now).then_some(hop));
                self.path_probes += usize::from(path.is_probed());
            }
        }
        self.names.tick(now);
        self.silence_log.flush(now);
        self.ports_log.flush(now);
        let mut has_changed = false;
        for (hop, port) in learned {
            has_changed |= self.use_port(hop, port, now);
        }
        for hop in grown_or_shrunk {
            has_changed |= self.set_path_mtu(hop, host, workers, now);
        }
        for hop in self.next_turn() {
            has_changed |= self.check_path(hop, listen, host, workers, now);
            if let Some((peer, state)) = self.overlay.in_use(hop).zip(self.states.get_mut(&hop)) {
                state.ports.follow(peer, now);
                state.ports.ask(peer, workers, &mut self.ports_log, now);
            }
        }
        has_changed
    }

    fn next_turn(&mut self) -> Vec<NextHop> {
        let count = self.overlay.peer_count();
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
        News::Back => tracing::info!("peer {name} is heard again"),
        News::Silent(Some(age)) => tracing::warn!(
            "peer {name} has gone quiet: packets are sent to it, but it was last heard {} s ago",
            age.as_secs()
        ),
        News::Silent(None) => tracing::warn!(
            "peer {name} does not answer: packets are sent to it, but it has never been heard; \
             does it run, and do firewalls let UDP through both ways?"
        ),
    }
}
