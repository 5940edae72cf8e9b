//! What senders are told: no route, hop limit exceeded; when, in which words,
//! and when not.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, TcpStream, UdpSocket};
use std::time::Duration;

use fastvpn::error::{Error, Result};
use testbed::{CONTAINER_NAME, Namespace};

use crate::host::routes::goes_in;
use crate::icmp_error::{IcmpError, NO_ROUTE, TIME_EXCEEDED};
use crate::operator::Operator;
use crate::packets::{Tap, V4, V6, hop_limit, is_udp_to, transport, udp, udp_packet};
use crate::routing::mesh::hop_limit_between;
use crate::routing::sources::send_batch;
use crate::site::{
    Site, all_went_well, full_mesh, inside, peer, router, sites, transfer, tunnel,
    wait_for_each_other,
};
use crate::support::{PATIENCE, check, stop, tried, wait_until, without_backlog_drops};

/// Nobody's addresses, in a network that is routed into the tunnel.
fn nowhere() -> [IpAddr; 2] {
    [
        Ipv4Addr::new(10, 243, 9, 9).into(),
        "fd00:243::9"
            .parse()
            .unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST)),
    ]
}

/// What sends packets to [`nowhere`] into the tunnel, where no peer has them.
const ROUTES: [&str; 4] = ["--route", "10.243.0.0/16", "--route", "fd00:243::/32"];

/// A UDP socket in a namespace, toward an address, with this hop limit.
fn probe(namespace: &Namespace, to: (IpAddr, u16), hops: u32) -> Result<UdpSocket> {
    let any: IpAddr = match to.0 {
        IpAddr::V4(_) => [0; 4].into(),
        IpAddr::V6(_) => [0; 16].into(),
    };
    let socket = crate::support::udp(namespace, any, 0)?;
    let as_socket = socket2::SockRef::from(&socket);
    let set = match to.0 {
        IpAddr::V4(_) => as_socket.set_ttl_v4(hops),
        IpAddr::V6(_) => as_socket.set_unicast_hops_v6(hops),
    };
    tried("set the hop limit", set)?;
    Ok(socket)
}

/// Sends to a port with this hop limit until an ICMP error about it comes in by
/// `device`.
fn error_about(
    namespace: &Namespace,
    device: &Tap,
    to: (IpAddr, u16),
    hops: u32,
) -> Result<IcmpError> {
    let socket = probe(namespace, to, hops)?;
    let mut error = None;
    wait_until(
        &format!("an ICMP error about hop limit {hops} to {}", to.0),
        || {
            // The last one's error may be waiting in the socket.
            let _ = socket.send_to(b"where to?", to);
            let about = |packet: &[u8]| {
                IcmpError::parse(packet).is_some_and(|error| error.is_about_port(to.1))
            };
            let packet = device.next_within(Duration::from_millis(700), about)?;
            error = packet.as_deref().and_then(IcmpError::parse);
            Ok(error.is_some())
        },
    )?;
    error.ok_or_else(|| Error::new("no ICMP error"))
}

/// Who reports that the hop limit ran out, hop by hop, until `last` reports
/// something else.
fn trace(from: &Namespace, device: &str, to: IpAddr) -> Result<Vec<IpAddr>> {
    const HOPS_MAX: u32 = 8;
    let family = usize::from(to.is_ipv6());
    let tap = Tap::on_ethernet(from, device, to.is_ipv4())?;
    let mut reporters = Vec::new();
    for hops in 1..=HOPS_MAX {
        let port = 33_434 + hops as u16;
        let error = error_about(from, &tap, (to, port), hops)?;
        check(error.intact, || format!("a wrong checksum: {error:?}"))?;
        reporters.push(error.from);
        if error.kind != TIME_EXCEEDED[family] {
            break;
        }
    }
    Ok(reporters)
}

