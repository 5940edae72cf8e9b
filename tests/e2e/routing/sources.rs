//! Who may send what: a peer's inner packets have to come from an address that
//! is behind it, by the longest prefix.

use std::io::IoSlice;
use std::net::{IpAddr, Ipv4Addr, UdpSocket};
use std::os::fd::AsRawFd;
use std::time::Duration;

use fastvpn::error::{Error, Result};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

use crate::operator::Operator;
use crate::packets::{TUNNEL_NAME, udp_packet, wait_until_up};
use crate::site::{
    ALL_PREFIXES, INSIDE_NAME, Site, inside, peer, prefixes, router, sites, tunnel, underlay,
    underlay_v6,
};
use crate::support::{check, link, stop, tried, udp, wait_until, without_backlog_drops};

/// The port that the tunnel listens on.
pub const PORT: u16 = 8285;

/// Where the packets go inside: a socket at the victim's tunnel address.
pub struct Victim<'a> {
    site: &'a Site,
    sockets: [UdpSocket; 2],
}

impl<'a> Victim<'a> {
    /// On a site whose tunnel comes up.
    pub fn new(site: &'a Site) -> Result<Self> {
        wait_until_up(&site.host, TUNNEL_NAME)?;
        let open = |family: usize| {
            let socket = udp(&site.host, tunnel(site.number)[family], 0)?;
            let timeout = Some(Duration::from_millis(100));
            tried("set a timeout", socket.set_read_timeout(timeout))?;
            Ok::<_, Error>(socket)
        };
        Ok(Self {
            site,
            sockets: [open(0)?, open(1)?],
        })
    }

    /// A packet from `source` to the socket of its family.
    pub fn packet(&self, source: IpAddr, payload: &[u8]) -> Result<Vec<u8>> {
        let family = usize::from(source.is_ipv6());
        let port = tried("read an address", self.sockets[family].local_addr())?.port();
        let to = tunnel(self.site.number)[family];
        Ok(udp_packet(source, to, [4000, port], payload))
    }

    /// Takes in what has come; all of it must be `expected`.
    pub fn hears_only(&self, family: usize, expected: &[u8]) -> Result<usize> {
        let mut buffer = [0; 2000];
        let mut heard = 0;
        while let Ok((length, from)) = self.sockets[family].recv_from(&mut buffer) {
            heard += 1;
            check(buffer[..length] == *expected, || {
                let said = String::from_utf8_lossy(&buffer[..length]).into_owned();
                format!("{said:?} came through from {from}")
            })?;
        }
        Ok(heard)
    }
}

/// Opens a socket at a site's underlay address, toward the victim's tunnel.
fn sender(site: &Site, victim: &Site) -> Result<UdpSocket> {
    let socket = udp(&site.host, underlay(site.number), PORT)?;
    tried("connect", socket.connect((underlay(victim.number), PORT)))?;
    Ok(socket)
}

/// Sends an allowed packet until it is heard. What was sent before, by the same
/// socket, has then been seen to.
pub fn is_heard(victim: &Victim<'_>, from: &UdpSocket, source: IpAddr) -> Result<()> {
    let packet = victim.packet(source, b"allowed")?;
    wait_until("an allowed packet arrives", || {
        tried("send", from.send(&packet))?;
        Ok(victim.hears_only(usize::from(source.is_ipv6()), b"allowed")? > 0)
    })
}

