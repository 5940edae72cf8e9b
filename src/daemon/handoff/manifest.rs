//! What is handed over, in words: what the old process says of itself, and what the
//! new one makes of it.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::config::{Config, Feature};
use crate::daemon::reach;
use crate::daemon::requests::parse_name;
use crate::daemon::settings::{Settings, check_ipv6_mtu};
use crate::daemon::tunnel::Tunnel;
use crate::error::{Error, Result};
use crate::routing::overlay::{Origin, Overlay};

/// See the module's documentation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Always true: the form of all answers on the control socket.
    pub ok: bool,
    /// The old process's id.
    pub pid: u32,
    /// Its version.
    pub version: String,
    /// Name of the TUN device.
    pub tun: String,
    /// For each worker, whether it has a port of its own. Its descriptors are the TUN
    /// queue, the shared socket, and in that case its own. That of the control socket
    /// comes last, if there is one.
    pub own_ports: Vec<bool>,
    /// Address and port of the UDP sockets.
    pub listen: SocketAddr,
    /// GSO packets that the TUN device passes: TCP, UDP.
    pub tun_offloads: [bool; 2],
    /// Offloads of the UDP sockets: `UDP_SEGMENT`, `UDP_GRO`.
    pub udp_offloads: [bool; 2],
    /// Which of the device's were asked of the kernel.
    pub tun_wanted: [bool; 2],
    /// Which of the sockets' were asked of the kernel.
    pub udp_wanted: [bool; 2],
    /// Whether a flow's queue depends on the flow alone.
    pub is_steered: bool,
    /// The addresses that the old process gave the device.
    pub addresses: Vec<IpNet>,
    /// What operators added while it ran.
    pub runtime_peers: Vec<RuntimePeer>,
}

/// A peer that operators added, or gave prefixes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RuntimePeer {
    /// `HOST:PORT`.
    pub peer: String,
    /// Whether the peer itself was added, too.
    pub is_added: bool,
    /// Whether it takes what no prefix matches.
    pub is_default: bool,
    /// The prefixes that were added.
    pub prefixes: Vec<IpNet>,
}

impl Manifest {
    /// What the old process hands over.
    pub fn of(tunnel: &Tunnel) -> Self {
        let (overlay, uses) = (&tunnel.peers.overlay, |feature| tunnel.config.uses(feature));
        let (tun, udp) = (tunnel.workers.tun_offloads(), tunnel.workers.udp_offloads());
        let mut prefixes_of: BTreeMap<_, Vec<_>> = BTreeMap::new();
        for (prefix, peer, origin) in overlay.prefixes() {
            if [peer.origin, origin].contains(&Origin::Runtime) {
                prefixes_of.entry(peer.name.key()).or_default().push(prefix);
            }
        }
        let runtime_peers = overlay.peers_by_name().filter_map(|peer| {
            let prefixes = prefixes_of.remove(&peer.name.key());
            let is_added = peer.origin == Origin::Runtime;
            (is_added || prefixes.is_some()).then(|| RuntimePeer {
                peer: peer.name.to_string(),
                is_added,
                is_default: overlay.is_default(peer),
                prefixes: prefixes.unwrap_or_default(),
            })
        });
        Self {
            ok: true,
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION").into(),
            tun: tunnel.config.tun.clone(),
            own_ports: tunnel
                .workers
                .own_ports()
                .iter()
                .map(Option::is_some)
                .collect(),
            listen: tunnel.settings.listen,
            tun_offloads: [tun.tcp, tun.udp],
            udp_offloads: [udp.segment, udp.gro],
            tun_wanted: [Feature::Tso, Feature::Uso].map(uses),
            udp_wanted: [Feature::UdpSegment, Feature::UdpGro].map(uses),
            is_steered: tunnel.workers.is_steered,
            addresses: tunnel.settings.link.addresses.clone(),
            runtime_peers: runtime_peers.collect(),
        }
    }

    /// Makes sure that this process's configuration fits what it takes over.
    ///
    /// # Errors
    /// Names the setting that does not.
    pub fn check(&self, config: &Config, settings: &Settings) -> Result<()> {
        let differs = |what: &str, ours: &dyn std::fmt::Display, theirs: &dyn std::fmt::Display| {
            Err(Error::new(format!(
                "cannot take over: this process wants {what} {ours}, the running one has {theirs}"
            ))
            .hint("stop the running one and start this one without --takeover"))
        };
        if config.tun != self.tun {
            return differs("the device", &config.tun, &self.tun);
        }
        if settings.listen != self.listen {
            return differs("to listen on", &settings.listen, &self.listen);
        }
        if usize::from(config.queues) != self.own_ports.len() {
            tracing::warn!(
                "--queues {} takes effect at the next start: the running process has {}",
                config.queues,
                self.own_ports.len()
            );
        }
        Ok(())
    }

