//! fastvpn at both ends.

use std::net::Ipv4Addr;
use std::time::Duration;

use fastvpn::error::Result;
use ipnet::IpNet;
use testbed::wireguard::WIREGUARD_GO;

use super::ends::{Keys, Kind, Reach, Underlay, has_mtu, hosts, inside, stop, tunnel};
use super::interop::work;
use super::wire::{DATA, RESPONSE, Wire, is_heard};
use crate::packets::{TUNNEL_NAME, is_udp_to, source};
use crate::support::{FAMILIES, check, link, tried, udp, wait_for, wait_until};

const BOTH: [Kind; 2] = [Kind::Fastvpn; 2];

#[testbed::trial(each_engine)]
fn keys_over_ipv4() -> Result<()> {
    let hosts = hosts()?;
    let ends = tunnel(&hosts, &Keys::new(true)?, BOTH, Underlay::V4)?;
    has_mtu(&hosts.a, &ends[0])?;
    has_mtu(&hosts.b, &ends[1])?;
    work(&hosts)?;
    stop(ends)
}

#[testbed::trial(mixed)]
fn keys_over_ipv6() -> Result<()> {
    let hosts = hosts()?;
    let ends = tunnel(&hosts, &Keys::new(false)?, BOTH, Underlay::V6)?;
    work(&hosts)?;
    stop(ends)
}

/// Both call, and their calls may cross.
#[testbed::trial(each_engine)]
fn both_call_at_once() -> Result<()> {
    let hosts = hosts()?;
    let keys = Keys::new(true)?;
    let calls = |peer: usize| Reach {
        // What calls by itself, without a packet to send.
        keepalive_s: Some(1),
        endpoint: Some(Underlay::V4.endpoint(peer)),
    };
    for _ in 0..3 {
        let a = keys.start(&hosts.a, 0, Kind::Fastvpn, calls(1))?;
        let b = keys.start(&hosts.b, 1, Kind::Fastvpn, calls(0))?;
        std::thread::scope(|scope| {
            let there = scope.spawn(|| wait_for(&hosts.a, inside(1)));
            let back = scope.spawn(|| wait_for(&hosts.b, inside(0)));
            let result = |thread: std::thread::ScopedJoinHandle<'_, Result<()>>| {
                thread
                    .join()
                    .unwrap_or_else(|payload| std::panic::resume_unwind(payload))
            };
            result(there).and(result(back))
        })
        .or_else(|error| {
            let said = [a.said(), b.said()].concat();
            crate::support::fail(format!("{error}; they said:\n{said}"))
        })?;
        stop([a, b])?;
    }
    Ok(())
}

/// A packet of a peer's must come from what is behind the peer.
#[testbed::trial(each_engine)]
fn a_source_that_is_not_the_peers() -> Result<()> {
    const OTHER: Ipv4Addr = Ipv4Addr::new(10, 244, 99, 99);
    let (hosts, keys) = (hosts()?, Keys::new(false)?);
    let [a, b] = tunnel(&hosts, &keys, BOTH, Underlay::V4)?;
    let index = link(&hosts.a, TUNNEL_NAME)?.index;
    let mut netlink = hosts.a.netlink()?;
    netlink.add_address(index, IpNet::new_assert(OTHER.into(), 32))?;
    let to = udp(&hosts.b, inside(1), 0)?;
    let to_address = tried("read an address", to.local_addr())?;
    let wrong = udp(&hosts.a, OTHER, 0)?;
    for _ in 0..50 {
        tried("send", wrong.send_to(b"wrong", to_address))?;
    }
    // In order behind them, as far as one worker goes; nothing else comes.
    is_heard(&udp(&hosts.a, inside(0), 0)?, &to, b"right")?;
    tried(
        "set a timeout",
        to.set_read_timeout(Some(Duration::from_millis(100))),
    )?;
    let mut buffer = [0; 16];
    while let Ok(length) = to.recv(&mut buffer) {
        check(&buffer[..length] == b"right", || {
            "what is not the peer's came through".into()
        })?;
    }
    // Whoever asks why is told whose packets they were.
    let answer = keys.ask(1, "peers")?;
    let refused = &answer["peers"][0]["drops"]["source_not_allowed"];
    check(refused.as_u64() >= Some(50), || answer.to_string())?;
    stop([a, b])
}

/// Without the preshared key there is no session, whatever else fits; with it
/// there is one.
#[testbed::trial(long, each_engine)]
fn another_preshared_key() -> Result<()> {
    preshared_keys([Kind::Fastvpn; 2])
}

/// What the test above is made of.
#[testbed::trial(long, wireguard_go)]
fn another_preshared_key_of_wireguard_go() -> Result<()> {
    preshared_keys([Kind::Other(&WIREGUARD_GO); 2])
}

fn preshared_keys(kinds: [Kind; 2]) -> Result<()> {
    let hosts = hosts()?;
    let keys = Keys::new(true)?;
    let wires = [Wire::at(&hosts.a)?, Wire::at(&hosts.b)?];
    let called = keys.start(&hosts.b, 1, kinds[1], Reach::UNKNOWN)?;
    let calls = Reach::at(Underlay::V4.endpoint(1));
    for other in [Some([7; 32]), None] {
        let wrong = keys.with_preshared(other)?;
        let caller = wrong.start(&hosts.a, 0, kinds[0], calls)?;
        crate::packets::wait_until_up(&hosts.a, caller.device())?;
        let socket = udp(&hosts.a, inside(0), 0)?;
        tried("send", socket.send_to(b"a packet", (inside(1), 9)))?;
        // It is answered, which the caller cannot read, and calls again.
        wires[0].next(RESPONSE)?;
        wires[0].next(RESPONSE)?;
        for wire in &wires {
            let all = wire.take()?;
            check(
                all.iter().all(|crossed| crossed.kind() != Some(DATA)),
                || "a session with a wrong key".into(),
            )?;
        }
        caller.stop()?;
    }
    let caller = keys.start(&hosts.a, 0, kinds[0], calls)?;
    wait_for(&hosts.a, inside(1))?;
    stop([caller, called])
}

/// What is said of the packet itself: a datagram through the tunnel keeps its source.
#[testbed::trial(mixed)]
fn a_tunnel_of_keys_changes_nothing() -> Result<()> {
    let hosts = hosts()?;
    let [a, b] = tunnel(&hosts, &Keys::new(true)?, BOTH, Underlay::V4)?;
    let tap = crate::packets::Tap::on_tunnel(&hosts.b)?;
    let from = udp(&hosts.a, inside(0), 0)?;
    let payload = [0x5a; 100];
    wait_until("the datagram comes out", || {
        tried("send", from.send_to(&payload, (inside(1), 4000)))?;
        let wanted = |packet: &[u8]| is_udp_to(packet, 4000);
        let packet = tap.next_within(Duration::from_millis(100), wanted)?;
        let Some(packet) = packet else {
            return Ok(false);
        };
        check(
            packet.len() == 128 && source(&packet) == Some(FAMILIES[0][0]),
            || format!("{packet:?}"),
        )?;
        Ok(true)
    })?;
    stop([a, b])
}
