//! A tunnel that runs: what the control thread holds, what it waits for, and
//! what it looks after every second.

use std::collections::{BTreeSet, HashMap};
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, never, select, tick};
use ipnet::IpNet;
use signal_hook::consts::{SIGHUP, SIGTERM};

use super::host::{HostNews, own_addresses};
use super::start::{self, Claimed, Known};
use super::takeover::{self, Inherited};
use super::{announce, operator, reach, reload};
use crate::config::{Config, Settled};
use crate::control::engine::Engine;
use crate::control::names::{self, Answer, Names};
use crate::control::overlay::{Overlay, tunnel_addresses};
use crate::control::routes::{AtEnd, RouteKeeper};
use crate::control::server::{Call, Server};
use crate::control::workers::{Setup, Workers};
use crate::device::link;
use crate::error::{Error, Result};
use crate::netlink::Netlink;
use crate::packet::coalesce;
use crate::packet::icmp::TunnelAddresses;
use crate::packet::train::{Limits, NextHop};
use crate::transport::{path, socket};
use crate::worker::Command;
use crate::worker::counters::PeerCounters;
use crate::worker::table::Table;

/// How often trains of full size are tried again on paths that refused them: as
/// often as the kernel forgets a path MTU (`net.ipv4.route.mtu_expires`).
const LIMITS_RESET_INTERVAL: Duration = Duration::from_secs(600);

/// How often peers are looked after: who answers, what the paths take.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// Most paths that the kernel is asked about at a time. The others have their
/// turn the next time.
const PATHS_ASKED_MAX: usize = 256;

/// Tables that workers may still hold on to, until they have taken newer ones.
const RETIRED_MAX: usize = 64;

/// How the run ended, if not by an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// By a signal or an operator's word.
    Stopped,
    /// A successor carries on: device, sockets and routes are its now.
    HandedOver,
}

/// What was last heard of a peer.
#[derive(Clone, Debug)]
pub(super) struct Heard {
    /// The peer's counters: another peer in its place has others.
    traffic: Arc<[PeerCounters]>,
    received: u64,
    sent: u64,
    /// When something came from it.
    pub(super) last: Option<Instant>,
    /// Since when we send to it without hearing anything.
    silent_since: Option<Instant>,
    /// We have sent to it since the kernel was asked about its path.
    path_used: bool,
}

impl Heard {
    fn new(traffic: &Arc<[PeerCounters]>) -> Self {
        Self {
            traffic: Arc::clone(traffic),
            received: 0,
            sent: 0,
            last: None,
            silent_since: None,
            path_used: false,
        }
    }
}

/// A successor goes on without something.
fn not_in_full(error: &Error) {
    tracing::error!("taken over, but not in full: {error}");
}

/// See the module's documentation.
pub struct Running {
    pub(super) config: Config,
    pub(super) settled: Settled,
    pub(super) overlay: Overlay,
    pub(super) table: Arc<Table>,
    /// Old tables: the last to let go of one has to free it, and that should
    /// not be a worker.
    retired: Vec<Arc<Table>>,
    /// `None` once they have been stopped.
    workers: Option<Workers>,
    pub(super) tun_offloads: coalesce::Offloads,
    pub(super) udp_offloads: socket::Offloads,
    pub(super) is_steered: bool,
    pub(super) worker_count: usize,
    descriptors: Vec<operator::Kept>,
    names: Names,
    pub(super) heard: HashMap<NextHop, Heard>,
    path_cursor: usize,
    pub(super) host: HostNews,
    pub(super) netlink: Netlink,
    accept_local: bool,
    /// `None` once the tunnel has ended, or if it could not be started again.
    routes: Option<RouteKeeper>,
    /// What it keeps.
    routes_set: BTreeSet<IpNet>,
    pub(super) server: Option<Server>,
    pub(super) started: Instant,
    pub(super) reload_error: Option<String>,
}

