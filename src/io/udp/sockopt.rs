//! A socket option that neither socket2 nor nix wraps.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

mod ioctl {
    nix::ioctl_read_bad!(
        /// `SIOCOUTQ` (`udp(7)`).
        siocoutq,
        libc::TIOCOUTQ,
        libc::c_int
    );
}

/// Bytes that a socket holds which have not been sent yet, by the kernel's count: with
/// what it needs to keep them. 0 if it does not say.
pub fn unsent_bytes(socket: BorrowedFd<'_>) -> usize {
    let mut bytes = 0;
    // SAFETY: the request stores an int, and `bytes` is one.
    let result = unsafe { ioctl::siocoutq(socket.as_raw_fd(), &raw mut bytes) };
    result.map_or(0, |_| usize::try_from(bytes).unwrap_or(0))
}

/// Datagrams that the kernel has dropped at the socket since it was made, modulo
/// 2^32: no room in its receive buffer, refused by its filter, or damaged
/// (`SO_MEMINFO`, Linux 4.12).
pub fn drops(socket: BorrowedFd<'_>) -> io::Result<u32> {
    // `SK_MEMINFO_VARS` and `SK_MEMINFO_DROPS` (`linux/sock_diag.h`).
    let mut memory = [0_u32; 9];
    let mut len = size_of_val(&memory) as libc::socklen_t;
    // SAFETY: `memory` and `len` are live, and `len` is the size of `memory`.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_MEMINFO,
            (&raw mut memory).cast(),
            &raw mut len,
        )
    };
    match result {
        0 => Ok(memory[8]),
        _ => Err(io::Error::last_os_error()),
    }
}
