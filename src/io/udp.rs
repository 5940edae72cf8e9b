//! One UDP socket per worker on a shared port, and the offloads on them.

use std::io;
use std::net::SocketAddr;
use std::sync::Mutex;

use nix::sys::socket::{setsockopt, sockopt as nix_sockopt};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

pub(super) mod connected;
mod options;
pub mod reuseport;
pub(crate) mod sockopt;

pub use self::options::{
    SOCKET_BUFFER_BYTES, check_mark, drop_from, set_mark, set_options, set_send_buffer,
};
pub use self::sockopt::{drops, unsent_bytes};

use self::connected::ConnectedSockets;
use self::options::enlarge_buffers;
use crate::error::{Error, Result};
use crate::wire::Mode;

/// UDP offloads in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UdpOffloads {
    /// `UDP_SEGMENT`: one send carries many datagrams (Linux 4.18).
    pub segment: bool,
    /// `UDP_GRO`: one receive brings many datagrams (Linux 5.0).
    pub gro: bool,
}

/// A port that a worker sends from; see [`reuseport`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Port {
    /// The port that all workers receive on.
    Listen,
    /// The worker's own, if it has one.
    Own,
}

/// How many there are.
pub const PORTS: usize = 2;

/// The sockets of one worker.
#[derive(Debug)]
pub struct WorkerSockets {
    /// Member of the shared port's group.
    pub receive: Socket,
    /// Socket on the worker's own port, to send from; see [`reuseport`].
    pub send: Option<Socket>,
    /// Those that take the place of `receive` for single senders.
    connected: Mutex<ConnectedSockets>,
}

impl WorkerSockets {
    /// Sockets to receive from and, if the worker has its own port, to send from.
    pub fn new(receive: Socket, send: Option<Socket>) -> Self {
        Self {
            receive,
            send,
            connected: Mutex::default(),
        }
    }

    /// The port that is used when `wanted` is.
    #[inline]
    pub fn port(&self, wanted: Port) -> Port {
        match self.send {
            Some(_) => wanted,
            None => Port::Listen,
        }
    }

    /// Both of them, as far as they are there.
    pub fn all(&self) -> impl Iterator<Item = &Socket> {
        [Some(&self.receive), self.send.as_ref()]
            .into_iter()
            .flatten()
    }

    /// The socket that sends from a port.
    #[inline]
    pub fn sender(&self, from: Port) -> &Socket {
        match &self.send {
            Some(send) if from == Port::Own => send,
            _ => &self.receive,
        }
    }
}

/// All sockets of a tunnel.
#[derive(Debug)]
pub struct Sockets {
    /// By worker.
    pub workers: Vec<WorkerSockets>,
    /// In WireGuard mode: member of the shared port's group that gets all but data messages.
    pub handshake: Option<Socket>,
    /// The offloads that the kernel has.
    pub offloads: UdpOffloads,
}

impl Sockets {
    /// The port that all receive on; 0 if there is none.
    pub fn port(&self) -> u16 {
        let first = self.workers.first();
        let address = first.and_then(|worker| address_of(&worker.receive).ok());
        address.map_or(0, |address| address.port())
    }

    /// Each of them.
    pub fn all(&self) -> impl Iterator<Item = &Socket> {
        let workers = self.workers.iter().flat_map(WorkerSockets::all);
        workers.chain(&self.handshake)
    }
}

