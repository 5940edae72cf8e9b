//! What a reload makes of the device, by the peers of the new file, and what it
//! leaves as somebody has set it by hand.

use std::net::Ipv4Addr;

use fastvpn::error::Result;
use ipnet::IpNet;
use serde_json::json;
use testbed::{Namespace, StaticRoutes, UNDERLAY_NAME, join};

use crate::daemon::settings::{FILE, Scene, peer, text};
use crate::host::routes::net;
use crate::operator::{Operator, has};
use crate::support::{TUNNEL, Tunnel, check, hosts, link, stop, wait_for};

/// The narrow way between the hosts.
const NARROW_NAME: &str = "narrow0";
const NARROW_MTU_BYTES: u32 = 1300;

fn bring_up(host: &Namespace, address: Ipv4Addr) -> Result<()> {
    let index = link(host, NARROW_NAME)?.index;
    let mut netlink = host.netlink()?;
    netlink.add_address(index, IpNet::new_assert(address.into(), 24))?;
    netlink.set_mtu(index, NARROW_MTU_BYTES)?;
    netlink.set_up(index)
}

/// The MTU is that of the paths to the peers that the file has, not of those
/// that it no longer has, and who cannot be reached matters only where nothing
/// was given.
#[testbed::trial]
fn a_reload_to_another_path() -> Result<()> {
    const WIDE: &str = "10.211.55.123";
    const NARROW: &str = "10.212.0.2";
    let hosts = hosts(1500)?;
    join(&hosts.a, &hosts.b, NARROW_NAME, NARROW_NAME)?;
    bring_up(&hosts.a, Ipv4Addr::new(10, 212, 0, 1))?;
    bring_up(&hosts.b, Ipv4Addr::new(10, 212, 0, 2))?;
    let operator = Operator::new()?;
    let write = |mtu: &str, endpoint: &str| {
        let address = "address = [\"10.244.55.122/32\"]\n";
        let peer = peer(endpoint, &["10.244.55.123/32"]);
        operator.write(FILE, &format!("{address}{mtu}\n{peer}"))
    };
    let file = write("mtu = 1400", WIDE)?;
    let flags = ["--control", &operator.socket_text(), "--config", &file];
    let a = Tunnel::start(&hosts.a, &flags)?;
    operator.wait()?;
    let mtu_is = |mtu_bytes: u32, when: &str| {
        let found = link(&hosts.a, "fastvpn0")?.mtu;
        check(found == mtu_bytes, || format!("{when}: MTU {found}"))?;
        has(&operator.ask("status")?, &[("mtu_bytes", json!(mtu_bytes))])
    };
    let reload = |mtu: &str, endpoint: &str, expected: u32| {
        write(mtu, endpoint)?;
        operator.tell("reload")?;
        mtu_is(expected, &format!("{mtu:?} by {endpoint}"))
    };
    reload("", NARROW, NARROW_MTU_BYTES - 28)?;
    reload("mtu = 1400", WIDE, 1400)?;
    reload("", WIDE, 1472)?;
    reload("mtu = 1400", NARROW, 1400)?;
    testbed::ip(&hosts.a, &format!("link set {NARROW_NAME} down"))?;
    // Away from a peer that cannot be reached any more, and to one that cannot
    // be reached yet.
    reload("mtu = 1350", WIDE, 1350)?;
    reload("mtu = 1360", NARROW, 1360)?;
    reload("mtu = 1360\ntxqueuelen = 400", NARROW, 1360)?;
    write("", NARROW)?;
    operator.refuses("reload", &["cannot reach peer 10.212.0.2"])?;
    mtu_is(1360, "refused")?;
    reload("", WIDE, 1472)?;
    stop(a).map(drop)
}

