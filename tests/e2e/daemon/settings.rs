//! Settings of a configuration file that is read again, and what operators have
//! added meanwhile.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};

use fastvpn::error::Result;
use ipnet::IpNet;
use serde_json::{Value, json};
use testbed::traffic::ping;
use testbed::{Namespace, Pair, StaticRoutes, UNDERLAY_NAME};

use crate::host::routes::{kernel_agrees, own_routes};
use crate::operator::{Operator, has};
use crate::support::{TUNNEL, Tunnel, check, fastvpn, hosts, link, stop, wait_for};
use crate::tools::Stream;

/// Host A's address in the tunnel.
const A_ADDRESS: &str = "10.244.55.122/32";

/// Host B's peer entry, with its tunnel address.
const PEER_B: &str = "[[peer]]\nendpoint = \"10.211.55.123\"\nprefixes = [\"10.244.55.123/32\", \"172.20.0.0/16\"]\n";

/// Two hosts, host A's tunnel with a file.
pub struct Scene {
    pub hosts: Pair,
    pub operator: Operator,
    a: Tunnel,
    b: Tunnel,
}

/// The file's name.
pub const FILE: &str = "fastvpn.toml";

impl Scene {
    /// `settings` stands in the file in front of the peers, `flags` on the
    /// command line.
    pub fn new(settings: &str, flags: &[&str]) -> Result<Self> {
        let hosts = hosts(1500)?;
        let operator = Operator::new()?;
        let file = operator.write(FILE, &text(settings, ""))?;
        let socket = operator.socket_text();
        let given: &[&str] = &["--control", &socket, "--config", &file];
        let a = Tunnel::start(&hosts.a, &[given, flags].concat())?;
        let b = fastvpn(&hosts.b, "--peer 10.211.55.122")?;
        operator.wait()?;
        wait_for(&hosts.a, TUNNEL[1].into())?;
        Ok(Self {
            hosts,
            operator,
            a,
            b,
        })
    }

    /// Reads a new file by command.
    pub fn reload(&self, settings: &str, peers: &str) -> Result<Value> {
        self.operator.write(FILE, &text(settings, peers))?;
        self.operator.ask("reload")
    }

    /// All that a reload could change.
    pub fn state(&self) -> Result<State> {
        let link = link(&self.hosts.a, "fastvpn0")?;
        let answer = self.operator.ask("peers")?;
        let peers = answer["peers"].as_array().cloned().unwrap_or_default();
        Ok(State {
            routes: self.operator.routes()?,
            peers: peers
                .iter()
                .map(|peer| format!("{} {} {}", peer["peer"], peer["origin"], peer["is_default"]))
                .collect(),
            kernel: own_routes(&self.hosts.a)?,
            addresses: addresses(&self.hosts.a)?,
            mtu_bytes: link.mtu,
            txqueuelen: link.txqueuelen,
        })
    }

    /// All of it is as it was.
    pub fn is_as(&self, before: &State, why: &str) -> Result<()> {
        let after = self.state()?;
        check(after == *before, || {
            format!("{why}: {before:?} became {after:?}")
        })
    }

    /// Stops both tunnels; host A's log.
    pub fn end(self) -> Result<String> {
        let ended = stop(self.a)?;
        stop(self.b)?;
        Ok(ended.log)
    }
}

/// What a reload could change.
#[derive(Debug, PartialEq)]
pub struct State {
    routes: Vec<(IpNet, String)>,
    peers: Vec<String>,
    kernel: BTreeSet<IpNet>,
    pub addresses: BTreeSet<IpNet>,
    pub mtu_bytes: u32,
    pub txqueuelen: u32,
}

/// A file: `settings`, host B, and further `peers`.
pub fn text(settings: &str, peers: &str) -> String {
    let address = if settings.contains("address") {
        String::new()
    } else {
        format!("address = [\"{A_ADDRESS}\"]\n")
    };
    format!("{address}{settings}\n{PEER_B}\n{peers}")
}

