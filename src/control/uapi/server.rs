//! The socket that `wg(8)` looks for: `/var/run/wireguard/NAME.sock`, for root and the tunnel's
//! own user.
//!
//! One thread serves one connection after another, and one request at a time of each, which
//! the control thread does. A connection that says nothing for [`CLIENT_TIME_MAX`] is closed, so
//! that it keeps others waiting no longer than that.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, recv, send};
use zeroize::Zeroizing;

use super::{Device, Parser, Request, refusal};
use crate::control::credentials::Asker;
use crate::control::socket_name::{self, SocketName};
use crate::error::{Error, Result};

/// Where all programs that speak this have their sockets. `wg` looks nowhere else.
const DIRECTORY: &str = "/var/run/wireguard";

/// Connections that may wait for their turn.
const BACKLOG: i32 = 16;

/// How long a client may take to say something, to end a request, and to read the answer.
const CLIENT_TIME_MAX: Duration = Duration::from_secs(5);

/// Longest line: a key and its name have some 80 bytes.
const LINE_BYTES_MAX: usize = 4 << 10;

/// Pause after a failed `accept(2)`, as when descriptors have run out.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What comes of a request: nothing to say of a change, and the tunnel for `get`.
pub(crate) type Outcome = std::result::Result<Option<Device>, Errno>;

/// A request for the control thread.
#[derive(Debug)]
pub(crate) struct Call {
    pub(crate) request: Request,
    /// Who wants it.
    pub(crate) asker: Asker,
    answer: Sender<Outcome>,
}

impl Call {
    /// Takes it apart: what is wanted, by whom, and where the answer goes.
    pub(crate) fn answer(self, answer: impl FnOnce(Request, Asker) -> Outcome) {
        let _ = self.answer.try_send(answer(self.request, self.asker));
    }
}

/// See the module's documentation. Dropped, it closes and removes its socket.
pub(crate) struct Server {
    name: SocketName,
    /// What clients want.
    pub(crate) calls: Receiver<Call>,
    /// Closed, it tells the thread to end.
    stop: Option<UnixStream>,
    thread: JoinHandle<()>,
}

impl Server {
    /// Listens for requests to the tunnel of this name. What a killed process has left there is
    /// replaced.
    ///
    /// # Errors
    /// When another process serves the name, or the socket cannot be made.
    pub(crate) fn start(tun: &str) -> Result<Self> {
        Self::start_at(&path(tun))
    }

    /// Whether the socket can still be found by its name.
    pub(crate) fn has_name(&self) -> bool {
        self.name.is_there()
    }

    fn start_at(path: &Path) -> Result<Self> {
        let failed = |error| {
            let what = format!("cannot open the WireGuard socket {}", path.display());
            Error::os(what, error)
        };
        let (listener, name) = socket_name::listen_privately(path, BACKLOG).map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        let (stop, stopped) = UnixStream::pair().map_err(failed)?;
        let (sender, calls) = bounded(1);
        let service = Service {
            listener,
            stopped,
            calls: sender,
        };
        let thread = std::thread::Builder::new()
            .name("wireguard-socket".into())
            .spawn(move || service.run())
            .map_err(failed)?;
        Ok(Self {
            name,
            calls,
            stop: Some(stop),
            thread,
        })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.name.remove();
        drop(self.stop.take());
        while !self.thread.is_finished() {
            // What nobody will do any more is dropped, which answers it.
            drop(self.calls.recv_timeout(Duration::from_millis(1)));
        }
    }
}

/// The path of the socket of the tunnel of this name.
pub(crate) fn path(tun: &str) -> PathBuf {
    Path::new(DIRECTORY).join(format!("{tun}.sock"))
}

/// What the thread has.
struct Service {
    listener: UnixListener,
    /// At its end once the server is dropped.
    stopped: UnixStream,
    calls: Sender<Call>,
}

