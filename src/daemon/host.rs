//! The host around a running tunnel: its own addresses, and the ways to the
//! peers. Both change without us, and are looked at again when the kernel tells
//! that something has ([`RouteKeeper`](crate::host::routes::RouteKeeper)).

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, at, bounded, never};
use ipnet::IpNet;

use super::paths::ask_routes;
use super::running::Running;
use crate::dataplane::Command;
use crate::error::Result;
use crate::host::link;
use crate::host::netlink::{Link, LinkStats, Netlink};
use crate::io::tun;
use crate::io::udp;
use crate::log::rate_limited::Journal;
use crate::packet::train::NextHop;
use crate::routing::overlay::Overlay;

/// How long after the first piece of news the host is looked at: what belongs
/// together, as all that goes with an interface, is told piece by piece.
const NEWS_WAIT: Duration = Duration::from_millis(50);

/// A look is paid for with a rest so many times as long as it took, and of
/// [`REST_MIN`] at least: hosts whose routes change all the time are not looked
/// at all the time.
const REST_FACTOR: u32 = 10;
const REST_MIN: Duration = Duration::from_secs(1);

/// When the host is to be looked at.
pub struct HostNews {
    sender: Sender<()>,
    receiver: Receiver<()>,
    /// When the next look is due; `None`: nothing has changed.
    due: Option<Instant>,
    rested_at: Instant,
    /// Peers to whom there is no way at all.
    lost: BTreeSet<SocketAddr>,
    pub(super) journal: Journal,
}

impl HostNews {
    /// A first look is due at once.
    pub fn new() -> Self {
        // A second piece of news says nothing more.
        let (sender, receiver) = bounded(1);
        let now = Instant::now();
        Self {
            sender,
            receiver,
            due: Some(now),
            rested_at: now,
            lost: BTreeSet::new(),
            journal: Journal::new("changes of ways to peers"),
        }
    }

    /// Takes news.
    pub fn sender(&self) -> Sender<()> {
        self.sender.clone()
    }

    /// Gives the news, unless a look is due anyway: so news wakes nobody more
    /// often than looks are taken.
    pub fn news(&self) -> Receiver<()> {
        match self.due {
            Some(_) => never(),
            None => self.receiver.clone(),
        }
    }

    /// Gives the time when a look is due.
    pub fn due(&self) -> Receiver<Instant> {
        self.due.map_or_else(never, at)
    }

    /// Notes that something has changed.
    pub fn note(&mut self, now: Instant) {
        let at = (now + NEWS_WAIT).max(self.rested_at);
        self.due.get_or_insert(at);
    }

    /// Notes whether there is a way to a peer at all, and tells of changes.
    fn note_way(&mut self, peer: SocketAddr, is_there: bool) {
        let is_news = match is_there {
            true => self.lost.remove(&peer),
            false => self.lost.insert(peer),
        };
        if !is_news || !self.journal.admits(Instant::now()) {
            return;
        }
        match is_there {
            true => tracing::info!("this host has a route to peer {peer} again"),
            false => tracing::warn!(
                "this host has no route to peer {peer}: nothing reaches it until there is one"
            ),
        }
    }

    /// Says how many log lines were left out lately, if it is time.
    pub fn flush_log(&mut self, now: Instant) {
        self.journal.flush(now);
    }

    /// Says so for the last time.
    pub fn end_log(&mut self) {
        self.journal.end();
    }

    /// Notes a look that began at `started` and ends `now`.
    fn looked(&mut self, started: Instant, now: Instant) {
        self.due = None;
        self.rested_at = now + ((now - started) * REST_FACTOR).max(REST_MIN);
    }
}

/// All addresses of this host, and the `given` ones, which the device has while
/// it is up.
pub fn own_addresses(netlink: &mut Netlink, given: &[IpNet]) -> Result<BTreeSet<IpAddr>> {
    let present = netlink.addresses()?.into_iter().map(|(_, net)| net);
    let given = given.iter().copied();
    Ok(present.chain(given).map(|net| net.addr()).collect())
}

/// The TUN device as it was found last.
pub(super) struct Device {
    /// By which the kernel knows it, whatever it is called; `None` while it is in
    /// another network namespace.
    pub index: Option<u32>,
    /// What it is called.
    pub name: String,
    /// Its MTU in bytes, where somebody has set another than this process.
    pub mtu_by_hand: Option<u32>,
}

