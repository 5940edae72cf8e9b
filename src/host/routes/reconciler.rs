//! What the kernel has, compared with what is wanted, and fixed where it differs.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;
use ipnet::IpNet;
use tracing::field::display;

use super::table::{RouteTable, by_way};
use crate::error::{Error, Result};
use crate::host::link::IPV6_MTU_BYTES_MIN;
use crate::host::netlink::route::MAIN_TABLE;
use crate::host::netlink::{Event, Link, Netlink, Route, RouteChange, Watch};

/// How often there is a comparison when no event asks for one: not all changes
/// are reported.
const TICK: Duration = Duration::from_secs(60);

/// How long after the kernel has refused something it is tried again.
pub(super) const RETRY_WAIT: Duration = Duration::from_secs(5);

/// So many fixes and failures in a row are logged, until none have occurred for a
/// while.
pub(super) const LOGGED_MAX: u32 = 5;
const QUIET_PERIOD: Duration = Duration::from_secs(30);

/// Datagrams of events read in one go.
const EVENT_DATAGRAMS_MAX: usize = 256;

/// A wanted prefix whose packets went elsewhere: by this route, if by any.
type Fix = (IpNet, Option<Route>);

/// What the kernel refused, and why.
type Refusals = Vec<(IpNet, Error)>;

/// What is wanted, and how the kernel is asked for it.
pub struct Reconciler {
    /// Its changes are not among the events.
    netlink: Netlink,
    /// Index of the device that our routes go through; `None` once it has left the
    /// namespace, when another one may get its index.
    device: Option<u32>,
    /// Whether there is a `device`, for callers that cannot wait for a comparison.
    pub has_device: Arc<AtomicBool>,
    addresses: Vec<IpNet>,
    wanted: BTreeSet<IpNet>,
    /// When the next comparison is due.
    pub due: Instant,
    /// Fixes and failures since the last quiet period, and when the last one was.
    logged: u32,
    logged_at: Instant,
    /// What could not be fixed the last time, as far as it was logged: it is when it
    /// changes.
    complaint: Option<String>,
    changes: Sender<()>,
}

impl Reconciler {
    /// See [`super::RouteReconciler::start`].
    pub(crate) fn new(
        netlink: Netlink,
        device: Option<u32>,
        addresses: Vec<IpNet>,
        kept: BTreeSet<IpNet>,
        changes: Sender<()>,
    ) -> Self {
        let now = Instant::now();
        Self {
            netlink,
            device,
            has_device: Arc::new(AtomicBool::new(device.is_some())),
            addresses,
            wanted: kept,
            due: now,
            logged: 0,
            logged_at: now,
            complaint: None,
            changes,
        }
    }

    /// Reads what others have changed, and compares if that may concern us or the
    /// time has come.
    pub(super) fn follow(&mut self, watch: &mut Watch) {
        let (mut is_any, mut is_ours) = (false, false);
        // What is left makes the next wait return at once.
        watch.read(EVENT_DATAGRAMS_MAX, &mut |event| {
            is_any = true;
            is_ours |= match event {
                Event::Route(route) => {
                    route.table == MAIN_TABLE && self.wanted.contains(&route.destination)
                }
                Event::Link(index) => self.device == Some(index),
                Event::LinkDeleted(index) => {
                    self.keep_device(|device| device != index);
                    false
                }
                Event::Lost => true,
            };
        });
        if is_any {
            self.tell_owner();
        }
        if is_ours || self.due <= Instant::now() {
            self.compare(true);
        }
    }

    /// The owner comes to it when it has the time.
    fn tell_owner(&self) {
        let _ = self.changes.try_send(());
    }

    /// See [`super::RouteReconciler::set`].
    pub(super) fn set(&mut self, wanted: BTreeSet<IpNet>) -> Result<()> {
        let old = std::mem::replace(&mut self.wanted, wanted);
        let result = self.set_new(&|prefix| !old.contains(prefix));
        if result.is_err() {
            // Takes back what was added.
            self.wanted = old;
            self.compare(true);
        }
        result
    }

