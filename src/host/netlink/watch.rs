//! What others change: notifications of routes, addresses and links, as
//! `ip monitor` shows them.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::Socket;
use netlink_sys::protocols::NETLINK_ROUTE;
use nix::sys::socket::{setsockopt, sockopt};
use socket2::{SockFilter, SockRef};

use super::{Netlink, RECEIVE_BYTES, Reply, Route, read_reply, split_message};

/// Events wait here while their reader is busy; a thousand take up about a
/// megabyte. Those that do not fit are lost, and that is reported.
const QUEUE_BYTES: usize = 8 << 20;

/// Where `struct nlmsghdr` has the port of the socket that asked for a change.
const PORT_AT: u32 = 12;

/// A change that somebody has made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// A route was added or deleted. One that it has replaced is not reported, nor are
    /// IPv4 routes that go because an interface goes down or loses its last IPv4
    /// address (`fib_sync_down_dev()` in net/ipv4/fib_semantics.c).
    Route(Route),
    /// The interface with this index was made or has changed, or its addresses have.
    Link(u32),
    /// The interface that had this index is gone.
    LinkDeleted(u32),
    /// There were more events than there was room: anything may have changed.
    Lost,
}

/// A socket that receives the changes to routes, addresses and links in its namespace.
pub struct Watch {
    socket: Socket,
    buffer: Vec<u8>,
}

