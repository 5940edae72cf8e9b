//! What operators and successors ask for, done by the control thread one after
//! the other.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Instant;

use ipnet::IpNet;

use super::announce;
use super::reload::reload;
use super::running::{End, Running};
use super::takeover::{Manifest, PROTOCOL, RuntimePeer, Successor, WorkerDescriptors};
use crate::cli::parse::{checked_route, parse_endpoint};
use crate::cli::{Endpoint, PeerSpec};
use crate::config::{Config, Settled, check_ipv6_mtu};
use crate::control::overlay::{Origin, Overlay};
use crate::control::protocol::{
    Answer, Changed, Found, PeerStatus, Peers, Request, RouteEntry, Routes, Status,
};
use crate::control::server::Call;
use crate::device::tun::Queue;
use crate::error::{Error, Result, shortened};
use crate::netlink::Netlink;
use crate::transport::socket::WorkerSockets;
use crate::worker::counters::Snapshot;

/// Descriptors of one worker, kept for a successor.
pub struct Kept {
    queue: OwnedFd,
    receive: OwnedFd,
    send: Option<OwnedFd>,
}

/// Further descriptors of what the workers are about to have.
///
/// # Errors
/// When there are no more descriptors.
pub fn keep(queues: &[Queue], sockets: &[WorkerSockets]) -> Result<Vec<Kept>> {
    let clone = |fd: std::os::fd::BorrowedFd<'_>| fd.try_clone_to_owned();
    let pairs = queues.iter().zip(sockets);
    pairs
        .map(|(queue, sockets)| {
            let send = sockets.send.as_ref();
            Ok(Kept {
                queue: clone(queue.as_fd())?,
                receive: clone(sockets.receive.as_fd())?,
                send: send.map(|send| clone(send.as_fd())).transpose()?,
            })
        })
        .collect::<std::io::Result<_>>()
        .map_err(|error| {
            Error::os("cannot duplicate a descriptor", error)
                .hint("raise the limit on open files (ulimit -n), or ask for fewer --queues")
        })
}

/// Sees to a call; `Some` if that ends the run.
pub fn answer(running: &mut Running, call: Call) -> Option<End> {
    match call {
        Call::Takeover {
            stream,
            protocol,
            // Until it is over, one way or the other.
            turn: _turn,
        } => match hand_over(running, stream, protocol) {
            Ok(()) => Some(End::HandedOver),
            Err(error) => {
                tracing::error!("not handed over: {error}");
                None
            }
        },
        Call::Request(Request::Stop {}, reply) => {
            tracing::debug!("stopped by an operator");
            reply.send(Ok(Answer::Changed(Changed::default())));
            Some(End::Stopped)
        }
        Call::Request(request, reply) => {
            reply.send(done(running, request));
            None
        }
    }
}

fn done(running: &mut Running, request: Request) -> Result<Answer> {
    Ok(match request {
        Request::Status {} => Answer::Status(Box::new(status(running))),
        Request::Peers {} => Answer::Peers(peers(running)),
        Request::RouteList {} => Answer::Routes(routes(&running.overlay)),
        Request::RouteGet { address } => {
            let (prefix, peer) = running
                .overlay
                .route_to(address)
                .ok_or_else(|| Error::new(format!("no peer has a prefix that {address} is in")))?;
            Answer::Found(Found {
                address,
                prefix,
                peer: peer.name.to_string(),
                endpoint: peer.endpoint,
            })
        }
        Request::RouteAdd {
            peer,
            prefixes,
            replace,
        } => {
            let peer = parse_name(&peer)?;
            check_new_prefixes(running, &prefixes)?;
            changed(running, |overlay| {
                let added = overlay.add_prefixes(&peer, &prefixes, Origin::Runtime, replace)?;
                Ok(Changed {
                    prefixes_added: added,
                    ..Changed::default()
                })
            })?
        }
        Request::RouteDel { prefixes } => {
            prefixes.iter().try_for_each(check_prefix)?;
            changed(running, |overlay| {
                let removed = overlay.remove_prefixes(&prefixes)?;
                Ok(Changed {
                    prefixes_removed: removed,
                    ..Changed::default()
                })
            })?
        }
        Request::PeerAdd { peer, prefixes } => {
            let spec = PeerSpec {
                endpoint: parse_name(&peer)?,
                prefixes,
            };
            if let Some(endpoint) = spec.endpoint.literal() {
                running.check_endpoint(endpoint)?;
            }
            check_new_prefixes(running, &spec.prefixes)?;
            changed(running, |overlay| {
                overlay.add_peer(&spec, Origin::Runtime)?;
                Ok(Changed {
                    peers_added: 1,
                    prefixes_added: spec.prefixes.len(),
                    ..Changed::default()
                })
            })?
        }
        Request::PeerDel { peer } => {
            let peer = parse_name(&peer)?;
            changed(running, |overlay| {
                let removed = overlay.remove_peer(&peer)?;
                Ok(Changed {
                    peers_removed: 1,
                    prefixes_removed: removed,
                    ..Changed::default()
                })
            })?
        }
        Request::Reload {} => Answer::Reloaded(reload(running)?),
        // Both end the run, and are seen to before.
        Request::Stop {} | Request::Takeover { .. } => {
            return Err(Error::new("this cannot be asked for here"));
        }
    })
}

