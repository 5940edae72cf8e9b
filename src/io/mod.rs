//! What the I/O engines have in common: messages to and from the UDP socket,
//! what is learnt from sends that the kernel refuses, and errors that end a
//! worker; and random numbers.

pub mod engine;
pub mod epoll;
pub(crate) mod message;
pub(crate) mod path_limits;
pub mod tun;
pub mod udp;
pub mod uring;

#[doc(hidden)]
pub use message::{parse_name, parse_segment_bytes};

use std::time::Duration;

use crate::error::Error;

/// So many reads in a row that failed, for reasons that pass as a rule, are no
/// passing matter: from then on there is a pause after each.
pub(crate) const FAILURES_MAX: u32 = 16;

/// That pause.
pub(crate) const FAILURE_PAUSE: Duration = Duration::from_millis(1);

/// A random number that nobody can guess.
pub(crate) fn random() -> std::io::Result<u64> {
    let mut bytes = [0; 8];
    // SAFETY: the buffer is live and of the length given.
    let filled = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    match usize::try_from(filled) {
        Ok(filled) if filled == bytes.len() => Ok(u64::from_ne_bytes(bytes)),
        _ => Err(std::io::Error::last_os_error()),
    }
}

/// A TUN queue that fails for good.
pub(crate) fn queue_error(errno: i32) -> Error {
    Error::os(
        "cannot read the TUN queue",
        std::io::Error::from_raw_os_error(errno),
    )
    .hint("was the interface deleted?")
}

/// A UDP socket that fails for good.
pub(crate) fn socket_error(errno: i32) -> Error {
    Error::os(
        "cannot receive from the UDP socket",
        std::io::Error::from_raw_os_error(errno),
    )
    .hint("start fastvpn again")
}
