//! The predecessor's side of a takeover ([`super::takeover`]).
//!
//! A thread of its own serves the successor until that is ready, so that the
//! control thread goes on with what it does. Only changes that the successor
//! would miss wait: operators', and reloads.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;

use crossbeam_channel::{Receiver, bounded};
use ipnet::IpNet;
use socket2::{SockRef, Socket};

use super::running::{End, Running};
use super::takeover::{Manifest, PROTOCOL, RuntimePeer, Successor, WorkerDescriptors};
use crate::control::credentials::Asker;
use crate::error::{Error, Result};
use crate::host::link;
use crate::io::engine::Port;
use crate::io::tun::Queue;
use crate::io::udp::WorkerSockets;
use crate::packet::probe::Probe;
use crate::routing::overlay::{Origin, Peer};

/// Descriptors of one worker, kept for a successor.
pub struct Kept {
    queue: OwnedFd,
    receive: OwnedFd,
    send: Option<OwnedFd>,
}

impl Kept {
    /// Its TUN queue.
    pub fn queue(&self) -> BorrowedFd<'_> {
        self.queue.as_fd()
    }

    /// Its socket to receive from.
    pub fn receive(&self) -> BorrowedFd<'_> {
        self.receive.as_fd()
    }

    /// What a worker needs, over again.
    fn of(
        queue: BorrowedFd<'_>,
        receive: BorrowedFd<'_>,
        send: Option<BorrowedFd<'_>>,
    ) -> io::Result<Self> {
        Ok(Self {
            queue: queue.try_clone_to_owned()?,
            receive: receive.try_clone_to_owned()?,
            send: send.map(|send| send.try_clone_to_owned()).transpose()?,
        })
    }

    /// The worker's own port, if it has one.
    pub fn own_port(&self) -> Option<u16> {
        let address = SockRef::from(self.send.as_ref()?).local_addr().ok()?;
        Some(address.as_socket()?.port())
    }

    /// Sends a probe. Whether it arrives is for the answer to tell.
    pub fn send(&self, from: Port, probe: Probe, to: SocketAddr) {
        let socket = match &self.send {
            Some(send) if from == Port::Own => send,
            _ => &self.receive,
        };
        let (packet, flags) = (probe.to_packet(0), libc::MSG_DONTWAIT);
        let sent = SockRef::from(socket).send_to_with_flags(&packet, &to.into(), flags);
        if let Err(error) = sent {
            tracing::debug!("no probe to {to}: {error}");
        }
    }
}

/// Further descriptors of what the workers are about to have.
///
/// # Errors
/// When there are no more descriptors.
pub fn keep(queues: &[Queue], sockets: &[WorkerSockets]) -> Result<Vec<Kept>> {
    let pairs = queues.iter().zip(sockets);
    pairs
        .map(|(queue, sockets)| {
            let send = sockets.send.as_ref().map(AsFd::as_fd);
            Kept::of(queue.as_fd(), sockets.receive.as_fd(), send)
        })
        .collect::<io::Result<_>>()
        .map_err(no_descriptors)
}

/// What workers that start again need.
///
/// # Errors
/// When there are no more descriptors.
pub fn for_workers(kept: &[Kept]) -> Result<(Vec<Queue>, Vec<WorkerSockets>)> {
    let split = kept.iter().map(|kept| {
        let send = kept.send.as_ref().map(AsFd::as_fd);
        let copy = Kept::of(kept.queue.as_fd(), kept.receive.as_fd(), send)?;
        let sockets = WorkerSockets {
            receive: copy.receive.into(),
            send: copy.send.map(Socket::from),
        };
        Ok((Queue::from(copy.queue), sockets))
    });
    split.collect::<io::Result<_>>().map_err(no_descriptors)
}

fn no_descriptors(error: io::Error) -> Error {
    Error::os("cannot duplicate a descriptor", error)
        .hint("raise the limit on open files (ulimit -n), or ask for fewer --queues")
}

/// A successor that is not ready yet. Dropped, it is broken off, unless the tunnel is
/// its by then.
pub struct Handover {
    successor: Successor,
    thread: Option<JoinHandle<()>>,
    ready: Receiver<Result<()>>,
    /// The addresses that the successor is about to give the device, or has given
    /// it, once it has said so.
    adding: Arc<OnceLock<Vec<IpNet>>>,
}

impl Handover {
    fn start(running: &mut Running, successor: Successor, protocol: u32) -> Result<Self> {
        successor.check(protocol)?;
        let manifest = manifest(running);
        let listener = running.listener()?;
        let descriptors = Arc::clone(running.descriptors());
        let (sender, ready) = bounded(1);
        let adding = Arc::new(OnceLock::new());
        let (for_thread, for_serving) = (successor.clone(), Arc::clone(&adding));
        let serve = move || {
            let listener = listener.as_ref().map(AsFd::as_fd);
            let result = serve(&for_thread, &manifest, &descriptors, listener, &for_serving);
            let _ = sender.send(result);
        };
        let thread = std::thread::Builder::new()
            .name("handover".into())
            .spawn(serve)
            .map_err(|error| Error::os("cannot serve a successor", error))?;
        Ok(Self {
            successor,
            thread: Some(thread),
            ready,
            adding,
        })
    }

