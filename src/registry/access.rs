//! How etcd is reached: where it is, and what proves who is who.

use std::net::IpAddr;
use std::path::Path;

use zeroize::Zeroizing;

use crate::config::{RegistryFiles, read_secret_text};
use crate::error::{Error, Result};

/// Largest file with certificates.
const CERTIFICATES_BYTES_MAX: u64 = 1 << 20;

/// See the module's documentation. A key and a password are wiped when it goes.
#[derive(Clone)]
pub(crate) struct Access {
    /// The members' URLs.
    pub(crate) urls: Vec<String>,
    /// Certificates of those who may sign the members' certificates, in PEM.
    pub(crate) ca: Option<Vec<u8>>,
    /// This host's certificate and private key, in PEM.
    pub(crate) identity: Option<(Vec<u8>, Zeroizing<Vec<u8>>)>,
    /// A user and a password.
    pub(crate) user: Option<(String, Zeroizing<String>)>,
}

impl Access {
    /// Reads the files that are named.
    ///
    /// # Errors
    /// Names the file that cannot be used, or the option that is missing.
    pub(crate) fn read(files: &RegistryFiles) -> Result<Self> {
        files.check()?;
        let read = |option: &str, path: &Path| read_certificates(option, path);
        let ca = files.ca.as_deref().map(|path| read("registry-ca", path));
        let identity = match (&files.cert, &files.key) {
            (Some(cert), Some(key)) => {
                let key = read_secret_text("registry-key", key)?;
                let cert = read("registry-cert", cert)?;
                Some((cert, Zeroizing::new(key.as_bytes().to_vec())))
            }
            _ => None,
        };
        let password = match (&files.password_file, &files.password) {
            (Some(file), _) => {
                let text = read_secret_text("registry-password-file", file)?;
                Some(Zeroizing::new(text.trim_end_matches(['\n', '\r']).into()))
            }
            (None, password) => password.as_ref().map(|password| password.0.clone()),
        };
        Ok(Self {
            urls: files.urls.clone(),
            ca: ca.transpose()?,
            identity,
            user: files.user.clone().zip(password),
        })
    }

    /// The addresses of etcd's that its URLs have.
    pub(crate) fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        let hosts = self.urls.iter().map(|url| host_of(url));
        hosts.filter_map(|host| host.parse().ok())
    }
}

/// The name or address in a URL of etcd's.
pub(super) fn host_of(url: &str) -> &str {
    let host = url.split_once("://").map_or(url, |(_, host)| host);
    let is_bare = host.ends_with(']') || !host.contains(':');
    let host = match host.rsplit_once(':') {
        Some((host, _)) if !is_bare => host,
        _ => host,
    };
    host.trim_matches(['[', ']'])
}

fn read_certificates(option: &str, path: &Path) -> Result<Vec<u8>> {
    let name = path.display();
    let cannot = |cause| Error::os(format!("cannot read {option} {name}"), cause);
    let metadata = std::fs::metadata(path).map_err(cannot)?;
    if !metadata.is_file() || metadata.len() > CERTIFICATES_BYTES_MAX {
        let what = format!("{option} {name} is not a regular file of at most 1 MiB");
        return Err(Error::new(what));
    }
    std::fs::read(path).map_err(cannot)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_have_hosts() {
        for (url, host) in [
            ("http://10.0.0.1:2379", "10.0.0.1"),
            ("https://10.0.0.1", "10.0.0.1"),
            ("http://[fd00::1]:2379", "fd00::1"),
            ("http://[fd00::1]", "fd00::1"),
            ("https://etcd1:2379", "etcd1"),
        ] {
            assert_eq!(host_of(url), host, "{url}");
        }
    }
}
