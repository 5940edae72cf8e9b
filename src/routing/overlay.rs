//! The overlay as the control thread knows it: the peers, the prefixes behind
//! each, and how each is reached.
//!
//! A change is made to a copy, which then takes the original's place or is
//! thrown away: so what is in force is always consistent, whoever asks for
//! what.

mod changes;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::config::{PEERS_MAX, PeerName, PeerSpec};
use crate::counters::PeerCounters;
use crate::dataplane::table::{self, Table};
use crate::error::{Error, Result};
use crate::packet::batch::{BATCH_BYTES_MAX, NextHop};
use crate::packet::icmp::TunnelAddresses;
use crate::packet::lpm::Prefixes;
use crate::wire;

pub(crate) use changes::Changes;

/// Most prefixes over all peers: bounds the memory that requests can take.
pub(crate) const PREFIXES_MAX: usize = 1_000_000;

/// Where a peer or a prefix comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// A flag or the configuration file. A reload brings it back or takes it
    /// away.
    Config,
    /// The control socket. A reload leaves it.
    Runtime,
}

impl Origin {
    /// As operators read it.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Config => "config",
            Self::Runtime => "runtime",
        }
    }
}

/// A peer.
#[derive(Clone, Debug)]
pub struct Peer {
    /// Host and port as they were given.
    pub(crate) name: PeerName,
    /// Who added it.
    pub(crate) origin: Origin,
    /// It was given no prefixes: it takes what no prefix matches.
    pub(crate) is_default: bool,
    /// Its address, with the port that it was given; `None` while its name does
    /// not resolve.
    pub(crate) endpoint: Option<SocketAddr>,
    /// The port that it has been seen to send from instead.
    pub(crate) learned_port: Option<u16>,
    /// The way there leads through the tunnel itself, so nothing is sent.
    pub(crate) is_suspended: bool,
    /// MTU of the path to it in bytes, if it is known.
    pub(crate) path_mtu_bytes: Option<u32>,
    /// A router on the path takes less than this host's interface.
    pub(crate) is_path_narrow: bool,
    /// What the workers count for it.
    pub(crate) traffic: Arc<[PeerCounters]>,
    /// How many prefixes it has.
    pub(crate) prefix_count: usize,
}

impl Peer {
    /// Its address, with the port that was learned, if one was.
    pub(crate) fn endpoint_learned(&self) -> Option<SocketAddr> {
        let mut endpoint = self.endpoint?;
        let port = self.learned_port.unwrap_or(endpoint.port());
        endpoint.set_port(port);
        Some(endpoint)
    }

    /// Forgets which workers' own ports reach it: it is somewhere else now.
    fn forget_proofs(&self) {
        for worker in self.traffic.iter() {
            worker.set_own_port_proven(false);
        }
    }

    /// Where its datagrams go now, if anywhere.
    pub(crate) fn endpoint_in_use(&self) -> Option<SocketAddr> {
        self.endpoint_learned().filter(|_| !self.is_suspended)
    }
}

/// A prefix's place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Behind {
    peer: NextHop,
    origin: Origin,
}

/// A next hop that no peer has.
const NOBODY: NextHop = NextHop::MAX;
const _: () = assert!(PEERS_MAX < NOBODY as usize);

/// See the module's documentation.
#[derive(Clone, Debug)]
pub struct Overlay {
    /// By next hop. A peer keeps its place as long as it is there.
    peers: Vec<Option<Peer>>,
    /// The places that no peer has.
    free: BTreeSet<NextHop>,
    /// The one peer that is the default one.
    default: Option<NextHop>,
    /// By [`PeerName::key`].
    names: BTreeMap<(String, u16), NextHop>,
    prefixes: BTreeMap<IpNet, Behind>,
    /// This host's addresses.
    own: BTreeSet<IpAddr>,
    /// The lookup structure, until prefixes or own addresses change.
    built: Option<Arc<Prefixes>>,
    /// Number of workers: each counts for itself.
    workers: usize,
}

impl Overlay {
    /// No peers yet, and `workers` that will count for each.
    pub(crate) fn new(workers: usize) -> Self {
        Self {
            peers: Vec::new(),
            free: BTreeSet::new(),
            default: None,
            names: BTreeMap::new(),
            prefixes: BTreeMap::new(),
            own: BTreeSet::new(),
            built: None,
            workers,
        }
    }

