//! GSO packets into the near TUN: what leaves is cut as the kernel's own
//! segmentation would cut it.

use std::net::UdpSocket;
use std::time::Duration;

use fastvpn::error::{Error, Result};

use crate::packets::{BUFFER_BYTES, Tap, Tcp, V4, V6, checksum, source, udp};
use crate::script::{DESTINATION_V4, DESTINATION_V6, SOURCE_V4, SOURCE_V6};
use crate::support::{
    UNDERLAY, all_cores, check, enlarge_receive_buffer, hosts, noise, start_dual_stack, stop_all,
    tried, without_backlog_drops,
};

#[testbed::trial(each_engine)]
fn super_packets_are_cut_exactly() -> Result<()> {
    cut(&[])
}

// Then the kernel cuts some, and we send them one by one.
#[testbed::trial(each_engine)]
fn super_packets_without_tso() -> Result<()> {
    cut(&["--without", "tso"])
}

#[testbed::trial(each_engine)]
fn super_packets_without_uso() -> Result<()> {
    cut(&["--without", "uso"])
}

#[testbed::trial(each_engine)]
fn super_packets_without_udp_segment() -> Result<()> {
    cut(&["--without", "udp-segment"])
}

const ACK: u8 = 0x10;
const PSH: u8 = 0x08;
const FIN: u8 = 0x01;
const ECE: u8 = 0x40;
const CWR: u8 = 0x80;

/// `linux/virtio_net.h`.
const NEEDS_CHECKSUM: u8 = 1;
const GSO_TCP_V4: u8 = 1;
const GSO_TCP_V6: u8 = 4;
const GSO_UDP: u8 = 5;

fn cut(flags: &[&str]) -> Result<()> {
    let hosts = hosts(1500)?;
    let cores = all_cores();
    let failed = |cause| Error::os("the far end's socket", cause);
    let far = hosts
        .b
        .run(|| UdpSocket::bind((UNDERLAY[1], 8285)))
        .map_err(failed)?;
    far.set_read_timeout(Some(Duration::from_secs(10)))
        .map_err(failed)?;
    // Without CAP_NET_ADMIN over the machine: as much as there is.
    enlarge_receive_buffer(&far, 4 << 20);
    let flags = [flags, &["--queues", "1", "--cores", &cores]].concat();
    let tunnel = start_dual_stack(&hosts, 0, &flags)?;
    let mut buffer = vec![0; BUFFER_BYTES];
    for is_v4 in [true, false] {
        let tap = Tap::with_offloads(&hosts.a, is_v4)?;
        let kinds = if knows_uso()? {
            &[true, false][..]
        } else {
            &[true]
        };
        for &is_tcp in kinds {
            for (payload_bytes, total_bytes) in sizes(is_v4, is_tcp) {
                let run = Run {
                    is_v4,
                    is_tcp,
                    payload_bytes,
                    total_bytes,
                };
                let packets = run.packets();
                without_backlog_drops(|| {
                    tap.inject(&run.vnet_packet(&packets))?;
                    for (number, expected) in packets.iter().enumerate() {
                        let packet = loop {
                            let length = far.recv(&mut buffer).map_err(|cause| {
                                Error::os(format!("{run:?}: packet {number} missing"), cause)
                            })?;
                            // The host's own kernel has something to say, too.
                            if source(&buffer[..length]) == source(expected) {
                                break &buffer[..length];
                            }
                        };
                        check(packet == expected, || {
                            let headers = |packet: &[u8]| packet[..packet.len().min(80)].to_vec();
                            format!(
                                "{run:?}: packet {number} is {:x?}, should be {:x?}",
                                headers(packet),
                                headers(expected)
                            )
                        })?;
                    }
                    Ok(())
                })?;
            }
        }
    }
    let [ended] = stop_all([tunnel])?;
    check(ended.all_dropped() == ended.dropped("tun-error"), || {
        ended.log.clone()
    })
}

/// Whether this kernel's virtio-net header knows UDP GSO packets; one that does
/// not takes none from a test either.
fn knows_uso() -> Result<bool> {
    let path = "/proc/sys/kernel/osrelease";
    let release = tried("read the kernel's version", std::fs::read_to_string(path))?;
    let mut numbers = release.split('.').map_while(|number| number.parse().ok());
    Ok((numbers.next(), numbers.next()) >= (Some(6), Some(2)))
}

