//! Bad flags and broken surroundings: one clear line, a status that is not
//! zero, and nothing left behind.

use std::io;
use std::net::Ipv4Addr;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, Stdio};

use fastvpn::error::{Error, Result};
use ipnet::IpNet;
use testbed::{Namespace, Pair, StaticRoutes};

use crate::support::{
    Ended, FASTVPN, TUNNEL, Tunnel, bulk, check, fastvpn, hosts, link, stop, tunnel_between, udp,
    wait_for,
};
use crate::tools::{inventory, nothing_left};

/// What `command` says in `namespace`, where it must fail with `status` and
/// leave nothing.
fn failure(namespace: &Namespace, mut command: Command, status: i32) -> Result<String> {
    let before = inventory(namespace)?;
    command.stdin(Stdio::null()).stdout(Stdio::null());
    let ended = Tunnel::spawn(namespace, command)?.wait()?;
    check(ended.status.code() == Some(status), || {
        format!("{}:\n{}", ended.status, ended.log)
    })?;
    nothing_left(namespace, &before)?;
    Ok(ended.log)
}

fn command(flags: &str) -> Command {
    let mut command = Command::new(FASTVPN);
    command.args(flags.split_whitespace());
    command
}

/// The one line of a failure must have all these parts.
pub fn one_line(namespace: &Namespace, command: Command, parts: &[&str]) -> Result<()> {
    let log = failure(namespace, command, 1)?;
    let is_one_line = log.starts_with("fastvpn: ") && log.lines().count() == 1;
    check(
        is_one_line && parts.iter().all(|part| log.contains(part)),
        || format!("not one line with {parts:?}:\n{log}"),
    )
}

/// Each with flags that are added to a good command line.
fn refusals(namespace: &Namespace, good: &str, cases: &[(&str, &[&str])]) -> Result<()> {
    cases.iter().try_for_each(|(flags, parts)| {
        let flags = format!("{good} {flags}");
        one_line(namespace, command(&flags), parts)
            .map_err(|error| Error::new(format!("{flags}: {error}")))
    })
}

const GOOD: &str = "--peer 10.211.55.123";

#[testbed::trial]
fn bad_flags() -> Result<()> {
    let hosts = hosts(1500)?;
    for (flags, part) in [
        ("--queues many", "--queues"),
        ("--mtu -1", "-1"),
        ("--address 10.9.0.1/33", "--address"),
        ("--address 10.9.0/24", "--address"),
        ("--address fd00::1/129", "--address"),
        ("--route default", "--route"),
        ("--listen 10.211.55.122:0", "--listen"),
        ("--listen 10.211.55.122:65536", "--listen"),
        ("--listen localhost", "--listen"),
        ("--cores 1-0", "--cores"),
        ("--cores x", "--cores"),
        ("--txqueuelen x", "--txqueuelen"),
        ("--without luck", "--without"),
        ("--log-format xml", "--log-format"),
        ("--io aio", "--io"),
        ("--quiet --verbose", "--quiet"),
        ("--no-such-flag", "--no-such-flag"),
        ("10.211.55.124", "10.211.55.124"),
        ("--peer 10.211.55.123:0", "--peer"),
        ("--peer 10.211.55.123:x", "--peer"),
        ("--peer [fd00::1", "--peer"),
        ("--peer", "--peer"),
    ] {
        let log = failure(&hosts.a, command(&format!("{GOOD} {flags}")), 2)?;
        check(log.starts_with("error: ") && log.contains(part), || {
            format!("{flags}:\n{log}")
        })?;
    }
    let log = failure(&hosts.a, command(""), 2)?;
    check(log.contains("--peer"), || log.clone())
}

