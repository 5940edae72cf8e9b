//! How a tunnel begins to run: set up, or taken over from another process.

use std::collections::{BTreeSet, HashMap};
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, never, select, tick};
use ipnet::IpNet;

use super::{Paths, RETIRED_MAX, Running, ask_routes};
use crate::config::Config;
use crate::control::server::Call;
use crate::daemon::host::{Device, HostNews, suspend_inside};
use crate::daemon::ports::Ports;
use crate::daemon::start::{self, Claimed, Prepared, Suspended};
use crate::daemon::takeover::{self, Inherited};
use crate::daemon::trouble::Troubles;
use crate::daemon::workers::Workers;
use crate::daemon::{announce, handover, inherit};
use crate::error::{Error, Result};
use crate::host::link;
use crate::host::routes::{self, RouteKeeper};
use crate::io::tun;
use crate::io::udp;
use crate::log::rate_limited::Journal;
use crate::routing::overlay::tunnel_addresses;

/// How often it is said how far a long start is.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(1);

impl Running {
    /// Sets a tunnel up, or takes it over.
    ///
    /// # Errors
    /// When it cannot be had; then nothing is left behind.
    pub fn start(config: Config) -> Result<Self> {
        let mut prepared = start::prepare(config)?;
        if !prepared.config.takeover {
            return Self::start_fresh(prepared);
        }
        match takeover::ask(&prepared.config.control)? {
            Some(inherited) => Self::take_over(prepared, inherited),
            None => {
                prepared.suspend_nobody();
                Self::start_fresh(prepared)
            }
        }
    }

    fn start_fresh(mut prepared: Prepared) -> Result<Self> {
        let (config, settled) = (&prepared.config, &prepared.settled);
        let claimed = start::claim(config, settled, &mut prepared.netlink)?;
        prepared.set_aside();
        let mut running = Self::ready(prepared, claimed)?;
        match running.open() {
            Ok(()) => Ok(running),
            Err(error) => {
                running.take_down();
                Err(error)
            }
        }
    }

    /// What is likely to fail fails while the predecessor still carries the
    /// tunnel, and changes nothing that it relies on.
    fn take_over(mut prepared: Prepared, inherited: Inherited) -> Result<Self> {
        let Inherited {
            manifest,
            device,
            sockets,
            udp,
            listener,
            mut predecessor,
        } = inherited;
        inherit::check(&prepared.config, &prepared.settled, &manifest)?;
        inherit::keep_wanted(&mut prepared.config.wanted, &manifest);
        let mtu_bytes = prepared.settled.link.mtu_bytes;
        inherit::inherit(&mut prepared.overlay, &manifest, mtu_bytes)?;
        prepared.resolve_now();
        let own = tun::index_of(device.queues[0].as_fd())?;
        prepared.device = own;
        prepared.set_aside();
        let suspended = std::mem::take(&mut prepared.suspended);
        let (overlay, netlink) = (&mut prepared.overlay, &mut prepared.netlink);
        tell_of_inside(&suspend_inside(overlay, netlink, own));
        let claimed = Claimed {
            sockets,
            udp,
            device,
        };
        let mut running = Self::ready(prepared, claimed)?;
        running.check_routes(&suspended)?;
        let (old, new) = (&manifest.addresses, &running.settled.link.addresses);
        let (netlink, index) = (&mut running.netlink, running.device.index);
        let added = match index {
            Some(index) => link::addresses_to_add(netlink, index, old, new)?,
            None => Vec::new(),
        };
        predecessor.will_add(&added)?;
        if let Some(index) = index {
            link::add_addresses(netlink, index, &added)?;
        }
        let stopped = predecessor.stop().inspect_err(|_| {
            if let Some(index) = index {
                link::remove_addresses(netlink, index, &added);
            }
        });
        let is_reload_due = stopped?;
        running.go_on(&manifest.addresses, listener);
        tracing::info!(
            "took over from process {}, fastvpn {}",
            manifest.pid,
            manifest.version
        );
        if is_reload_due {
            running.reload_by_signal();
        }
        Ok(running)
    }

