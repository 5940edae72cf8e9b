//! The ports that tunnels send from: behind firewalls and NATs, and between
//! hosts with nothing in between.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::process::Command;
use std::time::{Duration, Instant};

use fastvpn::error::{Error, Result};
use fastvpn::packet::probe::{Kind, Probe};
use ipnet::IpNet;
use serde_json::Value;
use testbed::{Namespace, Pair};

use crate::dataplane::traffic::transfer;
use crate::operator::{Operator, said};
use crate::packets::{TUNNEL_NAME, udp_packet, wait_until_up};
use crate::relay::{FACES, PORT, Ports, REWRITTEN, Relay};
use crate::support::{
    Ended, FASTVPN, PATIENCE, TUNNEL, Tunnel, UNDERLAY, check, fail, fastvpn, hosts, link, stop,
    tried, udp, wait_for, wait_until,
};
use crate::tools::nft;

/// Workers of each tunnel.
const QUEUES: u64 = 4;

/// Two tunnels with a relay between them.
struct Ends {
    relay: Relay,
    operators: [Operator; 2],
    tunnels: [Tunnel; 2],
}

impl Ends {
    fn start(relay: Relay) -> Result<Self> {
        let operators = [Operator::new()?, Operator::new()?];
        let start = |host: usize| {
            let namespace = [&relay.a, &relay.b][host];
            let socket = operators[host].socket_text();
            let flags = format!(
                "--queues {QUEUES} --control {socket} --peer {} --address {}/16",
                FACES[host], TUNNEL[host]
            );
            fastvpn(namespace, &flags)
        };
        let tunnels = [start(0)?, start(1)?];
        // Host B speaks first: nobody gets in before.
        operators.iter().try_for_each(Operator::wait)?;
        wait_for(&relay.b, TUNNEL[0].into())?;
        wait_for(&relay.a, TUNNEL[1].into())?;
        Ok(Self {
            relay,
            operators,
            tunnels,
        })
    }

    /// Twelve TCP connections each way, as many as make sure that all workers
    /// have some.
    fn connect(&self) -> Result<()> {
        let Relay { a, b, .. } = &self.relay;
        transfer(a, b, TUNNEL[1].into(), 12, 1_200_000)?;
        transfer(b, a, TUNNEL[0].into(), 12, 1_200_000)
    }

    fn stop(self) -> Result<[Ended; 2]> {
        let [a, b] = self.tunnels;
        let ended = [stop(a)?, stop(b)?];
        self.relay.stop()?;
        Ok(ended)
    }
}

/// The only peer of a tunnel.
fn peer(operator: &Operator) -> Result<Value> {
    let answer = operator.ask("peers")?;
    match answer["peers"].as_array().map(Vec::as_slice) {
        Some([peer]) => Ok(peer.clone()),
        _ => fail(format!("not one peer in {answer}")),
    }
}

/// How many of a tunnel's own ports are known to reach its peer.
fn proven(operator: &Operator) -> Result<u64> {
    let peer = peer(operator)?;
    let count = peer["own_ports_proven"].as_u64();
    count.ok_or_else(|| Error::new(format!("no count in {peer}")))
}

fn wait_for_proofs(operator: &Operator, count: u64) -> Result<()> {
    wait_until(&format!("{count} own ports are proven"), || {
        Ok(proven(operator)? == count)
    })
}

/// How many workers have counted something.
fn workers_that_count(operator: &Operator, counters: [&str; 2]) -> Result<usize> {
    let answer = operator.ask("status")?;
    let workers = answer["workers"].as_array().cloned().unwrap_or_default();
    let has = |worker: &&Value| {
        let mut counts = counters.iter().filter_map(|name| worker[name].as_u64());
        counts.any(|count| count > 0)
    };
    Ok(workers.iter().filter(has).count())
}

