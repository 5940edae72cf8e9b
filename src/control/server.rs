//! The control socket's server: requests in, answers out, one JSON object a line
//! ([`super::protocol`]).
//!
//! One thread accepts connections, and each has a thread of its own, so that a client
//! keeps only itself waiting. It is closed when it takes longer than [`CLIENT_TIME_MAX`]
//! over a request or an answer. Requests are parsed and done one at a time, by the
//! control thread. While clients leave too much unread, all requests wait.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::codec::{Lines, WipedBytes};
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

/// How often a connection checks whether the server is ending.
const END_CHECK_INTERVAL: Duration = Duration::from_millis(50);

/// How long a client waits for its next turn, so that one that sends many requests at
/// once lets others in.
const TURN_PAUSE: Duration = Duration::from_millis(1);

/// How long answers that are under way are waited for at the end.
const CLOSE_TIME_MAX: Duration = Duration::from_secs(1);

/// Pause after a failed `accept(2)`, as when descriptors have run out.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Something that a client wants of the control thread.
#[derive(Debug)]
pub enum Call {
    /// A request to answer.
    Request(Request, Reply),
    /// A process wants to take over. Its connection, without any answer yet, which is the
    /// control thread's from here on, and the version of what it speaks.
    Takeover(Lines, u32),
    /// Somebody wants copies of packets. Their connection, likewise, and how many bytes of
    /// each packet they want.
    Capture(Lines, Asker, u32),
}

/// Where the answer to a request goes. Dropped, it says that there is none.
#[derive(Debug)]
pub struct Reply {
    answer: Sender<Result<Answer>>,
    /// Who gets the answer.
    pub asker: Asker,
}

impl Reply {
    /// Answers, unless the client has gone.
    pub fn send(self, result: Result<Answer>) {
        let _ = self.answer.try_send(result);
    }
}

/// See the module's documentation. Dropped, it closes and removes its socket.
pub struct Server {
    name: SocketName,
    /// The listening socket, which a new process may take over.
    pub listener: UnixListener,
    /// What clients want.
    pub calls: Receiver<Call>,
    /// Closed, it tells the accepting thread to end.
    stop: Option<UnixStream>,
    thread: JoinHandle<()>,
}

impl Server {
    /// Listens at `path`. What a killed process has left there is replaced.
    ///
    /// # Errors
    /// When another process serves the path, or something else is there, or it
    /// cannot be made.
    pub fn start(path: &Path) -> Result<Self> {
        let (listener, name) = socket_name::listen(path, CONNECTIONS_MAX as i32)?;
        Self::serve(listener, name, UNREAD_BYTES_MAX)
    }

    /// Goes on with an old process's listening socket, whose name is `path`.
    ///
    /// # Errors
    /// When there are no more threads or descriptors.
    pub fn from_listener(listener: OwnedFd, path: &Path) -> Result<Self> {
        let name = SocketName::of_bound(path);
        Self::serve(UnixListener::from(listener), name, UNREAD_BYTES_MAX)
    }

    fn serve(listener: UnixListener, name: SocketName, unread_bytes_max: usize) -> Result<Self> {
        let failed = |error| Error::os("cannot serve the control socket", error);
        listener.set_nonblocking(true).map_err(failed)?;
        let for_thread = listener.try_clone().map_err(failed)?;
        let (stop, stopped) = UnixStream::pair().map_err(failed)?;
        let (sender, calls) = bounded(1);
        let clients = Arc::new(Clients {
            calls: sender,
            unread_bytes_max,
            unread_bytes: Mutex::new(0),
            fewer_unread: Condvar::new(),
            is_ending: AtomicBool::new(false),
        });
        let thread = std::thread::Builder::new()
            .name("control".into())
            .spawn(move || accept_all(&for_thread, &stopped, &clients))
            .map_err(failed)?;
        Ok(Self {
            name,
            listener,
            calls,
            stop: Some(stop),
            thread,
        })
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
        while !self.thread.is_finished() {
            // What nobody will do any more is dropped, which answers it.
            drop(self.calls.recv_timeout(Duration::from_millis(1)));
        }
    }
}

/// Accepts connections until `stop` is closed at its other end, and then waits for them
/// to end.
fn accept_all(listener: &UnixListener, stop: &UnixStream, clients: &Arc<Clients>) {
    loop {
        let fds = [stop.as_fd(), listener.as_fd()];
        let mut ready = fds.map(|fd| PollFd::new(fd, PollFlags::POLLIN));
        let _ = poll(&mut ready, PollTimeout::NONE);
        if ready[0].any().unwrap_or(false) {
            break;
        }
        match accept(listener, clients) {
            // It has gone, or went to the process at the other end of a handoff.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => {
                tracing::debug!("cannot take a connection to the control socket: {error}");
                std::thread::sleep(ACCEPT_PAUSE);
            }
            Ok(()) => {}
        }
    }
    clients.is_ending.store(true, Ordering::Relaxed);
    let deadline = Instant::now() + CLOSE_TIME_MAX;
    while clients.count() > 0 && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Accepts a connection and starts its thread.