fn parse_name(text: &str) -> Result<Endpoint> {
    parse_endpoint(text).map_err(|error| {
        // Escapes are longer than what they stand for.
        let quoted = format!("{:?}", shortened(text));
        Error::new(format!("{} is no peer: {error}", shortened(&quoted)))
    })
}

/// Makes a change to the overlay, all of it or nothing.
fn changed(
    running: &mut Running,
    change: impl FnOnce(&mut Overlay) -> Result<Changed>,
) -> Result<Answer> {
    let mut next = running.overlay.clone();
    let changed = change(&mut next)?;
    running.commit(next)?;
    Ok(Answer::Changed(changed))
}

fn check_prefix(prefix: &IpNet) -> Result<()> {
    let checked = checked_route(*prefix).map(drop);
    checked.map_err(|error| Error::new(format!("{prefix}: {error}")))
}

/// Makes sure that the tunnel can have these prefixes.
fn check_new_prefixes(running: &Running, prefixes: &[IpNet]) -> Result<()> {
    prefixes.iter().try_for_each(check_prefix)?;
    check_ipv6_mtu(running.settled.link.mtu_bytes, prefixes.iter().copied())
}

fn status(running: &Running) -> Status {
    let snapshots: Vec<Snapshot> = running
        .workers()
        .counters()
        .iter()
        .map(|worker| worker.snapshot())
        .collect();
    let total = snapshots
        .iter()
        .fold(Snapshot::default(), |sum, worker| sum.plus(worker));
    let named = |(name, value): (&str, u64)| (name.replace('_', "-"), value);
    let is_drop = |name: &str| name.starts_with("drop_");
    let link = Netlink::open()
        .ok()
        .and_then(|mut netlink| super::read_link_stats(&mut netlink, &running.config.tun));
    let settled = &running.settled;
    Status {
        version: env!("CARGO_PKG_VERSION").into(),
        pid: std::process::id(),
        uptime_seconds: running.started.elapsed().as_secs(),
        tun: running.config.tun.clone(),
        addresses: settled.link.addresses.clone(),
        mtu_bytes: settled.link.mtu_bytes,
        listen: settled.listen.to_string(),
        engine: running.workers().engine().to_string(),
        offloads: announce::offloads(running),
        hop: running.config.hop,
        keeps_routes: !running.config.no_routes,
        config_file: running
            .config
            .config_file
            .as_ref()
            .map(|path| path.display().to_string()),
        reload_error: running.reload_error.clone(),
        peers: running.overlay.peer_count(),
        prefixes: running.overlay.prefix_count(),
        counters: total
            .iter()
            .filter(|(name, _)| !is_drop(name))
            .map(named)
            .collect(),
        drops: total.drops().map(named).collect(),
        tun_queue_drops: link.map_or(0, |link| link.tx_dropped),
        workers: snapshots
            .iter()
            .map(|worker| worker.iter().map(named).collect::<BTreeMap<_, _>>())
            .collect(),
    }
}

fn peers(running: &Running) -> Peers {
    let now = Instant::now();
    let status = running.overlay.peers_by_name().map(|peer| {
        let sum = |count: fn(&crate::worker::counters::PeerCounters) -> u64| {
            peer.traffic.iter().map(count).sum::<u64>()
        };
        let hop = running.overlay.find(&peer.name).map(|(hop, _)| hop);
        let last = hop.and_then(|hop| running.heard.get(&hop)?.last);
        PeerStatus {
            peer: peer.name.to_string(),
            endpoint: peer.endpoint,
            is_suspended: peer.is_suspended,
            origin: peer.origin.as_str().into(),
            is_default: peer.is_default,
            prefixes: peer.prefix_count,
            path_mtu_bytes: peer.path_mtu_bytes,
            packets_sent: sum(|worker| worker.packets_sent.get()),
            bytes_sent: sum(|worker| worker.bytes_sent.get()),
            packets_received: sum(|worker| worker.packets_received.get()),
            bytes_received: sum(|worker| worker.bytes_received.get()),
            last_heard_seconds: last.map(|last| (now - last).as_secs()),
        }
    });
    Peers {
        peers: status.collect(),
    }
}

