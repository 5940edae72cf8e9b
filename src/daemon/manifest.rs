//! What a running tunnel tells a new process that takes it over, and what the new
//! process makes of it.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::key_text::KeyText;
use super::reach;
use super::requests::{new_peer, parse_name};
use super::resolve::Known;
use super::settings::Settings;
use super::tunnel::Tunnel;
use crate::config::{Config, Feature, HostPort, PeerSpec, parse_host_port};
use crate::error::{Error, Result};
use crate::routing::overlay::{Origin, Overlay, Peer};
use crate::wire::wireguard::keys::PresharedKey;

/// See the module's documentation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Always true: the form of all answers on the control socket.
    pub ok: bool,
    /// The old process's id.
    pub pid: u32,
    /// Its version.
    pub version: String,
    /// Name of the TUN device, as it was made.
    pub tun: String,
    /// Its index; `None` while it is in another network namespace.
    pub tun_index: Option<u32>,
    /// For each worker, whether it has a port of its own. Its descriptors are the TUN
    /// queue, the shared socket, and in that case its own. Then come the handshake socket
    /// of an encrypted tunnel, the control socket, if there is one, and the metrics'.
    pub own_ports: Vec<bool>,
    /// Address and port of the UDP sockets.
    pub listen: SocketAddr,
    /// Whether the tunnel is encrypted. The new process reads keys where this one did, but for
    /// those that `wg` has set.
    pub is_encrypted: bool,
    /// Whether it is an interface of which `wg` has set all.
    #[serde(default)]
    pub is_interface: bool,
    /// This host's key, if `wg` has set it.
    #[serde(default)]
    pub private_key: Option<KeyText>,
    /// Whether `wg` has set the port.
    #[serde(default)]
    pub is_listen_set: bool,
    /// The mark of the datagrams, if `wg` has set it.
    #[serde(default)]
    pub fwmark: Option<u32>,
    /// This host's identity, if its key follows from a shared secret: it stays what it is,
    /// whatever the routes to the peers have become.
    #[serde(default)]
    pub identity: Option<String>,
    /// GSO packets that the TUN device passes: TCP, UDP.
    pub tun_offloads: [bool; 2],
    /// Offloads of the UDP sockets: `UDP_SEGMENT`, `UDP_GRO`.
    pub udp_offloads: [bool; 2],
    /// Where metrics are served, if they are.
    #[serde(default)]
    pub metrics: Option<SocketAddr>,
    /// Features that the old process was told not to use.
    pub without: Vec<Feature>,
    /// Whether a flow's queue depends on the flow alone.
    pub is_steered: bool,
    /// The addresses that the old process gave the device.
    pub addresses: Vec<IpNet>,
    /// All peers.
    pub peers: Vec<KnownPeer>,
}

/// A peer, and what operators added of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KnownPeer {
    /// `HOST:PORT`, or a public key.
    pub peer: String,
    /// What its key follows from, if that is a shared secret.
    #[serde(default)]
    pub identity: Option<String>,
    /// `HOST:PORT` that a peer with a key was given.
    pub place: Option<String>,
    /// Whether `wg` has given it that place, in place of one that was configured.
    #[serde(default)]
    pub is_moved: bool,
    /// What it and this host share besides their keys, if that is not what is configured.
    #[serde(default)]
    pub preshared_key: Option<KeyText>,
    /// How often something is sent, if that is not what is configured; 0 for never.
    #[serde(default)]
    pub keepalive_seconds: Option<u64>,
    /// Where its datagrams go; `None` while its name does not resolve.
    pub endpoint: Option<SocketAddr>,
    /// It has sent from there, and was not given that endpoint.
    #[serde(default)]
    pub has_roamed: bool,
    /// Nothing is sent there: the path leads through the tunnel itself.
    pub is_suspended: bool,
    /// Whether operators added the peer itself.
    pub is_added: bool,
    /// Whether it takes what no prefix matches.
    pub is_default: bool,
    /// The prefixes that operators added.
    pub prefixes: Vec<IpNet>,
}

