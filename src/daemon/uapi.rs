//! Requests of `wg(8)`: each change becomes a plan, like all others, and is put in force as a
//! whole or not at all.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use nix::errno::Errno;

use super::plan::Plan;
use super::settings::check_ipv6_mtu;
use super::tunnel::Tunnel;
use crate::config::{Config, PeerName, PeerSpec};
use crate::control::credentials::Asker;
use crate::control::uapi::server::{Outcome, Server};
use crate::control::uapi::{Device, Peer, PeerChange, Request, Set};
use crate::counters::PeerCounters;
use crate::error::{Error, Result};
use crate::io::udp::Sockets;
use crate::routing::overlay::{Changes, Origin, Overlay};
use crate::wire::wireguard::keys::PublicKey;

/// How long, and how often, the process that had the name of an interface is waited for: its
/// device goes a moment before all the rest of it.
const NAME_WAIT_MAX: Duration = Duration::from_secs(1);
const NAME_WAIT_STEP: Duration = Duration::from_millis(5);

/// The same for the port, while no other change is made.
const PORT_WAIT_MAX: Duration = Duration::from_millis(500);
const PORT_WAIT_STEP: Duration = Duration::from_millis(10);

/// Opens the socket of an interface that has nothing without `wg`, once nobody else has it.
/// `None`: the interface has a configuration of its own.
///
/// # Errors
/// When it cannot be opened, as while another process has it.
pub fn claim(config: &Config) -> Result<Option<Server>> {
    if config.interface.is_none() {
        return Ok(None);
    }
    let deadline = Instant::now() + NAME_WAIT_MAX;
    loop {
        match Server::start(&config.tun) {
            Ok(server) => return Ok(Some(server)),
            Err(error) if error.errno() != Some(libc::EADDRINUSE) => return Err(error),
            Err(error) if Instant::now() > deadline => {
                return Err(error.hint(
                    "another process has an interface of this name: stop it, or take over from \
                     it with --takeover",
                ));
            }
            Err(_) => std::thread::sleep(NAME_WAIT_STEP),
        }
    }
}

/// Opens the socket of an encrypted tunnel, if it can be opened. `None` in plain mode.
pub fn serve(config: &Config) -> Option<Server> {
    if !config.is_encrypted() {
        return None;
    }
    match Server::start(&config.tun) {
        Ok(server) => Some(server),
        // A tunnel of the same name in another network namespace: there is one name for all.
        Err(error) if error.errno() == Some(libc::EADDRINUSE) => {
            tracing::info!(%error, "`wg` shows another tunnel of this name: {error}");
            None
        }
        // Nobody asked for it.
        Err(error) => {
            tracing::warn!(%error, "`wg` cannot be used: {error}");
            None
        }
    }
}

/// Opens the socket once the process that had it before has let go of it.
pub fn retry(config: &Config) -> Option<Server> {
    Server::start(&config.tun).ok()
}

/// Does what is wanted. `is_leaving`: another process is taking over, and would not know of
/// a change.
pub fn answer(tunnel: &mut Tunnel, request: Request, asker: Asker, is_leaving: bool) -> Outcome {
    let set = match request {
        Request::Get => return Ok(Some(device(tunnel))),
        Request::Set(_) if is_leaving => return Err(Errno::EBUSY),
        Request::Set(set) => set,
    };
    match change(tunnel, &set) {
        Ok(words) => {
            if !words.is_empty() {
                tracing::info!(by = %asker, changes = words, "{words}, by {asker}");
            }
            Ok(None)
        }
        Err(error) => {
            // `wg` can show only an errno.
            tracing::warn!(by = %asker, %error, "refused what {asker} asked for by `wg`: {error}");
            Err(error.errno().map_or(Errno::EINVAL, Errno::from_raw))
        }
    }
}

/// Makes a change, all of it or nothing; in words, what is different.
fn change(tunnel: &mut Tunnel, set: &Set) -> Result<String> {
    let old_mark = tunnel.config.fwmark;
    let mark = set.firewall_mark.unwrap_or(old_mark);
    if mark == old_mark {
        return change_all_else(tunnel, set);
    }
    // First: whether a peer can be reached may depend on it.
    let words = tunnel
        .set_mark(mark)
        .and_then(|()| change_all_else(tunnel, set))
        .inspect_err(|_| {
            if let Err(error) = tunnel.set_mark(old_mark) {
                tracing::error!(%error, "{error}");
            }
        })?;
    tunnel.config.by_wg.fwmark = true;
    tunnel.check_routes();
    let marked = format!("datagrams marked with {mark}");
    let words = [marked, words]
        .into_iter()
        .filter(|words| !words.is_empty());
    Ok(words.collect::<Vec<_>>().join(", "))
}

