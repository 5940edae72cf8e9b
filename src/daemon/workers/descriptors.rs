//! Further descriptors of what each worker has: to start it again, to hand it
//! over to another process, and to ask the kernel about its sockets.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use socket2::{SockRef, Socket};

use crate::error::{Error, Result};
use crate::io::tun::Queue;
use crate::io::udp::Port;
use crate::io::udp::WorkerSockets;
use crate::packet::probe::Probe;

/// Descriptors of one worker.
pub struct WorkerFds {
    queue: OwnedFd,
    receive: OwnedFd,
    send: Option<OwnedFd>,
    own_port: Option<u16>,
}

impl WorkerFds {
    /// Its TUN queue.
    pub fn queue(&self) -> BorrowedFd<'_> {
        self.queue.as_fd()
    }

    /// Its socket to receive from.
    pub fn receive(&self) -> BorrowedFd<'_> {
        self.receive.as_fd()
    }

    /// Its socket to send from, if it has a port of its own.
    pub fn send(&self) -> Option<BorrowedFd<'_>> {
        self.send.as_ref().map(AsFd::as_fd)
    }

    /// Duplicates of all of them.
    fn duplicate(
        queue: BorrowedFd<'_>,
        receive: BorrowedFd<'_>,
        send: Option<BorrowedFd<'_>>,
    ) -> Result<Self> {
        let duplicate = || -> io::Result<Self> {
            Ok(Self {
                queue: queue.try_clone_to_owned()?,
                receive: receive.try_clone_to_owned()?,
                send: send.map(|send| send.try_clone_to_owned()).transpose()?,
                own_port: send.and_then(|send| {
                    let address = SockRef::from(&send).local_addr().ok()?;
                    Some(address.as_socket()?.port())
                }),
            })
        };
        duplicate().map_err(|error| {
            Error::os("cannot duplicate a descriptor", error)
                .hint("raise the limit on open files (ulimit -n), or ask for fewer --queues")
        })
    }

    /// Duplicates of what a worker is about to have.
    ///
    /// # Errors
    /// When there are no more descriptors.
    pub fn of(queue: &Queue, sockets: &WorkerSockets) -> Result<Self> {
        let send = sockets.send.as_ref().map(AsFd::as_fd);
        Self::duplicate(queue.as_fd(), sockets.receive.as_fd(), send)
    }

    /// What a worker that starts again needs.
    ///
    /// # Errors
    /// When there are no more descriptors.
    pub fn for_worker(&self) -> Result<(Queue, WorkerSockets)> {
        let copy = Self::duplicate(self.queue(), self.receive(), self.send())?;
        let sockets = WorkerSockets {
            receive: copy.receive.into(),
            send: copy.send.map(Socket::from),
        };
        Ok((Queue::from(copy.queue), sockets))
    }

    /// The worker's own port, if it has one.
    pub fn own_port(&self) -> Option<u16> {
        self.own_port
    }

    /// Those of a worker with a port of its own on the loopback interface, and
    /// without a device.
    #[cfg(test)]
    pub fn on_loopback() -> Self {
        let socket = || std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let send = socket();
        Self {
            queue: socket().into(),
            receive: socket().into(),
            own_port: Some(send.local_addr().unwrap().port()),
            send: Some(send.into()),
        }
    }

    /// Sends a probe. Whether it arrives is for the answer to tell.
    pub fn send_probe(&self, from: Port, probe: Probe, to: SocketAddr) {
        let socket = match &self.send {
            Some(send) if from == Port::Own => send,
            _ => &self.receive,
        };
        let (packet, flags) = (probe.to_packet(0), libc::MSG_DONTWAIT);
        let sent = SockRef::from(socket).send_to_with_flags(&packet, &to.into(), flags);
        if let Err(error) = sent {
            tracing::debug!("no probe to {to}: {error}");
        }
    }
}
