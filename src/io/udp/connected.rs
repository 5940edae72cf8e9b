//! Sockets that are connected to one sender each.
//!
//! The kernel looks such a socket up by the sender's address and port first. That takes less
//! than picking a member of the port's group, and it is done for every datagram, before UDP
//! GRO puts them together. Nothing is ever sent from it: what leaves has the same port
//! either way, and firewalls see no difference.

use std::io;
use std::net::{Shutdown, SocketAddr};
use std::os::fd::AsFd;
use std::sync::{Arc, MutexGuard, PoisonError};

use nix::sys::socket::{getsockopt, setsockopt, sockopt as nix_sockopt};
use socket2::{SockAddr, Socket};

use super::options::{drop_from, enlarge_receive_buffer, set_socket_options};
use super::{WorkerSockets, drops, unbound};

/// Port of the discard protocol (RFC 863), from which nobody sends.
const DISCARD_PORT: u16 = 9;

/// A worker's connected sockets, for the control thread as well.
#[derive(Debug, Default)]
pub(super) struct ConnectedSockets {
    sockets: Vec<Arc<Socket>>,
    /// See [`drop_from`].
    interface: Option<u32>,
    /// What was dropped at those that are closed, modulo 2^32.
    closed_drops: u32,
}

impl WorkerSockets {
    fn connected(&self) -> MutexGuard<'_, ConnectedSockets> {
        let connected = self.connected.lock();
        connected.unwrap_or_else(PoisonError::into_inner)
    }

    /// Opens a socket that receives what `sender` sends from now on to the address that
    /// this host would answer from.
    ///
    /// # Errors
    /// When there is no descriptor left, or no way to the sender.
    pub fn connect(&self, sender: SocketAddr) -> io::Result<Arc<Socket>> {
        let listen = self.receive.local_addr()?;
        let address = listen.as_socket().ok_or(io::ErrorKind::Unsupported)?;
        let socket = unbound(address)?;
        set_socket_options(&socket, false)?;
        enlarge_receive_buffer(&socket)?;
        // Until it is connected it is one more member of the group. The BPF program never
        // picks it, but the kernel may look at it to see whether it may merge datagrams.
        if getsockopt(&self.receive, nix_sockopt::UdpGroSegment)? {
            setsockopt(&socket, nix_sockopt::UdpGroSegment, &true)?;
        }
        // The rules for marked datagrams tell the address that answers leave from.
        let mark = self.receive.mark()?;
        if mark != 0 {
            socket.set_mark(mark)?;
        }
        // Locked, so that no change of the interface is missed.
        let mut connected = self.connected();
        drop_from(socket.as_fd(), connected.interface)?;
        socket.set_reuse_port(true)?;
        socket.bind(&listen)?;
        socket.connect(&SockAddr::from(sender))?;
        let socket = Arc::new(socket);
        connected.sockets.push(Arc::clone(&socket));
        Ok(socket)
    }

    /// Closes a connected socket.
    pub fn close(&self, socket: &Arc<Socket>) {
        let mut connected = self.connected();
        let dropped = drops(socket.as_fd()).unwrap_or(0);
        connected.closed_drops = connected.closed_drops.wrapping_add(dropped);
        connected.sockets.retain(|it| !Arc::ptr_eq(it, socket));
    }

    /// Has the kernel drop what reaches these sockets through the interface `index`; see
    /// [`drop_from`].
    ///
    /// # Errors
    /// When the kernel takes no filter.
    pub fn drop_from(&self, index: Option<u32>) -> io::Result<()> {
        let mut connected = self.connected();
        connected.interface = index;
        drop_from(self.receive.as_fd(), index)?;
        let mut sockets = connected.sockets.iter();
        sockets.try_for_each(|socket| drop_from(socket.as_fd(), index))
    }

    /// Datagrams that the kernel has dropped at these sockets, modulo 2^32; see [`drops`].
    ///
    /// # Errors
    /// When the kernel does not know (Linux 4.12).
    pub fn drops(&self) -> io::Result<u32> {
        let connected = self.connected();
        let before = drops(self.receive.as_fd())?.wrapping_add(connected.closed_drops);
        let sockets = connected.sockets.iter();
        let counts = sockets.map(|socket| drops(socket.as_fd()).unwrap_or(0));
        Ok(counts.fold(before, u32::wrapping_add))
    }
}

