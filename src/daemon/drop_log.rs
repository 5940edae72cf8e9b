//! Dropped packets that somebody should hear of: who sent them and why they were
//! dropped, in the log. The workers keep the first of each kind until the
//! control thread comes round; the rest is a number.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::counters::first::FirstDrops;
use crate::counters::{Counters, Snapshot};
use crate::error::cause_text;
use crate::routing::overlay::Overlay;

/// How long the lines of one window stand for all that happens.
const WINDOW: Duration = Duration::from_secs(60);

/// Lines about one kind of drop in one window, but for the last that counts the
/// others.
const LINES_MAX: u64 = 5;

/// Lines about one kind of drop until it has stopped for a whole window. Each is
/// written once.
const KNOWN_MAX: usize = 32;

/// What the log has said so far, by kind of drop.
pub struct DropLog([DropKind; 3]);

impl DropLog {
    /// Nothing has been said.
    pub fn new() -> Self {
        Self([
            DropKind::new(
                "sender-unknown",
                |total| total.drop_sender_unknown,
                |first, overlay| Some(unknown_sender(overlay, first.sender_unknown.take()?)),
            ),
            DropKind::new(
                "source-not-allowed",
                |total| total.drop_source_not_allowed,
                |first, overlay| Some(forbidden_source(overlay, first.source_not_allowed.take()?)),
            ),
            DropKind::new(
                "send-error",
                |total| total.drop_send_error,
                |first, overlay| Some(failed_send(overlay, first.send_error.take()?)),
            ),
        ])
    }

    /// Writes to the log what these workers have dropped since the last time.
    pub fn poll(&mut self, workers: &[Arc<Counters>], overlay: &Overlay, now: Instant) {
        let snapshots = workers.iter().map(|worker| worker.snapshot());
        let total = snapshots.fold(Snapshot::default(), |sum, worker| sum.plus(&worker));
        for kind in &mut self.0 {
            let (dropped, describe) = ((kind.dropped)(&total), kind.describe);
            let about = workers.iter();
            let about = about.filter_map(|worker| describe(&worker.first, overlay));
            for line in kind.look(now, dropped, about) {
                tracing::warn!("{line}");
            }
        }
    }
}

/// One kind of drop.
struct DropKind {
    /// As counters name it.
    reason: &'static str,
    /// How many there were.
    dropped: fn(&Snapshot) -> u64,
    /// What the first one was about, if there was one since the last time.
    describe: fn(&FirstDrops, &Overlay) -> Option<String>,
    /// Lines since it began.
    known: Vec<String>,
    /// The last line, written or not.
    last: Option<String>,
    /// When the window ends; none while nothing is dropped.
    window_end: Option<Instant>,
    /// Lines in this window.
    lines: u64,
    /// Packets dropped before it.
    dropped_before: u64,
}

impl DropKind {
    fn new(
        reason: &'static str,
        dropped: fn(&Snapshot) -> u64,
        describe: fn(&FirstDrops, &Overlay) -> Option<String>,
    ) -> Self {
        Self {
            reason,
            dropped,
            describe,
            known: Vec::new(),
            last: None,
            window_end: None,
            lines: 0,
            dropped_before: 0,
        }
    }

    /// Takes note of what has been `dropped` so far, in all, and of what some of
    /// it was about. Returns what the log is to say.
    fn look(
        &mut self,
        now: Instant,
        dropped: u64,
        about: impl Iterator<Item = String>,
    ) -> Vec<String> {
        let mut said = Vec::new();
        if self.window_end.is_none() && dropped != self.dropped_before {
            self.window_end = Some(now + WINDOW);
            self.lines = 0;
        }
        for line in about {
            let is_new = !self.known.contains(&line) && self.known.len() < KNOWN_MAX;
            if is_new && self.lines < LINES_MAX {
                said.push(format!("{line} ({})", self.reason));
                self.known.push(line.clone());
                self.lines += 1;
            }
            self.last = Some(line);
        }
        if self.window_end.is_some_and(|end| end <= now) {
            said.extend(self.end_window(now, dropped));
        }
        said
    }

    fn end_window(&mut self, now: Instant, dropped: u64) -> Option<String> {
        let more = (dropped - self.dropped_before).saturating_sub(self.lines);
        let was_quiet = dropped == self.dropped_before;
        self.dropped_before = dropped;
        self.lines = 0;
        self.window_end = (!was_quiet).then_some(now + WINDOW);
        let last = self.last.take();
        if was_quiet {
            self.known.clear();
        }
        (more > 0).then(|| {
            let last = last.map_or_else(String::new, |last| format!("; the latest: {last}"));
            let seconds = WINDOW.as_secs();
            format!(
                "{more} more dropped within {seconds} s as {}{last}",
                self.reason
            )
        })
    }
}