fn routes(overlay: &Overlay) -> Routes {
    let entries = overlay.prefixes().map(|(prefix, peer, origin)| RouteEntry {
        prefix,
        peer: peer.name.to_string(),
        endpoint: peer.endpoint,
        origin: origin.as_str().into(),
    });
    Routes {
        routes: entries.collect(),
    }
}

fn hand_over(
    running: &mut Running,
    stream: std::os::unix::net::UnixStream,
    protocol: u32,
) -> Result<()> {
    let mut successor = Successor::new(stream, protocol)?;
    let manifest = manifest(running);
    let workers = running.descriptors().iter().map(|kept| WorkerDescriptors {
        queue: kept.queue.as_fd(),
        receive: kept.receive.as_fd(),
        send: kept.send.as_ref().map(AsFd::as_fd),
    });
    let listener = running.server.as_ref().map(|server| server.listener());
    successor.hand_over(&manifest, workers, listener)?;
    // From here on there is no way back: what the workers hold is sent, the
    // rest waits in the kernel for the successor.
    running.leave();
    // Last: from here until the successor starts nobody carries packets.
    running.stop_workers();
    if let Err(error) = successor.done() {
        tracing::error!("{error}");
    }
    Ok(())
}

fn manifest(running: &Running) -> Manifest {
    let overlay = &running.overlay;
    let runtime = |peer: &&crate::control::overlay::Peer| peer.origin == Origin::Runtime;
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
        tun: running.config.tun.clone(),
        workers: running.worker_count as u16,
        listen: running.settled.listen,
        tun_offloads: [running.tun_offloads.tcp, running.tun_offloads.udp],
        udp_offloads: [running.udp_offloads.segment, running.udp_offloads.gro],
        is_steered: running.is_steered,
        addresses: running.settled.link.addresses.clone(),
        runtime_peers: runtime_peers.collect(),
        runtime_prefixes,
    }
}

/// Makes sure that a successor's configuration fits what it takes over.
///
/// # Errors
/// Names the setting that does not.
pub fn check_inherited(config: &Config, settled: &Settled, manifest: &Manifest) -> Result<()> {
    let differs = |what: &str, ours: &dyn std::fmt::Display, theirs: &dyn std::fmt::Display| {
        Err(Error::new(format!(
            "cannot take over: this process wants {what} {ours}, the running one has {theirs}"
        ))
        .hint("stop the running one and start this one without --takeover"))
    };
    if config.tun != manifest.tun {
        return differs("the device", &config.tun, &manifest.tun);
    }
    if settled.listen != manifest.listen {
        return differs("to listen on", &settled.listen, &manifest.listen);
    }
    if config.queues != manifest.workers {
        tracing::warn!(
            "--queues {} takes effect at the next start: the running process has {}",
            config.queues,
            manifest.workers
        );
    }
    Ok(())
}

/// Adds what operators added to the predecessor, as far as it still fits.
pub fn inherit(overlay: &mut Overlay, manifest: &Manifest) {
    for peer in &manifest.runtime_peers {
        if let Err(error) = inherit_peer(overlay, peer) {
            tracing::warn!("left out what was added at run time: {error}");
        }
    }
    for (prefix, peer) in &manifest.runtime_prefixes {
        let added = parse_name(peer)
            .and_then(|peer| overlay.add_prefixes(&peer, &[*prefix], Origin::Runtime, false));
        if let Err(error) = added {
            tracing::warn!("left out what was added at run time: {error}");
        }
    }
}

/// Adds a peer, with all its prefixes or not at all.
fn inherit_peer(overlay: &mut Overlay, peer: &RuntimePeer) -> Result<()> {
    let name = parse_name(&peer.peer)?;
    let is_new = overlay.find(&name).is_none();
    let added = overlay.insert_peer(&name, peer.is_default, &peer.prefixes, Origin::Runtime);
    // One that could not have its prefixes is there without them.
    if added.is_err() && is_new && overlay.find(&name).is_some() {
        overlay.remove_peer(&name)?;
    }
    added
}
