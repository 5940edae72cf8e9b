//! Probes that have come from other hosts: requests are answered, and answers say
//! which of our ports reach a peer ([`super::ports`]).

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, at, bounded, never};

use super::Peers;
use crate::daemon::workers::WorkerFds;
use crate::dataplane::inbound::ReceivedProbe;
use crate::io::udp::Port;
use crate::packet::batch::NextHop;
use crate::packet::probe::{Kind, Probe};

/// Probes that may wait to be read. More are lost, and come again.
const WAITING_MAX: usize = 1024;

/// Probes that are read, and requests that are answered, in [`BUDGET_TIME`]: whoever
/// floods us with them costs no more than these.
const BUDGET: usize = 1024;
const BUDGET_TIME: Duration = Duration::from_secs(1);

/// Requests in one poll, so that there is room for the replies. Other peers have
/// their turn in the next one.
const ASKED_MAX: usize = 512;

/// Pause after reading, in which more probes wake nobody.
const READ_PAUSE: Duration = Duration::from_millis(50);

/// Most peers at one address that a probe may be from.
const SHARERS_MAX: usize = 16;

/// Takes the probes that workers receive.
pub fn probe_channel() -> (Sender<ReceivedProbe>, Receiver<ReceivedProbe>) {
    bounded(WAITING_MAX)
}

/// The probes that wait to be read, and whom to ask.
pub struct Probes {
    received: Receiver<ReceivedProbe>,
    /// The end of the pause; `None`: when one comes.
    read_at: Option<Instant>,
    /// How many may still be read or answered until `budget_end`.
    budget: usize,
    budget_end: Option<Instant>,
    /// Which peer's turn it is to be asked.
    cursor: usize,
}

impl Probes {
    /// Those that come through this channel.
    pub fn new(received: Receiver<ReceivedProbe>) -> Self {
        Self {
            received,
            read_at: None,
            budget: 0,
            budget_end: None,
            cursor: 0,
        }
    }
}

impl Peers {
    /// Gives a probe, and the time when more are due, for [`Self::read_probes`].
    pub fn probes(&self) -> (Receiver<ReceivedProbe>, Receiver<Instant>) {
        match self.probes.read_at {
            Some(time) => (never(), at(time)),
            None => (self.probes.received.clone(), never()),
        }
    }

    /// Asks the peers about our own ports for which it is time.
    pub(super) fn ask_about_ports(&mut self, workers: &[WorkerFds], now: Instant) {
        let count = self.overlay.peers().count();
        let start = self.probes.cursor.checked_rem(count).unwrap_or(0);
        let all = || self.overlay.peers();
        let (mut asked, mut turns) = (0, 0);
        for (hop, peer) in all().skip(start).chain(all().take(start)) {
            if asked >= ASKED_MAX {
                break;
            }
            if let Some(state) = self.states.get_mut(&hop) {
                state.ports.follow(peer, now);
                asked += state.ports.ask(peer, workers, &mut self.ports_log, now);
            }
            turns += 1;
        }
        self.probes.cursor = start + turns;
    }

    /// Reads the probes that have come, of which `first` is one; tells whether the
    /// workers need a new table.
    pub fn read_probes(
        &mut self,
        first: Option<ReceivedProbe>,
        workers: &[WorkerFds],
        now: Instant,
    ) -> bool {
        if self.probes.budget_end.is_none_or(|end| now >= end) {
            self.probes.budget = BUDGET;
            self.probes.budget_end = Some(now + BUDGET_TIME);
        }
        let before = self.probes.budget;
        let received = self.probes.received.clone();
        let mut waiting = first.into_iter().chain(received.try_iter());
        let mut has_changed = false;
        while self.probes.budget > 0
            && let Some((from, probe)) = waiting.next()
        {
            // Several peers may share the address: it is as if each of them had sent
            // it, and the nonce tells who was meant.
            let at_address = self.overlay.peers().filter(|(_, peer)| {
                peer.endpoint.is_some_and(|to| to.ip() == from.ip())
                    && peer.endpoint_in_use().is_some()
            });
            let sharers_max = SHARERS_MAX.min(self.probes.budget);
            let hops: Vec<_> = at_address.map(|(hop, _)| hop).take(sharers_max).collect();
            self.probes.budget -= match probe.kind {
                Kind::Request { .. } => hops.len().max(1),
                _ => 1,
            };
            for hop in hops {
                has_changed |= self.take_probe(hop, from, probe, workers, now);
            }
        }
        self.probes.read_at = match self.probes.budget {
            0 => self.probes.budget_end,
            budget => (budget < before).then(|| now + READ_PAUSE),
        };
        has_changed
    }

    fn take_probe(
        &mut self,
        hop: NextHop,
        from: SocketAddr,
        probe: Probe,
        workers: &[WorkerFds],
        now: Instant,
    ) -> bool {
        let Some((peer, state)) = self.overlay.in_use(hop).zip(self.states.get_mut(&hop)) else {
            return false;
        };
        let (ports, log) = (&mut state.ports, &mut self.ports_log);
        ports.note_probe(from.port(), now);
        match (probe.kind, peer.endpoint_in_use(), workers.first()) {
            (Kind::Request { port }, Some(endpoint), Some(any)) => {
                let kind = Kind::Reply { port: from.port() };
                any.send_probe(Port::Listen, Probe { kind, ..probe }, endpoint);
                let other = match port == from.port() {
                    true => ports.note_own_port(peer, port, now),
                    false => None,
                };
                ports.hurry(peer);
                ports.ask(peer, workers, log, now);
                other.is_some_and(|port| self.use_port(hop, port, now))
            }
            (Kind::Reply { port }, ..) => {
                let reply = (probe.nonce, port);
                ports.take_reply(peer, reply, workers, log, now);
                false
            }
            _ => false,
        }
    }

