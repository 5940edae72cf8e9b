//! Keys that follow from one secret of all hosts, and from who each of them is.

use std::fs::{self, Permissions};
use std::net::Ipv4Addr;
use std::os::unix::fs::PermissionsExt;

use fastvpn::error::Result;
use tempfile::TempDir;
use testbed::Pair;

use super::ends::hosts;
use crate::relay::{FACES, PORT, Ports, Relay};
use crate::support::{
    TUNNEL, Tunnel, UNDERLAY, bulk, check, stop, tried, udp, wait_for, wait_until,
};

/// Two secrets, long enough and not to be guessed.
pub const SECRETS: [&str; 2] = [
    "4zLhOB5XhQq2vF0v6sHc1Jj0CwqyTnyGgq9nYzB9Fbo=",
    "0f1d3b5a79c8e6a4b2d0f9e7c5a38162",
];

/// Files that their owner alone can read.
struct Files(TempDir);

impl Files {
    fn new() -> Result<Self> {
        tried("make a directory", tempfile::tempdir()).map(Self)
    }

    fn write(&self, name: &str, text: &str) -> Result<String> {
        let path = self.0.path().join(name);
        let write = || {
            fs::write(&path, text)?;
            fs::set_permissions(&path, Permissions::from_mode(0o600))
        };
        tried("write a file", write())?;
        Ok(path.display().to_string())
    }
}

/// Starts host A and host B, each with a secret and with flags.
fn start(hosts: &Pair, files: &Files, secrets: [&str; 2], flags: [&str; 2]) -> Result<[Tunnel; 2]> {
    let start = |own: usize| {
        let secret = files.write(&format!("{own}.secret"), secrets[own])?;
        let peer = UNDERLAY[1 - own].to_string();
        let mut all = vec!["--secret-file", &secret, "--peer", &peer];
        all.extend(flags[own].split_whitespace());
        Tunnel::start([&hosts.a, &hosts.b][own], &all)
    };
    Ok([start(0)?, start(1)?])
}

/// As in plain mode, with one more flag.
#[testbed::trial(each_engine)]
fn one_secret() -> Result<()> {
    let (hosts, files) = (hosts()?, Files::new()?);
    let ends = start(&hosts, &files, [SECRETS[0]; 2], [""; 2])?;
    wait_for(&hosts.a, TUNNEL[1].into())?;
    wait_for(&hosts.b, TUNNEL[0].into())?;
    bulk(&hosts.a, &hosts.b, TUNNEL[1].into(), 5)?;
    for (own, end) in ends.into_iter().enumerate() {
        let log = stop(end)?.log;
        let identity = format!("by a shared secret, as {},", UNDERLAY[own]);
        check(log.contains(&identity), || log.clone())?;
    }
    Ok(())
}

/// Host A is known by a name, and host B behind its NAT is, too.
#[testbed::trial(each_engine)]
fn identities_behind_a_nat() -> Result<()> {
    let (relay, files) = (Relay::start(Ports::Rewritten, true)?, Files::new()?);
    let secret = files.write("secret", SECRETS[0])?;
    let file = |own: usize, peer: &str| {
        let text = format!(
            "secret-file = {secret:?}\naddress = [\"{}/16\"]\n[[peer]]\nprefixes = [\"{}/32\"]\n\
             {peer}\n",
            TUNNEL[own],
            TUNNEL[1 - own],
        );
        files.write(&format!("{own}.toml"), &text)
    };
    let open = file(0, "identity = \"hidden\"")?;
    let behind = file(
        1,
        &format!(
            "identity = \"gate\"\nendpoint = \"{}:{PORT}\"\npersistent-keepalive = 1",
            FACES[1]
        ),
    )?;
    let a = Tunnel::start(&relay.a, &["--config", &open, "--identity", "gate"])?;
    let b = Tunnel::start(&relay.b, &["--config", &behind, "--identity", "Hidden"])?;
    // Nobody behind the NAT has anything to send.
    wait_for(&relay.a, TUNNEL[1].into())?;
    bulk(&relay.b, &relay.a, TUNNEL[0].into(), 5)?;
    stop(a)?;
    stop(b)?;
    relay.stop()
}

/// Host A calls, and host B says what it makes of that.
fn mismatch(secrets: [&str; 2], flags: [&str; 2], parts: &[&str]) -> Result<()> {
    let (hosts, files) = (hosts()?, Files::new()?);
    let [caller, called] = start(&hosts, &files, secrets, flags)?;
    let socket = udp(&hosts.a, Ipv4Addr::UNSPECIFIED, 0)?;
    wait_until("the one that is called says why", || {
        let _ = socket.send_to(b"call", (TUNNEL[1], 9));
        let log = called.said();
        Ok(parts.iter().all(|part| log.contains(part)))
    })?;
    stop(caller)?;
    stop(called).map(drop)
}

#[testbed::trial]
fn identities_that_do_not_match() -> Result<()> {
    let from = format!("a handshake from {}:8285", UNDERLAY[0]);
    let peer = UNDERLAY[0].to_string();
    let (same, other) = ([SECRETS[0]; 2], SECRETS);
    // Host A knows host B by its address.
    let named = ["", "--identity other"];
    mismatch(
        same,
        named,
        &[&from, &peer, "another host than this host, other"],
    )?;
    let itself = format!("another host than this host, {}", UNDERLAY[1]);
    mismatch(other, ["", ""], &[&from, &peer, &itself, "another secret"])?;
    // Host B knows host A by its address.
    let named = ["--identity other", ""];
    let hint = format!("start it with --identity {peer}");
    mismatch(same, named, &[&from, "has the secret", &hint])
}
