//! `--keepalive`: peers that are there are told from those that are not without any traffic, and
//! plain peers that know nothing of it are none the worse.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use fastvpn::error::Result;
use fastvpn::packet::probe::{Kind, PROBE_BYTES_MIN, Probe};
use nix::sys::signal::Signal;
use serde_json::Value;
use testbed::{Namespace, Pair, spawn_thread};

use super::plain_peer::{PORT, PlainPeer};
use crate::operator::Operator;
use crate::packets::{BUFFER_BYTES, checksum, plain_tun};
use crate::support::{
    TUNNEL, Tunnel, UNDERLAY, answers, check, fail, fastvpn, hosts, link, snmp, stop, stop_all,
    tried, udp, wait_for, wait_until,
};
use crate::tools::nft;

/// Addresses of a plain peer at host B.
const NETS: [&str; 1] = ["10.244.55.123/16"];

fn peer(operator: &Operator) -> Result<Value> {
    Ok(operator.ask("peers")?["peers"][0].clone())
}

/// Returns the peer as it was when it was in that state.
fn wait_for_state(operator: &Operator, state: &str) -> Result<Value> {
    let mut last = Value::Null;
    wait_until(&format!("the peer is {state}"), || {
        last = peer(operator)?;
        Ok(last["state"] == state)
    })?;
    Ok(last)
}

#[testbed::trial(each_engine)]
fn alive_silent_and_unreachable_are_told_apart() -> Result<()> {
    let hosts = hosts(1500)?;
    let operator = Operator::new()?;
    let file = |keepalive: &str| {
        let peer = format!("[[peer]]\nendpoint = \"{}\"\n", UNDERLAY[1]);
        operator.write("fastvpn.toml", &format!("{keepalive}\n{peer}"))
    };
    let flags = format!(
        "--config {} --control {}",
        file("keepalive = 1")?,
        operator.socket_text()
    );
    let near = fastvpn(&hosts.a, &flags)?;
    operator.wait()?;
    // Host B is there, and says that nothing listens.
    let refused = wait_for_state(&operator, "unreachable")?;
    check(
        refused["state_reason"] == "connection refused" && refused["last_seen_seconds"].is_null(),
        || refused.to_string(),
    )?;
    near.wait_for_line("cannot be reached: its host or a router says connection refused")?;
    let mut far = fastvpn(&hosts.b, &format!("--keepalive 1 --peer {}", UNDERLAY[0]))?;
    let alive = wait_for_state(&operator, "alive")?;
    check(
        alive["last_seen_seconds"].as_u64() <= Some(3) && alive["state_reason"].is_null(),
        || alive.to_string(),
    )?;
    near.wait_for_line("answers again")?;
    // It holds its port, and sends nothing.
    far.child().signal(Signal::SIGSTOP);
    let silent = wait_for_state(&operator, "silent")?;
    check(silent["last_seen_seconds"].as_u64() >= Some(3), || {
        silent.to_string()
    })?;
    near.wait_for_line("is silent: it sends a keepalive every 1 s")?;
    check(operator.tell("peers")?.contains("  silent  "), || {
        "not in the table".into()
    })?;
    far.child().signal(Signal::SIGCONT);
    wait_for_state(&operator, "alive")?;
    // Its own keepalives are enough.
    file("")?;
    let said = operator.tell("reload")?;
    check(said.contains("changed: keepalive"), || said.clone())?;
    let seen = || Ok(peer(&operator)?["last_seen_seconds"] == 0);
    wait_until("it is seen", seen)?;
    check(operator.counter("keepalives_received")? > 0, || {
        "none is counted".into()
    })?;
    wait_for_state(&operator, "alive")?;
    // No packet of a tunnel was needed, and none was dropped.
    for reason in ["source-not-allowed", "short", "sender-unknown"] {
        check(operator.dropped(reason)? == 0, || reason.into())?;
    }
    stop_all([near, far]).map(drop)
}

