//! The thread that compares what the kernel has with what is wanted, and fixes
//! what differs.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, TryRecvError};
use ipnet::IpNet;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use super::table::{RouteTable, way};
use super::{AtEnd, NO_DEVICE, Shared};
use crate::error::{Error, Result};
use crate::host::link::IPV6_MTU_BYTES_MIN;
use crate::host::netlink::route::MAIN_TABLE;
use crate::host::netlink::{DeviceRoute, Event, Link, Netlink, Route, RouteChange, Watch};
use crate::log::rate_limited::Journal;

/// Between two comparisons there is so much time at least, and so many times as
/// long as the first one took: a fifth of one core is what a restless host with
/// a huge table can cost.
const COOLDOWN: Duration = Duration::from_millis(100);
const COOLDOWN_FACTOR: u32 = 4;

/// The same while somebody undoes the fixes again and again.
const COOLDOWN_CONTENDED: Duration = Duration::from_secs(5);

/// So many fixes without a [`QUIET_PERIOD`] in between are contention.
pub(super) const FIXES_MAX: u32 = 30;
const QUIET_PERIOD: Duration = Duration::from_secs(30);

/// How often there is a comparison when no event asks for one: not all changes
/// are told.
const TICK: Duration = Duration::from_secs(60);

/// How long after the kernel has refused something it is tried again.
const RETRY_WAIT: Duration = Duration::from_secs(5);

/// Datagrams of events read before jobs are looked at again.
const EVENT_DATAGRAMS_MAX: usize = 256;

/// Most routes that are added before they are counted.
const PART_MAX: usize = 1000;

/// What the owner can ask for. `done` takes one answer.
pub enum Job {
    /// See [`RouteReconciler::set`](super::RouteReconciler::set).
    Set {
        /// Masked prefixes.
        wanted: BTreeSet<IpNet>,
        /// Takes the answer.
        done: Sender<Result<()>>,
    },
    /// See [`RouteReconciler::adopt`](super::RouteReconciler::adopt).
    Adopt {
        /// Masked prefixes.
        wanted: BTreeSet<IpNet>,
        /// Takes the answer.
        done: Sender<Result<()>>,
    },
    /// Ends the thread.
    End(AtEnd),
}

/// What the device takes, from less to more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum DeviceState {
    Down,
    /// Below the least MTU that IPv6 may have, the kernel takes all of it away
    /// from the device (`addrconf_notify()` in net/ipv6/addrconf.c).
    Ipv4Only,
    Up,
}

impl DeviceState {
    fn of(link: &Link) -> Self {
        match link {
            Link { up: false, .. } => Self::Down,
            Link { mtu, .. } if *mtu < IPV6_MTU_BYTES_MIN => Self::Ipv4Only,
            _ => Self::Up,
        }
    }

    fn takes(self, net: &IpNet) -> bool {
        match net {
            IpNet::V4(_) => self >= Self::Ipv4Only,
            IpNet::V6(_) => self == Self::Up,
        }
    }
}

/// A wanted prefix whose packets went elsewhere.
struct Fix {
    prefix: IpNet,
    /// By this route; `None`: ours was deleted.
    winner: Option<Route>,
}

/// The thread's state.
pub struct Reconciler {
    /// Its changes are not among the events.
    netlink: Netlink,
    /// `None` once it has failed, until it can be opened again.
    watch: Option<Watch>,
    epoll: Epoll,
    /// How our routes are told from others'.
    device: DeviceRoute,
    addresses: Vec<IpNet>,
    /// `None` until the owner has said so.
    wanted: Option<BTreeSet<IpNet>>,
    /// As of the last comparison; `None` before the first one that counts.
    state: Option<DeviceState>,
    /// When the next comparison is due, and when it may be.
    due: Instant,
    not_before: Instant,
    /// Fixes since the last quiet period, and when the last one was.
    fixes: u32,
    fixed_at: Instant,
    /// What could not be fixed the last time: it is logged when it changes.
    complaint: String,
    journal: Journal,
    changes: Sender<()>,
    jobs: Receiver<Job>,
    shared: Arc<Shared>,
}

