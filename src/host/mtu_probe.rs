//! Asks a path itself how long its packets may be: a packet of the size in
//! question is sent, which no router may fragment, and a router without room for it
//! says so by ICMP.
//!
//! Anybody can send such ICMP. What counts here quotes the packet with its random
//! nonce, which only those on the path have seen.

use std::io::{self, IoSliceMut};
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;

use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg, setsockopt, sockopt};
use rustix::net::sockopt::{
    Ipv4PathMtuDiscovery, Ipv6PathMtuDiscovery, set_ip_mtu_discover, set_ipv6_mtu_discover,
};

use super::path::{Source, bind_toward};
use crate::packet::probe::{Kind, PROBE_BYTES_MIN, Probe};
use crate::wire::Mode;

/// Error messages read at a time: more than one packet gives, fewer than a flood.
const MESSAGES_MAX: usize = 64;

/// A path whose MTU is probed.
pub struct MtuProbe {
    socket: UdpSocket,
    peer: SocketAddr,
    mode: Mode,
    nonce: u64,
    /// Begins the last packet that was sent; its length is part of it.
    beginning: Vec<u8>,
}

impl MtuProbe {
    /// From a port that nobody knows, toward `peer`, as the tunnel's sockets send.
    /// `nonce`: a random number that nobody can guess. `mode`: of the tunnel; where packets
    /// are sealed, nothing tells a probe from noise.
    ///
    /// # Errors
    /// When there is no descriptor left, or no route to the peer.
    pub(crate) fn open(
        source: Source,
        peer: SocketAddr,
        mode: Mode,
        nonce: u64,
    ) -> io::Result<Self> {
        let socket = bind_toward(source, peer)?;
        socket.set_nonblocking(true)?;
        // Not to be fragmented, whatever the kernel believes of the path.
        match peer {
            SocketAddr::V4(_) => {
                set_ip_mtu_discover(&socket, Ipv4PathMtuDiscovery::PROBE)?;
                setsockopt(&socket, sockopt::Ipv4RecvErr, &true)?;
            }
            SocketAddr::V6(_) => {
                set_ipv6_mtu_discover(&socket, Ipv6PathMtuDiscovery::PROBE)?;
                setsockopt(&socket, sockopt::Ipv6RecvErr, &true)?;
            }
        }
        socket.connect(peer)?;
        Ok(Self {
            socket,
            peer,
            mode,
            nonce,
            beginning: Vec::new(),
        })
    }

    /// Sends an IP packet of `packet_bytes`.
    ///
    /// # Errors
    /// When the kernel does not take it, as if its interface is narrower.
    pub(crate) fn send(&mut self, packet_bytes: u32) -> io::Result<()> {
        let payload_bytes = packet_bytes.saturating_sub(Mode::Plain.overhead_bytes(self.peer.ip()));
        let packet = datagram(self.mode, self.nonce, payload_bytes as usize);
        self.beginning = packet[..PROBE_BYTES_MIN].to_vec();
        self.socket.send(&packet).map(drop)
    }

    /// The MTU of the router that had no room for the last packet, if one has said so.
    pub(crate) fn too_long_for(&self) -> Option<u32> {
        let mut quote = [0; PROBE_BYTES_MIN];
        let mut smallest = None;
        for _ in 0..MESSAGES_MAX {
            // The error, and the address that it came from.
            let mut control = nix::cmsg_space!(libc::sock_extended_err, libc::sockaddr_in6);
            let mut slices = [IoSliceMut::new(&mut quote)];
            let flags = MsgFlags::MSG_ERRQUEUE | MsgFlags::MSG_DONTWAIT;
            let fd = self.socket.as_raw_fd();
            let Ok(message) = recvmsg::<()>(fd, &mut slices, Some(&mut control), flags) else {
                break;
            };
            let reported = message
                .cmsgs()
                .ok()
                .and_then(|mut all| all.find_map(mtu_bytes));
            let length = message.bytes;
            if quote[..length] == self.beginning[..] {
                smallest = smallest.into_iter().chain(reported).min();
            }
        }
        smallest
    }
}

/// A datagram of `bytes` that those who receive it leave unanswered.
fn datagram(mode: Mode, nonce: u64, bytes: usize) -> Vec<u8> {
    if mode == Mode::Plain {
        let kind = Kind::Size;
        return Probe { kind, nonce }.to_packet(bytes);
    }
    // WireGuard's messages begin with 1 to 4. The length is part of what is quoted, as in a
    // plain probe.
    let mut datagram = vec![0; bytes.max(PROBE_BYTES_MIN)];
    let fields = [nonce.to_be_bytes(), (bytes as u64).to_be_bytes()].concat();
    datagram[8..8 + fields.len()].copy_from_slice(&fields);
    datagram
}

