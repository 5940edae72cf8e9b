//! Requests on the control socket: each is answered by a function of the request
//! and the tunnel.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Instant;

use ipnet::IpNet;

use super::capture::Capture;
use super::encryption::Encryption;
use super::registry::Registry;
use super::reload::{rehearse_reload, reload, to_changed};
use super::settings::check_ipv6_mtu;
use super::tunnel::Tunnel;
use super::{announce, reach};
use crate::clock;
use crate::config::{
    HostPort, PeerName, PeerSpec, check_mode, check_prefix, parse_host_port, parse_peer_name,
};
use crate::control::credentials::Asker;
use crate::control::protocol::{
    Answer, Found, PeerStatus, Peers, Request, RouteEntry, Routes, Status, WireGuardStatus,
};
use crate::counters::{PeerCounters, Snapshot};
use crate::error::{Error, Result, shortened};
use crate::packet::batch::NextHop;
use crate::routing::overlay::{Changes, Origin, Overlay, Peer};

/// Whether a request changes nothing.
pub fn is_question(request: &Request) -> bool {
    matches!(
        request,
        Request::Status {}
            | Request::Peers {}
            | Request::RouteList {}
            | Request::RouteGet { .. }
            | Request::Reload { dry_run: true }
    )
}

/// Answers a request.
///
/// # Errors
/// When it cannot be done, says why: nothing has changed then.
pub fn answer(tunnel: &mut Tunnel, request: Request, asker: Asker) -> Result<Answer> {
    match request {
        Request::Status {} => Ok(Answer::Status(Box::new(status(tunnel)))),
        Request::Peers {} => Ok(Answer::Peers(Peers {
            boottime_ns: Some(clock::now_ns()),
            peers: peers(tunnel).collect(),
        })),
        Request::RouteList {} => Ok(Answer::Routes(routes(&tunnel.peers.overlay))),
        Request::RouteGet { address } => route_to(&tunnel.peers.overlay, address),
        Request::RouteAdd {
            peer,
            prefixes,
            replace,
        } => {
            let peer = tunnel.config.complete_name(parse_name(&peer)?);
            check_new_prefixes(tunnel, &prefixes)?;
            changed(tunnel, asker, |overlay| {
                overlay.add_prefixes(&peer, &prefixes, Origin::Runtime, replace)
            })
        }
        Request::RouteDel { prefixes } => {
            prefixes.iter().try_for_each(check_prefix)?;
            let overlay = &tunnel.peers.overlay;
            let mut kept = prefixes
                .iter()
                .filter(|net| overlay.is_registry_prefix(net));
            if let Some(prefix) = kept.next() {
                return Err(is_registrys(&format!("prefix {prefix}")));
            }
            changed(tunnel, asker, |overlay| overlay.remove_prefixes(&prefixes))
        }
        Request::PeerAdd {
            peer,
            endpoint,
            prefixes,
        } => {
            let mut spec = tunnel
                .config
                .complete(new_peer(&peer, endpoint.as_deref())?);
            check_mode(&spec.name, tunnel.config.is_encrypted())?;
            if let Some(endpoint) = spec.endpoint.as_ref().and_then(HostPort::literal) {
                reach::check_endpoint(tunnel.settings.listen, &tunnel.peers.overlay, endpoint)?;
            }
            check_new_prefixes(tunnel, &prefixes)?;
            spec.prefixes = prefixes;
            changed(tunnel, asker, |overlay| {
                overlay.add_peer(&spec, spec.prefixes.is_empty(), Origin::Runtime)
            })
        }
        Request::PeerDel { peer } => {
            let peer = tunnel.config.complete_name(parse_name(&peer)?);
            if tunnel.peers.overlay.is_registry_peer(&peer) {
                return Err(is_registrys(&format!("peer {peer}")));
            }
            changed(tunnel, asker, |overlay| overlay.remove_peers(&[peer]))
        }
        Request::Reload { dry_run: true } => rehearse_reload(tunnel).map(Answer::Reloaded),
        Request::Reload { dry_run: false } => {
            reload(tunnel, &asker.to_string()).map(Answer::Reloaded)
        }
        // The event loop handles these.
        Request::Stop {}
        | Request::Upgrade {}
        | Request::Takeover { .. }
        | Request::Capture { .. } => Err(Error::new("this cannot be asked for here")),
    }
}

/// What an operator cannot remove here.
fn is_registrys(what: &str) -> Error {
    let error = Error::new(format!("{what} is in the registry, and would come back"));
    error.hint("`fastvpn registry leave` takes a host out of it")
}