/// Senders behind the host and on it hear that there is no way, and from whom.
#[testbed::trial(each_engine)]
fn nowhere_is_reported() -> Result<()> {
    let network = sites(2)?;
    let site = &network.all[0];
    let flags = [&["--queues", "2"][..], &ROUTES].concat();
    let tunnel_end = site.start(&[peer(2)], &flags)?;
    // Until then it is the kernel that knows no way.
    wait_until("there are routes into the tunnel", || {
        let lead_in = nowhere().map(|to| goes_in(&site.host, to));
        lead_in
            .into_iter()
            .try_fold(true, |all, one| Ok(all && one?))
    })?;
    for (family, to) in nowhere().into_iter().enumerate() {
        let tap = Tap::on_ethernet(&site.container, CONTAINER_NAME, to.is_ipv4())?;
        let error = error_about(&site.container, &tap, (to, 4321), 64)?;
        check(error.kind == NO_ROUTE[family] && error.intact, || {
            format!("{error:?}")
        })?;
        check(
            error.from == tunnel(1)[family] && error.to == inside(1)[family],
            || format!("{error:?}"),
        )?;
        check(error.rest == [0; 4], || format!("{error:?}"))?;
        // As the tunnel got it: forwarded once. RFC 792 and 1812, RFC 4443: at
        // least eight bytes of payload, and no more than the smallest MTU.
        let quote = &error.quote;
        check(
            crate::packets::source(quote) == Some(inside(1)[family])
                && crate::packets::destination(quote) == Some(to)
                && hop_limit(quote) == Some(63)
                && transport(quote)
                    .is_some_and(|(protocol, payload)| protocol == 17 && payload.len() >= 8)
                && quote.ends_with(b"where to?"),
            || format!("{error:?}"),
        )?;
        check(error.packet_bytes <= [576, 1280][family], || {
            format!("{error:?}")
        })?;
        // A long packet is quoted in part.
        let socket = probe(&site.container, (to, 4322), 64)?;
        let mut long = None;
        wait_until("an ICMP error about a long packet", || {
            let _ = socket.send_to(&[7; 1400], (to, 4322));
            let about = |packet: &[u8]| {
                IcmpError::parse(packet).is_some_and(|error| error.is_about_port(4322))
            };
            long = tap.next_within(Duration::from_millis(700), about)?;
            Ok(long.is_some())
        })?;
        let long = long.as_deref().and_then(IcmpError::parse);
        check(
            long.as_ref().is_some_and(|error| {
                error.intact && error.packet_bytes <= [576, 1280][family] && error.quote.len() > 200
            }),
            || format!("{long:?}"),
        )?;

        // What programs see of it, behind the host and on it.
        for namespace in [&site.container, &site.host] {
            let connect = || TcpStream::connect_timeout(&(to, 80).into(), PATIENCE);
            let result = namespace.run(connect);
            let errno = result.as_ref().err().and_then(std::io::Error::raw_os_error);
            check(errno == Some(libc::ENETUNREACH), || {
                format!("{to}: {result:?}")
            })?;
        }
    }
    let ended = stop(tunnel_end)?;
    check(ended.dropped("no-route") >= 6, || ended.log)
}

/// A flood to nowhere is not answered by a flood, and soon after there are
/// reports again.
#[testbed::trial(each_engine)]
fn reports_are_limited() -> Result<()> {
    const BATCH: usize = 100;
    const BATCHES: usize = 30;
    let network = sites(2)?;
    let site = &network.all[0];
    let operator = Operator::new()?;
    let socket = operator.socket_text();
    let flags = [&["--queues", "1", "--control", &socket][..], &ROUTES].concat();
    let tunnel_end = site.start(&[peer(2)], &flags)?;
    operator.wait()?;
    for to in nowhere() {
        let tap = Tap::on_ethernet(&site.container, CONTAINER_NAME, to.is_ipv4())?;
        let before = (
            operator.counter("icmp_sent")?,
            operator.dropped("no-route")?,
        );
        let socket = probe(&site.container, (to, 5000), 64)?;
        for batch in 1..=BATCHES {
            for _ in 0..BATCH {
                let _ = socket.send_to(b"where to?", (to, 5000));
            }
            wait_until("the tunnel drops them", || {
                let dropped = operator.dropped("no-route")? - before.1;
                Ok(dropped >= (batch * BATCH * 9 / 10) as u64)
            })?;
        }
        let mut heard = 0;
        let about =
            |packet: &[u8]| IcmpError::parse(packet).is_some_and(|error| error.is_about_port(5000));
        while tap
            .next_within(Duration::from_millis(100), about)?
            .is_some()
        {
            heard += 1;
        }
        let sent = operator.counter("icmp_sent")? - before.0;
        check(heard > 0 && heard <= sent, || {
            format!("{heard} errors heard, {sent} counted")
        })?;
        check(sent < (BATCHES * BATCH / 3) as u64, || {
            format!("{sent} errors about {} packets", BATCHES * BATCH)
        })?;
        check(operator.counter("icmp_suppressed")? > 0, || {
            "none was held back".into()
        })?;
        error_about(&site.container, &tap, (to, 5001), 64)?;
    }
    stop(tunnel_end).map(drop)
}

