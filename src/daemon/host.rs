//! The host around a running tunnel: the TUN device as it was found last, this
//! host's own addresses, the ways to the peers, and the kernel's routes into the
//! tunnel. All of it may change without us, and is refreshed when the kernel says
//! that something has ([`RouteReconciler`]).

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, at, bounded, never};
use ipnet::IpNet;

use crate::error::{Error, Result};
use crate::host::link;
use crate::host::netlink::{LinkStats, Netlink};
use crate::host::routes::RouteReconciler;
use crate::io::tun;
use crate::log::rate_limited::RateLimitedLog;

/// How long after a first event the host is refreshed: what belongs together, as
/// all that goes with an interface, is told piece by piece.
const REFRESH_WAIT: Duration = Duration::from_millis(50);

/// Shortest time from one refresh to the next.
const REFRESH_INTERVAL_MIN: Duration = Duration::from_secs(1);

/// When the host is to be refreshed.
struct Refresh {
    sender: Sender<()>,
    events: Receiver<()>,
    /// When it is due; `None`: nothing has changed.
    due: Option<Instant>,
    last: Option<Instant>,
}

impl Refresh {
    /// A first one is due at once.
    fn new(now: Instant) -> Self {
        // A second event says nothing more.
        let (sender, events) = bounded(1);
        Self {
            sender,
            events,
            due: Some(now),
            last: None,
        }
    }

    fn schedule(&mut self, now: Instant) {
        let soon = now + REFRESH_WAIT;
        let earliest = self.last.map(|last| last + REFRESH_INTERVAL_MIN);
        let at = earliest.map_or(soon, |earliest| earliest.max(soon));
        self.due.get_or_insert(at);
    }

    fn begin(&mut self, now: Instant) {
        (self.due, self.last) = (None, Some(now));
    }
}

/// The TUN device as it was found last.
pub struct Device {
    /// By which the kernel knows it, whatever it is called; `None` while it is in
    /// another network namespace.
    pub index: Option<u32>,
    /// What it is called.
    pub name: String,
    /// Its MTU in bytes, where somebody has set another than this process.
    pub mtu_by_hand: Option<u32>,
}

/// What the device may have become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceChange {
    /// Nothing that matters to others.
    None,
    /// It is in another namespace, or back, perhaps with another index.
    Moved,
}

/// See the module's documentation.
pub struct Host {
    /// In the tunnel's network namespace.
    pub netlink: Netlink,
    /// The device.
    pub device: Device,
    /// Whether the device delivers what comes from our own address.
    accept_local: bool,
    /// `None` while there is none: before the start, at the end, and where it
    /// could not be started again.
    routes: Option<RouteReconciler>,
    /// What it was told to keep, or finds kept when it starts.
    pub routes_kept: BTreeSet<IpNet>,
    refresh: Refresh,
    /// Peers to whom there is no way at all.
    lost: BTreeSet<SocketAddr>,
    /// Of changes of ways to peers.
    pub log: RateLimitedLog,
}

impl Host {
    /// The host of the device of a `queue`, which was made with this name.
    ///
    /// # Errors
    /// When the device has been deleted, or the kernel refuses.
    pub fn new(mut netlink: Netlink, queue: BorrowedFd<'_>, name: &str) -> Result<Self> {
        let index = tun::index_of(queue)?;
        if index.is_none() {
            log_move(name);
        }
        let accept_local = index.is_some_and(|index| netlink.accept_local(index));
        Ok(Self {
            netlink,
            device: Device {
                index,
                name: name.to_string(),
                mtu_by_hand: None,
            },
            accept_local,
            routes: None,
            routes_kept: BTreeSet::new(),
            refresh: Refresh::new(Instant::now()),
            lost: BTreeSet::new(),
            log: RateLimitedLog::new("changes of ways to peers"),
        })
    }

    /// Whether the device delivers what comes from our own address.
    pub fn accepts_local(&self) -> bool {
        self.accept_local
    }

