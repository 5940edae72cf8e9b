//! The control socket's name in the file system: one process at a time has it, a
//! dead one's is replaced, and nothing is left of it at the end.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{AtFlags, Flock, FlockArg};
use nix::sys::stat::{FileStat, Mode, SFlag, fchmod, fstatat};
use nix::unistd::{UnlinkatFlags, geteuid, unlinkat};
use socket2::{Domain, SockAddr, Socket, Type};

use crate::config::CONTROL_DIRECTORY;
use crate::error::{Error, Result};

/// How long others that start in the same directory are waited for. Each needs a few
/// system calls.
const LOCK_TIME_MAX: Duration = Duration::from_secs(1);

/// Pause between two attempts to get the lock.
const LOCK_PAUSE: Duration = Duration::from_millis(2);

const ANOTHER_PATH: &str = "choose another path with --control";

/// The socket is its owner's alone.
const MODE: Mode = Mode::S_IRUSR.union(Mode::S_IWUSR);

/// A name in a directory that is held open. What is looked at and what is removed
/// are in the same directory, even if the owner of the one above it has put
/// another in its place.
struct Entry {
    directory: File,
    path: PathBuf,
}

impl Entry {
    fn of(path: &Path) -> io::Result<Self> {
        let flags = libc::O_PATH | libc::O_DIRECTORY;
        let mut options = OpenOptions::new();
        Ok(Self {
            directory: options.read(true).custom_flags(flags).open(parent(path))?,
            path: path.to_path_buf(),
        })
    }

    fn name(&self) -> &Path {
        self.path.file_name().unwrap_or_default().as_ref()
    }

    /// Of the entry itself, also if it is a symlink.
    fn status(&self) -> nix::Result<FileStat> {
        fstatat(&self.directory, self.name(), AtFlags::AT_SYMLINK_NOFOLLOW)
    }

    /// Device and inode.
    fn inode(&self) -> Option<(u64, u64)> {
        let status = self.status().ok()?;
        Some((status.st_dev, status.st_ino))
    }

    fn remove(&self) -> nix::Result<()> {
        unlinkat(&self.directory, self.name(), UnlinkatFlags::NoRemoveDir)
    }
}

/// A socket's name. Dropped, it is removed.
pub struct SocketName {
    /// None once the name is left to somebody else.
    entry: Option<Entry>,
    inode: Option<(u64, u64)>,
}

impl SocketName {
    /// The name of a socket that is bound to `path`.
    pub fn of_bound(path: &Path) -> Self {
        Self::of(Entry::of(path).ok())
    }

    fn of(entry: Option<Entry>) -> Self {
        let inode = entry.as_ref().and_then(Entry::inode);
        Self { entry, inode }
    }

    /// Leaves the name where it is.
    pub fn leave(&mut self) {
        self.entry = None;
    }

    /// Removes it, if it is still that socket's.
    pub fn remove(&mut self) {
        if let Some(entry) = self.entry.take()
            && self.inode.is_some()
            && self.inode == entry.inode()
        {
            let _ = entry.remove();
        }
    }
}

impl Drop for SocketName {
    fn drop(&mut self) {
        self.remove();
    }
}

/// Listens at `path`, for its owner alone. What a killed process has left there
/// is replaced. The default directory is made; any other has to be there: made for a
/// path with a mistake in it, it would be left behind.
///
/// # Errors
/// When another process serves the path, or something else is there, or it cannot be
/// made.
pub fn listen(path: &Path, backlog: i32) -> Result<(UnixListener, SocketName)> {
    let directory = parent(path);
    if directory == Path::new(CONTROL_DIRECTORY) {
        // If it fails, so does the next step.
        let _ = DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(directory);
    }
    let entry = Entry::of(path).map_err(|error| {
        let what = format!("cannot open the control socket in {}", directory.display());
        Error::os(what, error).hint("make the directory, or choose another path with --control")
    })?;
    // Two that start at once must not take each other's for a dead one's.
    let _lock = lock(&entry);
    remove_stale(&entry)?;
    let failed = |error| {
        let what = format!("cannot open the control socket {}", path.display());
        Error::os(what, error).hint(ANOTHER_PATH)
    };
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None).map_err(failed)?;
    // bind(2) gives the name the socket's own mode, less the umask (unix_bind_bsd in
    // the kernel's net/unix/af_unix.c). chmod(2) would come too late, and would follow
    // a symlink that has taken the name's place.
    fchmod(&socket, MODE).map_err(|errno| failed(errno.into()))?;
    let address = SockAddr::unix(path).map_err(failed)?;
    socket.bind(&address).map_err(failed)?;
    // Whatever fails from here on takes the name with it.
    let name = SocketName::of(Some(entry));
    socket.listen(backlog).map_err(failed)?;
    Ok((UnixListener::from(OwnedFd::from(socket)), name))
}

fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// A lock on the directory (flock(2)), held while a name in it is looked at and taken.
/// Anybody who may read the directory can hold it for ever, so it is not waited for
/// that long: what is lost without it is the order of two that start at once.
fn lock(entry: &Entry) -> Option<Flock<File>> {
    let deadline = Instant::now() + LOCK_TIME_MAX;
    let mut directory = File::open(parent(&entry.path)).ok()?;
    loop {
        match Flock::lock(directory, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Some(lock),
            Err((again, Errno::EWOULDBLOCK)) if Instant::now() < deadline => directory = again,
            Err((_, errno)) => {
                let shown = entry.path.display();
                tracing::debug!("no lock on the directory of {shown}: {}", errno.desc());
                return None;
            }
        }
        std::thread::sleep(LOCK_PAUSE);
    }
}

/// Removes the socket of a process that was killed.
fn remove_stale(entry: &Entry) -> Result<()> {
    let shown = entry.path.display();
    let Ok(status) = entry.status() else {
        return Ok(());
    };
    if SFlag::from_bits_truncate(status.st_mode) & SFlag::S_IFMT != SFlag::S_IFSOCK {
        return Err(Error::new(format!(
            "cannot open the control socket: {shown} is no socket"
        ))
        .hint("remove it, or choose another path with --control"));
    }
    match connect_at_once(&entry.path) {
        // Too many wait to be let in: someone is there, if slow.
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Err(Error::new(format!(
            "another fastvpn serves {shown}, and is very busy"
        ))
        .hint("choose another --tun or --control")),
        Ok(()) => Err(Error::new(format!("another fastvpn serves {shown}"))
            .hint("choose another --tun or --control, or take over with --takeover")),
        Err(error) if error.kind() != io::ErrorKind::ConnectionRefused => {
            Err(Error::os(format!("cannot tell who serves {shown}"), error))
        }
        // Root may remove everybody's, but it is not for us to tidy up.
        Err(_) if status.st_uid != geteuid().as_raw() => Err(Error::new(format!(
            "the dead socket {shown} is that of another user (number {})",
            status.st_uid
        ))
        .hint("remove it, or choose another path with --control")),
        Err(_) => entry.remove().map_err(|errno| {
            let what = format!("cannot remove the dead socket {shown}");
            Error::os(what, errno.into())
        }),
    }
}

fn connect_at_once(path: &Path) -> io::Result<()> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    socket.connect(&SockAddr::unix(path)?)
}

#[cfg(test)]
#[path = "socket_name_tests.rs"]
pub(super) mod tests;
