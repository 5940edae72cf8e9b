//! What a tunnel is to be: made at a start, by a reload and by requests, checked
//! against this host, and put in force as a whole or not at all.

use std::collections::{BTreeSet, HashSet};
use std::net::SocketAddr;

use ipnet::IpNet;

use super::reach;
use super::settings::Settings;
use crate::config::{Config, HostPort, PeerName};
use crate::error::{Error, Result};
use crate::host::link;
use crate::host::netlink::Netlink;
use crate::routing::dns;
use crate::routing::overlay::{Origin, Overlay};

/// Names of peers whose addresses cannot be used, and why: they are to be asked for
/// again.
pub type SetAside = Vec<(HostPort, Error)>;

/// See the module's documentation.
pub struct Plan {
    /// The configuration.
    pub config: Config,
    /// What follows from it here and now.
    pub settings: Settings,
    /// The peers and their prefixes.
    pub overlay: Overlay,
}

impl Plan {
    /// Makes sure that the tunnel and its peers have addresses of their own. The
    /// tunnel has a `device` already if it runs, which loses the `replaced` ones.
    ///
    /// # Errors
    /// Names the address or prefix. Named peers are set aside instead.
    pub fn check_addresses(
        &mut self,
        netlink: &mut Netlink,
        device: Option<u32>,
        replaced: &[IpNet],
    ) -> Result<SetAside> {
        let present = netlink.addresses()?;
        let given = self.settings.link.addresses.clone();
        let stays =
            |(index, net): &&(u32, IpNet)| Some(*index) != device || !replaced.contains(net);
        let staying = present.iter().filter(stays).map(|(_, net)| net);
        let own = staying.chain(&given).map(IpNet::addr);
        self.overlay.set_own_addresses(own.collect());
        let listen = self.settings.listen;
        let aside = self.set_aside(|overlay, name, peer| {
            if let Some(net) = given.iter().find(|net| net.addr() == peer.ip()) {
                let what = format!("the address {net} is that of peer {name}");
                return Err(Error::new(what).hint("give the tunnel an address of its own"));
            }
            reach::check_endpoint(listen, overlay, peer)
        })?;
        if replaced != given {
            if !self.config.addresses.is_empty() {
                link::check_networks(netlink, device, &given)?;
            } else if !replaced.is_empty() {
                // At a start it is checked when the device is claimed.
                check_derived(netlink, &self.config, &given, device)?;
            }
        }
        let own = given.iter().map(IpNet::addr).collect();
        reach::check_prefixes(&own, self.overlay.prefixes().map(|(prefix, ..)| prefix))?;
        Ok(aside)
    }

    /// Makes sure that the path to no peer will lead through the tunnel itself, as far
    /// as can be told before its routes are there, but for those that are `suspended`
    /// for that.
    ///
    /// # Errors
    /// Names the peer. Named peers are set aside instead.
    pub fn check_paths(
        &mut self,
        netlink: &mut Netlink,
        device: Option<u32>,
        suspended: &HashSet<SocketAddr>,
    ) -> Result<SetAside> {
        let routes = kernel_routes(&self.config, &self.overlay);
        let addresses = self.settings.link.addresses.clone();
        self.set_aside(|_, _, peer| match suspended.contains(&peer) {
            true => Ok(()),
            false => link::check_will_be_outside(netlink, device, peer, &addresses, &routes),
        })
    }

    /// Checks the addresses that peers are sent to. One that a peer was not given counts
    /// as none if it fails.
    fn set_aside(
        &mut self,
        mut check: impl FnMut(&Overlay, &PeerName, SocketAddr) -> Result<()>,
    ) -> Result<SetAside> {
        // Hosts of the registry are checked as they come.
        let peers = self.overlay.peers();
        let peers = peers.filter(|(_, peer)| peer.origin != Origin::Registry);
        let resolved = peers.filter_map(|(hop, peer)| Some((hop, peer.endpoint_learned()?)));
        let mut aside = Vec::new();
        for (hop, endpoint) in resolved.collect::<Vec<_>>() {
            let Some(peer) = self.overlay.peer(hop) else {
                continue;
            };
            let Err(error) = check(&self.overlay, &peer.name, endpoint) else {
                continue;
            };
            if peer.was_given(endpoint) {
                return Err(error);
            }
            let error = dns::cannot_use(&peer.name, &error);
            aside.extend(peer.dns_name().cloned().map(|name| (name, error)));
            self.overlay.set_endpoint(hop, None);
        }
        Ok(aside)
    }
}

/// Makes sure that the tunnel's address is free if it was derived. `own`: the device, if
/// the tunnel has it already.
///
/// # Errors
/// Names the address or route that overlaps.
pub fn check_derived(
    netlink: &mut Netlink,
    config: &Config,
    addresses: &[IpNet],
    own: Option<u32>,
) -> Result<()> {
    match addresses {
        [IpNet::V4(derived)] if config.addresses.is_empty() => {
            link::check_free(netlink, *derived, own)
        }
        _ => Ok(()),
    }
}

/// Makes sure that this host is not one of its peers, also of those that were added while it
/// ran: no handshake would ever succeed.
///
/// # Errors
/// Names the peer.
pub fn check_own_key(config: &Config, overlay: &Overlay) -> Result<()> {
    let own = config.public_key().map(PeerName::Key);
    match own.and_then(|own| overlay.find(&own)) {
        None => Ok(()),
        Some((_, peer)) => {
            let identity = peer.identity().map(|identity| format!(", {identity},"));
            let what = format!(
                "peer {}{} has this host's own key",
                peer.name,
                identity.unwrap_or_default()
            );
            Err(Error::new(what).hint("name the other host; `fastvpn peer del` removes a peer"))
        }
    }
}

/// The prefixes that the kernel should route into the tunnel.
pub fn kernel_routes(config: &Config, overlay: &Overlay) -> BTreeSet<IpNet> {
    let mut wanted: BTreeSet<IpNet> = match config.no_routes {
        true => Default::default(),
        false => {
            let prefixes = overlay.prefixes().map(|(prefix, ..)| prefix);
            let single = prefixes.filter(|prefix| !config.is_in_network(*prefix));
            single
                .chain(config.registry_network.map(IpNet::V4))
                .collect()
        }
    };
    wanted.extend(config.routes.iter().map(IpNet::trunc));
    wanted
}
