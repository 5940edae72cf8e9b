//! The thread that serves metrics: it waits for all connections at once, and asks the control
//! thread for what a request wants. All who ask for the numbers within a second get the same
//! page, so that the control thread makes no more than one of them a second, whatever clients do.
//! One that does not read keeps its page in memory, up to some 5 MB, for a few seconds, and less
//! when others want its place.

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use prometheus_client::encoding::prometheus_text::CONTENT_TYPE;

use super::Call;
use super::client::{Client, no_answer};
use super::exposition::to_text;
use super::http::{self, Page, Response, Status};
use crate::error::{Error, Result};

/// Connections at a time.
const CLIENTS_MAX: usize = 4;

/// How long a connection keeps its place while others wait for one. A scrape takes
/// milliseconds.
const PLACE_TIME_MIN: Duration = Duration::from_secs(1);

/// How long those who ask for the numbers get the same ones.
const PAGE_TIME_MAX: Duration = Duration::from_secs(1);

/// How long the control thread may take to answer.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(3);

/// Pause after a failed `accept(2)`, as when descriptors have run out.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// How long, and how often, a port is waited for that a process may have which has just ended.
const PORT_WAIT_MAX: Duration = Duration::from_secs(1);
const PORT_WAIT_STEP: Duration = Duration::from_millis(10);

/// A socket that listens.
#[derive(Clone)]
pub(crate) struct Listener {
    socket: Arc<TcpListener>,
    /// Where.
    pub(crate) address: SocketAddr,
}

impl Listener {
    /// Listens at an address. `old`: where the process that is taken over listens, if it does:
    /// that one lets go of it too late for this.
    ///
    /// # Errors
    /// When another process does, or this host does not have the address.
    pub(crate) fn bind(address: SocketAddr, old: Option<SocketAddr>) -> Result<Self> {
        let deadline = Instant::now() + PORT_WAIT_MAX;
        loop {
            match TcpListener::bind(address) {
                Ok(socket) => return Ok(Self::new(socket, address)),
                Err(error) if error.kind() != io::ErrorKind::AddrInUse => {
                    return Err(failed(address, error));
                }
                Err(error) if Instant::now() > deadline => {
                    let hint = match old {
                        Some(old) if old.port() == address.port() => format!(
                            "the process that is to be taken over has the port, at {old}: \
                             give another port, or stop it and start anew"
                        ),
                        _ => "another process listens there: stop it, or give another port".into(),
                    };
                    return Err(failed(address, error).hint(hint));
                }
                Err(_) => std::thread::sleep(PORT_WAIT_STEP),
            }
        }
    }

    /// Another process's socket, which listens at this address.
    pub(crate) fn inherited(socket: OwnedFd, address: SocketAddr) -> Self {
        Self::new(TcpListener::from(socket), address)
    }

