//! This host's private key, where nobody has given it one: made once, and kept.

use std::path::Path;

use zeroize::Zeroizing;

use super::subnet_env::replace;
use crate::config::{hide_memory, read_secret_text};
use crate::error::{Error, Result};
use crate::wire::wireguard::keys::PrivateKey;

/// Reads the key in the file at `path`, or makes one there.
///
/// # Errors
/// When the file cannot be read or made, when others than its owner have access to it, or
/// when it holds something else.
pub(super) fn read_or_make(path: &Path) -> Result<PrivateKey> {
    if path.exists() {
        let text = read_secret_text("registry's key file", path)?;
        return text.trim().parse().map_err(|_| {
            let what = format!("{} does not hold a private key", path.display());
            Error::new(what).hint("remove it, and a new one is made")
        });
    }
    // Whatever is read is hidden already.
    hide_memory();
    let key = PrivateKey::generate();
    let text = Zeroizing::new(format!("{}\n", *key.to_base64()));
    replace(path, text.as_bytes(), 0o600)?;
    Ok(key)
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_key_is_made_once() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("new/key");
        let key = read_or_make(&path).unwrap().public();
        assert_eq!(read_or_make(&path).unwrap().public(), key);
        fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
        let error = read_or_make(&path).err().unwrap().to_string();
        assert!(error.contains("chmod 600"), "{error}");
        fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
        fs::write(&path, "bogus").unwrap();
        let error = read_or_make(&path).err().unwrap().to_string();
        assert!(
            error.contains("private key") && !error.contains("bogus"),
            "{error}"
        );
    }
}