/// A peer that is not there.
pub fn peer(endpoint: &str, prefixes: &[&str]) -> String {
    format!(
        "[[peer]]\nendpoint = \"{endpoint}\"\nprefixes = {}\n",
        json!(prefixes)
    )
}

fn addresses(host: &Namespace) -> Result<BTreeSet<IpNet>> {
    let index = link(host, "fastvpn0")?.index;
    let all = host.netlink()?.addresses()?;
    let ours = all.into_iter().filter(|(at, net)| {
        let by_itself = matches!(net, IpNet::V6(net) if net.addr().is_unicast_link_local());
        *at == index && !by_itself
    });
    Ok(ours.map(|(_, net)| net).collect())
}

/// What a reload can change of the device, and what it names as not to be
/// changed.
#[testbed::trial]
fn settings_are_reloaded() -> Result<()> {
    let scene = Scene::new("", &["--txqueuelen", "700"])?;
    let (hosts, operator) = (&scene.hosts, &scene.operator);
    let before = scene.state()?;
    let index = link(&hosts.a, "fastvpn0")?.index;
    let nets = |texts: &[&str]| -> BTreeSet<IpNet> {
        texts.iter().filter_map(|text| text.parse().ok()).collect()
    };
    let stream = Stream::start(&hosts.a, &hosts.b, TUNNEL[1].into())?;
    let changes = |settings: &str, changed: Value, needs_restart: Value| -> Result<State> {
        let answer = scene.reload(settings, "")?;
        let lists = [
            ("settings_changed", changed),
            ("needs_restart", needs_restart),
        ];
        has(&answer, &lists)?;
        stream.wait_for_progress()?;
        scene.state()
    };
    let both = format!("address = [\"{A_ADDRESS}\", \"fd00:244::122/128\"]");

    let state = changes("mtu = 1300", json!(["mtu"]), json!([]))?;
    check(state.mtu_bytes == 1300, || format!("{state:?}"))?;
    // A flag is stronger than the file.
    let state = changes("mtu = 1300\ntxqueuelen = 300", json!([]), json!([]))?;
    check(state.txqueuelen == 700, || format!("{state:?}"))?;
    let state = changes(&both, json!(["mtu", "address"]), json!([]))?;
    check(
        state.mtu_bytes == 1472 && state.addresses == nets(&[A_ADDRESS, "fd00:244::122/128"]),
        || format!("{state:?}"),
    )?;
    // Routes outlast the addresses that they came after.
    check(state.kernel == before.kernel, || format!("{state:?}"))?;
    let state = changes(
        "route = [\"172.21.0.0/16\", \"fd00:21::/32\"]",
        json!(["address", "route"]),
        json!([]),
    )?;
    let expected = &before.kernel | &nets(&["172.21.0.0/16", "fd00:21::/32"]);
    check(state.kernel == expected, || format!("{state:?}"))?;
    check(state.addresses == before.addresses, || format!("{state:?}"))?;
    let state = changes("route = [\"172.22.0.0/16\"]", json!(["route"]), json!([]))?;
    check(
        state.kernel == &before.kernel | &nets(&["172.22.0.0/16"]),
        || format!("{state:?}"),
    )?;
    let state = changes("", json!(["route"]), json!([]))?;
    check(state == before, || format!("{state:?}"))?;

    // Named, and nothing else: the tunnel stays what it is.
    let restart = "queues = 3\nlisten = \"0.0.0.0:9000\"\nbusy-poll = \"off\"\nverbose = 1\n\
                   log-format = \"json\"\ncores = \"0\"\nwithout = [\"uso\"]";
    let named = json!([
        "busy-poll",
        "cores",
        "listen",
        "log-format",
        "queues",
        "verbose",
        "without"
    ]);
    let state = changes(restart, json!([]), named)?;
    check(state == before, || format!("{state:?}"))?;
    let said = operator.tell("reload")?;
    check(
        said.contains("busy-poll") && said.contains("listen"),
        || said,
    )?;
    let state = changes("tun = \"other0\"", json!([]), json!(["tun"]))?;
    check(state == before, || format!("{state:?}"))?;
    let state = changes("", json!([]), json!([]))?;
    check(state == before, || format!("{state:?}"))?;

    stream.finish()?;
    // Last, as there is no way to the other end meanwhile.
    let answer = scene.reload("no-routes = true", "")?;
    has(&answer, &[("settings_changed", json!(["no-routes"]))])?;
    let state = scene.state()?;
    check(
        state.kernel.is_empty() && state.routes == before.routes,
        || format!("{state:?}"),
    )?;
    has(&operator.ask("status")?, &[("keeps_routes", json!(false))])?;
    scene.reload("", "")?;
    let state = scene.state()?;
    check(state == before, || format!("{state:?}"))?;
    check(link(&hosts.a, "fastvpn0")?.index == index, || {
        "another device".into()
    })?;
    wait_for(&hosts.a, TUNNEL[1].into())?;
    scene.end().map(drop)
}

