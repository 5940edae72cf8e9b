//! A reload: what is different in the configuration file is applied as a whole,
//! or not at all.

use std::collections::BTreeSet;

use ipnet::IpNet;

use super::settings::Settings;
use super::tunnel::{Tunnel, endpoints};
use super::{announce, reach};
use crate::config::Config;
use crate::control::protocol::{Changed, Reloaded};
use crate::error::{Error, Result};
use crate::host::link::{self, LinkConfig};
use crate::host::netlink::Netlink;
use crate::host::routes::AtEnd;
use crate::routing::overlay::{Changes, Overlay};

/// Reads the configuration file again and applies what is different. `by`: who
/// wants it, for the log.
///
/// # Errors
/// When the file is bad or cannot be applied: nothing has changed then.
pub fn reload(tunnel: &mut Tunnel, by: &str) -> Result<Reloaded> {
    let result = Plan::new(tunnel).and_then(|plan| {
        let differences = plan.differences(tunnel);
        let report = plan.carry_out(tunnel)?;
        Ok((report, differences))
    });
    tunnel.reload_error = result.as_ref().err().map(ToString::to_string);
    match &result {
        Ok((report, differences)) => {
            tracing::info!("reloaded: {}, by {by}", in_words(report, differences));
        }
        Err(error) => tracing::error!("not reloaded by {by}, nothing has changed: {error}"),
    }
    result.map(|(report, _)| report)
}

/// What a tunnel is to become. Nothing of it is in force yet.
struct Plan {
    config: Config,
    link: LinkConfig,
    overlay: Overlay,
    report: Reloaded,
}

impl Plan {
    fn new(tunnel: &mut Tunnel) -> Result<Self> {
        if tunnel.config.config_file.is_none() {
            return Err(Error::new("there is no configuration file to read again")
                .hint("start fastvpn with --config FILE, or use `fastvpn peer` and `route`"));
        }
        let new = tunnel.config.reread()?;
        let mut overlay = tunnel.peers.overlay.clone();
        let changes = overlay.configure(&new.peers)?;
        // What the file leaves open follows from its own peers, also from those
        // that are new.
        let resolved = endpoints(&new, &overlay);
        let prefixes = overlay.prefixes().map(|(prefix, ..)| prefix);
        let (old, in_force) = (&tunnel.config, &tunnel.settings);
        let netlink = &mut tunnel.host.netlink;
        let settings = in_force.again((old, &new), &resolved, prefixes, netlink)?;
        let link = settings.link;
        check_host(
            netlink,
            tunnel.host.device.index,
            in_force,
            &mut overlay,
            &new,
            &link,
        )?;
        let needs_restart = old.needs_restart(&new);
        let report = Reloaded {
            changed: to_changed(changes),
            settings_changed: settings_changed((old, &in_force.link), (&new, &link)),
            needs_restart: needs_restart.into_iter().map(String::from).collect(),
        };
        Ok(Self {
            config: old.with_changes_of(new),
            link,
            overlay,
            report,
        })
    }

    /// What will be different of peers and prefixes, in words.
    fn differences(&self, tunnel: &Tunnel) -> String {
        let (old, new) = (&tunnel.peers.overlay, &self.overlay);
        let prefixes: BTreeSet<IpNet> = old
            .prefixes()
            .chain(new.prefixes())
            .map(|(prefix, ..)| prefix)
            .collect();
        old.differences(new, prefixes.into_iter())
    }

    /// Puts it in force, or leaves everything as it was.
    fn carry_out(self, tunnel: &mut Tunnel) -> Result<Reloaded> {
        let mut device = Device::open(tunnel.host.device.index)?;
        let has_new_addresses = tunnel.settings.link.addresses != self.link.addresses;
        let old_config = std::mem::replace(&mut tunnel.config, self.config);
        let old_link = std::mem::replace(&mut tunnel.settings.link, self.link);
        if has_new_addresses {
            tunnel.host.stop_routes(AtEnd::Keep);
        }
        let mut result = device.change(&old_link, &tunnel.settings.link);
        if result.is_ok() && has_new_addresses {
            result = tunnel.resume_routes();
        }
        if let Err(error) = result.and_then(|()| tunnel.commit(self.overlay)) {
            tunnel.config = old_config;
            tunnel.settings.link = old_link;
            if has_new_addresses || device.has_changed() {
                tunnel.host.stop_routes(AtEnd::Keep);
                device.change_back();
                // Routes may have gone with an address, or with all of IPv6.
                if let Err(error) = tunnel.resume_routes() {
                    tracing::error!("{error}");
                }
            }
            return Err(error);
        }
        tunnel.peers.resolve_again();
        if tunnel.settings.link.mtu_bytes != old_link.mtu_bytes {
            announce::warn_of_fragments(tunnel);
        }
        Ok(self.report)
    }
}

