use std::net::Ipv4Addr;
use std::time::Duration;

use super::peer::Secure;
use super::*;
use crate::config::parse_peer;
use crate::counters::PeerCounters;
use crate::packet::batch::BATCH_BYTES_MAX;
use crate::packet::icmp::TunnelAddresses;

fn spec(text: &str) -> PeerSpec {
    parse_peer(text).unwrap()
}

fn specs(texts: &[&str]) -> Vec<PeerSpec> {
    texts.iter().map(|text| spec(text)).collect()
}

fn name(text: &str) -> PeerName {
    spec(text).name
}

fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}

fn overlay(texts: &[&str]) -> Overlay {
    let mut overlay = Overlay::default();
    overlay.count_for(2);
    for text in texts {
        add(&mut overlay, text, Origin::Config).unwrap();
    }
    resolve(&mut overlay);
    overlay
}

fn add(overlay: &mut Overlay, text: &str, origin: Origin) -> Result<()> {
    let spec = spec(text);
    overlay.add_peer(&spec, spec.prefixes.is_empty(), origin)
}

/// Every peer at the address that it is named by.
fn resolve(overlay: &mut Overlay) {
    let all: Vec<_> = overlay
        .peers()
        .filter_map(|(hop, peer)| Some((hop, peer.place.as_ref()?.literal()?)))
        .collect();
    for (hop, endpoint) in all {
        overlay.set_endpoint(hop, Some(endpoint));
    }
}

/// What all views of an overlay must agree on.
fn check(overlay: &Overlay) {
    let table = overlay.table(TunnelAddresses::default(), false);
    let mut counts = BTreeMap::new();
    for (prefix, peer, _) in overlay.prefixes() {
        *counts.entry(peer.name.id()).or_insert(0) += 1;
        let (found, by) = overlay.route_to(prefix.network()).unwrap();
        let longest = overlay
            .prefixes()
            .map(|(other, ..)| other)
            .filter(|other| other.contains(&prefix.network()))
            .max_by_key(IpNet::prefix_len);
        assert_eq!(found, longest);
        let (hop, in_table) = table.peer(prefix.network()).unwrap();
        assert_eq!(in_table.endpoint, by.endpoint);
        assert!(Arc::ptr_eq(&in_table.traffic, &by.traffic));
        assert_eq!(overlay.find(&by.name).unwrap().0, hop);
    }
    let by_hop = counts
        .into_iter()
        .map(|(key, count)| (overlay.names[&key], count));
    assert_eq!(overlay.prefix_counts(), by_hop.collect());
    let defaults = overlay.peers().filter(|(_, peer)| overlay.is_default(peer));
    let defaults: Vec<_> = defaults.map(|(hop, _)| hop).collect();
    assert_eq!(defaults, Vec::from_iter(overlay.default));
    let hops: BTreeSet<_> = overlay.peers().map(|(hop, _)| hop).collect();
    for hop in 0..overlay.peers.len() as NextHop {
        let is_there = hops.contains(&hop);
        assert_eq!(overlay.peer(hop).is_some(), is_there);
        assert_eq!(overlay.free.contains(&hop), !is_there);
    }
    assert!(overlay.peer(overlay.peers.len() as NextHop).is_none());
}

/// Peers added and removed, prefixes added and removed.
fn counts(changes: &Changes) -> [usize; 4] {
    [
        changes.peers_added,
        changes.peers_removed,
        changes.prefixes_added,
        changes.prefixes_removed,
    ]
}

fn peer_of(overlay: &Overlay, address: &str) -> Option<String> {
    let (_, peer) = overlay.route_to(address.parse().unwrap())?;
    Some(peer.name.to_string())
}