/// Has the port's group receive again what `sender` sends. What the socket holds is still to
/// be read, and no read or poll of it waits any more.
///
/// # Errors
/// When there is no way to the sender any more. The socket then still receives.
pub fn disconnect(socket: &Socket, sender: SocketAddr) -> io::Result<()> {
    // Not by AF_UNSPEC: the kernel would take it for a socket that receives from everybody.
    let nobody = SocketAddr::new(sender.ip(), DISCARD_PORT);
    let connected = socket.connect(&SockAddr::from(nobody));
    socket.shutdown(Shutdown::Read)?;
    connected
}

#[cfg(test)]
mod tests {
    use super::super::{Sockets, UdpOffloads, open};
    use super::*;
    use crate::wire::Mode;
    use std::mem::MaybeUninit;
    use std::net::UdpSocket;

    fn sockets(listen: &str) -> (Sockets, SocketAddr) {
        let port = UdpSocket::bind("[::]:0").unwrap().local_addr().unwrap();
        let listen = SocketAddr::new(listen.parse().unwrap(), port.port());
        let all = UdpOffloads {
            segment: true,
            gro: true,
        };
        (open(listen, 1, all, Mode::Plain).unwrap(), listen)
    }

    /// The first bytes of what is there.
    fn received(socket: &Socket) -> Vec<u8> {
        let mut buffer = [MaybeUninit::uninit(); 8];
        let mut first = Vec::new();
        while let Ok(bytes) = socket.recv(&mut buffer) {
            // SAFETY: so many bytes were received.
            first.extend((bytes > 0).then(|| unsafe { buffer[0].assume_init() }));
        }
        first
    }

    /// What each sender sends comes to one socket and no other, before, while and after it has
    /// one of its own.
    #[test]
    fn what_a_sender_sends_comes_to_one_socket() {
        for (listen, home) in [
            ("0.0.0.0", "127.0.0.1"),
            ("127.0.0.1", "127.0.0.1"),
            ("::", "::1"),
            ("::", "127.0.0.1"),
            ("::1", "::1"),
        ] {
            let (sockets, listen) = sockets(listen);
            let worker = &sockets.workers[0];
            let to = SocketAddr::new(home.parse().unwrap(), listen.port());
            let [one, other] = [0; 2].map(|_| UdpSocket::bind((to.ip(), 0)).unwrap());
            let send = |number| {
                one.send_to(&[number], to).unwrap();
                other.send_to(&[number + 100], to).unwrap();
            };
            send(1);
            let sender = one.local_addr().unwrap();
            let own = worker.connect(sender).unwrap();
            send(2);
            assert_eq!(received(&own), [2], "{listen}");
            assert_eq!(received(&worker.receive), [1, 101, 102], "{listen}");
            send(3);
            disconnect(&own, sender).unwrap();
            send(4);
            // What it held it still holds.
            assert_eq!(received(&own), [3], "{listen}");
            assert_eq!(received(&worker.receive), [103, 4, 104], "{listen}");
            worker.close(&own);
            assert_eq!(Arc::strong_count(&own), 1, "nobody else has it");
            drop(own);
            send(5);
            assert_eq!(received(&worker.receive), [5, 105], "{listen}");
        }
    }

    #[test]
    fn what_comes_through_the_tunnel_itself_is_dropped_and_counted_once() {
        let (sockets, listen) = sockets("127.0.0.1");
        let worker = &sockets.workers[0];
        // SAFETY: the name ends with a zero.
        let loopback = unsafe { libc::if_nametoindex(c"lo".as_ptr()) };
        let peers = [0; 3].map(|_| UdpSocket::bind("127.0.0.1:0").unwrap());
        let send = || {
            for peer in &peers {
                peer.send_to(&[1], listen).unwrap();
            }
        };
        let connect = |peer: &UdpSocket| worker.connect(peer.local_addr().unwrap()).unwrap();
        let before = connect(&peers[0]);
        worker.drop_from(Some(loopback)).unwrap();
        let after = connect(&peers[1]);
        send();
        for socket in [&before, &after, &worker.receive] {
            assert!(received(socket).is_empty());
        }
        assert_eq!(worker.drops().unwrap(), 3);
        worker.close(&before);
        assert_eq!(worker.drops().unwrap(), 3, "nor are they forgotten");
        drop(before);
        send();
        assert_eq!(worker.drops().unwrap(), 6);
        worker.drop_from(None).unwrap();
        send();
        assert_eq!(received(&after), [1]);
        assert_eq!(received(&worker.receive), [1, 1]);
    }
}
