//! The other host: its address, the path to it, and the tunnel that would be.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use super::ask::{self, Answer};
use super::item::Item;
use crate::config::DEFAULT_PORT;
use crate::config::PeerName;
use crate::daemon::default_mtu_bytes;
use crate::error::Error;
use crate::host::link::{self, IPV4_MTU_BYTES_MIN, IPV6_MTU_BYTES_MIN};
use crate::host::netlink::Netlink;
use crate::host::path::{self, Path};

/// The names of the items.
pub const NAMES: [&str; 3] = ["peer", "path MTU", "tunnel address"];

/// Why something is not as it should be.
#[derive(Clone, Debug)]
pub struct Reason {
    fault: String,
    remedy: Option<String>,
}

impl From<Error> for Reason {
    fn from(error: Error) -> Self {
        Self {
            fault: error.fault(),
            remedy: error.remedy().map(String::from),
        }
    }
}

/// What was found.
#[derive(Clone, Debug)]
pub struct Facts {
    /// As it was named.
    host: String,
    /// Its address and port.
    pub address: Result<SocketAddr, Reason>,
    /// The way to it; `None` without an address.
    path: Option<Result<Path, Reason>>,
    /// The address that the tunnel would give itself.
    derived: Option<Result<String, Reason>>,
    /// Whether it answers, if there is a way to it.
    answer: Option<Answer>,
}

/// How long to wait for the peer's answer, and for the resolver and that
/// together.
const ANSWER_TIME: Duration = Duration::from_millis(500);
const TIME_MAX: Duration = Duration::from_millis(1300);

/// Resolves the name, which may take as long as the resolver does, asks the
/// kernel for the way, and the peer whether it answers.
/// `own`: the device of the tunnel that runs already.
pub fn probe(peer: &PeerName, own: Option<u32>) -> Facts {
    let started = Instant::now();
    let address = path::resolve(&peer.host, peer.port, None).map_err(Reason::from);
    let any = Ipv4Addr::UNSPECIFIED.into();
    let is_host =
        |address: &SocketAddr| !address.ip().is_unspecified() && !address.ip().is_multicast();
    let host = address.as_ref().ok().filter(|address| is_host(address));
    let discover = |address| path::discover(&mut Netlink::open()?, any, address);
    let path = host.map(|&address| discover(address).map_err(Reason::from));
    let derived = match &path {
        Some(Ok(path)) => Some(derive(path.local, own).map_err(Reason::from)),
        _ => None,
    };
    let answer = match (host, &path) {
        (Some(&address), Some(Ok(path))) if path.local != address.ip() => {
            let left = TIME_MAX.saturating_sub(started.elapsed());
            Some(ask::ask(address, path.local, left.min(ANSWER_TIME)))
        }
        _ => None,
    };
    Facts {
        host: peer.host.clone(),
        address,
        path,
        derived,
        answer,
    }
}

fn derive(local: IpAddr, own: Option<u32>) -> crate::error::Result<String> {
    let derived = link::derive_address(local)?;
    link::check_free(&mut Netlink::open()?, derived, own)?;
    Ok(derived.to_string())
}

/// What it means.
pub fn items(facts: &Facts) -> Vec<Item> {
    vec![peer(facts), path_mtu(facts), tunnel_address(facts)]
}