#[test]
fn the_longest_prefix_wins_and_the_rest_goes_to_the_peer_without() {
    let overlay = overlay(&[
        "10.0.0.1=10.1.0.0/16,fd00:1::/32",
        "10.0.0.2:99=10.1.7.0/24",
        "[fd00::3]",
    ]);
    check(&overlay);
    let to = |address| peer_of(&overlay, address).unwrap();
    assert_eq!(to("10.1.1.1"), "10.0.0.1:8285");
    assert_eq!(to("10.1.7.1"), "10.0.0.2:99");
    assert_eq!(to("fd00:1::1"), "10.0.0.1:8285");
    assert_eq!(to("192.0.2.1"), "[fd00::3]:8285");
    let table = overlay.table(TunnelAddresses::default(), false);
    let (_, rest) = table.peer("192.0.2.1".parse().unwrap()).unwrap();
    assert_eq!(rest.endpoint, "[fd00::3]:8285".parse().ok());
}

#[test]
fn contradictions_name_both_sides() {
    let mut one = overlay(&["10.0.0.1=10.1.0.0/16", "10.0.0.2"]);
    let text = |result: Result<()>| result.unwrap_err().to_string();
    let clash = text(add(&mut one, "10.0.0.3=10.1.0.0/16", Origin::Runtime));
    for part in ["10.1.0.0/16", "10.0.0.1:8285", "10.0.0.3:8285"] {
        assert!(clash.contains(part), "{clash}");
    }
    let mut two = overlay(&["10.0.0.1=10.1.0.0/16", "10.0.0.2"]);
    let clash = text(add(&mut two, "10.0.0.3", Origin::Runtime));
    assert!(
        clash.contains("10.0.0.2:8285") && clash.contains("10.0.0.3:8285"),
        "{clash}"
    );
    let again = text(add(&mut two, "10.0.0.1:8285=10.7.0.0/16", Origin::Runtime));
    assert!(again.contains("already"), "{again}");
    let unknown = text(two.remove_peers(&[name("10.9.9.9")]).map(drop));
    assert!(unknown.contains("10.9.9.9:8285"), "{unknown}");
    let nothing = text(two.remove_prefixes(&[net("10.9.0.0/16")]).map(drop));
    assert!(nothing.contains("10.9.0.0/16"), "{nothing}");
}

#[test]
fn prefixes_move_only_when_asked_to() {
    let mut overlay = overlay(&["10.0.0.1=10.1.0.0/16,10.2.0.0/16", "10.0.0.2=10.3.0.0/16"]);
    let (to, prefixes) = (name("10.0.0.2"), [net("10.1.0.0/16"), net("10.4.0.0/16")]);
    let kept = overlay.clone();
    assert!(
        overlay
            .add_prefixes(&to, &prefixes, Origin::Runtime, false)
            .is_err()
    );
    overlay = kept;
    let before = overlay.clone();
    overlay
        .add_prefixes(&to, &prefixes, Origin::Runtime, true)
        .unwrap();
    assert_eq!(counts(&Changes::between(&before, &overlay)), [0, 0, 2, 0]);
    check(&overlay);
    assert_eq!(peer_of(&overlay, "10.1.0.1").unwrap(), "10.0.0.2:8285");
    // What is there already does not change.
    let before = overlay.clone();
    overlay
        .add_prefixes(&to, &prefixes, Origin::Runtime, true)
        .unwrap();
    assert_eq!(counts(&Changes::between(&before, &overlay)), [0; 4]);
    overlay.remove_prefixes(&prefixes).unwrap();
    assert_eq!(counts(&Changes::between(&before, &overlay)), [0, 0, 0, 2]);
    check(&overlay);
    assert_eq!(peer_of(&overlay, "10.1.0.1"), None);
    let before = overlay.clone();
    overlay.remove_peers(&[to]).unwrap();
    assert_eq!(counts(&Changes::between(&before, &overlay)), [0, 1, 0, 1]);
    check(&overlay);
    assert_eq!(peer_of(&overlay, "10.3.0.1"), None);
}