/// The end that sends sees the other as silent, and is seen.
#[testbed::trial]
fn keepalives_of_one_end_say_that_it_is_there() -> Result<()> {
    let hosts = hosts(1500)?;
    let operators = [Operator::new()?, Operator::new()?];
    let mut ends = Vec::new();
    for (host, keepalive) in [(0, "--keepalive 1"), (1, "")] {
        let namespace = [&hosts.a, &hosts.b][host];
        let socket = operators[host].socket_text();
        let peer = UNDERLAY[1 - host];
        let flags = format!("{keepalive} --control {socket} --peer {peer}");
        ends.push(fastvpn(namespace, &flags)?);
        operators[host].wait()?;
    }
    wait_for_state(&operators[1], "alive")?;
    wait_for_state(&operators[0], "silent")?;
    // Traffic says that it is there.
    wait_for(&hosts.a, TUNNEL[1].into())?;
    wait_for_state(&operators[0], "alive")?;
    ends.into_iter().try_for_each(|end| stop(end).map(drop))
}

/// Starts fastvpn at host A with keepalives.
fn with_keepalives(hosts: &Pair) -> Result<(Operator, Tunnel)> {
    let operator = Operator::new()?;
    let socket = operator.socket_text();
    let flags = format!("--keepalive 1 --control {socket} --peer {}", UNDERLAY[1]);
    let tunnel = fastvpn(&hosts.a, &flags)?;
    operator.wait()?;
    Ok((operator, tunnel))
}

/// The teaching VPN writes all that it receives to its TUN device.
#[testbed::trial(each_engine)]
fn a_plain_peer_survives_keepalives() -> Result<()> {
    let hosts = hosts(1500)?;
    let nets: Vec<_> = NETS.iter().filter_map(|net| net.parse().ok()).collect();
    let everything = "0.0.0.0/0".parse().into_iter();
    let far = SocketAddr::from((UNDERLAY[0], PORT));
    let table = everything.map(|net| (net, far)).collect();
    let plain = PlainPeer::start_with(&hosts.b, UNDERLAY[1], &nets, table)?;
    let (operator, tunnel) = with_keepalives(&hosts)?;
    wait_for(&hosts.a, TUNNEL[1].into())?;
    let written = || Ok(link(&hosts.b, "plain0")?.stats.rx_packets);
    let replies = || snmp(&hosts.b, "Icmp", "OutMsgs");
    let (before, replies_before): (u64, u64) = (written()?, replies()?);
    wait_until("keepalives come", || Ok(written()? >= before + 3))?;
    // Its kernel drops them without an answer.
    check(replies()? == replies_before, || "they are answered".into())?;
    wait_for(&hosts.b, TUNNEL[0].into())?;
    for reason in ["source-not-allowed", "short", "version"] {
        check(operator.dropped(reason)? == 0, || reason.into())?;
    }
    plain.stop()?;
    stop(tunnel).map(drop)
}

/// Host B's firewall admits only what it has sent for, and soon forgets.
#[testbed::trial(each_engine, long)]
fn keepalives_keep_a_firewall_open() -> Result<()> {
    let hosts = hosts(1500)?;
    nft(
        &hosts.b,
        "table inet filter { chain in { type filter hook input priority 0; policy drop; \
         ct state established accept; iifname fastvpn0 accept; }; }",
    )?;
    for timeout in ["udp_timeout", "udp_timeout_stream"] {
        let path = format!("net/netfilter/nf_conntrack_{timeout}");
        hosts.b.sysctl(&path, "3")?;
    }
    let operator = Operator::new()?;
    let socket = operator.socket_text();
    let flags = format!("--queues 1 --control {socket} --peer {}", UNDERLAY[1]);
    let near = fastvpn(&hosts.a, &flags)?;
    operator.wait()?;
    let flags = format!("--queues 1 --keepalive 1 --peer {}", UNDERLAY[0]);
    let far = fastvpn(&hosts.b, &flags)?;
    let count = || operator.counter("keepalives_received");
    wait_until("the firewall would have forgotten", || Ok(count()? > 6))?;
    // The first packet that this end sends gets through.
    answers(&hosts.a, TUNNEL[1].into(), 56)?;
    stop_all([near, far]).map(drop)
}

