//! The kernel's tables of links, addresses and routes: a small, blocking
//! rtnetlink client (rtnetlink(7)).
//!
//! One [`Netlink`] is one socket and therefore one network namespace: that of
//! the thread which opened it, whatever namespace the thread enters later.
//! Operations stand in one file per noun: [`link`], [`address`], [`route`].
//! [`watch`] reports what others change.
//!
//! Every request waits for the kernel's acknowledgement, so when a function
//! returns `Ok` the change is in force. The errno of a refusal is kept in the
//! [`Error`]; where the kernel says in words what it did not like
//! (`NETLINK_EXT_ACK`), those words become the error's hint.

mod address;
#[doc(hidden)]
pub mod fuzz;
pub mod link;
pub(crate) mod lookup;
pub mod route;
#[cfg(test)]
pub(crate) mod test_support;
pub mod watch;

use std::io;
use std::time::Duration;

use netlink_packet_core::{
    ErrorMessage, NLM_F_ACK, NLM_F_ACK_TLVS, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST,
    NetlinkBuffer, NetlinkHeader, NetlinkMessage, NetlinkPayload, NlasIterator,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};

use crate::error::{Error, Result};

pub use link::{Link, LinkStats};
pub use lookup::RouteMtu;
pub use route::{Route, RouteChange, RouteKind};
pub use watch::{Event, Watch};

/// Bytes of the receive buffer. The kernel fills at most 32 KiB of it per
/// datagram of a dump (`netlink_dump()` in net/netlink/af_netlink.c).
const RECEIVE_BYTES: usize = 64 * 1024;

/// How often a table is listed because it changed while it was. The last listing
/// counts, even if it has gaps: a table may change all the time, and [`Watch`] reports
/// the changes.
const LISTINGS_MAX: usize = 4;

/// How long the kernel may keep us waiting. It answers within the system call
/// that asks; only a defect could make us wait, and then not forever.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// `NLMSGERR_ATTR_MSG` (linux/netlink.h): the kernel's reason, in words.
const NLMSGERR_ATTR_MSG: u16 = 1;

/// Bytes of `struct nlmsghdr`, and the alignment of messages in a datagram.
const HEADER_BYTES: usize = 16;
const MESSAGE_ALIGN: usize = 4;

/// Requests per datagram. Each may be refused, and all refusals wait in the
/// socket's receive buffer until the kernel has been through the datagram: 100
/// take up about half of the usual 208 KiB (`net.core.rmem_default`).
const REQUESTS_PER_SEND_MAX: usize = 100;

/// An rtnetlink socket in one network namespace.
pub struct Netlink {
    socket: Socket,
    sequence: u32,
    buffer: Vec<u8>,
    /// What the datagrams are marked with whose routes are looked up; 0 for nothing.
    pub(crate) fwmark: u32,
}