    /// Gives an event, unless a refresh is due anyway: so events wake nobody more
    /// often than that.
    pub fn events(&self) -> Receiver<()> {
        match self.refresh.due {
            Some(_) => never(),
            None => self.refresh.events.clone(),
        }
    }

    /// Gives the time when a refresh is due.
    pub fn refresh_due(&self) -> Receiver<Instant> {
        self.refresh.due.map_or_else(never, at)
    }

    /// Has the host refreshed soon.
    pub fn schedule_refresh(&mut self) {
        self.refresh.schedule(Instant::now());
    }

    /// Notes that a refresh begins.
    pub fn begin_refresh(&mut self) {
        self.refresh.begin(Instant::now());
    }

    /// All addresses of this host, and the `given` ones, which the device has while
    /// it is up.
    ///
    /// # Errors
    /// When the kernel refuses to list them.
    pub fn own_addresses(&mut self, given: &[IpNet]) -> Result<BTreeSet<IpAddr>> {
        own_addresses(&mut self.netlink, given)
    }

    /// What the device has counted.
    pub fn link_stats(&mut self) -> Option<LinkStats> {
        let link = self.netlink.link_by_index(self.device.index?).ok()?;
        Some(link?.stats)
    }

    /// Finds the device of this `queue` again. `mtu_bytes`: what it should have.
    ///
    /// # Errors
    /// When it has been deleted, or the kernel refuses.
    pub fn find_device(&mut self, queue: BorrowedFd<'_>, mtu_bytes: u32) -> Result<DeviceChange> {
        let index = tun::index_of(queue)?;
        let was_away = self
            .routes
            .as_ref()
            .is_some_and(|routes| !routes.has_device());
        let mut change = DeviceChange::None;
        if index != self.device.index || (was_away && index.is_some()) {
            self.note_move(index);
            change = DeviceChange::Moved;
        }
        let Some(index) = index else {
            return Ok(change);
        };
        let Some(link) = self.netlink.link_by_index(index)? else {
            return Ok(change);
        };
        let device = &mut self.device;
        if link.name != device.name {
            tracing::info!("the TUN device {} is called {} now", device.name, link.name);
            device.name = link.name;
        }
        let mtu_by_hand = Some(link.mtu).filter(|mtu| *mtu != mtu_bytes);
        if mtu_by_hand != device.mtu_by_hand {
            device.mtu_by_hand = mtu_by_hand;
            let (name, mtu) = (&device.name, link.mtu);
            match mtu_by_hand {
                Some(_) => tracing::warn!(
                    "somebody has set the MTU of {name} to {mtu} bytes; it is left so, though \
                     {mtu_bytes} is what fits"
                ),
                None => tracing::info!("the MTU of {name} is {mtu} bytes again"),
            }
        }
        Ok(change)
    }

    /// To another namespace, or back to this one, where it may get another index.
    fn note_move(&mut self, index: Option<u32>) {
        let was_here = std::mem::replace(&mut self.device.index, index).is_some();
        let name = &self.device.name;
        match index {
            None => log_move(name),
            Some(_) if was_here => {
                tracing::warn!("the TUN device {name} was in another network namespace for a while")
            }
            Some(_) => tracing::info!("the TUN device {name} is in this network namespace again"),
        }
        // That setting has not come along.
        self.accept_local = index.is_some_and(|index| self.netlink.accept_local(index));
    }

    /// Whether the way to a peer leads through the tunnel itself; `None` if the
    /// kernel does not say. Logs when there is no way any more, or one again.
    pub fn is_inside(&mut self, peer: SocketAddr) -> Option<bool> {
        let way = match self.netlink.interface_to(peer) {
            Ok(way) => way,
            Err(error) => {
                tracing::debug!("{error}");
                return None;
            }
        };
        let is_news = match way {
            Some(_) => self.lost.remove(&peer),
            None => self.lost.insert(peer),
        };
        if is_news && self.log.admits(Instant::now()) {
            match way {
                Some(_) => tracing::info!("this host has a route to peer {peer} again"),
                None => tracing::warn!(
                    "this host has no route to peer {peer}: nothing reaches it until there is one"
                ),
            }
        }
        Some(self.device.index.is_some() && way == self.device.index)
    }