/// Opens the sockets of `workers` workers on `listen`, or on a free port if that says 0.
/// `wanted` says which offloads to try.
///
/// # Errors
/// When the port is taken or the address is not this host's.
pub fn open(listen: SocketAddr, workers: u16, wanted: UdpOffloads, mode: Mode) -> Result<Sockets> {
    let failed = |error: io::Error| {
        let hint = match error.raw_os_error() {
            Some(libc::EADDRINUSE) => "stop what uses the port, or choose another with --listen",
            Some(libc::EADDRNOTAVAIL) => "--listen takes an address of this host",
            Some(libc::EMFILE | libc::ENFILE) => {
                "raise the limit on open files (ulimit -n), or ask for fewer --queues"
            }
            Some(libc::EACCES) => "ports below 1024 need CAP_NET_BIND_SERVICE",
            _ => "check --listen",
        };
        Error::os(format!("cannot open UDP socket on {listen}"), error).hint(hint)
    };
    // With SO_REUSEPORT another process of ours would join the group in
    // silence and take a share of the datagrams. A bind without it does not.
    let free = bind(listen, false).map_err(failed)?;
    let listen = address_of(&free).map_err(failed)?;
    drop(free);

    let mut offloads = wanted;
    let mut sockets = Vec::with_capacity(usize::from(workers));
    for index in 0..workers {
        let receive = bind(listen, true).map_err(failed)?;
        enlarge_buffers(&receive).map_err(failed)?;
        if offloads.gro {
            offloads.gro = setsockopt(&receive, nix_sockopt::UdpGroSegment, &true).is_ok();
        }
        // Peers in WireGuard mode take the port for where to send.
        let send = match mode {
            Mode::Plain if index > 0 => open_sender(listen, index),
            _ => None,
        };
        if offloads.segment {
            // Zero is "no segmentation unless a send asks for it".
            let sender = send.as_ref().unwrap_or(&receive);
            offloads.segment = setsockopt(sender, nix_sockopt::UdpGsoSegment, &0).is_ok();
        }
        sockets.push(WorkerSockets::new(receive, send));
    }
    let handshake = match mode {
        Mode::Plain => None,
        Mode::WireGuard => Some(open_handshake(listen, offloads).map_err(failed)?),
    };
    // Even for one worker: connected sockets are members, too, at first. The kernel copies it.
    let mut program = reuseport::program(listen, workers, mode);
    let program = libc::sock_fprog {
        len: program.len() as u16,
        filter: program.as_mut_ptr(),
    };
    setsockopt(
        &sockets[0].receive,
        nix_sockopt::AttachReusePortCbpf,
        &program,
    )
    .map_err(|errno| failed(errno.into()))?;
    Ok(Sockets {
        workers: sockets,
        handshake,
        offloads,
    })
}