#[testbed::trial]
fn flags_that_contradict() -> Result<()> {
    let hosts = hosts(1500)?;
    refusals(
        &hosts.a,
        GOOD,
        &[
            ("--queues 0", &["queues 0 ", "1..=256"]),
            ("--mtu 65508", &["mtu 65508 ", "68..=65507"]),
            ("--txqueuelen 0", &["txqueuelen 0 ", "1..=100000"]),
            ("--address 0.0.0.0/0", &["address 0.0.0.0/0"]),
            ("--route 10.9.0.1/24", &["10.9.0.1/24", "10.9.0.0/24"]),
            ("--tun sixteen-letters-", &["tun", "sixteen-letters-"]),
            ("--cores 0,4000", &["--cores", "4000"]),
            ("--listen 10.99.99.99", &["10.99.99.99", "--listen"]),
            ("--listen ::1", &["listen address ::1", "10.211.55.123"]),
            (
                "--mtu 1279 --address fd00::1/64",
                &["fd00::1/64", "1279", "--mtu 1280"],
            ),
            (
                "--mtu 1279 --route fd00:9::/64",
                &["fd00:9::/64", "1279", "--mtu 1280"],
            ),
            (
                "--listen 127.0.0.1",
                &["10.211.55.123", "listen address 127.0.0.1", "--listen"],
            ),
            // The underlay's own network, as the underlay has it.
            (
                "--address 10.211.55.200/24",
                &[
                    "10.211.55.200/24",
                    "underlay0",
                    "10.211.55.122/24",
                    "--address",
                ],
            ),
            (
                "--address 10.211.55.122/24",
                &["10.211.55.122/24", "underlay0"],
            ),
            (
                "--address 10.211.55.123/32",
                &["10.211.55.123/32", "peer 10.211.55.123:8285", "address"],
            ),
            (
                "--address 10.9.0.1/24 --peer 10.211.55.124=10.9.0.1/32",
                &["10.9.0.1/32", "own address"],
            ),
            (
                "--address fd00:9::1/64 --peer 10.211.55.124=fd00:9::1/128",
                &["fd00:9::1/128", "own address"],
            ),
            (
                "--control /tmp/no-such-directory/x.sock",
                &[
                    "/tmp/no-such-directory",
                    "no such file or directory",
                    "--control",
                ],
            ),
            ("--peer 10.211.55.124", &["--peer"]),
        ],
    )?;
    check(
        !std::path::Path::new("/tmp/no-such-directory").exists(),
        || "a directory is left".into(),
    )?;
    // Over an underlay with the smallest MTU for IPv6 it is the tunnel's own.
    let index = link(&hosts.a, "underlay0")?.index;
    hosts.a.netlink()?.set_mtu(index, 1280)?;
    let ipv6 = [(
        "--address fd00::1/64",
        &["fd00::1/64", "1252", "--mtu 1280"][..],
    )];
    refusals(&hosts.a, GOOD, &ipv6)?;
    hosts.a.netlink()?.set_mtu(index, 90)?;
    refusals(&hosts.a, GOOD, &[("", &["path MTU", "90"])])
}

#[testbed::trial]
fn peers_that_cannot_be() -> Result<()> {
    let hosts = hosts(1500)?;
    // One that the kernel would not choose to send from.
    let index = link(&hosts.a, "underlay0")?.index;
    let second = IpNet::new_assert(Ipv4Addr::new(10, 211, 55, 99).into(), 24);
    hosts.a.netlink()?.add_address(index, second)?;
    refusals(
        &hosts.a,
        "",
        &[
            (
                "--peer no-such-host.invalid",
                &["cannot resolve peer no-such-host.invalid"],
            ),
            ("--peer 192.0.2.1", &["192.0.2.1:8285", "unreachable"]),
            ("--peer fd00:99::1", &["[fd00:99::1]:8285", "unreachable"]),
            (
                "--peer 10.211.55.122",
                &["10.211.55.122", "this host itself"],
            ),
            ("--peer 127.0.0.1", &["127.0.0.1", "this host itself"]),
            ("--peer 127.0.1.1", &["127.0.1.1", "this host itself"]),
            ("--peer 10.211.55.99", &["10.211.55.99", "this host itself"]),
            ("--peer 0.0.0.0", &["peer 0.0.0.0"]),
            ("--peer 224.0.0.1", &["peer 224.0.0.1"]),
            ("--peer 10.211.55.255", &["10.211.55.255"]),
        ],
    )
}

