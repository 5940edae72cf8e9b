//! Prefixes that change by the ten thousand while datagrams flow: each datagram
//! arrives, once, and at the peer that had its destination's prefix.

use std::fmt::Write;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use fastvpn::error::{Error, Result};
use ipnet::IpNet;
use serde_json::json;

use crate::numbered::{Marks, Sink, Stream, Streams};
use crate::operator::Operator;
use crate::site::{
    Site, Sites, all_went_well, peer, prefixes, router, sites, tunnel, underlay,
    wait_for_each_other,
};
use crate::support::{Tunnel, check, link, stop, tried, udp, wait_until, without_backlog_drops};

#[testbed::trial(each_engine, long)]
fn ten_thousand_prefixes_move_under_load() -> Result<()> {
    without_backlog_drops(prefixes_move)
}

#[testbed::trial(each_engine, long)]
fn ten_thousand_prefixes_reloaded_under_load() -> Result<()> {
    without_backlog_drops(prefixes_are_reloaded)
}

/// Prefixes that change at a time: half of them IPv4, half IPv6.
const CHANGED: u16 = 10_000;

/// How often they change.
const ROUNDS: u64 = 10;

/// Datagrams of each stream between changes.
const SETTLED: u64 = 50;

/// The port of all sinks.
const PORT: u16 = 7000;

/// The site that sends and whose prefixes change, the two that these are moved
/// between, and one that is not concerned.
const ASKER: u8 = 1;
const FIRST: u8 = 2;
const SECOND: u8 = 3;
const BYSTANDER: u8 = 4;

/// Shorter than all prefixes that change, one for each family.
const COVER: [&str; 2] = ["10.64.0.0/10", "fd00:30::/32"];

/// One of the prefixes that change.
fn prefix(number: u16) -> IpNet {
    let length = if number.is_multiple_of(2) { 24 } else { 48 };
    IpNet::new_assert(in_prefix(number, 0), length)
}

/// An address in it.
fn in_prefix(number: u16, host: u8) -> IpAddr {
    let half = number / 2;
    let [high, low] = half.to_be_bytes();
    match number % 2 {
        0 => Ipv4Addr::new(10, 64 + high, low, host).into(),
        _ => Ipv6Addr::new(0xfd00, 0x30, half, 0, 0, 0, 0, host.into()).into(),
    }
}

/// The first of the prefixes of each set.
const SETS: [u16; 2] = [0, CHANGED];

fn set(first: u16) -> Vec<IpNet> {
    (first..first + CHANGED).map(prefix).collect()
}

/// Addresses of both families in prefixes all over a set.
fn addresses_in(first: u16) -> Vec<IpAddr> {
    let numbers = [0, 1, 2, 255, 256, 3333, 5000, 5001, 7778, 9997, 9998, 9999];
    numbers.map(|number| in_prefix(first + number, 7)).to_vec()
}

/// Puts addresses onto a site's loopback interface.
fn accept(site: &Site, addresses: &[IpAddr]) -> Result<()> {
    let mut netlink = site.host.netlink()?;
    let loopback = link(&site.host, "lo")?.index;
    addresses
        .iter()
        .try_for_each(|address| netlink.add_address(loopback, IpNet::from(*address)))
}

/// A stream from a site to addresses of one family.
fn stream(name: &str, from: &Site, to: &[IpAddr], family: usize) -> Result<Stream> {
    let addresses = to.iter().filter(|to| usize::from(to.is_ipv6()) == family);
    Ok(Stream {
        name: format!("{name}, IPv{}", [4, 6][family]),
        socket: udp(&from.host, tunnel(from.number)[family], 0)?,
        to: addresses.map(|to| SocketAddr::new(*to, PORT)).collect(),
    })
}

/// A stream's name, and the site where it has to arrive in each round.
struct Expected {
    stream: Stream,
    site: fn(u64) -> u8,
}

/// All streams: to each set, from and to the bystander.
fn streams(all: &[Site], site_of: [fn(u64) -> u8; 2]) -> Result<Vec<Expected>> {
    let at = |number: u8| &all[usize::from(number) - 1];
    let beside = [tunnel(BYSTANDER), router(BYSTANDER)].concat();
    let mut streams = Vec::new();
    for family in [0, 1] {
        for (name, first, site) in [
            ("to the first set", SETS[0], site_of[0]),
            ("to the second set", SETS[1], site_of[1]),
        ] {
            streams.push(Expected {
                stream: stream(name, at(ASKER), &addresses_in(first), family)?,
                site,
            });
        }
        streams.push(Expected {
            stream: stream("to a bystander", at(ASKER), &beside, family)?,
            site: |_| BYSTANDER,
        });
        streams.push(Expected {
            stream: stream("from a bystander", at(BYSTANDER), &tunnel(ASKER), family)?,
            site: |_| ASKER,
        });
    }
    Ok(streams)
}

