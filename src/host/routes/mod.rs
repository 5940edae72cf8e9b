//! The kernel routes to the peers' prefixes, and the device's addresses, kept as
//! they are wanted: whatever somebody deletes or overrides is put back at once.
//!
//! A [`RouteReconciler`] is a thread of its own: listing a table of a million
//! routes or changing ten thousand takes longer than the control thread may be
//! away. It sleeps until its owner wants other routes, the kernel tells of a
//! change by somebody else ([`Watch`]), or a minute has passed. Then it compares
//! the main table with what is wanted and fixes what differs. Nothing but the
//! kernel's own state decides what is done, so a lost event does no harm.
//!
//! Ours are the routes with [`PROTOCOL`] through the tunnel's device in the
//! main table. All others are left as they are, also those that have overridden
//! ours: ours goes in front of them. A route that leads into the device anyway,
//! such as the one that the kernel makes for the device's address, is as good
//! as ours and none is added to it.
//!
//! If somebody, such as a network manager, undoes the fixes again and again, the
//! log says so once, and from then on there is one fix every few seconds until
//! it is quiet.
//!
//! What cannot be won: IPv4 routes for one type of service, IPv6 routes for
//! some sources, policy routing rules, longer prefixes, and an IPv6 route with
//! metric 1 and preference high that was there first.

mod reconciler;
mod table;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use crossbeam_channel::{Sender, bounded};
use ipnet::IpNet;
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::error::{Error, Result};
use crate::host::netlink::{DeviceRoute, Netlink, Watch};
use reconciler::{Job, Reconciler};
use table::RouteTable;

/// The `rtm_protocol` of our routes (rtnetlink(7)): not one of those that
/// linux/rtnetlink.h and iproute2's rt_protos assign. `ip route show proto 82`
/// lists our routes.
pub const PROTOCOL: u8 = 82;

/// Jobs that may wait for the thread.
const JOBS_MAX: usize = 4;

/// In [`DeviceRoute::oif`], where no interface has this index: the device has
/// left the namespace, and another one may get the index that it had.
const NO_DEVICE: u32 = 0;

/// What becomes of the routes when their reconciler ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AtEnd {
    /// The tunnel ends: they are deleted.
    Remove,
    /// They stay, for another reconciler of this process or of one that takes
    /// the tunnel over: it finds them by their protocol number.
    Keep,
}

/// Keeps the routes and addresses of one device. Dropping it removes the routes.
pub struct RouteReconciler {
    jobs: Sender<Job>,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// What the thread and its owner have in common.
struct Shared {
    /// Counts jobs, to wake the thread.
    wake: EventFd,
    /// Whether the device is still there.
    has_device: AtomicBool,
}

/// Makes sure that a reconciler for the device `oif` could
/// [`set`](RouteReconciler::set) these prefixes now, as far as others' routes go.
///
/// # Errors
/// When one of them is in the way; names prefix and interface. When the kernel
/// refuses to list its routes.
pub(crate) fn check_free(
    netlink: &mut Netlink,
    oif: Option<u32>,
    wanted: &BTreeSet<IpNet>,
) -> Result<()> {
    let wanted = masked(wanted);
    RouteTable::read(netlink, ours(oif), &wanted)?.check_free(netlink, wanted.iter())
}

impl RouteReconciler {
    /// Starts to keep the device with this index, in the calling thread's network
    /// namespace. `None`: the device is in another one, and there is nothing to
    /// keep, but changes are told. Routes of ours that are there already stay
    /// untouched until [`set`](Self::set) or [`adopt`](Self::adopt) says what is
    /// wanted; whoever has kept them must have ended.
    ///
    /// `addresses` are put back, too, when somebody takes them from the device,
    /// and when the device was taken down and is up again: the kernel forgets
    /// those of IPv6. So the device should be up and have its addresses before
    /// this is called, and its reconciler ends before it is given others.
    ///
    /// `changes` is sent to when others have changed links, addresses or routes,
    /// whichever, of the namespace. Room for one is enough: a second one says
    /// nothing more.
    ///
    /// # Errors
    /// When there are no netlink sockets.
    pub(crate) fn start(
        index: Option<u32>,
        addresses: Vec<IpNet>,
        changes: Sender<()>,
    ) -> Result<Self> {
        let netlink = Netlink::open()?;
        let watch = Watch::open(&netlink)?;
        let (jobs, receiver) = bounded(JOBS_MAX);
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let wake = EventFd::from_value_and_flags(0, flags)
            .map_err(|errno| Error::os("cannot create an event counter", errno.into()))?;
        let shared = Arc::new(Shared {
            wake,
            has_device: AtomicBool::new(index.is_some()),
        });
        let reconciler = Reconciler::new(
            netlink,
            watch,
            ours(index),
            addresses,
            changes,
            receiver,
            Arc::clone(&shared),
        )?;
        let thread = std::thread::Builder::new()
            .name("routes".into())
            .spawn(move || reconciler.run())
            .map_err(|cause| Error::os("cannot start the route reconciler's thread", cause))?;
        Ok(Self {
            jobs,
            shared,
            thread: Some(thread),
        })
    }

