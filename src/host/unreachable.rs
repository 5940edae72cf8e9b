//! Why nothing comes from a host: a datagram is sent there, and whoever cannot deliver it says
//! so by ICMP.
//!
//! One socket for each IP version serves all hosts. The tunnel's own sockets cannot be told:
//! with `IP_RECVERR` an error from one peer would have sends to another fail.
//!
//! Anybody can send such ICMP. What counts here quotes the datagram with its nonce, which is
//! another one for each host and which nobody can guess: only those on the path to that host
//! have seen it.

use std::hash::{BuildHasher, RandomState};
use std::io::{self, IoSliceMut};
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;

use nix::sys::socket::{
    ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg, setsockopt, sockopt,
};

use super::path::{Source, bind_toward};
use crate::packet::probe::{Kind, PROBE_BYTES_MIN, Probe};

/// Errors that are read at a time: the others wait, or are lost and come again.
const ERRORS_MAX: usize = 1024;

/// See the module's documentation.
pub(crate) struct UnreachableProbe {
    source: Source,
    /// Makes the nonces.
    key: RandomState,
    v4: Option<UdpSocket>,
    v6: Option<UdpSocket>,
}

impl UnreachableProbe {
    /// One that sends as the tunnel's sockets do, from ports of its own.
    pub(crate) fn new(source: Source) -> Self {
        Self {
            source,
            key: RandomState::new(),
            v4: None,
            v6: None,
        }
    }

    /// How it sends.
    pub(crate) fn source(&self) -> Source {
        self.source
    }

    /// What is sent to a host: a packet that asks for nothing, as those that find a path's MTU.
    fn packet(&self, host: SocketAddr) -> Vec<u8> {
        let probe = Probe {
            kind: Kind::Size,
            nonce: self.key.hash_one((host.ip(), host.port())),
        };
        probe.to_packet(PROBE_BYTES_MIN)
    }

    /// Sends a datagram to `host`.
    ///
    /// # Errors
    /// When it cannot be sent. That may be due to another host, whose error was not read yet:
    /// the next one is sent.
    pub(crate) fn send(&mut self, host: SocketAddr) -> io::Result<()> {
        let packet = self.packet(host);
        let socket = match host {
            SocketAddr::V4(_) => &mut self.v4,
            SocketAddr::V6(_) => &mut self.v6,
        };
        let socket = match socket {
            Some(socket) => socket,
            none => none.insert(open(self.source, host)?),
        };
        socket.send_to(&packet, host).map(drop)
    }

    /// Hosts that somebody has said to be unreachable since the last call, and the `errno` that
    /// says why.
    pub(crate) fn errors(&self) -> Vec<(SocketAddr, i32)> {
        let sockets = self.v4.iter().chain(&self.v6);
        let errors = sockets.flat_map(|socket| {
            let all = (0..ERRORS_MAX).map_while(|_| self.next_error(socket));
            all.flatten().collect::<Vec<_>>()
        });
        errors.collect()
    }

    /// The next error of a socket, if there is one; `Some(None)` if that says nothing.
    fn next_error(&self, socket: &UdpSocket) -> Option<Option<(SocketAddr, i32)>> {
        let mut quote = [0; PROBE_BYTES_MIN];
        // The error, and the address that it came from.
        let mut control = nix::cmsg_space!(libc::sock_extended_err, libc::sockaddr_in6);
        let mut slices = [IoSliceMut::new(&mut quote)];
        let flags = MsgFlags::MSG_ERRQUEUE | MsgFlags::MSG_DONTWAIT;
        let fd = socket.as_raw_fd();
        let message =
            recvmsg::<SockaddrStorage>(fd, &mut slices, Some(&mut control), flags).ok()?;
        let host = message.address.as_ref().and_then(to_socket_addr);
        let errno = message
            .cmsgs()
            .ok()
            .and_then(|mut all| all.find_map(unreachable_errno));
        let length = message.bytes;
        let is_quoted = |host| quote.get(..length) == Some(&self.packet(host)[..]);
        Some(host.zip(errno).filter(|(host, _)| is_quoted(*host)))
    }
}

