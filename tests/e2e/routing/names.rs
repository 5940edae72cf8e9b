//! Peers by name: a name that does not resolve yet, one whose address changes,
//! a name server that is silent.

use std::collections::HashMap;
use std::ffi::CString;
use std::io;
use std::net::{Ipv4Addr, TcpStream};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use fastvpn::error::{Error, Result};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::Signal;
use tempfile::NamedTempFile;
use testbed::Namespace;

use crate::operator::Operator;
use crate::site::{
    Site, addresses, inside, peer, prefixes, sites, tunnel, underlay, wait_for_each_other,
};
use crate::support::{FASTVPN, PATIENCE, Tunnel, check, fail, stop, tried, wait_for, wait_until};
use crate::tools::{Stream, inventory, nothing_left};

/// Answers by name, rotated each time; a name that is not there does not exist.
type Zone = HashMap<String, Vec<Ipv4Addr>>;

/// A name server at 127.0.0.1 of a namespace (RFC 1035), and the resolver
/// configuration that leads there.
pub struct NameServer {
    zone: Arc<Mutex<Zone>>,
    /// Says nothing while this is set.
    silent: Arc<AtomicBool>,
    /// All names that were asked for.
    asked: Arc<Mutex<Vec<String>>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    configuration: NamedTempFile,
}

const RESOLV_CONF: &str = "/etc/resolv.conf";

impl NameServer {
    fn start(namespace: &Namespace) -> Result<Self> {
        Self::start_with_options(namespace, "timeout:1 attempts:2")
    }

    /// One that says nothing, and is waited for as long as a resolver can.
    pub fn start_silent(namespace: &Namespace) -> Result<Self> {
        let server = Self::start_with_options(namespace, "timeout:30 attempts:5")?;
        server.silent.store(true, Ordering::Relaxed);
        Ok(server)
    }

    fn start_with_options(namespace: &Namespace, options: &str) -> Result<Self> {
        let socket = crate::support::udp(namespace, Ipv4Addr::LOCALHOST, 53)?;
        tried(
            "set a timeout",
            socket.set_read_timeout(Some(Duration::from_millis(100))),
        )?;
        let configuration = tried("make a file", NamedTempFile::new())?;
        let text = format!("nameserver 127.0.0.1\noptions {options}\n");
        tried("write a file", std::fs::write(configuration.path(), text))?;
        let (zone, asked) = (
            Arc::<Mutex<Zone>>::default(),
            Arc::<Mutex<Vec<String>>>::default(),
        );
        let (stop, silent) = (Arc::<AtomicBool>::default(), Arc::<AtomicBool>::default());
        let thread = {
            let (zone, asked) = (Arc::clone(&zone), Arc::clone(&asked));
            let (stop, silent) = (Arc::clone(&stop), Arc::clone(&silent));
            std::thread::spawn(move || {
                let mut query = [0; 512];
                while !stop.load(Ordering::Relaxed) {
                    let Ok((length, from)) = socket.recv_from(&mut query) else {
                        continue;
                    };
                    let Some((name, kind, end)) = read_question(&query[..length]) else {
                        continue;
                    };
                    lock(&asked).push(name.clone());
                    if !silent.load(Ordering::Relaxed) {
                        let known = lock(&zone).get_mut(&name).map(|addresses| {
                            if kind == TYPE_A {
                                addresses.rotate_left(1);
                            }
                            addresses.clone()
                        });
                        let answer = answer(&query[..end], kind, known.as_deref());
                        let _ = socket.send_to(&answer, from);
                    }
                }
            })
        };
        Ok(Self {
            zone,
            silent,
            asked,
            stop,
            thread: Some(thread),
            configuration,
        })
    }

    fn set(&self, name: &str, address: Ipv4Addr) {
        self.set_all(name, &[address]);
    }

    fn set_all(&self, name: &str, addresses: &[Ipv4Addr]) {
        lock(&self.zone).insert(name.to_string(), addresses.to_vec());
    }

