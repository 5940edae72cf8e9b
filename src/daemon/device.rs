//! The TUN device's settings changed while the tunnel runs.

use ipnet::IpNet;

use crate::error::{Error, Result};
use crate::host::link::{self, LinkConfig};
use crate::host::netlink::Netlink;

/// The device's settings as the kernel has them, whoever has set them.
pub struct DeviceState {
    index: u32,
    txqueuelen: u32,
    mtu_bytes: u32,
    /// In the kernel's order, but for those that the kernel gives it by itself.
    addresses: Vec<IpNet>,
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
        Ok(Self {
            index,
            txqueuelen: link.txqueuelen,
            mtu_bytes: link.mtu,
            addresses: own.filter(is_given).collect(),
        })
    }

    /// Changes what differs between `old` and `new`, and no more: the rest may have
    /// been set by hand.
    ///
    /// # Errors
    /// Names the setting that the kernel refused: [`Self::restore`] undoes the others.
    pub fn change(&self, netlink: &mut Netlink, old: &LinkConfig, new: &LinkConfig) -> Result<()> {
        if new.txqueuelen != old.txqueuelen {
            netlink.set_txqueuelen(self.index, new.txqueuelen)?;
        }
        let is_ours = |net: &&IpNet| old.addresses.contains(net) || new.addresses.contains(net);
        let ours: Vec<IpNet> = self.addresses.iter().filter(is_ours).copied().collect();
        let addresses = (new.addresses != old.addresses).then_some((&ours[..], &new.addresses[..]));
        let mtu_bytes = (new.mtu_bytes != old.mtu_bytes).then_some(new.mtu_bytes);
        self.set(netlink, mtu_bytes, addresses)
    }

    /// With an MTU too small for IPv6 the device forgets all of it: such addresses go
    /// before, and come after. `addresses`: the old and the new ones.
    fn set(
        &self,
        netlink: &mut Netlink,
        mtu_bytes: Option<u32>,
        addresses: Option<(&[IpNet], &[IpNet])>,
    ) -> Result<()> {
        let is_smaller = mtu_bytes.is_some_and(|mtu_bytes| mtu_bytes < self.mtu_bytes);
        for is_mtu_now in [!is_smaller, is_smaller] {
            if is_mtu_now {
                mtu_bytes.map_or(Ok(()), |bytes| netlink.set_mtu(self.index, bytes))?;
            } else if let Some((old, new)) = addresses {
                link::set_addresses(netlink, self.index, old, new)?;
            }
        }
        Ok(())
    }

    /// Gives the device these settings again.
    pub fn restore(&self, netlink: &mut Netlink) {
        if let Err(error) = self.try_restore(netlink) {
            tracing::error!("the device is not what it was: {error}");
        }
    }

    fn try_restore(&self, netlink: &mut Netlink) -> Result<()> {
        let present = Self::read(netlink, Some(self.index))?;
        if present.txqueuelen != self.txqueuelen {
            netlink.set_txqueuelen(self.index, self.txqueuelen)?;
        }
        let mtu_bytes = (present.mtu_bytes != self.mtu_bytes).then_some(self.mtu_bytes);
        let addresses = (&present.addresses[..], &self.addresses[..]);
        present.set(netlink, mtu_bytes, Some(addresses))?;
        // The first IPv4 address is the one that the host sends from.
        let v4 = |nets: &[IpNet]| -> Vec<IpNet> {
            let all = nets.iter().copied();
            all.filter(|net| net.addr().is_ipv4()).collect()
        };
        let (before, now) = (
            v4(&self.addresses),
            v4(&Self::read(netlink, Some(self.index))?.addresses),
        );
        if now != before {
            link::set_addresses(netlink, self.index, &now, &[])?;
            link::set_addresses(netlink, self.index, &[], &before)?;
        }
        Ok(())
    }
}
