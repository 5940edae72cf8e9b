//! The memory behind `sendmsg(2)` and `recvmsg(2)` requests: it must stay
//! where it is while the kernel works on it.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV6};

use std::os::fd::{AsRawFd, BorrowedFd};

use nix::errno::Errno;
use socket2::SockAddr;

use crate::packet::batch::Batch;
use crate::packet::ecn::Ecn;
use crate::packet::ip::{self, canonical};
use crate::wire::Endpoint;

/// Bytes of the longest sender's address: `sockaddr_in6`.
const NAME_BYTES: usize = 28;

/// Bytes reserved for control messages: `UDP_GRO`'s or `UDP_SEGMENT`'s segment size
/// (`udp(7)`), TOS or traffic class, and this host's address (`ip(7)`, `ipv6(7)`).
const CONTROL_BYTES: usize = 24 + 24 + 40;

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
    /// The address of this host that they were sent to, if it may be sent from.
    pub called: Option<IpAddr>,
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
                // `struct in_pktinfo`: interface, local address, destination.
                (libc::IPPROTO_IP, libc::IP_PKTINFO, data) => {
                    let local = data.get(4..).and_then(<[u8]>::first_chunk::<4>);
                    control.called = local.and_then(|&octets| source(octets.into()));
                }
                // `struct in6_pktinfo` begins with the destination.
                (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO, data) => {
                    let local = data.first_chunk::<16>();
                    control.called = local.and_then(|&octets| source(octets.into()));
                }
                _ => {}
            }
            bytes = rest;
        }
        control
    }
}

/// An address that datagrams were sent to, if answers may be sent from it. Link-local
/// addresses are left to the kernel, which has one for each link.
fn source(called: IpAddr) -> Option<IpAddr> {
    let called = called.to_canonical();
    let is_own = match called {
        IpAddr::V4(called) => !called.is_broadcast() && !called.is_unspecified(),
        IpAddr::V6(called) => !called.is_unicast_link_local() && !called.is_unspecified(),
    };
    Some(called).filter(|_| is_own && !called.is_multicast())
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

impl ReceivedMessage {
    /// Where answers go, and from where.
    pub fn endpoint(&self) -> Endpoint {
        Endpoint {
            address: self.sender,
            source: self.control.called,
        }
    }
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
    control: ControlMessages,
}

// SAFETY: the pointers in it point into itself or to a batch that the same
// engine holds; nothing is shared between threads.
unsafe impl Send for SendMessage {}

impl SendMessage {
    /// A message with nothing in it.
    pub fn new() -> Self {
        let nowhere = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0));
        // SAFETY: all-zero is valid for both: null pointers, zero lengths.
        let (header, payload) = unsafe { std::mem::zeroed::<(libc::msghdr, libc::iovec)>() };
        Self {
            header,
            payload,
            name: SockAddr::from(nowhere),
            control: ControlMessages::default(),
        }
    }

    /// Points the message at a batch's bytes and returns its header.
    ///
    /// The pointer is good while `self` stays in place and the batch is
    /// neither dropped nor changed.
    #[inline]
    pub fn prepare(&mut self, batch: &Batch, to: Endpoint) -> *const libc::msghdr {
        self.control.bytes = 0;
        // Even one segment is refused when it is longer than the MTU; without the
        // control message the kernel fragments it.
        if batch.count() > 1 {
            let segment_bytes = (batch.segment_bytes() as u16).to_ne_bytes();
            self.control
                .push(libc::SOL_UDP, libc::UDP_SEGMENT, &segment_bytes);
        }
        if batch.tos() != 0 {
            let (level, kind) = match ip::canonical(to.address) {
                SocketAddr::V4(_) => (libc::IPPROTO_IP, libc::IP_TOS),
                SocketAddr::V6(_) => (libc::IPPROTO_IPV6, libc::IPV6_TCLASS),
            };
            let tos = i32::from(batch.tos()).to_ne_bytes();
            self.control.push(level, kind, &tos);
        }
        if let Some(source) = to.source {
            self.control.push_source(source);
        }
        self.point(batch.bytes(), to.address)
    }

    /// Points the message at these bytes, with the control messages that it has.
    #[inline]
    fn point(&mut self, payload: &[u8], destination: SocketAddr) -> *const libc::msghdr {
        self.payload.iov_base = payload.as_ptr().cast_mut().cast();
        self.payload.iov_len = payload.len();
        self.name = SockAddr::from(destination);
        self.header.msg_name = self.name.as_ptr().cast_mut().cast();
        self.header.msg_namelen = self.name.len();
        self.header.msg_iov = &raw mut self.payload;
        self.header.msg_iovlen = 1;
        self.header.msg_control = self.control.words.as_mut_ptr().cast();
        self.header.msg_controllen = self.control.bytes;
        &raw const self.header
    }
}

/// Control messages back to back, aligned as the kernel wants them.
#[derive(Default)]
struct ControlMessages {
    words: [u64; CONTROL_BYTES / 8],
    /// Bytes that are in use.
    bytes: usize,
}

