//! `fastvpn genkey`, `pubkey` and `genpsk`, which do what those of `wg(8)` do, and `gensecret`.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};

use nix::sys::stat::{Mode, SFlag, fstat};
use zeroize::Zeroizing;

use crate::config::hide_memory;
use crate::error::{Error, Result};
use crate::wire::wireguard::keys::{KEY_FORM, PresharedKey, PrivateKey};
use crate::wire::wireguard::secret::SharedSecret;

/// Longest input that is read: a key, and white space around it.
const INPUT_BYTES_MAX: u64 = 4 << 10;

/// Commands about keys.
#[derive(Clone, Copy, Debug, clap::Subcommand)]
#[allow(missing_docs, reason = "each says what it is in its help")]
pub enum KeyCommand {
    /// Make a private key and print it, as in (umask 077; fastvpn genkey > private.key)
    Genkey,
    /// Read a private key and print its public key, as in fastvpn pubkey < private.key
    Pubkey,
    /// Make a preshared key and print it
    Genpsk,
    /// Make a secret for all hosts (--secret-file) and print it
    Gensecret,
}

/// Carries out one command, from standard input to standard output.
///
/// # Errors
/// When there is no key to read, or when it cannot be written.
pub fn run(command: KeyCommand) -> Result<()> {
    hide_memory();
    let mut stdout = io::stdout();
    let text = match command {
        KeyCommand::Genkey => PrivateKey::generate().to_base64(),
        KeyCommand::Genpsk => PresharedKey::generate().to_base64(),
        KeyCommand::Gensecret => SharedSecret::generate(),
        KeyCommand::Pubkey => Zeroizing::new(public_key(io::stdin().lock())?),
    };
    if !matches!(command, KeyCommand::Pubkey) && is_open_to_others(stdout.as_fd()) {
        say("warning: others than its owner have access to that file; use umask 077");
    }
    writeln!(stdout, "{}", *text)
        .and_then(|()| stdout.flush())
        .map_err(|error| Error::os("cannot write to standard output", error))
}

/// The public key of the private one that `input` holds.
fn public_key(input: impl Read) -> Result<String> {
    // As much as there may be, so that no copy is left behind when it grows.
    let mut text = Zeroizing::new(String::with_capacity(INPUT_BYTES_MAX as usize));
    let read = input.take(INPUT_BYTES_MAX).read_to_string(&mut text);
    let key = match read {
        Ok(_) => text.trim().parse::<PrivateKey>().ok(),
        Err(error) if error.kind() == io::ErrorKind::InvalidData => None,
        Err(error) => return Err(Error::os("cannot read standard input", error)),
    };
    let not_a_key = || {
        let what = format!("standard input is not a private key: expected {KEY_FORM}");
        Error::new(what).hint("`fastvpn genkey` makes one")
    };
    Ok(key.ok_or_else(not_a_key)?.public().to_string())
}

/// Whether a descriptor is a file that its group or anybody has access to.
fn is_open_to_others(descriptor: BorrowedFd<'_>) -> bool {
    let others = Mode::S_IRWXG | Mode::S_IRWXO;
    fstat(descriptor).is_ok_and(|stat| {
        let kind = SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT;
        kind == SFlag::S_IFREG && Mode::from_bits_truncate(stat.st_mode).intersects(others)
    })
}

/// Says a line on standard error. Nobody listening is no reason to stop.
fn say(line: &str) {
    let _ = writeln!(io::stderr(), "fastvpn: {line}");
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File, Permissions};
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    /// The keys of RFC 7748, section 6.1.
    #[test]
    fn a_public_key_follows_from_a_private_one() {
        const ALICE: &str = "dwdtCnMYpX08FsFyUbJmRd9ML4frwJkqsXf7pR25LCo=";
        for text in [
            ALICE.to_string(),
            format!("{ALICE}\n"),
            format!(" {ALICE}\r\n\n"),
        ] {
            let public = public_key(text.as_bytes()).unwrap();
            assert_eq!(public, "hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=");
        }
        for bad in [
            "",
            "\n",
            "private",
            &ALICE[..43],
            &ALICE.repeat(2),
            &ALICE.repeat(200),
        ] {
            let error = public_key(bad.as_bytes()).unwrap_err().to_string();
            assert!(error.contains("not a private key"), "{error}");
            assert!(!error.contains("dwdt"), "{error}");
        }
        assert!(public_key(&b"\xff\xfe"[..]).is_err());
    }

    #[test]
    fn a_file_that_others_may_read_is_told_from_one_that_is_private() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("key");
        let file = File::create(&path).unwrap();
        for (mode, is_open) in [(0o600, false), (0o400, false), (0o640, true), (0o604, true)] {
            fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
            assert_eq!(is_open_to_others(file.as_fd()), is_open, "{mode:o}");
        }
        // No file, so nothing is left in it.
        let null = File::open("/dev/null").unwrap();
        assert!(!is_open_to_others(null.as_fd()));
    }
}