impl Manifest {
    /// What the old process hands over.
    pub fn of(tunnel: &Tunnel) -> Self {
        let (overlay, workers) = (&tunnel.peers.overlay, &tunnel.workers);
        let (tun, udp) = (workers.setup.tun, workers.udp_offloads);
        let descriptors = workers.descriptors.iter();
        let mut added: BTreeMap<_, Vec<_>> = BTreeMap::new();
        for (prefix, peer, _) in overlay
            .prefixes()
            .filter(|(.., origin)| *origin == Origin::Runtime)
        {
            added.entry(peer.name.id()).or_default().push(prefix);
        }
        let config = &tunnel.config;
        let specs = config.peers.iter();
        let specs: BTreeMap<_, _> = specs.map(|spec| (spec.name.id(), spec)).collect();
        let shared = config.shared_preshared_key().unwrap_or_default();
        let peers = overlay.peers_by_name().map(|peer| {
            let spec = specs.get(&peer.name.id()).copied();
            KnownPeer {
                is_default: overlay.is_default(peer),
                prefixes: added.remove(&peer.name.id()).unwrap_or_default(),
                ..KnownPeer::of(peer, spec, &shared)
            }
        });
        let by_wg = config.by_wg;
        let private_key = config.private_key.as_ref().filter(|_| by_wg.private_key);
        Self {
            ok: true,
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION").into(),
            tun: config.tun.clone(),
            tun_index: tunnel.host.device.index,
            own_ports: descriptors
                .map(|worker| worker.own_port.is_some())
                .collect(),
            listen: tunnel.settings.listen,
            is_encrypted: config.is_encrypted(),
            is_interface: config.interface.is_some(),
            private_key: private_key.map(|key| key.to_base64().into()),
            is_listen_set: by_wg.listen || config.interface.is_some(),
            fwmark: (by_wg.fwmark || config.interface.is_some()).then_some(config.fwmark),
            identity: config.own_identity.clone(),
            tun_offloads: [tun.tcp, tun.udp],
            udp_offloads: [udp.segment, udp.gro],
            // Whoever has the socket says so.
            metrics: None,
            without: config.without.clone(),
            is_steered: workers.is_steered,
            addresses: tunnel.settings.link.addresses.clone(),
            peers: peers.collect(),
        }
    }

    /// Makes sure that this process's configuration fits what it takes over.
    ///
    /// # Errors
    /// Names the setting that does not.
    pub fn check(&self, config: &Config, settings: &Settings) -> Result<()> {
        let (ours, theirs) = (settings.listen.to_string(), self.listen.to_string());
        for (what, ours, theirs) in [
            ("the device", &config.tun, &self.tun),
            ("to listen on", &ours, &theirs),
        ] {
            if ours != theirs {
                return Err(Error::new(format!(
                    "cannot take over: this process wants {what} {ours}, the running one has \
                     {theirs}"
                ))
                .hint("stop the running one and start this one without --takeover"));
            }
        }
        let queues = self.own_ports.len();
        if usize::from(config.queues) != queues {
            tracing::warn!(
                option = "queues",
                "--queues {} takes effect at the next start: the running process has {queues}",
                config.queues
            );
        }
        Ok(())
    }

