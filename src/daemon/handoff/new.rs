//! The new process's side: it asks for the tunnel, makes everything ready, and
//! takes it.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use serde::Serialize;
use socket2::Socket;

use super::manifest::Manifest;
use super::wire::{Ended, Go, Ready, Taken, hear, in_words, say};
use super::{PATIENCE, PROTOCOL};
use crate::control::client;
use crate::control::codec::{Lines, is_end};
use crate::control::protocol::Request;
use crate::daemon::announce;
use crate::daemon::control_socket::ControlSocket;
use crate::daemon::start::{Prepared, suspend_inside};
use crate::daemon::tunnel::Tunnel;
use crate::daemon::workers::Claimed;
use crate::error::{Error, Result};
use crate::host::link;
use crate::io::tun::{self, Queue, Tun};
use crate::io::udp::{self, WorkerSockets};
use crate::packet::coalesce;

/// How long this process waits for the old one to stop: its reconciler of routes may
/// be at a large table, and its workers at what they hold.
const STOP_TIME_MAX: Duration = Duration::from_secs(30);

/// How long this process, which carries the tunnel by then, waits for the old one's
/// last word.
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
    /// The old process, which still runs.
    pub old: OldProcess,
}

/// The process that runs the tunnel.
pub struct OldProcess {
    pub(super) lines: Lines,
}

impl OldProcess {
    /// Says that everything is ready, and returns when the old process has stopped or
    /// has died. `adds`: the addresses that the device will be given.
    ///
    /// # Errors
    /// When it does not stop; it then runs on.
    pub fn stop(&mut self, adds: &[IpNet]) -> Result<()> {
        let deadline = Instant::now() + STOP_TIME_MAX;
        let adds = adds.to_vec();
        self.say(&Ready { adds }, deadline)
            .and_then(|()| hear(&mut self.lines, deadline))
            .map(|Go { .. }| ())
            .or_else(|error| match is_end(&error) {
                true => {
                    tracing::warn!("the process that was to be taken over from has died; going on");
                    Ok(())
                }
                false => Err(kept(error)),
            })
    }

    /// Says that the tunnel is this process's from now on.
    ///
    /// # Errors
    /// When the old process has not waited any longer, and runs on.
    pub fn taken(&mut self) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        self.say(&Taken { taken: true }, deadline).map_err(kept)
    }

    /// Says something that only an old process that lives has to hear.
    fn say(&mut self, message: &impl Serialize, deadline: Instant) -> io::Result<()> {
        match say(&mut self.lines, message, deadline) {
            // It has died, or has said why it closed the connection.
            Err(error) if is_end(&error) => match hear(&mut self.lines, deadline) {
                Ok(Ended { .. }) => Ok(()),
                Err(error) if is_end(&error) => Ok(()),
                Err(error) => Err(error),
            },
            result => result,
        }
    }

    /// What the old process says last: whether it was asked for a reload meanwhile.
    pub fn last_word(mut self) -> bool {
        let ended = hear(&mut self.lines, Instant::now() + END_TIME_MAX);
        ended.is_ok_and(|Ended { reload_due }| reload_due)
    }
}

fn kept(error: io::Error) -> Error {
    let what = "the running process did not stop for the new one";
    Error::os(what, in_words(error))
}

/// Asks the process behind the control socket at `path` to hand its tunnel over.
/// `None`: there is none, or none any more.
///
/// # Errors
/// When it refuses, does not speak this version, or is somebody else's.
pub fn ask(path: &Path) -> Result<Option<Inherited>> {
    ask_within(path, PATIENCE)
}

/// [`ask`], with a bound on how long it takes to be let in.
pub(super) fn ask_within(path: &Path, patience: Duration) -> Result<Option<Inherited>> {
    match client::connect_trusted(path, patience) {
        Ok(stream) => receive_or_outlive(stream, path),
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
            ) =>
        {
            tracing::info!("there is no running process to take over from");
            Ok(None)
        }
        Err(error) => {
            let what = format!("cannot take over from the process at {}", path.display());
            Err(Error::os(what, in_words(error))
                .hint("--control names another, or start without --takeover"))
        }
    }
}

/// As [`receive`]; `None` if the old process died before it had sent everything: then
/// nobody serves the control socket at `path` any more.
pub(super) fn receive_or_outlive(stream: UnixStream, path: &Path) -> Result<Option<Inherited>> {
    match receive(stream) {
        Ok(inherited) => Ok(Some(inherited)),
        Err(error) if is_end(&error) && client::status(path, PATIENCE).is_err() => {
            tracing::warn!("the running process died before it handed over; starting afresh");
            Ok(None)
        }
        Err(error) => {
            let what = "the running process does not hand over";
            Err(Error::os(what, in_words(error)))
        }
    }
}