fn change_all_else(tunnel: &mut Tunnel, set: &Set) -> Result<String> {
    let (mut config, mut settings) = (tunnel.config.clone(), tunnel.settings.clone());
    let listen = settings.listen;
    // Port 0 is any port.
    if let Some(port) = set.listen_port.filter(|port| *port != 0) {
        settings.listen.set_port(port);
    }
    let is_port_new = settings.listen != listen;
    let sockets = is_port_new.then(|| {
        config.listen = Some(settings.listen);
        config.by_wg.listen = true;
        open_sockets(tunnel, settings.listen)
    });
    let sockets = sockets.transpose()?;
    if let Some(key) = &set.private_key {
        config.private_key.clone_from(key);
    }
    if !config.is_encrypted() {
        let what = "a tunnel whose private key is in its configuration file needs one";
        return Err(Error::new(what));
    }
    let is_key_new = config.private_key != tunnel.config.private_key;
    config.by_wg.private_key |= is_key_new;
    let mut overlay = tunnel.peers.overlay.clone();
    apply(&mut overlay, set, config.public_key())?;
    let changes = Changes::between(&tunnel.peers.overlay, &overlay);
    let prefixes = overlay.prefixes().map(|(prefix, ..)| prefix);
    check_ipv6_mtu(settings.link.mtu_bytes, prefixes)?;
    let mut plan = Plan {
        config,
        settings,
        overlay,
    };
    let addresses = &tunnel.settings.link.addresses;
    let (netlink, device) = (&mut tunnel.host.netlink, tunnel.host.device.index);
    for (_, error) in plan.check_addresses(netlink, device, addresses)? {
        tunnel.peers.log_unusable(&error, Instant::now());
    }
    tunnel.commit(plan)?;
    if let Some(sockets) = sockets {
        tunnel.use_sockets(sockets)?;
    }
    let listen = is_port_new.then(|| format!("listening on {}", tunnel.settings.listen));
    let key = is_key_new.then(|| "private-key changed".to_string());
    let words = listen.into_iter().chain(key).chain([changes.words()]);
    let words: Vec<_> = words.filter(|words| !words.is_empty()).collect();
    Ok(words.join(", "))
}

/// Opens sockets on another port. That may have been another process's, which has ended: where
/// that had io_uring, the kernel frees it some milliseconds later.
fn open_sockets(tunnel: &Tunnel, listen: SocketAddr) -> Result<Sockets> {
    let deadline = Instant::now() + PORT_WAIT_MAX;
    loop {
        match tunnel.open_sockets(listen) {
            Err(error) if error.errno() == Some(libc::EADDRINUSE) && Instant::now() < deadline => {
                std::thread::sleep(PORT_WAIT_STEP);
            }
            result => return result,
        }
    }
}

/// Makes the changes to the peers. This host itself, by its key `own`, is not one of them,
/// and what is said of it is ignored, as by the kernel.
fn apply(overlay: &mut Overlay, set: &Set, own: Option<PublicKey>) -> Result<()> {
    if set.replaces_peers {
        overlay.remove_all_peers();
    }
    if let Some(own) = own.map(PeerName::Key)
        && overlay.find(&own).is_some()
    {
        overlay.remove_peers(&[own])?;
    }
    let peers = set.peers.iter();
    let mut others = peers.filter(|peer| Some(peer.public_key) != own);
    others.try_for_each(|peer| apply_to(overlay, peer))
}

fn apply_to(overlay: &mut Overlay, change: &PeerChange) -> Result<()> {
    let name = PeerName::Key(change.public_key);
    let hop = match overlay.find(&name) {
        Some(_) if change.is_removed => return overlay.remove_peers(&[name]),
        Some((hop, _)) => hop,
        None if change.is_removed || change.updates_only => return Ok(()),
        None => {
            let spec = PeerSpec::new(name.clone(), None);
            overlay.add_peer(&spec, false, Origin::Runtime)?;
            match overlay.find(&name) {
                Some((hop, _)) => hop,
                None => return Ok(()),
            }
        }
    };
    if let Some(key) = &change.preshared_key {
        overlay.set_preshared_key(hop, key);
    }
    if let Some(every) = change.persistent_keepalive {
        overlay.set_keepalive(hop, every);
    }
    if let Some(place) = &change.endpoint {
        overlay.move_peer(hop, place);
    }
    if change.replaces_allowed_ips {
        overlay.take_prefixes(hop);
    }
    for allowed_ip in &change.allowed_ips {
        let prefix = allowed_ip.prefix;
        if allowed_ip.is_removed {
            overlay.take_prefix(hop, prefix);
        } else if !overlay.has_prefix(hop, prefix) {
            overlay.add_prefixes(&name, &[prefix], Origin::Runtime, true)?;
        }
    }
    Ok(())
}

/// All that there is to say.
fn device(tunnel: &Tunnel) -> Device {
    let overlay = &tunnel.peers.overlay;
    let mut prefixes = overlay.prefixes_by_peer();
    let peers = overlay.peers().filter_map(|(hop, peer)| {
        let (key, secure) = (peer.name.key()?, peer.secure.as_ref()?);
        let sum = |count: fn(&PeerCounters) -> u64| peer.traffic.iter().map(count).sum();
        let encryption = tunnel.encryption.as_ref();
        // They know first where it has roamed to.
        Some(Peer {
            public_key: key,
            preshared_key: secure.preshared_key.clone(),
            endpoint: secure.sessions.address().or(peer.endpoint),
            latest_handshake: encryption.and_then(|it| it.latest_handshake(&key)),
            bytes_sent: sum(PeerCounters::bytes_sent),
            bytes_received: sum(|worker| worker.bytes_received.get()),
            persistent_keepalive: secure.persistent_keepalive,
            allowed_ips: prefixes.remove(&hop).unwrap_or_default(),
        })
    });
    Device {
        private_key: tunnel.config.private_key.clone(),
        listen_port: tunnel.settings.listen.port(),
        firewall_mark: tunnel.config.fwmark,
        peers: peers.collect(),
    }
}
