use std::ffi::OsStr;

use super::*;

fn config(flags: &str) -> Result<Config> {
    Config::from_words(flags.split_whitespace().map(OsStr::new))
}

/// With the peers' addresses taken for what they resolve to; names resolve to
/// nothing.
fn at_start(flags: &str) -> Result<(Settings, Vec<Error>)> {
    let config = config(flags)?;
    let peers = config.peers.iter();
    let resolved: Vec<SocketAddr> = peers
        .filter_map(|peer| peer.endpoint.as_ref()?.literal())
        .collect();
    let prefixes = config.peers.iter().flat_map(|peer| peer.prefixes.clone());
    Settings::at_start(&config, &resolved, prefixes, &mut Netlink::open()?)
}

fn settings(flags: &str) -> Result<Settings> {
    at_start(flags).map(|(settings, _)| settings)
}

#[test]
fn starts_without_a_peer_that_resolves_if_it_has_an_address() {
    for peers in ["--tun other0", "--peer a.invalid"] {
        let nobody = settings(peers).map(drop).unwrap_err().to_string();
        assert!(
            nobody.contains("--peer") && nobody.contains("--address"),
            "{nobody}"
        );
    }
    for peers in [
        "",
        "--peer a.invalid",
        "--peer a.invalid --peer b.invalid=::/0",
    ] {
        let settings = settings(&format!("--address 10.9.0.1/24 {peers}")).unwrap();
        let overhead_bytes = if settings.listen.is_ipv6() { 48 } else { 28 };
        assert_eq!(settings.link.mtu_bytes, 1500 - overhead_bytes);
    }
}

#[test]
fn listens_to_every_family_that_a_peer_may_have() {
    let ip = |flags: &str| {
        let flags = format!("{flags} --address 10.9.0.1/24");
        settings(&flags).unwrap().listen.ip().to_string()
    };
    assert_eq!(
        ip("--peer 127.0.0.2 --peer 127.0.0.3=10.1.0.0/16"),
        "0.0.0.0"
    );
    assert_eq!(ip("--peer ::ffff:127.0.0.2"), "0.0.0.0");
    assert_eq!(ip("--peer 127.0.0.2 --listen 127.0.0.1"), "127.0.0.1");
    // Where IPv6 is switched off, there is IPv4 alone.
    let dual_stack = std::net::UdpSocket::bind("[::]:0").map_or("0.0.0.0", |_| "::");
    assert_eq!(ip("--peer a.invalid"), dual_stack);
    assert_eq!(
        ip("--peer 127.0.0.2 --peer a.invalid=10.1.0.0/16"),
        dual_stack
    );
    assert_eq!(ip(""), dual_stack);
}

#[test]
fn listens_where_it_is_told_to() {
    let listen = |flags: &str| {
        let flags = format!("{flags} --address 10.9.0.1/24");
        settings(&flags).map(|settings| settings.listen.to_string())
    };
    // Whatever the peers are now: more may be added.
    for peers in ["", "--peer 127.0.0.2", "--peer a.invalid"] {
        for address in ["0.0.0.0:8285", "[::]:8285", "[::]:99"] {
            let flags = format!("{peers} --listen {address}");
            assert_eq!(listen(&flags).unwrap(), address, "{flags}");
        }
    }
}

#[test]
fn one_way_among_many_may_be_closed() {
    // Broadcast addresses take no datagrams (EACCES).
    let flags = "--address 10.9.0.1/24 --peer 127.255.255.255=10.1.0.0/16";
    assert!(
        settings(flags)
            .map(drop)
            .unwrap_err()
            .to_string()
            .contains("127.255.255.255")
    );
    let (_, unreachable) = at_start(&format!("{flags} --peer 127.0.0.2")).unwrap();
    assert_eq!(unreachable.len(), 1);
}

#[test]
fn names_the_flag_at_fault() {
    let text = |flags: &str| settings(flags).map(drop).unwrap_err().to_string();
    assert!(text("--peer 127.0.0.1 --listen 127.0.0.1").contains("this host itself"));
    assert!(text("--peer 127.0.0.2 --listen ::1").contains("listen address ::1"));
    assert!(text("--peer 0.0.0.0").contains("peer 0.0.0.0"));
    let mtu = text("--peer 127.0.0.2 --mtu 1200 --address fd00::1/64");
    assert!(
        mtu.contains("fd00::1/64") && mtu.contains("--mtu 1280"),
        "{mtu}"
    );
    let mtu = text("--peer 127.0.0.2=fd00:9::/64 --mtu 1200 --address 10.9.0.1/24");
    assert!(mtu.contains("fd00:9::/64"), "{mtu}");
    let cores = text("--peer 127.0.0.2 --address 10.9.0.1/24 --cores 4000");
    assert!(cores.contains("core 4000"), "{cores}");
    let routes = text("--peer 127.0.0.2 --route 10.9.0.0/24 --no-routes");
    assert!(routes.contains("route 10.9.0.0/24"), "{routes}");
    let twice = text("--peer 127.0.0.2 --peer 127.0.0.3");
    assert!(
        twice.contains("127.0.0.2") && twice.contains("127.0.0.3"),
        "{twice}"
    );
}

#[test]
fn fills_in_what_was_left_open() {
    let settings = settings("--queues 3 --peer 127.0.1.9 --address 10.9.0.1/24").unwrap();
    assert_eq!(settings.listen, "0.0.0.0:8285".parse().unwrap());
    assert_eq!(settings.link.mtu_bytes, 65507);
    assert_eq!(settings.link.addresses, ["10.9.0.1/24".parse().unwrap()]);
}
