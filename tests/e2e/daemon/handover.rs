//! Takeovers that do not go as they should: by the wrong configuration, or
//! because one of the two dies.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use fastvpn::daemon::handoff::PROTOCOL;
use fastvpn::error::{Error, Result};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use socket2::{Domain, SockAddr, Socket, Type};

use crate::daemon::takeover::{Stage, appearance, device};
use crate::host::routes::{kernel_agrees, net, own_routes};
use crate::operator::Operator;
use crate::packets::TUNNEL_NAME;
use crate::site::{inside, underlay, wait_for_each_other};
use crate::support::{
    PATIENCE, TUNNEL, Tunnel, check, fail, fastvpn, hosts, link, stop, tried, wait_for, wait_until,
};
use crate::tools::{RouteCommand, Stream, ip_route};

/// Name of the interface toward the other sites.
fn outside_name(stage: &Stage) -> Result<String> {
    let mut netlink = stage.near().host.netlink()?;
    let index = netlink.interface_to((underlay(2), 0).into())?;
    let link = netlink.link_by_index(index.unwrap_or_default())?;
    Ok(link.map(|link| link.name).unwrap_or_default())
}

#[testbed::trial]
fn what_a_start_would_refuse_is_not_taken_over() -> Result<()> {
    let stage = Stage::new()?;
    let (near, far) = stage.play()?;
    let host = &stage.near().host;
    let outside = outside_name(&stage)?;
    ip_route(
        host,
        RouteCommand::Add,
        net("172.29.0.0/16")?,
        &outside,
        None,
    )?;
    ip_route(
        host,
        RouteCommand::Add,
        net("fd00:29::/32")?,
        &outside,
        None,
    )?;
    let (pid, before) = (stage.pid()?, appearance(host)?);
    let through_itself = "lead through the tunnel itself";
    for (flag, value, says) in [
        ("--route", format!("{}/32", underlay(2)), through_itself),
        ("--route", "10.211.55.0/25".into(), through_itself),
        ("--address", "10.211.55.100/25".into(), through_itself),
        (
            "--route",
            "172.29.0.0/16".into(),
            "172.29.0.0/16 exists already on",
        ),
        (
            "--route",
            "fd00:29::/32".into(),
            "fd00:29::/32 exists already on",
        ),
    ] {
        let ended = stage.start(&["--takeover", flag, &value])?.wait()?;
        let is_refused = ended.status.code() == Some(1) && ended.log.contains(says);
        check(is_refused, || {
            format!("{flag} {value}: {}:\n{}", ended.status, ended.log)
        })?;
        // The one that failed may have been waited for.
        stage.operator.wait()?;
        check(stage.pid()? == pid, || "somebody else answers".into())?;
        let after = appearance(host)?;
        check(after == before, || {
            format!("{flag} {value}: {before:?}, then {after:?}")
        })?;
        wait_for_each_other(stage.near(), stage.far())?;
    }
    // One that covers the peer, but less closely than its own route, is fine.
    let (near, _) = stage.take_over(near, &["--route", "10.211.0.0/16"])?;
    wait_for_each_other(stage.near(), stage.far())?;
    stop(near)?;
    stop(far).map(drop)
}

/// Which nobody could know before: it was the old process's route that led there.
/// That peer is sent nothing until there is another way to it, and all else goes on.
#[testbed::trial]
fn a_new_process_suspends_a_peer_inside_the_tunnel() -> Result<()> {
    let stage = Stage::new()?;
    let far = stage
        .far()
        .start(&[crate::site::peer(1)], &["--queues", "2"])?;
    let near = stage.start(&["--route", "10.5.0.0/16"])?;
    stage.operator.wait()?;
    let host = &stage.near().host;
    let flags = ["--mtu", "1400", "--peer", "10.5.0.9=172.30.0.0/16"];
    let flags = [&flags[..], &["--route", "10.4.0.0/15"]].concat();
    let (near, _) = stage.take_over(near, &flags)?;
    wait_for_each_other(stage.near(), stage.far())?;
    let is_suspended = || -> Result<bool> {
        let answer = stage.operator.ask("peers")?;
        let peers = answer["peers"].as_array().cloned().unwrap_or_default();
        let peer = peers.iter().find(|peer| peer["peer"] == "10.5.0.9:8285");
        Ok(peer.is_some_and(|peer| peer["is_suspended"] == true))
    };
    check(is_suspended()?, || "it is not suspended".into())?;
    // What has nothing to do with it can be changed.
    let added = format!("route add 172.31.0.0/16 --peer {}", underlay(2));
    stage.operator.tell(&added)?;
    let outside = outside_name(&stage)?;
    ip_route(host, RouteCommand::Add, net("10.5.0.9/32")?, &outside, None)?;
    wait_until("the peer is reached", || Ok(!is_suspended()?))?;
    stop(near)?;
    stop(far).map(drop)
}

