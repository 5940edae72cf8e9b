//! Changes to peers with keys, as `wg(8)` makes them.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::Overlay;
use crate::config::{HostPort, PeerName};
use crate::error::{Error, Result};
use crate::packet::batch::NextHop;
use crate::wire::wireguard::keys::{PresharedKey, PublicKey};
use crate::wire::wireguard::sessions::PeerSessions;

/// What the peer without prefixes has: the rest.
const ANYWHERE: [IpNet; 2] = [
    IpNet::V4(Ipv4Net::new_assert(std::net::Ipv4Addr::UNSPECIFIED, 0)),
    IpNet::V6(Ipv6Net::new_assert(std::net::Ipv6Addr::UNSPECIFIED, 0)),
];

impl Overlay {
    /// Removes all peers with their prefixes.
    pub(crate) fn remove_all_peers(&mut self) {
        self.free
            .extend(self.names.values().copied().collect::<Vec<_>>());
        self.names.clear();
        self.prefixes.clear();
        self.default = None;
        self.peers.iter_mut().for_each(|peer| *peer = None);
    }

    /// Notes a secret that a peer with a key and this host share, zeros for none.
    pub(crate) fn set_preshared_key(&mut self, hop: NextHop, key: &PresharedKey) {
        if let Some(secure) = self.peer_mut(hop).and_then(|peer| peer.secure.as_mut()) {
            secure.preshared_key = key.clone();
        }
    }

    /// Gives the peers whose keys follow from a secret those that follow from another,
    /// `key_of` each identity and one that they share. Their sessions end; all else stays.
    ///
    /// # Errors
    /// When another peer has such a key: the change is half done then.
    pub(crate) fn rekey(
        &mut self,
        key_of: impl Fn(&str) -> Option<PublicKey>,
        preshared_key: &PresharedKey,
    ) -> Result<()> {
        let peers = self.peers();
        let renamed = peers.filter_map(|(hop, peer)| Some((hop, key_of(peer.identity()?)?)));
        for (hop, key) in renamed.collect::<Vec<_>>() {
            let name = PeerName::Key(key);
            let other = self.find(&name);
            if other.is_some_and(|(other, _)| other != hop) {
                let what = format!("two peers would have the key {key}");
                return Err(Error::new(what).hint("`fastvpn peer del` removes one"));
            }
            let Some(peer) = self.peer_mut(hop) else {
                continue;
            };
            let old = std::mem::replace(&mut peer.name, name).id();
            let id = peer.name.id();
            if let Some(secure) = &mut peer.secure {
                secure.preshared_key = preshared_key.clone();
                // The handshake thread knows these by the peer's key.
                let new = PeerSessions::default();
                new.endpoint.store(secure.sessions.endpoint.load_full());
                secure.sessions = Arc::new(new);
            }
            self.names.remove(&old);
            self.names.insert(id, hop);
        }
        Ok(())
    }

    /// Notes how often something is sent to a peer with a key.
    pub(crate) fn set_keepalive(&mut self, hop: NextHop, every: Option<Duration>) {
        if let Some(secure) = self.peer_mut(hop).and_then(|peer| peer.secure.as_mut()) {
            secure.persistent_keepalive = every;
        }
    }

    /// Has a peer with a key be here from now on, wherever it was or has roamed to.
    pub(crate) fn move_peer(&mut self, hop: NextHop, place: &HostPort) {
        self.set_place(hop, Some(place.clone()));
        if let Some(endpoint) = place.literal() {
            self.set_endpoint(hop, Some(endpoint));
        }
    }

    /// Whether a peer takes packets to this prefix that no longer one matches.
    pub(crate) fn has_prefix(&self, hop: NextHop, prefix: IpNet) -> bool {
        match self.prefixes.get(&prefix) {
            Some(owner) => owner.peer == hop,
            None => self.default == Some(hop) && ANYWHERE.contains(&prefix),
        }
    }

    /// Takes a prefix from a peer, if it has it. One that takes the rest has that no more,
    /// if it loses either family's.
    pub(crate) fn take_prefix(&mut self, hop: NextHop, prefix: IpNet) {
        if !self.has_prefix(hop, prefix) {
            return;
        }
        if self.prefixes.remove(&prefix).is_none() {
            self.default = None;
        }
    }

    /// Takes all prefixes from a peer, and the rest.
    pub(crate) fn take_prefixes(&mut self, hop: NextHop) {
        self.prefixes.retain(|_, owner| owner.peer != hop);
        self.default = self.default.filter(|default| *default != hop);
    }