/// What operators have added is theirs: a file that wants it for another peer
/// is refused as a whole.
#[testbed::trial]
fn a_reload_and_what_operators_added() -> Result<()> {
    let scene = Scene::new("", &[])?;
    let (hosts, operator) = (&scene.hosts, &scene.operator);
    operator.tell("peer add 10.211.55.210=10.80.0.0/16")?;
    operator.tell("route add 10.81.0.0/16 --peer 10.211.55.123")?;
    let before = scene.state()?;
    for clash in ["10.80.0.0/16", "10.81.0.0/16"] {
        let peers = [
            peer("10.211.55.200", &["10.50.0.0/16"]),
            peer("10.211.55.201", &["10.51.0.0/16", clash]),
        ];
        operator.write(
            FILE,
            &text("mtu = 1300\ntxqueuelen = 50\nhop = true", &peers.concat()),
        )?;
        operator.refuses("reload", &[clash, "10.211.55.201:8285"])?;
        scene.is_as(&before, clash)?;
        has(&operator.ask("status")?, &[("hop", json!(false))])?;
    }
    // A second peer for all the rest is one too many, wherever the first is from.
    operator.tell("peer add 10.211.55.211")?;
    let before = scene.state()?;
    operator.write(FILE, &text("", &peer("10.211.55.201", &[])))?;
    operator.refuses("reload", &["10.211.55.201:8285", "10.211.55.211:8285"])?;
    scene.is_as(&before, "two for the rest")?;
    operator.tell("peer del 10.211.55.211")?;

    // The same thing twice is no clash: the file has it from now on, and what
    // it drops later is gone.
    operator.tell("route add 10.83.0.0/16 --peer 10.211.55.210")?;
    let answer = scene.reload(
        "",
        &peer("10.211.55.210", &["10.80.0.0/16", "10.83.0.0/16"]),
    )?;
    has(&answer, &[("prefixes_added", json!(0))])?;
    let answer = scene.reload(
        "",
        &peer("10.211.55.210", &["10.80.0.0/16", "10.82.0.0/16"]),
    )?;
    has(
        &answer,
        &[
            ("peers_added", json!(0)),
            ("prefixes_added", json!(1)),
            ("prefixes_removed", json!(1)),
        ],
    )?;
    check(
        operator.peer_of("10.82.0.1")? == "10.211.55.210:8285",
        || "not there".into(),
    )?;
    kernel_agrees(&hosts.a, operator)?;
    // With the peer that it was added to, it goes.
    let rest = format!(
        "address = [\"{A_ADDRESS}\"]\n{}",
        peer("10.211.55.200", &["10.50.0.0/16"])
    );
    operator.write(FILE, &rest)?;
    let answer = operator.ask("reload")?;
    check(answer["peers_removed"].as_u64() >= Some(1), || {
        answer.to_string()
    })?;
    check(
        operator
            .routes()?
            .iter()
            .all(|(prefix, _)| prefix.to_string() != "10.81.0.0/16"),
        || "a prefix without a peer".into(),
    )?;
    kernel_agrees(&hosts.a, operator)?;
    let far: IpAddr = Ipv4Addr::new(10, 244, 55, 123).into();
    let silence = ping(&hosts.a, far, 8, std::time::Duration::from_millis(200));
    check(silence.is_err(), || "a peer that is gone answers".into())?;
    scene.reload("", "")?;
    wait_for(&hosts.a, TUNNEL[1].into())?;
    scene.end().map(drop)
}

