//! What is at the path before, meanwhile and afterwards.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::sync::mpsc;

use tempfile::TempDir;

use super::*;

/// How long anything that must happen may take before a test fails.
const PATIENCE: Duration = Duration::from_secs(30);

/// The listener goes first: nobody listens while the name is still there.
type Listening = (UnixListener, SocketName);

/// A directory and a path in it.
pub fn place() -> (TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("test.sock");
    (directory, path)
}

fn listen(path: &Path) -> Result<Listening> {
    super::listen(path, 16)
}

#[test]
fn a_dead_socket_is_replaced() {
    let (_directory, path) = place();
    for _ in 0..3 {
        // Closed, but its name stays: as after SIGKILL.
        drop(UnixListener::bind(&path).unwrap());
        let dead = inode(&path);
        let server = listen(&path).unwrap();
        assert!(inode(&path).is_some() && dead.is_some());
        assert!(UnixStream::connect(&path).is_ok());
        drop(server);
        assert!(!path.exists());
    }
}

pub fn inode(path: &Path) -> Option<(u64, u64)> {
    let metadata = fs::symlink_metadata(path).ok()?;
    Some((metadata.dev(), metadata.ino()))
}

/// What is in a directory.
pub fn entries(directory: &TempDir) -> Vec<String> {
    let name = |entry: io::Result<fs::DirEntry>| entry.unwrap().file_name().into_string().unwrap();
    let mut names: Vec<_> = fs::read_dir(directory.path()).unwrap().map(name).collect();
    names.sort();
    names
}

/// Starts a server on a thread of its own, and waits for what comes of it.
fn start_in_time(path: &Path) -> Result<Listening> {
    let (sender, started) = mpsc::channel();
    let path = path.to_path_buf();
    std::thread::spawn(move || sender.send(listen(&path)));
    started.recv_timeout(PATIENCE).expect("the start ends")
}

/// Whoever may read the directory may hold a lock on it for ever.
#[test]
fn a_lock_on_the_directory_does_not_hold_up_the_start() {
    let (directory, path) = place();
    let opened = fs::File::open(directory.path()).unwrap();
    let Ok(_held) = Flock::lock(opened, FlockArg::LockExclusive) else {
        panic!("no lock");
    };
    let server = start_in_time(&path).unwrap();
    assert_eq!(entries(&directory), ["test.sock"]);
    drop(server);
    assert!(entries(&directory).is_empty());
}

/// Only root can give a file away.
#[test]
fn a_dead_socket_of_another_user_is_left_alone() {
    if !nix::unistd::geteuid().is_root() {
        return;
    }
    let (_directory, path) = place();
    drop(UnixListener::bind(&path).unwrap());
    std::os::unix::fs::chown(&path, Some(4711), Some(4711)).unwrap();
    let error = listen(&path).err().unwrap().to_string();
    assert!(error.contains("another user (number 4711)"), "{error}");
    assert!(path.exists());
}

/// Runs `work` on a thread for which these system calls, and for those that it
/// starts, fail for want of memory (seccomp(2)).
pub fn without_calls<T: Send>(calls: &[libc::c_long], work: impl FnOnce() -> T + Send) -> T {
    const LOAD_WORD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
    const JUMP_IF_EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
    const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
    let step = |code, jt, k| libc::sock_filter { code, jt, jf: 0, k };
    // The call's number is the first word of `struct seccomp_data`.
    let mut program = vec![step(LOAD_WORD, 0, 0)];
    for (place, call) in calls.iter().enumerate() {
        let to_refusal = (calls.len() - place) as u8;
        program.push(step(JUMP_IF_EQUAL, to_refusal, *call as u32));
    }
    program.push(step(RETURN, 0, libc::SECCOMP_RET_ALLOW));
    program.push(step(
        RETURN,
        0,
        libc::SECCOMP_RET_ERRNO | libc::ENOMEM as u32,
    ));
    let restricted = move || {
        let filter = libc::sock_fprog {
            len: program.len() as u16,
            filter: program.as_mut_ptr(),
        };
        // SAFETY: both read no more than their arguments, of which the filter
        // and its program live beyond the calls.
        let is_set = unsafe {
            libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
                && libc::prctl(
                    libc::PR_SET_SECCOMP,
                    libc::SECCOMP_MODE_FILTER,
                    &raw const filter,
                ) == 0
        };
        assert!(is_set, "no filter: {}", io::Error::last_os_error());
        work()
    };
    std::thread::scope(|scope| scope.spawn(restricted).join().unwrap())
}

#[test]
fn a_live_socket_is_left_alone() {
    let (_directory, path) = place();
    let _server = listen(&path).unwrap();
    let before = inode(&path);
    let error = listen(&path).err().unwrap().to_string();
    assert!(error.contains("another fastvpn serves"), "{error}");
    assert!(error.contains("--takeover"), "{error}");
    assert_eq!(inode(&path), before);
    assert!(UnixStream::connect(&path).is_ok());
}

