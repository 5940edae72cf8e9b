use super::*;
use crate::config::file::FILE_BYTES_MAX;
use crate::config::{Feature, Io, default_control_path};

fn config(flags: &str) -> Result<Config> {
    Config::from_words(flags.split_whitespace().map(OsStr::new))
}

#[test]
fn what_was_left_open_has_a_default() {
    let flags = "--queues 3 --peer 127.0.1.9 --address 10.9.0.1/24";
    let config = config(flags).unwrap();
    assert_eq!(config.queues, 3);
    assert_eq!(config.peers[0].name.to_string(), "127.0.1.9:8285");
    assert!(config.uses(Feature::Uso) && config.uses(Feature::UdpGro));
    assert_eq!((config.io, config.txqueuelen), (Io::Auto, 1000));
    assert_eq!(config.control_path(), default_control_path("fastvpn0"));
    assert!(config.control.is_none() && !config.hop && !config.no_routes);
}

#[test]
fn features_can_be_left_unused() {
    let flags = "--peer 127.0.0.2 --address 10.9.0.1/24 --without uso,udp-gro";
    let config = config(flags).unwrap();
    assert!(!config.uses(Feature::Uso) && !config.uses(Feature::UdpGro));
    assert!(config.uses(Feature::Tso) && config.uses(Feature::UdpSegment));
}

#[test]
fn switches_can_be_switched_off() {
    let hop = |flags: &str| config(flags).unwrap().hop;
    assert!(hop("-q --hop"));
    assert!(!hop("-q --hop=false"));
    assert!(!hop("--no-routes"));
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
keepalive = 25
fwmark = 0xca6c
io = "epoll"
without = ["uso"]
control = "/run/other.sock"
takeover = true
quiet = true
log-format = "json"
registry = ["http://10.0.0.1:2379", "http://10.0.0.2:2379"]
registry-prefix = "/n"
registry-ca = "ca"
registry-user = "me"
registry-password-file = "password"
registry-ttl = 60
registry-allow = ["10.0.0.0/8"]
registry-publish = ["10.3.0.0/16"]
registry-cache = "cache"
public-ip = "10.0.0.3"
iface = ["eth0"]
iface-regex = ["^eth"]
iface-can-reach = "10.0.0.9"
subnet-file = "subnet.env"
ip-masq = true

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
         --txqueuelen 7 --keepalive 25 --fwmark 51820 --io epoll --without uso --control /run/other.sock --takeover --quiet \
         --registry http://10.0.0.1:2379,http://10.0.0.2:2379 --registry-prefix /n \
         --registry-ca ca --registry-user me --registry-password-file password --registry-ttl 60 \
         --registry-allow 10.0.0.0/8 --registry-publish 10.3.0.0/16 --registry-cache cache \
         --public-ip 10.0.0.3 --iface eth0 --iface-regex ^eth --iface-can-reach 10.0.0.9 \
         --subnet-file subnet.env --ip-masq \
         --log-format json --peer 127.0.0.2:99=10.1.0.0/16 --peer vpn.example",
    );
    let alike = Config {
        flags: of_file.flags.clone(),
        config_file: of_file.config_file.clone(),
        ..of_flags.unwrap()
    };
    assert_eq!(of_file, alike);
    assert!(of_file.config_file.is_some() && of_file.control.is_some());
}

#[test]
fn flags_win_over_the_file() {
    let flags = "--queues 2 --tun mine0 --hop=false --address 10.7.0.1/24 --route 10.6.0.0/16 \
                 --without tso --peer 127.0.0.9 -v --busy-poll off --io auto --takeover=false \
                 --listen 0.0.0.0 --mtu 1400 --txqueuelen 8 --keepalive 5 --fwmark off --control /run/mine.sock \
                 --registry https://b --registry-prefix /m --registry-ca b --registry-cert c \
                 --registry-key d --registry-user you --registry-password-file b \
                 --registry-ttl 70 --registry-allow 10.1.0.0/16 --registry-publish 10.4.0.0/16 \
                 --registry-cache b --public-ip 10.0.0.4 --iface eth1 --iface-regex ^wl \
                 --iface-can-reach 10.0.0.8 --subnet-file b --ip-masq=false \
                 --log-format text";
    let of_both = config_with(FILE, flags).unwrap();
    let of_flags = config(flags).unwrap();
    let alike = Config {
        flags: of_both.flags.clone(),
        config_file: of_both.config_file.clone(),
        ..of_flags
    };
    assert_eq!(of_both, alike);
}

