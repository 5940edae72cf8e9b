//! What can go wrong with a registry, and what hosts do about it.

use std::time::{Duration, Instant};

use fastvpn::error::Result;
use serde_json::json;
use testbed::traffic::ping;

use super::network::{Network, PREFIX};
use crate::support::{PATIENCE, check, stop, wait_for, wait_until};
use crate::tools::Stream;

/// A host whose subnet is wanted by two: the second one gets another.
#[testbed::trial(etcd)]
fn a_subnet_that_is_taken_is_not_taken_again() -> Result<()> {
    let network = Network::with_config(
        2,
        r#"{"Network":"10.50.0.0/16","SubnetMin":"10.50.1.0","SubnetMax":"10.50.3.0"}"#,
    )?;
    network.put_host("10.50.1.0-24", "10.211.77.9", 600)?;
    let members = [network.join(0, "")?, network.join(1, "")?];
    let subnets = [
        members[0].subnet()?.to_string(),
        members[1].subnet()?.to_string(),
    ];
    check(
        subnets[0] != subnets[1] && !subnets.contains(&"10.50.1.0/24".into()),
        || format!("{subnets:?}"),
    )?;
    members
        .into_iter()
        .try_for_each(|member| stop(member.tunnel).map(drop))
}

/// One that finds no room waits for some.
#[testbed::trial(etcd)]
fn a_host_waits_for_room_in_a_full_network() -> Result<()> {
    let network = Network::with_config(
        1,
        r#"{"Network":"10.50.0.0/16","SubnetMin":"10.50.1.0","SubnetMax":"10.50.1.0"}"#,
    )?;
    network.put_host("10.50.1.0-24", "10.211.77.9", 600)?;
    let member = network.start(0, "")?;
    member
        .tunnel
        .wait_for_line("all 1 subnets of 10.50.0.0/16 are taken")?;
    network.delete("subnets/10.50.1.0-24")?;
    member.wait_until_joined()?;
    check(member.subnet()?.to_string() == "10.50.1.0/24", || {
        member.tunnel.said()
    })?;
    stop(member.tunnel)?;
    Ok(())
}

/// Everywhere, once its lease has ended.
#[testbed::trial(etcd)]
fn a_host_that_is_killed_is_forgotten() -> Result<()> {
    const TTL: Duration = Duration::from_secs(10);
    let network = Network::new(2)?;
    let stays = network.join(0, "")?;
    let dies = network.join(1, "--registry-ttl 10")?;
    wait_until("the other", || Ok(stays.routes()?.len() == 1))?;
    // Its lease is renewed as long as it lives.
    std::thread::sleep(TTL * 3 / 2);
    check(stays.routes()?.len() == 1, || stays.tunnel.said())?;
    drop(dies.tunnel);
    // As soon as its lease has ended: the usual one lasts for a day.
    wait_until("the other's end", || Ok(stays.routes()?.is_empty()))?;
    stop(stays.tunnel)?;
    Ok(())
}