    /// How often a name was asked for.
    pub fn questions(&self, name: &str) -> usize {
        lock(&self.asked)
            .iter()
            .filter(|asked| *asked == name)
            .count()
    }

    /// Starts fastvpn in a mount namespace of its own, where the resolver's
    /// configuration is this one.
    fn start_tunnel(&self, site: &Site, peers: &[String], flags: &[&str]) -> Result<Tunnel> {
        let mut all: Vec<String> = flags.iter().map(ToString::to_string).collect();
        for address in addresses(site.number) {
            all.extend(["--address".into(), address]);
        }
        self.start_with(site, peers, &all)
    }

    /// The same without addresses but those in `flags`.
    fn start_with(&self, site: &Site, peers: &[String], flags: &[String]) -> Result<Tunnel> {
        let mut command = Command::new(FASTVPN);
        command.args(flags);
        for peer in peers {
            command.args(["--peer", peer]);
        }
        self.spawn(&site.host, command)
    }

    /// Starts a tunnel that has this resolver.
    pub fn spawn(&self, host: &Namespace, mut command: Command) -> Result<Tunnel> {
        command.stdin(Stdio::null()).stdout(Stdio::null());
        let path = self.configuration.path().display().to_string();
        let source = CString::new(path).map_err(|_| Error::new("a path with a zero byte"))?;
        let own_resolver = move || {
            let failed = |errno: nix::errno::Errno| io::Error::from_raw_os_error(errno as i32);
            unshare(CloneFlags::CLONE_NEWNS).map_err(failed)?;
            let nothing = None::<&std::ffi::CStr>;
            let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
            mount(nothing, c"/", nothing, private, nothing).map_err(failed)?;
            let source = Some(source.as_c_str());
            mount(source, RESOLV_CONF, nothing, MsFlags::MS_BIND, nothing).map_err(failed)
        };
        // SAFETY: between fork and exec the closure only makes three system
        // calls; paths this short are copied to the stack, nothing is allocated.
        unsafe {
            command.pre_exec(own_resolver);
        }
        Tunnel::spawn(host, command)
    }
}

impl Drop for NameServer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

const HEADER_BYTES: usize = 12;
const TYPE_A: u16 = 1;

/// Name and type that a query asks for, and where its question ends.
fn read_question(query: &[u8]) -> Option<(String, u16, usize)> {
    let mut labels = Vec::new();
    let mut at = HEADER_BYTES;
    loop {
        let length = usize::from(*query.get(at)?);
        at += 1;
        if length == 0 {
            break;
        }
        let label = query.get(at..at + length)?;
        labels.push(String::from_utf8_lossy(label).to_ascii_lowercase());
        at += length;
    }
    let kind = u16::from_be_bytes(query.get(at..at + 2)?.try_into().ok()?);
    Some((labels.join("."), kind, at + 4))
}

/// The answer to a query that ends with its question.
fn answer(query: &[u8], kind: u16, known: Option<&[Ipv4Addr]>) -> Vec<u8> {
    let found = known.filter(|_| kind == TYPE_A).unwrap_or_default();
    // No such name is another answer than no such record.
    let code = if known.is_none() { 3 } else { 0 };
    let mut answer = query[..2].to_vec();
    answer.extend([0x84, code, 0, 1, 0, found.len() as u8, 0, 0, 0, 0]);
    answer.extend(&query[HEADER_BYTES..]);
    for address in found {
        // The name as in the question; type A, class IN, no caching, 4 bytes.
        answer.extend([0xc0, HEADER_BYTES as u8, 0, 1, 0, 1, 0, 0, 0, 0, 0, 4]);
        answer.extend(address.octets());
    }
    answer
}

const NAME: &str = "far.example";

fn named(number: u8) -> String {
    format!("{NAME}={}", prefixes(number))
}