impl Running {
    /// Sets a tunnel up, or takes it over.
    ///
    /// # Errors
    /// When it cannot be had; then nothing is left behind.
    pub fn start(config: Config) -> Result<Self> {
        let mut netlink = Netlink::open()?;
        let mut names = Names::start(config.listen.map(|listen| listen.ip))?;
        let known = match config.takeover {
            true => start::ask_predecessor(&config),
            false => Known::new(),
        };
        let (mut overlay, mut unresolved) = start::resolve(&config, &mut names, &known)?;
        let endpoints = start::endpoints(&config, &overlay);
        let settled = config.settle(&endpoints).map_err(|error| {
            // Why nothing is known of the peers says more than that there is
            // nothing to derive an address from.
            let is_for_lack_of_peers = endpoints.is_empty() && config.addresses.is_empty();
            match unresolved.drain(..).next() {
                Some(reason) if is_for_lack_of_peers => reason,
                _ => error,
            }
        })?;
        for error in settled.unreachable.iter().chain(&unresolved) {
            tracing::warn!("{error}; trying again");
        }
        overlay.set_own_addresses(own_addresses(&mut netlink, &settled)?);
        for &endpoint in &endpoints {
            overlay.check_other(settled.listen, endpoint)?;
        }
        let inherited = match config.takeover {
            true => takeover::ask(&config.control)?,
            false => None,
        };
        if let Some(inherited) = &inherited {
            operator::check_inherited(&config, &settled, &inherited.manifest)?;
            operator::inherit(&mut overlay, &inherited.manifest);
            start::set_known(&mut overlay, &known);
            start::resolve_now(&mut overlay, &mut names);
        } else if config.takeover {
            tracing::info!("there is no running process to take over from");
        }
        let (claimed, predecessor, listener, old_addresses) = match inherited {
            None => {
                let claimed = start::claim(&config, &settled, &mut netlink)?;
                (claimed, None, None, Vec::new())
            }
            Some(inherited) => {
                let Inherited {
                    manifest,
                    device,
                    sockets,
                    udp,
                    listener,
                    predecessor,
                } = inherited;
                let claimed = Claimed {
                    sockets,
                    udp,
                    device,
                };
                let addresses = manifest.addresses;
                (claimed, Some(predecessor), listener, addresses)
            }
        };
        let Claimed {
            sockets,
            udp,
            device,
        } = claimed;
        let worker_count = device.queues.len();
        overlay.count_for(worker_count);
        ask_paths(&mut overlay, settled.listen);
        let accept_local = link::accept_local(&mut netlink, &config.tun);
        let addresses = tunnel_addresses(&settled.link.addresses, accept_local);
        let table = Arc::new(overlay.table(addresses, config.hop));
        let setup = Setup {
            tun: device.offloads,
            limits: Limits {
                segments_max: if udp.segment {
                    Limits::FULL.segments_max
                } else {
                    1
                },
                ..Limits::FULL
            },
            engine: Engine::choose(config.io, config.wanted.uring),
            busy_poll: config.busy_poll,
            cores: config.cores.clone(),
            table: Arc::clone(&table),
        };
        let descriptors = operator::keep(&device.queues, &sockets)?;
        let (tun_offloads, is_steered) = (device.offloads, device.steered);
        let mut workers = Workers::start(device.queues, sockets, &setup)?;
        let bring_up = |netlink: &mut Netlink| {
            link::bring_up(netlink, &config.tun, &settled.link, &old_addresses)
        };
        let is_successor = predecessor.is_some();
        match predecessor {
            Some(predecessor) => {
                // What is likely to fail fails while the predecessor still
                // carries on, and changes nothing that it relies on.
                let new = &settled.link.addresses;
                let added = link::add_addresses(&mut netlink, &config.tun, new)?;
                if let Err(error) = predecessor.stop() {
                    link::remove_addresses(&mut netlink, &config.tun, &added);
                    return Err(error);
                }
                workers.go();
                if let Err(error) = bring_up(&mut netlink) {
                    not_in_full(&error);
                }
            }
            // Frames that come the moment the link is up find their worker.
            None => {
                workers.go();
                bring_up(&mut netlink)?;
            }
        }
        let host = HostNews::new();
        let addresses = settled.link.addresses.clone();
        let routes = RouteKeeper::start(&config.tun, addresses, host.sender());
        let routes = match routes {
            Ok(routes) => Some(routes),
            Err(error) if is_successor => {
                not_in_full(&error);
                None
            }
            Err(error) => return Err(error),
        };
        let mut running = Self {
            config,
            settled,
            overlay,
            table,
            retired: Vec::with_capacity(RETIRED_MAX),
            workers: Some(workers),
            tun_offloads,
            udp_offloads: udp,
            is_steered,
            worker_count,
            descriptors,
            names,
            heard: HashMap::new(),
            path_cursor: 0,
            host,
            netlink,
            accept_local,
            routes,
            routes_set: BTreeSet::new(),
            server: None,
            started: Instant::now(),
            reload_error: None,
        };
        if is_successor {
            running.go_on(listener);
            return Ok(running);
        }
        match running.open() {
            Ok(()) => Ok(running),
            Err(error) => {
                running.take_down();
                Err(error)
            }
        }
    }

