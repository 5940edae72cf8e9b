//! ICMP echo: is the other side there, and do its packets come back whole?

use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use socket2::{Domain, Protocol, Socket, Type};

use super::{is_timeout, pattern};
use crate::error::{Error, Result};
use crate::testbed::Namespace;

/// Largest payload in bytes; the kernel fragments what is longer than the MTU.
pub const PING_BYTES_MAX: usize = 65_000;

/// RFC 792 and RFC 4443: type, code, checksum, identifier, sequence number.
const HEADER_BYTES: usize = 8;
const SEQUENCE: std::ops::Range<usize> = 6..8;
const ECHO_REPLY_V4: u8 = 0;
const ECHO_REQUEST_V4: u8 = 8;
const ECHO_REQUEST_V6: u8 = 128;
const ECHO_REPLY_V6: u8 = 129;

/// Sends one echo request with `bytes` of payload and waits for its answer;
/// returns the round-trip time.
///
/// # Errors
/// When no answer comes within `timeout`, when it comes back changed, when
/// there is no route, or when the payload is larger than [`PING_BYTES_MAX`].
pub fn ping(from: &Namespace, to: IpAddr, bytes: usize, timeout: Duration) -> Result<Duration> {
    Pinger::open(from, to)?.ping(bytes, timeout)
}

/// Sends echo requests to one address, one after another.
pub struct Pinger {
    socket: Socket,
    to: IpAddr,
    sequence: u16,
}

impl Pinger {
    /// Opens a ping socket (icmp(7)): the kernel fills in identifier and
    /// checksum, and passes on only the answers that belong to it.
    ///
    /// # Errors
    /// When the kernel has none for us, or there is no route.
    pub fn open(from: &Namespace, to: IpAddr) -> Result<Self> {
        let target = SocketAddr::new(to, 0);
        let protocol = match to {
            IpAddr::V4(_) => Protocol::ICMPV4,
            IpAddr::V6(_) => Protocol::ICMPV6,
        };
        let domain = Domain::for_address(target);
        let open = || {
            let socket = from.run(|| Socket::new(domain, Type::DGRAM, Some(protocol)))?;
            // Two of the largest must fit, of which the kernel doubles the accounting.
            socket.set_recv_buffer_size(4 * PING_BYTES_MAX)?;
            socket.set_send_buffer_size(4 * PING_BYTES_MAX)?;
            socket.connect(&target.into())?;
            Ok(socket)
        };
        let socket = open().map_err(|cause| Error::os(format!("cannot ping {to}"), cause))?;
        Ok(Self {
            socket,
            to,
            sequence: 0,
        })
    }

    /// As [`ping`].
    ///
    /// # Errors
    /// As [`ping`].
    pub fn ping(&mut self, bytes: usize, timeout: Duration) -> Result<Duration> {
        let to = self.to;
        self.exchange(bytes, timeout)
            .map_err(|cause| Error::os(format!("cannot ping {to} with {bytes} bytes"), cause))
    }

    fn exchange(&mut self, bytes: usize, timeout: Duration) -> io::Result<Duration> {
        let (request_type, reply_type) = match self.to {
            IpAddr::V4(_) => (ECHO_REQUEST_V4, ECHO_REPLY_V4),
            IpAddr::V6(_) => (ECHO_REQUEST_V6, ECHO_REPLY_V6),
        };
        // Not 0 at first, so that an empty answer differs.
        self.sequence = self.sequence.wrapping_add(1);
        let sequence = self.sequence.to_be_bytes();
        let mut request = vec![0; HEADER_BYTES];
        request[0] = request_type;
        request[SEQUENCE].copy_from_slice(&sequence);
        request.extend(pattern(bytes));
        // Longer than the right answer, so that one that has grown is seen.
        let mut answer = vec![0; request.len() + 1];
        let sent = Instant::now();
        self.socket.write_all(&request)?;
        loop {
            let left = timeout.saturating_sub(sent.elapsed());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            // Less than a microsecond would become zero, which means forever.
            let left = left.max(Duration::from_millis(1));
            self.socket.set_read_timeout(Some(left))?;
            let length = match self.socket.read(&mut answer) {
                Err(error) if is_timeout(&error) => continue,
                length => length?,
            };
            let answer = &answer[..length];
            if length < HEADER_BYTES || answer[0] != reply_type || answer[SEQUENCE] != sequence {
                continue;
            }
            if answer[HEADER_BYTES..] != request[HEADER_BYTES..] {
                return Err(io::Error::other("the answer came back changed"));
            }
            return Ok(sent.elapsed());
        }
    }
}
