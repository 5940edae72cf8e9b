//! The memory behind `sendmsg(2)` and `recvmsg(2)` requests: it must stay
//! where it is while the kernel works on it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use std::os::fd::{AsRawFd, BorrowedFd};

use nix::errno::Errno;
use socket2::SockAddr;

use crate::packet::batch::Batch;

/// Bytes reserved for the sender's address in a receive buffer: the longest
/// kind (`sockaddr_in6`, 28 bytes), padded so that the payload is aligned.
pub const NAME_BYTES: usize = 32;

/// Bytes reserved for control messages: `CMSG_SPACE(sizeof(int))` for
/// `UDP_GRO`'s segment size (`udp(7)`).
pub const CONTROL_BYTES: usize = 24;

/// Bytes of a control message's header: `sizeof(struct cmsghdr)`.
const CMSG_HEADER_BYTES: usize = 16;
const _: () = assert!(size_of::<libc::cmsghdr>() == CMSG_HEADER_BYTES);

/// Bytes of `struct io_uring_recvmsg_out`, which a multishot receive puts in
/// front of name, control messages and payload.
pub const RECEIVE_HEADER_BYTES: usize = 16;

/// Offset of the payload in a receive buffer.
pub const PAYLOAD_START: usize = RECEIVE_HEADER_BYTES + NAME_BYTES + CONTROL_BYTES;

/// A message header that says only how much room names and control messages
/// get: what a multishot receive takes.
pub fn receive_template() -> Box<libc::msghdr> {
    // SAFETY: all-zero is a valid `msghdr`: null pointers, zero lengths.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_namelen = NAME_BYTES as libc::socklen_t;
    header.msg_controllen = CONTROL_BYTES;
    Box::new(header)
}

/// The sender's address out of a `sockaddr`'s bytes.
pub fn parse_name(name: &[u8]) -> Option<SocketAddr> {
    let family = u16::from_ne_bytes(*name.first_chunk::<2>()?);
    let port = u16::from_be_bytes(name.get(2..4)?.try_into().ok()?);
    let address: IpAddr = match i32::from(family) {
        libc::AF_INET => {
            let octets: [u8; 4] = name.get(4..8)?.try_into().ok()?;
            Ipv4Addr::from(octets).into()
        }
        libc::AF_INET6 => {
            let octets: [u8; 16] = name.get(8..24)?.try_into().ok()?;
            IpAddr::from(Ipv6Addr::from(octets)).to_canonical()
        }
        _ => return None,
    };
    Some(SocketAddr::new(address, port))
}

/// The segment size that `UDP_GRO` reports, if the control messages hold it.
pub fn parse_segment_bytes(mut control: &[u8]) -> Option<usize> {
    while control.len() >= CMSG_HEADER_BYTES {
        let len = usize::from_ne_bytes(control[..8].try_into().ok()?);
        let level = i32::from_ne_bytes(control[8..12].try_into().ok()?);
        let kind = i32::from_ne_bytes(control[12..16].try_into().ok()?);
        let data = control.get(CMSG_HEADER_BYTES..len)?;
        if level == libc::SOL_UDP && kind == libc::UDP_GRO {
            let value = i32::from_ne_bytes(*data.first_chunk::<4>()?);
            return usize::try_from(value).ok();
        }
        control = control.get(len.next_multiple_of(8)..)?;
    }
    None
}

/// What one receive brought.
pub struct ReceivedMessage {
    /// Where it came from.
    pub sender: SocketAddr,
    /// `UDP_GRO`'s segment size, if there was more than one datagram.
    pub segment_bytes: Option<usize>,
    /// End of the payload, which starts at [`PAYLOAD_START`].
    pub end: usize,
}

/// `recvmsg(2)` into `buffer` from [`PAYLOAD_START`] on, without waiting.
/// `Ok(None)`: the message was cut short, or its sender's address is unknown.
pub fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> nix::Result<Option<ReceivedMessage>> {
    let mut name = [0u8; NAME_BYTES];
    let mut control = [0u64; CONTROL_BYTES / 8];
    let room = &mut buffer[PAYLOAD_START..];
    let mut payload = libc::iovec {
        iov_base: room.as_mut_ptr().cast(),
        iov_len: room.len(),
    };
    // SAFETY: all-zero is a valid `msghdr`: null pointers, zero lengths.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_name = name.as_mut_ptr().cast();
    header.msg_namelen = NAME_BYTES as libc::socklen_t;
    header.msg_iov = &raw mut payload;
    header.msg_iovlen = 1;
    header.msg_control = control.as_mut_ptr().cast();
    header.msg_controllen = CONTROL_BYTES;
    // SAFETY: the header points to live memory of the lengths it states.
    let received =
        unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut header, libc::MSG_DONTWAIT) };
    let bytes = Errno::result(received)? as usize;
    if header.msg_flags & libc::MSG_TRUNC != 0 {
        return Ok(None);
    }
    let mut control_bytes = [0; CONTROL_BYTES];
    for (bytes, word) in control_bytes.chunks_exact_mut(8).zip(control) {
        bytes.copy_from_slice(&word.to_ne_bytes());
    }
    let control_bytes = &control_bytes[..CONTROL_BYTES.min(header.msg_controllen)];
    let name = &name[..NAME_BYTES.min(header.msg_namelen as usize)];
    Ok(parse_name(name).map(|sender| ReceivedMessage {
        sender,
        segment_bytes: parse_segment_bytes(control_bytes),
        end: PAYLOAD_START + bytes,
    }))
}

