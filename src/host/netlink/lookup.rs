//! How this host would reach an address, as `ip route get` tells.

use std::net::SocketAddr;

use ipnet::IpNet;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::route::{
    RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric,
};

use super::Netlink;
use super::route::{Route, RouteKind, next_hops, prefix_message};
use crate::error::Result;

/// Index of the loopback interface (`LOOPBACK_IFINDEX` in include/net/flow.h),
/// by which the host reaches its own addresses.
const LOOPBACK_INDEX: u32 = 1;

/// What the kernel says of routes of the types unreachable, blackhole and prohibit
/// (`fib_props` in net/ipv4/fib_semantics.c; `ip6_rt_type_to_error()` in
/// net/ipv6/route.c).
const DROPPED: [i32; 3] = [libc::EHOSTUNREACH, libc::EINVAL, libc::EACCES];

/// How the host would reach an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way<R = Route> {
    /// By this route.
    Route(R),
    /// There is a route, which drops all packets.
    Dropped,
    /// There is no route.
    None,
}

impl<R> Way<R> {
    fn route(self) -> Option<R> {
        match self {
            Self::Route(route) => Some(route),
            Self::Dropped | Self::None => None,
        }
    }
}

/// How long packets toward an address may be, as far as this host's own settings
/// say: the route and the interface. What the kernel has learnt by ICMP is
/// left aside, since anybody can send that.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RouteMtu {
    /// Largest packet in bytes.
    pub(crate) mtu_bytes: u32,
    /// The address is on the link itself: no router comes in between.
    pub(crate) is_direct: bool,
}

impl Netlink {
    /// The interface through which the host would send to `endpoint` now, as
    /// `ip route get` tells; `None` if it would not, be it that there is no
    /// route or that the route drops all packets. A link-local address with a zone
    /// leads nowhere but through that.
    ///
    /// # Errors
    /// When the kernel refuses for another reason.
    pub fn interface_to(&mut self, endpoint: SocketAddr) -> Result<Option<u32>> {
        let route = self.look_up(endpoint, RouteFlags::empty())?;
        Ok(route
            .route()
            .and_then(|route| Some(next_hops(&route).first()?.0)))
    }

    /// How the host would reach `endpoint` now, as `ip route get fibmatch` tells.
    ///
    /// # Errors
    /// As [`Self::interface_to`].
    pub(crate) fn route_to(&mut self, endpoint: SocketAddr) -> Result<Way> {
        Ok(match self.look_up(endpoint, fib_match(endpoint))? {
            Way::Route(route) => Route::read(&route).map_or(Way::None, Way::Route),
            Way::Dropped => Way::Dropped,
            Way::None => Way::None,
        })
    }

    /// The MTU of the route to `endpoint`: that which an administrator gave it,
    /// or else that of its interface. Of several next hops the smallest counts.
    /// `None` if there is no route.
    ///
    /// # Errors
    /// When the kernel refuses for another reason.
    pub(crate) fn route_mtu(&mut self, endpoint: SocketAddr) -> Result<Option<RouteMtu>> {
        let Some(route) = self.look_up(endpoint, fib_match(endpoint))?.route() else {
            return Ok(None);
        };
        let hops = match route.header.kind {
            RouteKind::Local => vec![(LOOPBACK_INDEX, false)],
            _ => next_hops(&route),
        };
        let given = given_mtu_bytes(&route.attributes);
        let mut found: Option<RouteMtu> = None;
        for (oif, has_router) in hops {
            let Some(link) = self.link_by_index(oif)? else {
                continue;
            };
            let own = link.mtu_bytes_of(endpoint.ip());
            let mtu_bytes = given.map_or(own, |given| given.min(own));
            // A point-to-point link, such as that of a modem or another tunnel, rarely
            // leads to its other end alone.
            let is_direct = !has_router && !link.is_point_to_point;
            found = Some(RouteMtu {
                mtu_bytes: found.map_or(mtu_bytes, |other| other.mtu_bytes.min(mtu_bytes)),
                is_direct: is_direct && found.is_none_or(|other| other.is_direct),
            });
        }
        Ok(found)
    }