fn peer(facts: &Facts) -> Item {
    const NAME: &str = NAMES[0];
    let cost = "there is nobody to have a tunnel with: fastvpn does not start";
    let address = match &facts.address {
        Ok(address) => address,
        Err(reason) => {
            let remedy = "check the name and this host's resolver, or give the address";
            return Item::missing(NAME, &reason.fault, cost, remedy);
        }
    };
    match &facts.path {
        None => Item::missing(
            NAME,
            format!("{address} is no address of a host"),
            cost,
            "name the other host",
        ),
        // Two tunnels on one host, on different ports, are for who wants that.
        Some(Ok(path)) if path.local == address.ip() && address.port() != DEFAULT_PORT => {
            Item::info(
                NAME,
                format!("{address} is this host itself, on another port"),
            )
        }
        Some(Ok(path)) if path.local == address.ip() => Item::missing(
            NAME,
            format!("{address} is this host itself"),
            cost,
            "name the other host",
        ),
        Some(Ok(path)) => {
            let named = if facts.host.parse::<IpAddr>().is_ok() {
                String::new()
            } else {
                format!("{} is ", facts.host)
            };
            let named = format!("{named}{address}");
            answered(&named, *address, path.local, facts.answer)
        }
        Some(Err(reason)) => {
            let remedy = "check the address and this host's routes (ip route get)";
            Item::missing(NAME, &reason.fault, cost, remedy)
        }
    }
}

/// A peer that there is a way to, and what it says itself.
fn answered(named: &str, address: SocketAddr, local: IpAddr, answer: Option<Answer>) -> Item {
    const NAME: &str = NAMES[0];
    let found = |what: &str| format!("{named}, route from {local}; {what}");
    match answer {
        Some(Answer::Replied { from, .. }) if from != address => Item::degraded(
            NAME,
            found(&format!("it answers from {from}")),
            "a NAT rewrites the peer's port: nothing arrives there before the peer has sent something",
            "name the port that the NAT forwards to the peer (docs/nat.md)",
        ),
        Some(Answer::Replied { seen_port, .. }) if seen_port != DEFAULT_PORT => Item::degraded(
            NAME,
            found(&format!(
                "it answers, and sees port {DEFAULT_PORT} of this host as {seen_port}"
            )),
            "a NAT rewrites this host's port: nothing arrives here before this host has sent \
             something",
            "forward a port of the NAT to this host (docs/nat.md)",
        ),
        Some(Answer::Replied { .. }) => Item::ok(NAME, found("it answers")),
        Some(Answer::Refused) => Item::info(NAME, found("nothing receives on that port there yet")),
        Some(Answer::NotAsked) => {
            let why = format!(
                "not asked whether it answers, as port {DEFAULT_PORT} is in use here \
                 (`fastvpn peers` tells about a running tunnel)"
            );
            Item::info(NAME, found(&why))
        }
        Some(Answer::Silent) | None => Item::info(
            NAME,
            found(
                "no answer: it is off, or does not have this host as a peer, or is not fastvpn, \
                 or a firewall is in between",
            ),
        ),
    }
}

fn path_mtu(facts: &Facts) -> Item {
    const NAME: &str = NAMES[1];
    let (Ok(address), Some(Ok(path))) = (&facts.address, &facts.path) else {
        return Item::unknown(NAME, "there is no path to the peer");
    };
    let tunnel = default_mtu_bytes(*path, address.ip());
    let found = format!("{}: the TUN device gets MTU {tunnel}", path.mtu_bytes);
    if tunnel < IPV4_MTU_BYTES_MIN {
        let cost = "too small for any tunnel: fastvpn does not start";
        return Item::missing(NAME, found, cost, "raise the MTU of the links on the path");
    }
    if tunnel < IPV6_MTU_BYTES_MIN {
        return Item::degraded(
            NAME,
            found,
            "the tunnel carries no IPv6, which needs 1280",
            "raise the MTU of the links on the path, or give --mtu 1280 (the kernel then fragments)",
        );
    }
    Item::ok(NAME, found)
}