fn route_to(overlay: &Overlay, address: IpAddr) -> Result<Answer> {
    if overlay.is_outside(address) {
        return Err(Error::new(format!(
            "packets to {address} do not go through the tunnel: it is this host's own \
             address, or a peer's outside the tunnel"
        )));
    }
    let Some((prefix, peer)) = overlay.route_to(address) else {
        let what = format!("no peer has a prefix that {address} is in");
        return Err(Error::new(what));
    };
    Ok(Answer::Found(Found {
        address,
        prefix,
        peer: peer.name.to_string(),
        endpoint: peer.endpoint_learned(),
    }))
}

/// A peer's name as operators write it.
///
/// # Errors
/// When it is not a peer's name.
pub fn parse_name(text: &str) -> Result<PeerName> {
    parse_peer_name(text).map_err(|error| not_this(text, "a peer", &error))
}

/// A peer that is to be added: a plain one by where it is, one with a key by that, with
/// the endpoint if it has one.
///
/// # Errors
/// When one of the texts is not what it should be.
pub fn new_peer(peer: &str, endpoint: Option<&str>) -> Result<PeerSpec> {
    let name = parse_name(peer)?;
    let given = endpoint.map(|text| match parse_host_port(text) {
        Ok(place) => Ok(place),
        Err(error) => Err(not_this(text, "an endpoint", &error)),
    });
    let endpoint = match (&name, given.transpose()?) {
        (PeerName::Host(place), None) => Some(place.clone()),
        (PeerName::Key(_), given) => given,
        (PeerName::Host(_), Some(_)) => {
            let what = format!("peer {name} has no key, and is its endpoint by itself");
            return Err(Error::new(what));
        }
    };
    Ok(PeerSpec::new(name, endpoint))
}

fn not_this(text: &str, what: &str, error: &str) -> Error {
    // Escapes are longer than what they stand for.
    let quoted = format!("{:?}", shortened(text));
    Error::new(format!("{} is not {what}: {error}", shortened(&quoted)))
}

/// Makes a change to the overlay, all of it or nothing.
fn changed(
    tunnel: &mut Tunnel,
    asker: Asker,
    change: impl FnOnce(&mut Overlay) -> Result<()>,
) -> Result<Answer> {
    let mut next = tunnel.peers.overlay.clone();
    change(&mut next)?;
    let changes = Changes::between(&tunnel.peers.overlay, &next);
    tunnel.commit_overlay(next)?;
    let words = changes.words();
    if !words.is_empty() {
        tracing::info!(by = %asker, changes = words, "{words}, by {asker}");
    }
    Ok(Answer::Changed(to_changed(&changes)))
}

/// Makes sure that the tunnel can have these prefixes.
fn check_new_prefixes(tunnel: &Tunnel, prefixes: &[IpNet]) -> Result<()> {
    prefixes.iter().try_for_each(check_prefix)?;
    let own = &tunnel.peers.overlay.own;
    reach::check_prefixes(own, prefixes.iter().copied())?;
    check_ipv6_mtu(tunnel.settings.link.mtu_bytes, prefixes.iter().copied())
}

/// The tunnel, in numbers.
pub fn status(tunnel: &mut Tunnel) -> Status {
    tunnel.workers.count_socket_drops();
    tunnel.forget_capture_that_is_over();
    // The kernel may not have reported a change yet.
    tunnel.refresh_device();
    let (stats, link) = (tunnel.host.link_stats(), tunnel.host.link());
    let boottime_ns = Some(clock::now_ns());
    let snapshots = tunnel.workers.snapshots();
    let total = snapshots
        .iter()
        .fold(Snapshot::default(), |sum, worker| sum.plus(worker));
    let named = |(name, value): (&str, u64)| (name.to_string(), value);
    let counters = total.iter().filter(|(name, _)| !name.starts_with("drop_"));
    let workers = snapshots.iter();
    let (config, settings, overlay) = (&tunnel.config, &tunnel.settings, &tunnel.peers.overlay);
    let device = &tunnel.host.device;
    let file = config.file();
    let handshakes = tunnel.encryption.iter().flat_map(Encryption::counters);
    Status {
        version: env!("CARGO_PKG_VERSION").into(),
        pid: std::process::id(),
        uptime_seconds: tunnel.started.elapsed().as_secs(),
        boottime_ns,
        tun: device.name.clone(),
        tun_index: device.index,
        addresses: tunnel.addresses().to_vec(),
        mtu_bytes: link.map_or(settings.link.mtu_bytes, |link| link.mtu),
        listen: settings.listen.to_string(),
        own_ports: tunnel.workers.own_ports(),
        handshakes: handshakes.map(named).collect(),
        public_key: config.public_key().map(|key| key.to_string()),
        engine: tunnel.workers.engine().into(),
        offloads: announce::offloads(&tunnel.workers),
        aqm: config.aqm.to_string(),
        queue_limit: config.queue_limit.to_string(),
        hop: config.hop,
        keeps_routes: !config.no_routes,
        config_file: file.map(|path| path.display().to_string()),
        reload_error: tunnel.reload_error.clone(),
        upgrade_error: tunnel.upgrade_error.clone(),
        registry: tunnel.registry.as_ref().map(Registry::status),
        peers: overlay.peers().count(),
        prefixes: overlay.prefixes().count(),
        counters: counters.map(named).collect(),
        drops: total.drops().map(named).collect(),
        tun_queue_drops: stats.map(|stats| stats.tx_dropped),
        workers: workers
            .map(|worker| worker.iter().map(named).collect())
            .collect(),
        capture: tunnel.capture.as_ref().map(Capture::status),
    }
}

