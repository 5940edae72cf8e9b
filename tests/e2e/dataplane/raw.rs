//! Protocols that a tunnel need not know: header and payload arrive as they
//! were sent, bit for bit.

use std::io::Read;
use std::mem::MaybeUninit;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use fastvpn::error::{Error, Result};
use socket2::{Domain, Protocol, Socket, Type};
use testbed::Namespace;

use crate::dataplane::traffic::directions;
use crate::packets::{BUFFER_BYTES, Tap, Tcp, V4, V6, source, udp};
use crate::support::{check, dual_stack_tunnels, hosts, noise, stop_all, without_backlog_drops};

/// GRE, ESP, IPIP, SCTP, UDP-Lite, and two for experiments. (Not AH, which an
/// IPv6 receiver of fragments takes for an extension header and parses.)
const PROTOCOLS: [u8; 7] = [47, 50, 4, 132, 136, 253, 254];

/// Programs' view: what a raw socket sends, a raw socket on the other side gets.
#[testbed::trial(each_engine)]
fn raw_sockets_of_any_protocol() -> Result<()> {
    let hosts = hosts(1500)?;
    let tunnels = dual_stack_tunnels(&hosts, [&[], &[]])?;
    for [from, to] in directions(&hosts) {
        for protocol in PROTOCOLS {
            without_backlog_drops(|| raw_exchange(from, to, protocol))?;
        }
    }
    stop_all(tunnels)?;
    Ok(())
}

fn raw_exchange(from: (&Namespace, IpAddr), to: (&Namespace, IpAddr), protocol: u8) -> Result<()> {
    let failed = |cause| Error::os(format!("raw protocol {protocol} to {}", to.1), cause);
    let open = |(namespace, address): (&Namespace, IpAddr)| {
        let address = SocketAddr::new(address, 0);
        let domain = Domain::for_address(address);
        let kind = Some(Protocol::from(i32::from(protocol)));
        let socket = namespace.run(|| Socket::new(domain, Type::RAW, kind))?;
        socket.bind(&address.into())?;
        socket.set_read_timeout(Some(Duration::from_secs(10)))?;
        Ok(socket)
    };
    let (sender, receiver) = (open(from).map_err(failed)?, open(to).map_err(failed)?);
    let is_v4 = to.1.is_ipv4();
    let (ttl, tos) = (u32::from(protocol) % 200 + 1, 0x2e << 2);
    if is_v4 {
        sender.set_ttl_v4(ttl).map_err(failed)?;
        sender.set_tos_v4(tos).map_err(failed)?;
    }
    sender
        .connect(&SocketAddr::new(to.1, 0).into())
        .map_err(failed)?;
    for bytes in [0, 1, 3, 1000, 1424, 4000] {
        let payload = noise(u64::from(protocol) << 16 | bytes, bytes as usize);
        sender.send(&payload).map_err(failed)?;
        let mut buffer = vec![0; BUFFER_BYTES];
        let length = (&receiver).read(&mut buffer).map_err(failed)?;
        // IPv4 shows the header, IPv6 does not (raw(7), RFC 3542).
        let (header, received) = buffer[..length].split_at(if is_v4 { 20 } else { 0 });
        check(received == payload, || {
            format!("{bytes} bytes of protocol {protocol} changed")
        })?;
        if is_v4 {
            check(
                u32::from(header[1]) == tos && u32::from(header[8]) == ttl,
                || {
                    format!(
                        "protocol {protocol}: TOS {:#x}, TTL {}",
                        header[1], header[8]
                    )
                },
            )?;
        }
    }
    // Nothing came twice.
    receiver.set_nonblocking(true).map_err(failed)?;
    let extra = receiver.recv(&mut [MaybeUninit::uninit(); 1]);
    check(extra.is_err(), || {
        format!("protocol {protocol}: a packet too many")
    })
}

