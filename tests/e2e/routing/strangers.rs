//! What comes to the port and should not: datagrams of strangers, and garbage
//! from the peer's own address.

use std::io::IoSlice;
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::AsRawFd;
use std::time::Duration;

use etherparse::PacketBuilder;
use fastvpn::error::{Error, Result};
use nix::sys::socket::{MsgFlags, MultiHeaders, sendmmsg, setsockopt, sockopt};
use testbed::{Namespace, rss_bytes};

use crate::support::{
    TUNNEL, UNDERLAY, answers, bulk, check, hosts, link, snmp, stop, tried, tunnel_between, udp,
    wait_until,
};
use crate::tools::Stream;

/// An inner packet as it would come from the peer's tunnel address.
fn inner(port: u16, payload: &[u8]) -> Result<Vec<u8>> {
    let builder = PacketBuilder::ipv4(TUNNEL[1].octets(), TUNNEL[0].octets(), 64).udp(4000, port);
    let mut packet = Vec::new();
    builder
        .write(&mut packet, payload)
        .map_err(|error| Error::new(format!("cannot build a packet: {error}")))?;
    Ok(packet)
}

#[testbed::trial(each_engine)]
fn strangers_are_not_let_in() -> Result<()> {
    const FORGED: u64 = 500;
    let hosts = hosts(1500)?;
    let stranger = Namespace::new()?;
    let addresses = [
        (&hosts.a, "third", Ipv4Addr::new(10, 211, 66, 122)),
        (&stranger, "third", Ipv4Addr::new(10, 211, 66, 200)),
    ];
    testbed::join(&hosts.a, &stranger, "third", "third")?;
    for (namespace, name, address) in addresses {
        let mut netlink = namespace.netlink()?;
        let index = link(namespace, name)?.index;
        netlink.set_up(index)?;
        netlink.add_address(index, ipnet::IpNet::new_assert(address.into(), 24))?;
    }
    let tunnels = tunnel_between(&hosts, &["--queues", "1"])?;

    let application = udp(&hosts.a, TUNNEL[0], 0)?;
    let timeout = Some(Duration::from_millis(100));
    tried("set a timeout", application.set_read_timeout(timeout))?;
    let port = tried("read an address", application.local_addr())?.port();
    let mut buffer = [0; 100];
    // From the peer's address, though another port: this way in is open. All
    // that comes in by it has to be the peer's.
    let peer = udp(&hosts.b, UNDERLAY[1], 0)?;
    let from_peer = inner(port, b"peer")?;
    let mut peer_is_heard = || {
        wait_until("the peer's packet arrives", || {
            tried("send", peer.send_to(&from_peer, (UNDERLAY[0], 8285)))?;
            let mut heard = false;
            while let Ok(length) = application.recv(&mut buffer) {
                heard = true;
                check(&buffer[..length] == b"peer", || {
                    "a stranger's packet came through".into()
                })?;
            }
            Ok(heard)
        })
    };
    peer_is_heard()?;

    let taken_before = snmp(&hosts.a, "Udp", "InDatagrams")?;
    let forger = udp(&stranger, addresses[1].2, 8285)?;
    tried("connect", forger.connect((addresses[0].2, 8285)))?;
    let forged = inner(port, b"stranger")?;
    let mut sent = 0;
    wait_until("the tunnel takes the forged datagrams", || {
        for _ in 0..20 {
            tried("send", forger.send(&forged))?;
            sent += 1;
        }
        Ok(snmp(&hosts.a, "Udp", "InDatagrams")? >= taken_before + FORGED)
    })?;
    // In order behind the forged ones.
    peer_is_heard()?;
    // Neither an answer nor an ICMP error, which would be ECONNREFUSED.
    tried(
        "set",
        forger.set_read_timeout(Some(Duration::from_millis(50))),
    )?;
    let answer = forger.recv(&mut [0; 100]);
    check(
        answer
            .as_ref()
            .is_err_and(|error| error.kind() == std::io::ErrorKind::WouldBlock),
        || format!("the stranger was answered: {answer:?}"),
    )?;
    let [a, b] = tunnels;
    let ended = stop(a)?;
    let dropped = ended.dropped("sender-unknown");
    check(dropped >= FORGED / 2 && dropped <= sent, || {
        format!("{sent} forged:\n{}", ended.log)
    })?;
    stop(b).map(drop)
}