    /// Lets `workers` count for each peer, from zero.
    pub(crate) fn count_for(&mut self, workers: usize) {
        self.workers = workers;
        for peer in self.peers.iter_mut().flatten() {
            peer.traffic = traffic(workers);
        }
    }

    /// Notes this host's own addresses, on whatever interface: no peer is behind
    /// them, whatever its prefixes, so that nobody sends in their name. Tells
    /// whether that is news.
    pub(crate) fn set_own_addresses(&mut self, own: BTreeSet<IpAddr>) -> bool {
        let is_news = self.own != own;
        if is_news {
            self.own = own;
            self.built = None;
        }
        is_news
    }

    /// This host's addresses, as of [`Self::set_own_addresses`].
    pub(crate) fn own_addresses(&self) -> &BTreeSet<IpAddr> {
        &self.own
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
            .filter_map(|(hop, peer)| Some((hop as NextHop, peer.as_ref()?)))
    }

    /// The peers in the order of their names.
    pub(crate) fn peers_by_name(&self) -> impl Iterator<Item = &Peer> {
        self.names.values().filter_map(|&hop| self.peer(hop))
    }

    /// All prefixes in order, with the peer and the origin of each.
    pub(crate) fn prefixes(&self) -> impl Iterator<Item = (IpNet, &Peer, Origin)> {
        self.prefixes
            .iter()
            .filter_map(|(&prefix, behind)| Some((prefix, self.peer(behind.peer)?, behind.origin)))
    }

    /// Number of peers.
    pub(crate) fn peer_count(&self) -> usize {
        self.names.len()
    }

    /// Number of prefixes.
    pub(crate) fn prefix_count(&self) -> usize {
        self.prefixes.len()
    }

    /// The peer with this next hop.
    pub(crate) fn peer(&self, hop: NextHop) -> Option<&Peer> {
        self.peers.get(usize::from(hop))?.as_ref()
    }

    fn peer_mut(&mut self, hop: NextHop) -> Option<&mut Peer> {
        self.peers.get_mut(usize::from(hop))?.as_mut()
    }

    /// The peer of this name.
    pub(crate) fn find(&self, name: &PeerName) -> Option<(NextHop, &Peer)> {
        let hop = *self.names.get(&name.key())?;
        Some((hop, self.peer(hop)?))
    }

    /// The peer with this next hop, if something can be sent to it now.
    pub(crate) fn in_use(&self, hop: NextHop) -> Option<&Peer> {
        self.peer(hop)
            .filter(|peer| peer.endpoint_in_use().is_some())
    }

    /// A peer with this address.
    pub(crate) fn peer_at(&self, address: IpAddr) -> Option<&Peer> {
        let mut peers = self.peers.iter().flatten();
        peers.find(|peer| peer.endpoint.is_some_and(|to| to.ip() == address))
    }

    fn hop_of(&self, name: &PeerName) -> Result<NextHop> {
        self.names.get(&name.key()).copied().ok_or_else(|| {
            Error::new(format!("there is no peer {name}")).hint("`fastvpn peers` lists them")
        })
    }

    fn default_peer(&self) -> Option<&Peer> {
        self.peer(self.default?)
    }

    fn set_default(&mut self, hop: NextHop, is_default: bool) {
        if let Some(peer) = self.peer_mut(hop) {
            peer.is_default = is_default;
        }
        if is_default {
            self.default = Some(hop);
        } else if self.default == Some(hop) {
            self.default = None;
        }
        self.built = None;
    }

    /// The peer that packets to `address` go to, and the prefix that says so;
    /// `None` for the peer without prefixes.
    pub(crate) fn route_to(&self, address: IpAddr) -> Option<(Option<IpNet>, &Peer)> {
        let host = IpNet::from(address);
        let longest = (0..=host.max_prefix_len()).rev().find_map(|length| {
            let prefix = IpNet::new(address, length).ok()?.trunc();
            Some((prefix, self.prefixes.get(&prefix)?))
        });
        match longest {
            Some((prefix, behind)) => Some((Some(prefix), self.peer(behind.peer)?)),
            None => Some((None, self.default_peer()?)),
        }
    }

