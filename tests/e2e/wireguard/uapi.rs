//! fastvpn and wg(8), which finds it by its socket.

use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use fastvpn::error::Result;
use testbed::wireguard::{self, Key, WG, base64, beside, random_key, socket_of, with_own_run};
use testbed::{Namespace, Pair, ip};

use super::ends::{Keys, Kind, PORT, Reach, Underlay, hosts, inside};
use crate::packets::TUNNEL_NAME;
use crate::support::{
    FASTVPN, TUNNEL, Tunnel, UNDERLAY, bulk, check, next_engine, stop, tried, udp, wait_for,
    wait_until,
};
use crate::tools::Stream;

/// A host whose tunnel has a /run of its own.
struct Host<'a> {
    namespace: &'a Namespace,
    tunnel: Tunnel,
}

impl<'a> Host<'a> {
    /// Starts a tunnel with these flags.
    fn start(namespace: &'a Namespace, flags: &[&str]) -> Result<Self> {
        let mut program = Command::new(FASTVPN);
        program.args(next_engine().iter().flat_map(|io| ["--io", io]));
        program.args(flags);
        let mut command = with_own_run(&program)?;
        command.stdin(Stdio::null()).stdout(Stdio::null());
        let tunnel = Tunnel::spawn(namespace, command)?;
        let host = Self { namespace, tunnel };
        host.wait_for_socket()?;
        Ok(host)
    }

    /// With a key and an address, and without peers.
    fn without_peers(namespace: &'a Namespace, keys: &Keys, own: usize) -> Result<Self> {
        let key = keys.private_file(own)?.display().to_string();
        let address = format!("{}/16", TUNNEL[own]);
        Self::start(namespace, &["--private-key", &key, "--address", &address])
    }

    fn socket(&self) -> Result<PathBuf> {
        socket_of(self.tunnel.pid(), TUNNEL_NAME)
    }

    fn wait_for_socket(&self) -> Result<()> {
        // Before it is up it may not have its own /run yet, but another tunnel's.
        self.tunnel.wait_for_line("queues: ")?;
        let socket = self.socket()?;
        wait_until("the socket is there", || Ok(socket.exists()))
    }

    /// What `wg WORDS` says, and whether it succeeds, with a text to read.
    fn try_wg(&self, words: &[&str], input: &str) -> Result<(bool, String)> {
        let mut program = WG.program.command()?;
        program.args(words);
        let mut command = beside(self.tunnel.pid(), &program)?;
        let piped = [Stdio::piped(), Stdio::piped(), Stdio::piped()];
        let [stdin, stdout, stderr] = piped;
        command.stdin(stdin).stdout(stdout).stderr(stderr);
        let output = self.namespace.run(|| {
            let mut child = command.spawn()?;
            // It may have no use for it.
            let _ = child
                .stdin
                .take()
                .map(|mut to| to.write_all(input.as_bytes()));
            child.wait_with_output()
        });
        let output = tried("run wg", output)?;
        let said = [output.stdout, output.stderr].concat();
        let said = String::from_utf8_lossy(&said).into_owned();
        Ok((output.status.success(), said))
    }

    fn wg_with(&self, words: &[&str], input: &str) -> Result<String> {
        let (is_ok, said) = self.try_wg(words, input)?;
        check(is_ok, || format!("wg {words:?} has failed: {said}"))?;
        Ok(said)
    }

    fn wg(&self, words: &[&str]) -> Result<String> {
        self.wg_with(words, "")
    }

    /// `wg set` with these words.
    fn set(&self, words: &str) -> Result<()> {
        let words: Vec<_> = words.split(' ').collect();
        self.wg(&[&["set", TUNNEL_NAME][..], &words].concat())
            .map(drop)
    }

    /// What it has of this kind, of the tunnel or of all peers.
    fn show(&self, what: &str) -> Result<String> {
        let said = self.wg(&["show", TUNNEL_NAME, what])?;
        Ok(said.trim().replace('\t', " "))
    }

    fn shows(&self, what: &str, expected: &str) -> Result<()> {
        let shown = self.show(what)?;
        check(shown == expected, || {
            format!("{what}: {shown:?}, not {expected:?}")
        })
    }
}