/// The others are there at once; what goes to the one that is not is reported
/// and counted; it is tried again, not too often, until it resolves.
#[testbed::trial]
fn a_name_that_resolves_later() -> Result<()> {
    let network = sites(3)?;
    let [a, b, c] = &network.all[..] else {
        return Err(Error::new("three sites"));
    };
    let names = NameServer::start(&a.host)?;
    let operator = Operator::new()?;
    let socket = operator.socket_text();
    let tunnels = [
        names.start_tunnel(a, &[named(2), peer(3)], &["--control", &socket])?,
        b.start(&[peer(1)], &[])?,
        c.start(&[peer(1)], &[])?,
    ];
    wait_for_each_other(a, c)?;
    operator.wait()?;
    for address in inside(2) {
        let connect = || TcpStream::connect_timeout(&(address, 80).into(), PATIENCE);
        for namespace in [&a.container, &a.host] {
            let result = namespace.run(connect);
            let errno = result.as_ref().err().and_then(io::Error::raw_os_error);
            check(errno == Some(libc::ENETUNREACH), || {
                format!("{address}: {result:?}")
            })?;
        }
    }
    check(operator.dropped("peer-unresolved")? >= 4, || {
        "nothing was counted".into()
    })?;
    // Growing pauses: two questions (A, AAAA) each time, twice if need be.
    wait_until("the name is asked for again", || {
        Ok(names.questions(NAME) >= 3)
    })?;
    names.set(NAME, underlay(2));
    wait_for_each_other(a, b)?;
    // An answer that is good is not asked for again.
    std::thread::sleep(Duration::from_millis(300));
    let asked = names.questions(NAME);
    check(asked < 100, || format!("asked {asked} times"))?;
    std::thread::sleep(Duration::from_secs(3));
    let later = names.questions(NAME);
    check(later == asked, || {
        format!("asked {asked} times, then {later}")
    })?;
    tunnels.into_iter().try_for_each(|end| stop(end).map(drop))
}

/// A tunnel between site 1 and a peer by name, which is at site 2 first and
/// then at site 3, with site 2's prefixes.
struct Moving {
    network: crate::site::Sites,
    names: NameServer,
    operator: Operator,
}

impl Moving {
    fn start(flags: &[&str]) -> Result<(Self, [Tunnel; 2])> {
        let network = sites(3)?;
        let [a, b, _] = &network.all[..] else {
            return fail("three sites");
        };
        let names = NameServer::start(&a.host)?;
        names.set(NAME, underlay(2));
        let operator = Operator::new()?;
        let socket = operator.socket_text();
        let flags = [&["--control", &socket][..], flags].concat();
        let tunnels = [
            names.start_tunnel(a, &[named(2)], &flags)?,
            b.start(&[peer(1)], &[])?,
        ];
        wait_for_each_other(a, b)?;
        operator.wait()?;
        let moving = Self {
            network,
            names,
            operator,
        };
        Ok((moving, tunnels))
    }

    /// Lets site 3 be what site 2 was, and its name say so.
    fn move_on(&self, old: Tunnel) -> Result<Tunnel> {
        let new = self.replace(old)?;
        self.names.set(NAME, underlay(3));
        Ok(new)
    }

    /// Lets site 3 be what site 2 was.
    fn replace(&self, old: Tunnel) -> Result<Tunnel> {
        stop(old)?;
        let c = &self.network.all[2];
        let [v4, v6] = tunnel(2);
        let flags = format!("--address {v4}/32 --address {v6}/128 --peer {}", peer(1));
        crate::support::fastvpn(&c.host, &flags)
    }

    /// The named peer's address.
    fn endpoint(&self) -> Result<String> {
        let peers = self.operator.ask("peers")?;
        Ok(peers["peers"][0]["endpoint"].to_string())
    }
}

