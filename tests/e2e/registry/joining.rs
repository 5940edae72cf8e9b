//! Hosts join, and carry each other's packets.

use std::net::IpAddr;

use fastvpn::error::Result;
use serde_json::json;
use testbed::{container, ip};

use super::network::{Network, PREFIX, check_distinct};
use crate::support::{answers, bulk, check, stop, wait_for, wait_until};

/// Three hosts, with a container each; one more by hand beside them.
#[testbed::trial(each_engine, etcd)]
fn three_hosts_find_each_other() -> Result<()> {
    let network = Network::new(3)?;
    let members = [
        network.join(0, "")?,
        network.join(1, "")?,
        network.join(2, "")?,
    ];
    let hosts = network.hosts()?;
    check_distinct(&hosts, 3)?;
    for (host, member) in members.iter().enumerate() {
        let value = format!(
            r#"{{"PublicIP":"10.211.77.{}","PublicIPv6":null}}"#,
            host + 1
        );
        let name = member.subnet()?.to_string().replace('/', "-");
        check(hosts.contains(&(name, value)), || format!("{hosts:?}"))?;
        let bridge = member.subnet()?.to_string().replace(".0/24", ".1/24");
        let expected = [
            "FLANNEL_NETWORK=10.50.0.0/16".to_string(),
            format!("FLANNEL_SUBNET={bridge}"),
            "FLANNEL_MTU=1472".to_string(),
            "FLANNEL_IPMASQ=false".to_string(),
        ];
        check(member.subnet_file()? == expected, || {
            format!("{:?}", member.subnet_file())
        })?;
        // As flanneld has it.
        let (address, namespace) = (member.address()?, network.host(host));
        let link = crate::support::link(namespace, "fastvpn0")?;
        check(link.mtu == 1472, || format!("{link:?}"))?;
        let own = namespace.netlink()?.addresses()?;
        check(
            own.iter().any(|(_, net)| *net == IpAddr::into(address)),
            || format!("{own:?}"),
        )?;
        // One route for all.
        let is_inside = |route: &fastvpn::host::netlink::Route| {
            route.destination.to_string().starts_with("10.50.")
        };
        let routes = namespace.netlink()?.main_routes(&is_inside)?;
        let routes: Vec<_> = routes
            .iter()
            .map(|route| route.destination.to_string())
            .collect();
        check(routes == ["10.50.0.0/16"], || format!("{routes:?}"))?;
        let mut others = Vec::new();
        for (other, far) in members
            .iter()
            .enumerate()
            .filter(|(other, _)| *other != host)
        {
            others.push(format!("{} 10.211.77.{}:8285", far.subnet()?, other + 1));
        }
        others.sort_by_key(|text| text.split('.').nth(2).and_then(|it| it.parse::<u8>().ok()));
        let others: Vec<_> = others.iter().map(String::as_str).collect();
        member.wait_for_routes(&others)?;
    }
    let mut containers = Vec::new();
    for (host, member) in members.iter().enumerate() {
        let subnet = member.subnet()?;
        let at = |last: u8| -> Result<ipnet::IpNet> {
            let text = subnet.to_string().replace(".0/24", &format!(".{last}/24"));
            Ok(text.parse().expect("it is a prefix"))
        };
        let namespace = container(network.host(host), "cni0", &[(at(1)?, at(2)?)], 1472)?;
        containers.push((namespace, at(2)?.addr()));
    }
    for from in 0..3 {
        for to in (0..3).filter(|to| *to != from) {
            wait_for(&containers[from].0, containers[to].1)?;
            answers(&containers[from].0, containers[to].1, 1400)?;
        }
    }
    bulk(&containers[0].0, &containers[2].0, containers[2].1, 10)?;
    let status = members[0].status()?;
    for (key, expected) in [
        ("is_connected", json!(true)),
        ("hosts", json!(3)),
        ("network", json!("10.50.0.0/16")),
        ("public_ip", json!("10.211.77.1")),
        ("malformed", json!(0)),
    ] {
        check(status[key] == expected, || format!("{key}: {status}"))?;
    }
    let peers = members[0].operator.ask("peers")?;
    for peer in peers["peers"].as_array().into_iter().flatten() {
        let left = peer["lease_left_seconds"].as_u64();
        let is_new = left.is_some_and(|left| (85_000..=86_400).contains(&left));
        check(peer["origin"] == "registry" && is_new, || {
            format!("{peers}")
        })?;
    }
    let shown = members[0].operator.tell("status")?;
    check(
        shown.contains("connected to http://10.211.77.250:2379"),
        || shown.clone(),
    )?;
    for member in members {
        stop(member.tunnel)?;
    }
    // A stop keeps the keys.
    check_distinct(&network.hosts()?, 3)
}

