//! Traffic for the lab: made, received and checked inside this process, and
//! bounded in time and bytes.
//!
//! - [`bulk`]: TCP as fast as it goes, every byte compared.
//! - [`ping_pong`]: round-trip times of small requests over TCP and UDP.
//! - [`icmp`]: echo requests of any size.
//! - [`flood`]: UDP packets as fast as they go, or at a given rate.
//!
//! A socket stays in the namespace where it was opened, so only that happens
//! inside; the threads that use it need not be there.

pub mod bulk;
pub mod flood;
pub mod icmp;
pub mod ping_pong;

pub use bulk::{Bulk, BulkLimit, BulkManner, BulkReport, tcp_bulk, tcp_bulk_with};
pub use flood::{Flood, FloodReport, udp_flood};
pub use icmp::{PING_BYTES_MAX, ping, ping_up_to};
pub use ping_pong::{Latency, PingPong, tcp_ping_pong, udp_ping_pong};

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use socket2::{Domain, Socket, Type};

use super::Namespace;
use crate::error::{Error, Result};

/// How long a connection may stand still before the transfer has failed.
pub const STALL_MAX: Duration = Duration::from_secs(30);

/// How long a connection may take to come about.
const CONNECT_MAX: Duration = Duration::from_secs(30);

/// How often a blocked socket looks whether it should stop.
const POLL_INTERVAL: Duration = Duration::from_millis(100);

/// Who talks to whom.
#[derive(Clone, Copy)]
pub struct Between<'a> {
    /// Where the client's sockets are opened.
    pub client: &'a Namespace,
    /// Where the server's sockets are opened.
    pub server: &'a Namespace,
    /// The server's address; which way the packets go follows from it.
    pub address: IpAddr,
}

/// What running traffic and the one who waits for it share.
#[derive(Debug, Default)]
pub struct Watch {
    /// Set it, and all traffic ends with an error within a moment. A signal
    /// handler may hold it.
    pub stop: Arc<AtomicBool>,
    /// Bytes of payload received so far.
    pub bytes: AtomicU64,
}

impl Watch {
    /// Whether [`Watch::stop`] is set.
    pub fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// Repeats an operation on a socket with a timeout until it succeeds,
    /// [`Watch::stop`] is set, or [`STALL_MAX`] has passed.
    fn retry<T>(&self, mut operation: impl FnMut() -> io::Result<T>) -> io::Result<T> {
        let mut waiting_since = None;
        loop {
            match operation() {
                Err(error) if is_timeout(&error) => {
                    let since = *waiting_since.get_or_insert_with(Instant::now);
                    if self.stopped() {
                        return Err(io::Error::new(io::ErrorKind::Interrupted, "stopped"));
                    }
                    if since.elapsed() > STALL_MAX {
                        return Err(io::ErrorKind::TimedOut.into());
                    }
                }
                result => return result,
            }
        }
    }
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted
    )
}

/// Opens a socket that gives up a blocked call after [`POLL_INTERVAL`].
fn open(namespace: &Namespace, address: IpAddr, kind: Type) -> io::Result<Socket> {
    let domain = Domain::for_address(SocketAddr::new(address, 0));
    let socket = namespace.run(|| Socket::new(domain, kind, None))?;
    socket.set_read_timeout(Some(POLL_INTERVAL))?;
    socket.set_write_timeout(Some(POLL_INTERVAL))?;
    Ok(socket)
}

/// Opens a TCP listener on a port of the kernel's choice.
fn listen(between: Between<'_>, streams: usize) -> io::Result<(Socket, SocketAddr)> {
    let listener = open(between.server, between.address, Type::STREAM)?;
    listener.bind(&SocketAddr::new(between.address, 0).into())?;
    listener.listen(i32::try_from(streams).unwrap_or(i32::MAX))?;
    let address = local_address(&listener)?;
    Ok((listener, address))
}

/// Makes one TCP connection; gives the client's end and the server's.
fn connect(
    between: Between<'_>,
    listener: &Socket,
    address: SocketAddr,
    watch: &Watch,
) -> io::Result<(Socket, Socket)> {
    let client = open(between.client, between.address, Type::STREAM)?;
    client.connect_timeout(&address.into(), CONNECT_MAX)?;
    let (server, _) = watch.retry(|| listener.accept())?;
    server.set_read_timeout(Some(POLL_INTERVAL))?;
    server.set_write_timeout(Some(POLL_INTERVAL))?;
    Ok((client, server))
}

fn local_address(socket: &Socket) -> io::Result<SocketAddr> {
    socket
        .local_addr()?
        .as_socket()
        .ok_or_else(|| io::ErrorKind::AddrNotAvailable.into())
}

/// `bytes` pseudo-random bytes, the same in every run.
fn pattern(bytes: usize) -> Vec<u8> {
    // xorshift64 (Marsaglia, 2003): no byte-sized structure that a shifted or
    // swapped segment could hide in.
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut words = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    let mut out = Vec::with_capacity(bytes + 8);
    while out.len() < bytes {
        out.extend(words.next().unwrap_or_default());
    }
    out.truncate(bytes);
    out
}

fn failed(what: &str, between: Between<'_>, cause: io::Error) -> Error {
    Error::os(format!("{what} to {} failed", between.address), cause)
}

/// The first error of several threads' results, or all that they came to.
fn all<T>(results: impl IntoIterator<Item = io::Result<T>>) -> io::Result<Vec<T>> {
    results.into_iter().collect()
}

/// A thread's result; its panic goes on here.
fn join<T>(handle: std::thread::ScopedJoinHandle<'_, T>) -> T {
    handle
        .join()
        .unwrap_or_else(|payload| std::panic::resume_unwind(payload))
}

/// Checks a count from the outside against a limit with a name.
fn check_limit(what: &str, value: usize, range: std::ops::RangeInclusive<usize>) -> Result<()> {
    if range.contains(&value) {
        return Ok(());
    }
    Err(Error::new(format!(
        "{what} {value} is not between {} and {}",
        range.start(),
        range.end()
    )))
}

#[cfg(test)]
mod tests;
