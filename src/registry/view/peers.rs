//! The peers that follow from what is known of the registry.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;

use ipnet::{IpNet, Ipv4Net};

use super::{Host, Policy, Snapshot, Unused, View};
use crate::config::{HostPort, PEERS_MAX, PeerId, PeerName, PeerSpec};
use crate::registry::network::Backend;

impl View {
    /// The peers that follow. Those that are as in the `old` snapshot, which had the same policy,
    /// are the same ones: only what has changed is made anew.
    pub(crate) fn snapshot(&self, policy: &Policy, old: &Snapshot) -> Snapshot {
        let mut unused = Unused {
            malformed: self.malformed.len(),
            ..Unused::default()
        };
        let owners = self.extra_owners(policy, &mut unused);
        let live = self.hosts.iter();
        let held = self.held.iter().map(|(subnet, (host, _))| (subnet, host));
        let mut usable: Vec<(PeerId, Ipv4Net, &Host)> = Vec::new();
        for (subnet, host) in live.chain(held) {
            let id = policy.peer_id(*subnet, host, &mut unused);
            usable.extend(id.map(|id| (id, *subnet, host)));
        }
        // Of a peer with several subnets, the first one's host says where it is.
        usable.sort_by(|one, other| one.0.cmp(&other.0));
        let mut peers = Vec::new();
        let mut before = old.peers.iter().peekable();
        for subnets in usable.chunk_by(|one, other| one.0 == other.0) {
            let (id, _, host) = &subnets[0];
            if peers.len() >= PEERS_MAX {
                unused.out_of_place += subnets.len();
                continue;
            }
            let mut prefixes = Vec::with_capacity(1);
            for (_, subnet, _) in subnets {
                prefixes.push(IpNet::V4(*subnet));
                prefixes.extend(owners.get(subnet).into_iter().flatten());
            }
            prefixes.sort_unstable();
            prefixes.dedup();
            while before.next_if(|(other, _)| *other < id).is_some() {}
            let endpoint = policy.endpoint(host);
            let same = before.next_if(|(other, old)| {
                let was_at = || old.endpoint.as_ref().and_then(HostPort::literal);
                *other == id && old.prefixes == prefixes && was_at() == Some(endpoint)
            });
            let spec = match same {
                Some((_, old)) => Arc::clone(old),
                None => Arc::new(policy.peer(host, endpoint, prefixes)),
            };
            peers.push((id.clone(), spec));
        }
        Snapshot {
            peers: peers.into_iter().collect(),
            unused,
        }
    }
}

impl View {
    /// The leases of the hosts that are peers.
    pub(crate) fn leases(&self, policy: &Policy) -> Vec<(PeerId, i64)> {
        let mut unused = Unused::default();
        let hosts = self.hosts.iter().filter(|(_, host)| host.lease != 0);
        let peers = hosts.filter_map(|(subnet, host)| {
            let id = policy.peer_id(*subnet, host, &mut unused)?;
            Some((id, host.lease))
        });
        peers.collect()
    }
}

impl Policy {
    /// Whether a host may have this address.
    pub(super) fn allows(&self, public_ip: Ipv4Addr) -> bool {
        let address = IpAddr::V4(public_ip);
        self.allowed.is_empty() || self.allowed.iter().any(|net| net.contains(&address))
    }

    /// The peer that a host is with its subnet; `None` for this host, and for those that are not
    /// to be used.
    fn peer_id(&self, subnet: Ipv4Net, host: &Host, unused: &mut Unused) -> Option<PeerId> {
        let (public_ip, key) = (host.value.public_ip, host.value.key);
        if public_ip == self.own_ip || key.is_some() && key == self.own_key {
            return None;
        }
        if !self.allows(public_ip) {
            unused.not_allowed += 1;
            return None;
        }
        if !self.network.network.contains(&subnet) {
            unused.out_of_place += 1;
            return None;
        }
        // It may be a part of another host's.
        if subnet.prefix_len() != self.network.subnet_length {
            unused.malformed += 1;
            return None;
        }
        if !host.value.has(&self.network.backend) {
            unused.other_backend += 1;
            return None;
        }
        let endpoint = self.endpoint(host);
        Some(match key {
            Some(key) => PeerId::Key(key),
            None => PeerId::Address(endpoint.ip(), endpoint.port()),
        })
    }

    /// Where a host's datagrams go.
    fn endpoint(&self, host: &Host) -> SocketAddr {
        SocketAddr::new(host.value.public_ip.into(), self.network.backend.port())
    }

    /// The peer that a host is, with its prefixes in order.
    fn peer(&self, host: &Host, endpoint: SocketAddr, prefixes: Vec<IpNet>) -> PeerSpec {
        let endpoint = HostPort {
            host: endpoint.ip().to_string(),
            port: endpoint.port(),
        };
        let name = match host.value.key {
            Some(key) => PeerName::Key(key),
            None => PeerName::Host(endpoint.clone()),
        };
        let mut spec = PeerSpec::new(name, Some(endpoint));
        spec.prefixes = prefixes;
        if let Backend::WireGuard {
            preshared_key,
            keepalive,
            ..
        } = &self.network.backend
        {
            spec.preshared_key = preshared_key.clone();
            spec.persistent_keepalive = *keepalive;
        }
        spec
    }
}