    /// Has a peer sent to at this port; tells whether that is news.
    pub(super) fn use_port(&mut self, hop: NextHop, port: u16, now: Instant) -> bool {
        let Some((name, configured)) = self
            .overlay
            .in_use(hop)
            .and_then(|peer| Some((peer.name.to_string(), peer.endpoint?)))
        else {
            return false;
        };
        // What comes from another port may be the other peer's.
        let at_address = self.overlay.peers().filter_map(|(_, peer)| peer.endpoint);
        let is_shared = at_address.filter(|to| to.ip() == configured.ip()).count() > 1;
        let is_back = port == configured.port();
        if is_shared && !is_back {
            return false;
        }
        let learned = (!is_back).then_some(port);
        let is_news = self.overlay.set_learned_port(hop, learned);
        if is_news && self.ports_log.admits(now) {
            match is_back {
                true => tracing::info!("peer {name} sends from port {port} again; sending there"),
                false => tracing::warn!(
                    "peer {name} sends from port {port}, which its address was not configured \
                     with; sending there"
                ),
            }
        }
        is_news
    }
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;

    use super::*;
    use crate::config::PeerName;
    use crate::routing::dns::Names;
    use crate::routing::overlay::{Origin, Overlay};

    const PEERS: u8 = 50;

    /// Peers on the loopback interface, each with an address of its own, and what
    /// they receive on.
    fn peers(workers: usize) -> (Peers, Sender<ReceivedProbe>, Vec<UdpSocket>) {
        let mut overlay = Overlay::default();
        overlay.count_for(workers);
        let mut far = Vec::new();
        for (number, hop) in (1..=PEERS).zip(0..) {
            let socket = UdpSocket::bind(SocketAddr::from(([127, 1, 0, number], 0))).unwrap();
            socket.set_nonblocking(true).unwrap();
            let endpoint = socket.local_addr().unwrap();
            let name = PeerName {
                host: endpoint.ip().to_string(),
                port: endpoint.port(),
            };
            overlay.add_peer(&name, false, &[], Origin::Config).unwrap();
            overlay.set_endpoint(hop, Some(endpoint));
            far.push(socket);
        }
        let (names, ..) = Names::without_threads();
        let (sender, received) = probe_channel();
        (Peers::new(overlay, names, received), sender, far)
    }

    fn own_ports(count: usize) -> Vec<WorkerFds> {
        (0..count).map(|_| WorkerFds::on_loopback()).collect()
    }

    /// The probe that waits at a socket, and where it came from.
    fn probe_at(far: &UdpSocket) -> Option<ReceivedProbe> {
        let mut packet = [0; 100];
        let (bytes, from) = far.recv_from(&mut packet).ok()?;
        Some((from, Probe::from_packet(&packet[..bytes]).unwrap()))
    }

    /// Whom a hub asks answers at once, and no reply is lost.
    #[test]
    fn a_hub_proves_all_its_ports() {
        let (workers, start) = (own_ports(25), Instant::now());
        let (mut peers, sender, far) = peers(workers.len());
        for second in 0..3 {
            let now = start + Duration::from_secs(second);
            peers.poll_traffic(now);
            peers.ask_about_ports(&workers, now);
            for far in &far {
                while let Some((from, probe)) = probe_at(far) {
                    let kind = Kind::Reply { port: from.port() };
                    let reply = Probe { kind, ..probe };
                    // As a worker does.
                    let _ = sender.try_send((far.local_addr().unwrap(), reply));
                }
            }
            peers.read_probes(None, &workers, now);
        }
        let all = peers.overlay.peers().flat_map(|(_, peer)| &*peer.traffic);
        let proven = all.filter(|worker| worker.is_own_port_proven()).count();
        assert_eq!(proven, usize::from(PEERS) * workers.len());
    }

    /// Whoever asks, and however often.
    #[test]
    fn answers_are_limited_to_1024_a_second() {
        let (workers, start) = (own_ports(1), Instant::now());
        let (mut peers, sender, far) = peers(workers.len());
        peers.poll_traffic(start);
        let mut requests = far.iter().cycle().map(|far| {
            let from = far.local_addr().unwrap();
            let kind = Kind::Request { port: from.port() };
            (from, Probe { kind, nonce: 7 })
        });
        let mut answered = 0;
        let mut time = Duration::ZERO;
        while time < Duration::from_secs(3) {
            while sender.try_send(requests.next().unwrap()).is_ok() {}
            peers.read_probes(None, &workers, start + time);
            for far in &far {
                let probes = std::iter::from_fn(|| probe_at(far));
                let is_reply =
                    |(_, probe): &ReceivedProbe| matches!(probe.kind, Kind::Reply { .. });
                answered += probes.filter(is_reply).count();
            }
            time += READ_PAUSE;
        }
        assert_eq!(answered, 3 * 1024);
    }
}
