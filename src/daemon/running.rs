//! A tunnel that runs: what the control thread holds, what it waits for, and
//! what it looks after every second.

mod begin;

use std::collections::{BTreeSet, HashMap};
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, never, select, tick};
use ipnet::IpNet;
use signal_hook::consts::{SIGHUP, SIGTERM};

use super::handover::{self, Handover};
use super::host::{Device, HostNews, own_addresses};
use super::paths::{Paths, ask_routes};
use super::ports::Ports;
use super::trouble::Troubles;
use super::{operator, reach, reload, start};
use crate::config::{Config, Settled};
use crate::control::server::{Call, Server};
use crate::counters::{Counters, PeerCounters};
use crate::daemon::workers::{Setup, Workers};
use crate::dataplane::Command;
use crate::dataplane::table::Table;
use crate::error::{Error, Result};
use crate::host::link;
use crate::host::netlink::Netlink;
use crate::host::routes::{AtEnd, RouteKeeper};
use crate::io::udp;
use crate::log::rate_limited::Journal;
use crate::packet::coalesce;
use crate::packet::icmp::TunnelAddresses;
use crate::packet::train::NextHop;
use crate::routing::dns::{self, Answer, Names};
use crate::routing::overlay::{Overlay, Peer, tunnel_addresses};

/// How often trains of full size are tried again on paths that refused them.
const LIMITS_RESET_INTERVAL: Duration = Duration::from_secs(600);

/// How often peers are looked after: who answers, what the paths take.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// How long a peer that we keep sending to may be silent before the log says so.
const QUIET_AFTER: Duration = Duration::from_secs(10);

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
    pub(super) received: u64,
    /// Also what could not be sent.
    sent: u64,
    /// When something came from it.
    pub(super) last: Option<Instant>,
    /// Since when we send to it without hearing anything.
    silent_since: Option<Instant>,
    /// The log says that it is silent.
    is_quiet: bool,
    /// We have sent to it since its path was looked at.
    pub(super) path_used: bool,
}

impl Heard {
    fn new(traffic: &Arc<[PeerCounters]>) -> Self {
        Self {
            traffic: Arc::clone(traffic),
            received: 0,
            sent: 0,
            last: None,
            silent_since: None,
            is_quiet: false,
            path_used: false,
        }
    }
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
    pub(super) tun_offloads: coalesce::TunOffloads,
    pub(super) udp_offloads: udp::UdpOffloads,
    pub(super) is_steered: bool,
    pub(super) worker_count: usize,
    /// The workers', also of those that come after them.
    counters: Vec<Arc<Counters>>,
    /// What the workers were started with.
    setup: Setup,
    descriptors: Arc<Vec<handover::Kept>>,
    names: Names,
    pub(super) ports: Ports,
    pub(super) heard: HashMap<NextHop, Heard>,
    pub(super) paths: Paths,
    pub(super) host: HostNews,
    pub(super) troubles: Troubles,
    quiet_log: Journal,
    pub(super) device: Device,
    /// What the kernel has counted at each worker's socket.
    socket_drops: Vec<u32>,
    pub(super) netlink: Netlink,
    pub(super) accept_local: bool,
    /// `None` once the tunnel has ended, or if it could not be started again.
    pub(super) routes: Option<RouteKeeper>,
    /// What it was told to keep.
    routes_kept: BTreeSet<IpNet>,
    pub(super) server: Option<Server>,
    /// While a successor gets ready.
    pub(super) handover: Option<Handover>,
    /// A reload by signal has to wait for the end of that.
    pub(super) is_reload_due: bool,
    pub(super) started: Instant,
    pub(super) reload_error: Option<String>,
}

impl Running {
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
    /// Once they have been stopped: at the end of the run, or when the tunnel is
    /// left to a successor, before anything else is done.
    pub fn workers(&self) -> &Workers {
        self.workers
            .as_ref()
            .expect("the workers run until the end")
    }

    /// The workers' counters, in the order of their queues.
    pub fn counters(&self) -> &[Arc<Counters>] {
        &self.counters
    }

