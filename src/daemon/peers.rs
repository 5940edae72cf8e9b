//! The peers of a running tunnel: who they are and where, and what was last seen
//! of each.

mod keepalive;
mod last_seen;
mod path;
mod ports;
mod probes;
mod roaming;

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::Receiver;

use self::last_seen::LastSeen;
use self::path::{PATH_PROBES_MAX, PeerPath, Route};
use self::ports::PeerPorts;
use self::probes::PROBES_MAX;
pub use self::probes::probe_channel;
use super::host::Host;
use super::workers::WorkerFds;
use super::{reach, resolve};
use crate::counters::PeerCounters;
use crate::dataplane::inbound::ReceivedProbe;
use crate::error::{Error, Result};
use crate::host::path::Source;
use crate::host::unreachable::UnreachableProbe;
use crate::log::rate_limited::RateLimitedLog;
use crate::packet::batch::NextHop;
use crate::routing::dns::{Lookup, Names, SILENCE_MIN};
use crate::routing::overlay::{Overlay, Peer};

/// Paths that are checked, and requests about ports, in one poll: there must be room for
/// the replies. Other peers have their turn in the next one.
const WORK_MAX: usize = 512;

/// How long a few lines about peers stand for all.
const LOG_WINDOW: Duration = Duration::from_secs(10);

/// What is known of one peer, from when it is added until it is removed.
struct PeerState {
    /// The peer's counters: another peer in its place has others.
    traffic: Arc<[PeerCounters]>,
    last_seen: LastSeen,
    ports: PeerPorts,
    route: Route,
    /// We have sent to it since its path was checked.
    is_path_used: bool,
    /// `None` until its path is checked.
    path: Option<PeerPath>,
    /// Where it is, as this thread and its sessions agreed last.
    agreed_endpoint: Option<SocketAddr>,
    /// Where the last keepalive was sent to, and when the next one is due there (plain mode).
    keepalive: Option<(SocketAddr, Instant)>,
}

impl PeerState {
    fn new(peer: &Peer, now: Instant) -> Self {
        Self {
            traffic: Arc::clone(&peer.traffic),
            last_seen: LastSeen::default(),
            ports: PeerPorts::new(now),
            route: match peer.is_suspended {
                true => Route::Inside,
                false => Route::Outside,
            },
            is_path_used: false,
            path: None,
            agreed_endpoint: None,
            keepalive: None,
        }
    }
}

/// See the module's documentation.
pub struct Peers {
    /// The peers and their prefixes, as they are in force.
    pub overlay: Overlay,
    /// The workers need a new table.
    pub has_changed: bool,
    names: Names,
    states: HashMap<NextHop, PeerState>,
    received_probes: Receiver<ReceivedProbe>,
    /// Probes that may still be read before the next poll.
    probe_budget: usize,
    /// Paths that are being probed.
    path_probes: usize,
    /// How often peers are sent keepalives now; `None`: not at all.
    keepalive: Option<Duration>,
    /// Finds out why nothing comes from a peer, while there are keepalives.
    unreachable: Option<UnreachableProbe>,
    /// Whose turn it is.
    cursor: usize,
    log: RateLimitedLog,
}

impl Peers {
    /// Nothing was seen yet. `probes`: those that the workers receive.
    pub fn new(overlay: Overlay, names: Names, probes: Receiver<ReceivedProbe>) -> Self {
        let mut peers = Self {
            overlay: Overlay::default(),
            has_changed: false,
            names,
            states: HashMap::new(),
            received_probes: probes,
            probe_budget: PROBES_MAX,
            path_probes: 0,
            keepalive: None,
            unreachable: None,
            cursor: 0,
            log: RateLimitedLog::new("changes of peers", LOG_WINDOW),
        };
        peers.replace(overlay, Instant::now());
        peers
    }

    /// Puts a changed overlay in the place of the one in force.
    pub fn replace(&mut self, overlay: Overlay, now: Instant) {
        self.overlay = overlay;
        let mut old = std::mem::take(&mut self.states);
        for (hop, peer) in self.overlay.peers() {
            let same = old.remove(&hop);
            let same = same.filter(|state| Arc::ptr_eq(&state.traffic, &peer.traffic));
            let state = same.unwrap_or_else(|| PeerState::new(peer, now));
            self.states.insert(hop, state);
        }
        self.names.watch(self.overlay.dns_names(), now);
        self.names.tick(now);
        self.follow_endpoints(now);
    }

    /// Asks for all peers' names anew.
    pub fn resolve_again(&mut self) {
        self.names.ask_all(Instant::now());
    }

    /// Answers about names, for [`Self::take_answer`].
    pub fn answers(&self) -> Receiver<Lookup> {
        self.names.answers().clone()
    }

    /// A peer's name has an address, or still none.
    pub fn take_answer(&mut self, answer: Lookup, listen: SocketAddr, host: &mut Host) {
        self.take_checked(answer, Instant::now(), |overlay, endpoint| {
            reach::check_endpoint(listen, overlay, endpoint)?;
            host.check_outside(endpoint)
        });
    }

