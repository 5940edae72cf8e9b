//! Addresses, MTU and routes of the TUN device, and the address that a tunnel
//! gives itself when it was given none.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use ipnet::{IpNet, Ipv4Net};

use crate::error::{Error, Result};
use crate::host::netlink::Netlink;
use crate::host::netlink::lookup::Way;
use crate::host::netlink::route::{DEFAULT_TABLE, MAIN_TABLE};
use crate::packet::lpm;

/// Smallest MTU that IPv6 works with (RFC 8200, section 5).
pub(crate) const IPV6_MTU_BYTES_MIN: u32 = 1280;

/// Smallest MTU that IPv4 works with (RFC 791).
pub(crate) const IPV4_MTU_BYTES_MIN: u32 = 68;

/// The overlay's prefix for derived addresses: flannel's default network.
const OVERLAY: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(10, 244, 0, 0), 16);

/// What to give the device.
#[derive(Clone, Debug, PartialEq)]
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
        tracing::error!(%error, "{error}");
    }
    result
}

fn replace_addresses(
    netlink: &mut Netlink,
    index: u32,
    old: &[IpNet],
    new: &[IpNet],
) -> Result<()> {
    // First, so that the device is never without one: its routes would go.
    new.iter().try_for_each(|&address| {
        // In IPv6 perhaps with another prefix length.
        but_for(libc::EEXIST, netlink.add_address(index, address))
    })?;
    let is_gone = |address: &&IpNet| !new.contains(address);
    let gone: Vec<IpNet> = old.iter().filter(is_gone).copied().collect();
    remove_present(netlink, index, &gone)?;
    // In one subnet the first address is the primary one; unless
    // promote_secondaries says otherwise (ip-sysctl), the others go with it. And one
    // of IPv6 with another prefix length was in the way: if it still is, it is not ours.
    let present = netlink.addresses()?;
    let mut missing = new.iter().filter(|net| !present.contains(&(index, **net)));
    missing.try_for_each(|&address| netlink.add_address(index, address))
}

fn remove_present(netlink: &mut Netlink, index: u32, addresses: &[IpNet]) -> Result<()> {
    addresses.iter().try_for_each(|&address| {
        // Somebody has taken it away, or it went with another one.
        but_for(libc::EADDRNOTAVAIL, netlink.del_address(index, address))
    })
}