/// The MTU in an ICMP error that says that a packet was too long.
fn mtu_bytes(message: ControlMessageOwned) -> Option<u32> {
    let (ControlMessageOwned::Ipv4RecvErr(error, _) | ControlMessageOwned::Ipv6RecvErr(error, _)) =
        message
    else {
        return None;
    };
    let origins = [libc::SO_EE_ORIGIN_ICMP, libc::SO_EE_ORIGIN_ICMP6];
    let is_too_long = origins.contains(&error.ee_origin) && error.ee_errno == libc::EMSGSIZE as u32;
    // Routers older than RFC 1191 do not say how long it may be.
    Some(error.ee_info).filter(|bytes| is_too_long && *bytes > 0)
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;
    use std::time::{Duration, Instant};

    use socket2::{Domain, Protocol, Socket, Type};

    use super::*;
    use crate::packet::checksum::Sum;
    use crate::packet::put_be16;
    use crate::testbed::{UNDERLAY_NAME, pair};

    const FAR: &str = "10.9.9.9:8285";

    /// An ICMP message "fragmentation needed" about a datagram from this port to
    /// [`FAR`] that begins with `payload`.
    fn too_big(port: u16, mtu_bytes: u16, payload: &[u8]) -> Vec<u8> {
        let mut quote = vec![];
        etherparse::PacketBuilder::ipv4([10, 1, 0, 1], [10, 9, 9, 9], 64)
            .udp(port, 8285)
            .write(&mut quote, payload)
            .unwrap();
        let mut message = vec![3, 4, 0, 0, 0, 0, 0, 0];
        put_be16(&mut message, 6, mtu_bytes);
        message.extend(quote);
        let sum = Sum::ZERO.add_bytes(&message).checksum();
        message[2..4].copy_from_slice(&sum);
        message
    }

    #[test]
    fn an_icmp_message_is_believed_only_if_it_quotes_the_packet() {
        for mode in [Mode::Plain, Mode::WireGuard] {
            is_believed_only_if_it_quotes(mode);
        }
    }

    fn is_believed_only_if_it_quotes(mode: Mode) {
        let nets = ["10.1.0.1/24", "10.1.0.2/24"].map(|net| net.parse().unwrap());
        let hosts = pair(&[(nets[0], nets[1])], 1500).unwrap();
        let mut netlink = hosts.a.netlink().unwrap();
        let index = netlink.link_index(UNDERLAY_NAME).unwrap();
        let router = Some(nets[1].addr());
        netlink
            .add_route("10.9.0.0/16".parse().unwrap(), router, index)
            .unwrap();
        let any = Source::unmarked(Ipv4Addr::UNSPECIFIED.into());
        let open = || MtuProbe::open(any, FAR.parse().unwrap(), mode, 0x0123_4567_89ab_cdef);
        let mut probe = hosts.a.run(open).unwrap();
        probe.send(1500).unwrap();
        assert_eq!(probe.too_long_for(), None);

        let open = || Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::ICMPV4));
        let stranger = hosts.b.run(open).unwrap();
        let port = probe.socket.local_addr().unwrap().port();
        let tell = |mtu_bytes, quoted: &[u8]| {
            let message = too_big(port, mtu_bytes, quoted);
            let to: SocketAddr = "10.1.0.1:0".parse().unwrap();
            stranger.send_to(&message, &to.into()).unwrap();
        };
        let sent = |bytes| datagram(mode, probe.nonce, bytes);
        tell(600, &datagram(mode, probe.nonce.wrapping_add(1), 1472));
        // One that quotes too little to tell, and one about a packet of before.
        tell(610, &sent(1472)[..PROBE_BYTES_MIN - 1]);
        tell(620, &sent(1400));
        tell(0, &sent(1472));
        tell(1400, &sent(1472)[..PROBE_BYTES_MIN]);
        let deadline = Instant::now() + Duration::from_secs(30);
        let mtu_bytes = loop {
            match probe.too_long_for() {
                None if Instant::now() < deadline => std::thread::yield_now(),
                read => break read,
            }
        };
        assert_eq!(mtu_bytes, Some(1400));
        // Having read of it does not keep the next one from being sent.
        probe.send(1400).unwrap();
        assert_eq!(probe.too_long_for(), None);
    }
}