/// Both hosts know each other, by what wg(8) told them; host A calls.
fn introduce(all: &[Host<'_>; 2], keys: &Keys, preshared: &Key) -> Result<()> {
    let file = keys.write("shared.key", &base64(preshared))?;
    for (own, host) in all.iter().enumerate() {
        let peer = base64(&keys.public(1 - own));
        let endpoint = match own {
            0 => format!(" endpoint {}", Underlay::V4.endpoint(1)),
            _ => String::new(),
        };
        host.set(&format!(
            "peer {peer} preshared-key {} allowed-ips {}/32{endpoint}",
            file.display(),
            TUNNEL[1 - own],
        ))?;
    }
    Ok(())
}

fn both<'a>(hosts: &'a Pair, keys: &Keys) -> Result<[Host<'a>; 2]> {
    Ok([
        Host::without_peers(&hosts.a, keys, 0)?,
        Host::without_peers(&hosts.b, keys, 1)?,
    ])
}

/// What is configured, and what has happened.
#[testbed::trial(wg)]
fn wg_shows_a_tunnel() -> Result<()> {
    let hosts = hosts()?;
    let keys = Keys::new(true)?;
    let called = keys.start(&hosts.b, 1, Kind::Fastvpn, Reach::UNKNOWN)?;
    let reach = Reach {
        endpoint: Some(Underlay::V4.endpoint(1)),
        keepalive_s: Some(25),
    };
    let file = keys.file(0, reach)?.display().to_string();
    let host = Host::start(&hosts.a, &["--config", &file])?;
    wait_for(&hosts.a, inside(1))?;
    let peer = base64(&keys.public(1));
    host.shows("public-key", &base64(&keys.public(0)))?;
    host.shows("listen-port", &PORT.to_string())?;
    host.shows("fwmark", "off")?;
    host.shows("peers", &peer)?;
    host.shows("endpoints", &format!("{peer} {}:{PORT}", UNDERLAY[1]))?;
    host.shows("persistent-keepalive", &format!("{peer} 25"))?;
    let prefixes = host.show("allowed-ips")?;
    for prefix in [format!("{}/32", TUNNEL[1]), "fd00:244::123/128".into()] {
        check(prefixes.contains(&prefix), || prefixes.clone())?;
    }
    for what in ["latest-handshakes", "transfer"] {
        let shown = host.show(what)?;
        let numbers: Vec<u64> = shown.split(' ').filter_map(|it| it.parse().ok()).collect();
        check(!numbers.is_empty() && !numbers.contains(&0), || {
            format!("{what}: {shown}")
        })?;
    }
    let all = host.wg(&["show"])?;
    check(
        all.contains("latest handshake") && all.contains(&peer),
        || all.clone(),
    )?;
    // What is shown is in force already.
    let handshake = host.show("latest-handshakes")?;
    let configuration = host.wg(&["showconf", TUNNEL_NAME])?;
    host.wg_with(&["syncconf", TUNNEL_NAME, "/dev/stdin"], &configuration)?;
    wait_for(&hosts.a, inside(1))?;
    host.shows("latest-handshakes", &handshake)?;
    let socket = host.socket()?;
    stop(host.tunnel)?;
    check(!socket.exists(), || "the socket is left behind".into())?;
    called.stop()
}

