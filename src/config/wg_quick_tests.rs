use std::ffi::OsStr;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::Duration;

use base64::prelude::{BASE64_STANDARD, Engine};
use proptest::prelude::*;
use tempfile::TempDir;

use super::*;

/// Of RFC 7748, section 6.1.
const PRIVATE: &str = "dwdtCnMYpX08FsFyUbJmRd9ML4frwJkqsXf7pR25LCo=";
const PUBLIC: &str = "hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=";
const PEER: &str = "xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg=";

fn read(text: impl AsRef<[u8]>) -> Result<Config> {
    parse("wg0.conf", text.as_ref())
}

fn fault(text: impl AsRef<[u8]>) -> String {
    read(text).map(drop).unwrap_err().to_string()
}

/// A file with this text and mode, as long as the directory is there.
fn file(text: &str, mode: u32) -> (TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("wg0.conf");
    fs::write(&path, text).unwrap();
    fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
    (directory, path)
}

fn config(path: &std::path::Path, flags: &str) -> Result<Config> {
    let words = [OsStr::new("--wg-config"), path.as_os_str()];
    Config::from_words(
        words
            .into_iter()
            .chain(flags.split_whitespace().map(OsStr::new)),
    )
}

fn full() -> String {
    format!(
        "# A comment.\r\n\
         [interface]\n\
         PRIVATEKEY = {PRIVATE} # whose\n\
         \tListenPort=51820\n\
         FwMark = 0xca6c\n\
         Address = 10.9.0.1/24, fd00:9::1/64\n\
         address=10.9.1.1\n\
         MTU = 1380\n\
         Table = off\n\
         DNS = 10.9.0.53, example.org\n\
         SaveConfig = false\n\
         \n\
         [Peer]\n\
         PublicKey = {PEER}\n\
         presharedkey = {PRIVATE}\n\
         AllowedIPs = 10.9.0.2/32,10.1.2.3/16\n\
         AllowedIPs = fd00:9::2/128, 10.1.0.0/16\n\
         Endpoint = vpn.example.org:51821\n\
         PersistentKeepalive = 25\n\
         [PEER]\n\
         PublicKey = {PUBLIC}\n\
         AllowedIPs = 10.9.0.3\n\
         PersistentKeepalive = Off",
        PUBLIC = PEER.replacen('x', "y", 1),
    )
}

#[test]
fn the_whole_format_is_read() {
    let config = read(full()).unwrap();
    assert_eq!(config.public_key().unwrap().to_string(), PUBLIC);
    assert!(config.is_encrypted() && config.no_routes);
    assert_eq!(config.listen_port, Some(51820));
    assert_eq!((config.fwmark, config.mtu_bytes), (0xca6c, Some(1380)));
    let text = |nets: &[IpNet]| nets.iter().map(ToString::to_string).collect::<Vec<_>>();
    let addresses = ["10.9.0.1/24", "fd00:9::1/64", "10.9.1.1/32"];
    assert_eq!(text(&config.addresses), addresses);
    let [first, second] = &config.peers[..] else {
        panic!("{:?}", config.peers);
    };
    assert_eq!(first.name.to_string(), PEER);
    let place = first.endpoint.as_ref().map(ToString::to_string);
    assert_eq!(place.as_deref(), Some("vpn.example.org:51821"));
    let prefixes = ["10.1.0.0/16", "10.9.0.2/32", "fd00:9::2/128"];
    assert_eq!(text(&first.prefixes), prefixes);
    assert!(first.preshared_key.is_set());
    assert_eq!(first.persistent_keepalive, Some(Duration::from_secs(25)));
    assert!(second.endpoint.is_none() && !second.preshared_key.is_set());
    assert_eq!(second.persistent_keepalive, None);
    let note = "wg0.conf: DNS 10.9.0.53, example.org is not set; name servers are left alone";
    assert_eq!(config.notes, [note]);
}

#[test]
fn what_is_left_out_has_the_usual_default() {
    let config = read("[Interface]\nTable = auto\nListenPort = 0\n").unwrap();
    assert_eq!(config, parse_bytes("", b"").unwrap());
    assert_eq!(read("").unwrap(), config);
}