fn accept(listener: &UnixListener, clients: &Arc<Clients>) -> io::Result<()> {
    let (stream, _) = listener.accept()?;
    let asker = Asker::of(&stream)?;
    let lines = Lines::new(stream, REQUEST_BYTES_MAX);
    // The socket's mode says so already, unless someone has changed it.
    if !asker.is_trusted() {
        refuse(lines, "only root and the tunnel's own user may ask");
    } else if clients.count() >= CONNECTIONS_MAX {
        refuse(lines, "too many connections");
    } else {
        let clients = Arc::clone(clients);
        let serve = move || clients.serve(lines, asker).unwrap_or_default();
        std::thread::Builder::new()
            .name("client".into())
            .spawn(serve)?;
    }
    Ok(())
}

/// Says why before a connection is closed. A line fits a fresh connection's buffer.
fn refuse(mut lines: Lines, reason: &str) {
    let _ = lines.send(encode(Err(Error::new(reason))), Instant::now());
}

fn encode(answer: Result<Answer>) -> Vec<u8> {
    // It fails for keys that are not strings, which no answer has.
    serde_json::to_vec(&Line::from(answer)).unwrap_or_default()
}

/// What the connections' threads share. Each holds it once.
struct Clients {
    calls: Sender<Call>,
    /// Of [`Self::unread_bytes`], before all requests wait.
    unread_bytes_max: usize,
    /// Bytes of all answers that are being sent. Locked while a request is done.
    unread_bytes: Mutex<usize>,
    fewer_unread: Condvar,
    is_ending: AtomicBool,
}

impl Clients {
    fn count(self: &Arc<Self>) -> usize {
        Arc::strong_count(self) - 1
    }

    /// Serves a client until it is over, for whatever reason.
    fn serve(&self, mut lines: Lines, asker: Asker) -> Option<()> {
        loop {
            let line = match self.receive(&mut lines) {
                Err(error) if error.kind() == io::ErrorKind::FileTooLarge => {
                    let reason = format!(
                        "a request has at most {REQUEST_BYTES_MAX} bytes; ask for less at a \
                         time, or use the configuration file"
                    );
                    refuse(lines, &reason);
                    return None;
                }
                line => line.ok()??,
            };
            // Its turn is when no other request is being done, and clients have read enough.
            let mut unread_bytes = self
                .fewer_unread
                .wait_while(self.lock(), |bytes| *bytes > self.unread_bytes_max)
                .unwrap_or_else(PoisonError::into_inner);
            // Only now: what a request is read into may be many times as long.
            let request = Request::read(&line)
                .map_err(|error| Error::new(format!("cannot read the request: {error}")));
            if let Ok(Request::Takeover { protocol }) = request {
                let _ = self.calls.send(Call::Takeover(lines, protocol));
                return None;
            }
            if let Ok(Request::Capture { snaplen_bytes }) = request {
                let _ = self.calls.send(Call::Capture(lines, asker, snaplen_bytes));
                return None;
            }
            let answer = encode(self.answer(request, asker));
            let answer_bytes = answer.len();
            *unread_bytes += answer_bytes;
            drop(unread_bytes);
            let sent = lines.send(answer, Instant::now() + CLIENT_TIME_MAX);
            *self.lock() -= answer_bytes;
            self.fewer_unread.notify_all();
            sent.ok()?;
            std::thread::sleep(TURN_PAUSE);
        }
    }

    /// The next request's line; `None` at the end, be it the client's or the server's.
    fn receive(&self, lines: &mut Lines) -> io::Result<Option<WipedBytes>> {
        let deadline = Instant::now() + CLIENT_TIME_MAX;
        loop {
            match lines.receive(Instant::now() + END_CHECK_INTERVAL) {
                Err(error) if error.kind() == io::ErrorKind::TimedOut => {}
                result => return result,
            }
            if Instant::now() > deadline || self.is_ending.load(Ordering::Relaxed) {
                return Ok(None);
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, usize> {
        let lock = self.unread_bytes.lock();
        lock.unwrap_or_else(PoisonError::into_inner)
    }

    /// Has the control thread answer.
    fn answer(&self, request: Result<Request>, asker: Asker) -> Result<Answer> {
        let request = request?;
        let (answer, answered) = bounded(1);
        let reply = Reply { answer, asker };
        let _ = self.calls.send(Call::Request(request, reply));
        let none = |_| Err(Error::new("the tunnel gives no answer").hint("it may be ending"));
        answered.recv().unwrap_or_else(none)
    }
}

#[cfg(test)]
#[path = "server_tests.rs"]
mod tests;
