//! What somebody else does to links and routes, for tests.

use std::net::IpAddr;

use ipnet::IpNet;
use netlink_packet_core::{NLM_F_APPEND, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{LinkFlags, LinkMessage};
use netlink_packet_route::route::{
    RouteAttribute, RouteMessage, RouteProtocol, RouteScope, RouteType,
};

use super::Netlink;
use super::route::prefix_message;
use crate::error::Result;

/// What somebody else does to a route, with the flags that iproute2 uses.
#[derive(Clone, Copy)]
pub enum Meddling {
    /// `ip route add`
    Add,
    /// `ip route replace`
    Replace,
    /// `ip route prepend`
    Prepend,
    /// `ip route append`
    Append,
}

impl Netlink {
    /// Takes an interface down. Routes through it and its IPv6 addresses go.
    pub(crate) fn set_down(&mut self, index: u32) -> Result<()> {
        let mut message = LinkMessage::default();
        message.header.change_mask = LinkFlags::Up;
        self.set_link(index, message, "take down")
    }

    /// Does as iproute2 does, with protocol "boot". Metric 0 means the usual.
    pub(crate) fn meddle(
        &mut self,
        meddling: Meddling,
        prefix: IpNet,
        oif: u32,
        metric: u32,
    ) -> Result<()> {
        let mut message = route_message(prefix, None, Some(oif));
        if metric != 0 {
            message.attributes.push(RouteAttribute::Priority(metric));
        }
        self.new_route(meddling, message)
    }

    /// Adds a route to the main table. Without `via` the destination is on the
    /// link itself.
    pub(crate) fn add_route(
        &mut self,
        prefix: IpNet,
        via: Option<IpAddr>,
        oif: Option<u32>,
    ) -> Result<()> {
        self.new_route(Meddling::Add, route_message(prefix, via, oif))
    }

    /// Adds a route of a `kind` that leads nowhere.
    pub(crate) fn block(&mut self, prefix: IpNet, kind: RouteType, table: u32) -> Result<()> {
        let mut message = route_message(prefix, None, None);
        message.header.protocol = RouteProtocol::Static;
        message.header.kind = kind;
        message.attributes.push(RouteAttribute::Table(table));
        let flags = NLM_F_CREATE | NLM_F_EXCL;
        self.execute(RouteNetlinkMessage::NewRoute(message), flags)
    }

    fn new_route(&mut self, meddling: Meddling, mut message: RouteMessage) -> Result<()> {
        message.header.protocol = RouteProtocol::Boot;
        message.header.kind = RouteType::Unicast;
        let flags = match meddling {
            Meddling::Add => NLM_F_CREATE | NLM_F_EXCL,
            Meddling::Replace => NLM_F_CREATE | NLM_F_REPLACE,
            Meddling::Prepend => NLM_F_CREATE,
            Meddling::Append => NLM_F_CREATE | NLM_F_APPEND,
        };
        self.execute(RouteNetlinkMessage::NewRoute(message), flags)
            .map_err(|error| error.about("cannot add a route"))
    }

    /// Deletes a route from the main table; `via` and `oif` narrow the choice.
    pub(crate) fn del_route(
        &mut self,
        prefix: IpNet,
        via: Option<IpAddr>,
        oif: Option<u32>,
    ) -> Result<()> {
        let mut message = route_message(prefix, via, oif);
        // "Nowhere" and a type and protocol of zero match whatever is there.
        message.header.scope = RouteScope::NoWhere;
        self.execute(RouteNetlinkMessage::DelRoute(message), 0)
            .map_err(|error| error.about(format!("cannot delete route {prefix}")))
    }
}

fn route_message(prefix: IpNet, via: Option<IpAddr>, oif: Option<u32>) -> RouteMessage {
    let mut message = prefix_message(prefix);
    if prefix.addr().is_ipv4() && via.is_none() {
        message.header.scope = RouteScope::Link;
    }
    let attributes = &mut message.attributes;
    attributes.extend(via.map(|via| RouteAttribute::Gateway(via.into())));
    attributes.extend(oif.map(RouteAttribute::Oif));
    message
}
