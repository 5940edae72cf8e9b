//! Who may write to etcd, and who may be who.

use std::process::Command;
use std::time::Duration;

use fastvpn::error::Result;
use serde_json::json;
use testbed::etcd::Etcd;

use super::network::{ETCD, Member, Network, PREFIX, namespaces};
use crate::operator::Operator;
use crate::support::{check, stop, tried, wait_until};

const CONFIG: &str = r#"{"Network":"10.50.0.0/16"}"#;

/// Makes an authority, a certificate for etcd, and one for hosts.
fn certificates(operator: &Operator) -> Result<()> {
    let script = r#"set -e
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 \
  -subj /CN=authority -keyout ca.key -out ca.pem \
  -addext basicConstraints=critical,CA:true -addext keyUsage=keyCertSign
for name in server client; do
  openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=$name \
    -keyout $name.key -out $name.csr
  printf 'subjectAltName=IP:10.211.77.250\nextendedKeyUsage=serverAuth,clientAuth\n' > $name.ext
  openssl x509 -req -in $name.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 \
    -extfile $name.ext -out $name.pem
done
chmod 600 client.key"#;
    let mut command = Command::new("sh");
    command.args(["-c", script]).current_dir(operator.path(""));
    let output = tried("make certificates", command.output())?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    check(output.status.success(), || said)
}

/// Each side proves who it is by a certificate; one without is not let in.
#[testbed::trial(etcd)]
fn both_ends_have_certificates() -> Result<()> {
    let files = Operator::new()?;
    certificates(&files)?;
    let path = |name: &str| files.path(name).display().to_string();
    let server = [
        ("--cert-file", "server.pem"),
        ("--key-file", "server.key"),
        ("--trusted-ca-file", "ca.pem"),
    ];
    let flags = |all: &[(&str, &str)]| -> Vec<String> {
        all.iter()
            .flat_map(|(flag, name)| [flag.to_string(), path(name)])
            .collect()
    };
    let mut server = flags(&server);
    server.push("--client-cert-auth".into());
    let client = flags(&[
        ("--cacert", "ca.pem"),
        ("--cert", "client.pem"),
        ("--key", "client.key"),
    ]);
    let switch = namespaces(1)?;
    let url = format!("https://{ETCD}:2379");
    let etcd = Etcd::start_with(&switch.hosts[1], url.clone(), [server, client])?;
    etcd.put(&switch.hosts[1], &format!("{PREFIX}/config"), CONFIG)?;
    let flags = format!(
        "--registry {url} --registry-ca {} --registry-cert {} --registry-key {}",
        path("ca.pem"),
        path("client.pem"),
        path("client.key")
    );
    let member = Member::start(&switch.hosts[0], 0, &flags)?;
    member.wait_until_joined()?;
    stop(member.tunnel)?;
    for (flags, part) in [
        (
            format!("--registry {url} --registry-ca {}", path("ca.pem")),
            "cannot connect|etcd at",
        ),
        (
            format!("--registry {url} --registry-ca {}", path("server.pem")),
            "cannot connect",
        ),
    ] {
        let member = Member::start(&switch.hosts[0], 0, &flags)?;
        wait_until("a warning", || {
            Ok(part.split('|').any(|part| member.tunnel.has_said(part)))
        })?;
        check(!member.operator.path("subnet.env").exists(), || {
            member.tunnel.said()
        })?;
    }
    // A key that others may read is refused.
    let mut command = Command::new("chmod");
    command.arg("644").arg(files.path("client.key"));
    tried("chmod", command.status())?;
    let ended = Member::start(
        &switch.hosts[0],
        0,
        &format!(
            "--registry {url} --registry-ca {} --registry-cert {} --registry-key {}",
            path("ca.pem"),
            path("client.pem"),
            path("client.key")
        ),
    )?
    .tunnel
    .wait()?;
    check(
        !ended.status.success() && ended.log.contains("chmod 600"),
        || ended.log.clone(),
    )
}

