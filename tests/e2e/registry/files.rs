//! The files and names around a network: what container tools read, the key, the resolver.

use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::time::{Duration, Instant};

use fastvpn::error::Result;

use super::network::{Member, Network, namespaces, public_ip};
use crate::operator::{Operator, said};
use crate::routing::names::NameServer;
use crate::support::{FASTVPN, PATIENCE, check, link, stop, tried, wait_until};

const UDP: &str = r#"{"Network":"10.50.0.0/16"}"#;
const WIREGUARD: &str = r#"{"Network":"10.50.0.0/16","Backend":{"Type":"wireguard"}}"#;

fn check_line(member: &Member, line: &str) -> Result<()> {
    let lines = member.subnet_file()?;
    check(lines.iter().any(|other| other == line), || {
        format!("{line}: {lines:?}")
    })
}

/// Containers that are made afterwards have the MTU that there is.
#[testbed::trial(etcd)]
fn subnet_env_follows_a_reload() -> Result<()> {
    let network = Network::with_config(1, UDP)?;
    let files = Operator::new()?;
    let path = files.write("fastvpn.toml", "peer = []\nmtu = 1400\n")?;
    let member = network.join(0, &format!("--config {path}"))?;
    let subnet = member.subnet()?;
    check_line(&member, "FLANNEL_MTU=1400")?;
    files.write("fastvpn.toml", "peer = []\nmtu = 1300\n")?;
    member.operator.tell("reload")?;
    check_line(&member, "FLANNEL_MTU=1300")?;
    let link = link(network.host(0), "fastvpn0")?;
    check(link.mtu == 1300 && member.subnet()? == subnet, || {
        format!("{link:?}, {:?}", member.subnet_file())
    })?;
    stop(member.tunnel)?;
    Ok(())
}

/// Rules come and go, and `subnet.env` says which there are.
#[testbed::trial(long, etcd)]
fn masquerading_follows_a_reload() -> Result<()> {
    let network = Network::with_config(1, UDP)?;
    let files = Operator::new()?;
    let path = files.write("fastvpn.toml", "peer = []\n")?;
    let member = network.join(0, &format!("--config {path}"))?;
    let rules = || -> Result<usize> {
        let mut command = Command::new("nft");
        command.args(["list", "ruleset"]);
        let listed = said(network.host(0), command)?;
        Ok(listed.stdout.matches("masquerade").count())
    };
    for (is_masqueraded, count) in [(true, 2), (false, 0)] {
        let text = format!("peer = []\nip-masq = {is_masqueraded}\n");
        files.write("fastvpn.toml", &text)?;
        let answer = member.operator.ask("reload")?;
        check(answer["settings_changed"][0] == "ip-masq", || {
            format!("{answer}")
        })?;
        check_line(&member, &format!("FLANNEL_IPMASQ={is_masqueraded}"))?;
        check(rules()? == count, || format!("{:?}", rules()))?;
    }
    stop(member.tunnel)?;
    Ok(())
}

/// It is made once, for its owner alone; one that others may read is not used.
#[testbed::trial(etcd)]
fn a_private_key_is_its_owners_alone() -> Result<()> {
    let network = Network::with_config(1, WIREGUARD)?;
    let mut member = network.join(0, "")?;
    let key = |member: &Member| Ok(member.operator.ask("status")?["public_key"].clone());
    let (path, before) = (member.operator.path("cache.key"), key(&member)?);
    let metadata = tried("find the key", path.metadata())?;
    check(metadata.permissions().mode() & 0o777 == 0o600, || {
        format!("{metadata:?}")
    })?;
    let status = member.tunnel.child().terminate(PATIENCE)?;
    check(status.success(), || member.tunnel.said())?;
    let chmod = |mode| {
        let mode = PermissionsExt::from_mode(mode);
        tried("chmod", std::fs::set_permissions(&path, mode))
    };
    chmod(0o640)?;
    let member = member.start_again(network.host(0), 0)?;
    member.tunnel.wait_for_line("chmod 600")?;
    check(!member.tunnel.has_said("joined"), || member.tunnel.said())?;
    // It goes on as soon as that is done, and nobody has to come back to it.
    chmod(0o600)?;
    member.wait_until_joined()?;
    check(key(&member)? == before, || member.tunnel.said())?;
    stop(member.tunnel)?;
    Ok(())
}

/// However long a resolver would wait for its server.
#[testbed::trial]
fn a_silent_name_server_does_not_delay_the_end() -> Result<()> {
    let switch = namespaces(1)?;
    let server = NameServer::start_silent(&switch.hosts[0])?;
    let operator = Operator::new()?;
    let mut command = Command::new(FASTVPN);
    command.args(["--registry", "http://etcd.example:2379"]);
    command.args(["--public-ip", &public_ip(0).to_string()]);
    command.args(["--control", &operator.socket_text()]);
    for (flag, name) in [("--subnet-file", "env"), ("--registry-cache", "cache.json")] {
        command.arg(flag).arg(operator.path(name));
    }
    let mut tunnel = server.spawn(&switch.hosts[0], command)?;
    wait_until("a question", || Ok(server.questions("etcd.example") > 0))?;
    let start = Instant::now();
    let status = tunnel.child().terminate(PATIENCE)?;
    check(status.success(), || tunnel.said())?;
    // The resolver takes 30 s for one attempt.
    check(start.elapsed() < Duration::from_secs(20), || {
        format!("it took {:?}", start.elapsed())
    })
}