/// Too many wait at it to be let in, but someone is there.
#[test]
fn a_busy_socket_is_left_alone() {
    let (_directory, path) = place();
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None).unwrap();
    socket.bind(&SockAddr::unix(&path).unwrap()).unwrap();
    socket.listen(0).unwrap();
    let waiting = UnixStream::connect(&path).unwrap();
    let error = listen(&path).err().unwrap().to_string();
    assert!(error.contains("very busy"), "{error}");
    assert!(path.exists());
    drop(waiting);
}

#[test]
fn what_is_no_socket_is_left_alone() {
    let (directory, path) = place();
    let refuses = || {
        let error = listen(&path).err().unwrap().to_string();
        assert!(error.contains("is no socket"), "{error}");
        assert!(error.contains("test.sock"), "{error}");
    };
    fs::write(&path, "precious").unwrap();
    refuses();
    assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
    fs::remove_file(&path).unwrap();
    fs::create_dir(&path).unwrap();
    refuses();
    fs::remove_dir(&path).unwrap();
    // Not even if it leads to a dead one.
    let dead = directory.path().join("dead.sock");
    drop(UnixListener::bind(&dead).unwrap());
    std::os::unix::fs::symlink(&dead, &path).unwrap();
    refuses();
    assert!(dead.exists() && path.is_symlink());
}

/// From the first moment on: a mode that is set by the path afterwards would come too
/// late, and could be another file's, so a start that may set none has it as well.
#[test]
fn only_its_owner_may_connect() {
    let (directory, _) = place();
    let path = directory.path().join("test.sock");
    let calls = [
        #[cfg(target_arch = "x86_64")]
        libc::SYS_chmod,
        libc::SYS_fchmodat,
        libc::SYS_fchmodat2,
    ];
    let _server = without_calls(&calls, || listen(&path)).unwrap();
    let metadata = fs::symlink_metadata(&path).unwrap();
    assert_eq!(metadata.permissions().mode() & 0o7777, 0o600);
    assert_eq!(metadata.uid(), nix::unistd::geteuid().as_raw());
}

/// Who owns the directory above may put another one in its place: nothing is removed
/// there, not even another name of the same socket.
#[test]
fn a_directory_that_is_swapped_is_not_followed() {
    let (place, _) = place();
    let at = |name: &str| place.path().join(name);
    for name in ["own", "other"] {
        fs::create_dir(at(name)).unwrap();
    }
    let path = at("own/test.sock");
    let server = listen(&path).unwrap();
    fs::hard_link(&path, at("other/test.sock")).unwrap();
    fs::rename(at("own"), at("moved")).unwrap();
    std::os::unix::fs::symlink(at("other"), at("own")).unwrap();
    drop(server);
    assert!(at("other/test.sock").exists());
    assert!(!at("moved/test.sock").exists());
}

#[test]
fn paths_that_cannot_be_are_named() {
    let (directory, path) = place();
    fs::write(&path, "").unwrap();
    for (path, words) in [
        (path.join("below/a/file.sock"), "not a directory"),
        (
            directory.path().join("missing/test.sock"),
            "missing: no such file or directory",
        ),
        (
            directory.path().join("x".repeat(150)),
            "cannot open the control socket",
        ),
    ] {
        let error = listen(&path).err().unwrap().to_string();
        assert!(
            error.contains(words) && error.contains("--control"),
            "{error}"
        );
    }
    assert!(!directory.path().join("missing").exists());
}

/// Of many that start at once, one serves, and nobody takes its name away.
#[test]
fn starts_that_race() {
    let (_directory, path) = place();
    let start = std::sync::Barrier::new(8);
    for _ in 0..50 {
        drop(UnixListener::bind(&path).unwrap());
        let started: Vec<_> = std::thread::scope(|scope| {
            let starts: Vec<_> = (0..8)
                .map(|_| {
                    scope.spawn(|| {
                        start.wait();
                        listen(&path)
                    })
                })
                .collect();
            starts
                .into_iter()
                .map(|start| start.join().unwrap())
                .collect()
        });
        let servers: Vec<_> = started.into_iter().filter_map(Result::ok).collect();
        assert_eq!(servers.len(), 1);
        assert!(UnixStream::connect(&path).is_ok());
        drop(servers);
        assert!(!path.exists());
    }
}

#[test]
fn only_its_own_name_is_removed() {
    let (_directory, path) = place();
    let server = listen(&path).unwrap();
    fs::remove_file(&path).unwrap();
    let other = UnixListener::bind(&path).unwrap();
    drop(server);
    assert!(UnixStream::connect(&path).is_ok());
    drop(other);
    fs::remove_file(&path).unwrap();

    let server = listen(&path).unwrap();
    fs::remove_file(&path).unwrap();
    fs::write(&path, "precious").unwrap();
    drop(server);
    assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
}