/// Makes sure that the host, once the device has the addresses of `link` in place
/// of those `in_force`, is none of its peers.
fn check_host(
    netlink: &mut Netlink,
    device: Option<u32>,
    in_force: &Settings,
    overlay: &mut Overlay,
    new: &Config,
    link: &LinkConfig,
) -> Result<()> {
    let is_replaced =
        |index: u32, net| Some(index) == device && in_force.link.addresses.contains(net);
    let present: Vec<_> = netlink.addresses()?;
    let staying = present
        .iter()
        .filter(|(index, net)| !is_replaced(*index, net));
    let present = present.iter().map(|(_, net)| net.addr()).collect();
    let own: BTreeSet<_> = link.addresses.iter().map(IpNet::addr).collect();
    let staying = staying.map(|(_, net)| net.addr());
    overlay.set_own_addresses(staying.chain(own.iter().copied()).collect());
    reach::check_addresses(
        &link.addresses,
        &present,
        overlay.peers().map(|(_, peer)| peer),
    )?;
    for endpoint in new.peers.iter().filter_map(|spec| spec.name.literal()) {
        reach::check_configured(in_force.listen, overlay, endpoint)?;
    }
    if link.addresses != in_force.link.addresses {
        link::check_networks(netlink, device, &link.addresses)?;
    }
    reach::check_prefixes(&own, overlay.prefixes().map(|(prefix, ..)| prefix))
}

/// Keys, other than of peers, that will say something else from now on.
fn settings_changed(old: (&Config, &LinkConfig), new: (&Config, &LinkConfig)) -> Vec<String> {
    let ((old, old_link), (new, new_link)) = (old, new);
    [
        ("txqueuelen", old_link.txqueuelen != new_link.txqueuelen),
        ("mtu", old_link.mtu_bytes != new_link.mtu_bytes),
        ("address", old_link.addresses != new_link.addresses),
        ("hop", old.hop != new.hop),
        ("no-routes", old.no_routes != new.no_routes),
        ("route", old.routes != new.routes),
    ]
    .into_iter()
    .filter(|(_, differs)| *differs)
    .map(|(key, _)| key.to_string())
    .collect()
}

/// The TUN device while its settings are being changed.
struct Device {
    netlink: Netlink,
    /// 0, which no interface has, while the device is in another namespace.
    index: u32,
    /// What undoes each step that was taken, in the order of the steps.
    undo: Vec<Undo>,
}

/// A setting as the kernel had it, whoever had set it.
enum Undo {
    Txqueuelen(u32),
    MtuBytes(u32),
    Addresses { old: Vec<IpNet>, new: Vec<IpNet> },
}

impl Device {
    fn open(index: Option<u32>) -> Result<Self> {
        Ok(Self {
            netlink: Netlink::open()?,
            index: index.unwrap_or(0),
            undo: Vec::new(),
        })
    }

