//! The kernel's tables of links, addresses and routes: a small, blocking
//! rtnetlink client (rtnetlink(7)).
//!
//! One [`Netlink`] is one socket and therefore one network namespace: that of
//! the thread which opened it, whatever namespace the thread enters later.
//! Operations stand in one file per noun: [`link`], [`address`], [`route`],
//! [`device_route`]. What others change is told by [`watch`].
//!
//! Every request waits for the kernel's acknowledgement, so when a function
//! returns `Ok` the change is in force. The errno of a refusal is kept in the
//! [`Error`]; where the kernel says in words what it did not like
//! (`NETLINK_EXT_ACK`), those words become the error's hint.

pub mod address;
mod batch;
pub mod device_route;
#[doc(hidden)]
pub mod fuzz;
pub mod link;
pub mod route;
mod route_mtu;
pub mod watch;

use std::io;
use std::time::Duration;

use netlink_packet_core::{
    ErrorMessage, NLM_F_ACK, NLM_F_ACK_TLVS, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST,
    NetlinkHeader, NetlinkMessage, NetlinkPayload, NlasIterator,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};

use crate::error::{Error, Result};

pub use device_route::{DeviceRoute, RouteChange, RouteEntry};
pub use link::{Link, LinkStats};
pub use route::{Route, RouteKind, Way};
pub use route_mtu::RouteMtu;
pub use watch::{News, Watch};

/// Bytes of the receive buffer. The kernel fills at most 32 KiB of it per
/// datagram of a dump (`netlink_dump()` in net/netlink/af_netlink.c).
const RECEIVE_BYTES: usize = 64 * 1024;

/// How often a dump is asked for again when the table changed underneath it.
const DUMP_ATTEMPTS_MAX: usize = 16;

/// How long the kernel may keep us waiting. It answers within the system call
/// that asks; only a defect could make us wait, and then not forever.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// `NLMSGERR_ATTR_MSG` (linux/netlink.h): the kernel's reason, in words.
const NLMSGERR_ATTR_MSG: u16 = 1;

/// Bytes of `struct nlmsghdr`, and the alignment of messages in a datagram.
const HEADER_BYTES: usize = 16;
const MESSAGE_ALIGN: usize = 4;

/// Datagrams of answers that nobody waits for any more, read at most before the
/// next request: those of a table of ten million routes.
const LATE_DATAGRAMS_MAX: usize = 1 << 16;

/// Message types below it are about the protocol itself (linux/netlink.h).
const NLMSG_MIN_TYPE: u16 = 0x10;

/// An rtnetlink socket in one network namespace.
pub struct Netlink {
    socket: Socket,
    sequence: u32,
    buffer: Vec<u8>,
    /// Whether the last request was given up before its answer was read whole.
    is_unread: bool,
}

/// Why a request failed, before it is known what was to be done to what.
struct Refusal {
    cause: io::Error,
    reason: Option<String>,
}

impl Refusal {
    fn describe(self, what: impl Into<String>) -> Error {
        let error = Error::os(what, self.cause);
        match self.reason {
            Some(reason) => error.hint(format!("the kernel says: {reason}")),
            None => error,
        }
    }

    fn is(&self, errno: i32) -> bool {
        self.cause.raw_os_error() == Some(errno)
    }
}

impl From<io::Error> for Refusal {
    fn from(cause: io::Error) -> Self {
        Self {
            cause,
            reason: None,
        }
    }
}

/// What one pass over the kernel's answer came to.
enum Answer {
    Complete(Vec<RouteNetlinkMessage>),
    /// `NLM_F_DUMP_INTR`: the table changed while it was being listed.
    Interrupted,
}

impl Netlink {
    /// Opens a socket in the calling thread's network namespace.
    ///
    /// # Errors
    /// When the kernel gives no netlink socket (a seccomp filter, no more
    /// descriptors).
    pub fn open() -> Result<Self> {
        Self::open_socket()
            .map_err(|cause| Error::os("cannot open a netlink socket (NETLINK_ROUTE)", cause))
    }

