//! Requests that are long, strange or hostile: each gets one clear line, changes
//! all that it says or nothing, and takes bounded memory.

use std::io::{BufRead, BufReader, Write};

use fastvpn::error::Result;
use serde_json::{Value, json};
use testbed::{rss_bytes, rss_peak_bytes};

use crate::host::routes::own_routes;
use crate::operator::{Operator, in_time};
use crate::site::{peer, sites};
use crate::support::{PATIENCE, check, stop, tried};

/// Longest request in bytes, with its line feed.
const REQUEST_BYTES_MAX: usize = 4 << 20;

/// Connections that send at the same time, of the 16 that there may be.
const CLIENTS: usize = 15;

/// `head`, as often `item` as fits, and `tail`.
fn longest(head: &str, item: &str, tail: &str) -> Vec<u8> {
    let room = REQUEST_BYTES_MAX - head.len() - tail.len() - 1;
    let mut line = [head, &item.repeat(room / item.len()), tail].concat();
    line.push('\n');
    line.into_bytes()
}

/// Long requests, each complete when all have arrived but for their last bytes;
/// the answers.
fn all_at_once(operator: &Operator, line: &[u8]) -> Result<Vec<Value>> {
    let (most, last) = line.split_at(line.len() - 2);
    let mut clients = (0..CLIENTS)
        .map(|_| {
            let mut client = operator.connect()?;
            // A debug build takes long over all of them, one after the other.
            tried(
                "set a timeout",
                client.set_read_timeout(Some(10 * PATIENCE)),
            )?;
            tried("send most of a request", client.write_all(most))?;
            Ok(client)
        })
        .collect::<Result<Vec<_>>>()?;
    for client in &mut clients {
        tried("send the rest", client.write_all(last))?;
    }
    let answer = |client| {
        let mut line = String::new();
        let read = BufReader::new(client).read_line(&mut line);
        tried("read an answer", in_time(read))?;
        Ok(serde_json::from_str(&line).unwrap_or_default())
    };
    clients.into_iter().map(answer).collect()
}

/// What a request says it is, and what it is read into, may be many times as
/// long as its text.
#[testbed::trial]
fn long_requests_together() -> Result<()> {
    const GROWTH_MAX: u64 = (CLIENTS * 3 * REQUEST_BYTES_MAX) as u64;
    let network = sites(1)?;
    let operator = Operator::new()?;
    let flags = ["--control", &operator.socket_text(), "--queues", "1"];
    let end = network.all[0].start(&[peer(2)], &flags)?;
    operator.wait()?;
    let before = rss_bytes(end.pid())?;
    for (line, is_done) in [
        (
            longest("{\"command\":\"status\",\"a\":[0", ",0", "]}"),
            false,
        ),
        (
            longest("{\"a\":[0", ",0", "],\"command\":\"status\"}"),
            false,
        ),
        (
            longest(
                "{\"command\":\"route-add\",\"peer\":\"10.211.55.2\",\"prefixes\":[\"10.9.0.0/16\"",
                ",\"10.9.0.0/16\"",
                "]}",
            ),
            true,
        ),
    ] {
        let shown = String::from_utf8_lossy(&line[..40]).into_owned();
        let answers = all_at_once(&operator, &line)?;
        for answer in &answers {
            check(
                answer["ok"] == is_done && answer.to_string().len() < 1000,
                || format!("{shown}: {answer}"),
            )?;
        }
        let grown = rss_peak_bytes(end.pid())?.saturating_sub(before);
        check(grown < GROWTH_MAX, || {
            format!("{shown}: grew by {grown} bytes")
        })?;
    }
    stop(end).map(drop)
}

