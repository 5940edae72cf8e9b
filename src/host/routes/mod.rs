//! The kernel routes to the peers' prefixes, kept: whoever deletes or overrides
//! one finds it back at once. So are the device's addresses, with the last of
//! which the kernel would drop the routes.
//!
//! A [`RouteKeeper`] is a thread that sleeps until its owner wants other routes
//! or the kernel tells of a change by somebody else ([`Watch`]). It then
//! compares the main table with what is wanted and puts right what differs. As
//! it hears of all changes, it tells its owner that there are some. It never
//! polls, and no state but the kernel's own decides what is done, so lost
//! news does no harm.
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
//!
//! - `keeper`: the thread.
//! - `standing`: how the prefixes stand in the kernel's table.
//! - `backoff`: how often one prefix is put right in a fight.

mod backoff;
mod keeper;
mod standing;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;

use crossbeam_channel::{Receiver, Sender, bounded};
use ipnet::IpNet;
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::error::{Error, Result};
use crate::host::netlink::{DeviceRoute, Netlink, Watch};
use keeper::{Command, Keeper};
use standing::Standings;

/// The `rtm_protocol` of our routes (rtnetlink(7)): not one of those that
/// linux/rtnetlink.h and iproute2's rt_protos assign. `ip route show proto 82`
/// lists our routes.
pub const PROTOCOL: u8 = 82;

/// Commands that may wait for the thread.
const COMMANDS_MAX: usize = 4;

/// What becomes of the routes when their keeper ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AtEnd {
    /// The tunnel ends: they are deleted.
    Remove,
    /// Another process takes the tunnel over: they stay, and its keeper finds
    /// them by their protocol number.
    Keep,
}

/// Keeps the routes of one device. Dropping it removes them.
pub struct RouteKeeper {
    commands: Sender<Command>,
    wake: Arc<EventFd>,
    added: Arc<AtomicUsize>,
    has_device: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// Makes sure that a keeper for the device `oif` could [`set`](RouteKeeper::set)
/// these prefixes now, as far as others' routes go.
///
/// # Errors
/// When one of them is in the way; names prefix and interface. When the kernel
/// refuses to list its routes.
pub fn check_free(netlink: &mut Netlink, oif: Option<u32>, wanted: &BTreeSet<IpNet>) -> Result<()> {
    let ours = DeviceRoute {
        oif: oif.unwrap_or(keeper::NO_DEVICE),
        protocol: PROTOCOL,
    };
    let wanted = wanted.iter().map(IpNet::trunc).collect();
    let standings = Standings::read(netlink, ours, &wanted)?;
    keeper::check_free(netlink, &standings, wanted.iter())
}

impl RouteKeeper {
    /// Starts to keep the routes through the device with this index, in the calling
    /// thread's network namespace. `None`: the device is in another one, and there
    /// is nothing to keep, but changes are told. Routes of ours that are there already, a
    /// predecessor's, are kept until [`set`](Self::set) says otherwise; the
    /// predecessor's keeper must have ended.
    ///
    /// `addresses` are put back, too, when somebody takes them from the device,
    /// and when the device was taken down and is up again: the kernel forgets
    /// those of IPv6. So the device should be up and have its addresses before
    /// this is called, and its keeper ends before it is given others.
    ///
    /// `changes` is sent to when others have changed links, addresses or routes,
    /// whichever, of the namespace. Room for one is enough: news that finds none
    /// is left out.
    ///
    /// # Errors
    /// When there are no netlink sockets.
    pub fn start(index: Option<u32>, addresses: Vec<IpNet>, changes: Sender<()>) -> Result<Self> {
        let netlink = Netlink::open()?;
        let watch = Watch::open(&netlink)?;
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let wake = EventFd::from_value_and_flags(0, flags)
            .map_err(|errno| Error::os("cannot create an event counter", errno.into()))?;
        let wake = Arc::new(wake);
        let added = Arc::new(AtomicUsize::new(0));
        let has_device = Arc::new(AtomicBool::new(index.is_some()));
        let (commands, receiver) = bounded(COMMANDS_MAX);
        let ours = DeviceRoute {
            oif: index.unwrap_or(keeper::NO_DEVICE),
            protocol: PROTOCOL,
        };
        let parts = keeper::Parts {
            netlink,
            watch,
            ours,
            addresses,
            changes,
            commands: receiver,
            wake: Arc::clone(&wake),
            added: Arc::clone(&added),
            has_device: Arc::clone(&has_device),
        };
        let keeper = Keeper::new(parts)?;
        let thread = std::thread::Builder::new()
            .name("routes".into())
            .spawn(move || keeper.run())
            .map_err(|cause| Error::os("cannot start the route keeper's thread", cause))?;
        Ok(Self {
            commands,
            wake,
            added,
            has_device,
            thread: Some(thread),
        })
    }

