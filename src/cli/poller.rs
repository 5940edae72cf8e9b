//! A tunnel that is asked again and again, and may be taken over meanwhile.

use std::io;
use std::path::PathBuf;
use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::control::client::Connection;
use crate::control::protocol::Request;
use crate::error::{Error, Result};

/// Between attempts to reach a process that listens, but closes the connection: it ends, or
/// another one takes over.
const RETRY_PAUSE: Duration = Duration::from_millis(50);

/// A control socket, with a connection while there is one.
pub(super) struct Poller {
    path: PathBuf,
    patience: Duration,
    connection: Option<Connection>,
}

impl Poller {
    /// Asks at `path`, and waits as long as `patience` for each answer.
    pub(super) fn new(path: PathBuf, patience: Duration) -> Self {
        Self {
            path,
            patience,
            connection: None,
        }
    }

    /// Sends a request, to whichever process has the socket now, and reads the answer.
    ///
    /// # Errors
    /// When nobody listens ([`is_gone`]), or nobody answers.
    pub(super) fn ask(&mut self, request: &Request) -> Result<String> {
        let deadline = Instant::now() + self.patience;
        loop {
            let mut connection = match self.connection.take() {
                Some(connection) => connection,
                None => Connection::open(&self.path, self.patience)?,
            };
            match connection.ask(request) {
                Ok(line) => {
                    self.connection = Some(connection);
                    return Ok(line);
                }
                Err(error) if Instant::now() >= deadline => return Err(error),
                Err(_) => sleep(RETRY_PAUSE),
            }
        }
    }

    /// Waits.
    ///
    /// # Errors
    /// At once when nobody listens any more.
    pub(super) fn wait(&mut self, until: Instant) -> Result<()> {
        while Instant::now() < until {
            let connection = match &mut self.connection {
                Some(connection) => connection,
                None => {
                    sleep(RETRY_PAUSE);
                    let connection = Connection::open(&self.path, self.patience)?;
                    self.connection.insert(connection)
                }
            };
            // One that is not used is closed after a while.
            if connection.is_closed_by(until) {
                self.connection = None;
            }
        }
        Ok(())
    }
}

/// Whether an error says that there is no tunnel.
pub(super) fn is_gone(error: &Error) -> bool {
    let kind = error.cause().map(io::Error::kind);
    matches!(
        kind,
        Some(io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused)
    )
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Write};
    use std::os::unix::net::UnixListener;

    use super::*;

    /// Long enough not to matter.
    const PATIENT: Duration = Duration::from_secs(60);

    /// Answers one request on a connection of its own, and closes that.
    fn answer(listener: &UnixListener, text: &str) {
        let (mut stream, _) = listener.accept().unwrap();
        let mut line = String::new();
        BufReader::new(&stream).read_line(&mut line).unwrap();
        stream.write_all(text.as_bytes()).unwrap();
    }

    #[test]
    fn a_socket_that_changes_hands_goes_on_answering() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("test.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let server = std::thread::spawn(move || {
            answer(&listener, "one\n");
            // Closed without an answer.
            answer(&listener, "");
            answer(&listener, "two\n");
            let (stream, _) = listener.accept().unwrap();
            drop(stream);
        });
        let mut poller = Poller::new(path.clone(), PATIENT);
        assert_eq!(poller.ask(&Request::Status {}).unwrap(), "one");
        assert_eq!(poller.ask(&Request::Status {}).unwrap(), "two");
        // Not at the end of that time, but when the listener has gone.
        let error = poller.wait(Instant::now() + PATIENT).unwrap_err();
        server.join().unwrap();
        assert!(is_gone(&error), "{error}");
        assert!(is_gone(&poller.ask(&Request::Status {}).unwrap_err()));
        std::fs::remove_file(path).unwrap();
        assert!(is_gone(&poller.ask(&Request::Status {}).unwrap_err()));
    }

    #[test]
    fn a_wait_is_no_longer_than_asked_for() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("test.sock");
        let _listener = UnixListener::bind(&path).unwrap();
        let mut poller = Poller::new(path, PATIENT);
        let start = Instant::now();
        poller.wait(start + 2 * RETRY_PAUSE).unwrap();
        assert!(start.elapsed() >= 2 * RETRY_PAUSE && start.elapsed() < PATIENT);
    }
}
