//! What is different between two states of the overlay.

use std::fmt::Display;

use super::{Overlay, Peer};
use crate::packet::batch::NextHop;

/// Changes that are named one by one. More are counted.
const NAMED_MAX: usize = 8;

/// What is different in a new state, in numbers and in words.
#[derive(Debug, Default)]
pub struct Changes {
    /// Peers that were not there.
    pub(crate) peers_added: usize,
    /// Peers that are there no more.
    pub(crate) peers_removed: usize,
    /// Prefixes that were not there, or behind another peer.
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
        for (name, &hop) in &new.names {
            if let Some(peer) = new.peer(hop).filter(|_| !old.names.contains_key(name)) {
                changes.peers_added += 1;
                changes.name(|| format!("peer {} added", peer.name));
            }
        }
        // Peers keep their places as long as they are there.
        let mut kept = vec![false; old.peers.len()];
        for (name, &hop) in &old.names {
            if new.names.contains_key(name) {
                kept[usize::from(hop)] = true;
            } else if let Some(peer) = old.peer(hop) {
                changes.peers_removed += 1;
                changes.name(|| format!("peer {} removed", peer.name));
            }
        }
        let is_same = |before: Option<NextHop>, after: Option<NextHop>| {
            before == after && before.is_none_or(|hop| kept[usize::from(hop)])
        };
        let mut compare = |what: &dyn Display, before: Option<NextHop>, after: Option<NextHop>| {
            if is_same(before, after) {
                return false;
            }
            let before = before.and_then(|hop| old.peer(hop));
            changes.name(|| moved(what, before, after.and_then(|hop| new.peer(hop))));
            true
        };
        let (mut added, mut removed) = (0, 0);
        // Both are in order: a walk along them is cheaper than a million lookups.
        let mut was = old.prefixes.iter().peekable();
        for (prefix, behind) in &new.prefixes {
            while let Some((gone, behind)) = was.next_if(|(gone, _)| *gone < prefix) {
                removed += usize::from(compare(gone, Some(behind.peer), None));
            }
            let before = was.next_if(|(other, _)| *other == prefix);
            let before = before.map(|(_, behind)| behind.peer);
            added += usize::from(compare(prefix, before, Some(behind.peer)));
        }
        for (gone, behind) in was {
            removed += usize::from(compare(gone, Some(behind.peer), None));
        }
        compare(&"the rest", old.default, new.default);
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