    fn open_socket() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket2::SockRef::from(&socket).set_read_timeout(Some(ANSWER_TIMEOUT))?;
        // Comforts, each younger than the kernels we run on must be: without
        // them errors have no words and dumps are filtered on this side only.
        let _ = socket.set_cap_ack(true);
        let _ = socket.set_ext_ack(true);
        let _ = socket.set_netlink_get_strict_chk(true);
        Ok(Self {
            socket,
            sequence: 0,
            buffer: vec![0; RECEIVE_BYTES],
            is_unread: false,
        })
    }

    /// Sends a request that changes something and waits until it is done.
    fn execute(
        &mut self,
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> std::result::Result<(), Refusal> {
        self.transact(message, NLM_F_REQUEST | NLM_F_ACK | flags)?;
        Ok(())
    }

    /// Asks for one object; `None` when the answer holds none.
    fn get(
        &mut self,
        message: RouteNetlinkMessage,
    ) -> std::result::Result<Option<RouteNetlinkMessage>, Refusal> {
        match self.transact(message, NLM_F_REQUEST | NLM_F_ACK)? {
            Answer::Complete(messages) => Ok(messages.into_iter().next()),
            Answer::Interrupted => Ok(None),
        }
    }

    /// Lists a table, again and again until no change has interrupted the listing.
    fn dump(
        &mut self,
        message: RouteNetlinkMessage,
    ) -> std::result::Result<Vec<RouteNetlinkMessage>, Refusal> {
        for _ in 0..DUMP_ATTEMPTS_MAX {
            match self.transact(message.clone(), NLM_F_REQUEST | NLM_F_DUMP)? {
                Answer::Complete(messages) => return Ok(messages),
                Answer::Interrupted => continue,
            }
        }
        Err(io::Error::from_raw_os_error(libc::EAGAIN).into())
    }

    fn transact(
        &mut self,
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> std::result::Result<Answer, Refusal> {
        self.send(message, flags)?;
        let mut messages = Vec::new();
        let mut interrupted = false;
        loop {
            let length = self.receive()?;
            let mut rest = &self.buffer[..length];
            while let Some((one, tail)) = split_message(rest) {
                rest = tail;
                match read_message(one, self.sequence)? {
                    Event::Foreign => continue,
                    Event::NotUnderstood => {}
                    Event::Object { object, flags } => {
                        interrupted |= flags & NLM_F_DUMP_INTR != 0;
                        messages.push(*object);
                    }
                    Event::End { flags } => {
                        interrupted |= flags & NLM_F_DUMP_INTR != 0;
                        self.is_unread = false;
                        return Ok(if interrupted {
                            Answer::Interrupted
                        } else {
                            Answer::Complete(messages)
                        });
                    }
                }
            }
        }
    }

    /// Lists a table object by object without keeping it: `visit` gets each
    /// object's bytes, without the netlink header. `true` when the table changed
    /// meanwhile, so that objects may be missing or come twice.
    fn visit_dump(
        &mut self,
        message: RouteNetlinkMessage,
        visit: &mut dyn FnMut(&[u8]),
    ) -> std::result::Result<bool, Refusal> {
        self.send(message, NLM_F_REQUEST | NLM_F_DUMP)?;
        let mut interrupted = false;
        loop {
            let length = self.receive()?;
            let mut rest = &self.buffer[..length];
            while let Some((one, tail)) = split_message(rest) {
                rest = tail;
                let header = RawHeader::read(one);
                if header.sequence != self.sequence {
                    continue;
                }
                interrupted |= header.flags & NLM_F_DUMP_INTR != 0;
                if header.kind >= NLMSG_MIN_TYPE {
                    visit(&one[HEADER_BYTES..]);
                } else if let Event::End { .. } = read_message(one, self.sequence)? {
                    self.is_unread = false;
                    return Ok(interrupted);
                }
            }
        }
    }

    fn send(&mut self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut bytes = Vec::new();
        append_request(&mut bytes, message, flags, self.sequence);
        self.send_bytes(&bytes)
    }

    fn send_bytes(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.is_unread {
            self.discard_answers();
        }
        self.is_unread = true;
        self.socket.send_to(bytes, &SocketAddr::new(0, 0), 0)?;
        Ok(())
    }

    /// Reads what is left of the answer to a request that was given up. As long
    /// as any of it waits after an overrun, the kernel drops further answers
    /// without a word (`netlink_overrun()` in net/netlink/af_netlink.c), and it
    /// begins no other dump.
    fn discard_answers(&mut self) {
        for _ in 0..LATE_DATAGRAMS_MAX {
            let read = self
                .socket
                .recv_from(&mut &mut self.buffer[..], libc::MSG_DONTWAIT);
            match read.map_err(|error| error.raw_os_error()) {
                Ok(_) | Err(Some(libc::EINTR | libc::ENOBUFS)) => {}
                Err(_) => return,
            }
        }
    }

    /// Gives answers so little room that those to many requests are lost.
    #[cfg(test)]
    pub(crate) fn shrink(&self) {
        socket2::SockRef::from(&self.socket)
            .set_recv_buffer_size(16 << 10)
            .unwrap();
    }

    /// The socket's address among the kernel's netlink sockets; it stands in
    /// every notification of a change that this socket asked for.
    fn port(&self) -> io::Result<u32> {
        let mut address = SocketAddr::new(0, 0);
        self.socket.get_address(&mut address)?;
        Ok(address.port_number())
    }

    fn receive(&mut self) -> io::Result<usize> {
        loop {
            match self
                .socket
                .recv_from(&mut &mut self.buffer[..], libc::MSG_TRUNC)
            {
                // Port 0 is the kernel; any process may send to our port.
                Ok((_, from)) if from.port_number() != 0 => continue,
                Ok((length, _)) if length > RECEIVE_BYTES => {
                    return Err(io::Error::from_raw_os_error(libc::EMSGSIZE));
                }
                Ok((length, _)) => return Ok(length),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            }
        }
    }
}

/// One message of the kernel's answer.
enum Event {
    /// An answer to an earlier request that was given up.
    Foreign,
    /// An object with attributes that the parser rejects. It is left out: a
    /// strange neighbour must not make the whole table unreadable.
    NotUnderstood,
    Object {
        object: Box<RouteNetlinkMessage>,
        flags: u16,
    },
    End {
        flags: u16,
    },
}

/// Cuts the first message off a datagram; `None` at its end or on garbage.
fn split_message(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let length = u32::from_ne_bytes(bytes.get(..4)?.try_into().ok()?) as usize;
    if length < HEADER_BYTES || length > bytes.len() {
        return None;
    }
    let next = length.next_multiple_of(MESSAGE_ALIGN).min(bytes.len());
    Some((&bytes[..length], &bytes[next..]))
}

/// `struct nlmsghdr` without its length.
struct RawHeader {
    kind: u16,
    flags: u16,
    sequence: u32,
}

impl RawHeader {
    /// Reads a message that [`split_message`] returned: it has a whole header.
    fn read(message: &[u8]) -> Self {
        let short = |at: usize| u16::from_ne_bytes([message[at], message[at + 1]]);
        Self {
            kind: short(4),
            flags: short(6),
            sequence: u32::from_ne_bytes([message[8], message[9], message[10], message[11]]),
        }
    }
}

/// Puts one request behind those in `bytes`, padded as the kernel wants it.
fn append_request(bytes: &mut Vec<u8>, message: RouteNetlinkMessage, flags: u16, sequence: u32) {
    let mut header = NetlinkHeader::default();
    header.flags = flags;
    header.sequence_number = sequence;
    let mut request = NetlinkMessage::new(header, NetlinkPayload::from(message));
    request.finalize();
    let start = bytes.len();
    let length = request.buffer_len();
    bytes.resize(start + length.next_multiple_of(MESSAGE_ALIGN), 0);
    request.serialize(&mut bytes[start..start + length]);
}

fn read_message(bytes: &[u8], sequence: u32) -> std::result::Result<Event, Refusal> {
    let message = match NetlinkMessage::<RouteNetlinkMessage>::deserialize(bytes) {
        Ok(message) => message,
        Err(error) => {
            tracing::debug!(%error, "left out a netlink message that is not understood");
            return Ok(Event::NotUnderstood);
        }
    };
    let (header, payload) = message.into_parts();
    if header.sequence_number != sequence {
        return Ok(Event::Foreign);
    }
    let flags = header.flags;
    match payload {
        NetlinkPayload::InnerMessage(object) => Ok(Event::Object {
            object: Box::new(object),
            flags,
        }),
        NetlinkPayload::Error(error) if error.code.is_some() => Err(Refusal {
            cause: io::Error::from_raw_os_error(error.raw_code().wrapping_neg()),
            reason: (flags & NLM_F_ACK_TLVS != 0)
                .then(|| kernel_reason(&error))
                .flatten(),
        }),
        NetlinkPayload::Error(_) => Ok(Event::End { flags }),
        NetlinkPayload::Done(done) if done.code < 0 => {
            Err(io::Error::from_raw_os_error(done.code.wrapping_neg()).into())
        }
        NetlinkPayload::Done(_) => Ok(Event::End { flags }),
        _ => Ok(Event::NotUnderstood),
    }
}

/// The extended acknowledgement's text. With `NETLINK_CAP_ACK` the attributes
/// follow the header of our request.
fn kernel_reason(error: &ErrorMessage) -> Option<String> {
    let attributes = error.header.get(HEADER_BYTES..)?;
    NlasIterator::new(attributes)
        .filter_map(|attribute| attribute.ok())
        .find(|attribute| attribute.kind() == NLMSGERR_ATTR_MSG)
        .map(|attribute| {
            String::from_utf8_lossy(attribute.value())
                .trim_end_matches('\0')
                .to_string()
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_error_code_is_read() {
        for code in [i32::MIN, -1] {
            for kind in [libc::NLMSG_ERROR, libc::NLMSG_DONE] {
                let mut message = 36u32.to_ne_bytes().to_vec();
                message.extend((kind as u16).to_ne_bytes());
                message.resize(16, 0);
                message.extend(code.to_ne_bytes());
                message.resize(36, 0);
                let refusal = read_message(&message, 0).err().unwrap();
                assert_eq!(refusal.cause.raw_os_error(), Some(code.wrapping_neg()));
            }
        }
    }

    #[test]
    fn splits_a_datagram_into_its_messages() {
        let mut datagram = Vec::new();
        datagram.extend_from_slice(&18u32.to_ne_bytes());
        datagram.extend_from_slice(&[0; 14]);
        datagram.extend_from_slice(&[0; 2]); // padding
        datagram.extend_from_slice(&16u32.to_ne_bytes());
        datagram.extend_from_slice(&[0; 12]);
        let (first, rest) = split_message(&datagram).unwrap();
        assert_eq!(first.len(), 18);
        let (second, rest) = split_message(rest).unwrap();
        assert_eq!(second.len(), 16);
        assert!(split_message(rest).is_none());
    }

    #[test]
    fn garbage_ends_a_datagram() {
        assert!(split_message(&[1, 0, 0]).is_none());
        assert!(split_message(&[0; 32]).is_none());
        assert!(split_message(&[0xff; 32]).is_none());
    }
}
