//! Debian packages of fastvpn.

use crate::program::{Program, Source};
use crate::systemd;

/// Makes them.
pub const CARGO_DEB: Program = Program {
    name: "cargo-deb",
    source: Source::Crate("cargo-deb"),
};

/// Why they cannot be made and tried out here.
pub fn missing() -> Option<String> {
    let dpkg = Program::debian("dpkg-shlibdeps", "dpkg-dev").missing();
    systemd::missing().or(dpkg).or_else(|| CARGO_DEB.missing())
}
