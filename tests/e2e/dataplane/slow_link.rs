//! A link that takes less than is sent: what waits takes turns, and a flow that sends too much
//! is told so. What the network says of congestion reaches those whom it concerns.

use std::net::{IpAddr, UdpSocket};
use std::thread;
use std::time::Duration;

use fastvpn::error::{Error, Result};
use socket2::SockRef;
use testbed::UNDERLAY_NAME;
use testbed::traffic::ping;

use crate::datagrams::{Order, exchange};
use crate::operator::Operator;
use crate::packets::{TUNNEL_NAME, Tap, V4, source, udp as udp_payload, wait_until_up};
use crate::site::{Sites, inside, peer, sites, tunnel, underlay};
use crate::support::{Tunnel, bulk, check, fail, stop, tried, udp, wait_for, wait_until};
use crate::tools::slow_down;

/// 10 Mbit/s, in bytes per second.
const SLOW: u32 = 1_250_000;

/// ECN-capable, and congestion experienced (RFC 3168, section 5).
const ECT0: u8 = 2;
const CE: u8 = 3;

/// Two sites with a tunnel between them, behind a slow link at the first.
fn slow_sites(operator: &Operator, flags: &[&str]) -> Result<(Sites, [Tunnel; 2])> {
    let network = sites(2)?;
    let [near, far] = &network.all[..] else {
        return fail("two sites");
    };
    let socket = operator.socket_text();
    let flags = [&["--control", &socket][..], flags].concat();
    let tunnels = [near.start(&[peer(2)], &flags)?, far.start(&[peer(1)], &[])?];
    operator.wait()?;
    wait_for(&near.container, inside(2)[0])?;
    slow_down(&near.host, UNDERLAY_NAME, SLOW)?;
    Ok((network, tunnels))
}

fn stop_both([near, far]: [Tunnel; 2]) -> Result<()> {
    stop(near)?;
    stop(far).map(drop)
}

/// Streams that fill the link, and datagrams beside them.
fn streams_and_datagrams(flags: &[&str], in_force: [&str; 2]) -> Result<()> {
    let operator = Operator::new()?;
    let (network, tunnels) = slow_sites(&operator, flags)?;
    let [near, far] = &network.all[..] else {
        return fail("two sites");
    };
    let [from, to] = [
        (&near.container, inside(1)[0]),
        (&far.container, inside(2)[0]),
    ];
    thread::scope(|scope| {
        let streams: Vec<_> = (0..4)
            .map(|_| scope.spawn(|| bulk(from.0, to.0, to.1, 1)))
            .collect();
        wait_until(
            "packets wait",
            || Ok(operator.counter("queue_packets")? > 0),
        )?;
        exchange(from, to, &[100; 200], Order::Kept)?;
        streams.into_iter().try_for_each(|stream| {
            let result = stream.join();
            result.unwrap_or_else(|_| fail("a stream has panicked"))
        })
    })?;
    let status = operator.ask("status")?;
    let told = ["aqm", "queue_limit"].map(|name| status[name].as_str());
    check(told == in_force.map(Some), || format!("{told:?}"))?;
    // Nothing was lost for lack of room in the socket.
    let full = operator.dropped("send-full")?;
    check(full == 0, || format!("{full} packets were lost"))?;
    wait_until("nothing waits any more", || {
        Ok(operator.counter("queue_backlog_bytes")? == 0)
    })?;
    check(operator.counter("queue_sojourn_ns")? > 0, || {
        "packets have waited for no time".into()
    })?;
    // More than a batch, and nothing else that would wake the worker.
    ping(from.0, to.1, 6000, Duration::from_secs(60))?;
    stop_both(tunnels)
}

#[testbed::trial(each_engine)]
fn a_slow_link_carries_all_that_is_sent() -> Result<()> {
    streams_and_datagrams(&[], ["fq_codel", "auto"])
}

#[testbed::trial(each_engine)]
fn a_slow_link_without_aqm_carries_all_that_is_sent() -> Result<()> {
    streams_and_datagrams(
        &["--aqm", "off", "--queue-limit", "20000"],
        ["off", "20000"],
    )
}

/// A datagram, and the TOS that its receiver sees.
fn receive_tos(socket: &UdpSocket, buffer: &mut [u8]) -> Result<(usize, u8)> {
    use std::io::IoSliceMut;
    use std::os::fd::AsRawFd;

    use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
    let mut space = nix::cmsg_space!(u8);
    let mut slices = [IoSliceMut::new(buffer)];
    let message = recvmsg::<()>(
        socket.as_raw_fd(),
        &mut slices,
        Some(&mut space),
        MsgFlags::empty(),
    );
    let message = tried("receive", message.map_err(Into::into))?;
    let mut messages = tried("read control messages", message.cmsgs().map_err(Into::into))?;
    let tos = messages.find_map(|message| match message {
        ControlMessageOwned::Ipv4Tos(tos) => Some(tos),
        _ => None,
    });
    let tos = tos.ok_or_else(|| Error::new("no TOS"))?;
    Ok((message.bytes, tos))
}

