//! A tunnel that runs: what it was configured to be, its peers, the host around
//! it, and its workers. What changes more than one of these is done here.

mod refresh;

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Instant;

use ipnet::IpNet;

use super::capture::{self, Capture, Source};
use super::device::DeviceState;
use super::drop_log::DropLog;
use super::encryption::Encryption;
use super::host::{Host, own_addresses};
use super::peers::{self, Peers};
use super::plan::{Plan, check_own_key, kernel_routes};
use super::registry::Registry;
use super::settings::Settings;
use super::workers::{Claimed, Workers};
use crate::config::Config;
use crate::control::codec::Lines;
use crate::control::credentials::Asker;
use crate::control::metrics::Readiness;
use crate::dataplane::table::Table;
use crate::error::{Error, Result};
use crate::host::link::{self, LinkConfig};
use crate::host::masquerade::Masquerade;
use crate::host::netlink::Netlink;
use crate::io::tun;
use crate::io::udp::{self, WorkerSockets};
use crate::routing::dns::Names;
use crate::routing::overlay::{Origin, Overlay, tunnel_addresses};

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
    /// `None` in plain mode.
    pub encryption: Option<Encryption>,
    /// `None` where peers are named one by one.
    pub registry: Option<Registry>,
    /// The workers carry packets, or have been told to.
    is_started: bool,
    /// Of the last overlay that was to be put in force.
    generation: u16,
    /// `None` where nothing is masqueraded.
    pub(super) masquerade: Option<Masquerade>,
    drop_log: DropLog,
    /// While somebody captures packets.
    pub capture: Option<Capture>,
    /// When this process began to run it.
    pub started: Instant,
    /// Why the last reload changed nothing, if it did not.
    pub reload_error: Option<String>,
    /// Why the last process that was to take over has not, if so.
    pub upgrade_error: Option<String>,
}

impl Tunnel {
    /// Everything but what others see of it: workers that wait for the word to
    /// start.
    ///
    /// # Errors
    /// When there are not enough descriptors, threads or memory.
    pub fn new(plan: Plan, names: Names, netlink: Netlink, mut claimed: Claimed) -> Result<Self> {
        let Plan {
            config,
            settings,
            mut overlay,
        } = plan;
        overlay.count_for(claimed.device.queues.len());
        udp::set_options(&claimed.sockets)?;
        udp::check_mark(&claimed.sockets.workers, config.fwmark)?;
        let host = Host::new(netlink, claimed.device.queues[0].as_fd(), &config.tun)?;
        let table = table(&overlay, &host, &config, &settings);
        let (probes, received) = peers::probe_channel();
        let handshake = claimed.sockets.handshake.take();
        let encryption = handshake.map(Encryption::new).transpose()?;
        let sessions = encryption.as_ref().map(Encryption::sessions);
        let workers = Workers::new(&config, claimed, table, probes, sessions)?;
        let peers = Peers::new(overlay, names, received);
        let tunnel = Self {
            config,
            settings,
            peers,
            host,
            workers,
            encryption,
            registry: None,
            is_started: false,
            generation: 0,
            masquerade: None,
            drop_log: DropLog::new(),
            capture: None,
            started: Instant::now(),
            reload_error: None,
            upgrade_error: None,
        };
        tunnel.filter_datagrams()?;
        Ok(tunnel)
    }

    /// The device's addresses.
    pub fn addresses(&self) -> &[IpNet] {
        addresses(&self.config, &self.settings, &self.host)
    }

    /// Has the sockets drop what comes through the tunnel itself.
    fn filter_datagrams(&self) -> Result<()> {
        let workers = self.workers.descriptors.iter();
        let workers = workers.map(|worker| &*worker.sockets);
        self.filter(workers, self.encryption.as_ref().map(Encryption::as_fd))
    }

