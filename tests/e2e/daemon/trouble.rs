//! What the log and `fastvpn peers` say when something goes wrong or is changed.

use std::fs::File;
use std::io::Read;
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};

use etherparse::PacketBuilder;
use fastvpn::error::{Error, Result};
use ipnet::IpNet;
use nix::sys::signal::Signal;
use serde_json::Value;
use testbed::{Namespace, Pair, UNDERLAY_NAME};

use crate::operator::{Operator, said};
use crate::support::{
    FASTVPN, PATIENCE, TUNNEL, Tunnel, UNDERLAY, check, fastvpn, hosts, link, stop, stop_all,
    tried, udp, wait_for, wait_until,
};

const PEER: &str = "10.211.55.123:8285";

/// Hosts A and B, with a tunnel whose end at A is an operator's.
fn tunnels(flags: &str) -> Result<(Pair, Operator, [Tunnel; 2])> {
    let hosts = hosts(1500)?;
    let operator = Operator::new()?;
    let socket = operator.socket_text();
    let near = format!("--control {socket} --peer 10.211.55.123 {flags}");
    let ends = [
        fastvpn(&hosts.a, &near)?,
        fastvpn(&hosts.b, "--peer 10.211.55.122")?,
    ];
    wait_for(&hosts.a, TUNNEL[1].into())?;
    Ok((hosts, operator, ends))
}

/// The only peer's entry.
fn only_peer(operator: &Operator) -> Result<Value> {
    Ok(operator.ask("peers")?["peers"][0].clone())
}

fn lines<'a>(log: &'a str, parts: &'a [&'a str]) -> impl Iterator<Item = &'a str> {
    let has_all = |line: &&str| parts.iter().all(|part| line.contains(part));
    log.lines().filter(has_all)
}

fn has_one(log: &str, parts: &[&str]) -> Result<()> {
    check(lines(log, parts).count() == 1, || {
        format!("not one line with {parts:?} in:\n{log}")
    })
}

/// A UDP datagram from one inner address to another.
fn inner(from: Ipv4Addr, to: Ipv4Addr) -> Result<Vec<u8>> {
    let mut packet = Vec::new();
    PacketBuilder::ipv4(from.octets(), to.octets(), 64)
        .udp(4000, 4000)
        .write(&mut packet, b"payload")
        .map_err(|error| Error::new(format!("cannot build a packet: {error}")))?;
    Ok(packet)
}

/// Each of two kinds of forged packets is named once and counted, however many
/// there are.
#[testbed::trial(each_engine)]
fn drops_are_told_of() -> Result<()> {
    const FORGED: u64 = 2000;
    let (hosts, operator, ends) = tunnels("")?;
    let stranger = Ipv4Addr::new(10, 211, 55, 200);
    let index = link(&hosts.b, UNDERLAY_NAME)?.index;
    let net = IpNet::new_assert(stranger.into(), 24);
    hosts.b.netlink()?.add_address(index, net)?;
    let flood = |from: Ipv4Addr, source: Ipv4Addr, reason: &str| -> Result<()> {
        let socket = udp(&hosts.b, from, 0)?;
        let packet = inner(source, TUNNEL[0])?;
        wait_until(reason, || {
            for _ in 0..100 {
                tried("send", socket.send_to(&packet, (UNDERLAY[0], 8285)))?;
            }
            Ok(operator.dropped(reason)? >= FORGED)
        })
    };
    // A stranger, and a peer that sends in the name of host A.
    flood(stranger, TUNNEL[1], "sender-unknown")?;
    flood(UNDERLAY[1], TUNNEL[0], "source-not-allowed")?;
    let forged = operator.dropped("source-not-allowed")?;
    let peer = only_peer(&operator)?;
    check(peer["drops"]["source_not_allowed"] == forged, || {
        peer.to_string()
    })?;
    let table = operator.tell("peers")?;
    check(
        table.contains(&format!("source-not-allowed {forged}")),
        || table.clone(),
    )?;
    let [near, far] = ends;
    for part in ["(sender-unknown)", "(source-not-allowed)"] {
        near.wait_for_line(part)?;
    }
    let log = stop(near)?.log;
    has_one(&log, &["(sender-unknown)", "10.211.55.200", "no peer"])?;
    let parts = ["(source-not-allowed)", PEER, "10.244.55.122", "this host"];
    has_one(&log, &parts)?;
    // However slow the machine, a minute has one line for all the rest.
    for reason in ["sender-unknown", "source-not-allowed"] {
        let about = log.lines().filter(|line| line.contains(reason));
        let warnings = about.filter(|line| line.contains(" WARN ")).count();
        check(warnings <= 3, || log.clone())?;
    }
    stop(far).map(drop)
}

