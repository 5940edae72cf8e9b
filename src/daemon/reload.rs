//! A reload: what is different in the configuration file is applied as a whole,
//! or not at all.

use super::announce;
use super::plan::{Plan, endpoints};
use super::tunnel::Tunnel;
use crate::config::Config;
use crate::control::protocol::{Changed, Reloaded};
use crate::error::{Error, Result};
use crate::host::link::LinkConfig;
use crate::routing::overlay::Changes;

/// Reads the configuration file again and applies what is different. `by`: who
/// wants it, for the log.
///
/// # Errors
/// When the file is bad or cannot be applied: nothing has changed then.
pub fn reload(tunnel: &mut Tunnel, by: &str) -> Result<Reloaded> {
    let result = read_again(tunnel).and_then(|(plan, report, changes)| {
        let old_mtu_bytes = tunnel.settings.link.mtu_bytes;
        tunnel.commit(plan)?;
        tunnel.peers.resolve_again();
        if tunnel.settings.link.mtu_bytes != old_mtu_bytes {
            announce::warn_of_fragments(tunnel);
        }
        Ok((report, changes))
    });
    tunnel.reload_error = result.as_ref().err().map(ToString::to_string);
    match &result {
        Ok((report, changes)) => {
            tracing::info!("reloaded: {}, by {by}", in_words(report, &changes.words()));
        }
        Err(error) => tracing::error!("not reloaded by {by}, nothing has changed: {error}"),
    }
    result.map(|(report, _)| report)
}

/// What the tunnel is to become, and what will be different.
fn read_again(tunnel: &mut Tunnel) -> Result<(Plan, Reloaded, Changes)> {
    let (old, in_force) = (&tunnel.config, &tunnel.settings);
    if old.config_file.is_none() {
        return Err(Error::new("there is no configuration file to read again")
            .hint("start fastvpn with --config FILE, or use `fastvpn peer` and `route`"));
    }
    let new = old.reread()?;
    let mut overlay = tunnel.peers.overlay.clone();
    let changes = overlay.configure(&new.peers)?;
    // What the file leaves open follows from its own peers, also from those
    // that are new.
    let resolved = endpoints(&new, &overlay);
    let prefixes = overlay.prefixes().map(|(prefix, ..)| prefix);
    let netlink = &mut tunnel.host.netlink;
    let settings = in_force.again((old, &new), &resolved, prefixes, netlink)?;
    let report = Reloaded {
        changed: to_changed(&changes),
        settings_changed: settings_changed((old, &in_force.link), (&new, &settings.link)),
        needs_restart: old.needs_restart(&new),
    };
    let mut plan = Plan {
        config: old.with_changes_of(new),
        settings,
        overlay,
    };
    let device = tunnel.host.device.index;
    for (_, error) in plan.check_addresses(netlink, device, &in_force.link.addresses)? {
        tracing::warn!("{error}; trying again");
    }
    Ok((plan, report, changes))
}

/// Keys, other than of peers, that will say something else from now on.
fn settings_changed(old: (&Config, &LinkConfig), new: (&Config, &LinkConfig)) -> Vec<String> {
    let ((old, old_link), (new, new_link)) = (old, new);
    [
        ("txqueuelen", old_link.txqueuelen != new_link.txqueuelen),
        ("mtu", old_link.mtu_bytes != new_link.mtu_bytes),
        ("address", old_link.addresses != new_link.addresses),
        ("hop", old.hop != new.hop),
        ("no-routes", old.no_routes != new.no_routes),
        ("route", old.routes != new.routes),
    ]
    .into_iter()
    .filter(|(_, differs)| *differs)
    .map(|(key, _)| key.to_string())
    .collect()
}

/// What a change came to, as operators are told.
pub fn to_changed(changes: &Changes) -> Changed {
    Changed {
        prefixes_added: changes.prefixes_added,
        prefixes_removed: changes.prefixes_removed,
        peers_added: changes.peers_added,
        peers_removed: changes.peers_removed,
    }
}

/// What a reload came to, for the log.
fn in_words(report: &Reloaded, differences: &str) -> String {
    let mut words = Vec::new();
    if !differences.is_empty() {
        words.push(differences.to_string());
    }
    if !report.settings_changed.is_empty() {
        words.push(format!("changed: {}", report.settings_changed.join(", ")));
    }
    if words.is_empty() {
        words.push("nothing has changed".into());
    }
    if !report.needs_restart.is_empty() {
        let keys = report.needs_restart.join(", ");
        words.push(format!("at the next start: {keys}"));
    }
    words.join("; ")
}
