//! Keepalives of plain mode (`--keepalive`): probes ([`crate::packet::probe`]) that say how often
//! their sender sends one, so that their receiver knows when it is silent. They need no answer:
//! each end sends its own. A peer of which nothing comes is also asked why, in datagrams to
//! which routers and hosts object by ICMP ([`UnreachableProbe`]).

use std::time::{Duration, Instant};

use super::Peers;
use crate::control::protocol::Liveness;
use crate::daemon::workers::WorkerFds;
use crate::error::cause_text;
use crate::host::path::Source;
use crate::host::unreachable::UnreachableProbe;
use crate::io::udp::Port;
use crate::packet::batch::NextHop;
use crate::packet::probe::{Kind, Probe};

/// Keepalives that are sent in one poll. With more peers than that in each interval, the
/// interval is longer.
const KEEPALIVES_MAX: usize = 1024;

/// How often each of so many peers is sent one, `wanted` being what is configured.
fn interval_seconds(wanted: u16, peers: usize) -> u16 {
    let needed = peers.div_ceil(KEEPALIVES_MAX);
    wanted.max(needed.try_into().unwrap_or(u16::MAX))
}

impl Peers {
    /// Sends a keepalive to each peer that is due for one, every so many seconds, if they are
    /// `wanted`; and asks about those of which nothing comes. Without keys only: with them
    /// peers have keepalives of their own.
    pub(super) fn send_keepalives(
        &mut self,
        wanted: Option<u16>,
        source: Source,
        workers: &[WorkerFds],
        now: Instant,
    ) {
        self.keepalive = None;
        let (Some(wanted), Some(any)) = (wanted, workers.first()) else {
            self.unreachable = None;
            return;
        };
        let plain = self.overlay.peers();
        let plain = plain.filter(|(_, peer)| peer.secure.is_none()).count();
        let seconds = interval_seconds(wanted, plain);
        let interval = Duration::from_secs(seconds.into());
        self.keepalive = Some(interval);
        self.open_unreachable(source);
        let keepalive = Probe {
            kind: Kind::Keepalive { seconds },
            nonce: 0,
        };
        let mut sent = 0;
        for (hop, peer) in self.overlay.peers() {
            let (Some(state), Some(endpoint)) = (self.states.get_mut(&hop), peer.endpoint_in_use())
            else {
                continue;
            };
            // Where it has moved to it has had none yet.
            let last = state.keepalive.filter(|(to, _)| *to == endpoint);
            if peer.secure.is_some() || last.is_some_and(|(_, due)| now < due) {
                continue;
            }
            if sent >= KEEPALIVES_MAX {
                break;
            }
            sent += 1;
            // Its time is up, or this is the first.
            state.keepalive = Some((endpoint, now + interval));
            any.send_probe(Port::Listen, keepalive, endpoint);
            state.last_seen.note_keepalive_sent(now);
            if state.last_seen.liveness(now, Some(interval)) != Some(Liveness::Alive)
                && let Some(probe) = &mut self.unreachable
                // An error may be another one's. If it is not, this one is asked next time.
                && (probe.send(endpoint).is_ok() || probe.send(endpoint).is_ok())
            {
                state.last_seen.note_asked();
            }
        }
    }

    fn open_unreachable(&mut self, source: Source) {
        let open = self.unreachable.take();
        let same = open.filter(|probe| probe.source() == source);
        self.unreachable = Some(same.unwrap_or_else(|| UnreachableProbe::new(source)));
    }

    /// Takes in which peers cannot be reached, as somebody has said.
    pub(super) fn take_unreachable(&mut self, now: Instant) {
        let errors = self.unreachable.iter().flat_map(UnreachableProbe::errors);
        let errors: std::collections::HashMap<_, _> = errors.collect();
        if errors.is_empty() {
            return;
        }
        for (hop, peer) in self.overlay.peers() {
            let endpoint = peer.endpoint_in_use().filter(|_| peer.secure.is_none());
            if let Some(errno) = endpoint.and_then(|endpoint| errors.get(&endpoint))
                && let Some(state) = self.states.get_mut(&hop)
                && state.last_seen.note_unreachable(*errno, now)
                && self.log.admits(now)
            {
                let error = cause_text(&std::io::Error::from_raw_os_error(*errno));
                let peer = &peer.name;
                tracing::warn!(
                    %peer,
                    error,
                    "peer {peer} cannot be reached: its host or a router says {error}"
                );
            }
        }
    }