#[test]
fn faults_have_their_line() {
    let peer = format!("[Peer]\nPublicKey = {PEER}\nAllowedIPs = 10.1.0.0/16\n");
    for (text, line, parts) in [
        ("MTU = 1400", 1, &["[Interface]"][..]),
        ("\n[Interfaces]", 2, &["[Interface] or [Peer]"]),
        ("[Peer", 1, &["[Interface] or [Peer]"]),
        ("[Interface]\n[Interface]", 2, &["already, in line 1"]),
        ("[Interface]\n#\nMTU", 3, &["KEY = VALUE"]),
        ("[Interface]\nMtus = 1", 2, &["\"mtus\""]),
        ("[Interface]\nMTU = 1e3", 2, &["MTU \"1e3\""]),
        ("[Interface]\nMTU = +1400", 2, &["+1400"]),
        ("[Interface]\nMTU = 1400\nmtu = 1400", 3, &["in line 2"]),
        ("[Interface]\nListenPort = 65536", 2, &["UDP port"]),
        ("[Interface]\nFwMark = -1", 2, &["FwMark \"-1\"", "0xca6c"]),
        ("[Interface]\nAddress = 10.0.0.1/33", 2, &["10.0.0.1/33"]),
        ("[Interface]\nTable = 51820", 2, &["off or auto", "main"]),
        ("[Interface]\nSaveConfig = true", 2, &["SaveConfig"]),
        ("[Interface]\nPostUp = reboot", 2, &["runs no commands"]),
        ("[Interface]\npredown =", 2, &["runs no commands"]),
        ("[Interface]\nPrivateKey = x", 2, &["44 characters"]),
        ("[Interface]\nPublicKey = x", 2, &["below [Peer]"]),
        ("[Peer]\nMTU = 1400", 2, &["below [Interface]"]),
        ("[Peer]\nEndpoints = a:1", 2, &["\"endpoints\""]),
        ("\n[Peer]\n\nAllowedIPs = ::/0\n\n", 2, &["no PublicKey"]),
        ("[Peer]\nEndpoint = a", 2, &["port is missing"]),
        ("[Peer]\nEndpoint = [fd00::1]", 2, &["port is missing"]),
        ("[Peer]\nEndpoint = fd00::1", 2, &["port is missing"]),
        ("[Peer]\nEndpoint = a:0", 2, &["Endpoint \"a:0\""]),
        (
            "[Peer]\nAllowedIPs = 10.1/16",
            2,
            &["AllowedIPs \"10.1/16\""],
        ),
        ("[Peer]\nPersistentKeepalive = 65536", 2, &["65535"]),
    ] {
        let fault = fault(text);
        let place = format!("wg0.conf:{line}: ");
        assert!(fault.starts_with(&place), "{text:?}: {fault}");
        let has = parts.iter().all(|part| fault.contains(part));
        assert!(has, "{text:?}: {fault}");
    }
    // A peer is judged by its whole section, and named by its beginning.
    let none = fault(format!(
        "{peer}\n[Peer]\nPublicKey = {PEER}\nAllowedIPs =\n"
    ));
    assert!(none.starts_with("wg0.conf:5: ") && none.contains("no AllowedIPs"));
    let twice = fault(format!("{peer}PublicKey = {PEER}\n"));
    assert!(twice.starts_with("wg0.conf:4: ") && twice.contains("in line 2"));
    let bad = fault([b"[Interface]\n".as_slice(), b"MTU = \xff"].concat());
    assert!(bad.starts_with("wg0.conf:2: ") && bad.contains("UTF-8"));
}

#[test]
fn no_secret_is_quoted() {
    let half = &PRIVATE[..43];
    for text in [
        format!("[Interface]\n{PRIVATE}"),
        format!("[Interface]\n{half}"),
        format!("[Interface]\n{PRIVATE} = 1"),
        PRIVATE.to_string(),
        format!("[{PRIVATE}"),
        format!("[Interface]\nPrivateKey {PRIVATE}"),
        format!("[Interface]\nPrivateKey: {PRIVATE}"),
        format!("[Interface]\nPrivateKey = {half}"),
        format!("[Interface]\nPresharedKey = {PRIVATE}"),
        format!("[Peer]\nPresharedKey = {PRIVATE}x"),
        format!("[Peer]\nPublicKey = {half}"),
    ] {
        let fault = fault(&text);
        assert!(!fault.contains(&PRIVATE[..12]), "{fault}");
        assert!(!fault.to_lowercase().contains(&half[..12].to_lowercase()));
    }
}

