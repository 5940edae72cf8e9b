//! The reconciler against meddlers, in namespaces. These tests need root.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crossbeam_channel::bounded;
use ipnet::{IpNet, Ipv4Net};

use super::reconciler::{LOGGED_MAX, Reconciler};
use super::{RouteReconciler, run};
use crate::error::Error;
use crate::host::netlink::test_support::Meddling;
use crate::host::netlink::{Netlink, Route, RouteChange, Watch};
use crate::io::tun::{self, Tun};
use crate::packet::coalesce::TunOffloads;
use crate::testbed::Namespace;

const V4: &str = "10.1.0.0/16";
const V6: &str = "fd01::/64";

/// Ends a test that would otherwise wait for ever; nothing is measured by it.
const PATIENCE: Duration = Duration::from_secs(60);

fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}

fn set(prefixes: &[&str]) -> BTreeSet<IpNet> {
    prefixes.iter().copied().map(net).collect()
}

/// A host with the tunnel's device and somebody else's.
struct Host {
    namespace: Namespace,
    netlink: Netlink,
    device: u32,
    other: u32,
    _devices: [Tun; 2],
}

impl Host {
    fn new() -> Self {
        let namespace = Namespace::new().unwrap();
        let none = TunOffloads {
            tcp: false,
            udp: false,
        };
        let devices =
            namespace.run(|| ["tun0", "other0"].map(|name| tun::create(name, 1, none).unwrap()));
        let mut netlink = namespace.netlink().unwrap();
        let index = ["tun0", "other0"].map(|name| netlink.link_index(name).unwrap().unwrap());
        for index in index {
            netlink.set_up(index).unwrap();
        }
        Self {
            namespace,
            netlink,
            device: index[0],
            other: index[1],
            _devices: devices,
        }
    }

    fn reconciler(&self) -> RouteReconciler {
        self.reconciler_with(&[], &[])
    }

    fn reconciler_with(&self, addresses: &[&str], kept: &[&str]) -> RouteReconciler {
        let addresses = addresses.iter().copied().map(net).collect();
        let start =
            || RouteReconciler::start(Some(self.device), addresses, set(kept), bounded(1).0);
        self.namespace.run(start).unwrap()
    }

    /// A reconciler without a thread, and what its thread would have.
    fn parts(&self, prepare: impl Fn(&Netlink, &Watch)) -> (Reconciler, Watch) {
        let (netlink, watch) = self.namespace.run(|| {
            let netlink = Netlink::open().unwrap();
            let watch = Watch::open(&netlink).unwrap();
            (netlink, watch)
        });
        prepare(&netlink, &watch);
        let (device, changes) = (Some(self.device), bounded(1).0);
        let reconciler = Reconciler::new(netlink, device, Vec::new(), set(&[]), changes);
        (reconciler, watch)
    }

    fn main_routes(&mut self) -> Vec<Route> {
        self.netlink.main_routes(&|_| true).unwrap()
    }

    fn routes_to(&mut self, prefix: &str) -> Vec<Route> {
        let mut routes = self.main_routes();
        routes.retain(|entry| entry.destination == net(prefix));
        routes
    }

    fn owned(&mut self) -> BTreeSet<IpNet> {
        let device = Some(self.device);
        let mut routes = self.main_routes();
        routes.retain(|entry| entry.is_ours(device));
        routes.iter().map(|entry| entry.destination).collect()
    }

    /// Where the kernel sends packets to an address of the prefix.
    fn leads_to(&mut self, prefix: &str) -> Option<u32> {
        let address = net(prefix).hosts().nth(5).unwrap();
        self.netlink.interface_to((address, 0).into()).unwrap()
    }

    fn meddle(&mut self, meddling: Meddling, prefix: &str, metric: u32) {
        self.netlink
            .meddle(meddling, net(prefix), self.other, metric)
            .unwrap();
    }

    fn has_foreign(&mut self, prefix: &str) -> bool {
        let other = self.other;
        let routes = self.routes_to(prefix);
        routes.iter().any(|entry| entry.oif == Some(other))
    }

