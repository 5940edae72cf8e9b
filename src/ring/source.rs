//! The two sides that data comes from, and what has arrived from them.
//!
//! A source is normally a multishot request that fills provided buffers. Where
//! the kernel lacks that request, the source is polled instead and read by
//! system calls until it is empty.

use std::collections::VecDeque;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, BorrowedFd};

use io_uring::types::{Fd, RecvMsgOut};
use io_uring::{Submitter, cqueue, opcode, squeue};

use super::buffers::BufferRing;
use super::token::Token;
use crate::error::Result;
use crate::io::message::{self, PAYLOAD_START};
use crate::io::{queue_error, socket_error};
use crate::packet::virtio;
use crate::worker::counters::Counters;
use crate::worker::engine::{Event, Received, Source};

/// Receive buffers on each side. Few of them are with the kernel at a time when
/// they are filled to the brim; see [`super::buffers`].
pub const BUFFERS: u16 = 32;

/// Bytes of a receive buffer: the longest frame or datagram with its headers.
/// The odd cache line keeps the starts of neighbouring buffers from falling
/// into the same cache sets.
pub const BUFFER_BYTES: usize = (64 << 10) + 192;
const _: () = assert!(BUFFER_BYTES >= virtio::HEADER_BYTES + 65536);
const _: () = assert!(BUFFER_BYTES >= PAYLOAD_START + 65535);

const TUN_GROUP: u16 = 0;
const UDP_GROUP: u16 = 1;

/// Which multishot requests to use.
#[derive(Clone, Copy, Debug)]
pub struct Wanted {
    pub read_multishot: bool,
    pub receive_multishot: bool,
}

/// Where a side's receive buffers are.
enum Buffers {
    /// With the kernel, for a multishot request.
    Ring(BufferRing),
    /// Here, for system calls; by id, `None` while the caller has it.
    Pool(Vec<(u16, Box<[u8]>)>),
}

/// One side.
pub struct Side {
    buffers: Buffers,
    armed: bool,
}

impl Side {
    fn new(submitter: &Submitter<'_>, group: u16, multishot: bool) -> io::Result<Self> {
        let buffers = if multishot {
            Buffers::Ring(BufferRing::register(
                submitter,
                group,
                BUFFERS,
                BUFFER_BYTES,
            )?)
        } else {
            Buffers::Pool(pool())
        };
        Ok(Self {
            buffers,
            armed: false,
        })
    }

    /// Whether a multishot request is in use.
    pub fn is_multishot(&self) -> bool {
        matches!(self.buffers, Buffers::Ring(_))
    }

    fn available(&self) -> usize {
        match &self.buffers {
            Buffers::Ring(ring) => ring.available(),
            Buffers::Pool(pool) => pool.len(),
        }
    }

    /// Makes as many buffers available as the side shall have.
    fn provide(&mut self) {
        if let Buffers::Ring(ring) = &mut self.buffers {
            ring.provide();
        }
    }

    fn give_back(&mut self, id: u16, buffer: Box<[u8]>) {
        match &mut self.buffers {
            Buffers::Ring(ring) => ring.give_back(id, buffer),
            Buffers::Pool(pool) => pool.push((id, buffer)),
        }
    }

    /// The buffer that a multishot completion filled.
    fn filled(&mut self, completion: &cqueue::Entry) -> Option<(u16, Box<[u8]>)> {
        let id = cqueue::buffer_select(completion.flags())?;
        let bytes = usize::try_from(completion.result()).ok()?;
        match &mut self.buffers {
            Buffers::Ring(ring) => Some((id, ring.take(id, bytes)?)),
            Buffers::Pool(_) => None,
        }
    }
}

fn pool() -> Vec<(u16, Box<[u8]>)> {
    (0..BUFFERS)
        .map(|id| (id, vec![0; BUFFER_BYTES].into_boxed_slice()))
        .collect()
}

/// A received train that waits for the worker.
struct Datagrams {
    received: Received,
    sender: IpAddr,
    segment_bytes: usize,
}

/// Both sides and their arrivals.
pub struct Sources {
    pub tun: Side,
    pub udp: Side,
    /// A frame has been read: the request itself is one that the kernel knows.
    tun_has_read: bool,
    frames: VecDeque<Received>,
    datagrams: VecDeque<Datagrams>,
    /// Whose turn it is when both sides have something.
    tun_is_next: bool,
    /// What the multishot receive was given; the kernel reads it once, at the
    /// start of each request.
    template: Box<libc::msghdr>,
}

// SAFETY: the template's pointers are null.
unsafe impl Send for Sources {}

