//! Round-trip times of small requests: one on the way at any moment, and every
//! answer compared with its request.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use fastvpn::error::Result;
use fastvpn::testbed::result_of;
use fastvpn::testbed::traffic::{connect, is_timeout, pattern};

use super::{Between, Watch, failed, udp_pair};

/// Largest request, so that it is one packet.
pub const REQUEST_BYTES_MAX: usize = 1400;

/// A UDP request begins with its number.
const NUMBER_BYTES: usize = 8;

/// Exchanges at the start that do not count: caches and slow start.
const WARM_UP: usize = 50;

/// Most exchanges: the samples' memory.
const EXCHANGES_MAX: usize = 2_000_000;

/// A measurement to be made.
#[derive(Debug, Clone, Copy)]
pub struct PingPong {
    /// Bytes of a request and of its answer: 1 (over UDP 8) to [`REQUEST_BYTES_MAX`].
    pub bytes: usize,
    /// How long to go on.
    pub time: Duration,
    /// How long to wait for an answer over UDP: a tenth of a second at the least.
    pub patience: Duration,
}

/// Round-trip times, in nanoseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Latency {
    /// Half of the exchanges were at least as fast.
    pub p50_ns: u64,
    /// All but one in a hundred were at least as fast.
    pub p99_ns: u64,
    /// All but one in a thousand were at least as fast.
    pub p999_ns: u64,
    /// How many exchanges were measured.
    pub exchanges: usize,
    /// Requests without an answer (UDP only).
    pub lost: usize,
}

/// Measures round trips over one TCP connection with `TCP_NODELAY`.
///
/// # Errors
/// When the connection fails or stands still, [`Watch::stop`] is set, or an
/// answer differs from its request (of the kind [`io::ErrorKind::InvalidData`]).
pub fn tcp_ping_pong(between: Between<'_>, test: PingPong, watch: &Watch) -> Result<Latency> {
    let run = || {
        let (client, server) = connect(between)?;
        client.set_nodelay(true)?;
        server.set_nodelay(true)?;
        thread::scope(|scope| {
            let (server, length) = (&server, test.bytes);
            let echo = scope.spawn(move || echo_tcp(server, length, watch));
            let samples = ask_tcp(&client, test, watch);
            // The echo ends when it reads the end of the stream.
            client.shutdown(Shutdown::Both)?;
            let echoed = result_of(echo);
            let samples = samples?;
            echoed.map(|()| summarize(samples, 0))
        })
    };
    run().map_err(|cause| failed("TCP ping-pong", between, cause))
}

/// Measures round trips of UDP datagrams; a request without an answer within
/// [`PingPong::patience`] counts as lost.
///
/// # Errors
/// When a socket fails, [`Watch::stop`] is set, or an answer is none to any
/// request (of the kind [`io::ErrorKind::InvalidData`]).
pub fn udp_ping_pong(between: Between<'_>, test: PingPong, watch: &Watch) -> Result<Latency> {
    let run = || {
        let (client, server) = udp_pair(between)?;
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            let echo = scope.spawn(|| echo_udp(&server, &done));
            let result = ask_udp(&client, test, watch);
            done.store(true, Ordering::Relaxed);
            let echoed = result_of(echo);
            let (samples, lost) = result?;
            echoed.map(|()| summarize(samples, lost))
        })
    };
    run().map_err(|cause| failed("UDP ping-pong", between, cause))
}

