//! When a peer was last seen, and since when it is silent although we send to it.

use std::time::{Duration, Instant};

use crate::counters::PeerCounters;

/// How long a peer that we keep sending to may be silent before the log says so.
const SILENT_AFTER: Duration = Duration::from_secs(10);

/// What was last seen of one peer.
#[derive(Clone, Debug, Default)]
pub struct LastSeen {
    received: u64,
    /// Also what could not be sent.
    sent: u64,
    /// When something came from it.
    at: Option<Instant>,
    /// Since when we send to it without seeing anything.
    silent_since: Option<Instant>,
    /// The log says that it is silent.
    is_told: bool,
}

/// What is new of a peer since the last poll.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Something came from it.
    pub received: bool,
    /// Something was sent to it, or could not be.
    pub sent: bool,
    /// What the log should say.
    pub news: Option<News>,
}

/// A change that the log should tell of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum News {
    /// It has been silent for a while, and was seen so long ago, if ever.
    Silent(Option<Duration>),
    /// It is not silent any more.
    Back,
}

impl LastSeen {
    /// Takes in what the workers have counted by now.
    pub fn poll(&mut self, counters: &[PeerCounters], now: Instant) -> Traffic {
        let received = packets_received(counters);
        let sent = counters.iter().map(PeerCounters::packets_tried).sum();
        let mut traffic = Traffic {
            received: received != self.received,
            sent: sent != self.sent,
            news: None,
        };
        (self.received, self.sent) = (received, sent);
        if traffic.received {
            (self.at, self.silent_since) = (Some(now), None);
            traffic.news = std::mem::take(&mut self.is_told).then_some(News::Back);
        } else if traffic.sent {
            let silence = now - *self.silent_since.get_or_insert(now);
            if silence >= SILENT_AFTER && !self.is_told {
                self.is_told = true;
                traffic.news = Some(News::Silent(self.at.map(|at| now - at)));
            }
        }
        traffic
    }

    /// For how long we have been sending without seeing anything.
    pub fn silence(&self, now: Instant) -> Option<Duration> {
        self.silent_since.map(|since| now - since)
    }

    /// How long ago something came; also since the last poll.
    pub fn age(&self, counters: &[PeerCounters], now: Instant) -> Option<Duration> {
        match packets_received(counters) == self.received {
            true => self.at.map(|at| now - at),
            false => Some(Duration::ZERO),
        }
    }
}

fn packets_received(counters: &[PeerCounters]) -> u64 {
    let each = counters.iter().map(|worker| worker.packets_received.get());
    each.sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silence_is_told_once_and_so_is_its_end() {
        let counters = [PeerCounters::default()];
        let mut seen = LastSeen::default();
        let start = Instant::now();
        let mut news = Vec::new();
        for second in 0..60 {
            counters[0].packets_sent.add(1);
            if second == 30 {
                counters[0].packets_received.add(1);
            }
            let now = start + Duration::from_secs(second);
            let traffic = seen.poll(&counters, now);
            assert!(traffic.sent && traffic.received == (second == 30));
            news.extend(traffic.news.map(|news| (second, news)));
        }
        let ago = Duration::from_secs(11);
        assert_eq!(
            news,
            [
                (10, News::Silent(None)),
                (30, News::Back),
                (41, News::Silent(Some(ago)))
            ]
        );
        let now = start + Duration::from_secs(60);
        assert_eq!(seen.silence(now), Some(Duration::from_secs(29)));
        assert_eq!(seen.age(&counters, now), Some(Duration::from_secs(30)));
    }

    #[test]
    fn who_is_not_sent_to_is_not_silent() {
        let counters = [PeerCounters::default()];
        let mut seen = LastSeen::default();
        let start = Instant::now();
        for second in 0..60 {
            let traffic = seen.poll(&counters, start + Duration::from_secs(second));
            assert_eq!(traffic, Traffic::default());
        }
        assert_eq!(seen.silence(start), None);
        assert_eq!(seen.age(&counters, start), None);
        // What came since the last poll counts.
        counters[0].packets_received.add(1);
        assert_eq!(seen.age(&counters, start), Some(Duration::ZERO));
    }
}