#[testbed::trial(each_engine)]
fn a_firewall_that_admits_answers_alone() -> Result<()> {
    let ends = Ends::start(Relay::start(Ports::Kept, true)?)?;
    ends.connect()?;
    // Out of the firewall every port leads, into it one.
    wait_for_proofs(&ends.operators[1], QUEUES - 1)?;
    ends.connect()?;
    check(proven(&ends.operators[0])? == 0, || {
        "a port is proven that the firewall blocks".into()
    })?;
    let from_a = ends.relay.take_ports(0);
    check(from_a == BTreeSet::from([PORT]), || {
        format!("sent from {from_a:?}")
    })?;
    ends.stop().map(drop)
}

#[testbed::trial(each_engine)]
fn a_nat_that_rewrites_ports() -> Result<()> {
    let ends = Ends::start(Relay::start(Ports::Rewritten, true)?)?;
    ends.connect()?;
    let seen = peer(&ends.operators[0])?;
    let port = seen["seen_port"].as_u64().unwrap_or(0);
    check(port >= REWRITTEN.into(), || seen.to_string())?;
    let endpoint = format!("{}:{port}", FACES[0]);
    check(seen["endpoint"] == *endpoint, || seen.to_string())?;
    let table = ends.operators[0].tell("peers")?;
    check(table.contains(&endpoint), || table)?;
    // Host B's own ports do arrive, but are not what they were.
    let from_b = ends.relay.take_ports(1);
    check(from_b == BTreeSet::from([PORT]), || {
        format!("sent from {from_b:?}")
    })?;
    for operator in &ends.operators {
        check(proven(operator)? == 0, || "proven through a NAT".into())?;
    }
    let [a, _] = ends.stop()?;
    let line = format!(
        "peer {}:{PORT} sends from port {port}, which its address was not configured with; \
         sending there",
        FACES[0]
    );
    check(a.log.matches(&line).count() == 1, || a.log.clone())
}

#[testbed::trial(each_engine)]
fn own_ports_are_proven_and_used() -> Result<()> {
    let ends = Ends::start(Relay::start(Ports::Kept, false)?)?;
    ends.operators
        .iter()
        .try_for_each(Operator::wait_for_own_ports)?;
    for host in [0, 1] {
        ends.relay.take_ports(host);
    }
    ends.connect()?;
    for (host, operator) in ends.operators.iter().enumerate() {
        let ports = ends.relay.take_ports(host);
        let own = operator.ask("status")?["own_ports"].clone();
        let own: BTreeSet<u16> = serde_json::from_value(own.clone())
            .map_err(|error| Error::new(format!("{error} in {own}")))?;
        let used = ports.intersection(&own).count();
        check(used >= 2, || format!("{ports:?} used of {own:?}"))?;
        let receivers = workers_that_count(operator, ["packets-received", "packets_received"])?;
        check(receivers >= 2, || format!("{receivers} workers receive"))?;
        let text = operator.tell("status")?;
        let names_all = own.iter().all(|port| text.contains(&port.to_string()));
        check(names_all, || text)?;
        let text = operator.tell("peers")?;
        check(text.contains("own ports"), || text)?;
    }
    ends.stop().map(drop)
}

#[testbed::trial]
fn a_firewall_that_comes_later() -> Result<()> {
    let ends = Ends::start(Relay::start(Ports::Kept, false)?)?;
    ends.operators
        .iter()
        .try_for_each(Operator::wait_for_own_ports)?;
    ends.relay.close();
    let socket = udp(&ends.relay.a, TUNNEL[0], 0)?;
    let since = Instant::now();
    wait_until("the blocked ports are found out", || {
        // Something has to be sent for a port to matter.
        tried("send", socket.send_to(b"on", (TUNNEL[1], 9)))?;
        let is_over = proven(&ends.operators[0])? == 0;
        check(is_over || since.elapsed() < PATIENCE, || "never".into())?;
        Ok(is_over)
    })?;
    ends.relay.take_ports(0);
    ends.connect()?;
    let from_a = ends.relay.take_ports(0);
    check(from_a == BTreeSet::from([PORT]), || {
        format!("sent from {from_a:?}")
    })?;
    ends.stop().map(drop)
}

