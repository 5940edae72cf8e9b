//! The control socket: all commands, callers at the same time, and hostile clients.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use fastvpn::error::{Error, Result};
use ipnet::IpNet;
use nix::fcntl::AT_FDCWD;
use nix::sys::signal::Signal;
use nix::sys::stat::{UtimensatFlags, fstat, utimensat};
use nix::sys::time::TimeSpec;
use serde_json::Value;
use testbed::{Namespace, rss_bytes};

use crate::host::routes::{kernel_agrees, net, own_routes};
use crate::operator::{Operator, connect, said};
use crate::site::{inside, peer, prefixes, sites, underlay, underlay_v6, wait_for_each_other};
use crate::support::{FASTVPN, check, fail, fastvpn, hosts, stop, tried, wait_until};
use crate::tools::{Stream, inventory, nothing_left};

/// The table of the tunnel as `prefix: peer`.
fn table(operator: &Operator) -> Result<BTreeMap<IpNet, String>> {
    Ok(operator.routes()?.into_iter().collect())
}

#[testbed::trial]
fn all_commands() -> Result<()> {
    let network = sites(3)?;
    let [a, b, _] = &network.all[..] else {
        return fail("three sites");
    };
    let operator = Operator::new()?;
    let socket = operator.socket_text();
    let tunnels = [
        a.start(
            &[peer(2), peer_without(3)],
            &["--control", &socket, "--queues", "2"],
        )?,
        b.start(&[peer(1)], &[])?,
    ];
    operator.wait()?;
    wait_for_each_other(a, b)?;
    let (two, three) = (
        format!("{}:8285", underlay(2)),
        format!("{}:8285", underlay(3)),
    );

    let status = operator.ask("status")?;
    let expected: [(&str, Value); 7] = [
        ("pid", tunnels[0].pid().into()),
        ("tun", "fastvpn0".into()),
        ("mtu_bytes", 1472.into()),
        ("version", env!("CARGO_PKG_VERSION").into()),
        ("peers", 2.into()),
        ("prefixes", 4.into()),
        ("hop", false.into()),
    ];
    for (key, value) in expected {
        let found = &status[key];
        check(*found == value, || format!("{key} is {found}, not {value}"))?;
    }
    check(operator.counter("packets_sent")? > 0, || status.to_string())?;
    for answer in [
        &status,
        &operator.ask("peers")?,
        &operator.ask("route list")?,
    ] {
        check(!has_key_with_hyphen(answer), || answer.to_string())?;
    }
    for words in ["status", "peers", "route list", "route get 172.18.2.9"] {
        let text = operator.tell(words)?;
        check(
            text.contains(if words == "status" { "fastvpn0" } else { &two }),
            || format!("{words}: {text}"),
        )?;
        check(!text.trim_start().starts_with('{'), || {
            format!("{words}: {text}")
        })?;
    }

    let peers = operator.ask("peers")?;
    let entry = |name: &str| {
        let peers = peers["peers"].as_array();
        let found = peers.and_then(|peers| peers.iter().find(|peer| peer["peer"] == name));
        found
            .cloned()
            .ok_or_else(|| Error::new(format!("{name} is not among {peers:?}")))
    };
    let (second, third) = (entry(&two)?, entry(&three)?);
    check(
        second["endpoint"] == two && second["prefixes"] == 4 && second["is_default"] == false,
        || second.to_string(),
    )?;
    check(
        second["packets_sent"].as_u64() > Some(0) && second["packets_received"].as_u64() > Some(0),
        || second.to_string(),
    )?;
    check(
        third["is_default"] == true && third["prefixes"] == 0 && third["packets_received"] == 0,
        || third.to_string(),
    )?;

    // The peers' counters make up the tunnel's, as soon as all is quiet.
    wait_until("the peers' counters add up", || {
        let (status, peers) = (operator.ask("status")?, operator.ask("peers")?);
        let entries = peers["peers"].as_array();
        let sum =
            |key: &str| -> Option<u64> { entries?.iter().map(|peer| peer[key].as_u64()).sum() };
        let counters = [
            "packets_sent",
            "bytes_sent",
            "packets_received",
            "bytes_received",
        ];
        let adds_up =
            |key: &str| sum(key).is_some() && sum(key) == status["counters"][key].as_u64();
        Ok(counters.into_iter().all(adds_up))
    })?;

    // What goes where, changed in all ways.
    let mut expected: BTreeMap<IpNet, String> = BTreeMap::new();
    for prefix in prefixes(2).split(',') {
        expected.insert(net(prefix)?, two.clone());
    }
    let same = |expected: &BTreeMap<IpNet, String>| -> Result<()> {
        let found = table(&operator)?;
        check(found == *expected, || {
            format!("{found:?}, not {expected:?}")
        })
    };
    same(&expected)?;
    check(operator.peer_of("9.9.9.9")? == three, || "9.9.9.9".into())?;
    let changed = operator.ask(&format!(
        "route add 172.30.0.0/16 fd00:30::/32 --peer {}",
        underlay(2)
    ))?;
    check(changed["prefixes_added"] == 2, || changed.to_string())?;
    expected.insert(net("172.30.0.0/16")?, two.clone());
    expected.insert(net("fd00:30::/32")?, two.clone());
    same(&expected)?;
    let got = operator.ask("route get 172.30.1.1")?;
    check(
        got["prefix"] == "172.30.0.0/16" && got["peer"] == two,
        || got.to_string(),
    )?;
    // The port may be said or not; the same peer again is no contradiction.
    operator.tell(&format!("route add 172.30.0.0/16 --peer {three} --replace"))?;
    expected.insert(net("172.30.0.0/16")?, three.clone());
    same(&expected)?;
    operator.tell("route del fd00:30::/32")?;
    expected.remove(&net("fd00:30::/32")?);
    same(&expected)?;
    operator.tell("peer add 10.211.55.77:7777=172.31.0.0/16,172.30.7.0/24")?;
    for prefix in ["172.31.0.0/16", "172.30.7.0/24"] {
        expected.insert(net(prefix)?, "10.211.55.77:7777".into());
    }
    same(&expected)?;
    check(
        operator.peer_of("172.30.7.7")? == "10.211.55.77:7777",
        || "172.30.7.7".into(),
    )?;
    operator.tell("peer del 10.211.55.77:7777")?;
    expected.retain(|_, peer| !peer.contains("77:7777"));
    same(&expected)?;
    // The default peer goes, prefixes it was given and all.
    operator.tell(&format!("peer del {}", underlay(3)))?;
    expected.retain(|_, peer| *peer == two);
    same(&expected)?;
    operator.refuses("route get 9.9.9.9", &["9.9.9.9"])?;
    operator.tell(&format!("peer add {}", underlay(3)))?;
    check(operator.peer_of("9.9.9.9")? == three, || "9.9.9.9".into())?;
    wait_for_each_other(a, b)?;
    tunnels.into_iter().try_for_each(|end| stop(end).map(drop))
}