fn but_for(errno: i32, result: Result<()>) -> Result<()> {
    result.or_else(|error| match error.errno() == Some(errno) {
        true => Ok(()),
        false => Err(error),
    })
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
    let others = netlink.addresses()?;
    // Without a network there is no route; and all interfaces have that of the
    // link-local ones.
    let has_network = |net: &&IpNet| match net {
        IpNet::V4(net) => net.prefix_len() < 32,
        IpNet::V6(net) => net.prefix_len() < 128 && !net.addr().is_unicast_link_local(),
    };
    for address in addresses.iter().filter(has_network) {
        let network = address.trunc();
        for (index, other) in &others {
            if Some(*index) == own || !other.contains(&network) {
                continue;
            }
            let link = netlink.name_for_error(*index);
            if other.trunc() == network {
                return Err(Error::new(format!(
                    "the address {address} is in the network of {link}, which has {other}"
                ))
                .hint("give the tunnel an --address in a network of its own"));
            }
            tracing::warn!(
                %address,
                %network,
                interface = link,
                "the address {address} takes {network} from {link}, which has {other}, into the \
                 tunnel"
            );
        }
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
    if own.is_some() && netlink.interface_to(peer)? == own {
        return Err(inside(peer.ip()));
    }
    Ok(())
}

fn inside(peer: IpAddr) -> Error {
    Error::new(format!(
        "the route to peer {peer} would lead through the tunnel itself"
    ))
    .hint("choose an --address and --route that do not cover the peer, or add a route to it first")
}

/// As [`check_outside`], before the device has these addresses and `routes`, as far as
/// can be told: whether one of them covers the peer better than the route that leads
/// there now. One that drops all packets keeps them out of the tunnel, too.
///
/// # Errors
/// Names the peer if it would be reached through the tunnel.
pub(crate) fn check_will_be_outside(
    netlink: &mut Netlink,
    own: Option<u32>,
    peer: SocketAddr,
    addresses: &[IpNet],
    routes: &BTreeSet<IpNet>,
) -> Result<()> {
    let address = peer.ip();
    let covering = addresses.iter().filter(|subnet| subnet.contains(&address));
    let subnet_length = covering.map(IpNet::prefix_len).max();
    let mut covering = lpm::covering(address);
    let route = covering.find(|prefix| routes.contains(prefix));
    let route_length = route.map(|route| route.prefix_len());
    if subnet_length.is_none() && route_length.is_none() {
        return Ok(());
    }
    let is_inside = match netlink.route_to(peer)? {
        Way::None => true,
        Way::Dropped => false,
        // A rule that comes before the main table leads elsewhere.
        Way::Route(route) if ![MAIN_TABLE, DEFAULT_TABLE].contains(&route.table) => false,
        Way::Route(route) => {
            let length = Some(route.destination.prefix_len());
            // Of two as long, the kernel's for an address comes last, and ours first. In a
            // takeover the route may be that for the address itself.
            let is_own = own.is_some() && route.oif == own;
            route_length >= length || subnet_length > length || is_own && subnet_length == length
        }
    };
    match is_inside {
        true => Err(inside(address)),
        false => Ok(()),
    }
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
    let addresses = netlink.addresses()?.into_iter();
    let routes = netlink.all_routes()?.into_iter();
    let mut taken = addresses
        .map(|(index, net)| ("address", net, Some(index)))
        .chain(routes.map(|route| ("route", route.destination, route.oif)));
    let clash = taken.find(|(_, other, index)| {
        let is_own = own.is_some() && *index == own;
        let overlaps = other.contains(&network) || network.contains(&other.trunc());
        !is_own && overlaps && other.prefix_len() > 0
    });
    let Some((what, other, index)) = clash else {
        return Ok(());
    };
    let name = index.map(|index| format!(" on {}", netlink.name_for_error(index)));
    let name = name.unwrap_or_default();
    Err(Error::new(format!(
        "the derived tunnel address {derived} overlaps the {what} {other}{name}"
    ))
    .hint("give this host's tunnel address with --address"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::netlink::RouteKind;
    use crate::testbed::{self, Namespace};

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    /// A host with an interface to the outside, and one that stands for the tunnel's.
    fn host() -> (Namespace, Netlink, [u32; 2]) {
        let namespace = Namespace::new().unwrap();
        let mut netlink = namespace.netlink().unwrap();
        testbed::join(&namespace, &namespace, "one", "two").unwrap();
        let links = ["one", "two"].map(|name| netlink.link_index(name).unwrap().unwrap());
        for link in links {
            netlink.set_up(link).unwrap();
        }
        (namespace, netlink, links)
    }

    #[test]
    fn a_peer_must_not_be_in_the_tunnels_subnet_nor_without_a_route() {
        let (_namespace, mut netlink, [outside, own]) = host();
        let addresses = [net("10.9.0.1/16"), net("fd09::1/64")];
        let routes = BTreeSet::from([net("10.0.0.0/8")]);
        let is_outside = |netlink: &mut Netlink, own, peer: &str| {
            let peer = SocketAddr::new(peer.parse().unwrap(), 1);
            check_will_be_outside(netlink, own, peer, &addresses, &routes).is_ok()
        };
        assert!(!is_outside(&mut netlink, None, "10.1.0.1"));
        netlink
            .add_route(net("10.1.0.0/16"), None, Some(outside))
            .unwrap();
        assert!(is_outside(&mut netlink, None, "10.1.0.1"));
        let kind = RouteKind::BlackHole;
        netlink.block(net("10.2.0.0/16"), kind, MAIN_TABLE).unwrap();
        assert!(is_outside(&mut netlink, None, "10.2.0.1"));
        // At a start, and when the device is taken over with its addresses.
        for peer in ["10.9.0.7", "fd09::7"] {
            assert!(!is_outside(&mut netlink, None, peer), "{peer}");
        }
        for address in addresses {
            netlink.add_address(own, address).unwrap();
        }
        for peer in ["10.9.0.7", "fd09::7"] {
            assert!(!is_outside(&mut netlink, Some(own), peer), "{peer}");
        }
    }

    #[test]
    fn an_address_with_another_prefix_length_is_in_the_way() {
        let (_namespace, mut netlink, [_, own]) = host();
        let [old, new] = [net("fd09::1/64"), net("fd09::1/48")];
        netlink.add_address(own, old).unwrap();
        let refused = set_addresses(&mut netlink, own, &[], &[new]).unwrap_err();
        assert_eq!(refused.errno(), Some(libc::EEXIST));
        set_addresses(&mut netlink, own, &[old], &[new]).unwrap();
        let addresses = netlink.addresses().unwrap();
        assert!(addresses.contains(&(own, new)) && !addresses.contains(&(own, old)));
    }

    #[test]
    fn a_derived_address_hides_no_route_of_any_table() {
        let (_namespace, mut netlink, [_, own]) = host();
        let derived = derive_address("10.211.55.122".parse().unwrap()).unwrap();
        netlink.add_address(own, derived.into()).unwrap();
        let is_free = |netlink: &mut Netlink| check_free(netlink, derived, Some(own));
        is_free(&mut netlink).unwrap();
        let prefix = net("10.244.7.0/24");
        // It decides nothing.
        netlink.block(prefix, RouteKind::Throw, 100).unwrap();
        is_free(&mut netlink).unwrap();
        netlink.block(prefix, RouteKind::Unreachable, 101).unwrap();
        let refused = is_free(&mut netlink).unwrap_err().to_string();
        assert!(refused.contains("the route 10.244.7.0/24"), "{refused}");
    }

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
