//! What exists once in a network namespace: the UDP port and the TUN device's
//! name.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::path::PathBuf;
use std::time::Duration;

use nix::net::if_::InterfaceFlags;

use super::ethtool::Ethtool;
use super::item::Item;
use super::read::{self, Tried};
use crate::config::DEFAULT_PORT;
use crate::config::{Config, default_control_path};
use crate::config::{Listen, TUN_NAME_DEFAULT};
use crate::control::client;

/// Who has the name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Holder {
    Nobody,
    /// An interface that is no TUN device.
    Other,
    /// A TUN device that a process holds, or may hold.
    Process,
    /// A TUN device that is up and that no process holds.
    Stale,
}

/// How long a running tunnel may take to answer.
const ANSWER_TIME_MAX: Duration = Duration::from_millis(300);

/// What a tunnel would use.
#[derive(Clone, Debug)]
pub struct Wanted {
    listen: Option<Listen>,
    tun: String,
    control: PathBuf,
}

impl Wanted {
    /// What the file says, or the defaults.
    pub fn of(config: Option<&Config>) -> Self {
        match config {
            Some(config) => Self {
                listen: config.listen,
                tun: config.tun.clone(),
                control: config.control.clone(),
            },
            None => Self {
                listen: None,
                tun: TUN_NAME_DEFAULT.into(),
                control: default_control_path(TUN_NAME_DEFAULT),
            },
        }
    }
}

/// The tunnel that has the device.
#[derive(Clone, Debug)]
pub struct Running {
    /// Number of the device.
    pub index: u32,
    pid: u32,
    port: Option<u16>,
}

/// Asks for the tunnel that would be another one's place.
pub fn running(wanted: &Wanted) -> Option<Running> {
    let status = client::status(&wanted.control, ANSWER_TIME_MAX).ok()?;
    // Its device may be in another network namespace.
    let index = nix::net::if_::if_nametoindex(wanted.tun.as_str()).ok()?;
    (status.tun == wanted.tun).then(|| Running {
        index,
        pid: status.pid,
        port: status
            .listen
            .parse()
            .ok()
            .map(|listen: SocketAddr| listen.port()),
    })
}

/// What was found.
#[derive(Clone, Debug)]
pub struct Facts {
    /// The port, and a socket bound to it as a tunnel would.
    port: (u16, Tried<()>),
    tun: (String, Holder),
    running: Option<Running>,
}

/// Looks at both and leaves them as they are. `has_ipv6_peer`: a tunnel would
/// listen on `::`, else on 0.0.0.0, unless it is said where.
pub fn probe(wanted: Wanted, running: Option<Running>, has_ipv6_peer: bool) -> Facts {
    let any: IpAddr = match has_ipv6_peer {
        true => Ipv6Addr::UNSPECIFIED.into(),
        false => Ipv4Addr::UNSPECIFIED.into(),
    };
    let listen = wanted.listen.map(|listen| (listen.ip, listen.port));
    let listen = SocketAddr::from(listen.unwrap_or((any, DEFAULT_PORT)));
    let bound = UdpSocket::bind(listen);
    let bound = bound.map(drop).map_err(|error| read::errno(&error));
    Facts {
        port: (listen.port(), bound),
        tun: (wanted.tun.clone(), holder(&wanted.tun)),
        running,
    }
}

fn holder(name: &str) -> Holder {
    if nix::net::if_::if_nametoindex(name).is_err() {
        return Holder::Nobody;
    }
    let driver = Ethtool::open().and_then(|ethtool| ethtool.driver(name));
    // A TUN device says that it is one.
    if !driver.is_ok_and(|driver| driver.name == "tun") {
        return Holder::Other;
    }
    let flags = nix::ifaddrs::getifaddrs().ok().and_then(|mut addresses| {
        let found = addresses.find(|address| address.interface_name == name);
        found.map(|address| address.flags)
    });
    // A TUN device has its carrier from the processes that hold its queues
    // (`tun_attach` in drivers/net/tun.c); without IFF_UP it is not known.
    match flags {
        Some(flags)
            if flags.contains(InterfaceFlags::IFF_UP)
                && !flags.contains(InterfaceFlags::IFF_LOWER_UP) =>
        {
            Holder::Stale
        }
        _ => Holder::Process,
    }
}

