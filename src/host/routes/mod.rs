//! The kernel routes to the peers' prefixes, and the device's addresses, kept as
//! they are wanted: what somebody deletes or overrides is put back.
//!
//! A [`RouteReconciler`] has a thread, since listing a table of a million routes
//! takes longer than the control thread may be away. It sleeps until the kernel
//! reports a change by somebody else ([`Watch`]) or a minute has passed. Then it
//! compares the main table with what is wanted and fixes what differs. Nothing but
//! the kernel's own state decides what is done, so a lost event does no harm.
//!
//! Ours are the routes with [`PROTOCOL`] through the tunnel's device in the
//! main table. All others are left as they are, also those that have overridden
//! ours: ours goes in front of them. A route that leads into the device anyway,
//! such as the one that the kernel makes for the device's address, is as good
//! as ours and none is added to it.
//!
//! What cannot be won: IPv4 routes for one type of service, IPv6 routes for
//! some sources, policy routing rules, longer prefixes, and an IPv6 route with
//! metric 1 and preference high that was there first.

mod reconciler;
mod table;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::io::{PipeReader, PipeWriter};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;
use ipnet::IpNet;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::error::{Error, Result};
pub use crate::host::netlink::route::PROTOCOL;
use crate::host::netlink::{Netlink, Watch};
use reconciler::{RETRY_WAIT, Reconciler};
use table::RouteTable;

/// The thread rests so long between two comparisons, and so many times as long as
/// the first one took: a fifth of one core is what a restless host with a huge table
/// can cost.
const COOLDOWN: Duration = Duration::from_millis(200);
const COOLDOWN_FACTOR: u32 = 4;

/// Keeps the routes and addresses of one device until it is dropped. What is there
/// then stays: it goes with the device, or another reconciler keeps it.
pub struct RouteReconciler {
    reconciler: Arc<Mutex<Reconciler>>,
    /// See [`Reconciler::has_device`].
    has_device: Arc<AtomicBool>,
    /// The thread, which ends when the pipe is closed.
    thread: Option<(PipeWriter, JoinHandle<()>)>,
}

/// Makes sure that a reconciler for `device` could [`set`](RouteReconciler::set)
/// these prefixes now, as far as others' routes go.
///
/// # Errors
/// When one of them is in the way; names prefix and interface. When the kernel
/// refuses to list its routes.
pub(crate) fn check_free(
    netlink: &mut Netlink,
    device: Option<u32>,
    wanted: &BTreeSet<IpNet>,
) -> Result<()> {
    RouteTable::read(netlink, device, wanted)?.check_free(netlink, wanted.iter())
}

impl RouteReconciler {
    /// Starts to keep the routes to the `kept` prefixes, and `addresses`, in the
    /// calling thread's network namespace, by the `device` with this index. `None`:
    /// the device is in another one, and there is nothing to keep, but changes are
    /// reported.
    ///
    /// What was `kept` until now, by another reconciler of this process or of one
    /// that was taken over, is put back at once where it is missing, and in front of
    /// others' routes. The device should have its addresses and be up, and no other
    /// reconciler.
    ///
    /// `changes` is sent to when others have changed links, addresses or routes of
    /// the namespace. Room for one is enough: a second one says nothing more.
    ///
    /// # Errors
    /// When there are no more descriptors or threads.
    pub(crate) fn start(
        device: Option<u32>,
        addresses: Vec<IpNet>,
        kept: BTreeSet<IpNet>,
        changes: Sender<()>,
    ) -> Result<Self> {
        let netlink = Netlink::open()?;
        let watch = Watch::open(&netlink).map_err(|cause| {
            let what = "cannot watch routes, addresses and links (netlink multicast)";
            Error::os(what, cause)
        })?;
        let mut reconciler = Reconciler::new(netlink, device, addresses, kept, changes);
        reconciler.compare(false);
        let has_device = Arc::clone(&reconciler.has_device);
        let reconciler = Arc::new(Mutex::new(reconciler));
        let no_thread = |cause| Error::os("cannot start the route reconciler's thread", cause);
        let (stopped, stop) = std::io::pipe().map_err(no_thread)?;
        let shared = Arc::clone(&reconciler);
        let thread = std::thread::Builder::new()
            .name("routes".into())
            .spawn(move || run(&shared, watch, &stopped))
            .map_err(no_thread)?;
        Ok(Self {
            reconciler,
            has_device,
            thread: Some((stop, thread)),
        })
    }

    /// Whether the device has been there all the time since the start. If not,
    /// nothing is kept any more, even if it is there again. Does not wait for a
    /// comparison that is under way.
    pub(crate) fn has_device(&self) -> bool {
        self.has_device.load(Ordering::Acquire)
    }

    /// Makes `wanted` the prefixes that have routes: adds those that are missing, and
    /// deletes ours that are not wanted any more. When it returns `Ok` the routes are
    /// in force, but for those that the device does not take now, as while it is down:
    /// they come as soon as it does.
    ///
    /// # Errors
    /// When somebody else has a route to a prefix that was not wanted before
    /// (in IPv4 one without a metric, in IPv6 one with a metric up to 1024, the
    /// usual one); the error names prefix and interface. When the kernel
    /// refuses. In all cases the routes are then as before, or, if the kernel
    /// takes no changes at all for a while, as soon as it does.
    pub(crate) fn set(&self, wanted: BTreeSet<IpNet>) -> Result<()> {
        lock(&self.reconciler).set(wanted)
    }
}

impl Drop for RouteReconciler {
    fn drop(&mut self) {
        if let Some((stop, thread)) = self.thread.take() {
            drop(stop);
            if thread.join().is_err() {
                tracing::error!("the route reconciler's thread panicked");
            }
        }
    }
}

fn lock(reconciler: &Mutex<Reconciler>) -> MutexGuard<'_, Reconciler> {
    reconciler.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Has the routes compared on events and on a tick, until the other end of the pipe is
/// closed.
fn run(reconciler: &Mutex<Reconciler>, mut watch: Watch, stopped: &PipeReader) {
    loop {
        let due_in = lock(reconciler).due - Instant::now();
        // The owner may have made it due earlier meanwhile.
        if is_stopped(stopped, Some(&watch), due_in.min(RETRY_WAIT)) {
            return;
        }
        let started = Instant::now();
        lock(reconciler).follow(&mut watch);
        let rest = COOLDOWN.max(started.elapsed() * COOLDOWN_FACTOR);
        if is_stopped(stopped, None, rest) {
            return;
        }
    }
}

/// Waits for an event, if there is a `watch`, until a timeout at most. Returns
/// whether the pipe was closed.
fn is_stopped(stopped: &PipeReader, watch: Option<&Watch>, timeout: Duration) -> bool {
    let mut ready = vec![PollFd::new(stopped.as_fd(), PollFlags::POLLIN)];
    ready.extend(watch.map(|watch| PollFd::new(watch.as_fd(), PollFlags::POLLIN)));
    let timeout = PollTimeout::try_from(timeout).unwrap_or(PollTimeout::MAX);
    // Interrupted or not, everything is checked.
    let _ = poll(&mut ready, timeout);
    ready[0].any().unwrap_or(true)
}