/// The one that runs goes on by what it has begun with.
#[testbed::trial(etcd)]
fn a_network_that_changes_is_reported() -> Result<()> {
    let network = Network::new(1)?;
    let member = network.join(0, "")?;
    check(member.status()?["is_config_changed"] == false, || {
        member.tunnel.said()
    })?;
    network.put("config", r#"{"Network":"10.51.0.0/16"}"#)?;
    member.wait_for_status("is_config_changed", &json!(true))?;
    member
        .tunnel
        .wait_for_line("configuration at /coreos.com/network/config has changed")?;
    stop(member.tunnel)?;
    Ok(())
}

/// One that this host cannot be in is one line, and no reason to be started again later.
#[testbed::trial(etcd)]
fn a_network_with_ipv6_is_waited_out() -> Result<()> {
    const DUAL: &str = r#"{"EnableIPv6":true,"Network":"10.50.0.0/16","IPv6Network":"fd00:50::/56","Backend":{"Type":"wireguard"}}"#;
    let network = Network::with_config(1, DUAL)?;
    let member = network.start(0, "")?;
    let line =
        "/coreos.com/network/config: EnableIPv6, and networks without IPv4, are not supported";
    member.tunnel.wait_for_line(line)?;
    network.put("config", r#"{"Network":"10.50.0.0/16"}"#)?;
    member.wait_until_joined()?;
    // Nor does it disturb one that is there.
    network.put("config", DUAL)?;
    member.wait_for_status("is_config_changed", &json!(true))?;
    let said = member.tunnel.said();
    check(said.matches(line).count() == 1, || said.clone())?;
    stop(member.tunnel)?;
    Ok(())
}

/// Nor does one that is gone keep a host from coming back to etcd.
#[testbed::trial(etcd)]
fn a_network_whose_configuration_is_gone_goes_on() -> Result<()> {
    let mut network = Network::new(1)?;
    let member = network.join(0, "")?;
    network.delete("config")?;
    member.wait_for_status("is_config_changed", &json!(true))?;
    network.etcd.kill();
    member.wait_for_status("is_connected", &json!(false))?;
    network.restart_etcd()?;
    member.wait_for_status("is_connected", &json!(true))?;
    let said = member.tunnel.said();
    let reports = said.matches("network/config is gone").count();
    check(reports == 1, || said.clone())?;
    stop(member.tunnel)?;
    Ok(())
}

/// The lease ended, and the key with it: nobody wanted that.
#[testbed::trial(etcd)]
fn a_key_that_was_lost_with_its_lease_is_claimed_again() -> Result<()> {
    let network = Network::new(2)?;
    let members = [network.join(0, "")?, network.join(1, "")?];
    let subnet = members[0].subnet()?.to_string();
    let leases = network.ask(&["lease", "list"])?;
    for lease in leases.lines().skip(1) {
        network.ask(&["lease", "revoke", lease])?;
    }
    members[0]
        .tunnel
        .wait_for_line(&format!("{subnet} claimed again"))?;
    for member in &members {
        wait_until("the other", || Ok(member.routes()?.len() == 1))?;
    }
    members
        .into_iter()
        .try_for_each(|member| stop(member.tunnel).map(drop))
}

/// Two hosts use one subnet: it is for operators to say who.
#[testbed::trial(etcd)]
fn a_subnet_that_is_taken_away_is_an_alarm() -> Result<()> {
    let network = Network::new(1)?;
    let member = network.join(0, "")?;
    let name = member.subnet()?.to_string().replace('/', "-");
    network.put_host(&name, "10.211.77.9", 600)?;
    member.tunnel.wait_for_line("was taken by 10.211.77.9")?;
    let alarm = member.status()?["alarm"].to_string();
    check(alarm.contains("10.211.77.9"), || alarm.clone())?;
    check(
        member.subnet()?.to_string().replace('/', "-") == name,
        || member.tunnel.said(),
    )?;
    // Once the other has left, it is this host's again.
    network.delete(&format!("subnets/{name}"))?;
    member.tunnel.wait_for_line("claimed again")?;
    wait_until(
        "the alarm's end",
        || Ok(member.status()?["alarm"].is_null()),
    )?;
    stop(member.tunnel)?;
    Ok(())
}

/// Traffic does not notice, and what happens afterwards is seen at once.
#[testbed::trial(each_engine, etcd)]
fn etcd_may_be_away_for_a_while() -> Result<()> {
    let mut network = Network::new(2)?;
    let members = [network.join(0, "")?, network.join(1, "")?];
    let addresses = [members[0].address()?, members[1].address()?];
    wait_for(network.host(0), addresses[1])?;
    let stream = Stream::start(network.host(0), network.host(1), addresses[1])?;
    stream.wait_for_progress()?;
    network.etcd.kill();
    members[0].wait_for_status("is_connected", &json!(false))?;
    members[0]
        .tunnel
        .wait_for_line("the peers stay as they are")?;
    let down = Instant::now();
    while down.elapsed() < Duration::from_secs(10) {
        stream.wait_for_progress()?;
        ping(network.host(0), addresses[1], 56, PATIENCE)?;
    }
    network.restart_etcd()?;
    network.put_host("10.50.200.0-24", "10.211.77.9", 600)?;
    let has_new = |routes: Vec<String>| routes.iter().any(|it| it.starts_with("10.50.200.0/24"));
    wait_until("the new host", || Ok(has_new(members[0].routes()?)))?;
    stream.wait_for_progress()?;
    stream.finish()?;
    let lines = members[0].tunnel.said();
    let registry = lines
        .lines()
        .filter(|line| line.contains("registry:"))
        .count();
    check(registry < 12, || lines.clone())?;
    members
        .into_iter()
        .try_for_each(|member| stop(member.tunnel).map(drop))
}

/// What has happened meanwhile cannot be watched any more, and is listed once.
#[testbed::trial(etcd)]
fn changes_that_were_compacted_are_listed() -> Result<()> {
    let mut network = Network::new(1)?;
    network.put_host("10.50.200.0-24", "10.211.77.9", 600)?;
    network.put_host("10.50.201.0-24", "10.211.77.10", 600)?;
    let member = network.join(0, "")?;
    wait_until("both", || Ok(member.routes()?.len() == 2))?;
    // It cannot reach etcd while that changes and forgets.
    testbed::ip(network.host(0), "link set underlay0 down")?;
    network.restart_etcd()?;
    network.delete("subnets/10.50.200.0-24")?;
    network.put_host("10.50.202.0-24", "10.211.77.11", 600)?;
    let fields = network.ask(&["get", "--write-out", "fields", PREFIX])?;
    let revision = fields
        .lines()
        .find_map(|line| line.strip_prefix("\"Revision\" : "));
    network.ask(&["compact", revision.unwrap_or_default()])?;
    let before = member.tunnel.said().lines().count();
    testbed::ip(network.host(0), "link set underlay0 up")?;
    member.wait_for_routes(&[
        "10.50.201.0/24 10.211.77.10:8285",
        "10.50.202.0/24 10.211.77.11:8285",
    ])?;
    network.put_host("10.50.203.0-24", "10.211.77.12", 600)?;
    wait_until("the next one", || Ok(member.routes()?.len() == 3))?;
    // The one that stayed was never away.
    let said = member.tunnel.said();
    let new: Vec<_> = said.lines().skip(before).collect();
    check(
        !new.iter()
            .any(|line| line.contains("10.211.77.10:8285 is gone")),
        || said.clone(),
    )?;
    check(new.len() < 20, || said.clone())?;
    stop(member.tunnel)?;
    Ok(())
}

/// By what was known last: its subnet and its peers.
#[testbed::trial(etcd)]
fn a_host_boots_without_etcd() -> Result<()> {
    let mut network = Network::new(2)?;
    let members = [network.join(0, "")?, network.join(1, "")?];
    wait_until("the other", || Ok(members[0].routes()?.len() == 1))?;
    let (subnet, routes) = (members[0].subnet()?, members[0].routes()?);
    let [mut first, second] = members;
    let status = first.tunnel.child().terminate(PATIENCE)?;
    check(status.success(), || first.tunnel.said())?;
    network.etcd.kill();
    let first = first.start_again(network.host(0), 0)?;
    first.wait_until_joined()?;
    check(
        first.tunnel.has_said("going on with what was known before"),
        || first.tunnel.said(),
    )?;
    check(
        first.subnet()? == subnet && first.routes()? == routes,
        || first.tunnel.said(),
    )?;
    wait_for(network.host(0), second.address()?)?;
    network.restart_etcd()?;
    first.wait_for_status("is_connected", &json!(true))?;
    network.put_host("10.50.200.0-24", "10.211.77.9", 600)?;
    wait_until("the new host", || Ok(first.routes()?.len() == 2))?;
    stop(first.tunnel)?;
    stop(second.tunnel)?;
    Ok(())
}

/// An etcd that was made anew knows nobody: hosts come back to it, and the others stay.
#[testbed::trial(etcd)]
fn a_registry_that_was_made_anew_removes_nobody() -> Result<()> {
    let mut network = Network::new(2)?;
    network.put_host("10.50.200.0-24", "10.211.77.9", 600)?;
    let members = [network.join(0, "")?, network.join(1, "")?];
    wait_until("both", || Ok(members[0].routes()?.len() == 2))?;
    let (routes, subnet) = (members[0].routes()?, members[0].subnet()?);
    network.etcd.wipe()?;
    network.restart_etcd()?;
    members[0]
        .tunnel
        .wait_for_line("the peers stay as they are")?;
    network.put(
        "config",
        r#"{"Network":"10.50.0.0/16","Backend":{"Type":"udp","Port":8285}}"#,
    )?;
    for member in &members {
        member.wait_for_status("is_connected", &json!(true))?;
    }
    members[0].wait_for_status("held", &json!(1))?;
    check(members[0].routes()? == routes, || members[0].tunnel.said())?;
    // Both have made themselves known again.
    wait_until("both", || Ok(network.hosts()?.len() == 2))?;
    let name = subnet.to_string().replace('/', "-");
    check(network.hosts()?.iter().any(|(key, _)| *key == name), || {
        format!("{:?}", network.hosts())
    })?;
    members
        .into_iter()
        .try_for_each(|member| stop(member.tunnel).map(drop))
}
