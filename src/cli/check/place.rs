//! What exists once in a network namespace, the UDP port and the TUN device's
//! name, and the configuration that asks for them.

use std::io::ErrorKind;
use std::net::UdpSocket;
use std::time::Duration;

use nix::net::if_::if_nametoindex;

use super::item::Item;
use crate::config::Config;
use crate::control::client;
use crate::daemon;
use crate::error::{Result, cause_text};

/// How long a running tunnel may take to answer.
const ANSWER_TIME_MAX: Duration = Duration::from_millis(300);

/// The tunnel that has the device that is configured.
pub(super) struct Running {
    /// Index of the device.
    pub index: u32,
    pid: u32,
    listen: String,
}

/// The tunnel that runs already.
pub(super) fn running(config: &Config) -> Option<Running> {
    let status = client::status(&config.control_path(), ANSWER_TIME_MAX).ok()?;
    (status.tun == config.tun).then_some(Running {
        index: status.tun_index?,
        pid: status.pid,
        listen: status.listen,
    })
}

pub(super) fn port(config: &Config, running: Option<&Running>) -> Item {
    const NAME: &str = "UDP port";
    let listen = daemon::listen_address(config, &[]);
    let port = listen.port();
    let Err(error) = UdpSocket::bind(listen) else {
        return Item::ok(NAME, format!("{port} is free"));
    };
    match running.filter(|running| running.listen.ends_with(&format!(":{port}"))) {
        Some(Running { pid, .. }) if error.kind() == ErrorKind::AddrInUse => Item::ok(
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
    if let Some(Running { pid, .. }) = running {
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
pub(super) fn configuration(config: Result<Config>) -> Item {
    const NAME: &str = "configuration";
    let rehearsed = config.and_then(|config| {
        let prefixes: usize = config.peers.iter().map(|peer| peer.prefixes.len()).sum();
        let content = format!("{} peers, {prefixes} prefixes", config.peers.len());
        Ok((content, daemon::rehearse(config)?))
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