/// As [`firewall`], by the kernel's own.
#[testbed::trial(each_engine, long)]
fn a_firewall_of_the_kernel() -> Result<()> {
    let hosts = hosts(1500)?;
    nft(
        &hosts.b,
        "table inet filter { chain in { type filter hook input priority 0; policy drop; \
         ct state established accept; iifname fastvpn0 accept; }; }",
    )?;
    let start = |namespace: &Namespace, peer: Ipv4Addr| {
        fastvpn(namespace, &format!("--queues {QUEUES} --peer {peer}"))
    };
    let tunnels = [start(&hosts.a, UNDERLAY[1])?, start(&hosts.b, UNDERLAY[0])?];
    wait_for(&hosts.b, TUNNEL[0].into())?;
    transfer(&hosts.a, &hosts.b, TUNNEL[1].into(), 12, 1_200_000)?;
    transfer(&hosts.b, &hosts.a, TUNNEL[0].into(), 12, 1_200_000)?;
    tunnels.into_iter().try_for_each(|end| stop(end).map(drop))
}

/// As [`nat`], by the kernel's own: host B's container has the tunnel.
#[testbed::trial(each_engine, long)]
fn a_nat_of_the_kernel() -> Result<()> {
    let hosts = hosts(1500)?;
    let net = |text: &str| text.parse::<IpNet>().map_err(|_| Error::new("no prefix"));
    let inside = (net("10.88.0.1/24")?, net("10.88.0.2/24")?);
    let container = testbed::container(&hosts.b, "inside0", &[inside], 1500)?;
    nft(
        &hosts.b,
        "table ip nat { chain after { type nat hook postrouting priority 100; \
         oifname underlay0 meta l4proto udp masquerade to :20000-20100; }; }",
    )?;
    let operator = Operator::new()?;
    let start = |namespace: &Namespace, host: usize, more: &str| {
        let flags = format!(
            "--queues {QUEUES} --peer {} --address {}/16 {more}",
            UNDERLAY[1 - host],
            TUNNEL[host]
        );
        fastvpn(namespace, &flags)
    };
    let control = format!("--control {}", operator.socket_text());
    let tunnels = [start(&hosts.a, 0, &control)?, start(&container, 1, "")?];
    wait_for(&container, TUNNEL[0].into())?;
    transfer(&hosts.a, &container, TUNNEL[1].into(), 12, 1_200_000)?;
    transfer(&container, &hosts.a, TUNNEL[0].into(), 12, 1_200_000)?;
    let seen = peer(&operator)?;
    let port = seen["seen_port"].as_u64().unwrap_or(0);
    check((20_000..=20_100).contains(&port), || seen.to_string())?;
    tunnels.into_iter().try_for_each(|end| stop(end).map(drop))
}

/// A tunnel on host A, and a socket in the place of its peer.
struct Scripted {
    hosts: Pair,
    operator: Operator,
    tunnel: Tunnel,
    peer: UdpSocket,
}

impl Scripted {
    fn start() -> Result<Self> {
        let (hosts, operator) = (hosts(1500)?, Operator::new()?);
        let peer = udp(&hosts.b, UNDERLAY[1], PORT)?;
        let flags = format!(
            "--queues {QUEUES} --control {} --peer {}",
            operator.socket_text(),
            UNDERLAY[1]
        );
        let tunnel = fastvpn(&hosts.a, &flags)?;
        operator.wait()?;
        wait_until_up(&hosts.a, TUNNEL_NAME)?;
        Ok(Self {
            hosts,
            operator,
            tunnel,
            peer,
        })
    }

    fn to_tunnel(&self, packet: &[u8]) -> Result<()> {
        tried("send", self.peer.send_to(packet, (UNDERLAY[0], PORT))).map(drop)
    }

    /// Lets the tunnel hear its peer.
    fn speak(&self) -> Result<()> {
        let [own, peer] = TUNNEL.map(IpAddr::from);
        self.to_tunnel(&udp_packet(peer, own, [4000, 9], b"here"))
    }

