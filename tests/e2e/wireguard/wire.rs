//! What crosses the cable between the hosts: no byte of it in clear.

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use fastvpn::error::{Error, Result};
use testbed::wireguard::WIREGUARD_GO;
use testbed::{Namespace, Pair, UNDERLAY_NAME};

use super::ends::{Keys, Kind, MTU_BYTES, PORT, Reach, Underlay, hosts, inside, stop};
use crate::packets::{Tap, destination, transport};
use crate::support::{FAMILIES, PATIENCE, UNDERLAY, check, tried, udp, wait_for, wait_until};

/// Types of messages: their first byte, with three zero bytes behind it.
pub const INITIATION: u8 = 1;
/// See [`INITIATION`].
pub const RESPONSE: u8 = 2;
/// See [`INITIATION`].
pub const DATA: u8 = 4;

/// How long what has crossed may take to be seen.
const SETTLED: Duration = Duration::from_millis(50);

/// Watches one host's end of the cable: what comes in there.
pub struct Wire([Tap; 2]);

/// A UDP datagram on the cable, or a batch of them; or else a packet that is not UDP.
#[derive(Debug, Clone)]
pub struct Crossed {
    /// Whom it is for.
    pub to: IpAddr,
    /// UDP ports of both; none if it is not UDP.
    pub ports: Option<[u16; 2]>,
    /// What is in it.
    pub payload: Vec<u8>,
}

impl Crossed {
    fn new(packet: &[u8]) -> Option<Self> {
        let (protocol, transport) = transport(packet)?;
        let port = |at: usize| {
            Some(u16::from_be_bytes(
                transport.get(at..at + 2)?.try_into().ok()?,
            ))
        };
        let ports = match protocol {
            17 => Some([port(0)?, port(2)?]),
            _ => None,
        };
        let header_bytes = if ports.is_some() { 8 } else { 0 };
        Some(Self {
            to: destination(packet)?,
            ports,
            payload: transport.get(header_bytes..)?.to_vec(),
        })
    }

    /// The type of message, if it looks like one.
    pub fn kind(&self) -> Option<u8> {
        match self.payload[..] {
            [kind @ 1..=4, 0, 0, 0, ..] if self.ports.is_some() => Some(kind),
            _ => None,
        }
    }

    /// Receiver index and counter of each data message in it: a nonce of one of the keys.
    pub fn nonces(&self) -> Vec<(u32, u64)> {
        if self.kind() != Some(DATA) {
            return Vec::new();
        }
        let header = |message: &[u8]| {
            let (index, counter) = (message.get(4..8)?, message.get(8..16)?);
            let index = u32::from_le_bytes(index.try_into().ok()?);
            Some((index, u64::from_le_bytes(counter.try_into().ok()?)))
        };
        // In a batch all have the same length but the last, and the second one begins with
        // the same index and the next counter.
        let Some((_, counter)) = header(&self.payload) else {
            return Vec::new();
        };
        let next = [&self.payload[..8], &(counter + 1).to_le_bytes()].concat();
        let behind = self.payload.get(1..).unwrap_or_default();
        let second = behind.windows(16).position(|bytes| bytes == next);
        let bytes = second.map_or(self.payload.len(), |at| at + 1);
        self.payload.chunks(bytes).filter_map(header).collect()
    }

    /// Whether it is between tunnels, and not of the hosts' own.
    pub fn is_between_tunnels(&self) -> bool {
        self.ports.is_some_and(|ports| ports.contains(&PORT))
    }
}

impl Wire {
    /// What comes in at this host from now on.
    pub fn at(host: &Namespace) -> Result<Self> {
        Ok(Self([
            Tap::on_ethernet(host, UNDERLAY_NAME, true)?,
            Tap::on_ethernet(host, UNDERLAY_NAME, false)?,
        ]))
    }

    /// All that has come in since the last call.
    pub fn take(&self) -> Result<Vec<Crossed>> {
        let mut all = Vec::new();
        for tap in &self.0 {
            while let Some(packet) = tap.next_within(SETTLED, |_| true)? {
                all.extend(Crossed::new(&packet));
            }
        }
        Ok(all)
    }

    /// The next message of this type, which must come.
    pub fn next(&self, kind: u8) -> Result<Crossed> {
        let wanted = |packet: &[u8]| {
            let crossed = Crossed::new(packet);
            crossed
                .is_some_and(|crossed| crossed.is_between_tunnels() && crossed.kind() == Some(kind))
        };
        let packet = self.0[0].next_within(PATIENCE, wanted)?;
        let crossed = packet.and_then(|packet| Crossed::new(&packet));
        crossed.ok_or_else(|| Error::new(format!("no message of type {kind} came")))
    }
}

/// Watches a host's end of the cable for as long as it lives: in a session, no counter may
/// come a second time.
pub struct NonceWatch {
    is_over: Arc<AtomicBool>,
    sessions: Arc<AtomicUsize>,
    thread: JoinHandle<Result<()>>,
}

impl NonceWatch {
    /// Of what comes in at this host from now on, over IPv4.
    pub fn at(host: &Namespace) -> Result<Self> {
        let tap = Tap::on_ethernet(host, UNDERLAY_NAME, true)?;
        let (is_over, sessions) = (Arc::<AtomicBool>::default(), Arc::<AtomicUsize>::default());
        let (is_asked_to_end, count) = (Arc::clone(&is_over), Arc::clone(&sessions));
        let watch = move || {
            let mut seen: HashMap<u32, HashSet<u64>> = HashMap::new();
            loop {
                let packet = tap.next_within(SETTLED, |_| true)?;
                if packet.is_none() && is_asked_to_end.load(Ordering::Relaxed) {
                    return Ok(());
                }
                let crossed = packet.and_then(|packet| Crossed::new(&packet));
                for (index, counter) in crossed.iter().flat_map(Crossed::nonces) {
                    check(seen.entry(index).or_default().insert(counter), || {
                        format!("counter {counter} came twice in the session {index:08x}")
                    })?;
                }
                count.store(seen.len(), Ordering::Relaxed);
            }
        };
        Ok(Self {
            is_over,
            sessions,
            thread: std::thread::spawn(watch),
        })
    }