    fn set_new(&mut self, is_new: &dyn Fn(&IpNet) -> bool) -> Result<()> {
        let Some(link) = self.find_device()? else {
            return Ok(());
        };
        let table = RouteTable::read(&mut self.netlink, self.device, &self.wanted)?;
        let new = self.wanted.iter().filter(|prefix| is_new(prefix));
        table.check_free(&mut self.netlink, new)?;
        let (_, refused) = self.restore_routes(&link, &table)?;
        // Others were wanted before, and may have been refused before.
        let mut refused = refused.into_iter().filter(|(prefix, _)| is_new(prefix));
        refused.next().map_or(Ok(()), |(_, error)| Err(error))
    }

    /// Makes the kernel's routes and the device's addresses what is wanted. `is_logged`:
    /// logs what somebody had changed.
    pub(super) fn compare(&mut self, is_logged: bool) {
        let result = self.reconcile(is_logged);
        let wait = match result {
            Ok(None) => TICK,
            _ => RETRY_WAIT,
        };
        self.due = Instant::now() + wait;
        self.complain(result.unwrap_or_else(Some));
    }

    /// See [`Self::compare`]. Returns why something could not be fixed; what could is
    /// in force.
    ///
    /// # Errors
    /// When the socket fails.
    fn reconcile(&mut self, is_logged: bool) -> Result<Option<Error>> {
        let Some(link) = self.find_device()? else {
            return Ok(None);
        };
        let readdressed = self.restore_addresses(&link, is_logged)?;
        let table = RouteTable::read(&mut self.netlink, self.device, &self.wanted)?;
        let (fixes, refused) = self.restore_routes(&link, &table)?;
        if !fixes.is_empty() {
            // The route to a peer may lead into the device again.
            self.tell_owner();
        }
        if is_logged {
            self.log_fixes(&link.name, &fixes);
        }
        // The routes are worth having without an address.
        let refused = refused.into_iter().next().map(|(_, error)| error);
        Ok(readdressed.or(refused))
    }

    /// The device; `None` once it is gone.
    fn find_device(&mut self) -> Result<Option<Link>> {
        let Some(index) = self.device else {
            return Ok(None);
        };
        let link = self.netlink.link_by_index(index)?;
        self.keep_device(|_| link.is_some());
        Ok(link)
    }

    fn keep_device(&mut self, is_there: impl FnOnce(u32) -> bool) {
        self.device = self.device.filter(|&device| is_there(device));
        let has_device = self.device.is_some();
        self.has_device.store(has_device, Ordering::Release);
    }

    /// Gives the device back the addresses that it has lost. One of IPv6 that it
    /// has with another prefix length is left so. Returns why one was refused.
    fn restore_addresses(&mut self, link: &Link, is_logged: bool) -> Result<Option<Error>> {
        let present = self.netlink.addresses()?;
        let is_missing = |net: &IpNet| takes(link, net) && !present.contains(&(link.index, *net));
        let mut missing = self.addresses.clone();
        missing.retain(is_missing);
        let mut refused = None;
        for address in missing {
            match self.netlink.add_address(link.index, address) {
                Ok(()) if is_logged => {
                    let name = &link.name;
                    self.log(
                        &format!("address {address} on {name} was gone; put back"),
                        Some((name, address)),
                    );
                }
                Ok(()) => {}
                Err(error) if error.errno() == Some(libc::EEXIST) => {}
                Err(error) => refused = Some(error),
            }
        }
        Ok(refused)
    }

