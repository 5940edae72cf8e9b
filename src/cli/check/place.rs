//! What exists once in a network namespace, the UDP port and the TUN device's
//! name, and the configuration that asks for them.

use std::io::ErrorKind;
use std::net::UdpSocket;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::net::if_::if_nametoindex;

use super::item::Item;
use crate::cli::render::reload_words;
use crate::config::{Config, default_control_paths};
use crate::control::client;
use crate::control::protocol::{Reloaded, Request, Status};
use crate::control::text::printable;
use crate::daemon;
use crate::error::{Result, cause_text};

/// How long a running tunnel may take to answer.
const ANSWER_TIME_MAX: Duration = Duration::from_millis(300);

/// How long it may take to tell what a reload would come to.
const REHEARSAL_TIME_MAX: Duration = Duration::from_secs(30);

/// The tunnel that runs already.
pub(super) struct Running {
    /// Index of the device.
    pub index: u32,
    /// Its control socket.
    path: PathBuf,
    status: Status,
}

/// The tunnel that has the device that is configured, or else one that reads this `file`: the
/// file may have another name for the device by now.
pub(super) fn running(config: &Config, file: Option<&Path>) -> Option<Running> {
    let by_name = at(config.control_path()).filter(|running| running.status.tun == config.tun);
    by_name.or_else(|| {
        let mut others = default_control_paths().into_iter().filter_map(at);
        others.find(|running| file.is_some_and(|file| running.reads(file)))
    })
}

fn at(path: PathBuf) -> Option<Running> {
    let status = client::status(&path, ANSWER_TIME_MAX).ok()?;
    Some(Running {
        index: status.tun_index?,
        path,
        status,
    })
}

impl Running {
    /// Whether it was started with this file.
    fn reads(&self, file: &Path) -> bool {
        let inode = |path: &Path| std::fs::metadata(path).map(|of| (of.dev(), of.ino())).ok();
        let its = self.status.config_file.as_ref().and_then(|its| {
            // A path that is not absolute begins where it runs.
            inode(&Path::new(&format!("/proc/{}/cwd", self.status.pid)).join(its))
        });
        its.is_some() && its == inode(file)
    }
}

/// What the running tunnel would make of the file that it reads.
pub(super) fn reload(file: &Path, running: &Running) -> Item {
    const NAME: &str = "reload";
    let pid = running.status.pid;
    if !running.reads(file) {
        let its = match &running.status.config_file {
            Some(its) => format!("reads {}", printable(its)),
            None => "reads no configuration file".into(),
        };
        let found = format!("process {pid} {its}: a reload would not read this one");
        return Item::info(NAME, found);
    }
    let request = Request::Reload { dry_run: true };
    let asked = client::ask::<Reloaded>(&running.path, REHEARSAL_TIME_MAX, &request);
    match asked {
        Ok(reloaded) if reloaded == Reloaded::default() => {
            Item::ok(NAME, format!("would change nothing in process {pid}"))
        }
        Ok(reloaded) => {
            let words = reload_words(&reloaded);
            let found = format!("process {pid} would answer: {words}");
            match reloaded.needs_restart.is_empty() {
                true => Item::ok(NAME, found),
                false => Item::info(NAME, found),
            }
        }
        Err(error) => Item::failed(
            NAME,
            &error,
            "a reload changes nothing",
            "correct the file, or start the tunnel again",
        ),
    }
}

pub(super) fn port(config: &Config, running: Option<&Running>) -> Item {
    const NAME: &str = "UDP port";
    let listen = daemon::listen_address(config, &[]);
    let port = listen.port();
    let Err(error) = UdpSocket::bind(listen) else {
        return Item::ok(NAME, format!("{port} is free"));
    };
    let running = running.map(|running| &running.status);
    match running.filter(|running| running.listen.ends_with(&format!(":{port}"))) {
        Some(Status { pid, .. }) if error.kind() == ErrorKind::AddrInUse => Item::ok(
            NAME,
            format!("{port} is the running tunnel's (process {pid})"),
        ),
        _ => Item::degraded(
            NAME,
            format!("{port}: {}", cause_text(&error)),
            "fastvpn does not start on it",
            &format!(
                "stop what uses it (ss -ulnp 'sport = {port}'), or choose another address and \
                 port with --listen"
            ),
        ),
    }
}

pub(super) fn tun_name(config: &Config, running: Option<&Running>) -> Item {
    const NAME: &str = "TUN name";
    let tun = &config.tun;
    let running = running.map(|running| &running.status);
    if let Some(Status { pid, .. }) = running.filter(|running| running.tun == *tun) {
        let found = format!("{tun} is the running tunnel's (process {pid})");
        return Item::ok(NAME, found);
    }
    if if_nametoindex(tun.as_str()).is_err() {
        return Item::ok(NAME, format!("{tun} is free"));
    }
    Item::degraded(
        NAME,
        format!("{tun} is in use"),
        "fastvpn does not start with it",
        &format!(
            "stop the process that has it, or if none has: ip link delete {tun}; or choose \
             another name with --tun"
        ),
    )
}

/// What a start would say of the configuration file; may wait for name servers.
/// `running`: the tunnel that has what the file asks for already, if there is one.
pub(super) fn configuration(config: Result<Config>, running: Option<&Running>) -> Item {
    const NAME: &str = "configuration";
    let rehearsed = config.and_then(|config| {
        let prefixes: usize = config.peers.iter().map(|peer| peer.prefixes.len()).sum();
        let content = format!("{} peers, {prefixes} prefixes", config.peers.len());
        Ok((
            content,
            daemon::rehearse(config, running.map(|running| running.index))?,
        ))
    });
    let (content, unusable) = match rehearsed {
        Ok(rehearsed) => rehearsed,
        Err(error) => {
            let cost = "fastvpn does not start with it, and a reload changes nothing";
            return Item::failed(NAME, &error, cost, "correct the file").missing();
        }
    };
    let Some(first) = unusable.first() else {
        return Item::ok(NAME, content);
    };
    let cost = "the tunnel starts without that peer, and tries it again and again";
    let item = Item::failed(NAME, first, cost, "correct the peer's name or address");
    let found = match unusable.len() - 1 {
        0 => format!("{content}; {}", item.found),
        more => format!("{content}; {} (and {more} more peers)", item.found),
    };
    Item { found, ..item }
}
