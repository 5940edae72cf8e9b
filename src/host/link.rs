//! Addresses, MTU and routes of the TUN device, and the address that a tunnel
//! gives itself when it was given none.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use ipnet::{IpNet, Ipv4Net};

use crate::error::{Error, Result};
use crate::host::netlink::route::MAIN_TABLE;
use crate::host::netlink::{Netlink, Way};

/// Smallest MTU that IPv6 works with (RFC 8200, section 5).
pub(crate) const IPV6_MTU_BYTES_MIN: u32 = 1280;

/// The table that is looked up after the main one (`RT_TABLE_DEFAULT`,
/// linux/rtnetlink.h).
const DEFAULT_TABLE: u32 = 253;

/// Smallest MTU that IPv4 works with (RFC 791).
pub(crate) const IPV4_MTU_BYTES_MIN: u32 = 68;

/// The overlay's prefix for derived addresses: flannel's default network.
const OVERLAY: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(10, 244, 0, 0), 16);

/// What to give the device.
#[derive(Clone, Debug)]
pub struct LinkConfig {
    /// Addresses with the length of their prefix.
    pub addresses: Vec<IpNet>,
    /// MTU in bytes.
    pub mtu_bytes: u32,
    /// Packets that wait in a queue for a worker.
    pub txqueuelen: u32,
}

/// Configures the device and brings it up. All of it goes with the device.
/// `old`: the addresses that it has from us already.
///
/// # Errors
/// Names the address or setting that the kernel refused.
pub fn bring_up(
    netlink: &mut Netlink,
    index: u32,
    config: &LinkConfig,
    old: &[IpNet],
) -> Result<()> {
    netlink.set_txqueuelen(index, config.txqueuelen)?;
    netlink.set_mtu(index, config.mtu_bytes)?;
    set_addresses(netlink, index, old, &config.addresses)?;
    netlink.set_up(index)
}

/// Those of the `new` addresses that a new process can give the device while its
/// old process, who gave it the `old` ones, still carries the tunnel: that takes
/// none away. The others come with [`bring_up`].
///
/// # Errors
/// When the kernel refuses.
pub(crate) fn addresses_to_add(
    netlink: &mut Netlink,
    index: u32,
    old: &[IpNet],
    new: &[IpNet],
) -> Result<Vec<IpNet>> {
    let present = addresses_of(netlink, index)?;
    let link = netlink.link_by_index(index)?;
    let takes_v6 = link.is_some_and(|link| link.mtu >= IPV6_MTU_BYTES_MIN);
    let can_be_added = |address: &&IpNet| {
        let is_v4 = address.addr().is_ipv4();
        let is_free = !old.iter().any(|old| excludes(old, address));
        !present.contains(address) && (is_v4 || takes_v6 && is_free)
    };
    Ok(new.iter().filter(can_be_added).copied().collect())
}

/// Gives the device these addresses, which it does not have.
///
/// # Errors
/// Names the address that the kernel refused. The device is then as it was.
pub(crate) fn add_addresses(netlink: &mut Netlink, index: u32, addresses: &[IpNet]) -> Result<()> {
    for (count, &address) in addresses.iter().enumerate() {
        if let Err(error) = netlink.add_address(index, address) {
            remove_addresses(netlink, index, &addresses[..count]);
            return Err(error);
        }
    }
    Ok(())
}

/// Whether a device cannot have both: an IPv6 address is there once, whatever the
/// length of its prefix (`ipv6_add_addr` in net/ipv6/addrconf.c).
fn excludes(one: &IpNet, other: &IpNet) -> bool {
    one != other && one.addr() == other.addr() && one.addr().is_ipv6()
}

/// Takes back what [`add_addresses`] gave, as far as it is still there.
pub(crate) fn remove_addresses(netlink: &mut Netlink, index: u32, added: &[IpNet]) {
    if let Err(error) = remove_present(netlink, index, added) {
        tracing::warn!("{error}");
    }
}

fn addresses_of(netlink: &mut Netlink, index: u32) -> Result<Vec<IpNet>> {
    let all = netlink.addresses()?.into_iter();
    Ok(all
        .filter_map(|(owner, net)| (owner == index).then_some(net))
        .collect())
}

/// Lets the device deliver what we report to senders from our own address,
/// which the kernel else takes for a forgery; tells whether it does.
pub(crate) fn accept_local(netlink: &mut Netlink, index: u32) -> bool {
    netlink
        .accept_local(index)
        .inspect_err(|error| tracing::debug!("reports come from the address asked for: {error}"))
        .is_ok()
}

