//! The overlay as the control thread knows it: the peers, the prefixes of each, and
//! how each is reached.
//!
//! A change is made to a copy, which then takes the original's place or is
//! thrown away: so what is in force is always consistent.

mod changes;
mod edit;
mod peer;
mod registry;
mod table;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use ipnet::IpNet;

use crate::config::{HostPort, PEERS_MAX, PeerId, PeerName, PeerSpec};
use crate::error::{Error, Result};
use crate::packet::batch::NextHop;
use crate::packet::lpm;
use crate::wire::wireguard::keys::PresharedKey;

pub(crate) use changes::Changes;
pub(crate) use peer::{Origin, Peer};
pub(crate) use registry::RegistryChange;
pub(crate) use table::tunnel_addresses;

/// Most prefixes over all peers: bounds the memory that requests can take.
pub(crate) const PREFIXES_MAX: usize = 1_000_000;

/// Whose a prefix is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Owner {
    peer: NextHop,
    origin: Origin,
}

/// See the module's documentation.
#[derive(Clone, Debug, Default)]
pub struct Overlay {
    /// By next hop. A peer keeps its place as long as it is there. A copy of the overlay has
    /// the same ones, until they are changed there.
    peers: Vec<Option<Arc<Peer>>>,
    /// The places that no peer has.
    free: BTreeSet<NextHop>,
    /// The one peer that was given no prefixes: it takes what no prefix matches.
    default: Option<NextHop>,
    /// By [`PeerName::id`].
    names: BTreeMap<PeerId, NextHop>,
    prefixes: BTreeMap<IpNet, Owner>,
    /// This host's addresses.
    pub(crate) own: BTreeSet<IpAddr>,
    /// Number of workers: each counts for itself.
    workers: usize,
    /// Changes when a next hop may have become another peer's.
    pub(crate) generation: u16,
}

impl Overlay {
    /// Lets `workers` count for each peer, from zero.
    pub(crate) fn count_for(&mut self, workers: usize) {
        self.workers = workers;
        for peer in self.peers.iter_mut().flatten() {
            Arc::make_mut(peer).count_for(workers);
        }
    }

    /// Notes this host's own addresses, on whatever interface: they are not a peer's,
    /// whatever its prefixes, so that none sends in their name. Returns whether they
    /// are others than before.
    pub(crate) fn set_own_addresses(&mut self, own: BTreeSet<IpAddr>) -> bool {
        let old = std::mem::replace(&mut self.own, own);
        old != self.own
    }

    /// Whether datagrams to `endpoint` would come back to sockets on `listen`.
    pub(crate) fn leads_back(&self, listen: SocketAddr, endpoint: SocketAddr) -> bool {
        let ip = endpoint.ip();
        let is_own = match listen.ip().is_unspecified() {
            true => ip.is_loopback() || self.own.contains(&ip),
            false => listen.ip() == ip,
        };
        is_own && listen.port() == endpoint.port()
    }

    /// The peers with their next hops, in no particular order.
    pub(crate) fn peers(&self) -> impl Iterator<Item = (NextHop, &Peer)> {
        self.peers
            .iter()
            .enumerate()
            .filter_map(|(hop, peer)| Some((hop as NextHop, peer.as_deref()?)))
    }

    /// The peers in the order of their names.
    pub(crate) fn peers_by_name(&self) -> impl Iterator<Item = &Peer> {
        self.names.values().filter_map(|&hop| self.peer(hop))
    }

    /// All prefixes in order, with the peer and the origin of each.
    pub(crate) fn prefixes(&self) -> impl Iterator<Item = (IpNet, &Peer, Origin)> {
        self.prefixes
            .iter()
            .filter_map(|(&prefix, owner)| Some((prefix, self.peer(owner.peer)?, owner.origin)))
    }

    /// The peer with this next hop.
    pub(crate) fn peer(&self, hop: NextHop) -> Option<&Peer> {
        self.peers.get(usize::from(hop))?.as_deref()
    }

    fn peer_mut(&mut self, hop: NextHop) -> Option<&mut Peer> {
        let peer = self.peers.get_mut(usize::from(hop))?.as_mut();
        peer.map(Arc::make_mut)
    }

    /// The peer of this name.
    pub(crate) fn find(&self, name: &PeerName) -> Option<(NextHop, &Peer)> {
        let hop = *self.names.get(&name.id())?;
        Some((hop, self.peer(hop)?))
    }