/// Two tunnels that know nobody are introduced to each other, and separated.
#[testbed::trial(wg)]
fn wg_sets_peers() -> Result<()> {
    let hosts = hosts()?;
    let keys = Keys::new(false)?;
    let all = both(&hosts, &keys)?;
    introduce(&all, &keys, &random_key()?)?;
    wait_for(&hosts.a, inside(1))?;
    bulk(&hosts.a, &hosts.b, inside(1), 5)?;
    bulk(&hosts.b, &hosts.a, inside(0), 5)?;
    let [a, b] = &all;
    let peer = base64(&keys.public(1));
    a.set(&format!(
        "peer {peer} persistent-keepalive 7 allowed-ips 10.9.0.0/16"
    ))?;
    a.shows("persistent-keepalive", &format!("{peer} 7"))?;
    a.shows("allowed-ips", &format!("{peer} 10.9.0.0/16"))?;
    // A peer that comes later has what it is given, whoever had it.
    let other = base64(&wireguard::public_key(&random_key()?));
    a.set(&format!("peer {other} allowed-ips 10.9.0.0/16"))?;
    let shown = a.show("allowed-ips")?;
    for line in [format!("{peer} (none)"), format!("{other} 10.9.0.0/16")] {
        check(shown.contains(&line), || shown.clone())?;
    }
    a.set(&format!(
        "peer {other} remove peer {peer} allowed-ips {}/32",
        TUNNEL[1]
    ))?;
    a.shows("peers", &peer)?;
    wait_for(&hosts.a, inside(1))?;
    // This host is not its own peer.
    a.set(&format!("peer {}", base64(&keys.public(0))))?;
    a.shows("peers", &peer)?;
    b.set(&format!("peer {} remove", base64(&keys.public(0))))?;
    b.shows("peers", "")?;
    let [a, b] = all;
    stop(a.tunnel)?;
    stop(b.tunnel).map(drop)
}

/// All of a tunnel but its sockets, by file: first as it is, then with other peers.
#[testbed::trial(wg)]
fn wg_sets_all_of_a_tunnel() -> Result<()> {
    let hosts = hosts()?;
    let keys = Keys::new(false)?;
    let all = both(&hosts, &keys)?;
    introduce(&all, &keys, &random_key()?)?;
    wait_for(&hosts.a, inside(1))?;
    let [a, b] = &all;
    // Host A becomes somebody else.
    let key = random_key()?;
    let public = base64(&wireguard::public_key(&key));
    let peer = base64(&keys.public(1));
    let configuration = format!(
        "[Interface]\nPrivateKey = {}\n[Peer]\nPublicKey = {peer}\nEndpoint = {}\n\
         AllowedIPs = {}/32\n",
        base64(&key),
        Underlay::V4.endpoint(1),
        TUNNEL[1],
    );
    a.wg_with(&["setconf", TUNNEL_NAME, "/dev/stdin"], &configuration)?;
    a.shows("public-key", &public)?;
    a.shows("preshared-keys", &format!("{peer} (none)"))?;
    b.set(&format!(
        "peer {} remove peer {public} allowed-ips {}/32",
        base64(&keys.public(0)),
        TUNNEL[0],
    ))?;
    wait_for(&hosts.a, inside(1))?;
    bulk(&hosts.b, &hosts.a, inside(0), 5)?;
    // What is more than a file says is removed by it.
    let other = base64(&wireguard::public_key(&random_key()?));
    let handshake = a.show("latest-handshakes")?;
    a.set(&format!("peer {other} allowed-ips 10.9.0.0/16"))?;
    a.wg_with(&["syncconf", TUNNEL_NAME, "/dev/stdin"], &configuration)?;
    a.shows("latest-handshakes", &handshake)?;
    let [a, b] = all;
    stop(a.tunnel)?;
    stop(b.tunnel).map(drop)
}

/// Each end moves to another port, from which it says something, and the other follows. A
/// stream goes on.
#[testbed::trial(each_engine, wg)]
fn wg_sets_the_port() -> Result<()> {
    let hosts = hosts()?;
    let keys = Keys::new(false)?;
    let all = both(&hosts, &keys)?;
    introduce(&all, &keys, &random_key()?)?;
    wait_for(&hosts.a, inside(1))?;
    let [a, b] = &all;
    let stream = Stream::start(&hosts.a, &hosts.b, inside(1))?;
    stream.wait_for_progress()?;
    let handshake = a.show("latest-handshakes")?;
    a.set("listen-port 51821")?;
    a.shows("listen-port", "51821")?;
    stream.wait_for_progress()?;
    b.shows(
        "endpoints",
        &format!("{} {}:51821", base64(&keys.public(0)), UNDERLAY[0]),
    )?;
    a.shows("latest-handshakes", &handshake)?;
    b.set("listen-port 51822")?;
    wait_for(&hosts.b, inside(0))?;
    stream.wait_for_progress()?;
    a.shows(
        "endpoints",
        &format!("{} {}:51822", base64(&keys.public(1)), UNDERLAY[1]),
    )?;
    stream.finish()?;
    // One that somebody else has.
    let taken = udp(&hosts.a, UNDERLAY[0], 51823)?;
    let (is_ok, said) = a.try_wg(&["set", TUNNEL_NAME, "listen-port", "51823"], "")?;
    check(!is_ok && said.contains("in use"), || said.clone())?;
    drop(taken);
    a.shows("listen-port", "51821")?;
    wait_for(&hosts.a, inside(1))?;
    let [a, b] = all;
    stop(a.tunnel)?;
    stop(b.tunnel).map(drop)
}

