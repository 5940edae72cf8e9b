//! When a peer was last seen, and since when it is silent although we send to it.

use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use crate::control::protocol::Liveness;
use crate::counters::PeerCounters;
use crate::log::rate_limited::RateLimitedLog;
use crate::packet::probe::KEEPALIVE_SECONDS_MAX;
use crate::routing::overlay::Peer;

/// How long a peer that we keep sending to may be silent before the log says so.
const SILENT_AFTER: Duration = Duration::from_secs(10);

/// How long a peer with a key may take to answer: it sends a keepalive 10 s after what it
/// received (section 6.5 of the WireGuard paper), if it has nothing else to send.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(11);

/// Keepalives that may be missing before their sender counts as silent.
const MISSED_MAX: u32 = 3;

/// What was last seen of one peer.
#[derive(Default)]
pub struct LastSeen {
    received: u64,
    /// Also what could not be sent.
    sent: u64,
    /// When something authentic came from a peer with a key, as its sessions note it.
    received_ns: u64,
    /// How often it sends keepalives (plain mode).
    interval: Option<Duration>,
    /// When the last one came.
    keepalive_at: Option<Instant>,
    /// Since when it has had keepalives from us.
    expected_since: Option<Instant>,
    /// When somebody last said that it cannot be reached, and the `errno` of that; none if it
    /// was seen since.
    unreachable: Option<(Instant, i32)>,
    /// Somebody may say so: a datagram to find out was sent since it was seen, or since the last
    /// answer to one.
    pub(super) is_asked: bool,
    /// When something came from it.
    pub at: Option<Instant>,
    /// Since when we send to it without seeing anything. May lie ahead: until then there
    /// is time to answer.
    pub silent_since: Option<Instant>,
    /// The log says that it is silent, or cannot be reached.
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
        let announced = workers().filter_map(PeerCounters::take_keepalive).max();
        self.note_keepalives(announced, traffic, now);
        let name = &title(peer);
        if traffic.received || announced.is_some() {
            (self.at, self.silent_since, self.unreachable) = (Some(now), None, None);
            self.is_asked = false;
            if std::mem::take(&mut self.is_logged) && log.admits(now) {
                tracing::info!(peer = name, "peer {name} answers again");
            }
        } else if traffic.sent {
            let may_wait = sessions.map_or(Duration::ZERO, |_| ANSWER_TIME_MAX);
            self.silent_since.get_or_insert(now + may_wait);
            // It need not answer while it sends keepalives.
            let time_max = self.interval.map_or(SILENT_AFTER, |interval| {
                SILENT_AFTER.max(MISSED_MAX * interval)
            });
            if self.silence(now) >= time_max && !self.is_logged {
                self.is_logged = true;
                self.log_silence(name, peer.identity(), log, now);
            }
        }
        self.find_keepalives_missing(name, log, now);
        traffic
    }

    /// Takes in how often keepalives come, if one has come. Without any, while packets come, the
    /// peer does not send them any more.
    fn note_keepalives(&mut self, announced: Option<u16>, traffic: Traffic, now: Instant) {
        if let Some(seconds) = announced {
            // Anybody may have written that. No more is configured anywhere.
            let seconds = seconds.min(KEEPALIVE_SECONDS_MAX);
            self.interval = Some(Duration::from_secs(seconds.into()));
            self.keepalive_at = Some(now);
        } else if traffic.received {
            let since = self
                .keepalive_at
                .map(|at| now.saturating_duration_since(at));
            self.interval = self
                .interval
                .filter(|interval| since.is_some_and(|since| since < MISSED_MAX * *interval));
        }
    }

    /// Logs when a peer that sends keepalives has ceased to.
    fn find_keepalives_missing(&mut self, name: &str, log: &mut RateLimitedLog, now: Instant) {
        let (Some(interval), Some(at)) = (self.interval, self.at) else {
            return;
        };
        let since = now.saturating_duration_since(at);
        if since < MISSED_MAX * interval || std::mem::replace(&mut self.is_logged, true) {
            return;
        }
        if log.admits(now) {
            let (seconds, interval_seconds) = (since.as_secs(), interval.as_secs());
            tracing::warn!(
                peer = name,
                last_seen_seconds = seconds,
                interval_seconds,
                "peer {name} is silent: it sends a keepalive every {interval_seconds} s, but it \
                 was last seen {seconds} s ago"
            );
        }
    }

    /// Notes that the peer has been sent a keepalive.
    pub fn note_keepalive_sent(&mut self, now: Instant) {
        self.expected_since.get_or_insert(now);
    }

    /// Notes that a datagram was sent to find out why nothing comes.
    pub fn note_asked(&mut self) {
        self.is_asked = true;
    }

    /// Notes that the peer is somewhere else now, from where it has had no time to answer.
    pub fn note_move(&mut self) {
        (self.silent_since, self.unreachable) = (None, None);
        self.is_asked = false;
    }

    /// Notes that somebody has said, by this `errno`, that the peer cannot be reached. Returns
    /// whether that is new. It does not count if nobody was asked, or if the peer was seen since.
    pub fn note_unreachable(&mut self, errno: i32, now: Instant) -> bool {
        if !std::mem::take(&mut self.is_asked) {
            return false;
        }
        let before = self.unreachable.replace((now, errno));
        // It is logged, as is its end.
        self.is_logged = true;
        before.is_none_or(|(_, before)| before != errno)
    }

    /// How the peer is doing, if that is known. `own`: how often it has keepalives from us.
    pub fn liveness(&self, now: Instant, own: Option<Duration>) -> Option<Liveness> {
        if self.unreachable_errno(now, own).is_some() {
            return Some(Liveness::Unreachable);
        }
        let is_unanswered = self.interval.is_none() && self.silence(now) >= SILENT_AFTER;
        let seen = self.at.map(|at| now.saturating_duration_since(at));
        let time_max = self.interval.or(own).map(|interval| MISSED_MAX * interval);
        match (seen, time_max) {
            _ if is_unanswered => Some(Liveness::Silent),
            (Some(seen), Some(time_max)) if seen >= time_max => Some(Liveness::Silent),
            (Some(_), Some(_)) => Some(Liveness::Alive),
            (None, Some(time_max)) => {
                let expected = now.saturating_duration_since(self.expected_since?);
                (expected >= time_max).then_some(Liveness::Silent)
            }
            // It need not send anything.
            (seen, None) => seen
                .is_some_and(|seen| seen < SILENT_AFTER)
                .then_some(Liveness::Alive),
        }
    }

    /// Why it cannot be reached, if it has lately been said that it cannot.
    pub fn unreachable_errno(&self, now: Instant, own: Option<Duration>) -> Option<i32> {
        let (at, errno) = self.unreachable?;
        let time_max = MISSED_MAX * own?;
        (now.saturating_duration_since(at) < time_max).then_some(errno)
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
            peer.traffic[0].packets_enqueued.add(1);
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
            peer.traffic[0].packets_enqueued.add(1);
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
                peer.traffic[0].packets_enqueued.add(1);
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

    /// Polls once a second while packets are sent, with what the peer does in each second.
    /// Returns what was logged.
    fn run(
        seen: &mut LastSeen,
        seconds: u64,
        mut peer_does: impl FnMut(u64, &PeerCounters),
    ) -> Vec<(u64, String)> {
        let overlay = overlay();
        let peer = overlay.peer(0).unwrap();
        let mut log = RateLimitedLog::new("events", SILENT_AFTER);
        let start = Instant::now();
        let mut logged = Vec::new();
        for second in 0..seconds {
            peer_does(second, &peer.traffic[0]);
            let now = start + Duration::from_secs(second);
            let lines = captured(|| {
                seen.poll(peer, &mut log, now);
            });
            logged.extend(lines.into_iter().map(|line| (second, line)));
        }
        logged
    }

    /// Its name is resolved again then; the log is more patient.
    #[test]
    fn a_peer_with_keepalives_is_silent_at_once_under_traffic() {
        let mut seen = LastSeen::default();
        let logged = run(&mut seen, 12, |second, traffic| {
            traffic.packets_enqueued.add(1);
            if second == 0 {
                traffic.note_keepalive(300);
            }
        });
        assert_eq!(logged, []);
        assert_eq!(
            seen.silence(Instant::now() + Duration::from_secs(60))
                .as_secs(),
            59
        );
    }

    #[test]
    fn no_announced_interval_is_longer_than_may_be_configured() {
        let mut seen = LastSeen::default();
        let logged = run(&mut seen, 1000, |second, traffic| {
            if second == 0 {
                traffic.note_keepalive(u16::MAX);
            }
        });
        assert_eq!(logged.len(), 1, "{logged:?}");
        assert!(
            logged[0].0 == 900 && logged[0].1.contains("every 300 s"),
            "{logged:?}"
        );
    }

    /// They were switched off: it need not send anything.
    #[test]
    fn keepalives_that_do_not_come_beside_packets_are_not_expected() {
        let mut seen = LastSeen::default();
        let logged = run(&mut seen, 200, |second, traffic| match second {
            0..20 => traffic.note_keepalive(5),
            20..40 => traffic.packets_received.add(1),
            _ => {}
        });
        assert_eq!(logged, []);
        assert_eq!(seen.interval, None);
    }
}
