//! The configuration file: what it says counts, what is wrong in it is said
//! with the place, and it is read again while traffic flows.

use std::collections::BTreeSet;
use std::process::Command;

use fastvpn::error::{Error, Result};
use ipnet::IpNet;
use nix::sys::signal::Signal;
use testbed::Namespace;

use crate::host::routes::own_routes;
use crate::operator::{Operator, is_refusal, said};
use crate::routing::mesh::hop_limit_between;
use crate::site::{Site, addresses, inside, peer, prefixes, sites, underlay, wait_for_each_other};
use crate::support::{FASTVPN, Tunnel, check, fail, link, stop, tried, wait_until};
use crate::tools::{Stream, inventory, nothing_left};

/// A peer in a configuration file.
fn peer_table(endpoint: &str, prefixes: &str) -> String {
    let list: Vec<_> = prefixes
        .split(',')
        .map(|prefix| format!("{prefix:?}"))
        .collect();
    format!(
        "\n[[peer]]\nendpoint = {endpoint:?}\nprefixes = [{}]\n",
        list.join(", ")
    )
}

/// A host's addresses in a configuration file.
fn address_line(number: u8) -> String {
    format!("address = {:?}\n", addresses(number))
}

/// A site's part of a file, and all of its peers.
fn file(number: u8, peers: &[u8]) -> String {
    let mut text = address_line(number);
    for peer in peers {
        text += &peer_table(&underlay(*peer).to_string(), &prefixes(*peer));
    }
    text
}

fn start(site: &Site, file: &str, operator: &Operator, flags: &[&str]) -> Result<Tunnel> {
    let socket = operator.socket_text();
    let all = [&["--config", file, "--control", &socket][..], flags].concat();
    let tunnel = Tunnel::start(&site.host, &all)?;
    operator.wait()?;
    Ok(tunnel)
}

#[testbed::trial]
fn a_tunnel_from_a_file() -> Result<()> {
    let network = sites(2)?;
    let [a, b] = &network.all[..] else {
        return fail("two sites");
    };
    let operator = Operator::new()?;
    let settings = "mtu = 1300\nqueues = 2\nhop = true\ntxqueuelen = 777\n";
    let text = format!("# A comment.\n{settings}{}", file(1, &[2]));
    let path = operator.write("fastvpn.toml", &text)?;
    let far = b.start(&[peer(1)], &[])?;
    for (flags, mtu_bytes) in [(&[][..], 1300), (&["--mtu", "1350"], 1350)] {
        let tunnel = start(a, &path, &operator, flags)?;
        wait_for_each_other(a, b)?;
        let link = link(&a.host, "fastvpn0")?;
        check(link.mtu == mtu_bytes && link.txqueuelen == 777, || {
            format!("{link:?}")
        })?;
        let status = operator.ask("status")?;
        check(
            status["hop"] == true && status["workers"].as_array().map(Vec::len) == Some(2),
            || status.to_string(),
        )?;
        check(hop_limit_between(a, b, 0)? == 61, || "not a hop".into())?;
        stop(tunnel)?;
    }
    // Peers on the command line are in place of the file's.
    let tunnel = start(
        a,
        &path,
        &operator,
        &["--peer", "10.211.55.99=172.30.0.0/16"],
    )?;
    let routes = operator.routes()?;
    check(
        routes.len() == 1 && routes[0].1 == "10.211.55.99:8285",
        || format!("{routes:?}"),
    )?;
    stop(tunnel)?;
    stop(far).map(drop)
}

/// Starts with a bad file must fail with one line that has these parts.
fn refuses(namespace: &Namespace, path: &str, parts: &[&str]) -> Result<()> {
    let before = inventory(namespace)?;
    let mut command = Command::new(FASTVPN);
    command.args(["--config", path]);
    is_refusal(&said(namespace, command)?, parts)?;
    nothing_left(namespace, &before)
}