    /// Adds a peer with its prefixes.
    ///
    /// # Errors
    /// When it is there already, when one of its prefixes is another's, when
    /// it and another have none, or when there are too many.
    pub(crate) fn add_peer(&mut self, spec: &PeerSpec, origin: Origin) -> Result<()> {
        let is_default = spec.prefixes.is_empty();
        self.insert_peer(&spec.name, is_default, &spec.prefixes, origin)
    }

    /// As [`Self::add_peer`]; `is_default` says whether the peer takes what no
    /// prefix matches, whatever prefixes it has itself.
    ///
    /// # Errors
    /// As [`Self::add_peer`].
    pub(crate) fn insert_peer(
        &mut self,
        name: &PeerName,
        is_default: bool,
        prefixes: &[IpNet],
        origin: Origin,
    ) -> Result<()> {
        if self.names.contains_key(&name.key()) {
            return Err(Error::new(format!("there is a peer {name} already"))
                .hint("`fastvpn route add` gives it more prefixes"));
        }
        if self.names.len() >= PEERS_MAX {
            return Err(Error::new(format!(
                "cannot add peer {name}: there are {PEERS_MAX} already"
            )));
        }
        if let Some(other) = self.default_peer().filter(|_| is_default) {
            return Err(two_without_prefixes(&other.name, name));
        }
        let peer = Peer {
            name: name.clone(),
            origin,
            is_default: false,
            endpoint: name.literal(),
            learned_port: None,
            is_suspended: false,
            path_mtu_bytes: None,
            is_path_narrow: false,
            traffic: traffic(self.workers),
            prefix_count: 0,
        };
        let hop = self.free.pop_first().unwrap_or_else(|| {
            self.peers.push(None);
            // There are at most PEERS_MAX.
            (self.peers.len() - 1) as NextHop
        });
        self.peers[usize::from(hop)] = Some(peer);
        self.names.insert(name.key(), hop);
        self.set_default(hop, is_default);
        self.add_prefixes(name, prefixes, origin, false)
    }

    /// Removes peers and all their prefixes.
    ///
    /// # Errors
    /// Names the first one that is not there.
    pub(crate) fn remove_peers(&mut self, names: &[PeerName]) -> Result<()> {
        for name in names {
            let hop = self.hop_of(name)?;
            self.set_default(hop, false);
            self.names.remove(&name.key());
            self.peers[usize::from(hop)] = None;
            self.free.insert(hop);
        }
        let peers = &self.peers;
        self.prefixes
            .retain(|_, behind| peers[usize::from(behind.peer)].is_some());
        self.built = None;
        Ok(())
    }

