//! `fastvpn check`: what it finds on hosts that have everything, and on hosts that
//! lack something, and that it leaves them as they were.

use std::io::{self, Read};
use std::net::{Ipv6Addr, UdpSocket};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use fastvpn::error::{Error, Result};
use fastvpn::host::netlink::Netlink;
use serde_json::Value;
use testbed::{Namespace, StaticRoutes, UNDERLAY_NAME};
use tun_rs::DeviceBuilder;

use crate::cli::errors::{drop_capabilities, forbid_io_uring, hide_devices};
use crate::host::surroundings::set_up;
use crate::host::underlay::{Routed, routed, set_mtu};
use crate::operator::Operator;
use crate::support::{
    FASTVPN, UNDERLAY, check, fail, fastvpn, hosts, is_in_user_namespace, link, stop, tried,
    tunnel_between, udp, wait_until,
};
use crate::tools::{inventory, nothing_left};

/// What a check printed.
struct Report {
    status: Option<i32>,
    text: String,
    errors: String,
}

/// Runs `fastvpn check FLAGS` in a namespace, which must be the same after it.
/// `arrange` prepares the process.
fn run(
    namespace: &Namespace,
    flags: &str,
    arrange: impl FnMut() -> io::Result<()> + Send + Sync + 'static,
) -> Result<Report> {
    let before = inventory(namespace)?;
    let mut command = Command::new(FASTVPN);
    command
        .arg("check")
        .args(flags.split_whitespace())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    // SAFETY: all that is passed here makes system calls only; it neither
    // allocates nor takes locks.
    unsafe {
        command.pre_exec(arrange);
    }
    let mut child = namespace.spawn(command)?;
    let read = |pipe: Option<Box<dyn Read>>| {
        let mut text = String::new();
        let mut pipe = pipe.ok_or_else(|| Error::new("no pipe"))?;
        tried("read what the check says", pipe.read_to_string(&mut text))?;
        Ok::<_, Error>(text)
    };
    let process = child.process();
    let text = read(process.stdout.take().map(|pipe| Box::new(pipe) as _))?;
    let errors = read(process.stderr.take().map(|pipe| Box::new(pipe) as _))?;
    let mut status = None;
    wait_until("the check ends", || {
        status = child.try_wait()?;
        Ok(status.is_some())
    })?;
    nothing_left(namespace, &before)?;
    let status = status.and_then(|status| status.code());
    Ok(Report {
        status,
        text,
        errors,
    })
}

/// The items of `fastvpn check --json FLAGS`, which must end with `status`.
fn items(
    namespace: &Namespace,
    flags: &str,
    status: i32,
    arrange: impl FnMut() -> io::Result<()> + Send + Sync + 'static,
) -> Result<Vec<Value>> {
    let report = run(namespace, &format!("--json {flags}"), arrange)?;
    check(
        report.status == Some(status) && report.errors.is_empty(),
        || format!("{:?}: {}{}", report.status, report.errors, report.text),
    )?;
    match serde_json::from_str(&report.text) {
        Ok(Value::Array(items)) => Ok(items),
        _ => fail(format!("no JSON array: {}", report.text)),
    }
}

fn nothing() -> io::Result<()> {
    Ok(())
}

/// One item of all.
fn item<'a>(items: &'a [Value], name: &str) -> Result<&'a Value> {
    let found = items.iter().find(|item| item["name"] == name);
    found.ok_or_else(|| Error::new(format!("no item {name} in {items:?}")))
}

/// An item must have this status, and these parts in what it says.
fn expect(items: &[Value], name: &str, status: &str, parts: &[&str]) -> Result<()> {
    let item = item(items, name)?;
    let text = item.to_string();
    check(
        item["status"] == status && parts.iter().all(|part| text.contains(part)),
        || format!("{name} is not {status} with {parts:?}: {text}"),
    )
}

/// What fastvpn cannot run without, and what every kernel of today has.
const REQUIRED: [&str; 6] = [
    "CAP_NET_ADMIN",
    "/dev/net/tun",
    "TUN queues",
    "UDP_SEGMENT",
    "UDP_GRO",
    "SO_REUSEPORT",
];