impl Watch {
    /// Subscribes, in the calling thread's network namespace. Changes that
    /// `own` asks for are not reported.
    ///
    /// # Errors
    /// When the kernel gives no netlink socket or refuses the subscription.
    pub(crate) fn open(own: &Netlink) -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        // Before the subscription, so that nothing slips through.
        SockRef::from(&socket).attach_filter(&all_but_changes_of(own.port()?))?;
        // Beyond net.core.rmem_max it takes CAP_NET_ADMIN of the initial user
        // namespace. With less room events are lost sooner, and said to be.
        if setsockopt(&socket, sockopt::RcvBufForce, &QUEUE_BYTES).is_err() {
            SockRef::from(&socket).set_recv_buffer_size(QUEUE_BYTES)?;
        }
        socket.set_non_blocking(true)?;
        socket.bind_auto()?;
        for group in [
            libc::RTNLGRP_LINK,
            libc::RTNLGRP_IPV4_IFADDR,
            libc::RTNLGRP_IPV6_IFADDR,
            libc::RTNLGRP_IPV4_ROUTE,
            libc::RTNLGRP_IPV6_ROUTE,
        ] {
            socket.add_membership(group)?;
        }
        Ok(Self {
            socket,
            buffer: vec![0; RECEIVE_BYTES],
        })
    }

    /// Gives events so little room that some are lost.
    #[cfg(test)]
    pub(crate) fn shrink(&self) {
        SockRef::from(&self.socket)
            .set_recv_buffer_size(4096)
            .unwrap();
    }

    /// Reads what has come so far, at most `datagrams_max` datagrams, without
    /// waiting.
    pub(crate) fn read(&mut self, datagrams_max: usize, visit: &mut dyn FnMut(Event)) {
        for _ in 0..datagrams_max {
            match self
                .socket
                .recv_from(&mut &mut self.buffer[..], libc::MSG_TRUNC)
            {
                // Port 0 is the kernel; any process may send to our port.
                Ok((_, from)) if from.port_number() != 0 => {}
                Ok((length, _)) if length > self.buffer.len() => visit(Event::Lost),
                Ok((length, _)) => {
                    let mut rest = &self.buffer[..length];
                    while let Some((one, tail)) = split_message(rest) {
                        rest = tail;
                        if let Some(event) = read_event(one) {
                            visit(event);
                        }
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                // ENOBUFS: there was no room.
                Err(_) => visit(Event::Lost),
            }
        }
    }
}

impl AsFd for Watch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// A classic BPF program (linux/filter.h) that drops notifications of changes
/// which the socket with this port asked for: they neither wake the reader nor
/// fill its queue.
fn all_but_changes_of(port: u32) -> [SockFilter; 4] {
    const LOAD_WORD: u16 = 0x20; // BPF_LD | BPF_W | BPF_ABS
    const JUMP_IF_EQUAL: u16 = 0x15; // BPF_JMP | BPF_JEQ | BPF_K
    const RETURN: u16 = 0x06; // BPF_RET | BPF_K
    // BPF loads words in network byte order; the header is in the host's.
    let port = u32::from_be_bytes(port.to_ne_bytes());
    [
        SockFilter::new(LOAD_WORD, 0, 0, PORT_AT),
        SockFilter::new(JUMP_IF_EQUAL, 0, 1, port),
        SockFilter::new(RETURN, 0, 0, 0),
        SockFilter::new(RETURN, 0, 0, u32::MAX),
    ]
}

pub(super) fn read_event(message: &[u8]) -> Option<Event> {
    let (_, Reply::Object(object)) = read_reply(message)? else {
        return None;
    };
    match object {
        RouteNetlinkMessage::NewRoute(route) | RouteNetlinkMessage::DelRoute(route) => {
            Route::read(&route).map(Event::Route)
        }
        RouteNetlinkMessage::NewAddress(address) | RouteNetlinkMessage::DelAddress(address) => {
            Some(Event::Link(address.header.index))
        }
        RouteNetlinkMessage::NewLink(link) => Some(Event::Link(link.header.index)),
        // A port that leaves a bridge is reported as a deleted link, too; the
        // device itself has no family (`br_ifinfo_notify()`).
        RouteNetlinkMessage::DelLink(link) => (link.header.interface_family
            == AddressFamily::Unspec)
            .then_some(Event::LinkDeleted(link.header.index)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::netlink::route::PROTOCOL;
    use crate::host::netlink::{HEADER_BYTES, RouteChange};
    use crate::testbed::Namespace;

    #[test]
    fn garbage_is_no_event() {
        assert_eq!(read_event(&[0; HEADER_BYTES]), None);
        for kind in [
            libc::RTM_NEWROUTE,
            libc::RTM_NEWADDR,
            libc::RTM_NEWLINK,
            libc::RTM_DELLINK,
        ] {
            let mut message = vec![0; HEADER_BYTES + 7];
            message[4..6].copy_from_slice(&kind.to_ne_bytes());
            assert_eq!(read_event(&message), None, "{kind}");
        }
    }

    fn routes_reported(watch: &mut Watch) -> (usize, bool) {
        let (mut routes, mut lost) = (0, false);
        // More than there are.
        watch.read(100_000, &mut |event| match event {
            Event::Route(route) if route.protocol == PROTOCOL => routes += 1,
            Event::Lost => lost = true,
            _ => {}
        });
        (routes, lost)
    }

    #[test]
    fn changes_by_others_are_reported_and_so_are_lost_events() {
        let namespace = Namespace::new().unwrap();
        let mut own = namespace.netlink().unwrap();
        let mut other = namespace.netlink().unwrap();
        let mut watch = namespace.run(|| Watch::open(&own)).unwrap();
        let loopback = own.link_index("lo").unwrap().unwrap();
        let add = |netlink: &mut Netlink, second: u8| {
            let prefix = |third| format!("10.{second}.{third}.0/24").parse().unwrap();
            let changes: Vec<_> = (0..250)
                .map(|third| RouteChange::Add(prefix(third)))
                .collect();
            let refused = netlink.change_device_routes(loopback, &changes);
            assert!(refused.unwrap().is_empty());
        };
        add(&mut own, 1);
        assert_eq!(routes_reported(&mut watch), (0, false));
        add(&mut other, 2);
        assert_eq!(routes_reported(&mut watch), (250, false));
        watch.shrink();
        add(&mut other, 3);
        let (reported, lost) = routes_reported(&mut watch);
        assert!(reported < 250 && lost, "{reported} {lost}");
    }
}
