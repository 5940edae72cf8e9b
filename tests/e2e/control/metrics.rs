//! Metrics, as Prometheus scrapes them: what they say is what `status` and `peers` say, and
//! they are there as long as the tunnel is.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use fastvpn::error::{Error, Result};
use prometheus_parse::LineInfo;
use serde_json::Value;
use testbed::{Namespace, rss_bytes};

use crate::daemon::takeover::Stage;
use crate::operator::Operator;
use crate::packets::wait_until_up;
use crate::site::{peer, transfer, wait_for_each_other};
use crate::support::{
    PATIENCE, TUNNEL, Tunnel, UNDERLAY, bulk, check, fail, fastvpn, hosts, stop, stop_all, tried,
    udp, wait_for, wait_until,
};
use crate::tools::{Stream, inventory, nothing_left};
use crate::wireguard::ends::{self, Keys, Kind, Reach, Underlay};

/// Where metrics are served.
pub const PORT: u16 = 9285;

/// A sample's name and labels.
type Key = (String, BTreeMap<String, String>);

/// What was scraped.
pub struct Scrape {
    /// As it came.
    pub text: String,
    samples: BTreeMap<Key, f64>,
}

impl Scrape {
    /// Reads it; each line has to mean something.
    fn parse(text: String) -> Result<Self> {
        let mut samples = BTreeMap::new();
        let mut types = BTreeSet::new();
        for line in text.lines() {
            match LineInfo::parse(line) {
                LineInfo::Doc { .. } => {}
                LineInfo::Type { metric_name, .. } => {
                    let is_new = types.insert(metric_name);
                    check(is_new, || format!("{line} is there twice"))?;
                }
                LineInfo::Sample {
                    metric_name,
                    labels,
                    value,
                    timestamp: None,
                } if types.contains(metric_name) => {
                    let value = value.parse();
                    let value = value.map_err(|_| Error::new(format!("no number in {line}")))?;
                    let key = (metric_name.to_string(), pairs(labels.unwrap_or_default())?);
                    let before = samples.insert(key, value);
                    check(before.is_none(), || format!("{line} is there twice"))?;
                }
                strange => return fail(format!("{strange:?}: {line}")),
            }
        }
        Ok(Self { text, samples })
    }

    /// A sample, by its name without the prefix.
    pub fn get(&self, name: &str, labels: &[(&str, &str)]) -> Option<f64> {
        let labels = labels.iter();
        let labels = labels.map(|(name, value)| (name.to_string(), value.to_string()));
        let key = (format!("fastvpn_{name}"), labels.collect());
        self.samples.get(&key).copied()
    }

    /// The names of all metrics.
    pub fn names(&self) -> BTreeSet<&str> {
        self.samples.keys().map(|(name, _)| &name[..]).collect()
    }

    /// Nothing that only grows is less than before, or gone.
    fn has_grown_since(&self, before: &Self) -> Result<()> {
        for (key, value) in &before.samples {
            let now = self.samples.get(key).copied();
            let is_fine = !key.0.ends_with("_total") || now.is_some_and(|now| now >= *value);
            check(is_fine, || format!("{key:?} was {value}, and is {now:?}"))?;
        }
        Ok(())
    }
}

/// The names and values of labels; none of these values has a quotation mark.
fn pairs(labels: &str) -> Result<BTreeMap<String, String>> {
    let parts = labels.split_terminator('"').collect::<Vec<_>>();
    let pairs = parts.chunks(2).map(|pair| match pair {
        [name, value] => {
            let name = name.trim_start_matches(',').strip_suffix('=')?;
            Some((name.to_string(), value.to_string()))
        }
        _ => None,
    });
    let pairs: Option<_> = pairs.collect();
    pairs.ok_or_else(|| Error::new(format!("strange labels: {labels}")))
}