    /// The peers that are found by this host and port: one plain peer, or any with keys.
    pub(crate) fn placed_at(&self, place: &HostPort) -> Vec<NextHop> {
        match self.find(&PeerName::Host(place.clone())) {
            Some((hop, _)) => vec![hop],
            None => {
                let there = |peer: &Peer| peer.place.as_ref() == Some(place);
                let peers = self.peers().filter(|(_, peer)| there(peer));
                peers.map(|(hop, _)| hop).collect()
            }
        }
    }

    /// The names that are to be resolved.
    pub(crate) fn dns_names(&self) -> impl Iterator<Item = &HostPort> {
        self.peers().filter_map(|(_, peer)| peer.dns_name())
    }

    /// The peer with this next hop, if something can be sent to it now.
    pub(crate) fn in_use(&self, hop: NextHop) -> Option<&Peer> {
        self.peer(hop)
            .filter(|peer| peer.endpoint_in_use().is_some())
    }

    /// A peer with this address.
    pub(crate) fn peer_at(&self, address: IpAddr) -> Option<&Peer> {
        let mut peers = self.peers().map(|(_, peer)| peer);
        peers.find(|peer| peer.endpoint.is_some_and(|to| to.ip() == address))
    }

    fn hop_of(&self, name: &PeerName) -> Result<NextHop> {
        self.names.get(&name.id()).copied().ok_or_else(|| {
            Error::new(format!("there is no peer {name}")).hint("`fastvpn peers` lists them")
        })
    }

    fn default_peer(&self) -> Option<&Peer> {
        self.peer(self.default?)
    }

    /// Whether it is this peer of ours that takes what no prefix matches.
    pub(crate) fn is_default(&self, peer: &Peer) -> bool {
        self.default_peer()
            .is_some_and(|default| std::ptr::eq(default, peer))
    }

    /// How many prefixes each peer has that has any.
    pub(crate) fn prefix_counts(&self) -> HashMap<NextHop, usize> {
        let mut counts = HashMap::new();
        for owner in self.prefixes.values() {
            *counts.entry(owner.peer).or_default() += 1;
        }
        counts
    }

    /// The peer that packets to `address` go to, and the prefix that says so;
    /// `None` for the peer without prefixes.
    pub(crate) fn route_to(&self, address: IpAddr) -> Option<(Option<IpNet>, &Peer)> {
        let mut covering = lpm::covering(address);
        match covering.find_map(|prefix| Some((prefix, self.prefixes.get(&prefix)?))) {
            Some((prefix, owner)) => Some((Some(prefix), self.peer(owner.peer)?)),
            None => Some((None, self.default_peer()?)),
        }
    }

    /// Adds a peer with its prefixes. `is_default`: it takes what no prefix matches.
    ///
    /// # Errors
    /// When it is there already, when one of its prefixes is another's, when
    /// it and another have none, or when there are too many.
    pub(crate) fn add_peer(
        &mut self,
        spec: &PeerSpec,
        is_default: bool,
        origin: Origin,
    ) -> Result<()> {
        let name = &spec.name;
        if self.names.contains_key(&name.id()) {
            return Err(Error::new(format!("there is a peer {name} already"))
                .hint("`fastvpn route add` gives it more prefixes"));
        }
        if self.names.len() >= PEERS_MAX {
            return Err(Error::new(format!(
                "cannot add peer {name}: there are {PEERS_MAX} already"
            )));
        }
        if is_default {
            self.check_default(name)?;
        }
        let peer = Peer::new(spec, origin, self.workers);
        let hop = self.free.pop_first().unwrap_or_else(|| {
            self.peers.push(None);
            // There are at most PEERS_MAX.
            (self.peers.len() - 1) as NextHop
        });
        self.peers[usize::from(hop)] = Some(Arc::new(peer));
        self.names.insert(name.id(), hop);
        if is_default {
            self.default = Some(hop);
        }
        self.add_prefixes(name, &spec.prefixes, origin, false)
    }

    /// Makes sure that no other peer takes what no prefix matches.
    fn check_default(&self, name: &PeerName) -> Result<()> {
        match self
            .default_peer()
            .filter(|other| other.name.id() != name.id())
        {
            None => Ok(()),
            Some(other) => Err(Error::new(format!(
                "both peer {} and peer {name} have no prefixes",
                other.name
            ))
            .hint("give one of them its prefixes, as in HOST=10.1.0.0/16")),
        }
    }

