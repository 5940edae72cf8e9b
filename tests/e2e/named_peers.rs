//! Peers by name: names that resolve late, peers that move, and a reload.
//!
//! The tunnels have files of their own in /etc, so that the tests neither touch
//! nor depend on those of the machine.

use std::ffi::CString;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use fastvpn::error::{Error, Result};
use fastvpn::lab::traffic::ping;
use fastvpn::lab::{self, Namespace};
use ipnet::IpNet;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::Signal;

use crate::operator::Operator;
use crate::support::{
    FASTVPN, Test, Tunnel, check, fail, fastvpn, stop, tried, udp, wait_for, wait_until,
};

/// The tests of this file.
pub fn tests() -> Vec<Test> {
    vec![
        (
            "a_peer_whose_name_resolves_later",
            a_peer_whose_name_resolves_later,
        ),
        ("a_name_that_is_no_peers", a_name_that_is_no_peers),
        ("a_named_peer_that_moves", a_named_peer_that_moves),
        (
            "a_reload_looks_for_named_peers",
            a_reload_looks_for_named_peers,
        ),
        (
            "no_peer_resolves_at_the_start",
            no_peer_resolves_at_the_start,
        ),
    ]
}

/// Names in this file only, which is looked at anew for each question
/// (nsswitch.conf(5)). Where there is no such file to put it over, the C
/// library asks [`NAME_SERVER`] last.
const NAME_SERVICES: &str = "hosts: files\n";

/// A name server that is not there, and says so at once.
const NAME_SERVER: &str = "nameserver 127.0.0.1\noptions timeout:1 attempts:1\n";

/// Files that a tunnel sees in /etc instead of the machine's.
struct Etc {
    operator: Operator,
}

impl Etc {
    fn new() -> Result<Self> {
        let operator = Operator::new()?;
        operator.write("nsswitch.conf", NAME_SERVICES)?;
        operator.write("resolv.conf", NAME_SERVER)?;
        let etc = Self { operator };
        etc.set_names(&[])?;
        Ok(etc)
    }

    /// Names and their addresses, all that there are. In place: a mount shows
    /// the file that was there when it was made.
    fn set_names(&self, names: &[(&str, Ipv4Addr)]) -> Result<()> {
        let lines = names
            .iter()
            .map(|(name, address)| format!("{address} {name}\n"));
        self.operator.write("hosts", &lines.collect::<String>())?;
        Ok(())
    }

    /// Starts `fastvpn FLAGS` where these files are in /etc.
    fn start(&self, namespace: &Namespace, flags: &str) -> Result<Tunnel> {
        let mut command = Command::new(FASTVPN);
        command
            .args(["--control", &self.operator.socket_text()])
            .args(flags.split_whitespace())
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        let mut mounts = Vec::new();
        for name in ["hosts", "nsswitch.conf", "resolv.conf"] {
            let place = format!("/etc/{name}");
            if Path::new(&place).exists() {
                mounts.push((
                    c_string(&self.operator.path(name))?,
                    c_string(Path::new(&place))?,
                ));
            }
        }
        if mounts.len() < 3 && !Path::new("/etc/hosts").exists() {
            return fail("the tests of names need a file /etc/hosts to put another over");
        }
        let arrange = move || enter_mounts(&mounts);
        // SAFETY: between fork and exec the closure only makes system calls,
        // unshare and mount, with strings that were made before; it neither
        // allocates nor takes locks.
        unsafe {
            command.pre_exec(arrange);
        }
        Tunnel::spawn(namespace, command)
    }

    /// Address of a peer, as the tunnel has it.
    fn endpoint(&self, peer: &str) -> Result<Option<String>> {
        let answer = self.operator.request(r#"{"command":"peers"}"#)?;
        let peers = answer["peers"].as_array().cloned().unwrap_or_default();
        match peers.iter().find(|entry| entry["peer"] == peer) {
            Some(entry) => Ok(entry["endpoint"].as_str().map(String::from)),
            None => fail(format!("no peer {peer} in {answer}")),
        }
    }

    fn wait_for_operators_socket(&self) -> Result<()> {
        wait_until("the operators' socket answers", || {
            Ok(self.operator.connect().is_ok())
        })
    }
}

fn c_string(path: &Path) -> Result<CString> {
    CString::new(path.as_os_str().as_bytes())
        .map_err(|_| Error::new(format!("{} is no path", path.display())))
}

/// Moves the process into a mount namespace of its own and shows it the first
/// file of each pair in the place of the second.
fn enter_mounts(mounts: &[(CString, CString)]) -> io::Result<()> {
    unshare(CloneFlags::CLONE_NEWNS)?;
    let nothing = None::<&std::ffi::CStr>;
    // Nothing of this comes to the machine's notice.
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(nothing, c"/", nothing, private, nothing)?;
    for (file, place) in mounts {
        mount(
            Some(file.as_c_str()),
            place.as_c_str(),
            nothing,
            MsFlags::MS_BIND,
            nothing,
        )?;
    }
    Ok(())
}

/// Underlay address of host 1, 2 or 3.
fn underlay(host: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 211, 55, host)
}

