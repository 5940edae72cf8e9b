//! Path MTUs: what a stranger claims of a path by ICMP changes nothing, and what a
//! router on the path says does.

use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};

use fastvpn::error::Result;
use nix::sys::socket::{getsockopt, sockopt};
use serde_json::Value;
use socket2::{Domain, Protocol, Socket, Type};
use testbed::{Namespace, UNDERLAY_NAME};

use crate::host::underlay::set_mtu;
use crate::operator::Operator;
use crate::packets::{TUNNEL_NAME, V4, V6, checksum, udp_packet};
use crate::routing::overlay_mtu::{Network, PathMtuV6, Probe, Underlay};
use crate::site::{
    MTU_BYTES, Site, inside, peer, peer_v6, sites, transfer, underlay, underlay_v6,
    wait_for_each_other,
};
use crate::support::{Tunnel, check, fail, link, snmp, stop, tried, wait_until};
use crate::tools::Stream;

#[testbed::trial(each_engine)]
fn forged_path_mtus() -> Result<()> {
    forged_path_mtus_over(Underlay::V4)
}

#[testbed::trial(each_engine)]
fn a_path_that_grows_again() -> Result<()> {
    a_path_that_grows_again_over(Underlay::V4)
}

#[testbed::trial]
fn forged_path_mtus_over_ipv6() -> Result<()> {
    forged_path_mtus_over(Underlay::V6)
}

#[testbed::trial]
fn a_path_that_grows_again_over_ipv6() -> Result<()> {
    a_path_that_grows_again_over(Underlay::V6)
}

fn addresses(number: u8) -> [IpAddr; 2] {
    [underlay(number).into(), underlay_v6(number).into()]
}

/// What the host's kernel believes of the path to an address.
fn kernels_path_mtu(host: &Namespace, to: IpAddr) -> Result<u32> {
    let ask = || -> io::Result<i32> {
        let any = SocketAddr::new(
            if to.is_ipv4() {
                [0; 4].into()
            } else {
                [0; 16].into()
            },
            0,
        );
        let socket = UdpSocket::bind(any)?;
        socket.connect((to, 9))?;
        match to {
            IpAddr::V4(_) => Ok(getsockopt(&socket, sockopt::IpMtu)?),
            IpAddr::V6(_) => Ok(getsockopt(&socket, PathMtuV6)?),
        }
    };
    Ok(tried("ask for the path MTU", host.run(ask))? as u32)
}

/// Claims, from a third host, that packets of `victim` to `to` are too long: of the
/// tunnel, and of others, by which the kernel's memory can always be changed.
fn forge(from: &Namespace, victim: IpAddr, to: IpAddr, mtu_bytes: u16) -> Result<()> {
    let socket = from.run(|| {
        let (domain, protocol) = match victim {
            IpAddr::V4(_) => (Domain::IPV4, Protocol::ICMPV4),
            IpAddr::V6(_) => (Domain::IPV6, Protocol::ICMPV6),
        };
        Socket::new(domain, Type::RAW, Some(protocol))
    });
    let socket = tried("open a raw socket", socket)?;
    let echo = match (victim, to) {
        (IpAddr::V4(victim), IpAddr::V4(to)) => V4::new(victim, to, 1).packet(&[0; 1000]),
        (IpAddr::V6(victim), IpAddr::V6(to)) => {
            let payload = [&[129][..], &[0; 1000]].concat();
            V6::new(victim, to, 58).packet(&payload)
        }
        _ => return fail("addresses of two families"),
    };
    let datagram = udp_packet(victim, to, [8285; 2], &[0x45; 1000]);
    for quoted in [datagram, echo] {
        let quoted = &quoted[..500];
        let mtu = mtu_bytes.to_be_bytes();
        let message = match victim {
            IpAddr::V4(_) => {
                let mut message = [&[3, 4, 0, 0, 0, 0, mtu[0], mtu[1]], quoted].concat();
                let sum = checksum(&message);
                message[2..4].copy_from_slice(&sum);
                message
            }
            // The kernel fills in the checksum (RFC 3542, section 3.1).
            IpAddr::V6(_) => [&[2, 0, 0, 0, 0, 0, mtu[0], mtu[1]], quoted].concat(),
        };
        let victim = SocketAddr::new(victim, 0).into();
        tried(
            "send a forged ICMP message",
            socket.send_to(&message, &victim),
        )?;
    }
    Ok(())
}

fn path_mtu(operator: &Operator) -> Result<Value> {
    Ok(operator.ask("peers")?["peers"][0]["path_mtu_bytes"].clone())
}

