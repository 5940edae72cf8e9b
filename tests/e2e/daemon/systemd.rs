//! The unit under a real systemd.

use std::path::Path;

use fastvpn::error::Result;
use tempfile::TempDir;
use testbed::Pair;
use testbed::systemd::{ANALYZE, Systemd};

use crate::numbered::{self, Sink, Streams};
use crate::support::{
    FASTVPN, TUNNEL, check, fail, fastvpn, hosts, stop, tried, udp, wait_for, wait_until,
    without_backlog_drops,
};
use crate::tools::{inventory, nothing_left};

const PATH: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/packaging/fastvpn@.service");
pub const UNIT: &str = include_str!("../../../packaging/fastvpn@.service");
pub const FILE: &str = "[[peer]]\nendpoint = \"10.211.55.123\"\n";

/// The instance's name, and the device's.
const NAME: &str = "office";
pub const SERVICE: &str = "fastvpn@office.service";

/// Its log goes to a file, as there is no journal. And a test has no time to wait for a watchdog of
/// half a minute.
pub const OVERRIDE: &str = "[Service]\nStandardError=append:/run/log\nWatchdogSec=10\n";

/// Most that systemd-analyze may find wrong, in tenths.
const EXPOSURE_MAX: &str = "--threshold=20";

#[testbed::trial(needs_root, systemd)]
fn the_unit_leaves_little_exposed() -> Result<()> {
    let mut command = ANALYZE.command()?;
    command.args([
        "security",
        "--offline=true",
        EXPOSURE_MAX,
        "--no-pager",
        PATH,
    ]);
    let output = tried("run systemd-analyze", command.output())?;
    let said = String::from_utf8_lossy(&output.stdout);
    check(output.status.success(), || said.to_string())
}

/// A machine with the service.
pub struct Machine(pub Systemd);

impl Machine {
    /// A property of the service's that is a number; 0 if it is none.
    pub fn number(&self, property: &str) -> Result<u32> {
        Ok(self.0.property(SERVICE, property)?.parse().unwrap_or(0))
    }

    /// The main process.
    pub fn pid(&self) -> Result<u32> {
        self.number("MainPID")
    }

    /// Whether it runs.
    pub fn is_active(&self) -> Result<bool> {
        Ok(self.0.property(SERVICE, "ActiveState")? == "active")
    }

    /// What the service has logged, and what systemd says of it.
    pub fn log(&self) -> String {
        let log = self.0.tell("cat /run/log").unwrap_or_default();
        let status = self.0.run(&["systemctl", "status", "--no-pager", SERVICE]);
        let status = status.map(|output| output.stdout).unwrap_or_default();
        format!("{log}\n{}", String::from_utf8_lossy(&status))
    }

    /// Installs another copy of the program, and has it take over.
    pub fn upgrade(&self) -> Result<()> {
        let old = self.pid()?;
        self.0.tell("cp /usr/bin/fastvpn /usr/bin/fastvpn.new")?;
        self.0.tell("mv /usr/bin/fastvpn.new /usr/bin/fastvpn")?;
        let upgraded = self.0.tell(&format!("fastvpn upgrade --tun {NAME}"));
        upgraded.map_err(|error| error.hint(self.log()))?;
        let new = self.pid()?;
        check(new != 0 && new != old && self.is_active()?, || {
            format!("main process {old}, then {new}:\n{}", self.log())
        })?;
        let program = self.program()?;
        check(program == "/usr/bin/fastvpn", || program.clone())
    }

    /// What the main process runs. Of one that another has replaced, it says so.
    pub fn program(&self) -> Result<String> {
        self.0.tell(&format!("readlink /proc/{}/exe", self.pid()?))
    }

    /// Sends the main process a signal, and waits for another one.
    pub fn is_restarted_after(&self, signal: &str) -> Result<()> {
        let (pid, count) = (self.pid()?, self.number("NRestarts")?);
        self.0.tell(&format!("kill -{signal} {pid}"))?;
        wait_until("the service is started again", || {
            Ok(self.number("NRestarts")? > count && self.is_active()? && self.pid()? != pid)
        })
    }
}