impl Service {
    fn run(self) {
        while self
            .wait(self.listener.as_fd(), PollFlags::POLLIN, None)
            .is_ok()
        {
            match self.listener.accept() {
                Ok((stream, _)) => {
                    // Whatever it was, the client has gone, or is to go.
                    let _ = self.serve(&stream);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => {
                    tracing::debug!("cannot take a connection to the WireGuard socket: {error}");
                    std::thread::sleep(ACCEPT_PAUSE);
                }
            }
        }
    }

    /// Answers a client's requests until it says no more.
    fn serve(&self, stream: &UnixStream) -> io::Result<()> {
        let asker = Asker::of(stream)?;
        // The socket's mode says so already, unless someone has changed it.
        if !asker.is_trusted() {
            return self.send(stream, refusal(Some(Errno::EPERM)).as_bytes());
        }
        let mut reader = Reader::new(stream);
        // `wg` connects once to see whether anybody listens, and says nothing.
        while let Some(request) = self.receive(&mut reader)? {
            match request.and_then(|request| self.ask(request, asker)) {
                Ok(Some(device)) => self.send(stream, device.to_text().as_bytes())?,
                Ok(None) => self.send(stream, refusal(None).as_bytes())?,
                Err(errno) => self.send(stream, refusal(Some(errno)).as_bytes())?,
            }
        }
        Ok(())
    }

    /// The next request, to its end also if it is wrong: a client that still writes would not
    /// read why. `None`: there is none.
    fn receive(
        &self,
        reader: &mut Reader<'_>,
    ) -> io::Result<Option<std::result::Result<Request, Errno>>> {
        let deadline = Instant::now() + CLIENT_TIME_MAX;
        let mut parser = Parser::default();
        loop {
            match reader.line() {
                Some([]) => return Ok(Some(parser.finish())),
                Some(line) => parser.take(line),
                None => {
                    self.wait(reader.stream.as_fd(), PollFlags::POLLIN, Some(deadline))?;
                    if !reader.fill()? {
                        return Ok(None);
                    }
                }
            }
        }
    }

    /// Has the control thread do what is wanted.
    fn ask(&self, request: Request, asker: Asker) -> Outcome {
        let (answer, answered) = bounded(1);
        let call = Call {
            request,
            asker,
            answer,
        };
        let _ = self.calls.send(call);
        // It is ending.
        answered.recv().unwrap_or(Err(Errno::ENODEV))
    }

    fn send(&self, stream: &UnixStream, text: &[u8]) -> io::Result<()> {
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        let deadline = Instant::now() + CLIENT_TIME_MAX;
        let mut left = text;
        while !left.is_empty() {
            match send(stream.as_raw_fd(), left, flags) {
                Ok(sent) => left = left.get(sent..).unwrap_or_default(),
                Err(Errno::EAGAIN) => {
                    self.wait(stream.as_fd(), PollFlags::POLLOUT, Some(deadline))?;
                }
                Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Waits until something can be done with `fd`.
    ///
    /// # Errors
    /// `TimedOut` after the deadline, and `Interrupted` once the server ends.
    fn wait(
        &self,
        fd: BorrowedFd<'_>,
        events: PollFlags,
        deadline: Option<Instant>,
    ) -> io::Result<()> {
        loop {
            let timeout = match deadline {
                None => PollTimeout::NONE,
                Some(deadline) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return Err(io::ErrorKind::TimedOut.into());
                    }
                    // In whole milliseconds, and not before the time is up.
                    let up = left.saturating_add(Duration::from_millis(1));
                    PollTimeout::try_from(up).unwrap_or(PollTimeout::MAX)
                }
            };
            let mut ready = [
                PollFd::new(self.stopped.as_fd(), PollFlags::POLLIN),
                PollFd::new(fd, events),
            ];
            match poll(&mut ready, timeout) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
            if ready[0].any().unwrap_or(false) {
                return Err(io::ErrorKind::Interrupted.into());
            }
            if ready[1].any().unwrap_or(false) {
                return Ok(());
            }
        }
    }
}

/// Lines of a client, which may have keys in them: one buffer, wiped at the end.
struct Reader<'a> {
    stream: &'a UnixStream,
    buffer: Zeroizing<Vec<u8>>,
    /// What of the buffer was received and is not given out yet.
    start: usize,
    end: usize,
}

impl<'a> Reader<'a> {
    fn new(stream: &'a UnixStream) -> Self {
        Self {
            stream,
            buffer: Zeroizing::new(vec![0; LINE_BYTES_MAX]),
            start: 0,
            end: 0,
        }
    }

    /// The next line, without its line feed, if all of it has come.
    fn line(&mut self) -> Option<&[u8]> {
        let waiting = self.buffer.get(self.start..self.end)?;
        let length = waiting.iter().position(|byte| *byte == b'\n')?;
        let start = self.start;
        self.start += length + 1;
        self.buffer.get(start..start + length)
    }