    /// The prefixes of each peer that has any, in order, the rest among them.
    pub(crate) fn prefixes_by_peer(&self) -> HashMap<NextHop, Vec<IpNet>> {
        let mut all: HashMap<_, Vec<_>> = HashMap::new();
        for (&prefix, owner) in &self.prefixes {
            all.entry(owner.peer).or_default().push(prefix);
        }
        if let Some(default) = self.default {
            let free = ANYWHERE
                .iter()
                .filter(|net| !self.prefixes.contains_key(net));
            all.entry(default).or_default().extend(free);
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::parse_peer;
    use crate::routing::overlay::Origin;

    fn key(number: u8) -> String {
        format!("{}{number}=", "A".repeat(42))
    }

    /// Peers with these prefixes; none for the rest.
    fn overlay(prefixes: &[&str]) -> Overlay {
        let mut overlay = Overlay::default();
        for (number, prefix) in (0..).map(|number| 4 * number).zip(prefixes) {
            let text = format!("{}{prefix}", key(number));
            let spec = parse_peer(&text).unwrap();
            let is_default = spec.prefixes.is_empty();
            overlay.add_peer(&spec, is_default, Origin::Config).unwrap();
        }
        overlay
    }

    fn shown(overlay: &Overlay) -> Vec<(NextHop, String)> {
        let all = overlay.prefixes_by_peer().into_iter();
        let mut shown: Vec<_> = all
            .map(|(hop, nets)| {
                let nets: Vec<_> = nets.iter().map(ToString::to_string).collect();
                (hop, nets.join(" "))
            })
            .collect();
        shown.sort();
        shown
    }

    #[test]
    fn what_a_peer_has_can_be_taken() {
        let mut overlay = overlay(&["", "=10.1.0.0/16,10.2.0.0/16"]);
        let all = [
            (0, "0.0.0.0/0 ::/0".to_string()),
            (1, "10.1.0.0/16 10.2.0.0/16".to_string()),
        ];
        assert_eq!(shown(&overlay), all);
        // Only from the one that has it.
        for (hop, prefix) in [(0, "10.1.0.0/16"), (1, "10.0.0.0/8"), (1, "::/0")] {
            overlay.take_prefix(hop, prefix.parse().unwrap());
        }
        assert_eq!(shown(&overlay), all);
        overlay.take_prefix(1, "10.1.0.0/16".parse().unwrap());
        assert_eq!(shown(&overlay)[1].1, "10.2.0.0/16");
        overlay.take_prefix(0, "::/0".parse().unwrap());
        assert_eq!(shown(&overlay), [(1, "10.2.0.0/16".into())]);
        overlay.take_prefixes(1);
        assert_eq!(shown(&overlay), []);
    }

    /// The rest is less where somebody else has a family's all.
    #[test]
    fn the_rest_is_what_no_other_has() {
        let mut overlay = overlay(&["", "=0.0.0.0/0"]);
        let both = [(0, "::/0".to_string()), (1, "0.0.0.0/0".to_string())];
        assert_eq!(shown(&overlay), both);
        overlay.take_prefix(0, "0.0.0.0/0".parse().unwrap());
        assert_eq!(shown(&overlay), both);
        overlay.take_prefixes(0);
        assert_eq!(shown(&overlay), both[1..]);
    }

    #[test]
    fn all_peers_can_go() {
        let mut overlay = overlay(&["", "=10.1.0.0/16"]);
        overlay.remove_all_peers();
        assert_eq!(shown(&overlay), []);
        assert_eq!(overlay.peers().count() + overlay.peers_by_name().count(), 0);
        // Their places are free again.
        let spec = parse_peer(&key(8)).unwrap();
        overlay.add_peer(&spec, true, Origin::Runtime).unwrap();
        assert_eq!(overlay.find(&spec.name).unwrap().0, 0);
    }

    /// All but sessions stays: prefixes, place, counters, and where it was last seen.
    #[test]
    fn peers_follow_another_secret() {
        let mut overlay = overlay(&["@10.0.0.1=10.1.0.0/16", "=10.2.0.0/16"]);
        let seen = std::net::SocketAddr::from(([10, 0, 0, 9], 9)).into();
        if let Some(secure) = overlay.peer_mut(0).and_then(|peer| peer.secure.as_mut()) {
            secure.identity = Some("gate".into());
            secure.sessions.note_sender(seen);
        }
        let before = overlay.clone();
        let (new, shared) = (PublicKey([9; 32]), PresharedKey::generate());
        let key_of = |identity: &str| (identity == "gate").then_some(new);
        overlay.rekey(key_of, &shared).unwrap();
        let (hop, peer) = overlay.find(&PeerName::Key(new)).unwrap();
        let (old, secure) = (before.peer(0).unwrap(), peer.secure.as_ref().unwrap());
        assert_eq!((hop, &peer.place), (0, &old.place));
        assert!(overlay.find(&old.name).is_none());
        assert!(Arc::ptr_eq(&peer.traffic, &old.traffic));
        assert_eq!(secure.preshared_key, shared);
        let sessions = &old.secure.as_ref().unwrap().sessions;
        assert!(!Arc::ptr_eq(&secure.sessions, sessions));
        assert_eq!(secure.sessions.endpoint.load().as_deref(), Some(&seen));
        assert_eq!(shown(&overlay), shown(&before));
        // Those without an identity are as they were.
        assert_eq!(overlay.peer(1).unwrap().name, before.peer(1).unwrap().name);
        let other = overlay.peer(1).unwrap().name.key();
        assert!(overlay.rekey(|_| other, &shared).is_err());
    }

    /// Also one that has been seen elsewhere, and is to be where it was first.
    #[test]
    fn a_peer_is_where_it_is_said_to_be() {
        let mut overlay = overlay(&["@10.0.0.1:1=10.1.0.0/16"]);
        let place = |port| HostPort {
            host: "10.0.0.1".into(),
            port,
        };
        let name = parse_peer(&key(0)).unwrap().name;
        assert!(matches!(name, PeerName::Key(_)));
        for port in [1, 2] {
            overlay.set_roamed(0, ([10, 0, 0, 9], 9).into());
            overlay.move_peer(0, &place(port));
            let (_, peer) = overlay.find(&name).unwrap();
            assert_eq!(peer.endpoint, Some(([10, 0, 0, 1], port).into()));
            assert!(!peer.has_roamed());
        }
    }
}
