//! A reload: what is different in the configuration file is applied as a whole,
//! or not at all.

use std::time::Instant;

use super::announce;
use super::plan::{Plan, SetAside, check_own_key, kernel_routes};
use super::settings::listen_address;
use super::tunnel::Tunnel;
use crate::config::Config;
use crate::control::protocol::{Changed, Reloaded};
use crate::error::{Error, Result};
use crate::host::routes;
use crate::routing::overlay::{Changes, Origin, Overlay, Peer};

/// Reads the configuration file again and applies what is different. `by`: who
/// wants it, for the log.
///
/// # Errors
/// When the file is bad or cannot be applied: nothing has changed then.
pub fn reload(tunnel: &mut Tunnel, by: &str) -> Result<Reloaded> {
    let result = try_to_reload(tunnel);
    tunnel.reload_error = result.as_ref().err().map(ToString::to_string);
    match &result {
        Ok((_, words)) => tracing::info!(by, changes = words, "reloaded: {words}, by {by}"),
        Err(error) => {
            tracing::error!(by, %error, "not reloaded by {by}, nothing has changed: {error}")
        }
    }
    result.map(|(report, _)| report)
}

/// What a reload would come to now, as far as can be told without changing anything.
///
/// # Errors
/// As of [`reload`].
pub fn rehearse_reload(tunnel: &mut Tunnel) -> Result<Reloaded> {
    let Prepared {
        mut plan, report, ..
    } = prepare(tunnel)?;
    check_own_key(&plan.config, &plan.overlay)?;
    let (netlink, device) = (&mut tunnel.host.netlink, tunnel.host.device.index);
    // One in another namespace has no routes here.
    if device.is_some() {
        let wanted = kernel_routes(&plan.config, &plan.overlay);
        routes::check_free(netlink, device, &wanted)?;
        let suspended = plan.overlay.peers().filter(|(_, peer)| peer.is_suspended);
        let suspended = suspended.filter_map(|(_, peer)| peer.endpoint).collect();
        plan.check_paths(netlink, device, &suspended)?;
    }
    Ok(report)
}

/// A reload that can be put in force.
struct Prepared {
    plan: Plan,
    /// What is different, and that in words.
    report: Reloaded,
    words: String,
    is_mtu_new: bool,
    is_masq_new: bool,
    /// What of the file is not done.
    notes: Vec<String>,
    /// Peers that cannot be used yet.
    aside: SetAside,
}

/// Tells also in words what is different.
fn try_to_reload(tunnel: &mut Tunnel) -> Result<(Reloaded, String)> {
    let prepared = prepare(tunnel)?;
    for note in &prepared.notes {
        tracing::warn!("{note}");
    }
    for (_, error) in prepared.aside {
        tunnel.peers.log_unusable(&error, Instant::now());
    }
    // Before anything changes: there may be no nft.
    let masquerade = match prepared.is_masq_new {
        true => Some(tunnel.new_masquerade(prepared.plan.config.ip_masq)?),
        false => None,
    };
    tunnel.commit(prepared.plan)?;
    if let Some(masquerade) = masquerade {
        tunnel.masquerade = masquerade;
    }
    tunnel.peers.resolve_again();
    if prepared.is_mtu_new {
        announce::warn_of_fragments(tunnel);
    }
    if (prepared.is_mtu_new || prepared.is_masq_new)
        && let Err(error) = tunnel.write_subnet_file()
    {
        tracing::error!(%error, "container tools still read the old settings: {error}");
    }
    Ok((prepared.report, prepared.words))
}

/// Reads the file, and checks what it says against this host and the running tunnel.
fn prepare(tunnel: &mut Tunnel) -> Result<Prepared> {
    let (old, in_force) = (&tunnel.config, &tunnel.settings);
    if old.file().is_none() {
        return Err(Error::new("there is no configuration file to read again")
            .hint("start fastvpn with --config FILE or --wg-config FILE, or use `fastvpn peer` and `route`"));
    }
    let mut new = old.reread()?;
    if let Some(registry) = &tunnel.registry {
        registry.settle(&mut new)?;
    }
    if new.is_encrypted() != old.is_encrypted() {
        let what = "a tunnel that runs cannot become encrypted, or cease to be";
        return Err(Error::new(what).hint("start it again"));
    }
    if new.needs_identity() {
        let what = "what this host's identity is by its address is found out at a start only";
        return Err(Error::new(what).hint("give `identity`, or start it again"));
    }
    let notes = new.notes.iter().filter(|note| !old.notes.contains(note));
    let notes = notes.cloned().collect();
    let mut overlay = tunnel.peers.overlay.clone();
    follow_secret(&mut overlay, old, &new)?;
    overlay.configure(&new.peers)?;
    let changes = Changes::between(&tunnel.peers.overlay, &overlay);
    // What the file leaves open follows from its own peers, also from those
    // that are new.
    let netlink = &mut tunnel.host.netlink;
    let settings = in_force.again((old, &new), &overlay, netlink)?;
    let (link, old_link) = (&settings.link, &in_force.link);
    let is_mtu_new = link.mtu_bytes != old_link.mtu_bytes;
    let is_masq_new = new.ip_masq != old.ip_masq;
    let settings_changed = [
        ("txqueuelen", link.txqueuelen != old_link.txqueuelen),
        ("mtu", is_mtu_new),
        ("address", link.addresses != old_link.addresses),
        ("hop", new.hop != old.hop),
        ("keepalive", new.keepalive_seconds != old.keepalive_seconds),
        ("no-routes", new.no_routes != old.no_routes),
        ("route", new.routes != old.routes),
        ("private-key", new.private_key != old.private_key),
        ("ip-masq", is_masq_new),
    ];
    let differing = settings_changed.iter().filter(|(_, differs)| *differs);
    // One that is in force already is not new.
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
    let aside = plan.check_addresses(netlink, device, &old_link.addresses)?;
    Ok(Prepared {
        plan,
        words: report.words(changes.words()),
        report,
        is_mtu_new,
        is_masq_new,
        notes,
        aside,
    })
}

