//! Files with keys: a private key, or one that two ends share. Nobody but their owner
//! may have access to them.

use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::str::FromStr;

use nix::sys::prctl::set_dumpable;
use zeroize::{Zeroize, Zeroizing};

use super::options::Config;
use crate::error::{Error, Result};
use crate::wire::wireguard::keys::KEY_FORM;

/// Largest key file: a key, and white space around it.
const FILE_BYTES_MAX: u64 = 4 << 10;

impl Config {
    /// Reads the files with keys that the options name.
    ///
    /// # Errors
    /// Names the file that cannot be used, or the peer that has this host's own key.
    pub(crate) fn read_keys(&mut self) -> Result<()> {
        if let Some(file) = &self.private_key_file {
            self.private_key = Some(read_key("private-key", file)?);
        }
        if self.private_key.is_none() {
            return Ok(());
        }
        for peer in &mut self.peers {
            if let Some(file) = &peer.preshared_key_file {
                peer.preshared_key = read_key("preshared-key-file", file)?;
            }
        }
        let own = self.public_key();
        match self.peers.iter().find(|peer| peer.name.key() == own) {
            None => Ok(()),
            Some(peer) => {
                let what = format!("peer {} has this host's own key", peer.name);
                Err(Error::new(what).hint("give it the public key of the other host"))
            }
        }
    }
}

/// Keeps keys out of core dumps, and from other processes of the same user (ptrace(2),
/// `/proc/PID/mem`); to be called before any is read or made. It covers all memory, wherever
/// keys are copied to, so no range needs `MADV_DONTDUMP` of its own; and it needs no right
/// that could be missing, nor can it fail (prctl(2)).
pub(crate) fn hide_memory() {
    let _ = set_dumpable(false);
}

/// Reads a key from a file that nobody but its owner has access to. `option`: what names
/// the file.
///
/// # Errors
/// When it cannot be read, when its group or anybody has access to it, or when it does not
/// hold a key. The error does not quote what it holds.
fn read_key<K: FromStr>(option: &str, path: &Path) -> Result<K> {
    if is_key(path) {
        let what = format!("{option} takes the path of a file with the key, not the key itself");
        return Err(Error::new(what));
    }
    let key = read_text(option, path)?.trim().parse();
    key.map_err(|_| {
        let name = path.display();
        let what = format!("{option} {name} does not hold a key: {KEY_FORM}");
        Error::new(what).hint("`fastvpn genkey` and `fastvpn genpsk` make keys")
    })
}

/// Reads a secret as text from a file that nobody but its owner has access to. What is longer
/// than any secret, or no text, counts as empty.
///
/// # Errors
/// When it cannot be read, or when its group or anybody has access to it.
pub(crate) fn read_text(option: &str, path: &Path) -> Result<Zeroizing<String>> {
    let name = path.display();
    let cannot = |cause| Error::os(format!("cannot read {option} {name}"), cause);
    let (file, metadata) = open(option, path)?;
    check_owner_alone(option, path, &metadata)?;
    hide_memory();
    // As much as there may be, so that no copy is left behind when it grows.
    let mut text = Zeroizing::new(String::with_capacity(2 * FILE_BYTES_MAX as usize));
    match file.take(FILE_BYTES_MAX + 1).read_to_string(&mut text) {
        // Not UTF-8, so no base64 either.
        Err(error) if error.kind() != io::ErrorKind::InvalidData => return Err(cannot(error)),
        _ => {}
    }
    if text.len() as u64 > FILE_BYTES_MAX {
        text.zeroize();
    }
    Ok(text)
}

/// Opens a regular file to read, and tells what the kernel knows of it.
///
/// # Errors
/// When it cannot be opened, or is something else.
pub(super) fn open(option: &str, path: &Path) -> Result<(File, Metadata)> {
    let name = path.display();
    let cannot = |cause| Error::os(format!("cannot read {option} {name}"), cause);
    // A pipe that nobody writes to would block.
    let mut options = OpenOptions::new();
    let options = options.read(true).custom_flags(libc::O_NONBLOCK);
    let file = options.open(path).map_err(cannot)?;
    let metadata = file.metadata().map_err(cannot)?;
    match metadata.is_file() {
        true => Ok((file, metadata)),
        // It is read again at each reload.
        false => Err(Error::new(format!("{option} {name} is not a regular file"))),
    }
}

