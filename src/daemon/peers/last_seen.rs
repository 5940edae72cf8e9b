//! When a peer was last seen, and since when it is silent although we send to it.

use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use crate::counters::PeerCounters;
use crate::log::rate_limited::RateLimitedLog;
use crate::routing::overlay::Peer;

/// How long a peer that we keep sending to may be silent before the log says so.
const SILENT_AFTER: Duration = Duration::from_secs(10);

/// How long a peer with a key may take to answer: it sends a keepalive 10 s after what it
/// received (section 6.5 of the WireGuard paper), if it has nothing else to send.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(11);

/// What was last seen of one peer.
#[derive(Default)]
pub struct LastSeen {
    received: u64,
    /// Also what could not be sent.
    sent: u64,
    /// When something authentic came from a peer with a key, as its sessions note it.
    received_ns: u64,
    /// When packets came from it.
    pub at: Option<Instant>,
    /// Since when we send to it without seeing anything. May lie ahead: until then there
    /// is time to answer.
    pub silent_since: Option<Instant>,
    /// The log says that it is silent.
    is_logged: bool,
}

/// What has happened since the last poll.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Traffic {
    /// Packets came from the peer.
    pub received: bool,
    /// Packets were sent to it, or could not be.
    pub sent: bool,
}

impl LastSeen {
    /// Takes in what the workers have counted by now; logs when the peer goes silent,
    /// and when it answers again.
    pub fn poll(&mut self, peer: &Peer, log: &mut RateLimitedLog, now: Instant) -> Traffic {
        let workers = || peer.traffic.iter();
        let received = workers().map(|worker| worker.packets_received.get()).sum();
        let sent = workers().map(PeerCounters::packets_tried).sum();
        let sessions = peer.secure.as_ref().map(|secure| &secure.sessions);
        let received_ns = sessions.map_or(0, |sessions| sessions.received_ns.load(Relaxed));
        let traffic = Traffic {
            received: received != self.received || received_ns != self.received_ns,
            sent: sent != self.sent,
        };
        (self.received, self.sent, self.received_ns) = (received, sent, received_ns);
        let name = &title(peer);
        if traffic.received {
            (self.at, self.silent_since) = (Some(now), None);
            if std::mem::take(&mut self.is_logged) && log.admits(now) {
                tracing::info!(peer = name, "peer {name} answers again");
            }
        } else if traffic.sent {
            let may_wait = sessions.map_or(Duration::ZERO, |_| ANSWER_TIME_MAX);
            self.silent_since.get_or_insert(now + may_wait);
            if self.silence(now) >= SILENT_AFTER && !self.is_logged {
                self.is_logged = true;
                self.log_silence(name, peer.identity(), log, now);
            }
        }
        traffic
    }

    /// For how long it has been silent although we send to it.
    pub fn silence(&self, now: Instant) -> Duration {
        let since = self.silent_since.unwrap_or(now);
        now.saturating_duration_since(since)
    }

    fn log_silence(
        &self,
        name: &str,
        identity: Option<&str>,
        log: &mut RateLimitedLog,
        now: Instant,
    ) {
        if !log.admits(now) {
            return;
        }
        let seen = match self.at {
            Some(at) => format!("last seen {} s ago", (now - at).as_secs()),
            None => "never seen; does it run, and do firewalls let UDP through both ways?".into(),
        };
        let identity = identity.filter(|_| self.at.is_none()).map(|identity| {
            format!(" Or it has another secret, or another identity than {identity}: see its log")
        });
        let identity = identity.unwrap_or_default();
        tracing::warn!(
            peer = name,
            last_seen_seconds = self.at.map(|at| (now - at).as_secs()),
            "peer {name} does not answer: packets are sent to it, but it was {seen}{identity}"
        );
    }
}

