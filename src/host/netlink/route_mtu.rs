//! How long packets toward an address may be, as far as this host's own settings
//! say: the route and the interface. What the kernel has been told by ICMP is
//! left aside, since anybody can send that.

use std::net::SocketAddr;

use netlink_packet_route::link::{
    AfSpecInet6, AfSpecUnspec, LinkAttribute, LinkFlags, LinkMessage,
};
use netlink_packet_route::route::{RouteAttribute, RouteMessage, RouteMetric, RouteType};

use super::Netlink;
use super::route::NO_WAY;
use crate::error::Result;

/// Index of the loopback interface (`LOOPBACK_IFINDEX` in include/net/flow.h),
/// by which the host reaches its own addresses.
const LOOPBACK_INDEX: u32 = 1;

/// See the module's documentation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RouteMtu {
    /// Largest packet in bytes.
    pub mtu_bytes: u32,
    /// The address is on the link itself: no router comes in between.
    pub is_direct: bool,
}

impl Netlink {
    /// The MTU of the route to `endpoint`: that which an administrator gave it,
    /// or else that of its interface. Of several next hops the smallest counts.
    /// `None` if there is no way there.
    ///
    /// # Errors
    /// When the kernel refuses for another reason.
    pub fn route_mtu(&mut self, endpoint: SocketAddr) -> Result<Option<RouteMtu>> {
        let describe = |refusal: super::Refusal| {
            refusal.describe(format!("cannot look up the route to {}", endpoint.ip()))
        };
        let route = match self.fib_match(endpoint) {
            Ok(Some(route)) => route,
            Ok(None) => return Ok(None),
            Err(refusal) if NO_WAY.iter().any(|errno| refusal.is(*errno)) => return Ok(None),
            Err(refusal) => return Err(describe(refusal)),
        };
        let given = given_mtu_bytes(&route.attributes);
        let mut found: Option<RouteMtu> = None;
        for (index, has_router) in next_hops(&route) {
            let link = match self.get_link(index) {
                Ok(Some(link)) => link,
                Ok(None) => continue,
                Err(refusal) if refusal.is(libc::ENODEV) => continue,
                Err(refusal) => return Err(describe(refusal)),
            };
            let own = link_mtu_bytes(&link, endpoint.is_ipv6());
            let mtu_bytes = given.map_or(own, |given| given.min(own));
            // What is behind a point-to-point link, such as that of a modem or
            // another tunnel, is rarely its other end alone.
            let is_direct = !has_router && !link.header.flags.contains(LinkFlags::Pointopoint);
            found = Some(found.map_or(
                RouteMtu {
                    mtu_bytes,
                    is_direct,
                },
                |other| RouteMtu {
                    mtu_bytes: mtu_bytes.min(other.mtu_bytes),
                    is_direct: is_direct && other.is_direct,
                },
            ));
        }
        Ok(found)
    }
}

/// `ip route add … mtu N`.
fn given_mtu_bytes(attributes: &[RouteAttribute]) -> Option<u32> {
    attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Metrics(metrics) => metrics.iter().find_map(|metric| match metric {
            RouteMetric::Mtu(mtu_bytes) => Some(*mtu_bytes).filter(|bytes| *bytes > 0),
            _ => None,
        }),
        _ => None,
    })
}

/// The interfaces that packets leave by, and whether they go to a router there.
fn next_hops(route: &RouteMessage) -> Vec<(u32, bool)> {
    let has_router = |attributes: &[RouteAttribute]| {
        attributes.iter().any(|attribute| {
            matches!(
                attribute,
                RouteAttribute::Gateway(_) | RouteAttribute::Via(_)
            )
        })
    };
    if route.header.kind == RouteType::Local {
        return vec![(LOOPBACK_INDEX, false)];
    }
    let mut hops = Vec::new();
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Oif(index) => hops.push((*index, has_router(&route.attributes))),
            RouteAttribute::MultiPath(all) => {
                let all = all.iter();
                hops.extend(all.map(|hop| (hop.interface_index, has_router(&hop.attributes))));
            }
            _ => {}
        }
    }
    hops
}