/// A peer that answers stays where it is, whichever of its addresses the name
/// server begins with; one that has stopped to is looked for at the other.
#[testbed::trial]
fn a_name_with_two_addresses() -> Result<()> {
    let configuration = Operator::new()?;
    let file = configuration.write("fastvpn.toml", "hop = false\n")?;
    let (moving, [a, b]) = Moving::start(&["--config", &file])?;
    moving.names.set_all(NAME, &[underlay(2), underlay(3)]);
    let [near, far, _] = &moving.network.all[..] else {
        return fail("three sites");
    };
    let is_at =
        |number| -> Result<bool> { Ok(moving.endpoint()?.contains(&underlay(number).to_string())) };
    for _ in 0..3 {
        let before = moving.names.questions(NAME);
        moving.operator.tell("reload")?;
        wait_until("the name is asked for again", || {
            Ok(moving.names.questions(NAME) > before)
        })?;
        wait_for_each_other(near, far)?;
        check(is_at(2)?, || "a peer that answers was moved".into())?;
    }
    let new = moving.replace(b)?;
    // Pings are what makes its silence noticed.
    wait_for(&near.host, tunnel(2)[0])?;
    check(is_at(3)?, || "who answers is not at site 3".into())?;
    [a, new].into_iter().try_for_each(|end| stop(end).map(drop))
}

/// A peer that has stopped to answer is looked for.
#[testbed::trial]
fn a_name_that_moves() -> Result<()> {
    let (moving, [a, b]) = Moving::start(&[])?;
    let before = moving.names.questions(NAME);
    let new = moving.move_on(b)?;
    // Pings are what makes its silence noticed.
    let host = &moving.network.all[0].host;
    wait_for(host, tunnel(2)[0])?;
    check(moving.names.questions(NAME) > before, || {
        "found without a question".into()
    })?;
    wait_for(host, tunnel(2)[1])?;
    [a, new].into_iter().try_for_each(|end| stop(end).map(drop))
}

/// An operator need not wait for that.
#[testbed::trial]
fn a_name_that_moves_and_a_reload() -> Result<()> {
    for by_signal in [false, true] {
        let configuration = Operator::new()?;
        let file = configuration.write("fastvpn.toml", "hop = false\n")?;
        let (moving, [mut a, b]) = Moving::start(&["--config", &file])?;
        let new = moving.move_on(b)?;
        let before = moving.endpoint()?;
        check(before.contains(&underlay(2).to_string()), || before.clone())?;
        if by_signal {
            a.child().signal(Signal::SIGHUP);
        } else {
            moving.operator.tell("reload")?;
        }
        wait_until("the name is resolved again", || {
            Ok(moving.endpoint()?.contains(&underlay(3).to_string()))
        })?;
        wait_for(&moving.network.all[0].host, tunnel(2)[0])?;
        [a, new]
            .into_iter()
            .try_for_each(|end| stop(end).map(drop))?;
    }
    Ok(())
}

/// A peer that waits for a name server's answer waits alone.
#[testbed::trial]
fn a_silent_name_server() -> Result<()> {
    let network = sites(3)?;
    let [a, _, c] = &network.all[..] else {
        return Err(Error::new("three sites"));
    };
    let names = NameServer::start(&a.host)?;
    names.silent.store(true, Ordering::Relaxed);
    let operator = Operator::new()?;
    let socket = operator.socket_text();
    let tunnels = [
        names.start_tunnel(a, &[named(2), peer(3)], &["--control", &socket])?,
        c.start(&[peer(1)], &[])?,
    ];
    wait_for_each_other(a, c)?;
    operator.wait()?;
    // Changes and answers go on while there are questions under way.
    for number in 0..5 {
        operator.tell(&format!(
            "peer add late{number}.example=172.30.{number}.0/24"
        ))?;
    }
    let peer_of = operator.peer_of("172.30.3.3")?;
    check(peer_of == "late3.example:8285", || peer_of.clone())?;
    wait_until("the new names are asked for", || {
        Ok((0..5).all(|number| names.questions(&format!("late{number}.example")) > 0))
    })?;
    wait_for_each_other(a, c)?;
    operator.tell("peer del late0.example")?;
    tunnels.into_iter().try_for_each(|end| stop(end).map(drop))
}

