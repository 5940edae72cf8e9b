//! Probes that have come from other hosts: requests are answered, and answers say
//! which of our ports reach a peer ([`super::ports`]).

use std::net::SocketAddr;
use std::time::Instant;

use crossbeam_channel::{Receiver, Sender, bounded, never};

use super::Peers;
use crate::daemon::workers::WorkerFds;
use crate::dataplane::inbound::ReceivedProbe;
use crate::io::udp::Port;
use crate::packet::batch::NextHop;
use crate::packet::probe::{Kind, Probe};

/// Probes that are read, and requests that are answered, from one poll to the next:
/// a flood of them costs no more than these. As many wait; more are lost, and come
/// again.
pub const PROBES_MAX: usize = 1024;

/// Most peers at one address that a probe may be from.
const SHARERS_MAX: usize = 16;

/// Takes the probes that workers receive.
pub fn probe_channel() -> (Sender<ReceivedProbe>, Receiver<ReceivedProbe>) {
    bounded(PROBES_MAX)
}

impl Peers {
    /// Gives the probes that may still be read before the next poll, for
    /// [`Self::take_probe`].
    pub fn probes(&self) -> Receiver<ReceivedProbe> {
        match self.probe_budget {
            0 => never(),
            _ => self.received_probes.clone(),
        }
    }

    /// Takes in a probe. Several peers may share the address: it is as if each of them
    /// had sent it, and the nonce tells who was meant.
    pub fn take_probe(&mut self, (from, probe): ReceivedProbe, workers: &[WorkerFds]) {
        let at_address = self.overlay.peers().filter(|(_, peer)| {
            let endpoint = peer.endpoint_in_use().filter(|_| peer.secure.is_none());
            endpoint.is_some_and(|endpoint| endpoint.ip() == from.ip())
        });
        let hops: Vec<_> = at_address.map(|(hop, _)| hop).take(SHARERS_MAX).collect();
        self.probe_budget = self.probe_budget.saturating_sub(hops.len().max(1));
        for hop in hops {
            self.take_probe_of(hop, from, probe, workers, Instant::now());
        }
    }

    fn take_probe_of(
        &mut self,
        hop: NextHop,
        from: SocketAddr,
        probe: Probe,
        workers: &[WorkerFds],
        now: Instant,
    ) {
        let Some((peer, state)) = self.overlay.in_use(hop).zip(self.states.get_mut(&hop)) else {
            return;
        };
        let ports = &mut state.ports;
        ports.note_probe(from.port(), now);
        match (probe.kind, peer.endpoint_in_use(), workers.first()) {
            (Kind::Request { port }, Some(endpoint), Some(any)) => {
                let kind = Kind::Reply { port: from.port() };
                any.send_probe(Port::Listen, Probe { kind, ..probe }, endpoint);
                let learned = ports.take_request(peer, (port, from.port()), now);
                ports.ask(peer, workers, now);
                if let Some(port) = learned {
                    self.use_port(hop, port, now);
                }
            }
            (Kind::Reply { port }, ..) => ports.take_reply(peer, probe.nonce, port, workers),
            _ => {}
        }
    }

    /// Asks a peer about our own ports for which it is time; returns how many these are.
    pub(super) fn ask_about_ports(
        &mut self,
        hop: NextHop,
        workers: &[WorkerFds],
        now: Instant,
    ) -> usize {
        let plain = self.overlay.peer(hop).filter(|peer| peer.secure.is_none());
        let known = plain.zip(self.states.get_mut(&hop));
        known.map_or(0, |(peer, state)| state.ports.ask(peer, workers, now))
    }

    /// Has a peer sent to at this port.
    pub(super) fn use_port(&mut self, hop: NextHop, port: u16, now: Instant) {
        let Some(peer) = self.overlay.in_use(hop) else {
            return;
        };
        let Some(configured) = peer.endpoint else {
            return;
        };
        let name = peer.name.to_string();
        // What comes from another port may be the other peer's.
        let at_address = self.overlay.peers().filter_map(|(_, peer)| peer.endpoint);
        let is_shared = at_address.filter(|to| to.ip() == configured.ip()).count() > 1;
        let is_back = port == configured.port();
        let is_usable = is_back || !is_shared;
        let learned = (!is_back).then_some(port);
        if !is_usable || !self.overlay.set_learned_port(hop, learned) {
            return;
        }
        self.has_changed = true;
        if !self.log.admits(now) {
            return;
        }
        match is_back {
            true => tracing::info!(
                peer = name,
                port,
                "peer {name} sends from port {port} again; sending there"
            ),
            false => tracing::warn!(
                peer = name,
                port,
                "peer {name} sends from port {port}, which its address was not configured \
                 with; sending there"
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;
    use std::time::Duration;

    use super::*;
    use crate::config::parse_peer;
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
            let spec = parse_peer(&endpoint.to_string()).unwrap();
            overlay.add_peer(&spec, false, Origin::Config).unwrap();
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

    /// All peers answer at once, and no reply is lost.
    #[test]
    fn a_hub_proves_all_its_ports() {
        let (workers, start) = (own_ports(25), Instant::now());
        let (mut peers, sender, far) = peers(workers.len());
        for second in 0..3 {
            let now = start + Duration::from_secs(second);
            peers.probe_budget = PROBES_MAX;
            peers.poll_traffic(now);
            peers.take_turns(|peers, hop| peers.ask_about_ports(hop, &workers, now));
            for far in &far {
                while let Some((from, probe)) = probe_at(far) {
                    let kind = Kind::Reply { port: from.port() };
                    let reply = Probe { kind, ..probe };
                    // As a worker does.
                    let _ = sender.try_send((far.local_addr().unwrap(), reply));
                }
            }
            while let Ok(probe) = peers.probes().try_recv() {
                peers.take_probe(probe, &workers);
            }
        }
        let all = peers.overlay.peers().flat_map(|(_, peer)| &*peer.traffic);
        let proven = all.filter(|worker| worker.is_own_port_proven()).count();
        assert_eq!(proven, usize::from(PEERS) * workers.len());
    }

    /// Whatever their sender is, and however many come.
    #[test]
    fn answers_are_limited_to_1024_from_poll_to_poll() {
        let workers = own_ports(1);
        let (mut peers, sender, far) = peers(workers.len());
        peers.poll_traffic(Instant::now());
        let mut requests = far.iter().cycle().map(|far| {
            let from = far.local_addr().unwrap();
            let kind = Kind::Request { port: from.port() };
            (from, Probe { kind, nonce: 7 })
        });
        for _ in 0..3 {
            let mut answered = 0;
            peers.probe_budget = PROBES_MAX;
            for _ in 0..100 {
                while sender.try_send(requests.next().unwrap()).is_ok() {}
                for _ in 0..100 {
                    if let Ok(probe) = peers.probes().try_recv() {
                        peers.take_probe(probe, &workers);
                    }
                }
                for far in &far {
                    let probes = std::iter::from_fn(|| probe_at(far));
                    let is_reply =
                        |(_, probe): &ReceivedProbe| matches!(probe.kind, Kind::Reply { .. });
                    answered += probes.filter(is_reply).count();
                }
            }
            assert_eq!(answered, 1024);
        }
    }
}