    fn take_checked(
        &mut self,
        answer: Lookup,
        now: Instant,
        check: impl FnMut(&Overlay, SocketAddr) -> Result<()>,
    ) {
        let (overlay, names) = (&mut self.overlay, &mut self.names);
        let states = &self.states;
        let silence = |state: &PeerState| state.last_seen.silence(now);
        let is_silent = |hop| {
            states
                .get(&hop)
                .is_some_and(|it| silence(it) >= SILENCE_MIN)
        };
        for (hop, result) in resolve::take_answer(overlay, names, answer, is_silent, check) {
            match result {
                Err(error) => self.log_unusable(&error, now),
                Ok((old, new)) if old != Some(new) => self.note_move(hop, old, new, now),
                Ok(_) => {}
            }
        }
        self.follow_endpoints(now);
    }

    /// A peer's name leads elsewhere than before.
    fn note_move(&mut self, hop: NextHop, old: Option<SocketAddr>, new: SocketAddr, now: Instant) {
        self.has_changed = true;
        if let Some(state) = self.states.get_mut(&hop) {
            state.last_seen.note_move();
        }
        let Some(Peer { name, .. }) = self.overlay.peer(hop).filter(|_| self.log.admits(now))
        else {
            return;
        };
        match old {
            Some(old) => {
                tracing::info!(peer = %name, endpoint = %new, old = %old, "peer {name} has moved from {old} to {new}")
            }
            None => tracing::info!(peer = %name, endpoint = %new, "peer {name} is {new}"),
        }
    }

    /// Logs why a peer cannot be used yet.
    pub fn log_unusable(&mut self, error: &Error, now: Instant) {
        if self.log.admits(now) {
            tracing::warn!(%error, "{error}; trying again");
        }
    }

    /// What is to be done every second: notes who answers, asks for the names of those
    /// that do not, checks ports and paths, and sends keepalives every so many seconds.
    pub fn poll(
        &mut self,
        listen: IpAddr,
        host: &mut Host,
        workers: &[WorkerFds],
        keepalive_seconds: Option<u16>,
    ) {
        let now = Instant::now();
        self.probe_budget = PROBES_MAX;
        self.poll_traffic(now);
        self.follow_endpoints(now);
        self.poll_path_probes(now);
        self.take_turns(|peers, hop| {
            let checked = peers.check_path(hop, listen, host, now);
            checked + peers.ask_about_ports(hop, workers, now)
        });
        self.take_unreachable(now);
        let mark = host.netlink.fwmark;
        self.send_keepalives(keepalive_seconds, Source { listen, mark }, workers, now);
    }

    /// Takes in what the workers have counted and seen of each peer.
    fn poll_traffic(&mut self, now: Instant) {
        self.log.flush(now);
        let mut learned = Vec::new();
        for (hop, peer) in self.overlay.peers() {
            let Some(state) = self.states.get_mut(&hop) else {
                continue;
            };
            let traffic = state.last_seen.poll(peer, &mut self.log, now);
            state.is_path_used |= traffic.sent;
            let silence = state.last_seen.silence(now);
            match peer.dns_name() {
                Some(name) if traffic.received => self.names.note_traffic(name),
                Some(name) => self.names.note_silence(name, silence, now),
                None => {}
            }
            // A peer with a key is known by that, and roams.
            if peer.secure.is_none() {
                state.ports.follow(peer, now);
                learned.extend(state.ports.poll(peer, traffic, now).map(|port| (hop, port)));
            }
        }
        self.names.tick(now);
        for (hop, port) in learned {
            self.use_port(hop, port, now);
        }
    }

    /// Does `work` for one peer after the other, until it comes to [`WORK_MAX`] in all.
    fn take_turns(&mut self, mut work: impl FnMut(&mut Self, NextHop) -> usize) {
        let hops: Vec<_> = self.overlay.peers().map(|(hop, _)| hop).collect();
        if self.cursor >= hops.len() {
            // Each round begins with others, which are the first to be probed.
            self.cursor += PATH_PROBES_MAX;
        }
        let start = self.cursor.checked_rem(hops.len()).unwrap_or(0);
        self.cursor = start;
        let mut done = 0;
        for &hop in hops[start..].iter().chain(&hops[..start]) {
            if done >= WORK_MAX {
                break;
            }
            done += work(self, hop);
            self.cursor += 1;
        }
    }

    /// When packets last came from a peer.
    pub fn last_seen(&self, hop: NextHop) -> Option<Instant> {
        self.states.get(&hop)?.last_seen.at
    }