/// Files that are wrong, and where: line, column, as far as TOML knows.
fn mistakes() -> Vec<(String, String, &'static str)> {
    let good = file(1, &[2]);
    let mut mistakes = Vec::new();
    let mut add = |text: String, place: &str, part: &'static str| {
        mistakes.push((text, place.to_string(), part));
    };
    add(format!("mtv = 1300\n{good}"), ":1:1: ", "mtv");
    add(format!("\n\n  colour = 'red'\n{good}"), ":3:3: ", "colour");
    add(format!("mtu = \"many\"\n{good}"), ":1:7: ", "many");
    add(format!("mtu = 1\n{good}"), "", "mtu 1 ");
    add(format!("mtu = \n{good}"), ":1:", "");
    add(format!("{good}weight = 3\n"), ":6:1: ", "weight");
    add(format!("{good}[other]\n"), ":6:", "other");
    add(
        good.replace("172.18.2.0/24", "172.18.2.1/24"),
        "",
        "172.18.2.1/24",
    );
    add(good.replace("172.18.2.0/24", "green"), ":5:", "green");
    add(
        format!("{good}{}", peer_table("10.211.55.3", "172.18.2.0/24")),
        "",
        "172.18.2.0/24",
    );
    add(
        format!("{good}{}", peer_table("10.211.55.2", "172.30.0.0/16")),
        "",
        "10.211.55.2",
    );
    add(good.replace("endpoint = ", "endpoint: "), ":4:", "");
    mistakes
}

#[testbed::trial]
fn a_file_with_a_mistake() -> Result<()> {
    let network = sites(1)?;
    let host = &network.all[0].host;
    let operator = Operator::new()?;
    for (text, place, part) in mistakes() {
        let path = operator.write("fastvpn.toml", &text)?;
        let place = format!("{path}{place}");
        refuses(host, &path, &[&place, part])
            .map_err(|error| Error::new(format!("{error} of:\n{text}")))?;
    }
    let missing = operator.path("missing.toml").display().to_string();
    refuses(host, &missing, &[&missing])?;
    // A directory, and what is no text.
    let directory = operator.path(".").display().to_string();
    refuses(host, &directory, &[&directory])?;
    let path = operator.write("fastvpn.toml", "")?;
    tried("write a file", std::fs::write(&path, [0xff, 0xfe, b'\n']))?;
    refuses(host, &path, &[&path])
}

/// The same on the command line.
#[testbed::trial]
fn peers_that_contradict() -> Result<()> {
    let network = sites(1)?;
    let host = &network.all[0].host;
    for (flags, parts) in [
        (
            "--peer 10.211.55.2=172.30.0.0/16 --peer 10.211.55.3=172.31.0.0/16,172.30.0.0/16",
            &["172.30.0.0/16", "10.211.55.2", "10.211.55.3"][..],
        ),
        (
            "--peer 10.211.55.2=fd00:30::/32 --peer 10.211.55.3=fd00:30:0::/32",
            &["fd00:30::/32", "10.211.55.2", "10.211.55.3"],
        ),
        (
            "--peer 10.211.55.2 --peer 10.211.55.3=172.30.0.0/16 --peer 10.211.55.4",
            &["10.211.55.2", "10.211.55.4"],
        ),
        (
            "--peer 10.211.55.2=172.30.0.0/16 --peer 10.211.55.2:8285=172.31.0.0/16",
            &["10.211.55.2"],
        ),
        (
            "--peer 10.211.55.2=172.30.0.0/16 --peer ::ffff:10.211.55.2=172.31.0.0/16",
            &["10.211.55.2"],
        ),
        (
            "--peer far.example=172.30.0.0/16 --peer FAR.example.=172.31.0.0/16",
            &["FAR.example"],
        ),
    ] {
        let before = inventory(host)?;
        let mut command = Command::new(FASTVPN);
        command.args(flags.split_whitespace());
        is_refusal(&said(host, command)?, parts)?;
        nothing_left(host, &before)?;
    }
    Ok(())
}

