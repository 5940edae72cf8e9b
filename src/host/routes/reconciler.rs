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
use crate::log::rate_limited::RateLimitedLog;

/// Between two comparisons there is so much time at least, and so many times as
/// long as the first one took: a fifth of one core is what a restless host with
/// a huge table can cost.
const COOLDOWN: Duration = Duration::from_millis(100);
const COOLDOWN_FACTOR: u32 = 4;

/// The same while somebody undoes the fixes again and again.
const COOLDOWN_CONTENDED: Duration = Duration::from_secs(5);

/// So many fixes without a [`QUIET_PERIOD`] in between are contention, and so many
/// of them are logged.
const FIXES_MAX: u32 = 30;
pub(super) const FIXES_LOGGED_MAX: u32 = 5;
const QUIET_PERIOD: Duration = Duration::from_secs(30);

/// How often there is a comparison when no event asks for one: not all changes
/// are told.
const TICK: Duration = Duration::from_secs(60);

/// How long after the kernel has refused something it is tried again.
const RETRY_WAIT: Duration = Duration::from_secs(5);

/// Datagrams of events read before jobs are looked at again.
const EVENT_DATAGRAMS_MAX: usize = 256;

/// What the owner can ask for.
pub enum Job {
    /// See [`RouteReconciler::set`](super::RouteReconciler::set) and
    /// [`RouteReconciler::adopt`](super::RouteReconciler::adopt).
    Want {
        /// Masked prefixes.
        wanted: BTreeSet<IpNet>,
        /// Whether they were kept until now.
        is_adopted: bool,
        /// Takes the one answer.
        done: Sender<Result<()>>,
    },
    /// Ends the thread.
    End(AtEnd),
}

/// Whether an interface takes addresses and routes of this IP version. Below the
/// least MTU that IPv6 may have, the kernel takes all of it away from the interface
/// (`addrconf_notify()` in net/ipv6/addrconf.c).
fn takes(link: &Link, net: &IpNet) -> bool {
    link.up && (net.addr().is_ipv4() || link.mtu >= IPV6_MTU_BYTES_MIN)
}

/// A wanted prefix whose packets went elsewhere.
struct Fix {
    prefix: IpNet,
    /// By this route; `None`: there was none.
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
    /// When the next comparison is due, and when it may be.
    due: Instant,
    not_before: Instant,
    /// Fixes since the last quiet period, and when the last one was.
    fixes: u32,
    fixed_at: Instant,
    /// What could not be fixed the last time: it is logged when it changes.
    complaint: Option<String>,
    complaints: RateLimitedLog,
    changes: Sender<()>,
    jobs: Receiver<Job>,
    shared: Arc<Shared>,
}