/// Datagrams both ways between hosts, of which none may be lost.
pub struct Traffic<'a>(pub &'a Pair);

impl Traffic<'_> {
    const PORT: u16 = 7070;

    /// Nothing of it is lost while something is done.
    pub fn survives(&self, mut work: impl FnMut(&mut Streams) -> Result<()>) -> Result<()> {
        without_backlog_drops(|| {
            let namespaces = [&self.0.a, &self.0.b];
            let (mut streams, mut sinks) = (Vec::new(), Vec::new());
            for (site, [from, to]) in [(2, [0, 1]), (1, [1, 0])] {
                streams.push(numbered::Stream {
                    name: format!("to host {site}"),
                    socket: udp(namespaces[from], TUNNEL[from], 0)?,
                    to: vec![(TUNNEL[to], Self::PORT).into()],
                });
                sinks.push(Sink {
                    site,
                    socket: udp(namespaces[to], TUNNEL[to], Self::PORT)?,
                });
            }
            let mut streams = Streams::start(streams, sinks)?;
            streams.wait_for_more(100)?;
            work(&mut streams)?;
            streams.wait_for_more(100)?;
            streams.finish().map(drop)
        })
    }
}

/// Two upgrades and a reload lose no packet, and systemd follows.
#[testbed::trial(needs_root, long, systemd)]
fn a_service_is_upgraded_without_a_loss() -> Result<()> {
    let hosts = hosts(1500)?;
    let before = inventory(&hosts.a)?;
    let directory = tried("make a directory", TempDir::new())?;
    let unit = ("units/fastvpn@.service", UNIT);
    let own = ("units/fastvpn@.service.d/test.conf", OVERRIDE);
    let file = ("etc/office.toml", FILE);
    let (place, program) = (directory.path(), Some(Path::new(FASTVPN)));
    let systemd = Systemd::boot(&hosts.a, place, &[unit, own, file], SERVICE, program)?;
    let machine = Machine(systemd);
    let far = fastvpn(&hosts.b, "--peer 10.211.55.122")?;
    let started = wait_until("the service is started", || machine.is_active());
    started.map_err(|error| error.hint(machine.log()))?;
    wait_for(&hosts.a, TUNNEL[1].into())?;
    // Of what root has, it keeps CAP_NET_ADMIN and CAP_BPF, which the unit leaves it.
    let status = machine
        .0
        .tell(&format!("cat /proc/{}/status", machine.pid()?))?;
    for line in [
        "CapInh:\t0000000000000000",
        "CapPrm:\t0000008000001000",
        "CapEff:\t0000008000001000",
        "CapBnd:\t0000008000001000",
        "CapAmb:\t0000000000000000",
        "NoNewPrivs:\t1",
        "Seccomp:\t2",
    ] {
        check(status.contains(line), || format!("no {line} in {status}"))?;
    }
    Traffic(&hosts).survives(|streams| {
        for _ in 0..2 {
            streams.wait_for_more(100)?;
            let pid = machine.pid()?;
            machine.0.systemctl(&format!("reload {SERVICE}"))?;
            check(machine.pid()? == pid, || "reloaded by another".into())?;
            machine.upgrade()?;
        }
        Ok(())
    })?;
    check(machine.number("NRestarts")? == 0, || machine.log())?;
    // It is the new process that systemd watches: its end, and that it makes progress.
    machine.is_restarted_after("KILL")?;
    machine.is_restarted_after("STOP")?;
    wait_for(&hosts.a, TUNNEL[1].into())?;
    if machine.0.systemctl("reload nonsense.service").is_ok() {
        return fail("systemctl always succeeds");
    }
    machine.0.systemctl(&format!("stop {SERVICE}"))?;
    let result = machine.0.property(SERVICE, "Result")?;
    check(result == "success" && machine.pid()? == 0, || {
        format!("{result}:\n{}", machine.log())
    })?;
    nothing_left(&hosts.a, &before)?;
    drop(machine);
    stop(far).map(drop)
}