/// The first address of a subnet takes the others with it when it goes, unless
/// somebody sees to that.
#[testbed::trial]
fn addresses_of_one_subnet() -> Result<()> {
    let scene = Scene::new("", &[])?;
    let kernel = scene.state()?.kernel;
    let steps: [&[&str]; 7] = [
        &["10.250.1.1/24", A_ADDRESS],
        &["10.250.1.2/24", A_ADDRESS],
        &["10.250.1.2/24", "10.250.1.3/24", "10.250.1.4/24", A_ADDRESS],
        &["10.250.1.4/24", A_ADDRESS, "10.250.1.3/24"],
        &["10.251.1.1/16", "10.251.1.2/16", A_ADDRESS],
        &["10.250.1.1/24", "fd00:250::1/64", A_ADDRESS],
        &[A_ADDRESS],
    ];
    for addresses in steps {
        let settings = format!("address = {}", json!(addresses));
        scene.reload(&settings, "")?;
        let state = scene.state()?;
        let wanted: BTreeSet<IpNet> = addresses.iter().flat_map(|text| text.parse()).collect();
        check(state.addresses == wanted && state.kernel == kernel, || {
            format!("{settings}: {state:?}")
        })?;
        wait_for(&scene.hosts.a, TUNNEL[1].into())?;
    }
    // One that somebody has taken away is no reason to refuse the change.
    scene.reload(&format!("address = {}", json!(steps[0])), "")?;
    let index = link(&scene.hosts.a, "fastvpn0")?.index;
    let gone: IpNet = IpNet::new_assert(Ipv4Addr::new(10, 250, 1, 1).into(), 24);
    scene.hosts.a.netlink()?.del_address(index, gone)?;
    scene.reload("", "")?;
    let left = scene.state()?.addresses;
    check(left.len() == 1, || format!("{left:?}"))?;
    scene.end().map(drop)
}

/// What was changed before the kernel refused a route is changed back.
#[testbed::trial]
fn a_reload_that_fails_late() -> Result<()> {
    let scene = Scene::new("txqueuelen = 500", &[])?;
    let (host, operator) = (&scene.hosts.a, &scene.operator);
    let underlay = link(host, UNDERLAY_NAME)?.index;
    let taken = IpNet::new_assert(Ipv4Addr::new(10, 99, 0, 0).into(), 16);
    host.netlink()?.add_route(taken, None, Some(underlay))?;
    let before = scene.state()?;
    let late = peer("10.211.55.200", &["10.98.0.0/16", "10.99.0.0/16"]);
    for settings in [
        "mtu = 1300",
        "txqueuelen = 77",
        "address = [\"10.250.1.1/24\"]",
        "mtu = 1400\nhop = true\naddress = [\"10.250.1.1/24\", \"10.250.1.2/24\", \"fd00:250::1/64\"]",
    ] {
        operator.write(FILE, &text(settings, &late))?;
        operator.refuses("reload", &["10.99.0.0/16"])?;
        scene.is_as(&before, settings)?;
        has(&operator.ask("status")?, &[("hop", json!(false))])?;
        wait_for(host, TUNNEL[1].into())?;
    }
    // An address that the kernel refuses comes after one that it takes.
    host.sysctl("net/ipv6/conf/fastvpn0/disable_ipv6", "1")?;
    let before = scene.state()?;
    let settings = format!("address = [{A_ADDRESS:?}, \"10.250.1.1/24\", \"fd00:250::1/64\"]");
    for _ in 0..2 {
        operator.write(FILE, &text(&settings, ""))?;
        operator.refuses("reload", &["fd00:250::1/64"])?;
        scene.is_as(&before, &settings)?;
    }
    scene.end().map(drop)
}