impl Reconciler {
    /// `changes`: tells the owner that something about the host has changed.
    pub fn new(
        netlink: Netlink,
        watch: Watch,
        device: DeviceRoute,
        addresses: Vec<IpNet>,
        changes: Sender<()>,
        jobs: Receiver<Job>,
        shared: Arc<Shared>,
    ) -> Result<Self> {
        let failed = |errno: nix::errno::Errno| Error::os("cannot create an epoll", errno.into());
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(failed)?;
        let readable = EpollEvent::new(EpollFlags::EPOLLIN, 0);
        epoll.add(&shared.wake, readable).map_err(failed)?;
        epoll.add(&watch, readable).map_err(failed)?;
        let now = Instant::now();
        Ok(Self {
            netlink,
            watch: Some(watch),
            epoll,
            device,
            addresses,
            wanted: None,
            state: None,
            due: now + TICK,
            not_before: now,
            fixes: 0,
            fixed_at: now,
            complaint: String::new(),
            journal: Journal::new("changes of routes and addresses"),
            changes,
            jobs,
            shared,
        })
    }

    /// Runs until told to end.
    pub fn run(mut self) {
        let at_end = loop {
            self.wait();
            if let Some(at_end) = self.take_jobs() {
                break at_end;
            }
            self.read_events();
            if self.due.max(self.not_before) <= Instant::now() {
                self.compare();
            }
            self.journal.flush(Instant::now());
        };
        self.journal.end();
        if at_end == AtEnd::Remove
            && let Err(error) = self.remove_all()
        {
            tracing::warn!("{error}");
        }
    }

    /// Sleeps until there is a job, an event, or something due.
    fn wait(&mut self) {
        let compare_at = self.due.max(self.not_before);
        let wake_at = self
            .journal
            .due()
            .map_or(compare_at, |due| due.min(compare_at));
        let wait = wake_at.saturating_duration_since(Instant::now());
        // Rounded up: a timeout of zero too many would make it spin.
        let milliseconds = wait.as_millis().saturating_add(1).min(u128::from(u16::MAX));
        let mut events = [EpollEvent::empty(); 2];
        // Interrupted or not, everything is looked at.
        let _ = self
            .epoll
            .wait(&mut events, EpollTimeout::from(milliseconds as u16));
        let _ = self.shared.wake.read();
    }

    fn take_jobs(&mut self) -> Option<AtEnd> {
        loop {
            match self.jobs.try_recv() {
                // Nobody waits for an answer that cannot be sent.
                Ok(Job::Set { wanted, done }) => {
                    let _ = done.try_send(self.set(wanted));
                }
                Ok(Job::Adopt { wanted, done }) => {
                    let _ = done.try_send(self.adopt(wanted));
                }
                Ok(Job::End(at_end)) => return Some(at_end),
                Err(TryRecvError::Empty) => return None,
                Err(TryRecvError::Disconnected) => return Some(AtEnd::Remove),
            }
        }
    }

    /// Reads what others have changed. A comparison is due if it may concern us.
    fn read_events(&mut self) {
        let Some(watch) = &mut self.watch else {
            return;
        };
        let mut events = Vec::new();
        // What is left makes the next wait return at once.
        if let Err(error) = watch.read(EVENT_DATAGRAMS_MAX, &mut |event| events.push(event)) {
            // It would be ready at all times. The comparison opens another one.
            self.watch = None;
            self.warn(format!("{error}; trying again"));
            self.compare_at(Instant::now());
        }
        for event in &events {
            let is_ours = match event {
                Event::Route(route) => {
                    let is_wanted = |wanted: &BTreeSet<_>| wanted.contains(&route.destination);
                    route.table == MAIN_TABLE && self.wanted.as_ref().is_some_and(is_wanted)
                }
                Event::Address { index } | Event::Link { index } => *index == self.device.oif,
                Event::LinkDeleted { index } if *index == self.device.oif => {
                    self.device_is_gone();
                    false
                }
                Event::LinkDeleted { .. } => false,
                Event::Lost => true,
            };
            if is_ours {
                self.compare_at(Instant::now());
            }
        }
        if !events.is_empty() {
            self.tell_owner();
        }
    }

