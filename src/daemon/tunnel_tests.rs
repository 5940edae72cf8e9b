use std::ffi::OsStr;

use super::*;
use crate::config::{PeerSpec, parse_peer};
use crate::io::tun;
use crate::io::udp::UdpOffloads;
use crate::packet::coalesce::TunOffloads;
use crate::routing::overlay::Origin;
use crate::testbed::{UNDERLAY_NAME, pair};
use crate::wire::wireguard::handshake::TransportKeys;
use crate::wire::wireguard::keys::PrivateKey;
use crate::wire::wireguard::session::Session;

const FAR: &str = "10.1.0.2:8285";

fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}

fn add(overlay: &mut Overlay, spec: &PeerSpec) {
    overlay.add_peer(spec, false, Origin::Runtime).unwrap();
}

/// A tunnel in this thread's namespace, before it carries packets.
fn prepare(flags: &str) -> Tunnel {
    let flags = format!("--io epoll --address 10.7.0.1/32 {flags}");
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
    let sockets = udp::open(settings.listen, 1, no_udp, config.mode()).unwrap();
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
    Tunnel::new(plan, names, netlink, claimed).unwrap()
}

/// The same, as it is after a start.
fn start(flags: &str) -> Tunnel {
    let mut tunnel = prepare(flags);
    tunnel.go().unwrap();
    tunnel.bring_up(&[]).unwrap();
    let addresses = tunnel.settings.link.addresses.clone();
    tunnel.host.start_routes(&addresses).unwrap();
    tunnel.host.set_routes(tunnel.kernel_routes()).unwrap();
    tunnel.poll();
    tunnel
}

/// Runs a test on a host with a neighbour.
fn on_host(test: impl FnOnce() + Send) {
    let hosts = pair(&[(net("10.1.0.1/24"), net("10.1.0.2/24"))], 1500).unwrap();
    hosts.a.run(test);
}

/// Runs a test with a tunnel on a host with a neighbour.
fn with_tunnel(test: impl FnOnce(&mut Tunnel, u32) + Send) {
    on_host(|| {
        let mut tunnel = start("--peer 10.1.0.2=10.7.0.0/16");
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

/// Runs a test with an encrypted tunnel.
fn with_encrypted(test: impl FnOnce(&mut Tunnel) + Send) {
    let key = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(key.path(), PrivateKey::generate().to_base64()).unwrap();
    let far = PrivateKey::generate().public();
    let key_file = key.path().display();
    let flags = format!("--private-key {key_file} --peer {far}@10.1.0.2=10.7.0.0/16");
    on_host(|| {
        let mut tunnel = start(&flags);
        test(&mut tunnel);
        tunnel.take_down();
    });
}

/// What a tunnel is, with another private key.
fn with_key(tunnel: &Tunnel, key: &PrivateKey) -> Plan {
    let mut config = tunnel.config.clone();
    config.private_key = Some(key.clone());
    Plan {
        config,
        settings: tunnel.settings.clone(),
        overlay: tunnel.peers.overlay.clone(),
    }
}

/// A new key ends sessions, so it is used once all else has succeeded.
#[test]
fn sessions_outlive_a_change_that_fails() {
    with_encrypted(|tunnel| {
        let own = tunnel.config.public_key();
        let sessions = Arc::clone(&only_peer(tunnel).secure.as_ref().unwrap().sessions);
        let keys = TransportKeys {
            send: Default::default(),
            receive: Default::default(),
            remote_index: 1,
        };
        let session = Session::new(keys, 1, false, 1, Arc::clone(&sessions));
        sessions.next.store(Some(Arc::new(session)));
        let new = PrivateKey::generate();
        let mut plan = with_key(tunnel, &new);
        // The path to it would lead through the tunnel.
        let far = PrivateKey::generate().public();
        let inside = parse_peer(&format!("{far}@10.1.0.3=10.1.0.3/32")).unwrap();
        add(&mut plan.overlay, &inside);
        assert!(tunnel.commit(plan).is_err());
        assert_eq!(tunnel.config.public_key(), own);
        assert!(sessions.next.load().is_some());
        tunnel.commit(with_key(tunnel, &new)).unwrap();
        assert_eq!(tunnel.config.public_key(), Some(new.public()));
        assert!(sessions.next.load().is_none());
    });
}

/// Whether the peer comes to the key, or the key to the peer.
#[test]
fn no_peer_has_this_hosts_own_key() {
    with_encrypted(|tunnel| {
        let own = tunnel.config.public_key().unwrap();
        let mut next = tunnel.peers.overlay.clone();
        add(
            &mut next,
            &parse_peer(&format!("{own}=10.8.0.0/16")).unwrap(),
        );
        let refused = tunnel.commit_overlay(next).unwrap_err().to_string();
        let what = format!("peer {own} has this host's own key");
        assert!(refused.contains(&what), "{refused}");
        let new = PrivateKey::generate();
        let peer = format!("{}=10.8.0.0/16", new.public());
        let mut next = tunnel.peers.overlay.clone();
        add(&mut next, &parse_peer(&peer).unwrap());
        tunnel.commit_overlay(next).unwrap();
        let plan = with_key(tunnel, &new);
        let refused = tunnel.commit(plan).unwrap_err().to_string();
        assert!(refused.contains("this host's own key"), "{refused}");
        assert_eq!(tunnel.config.public_key(), Some(own));
    });
}

/// Another process may still send from sockets that are to be taken over.
#[test]
fn sockets_are_marked_once_the_tunnel_runs() {
    on_host(|| {
        let mut tunnel = prepare("--fwmark 7 --peer 10.1.0.2=10.7.0.0/16");
        let mark = |tunnel: &Tunnel| {
            let socket = tunnel.workers.descriptors[0].receive();
            socket2::SockRef::from(&socket).mark().unwrap()
        };
        assert_eq!(mark(&tunnel), 0);
        tunnel.go().unwrap();
        assert_eq!(mark(&tunnel), 7);
        tunnel.take_down();
    });
}
