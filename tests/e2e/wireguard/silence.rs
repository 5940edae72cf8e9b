//! Those that nobody trusts: whatever they send, they hear nothing and change nothing.

use std::net::{Ipv4Addr, UdpSocket};
use std::time::Duration;

use fastvpn::error::Result;
use testbed::wireguard::{INITIATION_BYTES, RESPONSE_BYTES, WIREGUARD_GO, forged_handshake};
use testbed::{UNDERLAY_NAME, ip};

use super::ends::{Keys, Kind, PORT, Reach, Underlay, hosts, inside};
use super::wire::{DATA, INITIATION, RESPONSE, Wire, is_heard};
use crate::packets::udp_packet;
use crate::support::{UNDERLAY, check, noise, tried, udp, wait_for};

/// Another address of host A, that the tunnel knows nothing of.
const STRANGER: Ipv4Addr = Ipv4Addr::new(10, 211, 55, 200);

/// Datagrams that are no messages, and messages that are not the peer's.
fn unauthentic(keys: &Keys) -> Vec<Vec<u8>> {
    let mut all = vec![vec![], vec![0], vec![4, 0, 0, 0]];
    all.extend([1, 16, 31, 32, 33, 64, 92, 148, 149, 1452].map(|bytes| noise(bytes as u64, bytes)));
    for kind in 0..=5 {
        for bytes in [4, 8, 16, 31, 32, 48, 64, 92, 148, 1452] {
            let mut message = noise(kind * 10_000 + bytes as u64, bytes);
            message[..4].copy_from_slice(&[kind as u8, 0, 0, 0]);
            all.push(message);
        }
    }
    for bytes in [INITIATION_BYTES, RESPONSE_BYTES] {
        let filling = noise(bytes as u64, bytes);
        all.push(forged_handshake(&keys.public(1), bytes, &filling));
    }
    // As a plain tunnel would send it: of the peer's, to the host itself and beyond.
    for payload in [&b"forged"[..], &[0; 1000]] {
        all.push(udp_packet(inside(0), inside(1), [4000, 4000], payload));
    }
    all
}

/// The same messages with one bit changed, some bytes less, and some more.
fn spoiled(message: &[u8]) -> Vec<Vec<u8>> {
    let mut all = Vec::new();
    for at in [4, 8, 12, 16, 40, message.len() - 1] {
        let mut flipped = message.to_vec();
        if let Some(byte) = flipped.get_mut(at) {
            *byte ^= 0x10;
        }
        all.push(flipped);
    }
    all.push(message[..message.len() - 1].to_vec());
    all.push([message, &[0]].concat());
    all
}

fn send_all(from: &UdpSocket, datagrams: &[Vec<u8>]) -> Result<()> {
    for datagram in datagrams {
        let sent = from.send_to(datagram, Underlay::V4.endpoint(1));
        tried("send", sent)?;
    }
    Ok(())
}

/// By capture: not a packet goes to a stranger, and the session beside it goes on.
/// Messages that were heard before do nothing a second time, from wherever they come.
#[testbed::trial(each_engine)]
fn strangers_hear_nothing() -> Result<()> {
    strangers([Kind::OneWorker; 2])
}

/// What the test above is made of.
#[testbed::trial(long, wireguard_go)]
fn strangers_hear_nothing_of_wireguard_go() -> Result<()> {
    strangers([Kind::Other(&WIREGUARD_GO); 2])
}