/// Has the peers whose keys follow from the `old` secret, also those that were added at run
/// time, follow the `new` one, if that is another.
///
/// # Errors
/// Names the peers that cannot, since they are known by their keys alone or there is no
/// secret any more. They could not be reached: `overlay` is not to be used then.
fn follow_secret(overlay: &mut Overlay, old: &Config, new: &Config) -> Result<()> {
    let (old_key, new_key) = (old.shared_preshared_key(), new.shared_preshared_key());
    let Some(old_key) = old_key.filter(|old_key| new_key.as_ref() != Some(old_key)) else {
        return Ok(());
    };
    if let Some(new_key) = new_key {
        overlay.rekey(|identity| new.key_of(identity), &new_key)?;
    }
    let has_old = |peer: &&Peer| {
        let secure = peer.secure.as_ref();
        peer.origin == Origin::Runtime && secure.is_some_and(|it| it.preshared_key == old_key)
    };
    let left: Vec<_> = overlay.peers_by_name().filter(has_old).collect();
    let Some(first) = left.first() else {
        return Ok(());
    };
    let more = match left.len() {
        1 => String::new(),
        count => format!(" and {} more", count - 1),
    };
    let what = format!(
        "peer {}{more}, added at run time, would be left with the old secret",
        first.name
    );
    Err(Error::new(what).hint("`fastvpn peer del` removes it; then reload again"))
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

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;

    use super::*;
    use crate::config::{HostPort, PeerName, PeerSpec, parse_peer};
    use crate::wire::wireguard::keys::PrivateKey;
    use crate::wire::wireguard::secret::SharedSecret;

    /// A configuration with a secret of its own, or with a private key.
    fn config(option: &str) -> Config {
        let file = tempfile::NamedTempFile::new().unwrap();
        let text = match option {
            "--secret-file" => SharedSecret::generate(),
            _ => PrivateKey::generate().to_base64(),
        };
        std::fs::write(file.path(), text).unwrap();
        Config::from_words([OsStr::new(option), file.path().as_os_str()]).unwrap()
    }

    fn add(overlay: &mut Overlay, spec: &PeerSpec, origin: Origin) {
        overlay.add_peer(spec, false, origin).unwrap();
    }

    #[test]
    fn peers_that_were_added_follow_a_new_secret() {
        let (old, new) = (config("--secret-file"), config("--secret-file"));
        let mut overlay = Overlay::default();
        let spec = |host: &str| {
            let host = host.to_string();
            let place = HostPort { host, port: 8285 };
            PeerSpec::new(PeerName::Host(place.clone()), Some(place))
        };
        for (host, origin) in [("10.0.0.2", Origin::Config), ("gate", Origin::Runtime)] {
            add(&mut overlay, &old.complete(spec(host)), origin);
        }
        // One with a key of its own has nothing to do with the secret.
        let own = PrivateKey::generate().public();
        let own = parse_peer(&own.to_string()).unwrap();
        add(&mut overlay, &own, Origin::Runtime);
        let before = overlay.clone();
        follow_secret(&mut overlay, &old, &old).unwrap();
        assert!(overlay.find(&old.complete(spec("gate")).name).is_some());
        follow_secret(&mut overlay, &old, &new).unwrap();
        for host in ["10.0.0.2", "gate"] {
            let wanted = new.complete(spec(host));
            let (_, peer) = overlay.find(&wanted.name).unwrap();
            let shared = &peer.secure.as_ref().unwrap().preshared_key;
            assert_eq!(*shared, wanted.preshared_key);
        }
        assert!(overlay.find(&own.name).is_some());
        // Without a secret, the one that was added has no key any more.
        let refused = follow_secret(&mut before.clone(), &old, &config("--private-key"));
        let refused = refused.unwrap_err().to_string();
        let gate = old.complete(spec("gate")).name;
        assert!(
            refused.contains(&format!("peer {gate}, added")),
            "{refused}"
        );
        assert!(refused.contains("old secret"), "{refused}");
    }

    /// Whose identity nobody knows.
    #[test]
    fn a_peer_that_cannot_follow_a_new_secret_is_named() {
        let (old, new) = (config("--secret-file"), config("--secret-file"));
        let mut overlay = Overlay::default();
        let peer = parse_peer(&PrivateKey::generate().public().to_string()).unwrap();
        add(&mut overlay, &old.complete(peer.clone()), Origin::Runtime);
        let refused = follow_secret(&mut overlay, &old, &new)
            .unwrap_err()
            .to_string();
        assert!(
            refused.contains(&format!("peer {}, added", peer.name)),
            "{refused}"
        );
    }
}
