//! What exists once in a network namespace: the UDP port and the TUN device's
//! name.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};

use nix::net::if_::InterfaceFlags;

use super::ethtool::Ethtool;
use super::item::Item;
use super::read::{self, Tried};
use crate::cli::TUN_NAME_DEFAULT;
use crate::transport::DEFAULT_PORT;

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

/// What was found.
#[derive(Clone, Copy, Debug)]
pub struct Facts {
    /// A socket bound to the port as a tunnel would.
    port: Tried<()>,
    tun: Holder,
}

/// Looks at both and leaves them as they are. `has_ipv6_peer`: a tunnel would
/// listen on `::`, else on 0.0.0.0.
pub fn probe(has_ipv6_peer: bool) -> Facts {
    let listen: SocketAddr = if has_ipv6_peer {
        (Ipv6Addr::UNSPECIFIED, DEFAULT_PORT).into()
    } else {
        (Ipv4Addr::UNSPECIFIED, DEFAULT_PORT).into()
    };
    let port = UdpSocket::bind(listen);
    Facts {
        port: port.map(drop).map_err(|error| read::errno(&error)),
        tun: holder(TUN_NAME_DEFAULT),
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
    vec![port(facts.port), tun(facts.tun)]
}

fn port(tried: Tried<()>) -> Item {
    const NAME: &str = "UDP port";
    match tried {
        Ok(()) => Item::ok(NAME, format!("{DEFAULT_PORT} is free")),
        Err(libc::EADDRINUSE) => Item::degraded(
            NAME,
            format!("{DEFAULT_PORT} is in use"),
            "fastvpn does not start on it",
            format!(
                "stop what uses it (ss -ulnp 'sport = {DEFAULT_PORT}'), or choose another with \
                 --listen"
            ),
        ),
        Err(errno) => Item::degraded(
            NAME,
            format!("{DEFAULT_PORT}: {}", read::errno_text(errno)),
            "fastvpn does not start on it",
            "choose an address and port with --listen",
        ),
    }
}

fn tun(holder: Holder) -> Item {
    const NAME: &str = "TUN name";
    let name = TUN_NAME_DEFAULT;
    let cost = "fastvpn does not start with it";
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
    use crate::check::item::Status;

    #[test]
    fn what_is_taken_has_a_way_around() {
        assert_eq!(port(Ok(())).status, Status::Ok);
        let taken = port(Err(libc::EADDRINUSE));
        assert_eq!(taken.status, Status::Degraded);
        assert!(taken.remedy.unwrap().contains("--listen"));
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
