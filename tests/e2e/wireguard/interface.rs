//! Interfaces in the background, as wg-quick(8) makes and removes them.

use std::collections::BTreeSet;
use std::fs;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::process::Command;

use fastvpn::error::Result;
use serde_json::Value;
use testbed::program::Program;
use testbed::wireguard::{WG, beside, with_own_run};
use testbed::{Child, Namespace, Pair, configure, ip};

use super::ends::{End, Keys, Kind, MTU_BYTES, PORT, Reach, Underlay, hosts, inside};
use crate::operator::{Said, is_refusal, said};
use crate::support::{
    FAMILIES, FASTVPN, TUNNEL, bulk, check, fail, link, next_engine, tried, udp, wait_for,
    wait_until,
};
use crate::tools::Stream;

/// Name of the interface.
const NAME: &str = "wg0";

const WG_QUICK: Program = Program::debian("wg-quick", "wireguard-tools");

/// Where wg-quick's rules drop what comes for the interface by another way.
const NFT: Program = Program::debian("nft", "nftables");

/// A far address, which the other host has.
const FAR: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);

/// A host with a /run of its own and without a module for WireGuard, whose interface ends with
/// this.
struct Host<'a> {
    namespace: &'a Namespace,
    /// What holds its mounts.
    anchor: Child,
    /// What wg-quick is told to call: fastvpn, on the trial's engine.
    program: PathBuf,
    keys: &'a Keys,
}

impl Drop for Host<'_> {
    fn drop(&mut self) {
        // There is none at the end of a test that succeeds.
        let _ = ip(self.namespace, &format!("link del {NAME}"));
    }
}

impl<'a> Host<'a> {
    fn new(namespace: &'a Namespace, keys: &'a Keys) -> Result<Self> {
        let mut sleep = Command::new("sh");
        sleep.args([
            "-c",
            "mount -t tmpfs tmpfs /sys/module; echo > /run/up; exec sleep 600",
        ]);
        let anchor = namespace.spawn(with_own_run(&sleep)?)?;
        let up = PathBuf::from(format!("/proc/{}/root/run/up", anchor.pid()));
        wait_until("the host has its mounts", || Ok(up.exists()))?;
        tried("remove a file", fs::remove_file(up))?;
        let engine = next_engine().map_or_else(String::new, |io| format!("--io {io} "));
        let script = format!("#!/bin/sh\nexec {FASTVPN} {engine}\"$@\"\n");
        let program = keys.write("fastvpn", &script)?;
        make_executable(&program)?;
        Ok(Self {
            namespace,
            anchor,
            program,
            keys,
        })
    }

    /// Runs a program to its end.
    fn run(&self, program: &Command) -> Result<Said> {
        said(self.namespace, beside(self.anchor.pid(), program)?)
    }

    /// `fastvpn WORDS`, on the trial's engine.
    fn fastvpn(&self, words: &[&str]) -> Result<Said> {
        let mut program = Command::new(&self.program);
        program.args(words);
        self.run(&program)
    }

    fn wg(&self, words: &[&str]) -> Result<String> {
        let mut program = WG.program.command()?;
        program.args(words);
        let said = self.run(&program)?;
        succeeds("wg", &said)?;
        Ok(said.stdout)
    }

    /// `wg-quick WORD` with this file. The kernel has no WireGuard, whatever it has: a shell
    /// says so in the place of ip(8).
    fn wg_quick(&self, word: &str, file: &Path) -> Result<Said> {
        let script = tried("read", fs::read_to_string(path_of(WG_QUICK)?))?;
        let wg_quick = self.keys.write("wg-quick", &script)?;
        let ip = "#!/bin/sh\ncase \"$*\" in *'type wireguard'*) exit 2;; esac\n\
                  for ip in /usr/sbin/ip /sbin/ip /usr/bin/ip /bin/ip; do\n\
                  [ -x $ip ] && exec $ip \"$@\"\ndone\n";
        let ip = self.keys.write("ip", ip)?;
        make_executable(&ip)?;
        let mut program = Command::new("env");
        let path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
        let implementation = self.program.display();
        program
            .arg(path)
            .arg(format!(
                "WG_QUICK_USERSPACE_IMPLEMENTATION={implementation}"
            ))
            .arg("LOG_LEVEL=")
            .arg("bash")
            .arg(wg_quick)
            .arg(word)
            .arg(file);
        self.run(&program)
    }