fn ask_tcp(mut socket: &TcpStream, test: PingPong, watch: &Watch) -> io::Result<Vec<u64>> {
    let mut request = pattern(test.bytes);
    let mut answer = vec![0; test.bytes];
    let mut samples = Vec::new();
    let start = Instant::now();
    while start.elapsed() < test.time && samples.len() < EXCHANGES_MAX {
        // Each differs from the one before.
        request.rotate_left(1);
        let sent = Instant::now();
        watch.retry(|| socket.write(&request))?;
        if !read_full(socket, &mut answer, watch)? {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        samples.push(nanoseconds(sent.elapsed()));
        if answer != request {
            return Err(changed());
        }
    }
    Ok(samples)
}

fn echo_tcp(mut socket: &TcpStream, length: usize, watch: &Watch) -> io::Result<()> {
    let mut request = vec![0; length];
    while read_full(socket, &mut request, watch)? {
        watch.retry(|| socket.write(&request))?;
    }
    Ok(())
}

/// Fills the buffer; `false` at the end of the stream.
fn read_full(mut socket: &TcpStream, buffer: &mut [u8], watch: &Watch) -> io::Result<bool> {
    let mut filled = 0;
    while filled < buffer.len() {
        match watch.retry(|| socket.read(&mut buffer[filled..]))? {
            0 => return Ok(false),
            length => filled += length,
        }
    }
    Ok(true)
}

fn ask_udp(socket: &UdpSocket, test: PingPong, watch: &Watch) -> io::Result<(Vec<u64>, usize)> {
    let mut request = pattern(test.bytes);
    // One byte more than is sent, so that an answer that has grown is seen.
    let mut answer = vec![0; test.bytes + 1];
    let (mut samples, mut lost) = (Vec::new(), 0);
    let start = Instant::now();
    while start.elapsed() < test.time && samples.len() < EXCHANGES_MAX {
        let number = (samples.len() + lost) as u64;
        request[..NUMBER_BYTES].copy_from_slice(&number.to_le_bytes());
        let sent = Instant::now();
        socket.send(&request)?;
        loop {
            match socket.recv(&mut answer) {
                Ok(length) if answer[..length] != request => {
                    if !is_earlier(&answer[..length], &request) {
                        return Err(changed());
                    }
                    // A late answer to a request that was given up is passed over.
                    if sent.elapsed() < test.patience {
                        continue;
                    }
                    lost += 1;
                }
                Ok(_) => samples.push(nanoseconds(sent.elapsed())),
                Err(error) if is_timeout(&error) => {
                    watch.check()?;
                    if sent.elapsed() < test.patience {
                        continue;
                    }
                    lost += 1;
                }
                Err(error) => return Err(error),
            }
            break;
        }
    }
    Ok((samples, lost))
}

/// Whether `answer` belongs to a request that was sent before `request`.
fn is_earlier(answer: &[u8], request: &[u8]) -> bool {
    let parts = |datagram: &[u8]| {
        let (number, rest) = datagram.split_first_chunk()?;
        Some((u64::from_le_bytes(*number), rest.to_vec()))
    };
    match (parts(answer), parts(request)) {
        (Some((old, same)), Some((new, rest))) => old < new && same == rest,
        _ => false,
    }
}

fn changed() -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        "an answer differs from its request",
    )
}

fn echo_udp(socket: &UdpSocket, done: &AtomicBool) -> io::Result<()> {
    let mut buffer = vec![0; REQUEST_BYTES_MAX];
    while !done.load(Ordering::Relaxed) {
        match socket.recv_from(&mut buffer) {
            Ok((length, from)) => {
                socket.send_to(&buffer[..length], from)?;
            }
            Err(error) if is_timeout(&error) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

fn summarize(mut samples: Vec<u64>, lost: usize) -> Latency {
    if samples.len() > 2 * WARM_UP {
        samples.drain(..WARM_UP);
    }
    samples.sort_unstable();
    let at = |permille: usize| {
        samples
            .get((samples.len() * permille / 1000).min(samples.len().saturating_sub(1)))
            .copied()
            .unwrap_or(0)
    };
    Latency {
        p50_ns: at(500),
        p99_ns: at(990),
        p999_ns: at(999),
        exchanges: samples.len(),
        lost,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_of_the_sorted_samples() {
        let latency = summarize((1..=100).rev().collect(), 3);
        assert_eq!((latency.p50_ns, latency.p99_ns), (51, 100));
        assert_eq!(latency.p999_ns, 100);
        assert_eq!((latency.exchanges, latency.lost), (100, 3));
        assert_eq!(summarize(Vec::new(), 0), Latency::default());
    }

    #[test]
    fn only_an_unchanged_earlier_request_is_late() {
        let datagram = |number: u64, rest: &[u8]| [&number.to_le_bytes()[..], rest].concat();
        let request = datagram(7, b"rest");
        assert!(is_earlier(&datagram(6, b"rest"), &request));
        assert!(!is_earlier(&datagram(8, b"rest"), &request));
        assert!(!is_earlier(&datagram(6, b"rust"), &request));
        assert!(!is_earlier(&datagram(6, b"rest+"), &request));
        assert!(!is_earlier(b"short", &request));
    }
}