/// What a flanneld writes is read, and what is written has flanneld's form.
#[testbed::trial(etcd)]
fn hosts_of_flanneld_are_peers() -> Result<()> {
    let network = Network::new(1)?;
    network.put_host("10.50.200.0-24", "10.211.77.9", 60)?;
    let member = network.join(0, "")?;
    member.wait_for_routes(&["10.50.200.0/24 10.211.77.9:8285"])?;
    // Nothing was wrong with a network that has hosts already.
    check(!member.tunnel.said().contains("ERROR"), || {
        member.tunnel.said()
    })?;
    network.put_host("10.50.201.0-24", "10.211.77.10", 60)?;
    member.wait_for_routes(&[
        "10.50.200.0/24 10.211.77.9:8285",
        "10.50.201.0/24 10.211.77.10:8285",
    ])?;
    // flanneld renews by a new lease and the same value: nothing changes.
    network.put_host("10.50.201.0-24", "10.211.77.10", 60)?;
    network.delete("subnets/10.50.200.0-24")?;
    member.wait_for_routes(&["10.50.201.0/24 10.211.77.10:8285"])?;
    stop(member.tunnel)?;
    Ok(())
}

/// Nothing that somebody else writes by mistake does harm, and it is counted.
#[testbed::trial(etcd)]
fn what_cannot_be_read_is_counted_and_changes_nothing() -> Result<()> {
    let network = Network::new(1)?;
    network.put_host("10.50.200.0-24", "10.211.77.9", 60)?;
    let member = network.join(0, "--registry-allow 10.211.77.0/28")?;
    let expected = ["10.50.200.0/24 10.211.77.9:8285"];
    for (key, value) in [
        ("subnets/10.50.200.0-24", "{"),
        ("subnets/10.50.1.0", "{}"),
        ("subnets-of-somebody", "x"),
        (
            "subnets/10.50.3.0-24",
            r#"{"PublicIP":"10.211.77.99","PublicIPv6":null}"#,
        ),
        (
            "subnets/10.99.3.0-24",
            r#"{"PublicIP":"10.211.77.3","PublicIPv6":null}"#,
        ),
        (
            "subnets/10.50.4.0-24",
            r#"{"PublicIP":"10.211.77.4","PublicIPv6":null,"BackendType":"vxlan"}"#,
        ),
    ] {
        network.put(key, value)?;
    }
    for (key, count) in [
        ("malformed", 3),
        ("not_allowed", 1),
        ("out_of_place", 1),
        ("other_backend", 1),
    ] {
        member.wait_for_status(key, &json!(count))?;
    }
    member.wait_for_routes(&expected)?;
    // An extension is never where a flanneld looks.
    let all = network
        .etcd
        .list(network.desk(), &format!("{PREFIX}/subnets"))?;
    let own = member.subnet()?.to_string().replace('/', "-");
    let written = all.iter().filter(|(key, _)| key.ends_with(&own)).count();
    check(written == 1, || format!("{all:?}"))?;
    stop(member.tunnel)?;
    Ok(())
}