/// Payload of a segment and of all: two, a shorter last one, 64 and 128 and
/// one more, and as much as an IP packet takes.
fn sizes(is_v4: bool, is_tcp: bool) -> Vec<(usize, usize)> {
    let headers = if is_v4 { 20 } else { 40 } + if is_tcp { 32 } else { 8 };
    let full = 1472 - headers;
    // IPv6 does not count its own header, but the kernel has one limit.
    let most = 65_535 - headers;
    let mut sizes = vec![
        (full, full + 1),
        (full, 2 * full - 1),
        (full, 2 * full),
        (full, 20 * full + 7),
        (full, most),
        (full - 1, most),
        (1000, 44_000),
        (500, 64 * 500),
        (500, 64 * 500 + 1),
        (300, 128 * 300),
        (300, 128 * 300 - 1),
        (100, 5000),
        (16, 1000),
    ];
    if is_tcp {
        // Some kernels, such as Debian's 6.1 and 6.12, raise smaller segments to
        // 8 (`TCP_MIN_GSO_SIZE`).
        sizes.extend([(300, 128 * 300 + 1), (100, 50_000), (8, 4000)]);
    } else {
        // The kernel takes no UDP of more than 128 (`UDP_MAX_SEGMENTS`).
        sizes.push((1, 100));
    }
    sizes
}

/// Packets that make one GSO packet.
#[derive(Clone, Copy, Debug)]
struct Run {
    is_v4: bool,
    is_tcp: bool,
    /// Payload of each packet but the last.
    payload_bytes: usize,
    /// Payload of all.
    total_bytes: usize,
}

impl Run {
    /// The packets, made one by one.
    fn packets(&self) -> Vec<Vec<u8>> {
        let payload = noise(self.total_bytes as u64, self.total_bytes);
        let count = payload.len().div_ceil(self.payload_bytes);
        let pieces = payload.chunks(self.payload_bytes).enumerate();
        let packet =
            |(number, piece): (usize, &[u8])| self.packet(number, number + 1 == count, piece);
        pieces.map(packet).collect()
    }

    fn packet(&self, number: usize, is_last: bool, payload: &[u8]) -> Vec<u8> {
        let protocol = if self.is_tcp { 6 } else { 17 };
        let mut v4 = V4::new(SOURCE_V4, DESTINATION_V4, protocol);
        // Both wrap on the way.
        v4.id = 0xfff0_u16.wrapping_add(number as u16);
        v4.tos = 2;
        v4.ttl = 77;
        let mut v6 = V6::new(SOURCE_V6, DESTINATION_V6, protocol);
        v6.class_and_label = 0x0021_2345;
        let pseudo = if self.is_v4 {
            v4.pseudo()
        } else {
            v6.pseudo(protocol)
        };
        let offset = (number * self.payload_bytes) as u32;
        let tcp = Tcp {
            ports: [7, 8],
            sequence: 0xffff_f000_u32.wrapping_add(offset),
            ack: 0x0102_0304,
            // CWR on the first only, FIN and PSH on the last only.
            flags: ACK
                | ECE
                | if number == 0 { CWR } else { 0 }
                | if is_last { PSH | FIN } else { 0 },
            options: vec![1, 1, 8, 10, 0, 1, 2, 3, 4, 5, 6, 7],
        };
        let transport = match self.is_tcp {
            true => tcp.segment(&pseudo, payload),
            false => udp([7, 8], &pseudo, payload),
        };
        if self.is_v4 {
            v4.packet(&transport)
        } else {
            v6.packet(&transport)
        }
    }

    /// The GSO packet, with its virtio-net header.
    fn vnet_packet(&self, packets: &[Vec<u8>]) -> Vec<u8> {
        let ip_bytes = if self.is_v4 { 20 } else { 40 };
        let header_bytes = ip_bytes + if self.is_tcp { 32 } else { 8 };
        let mut packet = packets[0][..header_bytes].to_vec();
        for piece in packets {
            packet.extend(&piece[header_bytes..]);
        }
        let (ip, transport) = packet.split_at_mut(ip_bytes);
        let length = (transport.len() as u16).to_be_bytes();
        let (protocol, checksum_offset) = if self.is_tcp { (6, 16) } else { (17, 6) };
        let addresses = if self.is_v4 {
            ip[2..4].copy_from_slice(&((ip_bytes + transport.len()) as u16).to_be_bytes());
            ip[10..12].fill(0);
            let sum = checksum(ip);
            ip[10..12].copy_from_slice(&sum);
            &ip[12..20]
        } else {
            ip[4..6].copy_from_slice(&length);
            &ip[8..40]
        };
        if self.is_tcp {
            transport[13] |= PSH | FIN;
        } else {
            transport[4..6].copy_from_slice(&length);
        }
        // The field holds the pseudo-header's sum, not inverted.
        let sum = checksum(&[addresses, &[0, protocol], &length].concat()).map(|byte| !byte);
        transport[checksum_offset..checksum_offset + 2].copy_from_slice(&sum);

        let gso = match (self.is_tcp, self.is_v4) {
            (true, true) => GSO_TCP_V4,
            (true, false) => GSO_TCP_V6,
            (false, _) => GSO_UDP,
        };
        let mut vnet_packet = vec![NEEDS_CHECKSUM, gso];
        for field in [header_bytes, self.payload_bytes, ip_bytes, checksum_offset] {
            vnet_packet.extend((field as u16).to_ne_bytes());
        }
        vnet_packet.extend(packet);
        vnet_packet
    }
}
