//! TCP as fast as it goes, and not one byte unseen.
//!
//! Sender and receiver hold the same block of pseudo-random bytes. What a
//! stream carries at offset `o` is `block[o % BLOCK_BYTES]`, so the receiver
//! compares each read with memory that is hot in its cache: the check costs a
//! fraction of the copy out of the kernel. A stream that lost or repeated a
//! whole number of blocks would still match, therefore lengths are compared too.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use socket2::Socket;

use super::{Between, Watch, all, check_limit, connect, failed, join, listen, pattern};
use crate::error::Result;

/// Bytes of the repeating block, and of each read and write.
const BLOCK_BYTES: usize = 256 * 1024;

/// Most parallel streams: two threads for each.
pub const STREAMS_MAX: usize = 256;

/// How long a transfer may take over its time, until what is under way has
/// arrived, or altogether if only its bytes are limited.
const OVERTIME_MAX: Duration = Duration::from_secs(60);
const TIME_MAX: Duration = Duration::from_secs(3600);

/// The congestion control asked for, so that figures from different hosts
/// compare; the host's own where the kernel does not have it.
const CONGESTION_CONTROL: &[u8] = b"cubic";

/// When a transfer is over.
#[derive(Debug, Clone, Copy)]
pub enum BulkLimit {
    /// Sending ends after this time.
    Time(Duration),
    /// Sending ends after this many bytes on each stream.
    BytesPerStream(u64),
}

/// A transfer to be made.
#[derive(Debug, Clone, Copy)]
pub struct Bulk {
    /// Parallel connections, 1 to [`STREAMS_MAX`].
    pub streams: usize,
    /// When it is over.
    pub limit: BulkLimit,
}

/// How a transfer is made, where it is not as usual.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BulkManner {
    /// The server sends and the client receives.
    pub reverse: bool,
    /// The receiver compares every byte; otherwise it only counts them.
    pub verify: bool,
}

/// From client to server, every byte compared.
impl Default for BulkManner {
    fn default() -> Self {
        Self {
            reverse: false,
            verify: true,
        }
    }
}

/// A transfer that was made.
#[derive(Debug, Clone, Copy)]
pub struct BulkReport {
    /// Bytes received on all streams.
    pub bytes: u64,
    /// From the first byte sent to the end of the last stream received.
    pub elapsed: Duration,
    /// Whether every byte arrived once, in order and unchanged; if they were
    /// not compared, whether as many arrived as were sent.
    pub intact: bool,
    /// Segments sent again, on all streams (`tcpi_total_retrans`, linux/tcp.h).
    pub retransmissions: u64,
}

impl BulkReport {
    /// 10⁹ bits of payload per second.
    pub fn gigabits_per_second(&self) -> f64 {
        self.bytes as f64 * 8.0 / self.elapsed.as_secs_f64() / 1e9
    }
}

/// What a receiver has seen on its stream.
struct Received {
    bytes: u64,
    intact: bool,
}

/// Sends bulk data over TCP from client to server; [`Watch::bytes`] counts
/// what arrives.
///
/// # Errors
/// When a connection fails or stands still for [`STALL_MAX`](super::STALL_MAX),
/// or [`Watch::stop`] is set. Damaged data is no error but a report.
pub fn tcp_bulk(between: Between<'_>, bulk: Bulk, watch: &Watch) -> Result<BulkReport> {
    tcp_bulk_with(between, bulk, BulkManner::default(), watch)
}

/// As [`tcp_bulk`], in the given manner.
///
/// # Errors
/// As [`tcp_bulk`].
pub fn tcp_bulk_with(
    between: Between<'_>,
    bulk: Bulk,
    manner: BulkManner,
    watch: &Watch,
) -> Result<BulkReport> {
    check_limit("number of streams", bulk.streams, 1..=STREAMS_MAX)?;
    run(between, bulk, manner, watch).map_err(|cause| failed("TCP transfer", between, cause))
}

