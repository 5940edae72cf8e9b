//! What exists once in a network namespace, the UDP port and the TUN device's
//! name, and the configuration that asks for them.

use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::time::Duration;

use nix::net::if_::if_nametoindex;

use super::report::Item;
use crate::config::{Config, DEFAULT_PORT, TUN_NAME_DEFAULT, default_control_path};
use crate::control::client;
use crate::daemon;
use crate::error::{Error, Result, cause_text};

/// How long a running tunnel may take to answer.
const ANSWER_TIME_MAX: Duration = Duration::from_millis(300);

/// What a tunnel would use, and the one that does already.
pub(super) struct Place {
    listen: Option<SocketAddr>,
    tun: String,
    pub running: Option<Running>,
}

/// The tunnel that has the device.
pub(super) struct Running {
    /// Number of the device.
    pub index: u32,
    pid: u32,
    port: Option<u16>,
}

impl Place {
    /// What the configuration says, or the defaults.
    pub fn of(config: Option<&Config>) -> Self {
        let (listen, tun, control) = match config {
            Some(config) => (config.listen, config.tun.clone(), config.control.clone()),
            None => {
                let control = default_control_path(TUN_NAME_DEFAULT);
                (None, TUN_NAME_DEFAULT.into(), control)
            }
        };
        let status = client::status(&control, ANSWER_TIME_MAX).ok();
        let running = status
            .filter(|status| status.tun == tun)
            .and_then(|status| {
                let listen = status.listen.parse::<SocketAddr>();
                Some(Running {
                    // Its device may be in another network namespace.
                    index: if_nametoindex(tun.as_str()).ok()?,
                    pid: status.pid,
                    port: listen.ok().map(|listen| listen.port()),
                })
            });
        Self {
            listen: listen.map(|listen| SocketAddr::new(listen.ip, listen.port)),
            tun,
            running,
        }
    }

    /// Both, which are left as they are.
    pub fn items(&self) -> [Item; 2] {
        [self.port(), self.tun()]
    }

    fn port(&self) -> Item {
        const NAME: &str = "UDP port";
        // On all addresses of both IP versions, where the host has both.
        let any = |ip: IpAddr| UdpSocket::bind((ip, DEFAULT_PORT));
        let bound = match self.listen {
            Some(listen) => UdpSocket::bind(listen),
            None => match any(Ipv6Addr::UNSPECIFIED.into()) {
                Err(error) if error.kind() != ErrorKind::AddrInUse => {
                    any(Ipv4Addr::UNSPECIFIED.into())
                }
                bound => bound,
            },
        };
        let port = self.listen.map_or(DEFAULT_PORT, |listen| listen.port());
        let running = self.running.as_ref();
        let running = running.filter(|running| running.port == Some(port));
        match (bound, running) {
            (Ok(_), _) => Item::ok(NAME, format!("{port} is free")),
            (Err(error), Some(running)) if error.kind() == ErrorKind::AddrInUse => {
                let pid = running.pid;
                Item::ok(
                    NAME,
                    format!("{port} is the running tunnel's (process {pid})"),
                )
            }
            (Err(error), _) => Item::degraded(
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

    fn tun(&self) -> Item {
        const NAME: &str = "TUN name";
        let tun = &self.tun;
        if let Some(Running { pid, .. }) = self.running {
            return Item::ok(
                NAME,
                format!("{tun} is the running tunnel's (process {pid})"),
            );
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
}

/// Name of the item of [`configuration`].
pub(super) const CONFIGURATION: &str = "configuration";

/// What a start would say of the configuration file; may wait for name servers.
pub(super) fn configuration(config: Result<Config>) -> Item {
    let rehearsed = config.and_then(|config| {
        let prefixes: usize = config.peers.iter().map(|peer| peer.prefixes.len()).sum();
        let content = format!("{} peers, {prefixes} prefixes", config.peers.len());
        Ok((content, daemon::rehearse(config)?))
    });
    match rehearsed {
        Err(error) => Item::missing(
            CONFIGURATION,
            error.fault(),
            "fastvpn does not start with it, and a reload changes nothing",
            error.remedy().unwrap_or("correct the file"),
        ),
        Ok((content, unusable)) => match &unusable[..] {
            [] => Item::ok(CONFIGURATION, content),
            [first, more @ ..] => unusable_peers(&content, first, more.len()),
        },
    }
}

fn unusable_peers(content: &str, first: &Error, more: usize) -> Item {
    let more = match more {
        0 => String::new(),
        count => format!(" (and {count} more peers)"),
    };
    Item::degraded(
        CONFIGURATION,
        format!("{content}; {}{more}", first.fault()),
        "the tunnel starts without that peer, and tries it again and again",
        first
            .remedy()
            .unwrap_or("correct the peer's name or address"),
    )
}