/// The underlay goes down: what cannot be sent is not counted as sent, and the log
/// says so, that there is no route, and that the peer is silent; and that it is
/// back.
#[testbed::trial(each_engine)]
fn a_path_is_lost() -> Result<()> {
    const SENT: u64 = 100;
    let (hosts, operator, ends) = tunnels("")?;
    let [near, far] = ends;
    let index = link(&hosts.a, UNDERLAY_NAME)?.index;
    testbed::ip(&hosts.a, &format!("link set {UNDERLAY_NAME} down"))?;
    let application = udp(&hosts.a, TUNNEL[0], 0)?;
    let send = |socket: &UdpSocket| tried("send", socket.send_to(b"lost", (TUNNEL[1], 9)));
    send(&application)?;
    near.wait_for_line("no route to peer 10.211.55.123:8285")?;
    let failed = |count: u64| {
        wait_until("the failures are counted", || {
            let drops = only_peer(&operator)?["drops"]["send_error"].as_u64();
            Ok(drops.unwrap_or(0) >= count)
        })
    };
    failed(1)?;
    let before = only_peer(&operator)?;
    for _ in 0..SENT {
        send(&application)?;
    }
    failed(1 + SENT)?;
    let after = only_peer(&operator)?;
    for key in ["packets_sent", "bytes_sent"] {
        check(after[key] == before[key], || format!("{before}, {after}"))?;
    }
    near.wait_for_line("(send-error)")?;
    wait_until("the log tells of the silence", || {
        send(&application)?;
        Ok(near.has_said("does not answer"))
    })?;
    hosts.a.netlink()?.set_up(index)?;
    near.wait_for_line("a route to peer 10.211.55.123:8285 again")?;
    wait_for(&hosts.a, TUNNEL[1].into())?;
    near.wait_for_line("10.211.55.123:8285 answers again")?;
    let status = operator.ask("status")?;
    let peer = only_peer(&operator)?;
    check(
        status["drops"]["send_error"] == peer["drops"]["send_error"],
        || format!("{status}, {peer}"),
    )?;
    let log = stop(near)?.log;
    has_one(&log, &["(send-error)", PEER, "network is unreachable"])?;
    has_one(&log, &["WARN", PEER, "does not answer", "last seen"])?;
    stop(far).map(drop)
}

/// Version, ports, file, and that nothing is encrypted.
#[testbed::trial]
fn the_start_is_told_of() -> Result<()> {
    let hosts = hosts(1500)?;
    let operator = Operator::new()?;
    let file = operator.write("fastvpn.toml", "queues = 2\n")?;
    let flags = format!("--peer 10.211.55.123 --config {file}");
    let socket = operator.socket_text();
    let near = fastvpn(&hosts.a, &format!("{flags} --control {socket}"))?;
    operator.wait()?;
    let (version, pid) = (env!("CARGO_PKG_VERSION"), near.pid().to_string());
    let log = stop(near)?.log;
    has_one(&log, &["INFO", &format!("fastvpn {version}"), &pid, &file])?;
    has_one(&log, &["INFO", "UDP", "0.0.0.0:8285", "8285, 6"])?;
    has_one(&log, &["WARN", "neither encrypted nor authenticated"])
}

