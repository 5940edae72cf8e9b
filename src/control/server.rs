//! The operators' socket: requests in, answers out, one JSON object a line
//! ([`super::protocol`]).
//!
//! Each connection has a thread of its own, which reads, hands the request to
//! the control thread, and writes the answer. So a client that is slow, stuck
//! or hostile keeps only itself waiting. All of it is bounded: connections,
//! bytes of a request, and the time that each step may take.

use std::fmt;
use std::io::{self, Read, Write};
use std::net;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{getsockopt, sockopt};

use super::protocol::{Answer, Line, Request};
use super::socket_name::{self, SocketName};
use super::turns::{Turn, Turns};
use crate::error::{Error, Result};

/// Connections at a time. One more is told so and closed.
pub const CONNECTIONS_MAX: usize = 16;

/// Longest request in bytes: some 200 000 prefixes.
pub const REQUEST_BYTES_MAX: usize = 4 << 20;

/// Longer requests are read one at a time: until it is done, one takes several
/// times its length.
const LONG_REQUEST_BYTES: usize = 64 << 10;

/// How long a client may take for a request, and for reading the answer.
const REQUEST_TIME_MAX: Duration = Duration::from_secs(30);
const ANSWER_TIME_MAX: Duration = Duration::from_secs(30);

/// How long a client may read nothing of its answer.
const WRITE_TIME_MAX: Duration = Duration::from_secs(5);

/// Bytes of all long answers that are being written; a single one may be longer.
/// One that is too much waits for nobody: the client is told to come again.
const LONG_ANSWERS_BYTES_MAX: usize = 64 << 20;

/// How long a request that has arrived may take until it is answered, with the
/// time in which it waits for others.
const DONE_TIME_MAX: Duration = Duration::from_secs(60);

/// How long answers that are under way are waited for at the end.
const CLOSE_TIME_MAX: Duration = Duration::from_secs(3);

/// Pause after a failed `accept(2)`, as when descriptors have run out.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

const TOO_BUSY: &str = "the tunnel is too busy to answer";

/// Stack of a connection's thread. The deepest JSON that is read has 128 levels.
const STACK_BYTES: usize = 512 << 10;

/// Something that a client wants of the control thread.
#[derive(Debug)]
pub enum Call {
    /// A request to answer.
    Request(Request, Reply),
    /// A process that wants to take over ([`crate::daemon::takeover`]); the
    /// connection is the control thread's from here on.
    Takeover {
        /// The connection, without any answer yet.
        stream: UnixStream,
        /// The version that the process speaks.
        protocol: u32,
        /// Others that want to take over are refused until this is dropped.
        turn: Turn,
    },
}

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

/// Where the answer to a request goes. Dropped, it says that there is none.
#[derive(Debug)]
pub struct Reply {
    answer: Sender<std::result::Result<Answer, String>>,
    asker: Asker,
    /// A long request's, of which the next one is read when this one is done.
    _turn: Option<Turn>,
}

impl Reply {
    /// Who gets the answer.
    pub fn asker(&self) -> Asker {
        self.asker
    }

    /// Answers. A client that has gone does not hear it.
    pub fn send(self, result: Result<Answer>) {
        let result = result.map_err(|error| error.to_string());
        let _ = self.answer.try_send(result);
    }
}

/// See the module's documentation. Dropped, it closes and unlinks its socket.
pub struct Server {
    /// Before the socket: as long as it is there, somebody listens.
    name: SocketName,
    calls: Receiver<Call>,
    shared: Arc<Shared>,
    accept: Option<JoinHandle<()>>,
}

struct Shared {
    listener: UnixListener,
    calls: Sender<Call>,
    stop: EventFd,
    stopping: AtomicBool,
    /// The open connections, for closing them.
    open: Mutex<Vec<(u64, UnixStream)>>,
    /// Who may have a long request read and done.
    long_requests: Turns,
    /// Who may have a long answer made. More than one at a time would be in
    /// memory before its length is known.
    long_answers: Turns,
    /// Bytes of long answers that are being written. Grows by whose turn it is.
    long_answers_bytes: AtomicUsize,
    /// Who may take over.
    takeovers: Turns,
}