    /// Everything but what others see of it: workers that wait for the word to
    /// start.
    fn ready(prepared: Prepared, claimed: Claimed) -> Result<Self> {
        let Prepared {
            config,
            settled,
            mut overlay,
            mut netlink,
            names,
            ..
        } = prepared;
        let Claimed {
            sockets,
            udp,
            device,
        } = claimed;
        let worker_count = device.queues.len();
        overlay.count_for(worker_count);
        ask_routes(&mut overlay, &mut netlink);
        udp::ignore_path_mtus(&sockets)?;
        let queue = device.queues[0].as_fd();
        let found = Device::find(queue, &config.tun)?;
        for sockets in &sockets {
            udp::drop_from(sockets.receive.as_fd(), found.index).map_err(|error| {
                Error::os("cannot filter what comes through the tunnel itself", error)
            })?;
        }
        let accept_local = found
            .index
            .is_some_and(|index| link::accept_local(&mut netlink, index));
        let addresses = tunnel_addresses(&settled.link.addresses, accept_local);
        let table = Arc::new(overlay.table(addresses, config.hop));
        let descriptors = handover::keep(&device.queues, &sockets)?;
        let (ports, probes) = Ports::new(&descriptors);
        let setup = start::setup(&config, device.offloads, udp, &table, probes);
        let socket_drops = descriptors.iter().map(|worker| worker.receive());
        // A predecessor has told of those so far.
        let socket_drops = socket_drops.map(|receive| udp::drops(receive).unwrap_or(0));
        let socket_drops = socket_drops.collect();
        let counters = std::iter::repeat_with(Arc::default).take(worker_count);
        let counters: Vec<_> = counters.collect();
        let workers = Workers::start(device.queues, sockets, counters.clone(), &setup)?;
        Ok(Self {
            config,
            settled,
            overlay,
            table,
            retired: Vec::with_capacity(RETIRED_MAX),
            workers: Some(workers),
            counters,
            setup,
            tun_offloads: device.offloads,
            udp_offloads: udp,
            is_steered: device.steered,
            worker_count,
            descriptors: Arc::new(descriptors),
            names,
            ports,
            heard: HashMap::new(),
            paths: Paths::default(),
            host: HostNews::new(),
            troubles: Troubles::new(),
            quiet_log: Journal::new("peers that went quiet or were heard again"),
            device: found,
            socket_drops,
            netlink,
            accept_local,
            routes: None,
            routes_kept: BTreeSet::new(),
            server: None,
            handover: None,
            is_reload_due: false,
            started: Instant::now(),
            reload_error: None,
        })
    }

    pub(super) fn let_workers_go(&mut self) {
        if let Some(workers) = &mut self.workers {
            workers.go();
        }
    }

    fn bring_up(&mut self, old_addresses: &[IpNet]) -> Result<()> {
        let link = &self.settled.link;
        match self.device.index {
            Some(index) => link::bring_up(&mut self.netlink, index, link, old_addresses),
            None => Ok(()),
        }
    }

    /// What the host sees of a tunnel.
    fn open(&mut self) -> Result<()> {
        // Frames that come the moment the link is up find their worker.
        self.let_workers_go();
        self.bring_up(&[])?;
        let addresses = self.settled.link.addresses.clone();
        let routes = RouteKeeper::start(self.device.index, addresses, self.host.sender())?;
        self.routes = Some(routes);
        self.serve(None)?;
        self.set_first_routes()?;
        self.check_outside(&self.overlay.clone())?;
        announce::announce(self);
        Ok(())
    }

    /// Sets the routes. Many take their time: how far it is goes to the log, and
    /// to whoever asks by the control socket.
    fn set_first_routes(&mut self) -> Result<()> {
        let wanted = self.kernel_routes(&self.overlay);
        let (tun, count) = (&self.config.tun, wanted.len());
        let routes = self.routes()?;
        let set = routes.begin_set(wanted.clone())?;
        let server = self.server.as_ref();
        let calls = server.map_or_else(never, |server| server.calls().clone());
        report_until(&set, &calls, &tick(PROGRESS_INTERVAL), || {
            format!(
                "{tun} is starting: {} of {count} routes are set",
                routes.added()
            )
        })?;
        self.routes_kept = wanted;
        Ok(())
    }

