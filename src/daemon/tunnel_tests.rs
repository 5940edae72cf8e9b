use std::ffi::OsStr;

use super::*;
use crate::config::{PeerSpec, parse_peer};
use crate::io::tun;
use crate::io::udp::UdpOffloads;
use crate::packet::coalesce::TunOffloads;
use crate::routing::overlay::Origin;
use crate::testbed::{UNDERLAY_NAME, pair};
use crate::wire::Mode;

const FAR: &str = "10.1.0.2:8285";

fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}

fn add(overlay: &mut Overlay, spec: &PeerSpec) {
    overlay.add_peer(spec, false, Origin::Runtime).unwrap();
}

/// A tunnel in this thread's namespace, as it is after a start.
fn start() -> Tunnel {
    let flags = "--io epoll --peer 10.1.0.2=10.7.0.0/16 --address 10.7.0.1/32";
    let config = Config::from_words(flags.split_whitespace().map(OsStr::new)).unwrap();
    let mut overlay = Overlay::default();
    add(&mut overlay, &config.peers[0]);
    let mut netlink = Netlink::open().unwrap();
    let endpoints = [FAR.parse().unwrap()];
    let prefixes = config.peers.iter().flat_map(|peer| peer.prefixes.clone());
    let settings = Settings::at_start(&config, &endpoints, prefixes, &mut netlink);
    let (settings, _) = settings.unwrap();
    let (no_tun, no_udp) = (
        TunOffloads {
            tcp: false,
            udp: false,
        },
        UdpOffloads {
            segment: false,
            gro: false,
        },
    );
    let sockets = udp::open(settings.listen, 1, no_udp, Mode::Plain).unwrap();
    let claimed = Claimed {
        device: tun::create(&config.tun, 1, no_tun).unwrap(),
        sockets,
    };
    let plan = Plan {
        config,
        settings,
        overlay,
    };
    let (names, ..) = Names::without_threads();
    let mut tunnel = Tunnel::new(plan, names, netlink, claimed).unwrap();
    tunnel.workers.go();
    tunnel.bring_up(&[]).unwrap();
    let addresses = tunnel.settings.link.addresses.clone();
    tunnel.host.start_routes(&addresses).unwrap();
    tunnel.host.set_routes(tunnel.kernel_routes()).unwrap();
    tunnel.poll();
    tunnel
}

/// Runs a test with a tunnel on a host with a neighbour.
fn with_tunnel(test: impl FnOnce(&mut Tunnel, u32) + Send) {
    let hosts = pair(&[(net("10.1.0.1/24"), net("10.1.0.2/24"))], 1500).unwrap();
    hosts.a.run(|| {
        let mut tunnel = start();
        let underlay = tunnel.host.netlink.link_index(UNDERLAY_NAME).unwrap();
        test(&mut tunnel, underlay.unwrap());
        tunnel.take_down();
    });
}

fn only_peer(tunnel: &Tunnel) -> &crate::routing::overlay::Peer {
    tunnel.peers.overlay.peer(0).unwrap()
}

#[test]
fn a_change_that_fails_changes_nothing() {
    with_tunnel(|tunnel, underlay| {
        // Somebody else's route, which is in the way.
        let taken = net("10.9.0.0/16");
        let netlink = &mut tunnel.host.netlink;
        netlink.add_route(taken, None, Some(underlay)).unwrap();
        let (table, routes) = (
            Arc::clone(&tunnel.workers.setup.table),
            tunnel.host.routes_kept.clone(),
        );
        for prefixes in ["10.8.0.0/16,10.9.0.0/16", "10.1.0.3/32"] {
            let peer = parse_peer(&format!("10.1.0.3={prefixes}")).unwrap();
            let mut next = tunnel.peers.overlay.clone();
            add(&mut next, &peer);
            assert!(tunnel.commit_overlay(next).is_err(), "{prefixes}");
            assert!(Arc::ptr_eq(&table, &tunnel.workers.setup.table));
            assert_eq!(tunnel.host.routes_kept, routes);
            assert_eq!(tunnel.peers.overlay.peers().count(), 1);
        }
        let peer = parse_peer("10.1.0.3=10.8.0.0/16").unwrap();
        let mut next = tunnel.peers.overlay.clone();
        add(&mut next, &peer);
        tunnel.commit_overlay(next).unwrap();
        assert_eq!(tunnel.peers.overlay.peers().count(), 2);
        assert!(tunnel.host.routes_kept.contains(&net("10.8.0.0/16")));
    });
}

#[test]
fn a_peer_is_suspended_while_its_path_leads_through_the_tunnel() {
    with_tunnel(|tunnel, _| {
        assert_eq!(only_peer(tunnel).path_mtu_bytes, Some(1500));
        let (inside, device) = (net("10.1.0.2/32"), tunnel.host.device.index);
        let netlink = &mut tunnel.host.netlink;
        netlink.add_route(inside, None, device).unwrap();
        tunnel.host.schedule_refresh();
        tunnel.poll();
        let peer = only_peer(tunnel);
        assert!(peer.is_suspended && peer.path_mtu_bytes.is_none());
        // It is resumed as soon as there is a path outside, which is known at once.
        let netlink = &mut tunnel.host.netlink;
        netlink.del_route(inside, None, device).unwrap();
        tunnel.poll();
        let peer = only_peer(tunnel);
        assert!(!peer.is_suspended);
        assert_eq!(peer.path_mtu_bytes, Some(1500));
    });
}

#[test]
fn the_mtu_follows_the_route_unless_it_was_set_by_hand() {
    with_tunnel(|tunnel, underlay| {
        let mut set_and_poll = |index: Option<u32>, mtu_bytes: u32| {
            let index = index.or(tunnel.host.device.index).unwrap();
            tunnel.host.netlink.set_mtu(index, mtu_bytes).unwrap();
            tunnel.host.schedule_refresh();
            tunnel.poll();
            tunnel.host.link().unwrap().mtu
        };
        assert_eq!(set_and_poll(Some(underlay), 1400), 1372);
        assert_eq!(set_and_poll(None, 1300), 1300);
        assert_eq!(set_and_poll(Some(underlay), 1450), 1300);
        assert_eq!(set_and_poll(None, 1372), 1422);
    });
}