fn peer_without(number: u8) -> String {
    underlay(number).to_string()
}

/// Each with one line that says why, and nothing changed.
#[testbed::trial]
fn commands_that_are_refused() -> Result<()> {
    let network = sites(3)?;
    let a = &network.all[0];
    let operator = Operator::new()?;
    let socket = operator.socket_text();
    let end = a.start(&[peer(2), peer_without(3)], &["--control", &socket])?;
    operator.wait()?;
    let (before, peers) = (
        table(&operator)?,
        operator.ask("peers")?["peers"].to_string(),
    );
    let routes = own_routes(&a.host)?;
    let (two, three) = (underlay(2).to_string(), underlay(3).to_string());
    let (tunneled, own) = (inside(2)[0].to_string(), underlay(1).to_string());
    for (words, parts) in [
        (
            format!("route add 172.18.2.0/24 --peer {three}"),
            vec!["172.18.2.0/24", &two[..], "--replace"],
        ),
        (
            format!("route add 172.30.0.0/16 172.18.2.0/24 --peer {three}"),
            vec!["172.18.2.0/24"],
        ),
        (
            "route add 172.30.0.0/16 --peer 10.211.55.99".into(),
            vec!["10.211.55.99"],
        ),
        (
            format!("route add 172.30.0.0/16 --peer {two}:9"),
            vec!["10.211.55.2:9"],
        ),
        ("route del 172.30.0.0/16".into(), vec!["172.30.0.0/16"]),
        (
            "route del 172.18.2.0/24 172.30.0.0/16".into(),
            vec!["172.30.0.0/16"],
        ),
        ("route del 172.18.2.0/25".into(), vec!["172.18.2.0/25"]),
        (format!("peer add {two}=172.30.0.0/16"), vec![&two[..]]),
        (
            "peer add 10.211.55.99=172.18.2.0/24".into(),
            vec!["172.18.2.0/24", "10.211.55.99"],
        ),
        (
            "peer add 10.211.55.99".into(),
            vec!["10.211.55.99", &three[..]],
        ),
        ("peer add 0.0.0.0=172.30.0.0/16".into(), vec!["0.0.0.0"]),
        ("peer add 224.0.0.9=172.30.0.0/16".into(), vec!["224.0.0.9"]),
        (
            format!("peer add [{}]=172.30.0.0/16", underlay_v6(2)),
            vec!["fd00:55::2"],
        ),
        // A peer whose datagrams would go through the tunnel itself.
        (
            format!("peer add {tunneled}=172.30.0.0/16"),
            vec![&tunneled[..]],
        ),
        (format!("peer add {own}=172.30.0.0/16"), vec![&own[..]]),
        ("peer del 10.211.55.99".into(), vec!["10.211.55.99"]),
        ("peer del 10.211.55.2:9".into(), vec!["10.211.55.2:9"]),
    ] {
        operator.refuses(&words, &parts)?;
        let unchanged = table(&operator)? == before
            && operator.ask("peers")?["peers"].as_array().map(Vec::len) == Some(2)
            && own_routes(&a.host)? == routes;
        check(unchanged, || {
            format!("{words} has changed something: {peers}")
        })?;
    }
    stop(end).map(drop)
}