#[test]
fn a_reload_applies_the_difference_and_leaves_the_operators_additions() {
    let mut overlay = overlay(&[
        "10.0.0.1=10.1.0.0/16,10.2.0.0/16",
        "10.0.0.2=10.3.0.0/16",
        "a",
    ]);
    add(&mut overlay, "10.0.0.9=10.9.0.0/16", Origin::Runtime).unwrap();
    overlay
        .add_prefixes(
            &name("10.0.0.1"),
            &[net("10.8.0.0/16")],
            Origin::Runtime,
            false,
        )
        .unwrap();
    let traffic = Arc::clone(&overlay.find(&name("10.0.0.1")).unwrap().1.traffic);

    // The first loses one prefix to a new one, the second goes, the third is
    // no longer the one without.
    let new = specs(&[
        "10.0.0.1=10.1.0.0/16",
        "10.0.0.4=10.2.0.0/16",
        "A.=10.5.0.0/16",
    ]);
    let changes = overlay.configure(&new).unwrap();
    assert_eq!(counts(&changes), [1, 1, 2, 1]);
    resolve(&mut overlay);
    check(&overlay);
    let to = |address| peer_of(&overlay, address);
    assert_eq!(to("10.1.0.1").unwrap(), "10.0.0.1:8285");
    assert_eq!(to("10.2.0.1").unwrap(), "10.0.0.4:8285");
    assert_eq!(to("10.3.0.1"), None);
    assert_eq!(to("10.5.0.1").unwrap(), "a:8285");
    assert_eq!(to("10.8.0.1").unwrap(), "10.0.0.1:8285");
    assert_eq!(to("10.9.0.1").unwrap(), "10.0.0.9:8285");
    let (_, kept) = overlay.find(&name("10.0.0.1")).unwrap();
    assert!(Arc::ptr_eq(&kept.traffic, &traffic), "counters go on");
    // The same again makes no difference.
    assert_eq!(counts(&overlay.configure(&new).unwrap()), [0; 4]);
}

/// Also to what takes it away again.
#[test]
fn what_the_file_has_is_the_files_even_if_it_was_added_by_command() {
    let mut overlay = overlay(&["10.0.0.1=10.1.0.0/16"]);
    let runtime = [net("10.5.0.0/16"), net("10.6.0.0/16")];
    let first = name("10.0.0.1");
    overlay
        .add_prefixes(&first, &runtime, Origin::Runtime, false)
        .unwrap();
    add(&mut overlay, "10.0.0.2=10.7.0.0/16", Origin::Runtime).unwrap();
    let all = specs(&["10.0.0.1=10.1.0.0/16,10.5.0.0/16", "10.0.0.2=10.7.0.0/16"]);
    assert_eq!(counts(&overlay.configure(&all).unwrap()), [0; 4]);
    let origins: Vec<_> = overlay.prefixes().map(|(_, _, origin)| origin).collect();
    let (config, runtime) = (Origin::Config, Origin::Runtime);
    assert_eq!(origins, [config, config, runtime, config]);
    let changes = overlay.configure(&specs(&["10.0.0.1=10.1.0.0/16"]));
    assert_eq!(counts(&changes.unwrap()), [0, 1, 0, 2]);
    assert!(overlay.route_to("10.5.0.1".parse().unwrap()).is_none());
    let kept = overlay.route_to("10.6.0.1".parse().unwrap()).unwrap();
    assert_eq!(kept.0, Some(net("10.6.0.0/16")));
}

#[test]
fn a_reload_that_clashes_with_the_operators_additions_is_refused() {
    let mut overlay = overlay(&["10.0.0.1=10.1.0.0/16"]);
    add(&mut overlay, "10.0.0.9=10.9.0.0/16", Origin::Runtime).unwrap();
    let clash = overlay.configure(&specs(&["10.0.0.1=10.9.0.0/16"]));
    let text = clash.unwrap_err().to_string();
    assert!(
        text.contains("10.9.0.0/16") && text.contains("10.0.0.9"),
        "{text}"
    );
}

