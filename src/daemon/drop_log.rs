//! Dropped packets, in the log: who sent them and why they were dropped. The workers
//! keep the first of each kind until the control thread polls; the rest is a number.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::counters::Counters;
use crate::error::cause_text;
use crate::log::rate_limited::RateLimitedLog;
use crate::routing::overlay::Overlay;

/// How long the first lines about a kind of drop stand for all that happens.
const WINDOW: Duration = Duration::from_secs(60);

/// Lines about one kind of drop until it has stopped for a whole window. Each is
/// written once.
const KNOWN_MAX: usize = 32;

/// What the log has said so far, by kind of drop.
pub struct DropLog {
    sender_unknown: DropKind,
    source_not_allowed: DropKind,
    send_error: DropKind,
}

impl DropLog {
    /// Nothing has been said.
    pub fn new() -> Self {
        Self {
            sender_unknown: DropKind::new("sender-unknown"),
            source_not_allowed: DropKind::new("source-not-allowed"),
            send_error: DropKind::new("send-error"),
        }
    }

    /// Writes to the log what these workers have dropped since the last time.
    pub fn poll(&mut self, workers: &[Arc<Counters>], overlay: &Overlay, now: Instant) {
        let sum =
            |count: fn(&Counters) -> u64| workers.iter().map(|worker| count(worker)).sum::<u64>();
        let first = || workers.iter().map(|worker| &worker.first);
        let lines = first().filter_map(|first| first.sender_unknown.take());
        let lines = lines.map(|sender| unknown_sender(overlay, sender));
        let dropped = sum(|worker| worker.drop_sender_unknown.get());
        self.sender_unknown.poll(dropped, lines, now);
        let lines = first().filter_map(|first| first.source_not_allowed.take());
        let lines = lines.map(|source| forbidden_source(overlay, source));
        let dropped = sum(|worker| worker.drop_source_not_allowed.get());
        self.source_not_allowed.poll(dropped, lines, now);
        let lines = first().filter_map(|first| first.send_error.take());
        let lines = lines.map(|failure| failed_send(overlay, failure));
        let dropped = sum(|worker| worker.drop_send_error.get());
        self.send_error.poll(dropped, lines, now);
    }
}

/// One kind of drop.
struct DropKind {
    /// As counters name it.
    reason: &'static str,
    /// Lines since it began.
    known: BTreeSet<String>,
    /// Packets dropped by the last poll, and when there were new ones.
    dropped_before: u64,
    dropped_at: Option<Instant>,
    log: RateLimitedLog,
}

impl DropKind {
    fn new(reason: &'static str) -> Self {
        Self {
            reason,
            known: BTreeSet::new(),
            dropped_before: 0,
            dropped_at: None,
            log: RateLimitedLog::new(format!("packets dropped as {reason}"), WINDOW),
        }
    }

    /// Logs what is new of what has been `dropped` so far, in all. `lines`: what some of
    /// it was about.
    fn poll(&mut self, dropped: u64, lines: impl Iterator<Item = Line>, now: Instant) {
        let mut unsaid = dropped - std::mem::replace(&mut self.dropped_before, dropped);
        if unsaid > 0
            && self
                .dropped_at
                .replace(now)
                .is_some_and(|at| now >= at + WINDOW)
        {
            self.known.clear();
        }
        for line in lines {
            if self.known.len() < KNOWN_MAX && !self.known.contains(&line.text) {
                // It gets a line, or is counted as one that gets none.
                unsaid = unsaid.saturating_sub(1);
                if self.log.admits(now) {
                    tracing::warn!(
                        reason = self.reason,
                        peer = line.peer,
                        address = line.address.map(tracing::field::display),
                        source = line.source.map(tracing::field::display),
                        error = line.error,
                        "{} ({})",
                        line.text,
                        self.reason
                    );
                    self.known.insert(line.text);
                }
            }
        }
        self.log.leave_out(unsaid, now);
    }
}

/// A line about dropped packets, and what it names.
#[derive(Default)]
struct Line {
    text: String,
    peer: Option<String>,
    /// The address outside the tunnel.
    address: Option<IpAddr>,
    /// The source of a packet inside.
    source: Option<IpAddr>,
    error: Option<String>,
}

fn unknown_sender(overlay: &Overlay, sender: IpAddr) -> Line {
    let suspended = overlay.peer_at(sender).filter(|peer| peer.is_suspended);
    let peer = suspended.map(|peer| peer.name.to_string());
    let text = match &peer {
        Some(peer) => format!(
            "dropped datagrams from {sender}: the path to peer {peer} leads through the tunnel \
             itself"
        ),
        None => format!("dropped datagrams from {sender}: no peer has that address"),
    };
    Line {
        text,
        peer,
        address: Some(sender),
        ..Line::default()
    }
}