    fn new(socket: TcpListener, address: SocketAddr) -> Self {
        Self {
            socket: Arc::new(socket),
            address,
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn failed(address: SocketAddr, error: io::Error) -> Error {
    Error::os(format!("cannot serve metrics at {address}"), error)
}

/// See the module's documentation. Dropped, it closes all connections.
pub(crate) struct Server {
    /// The listening socket, which a new process may take over.
    pub(crate) listener: Listener,
    /// What clients want.
    pub(crate) calls: Receiver<Call>,
    /// Closed, it tells the thread to end.
    stop: Option<UnixStream>,
    thread: JoinHandle<()>,
}

impl Server {
    /// Serves those who connect.
    ///
    /// # Errors
    /// When there are no more threads or descriptors.
    pub(crate) fn start(listener: Listener) -> Result<Self> {
        let failed = |error| failed(listener.address, error);
        listener.socket.set_nonblocking(true).map_err(failed)?;
        let (stop, stopped) = UnixStream::pair().map_err(failed)?;
        let (sender, calls) = bounded(1);
        let service = Service {
            listener: listener.clone(),
            stopped,
            clients: Vec::with_capacity(CLIENTS_MAX),
            calls: sender,
            page: None,
        };
        let thread = std::thread::Builder::new()
            .name("metrics".into())
            .spawn(move || service.run())
            .map_err(failed)?;
        Ok(Self {
            listener,
            calls,
            stop: Some(stop),
            thread,
        })
    }

    /// Serves nobody any more. Whoever connects waits for the next one who serves.
    pub(crate) fn end(self) -> Listener {
        self.listener.clone()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.stop.take());
        while !self.thread.is_finished() {
            // What nobody will answer any more is dropped, which says so.
            drop(self.calls.recv_timeout(Duration::from_millis(1)));
        }
    }
}

/// What the thread has.
struct Service {
    listener: Listener,
    stopped: UnixStream,
    /// In the order in which they have connected.
    clients: Vec<Client>,
    calls: Sender<Call>,
    page: Option<MetricsPage>,
}

/// The numbers as text.
struct MetricsPage {
    text: Arc<str>,
    /// When it is too old to be served.
    until: Instant,
}

impl Service {
    fn run(mut self) {
        loop {
            let ready = self.wait();
            if ready.is_stopped {
                return;
            }
            // Before any answer is waited for: nobody is late on account of that.
            let now = Instant::now();
            self.page.take_if(|page| now >= page.until);
            let clients = self.clients.iter_mut().zip(&ready.clients);
            for (client, _) in clients.filter(|(_, is_ready)| **is_ready) {
                client.advance(|page, is_head| respond(&self.calls, &mut self.page, page, is_head));
            }
            self.clients.retain(|client| !client.is_over(now));
            if ready.is_asked {
                self.accept();
            }
        }
    }

    /// Waits until something can be done, or it is time to give a connection up.
    fn wait(&self) -> Ready {
        let now = Instant::now();
        let deadlines = self.clients.iter().map(|client| client.deadline);
        // One more is looked for once the first may lose its place to it.
        let place_at = self.place_free_at().filter(|at| *at > now);
        let page_until = self.page.as_ref().map(|page| page.until);
        let until = deadlines.chain(place_at).chain(page_until).min();
        let timeout = until.map_or(PollTimeout::NONE, |until| {
            // Not before the time is up.
            let left = until.saturating_duration_since(now) + Duration::from_millis(1);
            PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
        });
        let listens = match place_at {
            Some(_) => PollFlags::empty(),
            None => PollFlags::POLLIN,
        };
        let mut fds = vec![
            PollFd::new(self.stopped.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.listener.as_fd(), listens),
        ];
        let clients = self.clients.iter();
        fds.extend(clients.map(|client| PollFd::new(client.as_fd(), client.interest())));
        // If it fails, nothing is ready, and the next one may not fail.
        let count = poll(&mut fds, timeout).unwrap_or(0);
        let mut ready = fds.iter().map(|fd| count > 0 && fd.any().unwrap_or(false));
        Ready {
            is_stopped: ready.next().unwrap_or(false),
            is_asked: ready.next().unwrap_or(false),
            clients: ready.collect(),
        }
    }

    /// When there is a place for one more; `None` if there is one.
    fn place_free_at(&self) -> Option<Instant> {
        let oldest = self.clients.first()?;
        (self.clients.len() >= CLIENTS_MAX).then_some(oldest.since + PLACE_TIME_MIN)
    }

    /// Takes one more, in the place of the one that has been there longest if all are taken.
    fn accept(&mut self) {
        let accepted = self.listener.socket.accept().and_then(|(stream, _)| {
            stream.set_nonblocking(true)?;
            Ok(stream)
        });
        match accepted {
            Ok(stream) => self.add(stream),
            // It has gone, or went to the process at the other end of a handoff.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => {
                tracing::debug!("cannot take a connection for metrics: {error}");
                std::thread::sleep(ACCEPT_PAUSE);
            }
        }
    }

    fn add(&mut self, stream: TcpStream) {
        if self.clients.len() >= CLIENTS_MAX {
            self.clients.remove(0);
        }
        self.clients.push(Client::new(stream));
    }
}

/// What can be done now.
struct Ready {
    is_stopped: bool,
    /// Somebody has connected.
    is_asked: bool,
    /// For each client, whether it can go on.
    clients: Vec<bool>,
}

/// The response to a request. `kept`: the numbers as they were last served.
fn respond(
    calls: &Sender<Call>,
    kept: &mut Option<MetricsPage>,
    page: Page,
    is_head: bool,
) -> Response {
    let response = match page {
        Page::Metrics => {
            metrics(calls, kept).map(|text| http::response(Status::Ok, CONTENT_TYPE, text, is_head))
        }
        Page::Health => ask(calls, Call::Readiness).map(|_| http::line(Status::Ok, "ok", is_head)),
        Page::Readiness => ask(calls, Call::Readiness).map(|readiness| match readiness {
            Ok(()) => http::line(Status::Ok, "ready", is_head),
            Err(reason) => http::line(Status::Unavailable, reason, is_head),
        }),
    };
    response.unwrap_or_else(|| no_answer(is_head))
}

/// The numbers that are `kept`, or new ones if these are too old.
fn metrics(calls: &Sender<Call>, kept: &mut Option<MetricsPage>) -> Option<Arc<str>> {
    let now = Instant::now();
    if kept.as_ref().is_none_or(|page| now >= page.until) {
        *kept = None;
        let snapshot = ask(calls, Call::Snapshot)?;
        *kept = Some(MetricsPage {
            text: to_text(*snapshot).ok()?.into(),
            until: now + PAGE_TIME_MAX,
        });
    }
    kept.as_ref().map(|page| Arc::clone(&page.text))
}

/// Has the control thread answer; `None` if it does not in time.
fn ask<T>(calls: &Sender<Call>, call: impl FnOnce(Sender<T>) -> Call) -> Option<T> {
    let deadline = Instant::now() + ANSWER_TIME_MAX;
    let (sender, answer) = bounded(1);
    calls.send_deadline(call(sender), deadline).ok()?;
    answer.recv_deadline(deadline).ok()
}

#[cfg(test)]
#[path = "server_tests.rs"]
mod tests;
