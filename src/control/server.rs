//! The control socket's server: requests in, answers out, one JSON object a line
//! ([`super::protocol`]).
//!
//! One thread serves all connections. It never waits for a client: it reads and
//! writes what can be read and written at once, and closes a connection that takes
//! longer than [`CLIENT_TIME_MAX`] over a request or an answer. It hands requests
//! to the control thread one at a time and waits for the answer, so that there is
//! never more than one being done. While clients leave too much unread, all requests
//! wait.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::codec::{self, Lines};
use super::credentials::Asker;
use super::protocol::{Answer, Line, REQUEST_BYTES_MAX, Request};
use super::socket_name::{self, SocketName};
use crate::error::{Error, Result};

/// Connections at a time. One more is told so and closed.
pub const CONNECTIONS_MAX: usize = 16;

/// How long a client may take for a request, and for reading an answer.
const CLIENT_TIME_MAX: Duration = Duration::from_secs(30);

/// Bytes of all answers that are not read to their end. While there are more, no
/// request is served.
const UNREAD_BYTES_MAX: usize = 64 << 20;

/// How long answers that are under way are waited for at the end.
const CLOSE_TIME_MAX: Duration = Duration::from_secs(1);

/// Pause after a failed `accept(2)`, as when descriptors have run out.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Something that a client wants of the control thread.
#[derive(Debug)]
pub enum Call {
    /// A request to answer.
    Request(Request, Reply),
    /// A process that wants to take over; the connection is the control thread's from
    /// here on.
    Takeover {
        /// The connection, without any answer yet.
        connection: Lines,
        /// The version that the process speaks.
        protocol: u32,
    },
}

/// Where the answer to a request goes. Dropped, it says that there is none.
#[derive(Debug)]
pub struct Reply {
    answer: Sender<Result<Answer>>,
    asker: Asker,
}

impl Reply {
    /// Who gets the answer.
    pub fn asker(&self) -> Asker {
        self.asker
    }

    /// Answers. A client that has gone does not hear it.
    pub fn send(self, result: Result<Answer>) {
        let _ = self.answer.try_send(result);
    }
}

/// See the module's documentation. Dropped, it closes and removes its socket.
pub struct Server {
    name: SocketName,
    listener: UnixListener,
    calls: Receiver<Call>,
    /// Closed, it tells the thread to end.
    stop: Option<UnixStream>,
    thread: Option<JoinHandle<()>>,
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

    /// Goes on with an old process's listening socket, whose name is `path`.
    ///
    /// # Errors
    /// When there are no more threads or descriptors.
    pub fn from_listener(listener: OwnedFd, path: &Path) -> Result<Self> {
        Self::serve(UnixListener::from(listener), SocketName::of_bound(path))
    }

    fn serve(listener: UnixListener, name: SocketName) -> Result<Self> {
        let failed = |error| Error::os("cannot serve the control socket", error);
        listener.set_nonblocking(true).map_err(failed)?;
        let for_thread = listener.try_clone().map_err(failed)?;
        let (stop, stopped) = UnixStream::pair().map_err(failed)?;
        let (sender, calls) = bounded(1);
        // Before the last step, so that a failure ends it as any end does.
        let mut server = Self {
            name,
            listener,
            calls,
            stop: Some(stop),
            thread: None,
        };
        let thread = std::thread::Builder::new()
            .name("control".into())
            .spawn(move || serve_all(&for_thread, &stopped, &sender))
            .map_err(failed)?;
        server.thread = Some(thread);
        Ok(server)
    }

    /// What clients want.
    pub fn calls(&self) -> &Receiver<Call> {
        &self.calls
    }

    /// The listening socket, for a new process.
    pub fn listener(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
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
        // As long as the name is there, somebody listens; and a client that waits for
        // the end of its connection finds no name then.
        self.name.remove();
        drop(self.stop.take());
        let Some(thread) = self.thread.take() else {
            return;
        };
        while !thread.is_finished() {
            // What nobody will do any more is dropped, which answers it.
            drop(self.calls.recv_timeout(Duration::from_millis(1)));
        }
        let _ = thread.join();
    }
}

/// The thread, until `stop` is closed at its other end.
fn serve_all(listener: &UnixListener, stop: &UnixStream, calls: &Sender<Call>) {
    let mut connections: Vec<Connection> = Vec::new();
    while !wait(listener, stop, &connections) {
        if let Err(error) = accept(listener, &mut connections) {
            tracing::debug!("cannot take a connection to the control socket: {error}");
            std::thread::sleep(ACCEPT_PAUSE);
        }
        let now = Instant::now();
        let mut unread_bytes = unread_bytes(&connections);
        connections = connections
            .into_iter()
            .filter_map(|mut connection| {
                if connection.waits(unread_bytes) {
                    // For others, which is not its fault.
                    connection.deadline = now + CLIENT_TIME_MAX;
                    return Some(connection);
                }
                unread_bytes -= connection.lines.sending_bytes();
                let connection = connection.serve(now, calls)?;
                unread_bytes += connection.lines.sending_bytes();
                Some(connection)
            })
            .collect();
        // While one was served, the others could not be.
        let busy = now.elapsed();
        for connection in &mut connections {
            connection.deadline += busy;
        }
    }
    let deadline = Instant::now() + CLOSE_TIME_MAX;
    for connection in &mut connections {
        let _ = connection.lines.flush(deadline);
    }
}