#[test]
fn flags_override_the_file() {
    let (_directory, path) = file(&full(), 0o600);
    let of_file = config(&path, "").unwrap();
    assert_eq!(of_file.file(), Some(&path));
    assert_eq!(of_file.peers.len(), 2);
    let flags = format!(
        "--mtu 1300 --no-routes=false --address 10.7.0.1/24 --listen 0.0.0.0:9 --fwmark off \
         --tun wg0 --queues 2 --peer {PEER}@192.0.2.1"
    );
    let both = config(&path, &flags).unwrap();
    assert_eq!((both.mtu_bytes, both.no_routes), (Some(1300), false));
    assert_eq!((both.fwmark, &both.tun[..], both.queues), (0, "wg0", 2));
    assert_eq!(both.listen.unwrap().to_string(), "0.0.0.0:9");
    assert_eq!(both.addresses.len(), 1);
    assert_eq!(both.peers.len(), 1);
    assert_eq!(both.public_key(), of_file.public_key());
    // Nobody could tell which of two files is meant.
    let two = config(&path, "--config /dev/null").unwrap_err().to_string();
    assert!(two.contains("--config"), "{two}");
}

#[test]
fn a_file_with_keys_is_its_owners_alone() {
    for mode in [0o640, 0o604, 0o660] {
        let (_directory, path) = file(&full(), mode);
        let error = config(&path, "").unwrap_err().to_string();
        assert!(error.contains(&format!("(mode {mode:04o}); chmod 600 ")));
    }
    // One without may be anybody's, if the key is elsewhere.
    let (directory, path) = file("[Interface]\nAddress = 10.9.0.1/24\n", 0o644);
    let key = directory.path().join("key");
    fs::write(&key, PRIVATE).unwrap();
    fs::set_permissions(&key, Permissions::from_mode(0o600)).unwrap();
    let flags = format!("--private-key {}", key.display());
    assert!(config(&path, &flags).unwrap().is_encrypted());
    let error = |path: &str| config(path.as_ref(), "").unwrap_err().to_string();
    assert!(error("/dev/null").contains("not a regular file"));
    assert!(error("/nonexistent").contains("cannot read --wg-config /nonexistent"));
}

/// Whoever writes such a file counts on encryption, whatever peers the flags name.
#[test]
fn a_file_without_a_key_makes_no_plain_tunnel() {
    let (_directory, path) = file("[Interface]\nAddress = 10.9.0.1/24\n", 0o600);
    for flags in ["", "--peer 192.0.2.1"] {
        let error = config(&path, flags).unwrap_err().to_string();
        let parts = ["/wg0.conf, there is no private key", "PrivateKey"];
        assert!(parts.iter().all(|part| error.contains(part)), "{error}");
    }
}

#[test]
fn peers_are_checked_as_those_of_any_file() {
    let refused = |text: &str| {
        let (_directory, path) = file(text, 0o600);
        config(&path, "").unwrap_err().to_string()
    };
    let peer = |key: &str| format!("[Peer]\nPublicKey = {key}\nAllowedIPs = 10.1.0.0/16\n");
    let key = format!("[Interface]\nPrivateKey = {PRIVATE}\n");
    assert!(refused(&peer(PEER)).contains("no private key"));
    assert!(refused(&(key.clone() + &peer(PUBLIC))).contains("own key"));
    let other = PEER.replacen('x', "y", 1);
    let both = key + &peer(PEER) + &peer(&other);
    assert!(refused(&both).contains("10.1.0.0/16 is given to peer"));
}