    fn compare_at(&mut self, at: Instant) {
        self.due = self.due.min(at);
    }

    /// The owner comes to it when it has the time.
    fn tell_owner(&self) {
        let _ = self.changes.try_send(());
    }

    /// The device has been deleted, or moved to another namespace: whatever has
    /// its index from now on is another one.
    fn device_is_gone(&mut self) {
        self.device.oif = NO_DEVICE;
        self.shared.has_device.store(false, Ordering::Release);
    }

    /// See [`RouteReconciler::set`](super::RouteReconciler::set).
    pub(super) fn set(&mut self, wanted: BTreeSet<IpNet>) -> Result<()> {
        if self.device.oif == NO_DEVICE {
            self.wanted = Some(wanted);
            return Ok(());
        }
        let table = RouteTable::read(&mut self.netlink, self.device, &wanted)?;
        let old = self.wanted.as_ref();
        let is_new = |prefix: &&IpNet| old.is_none_or(|old| !old.contains(prefix));
        table.check_free(&mut self.netlink, wanted.iter().filter(is_new))?;
        let link = self.netlink.link_by_index(self.device.oif)?;
        // While it is down, a comparison adds them when it is up again.
        let state = link.map_or(DeviceState::Down, |link| DeviceState::of(&link));
        let missing = wanted
            .iter()
            .filter(|prefix| !table.is_right(prefix) && !table.to(prefix).has_ours);
        let mut changes: Vec<_> = missing
            .filter_map(|prefix| match is_new(&prefix) {
                true => (state > DeviceState::Down).then_some(RouteChange::Add(*prefix)),
                false => state.takes(prefix).then_some(RouteChange::Prepend(*prefix)),
            })
            .collect();
        changes.extend(table.deletions(&wanted));
        let old = self.wanted.replace(wanted);
        self.state.get_or_insert(state);
        match self.apply(&changes) {
            Ok(None) => Ok(()),
            // Of one that was wanted before.
            Ok(Some(_)) => {
                self.compare_at(Instant::now() + RETRY_WAIT);
                Ok(())
            }
            Err(error) => {
                // A comparison takes back what was added.
                self.wanted = old;
                self.state = None;
                self.compare();
                Err(error)
            }
        }
    }

    /// See [`RouteReconciler::adopt`](super::RouteReconciler::adopt).
    fn adopt(&mut self, wanted: BTreeSet<IpNet>) -> Result<()> {
        self.wanted = Some(wanted);
        self.state = None;
        self.reconcile().inspect_err(|_| {
            self.compare_at(Instant::now() + RETRY_WAIT);
        })
    }

    /// Compares, and notes when to do so again.
    fn compare(&mut self) {
        let started = Instant::now();
        self.due = started + TICK;
        if let Err(error) = self.reconcile() {
            self.complain(error.to_string());
            self.compare_at(Instant::now() + RETRY_WAIT);
        }
        let now = Instant::now();
        let cooldown = match self.fixes >= FIXES_MAX {
            true => COOLDOWN_CONTENDED,
            false => COOLDOWN,
        };
        self.not_before = now + cooldown.max((now - started) * COOLDOWN_FACTOR);
    }

    /// Makes the kernel's routes and the device's addresses what is wanted.
    ///
    /// # Errors
    /// When the kernel refuses something. What it takes is in force.
    fn reconcile(&mut self) -> Result<()> {
        self.watch_again()?;
        self.note_quiet();
        let Some(link) = self.find_device()? else {
            return Ok(());
        };
        let before = self.state;
        let state = self.note_state(&link);
        if state == DeviceState::Down {
            return Ok(());
        }
        let readdressed = self.restore_addresses(&link, state);
        // The set is put back below, whatever happens.
        let Some(wanted) = self.wanted.take() else {
            return readdressed;
        };
        let rerouted = self.restore_routes(&wanted, state);
        self.wanted = Some(wanted);
        let (fixes, refused) = rerouted?;
        if !fixes.is_empty() {
            // The way to somebody may lead into the device again.
            self.tell_owner();
        }
        match before {
            // What is wanted was missing for reasons of ours, unless somebody else
            // has a route there.
            None => self.tell_of_fixes(&link.name, fixes.iter().filter(|fix| fix.winner.is_some())),
            Some(before) if before < state && !fixes.is_empty() => {
                let (name, count) = (&link.name, fixes.len());
                self.warn(format!("interface {name}: {count} routes put back"));
            }
            Some(_) => self.tell_of_fixes(&link.name, fixes.iter()),
        }
        let result = readdressed.and(refused.map_or(Ok(()), Err));
        if result.is_ok() {
            self.complaint.clear();
        }
        result
    }