impl Device {
    /// The device of a `queue`, which was made with this name.
    ///
    /// # Errors
    /// When it has been deleted, or the kernel refuses.
    pub fn find(queue: BorrowedFd<'_>, name: &str) -> Result<Self> {
        let index = tun::index_of(queue)?;
        if index.is_none() {
            tell_of_move(name);
        }
        Ok(Self {
            index,
            name: name.to_string(),
            mtu_by_hand: None,
        })
    }
}

fn tell_of_move(name: &str) {
    tracing::warn!(
        "the TUN device {name} is in another network namespace now: packets are carried as \
         before, but its addresses, MTU and routes are left to you"
    );
}

/// Suspends the peers to whom the way leads through the device `own`, and no
/// others: for a successor, before its workers send anything. Returns the peers'
/// addresses.
pub fn suspend_inside(
    overlay: &mut Overlay,
    netlink: &mut Netlink,
    own: Option<u32>,
) -> Vec<SocketAddr> {
    if own.is_none() {
        return Vec::new();
    }
    let peers: Vec<_> = overlay
        .peers()
        .filter_map(|(hop, peer)| Some((hop, peer.endpoint?)))
        .collect();
    let mut inside = Vec::new();
    for (hop, endpoint) in peers {
        match netlink.interface_to_endpoint(endpoint) {
            Ok(way) => {
                let is_inside = way == own;
                overlay.set_suspended(hop, is_inside);
                inside.extend(is_inside.then_some(endpoint));
            }
            Err(error) => tracing::debug!("{error}"),
        }
    }
    inside
}

impl Running {
    /// Looks at the device, at this host's addresses and at the ways to all peers.
    pub(super) fn look_at_host(&mut self) {
        let started = Instant::now();
        self.look_at_device();
        let own = own_addresses(&mut self.netlink, &self.settled.link.addresses);
        let has_failed = own.is_err();
        let mut is_news = match own {
            Ok(own) => self.overlay.set_own_addresses(own),
            Err(error) => {
                tracing::debug!("{error}");
                false
            }
        };
        let peers: Vec<_> = self
            .overlay
            .peers()
            .filter_map(|(hop, peer)| Some((hop, peer.endpoint?)))
            .collect();
        let present: BTreeSet<_> = peers.iter().map(|&(_, endpoint)| endpoint).collect();
        self.host.lost.retain(|peer| present.contains(peer));
        is_news |= self.look_at_ways(&peers);
        if is_news {
            self.republish();
        }
        if let Err(error) = self.follow_routes() {
            tracing::debug!("{error}");
        }
        self.host.looked(started, Instant::now());
        if has_failed {
            self.host.note(Instant::now());
        }
    }

    /// Notes what others have made of the device.
    pub(super) fn look_at_device(&mut self) {
        if let Err(error) = self.find_device() {
            // One that is deleted ends the workers, and these the process.
            tracing::debug!("{error}");
        }
    }

    fn find_device(&mut self) -> Result<()> {
        let descriptors = Arc::clone(self.descriptors());
        let Some(worker) = descriptors.first() else {
            return Ok(());
        };
        let index = tun::index_of(worker.queue())?;
        let was_away = self
            .routes
            .as_ref()
            .is_some_and(|routes| !routes.has_device());
        if index != self.device.index || (was_away && index.is_some()) {
            self.device_has_moved(index);
        }
        let Some(index) = index else {
            return Ok(());
        };
        let Some(link) = self.netlink.link_by_index(index)? else {
            return Ok(());
        };
        if link.name != self.device.name {
            tracing::info!(
                "the TUN device {} is called {} now",
                self.device.name,
                link.name
            );
            self.device.name.clone_from(&link.name);
        }
        let wanted = self.settled.link.mtu_bytes;
        let mtu_by_hand = Some(link.mtu).filter(|mtu_bytes| *mtu_bytes != wanted);
        if mtu_by_hand != self.device.mtu_by_hand {
            self.device.mtu_by_hand = mtu_by_hand;
            let Link { name, mtu, .. } = link;
            match mtu_by_hand {
                Some(_) => tracing::warn!(
                    "somebody has set the MTU of {name} to {mtu} bytes; it is left so, though \
                     {wanted} is what fits"
                ),
                None => tracing::info!("the MTU of {name} is {mtu} bytes again"),
            }
        }
        Ok(())
    }

