//! The new process's side: it asks for the tunnel, makes everything ready, and
//! takes it.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use socket2::Socket;

use super::PROTOCOL;
use super::wire::{self, Go, Ready, Taken, failure};
use crate::config::Config;
use crate::control::client;
use crate::control::codec::{Lines, is_end};
use crate::control::metrics::Listener;
use crate::control::protocol::Request;
use crate::control::server::Server;
use crate::daemon::announce;
use crate::daemon::manifest::Manifest;
use crate::daemon::metrics;
use crate::daemon::registry::Registry;
use crate::daemon::reload::reload;
use crate::daemon::start::{self, Begun};
use crate::daemon::tunnel::Tunnel;
use crate::daemon::workers::Claimed;
use crate::error::{Error, Result};
use crate::io::tun::{Queue, Tun};
use crate::io::udp::{self, UdpOffloads, WorkerSockets};
use crate::packet::coalesce::TunOffloads;
use crate::wireguard::PeerTimestamps;

/// How long this process waits for the manifest.
const MANIFEST_TIME_MAX: Duration = Duration::from_secs(10);

/// How often, and after which pause, a process that has closed the connection is asked
/// again: a killed one may still let connections in for a moment.
const RETRIES_MAX: u32 = 20;
const RETRY_PAUSE: Duration = Duration::from_millis(50);

/// How long this process waits for the old one to stop: its reconciler of routes may
/// be at a large table, and its workers at what they hold.
const STOP_TIME_MAX: Duration = Duration::from_secs(30);

/// How long this process, which carries the tunnel by then, waits for the old one's
/// end.
const END_TIME_MAX: Duration = Duration::from_secs(5);

/// Longest manifest: a million prefixes.
const MANIFEST_BYTES_MAX: usize = 128 << 20;

/// What a new process gets.
pub struct Inherited {
    /// What it is.
    pub manifest: Manifest,
    /// The device, and the workers' sockets.
    pub(super) claimed: Claimed,
    /// The control socket, if there is one.
    pub listener: Option<OwnedFd>,
    /// Where metrics are served, if they are.
    pub(super) metrics: Option<Listener>,
    /// The old process, which still runs.
    pub(super) old: OldProcess,
}

/// The process that runs the tunnel.
pub(super) struct OldProcess(pub Lines);

impl OldProcess {
    /// Tells the old process that everything is ready, waits until it has stopped or
    /// died, and tells it that the tunnel is this process's now. Returns how far handshakes had
    /// come, if it has said so.
    ///
    /// # Errors
    /// When it does not stop, or does not wait any longer; it then runs on.
    pub fn stop(&mut self) -> Result<Vec<PeerTimestamps>> {
        let lines = &mut self.0;
        let deadline = Instant::now() + STOP_TIME_MAX;
        // If it cannot be sent, the old process has died, or it has sent the reason before
        // it closed the connection.
        let _ = wire::send(lines, &Ready { ready: true }, deadline);
        let mut answer = wire::receive_or_close(lines, deadline);
        if answer.is_ok() && wire::send(lines, &Taken { taken: true }, deadline).is_err() {
            answer = wire::receive_or_close(lines, deadline);
        }
        match answer {
            Ok(Go { timestamps, .. }) => Ok(timestamps),
            Err(error) if is_end(&error) => {
                tracing::warn!("the old process has died; taking over what it had");
                Ok(Vec::new())
            }
            Err(error) => {
                let what = "the running process did not stop for the new one";
                Err(failure(what, error))
            }
        }
    }

    /// Waits until the old process has ended, but not too long.
    pub fn wait_for_end(mut self) {
        let _ = self.0.receive(Instant::now() + END_TIME_MAX);
    }
}

/// Asks the process behind the control socket at `path` to hand its tunnel over.
/// `None`: there is none, or none any more. `patience`: how long it may take to be let
/// in.
///
/// # Errors
/// When it refuses, does not speak this version, or is somebody else's.
pub fn ask(path: &Path, patience: Duration) -> Result<Option<Inherited>> {
    use io::ErrorKind::{ConnectionRefused, NotFound};
    let mut retries = 0;
    loop {
        let stream = match client::connect_trusted(path, patience) {
            Ok(stream) => stream,
            Err(error) if matches!(error.kind(), NotFound | ConnectionRefused) => {
                tracing::info!("there is no running process to take over from");
                return Ok(None);
            }
            Err(error) => {
                let what = format!("cannot take over from the process at {}", path.display());
                return Err(failure(&what, error)
                    .hint("--control names another, or start without --takeover"));
            }
        };
        match receive(stream) {
            Ok(inherited) => return Ok(Some(inherited)),
            Err(error) if is_end(&error) && retries < RETRIES_MAX => {
                retries += 1;
                std::thread::sleep(RETRY_PAUSE);
            }
            Err(error) => return Err(failure("the running process does not hand over", error)),
        }
    }
}