/// A peer and a prefix by hand, and a prefix that a host has besides.
#[testbed::trial(etcd)]
fn static_peers_and_more_prefixes_work_beside_it() -> Result<()> {
    let network = Network::new(3)?;
    let first = network.join(0, "--registry-publish 10.60.0.0/24")?;
    let flags = "--peer 10.211.77.3=10.70.0.0/24 --registry-allow-prefix 10.60.0.0/16";
    let second = network.join(1, flags)?;
    let third = crate::support::fastvpn(
        network.host(2),
        "--queues 1 --address 10.70.0.1/32 --peer 10.211.77.2=10.50.0.0/16 --listen 10.211.77.3",
    )?;
    let own = first.subnet()?;
    let expected = [
        format!("{own} 10.211.77.1:8285"),
        "10.60.0.0/24 10.211.77.1:8285".into(),
    ];
    second.wait_for_routes(&[&expected[0], &expected[1]])?;
    ip(network.host(0), "address add 10.60.0.1/32 dev lo")?;
    wait_for(network.host(1), "10.60.0.1".parse().expect("an address"))?;
    wait_for(network.host(1), "10.70.0.1".parse().expect("an address"))?;
    second
        .operator
        .refuses("peer del 10.211.77.1", &["in the registry"])?;
    second
        .operator
        .refuses("route del 10.60.0.0/24", &["in the registry"])?;
    // A static prefix goes before the registry's, as long as it is there.
    second
        .operator
        .tell("route add 10.60.0.0/24 --peer 10.211.77.3")?;
    second.wait_for_routes(&[&expected[0]])?;
    second.operator.tell("route del 10.60.0.0/24")?;
    second.wait_for_routes(&[&expected[0], &expected[1]])?;
    stop(first.tunnel)?;
    stop(second.tunnel)?;
    stop(third)?;
    Ok(())
}

/// Also without `subnet.env`, and without anybody seeing it.
#[testbed::trial(etcd)]
fn a_restart_keeps_the_subnet() -> Result<()> {
    let network = Network::new(1)?;
    let mut member = network.join(0, "")?;
    let subnet = member.subnet()?;
    let version = |network: &Network| {
        let name = subnet.to_string().replace('/', "-");
        network.ask(&[
            "get",
            "--write-out",
            "fields",
            &format!("{PREFIX}/subnets/{name}"),
        ])
    };
    let revision = |text: &str| {
        let line = text.lines().find(|line| line.contains("\"ModRevision\""));
        line.map(str::to_string)
    };
    let before = revision(&version(&network)?);
    for is_file_lost in [false, true] {
        stop_of(&mut member)?;
        if is_file_lost {
            let path = member.operator.path("subnet.env");
            crate::support::tried("remove a file", std::fs::remove_file(path))?;
        }
        member = member.start_again(network.host(0), 0)?;
        member.wait_until_joined()?;
        check(member.subnet()? == subnet, || {
            format!("{} after {subnet}", member.tunnel.said())
        })?;
        let now = revision(&version(&network)?);
        check(now.is_some() && now == before, || {
            format!("{before:?} has become {now:?}")
        })?;
    }
    stop_of(&mut member)
}

fn stop_of(member: &mut super::network::Member) -> Result<()> {
    let status = member.tunnel.child().terminate(crate::support::PATIENCE)?;
    check(status.success(), || member.tunnel.said())
}

/// As many as there are subnets, all at once.
#[testbed::trial(long, etcd)]
fn fifty_hosts_race_for_fifty_subnets() -> Result<()> {
    const COUNT: usize = 50;
    let config = r#"{"Network":"10.50.0.0/16","SubnetMin":"10.50.1.0","SubnetMax":"10.50.50.0"}"#;
    let network = Network::with_config(COUNT, config)?;
    let start = |host| network.start(host, "");
    let mut members = (0..COUNT).map(start).collect::<Result<Vec<_>>>()?;
    for member in &members {
        member.wait_until_joined()?;
    }
    check_distinct(&network.hosts()?, COUNT)?;
    for member in &members {
        wait_until("all peers", || Ok(member.routes()?.len() == COUNT - 1))?;
    }
    // One more finds no room, says so, and waits for some.
    network.put_host("10.50.1.0-24", "10.211.77.200", 60)?;
    members.iter_mut().try_for_each(stop_of)
}

