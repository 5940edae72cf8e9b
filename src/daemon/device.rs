//! The TUN device's settings changed while the tunnel runs.

use ipnet::IpNet;

use crate::error::{Error, Result};
use crate::host::link::{self, LinkConfig};
use crate::host::netlink::Netlink;

/// The device's settings as the kernel has them, whoever has set them.
pub struct DeviceState {
    index: u32,
    /// Addresses in the kernel's order, but for those that it gives by itself.
    link: LinkConfig,
}

impl DeviceState {
    /// Reads the settings of the device with this index.
    ///
    /// # Errors
    /// When there is none, or the kernel refuses.
    pub fn read(netlink: &mut Netlink, index: Option<u32>) -> Result<Self> {
        let Some(index) = index else {
            let what = "cannot change the TUN device, which is in another network namespace";
            return Err(Error::new(what)
                .hint("leave address, mtu and txqueuelen as they are, or move it back first"));
        };
        let Some(link) = netlink.link_by_index(index)? else {
            return Err(Error::new("the TUN device has disappeared"));
        };
        let is_given = |net: &IpNet| match net {
            IpNet::V4(_) => true,
            IpNet::V6(net) => !net.addr().is_unicast_link_local(),
        };
        let all = netlink.addresses()?.into_iter();
        let own = all.filter_map(|(owner, net)| (owner == index).then_some(net));
        let link = LinkConfig {
            addresses: own.filter(is_given).collect(),
            mtu_bytes: link.mtu,
            txqueuelen: link.txqueuelen,
        };
        Ok(Self { index, link })
    }

    /// Changes what differs between `old` and `new`, and no more: the rest may have
    /// been set by hand.
    ///
    /// # Errors
    /// Names the setting that the kernel refused: [`Self::restore`] undoes the others.
    pub fn change(&self, netlink: &mut Netlink, old: &LinkConfig, new: &LinkConfig) -> Result<()> {
        let mut wanted = self.link.clone();
        if new.txqueuelen != old.txqueuelen {
            wanted.txqueuelen = new.txqueuelen;
        }
        if new.mtu_bytes != old.mtu_bytes {
            wanted.mtu_bytes = new.mtu_bytes;
        }
        if new.addresses != old.addresses {
            let is_ours = |net: &IpNet| old.addresses.contains(net) || new.addresses.contains(net);
            wanted.addresses.retain(|net| !is_ours(net));
            wanted.addresses.extend(&new.addresses);
        }
        self.set(netlink, &wanted)
    }

    /// With an MTU too small for IPv6 the device forgets all of it: such addresses go
    /// before, and come after.
    fn set(&self, netlink: &mut Netlink, wanted: &LinkConfig) -> Result<()> {
        let (index, present) = (self.index, &self.link);
        if wanted.txqueuelen != present.txqueuelen {
            netlink.set_txqueuelen(index, wanted.txqueuelen)?;
        }
        if wanted.mtu_bytes > present.mtu_bytes {
            netlink.set_mtu(index, wanted.mtu_bytes)?;
        }
        if wanted.addresses != present.addresses {
            link::set_addresses(netlink, index, &present.addresses, &wanted.addresses)?;
        }
        if wanted.mtu_bytes < present.mtu_bytes {
            netlink.set_mtu(index, wanted.mtu_bytes)?;
        }
        Ok(())
    }

    /// Gives the device these settings again.
    pub fn restore(&self, netlink: &mut Netlink) {
        if let Err(error) = self.try_restore(netlink) {
            tracing::error!(%error, "the device is not what it was: {error}");
        }
    }

    fn try_restore(&self, netlink: &mut Netlink) -> Result<()> {
        Self::read(netlink, Some(self.index))?.set(netlink, &self.link)?;
        // The first IPv4 address is the one that the host sends from.
        let v4 = |state: &Self| -> Vec<IpNet> {
            let all = state.link.addresses.iter().copied();
            all.filter(|net| net.addr().is_ipv4()).collect()
        };
        let (before, now) = (v4(self), v4(&Self::read(netlink, Some(self.index))?));
        if now != before {
            link::set_addresses(netlink, self.index, &now, &[])?;
            link::set_addresses(netlink, self.index, &[], &before)?;
        }
        Ok(())
    }
}
