//! What operators ask for, done by the control thread one after the other.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Instant;

use super::running::{End, Running};
use super::{announce, handover};
use crate::cli::parse::parse_endpoint;
use crate::cli::{Endpoint, PeerSpec};
use crate::config::{Config, Settled};
use crate::control::overlay::{Changes, Origin, Overlay};
use crate::control::protocol::{
    Answer, Changed, Found, PeerStatus, Peers, Reloaded, Request, RouteEntry, Routes, Status,
};
use crate::control::server::Call;
use crate::device::link::LinkConfig;
use crate::error::{Error, Result};
use crate::netlink::Netlink;
use crate::transport::path;
use crate::worker::counters::Snapshot;

/// Sees to a call; `Some` if that ends the run.
pub fn answer(running: &mut Running, call: Call) -> Option<End> {
    match call {
        Call::Takeover {
            stream,
            protocol,
            turn,
        } => {
            handover::begin(running, stream, protocol, turn);
            None
        }
        Call::Request(Request::Stop {}, reply) => {
            tracing::debug!("stopped by an operator");
            reply.send(Ok(Answer::Changed(Changed::default())));
            Some(End::Stopped)
        }
        Call::Request(request, reply) => {
            if running.handover.is_some() && is_change(&request) {
                running.postponed.push((request, reply));
            } else {
                reply.send(done(running, request));
            }
            None
        }
    }
}

/// Whether a successor that has been told already what there is would miss it.
fn is_change(request: &Request) -> bool {
    match request {
        Request::RouteAdd { .. }
        | Request::RouteDel { .. }
        | Request::PeerAdd { .. }
        | Request::PeerDel { .. }
        | Request::Reload {} => true,
        Request::Status {}
        | Request::Peers {}
        | Request::RouteList {}
        | Request::RouteGet { .. }
        | Request::Stop {}
        | Request::Takeover { .. } => false,
    }
}

