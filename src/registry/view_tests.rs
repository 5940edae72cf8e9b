use proptest::prelude::*;

use super::*;
use crate::config::PeerName;
use crate::registry::entry::extra_to_json;

fn net(text: &str) -> Ipv4Net {
    text.parse().unwrap()
}

fn keys() -> Keys {
    Keys::new("/n")
}

fn host(subnet: &str, ip: &str, revision: i64) -> Pair {
    let value = HostValue::new(ip.parse().unwrap(), None).to_json();
    pair(keys().subnet(net(subnet)), value, revision)
}

fn extra(subnet: &str, prefixes: &[&str], revision: i64) -> Pair {
    let prefixes: Vec<IpNet> = prefixes.iter().map(|text| text.parse().unwrap()).collect();
    pair(
        keys().extra(net(subnet)),
        extra_to_json(&prefixes),
        revision,
    )
}

fn pair(key: String, value: impl Into<String>, revision: i64) -> Pair {
    Pair {
        key: key.into(),
        value: value.into().into(),
        create_revision: revision,
        mod_revision: revision,
        lease: 7,
    }
}

fn policy() -> Policy {
    Policy {
        network: Network::parse(br#"{"Network":"10.50.0.0/16"}"#).unwrap(),
        own_ip: "10.0.0.1".parse().unwrap(),
        own_key: None,
        allowed: Vec::new(),
        allowed_prefixes: vec![
            "10.60.0.0/16".parse().unwrap(),
            "fd60::/16".parse().unwrap(),
        ],
        reserved: BTreeSet::from(["10.60.7.9".parse().unwrap()]),
    }
}

fn view(pairs: &[Pair]) -> View {
    let mut view = View::new(keys());
    view.replace(pairs.to_vec(), 1, 100, Instant::now());
    view
}

fn snapshot(view: &View) -> Snapshot {
    view.snapshot(&policy(), &Snapshot::default())
}

fn shown(snapshot: &Snapshot) -> Vec<String> {
    let show = |spec: &Arc<PeerSpec>| {
        let prefixes: Vec<_> = spec.prefixes.iter().map(ToString::to_string).collect();
        format!("{}={}", spec.name, prefixes.join(","))
    };
    snapshot.peers.values().map(show).collect()
}

#[test]
fn hosts_are_peers_but_for_this_one() {
    let view = view(&[
        host("10.50.1.0/24", "10.0.0.1", 1),
        host("10.50.2.0/24", "10.0.0.2", 2),
        // A host that has come back with another subnet.
        host("10.50.3.0/24", "10.0.0.2", 3),
        extra("10.50.2.0/24", &["10.60.0.0/24"], 4),
    ]);
    assert_eq!(
        shown(&snapshot(&view)),
        ["10.0.0.2:8285=10.50.2.0/24,10.50.3.0/24,10.60.0.0/24"]
    );
    assert_eq!(snapshot(&view).unused, Unused::default());
}

#[test]
fn what_does_not_belong_is_counted_and_not_used() {
    let vxlan = r#"{"PublicIP":"10.0.0.9","PublicIPv6":null,"BackendType":"vxlan"}"#;
    let mut policy = policy();
    policy.allowed = vec!["10.0.0.0/24".parse().unwrap()];
    let view = view(&[
        host("10.50.2.0/24", "10.0.0.2", 1),
        host("10.51.2.0/24", "10.0.0.3", 1),
        host("10.50.0.0/16", "10.0.0.4", 1),
        // A part of what the first one has.
        host("10.50.2.128/25", "10.0.0.4", 1),
        host("10.50.5.0/24", "192.0.2.5", 1),
        pair("/n/subnets/10.50.9.0-24".into(), vxlan, 1),
        pair("/n/subnets/junk".into(), "{}", 1),
        pair("/n/subnets/10.50.7.0-24".into(), "{", 1),
        extra(
            "10.50.2.0/24",
            &["0.0.0.0/0", "10.50.3.0/25", "10.60.0.0/24"],
            1,
        ),
    ]);
    let snapshot = view.snapshot(&policy, &Snapshot::default());
    assert_eq!(
        shown(&snapshot),
        ["10.0.0.2:8285=10.50.2.0/24,10.60.0.0/24"]
    );
    let expected = Unused {
        malformed: 4,
        not_allowed: 1,
        prefixes_refused: 0,
        out_of_place: 3,
        other_backend: 1,
    };
    assert_eq!(snapshot.unused, expected);
}

/// Else whoever may write one host's keys has all of the others' traffic.
#[test]
fn prefixes_are_those_that_are_allowed_and_in_nobodys_way() {
    let refused = [
        "::/0",
        "128.0.0.0/1",
        "10.59.0.0/15",
        "10.61.0.0/24",
        // A host's address, etcd's, and others that are in nothing allowed.
        "10.60.2.0/24",
        "10.60.7.9/32",
        "10.0.0.1/32",
        "10.0.0.3/32",
    ];
    let mut all = vec!["10.60.0.0/24", "10.60.8.0/22", "fd60::/32"];
    all.extend(refused);
    let view = view(&[
        host("10.50.1.0/24", "10.0.0.1", 1),
        // What this host publishes is its own affair.
        extra("10.50.1.0/24", &["10.99.0.0/24"], 1),
        host("10.50.2.0/24", "10.0.0.2", 1),
        host("10.50.3.0/24", "10.60.2.7", 1),
        extra("10.50.2.0/24", &all, 1),
    ]);
    let snapshot = snapshot(&view);
    assert_eq!(
        shown(&snapshot),
        [
            "10.0.0.2:8285=10.50.2.0/24,10.60.0.0/24,10.60.8.0/22,fd60::/32",
            "10.60.2.7:8285=10.50.3.0/24"
        ]
    );
    assert_eq!(snapshot.unused.prefixes_refused, refused.len());
    // By default there are none.
    let policy = Policy {
        allowed_prefixes: Vec::new(),
        ..policy()
    };
    let snapshot = view.snapshot(&policy, &Snapshot::default());
    assert_eq!(snapshot.unused.prefixes_refused, all.len());
}

#[test]
fn a_malformed_value_changes_nothing() {
    let good = host("10.50.2.0/24", "10.0.0.2", 1);
    let mut view = view(std::slice::from_ref(&good));
    let before = snapshot(&view);
    let bad = pair("/n/subnets/10.50.2.0-24".into(), "{", 101);
    assert!(!view.put(bad.clone()));
    let after = snapshot(&view);
    assert_eq!((&after.peers, after.unused.malformed), (&before.peers, 1));
    assert_eq!(view.revision(), 101);
    // Also when all is read again.
    view.replace(vec![bad.clone()], 1, 102, Instant::now());
    assert_eq!(snapshot(&view).peers, before.peers);
    // Its value can be put right, and its key can go.
    assert!(view.put(good));
    assert_eq!(snapshot(&view), before);
    view.put(bad.clone());
    view.delete(&bad.key, 103);
    assert_eq!(snapshot(&view), Snapshot::default());
}

#[test]
fn of_two_claimants_the_first_has_a_prefix() {
    let mut view = view(&[
        host("10.50.2.0/24", "10.0.0.2", 1),
        host("10.50.3.0/24", "10.0.0.3", 1),
        extra("10.50.2.0/24", &["10.60.0.0/24"], 9),
        extra("10.50.3.0/24", &["10.60.0.0/24"], 8),
    ]);
    let shown_now = |view: &View| shown(&snapshot(view));
    let second = [
        "10.0.0.2:8285=10.50.2.0/24",
        "10.0.0.3:8285=10.50.3.0/24,10.60.0.0/24",
    ];
    assert_eq!(shown_now(&view), second);
    assert_eq!(snapshot(&view).unused.out_of_place, 1);
    view.delete(keys().extra(net("10.50.3.0/24")).as_bytes(), 10);
    let first = [
        "10.0.0.2:8285=10.50.2.0/24,10.60.0.0/24",
        "10.0.0.3:8285=10.50.3.0/24",
    ];
    assert_eq!(shown_now(&view), first);
    // What is left of a host before does not count.
    view.put(Pair {
        lease: 8,
        ..host("10.50.2.0/24", "10.0.0.4", 11)
    });
    let other = ["10.0.0.3:8285=10.50.3.0/24", "10.0.0.4:8285=10.50.2.0/24"];
    assert_eq!(shown_now(&view), other);
}

#[test]
fn hosts_that_a_strange_cluster_does_not_know_are_held() {
    let now = Instant::now();
    let all = [
        host("10.50.2.0/24", "10.0.0.2", 1),
        host("10.50.3.0/24", "10.0.0.3", 1),
        host("10.50.4.0/24", "10.0.0.4", 1),
        extra("10.50.3.0/24", &["10.60.0.0/24"], 4),
    ];
    for (cluster, revision) in [(2, 500), (1, 50)] {
        let mut view = view(&all);
        let before = snapshot(&view);
        view.replace(all[..1].to_vec(), cluster, revision, now);
        assert_eq!((snapshot(&view), view.held()), (before.clone(), 2));
        // What is known of it meanwhile counts, also after another look.
        view.put(host("10.50.5.0/24", "10.0.0.4", revision + 1));
        assert_eq!(view.held(), 1);
        view.replace(
            vec![all[0].clone(), host("10.50.5.0/24", "10.0.0.4", 1)],
            cluster,
            revision + 2,
            now,
        );
        let later = [
            "10.0.0.2:8285=10.50.2.0/24",
            "10.0.0.3:8285=10.50.3.0/24,10.60.0.0/24",
            "10.0.0.4:8285=10.50.5.0/24",
        ];
        assert_eq!(shown(&snapshot(&view)), later);
        // It can be written to disk and read again.
        let mut read = View::new(keys());
        read.replace(view.pairs(), cluster, revision, now);
        assert_eq!(snapshot(&read), snapshot(&view));
        assert!(!view.release(now + HOLD / 2));
        assert!(view.release(now + HOLD));
        assert_eq!(shown(&snapshot(&view)), [later[0], later[2]]);
    }
}

#[test]
fn hosts_are_held_from_the_last_connection_on() {
    let (now, later) = (Instant::now(), Instant::now() + 2 * HOLD);
    let mut view = view(&[host("10.50.2.0/24", "10.0.0.2", 1)]);
    view.replace(Vec::new(), 2, 500, now);
    view.hold_again(later);
    assert!(!view.release(later + HOLD / 2));
    assert!(view.release(later + HOLD));
    // Without any there is nothing to wait for.
    view.hold_again(later);
    assert!(!view.release(later + 2 * HOLD));
}

#[test]
fn hosts_that_the_same_cluster_does_not_know_any_more_are_gone() {
    let mut view = view(&[
        host("10.50.2.0/24", "10.0.0.2", 1),
        host("10.50.3.0/24", "10.0.0.3", 1),
    ]);
    view.replace(
        vec![host("10.50.2.0/24", "10.0.0.2", 1)],
        1,
        100,
        Instant::now(),
    );
    assert_eq!(shown(&snapshot(&view)), ["10.0.0.2:8285=10.50.2.0/24"]);
}

#[test]
fn peers_with_keys_are_known_by_them() {
    let key = |number: u8| PublicKey([number; 32]);
    let value = |ip: &str, number| {
        let value = HostValue::new(ip.parse().unwrap(), Some(key(number)));
        value.to_json()
    };
    let shared = "A".repeat(42) + "8=";
    let config = format!(
        r#"{{"Network":"10.50.0.0/16","Backend":{{"Type":"wireguard","PSK":"{shared}",
            "PersistentKeepaliveInterval":5}}}}"#
    );
    let policy = Policy {
        network: Network::parse(config.as_bytes()).unwrap(),
        own_key: Some(key(1)),
        ..policy()
    };
    let view = view(&[
        pair("/n/subnets/10.50.1.0-24".into(), value("10.0.0.9", 1), 1),
        pair("/n/subnets/10.50.2.0-24".into(), value("10.0.0.2", 2), 1),
        host("10.50.3.0/24", "10.0.0.3", 1),
    ]);
    let snapshot = view.snapshot(&policy, &Snapshot::default());
    let peers: Vec<_> = snapshot.peers.values().collect();
    assert_eq!((peers.len(), snapshot.unused.other_backend), (1, 1));
    assert_eq!(peers[0].name, PeerName::Key(key(2)));
    assert_eq!(
        peers[0].endpoint.as_ref().unwrap().to_string(),
        "10.0.0.2:51820"
    );
    assert!(peers[0].preshared_key.is_set());
    assert_eq!(peers[0].persistent_keepalive, Some(Duration::from_secs(5)));
}

