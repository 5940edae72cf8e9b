//! What a successor makes of its predecessor's manifest.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use ipnet::IpNet;

use super::reach;
use super::requests::parse_name;
use super::settings::{Settings, check_ipv6_mtu};
use super::takeover::{Manifest, RuntimePeer};
use crate::config::{Config, Wanted};
use crate::error::{Error, Result};
use crate::routing::overlay::{Origin, Overlay};

/// Makes sure that a successor's configuration fits what it takes over.
///
/// # Errors
/// Names the setting that does not.
pub fn check(config: &Config, settings: &Settings, manifest: &Manifest) -> Result<()> {
    let differs = |what: &str, ours: &dyn std::fmt::Display, theirs: &dyn std::fmt::Display| {
        Err(Error::new(format!(
            "cannot take over: this process wants {what} {ours}, the running one has {theirs}"
        ))
        .hint("stop the running one and start this one without --takeover"))
    };
    if config.tun != manifest.tun {
        return differs("the device", &config.tun, &manifest.tun);
    }
    if settings.listen != manifest.listen {
        return differs("to listen on", &settings.listen, &manifest.listen);
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

/// Puts what the device and the sockets were asked for at their start in the
/// place of what this process would ask for: that cannot change any more. Says
/// so where it differs.
pub fn keep_wanted(wanted: &mut Wanted, manifest: &Manifest) {
    let ([tso, uso], [segment, gro]) = (manifest.tun_wanted, manifest.udp_wanted);
    for (feature, ours, theirs) in [
        ("tso", &mut wanted.tso, tso),
        ("uso", &mut wanted.uso, uso),
        ("udp-segment", &mut wanted.udp_segment, segment),
        ("udp-gro", &mut wanted.udp_gro, gro),
    ] {
        if *ours != theirs {
            let (with, has) = match theirs {
                true => ("--without", "it"),
                false => ("leaving out --without", "none"),
            };
            tracing::warn!(
                "{with} {feature} takes effect at the next start: the running process has {has}"
            );
        }
        *ours = theirs;
    }
}

/// Adds what operators added to the predecessor. Their word is the later one:
/// prefixes that the configuration gives to other peers are taken from these.
///
/// # Errors
/// When an MTU of `mtu_bytes` is too small for it.
pub fn inherit(overlay: &mut Overlay, manifest: &Manifest, mtu_bytes: u32) -> Result<()> {
    for peer in &manifest.runtime_peers {
        if let Err(error) = inherit_peer(overlay, manifest.listen, peer) {
            left_out(&error);
        }
    }
    let mut prefixes: BTreeMap<&str, Vec<IpNet>> = BTreeMap::new();
    for (prefix, peer) in &manifest.runtime_prefixes {
        prefixes.entry(peer).or_default().push(*prefix);
    }
    for (peer, prefixes) in prefixes {
        if let Err(error) = inherit_prefixes(overlay, peer, &prefixes) {
            left_out(&error);
        }
    }
    check_ipv6_mtu(mtu_bytes, overlay.prefixes().map(|(prefix, ..)| prefix))
}

fn left_out(error: &Error) {
    tracing::warn!("left out some of what was added at run time: {error}");
}

fn inherit_peer(overlay: &mut Overlay, listen: SocketAddr, peer: &RuntimePeer) -> Result<()> {
    let name = parse_name(&peer.peer)?;
    // One that is configured by now is what the configuration makes of it, with
    // these prefixes besides; as after a reload.
    if overlay.find(&name).is_none() {
        if let Some(endpoint) = name.literal() {
            reach::check_endpoint(listen, overlay, endpoint)?;
        }
        let added = overlay.insert_peer(&name, peer.is_default, &[], Origin::Runtime);
        match added {
            // Another one takes what no prefix matches now.
            Err(error) if peer.is_default => {
                left_out(&error);
                overlay.insert_peer(&name, false, &[], Origin::Runtime)?;
            }
            result => result?,
        }
    }
    inherit_prefixes(overlay, &peer.peer, &peer.prefixes)
}

fn inherit_prefixes(overlay: &mut Overlay, peer: &str, prefixes: &[IpNet]) -> Result<()> {
    let name = parse_name(peer)?;
    let added = overlay.add_prefixes(&name, prefixes, Origin::Runtime, true);
    added.map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::parse::parse_peer;

    fn overlay(peers: &[&str]) -> Overlay {
        let mut overlay = Overlay::new(0);
        for peer in peers {
            let spec = parse_peer(peer).unwrap();
            overlay.add_peer(&spec, Origin::Config).unwrap();
        }
        overlay
    }

    fn manifest(peers: &[(&str, bool, &[&str])], prefixes: &[(&str, &str)]) -> Manifest {
        let net = |text: &&str| text.parse().unwrap();
        Manifest {
            ok: true,
            pid: 4711,
            version: "0.1.0".into(),
            protocol: 0,
            tun: String::new(),
            workers: 1,
            listen: "0.0.0.0:1".parse().unwrap(),
            tun_offloads: [true; 2],
            udp_offloads: [true; 2],
            tun_wanted: [true; 2],
            udp_wanted: [true; 2],
            is_steered: true,
            addresses: Vec::new(),
            runtime_peers: peers
                .iter()
                .map(|(peer, is_default, prefixes)| RuntimePeer {
                    peer: (*peer).into(),
                    is_default: *is_default,
                    prefixes: prefixes.iter().map(net).collect(),
                })
                .collect(),
            runtime_prefixes: prefixes
                .iter()
                .map(|(prefix, peer)| (net(prefix), (*peer).into()))
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
        let peers: &[(&str, bool, &[&str])] = &[("c:1", false, &["10.1.0.0/16", "10.9.0.0/16"])];
        let prefixes = [
            ("10.2.0.0/16", "b:1"),
            ("10.4.0.0/16", "gone:1"),
            ("10.5.0.0/16", "a:1"),
        ];
        inherit(&mut overlay, &manifest(peers, &prefixes), 1500).unwrap();
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
        let peers: &[(&str, bool, &[&str])] = &[
            ("b:1", true, &["10.8.0.0/16"]),
            ("c:1", true, &["10.9.0.0/16"]),
        ];
        inherit(&mut overlay, &manifest(peers, &[]), 1500).unwrap();
        assert_eq!(
            shown(&overlay),
            [
                "10.3.0.0/16 b:1 config",
                "10.8.0.0/16 b:1 runtime",
                "10.9.0.0/16 c:1 runtime",
            ]
        );
        let defaults = overlay.peers_by_name().filter(|peer| peer.is_default);
        assert_eq!(
            defaults.map(|peer| &peer.name.host).collect::<Vec<_>>(),
            ["a"]
        );
    }
    #[test]
    fn what_cannot_be_had_is_left_out_or_refused() {
        let own = "127.0.0.1:1";
        let peers: &[(&str, bool, &[&str])] = &[
            (own, false, &["10.8.0.0/16"]),
            ("c:1", false, &["fd01::/64"]),
        ];
        for mtu_bytes in [1279, 1280] {
            let mut overlay = overlay(&[]);
            let result = inherit(&mut overlay, &manifest(peers, &[]), mtu_bytes);
            assert_eq!(result.is_ok(), mtu_bytes == 1280, "{result:?}");
            assert_eq!(shown(&overlay), ["fd01::/64 c:1 runtime"]);
        }
    }
}