/// Does what had to wait while the tunnel might have changed hands.
pub fn catch_up(running: &mut Running) {
    for (request, reply) in std::mem::take(&mut running.postponed) {
        reply.send(done(running, request));
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
            changed(running, |overlay| {
                let added = overlay.add_prefixes(&peer, &prefixes, Origin::Runtime, replace)?;
                Ok(Changed {
                    prefixes_added: added,
                    ..Changed::default()
                })
            })?
        }
        Request::RouteDel { prefixes } => changed(running, |overlay| {
            let removed = overlay.remove_prefixes(&prefixes)?;
            Ok(Changed {
                prefixes_removed: removed,
                ..Changed::default()
            })
        })?,
        Request::PeerAdd { peer, prefixes } => {
            let spec = PeerSpec {
                endpoint: parse_name(&peer)?,
                prefixes,
            };
            check_family(running, &spec.endpoint)?;
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

/// A peer's name as operators write it.
///
/// # Errors
/// When it is none.
pub fn parse_name(text: &str) -> Result<Endpoint> {
    parse_endpoint(text).map_err(|error| Error::new(format!("{text:?} is no peer: {error}")))
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

/// The sockets were opened for the peers of the start.
fn check_family(running: &Running, name: &Endpoint) -> Result<()> {
    match name.literal() {
        Some(literal) if literal.ip().is_unspecified() || literal.ip().is_multicast() => {
            Err(Error::new(format!("{name} is no address of a host")))
        }
        Some(literal) => {
            check_reach(running.settled.listen, literal)?;
            running.overlay.check_other(running.settled.listen, literal)
        }
        None => Ok(()),
    }
}

/// Whether sockets on `listen` can send to `endpoint`, and to somebody else.
///
/// # Errors
/// Names both, when they are of different IP versions, and the endpoint, when it
/// is this process.
pub fn check_reach(listen: SocketAddr, endpoint: SocketAddr) -> Result<()> {
    let is_dual_stack = listen.is_ipv6() && listen.ip().is_unspecified();
    if !is_dual_stack && listen.is_ipv6() != endpoint.is_ipv6() {
        let error = Error::new(format!("cannot send to {endpoint} from {listen}"));
        return Err(error.hint("start with --listen [::] to have peers of both IP versions"));
    }
    // One that cannot be reached now may be later.
    match path::discover(listen.ip(), endpoint) {
        Ok(found) => path::check_other(listen, endpoint, found),
        Err(_) => Ok(()),
    }
}

/// Reads the configuration file again and applies what is different.
///
/// # Errors
/// When the file is bad or cannot be applied: nothing has changed then.
pub fn reload(running: &mut Running) -> Result<Reloaded> {
    let result = try_reload(running);
    running.reload_error = result.as_ref().err().map(ToString::to_string);
    result
}

fn try_reload(running: &mut Running) -> Result<Reloaded> {
    let new = running.config.reread()?;
    for spec in &new.peers {
        check_family(running, &spec.endpoint)?;
    }
    let mut next = running.overlay.clone();
    let changes = next.configure(&new.peers)?;
    let needs_restart = running.config.needs_restart(&new);
    let mut settings_changed = Vec::new();
    let old = running.config.clone();
    let old_link = running.settled.link.clone();
    running.config = old.with_changes_of(new);
    let result =
        apply_link(running, &old, &mut settings_changed).and_then(|()| running.commit(next));
    if let Err(error) = result {
        running.config = old;
        if let Err(error) = restore_link(running, old_link) {
            tracing::error!("the device is not what it was: {error}");
        }
        running.republish();
        return Err(error);
    }
    running.resolve_again();
    Ok(Reloaded {
        changed: to_changed(changes),
        settings_changed,
        needs_restart: needs_restart.into_iter().map(String::from).collect(),
    })
}

/// Gives the device its old settings back.
fn restore_link(running: &mut Running, old: LinkConfig) -> Result<()> {
    let mut netlink = Netlink::open()?;
    let index = netlink
        .link_index(&running.config.tun)?
        .ok_or_else(|| Error::new(format!("interface {} has disappeared", running.config.tun)))?;
    netlink.set_txqueuelen(index, old.txqueuelen)?;
    netlink.set_mtu(index, old.mtu_bytes)?;
    let tried = std::mem::replace(&mut running.settled.link, old);
    let addresses = running.settled.link.addresses.clone();
    if tried.addresses != addresses {
        running.change_addresses(&mut netlink, index, &tried.addresses, addresses)?;
    }
    Ok(())
}

/// Applies the device's settings in which the configuration differs from `old`.
fn apply_link(running: &mut Running, old: &Config, changed: &mut Vec<String>) -> Result<()> {
    let new = running.config.clone();
    let mut netlink = Netlink::open()?;
    let index = netlink
        .link_index(&new.tun)?
        .ok_or_else(|| Error::new(format!("interface {} has disappeared", new.tun)))?;
    if new.txqueuelen != old.txqueuelen {
        netlink.set_txqueuelen(index, new.txqueuelen)?;
        running.settled.link.txqueuelen = new.txqueuelen;
        changed.push("txqueuelen".into());
    }
    if new.mtu_bytes != old.mtu_bytes || new.addresses != old.addresses {
        let resolved: Vec<_> = running
            .overlay
            .peers()
            .filter_map(|(_, peer)| peer.endpoint)
            .collect();
        let settled = new.settle(&resolved)?;
        apply_settled(running, &mut netlink, index, settled, changed)?;
    }
    for (key, differs) in [
        ("hop", new.hop != old.hop),
        ("no-routes", new.no_routes != old.no_routes),
        ("route", new.routes != old.routes),
    ] {
        if differs {
            changed.push(key.into());
        }
    }
    Ok(())
}

fn apply_settled(
    running: &mut Running,
    netlink: &mut Netlink,
    index: u32,
    new: Settled,
    changed: &mut Vec<String>,
) -> Result<()> {
    let link = &mut running.settled.link;
    if new.link.mtu_bytes != link.mtu_bytes {
        netlink.set_mtu(index, new.link.mtu_bytes)?;
        link.mtu_bytes = new.link.mtu_bytes;
        changed.push("mtu".into());
    }
    if new.link.addresses != link.addresses {
        let old = link.addresses.clone();
        running.change_addresses(netlink, index, &old, new.link.addresses)?;
        changed.push("address".into());
    }
    Ok(())
}

fn to_changed(changes: Changes) -> Changed {
    Changed {
        prefixes_added: changes.prefixes_added,
        prefixes_removed: changes.prefixes_removed,
        peers_added: changes.peers_added,
        peers_removed: changes.peers_removed,
    }
}

/// What a reload came to, for the log.
pub fn in_words(report: &Reloaded) -> String {
    let changed = report.changed;
    let mut words = format!(
        "peers {} added, {} removed; prefixes {} added, {} removed",
        changed.peers_added,
        changed.peers_removed,
        changed.prefixes_added,
        changed.prefixes_removed
    );
    if !report.settings_changed.is_empty() {
        words += &format!("; changed: {}", report.settings_changed.join(", "));
    }
    if !report.needs_restart.is_empty() {
        words += &format!("; at the next start: {}", report.needs_restart.join(", "));
    }
    words
}

fn status(running: &Running) -> Status {
    let snapshots: Vec<Snapshot> = running
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
