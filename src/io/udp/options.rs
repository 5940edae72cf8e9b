//! What UDP sockets are told to do, whoever has opened them: options, marks, filters and
//! buffers.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use nix::sys::socket::{setsockopt, sockopt as nix_sockopt};
use rustix::net::sockopt::{
    Ipv4PathMtuDiscovery, Ipv6PathMtuDiscovery, set_ip_mtu_discover, set_ipv6_mtu_discover,
};
use socket2::{Domain, SockRef, Socket, Type};

use super::{Sockets, WorkerSockets, address_of};
use crate::error::{Error, Result};

/// Bytes asked for with `SO_RCVBUF` and `SO_SNDBUF`: some milliseconds of
/// datagrams at full rate, so that a worker that waits for its core loses none.
pub const SOCKET_BUFFER_BYTES: usize = 8 << 20;

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

pub(super) fn set_socket_options(socket: &Socket, tells_called: bool) -> io::Result<()> {
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
pub(super) fn enlarge_buffers(socket: &Socket) -> io::Result<()> {
    enlarge_receive_buffer(socket)?;
    set_send_buffer(socket, SOCKET_BUFFER_BYTES)
}

pub(super) fn enlarge_receive_buffer(socket: &Socket) -> io::Result<()> {
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
    use std::net::{SocketAddr, UdpSocket};

    use super::super::{UdpOffloads, drops, open};
    use super::*;
    use crate::wire::Mode;

    const ALL: UdpOffloads = UdpOffloads {
        segment: true,
        gro: true,
    };

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
}
