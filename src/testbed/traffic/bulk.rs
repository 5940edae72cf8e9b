//! TCP as fast as it goes, and not one byte unseen.
//!
//! Sender and receiver hold the same block of pseudo-random bytes. What a
//! stream carries at offset `o` is `block[o % BLOCK_BYTES]`, so the receiver
//! compares each read with memory that is hot in its cache: the check costs a
//! fraction of the copy out of the kernel. A stream that lost or repeated a
//! whole number of blocks would still match, therefore lengths are compared too.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use socket2::SockRef;

use super::{Between, POLL_INTERVAL, Watch, pattern};
use crate::error::{Error, Result};
use crate::testbed::namespace::join;

/// Bytes of the repeating block, and of each read and write.
const BLOCK_BYTES: usize = 256 * 1024;

/// How long a connection may take to come about.
const CONNECT_MAX: Duration = Duration::from_secs(30);

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
    /// Parallel connections, each with two threads.
    pub streams: usize,
    /// When it is over.
    pub limit: BulkLimit,
    /// The server sends and the client receives.
    pub reverse: bool,
    /// The receiver compares every byte; otherwise it only counts them.
    pub verify: bool,
}

impl Bulk {
    /// From client to server, every byte compared.
    pub fn new(streams: usize, limit: BulkLimit) -> Self {
        Self {
            streams,
            limit,
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
}

impl BulkReport {
    /// 10⁹ bits of payload per second.
    pub fn gigabits_per_second(&self) -> f64 {
        self.bytes as f64 * 8.0 / self.elapsed.as_secs_f64() / 1e9
    }
}

/// Sends bulk data over TCP; [`Watch::bytes`] counts what arrives.
///
/// # Errors
/// When a connection fails or stands still, or [`Watch::stop`] is set. Damaged
/// data is no error but a report.
pub fn tcp_bulk(between: Between<'_>, bulk: Bulk, watch: &Watch) -> Result<BulkReport> {
    let connections = (0..bulk.streams).map(|_| {
        let (client, server) = connect(between)?;
        Ok(if bulk.reverse {
            (server, client)
        } else {
            (client, server)
        })
    });
    connections
        .collect::<io::Result<Vec<_>>>()
        .and_then(|connections| run(&connections, bulk, watch))
        .map_err(|cause| Error::os(format!("TCP transfer to {} failed", between.address), cause))
}

/// Makes one TCP connection, both of whose ends give up a blocked call after
/// [`POLL_INTERVAL`]; gives the client's end and the server's.
///
/// # Errors
/// When it does not come about.
pub fn connect(between: Between<'_>) -> io::Result<(TcpStream, TcpStream)> {
    let listener = between
        .server
        .run(|| TcpListener::bind((between.address, 0)))?;
    SockRef::from(&listener).set_read_timeout(Some(CONNECT_MAX))?;
    let address = listener.local_addr()?;
    let client = between
        .client
        .run(|| TcpStream::connect_timeout(&address, CONNECT_MAX))?;
    let (server, _) = listener.accept()?;
    for end in [&client, &server] {
        end.set_read_timeout(Some(POLL_INTERVAL))?;
        end.set_write_timeout(Some(POLL_INTERVAL))?;
    }
    Ok((client, server))
}

/// `connections`: each one's sending and its receiving end.
fn run(
    connections: &[(TcpStream, TcpStream)],
    bulk: Bulk,
    watch: &Watch,
) -> io::Result<BulkReport> {
    let block = pattern(BLOCK_BYTES);
    let expected = bulk.verify.then_some(&block[..]);
    let start = Instant::now();
    let streams: Vec<_> = thread::scope(|scope| {
        let streams = connections.iter().map(|(sender, receiver)| {
            // A kernel without it uses what it has.
            let _ = SockRef::from(sender).set_tcp_congestion(CONGESTION_CONTROL);
            let received = scope.spawn(move || receive(receiver, expected, watch));
            let sent = scope.spawn(|| send(sender, &block, bulk.limit, watch));
            (sent, received)
        });
        let streams: Vec<_> = streams.collect();
        let joined = |(sent, received)| (join(sent), join(received));
        streams.into_iter().map(joined).collect()
    });
    let mut report = BulkReport {
        bytes: 0,
        elapsed: start.elapsed(),
        intact: true,
    };
    for (sent, received) in streams {
        let (bytes, intact) = received?;
        report.bytes += bytes;
        report.intact &= intact && bytes == sent?;
    }
    Ok(report)
}

/// Sends until the limit; returns the bytes that TCP has taken.
fn send(mut socket: &TcpStream, block: &[u8], limit: BulkLimit, watch: &Watch) -> io::Result<u64> {
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
        sent += watch.retry(|| socket.write(chunk))? as u64;
    }
    socket.shutdown(Shutdown::Write)?;
    Ok(sent)
}

/// Receives until the sender is done; compares every byte with the block that
/// is expected, if one is. Returns how many came, and whether they were right.
fn receive(
    mut socket: &TcpStream,
    expected: Option<&[u8]>,
    watch: &Watch,
) -> io::Result<(u64, bool)> {
    let mut buffer = vec![0; BLOCK_BYTES];
    let (mut bytes, mut intact) = (0, true);
    loop {
        let length = watch.retry(|| socket.read(&mut buffer))?;
        if length == 0 {
            return Ok((bytes, intact));
        }
        if let Some(block) = expected {
            intact &= matches(block, bytes, &buffer[..length]);
        }
        bytes += length as u64;
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
