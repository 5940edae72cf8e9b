//! A reload: what is different in the configuration file is applied as a whole,
//! or not at all.

use std::time::Instant;

use super::announce;
use super::plan::Plan;
use super::settings::listen_address;
use super::tunnel::Tunnel;
use crate::control::protocol::{Changed, Reloaded};
use crate::error::{Error, Result};
use crate::routing::overlay::Changes;

/// Reads the configuration file again and applies what is different. `by`: who
/// wants it, for the log.
///
/// # Errors
/// When the file is bad or cannot be applied: nothing has changed then.
pub fn reload(tunnel: &mut Tunnel, by: &str) -> Result<Reloaded> {
    let result = try_to_reload(tunnel);
    tunnel.reload_error = result.as_ref().err().map(ToString::to_string);
    match &result {
        Ok((_, words)) => tracing::info!("reloaded: {words}, by {by}"),
        Err(error) => tracing::error!("not reloaded by {by}, nothing has changed: {error}"),
    }
    result.map(|(report, _)| report)
}

/// Tells also in words what is different.
fn try_to_reload(tunnel: &mut Tunnel) -> Result<(Reloaded, String)> {
    let (old, in_force) = (&tunnel.config, &tunnel.settings);
    if old.file().is_none() {
        return Err(Error::new("there is no configuration file to read again")
            .hint("start fastvpn with --config FILE or --wg-config FILE, or use `fastvpn peer` and `route`"));
    }
    let new = old.reread()?;
    if new.is_encrypted() != old.is_encrypted() {
        let what = "a tunnel that runs cannot become encrypted, or cease to be";
        return Err(Error::new(what).hint("start it again"));
    }
    if new.needs_identity() {
        let what = "what this host's identity is by its address is found out at a start only";
        return Err(Error::new(what).hint("give `identity`, or start it again"));
    }
    for note in new.notes.iter().filter(|note| !old.notes.contains(note)) {
        tracing::warn!("{note}");
    }
    let mut overlay = tunnel.peers.overlay.clone();
    let changes = overlay.configure(&new.peers)?;
    // What the file leaves open follows from its own peers, also from those
    // that are new.
    let netlink = &mut tunnel.host.netlink;
    let settings = in_force.again((old, &new), &overlay, netlink)?;
    let (link, old_link) = (&settings.link, &in_force.link);
    let is_mtu_new = link.mtu_bytes != old_link.mtu_bytes;
    let settings_changed = [
        ("txqueuelen", link.txqueuelen != old_link.txqueuelen),
        ("mtu", is_mtu_new),
        ("address", link.addresses != old_link.addresses),
        ("hop", new.hop != old.hop),
        ("no-routes", new.no_routes != old.no_routes),
        ("route", new.routes != old.routes),
        ("private-key", new.private_key != old.private_key),
    ];
    let differing = settings_changed.iter().filter(|(_, differs)| *differs);
    // One that is written and in force already is no other.
    let is_listen_new = listen_address(&new, &[]) != in_force.listen;
    let mut needs_restart = old.needs_restart(&new);
    needs_restart.retain(|key| key != "listen" || is_listen_new);
    let report = Reloaded {
        changed: to_changed(&changes),
        settings_changed: differing.map(|(key, _)| key.to_string()).collect(),
        needs_restart,
    };
    let mut plan = Plan {
        config: old.with_changes_of(new),
        settings,
        overlay,
    };
    let device = tunnel.host.device.index;
    for (_, error) in plan.check_addresses(netlink, device, &old_link.addresses)? {
        tunnel.peers.log_unusable(&error, Instant::now());
    }
    tunnel.commit(plan)?;
    tunnel.peers.resolve_again();
    if is_mtu_new {
        announce::warn_of_fragments(tunnel);
    }
    let words = report.words(changes.words());
    Ok((report, words))
}

/// What a change came to, as operators are told.
pub fn to_changed(changes: &Changes) -> Changed {
    Changed {
        prefixes_added: changes.prefixes_added,
        prefixes_removed: changes.prefixes_removed,
        peers_added: changes.peers_added,
        peers_removed: changes.peers_removed,
        peers_changed: changes.peers_changed,
    }
}