    /// The next request, and the port that it came from.
    fn next_request(&self) -> Result<(u16, Probe)> {
        let mut buffer = [0; 2048];
        loop {
            let (length, from) = tried("receive", self.peer.recv_from(&mut buffer))?;
            if let Some(probe) = Probe::from_packet(&buffer[..length]) {
                check(probe.kind == Kind::Request { port: from.port() }, || {
                    format!("{probe:?} from {from}")
                })?;
                return Ok((from.port(), probe));
            }
        }
    }
}

#[testbed::trial]
fn who_answers_no_probes_gets_few() -> Result<()> {
    const FLOWS: usize = 64;
    const ROUNDS: usize = 200;
    let since = Instant::now();
    let scripted = Scripted::start()?;
    let sockets: Vec<_> = (0..FLOWS)
        .map(|_| udp(&scripted.hosts.a, TUNNEL[0], 0))
        .collect::<Result<_>>()?;
    let (mut data, mut probes) = (0, 0);
    let mut ports = BTreeSet::new();
    let mut buffer = [0; 2048];
    tried("set", scripted.peer.set_nonblocking(true))?;
    for _ in 0..ROUNDS {
        scripted.speak()?;
        for socket in &sockets {
            tried("send", socket.send_to(b"data", (TUNNEL[1], 9)))?;
        }
        std::thread::sleep(Duration::from_millis(15));
        while let Ok((length, from)) = scripted.peer.recv_from(&mut buffer) {
            match Probe::from_packet(&buffer[..length]) {
                Some(_) => probes += 1,
                None => {
                    data += 1;
                    ports.insert(from.port());
                }
            }
        }
    }
    check(data >= FLOWS * ROUNDS / 2, || format!("{data} datagrams"))?;
    check(ports == BTreeSet::from([PORT]), || {
        format!("sent from {ports:?}")
    })?;
    let senders = workers_that_count(&scripted.operator, ["packets-sent", "packets_sent"])?;
    check(senders as u64 == QUEUES, || {
        format!("{senders} workers send")
    })?;
    // At 0, 1, 3, 7 seconds and so on: half as often each time.
    let seconds = since.elapsed().as_secs() + 2;
    let most = (QUEUES - 1) * (2 + u64::from(seconds.ilog2()));
    check(probes > 0 && probes <= most, || {
        format!("{probes} probes in {seconds} s, of {most} at most")
    })?;
    let text = scripted.operator.tell("peers")?;
    check(text.contains("listen port"), || text)?;
    stop(scripted.tunnel).map(drop)
}