/// One forged message per address: the tunnel goes on with packets of full size,
/// and whoever starts, or takes over, meanwhile begins with them.
fn forged_path_mtus_over(over: Underlay) -> Result<()> {
    let network = sites(3)?;
    let [near, far, stranger] = &network.all[..] else {
        return fail("three sites");
    };
    let family = usize::from(over == Underlay::V6);
    let (victim, to) = (addresses(1)[family], addresses(2)[family]);
    let peer = |number| [peer(number), peer_v6(number)][family].clone();
    let forged_bytes = [552, 1280][family];
    let tunnel_bytes = MTU_BYTES - over.overhead_bytes();

    let operator = Operator::new()?;
    let start = |more: &[&str]| -> Result<Tunnel> {
        let socket = operator.socket_text();
        let flags = [&["--queues", "1", "--control", &socket][..], more].concat();
        near.start(&[peer(2)], &flags)
    };
    let other = far.start(&[peer(1)], &["--queues", "1"])?;
    let first = start(&[])?;
    operator.wait()?;
    wait_for_each_other(near, far)?;

    let is_fooled = || Ok(kernels_path_mtu(&near.host, to)? == forged_bytes);
    wait_until("the kernel believes it", || {
        forge(&stranger.host, victim, to, forged_bytes as u16)?;
        is_fooled()
    })?;
    // Whoever has heard of this has looked at the path since.
    for mtu_bytes in [MTU_BYTES - 10, MTU_BYTES] {
        set_mtu(&near.host, UNDERLAY_NAME, mtu_bytes)?;
        wait_until("the path is as wide as the interface", || {
            near_to_far(near, far)?;
            Ok(path_mtu(&operator)? == mtu_bytes)
        })?;
        wait_until("the device's MTU follows", || {
            Ok(link(&near.host, TUNNEL_NAME)?.mtu == mtu_bytes - over.overhead_bytes())
        })?;
    }
    let full_size = |family_inside: usize| -> Result<()> {
        Probe::open(near, far, family_inside, libc::IP_PMTUDISC_PROBE)?.passes(tunnel_bytes)
    };
    let fragments = snmp(&near.host, "Ip", "FragCreates")?;
    for family_inside in [0, 1] {
        full_size(family_inside)?;
        transfer(near, far, family_inside, 5)?;
    }
    let now = snmp(&near.host, "Ip", "FragCreates")?;
    check(now == fragments, || {
        format!("{fragments} fragments, then {now}")
    })?;

    // What starts in the meantime.
    let check_device = |who: &str| -> Result<()> {
        check(is_fooled()?, || "the kernel has forgotten".into())?;
        let (mtu, path) = (link(&near.host, TUNNEL_NAME)?.mtu, path_mtu(&operator)?);
        check(mtu == tunnel_bytes && path == MTU_BYTES, || {
            format!("{who}: MTU {mtu}, path {path}")
        })
    };
    check_device("the first one")?;
    let second = start(&["--takeover"])?;
    check(first.wait()?.status.success(), || {
        "the first one failed".into()
    })?;
    operator.wait()?;
    check_device("one that took over")?;
    full_size(0)?;
    stop(second)?;
    let third = start(&[])?;
    operator.wait()?;
    check_device("one that was started")?;
    full_size(0)?;
    stop(third)?;
    stop(other).map(drop)
}

/// One packet of the tunnel, so that its path is in use.
fn near_to_far(near: &Site, far: &Site) -> Result<()> {
    let socket = crate::support::udp(&near.container, inside(1)[0], 0)?;
    let sent = socket.send_to(b"in use", (inside(far.number)[0], 9));
    tried("send a datagram", sent.map(drop))
}

/// A router on the way becomes narrow, and wide again.
fn a_path_that_grows_again_over(over: Underlay) -> Result<()> {
    const NARROW_BYTES: u32 = 1400;
    let network = Network::new(over)?;
    let tunnels = network.start()?;
    let (near, far) = (&network.near, &network.far);
    let (wide_bytes, overhead_bytes) = (network.tunnel_mtu_bytes(), over.overhead_bytes());
    let stream = Stream::start(&near.container, &far.container, inside(2)[0])?;
    stream.wait_for_progress()?;
    network.narrow(NARROW_BYTES)?;
    let probe = Probe::open(near, far, 0, libc::IP_PMTUDISC_DO)?;
    probe.learns(NARROW_BYTES - overhead_bytes, wide_bytes)?;
    if over == Underlay::V6 {
        // IPv6 routers do not fragment: also who allows that is told, and does it.
        let probe = Probe::open(near, far, 0, libc::IP_PMTUDISC_DONT)?;
        probe.passes(wide_bytes)?;
    }
    stream.wait_for_progress()?;
    network.narrow(MTU_BYTES)?;
    for family in [0, 1] {
        let probe = Probe::open(near, far, family, libc::IP_PMTUDISC_PROBE)?;
        probe.passes(wide_bytes)?;
    }
    stream.wait_for_progress()?;
    stream.finish()?;
    let mut ended = Vec::new();
    for tunnel in tunnels {
        ended.push(stop(tunnel)?);
    }
    let said = |words: &str| ended[0].log.contains(words);
    let told = said("takes 1400 bytes, no longer 1500") && said("takes 1500 bytes, no longer 1400");
    check(told, || ended[0].log.clone())
}