/// Things that a program could get wrong, and what of it the answer names.
fn strange() -> Vec<(Value, &'static str)> {
    let add = |peer: &str, prefixes: &[&str]| json!({"command": "peer-add", "peer": peer, "prefixes": prefixes});
    let route = |prefixes: Value| {
        let peer = "10.211.55.2";
        json!({"command": "route-add", "peer": peer, "prefixes": prefixes})
    };
    vec![
        (add(&"h".repeat(10_000), &["10.9.0.0/16"]), "255"),
        (add("a\0b", &["10.9.0.0/16"]), "a\\0b"),
        (add("a\nb", &["10.9.0.0/16"]), "a\\nb"),
        (add("\u{1b}[2J", &["10.9.0.0/16"]), "not a peer"),
        (add("", &["10.9.0.0/16"]), "not a peer"),
        (add("10.211.55.9:0", &["10.9.0.0/16"]), "not a UDP port"),
        (add("10.211.55.9:65536", &["10.9.0.0/16"]), "65536"),
        (add("10.211.55.9:", &["10.9.0.0/16"]), "not a UDP port"),
        (add(&format!("a:{}", "9".repeat(1 << 20)), &[]), "255"),
        (add("10.211.55.9%eth0", &["10.9.0.0/16"]), "%eth0"),
        (add("a:%eth0:b", &["10.9.0.0/16"]), "not an IPv6 address"),
        (add("fe80::1%", &["10.9.0.0/16"]), "not an IPv6 address"),
        // The second prefix is wrong: the first is not added either.
        (
            add("10.211.55.9", &["10.9.0.0/16", "10.9.1.1/24"]),
            "10.9.1.0/24",
        ),
        (
            add("10.211.55.9", &["10.9.0.0/16", "172.18.2.0/24"]),
            "172.18.2.0/24",
        ),
        (route(json!(["10.9.0.0/16", "10.9.1.1/24"])), "10.9.1.0/24"),
        (
            route(json!(["10.9.0.0/16", "::ffff:10.0.0.1/104"])),
            "::ffff:10.0.0.0/104",
        ),
        (route(json!(["10.9.0.0/16", "10.9.0.0/33"])), "IP address"),
        (route(json!(["10.9.0.0/16", "10.9.0.0"])), "IP address"),
        (route(json!("10.9.0.0/16")), "sequence"),
        (route(json!({"10.9.0.0/16": 1})), "sequence"),
        (route(json!(null)), "null"),
        (route(json!(["10.9.0.0/16", 1e300])), "floating point"),
        (
            route(json!(["10.9.0.0/16", u64::MAX])),
            "18446744073709551615",
        ),
        (
            json!({"command": "route-del", "prefixes": ["172.18.2.0/24", "172.18.2.0/24"]}),
            "172.18.2.0/24",
        ),
        (
            json!({"command": "route-del", "prefixes": ["172.18.2.1/24"]}),
            "172.18.2.0/24",
        ),
        (
            json!({"command": "route-get", "address": "10.9.0.0/16"}),
            "IP address",
        ),
        (
            json!({"command": "route-get", "address": "fe80::1%eth0"}),
            "IP address",
        ),
        (json!({"command": "stop", "peer": "10.211.55.2"}), "peer"),
        (json!(["stop"]), "object"),
    ]
}

#[testbed::trial]
fn strange_requests() -> Result<()> {
    let network = sites(1)?;
    let host = &network.all[0].host;
    let operator = Operator::new()?;
    let socket = operator.socket_text();
    let end = network.all[0].start(&[peer(2)], &["--control", &socket])?;
    operator.wait()?;
    let state = || Ok::<_, fastvpn::error::Error>((operator.routes()?, own_routes(host)?));
    let before = state()?;
    for (request, part) in strange() {
        let answer = operator.request(&request.to_string())?;
        let error = answer["error"].as_str().unwrap_or_default();
        let is_one_line = error.lines().count() == 1 && error.len() < 500;
        check(
            answer["ok"] == false && is_one_line && error.contains(part),
            || format!("{request}: {answer}"),
        )?;
        check(state()? == before, || {
            format!("{request} changed something")
        })?;
    }
    // What is unusual but says what it means is done as it says, and undone.
    for prefix in ["::ffff:10.0.0.0/104", "0.0.0.0/0", "::/0"] {
        operator.tell(&format!("route add {prefix} {prefix} --peer 10.211.55.2"))?;
        let (routes, kernel) = state()?;
        let is_there = routes.iter().any(|(net, _)| net.to_string() == prefix);
        check(is_there && kernel.len() == before.1.len() + 1, || {
            format!("{prefix}: {routes:?}, {kernel:?}")
        })?;
        operator.tell(&format!("route del {prefix}"))?;
        check(state()? == before, || format!("{prefix} leaves something"))?;
    }
    stop(end).map(drop)
}

/// The same mistakes in a command's words.
#[testbed::trial]
fn strange_words() -> Result<()> {
    let network = sites(1)?;
    let host = &network.all[0].host;
    let operator = Operator::new()?;
    let socket = operator.socket_text();
    let end = network.all[0].start(&[peer(2)], &["--control", &socket])?;
    operator.wait()?;
    let before = (operator.routes()?, own_routes(host)?);
    let long = format!("{}=10.9.0.0/16", "h".repeat(10_000));
    for (words, part) in [
        (["peer", "add", &long].as_slice(), "255"),
        (&["peer", "add", "a b=10.9.0.0/16"], "DNS name"),
        (&["peer", "add", "10.211.55.9:0=10.9.0.0/16"], "UDP port"),
        (&["peer", "add", "a%eth0=10.9.0.0/16"], "a%eth0"),
        (&["peer", "add", "10.211.55.9=10.9.0.1/16"], "10.9.0.0/16"),
        (&["peer", "add", "10.211.55.9="], "10.211.55.9="),
        (
            &["route", "add", "10.9.0.1/16", "--peer", "10.211.55.2"],
            "10.9.0.0/16",
        ),
        (
            &["route", "add", "10.9.0.0/16", "--peer", "a/b"],
            "DNS name",
        ),
        (
            &["route", "del", "::ffff:10.0.0.1/104"],
            "::ffff:10.0.0.0/104",
        ),
    ] {
        let said = operator.run(words)?;
        // The first line names the mistake, which the command finds or the tunnel.
        let line = said.stderr.lines().next().unwrap_or_default();
        check(!said.status.success() && line.contains(part), || {
            format!("{words:?}: {said:?}")
        })?;
        let after = (operator.routes()?, own_routes(host)?);
        check(after == before, || format!("{words:?} changed something"))?;
    }
    stop(end).map(drop)
}