/// All goes through the tunnel but what has its mark, as by wg-quick(8).
#[testbed::trial(wg)]
fn a_mark_lets_all_else_into_the_tunnel() -> Result<()> {
    let hosts = hosts()?;
    let keys = Keys::new(false)?;
    let key = keys.private_file(0)?.display().to_string();
    let address = format!("{}/16", TUNNEL[0]);
    let flags = ["--private-key", &key, "--address", &address, "--no-routes"];
    let all = [
        Host::start(&hosts.a, &flags)?,
        Host::without_peers(&hosts.b, &keys, 1)?,
    ];
    introduce(&all, &keys, &random_key()?)?;
    wait_for(&hosts.a, inside(1))?;
    let a = &all[0];
    let peer = base64(&keys.public(1));
    ip(
        &hosts.a,
        &format!("route add default dev {TUNNEL_NAME} table 51820"),
    )?;
    a.set(&format!("fwmark 51820 peer {peer} allowed-ips 0.0.0.0/0"))?;
    a.shows("fwmark", "0xca6c")?;
    ip(&hosts.a, "rule add not fwmark 51820 table 51820")?;
    bulk(&hosts.a, &hosts.b, inside(1), 5)?;
    // Also what is for the other host's address on the cable.
    wait_for(&hosts.a, UNDERLAY[1].into())?;
    // On another port, too.
    a.set("listen-port 51821")?;
    bulk(&hosts.a, &hosts.b, inside(1), 5)?;
    let [a, b] = all;
    stop(a.tunnel)?;
    stop(b.tunnel).map(drop)
}

/// All of the change, or nothing; wg(8) says why in its words, and the log in better ones.
#[testbed::trial(wg)]
fn what_cannot_be_is_refused() -> Result<()> {
    let hosts = hosts()?;
    let keys = Keys::new(false)?;
    let host = Host::without_peers(&hosts.a, &keys, 0)?;
    let peer = base64(&keys.public(1));
    let own = format!("peer {peer} allowed-ips {}/32", TUNNEL[0]);
    let here = format!("peer {peer} endpoint {}", Underlay::V4.endpoint(0));
    for (words, reason, logged) in [
        (&own, "Invalid argument", "own address"),
        (&here, "Invalid argument", "this host itself"),
    ] {
        let words: Vec<_> = words.split(' ').collect();
        let words = [&["set", TUNNEL_NAME][..], &words].concat();
        let (is_ok, said) = host.try_wg(&words, "")?;
        check(!is_ok && said.contains(reason), || {
            format!("{words:?}: {said}")
        })?;
        host.tunnel.wait_for_line(logged)?;
        host.shows("peers", "")?;
    }
    // The port that it has, and any.
    host.set(&format!("listen-port {PORT} fwmark off"))?;
    host.shows("fwmark", "off")?;
    host.set("listen-port 0")?;
    stop(host.tunnel).map(drop)
}

