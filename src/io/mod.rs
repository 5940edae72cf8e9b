//! What the I/O engines have in common: messages to and from the UDP socket,
//! what is learnt from sends that the kernel refuses, and errors that end a
//! worker.

pub(crate) mod message;
pub(crate) mod refusal;

use crate::error::Error;

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