/// What a peer is called in the log: that of which its key says nothing, by its identity.
fn title(peer: &Peer) -> String {
    match peer.identity() {
        Some(identity) => identity.to_string(),
        None => peer.name.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::parse_peer;
    use crate::log::captured;
    use crate::routing::overlay::{Origin, Overlay};

    fn overlay() -> Overlay {
        let mut overlay = Overlay::default();
        overlay.count_for(1);
        let spec = parse_peer("10.0.0.2").unwrap();
        overlay.add_peer(&spec, true, Origin::Config).unwrap();
        overlay
    }

    /// One that has a key answers what it receives, but not at once.
    #[test]
    fn a_peer_with_a_key_may_wait_before_it_answers() {
        let mut overlay = Overlay::default();
        overlay.count_for(1);
        let spec = parse_peer(&format!("{}=@10.0.0.2", "A".repeat(43))).unwrap();
        overlay.add_peer(&spec, true, Origin::Config).unwrap();
        let peer = overlay.peer(0).unwrap();
        let sessions = &peer.secure.as_ref().unwrap().sessions;
        let mut log = RateLimitedLog::new("events", SILENT_AFTER);
        let (mut seen, start) = (LastSeen::default(), Instant::now());
        let mut silent = Vec::new();
        for second in 0..40 {
            peer.traffic[0].packets_sent.add(1);
            // Keepalives, which no worker counts as packets.
            if matches!(second, 10 | 20) {
                sessions.received_ns.store(second, Relaxed);
            }
            let now = start + Duration::from_secs(second);
            seen.poll(peer, &mut log, now);
            silent.extend((seen.silence(now) > Duration::ZERO).then_some(second));
        }
        assert_eq!(silent, Vec::from_iter(33..40));
        assert_eq!(seen.at, Some(start + Duration::from_secs(20)));
    }

    #[test]
    fn silence_is_logged_once_and_so_is_its_end() {
        let overlay = overlay();
        let peer = overlay.peer(0).unwrap();
        let mut log = RateLimitedLog::new("events", SILENT_AFTER);
        let (mut seen, start) = (LastSeen::default(), Instant::now());
        let mut logged = Vec::new();
        for second in 0..60 {
            peer.traffic[0].packets_sent.add(1);
            if second == 30 {
                peer.traffic[0].packets_received.add(1);
            }
            let now = start + Duration::from_secs(second);
            let lines = captured(|| {
                let traffic = seen.poll(peer, &mut log, now);
                assert!(traffic.sent && traffic.received == (second == 30));
            });
            logged.extend(lines.into_iter().map(|line| (second, line)));
        }
        let expected = [
            (
                10,
                "does not answer: packets are sent to it, but it was never seen",
            ),
            (30, "INFO peer 10.0.0.2:8285 answers again"),
            (
                41,
                "does not answer: packets are sent to it, but it was last seen 11 s ago",
            ),
        ];
        assert_eq!(logged.len(), expected.len(), "{logged:?}");
        for ((second, line), (expected_second, part)) in logged.iter().zip(expected) {
            assert!(*second == expected_second && line.contains(part), "{line}");
        }
        assert_eq!(seen.at, Some(start + Duration::from_secs(30)));
        assert_eq!(seen.silent_since, Some(start + Duration::from_secs(31)));
    }

    /// It may be there, and not know this host: that end has more to say.
    #[test]
    fn a_silent_peer_of_a_shared_secret_has_its_identity_named() {
        let mut overlay = Overlay::default();
        overlay.count_for(1);
        let mut spec = parse_peer(&format!("{}=@10.0.0.2", "A".repeat(43))).unwrap();
        spec.identity = Some("gate".into());
        overlay.add_peer(&spec, true, Origin::Config).unwrap();
        let peer = overlay.peer(0).unwrap();
        let mut log = RateLimitedLog::new("events", SILENT_AFTER);
        let (mut seen, start) = (LastSeen::default(), Instant::now());
        let lines = captured(|| {
            for second in 0..30 {
                peer.traffic[0].packets_sent.add(1);
                seen.poll(peer, &mut log, start + Duration::from_secs(second));
            }
        });
        assert_eq!(lines.len(), 1, "{lines:?}");
        for part in ["peer gate does not answer", "another identity than gate"] {
            assert!(lines[0].contains(part), "{lines:?}");
        }
    }

    #[test]
    fn a_peer_that_is_not_sent_to_is_not_silent() {
        let overlay = overlay();
        let mut log = RateLimitedLog::new("events", SILENT_AFTER);
        let (mut seen, start) = (LastSeen::default(), Instant::now());
        for second in 0..60 {
            let now = start + Duration::from_secs(second);
            let traffic = seen.poll(overlay.peer(0).unwrap(), &mut log, now);
            assert!(!traffic.received && !traffic.sent);
        }
        assert_eq!((seen.silent_since, seen.at), (None, None));
    }
}
