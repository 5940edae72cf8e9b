//! One process takes over from another while traffic flows.

use std::collections::BTreeSet;
use std::fs::{self, Permissions};
use std::io::{BufRead, BufReader, Write};
use std::net::Shutdown;
use std::os::unix::fs::PermissionsExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use fastvpn::daemon::handoff::PROTOCOL;
use fastvpn::error::{Error, Result};
use nix::sys::signal::Signal;
use serde_json::json;
use testbed::Namespace;

use crate::host::routes::{kernel_agrees, own_routes};
use crate::numbered::{self, Sink, Streams};
use crate::operator::Operator;
use crate::packets::TUNNEL_NAME;
use crate::routing::mesh::hop_limit_between;
use crate::site::{Site, Sites, inside, peer, sites, tunnel, underlay, wait_for_each_other};
use crate::support::{
    Ended, TUNNEL, Tunnel, check, fail, fastvpn, hosts, link, stop, tried, udp, wait_for,
    wait_until, without_backlog_drops,
};
use crate::tools::{RouteCommand, Stream, inventory, ip_route, main_routes, nothing_left};
use crate::wireguard::secrets::SECRETS;

/// Two sites; the first one's process is what is taken over.
pub struct Stage {
    network: Sites,
    /// Of the first site.
    pub operator: Operator,
    /// What all processes are told besides.
    flags: Vec<String>,
}

impl Stage {
    /// Without processes.
    pub fn new() -> Result<Self> {
        Ok(Self {
            network: sites(2)?,
            operator: Operator::new()?,
            flags: Vec::new(),
        })
    }

    /// The same, for tunnels that encrypt.
    pub fn encrypted() -> Result<Self> {
        let mut stage = Self::new()?;
        let file = stage.operator.write("secret", SECRETS[0])?;
        let protected = fs::set_permissions(&file, Permissions::from_mode(0o600));
        tried("protect a file", protected)?;
        stage.flags = vec!["--secret-file".into(), file];
        Ok(stage)
    }