impl Server {
    /// Listens at `path`. What a killed process has left there is replaced.
    ///
    /// # Errors
    /// When another process serves the path, or something else is there, or it
    /// cannot be made.
    pub fn start(path: &Path) -> Result<Self> {
        let (listener, name) = socket_name::listen(path, CONNECTIONS_MAX as i32)?;
        Self::serve(listener, name)
    }

    /// Goes on with a predecessor's listening socket, whose name is `path`.
    ///
    /// # Errors
    /// When there are no more threads or descriptors.
    pub fn from_listener(listener: OwnedFd, path: &Path) -> Result<Self> {
        Self::serve(UnixListener::from(listener), SocketName::of_bound(path))
    }

    fn serve(listener: UnixListener, name: SocketName) -> Result<Self> {
        let failed = |error| Error::os("cannot serve the operators' socket", error);
        listener.set_nonblocking(true).map_err(failed)?;
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let stop = EventFd::from_value_and_flags(0, flags).map_err(|errno| failed(errno.into()))?;
        let (sender, calls) = bounded(CONNECTIONS_MAX);
        let shared = Arc::new(Shared {
            listener,
            calls: sender,
            stop,
            stopping: AtomicBool::new(false),
            open: Mutex::new(Vec::with_capacity(CONNECTIONS_MAX)),
            long_requests: Turns::default(),
            long_answers: Turns::default(),
            long_answers_bytes: AtomicUsize::new(0),
            takeovers: Turns::default(),
        });
        // Before the last step, so that a failure ends it as any end does: the
        // name goes while the socket still listens.
        let mut server = Self {
            name,
            calls,
            shared,
            accept: None,
        };
        let accepting = Arc::clone(&server.shared);
        let accept = std::thread::Builder::new()
            .name("operators".into())
            .spawn(move || accepting.accept())
            .map_err(failed)?;
        server.accept = Some(accept);
        Ok(server)
    }

    /// What clients want.
    pub fn calls(&self) -> &Receiver<Call> {
        &self.calls
    }

    /// The listening socket, for a successor.
    pub fn listener(&self) -> BorrowedFd<'_> {
        self.shared.listener.as_fd()
    }

    /// Closes all connections, after answers that are under way. `unlink`: the
    /// socket's name goes, too.
    pub fn close(mut self, unlink: bool) {
        if !unlink {
            self.name.leave();
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::SeqCst);
        let _ = self.shared.stop.write(1);
        if let Some(accept) = self.accept.take() {
            let _ = accept.join();
        }
        // Those that wait for a request hear the end of it; those that write
        // an answer may finish.
        self.shared.shut_down(net::Shutdown::Read);
        let deadline = Instant::now() + CLOSE_TIME_MAX;
        while !self.shared.open().is_empty() && Instant::now() < deadline {
            // Answers to what nobody will do any more; a client may have sent
            // several requests at once.
            while self.calls.try_recv().is_ok() {}
            std::thread::sleep(Duration::from_millis(1));
        }
        self.shared.shut_down(net::Shutdown::Both);
    }
}