/// Who changes what, by whatever way.
#[testbed::trial]
fn changes_are_told_of() -> Result<()> {
    let hosts = hosts(1500)?;
    let operator = Operator::new()?;
    let base = "[[peer]]\nendpoint = \"10.211.55.123\"\nprefixes = [\"10.1.0.0/16\"]\n";
    let text = |settings: &str, peers: &str| {
        format!("address = [\"10.244.1.1/24\"]\n{settings}\n{base}{peers}")
    };
    let file = operator.write("fastvpn.toml", &text("", ""))?;
    let socket = operator.socket_text();
    let mut near = fastvpn(&hosts.a, &format!("--control {socket} --config {file}"))?;
    operator.wait()?;
    for words in [
        "peer add 10.211.55.200=10.2.0.0/16,10.3.0.0/16",
        "route add 10.4.0.0/16 --peer 10.211.55.200",
        "route add 10.4.0.0/16 --peer 10.211.55.123 --replace",
        "route del 10.2.0.0/16",
        "peer del 10.211.55.200",
    ] {
        operator.tell(words)?;
    }
    let more = "[[peer]]\nendpoint = \"10.211.55.201\"\nprefixes = [\"10.5.0.0/16\"]\n";
    operator.write("fastvpn.toml", &text("hop = true", more))?;
    operator.tell("reload")?;
    operator.write("fastvpn.toml", "nonsense\n")?;
    near.child().signal(Signal::SIGHUP);
    near.wait_for_line("not reloaded")?;
    operator.tell("stop")?;
    let log = near.wait()?.log;
    let by = ", by process ";
    let (one, other) = ("10.211.55.200:8285", PEER);
    for parts in [
        &[
            "peer 10.211.55.200:8285 added",
            "10.2.0.0/16 given to 10.211.55.200:8285",
            "10.3.0.0/16 given to",
            by,
        ][..],
        &[&format!("INFO 10.4.0.0/16 given to {one}{by}")],
        &[&format!("10.4.0.0/16 moved from {one} to {other}{by}")],
        &[&format!("10.2.0.0/16 taken from {one}{by}")],
        &[&format!("peer {one} removed"), "10.3.0.0/16 taken from", by],
        &[
            "reloaded: peer 10.211.55.201:8285 added",
            "10.5.0.0/16 given to 10.211.55.201:8285",
            "changed: hop",
            by,
        ],
        &["ERROR not reloaded by SIGHUP", "fastvpn.toml:1:"],
        &["INFO stopped by process ", " of user "],
    ] {
        has_one(&log, parts)?;
    }
    Ok(())
}

/// Lines have a time, unless journald, which has one of its own, reads them: then they have a
/// priority.
#[testbed::trial]
fn the_journal_has_its_own_time_and_priorities() -> Result<()> {
    let hosts = hosts(1500)?;
    let text = journal(&hosts.a, true, "")?;
    let parts = [
        "<6>fastvpn 0",
        "<4>plain mode: packets are neither encrypted",
        "<6>total: sent ",
    ];
    for part in parts {
        check(text.lines().any(|line| line.starts_with(part)), || {
            format!("no {part:?} in:\n{text}")
        })?;
    }
    let json = journal(&hosts.a, true, "--log-format json")?;
    for line in json.lines() {
        let (priority, object) = line.split_at(3);
        let object: Value = serde_json::from_str(object)
            .map_err(|error| Error::new(format!("{error} in {line:?}")))?;
        let expected = match object["level"].as_str() {
            Some("WARN") => "<4>",
            _ => "<6>",
        };
        check(priority == expected, || line.into())?;
    }
    check(json.contains("\"mtu_bytes\":1472"), || json.clone())?;
    let other = journal(&hosts.a, false, "")?;
    let year = |line: &str| line.get(..4).and_then(|text| text.parse::<u16>().ok());
    let are_timed = other.lines().all(|line| year(line).is_some());
    check(are_timed && other.lines().count() > 3, || other.clone())?;
    // The last words have one, too.
    let error = journal(&hosts.a, true, "--address 10.211.55.9/24")?;
    let last = error.lines().last().unwrap_or_default();
    check(last.starts_with("<3>fastvpn: the address "), || {
        error.clone()
    })
}

/// What a tunnel writes to a stream socket, as journald's is, from its start to its end, or until
/// it fails. `is_named`: whether the environment says that the socket is journald's.
fn journal(namespace: &Namespace, is_named: bool, flags: &str) -> Result<String> {
    let operator = Operator::new()?;
    let (stream, mut journald) = tried("make a socket", UnixStream::pair())?;
    let stream = File::from(OwnedFd::from(stream));
    let metadata = tried("look at a socket", stream.metadata())?;
    let inode = metadata.ino() + u64::from(!is_named);
    let mut command = Command::new(FASTVPN);
    command
        .args(["--peer", "10.211.55.123", "--control"])
        .arg(operator.socket())
        .args(flags.split_whitespace())
        .env("JOURNAL_STREAM", format!("{}:{inode}", metadata.dev()))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(stream);
    let mut child = namespace.spawn(command)?;
    wait_until("it runs or ends", || {
        Ok(operator.socket().exists() || child.try_wait()?.is_some())
    })?;
    child.terminate(PATIENCE)?;
    // Commands hold what they give to their children.
    let mut text = String::new();
    tried("read a socket", journald.read_to_string(&mut text))?;
    Ok(text)
}