/// The memory of one send. It points into itself and is used where it is.
pub struct SendMessage {
    header: libc::msghdr,
    payload: libc::iovec,
    name: SockAddr,
    segment: SegmentBytes,
}

/// The control message `UDP_SEGMENT` (`udp(7)`).
#[repr(C)]
struct SegmentBytes {
    header: libc::cmsghdr,
    bytes: u16,
}
const _: () = assert!(size_of::<SegmentBytes>() == CONTROL_BYTES);

// SAFETY: the pointers in it point into itself or to a batch that the same
// engine holds; nothing is shared between threads.
unsafe impl Send for SendMessage {}

impl SendMessage {
    /// A message with nothing in it.
    pub fn new() -> Self {
        let nowhere = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0));
        // SAFETY: all-zero is valid for each of the three: null pointers, zero
        // lengths.
        let (header, payload, mut control) =
            unsafe { std::mem::zeroed::<(libc::msghdr, libc::iovec, libc::cmsghdr)>() };
        // Without the padding at the end: CMSG_LEN(2).
        control.cmsg_len = CMSG_HEADER_BYTES + size_of::<u16>();
        control.cmsg_level = libc::SOL_UDP;
        control.cmsg_type = libc::UDP_SEGMENT;
        Self {
            header,
            payload,
            name: SockAddr::from(nowhere),
            segment: SegmentBytes {
                header: control,
                bytes: 0,
            },
        }
    }

    /// Points the message at a batch's bytes and returns its header.
    ///
    /// The pointer is good while `self` stays in place and the batch is
    /// neither dropped nor changed.
    pub fn prepare(&mut self, batch: &Batch, destination: SocketAddr) -> *const libc::msghdr {
        let bytes = batch.bytes();
        self.payload.iov_base = bytes.as_ptr().cast_mut().cast();
        self.payload.iov_len = bytes.len();
        self.name = SockAddr::from(destination);
        self.header.msg_name = self.name.as_ptr().cast_mut().cast();
        self.header.msg_namelen = self.name.len();
        self.header.msg_iov = &raw mut self.payload;
        self.header.msg_iovlen = 1;
        if batch.count() > 1 {
            self.segment.bytes = batch.segment_bytes() as u16;
            self.header.msg_control = (&raw mut self.segment).cast();
            self.header.msg_controllen = CONTROL_BYTES;
        } else {
            // Even one segment is refused when it is longer than the MTU;
            // without the control message the kernel fragments it.
            self.header.msg_control = std::ptr::null_mut();
            self.header.msg_controllen = 0;
        }
        &raw const self.header
    }
}

/// `sendmsg(2)` of a batch, without waiting. `memory`: where its parameters go.
#[inline]
pub fn send(
    socket: BorrowedFd<'_>,
    memory: &mut SendMessage,
    batch: &Batch,
    destination: SocketAddr,
) -> nix::Result<()> {
    let header = memory.prepare(batch, destination);
    // SAFETY: the header points to live memory of the lengths it states: to
    // `memory`, which does not move, and to the batch's bytes.
    let sent = unsafe { libc::sendmsg(socket.as_raw_fd(), header, libc::MSG_DONTWAIT) };
    Errno::result(sent).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_senders() {
        let bytes = |address: &str| {
            let name = SockAddr::from(address.parse::<SocketAddr>().unwrap());
            // SAFETY: a socket address has as many bytes as it says.
            unsafe {
                std::slice::from_raw_parts(name.as_ptr().cast(), name.len() as usize).to_vec()
            }
        };
        let v4 = bytes("10.1.2.3:99");
        assert_eq!(parse_name(&v4), Some("10.1.2.3:99".parse().unwrap()));
        assert_eq!(
            parse_name(&bytes("[fd00::7]:99")),
            Some("[fd00::7]:99".parse().unwrap())
        );
        let mapped = bytes("[::ffff:10.1.2.3]:99");
        assert_eq!(parse_name(&mapped), Some("10.1.2.3:99".parse().unwrap()));
        for len in 0..8 {
            assert_eq!(parse_name(&v4[..len]), None);
        }
    }

    #[test]
    fn reads_segment_sizes() {
        let message = |level: i32, kind: i32, value: i32| {
            let mut bytes = 20usize.to_ne_bytes().to_vec();
            bytes.extend(level.to_ne_bytes());
            bytes.extend(kind.to_ne_bytes());
            bytes.extend(value.to_ne_bytes());
            bytes.resize(24, 0);
            bytes
        };
        let gro = message(libc::SOL_UDP, libc::UDP_GRO, 1472);
        assert_eq!(parse_segment_bytes(&gro), Some(1472));
        let mut two = message(libc::SOL_SOCKET, 1, 7);
        two.extend(&gro);
        assert_eq!(parse_segment_bytes(&two), Some(1472));
        assert_eq!(parse_segment_bytes(&[]), None);
        assert_eq!(parse_segment_bytes(&[0; 16]), None);
        assert_eq!(parse_segment_bytes(&[0xff; 24]), None);
        assert_eq!(parse_segment_bytes(&gro[..18]), None);
    }
}