    /// Puts what the device and the sockets were asked for at their start in the
    /// place of what this process would ask for: that cannot change any more. Says
    /// so where it differs.
    pub fn keep_wanted(&self, config: &mut Config) {
        let ([tso, uso], [segment, gro]) = (self.tun_wanted, self.udp_wanted);
        for (name, feature, theirs) in [
            ("tso", Feature::Tso, tso),
            ("uso", Feature::Uso, uso),
            ("udp-segment", Feature::UdpSegment, segment),
            ("udp-gro", Feature::UdpGro, gro),
        ] {
            if config.uses(feature) == theirs {
                continue;
            }
            let (with, has) = match theirs {
                true => ("--without", "it"),
                false => ("leaving out --without", "none"),
            };
            tracing::warn!(
                "{with} {name} takes effect at the next start: the running process has {has}"
            );
            match theirs {
                true => config.without.retain(|without| *without != feature),
                false => config.without.push(feature),
            }
        }
    }

    /// Adds what operators added to the old process. Their word is the later one:
    /// prefixes that the configuration gives to other peers are taken from these.
    ///
    /// # Errors
    /// When an MTU of `mtu_bytes` is too small for it.
    pub fn add_to(&self, overlay: &mut Overlay, mtu_bytes: u32) -> Result<()> {
        for peer in &self.runtime_peers {
            if let Err(error) = add_peer(overlay, self.listen, peer) {
                left_out(&error);
            }
        }
        check_ipv6_mtu(mtu_bytes, overlay.prefixes().map(|(prefix, ..)| prefix))
    }
}

fn left_out(error: &Error) {
    tracing::warn!("left out some of what was added at run time: {error}");
}

fn add_peer(overlay: &mut Overlay, listen: SocketAddr, peer: &RuntimePeer) -> Result<()> {
    let name = parse_name(&peer.peer)?;
    // One that is configured by now is what the configuration makes of it, with
    // these prefixes besides; as after a reload.
    if peer.is_added && overlay.find(&name).is_none() {
        if let Some(endpoint) = name.literal() {
            reach::check_endpoint(listen, overlay, endpoint)?;
        }
        let added = overlay.add_peer(&name, peer.is_default, &[], Origin::Runtime);
        match added {
            // Another one takes what no prefix matches now.
            Err(error) if peer.is_default => {
                left_out(&error);
                overlay.add_peer(&name, false, &[], Origin::Runtime)?;
            }
            result => result?,
        }
    }
    let added = overlay.add_prefixes(&name, &peer.prefixes, Origin::Runtime, true);
    added.map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::parse_peer;

    fn overlay(peers: &[&str]) -> Overlay {
        let mut overlay = Overlay::default();
        for peer in peers {
            let spec = parse_peer(peer).unwrap();
            overlay
                .add_peer(
                    &spec.name,
                    spec.prefixes.is_empty(),
                    &spec.prefixes,
                    Origin::Config,
                )
                .unwrap();
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
            own_ports: vec![false],
            listen: "0.0.0.0:1".parse().unwrap(),
            tun_offloads: [true; 2],
            udp_offloads: [true; 2],
            tun_wanted: [true; 2],
            udp_wanted: [true; 2],
            is_steered: true,
            addresses: Vec::new(),
            runtime_peers: peers
                .iter()
                .map(|(peer, is_added, is_default, prefixes)| RuntimePeer {
                    peer: (*peer).into(),
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
        ];
        manifest(peers).add_to(&mut overlay, 1500).unwrap();
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
        manifest(peers).add_to(&mut overlay, 1500).unwrap();
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
            defaults.map(|peer| &peer.name.host).collect::<Vec<_>>(),
            ["a"]
        );
    }
    #[test]
    fn what_cannot_be_had_is_left_out_or_refused() {
        let own = "127.0.0.1:1";
        let peers: &[(&str, bool, bool, &[&str])] = &[
            (own, true, false, &["10.8.0.0/16"]),
            ("c:1", true, false, &["fd01::/64"]),
        ];
        for mtu_bytes in [1279, 1280] {
            let mut overlay = overlay(&[]);
            let result = manifest(peers).add_to(&mut overlay, mtu_bytes);
            assert_eq!(result.is_ok(), mtu_bytes == 1280, "{result:?}");
            assert_eq!(shown(&overlay), ["fd01::/64 c:1 runtime"]);
        }
    }
}
