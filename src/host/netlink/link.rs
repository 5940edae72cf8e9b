//! Links: the host's network interfaces.

use std::net::IpAddr;

use netlink_packet_core::DefaultNla;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{
    AfSpecInet6, AfSpecUnspec, LinkAttribute, LinkFlags, LinkMessage,
};

use super::Netlink;
use crate::error::{Error, Result};

/// linux/if_link.h and linux/ip.h.
const IFLA_AF_SPEC: u16 = 26;
const IFLA_INET_CONF: u16 = 1;
const IPV4_DEVCONF_ACCEPT_LOCAL: u16 = 23;

/// A netlink attribute whose payload is a multiple of four bytes.
fn attribute(kind: u16, payload: &[u8]) -> Vec<u8> {
    let bytes = (payload.len() + 4) as u16;
    [&bytes.to_ne_bytes(), &kind.to_ne_bytes(), payload].concat()
}

/// An interface as the kernel lists it.
#[derive(Debug, Clone)]
pub struct Link {
    /// The number by which the kernel knows it, unique in its namespace.
    pub index: u32,
    /// Its name, at most 15 bytes.
    pub name: String,
    /// Largest packet in bytes, without the link-layer header.
    pub mtu: u32,
    /// Length of its transmit queue in packets.
    pub txqueuelen: u32,
    /// Whether it is administratively up (`IFF_UP`).
    pub up: bool,
    /// Whether it has one other end, and no neighbours (`IFF_POINTOPOINT`).
    pub is_point_to_point: bool,
    /// Largest IPv6 packet in bytes, if that was set by itself: by a router
    /// (RFC 4861, section 4.6.4) or an administrator.
    ipv6_mtu: Option<u32>,
    /// What it has counted since it was created.
    pub stats: LinkStats,
}

impl Link {
    /// Longest packet in bytes to this address.
    pub(crate) fn mtu_bytes_of(&self, address: IpAddr) -> u32 {
        match self.ipv6_mtu.filter(|_| address.is_ipv6()) {
            Some(ipv6_mtu) => self.mtu.min(ipv6_mtu),
            None => self.mtu,
        }
    }
}

/// What an interface has counted since it was created
/// (`struct rtnl_link_stats64`, linux/if_link.h).
pub use netlink_packet_route::link::Stats64 as LinkStats;

impl Netlink {
    /// The index of the interface called `name`, `None` if there is none.
    ///
    /// # Errors
    /// When the kernel refuses, as a name that cannot be an interface's.
    pub fn link_index(&mut self, name: &str) -> Result<Option<u32>> {
        let link = self.get_link(0, vec![LinkAttribute::IfName(name.to_string())]);
        let link = link.map_err(|error| error.about(format!("cannot look up interface {name}")))?;
        Ok(link.map(|link| link.index))
    }

    /// The interface with this index, `None` if there is none.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn link_by_index(&mut self, index: u32) -> Result<Option<Link>> {
        self.get_link(index, Vec::new())
            .map_err(|error| error.about(format!("cannot look up interface {index}")))
    }

    fn get_link(&mut self, index: u32, attributes: Vec<LinkAttribute>) -> Result<Option<Link>> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        message.attributes = attributes;
        match self.get(RouteNetlinkMessage::GetLink(message)) {
            Ok(Some(RouteNetlinkMessage::NewLink(link))) => Ok(Some(read_link(&link))),
            Ok(_) => Ok(None),
            Err(error) if error.errno() == Some(libc::ENODEV) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Brings an interface up.
    ///
    /// # Errors
    /// When there is no such interface or the kernel refuses.
    pub fn set_up(&mut self, index: u32) -> Result<()> {
        let mut message = LinkMessage::default();
        message.header.flags = LinkFlags::Up;
        message.header.change_mask = LinkFlags::Up;
        self.set_link(index, message, "bring up")
    }

    /// Sets the largest packet in bytes.
    ///
    /// # Errors
    /// When the interface does not support such an MTU or does not exist.
    pub fn set_mtu(&mut self, index: u32, mtu: u32) -> Result<()> {
        let what = format!("set MTU {mtu} on");
        self.set_link(index, with(LinkAttribute::Mtu(mtu)), &what)
    }

    /// Sets the length of the transmit queue, in packets.
    ///
    /// # Errors
    /// When there is no such interface or the kernel refuses.
    pub fn set_txqueuelen(&mut self, index: u32, packets: u32) -> Result<()> {
        let what = format!("set transmit queue length {packets} on");
        self.set_link(index, with(LinkAttribute::TxQueueLen(packets)), &what)
    }

    /// Lets an interface deliver IPv4 packets whose source is an address of this
    /// host (the sysctl `accept_local`), which the kernel else takes for a forgery.
    /// Returns whether it does.
    pub(crate) fn accept_local(&mut self, index: u32) -> bool {
        // IFLA_AF_SPEC { AF_INET { IFLA_INET_CONF { ACCEPT_LOCAL: 1 } } }, as
        // `inet_set_link_af` in net/ipv4/devinet.c reads it. /proc/sys, the
        // other way, is read-only in many containers.
        let setting = attribute(IPV4_DEVCONF_ACCEPT_LOCAL, &1u32.to_ne_bytes());
        let settings = attribute(IFLA_INET_CONF, &setting);
        let family = attribute(libc::AF_INET as u16, &settings);
        let families = LinkAttribute::Other(DefaultNla::new(IFLA_AF_SPEC, family));
        self.set_link(index, with(families), "accept local sources on")
            .inspect_err(|error| tracing::debug!("{error}"))
            .is_ok()
    }

    pub(super) fn set_link(
        &mut self,
        index: u32,
        mut message: LinkMessage,
        what: &str,
    ) -> Result<()> {
        message.header.index = index;
        self.execute(RouteNetlinkMessage::SetLink(message), 0)
            .map_err(|error| self.about_interface(error, what, index))
    }

    pub(super) fn about_interface(&mut self, error: Error, what: &str, index: u32) -> Error {
        let name = self.name_for_error(index);
        error.about(format!("cannot {what} interface {name}"))
    }

    /// The interface's name, or its index when it has no name any more.
    pub(crate) fn name_for_error(&mut self, index: u32) -> String {
        match self.link_by_index(index) {
            Ok(Some(link)) => link.name,
            _ => format!("number {index}"),
        }
    }
}

fn with(attribute: LinkAttribute) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.attributes.push(attribute);
    message
}

pub(super) fn read_link(message: &LinkMessage) -> Link {
    let mut link = Link {
        index: message.header.index,
        name: String::new(),
        mtu: 0,
        txqueuelen: 0,
        up: message.header.flags.contains(LinkFlags::Up),
        is_point_to_point: message.header.flags.contains(LinkFlags::Pointopoint),
        ipv6_mtu: None,
        stats: LinkStats::default(),
    };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name.clone_from(name),
            LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
            LinkAttribute::TxQueueLen(packets) => link.txqueuelen = *packets,
            LinkAttribute::Stats64(stats) => link.stats = *stats,
            LinkAttribute::AfSpecUnspec(families) => link.ipv6_mtu = read_ipv6_mtu(families),
            _ => {}
        }
    }
    link
}

fn read_ipv6_mtu(families: &[AfSpecUnspec]) -> Option<u32> {
    let settings = families.iter().filter_map(|family| match family {
        AfSpecUnspec::Inet6(settings) => Some(settings),
        _ => None,
    });
    let mtu = settings.flatten().find_map(|setting| match setting {
        AfSpecInet6::DevConf(all) => u32::try_from(all.mtu6).ok(),
        _ => None,
    });
    mtu.filter(|mtu| *mtu > 0)
}