/// In whatever order the file names them.
#[test]
fn a_reload_may_give_an_operators_default_peer_prefixes() {
    for peers in [
        ["10.0.0.1", "10.0.0.9=10.9.0.0/16"],
        ["10.0.0.9=10.9.0.0/16", "10.0.0.1"],
    ] {
        let mut overlay = overlay(&["10.0.0.1=10.1.0.0/16"]);
        add(&mut overlay, "10.0.0.9", Origin::Runtime).unwrap();
        overlay.configure(&specs(&peers)).unwrap();
        resolve(&mut overlay);
        check(&overlay);
        assert_eq!(peer_of(&overlay, "192.0.2.1").unwrap(), "10.0.0.1:8285");
        assert_eq!(peer_of(&overlay, "10.9.0.1").unwrap(), "10.0.0.9:8285");
    }
    // An operator's that the file says nothing about stays what it is.
    let mut overlay = overlay(&["10.0.0.1=10.1.0.0/16"]);
    add(&mut overlay, "10.0.0.9", Origin::Runtime).unwrap();
    let new = specs(&["10.0.0.2=10.2.0.0/16", "10.0.0.1"]);
    let text = overlay.configure(&new).unwrap_err().to_string();
    assert!(
        text.contains("10.0.0.9:8285") && text.contains("10.0.0.1:8285"),
        "{text}"
    );
    // As a whole or not at all.
    check(&overlay);
    assert_eq!(peer_of(&overlay, "10.1.0.1").unwrap(), "10.0.0.1:8285");
    assert_eq!(peer_of(&overlay, "10.2.0.1").unwrap(), "10.0.0.9:8285");
    assert_eq!(overlay.peers().count(), 2);
}

#[test]
fn places_are_used_again_and_counters_are_not() {
    let mut overlay = overlay(&["10.0.0.1=10.1.0.0/16", "10.0.0.2=10.2.0.0/16"]);
    let (hop, peer) = overlay.find(&name("10.0.0.1")).unwrap();
    peer.traffic[0].packets_enqueued.add(7);
    overlay.remove_peers(&[name("10.0.0.1")]).unwrap();
    add(&mut overlay, "10.0.0.3=10.1.0.0/16", Origin::Runtime).unwrap();
    let (again, peer) = overlay.find(&name("10.0.0.3")).unwrap();
    assert_eq!(again, hop);
    assert_eq!(peer.traffic[0].packets_sent(), 0);
    resolve(&mut overlay);
    check(&overlay);
}

/// However many there are, each is found at once.
#[test]
fn as_many_peers_as_there_may_be_come_and_go() {
    let peers = |count: usize| -> Vec<PeerSpec> {
        let spec = |number: u32| {
            let place = HostPort {
                host: format!("p{number}.example"),
                port: 1,
            };
            PeerSpec {
                prefixes: vec![IpAddr::from((number + 1).to_be_bytes()).into()],
                ..PeerSpec::new(PeerName::Host(place.clone()), Some(place))
            }
        };
        (1..=count as u32).map(spec).collect()
    };
    let mut overlay = Overlay::default();
    let added = overlay.configure(&peers(PEERS_MAX)).unwrap();
    assert_eq!(added.peers_added, PEERS_MAX);
    let is_there = |hop: usize| overlay.peer(hop as NextHop).is_some();
    assert!(is_there(PEERS_MAX - 1) && !is_there(PEERS_MAX));
    let one_more = add(&mut overlay, "a=10.0.0.0/8", Origin::Runtime);
    assert!(one_more.is_err());
    let gone = overlay.configure(&peers(1)).unwrap();
    assert_eq!(gone.peers_removed, PEERS_MAX - 1);
    assert_eq!(gone.prefixes_removed, PEERS_MAX - 1);
    check(&overlay);
}