#[testbed::trial]
fn check_agrees_with_the_tunnel() -> Result<()> {
    let hosts = hosts(1500)?;
    let items = items(&hosts.a, &format!("--peer {}", UNDERLAY[1]), 0, nothing)?;
    for name in REQUIRED {
        expect(&items, name, "ok", &[])?;
    }
    // No tunnel runs over there yet.
    expect(&items, "peer", "info", &["nothing receives on that port"])?;
    expect(&items, "path MTU", "ok", &["1500", "MTU 1472"])?;
    expect(&items, "tunnel address", "ok", &["10.244.55.122/16"])?;
    expect(&items, "UDP port", "ok", &["8285"])?;
    expect(&items, "TUN name", "ok", &["fastvpn0"])?;
    // The tunnel's own words about what it uses.
    let [a, b] = tunnel_between(&hosts, &["--queues", "2"])?;
    stop(b)?;
    let log = stop(a)?.log;
    for (name, words) in [
        ("TUN USO", "USO"),
        ("UDP_SEGMENT", "UDP_SEGMENT"),
        ("UDP_GRO", "UDP_GRO"),
    ] {
        let is_on = log.contains(&format!("{words} on"));
        let status = if is_on { "ok" } else { "degraded" };
        expect(&items, name, status, &[])?;
    }
    if log.contains("engine: epoll") {
        expect(&items, "io_uring", "degraded", &["epoll"])?;
    } else {
        expect(&items, "io_uring", "ok", &[])?;
    }
    let is_steered = !log.contains("no eBPF here");
    let status = if is_steered { "ok" } else { "degraded" };
    expect(&items, "TUN steering", status, &["eBPF"])
}

#[testbed::trial]
fn check_table_and_json_agree() -> Result<()> {
    let hosts = hosts(1500)?;
    let flags = "--peer 10.211.55.123 --queues 3";
    let items = items(&hosts.a, flags, 0, nothing)?;
    let report = run(&hosts.a, flags, nothing)?;
    check(report.status == Some(0), || report.errors.clone())?;
    let mut lines = report.text.lines().peekable();
    for item in &items {
        let field = |key: &str| item[key].as_str().unwrap_or_default();
        let keys = item.as_object().map(|object| object.len());
        check(keys == Some(5), || format!("{item}"))?;
        let line = lines.next().unwrap_or_default();
        let words = [field("status"), field("name"), field("found")];
        check(
            line.starts_with(words[0]) && line.ends_with(words[2]) && line.contains(words[1]),
            || format!("{item} is shown as {line:?}"),
        )?;
        for (key, label) in [("cost", "cost: "), ("remedy", "fix: ")] {
            if item[key].is_null() {
                continue;
            }
            let remark = lines.next().unwrap_or_default().trim_start();
            check(remark == format!("{label}{}", field(key)), || {
                format!("{item} is shown with {remark:?}")
            })?;
        }
    }
    check(lines.next() == Some(""), || report.text.clone())?;
    let verdict = lines.next().unwrap_or_default();
    check(verdict.starts_with("fastvpn can run here"), || {
        verdict.into()
    })
}

/// In the namespace that the tests themselves run in, with all it has.
#[testbed::trial]
fn check_leaves_this_host_alone() -> Result<()> {
    let interfaces = || Ok::<_, Error>((testbed::interfaces()?, Netlink::open()?.addresses()?));
    let before = interfaces()?;
    let output = tried(
        "run the check",
        Command::new(FASTVPN).args(["check", "--json"]).output(),
    )?;
    check(interfaces()? == before, || "interfaces have changed".into())?;
    let items: Vec<Value> = serde_json::from_slice(&output.stdout)
        .map_err(|error| Error::new(format!("no JSON: {error}")))?;
    // The tests may be root in a user namespace only, and this network is
    // outside of it.
    let status = if is_in_user_namespace() {
        "missing"
    } else {
        "ok"
    };
    expect(&items, "CAP_NET_ADMIN", status, &[])?;
    let can_run = items.iter().all(|item| item["status"] != "missing");
    check(output.status.success() == can_run, || {
        format!("{} with {items:?}", output.status)
    })
}