    fn succeeds_wg_quick(&self, word: &str, file: &Path) -> Result<()> {
        succeeds("wg-quick", &self.wg_quick(word, file)?)
    }

    /// The process behind the interface.
    fn pid(&self) -> Result<u64> {
        let mut program = Command::new(FASTVPN);
        program.args(["status", "--tun", NAME, "--json"]);
        let said = self.run(&program)?;
        let status: Value = serde_json::from_str(&said.stdout).unwrap_or_default();
        let pid = status["pid"].as_u64();
        pid.map_or_else(|| fail(format!("no process in {said:?}")), Ok)
    }

    /// What there is besides the cable: interfaces, rules, routes, tables of firewalls, sockets.
    fn surroundings(&self) -> Result<String> {
        let script = format!(
            "ip -br link; ip -4 rule; ip -6 rule; ip -4 route show table all; \
             ip -6 route show table all; {} list ruleset; find /run; true",
            path_of(NFT)?.display()
        );
        let mut program = Command::new("sh");
        program.args(["-c", &script]);
        let said = self.run(&program)?;
        succeeds("sh", &said)?;
        // In no particular order.
        let lines: BTreeSet<_> = said.stdout.lines().map(str::trim).collect();
        let is_its_own = |line: &&&str| {
            // The directories stay, as those of other implementations do.
            !["/run/wireguard", "/run/fastvpn"].contains(*line)
        };
        let lines: Vec<_> = lines.iter().filter(is_its_own).copied().collect();
        Ok(lines.join("\n"))
    }

    /// Waits until the process is gone and all is as it was.
    fn is_as_before(&self, before: &str, pid: u64) -> Result<()> {
        wait_until("the process ends", || {
            // Whoever inherits it may not wait for it.
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            Ok(stat.is_empty() || stat.contains(") Z "))
        })?;
        // The kernel takes some of it away a moment later.
        let mut now = String::new();
        let left = wait_until("all is as it was", || {
            now = self.surroundings()?;
            Ok(now == before)
        });
        left.or_else(|error| fail(format!("{error}: was:\n{before}\n\nis:\n{now}")))
    }
}

fn path_of(program: Program) -> Result<PathBuf> {
    Ok(program.command()?.get_program().into())
}

fn make_executable(path: &Path) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let mode = fs::Permissions::from_mode(0o700);
    tried("make a file executable", fs::set_permissions(path, mode))
}

fn succeeds(what: &str, said: &Said) -> Result<()> {
    check(said.status.success(), || format!("{what}: {said:?}"))
}

/// The one that has started it ends when `wg` can talk to it, and it has nothing of that one.
#[testbed::trial(each_engine, wg)]
fn an_interface_is_in_the_background() -> Result<()> {
    let hosts = hosts()?;
    let keys = Keys::new(false)?;
    let host = Host::new(&hosts.a, &keys)?;
    let before = host.surroundings()?;
    for is_socket_removed in [false, true] {
        // As from a shell that has a file open.
        let mut program = Command::new("sh");
        let script = format!("exec 9</dev/zero; exec {} {NAME}", host.program.display());
        program.args(["-c", &script]);
        let said = host.run(&program)?;
        succeeds("fastvpn", &said)?;
        check(
            said.stderr.lines().count() == 1 && said.stdout.is_empty(),
            || format!("{said:?}"),
        )?;
        check(
            host.wg(&["show", "interfaces"])?.trim() == NAME,
            String::new,
        )?;
        let port = host.wg(&["show", NAME, "listen-port"])?;
        check(port.trim().parse().is_ok_and(|port: u16| port > 0), || port)?;
        let link = link(&hosts.a, NAME)?;
        check(!link.up && link.mtu == MTU_BYTES, || format!("{link:?}"))?;
        let pid = host.pid()?;
        has_let_go(pid)?;
        // There is one already.
        let second = host.fastvpn(&[NAME])?;
        is_refusal(&second, &["wg0.sock", "in use", "--takeover"])?;
        match is_socket_removed {
            false => ip(&hosts.a, &format!("link del {NAME}"))?,
            true => {
                let run = format!("/proc/{}/root/run/wireguard", host.anchor.pid());
                let socket = Path::new(&run).join(format!("{NAME}.sock"));
                tried("remove the socket", fs::remove_file(socket))?;
            }
        }
        host.is_as_before(&before, pid)?;
    }
    Ok(())
}

