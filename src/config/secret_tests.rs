use std::ffi::OsStr;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;

use tempfile::TempDir;

use super::*;
use crate::config::HostPort;

const SECRET: &str = "4zLhOB5XhQq2vF0v6sHc1Jj0CwqyTnyGgq9nYzB9Fbo=";

struct Files(TempDir);

impl Files {
    fn new() -> Self {
        let files = Self(tempfile::tempdir().unwrap());
        files.write("secret", SECRET, 0o600);
        files
    }

    fn write(&self, name: &str, text: &str, mode: u32) {
        let path = self.0.path().join(name);
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
    }

    fn config(&self, flags: &str) -> Result<Config> {
        let secret = self.0.path().join("secret");
        let words = [OsStr::new("--secret-file"), secret.as_os_str()];
        let words = words
            .into_iter()
            .chain(flags.split_whitespace().map(OsStr::new));
        Config::from_words(words)
    }

    fn config_of(&self, text: &str) -> Result<Config> {
        self.write("config", text, 0o600);
        let file = self.0.path().join("config");
        self.config(&format!("--config {}", file.display()))
    }

    fn refused(&self, flags: &str) -> String {
        self.config(flags).unwrap_err().to_string()
    }
}

/// What one end takes for the other's key is what the other has.
#[test]
fn both_ends_derive_the_same_keys() {
    let files = Files::new();
    let mut one = files.config("--peer 10.0.0.2=10.1.0.0/16").unwrap();
    let mut other = files.config("--peer [::ffff:10.0.0.1]:99").unwrap();
    assert!(one.is_encrypted() && one.needs_identity() && one.public_key().is_none());
    one.set_identity_address([10, 0, 0, 1].into()).unwrap();
    other.set_identity_address([10, 0, 0, 2].into()).unwrap();
    assert!(!one.needs_identity());
    assert_eq!(one.peers[0].name.key(), other.public_key());
    assert_eq!(other.peers[0].name.key(), one.public_key());
    assert!(one.public_key().is_some() && one.peers[0].preshared_key.is_set());
    assert_eq!(one.peers[0].preshared_key, other.peers[0].preshared_key);
    assert_eq!(one.peers[0].identity.as_deref(), Some("10.0.0.2"));
    let endpoint = one.peers[0].endpoint.as_ref().map(ToString::to_string);
    assert_eq!(endpoint.as_deref(), Some("10.0.0.2:8285"));
}

#[test]
fn names_are_identities_too() {
    let files = Files::new();
    let text = "[[peer]]\nidentity = \"Laptop.\"\npersistent-keepalive = 25\n\
                [[peer]]\nendpoint = \"192.0.2.1:99\"\nidentity = \"gate\"\nprefixes = [\"::/0\"]\n\
                [[peer]]\nendpoint = \"vpn.Example\"\nprefixes = [\"10.1.0.0/16\"]";
    let here = files.config_of(text).unwrap();
    let own = |flags: &str| files.config(flags).unwrap().public_key();
    for (peer, flags) in here.peers.iter().zip([
        "--identity laptop --peer 10.0.0.1",
        "--identity GATE --peer 10.0.0.1",
        "--identity vpn.example. --peer 10.0.0.1",
    ]) {
        assert_eq!(peer.name.key(), own(flags), "{flags}");
    }
    assert!(here.peers[0].endpoint.is_none());
    // As operators name them.
    let name = |host: &str| {
        let host = host.to_string();
        here.complete_name(PeerName::Host(HostPort { host, port: 8285 }))
    };
    assert_eq!(name("gate"), here.peers[1].name);
    assert_eq!(name("vpn.example"), here.peers[2].name);
    assert_eq!(here.complete_name(name("gate")), name("gate"));
}

#[test]
fn one_identity_is_one_hosts() {
    let files = Files::new();
    let twice = files.refused("--peer 10.0.0.2 --peer 10.0.0.2:99=10.1.0.0/16");
    for part in ["10.0.0.2:8285", "10.0.0.2:99", "same identity, 10.0.0.2;"] {
        assert!(twice.contains(part), "{twice}");
    }
    let own = files.refused("--peer gate --identity gate");
    assert!(own.contains("same identity, gate;"), "{own}");
    let mut late = files.config("--peer 10.0.0.2").unwrap();
    assert!(late.set_identity_address([10, 0, 0, 2].into()).is_err());
}