#[test]
fn a_path_limits_what_is_carried_in_one_piece() {
    let mut overlay = overlay(&["10.0.0.1=10.1.0.0/16", "[fd00::2]=10.2.0.0/16"]);
    let mtu = |overlay: &Overlay, address: &str| {
        let table = overlay.table(TunnelAddresses::default(), false);
        table.peer(address.parse().unwrap()).unwrap().1.mtu_bytes
    };
    assert_eq!(mtu(&overlay, "10.1.0.1"), BATCH_BYTES_MAX);
    for (text, overhead) in [("10.0.0.1", 28), ("[fd00::2]", 48)] {
        let (hop, _) = overlay.find(&name(text)).unwrap();
        assert!(overlay.set_path_mtu(hop, 1400, false));
        assert!(!overlay.set_path_mtu(hop, 1400, false));
        let address = if overhead == 28 {
            "10.1.0.1"
        } else {
            "10.2.0.1"
        };
        assert_eq!(mtu(&overlay, address), 1400 - overhead);
    }
    // Another address, another path.
    let (hop, _) = overlay.find(&name("10.0.0.1")).unwrap();
    assert!(overlay.set_endpoint(hop, "10.0.0.7:1".parse().ok()));
    assert_eq!(mtu(&overlay, "10.1.0.1"), BATCH_BYTES_MAX);
}

#[test]
fn nothing_is_sent_to_a_suspended_peer() {
    let mut overlay = overlay(&["10.0.0.1=10.1.0.0/16", "10.0.0.2=10.2.0.0/16"]);
    let (hop, _) = overlay.find(&name("10.0.0.1")).unwrap();
    let sent_to = |overlay: &Overlay, address: &str| {
        let table = overlay.table(TunnelAddresses::default(), false);
        table.peer(address.parse().unwrap()).unwrap().1.endpoint
    };
    let there = sent_to(&overlay, "10.1.0.1");
    assert!(there.is_some() && overlay.in_use(hop).is_some());
    overlay.set_path_mtu(hop, 1400, false);
    assert!(overlay.set_suspended(hop, true));
    assert!(!overlay.set_suspended(hop, true));
    assert_eq!(sent_to(&overlay, "10.1.0.1"), None);
    assert!(sent_to(&overlay, "10.2.0.1").is_some() && overlay.in_use(hop).is_none());
    let (_, peer) = overlay.find(&name("10.0.0.1")).unwrap();
    assert_eq!((peer.endpoint, peer.path_mtu_bytes), (there, None));
    assert!(overlay.set_suspended(hop, false));
    assert_eq!(sent_to(&overlay, "10.1.0.1"), there);
    overlay.set_suspended(hop, true);
    let elsewhere = "10.0.0.7:1".parse().ok();
    overlay.set_endpoint(hop, elsewhere);
    assert_eq!(sent_to(&overlay, "10.1.0.1"), elsewhere);
}

#[test]
fn the_unspecified_address_is_not_a_peers() {
    let overlay = overlay(&["10.0.0.1=0.0.0.0/0,0.0.0.0/32", "10.0.0.2"]);
    let table = overlay.table(TunnelAddresses::default(), false);
    assert!(table.peer(Ipv4Addr::UNSPECIFIED.into()).is_none());
    assert!(table.peer([0, 0, 0, 1].into()).is_some());
}

#[test]
fn a_peer_elsewhere_has_no_learned_port_and_no_proof() {
    let mut overlay = overlay(&["10.0.0.1:1"]);
    let hop = overlay.find(&name("10.0.0.1:1")).unwrap().0;
    let traffic = Arc::clone(&overlay.in_use(hop).unwrap().traffic);
    let in_use = |overlay: &Overlay| overlay.in_use(hop).unwrap().endpoint_in_use().unwrap();
    let is_proven = || traffic.iter().any(PeerCounters::is_own_port_proven);
    traffic[1].set_own_port_proven(true);
    assert!(overlay.set_learned_port(hop, Some(2)));
    assert!(!overlay.set_learned_port(hop, Some(2)) && !is_proven());
    assert_eq!(in_use(&overlay).to_string(), "10.0.0.1:2");
    let table = overlay.table(TunnelAddresses::default(), false);
    let (_, peer) = table.peer([10, 9, 9, 9].into()).unwrap();
    assert_eq!(peer.endpoint, Some(in_use(&overlay)));
    traffic[1].set_own_port_proven(true);
    assert!(overlay.set_endpoint(hop, "10.0.0.9:1".parse().ok()) && !is_proven());
    assert_eq!(in_use(&overlay).to_string(), "10.0.0.9:1");
}