    /// Waits until packets to the prefix go into the tunnel.
    fn await_ours(&mut self, prefix: &str) {
        let device = self.device;
        self.wait_for(prefix, |host| host.leads_to(prefix) == Some(device));
    }

    fn wait_for(&mut self, what: &str, mut happened: impl FnMut(&mut Self) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !happened(self) {
            if Instant::now() > deadline {
                panic!("{what} never came right: {:?}", self.main_routes());
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

/// `count` prefixes of 10.0.0.0/8 and on, 24 bits each, from the `first` on.
fn many(first: u32, count: u32) -> BTreeSet<IpNet> {
    let base = u32::from_be_bytes([10, 0, 0, 0]);
    (first..first + count)
        .map(|number| Ipv4Net::new_assert((base + (number << 8)).into(), 24).into())
        .collect()
}

#[test]
fn routes_are_added_and_deleted_by_the_difference() {
    let mut host = Host::new();
    let reconciler = host.reconciler();
    reconciler.set(set(&[V4, V6, "10.2.0.0/16"])).unwrap();
    assert_eq!(host.owned(), set(&[V4, V6, "10.2.0.0/16"]));
    assert_eq!(host.leads_to(V4), Some(host.device));
    assert_eq!(host.leads_to(V6), Some(host.device));
    reconciler.set(set(&[V6, "10.3.0.0/16"])).unwrap();
    assert_eq!(host.owned(), set(&[V6, "10.3.0.0/16"]));
    reconciler.set(set(&[])).unwrap();
    assert_eq!(host.owned(), set(&[]));
}

#[test]
fn a_deleted_route_comes_back() {
    let mut host = Host::new();
    let reconciler = host.reconciler();
    reconciler.set(set(&[V4, V6])).unwrap();
    let oif = host.device;
    // More often than the first answer, which comes at once.
    for _ in 0..5 {
        for prefix in [V4, V6] {
            host.netlink
                .del_route(net(prefix), None, Some(oif))
                .unwrap();
            host.await_ours(prefix);
        }
    }
}

#[test]
fn a_replaced_route_is_put_in_front_of_the_one_that_replaced_it() {
    let mut host = Host::new();
    let reconciler = host.reconciler();
    reconciler.set(set(&[V4, V6])).unwrap();
    for metric in [0, 1] {
        host.meddle(Meddling::Replace, V6, metric);
        host.await_ours(V6);
        assert!(host.has_foreign(V6), "metric {metric}");
    }
    host.meddle(Meddling::Replace, V4, 0);
    assert!(host.has_foreign(V4));
    host.await_ours(V4);
    assert!(host.has_foreign(V4));
    reconciler.set(set(&[])).unwrap();
    for prefix in [V4, V6] {
        assert!(host.has_foreign(prefix));
        assert_eq!(host.leads_to(prefix), Some(host.other));
    }
}

#[test]
fn an_overridden_route_is_put_in_front() {
    let mut host = Host::new();
    let reconciler = host.reconciler();
    reconciler.set(set(&[V4, V6])).unwrap();
    for meddling in [Meddling::Append, Meddling::Prepend] {
        for prefix in [V4, V6] {
            host.meddle(meddling, prefix, 0);
            host.await_ours(prefix);
            assert!(host.has_foreign(prefix));
            host.netlink
                .del_route(net(prefix), None, Some(host.other))
                .unwrap();
        }
    }
    assert_eq!(host.routes_to(V4).len(), 1, "no duplicates of ours");
}

#[test]
fn routes_and_addresses_survive_the_device_being_down() {
    let mut host = Host::new();
    let oif = host.device;
    let addresses = ["10.9.0.1/24", "fd09::1/64"];
    for address in addresses {
        host.netlink.add_address(oif, net(address)).unwrap();
    }
    let reconciler = host.reconciler_with(&addresses, &[]);
    let wanted = [V4, V6, "10.9.0.0/24", "fd09::/64"];
    reconciler.set(set(&wanted)).unwrap();
    assert_eq!(host.owned(), set(&[V4, V6]), "the others are the kernel's");

    host.netlink.set_down(oif).unwrap();
    assert!(
        !host
            .netlink
            .addresses()
            .unwrap()
            .contains(&(oif, net("fd09::1/64")))
    );
    assert_eq!(host.owned(), set(&[]));
    // What is wanted meanwhile comes with the device.
    let mut wanted = set(&wanted);
    wanted.insert(net("10.5.0.0/16"));
    reconciler.set(wanted).unwrap();
    host.netlink.set_up(oif).unwrap();
    for prefix in [V4, V6, "10.5.0.0/16", "10.9.0.0/24", "fd09::/64"] {
        host.await_ours(prefix);
    }
    let present = host.netlink.addresses().unwrap();
    for address in addresses {
        assert!(present.contains(&(oif, net(address))), "{address}");
    }
}

/// With its last IPv4 address the kernel drops all IPv4 routes of a device, and
/// reports none of them.
#[test]
fn routes_and_addresses_survive_the_addresses_being_taken_away() {
    let mut host = Host::new();
    let oif = host.device;
    let addresses = ["10.9.0.1/24", "10.9.0.2/24", "fd09::1/64"].map(net);
    for address in addresses {
        host.netlink.add_address(oif, address).unwrap();
    }
    let reconciler = host.reconciler_with(&["10.9.0.1/24", "10.9.0.2/24", "fd09::1/64"], &[]);
    reconciler.set(set(&[V4, V6])).unwrap();
    for _ in 0..6 {
        // The second IPv4 address may go with the first one.
        for address in addresses {
            let _ = host.netlink.del_address(oif, address);
        }
        host.wait_for("all addresses and routes", |host| {
            let present = host.netlink.addresses().unwrap();
            let is_there = |address: &IpNet| present.contains(&(oif, *address));
            addresses.iter().all(is_there) && host.owned() == set(&[V4, V6])
        });
    }
    drop(reconciler);
    host.netlink.del_address(oif, addresses[2]).unwrap();
    let present = host.netlink.addresses().unwrap();
    assert!(!present.contains(&(oif, addresses[2])));
}

/// With its last address the device loses its IPv4 routes, and somebody else
/// takes the place of one.
#[test]
fn routes_lost_between_two_reconcilers_come_back() {
    let mut host = Host::new();
    let (oif, address) = (host.device, net("10.9.0.1/24"));
    host.netlink.add_address(oif, address).unwrap();
    let reconciler = host.reconciler_with(&["10.9.0.1/24"], &[]);
    reconciler.set(set(&[V4, V6])).unwrap();
    drop(reconciler);
    host.netlink.del_address(oif, address).unwrap();
    host.meddle(Meddling::Append, V4, 0);
    let _reconciler = host.reconciler_with(&["10.9.0.1/24"], &[V4, V6]);
    assert_eq!(host.owned(), set(&[V4, V6]));
    assert_eq!(host.leads_to(V4), Some(oif));
    let present = host.netlink.addresses().unwrap();
    assert!(present.contains(&(oif, address)) && host.has_foreign(V4));
}

#[test]
fn ipv6_that_is_away_between_two_reconcilers_comes_back_with_the_mtu() {
    let mut host = Host::new();
    let reconciler = host.reconciler();
    reconciler.set(set(&[V4, V6])).unwrap();
    host.netlink.set_mtu(host.device, 1000).unwrap();
    drop(reconciler);
    let reconciler = host.reconciler_with(&[], &[V4, V6]);
    assert_eq!(host.owned(), set(&[V4]));
    // A change that fails leaves it so.
    let taken = "10.7.0.0/16";
    host.meddle(Meddling::Append, taken, 0);
    reconciler.set(set(&[V4, V6, taken])).unwrap_err();
    host.netlink.set_mtu(host.device, 1500).unwrap();
    host.await_ours(V6);
    assert_eq!(host.owned(), set(&[V4, V6]));
}

#[test]
fn changes_anywhere_on_the_host_are_reported() {
    let mut host = Host::new();
    let (changed, changes) = bounded(1);
    let start = || RouteReconciler::start(Some(host.device), Vec::new(), set(&[]), changed);
    let reconciler = host.namespace.run(start).unwrap();
    reconciler.set(set(&[V4])).unwrap();
    let await_report = || changes.recv_timeout(PATIENCE).unwrap();
    let (other, address) = (host.other, net("10.9.0.1/32"));
    host.netlink.add_address(other, address).unwrap();
    await_report();
    host.netlink.set_down(other).unwrap();
    await_report();
    drop(reconciler);
}

#[test]
fn a_foreign_route_is_a_conflict_and_nothing_is_half_done() {
    let mut host = Host::new();
    let reconciler = host.reconciler();
    reconciler.set(set(&["10.7.0.0/16"])).unwrap();
    for (prefix, text) in [
        (V4, "route 10.1.0.0/16 exists already on other0; "),
        (V6, "route fd01::/64 exists already on other0; "),
    ] {
        host.meddle(Meddling::Append, prefix, 0);
        let before = host.main_routes();
        let wanted = set(&["10.0.0.0/16", prefix, "fd02::/64"]);
        let error = reconciler.set(wanted.clone()).unwrap_err().to_string();
        assert!(error.starts_with(text), "{error}");
        assert_eq!(host.main_routes(), before);
        host.netlink
            .del_route(net(prefix), None, Some(host.other))
            .unwrap();
        reconciler.set(wanted).unwrap();
        reconciler.set(set(&["10.7.0.0/16"])).unwrap();
    }
    // Others that do not get in the way do no harm.
    host.meddle(Meddling::Append, V4, 100);
    host.meddle(Meddling::Append, V6, 2000);
    reconciler.set(set(&[V4, V6])).unwrap();
    assert_eq!(host.leads_to(V6), Some(host.device));
    assert!(host.has_foreign(V4) && host.has_foreign(V6));
}

#[test]
fn routes_of_others_through_the_device_are_left_alone() {
    let mut host = Host::new();
    let oif = host.device;
    host.netlink.add_address(oif, net("10.9.0.1/24")).unwrap();
    host.netlink.add_route(net(V4), None, Some(oif)).unwrap();
    let before = host.main_routes();
    let reconciler = host.reconciler();
    reconciler.set(set(&["10.9.0.0/24", V4])).unwrap();
    reconciler.set(set(&[])).unwrap();
    reconciler.set(set(&["10.9.0.0/24", V4])).unwrap();
    assert_eq!(host.main_routes(), before);
    assert_eq!(host.owned(), set(&[]));
    // When the kernel's is deleted or overridden, ours takes its place.
    host.netlink
        .del_route(net("10.9.0.0/24"), None, Some(oif))
        .unwrap();
    host.await_ours("10.9.0.0/24");
    host.meddle(Meddling::Prepend, V4, 0);
    host.await_ours(V4);
    assert_eq!(host.owned(), set(&["10.9.0.0/24", V4]));
    reconciler.set(set(&[])).unwrap();
    assert_eq!(host.routes_to(V4).len(), 2);
}

#[test]
fn a_new_process_finds_the_routes_of_the_old_one() {
    let mut host = Host::new();
    let reconciler = host.reconciler();
    reconciler.set(set(&[V4, V6, "10.2.0.0/16"])).unwrap();
    drop(reconciler);
    assert_eq!(host.owned(), set(&[V4, V6, "10.2.0.0/16"]));

    // Overridden meanwhile; fixed at the start.
    host.meddle(Meddling::Prepend, V4, 0);
    let _reconciler = host.reconciler_with(&[], &[V4, V6]);
    assert_eq!(host.leads_to(V4), Some(host.device));
    assert_eq!(host.owned(), set(&[V4, V6]));
    assert!(host.has_foreign(V4));
}

/// What is in the way is no reason to forget what is wanted.
#[test]
fn a_new_process_puts_its_routes_in_front_of_others() {
    let mut host = Host::new();
    for prefix in [V4, V6] {
        host.meddle(Meddling::Append, prefix, 0);
    }
    host.reconciler().set(set(&["10.7.0.0/16"])).unwrap();
    let wanted = set(&[V4, V6, "10.8.0.0/16"]);
    let mut netlink = host.namespace.netlink().unwrap();
    let free = super::check_free(&mut netlink, Some(host.device), &wanted).unwrap_err();
    let error = free.to_string();
    assert!(error.contains("exists already on other0"), "{error}");
    let reconciler = host.reconciler_with(&[], &[V4, V6, "10.8.0.0/16"]);
    for prefix in &wanted {
        assert_eq!(host.leads_to(&prefix.to_string()), Some(host.device));
    }
    assert!(host.routes_to("10.7.0.0/16").is_empty());
    assert!(host.has_foreign(V4) && host.has_foreign(V6));
    super::check_free(&mut netlink, Some(host.device), &wanted).unwrap();
    // What has nothing to do with it can be changed.
    let more = &wanted | &set(&["10.9.0.0/16"]);
    reconciler.set(more.clone()).unwrap();
    assert_eq!(host.owned(), more);
}

/// What is logged by `work`.
fn log_of(work: impl FnOnce()) -> String {
    let log = tempfile::NamedTempFile::new().unwrap();
    let subscriber = tracing_subscriber::fmt()
        .with_writer(Arc::new(log.reopen().unwrap()))
        .finish();
    tracing::subscriber::with_default(subscriber, work);
    std::fs::read_to_string(log.path()).unwrap()
}

/// Runs a reconciler's thread meanwhile.
fn run_while(reconciler: Reconciler, watch: Watch, work: impl FnOnce() + Send) {
    let reconciler = Mutex::new(reconciler);
    let (stopped, stop) = std::io::pipe().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            work();
            drop(stop);
        });
        run(&reconciler, watch, &stopped);
    });
}