    fn watch_again(&mut self) -> Result<()> {
        if self.watch.is_none() {
            let watch = Watch::open(&self.netlink)?;
            self.epoll
                .add(&watch, EpollEvent::new(EpollFlags::EPOLLIN, 0))
                .map_err(|errno| Error::os("cannot wait for changes to routes", errno.into()))?;
            self.watch = Some(watch);
            // Nobody has told of changes meanwhile.
            self.tell_owner();
        }
        Ok(())
    }

    /// The device; `None` once it is gone, and before anything is wanted.
    fn find_device(&mut self) -> Result<Option<Link>> {
        if self.device.oif == NO_DEVICE || self.wanted.is_none() {
            return Ok(None);
        }
        let link = self.netlink.link_by_index(self.device.oif)?;
        if link.is_none() {
            self.device_is_gone();
        }
        Ok(link)
    }

    fn note_state(&mut self, link: &Link) -> DeviceState {
        let state = DeviceState::of(link);
        let before = self.state.replace(state);
        let (name, mtu) = (&link.name, link.mtu);
        match state {
            _ if before.is_none_or(|before| before <= state) => {}
            DeviceState::Down => self.warn(format!(
                "interface {name} was taken down: its routes are gone until it is up again"
            )),
            _ => self.warn(format!(
                "interface {name} has an MTU of {mtu} bytes now, and IPv6 needs \
                     {IPV6_MTU_BYTES_MIN}: its IPv6 routes are gone until it has that again"
            )),
        }
        state
    }

    /// Gives the device back the addresses that it has lost. One of IPv6 that it
    /// has with another prefix length is left so.
    fn restore_addresses(&mut self, link: &Link, state: DeviceState) -> Result<()> {
        let present = self.netlink.addresses()?;
        let is_missing = |address: &IpNet| !present.contains(&(link.index, *address));
        let mut missing = self.addresses.clone();
        missing.retain(|address| is_missing(address) && state.takes(address));
        let mut result = Ok(());
        for address in missing {
            match self.netlink.add_address(link.index, address) {
                Ok(()) => {
                    let name = &link.name;
                    self.note_fix(
                        name,
                        format!("address {address} on {name} was gone; put back"),
                    );
                }
                Err(error) if error.errno() == Some(libc::EEXIST) => {}
                // The routes are worth having without.
                Err(error) => result = result.and(Err(error)),
            }
        }
        result
    }

    /// Puts back what is missing, puts ours in front where others' have overridden
    /// them, and deletes what is not wanted any more. Returns what was fixed, and
    /// why something could not be.
    fn restore_routes(
        &mut self,
        wanted: &BTreeSet<IpNet>,
        state: DeviceState,
    ) -> Result<(Vec<Fix>, Option<Error>)> {
        let table = RouteTable::read(&mut self.netlink, self.device, wanted)?;
        let (mut changes, mut fixes, mut hopeless) = (Vec::new(), Vec::new(), None);
        for &prefix in wanted {
            if table.is_right(&prefix) || !state.takes(&prefix) {
                continue;
            }
            let routes = table.to(&prefix);
            let winner = routes.winner;
            if routes.has_ours && prefix.addr().is_ipv6() {
                hopeless = winner;
                continue;
            }
            // In IPv4 the only way to the front is to be added again.
            if routes.has_ours {
                changes.push(RouteChange::Delete(prefix));
            }
            changes.push(RouteChange::Prepend(prefix));
            fixes.push(Fix { prefix, winner });
        }
        changes.extend(table.deletions(wanted));
        drop(table);
        let refused = self.apply(&changes)?;
        let hopeless = hopeless.map(|winner| {
            let (prefix, way) = (winner.destination, way(&mut self.netlink, &winner));
            Error::new(format!("route {prefix} is overridden by one {way}"))
                .hint("nothing can override that: remove it (ip -6 route del)")
        });
        Ok((fixes, refused.or(hopeless)))
    }

