//! The other host: its address, the path to it, the tunnel that would be, and
//! whether it answers.

use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use super::item::Item;
use crate::config::{DEFAULT_PORT, HostPort};
use crate::daemon::default_mtu_bytes;
use crate::error::Result;
use crate::host::link::{self, IPV4_MTU_BYTES_MIN, IPV6_MTU_BYTES_MIN};
use crate::host::netlink::Netlink;
use crate::host::path::{self, Path};
use crate::io::random;
use crate::packet::ip::canonical;
use crate::packet::probe::{Kind, Probe};
use crate::wire::Mode;

/// The names of the items.
pub(super) const PEER: &str = "peer";
pub(super) const PATH_MTU: &str = "path MTU";
pub(super) const TUNNEL_ADDRESS: &str = "tunnel address";

/// How long to wait for the peer's answer, and before asking again.
const ANSWER_TIME: Duration = Duration::from_millis(500);
const ASK_STEP: Duration = Duration::from_millis(100);

/// What came of asking the peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    /// A fastvpn answers from there, and has seen this host's [`DEFAULT_PORT`] as
    /// this one.
    Replied { from: SocketAddr, seen_port: u16 },
    /// Nothing receives on the port there.
    Refused,
    /// Nothing comes back.
    Silent,
}

/// Resolves the name, which may take as long as the resolver does, asks the
/// kernel for the path, and the peer whether it answers.
/// `own`: the device of the tunnel that runs already.
pub(super) fn items(peer: &HostPort, own: Option<u32>) -> Vec<Item> {
    match find(peer) {
        Ok((address, path)) => vec![
            answered(address, path.local, &ask(address, path.local)),
            path_mtu(path, address.ip()),
            tunnel_address(path.local, own),
        ],
        Err(error) => {
            let cost = "there is nobody to have a tunnel with: fastvpn does not start";
            let remedy = "check the address and this host's routes (ip route get)";
            vec![Item::failed(PEER, &error, cost, remedy).missing()]
        }
    }
}

fn find(peer: &HostPort) -> Result<(SocketAddr, Path)> {
    let any = SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), DEFAULT_PORT);
    let address = path::resolve(&peer.host, peer.port, None)?[0];
    let path = path::discover(&mut Netlink::open()?, any.ip(), address)?;
    path::check_other(any, address, path.local)?;
    Ok((address, path))
}

/// A peer that there is a path to, and what it says itself.
fn answered(peer: SocketAddr, local: IpAddr, answer: &io::Result<Answer>) -> Item {
    let found = |what: &str| format!("{peer}, route from {local}; {what}");
    match *answer {
        Ok(Answer::Replied { from, .. }) if from != peer => Item::degraded(
            PEER,
            found(&format!("it answers from {from}")),
            "a NAT rewrites the peer's port: nothing arrives there before the peer has sent something",
            "name the port that the NAT forwards to the peer (docs/nat.md)",
        ),
        Ok(Answer::Replied { seen_port, .. }) if seen_port != DEFAULT_PORT => Item::degraded(
            PEER,
            found(&format!(
                "it answers, and sees port {DEFAULT_PORT} of this host as {seen_port}"
            )),
            "a NAT rewrites this host's port: nothing arrives here before this host has sent \
             something",
            "forward a port of the NAT to this host (docs/nat.md)",
        ),
        Ok(Answer::Replied { .. }) => Item::ok(PEER, found("it answers")),
        Ok(Answer::Refused) => Item::info(PEER, found("nothing receives on that port there yet")),
        Ok(Answer::Silent) => Item::info(
            PEER,
            found(
                "no answer: it is off, or does not have this host as a peer, or is not fastvpn, \
                 or a firewall is in between",
            ),
        ),
        // Mostly a running tunnel has it.
        Err(_) => Item::info(
            PEER,
            found(&format!(
                "not asked whether it answers, as port {DEFAULT_PORT} is in use here \
                 (`fastvpn peers` tells about a running tunnel)"
            )),
        ),
    }
}