#[testbed::trial]
fn routes_that_are_taken() -> Result<()> {
    let hosts = hosts(1500)?;
    let taken = "10.9.0.0/16".parse().map_err(|_| Error::new("bad net"))?;
    let index = link(&hosts.a, "underlay0")?.index;
    hosts.a.netlink()?.add_route(taken, None, Some(index))?;
    refusals(
        &hosts.a,
        GOOD,
        &[
            ("--route 10.9.0.0/16", &["10.9.0.0/16", "--route"]),
            (
                "--route 10.211.55.123/32",
                &["peer 10.211.55.123", "tunnel itself", "--route"],
            ),
            ("--route 10.211.55.0/24", &["10.211.55.0/24", "--route"]),
            // The first of them is taken back.
            (
                "--route 10.8.0.0/16 --route 10.9.0.0/16",
                &["10.9.0.0/16", "--route"],
            ),
        ],
    )
}

#[testbed::trial]
fn derived_addresses_that_clash() -> Result<()> {
    let hosts = hosts(1500)?;
    let net = |text: &str| -> Result<IpNet> {
        text.parse().map_err(|_| Error::new(format!("bad {text}")))
    };
    let index = link(&hosts.a, "underlay0")?.index;
    let mut netlink = hosts.a.netlink()?;
    netlink.add_route(net("10.244.9.0/24")?, None, Some(index))?;
    refusals(
        &hosts.a,
        GOOD,
        &[("", &["10.244.9.0/24", "underlay0", "--address"])],
    )?;
    netlink.del_route(net("10.244.9.0/24")?, None, None)?;
    netlink.add_address(index, net("10.244.7.7/24")?)?;
    refusals(
        &hosts.a,
        GOOD,
        &[("", &["10.244.7.7/24", "underlay0", "--address"])],
    )?;
    // Two hosts whose addresses end alike.
    let Pair { a, b: _far } = testbed::pair(&[(net("10.1.3.4/8")?, net("10.2.3.4/8")?)], 1500)?;
    refusals(
        &a,
        "--peer 10.2.3.4",
        &[("", &["10.1.3.4", "10.2.3.4", "10.244.3.4", "--address"])],
    )
}

#[testbed::trial]
fn names_that_are_taken() -> Result<()> {
    let hosts = hosts(1500)?;
    testbed::join(&hosts.a, &hosts.a, "taken0", "taken1")?;
    refusals(
        &hosts.a,
        GOOD,
        &[
            ("--tun taken0", &["taken0", "--tun"]),
            ("--tun lo", &["interface lo", "--tun"]),
        ],
    )?;
    // By another tunnel, which does not mind.
    let ends = tunnel_between(&hosts, &[])?;
    let other = "--listen 0.0.0.0:8286 --address 10.9.0.1/24";
    refusals(&hosts.a, GOOD, &[(other, &["fastvpn0", "--tun"])])?;
    bulk(&hosts.a, &hosts.b, TUNNEL[1].into(), 5)?;
    ends.into_iter().try_for_each(|end| stop(end).map(drop))
}

#[testbed::trial]
fn ports_that_are_taken() -> Result<()> {
    let hosts = hosts(1500)?;
    let socket = udp(&hosts.a, Ipv4Addr::UNSPECIFIED, 8285)?;
    for flags in ["--queues 1", "--queues 2", "--listen 10.211.55.122"] {
        refusals(&hosts.a, GOOD, &[(flags, &[":8285", "--listen"])])?;
    }
    drop(socket);
    // By another tunnel, which does not mind.
    let ends = tunnel_between(&hosts, &[])?;
    let other = "--tun other0 --address 10.9.0.1/24";
    refusals(&hosts.a, GOOD, &[(other, &["0.0.0.0:8285", "--listen"])])?;
    bulk(&hosts.a, &hosts.b, TUNNEL[1].into(), 5)?;
    ends.into_iter().try_for_each(|end| stop(end).map(drop))?;
    // Once it is free, nothing is in the way.
    let ends = tunnel_between(&hosts, &[])?;
    ends.into_iter().try_for_each(|end| stop(end).map(drop))
}

