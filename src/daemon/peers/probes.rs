//! Probes that have come from other hosts: requests are answered, and answers say
//! which of our ports reach a peer ([`super::ports`]).

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, at, bounded, never};

use super::Peers;
use crate::daemon::workers::WorkerFds;
use crate::dataplane::inbound::ReceivedProbe;
use crate::io::udp::Port;
use crate::packet::probe::{Kind, Probe};
use crate::packet::train::NextHop;

/// Probes that may wait to be read. More are lost, and come again: whoever floods
/// us with them costs no more than these, once in each pause.
const WAITING_MAX: usize = 64;

/// Pause after reading, in which more probes wake nobody.
const READ_PAUSE: Duration = Duration::from_millis(50);

/// Most peers at one address that a probe may be from.
const SHARERS_MAX: usize = 16;

/// Takes the probes that workers receive.
pub fn probe_channel() -> (Sender<ReceivedProbe>, Receiver<ReceivedProbe>) {
    bounded(WAITING_MAX)
}

/// The probes that wait to be read.
pub struct Probes {
    received: Receiver<ReceivedProbe>,
    /// The end of the pause; `None`: when one comes.
    read_at: Option<Instant>,
}

impl Probes {
    /// Those that come through this channel.
    pub fn new(received: Receiver<ReceivedProbe>) -> Self {
        Self {
            received,
            read_at: None,
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

    /// Reads the probes that have come, of which `first` is one; tells whether the
    /// workers need a new table.
    pub fn read_probes(&mut self, first: Option<ReceivedProbe>, workers: &[WorkerFds]) -> bool {
        let now = Instant::now();
        let waiting = self.probes.received.try_iter().take(WAITING_MAX);
        let probes: Vec<_> = first.into_iter().chain(waiting).collect();
        self.probes.read_at = (!probes.is_empty()).then(|| now + READ_PAUSE);
        let mut has_changed = false;
        for (from, probe) in probes {
            // Several peers may share the address: it is as if each of them had sent
            // it, and the nonce tells who was meant.
            let at_address = self.overlay.peers().filter(|(_, peer)| {
                peer.endpoint.is_some_and(|to| to.ip() == from.ip())
                    && peer.endpoint_in_use().is_some()
            });
            let hops: Vec<_> = at_address.map(|(hop, _)| hop).take(SHARERS_MAX).collect();
            for hop in hops {
                has_changed |= self.take_probe(hop, from, probe, workers, now);
            }
        }
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