#[testbed::trial]
fn check_without_privilege() -> Result<()> {
    let hosts = hosts(1500)?;
    let helpless = items(&hosts.a, "", 1, drop_capabilities)?;
    let remedy = ["root", "setcap cap_net_admin"];
    expect(&helpless, "CAP_NET_ADMIN", "missing", &remedy)?;
    let parts = ["--queues", "cap_bpf"];
    expect(&helpless, "TUN steering", "degraded", &parts)?;
    for name in ["TUN queues", "TUN USO"] {
        expect(&helpless, name, "unknown", &["not probed: needs root"])?;
    }
    // What takes no rights is probed all the same.
    for name in ["/dev/net/tun", "UDP_SEGMENT", "UDP_GRO", "SO_REUSEPORT"] {
        expect(&helpless, name, "ok", &[])?;
    }
    let report = run(&hosts.a, "", drop_capabilities)?;
    let verdict = report.text.lines().last().unwrap_or_default();
    check(
        report.status == Some(1) && verdict == "fastvpn cannot run here: CAP_NET_ADMIN.",
        || report.text.clone(),
    )
}

#[testbed::trial]
fn check_without_io_uring() -> Result<()> {
    let hosts = hosts(1500)?;
    for (errno, cause) in [
        (libc::EPERM, "not permitted"),
        (libc::ENOSYS, "not implemented"),
    ] {
        let items = items(&hosts.a, "", 0, move || {
            forbid_io_uring(libc::SECCOMP_RET_ERRNO | errno as u32)
        })?;
        expect(&items, "io_uring", "degraded", &[cause, "epoll", "seccomp"])?;
        expect(&items, "TUN queues", "ok", &[])?;
    }
    Ok(())
}

