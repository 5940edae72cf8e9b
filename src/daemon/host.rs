//! The host around a running tunnel: the TUN device as it was found last, and the
//! kernel's routes into the tunnel. Both may change without us, and are refreshed when
//! the kernel says that something has ([`RouteReconciler`]).

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::BorrowedFd;

use crossbeam_channel::{Receiver, Sender, bounded};
use ipnet::IpNet;

use crate::error::{Error, Result};
use crate::host::link;
use crate::host::netlink::{Link, LinkStats, Netlink};
use crate::host::routes::RouteReconciler;
use crate::io::tun;

/// Routes that are tried one by one when one of them is refused.
const ROUTES_TRIED_MAX: usize = 64;

/// The TUN device as it was found last.
pub struct Device {
    /// By which the kernel knows it, whatever it is called; `None` while it is in
    /// another network namespace.
    pub index: Option<u32>,
    /// What it is called.
    pub name: String,
}

/// See the module's documentation.
pub struct Host {
    /// In the tunnel's network namespace.
    pub netlink: Netlink,
    /// The device.
    pub device: Device,
    /// The addresses that others have given the device, where those are the ones that count.
    pub addresses: Vec<IpNet>,
    /// Whether the device delivers what comes from our own address.
    pub accepts_local: bool,
    /// `None` while there is none: before the start, at the end, and where it
    /// could not be started again.
    routes: Option<RouteReconciler>,
    /// What it was told to keep, or finds kept when it starts.
    pub routes_kept: BTreeSet<IpNet>,
    /// Prefixes that it cannot keep, as somebody else's routes are in the way.
    routes_refused: BTreeSet<IpNet>,
    /// Something has changed. A second event says nothing more.
    events: (Sender<()>, Receiver<()>),
}

impl Host {
    /// The host of the device of a `queue`, which was made with this name.
    ///
    /// # Errors
    /// When the device has been deleted, or the kernel refuses.
    pub fn new(netlink: Netlink, queue: BorrowedFd<'_>, name: &str) -> Result<Self> {
        let device = Device {
            index: tun::index_of(queue)?,
            name: name.to_string(),
        };
        let mut host = Self {
            netlink,
            device,
            addresses: Vec::new(),
            accepts_local: false,
            routes: None,
            routes_kept: BTreeSet::new(),
            routes_refused: BTreeSet::new(),
            events: bounded(1),
        };
        host.note_index();
        Ok(host)
    }

    /// Whether something has changed since the last call, or may have.
    pub fn take_event(&self) -> bool {
        self.events.1.try_recv().is_ok()
    }

    /// Has the host refreshed soon.
    pub fn schedule_refresh(&self) {
        let _ = self.events.0.try_send(());
    }

    /// What the device has counted.
    pub fn link_stats(&mut self) -> Option<LinkStats> {
        Some(self.link()?.stats)
    }

    /// The device as the kernel has it now, if it is in this namespace.
    pub fn link(&mut self) -> Option<Link> {
        self.netlink.link_by_index(self.device.index?).ok()?
    }

    /// Finds the device of this `queue` again; tells whether it has been in another
    /// namespace, or is there, and perhaps has another index.
    ///
    /// # Errors
    /// When it has been deleted, or the kernel refuses.
    pub fn find_device(&mut self, queue: BorrowedFd<'_>) -> Result<bool> {
        let index = tun::index_of(queue)?;
        let routes = self.routes.as_ref();
        let was_away = routes.is_some_and(|routes| !routes.has_device());
        let has_moved = index != self.device.index || was_away && index.is_some();
        if has_moved {
            self.device.index = index;
            self.note_index();
            if index.is_some() {
                let name = &self.device.name;
                tracing::info!(
                    interface = name,
                    "the TUN device {name} is in this network namespace again"
                );
            }
        }
        if let Some(link) = self.link() {
            self.device.name = link.name;
        }
        Ok(has_moved)
    }

    /// Notes the addresses that the device has; tells whether they are others than before.
    ///
    /// # Errors
    /// When the kernel refuses to list them.
    pub fn find_addresses(&mut self) -> Result<bool> {
        let index = self.device.index;
        let all = self.netlink.addresses()?.into_iter();
        let own = all.filter(|(owner, _)| Some(*owner) == index);
        let own: Vec<IpNet> = own.map(|(_, net)| net).collect();
        let old = std::mem::replace(&mut self.addresses, own);
        Ok(old != self.addresses)
    }

    /// Has the device do what is not its own setting, but that of the namespace.
    fn note_index(&mut self) {
        let (index, netlink) = (self.device.index, &mut self.netlink);
        self.accepts_local = index.is_some_and(|index| netlink.accept_local(index));
        if index.is_none() {
            tracing::warn!(
                interface = self.device.name,
                "the TUN device {} is in another network namespace now: packets are carried as \
                 before, but its addresses, MTU and routes are left to you",
                self.device.name
            );
        }
    }