/// It is in a session of its own, and has no descriptor that somebody could miss.
fn has_let_go(pid: u64) -> Result<()> {
    let stat = tried("read", fs::read_to_string(format!("/proc/{pid}/stat")))?;
    // State, parent, group, session.
    let fields: Vec<_> = stat
        .rsplit(") ")
        .next()
        .unwrap_or_default()
        .split(' ')
        .collect();
    check(fields.get(3) == Some(&&*pid.to_string()), || stat.clone())?;
    let mut open = Vec::new();
    for entry in tried("list", fs::read_dir(format!("/proc/{pid}/fd")))?.flatten() {
        let to = fs::read_link(entry.path()).unwrap_or_default();
        open.push((entry.file_name(), to));
    }
    let is_null = |number: &str| {
        let found = open.iter().find(|(name, _)| name == number);
        found.is_some_and(|(_, to)| to == Path::new("/dev/null"))
    };
    let is_others = |to: &Path| to == Path::new("/dev/zero");
    let is_free =
        ["0", "1", "2"].into_iter().all(is_null) && !open.iter().any(|(_, to)| is_others(to));
    check(is_free, || format!("{open:?}"))
}

/// With one line, and nothing is left.
#[testbed::trial(wg)]
fn an_interface_that_cannot_be_is_refused() -> Result<()> {
    let hosts = hosts()?;
    let keys = Keys::new(false)?;
    let host = Host::new(&hosts.a, &keys)?;
    ip(&hosts.a, "link add wg0 type veth peer name other")?;
    let before = host.surroundings()?;
    for words in [&[NAME][..], &["-f", NAME]] {
        let said = host.fastvpn(words)?;
        check(said.stderr.contains("interface wg0 exists already"), || {
            format!("{said:?}")
        })?;
        check(said.status.code() == Some(1), || format!("{said:?}"))?;
    }
    is_refusal(&host.fastvpn(&[NAME])?, &["exists already"])?;
    is_refusal(&host.fastvpn(&["-v", "status"])?, &["status is a command"])?;
    let now = host.surroundings()?;
    check(now == before, || format!("was:\n{before}\n\nis:\n{now}"))
}

/// Host B, which is called, with a far address behind it.
fn called(hosts: &Pair, keys: &Keys) -> Result<End> {
    configure(&hosts.b, "lo", &[IpAddr::from(FAR).into()], 65536)?;
    keys.start(&hosts.b, 1, Kind::Fastvpn, Reach::UNKNOWN)
}

/// The file of host A, through whose interface all goes.
fn file(keys: &Keys) -> Result<PathBuf> {
    let file = keys.wg_quick_file(0, Reach::at(Underlay::V4.endpoint(1)), "")?;
    let text = tried("read", fs::read_to_string(&file))?;
    let lines = text
        .lines()
        .map(|line| match line.starts_with("AllowedIPs") {
            true => "AllowedIPs = 0.0.0.0/0, ::/0".to_string(),
            false => line.to_string(),
        });
    let text = lines.collect::<Vec<_>>().join("\n") + "\nPersistentKeepalive = 25\n";
    keys.write(&format!("{NAME}.conf"), &text)
}

