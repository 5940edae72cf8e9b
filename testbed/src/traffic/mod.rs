//! Traffic that only tests and benches need:
//!
//! - [`bulk`]: TCP as fast as it goes, either way.
//! - [`ping_pong`]: round-trip times of small requests over TCP and UDP.
//! - [`flood`]: UDP packets as fast as they go, or at a given rate.
//! - [`ping_up_to`]: pings where some may be lost.
//! - [`retransmissions`]: what a TCP connection had to send again.

pub mod bulk;
pub mod flood;
pub mod ping_pong;

pub use bulk::{Bulk, BulkLimit, tcp_bulk};
pub use fastvpn::testbed::traffic::{Between, PING_BYTES_MAX, TransferReport, Watch, ping};
pub use flood::{Flood, FloodReport, udp_flood};
pub use ping_pong::{Latency, PingPong, tcp_ping_pong, udp_ping_pong};

use std::fs;
use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Duration;

use fastvpn::error::{Error, Result};
use fastvpn::testbed::Namespace;
use fastvpn::testbed::traffic::{POLL_INTERVAL, is_timeout};

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
    match ping(from, to, bytes, timeout) {
        Err(error) if attempts > 1 && error.cause().is_some_and(is_timeout) => {
            ping_up_to(attempts - 1, from, to, bytes, timeout)
        }
        result => result,
    }
}

/// Opens a UDP socket that gives up a blocked call after [`POLL_INTERVAL`].
fn open(namespace: &Namespace, address: impl Into<SocketAddr>) -> io::Result<UdpSocket> {
    let address = address.into();
    let socket = namespace.run(|| UdpSocket::bind(address))?;
    socket.set_read_timeout(Some(POLL_INTERVAL))?;
    socket.set_write_timeout(Some(POLL_INTERVAL))?;
    Ok(socket)
}

/// A socket at the server's address, and one at the client that is connected to it.
fn udp_pair(between: Between<'_>) -> io::Result<(UdpSocket, UdpSocket)> {
    let server = open(between.server, (between.address, 0))?;
    let any: SocketAddr = match between.address.is_ipv4() {
        true => ([0; 4], 0).into(),
        false => ([0u16; 8], 0).into(),
    };
    let client = open(between.client, any)?;
    client.connect(server.local_addr()?)?;
    Ok((client, server))
}

/// `tcpi_total_retrans` of a connection (tcp(7), `TCP_INFO`): segments that it
/// sent more than once.
///
/// # Errors
/// When `socket` is not a TCP socket.
pub fn retransmissions(socket: BorrowedFd<'_>) -> io::Result<u64> {
    // SAFETY: tcp_info is plain integers, for which all zeros is a value. An
    // older kernel fills in less of it than we know.
    let mut info: libc::tcp_info = unsafe { std::mem::zeroed() };
    let mut length = size_of_val(&info) as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes to `info`, which has
    // them, and both outlive the call.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            (&raw mut info).cast(),
            &raw mut length,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(u64::from(info.tcpi_total_retrans))
}

/// A counter of a namespace's network stack, by its names in /proc/net/snmp, such
/// as `Tcp` and `RetransSegs`.
///
/// # Errors
/// When there is no such counter.
pub fn snmp_counter(namespace: &Namespace, protocol: &str, name: &str) -> Result<u64> {
    let text = namespace.run(|| fs::read_to_string("/proc/thread-self/net/snmp"));
    let text = text.map_err(|cause| Error::os("cannot read /proc/net/snmp", cause))?;
    // A line of names, and one of numbers.
    let prefix = format!("{protocol}:");
    let mut lines = text.lines().filter(|line| line.starts_with(&prefix));
    let (names, numbers) = (lines.next(), lines.next());
    let columns = names.zip(numbers).and_then(|(names, numbers)| {
        let mut columns = names.split(' ').zip(numbers.split(' '));
        columns.find(|(column, _)| *column == name)
    });
    columns
        .and_then(|(_, number)| number.parse().ok())
        .ok_or_else(|| Error::new(format!("/proc/net/snmp has no {protocol} {name}")))
}

fn failed(what: &str, between: Between<'_>, cause: io::Error) -> Error {
    Error::os(format!("{what} to {} failed", between.address), cause)
}

#[cfg(test)]
mod tests;
