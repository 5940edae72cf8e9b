//! The workers' table that follows from the overlay.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::Overlay;
use crate::config::PEERS_MAX;
use crate::dataplane::table::{PeerSnapshot, Table};
use crate::packet::batch::NextHop;
use crate::packet::icmp::TunnelAddresses;
use crate::packet::lpm::Prefixes;

/// A next hop that no peer has.
const NO_PEER: NextHop = NextHop::MAX;
const _: () = assert!(PEERS_MAX < NO_PEER as usize);

impl Overlay {
    /// The workers' table.
    pub(crate) fn table(&self, addresses: TunnelAddresses, is_hop: bool) -> Table {
        let peers = self.peers.iter().map(|peer| match peer {
            Some(peer) => PeerSnapshot {
                // Sessions know it better.
                endpoint: peer.endpoint_in_use().filter(|_| peer.secure.is_none()),
                mtu_bytes: peer.inner_mtu_bytes(),
                // IPv6 routers do not (RFC 8200, section 5).
                is_fragmented: !peer.is_path_narrow || peer.endpoint.is_some_and(|to| to.is_ipv4()),
                traffic: Arc::clone(&peer.traffic),
                is_suspended: peer.is_suspended,
                sessions: peer.secure.as_ref().map(|it| Arc::clone(&it.sessions)),
            },
            // A place that is free: no prefix leads there.
            None => PeerSnapshot::default(),
        });
        // The last of several prefixes that are the same wins: 0.0.0.0/0 that was given,
        // and this host.
        let anywhere = self.default.into_iter().flat_map(|hop| {
            [
                (IpNet::V4(Ipv4Net::default()), hop),
                (IpNet::V6(Ipv6Net::default()), hop),
            ]
        });
        let given = self.prefixes.iter();
        let given = given.map(|(&prefix, owner)| (prefix, owner.peer));
        let outside = self
            .outside()
            .map(|outside| (IpNet::from(outside), NO_PEER));
        let prefixes = Arc::new(Prefixes::new(anywhere.chain(given).chain(outside)));
        let table = Table::new(peers.collect(), prefixes, addresses, is_hop);
        table.of_generation(self.generation)
    }

    /// Addresses that are never a peer's inside the tunnel, whatever its prefixes:
    /// this host's own, those that plain peers have outside, and the unspecified ones.
    ///
    /// A packet from one of them would pass, outside the tunnel, for a datagram of
    /// that peer. And one to a plain peer's has to go there outside: what comes into the
    /// tunnel for it may be our own datagram, which must not be wrapped again.
    ///
    /// A peer with a key is known by that alone, may be anywhere, and may share its
    /// address with others, whom packets inside the tunnel are for. If the path to it leads
    /// through the tunnel, it is suspended.
    fn outside(&self) -> impl Iterator<Item = IpAddr> {
        let own = self.own.iter().copied();
        let endpoints = self
            .peers()
            .filter(|(_, peer)| peer.secure.is_none())
            .filter_map(|(_, peer)| Some(peer.endpoint?.ip()));
        let unspecified = [Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()];
        own.chain(endpoints).chain(unspecified)
    }

    /// Whether packets to or from `address` are never carried.
    pub(crate) fn is_outside(&self, address: IpAddr) -> bool {
        self.outside().any(|outside| outside == address)
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
