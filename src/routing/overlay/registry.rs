//! Peers that hosts have made known of themselves in a registry. What was configured, or added
//! at run time, goes before them.

use ipnet::IpNet;

use crate::config::{HostPort, PEERS_MAX, PeerName, PeerSpec};
use crate::packet::batch::NextHop;
use crate::routing::overlay::{Origin, Overlay, Owner, PREFIXES_MAX, Peer};

/// A peer of the registry as it was before, and as it is now. Its prefixes are in order.
pub(crate) type RegistryChange<'a> = (Option<&'a PeerSpec>, Option<&'a PeerSpec>);

impl Overlay {
    /// Makes the changes to what the registry says. Those that are made already do no harm.
    /// The work is in proportion to the changes, unless peers are removed.
    pub(crate) fn apply_registry<'a>(
        &mut self,
        changes: impl Iterator<Item = RegistryChange<'a>> + Clone,
    ) {
        let mut gone = Vec::new();
        // First, so that a prefix can move from one peer to another.
        for (old, new) in changes.clone() {
            let Some((old, hop)) = old.and_then(|old| Some((old, self.hop_of(&old.name).ok()?)))
            else {
                continue;
            };
            let kept = new.map_or(&[][..], |new| &new.prefixes);
            for prefix in &old.prefixes {
                let owner = Owner {
                    peer: hop,
                    origin: Origin::Registry,
                };
                let is_gone = kept.binary_search(prefix).is_err();
                if is_gone && self.prefixes.get(prefix) == Some(&owner) {
                    self.prefixes.remove(prefix);
                }
            }
            let is_ours = |peer: &Peer| peer.origin == Origin::Registry;
            if new.is_none() && self.peer(hop).is_some_and(is_ours) {
                gone.push(old.name.clone());
            }
        }
        if !gone.is_empty() {
            // They are all there.
            let _ = self.remove_peers(&gone);
        }
        for spec in changes.filter_map(|(_, new)| new) {
            self.set_registry_peer(spec);
        }
    }

    /// Adds a peer, or what is new of it.
    fn set_registry_peer(&mut self, spec: &PeerSpec) {
        let hop = match self.hop_of(&spec.name) {
            Ok(hop) => hop,
            Err(_) if self.names.len() >= PEERS_MAX => return,
            Err(_) => {
                let bare = PeerSpec {
                    prefixes: Vec::new(),
                    ..spec.clone()
                };
                // There is room, and it takes nothing from others.
                let _ = self.add_peer(&bare, false, Origin::Registry);
                let Ok(hop) = self.hop_of(&spec.name) else {
                    return;
                };
                hop
            }
        };
        if self
            .peer(hop)
            .is_some_and(|it| it.origin == Origin::Registry)
        {
            self.set_place(hop, spec.endpoint.clone());
        }
        let owner = Owner {
            peer: hop,
            origin: Origin::Registry,
        };
        for prefix in &spec.prefixes {
            match self.prefixes.get(prefix) {
                Some(other) if other.origin != Origin::Registry => {}
                None if self.prefixes.len() >= PREFIXES_MAX => {}
                _ => drop(self.prefixes.insert(*prefix, owner)),
            }
        }
    }

    /// The peers that only the registry knows, of those that these changes are about, with
    /// the address that each was given.
    pub(crate) fn registry_peers<'a>(
        &self,
        changes: impl Iterator<Item = RegistryChange<'a>>,
    ) -> Vec<(NextHop, std::net::SocketAddr)> {
        let new = changes.filter_map(|(_, new)| new);
        let found = new.filter_map(|spec| {
            let (hop, peer) = self.find(&spec.name)?;
            let endpoint = spec.endpoint.as_ref().and_then(HostPort::literal)?;
            (peer.origin == Origin::Registry).then_some((hop, endpoint))
        });
        found.collect()
    }

    /// Whether the registry gives this prefix to a peer.
    pub(crate) fn is_registry_prefix(&self, prefix: &IpNet) -> bool {
        let owner = self.prefixes.get(prefix);
        owner.is_some_and(|owner| owner.origin == Origin::Registry)
    }

    /// Whether it is the registry alone that knows this peer.
    pub(crate) fn is_registry_peer(&self, name: &PeerName) -> bool {
        let found = self.find(name);
        found.is_some_and(|(_, peer)| peer.origin == Origin::Registry)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::config::parse_peer;

    fn spec(text: &str) -> PeerSpec {
        let mut spec = parse_peer(text).unwrap();
        spec.prefixes.sort();
        spec
    }

    fn shown(overlay: &Overlay) -> Vec<String> {
        let show = |(prefix, peer, origin): (IpNet, &Peer, Origin)| {
            format!("{prefix} {} {}", peer.name, origin.as_str())
        };
        overlay.prefixes().map(show).collect()
    }

    fn apply(overlay: &mut Overlay, old: &[PeerSpec], new: &[PeerSpec]) {
        let find =
            |all: &'_ [PeerSpec], name: &PeerName| all.iter().position(|spec| spec.name == *name);
        let mut changes: Vec<RegistryChange<'_>> = old
            .iter()
            .map(|was| (Some(was), find(new, &was.name).map(|at| &new[at])))
            .collect();
        let added = new.iter().filter(|is| find(old, &is.name).is_none());
        changes.extend(added.map(|is| (None, Some(is))));
        overlay.apply_registry(changes.into_iter());
    }

    #[test]
    fn peers_come_and_go() {
        let mut overlay = Overlay::default();
        overlay.count_for(1);
        let one = [
            spec("10.0.0.2=10.50.2.0/24,10.60.0.0/24"),
            spec("10.0.0.3=10.50.3.0/24"),
        ];
        apply(&mut overlay, &[], &one);
        assert_eq!(
            shown(&overlay),
            [
                "10.50.2.0/24 10.0.0.2:8285 registry",
                "10.50.3.0/24 10.0.0.3:8285 registry",
                "10.60.0.0/24 10.0.0.2:8285 registry",
            ]
        );
        let traffic = std::sync::Arc::clone(&overlay.peer(1).unwrap().traffic);
        // A prefix moves, and the peer that stays keeps its counters.
        let two = [spec("10.0.0.3=10.50.3.0/24,10.60.0.0/24")];
        apply(&mut overlay, &one, &two);
        assert_eq!(
            shown(&overlay),
            [
                "10.50.3.0/24 10.0.0.3:8285 registry",
                "10.60.0.0/24 10.0.0.3:8285 registry"
            ]
        );
        assert!(std::sync::Arc::ptr_eq(
            &overlay.peer(1).unwrap().traffic,
            &traffic
        ));
        apply(&mut overlay, &two, &two);
        apply(&mut overlay, &two, &[]);
        assert_eq!((shown(&overlay).len(), overlay.peers().count()), (0, 0));
    }

    #[test]
    fn what_was_configured_goes_first() {
        let mut overlay = Overlay::default();
        overlay.count_for(1);
        let fixed = spec("10.0.0.2=10.50.9.0/24");
        overlay.add_peer(&fixed, false, Origin::Config).unwrap();
        let all = [
            spec("10.0.0.2=10.50.2.0/24"),
            spec("10.0.0.3=10.50.3.0/24,10.50.9.0/24"),
        ];
        apply(&mut overlay, &[], &all);
        let both = [
            "10.50.2.0/24 10.0.0.2:8285 registry",
            "10.50.3.0/24 10.0.0.3:8285 registry",
            "10.50.9.0/24 10.0.0.2:8285 config",
        ];
        assert_eq!(shown(&overlay), both);
        // Also what comes later.
        let also = [fixed.clone(), spec("10.0.0.4=10.50.3.0/24")];
        overlay.configure(&also).unwrap();
        assert_eq!(shown(&overlay)[1], "10.50.3.0/24 10.0.0.4:8285 config");
        // Once it is taken away again, what the registry says counts.
        overlay.configure(std::slice::from_ref(&fixed)).unwrap();
        apply(&mut overlay, &[], &all);
        assert_eq!(shown(&overlay), both);
        // The registry takes only what is its own.
        apply(&mut overlay, &all, &[]);
        assert_eq!(shown(&overlay), [both[2]]);
    }

    #[test]
    fn a_peer_with_a_key_moves() {
        let mut overlay = Overlay::default();
        overlay.count_for(1);
        let key = format!("{}8=", "A".repeat(42));
        let at = |place: &str| spec(&format!("{key}@{place}=10.50.2.0/24"));
        apply(&mut overlay, &[], &[at("10.0.0.2")]);
        apply(&mut overlay, &[at("10.0.0.2")], &[at("10.0.0.3")]);
        let (_, peer) = overlay.find(&at("10.0.0.3").name).unwrap();
        assert_eq!(peer.endpoint, "10.0.0.3:8285".parse().ok());
    }

    /// Some peers, each with some of a few prefixes, no prefix twice.
    fn peers() -> impl Strategy<Value = Vec<PeerSpec>> {
        prop::collection::vec(0u8..5, 8).prop_map(|owners| {
            let of = |peer: u8| {
                let owned = owners
                    .iter()
                    .zip(0..)
                    .filter(move |(owner, _)| **owner == peer);
                let prefixes: Vec<_> = owned
                    .map(|(_, at): (_, u8)| format!("10.50.{at}.0/24"))
                    .collect();
                (!prefixes.is_empty())
                    .then(|| spec(&format!("10.0.0.{}={}", peer + 1, prefixes.join(","))))
            };
            (0..4).filter_map(of).collect()
        })
    }

    proptest! {
        /// Whatever the registry said before, what it says now is what counts.
        #[test]
        fn changes_come_to_the_same_as_the_whole(before in peers(), after in peers()) {
            let (mut changed, mut whole) = (Overlay::default(), Overlay::default());
            apply(&mut changed, &[], &before);
            apply(&mut changed, &before, &after);
            apply(&mut whole, &[], &after);
            prop_assert_eq!(shown(&changed), shown(&whole));
            prop_assert_eq!(changed.peers().count(), whole.peers().count());
        }
    }
}