#[testbed::trial]
fn forged_probes_prove_nothing() -> Result<()> {
    let scripted = Scripted::start()?;
    let Scripted {
        hosts, operator, ..
    } = &scripted;
    let stranger = stranger(&hosts.b, Ipv4Addr::new(10, 211, 55, 200))?;
    let tunnel: SocketAddr = (UNDERLAY[0], PORT).into();

    // A peer's request is answered, to where the peer receives.
    let asker = udp(&hosts.b, UNDERLAY[1], 0)?;
    let port = tried("read an address", asker.local_addr())?.port();
    let request = |nonce| Probe {
        kind: Kind::Request { port },
        nonce,
    };
    // A stranger's is not.
    let is_counted = |reason, count| {
        wait_until("the stranger's probes are counted", || {
            Ok(operator.dropped(reason)? >= count)
        })
    };
    let before = operator.dropped("sender-unknown")?;
    tried("send", stranger.send_to(&request(1).to_packet(0), tunnel))?;
    is_counted("sender-unknown", before + 1)?;
    tried("send", asker.send_to(&request(2).to_packet(0), tunnel))?;
    let mut requests = Vec::new();
    let mut buffer = [0; 2048];
    loop {
        let (length, from) = tried("receive", scripted.peer.recv_from(&mut buffer))?;
        match Probe::from_packet(&buffer[..length]) {
            Some(probe) if probe.kind == (Kind::Reply { port }) => {
                check(probe.nonce == 2 && from == tunnel, || {
                    format!("{probe:?} from {from}")
                })?;
                break;
            }
            Some(probe) => requests.push((from.port(), probe)),
            None => {}
        }
    }
    for socket in [&stranger, &asker] {
        tried("set", socket.set_nonblocking(true))?;
        check(socket.recv(&mut buffer).is_err(), || {
            "answered where nobody should be".into()
        })?;
    }

    // Replies with another nonce, from a stranger, or with a port that was
    // rewritten prove nothing. Those of one worker stand for all.
    scripted.speak()?;
    let (own, asked) = match requests.pop() {
        Some(request) => request,
        None => scripted.next_request()?,
    };
    let reply = |nonce: u64, port: u16| {
        let kind = Kind::Reply { port };
        Probe { kind, nonce }.to_packet(0)
    };
    let before = operator.dropped("sender-unknown")?;
    tried("send", stranger.send_to(&reply(asked.nonce, own), tunnel))?;
    is_counted("sender-unknown", before + 1)?;
    for wrong in [0, asked.nonce ^ 1, asked.nonce.swap_bytes(), u64::MAX] {
        scripted.to_tunnel(&reply(wrong, own))?;
    }
    scripted.to_tunnel(&reply(asked.nonce, own))?;
    // In order behind the wrong ones.
    wait_for_proofs(operator, 1)?;
    // The same once more, and for a port that is not the asking worker's.
    scripted.to_tunnel(&reply(asked.nonce, own))?;
    scripted.speak()?;
    let (_, other) = loop {
        let (port, probe) = scripted.next_request()?;
        if port != own {
            break (port, probe);
        }
        scripted.speak()?;
    };
    scripted.to_tunnel(&reply(other.nonce, own))?;
    scripted.to_tunnel(&request(3).to_packet(0))?;
    loop {
        let (length, _) = tried("receive", scripted.peer.recv_from(&mut buffer))?;
        let probe = Probe::from_packet(&buffer[..length]);
        if probe.is_some_and(|probe| probe.nonce == 3) {
            break;
        }
    }
    check(proven(operator)? == 1, || {
        "a port that was rewritten is proven".into()
    })?;
    stop(scripted.tunnel).map(drop)
}

/// What `fastvpn check` says of a peer.
fn checked(namespace: &Namespace, peer: &str) -> Result<String> {
    let mut command = Command::new(FASTVPN);
    command.args(["check", "--json", "--peer", peer]);
    let said = said(namespace, command)?;
    let items: Value = serde_json::from_str(&said.stdout)
        .map_err(|error| Error::new(format!("{error} in {said:?}")))?;
    let item = items
        .as_array()
        .and_then(|items| items.iter().find(|item| item["name"] == "peer"));
    Ok(item.map(ToString::to_string).unwrap_or_default())
}

#[testbed::trial]
fn check_asks_the_peer() -> Result<()> {
    let hosts = hosts(1500)?;
    let says = |peer: &str, parts: &[&str]| {
        let item = checked(&hosts.a, peer)?;
        let has_all = parts.iter().all(|part| item.contains(part));
        check(has_all, || format!("no {parts:?} in {item}"))
    };
    let (there, nowhere) = (UNDERLAY[1].to_string(), "10.211.55.99");
    says(nowhere, &["info", "no answer"])?;
    says(&there, &["info", "nothing receives"])?;
    let operator = Operator::new()?;
    let flags = format!(
        "--queues 1 --control {} --peer {}",
        operator.socket_text(),
        UNDERLAY[0]
    );
    let tunnel = fastvpn(&hosts.b, &flags)?;
    operator.wait()?;
    wait_until("the peer answers", || {
        Ok(says(&there, &["\"ok\"", "it answers"]).is_ok())
    })?;
    stop(tunnel)?;
    let taken = udp(&hosts.a, UNDERLAY[0], PORT)?;
    let held = udp(&hosts.b, UNDERLAY[1], PORT)?;
    says(&there, &["info", "in use here"])?;
    drop((taken, held));
    Ok(())
}

/// A socket at a further address of a host.
fn stranger(host: &Namespace, address: Ipv4Addr) -> Result<UdpSocket> {
    let index = link(host, testbed::UNDERLAY_NAME)?.index;
    let mut netlink = host.netlink()?;
    netlink.add_address(index, IpNet::new_assert(address.into(), 24))?;
    udp(host, address, 0)
}