    /// Receives more; `false` at the end.
    ///
    /// # Errors
    /// `FileTooLarge` if a line does not fit.
    fn fill(&mut self) -> io::Result<bool> {
        self.buffer.copy_within(self.start..self.end, 0);
        self.end -= self.start;
        self.start = 0;
        let room = self.buffer.get_mut(self.end..).unwrap_or_default();
        if room.is_empty() {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        match recv(self.stream.as_raw_fd(), room, MsgFlags::MSG_DONTWAIT) {
            Ok(received) => {
                self.end += received;
                Ok(received > 0)
            }
            Err(Errno::EAGAIN | Errno::EINTR) => Ok(true),
            Err(error) => Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::Shutdown;
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::control::uapi::Set;

    const PATIENCE: Duration = Duration::from_secs(30);

    fn device() -> Device {
        Device {
            private_key: None,
            listen_port: 51820,
            firewall_mark: 0,
            peers: Vec::new(),
        }
    }

    /// A server in a directory of its own, whose requests are done by `outcome`.
    fn with_server(
        outcome: impl Fn(Request) -> Outcome + Send,
        client: impl FnOnce(&Path),
    ) -> PathBuf {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("wireguard/wg0.sock");
        let server = Server::start_at(&path).unwrap();
        let calls = server.calls.clone();
        std::thread::scope(|scope| {
            let (done, is_done) = bounded::<()>(0);
            scope.spawn(move || {
                loop {
                    crossbeam_channel::select! {
                        recv(calls) -> call => call.unwrap().answer(|request, _| outcome(request)),
                        recv(is_done) -> _ => return,
                    }
                }
            });
            client(&path);
            drop(done);
        });
        drop(server);
        assert!(!path.exists());
        path
    }

    fn connect(path: &Path) -> UnixStream {
        let stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    /// All that comes of these bytes.
    fn exchange(path: &Path, bytes: &[u8]) -> String {
        let mut stream = connect(path);
        stream.write_all(bytes).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        text
    }

    #[test]
    fn requests_are_done_one_after_the_other() {
        let outcome = |request| match request {
            Request::Get => Ok(Some(device())),
            Request::Set(set) if *set == Set::default() => Ok(None),
            Request::Set(_) => Err(Errno::EOPNOTSUPP),
        };
        with_server(outcome, |path| {
            let shown = "listen_port=51820\nerrno=0\n\n";
            assert_eq!(exchange(path, b"get=1\n\n"), shown);
            assert_eq!(exchange(path, b"set=1\n\n"), "errno=0\n\n");
            assert_eq!(exchange(path, b"set=1\nfwmark=7\n\n"), "errno=-95\n\n");
            // The first fault counts, and the request is read to its end.
            let wrong = b"set=1\nno\nfwmark=7\n\nget=1\n\n";
            assert_eq!(exchange(path, wrong), format!("errno=-22\n\n{shown}"));
            // One that was not ended is none.
            assert_eq!(exchange(path, b"set=1\nfwmark=7\n"), "");
            assert_eq!(exchange(path, b""), "");
        });
    }

    #[test]
    fn the_socket_is_its_owners_alone() {
        with_server(
            |_| Ok(None),
            |path| {
                let mode = |path: &Path| path.metadata().unwrap().permissions().mode() & 0o777;
                assert_eq!(mode(path), 0o600);
                assert_eq!(mode(path.parent().unwrap()), 0o700);
                let other = Server::start_at(path).err().unwrap().to_string();
                assert!(other.contains("wg0.sock"), "{other}");
            },
        );
    }

    /// A request and an answer that do not fit any buffer at once.
    #[test]
    fn long_requests_and_answers_pass() {
        let outcome = |request| match request {
            Request::Get => {
                let prefix = "10.0.0.0/8".parse().unwrap();
                let peer = crate::control::uapi::Peer {
                    public_key: crate::wire::wireguard::keys::PublicKey([1; 32]),
                    preshared_key: Default::default(),
                    endpoint: None,
                    latest_handshake: None,
                    bytes_sent: 0,
                    bytes_received: 0,
                    persistent_keepalive: None,
                    allowed_ips: vec![prefix; 100_000],
                };
                let peers = vec![peer];
                Ok(Some(Device { peers, ..device() }))
            }
            Request::Set(set) => match set.peers[0].allowed_ips.len() {
                100_000 => Ok(None),
                _ => Err(Errno::EINVAL),
            },
        };
        with_server(outcome, |path| {
            let key = format!("public_key={}\n", "01".repeat(32));
            let lines = "allowed_ip=10.0.0.0/8\n".repeat(100_000);
            let request = format!("set=1\n{key}{lines}\n");
            assert_eq!(exchange(path, request.as_bytes()), "errno=0\n\n");
            let shown = exchange(path, b"get=1\n\n");
            assert_eq!(shown.matches("allowed_ip=10.0.0.0/8\n").count(), 100_000);
            assert!(shown.ends_with("\nerrno=0\n\n"));
            let long = [b"set=1\n".to_vec(), vec![b'x'; 2 * LINE_BYTES_MAX]].concat();
            assert_eq!(exchange_some(path, &long), "");
        });
    }

    /// As [`exchange`] with a server that may close while it is written to.
    fn exchange_some(path: &Path, bytes: &[u8]) -> String {
        let mut stream = connect(path);
        let _ = stream.write_all(bytes);
        let mut text = String::new();
        let _ = stream.read_to_string(&mut text);
        text
    }

    /// Whoever says nothing, or has nobody to do it, keeps nobody from ending.
    #[test]
    fn it_ends_at_once() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("wg0.sock");
        let server = Server::start_at(&path).unwrap();
        let silent = connect(&path);
        let mut waiting = connect(&path);
        waiting.write_all(b"get=1\n\n").unwrap();
        let start = Instant::now();
        drop(server);
        assert!(start.elapsed() < CLIENT_TIME_MAX);
        drop((silent, waiting));
        let server = Server::start_at(&path).unwrap();
        let mut waiting = connect(&path);
        waiting.write_all(b"get=1\n\n").unwrap();
        drop(server);
        let mut text = String::new();
        let _ = waiting.read_to_string(&mut text);
        assert!(text.is_empty() || text == "errno=-19\n\n", "{text:?}");
    }
}
