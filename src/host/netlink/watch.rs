//! What others change: notifications of routes, addresses and links, as
//! `ip monitor` shows them.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use netlink_packet_core::NlasIterator;
use netlink_sys::Socket;
use netlink_sys::protocols::NETLINK_ROUTE;
use nix::sys::socket::{setsockopt, sockopt};
use socket2::{SockFilter, SockRef};

use super::device_route::RouteEntry;
use super::{HEADER_BYTES, Netlink, RECEIVE_BYTES, RawHeader, split_message};
use crate::error::{Error, Result};

/// Notifications wait here while their reader is busy; a thousand take up about
/// a megabyte. Those that do not fit are lost, and the reader is told.
const QUEUE_BYTES: usize = 8 << 20;

/// Where the port of who asked for a change stands in `struct nlmsghdr`.
const PORT_AT: u32 = 12;

// Of `struct ifinfomsg` (linux/rtnetlink.h).
const IFINFOMSG_BYTES: usize = 16;

// Of `struct ifaddrmsg` (linux/if_addr.h).
const IFADDRMSG_BYTES: usize = 8;

/// One piece of news.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum News {
    /// A route was added or has replaced another, of which the kernel says
    /// nothing.
    RouteAdded(RouteEntry),
    /// A route was deleted. For IPv4 routes that go because an interface goes
    /// down or loses its last IPv4 address there is no such news
    /// (`fib_sync_down_dev()` in net/ipv4/fib_semantics.c).
    RouteDeleted(RouteEntry),
    /// An interface has got or lost an address, or an address has changed.
    Address {
        /// The interface's index.
        index: u32,
    },
    /// An interface was made or has changed.
    Link {
        /// Its index.
        index: u32,
        /// Whether it is administratively up.
        up: bool,
        /// Its MTU in bytes, if it is told.
        mtu_bytes: Option<u32>,
    },
    /// An interface is gone.
    LinkDeleted {
        /// The index that it had.
        index: u32,
    },
    /// There was more news than there was room: anything may have changed.
    Lost,
}

/// A socket that hears of changes to routes, addresses and links in its namespace.
pub struct Watch {
    socket: Socket,
    buffer: Vec<u8>,
}

impl Watch {
    /// Subscribes, in the calling thread's network namespace. Changes that
    /// `own` asks for are not told.
    ///
    /// # Errors
    /// When the kernel gives no netlink socket or refuses the subscription.
    pub fn open(own: &Netlink) -> Result<Self> {
        Self::open_socket(own).map_err(|cause| {
            let what = "cannot watch routes, addresses and links (netlink multicast)";
            Error::os(what, cause)
        })
    }

    fn open_socket(own: &Netlink) -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        // Before the subscription, so that nothing slips through.
        SockRef::from(&socket).attach_filter(&all_but_changes_of(own.port()?))?;
        // Beyond net.core.rmem_max it takes CAP_NET_ADMIN of the initial user
        // namespace. With less room news is lost sooner, and said to be.
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

    /// Gives news so little room that some is lost.
    #[cfg(test)]
    pub(crate) fn shrink(&self) {
        SockRef::from(&self.socket)
            .set_recv_buffer_size(4096)
            .unwrap();
    }

    /// Puts a socket in its place that cannot be read from.
    #[cfg(test)]
    pub(crate) fn break_socket(&mut self) {
        use std::os::fd::AsRawFd;
        let (domain, kind) = (socket2::Domain::IPV4, socket2::Type::STREAM);
        let broken = socket2::Socket::new(domain, kind, None).unwrap();
        // SAFETY: both are open, and the socket goes on to own its descriptor.
        let replaced = unsafe { libc::dup2(broken.as_raw_fd(), self.socket.as_raw_fd()) };
        assert!(replaced >= 0);
    }