fn forbidden_source(overlay: &Overlay, (sender, source): (IpAddr, IpAddr)) -> Line {
    let whose = match overlay.route_to(source) {
        _ if overlay.own.contains(&source) => "it is an address of this host".into(),
        Some((Some(prefix), peer)) => format!("{prefix} belongs to peer {}", peer.name),
        Some((None, peer)) => format!("it belongs to peer {}", peer.name),
        None => "no peer has a prefix for it".into(),
    };
    let peer = name(overlay, sender);
    Line {
        text: format!("dropped packets from peer {peer} with the inner source {source}: {whose}"),
        peer: Some(peer),
        address: Some(sender),
        source: Some(source),
        ..Line::default()
    }
}

fn failed_send(overlay: &Overlay, (destination, errno): (SocketAddr, i32)) -> Line {
    let peer = name(overlay, destination.ip());
    let cause = cause_text(&std::io::Error::from_raw_os_error(errno));
    let hint = match errno {
        libc::EPERM => "; does a firewall on this host forbid it?",
        _ => "",
    };
    Line {
        text: format!("cannot send to peer {peer}: {cause}{hint}"),
        peer: Some(peer),
        address: Some(destination.ip()),
        error: Some(cause),
        ..Line::default()
    }
}

fn name(overlay: &Overlay, address: IpAddr) -> String {
    let peer = overlay.peer_at(address);
    peer.map_or_else(|| address.to_string(), |peer| peer.name.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::log::{captured, captured_json};

    fn kind() -> DropKind {
        DropKind::new("no-reason")
    }

    fn poll(kind: &mut DropKind, now: Instant, dropped: u64, lines: &[&str]) -> Vec<String> {
        let lines = lines.iter().map(|text| Line {
            text: text.to_string(),
            ..Line::default()
        });
        captured(|| kind.poll(dropped, lines, now))
    }

    #[test]
    fn the_first_is_logged_and_the_others_are_counted() {
        let (mut kind, start) = (kind(), Instant::now());
        let nothing: [&str; 0] = [];
        assert_eq!(poll(&mut kind, start, 0, &[]), nothing);
        assert_eq!(poll(&mut kind, start, 7, &["a"]), ["WARN a (no-reason)"]);
        // Known, new, and too many.
        assert_eq!(poll(&mut kind, start, 8, &["a"]), nothing);
        let many = poll(&mut kind, start, 20, &["a", "b", "c", "d", "e", "f"]);
        assert_eq!(many.len(), 4);
        let later = start + WINDOW / 2;
        assert_eq!(poll(&mut kind, later, 1000, &["a"]), nothing);
        // It goes on, and what is known is not logged again.
        let later = start + WINDOW;
        assert_eq!(
            poll(&mut kind, later, 1001, &["b"]),
            ["WARN 995 more packets dropped as no-reason within 60 s were not logged"]
        );
        // A window without any, and it begins anew.
        let later = later + WINDOW;
        assert_eq!(
            poll(&mut kind, later, 1002, &["a"]),
            [
                "WARN 1 more packets dropped as no-reason within 60 s were not logged",
                "WARN a (no-reason)"
            ]
        );
        assert_eq!(poll(&mut kind, later + WINDOW, 1002, &[]), nothing);
    }

    #[test]
    fn a_line_has_what_it_names_in_fields() {
        let (mut kind, start) = (kind(), Instant::now());
        let line = || Line {
            text: "not from there".into(),
            peer: Some("far:8285".into()),
            source: "fd00::1".parse().ok(),
            ..Line::default()
        };
        let lines = captured_json(|| {
            kind.poll(7, [line()].into_iter(), start);
            kind.poll(9, [].into_iter(), start + WINDOW);
        });
        for (line, key, value) in [
            (0, "message", "not from there (no-reason)".into()),
            (0, "level", "WARN".into()),
            (0, "reason", "no-reason".into()),
            (0, "peer", "far:8285".into()),
            (0, "source", "fd00::1".into()),
            (0, "address", serde_json::Value::Null),
            (1, "count", 6.into()),
            (1, "window_seconds", 60.into()),
            (1, "what", "packets dropped as no-reason".into()),
        ] {
            assert_eq!(lines[line][key], value, "{key}");
        }
    }

    #[test]
    fn a_flood_from_everywhere_is_a_few_lines() {
        let (mut kind, start) = (kind(), Instant::now());
        let mut lines = 0;
        for second in 0..3600 {
            let described = format!("from {second}");
            let now = start + Duration::from_secs(second);
            lines += poll(&mut kind, now, 1000 * (second + 1), &[&described]).len();
        }
        assert!(lines <= KNOWN_MAX + 60, "{lines}");
        assert!(kind.known.len() <= KNOWN_MAX);
    }
}