/// A flow that sends too much and takes part in ECN hears of it, and loses nothing to
/// the queue.
#[testbed::trial(each_engine)]
fn a_flow_that_takes_part_in_ecn_is_marked() -> Result<()> {
    let operator = Operator::new()?;
    let (network, tunnels) = slow_sites(&operator, &[])?;
    let [near, far] = &network.all[..] else {
        return fail("two sites");
    };
    let sender = udp(&near.container, inside(1)[0], 0)?;
    let receiver = udp(&far.container, inside(2)[0], 9)?;
    tried("set TOS", SockRef::from(&sender).set_tos_v4(ECT0.into()))?;
    tried(
        "ask for TOS",
        SockRef::from(&receiver).set_recv_tos_v4(true),
    )?;
    tried("do not wait", receiver.set_nonblocking(true))?;
    let mut buffer = [0; 2000];
    wait_until("a marked packet arrives", || {
        for _ in 0..20 {
            tried("send", sender.send_to(&[7; 1400], (inside(2)[0], 9)))?;
        }
        let mut is_marked = false;
        while let Ok((bytes, tos)) = receive_tos(&receiver, &mut buffer) {
            check(bytes == 1400, || format!("{bytes} bytes"))?;
            check([ECT0, CE].contains(&tos), || format!("TOS {tos:#x}"))?;
            is_marked |= tos == CE;
        }
        Ok(is_marked)
    })?;
    check(operator.counter("queue_marked")? > 0, || {
        "somebody else has marked it".into()
    })?;
    check(operator.dropped("queue-aqm")? == 0, || {
        "packets that can be marked were dropped".into()
    })?;
    stop_both(tunnels)
}

/// A packet between the tunnel addresses of two sites, with this TOS.
fn packet(from: u8, to: u8, tos: u8) -> Result<Vec<u8>> {
    let ([IpAddr::V4(from), _], [IpAddr::V4(to), _]) = (tunnel(from), tunnel(to)) else {
        return fail("IPv4 first");
    };
    let header = V4 {
        tos,
        ..V4::new(from, to, 17)
    };
    Ok(header.packet(&udp_payload([4000, 9], &header.pseudo(), b"marked?")))
}

/// The outer ECN field is that of the packet inside, and what was marked on the way
/// reaches the flow, or else is dropped (RFC 6040).
#[testbed::trial(each_engine)]
fn congestion_on_the_way_reaches_the_flow() -> Result<()> {
    let network = sites(2)?;
    let [near, far] = &network.all[..] else {
        return fail("two sites");
    };
    let operator = Operator::new()?;
    let socket = operator.socket_text();
    for (flags, dscp) in [(&[][..], 0), (&["--dscp", "inherit"], 0xb8)] {
        let flags = [&["--control", &socket][..], flags].concat();
        let tunnel = near.start(&[peer(2)], &flags)?;
        operator.wait()?;
        wait_until_up(&near.host, TUNNEL_NAME)?;
        let plain = udp(&far.host, underlay(2), 8285)?;
        tried("ask for TOS", SockRef::from(&plain).set_recv_tos_v4(true))?;
        let tap = Tap::on_tunnel(&near.host)?;
        let mut buffer = [0; 2000];

        // Out of the host.
        for ecn in 0..=3 {
            let packet = packet(1, 2, 0xb8 | ecn)?;
            tap.inject(&packet)?;
            let (bytes, tos) = loop {
                let (bytes, tos) = receive_tos(&plain, &mut buffer)?;
                if source(&buffer[..bytes]) == source(&packet) && buffer[9] == 17 {
                    break (bytes, tos);
                }
            };
            check(buffer[..bytes] == packet[..], || "it was changed".into())?;
            check(tos == dscp | ecn, || {
                format!("TOS {tos:#x} around ECN {ecn}")
            })?;
        }

        // Into it.
        let into = (underlay(1), 8285);
        let send = |outer: u8, inner: u8| -> Result<()> {
            let tos = SockRef::from(&plain).set_tos_v4(outer.into());
            tried("set TOS", tos)?;
            let packet = packet(2, 1, inner)?;
            tried("send", plain.send_to(&packet, into).map(drop))
        };
        for (outer, inner, expected) in [(CE, ECT0, CE), (CE, 1, CE), (1, ECT0, 1), (0, ECT0, ECT0)]
        {
            let sent = packet(2, 1, inner)?;
            let arrived = crate::support::without_backlog_drops(|| {
                send(outer, inner)?;
                tap.next(|arrived| source(arrived) == source(&sent))
            })?;
            check(arrived[1] == expected, || {
                format!("{inner} in {outer}: {:#x}", arrived[1])
            })?;
            check(crate::packets::checksum(&arrived[..20]) == [0, 0], || {
                format!("{inner} in {outer}: the header's checksum is wrong")
            })?;
        }
        wait_until("a packet that cannot be marked is dropped", || {
            send(CE, 0)?;
            Ok(operator.dropped("ecn")? > 0)
        })?;
        stop(tunnel)?;
    }
    Ok(())
}