/// A command that prepares itself before it starts.
fn prepared(
    flags: &str,
    arrange: impl FnMut() -> io::Result<()> + Send + Sync + 'static,
) -> Command {
    let mut command = command(flags);
    // SAFETY: all that is passed here makes system calls only; it neither
    // allocates nor takes locks.
    unsafe {
        command.pre_exec(arrange);
    }
    command
}

fn done(result: libc::c_int) -> io::Result<()> {
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// The program to be started will have no capability: the bounding set is what
/// root gets (capabilities(7)).
pub fn drop_capabilities() -> io::Result<()> {
    for capability in 0.. {
        // SAFETY: prctl(2) with plain numbers; EINVAL behind the last capability.
        let result = unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) };
        if result != 0 {
            return Ok(());
        }
    }
    Ok(())
}

/// An empty file system over /dev/net, seen by this process alone.
pub fn hide_devices() -> io::Result<()> {
    // SAFETY: system calls with constant strings that outlive them.
    unsafe {
        done(libc::unshare(libc::CLONE_NEWNS))?;
        let private = libc::MS_REC | libc::MS_PRIVATE;
        let nothing = std::ptr::null();
        done(libc::mount(
            nothing,
            c"/".as_ptr(),
            nothing,
            private,
            nothing.cast(),
        ))?;
        done(libc::mount(
            c"none".as_ptr(),
            c"/dev/net".as_ptr(),
            c"tmpfs".as_ptr(),
            0,
            nothing.cast(),
        ))
    }
}

#[testbed::trial]
fn without_privilege() -> Result<()> {
    let hosts = hosts(1500)?;
    let helpless = prepared(GOOD, drop_capabilities);
    let parts = ["TUN device fastvpn0", "not permitted", "CAP_NET_ADMIN"];
    one_line(&hosts.a, helpless, &parts)?;
    // A device that is not ours to open.
    let locked_out = prepared(GOOD, || {
        hide_devices()?;
        // SAFETY: system calls with constant strings that outlive them.
        unsafe {
            let file = libc::creat(c"/dev/net/tun".as_ptr(), 0);
            done(if file < 0 { -1 } else { libc::close(file) })?;
        }
        drop_capabilities()
    });
    let parts = ["/dev/net/tun", "permission denied", "CAP_NET_ADMIN"];
    one_line(&hosts.a, locked_out, &parts)
}

#[testbed::trial]
fn a_tun_device_that_is_a_file() -> Result<()> {
    let hosts = hosts(1500)?;
    let misled = prepared(GOOD, || {
        hide_devices()?;
        // SAFETY: system calls with constant strings that outlive them.
        let file = unsafe { libc::creat(c"/dev/net/tun".as_ptr(), 0o600) };
        done(if file < 0 { -1 } else { 0 })
    });
    let parts = ["/dev/net/tun is not the TUN device", "mknod", "10 200"];
    one_line(&hosts.a, misled, &parts)
}

#[testbed::trial]
fn without_the_tun_device() -> Result<()> {
    let hosts = hosts(1500)?;
    let parts = ["/dev/net/tun", "no such file", "module tun"];
    // With the right to it (linux/capability.h) the device would be made.
    const CAP_MKNOD: libc::c_ulong = 27;
    let deviceless = prepared(GOOD, || {
        hide_devices()?;
        // SAFETY: prctl(2) with plain numbers.
        done(unsafe { libc::prctl(libc::PR_CAPBSET_DROP, CAP_MKNOD, 0, 0, 0) })
    });
    one_line(&hosts.a, deviceless, &parts)
}

