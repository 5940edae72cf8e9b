//! What was last known of the registry, on disk: a host boots by it where etcd does not answer.

use std::fs;
use std::path::Path;
use std::time::Instant;

use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};

use super::entry::Keys;
use super::subnet_env::replace;
use super::view::{Pair, View};
use crate::error::{Error, Result};

/// Largest file that is read.
const FILE_BYTES_MAX: u64 = 256 << 20;

/// The form of the file.
const VERSION: u32 = 1;

/// What is in the file.
pub(crate) struct Cached {
    /// What was known.
    pub(crate) view: View,
    /// The subnet that this host had.
    pub(crate) subnet: Option<Ipv4Net>,
}

#[derive(Serialize, Deserialize)]
struct File {
    version: u32,
    prefix: String,
    cluster: u64,
    revision: i64,
    subnet: Option<Ipv4Net>,
    keys: Vec<Entry>,
}

#[derive(Serialize, Deserialize)]
struct Entry {
    key: String,
    value: String,
    create_revision: i64,
    mod_revision: i64,
    lease: i64,
}

/// Reads the file. `None` if there is none, or one about another registry.
///
/// # Errors
/// When it cannot be read; names it.
pub(crate) fn read(path: &Path, prefix: &str) -> Result<Option<Cached>> {
    let name = path.display();
    let text = match fs::metadata(path) {
        Err(cause) if cause.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Ok(metadata) if metadata.len() > FILE_BYTES_MAX => {
            return Err(Error::new(format!("{name} is too large for a cache")));
        }
        _ => fs::read(path).map_err(|cause| Error::os(format!("cannot read {name}"), cause))?,
    };
    let file: File = serde_json::from_slice(&text)
        .map_err(|_| Error::new(format!("{name} is not a cache of a registry")))?;
    if file.version != VERSION || file.prefix != prefix {
        return Ok(None);
    }
    let pairs = file.keys.into_iter().map(|entry| Pair {
        key: entry.key.into(),
        value: entry.value.into(),
        create_revision: entry.create_revision,
        mod_revision: entry.mod_revision,
        lease: entry.lease,
    });
    let mut view = View::new(Keys::new(prefix));
    view.replace(pairs.collect(), file.cluster, file.revision, Instant::now());
    Ok(Some(Cached {
        view,
        subnet: file.subnet,
    }))
}

/// Writes the file, for its owner alone: the network's configuration may have a secret in it.
///
/// # Errors
/// When it cannot be written; names it.
pub(crate) fn write(path: &Path, prefix: &str, view: &View, subnet: Option<Ipv4Net>) -> Result<()> {
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    let keys = view.pairs().into_iter().map(|pair| Entry {
        key: text(pair.key),
        value: text(pair.value),
        create_revision: pair.create_revision,
        mod_revision: pair.mod_revision,
        lease: pair.lease,
    });
    let file = File {
        version: VERSION,
        prefix: prefix.to_string(),
        cluster: view.cluster(),
        revision: view.revision(),
        subnet,
        keys: keys.collect(),
    };
    let text = serde_json::to_vec(&file)
        .map_err(|error| Error::new(format!("cannot write {}: {error}", path.display())))?;
    replace(path, &text, 0o600)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn what_is_written_is_read_again() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("new/registry.json");
        assert!(read(&path, "/n").unwrap().is_none());
        let subnet: Ipv4Net = "10.50.2.0/24".parse().unwrap();
        let keys = Keys::new("/n");
        let pair = |key: String, value: &str| Pair {
            key: key.into(),
            value: value.into(),
            create_revision: 0,
            mod_revision: 4,
            lease: 5,
        };
        let pairs = vec![
            pair(keys.config(), r#"{"Network":"10.50.0.0/16"}"#),
            pair(
                keys.subnet(subnet),
                r#"{"PublicIP":"10.0.0.2","PublicIPv6":null}"#,
            ),
        ];
        let mut view = View::new(keys);
        view.replace(pairs.clone(), 7, 9, Instant::now());
        write(&path, "/n", &view, Some(subnet)).unwrap();
        let cached = read(&path, "/n").unwrap().unwrap();
        assert_eq!((cached.subnet, cached.view.pairs()), (Some(subnet), pairs));
        assert_eq!((cached.view.cluster(), cached.view.revision()), (7, 9));
        assert_eq!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600
        );
        // Of another network nothing is known.
        assert!(read(&path, "/m").unwrap().is_none());
        for bad in ["", "{}", "[1]"] {
            fs::write(&path, bad).unwrap();
            let error = read(&path, "/n").err().unwrap().to_string();
            assert!(error.contains("not a cache"), "{error}");
        }
    }
}