fn strangers(kinds: [Kind; 2]) -> Result<()> {
    let hosts = hosts()?;
    ip(
        &hosts.a,
        &format!("address add {STRANGER}/32 dev {UNDERLAY_NAME}"),
    )?;
    let keys = Keys::new(true)?;
    let seen_by_b = Wire::at(&hosts.b)?;
    let seen_by_a = Wire::at(&hosts.a)?;
    let b = keys.start(&hosts.b, 1, kinds[1], Reach::UNKNOWN)?;
    let calls = Reach::at(Underlay::V4.endpoint(1));
    let start_a = || keys.start(&hosts.a, 0, kinds[0], calls);
    let a = start_a()?;
    wait_for(&hosts.a, inside(1))?;
    let to = udp(&hosts.b, inside(1), 4000)?;
    is_heard(&udp(&hosts.a, inside(0), 0)?, &to, b"once")?;

    let heard: Vec<_> = seen_by_b.take()?;
    let mut initiations = heard.iter().filter(|it| it.kind() == Some(INITIATION));
    let mut data: Vec<_> = heard.iter().filter(|it| it.kind() == Some(DATA)).collect();
    data.retain(|message| message.payload.len() < 200);
    let (Some(initiation), Some(last)) = (initiations.next(), data.last()) else {
        return crate::support::fail("no handshake was seen");
    };
    let mut datagrams = unauthentic(&keys);
    datagrams.extend(spoiled(&initiation.payload));
    datagrams.extend(spoiled(&last.payload));
    datagrams.push(initiation.payload.clone());
    datagrams.extend(data.iter().map(|message| message.payload.clone()));

    let stranger = udp(&hosts.a, STRANGER, 0)?;
    for _ in 0..3 {
        send_all(&stranger, &datagrams)?;
    }
    // Host B does not take the stranger for its peer.
    wait_for(&hosts.b, inside(0))?;
    // From the peer's own address and port, too.
    a.stop()?;
    seen_by_a.take()?;
    let in_its_place = udp(&hosts.a, UNDERLAY[0], PORT)?;
    send_all(&in_its_place, &datagrams)?;
    drop(in_its_place);

    // Seen to after all of that: by the handshakes, and by the worker.
    let a = start_a()?;
    wait_for(&hosts.a, inside(1))?;
    is_heard(&udp(&hosts.a, inside(0), 0)?, &to, b"again")?;
    for crossed in seen_by_a.take()? {
        check(crossed.to != STRANGER, || format!("answered: {crossed:?}"))?;
    }
    tried(
        "set a timeout",
        to.set_read_timeout(Some(Duration::from_millis(100))),
    )?;
    let mut buffer = [0; 2000];
    while let Ok((length, from)) = to.recv_from(&mut buffer) {
        let payload = &buffer[..length];
        check(payload == b"again", || {
            format!("{length} bytes came through from {from}")
        })?;
    }
    a.stop()?;
    b.stop()
}

/// Whose key nobody knows is not answered either, however right the rest is.
#[testbed::trial(long, each_engine)]
fn an_unknown_key_hears_nothing() -> Result<()> {
    unknown_key([Kind::OneWorker; 2])
}

/// What the test above is made of.
#[testbed::trial(long, wireguard_go)]
fn an_unknown_key_hears_nothing_of_wireguard_go() -> Result<()> {
    unknown_key([Kind::Other(&WIREGUARD_GO); 2])
}

fn unknown_key(kinds: [Kind; 2]) -> Result<()> {
    let hosts = hosts()?;
    let keys = Keys::new(false)?;
    let wires = [Wire::at(&hosts.a)?, Wire::at(&hosts.b)?];
    let b = keys.start(&hosts.b, 1, kinds[1], Reach::UNKNOWN)?;
    let calls = Reach {
        endpoint: Some(Underlay::V4.endpoint(1)),
        keepalive_s: Some(1),
    };
    // It knows host B's key, which is no secret.
    let unknown = keys.with_another_caller()?;
    let a = unknown.start(&hosts.a, 0, kinds[0], calls)?;
    // It calls, and calls again when nothing has come for five seconds.
    wires[1].next(INITIATION)?;
    wires[1].next(INITIATION)?;
    a.stop()?;
    wires[1].take()?;
    // The one that host B knows is seen to after it.
    let a = keys.start(&hosts.a, 0, kinds[0], calls)?;
    wait_for(&hosts.a, inside(1))?;
    let count = |wire: &Wire, kind: u8| -> Result<usize> {
        let all = wire.take()?;
        Ok(all.iter().filter(|it| it.kind() == Some(kind)).count())
    };
    let calls = count(&wires[1], INITIATION)?;
    let answers = count(&wires[0], RESPONSE)?;
    check((1..=calls).contains(&answers), || {
        format!("{answers} answers to {calls} calls of the known key")
    })?;
    a.stop()?;
    b.stop()
}