fn path_mtu(path: Path, peer: IpAddr) -> Item {
    let tunnel = default_mtu_bytes(Mode::Plain, path, peer);
    let found = format!("{}: the TUN device gets MTU {tunnel}", path.mtu_bytes);
    let remedy = "raise the MTU of the links on the path";
    if tunnel < IPV4_MTU_BYTES_MIN {
        let cost = "too small for any tunnel: fastvpn does not start";
        return Item::degraded(PATH_MTU, found, cost, remedy).missing();
    }
    if tunnel < IPV6_MTU_BYTES_MIN {
        let cost = "the tunnel carries no IPv6, which needs 1280";
        let remedy = format!("{remedy}, or give --mtu 1280 (the kernel then fragments)");
        return Item::degraded(PATH_MTU, found, cost, &remedy);
    }
    Item::ok(PATH_MTU, found)
}

/// The address that the tunnel would give itself.
fn tunnel_address(local: IpAddr, own: Option<u32>) -> Item {
    let derived = link::derive_address(local).and_then(|derived| {
        link::check_free(&mut Netlink::open()?, derived, own)?;
        Ok(derived)
    });
    match derived {
        Ok(derived) => Item::ok(TUNNEL_ADDRESS, format!("{derived} by default, free")),
        Err(error) => {
            let cost = "fastvpn does not start without --address";
            Item::failed(TUNNEL_ADDRESS, &error, cost, "give each host an --address")
        }
    }
}

/// Asks `peer` from the address `local`. A tunnel answers its own peers alone, and
/// to the port at which it has them: the default one is taken for that.
///
/// # Errors
/// When the port cannot be had.
fn ask(peer: SocketAddr, local: IpAddr) -> io::Result<Answer> {
    // A socket that is connected learns of refusals, and receives answers from
    // where it is connected to only; so there are two.
    let listening = UdpSocket::bind((local, DEFAULT_PORT))?;
    listening.set_nonblocking(true)?;
    let connected = UdpSocket::bind((local, 0))?;
    connected.connect(peer)?;
    connected.set_read_timeout(Some(ASK_STEP))?;
    let nonce = random()?;
    let probe = |kind| Probe { kind, nonce }.to_packet(0);
    let request = Kind::Request { port: DEFAULT_PORT };
    let deadline = Instant::now() + ANSWER_TIME;
    while Instant::now() < deadline {
        let _ = listening.send_to(&probe(request), peer);
        let _ = connected.send(&probe(Kind::Size));
        let refused = connected.recv(&mut [0; 64]);
        if refused.is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused) {
            return Ok(Answer::Refused);
        }
        let mut buffer = [0; 2048];
        while let Ok((length, from)) = listening.recv_from(&mut buffer) {
            if let Some(probe) = Probe::from_packet(&buffer[..length])
                && probe.nonce == nonce
                && let Kind::Reply { port: seen_port } = probe.kind
            {
                let from = canonical(from);
                return Ok(Answer::Replied { from, seen_port });
            }
        }
    }
    Ok(Answer::Silent)
}

#[cfg(test)]
mod tests {
    use super::super::item::Status::{Degraded, Info, Missing, Ok as Good};
    use super::*;

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
    fn a_peer_is_ok_only_if_it_has_answered() {
        let (peer, local): (SocketAddr, _) = (
            "10.211.55.123:8285".parse().unwrap(),
            "10.211.55.122".parse().unwrap(),
        );
        let elsewhere = SocketAddr::new(peer.ip(), 20_000);
        let replied = |from, seen_port| Ok(Answer::Replied { from, seen_port });
        for (answer, status, part) in [
            (
                replied(peer, DEFAULT_PORT),
                Good,
                "10.211.55.123:8285, route from 10.211.55.122; it answers",
            ),
            (
                replied(elsewhere, DEFAULT_PORT),
                Degraded,
                "from 10.211.55.123:20000",
            ),
            (replied(peer, 20_001), Degraded, "as 20001"),
            (Ok(Answer::Refused), Info, "nothing receives"),
            (Ok(Answer::Silent), Info, "no answer"),
            (Err(ErrorKind::AddrInUse.into()), Info, "in use here"),
        ] {
            let item = answered(peer, local, &answer);
            assert_eq!(item.status, status, "{item:?}");
            assert!(item.found.contains(part), "{item:?}");
        }
    }
}