/// The old process's go.
#[testbed::trial]
fn a_new_process_without_routes_leaves_none() -> Result<()> {
    let stage = Stage::new()?;
    let (near, far) = stage.play()?;
    let host = &stage.near().host;
    let before = own_routes(host)?;
    let (near, _) = stage.take_over(near, &["--no-routes", "--without", "uso"])?;
    let routes = own_routes(host)?;
    check(routes.is_empty(), || format!("{routes:?}"))?;
    let (near, ended) = stage.take_over(near, &[])?;
    let is_told = ended
        .log
        .contains("--without uso takes effect at the next start");
    check(is_told, || ended.log)?;
    let routes = own_routes(host)?;
    check(routes == before, || format!("{routes:?}, not {before:?}"))?;
    wait_for_each_other(stage.near(), stage.far())?;
    stop(near)?;
    stop(far).map(drop)
}

/// What the kernel would refuse of the device as it is comes with its new
/// settings, and what it would silently forget holds up a new process.
#[testbed::trial]
fn ipv6_comes_and_goes_with_a_takeover() -> Result<()> {
    let hosts = hosts(1500)?;
    let operator = Operator::new()?;
    let start = |flags: &str| {
        let always = "--peer 10.211.55.123=10.244.55.123/32 --address 10.244.55.122/32";
        fastvpn(
            &hosts.a,
            &format!("--control {} {always} {flags}", operator.socket_text()),
        )
    };
    let mut near = start("--mtu 1200")?;
    let far = fastvpn(&hosts.b, "--peer 10.211.55.122")?;
    wait_for(&hosts.a, TUNNEL[1].into())?;
    operator.wait()?;
    let with_v6 = |length: u8| format!("--mtu 1400 --address fd00:244::122/{length}");
    for (flags, length) in [
        (with_v6(64), Some(64)),
        (with_v6(48), Some(48)),
        ("--mtu 1200".into(), None),
        (with_v6(128), Some(128)),
    ] {
        let new = start(&format!("--takeover {flags}"))?;
        near.wait()?;
        near = new;
        wait_until("the new process has its addresses", || {
            let given = hosts.a.netlink()?.addresses()?.into_iter();
            let mut given = given.filter(|(_, net)| net.to_string().starts_with("fd00:244::122/"));
            let present = given.next().map(|(_, net)| net.prefix_len());
            Ok(present == length && given.next().is_none())
        })?;
        wait_for(&hosts.a, TUNNEL[1].into())?;
        operator.wait()?;
    }
    operator.tell("route add fd01::/64 --peer 10.211.55.123")?;
    let before = (appearance(&hosts.a)?, device(&hosts.a)?);
    let refused = start("--takeover --mtu 1200")?.wait()?;
    let is_refused =
        refused.status.code() == Some(1) && refused.log.contains("fd01::/64 needs an MTU of 1280");
    check(is_refused, || refused.log)?;
    operator.wait()?;
    let after = (appearance(&hosts.a)?, device(&hosts.a)?);
    check(after == before, || format!("{before:?}, then {after:?}"))?;
    let ended = stop(near)?;
    check(!ended.log.contains("not in full"), || ended.log)?;
    stop(far).map(drop)
}