/// Sends a request in a namespace, to the loopback interface; what is answered.
pub fn request(namespace: &Namespace, port: u16, text: &str) -> io::Result<String> {
    let mut stream = namespace.run(|| TcpStream::connect((Ipv4Addr::LOCALHOST, port)))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(text.as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

/// The status and the body of a page.
fn get(namespace: &Namespace, port: u16, path: &str) -> Result<(u16, String)> {
    let text = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n\r\n");
    let answer = tried(&format!("get {path}"), request(namespace, port, &text))?;
    let parsed = answer.split_once("\r\n\r\n").and_then(|(head, body)| {
        let status = head.strip_prefix("HTTP/1.1 ")?.get(..3)?.parse().ok()?;
        Some((status, body.to_string()))
    });
    parsed.ok_or_else(|| Error::new(format!("{path}: {answer:?}")))
}

/// Scrapes a tunnel.
pub fn scrape(namespace: &Namespace) -> Result<Scrape> {
    Scrape::parse(wait_for_status(namespace, "/metrics", 200)?)
}

/// Scrapes a tunnel until something is so: a page may be a second old.
fn scrape_until(
    namespace: &Namespace,
    what: &str,
    is_so: impl Fn(&Scrape) -> bool,
) -> Result<Scrape> {
    let mut last = None;
    wait_until(what, || {
        let scrape = scrape(namespace)?;
        let is_so = is_so(&scrape);
        last = Some(scrape);
        Ok(is_so)
    })?;
    last.ok_or_else(|| Error::new("no scrape"))
}

/// Waits until a page has this status: somebody else may have taken the place, and a busy
/// machine may not answer in time. The body.
fn wait_for_status(namespace: &Namespace, path: &str, status: u16) -> Result<String> {
    let mut body = String::new();
    wait_until(&format!("{path} is {status}"), || {
        let Ok((found, text)) = get(namespace, PORT, path) else {
            return Ok(false);
        };
        body = text;
        Ok(found == status)
    })?;
    Ok(body)
}

/// A worker's counters that are not drops, with the metrics that they are.
const OF_WORKERS: [(&str, &str); 9] = [
    ("tun_reads", "worker_tun_reads_total"),
    ("udp_sends", "worker_udp_sends_total"),
    ("packets_sent", "worker_sent_packets_total"),
    ("bytes_sent", "worker_sent_bytes_total"),
    ("udp_receives", "worker_udp_receives_total"),
    ("packets_received", "worker_received_packets_total"),
    ("bytes_received", "worker_received_bytes_total"),
    ("tun_writes", "worker_tun_writes_total"),
    ("queue_packets", "worker_queued_packets_total"),
];

const OF_PEERS: [(&str, &str); 4] = [
    ("packets_enqueued", "peer_sent_packets_total"),
    ("bytes_enqueued", "peer_sent_bytes_total"),
    ("packets_received", "peer_received_packets_total"),
    ("bytes_received", "peer_received_bytes_total"),
];

/// Waits until the numbers of a scrape are those of the control socket, taken while nothing
/// happened. A page may be a second old.
fn is_as_commands_say(namespace: &Namespace, operator: &Operator) -> Result<Scrape> {
    let state = || -> Result<[Value; 2]> {
        let (mut status, mut peers) = (operator.ask("status")?, operator.ask("peers")?);
        // These go on by themselves.
        for key in ["uptime_seconds", "boottime_ns"] {
            status[key] = Value::Null;
        }
        peers["boottime_ns"] = Value::Null;
        for peer in peers["peers"].as_array_mut().into_iter().flatten() {
            peer["last_seen_seconds"] = Value::Null;
        }
        Ok([status, peers])
    };
    let (mut found, mut difference) = (None, None);
    let waited = wait_until("nothing happens during a scrape", || {
        let before = state()?;
        let scrape = scrape(namespace)?;
        if state()? == before {
            difference = compare(&scrape, &before).err();
            found = difference.is_none().then_some(scrape);
        }
        Ok(found.is_some())
    });
    waited.map_err(|error| difference.unwrap_or(error))?;
    found.ok_or_else(|| Error::new("no scrape"))
}

/// The numbers of a scrape are those of `status` and `peers`.
fn compare(scrape: &Scrape, [status, peers]: &[Value; 2]) -> Result<()> {
    let is = |expected: &Value, name: &str, labels: &[(&str, &str)]| {
        let value = scrape.get(name, labels);
        check(expected.is_u64() && value == expected.as_f64(), || {
            format!("{name} {labels:?} is {value:?}, not {expected}")
        })
    };
    is(&status["mtu_bytes"], "mtu_bytes", &[])?;
    is(&status["prefixes"], "prefixes", &[])?;
    is(&status["peers"], "peers", &[])?;
    is(
        &status["tun_queue_drops"],
        "tun_queue_overrun_packets_total",
        &[],
    )?;
    for (number, worker) in status["workers"]
        .as_array()
        .into_iter()
        .flatten()
        .enumerate()
    {
        let number = number.to_string();
        for (counter, name) in OF_WORKERS {
            is(&worker[counter], name, &[("worker", &number)])?;
        }
        for (counter, value) in worker.as_object().into_iter().flatten() {
            if let Some(reason) = counter.strip_prefix("drop_") {
                let labels = [("worker", &number[..]), ("reason", reason)];
                is(value, "worker_dropped_packets_total", &labels)?;
            }
        }
    }
    for peer in peers["peers"].as_array().into_iter().flatten() {
        let name = peer["peer"].as_str().unwrap_or_default();
        for (key, metric) in OF_PEERS {
            is(&peer[key], metric, &[("peer", name)])?;
        }
        for (reason, count) in peer["drops"].as_object().into_iter().flatten() {
            let labels = [("peer", name), ("reason", reason)];
            is(count, "peer_dropped_packets_total", &labels)?;
        }
    }
    Ok(())
}

/// Under traffic, and after a reload.
#[testbed::trial]
fn metrics_say_what_status_and_peers_say() -> Result<()> {
    let hosts = hosts(1500)?;
    let operator = Operator::new()?;
    let text = |more: &str| {
        format!(
            "queues = 2\naddress = [\"10.244.55.122/24\"]\nmetrics = {PORT}\n{more}\n\n[[peer]]\n\
             endpoint = \"{}\"\nprefixes = [\"{}/32\"]\n",
            UNDERLAY[1], TUNNEL[1]
        )
    };
    let file = operator.write("fastvpn.toml", &text(""))?;
    let socket = operator.socket_text();
    let a = Tunnel::start(&hosts.a, &["--config", &file, "--control", &socket])?;
    let b = fastvpn(&hosts.b, "--peer 10.211.55.122 --address 10.244.55.123/24")?;
    wait_for(&hosts.a, TUNNEL[1].into())?;
    // One to nobody.
    let stranger = udp(&hosts.a, TUNNEL[0], 0)?;
    tried(
        "send",
        stranger.send_to(b"hello", (Ipv4Addr::new(10, 244, 55, 9), 9)),
    )?;
    bulk(&hosts.a, &hosts.b, TUNNEL[1].into(), 4)?;
    let first = is_as_commands_say(&hosts.a, &operator)?;
    let name = format!("{}:8285", UNDERLAY[1]);
    let sent = first.get("peer_sent_bytes_total", &[("peer", &name)]);
    check(sent > Some(4e6), || format!("{sent:?} bytes were sent"))?;
    let seen = first.get("peer_last_seen_timestamp_seconds", &[("peer", &name)]);
    check(seen.is_some_and(is_recent), || {
        format!("last seen {seen:?}")
    })?;
    check(first.get("ready", &[]) == Some(1.0), || first.text.clone())?;
    wait_for_status(&hosts.a, "/readyz", 200)?;

    bulk(&hosts.b, &hosts.a, TUNNEL[0].into(), 4)?;
    operator.write("fastvpn.toml", &text("hop = true"))?;
    operator.tell("reload")?;
    let second = is_as_commands_say(&hosts.a, &operator)?;
    second.has_grown_since(&first)?;
    check(
        second.get("last_reload_successful", &[]) == Some(1.0),
        || second.text.clone(),
    )?;
    // Another port is one for the next start.
    let other = text("").replace(&PORT.to_string(), "9999");
    operator.write("fastvpn.toml", &other)?;
    let said = operator.tell("reload")?;
    check(said.contains("at the next start: metrics"), || said.clone())?;
    operator.write("fastvpn.toml", "nonsense")?;
    operator.refuses("reload", &["fastvpn.toml:1"])?;
    let third = scrape_until(&hosts.a, "a reload that failed is seen", |scrape| {
        scrape.get("last_reload_successful", &[]) == Some(0.0)
    })?;
    third.has_grown_since(&second)?;
    stop_all([a, b]).map(drop)
}

/// Whether a time, in seconds since 1970, is less than a test ago.
fn is_recent(timestamp_s: f64) -> bool {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.is_ok_and(|now| (-2.0..600.0).contains(&(now.as_secs_f64() - timestamp_s)))
}

/// It is ready once the peer that it calls has answered. No secret is told.
#[testbed::trial]
fn readiness_waits_for_a_session() -> Result<()> {
    let hosts = ends::hosts()?;
    let keys = Keys::new(true)?;
    let reach = |host| Reach {
        endpoint: Some(Underlay::V4.endpoint(host)),
        keepalive_s: Some(1),
    };
    let config = keys.file(0, reach(1))?.display().to_string();
    let a = fastvpn(&hosts.a, &format!("--config {config} --metrics {PORT}"))?;
    let reason = wait_for_status(&hosts.a, "/readyz", 503)?;
    check(reason.contains("session"), || reason.clone())?;
    wait_for_status(&hosts.a, "/healthz", 200)?;
    let before = scrape(&hosts.a)?;
    check(before.get("ready", &[]) == Some(0.0), || {
        before.text.clone()
    })?;
    let b = keys.start(&hosts.b, 1, Kind::Fastvpn, reach(0))?;
    wait_for_status(&hosts.a, "/readyz", 200)?;
    let after = scrape_until(&hosts.a, "the tunnel is ready", |scrape| {
        scrape.get("ready", &[]) == Some(1.0)
    })?;
    after.has_grown_since(&before)?;
    let key = testbed::wireguard::base64(&keys.public(1));
    let handshake = after.get("peer_latest_handshake_timestamp_seconds", &[("peer", &key)]);
    check(handshake.is_some_and(is_recent), || {
        format!("{handshake:?}")
    })?;
    for file in ["0.key", "0.preshared.key"] {
        let path = Path::new(&config).with_file_name(file);
        let secret = tried("read a key", std::fs::read_to_string(path))?;
        check(!after.text.contains(secret.trim()), || {
            format!("{file} is in\n{}", after.text)
        })?;
    }
    stop(a)?;
    drop(b);
    Ok(())
}

/// Whoever connects meanwhile is served, by the old process or by the new one. What a process
/// counts begins at zero.
#[testbed::trial]
fn metrics_go_on_through_a_takeover() -> Result<()> {
    /// More than a process sends of its own accord, until it is scraped.
    const SENT_MIN: f64 = 1000.0;
    let stage = Stage::new()?;
    let place = format!("127.0.0.1:{PORT}");
    let far = stage.far().start(&[peer(1)], &[])?;
    let old = stage.start(&["--metrics", &place])?;
    let host = &stage.near().host;
    wait_until_up(host, "fastvpn0")?;
    wait_for_status(host, "/readyz", 200)?;
    wait_for_each_other(stage.near(), stage.far())?;
    transfer(stage.near(), stage.far(), 0, 4)?;
    let sent = |scrape: &Scrape| {
        let all = scrape.samples.iter();
        let sent = all.filter(|((name, _), _)| name == "fastvpn_worker_sent_packets_total");
        sent.map(|(_, value)| value).sum::<f64>()
    };
    let before = scrape_until(host, "the traffic is counted", |scrape| {
        sent(scrape) > SENT_MIN
    })?;
    let is_over = AtomicBool::new(false);
    let (new, served) = std::thread::scope(|scope| {
        let client = scope.spawn(|| {
            let mut served = Vec::new();
            while !is_over.load(Ordering::Relaxed) {
                let request_text = "GET /healthz HTTP/1.1\r\n\r\n";
                served.push(request(host, PORT, request_text));
            }
            served
        });
        let new = stage.take_over(old, &["--metrics", &place]);
        is_over.store(true, Ordering::Relaxed);
        (new, client.join().unwrap_or_default())
    });
    let (new, _) = new?;
    let is_answer = |answer: &&io::Result<String>| matches!(answer, Ok(text) if text.starts_with("HTTP/1.1 200 "));
    let failed: Vec<_> = served.iter().filter(|one| !is_answer(one)).collect();
    // The one that the old process was at.
    check(failed.len() <= 1 && served.len() > 1, || {
        format!("{failed:?} of {}", served.len())
    })?;
    let after = scrape(host)?;
    check(sent(&after) < SENT_MIN, || {
        format!("{} became {}", before.text, after.text)
    })?;
    let overruns = |scrape: &Scrape| scrape.get("tun_queue_overrun_packets_total", &[]);
    check(overruns(&after) >= overruns(&before), || after.text.clone())?;

    // A port that is taken: the old process goes on.
    let taken = host.run(|| TcpListener::bind((Ipv4Addr::LOCALHOST, 9999)));
    let taken = tried("listen", taken)?;
    let ended = stage.start(&["--takeover", "--metrics", "9999"])?.wait()?;
    check(ended.log.contains("metrics at 127.0.0.1:9999"), || {
        ended.log.clone()
    })?;
    wait_for_status(host, "/readyz", 200)?;
    drop(taken);
    // So is its own, at an address that is not its own.
    let everywhere = format!("0.0.0.0:{PORT}");
    let ended = stage
        .start(&["--takeover", "--metrics", &everywhere])?
        .wait()?;
    let hint = format!("the process that is to be taken over has the port, at {place}: ");
    check(ended.log.contains(&hint), || ended.log.clone())?;
    wait_for_status(host, "/readyz", 200)?;
    // Another one, and none.
    let (new, _) = stage.take_over(new, &["--metrics", "9999"])?;
    wait_until("the other port is served", || {
        Ok(get(host, 9999, "/healthz").is_ok_and(|(status, _)| status == 200))
    })?;
    let refused = request(host, PORT, "").err().map(|error| error.kind());
    check(refused == Some(io::ErrorKind::ConnectionRefused), || {
        format!("{refused:?}")
    })?;
    let (new, _) = stage.take_over(new, &[])?;
    check(request(host, 9999, "").is_err(), || {
        "it is still served".into()
    })?;
    stop_all([new, far]).map(drop)
}

/// By somebody else: one line, and nothing is left.
#[testbed::trial]
fn a_taken_metrics_port_ends_a_start() -> Result<()> {
    let hosts = hosts(1500)?;
    let taken = hosts
        .a
        .run(|| TcpListener::bind((Ipv4Addr::LOCALHOST, PORT)));
    let taken = tried("listen", taken)?;
    let before = inventory(&hosts.a)?;
    let flags = format!("--peer 10.211.55.123 --metrics :{PORT}");
    let ended = fastvpn(&hosts.a, &flags)?.wait()?;
    let expected = format!("cannot serve metrics at 127.0.0.1:{PORT}: address already in use; ");
    let is_one = ended.log.lines().count() == 1 && ended.log.contains(&expected);
    check(ended.status.code() == Some(1) && is_one, || {
        ended.log.clone()
    })?;
    nothing_left(&hosts.a, &before)?;
    drop(taken);
    // Only on the loopback interface, unless it is said otherwise.
    for (place, is_reached) in [
        (format!("{PORT}"), false),
        (format!("0.0.0.0:{PORT}"), true),
    ] {
        let tunnel = fastvpn(&hosts.a, &format!("--peer 10.211.55.123 --metrics {place}"))?;
        wait_for_status(&hosts.a, "/healthz", 200)?;
        let outside = SocketAddr::from((UNDERLAY[0], PORT));
        let reached = hosts
            .b
            .run(|| TcpStream::connect_timeout(&outside, PATIENCE));
        check(reached.is_ok() == is_reached, || {
            format!("{place}: {reached:?}")
        })?;
        stop(tunnel)?;
    }
    Ok(())
}

/// Traffic flows, memory is bounded, and a scrape is answered.
#[testbed::trial]
fn hostile_clients_of_metrics() -> Result<()> {
    const GROWTH_MAX: u64 = 32 << 20;
    let hosts = hosts(1500)?;
    let metrics = format!("--queues 1 --peer 10.211.55.123 --metrics {PORT}");
    let a = fastvpn(&hosts.a, &metrics)?;
    let b = fastvpn(&hosts.b, "--queues 1 --peer 10.211.55.122")?;
    wait_for(&hosts.a, TUNNEL[1].into())?;
    wait_for_status(&hosts.a, "/readyz", 200)?;
    let stream = Stream::start(&hosts.a, &hosts.b, TUNNEL[1].into())?;
    stream.wait_for_progress()?;
    let before = rss_bytes(a.pid())?;
    let long = vec![b'x'; 10 << 20];
    let half: &[u8] = b"GET /metrics HTTP/1.1\r\nX:";
    let whole = b"GET /metrics HTTP/1.1\r\n\r\n".repeat(10_000);
    for say in [b"", half, b"\r\n\r\n\0", &whole, &long] {
        let crowd: Vec<_> = (0..12)
            .filter_map(|_| {
                let connect = || TcpStream::connect((Ipv4Addr::LOCALHOST, PORT));
                let mut client = hosts.a.run(connect).ok()?;
                client.set_nonblocking(true).ok()?;
                let _ = client.write(say);
                Some(client)
            })
            .collect();
        scrape(&hosts.a)?;
        stream.wait_for_progress()?;
        drop(crowd);
    }
    let grown = rss_bytes(a.pid())?.saturating_sub(before);
    check(grown < GROWTH_MAX, || format!("grew by {grown} bytes"))?;
    stream.finish()?;
    stop_all([a, b]).map(drop)
}
