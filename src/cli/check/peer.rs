//! The other host: its address, the path to it, the tunnel that would be, and
//! whether it answers.

use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use super::report::Item;
use crate::config::{DEFAULT_PORT, PeerName};
use crate::daemon::default_mtu_bytes;
use crate::error::Result;
use crate::host::link::{self, IPV4_MTU_BYTES_MIN, IPV6_MTU_BYTES_MIN};
use crate::host::netlink::Netlink;
use crate::host::path::{self, Path};
use crate::io::random;
use crate::packet::ip::canonical;
use crate::packet::probe::{Kind, Probe};

/// The names of the items.
pub(super) const NAMES: [&str; 3] = [PEER, PATH_MTU, TUNNEL_ADDRESS];
const PEER: &str = "peer";
const PATH_MTU: &str = "path MTU";
const TUNNEL_ADDRESS: &str = "tunnel address";

/// How long to wait for the peer's answer, for the resolver and that together,
/// and before asking again.
const ANSWER_TIME: Duration = Duration::from_millis(500);
const TIME_MAX: Duration = Duration::from_millis(1300);
const ASK_STEP: Duration = Duration::from_millis(100);

/// What came of asking the peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    /// A fastvpn answers from there, and has seen this host's [`DEFAULT_PORT`] as
    /// this one.
    Replied { from: SocketAddr, seen_port: u16 },
    /// Nothing receives on the port there.
    Refused,
    /// Nobody says anything.
    Silent,
    /// Another process has the port that answers come to.
    NotAsked,
}

/// Resolves the name, which may take as long as the resolver does, asks the
/// kernel for the way, and the peer whether it answers.
/// `own`: the device of the tunnel that runs already.
pub(super) fn items(peer: &PeerName, own: Option<u32>) -> Vec<Item> {
    let started = Instant::now();
    let address = match path::resolve(&peer.host, peer.port, None) {
        Ok(address) => address,
        Err(error) => {
            let remedy = "check the name and this host's resolver, or give the address";
            return without_path(nobody(error.fault(), remedy));
        }
    };
    let named = match peer.literal() {
        Some(_) => address.to_string(),
        None => format!("{} is {address}", peer.host),
    };
    if !path::is_host(address) {
        let found = format!("{address} is not the address of a host");
        return without_path(nobody(found, "name the other host"));
    }
    let any = Ipv4Addr::UNSPECIFIED.into();
    let path = Netlink::open().and_then(|mut netlink| path::discover(&mut netlink, any, address));
    let path = match path {
        Ok(path) => path,
        Err(error) => {
            let remedy = "check the address and this host's routes (ip route get)";
            return without_path(nobody(error.fault(), remedy));
        }
    };
    let of_peer = if path.local == address.ip() {
        itself(address)
    } else {
        let left = TIME_MAX.saturating_sub(started.elapsed());
        let answer = ask(address, path.local, left.min(ANSWER_TIME));
        answered(&named, address, path.local, answer)
    };
    let of_path = path_mtu(path, address.ip());
    vec![of_peer, of_path, tunnel_address(derive(path.local, own))]
}

fn without_path(peer: Item) -> Vec<Item> {
    let why = "there is no path to the peer";
    let others = [PATH_MTU, TUNNEL_ADDRESS].map(|name| Item::unknown(name, why));
    [peer].into_iter().chain(others).collect()
}

fn nobody(found: String, remedy: &str) -> Item {
    let cost = "there is nobody to have a tunnel with: fastvpn does not start";
    Item::missing(PEER, found, cost, remedy)
}

/// Two tunnels on one host, on different ports, are for those who want that.
fn itself(address: SocketAddr) -> Item {
    let found = format!("{address} is this host itself");
    match address.port() {
        DEFAULT_PORT => nobody(found, "name the other host"),
        _ => Item::info(PEER, found + ", on another port"),
    }
}

/// A peer that there is a way to, and what it says itself.
fn answered(named: &str, address: SocketAddr, local: IpAddr, answer: Answer) -> Item {
    let found = |what: &str| format!("{named}, route from {local}; {what}");
    match answer {
        Answer::Replied { from, .. } if from != address => Item::degraded(
            PEER,
            found(&format!("it answers from {from}")),
            "a NAT rewrites the peer's port: nothing arrives there before the peer has sent something",
            "name the port that the NAT forwards to the peer (docs/nat.md)",
        ),
        Answer::Replied { seen_port, .. } if seen_port != DEFAULT_PORT => Item::degraded(
            PEER,
            found(&format!(
                "it answers, and sees port {DEFAULT_PORT} of this host as {seen_port}"
            )),
            "a NAT rewrites this host's port: nothing arrives here before this host has sent \
             something",
            "forward a port of the NAT to this host (docs/nat.md)",
        ),
        Answer::Replied { .. } => Item::ok(PEER, found("it answers")),
        Answer::Refused => Item::info(PEER, found("nothing receives on that port there yet")),
        Answer::NotAsked => {
            let why = format!(
                "not asked whether it answers, as port {DEFAULT_PORT} is in use here \
                 (`fastvpn peers` tells about a running tunnel)"
            );
            Item::info(PEER, found(&why))
        }
        Answer::Silent => Item::info(
            PEER,
            found(
                "no answer: it is off, or does not have this host as a peer, or is not fastvpn, \
                 or a firewall is in between",
            ),
        ),
    }
}

