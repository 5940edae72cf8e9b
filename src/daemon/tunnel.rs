//! A tunnel that runs: what it was configured to be, its peers, the host around
//! it, and its workers. What changes more than one of these is done here.

use std::collections::BTreeSet;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Instant;

use ipnet::IpNet;

use super::device::DeviceState;
use super::drop_log::DropLog;
use super::host::{DeviceChange, Host};
use super::peers::{self, Peers, learn_route_mtus};
use super::plan::{Plan, endpoints, kernel_routes};
use super::settings::Settings;
use super::workers::{Claimed, WorkerFds, Workers};
use crate::config::Config;
use crate::dataplane::inbound::ReceivedProbe;
use crate::error::{Error, Result};
use crate::host::link;
use crate::host::netlink::Netlink;
use crate::io::udp;
use crate::packet::icmp::TunnelAddresses;
use crate::routing::dns::{Lookup, Names};
use crate::routing::overlay::{Overlay, tunnel_addresses};

/// See the module's documentation.
pub struct Tunnel {
    /// The configuration in force.
    pub config: Config,
    /// What follows from it.
    pub settings: Settings,
    /// The peers.
    pub peers: Peers,
    /// The host.
    pub host: Host,
    /// The workers.
    pub workers: Workers,
    drop_log: DropLog,
    /// When this process began to run it.
    pub started: Instant,
    /// Why the last reload changed nothing, if it did not.
    pub reload_error: Option<String>,
}

impl Tunnel {
    /// Everything but what others see of it: workers that wait for the word to
    /// start.
    ///
    /// # Errors
    /// When there are not enough descriptors, threads or memory.
    pub fn new(plan: Plan, names: Names, mut netlink: Netlink, claimed: Claimed) -> Result<Self> {
        let Plan {
            config,
            settings,
            mut overlay,
        } = plan;
        overlay.count_for(claimed.device.queues.len());
        learn_route_mtus(&mut overlay, &mut netlink);
        udp::ignore_path_mtus(&claimed.sockets)?;
        let host = Host::new(netlink, claimed.device.queues[0].as_fd(), &config.tun)?;
        for sockets in &claimed.sockets {
            drop_from(sockets.receive.as_fd(), host.device.index)?;
        }
        let addresses = tunnel_addresses(&settings.link.addresses, host.accepts_local());
        let table = Arc::new(overlay.table(addresses, config.hop));
        let (probes, received) = peers::probe_channel();
        let workers = Workers::new(&config, claimed, table, probes)?;
        let peers = Peers::new(overlay, names, received);
        Ok(Self {
            config,
            settings,
            peers,
            host,
            workers,
            drop_log: DropLog::new(),
            started: Instant::now(),
            reload_error: None,
        })
    }

    /// Gives the device its settings and brings it up. `old_addresses`: those that
    /// it has from us already.
    ///
    /// # Errors
    /// Names the address or setting that the kernel refused.
    pub fn bring_up(&mut self, old_addresses: &[IpNet]) -> Result<()> {
        let (host, link) = (&mut self.host, &self.settings.link);
        match host.device.index {
            Some(index) => link::bring_up(&mut host.netlink, index, link, old_addresses),
            None => Ok(()),
        }
    }

    /// The prefixes that the kernel should route into the tunnel.
    pub fn kernel_routes(&self) -> BTreeSet<IpNet> {
        kernel_routes(&self.config, &self.peers.overlay)
    }

    /// The plan that is in force, with another `overlay`.
    pub fn plan_with(&self, overlay: Overlay) -> Plan {
        Plan {
            config: self.config.clone(),
            settings: self.settings.clone(),
            overlay,
        }
    }

