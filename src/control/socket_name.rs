//! The control socket's name in the file system: one process at a time has
//! it, a dead one's is replaced, and nothing is left of it at the end.

use std::ffi::OsString;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{AtFlags, Flock, FlockArg, OFlag, openat};
use nix::sys::stat::{FileStat, Mode, SFlag, fchmod, fstatat};
use nix::unistd::{UnlinkatFlags, geteuid, unlinkat};
use socket2::{Domain, SockAddr, Socket, Type};

use crate::config::CONTROL_DIRECTORY;
use crate::error::{Error, Result};

/// How long others that start at the same path are waited for. Each needs a few
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
        let directory = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_PATH | libc::O_DIRECTORY)
            .open(parent(path))?;
        Ok(Self {
            directory,
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

/// A socket's name. Dropped, it is removed, if it is still that socket's.
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
}

impl Drop for SocketName {
    fn drop(&mut self) {
        if let Some(entry) = &self.entry
            && self.inode.is_some()
            && self.inode == entry.inode()
        {
            let _ = entry.remove();
        }
    }
}

/// Listens at `path`, for its owner alone. What a killed process has left there
/// is replaced.
///
/// # Errors
/// When another process serves the path or is just starting to, or something
/// else is there, or it cannot be made.
pub fn listen(path: &Path, backlog: i32) -> Result<(UnixListener, SocketName)> {
    make_directory(path)?;
    let failed = |error| {
        let what = format!("cannot open the control socket {}", path.display());
        Error::os(what, error).hint(ANOTHER_PATH)
    };
    let entry = Entry::of(path).map_err(failed)?;
    // Two that start at once must not take each other's for a dead one's.
    let _lock = StartLock::take(path, LOCK_TIME_MAX)?;
    remove_stale(&entry)?;
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

/// Makes the directory of a path if that is the default one. Any other has to be
/// there: made for a path with a mistake in it, it would be left behind.
fn make_directory(path: &Path) -> Result<()> {
    let parent = parent(path);
    let shown = parent.display();
    if parent != Path::new(CONTROL_DIRECTORY) {
        return match parent.metadata() {
            Ok(_) => Ok(()),
            Err(error) => Err(Error::os(
                format!("cannot open the control socket in {shown}"),
                error,
            )
            .hint("make the directory, or choose another path with --control")),
        };
    }
    DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(parent)
        .map_err(|error| {
            Error::os(format!("cannot make directory {shown}"), error).hint(ANOTHER_PATH)
        })
}

/// Held while a path is looked at and taken: flock(2) on a file beside it,
/// which goes with the lock. Not on the directory: anybody who may read that
/// could hold the lock for ever.
struct StartLock {
    entry: Entry,
    _file: Flock<File>,
}

impl StartLock {
    /// Waits no longer than this for others.
    fn take(socket: &Path, time_max: Duration) -> Result<Self> {
        let mut path = OsString::from(socket);
        path.push(".lock");
        let path = PathBuf::from(path);
        let failed = |error| {
            let what = format!("cannot lock {}", path.display());
            Error::os(what, error).hint(ANOTHER_PATH)
        };
        let entry = Entry::of(&path).map_err(failed)?;
        let deadline = Instant::now() + time_max;
        loop {
            match Flock::lock(open_lock_file(&entry)?, FlockArg::LockExclusiveNonblock) {
                // Who had it before may have removed it since we opened it.
                Ok(file) if is_at(&file, &entry) => return Ok(Self { entry, _file: file }),
                Ok(_) | Err((_, Errno::EWOULDBLOCK)) => {}
                Err((_, errno)) => return Err(failed(errno.into())),
            }
            if Instant::now() >= deadline {
                return Err(Error::new(format!(
                    "cannot lock {} within {} s: another process that starts holds it",
                    path.display(),
                    time_max.as_secs()
                ))
                .hint("end that process, or choose another path with --control"));
            }
            std::thread::sleep(LOCK_PAUSE);
        }
    }
}

impl Drop for StartLock {
    fn drop(&mut self) {
        // Still locked, so that nobody else's is removed.
        let _ = self.entry.remove();
    }
}

/// Opens a file that nobody else can open, or can have made: in a directory that
/// all may write to, such as /tmp, somebody may have been there before.
fn open_lock_file(entry: &Entry) -> Result<File> {
    let shown = entry.path.display();
    // O_NONBLOCK: without waiting for the other end of a pipe.
    let flags = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_NOFOLLOW;
    let flags = flags | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    let file = openat(&entry.directory, entry.name(), flags, MODE).map_err(|errno| {
        Error::os(format!("cannot open the lock file {shown}"), errno.into()).hint(ANOTHER_PATH)
    })?;
    let file = File::from(file);
    let is_private = file.metadata().is_ok_and(|metadata| {
        metadata.is_file() && metadata.uid() == geteuid().as_raw() && metadata.mode() & 0o077 == 0
    });
    if is_private {
        return Ok(file);
    }
    Err(
        Error::new(format!("{shown} is no lock file that is this user's alone"))
            .hint("remove it, or choose another path with --control"),
    )
}

fn is_at(file: &File, entry: &Entry) -> bool {
    let own = file.metadata().ok();
    let own = own.map(|metadata| (metadata.dev(), metadata.ino()));
    own.is_some() && own == entry.inode()
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
            Error::os(
                format!("cannot remove the dead socket {shown}"),
                errno.into(),
            )
        }),
    }
}

fn connect_at_once(path: &Path) -> io::Result<()> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    socket.connect(&SockAddr::unix(path)?)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    /// Also where the file that was opened has been removed before it is locked.
    #[test]
    fn one_at_a_time_has_the_lock() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("test.sock");
        let holders = AtomicUsize::new(0);
        let work = || {
            for _ in 0..2000 {
                // Whoever is out of luck for long is told so.
                let Ok(lock) = StartLock::take(&path, LOCK_TIME_MAX) else {
                    continue;
                };
                assert_eq!(holders.fetch_add(1, Ordering::SeqCst), 0);
                std::thread::yield_now();
                holders.fetch_sub(1, Ordering::SeqCst);
                drop(lock);
            }
        };
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(work);
            }
        });
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
    }
}