/// The device's view: what goes into one TUN comes out of the other.
#[testbed::trial(each_engine)]
fn odd_packets_pass_unchanged() -> Result<()> {
    let hosts = hosts(1500)?;
    let tunnels = dual_stack_tunnels(&hosts, [&[], &[]])?;
    // Addresses of nobody, so that no kernel has a say.
    let v4 = [Ipv4Addr::new(10, 244, 9, 1), Ipv4Addr::new(10, 244, 9, 2)];
    let v6 = [9, 10].map(|host| Ipv6Addr::new(0xfd00, 0x244, 0, 0, 9, 0, 0, host));
    for (from, to) in [(&hosts.a, &hosts.b), (&hosts.b, &hosts.a)] {
        let taps = [
            (Tap::on_tunnel(from)?, Tap::on_tunnel(to)?, odd_v4(v4)),
            (Tap::on_tunnel_v6(from)?, Tap::on_tunnel_v6(to)?, odd_v6(v6)),
        ];
        for (into, out, packets) in &taps {
            for (what, packet) in packets {
                let sender = source(packet);
                let arrived = without_backlog_drops(|| {
                    into.inject(packet)?;
                    out.next(|arrived| source(arrived) == sender)
                })?;
                check(arrived == *packet, || {
                    format!("{what}: sent {packet:x?}, arrived {arrived:x?}")
                })?;
            }
        }
    }
    let ended = stop_all(tunnels)?;
    for end in ended {
        check(
            end.dropped("tun-malformed") + end.dropped("length") == 0,
            || end.log.clone(),
        )?;
    }
    Ok(())
}

type Named = (String, Vec<u8>);

fn odd_v4([source, destination]: [Ipv4Addr; 2]) -> Vec<Named> {
    let plain = |protocol| V4::new(source, destination, protocol);
    let mut packets: Vec<Named> = Vec::new();
    let mut add = |what: &str, packet: Vec<u8>| packets.push((format!("IPv4, {what}"), packet));
    for protocol in (0..=255).filter(|protocol| ![6, 17].contains(protocol)) {
        let mut header = plain(protocol);
        header.id = 0x1234 + u16::from(protocol);
        let payload = noise(protocol.into(), usize::from(protocol) * 5);
        add(&format!("protocol {protocol}"), header.packet(&payload));
    }
    for ttl in [1, 2, 63, 128, 255] {
        let header = V4 { ttl, ..plain(253) };
        add(&format!("TTL {ttl}"), header.packet(b"ttl"));
    }
    for tos in [1, 2, 3, 0x10, 0xb8, 0xff] {
        let header = V4 { tos, ..plain(253) };
        add(&format!("TOS {tos}"), header.packet(b"tos"));
    }
    for id in [0, 1, 0x8000, 0xffff] {
        let header = V4 { id, ..plain(253) };
        add(&format!("identification {id}"), header.packet(b"id"));
    }
    // Don't fragment, the reserved bit, and fragments whose rest never comes.
    for fragment in [0x4000, 0x8000, 0x2000, 0x2001, 0x00b8, 0x1fff] {
        for protocol in [6, 17, 253] {
            let mut header = plain(protocol);
            header.fragment = fragment;
            let payload = noise(fragment.into(), 1448);
            add(
                &format!("fragment word {fragment:#x}"),
                header.packet(&payload),
            );
        }
    }
    // No operation, record route, timestamp, router alert, one unknown.
    let options: [&[u8]; 6] = [
        &[1, 1, 1, 0],
        &[7, 7, 4, 0, 0, 0, 0, 0],
        &[68, 8, 5, 0, 0, 0, 0, 0],
        &[148, 4, 0, 0],
        &[0x9e, 4, 0xaa, 0x55],
        &[1; 40],
    ];
    for option in options {
        for protocol in [6, 17, 253] {
            let mut header = plain(protocol);
            header.options = option.to_vec();
            let payload = match protocol {
                17 => udp([5, 6], &header.pseudo(), b"options"),
                _ => noise(7, 100),
            };
            add(&format!("options {option:x?}"), header.packet(&payload));
        }
    }
    add("largest", plain(253).packet(&noise(1, 1452)));
    add("header only", plain(253).packet(&[]));
    odd_transport(&mut add, &|protocol, make| {
        let header = plain(protocol);
        header.packet(&make(&header.pseudo()))
    });
    packets
}

