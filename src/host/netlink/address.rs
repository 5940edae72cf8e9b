//! Addresses of interfaces.

use ipnet::IpNet;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::address::{AddressAttribute, AddressHeaderFlags, AddressMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::Netlink;
use crate::error::Result;

impl Netlink {
    /// Gives an interface an address; the kernel adds the route to its prefix.
    ///
    /// An IPv6 address is usable at once: duplicate address detection, which
    /// would hold it back for a second, is left out (`IFA_F_NODAD`).
    ///
    /// # Errors
    /// `EEXIST` when the interface has the address already; `ENODEV` when there
    /// is no such interface; `EACCES` when IPv6 is switched off on it.
    pub fn add_address(&mut self, index: u32, address: IpNet) -> Result<()> {
        let mut message = address_message(index, address);
        if address.addr().is_ipv6() {
            message.header.flags = AddressHeaderFlags::Nodad;
        }
        self.execute(
            RouteNetlinkMessage::NewAddress(message),
            NLM_F_CREATE | NLM_F_EXCL,
        )
        .map_err(|error| self.about_interface(error, &format!("add address {address} to"), index))
    }

    /// Takes an address from an interface, and with it the kernel's route to
    /// its prefix.
    ///
    /// # Errors
    /// `EADDRNOTAVAIL` when the interface does not have it.
    pub fn del_address(&mut self, index: u32, address: IpNet) -> Result<()> {
        let message = address_message(index, address);
        self.execute(RouteNetlinkMessage::DelAddress(message), 0)
            .map_err(|error| {
                self.about_interface(error, &format!("take address {address} from"), index)
            })
    }

    /// All addresses of the namespace, each with its interface's index and the
    /// length of its prefix.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn addresses(&mut self) -> Result<Vec<(u32, IpNet)>> {
        self.dump(
            RouteNetlinkMessage::GetAddress(AddressMessage::default()),
            &|object| match object {
                RouteNetlinkMessage::NewAddress(address) => read_address(&address),
                _ => None,
            },
        )
        .map_err(|error| error.about("cannot list the addresses"))
    }
}

fn address_message(index: u32, address: IpNet) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.index = index;
    message.header.prefix_len = address.prefix_len();
    message.header.family = family(&address);
    message.attributes = vec![
        AddressAttribute::Local(address.addr()),
        AddressAttribute::Address(address.addr()),
    ];
    message
}

pub(super) fn family(network: &IpNet) -> AddressFamily {
    match network {
        IpNet::V4(_) => AddressFamily::Inet,
        IpNet::V6(_) => AddressFamily::Inet6,
    }
}

pub(super) fn read_address(message: &AddressMessage) -> Option<(u32, IpNet)> {
    // On a point-to-point interface IFA_ADDRESS is the other end and IFA_LOCAL
    // is ours; elsewhere IPv6 has IFA_ADDRESS alone (linux/if_addr.h).
    let (mut local, mut any) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(address) => local = Some(*address),
            AddressAttribute::Address(address) => any = Some(*address),
            _ => {}
        }
    }
    let network = IpNet::new(local.or(any)?, message.header.prefix_len).ok()?;
    Some((message.header.index, network))
}