/// Where a socket receives.
fn address_of(socket: &Socket) -> io::Result<SocketAddr> {
    let address = socket.local_addr()?.as_socket();
    address.ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// A socket for handshakes: the last one of the port's group. GRO is on for it as for the
/// others, since the kernel looks at any one of them to see whether it may merge. Its receive
/// buffer stays short: what waits there under a flood would be answered too late.
fn open_handshake(listen: SocketAddr, offloads: UdpOffloads) -> io::Result<Socket> {
    let socket = bind(listen, true)?;
    if offloads.gro {
        setsockopt(&socket, nix_sockopt::UdpGroSegment, &true)?;
    }
    Ok(socket)
}

fn bind(address: SocketAddr, reuse_port: bool) -> io::Result<Socket> {
    let socket = unbound(address)?;
    socket.set_reuse_port(reuse_port)?;
    socket.bind(&SockAddr::from(address))?;
    Ok(socket)
}

/// A socket for an address.
fn unbound(address: SocketAddr) -> io::Result<Socket> {
    let domain = Domain::for_address(address);
    let socket = Socket::new(domain, Type::DGRAM, Some(Protocol::UDP))?;
    socket.set_nonblocking(true)?;
    if domain == Domain::IPV6 {
        // Dual-stack when the address is `::`, so that peers of both families
        // share the port.
        socket.set_only_v6(!address.ip().is_unspecified())?;
    }
    Ok(socket)
}

/// A socket with a source port of worker `index`'s own. `None` when all such
/// ports are taken: the worker then always sends from the shared port, and the
/// far side receives it on its worker 0.
fn open_sender(listen: SocketAddr, index: u16) -> Option<Socket> {
    let socket = reuseport::source_ports(listen.port(), index)
        .find_map(|port| bind(SocketAddr::new(listen.ip(), port), false).ok())?;
    // Nothing is ever received here; drop what comes before it is queued.
    let drop_all = socket2::SockFilter::new((libc::BPF_RET | libc::BPF_K) as u16, 0, 0, 0);
    socket.attach_filter(&[drop_all]).ok()?;
    enlarge_buffers(&socket).ok()?;
    Some(socket)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::UdpSocket;

    const ALL: UdpOffloads = UdpOffloads {
        segment: true,
        gro: true,
    };

    fn free_port() -> SocketAddr {
        UdpSocket::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap()
    }

    #[test]
    fn a_port_in_use_is_refused_even_by_our_own() {
        let listen = free_port();
        let _first = open(listen, 2, ALL, Mode::Plain).unwrap();
        let text = open(listen, 2, ALL, Mode::Plain).unwrap_err().to_string();
        assert!(text.contains(&listen.to_string()), "{text}");
        assert!(text.contains("address already in use"), "{text}");
        assert!(text.contains("--listen"), "{text}");
    }

    #[test]
    fn any_port_is_the_same_for_all() {
        let listen = "127.0.0.1:0".parse().unwrap();
        let sockets = open(listen, 2, ALL, Mode::WireGuard).unwrap();
        assert!(sockets.port() > 0);
        let port = |socket: &Socket| address_of(socket).unwrap().port();
        assert_eq!(sockets.all().count(), 3);
        assert!(sockets.all().all(|socket| port(socket) == sockets.port()));
    }

    #[test]
    fn the_message_type_picks_the_handshake_socket() {
        let listen = free_port();
        for workers in [1, 3] {
            let sockets = open(listen, workers, ALL, Mode::WireGuard).unwrap();
            let handshake = sockets.handshake.unwrap();
            let mut used = std::collections::BTreeSet::new();
            // All at once, so that no two have one port.
            let peers: Vec<_> = (0..32)
                .map(|_| UdpSocket::bind("127.0.0.1:0").unwrap())
                .collect();
            for peer in &peers {
                for _ in 0..2 {
                    for message in [[1, 0, 0, 0], [2, 0, 0, 0], [3, 0, 0, 0], [0x45, 0, 0, 0]] {
                        peer.send_to(&message, listen).unwrap();
                        let mut bytes = [std::mem::MaybeUninit::uninit(); 4];
                        assert_eq!(handshake.recv(&mut bytes).ok(), Some(4));
                    }
                    peer.send_to(&[4, 0, 0, 0], listen).unwrap();
                    let mut bytes = [std::mem::MaybeUninit::uninit(); 4];
                    assert!(handshake.recv(&mut bytes).is_err());
                    let got = sockets.workers.iter().enumerate();
                    let mut got = got.filter(|(_, worker)| worker.receive.recv(&mut bytes).is_ok());
                    let first = got.next().map(|(index, _)| index);
                    used.insert((peer.local_addr().unwrap(), first.unwrap()));
                }
            }
            let all: std::collections::BTreeSet<_> = used.iter().map(|(_, index)| index).collect();
            assert_eq!(all.len(), usize::from(workers), "peers are spread");
            assert_eq!(used.len(), 32, "a peer stays with its worker");
        }
    }

    #[test]
    fn the_source_port_picks_the_worker() {
        let listen = free_port();
        let sockets = open(listen, 3, ALL, Mode::Plain).unwrap().workers;
        let peer_port = free_port();
        let peers = open(peer_port, 4, ALL, Mode::Plain).unwrap().workers;
        // The receiver goes by its own port: pick senders by that.
        for (worker, peer) in peers.iter().enumerate() {
            let sender = peer.send.as_ref().unwrap_or(&peer.receive);
            let source = sender.local_addr().unwrap().as_socket().unwrap();
            assert_eq!(
                source.port().wrapping_sub(peer_port.port()) % reuseport::WORKERS_MAX,
                worker as u16
            );
            sender.send_to(&[7], &SockAddr::from(listen)).unwrap();
            let expected = source.port().wrapping_sub(listen.port()) % reuseport::WORKERS_MAX % 3;
            for (index, socket) in sockets.iter().enumerate() {
                let mut byte = [std::mem::MaybeUninit::uninit()];
                let got = socket.receive.recv(&mut byte);
                assert_eq!(got.is_ok(), index == usize::from(expected));
            }
        }
    }
}
