//! The memory behind `sendmsg(2)` and `recvmsg(2)` requests: it must stay
//! where it is while the kernel works on it.

use std::net::{Ipv4Addr, SocketAddr, SocketAddrV6};

use std::os::fd::{AsRawFd, BorrowedFd};

use nix::errno::Errno;
use socket2::SockAddr;

use crate::packet::batch::Batch;
use crate::packet::ecn::Ecn;
use crate::packet::ip::{self, canonical};

/// Bytes of the longest sender's address: `sockaddr_in6`.
const NAME_BYTES: usize = 28;

/// Bytes of a control message with an int: `CMSG_SPACE(sizeof(int))`.
const CMSG_BYTES: usize = 24;

/// Bytes reserved for control messages: `UDP_GRO`'s segment size (`udp(7)`), and the
/// TOS or traffic class (`ip(7)`, `ipv6(7)`).
const CONTROL_BYTES: usize = 2 * CMSG_BYTES;

/// Bytes of a control message's header: `sizeof(struct cmsghdr)`.
const CMSG_HEADER_BYTES: usize = 16;
const _: () = assert!(size_of::<libc::cmsghdr>() == CMSG_HEADER_BYTES);

/// The sender's address out of a `sockaddr`'s bytes.
pub fn parse_name(name: &[u8]) -> Option<SocketAddr> {
    let family = u16::from_ne_bytes(*name.first_chunk::<2>()?);
    let port = u16::from_be_bytes(name.get(2..4)?.try_into().ok()?);
    match i32::from(family) {
        libc::AF_INET => {
            let octets: [u8; 4] = name.get(4..8)?.try_into().ok()?;
            Some(SocketAddr::from((octets, port)))
        }
        libc::AF_INET6 => {
            let octets: [u8; 16] = name.get(8..24)?.try_into().ok()?;
            // Without it nothing could be sent back to a link-local address.
            let scope_id = u32::from_ne_bytes(name.get(24..28)?.try_into().ok()?);
            let address = SocketAddrV6::new(octets.into(), port, 0, scope_id);
            Some(canonical(address.into()))
        }
        _ => None,
    }
}

/// What the control messages of a receive say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Control {
    /// `UDP_GRO`'s segment size, if there was more than one datagram.
    pub segment_bytes: Option<usize>,
    /// The ECN field of the datagrams' own header.
    pub ecn: Ecn,
}

impl Control {
    /// Reads control messages as far as they are whole.
    pub fn parse(mut bytes: &[u8]) -> Self {
        let mut control = Self::default();
        while let Some((level, kind, data, rest)) = parse_cmsg(bytes) {
            match (level, kind, data) {
                (libc::SOL_UDP, libc::UDP_GRO, &[a, b, c, d, ..]) => {
                    let value = i32::from_ne_bytes([a, b, c, d]);
                    control.segment_bytes = usize::try_from(value).ok();
                }
                (libc::IPPROTO_IP, libc::IP_TOS, &[tos, ..]) => control.ecn = Ecn::from_tos(tos),
                (libc::IPPROTO_IPV6, libc::IPV6_TCLASS, &[a, b, c, d, ..]) => {
                    control.ecn = Ecn::from_tos(i32::from_ne_bytes([a, b, c, d]) as u8);
                }
                _ => {}
            }
            bytes = rest;
        }
        control
    }
}

/// Level, type and data of the first control message, and what comes after it.
fn parse_cmsg(bytes: &[u8]) -> Option<(i32, i32, &[u8], &[u8])> {
    let len = usize::from_ne_bytes(bytes.get(..8)?.try_into().ok()?);
    let level = i32::from_ne_bytes(bytes.get(8..12)?.try_into().ok()?);
    let kind = i32::from_ne_bytes(bytes.get(12..16)?.try_into().ok()?);
    let data = bytes.get(CMSG_HEADER_BYTES..len)?;
    let rest = bytes.get(len.next_multiple_of(8)..).unwrap_or(&[]);
    Some((level, kind, data, rest))
}

/// What one receive brought.
pub struct ReceivedMessage {
    /// Where it came from.
    pub sender: SocketAddr,
    /// What the kernel says of it.
    pub control: Control,
    /// Bytes of the payload.
    pub bytes: usize,
}

