//! What a service manager hears of a tunnel (sd_notify(3)), and upgrades. The manager is a
//! socket of the test's own here; `systemd.rs` has the real one.

use std::collections::VecDeque;
use std::fs;
use std::io::{self, IoSliceMut};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::{Command, Stdio};

use fastvpn::error::{Error, Result};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, UnixCredentials, recvmsg};
use nix::sys::socket::{setsockopt, sockopt};
use nix::unistd::Pid;
use testbed::Pair;

use crate::operator::Operator;
use crate::support::{
    FASTVPN, PATIENCE, TUNNEL, Tunnel, check, hosts, tried, wait_for, wait_until,
};

const FILE: &str = "[[peer]]\nendpoint = \"10.211.55.123\"\n";

/// A service manager's socket, and what has come to it.
struct Manager {
    socket: UnixDatagram,
    path: String,
    /// Lines, each with the process that has said it.
    heard: VecDeque<(u32, String)>,
}

impl Manager {
    fn new(operator: &Operator) -> Result<Self> {
        let path = operator.path("notify");
        let socket = tried("bind a socket", UnixDatagram::bind(&path))?;
        tried("set a timeout", socket.set_read_timeout(Some(PATIENCE)))?;
        let set = setsockopt(&socket, sockopt::PassCred, &true);
        tried("ask for credentials", set.map_err(Into::into))?;
        Ok(Self {
            socket,
            path: path.display().to_string(),
            heard: VecDeque::new(),
        })
    }

    fn receive(&mut self) -> Result<()> {
        let mut buffer = [0; 4096];
        let mut space = nix::cmsg_space!(UnixCredentials);
        let mut parts = [IoSliceMut::new(&mut buffer)];
        let (fd, flags) = (self.socket.as_raw_fd(), MsgFlags::empty());
        let message = recvmsg::<()>(fd, &mut parts, Some(&mut space), flags);
        let message = tried("hear of a tunnel", message.map_err(Into::into))?;
        let mut credentials = message.cmsgs().into_iter().flatten();
        let sender = credentials.find_map(|message| match message {
            ControlMessageOwned::ScmCredentials(credentials) => Some(credentials.pid() as u32),
            _ => None,
        });
        let bytes = message.bytes;
        let sender = sender.ok_or_else(|| Error::new("nobody has said it"))?;
        let text = String::from_utf8_lossy(&buffer[..bytes]);
        let lines = text.lines().map(|line| (sender, line.to_string()));
        self.heard.extend(lines);
        Ok(())
    }

    /// Has the socket take nothing more until something is read.
    fn fill(&self) -> Result<()> {
        loop {
            // A socket of its own each time, as a sender's buffer is limited, too.
            let sender = tried("open a socket", UnixDatagram::unbound())?;
            tried("not wait", sender.set_nonblocking(true))?;
            let sent = sender.send_to(b"X=1", &self.path);
            if sent.is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock) {
                return Ok(());
            }
        }
    }

    /// All that has been said by now.
    fn drain(&mut self) -> Result<()> {
        tried("not wait", self.socket.set_nonblocking(true))?;
        while self.receive().is_ok() {}
        tried("wait again", self.socket.set_nonblocking(false))
    }

    /// The rest of the next line that begins with `word`, which `sender` must have said.
    /// Others are dropped.
    fn wait_for(&mut self, sender: u32, word: &str) -> Result<String> {
        loop {
            while let Some((pid, line)) = self.heard.pop_front() {
                if let Some(rest) = line.strip_prefix(word) {
                    check(pid == sender, || {
                        format!("{line} by process {pid}, not {sender}")
                    })?;
                    return Ok(rest.to_string());
                }
            }
            let received = self.receive();
            received.map_err(|error| Error::new(format!("{error}: no {word}")))?;
        }
    }
}

/// A process that nobody waits for; killed at the latest when this is dropped.
struct Orphan(u32);

impl Orphan {
    /// Of what `fastvpn upgrade` has said.
    fn named(said: &str) -> Result<Self> {
        let pid = said.split(' ').nth(2).and_then(|word| word.parse().ok());
        pid.map(Self).ok_or_else(|| Error::new(said.to_string()))
    }
}

impl Drop for Orphan {
    fn drop(&mut self) {
        // Another process may have the number.
        let program = fs::read_link(format!("/proc/{}/exe", self.0));
        if program.is_ok_and(|program| program == Path::new(FASTVPN)) {
            let _ = kill(Pid::from_raw(self.0 as i32), Signal::SIGKILL);
        }
    }
}

/// Two hosts, of which the first has a tunnel that a manager has started.
struct Stage {
    hosts: Pair,
    operator: Operator,
    manager: Manager,
    file: String,
}

