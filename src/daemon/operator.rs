//! What operators ask for, done by the control thread one after the other.

use std::collections::BTreeMap;
use std::time::Instant;

use ipnet::IpNet;

use super::reload::reload;
use super::running::{End, Running};
use super::{announce, handover, reach};
use crate::config::check_ipv6_mtu;
use crate::config::parse::{checked_route, parse_peer_name};
use crate::config::{PeerName, PeerSpec};
use crate::control::credentials::Asker;
use crate::control::protocol::{
    Answer, Changed, Found, PeerStatus, Peers, Request, RouteEntry, Routes, Status,
};
use crate::control::server::Call;
use crate::counters::{PeerCounters, Snapshot};
use crate::error::{Error, Result, shortened};
use crate::routing::overlay::{Origin, Overlay};

/// Sees to a call; `Some` if that ends the run.
pub fn answer(running: &mut Running, call: Call) -> Option<End> {
    match call {
        Call::Takeover {
            connection,
            protocol,
        } => {
            handover::begin(running, connection.into_stream(), protocol);
            None
        }
        Call::Request(Request::Stop {}, reply) => {
            tracing::info!("stopped by {}", reply.asker());
            reply.send(Ok(Answer::Changed(Changed::default())));
            Some(End::Stopped)
        }
        Call::Request(request, reply) => {
            let answer = match running.handover.is_some() && is_change(&request) {
                true => Err(Error::new("another process is taking over").hint("try again")),
                false => done(running, request, reply.asker()),
            };
            reply.send(answer);
            None
        }
    }
}

/// Whether a new process that has been told already what there is would miss it.
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

