//! How packets reach the kernel and come from it: the TUN queue ([`tun`]), the
//! UDP sockets ([`udp`]), and two engines that move buffers between them and a
//! worker, [`uring`] and [`epoll`]. [`engine`] is what a worker sees of either,
//! `sides` what both do alike, and `receivers` which sockets they read.

#[doc(hidden)]
pub mod engine;
pub(crate) mod epoll;
pub(crate) mod message;
pub(crate) mod path_limits;
mod receivers;
mod sides;
pub(crate) mod tun;
pub(crate) mod udp;
pub mod uring;

#[doc(hidden)]
pub use message::{Control, parse_name};
#[doc(hidden)]
pub use udp::Port;

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

#[cfg(test)]
mod tests;