/// What a peer like flannel's udp backend has received.
#[derive(Default)]
struct Received {
    /// Datagrams that are shorter than an IP header: an error there.
    short: AtomicU64,
    /// Packets whose time to live ends there, which it drops.
    expired: AtomicU64,
    /// Packets that it has passed on to its kernel.
    passed: AtomicU64,
    stop: AtomicBool,
}

/// Receives as flannel's udp backend: a hop, without an answer to what has expired.
fn flannel(namespace: &Namespace) -> Result<Arc<Received>> {
    let nets: Vec<_> = NETS.iter().filter_map(|net| net.parse().ok()).collect();
    let tun = plain_tun(namespace, "flannel0", &nets, 1472)?;
    let socket: UdpSocket = udp(namespace, UNDERLAY[1], PORT)?;
    let wait = Some(Duration::from_millis(100));
    tried("set a time limit", socket.set_read_timeout(wait))?;
    let received = Arc::new(Received::default());
    let counts = Arc::clone(&received);
    spawn_thread(namespace, "flannel", move || {
        let mut buffer = vec![0; BUFFER_BYTES];
        while !counts.stop.load(Ordering::Relaxed) {
            // And what its kernel sends goes the other way.
            if let Ok(bytes) = tun.recv(&mut buffer) {
                let _ = socket.send_to(&buffer[..bytes], (UNDERLAY[0], PORT));
            }
            let Ok(bytes) = socket.recv(&mut buffer) else {
                continue;
            };
            let packet = &mut buffer[..bytes];
            let count = if bytes < 20 {
                &counts.short
            } else if packet[8] <= 1 {
                &counts.expired
            } else {
                packet[8] -= 1;
                packet[10..12].fill(0);
                let sum = checksum(&packet[..20]);
                packet[10..12].copy_from_slice(&sum);
                let _ = tun.send(packet);
                &counts.passed
            };
            count.fetch_add(1, Ordering::Relaxed);
        }
    })?;
    Ok(received)
}

#[testbed::trial(each_engine)]
fn flannels_udp_backend_survives_keepalives() -> Result<()> {
    let hosts = hosts(1500)?;
    let received = flannel(&hosts.b)?;
    let (_operator, tunnel) = with_keepalives(&hosts)?;
    let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    wait_until("keepalives come", || Ok(count(&received.expired) >= 3))?;
    wait_for(&hosts.a, IpAddr::from(TUNNEL[1]))?;
    let was_passed = count(&received.passed) > 0 && count(&received.short) == 0;
    received.stop.store(true, Ordering::Relaxed);
    if !was_passed {
        return fail("it received datagrams that are no packets");
    }
    stop(tunnel).map(drop)
}

/// Their senders are nobody's peers: they cost a look-up, and get no answer.
#[testbed::trial(each_engine)]
fn a_strangers_keepalives_get_no_answer() -> Result<()> {
    let hosts = hosts(1500)?;
    let operator = Operator::new()?;
    let flags = format!(
        "--keepalive 60 --control {} --peer 10.211.55.9",
        operator.socket_text()
    );
    let tunnel = fastvpn(&hosts.a, &flags)?;
    operator.wait()?;
    let stranger = udp(&hosts.b, UNDERLAY[1], 0)?;
    let to: (Ipv4Addr, u16) = (UNDERLAY[0], PORT);
    let wait = Some(Duration::from_millis(100));
    tried("set a time limit", stranger.set_read_timeout(wait))?;
    let kinds = [
        Kind::Keepalive { seconds: 1 },
        Kind::Request { port: PORT },
        Kind::Size,
    ];
    for nonce in 0..30 {
        for kind in kinds {
            let packet = Probe { kind, nonce }.to_packet(PROBE_BYTES_MIN);
            tried("send a probe", stranger.send_to(&packet, to))?;
        }
    }
    let unknown = || operator.dropped("sender-unknown");
    wait_until("they are counted", || Ok(unknown()? == 90))?;
    for counter in ["keepalives_received", "probes_received"] {
        check(operator.counter(counter)? == 0, || counter.into())?;
    }
    check(stranger.recv(&mut [0; 100]).is_err(), || "an answer".into())?;
    stop(tunnel).map(drop)
}