    /// Whether the device has been there all the time since the start. If not,
    /// nothing is kept any more, even if it is there again.
    pub fn has_device(&self) -> bool {
        self.has_device.load(Ordering::Acquire)
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
    pub fn set(&self, wanted: BTreeSet<IpNet>) -> Result<()> {
        self.begin_set(wanted)?.recv().map_err(|_| ended())?
    }

    /// As [`set`](Self::set), without waiting: that it is done, or why not, comes
    /// from the channel.
    ///
    /// # Errors
    /// When the thread has ended.
    pub fn begin_set(&self, wanted: BTreeSet<IpNet>) -> Result<Receiver<Result<()>>> {
        let wanted = wanted.iter().map(IpNet::trunc).collect();
        self.begin(|answer| Command::Set { wanted, answer })
    }

    /// How many routes have been added so far, over all changes.
    pub fn added(&self) -> usize {
        self.added.load(Ordering::Relaxed)
    }

    /// As [`set`](Self::set), for prefixes that another keeper of this process has
    /// kept until now: they are not new, so no route of somebody else's is in
    /// their way. After an error, too, they are kept.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn resume(&self, wanted: BTreeSet<IpNet>) -> Result<()> {
        let wanted = wanted.iter().map(IpNet::trunc).collect();
        self.ask(|answer| Command::Resume { wanted, answer })?
    }

    /// As [`set`](Self::set), for who goes on with a predecessor's routes and has
    /// nothing to go back to: after an error, too, these are the prefixes that
    /// are kept from now on. What was in the way is got round as soon as can be.
    ///
    /// # Errors
    /// As [`set`](Self::set).
    pub fn go_on(&self, wanted: BTreeSet<IpNet>) -> Result<()> {
        let wanted = wanted.iter().map(IpNet::trunc).collect();
        self.ask(|answer| Command::GoOn { wanted, answer })?
    }

    /// Ends the keeper and waits for its end.
    pub fn stop(mut self, at_end: AtEnd) {
        self.end(at_end);
    }

    fn begin<T>(&self, command: impl FnOnce(Sender<T>) -> Command) -> Result<Receiver<T>> {
        let (sender, answer) = bounded(1);
        self.tell(command(sender)).map_err(|()| ended())?;
        Ok(answer)
    }

    fn ask<T>(&self, command: impl FnOnce(Sender<T>) -> Command) -> Result<T> {
        self.begin(command)?.recv().map_err(|_| ended())
    }

    fn tell(&self, command: Command) -> std::result::Result<(), ()> {
        self.commands.send(command).map_err(|_| ())?;
        // The counter cannot overflow: the thread empties it each time.
        let _ = self.wake.write(1);
        Ok(())
    }

    fn end(&mut self, at_end: AtEnd) {
        let Some(thread) = self.thread.take() else {
            return;
        };
        let _ = self.tell(Command::End(at_end));
        if thread.join().is_err() {
            tracing::error!("the thread that keeps the routes panicked");
        }
    }
}

impl Drop for RouteKeeper {
    fn drop(&mut self) {
        self.end(AtEnd::Remove);
    }
}

fn ended() -> Error {
    Error::new("the thread that keeps the routes has ended")
}