/// The new process knows what the old process knew, though nobody tells it.
#[testbed::trial]
fn a_takeover_without_a_name_server() -> Result<()> {
    let (moving, [old, far]) = Moving::start(&[])?;
    let [a, b, _] = &moving.network.all[..] else {
        return fail("three sites");
    };
    let stream = Stream::start(&a.container, &b.container, inside(2)[0])?;
    stream.wait_for_progress()?;
    moving.names.silent.store(true, Ordering::Relaxed);
    let socket = moving.operator.socket_text();
    let flags = ["--takeover", "--control", &socket];
    let new = moving.names.start_tunnel(a, &[named(2)], &flags)?;
    let ended = old.wait()?;
    check(ended.status.code() == Some(0), || ended.log)?;
    stream.wait_for_progress()?;
    stream.finish()?;
    wait_for_each_other(a, b)?;
    [new, far]
        .into_iter()
        .try_for_each(|end| stop(end).map(drop))
}

/// No answer is no reason to forget an address.
#[testbed::trial]
fn a_reload_without_a_name_server() -> Result<()> {
    let configuration = Operator::new()?;
    let file = configuration.write("fastvpn.toml", "hop = false\n")?;
    let (moving, tunnels) = Moving::start(&["--config", &file])?;
    let [a, b, _] = &moving.network.all[..] else {
        return fail("three sites");
    };
    let stream = Stream::start(&a.container, &b.container, inside(2)[0])?;
    stream.wait_for_progress()?;
    let before = moving.names.questions(NAME);
    moving.names.silent.store(true, Ordering::Relaxed);
    moving.operator.tell("reload")?;
    wait_until("the name is asked for again", || {
        Ok(moving.names.questions(NAME) > before)
    })?;
    stream.wait_for_progress()?;
    // That it does not exist any more, neither.
    lock(&moving.names.zone).clear();
    moving.names.silent.store(false, Ordering::Relaxed);
    let before = moving.names.questions(NAME);
    moving.operator.tell("reload")?;
    wait_until("the name is asked for again", || {
        Ok(moving.names.questions(NAME) > before)
    })?;
    stream.wait_for_progress()?;
    stream.finish()?;
    wait_for_each_other(a, b)?;
    tunnels.into_iter().try_for_each(|end| stop(end).map(drop))
}

/// A peer by name that an operator added is the new process's as well.
#[testbed::trial]
fn names_added_are_handed_over() -> Result<()> {
    let network = sites(3)?;
    let [a, b, c] = &network.all[..] else {
        return fail("three sites");
    };
    let names = NameServer::start(&a.host)?;
    names.set(NAME, underlay(2));
    let operator = Operator::new()?;
    let socket = operator.socket_text();
    let flags = ["--control", &socket];
    let old = names.start_tunnel(a, &[peer(3)], &flags)?;
    let others = [b.start(&[peer(1)], &[])?, c.start(&[peer(1)], &[])?];
    operator.wait()?;
    operator.tell(&format!("peer add {}", named(2)))?;
    wait_for_each_other(a, b)?;
    let table = operator.routes()?;
    let stream = Stream::start(&a.container, &b.container, inside(2)[0])?;
    stream.wait_for_progress()?;
    let new = names.start_tunnel(a, &[peer(3)], &[&["--takeover"], &flags[..]].concat())?;
    let ended = old.wait()?;
    check(ended.status.code() == Some(0), || ended.log)?;
    stream.wait_for_progress()?;
    stream.finish()?;
    check(operator.routes()? == table, || "another table".into())?;
    wait_for_each_other(a, b)?;
    stop(new)?;
    others.into_iter().try_for_each(|end| stop(end).map(drop))
}