/// They end other programs; this one has nothing to read, says so, and goes on.
/// However many there are, the signal to end is obeyed.
#[testbed::trial]
fn hangups_without_a_file() -> Result<()> {
    let network = sites(2)?;
    let [a, b] = &network.all[..] else {
        return fail("two sites");
    };
    let operator = Operator::new()?;
    let socket = operator.socket_text();
    let mut tunnel = a.start(&[peer(2)], &["--control", &socket])?;
    let far = b.start(&[peer(1)], &[])?;
    wait_for_each_other(a, b)?;
    let table = operator.routes()?;
    for _ in 0..1000 {
        tunnel.child().signal(Signal::SIGHUP);
    }
    wait_for_each_other(a, b)?;
    check(operator.routes()? == table, || "another table".into())?;
    let pid = operator.ask("status")?["pid"].as_u64();
    check(pid == Some(tunnel.pid().into()), || "not the same".into())?;
    for _ in 0..1000 {
        tunnel.child().signal(Signal::SIGHUP);
    }
    tunnel.child().signal(Signal::SIGTERM);
    let ended = tunnel.wait()?;
    check(ended.status.code() == Some(0), || ended.log)?;
    stop(far).map(drop)
}

/// Peers come and go by the file, by a signal and by a command; what stays is
/// not disturbed.
#[testbed::trial(each_engine)]
fn reloads_under_a_tcp_stream() -> Result<()> {
    let network = sites(4)?;
    let [a, b, c, d] = &network.all[..] else {
        return fail("four sites");
    };
    let operator = Operator::new()?;
    let path = operator.write("fastvpn.toml", &file(1, &[2, 3]))?;
    let mut tunnel = start(a, &path, &operator, &["--queues", "2"])?;
    let mut others = Vec::new();
    for site in [b, c, d] {
        others.push(site.start(&[peer(1)], &["--queues", "2"])?);
    }
    wait_for_each_other(a, b)?;
    wait_for_each_other(a, c)?;
    let streams = [
        Stream::start(&a.container, &b.container, inside(2)[0])?,
        Stream::start(&b.container, &a.container, inside(1)[1])?,
    ];
    let peers = || -> Result<BTreeSet<String>> {
        Ok(operator
            .routes()?
            .into_iter()
            .map(|(_, peer)| peer)
            .collect())
    };
    for round in 0..4 {
        streams.iter().try_for_each(Stream::wait_for_progress)?;
        // Site 4 comes and site 3 goes, and the other way around.
        let present: [u8; 2] = if round % 2 == 0 { [2, 4] } else { [3, 2] };
        operator.write("fastvpn.toml", &file(1, &present))?;
        let expected: BTreeSet<_> = present
            .iter()
            .map(|number| format!("{}:8285", underlay(*number)))
            .collect();
        if round < 2 {
            tunnel.child().signal(Signal::SIGHUP);
            wait_until("the signal is obeyed", || Ok(peers()? == expected))?;
        } else {
            let answer = operator.ask("reload")?;
            check(
                answer["peers_added"] == 1
                    && answer["peers_removed"] == 1
                    && answer["prefixes_added"] == 4
                    && answer["prefixes_removed"] == 4,
                || answer.to_string(),
            )?;
            check(peers()? == expected, || "other peers".into())?;
        }
        let wanted: BTreeSet<IpNet> = operator.routes()?.into_iter().map(|(net, _)| net).collect();
        check(wanted.len() == 8 && own_routes(&a.host)? == wanted, || {
            "the kernel's routes are others".into()
        })?;
        let new = if round % 2 == 0 { d } else { c };
        wait_for_each_other(a, new)?;
        streams.iter().try_for_each(Stream::wait_for_progress)?;
    }
    // The file as it is: nothing to do.
    let answer = operator.ask("reload")?;
    check(
        answer["peers_added"] == 0 && answer["prefixes_removed"] == 0,
        || answer.to_string(),
    )?;
    // Settings that can change, do.
    let text = format!("hop = true\nmtu = 1400\n{}", file(1, &[2, 3]));
    operator.write("fastvpn.toml", &text)?;
    operator.tell("reload")?;
    check(link(&a.host, "fastvpn0")?.mtu == 1400, || {
        "the MTU stays".into()
    })?;
    wait_until("the tunnel is a hop", || {
        Ok(hop_limit_between(a, b, 0)? == 61)
    })?;
    let [v4, v6] = addresses(1);
    let more = [&v4, "10.244.0.101/32", &v6, "fd00:244::101/128"];
    let addresses_now = || -> Result<BTreeSet<String>> {
        let index = link(&a.host, "fastvpn0")?.index;
        let all = a.host.netlink()?.addresses()?;
        let own = all.into_iter().filter(|(owner, _)| *owner == index);
        let texts = own.map(|(_, net)| net.to_string());
        Ok(texts.filter(|net| !net.starts_with("fe80:")).collect())
    };
    for list in [&more[..], &[&v4, &v6]] {
        let expected: BTreeSet<_> = list.iter().map(|net| net.to_string()).collect();
        let text = file(1, &[2, 3]).replacen(&address_line(1), &format!("address = {list:?}\n"), 1);
        operator.write("fastvpn.toml", &text)?;
        operator.tell("reload")?;
        let found = addresses_now()?;
        check(found == expected, || format!("{found:?}, not {expected:?}"))?;
        let wanted: BTreeSet<IpNet> = operator.routes()?.into_iter().map(|(net, _)| net).collect();
        check(own_routes(&a.host)? == wanted, || "other routes".into())?;
        streams.iter().try_for_each(Stream::wait_for_progress)?;
    }
    for stream in streams {
        stream.finish()?;
    }
    stop(tunnel)?;
    others.into_iter().try_for_each(|end| stop(end).map(drop))
}