    /// In how many sessions data has come.
    pub fn sessions(&self) -> usize {
        self.sessions.load(Ordering::Relaxed)
    }

    /// Ends it once nothing more comes, and returns in how many sessions data has come.
    pub fn finish(self) -> Result<usize> {
        self.is_over.store(true, Ordering::Relaxed);
        let watched = self.thread.join();
        watched.unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        Ok(self.sessions.load(Ordering::Relaxed))
    }
}

/// Sends a datagram to the other host's tunnel address until it is heard.
pub fn is_heard(from: &UdpSocket, to: &UdpSocket, payload: &[u8]) -> Result<()> {
    let to_address = tried("read an address", to.local_addr())?;
    tried(
        "set a timeout",
        to.set_read_timeout(Some(Duration::from_millis(100))),
    )?;
    wait_until("a datagram is heard", || {
        tried("send", from.send_to(payload, to_address))?;
        let mut buffer = vec![0; payload.len() + 1];
        Ok(to
            .recv(&mut buffer)
            .is_ok_and(|length| &buffer[..length] == payload))
    })
}

fn contains(bytes: &[u8], part: &[u8]) -> bool {
    bytes.windows(part.len()).any(|window| window == part)
}

/// What the tests that watch are made of.
#[testbed::trial]
fn a_nonce_that_comes_twice_is_noticed() -> Result<()> {
    let hosts = hosts()?;
    let to = Underlay::V4.endpoint(1);
    let (from, at) = (
        udp(&hosts.a, UNDERLAY[0], PORT)?,
        udp(&hosts.b, to.ip(), PORT)?,
    );
    for (counters, is_right) in [([1_u64, 2], true), ([3, 3], false)] {
        let watch = NonceWatch::at(&hosts.b)?;
        for counter in counters {
            let mut message = vec![DATA, 0, 0, 0, 7, 0, 0, 0];
            message.extend(counter.to_le_bytes());
            message.extend([0; 16]);
            tried("send", from.send_to(&message, to))?;
            tried("receive", at.recv(&mut [0; 64]))?;
        }
        let found = watch.finish();
        check(found.is_ok() == is_right, || {
            format!("{counters:?}: {found:?}")
        })?;
    }
    Ok(())
}

/// Neither before there is a session nor in one.
#[testbed::trial(each_engine)]
fn nothing_crosses_in_clear() -> Result<()> {
    in_clear([Kind::Fastvpn; 2])
}

/// What the test above is made of.
#[testbed::trial(long, wireguard_go)]
fn nothing_crosses_in_clear_with_wireguard_go() -> Result<()> {
    in_clear([Kind::Other(&WIREGUARD_GO); 2])
}

fn in_clear(kinds: [Kind; 2]) -> Result<()> {
    const SECRET: &[u8] = b"nobody on the path may read this, whatever happens";
    let hosts: Pair = hosts()?;
    let wires = [Wire::at(&hosts.a)?, Wire::at(&hosts.b)?];
    let keys = Keys::new(true)?;
    let calls = Reach::at(Underlay::V4.endpoint(1));
    let a = keys.start(&hosts.a, 0, kinds[0], calls)?;
    // Host B does not run yet: what has no session waits, or is lost.
    let from = {
        crate::packets::wait_until_up(&hosts.a, a.device())?;
        udp(&hosts.a, inside(0), 0)?
    };
    for _ in 0..20 {
        tried("send", from.send_to(SECRET, (inside(1), 9)))?;
    }
    let first = wires[1].next(INITIATION)?;
    check(first.payload.len() == 148, || format!("{first:?}"))?;

    let b = keys.start(&hosts.b, 1, kinds[1], Reach::UNKNOWN)?;
    for [to_a, to_b] in FAMILIES {
        wait_for(&hosts.a, to_b)?;
        wait_for(&hosts.b, to_a)?;
    }
    let to = udp(&hosts.b, inside(1), 0)?;
    is_heard(&from, &to, SECRET)?;

    let identities = [keys.public(0), keys.public(1)];
    let mut data = 0;
    for wire in &wires {
        let all = wire.take()?;
        for crossed in all.iter().filter(|crossed| crossed.is_between_tunnels()) {
            let payload = &crossed.payload;
            check(crossed.kind().is_some(), || {
                format!("in clear: {crossed:?}")
            })?;
            data += usize::from(crossed.kind() == Some(DATA));
            check(!contains(payload, SECRET), || {
                format!("in clear: {crossed:?}")
            })?;
            let is_named = identities.iter().any(|key| contains(payload, key));
            check(!is_named, || format!("an identity: {crossed:?}"))?;
            // Header and tag, around a packet padded to 16 bytes or to the MTU.
            let padded = payload.len().saturating_sub(32);
            check(
                crossed.kind() != Some(DATA)
                    || padded.is_multiple_of(16)
                    || padded == MTU_BYTES as usize,
                || format!("{} bytes", payload.len()),
            )?;
        }
    }
    check(data > 0, || "no data has crossed".into())?;
    stop([a, b])
}
