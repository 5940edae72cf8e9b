//! Who is at the other end of a connection.

use std::fmt;
use std::io;
use std::os::unix::net::UnixStream;

use nix::sys::socket::{getsockopt, sockopt};

/// The process at the other end of a connection (`SO_PEERCRED`, unix(7)).
#[derive(Clone, Copy, Debug)]
pub struct Asker {
    /// Its process id; 0 if it is in a PID namespace that cannot be seen.
    pub pid: i32,
    /// Its user.
    pub uid: u32,
}

impl Asker {
    /// Who is at the other end of `stream`: who called connect(2), or listen(2).
    ///
    /// # Errors
    /// When the kernel does not tell.
    pub fn of(stream: &UnixStream) -> io::Result<Self> {
        let peer = getsockopt(stream, sockopt::PeerCredentials)?;
        Ok(Self {
            pid: peer.pid(),
            uid: peer.uid(),
        })
    }

    /// Whether it is root's, or of the user who runs this process.
    pub fn is_trusted(self) -> bool {
        self.uid == 0 || self.uid == nix::unistd::geteuid().as_raw()
    }
}

impl fmt::Display for Asker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "process {} of user {}", self.pid, self.uid)
    }
}