/// All peers, in numbers, in the order of their names.
pub fn peers(tunnel: &Tunnel) -> impl Iterator<Item = PeerStatus> {
    let (all, counts) = (
        tunnel.peers.overlay.peers_by_name(),
        tunnel.peers.overlay.prefix_counts(),
    );
    all.filter_map(move |peer| {
        let (hop, _) = tunnel.peers.overlay.find(&peer.name)?;
        Some(peer_status(tunnel, hop, peer, counts.get(&hop).copied()))
    })
}

fn peer_status(tunnel: &Tunnel, hop: NextHop, peer: &Peer, prefixes: Option<usize>) -> PeerStatus {
    let peers = &tunnel.peers;
    let sum = |count: fn(&PeerCounters) -> u64| peer.traffic.iter().map(count).sum::<u64>();
    let packets_received = sum(|worker| worker.packets_received.get());
    let now = Instant::now();
    // Before the first poll that sees it.
    let last_seen = peers.last_seen(hop);
    let last_seen = last_seen.or((packets_received > 0).then_some(now));
    let mut drops = BTreeMap::new();
    let inbound = peer.secure.iter();
    let inbound = inbound.flat_map(|secure| secure.sessions.drops.values());
    let outbound = peer.traffic.iter().flat_map(PeerCounters::drops);
    for (name, count) in outbound.chain(inbound) {
        if count > 0 {
            *drops.entry(name.to_string()).or_insert(0) += count;
        }
    }
    let liveness = peers.liveness(hop, now);
    let proven = peer.traffic.iter();
    let proven = proven.filter(|worker| worker.is_own_port_proven());
    PeerStatus {
        peer: peer.name.to_string(),
        wireguard: wireguard_status(tunnel, peer),
        endpoint: peer.endpoint_learned(),
        seen_port: peer.learned_port.or_else(|| peers.seen_port(hop)),
        own_ports_proven: proven.count(),
        is_suspended: peer.is_suspended,
        origin: peer.origin.as_str().into(),
        lease_left_seconds: lease_left_seconds(tunnel, peer),
        is_default: tunnel.peers.overlay.is_default(peer),
        prefixes: prefixes.unwrap_or(0),
        path_mtu_bytes: peer.path_mtu_bytes,
        packets_sent: sum(PeerCounters::packets_sent),
        bytes_sent: sum(PeerCounters::bytes_sent),
        packets_enqueued: sum(|worker| worker.packets_enqueued.get()),
        bytes_enqueued: sum(|worker| worker.bytes_enqueued.get()),
        packets_received,
        bytes_received: sum(|worker| worker.bytes_received.get()),
        last_seen_seconds: last_seen.map(|at| (now - at).as_secs()),
        state: liveness.as_ref().map(|(liveness, _)| *liveness),
        state_reason: liveness.and_then(|(_, reason)| reason),
        drops,
    }
}

/// How long a host's lease in the registry lasts, as far as that is known.
fn lease_left_seconds(tunnel: &Tunnel, peer: &Peer) -> Option<u64> {
    let registry = tunnel.registry.as_ref();
    let registry = registry.filter(|_| peer.origin == Origin::Registry)?;
    let left = registry.agent.leases().left(&peer.name.id())?;
    Some(left.as_secs())
}

fn wireguard_status(tunnel: &Tunnel, peer: &Peer) -> Option<WireGuardStatus> {
    let (secure, key) = (peer.secure.as_ref()?, peer.name.key()?);
    let latest = tunnel.encryption.as_ref();
    let latest = latest.and_then(|encryption| encryption.latest_handshake(&key));
    // A clock that was set back makes it lie ahead.
    let since = latest.map(|at| at.elapsed().unwrap_or_default());
    Some(WireGuardStatus {
        identity: secure.identity.clone(),
        has_preshared_key: secure.preshared_key.is_set(),
        persistent_keepalive_seconds: secure.persistent_keepalive.map(|every| every.as_secs()),
        latest_handshake_seconds: since.map(|since| since.as_secs()),
    })
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
