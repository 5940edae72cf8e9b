//! The predecessor's side of a takeover ([`super::takeover`]).
//!
//! A thread of its own serves the successor until that is ready, so that the
//! control thread goes on with what it does. Only changes that the successor
//! would miss wait: operators', and reloads.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;

use crossbeam_channel::{Receiver, bounded};
use ipnet::IpNet;

use super::control_socket::ControlSocket;
use super::takeover::{Manifest, PROTOCOL, RuntimePeer, Successor, WorkerDescriptors};
use super::tunnel::Tunnel;
use super::workers::WorkerFds;
use crate::control::credentials::Asker;
use crate::error::{Error, Result};
use crate::host::link;
use crate::routing::overlay::{Origin, Peer};

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
    fn start(
        tunnel: &Tunnel,
        control: &ControlSocket,
        successor: Successor,
        protocol: u32,
    ) -> Result<Self> {
        successor.check(protocol)?;
        let manifest = manifest(tunnel);
        let listener = control.listener()?;
        let descriptors = Arc::clone(tunnel.workers.descriptors());
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
    descriptors: &[WorkerFds],
    listener: Option<BorrowedFd<'_>>,
    adding: &OnceLock<Vec<IpNet>>,
) -> Result<()> {
    let workers = descriptors.iter().map(|kept| WorkerDescriptors {
        queue: kept.queue(),
        receive: kept.receive(),
        send: kept.send(),
    });
    successor.hand_over(manifest, workers, listener, adding)
}

/// Refuses a process that wants to take over while another one does.
pub fn refuse_second(stream: UnixStream) {
    let error = Error::new("another process is taking over already").hint("try again");
    Successor::new(stream).refuse(&error);
}

/// Begins to serve a successor; `None` if it was refused.
pub fn begin(
    tunnel: &Tunnel,
    control: &ControlSocket,
    stream: UnixStream,
    protocol: u32,
) -> Option<Handover> {
    if let Ok(asker) = Asker::of(&stream) {
        tracing::info!("{asker} asks to take over");
    }
    let successor = Successor::new(stream);
    match Handover::start(tunnel, control, successor.clone(), protocol) {
        Ok(handover) => Some(handover),
        Err(error) => {
            successor.refuse(&error);
            not_handed_over(&error);
            None
        }
    }
}

fn not_handed_over(error: &Error) {
    tracing::error!("not handed over: {error}");
}

/// Leaves the tunnel to a successor that is `ready`, and tells whether it is the
/// successor's now. If that comes to nothing, the tunnel runs on.
///
/// # Errors
/// When it cannot.
pub fn end(
    tunnel: &mut Tunnel,
    control: &mut ControlSocket,
    handover: Handover,
    ready: Result<()>,
) -> Result<bool> {
    let mut listener = None;
    let left = ready.and_then(|()| {
        listener = control.listener()?;
        leave_to(tunnel, control, &handover.successor)
    });
    let Err(error) = left else {
        return Ok(true);
    };
    not_handed_over(&error);
    if tunnel.workers.are_stopped() {
        // First, so that the socket's name goes if the rest fails.
        if listener.is_some() {
            control.open(&tunnel.config, listener)?;
        }
        tunnel.resume()?;
        tracing::warn!("carrying on");
    }
    if let Some(added) = handover.adding.get() {
        take_back_addresses(tunnel, added);
    }
    // The handover ends now that the tunnel runs: if this process died before it said
    // that it keeps it, the successor would carry on.
    Ok(false)
}

fn leave_to(tunnel: &mut Tunnel, control: &mut ControlSocket, successor: &Successor) -> Result<()> {
    tunnel.leave();
    control.close(false);
    // Last: from here until the successor starts nobody carries packets.
    tunnel.workers.stop();
    successor.done(control.is_reload_due)
}

/// Takes from the device what the successor has given it. Who runs the tunnel
/// from now on does not have those addresses.
fn take_back_addresses(tunnel: &mut Tunnel, added: &[IpNet]) {
    let own = &tunnel.settings.link.addresses;
    let others = added.iter().filter(|net| !own.contains(net));
    let others: Vec<_> = others.copied().collect();
    if let Some(index) = tunnel.host.device.index {
        link::remove_addresses(&mut tunnel.host.netlink, index, &others);
    }
}

fn manifest(tunnel: &Tunnel) -> Manifest {
    let (overlay, wanted) = (&tunnel.peers.overlay, &tunnel.config.wanted);
    let (tun, udp) = (tunnel.workers.tun_offloads(), tunnel.workers.udp_offloads());
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
        tun: tunnel.config.tun.clone(),
        workers: tunnel.workers.count() as u16,
        listen: tunnel.settings.listen,
        tun_offloads: [tun.tcp, tun.udp],
        udp_offloads: [udp.segment, udp.gro],
        tun_wanted: [wanted.tso, wanted.uso],
        udp_wanted: [wanted.udp_segment, wanted.udp_gro],
        is_steered: tunnel.workers.is_steered,
        addresses: tunnel.settings.link.addresses.clone(),
        runtime_peers: runtime_peers.collect(),
        runtime_prefixes,
    }
}