/// Not in a flood of log lines.
#[test]
fn contention_is_logged_a_few_times() {
    let mut host = Host::new();
    let (mut reconciler, watch) = host.parts(|_, _| {});
    reconciler.set(set(&[V4])).unwrap();
    let log = log_of(|| {
        run_while(reconciler, watch, || {
            for _ in 0..3 * LOGGED_MAX {
                // When ours is in front of this very route, it is deleted first.
                let _ = host.netlink.del_route(net(V4), None, Some(host.other));
                host.meddle(Meddling::Replace, V4, 0);
                host.await_ours(V4);
            }
        });
    });
    // Overridden, or gone where the other one had just been deleted.
    let warnings = log.matches("10.1.0.0/16 on tun0 was ").count();
    assert_eq!(warnings, LOGGED_MAX as usize, "{log}");
    assert_eq!(log.matches("again and again").count(), 1, "{log}");
    assert_eq!(log.lines().count(), warnings, "{log}");
}

#[test]
fn an_ipv6_route_that_nothing_can_override_is_waited_out() {
    let mut host = Host::new();
    // The same metric and preference as ours, and there first.
    for owner in [host.other, host.device] {
        let change = [RouteChange::Add(net(V6))];
        let refused = host.netlink.change_device_routes(owner, &change);
        assert!(refused.unwrap().is_empty());
    }
    let reconciler = host.reconciler_with(&[], &[V4, V6]);
    assert_eq!(host.leads_to(V6), Some(host.other));
    host.netlink
        .del_route(net(V4), None, Some(host.device))
        .unwrap();
    host.await_ours(V4);
    assert!(host.has_foreign(V6));
    // Nor does it keep another reconciler from going on with the rest.
    drop(reconciler);
    let _reconciler = host.reconciler_with(&[], &[V4, V6]);
    let change = [RouteChange::Delete(net(V6))];
    host.netlink
        .change_device_routes(host.other, &change)
        .unwrap();
    host.await_ours(V6);
}