/// `recvmsg(2)` into `buffer`, without waiting. `Ok(None)`: the message was cut short,
/// or its sender's address is unknown.
pub fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> nix::Result<Option<ReceivedMessage>> {
    // As aligned as the kernel wants it.
    let mut name = [0u32; NAME_BYTES / 4];
    let mut control = [0u64; CONTROL_BYTES / 8];
    let mut payload = libc::iovec {
        iov_base: buffer.as_mut_ptr().cast(),
        iov_len: buffer.len(),
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
    let control = bytes_of(&control, |word| word.to_ne_bytes());
    let control: [u8; CONTROL_BYTES] = control;
    let name: [u8; NAME_BYTES] = bytes_of(&name, |word| word.to_ne_bytes());
    let name = &name[..NAME_BYTES.min(header.msg_namelen as usize)];
    Ok(parse_name(name).map(|sender| ReceivedMessage {
        sender,
        control: Control::parse(&control[..CONTROL_BYTES.min(header.msg_controllen)]),
        bytes,
    }))
}

/// The bytes of words in memory.
fn bytes_of<const WORDS: usize, const WORD_BYTES: usize, const BYTES: usize, W: Copy>(
    words: &[W; WORDS],
    bytes: impl Fn(W) -> [u8; WORD_BYTES],
) -> [u8; BYTES] {
    let mut all = [0; BYTES];
    for (place, &word) in all.chunks_exact_mut(WORD_BYTES).zip(words) {
        place.copy_from_slice(&bytes(word));
    }
    all
}

/// The memory of one send. It points into itself and is used where it is.
pub struct SendMessage {
    header: libc::msghdr,
    payload: libc::iovec,
    name: SockAddr,
    /// `UDP_SEGMENT` (`udp(7)`), a `u16`, and TOS or traffic class, an `int`.
    control: [ControlMessage; 2],
}

/// A control message, with room for an `int`.
#[repr(C)]
struct ControlMessage {
    header: libc::cmsghdr,
    value: i32,
}
const _: () = assert!(size_of::<ControlMessage>() == CMSG_BYTES);

// SAFETY: the pointers in it point into itself or to a batch that the same
// engine holds; nothing is shared between threads.
unsafe impl Send for SendMessage {}

impl SendMessage {
    /// A message with nothing in it.
    pub fn new() -> Self {
        let nowhere = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0));
        // SAFETY: all-zero is valid for each of the three: null pointers, zero
        // lengths.
        let (header, payload, control) =
            unsafe { std::mem::zeroed::<(libc::msghdr, libc::iovec, [ControlMessage; 2])>() };
        Self {
            header,
            payload,
            name: SockAddr::from(nowhere),
            control,
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
        // Even one segment is refused when it is longer than the MTU; without the
        // control message the kernel fragments it.
        let mut count = 0;
        if batch.count() > 1 {
            let bytes = batch.segment_bytes() as u16;
            self.control[0].set(libc::SOL_UDP, libc::UDP_SEGMENT, &bytes.to_ne_bytes());
            count = 1;
        }
        if batch.tos() != 0 {
            let (level, kind) = match ip::canonical(destination) {
                SocketAddr::V4(_) => (libc::IPPROTO_IP, libc::IP_TOS),
                SocketAddr::V6(_) => (libc::IPPROTO_IPV6, libc::IPV6_TCLASS),
            };
            self.control[count].set(level, kind, &i32::from(batch.tos()).to_ne_bytes());
            count += 1;
        }
        self.header.msg_control = (&raw mut self.control).cast();
        self.header.msg_controllen = count * CMSG_BYTES;
        &raw const self.header
    }
}

impl ControlMessage {
    /// The message with this value, of four bytes at the most.
    fn set(&mut self, level: i32, kind: i32, value: &[u8]) {
        let mut bytes = [0; 4];
        bytes[..value.len()].copy_from_slice(value);
        self.header.cmsg_level = level;
        self.header.cmsg_type = kind;
        // Without the padding at the end: CMSG_LEN.
        self.header.cmsg_len = CMSG_HEADER_BYTES + value.len();
        self.value = i32::from_ne_bytes(bytes);
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
        let local: SocketAddr = "[fe80::7%3]:99".parse().unwrap();
        assert_eq!(parse_name(&bytes("[fe80::7%3]:99")), Some(local));
        let mapped = bytes("[::ffff:10.1.2.3]:99");
        assert_eq!(parse_name(&mapped), Some("10.1.2.3:99".parse().unwrap()));
        for len in 0..8 {
            assert_eq!(parse_name(&v4[..len]), None);
        }
    }

    #[test]
    fn reads_control_messages() {
        let message = |level: i32, kind: i32, value: &[u8]| {
            let mut bytes = (CMSG_HEADER_BYTES + value.len()).to_ne_bytes().to_vec();
            bytes.extend(level.to_ne_bytes());
            bytes.extend(kind.to_ne_bytes());
            bytes.extend(value);
            bytes.resize(CMSG_BYTES, 0);
            bytes
        };
        let gro = message(libc::SOL_UDP, libc::UDP_GRO, &1472_i32.to_ne_bytes());
        let batch = Control {
            segment_bytes: Some(1472),
            ecn: Ecn::NotEct,
        };
        assert_eq!(Control::parse(&gro), batch);
        let other = message(libc::SOL_SOCKET, 1, &7_i32.to_ne_bytes());
        assert_eq!(Control::parse(&[other, gro.clone()].concat()), batch);
        let tos = message(libc::IPPROTO_IP, libc::IP_TOS, &[0xbb]);
        let class = message(libc::IPPROTO_IPV6, libc::IPV6_TCLASS, &3_i32.to_ne_bytes());
        for marked in [tos, class] {
            let both = Control {
                ecn: Ecn::Ce,
                ..batch
            };
            assert_eq!(
                Control::parse(&[gro.clone(), marked.clone()].concat()),
                both
            );
            assert_eq!(Control::parse(&[marked, gro.clone()].concat()), both);
        }
        for bytes in [&[][..], &[0; 16], &[0xff; 24], &gro[..18]] {
            assert_eq!(Control::parse(bytes), Control::default());
        }
    }
}