#[testbed::trial]
fn commands_without_a_tunnel() -> Result<()> {
    let operator = Operator::new()?;
    let socket = operator.socket_text();
    for words in ["status", "peers", "route list", "reload", "stop"] {
        operator.refuses(words, &[&socket])?;
    }
    // A socket that nobody serves.
    drop(tried(
        "listen",
        std::os::unix::net::UnixListener::bind(operator.socket()),
    )?);
    operator.refuses("status", &[&socket])
}

#[testbed::trial]
fn stopped_by_an_operator() -> Result<()> {
    let network = sites(2)?;
    let a = &network.all[0];
    let before = inventory(&a.host)?;
    let operator = Operator::new()?;
    let socket = operator.socket_text();
    for json in [false, true] {
        let end = a.start(&[peer(2)], &["--control", &socket])?;
        operator.wait()?;
        if json {
            operator.ask("stop")?;
        } else {
            operator.tell("stop")?;
        }
        let ended = end.wait()?;
        check(ended.status.code() == Some(0), || ended.log.clone())?;
        check(ended.log.contains("dropped: "), || ended.log)?;
        nothing_left(&a.host, &before)?;
        check(!operator.socket().exists(), || "the socket is left".into())?;
    }
    Ok(())
}

/// Nobody else may use it; it goes with its process; a dead one is replaced,
/// a live one is not, and nothing else is.
#[testbed::trial]
fn the_sockets_file() -> Result<()> {
    let hosts = hosts(1500)?;
    let operator = Operator::new()?;
    let socket = operator.socket_text();
    let flags = format!("--peer 10.211.55.123 --control {socket}");
    let mut end = fastvpn(&hosts.a, &flags)?;
    operator.wait()?;
    let metadata = tried("examine the socket", std::fs::metadata(operator.socket()))?;
    let mode = metadata.permissions().mode() & 0o777;
    check(mode == 0o600, || format!("mode {mode:o}"))?;

    // Another tunnel wants the same path.
    let other = fastvpn(&hosts.b, &flags.replace("123", "122"))?.wait()?;
    check(other.status.code() == Some(1), || other.log.clone())?;
    check(
        other.log.lines().count() == 1 && other.log.contains(&socket),
        || other.log.clone(),
    )?;
    let pid = operator.ask("status")?["pid"].as_u64();
    check(pid == Some(end.pid().into()), || format!("{pid:?} answers"))?;

    // Killed and started anew, with the same flags.
    for _ in 0..3 {
        end.child().signal(Signal::SIGKILL);
        end.wait()?;
        check(operator.socket().exists(), || "who removed it?".into())?;
        end = fastvpn(&hosts.a, &flags)?;
        operator.wait()?;
        let pid = operator.ask("status")?["pid"].as_u64();
        check(pid == Some(end.pid().into()), || format!("{pid:?} answers"))?;
    }
    stop(end)?;
    check(!operator.socket().exists(), || "the socket is left".into())?;

    // Somebody's file.
    operator.write("control.sock", "precious")?;
    let ended = fastvpn(&hosts.a, &flags)?.wait()?;
    check(
        ended.status.code() == Some(1) && ended.log.contains(&socket),
        || ended.log.clone(),
    )?;
    let text = tried("read a file", std::fs::read_to_string(operator.socket()))?;
    check(text == "precious", || "the file has changed".into())
}