fn path_mtu(path: Path, peer: IpAddr) -> Item {
    let tunnel = default_mtu_bytes(path, peer);
    let found = format!("{}: the TUN device gets MTU {tunnel}", path.mtu_bytes);
    if tunnel < IPV4_MTU_BYTES_MIN {
        let cost = "too small for any tunnel: fastvpn does not start";
        let remedy = "raise the MTU of the links on the path";
        return Item::missing(PATH_MTU, found, cost, remedy);
    }
    if tunnel < IPV6_MTU_BYTES_MIN {
        return Item::degraded(
            PATH_MTU,
            found,
            "the tunnel carries no IPv6, which needs 1280",
            "raise the MTU of the links on the path, or give --mtu 1280 (the kernel then fragments)",
        );
    }
    Item::ok(PATH_MTU, found)
}

/// The address that the tunnel would give itself.
fn derive(local: IpAddr, own: Option<u32>) -> Result<String> {
    let derived = link::derive_address(local)?;
    link::check_free(&mut Netlink::open()?, derived, own)?;
    Ok(derived.to_string())
}

fn tunnel_address(derived: Result<String>) -> Item {
    match derived {
        Ok(derived) => Item::ok(TUNNEL_ADDRESS, format!("{derived} by default, free")),
        Err(error) => Item::degraded(
            TUNNEL_ADDRESS,
            error.fault(),
            "fastvpn does not start without --address",
            error.remedy().unwrap_or("give each host an --address"),
        ),
    }
}

/// Asks `peer` from the address `local`, for as long as `time`. A tunnel answers
/// its own peers alone, and to the port at which it has them: the default one is
/// taken for that.
fn ask(peer: SocketAddr, local: IpAddr, time: Duration) -> Answer {
    // A socket that is connected hears of refusals, and only of answers from
    // where it is connected to; so there are two.
    let listening = UdpSocket::bind((local, DEFAULT_PORT)).ok();
    let no_answer = match listening {
        Some(_) => Answer::Silent,
        None => Answer::NotAsked,
    };
    let connected = UdpSocket::bind((local, 0)).and_then(|socket| {
        socket.connect(peer)?;
        socket.set_read_timeout(Some(ASK_STEP))?;
        Ok(socket)
    });
    let (Ok(connected), Ok(nonce)) = (connected, random()) else {
        return no_answer;
    };
    let probe = |kind| Probe { kind, nonce }.to_packet(0);
    let started = Instant::now();
    while started.elapsed() < time {
        if let Some(listening) = &listening {
            let request = Kind::Request { port: DEFAULT_PORT };
            let _ = listening.send_to(&probe(request), peer);
        }
        let _ = connected.send(&probe(Kind::Size));
        let refused = connected.recv(&mut [0; 64]);
        if refused.is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused) {
            return Answer::Refused;
        }
        if let Some(replied) = listening.as_ref().and_then(|socket| reply(socket, nonce)) {
            return replied;
        }
    }
    no_answer
}

/// The reply, if it has come.
fn reply(socket: &UdpSocket, nonce: u64) -> Option<Answer> {
    socket.set_nonblocking(true).ok()?;
    let mut buffer = [0; 2048];
    while let Ok((length, from)) = socket.recv_from(&mut buffer) {
        match Probe::from_packet(&buffer[..length]) {
            Some(probe) if probe.nonce == nonce => {
                if let Kind::Reply { port: seen_port } = probe.kind {
                    let from = canonical(from);
                    return Some(Answer::Replied { from, seen_port });
                }
            }
            _ => {}
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::super::report::Status::{Degraded, Info, Missing, Ok as Good};
    use super::*;
    use crate::error::Error;

    #[test]
    fn the_tunnel_is_as_large_as_the_path_lets_it_be() {
        let local = "10.211.55.122".parse().unwrap();
        let item = |mtu_bytes| path_mtu(Path { local, mtu_bytes }, local);
        assert_eq!(item(1500).found, "1500: the TUN device gets MTU 1472");
        assert_eq!(item(1307).status, Degraded);
        assert_eq!(item(1308).status, Good);
        assert_eq!(item(90).status, Missing);
        assert!(item(65536).found.ends_with("65507"));
    }

    #[test]
    fn no_peer_is_said_to_be_there_that_has_not_answered() {
        let (peer, local): (SocketAddr, _) = (
            "10.211.55.123:8285".parse().unwrap(),
            "10.211.55.122".parse().unwrap(),
        );
        let elsewhere = SocketAddr::new(peer.ip(), 20_000);
        let replied = |from, seen_port| Answer::Replied { from, seen_port };
        for (answer, status, part) in [
            (
                replied(peer, DEFAULT_PORT),
                Good,
                "x is y, route from 10.211.55.122; it answers",
            ),
            (
                replied(elsewhere, DEFAULT_PORT),
                Degraded,
                "from 10.211.55.123:20000",
            ),
            (replied(peer, 20_001), Degraded, "as 20001"),
            (Answer::Refused, Info, "nothing receives"),
            (Answer::NotAsked, Info, "in use here"),
            (Answer::Silent, Info, "no answer"),
        ] {
            let item = answered("x is y", peer, local, answer);
            assert_eq!(item.status, status, "{item:?}");
            assert!(item.found.contains(part), "{item:?}");
        }
    }

    #[test]
    fn what_is_taken_has_a_way_around() {
        let item = tunnel_address(Err(Error::new("10.244.55.122/16 overlaps")));
        assert_eq!(item.status, Degraded);
        assert!(item.remedy.unwrap().contains("--address"));
    }
}