/// Tunnel address of host 1, 2 or 3.
fn tunnel(host: u8) -> IpAddr {
    Ipv4Addr::new(10, 244, 0, host).into()
}

/// Three hosts on a switch.
struct Hosts {
    each: [Namespace; 3],
    /// What joins them, while it is there.
    _switch: Namespace,
}

impl Hosts {
    fn new() -> Result<Self> {
        let address = |host| vec![IpNet::new_assert(underlay(host).into(), 24)];
        let switch = lab::switch(&[address(1), address(2), address(3)], 1500)?;
        match switch.hosts.try_into() {
            Ok(each) => Ok(Self {
                each,
                _switch: switch.bridge,
            }),
            Err(_) => fail("three hosts"),
        }
    }
}

/// A tunnel on a host that knows host 1 by its address, with the tunnel address
/// of host `number`.
fn far_end(host: &Namespace, number: u8) -> Result<Tunnel> {
    fastvpn(
        host,
        &format!(
            "--peer 10.211.55.1=10.244.0.1/32 --address {}/32",
            tunnel(number)
        ),
    )
}

/// One that does not resolve keeps nobody else from working, its packets are
/// answered, and it works as soon as it can.
fn a_peer_whose_name_resolves_later() -> Result<()> {
    let etc = Etc::new()?;
    let hosts = Hosts::new()?;
    let [a, b, c] = &hosts.each;
    let near = etc.start(
        a,
        "--peer b.example=10.244.0.2/32 --peer 10.211.55.3=10.244.0.3/32 --address 10.244.0.1/32",
    )?;
    let far = [far_end(b, 2)?, far_end(c, 3)?];
    wait_for(a, tunnel(3))?;
    check(etc.endpoint("b.example:8285")?.is_none(), || {
        "b.example has resolved already".into()
    })?;
    // Told by ICMP, which a connected socket with IP_RECVERR gets as an error.
    let socket = udp(a, tunnel(1), 0)?;
    let receive_errors = nix::sys::socket::sockopt::Ipv4RecvErr;
    nix::sys::socket::setsockopt(&socket, receive_errors, &true)
        .map_err(|errno| Error::os("no IP_RECVERR", errno.into()))?;
    tried("connect", socket.connect((tunnel(2), 9)))?;
    tried("send", socket.send(b"is anybody there?"))?;
    let told = socket.recv(&mut [0; 100]).err();
    check(
        told.as_ref().and_then(io::Error::raw_os_error) == Some(libc::ENETUNREACH),
        || format!("told of a peer without address: {told:?}"),
    )?;
    etc.set_names(&[("b.example", underlay(2))])?;
    wait_for(a, tunnel(2))?;
    let endpoint = etc.endpoint("b.example:8285")?;
    check(endpoint.as_deref() == Some("10.211.55.2:8285"), || {
        format!("b.example is {endpoint:?}")
    })?;
    wait_for(a, tunnel(3))?;
    let ended = stop(near)?;
    check(ended.dropped("peer-unresolved") > 0, || ended.log)?;
    far.into_iter().try_for_each(|end| stop(end).map(drop))
}

/// Addresses that cannot be a peer's, at the start and later, are no answers:
/// the names are asked for until they have others.
fn a_name_that_is_no_peers() -> Result<()> {
    const INSIDE: Ipv4Addr = Ipv4Addr::new(10, 244, 0, 77);
    let etc = Etc::new()?;
    etc.set_names(&[
        ("b.example", Ipv4Addr::UNSPECIFIED),
        ("c.example", INSIDE),
        ("d.example", underlay(3)),
    ])?;
    let hosts = Hosts::new()?;
    let [a, b, c] = &hosts.each;
    let near = etc.start(a, "--peer b.example=10.244.0.2/32 --address 10.244.0.1/24")?;
    etc.wait_for_operators_socket()?;
    for (name, number) in [("c.example", 3), ("d.example", 4)] {
        let answer = etc.operator.request(&format!(
            r#"{{"command":"peer-add","peer":"{name}","prefixes":["{}/32"]}}"#,
            tunnel(number)
        ))?;
        check(answer["ok"] == true, || answer.to_string())?;
    }
    wait_until("the last name is resolved", || {
        Ok(etc.endpoint("d.example:8285")?.is_some())
    })?;
    for name in ["b.example:8285", "c.example:8285"] {
        let endpoint = etc.endpoint(name)?;
        check(endpoint.is_none(), || format!("{name} is {endpoint:?}"))?;
    }
    etc.set_names(&[("b.example", underlay(2)), ("c.example", underlay(3))])?;
    let far = [far_end(b, 2)?, far_end(c, 3)?];
    wait_for(a, tunnel(2))?;
    wait_for(a, tunnel(3))?;
    let ended = stop(near)?;
    for reason in ["b.example", "10.244.0.77"] {
        check(ended.log.contains(reason), || ended.log.clone())?;
    }
    far.into_iter().try_for_each(|end| stop(end).map(drop))
}