/// Packets about which RFC 1122 (3.2.2) and RFC 4443 (2.4 e) forbid an error.
/// They go into the device as if the host had forwarded them.
fn silent_ones(family: usize) -> BTreeMap<&'static str, Vec<u8>> {
    let mut packets = BTreeMap::new();
    match (inside(1)[family], nowhere()[family]) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let icmp = |kind: u8, code: u8| {
                let quote = udp_packet(to.into(), from.into(), [1, 2], b"quote");
                let mut message = [&[kind, code, 0, 0, 0, 0, 0, 0], &quote[..]].concat();
                let sum = crate::packets::checksum(&message);
                message[2..4].copy_from_slice(&sum);
                V4::new(from, to, 1).packet(&message)
            };
            packets.insert("destination unreachable", icmp(3, 1));
            packets.insert("source quench", icmp(4, 0));
            packets.insert("redirect", icmp(5, 1));
            packets.insert("time exceeded", icmp(11, 0));
            packets.insert("parameter problem", icmp(12, 0));
            let datagram = |from: Ipv4Addr, to: Ipv4Addr| {
                udp_packet(from.into(), to.into(), [1, 2], b"silence")
            };
            for (what, to) in [
                ("to a multicast group", Ipv4Addr::new(224, 0, 0, 251)),
                ("to a wide multicast group", Ipv4Addr::new(239, 1, 2, 3)),
                ("to all", Ipv4Addr::BROADCAST),
            ] {
                packets.insert(what, datagram(from, to));
            }
            for (what, from) in [
                ("from nowhere", Ipv4Addr::UNSPECIFIED),
                ("from a loopback", Ipv4Addr::new(127, 0, 0, 9)),
                ("from all", Ipv4Addr::BROADCAST),
                ("from a group", Ipv4Addr::new(224, 0, 0, 7)),
            ] {
                packets.insert(what, datagram(from, to));
            }
            let mut later = V4::new(from, to, 17);
            later.fragment = 0x2000 | 100;
            packets.insert("a later fragment", later.packet(&[7; 80]));
            later.fragment = 100;
            packets.insert("the last fragment", later.packet(&[7; 80]));
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            let ip = |text: &str| text.parse().unwrap_or(to);
            let icmp = |kind: u8| {
                let quote = udp_packet(to.into(), from.into(), [1, 2], b"quote");
                let mut message = [&[kind, 0, 0, 0, 0, 0, 0, 0], &quote[..]].concat();
                let header = V6::new(from, to, 58);
                let length = (message.len() as u16).to_be_bytes();
                let sum =
                    crate::packets::checksum(&[&header.pseudo(58), &length[..], &message].concat());
                message[2..4].copy_from_slice(&sum);
                header.packet(&message)
            };
            packets.insert("destination unreachable", icmp(1));
            packets.insert("packet too big", icmp(2));
            packets.insert("time exceeded", icmp(3));
            packets.insert("parameter problem", icmp(4));
            packets.insert("an error of an unknown type", icmp(100));
            packets.insert("a redirect", icmp(137));
            let datagram = |from, to| udp_packet(IpAddr::V6(from), IpAddr::V6(to), [1, 2], b"x");
            packets.insert("to a group", datagram(from, ip("ff05::1234")));
            packets.insert("to all nodes", datagram(from, ip("ff02::1")));
            packets.insert("from nowhere", datagram(ip("::"), to));
            packets.insert("from a group", datagram(ip("ff05::1"), to));
            // Next header UDP; offset 180, more to come.
            let fragment = [&[17, 0, 5, 0xa1, 0, 0, 0, 9], &[7; 80][..]].concat();
            packets.insert("a later fragment", V6::new(from, to, 44).packet(&fragment));
            let behind = [&[44, 0, 1, 4, 0, 0, 0, 0], &fragment[..]].concat();
            packets.insert(
                "a later fragment behind options",
                V6::new(from, to, 60).packet(&behind),
            );
        }
        _ => {}
    }
    packets
}

