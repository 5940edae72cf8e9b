//! What the kernel tells.

use std::sync::atomic::Ordering;
use std::time::Instant;

use nix::sys::epoll::{EpollEvent, EpollFlags};

use super::super::standing::may_harm;
use super::{Keeper, NEWS_PER_TURN_MAX, NO_DEVICE, RETRY_WAIT};
use crate::error::{Error, Result};
use crate::host::link::IPV6_MTU_BYTES_MIN;
use crate::host::netlink::device_route::MAIN_TABLE;
use crate::host::netlink::{News, RouteEntry, Watch};

impl Keeper {
    /// Reads the news. When that fails, it listens anew after a while, for as
    /// long as it takes: what is amiss may pass, as when memory was short.
    pub(super) fn keep_listening(&mut self) {
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
                News::LinkDeleted { index } if index == self.parts.ours.oif => {
                    self.device_is_gone();
                }
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

    pub(super) fn note_link(&mut self, up: bool, now: Instant) {
        if self.up && !up {
            self.up = false;
            let oif = self.parts.ours.oif;
            // On its way to another namespace it is taken down, too.
            if let Ok(None) = self.parts.netlink.link_by_index(oif) {
                self.device_is_gone();
                return;
            }
            self.warn(|parts| {
                format!(
                    "interface {} was taken down: its routes are gone until it is up again",
                    parts.name()
                )
            });
        } else if !self.up && up {
            self.compare_at(now);
        }
    }

    /// The device has been deleted, or moved to another namespace: whatever has
    /// its index from now on is another one.
    fn device_is_gone(&mut self) {
        self.up = false;
        self.parts.ours.oif = NO_DEVICE;
        self.parts.has_device.store(false, Ordering::Release);
    }

    /// Below the least MTU that IPv6 may have, the kernel takes all of it away
    /// from the device (`addrconf_notify()` in net/ipv6/addrconf.c).
    pub(super) fn note_mtu(&mut self, mtu_bytes: u32, now: Instant) {
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
                    parts.name()
                )
            });
        }
    }

    /// Anything may have happened; also that the device was down and is up again.
    fn note_loss(&mut self, now: Instant) {
        self.addresses_due = true;
        self.compare_at(now);
        self.tell_owner();
    }
}
