//! One UDP socket per worker on a shared port, and the offloads on them.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Mutex;

use nix::sys::socket::{setsockopt, sockopt as nix_sockopt};
use rustix::net::sockopt::{
    Ipv4PathMtuDiscovery, Ipv6PathMtuDiscovery, set_ip_mtu_discover, set_ipv6_mtu_discover,
};
use socket2::{Domain, Protocol, SockAddr, SockRef, Socket, Type};

pub(super) mod connected;
pub mod reuseport;
pub(crate) mod sockopt;

pub use self::sockopt::{drops, unsent_bytes};

use self::connected::ConnectedSockets;
use crate::error::{Error, Result};
use crate::wire::Mode;

/// Bytes asked for with `SO_RCVBUF` and `SO_SNDBUF`: some milliseconds of
/// datagrams at full rate, so that a worker that waits for its core loses none.
pub const SOCKET_BUFFER_BYTES: usize = 8 << 20;

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

/// Sets what a process needs of all sockets of its workers, whether it has opened them or
/// taken them over.
///
/// They send whatever the interface takes, as the kernel's own tunnels do: the kernel's
/// memory of path MTUs, which anybody can write to by ICMP, is left aside, and IPv4
/// datagrams may be fragmented on their way. And they tell the ECN field of what they
/// receive and, in WireGuard mode, which of this host's addresses it was sent to. None of that
/// matters to a process that still sends from the same sockets.
///
/// # Errors
/// When the kernel does not know how.
pub fn set_options(sockets: &Sockets) -> Result<()> {
    // Keys say who sends there, and peers may call any address.
    let tells_called = sockets.handshake.is_some();
    sockets
        .all()
        .try_for_each(|socket| set_socket_options(socket, tells_called))
        .map_err(|error| Error::os("cannot set options of a UDP socket", error))
}

fn set_socket_options(socket: &Socket, tells_called: bool) -> io::Result<()> {
    // One that is bound to an address sends from that.
    let tells_called = tells_called && address_of(socket)?.ip().is_unspecified();
    // On a dual-stack socket either family has options of its own.
    set_ip_mtu_discover(socket, Ipv4PathMtuDiscovery::OMIT)?;
    socket.set_recv_tos_v4(true)?;
    if socket.domain()? == Domain::IPV6 {
        set_ipv6_mtu_discover(socket, Ipv6PathMtuDiscovery::OMIT)?;
        socket.set_recv_tclass_v6(true)?;
        // For both families.
        setsockopt(socket, nix_sockopt::Ipv6RecvPacketInfo, &tells_called)?;
    } else {
        setsockopt(socket, nix_sockopt::Ipv4PacketInfo, &tells_called)?;
    }
    Ok(())
}

/// Marks what all sockets send (`SO_MARK`, socket(7)), for policy rules; 0 for no mark.
///
/// # Errors
/// Without CAP_NET_ADMIN.
pub fn set_mark<'a>(sockets: impl IntoIterator<Item = BorrowedFd<'a>>, mark: u32) -> Result<()> {
    let mut sockets = sockets.into_iter();
    let set = |socket: BorrowedFd<'a>| {
        let socket = SockRef::from(&socket);
        // It takes a right that a tunnel without a mark may lack in this namespace.
        match socket.mark()? == mark {
            true => Ok(()),
            false => socket.set_mark(mark),
        }
    };
    sockets.try_for_each(set).map_err(|error| {
        Error::os(format!("cannot mark datagrams with {mark}"), error)
            .hint("run as root or grant CAP_NET_ADMIN")
    })
}