    /// Puts prefixes behind a peer; `replace` takes them from others.
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
        let hop = self.hop_of(name)?;
        for prefix in prefixes.iter().map(IpNet::trunc) {
            let behind = Behind { peer: hop, origin };
            match self.prefixes.get(&prefix).copied() {
                // Whoever configured it still has; and what was added at run
                // time is configured once the file has it.
                Some(old) if old.peer == hop => {
                    if origin == Origin::Config {
                        self.prefixes.insert(prefix, behind);
                    }
                    continue;
                }
                Some(old) if !replace => {
                    let other = self.peer(old.peer).map(|peer| &peer.name);
                    return Err(Error::new(format!(
                        "prefix {prefix} is given to both {} and {name}",
                        other.map(ToString::to_string).unwrap_or_default()
                    ))
                    .hint("give it to one of them (`route add --replace` moves it)"));
                }
                Some(old) => {
                    if let Some(peer) = self.peer_mut(old.peer) {
                        peer.prefix_count -= 1;
                    }
                }
                None if self.prefixes.len() >= PREFIXES_MAX => {
                    return Err(Error::new(format!(
                        "cannot add prefix {prefix}: there are {PREFIXES_MAX} already"
                    )));
                }
                None => {}
            }
            self.prefixes.insert(prefix, behind);
            if let Some(peer) = self.peer_mut(hop) {
                peer.prefix_count += 1;
            }
        }
        self.built = None;
        Ok(())
    }

    /// Removes prefixes, whichever peer has them.
    ///
    /// # Errors
    /// Names the first one that is not there.
    pub(crate) fn remove_prefixes(&mut self, prefixes: &[IpNet]) -> Result<()> {
        for prefix in prefixes.iter().map(IpNet::trunc) {
            let Some(behind) = self.prefixes.remove(&prefix) else {
                return Err(Error::new(format!("no peer has the prefix {prefix}"))
                    .hint("`fastvpn route list` shows who has which"));
            };
            if let Some(peer) = self.peer_mut(behind.peer) {
                peer.prefix_count -= 1;
            }
        }
        self.built = None;
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
        let wanted: BTreeSet<_> = specs.iter().map(|spec| spec.name.key()).collect();
        let gone: Vec<PeerName> = self
            .peers_by_name()
            .filter(|peer| peer.origin == Origin::Config && !wanted.contains(&peer.name.key()))
            .map(|peer| peer.name.clone())
            .collect();
        // With the prefixes that were added to them at run time: there is nobody
        // left to have them.
        self.remove_peers(&gone)?;
        let peers = &mut self.peers;
        self.prefixes.retain(|_, behind| {
            let stays = behind.origin == Origin::Runtime;
            if let Some(peer) = peers[usize::from(behind.peer)].as_mut().filter(|_| !stays) {
                peer.prefix_count -= 1;
            }
            stays
        });
        // Who of those that are wanted is the default one is said anew below, in
        // whatever order they come.
        if let Some(hop) = self.default
            && self
                .peer(hop)
                .is_some_and(|peer| wanted.contains(&peer.name.key()))
        {
            self.set_default(hop, false);
        }
        self.built = None;
        for spec in specs {
            let Ok(hop) = self.hop_of(&spec.name) else {
                self.add_peer(spec, Origin::Config)?;
                continue;
            };
            let is_default = spec.prefixes.is_empty();
            let other = self
                .default_peer()
                .filter(|other| is_default && other.name.key() != spec.name.key());
            if let Some(other) = other {
                return Err(two_without_prefixes(&other.name, &spec.name));
            }
            if let Some(peer) = self.peer_mut(hop) {
                peer.origin = Origin::Config;
            }
            self.set_default(hop, is_default);
            self.add_prefixes(&spec.name, &spec.prefixes, Origin::Config, false)?;
        }
        Ok(())
    }

    /// Notes where a peer is; tells whether that is news.
    pub(crate) fn set_endpoint(&mut self, hop: NextHop, endpoint: Option<SocketAddr>) -> bool {
        match self.peer_mut(hop) {
            Some(peer) if peer.endpoint != endpoint => {
                peer.endpoint = endpoint;
                peer.learned_port = None;
                peer.forget_proofs();
                peer.is_suspended = false;
                peer.path_mtu_bytes = None;
                self.built = None;
                true
            }
            _ => false,
        }
    }

    /// Notes the port that a peer sends from in place of the one that it was
    /// given; tells whether that is news.
    pub(crate) fn set_learned_port(&mut self, hop: NextHop, port: Option<u16>) -> bool {
        match self.peer_mut(hop) {
            Some(peer) if peer.learned_port != port => {
                peer.learned_port = port;
                peer.forget_proofs();
                true
            }
            _ => false,
        }
    }

    /// Notes whether the way to a peer leads through the tunnel itself; tells
    /// whether that is news. What was known of the path is that of another way
    /// then.
    pub(crate) fn set_suspended(&mut self, hop: NextHop, is_suspended: bool) -> bool {
        match self.peer_mut(hop) {
            Some(peer) if peer.is_suspended != is_suspended => {
                peer.is_suspended = is_suspended;
                peer.forget_proofs();
                peer.path_mtu_bytes = None;
                true
            }
            _ => false,
        }
    }

    /// Notes the MTU of the path to a peer, and whether a router on it takes less
    /// than this host's interface; tells whether that is news.
    pub(crate) fn set_path_mtu(&mut self, hop: NextHop, mtu_bytes: u32, is_narrow: bool) -> bool {
        let Some(peer) = self.peer_mut(hop) else {
            return false;
        };
        let old = (peer.path_mtu_bytes, peer.is_path_narrow);
        (peer.path_mtu_bytes, peer.is_path_narrow) = (Some(mtu_bytes), is_narrow);
        old != (Some(mtu_bytes), is_narrow)
    }

    /// The prefixes that the host's kernel should route into the tunnel.
    pub(crate) fn kernel_routes(&self) -> BTreeSet<IpNet> {
        self.prefixes.keys().copied().collect()
    }

    /// Addresses that are never a peer's inside the tunnel, whatever its prefixes:
    /// this host's own, those that the peers have outside, and those of nobody.
    ///
    /// A packet from one of them would pass, outside the tunnel, for a datagram of
    /// that peer. And one to a peer's has to go there outside: what comes into the
    /// tunnel for it may be our own datagram, which must not be wrapped again.
    fn outside(&self) -> impl Iterator<Item = IpAddr> {
        let own = self.own.iter().copied();
        let endpoints = self
            .peers()
            .filter_map(|(_, peer)| Some(peer.endpoint?.ip()));
        let nobodys = [Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()];
        own.chain(endpoints).chain(nobodys)
    }

    /// Whether packets to or from `address` are never carried.
    pub(crate) fn is_outside(&self, address: IpAddr) -> bool {
        self.outside().any(|outside| outside == address)
    }

    /// The longest packet that reaches every peer in one piece, and the peer that
    /// says so; `None` while no path is known.
    pub(crate) fn smallest_path(&self) -> Option<(usize, SocketAddr)> {
        let known = self
            .peers()
            .filter(|(_, peer)| peer.path_mtu_bytes.is_some());
        known
            .filter_map(|(_, peer)| Some((inner_mtu_bytes(peer), peer.endpoint?)))
            .min()
    }

    /// The workers' table.
    pub(crate) fn table(&mut self, addresses: TunnelAddresses, is_hop: bool) -> Table {
        let prefixes = match self.built.take() {
            Some(built) => built,
            None => Arc::new(self.build()),
        };
        self.built = Some(Arc::clone(&prefixes));
        let peers = self.peers.iter().map(|peer| match peer {
            Some(peer) => table::PeerSnapshot {
                endpoint: peer.endpoint_in_use(),
                mtu_bytes: inner_mtu_bytes(peer),
                // IPv6 routers do not (RFC 8200, section 5).
                is_fragmented: !peer.is_path_narrow || peer.endpoint.is_some_and(|to| to.is_ipv4()),
                traffic: Arc::clone(&peer.traffic),
            },
            // A place that is free: no prefix leads there.
            None => table::PeerSnapshot {
                endpoint: None,
                mtu_bytes: 0,
                is_fragmented: true,
                traffic: Arc::new([]),
            },
        });
        Table::new(peers.collect(), prefixes, addresses, is_hop)
    }

    /// The lookup structure. The last of several prefixes that are the same wins:
    /// 0.0.0.0/0 that was given, and this host.
    fn build(&self) -> Prefixes {
        let anywhere = self.default.into_iter().flat_map(|hop| {
            [
                (IpNet::V4(Ipv4Net::default()), hop),
                (IpNet::V6(Ipv6Net::default()), hop),
            ]
        });
        let given = self.prefixes.iter();
        let given = given.map(|(&prefix, behind)| (prefix, behind.peer));
        let outside = self.outside().map(|outside| (IpNet::from(outside), NOBODY));
        Prefixes::new(anywhere.chain(given).chain(outside))
    }
}