    /// Changes what differs in `new`, and no more: the rest may have been set by
    /// hand.
    fn change(&mut self, old: &LinkConfig, new: &LinkConfig) -> Result<()> {
        if self.index == 0 {
            let settings =
                |link: &LinkConfig| (link.txqueuelen, link.mtu_bytes, link.addresses.clone());
            if settings(old) == settings(new) {
                return Ok(());
            }
            let what = "cannot change the TUN device, which is in another network namespace";
            return Err(Error::new(what)
                .hint("leave address, mtu and txqueuelen as they are, or move it back first"));
        }
        let Some(present) = self.netlink.link_by_index(self.index)? else {
            return Err(Error::new("the TUN device has disappeared"));
        };
        if new.txqueuelen != old.txqueuelen {
            self.netlink.set_txqueuelen(self.index, new.txqueuelen)?;
            self.undo.push(Undo::Txqueuelen(present.txqueuelen));
        }
        // With an MTU too small for IPv6 the device forgets all of it: such
        // addresses go before, and come after.
        let is_smaller = new.mtu_bytes < present.mtu;
        if is_smaller {
            self.change_addresses(old, new)?;
        }
        if new.mtu_bytes != old.mtu_bytes {
            self.netlink.set_mtu(self.index, new.mtu_bytes)?;
            self.undo.push(Undo::MtuBytes(present.mtu));
        }
        if !is_smaller {
            self.change_addresses(old, new)?;
        }
        Ok(())
    }

    fn change_addresses(&mut self, old: &LinkConfig, new: &LinkConfig) -> Result<()> {
        if new.addresses == old.addresses {
            return Ok(());
        }
        let present = self.addresses()?;
        let is_ours = |net: &&IpNet| old.addresses.contains(net) || new.addresses.contains(net);
        let ours: Vec<IpNet> = present.iter().filter(is_ours).copied().collect();
        let new = new.addresses.clone();
        link::set_addresses(&mut self.netlink, self.index, &ours, &new)?;
        self.undo.push(Undo::Addresses { old: present, new });
        Ok(())
    }

    /// The device's addresses in the kernel's order, but for those that the
    /// kernel gives it by itself.
    fn addresses(&mut self) -> Result<Vec<IpNet>> {
        let is_given = |net: &IpNet| match net {
            IpNet::V4(_) => true,
            IpNet::V6(net) => !net.addr().is_unicast_link_local(),
        };
        let all = self.netlink.addresses()?.into_iter();
        let own = all.filter_map(|(owner, net)| (owner == self.index).then_some(net));
        Ok(own.filter(is_given).collect())
    }

    fn change_addresses_back(&mut self, old: &[IpNet], new: &[IpNet]) -> Result<()> {
        let (netlink, index) = (&mut self.netlink, self.index);
        link::set_addresses(netlink, index, new, old)?;
        // The first IPv4 address is the one that the host sends from.
        let v4 = |nets: Vec<IpNet>| -> Vec<IpNet> {
            let all = nets.into_iter();
            all.filter(|net| net.addr().is_ipv4() && old.contains(net))
                .collect()
        };
        let (before, now) = (v4(old.to_vec()), v4(self.addresses()?));
        if now != before {
            let (netlink, index) = (&mut self.netlink, self.index);
            link::set_addresses(netlink, index, &now, &[])?;
            link::set_addresses(netlink, index, &[], &before)?;
        }
        Ok(())
    }

    fn has_changed(&self) -> bool {
        !self.undo.is_empty()
    }

    /// Undoes the steps that were taken.
    fn change_back(mut self) {
        for step in std::mem::take(&mut self.undo).into_iter().rev() {
            let undone = match step {
                Undo::Txqueuelen(old) => self.netlink.set_txqueuelen(self.index, old),
                Undo::MtuBytes(old) => self.netlink.set_mtu(self.index, old),
                Undo::Addresses { old, new } => self.change_addresses_back(&old, &new),
            };
            if let Err(error) = undone {
                tracing::error!("the device is not what it was: {error}");
            }
        }
    }
}

fn to_changed(changes: Changes) -> Changed {
    Changed {
        prefixes_added: changes.prefixes_added,
        prefixes_removed: changes.prefixes_removed,
        peers_added: changes.peers_added,
        peers_removed: changes.peers_removed,
    }
}

/// What a reload came to, for the log.
fn in_words(report: &Reloaded, differences: &str) -> String {
    let mut words = Vec::new();
    if !differences.is_empty() {
        words.push(differences.to_string());
    }
    if !report.settings_changed.is_empty() {
        words.push(format!("changed: {}", report.settings_changed.join(", ")));
    }
    if words.is_empty() {
        words.push("nothing has changed".into());
    }
    if !report.needs_restart.is_empty() {
        let keys = report.needs_restart.join(", ");
        words.push(format!("at the next start: {keys}"));
    }
    words.join("; ")
}
