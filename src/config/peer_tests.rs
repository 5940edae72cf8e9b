use proptest::prelude::*;

use super::*;

const KEY: &str = "xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg=";

#[test]
fn names_are_told_from_addresses() {
    let place = |text: &str| parse_host_port(text).unwrap();
    for text in ["vpn.example.org", "fe80::1%eth0"] {
        assert_eq!(place(text).literal(), None, "{text}");
    }
    assert_eq!(
        place("::ffff:10.0.0.1").literal(),
        "10.0.0.1:8285".parse().ok()
    );
    let id = |text: &str| parse_peer_name(text).unwrap().id();
    assert_eq!(id("fd00::0:1"), id("[fd00::1]:8285"));
    assert_eq!(id("VPN.example."), id("vpn.example"));
    assert_ne!(id("vpn.example:1"), id("vpn.example:2"));
    assert_ne!(id(KEY), id("vpn.example"));
}

#[test]
fn plain_peers_are_read() {
    for (text, name, prefixes) in [
        (
            "vpn.example.org:99=10.1.0.0/16,fd00:1::/64",
            "vpn.example.org:99",
            &["10.1.0.0/16", "fd00:1::/64"][..],
        ),
        ("10.0.0.2", "10.0.0.2:8285", &[]),
        ("fd00::1=10.1.2.3", "[fd00::1]:8285", &["10.1.2.3/32"]),
        ("[fe80::1%eth0]:9=::/0", "[fe80::1%eth0]:9", &["::/0"]),
        // As long as a key, but for what follows.
        (
            "a23456789b123456789c123456789d123456789e123=10.1.0.0/16",
            "a23456789b123456789c123456789d123456789e123:8285",
            &["10.1.0.0/16"],
        ),
    ] {
        let peer = parse_peer(text).unwrap();
        assert_eq!(peer.name.to_string(), name);
        assert_eq!(peer.endpoint.map(PeerName::Host), Some(peer.name));
        let read: Vec<_> = peer.prefixes.iter().map(ToString::to_string).collect();
        assert_eq!(read, prefixes);
    }
    for bad in [
        "=10.1.0.0/16",
        "a=",
        "a=10.1.0.0/16,",
        "a=b",
        "a=10.1.0.0/33",
        "a,b",
        "[a]]",
        "a%eth0",
        "10.0.0.2%eth0",
        "a:%eth0:b",
        "[fe80::1%]",
        "user@host",
    ] {
        assert!(parse_peer(bad).is_err(), "{bad:?}");
    }
    // What is too long is not quoted.
    let long = "9".repeat(1 << 20);
    for long in [long.clone(), format!("a:{long}"), format!("[a]{long}")] {
        assert!(parse_peer_name(&long).unwrap_err().len() < 100);
    }
}

#[test]
fn peers_with_keys_are_read() {
    for (rest, endpoint, prefixes) in [
        ("", None, &[][..]),
        ("@10.0.0.2", Some("10.0.0.2:8285"), &[]),
        ("@[fd00::1]:51820", Some("[fd00::1]:51820"), &[]),
        (
            "@vpn.example.org:51820=10.1.0.0/16,fd00:1::/64",
            Some("vpn.example.org:51820"),
            &["10.1.0.0/16", "fd00:1::/64"],
        ),
        ("=10.1.2.3", None, &["10.1.2.3/32"]),
    ] {
        let peer = parse_peer(&format!("{KEY}{rest}")).unwrap();
        assert_eq!(peer.name.to_string(), KEY);
        let read = peer.endpoint.map(|endpoint| endpoint.to_string());
        assert_eq!(read.as_deref(), endpoint);
        let read: Vec<_> = peer.prefixes.iter().map(ToString::to_string).collect();
        assert_eq!(read, prefixes);
    }
    for bad in [
        "@",
        "@a@b",
        "=",
        "@a=",
        "x",
        "@:1",
        "@a=10.1.0.0/33",
        ":51820",
    ] {
        let text = format!("{KEY}{bad}");
        assert!(parse_peer(&text).is_err(), "{text}");
    }
    assert!(parse_peer_name(&format!("{KEY}@10.0.0.2")).is_err());
}

/// A key with a bit too many, or one character too few, is neither another key nor a host.
#[test]
fn what_is_almost_a_key_is_refused() {
    let (most, all) = (KEY.trim_end_matches('='), KEY);
    for bad in [
        format!("{}9=@10.0.0.2", &most[..42]),
        format!("{most}@10.0.0.2"),
        format!("{}=@10.0.0.2", &most[..42]),
        format!("{}-={}", &most[..42], "@10.0.0.2"),
    ] {
        let error = parse_peer(&bad).unwrap_err();
        assert!(error.contains("not a public key"), "{bad}: {error}");
    }
    assert!(parse_peer(&format!("{all}{all}")).is_err());
}

#[test]
fn host_and_port_are_read() {
    let parse = |text: &str| parse_host_port(text).map(|e| (e.host, e.port));
    let ok = |host: &str, port| Ok((host.to_string(), port));
    assert_eq!(parse("10.211.55.123:8285"), ok("10.211.55.123", 8285));
    assert_eq!(parse("10.211.55.123"), ok("10.211.55.123", 8285));
    assert_eq!(parse("vpn.example.org:99"), ok("vpn.example.org", 99));
    assert_eq!(parse("fd00::1"), ok("fd00::1", 8285));
    assert_eq!(parse("[fd00::1]:77"), ok("fd00::1", 77));
    assert_eq!(parse("[fd00::1]"), ok("fd00::1", 8285));
    for bad in [
        "",
        ":99",
        "host:",
        "host:0",
        "host:70000",
        "[fd00::1",
        "[fd00::1]x",
        "a b",
        "1:2:x",
    ] {
        assert!(parse(bad).is_err(), "{bad:?}");
    }
}

#[test]
fn keepalives_are_seconds() {
    let seconds = |text: &str| parse_keepalive(text).map(|every| every.map(|it| it.as_secs()));
    assert_eq!(seconds("off"), Ok(None));
    assert_eq!(seconds("0"), Ok(None));
    assert_eq!(seconds("1"), Ok(Some(1)));
    assert_eq!(seconds("65535"), Ok(Some(65535)));
    for bad in ["", "65536", "-1", "25s", "on"] {
        assert!(seconds(bad).unwrap_err().contains("65535"), "{bad:?}");
    }
}

proptest! {
    #[test]
    fn any_peer_is_read_or_refused(text in "[a-z0-9.:/\\[\\],%=@\\-]{0,60}") {
        if let Ok(peer) = parse_peer(&text) {
            let name = peer.name.to_string();
            prop_assert_eq!(parse_peer_name(&name), Ok(peer.name));
        }
    }

    /// What follows a key is as it is for a plain peer.
    #[test]
    fn any_peer_with_a_key_is_read_or_refused(rest in "[@=]?[a-z0-9.:/\\[\\],%=@\\-]{0,20}") {
        if let Ok(peer) = parse_peer(&format!("{KEY}{rest}")) {
            prop_assert_eq!(peer.name.to_string(), KEY);
            match rest.strip_prefix('@') {
                Some(plain) => {
                    let plain = parse_peer(plain).unwrap();
                    prop_assert_eq!((plain.endpoint, plain.prefixes), (peer.endpoint, peer.prefixes));
                }
                None => prop_assert_eq!(peer.endpoint, None),
            }
        }
    }
}