/// As in a container whose seccomp profile forbids it (seccomp(2)). `refusal`:
/// what the filter returns for it.
pub fn forbid_io_uring(refusal: u32) -> io::Result<()> {
    use libc::{BPF_ABS, BPF_JEQ, BPF_JMP, BPF_K, BPF_LD, BPF_RET, BPF_W, sock_filter};
    let instruction = |code: u32, jt, jf, k| sock_filter {
        code: code as u16,
        jt,
        jf,
        k,
    };
    let setup = libc::SYS_io_uring_setup as u32;
    let filter = [
        // The system call's number is at the start of struct seccomp_data.
        instruction(BPF_LD | BPF_W | BPF_ABS, 0, 0, 0),
        instruction(BPF_JMP | BPF_JEQ | BPF_K, 0, 1, setup),
        instruction(BPF_RET | BPF_K, 0, 0, refusal),
        instruction(BPF_RET | BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog {
        len: filter.len() as u16,
        filter: filter.as_ptr().cast_mut(),
    };
    // SAFETY: the program and its instructions outlive the call, and the kernel
    // copies them.
    unsafe {
        done(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))?;
        done(libc::prctl(
            libc::PR_SET_SECCOMP,
            libc::SECCOMP_MODE_FILTER,
            &raw const program,
        ))
    }
}

/// Carries traffic between `near` at host A, as it is prepared, and an ordinary
/// tunnel at host B; returns what the former said.
fn carry(hosts: &Pair, mut near: Command) -> Result<Ended> {
    near.stdin(Stdio::null()).stdout(Stdio::null());
    let near = Tunnel::spawn(&hosts.a, near)?;
    let far = fastvpn(&hosts.b, "--queues 1 --peer 10.211.55.122")?;
    wait_for(&hosts.a, TUNNEL[1].into())?;
    bulk(&hosts.a, &hosts.b, TUNNEL[1].into(), 20)?;
    bulk(&hosts.b, &hosts.a, TUNNEL[0].into(), 20)?;
    stop(far)?;
    stop(near)
}

/// Asked for, it is missed; else there is epoll.
#[testbed::trial]
fn without_io_uring() -> Result<()> {
    let hosts = hosts(1500)?;
    for (errno, cause, hint) in [
        (libc::EPERM, "not permitted", "kernel.io_uring_disabled"),
        (libc::ENOSYS, "not implemented", "Linux 6.1"),
    ] {
        let forbid = move || forbid_io_uring(libc::SECCOMP_RET_ERRNO | errno as u32);
        let demanding = prepared(&format!("{GOOD} --io uring"), forbid);
        one_line(
            &hosts.a,
            demanding,
            &["cannot set up io_uring", cause, hint],
        )?;
        for io in ["", "--io auto"] {
            let ended = carry(&hosts, prepared(&format!("{GOOD} --queues 1 {io}"), forbid))?;
            let warnings = ended.warnings();
            let says = |part| warnings.iter().all(|line| line.contains(part));
            check(
                warnings.len() == 1
                    && ["io_uring", cause, hint, "using epoll"]
                        .into_iter()
                        .all(says)
                    && ended.log.contains("engine: epoll"),
                || ended.log.clone(),
            )?;
        }
    }
    Ok(())
}

/// With `--io epoll` it is not even tried: trying it would be the end.
#[testbed::trial]
fn with_io_uring_left_alone() -> Result<()> {
    let hosts = hosts(1500)?;
    let kill = || forbid_io_uring(libc::SECCOMP_RET_KILL_PROCESS);
    let mut trying = prepared(GOOD, kill);
    trying.stdin(Stdio::null()).stdout(Stdio::null());
    let ended = Tunnel::spawn(&hosts.a, trying)?.wait()?;
    check(ended.status.signal() == Some(libc::SIGSYS), || {
        format!("{}:\n{}", ended.status, ended.log)
    })?;
    let ended = carry(
        &hosts,
        prepared(&format!("{GOOD} --queues 1 --io epoll"), kill),
    )?;
    let has_warned = !ended.warnings().is_empty();
    check(!has_warned && ended.log.contains("engine: epoll"), || {
        ended.log
    })
}