#[test]
fn what_contradicts_is_refused() {
    let files = Files::new();
    let key = format!("{}=", "A".repeat(43));
    for (flags, parts) in [
        (format!("--peer {key}"), ["has a public key", "plain mode"]),
        (
            "--private-key /k --peer a".into(),
            ["contradicts", "leave one"],
        ),
        ("--peer a --identity a/b".into(), ["--identity", "1 to 255"]),
        (
            "--peer a --peer b".into(),
            ["peers a:8285 and b:8285", "without prefixes"],
        ),
    ] {
        let refused = files.refused(&flags);
        assert!(parts.iter().all(|part| refused.contains(part)), "{refused}");
    }
    for flags in ["--peer a --identity b", "--identity b"] {
        let words = flags.split_whitespace().map(OsStr::new);
        let refused = Config::from_words(words).unwrap_err().to_string();
        assert!(
            refused.contains("identity b needs secret-file"),
            "{refused}"
        );
    }
    let table = format!("[[peer]]\npublic-key = \"{key}\"\nidentity = \"a\"");
    assert!(files.config_of(&table).is_err());
}

/// What a peer lacks is what makes its key in this mode.
#[test]
fn what_needs_a_key_is_said_of_the_identity_too() {
    let files = Files::new();
    for (table, part) in [
        (
            "endpoint = \"a\"\npersistent-keepalive = 25",
            "with a secret-file its `identity`",
        ),
        (
            "identity = \"a\"\npreshared-key-file = \"k\"",
            "contradicts `identity`",
        ),
        (
            "endpoint = \"a\"\npreshared-key-file = \"k\"",
            "needs the peer's `public-key`",
        ),
    ] {
        let refused = files.config_of(&format!("[[peer]]\n{table}")).unwrap_err();
        assert!(refused.to_string().contains(part), "{refused}");
    }
}

#[test]
fn the_secret_is_good_and_its_owners_alone() {
    let files = Files::new();
    files.write("secret", &format!("\n {SECRET}\n"), 0o400);
    assert!(files.config("--peer a").is_ok());
    for (text, mode, part) in [
        (SECRET, 0o640, "chmod 600 "),
        ("correct horse battery staple", 0o600, "fewer than 32"),
        (
            "correct horse battery staple correct horse",
            0o600,
            "other characters",
        ),
        ("changeme-changeme-changeme-changeme", 0o600, "guessable"),
        ("", 0o600, "gensecret"),
    ] {
        files.write("secret", text, mode);
        let refused = files.refused("--peer a");
        assert!(
            refused.contains(part) && refused.contains("/secret"),
            "{refused}"
        );
        assert!(text.is_empty() || !refused.contains(text), "{refused}");
    }
}

#[test]
fn a_secret_in_place_of_its_file_is_not_quoted() {
    for text in [
        SECRET.to_string(),
        format!("/{SECRET}"),
        format!("{SECRET}!"),
        SECRET.repeat(30),
        "correct-horse-battery-staple-correct".into(),
    ] {
        let words = ["--secret-file", &text, "--peer", "a"];
        let refused = Config::from_words(words.map(OsStr::new));
        let refused = refused.unwrap_err().to_string();
        assert!(refused.contains("not the secret itself"), "{refused}");
        assert!(!refused.contains(&text[..12]), "{refused}");
    }
    // A file that is missing is named.
    for path in ["none", "/nonexistent/directory.of.secrets/the_secret_file"] {
        let words = ["--secret-file", path, "--peer", "a"];
        let refused = Config::from_words(words.map(OsStr::new));
        let refused = refused.unwrap_err().to_string();
        assert!(
            refused.contains(&format!("cannot read secret-file {path}")),
            "{refused}"
        );
    }
}

/// The identity that a start has found stays, and a new secret makes new keys.
#[test]
fn it_is_read_again() {
    let files = Files::new();
    let mut config = files.config("--peer 10.0.0.2").unwrap();
    config.set_identity_address([10, 0, 0, 1].into()).unwrap();
    assert_eq!(config.reread().unwrap(), config);
    files.write("secret", &SECRET.replace('4', "5"), 0o600);
    let new = config.reread().unwrap();
    assert_eq!(new.own_identity, config.own_identity);
    assert_ne!(new.public_key(), config.public_key());
    assert_ne!(new.peers[0].name, config.peers[0].name);
    assert!(config.needs_restart(&new).is_empty());
}
