//! Routes as an administrator adds and deletes them.

use std::net::IpAddr;

use fastvpn::error::{Error, Result};
use fastvpn::host::netlink::Netlink;
use ipnet::IpNet;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::route::{
    RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

/// Adds routes to the main table and deletes them.
pub trait StaticRoutes {
    /// Adds a route. Without `via` the destination is on the link itself.
    ///
    /// # Errors
    /// `EEXIST` when there is a route to the same prefix already; when there is
    /// no such interface, or it is down; when prefix and router are of
    /// different families.
    fn add_route(&mut self, prefix: IpNet, via: Option<IpAddr>, oif: Option<u32>) -> Result<()>;

    /// Deletes a route; `via` and `oif` narrow the choice.
    ///
    /// # Errors
    /// `ESRCH` when there is no such route.
    fn del_route(&mut self, prefix: IpNet, via: Option<IpAddr>, oif: Option<u32>) -> Result<()>;
}

impl StaticRoutes for Netlink {
    fn add_route(&mut self, prefix: IpNet, via: Option<IpAddr>, oif: Option<u32>) -> Result<()> {
        let mut message = route_message(prefix, via, oif)?;
        message.header.protocol = RouteProtocol::Static;
        message.header.kind = RouteType::Unicast;
        if prefix.addr().is_ipv4() && via.is_none() {
            message.header.scope = RouteScope::Link;
        }
        let what = format!("cannot add route {prefix}");
        let message = RouteNetlinkMessage::NewRoute(message);
        self.request(message, NLM_F_CREATE | NLM_F_EXCL, &what)
    }

    fn del_route(&mut self, prefix: IpNet, via: Option<IpAddr>, oif: Option<u32>) -> Result<()> {
        let mut message = route_message(prefix, via, oif)?;
        // "Nowhere" and a type and protocol of zero match whatever is there.
        message.header.scope = RouteScope::NoWhere;
        let what = format!("cannot delete route {prefix}");
        self.request(RouteNetlinkMessage::DelRoute(message), 0, &what)
    }
}

fn route_message(prefix: IpNet, via: Option<IpAddr>, oif: Option<u32>) -> Result<RouteMessage> {
    let prefix = prefix.trunc();
    let mut message = RouteMessage::default();
    message.header.address_family = match prefix {
        IpNet::V4(_) => AddressFamily::Inet,
        IpNet::V6(_) => AddressFamily::Inet6,
    };
    message.header.destination_prefix_length = prefix.prefix_len();
    message.header.table = RouteHeader::RT_TABLE_MAIN;
    let attributes = &mut message.attributes;
    attributes.push(RouteAttribute::Destination(prefix.network().into()));
    if let Some(via) = via {
        if via.is_ipv4() != prefix.addr().is_ipv4() {
            let what = format!("route {prefix} via {via} mixes IPv4 and IPv6");
            return Err(Error::new(what));
        }
        attributes.push(RouteAttribute::Gateway(via.into()));
    }
    attributes.extend(oif.map(RouteAttribute::Oif));
    Ok(message)
}