/// No moment in which something has come from a peer that was never heard.
#[testbed::trial]
fn who_is_heard_was_not_never_heard() -> Result<()> {
    let hosts = hosts(1500)?;
    let operator = Operator::new()?;
    let socket = operator.socket_text();
    let near = fastvpn(
        &hosts.a,
        &format!("--peer 10.211.55.123 --control {socket}"),
    )?;
    operator.wait()?;
    let application = udp(&hosts.b, UNDERLAY[1], 0)?;
    let packet = inner(TUNNEL[1], TUNNEL[0])?;
    wait_until("the peer is heard", || {
        tried("send", application.send_to(&packet, (UNDERLAY[0], 8285)))?;
        let answer = operator.request("{\"command\":\"peers\"}")?;
        let peer = &answer["peers"][0];
        let has_come = peer["packets_received"].as_u64() > Some(0);
        check(!has_come || peer["last_seen_seconds"].is_u64(), || {
            peer.to_string()
        })?;
        Ok(has_come)
    })?;
    stop(near).map(drop)
}

/// Without a file, a reload does not pretend to have read one.
#[testbed::trial]
fn nothing_to_reload() -> Result<()> {
    let (_hosts, operator, [mut near, far]) = tunnels("")?;
    operator.refuses("reload", &["no configuration file", "--config"])?;
    near.child().signal(Signal::SIGHUP);
    near.wait_for_line("not reloaded by SIGHUP, nothing has changed: there is no configuration")?;
    stop_all([near, far]).map(drop)
}

/// Who takes over says from whom, and the other one to whom.
#[testbed::trial]
fn a_takeover_is_told_of() -> Result<()> {
    let (hosts, operator, [old, far]) = tunnels("")?;
    let socket = operator.socket_text();
    let flags = format!("--control {socket} --peer 10.211.55.123 --takeover");
    let new = fastvpn(&hosts.a, &flags)?;
    let (old_pid, new_pid) = (old.pid(), new.pid());
    let told = old.wait()?.log;
    let version = env!("CARGO_PKG_VERSION");
    new.wait_for_line(&format!(
        "took over from process {old_pid}, fastvpn {version}"
    ))?;
    has_one(&told, &[&format!("process {new_pid} of user"), "take over"])?;
    stop_all([new, far]).map(drop)
}

/// With several tunnels, nobody has to know their names.
#[testbed::trial(needs_root)]
fn status_of_several() -> Result<()> {
    let hosts = hosts(1500)?;
    let status = |json: bool, expected: &[&str]| -> Result<String> {
        let mut command = Command::new(FASTVPN);
        command.arg("status").args(json.then_some("--json"));
        let said = said(&hosts.a, command)?;
        let has_all = expected.iter().all(|part| said.stdout.contains(part));
        check(said.status.success() && has_all, || format!("{said:?}"))?;
        Ok(said.stdout)
    };
    let start = |name: &str, number: u8| {
        let flags = format!(
            "--tun {name} --listen 0.0.0.0:900{number} --address 10.9.{number}.1/24 \
             --peer 10.211.55.123:9000=10.8.{number}.0/24"
        );
        fastvpn(&hosts.a, &flags)
    };
    let one = start("tunnel1", 1)?;
    answers_at(&hosts.a, "tunnel1")?;
    // The only one needs no name, either.
    status(false, &["tunnel1", "WORKER"])?;
    let other = start("tunnel2", 2)?;
    answers_at(&hosts.a, "tunnel2")?;
    let table = status(false, &["tunnel1", "tunnel2", "0.0.0.0:9002", "--tun"])?;
    check(!table.contains("WORKER"), || table.clone())?;
    let text = status(true, &["tunnel1", "tunnel2"])?;
    let all: Vec<Value> = text.lines().flat_map(serde_json::from_str).collect();
    let are_whole = all.iter().all(|one| one["ok"] == true);
    check(all.len() == 2 && are_whole, || text.clone())?;
    stop_all([one, other]).map(drop)
}

fn answers_at(host: &Namespace, name: &str) -> Result<()> {
    wait_until("the tunnel answers", || {
        let mut command = Command::new(FASTVPN);
        command.args(["status", "--tun", name]);
        Ok(said(host, command)?.status.success())
    })
}