fn done(running: &mut Running, request: Request, asker: Asker) -> Result<Answer> {
    Ok(match request {
        Request::Status {} => {
            running.count_socket_drops();
            Answer::Status(Box::new(status(running)))
        }
        Request::Peers {} => Answer::Peers(peers(running)),
        Request::RouteList {} => Answer::Routes(routes(&running.overlay)),
        Request::RouteGet { address } if running.overlay.is_outside(address) => {
            return Err(Error::new(format!(
                "packets to {address} do not go through the tunnel: it is this host's own \
                 address, or a peer's outside the tunnel"
            )));
        }
        Request::RouteGet { address } => {
            let (prefix, peer) = running
                .overlay
                .route_to(address)
                .ok_or_else(|| Error::new(format!("no peer has a prefix that {address} is in")))?;
            Answer::Found(Found {
                address,
                prefix,
                peer: peer.name.to_string(),
                endpoint: peer.endpoint_learned(),
            })
        }
        Request::RouteAdd {
            peer,
            prefixes,
            replace,
        } => {
            let peer = parse_name(&peer)?;
            check_new_prefixes(running, &prefixes)?;
            changed(running, asker, &prefixes, |overlay| {
                let added = overlay.add_prefixes(&peer, &prefixes, Origin::Runtime, replace)?;
                Ok(Changed {
                    prefixes_added: added,
                    ..Changed::default()
                })
            })?
        }
        Request::RouteDel { prefixes } => {
            prefixes.iter().try_for_each(check_prefix)?;
            changed(running, asker, &prefixes, |overlay| {
                let removed = overlay.remove_prefixes(&prefixes)?;
                Ok(Changed {
                    prefixes_removed: removed,
                    ..Changed::default()
                })
            })?
        }
        Request::PeerAdd { peer, prefixes } => {
            let spec = PeerSpec {
                name: parse_name(&peer)?,
                prefixes,
            };
            if let Some(endpoint) = spec.name.literal() {
                running.check_endpoint(endpoint)?;
            }
            check_new_prefixes(running, &spec.prefixes)?;
            changed(running, asker, &spec.prefixes, |overlay| {
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
            let prefixes = running.overlay.prefixes_of(&peer);
            changed(running, asker, &prefixes, |overlay| {
                let removed = overlay.remove_peer(&peer)?;
                Ok(Changed {
                    peers_removed: 1,
                    prefixes_removed: removed,
                    ..Changed::default()
                })
            })?
        }
        Request::Reload {} => Answer::Reloaded(reload(running, &asker.to_string())?),
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
pub fn parse_name(text: &str) -> Result<PeerName> {
    parse_peer_name(text).map_err(|error| {
        // Escapes are longer than what they stand for.
        let quoted = format!("{:?}", shortened(text));
        Error::new(format!("{} is no peer: {error}", shortened(&quoted)))
    })
}

/// Makes a change to the overlay, all of it or nothing. `prefixes`: those that it
/// is about.
fn changed(
    running: &mut Running,
    asker: Asker,
    prefixes: &[IpNet],
    change: impl FnOnce(&mut Overlay) -> Result<Changed>,
) -> Result<Answer> {
    let mut next = running.overlay.clone();
    let changed = change(&mut next)?;
    let what = running.overlay.differences(&next, prefixes.iter().copied());
    running.commit(next)?;
    if !what.is_empty() {
        tracing::info!("{what}, by {asker}");
    }
    Ok(Answer::Changed(changed))
}

fn check_prefix(prefix: &IpNet) -> Result<()> {
    let checked = checked_route(*prefix).map(drop);
    checked.map_err(|error| Error::new(format!("{prefix}: {error}")))
}

/// Makes sure that the tunnel can have these prefixes.
fn check_new_prefixes(running: &Running, prefixes: &[IpNet]) -> Result<()> {
    prefixes.iter().try_for_each(check_prefix)?;
    let own = running.overlay.own_addresses();
    reach::check_prefixes(own, prefixes.iter().copied())?;
    check_ipv6_mtu(running.settled.link.mtu_bytes, prefixes.iter().copied())
}

fn status(running: &mut Running) -> Status {
    // Before anybody has told of a change.
    running.look_at_device();
    let stats = running.link_stats();
    let snapshots: Vec<Snapshot> = running
        .counters()
        .iter()
        .map(|worker| worker.snapshot())
        .collect();
    let total = snapshots
        .iter()
        .fold(Snapshot::default(), |sum, worker| sum.plus(worker));
    let named = |(name, value): (&str, u64)| (name.to_string(), value);
    let is_drop = |name: &str| name.starts_with("drop_");
    let settled = &running.settled;
    Status {
        version: env!("CARGO_PKG_VERSION").into(),
        pid: std::process::id(),
        uptime_seconds: running.started.elapsed().as_secs(),
        tun: running.device.name.clone(),
        tun_index: running.device.index,
        addresses: settled.link.addresses.clone(),
        mtu_bytes: running.device.mtu_by_hand.unwrap_or(settled.link.mtu_bytes),
        listen: settled.listen.to_string(),
        own_ports: running.ports.own(),
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
        tun_queue_drops: stats.map_or(0, |stats| stats.tx_dropped),
        workers: snapshots
            .iter()
            .map(|worker| worker.iter().map(named).collect::<BTreeMap<_, _>>())
            .collect(),
    }
}

fn peers(running: &Running) -> Peers {
    let now = Instant::now();
    let status = running.overlay.peers_by_name().map(|peer| {
        let sum = |count: fn(&PeerCounters) -> u64| peer.traffic.iter().map(count).sum::<u64>();
        let packets_received = sum(|worker| worker.packets_received.get());
        let hop = running.overlay.find(&peer.name).map(|(hop, _)| hop);
        let heard = hop.and_then(|hop| running.heard.get(&hop));
        // It may have been heard since the control thread last looked.
        let last = match heard {
            Some(heard) if heard.received == packets_received => heard.last,
            _ => (packets_received > 0).then_some(now),
        };
        let mut drops = BTreeMap::new();
        for (name, count) in peer.traffic.iter().flat_map(PeerCounters::drops) {
            if count > 0 {
                *drops.entry(name.to_string()).or_insert(0) += count;
            }
        }
        PeerStatus {
            peer: peer.name.to_string(),
            endpoint: peer.endpoint_learned(),
            seen_port: peer.learned_port.or_else(|| running.ports.seen(hop?)),
            own_ports_proven: peer
                .traffic
                .iter()
                .filter(|worker| worker.is_own_port_proven())
                .count(),
            is_suspended: peer.is_suspended,
            origin: peer.origin.as_str().into(),
            is_default: peer.is_default,
            prefixes: peer.prefix_count,
            path_mtu_bytes: peer.path_mtu_bytes,
            packets_sent: sum(|worker| worker.packets_sent.get()),
            bytes_sent: sum(|worker| worker.bytes_sent.get()),
            packets_received,
            bytes_received: sum(|worker| worker.bytes_received.get()),
            last_heard_seconds: last.map(|last| (now - last).as_secs()),
            drops,
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
        endpoint: peer.endpoint_learned(),
        origin: origin.as_str().into(),
    });
    Routes {
        routes: entries.collect(),
    }
}
