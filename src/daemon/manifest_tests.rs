use super::*;
use crate::config::parse_peer;
use crate::daemon::resolve;

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
        is_interface: false,
        private_key: None,
        is_listen_set: false,
        fwmark: None,
        identity: None,
        tun_offloads: [true; 2],
        udp_offloads: [true; 2],
        metrics: None,
        without: Vec::new(),
        is_steered: true,
        addresses: Vec::new(),
        peers: peers
            .iter()
            .map(|(peer, is_added, is_default, prefixes)| KnownPeer {
                peer: (*peer).into(),
                identity: None,
                place: None,
                is_moved: false,
                preshared_key: None,
                keepalive_seconds: None,
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
    manifest(peers).add_to(&mut overlay, None);
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
    manifest(peers).add_to(&mut overlay, None);
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
    manifest(peers).add_to(&mut overlay, None);
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
        manifest.add_to(&mut overlay, None);
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
    manifest.add_to(&mut overlay, None);
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
    let mut config = Config::default();
    assert!(manifest.check_kind(&config).is_ok());
    config.private_key_file = Some("key".into());
    let refused = manifest.check_kind(&config).unwrap_err().to_string();
    assert!(refused.contains("to be encrypted, the running one is plain"));
    manifest.is_encrypted = true;
    assert!(manifest.check_kind(&config).is_ok());
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

/// A peer's key, and a shared one.
const KEY: &str = "xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg=";
const SHARED: &str = "dwdtCnMYpX08FsFyUbJmRd9ML4frwJkqsXf7pR25LCo=";

/// Of a peer that is configured, and of one that is not.
#[test]
fn what_wg_has_set_of_a_peer_goes_on() {
    let none = PresharedKey::default();
    let shared: PresharedKey = SHARED.parse().unwrap();
    let configured = format!("{KEY}@10.0.0.1=10.9.0.0/16");
    let spec = parse_peer(&configured).unwrap();
    for is_configured in [true, false] {
        let spec = Some(&spec).filter(|_| is_configured);
        let mut old = match is_configured {
            true => overlay(&[&configured]),
            false => Overlay::default(),
        };
        if !is_configured {
            let peer = new_peer(KEY, None).unwrap();
            old.add_peer(&peer, false, Origin::Runtime).unwrap();
        }
        let known = |old: &Overlay| {
            let peer = old.peers_by_name().next().unwrap();
            KnownPeer::of(peer, spec, &none)
        };
        let unchanged = known(&old);
        assert!(unchanged.preshared_key.is_none() && unchanged.keepalive_seconds.is_none());
        assert!(!unchanged.is_moved);
        old.set_preshared_key(0, &shared);
        old.set_keepalive(0, Some(Duration::from_secs(25)));
        old.move_peer(0, &parse_host_port("10.0.0.2:7").unwrap());
        let mut manifest = manifest(&[]);
        manifest.peers = vec![known(&old)];
        assert!(!format!("{manifest:?}").contains(SHARED));
        let text = serde_json::to_string(&manifest).unwrap();
        let received: Manifest = serde_json::from_str(&text).unwrap();
        assert_eq!(received, manifest);
        let configured = is_configured.then_some(&configured[..]);
        let mut overlay = overlay(configured.as_slice());
        received.add_to(&mut overlay, None);
        let peer = overlay.peers_by_name().next().unwrap();
        let secure = peer.secure.as_ref().unwrap();
        assert_eq!(secure.preshared_key, shared);
        assert_eq!(secure.persistent_keepalive, Some(Duration::from_secs(25)));
        assert_eq!(peer.endpoint, "10.0.0.2:7".parse().ok());
    }
}

/// What `wg` has taken away is not there again.
#[test]
fn a_preshared_key_that_wg_has_removed_stays_removed() {
    let mut spec = parse_peer(&format!("{KEY}=10.9.0.0/16")).unwrap();
    spec.preshared_key = SHARED.parse().unwrap();
    spec.persistent_keepalive = Some(Duration::from_secs(25));
    let mut old = Overlay::default();
    old.add_peer(&spec, false, Origin::Config).unwrap();
    let mut new = old.clone();
    old.set_preshared_key(0, &PresharedKey::default());
    old.set_keepalive(0, None);
    let mut manifest = manifest(&[]);
    let peer = old.peers_by_name().next().unwrap();
    manifest.peers = vec![KnownPeer::of(peer, Some(&spec), &PresharedKey::default())];
    // Nor if all hosts share one.
    manifest.add_to(&mut new, Some(&SHARED.parse().unwrap()));
    let secure = new.peers_by_name().next().unwrap().secure.as_ref().unwrap();
    assert!(!secure.preshared_key.is_set());
    assert_eq!(secure.persistent_keepalive, None);
}

/// Until a reload; the port and the mark until a restart.
#[test]
fn what_wg_has_set_of_a_tunnel_goes_on() {
    let key = crate::wire::wireguard::keys::PrivateKey::generate();
    let mut manifest = manifest(&[]);
    let mut config = Config::default();
    manifest.keep_changes(&mut config);
    manifest.keep_private_key(&mut config).unwrap();
    assert_eq!(config, Config::default());
    manifest.private_key = Some(key.to_base64().into());
    manifest.fwmark = Some(7);
    manifest.is_listen_set = true;
    assert!(!format!("{manifest:?}").contains(&*key.to_base64()));
    manifest.keep_changes(&mut config);
    manifest.keep_private_key(&mut config).unwrap();
    assert_eq!(config.private_key, Some(key));
    assert_eq!((config.fwmark, config.listen), (7, Some(manifest.listen)));
    let reloaded = config.with_changes_of(Config::default());
    assert!(reloaded.private_key.is_none() && !reloaded.by_wg.private_key);
    assert!(reloaded.by_wg.listen && reloaded.by_wg.fwmark);
    manifest.private_key = Some(zeroize::Zeroizing::new("nonsense".to_string()).into());
    let refused = manifest.keep_private_key(&mut config).unwrap_err();
    assert!(!refused.to_string().contains("nonsense"), "{refused}");
}

#[test]
fn an_interface_is_taken_over_by_its_name_alone() {
    let mut manifest = manifest(&[]);
    manifest.is_encrypted = true;
    let mut config = Config::default();
    config.private_key_file = Some("key".into());
    let refused = |manifest: &Manifest, config: &Config| {
        let checked = manifest.check_kind(config);
        checked.map_or_else(|error| error.to_string(), |()| String::new())
    };
    assert_eq!(refused(&manifest, &config), "");
    manifest.is_interface = true;
    assert!(refused(&manifest, &config).contains("configured by `wg`"));
    config.interface = Some("wg0".into());
    assert_eq!(refused(&manifest, &config), "");
    manifest.is_interface = false;
    assert!(refused(&manifest, &config).contains("not by `wg` alone"));
}