/// Packets that look almost like those, about which there has to be an error.
fn loud_ones(family: usize) -> Vec<(&'static str, Vec<u8>)> {
    match (inside(1)[family], nowhere()[family]) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let mut first = V4::new(from, to, 17);
            first.fragment = 0x2000;
            let datagram = udp([1, 2], &first.pseudo(), &[7; 80]);
            vec![
                ("the first fragment", first.packet(&datagram)),
                (
                    "an echo request",
                    V4::new(from, to, 1).packet(&[8, 0, 0xf7, 0xfe, 0, 1, 0, 0]),
                ),
                (
                    "a datagram",
                    udp_packet(from.into(), to.into(), [1, 2], b"loud"),
                ),
            ]
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            let fragment = [
                &[17, 0, 0, 1, 0, 0, 0, 9],
                &udp([1, 2], &V6::new(from, to, 17).pseudo(17), &[7; 80])[..],
            ]
            .concat();
            vec![
                (
                    "the first fragment",
                    V6::new(from, to, 44).packet(&fragment),
                ),
                (
                    "an echo request",
                    V6::new(from, to, 58).packet(&[128, 0, 0, 0, 0, 1, 0, 0]),
                ),
                (
                    "a datagram",
                    udp_packet(from.into(), to.into(), [1, 2], b"loud"),
                ),
            ]
        }
        _ => Vec::new(),
    }
}

/// One queue keeps the order: an error about a loud packet has passed whatever
/// there would have been about a silent one ahead of it.
#[testbed::trial(each_engine)]
fn what_is_never_reported() -> Result<()> {
    let network = sites(2)?;
    let site = &network.all[0];
    let flags = [&["--queues", "1"][..], &ROUTES].concat();
    let tunnel_end = site.start(&[peer(2)], &flags)?;
    for family in [0, 1] {
        let tap = match family {
            0 => Tap::on_tunnel(&site.host)?,
            _ => Tap::on_tunnel_v6(&site.host)?,
        };
        let is_error = |packet: &[u8]| IcmpError::parse(packet).is_some();
        for (what, silent) in silent_ones(family) {
            for (loud_what, loud) in loud_ones(family) {
                let mut error = None;
                wait_until(&format!("an error about {loud_what}"), || {
                    // Rates are limited: the silent one first, so that there
                    // are as many of them as it takes.
                    tap.inject(&silent)?;
                    tap.inject(&loud)?;
                    let packet = tap.next_within(Duration::from_millis(500), is_error)?;
                    error = packet.as_deref().and_then(IcmpError::parse);
                    Ok(error.is_some())
                })?;
                let about = error.map(|error| error.quote).unwrap_or_default();
                check(loud.starts_with(&about) || about.starts_with(&loud), || {
                    format!(
                        "family {family}: {what} was reported (or {loud_what} misquoted): {about:x?}"
                    )
                })?;
            }
        }
    }
    stop(tunnel_end).map(drop)
}

