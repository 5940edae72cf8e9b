//! One connection: a request comes, its response goes, and the connection ends. Nothing here
//! waits; each step has a time after which the connection is given up.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use nix::poll::PollFlags;

use super::http::{self, Page, Parsed, REQUEST_BYTES_MAX, Response, Status};

/// How long a request may take to come.
const REQUEST_TIME_MAX: Duration = Duration::from_secs(2);

/// How long a client may take to read the response.
const RESPONSE_TIME_MAX: Duration = Duration::from_secs(5);

/// How long its end is waited for after that, and how much more it may have to say until then.
const END_TIME_MAX: Duration = Duration::from_secs(1);
const END_BYTES_MAX: usize = 64 << 10;

/// Where a connection is.
enum State {
    /// This has come of the request.
    Asking(Vec<u8>),
    /// The response, and how many bytes of it have been sent.
    Answered(Response, usize),
    /// All has been sent. To close a connection with unread bytes would make the kernel reset
    /// it, and the client could lose the response; so many more are read.
    Ending(usize),
    /// There is nothing more to do.
    Over,
}

/// See the module's documentation.
pub(super) struct Client {
    stream: TcpStream,
    state: State,
    /// When it has connected.
    pub(super) since: Instant,
    /// When it is given up.
    pub(super) deadline: Instant,
}

impl Client {
    /// One that has just connected, by a stream that does not block.
    pub(super) fn new(stream: TcpStream) -> Self {
        let since = Instant::now();
        Self {
            stream,
            state: State::Asking(Vec::new()),
            since,
            deadline: since + REQUEST_TIME_MAX,
        }
    }

    /// Whether the connection is to be closed.
    pub(super) fn is_over(&self, now: Instant) -> bool {
        matches!(self.state, State::Over) || now >= self.deadline
    }

    /// What it waits for.
    pub(super) fn interest(&self) -> PollFlags {
        match self.state {
            State::Answered(..) => PollFlags::POLLOUT,
            _ => PollFlags::POLLIN,
        }
    }

    /// Goes on as far as that is possible at once. `answer`: makes the response to a request;
    /// `true` for one without a body.
    pub(super) fn advance(&mut self, answer: impl FnOnce(Page, bool) -> Response) {
        let went = self.receive(answer).and_then(|()| self.send());
        let went = went.and_then(|()| self.end());
        if went.is_err_and(|error| error.kind() != io::ErrorKind::WouldBlock) {
            self.state = State::Over;
        }
    }

    fn receive(&mut self, answer: impl FnOnce(Page, bool) -> Response) -> io::Result<()> {
        let State::Asking(request) = &mut self.state else {
            return Ok(());
        };
        let mut chunk = [0; REQUEST_BYTES_MAX];
        let response = loop {
            let read = read(&mut self.stream, &mut chunk)?;
            request.extend_from_slice(chunk.get(..read).unwrap_or_default());
            match http::parse(request) {
                Parsed::Partial => {}
                Parsed::Request { page, is_head } => break answer(page, is_head),
                Parsed::Refused(status) => break http::refusal(status),
            }
        };
        self.state = State::Answered(response, 0);
        self.deadline = Instant::now() + RESPONSE_TIME_MAX;
        Ok(())
    }

    fn send(&mut self) -> io::Result<()> {
        let State::Answered(response, sent) = &mut self.state else {
            return Ok(());
        };
        loop {
            let rest = response.rest(*sent);
            if rest.iter().all(|part| part.is_empty()) {
                break;
            }
            match self.stream.write_vectored(&rest) {
                Ok(bytes) => *sent += bytes,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        self.stream.shutdown(Shutdown::Write)?;
        self.state = State::Ending(0);
        self.deadline = Instant::now() + END_TIME_MAX;
        Ok(())
    }

    fn end(&mut self) -> io::Result<()> {
        let State::Ending(bytes) = &mut self.state else {
            return Ok(());
        };
        let mut chunk = [0; 4 << 10];
        while *bytes < END_BYTES_MAX {
            *bytes += read(&mut self.stream, &mut chunk)?;
        }
        self.state = State::Over;
        Ok(())
    }
}

impl AsFd for Client {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

/// What has come: one byte or more.
///
/// # Errors
/// `WouldBlock` if nothing has; `UnexpectedEof` at the end.
fn read(stream: &mut TcpStream, into: &mut [u8]) -> io::Result<usize> {
    loop {
        match stream.read(into) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

/// What a client gets that asks when nobody answers.
pub(super) fn no_answer(is_head: bool) -> Response {
    let text = "the tunnel gives no answer: it is busy or ending";
    http::line(Status::Unavailable, text, is_head)
}