/// What they moved stays where they moved it, and whom they added stays.
#[testbed::trial]
fn what_operators_said_goes_on() -> Result<()> {
    let stage = Stage::new()?;
    let (near, far) = stage.play()?;
    stage.operator.tell("peer add 10.211.55.9=172.29.0.0/16")?;
    stage
        .operator
        .tell("route add 172.18.2.0/24 --peer 10.211.55.9 --replace")?;
    let table = stage.operator.routes()?;
    let (near, _) = stage.take_over(near, &[])?;
    let after = stage.operator.routes()?;
    check(after == table, || format!("{table:?}, then {after:?}"))?;
    kernel_agrees(&stage.near().host, &stage.operator)?;
    stop(near)?;
    stop(far).map(drop)
}

/// A signal that comes while a new process gets ready, which has read the file
/// already, is not lost: whoever carries on reloads.
#[testbed::trial]
fn a_reload_in_a_takeover() -> Result<()> {
    let hosts = hosts(1500)?;
    let operator = Operator::new()?;
    let write = |prefix: &str| {
        let text = format!(
            "address = [\"10.244.1.1/32\"]\n[[peer]]\nendpoint = \"10.211.55.123\"\n\
             prefixes = [\"{prefix}\"]\n"
        );
        operator.write("fastvpn.toml", &text)
    };
    let has = |prefix: &str| -> Result<bool> {
        let wanted = net(prefix)?;
        Ok(operator.routes()?.iter().any(|(net, _)| *net == wanted))
    };
    let file = write("10.1.0.0/16")?;
    let flags = format!("--control {} --config {file}", operator.socket_text());
    let mut near = fastvpn(&hosts.a, &flags)?;
    operator.wait()?;
    // It may be that a new process is quicker than its being stopped.
    for number in 2..20 {
        let mut new = fastvpn(&hosts.a, &format!("{flags} --takeover"))?;
        wait_until("a new process is served", || {
            Ok(has_thread(&near, "handoff") || near.child().try_wait()?.is_some())
        })?;
        new.child().signal(Signal::SIGSTOP);
        let is_held = waits_for_stopped(&near, &new)?;
        let prefix = format!("10.{number}.0.0/16");
        if is_held {
            write(&prefix)?;
            near.child().signal(Signal::SIGHUP);
            near.wait_for_line("the reload waits")?;
            check(!has(&prefix)?, || "it does not wait".into())?;
        }
        new.child().signal(Signal::SIGCONT);
        near.wait()?;
        near = new;
        operator.wait()?;
        if is_held {
            wait_until("the file is read again", || has(&prefix))?;
            let ended = stop(near)?;
            return check(ended.log.contains("reloaded: "), || ended.log);
        }
    }
    fail("no new process could be held up")
}

/// A new process, step by step. Its descriptors are let go.
struct Script {
    stream: UnixStream,
}

impl Script {
    /// Asks until the one before is over.
    fn ask(stage: &Stage) -> Result<Self> {
        let question = json!({"command": "takeover", "protocol": PROTOCOL});
        let mut asked = None;
        wait_until("a new process may ask", || {
            let stream = stage.operator.connect()?;
            let mut script = Self { stream };
            script.say(&question)?;
            let may = script.line()?["ok"] == true;
            asked = may.then_some(script);
            Ok(may)
        })?;
        asked.ok_or_else(|| Error::new("nobody was asked"))
    }

    fn say(&mut self, message: &Value) -> Result<()> {
        tried("say", writeln!(self.stream, "{message}"))
    }

    /// What the old process says next: it says nothing before it is asked.
    fn line(&mut self) -> Result<Value> {
        let mut line = String::new();
        tried(
            "hear",
            BufReader::new(&self.stream).read_line(&mut line).map(drop),
        )?;
        serde_json::from_str(&line).map_err(|error| Error::new(format!("{error} in {line:?}")))
    }

    /// The same, which has this key.
    fn hear(&mut self, key: &str) -> Result<Value> {
        let line = self.line()?;
        check(line.get(key).is_some(), || format!("{line} has no {key}"))?;
        Ok(line)
    }

    /// Has its old process stop, and dies before that says so.
    fn get_ready_and_die(mut self) -> Result<()> {
        let closed = self.stream.shutdown(Shutdown::Read);
        tried("close one side", closed)?;
        self.say(&json!({"ready": true}))
    }
}