/// Pseudo-random numbers, the same in every run (xorshift64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }

    fn bytes(&mut self, length: usize) -> Vec<u8> {
        std::iter::repeat_with(|| self.next() as u8)
            .take(length)
            .collect()
    }
}

/// What an IP header says, and is not so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Garbage {
    Empty,
    CutShort,
    WrongVersion,
    WrongLength,
    Random,
    /// Whole IP packets from here on, which the tunnel has to deliver or drop
    /// as it sees fit.
    WrongChecksum,
    TransportNonsense,
    Fragment,
    VersionSixNonsense,
}

const ALL: [Garbage; 9] = [
    Garbage::Empty,
    Garbage::CutShort,
    Garbage::WrongVersion,
    Garbage::WrongLength,
    Garbage::Random,
    Garbage::WrongChecksum,
    Garbage::TransportNonsense,
    Garbage::Fragment,
    Garbage::VersionSixNonsense,
];

impl Garbage {
    fn make(self, random: &mut Random) -> Vec<u8> {
        let length = 40 + random.below(1400);
        let mut bytes = random.bytes(length);
        bytes[0] = 0x45;
        bytes[2..4].copy_from_slice(&(length as u16).to_be_bytes());
        bytes[6..8].copy_from_slice(&[0x40, 0]);
        bytes[9] = [6, 17, 1, 0, 255][random.below(5)];
        bytes[12..16].copy_from_slice(&TUNNEL[1].octets());
        bytes[16..20].copy_from_slice(&TUNNEL[0].octets());
        match self {
            Garbage::Empty => return vec![],
            Garbage::Random => return random.bytes(length),
            Garbage::CutShort => bytes.truncate(1 + random.below(19)),
            Garbage::WrongVersion => {
                bytes[0] = [0x05, 0x15, 0x35, 0x55, 0x75, 0xf5][random.below(6)]
            }
            Garbage::WrongLength => {
                let wrong = (length + 1 + random.below(1000)) as u16;
                bytes[2..4].copy_from_slice(&wrong.to_be_bytes());
            }
            Garbage::WrongChecksum => {}
            Garbage::Fragment => {
                bytes[6..8]
                    .copy_from_slice(&(random.next() as u16 & 0x3fff | 0x2000).to_be_bytes());
                set_checksum(&mut bytes);
            }
            Garbage::TransportNonsense => set_checksum(&mut bytes),
            Garbage::VersionSixNonsense => {
                bytes[0] = 0x60;
                bytes[4..6].copy_from_slice(&(length as u16 - 40).to_be_bytes());
                bytes[6] = [0, 6, 17, 43, 44, 58, 60][random.below(7)];
            }
        }
        bytes
    }
}