/// A refused reload changes nothing, and gives back what it has changed as it
/// was, whoever had set it.
#[testbed::trial]
fn what_was_set_by_hand_stays() -> Result<()> {
    let scene = Scene::new("", &[])?;
    let (host, operator) = (&scene.hosts.a, &scene.operator);
    let underlay = link(host, UNDERLAY_NAME)?.index;
    let mut netlink = host.netlink()?;
    netlink.add_route(net("10.99.0.0/16")?, None, Some(underlay))?;
    let index = link(host, "fastvpn0")?.index;
    netlink.set_mtu(index, 1300)?;
    netlink.set_txqueuelen(index, 77)?;
    netlink.add_address(index, net("10.250.1.1/24")?)?;
    let before = scene.state()?;
    check(before.mtu_bytes == 1300 && before.txqueuelen == 77, || {
        format!("{before:?}")
    })?;
    let late = peer("10.211.55.200", &["10.99.0.0/16"]);
    for settings in [
        "",
        "hop = true",
        "mtu = 1400",
        "mtu = 1290",
        "txqueuelen = 500",
        "address = [\"10.250.1.1/24\"]",
        "address = [\"10.250.1.2/24\"]",
        "mtu = 1400\ntxqueuelen = 500\naddress = [\"10.250.1.1/24\", \"10.250.1.2/24\"]",
    ] {
        operator.write(FILE, &text(settings, &late))?;
        operator.refuses("reload", &["10.99.0.0/16"])?;
        scene.is_as(&before, settings)?;
        // From the same address as before: host B knows no other as host A's.
        wait_for(host, TUNNEL[1].into())?;
    }
    // One that is accepted leaves what it does not name.
    scene.reload("hop = true", "")?;
    scene.is_as(&before, "hop")?;
    scene.reload("hop = true\ntxqueuelen = 500", "")?;
    let state = scene.state()?;
    check(state.mtu_bytes == 1300 && state.txqueuelen == 500, || {
        format!("{state:?}")
    })?;
    wait_for(host, TUNNEL[1].into())?;
    scene.end().map(drop)
}

/// Whatever is IPv6 in the tunnel, and whoever has added it, holds up an MTU with
/// which the kernel would silently forget it.
#[testbed::trial]
fn an_mtu_too_small_for_ipv6() -> Result<()> {
    let scene = Scene::new("", &[])?;
    let operator = &scene.operator;
    operator.tell("route add fd05::/64 --peer 10.211.55.123")?;
    let before = scene.state()?;
    operator.write(FILE, &text("mtu = 1200", ""))?;
    operator.refuses("reload", &["fd05::/64", "1280"])?;
    scene.is_as(&before, "a prefix of run time")?;
    operator.tell("route del fd05::/64")?;

    let before = scene.state()?;
    scene.reload("mtu = 1200", "")?;
    let small = scene.state()?;
    check(small.mtu_bytes == 1200, || format!("{small:?}"))?;
    for words in [
        "route add fd05::/64 --peer 10.211.55.123",
        "peer add 10.211.55.200=10.50.0.0/16,fd05::/64",
    ] {
        operator.refuses(words, &["fd05::/64", "1280"])?;
        scene.is_as(&small, words)?;
    }
    for (settings, peers) in [
        ("mtu = 1200\nroute = [\"fd05::/64\"]", String::new()),
        ("mtu = 1200", peer("10.211.55.200", &["fd05::/64"])),
    ] {
        operator.write(FILE, &text(settings, &peers))?;
        operator.refuses("reload", &["fd05::/64", "1280"])?;
        scene.is_as(&small, settings)?;
    }
    // There and back again, with what must be away in time.
    let with_v6 = "address = [\"10.244.55.122/32\", \"fd00:244::122/128\"]";
    for _ in 0..2 {
        scene.reload(with_v6, &peer("10.211.55.200", &["fd05::/64"]))?;
        let state = scene.state()?;
        check(
            state.addresses.len() == 2 && state.mtu_bytes == before.mtu_bytes,
            || format!("{state:?}"),
        )?;
        scene.reload("mtu = 1200", "")?;
        scene.is_as(&small, "small again")?;
    }
    scene.reload("", "")?;
    scene.is_as(&before, "as at the start")?;
    wait_for(&scene.hosts.a, TUNNEL[1].into())?;
    scene.end().map(drop)
}

