//! The two sides that data comes from, and what has arrived from them.
//!
//! The TUN queue is read by system calls until it is empty, and then polled
//! through the ring. A multishot read (`IORING_OP_READ_MULTISHOT`, Linux 6.7)
//! would spare the calls, but a TUN device gives one frame a read either way,
//! and what the multishot costs per frame (a poll, a buffer picked, a
//! completion posted) is more than the call; what is worse, it reads up to a
//! mebibyte ahead, out of the second-level cache, before the worker sees the
//! first frame. Medians of six, in turn, of its throughput to that of calls:
//! 0.93 on one TCP stream, 0.92 to 0.97 on four, 0.99 to 1.04 on 64-byte UDP.
//!
//! The UDP socket is received from by a multishot request that fills provided
//! buffers (Linux 6.0, and so wherever there is a ring).

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, BorrowedFd};

use io_uring::types::{Fd, RecvMsgOut};
use io_uring::{Submitter, cqueue, opcode, squeue};

use super::buffers::BufferRing;
use super::token::Token;
use crate::counters::Counters;
use crate::error::Result;
use crate::io::engine::{Event, Received, Source};
use crate::io::message::{self, PAYLOAD_START};
use crate::io::{FAILURES_MAX, queue_error, socket_error};
use crate::packet::virtio;

/// Receive buffers of a multishot request. Few of them are with the kernel at
/// a time when they are filled to the brim; see [`super::buffers`].
pub const MULTISHOT_BUFFERS: u16 = 32;

/// Receive buffers of a side that is read by system calls: one that waits for
/// the worker, one that the worker has.
pub const CALL_BUFFERS: u16 = 2;

/// Bytes of a receive buffer: the longest frame or datagram with its headers.
/// The odd cache line keeps the starts of neighbouring buffers from falling
/// into the same cache sets.
pub const BUFFER_BYTES: usize = (64 << 10) + 192;
const _: () = assert!(BUFFER_BYTES >= virtio::HEADER_BYTES + 65536);
const _: () = assert!(BUFFER_BYTES >= PAYLOAD_START + 65535);

const UDP_GROUP: u16 = 0;

/// A side that is read by system calls until it is empty.
struct Calls {
    /// Last in, first out: the buffer used last is warmest.
    free: Vec<(u16, Box<[u8]>)>,
    /// There may be something to read: the kernel has said so, and it has not
    /// been found empty since.
    ready: bool,
    /// A poll is under way.
    armed: bool,
}

impl Calls {
    fn new() -> Self {
        Self {
            free: (0..CALL_BUFFERS)
                .map(|id| (id, vec![0; BUFFER_BYTES].into_boxed_slice()))
                .collect(),
            // It is tried before it is waited for.
            ready: true,
            armed: false,
        }
    }

    /// The poll that says when there is something again, unless it is under
    /// way or not needed.
    fn arm(&mut self, fd: Fd, token: Token) -> Option<squeue::Entry> {
        if self.ready || self.armed {
            return None;
        }
        self.armed = true;
        let poll = opcode::PollAdd::new(fd, libc::POLLIN as u32).build();
        Some(poll.user_data(token.to_user_data()))
    }

    fn polled(&mut self) {
        self.armed = false;
        self.ready = true;
    }
}

/// A received train that waits for the worker.
struct Datagrams {
    received: Received,
    sender: SocketAddr,
    segment_bytes: usize,
}

/// Both sides and their arrivals.
pub struct Sources {
    tun: Calls,
    /// What the multishot receive fills.
    buffers: BufferRing,
    /// It is under way.
    receive_armed: bool,
    /// A frame that waits for the worker.
    frame: Option<Received>,
    datagrams: VecDeque<Datagrams>,
    /// Whose turn it is when both sides have something.
    tun_is_next: bool,
    /// Reads in a row that failed for no reason known.
    failures: u32,
    /// What the multishot receive was given; the kernel reads it once, at the
    /// start of each request.
    template: Box<libc::msghdr>,
}

// SAFETY: the template's pointers are null.
unsafe impl Send for Sources {}

impl Sources {
    pub fn new(submitter: &Submitter<'_>) -> io::Result<Self> {
        Ok(Self {
            tun: Calls::new(),
            buffers: BufferRing::register(submitter, UDP_GROUP, MULTISHOT_BUFFERS, BUFFER_BYTES)?,
            receive_armed: false,
            frame: None,
            datagrams: VecDeque::with_capacity(usize::from(MULTISHOT_BUFFERS)),
            tun_is_next: true,
            failures: 0,
            template: message::receive_template(),
        })
    }

    /// Whether a request of either side is under way.
    pub fn is_armed(&self) -> bool {
        self.tun.armed || self.receive_armed
    }

    /// Takes the buffers back from the kernel, when no request uses them.
    pub fn unregister(&self, submitter: &Submitter<'_>) {
        let _ = self.buffers.unregister(submitter);
    }

