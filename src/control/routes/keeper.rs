//! The thread that keeps the routes.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, TryRecvError};
use ipnet::IpNet;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::EventFd;

use super::AtEnd;
use super::backoff::Backoff;
use super::standing::{Standing, Standings, may_harm};
use crate::control::journal::Journal;
use crate::device::link::IPV6_MTU_BYTES_MIN;
use crate::error::{Error, Result};
use crate::netlink::device_route::MAIN_TABLE;
use crate::netlink::{DeviceRoute, Link, Netlink, News, RouteChange, RouteEntry, Watch};

/// Datagrams of news read before commands are looked at again.
const NEWS_PER_TURN_MAX: usize = 256;

/// A comparison is paid for with a rest so many times as long as it took, and
/// no longer than that: a fifth of one core is what a restless host with a huge
/// table can cost us.
const REST_FACTOR: u32 = 4;
const REST_MAX: Duration = Duration::from_secs(5);

/// Rests may be put off until they come to this, so that the first answers on a
/// quiet host come at once.
const CREDIT: Duration = Duration::from_secs(2);

/// How long after a failure of the kernel's it is asked again.
const RETRY_WAIT: Duration = Duration::from_secs(1);

/// What the owner can ask.
pub enum Command {
    /// See [`RouteKeeper::set`](super::RouteKeeper::set).
    Set {
        /// Masked prefixes.
        wanted: BTreeSet<IpNet>,
        /// Takes one answer.
        answer: Sender<Result<()>>,
    },
    /// See [`RouteKeeper::resume`](super::RouteKeeper::resume).
    Resume {
        /// Masked prefixes.
        wanted: BTreeSet<IpNet>,
        /// Takes one answer.
        answer: Sender<Result<()>>,
    },
    /// See [`RouteKeeper::go_on`](super::RouteKeeper::go_on).
    GoOn {
        /// Masked prefixes.
        wanted: BTreeSet<IpNet>,
        /// Takes one answer.
        answer: Sender<Result<()>>,
    },
    /// Ends the thread.
    End(AtEnd),
}

/// What the thread starts with.
pub struct Parts {
    /// For changes; its changes are not among the news.
    pub netlink: Netlink,
    /// What others change.
    pub watch: Watch,
    /// How our routes are told from others'.
    pub ours: DeviceRoute,
    /// The device's name, for log lines.
    pub name: String,
    /// The device's addresses.
    pub addresses: Vec<IpNet>,
    /// Tells the owner that something about the host has changed. It has room
    /// for one piece of news: a second one says nothing more.
    pub changes: Sender<()>,
    /// The owner's commands.
    pub commands: Receiver<Command>,
    /// Counts commands, to wake the thread.
    pub wake: Arc<EventFd>,
}

/// The thread's state.
pub struct Keeper {
    parts: Parts,
    epoll: Epoll,
    wanted: BTreeSet<IpNet>,
    /// Whether the device is up, as far as is known.
    up: bool,
    /// The device's MTU in bytes, as far as is known.
    mtu_bytes: u32,
    /// Whether the device may have lost addresses.
    addresses_due: bool,
    /// Whether there may be routes of ours that are not wanted.
    strays_due: bool,
    /// When to listen anew, since listening has failed; `None`: it works.
    watch_due: Option<Instant>,
    /// When to compare the table with what is wanted; `None`: no reason to.
    due: Option<Instant>,
    /// When all comparisons so far are paid for.
    paid_at: Instant,
    backoff: Backoff,
    /// The same for the device's addresses.
    addresses_backoff: Backoff,
    journal: Journal,
}

/// What has to be done about a wanted prefix that is not right.
struct Repair {
    prefix: IpNet,
    standing: Standing,
}

impl Keeper {
    /// Finds the routes that a predecessor has left.
    pub fn new(mut parts: Parts) -> Result<Self> {
        let failed = |errno: nix::errno::Errno| Error::os("cannot create an epoll", errno.into());
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(failed)?;
        let readable = EpollEvent::new(EpollFlags::EPOLLIN, 0);
        epoll.add(&parts.wake, readable).map_err(failed)?;
        epoll.add(&parts.watch, readable).map_err(failed)?;
        let link = device_if_up(&mut parts)?;
        let wanted: BTreeSet<IpNet> = standings(&mut parts, &BTreeSet::new())?.ours().collect();
        Ok(Self {
            parts,
            epoll,
            up: link.is_some(),
            mtu_bytes: link.map_or(IPV6_MTU_BYTES_MIN, |link| link.mtu),
            // Until now nobody has kept anything.
            addresses_due: true,
            strays_due: false,
            watch_due: None,
            due: Some(Instant::now()),
            wanted,
            paid_at: Instant::now(),
            backoff: Backoff::default(),
            addresses_backoff: Backoff::default(),
            journal: Journal::new("route events"),
        })
    }

