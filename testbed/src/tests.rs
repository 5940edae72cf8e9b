//! The networks themselves, and netlink in them. These tests need root.

use std::io::Read;
use std::net::IpAddr;
use std::process::{Command, Stdio};
use std::time::Duration;

use super::*;
use fastvpn::host::netlink::RouteKind;

fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}

fn address(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn example() -> Pair {
    let addresses = [
        (net("10.9.0.1/24"), net("10.9.0.2/24")),
        (net("fd00:9::1/64"), net("fd00:9::2/64")),
    ];
    pair(&addresses, 1400).unwrap()
}

#[test]
fn a_pair_has_its_addresses_and_mtu() {
    let pair = example();
    let mut netlink = pair.b.netlink().unwrap();
    let index = netlink.link_index(UNDERLAY_NAME).unwrap().unwrap();
    let link = netlink.link_by_index(index).unwrap().unwrap();
    assert_eq!((link.mtu, link.up), (1400, true));
    let mut names = pair.b.run(interfaces).unwrap();
    names.sort();
    assert_eq!(names, ["lo", UNDERLAY_NAME]);
    let addresses = netlink.addresses().unwrap();
    assert!(addresses.contains(&(index, net("10.9.0.2/24"))));
    assert!(addresses.contains(&(index, net("fd00:9::2/64"))));
}

#[test]
fn all_hosts_on_a_switch_hear_each_other() {
    let addresses: Vec<_> = (1..=3)
        .map(|number| {
            vec![
                net(&format!("10.9.0.{number}/24")),
                net(&format!("fd00:9::{number}/64")),
            ]
        })
        .collect();
    let switch = switch(&addresses, 1400).unwrap();
    let timeout = Duration::from_secs(10);
    for host in &switch.hosts {
        for address in addresses.iter().flatten() {
            traffic::ping_up_to(5, host, address.addr(), 1300, timeout / 5).unwrap();
        }
    }
    let mut netlink = switch.hosts[2].netlink().unwrap();
    let index = netlink.link_index(UNDERLAY_NAME).unwrap().unwrap();
    assert_eq!(netlink.link_by_index(index).unwrap().unwrap().mtu, 1400);
}

#[test]
fn what_does_not_exist_is_none_or_a_named_error() {
    let namespace = Namespace::new().unwrap();
    let mut netlink = namespace.netlink().unwrap();
    assert_eq!(netlink.link_index("nothing0").unwrap(), None);
    assert!(netlink.link_by_index(999).unwrap().is_none());
    let error = netlink.set_mtu(999, 1400).unwrap_err();
    assert_eq!(error.errno(), Some(libc::ENODEV));
    assert!(
        error
            .to_string()
            .starts_with("cannot set MTU 1400 on interface number 999: no such device"),
        "{error}"
    );
    let error = netlink
        .del_route(net("10.1.0.0/16"), None, None)
        .unwrap_err();
    assert_eq!(error.errno(), Some(libc::ESRCH));
    assert!(error.to_string().contains("10.1.0.0/16"), "{error}");
}

#[test]
fn links_are_changed() {
    let namespace = Namespace::new().unwrap();
    let mut netlink = namespace.netlink().unwrap();
    join(&namespace, &namespace, "veth-a", "veth-b").unwrap();
    let veth = netlink.link_index("veth-a").unwrap().unwrap();
    netlink.set_mtu(veth, 9000).unwrap();
    netlink.set_txqueuelen(veth, 4000).unwrap();
    let link = netlink.link_by_index(veth).unwrap().unwrap();
    assert_eq!((link.mtu, link.txqueuelen, link.up), (9000, 4000, false));
    let error = netlink.set_mtu(veth, 1_000_000).unwrap_err();
    assert!(error.to_string().contains("veth-a"), "{error}");
    let error = join(&namespace, &namespace, "veth-a", "veth-c").unwrap_err();
    assert_eq!(error.errno(), Some(libc::EEXIST));
}

#[test]
fn a_link_moves_to_another_namespace() {
    let (here, there) = (Namespace::new().unwrap(), Namespace::new().unwrap());
    let mut netlink = here.netlink().unwrap();
    join(&here, &here, "mover", "stayer").unwrap();
    move_link(&here, "mover", &there).unwrap();
    assert_eq!(netlink.link_index("mover").unwrap(), None);
    let mut netlink = there.netlink().unwrap();
    assert!(netlink.link_index("mover").unwrap().is_some());
}

#[test]
fn ip_says_what_is_wrong() {
    let namespace = Namespace::new().unwrap();
    let error = crate::ip(&namespace, "link set nothing0 up").unwrap_err();
    assert!(
        error.to_string().starts_with("ip link set nothing0 up: "),
        "{error}"
    );
    assert!(error.to_string().contains("nothing0"), "{error}");
}

#[test]
fn routes_are_added_listed_and_deleted() {
    let pair = example();
    let mut netlink = pair.a.netlink().unwrap();
    let index = netlink.link_index(UNDERLAY_NAME).unwrap().unwrap();
    let cases = [
        ("10.77.0.0/16", Some("10.9.0.2"), None),
        ("10.78.0.0/16", None, Some(index)),
        ("0.0.0.0/0", Some("10.9.0.2"), Some(index)),
        ("fd00:77::/32", Some("fd00:9::2"), None),
        ("fd00:78::/32", None, Some(index)),
        ("::/0", Some("fd00:9::2"), Some(index)),
    ];
    for (prefix, via, oif) in cases {
        netlink
            .add_route(net(prefix), via.map(address), oif)
            .unwrap();
    }
    let routes = netlink.main_routes(&|_| true).unwrap();
    for (prefix, ..) in cases {
        let route = routes
            .iter()
            .find(|route| route.destination == net(prefix))
            .unwrap_or_else(|| panic!("{prefix} is not listed"));
        assert_eq!(route.oif, Some(index), "{prefix}");
        assert_eq!((route.kind, route.table), (RouteKind::Unicast, 254));
    }
    let error = netlink
        .add_route(net("10.78.0.0/16"), None, Some(index))
        .unwrap_err();
    assert_eq!(error.errno(), Some(libc::EEXIST));
    for (prefix, via, oif) in cases {
        netlink
            .del_route(net(prefix), via.map(address), oif)
            .unwrap();
    }
    let left = netlink.main_routes(&|_| true).unwrap();
    assert!(left.iter().all(|route| {
        cases
            .iter()
            .all(|(prefix, ..)| route.destination != net(prefix))
    }));
    assert!(
        netlink
            .add_route(net("10.1.0.0/16"), Some(address("fd00:9::2")), None)
            .is_err()
    );
}

#[test]
fn a_container_stands_behind_its_host() {
    let pair = example();
    let addresses = [(net("10.20.0.1/24"), net("10.20.0.2/24"))];
    let container = container(&pair.a, "ctr0", &addresses, 1400).unwrap();
    let mut netlink = container.netlink().unwrap();
    let index = netlink.link_index(CONTAINER_NAME).unwrap();
    assert_eq!(
        netlink
            .interface_to((address("192.0.2.1"), 0).into())
            .unwrap(),
        index
    );
}

#[test]
fn programs_run_inside_and_are_killed_with_their_handle() {
    let pair = example();
    let mut command = Command::new("cat");
    command.arg("/proc/net/dev").stdout(Stdio::piped());
    let mut child = pair.a.spawn(command).unwrap();
    let mut output = String::new();
    let mut stdout = child.process().stdout.take().unwrap();
    stdout.read_to_string(&mut output).unwrap();
    assert!(output.contains(UNDERLAY_NAME));

    let mut command = Command::new("sleep");
    command.arg("60");
    let child = pair.a.spawn(command).unwrap();
    let path = format!("/proc/{}", child.pid());
    assert!(child.cpu_time().unwrap() < Duration::from_secs(1));
    drop(child);
    assert!(!std::path::Path::new(&path).exists());

    assert!(pair.a.spawn(Command::new("/does/not/exist")).is_err());
}

#[test]
fn a_stubborn_program_is_killed_after_its_grace() {
    let namespace = Namespace::new().unwrap();
    let mut command = Command::new("sh");
    command
        .args([
            "-c",
            "trap '' TERM; echo ready; while :; do sleep 0.1; done",
        ])
        .stdout(Stdio::piped());
    let mut child = namespace.spawn(command).unwrap();
    let mut ready = [0; 5];
    let mut stdout = child.process().stdout.take().unwrap();
    stdout.read_exact(&mut ready).unwrap();
    let status = child.terminate(Duration::from_millis(100)).unwrap();
    assert!(!status.success());
}

#[test]
fn a_child_outlives_the_namespace_value_but_not_its_own() {
    let namespace = Namespace::new().unwrap();
    let mut command = Command::new("sleep");
    command.arg("60");
    let mut child = namespace.spawn(command).unwrap();
    drop(namespace);
    std::thread::sleep(Duration::from_millis(50));
    assert!(child.try_wait().unwrap().is_none());
}