impl Sources {
    pub fn new(submitter: &Submitter<'_>, wanted: Wanted) -> io::Result<Self> {
        Ok(Self {
            tun: Side::new(submitter, TUN_GROUP, wanted.read_multishot)?,
            udp: Side::new(submitter, UDP_GROUP, wanted.receive_multishot)?,
            tun_has_read: false,
            frames: VecDeque::with_capacity(usize::from(BUFFERS)),
            datagrams: VecDeque::with_capacity(usize::from(BUFFERS)),
            tun_is_next: true,
            template: message::receive_template(),
        })
    }

    /// Whether a request of either side is under way.
    pub fn is_armed(&self) -> bool {
        self.tun.armed || self.udp.armed
    }

    pub fn unregister(&mut self, submitter: &Submitter<'_>) {
        for side in [&self.tun, &self.udp] {
            if let Buffers::Ring(ring) = &side.buffers {
                let _ = ring.unregister(submitter);
            }
        }
    }

    /// The request that has the TUN queue read, unless it is under way or
    /// there is no buffer to read into.
    pub fn arm_tun(&mut self, queue: BorrowedFd<'_>) -> Option<squeue::Entry> {
        self.tun.provide();
        if self.tun.armed || self.tun.available() == 0 {
            return None;
        }
        self.tun.armed = true;
        let fd = Fd(queue.as_raw_fd());
        let entry = match &self.tun.buffers {
            Buffers::Ring(ring) => opcode::ReadMulti::new(fd, 0, ring.group()).build(),
            Buffers::Pool(_) => opcode::PollAdd::new(fd, libc::POLLIN as u32).build(),
        };
        Some(entry.user_data(Token::TunRead.to_user_data()))
    }

    /// As [`Self::arm_tun`] for the UDP socket.
    pub fn arm_udp(&mut self, socket: BorrowedFd<'_>) -> Option<squeue::Entry> {
        self.udp.provide();
        if self.udp.armed || self.udp.available() == 0 {
            return None;
        }
        self.udp.armed = true;
        let fd = Fd(socket.as_raw_fd());
        let entry = match &self.udp.buffers {
            Buffers::Ring(ring) => {
                opcode::RecvMsgMulti::new(fd, &raw const *self.template, ring.group()).build()
            }
            Buffers::Pool(_) => opcode::PollAdd::new(fd, libc::POLLIN as u32).build(),
        };
        Some(entry.user_data(Token::UdpReceive.to_user_data()))
    }

    /// A frame, or the news that there is one.
    #[inline]
    pub fn tun_completed(
        &mut self,
        completion: &cqueue::Entry,
        queue: BorrowedFd<'_>,
        counters: &Counters,
    ) -> Result<()> {
        self.tun.armed = cqueue::more(completion.flags());
        let result = completion.result();
        if result < 0 {
            return match -result {
                libc::ENOBUFS => {
                    counters.rearmed.add(1);
                    Ok(())
                }
                libc::EAGAIN | libc::EINTR | libc::ENOMEM | libc::ECANCELED => Ok(()),
                // A frame that the driver could not describe; it is gone.
                libc::EINVAL if self.tun_has_read => {
                    counters.drop_frame_malformed.add(1);
                    Ok(())
                }
                libc::EINVAL | libc::EOPNOTSUPP if self.tun.is_multishot() => {
                    tracing::warn!("multishot read of the TUN queue refused: polling it instead");
                    self.tun.buffers = Buffers::Pool(pool());
                    Ok(())
                }
                errno => Err(queue_error(errno)),
            };
        }
        self.tun_has_read = true;
        if let Some((id, buffer)) = self.tun.filled(completion) {
            let end = buffer.len().min(result as usize);
            self.frames.push_back(Received {
                buffer,
                start: 0,
                end,
                id,
            });
            return Ok(());
        }
        self.read_tun(queue, counters)
    }

    /// A train, or the news that there is one.
    #[inline]
    pub fn udp_completed(
        &mut self,
        completion: &cqueue::Entry,
        socket: BorrowedFd<'_>,
        counters: &Counters,
    ) -> Result<()> {
        self.udp.armed = cqueue::more(completion.flags());
        let result = completion.result();
        if result < 0 {
            return match -result {
                libc::ENOBUFS => {
                    counters.rearmed.add(1);
                    Ok(())
                }
                libc::EINVAL | libc::EOPNOTSUPP if self.udp.is_multishot() => {
                    tracing::warn!("multishot receive refused: polling the UDP socket instead");
                    self.udp.buffers = Buffers::Pool(pool());
                    Ok(())
                }
                errno @ (libc::EBADF | libc::ENOTSOCK | libc::EFAULT | libc::EINVAL) => {
                    Err(socket_error(errno))
                }
                // What the network says of earlier sends (ECONNREFUSED,
                // EHOSTUNREACH ...) is no reason to stop.
                _ => Ok(()),
            };
        }
        if let Some((id, buffer)) = self.udp.filled(completion) {
            self.received(id, buffer, result as usize, counters);
            return Ok(());
        }
        self.receive_udp(socket, counters)
    }