    /// Runs until told to end.
    pub fn run(mut self) {
        let at_end = loop {
            self.wait();
            if let Some(at_end) = self.take_commands() {
                break at_end;
            }
            self.keep_listening();
            let now = Instant::now();
            if self.next_comparison().is_some_and(|due| due <= now) {
                self.due = None;
                if let Err(error) = self.put_right() {
                    self.warn(|_| error.to_string());
                    self.compare_at(Instant::now() + RETRY_WAIT);
                }
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

    /// Sleeps until there is a command, news, or something due.
    fn wait(&mut self) {
        let next = [self.next_comparison(), self.journal.due(), self.watch_due];
        let timeout = match next.into_iter().flatten().min() {
            None => EpollTimeout::NONE,
            Some(next) => {
                let wait = next.saturating_duration_since(Instant::now());
                // Rounded up: a timeout of zero too many would make it spin.
                let milliseconds = wait.as_millis().saturating_add(1).min(u128::from(u16::MAX));
                EpollTimeout::from(milliseconds as u16)
            }
        };
        let mut events = [EpollEvent::empty(); 2];
        // Interrupted or not, everything is looked at.
        let _ = self.epoll.wait(&mut events, timeout);
        let _ = self.parts.wake.read();
    }

    fn next_comparison(&self) -> Option<Instant> {
        let due = self.due?;
        let rested_at = self.paid_at.checked_sub(CREDIT);
        Some(rested_at.map_or(due, |rested_at| due.max(rested_at)))
    }

    fn compare_at(&mut self, at: Instant) {
        self.due = Some(self.due.map_or(at, |due| due.min(at)));
    }

    fn take_commands(&mut self) -> Option<AtEnd> {
        loop {
            match self.parts.commands.try_recv() {
                // Nobody waits for an answer that cannot be sent.
                Ok(Command::Set { wanted, answer }) => {
                    let _ = answer.try_send(self.set(wanted));
                }
                Ok(Command::Resume { wanted, answer }) => {
                    let _ = answer.try_send(self.resume(wanted));
                }
                Ok(Command::GoOn { wanted, answer }) => {
                    let _ = answer.try_send(self.go_on(wanted));
                }
                Ok(Command::End(at_end)) => return Some(at_end),
                Err(TryRecvError::Empty) => return None,
                Err(TryRecvError::Disconnected) => return Some(AtEnd::Remove),
            }
        }
    }

    /// Reads the news. When that fails, it listens anew after a while, for as
    /// long as it takes: what is amiss may pass, as when memory was short.
    fn keep_listening(&mut self) {
        let now = Instant::now();
        let result = match self.watch_due {
            None => self.read_news(),
            Some(due) if due <= now => self.listen_anew(),
            Some(_) => return,
        };
        match result {
            Ok(()) => self.watch_due = None,
            Err(error) => {
                self.warn(|_| format!("{error}; trying again"));
                // A failed socket would be ready at all times.
                let _ = self.epoll.delete(&self.parts.watch);
                self.watch_due = Some(now + RETRY_WAIT);
            }
        }
    }

    fn listen_anew(&mut self) -> Result<()> {
        self.parts.watch = Watch::open(&self.parts.netlink)?;
        self.epoll
            .add(&self.parts.watch, EpollEvent::new(EpollFlags::EPOLLIN, 0))
            .map_err(|errno| Error::os("cannot wait for changes to routes", errno.into()))?;
        // Whatever has happened meanwhile, nobody has told.
        self.note_loss(Instant::now());
        Ok(())
    }

    fn read_news(&mut self) -> Result<()> {
        let mut list = Vec::new();
        // What is left makes the next wait return at once.
        self.parts
            .watch
            .read(NEWS_PER_TURN_MAX, &mut |news| list.push(news))?;
        if !list.is_empty() {
            self.tell_owner();
        }
        let now = Instant::now();
        for news in list {
            match news {
                News::RouteAdded(entry) if may_harm(&entry, self.parts.ours) => {
                    self.suspect(&entry, now);
                }
                News::RouteDeleted(entry) if entry.oif == Some(self.parts.ours.oif) => {
                    self.suspect(&entry, now);
                }
                News::Link {
                    index,
                    up,
                    mtu_bytes,
                } if index == self.parts.ours.oif => {
                    self.note_link(up, now);
                    self.note_mtu(mtu_bytes.unwrap_or(self.mtu_bytes), now);
                }
                // With its last IPv4 address the device has lost all IPv4 routes,
                // of which nothing is told.
                News::Address { index } if index == self.parts.ours.oif => {
                    self.addresses_due = true;
                    self.compare_at(now);
                }
                News::LinkDeleted { index } if index == self.parts.ours.oif => self.up = false,
                News::Lost => {
                    tracing::debug!("news of route changes was lost; comparing all routes");
                    self.note_loss(now);
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Something has happened to the route of a prefix.
    fn suspect(&mut self, entry: &RouteEntry, now: Instant) {
        let prefix = &entry.destination;
        if self.up && entry.table == MAIN_TABLE && self.wanted.contains(prefix) {
            let at = self.backoff.wait_until(prefix, now).unwrap_or(now);
            self.compare_at(at);
        }
    }

    fn note_link(&mut self, up: bool, now: Instant) {
        if self.up && !up {
            self.up = false;
            self.warn(|parts| {
                format!(
                    "interface {} was taken down: its routes are gone until it is up again",
                    parts.name
                )
            });
        } else if !self.up && up {
            self.compare_at(now);
        }
    }

    /// Below the least MTU that IPv6 may have, the kernel takes all of it away
    /// from the device (`addrconf_notify()` in net/ipv6/addrconf.c).
    fn note_mtu(&mut self, mtu_bytes: u32, now: Instant) {
        let took_ipv6 = self.takes_ipv6();
        self.mtu_bytes = mtu_bytes;
        if took_ipv6 == self.takes_ipv6() {
            return;
        }
        if self.takes_ipv6() {
            self.addresses_due = true;
            self.compare_at(now);
        } else {
            self.warn(|parts| {
                format!(
                    "interface {} has an MTU of {mtu_bytes} bytes now, and IPv6 needs \
                     {IPV6_MTU_BYTES_MIN}: its IPv6 routes are gone until it has that again",
                    parts.name
                )
            });
        }
    }

    fn takes_ipv6(&self) -> bool {
        self.mtu_bytes >= IPV6_MTU_BYTES_MIN
    }

    /// Anything may have happened; also that the device was down and is up again.
    fn note_loss(&mut self, now: Instant) {
        self.addresses_due = true;
        self.compare_at(now);
        self.tell_owner();
    }

    /// The owner comes to it when it has the time.
    fn tell_owner(&self) {
        let _ = self.parts.changes.try_send(());
    }

    /// Compares the kernel's table with what is wanted, and puts right what
    /// may be put right now.
    fn put_right(&mut self) -> Result<()> {
        let started = Instant::now();
        let was_up = self.up;
        let Some(link) = device_if_up(&mut self.parts)? else {
            // News of the link wakes us again.
            self.note_link(false, started);
            return Ok(());
        };
        self.up = true;
        self.note_mtu(link.mtu, started);
        let mut in_peace = was_up;
        self.addresses_due |= !was_up;
        if self.addresses_due {
            in_peace &= !self.restore_addresses(was_up, started)?;
        }
        let standings = standings(&mut self.parts, &self.wanted)?;
        let strays: Vec<IpNet> = standings
            .ours()
            .filter(|prefix| self.strays_due && !self.wanted.contains(prefix))
            .collect();
        let mut repairs = Vec::new();
        let mut postponed: Option<Instant> = None;
        for prefix in self
            .wanted
            .iter()
            .filter(|prefix| self.has_room_for(prefix) && !standings.is_right(prefix))
        {
            match self.backoff.wait_until(prefix, started) {
                Some(at) if in_peace => {
                    postponed = Some(postponed.map_or(at, |earliest| earliest.min(at)));
                }
                _ => repairs.push(Repair {
                    prefix: *prefix,
                    standing: standings.of(prefix),
                }),
            }
        }
        drop(standings);
        if let Some(at) = postponed {
            self.compare_at(at);
        }
        self.backoff
            .forget(started, |prefix| self.wanted.contains(prefix));
        let addresses = &self.parts.addresses;
        self.addresses_backoff
            .forget(started, |address| addresses.contains(address));
        let repaired = self.repair(&repairs, in_peace);
        if !repairs.is_empty() {
            // The way to somebody may lead into the device again.
            self.tell_owner();
        }
        let cleared = self.delete_all(&strays);
        self.strays_due &= cleared.is_err();
        let now = Instant::now();
        self.paid_at = self.paid_at.max(now) + ((now - started) * REST_FACTOR).min(REST_MAX);
        repaired.and(cleared)
    }

    /// `in_peace`: the device has not just come up, nor had it lost addresses.
    ///
    /// Who gets a backoff, and who a log line: what has gone with the device or
    /// its addresses is nobody's attack on a prefix, so it is put back whatever
    /// was before, counts for nothing, and has one line for all. What somebody
    /// has done to a prefix in peace counts for that prefix's backoff, and has a
    /// line of its own. A prefix that cannot be put right counts at all times,
    /// and is tried again when its backoff allows it, and not at once.
    fn repair(&mut self, repairs: &[Repair], in_peace: bool) -> Result<()> {
        let ours = self.parts.ours;
        let mut changes = Vec::with_capacity(repairs.len());
        for repair in repairs {
            // In IPv4 the only way to the front is to be added again.
            if repair.standing.has_ours && matches!(repair.prefix, IpNet::V4(_)) {
                changes.push(RouteChange::Delete(repair.prefix));
            }
            changes.push(RouteChange::Prepend(repair.prefix));
        }
        let refusals = self.parts.netlink.change_device_routes(ours, &changes)?;
        let mut failed = BTreeSet::new();
        // The device may be down or gone: that is news as well. If it is not,
        // it is the prefix's IP version that it does not take now.
        let is_missing = |(_, error): &(usize, Error)| {
            matches!(error.errno(), Some(libc::ENETDOWN | libc::ENODEV))
        };
        if refusals.iter().any(is_missing) && device_if_up(&mut self.parts)?.is_none() {
            self.up = false;
            return Ok(());
        }
        for (place, error) in refusals {
            match (changes[place], error.errno()) {
                // Somebody was faster; what comes of it is news.
                (RouteChange::Prepend(_), Some(libc::EEXIST))
                | (RouteChange::Delete(_), Some(libc::ESRCH)) => {}
                (change, _) => {
                    failed.insert(change.prefix());
                    self.warn(|_| error.to_string());
                }
            }
        }
        let now = Instant::now();
        let count = repairs.len() - failed.len();
        if !in_peace && count > 0 {
            self.warn(|parts| format!("interface {}: {count} routes put back", parts.name));
        }
        for Repair { prefix, standing } in repairs {
            // An IPv6 route that is there and does not win cannot be helped.
            let hopeless = standing.has_ours && matches!(prefix, IpNet::V6(_));
            if in_peace || failed.contains(prefix) || hopeless {
                let again_at = self.backoff.answered(*prefix, now);
                if failed.contains(prefix) || hopeless {
                    self.compare_at(again_at.max(now + RETRY_WAIT));
                }
            }
            if in_peace && !failed.contains(prefix) {
                self.warn(|parts| describe(parts, *prefix, standing, hopeless));
            }
        }
        Ok(())
    }

    /// Whether the device's MTU allows for the prefix's IP version.
    fn has_room_for(&self, prefix: &IpNet) -> bool {
        matches!(prefix, IpNet::V4(_)) || self.takes_ipv6()
    }

    /// Gives the device back the addresses that it has lost; tells whether it got
    /// any. One that it does not take (IPv6 may be switched off on it by now) is
    /// not tried again until its addresses change: the routes are worth having
    /// without. Nor is one of IPv6 that it has with another prefix length.
    ///
    /// If the device was up, somebody has taken them away: that counts for their
    /// backoff, as with routes, and each has a line.
    fn restore_addresses(&mut self, was_up: bool, now: Instant) -> Result<bool> {
        let index = self.parts.ours.oif;
        let present = self.parts.netlink.addresses()?;
        self.addresses_due = false;
        let mut was_given_any = false;
        for address in self.parts.addresses.clone() {
            if present.contains(&(index, address)) || !self.has_room_for(&address) {
                continue;
            }
            if was_up {
                if let Some(at) = self.addresses_backoff.wait_until(&address, now) {
                    self.addresses_due = true;
                    self.compare_at(at);
                    continue;
                }
                self.addresses_backoff.answered(address, now);
            }
            match self.parts.netlink.add_address(index, address) {
                Ok(()) => {
                    was_given_any = true;
                    if was_up {
                        self.warn(|parts| {
                            format!("address {address} on {} was gone; put back", parts.name)
                        });
                    }
                }
                Err(error) if error.errno() == Some(libc::EEXIST) => {}
                Err(error) => {
                    if matches!(error.errno(), Some(libc::ENOBUFS | libc::ENOMEM)) {
                        self.addresses_due = true;
                        self.compare_at(now + RETRY_WAIT);
                    }
                    self.warn(|_| error.to_string());
                }
            }
        }
        Ok(was_given_any)
    }

    pub(super) fn set(&mut self, wanted: BTreeSet<IpNet>) -> Result<()> {
        let standings = standings(&mut self.parts, &wanted)?;
        let fresh = wanted.difference(&self.wanted);
        check_free(&mut self.parts.netlink, &standings, fresh)?;
        // That the device is up is taken note of with the news alone, because
        // more than routes may have to be put back then.
        let link = device_if_up(&mut self.parts)?;
        let up = link.is_some();
        self.up &= up;
        let takes_ipv6 = link.is_some_and(|link| link.mtu >= IPV6_MTU_BYTES_MIN);
        let missing: Vec<IpNet> = wanted
            .iter()
            .filter(|prefix| up && !standings.is_right(prefix) && !standings.of(prefix).has_ours)
            // Those that were wanted before come back with IPv6.
            .filter(|prefix| {
                takes_ipv6 || matches!(prefix, IpNet::V4(_)) || !self.wanted.contains(prefix)
            })
            .copied()
            .collect();
        let surplus: Vec<IpNet> = standings
            .ours()
            .filter(|prefix| !wanted.contains(prefix))
            .collect();
        drop(standings);
        let changed = self
            .add_all(&missing)
            .and_then(|()| self.delete_all(&surplus));
        if let Err(error) = changed {
            self.undo(&missing);
            return Err(error);
        }
        self.wanted = wanted;
        Ok(())
    }

    /// [`Self::set`] for prefixes that were wanted before.
    fn resume(&mut self, wanted: BTreeSet<IpNet>) -> Result<()> {
        self.wanted.extend(&wanted);
        let result = self.set(wanted);
        if result.is_err() {
            self.compare_at(Instant::now());
        }
        result
    }

    /// [`Self::set`]; if that fails, all are wanted nevertheless, as they would
    /// be if what is in the way had come a moment later.
    fn go_on(&mut self, wanted: BTreeSet<IpNet>) -> Result<()> {
        let result = self.set(wanted.clone());
        if result.is_err() {
            self.wanted = wanted;
            self.strays_due = true;
            self.compare_at(Instant::now());
        }
        result
    }

    /// Adds routes. One that was wanted before and is refused is no error: it is
    /// tried again.
    fn add_all(&mut self, prefixes: &[IpNet]) -> Result<()> {
        // Those that were wanted before may have to go in front of others'.
        let changes: Vec<RouteChange> = prefixes
            .iter()
            .map(|&prefix| match self.wanted.contains(&prefix) {
                true => RouteChange::Prepend(prefix),
                false => RouteChange::Add(prefix),
            })
            .collect();
        let refusals = self
            .parts
            .netlink
            .change_device_routes(self.parts.ours, &changes)?;
        for (place, error) in refusals {
            match (changes[place], error.errno()) {
                // Taken down since we looked: they come when it is up.
                (_, Some(libc::ENETDOWN)) => self.up = false,
                (RouteChange::Prepend(_), _) => self.compare_at(Instant::now() + RETRY_WAIT),
                (_, Some(libc::EEXIST)) => {
                    return Err(
                        error.hint("somebody added a route to this prefix just now; try again")
                    );
                }
                (RouteChange::Add(IpNet::V6(_)), Some(libc::ENODEV)) => {
                    return Err(error.hint(format!(
                        "IPv6 needs an MTU of {IPV6_MTU_BYTES_MIN} bytes at least"
                    )));
                }
                _ => return Err(error),
            }
        }
        Ok(())
    }

    /// Takes back what a change that has failed may have added. What cannot be
    /// taken back now, and what it may have deleted, is put right with the next
    /// comparison.
    pub(super) fn undo(&mut self, added: &[IpNet]) {
        let fresh: Vec<IpNet> = added
            .iter()
            .filter(|prefix| !self.wanted.contains(prefix))
            .copied()
            .collect();
        if let Err(error) = self.delete_all(&fresh) {
            self.warn(|_| error.to_string());
        }
        self.strays_due = true;
        self.compare_at(Instant::now());
    }

    /// Deletes routes, as many as can be; those that are gone are none the worse.
    fn delete_all(&mut self, prefixes: &[IpNet]) -> Result<()> {
        let changes: Vec<RouteChange> = prefixes.iter().copied().map(RouteChange::Delete).collect();
        let refusals = self
            .parts
            .netlink
            .change_device_routes(self.parts.ours, &changes)?;
        let failure = refusals
            .into_iter()
            .find(|(_, error)| error.errno() != Some(libc::ESRCH));
        failure.map_or(Ok(()), |(_, error)| Err(error))
    }

    fn remove_all(&mut self) -> Result<()> {
        let owned: Vec<IpNet> = standings(&mut self.parts, &BTreeSet::new())?
            .ours()
            .collect();
        self.delete_all(&owned)
    }

    /// Logs a line if there were not too many; it is made only then.
    fn warn(&mut self, line: impl FnOnce(&mut Parts) -> String) {
        if self.journal.admits(Instant::now()) {
            let line = line(&mut self.parts);
            tracing::warn!("{line}");
        }
    }
}

/// Makes sure that nobody's route is in the way of one to any of the prefixes.
///
/// # Errors
/// Names the first one with such a route.
pub fn check_free<'a>(
    netlink: &mut Netlink,
    standings: &Standings,
    prefixes: impl Iterator<Item = &'a IpNet>,
) -> Result<()> {
    let mut blocked = prefixes.filter_map(|prefix| {
        let standing = standings.of(prefix);
        // A predecessor's route, or one that is as good, holds its ground.
        let free = standing.has_ours || standings.is_right(prefix);
        standing.obstacle.filter(|_| !free)
    });
    match blocked.next() {
        Some(obstacle) => Err(conflict(netlink, &obstacle, blocked.count())),
        None => Ok(()),
    }
}

/// How the wanted prefixes stand, and all that have routes of ours.
fn standings(parts: &mut Parts, wanted: &BTreeSet<IpNet>) -> Result<Standings> {
    Standings::read(&mut parts.netlink, parts.ours, wanted)
}

/// The device, unless it is down or gone.
fn device_if_up(parts: &mut Parts) -> Result<Option<Link>> {
    let link = parts.netlink.link_by_index(parts.ours.oif)?;
    Ok(link.filter(|link| link.up))
}

/// What happened to a prefix, and what was done.
fn describe(parts: &mut Parts, prefix: IpNet, standing: &Standing, hopeless: bool) -> String {
    let way = standing
        .winner
        .map(|winner| way(&mut parts.netlink, &winner));
    let name = &parts.name;
    match way {
        None => format!("route {prefix} on {name} was deleted; put back"),
        Some(way) if hopeless => format!(
            "route {prefix} on {name} is overridden by one {way} that nothing can override; \
             remove that (ip -6 route del)"
        ),
        Some(way) => {
            format!("route {prefix} on {name} was overridden by one {way}; put in front of it")
        }
    }
}

/// The error that a route of somebody else's is in the way; `others`: so are
/// more of them.
fn conflict(netlink: &mut Netlink, obstacle: &RouteEntry, others: usize) -> Error {
    let way = way(netlink, obstacle);
    let more = match others {
        0 => String::new(),
        others => format!(" (and {others} more prefixes have routes)"),
    };
    Error::new(format!(
        "route {} exists already {way}{more}",
        obstacle.destination
    ))
    .hint("remove it, leave it out of --peer and --route, or leave routes alone with --no-routes")
}

/// Where a route leads, in words.
fn way(netlink: &mut Netlink, entry: &RouteEntry) -> String {
    match entry.oif {
        _ if !entry.unicast => "that drops packets".to_string(),
        None => "with several next hops".to_string(),
        Some(index) => match netlink.link_by_index(index) {
            Ok(Some(link)) => format!("on {}", link.name),
            _ => format!("on interface number {index}"),
        },
    }
}