/// Asks for the tunnel on a connection that is open already.
///
/// # Errors
/// What the old process refuses with, or that it is not a process of ours.
#[doc(hidden)]
pub fn receive(stream: UnixStream) -> io::Result<Inherited> {
    let deadline = Instant::now() + MANIFEST_TIME_MAX;
    let mut lines = Lines::with_descriptors(stream, MANIFEST_BYTES_MAX);
    let protocol = PROTOCOL;
    wire::send(&mut lines, &Request::Takeover { protocol }, deadline)?;
    let manifest: Manifest = wire::receive(&mut lines, deadline)?;
    // An old process that has given this one up meanwhile may have had no room to tell.
    if Instant::now() > deadline {
        return Err(io::ErrorKind::TimedOut.into());
    }
    let mut descriptors = lines.take_descriptors().into_iter();
    let (mut queues, mut sockets) = (Vec::new(), Vec::new());
    for has_own_port in &manifest.own_ports {
        let mut next = || descriptors.next().ok_or(io::ErrorKind::InvalidData);
        queues.push(Queue::from(next()?));
        let receive = Socket::from(next()?);
        let send = has_own_port.then(next).transpose()?.map(Socket::from);
        sockets.push(WorkerSockets::new(receive, send));
    }
    if queues.is_empty() {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let handshake = manifest.is_encrypted.then(|| {
        let next = descriptors.next().ok_or(io::ErrorKind::InvalidData);
        next.map(Socket::from)
    });
    let handshake = handshake.transpose()?;
    let metrics = manifest.metrics.and_then(|address| {
        // The last one, so that a process that does not know of it takes it for nothing.
        let socket = descriptors.next_back()?;
        Some(Listener::inherited(socket, address))
    });
    let [tcp, udp] = manifest.tun_offloads;
    let [segment, gro] = manifest.udp_offloads;
    Ok(Inherited {
        claimed: Claimed {
            device: Tun {
                queues,
                offloads: TunOffloads { tcp, udp },
                steered: manifest.is_steered,
            },
            sockets: udp::Sockets {
                workers: sockets,
                handshake,
                offloads: UdpOffloads { segment, gro },
            },
        },
        listener: descriptors.next(),
        metrics,
        old: OldProcess(lines),
        manifest,
    })
}

/// Takes a tunnel over. What is likely to fail fails while the old process still
/// carries the tunnel, and changes nothing that it relies on.
///
/// # Errors
/// When the old process carries on.
pub fn take_over(
    mut config: Config,
    registry: Option<Registry>,
    inherited: Inherited,
) -> Result<Begun> {
    let Inherited {
        mut manifest,
        claimed,
        listener,
        metrics: old_metrics,
        mut old,
    } = inherited;
    manifest.check_kind(&config)?;
    manifest.keep_offloads(&mut config);
    manifest.keep_changes(&mut config);
    manifest.use_secret(&config);
    let prepared = start::prepare(config, Some(&manifest), None, |config, settings, _| {
        manifest.check(config, settings)?;
        Ok(claimed)
    });
    let mut tunnel = prepared?.into_tunnel()?;
    tunnel.enter_registry(registry)?;
    let metrics = metrics::listen(&tunnel.config, old_metrics)?;
    let timestamps = old.stop()?;
    if let Some(encryption) = &mut tunnel.encryption {
        encryption.timestamps = timestamps;
    }
    let control = carry_on(&mut tunnel, &manifest.addresses, listener);
    tracing::info!(
        old_process = manifest.pid,
        old_version = manifest.version,
        "took over from process {}, fastvpn {}",
        manifest.pid,
        manifest.version
    );
    // Until then a SIGHUP may have reached the old process.
    old.wait_for_end();
    if has_other_file(&tunnel.config) {
        // What came of it is in the log.
        let _ = reload(&mut tunnel, "the takeover");
    }
    Ok(Begun {
        tunnel,
        control,
        uapi: None,
        // Whoever has connected meanwhile waits no longer: answers begin now.
        metrics: metrics.and_then(metrics::try_to_serve),
    })
}

/// From here on there is no way back: a step that fails is logged, and the next one is
/// taken. The control socket comes before the routes, so that operators can fix those.
fn carry_on(
    tunnel: &mut Tunnel,
    old_addresses: &[IpNet],
    listener: Option<OwnedFd>,
) -> Option<Server> {
    let log = |error: Error| tracing::error!(%error, "taken over, but not in full: {error}");
    tunnel.go_on().unwrap_or_else(log);
    if tunnel.config.interface.is_none() {
        tunnel.bring_up(old_addresses).unwrap_or_else(log);
    }
    let served = start::serve_control(&tunnel.config, listener);
    tunnel.host.routes_kept = tunnel.kernel_routes();
    tunnel.start_routes();
    tunnel.open_to_containers().unwrap_or_else(log);
    tunnel.poll();
    announce::announce(tunnel);
    served.unwrap_or_else(|error| {
        log(error);
        None
    })
}

/// Whether the configuration file says something else than when it was read.
pub(super) fn has_other_file(config: &Config) -> bool {
    let is_same = |mut new: Config| {
        // The offloads are the old process's.
        new.without.clone_from(&config.without);
        new.keep_changes_of_wg(config);
        new == *config
    };
    config.file().is_some() && !config.reread().is_ok_and(is_same)
}
