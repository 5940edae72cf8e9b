//! What a worker waits for: its TUN queue, its UDP socket, the control thread,
//! and at times room in the UDP socket's send buffer.

use nix::errno::Errno;
use nix::sys::epoll::{self, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::EventFd;

use crate::io::engine::Port;
use crate::io::tun::Queue;
use crate::io::udp::WorkerSockets;

/// Descriptors watched at most.
const WATCHED_MAX: usize = 4;

const TUN: u64 = 0;
const UDP: u64 = 1;
const WAKE: u64 = 2;
/// The socket on the worker's own port.
const SENDER: u64 = 3;

/// Whatever is amiss with a descriptor, reading or writing it will tell.
const AMISS: EpollFlags = EpollFlags::EPOLLERR.union(EpollFlags::EPOLLHUP);

/// Data has come since it was last asked for.
const ARRIVALS: EpollFlags = EpollFlags::EPOLLIN.union(EpollFlags::EPOLLET);

/// What has become ready.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ready {
    /// There may be frames.
    pub tun: bool,
    /// There may be datagrams.
    pub udp: bool,
    /// The control thread has a command.
    pub wake: bool,
    /// The send buffer that is watched has room.
    pub room: bool,
}

/// See the module's documentation.
pub struct Interest {
    epoll: epoll::Epoll,
    /// The socket on this port is watched for room to send.
    room_watched: Option<Port>,
}

impl Interest {
    pub fn new(queue: &Queue, sockets: &WorkerSockets, wake: &EventFd) -> Result<Self, Errno> {
        let epoll = epoll::Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        epoll.add(queue, EpollEvent::new(ARRIVALS, TUN))?;
        epoll.add(&sockets.receive, EpollEvent::new(ARRIVALS, UDP))?;
        epoll.add(wake, EpollEvent::new(ARRIVALS, WAKE))?;
        Ok(Self {
            epoll,
            room_watched: None,
        })
    }

    /// Which socket's room to send to report, if any.
    ///
    /// Not as an edge, so that none can be missed, and not all the time: the
    /// kernel would wake the worker for each datagram that has left.
    #[inline]
    pub fn watch_room(&mut self, sockets: &WorkerSockets, port: Option<Port>) -> Result<(), Errno> {
        if self.room_watched == port {
            return Ok(());
        }
        if let Some(old) = self.room_watched.take() {
            self.set_room_watch(sockets, old, false)?;
        }
        if let Some(new) = port {
            self.set_room_watch(sockets, new, true)?;
        }
        self.room_watched = port;
        Ok(())
    }

    fn set_room_watch(
        &self,
        sockets: &WorkerSockets,
        port: Port,
        watch: bool,
    ) -> Result<(), Errno> {
        let room = EpollFlags::EPOLLOUT;
        let own = sockets.send.as_ref().filter(|_| port == Port::Own);
        match (own, watch) {
            (Some(send), true) => self.epoll.add(send, EpollEvent::new(room, SENDER)),
            (Some(send), false) => self.epoll.delete(send),
            (None, _) => {
                let flags = if watch {
                    EpollFlags::EPOLLIN | room
                } else {
                    ARRIVALS
                };
                let mut event = EpollEvent::new(flags, UDP);
                self.epoll.modify(&sockets.receive, &mut event)
            }
        }
    }

    /// What has become ready since the last call, as soon as there is anything,
    /// or when `timeout` is over.
    pub fn wait(&self, timeout: EpollTimeout) -> Result<Ready, Errno> {
        let mut events = [EpollEvent::empty(); WATCHED_MAX];
        let count = match self.epoll.wait(&mut events, timeout) {
            Err(Errno::EINTR) => 0,
            result => result?,
        };
        let mut ready = Ready::default();
        for event in &events[..count] {
            let is = |flags| event.events().intersects(AMISS.union(flags));
            match event.data() {
                TUN => ready.tun = true,
                UDP => {
                    ready.udp |= is(EpollFlags::EPOLLIN);
                    ready.room |= is(EpollFlags::EPOLLOUT);
                }
                WAKE => ready.wake = true,
                _ => ready.room = true,
            }
        }
        Ok(ready)
    }
}