/// Replaces the `old` addresses of a device, as far as it still has them, by the
/// `new` ones.
///
/// # Errors
/// Names the address that the kernel refused. The device has the old ones then.
pub(crate) fn set_addresses(
    netlink: &mut Netlink,
    index: u32,
    old: &[IpNet],
    new: &[IpNet],
) -> Result<()> {
    let result = replace_addresses(netlink, index, old, new);
    if result.is_err()
        && let Err(error) = replace_addresses(netlink, index, new, old)
    {
        tracing::error!("{error}");
    }
    result
}

fn replace_addresses(
    netlink: &mut Netlink,
    index: u32,
    old: &[IpNet],
    new: &[IpNet],
) -> Result<()> {
    let (mut in_the_way, mut gone) = (Vec::new(), Vec::new());
    for old in old.iter().filter(|address| !new.contains(address)) {
        match new.iter().any(|new| excludes(old, new)) {
            true => in_the_way.push(*old),
            false => gone.push(*old),
        }
    }
    remove_present(netlink, index, &in_the_way)?;
    add_missing(netlink, index, new)?;
    remove_present(netlink, index, &gone)?;
    // In one subnet the first address is the primary one; unless
    // promote_secondaries says otherwise (ip-sysctl), the others go with it.
    add_missing(netlink, index, new)
}

fn remove_present(netlink: &mut Netlink, index: u32, addresses: &[IpNet]) -> Result<()> {
    addresses
        .iter()
        .try_for_each(|address| match netlink.del_address(index, *address) {
            // Somebody has taken it away, or it went with another one.
            Err(error) if error.errno() == Some(libc::EADDRNOTAVAIL) => Ok(()),
            result => result,
        })
}

fn add_missing(netlink: &mut Netlink, index: u32, addresses: &[IpNet]) -> Result<()> {
    let present = addresses_of(netlink, index)?;
    let mut missing = addresses.iter().filter(|net| !present.contains(net));
    missing.try_for_each(|&net| netlink.add_address(index, net))
}

/// Makes sure that no other interface is in the network of one of the device's
/// addresses. The kernel has two routes to such a network then, and the one whose
/// interface goes down and comes up again has lost.
///
/// # Errors
/// Names the address and the interface.
pub(crate) fn check_networks(
    netlink: &mut Netlink,
    own: Option<u32>,
    addresses: &[IpNet],
) -> Result<()> {
    let others: Vec<_> = netlink.addresses()?;
    let others = || others.iter().filter(|(index, _)| Some(*index) != own);
    // Without a network there is no route; and all interfaces have that of the
    // link-local ones.
    let has_network = |net: &&IpNet| match net {
        IpNet::V4(net) => net.prefix_len() < 32,
        IpNet::V6(net) => net.prefix_len() < 128 && !net.addr().is_unicast_link_local(),
    };
    for address in addresses.iter().filter(has_network) {
        let network = address.trunc();
        let mut around = others().filter(|(_, other)| other.contains(&network));
        let Some((index, other)) = around.clone().find(|(_, net)| net.trunc() == network) else {
            if let Some((index, other)) = around.next() {
                let link = netlink.name_for_error(*index);
                tracing::warn!(
                    "the address {address} takes {network} from {link}, which has {other}, into \
                     the tunnel"
                );
            }
            continue;
        };
        let link = netlink.name_for_error(*index);
        return Err(Error::new(format!(
            "the address {address} is in the network of {link}, which has {other}"
        ))
        .hint("give the tunnel an --address in a network of its own"));
    }
    Ok(())
}

/// Makes sure that datagrams to a peer do not themselves go into the tunnel,
/// where each would be wrapped again and again. `own`: the tunnel's device, if
/// it is in this namespace.
///
/// # Errors
/// Names the peer if they would.
pub(crate) fn check_outside(
    netlink: &mut Netlink,
    own: Option<u32>,
    peer: SocketAddr,
) -> Result<()> {
    if own.is_some() && netlink.interface_to_endpoint(peer)? == own {
        return Err(inside(peer.ip()));
    }
    Ok(())
}

fn inside(peer: IpAddr) -> Error {
    Error::new(format!(
        "the way to peer {peer} would lead through the tunnel itself"
    ))
    .hint("choose an --address and --route that do not cover the peer, or add a route to it first")
}