/// Four sites of which the three others are up.
fn three_peers() -> Result<(Sites, Vec<Tunnel>)> {
    let network = sites(BYSTANDER)?;
    let addresses = [addresses_in(SETS[0]), addresses_in(SETS[1])].concat();
    let mut tunnels = Vec::new();
    for site in &network.all[1..] {
        accept(site, &addresses)?;
        tunnels.push(site.start(&[peer(ASKER)], &["--queues", "1", "--txqueuelen", QUEUE])?);
    }
    Ok((network, tunnels))
}

/// A debug build on a busy machine may stop for a while.
const QUEUE: &str = "10000";

/// The tunnel whose prefixes change has two workers: both must follow.
const ASKER_FLAGS: [&str; 4] = ["--queues", "2", "--txqueuelen", QUEUE];

/// Sends all the time while `change` makes the round's change, and checks where
/// each datagram arrived.
fn under_load(
    network: &Sites,
    site_of: [fn(u64) -> u8; 2],
    mut change: impl FnMut(u64) -> Result<()>,
) -> Result<()> {
    let any = IpAddr::from(Ipv6Addr::UNSPECIFIED);
    let sinks = network.all.iter().map(|site| {
        Ok(Sink {
            site: site.number,
            // Of both families (ipv6(7), IPV6_V6ONLY).
            socket: udp(&site.host, any, PORT)?,
        })
    });
    let sinks = sinks.collect::<Result<Vec<_>>>()?;
    change(0)?;
    let (streams, expected): (Vec<_>, Vec<_>) = streams(&network.all, site_of)?
        .into_iter()
        .map(|expected| (expected.stream, expected.site))
        .unzip();
    let mut streams = Streams::start(streams, sinks)?;
    // Of each round: what had been sent when its change was asked for, and when
    // that was answered.
    let mut asked: Vec<Marks> = vec![vec![0; expected.len()]];
    let mut answered = asked.clone();
    for round in 1..=ROUNDS {
        // All of it has arrived, so none can be on its way when things change.
        asked.push(streams.wait_for_more(SETTLED)?);
        change(round)?;
        answered.push(streams.marks());
    }
    streams.wait_for_more(SETTLED)?;
    asked.push(streams.finish()?);
    for (place, site) in expected.iter().enumerate() {
        let mut sent_meanwhile = 0;
        for round in 0..=ROUNDS {
            let index = round as usize;
            let of_round = site(round);
            let before = site(round.saturating_sub(1));
            let (from, to) = (asked[index][place], answered[index][place]);
            sent_meanwhile += to - from;
            // One more may have been under way at the time of the answer.
            let settled = (to + 1).min(asked[index + 1][place]);
            streams.check_places(place, from..settled, &[before, of_round])?;
            streams.check_places(place, settled..asked[index + 1][place], &[of_round])?;
        }
        // Else nothing has been tested.
        check(sent_meanwhile >= ROUNDS, || {
            format!("only {sent_meanwhile} datagrams while prefixes changed")
        })?;
    }
    Ok(())
}

fn stop_all(tunnels: Vec<Tunnel>) -> Result<()> {
    for tunnel in tunnels {
        let ended = stop(tunnel)?;
        all_went_well(&ended)?;
        check(ended.dropped("tun-queue-full") == 0, || ended.log)?;
    }
    Ok(())
}

/// The first site and the second one by turns, from round to round.
fn first_in_turn(round: u64) -> u8 {
    [FIRST, SECOND][(round % 2) as usize]
}

/// Two sites have the same prefixes by turns. A shorter one is a third site's:
/// there one would see a moment without them.
fn prefixes_move() -> Result<()> {
    let (network, mut tunnels) = three_peers()?;
    let operator = Operator::new()?;
    let socket = operator.socket_text();
    let cover = COVER.join(",");
    let peers = [
        peer(FIRST),
        peer(SECOND),
        format!("{},{cover}", peer(BYSTANDER)),
    ];
    let flags = [&ASKER_FLAGS[..], &["--control", &socket]].concat();
    let asker = &network.all[usize::from(ASKER) - 1];
    tunnels.push(asker.start(&peers, &flags)?);
    for other in &network.all[1..] {
        wait_for_each_other(asker, other)?;
    }
    operator.wait()?;
    let moving = set(SETS[0]);
    under_load(&network, [first_in_turn, |_| BYSTANDER], |round| {
        let to = underlay(first_in_turn(round)).to_string();
        let change = json!({
            "command": "route-add", "peer": to, "prefixes": moving, "replace": true,
        });
        let answer = operator.must(&change)?;
        check(answer["prefixes_added"] == CHANGED, || answer.to_string())
    })?;
    stop_all(tunnels)
}