/// What it means.
pub fn items(facts: &Facts) -> Vec<Item> {
    let running = facts.running.as_ref();
    vec![port(&facts.port, running), tun(&facts.tun, running)]
}

fn port(&(port, tried): &(u16, Tried<()>), running: Option<&Running>) -> Item {
    const NAME: &str = "UDP port";
    match tried {
        Ok(()) => Item::ok(NAME, format!("{port} is free")),
        Err(libc::EADDRINUSE) if let Some(pid) = pid_on(port, running) => Item::ok(
            NAME,
            format!("{port} is the running tunnel's (process {pid})"),
        ),
        Err(libc::EADDRINUSE) => Item::degraded(
            NAME,
            format!("{port} is in use"),
            "fastvpn does not start on it",
            format!(
                "stop what uses it (ss -ulnp 'sport = {port}'), or choose another with \
                 --listen"
            ),
        ),
        Err(errno) => Item::degraded(
            NAME,
            format!("{port}: {}", read::errno_text(errno)),
            "fastvpn does not start on it",
            "choose an address and port with --listen",
        ),
    }
}

fn pid_on(port: u16, running: Option<&Running>) -> Option<u32> {
    running
        .filter(|running| running.port == Some(port))
        .map(|running| running.pid)
}

fn tun((name, holder): &(String, Holder), running: Option<&Running>) -> Item {
    const NAME: &str = "TUN name";
    let cost = "fastvpn does not start with it";
    if let Some(running) = running {
        let pid = running.pid;
        return Item::ok(
            NAME,
            format!("{name} is the running tunnel's (process {pid})"),
        );
    }
    match holder {
        Holder::Nobody => Item::ok(NAME, format!("{name} is free")),
        Holder::Other => Item::degraded(
            NAME,
            format!("{name} is another kind of interface"),
            cost,
            "choose another name with --tun",
        ),
        Holder::Process => Item::degraded(
            NAME,
            format!("{name} is in use"),
            cost,
            "stop the process that has it, or choose another name with --tun",
        ),
        Holder::Stale => Item::degraded(
            NAME,
            format!("{name} is left over: no process holds it"),
            cost,
            format!("ip link delete {name}, or choose another name with --tun"),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::check::item::Status;

    #[test]
    fn what_is_taken_has_a_way_around() {
        let running = Running {
            index: 7,
            pid: 42,
            port: Some(8285),
        };
        assert_eq!(port(&(8285, Ok(())), None).status, Status::Ok);
        let in_use = Err(libc::EADDRINUSE);
        for (number, running) in [(8285, None), (8286, Some(&running))] {
            let taken = port(&(number, in_use), running);
            assert_eq!(taken.status, Status::Degraded);
            assert!(taken.remedy.unwrap().contains("--listen"));
        }
        let own = port(&(8285, in_use), Some(&running));
        assert!(own.status == Status::Ok && own.found.contains("42"));
        let tun = |holder| tun(&("fastvpn0".into(), holder), None);
        assert_eq!(tun(Holder::Nobody).status, Status::Ok);
        for holder in [Holder::Other, Holder::Process, Holder::Stale] {
            let item = tun(holder);
            assert_eq!(item.status, Status::Degraded);
            assert!(item.remedy.unwrap().contains("--tun"));
        }
        assert!(
            tun(Holder::Stale)
                .remedy
                .unwrap()
                .contains("ip link delete")
        );
    }

    #[test]
    fn names_without_an_interface_are_free() {
        assert_eq!(holder("no-such-if"), Holder::Nobody);
        assert_eq!(holder("lo"), Holder::Other);
    }
}