fn odd_v6([source, destination]: [Ipv6Addr; 2]) -> Vec<Named> {
    let plain = |next_header| V6::new(source, destination, next_header);
    let mut packets: Vec<Named> = Vec::new();
    let mut add = |what: &str, packet: Vec<u8>| packets.push((format!("IPv6, {what}"), packet));
    for next_header in (0..=255).filter(|header| ![6, 17].contains(header)) {
        let payload = noise(next_header.into(), usize::from(next_header) * 5);
        add(
            &format!("next header {next_header}"),
            plain(next_header).packet(&payload),
        );
    }
    for class_and_label in [0x0ff0_0000, 0x000f_ffff, 0x0b81_2345, 0x0010_0000] {
        let header = V6 {
            class_and_label,
            ..plain(253)
        };
        add(
            &format!("class and label {class_and_label:#x}"),
            header.packet(b"label"),
        );
    }
    for hop_limit in [0, 1, 255] {
        let header = V6 {
            hop_limit,
            ..plain(253)
        };
        add(&format!("hop limit {hop_limit}"), header.packet(b"hops"));
    }
    // Extension headers ahead of UDP: hop-by-hop and destination options
    // (padding), routing (none left), fragment (first, later, atomic).
    let extensions: [(u8, [u8; 8]); 6] = [
        (0, [17, 0, 1, 4, 0, 0, 0, 0]),
        (60, [17, 0, 1, 4, 0, 0, 0, 0]),
        (43, [17, 0, 0, 0, 0, 0, 0, 0]),
        (44, [17, 0, 0, 1, 1, 2, 3, 4]),
        (44, [17, 0, 0x05, 0xa8, 1, 2, 3, 4]),
        (44, [17, 0, 0, 0, 1, 2, 3, 4]),
    ];
    for (next_header, extension) in extensions {
        let header = plain(next_header);
        let datagram = udp([5, 6], &header.pseudo(17), &noise(3, 200));
        let packet = header.packet(&[&extension[..], &datagram].concat());
        add(&format!("extension {next_header}: {extension:x?}"), packet);
    }
    add("largest", plain(253).packet(&noise(1, 1432)));
    add("header only", plain(59).packet(&[]));
    odd_transport(&mut add, &|protocol, make| {
        plain(protocol).packet(&make(&plain(protocol).pseudo(protocol)))
    });
    packets
}

/// Makes a transport packet for a pseudo-header.
type Make<'a> = &'a dyn Fn(&[u8]) -> Vec<u8>;

/// TCP and UDP as nobody should send them.
fn odd_transport(add: &mut impl FnMut(&str, Vec<u8>), packet: &dyn Fn(u8, Make<'_>) -> Vec<u8>) {
    let with = |at: usize, value: u8| {
        move |mut bytes: Vec<u8>| {
            bytes[at] = value;
            bytes
        }
    };
    let datagram = |pseudo: &[u8]| udp([5, 6], pseudo, &noise(11, 300));
    add("UDP", packet(17, &datagram));
    for (what, at, value) in [
        ("checksum wrong", 6, 0x11),
        ("length too long", 4, 0x20),
        ("length too short", 5, 0x08),
        ("changed payload", 200, 0x77),
    ] {
        add(
            &format!("UDP, {what}"),
            packet(17, &|pseudo| with(at, value)(datagram(pseudo))),
        );
    }
    let no_checksum = |pseudo: &[u8]| with(7, 0)(with(6, 0)(datagram(pseudo)));
    add("UDP, no checksum", packet(17, &no_checksum));
    for bytes in [0, 1, 4, 7, 8, 19, 20] {
        let cut = |pseudo: &[u8]| datagram(pseudo)[..bytes].to_vec();
        add(&format!("UDP, {bytes} bytes"), packet(17, &cut));
        add(&format!("TCP, {bytes} bytes"), packet(6, &cut));
    }
    let plain = Tcp {
        ports: [7, 8],
        sequence: 0xffff_ff00,
        ack: 5,
        flags: 0x10,
        options: vec![],
    };
    let segment = |pseudo: &[u8]| plain.segment(pseudo, &noise(12, 500));
    add("TCP", packet(6, &segment));
    for (what, at, value) in [
        ("checksum wrong", 16, 0x11),
        ("data offset 0", 12, 0x00),
        ("data offset 4", 12, 0x40),
        ("data offset beyond the end", 12, 0xf0),
        ("reserved bits", 12, 0x5f),
        ("urgent pointer", 19, 0x09),
        ("changed payload", 300, 0x77),
    ] {
        add(
            &format!("TCP, {what}"),
            packet(6, &|pseudo| with(at, value)(segment(pseudo))),
        );
    }
    for flags in 0..=255 {
        let header = Tcp {
            flags,
            ..plain.clone()
        };
        let segment = |pseudo: &[u8]| header.segment(pseudo, &noise(flags.into(), 33));
        add(&format!("TCP, flags {flags:#x}"), packet(6, &segment));
    }
    let many = Tcp {
        options: [[1, 3, 3, 7], [8, 10, 0, 0], [0, 1, 0, 0], [0, 9, 1, 0]].concat(),
        ..plain
    };
    add(
        "TCP, options",
        packet(6, &|pseudo| many.segment(pseudo, &noise(13, 700))),
    );
}