impl Stage {
    fn new() -> Result<Self> {
        let operator = Operator::new()?;
        Ok(Self {
            hosts: hosts(1500)?,
            file: operator.write("tunnel.toml", FILE)?,
            manager: Manager::new(&operator)?,
            operator,
        })
    }

    fn start(&self) -> Result<Tunnel> {
        self.start_program(FASTVPN)
    }

    fn start_program(&self, program: &str) -> Result<Tunnel> {
        let socket = self.operator.socket_text();
        let flags = ["--config", &self.file, "--control", &socket];
        let mut command = Command::new(program);
        command.args(Tunnel::command(&flags).get_args());
        command.stdin(Stdio::null()).stdout(Stdio::null());
        command.env("NOTIFY_SOCKET", &self.manager.path);
        command.env("WATCHDOG_USEC", "3000000");
        Tunnel::spawn(&self.hosts.a, command)
    }

    fn pid(&self) -> Result<u32> {
        let pid = self.operator.ask("status")?["pid"].as_u64();
        let pid = pid.and_then(|pid| u32::try_from(pid).ok());
        pid.ok_or_else(|| Error::new("status has no pid"))
    }
}

#[testbed::trial(each_engine)]
fn a_service_manager_hears_what_happens() -> Result<()> {
    let mut stage = Stage::new()?;
    let old = stage.start()?;
    let pid = old.pid();
    let manager = &mut stage.manager;
    manager.wait_for(pid, "READY=1")?;
    let status = manager.wait_for(pid, "STATUS=")?;
    check(
        status.starts_with("fastvpn0: listening on 0.0.0.0:8285, peers: 1, "),
        || status.clone(),
    )?;
    // Every second of three, at the latest.
    for _ in 0..2 {
        manager.wait_for(pid, "WATCHDOG=1")?;
    }
    for by_signal in [false, true] {
        match by_signal {
            true => old_signal(pid),
            false => stage.operator.tell("reload").map(drop)?,
        }
        manager.wait_for(pid, "RELOADING=1")?;
        let stamp = manager.wait_for(pid, "MONOTONIC_USEC=")?;
        check(stamp.parse::<u64>().is_ok(), || stamp.clone())?;
        manager.wait_for(pid, "READY=1")?;
    }
    stage.operator.write("tunnel.toml", "nonsense")?;
    stage
        .operator
        .refuses("reload", &["tunnel.toml:1", "key with no value"])?;
    let status = manager.wait_for(pid, "STATUS=the last reload failed: ")?;
    check(status.contains("tunnel.toml"), || status.clone())?;
    stage.operator.tell("stop")?;
    manager.wait_for(pid, "STOPPING=1")?;
    let ended = old.wait()?;
    check(ended.status.success(), || ended.log)
}

fn old_signal(pid: u32) {
    let _ = kill(Pid::from_raw(pid as i32), Signal::SIGHUP);
}

/// The old process names the new one, which says the rest.
#[testbed::trial(each_engine)]
fn an_upgrade_is_told_by_the_old_process() -> Result<()> {
    let mut stage = Stage::new()?;
    let old = stage.start()?;
    let far = crate::support::fastvpn(&stage.hosts.b, "--peer 10.211.55.122")?;
    stage.manager.wait_for(old.pid(), "READY=1")?;
    wait_for(&stage.hosts.a, TUNNEL[1].into())?;
    // One that fails leaves the old process as it is.
    stage.operator.write("tunnel.toml", "nonsense")?;
    let what = ["has not taken over", "exit status: 1"];
    let said = stage.operator.run(&["upgrade"])?;
    check(
        said.status.code() == Some(1) && what.iter().all(|part| said.stderr.contains(part)),
        || format!("{said:?}"),
    )?;
    check(stage.pid()? == old.pid(), || "another process".into())?;
    let status = stage.manager.wait_for(old.pid(), "STATUS=the last ")?;
    check(status.starts_with("upgrade failed: process "), || {
        status.clone()
    })?;
    stage.operator.write("tunnel.toml", FILE)?;
    // And again, from a process that was such a child itself.
    let mut pid = old.pid();
    let mut children = Vec::new();
    for _ in 0..2 {
        let said = stage.operator.tell("upgrade")?;
        children.push(Orphan::named(&said)?);
        let new = stage.pid()?;
        check(
            said == format!("upgraded: process {new} has the tunnel\n"),
            || said.clone(),
        )?;
        let main: u32 = stage
            .manager
            .wait_for(pid, "MAINPID=")?
            .parse()
            .unwrap_or(0);
        check(main == new && new != pid, || {
            format!("MAINPID={main}, and {new} answers")
        })?;
        stage.manager.wait_for(new, "READY=1")?;
        stage.manager.wait_for(new, "WATCHDOG=1")?;
        wait_for(&stage.hosts.a, TUNNEL[1].into())?;
        pid = new;
    }
    stage.operator.tell("stop")?;
    stage.manager.wait_for(pid, "STOPPING=1")?;
    let ended = old.wait()?;
    check(ended.status.success(), || ended.log.clone())?;
    check(!ended.log.contains("does not follow"), || ended.log)?;
    drop(children);
    crate::support::stop(far).map(drop)
}