    /// Reads what has come so far, at most `datagrams_max` datagrams, without
    /// waiting. `true` if there may be more.
    ///
    /// # Errors
    /// When the socket fails. News may be lost then, also if it works again.
    pub fn read(&mut self, datagrams_max: usize, visit: &mut dyn FnMut(News)) -> Result<bool> {
        for _ in 0..datagrams_max {
            match self
                .socket
                .recv_from(&mut &mut self.buffer[..], libc::MSG_TRUNC)
            {
                // Port 0 is the kernel; any process may send to our port.
                Ok((_, from)) if from.port_number() != 0 => {}
                Ok((length, _)) if length > self.buffer.len() => visit(News::Lost),
                Ok((length, _)) => {
                    let mut rest = &self.buffer[..length];
                    while let Some((one, tail)) = split_message(rest) {
                        rest = tail;
                        if let Some(news) = read_news(one) {
                            visit(news);
                        }
                    }
                }
                Err(error) => match error.raw_os_error() {
                    Some(libc::EAGAIN) => return Ok(false),
                    Some(libc::EINTR) => {}
                    Some(libc::ENOBUFS) => visit(News::Lost),
                    _ => return Err(Error::os("cannot hear of changes to routes", error)),
                },
            }
        }
        Ok(true)
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

pub(super) fn read_news(message: &[u8]) -> Option<News> {
    let body = message.get(HEADER_BYTES..)?;
    match RawHeader::read(message).kind {
        libc::RTM_NEWROUTE => RouteEntry::parse(body).map(News::RouteAdded),
        libc::RTM_DELROUTE => RouteEntry::parse(body).map(News::RouteDeleted),
        libc::RTM_NEWADDR | libc::RTM_DELADDR => {
            let header = body.get(..IFADDRMSG_BYTES)?;
            let index = u32::from_ne_bytes(header[4..].try_into().ok()?);
            Some(News::Address { index })
        }
        libc::RTM_NEWLINK => {
            let (index, flags) = read_link(body)?;
            let up = flags & libc::IFF_UP as u32 != 0;
            let mtu_bytes = read_mtu(&body[IFINFOMSG_BYTES..]);
            Some(News::Link {
                index,
                up,
                mtu_bytes,
            })
        }
        // A port that leaves a bridge is told as a deleted link, too; the
        // device itself has no family (`br_ifinfo_notify()`).
        libc::RTM_DELLINK if body.first() == Some(&(libc::AF_UNSPEC as u8)) => {
            let (index, _) = read_link(body)?;
            Some(News::LinkDeleted { index })
        }
        _ => None,
    }
}

/// Index and flags in `struct ifinfomsg`.
fn read_link(body: &[u8]) -> Option<(u32, u32)> {
    let header = body.get(..IFINFOMSG_BYTES)?;
    let word = |at: usize| Some(u32::from_ne_bytes(header[at..at + 4].try_into().ok()?));
    Some((word(4)?, word(8)?))
}

fn read_mtu(attributes: &[u8]) -> Option<u32> {
    let mut attributes = NlasIterator::new(attributes).map_while(|attribute| attribute.ok());
    let mtu = attributes.find(|attribute| attribute.kind() == libc::IFLA_MTU)?;
    Some(u32::from_ne_bytes(mtu.value().try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::netlink::device_route::{DeviceRoute, RouteChange};
    use crate::testbed::Namespace;

    #[test]
    fn garbage_is_no_news() {
        assert_eq!(read_news(&[0; HEADER_BYTES]), None);
        for kind in [
            libc::RTM_NEWROUTE,
            libc::RTM_NEWADDR,
            libc::RTM_NEWLINK,
            libc::RTM_DELLINK,
        ] {
            let mut message = vec![0; HEADER_BYTES + 7];
            message[4..6].copy_from_slice(&kind.to_ne_bytes());
            assert_eq!(read_news(&message), None, "{kind}");
        }
    }

    fn routes_told(watch: &mut Watch) -> (usize, bool) {
        let (mut routes, mut lost) = (0, false);
        let mut count = |news| match news {
            News::RouteAdded(entry) if entry.protocol == 99 => routes += 1,
            News::Lost => lost = true,
            _ => {}
        };
        while watch.read(100, &mut count).unwrap() {}
        (routes, lost)
    }

    #[test]
    fn own_changes_are_not_told_those_of_others_are_and_lost_news_is_said_to_be() {
        let namespace = Namespace::new().unwrap();
        let mut own = namespace.netlink().unwrap();
        let mut other = namespace.netlink().unwrap();
        let mut watch = namespace.run(|| Watch::open(&own)).unwrap();
        let route = DeviceRoute {
            oif: own.link_index("lo").unwrap().unwrap(),
            protocol: 99,
        };
        let block = |second: u8| -> Vec<RouteChange> {
            let prefix = |third| format!("10.{second}.{third}.0/24").parse().unwrap();
            (0..250)
                .map(|third| RouteChange::Add(prefix(third)))
                .collect()
        };
        assert!(
            own.change_device_routes(route, &block(1))
                .unwrap()
                .is_empty()
        );
        assert_eq!(routes_told(&mut watch), (0, false));
        assert!(
            other
                .change_device_routes(route, &block(2))
                .unwrap()
                .is_empty()
        );
        assert_eq!(routes_told(&mut watch), (250, false));
        watch.shrink();
        assert!(
            other
                .change_device_routes(route, &block(3))
                .unwrap()
                .is_empty()
        );
        let (told, lost) = routes_told(&mut watch);
        assert!(told < 250 && lost, "{told} {lost}");
    }
}