/// The file has one set of prefixes or another, and a shorter one at another
/// peer, which has what is left.
fn prefixes_are_reloaded() -> Result<()> {
    let (network, mut tunnels) = three_peers()?;
    let operator = Operator::new()?;
    let socket = operator.socket_text();
    let file = |round: u64| -> Result<String> {
        let changing = set(SETS[(round % 2) as usize]);
        let changing = changing.iter().map(ToString::to_string).collect::<Vec<_>>();
        let mut text = String::new();
        for (number, more) in [
            (FIRST, changing.join(",")),
            (SECOND, COVER.join(",")),
            (BYSTANDER, String::new()),
        ] {
            let all = format!("{},{more}", prefixes(number));
            let all: Vec<_> = all.split(',').filter(|prefix| !prefix.is_empty()).collect();
            writeln!(text, "[[peer]]\nendpoint = \"{}\"", underlay(number))
                .and_then(|()| writeln!(text, "prefixes = {}", json!(all)))
                .map_err(|_| Error::new("cannot write to a string"))?;
        }
        operator.write("fastvpn.toml", &text)
    };
    let path = file(0)?;
    let flags = [&ASKER_FLAGS[..], &["--control", &socket, "--config", &path]].concat();
    let asker = &network.all[usize::from(ASKER) - 1];
    tunnels.push(asker.start(&[] as &[&str], &flags)?);
    for other in &network.all[1..] {
        wait_for_each_other(asker, other)?;
    }
    operator.wait()?;
    let site_of = [first_in_turn, |round| first_in_turn(round + 1)];
    under_load(&network, site_of, |round| {
        file(round)?;
        let answer = operator.must(&json!({"command": "reload"}))?;
        let changed = if round == 0 { 0 } else { CHANGED };
        let is_so = answer["prefixes_added"] == changed && answer["prefixes_removed"] == changed;
        check(is_so, || answer.to_string())
    })?;
    stop_all(tunnels)
}

/// Whoever has been told that a prefix has moved may count on it: not one packet
/// that is sent then goes the old way, though the worker is busy.
#[testbed::trial(each_engine)]
fn an_answer_means_in_force() -> Result<()> {
    const MOVES: u64 = 300;
    /// Packets that keep the worker busy, and the pause between them. No more
    /// than it takes in at a time, or it would look up in between.
    const BURST: usize = 24;
    const PAUSE: Duration = Duration::from_micros(500);
    let (network, mut tunnels) = three_peers()?;
    let operator = Operator::new()?;
    let socket = operator.socket_text();
    let asker = &network.all[usize::from(ASKER) - 1];
    let peers = [FIRST, SECOND, BYSTANDER].map(peer);
    tunnels.push(asker.start(&peers, &["--queues", "1", "--control", &socket])?);
    for other in &network.all[1..] {
        wait_for_each_other(asker, other)?;
    }
    operator.wait()?;
    let to = SocketAddr::new(in_prefix(0, 7), PORT);
    let any = IpAddr::from(Ipv6Addr::UNSPECIFIED);
    let sinks = [FIRST, SECOND].map(|number| {
        let sink = udp(&network.all[usize::from(number) - 1].host, any, PORT)?;
        tried("set", sink.set_nonblocking(true))?;
        Ok::<_, Error>((number, sink))
    });
    let [first, second] = sinks;
    let sinks = [first?, second?];
    let source = udp(&asker.host, tunnel(ASKER)[0], 0)?;
    let busy = udp(&asker.host, tunnel(ASKER)[0], 0)?;
    let beside = SocketAddr::new(tunnel(BYSTANDER)[0], 9);
    let is_over = AtomicBool::new(false);
    let moves = || -> Result<()> {
        for number in 0..MOVES {
            let turn = [FIRST, SECOND][(number % 2) as usize];
            let change = json!({
                "command": "route-add", "peer": underlay(turn).to_string(),
                "prefixes": [prefix(0)], "replace": true,
            });
            operator.must(&change)?;
            let mut found = None;
            wait_until("a datagram arrives", || {
                // The queues on the way may have been full.
                tried("send", source.send_to(&number.to_le_bytes(), to))?;
                let deadline = Instant::now() + Duration::from_millis(200);
                while found.is_none() && Instant::now() < deadline {
                    let mut bytes = [0; 8];
                    for (site, sink) in &sinks {
                        while sink.recv(&mut bytes).is_ok() {
                            if u64::from_le_bytes(bytes) == number {
                                found.get_or_insert(*site);
                            }
                        }
                    }
                    std::thread::sleep(Duration::from_micros(100));
                }
                Ok(found.is_some())
            })?;
            check(found == Some(turn), || {
                format!("move {number}: a datagram arrived at {found:?}, not at site {turn}")
            })?;
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !is_over.load(Ordering::Relaxed) {
                for _ in 0..BURST {
                    let _ = busy.send_to(&[7; 1000], beside);
                }
                std::thread::sleep(PAUSE);
            }
        });
        let result = moves();
        is_over.store(true, Ordering::Relaxed);
        result
    })?;
    for tunnel in tunnels {
        all_went_well(&stop(tunnel)?)?;
    }
    Ok(())
}