/// The old process, which has stopped, carries on: with the same device, addresses,
/// routes, control socket and counters. A capture goes on, too.
#[testbed::trial(each_engine)]
fn a_new_process_that_dies_at_the_last_moment_changes_nothing() -> Result<()> {
    let stage = Stage::new()?;
    let (near, far) = stage.play()?;
    let (a, b) = (stage.near(), stage.far());
    let stream = Stream::start(&a.container, &b.container, inside(2)[0])?;
    stream.wait_for_progress()?;
    let (pid, before) = (stage.pid()?, appearance(&a.host)?);
    let table = stage.operator.routes()?;
    let sent = stage.operator.counter("packets_sent")?;
    let mut capture = stage.operator.connect()?;
    let request = writeln!(capture, r#"{{"command":"capture","snaplen_bytes":128}}"#);
    tried("ask for a capture", request)?;
    // This client does not read: what does not find room any more is lost, and counted.
    let captured = || {
        let status = stage.operator.ask("status")?;
        let count = |name: &str| status["capture"][name].as_u64();
        Ok(count("packets")
            .zip(count("lost"))
            .map(|(taken, lost)| taken + lost))
    };
    wait_until("a capture begins", || Ok(captured()?.is_some()))?;
    for _ in 0..3 {
        Script::ask(&stage)?.get_ready_and_die()?;
        stream.wait_for_progress()?;
        wait_for_each_other(a, b)?;
        stage.operator.wait()?;
        check(stage.pid()? == pid, || "somebody else answers".into())?;
        wait_until("all is as before", || Ok(appearance(&a.host)? == before))?;
        check(stage.operator.routes()? == table, || "another table".into())?;
        let before = captured()?;
        check(before.is_some(), || "the capture has ended".into())?;
        wait_until("the capture goes on", || Ok(captured()? > before))?;
    }
    drop(capture);
    check(stage.operator.counter("packets_sent")? > sent, || {
        "it counts from zero".into()
    })?;
    // It is a tunnel as any other: routes are kept, and it can be taken over.
    let routes = own_routes(&a.host)?;
    for prefix in &routes {
        ip_route(&a.host, RouteCommand::Delete, *prefix, TUNNEL_NAME, None)?;
    }
    wait_until("routes are put back", || Ok(own_routes(&a.host)? == routes))?;
    let (near, _) = stage.take_over(near, &[])?;
    stream.wait_for_progress()?;
    stream.finish()?;
    stop(near)?;
    check(!stage.operator.socket().exists(), || {
        "the socket is left".into()
    })?;
    stop(far).map(drop)
}

/// The new process carries on.
#[testbed::trial(each_engine)]
fn an_old_process_may_die_while_it_stops() -> Result<()> {
    /// Answers that a client does not read keep the end waiting.
    const PREFIXES: usize = 10_000;
    let stage = Stage::new()?;
    let (mut near, far) = stage.play()?;
    let prefixes: Vec<_> = (0..PREFIXES)
        .map(|number| format!("11.{}.{}.0/24", number / 256, number % 256))
        .collect();
    let request = json!({
        "command": "route-add",
        "peer": underlay(2).to_string(),
        "prefixes": prefixes,
    });
    let answer = stage.operator.request(&request.to_string())?;
    check(answer["ok"] == true, || answer.to_string())?;
    let mut stuck = stage.operator.connect()?;
    tried("ask", writeln!(stuck, r#"{{"command":"route-list"}}"#))?;
    tried("read", stuck.read_exact(&mut [0]))?;
    let new = stage.start(&["--takeover"])?;
    wait_until("the reconciler of its routes has ended", || {
        let has_ended = near.child().try_wait()?.is_some();
        Ok(has_ended || !has_thread(&near, "routes"))
    })?;
    near.child().signal(Signal::SIGKILL);
    near.wait()?;
    drop(stuck);
    stage.operator.wait()?;
    check(stage.pid()? == Some(new.pid().into()), || {
        "somebody else answers".into()
    })?;
    wait_for_each_other(stage.near(), stage.far())?;
    kernel_agrees(&stage.near().host, &stage.operator)?;
    stop(new)?;
    stop(far).map(drop)
}

fn has_thread(tunnel: &Tunnel, name: &str) -> bool {
    threads(tunnel).iter().any(|thread| thread.comm == name)
}

/// Whether the old process waits for the new one, which has been stopped. Its
/// thread that hands over sleeps then, and what the new one said before it was
/// stopped would have woken it.
fn waits_for_stopped(old: &Tunnel, new: &Tunnel) -> Result<bool> {
    wait_until("the new process is stopped", || {
        Ok(threads(new).iter().all(|thread| thread.state == 'T'))
    })?;
    wait_until("it is handed something, or not", || {
        let of_old = threads(old);
        let handoff = of_old.iter().find(|thread| thread.comm == "handoff");
        Ok(handoff.is_none_or(|thread| thread.state == 'S'))
    })?;
    Ok(has_thread(old, "handoff"))
}

/// One of a process's threads (proc_pid_stat(5)).
struct Thread {
    comm: String,
    state: char,
}

fn threads(tunnel: &Tunnel) -> Vec<Thread> {
    let Ok(tasks) = std::fs::read_dir(format!("/proc/{}/task", tunnel.pid())) else {
        return Vec::new();
    };
    let thread = |stat: String| {
        let (start, rest) = stat.rsplit_once(')')?;
        let (_, comm) = start.split_once('(')?;
        Some(Thread {
            comm: comm.to_string(),
            state: rest.trim_start().chars().next()?,
        })
    };
    let stats = tasks.flatten().filter_map(|task| {
        let stat = std::fs::read_to_string(task.path().join("stat")).ok()?;
        thread(stat)
    });
    stats.collect()
}

/// Questions are answered, and the end comes at once.
#[testbed::trial]
fn nobody_waits_for_a_silent_new_process() -> Result<()> {
    let stage = Stage::new()?;
    let (near, far) = stage.play()?;
    let mut new_process = Script::ask(&stage)?;
    for question in ["status", "peers", "route list"] {
        stage.operator.tell(question)?;
    }
    let asked = Instant::now();
    stop(near)?;
    // Or it would take the old process for dead, and carry on.
    new_process.hear("error")?;
    check(asked.elapsed() < PATIENCE_WITH_NEW_PROCESSES / 2, || {
        format!("the end took {:?}", asked.elapsed())
    })?;
    stop(far).map(drop)
}

/// After which a silent new process is given up.
const PATIENCE_WITH_NEW_PROCESSES: Duration = Duration::from_secs(20);
const _: () = assert!(PATIENCE.as_secs() > PATIENCE_WITH_NEW_PROCESSES.as_secs());

/// Whoever listens at the socket would give the new process its device and sockets. One who
/// is neither root nor the new process's user is not asked anything.
#[testbed::trial(needs_root)]
fn nothing_is_taken_over_from_another_user() -> Result<()> {
    const NOBODY: libc::uid_t = 65534;
    let stage = Stage::new()?;
    let path = stage.operator.socket();
    // The kernel notes who calls listen(2), in a thread of its own here, for which alone
    // the system call counts.
    let listen = || {
        let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
        socket.bind(&SockAddr::unix(&path)?)?;
        // SAFETY: it takes numbers.
        let changed = unsafe { libc::syscall(libc::SYS_setresuid, -1, NOBODY, -1) };
        check_os(changed)?;
        socket.listen(16)?;
        Ok(UnixListener::from(OwnedFd::from(socket)))
    };
    let listened = std::thread::scope(|scope| scope.spawn(listen).join());
    let listened = listened.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    let listener = tried("listen as another user", listened)?;
    let ended = stage.start(&["--takeover"])?.wait()?;
    let is_refused = ended.status.code() == Some(1)
        && ended.log.contains("cannot take over from the process at")
        && ended.log.contains("it runs as user 65534");
    check(is_refused, || format!("{}:\n{}", ended.status, ended.log))?;
    // It has come, and said nothing.
    tried("accept no more", listener.set_nonblocking(true))?;
    let mut visits = 0;
    while let Ok((mut stream, _)) = listener.accept() {
        visits += 1;
        let mut said = Vec::new();
        tried("read", stream.read_to_end(&mut said))?;
        check(said.is_empty(), || String::from_utf8_lossy(&said).into())?;
    }
    check(visits > 0, || "nobody has come".into())?;
    check(link(&stage.near().host, TUNNEL_NAME).is_err(), || {
        "it has started".into()
    })
}

fn check_os(returned: libc::c_long) -> io::Result<()> {
    match returned {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