    /// Asks the kernel how it would reach `endpoint`.
    fn look_up(&mut self, endpoint: SocketAddr, flags: RouteFlags) -> Result<Way<RouteMessage>> {
        let mut message = prefix_message(IpNet::from(endpoint.ip()));
        message.header.table = RouteHeader::RT_TABLE_UNSPEC;
        message.header.flags = flags;
        if self.fwmark != 0 {
            message.attributes.push(RouteAttribute::Mark(self.fwmark));
        }
        // The interface that the address is good for, if it is not for all.
        if let SocketAddr::V6(endpoint) = endpoint
            && endpoint.scope_id() != 0
        {
            let zone = RouteAttribute::Oif(endpoint.scope_id());
            message.attributes.push(zone);
        }
        match self.get(RouteNetlinkMessage::GetRoute(message)) {
            Ok(Some(RouteNetlinkMessage::NewRoute(route))) => Ok(Way::Route(route)),
            Ok(_) => Ok(Way::None),
            Err(error) if error.errno() == Some(libc::ENETUNREACH) => Ok(Way::None),
            Err(error) if DROPPED.map(Some).contains(&error.errno()) => Ok(Way::Dropped),
            Err(error) => {
                let address = endpoint.ip();
                Err(error.about(format!("cannot look up the route to {address}")))
            }
        }
    }
}

/// Asks for the route as it stands in its table, without what the kernel has
/// learnt since. Of IPv6 the answer has the table without being asked for.
fn fib_match(endpoint: SocketAddr) -> RouteFlags {
    match endpoint {
        SocketAddr::V4(_) => RouteFlags::FibMatch | RouteFlags::LookupTable,
        SocketAddr::V6(_) => RouteFlags::FibMatch,
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

#[cfg(test)]
mod tests {
    use netlink_packet_core::{NLM_F_CREATE, NLM_F_REPLACE};
    use netlink_packet_route::route::{RouteProtocol, RouteType};

    use super::*;
    use crate::host::netlink::route::MAIN_TABLE;
    use crate::testbed::{self, Namespace};

    #[test]
    fn a_route_that_drops_packets_leads_nowhere() {
        let namespace = Namespace::new().unwrap();
        let mut netlink = namespace.netlink().unwrap();
        testbed::join(&namespace, &namespace, "one", "two").unwrap();
        let one = netlink.link_index("one").unwrap().unwrap();
        netlink.set_up(one).unwrap();
        let endpoint = |address: &str| SocketAddr::new(address.parse().unwrap(), 1);
        for (prefix, address) in [("10.1.0.0/16", "10.1.2.3"), ("fd01::/64", "fd01::7")] {
            let endpoint = endpoint(address);
            assert_eq!(netlink.interface_to(endpoint).unwrap(), None);
            assert_eq!(netlink.route_to(endpoint).unwrap(), Way::None);
            netlink
                .add_route(prefix.parse().unwrap(), None, Some(one))
                .unwrap();
            assert_eq!(netlink.interface_to(endpoint).unwrap(), Some(one));
            let route = netlink.route_to(endpoint).unwrap().route().unwrap();
            assert_eq!(route.destination.to_string(), prefix);
            assert_eq!((route.oif, route.table), (Some(one), 254));
        }
        for kind in [
            RouteType::BlackHole,
            RouteType::Unreachable,
            RouteType::Prohibit,
            RouteType::Throw,
        ] {
            for (prefix, address) in [("10.1.2.3/32", "10.1.2.3"), ("fd01::7/128", "fd01::7")] {
                netlink
                    .block(prefix.parse().unwrap(), kind, MAIN_TABLE)
                    .unwrap();
                let endpoint = endpoint(address);
                let oif = netlink.interface_to(endpoint).unwrap();
                assert_eq!(oif, None, "{kind:?} {prefix}");
                let way = netlink.route_to(endpoint).unwrap();
                // The type throw goes on to other tables, and finds nothing there.
                if kind != RouteType::Throw {
                    assert_eq!(way, Way::Dropped, "{kind:?} {prefix}");
                }
                netlink
                    .del_route(prefix.parse().unwrap(), None, None)
                    .unwrap();
            }
        }
    }

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
        testbed::join(&namespace, &namespace, "one", "two").unwrap();
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
                netlink
                    .execute(RouteNetlinkMessage::NewRoute(message), flags)
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