    /// How a peer is doing, and if it is unreachable, why.
    pub fn liveness(&self, hop: NextHop, now: Instant) -> Option<(Liveness, Option<String>)> {
        let state = self.states.get(&hop)?;
        if state.route == super::path::Route::None {
            return Some((Liveness::Unreachable, Some("no route".into())));
        }
        let liveness = state.last_seen.liveness(now, self.keepalive)?;
        let errno = state.last_seen.unreachable_errno(now, self.keepalive);
        let errno = errno.filter(|_| liveness == Liveness::Unreachable);
        let reason = errno.map(|errno| cause_text(&std::io::Error::from_raw_os_error(errno)));
        Some((liveness, reason))
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, SocketAddr, UdpSocket};

    use super::*;
    use crate::config::parse_peer;
    use crate::daemon::peers::probe_channel;
    use crate::routing::dns::Names;
    use crate::routing::overlay::{Origin, Overlay};

    fn source() -> Source {
        Source::unmarked(Ipv4Addr::UNSPECIFIED.into())
    }

    /// So many peers on the loopback interface.
    fn peers(count: u16, port: u16) -> Peers {
        let mut overlay = Overlay::default();
        overlay.count_for(1);
        for (number, hop) in (0..count).zip(0..) {
            let [high, low] = number.to_be_bytes();
            let endpoint = SocketAddr::from(([127, 2, high, low], port));
            let mut spec = parse_peer(&endpoint.to_string()).unwrap();
            spec.prefixes = vec![std::net::IpAddr::from([10, 2, high, low]).into()];
            overlay.add_peer(&spec, false, Origin::Config).unwrap();
            overlay.set_endpoint(hop, Some(endpoint));
        }
        let (names, ..) = Names::without_threads();
        Peers::new(overlay, names, probe_channel().1)
    }

    #[test]
    fn an_interval_has_room_for_all_peers() {
        for (wanted, peers, seconds) in [
            (10, 0, 10),
            (10, 10_000, 10),
            (1, 1024, 1),
            (1, 1025, 2),
            (1, 10_000, 10),
            (u16::MAX, 1_000_000, u16::MAX),
        ] {
            assert_eq!(interval_seconds(wanted, peers), seconds, "{wanted} {peers}");
        }
    }

    /// 10 000 of them: no poll sends more than its share, and none is left out.
    #[test]
    fn all_peers_have_keepalives_and_few_at_a_time() {
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        socket2::SockRef::from(&socket)
            .set_recv_buffer_size(8 << 20)
            .unwrap();
        socket.set_nonblocking(true).unwrap();
        let count = 10_000;
        let mut peers = peers(count, socket.local_addr().unwrap().port());
        let workers = [WorkerFds::on_loopback()];
        let start = Instant::now();
        let mut all = Vec::new();
        for second in 0..20 {
            let now = start + Duration::from_secs(second);
            peers.send_keepalives(Some(1), source(), &workers, now);
            let mut packet = [0; 100];
            let mut received = 0;
            while let Ok(bytes) = socket.recv(&mut packet) {
                let probe = Probe::from_packet(&packet[..bytes]).unwrap();
                match probe.kind {
                    Kind::Keepalive { seconds: 10 } => received += 1,
                    Kind::Size => {}
                    other => panic!("{other:?}"),
                }
            }
            assert!(received <= KEEPALIVES_MAX, "{received}");
            all.push(received);
        }
        // What was sent is told by what is due next, also where the socket was full.
        let sent = peers.states.values().filter_map(|state| state.keepalive);
        let due: Vec<_> = sent.map(|(_, due)| due).collect();
        assert_eq!(due.len(), usize::from(count));
        let end = start + Duration::from_secs(19);
        assert!(due.iter().all(|due| *due > end), "{all:?}");
    }