/// Nor is there one where the manager would end the service, as it does not hear of the new process.
#[testbed::trial]
fn an_upgrade_that_nobody_can_be_told_of_is_refused() -> Result<()> {
    let mut stage = Stage::new()?;
    let gone = stage.operator.path("gone").display().to_string();
    for name in ["vsock:2:1234", &gone] {
        stage.manager.path = name.into();
        let tunnel = stage.start()?;
        stage.operator.wait()?;
        let parts = ["cannot upgrade", name, "restart the service"];
        stage.operator.refuses("upgrade", &parts)?;
        check(stage.pid()? == tunnel.pid(), || "another process".into())?;
        crate::support::stop(tunnel)?;
    }
    Ok(())
}

/// Its service would end with the old process.
#[testbed::trial]
fn a_process_of_somebody_elses_is_not_the_services() -> Result<()> {
    let mut stage = Stage::new()?;
    let old = stage.start()?;
    let old_pid = old.pid();
    stage.manager.wait_for(old_pid, "READY=1")?;
    let socket = stage.operator.socket_text();
    let flags = ["--config", &stage.file, "--control", &socket, "--takeover"];
    let new = Tunnel::start(&stage.hosts.a, &flags)?;
    let ended = old.wait()?;
    check(ended.log.contains("use `fastvpn upgrade`"), || ended.log)?;
    wait_until("the new process answers", || {
        Ok(stage.operator.run(&["status"])?.status.success())
    })?;
    stage.manager.drain()?;
    let is_old = |(pid, _): &(u32, String)| *pid == old_pid;
    check(stage.manager.heard.iter().any(is_old), || {
        "nothing was heard".into()
    })?;
    let is_named = |(_, line): &(u32, String)| line.starts_with("MAINPID=");
    check(!stage.manager.heard.iter().any(is_named), || {
        "it was named".into()
    })?;
    crate::support::stop(new).map(drop)
}

/// Nor does it keep the tunnel from being asked and stopped.
#[testbed::trial]
fn a_manager_that_does_not_read_is_not_waited_for() -> Result<()> {
    let mut stage = Stage::new()?;
    stage.manager.fill()?;
    let tunnel = stage.start()?;
    stage.operator.wait()?;
    stage.operator.tell("reload")?;
    // It is told when it does.
    stage.manager.drain()?;
    stage.manager.wait_for(tunnel.pid(), "READY=1")?;
    stage.manager.fill()?;
    let ended = tunnel.stop()?;
    check(ended.status.success(), || ended.log)
}

/// A tunnel that is stopped is not brought back by the process that was to take it over.
#[testbed::trial]
fn a_stop_during_an_upgrade_lasts() -> Result<()> {
    let mut stage = Stage::new()?;
    let program = stage.operator.path("fastvpn").display().to_string();
    // By another process, as a program that is open for writing cannot be started.
    let shell = |script: &str| {
        let mut command = Command::new("sh");
        let status = command.args(["-c", script, FASTVPN, &program]).status();
        let status = tried("run sh", status)?;
        check(status.success(), || script.to_string())
    };
    shell("cp \"$0\" \"$1\"")?;
    let old = stage.start_program(&program)?;
    stage.manager.wait_for(old.pid(), "READY=1")?;
    shell(
        "printf '#!/bin/sh\\nexec sleep 1000\\n' > \"$1.new\" && chmod 755 \"$1.new\" && mv \"$1.new\" \"$1\"",
    )?;
    let answer = stage.operator.request("{\"command\": \"upgrade\"}")?;
    let new = answer["pid"].as_u64();
    let new = new.ok_or_else(|| Error::new(answer.to_string()))?;
    stage.operator.tell("stop")?;
    let ended = old.wait()?;
    check(ended.status.success(), || ended.log)?;
    check(!Path::new(&format!("/proc/{new}")).exists(), || {
        format!("process {new} runs on")
    })?;
    // One that is late finds nobody.
    let socket = stage.operator.socket_text();
    let flags = ["--config", &stage.file, "--control", &socket, "--takeover"];
    let mut late = Tunnel::command(&flags);
    late.env("FASTVPN_UPGRADE", "1");
    let ended = Tunnel::spawn(&stage.hosts.a, late)?.wait()?;
    check(
        !ended.status.success()
            && ended
                .log
                .contains("the process to take over from has ended"),
        || ended.log.clone(),
    )
}