/// `fastvpn COMMAND` in the tunnel's namespace, without `--control`, finds the
/// tunnel by its device's name; in another namespace it does not.
#[testbed::trial]
fn the_sockets_default_path() -> Result<()> {
    let hosts = hosts(1500)?;
    let ends = [
        fastvpn(&hosts.a, "--peer 10.211.55.123")?,
        fastvpn(&hosts.b, "--peer 10.211.55.122 --tun other0")?,
    ];
    let ask = |namespace: &Namespace, words: &[&str]| {
        let mut command = Command::new(FASTVPN);
        command.args(words);
        said(namespace, command)
    };
    for (namespace, end, words) in [
        (&hosts.a, &ends[0], &["status", "--json"][..]),
        (&hosts.b, &ends[1], &["status", "--json", "--tun", "other0"]),
    ] {
        let mut answer = String::new();
        wait_until("the tunnel answers at its default path", || {
            answer = ask(namespace, words)?.stdout;
            Ok(!answer.is_empty())
        })?;
        let status: Value = serde_json::from_str(&answer)
            .map_err(|error| Error::new(format!("{error} in {answer:?}")))?;
        check(status["pid"] == end.pid(), || answer.clone())?;
    }
    let elsewhere = ask(&hosts.b, &["peers"])?;
    check(elsewhere.status.code() == Some(1), || {
        format!("{elsewhere:?}")
    })?;
    ends.into_iter().try_for_each(|end| stop(end).map(drop))
}

/// A tunnel that was killed in a network namespace that is gone has no next process of its
/// own. The next one in another namespace removes its socket, and leaves those of running
/// tunnels alone.
#[testbed::trial(needs_root)]
fn dead_sockets_of_other_namespaces_are_removed() -> Result<()> {
    let (doomed, hosts) = (hosts(1500)?, hosts(1500)?);
    let start = |namespace: &Namespace| -> Result<_> {
        let end = fastvpn(namespace, "--peer 10.211.55.99")?;
        let inode = tried(
            "find a namespace's number",
            fstat(namespace.fd()).map_err(Into::into),
        )?
        .st_ino;
        let path = PathBuf::from(format!("/run/fastvpn/fastvpn0-{inode}.sock"));
        wait_until("the control socket answers", || {
            Ok(UnixStream::connect(&path).is_ok())
        })?;
        Ok((end, path))
    };
    let (mut killed, dead) = start(&doomed.a)?;
    let (first, living) = start(&hosts.a)?;
    killed.child().signal(Signal::SIGKILL);
    killed.wait()?;
    drop(doomed);
    check(dead.exists(), || "who removed it?".into())?;
    // As if it had been killed long ago: others are perhaps of processes that start.
    let (epoch, flags) = (TimeSpec::new(0, 0), UtimensatFlags::NoFollowSymlink);
    for path in [&dead, &living] {
        let changed = utimensat(AT_FDCWD, path, &epoch, &epoch, flags);
        tried("make a socket old", changed.map_err(Into::into))?;
    }
    let (second, _) = start(&hosts.b)?;
    check(!dead.exists(), || "the dead socket is left".into())?;
    let answer = tried("connect", UnixStream::connect(&living));
    check(answer.is_ok(), || format!("{answer:?}"))?;
    stop(first)?;
    stop(second).map(drop)
}