/// A peer by name that was not there at the start, in a tunnel that had none.
#[testbed::trial]
fn a_name_that_comes_with_a_reload() -> Result<()> {
    let network = sites(3)?;
    let [a, b, c] = &network.all[..] else {
        return fail("three sites");
    };
    let names = NameServer::start(&a.host)?;
    let operator = Operator::new()?;
    let socket = operator.socket_text();
    let entry = |endpoint: &str, number: u8| {
        let list: Vec<_> = prefixes(number).split(',').map(String::from).collect();
        format!("[[peer]]\nendpoint = {endpoint:?}\nprefixes = {list:?}\n")
    };
    let text = entry(&underlay(3).to_string(), 3);
    let file = operator.write("fastvpn.toml", &text)?;
    let tunnels = [
        names.start_tunnel(a, &[], &["--config", &file, "--control", &socket])?,
        b.start(&[peer(1)], &[])?,
        c.start(&[peer(1)], &[])?,
    ];
    wait_for_each_other(a, c)?;
    operator.write("fastvpn.toml", &format!("{text}{}", entry(NAME, 2)))?;
    operator.tell("reload")?;
    wait_until("the name is asked for", || Ok(names.questions(NAME) > 0))?;
    wait_for_each_other(a, c)?;
    names.set(NAME, underlay(2));
    wait_for_each_other(a, b)?;
    tunnels.into_iter().try_for_each(|end| stop(end).map(drop))
}

/// The one peer's name does not resolve: without an address there is nothing to
/// start with; with one the tunnel waits.
#[testbed::trial]
fn a_name_that_never_resolves() -> Result<()> {
    let network = sites(2)?;
    let a = &network.all[0];
    let names = NameServer::start(&a.host)?;
    let operator = Operator::new()?;
    let socket = operator.socket_text();
    let before = inventory(&a.host)?;
    let ended = names.start_with(a, &[named(2)], &[])?.wait()?;
    let is_refused = ended.status.code() == Some(1) && ended.log.contains(NAME);
    check(is_refused, || format!("{}:\n{}", ended.status, ended.log))?;
    nothing_left(&a.host, &before)?;
    let end = names.start_tunnel(a, &[named(2)], &["--control", &socket])?;
    operator.wait()?;
    let peers = operator.ask("peers")?;
    check(peers["peers"][0]["endpoint"].is_null(), || {
        peers.to_string()
    })?;
    let ended = stop(end)?;
    check(ended.log.contains(NAME), || ended.log)
}

/// Addresses that cannot be a peer's, at the start and later, are no answers:
/// the names are asked for until they have others.
#[testbed::trial]
fn a_name_that_is_no_peers() -> Result<()> {
    let network = sites(3)?;
    let [a, b, c] = &network.all[..] else {
        return fail("three sites");
    };
    let names = NameServer::start(&a.host)?;
    // Unspecified, and within the tunnel.
    names.set(NAME, Ipv4Addr::UNSPECIFIED);
    names.set("inside.example", Ipv4Addr::new(172, 18, 2, 77));
    names.set("good.example", underlay(3));
    let operator = Operator::new()?;
    let socket = operator.socket_text();
    let near = names.start_tunnel(a, &[named(2)], &["--control", &socket])?;
    operator.wait()?;
    operator.tell("peer add inside.example=172.30.0.0/16")?;
    operator.tell(&format!("peer add good.example:9999={}", prefixes(3)))?;
    let endpoint = |name: &str| -> Result<serde_json::Value> {
        let answer = operator.ask("peers")?;
        let peers = answer["peers"].as_array();
        let found = peers.and_then(|peers| peers.iter().find(|peer| peer["peer"] == name));
        let found = found.ok_or_else(|| Error::new(format!("no {name} in {answer}")))?;
        Ok(found["endpoint"].clone())
    };
    wait_until("the last name is resolved", || {
        Ok(!endpoint("good.example:9999")?.is_null())
    })?;
    for name in [&format!("{NAME}:8285"), "inside.example:8285"] {
        let found = endpoint(name)?;
        check(found.is_null(), || format!("{name} is {found}"))?;
    }
    names.set(NAME, underlay(2));
    names.set("inside.example", underlay(3));
    let far = [b.start(&[peer(1)], &[])?, c.start(&[peer(1)], &[])?];
    wait_for_each_other(a, b)?;
    wait_until("the other name is resolved", || {
        Ok(endpoint("inside.example:8285")? == format!("{}:8285", underlay(3)))
    })?;
    let ended = stop(near)?;
    for reason in [NAME, "172.18.2.77"] {
        check(ended.log.contains(reason), || ended.log.clone())?;
    }
    far.into_iter().try_for_each(|end| stop(end).map(drop))
}

