//! TCP as fast as it goes, and not one byte unseen.
//!
//! Sender and receiver hold the same block of pseudo-random bytes, which a stream
//! carries again and again. Each read goes to its place in such a block, so the receiver
//! compares it with memory that is hot in its cache: the check costs a fraction of the
//! copy out of the kernel. A stream that lost or repeated a whole number of blocks would
//! still match, therefore lengths are compared too.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use socket2::SockRef;

use super::{Between, POLL_INTERVAL, Watch, pattern};
use crate::testbed::result_of;

/// Bytes of the repeating block, and the most of each read and write.
const BLOCK_BYTES: usize = 256 * 1024;

/// How long a connection may take to come about.
const CONNECT_MAX: Duration = Duration::from_secs(30);

/// The congestion control asked for, so that figures from different hosts
/// compare; the host's own where the kernel does not have it.
const CONGESTION_CONTROL: &[u8] = b"cubic";

/// A transfer to be made.
#[derive(Debug, Clone, Copy)]
pub struct Transfer {
    /// Sending ends after this time.
    pub time_max: Duration,
    /// Sending ends after this many bytes on each connection.
    pub bytes_max: u64,
    /// The receiver compares every byte; otherwise it only counts them.
    pub verify: bool,
}

/// A transfer that was made: as many bytes arrived as were sent, and the same.
#[derive(Debug, Clone, Copy)]
pub struct TransferReport {
    /// Bytes received on all connections.
    pub bytes: u64,
    /// From the first byte sent to the end of the last stream received.
    pub elapsed: Duration,
}

impl TransferReport {
    /// 10⁹ bits of payload per second.
    pub fn gigabits_per_second(&self) -> f64 {
        self.bytes as f64 * 8.0 / self.elapsed.as_secs_f64() / 1e9
    }
}

impl Transfer {
    /// Sends on the first socket of each pair, and receives on the second.
    ///
    /// # Errors
    /// When a connection fails or stands still, or [`Watch::stop`] is set. Of the kind
    /// `InvalidData` if something did not arrive as it was sent.
    pub fn run(
        self,
        pairs: &[(TcpStream, TcpStream)],
        watch: &Watch,
    ) -> io::Result<TransferReport> {
        let block = pattern(BLOCK_BYTES);
        let start = Instant::now();
        let streams: Vec<_> = thread::scope(|scope| {
            let streams = pairs.iter().map(|(sender, receiver)| {
                // A kernel without it uses what it has.
                let _ = SockRef::from(sender).set_tcp_congestion(CONGESTION_CONTROL);
                let received = scope.spawn(|| self.receive(receiver, &block, watch));
                let sent = scope.spawn(|| self.send(sender, &block, watch));
                (sent, received)
            });
            let streams: Vec<_> = streams.collect();
            let joined = |(sent, received)| (result_of(sent), result_of(received));
            streams.into_iter().map(joined).collect()
        });
        let elapsed = start.elapsed();
        let mut bytes = 0;
        for (sent, received) in streams {
            let received = received?;
            if sent? != received {
                return Err(damaged());
            }
            bytes += received;
        }
        Ok(TransferReport { bytes, elapsed })
    }

    /// Sends until the limit; returns the bytes that TCP has taken.
    fn send(&self, mut socket: &TcpStream, block: &[u8], watch: &Watch) -> io::Result<u64> {
        let start = Instant::now();
        let mut sent = 0;
        while sent < self.bytes_max && start.elapsed() < self.time_max {
            let rest = &block[position(sent)..];
            let room = usize::try_from(self.bytes_max - sent).unwrap_or(BLOCK_BYTES);
            let chunk = &rest[..rest.len().min(room)];
            sent += watch.retry(|| socket.write(chunk))? as u64;
        }
        socket.shutdown(Shutdown::Write)?;
        Ok(sent)
    }

    /// Receives until the sender is done; returns how many bytes came.
    fn receive(&self, mut socket: &TcpStream, block: &[u8], watch: &Watch) -> io::Result<u64> {
        let mut buffer = vec![0; BLOCK_BYTES];
        let (mut bytes, mut is_intact) = (0, true);
        loop {
            let at = position(bytes);
            let length = watch.retry(|| socket.read(&mut buffer[at..]))?;
            if length == 0 {
                break;
            }
            let came = at..at + length;
            is_intact &= !self.verify || buffer[came.clone()] == block[came];
            bytes += length as u64;
        }
        match is_intact {
            true => Ok(bytes),
            false => Err(damaged()),
        }
    }
}

fn position(offset: u64) -> usize {
    (offset % BLOCK_BYTES as u64) as usize
}

fn damaged() -> io::Error {
    let text = "bytes did not arrive as they were sent";
    io::Error::new(io::ErrorKind::InvalidData, text)
}

/// Makes one TCP connection, both of whose ends give up a blocked call after
/// [`POLL_INTERVAL`]; gives the client's end and the server's.
///
/// # Errors
/// When it does not come about.
pub fn connect(between: Between<'_>) -> io::Result<(TcpStream, TcpStream)> {
    let bind = || TcpListener::bind((between.address, 0));
    let listener = between.server.run(bind)?;
    SockRef::from(&listener).set_read_timeout(Some(CONNECT_MAX))?;
    let address = listener.local_addr()?;
    let connect = || TcpStream::connect_timeout(&address, CONNECT_MAX);
    let client = between.client.run(connect)?;
    let (server, _) = listener.accept()?;
    for end in [&client, &server] {
        end.set_read_timeout(Some(POLL_INTERVAL))?;
        end.set_write_timeout(Some(POLL_INTERVAL))?;
    }
    Ok((client, server))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a receiver makes of some bytes.
    fn receive(data: &[u8]) -> io::Result<u64> {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut sender = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (receiver, _) = listener.accept().unwrap();
        let transfer = Transfer {
            time_max: Duration::MAX,
            bytes_max: u64::MAX,
            verify: true,
        };
        thread::scope(|scope| {
            scope.spawn(move || sender.write_all(data).unwrap());
            transfer.receive(&receiver, &pattern(BLOCK_BYTES), &Watch::default())
        })
    }

    #[test]
    fn any_changed_byte_is_seen() {
        let block = pattern(BLOCK_BYTES);
        let mut data = [&block[..], &block, &block[..100]].concat();
        assert_eq!(receive(&data).unwrap(), data.len() as u64);
        assert_eq!(receive(&[]).unwrap(), 0);
        let shifted = receive(&data[1..]).unwrap_err();
        assert_eq!(shifted.kind(), io::ErrorKind::InvalidData);
        for at in [0, BLOCK_BYTES - 1, BLOCK_BYTES, data.len() - 1] {
            data[at] ^= 1;
            assert!(receive(&data).is_err(), "changed at {at}");
            data[at] ^= 1;
        }
    }
}