/// The kernel has forgotten all IPv6 of the device when the reload is refused.
#[testbed::trial]
fn a_refused_reload_without_ipv6() -> Result<()> {
    let with_v6 = "address = [\"10.244.55.122/32\", \"fd00:244::122/128\"]";
    for settings in ["", with_v6] {
        let scene = Scene::new("", &[])?;
        let (host, operator) = (&scene.hosts.a, &scene.operator);
        let underlay = link(host, UNDERLAY_NAME)?.index;
        let taken = net("10.99.0.0/16")?;
        host.netlink()?.add_route(taken, None, Some(underlay))?;
        scene.reload(settings, &peer("10.211.55.200", &["fd05::/64"]))?;
        let before = scene.state()?;
        let late = peer("10.211.55.201", &["10.99.0.0/16"]);
        for _ in 0..3 {
            operator.write(FILE, &text("mtu = 1200", &late))?;
            operator.refuses("reload", &["10.99.0.0/16"])?;
            scene.is_as(&before, settings)?;
        }
        wait_for(host, TUNNEL[1].into())?;
        scene.end()?;
    }
    Ok(())
}

/// The kernel has an IPv6 address once on a device, whatever its prefix length.
#[testbed::trial]
fn an_ipv6_prefix_of_another_length() -> Result<()> {
    let with = |v6: &str| format!("address = [\"10.244.55.122/32\", \"{v6}\"]");
    let scene = Scene::new(&with("fd00:244::122/64"), &[])?;
    let (host, operator) = (&scene.hosts.a, &scene.operator);
    let underlay = link(host, UNDERLAY_NAME)?.index;
    let taken = net("10.99.0.0/16")?;
    host.netlink()?.add_route(taken, None, Some(underlay))?;
    for v6 in ["fd00:244::122/48", "fd00:244::122/128", "fd00:244::122/64"] {
        scene.reload(&with(v6), "")?;
        let state = scene.state()?;
        check(
            state.addresses.len() == 2 && state.addresses.contains(&net(v6)?),
            || format!("{v6}: {state:?}"),
        )?;
        let late = peer("10.211.55.201", &["10.99.0.0/16"]);
        operator.write(FILE, &text(&with("fd00:244::122/56"), &late))?;
        operator.refuses("reload", &["10.99.0.0/16"])?;
        scene.is_as(&state, "refused")?;
    }
    wait_for(host, TUNNEL[1].into())?;
    scene.end().map(drop)
}

/// A start would refuse it, too.
#[testbed::trial]
fn a_reload_to_a_derived_address_that_is_taken() -> Result<()> {
    let derived = peer("10.211.55.123", &["10.244.55.123/32", "172.20.0.0/16"]);
    let scene = Scene::new("", &[])?;
    let (host, operator) = (&scene.hosts.a, &scene.operator);
    let underlay = link(host, UNDERLAY_NAME)?.index;
    let other = net("10.244.1.1/16")?;
    let mut netlink = host.netlink()?;
    netlink.add_address(underlay, other)?;
    let before = scene.state()?;
    operator.write(FILE, &derived)?;
    operator.refuses(
        "reload",
        &["10.244.55.122/16", "10.244.1.1/16", "--address"],
    )?;
    scene.is_as(&before, "refused")?;
    testbed::ip(host, &format!("address del {other} dev {UNDERLAY_NAME}"))?;
    let reload = |settings: &str| {
        operator.write(FILE, &format!("{settings}\n{derived}"))?;
        operator.tell("reload")?;
        let addresses = scene.state()?.addresses;
        check(addresses == [net("10.244.55.122/16")?].into(), || {
            format!("{addresses:?}")
        })
    };
    reload("")?;
    // What is in force stays.
    netlink.add_address(underlay, other)?;
    reload("hop = true")?;
    scene.end().map(drop)
}
