//! What the owner wants changed.

use std::collections::BTreeSet;
use std::sync::atomic::Ordering;
use std::time::Instant;

use ipnet::IpNet;

use super::super::standing::Standings;
use super::{Keeper, NO_DEVICE, RETRY_WAIT, device_if_up, standings, way};
use crate::error::{Error, Result};
use crate::host::link::IPV6_MTU_BYTES_MIN;
use crate::host::netlink::{Netlink, RouteChange, RouteEntry};

/// Most routes that are added before they are counted.
const PART_MAX: usize = 1000;

impl Keeper {
    pub(in super::super) fn set(&mut self, wanted: BTreeSet<IpNet>) -> Result<()> {
        if self.parts.ours.oif == NO_DEVICE {
            self.wanted = wanted;
            return Ok(());
        }
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
    pub(super) fn resume(&mut self, wanted: BTreeSet<IpNet>) -> Result<()> {
        self.wanted.extend(&wanted);
        let result = self.set(wanted);
        if result.is_err() {
            self.compare_at(Instant::now());
        }
        result
    }

    /// [`Self::set`]; if that fails, all are wanted nevertheless, as they would
    /// be if what is in the way had come a moment later.
    pub(super) fn go_on(&mut self, wanted: BTreeSet<IpNet>) -> Result<()> {
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
        // In parts, so that it shows how far it is.
        for changes in changes.chunks(PART_MAX) {
            self.add_part(changes)?;
            self.parts.added.fetch_add(changes.len(), Ordering::Relaxed);
        }
        Ok(())
    }

    fn add_part(&mut self, changes: &[RouteChange]) -> Result<()> {
        let refusals = self
            .parts
            .netlink
            .change_device_routes(self.parts.ours, changes)?;
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
    pub(in super::super) fn undo(&mut self, added: &[IpNet]) {
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
    pub(super) fn delete_all(&mut self, prefixes: &[IpNet]) -> Result<()> {
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

    pub(super) fn remove_all(&mut self) -> Result<()> {
        let owned: Vec<IpNet> = standings(&mut self.parts, &BTreeSet::new())?
            .ours()
            .collect();
        self.delete_all(&owned)
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
