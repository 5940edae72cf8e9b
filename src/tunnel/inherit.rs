//! What a successor makes of its predecessor's manifest.

use super::operator::parse_name;
use super::takeover::{Manifest, RuntimePeer};
use crate::config::{Config, Settled, Wanted};
use crate::control::overlay::{Origin, Overlay};
use crate::error::{Error, Result};

/// Makes sure that a successor's configuration fits what it takes over.
///
/// # Errors
/// Names the setting that does not.
pub fn check(config: &Config, settled: &Settled, manifest: &Manifest) -> Result<()> {
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

/// Puts what the device and the sockets were asked for at their start in the
/// place of what this process would ask for: that cannot change any more. Says
/// so where it differs.
pub fn keep_wanted(wanted: &mut Wanted, manifest: &Manifest) {
    let ([tso, uso], [segment, gro]) = (manifest.tun_wanted, manifest.udp_wanted);
    for (feature, ours, theirs) in [
        ("tso", &mut wanted.tun.tcp, tso),
        ("uso", &mut wanted.tun.udp, uso),
        ("udp-segment", &mut wanted.udp.segment, segment),
        ("udp-gro", &mut wanted.udp.gro, gro),
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