/// Waits until something can be done; tells whether that is to end.
fn wait(listener: &UnixListener, stop: &UnixStream, connections: &[Connection]) -> bool {
    let mut ready = vec![
        PollFd::new(stop.as_fd(), PollFlags::POLLIN),
        PollFd::new(listener.as_fd(), PollFlags::POLLIN),
    ];
    let unread_bytes = unread_bytes(connections);
    let served = || connections.iter().filter(|one| !one.waits(unread_bytes));
    let mut time_max = PollTimeout::NONE;
    if let Some(next) = served().map(Connection::due).min() {
        time_max = codec::timeout(next.saturating_duration_since(Instant::now()));
    }
    for Connection { lines, .. } in served() {
        let events = match lines.is_flushed() {
            true => PollFlags::POLLIN,
            false => PollFlags::POLLOUT,
        };
        ready.push(PollFd::new(lines.stream().as_fd(), events));
    }
    let _ = poll(&mut ready, time_max);
    ready[0].any().unwrap_or(false)
}

fn unread_bytes(connections: &[Connection]) -> usize {
    let each = connections.iter().map(|one| one.lines.sending_bytes());
    each.sum()
}

/// Takes a connection that waits to be taken.
fn accept(listener: &UnixListener, connections: &mut Vec<Connection>) -> io::Result<()> {
    let stream = match listener.accept() {
        Ok((stream, _)) => stream,
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
        Err(error) => return Err(error),
    };
    let asker = Asker::of(&stream)?;
    let deadline = Instant::now() + CLIENT_TIME_MAX;
    let connection = Connection {
        lines: Lines::new(stream, REQUEST_BYTES_MAX),
        asker,
        deadline,
    };
    // The socket's mode says so already; unless someone has changed it.
    if !asker.is_trusted() {
        connection.refuse("only root and the tunnel's own user may ask");
    } else if connections.len() >= CONNECTIONS_MAX {
        connection.refuse("too many connections");
    } else {
        connections.push(connection);
    }
    Ok(())
}

struct Connection {
    lines: Lines,
    asker: Asker,
    /// When the client must have sent a whole request, or have read the answer.
    deadline: Instant,
}

impl Connection {
    /// Whether its requests wait until others have read their answers.
    fn waits(&self, unread_bytes: usize) -> bool {
        unread_bytes > UNREAD_BYTES_MAX && self.lines.is_flushed()
    }

    /// When to serve it even if nothing can be read or written.
    fn due(&self) -> Instant {
        match self.lines.is_flushed() && self.lines.has_line() {
            true => Instant::now(),
            false => self.deadline,
        }
    }

    /// Sends what is left to send, or does one request. `None`: it is over.
    fn serve(mut self, now: Instant, calls: &Sender<Call>) -> Option<Self> {
        let result = match self.lines.is_flushed() {
            true => self.lines.receive(now),
            false => {
                let flushed = self.lines.flush(now);
                if flushed.is_ok() {
                    self.deadline = now + CLIENT_TIME_MAX;
                }
                return self.unless_late(flushed, now);
            }
        };
        let line = match result {
            Ok(line) => line?,
            Err(error) if error.kind() == io::ErrorKind::FileTooLarge => {
                self.refuse(&format!("a request has at most {REQUEST_BYTES_MAX} bytes"));
                return None;
            }
            Err(error) => return self.unless_late(Err(error), now),
        };
        let answer = match Request::read(&line) {
            Ok(Request::Takeover { protocol }) => {
                let connection = self.lines;
                let _ = calls.send(Call::Takeover {
                    connection,
                    protocol,
                });
                return None;
            }
            Ok(request) => ask(request, self.asker, calls),
            Err(error) => Err(Error::new(format!("cannot read the request: {error}"))),
        };
        self.answer(answer)
    }

    /// The connection, unless it has failed or its time was up.
    fn unless_late(self, result: io::Result<()>, now: Instant) -> Option<Self> {
        let goes_on = match result {
            Ok(()) => true,
            Err(error) => error.kind() == io::ErrorKind::TimedOut && now < self.deadline,
        };
        goes_on.then_some(self)
    }

    fn answer(mut self, answer: Result<Answer>) -> Option<Self> {
        let line = serde_json::to_vec(&Line::from(answer)).ok()?;
        let now = Instant::now();
        self.deadline = now + CLIENT_TIME_MAX;
        let sent = self.lines.send(line, now);
        self.unless_late(sent, now)
    }

    /// Says why before it is closed. A line fits a fresh connection's buffer.
    fn refuse(self, reason: &str) {
        drop(self.answer(Err(Error::new(reason))));
    }
}

/// Has the control thread answer.
fn ask(request: Request, asker: Asker, calls: &Sender<Call>) -> Result<Answer> {
    let (answer, answered) = bounded(1);
    let _ = calls.send(Call::Request(request, Reply { answer, asker }));
    let none = |_| Err(Error::new("the tunnel gives no answer").hint("it may be ending"));
    answered.recv().unwrap_or_else(none)
}

#[cfg(test)]
#[path = "server_tests.rs"]
mod tests;