/// RFC 1071, over a header of 20 bytes.
fn set_checksum(packet: &mut [u8]) {
    packet[10..12].fill(0);
    let words = packet[..20].chunks(2);
    let mut sum: u32 = words
        .map(|word| u32::from(word[0]) << 8 | u32::from(word[1]))
        .sum();
    sum = (sum & 0xffff) + (sum >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    packet[10..12].copy_from_slice(&(!(sum as u16)).to_be_bytes());
}

/// Sends datagrams as fast as the kernel takes them.
fn send_all(socket: &UdpSocket, datagrams: &[Vec<u8>]) -> Result<()> {
    let slices: Vec<_> = datagrams
        .iter()
        .map(|bytes| [IoSlice::new(bytes)])
        .collect();
    let no_addresses = vec![None::<()>; slices.len()];
    let mut headers = MultiHeaders::preallocate(slices.len(), None);
    let sent = sendmmsg(
        socket.as_raw_fd(),
        &mut headers,
        &slices,
        no_addresses,
        [],
        MsgFlags::empty(),
    );
    let count = sent
        .map(|results| results.count())
        .map_err(|errno| Error::os("cannot send", errno.into()))?;
    check(count == datagrams.len(), || format!("sent only {count}"))
}

#[testbed::trial(each_engine)]
fn garbage_of_the_peer() -> Result<()> {
    /// Datagrams at a time: fewer than the queues on the way hold.
    const BATCH: usize = 100;
    const ROUNDS: usize = 200;
    /// Datagrams of a batch, all of one kind and length.
    const DATAGRAMS: usize = 40;
    /// All buffers of a worker together, which are touched one after another.
    const GROWTH_MAX: u64 = 12 << 20;

    let hosts = hosts(1500)?;
    let [mut a, b] = tunnel_between(&hosts, &["--queues", "1"])?;
    let stream = Stream::start(&hosts.b, &hosts.a, TUNNEL[0].into())?;
    stream.wait_for_progress()?;
    let pid = a.child().pid();
    let rss_before = rss_bytes(pid)?;

    let socket = udp(&hosts.b, UNDERLAY[1], 0)?;
    tried("connect", socket.connect((UNDERLAY[0], 8285)))?;
    let batches = udp(&hosts.b, UNDERLAY[1], 0)?;
    tried("connect", batches.connect((UNDERLAY[0], 8285)))?;
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let mut sent = [0u64; ALL.len()];
    for round in 0..ROUNDS {
        for (kind, sent) in ALL.iter().zip(&mut sent) {
            let datagrams: Vec<_> = (0..BATCH).map(|_| kind.make(&mut random)).collect();
            send_all(&socket, &datagrams)?;
            *sent += BATCH as u64;
            // Batches that the kernel delivers whole (UDP_SEGMENT, UDP_GRO).
            let one = kind.make(&mut random);
            if !one.is_empty() {
                let size = i32::try_from(one.len()).unwrap_or(i32::MAX);
                setsockopt(&batches, sockopt::UdpGsoSegment, &size)
                    .map_err(|errno| Error::os("cannot set UDP_SEGMENT", errno.into()))?;
                tried("send a batch", batches.send(&one.repeat(DATAGRAMS)))?;
                *sent += DATAGRAMS as u64;
            }
        }
        // In order behind the garbage: what is answered has been waited for.
        answers(&hosts.b, TUNNEL[0].into(), 56)?;
        if round % 50 == 0 {
            stream.wait_for_progress()?;
        }
    }
    stream.wait_for_progress()?;
    stream.finish()?;
    let grown = rss_bytes(pid)?.saturating_sub(rss_before);
    check(grown < GROWTH_MAX, || format!("grew by {grown} bytes"))?;
    bulk(&hosts.a, &hosts.b, TUNNEL[1].into(), 20)?;
    bulk(&hosts.b, &hosts.a, TUNNEL[0].into(), 20)?;

    let ended = stop(a)?;
    let count = |kind| {
        ALL.iter()
            .position(|other| *other == kind)
            .map_or(0, |place| sent[place])
    };
    // At random all reasons occur; most often the version is wrong.
    let some = count(Garbage::Random);
    for (reason, least, most) in [
        ("short", count(Garbage::Empty) + count(Garbage::CutShort), 0),
        ("version", count(Garbage::WrongVersion), some),
        ("length", count(Garbage::WrongLength), some),
    ] {
        let counted = ended.dropped(reason);
        // A busy host may lose some on its own way from socket to socket.
        check(
            counted >= least / 2 && counted <= least + most + some / 8,
            || format!("{least} {reason} sent, {counted} counted:\n{}", ended.log),
        )?;
    }
    stop(b).map(drop)
}