    /// Removes peers and all their prefixes.
    ///
    /// # Errors
    /// Names the first one that is not there.
    pub(crate) fn remove_peers(&mut self, names: &[PeerName]) -> Result<()> {
        for name in names {
            let hop = self.hop_of(name)?;
            self.default = self.default.filter(|default| *default != hop);
            self.names.remove(&name.id());
            self.peers[usize::from(hop)] = None;
            self.free.insert(hop);
        }
        let peers = &self.peers;
        self.prefixes
            .retain(|_, owner| peers[usize::from(owner.peer)].is_some());
        Ok(())
    }

    /// Gives a peer prefixes; `replace` takes them from others.
    ///
    /// # Errors
    /// When there is no such peer, or another has a prefix and it is not to be
    /// replaced.
    pub(crate) fn add_prefixes(
        &mut self,
        name: &PeerName,
        prefixes: &[IpNet],
        origin: Origin,
        replace: bool,
    ) -> Result<()> {
        let owner = Owner {
            peer: self.hop_of(name)?,
            origin,
        };
        for prefix in prefixes.iter().map(IpNet::trunc) {
            match self.prefixes.get(&prefix).copied() {
                // What was configured stays so.
                Some(old)
                    if old.peer == owner.peer
                        && old.origin == Origin::Config
                        && origin == Origin::Runtime =>
                {
                    continue;
                }
                // What only the registry says gives way.
                Some(old)
                    if old.peer != owner.peer && old.origin != Origin::Registry && !replace =>
                {
                    let other = self.peer(old.peer).map(|peer| peer.name.to_string());
                    return Err(Error::new(format!(
                        "prefix {prefix} is given to both {} and {name}",
                        other.unwrap_or_default()
                    ))
                    .hint("give it to one of them (`route add --replace` moves it)"));
                }
                None if self.prefixes.len() >= PREFIXES_MAX => {
                    return Err(Error::new(format!(
                        "cannot add prefix {prefix}: there are {PREFIXES_MAX} already"
                    )));
                }
                _ => self.prefixes.insert(prefix, owner),
            };
        }
        Ok(())
    }

    /// Removes prefixes, whichever peer has them.
    ///
    /// # Errors
    /// Names the first one that is not there.
    pub(crate) fn remove_prefixes(&mut self, prefixes: &[IpNet]) -> Result<()> {
        for prefix in prefixes.iter().map(IpNet::trunc) {
            if self.prefixes.remove(&prefix).is_none() {
                return Err(Error::new(format!("no peer has the prefix {prefix}"))
                    .hint("`fastvpn route list` shows who has which"));
            }
        }
        Ok(())
    }

    /// Makes the configured part what `specs` say, also what operators had added
    /// of it. The rest of what they added stays; peers that stay keep their place, address and counters.
    ///
    /// # Errors
    /// When the new configuration clashes with itself or with what was added
    /// at run time; nothing has changed then.
    pub(crate) fn configure(&mut self, specs: &[PeerSpec]) -> Result<Changes> {
        let mut next = self.clone();
        next.apply(specs)?;
        let changes = Changes::between(self, &next);
        *self = next;
        Ok(changes)
    }

    /// [`Self::configure`], but half done after an error.
    fn apply(&mut self, specs: &[PeerSpec]) -> Result<()> {
        let wanted: BTreeSet<_> = specs.iter().map(|spec| spec.name.id()).collect();
        let gone: Vec<PeerName> = self
            .peers_by_name()
            .filter(|peer| peer.origin == Origin::Config && !wanted.contains(&peer.name.id()))
            .map(|peer| peer.name.clone())
            .collect();
        // With the prefixes that were added to them at run time.
        self.remove_peers(&gone)?;
        self.prefixes
            .retain(|_, owner| owner.origin != Origin::Config);
        let default = self.default_peer();
        if default.is_some_and(|peer| wanted.contains(&peer.name.id())) {
            self.default = None;
        }
        for spec in specs {
            let (name, is_default) = (&spec.name, spec.prefixes.is_empty());
            let Ok(hop) = self.hop_of(name) else {
                self.add_peer(spec, is_default, Origin::Config)?;
                continue;
            };
            if is_default {
                self.check_default(name)?;
                self.default = Some(hop);
            }
            if let Some(peer) = self.peer_mut(hop) {
                peer.origin = Origin::Config;
                if let Some(secure) = &mut peer.secure {
                    secure.identity.clone_from(&spec.identity);
                    secure.preshared_key = spec.preshared_key.clone();
                    secure.persistent_keepalive = spec.persistent_keepalive;
                }
            }
            self.set_place(hop, spec.endpoint.clone());
            self.add_prefixes(name, &spec.prefixes, Origin::Config, false)?;
        }
        Ok(())
    }