    /// Puts a plan in force, or leaves everything as it was.
    ///
    /// # Errors
    /// When the kernel refuses a setting or a route, or when the way to a peer would
    /// lead through the tunnel.
    pub fn commit(&mut self, plan: Plan) -> Result<()> {
        let (old, new) = (&self.settings.link, &plan.settings.link);
        let is_same = (old.txqueuelen, old.mtu_bytes, &old.addresses)
            == (new.txqueuelen, new.mtu_bytes, &new.addresses);
        let device = match is_same {
            true => None,
            false => {
                let (index, netlink) = (self.host.device.index, &mut self.host.netlink);
                Some(DeviceState::read(netlink, index)?)
            }
        };
        let config = std::mem::replace(&mut self.config, plan.config);
        let settings = std::mem::replace(&mut self.settings, plan.settings);
        let changed = device.as_ref().map_or(Ok(()), |device| {
            let (old, new) = (&settings.link, &self.settings.link);
            let has_new_addresses = old.addresses != new.addresses;
            if has_new_addresses {
                // Their reconciler would put the old ones back.
                self.host.stop_routes();
            }
            device.change(&mut self.host.netlink, old, new)?;
            match has_new_addresses {
                true => self.start_routes(),
                false => Ok(()),
            }
        });
        let result = changed.and_then(|()| self.commit_overlay(plan.overlay));
        if result.is_err() {
            (self.config, self.settings) = (config, settings);
            if let Some(device) = device {
                self.host.stop_routes();
                device.restore(&mut self.host.netlink);
                // Routes may have gone with an address, or with all of IPv6.
                if let Err(error) = self.start_routes() {
                    tracing::error!("{error}");
                }
            }
        }
        result
    }

    fn commit_overlay(&mut self, mut next: Overlay) -> Result<()> {
        let given = &self.settings.link.addresses;
        next.set_own_addresses(self.host.own_addresses(given)?);
        learn_route_mtus(&mut next, &mut self.host.netlink);
        let old_table = Arc::clone(self.workers.table());
        // Workers first, so that what the kernel sends into the tunnel by a
        // new route has somewhere to go.
        let table = next.table(self.addresses(), self.config.hop);
        self.workers.publish(Arc::new(table));
        let before = self.host.routes_kept.clone();
        let wanted = kernel_routes(&self.config, &next);
        let result = self.host.set_routes(wanted).and_then(|()| {
            let mut peers = next.peers().filter_map(|(_, peer)| peer.endpoint_in_use());
            peers.try_for_each(|endpoint| self.host.check_outside(endpoint))
        });
        if let Err(error) = result {
            if let Err(error) = self.host.set_routes(before) {
                tracing::error!("{error}");
            }
            self.workers.publish(old_table);
            return Err(error);
        }
        self.peers.replace(next, Instant::now());
        Ok(())
    }

    /// Gives the workers a table of the peers as they are now.
    pub fn publish(&mut self) {
        let addresses = self.addresses();
        let table = self.peers.overlay.table(addresses, self.config.hop);
        self.workers.publish(Arc::new(table));
    }

    /// The addresses that errors are reported from.
    fn addresses(&self) -> TunnelAddresses {
        tunnel_addresses(&self.settings.link.addresses, self.host.accepts_local())
    }

    /// Takes in what a name server has said.
    pub fn take_name(&mut self, answer: Option<Lookup>) {
        let listen = self.settings.listen;
        if answer.is_some_and(|answer| self.peers.take_answer(answer, listen, &mut self.host)) {
            self.publish();
        }
    }

    /// Reads the probes that have come, of which `first` is one.
    pub fn read_probes(&mut self, first: Option<ReceivedProbe>) {
        let workers = self.workers.descriptors();
        if self.peers.read_probes(first, workers, Instant::now()) {
            self.publish();
        }
    }

    /// What is to be done every second.
    pub fn poll(&mut self) {
        let listen = self.settings.listen;
        if self.peers.poll(listen, &mut self.host, &self.workers) {
            self.publish();
        }
        let now = Instant::now();
        self.host.log.flush(now);
        self.workers.count_socket_drops();
        self.drop_log
            .poll(self.workers.counters(), &self.peers.overlay, now);
        if self.host.lacks_routes() {
            match self.start_routes() {
                Ok(()) => tracing::info!("the kernel's routes are kept again"),
                Err(error) => {
                    tracing::debug!("{error}");
                    // There may be nobody who would tell of changes.
                    self.host.schedule_refresh();
                }
            }
        }
    }