    /// To another namespace, or back to this one, where it may get another index.
    fn device_has_moved(&mut self, index: Option<u32>) {
        let was_here = std::mem::replace(&mut self.device.index, index).is_some();
        let name = &self.device.name;
        match index {
            None => tell_of_move(name),
            Some(_) if was_here => {
                tracing::warn!("the TUN device {name} was in another network namespace for a while")
            }
            Some(_) => tracing::info!("the TUN device {name} is in this network namespace again"),
        }
        // Something else may have the old index by now, such as the underlay.
        for worker in self.descriptors().iter() {
            if let Err(error) = udp::drop_from(worker.receive(), index) {
                tracing::error!("cannot filter what comes through the tunnel itself: {error}");
            }
        }
        // That setting has not come along.
        self.accept_local = index.is_some_and(|index| link::accept_local(&mut self.netlink, index));
        self.republish();
        self.stop_routes();
        if let Err(error) = self.start_routes() {
            tracing::error!("{error}");
        }
    }

    /// What the device has counted.
    pub fn link_stats(&mut self) -> Option<LinkStats> {
        self.netlink.link_stats(self.device.index?).ok()
    }

    /// Suspends those of the peers to whom the way leads through the tunnel
    /// itself, where each datagram would be wrapped again and again, and ends
    /// the suspension of those to whom it leads outside again. Tells whether the
    /// workers need a new table for it.
    pub(super) fn look_at_ways(&mut self, peers: &[(NextHop, SocketAddr)]) -> bool {
        let own = self.device.index;
        let (mut is_news, mut has_resumed) = (false, false);
        for &(hop, endpoint) in peers {
            let way = match self.netlink.interface_to_endpoint(endpoint) {
                Ok(way) => way,
                Err(error) => {
                    tracing::debug!("{error}");
                    continue;
                }
            };
            self.host.note_way(endpoint, way.is_some());
            let is_inside = own.is_some() && way == own;
            if !self.overlay.set_suspended(hop, is_inside) {
                continue;
            }
            is_news = true;
            has_resumed |= !is_inside;
            if !self.host.journal.admits(Instant::now()) {
                continue;
            }
            match is_inside {
                true => tracing::warn!(
                    "the way to peer {endpoint} leads through the tunnel itself: nothing is \
                     sent to it until there is another"
                ),
                false => {
                    tracing::info!("the way to peer {endpoint} leads outside the tunnel again");
                }
            }
        }
        if has_resumed {
            ask_routes(&mut self.overlay, &mut self.netlink);
            // What was learnt of the way through the tunnel says nothing of this.
            self.workers().tell(|| Command::ResetLimits);
        }
        is_news
    }

    /// Makes sure that no peer is reached through the tunnel itself, but for
    /// those that are suspended for that anyway.
    pub(super) fn check_outside(&mut self, overlay: &Overlay) -> Result<()> {
        overlay
            .peers()
            .filter_map(|(_, peer)| peer.endpoint_in_use())
            .try_for_each(|endpoint| {
                link::check_outside(&mut self.netlink, self.device.index, endpoint)
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn news_is_waited_for_together_and_looks_have_a_rest() {
        let mut host = HostNews::new();
        let started = Instant::now();
        host.due().recv_timeout(REST_MIN).unwrap();
        host.looked(started, started);
        assert!(host.due().try_recv().is_err());
        for _ in 0..3 {
            let _ = host.sender().try_send(());
        }
        host.news().try_recv().unwrap();
        // Not before the rest is over, and then soon.
        host.note(started);
        assert_eq!(host.due, Some(started + REST_MIN));
        host.note(started + REST_MIN);
        assert_eq!(host.due, Some(started + REST_MIN));
        // Further news waits for the look.
        let _ = host.sender().try_send(());
        assert!(host.news().try_recv().is_err());
        let later = started + 10 * REST_MIN;
        host.looked(started, later);
        host.news().try_recv().unwrap();
        host.note(later);
        assert_eq!(host.due, Some(later + 100 * REST_MIN));
        host.looked(started, started);
        host.note(later);
        assert_eq!(host.due, Some(later + NEWS_WAIT));
    }
}