fn tunnel_address(facts: &Facts) -> Item {
    const NAME: &str = NAMES[2];
    match &facts.derived {
        None => Item::unknown(NAME, "there is no path to the peer"),
        Some(Ok(derived)) => Item::ok(NAME, format!("{derived} by default, free")),
        Some(Err(reason)) => Item::degraded(
            NAME,
            &reason.fault,
            "fastvpn does not start without --address",
            reason
                .remedy
                .as_deref()
                .unwrap_or("give each host an --address"),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::check::item::Status::{self, Degraded, Info, Missing, Ok as Good, Unknown};

    fn facts(peer: &str, path: Option<Result<Path, Reason>>) -> Facts {
        let address: SocketAddr = peer.parse().unwrap();
        Facts {
            host: address.ip().to_string(),
            address: Ok(address),
            derived: path
                .as_ref()
                .and_then(|path| path.is_ok().then(|| Ok("10.244.55.122/16".into()))),
            answer: Some(Answer::Replied {
                from: address,
                seen_port: DEFAULT_PORT,
            }),
            path,
        }
    }

    fn path(mtu_bytes: u32) -> Option<Result<Path, Reason>> {
        Some(Ok(Path {
            local: "10.211.55.122".parse().unwrap(),
            mtu_bytes,
        }))
    }

    fn statuses(facts: &Facts) -> [Status; 3] {
        let items = items(facts);
        let names: Vec<_> = items.iter().map(|item| item.name).collect();
        assert_eq!(names, NAMES);
        std::array::from_fn(|index| items[index].status)
    }

    const PEER: &str = "10.211.55.123:8285";

    #[test]
    fn the_tunnel_is_as_large_as_the_path_lets_it_be() {
        let item = path_mtu(&facts(PEER, path(1500)));
        assert_eq!(item.found, "1500: the TUN device gets MTU 1472");
        assert_eq!(path_mtu(&facts(PEER, path(1307))).status, Degraded);
        assert_eq!(path_mtu(&facts(PEER, path(1308))).status, Good);
        assert_eq!(path_mtu(&facts(PEER, path(90))).status, Missing);
        let loopback = path_mtu(&facts(PEER, path(65536)));
        assert!(loopback.found.ends_with("65507"), "{}", loopback.found);
    }

    #[test]
    fn every_state_has_every_item() {
        assert_eq!(statuses(&facts(PEER, path(1500))), [Good; 3]);
        let itself = facts("10.211.55.122:8285", path(1500));
        assert_eq!(peer(&itself).status, Missing);
        assert!(peer(&itself).found.contains("this host itself"));
        let on_another_port = facts("10.211.55.122:8286", path(1500));
        assert_eq!(peer(&on_another_port).status, Info);
        let unreachable = facts(PEER, Some(Err(Error::new("cannot reach").into())));
        assert_eq!(statuses(&unreachable), [Missing, Unknown, Unknown]);
        assert_eq!(
            statuses(&facts("0.0.0.0:1", None)),
            [Missing, Unknown, Unknown]
        );
        let taken = Facts {
            derived: Some(Err(Error::new("10.244.55.122/16 overlaps").into())),
            ..facts(PEER, path(1500))
        };
        assert_eq!(statuses(&taken), [Good, Good, Degraded]);
    }

    #[test]
    fn a_name_is_shown_with_its_address() {
        let named = Facts {
            host: "vpn.example.org".into(),
            ..facts(PEER, path(1500))
        };
        assert_eq!(
            peer(&named).found,
            "vpn.example.org is 10.211.55.123:8285, route from 10.211.55.122; it answers"
        );
    }

    #[test]
    fn no_peer_is_said_to_be_there_that_has_not_answered() {
        let from: SocketAddr = PEER.parse().unwrap();
        let elsewhere = SocketAddr::new(from.ip(), 20_000);
        let replied = |from, seen_port| Answer::Replied { from, seen_port };
        for (answer, status, part) in [
            (
                replied(elsewhere, DEFAULT_PORT),
                Degraded,
                "from 10.211.55.123:20000",
            ),
            (replied(from, 20_001), Degraded, "as 20001"),
            (Answer::Refused, Info, "nothing receives"),
            (Answer::NotAsked, Info, "in use here"),
            (Answer::Silent, Info, "no answer"),
        ] {
            let asked = Facts {
                answer: Some(answer),
                ..facts(PEER, path(1500))
            };
            let item = peer(&asked);
            assert_eq!(item.status, status, "{item:?}");
            assert!(item.found.contains(part), "{item:?}");
        }
    }
}
