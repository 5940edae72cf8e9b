//! A connection to a running tunnel's control socket.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde::de::DeserializeOwned;
use socket2::{Domain, SockAddr, Socket, Type};

use super::codec::{Lines, is_end};
use super::credentials::Asker;
use super::protocol::{ANSWER_BYTES_MAX, Request, Status};
use super::text::printable;
use crate::error::{Error, Result};

/// See the module's documentation.
pub(crate) struct Connection {
    lines: Lines,
    path: PathBuf,
    patience: Duration,
}

impl Connection {
    /// Connects to the socket at `path`. `patience`: how long that may take, and
    /// each [`Self::ask`].
    ///
    /// # Errors
    /// When nobody listens there, or this user may not ask.
    pub(crate) fn open(path: &Path, patience: Duration) -> Result<Self> {
        let stream = connect(path, patience).map_err(|error| refused(path, error))?;
        Ok(Self::over(stream, path, patience))
    }

    /// A connection that is open already.
    pub(crate) fn over(stream: UnixStream, path: &Path, patience: Duration) -> Self {
        Self {
            lines: Lines::new(stream, ANSWER_BYTES_MAX),
            path: path.to_path_buf(),
            patience,
        }
    }

    /// Sends a request and reads the answer, without its line feed.
    ///
    /// # Errors
    /// When there is no answer, or none of a bounded length in a bounded time.
    pub(crate) fn ask(&mut self, request: &Request) -> Result<String> {
        self.exchange(request).map_err(|error| {
            let what = format!(
                "no whole answer from the fastvpn at {}",
                self.path.display()
            );
            Error::os(what, error).hint("it may be busy or ending; its log may say more")
        })
    }

    fn exchange(&mut self, request: &Request) -> io::Result<String> {
        let deadline = Instant::now() + self.patience;
        match self.lines.send(serde_json::to_vec(request)?, deadline) {
            // A server that does not want the request may have said why before it
            // closed.
            Err(error) if !is_end(&error) => return Err(error),
            _ => {}
        }
        let line = self.lines.receive(deadline)?;
        let mut line = line.ok_or(io::ErrorKind::UnexpectedEof)?;
        String::from_utf8(std::mem::take(&mut line)).map_err(io::Error::other)
    }

    /// Waits until the process at the other end has closed this connection: the last
    /// thing that an ending tunnel does.
    ///
    /// # Errors
    /// When that takes longer than `patience`.
    pub(crate) fn wait_for_end(mut self, patience: Duration) -> Result<()> {
        if self.is_closed_by(Instant::now() + patience) {
            return Ok(());
        }
        let what = format!("the fastvpn at {} has not ended", self.path.display());
        Err(Error::os(what, io::ErrorKind::TimedOut.into()).hint("its log may say why"))
    }

    /// Waits until the other end has closed this connection, or until `deadline`. Whether
    /// it has.
    pub(crate) fn is_closed_by(&mut self, deadline: Instant) -> bool {
        // Reset is an end, too.
        let received = self.lines.receive(deadline);
        !received.is_err_and(|error| error.kind() == io::ErrorKind::TimedOut)
    }
}

/// Why nobody at `path` can be asked.
pub(crate) fn refused(path: &Path, error: io::Error) -> Error {
    let hint = match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
            "is it running? --tun names another"
        }
        io::ErrorKind::PermissionDenied => "run as root, or as the user it runs as",
        // The backlog is full.
        io::ErrorKind::WouldBlock => "it takes no connections: try again later",
        _ => "--control names another path",
    };
    Error::os(format!("no fastvpn answers at {}", path.display()), error).hint(hint)
}

/// Connects, and bounds how long that may take.
pub(super) fn connect(path: &Path, patience: Duration) -> io::Result<UnixStream> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    // unix(7) waits as long as SO_SNDTIMEO says while the backlog is full.
    socket.set_write_timeout(Some(patience))?;
    socket.connect(&SockAddr::unix(path)?)?;
    Ok(UnixStream::from(OwnedFd::from(socket)))
}

/// Connects to the control socket at `path` if root or this user listens there.
///
/// # Errors
/// `PermissionDenied` if somebody else does.
pub(crate) fn connect_trusted(path: &Path, patience: Duration) -> io::Result<UnixStream> {
    let stream = connect(path, patience)?;
    let listener = Asker::of(&stream)?;
    if listener.is_trusted() {
        return Ok(stream);
    }
    let text = format!(
        "it runs as user {}, neither root nor this user",
        listener.uid
    );
    Err(io::Error::new(io::ErrorKind::PermissionDenied, text))
}

/// The tunnel behind the control socket at `path`, in numbers.
///
/// # Errors
/// As [`ask`].
pub(crate) fn status(path: &Path, patience: Duration) -> Result<Status> {
    ask(path, patience, &Request::Status {})
}

/// What the tunnel behind the control socket at `path` answers to a request.
///
/// # Errors
/// When no tunnel answers, when it refuses, and when neither root nor this user listens there.
pub(crate) fn ask<T: DeserializeOwned>(
    path: &Path,
    patience: Duration,
    request: &Request,
) -> Result<T> {
    let stream = connect_trusted(path, patience).map_err(|error| refused(path, error))?;
    let line = Connection::over(stream, path, patience).ask(request)?;
    parse::<Verdict>(&line, path)?.check()?;
    parse(&line, path)
}

/// What all answers have. Other fields are ignored: a newer tunnel may have more.
#[derive(Deserialize)]
pub(crate) struct Verdict {
    pub(crate) ok: bool,
    pub(crate) error: Option<String>,
}

impl Verdict {
    /// Refusals are errors.
    pub(crate) fn check(&self) -> Result<()> {
        let reason = self.error.as_deref();
        let reason = reason.unwrap_or("the tunnel refuses, and does not say why");
        match self.ok {
            true => Ok(()),
            false => Err(Error::new(printable(reason))),
        }
    }
}

/// Reads an answer, or a part of it.
pub(crate) fn parse<T: DeserializeOwned>(line: &str, path: &Path) -> Result<T> {
    serde_json::from_str(line).map_err(|error| {
        let shown = path.display();
        Error::new(format!(
            "cannot understand the answer at {shown}: {}",
            printable(&error.to_string())
        ))
        .hint("is that a fastvpn of this version?")
    })
}