    /// Whatever moves it, and to another port as well: what is there has to be opened first.
    #[test]
    fn a_peer_that_has_moved_is_sent_one_at_once() {
        let places = ["127.3.0.1:0", "127.3.0.2:0", "127.3.0.2:0"];
        let sockets = places.map(|place| UdpSocket::bind(place).unwrap());
        let (mut peers, workers, now) = (peers(1, 9), [WorkerFds::on_loopback()], Instant::now());
        for socket in &sockets {
            socket.set_nonblocking(true).unwrap();
            peers.overlay.set_endpoint(0, socket.local_addr().ok());
            let mut kinds = Vec::new();
            for _ in 0..3 {
                peers.send_keepalives(Some(60), source(), &workers, now);
                let mut packet = [0; 100];
                while let Ok(bytes) = socket.recv(&mut packet) {
                    kinds.push(Probe::from_packet(&packet[..bytes]).unwrap().kind);
                }
            }
            kinds.retain(|kind| matches!(kind, Kind::Keepalive { seconds: 60 }));
            assert_eq!(kinds.len(), 1, "at {socket:?}");
        }
    }

    #[test]
    fn a_peer_that_refuses_is_unreachable_until_it_is_seen() {
        let mut peers = peers(1, 9);
        let workers = [WorkerFds::on_loopback()];
        let start = Instant::now();
        peers.poll_traffic(start);
        assert_eq!(peers.liveness(0, start), None);
        let deadline = start + Duration::from_secs(30);
        let mut now = start;
        let lines = crate::log::captured(|| {
            while peers.liveness(0, now).is_none() && Instant::now() < deadline {
                peers.send_keepalives(Some(60), source(), &workers, start);
                peers.take_unreachable(now);
                now += Duration::from_millis(1);
            }
        });
        let refused = (Liveness::Unreachable, Some("connection refused".into()));
        assert_eq!(peers.liveness(0, now), Some(refused));
        assert_eq!(lines.len(), 1, "{lines:?}");
        let traffic = std::sync::Arc::clone(&peers.overlay.peer(0).unwrap().traffic);
        traffic[0].note_keepalive(5);
        peers.poll_traffic(now);
        assert_eq!(peers.liveness(0, now), Some((Liveness::Alive, None)));
        let silent = now + Duration::from_secs(15);
        assert_eq!(peers.liveness(0, silent), Some((Liveness::Silent, None)));
        // Without keepalives of our own it is the same: its own say when it is due.
        peers.send_keepalives(None, source(), &workers, now);
        let before = silent - Duration::from_millis(1);
        assert_eq!(peers.liveness(0, before), Some((Liveness::Alive, None)));
        assert_eq!(peers.liveness(0, silent), Some((Liveness::Silent, None)));
    }

    /// Asks about the only peer, and leaves the answer to be read.
    fn ask(peers: &mut Peers, now: Instant) {
        peers.send_keepalives(Some(60), source(), &[WorkerFds::on_loopback()], now);
        assert!(peers.states[&0].last_seen.is_asked);
    }

    #[test]
    fn a_peer_that_was_seen_since_it_was_asked_about_is_not_unreachable() {
        let (mut peers, start) = (peers(1, 9), Instant::now());
        ask(&mut peers, start);
        let traffic = std::sync::Arc::clone(&peers.overlay.peer(0).unwrap().traffic);
        traffic[0].note_keepalive(5);
        peers.poll_traffic(start);
        peers.take_unreachable(start);
        // Nor does an answer count that comes later.
        let state = &mut peers.states.get_mut(&0).unwrap().last_seen;
        assert!(!state.note_unreachable(libc::ECONNREFUSED, start));
        assert_eq!(peers.liveness(0, start), Some((Liveness::Alive, None)));
    }

    #[test]
    fn a_peer_that_has_moved_may_be_reachable() {
        let (mut peers, start) = (peers(1, 9), Instant::now());
        ask(&mut peers, start);
        let state = |peers: &Peers| peers.liveness(0, start).map(|(liveness, _)| liveness);
        let deadline = start + Duration::from_secs(30);
        while state(&peers).is_none() && Instant::now() < deadline {
            peers.take_unreachable(start);
        }
        assert_eq!(state(&peers), Some(Liveness::Unreachable));
        peers.note_move(0, None, "127.0.0.1:1".parse().unwrap(), start);
        assert_eq!(state(&peers), None);
    }
}
