//! The running process, as its successor sees it.

use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use ipnet::IpNet;
use serde::Deserialize;
use socket2::Socket;

use super::wire::{hear_or_end, receive_descriptors, say};
use super::{Manifest, PATIENCE, PROTOCOL, Step, in_words, is_end};
use crate::control::client;
use crate::error::{Error, Result};
use crate::io::tun::{Queue, Tun};
use crate::io::udp::reuseport::WORKERS_MAX;
use crate::io::udp::{self, WorkerSockets};
use crate::packet::coalesce;

/// How long the successor waits for the predecessor to stop: its keeper of
/// routes may be at a large table, and its workers at what they hold.
const STOP_TIME_MAX: Duration = Duration::from_secs(30);

/// Longest manifest: a million prefixes.
const MANIFEST_BYTES_MAX: u64 = 128 << 20;

/// What a successor gets.
pub struct Inherited {
    /// What it is.
    pub manifest: Manifest,
    /// The TUN queues.
    pub device: Tun,
    /// The workers' sockets.
    pub sockets: Vec<WorkerSockets>,
    /// Offloads of the sockets.
    pub udp: udp::UdpOffloads,
    /// The operators' socket, if there is one.
    pub listener: Option<OwnedFd>,
    /// The predecessor, which still runs.
    pub predecessor: Predecessor,
}

/// The running process, as its successor sees it.
pub struct Predecessor(pub(super) UnixStream);

impl Predecessor {
    /// Says which addresses the device is about to be given.
    ///
    /// # Errors
    /// When the predecessor has given this process up; it then runs on.
    pub fn will_add(&mut self, addresses: &[IpNet]) -> Result<()> {
        let line = serde_json::to_vec(addresses).map_err(|error| failed(error.into()))?;
        let line = [&line[..], b"\n"].concat();
        self.unless_it_died(|stream| stream.write_all(&line))
            .map_err(failed)
    }

    /// Does what only a predecessor that lives has to hear.
    fn unless_it_died(
        &mut self,
        say: impl FnOnce(&mut UnixStream) -> io::Result<()>,
    ) -> io::Result<()> {
        match say(&mut self.0) {
            Err(error) if is_end(&error) => hear_or_end(&self.0).map(drop),
            result => result,
        }
    }

    /// Lets the predecessor stop; returns when the tunnel is this process's,
    /// because the predecessor has left it or has died. Tells whether a reload is
    /// due that it was asked for.
    ///
    /// # Errors
    /// When it does not stop; it then runs on.
    pub fn stop(mut self) -> Result<bool> {
        self.try_stop().map_err(|error| {
            let what = "the running process did not stop for its successor";
            Error::os(what, in_words(error))
        })
    }

    fn try_stop(&mut self) -> io::Result<bool> {
        self.unless_it_died(|stream| say(stream, Step::Go))?;
        self.0.set_read_timeout(Some(STOP_TIME_MAX))?;
        let is_reload_due = match hear_or_end(&self.0)? {
            Some(byte) if byte == Step::Done as u8 => false,
            Some(byte) if byte == Step::DoneReloadDue as u8 => true,
            Some(_) => return Err(io::ErrorKind::InvalidData.into()),
            None => {
                tracing::warn!("the process that was to be taken over from has died; going on");
                return Ok(false);
            }
        };
        // It may have died since, or not have waited any longer.
        self.unless_it_died(|stream| say(stream, Step::Taken))?;
        Ok(is_reload_due)
    }
}

/// Asks the process behind the operators' socket at `path` to hand its tunnel
/// over. `None`: there is none, or none any more.
///
/// # Errors
/// When it refuses, does not speak this version, or is somebody else's.
pub fn ask(path: &Path) -> Result<Option<Inherited>> {
    ask_within(path, PATIENCE)
}

