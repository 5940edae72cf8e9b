//! What a running tunnel tells a new process that takes it over, and what the new
//! process makes of it.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::reach;
use super::requests::{new_peer, parse_name};
use super::resolve::Known;
use super::settings::Settings;
use super::tunnel::Tunnel;
use crate::config::{Config, Feature, HostPort};
use crate::error::{Error, Result};
use crate::routing::overlay::{Origin, Overlay, Peer};

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
    /// of an encrypted tunnel, and the control socket, if there is one.
    pub own_ports: Vec<bool>,
    /// Address and port of the UDP sockets.
    pub listen: SocketAddr,
    /// Whether the tunnel is encrypted. Keys are not handed over: the new process reads them
    /// where this one did.
    pub is_encrypted: bool,
    /// This host's identity, if its key follows from a shared secret: it stays what it is,
    /// whatever the routes to the peers have become.
    #[serde(default)]
    pub identity: Option<String>,
    /// GSO packets that the TUN device passes: TCP, UDP.
    pub tun_offloads: [bool; 2],
    /// Offloads of the UDP sockets: `UDP_SEGMENT`, `UDP_GRO`.
    pub udp_offloads: [bool; 2],
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
        let peers = overlay.peers_by_name().map(|peer| KnownPeer {
            peer: peer.name.to_string(),
            identity: peer.identity().map(str::to_string),
            place: given(peer),
            endpoint: peer.endpoint_learned(),
            has_roamed: peer.has_roamed(),
            is_suspended: peer.is_suspended,
            is_added: peer.origin == Origin::Runtime,
            is_default: overlay.is_default(peer),
            prefixes: added.remove(&peer.name.id()).unwrap_or_default(),
        });
        Self {
            ok: true,
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION").into(),
            tun: tunnel.config.tun.clone(),
            tun_index: tunnel.host.device.index,
            own_ports: descriptors
                .map(|worker| worker.own_port.is_some())
                .collect(),
            listen: tunnel.settings.listen,
            is_encrypted: tunnel.config.is_encrypted(),
            identity: tunnel.config.own_identity.clone(),
            tun_offloads: [tun.tcp, tun.udp],
            udp_offloads: [udp.segment, udp.gro],
            without: tunnel.config.without.clone(),
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
        if self.is_encrypted != config.is_encrypted() {
            let of = |is_encrypted| if is_encrypted { "encrypted" } else { "plain" };
            let ours = of(config.is_encrypted());
            let what = format!("cannot take over: this process is to be {ours}, the running one");
            let what = format!("{what} is {}", of(self.is_encrypted));
            return Err(
                Error::new(what).hint("stop the running one and start this one without --takeover")
            );
        }
        let queues = self.own_ports.len();
        if usize::from(config.queues) != queues {
            tracing::warn!(
                "--queues {} takes effect at the next start: the running process has {queues}",
                config.queues
            );
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
                    "--without {name} takes effect at the next start: the running process has it"
                );
                config.without.retain(|without| *without != feature);
            } else if config.uses(feature) && self.without.contains(&feature) {
                tracing::warn!(
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
    /// prefixes that the configuration gives to other peers are taken from these.
    pub fn add_to(&self, overlay: &mut Overlay) {
        for peer in &self.peers {
            if (peer.is_added || !peer.prefixes.is_empty())
                && let Err(error) = add_peer(overlay, self.listen, peer)
            {
                log_left_out(&error);
            }
        }
    }
}

/// The endpoint that a peer with a key was given.
fn given(peer: &Peer) -> Option<String> {
    let place = peer.place.as_ref().filter(|_| peer.secure.is_some());
    place.map(ToString::to_string)
}

fn log_left_out(error: &Error) {
    tracing::warn!("left out some of what was added at run time: {error}");
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
mod tests {
    use super::*;
    use crate::config::parse_peer;
    use crate::daemon::resolve;
    use crate::host::link::LinkConfig;

    fn overlay(peers: &[&str]) -> Overlay {
        let mut overlay = Overlay::default();
        for peer in peers {
            let spec = parse_peer(peer).unwrap();
            let is_default = spec.prefixes.is_empty();
            overlay.add_peer(&spec, is_default, Origin::Config).unwrap();
        }
        overlay
    }

    fn manifest(peers: &[(&str, bool, bool, &[&str])]) -> Manifest {
        let net = |text: &&str| text.parse().unwrap();
        Manifest {
            ok: true,
            pid: 4711,
            version: "0.1.0".into(),
            tun: String::new(),
            tun_index: None,
            own_ports: vec![false],
            listen: "0.0.0.0:1".parse().unwrap(),
            is_encrypted: false,
            identity: None,
            tun_offloads: [true; 2],
            udp_offloads: [true; 2],
            without: Vec::new(),
            is_steered: true,
            addresses: Vec::new(),
            peers: peers
                .iter()
                .map(|(peer, is_added, is_default, prefixes)| KnownPeer {
                    peer: (*peer).into(),
                    identity: None,
                    place: None,
                    endpoint: None,
                    has_roamed: false,
                    is_suspended: false,
                    is_added: *is_added,
                    is_default: *is_default,
                    prefixes: prefixes.iter().map(net).collect(),
                })
                .collect(),
        }
    }

    fn shown(overlay: &Overlay) -> Vec<String> {
        overlay
            .prefixes()
            .map(|(prefix, peer, origin)| format!("{prefix} {} {}", peer.name, origin.as_str()))
            .collect()
    }

    #[test]
    fn what_operators_added_goes_before_the_configuration() {
        let mut overlay = overlay(&["a:1=10.1.0.0/16,10.2.0.0/16", "b:1=10.3.0.0/16"]);
        let peers: &[(&str, bool, bool, &[&str])] = &[
            ("a:1", false, false, &["10.5.0.0/16"]),
            ("b:1", false, false, &["10.2.0.0/16"]),
            ("c:1", true, false, &["10.1.0.0/16", "10.9.0.0/16"]),
            ("gone:1", false, false, &["10.4.0.0/16"]),
            // Configured by then, and not any more.
            ("other:1", false, false, &[]),
        ];
        manifest(peers).add_to(&mut overlay);
        assert_eq!(
            shown(&overlay),
            [
                "10.1.0.0/16 c:1 runtime",
                "10.2.0.0/16 b:1 runtime",
                "10.3.0.0/16 b:1 config",
                "10.5.0.0/16 a:1 runtime",
                "10.9.0.0/16 c:1 runtime",
            ]
        );
    }

    #[test]
    fn no_peer_is_dropped_for_what_clashes() {
        let mut overlay = overlay(&["a:1", "b:1=10.3.0.0/16"]);
        let peers: &[(&str, bool, bool, &[&str])] = &[
            ("b:1", true, true, &["10.8.0.0/16"]),
            ("c:1", true, true, &["10.9.0.0/16"]),
        ];
        manifest(peers).add_to(&mut overlay);
        assert_eq!(
            shown(&overlay),
            [
                "10.3.0.0/16 b:1 config",
                "10.8.0.0/16 b:1 runtime",
                "10.9.0.0/16 c:1 runtime",
            ]
        );
        let defaults = overlay
            .peers_by_name()
            .filter(|peer| overlay.is_default(peer));
        assert_eq!(
            defaults
                .map(|peer| peer.name.to_string())
                .collect::<Vec<_>>(),
            ["a:1"]
        );
    }

    #[test]
    fn a_peer_that_is_this_host_is_left_out() {
        let peers: &[(&str, bool, bool, &[&str])] = &[
            ("127.0.0.1:1", true, false, &["10.8.0.0/16"]),
            ("c:1", true, false, &["fd01::/64"]),
        ];
        let mut overlay = overlay(&[]);
        manifest(peers).add_to(&mut overlay);
        assert_eq!(shown(&overlay), ["fd01::/64 c:1 runtime"]);
    }

    /// Also where it roamed to, unless it was configured to be elsewhere meanwhile.
    #[test]
    fn a_peer_with_a_key_is_handed_over() {
        const KEY: &str = "xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg=";
        let roamed: SocketAddr = "192.0.2.7:1024".parse().unwrap();
        let mut manifest = manifest(&[(KEY, true, false, &["10.8.0.0/16"])]);
        manifest.peers[0].place = Some("10.0.0.1:8285".into());
        manifest.peers[0].endpoint = Some(roamed);
        manifest.peers[0].has_roamed = true;
        for (given, endpoint) in [
            ("", Some(roamed)),
            ("@10.0.0.1", Some(roamed)),
            ("@10.0.0.2:1", "10.0.0.2:1".parse().ok()),
            ("@far.example", None),
        ] {
            let configured = format!("{KEY}{given}=10.9.0.0/16");
            let configured = (!given.is_empty()).then_some(&configured[..]);
            let mut overlay = overlay(configured.as_slice());
            manifest.add_to(&mut overlay);
            let known = manifest.known(&overlay);
            resolve::set_known(&mut overlay, &known, "0.0.0.0:1".parse().unwrap());
            let peer = overlay.peers_by_name().next().unwrap();
            assert_eq!(peer.name.to_string(), KEY);
            assert_eq!(peer.endpoint, endpoint, "{given}");
            assert_eq!(peer.has_roamed(), endpoint == Some(roamed));
            assert!(
                shown(&overlay)
                    .iter()
                    .any(|route| route.starts_with("10.8"))
            );
        }
    }

    /// Which may say another key by then.
    #[test]
    fn identities_of_peers_are_handed_over() {
        use std::ffi::OsStr;

        use crate::wire::wireguard::secret::SharedSecret;

        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), SharedSecret::generate()).unwrap();
        let words = [OsStr::new("--secret-file"), file.path().as_os_str()];
        let config = Config::from_words(words).unwrap();
        const OLD: &str = "xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg=";
        let mut manifest = manifest(&[(OLD, true, false, &["10.8.0.0/16"])]);
        manifest.peers[0].identity = Some("gate".into());
        manifest.peers[0].endpoint = "192.0.2.7:1024".parse().ok();
        let text = serde_json::to_string(&manifest).unwrap();
        let mut manifest: Manifest = serde_json::from_str(&text).unwrap();
        manifest.use_secret(&config);
        let mut overlay = overlay(&[]);
        manifest.add_to(&mut overlay);
        let peer = overlay.peers_by_name().next().unwrap();
        assert_eq!(peer.name.key(), config.key_of("gate"));
        assert_eq!(peer.identity(), Some("gate"));
        let known = manifest.known(&overlay);
        assert!(known.contains_key(&peer.name.to_string()));
    }

    /// So a name server's next answer counts as it did before.
    #[test]
    fn a_name_that_has_resolved_has_not_roamed() {
        const KEY: &str = "xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg=";
        let configured = format!("{KEY}@far.example");
        let mut overlay = overlay(&[&configured]);
        let mut manifest = manifest(&[(KEY, false, false, &[])]);
        manifest.peers[0].place = Some("far.example:8285".into());
        manifest.peers[0].endpoint = "192.0.2.7:8285".parse().ok();
        let known = manifest.known(&overlay);
        resolve::set_known(&mut overlay, &known, "0.0.0.0:1".parse().unwrap());
        let peer = overlay.peers_by_name().next().unwrap();
        assert_eq!(peer.endpoint, manifest.peers[0].endpoint);
        assert!(!peer.has_roamed());
    }

    #[test]
    fn a_plain_tunnel_is_not_taken_over_by_an_encrypted_one() {
        let mut manifest = manifest(&[]);
        let settings = Settings {
            listen: manifest.listen,
            link: LinkConfig {
                addresses: Vec::new(),
                mtu_bytes: 1420,
                txqueuelen: 1,
            },
        };
        let mut config = Config::default();
        let check = |manifest: &Manifest, config: &Config| {
            let checked = manifest.check(config, &settings);
            checked.map_err(|error| error.to_string())
        };
        assert_eq!(check(&manifest, &config), Ok(()));
        config.private_key_file = Some("key".into());
        let refused = check(&manifest, &config).unwrap_err();
        assert!(refused.contains("to be encrypted, the running one is plain"));
        manifest.is_encrypted = true;
        assert_eq!(check(&manifest, &config), Ok(()));
    }

    #[test]
    fn offloads_that_are_in_use_stay_wanted() {
        let mut manifest = manifest(&[]);
        manifest.tun_offloads = [true, false];
        let mut config = Config::default();
        config.without = vec![Feature::Tso, Feature::Uso, Feature::UdpGro];
        manifest.keep_offloads(&mut config);
        assert_eq!(config.without, [Feature::Uso]);
    }

    /// The kernel is not to blame for them, and a reload names the difference.
    #[test]
    fn offloads_that_the_old_process_was_to_be_without_stay_unwanted() {
        let mut manifest = manifest(&[]);
        manifest.udp_offloads = [false; 2];
        manifest.without = vec![Feature::UdpGro];
        let mut config = Config::default();
        let file = config.clone();
        manifest.keep_offloads(&mut config);
        assert_eq!(config.without, [Feature::UdpGro]);
        assert_eq!(config.needs_restart(&file), ["without"]);
        // The next new process that leaves it out finds no difference.
        manifest.keep_offloads(&mut config);
        assert_eq!(config.without, [Feature::UdpGro]);
    }
}
