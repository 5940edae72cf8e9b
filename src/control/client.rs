//! A connection to a running tunnel's operators' socket.

use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde::de::DeserializeOwned;
use socket2::{Domain, SockAddr, Socket, Type};

use super::protocol::{Peers, Request, Status};
use super::server::{Asker, REQUEST_BYTES_MAX};
use super::text::printable;
use crate::error::{Error, Result};

/// Longest answer that is read: several times what a tunnel with the most
/// prefixes it can have says.
pub(crate) const ANSWER_BYTES_MAX: usize = 256 << 20;

/// Pause between looks at whether a process has ended.
const END_PAUSE: Duration = Duration::from_millis(10);

/// See the module's documentation.
pub(crate) struct Connection {
    stream: UnixStream,
    path: PathBuf,
    /// Device and inode of the socket's name when it was connected to.
    inode: Option<(u64, u64)>,
    patience: Duration,
}

impl Connection {
    /// Connects to the socket at `path`. `patience`: how long each step may
    /// take, this one and those of [`Self::ask`].
    ///
    /// # Errors
    /// When nobody listens there, or this user may not ask.
    pub(crate) fn open(path: &Path, patience: Duration) -> Result<Self> {
        let inode = inode(path);
        let stream = connect(path, patience).map_err(|error| refused(path, error))?;
        Ok(Self {
            stream,
            path: path.to_path_buf(),
            inode,
            patience,
        })
    }

    /// A connection that is open already.
    #[cfg(test)]
    pub(crate) fn over(stream: UnixStream, patience: Duration) -> Self {
        Self {
            stream,
            path: PathBuf::new(),
            inode: None,
            patience,
        }
    }

    /// Makes sure that root or this user listens at the other end.
    ///
    /// # Errors
    /// When somebody else does.
    pub(crate) fn check_user(&self) -> Result<()> {
        check_user(&self.stream).map_err(|error| refused(&self.path, error))
    }

    /// Sends a request, a line, and reads the answer, without its line end.
    ///
    /// # Errors
    /// When there is no answer, or none of a bounded length in a bounded time.
    pub(crate) fn ask(&mut self, request: &[u8]) -> Result<String> {
        let sent = self.send(request);
        match sent.and_then(|()| self.receive()) {
            Ok(line) => String::from_utf8(line).map_err(|_| {
                Error::new(format!("{} with bytes that are no UTF-8", self.answered()))
            }),
            Err(error) => Err(self.failed(error)),
        }
    }

    fn answered(&self) -> String {
        format!("what listens at {} answered", self.path.display())
    }

    fn failed(&self, error: io::Error) -> Error {
        let shown = self.path.display();
        let seconds = self.patience.as_secs();
        match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Error::new(format!(
                "the fastvpn at {shown} gives no answer within {seconds} seconds"
            )),
            io::ErrorKind::UnexpectedEof
            | io::ErrorKind::BrokenPipe
            | io::ErrorKind::ConnectionReset => Error::new(format!(
                "the fastvpn at {shown} closed the connection without a whole answer"
            ))
            .hint("it may be ending; its log may say more"),
            io::ErrorKind::FileTooLarge => Error::new(format!(
                "{} with more than {ANSWER_BYTES_MAX} bytes",
                self.answered()
            )),
            _ => Error::os(format!("cannot talk to the fastvpn at {shown}"), error),
        }
    }

    fn send(&mut self, request: &[u8]) -> io::Result<()> {
        match self.stream.write_all(request) {
            // Who does not want the request may have said why before it closed.
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset
                ) =>
            {
                Ok(())
            }
            result => result,
        }
    }

    fn receive(&mut self) -> io::Result<Vec<u8>> {
        let mut line = Vec::new();
        let mut chunk = vec![0; 64 << 10];
        let mut deadline = Instant::now() + self.patience;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            self.stream.set_read_timeout(Some(left))?;
            let bytes = match self.stream.read(&mut chunk) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(bytes) => bytes,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            if line.is_empty() {
                // It took its time to think; now it has as much to talk.
                deadline = Instant::now() + self.patience;
            }
            let end = chunk[..bytes].iter().position(|byte| *byte == b'\n');
            line.extend_from_slice(&chunk[..end.unwrap_or(bytes)]);
            if line.len() > ANSWER_BYTES_MAX {
                return Err(io::ErrorKind::FileTooLarge.into());
            }
            if end.is_some() {
                return Ok(line);
            }
        }
    }

    /// Waits until the process at the other end has closed this connection, and
    /// its socket is gone or dead: the last things that an ending tunnel sees to.
    ///
    /// # Errors
    /// When that takes longer than `patience`.
    pub(crate) fn wait_for_end(mut self, patience: Duration) -> Result<()> {
        let deadline = Instant::now() + patience;
        self.wait_for_close(deadline);
        while self.is_served() {
            if Instant::now() >= deadline {
                return Err(Error::new(format!(
                    "the fastvpn at {} was told to stop, but has not ended within {} seconds",
                    self.path.display(),
                    patience.as_secs()
                ))
                .hint("its log may say why"));
            }
            std::thread::sleep(END_PAUSE);
        }
        Ok(())
    }

    /// Reads to the end, or to the deadline.
    fn wait_for_close(&mut self, deadline: Instant) {
        let mut chunk = [0; 4096];
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || self.stream.set_read_timeout(Some(left)).is_err() {
                return;
            }
            match self.stream.read(&mut chunk) {
                Ok(1..) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // Reset is an end, too.
                Ok(0) | Err(_) => return,
            }
        }
    }

    /// Whether someone still listens at the socket that was connected to.
    fn is_served(&self) -> bool {
        let now = inode(&self.path);
        if now.is_none() || now != self.inode {
            // Nothing is there, or a successor's.
            return false;
        }
        // Killed processes leave the name behind. Connections that nobody takes
        // fill the backlog, which then says that there is someone.
        !matches!(
            connect(&self.path, END_PAUSE),
            Err(error) if matches!(
                error.kind(),
                io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound
            )
        )
    }
}