/// A fault that is gone at every other comparison is not logged at each of them.
#[test]
fn a_fault_that_comes_and_goes_does_not_flood_the_log() {
    let mut host = Host::new();
    let (mut reconciler, _) = host.parts(|_, _| {});
    reconciler.set(set(&[V6])).unwrap();
    let (add, delete) = (RouteChange::Add(net(V6)), RouteChange::Delete(net(V6)));
    let (ours, theirs) = (host.device, host.other);
    let log = log_of(|| {
        for _ in 0..50 {
            // Theirs was there before ours.
            for (owner, change) in [(ours, delete), (theirs, add), (ours, add)] {
                let refused = host.netlink.change_device_routes(owner, &[change]);
                assert!(refused.unwrap().is_empty());
            }
            reconciler.compare(true);
            let refused = host.netlink.change_device_routes(theirs, &[delete]);
            assert!(refused.unwrap().is_empty());
            reconciler.compare(true);
        }
    });
    let warnings = log.matches("nothing can override that").count();
    assert!((1..10).contains(&warnings), "{log}");
}

/// What cannot be fixed is not forgotten while too much else is logged.
#[test]
fn a_fault_that_was_not_logged_is_logged_later() {
    let host = Host::new();
    let (mut reconciler, _) = host.parts(|_, _| {});
    let complain =
        |reconciler: &mut Reconciler, what: &str| reconciler.complain(Some(Error::new(what)));
    let log = log_of(|| {
        for number in 0..LOGGED_MAX {
            complain(&mut reconciler, &format!("other {number}"));
        }
        complain(&mut reconciler, "lasting");
    });
    assert!(!log.contains("lasting"), "{log}");
    let log = log_of(|| {
        reconciler.be_quiet();
        for _ in 0..3 {
            complain(&mut reconciler, "lasting");
        }
    });
    assert_eq!(log.matches("lasting").count(), 1, "{log}");
}