    /// The last steps of the start: what the host sees of a tunnel that works.
    fn open(&mut self) -> Result<()> {
        self.set_routes(self.kernel_routes(&self.overlay))?;
        self.check_outside(&self.overlay.clone())?;
        self.serve(None)?;
        announce::announce(self);
        Ok(())
    }

    /// The same for a successor: there is nobody to go back to, and the tunnel
    /// carries, so each step is taken whatever comes of the others. Operators
    /// first, who can mend the rest.
    fn go_on(&mut self, listener: Option<OwnedFd>) {
        let served = self.serve(listener);
        let routed = self.set_routes(self.kernel_routes(&self.overlay));
        // Who cannot be reached from outside is suspended, and no more.
        self.look_at_host();
        for result in [served, routed] {
            if let Err(error) = result {
                not_in_full(&error);
            }
        }
        announce::announce(self);
    }

    /// Opens the operators' socket, or goes on with the predecessor's.
    fn serve(&mut self, listener: Option<OwnedFd>) -> Result<()> {
        let path = &self.config.control;
        let server = match listener {
            Some(listener) => Server::from_listener(listener, path),
            None => Server::start(path),
        };
        match server {
            Ok(server) => self.server = Some(server),
            // Who asked for none can do without, as where /run cannot be
            // written to.
            Err(error) if self.config.control_is_default => {
                tracing::warn!("no operators' socket: {error}");
            }
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// The workers.
    ///
    /// # Panics
    /// Once they have been stopped, which only the end of the run does.
    pub fn workers(&self) -> &Workers {
        self.workers
            .as_ref()
            .expect("the workers run until the end")
    }

    /// The keeper of the kernel's routes.
    ///
    /// # Errors
    /// When it could not be started again after a change of addresses.
    fn routes(&self) -> Result<&RouteKeeper> {
        self.routes.as_ref().ok_or_else(|| {
            Error::new("the kernel's routes are no longer kept").hint("start the tunnel again")
        })
    }

    /// Leaves the device's routes and addresses as they are, until
    /// [`Self::start_routes`]: for who changes the addresses, which their keeper
    /// would put back.
    pub(super) fn stop_routes(&mut self) {
        if let Some(routes) = self.routes.take() {
            routes.stop(AtEnd::Keep);
        }
    }

    /// Has the kernel's routes kept again, and the addresses that the device is to
    /// have now.
    ///
    /// # Errors
    /// When there is no other keeper to be had, or it cannot set the routes.
    pub(super) fn start_routes(&mut self) -> Result<()> {
        let addresses = self.settled.link.addresses.clone();
        let routes = RouteKeeper::start(&self.config.tun, addresses, self.host.sender())?;
        // The new one does not know yet what it is to keep. IPv6 that the device
        // has no room for any more is on its way out.
        let takes_v6 = self.settled.link.mtu_bytes >= link::IPV6_MTU_BYTES_MIN;
        let kept = self.routes_set.iter().copied();
        let result = routes.set(
            kept.filter(|net| takes_v6 || net.addr().is_ipv4())
                .collect(),
        );
        self.routes = Some(routes);
        result
    }

    /// Waits for what may happen, and sees to it, until the end.
    ///
    /// # Errors
    /// When a worker fails.
    pub fn run(&mut self, signals: &Receiver<i32>) -> Result<End> {
        let limits_reset = tick(LIMITS_RESET_INTERVAL);
        let look = tick(LOOK_INTERVAL);
        let failures = self.workers().failures().clone();
        let answers = self.names.answers().clone();
        let calls = self
            .server
            .as_ref()
            .map_or_else(never, |server| server.calls().clone());
        loop {
            let (host_news, host_due) = (self.host.news(), self.host.due());
            select! {
                recv(signals) -> signal => match signal {
                    Ok(SIGHUP) => self.reload_by_signal(),
                    signal => {
                        let name = if signal == Ok(SIGTERM) { "SIGTERM" } else { "SIGINT" };
                        tracing::debug!("{name}: stopping");
                        return Ok(End::Stopped);
                    }
                },
                recv(failures) -> failure => {
                    return Err(failure.unwrap_or_else(|_| Error::new("all workers have ended")));
                }
                recv(calls) -> call => {
                    if let Ok(call) = call
                        && let Some(end) = self.answer(call)
                    {
                        return Ok(end);
                    }
                }
                recv(answers) -> answer => {
                    if let Ok(answer) = answer {
                        self.name_answered(answer);
                    }
                }
                recv(host_news) -> _ => self.host.note(Instant::now()),
                recv(host_due) -> _ => self.look_at_host(),
                recv(look) -> _ => self.look_after_peers(),
                recv(limits_reset) -> _ => {
                    self.workers().tell(|| Command::ResetLimits);
                }
            }
        }
    }

    fn answer(&mut self, call: Call) -> Option<End> {
        operator::answer(self, call)
    }

    fn reload_by_signal(&mut self) {
        match reload::reload(self) {
            Ok(report) => tracing::info!("reloaded: {}", reload::in_words(&report)),
            Err(error) => tracing::error!("not reloaded, nothing has changed: {error}"),
        }
    }

    /// The prefixes that the kernel should route into the tunnel.
    fn kernel_routes(&self, overlay: &Overlay) -> BTreeSet<IpNet> {
        let mut wanted = match self.config.no_routes {
            true => Default::default(),
            false => overlay.kernel_routes(),
        };
        wanted.extend(self.config.routes.iter().map(IpNet::trunc));
        wanted
    }

    /// Puts a changed overlay in force, or leaves everything as it was.
    ///
    /// # Errors
    /// When the kernel refuses a route, or when the way to a peer would lead
    /// through the tunnel.
    pub(super) fn commit(&mut self, mut next: Overlay) -> Result<()> {
        start::set_literals(&mut next);
        next.set_own_addresses(own_addresses(&mut self.netlink, &self.settled)?);
        ask_paths(&mut next, self.settled.listen);
        let old_table = Arc::clone(&self.table);
        // Workers first, so that what the kernel sends into the tunnel by a
        // new route has somewhere to go.
        let table = next.table(self.addresses(), self.config.hop);
        self.publish(Arc::new(table));
        let wanted = self.kernel_routes(&next);
        let before = self.routes_set.clone();
        let result = self
            .set_routes(wanted)
            .and_then(|()| self.check_outside(&next));
        if let Err(error) = result {
            if let Err(error) = self.set_routes(before) {
                tracing::error!("{error}");
            }
            self.publish(old_table);
            return Err(error);
        }
        self.overlay = next;
        self.watch_names();
        Ok(())
    }

    /// Has the kernel's routes changed, unless prefixes have only moved from peer
    /// to peer.
    fn set_routes(&mut self, wanted: BTreeSet<IpNet>) -> Result<()> {
        if self.routes_set != wanted {
            self.routes()?.set(wanted.clone())?;
            self.routes_set = wanted;
        }
        Ok(())
    }

    fn watch_names(&mut self) {
        let now = Instant::now();
        let names: Vec<_> = self
            .overlay
            .peers()
            .map(|(_, peer)| &peer.name)
            .filter(|name| name.literal().is_none())
            .collect();
        self.names.watch(names.into_iter(), now);
        self.names.tick(now);
        let overlay = &self.overlay;
        self.heard.retain(|&hop, _| overlay.has(hop));
    }

    /// Asks for all peers' names anew.
    pub(super) fn resolve_again(&mut self) {
        self.names.ask_all(Instant::now());
    }

    /// Gives all workers a new table.
    fn publish(&mut self, table: Arc<Table>) {
        let old = std::mem::replace(&mut self.table, Arc::clone(&table));
        self.workers().publish(&table);
        self.retired.push(old);
        self.retired.retain(|old| Arc::strong_count(old) > 1);
        // A worker that has not looked up for so long will free it.
        if self.retired.len() >= RETIRED_MAX {
            self.retired.remove(0);
        }
    }

    /// Makes the table anew after something but the prefixes has changed.
    pub(super) fn republish(&mut self) {
        let table = self.overlay.table(self.addresses(), self.config.hop);
        self.publish(Arc::new(table));
    }

    /// The addresses that errors are reported from.
    fn addresses(&self) -> TunnelAddresses {
        tunnel_addresses(&self.settled.link.addresses, self.accept_local)
    }

    /// A peer's name has an address, or still none.
    fn name_answered(&mut self, answer: Answer) {
        let Answer { name, result } = answer;
        let Some((hop, peer)) = self.overlay.find(&name) else {
            return;
        };
        let old = peer.endpoint;
        let is_silent = self.names.is_for_silence(&name);
        // Addresses that cannot be the peer's are as good as none: the name is
        // asked for again until it has another.
        let result = result.and_then(|addresses| {
            let addresses = names::in_order(addresses, old, is_silent);
            names::first_usable(addresses, |endpoint| self.check_answer(endpoint))
                .map_err(|error| Error::new(format!("cannot use peer {name}: {error}")))
        });
        if !self.names.heard(&name, result.is_ok(), Instant::now()) {
            return;
        }
        let endpoint = match result {
            Ok(endpoint) => endpoint,
            Err(error) => {
                tracing::warn!("{error}; trying again");
                return;
            }
        };
        if old == Some(endpoint) {
            return;
        }
        match old {
            Some(old) => tracing::info!("peer {name} has moved from {old} to {endpoint}"),
            None => tracing::info!("peer {name} is {endpoint}"),
        }
        self.overlay.set_endpoint(hop, Some(endpoint));
        ask_paths(&mut self.overlay, self.settled.listen);
        self.republish();
    }

    /// Whether an address may be a peer's. Whether the way to it leads through
    /// the tunnel is another question, which depends on the routes.
    pub(super) fn check_endpoint(&self, endpoint: SocketAddr) -> Result<()> {
        reach::check_endpoint(self.settled.listen, &self.overlay, endpoint)
    }

    /// Whether a name's address may be a peer's.
    fn check_answer(&mut self, endpoint: SocketAddr) -> Result<()> {
        self.check_endpoint(endpoint)?;
        link::check_outside(&mut self.netlink, &self.config.tun, endpoint)
    }

    /// Notes who answers, asks for the names of those who do not, and asks the
    /// kernel what it has learnt of the paths in use.
    fn look_after_peers(&mut self) {
        let now = Instant::now();
        for (hop, peer) in self.overlay.peers() {
            let sum = |count: fn(&PeerCounters) -> u64| peer.traffic.iter().map(count).sum::<u64>();
            let received = sum(|worker| worker.packets_received.get());
            let sent = sum(|worker| worker.packets_sent.get());
            let heard = self
                .heard
                .entry(hop)
                .or_insert_with(|| Heard::new(&peer.traffic));
            if !Arc::ptr_eq(&heard.traffic, &peer.traffic) {
                *heard = Heard::new(&peer.traffic);
            }
            heard.path_used |= sent != heard.sent;
            if received != heard.received {
                heard.last = Some(now);
                heard.silent_since = None;
                self.names.answered(&peer.name);
            } else if sent != heard.sent && heard.silent_since.is_none() {
                heard.silent_since = Some(now);
            }
            if let Some(since) = heard.silent_since {
                self.names.silent(&peer.name, now - since, now);
            }
            (heard.received, heard.sent) = (received, sent);
        }
        self.names.tick(now);
        self.look_after_paths();
        if self.routes.is_none() {
            // There is nobody who would tell of changes.
            self.host.note(now);
        }
        self.retired.retain(|old| Arc::strong_count(old) > 1);
    }

    /// Also whether they lead outside: not all that decides on it is told, such
    /// as policy rules.
    fn look_after_paths(&mut self) {
        let is_used = |hop| self.heard.get(&hop).is_some_and(|heard| heard.path_used);
        let used: Vec<_> = self
            .overlay
            .peers()
            .filter(|&(hop, peer)| peer.is_suspended || is_used(hop))
            .filter_map(|(hop, peer)| Some((hop, peer.endpoint?)))
            .collect();
        if used.is_empty() {
            return;
        }
        self.path_cursor %= used.len();
        let turn = used.iter().cycle().skip(self.path_cursor);
        let turn: Vec<_> = turn
            .take(PATHS_ASKED_MAX.min(used.len()))
            .copied()
            .collect();
        let mut is_news = self.look_at_ways(&turn);
        for (hop, endpoint) in turn {
            if let Some(heard) = self.heard.get_mut(&hop) {
                heard.path_used = false;
            }
            let Some(peer) = self.overlay.in_use(hop) else {
                continue;
            };
            let known = peer.path_mtu_bytes;
            let Ok(path) = path::discover(self.settled.listen.ip(), endpoint) else {
                continue;
            };
            if self.overlay.set_path_mtu(hop, path.mtu_bytes) {
                is_news = true;
                tracing::info!(
                    "the path to {endpoint} takes {} bytes{}",
                    path.mtu_bytes,
                    known.map_or_else(String::new, |known| format!(", no longer {known}")),
                );
            }
        }
        self.path_cursor += PATHS_ASKED_MAX;
        if is_news {
            self.republish();
        }
    }

    /// The descriptors that a successor gets, and the manifest with them.
    pub(super) fn descriptors(&self) -> &[operator::Kept] {
        &self.descriptors
    }

    /// Ends the workers: they send what they hold.
    pub(super) fn stop_workers(&mut self) {
        self.workers = None;
    }

    /// Ends the tunnel: routes, device and operators' socket go.
    pub fn take_down(mut self) {
        // Its keeper first, which would miss the device.
        if let Some(routes) = self.routes.take() {
            routes.stop(AtEnd::Remove);
        }
        self.stop_workers();
        // The device goes with the last of them, and who has asked for the end
        // takes the socket's for it.
        self.descriptors.clear();
        if let Some(server) = self.server.take() {
            server.close(true);
        }
    }

    /// Ends this process's part in a tunnel that a successor carries on.
    pub(super) fn leave(&mut self) {
        if let Some(routes) = self.routes.take() {
            routes.stop(AtEnd::Keep);
        }
        if let Some(server) = self.server.take() {
            server.close(false);
        }
    }
}

/// Asks the kernel about paths of which nothing is known.
pub(super) fn ask_paths(overlay: &mut Overlay, listen: SocketAddr) {
    let unknown: Vec<_> = overlay
        .peers()
        .filter(|(_, peer)| peer.path_mtu_bytes.is_none())
        .filter_map(|(hop, peer)| Some((hop, peer.endpoint_in_use()?)))
        .collect();
    for (hop, endpoint) in unknown {
        if let Ok(path) = path::discover(listen.ip(), endpoint) {
            overlay.set_path_mtu(hop, path.mtu_bytes);
        }
    }
}