/// Why nobody at `path` can be asked.
pub(crate) fn refused(path: &Path, error: io::Error) -> Error {
    let what = format!("no fastvpn answers at {}", path.display());
    match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
            Error::os(what, error).hint("is it running? --tun names another")
        }
        io::ErrorKind::PermissionDenied => {
            let what = format!("cannot ask the fastvpn at {}", path.display());
            Error::os(what, error).hint("run as root, or as the user it runs as")
        }
        // The backlog is full: connect(2) waited for as long as SO_SNDTIMEO says.
        io::ErrorKind::WouldBlock => {
            Error::new(format!("{what}: it takes no connections")).hint("try again later")
        }
        _ => Error::os(what, error).hint("--control names another path"),
    }
}

/// Connects, and bounds how long this and later writes may take.
pub(crate) fn connect(path: &Path, patience: Duration) -> io::Result<UnixStream> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    // unix(7) waits as long as SO_SNDTIMEO says while the backlog is full.
    socket.set_write_timeout(Some(patience))?;
    socket.connect(&SockAddr::unix(path)?)?;
    Ok(UnixStream::from(OwnedFd::from(socket)))
}

/// See [`Connection::check_user`].
pub(crate) fn check_user(stream: &UnixStream) -> io::Result<()> {
    let listener = Asker::of(stream)?;
    if listener.is_trusted() {
        return Ok(());
    }
    let text = format!(
        "it runs as user {}, neither root nor this user",
        listener.uid
    );
    Err(io::Error::new(io::ErrorKind::PermissionDenied, text))
}

fn inode(path: &Path) -> Option<(u64, u64)> {
    let metadata = fs::metadata(path).ok()?;
    Some((metadata.dev(), metadata.ino()))
}

/// Connects to the control socket at `path` if root or this user listens there, and
/// bounds how long that and later writes may take.
pub(crate) fn connect_trusted(path: &Path, patience: Duration) -> io::Result<UnixStream> {
    let stream = connect(path, patience)?;
    check_user(&stream)?;
    Ok(stream)
}

/// The peers of the tunnel behind the control socket at `path`.
///
/// # Errors
/// When no tunnel answers, when it refuses, and when neither root nor this user listens there.
pub(crate) fn peers(path: &Path, patience: Duration) -> Result<Peers> {
    answer(&Request::Peers {}, path, patience)
}

/// The tunnel behind the control socket at `path`, in numbers.
///
/// # Errors
/// As [`peers`].
pub(crate) fn status(path: &Path, patience: Duration) -> Result<Status> {
    answer(&Request::Status {}, path, patience)
}

fn answer<T: DeserializeOwned>(request: &Request, path: &Path, patience: Duration) -> Result<T> {
    let mut connection = Connection::open(path, patience)?;
    connection.check_user()?;
    let line = connection.ask(&encode(request)?)?;
    parse::<Verdict>(&line, path)?.check()?;
    parse(&line, path)
}

/// What all answers have. Other fields are for whoever knows them: a newer
/// tunnel may say more.
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

/// A request as a line.
pub(crate) fn encode(request: &Request) -> Result<Vec<u8>> {
    let mut line = serde_json::to_vec(request)
        .map_err(|error| Error::os("cannot write the request", error.into()))?;
    if line.len() > REQUEST_BYTES_MAX {
        return Err(Error::new(format!(
            "the request is longer than the {REQUEST_BYTES_MAX} bytes that a tunnel reads"
        ))
        .hint("ask for less at a time, or use the configuration file"));
    }
    line.push(b'\n');
    Ok(line)
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