/// What comes into a container by TCP while it takes in a transfer: the hop
/// limits, and the longest packet.
fn hop_limits_of_a_transfer(from: &Site, to: &Site, family: usize) -> Result<(Vec<u8>, usize)> {
    let tap = Tap::on_ethernet(&to.container, CONTAINER_NAME, family == 0)?;
    let is_tcp = |packet: &[u8]| transport(packet).is_some_and(|(protocol, _)| protocol == 6);
    std::thread::scope(|scope| {
        let transferred = scope.spawn(|| transfer(from, to, family, 20));
        let mut seen = std::collections::BTreeSet::new();
        let mut longest = 0;
        loop {
            let packet = tap.next_within(Duration::from_millis(50), is_tcp)?;
            match packet {
                Some(packet) => {
                    seen.extend(hop_limit(&packet));
                    longest = longest.max(packet.len());
                }
                None if transferred.is_finished() => break,
                None => {}
            }
        }
        match transferred.join() {
            Ok(result) => result.map(|()| (seen.into_iter().collect(), longest)),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

/// The hop limits with which datagrams come that were sent as one batch
/// (`UDP_SEGMENT`).
fn hop_limits_of_a_batch(from: &Site, to: &Site, family: usize) -> Result<Vec<u8>> {
    const PORT: u16 = 9876;
    let tap = Tap::on_ethernet(&to.container, CONTAINER_NAME, family == 0)?;
    let address = (inside(to.number)[family], PORT);
    let socket = probe(&from.container, address, 64)?;
    tried("connect", socket.connect(address))?;
    let mut seen = std::collections::BTreeSet::new();
    wait_until("a batch arrives", || {
        // Refused, since nobody listens.
        let _ = send_batch(&socket, &vec![vec![7; 1000]; 40]);
        let is_it = |packet: &[u8]| is_udp_to(packet, PORT);
        while let Some(packet) = tap.next_within(Duration::from_millis(50), is_it)? {
            seen.extend(hop_limit(&packet));
        }
        Ok(!seen.is_empty())
    })?;
    Ok(seen.into_iter().collect())
}

/// With `--hop` each crossing costs one, on the way out and only there, of
/// GSO packets as of any other; without it none.
#[testbed::trial(each_engine)]
fn a_tunnel_that_is_a_hop() -> Result<()> {
    let network = sites(2)?;
    let all = &network.all;
    for (hops, expected) in [
        ([false, false], [62, 62]),
        ([true, false], [61, 62]),
        ([true, true], [61, 61]),
    ] {
        let mut tunnels = Vec::new();
        for (site, hop) in all.iter().zip(hops) {
            let flags: &[&str] = if hop { &["--hop"] } else { &[] };
            tunnels.push(site.start(&[peer(3 - site.number)], flags)?);
        }
        wait_for_each_other(&all[0], &all[1])?;
        for (from, to, expected) in [(0, 1, expected[0]), (1, 0, expected[1])] {
            for family in [0, 1] {
                let one = hop_limit_between(&all[from], &all[to], family)?;
                check(one == expected, || {
                    format!("{hops:?}: a datagram came with {one}, not {expected}")
                })?;
                let (all_seen, longest) = hop_limits_of_a_transfer(&all[from], &all[to], family)?;
                check(all_seen == [expected], || {
                    format!("{hops:?}: TCP came with {all_seen:?}, not {expected}")
                })?;
                check(longest > 3000, || {
                    format!("no GSO packet: {longest} bytes at most")
                })?;
                let seen = hop_limits_of_a_batch(&all[from], &all[to], family)?;
                check(seen == [expected], || {
                    format!("{hops:?}: a UDP batch came with {seen:?}, not {expected}")
                })?;
            }
        }
        for tunnel in tunnels {
            all_went_well(&stop(tunnel)?)?;
        }
    }
    Ok(())
}

/// A trace shows the tunnel where it is a hop, by the tunnel's address.
#[testbed::trial(each_engine)]
fn a_trace_through_hops() -> Result<()> {
    let network = sites(2)?;
    let [a, b] = &network.all[..] else {
        return Err(Error::new("two sites"));
    };
    for hop in [true, false] {
        let flags: &[&str] = if hop { &["--hop"] } else { &[] };
        let tunnels = full_mesh(&network.all, flags)?;
        wait_for_each_other(a, b)?;
        for family in [0, 1] {
            let (near, far) = (router(1)[family], tunnel(2)[family]);
            let to = inside(2)[family];
            let mut expected = vec![near, far, to];
            if hop {
                expected.insert(1, tunnel(1)[family]);
            }
            let traced = trace(&a.container, CONTAINER_NAME, to)?;
            check(traced == expected, || {
                format!("--hop {hop}: traced {traced:?}, not {expected:?}")
            })?;
        }
        // And from the host itself, whose own address it is.
        if hop {
            for family in [0, 1] {
                let tap = match family {
                    0 => Tap::on_tunnel(&a.host)?,
                    _ => Tap::on_tunnel_v6(&a.host)?,
                };
                let error = error_about(&a.host, &tap, (inside(2)[family], 33_434), 1)?;
                check(
                    error.kind == TIME_EXCEEDED[family]
                        && error.from == tunnel(1)[family]
                        && error.to == tunnel(1)[family],
                    || format!("{error:?}"),
                )?;
            }
        }
        let mut ended = tunnels.into_iter().map(stop);
        let first = ended.next().transpose()?;
        ended.try_for_each(|end| end.map(drop))?;
        let counted = first.map_or(0, |first| first.dropped("ttl"));
        check(hop == (counted > 0), || {
            format!("--hop {hop}: {counted} counted")
        })?;
    }
    Ok(())
}

/// One less of whatever there was, every other bit as it was, and checksums that
/// are right; of 1 and of 0 nothing.
#[testbed::trial(each_engine)]
fn hop_limits_of_all_values() -> Result<()> {
    let network = sites(2)?;
    let [a, b] = &network.all[..] else {
        return Err(Error::new("two sites"));
    };
    let tunnels = full_mesh(&network.all, &["--hop", "--queues", "1"])?;
    wait_for_each_other(a, b)?;
    for family in [0, 1] {
        let taps = match family {
            0 => [Tap::on_tunnel(&a.host)?, Tap::on_tunnel(&b.host)?],
            _ => [Tap::on_tunnel_v6(&a.host)?, Tap::on_tunnel_v6(&b.host)?],
        };
        let [into, out] = taps;
        // Nobody's, so that no kernel has a say, but behind the two.
        let make = |hops: u8, number: u16| match (inside(1)[family], inside(2)[family]) {
            (IpAddr::V4(from), IpAddr::V4(_)) => {
                let to = Ipv4Addr::new(172, 18, 2, 77);
                let mut header = V4::new(from, to, 253);
                header.ttl = hops;
                header.id = number.wrapping_mul(251);
                header.tos = number as u8;
                header.packet(&number.to_be_bytes())
            }
            (IpAddr::V6(from), IpAddr::V6(to)) => {
                let mut header = V6::new(from, to, 253);
                header.hop_limit = hops;
                header.packet(&number.to_be_bytes())
            }
            _ => Vec::new(),
        };
        let is_ours = |packet: &[u8]| transport(packet).is_some_and(|(kind, _)| kind == 253);
        for hops in [0, 1] {
            for number in 0..20 {
                into.inject(&make(hops, number))?;
            }
        }
        // Many sums per hop limit, so that every carry occurs.
        for number in 0..2550 {
            let hops = (number % 254 + 2) as u8;
            let sent = make(hops, number);
            let expected = make(hops - 1, number);
            let mut attempts = 0;
            without_backlog_drops(|| {
                attempts += 1;
                into.inject(&sent)?;
                let arrived = out.next(is_ours)?;
                // One sent twice may come twice.
                check(arrived == expected || attempts > 1, || {
                    format!("hop limit {hops}: arrived {arrived:x?}, not {expected:x?}")
                })
            })?;
        }
    }
    for tunnel in tunnels {
        let ended = stop(tunnel)?;
        check(ended.dropped("sender-unknown") == 0, || ended.log)?;
    }
    Ok(())
}