fn traffic(workers: usize) -> Arc<[PeerCounters]> {
    (0..workers).map(|_| PeerCounters::default()).collect()
}

fn two_without_prefixes(one: &PeerName, other: &PeerName) -> Error {
    Error::new(format!("both peer {one} and peer {other} have no prefixes"))
        .hint("give one of them the prefixes behind it, as in HOST=10.1.0.0/16")
}

/// Longest inner packet that reaches a peer in one piece.
fn inner_mtu_bytes(peer: &Peer) -> usize {
    match (peer.endpoint, peer.path_mtu_bytes) {
        (Some(endpoint), Some(path_mtu_bytes)) => {
            let overhead_bytes = wire::overhead_bytes(endpoint.ip());
            path_mtu_bytes.saturating_sub(overhead_bytes) as usize
        }
        // Nothing is known yet: nothing is refused.
        _ => BATCH_BYTES_MAX,
    }
}

/// The addresses that errors are reported from: the first of each family.
/// `accept_local`: the device takes IPv4 packets from there.
pub(crate) fn tunnel_addresses(addresses: &[IpNet], accept_local: bool) -> TunnelAddresses {
    let mut found = TunnelAddresses {
        accept_local,
        ..TunnelAddresses::default()
    };
    for address in addresses {
        match *address {
            IpNet::V4(v4) => found.v4 = found.v4.or(Some(v4)),
            IpNet::V6(v6) => found.v6 = found.v6.or(Some(v6)),
        }
    }
    found
}

#[cfg(test)]
mod tests;