/// Whatever the order, each prefix has one peer, and the kernel's routes are
/// those of the table.
#[testbed::trial]
fn two_operators_at_once() -> Result<()> {
    const ROUNDS: usize = 12;
    const PREFIXES: usize = 40;
    let network = sites(3)?;
    let a = &network.all[0];
    let operator = Operator::new()?;
    let socket = operator.socket_text();
    let end = a.start(&[peer(2), peer(3)], &["--control", &socket])?;
    operator.wait()?;
    let many: Vec<String> = (0..PREFIXES)
        .map(|number| format!("172.30.{number}.0/24"))
        .collect();
    let (front, back) = many.split_at(PREFIXES / 2);
    let work = |number: u8, first: &[String]| -> Result<[usize; 2]> {
        let host = underlay(number).to_string();
        let (mut done, mut refused) = (0, 0);
        let mut run = |words: &[&str]| -> Result<()> {
            let said = operator.run(words)?;
            match said.status.code() {
                Some(0) => done += 1,
                Some(1) if said.stderr.lines().count() == 1 => refused += 1,
                _ => return fail(format!("{words:?}: {said:?}")),
            }
            Ok(())
        };
        for round in 0..ROUNDS {
            let all: Vec<&str> = many.iter().map(String::as_str).collect();
            let own: Vec<&str> = first.iter().map(String::as_str).collect();
            let mut words = vec!["route", "add"];
            words.extend(&all);
            words.extend(["--peer", &host, "--replace"]);
            run(&words)?;
            let mut words = vec!["route", "del"];
            words.extend(&own);
            run(&words)?;
            // Without --replace: all of them or none.
            let mut words = vec!["route", "add"];
            words.extend(&own);
            words.extend(["--peer", &host]);
            run(&words)?;
            let third = format!("10.211.55.{}=172.31.{round}.0/24", 100 + number);
            run(&["peer", "add", &third])?;
            let third = third
                .split_once('=')
                .map_or("", |(host, _)| host)
                .to_string();
            run(&["peer", "del", &third])?;
        }
        Ok([done, refused])
    };
    let counts = std::thread::scope(|scope| {
        let threads = [
            scope.spawn(|| work(2, front)),
            scope.spawn(|| work(3, back)),
        ];
        threads.map(|thread| match thread.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        })
    });
    for count in counts {
        let [done, refused] = count?;
        // Replacing always works, and so does what is one's own.
        check(done >= 3 * ROUNDS, || {
            format!("{done} done, {refused} refused")
        })?;
    }
    let routes = operator.routes()?;
    kernel_agrees(&a.host, &operator)?;
    let prefixes: BTreeSet<IpNet> = routes.iter().map(|(prefix, _)| *prefix).collect();
    for (prefix, peer) in &routes {
        let found = operator.peer_of(&prefix.addr().to_string())?;
        let is_same = found == *peer
            || prefixes
                .iter()
                .any(|other| other != prefix && other.contains(prefix));
        check(is_same, || {
            format!("{prefix} is {peer}'s, and goes to {found}")
        })?;
    }
    stop(end).map(drop)
}

