//! What the two processes say to each other: lines of JSON.

use std::io;
use std::time::Instant;

use ipnet::IpNet;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::control::codec::{Lines, is_end};
use crate::error::Error;

/// The new process has everything ready.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ready {
    /// The addresses that it is going to give the device, which does not have them.
    pub adds: Vec<IpNet>,
}

/// The old process has stopped.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Go {
    /// Always true.
    pub go: bool,
}

/// The new process carries the tunnel.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Taken {
    /// Always true.
    pub taken: bool,
}

/// The old process ends.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ended {
    /// Whether it was asked meanwhile to read the configuration file again.
    pub reload_due: bool,
}

/// In place of all that the old process says: it keeps the tunnel.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kept {
    /// Always false, as in all refusals on the control socket.
    pub ok: bool,
    /// Why.
    pub error: String,
}

impl Kept {
    pub(super) fn because(error: &Error) -> Self {
        Self {
            ok: false,
            error: error.to_string(),
        }
    }
}

pub(super) fn say(
    lines: &mut Lines,
    message: &impl Serialize,
    deadline: Instant,
) -> io::Result<()> {
    lines.send(serde_json::to_vec(message)?, deadline)
}

/// The other side's next message.
///
/// # Errors
/// `UnexpectedEof` if it has ended without a word; what it says if it keeps the tunnel.
pub(super) fn hear<T: DeserializeOwned>(lines: &mut Lines, deadline: Instant) -> io::Result<T> {
    let line = lines.receive(deadline)?;
    let line = line.ok_or(io::ErrorKind::UnexpectedEof)?;
    serde_json::from_slice(&line).map_err(|error| match serde_json::from_slice(&line) {
        Ok(Kept { error, .. }) => io::Error::other(error),
        Err(_) => io::Error::new(io::ErrorKind::InvalidData, error),
    })
}

/// What became of the other side.
pub(super) fn in_words(error: io::Error) -> io::Error {
    match error.kind() {
        _ if is_end(&error) => io::Error::other("it has closed the connection"),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
            io::Error::other("it does not answer")
        }
        _ => error,
    }
}