#[testbed::trial]
fn check_without_the_tun_device() -> Result<()> {
    let hosts = hosts(1500)?;
    // With the right to it (linux/capability.h) a tunnel makes the device.
    const CAP_MKNOD: libc::c_ulong = 27;
    let deviceless = items(&hosts.a, "", 1, || {
        hide_devices()?;
        // SAFETY: prctl(2) with plain numbers.
        match unsafe { libc::prctl(libc::PR_CAPBSET_DROP, CAP_MKNOD, 0, 0, 0) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    })?;
    let parts = ["no such file", "modprobe tun", "container"];
    expect(&deviceless, "/dev/net/tun", "missing", &parts)?;
    expect(&deviceless, "TUN queues", "unknown", &["/dev/net/tun"])?;
    expect(&deviceless, "UDP_SEGMENT", "ok", &[])?;
    let makeable = items(&hosts.a, "", 0, hide_devices)?;
    expect(&makeable, "/dev/net/tun", "degraded", &["CAP_MKNOD"])
}

/// As the tunnel does, by the route and the interface; what the kernel has learnt
/// from ICMP, which anybody can send, does not count.
#[testbed::trial]
fn check_of_the_path_mtu() -> Result<()> {
    let Routed { hosts, router } = routed()?;
    let flags = "--peer 10.211.56.123";
    let path = |name, status, parts: &[&str]| {
        expect(&items(&hosts.a, flags, 0, nothing)?, name, status, parts)
    };
    path("path MTU", "ok", &["1500", "MTU 1472"])?;
    set_mtu(&router, "right", 1300)?;
    set_mtu(&hosts.b, UNDERLAY_NAME, 1300)?;
    let probe = udp(&hosts.a, UNDERLAY[0], 0)?;
    tried("connect", probe.connect("10.211.56.123:9"))?;
    wait_until("the path MTU is known", || is_refused(&probe, 1300))?;
    path("path MTU", "ok", &["1500", "MTU 1472"])?;
    for (mtu_bytes, status, tunnel) in [(1400, "ok", "MTU 1372"), (1200, "degraded", "MTU 1172")] {
        set_mtu(&hosts.a, UNDERLAY_NAME, mtu_bytes)?;
        let mtu = mtu_bytes.to_string();
        path("path MTU", status, &[&mtu, tunnel])?;
    }
    Ok(())
}

/// Sends a datagram one byte longer than a path takes; `EMSGSIZE` says that the
/// host knows.
fn is_refused(probe: &UdpSocket, mtu_bytes: u32) -> Result<bool> {
    let sent = probe.send(&vec![0; mtu_bytes as usize - 28 + 1]);
    Ok(sent.is_err_and(|error| error.raw_os_error() == Some(libc::EMSGSIZE)))
}

#[testbed::trial]
fn check_of_peers_that_cannot_be() -> Result<()> {
    let hosts = hosts(1500)?;
    for (peer, part) in [
        ("10.211.55.122", "this host itself"),
        ("127.0.0.1", "this host itself"),
        ("0.0.0.0", "no address of a host"),
        ("192.0.2.1", "unreachable"),
        ("no-such-host.invalid", "cannot resolve"),
    ] {
        let items = items(&hosts.a, &format!("--peer {peer}"), 1, nothing)?;
        expect(&items, "peer", "missing", &[part])?;
    }
    let taken = "10.244.9.0/24".parse();
    let taken = taken.map_err(|_| Error::new("bad net"))?;
    let index = link(&hosts.a, UNDERLAY_NAME)?.index;
    hosts.a.netlink()?.add_route(taken, None, Some(index))?;
    let items = items(&hosts.a, "--peer 10.211.55.123", 0, nothing)?;
    let parts = ["10.244.9.0/24", "--address"];
    expect(&items, "tunnel address", "degraded", &parts)
}

#[testbed::trial]
fn check_of_what_is_taken() -> Result<()> {
    let hosts = hosts(1500)?;
    // A tunnel that does not answer at the usual path may be anybody's.
    let operator = Operator::new()?;
    let socket = operator.socket_text();
    let flags = format!("--queues 1 --peer {} --control {socket}", UNDERLAY[1]);
    let tunnel = fastvpn(&hosts.a, &flags)?;
    operator.wait()?;
    let running = items(&hosts.a, "", 0, nothing)?;
    expect(&running, "UDP port", "degraded", &["in use", "--listen"])?;
    expect(&running, "TUN name", "degraded", &["in use", "--tun"])?;
    stop(tunnel)?;
    // A device that outlives its process; it goes with the namespace.
    let leave_over = || {
        let device = DeviceBuilder::new().name("fastvpn0").build_sync()?;
        device.persist()
    };
    tried("leave a TUN device over", hosts.a.run(leave_over))?;
    let parts = ["in use", "ip link delete fastvpn0"];
    let stale = items(&hosts.a, "", 0, nothing)?;
    expect(&stale, "UDP port", "ok", &[])?;
    expect(&stale, "TUN name", "degraded", &parts)?;
    // A start listens on IPv6, too, unless all peers are IPv4 addresses.
    set_up(&hosts.a, "lo", true)?;
    let _taken = udp(&hosts.a, Ipv6Addr::LOCALHOST, 8285)?;
    let both = items(&hosts.a, "", 0, nothing)?;
    expect(&both, "UDP port", "degraded", &["8285", "in use"])
}

/// A check knows the running tunnel's port, device, and derived address.
#[testbed::trial]
fn check_beside_a_running_tunnel() -> Result<()> {
    let hosts = hosts(1500)?;
    let ends = tunnel_between(&hosts, &["--queues", "1"])?;
    let pid = format!("process {}", ends[0].pid());
    let running = items(&hosts.a, &format!("--peer {}", UNDERLAY[1]), 0, nothing)?;
    expect(&running, "UDP port", "ok", &["8285", &pid])?;
    expect(&running, "TUN name", "ok", &["fastvpn0", &pid])?;
    expect(&running, "tunnel address", "ok", &["10.244.55.122/16"])?;
    ends.into_iter().try_for_each(|end| stop(end).map(drop))
}

/// What a start would say of a file, and what a reload would, by the same words.
#[testbed::trial]
fn check_of_a_file() -> Result<()> {
    let hosts = hosts(1500)?;
    let operator = Operator::new()?;
    let file = |settings: &str, endpoint: &str, prefix: &str| {
        let peer = format!("[[peer]]\nendpoint = {endpoint:?}\nprefixes = [{prefix:?}]\n");
        operator.write("fastvpn.toml", &format!("{settings}\n{peer}"))
    };
    let good = "address = [\"10.250.0.1/24\"]\nlisten = \"0.0.0.0:9000\"\ntun = \"other0\"";
    let flags = format!("--config {}", operator.path("fastvpn.toml").display());
    let socket = operator.socket_text();
    for is_running in [false, true] {
        file(good, "10.211.55.123:9000", "172.20.0.0/16")?;
        let start = format!("{flags} --queues 1 --control {socket}");
        let tunnel = match is_running {
            true => Some(fastvpn(&hosts.a, &start)?),
            false => None,
        };
        if is_running {
            operator.wait()?;
        }
        let found = items(&hosts.a, &flags, 0, nothing)?;
        expect(&found, "configuration", "ok", &["1 peers, 1 prefixes"])?;
        expect(
            &found,
            "UDP port",
            if is_running { "degraded" } else { "ok" },
            &["9000"],
        )?;
        expect(
            &found,
            "TUN name",
            if is_running { "degraded" } else { "ok" },
            &["other0"],
        )?;
        let index = link(&hosts.a, UNDERLAY_NAME)?.index;
        let taken = "172.21.0.0/16".parse().map_err(|_| Error::new("bad net"))?;
        if !is_running {
            hosts.a.netlink()?.add_route(taken, None, Some(index))?;
        }
        for (settings, endpoint, prefix, parts) in [
            (
                "mtv = 1",
                "10.211.55.123",
                "172.20.0.0/16",
                ["fastvpn.toml:1:1: ", "mtv"],
            ),
            (
                good,
                "10.211.55.122:9000",
                "172.20.0.0/16",
                ["10.211.55.122", "this host"],
            ),
            (
                good,
                "10.211.55.123",
                "172.21.0.0/16",
                ["172.21.0.0/16", UNDERLAY_NAME],
            ),
            (
                good,
                "10.211.55.123",
                "10.211.55.123/32",
                ["10.211.55.123", "tunnel itself"],
            ),
            (
                "address = [\"10.211.55.9/24\"]",
                "10.211.55.123",
                "172.20.0.0/16",
                ["10.211.55.9/24", UNDERLAY_NAME],
            ),
        ] {
            file(settings, endpoint, prefix)?;
            let bad = items(&hosts.a, &flags, 1, nothing)?;
            expect(&bad, "configuration", "missing", &parts)?;
            if is_running {
                operator.refuses("reload", &parts)?;
            }
        }
        file(good, "no-such-host.invalid", "172.20.0.0/16")?;
        let unresolved = items(&hosts.a, &flags, 0, nothing)?;
        let status = item(&unresolved, "configuration")?["status"].clone();
        check(status == "degraded", || format!("{unresolved:?}"))?;
        tunnel.map_or(Ok(()), |tunnel| stop(tunnel).map(drop))?;
    }
    Ok(())
}

#[testbed::trial]
fn check_of_bad_flags() -> Result<()> {
    let hosts = hosts(1500)?;
    for (flags, part) in [
        ("--peer", "--peer"),
        ("--peer 10.211.55.123:0", "--peer"),
        ("--queues 0", "--queues"),
        ("--colour", "--colour"),
    ] {
        let report = run(&hosts.a, flags, nothing)?;
        check(
            report.status == Some(2) && report.errors.contains(part) && report.text.is_empty(),
            || format!("{flags}: {:?}: {}", report.status, report.errors),
        )?;
    }
    Ok(())
}

/// The check of the file that a running tunnel reads knows that tunnel, and says what a reload
/// would come to, by the tunnel's own words.
#[testbed::trial]
fn check_of_the_file_of_a_running_tunnel() -> Result<()> {
    let hosts = hosts(1500)?;
    let operator = Operator::new()?;
    let path = operator.path("fastvpn.toml").display().to_string();
    let file = |settings: &str, prefixes: &str| {
        let text = format!(
            "listen = \"0.0.0.0:9000\"\naddress = [\"10.250.0.1/24\"]\n{settings}\n\
             [[peer]]\nendpoint = \"10.211.55.123\"\nprefixes = [{prefixes}]\n"
        );
        operator.write("fastvpn.toml", &text)
    };
    let (tun, prefix) = ("tun = \"own0\"\nqueues = 1", "\"172.20.0.0/16\"");
    file(tun, prefix)?;
    let flags = format!("--config {path}");
    let tunnel = fastvpn(&hosts.a, &flags)?;
    tunnel.wait_for_line("engine: ")?;
    let pid = format!("process {}", tunnel.pid());
    let checked = |status: i32, expected: &[(&str, &str, &[&str])]| {
        let items = items(&hosts.a, &flags, status, nothing)?;
        let mut expected = expected.iter();
        expected.try_for_each(|(name, status, parts)| expect(&items, name, status, parts))
    };
    // Device, port, address and route are its own.
    checked(
        0,
        &[
            ("configuration", "ok", &["1 peers, 1 prefixes"]),
            ("reload", "ok", &["would change nothing", &pid]),
            ("UDP port", "ok", &["9000", &pid]),
            ("TUN name", "ok", &["own0", &pid]),
        ],
    )?;
    let more = format!("{prefix}, \"172.22.0.0/16\"");
    file("tun = \"own0\"\nqueues = 3\nhop = true", &more)?;
    let words = "1 prefix added; changed: hop; at the next start: queues";
    checked(0, &[("reload", "info", &[words, &pid])])?;
    // It was only asked.
    file(tun, prefix)?;
    checked(0, &[("reload", "ok", &["would change nothing"])])?;
    // Another device by now; the tunnel is found by the file.
    file("tun = \"new0\"\nqueues = 1", prefix)?;
    checked(
        0,
        &[
            ("TUN name", "ok", &["new0 is free"]),
            ("UDP port", "ok", &["9000", &pid]),
            ("reload", "info", &["at the next start: tun"]),
        ],
    )?;
    // A start could be encrypted.
    let key = operator.path("key");
    let key_text = "yAnz5TF+lXXJte14tji3zlMNq+hd2rYUIgJBgB3fBmk=\n";
    tried("write a key", std::fs::write(&key, key_text))?;
    let mode = PermissionsExt::from_mode(0o600);
    tried("protect a key", std::fs::set_permissions(&key, mode))?;
    let text = format!(
        "tun = \"own0\"\naddress = [\"10.250.0.1/24\"]\nprivate-key = {:?}\n[[peer]]\npublic-key = \
         \"xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg=\"\nprefixes = [{prefix}]\n",
        key.display()
    );
    operator.write("fastvpn.toml", &text)?;
    checked(
        0,
        &[("reload", "degraded", &["cannot become encrypted", "start"])],
    )?;
    // What is bad for both is said of both.
    let index = link(&hosts.a, UNDERLAY_NAME)?.index;
    let taken = "172.21.0.0/16".parse().map_err(|_| Error::new("bad net"))?;
    hosts.a.netlink()?.add_route(taken, None, Some(index))?;
    file(tun, "\"172.21.0.0/16\"")?;
    let parts = &["172.21.0.0/16", UNDERLAY_NAME][..];
    checked(
        1,
        &[
            ("configuration", "missing", parts),
            ("reload", "degraded", parts),
        ],
    )?;
    // A file of another name is not what it reads.
    file(tun, prefix)?;
    let other = operator.path("other.toml");
    tried("copy a file", std::fs::copy(&path, &other))?;
    let flags = format!("--config {}", other.display());
    let items = items(&hosts.a, &flags, 0, nothing)?;
    expect(
        &items,
        "reload",
        "info",
        &[&path, "would not read this one"],
    )?;
    stop(tunnel).map(drop)
}
