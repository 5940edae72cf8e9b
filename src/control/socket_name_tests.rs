//! What is at the path before, meanwhile and afterwards.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::fcntl::AT_FDCWD;
use nix::sys::stat::{UtimensatFlags, utimensat};
use nix::sys::time::TimeSpec;
use tempfile::TempDir;

use super::*;

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
        leave_dead(&path);
        let server = listen(&path).unwrap();
        assert!(UnixStream::connect(&path).is_ok());
        drop(server);
        assert!(!path.exists());
    }
}

/// What is in a directory.
pub fn entries(directory: &TempDir) -> Vec<String> {
    let name = |entry: io::Result<fs::DirEntry>| entry.unwrap().file_name().into_string().unwrap();
    let mut names: Vec<_> = fs::read_dir(directory.path()).unwrap().map(name).collect();
    names.sort();
    names
}

/// Whether the name leads to a process, though perhaps to one with a full backlog.
fn is_served(path: &Path) -> bool {
    path.exists() && !is_dead(path, Duration::ZERO)
}

/// Leaves a socket as a killed process does.
fn leave_dead(path: &Path) {
    drop(UnixListener::bind(path).unwrap());
}

/// Has a file be as old as can be.
fn make_old(path: &Path) -> nix::Result<()> {
    let epoch = TimeSpec::from(Duration::ZERO);
    let flags = UtimensatFlags::NoFollowSymlink;
    utimensat(AT_FDCWD, path, &epoch, &epoch, flags)
}

#[test]
fn dead_sockets_are_removed_and_all_else_stays() {
    let (directory, path) = place();
    let at = |name: &str| directory.path().join(name);
    let _server = listen(&path).unwrap();
    for name in ["fastvpn0-4026531840.sock", "fastvpn1.sock", "young.sock"] {
        leave_dead(&at(name));
    }
    fs::write(at("file.sock"), "precious").unwrap();
    std::os::unix::fs::symlink(at("young.sock"), at("link.sock")).unwrap();
    // The young one is perhaps of a process that has just called bind(2).
    for name in entries(&directory) {
        if name != "young.sock" {
            make_old(&at(&name)).unwrap();
        }
    }
    remove_all_dead(directory.path());
    let left = ["file.sock", "link.sock", "test.sock", "young.sock"];
    assert_eq!(entries(&directory), left);
    assert!(UnixStream::connect(&path).is_ok());
}

/// One process after the other replaces a dead socket, while another one removes it.
#[test]
fn a_process_that_starts_keeps_its_name() {
    let (directory, path) = place();
    const ROUNDS: usize = 500;
    let mut rounds = 0;
    let (is_over, order) = (AtomicBool::new(false), Ordering::Relaxed);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !is_over.load(order) {
                remove_all_dead(directory.path());
            }
        });
        for _ in 0..ROUNDS {
            let _ = fs::remove_file(&path);
            drop(UnixListener::bind(&path));
            // It may be gone already.
            let _ = make_old(&path);
            let Ok(server) = listen(&path) else {
                break;
            };
            // It may be away for a moment.
            let is_found = (0..1000).any(|_| {
                std::thread::sleep(Duration::from_micros(20));
                is_served(&path)
            });
            drop(server);
            if !is_found {
                break;
            }
            rounds += 1;
        }
        is_over.store(true, order);
    });
    assert_eq!(rounds, ROUNDS);
    // Nothing is left aside.
    assert!(entries(&directory).iter().all(|name| name == "test.sock"));
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

/// One whose backlog is full.
#[test]
fn a_busy_socket_is_left_alone() {
    let (_directory, path) = place();
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None).unwrap();
    socket.bind(&SockAddr::unix(&path).unwrap()).unwrap();
    socket.listen(0).unwrap();
    let waiting = UnixStream::connect(&path).unwrap();
    let error = listen(&path).err().unwrap().to_string();
    assert!(error.contains("another fastvpn serves"), "{error}");
    assert!(path.exists());
    drop(waiting);
}

#[test]
fn what_is_not_a_socket_is_left_alone() {
    let (directory, path) = place();
    let refuses = || {
        let error = listen(&path).err().unwrap().to_string();
        assert!(error.contains("it is not a socket"), "{error}");
        assert!(error.contains("test.sock"), "{error}");
    };
    fs::write(&path, "precious").unwrap();
    refuses();
    assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
    fs::remove_file(&path).unwrap();
    fs::create_dir(&path).unwrap();
    refuses();
    fs::remove_dir(&path).unwrap();
    // Not even if it leads to a dead one, or nowhere.
    let dead = directory.path().join("dead.sock");
    leave_dead(&dead);
    std::os::unix::fs::symlink(&dead, &path).unwrap();
    refuses();
    assert!(dead.exists() && path.is_symlink());
    fs::remove_file(&dead).unwrap();
    refuses();
    assert!(path.is_symlink());
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

#[test]
fn paths_that_cannot_be_are_named() {
    let (directory, path) = place();
    fs::write(&path, "").unwrap();
    for (path, words) in [
        (path.join("below/a/file.sock"), "not a directory"),
        (
            directory.path().join("missing/test.sock"),
            "missing/test.sock: no such file or directory",
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

/// Nobody takes one that has not called listen(2) yet for a dead one.
#[test]
fn of_many_that_start_at_once_one_has_the_name() {
    let (_directory, path) = place();
    let start = std::sync::Barrier::new(8);
    for _ in 0..50 {
        leave_dead(&path);
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
        assert!(servers.len() == 1 && is_served(&path));
        drop(servers);
        let _ = fs::remove_file(&path);
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
