//! How a tunnel follows what changes around it: what is noticed each second, and what others
//! report, on the control thread.

use std::os::fd::AsFd;
use std::time::Instant;

use super::{Tunnel, table};
use crate::daemon::host::own_addresses;
use crate::dataplane::inbound::ReceivedProbe;
use crate::error::Result;
use crate::host::netlink::Link;
use crate::routing::dns::Lookup;

impl Tunnel {
    /// What is to be done every second.
    pub fn poll(&mut self) {
        let is_host_changed = self.host.take_event();
        if is_host_changed {
            self.refresh_host();
        }
        self.forget_capture_that_is_over();
        let listen = self.settings.listen.ip();
        let workers = &self.workers.descriptors;
        let keepalive = self.config.keepalive_seconds;
        self.peers.poll(listen, &mut self.host, workers, keepalive);
        self.publish_changes();
        if is_host_changed && let Err(error) = self.follow_route_mtus() {
            tracing::debug!("{error}");
        }
        self.workers.count_socket_drops();
        let counters = &self.workers.counters;
        self.drop_log
            .poll(counters, &self.peers.overlay, Instant::now());
        if self.host.lacks_routes() {
            match self.host.start_routes(&self.settings.link.addresses) {
                Ok(()) => tracing::info!("the kernel's routes are kept again"),
                Err(error) => tracing::debug!("{error}"),
            }
        }
    }

    /// Takes in what a name server has said.
    pub fn take_name(&mut self, answer: Lookup) {
        let listen = self.settings.listen;
        self.peers.take_answer(answer, listen, &mut self.host);
        self.publish_changes();
    }

    /// Takes in a probe from another host.
    pub fn take_probe(&mut self, probe: ReceivedProbe) {
        self.peers.take_probe(probe, &self.workers.descriptors);
        self.publish_changes();
    }

    /// Checks where the paths to all peers lead.
    pub fn check_routes(&mut self) {
        self.peers.check_routes(&mut self.host);
        self.publish_changes();
    }

    /// Gives the workers a table of the peers as they are now, if these have changed.
    fn publish_changes(&mut self) {
        if std::mem::take(&mut self.peers.has_changed) {
            let overlay = &self.peers.overlay;
            let table = table(overlay, &self.host, &self.config, &self.settings);
            self.workers.publish(table);
            self.follow_peers();
            // What a path refused for its length may pass on another.
            self.workers.reset_limits();
        }
    }

    /// Refreshes what is known of the device, this host's addresses, and where the paths
    /// to all peers lead.
    fn refresh_host(&mut self) {
        self.refresh_device();
        if let Err(error) = self.refresh_addresses() {
            tracing::debug!("{error}");
            self.host.schedule_refresh();
        }
        self.peers.check_routes(&mut self.host);
    }

    fn refresh_addresses(&mut self) -> Result<()> {
        let own = own_addresses(&mut self.host.netlink, &self.settings.link.addresses)?;
        self.peers.has_changed |= self.peers.overlay.set_own_addresses(own);
        if self.config.interface.is_some() {
            self.peers.has_changed |= self.host.find_addresses()?;
        }
        Ok(())
    }

    /// Notes what others have made of the device.
    pub fn refresh_device(&mut self) {
        let Some(worker) = self.workers.descriptors.first() else {
            return;
        };
        match self.host.find_device(worker.queue.as_fd()) {
            Ok(false) => {}
            Ok(true) => {
                // Something else may have the old index by now, such as the underlay.
                if let Err(error) = self.filter_datagrams() {
                    tracing::error!(%error, "{error}");
                }
                self.peers.has_changed = true;
                self.start_routes();
            }
            // One that is deleted ends the workers, and these the process.
            Err(error) => tracing::debug!("{error}"),
        }
    }

    /// Has the device's MTU, unless it was given, or set by somebody else, follow
    /// the routes to the peers.
    fn follow_route_mtus(&mut self) -> Result<()> {
        let (config, old) = (&self.config, &self.settings);
        let old_bytes = old.link.mtu_bytes;
        let link = self.host.link();
        let link = link.filter(|link| config.mtu_bytes.is_none() && link.mtu == old_bytes);
        let Some(Link { index, name, .. }) = link else {
            return Ok(());
        };
        let (overlay, netlink) = (&self.peers.overlay, &mut self.host.netlink);
        let new = old.again((config, config), overlay, netlink)?;
        let mtu_bytes = new.link.mtu_bytes;
        if mtu_bytes != old_bytes {
            netlink.set_mtu(index, mtu_bytes)?;
            self.settings = new;
            tracing::info!(
                interface = name,
                mtu_bytes,
                old_bytes,
                "MTU of {name}: {mtu_bytes} bytes, no longer {old_bytes}: what the routes to the \
                 peers take"
            );
        }
        Ok(())
    }
}
