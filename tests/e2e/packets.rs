//! Packets as they are: sockets that see and send what crosses a device, a TUN
//! device without offloads, and packets made by hand.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::{Duration, Instant};

use fastvpn::error::{Error, Result};
use ipnet::IpNet;
use nix::sys::socket::setsockopt;
use nix::{setsockopt_impl, sockopt_impl};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};
use testbed::Namespace;
use tun_rs::{DeviceBuilder, SyncDevice};

use crate::support::{PATIENCE, enlarge_receive_buffer, fail, link};

/// Name of fastvpn's device.
pub const TUNNEL_NAME: &str = "fastvpn0";

/// Longest packet, and room to see one that has grown.
pub const BUFFER_BYTES: usize = 65_600;

/// How long a packet may take; see `datagrams::ARRIVAL_MAX`.
const ARRIVAL_MAX: Duration = Duration::from_secs(30);

/// A packet socket on a device (`packet(7)`): it sees the IP packets that come
/// out of the device into the host, and what it sends goes into the device,
/// both without a change.
pub struct Tap(Socket);

impl Tap {
    /// A tap for IPv4 on fastvpn's device.
    pub fn on_tunnel(namespace: &Namespace) -> Result<Self> {
        Self::open(namespace, TUNNEL_NAME, libc::ETH_P_IP)
    }

    /// A tap for IPv6 on fastvpn's device.
    pub fn on_tunnel_v6(namespace: &Namespace) -> Result<Self> {
        Self::open(namespace, TUNNEL_NAME, libc::ETH_P_IPV6)
    }

    /// A tap whose packets have a virtio-net header, so that they can be
    /// GSO packets.
    pub fn with_offloads(namespace: &Namespace, is_v4: bool) -> Result<Self> {
        let tap = match is_v4 {
            true => Self::on_tunnel(namespace)?,
            false => Self::on_tunnel_v6(namespace)?,
        };
        setsockopt(&tap.0, VnetHeader, &true)
            .map_err(|errno| Error::os("no PACKET_VNET_HDR", errno.into()))?;
        Ok(tap)
    }

    /// A tap on an Ethernet device, which leaves out the link header: it sees
    /// the IPv4 or IPv6 packets that come out of the device.
    pub fn on_ethernet(namespace: &Namespace, device: &str, is_v4: bool) -> Result<Self> {
        let protocol = if is_v4 {
            libc::ETH_P_IP
        } else {
            libc::ETH_P_IPV6
        };
        Self::open_as(Type::DGRAM, namespace, device, protocol)
    }

    fn open(namespace: &Namespace, device: &str, protocol: libc::c_int) -> Result<Self> {
        Self::open_as(Type::RAW, namespace, device, protocol)
    }

    fn open_as(
        kind: Type,
        namespace: &Namespace,
        device: &str,
        protocol: libc::c_int,
    ) -> Result<Self> {
        let index = wait_until_up(namespace, device)?;
        let open = || {
            // Protocol 0: nothing arrives before it is bound to the device. A TUN
            // has no link header, so the raw kind of socket shows IP packets.
            let socket = Socket::new(Domain::PACKET, kind, Some(Protocol::from(0)))?;
            socket.bind(&link_address(index, protocol)?)?;
            socket.set_read_timeout(Some(ARRIVAL_MAX))?;
            // Without CAP_NET_ADMIN over the machine: as much as there is.
            enlarge_receive_buffer(&socket, 4 << 20);
            Ok(Self(socket))
        };
        namespace
            .run(open)
            .map_err(|cause| Error::os(format!("no packet socket on {device}"), cause))
    }

    /// Sends a packet into the device.
    pub fn inject(&self, packet: &[u8]) -> Result<()> {
        let sent = self.0.send(packet);
        sent.map_err(|cause| Error::os(format!("cannot inject {} bytes", packet.len()), cause))?;
        Ok(())
    }