#[test]
fn a_file_is_read_again_below_the_same_flags() {
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
fn a_file_that_has_lost_its_peers_is_refused() {
    let file = file("[[peer]]\nendpoint = \"127.0.0.2\"");
    let config = config(&format!("--config {}", file.path().display())).unwrap();
    let reread = |text: &str| {
        std::fs::write(file.path(), text).unwrap();
        config.reread()
    };
    let error = reread("hop = true").unwrap_err().to_string();
    assert!(error.contains("1 would be removed; ") && error.contains("`peer = []`"));
    assert_eq!(reread("hop = true\npeer = []").unwrap().peers, []);
}

#[test]
fn what_means_the_same_needs_no_restart() {
    let of = |text: &str| config_with(&format!("peer = []\n{text}"), "").unwrap();
    let default = default_control_path("fastvpn0");
    let written = of(&format!("control = {default:?}"));
    assert!(of("").needs_restart(&written).is_empty());
    let [some, other] = ["'uso', 'udp-gro'", "'udp-gro', 'uso', 'uso'"];
    let [some, other] = [some, other].map(|list| of(&format!("without = [{list}]")));
    assert!(some.needs_restart(&other).is_empty());
    assert_eq!(some.needs_restart(&of("")), ["without"]);
    // A path need not be UTF-8.
    use std::os::unix::ffi::OsStringExt;
    let path = |last: u8| Some(std::ffi::OsString::from_vec(vec![b'/', last]).into());
    let [mut old, mut new] = [of(""), of("queues = 77\nhop = true\nkeepalive = 9")];
    (old.control, new.control) = (path(0xfe), path(0xff));
    assert_eq!(old.needs_restart(&new), ["control", "queues"]);
    new.control = old.control.clone();
    assert_eq!(old.needs_restart(&new), ["queues"]);
}

#[test]
fn options_out_of_bounds_and_contradictions_are_refused() {
    let core = core_affinity::get_core_ids().unwrap()[0].id;
    for (text, flags, parts) in [
        ("queues = 0", "", &["queues 0 ", "1..=256"][..]),
        ("", "--queues 257", &["queues 257 ", "1..=256"]),
        ("mtu = 67", "", &["mtu 67 ", "68..=65507"]),
        ("", "--txqueuelen 0", &["txqueuelen 0 ", "1..=100000"]),
        ("keepalive = 0", "", &["keepalive 0 ", "1..=300"]),
        ("", "--keepalive 301", &["keepalive 301 ", "1..=300"]),
        ("tun = \"a/b\"", "", &["tun", "a/b"]),
        ("address = [\"0.0.0.0/0\"]", "", &["0.0.0.0"]),
        ("", "--route 10.9.0.1/24", &["10.9.0.0/24?"]),
        ("cores = \"4000\"", "", &["core 4000 is not available"]),
        ("", "--cores 4001", &["core 4001 is not available"]),
        (
            "route = [\"10.8.0.0/16\"]",
            "--no-routes",
            &["route 10.8.0.0/16 contradicts no-routes"],
        ),
    ] {
        let error = config_with(text, flags).unwrap_err().to_string();
        assert!(parts.iter().all(|part| error.contains(part)), "{error}");
    }
    // A flag may as well take the fault away.
    let both = "no-routes = true\nroute = [\"10.8.0.0/16\"]";
    assert!(config_with(both, "--no-routes=false").is_ok());
    assert!(config_with("cores = \"4000\"", &format!("--cores {core}")).is_ok());
}

#[test]
fn flags_say_how_much_is_logged() {
    let volume = |text, flags| {
        let config = config_with(text, flags).unwrap();
        (config.verbose, config.quiet)
    };
    assert_eq!(volume("verbose = 2", ""), (2, false));
    assert_eq!(volume("verbose = 2", "-q"), (0, true));
    assert_eq!(volume("quiet = true", "-v"), (1, false));
}

#[test]
fn only_regular_files_of_bounded_size_are_read() {
    let error = |path: &str| config(&format!("--config {path}")).unwrap_err().to_string();
    let missing = error("/nonexistent/fastvpn.toml");
    assert!(missing.contains("/nonexistent/fastvpn.toml") && missing.contains("no such file"));
    assert!(error("/").contains("not a regular file"));
    assert!(error("/dev/zero").contains("not a regular file"));
    let directory = tempfile::tempdir().unwrap();
    let pipe = directory.path().join("pipe");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
    assert!(error(&pipe.display().to_string()).contains("not a regular file"));
    let large = tempfile::NamedTempFile::new().unwrap();
    large.as_file().set_len(FILE_BYTES_MAX + 1).unwrap();
    assert!(error(&large.path().display().to_string()).contains("at most 16777216 bytes"));
}