/// All of a host's traffic goes through the tunnel, by wg-quick's own rules; and all that it
/// has made is gone when it is down.
#[testbed::trial(each_engine, wg)]
fn wg_quick_takes_a_tunnel_up_and_down() -> Result<()> {
    let hosts = hosts()?;
    let keys = Keys::new(true)?;
    let called = called(&hosts, &keys)?;
    let host = Host::new(&hosts.a, &keys)?;
    let file = file(&keys)?;
    let before = host.surroundings()?;
    for _ in 0..2 {
        host.succeeds_wg_quick("up", &file)?;
        for addresses in FAMILIES {
            wait_for(&hosts.a, addresses[1])?;
            wait_for(&hosts.b, addresses[0])?;
        }
        wait_for(&hosts.a, FAR.into())?;
        bulk(&hosts.a, &hosts.b, inside(1), 5)?;
        bulk(&hosts.b, &hosts.a, inside(0), 5)?;
        let pid = host.pid()?;
        // While it runs.
        let stream = Stream::start(&hosts.a, &hosts.b, inside(1))?;
        for mtu_bytes in [1280, 9000, MTU_BYTES] {
            ip(&hosts.a, &format!("link set {NAME} mtu {mtu_bytes}"))?;
            stream.wait_for_progress()?;
            bulk(&hosts.a, &hosts.b, FAMILIES[1][1], 1)?;
            check(link(&hosts.a, NAME)?.mtu == mtu_bytes, || {
                "the MTU is another".into()
            })?;
        }
        stream.finish()?;
        host.succeeds_wg_quick("down", &file)?;
        host.is_as_before(&before, pid)?;
    }
    called.stop()
}

/// Up again at once, whatever the last process is still at, and with the same port.
#[testbed::trial(each_engine, wg)]
fn wg_quick_does_not_wait() -> Result<()> {
    let hosts = hosts()?;
    let keys = Keys::new(true)?;
    let called = called(&hosts, &keys)?;
    let host = Host::new(&hosts.a, &keys)?;
    let file = file(&keys)?;
    let before = host.surroundings()?;
    host.succeeds_wg_quick("up", &file)?;
    for _ in 0..3 {
        host.succeeds_wg_quick("down", &file)?;
        host.succeeds_wg_quick("up", &file)?;
        let port = host.wg(&["show", NAME, "listen-port"])?;
        check(port.trim() == PORT.to_string(), || port)?;
        wait_for(&hosts.a, inside(1))?;
    }
    let pid = host.pid()?;
    host.succeeds_wg_quick("down", &file)?;
    host.is_as_before(&before, pid)?;
    // A port that stays taken is refused; then nothing is left either.
    let taken = udp(&hosts.a, Ipv4Addr::UNSPECIFIED, PORT)?;
    let refused = host.wg_quick("up", &file)?;
    check(
        !refused.status.success() && refused.stderr.contains("in use"),
        || format!("{refused:?}"),
    )?;
    drop(taken);
    wait_until("nothing is left", || Ok(host.surroundings()? == before))?;
    called.stop()
}

/// A new process has all that `wg` and `ip` have set, and nobody notices.
#[testbed::trial(each_engine, wg)]
fn an_interface_is_taken_over() -> Result<()> {
    let hosts = hosts()?;
    let keys = Keys::new(true)?;
    let called = called(&hosts, &keys)?;
    let host = Host::new(&hosts.a, &keys)?;
    let file = file(&keys)?;
    let before = host.surroundings()?;
    host.succeeds_wg_quick("up", &file)?;
    wait_for(&hosts.a, inside(1))?;
    ip(&hosts.a, &format!("link set {NAME} mtu 1300"))?;
    let stream = Stream::start(&hosts.a, &hosts.b, inside(1))?;
    stream.wait_for_progress()?;
    let shown = host.wg(&["showconf", NAME])?;
    let mut pid = host.pid()?;
    for _ in 0..2 {
        let said = host.fastvpn(&["--takeover", NAME])?;
        succeeds("fastvpn", &said)?;
        let new = host.pid()?;
        check(new != pid, || "it is the old process".into())?;
        pid = new;
        has_let_go(pid)?;
        let now = host.wg(&["showconf", NAME])?;
        check(now == shown, || format!("was:\n{shown}\n\nis:\n{now}"))?;
        check(link(&hosts.a, NAME)?.mtu == 1300, || {
            "the MTU is another".into()
        })?;
        stream.wait_for_progress()?;
        wait_for(&hosts.b, TUNNEL[0].into())?;
    }
    stream.finish()?;
    // What it is not.
    let key = keys.private_file(0)?.display().to_string();
    let said = host.fastvpn(&["--takeover", "--tun", NAME, "--private-key", &key])?;
    check(
        said.status.code() == Some(1) && said.stderr.contains("configured by `wg`"),
        || format!("{said:?}"),
    )?;
    host.succeeds_wg_quick("down", &file)?;
    host.is_as_before(&before, pid)?;
    called.stop()
}