/// Makes sure that this process may mark datagrams; nothing of these `sockets` changes.
///
/// # Errors
/// As [`set_mark`].
pub fn check_mark(sockets: &[WorkerSockets], mark: u32) -> Result<()> {
    let is_other = |worker: &WorkerSockets| worker.receive.mark().is_ok_and(|old| old != mark);
    if !sockets.iter().any(is_other) {
        return Ok(());
    }
    let other = Socket::new(Domain::UNIX, Type::DGRAM, None)
        .map_err(|error| Error::os("cannot make a socket", error))?;
    // It has none yet.
    set_mark([other.as_fd()], mark.max(1))
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

/// Has the kernel drop what reaches the socket through the interface `index`:
/// the tunnel's own device. A peer could else send, inside the tunnel, datagrams
/// that this socket takes for another peer's. `None`: there is no such interface.
///
/// The filter belongs to the socket, and goes with it to another process.
///
/// # Errors
/// When the kernel takes no filter.
pub fn drop_from(socket: BorrowedFd<'_>, index: Option<u32>) -> io::Result<()> {
    use libc::{BPF_ABS, BPF_JEQ, BPF_JMP, BPF_K, BPF_LD, BPF_RET, BPF_W};
    let interface_index = (libc::SKF_AD_OFF + libc::SKF_AD_IFINDEX) as u32;
    let instruction = |code: u32, jt, jf, k| socket2::SockFilter::new(code as u16, jt, jf, k);
    SockRef::from(&socket).attach_filter(&[
        instruction(BPF_LD | BPF_W | BPF_ABS, 0, 0, interface_index),
        // No interface has the index 0.
        instruction(BPF_JMP | BPF_JEQ | BPF_K, 0, 1, index.unwrap_or(0)),
        instruction(BPF_RET | BPF_K, 0, 0, 0),
        instruction(BPF_RET | BPF_K, 0, 0, u32::MAX),
    ])
}

/// The *FORCE options go beyond `net.core.{r,w}mem_max` but need
/// CAP_NET_ADMIN; without it the limits apply.
fn enlarge_buffers(socket: &Socket) -> io::Result<()> {
    enlarge_receive_buffer(socket)?;
    set_send_buffer(socket, SOCKET_BUFFER_BYTES)
}

fn enlarge_receive_buffer(socket: &Socket) -> io::Result<()> {
    if setsockopt(socket, nix_sockopt::RcvBufForce, &SOCKET_BUFFER_BYTES).is_err() {
        socket.set_recv_buffer_size(SOCKET_BUFFER_BYTES)?;
    }
    Ok(())
}

/// Sets how much a socket holds at the most: there is room while it holds less than
/// `bytes`, and it takes twice that, so that a batch that was begun goes in whole.
///
/// # Errors
/// When the kernel does not take the option.
pub fn set_send_buffer(socket: &Socket, bytes: usize) -> io::Result<()> {
    if setsockopt(socket, nix_sockopt::SndBufForce, &bytes).is_err() {
        socket.set_send_buffer_size(bytes)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::UdpSocket;
    use std::os::fd::AsFd;

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

    /// A UDP datagram as it comes out of a TUN device, without a checksum (RFC 768).
    fn vnet_packet(source: [u8; 4], destination: [u8; 4], port: u16) -> Vec<u8> {
        let virtio = [0; crate::packet::virtio::HEADER_BYTES];
        let mut ip = vec![0x45, 0, 0, 29, 0, 0, 0, 0, 64, 17, 0, 0];
        ip.extend([source, destination].concat());
        let words = ip
            .chunks(2)
            .map(|word| u32::from(u16::from_be_bytes([word[0], word[1]])));
        let sum: u32 = words.sum();
        let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
        ip[10..12].copy_from_slice(&sum.to_be_bytes());
        let [high, low] = port.to_be_bytes();
        [&virtio[..], &ip, &[high, low, high, low, 0, 9, 0, 0, 7]].concat()
    }

    /// Through a real device, as nested datagrams come.
    #[test]
    fn what_comes_through_the_tunnel_itself_is_dropped_and_counted() {
        const PORT: u16 = 8285;
        let namespace = crate::testbed::Namespace::new().unwrap();
        let mut netlink = namespace.netlink().unwrap();
        let none = crate::packet::coalesce::TunOffloads {
            tcp: false,
            udp: false,
        };
        let listen = SocketAddr::from(([0, 0, 0, 0], PORT));
        let (
            device,
            Sockets {
                workers: sockets, ..
            },
        ) = namespace.run(|| {
            let device = crate::io::tun::create("tun0", 1, none).unwrap();
            (device, open(listen, 1, ALL, Mode::Plain).unwrap())
        });
        let index = netlink.link_index("tun0").unwrap();
        netlink
            .add_address(index.unwrap(), "10.9.0.1/24".parse().unwrap())
            .unwrap();
        netlink.set_up(index.unwrap()).unwrap();
        let socket = &sockets[0].receive;
        let vnet_packet = vnet_packet([10, 9, 0, 2], [10, 9, 0, 1], PORT);
        let has_come = || socket.recv(&mut [std::mem::MaybeUninit::uninit()]).is_ok();
        let wait_until = |is_so: &dyn Fn() -> bool| {
            for _ in 0..10_000 {
                if is_so() {
                    return;
                }
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
            panic!("waited in vain");
        };
        let write = || nix::unistd::write(&device.queues[0], &vnet_packet).unwrap();
        write();
        wait_until(&has_come);
        drop_from(socket.as_fd(), index).unwrap();
        for count in 1..=20 {
            write();
            wait_until(&|| drops(socket.as_fd()).unwrap() == count);
        }
        assert!(!has_come());
        // Through another interface it still comes.
        let other = namespace.run(|| UdpSocket::bind("127.0.0.1:0").unwrap());
        other.send_to(&[7], ("10.9.0.1", PORT)).unwrap();
        wait_until(&has_come);
        drop_from(socket.as_fd(), None).unwrap();
        write();
        wait_until(&has_come);
        assert_eq!(drops(socket.as_fd()).unwrap(), 20);
    }

    #[test]
    fn all_sockets_have_the_mark() {
        let namespace = crate::testbed::Namespace::new().unwrap();
        for mode in [Mode::Plain, Mode::WireGuard] {
            let listen = SocketAddr::from(([127, 0, 0, 1], 8285));
            let sockets = namespace.run(|| open(listen, 2, ALL, mode).unwrap());
            for fwmark in [0xca6c, 0] {
                let all: Vec<_> = sockets.all().collect();
                assert_eq!(all.len(), 3);
                let before = all[0].mark().unwrap();
                check_mark(&sockets.workers, fwmark).unwrap();
                set_options(&sockets).unwrap();
                assert!(all.iter().all(|it| it.mark().unwrap() == before));
                set_mark(all.iter().map(|it| it.as_fd()), fwmark).unwrap();
                assert!(all.iter().all(|it| it.mark().unwrap() == fwmark));
            }
        }
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