    /// Where it says once that the successor is ready, or has failed.
    pub fn ready(&self) -> &Receiver<Result<()>> {
        &self.ready
    }
}

impl Drop for Handover {
    fn drop(&mut self) {
        // Who has taken the tunnel does not listen any more.
        self.successor.keep();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that serves a successor panicked");
        }
    }
}

fn serve(
    successor: &Successor,
    manifest: &Manifest,
    descriptors: &[Kept],
    listener: Option<BorrowedFd<'_>>,
    adding: &OnceLock<Vec<IpNet>>,
) -> Result<()> {
    let workers = descriptors.iter().map(|kept| WorkerDescriptors {
        queue: kept.queue.as_fd(),
        receive: kept.receive.as_fd(),
        send: kept.send.as_ref().map(AsFd::as_fd),
    });
    successor.hand_over(manifest, workers, listener, adding)
}

/// Begins to serve a successor.
pub fn begin(running: &mut Running, stream: UnixStream, protocol: u32) {
    if let Ok(asker) = Asker::of(&stream) {
        tracing::info!("{asker} asks to take over");
    }
    let successor = Successor::new(stream);
    if running.handover.is_some() {
        let error = Error::new("another process is taking over already").hint("try again");
        return successor.refuse(&error);
    }
    match Handover::start(running, successor.clone(), protocol) {
        Ok(handover) => running.handover = Some(handover),
        Err(error) => {
            successor.refuse(&error);
            not_handed_over(&error);
        }
    }
}

fn not_handed_over(error: &Error) {
    tracing::error!("not handed over: {error}");
}

/// Leaves the tunnel to a successor that is `ready`; if that comes to nothing,
/// the tunnel runs on.
///
/// # Errors
/// When it cannot.
pub fn end(running: &mut Running, ready: Result<()>) -> Result<Option<End>> {
    let Some(handover) = running.handover.take() else {
        return Ok(None);
    };
    let mut listener = None;
    let left = ready.and_then(|()| {
        listener = running.listener()?;
        leave_to(running, &handover.successor)
    });
    let Err(error) = left else {
        return Ok(Some(End::HandedOver));
    };
    not_handed_over(&error);
    if running.has_left() {
        running.resume(listener)?;
        tracing::warn!("carrying on");
    }
    if let Some(added) = handover.adding.get() {
        take_back_addresses(running, added);
    }
    // Now that the tunnel runs: if this process died before it said that it keeps it,
    // the successor would carry on.
    drop(handover);
    running.catch_up();
    Ok(None)
}

fn leave_to(running: &mut Running, successor: &Successor) -> Result<()> {
    running.leave();
    // Last: from here until the successor starts nobody carries packets.
    running.stop_workers();
    successor.done(running.is_reload_due)
}

/// Takes from the device what the successor has given it. Who runs the tunnel
/// from now on does not have those addresses.
fn take_back_addresses(running: &mut Running, added: &[IpNet]) {
    let own = &running.settled.link.addresses;
    let others = added.iter().filter(|net| !own.contains(net));
    let others: Vec<_> = others.copied().collect();
    if let Some(index) = running.device.index {
        link::remove_addresses(&mut running.netlink, index, &others);
    }
}

fn manifest(running: &Running) -> Manifest {
    let (overlay, wanted) = (&running.overlay, &running.config.wanted);
    let runtime = |peer: &&Peer| peer.origin == Origin::Runtime;
    let mut prefixes_of: BTreeMap<_, Vec<_>> = BTreeMap::new();
    let mut runtime_prefixes = Vec::new();
    for (prefix, peer, origin) in overlay.prefixes() {
        if peer.origin == Origin::Runtime {
            prefixes_of.entry(peer.name.key()).or_default().push(prefix);
        } else if origin == Origin::Runtime {
            runtime_prefixes.push((prefix, peer.name.to_string()));
        }
    }
    let runtime_peers = overlay
        .peers_by_name()
        .filter(runtime)
        .map(|peer| RuntimePeer {
            peer: peer.name.to_string(),
            is_default: peer.is_default,
            prefixes: prefixes_of.remove(&peer.name.key()).unwrap_or_default(),
        });
    Manifest {
        ok: true,
        protocol: PROTOCOL,
        pid: std::process::id(),
        version: env!("CARGO_PKG_VERSION").into(),
        tun: running.config.tun.clone(),
        workers: running.worker_count as u16,
        listen: running.settled.listen,
        tun_offloads: [running.tun_offloads.tcp, running.tun_offloads.udp],
        udp_offloads: [running.udp_offloads.segment, running.udp_offloads.gro],
        tun_wanted: [wanted.tun.tcp, wanted.tun.udp],
        udp_wanted: [wanted.udp.segment, wanted.udp.gro],
        is_steered: running.is_steered,
        addresses: running.settled.link.addresses.clone(),
        runtime_peers: runtime_peers.collect(),
        runtime_prefixes,
    }
}