fn unknown_sender(overlay: &Overlay, sender: IpAddr) -> String {
    match overlay.peer_at(sender) {
        Some(peer) if peer.is_suspended => format!(
            "dropped datagrams from {sender}: the way to peer {} leads through the tunnel itself",
            peer.name
        ),
        _ => format!("dropped datagrams from {sender}: no peer has that address"),
    }
}

fn forbidden_source(overlay: &Overlay, (sender, source): (IpAddr, IpAddr)) -> String {
    let whose = match overlay.route_to(source) {
        _ if overlay.own.contains(&source) => "it is an address of this host".into(),
        Some((Some(prefix), peer)) => format!("{prefix} belongs to peer {}", peer.name),
        Some((None, peer)) => format!("it belongs to peer {}", peer.name),
        None => "no peer has a prefix for it".into(),
    };
    let name = match overlay.peer_at(sender) {
        Some(peer) => peer.name.to_string(),
        None => sender.to_string(),
    };
    format!("dropped packets from peer {name} with the inner source {source}: {whose}")
}

fn failed_send(overlay: &Overlay, (destination, errno): (SocketAddr, i32)) -> String {
    let name = overlay.peer_at(destination.ip()).map(|peer| &peer.name);
    let name = match name.filter(|name| name.literal().is_none()) {
        Some(name) => format!("{name} at "),
        None => String::new(),
    };
    let cause = cause_text(&std::io::Error::from_raw_os_error(errno));
    let hint = match errno {
        libc::EPERM => "; does a firewall on this host forbid it?",
        _ => "",
    };
    format!("cannot send to peer {name}{destination}: {cause}{hint}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn look(trouble: &mut DropKind, now: Instant, dropped: u64, about: &[&str]) -> Vec<String> {
        let about = about.iter().map(ToString::to_string);
        trouble.look(now, dropped, about)
    }

    #[test]
    fn the_first_is_told_and_the_others_are_counted() {
        let mut trouble = DropKind::new("no-reason", |_| 0, |_, _| None);
        let start = Instant::now();
        let nothing: [&str; 0] = [];
        assert_eq!(look(&mut trouble, start, 0, &[]), nothing);
        assert_eq!(look(&mut trouble, start, 7, &["a"]), ["a (no-reason)"]);
        // Known, new, and too many.
        assert_eq!(look(&mut trouble, start, 8, &["a"]), nothing);
        let many = look(&mut trouble, start, 20, &["a", "b", "c", "d", "e", "f"]);
        assert_eq!(many.len(), 4);
        let later = start + WINDOW;
        assert_eq!(
            look(&mut trouble, later, 1000, &["a"]),
            ["995 more dropped within 60 s as no-reason; the latest: a"]
        );
        // It goes on, and who is known is not told of again.
        assert_eq!(look(&mut trouble, later, 1001, &["b"]), nothing);
        let later = later + WINDOW;
        let said = look(&mut trouble, later, 1001, &[]);
        assert_eq!(
            said,
            ["1 more dropped within 60 s as no-reason; the latest: b"]
        );
        // A window without any, and it begins anew.
        let later = later + WINDOW;
        assert_eq!(look(&mut trouble, later, 1001, &[]), nothing);
        let later = later + WINDOW;
        assert_eq!(look(&mut trouble, later, 1001, &[]), nothing);
        assert_eq!(look(&mut trouble, later, 1002, &["a"]), ["a (no-reason)"]);
        assert_eq!(look(&mut trouble, later + WINDOW, 1002, &[]), nothing);
    }

    #[test]
    fn a_flood_from_everywhere_is_a_few_lines() {
        let mut trouble = DropKind::new("no-reason", |_| 0, |_, _| None);
        let start = Instant::now();
        let mut lines = 0;
        for second in 0..3600 {
            let about = format!("from {second}");
            let now = start + Duration::from_secs(second);
            lines += look(&mut trouble, now, 1000 * (second + 1), &[&about]).len();
        }
        assert!(lines <= KNOWN_MAX + 60, "{lines}");
        assert!(trouble.known.len() <= KNOWN_MAX);
    }
}