impl Reconciler {
    /// `changes`: tells the owner that something about the host has changed.
    pub(crate) fn new(
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
            due: now + TICK,
            not_before: now,
            fixes: 0,
            fixed_at: now,
            complaint: None,
            complaints: RateLimitedLog::new("failures to keep routes or addresses"),
            changes,
            jobs,
            shared,
        })
    }

    /// Runs until told to end.
    pub(crate) fn run(mut self) {
        let at_end = loop {
            self.wait();
            if let Some(at_end) = self.take_jobs() {
                break at_end;
            }
            self.read_events();
            if self.due.max(self.not_before) <= Instant::now() {
                self.compare();
            }
        };
        self.complaints.end();
        if at_end == AtEnd::Remove
            && let Err(error) = self.remove_all()
        {
            tracing::warn!("{error}");
        }
    }

    /// Sleeps until there is a job, an event, or something due.
    fn wait(&mut self) {
        let compare_at = self.due.max(self.not_before);
        let wait = compare_at.saturating_duration_since(Instant::now());
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
                Ok(Job::Want {
                    wanted,
                    is_adopted,
                    done,
                }) => {
                    let result = match is_adopted {
                        true => self.adopt(wanted),
                        false => self.set(wanted),
                    };
                    // Nobody waits for an answer that cannot be sent.
                    let _ = done.try_send(result);
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
            self.complain(Some(Error::new(format!("{error}; trying again"))));
            self.compare_at(Instant::now());
        }
        for event in &events {
            let is_ours = match event {
                Event::Route(route) => {
                    let is_wanted = |wanted: &BTreeSet<_>| wanted.contains(&route.destination);
                    route.table == MAIN_TABLE && self.wanted.as_ref().is_some_and(is_wanted)
                }
                Event::Address(index) | Event::Link(index) => *index == self.device.oif,
                Event::LinkDeleted(index) if *index == self.device.oif => {
                    self.device_is_gone();
                    false
                }
                Event::LinkDeleted(_) => false,
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
        let Some(link) = self.find_device()? else {
            self.wanted = Some(wanted);
            return Ok(());
        };
        let old = self.wanted.take();
        let is_new = |prefix: &IpNet| old.as_ref().is_none_or(|old| !old.contains(prefix));
        let result = self.restore_routes(&link, &wanted, &is_new);
        self.wanted = match result.is_ok() {
            true => Some(wanted),
            false => old,
        };
        match result {
            // The fixes, and what was refused, are of those that were wanted before.
            Ok((_, refused)) => {
                if refused.is_some() {
                    self.compare_at(Instant::now() + RETRY_WAIT);
                }
                Ok(())
            }
            Err(error) => {
                // Takes back what was added.
                self.compare();
                Err(error)
            }
        }
    }

    /// See [`RouteReconciler::adopt`](super::RouteReconciler::adopt).
    fn adopt(&mut self, wanted: BTreeSet<IpNet>) -> Result<()> {
        self.wanted = Some(wanted);
        let is_told = |fix: &Fix| fix.winner.is_some();
        let result = self.reconcile(&is_told);
        if !matches!(result, Ok(None)) {
            self.compare_at(Instant::now() + RETRY_WAIT);
        }
        // What is refused is no reason to take back what the owner has changed: it was
        // wanted before, and may have been refused before.
        result.map(|refused| self.complain(refused))
    }

    /// Compares, and notes when to do so again.
    pub(super) fn compare(&mut self) {
        let started = Instant::now();
        self.due = started + TICK;
        self.note_quiet();
        let result = self.reconcile(&|_| true);
        if !matches!(result, Ok(None)) {
            self.compare_at(Instant::now() + RETRY_WAIT);
        }
        self.complain(result.unwrap_or_else(Some));
        let now = Instant::now();
        let cooldown = match self.fixes >= FIXES_MAX {
            true => COOLDOWN_CONTENDED,
            false => COOLDOWN,
        };
        self.not_before = now + cooldown.max((now - started) * COOLDOWN_FACTOR);
    }

    /// Makes the kernel's routes and the device's addresses what is wanted. Logs
    /// the fixes that `is_told` picks. Returns why something could not be fixed; what
    /// could is in force.
    ///
    /// # Errors
    /// When a socket fails.
    fn reconcile(&mut self, is_told: &dyn Fn(&Fix) -> bool) -> Result<Option<Error>> {
        self.watch_again()?;
        let Some(link) = self.find_device()? else {
            return Ok(None);
        };
        let Some(wanted) = self.wanted.take() else {
            return Ok(None);
        };
        let readdressed = self.restore_addresses(&link);
        let rerouted = self.restore_routes(&link, &wanted, &|_| false);
        self.wanted = Some(wanted);
        let (mut fixes, refused) = rerouted?;
        if !fixes.is_empty() {
            // The way to somebody may lead into the device again.
            self.tell_owner();
        }
        fixes.retain(is_told);
        self.note_fixes(&link.name, &fixes);
        Ok(readdressed?.or(refused))
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

    /// The device; `None` once it is gone.
    fn find_device(&mut self) -> Result<Option<Link>> {
        if self.device.oif == NO_DEVICE {
            return Ok(None);
        }
        let link = self.netlink.link_by_index(self.device.oif)?;
        if link.is_none() {
            self.device_is_gone();
        }
        Ok(link)
    }

    /// Gives the device back the addresses that it has lost. One of IPv6 that it
    /// has with another prefix length is left so. Returns why one was refused.
    fn restore_addresses(&mut self, link: &Link) -> Result<Option<Error>> {
        let present = self.netlink.addresses()?;
        let is_missing = |net: &IpNet| takes(link, net) && !present.contains(&(link.index, *net));
        let mut missing = self.addresses.clone();
        missing.retain(is_missing);
        let mut refused = None;
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
                Err(error) => refused = refused.or(Some(error)),
            }
        }
        Ok(refused)
    }

    /// Adds what is missing, puts ours in front where others' have overridden
    /// them, and deletes what is not wanted. Returns what was fixed, and why
    /// something could not be; both are not about new prefixes.
    ///
    /// # Errors
    /// When somebody has a route to a new prefix, or the kernel refuses one. Some
    /// changes may be in force.
    fn restore_routes(
        &mut self,
        link: &Link,
        wanted: &BTreeSet<IpNet>,
        is_new: &dyn Fn(&IpNet) -> bool,
    ) -> Result<(Vec<Fix>, Option<Error>)> {
        let table = RouteTable::read(&mut self.netlink, self.device, wanted)?;
        let new = wanted.iter().filter(|prefix| is_new(prefix));
        table.check_free(&mut self.netlink, new)?;
        let (mut changes, mut fixes, mut hopeless) = (Vec::new(), Vec::new(), None);
        for &prefix in wanted.iter().filter(|prefix| !table.is_right(prefix)) {
            let routes = table.to(&prefix);
            let (winner, is_v6) = (routes.winner, prefix.addr().is_ipv6());
            if is_new(&prefix) && !routes.has_ours {
                // What a device that is down cannot have comes when it is up.
                changes.extend(link.up.then_some(RouteChange::Add(prefix)));
            } else if routes.has_ours && is_v6 {
                hopeless = winner;
            } else if takes(link, &prefix) {
                // In IPv4 the only way to the front is to be added again.
                changes.extend(routes.has_ours.then_some(RouteChange::Delete(prefix)));
                changes.push(RouteChange::Prepend(prefix));
                fixes.push(Fix { prefix, winner });
            }
        }
        changes.extend(table.deletions(wanted));
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
        for (place, error) in self.netlink.change_device_routes(self.device, changes)? {
            match (changes[place], error.errno()) {
                // Somebody was faster, or the device was taken down just now: an
                // event tells.
                (_, Some(libc::ENETDOWN))
                | (RouteChange::Prepend(_), Some(libc::EEXIST | libc::ENODEV))
                | (RouteChange::Delete(_), Some(libc::ESRCH | libc::ENODEV)) => {}
                (RouteChange::Add(_), Some(libc::EEXIST)) => {
                    let hint = "somebody added a route to this prefix just now; try again";
                    return Err(error.hint(hint));
                }
                (RouteChange::Add(IpNet::V6(_)), Some(libc::ENODEV)) => {
                    let hint = format!("IPv6 needs an MTU of {IPV6_MTU_BYTES_MIN} bytes at least");
                    return Err(error.hint(hint));
                }
                (RouteChange::Add(_), _) => return Err(error),
                _ => refused = refused.or(Some(error)),
            }
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
    fn note_fixes(&mut self, name: &str, fixes: &[Fix]) {
        let [Fix { prefix, winner }, more @ ..] = fixes else {
            return;
        };
        let mut line = match winner {
            None => format!("route {prefix} on {name} was gone; put back"),
            Some(winner) => {
                let way = way(&mut self.netlink, winner);
                format!("route {prefix} on {name} was overridden by one {way}; put in front of it")
            }
        };
        if !more.is_empty() {
            line += &format!(" (and {} more)", more.len());
        }
        self.note_fix(name, line);
    }

    /// Counts a fix, and logs it unless there are too many.
    fn note_fix(&mut self, name: &str, line: String) {
        self.fixes = self.fixes.saturating_add(1);
        self.fixed_at = Instant::now();
        let quiet_s = QUIET_PERIOD.as_secs();
        match self.fixes {
            ..FIXES_LOGGED_MAX => tracing::warn!("{line}"),
            FIXES_LOGGED_MAX => {
                tracing::warn!("{line}; not logged again until it is quiet for {quiet_s} s");
            }
            FIXES_MAX => tracing::warn!(
                "somebody changes the routes or addresses of {name} again and again, the last \
                 time: {line}; from now on they are put back every {} s: have other network \
                 managers leave {name} and its prefixes alone",
                COOLDOWN_CONTENDED.as_secs()
            ),
            _ => {}
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

    /// Says what cannot be fixed, once; of what comes and goes, not each time.
    fn complain(&mut self, refused: Option<Error>) {
        let now = Instant::now();
        self.complaints.flush(now);
        let complaint = refused.map(|error| error.to_string());
        if self.complaint == complaint {
            return;
        }
        if let Some(text) = &complaint {
            if !self.complaints.admits(now) {
                return;
            }
            tracing::warn!("{text}");
        }
        self.complaint = complaint;
    }
}
