//! What a tunnel is to be: made at a start, by a reload and by requests, checked
//! against this host, and put in force as a whole or not at all.

use std::collections::{BTreeSet, HashSet};
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;

use super::reach;
use super::settings::Settings;
use crate::config::{Config, PeerName};
use crate::error::{Error, Result};
use crate::host::link;
use crate::host::netlink::Netlink;
use crate::routing::dns;
use crate::routing::overlay::Overlay;

/// Named peers whose addresses cannot be used, and why: their names are to be
/// asked for again.
pub type SetAside = Vec<(PeerName, Error)>;

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
    /// The prefixes that the kernel should route into the tunnel.
    pub fn kernel_routes(&self) -> BTreeSet<IpNet> {
        kernel_routes(&self.config, &self.overlay)
    }

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
        let is_staying =
            |(index, net): &&(u32, IpNet)| Some(*index) != device || !replaced.contains(net);
        let staying = present.iter().filter(is_staying);
        let given = self.settings.link.addresses.clone();
        let own: BTreeSet<IpAddr> = given.iter().map(IpNet::addr).collect();
        let staying = staying.map(|(_, net)| net.addr());
        self.overlay
            .set_own_addresses(staying.chain(own.iter().copied()).collect());
        let is_present = |ip: IpAddr| present.iter().any(|(_, net)| net.addr() == ip);
        let listen = self.settings.listen;
        let aside = self.set_aside(|overlay, name, peer| {
            let same = given.iter().find(|net| net.addr() == peer.ip());
            if let Some(net) = same.filter(|_| !is_present(peer.ip())) {
                let what = format!("the address {net} is that of peer {name}");
                return Err(Error::new(what).hint("give the tunnel an address of its own"));
            }
            reach::check_configured(listen, overlay, peer)
        })?;
        if !self.settings.address_is_derived && replaced != given {
            link::check_networks(netlink, device, &given)?;
        }
        // At a start, a derived address is checked when the device is claimed.
        if !replaced.is_empty() && replaced != given {
            check_derived(netlink, &self.settings, device)?;
        }
        reach::check_prefixes(&own, self.overlay.prefixes().map(|(prefix, ..)| prefix))?;
        Ok(aside)
    }

    /// Makes sure that no peer will be reached through the tunnel itself, as far as
    /// can be told before its routes are there, but for those that are `suspended`
    /// for that.
    ///
    /// # Errors
    /// Names the peer. Named peers are set aside instead.
    pub fn check_ways(
        &mut self,
        netlink: &mut Netlink,
        suspended: &HashSet<SocketAddr>,
    ) -> Result<SetAside> {
        let (routes, addresses) = (self.kernel_routes(), self.settings.link.addresses.clone());
        self.set_aside(|_, _, peer| match suspended.contains(&peer) {
            true => Ok(()),
            false => link::check_will_be_outside(netlink, peer, &addresses, &routes),
        })
    }

    /// Checks the addresses that peers are sent to. That of a name counts as none if
    /// it fails.
    fn set_aside(
        &mut self,
        mut check: impl FnMut(&Overlay, &PeerName, SocketAddr) -> Result<()>,
    ) -> Result<SetAside> {
        let peers = self.overlay.peers();
        let resolved = peers
            .filter_map(|(hop, peer)| Some((hop, peer.name.clone(), peer.endpoint_learned()?)));
        let mut aside = Vec::new();
        for (hop, name, endpoint) in resolved.collect::<Vec<_>>() {
            let Err(error) = check(&self.overlay, &name, endpoint) else {
                continue;
            };
            if name.literal().is_some() {
                return Err(error);
            }
            self.overlay.set_endpoint(hop, None);
            let error = dns::cannot_use(&name, &error);
            aside.push((name, error));
        }
        Ok(aside)
    }
}

/// Makes sure that a derived address is free. `own`: the device, if the tunnel has
/// it already.
///
/// # Errors
/// Names the address or route that overlaps.
pub fn check_derived(netlink: &mut Netlink, settings: &Settings, own: Option<u32>) -> Result<()> {
    let addresses = settings.link.addresses.iter();
    let mut derived = addresses.filter(|_| settings.address_is_derived);
    derived.try_for_each(|address| match address {
        IpNet::V4(address) => link::check_free(netlink, *address, own),
        IpNet::V6(_) => Ok(()),
    })
}

/// The prefixes that the kernel should route into the tunnel.
pub fn kernel_routes(config: &Config, overlay: &Overlay) -> BTreeSet<IpNet> {
    let mut wanted: BTreeSet<IpNet> = match config.no_routes {
        true => Default::default(),
        false => overlay.prefixes().map(|(prefix, ..)| prefix).collect(),
    };
    wanted.extend(config.routes.iter().map(IpNet::trunc));
    wanted
}

/// Endpoints of the configured peers that have one, in the order of the
/// configuration.
pub fn endpoints(config: &Config, overlay: &Overlay) -> Vec<SocketAddr> {
    let peers = config.peers.iter();
    peers
        .filter_map(|spec| overlay.find(&spec.name)?.1.endpoint_in_use())
        .collect()
}