    /// Makes sure that this process is to run the same kind of tunnel: one that is encrypted or
    /// is not, and an interface of which `wg` has set all or one with options of its own.
    ///
    /// # Errors
    /// Says how they differ.
    pub fn check_kind(&self, config: &Config) -> Result<()> {
        let name = &self.tun;
        let (what, hint) = match (self.is_interface, config.interface.is_some()) {
            (true, false) => (
                format!("{name} is configured by `wg`, and not by options and files"),
                format!("`fastvpn --takeover {name}` takes it over"),
            ),
            (false, true) => (
                format!("{name} is configured by options and files, and not by `wg` alone"),
                "start this one with the options of the running one".into(),
            ),
            _ if self.is_encrypted != config.is_encrypted() => {
                let of = |is_encrypted| if is_encrypted { "encrypted" } else { "plain" };
                let (ours, theirs) = (of(config.is_encrypted()), of(self.is_encrypted));
                (
                    format!("this process is to be {ours}, the running one is {theirs}"),
                    "stop the running one and start this one without --takeover".into(),
                )
            }
            _ => return Ok(()),
        };
        Err(Error::new(format!("cannot take over: {what}")).hint(hint))
    }

    /// Goes on with what `wg` has set of the port and the mark.
    pub fn keep_changes(&self, config: &mut Config) {
        if self.is_listen_set {
            config.listen = Some(self.listen);
            config.by_wg.listen = true;
        }
        if let Some(mark) = self.fwmark {
            config.fwmark = mark;
            config.by_wg.fwmark = true;
        }
    }

    /// Goes on with the private key that `wg` has set, if it has.
    ///
    /// # Errors
    /// When that is not a key.
    pub fn keep_private_key(&self, config: &mut Config) -> Result<()> {
        if let Some(key) = &self.private_key {
            config.private_key = Some(key.parse()?);
            config.by_wg.private_key = true;
        }
        Ok(())
    }

    /// Notes the offloads that the device and the sockets have as wanted, and those that
    /// they were to be without as not wanted: that cannot change any more.
    pub fn keep_offloads(&self, config: &mut Config) {
        let ([tso, uso], [segment, gro]) = (self.tun_offloads, self.udp_offloads);
        for (name, feature, in_use) in [
            ("tso", Feature::Tso, tso),
            ("uso", Feature::Uso, uso),
            ("udp-segment", Feature::UdpSegment, segment),
            ("udp-gro", Feature::UdpGro, gro),
        ] {
            if in_use && !config.uses(feature) {
                tracing::warn!(
                    option = "without",
                    "--without {name} takes effect at the next start: the running process has it"
                );
                config.without.retain(|without| *without != feature);
            } else if config.uses(feature) && self.without.contains(&feature) {
                tracing::warn!(
                    option = "without",
                    "leaving out --without {name} takes effect at the next start: the running \
                     process does without"
                );
                config.without.push(feature);
            }
        }
    }

    /// Has peers whose keys follow from a shared secret be known by those that follow from the
    /// one in `config`, which may be another.
    pub fn use_secret(&mut self, config: &Config) {
        for peer in &mut self.peers {
            let key = peer.identity.as_ref();
            if let Some(key) = key.and_then(|identity| config.key_of(identity)) {
                peer.peer = key.to_string();
            }
        }
    }

    /// Where the peers are, but for those with keys that `overlay` has elsewhere by now.
    pub fn known(&self, overlay: &Overlay) -> Known {
        let is_elsewhere = |peer: &&KnownPeer| {
            let name = parse_name(&peer.peer).ok();
            let found = name.and_then(|name| overlay.find(&name));
            found.is_some_and(|(_, found)| found.secure.is_some() && given(found) != peer.place)
        };
        let peers = self.peers.iter().filter(|peer| !is_elsewhere(peer));
        peers
            .filter_map(|peer| Some((peer.peer.clone(), (peer.endpoint?, peer.has_roamed))))
            .collect()
    }

    /// Adds what operators added to the old process. Their word is the later one:
    /// prefixes that the configuration gives to other peers are taken from these. And so is
    /// what they have changed. `shared`: the preshared key of peers that have no other.
    pub fn add_to(&self, overlay: &mut Overlay, shared: Option<&PresharedKey>) {
        let is_added = |peer: &&KnownPeer| peer.is_added || !peer.prefixes.is_empty();
        for peer in self.peers.iter().filter(is_added) {
            if let Err(error) = add_peer(overlay, self.listen, peer) {
                log_left_out(&error);
            }
        }
        // What `wg` has said of a peer counts, even that it has none.
        if let Some(key) = shared {
            overlay.share_preshared_key(key);
        }
        for peer in &self.peers {
            if let Err(error) = peer.change(overlay) {
                log_left_out(&error);
            }
        }
    }
}