/// Sends `count` packets that must not come through, few at a time.
fn forge(victim: &Victim<'_>, from: &UdpSocket, source: IpAddr, count: u64) -> Result<()> {
    let packet = victim.packet(source, b"forged")?;
    for number in 0..count {
        tried("send", from.send(&packet))?;
        if number % 16 == 15 {
            // Queues on the way are not what is tested.
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    Ok(())
}

/// A peer may send from anywhere but from this host: its address in the tunnel,
/// those on other interfaces, and those that it gets while the tunnel runs.
#[testbed::trial(each_engine)]
fn a_source_that_is_this_host() -> Result<()> {
    const FORGED: u64 = 64;
    let network = sites(2)?;
    let [site, a] = &network.all[..] else {
        return Err(Error::new("two sites"));
    };
    let operator = Operator::new()?;
    let socket = operator.socket_text();
    // The peer's prefixes are wider than this host's own.
    for peer in [
        underlay(2).to_string(),
        format!("{}={ALL_PREFIXES},10.211.0.0/16", underlay(2)),
    ] {
        let flags = ["--queues", "2", "--no-routes", "--control", &socket];
        let tunnel_end = site.start(&[peer], &flags)?;
        operator.wait()?;
        let victim = Victim::new(site)?;
        let from_a = sender(a, site)?;
        let other = [tunnel(9)[0], tunnel(9)[1]];
        for address in other {
            is_heard(&victim, &from_a, address)?;
        }
        let index = link(&site.host, INSIDE_NAME)?.index;
        let mut netlink = site.host.netlink()?;
        for address in other {
            netlink.add_address(index, address.into())?;
        }
        wait_until("the new addresses are this host's", || {
            let before = operator.dropped("source-not-allowed")?;
            for address in other {
                let packet = victim.packet(address, b"allowed")?;
                tried("send", from_a.send(&packet))?;
            }
            for family in [0, 1] {
                victim.hears_only(family, b"allowed")?;
            }
            let rose = operator.dropped("source-not-allowed")? - before;
            Ok(rose == other.len() as u64)
        })?;
        let before = operator.dropped("source-not-allowed")?;
        let mut sent = 0;
        for source in tunnel(1)
            .into_iter()
            .chain(router(1))
            .chain([underlay(1).into(), underlay_v6(1).into()])
            .chain(other)
        {
            forge(&victim, &from_a, source, FORGED)?;
            sent += FORGED;
            // In order behind them.
            is_heard(&victim, &from_a, inside(2)[usize::from(source.is_ipv6())])?;
        }
        let counted = operator.dropped("source-not-allowed")? - before;
        check(counted <= sent && counted >= sent / 2, || {
            format!("{sent} packets from this host, {counted} counted")
        })?;
        for address in other {
            netlink.del_address(index, address.into())?;
        }
        for address in other {
            is_heard(&victim, &from_a, address)?;
        }
        stop(tunnel_end)?;
    }
    Ok(())
}

/// Hosts that only send datagrams stand in for peers: what they say is up to
/// the test.
#[testbed::trial(each_engine)]
fn a_source_behind_another_peer() -> Result<()> {
    const FORGED: u64 = 64;
    let network = sites(4)?;
    let [site, a, b, stranger] = &network.all[..] else {
        return Err(Error::new("four sites"));
    };
    let operator = Operator::new()?;
    let socket = operator.socket_text();
    let peers = [
        format!("{}={},172.30.0.0/16,fd00:30::/32", underlay(2), prefixes(2)),
        format!(
            "{}={},172.30.5.0/24,fd00:30:5::/48",
            underlay(3),
            prefixes(3)
        ),
    ];
    let tunnel_end = site.start(&peers, &["--queues", "2", "--control", &socket])?;
    operator.wait()?;
    let victim = Victim::new(site)?;
    let (from_a, from_b) = (sender(a, site)?, sender(b, site)?);
    let ip = |text: &str| -> Result<IpAddr> {
        text.parse()
            .map_err(|_| Error::new(format!("{text} is no address")))
    };
    for source in inside(2)
        .into_iter()
        .chain([ip("172.30.9.9")?, ip("fd00:30:9::9")?])
    {
        is_heard(&victim, &from_a, source)?;
    }
    for source in inside(3)
        .into_iter()
        .chain([ip("172.30.5.9")?, ip("fd00:30:5::9")?])
    {
        is_heard(&victim, &from_b, source)?;
    }
    check(operator.dropped("source-not-allowed")? == 0, || {
        "what is allowed was counted".into()
    })?;

    // The other peer's, by its own prefix and by a longer one than ours; the
    // host's own; nobody's.
    let mut sent = 0;
    for source in [
        inside(3)[0],
        inside(3)[1],
        tunnel(3)[0],
        ip("172.30.5.9")?,
        ip("fd00:30:5::9")?,
        tunnel(1)[0],
        tunnel(1)[1],
        inside(1)[0],
        ip("127.0.0.1")?,
        ip("0.0.0.0")?,
        ip("192.0.2.7")?,
        ip("2001:db8::7")?,
        ip("::1")?,
    ] {
        forge(&victim, &from_a, source, FORGED)?;
        sent += FORGED;
        // In order behind them.
        is_heard(&victim, &from_a, inside(2)[usize::from(source.is_ipv6())])?;
    }
    // A peer's address is enough of a peer, whatever the port.
    let other_port = udp(&a.host, underlay(2), 0)?;
    tried("connect", other_port.connect((underlay(1), PORT)))?;
    is_heard(&victim, &other_port, inside(2)[0])?;
    forge(&victim, &other_port, inside(3)[0], FORGED)?;
    sent += FORGED;
    is_heard(&victim, &other_port, inside(2)[0])?;
    let counted = operator.dropped("source-not-allowed")?;
    check(counted <= sent && counted >= sent / 2, || {
        format!("{sent} packets from elsewhere, {counted} counted")
    })?;
    check(operator.dropped("sender-unknown")? == 0, || {
        "a peer was taken for a stranger".into()
    })?;

    // A stranger, whatever source it claims.
    let from_stranger = sender(stranger, site)?;
    let mut sent = 0;
    for source in [inside(2)[0], inside(2)[1], inside(4)[0]] {
        forge(&victim, &from_stranger, source, FORGED)?;
        sent += FORGED;
    }
    wait_until("the stranger's datagrams are counted", || {
        forge(&victim, &from_stranger, inside(2)[0], 1)?;
        sent += 1;
        Ok(operator.dropped("sender-unknown")? >= 3 * FORGED / 2)
    })?;
    for (from, source) in [(&from_a, inside(2)), (&from_b, inside(3))] {
        is_heard(&victim, from, source[0])?;
        is_heard(&victim, from, source[1])?;
    }
    let ended = stop(tunnel_end)?;
    let counted = ended.dropped("sender-unknown");
    check(counted <= sent && counted >= sent / 2, || {
        format!("{sent} of a stranger:\n{}", ended.log)
    })?;
    check(ended.dropped("source-not-allowed") > 0, || ended.log)
}

/// Sends datagrams of one length as a batch, which the kernel delivers whole
/// (`UDP_SEGMENT`, `UDP_GRO`).
pub fn send_batch(socket: &UdpSocket, packets: &[Vec<u8>]) -> Result<()> {
    let bytes = packets.concat();
    let segment = packets.first().map_or(0, Vec::len) as u16;
    let control = [ControlMessage::UdpGsoSegments(&segment)];
    let slices = [IoSlice::new(&bytes)];
    sendmsg::<()>(
        socket.as_raw_fd(),
        &slices,
        &control,
        MsgFlags::empty(),
        None,
    )
    .map(drop)
    .map_err(|errno| Error::os("cannot send a batch", errno.into()))
}

/// One datagram of a batch does not vouch for the others.
#[testbed::trial(each_engine)]
fn batches_of_mixed_sources() -> Result<()> {
    const BATCH: usize = 32;
    const BATCHES: usize = 20;
    let network = sites(3)?;
    let [site, a, _] = &network.all[..] else {
        return Err(Error::new("three sites"));
    };
    let peers = [2, 3].map(peer);
    let tunnel_end = site.start(&peers, &["--queues", "1"])?;
    let victim = Victim::new(site)?;
    let from_a = sender(a, site)?;
    for family in [0, 1] {
        let (good, bad) = (inside(2)[family], inside(3)[family]);
        is_heard(&victim, &from_a, good)?;
        // Same length, so that they make a batch.
        let [good, bad] = [
            victim.packet(good, b"allowed")?,
            victim.packet(bad, b"forgery")?,
        ];
        for pattern in 0..BATCHES {
            let is_good = |place: usize| match pattern {
                0 => place == 0,
                1 => place != 0,
                2 => place == BATCH - 1,
                _ => (place * 7 + pattern) % 5 < 3,
            };
            let batch: Vec<_> = (0..BATCH)
                .map(|place| {
                    if is_good(place) {
                        good.clone()
                    } else {
                        bad.clone()
                    }
                })
                .collect();
            let wanted = (0..BATCH).filter(|place| is_good(*place)).count();
            without_backlog_drops(|| {
                send_batch(&from_a, &batch)?;
                let heard = victim.hears_only(family, b"allowed")?;
                check(heard == wanted, || {
                    format!("{heard} came through of {wanted} allowed ones")
                })
            })?;
        }
    }
    let ended = stop(tunnel_end)?;
    check(ended.dropped("source-not-allowed") > 0, || ended.log)
}

/// A change of the prefixes changes who may send what, at once.
#[testbed::trial(each_engine)]
fn sources_follow_the_prefixes() -> Result<()> {
    let network = sites(3)?;
    let [site, a, b] = &network.all[..] else {
        return Err(Error::new("three sites"));
    };
    let operator = Operator::new()?;
    let socket = operator.socket_text();
    let peers = [2, 3].map(peer);
    let tunnel_end = site.start(&peers, &["--queues", "2", "--control", &socket])?;
    operator.wait()?;
    let victim = Victim::new(site)?;
    let (from_a, from_b) = (sender(a, site)?, sender(b, site)?);
    let moving = IpAddr::from(Ipv4Addr::new(172, 30, 5, 9));
    let is_refused = |from: &UdpSocket, own: IpAddr| -> Result<()> {
        let before = operator.dropped("source-not-allowed")?;
        forge(&victim, from, moving, 16)?;
        is_heard(&victim, from, own)?;
        let after = operator.dropped("source-not-allowed")?;
        check(after > before, || "nothing was counted".into())
    };
    is_refused(&from_a, inside(2)[0])?;
    operator.tell(&format!("route add 172.30.0.0/16 --peer {}", underlay(2)))?;
    is_heard(&victim, &from_a, moving)?;
    operator.tell(&format!("route add 172.30.5.0/24 --peer {}", underlay(3)))?;
    is_refused(&from_a, inside(2)[0])?;
    is_heard(&victim, &from_b, moving)?;
    operator.tell(&format!(
        "route add 172.30.5.0/24 --peer {} --replace",
        underlay(2)
    ))?;
    is_refused(&from_b, inside(3)[0])?;
    is_heard(&victim, &from_a, moving)?;

    // Once removed, a peer is a stranger.
    operator.tell(&format!("peer del {}", underlay(2)))?;
    let before = operator.dropped("sender-unknown")?;
    wait_until("a former peer is a stranger", || {
        forge(&victim, &from_a, inside(2)[0], 1)?;
        Ok(operator.dropped("sender-unknown")? > before)
    })?;
    is_heard(&victim, &from_b, inside(3)[0])?;
    operator.tell(&format!("peer add {}=172.30.0.0/16", underlay(2)))?;
    is_heard(&victim, &from_a, moving)?;
    stop(tunnel_end).map(drop)
}