    /// A port that a peer was lately seen at, if not at the one in use.
    pub fn seen_port(&self, hop: NextHop) -> Option<u16> {
        self.states.get(&hop)?.ports.seen_port()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use crossbeam_channel::Sender;

    use super::*;
    use crate::config::{HostPort, PeerName, PeerSpec};
    use crate::log::captured;
    use crate::routing::overlay::Origin;

    fn name() -> HostPort {
        place("far", 8285)
    }

    fn place(host: &str, port: u16) -> HostPort {
        let host = host.into();
        HostPort { host, port }
    }

    fn spec(place: HostPort) -> PeerSpec {
        PeerSpec::new(PeerName::Host(place.clone()), Some(place))
    }

    fn overlay() -> Overlay {
        let mut overlay = Overlay::default();
        overlay.count_for(1);
        overlay
            .add_peer(&spec(name()), true, Origin::Config)
            .unwrap();
        overlay.set_endpoint(0, "10.0.0.2:8285".parse().ok());
        overlay
    }

    /// One peer, whose name resolves; what is asked for, and where answers go.
    fn peers(now: Instant) -> (Peers, Receiver<HostPort>, Sender<Lookup>) {
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
            only(&peers).traffic[0].packets_enqueued.add(1);
            peers.poll_traffic(start + Duration::from_secs(second));
            if asked.try_recv().is_ok() {
                asked_at = asked_at.or(Some(second));
            }
        }
        assert_eq!(asked_at, Some(10));
        assert!(!peers.has_changed);
        assert_eq!(peers.last_seen(0), None);
        // A peer that answers is not asked about.
        only(&peers).traffic[0].packets_received.add(1);
        let now = start + Duration::from_secs(30);
        peers.poll_traffic(now);
        assert_eq!(peers.last_seen(0), Some(now));
    }

    #[test]
    fn a_peer_is_sent_to_where_it_sends_from() {
        let now = Instant::now();
        let (mut peers, ..) = peers(now);
        peers.poll_traffic(now);
        only(&peers).traffic[0].note_port(21224, 8285);
        peers.poll_traffic(now);
        assert!(peers.has_changed);
        let endpoint = only(&peers).endpoint_learned();
        assert_eq!(endpoint, "10.0.0.2:21224".parse().ok());
    }

    #[test]
    fn another_peer_in_the_same_place_is_not_known() {
        let now = Instant::now();
        let (mut peers, ..) = peers(now);
        only(&peers).traffic[0].packets_received.add(1);
        peers.poll_traffic(now);
        assert_eq!(peers.last_seen(0), Some(now));
        // The same peer stays known through other changes.
        peers.replace(peers.overlay.clone(), now);
        assert_eq!(peers.last_seen(0), Some(now));
        peers.replace(overlay(), now);
        peers.poll_traffic(now);
        assert_eq!(peers.last_seen(0), None);
        peers.replace(Overlay::default(), now);
        assert!(peers.states.is_empty());
    }

    #[test]
    fn each_peer_has_its_turn() {
        let now = Instant::now();
        let (mut peers, ..) = peers(now);
        for number in 1..3000u32 {
            let mut spec = spec(place(&format!("peer{number}"), 1));
            spec.prefixes = vec![std::net::IpAddr::V4(number.into()).into()];
            let added = peers.overlay.add_peer(&spec, false, Origin::Runtime);
            added.unwrap();
        }
        let mut all = BTreeSet::new();
        for _ in 0..6 {
            let mut turn = Vec::new();
            peers.take_turns(|_, hop| {
                turn.push(hop);
                1
            });
            assert_eq!(turn.len(), WORK_MAX);
            all.extend(turn);
        }
        assert_eq!(all.len(), 3000);
        // Another round begins elsewhere.
        let mut first = None;
        peers.take_turns(|_, hop| {
            first.get_or_insert(hop);
            1
        });
        assert_eq!(first, Some(6 * 512 - 3000 + 64));
    }

    /// Each address has as long to answer as the one before.
    #[test]
    fn a_silent_peer_is_moved_on_after_ten_seconds_at_each_address() {
        let start = Instant::now();
        let (mut peers, ..) = peers(start);
        let mut moved = Vec::new();
        for second in 0..=22 {
            let now = start + Duration::from_secs(second);
            only(&peers).traffic[0].packets_enqueued.add(1);
            peers.poll_traffic(now);
            let all = ["10.0.0.2:8285", "10.0.0.3:8285", "10.0.0.4:8285"];
            let answer = Lookup {
                name: name(),
                result: Ok(all.iter().map(|one| one.parse().unwrap()).collect()),
            };
            let before = only(&peers).endpoint;
            peers.take_checked(answer, now, |_, _| Ok(()));
            if only(&peers).endpoint != before {
                moved.push(second);
            }
        }
        assert_eq!(moved, [10, 21]);
    }

    #[test]
    fn what_becomes_of_names_has_few_lines() {
        let now = Instant::now();
        let (mut peers, ..) = peers(now);
        let lines = captured(|| {
            for number in 0..20u8 {
                let endpoint = SocketAddr::from(([10, 0, 1, number], 8285));
                for result in [Ok(vec![endpoint]), Err(Error::new("cannot resolve it"))] {
                    let name = name();
                    peers.take_checked(Lookup { name, result }, now, |_, _| Ok(()));
                }
            }
            drop(peers);
        });
        assert_eq!(lines.len(), 6, "{lines:?}");
        assert!(lines[5].contains("35 more changes of peers"), "{lines:?}");
    }
}