/// Silent for long enough, it is looked for.
fn a_named_peer_that_moves() -> Result<()> {
    let etc = Etc::new()?;
    etc.set_names(&[("b.example", underlay(2))])?;
    let hosts = Hosts::new()?;
    let [a, b, c] = &hosts.each;
    let near = etc.start(a, "--peer b.example=10.244.0.2/32 --address 10.244.0.1/32")?;
    let old = far_end(b, 2)?;
    wait_for(a, tunnel(2))?;
    stop(old)?;
    etc.set_names(&[("b.example", underlay(3))])?;
    let new = far_end(c, 2)?;
    // Sends all the time.
    wait_for(a, tunnel(2))?;
    let endpoint = etc.endpoint("b.example:8285")?;
    check(endpoint.as_deref() == Some("10.211.55.3:8285"), || {
        format!("b.example is {endpoint:?}")
    })?;
    let ended = stop(near)?;
    check(
        ended.log.contains("10.211.55.2:8285") && ended.log.contains("10.211.55.3:8285"),
        || format!("not told of the move:\n{}", ended.log),
    )?;
    stop(new).map(drop)
}

/// At once, and without anything sent that could go unanswered.
fn a_reload_looks_for_named_peers() -> Result<()> {
    const PEER: &str = "b.example:8285";
    let etc = Etc::new()?;
    etc.set_names(&[("b.example", underlay(2))])?;
    let config = etc.operator.write(
        "fastvpn.toml",
        "address = [\"10.244.0.1/32\"]\n\
         [[peer]]\nendpoint = \"b.example\"\nprefixes = [\"10.244.0.2/32\"]\n\
         [[peer]]\nendpoint = \"late.example\"\nprefixes = [\"10.244.0.3/32\"]\n",
    )?;
    let hosts = Hosts::new()?;
    let [a, b, c] = &hosts.each;
    let near = etc.start(a, &format!("--config {config}"))?;
    let far = [far_end(b, 2)?, far_end(c, 2)?];
    etc.wait_for_operators_socket()?;
    let is_at = |peer, address: Ipv4Addr| {
        let endpoint = etc.endpoint(peer)?;
        Ok(endpoint == Some(format!("{address}:8285")))
    };
    check(is_at(PEER, underlay(2))?, || {
        "b.example is elsewhere".into()
    })?;
    etc.set_names(&[("b.example", underlay(3)), ("late.example", underlay(2))])?;
    let answer = etc.operator.request(r#"{"command":"reload"}"#)?;
    check(answer["ok"] == true, || answer.to_string())?;
    wait_until("the names are asked for", || {
        Ok(is_at(PEER, underlay(3))? && is_at("late.example:8285", underlay(2))?)
    })?;
    wait_for(a, tunnel(2))?;
    // By signal, too.
    etc.set_names(&[("b.example", underlay(2)), ("late.example", underlay(3))])?;
    let mut near = near;
    near.child().signal(Signal::SIGHUP);
    wait_until("the names are asked for", || is_at(PEER, underlay(2)))?;
    wait_for(a, tunnel(2))?;
    stop(near)?;
    far.into_iter().try_for_each(|end| stop(end).map(drop))
}

/// With an address of its own a tunnel starts all the same; without, nothing is
/// known of which to derive one.
fn no_peer_resolves_at_the_start() -> Result<()> {
    let etc = Etc::new()?;
    let hosts = Hosts::new()?;
    let [a, b, _] = &hosts.each;
    let refused = etc.start(a, "--peer b.example=10.244.0.2/32")?.wait()?;
    check(
        refused.status.code() == Some(1) && refused.log.contains("b.example"),
        || format!("{}:\n{}", refused.status, refused.log),
    )?;
    let near = etc.start(a, "--peer b.example=10.244.0.2/32 --address 10.244.0.1/32")?;
    etc.wait_for_operators_socket()?;
    let silence = ping(a, tunnel(2), 56, std::time::Duration::from_millis(200));
    check(silence.is_err(), || "an answer from nowhere".into())?;
    let far = far_end(b, 2)?;
    etc.set_names(&[("b.example", underlay(2))])?;
    wait_for(a, tunnel(2))?;
    stop(near)?;
    stop(far).map(drop)
}