impl KnownPeer {
    /// A peer that is configured by `spec`, if it is, and may have the preshared key that all
    /// `shared`. What the overlay knows of it is left out.
    fn of(peer: &Peer, spec: Option<&PeerSpec>, shared: &PresharedKey) -> Self {
        let secure = peer.secure.as_ref();
        let configured = spec.map_or(shared, |spec| &spec.preshared_key);
        let preshared_key = secure.map(|secure| &secure.preshared_key);
        let preshared_key = preshared_key.filter(|key| *key != configured);
        let configured = spec.and_then(|spec| spec.persistent_keepalive);
        let keepalive = secure.map(|secure| secure.persistent_keepalive);
        let keepalive = keepalive.filter(|every| *every != configured);
        Self {
            peer: peer.name.to_string(),
            identity: peer.identity().map(str::to_string),
            place: given(peer),
            is_moved: spec.is_some_and(|spec| spec.endpoint != peer.place),
            preshared_key: preshared_key.map(|key| key.to_base64().into()),
            keepalive_seconds: keepalive.map(|every| every.unwrap_or_default().as_secs()),
            endpoint: peer.endpoint_learned(),
            has_roamed: peer.has_roamed(),
            is_suspended: peer.is_suspended,
            is_added: peer.origin == Origin::Runtime,
            is_default: false,
            prefixes: Vec::new(),
        }
    }

    /// Makes the changes to a peer that is there, if it is.
    fn change(&self, overlay: &mut Overlay) -> Result<()> {
        let Some((hop, _)) = overlay.find(&parse_name(&self.peer)?) else {
            return Ok(());
        };
        if let Some(key) = &self.preshared_key {
            overlay.set_preshared_key(hop, &key.parse()?);
        }
        if let Some(seconds) = self.keepalive_seconds {
            let every = Duration::from_secs(seconds);
            overlay.set_keepalive(hop, Some(every).filter(|every| !every.is_zero()));
        }
        let place = self.place.as_ref().filter(|_| self.is_moved);
        if let Some(place) = place.and_then(|place| parse_host_port(place).ok()) {
            overlay.move_peer(hop, &place);
        }
        Ok(())
    }
}

/// The endpoint that a peer with a key was given.
fn given(peer: &Peer) -> Option<String> {
    let place = peer.place.as_ref().filter(|_| peer.secure.is_some());
    place.map(ToString::to_string)
}

fn log_left_out(error: &Error) {
    tracing::warn!(%error, "left out some of what was added at run time: {error}");
}

fn add_peer(overlay: &mut Overlay, listen: SocketAddr, peer: &KnownPeer) -> Result<()> {
    let mut spec = new_peer(&peer.peer, peer.place.as_deref())?;
    spec.identity.clone_from(&peer.identity);
    let name = &spec.name;
    // One that is configured by now is what the configuration makes of it, with
    // these prefixes besides; as after a reload.
    if peer.is_added && overlay.find(name).is_none() {
        if let Some(endpoint) = spec.endpoint.as_ref().and_then(HostPort::literal) {
            reach::check_endpoint(listen, overlay, endpoint)?;
        }
        let added = overlay.add_peer(&spec, peer.is_default, Origin::Runtime);
        match added {
            // Another one takes what no prefix matches now.
            Err(error) if peer.is_default => {
                log_left_out(&error);
                overlay.add_peer(&spec, false, Origin::Runtime)?;
            }
            result => result?,
        }
    }
    overlay.add_prefixes(name, &peer.prefixes, Origin::Runtime, true)
}

#[cfg(test)]
#[path = "manifest_tests.rs"]
mod tests;
