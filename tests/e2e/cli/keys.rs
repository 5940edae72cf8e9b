//! Keys on the command line: made, and refused.

use std::fs::{self, File, Permissions};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Output, Stdio};

use fastvpn::error::Result;

use super::errors::one_line;
use crate::operator::Operator;
use crate::support::{FASTVPN, check, fastvpn, hosts, tried, wait_for};
use crate::tools::{inventory, nothing_left};

/// Runs a command about keys with this standard input.
fn run(words: &str, input: &str, stdout: Stdio) -> Result<Output> {
    let mut command = Command::new(FASTVPN);
    command.args(words.split_whitespace());
    command.stdin(Stdio::piped()).stdout(stdout);
    let mut child = tried("start fastvpn", command.stderr(Stdio::piped()).spawn())?;
    if let Some(mut stdin) = child.stdin.take() {
        // One that reads nothing may have ended.
        let _ = stdin.write_all(input.as_bytes());
    }
    tried("wait for fastvpn", child.wait_with_output())
}

/// A key that a command has made.
fn make(words: &str, input: &str) -> Result<String> {
    let output = run(words, input, Stdio::piped())?;
    let text = String::from_utf8_lossy(&output.stdout);
    let is_a_line = text.len() == 45 && text.ends_with("=\n");
    let errors = String::from_utf8_lossy(&output.stderr);
    check(
        output.status.success() && is_a_line && errors.is_empty(),
        || format!("{words}: {output:?}"),
    )?;
    Ok(text.trim_end().into())
}

/// Writes a key to a file with these permissions.
fn file(operator: &Operator, name: &str, key: &str, mode: u32) -> Result<String> {
    let path = operator.write(name, &format!("{key}\n"))?;
    let permissions = Permissions::from_mode(mode);
    tried("set permissions", fs::set_permissions(&path, permissions))?;
    Ok(path)
}

#[testbed::trial]
fn keys_are_made() -> Result<()> {
    let private = make("genkey", "")?;
    let public = make("pubkey", &format!("{private}\n"))?;
    check(public != private, || "the same".into())?;
    check(make("pubkey", &private)? == public, || "another".into())?;
    let others = [
        make("genkey", "")?,
        make("genpsk", "")?,
        make("genpsk", "")?,
    ];
    check(
        others.iter().all(|other| *other != private) && others[1] != others[2],
        || "not random".into(),
    )?;
    let refused = run("pubkey", "no key\n", Stdio::piped())?;
    let said = String::from_utf8_lossy(&refused.stderr);
    check(
        refused.status.code() == Some(1)
            && said.starts_with("fastvpn: standard input is not a private key")
            && said.lines().count() == 1,
        || format!("{refused:?}"),
    )
}

#[testbed::trial]
fn a_key_in_a_file_that_others_may_read_is_warned_of() -> Result<()> {
    let operator = Operator::new()?;
    for (mode, is_warned) in [(0o644, true), (0o640, true), (0o600, false)] {
        let path = file(&operator, "made", "", mode)?;
        for words in ["genkey", "genpsk"] {
            let to = tried("open a file", File::create(&path))?;
            let output = run(words, "", to.into())?;
            let said = String::from_utf8_lossy(&output.stderr);
            check(
                output.status.success() && said.contains("umask 077") == is_warned,
                || format!("{words}, {mode:o}: {output:?}"),
            )?;
            let written = tried("read the file", fs::read_to_string(&path))?;
            check(written.len() == 45, || written.clone())?;
        }
    }
    Ok(())
}