/// `registry init`, `show` and `leave`.
#[testbed::trial(etcd)]
fn operators_make_show_and_leave_a_network() -> Result<()> {
    let network = Network::without_config(1)?;
    let member = network.start(0, "")?;
    member
        .tunnel
        .wait_for_line("there is no network in etcd at /coreos.com/network/config")?;
    let made = network.command("init --network 10.50.0.0/16")?;
    check(made.status.success(), || format!("{made:?}"))?;
    let again = network.command("init --network 10.51.0.0/16")?;
    check(
        !again.status.success() && again.stderr.contains("already"),
        || format!("{again:?}"),
    )?;
    member.wait_until_joined()?;
    let subnet = member.subnet()?.to_string();
    let shown = network.command("show")?;
    for part in ["10.50.0.0/16, udp, 1 host", &subnet, "10.211.77.1"] {
        check(shown.stdout.contains(part), || format!("{part}: {shown:?}"))?;
    }
    let shown = network.command("show --json")?;
    check(shown.stdout.contains("\"lease_left_seconds\":86"), || {
        format!("{shown:?}")
    })?;
    let left = network.command("leave --public-ip 10.211.77.1")?;
    check(
        left.status.success() && left.stdout.contains(&subnet),
        || format!("{left:?}"),
    )?;
    // The tunnel that runs there ends, and says why.
    let ended = member.tunnel.wait()?;
    check(!ended.status.success(), || ended.log.clone())?;
    check(ended.log.contains("was removed from the registry"), || {
        ended.log.clone()
    })?;
    let none = network.command("leave --public-ip 10.211.77.1")?;
    check(
        !none.status.success() && none.stderr.contains("no host"),
        || format!("{none:?}"),
    )
}

/// What a container sends to other networks has its host's address, as long as fastvpn runs.
#[testbed::trial(long, etcd)]
fn containers_are_masqueraded() -> Result<()> {
    let network = Network::new(2)?;
    let members = [network.join(0, "--ip-masq")?, network.join(1, "--ip-masq")?];
    let lines = members[0].subnet_file()?;
    check(lines.contains(&"FLANNEL_IPMASQ=true".into()), || {
        format!("{lines:?}")
    })?;
    let mut containers = Vec::new();
    for (host, member) in members.iter().enumerate() {
        let at = |last: u8| -> Result<ipnet::IpNet> {
            let text = member
                .subnet()?
                .to_string()
                .replace(".0/24", &format!(".{last}/24"));
            Ok(text.parse().expect("it is a prefix"))
        };
        let namespace = container(network.host(host), "cni0", &[(at(1)?, at(2)?)], 1472)?;
        containers.push((namespace, at(2)?.addr()));
    }
    // etcd's host knows nothing of the network.
    wait_for(&containers[0].0, super::network::ETCD.into())?;
    // Inside the network everybody is who it is.
    let server = crate::support::udp(&containers[1].0, containers[1].1, 7)?;
    let client = crate::support::udp(&containers[0].0, containers[0].1, 7)?;
    wait_for(&containers[0].0, containers[1].1)?;
    crate::support::tried("send", client.send_to(b"x", (containers[1].1, 7)))?;
    let (_, from) = crate::support::tried("receive", server.recv_from(&mut [0; 8]))?;
    check(from.ip() == containers[0].1, || {
        format!("it came from {from}")
    })?;
    let rules = |host: usize| -> Result<String> {
        let mut command = std::process::Command::new("nft");
        command.args(["list", "ruleset"]);
        Ok(crate::operator::said(network.host(host), command)?.stdout)
    };
    check(rules(0)?.matches("masquerade").count() == 2, || {
        format!("{:?}", rules(0))
    })?;
    let [first, second] = members;
    // Whether it is killed or stopped, nothing is left behind.
    drop(first.tunnel);
    wait_until("the rules' end", || Ok(rules(0)?.is_empty()))?;
    stop(second.tunnel)?;
    check(rules(1)?.is_empty(), || format!("{:?}", rules(1)))
}
