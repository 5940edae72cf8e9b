//! `subnet.env`: what flannel's CNI plugin and docker read of this host's subnet.

use std::fs::{self, OpenOptions, Permissions};
use std::io::Write;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;

use ipnet::Ipv4Net;

use crate::error::{Error, Result};

/// Longest file that is read.
const FILE_BYTES_MAX: usize = 16 << 10;

/// The file's text. The bridge on this host has the subnet's first address.
pub(crate) fn text(
    network: Ipv4Net,
    subnet: Ipv4Net,
    mtu_bytes: u32,
    is_masqueraded: bool,
) -> String {
    let bridge = u32::from(subnet.network()) | 1;
    let (bridge, length) = (std::net::Ipv4Addr::from(bridge), subnet.prefix_len());
    format!(
        "FLANNEL_NETWORK={network}\nFLANNEL_SUBNET={bridge}/{length}\nFLANNEL_MTU={mtu_bytes}\n\
         FLANNEL_IPMASQ={is_masqueraded}\n"
    )
}

/// The subnet that a text like that names.
pub(crate) fn subnet(text: &str) -> Option<Ipv4Net> {
    let value = text
        .lines()
        .find_map(|line| line.strip_prefix("FLANNEL_SUBNET="))?;
    let subnet: Ipv4Net = value.trim().parse().ok()?;
    Some(subnet.trunc())
}

/// The subnet that the file at `path` names, if there is such a file.
pub(crate) fn previous_subnet(path: &Path) -> Option<Ipv4Net> {
    let bytes = fs::metadata(path).ok()?.len();
    let text = fs::read_to_string(path)
        .ok()
        .filter(|_| bytes <= FILE_BYTES_MAX as u64)?;
    subnet(&text)
}

/// Puts a file with this text and mode in the place of the one at `path`, at once and as a
/// whole; makes its directory if there is none.
///
/// # Errors
/// Names the file that cannot be written.
pub(crate) fn replace(path: &Path, text: &[u8], mode: u32) -> Result<()> {
    let cannot = |cause| Error::os(format!("cannot write {}", path.display()), cause);
    if let Some(directory) = path.parent().filter(|it| !it.as_os_str().is_empty()) {
        fs::create_dir_all(directory).map_err(cannot)?;
    }
    let mut name = path.as_os_str().to_os_string();
    name.push(format!(".{}", std::process::id()));
    let temporary = Path::new(&name);
    // One of a process that died.
    let _ = fs::remove_file(temporary);
    let mut options = OpenOptions::new();
    let options = options.write(true).create_new(true).mode(mode);
    let written = options.open(temporary).and_then(|mut file| {
        // The umask has cut it.
        file.set_permissions(Permissions::from_mode(mode))?;
        file.write_all(text)?;
        fs::rename(temporary, path)
    });
    written.map_err(|cause| {
        let _ = fs::remove_file(temporary);
        cannot(cause)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn net(text: &str) -> Ipv4Net {
        text.parse().unwrap()
    }

    #[test]
    fn the_text_is_flannels() {
        let written = text(net("10.50.0.0/16"), net("10.50.71.0/24"), 1472, false);
        assert_eq!(
            written,
            "FLANNEL_NETWORK=10.50.0.0/16\nFLANNEL_SUBNET=10.50.71.1/24\nFLANNEL_MTU=1472\n\
             FLANNEL_IPMASQ=false\n"
        );
        assert_eq!(subnet(&written), Some(net("10.50.71.0/24")));
        for bad in ["", "FLANNEL_SUBNET=", "FLANNEL_SUBNET=x", "FLANNEL_MTU=1"] {
            assert_eq!(subnet(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn a_file_is_replaced_as_a_whole() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("flannel/subnet.env");
        assert_eq!(previous_subnet(&path), None);
        for subnet in ["10.50.71.0/24", "10.50.72.0/24"] {
            let written = text(net("10.50.0.0/16"), net(subnet), 1472, true);
            replace(&path, written.as_bytes(), 0o644).unwrap();
            assert_eq!(previous_subnet(&path), Some(net(subnet)));
        }
        assert_eq!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o644
        );
        // Whatever the umask is.
        replace(&path, b"", 0o666).unwrap();
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o666);
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
        let error = replace(&directory.path().join("flannel"), b"", 0o644).unwrap_err();
        assert!(error.to_string().contains("cannot write"), "{error}");
    }
}