    /// The request that tells of frames, unless it is under way or not needed.
    pub fn arm_tun(&mut self, queue: BorrowedFd<'_>) -> Option<squeue::Entry> {
        self.tun.arm(Fd(queue.as_raw_fd()), Token::TunPoll)
    }

    /// The request that receives datagrams, unless it is under way or there is
    /// no buffer to receive into.
    pub fn arm_udp(&mut self, socket: BorrowedFd<'_>) -> Option<squeue::Entry> {
        self.buffers.provide();
        if self.receive_armed || self.buffers.available() == 0 {
            return None;
        }
        self.receive_armed = true;
        let fd = Fd(socket.as_raw_fd());
        let entry = opcode::RecvMsgMulti::new(fd, &raw const *self.template, self.buffers.group());
        Some(entry.build().user_data(Token::UdpReceive.to_user_data()))
    }

    /// There is a frame, or an error to be found by reading.
    #[inline]
    pub fn tun_polled(&mut self) {
        self.tun.polled();
    }

    /// A received train.
    #[inline]
    pub fn udp_completed(&mut self, completion: &cqueue::Entry, counters: &Counters) -> Result<()> {
        self.receive_armed = cqueue::more(completion.flags());
        let result = completion.result();
        let Ok(filled) = usize::try_from(result) else {
            return match -result {
                libc::ENOBUFS => {
                    counters.rearmed.add(1);
                    Ok(())
                }
                errno @ (libc::EBADF
                | libc::ENOTSOCK
                | libc::EFAULT
                | libc::EINVAL
                | libc::EOPNOTSUPP) => Err(socket_error(errno)),
                // What the network says of earlier sends (ECONNREFUSED,
                // EHOSTUNREACH ...) is no reason to stop.
                _ => {
                    self.failed_oddly(counters);
                    Ok(())
                }
            };
        };
        self.failures = 0;
        let Some(id) = cqueue::buffer_select(completion.flags()) else {
            return Ok(());
        };
        let Some(buffer) = self.buffers.take(id, filled) else {
            return Ok(());
        };
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
                self.buffers.give_back(id, buffer);
            }
        }
        Ok(())
    }

    /// A read failed, and the next one may do better.
    #[cold]
    fn failed_oddly(&mut self, counters: &Counters) {
        counters.receive_failed.add(1);
        self.failures = self.failures.saturating_add(1);
    }

    /// Whether nothing but failures has come of many reads.
    pub fn is_failing(&self) -> bool {
        self.failures >= FAILURES_MAX
    }

    /// Whether [`Self::next_event`] has one. `with_frames`: also from the TUN.
    #[inline]
    pub fn has_event(&self, with_frames: bool) -> bool {
        !self.datagrams.is_empty() || (with_frames && self.frame.is_some())
    }

    /// Whether a side may have something that [`Self::refill`] has yet to read.
    #[inline]
    pub fn may_refill(&self, with_frames: bool) -> bool {
        with_frames && self.tun.ready
    }

    /// The next arrival, from both sides in turn.
    #[inline]
    pub fn next_event(&mut self, with_frames: bool) -> Option<Event> {
        if with_frames
            && (self.tun_is_next || self.datagrams.is_empty())
            && let Some(frame) = self.frame.take()
        {
            self.tun_is_next = false;
            return Some(Event::Frame(frame));
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

    /// Takes a buffer back from the worker.
    #[inline]
    pub fn recycle(&mut self, received: Received, source: Source) {
        let Received { id, buffer, .. } = received;
        match source {
            Source::Tun => self.tun.free.push((id, buffer)),
            Source::Udp => self.buffers.give_back(id, buffer),
        }
    }

    /// Reads a frame, if none waits and there may be one.
    ///
    /// # Errors
    /// When the device is gone.
    #[inline]
    pub fn refill(
        &mut self,
        with_frames: bool,
        queue: BorrowedFd<'_>,
        counters: &Counters,
    ) -> Result<()> {
        if with_frames && self.tun.ready && self.frame.is_none() {
            self.read_tun(queue, counters)?;
        }
        Ok(())
    }

    #[inline]
    fn read_tun(&mut self, queue: BorrowedFd<'_>, counters: &Counters) -> Result<()> {
        let Some((id, mut buffer)) = self.tun.free.pop() else {
            return Ok(());
        };
        let errno = match nix::unistd::read(queue, &mut buffer) {
            Ok(end) => {
                self.failures = 0;
                self.frame = Some(Received {
                    buffer,
                    start: 0,
                    end,
                    id,
                });
                return Ok(());
            }
            Err(errno) => errno as i32,
        };
        self.tun.free.push((id, buffer));
        match errno {
            libc::EAGAIN => self.tun.ready = false,
            // A frame that the driver could not describe; it is gone.
            libc::EINVAL => counters.drop_frame_malformed.add(1),
            libc::EINTR | libc::ENOMEM => self.failed_oddly(counters),
            errno => return Err(queue_error(errno)),
        }
        Ok(())
    }
}
