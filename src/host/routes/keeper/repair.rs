//! What others have taken or overridden is put right.

use std::collections::BTreeSet;
use std::time::Instant;

use ipnet::IpNet;

use super::super::standing::Standing;
use super::{Keeper, Parts, REST_FACTOR, REST_MAX, RETRY_WAIT, device_if_up, standings, way};
use crate::error::{Error, Result};
use crate::host::netlink::RouteChange;

/// What has to be done about a wanted prefix that is not right.
struct Repair {
    prefix: IpNet,
    standing: Standing,
}

impl Keeper {
    /// Compares the kernel's table with what is wanted, and puts right what
    /// may be put right now.
    pub(super) fn put_right(&mut self) -> Result<()> {
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
            self.warn(|parts| format!("interface {}: {count} routes put back", parts.name()));
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
                            format!("address {address} on {} was gone; put back", parts.name())
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
}

/// What happened to a prefix, and what was done.
fn describe(parts: &mut Parts, prefix: IpNet, standing: &Standing, hopeless: bool) -> String {
    let way = standing
        .winner
        .map(|winner| way(&mut parts.netlink, &winner));
    let name = parts.name();
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
