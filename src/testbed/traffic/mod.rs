//! Traffic between namespaces: made, received and checked inside this process,
//! and bounded in time and bytes.
//!
//! - `bulk`: TCP as fast as it goes, every byte compared.
//! - `icmp`: echo requests of any size.
//!
//! A socket stays in the namespace where it was opened, so only that happens
//! inside; the threads that use it need not be there.

mod bulk;
mod icmp;

pub use bulk::{Transfer, TransferReport, connect};
pub use icmp::{PING_BYTES_MAX, Pinger, ping};

use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::Namespace;

/// How long a connection may stand still before the transfer has failed.
const STALL_MAX: Duration = Duration::from_secs(30);

/// How often a blocked socket checks whether it should stop.
pub const POLL_INTERVAL: Duration = Duration::from_millis(100);

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

/// Keeps an eye on running traffic.
#[derive(Debug, Default)]
pub struct Watch {
    /// Set it, and all traffic ends with an error within a moment. A signal
    /// handler may hold it.
    pub stop: Arc<AtomicBool>,
}

impl Watch {
    /// An error once [`Watch::stop`] is set.
    ///
    /// # Errors
    /// That one, of a kind that nobody tries again.
    pub fn check(&self) -> io::Result<()> {
        match self.stop.load(Ordering::Relaxed) {
            true => Err(io::Error::other("interrupted")),
            false => Ok(()),
        }
    }

    /// Repeats an operation on a socket with a timeout until it succeeds,
    /// [`Watch::stop`] is set, or it has stood still for half a minute.
    ///
    /// # Errors
    /// The operation's own, or that it stood still or was stopped.
    pub fn retry<T>(&self, mut operation: impl FnMut() -> io::Result<T>) -> io::Result<T> {
        let start = Instant::now();
        loop {
            self.check()?;
            match operation() {
                Err(error) if is_timeout(&error) && start.elapsed() < STALL_MAX => {}
                result => return result,
            }
        }
    }
}

/// Whether an error says that a socket's timeout has passed, or as little.
pub fn is_timeout(error: &io::Error) -> bool {
    use io::ErrorKind::{Interrupted, TimedOut, WouldBlock};
    matches!(error.kind(), WouldBlock | TimedOut | Interrupted)
}

/// `bytes` pseudo-random bytes, the same in every run.
pub fn pattern(bytes: usize) -> Vec<u8> {
    // xorshift64 (Marsaglia, 2003): no byte-sized structure that a shifted or
    // swapped segment could hide in.
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let next = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    });
    next.take(bytes).collect()
}