/// An address that would cut the host or one of its peers off is refused before
/// anything changes; whatever came before it, the good file can be loaded.
#[testbed::trial]
fn addresses_that_cannot_be() -> Result<()> {
    let scene = Scene::new("", &[])?;
    let operator = &scene.operator;
    operator.tell("peer add 10.211.55.201:9000=10.50.0.0/16")?;
    let before = scene.state()?;
    for (address, parts) in [
        (
            "10.211.55.123/32",
            ["10.211.55.123/32", "peer 10.211.55.123"],
        ),
        (
            "10.211.55.201/32",
            ["10.211.55.201/32", "peer 10.211.55.201:9000"],
        ),
        ("10.211.55.200/24", ["10.211.55.200/24", UNDERLAY_NAME]),
        ("10.244.55.123/32", ["10.244.55.123/32", "own address"]),
    ] {
        let settings = format!("hop = true\naddress = [{A_ADDRESS:?}, {address:?}]");
        operator.write(FILE, &text(&settings, ""))?;
        operator.refuses("reload", &parts)?;
        scene.is_as(&before, address)?;
        wait_for(&scene.hosts.a, TUNNEL[1].into())?;
    }
    operator.refuses(
        &format!("route add {A_ADDRESS} --peer 10.211.55.123"),
        &[A_ADDRESS, "own address"],
    )?;
    // A wider prefix is what everybody has.
    operator.tell("route add 10.244.55.0/24 --peer 10.211.55.123")?;
    operator.tell("route del 10.244.55.0/24")?;
    scene.reload("", "")?;
    scene.is_as(&before, "the good file")?;
    // Nor does an address by hand, on whatever interface, once it is gone: not
    // even at once, before the tunnel has taken note of it.
    let index = link(&scene.hosts.a, UNDERLAY_NAME)?.index;
    let mut netlink = scene.hosts.a.netlink()?;
    let stolen = IpNet::new_assert(Ipv4Addr::new(10, 211, 55, 123).into(), 32);
    netlink.add_address(index, stolen)?;
    operator.refuses("reload", &["10.211.55.123:8285", "this host itself"])?;
    netlink.del_address(index, stolen)?;
    scene.reload("", "")?;
    scene.is_as(&before, "without the address")?;
    wait_for(&scene.hosts.a, TUNNEL[1].into())?;
    scene.end().map(drop)
}

/// A file that says nothing of peers, such as one that is half written, does not
/// end all of them; one that says that there are none does.
#[testbed::trial]
fn a_file_that_loses_its_peers() -> Result<()> {
    let scene = Scene::new("", &[])?;
    let operator = &scene.operator;
    let before = scene.state()?;
    let address = format!("address = [{A_ADDRESS:?}]\n");
    for file in ["", &address] {
        operator.write(FILE, file)?;
        operator.refuses("reload", &[FILE, "1 would be removed", "peer = []"])?;
        scene.is_as(&before, file)?;
    }
    operator.write(FILE, &format!("peer = []\n{address}"))?;
    has(&operator.ask("reload")?, &[("peers_removed", json!(1))])?;
    check(operator.routes()?.is_empty(), || "a route is left".into())?;
    // Where there are none, none can be lost.
    operator.write(FILE, &address)?;
    operator.tell("reload")?;
    scene.reload("", "")?;
    scene.is_as(&before, "the good file")?;
    wait_for(&scene.hosts.a, TUNNEL[1].into())?;
    scene.end().map(drop)
}

/// An MTU for which the kernel has to fragment works, and is warned of.
#[testbed::trial]
fn an_mtu_for_fragments() -> Result<()> {
    let scene = Scene::new("mtu = 9000", &[])?;
    scene.reload("mtu = 1472", "")?;
    scene.reload("mtu = 1473", "")?;
    let log = scene.end()?;
    let warnings = |mtu: &str| {
        let of = |line: &&str| {
            line.contains(&format!("MTU {mtu} is more than")) && line.contains("1472")
        };
        log.lines().filter(of).count()
    };
    check(
        [warnings("9000"), warnings("1472"), warnings("1473")] == [1, 0, 1],
        || log.clone(),
    )
}