fn run(
    between: Between<'_>,
    bulk: Bulk,
    manner: BulkManner,
    watch: &Watch,
) -> io::Result<BulkReport> {
    let (listener, address) = listen(between, bulk.streams)?;
    let mut connections = Vec::with_capacity(bulk.streams);
    for _ in 0..bulk.streams {
        let (client, server) = connect(between, &listener, address, watch)?;
        let (sender, receiver) = if manner.reverse {
            (server, client)
        } else {
            (client, server)
        };
        // A kernel without it uses what it has.
        let _ = sender.set_tcp_congestion(CONGESTION_CONTROL);
        connections.push((sender, receiver));
    }
    let block = pattern(BLOCK_BYTES);
    // One failed stream ends the others.
    let failed = AtomicBool::new(false);
    let mark = |_: &io::Error| failed.store(true, Ordering::Relaxed);
    let start = Instant::now();
    let end = start
        + match bulk.limit {
            BulkLimit::Time(time) => time + OVERTIME_MAX,
            BulkLimit::BytesPerStream(_) => TIME_MAX,
        };
    let go_on = || !failed.load(Ordering::Relaxed) && !watch.stopped() && Instant::now() < end;

    let (sent, received) = thread::scope(|scope| {
        let mut senders = Vec::new();
        let mut receivers = Vec::new();
        for (sender, receiver) in &connections {
            let (block, go_on, mark) = (&block, &go_on, &mark);
            let expected = manner.verify.then_some(&block[..]);
            receivers.push(
                scope.spawn(move || receive(receiver, expected, watch, go_on).inspect_err(mark)),
            );
            senders
                .push(scope.spawn(move || {
                    send(sender, block, bulk.limit, watch, go_on).inspect_err(mark)
                }));
        }
        let received: Vec<_> = receivers.into_iter().map(join).collect();
        let sent: Vec<_> = senders.into_iter().map(join).collect();
        (sent, received)
    });
    let elapsed = start.elapsed();
    let (received, sent) = (all(received)?, all(sent)?);

    let mut report = BulkReport {
        bytes: received.iter().map(|stream| stream.bytes).sum(),
        elapsed,
        intact: received
            .iter()
            .zip(&sent)
            .all(|(received, sent)| received.intact && received.bytes == *sent),
        retransmissions: 0,
    };
    for (sender, _) in &connections {
        report.retransmissions += retransmissions(sender.as_fd())?;
    }
    Ok(report)
}

/// Sends until the limit; returns the bytes that TCP has taken.
fn send(
    mut socket: &Socket,
    block: &[u8],
    limit: BulkLimit,
    watch: &Watch,
    go_on: &impl Fn() -> bool,
) -> io::Result<u64> {
    let start = Instant::now();
    let mut sent = 0u64;
    loop {
        let room = match limit {
            BulkLimit::Time(time) if start.elapsed() >= time => 0,
            BulkLimit::Time(_) => BLOCK_BYTES,
            BulkLimit::BytesPerStream(bytes) => {
                usize::try_from(bytes - sent).unwrap_or(BLOCK_BYTES)
            }
        };
        let at = position(sent);
        let chunk = &block[at..block.len().min(at.saturating_add(room))];
        if chunk.is_empty() {
            break;
        }
        if !go_on() {
            return Err(stopped());
        }
        sent += watch.retry(|| socket.write(chunk))? as u64;
    }
    socket.shutdown(Shutdown::Write)?;
    Ok(sent)
}

/// Receives until the sender is done; compares every byte with the block that
/// is expected, if one is.
fn receive(
    mut socket: &Socket,
    expected: Option<&[u8]>,
    watch: &Watch,
    go_on: &impl Fn() -> bool,
) -> io::Result<Received> {
    let mut buffer = vec![0; BLOCK_BYTES];
    let mut received = Received {
        bytes: 0,
        intact: true,
    };
    loop {
        let length = watch.retry(|| match socket.read(&mut buffer) {
            // A silent peer whose sender has failed will not speak again.
            Err(_) if !go_on() => Err(stopped()),
            result => result,
        })?;
        if length == 0 {
            return Ok(received);
        }
        if !go_on() {
            return Err(stopped());
        }
        if let Some(block) = expected {
            received.intact &= matches(block, received.bytes, &buffer[..length]);
        }
        received.bytes += length as u64;
        watch.bytes.fetch_add(length as u64, Ordering::Relaxed);
    }
}

/// Whether `data` is what a stream carries at `offset`; at most one block long.
fn matches(block: &[u8], offset: u64, data: &[u8]) -> bool {
    let at = position(offset);
    let (head, tail) = data.split_at(data.len().min(block.len() - at));
    head == &block[at..at + head.len()] && tail == &block[..tail.len()]
}

fn position(offset: u64) -> usize {
    (offset % BLOCK_BYTES as u64) as usize
}

/// Not of a kind that is tried again.
fn stopped() -> io::Error {
    io::Error::other("stopped, or another stream failed, or out of time")
}

/// `tcpi_total_retrans` of a connection (tcp(7), `TCP_INFO`): segments that it
/// sent more than once.
///
/// # Errors
/// When `socket` is none of TCP.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_changed_byte_is_seen() {
        let block = pattern(BLOCK_BYTES);
        let offset = 3 * BLOCK_BYTES as u64 + 100_000;
        let mut data: Vec<u8> = block[100_000..].to_vec();
        data.extend_from_slice(&block[..100_000]);
        assert!(matches(&block, offset, &data));
        assert!(matches(&block, offset, &[]));
        assert!(!matches(&block, offset + 1, &data), "shifted");
        for at in [
            0,
            BLOCK_BYTES - 100_001,
            BLOCK_BYTES - 100_000,
            BLOCK_BYTES - 1,
        ] {
            data[at] ^= 1;
            assert!(!matches(&block, offset, &data), "changed at {at}");
            data[at] ^= 1;
        }
    }
}