/// Names that lead to this host or into the tunnel hold up neither the other
/// peers nor a takeover, and are asked for until they lead elsewhere.
#[testbed::trial]
fn names_that_are_set_aside() -> Result<()> {
    let network = sites(3)?;
    let [a, b, c] = &network.all[..] else {
        return fail("three sites");
    };
    let names = NameServer::start(&a.host)?;
    let bad = [
        ("loop.example", Ipv4Addr::new(127, 0, 0, 1)),
        ("debian.example", Ipv4Addr::new(127, 0, 1, 1)),
        ("own.example", underlay(1)),
        ("inside.example", Ipv4Addr::new(172, 18, 3, 77)),
        ("tunnel.example", Ipv4Addr::new(10, 244, 0, 1)),
        (NAME, Ipv4Addr::LOCALHOST),
    ];
    let mut peers = vec![peer(3), named(2)];
    for ((name, address), number) in bad.into_iter().zip(0..) {
        names.set(name, address);
        if name != NAME {
            peers.push(format!("{name}=172.30.{number}.0/24"));
        }
    }
    let operator = Operator::new()?;
    let socket = operator.socket_text();
    let set_aside = || -> Result<usize> {
        let answer = operator.ask("peers")?;
        let peers = answer["peers"].as_array();
        Ok(peers.map_or(0, |peers| {
            peers
                .iter()
                .filter(|peer| peer["endpoint"].is_null())
                .count()
        }))
    };
    let names_each = |log: &str| {
        bad.iter().all(|(name, address)| {
            let has = |line: &str| line.contains(name) && line.contains(&address.to_string());
            log.lines().any(|line| line.contains("WARN") && has(line))
        })
    };
    let old = names.start_tunnel(a, &peers, &["--control", &socket])?;
    let far = [b.start(&[peer(1)], &[])?, c.start(&[peer(1)], &[])?];
    wait_for_each_other(a, c)?;
    operator.wait()?;
    check(set_aside()? == bad.len(), || "not all are set aside".into())?;
    let new = names.start_tunnel(a, &peers, &["--takeover", "--control", &socket])?;
    let ended = old.wait()?;
    check(
        ended.status.code() == Some(0) && names_each(&ended.log),
        || ended.log.clone(),
    )?;
    wait_for_each_other(a, c)?;
    check(set_aside()? == bad.len(), || "not all are set aside".into())?;
    names.set(NAME, underlay(2));
    wait_for_each_other(a, b)?;
    check(set_aside()? == bad.len() - 1, || {
        "others have changed".into()
    })?;
    let ended = stop(new)?;
    check(names_each(&ended.log), || ended.log.clone())?;
    far.into_iter().try_for_each(|end| stop(end).map(drop))?;
    // The only one, without an address: there is nothing to start with, and why.
    names.set(NAME, Ipv4Addr::LOCALHOST);
    let ended = names.start_with(a, &[named(2)], &[])?.wait()?;
    let told = [NAME, "127.0.0.1", "this host itself"];
    check(
        ended.status.code() == Some(1) && told.iter().all(|part| ended.log.contains(part)),
        || ended.log.clone(),
    )
}
