//! The thread that keeps the routes.
//!
//! - `news`: what the kernel tells.
//! - `repair`: what others have taken or overridden is put right.
//! - `change`: what the owner wants changed.

mod change;
mod news;
mod repair;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, TryRecvError};
use ipnet::IpNet;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::EventFd;

use super::AtEnd;
use super::backoff::Backoff;
use super::standing::Standings;
use crate::error::{Error, Result};
use crate::host::link::IPV6_MTU_BYTES_MIN;
use crate::host::netlink::{DeviceRoute, Link, Netlink, RouteEntry, Watch};
use crate::log::rate_limited::Journal;

pub use change::check_free;

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

/// In [`DeviceRoute::oif`], where no interface has this index: the device has
/// left the namespace, and another one may get the index that it had.
pub const NO_DEVICE: u32 = 0;

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
    /// The device's addresses.
    pub addresses: Vec<IpNet>,
    /// Tells the owner that something about the host has changed. It has room
    /// for one piece of news: a second one says nothing more.
    pub changes: Sender<()>,
    /// The owner's commands.
    pub commands: Receiver<Command>,
    /// Counts commands, to wake the thread.
    pub wake: Arc<EventFd>,
    /// Counts the routes that were added for the owner.
    pub added: Arc<AtomicUsize>,
    /// Whether the device is still there.
    pub has_device: Arc<AtomicBool>,
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

    fn takes_ipv6(&self) -> bool {
        self.mtu_bytes >= IPV6_MTU_BYTES_MIN
    }

    /// The owner comes to it when it has the time.
    fn tell_owner(&self) {
        let _ = self.parts.changes.try_send(());
    }

    /// Whether the device's MTU allows for the prefix's IP version.
    fn has_room_for(&self, prefix: &IpNet) -> bool {
        matches!(prefix, IpNet::V4(_)) || self.takes_ipv6()
    }

    /// Logs a line if there were not too many; it is made only then.
    fn warn(&mut self, line: impl FnOnce(&mut Parts) -> String) {
        if self.journal.admits(Instant::now()) {
            let line = line(&mut self.parts);
            tracing::warn!("{line}");
        }
    }
}

impl Parts {
    /// The device's name now.
    fn name(&mut self) -> String {
        self.netlink.name_for_error(self.ours.oif)
    }
}

/// How the wanted prefixes stand, and all that have routes of ours.
fn standings(parts: &mut Parts, wanted: &BTreeSet<IpNet>) -> Result<Standings> {
    Standings::read(&mut parts.netlink, parts.ours, wanted)
}

/// The device, unless it is down or gone.
fn device_if_up(parts: &mut Parts) -> Result<Option<Link>> {
    if parts.ours.oif == NO_DEVICE {
        return Ok(None);
    }
    let link = parts.netlink.link_by_index(parts.ours.oif)?;
    Ok(link.filter(|link| link.up))
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