/// Listing a million routes takes a while.
#[test]
fn whether_the_device_is_there_is_told_during_a_comparison() {
    let host = Host::new();
    let reconciler = host.reconciler();
    {
        let _comparing = super::lock(&reconciler.reconciler);
        assert!(reconciler.has_device());
    }
    drop(host._devices);
    let deadline = Instant::now() + PATIENCE;
    while reconciler.has_device() {
        assert!(Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// The kernel's answers are lost in the middle of a change.
#[test]
fn a_change_that_breaks_off_is_taken_back() {
    let mut host = Host::new();
    let (mut reconciler, _) = host.parts(|netlink, _| netlink.shrink());
    reconciler.set(set(&[V4])).unwrap();
    // Each IPv6 route is refused, and each refusal takes room.
    let sysctl = "net/ipv6/conf/tun0/disable_ipv6";
    host.namespace.sysctl(sysctl, "1").unwrap();
    let mut wanted = many(1000, 100);
    wanted.extend((0..100).map(|number| net(&format!("fd01:{number:x}::/32"))));
    let error = reconciler.set(wanted).unwrap_err();
    assert_eq!(error.errno(), Some(libc::ENOBUFS), "{error}");
    assert_eq!(host.owned(), set(&[V4]));
    // The late answers do not get in the way of the next change's.
    reconciler.set(set(&[V4, "10.2.0.0/16"])).unwrap();
    assert_eq!(host.owned(), set(&[V4, "10.2.0.0/16"]));
    // Where they are read, the change is refused and taken back all the same.
    let error = reconciler.set(set(&[V4, V6])).unwrap_err();
    assert!(error.to_string().contains(V6), "{error}");
    assert_eq!(host.owned(), set(&[V4, "10.2.0.0/16"]));
}

/// A route of ours that is not wanted goes with the next comparison.
#[test]
fn a_stray_route_is_deleted() {
    let mut host = Host::new();
    let reconciler = host.reconciler();
    reconciler.set(set(&[V4])).unwrap();
    let stray = [RouteChange::Add(net("10.2.0.0/16"))];
    let refused = host.netlink.change_device_routes(host.device, &stray);
    assert!(refused.unwrap().is_empty());
    let oif = host.device;
    host.netlink.del_route(net(V4), None, Some(oif)).unwrap();
    host.wait_for("the stray route", |host| host.owned() == set(&[V4]));
}

/// Below an MTU of 1280 bytes the device has no IPv6.
#[test]
fn ipv4_is_kept_while_the_device_takes_no_ipv6() {
    let mut host = Host::new();
    let oif = host.device;
    let address = "fd09::1/128";
    host.netlink.add_address(oif, net(address)).unwrap();
    let reconciler = host.reconciler_with(&[address], &[]);
    reconciler.set(set(&[V4, V6])).unwrap();
    for _ in 0..2 {
        host.netlink.set_mtu(oif, 1200).unwrap();
        assert_eq!(host.routes_to(V6), []);
        host.netlink.del_route(net(V4), None, Some(oif)).unwrap();
        host.await_ours(V4);
        // Others can be added meanwhile. Those of IPv6 wait.
        let wanted = set(&[V4, V6, "10.2.0.0/16", "fd02::/64"]);
        reconciler.set(wanted.clone()).unwrap();
        assert_eq!(host.owned(), set(&[V4, "10.2.0.0/16"]));
        host.netlink.set_mtu(oif, 1280).unwrap();
        host.wait_for("IPv6", |host| host.owned() == wanted);
        reconciler.set(set(&[V4, V6])).unwrap();
        let addresses = host.netlink.addresses().unwrap();
        assert!(addresses.contains(&(oif, net(address))));
    }
}

#[test]
fn lost_events_do_no_harm() {
    let mut host = Host::new();
    let (mut reconciler, watch) = host.parts(|_, watch| watch.shrink());
    reconciler.set(set(&[V4])).unwrap();
    // Before the event that matters come a thousand that do not.
    let noise = many(10_000, 1000).into_iter().map(RouteChange::Add);
    let noise: Vec<_> = noise.collect();
    host.netlink
        .change_device_routes(host.other, &noise)
        .unwrap();
    host.netlink
        .del_route(net(V4), None, Some(host.device))
        .unwrap();
    run_while(reconciler, watch, || host.await_ours(V4));
}

fn replace_all(count: u32) {
    let mut host = Host::new();
    let reconciler = host.reconciler();
    let timed = |what: &str, work: &mut dyn FnMut()| {
        let started = Instant::now();
        work();
        eprintln!(
            "{count} routes {what}: {:.2} s",
            started.elapsed().as_secs_f64()
        );
    };
    let (first, second) = (many(0, count), many(count, count));
    timed("set", &mut || reconciler.set(first.clone()).unwrap());
    assert_eq!(host.owned(), first);
    timed("set again", &mut || reconciler.set(first.clone()).unwrap());
    timed("replaced", &mut || reconciler.set(second.clone()).unwrap());
    assert_eq!(host.owned(), second);
    let oif = host.device;
    host.netlink.set_down(oif).unwrap();
    host.netlink.set_up(oif).unwrap();
    timed("put back", &mut || {
        host.wait_for("all", |host| host.owned() == second);
    });
    let one = *second.iter().next().unwrap();
    host.wait_for("one", |host| {
        let _ = host.netlink.del_route(one, None, Some(oif));
        true
    });
    timed("one of them put back", &mut || {
        host.await_ours(&one.to_string());
    });
    timed("removed", &mut || reconciler.set(BTreeSet::new()).unwrap());
    assert_eq!(host.owned(), set(&[]));
}

#[test]
fn ten_thousand_routes_are_replaced_by_ten_thousand_others() {
    replace_all(10_000);
}

#[test]
#[ignore = "takes long; prints how long"]
fn a_hundred_thousand_routes_are_replaced_by_as_many_others() {
    replace_all(100_000);
}
