//! ICMP echo: is the other side there, and do its packets come back whole?

use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use socket2::{Domain, Protocol, Socket, Type};

use super::{check_limit, is_timeout, pattern};
use crate::error::{Error, Result};
use crate::testbed::Namespace;

/// Largest payload in bytes; the kernel fragments what is longer than the MTU.
pub const PING_BYTES_MAX: usize = 65_000;

/// Most attempts at one ping.
const ATTEMPTS_MAX: usize = 1000;

/// RFC 792 and RFC 4443: type, code, checksum, identifier, sequence number.
const HEADER_BYTES: usize = 8;
const SEQUENCE: std::ops::Range<usize> = 6..8;
const ECHO_REPLY_V4: u8 = 0;
const ECHO_REQUEST_V4: u8 = 8;
const ECHO_REQUEST_V6: u8 = 128;
const ECHO_REPLY_V6: u8 = 129;

/// The one echo request of each socket. Not 0, so that an empty answer differs.
const SEQUENCE_NUMBER: [u8; 2] = [0, 1];

/// Sends one echo request with `bytes` of payload and waits for its answer;
/// returns the round-trip time.
///
/// # Errors
/// When no answer comes within `timeout`, when it comes back changed, when
/// there is no route, or when the payload is larger than [`PING_BYTES_MAX`].
pub fn ping(from: &Namespace, to: IpAddr, bytes: usize, timeout: Duration) -> Result<Duration> {
    ping_up_to(1, from, to, bytes, timeout)
}

/// As [`ping`], but asks up to `attempts` times for an answer: on a busy host
/// one fragment lost from the backlog takes a whole large ping with it, which
/// is no fault of the network under test.
///
/// # Errors
/// As [`ping`], when no attempt was answered.
pub fn ping_up_to(
    attempts: usize,
    from: &Namespace,
    to: IpAddr,
    bytes: usize,
    timeout: Duration,
) -> Result<Duration> {
    check_limit("ping payload", bytes, 0..=PING_BYTES_MAX)?;
    check_limit("number of pings", attempts, 1..=ATTEMPTS_MAX)?;
    let mut result = ask(from, to, bytes, timeout);
    for _ in 1..attempts {
        match &result {
            Err(error) if is_timeout(error) => result = ask(from, to, bytes, timeout),
            _ => break,
        }
    }
    match result {
        Ok(Some(time)) => Ok(time),
        Ok(None) => Err(Error::new(format!(
            "the answer of {to} to a ping of {bytes} bytes came back changed"
        ))),
        Err(error) if is_timeout(&error) => Err(Error::new(format!(
            "{to} did not answer a ping of {bytes} bytes within {} ms, asked {attempts} times",
            timeout.as_millis()
        ))),
        Err(cause) => Err(Error::os(format!("cannot ping {to}"), cause)),
    }
}

fn ask(
    from: &Namespace,
    to: IpAddr,
    bytes: usize,
    timeout: Duration,
) -> io::Result<Option<Duration>> {
    let deadline = Instant::now() + timeout;
    let socket = open(from, to)?;
    exchange(&socket, to, bytes, deadline)
}

/// A ping socket (icmp(7)): the kernel fills in identifier and checksum, and
/// passes on only the answers that belong to it.
fn open(from: &Namespace, to: IpAddr) -> io::Result<Socket> {
    let target = SocketAddr::new(to, 0);
    let protocol = match to {
        IpAddr::V4(_) => Protocol::ICMPV4,
        IpAddr::V6(_) => Protocol::ICMPV6,
    };
    let socket =
        from.run(|| Socket::new(Domain::for_address(target), Type::DGRAM, Some(protocol)))?;
    // Two of the largest must fit, of which the kernel doubles the accounting.
    socket.set_recv_buffer_size(4 * PING_BYTES_MAX)?;
    socket.set_send_buffer_size(4 * PING_BYTES_MAX)?;
    socket.connect(&target.into())?;
    Ok(socket)
}

/// `None` when the answer's payload differs from the request's.
fn exchange(
    mut socket: &Socket,
    to: IpAddr,
    bytes: usize,
    deadline: Instant,
) -> io::Result<Option<Duration>> {
    let (request_type, reply_type) = match to {
        IpAddr::V4(_) => (ECHO_REQUEST_V4, ECHO_REPLY_V4),
        IpAddr::V6(_) => (ECHO_REQUEST_V6, ECHO_REPLY_V6),
    };
    let mut request = vec![0; HEADER_BYTES];
    request[0] = request_type;
    request[SEQUENCE].copy_from_slice(&SEQUENCE_NUMBER);
    request.extend(pattern(bytes));
    // Longer than any answer, so that one that has grown is seen.
    let mut answer = vec![0; HEADER_BYTES + PING_BYTES_MAX + 1];
    let sent = Instant::now();
    socket.write_all(&request)?;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        // Less than a microsecond would become zero, which means forever.
        socket.set_read_timeout(Some(left.max(Duration::from_millis(1))))?;
        let length = socket.read(&mut answer)?;
        let answer = &answer[..length];
        if length >= HEADER_BYTES && answer[0] == reply_type && answer[SEQUENCE] == SEQUENCE_NUMBER
        {
            let intact = answer[HEADER_BYTES..] == request[HEADER_BYTES..];
            return Ok(intact.then(|| sent.elapsed()));
        }
    }
}