/// A user with a password, whose token ends with etcd's process, and when it was not used for
/// a while: that nobody notices.
#[testbed::trial(etcd)]
fn a_user_is_known_again_after_a_restart_of_etcd() -> Result<()> {
    let files = Operator::new()?;
    let password = files.write("password", "secret\n")?;
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o600);
    tried("chmod", std::fs::set_permissions(&password, mode))?;
    let switch = namespaces(1)?;
    let desk = &switch.hosts[1];
    let url = format!("http://{ETCD}:2379");
    let user = vec!["--user".to_string(), "root:root".to_string()];
    let server = ["--auth-token-ttl", "1"].map(String::from).to_vec();
    let mut etcd = Etcd::start_with(desk, url.clone(), [server, Vec::new()])?;
    etcd.put(desk, &format!("{PREFIX}/config"), CONFIG)?;
    let end = format!("{PREFIX}0");
    for words in [
        &["user", "add", "root:root"][..],
        &["user", "grant-role", "root", "root"],
        &["role", "add", "host"],
        &[
            "role",
            "grant-permission",
            "host",
            "readwrite",
            &format!("{PREFIX}/"),
            &end,
        ],
        &["user", "add", "host:secret"],
        &["user", "grant-role", "host", "host"],
        &["auth", "enable"],
    ] {
        etcd.ask(desk, words)?;
    }
    etcd.set_client_flags(user);
    let flags = format!(
        "--registry {url} --registry-user host --registry-password-file {password} \
         --registry-ttl 5"
    );
    let member = Member::start(&switch.hosts[0], 0, &flags)?;
    member.wait_until_joined()?;
    // Longer than its lease, which is renewed by a token that is forgotten each time.
    std::thread::sleep(Duration::from_secs(8));
    let said = member.tunnel.said();
    check(
        !said.contains("invalid auth token") && !said.contains("trying again"),
        || said.clone(),
    )?;
    etcd.kill();
    member.wait_for_status("is_connected", &json!(false))?;
    etcd.restart(desk)?;
    member.wait_for_status("is_connected", &json!(true))?;
    let value = r#"{"PublicIP":"10.211.77.9","PublicIPv6":null}"#;
    etcd.put(desk, &format!("{PREFIX}/subnets/10.50.200.0-24"), value)?;
    member.wait_for_routes(&["10.50.200.0/24 10.211.77.9:8285"])?;
    stop(member.tunnel)?;
    // flannel's names work as well.
    let mut command = Command::new(crate::support::FASTVPN);
    command.args(["registry", "show"]);
    command.env("FLANNELD_ETCD_ENDPOINTS", &url);
    command.env("FLANNELD_ETCD_USERNAME", "host");
    let refused = crate::operator::said(desk, command)?;
    check(refused.stderr.contains("registry-password-file"), || {
        format!("{refused:?}")
    })?;
    let mut command = Command::new(crate::support::FASTVPN);
    command.args(["registry", "show"]);
    command.env("FLANNELD_ETCD_ENDPOINTS", &url);
    command.env("FLANNELD_ETCD_USERNAME", "host");
    command.env("FLANNELD_ETCD_PASSWORD", "secret");
    let shown = crate::operator::said(desk, command)?;
    check(
        shown.status.success() && shown.stdout.contains("10.211.77.9"),
        || format!("{shown:?}"),
    )?;
    let bad = files.write("bad", "other\n")?;
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o600);
    tried("chmod", std::fs::set_permissions(&bad, mode))?;
    let flags = format!("--registry {url} --registry-user host --registry-password-file {bad}");
    let member = Member::start(&switch.hosts[0], 0, &flags)?;
    member.tunnel.wait_for_line("authentication failed")?;
    check(!member.tunnel.said().contains("other"), || {
        member.tunnel.said()
    })
}

/// A user who may write the keys of one subnet alone gets that one, and its attempts leave
/// no leases.
#[testbed::trial(etcd)]
fn a_user_with_one_key_gets_its_subnet() -> Result<()> {
    let files = Operator::new()?;
    let password = files.write("password", "secret\n")?;
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o600);
    tried("chmod", std::fs::set_permissions(&password, mode))?;
    let switch = namespaces(1)?;
    let desk = &switch.hosts[1];
    let mut etcd = Etcd::start(desk, ETCD.into())?;
    let config = r#"{"Network":"10.50.0.0/16","SubnetMin":"10.50.1.0","SubnetMax":"10.50.20.0"}"#;
    etcd.put(desk, &format!("{PREFIX}/config"), config)?;
    let (first, end) = (format!("{PREFIX}/"), format!("{PREFIX}0"));
    for words in [
        &["user", "add", "root:root"][..],
        &["user", "grant-role", "root", "root"],
        &["role", "add", "host"],
        &["role", "grant-permission", "host", "read", &first, &end],
        &["user", "add", "host:secret"],
        &["user", "grant-role", "host", "host"],
        &["auth", "enable"],
    ] {
        etcd.ask(desk, words)?;
    }
    etcd.set_client_flags(vec!["--user".into(), "root:root".into()]);
    let flags = format!(
        "--registry http://{ETCD}:2379 --registry-user host --registry-password-file {password}"
    );
    let member = Member::start(&switch.hosts[0], 0, &flags)?;
    member.tunnel.wait_for_line("permission denied")?;
    let key = format!("{PREFIX}/subnets/10.50.7.0-24");
    etcd.ask(
        desk,
        &["role", "grant-permission", "host", "readwrite", &key],
    )?;
    member.wait_until_joined()?;
    check(member.subnet()?.to_string() == "10.50.7.0/24", || {
        member.tunnel.said()
    })?;
    let leases = etcd.ask(desk, &["lease", "list"])?;
    check(leases.contains("found 1 leases"), || leases.clone())?;
    stop(member.tunnel)?;
    Ok(())
}

/// A host that may not be one is none.
#[testbed::trial(etcd)]
fn a_network_is_for_those_who_fit_its_backend() -> Result<()> {
    let network = Network::new(1)?;
    let key = format!("{}=", "A".repeat(43));
    let ended = network.start(0, &format!("--peer {key}@10.211.77.9=10.70.0.0/24"))?;
    let ended = ended.tunnel.wait()?;
    check(!ended.status.success(), || ended.log.clone())?;
    check(
        ended.log.contains("has a public key, but this host has no"),
        || ended.log.clone(),
    )
}