/// [`ask`], with a bound on how long it takes to be let in.
pub(super) fn ask_within(path: &Path, patience: Duration) -> Result<Option<Inherited>> {
    let stream = match client::connect_trusted(path, patience) {
        Ok(stream) => stream,
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
            ) =>
        {
            tracing::info!("there is no running process to take over from");
            return Ok(None);
        }
        Err(error) => {
            let what = format!("cannot take over from the process at {}", path.display());
            return Err(Error::os(what, in_words(error))
                .hint("--control names another, or start without --takeover"));
        }
    };
    receive_or_outlive(stream)
}

/// As [`receive`]; `None` if the predecessor died before it had sent everything.
pub(super) fn receive_or_outlive(stream: UnixStream) -> Result<Option<Inherited>> {
    match receive(stream) {
        Err(error) if error.cause().is_some_and(is_end) => {
            tracing::warn!("the running process died before it handed over; starting afresh");
            Ok(None)
        }
        result => result.map(Some),
    }
}

fn failed(error: io::Error) -> Error {
    let what = "cannot take over from the running process";
    match is_end(&error) {
        true => Error::os(what, error),
        false => Error::os(what, in_words(error)),
    }
}

/// As [`ask`], on a connection that is open already.
///
/// # Errors
/// As [`ask`].
pub fn receive(mut stream: UnixStream) -> Result<Inherited> {
    let bounded = |stream: &UnixStream| {
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))
    };
    bounded(&stream).map_err(failed)?;
    let request = format!("{{\"command\":\"takeover\",\"protocol\":{PROTOCOL}}}\n");
    stream.write_all(request.as_bytes()).map_err(failed)?;
    let manifest = read_manifest(&mut stream)?;
    say(&stream, Step::Ready).map_err(failed)?;
    let mut queues = Vec::new();
    let mut sockets = Vec::new();
    for _ in 0..manifest.workers {
        let mut descriptors = receive_descriptors(&stream).map_err(failed)?.into_iter();
        let (Some(queue), Some(receive)) = (descriptors.next(), descriptors.next()) else {
            return Err(failed(io::ErrorKind::InvalidData.into()));
        };
        queues.push(Queue::from(queue));
        sockets.push(WorkerSockets {
            receive: Socket::from(receive),
            send: descriptors.next().map(Socket::from),
        });
    }
    let listener = receive_descriptors(&stream)
        .map_err(failed)?
        .into_iter()
        .next();
    let [tcp, udp] = manifest.tun_offloads;
    let [segment, gro] = manifest.udp_offloads;
    Ok(Inherited {
        device: Tun {
            queues,
            offloads: coalesce::TunOffloads { tcp, udp },
            steered: manifest.is_steered,
        },
        sockets,
        udp: udp::UdpOffloads { segment, gro },
        listener,
        predecessor: Predecessor(stream),
        manifest,
    })
}

/// The line that the predecessor answers with. Byte by byte would do, but it
/// may be long; nothing follows it before we have answered.
fn read_manifest(stream: &mut UnixStream) -> Result<Manifest> {
    /// What any answer has, good or bad.
    #[derive(Deserialize)]
    struct Refusal {
        error: String,
    }
    let mut line = Vec::new();
    let mut chunk = [0; 4096];
    while line.last() != Some(&b'\n') {
        match stream.read(&mut chunk) {
            Ok(0) => return Err(failed(io::ErrorKind::UnexpectedEof.into())),
            Ok(bytes) => line.extend_from_slice(&chunk[..bytes]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(failed(error)),
        }
        if line.len() as u64 > MANIFEST_BYTES_MAX {
            return Err(failed(io::ErrorKind::InvalidData.into()));
        }
    }
    if let Ok(refusal) = serde_json::from_slice::<Refusal>(&line) {
        return Err(Error::new(format!(
            "the running process does not hand over: {}",
            refusal.error
        )));
    }
    let manifest: Manifest = serde_json::from_slice(&line)
        .map_err(|error| failed(io::Error::new(io::ErrorKind::InvalidData, error)))?;
    if manifest.protocol != PROTOCOL || manifest.workers == 0 || manifest.workers > WORKERS_MAX {
        return Err(
            Error::new("cannot take over: the running process is of another version")
                .hint("stop it, and start fastvpn without --takeover"),
        );
    }
    Ok(manifest)
}