    /// Forgets peers that are not there any more.
    pub fn retain(&mut self, is_peer: impl Fn(&SocketAddr) -> bool) {
        self.lost.retain(is_peer);
    }

    /// Makes sure that the way to a peer does not lead through the tunnel.
    ///
    /// # Errors
    /// Names the peer.
    pub fn check_outside(&mut self, peer: SocketAddr) -> Result<()> {
        link::check_outside(&mut self.netlink, self.device.index, peer)
    }

    /// Keeps these `addresses`, and the routes that were kept until now.
    ///
    /// # Errors
    /// When there are no more descriptors or threads.
    pub fn start_routes(&mut self, addresses: &[IpNet]) -> Result<()> {
        let (addresses, kept) = (addresses.to_vec(), self.routes_kept.clone());
        let changes = self.refresh.sender.clone();
        let routes = RouteReconciler::start(self.device.index, addresses, kept, changes)?;
        self.routes = Some(routes);
        // Nobody has reported changes meanwhile.
        self.schedule_refresh();
        Ok(())
    }

    /// Ends the reconciler of the routes, which stay.
    pub fn stop_routes(&mut self) {
        self.routes = None;
    }

    /// Whether the routes should be kept and are not, as after a lack of
    /// descriptors.
    pub fn lacks_routes(&self) -> bool {
        self.routes.is_none()
    }

    /// The reconciler of the kernel's routes.
    ///
    /// # Errors
    /// When it could not be started again.
    pub fn routes(&self) -> Result<&RouteReconciler> {
        self.routes.as_ref().ok_or_else(|| {
            Error::new("the kernel's routes are not kept just now").hint("try again later")
        })
    }

    /// Has the kernel's routes changed, unless prefixes have only moved from peer
    /// to peer.
    ///
    /// # Errors
    /// When somebody else's route is in the way, or the kernel refuses: the routes
    /// are then as before.
    pub fn set_routes(&mut self, wanted: BTreeSet<IpNet>) -> Result<()> {
        if self.routes_kept != wanted {
            self.routes()?.set(wanted.clone())?;
            self.routes_kept = wanted;
        }
        Ok(())
    }
}

/// All addresses of this host, and the `given` ones.
///
/// # Errors
/// When the kernel refuses to list them.
pub fn own_addresses(netlink: &mut Netlink, given: &[IpNet]) -> Result<BTreeSet<IpAddr>> {
    let present = netlink.addresses()?.into_iter().map(|(_, net)| net);
    let given = given.iter().copied();
    Ok(present.chain(given).map(|net| net.addr()).collect())
}

fn log_move(name: &str) {
    tracing::warn!(
        "the TUN device {name} is in another network namespace now: packets are carried as \
         before, but its addresses, MTU and routes are left to you"
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_waited_for_together_and_refreshes_are_at_most_one_a_second() {
        let now = Instant::now();
        let mut refresh = Refresh::new(now);
        assert_eq!(refresh.due, Some(now));
        refresh.begin(now);
        assert_eq!(refresh.due, None);
        refresh.schedule(now);
        assert_eq!(refresh.due, Some(now + REFRESH_INTERVAL_MIN));
        // Further events wait for the same one.
        refresh.schedule(now + REFRESH_WAIT);
        assert_eq!(refresh.due, Some(now + REFRESH_INTERVAL_MIN));
        refresh.begin(now);
        let later = now + 10 * REFRESH_INTERVAL_MIN;
        refresh.schedule(later);
        assert_eq!(refresh.due, Some(later + REFRESH_WAIT));
    }
}