/// One message of the kernel's answer to a request.
enum Reply {
    /// One of the objects that were asked for.
    Object(RouteNetlinkMessage),
    /// The end: it is done.
    Done,
    /// The end: it was not done, for this reason.
    Refused(Error),
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
            fwmark: 0,
        })
    }

    /// Sends a request that changes something and waits until it is done.
    fn execute(&mut self, message: RouteNetlinkMessage, flags: u16) -> Result<()> {
        self.transact(message, NLM_F_ACK | flags, &mut |_| {})
            .map(drop)
    }

    /// Has something changed for which there is no function here: a link, an
    /// address or a route. `what` begins the error that a refusal becomes.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn request(&mut self, message: RouteNetlinkMessage, flags: u16, what: &str) -> Result<()> {
        self.execute(message, flags)
            .map_err(|error| error.about(what))
    }

    /// Sends many requests that change something and waits until all are done.
    /// A refusal does not stop the others; `refused` gets the request's place
    /// and the kernel's reason.
    ///
    /// The kernel acknowledges the last request of each datagram only: of the
    /// others silence means success (`netlink_rcv_skb()` in
    /// net/netlink/af_netlink.c).
    fn execute_batch(
        &mut self,
        requests: impl Iterator<Item = (RouteNetlinkMessage, u16)>,
        refused: &mut dyn FnMut(usize, Error),
    ) -> Result<()> {
        let mut requests = requests.peekable();
        let mut done = 0;
        while requests.peek().is_some() {
            let mut bytes = Vec::new();
            let mut count = 0;
            while count < REQUESTS_PER_SEND_MAX
                && let Some((message, flags)) = requests.next()
            {
                count += 1;
                let is_last = count == REQUESTS_PER_SEND_MAX || requests.peek().is_none();
                let acknowledge = if is_last { NLM_F_ACK } else { 0 };
                self.append_request(&mut bytes, message, flags | acknowledge);
            }
            self.exchange(&bytes, count, &mut |index, _, reply| {
                if let Reply::Refused(error) = reply {
                    refused(done + index, error);
                }
            })?;
            done += count;
        }
        Ok(())
    }

    /// Asks for one object; `None` when the answer holds none.
    fn get(&mut self, message: RouteNetlinkMessage) -> Result<Option<RouteNetlinkMessage>> {
        let mut found = None;
        self.transact(message, NLM_F_ACK, &mut |object| {
            found.get_or_insert(object);
        })?;
        Ok(found)
    }

    /// Lists what `pick` makes of the objects of a table.
    fn dump<T>(
        &mut self,
        message: RouteNetlinkMessage,
        pick: &dyn Fn(RouteNetlinkMessage) -> Option<T>,
    ) -> Result<Vec<T>> {
        let mut objects = Vec::new();
        for _ in 0..LISTINGS_MAX {
            objects.clear();
            let mut add = |object| objects.extend(pick(object));
            if !self.transact(message.clone(), NLM_F_DUMP, &mut add)? {
                break;
            }
        }
        Ok(objects)
    }

    /// Sends a request; `visit` gets the objects of the answer. Returns whether
    /// the table that was asked for changed while the kernel listed it
    /// (`NLM_F_DUMP_INTR`), so that objects may be missing or come twice.
    fn transact(
        &mut self,
        message: RouteNetlinkMessage,
        flags: u16,
        visit: &mut dyn FnMut(RouteNetlinkMessage),
    ) -> Result<bool> {
        let mut bytes = Vec::new();
        self.append_request(&mut bytes, message, flags);
        let mut result = Ok(());
        let mut is_interrupted = false;
        self.exchange(&bytes, 1, &mut |_, flags, reply| {
            is_interrupted |= flags & NLM_F_DUMP_INTR != 0;
            match reply {
                Reply::Object(object) => visit(object),
                Reply::Done => {}
                Reply::Refused(error) => result = Err(error),
            }
        })?;
        result.map(|()| is_interrupted)
    }

    /// Puts one request behind those in `bytes`, padded as the kernel wants it.
    fn append_request(&mut self, bytes: &mut Vec<u8>, message: RouteNetlinkMessage, flags: u16) {
        self.sequence = self.sequence.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | flags;
        header.sequence_number = self.sequence;
        let mut request = NetlinkMessage::new(header, NetlinkPayload::from(message));
        request.finalize();
        let start = bytes.len();
        let length = request.buffer_len();
        bytes.resize(start + length.next_multiple_of(MESSAGE_ALIGN), 0);
        request.serialize(&mut bytes[start..start + length]);
    }

    /// Sends the last `count` requests and reads the replies to them, up to the end of
    /// the last one's. `take` gets the request's place, the reply's flags and the reply.
    fn exchange(
        &mut self,
        bytes: &[u8],
        count: usize,
        take: &mut dyn FnMut(usize, u16, Reply),
    ) -> Result<()> {
        let failed = |cause| Error::os("the netlink socket fails", cause);
        self.discard_answers();
        let to_kernel = SocketAddr::new(0, 0);
        self.socket.send_to(bytes, &to_kernel, 0).map_err(failed)?;
        let first = self.sequence.wrapping_sub(count as u32 - 1);
        loop {
            let length = self.receive().map_err(failed)?;
            let mut rest = &self.buffer[..length];
            while let Some((message, tail)) = split_message(rest) {
                rest = tail;
                let Some((header, reply)) = read_reply(message) else {
                    continue;
                };
                let index = header.sequence_number.wrapping_sub(first) as usize;
                if index >= count {
                    // About a request that was given up.
                    continue;
                }
                let is_end = index + 1 == count && !matches!(reply, Reply::Object(_));
                take(index, header.flags, reply);
                if is_end {
                    return Ok(());
                }
            }
        }
    }

    /// Reads what is left of an answer that was given up. As long as any of it
    /// waits after an overrun, the kernel drops further answers without a word
    /// (`netlink_overrun()` in net/netlink/af_netlink.c), and it begins no other
    /// dump.
    fn discard_answers(&mut self) {
        loop {
            let mut buffer = &mut self.buffer[..];
            let read = self.socket.recv_from(&mut buffer, libc::MSG_DONTWAIT);
            match read.map_err(|error| error.raw_os_error()) {
                Ok(_) | Err(Some(libc::EINTR | libc::ENOBUFS)) => {}
                Err(_) => return,
            }
        }
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

    /// The socket's address among the kernel's netlink sockets; it stands in
    /// every notification of a change that this socket asked for.
    fn port(&self) -> io::Result<u32> {
        let mut address = SocketAddr::new(0, 0);
        self.socket.get_address(&mut address)?;
        Ok(address.port_number())
    }

    /// Gives answers so little room that those to many requests are lost.
    #[cfg(test)]
    pub(crate) fn shrink(&self) {
        socket2::SockRef::from(&self.socket)
            .set_recv_buffer_size(16 << 10)
            .unwrap();
    }
}

