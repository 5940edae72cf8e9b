//! What a person, or a filter, sees of a packet: addresses, protocol, ports.

use std::fmt;
use std::net::IpAddr;

use etherparse::{IpNumber, LaxNetSlice, LaxSlicedPacket, TcpSlice, TransportSlice};

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct View<'a> {
    pub(super) source: IpAddr,
    pub(super) destination: IpAddr,
    /// Behind IPv6's extension headers, if there are any.
    protocol: IpNumber,
    is_fragment: bool,
    /// None of a fragment, and of one that is cut too short.
    transport: Option<TransportSlice<'a>>,
}

impl<'a> View<'a> {
    /// Reads a packet, which may be cut short; `None` if it is none of IP.
    pub(super) fn of(packet: &'a [u8]) -> Option<Self> {
        let sliced = LaxSlicedPacket::from_ip(packet).ok()?;
        let net = sliced.net?;
        let (source, destination) = match &net {
            LaxNetSlice::Ipv4(ip) => (
                ip.header().source_addr().into(),
                ip.header().destination_addr().into(),
            ),
            LaxNetSlice::Ipv6(ip) => (
                ip.header().source_addr().into(),
                ip.header().destination_addr().into(),
            ),
            LaxNetSlice::Arp(_) => return None,
        };
        let payload = net.ip_payload_ref()?;
        Some(Self {
            source,
            destination,
            protocol: payload.ip_number,
            is_fragment: payload.fragmented,
            transport: sliced.transport,
        })
    }

    pub(super) fn is_tcp(&self) -> bool {
        self.protocol == IpNumber::TCP
    }

    pub(super) fn is_udp(&self) -> bool {
        self.protocol == IpNumber::UDP
    }

    pub(super) fn is_icmp(&self) -> bool {
        self.protocol == IpNumber::ICMP
    }

    pub(super) fn is_icmp6(&self) -> bool {
        self.protocol == IpNumber::IPV6_ICMP
    }

    /// Source and destination port of TCP and UDP.
    pub(super) fn ports(&self) -> Option<[u16; 2]> {
        match &self.transport {
            Some(TransportSlice::Tcp(tcp)) => Some([tcp.source_port(), tcp.destination_port()]),
            Some(TransportSlice::Udp(udp)) => Some([udp.source_port(), udp.destination_port()]),
            _ => None,
        }
    }
}

/// `PROTOCOL SOURCE -> DESTINATION`, and what else its header says.
impl fmt::Display for View<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self.protocol {
            IpNumber::TCP => "tcp",
            IpNumber::UDP => "udp",
            IpNumber::ICMP => "icmp",
            IpNumber::IPV6_ICMP => "icmp6",
            IpNumber(number) => {
                write!(f, "protocol {number} ")?;
                ""
            }
        };
        if !name.is_empty() {
            write!(f, "{name} ")?;
        }
        match self.ports() {
            Some([source, destination]) => {
                let source = std::net::SocketAddr::new(self.source, source);
                let destination = std::net::SocketAddr::new(self.destination, destination);
                write!(f, "{source} -> {destination}")?;
            }
            None => write!(f, "{} -> {}", self.source, self.destination)?,
        }
        match &self.transport {
            Some(TransportSlice::Tcp(tcp)) => write!(f, " [{}]", flags(tcp))?,
            Some(TransportSlice::Icmpv4(icmp)) => {
                write!(f, " type {} code {}", icmp.type_u8(), icmp.code_u8())?;
            }
            Some(TransportSlice::Icmpv6(icmp)) => {
                write!(f, " type {} code {}", icmp.type_u8(), icmp.code_u8())?;
            }
            _ if self.is_fragment => write!(f, " fragment")?,
            _ => {}
        }
        Ok(())
    }
}

/// TCP's flags, as tcpdump writes them.
fn flags(tcp: &TcpSlice<'_>) -> String {
    let all = [
        (tcp.syn(), 'S'),
        (tcp.fin(), 'F'),
        (tcp.rst(), 'R'),
        (tcp.psh(), 'P'),
        (tcp.urg(), 'U'),
        (tcp.ece(), 'E'),
        (tcp.cwr(), 'W'),
        (tcp.ack(), '.'),
    ];
    let set = all.into_iter().filter(|(is_set, _)| *is_set);
    set.map(|(_, letter)| letter).collect()
}

#[cfg(test)]
mod tests {
    use etherparse::PacketBuilder;
    use proptest::prelude::*;

    use super::*;

    fn shown(packet: &[u8]) -> Option<String> {
        View::of(packet).map(|view| view.to_string())
    }

    #[test]
    fn packets_are_shown_in_a_line() {
        let mut packet = Vec::new();
        let tcp = PacketBuilder::ipv4([10, 0, 0, 1], [10, 0, 0, 2], 64).tcp(443, 5000, 1, 9);
        tcp.syn().ack(1).write(&mut packet, &[0; 900]).unwrap();
        let line = "tcp 10.0.0.1:443 -> 10.0.0.2:5000 [S.]";
        assert_eq!(shown(&packet).as_deref(), Some(line));
        assert_eq!(shown(&packet[..128]).as_deref(), Some(line));
        let mut packet = Vec::new();
        let udp = PacketBuilder::ipv6([1; 16], [2; 16], 64).udp(53, 54);
        udp.write(&mut packet, &[0; 900]).unwrap();
        let line = shown(&packet[..128]).unwrap();
        assert!(line.starts_with("udp [101:101:"), "{line}");
        assert!(line.ends_with("]:54"), "{line}");
        let mut packet = Vec::new();
        let ping = PacketBuilder::ipv4([10, 0, 0, 1], [10, 0, 0, 2], 64);
        let ping = ping.icmpv4_echo_request(1, 2);
        ping.write(&mut packet, &[]).unwrap();
        let line = "icmp 10.0.0.1 -> 10.0.0.2 type 8 code 0";
        assert_eq!(shown(&packet).as_deref(), Some(line));
        // More fragments follow.
        packet[6] = 0x20;
        let line = "icmp 10.0.0.1 -> 10.0.0.2 fragment";
        assert_eq!(shown(&packet).as_deref(), Some(line));
        assert_eq!((shown(&[]), shown(&[0x15; 100])), (None, None));
    }

    proptest! {
        #[test]
        fn any_bytes_can_be_shown(
            first in prop::sample::select(vec![0x45_u8, 0x46, 0x4f, 0x60, 0x00, 0xff]),
            next in 0..64_u8,
            mut bytes in prop::collection::vec(any::<u8>(), 0..200),
        ) {
            for (at, byte) in [(0, first), (9, next), (6, next)] {
                if let Some(place) = bytes.get_mut(at) {
                    *place = byte;
                }
            }
            shown(&bytes);
        }
    }
}