    /// Makes sure that the path to a peer does not lead through the tunnel.
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
        self.stop_routes();
        // Nobody has reported changes up to now.
        self.schedule_refresh();
        let (addresses, kept) = (addresses.to_vec(), self.routes_kept.clone());
        let (index, events) = (self.device.index, self.events.0.clone());
        let routes = RouteReconciler::start(index, addresses, kept, events)?;
        self.routes = Some(routes);
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

    /// Has the kernel's routes changed, unless prefixes have only moved from peer
    /// to peer.
    ///
    /// # Errors
    /// When somebody else's route is in the way, or the kernel refuses: the routes
    /// are then as before.
    pub fn set_routes(&mut self, mut wanted: BTreeSet<IpNet>) -> Result<()> {
        self.routes_refused.retain(|prefix| wanted.contains(prefix));
        wanted.retain(|prefix| !self.routes_refused.contains(prefix));
        if self.routes_kept == wanted {
            return Ok(());
        }
        let Some(routes) = &self.routes else {
            let what = "the kernel's routes are not kept just now";
            return Err(Error::new(what).hint("try again later"));
        };
        routes.set(wanted.clone())?;
        self.routes_kept = wanted;
        Ok(())
    }

    /// As [`Self::set_routes`], but does without those that are refused, as long as they are
    /// wanted; the log says so.
    pub fn set_routes_that_can_be(&mut self, wanted: &BTreeSet<IpNet>) {
        let Err(error) = self.set_routes(wanted.clone()) else {
            return;
        };
        tracing::warn!(%error, "a prefix of the registry has no route: {error}");
        let kept = self.routes_kept.intersection(wanted).copied().collect();
        let mut results = vec![self.set_routes(kept)];
        let missing: Vec<_> = wanted.difference(&self.routes_kept).copied().collect();
        for (number, prefix) in missing.into_iter().enumerate() {
            let with = self.routes_kept.iter().copied().chain([prefix]).collect();
            // Each takes a look at all of the kernel's routes.
            let is_refused = number >= ROUTES_TRIED_MAX || {
                let result = self.set_routes(with);
                let is_refused = result.is_err();
                results.push(result);
                is_refused
            };
            if is_refused {
                self.routes_refused.insert(prefix);
            }
        }
        for error in results.into_iter().filter_map(Result::err) {
            tracing::debug!("{error}");
        }
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

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;
    use crate::host::netlink::Route;
    use crate::io::tun::Tun;
    use crate::packet::coalesce::TunOffloads;
    use crate::testbed::Namespace;

    /// A device that is up, and the host around it.
    fn device(namespace: &Namespace) -> (Tun, Host) {
        let none = TunOffloads {
            tcp: false,
            udp: false,
        };
        let (device, mut host) = namespace.run(|| {
            let device = tun::create("tun0", 1, none).unwrap();
            let netlink = Netlink::open().unwrap();
            let host = Host::new(netlink, device.queues[0].as_fd(), "tun0").unwrap();
            (device, host)
        });
        let index = host.device.index.unwrap();
        host.netlink.set_up(index).unwrap();
        (device, host)
    }

    fn has_route(host: &mut Host, prefix: IpNet) -> bool {
        let is_it = |route: &Route| route.destination == prefix;
        !host.netlink.main_routes(&is_it).unwrap().is_empty()
    }

    #[test]
    fn routes_stay_from_one_reconciler_to_the_next() {
        let namespace = Namespace::new().unwrap();
        let (_device, mut host) = device(&namespace);
        let prefix: IpNet = "10.7.0.0/16".parse().unwrap();
        let wanted = BTreeSet::from([prefix]);
        let refused = host.set_routes(wanted.clone()).unwrap_err().to_string();
        assert!(refused.contains("try again later"), "{refused}");
        assert!(host.lacks_routes());
        namespace.run(|| {
            host.start_routes(&[]).unwrap();
            host.set_routes(wanted).unwrap();
            assert!(has_route(&mut host, prefix));
            host.stop_routes();
            assert!(has_route(&mut host, prefix) && host.lacks_routes());
            host.start_routes(&[]).unwrap();
            assert!(has_route(&mut host, prefix));
            host.set_routes(BTreeSet::new()).unwrap();
            assert!(!has_route(&mut host, prefix));
        });
    }

    #[test]
    fn events_are_taken_together() {
        let namespace = Namespace::new().unwrap();
        let (device, mut host) = device(&namespace);
        assert!(!host.take_event());
        host.schedule_refresh();
        host.schedule_refresh();
        assert!(host.take_event());
        assert!(!host.take_event());
        // The device is where it was.
        let found = namespace.run(|| host.find_device(device.queues[0].as_fd()));
        assert!(!found.unwrap());
        assert_eq!(host.link().unwrap().name, "tun0");
    }
}