    /// Refreshes what is known of the device, this host's addresses, and the ways to
    /// all peers.
    pub fn refresh_host(&mut self) {
        self.host.begin_refresh();
        self.refresh_device();
        let given = &self.settings.link.addresses;
        let mut has_changed = match self.host.own_addresses(given) {
            Ok(own) => self.peers.overlay.set_own_addresses(own),
            Err(error) => {
                tracing::debug!("{error}");
                self.host.schedule_refresh();
                false
            }
        };
        has_changed |= self.peers.check_all_ways(&mut self.host, &self.workers);
        if has_changed {
            self.publish();
        }
        if let Err(error) = self.follow_route_mtus() {
            tracing::debug!("{error}");
        }
    }

    /// Notes what others have made of the device.
    pub fn refresh_device(&mut self) {
        let descriptors = Arc::clone(self.workers.descriptors());
        let Some(worker) = descriptors.first() else {
            return;
        };
        match self
            .host
            .find_device(worker.queue(), self.settings.link.mtu_bytes)
        {
            Ok(DeviceChange::None) => {}
            Ok(DeviceChange::Moved) => self.follow_device(&descriptors),
            // One that is deleted ends the workers, and these the process.
            Err(error) => tracing::debug!("{error}"),
        }
    }

    /// The device has another index, or none.
    fn follow_device(&mut self, descriptors: &[WorkerFds]) {
        // Something else may have the old index by now, such as the underlay.
        for worker in descriptors {
            if let Err(error) = drop_from(worker.receive(), self.host.device.index) {
                tracing::error!("{error}");
            }
        }
        self.publish();
        self.host.stop_routes();
        if let Err(error) = self.start_routes() {
            tracing::error!("{error}");
        }
    }

    /// Has the kernel's routes kept, and the addresses that the device is to have now.
    ///
    /// # Errors
    /// When there are no more descriptors or threads.
    pub fn start_routes(&mut self) -> Result<()> {
        self.host.start_routes(&self.settings.link.addresses)
    }

    /// Has the device's MTU, unless it was given, or set by somebody else, follow
    /// the routes to the peers.
    fn follow_route_mtus(&mut self) -> Result<()> {
        let (config, old) = (&self.config, &self.settings);
        let Some(index) = self
            .host
            .device
            .index
            .filter(|_| config.mtu_bytes.is_none())
        else {
            return Ok(());
        };
        let endpoints = endpoints(config, &self.peers.overlay);
        let prefixes = self.peers.overlay.prefixes().map(|(prefix, ..)| prefix);
        let netlink = &mut self.host.netlink;
        let new = old.again((config, config), &endpoints, prefixes, netlink)?;
        let (old_bytes, new_bytes) = (old.link.mtu_bytes, new.link.mtu_bytes);
        let present = netlink.link_by_index(index)?;
        let is_ours = present.is_some_and(|present| present.mtu == old_bytes);
        if new_bytes != old_bytes && is_ours {
            netlink.set_mtu(index, new_bytes)?;
            self.settings.link.mtu_bytes = new_bytes;
            let tun = &self.host.device.name;
            tracing::info!(
                "MTU of {tun}: {new_bytes} bytes, no longer {old_bytes}: what the routes to the peers take"
            );
        }
        Ok(())
    }

    /// Ends this process's part in a tunnel that another process carries on, but for
    /// the workers.
    pub fn leave(&mut self) {
        self.workers.count_socket_drops();
        self.host.stop_routes();
    }

    /// Takes the tunnel back after it was left and the workers were stopped.
    ///
    /// # Errors
    /// When it cannot carry packets any more.
    pub fn resume(&mut self) -> Result<()> {
        self.workers.start_again()?;
        if let Err(error) = self.start_routes() {
            tracing::error!("{error}");
        }
        Ok(())
    }

    /// Ends the tunnel: routes and device go.
    pub fn take_down(&mut self) {
        self.workers.count_socket_drops();
        self.host.log.end();
        self.peers.end_log();
        // Their reconciler first, which would miss the device.
        self.host.stop_routes();
        self.workers.close();
    }
}

fn drop_from(socket: std::os::fd::BorrowedFd<'_>, index: Option<u32>) -> Result<()> {
    udp::drop_from(socket, index)
        .map_err(|error| Error::os("cannot filter what comes through the tunnel itself", error))
}