    /// The next packet out of the device that is `wanted`, if one comes in time.
    pub fn next_within(
        &self,
        time: Duration,
        wanted: impl Fn(&[u8]) -> bool,
    ) -> Result<Option<Vec<u8>>> {
        use std::io::{ErrorKind, Read};
        let failed = |cause| Error::os("cannot read from a packet socket", cause);
        let mut buffer = vec![0; BUFFER_BYTES];
        let deadline = Instant::now() + time;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            // Zero would mean forever.
            let left = left.max(Duration::from_millis(1));
            self.0.set_read_timeout(Some(left)).map_err(failed)?;
            match (&self.0).read(&mut buffer) {
                Ok(length) if wanted(&buffer[..length]) => {
                    buffer.truncate(length);
                    return Ok(Some(buffer));
                }
                Ok(_) => {}
                Err(cause) if cause.kind() != ErrorKind::WouldBlock => return Err(failed(cause)),
                Err(_) if Instant::now() >= deadline => return Ok(None),
                Err(_) => {}
            }
        }
    }

    /// The next packet out of the device that is `wanted`.
    pub fn next(&self, wanted: impl Fn(&[u8]) -> bool) -> Result<Vec<u8>> {
        use std::io::Read;
        let mut buffer = vec![0; BUFFER_BYTES];
        let deadline = Instant::now() + ARRIVAL_MAX;
        while Instant::now() < deadline {
            let length = (&self.0)
                .read(&mut buffer)
                .map_err(|cause| Error::os("no packet came", cause))?;
            if wanted(&buffer[..length]) {
                buffer.truncate(length);
                return Ok(buffer);
            }
        }
        fail("only other packets came")
    }
}

/// `linux/if_packet.h`.
const PACKET_VNET_HDR: libc::c_int = 15;

sockopt_impl!(VnetHeader, SetOnly, libc::SOL_PACKET, PACKET_VNET_HDR, bool);

fn link_address(index: u32, protocol: libc::c_int) -> std::io::Result<SockAddr> {
    // SAFETY: the storage is zeroed, larger than a sockaddr_ll and aligned for
    // any address; what is left zero is not looked at by bind.
    let ((), address) = unsafe {
        SockAddr::try_init(|storage, length| {
            let link = &mut *storage.cast::<libc::sockaddr_ll>();
            link.sll_family = libc::AF_PACKET as u16;
            link.sll_protocol = (protocol as u16).to_be();
            link.sll_ifindex = index as i32;
            *length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
            Ok(())
        })?
    };
    Ok(address)
}