    /// Whether the device has been there all the time since the start. If not,
    /// nothing is kept any more, even if it is there again.
    pub(crate) fn has_device(&self) -> bool {
        self.shared.has_device.load(Ordering::Acquire)
    }

    /// Makes `wanted` the prefixes that have routes: adds those that are
    /// missing, deletes ours that are not wanted any more, and leaves the
    /// others alone. When it returns `Ok` the routes are in force; while the
    /// device is down they come with it.
    ///
    /// # Errors
    /// When somebody else has a route to a prefix that was not wanted before
    /// (in IPv4 one without a metric, in IPv6 one with a metric up to 1024, the
    /// usual one); the error names prefix and interface. When the kernel
    /// refuses. In all cases the routes are then as before, or, if the kernel
    /// takes no changes at all for a while, as soon as it does.
    pub(crate) fn set(&self, wanted: BTreeSet<IpNet>) -> Result<()> {
        self.want(&wanted, false)
    }

    /// As [`set`](Self::set), for prefixes that were kept until now, by another
    /// reconciler of this process or of one that was taken over. So no route of
    /// somebody else's is in their way: ours go in front. Where that cannot be, the
    /// log says so, and it is tried again. There is nothing to go back to: these are
    /// the prefixes that are kept from now on, also after an error.
    ///
    /// # Errors
    /// When the kernel does not answer.
    pub(crate) fn adopt(&self, wanted: BTreeSet<IpNet>) -> Result<()> {
        self.want(&wanted, true)
    }

    /// Ends the reconciler and waits for its end.
    pub(crate) fn stop(mut self, at_end: AtEnd) {
        self.end(at_end);
    }

    fn want(&self, wanted: &BTreeSet<IpNet>, is_adopted: bool) -> Result<()> {
        let (done, result) = bounded(1);
        self.send(Job::Want {
            wanted: masked(wanted),
            is_adopted,
            done,
        })?;
        result.recv().map_err(|_| ended())?
    }

    fn send(&self, job: Job) -> Result<()> {
        self.jobs.send(job).map_err(|_| ended())?;
        // The counter cannot overflow: the thread empties it each time.
        let _ = self.shared.wake.write(1);
        Ok(())
    }

    fn end(&mut self, at_end: AtEnd) {
        let Some(thread) = self.thread.take() else {
            return;
        };
        let _ = self.send(Job::End(at_end));
        if thread.join().is_err() {
            tracing::error!("the route reconciler's thread panicked");
        }
    }
}

impl Drop for RouteReconciler {
    fn drop(&mut self) {
        self.end(AtEnd::Remove);
    }
}

fn ours(oif: Option<u32>) -> DeviceRoute {
    DeviceRoute {
        oif: oif.unwrap_or(NO_DEVICE),
        protocol: PROTOCOL,
    }
}

fn masked(prefixes: &BTreeSet<IpNet>) -> BTreeSet<IpNet> {
    prefixes.iter().map(IpNet::trunc).collect()
}

fn ended() -> Error {
    Error::new("the route reconciler's thread has ended")
}