#[test]
fn this_hosts_own_addresses_are_not_a_peers() {
    let mut overlay = overlay(&["10.0.0.1=10.1.0.0/16,10.1.0.7/32,fd00::/16", "10.0.0.2"]);
    let is_a_peers = |overlay: &Overlay, address: &str| {
        let table = overlay.table(TunnelAddresses::default(), false);
        table.peer(address.parse().unwrap()).is_some()
    };
    let own = ["10.1.0.7", "10.1.0.8", "fd00::8", "192.0.2.1"];
    for address in own {
        assert!(is_a_peers(&overlay, address), "{address}");
    }
    let addresses: BTreeSet<IpAddr> = own.iter().map(|own| own.parse().unwrap()).collect();
    assert!(overlay.set_own_addresses(addresses.clone()));
    assert!(!overlay.set_own_addresses(addresses));
    for address in own {
        assert!(!is_a_peers(&overlay, address), "{address}");
    }
    for address in ["10.1.0.9", "fd00::9", "192.0.2.2"] {
        assert!(is_a_peers(&overlay, address), "{address}");
    }
    assert!(overlay.set_own_addresses(BTreeSet::new()));
    assert!(is_a_peers(&overlay, "10.1.0.7"));
}

/// What has such a source inside could pass outside for the peer itself.
#[test]
fn the_addresses_that_peers_have_outside_are_not_a_peers() {
    let mut overlay = overlay(&[
        "10.0.0.1=10.0.0.0/8",
        "[fd00::2]:1",
        "peer.example=10.9.0.0/16",
    ]);
    let is_a_peers = |overlay: &Overlay, address: &str| {
        let address = address.parse().unwrap();
        let table = overlay.table(TunnelAddresses::default(), false);
        let is_a_peers = table.peer(address).is_some();
        assert_eq!(overlay.is_outside(address), !is_a_peers);
        is_a_peers
    };
    for address in ["10.0.0.1", "fd00::2", "0.0.0.0", "::"] {
        assert!(!is_a_peers(&overlay, address), "{address}");
    }
    for address in ["10.0.0.2", "fd00::1", "10.0.0.9", "10.0.0.3"] {
        assert!(is_a_peers(&overlay, address), "{address}");
    }
    // Also once a name has an address, and another one; and while a peer is suspended.
    let (hop, _) = overlay.find(&name("peer.example")).unwrap();
    overlay.set_endpoint(hop, "10.0.0.9:1".parse().ok());
    assert!(!is_a_peers(&overlay, "10.0.0.9"));
    overlay.set_suspended(hop, true);
    assert!(!is_a_peers(&overlay, "10.0.0.9"));
    overlay.set_endpoint(hop, "10.0.0.3:1".parse().ok());
    assert!(is_a_peers(&overlay, "10.0.0.9") && !is_a_peers(&overlay, "10.0.0.3"));
    // A prefix of that length makes no difference, and the address is free again
    // with the peer.
    let prefix = [net("10.0.0.3/32")];
    overlay
        .add_prefixes(&name("10.0.0.1"), &prefix, Origin::Runtime, false)
        .unwrap();
    assert!(!is_a_peers(&overlay, "10.0.0.3"));
    overlay.remove_peers(&[name("peer.example")]).unwrap();
    assert!(is_a_peers(&overlay, "10.0.0.3"));
}