fn open(source: Source, host: SocketAddr) -> io::Result<UdpSocket> {
    let socket = bind_toward(source, host)?;
    socket.set_nonblocking(true)?;
    match host {
        SocketAddr::V4(_) => setsockopt(&socket, sockopt::Ipv4RecvErr, &true)?,
        SocketAddr::V6(_) => setsockopt(&socket, sockopt::Ipv6RecvErr, &true)?,
    }
    Ok(socket)
}

fn to_socket_addr(address: &SockaddrStorage) -> Option<SocketAddr> {
    let v4 = address
        .as_sockaddr_in()
        .map(|v4| SocketAddr::V4((*v4).into()));
    let v6 = || Some(SocketAddr::V6((*address.as_sockaddr_in6()?).into()));
    v4.or_else(v6)
}

/// The `errno` of an ICMP error that says that a host or port cannot be reached.
fn unreachable_errno(message: ControlMessageOwned) -> Option<i32> {
    let (ControlMessageOwned::Ipv4RecvErr(error, _) | ControlMessageOwned::Ipv6RecvErr(error, _)) =
        message
    else {
        return None;
    };
    let origins = [libc::SO_EE_ORIGIN_ICMP, libc::SO_EE_ORIGIN_ICMP6];
    let errno = error.ee_errno as i32;
    // A packet that was too long says nothing of the host.
    (origins.contains(&error.ee_origin) && errno != libc::EMSGSIZE).then_some(errno)
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};
    use std::time::{Duration, Instant};

    use super::*;

    fn errors(probe: &UnreachableProbe, count: usize) -> Vec<(SocketAddr, i32)> {
        let deadline = Instant::now() + Duration::from_secs(30);
        let mut errors = Vec::new();
        while errors.len() < count && Instant::now() < deadline {
            errors.extend(probe.errors());
        }
        errors.sort_unstable();
        errors
    }

    /// Many at once, by one socket.
    #[test]
    fn hosts_on_which_nothing_listens_are_told_from_others() {
        let any = Source::unmarked(Ipv4Addr::UNSPECIFIED.into());
        let mut probe = UnreachableProbe::new(any);
        let listening: Vec<_> = (1..=10)
            .map(|number| UdpSocket::bind((Ipv4Addr::new(127, 1, 1, number), 0)).unwrap())
            .collect();
        let mut refused: Vec<SocketAddr> = (1..=10)
            .map(|number| SocketAddr::from(([127, 1, 2, number], 9)))
            .collect();
        refused.push(SocketAddr::from((Ipv6Addr::LOCALHOST, 9)));
        for host in &refused {
            // The error of the one before may come first.
            if probe.send(*host).is_err() {
                probe.send(*host).unwrap();
            }
        }
        for socket in &listening {
            let host = socket.local_addr().unwrap();
            if probe.send(host).is_err() {
                probe.send(host).unwrap();
            }
        }
        let expected = refused.iter().map(|host| (*host, libc::ECONNREFUSED));
        assert_eq!(errors(&probe, refused.len()), expected.collect::<Vec<_>>());
        assert_eq!(probe.errors(), []);
    }

    /// A host that was asked about itself knows nothing that counts for another host or another
    /// tunnel.
    #[test]
    fn each_host_has_a_nonce_of_its_own() {
        let any = Source::unmarked(Ipv4Addr::UNSPECIFIED.into());
        let probe = UnreachableProbe::new(any);
        let hosts: [SocketAddr; 3] =
            ["10.0.0.1:1", "10.0.0.1:2", "10.0.0.2:1"].map(|host| host.parse().unwrap());
        let packets: std::collections::HashSet<_> =
            hosts.iter().map(|host| probe.packet(*host)).collect();
        assert_eq!(packets.len(), hosts.len());
        assert_eq!(probe.packet(hosts[0]), probe.packet(hosts[0]));
        let other = UnreachableProbe::new(any);
        assert_ne!(probe.packet(hosts[0]), other.packet(hosts[0]));
    }
}