/// Each mistake is told, in the answer or in the log, and the tunnel goes on as
/// before.
#[testbed::trial(each_engine)]
fn a_bad_file_changes_nothing() -> Result<()> {
    let network = sites(2)?;
    let [a, b] = &network.all[..] else {
        return fail("two sites");
    };
    let operator = Operator::new()?;
    let good = file(1, &[2]);
    let path = operator.write("fastvpn.toml", &good)?;
    let mut tunnel = start(a, &path, &operator, &["--queues", "1"])?;
    let far = b.start(&[peer(1)], &["--queues", "1"])?;
    wait_for_each_other(a, b)?;
    let stream = Stream::start(&a.container, &b.container, inside(2)[0])?;
    let (table, routes) = (operator.routes()?, own_routes(&a.host)?);
    let unchanged = || -> Result<()> {
        let same = operator.routes()? == table && own_routes(&a.host)? == routes;
        check(same, || "something has changed".into())
    };
    let mut places = Vec::new();
    for (text, place, part) in mistakes() {
        operator.write("fastvpn.toml", &text)?;
        let place = format!("{path}{place}");
        operator
            .refuses("reload", &[&place, part])
            .map_err(|error| Error::new(format!("{error} of:\n{text}")))?;
        unchanged()?;
        places.push(place);
    }
    // A peer that is this host itself is found out only by a look at the host.
    let itself = peer_table(&underlay(1).to_string(), "172.30.0.0/16");
    operator.write("fastvpn.toml", &format!("{good}{itself}"))?;
    operator.refuses("reload", &["10.211.55.1"])?;
    unchanged()?;
    std::fs::remove_file(&path).map_err(|cause| Error::os("cannot remove a file", cause))?;
    operator.refuses("reload", &[&path])?;
    unchanged()?;

    operator.write("fastvpn.toml", "what = 'is this'\n")?;
    tunnel.child().signal(Signal::SIGHUP);
    // In order behind the signal.
    wait_until("the signal is obeyed", || {
        let status = operator.ask("status")?;
        Ok(status["reload_error"]
            .as_str()
            .is_some_and(|error| error.contains("what")))
    })?;
    unchanged()?;
    stream.wait_for_progress()?;
    operator.write("fastvpn.toml", &good)?;
    operator.tell("reload")?;
    unchanged()?;
    stream.wait_for_progress()?;
    stream.finish()?;
    let ended = stop(tunnel)?;
    let told = ended
        .log
        .lines()
        .any(|line| line.contains(&format!("{path}:1:1: ")) && line.contains("what"));
    check(told, || ended.log.clone())?;
    stop(far).map(drop)
}