/// Waits until a device is there and up; returns its index.
pub fn wait_until_up(namespace: &Namespace, device: &str) -> Result<u32> {
    let deadline = Instant::now() + PATIENCE;
    while Instant::now() < deadline {
        if let Ok(link) = link(namespace, device)
            && link.up
        {
            return Ok(link.index);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    fail(format!("{device} did not come up"))
}

/// A TUN device without any offload: a read is a packet, and so is a write.
/// Up, with addresses; reads and writes do not wait.
pub fn plain_tun(
    namespace: &Namespace,
    name: &str,
    addresses: &[IpNet],
    mtu_bytes: u32,
) -> Result<SyncDevice> {
    let build = || {
        let device = DeviceBuilder::new().name(name).enable(false).build_sync()?;
        device.set_nonblocking(true)?;
        Ok(device)
    };
    let device = namespace
        .run(build)
        .map_err(|cause| Error::os(format!("cannot make the TUN device {name}"), cause))?;
    let mut netlink = namespace.netlink()?;
    let index = netlink.link_index(name)?;
    let index = index.ok_or_else(|| Error::new(format!("{name} has vanished")))?;
    netlink.set_txqueuelen(index, 5000)?;
    netlink.set_mtu(index, mtu_bytes)?;
    netlink.set_up(index)?;
    for address in addresses {
        netlink.add_address(index, *address)?;
    }
    Ok(device)
}

/// The fields of an IPv4 header that tests vary (RFC 791).
#[derive(Clone)]
pub struct V4 {
    /// Type of service: DSCP and ECN.
    pub tos: u8,
    /// Identification.
    pub id: u16,
    /// Flags and fragment offset.
    pub fragment: u16,
    /// Time to live.
    pub ttl: u8,
    /// Protocol of the payload.
    pub protocol: u8,
    /// Options, a multiple of 4 bytes.
    pub options: Vec<u8>,
    /// Source.
    pub source: Ipv4Addr,
    /// Destination.
    pub destination: Ipv4Addr,
}

impl V4 {
    /// A plain header.
    pub fn new(source: Ipv4Addr, destination: Ipv4Addr, protocol: u8) -> Self {
        Self {
            tos: 0,
            id: 0,
            fragment: 0,
            ttl: 64,
            protocol,
            options: Vec::new(),
            source,
            destination,
        }
    }

    /// The packet with this header and payload.
    pub fn packet(&self, payload: &[u8]) -> Vec<u8> {
        let header_bytes = 20 + self.options.len();
        let mut packet = vec![0x40 | (header_bytes / 4) as u8, self.tos];
        packet.extend(((header_bytes + payload.len()) as u16).to_be_bytes());
        packet.extend(self.id.to_be_bytes());
        packet.extend(self.fragment.to_be_bytes());
        packet.extend([self.ttl, self.protocol, 0, 0]);
        packet.extend(self.source.octets());
        packet.extend(self.destination.octets());
        packet.extend(&self.options);
        let sum = checksum(&packet);
        packet[10..12].copy_from_slice(&sum);
        packet.extend(payload);
        packet
    }

    /// The addresses and protocol as transport checksums cover them.
    pub fn pseudo(&self) -> Vec<u8> {
        let addresses = [self.source.octets(), self.destination.octets()];
        let mut pseudo = addresses.concat();
        pseudo.extend([0, self.protocol]);
        pseudo
    }
}

/// The fields of an IPv6 header that tests vary (RFC 8200).
#[derive(Clone)]
pub struct V6 {
    /// Traffic class and flow label: the low 28 bits of the first word.
    pub class_and_label: u32,
    /// Type of the payload's first header.
    pub next_header: u8,
    /// Hop limit.
    pub hop_limit: u8,
    /// Source.
    pub source: Ipv6Addr,
    /// Destination.
    pub destination: Ipv6Addr,
}

impl V6 {
    /// A plain header.
    pub fn new(source: Ipv6Addr, destination: Ipv6Addr, next_header: u8) -> Self {
        Self {
            class_and_label: 0,
            next_header,
            hop_limit: 64,
            source,
            destination,
        }
    }

    /// The packet with this header and payload.
    pub fn packet(&self, payload: &[u8]) -> Vec<u8> {
        let mut packet = (0x6000_0000 | self.class_and_label).to_be_bytes().to_vec();
        packet.extend((payload.len() as u16).to_be_bytes());
        packet.extend([self.next_header, self.hop_limit]);
        packet.extend(self.source.octets());
        packet.extend(self.destination.octets());
        packet.extend(payload);
        packet
    }

    /// The addresses and protocol as transport checksums cover them.
    pub fn pseudo(&self, protocol: u8) -> Vec<u8> {
        let addresses = [self.source.octets(), self.destination.octets()];
        let mut pseudo = addresses.concat();
        pseudo.extend([0, protocol]);
        pseudo
    }
}

/// A UDP datagram with its checksum (RFC 768); `pseudo` without the length.
pub fn udp(ports: [u16; 2], pseudo: &[u8], payload: &[u8]) -> Vec<u8> {
    let length = ((8 + payload.len()) as u16).to_be_bytes();
    let mut datagram = [ports[0].to_be_bytes(), ports[1].to_be_bytes()].concat();
    datagram.extend(length);
    datagram.extend([0, 0]);
    datagram.extend(payload);
    let mut sum = checksum(&[pseudo, &length, &datagram].concat());
    if sum == [0, 0] {
        sum = [0xff, 0xff];
    }
    datagram[6..8].copy_from_slice(&sum);
    datagram
}

/// The fields of a TCP header that tests vary (RFC 9293).
#[derive(Clone)]
pub struct Tcp {
    /// Source and destination port.
    pub ports: [u16; 2],
    /// Sequence number.
    pub sequence: u32,
    /// Acknowledgment number.
    pub ack: u32,
    /// Flags.
    pub flags: u8,
    /// Options, a multiple of 4 bytes.
    pub options: Vec<u8>,
}

impl Tcp {
    /// The segment with its checksum; `pseudo` without the length.
    pub fn segment(&self, pseudo: &[u8], payload: &[u8]) -> Vec<u8> {
        let header_bytes = 20 + self.options.len();
        let mut segment = [self.ports[0].to_be_bytes(), self.ports[1].to_be_bytes()].concat();
        segment.extend(self.sequence.to_be_bytes());
        segment.extend(self.ack.to_be_bytes());
        segment.extend([(header_bytes * 4) as u8, self.flags]);
        segment.extend([0x40, 0, 0, 0, 0, 0]);
        segment.extend(&self.options);
        segment.extend(payload);
        let length = (segment.len() as u16).to_be_bytes();
        let sum = checksum(&[pseudo, &length, &segment].concat());
        segment[16..18].copy_from_slice(&sum);
        segment
    }
}

/// The Internet checksum (RFC 1071), the plain way.
pub fn checksum(bytes: &[u8]) -> [u8; 2] {
    let mut sum = 0u32;
    for pair in bytes.chunks(2) {
        sum += u32::from(pair[0]) << 8 | pair.get(1).map_or(0, |&low| u32::from(low));
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!(sum as u16)).to_be_bytes()
}

/// Source address of a packet, `None` if it is none.
pub fn source(packet: &[u8]) -> Option<IpAddr> {
    match packet.first()? >> 4 {
        4 => Some(<[u8; 4]>::try_from(packet.get(12..16)?).ok()?.into()),
        6 => Some(<[u8; 16]>::try_from(packet.get(8..24)?).ok()?.into()),
        _ => None,
    }
}

/// Destination address of a packet, `None` if it is none.
pub fn destination(packet: &[u8]) -> Option<IpAddr> {
    match packet.first()? >> 4 {
        4 => Some(<[u8; 4]>::try_from(packet.get(16..20)?).ok()?.into()),
        6 => Some(<[u8; 16]>::try_from(packet.get(24..40)?).ok()?.into()),
        _ => None,
    }
}

/// A UDP packet between addresses of one family, made by hand.
pub fn udp_packet(source: IpAddr, destination: IpAddr, ports: [u16; 2], payload: &[u8]) -> Vec<u8> {
    match (source, destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            let header = V4::new(source, destination, 17);
            header.packet(&udp(ports, &header.pseudo(), payload))
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            let header = V6::new(source, destination, 17);
            header.packet(&udp(ports, &header.pseudo(17), payload))
        }
        _ => Vec::new(),
    }
}

/// Hop limit of a packet.
pub fn hop_limit(packet: &[u8]) -> Option<u8> {
    match packet.first()? >> 4 {
        4 => packet.get(8).copied(),
        6 => packet.get(7).copied(),
        _ => None,
    }
}

/// Transport protocol and payload of a packet without options or extensions.
pub fn transport(packet: &[u8]) -> Option<(u8, &[u8])> {
    match packet.first()? {
        0x45 => Some((*packet.get(9)?, packet.get(20..)?)),
        first if first >> 4 == 6 => Some((*packet.get(6)?, packet.get(40..)?)),
        _ => None,
    }
}

/// Whether this is a UDP packet to `port`.
pub fn is_udp_to(packet: &[u8], port: u16) -> bool {
    transport(packet).is_some_and(|(protocol, payload)| {
        protocol == 17 && payload.get(2..4) == Some(&port.to_be_bytes())
    })
}