/// Things that no operator sends.
fn nonsense() -> Vec<Vec<u8>> {
    let mut lines: Vec<Vec<u8>> = [
        "",
        "\n\n\n",
        "hello\n",
        "{}\n",
        "[]\n",
        "null\n",
        "\"status\"\n",
        "{\"command\":\"status\"",
        "{\"command\":\"status\",\"more\":1}\n",
        "{\"command\":\"launch\"}\n",
        "{\"command\":\"route-del\",\"prefixes\":\"172.18.2.0/24\"}\n",
        "{\"command\":\"route-add\",\"peer\":\"10.211.55.2\",\"prefixes\":[\"172.30.0.0/99\"]}\n",
        "{\"command\":\"takeover\",\"protocol\":4294967295}\n",
        "{\"command\":\"takeover\",\"protocol\":-1}\n",
        "GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        "\u{feff}{\"command\":\"status\"}\n",
    ]
    .iter()
    .map(|line| line.as_bytes().to_vec())
    .collect();
    lines.push(vec![0; 10_000]);
    lines.push(vec![0xff; 10_000]);
    lines.push([vec![b'['; 200_000], vec![b'\n']].concat());
    lines.push(
        [
            b"{\"command\":\"".to_vec(),
            vec![b'x'; 1 << 20],
            b"\"}\n".to_vec(),
        ]
        .concat(),
    );
    lines.push(crate::support::noise(7, 100_000));
    // Without an end.
    lines.push(vec![b' '; 8 << 20]);
    lines
}

/// Traffic flows, memory is bounded, and operators are answered.
#[testbed::trial]
fn hostile_clients() -> Result<()> {
    const CLIENTS: usize = 100;
    const GROWTH_MAX: u64 = 64 << 20;
    let network = sites(2)?;
    let [a, b] = &network.all[..] else {
        return fail("two sites");
    };
    let operator = Operator::new()?;
    let socket = operator.socket_text();
    let tunnels = [
        a.start(&[peer(2)], &["--control", &socket, "--queues", "1"])?,
        b.start(&[peer(1)], &["--queues", "1"])?,
    ];
    operator.wait()?;
    wait_for_each_other(a, b)?;
    let (routes, table) = (own_routes(&a.host)?, operator.routes()?);
    let stream = Stream::start(&a.container, &b.container, inside(2)[0])?;
    stream.wait_for_progress()?;
    let before = rss_bytes(tunnels[0].pid())?;

    // One after the other, each hung up on or hanging up.
    for bytes in nonsense() {
        let mut client = operator.connect()?;
        // One that sends too much may be cut off.
        let _ = client.write_all(&bytes);
        let _ = client.shutdown(Shutdown::Write);
        let mut answer = Vec::new();
        let _ = client.read_to_end(&mut answer);
        let text = String::from_utf8_lossy(&answer);
        check(!text.contains("\"ok\":true"), || {
            let shown = String::from_utf8_lossy(&bytes[..bytes.len().min(60)]).into_owned();
            format!("{shown:?} was answered with {text}")
        })?;
        operator.tell("status")?;
    }
    stream.wait_for_progress()?;

    // Connections that say nothing, or half of something.
    let path = operator.socket();
    let crowd = |say: &[u8]| -> Vec<UnixStream> {
        let enter = |_| {
            let mut client = connect(&path).ok()?;
            client.set_nonblocking(true).ok()?;
            let _ = client.write(say);
            Some(client)
        };
        (0..CLIENTS).filter_map(enter).collect()
    };
    for say in [&b""[..], b"{\"command\":"] {
        let clients = crowd(say);
        check(clients.len() > 8, || {
            format!("{} connections", clients.len())
        })?;
        stream.wait_for_progress()?;
        drop(clients);
        operator.wait()?;
    }
    // Clients that ask a lot and read nothing.
    let questions = b"{\"command\":\"route-list\"}\n".repeat(20_000);
    let clients = crowd(&questions);
    for _ in 0..20 {
        for mut client in &clients {
            let _ = client.write(&questions);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    stream.wait_for_progress()?;
    drop(clients);
    operator.wait()?;

    let grown = rss_bytes(tunnels[0].pid())?.saturating_sub(before);
    check(grown < GROWTH_MAX, || format!("grew by {grown} bytes"))?;
    stream.wait_for_progress()?;
    stream.finish()?;
    check(
        operator.routes()? == table && own_routes(&a.host)? == routes,
        || "something has changed".into(),
    )?;
    wait_for_each_other(a, b)?;
    tunnels.into_iter().try_for_each(|end| stop(end).map(drop))
}

/// Programs name the keys of an answer as they name variables.
fn has_key_with_hyphen(value: &Value) -> bool {
    match value {
        Value::Array(values) => values.iter().any(has_key_with_hyphen),
        Value::Object(members) => {
            let mut members = members.iter();
            members.any(|(key, value)| key.contains('-') || has_key_with_hyphen(value))
        }
        _ => false,
    }
}