#[test]
fn it_is_read_again_and_keeps_its_peers() {
    let (_directory, path) = file(&full(), 0o600);
    let first = config(&path, "--mtu 1300").unwrap();
    let text = full();
    fs::write(
        &path,
        text.replace("51820", "51999").replace("1380", "1200"),
    )
    .unwrap();
    let again = first.reread().unwrap();
    assert_eq!(again.mtu_bytes, Some(1300));
    assert_eq!(first.needs_restart(&again), ["listen-port"]);
    fs::write(&path, text.split("[Peer]").next().unwrap()).unwrap();
    let error = first.reread().unwrap_err().to_string();
    assert!(error.contains("2 would be removed"), "{error}");
}

/// Whatever is wrong is said in one line that begins with a line's number.
fn never_more_than_one_line(bytes: &[u8]) {
    let Err(error) = read(bytes) else {
        return;
    };
    let error = error.to_string();
    assert!(!error.contains(char::is_control), "{error:?}");
    let rest = error.strip_prefix("wg0.conf:").unwrap();
    let number: usize = rest.split_once(": ").unwrap().0.parse().unwrap();
    let lines = bytes.split(|&byte| byte == b'\n').count();
    assert!((1..=lines).contains(&number), "{error:?}");
}

fn line() -> impl Strategy<Value = String> {
    let key = prop::sample::select(vec![
        "[Interface]",
        "[peer]",
        "PrivateKey",
        "ListenPort",
        "FwMark",
        "Address",
        "MTU",
        "Table",
        "DNS",
        "PublicKey",
        "PresharedKey",
        "AllowedIPs",
        "Endpoint",
        "PersistentKeepalive",
    ]);
    let value = prop::sample::select(vec![
        "",
        "=",
        "= 1",
        "= off",
        "= auto",
        "=10.1.0.0/16, ::/0",
        "= a:1",
        "= [fd00::1]:9",
        "= dwdtCnMYpX08FsFyUbJmRd9ML4frwJkqsXf7pR25LCo= # x",
        "= \u{1b}[1m",
    ]);
    (key, value).prop_map(|(key, value)| format!("{key} {value}"))
}

fn prefix_of_any() -> impl Strategy<Value = IpNet> {
    let v4 = (any::<[u8; 4]>(), 0..=32u8);
    let v6 = (any::<[u8; 16]>(), 0..=128u8);
    prop_oneof![
        v4.prop_map(|(bytes, length)| IpNet::new_assert(bytes.into(), length)),
        v6.prop_map(|(bytes, length)| IpNet::new_assert(bytes.into(), length)),
    ]
}

proptest! {
    #[test]
    fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        never_more_than_one_line(&bytes);
    }

    #[test]
    fn any_lines_are_read_or_refused(lines in prop::collection::vec(line(), 0..8)) {
        never_more_than_one_line(lines.join("\n").as_bytes());
    }

    /// What is written in the format is what is read.
    #[test]
    fn peers_are_read_as_they_are_written(
        peers in prop::collection::vec(
            (any::<[u8; 32]>(), prop::collection::vec(prefix_of_any(), 1..5), any::<u16>()),
            0..4,
        ),
    ) {
        let mut text = String::new();
        for (key, prefixes, keepalive) in &peers {
            let prefixes: Vec<_> = prefixes.iter().map(ToString::to_string).collect();
            let (key, prefixes) = (BASE64_STANDARD.encode(key), prefixes.join(" , "));
            text += &format!(
                "[Peer]\nPublicKey={key}\nAllowedIPs = {prefixes}\nPersistentKeepalive={keepalive}\n"
            );
        }
        let read = read(text).unwrap();
        prop_assert_eq!(read.peers.len(), peers.len());
        for (spec, (key, prefixes, keepalive)) in read.peers.iter().zip(&peers) {
            prop_assert_eq!(&spec.name, &PeerName::Key(PublicKey(*key)));
            let mut prefixes: Vec<_> = prefixes.iter().map(IpNet::trunc).collect();
            prefixes.sort_unstable();
            prefixes.dedup();
            prop_assert_eq!(&spec.prefixes, &prefixes);
            let seconds = spec.persistent_keepalive.map_or(0, |it| it.as_secs());
            prop_assert_eq!(seconds, u64::from(*keepalive));
        }
    }
}
