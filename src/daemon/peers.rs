//! The peers of a running tunnel: who they are and where, and what was last seen
//! of each.

mod last_seen;
mod paths;
mod ports;

use std::collections::{BTreeSet, HashMap};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use crossbeam_channel::Receiver;

use self::last_seen::{LastSeen, News};
use self::paths::Paths;
pub use self::paths::learn_route_mtus;
use self::ports::Ports;
pub use self::ports::probe_channel;
use super::host::Host;
use super::reach;
use super::workers::Workers;
use crate::counters::PeerCounters;
use crate::dataplane::inbound::ReceivedProbe;
use crate::log::rate_limited::Journal;
use crate::packet::train::NextHop;
use crate::routing::dns::{self, Answer, Names};
use crate::routing::overlay::{Overlay, Peer};

/// What was last seen of one peer.
struct PeerState {
    /// The peer's counters: another peer in its place has others.
    traffic: Arc<[PeerCounters]>,
    last_seen: LastSeen,
    /// We have sent to it since its path was looked at.
    is_path_used: bool,
}

impl PeerState {
    fn new(peer: &Peer) -> Self {
        Self {
            traffic: Arc::clone(&peer.traffic),
            last_seen: LastSeen::default(),
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
    ports: Ports,
    paths: Paths,
    /// Of silent peers.
    log: Journal,
}

impl Peers {
    /// Nothing was seen yet. `own_ports`: the workers'; `probes`: those that they
    /// receive.
    pub fn new(
        overlay: Overlay,
        names: Names,
        own_ports: Vec<Option<u16>>,
        probes: Receiver<ReceivedProbe>,
    ) -> Self {
        Self {
            overlay,
            names,
            states: HashMap::new(),
            ports: Ports::new(own_ports, probes),
            paths: Paths::default(),
            log: Journal::new("peers that went quiet or were heard again"),
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
        self.states.retain(|&hop, _| overlay.has(hop));
        self.paths.retain(|hop| overlay.has(hop));
    }

    /// Asks for all peers' names anew.
    pub fn resolve_again(&mut self) {
        self.names.ask_all(Instant::now());
    }

    /// Answers about names, for [`Self::take_answer`].
    pub fn answers(&self) -> Receiver<Answer> {
        self.names.answers().clone()
    }

    /// A peer's name has an address, or still none; tells whether it has moved.
    pub fn take_answer(&mut self, answer: Answer, listen: SocketAddr, host: &mut Host) -> bool {
        let Answer { name, result } = answer;
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

    /// Notes who answers, asks for the names of those who do not, and looks at
    /// the ports and paths in use; tells whether the workers need a new table.
    pub fn poll(&mut self, listen: SocketAddr, host: &mut Host, workers: &Workers) -> bool {
        let now = Instant::now();
        for (hop, peer) in self.overlay.peers() {
            let new = || PeerState::new(peer);
            let state = self.states.entry(hop).or_insert_with(new);
            if !Arc::ptr_eq(&state.traffic, &peer.traffic) {
                *state = PeerState::new(peer);
            }
            let traffic = state.last_seen.poll(&peer.traffic, now);
            self.ports
                .note_traffic(hop, traffic.received, traffic.sent, now);
            state.is_path_used |= traffic.sent;
            if traffic.received {
                self.names.answered(&peer.name);
            }
            if let Some(news) = traffic.news.filter(|_| self.log.admits(now)) {
                log_news(peer, news);
            }
            if let Some(silence) = state.last_seen.silence(now) {
                self.names.silent(&peer.name, silence, now);
            }
        }
        self.names.tick(now);
        self.log.flush(now);
        let has_changed = self.poll_ports(now, workers);
        has_changed | self.poll_paths(now, listen, host, workers)
    }

    /// What was last seen of a peer, if anything was.
    pub fn last_seen(&self, hop: NextHop) -> Option<&LastSeen> {
        self.states.get(&hop).map(|state| &state.last_seen)
    }

    /// The workers' own ports.
    pub fn own_ports(&self) -> Vec<u16> {
        self.ports.own()
    }

    /// A port that a peer was lately seen at, if not at the one in use.
    pub fn seen_port(&self, hop: NextHop) -> Option<u16> {
        self.ports.seen(hop)
    }

    /// Says how many log lines were left out, for the last time.
    pub fn end_log(&mut self) {
        self.log.end();
        self.ports.end_log();
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