    /// Whether the kernel's routes will be what is wanted, and no peer in the
    /// tunnel but those that are `suspended` in a predecessor's, as far as can be
    /// told while its routes are in force.
    ///
    /// # Errors
    /// Names the route that is in the way, or the peer.
    fn check_routes(&mut self, suspended: &Suspended) -> Result<()> {
        let wanted = self.kernel_routes(&self.overlay);
        let own = self.device.index;
        if own.is_none() {
            return Ok(());
        }
        let addresses = &self.settled.link.addresses;
        let endpoints = self
            .overlay
            .peers()
            .filter_map(|(_, peer)| peer.endpoint_learned());
        for endpoint in endpoints {
            link::check_will_be_outside(
                &mut self.netlink,
                own,
                endpoint,
                addresses,
                &wanted,
                suspended.contains(&endpoint),
            )?;
        }
        routes::check_free(&mut self.netlink, own, &wanted)
    }

    /// [`Self::open`] for a successor: there is nobody to go back to, and the
    /// tunnel carries, so each step is taken whatever comes of the others.
    /// Operators before routes, which they can mend.
    fn go_on(&mut self, old_addresses: &[IpNet], listener: Option<OwnedFd>) {
        self.let_workers_go();
        let brought_up = self.bring_up(old_addresses);
        let served = self.serve(listener);
        let routed = self.take_routes_on();
        // Who cannot be reached from outside is suspended, and no more.
        self.look_at_host();
        for result in [brought_up, served, routed] {
            if let Err(error) = result {
                tracing::error!("taken over, but not in full: {error}");
            }
        }
        announce::announce(self);
    }

    /// Goes on keeping the kernel's routes where another keeper has stopped.
    pub(super) fn take_routes_on(&mut self) -> Result<()> {
        self.routes_kept = self.kernel_routes(&self.overlay);
        let addresses = self.settled.link.addresses.clone();
        let routes = RouteKeeper::start(self.device.index, addresses, self.host.sender())?;
        let result = routes.go_on(self.routes_kept.clone());
        self.routes = Some(routes);
        result
    }
}

/// Waits for an answer. From the first tick on, logs the `progress` at each, and
/// refuses `calls` with it.
fn report_until(
    done: &Receiver<Result<()>>,
    calls: &Receiver<Call>,
    ticks: &Receiver<Instant>,
    progress: impl Fn() -> String,
) -> Result<()> {
    let mut refused = never();
    loop {
        select! {
            recv(done) -> result => {
                return result.unwrap_or_else(|_| Err(Error::new("the routes were not set")));
            }
            recv(ticks) -> _ => {
                tracing::info!("{}", progress());
                refused = calls.clone();
            }
            recv(refused) -> call => match call {
                Ok(Call::Request(_, reply)) => {
                    reply.send(Err(Error::new(progress()).hint("try again in a moment")));
                }
                Ok(Call::Takeover { .. }) => tracing::warn!(
                    "another process wants to take over while this one starts: refused"
                ),
                Err(_) => refused = never(),
            },
        }
    }
}

/// Tells of peers to whom nothing will be sent at first.
fn tell_of_inside(inside: &[SocketAddr]) {
    let until = "through the tunnel itself: nothing is sent there until there is another";
    match inside {
        [] => {}
        [peer] => tracing::warn!("the way to peer {peer} leads {until}"),
        [peer, more @ ..] => {
            let more = more.len();
            tracing::warn!("the way to peer {peer} (and to {more} more) leads {until}");
        }
    }
}

#[cfg(test)]
mod tests {
    use crossbeam_channel::bounded;

    use super::*;
    use crate::control::client;
    use crate::control::server::Server;

    /// Nobody who asks has to wait for the end of it.
    #[test]
    fn a_long_start_is_reported() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("test.sock");
        let server = Server::start(&path).unwrap();
        let (ticks, ticked) = bounded(1);
        let (done, set) = bounded(1);
        let asking = std::thread::spawn(move || {
            ticks.send(Instant::now()).unwrap();
            let answers = [(); 2].map(|()| client::peers(&path, Duration::from_secs(30)));
            done.send(Ok(())).unwrap();
            answers.map(|answer| answer.unwrap_err().to_string())
        });
        report_until(&set, server.calls(), &ticked, || "starting: 3 of 9".into()).unwrap();
        for answer in asking.join().unwrap() {
            assert!(answer.contains("starting: 3 of 9; try again"), "{answer}");
        }
        let (refused, set) = bounded(1);
        refused.send(Err(Error::new("no room"))).unwrap();
        let result = report_until(&set, &never(), &never(), String::new);
        assert_eq!(result.unwrap_err().to_string(), "no room");
    }
}