    /// Takes in what a multishot receive put into a buffer.
    #[inline]
    fn received(&mut self, id: u16, buffer: Box<[u8]>, filled: usize, counters: &Counters) {
        let end = buffer.len().min(filled);
        let parsed = RecvMsgOut::parse(&buffer[..end], &self.template)
            .ok()
            .filter(|out| !out.is_payload_truncated())
            .and_then(|out| {
                let sender = message::parse_name(out.name_data())?;
                Some((sender, message::parse_segment_bytes(out.control_data())))
            });
        match parsed {
            Some((sender, segment_bytes)) => self.datagrams.push_back(Datagrams {
                segment_bytes: segment_bytes.unwrap_or(end - PAYLOAD_START),
                sender,
                received: Received {
                    buffer,
                    start: PAYLOAD_START,
                    end,
                    id,
                },
            }),
            None => {
                counters.drop_truncated.add(1);
                self.udp.give_back(id, buffer);
            }
        }
    }

    /// Whether [`Self::next_event`] has one. `with_frames`: also from the TUN.
    #[inline]
    pub fn has_event(&self, with_frames: bool) -> bool {
        !self.datagrams.is_empty() || (with_frames && !self.frames.is_empty())
    }

    /// The next arrival, from both sides in turn.
    #[inline]
    pub fn next_event(&mut self, with_frames: bool) -> Option<Event> {
        let tun = with_frames && !self.frames.is_empty();
        if tun && (self.tun_is_next || self.datagrams.is_empty()) {
            self.tun_is_next = false;
            return self.frames.pop_front().map(Event::Frame);
        }
        self.tun_is_next = true;
        self.datagrams
            .pop_front()
            .map(|datagrams| Event::Datagrams {
                received: datagrams.received,
                sender: datagrams.sender,
                segment_bytes: datagrams.segment_bytes,
            })
    }

    #[inline]
    pub fn recycle(&mut self, received: Received, source: Source) {
        let side = match source {
            Source::Tun => &mut self.tun,
            Source::Udp => &mut self.udp,
        };
        side.give_back(received.id, received.buffer);
    }

    /// Reads frames by system call until there is none or no buffer.
    fn read_tun(&mut self, queue: BorrowedFd<'_>, counters: &Counters) -> Result<()> {
        let Buffers::Pool(pool) = &mut self.tun.buffers else {
            return Ok(());
        };
        while let Some((id, mut buffer)) = pool.pop() {
            match nix::unistd::read(queue, &mut buffer) {
                Ok(end) => self.frames.push_back(Received {
                    buffer,
                    start: 0,
                    end,
                    id,
                }),
                Err(error) => {
                    pool.push((id, buffer));
                    return match error as i32 {
                        libc::EINVAL => {
                            counters.drop_frame_malformed.add(1);
                            Ok(())
                        }
                        libc::EAGAIN | libc::EINTR | libc::ENOMEM => Ok(()),
                        errno => Err(queue_error(errno)),
                    };
                }
            }
        }
        Ok(())
    }

    /// Receives by system call until there is nothing or no buffer.
    fn receive_udp(&mut self, socket: BorrowedFd<'_>, counters: &Counters) -> Result<()> {
        let Buffers::Pool(pool) = &mut self.udp.buffers else {
            return Ok(());
        };
        while let Some((id, mut buffer)) = pool.pop() {
            match message::receive(socket, &mut buffer) {
                Ok(Some(message)) => self.datagrams.push_back(Datagrams {
                    received: Received {
                        buffer,
                        start: PAYLOAD_START,
                        end: message.end,
                        id,
                    },
                    sender: message.sender,
                    segment_bytes: message.segment_bytes.unwrap_or(message.end - PAYLOAD_START),
                }),
                Ok(None) => {
                    counters.drop_truncated.add(1);
                    pool.push((id, buffer));
                }
                Err(error) => {
                    pool.push((id, buffer));
                    let errno = error.raw_os_error().unwrap_or(0);
                    return match errno {
                        libc::EBADF | libc::ENOTSOCK | libc::EFAULT => Err(socket_error(errno)),
                        _ => Ok(()),
                    };
                }
            }
        }
        Ok(())
    }
}