impl ControlMessages {
    /// Adds one; there is room for one of each kind.
    #[inline]
    fn push(&mut self, level: i32, kind: i32, value: &[u8]) {
        let message_bytes = CMSG_HEADER_BYTES + value.len();
        let words = &mut self.words[self.bytes / 8..];
        words[0] = message_bytes as u64;
        let ([a, b, c, d], [e, f, g, h]) = (level.to_ne_bytes(), kind.to_ne_bytes());
        words[1] = u64::from_ne_bytes([a, b, c, d, e, f, g, h]);
        for (word, chunk) in words[2..].iter_mut().zip(value.chunks(8)) {
            let mut bytes = [0; 8];
            bytes[..chunk.len()].copy_from_slice(chunk);
            *word = u64::from_ne_bytes(bytes);
        }
        self.bytes += message_bytes.next_multiple_of(8);
    }

    /// Adds the address to send from. The route says the interface, as it would without.
    fn push_source(&mut self, source: IpAddr) {
        match source {
            // `struct in_pktinfo`: interface, local address, destination.
            IpAddr::V4(source) => {
                let mut info = [0; 12];
                info[4..8].copy_from_slice(&source.octets());
                self.push(libc::IPPROTO_IP, libc::IP_PKTINFO, &info);
            }
            // `struct in6_pktinfo`: local address, interface.
            IpAddr::V6(source) => {
                let mut info = [0; 20];
                info[..16].copy_from_slice(&source.octets());
                self.push(libc::IPPROTO_IPV6, libc::IPV6_PKTINFO, &info);
            }
        }
    }
}

/// `sendmsg(2)` of a batch, without waiting. `memory`: where its parameters go.
#[inline]
pub fn send(
    socket: BorrowedFd<'_>,
    memory: &mut SendMessage,
    batch: &Batch,
    to: Endpoint,
) -> nix::Result<()> {
    let header = memory.prepare(batch, to);
    // SAFETY: the header points to live memory of the lengths it states: to
    // `memory`, which does not move, and to the batch's bytes.
    unsafe { send_prepared(socket, header) }
}

/// The same of one datagram.
pub fn send_datagram(socket: BorrowedFd<'_>, datagram: &[u8], to: Endpoint) -> nix::Result<()> {
    let mut memory = SendMessage::new();
    if let Some(source) = to.source {
        memory.control.push_source(source);
    }
    let header = memory.point(datagram, to.address);
    // SAFETY: the header points to live memory of the lengths it states: to
    // `memory`, which does not move, and to the datagram.
    unsafe { send_prepared(socket, header) }
}

/// # Safety
/// All that the header points to is there, and as long as it says.
#[inline]
unsafe fn send_prepared(socket: BorrowedFd<'_>, header: *const libc::msghdr) -> nix::Result<()> {
    // SAFETY: the caller vouches for the header.
    let sent = unsafe { libc::sendmsg(socket.as_raw_fd(), header, libc::MSG_DONTWAIT) };
    Errno::result(sent).map(drop)
}

#[cfg(test)]
mod tests {
    use std::net::Ipv6Addr;

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
            bytes.resize(bytes.len().next_multiple_of(8), 0);
            bytes
        };
        let gro = message(libc::SOL_UDP, libc::UDP_GRO, &1472_i32.to_ne_bytes());
        let batch = Control {
            segment_bytes: Some(1472),
            ..Control::default()
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
        let called = |kind: (i32, i32), value: &[u8]| {
            let info = message(kind.0, kind.1, value);
            let control = Control::parse(&[info, gro.clone()].concat());
            assert_eq!(control.segment_bytes, batch.segment_bytes);
            control.called
        };
        let v4 = |local: [u8; 4]| {
            let info = [&[7, 0, 0, 0], &local[..], &[10, 0, 0, 9]].concat();
            called((libc::IPPROTO_IP, libc::IP_PKTINFO), &info)
        };
        assert_eq!(v4([10, 0, 0, 1]), Some([10, 0, 0, 1].into()));
        for nowhere in [[0; 4], [255; 4], [224, 0, 0, 1]] {
            assert_eq!(v4(nowhere), None);
        }
        let v6 = |local: &str| {
            let local: Ipv6Addr = local.parse().unwrap();
            let info = [&local.octets()[..], &[7, 0, 0, 0]].concat();
            called((libc::IPPROTO_IPV6, libc::IPV6_PKTINFO), &info)
        };
        assert_eq!(v6("fd00::1"), "fd00::1".parse().ok());
        assert_eq!(v6("::ffff:10.0.0.1"), Some([10, 0, 0, 1].into()));
        for nowhere in ["::", "fe80::1", "ff02::1", "::ffff:224.0.0.1"] {
            assert_eq!(v6(nowhere), None);
        }
        for bytes in [&[][..], &[0; 16], &[0xff; 24], &gro[..18]] {
            assert_eq!(Control::parse(bytes), Control::default());
        }
    }
}