#[testbed::trial]
fn keys_that_do_not_fit_are_refused() -> Result<()> {
    let (hosts, operator) = (hosts(1500)?, Operator::new()?);
    let own = make("genkey", "")?;
    let own_public = make("pubkey", &own)?;
    let far_public = make("pubkey", &make("genkey", "")?)?;
    let good = file(&operator, "good", &own, 0o600)?;
    let open = file(&operator, "open", &own, 0o644)?;
    let bad = file(&operator, "bad", "no key", 0o600)?;
    let far = "10.211.55.123";
    for (flags, parts) in [
        (
            format!("--private-key {open} --peer {far_public}@{far}"),
            ["private-key", "mode 0644", "chmod 600"],
        ),
        (
            format!("--private-key {bad} --peer {far_public}@{far}"),
            ["private-key", "does not hold a key", "genkey"],
        ),
        (
            format!("--private-key /nonexistent --peer {far_public}@{far}"),
            ["private-key", "/nonexistent", "no such file"],
        ),
        (
            format!("--private-key {own} --peer {far_public}@{far}"),
            ["private-key", "not the key itself", ""],
        ),
        (
            format!("--private-key {good} --peer {far}"),
            [far, "no public key", "KEY@HOST"],
        ),
        (
            format!("--peer {far_public}@{far}"),
            [&far_public, "no private key", "--private-key"],
        ),
        (
            format!("--private-key {good} --peer {own_public}@{far}"),
            [&own_public, "own key", "the other host"],
        ),
        (
            format!("--private-key {good} --peer {far_public}"),
            ["tunnel address", "--address", ""],
        ),
    ] {
        let mut command = Command::new(FASTVPN);
        command.args(flags.split_whitespace());
        one_line(&hosts.a, command, &parts)?;
    }
    let text = format!(
        "private-key = \"{good}\"\n[[peer]]\npublic-key = \"{far_public}\"\n\
         endpoint = \"{far}\"\npreshared-key-file = \"{open}\""
    );
    let config = operator.write("f.toml", &text)?;
    let mut command = Command::new(FASTVPN);
    command.args(["--config", &config]);
    one_line(&hosts.a, command, &["preshared-key-file", "chmod 600"])
}

/// What is given at run time is as strict, and nothing that is shown is secret.
#[testbed::trial]
fn peers_with_keys_are_configured_and_shown() -> Result<()> {
    let (hosts, operator) = (hosts(1500)?, Operator::new()?);
    let before = inventory(&hosts.a)?;
    let keys = [make("genkey", "")?, make("genkey", "")?];
    let public = [make("pubkey", &keys[0])?, make("pubkey", &keys[1])?];
    let psk = make("genpsk", "")?;
    let psk_file = file(&operator, "psk", &psk, 0o600)?;
    let text = |host: usize, far: &str| {
        let own = file(&operator, &format!("key{host}"), &keys[host], 0o600)?;
        Ok(format!(
            "private-key = \"{own}\"\n[[peer]]\npublic-key = \"{}\"\n{far}\
             preshared-key-file = \"{psk_file}\"\npersistent-keepalive = 25\n",
            public[1 - host]
        ))
    };
    let near: String = text(0, "endpoint = \"10.211.55.123\"\n")?;
    // It is found when it calls.
    let far: String = text(1, "prefixes = [\"10.244.55.122/32\"]\n")?;
    let far = format!("address = [\"10.244.55.123/16\"]\n{far}");
    let near = operator.write("a.toml", &near)?;
    let far = operator.write("b.toml", &far)?;
    let socket = operator.socket_text();
    let a = fastvpn(&hosts.a, &format!("--config {near} --control {socket}"))?;
    let b = fastvpn(&hosts.b, &format!("--config {far} --control {socket}.b"))?;
    wait_for(&hosts.a, [10, 244, 55, 123].into())?;
    let mut shown = operator.tell("status")? + &operator.tell("peers")?;
    shown += &operator.tell("peers --json")?;
    shown += &operator.tell("status --json")?;
    for part in [&public[0], &public[1], "25 s", "10.211.55.123:8285"] {
        check(shown.contains(part), || format!("no {part} in:\n{shown}"))?;
    }
    for secret in [&keys[0], &keys[1], &psk] {
        check(!shown.contains(secret), || "a secret is shown".into())?;
    }
    let peers = operator.ask("peers")?;
    let peer = &peers["peers"][0];
    let wireguard = &peer["wireguard"];
    check(
        wireguard["latest_handshake_seconds"].as_u64() < Some(60)
            && wireguard["has_preshared_key"] == true
            && peer["peer"] == public[1].as_str(),
        || peers.to_string(),
    )?;
    operator.refuses("peer add 10.0.0.9=10.9.0.0/16", &["no public key"])?;
    let added = format!(
        "peer add {}@10.0.0.9:51820=10.9.0.0/16",
        make("pubkey", &psk)?
    );
    operator.tell(&added)?;
    operator.refuses(&added, &["already"])?;
    a.stop()?;
    b.stop()?;
    nothing_left(&hosts.a, &before)
}
