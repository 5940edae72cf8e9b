//! Networks with the wireguard backend.

use fastvpn::error::Result;
use testbed::traffic::ping;

use super::network::{Network, PREFIX};
use crate::support::{PATIENCE, check, stop, wait_for, wait_until};

const CONFIG: &str = r#"{"Network":"10.50.0.0/16","Backend":{"Type":"wireguard"}}"#;

/// Keys are made, published as flanneld does it, kept, and used.
#[testbed::trial(each_engine, etcd)]
fn hosts_with_keys_find_each_other() -> Result<()> {
    let network = Network::with_config(2, CONFIG)?;
    let members = [network.join(0, "")?, network.join(1, "")?];
    wait_for(network.host(0), members[1].address()?)?;
    wait_for(network.host(1), members[0].address()?)?;
    let mut keys = Vec::new();
    for (host, member) in members.iter().enumerate() {
        let key = member.operator.ask("status")?["public_key"].clone();
        let key = key.as_str().unwrap_or_default().to_string();
        let name = member.subnet()?.to_string().replace('/', "-");
        let value = network
            .etcd
            .get(network.desk(), &format!("{PREFIX}/subnets/{name}"))?;
        let expected = format!(
            r#"{{"PublicIP":"10.211.77.{}","PublicIPv6":null,"BackendType":"wireguard","BackendData":{{"PublicKey":"{key}"}}}}"#,
            host + 1
        );
        check(value == expected, || {
            format!("{value}, expected {expected}")
        })?;
        // flannel's: 80 bytes less than the underlay's.
        let lines = member.subnet_file()?;
        check(lines.contains(&"FLANNEL_MTU=1420".into()), || {
            format!("{lines:?}")
        })?;
        keys.push(key);
    }
    let peers = members[0].operator.ask("peers")?;
    let peer = &peers["peers"][0];
    check(
        peer["peer"] == keys[1].as_str() && peer["endpoint"] == "10.211.77.2:51820",
        || format!("{peers}"),
    )?;
    // A restart keeps the key.
    let [first, mut second] = members;
    let status = second.tunnel.child().terminate(PATIENCE)?;
    check(status.success(), || second.tunnel.said())?;
    let second = second.start_again(network.host(1), 1)?;
    second.wait_until_joined()?;
    check(
        second.operator.ask("status")?["public_key"] == keys[1].as_str(),
        || second.tunnel.said(),
    )?;
    wait_for(network.host(0), second.address()?)?;
    // A host without a key is not used.
    network.put_host("10.50.200.0-24", "10.211.77.9", 60)?;
    wait_until(
        "it is counted",
        || Ok(first.status()?["other_backend"] == 1),
    )?;
    check(first.routes()?.len() == 1, || first.tunnel.said())?;
    stop(first.tunnel)?;
    stop(second.tunnel)?;
    Ok(())
}

/// A process takes over from another without losing a packet's way.
#[testbed::trial(each_engine, etcd)]
fn a_takeover_keeps_a_network() -> Result<()> {
    for config in [CONFIG, r#"{"Network":"10.50.0.0/16"}"#] {
        let network = Network::with_config(2, config)?;
        let members = [network.join(0, "")?, network.join(1, "")?];
        let (subnet, far) = (members[0].subnet()?, members[1].address()?);
        wait_for(network.host(0), far)?;
        let [first, second] = members;
        let (ended, first) = first.take_over(network.host(0), 0)?;
        check(ended.status.success(), || ended.log.clone())?;
        check(first.subnet()? == subnet, || first.tunnel.said())?;
        wait_until("the other", || Ok(first.routes()?.len() == 1))?;
        ping(network.host(0), far, 56, PATIENCE)?;
        network.put_host("10.50.200.0-24", "10.211.77.9", 60)?;
        wait_until("the change", || {
            let status = first.status()?;
            Ok(status["hosts"] == 3)
        })?;
        stop(first.tunnel)?;
        stop(second.tunnel)?;
    }
    Ok(())
}

/// Peers in the file change, and the network's stay.
#[testbed::trial(etcd)]
fn a_reload_leaves_the_network_alone() -> Result<()> {
    let network = Network::with_config(2, r#"{"Network":"10.50.0.0/16"}"#)?;
    let other = network.join(1, "")?;
    let files = crate::operator::Operator::new()?;
    let text = "[[peer]]\nendpoint = \"10.211.77.9\"\nprefixes = [\"10.70.0.0/24\"]\n";
    let path = files.write("fastvpn.toml", text)?;
    let member = network.join(0, &format!("--config {path}"))?;
    let routes = [format!("{} 10.211.77.2:8285", other.subnet()?)];
    let routes: Vec<&str> = routes.iter().map(String::as_str).collect();
    member.wait_for_routes(&routes)?;
    // Now by hand, then no more, and a prefix of the network is taken by hand meanwhile.
    let own = format!("prefixes = [\"{}\"]", other.subnet()?);
    for (text, expected) in [
        (text.replace("10.211.77.9", "10.211.77.2"), &routes[..]),
        (
            format!("[[peer]]\nendpoint = \"10.211.77.9\"\n{own}\n"),
            &[],
        ),
        ("peer = []\n".to_string(), &routes[..]),
    ] {
        files.write("fastvpn.toml", &text)?;
        member.operator.tell("reload")?;
        member.wait_for_routes(expected)?;
    }
    wait_for(network.host(0), other.address()?)?;
    stop(member.tunnel)?;
    stop(other.tunnel)?;
    Ok(())
}
