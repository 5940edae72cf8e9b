use super::*;
use crate::cli::Cli;
use clap::Parser;
use std::net::SocketAddr;

fn config(flags: &str) -> Result<Config> {
    let words = std::iter::once("fastvpn").chain(flags.split_whitespace());
    let cli = Cli::try_parse_from(words).expect("flags that parse");
    Config::from_args(&cli.tunnel)
}

/// With the peers' addresses taken for what they resolve to; names resolve to
/// nothing.
fn settled(flags: &str) -> Result<Settled> {
    let config = config(flags)?;
    let peers = config.peers.iter();
    let resolved: Vec<SocketAddr> = peers.filter_map(|peer| peer.name.literal()).collect();
    config.settle(&resolved)
}

#[test]
fn fills_in_what_was_left_open() {
    let flags = "--queues 3 --peer 127.0.1.9 --address 10.9.0.1/24";
    let config = config(flags).unwrap();
    assert_eq!(config.queues, 3);
    assert_eq!(config.peers[0].name.to_string(), "127.0.1.9:8285");
    assert!(config.wanted.tun.udp && config.wanted.udp.gro);
    assert_eq!((config.io, config.txqueuelen), (Io::Auto, 1000));
    assert_eq!(config.control, default_control_path("fastvpn0"));
    assert!(config.control_is_default && !config.hop && !config.no_routes);
    let settled = settled(flags).unwrap();
    assert_eq!(settled.listen, "0.0.0.0:8285".parse().unwrap());
    assert_eq!(settled.link.mtu_bytes, 65507);
    assert!(!settled.address_is_derived && settled.peer_address.is_none());
}

#[test]
fn names_the_flag_at_fault() {
    let text = |flags: &str| settled(flags).map(drop).unwrap_err().to_string();
    assert!(text("--peer 127.0.0.1 --listen 127.0.0.1").contains("this host itself"));
    assert!(text("--peer 127.0.0.2 --listen ::1").contains("--listen ::1"));
    assert!(text("--peer 0.0.0.0").contains("--peer 0.0.0.0"));
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
    assert!(routes.contains("--route 10.9.0.0/24"), "{routes}");
    let twice = text("--peer 127.0.0.2 --peer 127.0.0.3");
    assert!(
        twice.contains("127.0.0.2") && twice.contains("127.0.0.3"),
        "{twice}"
    );
}

#[test]
fn leaves_out_what_it_is_told_to() {
    let flags = "--peer 127.0.0.2 --address 10.9.0.1/24 --without uso,udp-gro";
    let wanted = config(flags).unwrap().wanted;
    assert!(!wanted.tun.udp && !wanted.udp.gro);
    assert!(wanted.tun.tcp && wanted.udp.segment);
}

#[test]
fn starts_without_a_peer_that_resolves_if_it_has_an_address() {
    let error = |flags: &str| settled(flags).map(drop).unwrap_err().to_string();
    let nobody = error("--tun other0");
    assert!(
        nobody.contains("--peer") && nobody.contains("--address"),
        "{nobody}"
    );
    let one = error("--peer a.invalid");
    assert!(one.contains("cannot resolve peer a.invalid") && one.contains("--address"));
    let many = error("--peer a.invalid=10.1.0.0/16 --peer b.invalid");
    assert!(
        many.contains("a.invalid") && many.contains("other 1"),
        "{many}"
    );
    for peers in [
        "",
        "--peer a.invalid",
        "--peer a.invalid --peer b.invalid=::/0",
    ] {
        let settled = settled(&format!("--address 10.9.0.1/24 {peers}")).unwrap();
        let overhead_bytes = if settled.listen.is_ipv6() { 48 } else { 28 };
        assert_eq!(settled.link.mtu_bytes, 1500 - overhead_bytes);
    }
}

#[test]
fn listens_to_every_family_that_a_peer_may_have() {
    let ip = |flags: &str| {
        let flags = format!("{flags} --address 10.9.0.1/24");
        settled(&flags).unwrap().listen.ip().to_string()
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
        settled(&flags).map(|settled| settled.listen.to_string())
    };
    // Whatever the peers are now: more may be added.
    for peers in ["", "--peer 127.0.0.2", "--peer a.invalid"] {
        for address in ["0.0.0.0:8285", "[::]:8285", "[::]:99"] {
            let flags = format!("{peers} --listen {address}");
            assert_eq!(listen(&flags).unwrap(), address, "{flags}");
        }
    }
    let wrong = listen("--peer ::1 --listen 0.0.0.0")
        .unwrap_err()
        .to_string();
    for part in ["--listen 0.0.0.0", "::1", "--listen [::]"] {
        assert!(wrong.contains(part), "{wrong}");
    }
}

#[test]
fn one_way_among_many_may_be_closed() {
    // Broadcast addresses take no datagrams (EACCES).
    let flags = "--address 10.9.0.1/24 --peer 127.255.255.255=10.1.0.0/16";
    assert!(
        settled(flags)
            .map(drop)
            .unwrap_err()
            .to_string()
            .contains("127.255.255.255")
    );
    let settled = settled(&format!("{flags} --peer 127.0.0.2")).unwrap();
    assert_eq!(settled.unreachable.len(), 1);
}

/// A file that is gone again with the value.
fn file(text: &str) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), text).unwrap();
    file
}