    /// All flags of a process.
    fn flags<'a>(&'a self, flags: &[&'a str]) -> Vec<&'a str> {
        let own = self.flags.iter().map(String::as_str);
        own.chain(flags.iter().copied()).collect()
    }

    /// Whose process is taken over.
    pub fn near(&self) -> &Site {
        &self.network.all[0]
    }

    /// The other.
    pub fn far(&self) -> &Site {
        &self.network.all[1]
    }

    /// Starts a process at the near site.
    pub fn start(&self, flags: &[&str]) -> Result<Tunnel> {
        let socket = self.operator.socket_text();
        let all = [&["--queues", "2", "--control", &socket][..], flags].concat();
        self.near().start(&[peer(2)], &self.flags(&all))
    }

    /// Both ends of a tunnel.
    pub fn play(&self) -> Result<(Tunnel, Tunnel)> {
        let flags = self.flags(&["--queues", "2"]);
        let far = self.far().start(&[peer(1)], &flags)?;
        let near = self.start(&[])?;
        self.operator.wait()?;
        wait_for_each_other(self.near(), self.far())?;
        Ok((near, far))
    }

    /// The process that answers operators.
    pub fn pid(&self) -> Result<Option<u64>> {
        Ok(self.operator.ask("status")?["pid"].as_u64())
    }

    /// Starts a new process, and waits for the end of the old process.
    pub fn take_over(&self, old: Tunnel, flags: &[&str]) -> Result<(Tunnel, Ended)> {
        let new = self.start(&[&["--takeover"], flags].concat())?;
        let ended = old.wait()?;
        check(ended.status.code() == Some(0), || {
            format!("{}:\n{}", ended.status, ended.log)
        })?;
        wait_until("the new process answers", || {
            Ok(self.operator.run(&["status"])?.status.success())
        })?;
        check(self.pid()? == Some(new.pid().into()), || {
            "somebody else answers".into()
        })?;
        Ok((new, ended))
    }
}

/// What others see of a tunnel: the device, its addresses, routes, and the
/// number of sockets.
pub fn appearance(namespace: &Namespace) -> Result<(u32, BTreeSet<String>, Vec<String>)> {
    let index = link(namespace, "fastvpn0")?.index;
    let routes = main_routes(namespace)?;
    let mut routes: Vec<_> = routes.iter().map(|route| format!("{route:?}")).collect();
    routes.sort();
    // Addresses, but not the ports that workers send from.
    let all = inventory(namespace)?;
    let lasting = all.into_iter().filter(|item| !item.contains("socket"));
    Ok((index, lasting.collect(), routes))
}

/// The device's index, its MTU and the length of its queue, and whether it is up.
pub fn device(namespace: &Namespace) -> Result<(u32, u32, u32, bool)> {
    let link = link(namespace, TUNNEL_NAME)?;
    Ok((link.index, link.mtu, link.txqueuelen, link.up))
}

/// The longest time in which nothing arrived while work was done.
fn longest_stall(streams: &[Stream], work: impl FnOnce() -> Result<()> + Send) -> Result<Duration> {
    std::thread::scope(|scope| {
        let working = scope.spawn(work);
        let mut longest = Duration::ZERO;
        let mut since: Vec<_> = streams
            .iter()
            .map(|stream| (stream.arrived_bytes(), Instant::now()))
            .collect();
        while !working.is_finished() {
            for (stream, (bytes, at)) in streams.iter().zip(&mut since) {
                let now = stream.arrived_bytes();
                if now == *bytes {
                    longest = longest.max(at.elapsed());
                } else {
                    (*bytes, *at) = (now, Instant::now());
                }
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        match working.join() {
            Ok(result) => result.map(|()| longest),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

/// The kernel's routes are there all the time while work is done.
fn routes_stay<T: Send>(
    namespace: &Namespace,
    work: impl FnOnce() -> Result<T> + Send,
) -> Result<T> {
    let wanted = own_routes(namespace)?;
    std::thread::scope(|scope| {
        let working = scope.spawn(work);
        while !working.is_finished() {
            let own = own_routes(namespace)?;
            check(own == wanted, || format!("routes {own:?}, not {wanted:?}"))?;
        }
        match working.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

/// TCP in both directions goes on, as if nothing had happened.
#[testbed::trial(each_engine, mixed)]
fn taken_over_twice_in_a_stream() -> Result<()> {
    /// A connection that has lost more than a window's worth stands still for
    /// longer.
    const STALL_MAX: Duration = Duration::from_secs(5);
    /// More than fits a window of these streams.
    const RETRANSMISSIONS_MAX: u64 = 1000;
    let stage = Stage::new()?;
    let (mut near, far) = stage.play()?;
    // Changes at run time are handed on, too.
    let added = format!("route add 172.30.0.0/16 --peer {}", underlay(2));
    stage.operator.tell(&added)?;
    let before = appearance(&stage.near().host)?;
    let table = stage.operator.routes()?;
    let streams = [
        Stream::start(
            &stage.near().container,
            &stage.far().container,
            inside(2)[0],
        )?,
        Stream::start(
            &stage.far().container,
            &stage.near().container,
            inside(1)[1],
        )?,
    ];
    streams.iter().try_for_each(Stream::wait_for_progress)?;
    for _ in 0..2 {
        let retransmissions = |streams: &[Stream; 2]| -> Result<u64> {
            Ok(streams[0].retransmissions()? + streams[1].retransmissions()?)
        };
        let already = retransmissions(&streams)?;
        let mut next = None;
        let stall = longest_stall(&streams, || {
            next = Some(routes_stay(&stage.near().host, || {
                stage.take_over(near, &[])
            })?);
            streams.iter().try_for_each(Stream::wait_for_progress)
        })?;
        let Some((new, ended)) = next else {
            return fail("no new process");
        };
        near = new;
        check(ended.log.contains("total: sent "), || ended.log)?;
        check(stall < STALL_MAX, || format!("stood still for {stall:?}"))?;
        let more = retransmissions(&streams)? - already;
        check(more < RETRANSMISSIONS_MAX, || {
            format!("{more} retransmissions")
        })?;
        let after = appearance(&stage.near().host)?;
        check(after == before, || {
            format!("{before:?} before, {after:?} after")
        })?;
        check(stage.operator.routes()? == table, || "another table".into())?;
    }
    for stream in streams {
        stream.finish()?;
    }
    wait_for_each_other(stage.near(), stage.far())?;
    // The new process is a tunnel as any other.
    stage.operator.tell("route del 172.30.0.0/16")?;
    let routes = own_routes(&stage.near().host)?;
    check(routes.len() == 4, || format!("{routes:?}"))?;
    for prefix in &routes {
        let (host, delete) = (&stage.near().host, RouteCommand::Delete);
        ip_route(host, delete, *prefix, TUNNEL_NAME, None)?;
    }
    wait_until("the new process puts routes back", || {
        Ok(own_routes(&stage.near().host)? == routes)
    })?;
    wait_for_each_other(stage.near(), stage.far())?;
    stop(near)?;
    check(!stage.operator.socket().exists(), || {
        "the socket is left".into()
    })?;
    stop(far).map(drop)
}

/// What arrives between the two waits in the kernel: nothing of a slow stream
/// is lost.
#[testbed::trial(each_engine)]
fn taken_over_without_a_loss() -> Result<()> {
    const PORT: u16 = 7070;
    let stage = Stage::new()?;
    let (near, far) = stage.play()?;
    let ends = [stage.near(), stage.far()];
    let mut near = Some(near);
    without_backlog_drops(|| {
        let mut streams = Vec::new();
        let mut sinks = Vec::new();
        for (from, to) in [(ends[0], ends[1]), (ends[1], ends[0])] {
            let (source, target) = (tunnel(from.number)[0], tunnel(to.number)[0]);
            streams.push(numbered::Stream {
                name: format!("site {} to site {}", from.number, to.number),
                socket: udp(&from.host, source, 0)?,
                to: vec![(target, PORT).into()],
            });
            sinks.push(Sink {
                site: to.number,
                socket: udp(&to.host, target, PORT)?,
            });
        }
        let mut streams = Streams::start(streams, sinks)?;
        for _ in 0..2 {
            streams.wait_for_more(100)?;
            if let Some(old) = near.take() {
                near = Some(stage.take_over(old, &[])?.0);
            }
        }
        streams.wait_for_more(100)?;
        streams.finish().map(drop)
    })?;
    if let Some(near) = near {
        stop(near)?;
    }
    stop(far).map(drop)
}

#[testbed::trial(each_engine)]
fn a_new_process_that_fails_leaves_the_old_one_running() -> Result<()> {
    let stage = Stage::new()?;
    let (near, far) = stage.play()?;
    let (pid, before) = (stage.pid()?, appearance(&stage.near().host)?);
    let table = stage.operator.routes()?;
    let stream = Stream::start(
        &stage.near().container,
        &stage.far().container,
        inside(2)[0],
    )?;
    stream.wait_for_progress()?;
    let as_before = |what: &str| -> Result<()> {
        stream.wait_for_progress()?;
        // The one that failed may have been waited for.
        stage.operator.wait()?;
        check(stage.pid()? == pid, || {
            format!("{what}: somebody else answers")
        })?;
        let after = appearance(&stage.near().host)?;
        check(after == before, || {
            format!("{what}: {before:?}, then {after:?}")
        })?;
        check(stage.operator.routes()? == table, || {
            format!("{what}: another table")
        })
    };
    for (flags, status) in [
        ("--queues 0", 2),
        ("--no-such-flag", 2),
        ("--config /nonexistent/fastvpn.toml", 1),
        ("--peer 10.211.55.9=172.18.2.0/24", 1),
        ("--cores 4095", 1),
    ] {
        let mut all = vec!["--takeover"];
        all.extend(flags.split_whitespace());
        let ended = stage.start(&all)?.wait()?;
        check(ended.status.code() == Some(status), || {
            format!("{flags}: {}:\n{}", ended.status, ended.log)
        })?;
        as_before(flags)?;
    }
    // Of another version.
    let answer = stage
        .operator
        .request(r#"{"command":"takeover","protocol":4000000000}"#)?;
    check(answer["ok"] == false && answer["error"].is_string(), || {
        answer.to_string()
    })?;
    as_before("another version")?;
    // One that dies before anything is settled, and when it has said that it is ready.
    for steps in [&b""[..], b"{\"ready\":true}\n"] {
        let mut client = stage.operator.connect()?;
        tried(
            "ask",
            writeln!(client, r#"{{"command":"takeover","protocol":{PROTOCOL}}}"#),
        )?;
        let mut reader = BufReader::new(tried("clone", client.try_clone())?);
        let mut manifest = String::new();
        tried("read the manifest", reader.read_line(&mut manifest))?;
        check(manifest.contains("\"ok\":true"), || manifest.clone())?;
        // What the old process says then finds nobody.
        tried("close one side", client.shutdown(Shutdown::Read))?;
        tried("answer", client.write_all(steps))?;
        drop((client, reader));
        as_before("a new process that died")?;
    }
    stream.finish()?;
    stop(near)?;
    stop(far).map(drop)
}

/// One that asks and then says nothing is given up; what operators want to change
/// is refused so long, and traffic flows.
#[testbed::trial]
fn a_silent_new_process_is_given_up() -> Result<()> {
    let stage = Stage::new()?;
    let (near, far) = stage.play()?;
    let (a, b) = (stage.near(), stage.far());
    let stream = Stream::start(&a.container, &b.container, inside(2)[0])?;
    let mut client = stage.operator.connect()?;
    let question = format!(r#"{{"command":"takeover","protocol":{PROTOCOL}}}"#);
    tried("ask", writeln!(client, "{question}"))?;
    for _ in 0..3 {
        stream.wait_for_progress()?;
    }
    let routes = own_routes(&a.host)?;
    let add = format!("route add 172.30.0.0/16 --peer {}", underlay(2));
    stage.operator.refuses(&add, &["taking over"])?;
    let mut second = stage.operator.connect()?;
    tried("ask", writeln!(second, "{question}"))?;
    let mut refusal = String::new();
    tried("hear", BufReader::new(second).read_line(&mut refusal))?;
    let words = "another process is taking over already; try again";
    check(refusal.contains(words), || refusal.clone())?;
    check(own_routes(&a.host)? == routes, || "it is refused".into())?;
    wait_until("it is given up", || {
        let words: Vec<_> = add.split_whitespace().collect();
        Ok(stage.operator.run(&words)?.status.success())
    })?;
    check(own_routes(&a.host)?.len() == routes.len() + 1, || {
        "no new route".into()
    })?;
    stream.wait_for_progress()?;
    stream.finish()?;
    drop(client);
    let (near, _) = stage.take_over(near, &[])?;
    wait_for_each_other(a, b)?;
    stop(near)?;
    stop(far).map(drop)
}

/// What the new flags say counts from then on; what stays is not disturbed.
#[testbed::trial(each_engine)]
fn a_new_process_may_have_other_flags() -> Result<()> {
    let stage = Stage::new()?;
    let (near, far) = stage.play()?;
    let (a, b) = (stage.near(), stage.far());
    let stream = Stream::start(&a.container, &b.container, inside(2)[0])?;
    stream.wait_for_progress()?;
    let before = device(&a.host)?;
    let added = "10.211.55.9=172.30.0.0/16,fd00:30::/32";
    let flags = ["--peer", added, "--hop", "--mtu", "1400"];
    let (near, _) = stage.take_over(near, &flags)?;
    stream.wait_for_progress()?;
    let after = link(&a.host, TUNNEL_NAME)?;
    check(after.index == before.0 && after.mtu == 1400, || {
        format!("{after:?}")
    })?;
    let routes = own_routes(&a.host)?;
    check(routes.len() == 6, || format!("{routes:?}"))?;
    let peer = stage.operator.peer_of("172.30.1.1")?;
    check(peer == "10.211.55.9:8285", || peer.clone())?;
    let hop_limit = hop_limit_between(a, b, 0)?;
    check(hop_limit == 61, || format!("hop limit {hop_limit}"))?;
    // And back again.
    let (near, _) = stage.take_over(near, &[])?;
    stream.wait_for_progress()?;
    let routes = own_routes(&a.host)?;
    check(routes.len() == 4, || format!("{routes:?}"))?;
    check(device(&a.host)? == before, || "another MTU".into())?;
    stage
        .operator
        .refuses("route get 172.30.1.1", &["172.30.1.1"])?;
    let hop_limit = hop_limit_between(a, b, 0)?;
    check(hop_limit == 62, || format!("hop limit {hop_limit}"))?;
    stream.finish()?;
    stop(near)?;
    stop(far).map(drop)
}

/// However far it has come: either the old process still has the tunnel, or it
/// had it, and it is gone with it. Nothing in between.
#[testbed::trial(each_engine)]
fn a_killed_new_process_has_the_tunnel_or_not() -> Result<()> {
    let stage = Stage::new()?;
    let (mut near, far) = stage.play()?;
    let stream = Stream::start(
        &stage.near().container,
        &stage.far().container,
        inside(2)[0],
    )?;
    let mut kept = 0;
    for milliseconds in [0, 4, 8, 12, 16, 20, 30] {
        stream.wait_for_progress()?;
        let (old, before) = (near.pid(), appearance(&stage.near().host)?);
        let mut new = stage.start(&["--takeover"])?;
        std::thread::sleep(Duration::from_millis(milliseconds));
        new.child().signal(Signal::SIGKILL);
        new.wait()?;
        let mut is_kept = false;
        wait_until("the old process ends or goes on", || {
            let has_ended = near.child().try_wait()?.is_some();
            is_kept = !has_ended && stage.operator.run(&["status"])?.status.success();
            Ok(has_ended || is_kept)
        })?;
        if is_kept {
            kept += 1;
            check(stage.pid()? == Some(old.into()), || {
                "somebody else answers".into()
            })?;
            let after = appearance(&stage.near().host)?;
            check(after == before, || format!("{before:?}, then {after:?}"))?;
        } else {
            let ended = near.wait()?;
            check(ended.status.code() == Some(0), || ended.log)?;
            near = stage.start(&[])?;
            stage.operator.wait()?;
        }
    }
    check(kept > 0, || "all were killed too late".into())?;
    stream.wait_for_progress()?;
    stream.finish()?;
    stop(near)?;
    stop(far).map(drop)
}

/// Whatever they do to each other, in the end there is one, and traffic flows.
#[testbed::trial(each_engine)]
fn of_two_new_processes_one_is_left() -> Result<()> {
    let stage = Stage::new()?;
    let (near, far) = stage.play()?;
    let (a, b) = (stage.near(), stage.far());
    let before = appearance(&a.host)?;
    let stream = Stream::start(&a.container, &b.container, inside(2)[0])?;
    let mut all = vec![near];
    for _ in 0..3 {
        stream.wait_for_progress()?;
        all.push(stage.start(&["--takeover"])?);
        all.push(stage.start(&["--takeover"])?);
        wait_until("there is one", || {
            let mut running = 0;
            for end in &mut all {
                running += usize::from(end.child().try_wait()?.is_none());
            }
            check(running > 0, || "there is none".into())?;
            Ok(running == 1)
        })?;
        let mut last = None;
        for mut end in all.drain(..) {
            if end.child().try_wait()?.is_none() {
                last = Some(end);
            }
        }
        stage.operator.wait()?;
        check(
            stage.pid()? == last.as_ref().map(|end| end.pid().into()),
            || "somebody else answers".into(),
        )?;
        all.extend(last);
        let after = appearance(&a.host)?;
        check(after == before, || {
            format!("{before:?} before, {after:?} after")
        })?;
    }
    stream.wait_for_progress()?;
    stream.finish()?;
    wait_for_each_other(a, b)?;
    all.into_iter().try_for_each(|end| stop(end).map(drop))?;
    stop(far).map(drop)
}

/// A start like any other, also where a killed process has left its socket.
#[testbed::trial(each_engine)]
fn nobody_to_take_over_from() -> Result<()> {
    let stage = Stage::new()?;
    let before = inventory(&stage.near().host)?;
    let far = stage.far().start(&[peer(1)], &[])?;
    let near = stage.start(&["--takeover"])?;
    wait_for_each_other(stage.near(), stage.far())?;
    stop(near)?;
    nothing_left(&stage.near().host, &before)?;
    let mut near = stage.start(&[])?;
    for flags in [&["--takeover"][..], &[], &["--takeover"]] {
        wait_for_each_other(stage.near(), stage.far())?;
        near.child().signal(Signal::SIGKILL);
        near.wait()?;
        near = stage.start(flags)?;
    }
    wait_for_each_other(stage.near(), stage.far())?;
    check(stage.pid()? == Some(near.pid().into()), || {
        "somebody else answers".into()
    })?;
    stop(near)?;
    nothing_left(&stage.near().host, &before)?;
    stop(far).map(drop)
}

/// Whoever asks while the tunnel changes hands is answered by one of the two, or
/// told that there is no answer; what was answered with "ok" is not lost.
#[testbed::trial]
fn operators_in_a_takeover() -> Result<()> {
    const PREFIXES_MAX: usize = 10_000;
    let stage = Stage::new()?;
    let (near, far) = stage.play()?;
    let mut near = Some(near);
    let is_over = AtomicBool::new(false);
    let add = || -> Result<Vec<String>> {
        let mut added = Vec::new();
        for number in 0..PREFIXES_MAX {
            if is_over.load(Ordering::SeqCst) {
                return Ok(added);
            }
            let prefix = format!("10.{}.{}.0/24", 100 + number / 256, number % 256);
            let request = json!({
                "command": "route-add",
                "peer": underlay(2).to_string(),
                "prefixes": [prefix],
            });
            // Refused or cut off is fair.
            let Ok(answer) = stage.operator.request(&request.to_string()) else {
                continue;
            };
            if answer["ok"] == true {
                added.push(prefix);
            }
        }
        fail("too many for one test")
    };
    let added = std::thread::scope(|scope| {
        let adder = scope.spawn(add);
        let taken = (0..4).try_for_each(|_| {
            let old = near.take().ok_or_else(|| Error::new("no tunnel"))?;
            near = Some(stage.take_over(old, &[])?.0);
            Ok(())
        });
        is_over.store(true, Ordering::SeqCst);
        let added = adder
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        Result::and(taken, added)
    })?;
    check(added.len() > 10, || {
        format!("only {} were added", added.len())
    })?;
    let routes = stage.operator.routes()?;
    let present: BTreeSet<_> = routes.iter().map(|(net, _)| net.to_string()).collect();
    let lost: Vec<_> = added.iter().filter(|net| !present.contains(*net)).collect();
    check(lost.is_empty(), || {
        format!("said to be added, but lost: {lost:?}")
    })?;
    kernel_agrees(&stage.near().host, &stage.operator)?;
    if let Some(near) = near {
        stop(near)?;
    }
    stop(far).map(drop)
}

/// All else is as it asked for.
#[testbed::trial]
fn a_new_process_that_is_refused_an_address_says_so() -> Result<()> {
    let hosts = hosts(1500)?;
    let operator = Operator::new()?;
    let socket = operator.socket_text();
    let peer = "10.211.55.123=10.244.55.123/32";
    let flags = [
        "--control",
        &socket,
        "--peer",
        peer,
        "--address",
        "10.244.55.122/32",
    ];
    let near = Tunnel::start(&hosts.a, &flags)?;
    let far = fastvpn(&hosts.b, "--peer 10.211.55.122")?;
    wait_for(&hosts.a, TUNNEL[1].into())?;
    operator.wait()?;
    hosts.a.sysctl("net/ipv6/conf/fastvpn0/disable_ipv6", "1")?;
    let more = "--takeover --mtu 1300 --address fd00:250::9/64";
    let more: Vec<_> = more.split_whitespace().collect();
    let new = Tunnel::start(&hosts.a, &[&flags[..], &more].concat())?;
    near.wait()?;
    operator.wait()?;
    let pid = operator.ask("status")?["pid"].as_u64();
    check(pid == Some(new.pid().into()), || format!("{pid:?} answers"))?;
    wait_for(&hosts.a, TUNNEL[1].into())?;
    let mtu_bytes = link(&hosts.a, TUNNEL_NAME)?.mtu;
    check(mtu_bytes == 1300, || format!("MTU {mtu_bytes}"))?;
    let ended = stop(new)?;
    let parts = ["taken over, but not in full", "fd00:250::9/64"];
    let is_told = |line: &str| parts.iter().all(|part| line.contains(part));
    check(ended.log.lines().any(is_told), || ended.log.clone())?;
    stop(far).map(drop)
}