    /// The keeper of the kernel's routes.
    ///
    /// # Errors
    /// When it could not be started again after a change of addresses.
    fn routes(&self) -> Result<&RouteKeeper> {
        self.routes.as_ref().ok_or_else(|| {
            Error::new("the kernel's routes are not kept just now").hint("try again later")
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
        let routes = RouteKeeper::start(self.device.index, addresses, self.host.sender())?;
        // The new one does not know yet what it is to keep. IPv6 that the device
        // has no room for any more is on its way out.
        let takes_v6 = self.settled.link.mtu_bytes >= link::IPV6_MTU_BYTES_MIN;
        let kept = self.routes_kept.iter().copied();
        let result = routes.resume(
            kept.filter(|net| takes_v6 || net.addr().is_ipv4())
                .collect(),
        );
        self.routes = Some(routes);
        // Nobody has told of changes meanwhile.
        self.host.note(Instant::now());
        result
    }

    /// Tries again to have a keeper, as when there were no descriptors to be had.
    fn keep_routes_again(&mut self, now: Instant) {
        match self.start_routes() {
            Ok(()) => tracing::info!("the kernel's routes are kept again"),
            Err(error) => {
                tracing::debug!("{error}");
                // There may be nobody who would tell of changes.
                self.host.note(now);
            }
        }
    }

    /// Waits for what may happen, and sees to it, until the end.
    ///
    /// # Errors
    /// When a worker fails.
    pub fn run(&mut self, signals: &Receiver<i32>) -> Result<End> {
        let limits_reset = tick(LIMITS_RESET_INTERVAL);
        let look = tick(LOOK_INTERVAL);
        let answers = self.names.answers().clone();
        self.ask_about_ports(Instant::now());
        loop {
            // These are others after a takeover that came to nothing.
            let failures = self.workers().failures().clone();
            let calls = self
                .server
                .as_ref()
                .map_or_else(never, |server| server.calls().clone());
            let ready = self
                .handover
                .as_ref()
                .map_or_else(never, |handover| handover.ready().clone());
            let (host_news, host_due) = (self.host.news(), self.host.due());
            let (probes, probes_due) = self.ports.received();
            select! {
                recv(signals) -> signal => match signal {
                    Ok(SIGHUP) if self.handover.is_some() => {
                        tracing::info!("the reload waits: another process is taking over");
                        self.is_reload_due = true;
                    }
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
                recv(ready) -> ready => {
                    let ready = ready.unwrap_or_else(|_| Err(Error::new("its thread has ended")));
                    if let Some(end) = handover::end(self, ready)? {
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
                recv(probes) -> probe => self.read_probes(probe.ok()),
                recv(probes_due) -> _ => self.read_probes(None),
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

    /// Does what had to wait while a successor got ready.
    pub(super) fn catch_up(&mut self) {
        if std::mem::take(&mut self.is_reload_due) {
            self.reload_by_signal();
        }
    }

    fn reload_by_signal(&mut self) {
        // What came of it is in the log.
        let _ = reload::reload(self, "SIGHUP");
    }

    /// The prefixes that the kernel should route into the tunnel.
    fn kernel_routes(&self, overlay: &Overlay) -> BTreeSet<IpNet> {
        start::kernel_routes(&self.config, overlay)
    }

    /// Puts a changed overlay in force, or leaves everything as it was.
    ///
    /// # Errors
    /// When the kernel refuses a route, or when the way to a peer would lead
    /// through the tunnel.
    pub(super) fn commit(&mut self, mut next: Overlay) -> Result<()> {
        start::set_literals(&mut next);
        let given = &self.settled.link.addresses;
        next.set_own_addresses(own_addresses(&mut self.netlink, given)?);
        ask_routes(&mut next, &mut self.netlink);
        let old_table = Arc::clone(&self.table);
        // Workers first, so that what the kernel sends into the tunnel by a
        // new route has somewhere to go.
        let table = next.table(self.addresses(), self.config.hop);
        self.publish(Arc::new(table));
        let wanted = self.kernel_routes(&next);
        let before = self.routes_kept.clone();
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
        if self.routes_kept != wanted {
            self.routes()?.set(wanted.clone())?;
            self.routes_kept = wanted;
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
        self.paths.retain(|hop| overlay.has(hop));
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
            let addresses = dns::in_order(addresses, old, is_silent);
            dns::first_usable(&name, addresses, |endpoint| self.check_answer(endpoint))
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
        ask_routes(&mut self.overlay, &mut self.netlink);
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
        link::check_outside(&mut self.netlink, self.device.index, endpoint)
    }

    /// Notes who answers, asks for the names of those who do not, and looks at
    /// the paths in use.
    fn look_after_peers(&mut self) {
        let now = Instant::now();
        for (hop, peer) in self.overlay.peers() {
            let sum = |count: fn(&PeerCounters) -> u64| peer.traffic.iter().map(count).sum::<u64>();
            let received = sum(|worker| worker.packets_received.get());
            let sent = sum(PeerCounters::packets_tried);
            let heard = self
                .heard
                .entry(hop)
                .or_insert_with(|| Heard::new(&peer.traffic));
            if !Arc::ptr_eq(&heard.traffic, &peer.traffic) {
                *heard = Heard::new(&peer.traffic);
            }
            let (has_received, has_sent) = (received != heard.received, sent != heard.sent);
            self.ports.note_traffic(hop, has_received, has_sent, now);
            heard.path_used |= has_sent;
            if has_received {
                if std::mem::take(&mut heard.is_quiet) && self.quiet_log.admits(now) {
                    tracing::info!("peer {} is heard again", peer.name);
                }
                heard.last = Some(now);
                heard.silent_since = None;
                self.names.answered(&peer.name);
            } else if has_sent {
                let silence = now - *heard.silent_since.get_or_insert(now);
                if silence >= QUIET_AFTER && !heard.is_quiet {
                    heard.is_quiet = true;
                    if self.quiet_log.admits(now) {
                        tell_of_silence(peer, heard.last.map(|last| now - last));
                    }
                }
            }
            if let Some(since) = heard.silent_since {
                self.names.silent(&peer.name, now - since, now);
            }
            (heard.received, heard.sent) = (received, sent);
        }
        self.names.tick(now);
        self.look_at_ports(now);
        self.look_after_paths();
        self.count_socket_drops();
        self.host.flush_log(now);
        self.quiet_log.flush(now);
        self.tell_of_drops(now);
        if self.routes.is_none() {
            self.keep_routes_again(now);
        }
        self.retired.retain(|old| Arc::strong_count(old) > 1);
    }

    /// Adds to the workers' counters what the kernel has dropped at their sockets
    /// since the last time.
    pub(super) fn count_socket_drops(&mut self) {
        let counters = self.counters.iter().zip(&mut self.socket_drops);
        for (worker, (counters, seen)) in self.descriptors.iter().zip(counters) {
            if let Ok(drops) = udp::drops(worker.receive()) {
                // The kernel's count wraps round.
                let fresh = drops.wrapping_sub(std::mem::replace(seen, drops));
                counters.drop_at_socket.add(fresh.into());
            }
        }
    }

    /// The descriptors that a successor gets.
    pub(super) fn descriptors(&self) -> &Arc<Vec<handover::Kept>> {
        &self.descriptors
    }

    /// The operators' socket once more, if there is one.
    pub(super) fn listener(&self) -> Result<Option<OwnedFd>> {
        let server = self.server.as_ref();
        let listener = server.map(|server| server.listener().try_clone_to_owned());
        listener
            .transpose()
            .map_err(|error| Error::os("cannot duplicate the operators' socket", error))
    }

    /// Ends the workers: they send what they hold.
    pub(super) fn stop_workers(&mut self) {
        self.workers = None;
    }

    /// Ends the tunnel: routes, device and operators' socket go.
    pub fn take_down(mut self) {
        self.count_socket_drops();
        self.host.end_log();
        self.quiet_log.end();
        self.ports.end_log();
        self.handover = None;
        // Its keeper first, which would miss the device.
        if let Some(routes) = self.routes.take() {
            routes.stop(AtEnd::Remove);
        }
        self.stop_workers();
        // The device goes with the last of them, and who has asked for the end
        // takes the socket's for it.
        self.descriptors = Arc::default();
        if let Some(server) = self.server.take() {
            server.close(true);
        }
    }

    /// Ends this process's part in a tunnel that a successor carries on.
    pub(super) fn leave(&mut self) {
        self.count_socket_drops();
        if let Some(routes) = self.routes.take() {
            routes.stop(AtEnd::Keep);
        }
        if let Some(server) = self.server.take() {
            server.close(false);
        }
    }

    /// Whether the tunnel was left, all of it, for a successor.
    pub(super) fn has_left(&self) -> bool {
        self.workers.is_none()
    }

    /// Takes the tunnel back after it was left. `listener`: the operators'
    /// socket.
    ///
    /// # Errors
    /// When it cannot carry packets or answer operators any more.
    pub(super) fn resume(&mut self, listener: Option<OwnedFd>) -> Result<()> {
        // First, so that the socket's name goes if the rest fails.
        if listener.is_some() {
            self.serve(listener)?;
        }
        let (queues, sockets) = handover::for_workers(&self.descriptors)?;
        self.setup.table = Arc::clone(&self.table);
        let counters = self.counters.clone();
        self.workers = Some(Workers::start(queues, sockets, counters, &self.setup)?);
        self.let_workers_go();
        if let Err(error) = self.take_routes_on() {
            tracing::error!("{error}");
        }
        // Nobody has told of changes meanwhile.
        self.host.note(Instant::now());
        Ok(())
    }
}

/// Tells of a peer that we send to and do not hear, for the first time since it
/// was last heard.
fn tell_of_silence(peer: &Peer, unheard: Option<Duration>) {
    let name = &peer.name;
    match unheard {
        Some(unheard) => tracing::warn!(
            "peer {name} has gone quiet: packets are sent to it, but it was last heard {} s ago",
            unheard.as_secs()
        ),
        None => tracing::warn!(
            "peer {name} does not answer: packets are sent to it, but it has never been heard; \
             does it run, and do firewalls let UDP through both ways?"
        ),
    }
}