    /// Makes changes. Returns why one was refused, other than of a new prefix.
    ///
    /// # Errors
    /// When the socket fails, or a route to a new prefix is refused. Some changes
    /// may be in force.
    fn apply(&mut self, changes: &[RouteChange]) -> Result<Option<Error>> {
        let mut refused = None;
        // In parts, so that it shows how far it is.
        for part in changes.chunks(PART_MAX) {
            for (place, error) in self.netlink.change_device_routes(self.device, part)? {
                match (part[place], error.errno()) {
                    // Somebody was faster, or the device was taken down just now:
                    // an event tells.
                    (_, Some(libc::ENETDOWN))
                    | (RouteChange::Prepend(_), Some(libc::EEXIST | libc::ENODEV))
                    | (RouteChange::Delete(_), Some(libc::ESRCH | libc::ENODEV)) => {}
                    (RouteChange::Add(_), Some(libc::EEXIST)) => {
                        let hint = "somebody added a route to this prefix just now; try again";
                        return Err(error.hint(hint));
                    }
                    (RouteChange::Add(IpNet::V6(_)), Some(libc::ENODEV)) => {
                        return Err(error.hint(format!(
                            "IPv6 needs an MTU of {IPV6_MTU_BYTES_MIN} bytes at least"
                        )));
                    }
                    (RouteChange::Add(_), _) => return Err(error),
                    _ => refused = refused.or(Some(error)),
                }
            }
            let is_added = |change: &&RouteChange| !matches!(change, RouteChange::Delete(_));
            let added = part.iter().filter(is_added).count();
            self.shared.added.fetch_add(added, Ordering::Relaxed);
        }
        Ok(refused)
    }

    fn remove_all(&mut self) -> Result<()> {
        let nothing = BTreeSet::new();
        let deletions =
            RouteTable::read(&mut self.netlink, self.device, &nothing)?.deletions(&nothing);
        self.apply(&deletions)?.map_or(Ok(()), Err)
    }

    /// Says what was fixed, in one line.
    fn tell_of_fixes<'a>(&mut self, name: &str, mut fixes: impl Iterator<Item = &'a Fix>) {
        let Some(Fix { prefix, winner }) = fixes.next() else {
            return;
        };
        let mut line = match winner {
            None => format!("route {prefix} on {name} was deleted; put back"),
            Some(winner) => {
                let way = way(&mut self.netlink, winner);
                format!("route {prefix} on {name} was overridden by one {way}; put in front of it")
            }
        };
        let more = fixes.count();
        if more > 0 {
            line += &format!(" (and {more} more)");
        }
        self.note_fix(name, line);
    }

    /// Counts a fix of what somebody else has done, and logs it unless there are
    /// too many.
    fn note_fix(&mut self, name: &str, line: String) {
        self.fixes = self.fixes.saturating_add(1);
        self.fixed_at = Instant::now();
        if self.fixes < FIXES_MAX {
            self.warn(line);
        } else if self.fixes == FIXES_MAX {
            tracing::warn!(
                "somebody changes the routes or addresses of {name} again and again, the last \
                 time: {line}; from now on they are put back every {} s; have other network \
                 managers leave {name} and its prefixes alone",
                COOLDOWN_CONTENDED.as_secs()
            );
        }
    }

    fn note_quiet(&mut self) {
        if self.fixed_at.elapsed() < QUIET_PERIOD {
            return;
        }
        if self.fixes >= FIXES_MAX {
            tracing::info!("nobody changes the tunnel's routes and addresses any more");
        }
        self.fixes = 0;
    }

    /// Says what cannot be fixed, once.
    fn complain(&mut self, complaint: String) {
        if self.complaint != complaint {
            self.warn(complaint.clone());
            self.complaint = complaint;
        }
    }

    /// Logs a line if there were not too many.
    fn warn(&mut self, line: String) {
        if self.journal.admits(Instant::now()) {
            tracing::warn!("{line}");
        }
    }
}
