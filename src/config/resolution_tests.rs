use super::*;
use crate::cli::Cli;
use crate::config::file::FILE_BYTES_MAX;
use clap::Parser;

fn config(flags: &str) -> Result<Config> {
    let words = std::iter::once("fastvpn").chain(flags.split_whitespace());
    let cli = Cli::try_parse_from(words).expect("flags that parse");
    Config::from_args(&cli.tunnel)
}

#[test]
fn fills_in_what_was_left_open() {
    let flags = "--queues 3 --peer 127.0.1.9 --address 10.9.0.1/24";
    let config = config(flags).unwrap();
    assert_eq!(config.queues, 3);
    assert_eq!(config.peers[0].name.to_string(), "127.0.1.9:8285");
    assert!(config.wanted.uso && config.wanted.udp_gro);
    assert_eq!((config.io, config.txqueuelen), (Io::Auto, 1000));
    assert_eq!(config.control, default_control_path("fastvpn0"));
    assert!(config.control_is_default && !config.hop && !config.no_routes);
}

#[test]
fn leaves_out_what_it_is_told_to() {
    let flags = "--peer 127.0.0.2 --address 10.9.0.1/24 --without uso,udp-gro";
    let wanted = config(flags).unwrap().wanted;
    assert!(!wanted.uso && !wanted.udp_gro);
    assert!(wanted.tso && wanted.udp_segment);
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
        "FILE:1:13: --route 10.7.0.0/16 contradicts no-routes",
    );
    let switch = "--no-routes";
    starts(
        both,
        switch,
        "FILE:3:3: route 10.8.0.0/16 contradicts --no-routes",
    );
    let flags = format!("{switch} {flag}");
    starts(both, &flags, "--route 10.7.0.0/16 contradicts --no-routes");
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
