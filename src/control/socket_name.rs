//! The control socket's name in the file system: one process at a time has it, and
//! nothing is left of it at the end. The names of processes that were killed are removed
//! when the next one starts.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::fcntl::{Flock, FlockArg};
use nix::sys::stat::{Mode, fchmod};
use socket2::{Domain, SockAddr, Socket, Type};

use super::client::connect;
use crate::config::CONTROL_DIRECTORY;
use crate::error::{Error, Result};

/// How long a process with many waiting connections may take to let in one more. One
/// that is dead refuses at once.
const CONNECT_TIME_MAX: Duration = Duration::from_millis(1);

/// How long a process that starts may take from bind(2) to listen(2). Until then its
/// socket looks dead.
const START_TIME_MAX: Duration = Duration::from_secs(10);

/// How long others that start in the same directory are waited for. Each needs a few
/// system calls. Anybody who may read the directory can hold the lock for ever: without
/// it, two that start at once may remove each other's name.
const LOCK_TIME_MAX: Duration = Duration::from_secs(1);
const LOCK_PAUSE: Duration = Duration::from_millis(2);

/// The socket is its owner's alone.
const MODE: Mode = Mode::S_IRUSR.union(Mode::S_IWUSR);

/// A socket's name. Dropped, it is removed.
pub struct SocketName {
    path: PathBuf,
    /// None once the name is somebody else's.
    inode: Option<(u64, u64)>,
}

impl SocketName {
    /// The name of a socket that is bound to `path`.
    pub fn of_bound(path: &Path) -> Self {
        Self {
            path: path.to_path_buf(),
            inode: inode(path),
        }
    }

    /// Whether it is that socket's still.
    pub fn is_there(&self) -> bool {
        self.inode.is_some() && inode(&self.path) == self.inode
    }

    /// Leaves the name where it is.
    pub fn leave(&mut self) {
        self.inode = None;
    }

    /// Removes it, if it is still that socket's.
    pub fn remove(&mut self) {
        if self
            .inode
            .take()
            .is_some_and(|own| inode(&self.path) == Some(own))
        {
            let _ = fs::remove_file(&self.path);
        }
    }
}

impl Drop for SocketName {
    fn drop(&mut self) {
        self.remove();
    }
}

/// Listens at `path`, for its owner alone. What a killed process has left there is
/// replaced. The default directory is made, and cleared of dead sockets; any other has
/// to be there: made for a path with a mistake in it, it would be left behind.
///
/// # Errors
/// When another process serves the path, or something else is there, or it cannot be
/// made.
pub fn listen(path: &Path, backlog: i32) -> Result<(UnixListener, SocketName)> {
    let default_directory = Path::new(CONTROL_DIRECTORY);
    let is_default = path.parent() == Some(default_directory);
    if is_default {
        // Also /run, which small containers do not have. If it fails, so does bind(2).
        let mut builder = DirBuilder::new();
        let _ = builder
            .recursive(true)
            .mode(0o755)
            .create(default_directory);
    }
    let _lock = lock(path);
    if is_default {
        remove_all_dead(default_directory);
    }
    remove_dead(path, Duration::ZERO);
    bind(path, backlog).map_err(|error| {
        let hint = match error.kind() {
            io::ErrorKind::AddrInUse => {
                "another fastvpn serves it, or it is not a socket: choose another --tun or \
                 --control, or take over with --takeover"
            }
            _ => "choose another path with --control",
        };
        Error::os(
            format!("cannot open the control socket {}", path.display()),
            error,
        )
        .hint(hint)
    })
}

/// Listens at `path`, for its owner alone, in a directory that is made for its owner alone
/// unless it is there. What a killed process has left at `path` is replaced.
///
/// # Errors
/// As [`listen`], in the kernel's words.
pub fn listen_privately(path: &Path, backlog: i32) -> io::Result<(UnixListener, SocketName)> {
    if let Some(directory) = path.parent() {
        // If it fails, so does bind(2).
        let _ = DirBuilder::new().mode(0o700).create(directory);
    }
    let _lock = lock(path);
    remove_dead(path, Duration::ZERO);
    bind(path, backlog)
}

/// A lock on the directory of `path` (flock(2)), so that nobody takes a socket between
/// bind(2) and listen(2) for a dead one.
fn lock(path: &Path) -> Option<Flock<File>> {
    let parent = path.parent()?;
    let parent = match parent.as_os_str().is_empty() {
        true => Path::new("."),
        false => parent,
    };
    let deadline = Instant::now() + LOCK_TIME_MAX;
    let mut directory = File::open(parent).ok()?;
    loop {
        match Flock::lock(directory, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Some(lock),
            Err((again, _)) if Instant::now() < deadline => directory = again,
            Err(_) => return None,
        }
        std::thread::sleep(LOCK_PAUSE);
    }
}

fn bind(path: &Path, backlog: i32) -> io::Result<(UnixListener, SocketName)> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    // bind(2) gives the name the socket's own mode, less the umask (unix_bind_bsd in
    // the kernel's net/unix/af_unix.c). chmod(2) would come too late, and would follow
    // a symlink that has taken the name's place.
    fchmod(&socket, MODE)?;
    socket.bind(&SockAddr::unix(path)?)?;
    let name = SocketName::of_bound(path);
    socket.listen(backlog)?;
    Ok((UnixListener::from(OwnedFd::from(socket)), name))
}

/// Removes what killed processes have left in a directory. Those of a network namespace
/// that is gone have no next process that would replace it.
fn remove_all_dead(directory: &Path) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        remove_dead(&entry.path(), START_TIME_MAX);
    }
}

/// Removes a dead socket that is at least so old. A process that starts may be replacing
/// it, so it is moved aside and examined again, and put back if it is another's by then.
fn remove_dead(path: &Path, age_min: Duration) {
    let aside = path.with_file_name(format!(".{}", std::process::id()));
    if !is_dead(path, age_min) || fs::rename(path, &aside).is_err() {
        return;
    }
    if !is_dead(&aside, age_min) {
        let _ = fs::hard_link(&aside, path);
    }
    let _ = fs::remove_file(&aside);
}

fn is_dead(path: &Path, age_min: Duration) -> bool {
    let Ok(status) = fs::symlink_metadata(path) else {
        return false;
    };
    let age = status.modified().ok().and_then(|made| made.elapsed().ok());
    let refuses = || {
        let connected = connect(path, CONNECT_TIME_MAX);
        connected.is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
    };
    status.file_type().is_socket() && age.unwrap_or_default() >= age_min && refuses()
}

/// Device and inode, of the name itself, also if it is a symlink.
pub(super) fn inode(path: &Path) -> Option<(u64, u64)> {
    let status = fs::symlink_metadata(path).ok()?;
    Some((status.dev(), status.ino()))
}

#[cfg(test)]
#[path = "socket_name_tests.rs"]
pub(super) mod tests;