#[test]
fn errors_come_from_the_first_address_of_each_family() {
    let addresses = ["fd00::1/64", "10.244.1.2/16", "10.9.9.9/32"].map(net);
    let found = tunnel_addresses(&addresses, true);
    assert_eq!(found.v4.map(IpNet::V4), Some(addresses[1]));
    assert_eq!(found.v6.map(IpNet::V6), Some(addresses[0]));
    assert!(found.accept_local);
}

proptest::proptest! {
    /// Whatever is asked for in whatever order: all views agree.
    #[test]
    fn stays_consistent(steps in proptest::collection::vec((0..6u8, 0..4u8, 0..6u8), 0..60)) {
        let mut overlay = Overlay::default();
        overlay.count_for(1);
        for (step, peer, prefix) in steps {
            let peer = format!("10.0.0.{}", peer + 1);
            let prefix = net(&format!("10.{}.0.0/{}", prefix / 2, 15 + prefix % 3));
            let prefix = prefix.trunc();
            let mut next = overlay.clone();
            let changed = match step {
                0 => add(&mut next, &format!("{peer}={prefix}"), Origin::Config),
                1 => add(&mut next, &peer, Origin::Runtime),
                2 => next.remove_peers(&[name(&peer)]),
                3 => next
                    .add_prefixes(&name(&peer), &[prefix], Origin::Runtime, prefix.prefix_len() == 16)
                    .map(drop),
                4 => next.remove_prefixes(&[prefix]).map(drop),
                _ => next.configure(&specs(&[&format!("{peer}={prefix}")])).map(drop),
            };
            if changed.is_ok() {
                overlay = next;
                resolve(&mut overlay);
                check(&overlay);
            }
        }
    }
}

#[test]
fn differences_are_named_and_many_are_counted() {
    let old = overlay(&["10.0.0.1=10.1.0.0/16,10.2.0.0/16", "10.0.0.2"]);
    let mut new = old.clone();
    let peers = ["10.0.0.1=10.2.0.0/16", "10.0.0.3=10.1.0.0/16,10.3.0.0/16"];
    new.configure(&specs(&peers)).unwrap();
    let words = |new: &Overlay| Changes::between(&old, new).words();
    assert_eq!(words(&old), "");
    assert_eq!(
        words(&new),
        "peer 10.0.0.3:8285 added, peer 10.0.0.2:8285 removed, 10.1.0.0/16 moved from \
         10.0.0.1:8285 to 10.0.0.3:8285, 10.3.0.0/16 given to 10.0.0.3:8285, the rest taken \
         from 10.0.0.2:8285"
    );
    let many: Vec<_> = (0..20)
        .map(|third| net(&format!("10.9.{third}.0/24")))
        .collect();
    let mut more = old.clone();
    more.add_prefixes(&name("10.0.0.1"), &many, Origin::Runtime, false)
        .unwrap();
    let words = words(&more);
    assert!(words.ends_with(" and 12 more changes"), "{words}");
}

const KEY: &str = "xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg=";

fn secure(overlay: &Overlay) -> &Secure {
    overlay.find(&name(KEY)).unwrap().1.secure.as_ref().unwrap()
}