fn config_with(text: &str, flags: &str) -> Result<Config> {
    let file = file(text);
    config(&format!("--config {} {flags}", file.path().display()))
}

const FILE: &str = r#"
queues = 3
listen = "[::]:99"
tun = "other0"
mtu = 1300
address = ["10.9.0.1/24", "fd00::1/64"]
route = ["10.8.0.0/16"]
no-routes = false
hop = true
busy-poll = 50
txqueuelen = 7
io = "epoll"
without = ["uso"]
control = "/run/other.sock"
takeover = true
quiet = true
log-format = "json"

[[peer]]
endpoint = "127.0.0.2:99"
prefixes = ["10.1.0.0/16"]

[[peer]]
endpoint = "vpn.example"
"#;

#[test]
fn the_file_says_all_that_the_flags_can() {
    let of_file = config_with(FILE, "").unwrap();
    let of_flags = config(
        "--queues 3 --listen [::]:99 --tun other0 --mtu 1300 --address 10.9.0.1/24 \
         --address fd00::1/64 --route 10.8.0.0/16 --no-routes=false --hop --busy-poll 50 \
         --txqueuelen 7 --io epoll --without uso --control /run/other.sock --takeover --quiet \
         --log-format json --peer 127.0.0.2:99=10.1.0.0/16 --peer vpn.example",
    );
    let alike = Config {
        args: of_file.args.clone(),
        config_file: of_file.config_file.clone(),
        ..of_flags.unwrap()
    };
    assert_eq!(of_file, alike);
    assert!(of_file.config_file.is_some() && !of_file.control_is_default);
}

#[test]
fn flags_win_over_the_file() {
    let flags = "--queues 2 --tun mine0 --hop=false --address 10.7.0.1/24 --route 10.6.0.0/16 \
                 --without tso --peer 127.0.0.9 -v --busy-poll off --io auto --takeover=false \
                 --listen 0.0.0.0 --mtu 1400 --txqueuelen 8 --control /run/mine.sock \
                 --log-format text";
    let of_both = config_with(FILE, flags).unwrap();
    let of_flags = config(flags).unwrap();
    let alike = Config {
        args: of_both.args.clone(),
        config_file: of_both.config_file.clone(),
        ..of_flags
    };
    assert_eq!(of_both, alike);
}

#[test]
fn a_file_read_again_has_its_say_again() {
    let file = file("tun = \"a0\"\nqueues = 1\n");
    let flags = format!("--config {} --queues 2", file.path().display());
    let config = config(&flags).unwrap();
    std::fs::write(file.path(), "tun = \"b0\"\nqueues = 5\n").unwrap();
    let again = config.reread().unwrap();
    assert_eq!((&again.tun[..], again.queues), ("b0", 2));
    std::fs::write(file.path(), "tun = 1").unwrap();
    assert!(config.reread().is_err());
}

#[test]
fn contradictions_have_their_place() {
    let error = |text: &str, flags: &str| {
        let file = file(text);
        let path = file.path().display().to_string();
        let error = config(&format!("--config {path} {flags}")).unwrap_err();
        error.to_string().replace(&path, "FILE")
    };
    let starts = |text: &str, flags: &str, start: &str| {
        let error = error(text, flags);
        assert!(error.starts_with(start), "{error}");
    };
    let cores = "tun = \"a0\"\ncores = \"4000\"";
    starts(cores, "", "FILE:2:9: core 4000 is not available");
    starts(cores, "--cores 4001", "--cores: core 4001 is not");
    let both = "no-routes = true\nroute = [\n  \"10.8.0.0/16\"]";
    starts(
        both,
        "",
        "FILE:3:3: route 10.8.0.0/16 contradicts no-routes;",
    );
    let flag = "--route 10.7.0.0/16";
    starts(
        both,
        flag,
        "FILE:1:13: no-routes contradicts --route 10.7.0.0/16",
    );
    let switch = "--no-routes";
    starts(
        both,
        switch,
        "FILE:3:3: route 10.8.0.0/16 contradicts --no-routes",
    );
    let flags = format!("{switch} {flag}");
    starts(both, &flags, "--route 10.7.0.0/16 and --no-routes");
    // A flag may as well take the contradiction away.
    assert!(config_with(both, "--no-routes=false").is_ok());
    let core = core_affinity::get_core_ids().unwrap()[0].id;
    assert!(config_with(cores, &format!("--cores {core}")).is_ok());
}

#[test]
fn files_that_are_none() {
    let error = |path: &str| config(&format!("--config {path}")).unwrap_err().to_string();
    let missing = error("/nonexistent/fastvpn.toml");
    assert!(missing.contains("/nonexistent/fastvpn.toml") && missing.contains("no such file"));
    assert!(error("/").contains("no regular file"));
    assert!(error("/dev/zero").contains("no regular file"));
    let directory = tempfile::tempdir().unwrap();
    let pipe = directory.path().join("pipe");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
    assert!(error(&pipe.display().to_string()).contains("no regular file"));
    let large = tempfile::NamedTempFile::new().unwrap();
    large.as_file().set_len(FILE_BYTES_MAX + 1).unwrap();
    assert!(error(&large.path().display().to_string()).contains("more than 16777216 bytes"));
}
