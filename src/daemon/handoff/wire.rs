//! The messages between the two processes: lines of JSON.

use std::io;
use std::net::Shutdown;
use std::time::Instant;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::control::codec::{Lines, is_end, to_line};
use crate::error::Error;
use crate::wireguard::PeerTimestamps;

/// The new process has everything ready.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ready {
    /// Always true.
    pub ready: bool,
}

/// The old process has stopped: the new one may have the tunnel.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Go {
    /// Always true.
    pub go: bool,
    /// How far the handshakes have come with which peer.
    #[serde(default)]
    pub timestamps: Vec<PeerTimestamps>,
}

/// The new process carries the tunnel from now on.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Taken {
    /// Always true.
    pub taken: bool,
}

/// Instead of any other answer: the old process keeps the tunnel.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kept {
    /// Always false, as in all refusals on the control socket.
    pub ok: bool,
    /// Why.
    pub error: String,
}

pub(super) fn send(
    lines: &mut Lines,
    message: &impl Serialize,
    deadline: Instant,
) -> io::Result<()> {
    lines.send(to_line(message)?, deadline)
}

/// Tells the new process that this one keeps the tunnel.
pub(super) fn keep(lines: &mut Lines, reason: &Error) {
    let (ok, error) = (false, reason.to_string());
    // It fits a fresh connection's buffer.
    let _ = send(lines, &Kept { ok, error }, Instant::now());
}

/// The other side's next message.
///
/// # Errors
/// `UnexpectedEof` if the other side has closed the connection; the reason if it keeps
/// the tunnel.
pub(super) fn receive<T: DeserializeOwned>(lines: &mut Lines, deadline: Instant) -> io::Result<T> {
    let line = lines.receive(deadline)?;
    let line = line.ok_or(io::ErrorKind::UnexpectedEof)?;
    serde_json::from_slice(&line).map_err(|error| match serde_json::from_slice(&line) {
        Ok(Kept { error, .. }) => io::Error::other(error),
        Err(_) => io::Error::new(io::ErrorKind::InvalidData, error),
    })
}

/// The other side's next message. If this fails, the other side cannot send it any more:
/// it fails there, too.
///
/// # Errors
/// As [`receive`].
pub(super) fn receive_or_close<T: DeserializeOwned>(
    lines: &mut Lines,
    deadline: Instant,
) -> io::Result<T> {
    receive(lines, deadline).or_else(|error| {
        let _ = lines.stream().shutdown(Shutdown::Read);
        // What it sent before counts.
        receive(lines, Instant::now()).map_err(|_| error)
    })
}

/// `what` failed because of the other side.
pub(super) fn failure(what: &str, error: io::Error) -> Error {
    let error = match error.kind() {
        _ if is_end(&error) => io::Error::other("it has closed the connection"),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
            io::Error::other("it does not answer")
        }
        _ => error,
    };
    Error::os(what, error)
}