/// IPv6 may have a smaller one than the interface, which routers advertise
/// (RFC 4861, section 4.6.4) or an administrator has set.
fn link_mtu_bytes(link: &LinkMessage, is_v6: bool) -> u32 {
    let (mut mtu_bytes, mut v6_mtu_bytes) = (0, None);
    for attribute in &link.attributes {
        match attribute {
            LinkAttribute::Mtu(bytes) => mtu_bytes = *bytes,
            LinkAttribute::AfSpecUnspec(families) => {
                let settings = families.iter().filter_map(|family| match family {
                    AfSpecUnspec::Inet6(settings) => Some(settings),
                    _ => None,
                });
                v6_mtu_bytes = settings.flatten().find_map(|setting| match setting {
                    AfSpecInet6::DevConf(all) => u32::try_from(all.mtu6).ok(),
                    _ => None,
                });
            }
            _ => {}
        }
    }
    match v6_mtu_bytes.filter(|bytes| is_v6 && *bytes > 0) {
        Some(bytes) => mtu_bytes.min(bytes),
        None => mtu_bytes,
    }
}

#[cfg(test)]
mod tests {
    use netlink_packet_core::{NLM_F_CREATE, NLM_F_REPLACE};
    use netlink_packet_route::RouteNetlinkMessage;
    use netlink_packet_route::route::RouteProtocol;

    use super::super::route::prefix_message;
    use super::*;
    use crate::testbed::Namespace;

    fn mtu(netlink: &mut Netlink, address: &str) -> Option<RouteMtu> {
        let endpoint = SocketAddr::new(address.parse().unwrap(), 1);
        netlink.route_mtu(endpoint).unwrap()
    }

    fn direct(mtu_bytes: u32) -> Option<RouteMtu> {
        Some(RouteMtu {
            mtu_bytes,
            is_direct: true,
        })
    }

    fn routed(mtu_bytes: u32) -> Option<RouteMtu> {
        direct(mtu_bytes).map(|mtu| RouteMtu {
            is_direct: false,
            ..mtu
        })
    }

    #[test]
    fn the_route_comes_before_the_interface_and_the_smaller_counts() {
        let namespace = Namespace::new().unwrap();
        namespace
            .sysctl("net/ipv6/conf/default/accept_dad", "0")
            .unwrap();
        let mut netlink = namespace.netlink().unwrap();
        netlink.create_veth("one", "two", None).unwrap();
        let index = netlink.link_index("one").unwrap().unwrap();
        netlink.set_mtu(index, 1400).unwrap();
        netlink.set_up(index).unwrap();
        for net in ["10.1.0.1/24", "fd01::1/64"] {
            netlink.add_address(index, net.parse().unwrap()).unwrap();
        }
        for (far, near, gateway) in [
            ("10.2.0.1", "10.1.0.2", "10.1.0.254"),
            ("fd02::1", "fd01::2", "fd01::254"),
        ] {
            assert_eq!(mtu(&mut netlink, near), direct(1400));
            assert_eq!(mtu(&mut netlink, far), None);
            let prefix = format!("{far}/{}", if far.contains(':') { 128 } else { 32 });
            let gateway = gateway.parse().unwrap();
            netlink
                .add_route(prefix.parse().unwrap(), Some(gateway), None)
                .unwrap();
            assert_eq!(mtu(&mut netlink, far), routed(1400));
            for (given, expected) in [(1300, 1300), (1450, 1400)] {
                let mut message = prefix_message(prefix.parse().unwrap());
                message.header.protocol = RouteProtocol::Static;
                message.header.kind = RouteType::Unicast;
                message.attributes.extend([
                    RouteAttribute::Gateway(gateway.into()),
                    RouteAttribute::Metrics(vec![RouteMetric::Mtu(given)]),
                ]);
                let flags = NLM_F_CREATE | NLM_F_REPLACE;
                let replaced = netlink.execute(RouteNetlinkMessage::NewRoute(message), flags);
                replaced
                    .map_err(|refusal| refusal.describe("replace"))
                    .unwrap();
                assert_eq!(mtu(&mut netlink, far), routed(expected), "{prefix} {given}");
            }
        }
        namespace.sysctl("net/ipv6/conf/one/mtu", "1290").unwrap();
        assert_eq!(mtu(&mut netlink, "fd01::2"), direct(1290));
        assert_eq!(mtu(&mut netlink, "10.1.0.2"), direct(1400));
        // The host's own addresses are behind the loopback interface.
        let loopback = netlink.link_by_index(LOOPBACK_INDEX).unwrap().unwrap();
        netlink.set_up(LOOPBACK_INDEX).unwrap();
        assert_eq!(loopback.name, "lo");
        for own in ["127.0.0.1", "10.1.0.1", "::1", "fd01::1"] {
            // The kernel adds IPv6 routes to them from a work queue.
            for _ in 0..3000 {
                if mtu(&mut netlink, own) == direct(loopback.mtu) {
                    break;
                }
                std::thread::sleep(std::time::Duration::from_millis(10));
            }
            assert_eq!(mtu(&mut netlink, own), direct(loopback.mtu), "{own}");
        }
    }
}