/// Cuts the first message off a datagram; `None` at its end or on garbage.
fn split_message(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let length = NetlinkBuffer::new_checked(bytes).ok()?.length() as usize;
    let next = length.next_multiple_of(MESSAGE_ALIGN).min(bytes.len());
    Some((&bytes[..length], &bytes[next..]))
}

/// Reads one message of an answer; `None` if it says nothing. That is also an object
/// with attributes that the parser rejects: a strange neighbour must not make the whole
/// table unreadable.
fn read_reply(bytes: &[u8]) -> Option<(NetlinkHeader, Reply)> {
    let (header, payload) = NetlinkMessage::deserialize(bytes)
        .inspect_err(|error| {
            tracing::debug!(%error, "left out a netlink message that is not understood");
        })
        .ok()?
        .into_parts();
    let refused = |code: i32| {
        let cause = io::Error::from_raw_os_error(code.wrapping_neg());
        Error::os("the kernel refuses a netlink request", cause)
    };
    let reply = match payload {
        NetlinkPayload::InnerMessage(object) => Reply::Object(object),
        NetlinkPayload::Error(error) if error.code.is_some() => {
            let has_reason = header.flags & NLM_F_ACK_TLVS != 0;
            let refused = refused(error.raw_code());
            Reply::Refused(match kernel_reason(&error).filter(|_| has_reason) {
                Some(reason) => refused.hint(format!("the kernel says: {reason}")),
                None => refused,
            })
        }
        NetlinkPayload::Done(done) if done.code < 0 => Reply::Refused(refused(done.code)),
        NetlinkPayload::Error(_) | NetlinkPayload::Done(_) => Reply::Done,
        _ => return None,
    };
    Some((header, reply))
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
    use crate::testbed::Namespace;

    #[test]
    fn any_error_code_is_read() {
        for code in [i32::MIN, -1] {
            for kind in [libc::NLMSG_ERROR, libc::NLMSG_DONE] {
                let mut message = 36u32.to_ne_bytes().to_vec();
                message.extend((kind as u16).to_ne_bytes());
                message.resize(16, 0);
                message.extend(code.to_ne_bytes());
                message.resize(36, 0);
                let Some((_, Reply::Refused(error))) = read_reply(&message) else {
                    panic!("{kind} {code} is not a refusal");
                };
                assert_eq!(error.errno(), Some(code.wrapping_neg()));
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

    #[test]
    fn answers_that_were_given_up_do_not_hold_up_later_ones() {
        let namespace = Namespace::new().unwrap();
        let mut netlink = namespace.netlink().unwrap();
        let loopback = netlink.link_index("lo").unwrap().unwrap();
        netlink.set_up(loopback).unwrap();
        netlink.shrink();
        let there = RouteChange::Add("10.1.0.0/16".parse().unwrap());
        let mut change = |changes: &[RouteChange]| netlink.change_device_routes(loopback, changes);
        assert!(change(&[there]).unwrap().is_empty());
        for third in 0..3 {
            // More refusals than there is room for.
            let error = change(&[there; REQUESTS_PER_SEND_MAX]).unwrap_err();
            assert_eq!(error.errno(), Some(libc::ENOBUFS), "{error}");
            let other = RouteChange::Add(format!("10.2.{third}.0/24").parse().unwrap());
            assert!(change(&[other]).unwrap().is_empty());
        }
    }
}