/// Nothing in it is encrypted, and wg(8) does not take it for WireGuard's.
#[testbed::trial(wg)]
fn a_plain_tunnel_has_no_socket() -> Result<()> {
    let hosts = hosts()?;
    let mut program = Command::new(FASTVPN);
    program.args(["--peer", &UNDERLAY[1].to_string()]);
    let mut command = with_own_run(&program)?;
    command.stdin(Stdio::null()).stdout(Stdio::null());
    let tunnel = Tunnel::spawn(&hosts.a, command)?;
    // Whatever is served is served by then.
    let mut status = Command::new(FASTVPN);
    status.arg("status");
    wait_until("it answers", || {
        let mut status = beside(tunnel.pid(), &status)?;
        let output = hosts.a.run(|| status.output());
        Ok(tried("ask", output)?.status.success())
    })?;
    let socket = socket_of(tunnel.pid(), TUNNEL_NAME)?;
    check(!socket.exists(), || "there is a socket".into())?;
    stop(tunnel).map(drop)
}

/// The process that takes over has the socket from then on.
#[testbed::trial(wg)]
fn a_new_process_serves_wg() -> Result<()> {
    let hosts = hosts()?;
    let keys = Keys::new(false)?;
    let file = keys.file(0, Reach::at(Underlay::V4.endpoint(1)))?;
    let file = file.display().to_string();
    let old = Host::start(&hosts.a, &["--config", &file])?;
    let mut program = Command::new(FASTVPN);
    program.args(["--config", &file, "--takeover"]);
    let mut command = beside(old.tunnel.pid(), &program)?;
    command.stdin(Stdio::null()).stdout(Stdio::null());
    let new = Host {
        namespace: &hosts.a,
        tunnel: Tunnel::spawn(&hosts.a, command)?,
    };
    let ended = old.tunnel.wait()?;
    check(ended.status.success(), || ended.log.clone())?;
    new.wait_for_socket()?;
    new.shows("peers", &base64(&keys.public(1)))?;
    let socket = new.socket()?;
    stop(new.tunnel)?;
    check(!socket.exists(), || "the socket is left behind".into())
}

/// Whatever its own flags say.
#[testbed::trial(wg)]
fn a_new_process_goes_on_with_what_wg_has_set() -> Result<()> {
    let hosts = hosts()?;
    let keys = Keys::new(false)?;
    let all = both(&hosts, &keys)?;
    introduce(&all, &keys, &random_key()?)?;
    let [a, b] = all;
    // Host A becomes somebody else, somewhere else.
    let key = random_key()?;
    let file = keys.write("other.key", &base64(&key))?;
    let (own, peer) = (
        base64(&wireguard::public_key(&key)),
        base64(&keys.public(1)),
    );
    a.set(&format!(
        "private-key {} listen-port 51821 fwmark 7 peer {peer} persistent-keepalive 25",
        file.display(),
    ))?;
    let shared = a.show("preshared-keys")?;
    let shared = shared.split(' ').next_back().unwrap_or_default();
    let shared = keys.write("same.key", shared)?;
    b.set(&format!(
        "peer {own} preshared-key {} allowed-ips {}/32",
        shared.display(),
        TUNNEL[0],
    ))?;
    wait_for(&hosts.a, inside(1))?;
    let shown = a.wg(&["showconf", TUNNEL_NAME])?;
    let private = keys.private_file(0)?.display().to_string();
    let address = format!("{}/16", TUNNEL[0]);
    let mut program = Command::new(FASTVPN);
    program.args([
        "--private-key",
        &private,
        "--address",
        &address,
        "--takeover",
    ]);
    let mut command = beside(a.tunnel.pid(), &program)?;
    command.stdin(Stdio::null()).stdout(Stdio::null());
    let new = Host {
        namespace: &hosts.a,
        tunnel: Tunnel::spawn(&hosts.a, command)?,
    };
    let ended = a.tunnel.wait()?;
    check(ended.status.success(), || ended.log.clone())?;
    new.wait_for_socket()?;
    let now = new.wg(&["showconf", TUNNEL_NAME])?;
    check(now == shown, || format!("was:\n{shown}\nis:\n{now}"))?;
    wait_for(&hosts.a, inside(1))?;
    bulk(&hosts.b, &hosts.a, inside(0), 5)?;
    for log in [stop(new.tunnel)?.log, ended.log, stop(b.tunnel)?.log] {
        check(!log.contains(&base64(&key)), || {
            "a secret is in the log".into()
        })?;
    }
    Ok(())
}