impl Shared {
    fn open(&self) -> std::sync::MutexGuard<'_, Vec<(u64, UnixStream)>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn shut_down(&self, how: net::Shutdown) {
        for (_, stream) in self.open().iter() {
            let _ = stream.shutdown(how);
        }
    }

    fn accept(self: Arc<Self>) {
        for id in 0.. {
            let mut ready = [
                PollFd::new(self.listener.as_fd(), PollFlags::POLLIN),
                PollFd::new(self.stop.as_fd(), PollFlags::POLLIN),
            ];
            let _ = poll(&mut ready, PollTimeout::NONE);
            if self.stopping.load(Ordering::SeqCst) {
                return;
            }
            match self.listener.accept() {
                Ok((stream, _)) => {
                    if let Err(error) = self.welcome(id, stream) {
                        tracing::debug!("an operator's connection was lost: {error}");
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => {
                    tracing::debug!("cannot take an operator's connection: {error}");
                    std::thread::sleep(ACCEPT_PAUSE);
                }
            }
        }
    }

    /// Gives a connection its thread, if it may have one.
    fn welcome(self: &Arc<Self>, id: u64, mut stream: UnixStream) -> io::Result<()> {
        // Not inherited from the listener, but other systems do.
        stream.set_nonblocking(false)?;
        stream.set_write_timeout(Some(WRITE_TIME_MAX))?;
        // The socket's mode says so already; unless someone has changed it.
        let refusal = if !Asker::of(&stream).is_ok_and(Asker::is_trusted) {
            Some("only root and the tunnel's own user may ask")
        } else if self.open().len() >= CONNECTIONS_MAX {
            Some("too many connections")
        } else {
            None
        };
        if let Some(reason) = refusal {
            // A line is always taken whole by a fresh connection's buffer.
            return write_line(&mut stream, Err(reason.to_string()));
        }
        self.open().push((id, stream.try_clone()?));
        let shared = Arc::clone(self);
        let spawned = std::thread::Builder::new()
            .name("operator".into())
            .stack_size(STACK_BYTES)
            .spawn(move || {
                shared.converse(id, stream);
                shared.forget(id);
            });
        if spawned.is_err() {
            self.forget(id);
        }
        spawned.map(drop)
    }

    /// Leaves a connection to whoever holds its stream.
    fn forget(&self, id: u64) {
        self.open().retain(|(open, _)| *open != id);
    }

    /// Requests and answers, until either side has enough.
    fn converse(&self, id: u64, mut stream: UnixStream) {
        let Ok(asker) = Asker::of(&stream) else {
            return;
        };
        let mut reader = LineReader::default();
        loop {
            let line = match reader.next(&mut stream, Instant::now() + REQUEST_TIME_MAX) {
                Ok(Some(line)) => line,
                Ok(None) => return,
                Err(error) => {
                    if error.kind() == io::ErrorKind::InvalidData {
                        let _ = write_line(&mut stream, Err(error.to_string()));
                    }
                    return;
                }
            };
            let deadline = Instant::now() + DONE_TIME_MAX;
            let result = match self.read(line, deadline) {
                Ok((Request::Takeover { protocol }, _)) => {
                    // The connection leaves its place among all; so this is
                    // what bounds those that wait for the control thread.
                    if let Some(turn) = self.takeovers.take(Duration::ZERO) {
                        // Before the control thread has it: this server may end in
                        // the course of the takeover, and must not close it then.
                        self.forget(id);
                        let call = Call::Takeover {
                            stream,
                            protocol,
                            turn,
                        };
                        let _ = self.calls.send_deadline(call, deadline);
                        return;
                    }
                    Err("another process is taking over already; try again".into())
                }
                Ok((request, turn)) => {
                    let asked = Asked {
                        asker,
                        request,
                        turn,
                        deadline,
                    };
                    if self.answer(&mut stream, asked).is_err() {
                        return;
                    }
                    continue;
                }
                Err(error) => Err(error),
            };
            if write_line(&mut stream, result).is_err() {
                return;
            }
        }
    }

    /// What a line asks for; with a long one's turn, once it has come.
    fn read(
        &self,
        line: Vec<u8>,
        deadline: Instant,
    ) -> std::result::Result<(Request, Option<Turn>), String> {
        let turn = match line.len() > LONG_REQUEST_BYTES {
            true => Some(self.long_requests.take(left(deadline)).ok_or(TOO_BUSY)?),
            false => None,
        };
        let request = Request::read(&line);
        let request = request.map_err(|error| format!("cannot read the request: {error}"))?;
        Ok((request, turn))
    }

    fn answer(&self, stream: &mut UnixStream, asked: Asked) -> io::Result<()> {
        if !has_long_answer(&asked.request) {
            return write_line(stream, self.ask(asked));
        }
        let under_way = || self.long_answers_bytes.load(Ordering::SeqCst);
        let refuse = |stream: &mut UnixStream| {
            let reason = "too many long answers under way; try again";
            write_line(stream, Err(reason.into()))
        };
        let turn = self.long_answers.take(left(asked.deadline));
        let Some(turn) = turn.filter(|_| under_way() < LONG_ANSWERS_BYTES_MAX) else {
            return refuse(stream);
        };
        // The answer itself is gone once it is a text.
        let text = to_line(self.ask(asked))?;
        let bytes = text.len();
        if under_way() > 0 && under_way() + bytes > LONG_ANSWERS_BYTES_MAX {
            drop((text, turn));
            return refuse(stream);
        }
        self.long_answers_bytes.fetch_add(bytes, Ordering::SeqCst);
        drop(turn);
        let written = write_all(stream, &text, Instant::now() + ANSWER_TIME_MAX);
        drop(text);
        self.long_answers_bytes.fetch_sub(bytes, Ordering::SeqCst);
        written
    }

    /// Has the control thread answer.
    fn ask(&self, asked: Asked) -> std::result::Result<Answer, String> {
        let (sender, answer) = bounded(1);
        let reply = Reply {
            answer: sender,
            asker: asked.asker,
            _turn: asked.turn,
        };
        let call = Call::Request(asked.request, reply);
        if self.calls.send_deadline(call, asked.deadline).is_err() {
            return Err(TOO_BUSY.into());
        }
        match answer.recv_deadline(asked.deadline) {
            Ok(result) => result,
            Err(_) => Err("the tunnel gives no answer; it may be ending".into()),
        }
    }
}

/// A request on its way to the control thread.
struct Asked {
    asker: Asker,
    request: Request,
    /// A long request's.
    turn: Option<Turn>,
    /// When it must have been answered.
    deadline: Instant,
}

fn left(deadline: Instant) -> Duration {
    deadline.saturating_duration_since(Instant::now())
}

/// Whether the answer grows with the number of peers or prefixes.
fn has_long_answer(request: &Request) -> bool {
    matches!(request, Request::Peers {} | Request::RouteList {})
}

/// Cuts a stream into lines of bounded length, each within bounded time.
#[derive(Default)]
struct LineReader {
    /// Bytes behind the last line.
    rest: Vec<u8>,
}

impl LineReader {
    /// The next line, `None` at the end.
    fn next(&mut self, stream: &mut UnixStream, deadline: Instant) -> io::Result<Option<Vec<u8>>> {
        let mut line = std::mem::take(&mut self.rest);
        let mut searched = 0;
        let mut chunk = [0; 16 << 10];
        loop {
            if let Some(end) = line[searched..].iter().position(|byte| *byte == b'\n') {
                let end = searched + end;
                self.rest = line.split_off(end + 1);
                line.truncate(end);
                return Ok(Some(line));
            }
            searched = line.len();
            if line.len() > REQUEST_BYTES_MAX {
                let text = format!("a request has at most {REQUEST_BYTES_MAX} bytes");
                return Err(io::Error::new(io::ErrorKind::InvalidData, text));
            }
            let left = left(deadline);
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            stream.set_read_timeout(Some(left))?;
            match stream.read(&mut chunk) {
                Ok(0) => return Ok(None),
                Ok(bytes) => line.extend_from_slice(&chunk[..bytes]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

fn to_line(result: std::result::Result<Answer, String>) -> io::Result<Vec<u8>> {
    let mut text = serde_json::to_vec(&Line::from(result))?;
    text.push(b'\n');
    Ok(text)
}

fn write_line(
    stream: &mut UnixStream,
    result: std::result::Result<Answer, String>,
) -> io::Result<()> {
    let deadline = Instant::now() + ANSWER_TIME_MAX;
    write_all(stream, &to_line(result)?, deadline)
}

/// `write_all` within bounded time, however slowly the client reads.
fn write_all(stream: &mut UnixStream, mut rest: &[u8], deadline: Instant) -> io::Result<()> {
    while !rest.is_empty() {
        if Instant::now() > deadline {
            return Err(io::ErrorKind::TimedOut.into());
        }
        match stream.write(rest) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(bytes) => rest = &rest[bytes..],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
#[path = "server_tests.rs"]
mod tests;