/// Whatever is configured anew, the peer, its sessions and where it has roamed to stay.
#[test]
fn a_peer_with_a_key_is_known_by_it() {
    let mut one = spec(&format!("{KEY}@10.0.0.1=10.1.0.0/16"));
    let mut overlay = Overlay::default();
    overlay.configure(std::slice::from_ref(&one)).unwrap();
    let (hop, sessions) = (0, Arc::clone(&secure(&overlay).sessions));
    let endpoint = |overlay: &Overlay| overlay.peer(hop).unwrap().endpoint;
    assert_eq!(endpoint(&overlay), "10.0.0.1:8285".parse().ok());
    let roamed: SocketAddr = "192.0.2.7:1024".parse().unwrap();
    assert!(overlay.set_roamed(hop, roamed));
    assert!(overlay.peer(hop).unwrap().has_roamed());
    // The same again, a preshared key, a keepalive, no endpoint any more.
    for (change, is_changed) in [(0, false), (1, true), (2, true), (3, true)] {
        match change {
            1 => one.preshared_key = KEY.parse().unwrap(),
            2 => one.persistent_keepalive = Some(Duration::from_secs(25)),
            3 => one.endpoint = None,
            _ => {}
        }
        let changes = overlay.configure(std::slice::from_ref(&one)).unwrap();
        assert_eq!(counts(&changes), [0; 4]);
        assert_eq!(changes.peers_changed, usize::from(is_changed));
        let words = changes.words();
        assert_eq!(words.contains("changed"), is_changed, "{words}");
        assert_eq!(endpoint(&overlay), Some(roamed));
        assert!(Arc::ptr_eq(&secure(&overlay).sessions, &sessions));
    }
    assert_eq!(
        secure(&overlay).persistent_keepalive,
        one.persistent_keepalive
    );
    assert!(secure(&overlay).preshared_key == one.preshared_key);
    // An address that is given now is where it is sent to; a name has to resolve first.
    one.endpoint = spec("10.0.0.9:7").endpoint;
    overlay.configure(std::slice::from_ref(&one)).unwrap();
    assert_eq!(endpoint(&overlay), "10.0.0.9:7".parse().ok());
    assert!(!overlay.peer(hop).unwrap().has_roamed());
    one.endpoint = spec("far.example").endpoint;
    overlay.configure(std::slice::from_ref(&one)).unwrap();
    assert_eq!(endpoint(&overlay), "10.0.0.9:7".parse().ok());
    let names: Vec<_> = overlay.dns_names().map(ToString::to_string).collect();
    assert_eq!(names, ["far.example:8285"]);
    assert_eq!(
        overlay.placed_at(overlay.dns_names().next().unwrap()),
        [hop]
    );
    // Another peer in its place has sessions of its own.
    overlay.remove_peers(&[name(KEY)]).unwrap();
    overlay.configure(std::slice::from_ref(&one)).unwrap();
    assert!(!Arc::ptr_eq(&secure(&overlay).sessions, &sessions));
}

/// Nothing that is not proved is taken from a peer with a key, and packets inside the tunnel
/// may be for the address that it has outside.
#[test]
fn the_address_of_a_peer_with_a_key_says_nothing() {
    let overlay = overlay(&[&format!("{KEY}@10.0.0.1"), "10.0.0.2=10.2.0.0/16"]);
    let table = overlay.table(TunnelAddresses::default(), false);
    let address = |text: &str| text.parse::<IpAddr>().unwrap();
    assert!(!table.senders().has(address("10.0.0.1")));
    assert!(table.senders().has(address("10.0.0.2")));
    assert!(!overlay.is_outside(address("10.0.0.1")));
    assert!(overlay.is_outside(address("10.0.0.2")));
    let (_, peer) = table.peer(address("10.0.0.1")).unwrap();
    let sessions = peer.sessions.as_ref().unwrap();
    assert!(Arc::ptr_eq(sessions, &secure(&overlay).sessions));
    assert!(
        table
            .peer(address("10.2.0.1"))
            .unwrap()
            .1
            .sessions
            .is_none()
    );
}

#[test]
fn a_sealed_packet_leaves_less_room() {
    let mut overlay = overlay(&[&format!("{KEY}@10.0.0.1")]);
    let mtu = |overlay: &Overlay| {
        let table = overlay.table(TunnelAddresses::default(), false);
        table.at(0).unwrap().mtu_bytes
    };
    overlay.set_path_mtu(0, 1500, false);
    assert_eq!(mtu(&overlay), 1440);
    overlay.set_roamed(0, "[fd00::1]:1".parse().unwrap());
    overlay.set_path_mtu(0, 1500, false);
    assert_eq!(mtu(&overlay), 1420);
    overlay.set_suspended(0, true);
    let table = overlay.table(TunnelAddresses::default(), false);
    assert!(table.at(0).unwrap().is_suspended);
}