    /// Gives a preshared key to the peers that have none.
    pub(crate) fn share_preshared_key(&mut self, key: &PresharedKey) {
        let peers = self.peers.iter_mut().flatten().map(Arc::make_mut);
        for secure in peers.filter_map(|peer| peer.secure.as_mut()) {
            if !secure.preshared_key.is_set() {
                secure.preshared_key = key.clone();
            }
        }
    }

    /// Notes where a peer with a key is to be found from now on, if that is another place
    /// than before. It stays where it is until a name has been resolved, or it has called.
    fn set_place(&mut self, hop: NextHop, place: Option<HostPort>) {
        let Some(peer) = self.peer_mut(hop).filter(|peer| peer.secure.is_some()) else {
            return;
        };
        if peer.place == place {
            return;
        }
        peer.place = place;
        // From now on what it was given counts, once a name has been resolved.
        if let Some(secure) = &mut peer.secure {
            secure.has_roamed = false;
        }
        if let Some(endpoint) = peer.place.as_ref().and_then(HostPort::literal) {
            self.set_endpoint(hop, Some(endpoint));
        }
    }

    /// Notes where a peer is. Returns whether anything has changed, as the next ones
    /// do.
    pub(crate) fn set_endpoint(&mut self, hop: NextHop, endpoint: Option<SocketAddr>) -> bool {
        self.update(hop, |peer| {
            if peer.endpoint != endpoint {
                peer.endpoint = endpoint;
                peer.learned_port = None;
                peer.is_suspended = false;
                peer.path_mtu_bytes = None;
                if let Some(secure) = &mut peer.secure {
                    secure.has_roamed = false;
                }
            }
        })
    }

    /// Notes that a peer with a key has sent from elsewhere.
    pub(crate) fn set_roamed(&mut self, hop: NextHop, endpoint: SocketAddr) -> bool {
        let is_new = self.set_endpoint(hop, Some(endpoint));
        if let Some(secure) = self.peer_mut(hop).and_then(|peer| peer.secure.as_mut()) {
            secure.has_roamed |= is_new;
        }
        is_new
    }

    /// Notes the port that a peer sends from in place of the one that it was given.
    pub(crate) fn set_learned_port(&mut self, hop: NextHop, port: Option<u16>) -> bool {
        self.update(hop, |peer| peer.learned_port = port)
    }

    /// Notes whether the route to a peer leads through the tunnel itself. If that
    /// changes, what was known of the path is about another one.
    pub(crate) fn set_suspended(&mut self, hop: NextHop, is_suspended: bool) -> bool {
        self.update(hop, |peer| {
            if peer.is_suspended != is_suspended {
                peer.is_suspended = is_suspended;
                peer.path_mtu_bytes = None;
            }
        })
    }

    /// Notes the MTU of the path to a peer, and whether a router on it takes less
    /// than this host's interface.
    pub(crate) fn set_path_mtu(&mut self, hop: NextHop, mtu_bytes: u32, is_narrow: bool) -> bool {
        self.update(hop, |peer| {
            peer.path_mtu_bytes = Some(mtu_bytes);
            peer.is_path_narrow = is_narrow;
        })
    }

    /// Changes what is known of a peer. Returns whether it is different. If the peer is
    /// sent to elsewhere, which workers' own ports reach it is not known any more.
    fn update(&mut self, hop: NextHop, change: impl FnOnce(&mut Peer)) -> bool {
        let Some(peer) = self.peer_mut(hop) else {
            return false;
        };
        let state = |peer: &Peer| {
            let path = (peer.path_mtu_bytes, peer.is_path_narrow);
            (peer.endpoint, peer.learned_port, peer.is_suspended, path)
        };
        let (old_endpoint, old_state) = (peer.endpoint_in_use(), state(peer));
        change(peer);
        if peer.endpoint_in_use() != old_endpoint {
            let workers = peer.traffic.iter();
            workers.for_each(|worker| worker.set_own_port_proven(false));
        }
        state(peer) != old_state
    }

    /// The longest packet that reaches every peer in one piece, and the peer that
    /// says so; `None` while no path is known.
    pub(crate) fn smallest_path(&self) -> Option<(usize, SocketAddr)> {
        let known = self.peers().filter_map(|(_, peer)| {
            peer.path_mtu_bytes?;
            Some((peer.inner_mtu_bytes(), peer.endpoint?))
        });
        known.min()
    }
}

#[cfg(test)]
mod tests;
