//! What is different between two states of the overlay.

use std::fmt::Display;
use std::sync::Arc;

use super::{Overlay, Peer};

/// Changes that are named one by one. More are counted.
const NAMED_MAX: usize = 8;

/// What is different in a new state, in numbers and in words.
#[derive(Debug, Default)]
pub struct Changes {
    /// Peers that were not there.
    pub(crate) peers_added: usize,
    /// Peers that are there no more.
    pub(crate) peers_removed: usize,
    /// Peers of which other than prefixes has changed.
    pub(crate) peers_changed: usize,
    /// Prefixes that were not there, or were another peer's.
    pub(crate) prefixes_added: usize,
    /// Prefixes that are there no more.
    pub(crate) prefixes_removed: usize,
    named: Vec<String>,
    more: usize,
}

impl Changes {
    /// Compares with what has become of `old` since it was cloned.
    pub(crate) fn between(old: &Overlay, new: &Overlay) -> Self {
        let mut changes = Self::default();
        let peers_missing_in = |other: &Overlay, all: &Overlay| {
            let missing = all
                .names
                .iter()
                .filter(|(name, _)| !other.names.contains_key(*name));
            missing
                .filter_map(|(_, &hop)| Some(all.peer(hop)?.name.clone()))
                .collect::<Vec<_>>()
        };
        for name in peers_missing_in(old, new) {
            changes.peers_added += 1;
            changes.name(|| format!("peer {name} added"));
        }
        for name in peers_missing_in(new, old) {
            changes.peers_removed += 1;
            changes.name(|| format!("peer {name} removed"));
        }
        for (hop, peer) in new.peers() {
            // One that is new at this place is named already.
            let before = old
                .peer(hop)
                .filter(|before| before.name.id() == peer.name.id());
            if before.is_some_and(|before| !before.is_configured_as(peer)) {
                changes.peers_changed += 1;
                changes.name(|| format!("peer {} changed", peer.name));
            }
        }
        let mut compare = |what: &dyn Display, before: Option<&Peer>, after: Option<&Peer>| {
            // A peer keeps its counters as long as it is there. One that was removed and added
            // again is the same to operators.
            let traffic = |peer: Option<&Peer>| peer.map(|peer| Arc::as_ptr(&peer.traffic));
            let id = |peer: Option<&Peer>| peer.map(|peer| peer.name.id());
            let is_different = traffic(before) != traffic(after) && id(before) != id(after);
            if is_different {
                changes.name(|| moved(what, before, after));
            }
            usize::from(is_different)
        };
        let (mut added, mut removed) = (0, 0);
        // Both are in order: a walk along them is cheaper than a million lookups.
        let mut was = old.prefixes.iter().peekable();
        for (prefix, owner) in &new.prefixes {
            while let Some((gone, owner)) = was.next_if(|(gone, _)| *gone < prefix) {
                removed += compare(gone, old.peer(owner.peer), None);
            }
            let before = was.next_if(|(other, _)| *other == prefix);
            let before = before.and_then(|(_, owner)| old.peer(owner.peer));
            added += compare(prefix, before, new.peer(owner.peer));
        }
        for (gone, owner) in was {
            removed += compare(gone, old.peer(owner.peer), None);
        }
        compare(&"the rest", old.default_peer(), new.default_peer());
        (changes.prefixes_added, changes.prefixes_removed) = (added, removed);
        changes
    }

    fn name(&mut self, text: impl FnOnce() -> String) {
        match self.named.len() < NAMED_MAX {
            true => self.named.push(text()),
            false => self.more += 1,
        }
    }

    /// Of many changes the first few; nothing if there are none.
    pub(crate) fn words(&self) -> String {
        let mut words = self.named.join(", ");
        if self.more > 0 {
            words += &format!(" and {} more changes", self.more);
        }
        words
    }
}

fn moved(what: &dyn Display, before: Option<&Peer>, after: Option<&Peer>) -> String {
    match (before.map(|peer| &peer.name), after.map(|peer| &peer.name)) {
        (Some(before), Some(after)) => format!("{what} moved from {before} to {after}"),
        (None, Some(peer)) => format!("{what} given to {peer}"),
        (Some(peer), None) => format!("{what} taken from {peer}"),
        (None, None) => String::new(),
    }
}