    /// Adds what is missing, puts ours in front where others' have overridden
    /// them, and deletes what is not wanted. Returns what was fixed and what could not
    /// be.
    ///
    /// # Errors
    /// When the socket fails. Some changes may be in force.
    fn restore_routes(&mut self, link: &Link, table: &RouteTable) -> Result<(Vec<Fix>, Refusals)> {
        let (mut changes, mut fixes, mut refused) = (Vec::new(), Vec::new(), Vec::new());
        for &prefix in self.wanted.iter().filter(|prefix| !table.is_right(prefix)) {
            let (winner, has_ours) = (table.winners.get(&prefix), table.ours.contains(&prefix));
            if let (Some(winner), true, IpNet::V6(_)) = (winner, has_ours, prefix) {
                let by_way = by_way(&mut self.netlink, winner);
                let error = Error::new(format!("route {prefix} is overridden by one {by_way}"))
                    .hint("nothing can override that: remove it (ip -6 route del)");
                refused.push((prefix, error));
            } else if takes(link, &prefix) {
                // In IPv4 the only way to the front is to be added again.
                changes.extend(has_ours.then_some(RouteChange::Delete(prefix)));
                changes.push(RouteChange::Add(prefix));
                fixes.push((prefix, winner.copied()));
            }
        }
        changes.extend(table.deletions(&self.wanted));
        let failed = self.netlink.change_device_routes(link.index, &changes)?;
        // Somebody was faster, or the device was taken down just now: an event follows.
        let is_overtaken = |error: &Error| {
            let errno = error.errno();
            [libc::EEXIST, libc::ESRCH, libc::ENETDOWN, libc::ENODEV]
                .map(Some)
                .contains(&errno)
        };
        refused.extend(failed.into_iter().filter(|(_, error)| !is_overtaken(error)));
        Ok((fixes, refused))
    }

    /// Says what was fixed, in one line.
    fn log_fixes(&mut self, name: &str, fixes: &[Fix]) {
        let [(prefix, winner), more @ ..] = fixes else {
            return;
        };
        let mut line = match winner {
            None => format!("route {prefix} on {name} was gone; put back"),
            Some(winner) => {
                let by_way = by_way(&mut self.netlink, winner);
                format!(
                    "route {prefix} on {name} was overridden by one {by_way}; put in front of it"
                )
            }
        };
        if !more.is_empty() {
            line += &format!(" (and {} more)", more.len());
        }
        self.log(&line, Some((name, *prefix)));
    }

    /// Says what cannot be fixed, once.
    pub(super) fn complain(&mut self, refused: Option<Error>) {
        let complaint = refused.map(|error| error.to_string());
        if let Some(text) = complaint.as_ref().filter(|_| self.complaint != complaint) {
            let logged_at = self.logged_at;
            if !self.log(text, None) {
                // It comes again and again, and is logged once all others are quiet.
                self.logged_at = logged_at;
                return;
            }
        }
        self.complaint = complaint;
    }

    /// Logs a line unless there are too many; tells whether it did. `route`: what it is about,
    /// and the device's name.
    fn log(&mut self, line: &str, route: Option<(&str, IpNet)>) -> bool {
        if self.logged_at.elapsed() >= QUIET_PERIOD {
            self.logged = 0;
        }
        self.logged_at = Instant::now();
        self.logged = self.logged.saturating_add(1);
        let (interface, prefix) = (
            route.map(|(name, _)| name),
            route.map(|(_, prefix)| display(prefix)),
        );
        match self.logged {
            ..LOGGED_MAX => tracing::warn!(interface, prefix, "{line}"),
            LOGGED_MAX => tracing::warn!(
                interface,
                prefix,
                quiet_seconds = QUIET_PERIOD.as_secs(),
                "{line}. Somebody changes this again and again: not logged until it is quiet for \
                 {} s; have other network managers leave the tunnel's device and routes alone",
                QUIET_PERIOD.as_secs()
            ),
            _ => {}
        }
        self.logged <= LOGGED_MAX
    }
}

#[cfg(test)]
impl Reconciler {
    /// As if nothing had been logged for a while.
    pub(super) fn be_quiet(&mut self) {
        self.logged_at -= QUIET_PERIOD;
    }
}

/// Whether an interface takes addresses and routes of this IP version. Below the
/// least MTU that IPv6 may have, the kernel takes all of it away from the interface
/// (`addrconf_notify()` in net/ipv6/addrconf.c).
fn takes(link: &Link, net: &IpNet) -> bool {
    link.up && (net.addr().is_ipv4() || link.mtu >= IPV6_MTU_BYTES_MIN)
}