    fn filter<'a>(
        &self,
        mut workers: impl Iterator<Item = &'a WorkerSockets>,
        handshake: Option<BorrowedFd<'_>>,
    ) -> Result<()> {
        let index = self.host.device.index;
        let filtered = workers.try_for_each(|sockets| sockets.drop_from(index));
        let mut handshake = handshake.into_iter();
        filtered
            .and_then(|()| handshake.try_for_each(|socket| udp::drop_from(socket, index)))
            .map_err(|error| Error::os("cannot filter what comes through the tunnel itself", error))
    }

    /// Lets everything start that carries packets. The sockets are marked now and not before:
    /// until then another process may still send from them.
    ///
    /// # Errors
    /// When there can be no more threads, or when the sockets cannot be marked; what can start
    /// has started then.
    pub fn go(&mut self) -> Result<()> {
        let marked = self.mark_sockets(self.config.fwmark);
        self.is_started = true;
        self.workers.go();
        let started = match &mut self.encryption {
            Some(encryption) => encryption.start(&self.config, &self.peers.overlay, &self.workers),
            None => Ok(()),
        };
        marked.and(started)
    }

    /// [`Self::go`], where another process has carried packets so far.
    ///
    /// # Errors
    /// As [`Self::go`].
    pub fn go_on(&mut self) -> Result<()> {
        self.go()?;
        if let Some(encryption) = &self.encryption {
            encryption.renew();
        }
        Ok(())
    }

    /// Whether packets are carried; if not, why not.
    pub fn readiness(&self) -> Readiness {
        let encryption = self.encryption.as_ref();
        if !self.is_started {
            Err("the workers do not run yet")
        } else if encryption.is_some_and(|it| !it.is_ready(&self.peers.overlay)) {
            Err("no peer has a session, and one is due")
        } else {
            Ok(())
        }
    }

    /// Has everything stop that carries packets: all sessions end.
    pub fn stop(&mut self) {
        self.workers.stop();
        if let Some(encryption) = &mut self.encryption {
            encryption.stop();
        }
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

    /// Gives a new device of an interface that others configure what it has at first. Others
    /// bring it up.
    ///
    /// # Errors
    /// Names the setting that the kernel refused.
    pub fn prepare_device(&mut self) -> Result<()> {
        let (host, link) = (&mut self.host, &self.settings.link);
        let Some(index) = host.device.index else {
            return Ok(());
        };
        host.netlink.set_txqueuelen(index, link.txqueuelen)?;
        host.netlink.set_mtu(index, link.mtu_bytes)
    }

    /// Whether somebody has deleted the device.
    pub fn is_device_deleted(&self) -> bool {
        let worker = self.workers.descriptors.first();
        worker.is_some_and(|worker| tun::index_of(worker.queue.as_fd()).is_err())
    }

    /// The prefixes that the kernel should route into the tunnel.
    pub fn kernel_routes(&self) -> BTreeSet<IpNet> {
        kernel_routes(&self.config, &self.peers.overlay)
    }

    /// Puts a plan in force, or leaves everything as it was.
    ///
    /// # Errors
    /// When the kernel refuses a setting or a route, when the path to a peer would lead
    /// through the tunnel, or when a peer has this host's own key.
    pub fn commit(&mut self, plan: Plan) -> Result<()> {
        let (index, netlink) = (self.host.device.index, &mut self.host.netlink);
        let is_new = self.settings.link != plan.settings.link;
        let device = is_new.then(|| DeviceState::read(netlink, index));
        let device = device.transpose()?;
        let config = std::mem::replace(&mut self.config, plan.config);
        let settings = std::mem::replace(&mut self.settings, plan.settings);
        let changed = match &device {
            Some(device) => self.change_device(device, &settings.link),
            None => Ok(()),
        };
        let result = changed.and_then(|()| self.commit_overlay(plan.overlay));
        if result.is_ok() {
            // Last: it ends all sessions.
            self.use_private_key(&config);
        } else {
            self.config = config;
            self.settings = settings;
            if let Some(device) = device {
                self.host.stop_routes();
                device.restore(&mut self.host.netlink);
                // Routes may have gone with an address, or with all of IPv6.
                self.start_routes();
            }
        }
        result
    }

    /// Opens sockets on another port, for [`Self::use_sockets`].
    ///
    /// # Errors
    /// When the port is taken.
    pub fn open_sockets(&self, listen: SocketAddr) -> Result<udp::Sockets> {
        let (workers, offloads) = (&self.workers.descriptors, self.workers.udp_offloads);
        // As many as there are queues, which are counted in 16 bits.
        let workers = workers.len() as u16;
        let sockets = udp::open(listen, workers, offloads, self.config.mode())?;
        udp::set_options(&sockets)?;
        udp::set_mark(sockets.all().map(AsFd::as_fd), self.config.fwmark)?;
        let handshake = sockets.handshake.as_ref().map(AsFd::as_fd);
        self.filter(sockets.workers.iter(), handshake)?;
        Ok(sockets)
    }

    /// Marks what is sent to peers, for policy rules, and looks the routes to them up for that.
    ///
    /// # Errors
    /// Without the rights to.
    pub fn set_mark(&mut self, mark: u32) -> Result<()> {
        self.mark_sockets(mark)?;
        self.host.netlink.fwmark = mark;
        self.config.fwmark = mark;
        Ok(())
    }

    fn mark_sockets(&self, mark: u32) -> Result<()> {
        let workers = self.workers.descriptors.iter();
        let workers = workers.flat_map(|worker| worker.sockets.all().map(AsFd::as_fd));
        let handshake = self.encryption.iter().map(Encryption::as_fd);
        udp::set_mark(workers.chain(handshake), mark)
    }

    /// Goes on with other sockets. Sessions stay, and packets wait meanwhile.
    ///
    /// # Errors
    /// When the workers cannot be started again: all of them have ended then.
    pub fn use_sockets(&mut self, sockets: udp::Sockets) -> Result<()> {
        if let (Some(encryption), Some(socket)) = (&mut self.encryption, sockets.handshake) {
            encryption.use_socket(socket);
        }
        self.workers.replace_sockets(sockets.workers)?;
        self.workers.go();
        Ok(())
    }

    /// Goes on with this host's private key if `old` had another.
    fn use_private_key(&mut self, old: &Config) {
        let config = &self.config;
        let is_new = config.private_key != old.private_key;
        if let Some(encryption) = self.encryption.as_mut().filter(|_| is_new) {
            encryption.set_private_key(config);
            // They are told who is who, this host included.
            self.follow_peers();
        }
    }

    /// Gives the device the settings that are in force in place of the `old` ones.
    fn change_device(&mut self, device: &DeviceState, old: &LinkConfig) -> Result<()> {
        let new = &self.settings.link;
        if old.addresses == new.addresses {
            return device.change(&mut self.host.netlink, old, new);
        }
        // Their reconciler would put the old ones back.
        self.host.stop_routes();
        device.change(&mut self.host.netlink, old, new)?;
        self.start_routes();
        Ok(())
    }

    /// Puts other peers and prefixes in force, or leaves everything as it was.
    ///
    /// # Errors
    /// As [`Self::commit`].
    pub fn commit_overlay(&mut self, mut next: Overlay) -> Result<()> {
        check_own_key(&self.config, &next)?;
        let host = &mut self.host;
        let own = own_addresses(&mut host.netlink, &self.settings.link.addresses)?;
        next.set_own_addresses(own);
        if let Some(registry) = &self.registry {
            registry.fill(&mut next);
        }
        self.put_in_force(next)
    }

    /// Has the workers forward by an overlay, and lets its peers in.
    pub(super) fn publish_table_of(&mut self, next: &mut Overlay) {
        self.generation = self.generation.wrapping_add(1);
        next.generation = self.generation;
        let table = table(next, &self.host, &self.config, &self.settings);
        if let Some(encryption) = &self.encryption {
            encryption.admit(&self.peers.overlay, next);
        }
        if let Some(capture) = &self.capture {
            capture.set_peers(next);
        }
        match self.is_started {
            true => self.workers.publish(table),
            false => self.workers.begin_with(table),
        }
    }

    /// Puts peers and prefixes in force, or leaves everything as it was.
    fn put_in_force(&mut self, mut next: Overlay) -> Result<()> {
        let old_table = Arc::clone(&self.workers.setup.table);
        // Workers first, so that what the kernel sends into the tunnel by a
        // new route has somewhere to go.
        self.publish_table_of(&mut next);
        let host = &mut self.host;
        let before = host.routes_kept.clone();
        let wanted = kernel_routes(&self.config, &next);
        let result = host.set_routes(wanted).and_then(|()| {
            // Other paths are as they were when they were checked last. Hosts of the registry
            // are suspended instead.
            let is_same = host.routes_kept == before;
            let old = &self.peers.overlay;
            let endpoint = |overlay: &Overlay, hop| overlay.peer(hop)?.endpoint_in_use();
            let is_known = |hop| endpoint(old, hop) == endpoint(&next, hop);
            let peers = next
                .peers()
                .filter(|(_, peer)| peer.origin != Origin::Registry);
            let peers = peers.filter(|(hop, _)| !is_same || !is_known(*hop));
            let mut endpoints = peers.filter_map(|(_, peer)| peer.endpoint_in_use());
            endpoints.try_for_each(|endpoint| host.check_outside(endpoint))
        });
        if let Err(error) = result {
            if let Err(error) = host.set_routes(before) {
                tracing::error!(%error, "{error}");
            }
            self.workers.publish(old_table);
            self.follow_peers();
            if let Some(capture) = &self.capture {
                capture.set_peers(&self.peers.overlay);
            }
            return Err(error);
        }
        self.peers.replace(next, Instant::now());
        self.follow_peers();
        Ok(())
    }

    /// Tells the handshake thread which peers there are.
    pub(super) fn follow_peers(&self) {
        if let Some(encryption) = &self.encryption {
            encryption.follow(&self.peers.overlay);
        }
    }

    /// Has the kernel's routes kept, and the addresses that the device is to have now.
    /// Where that fails there is nothing to go back to: it is tried again.
    pub fn start_routes(&mut self) {
        if let Err(error) = self.host.start_routes(&self.settings.link.addresses) {
            tracing::error!(%error, "{error}");
        }
    }

    /// Begins a capture, or tells the client why not. `is_leaving`: another process takes the
    /// tunnel over.
    pub fn begin_capture(
        &mut self,
        connection: Lines,
        asker: Asker,
        snaplen_bytes: u32,
        is_leaving: bool,
    ) {
        self.forget_capture_that_is_over();
        let source = Source {
            tun: &self.host.device.name,
            counters: &self.workers.counters,
            overlay: &self.peers.overlay,
            other: self.capture.as_ref(),
            is_leaving,
        };
        if let Some(begun) = capture::begin(&source, connection, asker, snaplen_bytes) {
            self.capture = Some(begun);
        }
    }

    /// A capture ends by itself when nobody wants it any more.
    pub fn forget_capture_that_is_over(&mut self) {
        self.capture.take_if(|capture| capture.is_over());
    }

    /// Ends the tunnel: routes and device go.
    pub fn take_down(&mut self) {
        // It has until it is waited for to tell what it has.
        let capture = self.capture.take();
        if let Some(capture) = &capture {
            capture.end("the tunnel ends");
        }
        self.workers.count_socket_drops();
        self.masquerade = None;
        // Their reconciler first, which would miss the device.
        self.host.stop_routes();
        self.stop();
        self.workers.close();
        self.encryption = None;
    }
}

/// The device's addresses, whoever has given them.
fn addresses<'a>(config: &Config, settings: &'a Settings, host: &'a Host) -> &'a [IpNet] {
    match config.interface {
        Some(_) => &host.addresses,
        None => &settings.link.addresses,
    }
}

/// The table that the workers forward by.
fn table(overlay: &Overlay, host: &Host, config: &Config, settings: &Settings) -> Arc<Table> {
    // Errors are reported from these.
    let addresses = addresses(config, settings, host);
    let addresses = tunnel_addresses(addresses, host.accepts_local);
    Arc::new(overlay.table(addresses, config.hop))
}

#[cfg(test)]
#[path = "tunnel_tests.rs"]
mod tests;
