//! Which port a peer sends from, where a NAT rewrites the one that it was given.

use std::time::{Duration, Instant};

use crate::io::udp::reuseport;

/// How long nothing may have come from the port in use before another one takes
/// its place. Longer than a peer with several workers is silent there: it is
/// asked, and answers from there, more often.
const SILENCE: Duration = Duration::from_secs(15);

/// The same for a port that may be a worker's own. Its peer says so more often
/// than that, but the probe may have been lost.
const SILENCE_OF_OWN_PORTS: Duration = Duration::from_secs(60);

/// How long a port is known to be a worker's own. The peer says it again within
/// a sixth of that while it uses the port.
const OWN_PORT_LIFE: Duration = Duration::from_secs(60);

/// Most ports of a peer that are kept in mind.
const OWN_PORTS_MAX: usize = reuseport::WORKERS_MAX as usize;

/// Ports that a peer was seen at.
#[derive(Clone, Debug)]
pub struct Seen {
    since: Instant,
    /// When something came from the port in use.
    in_use_at: Option<Instant>,
    /// The last other port, and when.
    other: Option<(u16, Instant)>,
    /// Its workers' own ports, which it does not receive on.
    own: Vec<(u16, Instant)>,
}

impl Seen {
    /// Nothing was seen yet.
    pub fn new(now: Instant) -> Self {
        Self {
            since: now,
            in_use_at: None,
            other: None,
            own: Vec::new(),
        }
    }

    /// A port that packets have come from lately, if not from the one in use.
    pub fn other(&self, now: Instant) -> Option<u16> {
        let (port, at) = self.other?;
        (now < at + SILENCE_OF_OWN_PORTS).then_some(port)
    }

    /// Something has come from the port in use.
    pub fn note_in_use(&mut self, now: Instant) {
        self.in_use_at = Some(now);
    }

    /// The peer says that this port is a worker's own.
    pub fn note_own(&mut self, port: u16, now: Instant) {
        self.own
            .retain(|&(own, at)| own != port && now < at + OWN_PORT_LIFE);
        if self.own.len() < OWN_PORTS_MAX {
            self.own.push((port, now));
        }
        self.other = self.other.filter(|&(other, _)| other != port);
    }

    /// Takes in the other ports that packets came from since the last call, and
    /// tells which one to use from now on, if not the same. `configured`: the
    /// port that the peer was given; `in_use`: the one that it is sent to.
    pub fn poll(
        &mut self,
        now: Instant,
        others: impl IntoIterator<Item = u16>,
        configured: u16,
        in_use: u16,
    ) -> Option<u16> {
        let mut wanted = None;
        for port in others {
            let is_own = |&(own, at): &(u16, Instant)| own == port && now < at + OWN_PORT_LIFE;
            if port == in_use {
                // Noted before it was in use.
            } else if port == configured {
                wanted = Some(port);
            } else if !self.own.iter().any(is_own) {
                self.other = Some((port, now));
                if wanted.is_none() && self.is_silent(now, port) {
                    wanted = Some(port);
                }
            }
        }
        if wanted.is_some() {
            (self.in_use_at, self.other) = (Some(now), None);
        }
        wanted
    }

    /// Whether the port in use has been silent for long enough to use this one.
    fn is_silent(&self, now: Instant, port: u16) -> bool {
        match (reuseport::is_likely_own(port), self.in_use_at) {
            (false, None) => true,
            (false, Some(at)) => now >= at + SILENCE,
            (true, at) => now >= at.unwrap_or(self.since) + SILENCE_OF_OWN_PORTS,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIGURED: u16 = 8285;
    const NAT: u16 = 21224;

    fn poll(seen: &mut Seen, now: Instant, port: u16, in_use: u16) -> Option<u16> {
        seen.poll(now, [port], CONFIGURED, in_use)
    }

    #[test]
    fn a_peer_that_was_never_seen_is_where_packets_come_from() {
        let now = Instant::now();
        let mut seen = Seen::new(now);
        assert_eq!(seen.poll(now, [], CONFIGURED, 1), None);
        assert_eq!(poll(&mut seen, now, NAT, CONFIGURED), Some(NAT));
        assert_eq!(poll(&mut seen, now, NAT, NAT), None);
        // And back at once, whatever else comes.
        let both = [NAT + 1, CONFIGURED, NAT + 1];
        assert_eq!(seen.poll(now, both, CONFIGURED, NAT), Some(CONFIGURED));
    }

    #[test]
    fn a_peer_that_sends_from_the_port_in_use_stays_there() {
        let now = Instant::now();
        let mut seen = Seen::new(now);
        seen.note_in_use(now);
        let soon = now + SILENCE - Duration::from_millis(1);
        assert_eq!(poll(&mut seen, soon, NAT, CONFIGURED), None);
        assert_eq!(seen.other(soon), Some(NAT));
        assert_eq!(poll(&mut seen, now + SILENCE, NAT, CONFIGURED), Some(NAT));
        // A NAT that has forgotten and takes another port.
        let later = now + 3 * SILENCE;
        assert_eq!(poll(&mut seen, later, NAT + 1, NAT), Some(NAT + 1));
    }

    #[test]
    fn nothing_is_sent_to_a_workers_own_port() {
        let now = Instant::now();
        let mut seen = Seen::new(now);
        let own = reuseport::source_ports(CONFIGURED, 3).next().unwrap();
        assert_eq!(poll(&mut seen, now, own, CONFIGURED), None);
        seen.note_own(own, now);
        seen.note_own(NAT, now);
        for port in [own, NAT] {
            assert_eq!(poll(&mut seen, now, port, CONFIGURED), None);
        }
        assert_eq!(seen.other(now), None);
        // Nobody says any more that it is one.
        let later = now + OWN_PORT_LIFE;
        assert_eq!(poll(&mut seen, later, own, CONFIGURED), Some(own));
    }

    #[test]
    fn the_ports_of_a_peer_that_lies_are_bounded() {
        let now = Instant::now();
        let mut seen = Seen::new(now);
        (0..=u16::MAX).for_each(|port| seen.note_own(port, now));
        assert!(seen.own.len() <= OWN_PORTS_MAX);
    }
}