/// Makes sure that nobody but its owner has access to a file.
///
/// # Errors
/// Names it.
pub(super) fn check_owner_alone(option: &str, path: &Path, metadata: &Metadata) -> Result<()> {
    let (name, mode) = (path.display(), metadata.mode() & 0o7777);
    if mode & 0o077 == 0 {
        return Ok(());
    }
    let what = format!("{option} {name} is open to others than its owner (mode {mode:04o})");
    Err(Error::new(what).hint(format!("chmod 600 {name}")))
}

/// Whether somebody has taken the key itself for its file's path.
fn is_key(path: &Path) -> bool {
    use crate::wire::wireguard::keys::PublicKey;
    path.to_str()
        .is_some_and(|text| text.parse::<PublicKey>().is_ok())
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::PermissionsExt;

    use nix::sys::prctl::get_dumpable;

    use super::*;
    use crate::wire::wireguard::keys::{PresharedKey, PrivateKey};

    /// Of RFC 7748, section 6.1.
    const PRIVATE: &str = "dwdtCnMYpX08FsFyUbJmRd9ML4frwJkqsXf7pR25LCo=";
    const PUBLIC: &str = "hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=";

    fn read(text: &str, mode: u32) -> Result<PrivateKey> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("key");
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
        read_key("private-key", &path)
    }

    #[test]
    fn a_key_is_read_from_a_file_of_its_owner_alone() {
        for (text, mode) in [
            (PRIVATE.to_string(), 0o600),
            (format!("{PRIVATE}\n"), 0o400),
            (format!("\n {PRIVATE}\r\n\n"), 0o700),
        ] {
            let key = read(&text, mode).unwrap();
            assert_eq!(key.public().to_string(), PUBLIC);
        }
        for mode in [0o604, 0o640, 0o660, 0o620, 0o601, 0o644] {
            let error = read(PRIVATE, mode).unwrap_err().to_string();
            let parts = ["private-key", "/key", "chmod 600 ", &format!("{mode:04o}")];
            assert!(parts.iter().all(|part| error.contains(part)), "{error}");
        }
    }

    #[test]
    fn what_is_no_key_is_refused_and_not_quoted() {
        let long = format!("{PRIVATE}{}{PRIVATE}", " ".repeat(8192));
        for text in ["", "\n", &PRIVATE[1..], &long, "\u{e9}", "private"] {
            let error = read(text, 0o600).unwrap_err().to_string();
            assert!(error.contains("does not hold a key"), "{error}");
            assert!(error.contains("genkey"), "{error}");
            assert!(!error.contains(&PRIVATE[1..20]), "{error}");
        }
    }

    /// Whatever file they are in, and whatever the process is to be.
    #[test]
    fn a_process_that_reads_keys_leaves_no_core_dump() {
        use std::ffi::OsStr;

        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        for (option, text) in [
            ("--private-key", PRIVATE.to_string()),
            ("--secret-file", PRIVATE.to_string()),
            (
                "--wg-config",
                format!("[Interface]\nPrivateKey = {PRIVATE}\n"),
            ),
        ] {
            fs::write(&path, text).unwrap();
            fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
            set_dumpable(true).unwrap();
            let words = [OsStr::new(option), path.as_os_str()];
            Config::from_words(words).unwrap();
            assert_eq!(get_dumpable(), Ok(false), "{option}");
        }
        // Other tests of this process are none of its business.
        set_dumpable(true).unwrap();
    }

    #[test]
    fn the_file_is_a_file() {
        let error = |path: &str| {
            let read: Result<PresharedKey> = read_key("preshared-key-file", Path::new(path));
            read.map(drop).unwrap_err().to_string()
        };
        assert!(error("/dev/null").contains("not a regular file"));
        assert!(error("/proc/self").contains("not a regular file"));
        let missing = error("/nonexistent/key");
        assert!(missing.contains("cannot read preshared-key-file /nonexistent/key: no such file"));
        let key = error(PRIVATE);
        assert!(
            key.contains("not the key itself") && !key.contains(PRIVATE),
            "{key}"
        );
    }
}