/// As [`check_outside`], before the device has these addresses and `routes`:
/// whether a peer would be reached through it then. `is_suspended`: nothing is
/// sent to the peer while it is, so that it may as well stay so.
///
/// # Errors
/// Names the peer if it would.
pub(crate) fn check_will_be_outside(
    netlink: &mut Netlink,
    own: Option<u32>,
    peer: SocketAddr,
    addresses: &[IpNet],
    routes: &BTreeSet<IpNet>,
    is_suspended: bool,
) -> Result<()> {
    let address = peer.ip();
    let covering = addresses.iter().filter(|subnet| subnet.contains(&address));
    let subnet_length = covering.map(IpNet::prefix_len).max();
    let route_length = longest_match(routes, address);
    if subnet_length.is_none() && route_length.is_none() {
        return Ok(());
    }
    if let SocketAddr::V6(peer) = peer
        && peer.scope_id() != 0
        && Some(peer.scope_id()) != own
    {
        return Ok(());
    }
    let is_inside = match netlink.way_to(peer)? {
        Way::None => true,
        Way::Dropped => false,
        // It is already. What leads there may go with who has the tunnel now; if it
        // stays, or something longer comes, it will be.
        Way::Route(route) if own.is_some() && route.oif == own => {
            let length = Some(route.destination.prefix_len());
            !is_suspended && (route_length >= length || subnet_length >= length)
        }
        // A rule that comes before the main table leads elsewhere.
        Way::Route(route) if ![MAIN_TABLE, DEFAULT_TABLE].contains(&route.table) => false,
        // Of two as long, the kernel's for an address comes last, and ours first.
        Way::Route(route) => {
            let length = Some(route.destination.prefix_len());
            route_length >= length || subnet_length > length
        }
    };
    match is_inside {
        true => Err(inside(address)),
        false => Ok(()),
    }
}

/// Length of the longest of the prefixes that `address` is in.
fn longest_match(prefixes: &BTreeSet<IpNet>, address: IpAddr) -> Option<u8> {
    let host = IpNet::from(address);
    (0..=host.max_prefix_len()).rev().find(|&length| {
        IpNet::new(address, length).is_ok_and(|prefix| prefixes.contains(&prefix.trunc()))
    })
}

/// The tunnel address of the host with the underlay address `underlay`:
/// a.b.x.y gives 10.244.x.y, and an IPv6 address gives its last two bytes.
///
/// # Errors
/// When that would be the network's own or its broadcast address.
pub(crate) fn derive_address(underlay: IpAddr) -> Result<Ipv4Net> {
    let (x, y) = match underlay {
        IpAddr::V4(address) => (address.octets()[2], address.octets()[3]),
        IpAddr::V6(address) => (address.octets()[14], address.octets()[15]),
    };
    let [a, b, _, _] = OVERLAY.network().octets();
    let address = Ipv4Addr::new(a, b, x, y);
    if address == OVERLAY.network() || address == OVERLAY.broadcast() {
        return Err(Error::new(format!(
            "cannot derive a tunnel address from {underlay}: {address} is not a host address"
        ))
        .hint("give one with --address"));
    }
    Ok(Ipv4Net::new_assert(address, OVERLAY.prefix_len()))
}

/// Makes sure that a derived address hides nothing this host can reach today by
/// other interfaces than `own`.
///
/// # Errors
/// Names the address or route that overlaps.
pub(crate) fn check_free(netlink: &mut Netlink, derived: Ipv4Net, own: Option<u32>) -> Result<()> {
    let network = IpNet::from(derived.trunc());
    let overlaps = |other: &IpNet| {
        other.prefix_len() > 0 && (other.contains(&network) || network.contains(&other.trunc()))
    };
    let clash = |what: String, index: Option<u32>, netlink: &mut Netlink| {
        let name = index.map(|index| format!(" on {}", netlink.name_for_error(index)));
        let name = name.unwrap_or_default();
        Err(Error::new(format!(
            "the derived tunnel address {derived} overlaps the {what}{name}"
        ))
        .hint("give this host's tunnel address with --address"))
    };
    for (index, address) in netlink.addresses()? {
        if Some(index) != own && overlaps(&address) {
            return clash(format!("address {address}"), Some(index), netlink);
        }
    }
    for route in netlink.routes()? {
        let is_own = own.is_some() && route.oif == own;
        if !is_own && overlaps(&route.destination) {
            return clash(format!("route {}", route.destination), route.oif, netlink);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_derived_from_the_last_two_bytes() {
        let derive = |text: &str| derive_address(text.parse().unwrap()).map(|net| net.to_string());
        assert_eq!(derive("10.211.55.122").unwrap(), "10.244.55.122/16");
        assert_eq!(derive("10.211.55.123").unwrap(), "10.244.55.123/16");
        assert_eq!(derive("192.168.1.7").unwrap(), "10.244.1.7/16");
        assert_eq!(derive("fd00::1:122").unwrap(), "10.244.1.34/16");
        assert!(derive("10.1.0.0").is_err());
        assert!(
            derive("10.1.255.255")
                .unwrap_err()
                .to_string()
                .contains("--address")
        );
    }
}