/// Asks for the tunnel on a connection that is open already.
///
/// # Errors
/// What the old process refuses with, or that it is none.
#[doc(hidden)]
pub fn receive(stream: UnixStream) -> io::Result<Inherited> {
    let deadline = Instant::now() + PATIENCE;
    let mut lines = Lines::with_descriptors(stream, MANIFEST_BYTES_MAX);
    let protocol = PROTOCOL;
    say(&mut lines, &Request::Takeover { protocol }, deadline)?;
    let manifest: Manifest = hear(&mut lines, deadline)?;
    // An old process that has given this one up meanwhile may have had no room to say so.
    if Instant::now() > deadline {
        return Err(io::ErrorKind::TimedOut.into());
    }
    let mut descriptors = lines.take_descriptors().into_iter();
    let (mut queues, mut sockets) = (Vec::new(), Vec::new());
    for has_own_port in &manifest.own_ports {
        let mut next = || descriptors.next().ok_or(io::ErrorKind::InvalidData);
        queues.push(Queue::from(next()?));
        sockets.push(WorkerSockets {
            receive: Socket::from(next()?),
            send: has_own_port.then(next).transpose()?.map(Socket::from),
        });
    }
    if queues.is_empty() {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let [tcp, udp] = manifest.tun_offloads;
    let [segment, gro] = manifest.udp_offloads;
    Ok(Inherited {
        claimed: Claimed {
            device: Tun {
                queues,
                offloads: coalesce::TunOffloads { tcp, udp },
                steered: manifest.is_steered,
            },
            sockets,
            udp: udp::UdpOffloads { segment, gro },
        },
        listener: descriptors.next(),
        old: OldProcess { lines },
        manifest,
    })
}

/// Takes a tunnel over. What is likely to fail fails while the old process still
/// carries the tunnel, and changes nothing that it relies on. Tells also whether a
/// reload is due.
///
/// # Errors
/// When the old process carries on.
pub fn take_over(
    mut prepared: Prepared,
    inherited: Inherited,
) -> Result<(Tunnel, ControlSocket, bool)> {
    let Inherited {
        manifest,
        claimed,
        listener,
        mut old,
    } = inherited;
    let plan = &mut prepared.plan;
    manifest.check(&plan.config, &plan.settings)?;
    manifest.keep_wanted(&mut plan.config);
    let mtu_bytes = plan.settings.link.mtu_bytes;
    manifest.add_to(&mut plan.overlay, mtu_bytes)?;
    prepared.resolve_now();
    let own = tun::index_of(claimed.device.queues[0].as_fd())?;
    prepared.device = own;
    if own.is_some() {
        prepared.check_routes()?;
    }
    let Prepared {
        mut plan,
        names,
        mut netlink,
        ..
    } = prepared;
    log_inside(&suspend_inside(&mut plan.overlay, &mut netlink, own));
    let mut tunnel = Tunnel::new(plan, names, netlink, claimed)?;
    let addresses = &tunnel.settings.link.addresses;
    let (index, netlink) = (tunnel.host.device.index, &mut tunnel.host.netlink);
    match index {
        Some(index) => {
            let adds = link::addresses_to_add(netlink, index, addresses)?;
            old.stop(&adds)?;
            link::add_addresses(netlink, index, &adds)?;
            old.taken()
                .inspect_err(|_| link::remove_addresses(netlink, index, &adds))?;
        }
        None => {
            old.stop(&[])?;
            old.taken()?;
        }
    }
    let control = go_on(&mut tunnel, &manifest.addresses, listener);
    tracing::info!(
        "took over from process {}, fastvpn {}",
        manifest.pid,
        manifest.version
    );
    Ok((tunnel, control, old.last_word()))
}

/// There is nobody to go back to, and the tunnel carries, so each step is taken
/// whatever comes of the others. Operators before routes, which they can fix.
fn go_on(tunnel: &mut Tunnel, old_addresses: &[IpNet], listener: Option<OwnedFd>) -> ControlSocket {
    let mut control = ControlSocket::default();
    tunnel.workers.go();
    let brought_up = tunnel.bring_up(old_addresses);
    let served = control.open(&tunnel.config, listener);
    tunnel.host.routes_kept = tunnel.kernel_routes();
    tunnel.start_routes();
    tunnel.poll();
    for result in [brought_up, served] {
        if let Err(error) = result {
            tracing::error!("taken over, but not in full: {error}");
        }
    }
    announce::announce(tunnel);
    control
}

/// Tells of peers to whom nothing will be sent at first.
fn log_inside(inside: &[SocketAddr]) {
    let until = "through the tunnel itself: nothing is sent there until there is another";
    match inside {
        [] => {}
        [peer] => tracing::warn!("the way to peer {peer} leads {until}"),
        [peer, more @ ..] => {
            let more = more.len();
            tracing::warn!("the way to peer {peer} (and to {more} more) leads {until}");
        }
    }
}