/// What can happen to the registry's hosts: a put or a deletion of one of a few.
fn event() -> impl Strategy<Value = (u8, u8, bool)> {
    (0u8..8, 0u8..8, any::<bool>())
}

fn happen(view: &mut View, (subnet, ip, is_there): (u8, u8, bool), revision: i64) {
    let name = format!("10.50.{subnet}.0/24");
    match is_there {
        true => drop(view.put(host(&name, &format!("10.0.0.{ip}"), revision))),
        false => view.delete(keys().subnet(net(&name)).as_bytes(), revision),
    }
}

proptest! {
    /// The changes between two snapshots make one of the other.
    #[test]
    fn changes_lead_from_one_snapshot_to_the_next(
        before in prop::collection::vec(event(), 0..20),
        after in prop::collection::vec(event(), 0..20),
    ) {
        let mut view = view(&[]);
        before.into_iter().for_each(|event| happen(&mut view, event, 200));
        let old = snapshot(&view);
        after.into_iter().for_each(|event| happen(&mut view, event, 300));
        let new = view.snapshot(&policy(), &old);
        let mut peers = old.peers.clone();
        for (was, is) in new.changes_since(&old) {
            prop_assert!(was != is);
            if let Some(was) = was {
                prop_assert_eq!(peers.remove(&was.name.id()), Some(was));
            }
            if let Some(is) = is {
                prop_assert_eq!(peers.insert(is.name.id(), is), None);
            }
        }
        prop_assert_eq!(&peers, &new.peers);
        // What was made before is the same as what would be made anew.
        prop_assert_eq!(&snapshot(&view), &new);
        for (id, peer) in &new.peers {
            let was = old.peers.get(id).filter(|was| *was == peer);
            prop_assert!(was.is_none_or(|was| Arc::ptr_eq(was, peer)));
        }
        prop_assert!(new.changes_since(&new).is_empty());
    }

    /// Event by event, or all at once: it comes to the same.
    #[test]
    fn a_list_says_the_same_as_all_events(events in prop::collection::vec(event(), 0..40)) {
        let mut watched = view(&[]);
        for (event, revision) in events.into_iter().zip(200..) {
            happen(&mut watched, event, revision);
        }
        let mut listed = view(&[host("10.50.99.0/24", "10.0.0.99", 1)]);
        listed.replace(watched.pairs(), 1, 300, Instant::now());
        prop_assert_eq!(snapshot(&listed), snapshot(&watched));
    }

    #[test]
    fn any_pair_can_be_taken_in(
        key in "/n/(subnets|fastvpn/hosts)?/?[0-9.-]{0,16}",
        value in any::<Vec<u8>>(),
    ) {
        let mut view = view(&[]);
        view.put(pair(key, String::from_utf8_lossy(&value), 7));
        snapshot(&view);
    }
}
