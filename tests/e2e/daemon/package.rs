//! The Debian package under a real systemd.

use std::env;
use std::fs;
use std::path::Path;
use std::process::Command;

use fastvpn::error::{Error, Result};
use tempfile::TempDir;
use testbed::package::CARGO_DEB;
use testbed::systemd::Systemd;

use super::systemd::{FILE, Machine, OVERRIDE, SERVICE, Traffic};
use crate::support::{FASTVPN, TUNNEL, check, fastvpn, hosts, stop, tried, wait_for, wait_until};
use crate::tools::{inventory, nothing_left};

const BUILD: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/packaging/build-deb");

/// What is installed, with modes.
const INSTALLED: [&str; 9] = [
    "755 /usr/bin/fastvpn",
    "644 /usr/lib/systemd/system/fastvpn@.service",
    "700 /etc/fastvpn",
    "600 /etc/fastvpn/example.toml",
    "644 /usr/share/man/man1/fastvpn.1.gz",
    "644 /usr/share/bash-completion/completions/fastvpn",
    "644 /usr/share/zsh/vendor-completions/_fastvpn",
    "644 /usr/share/fish/vendor_completions.d/fastvpn.fish",
    "644 /usr/share/doc/fastvpn/copyright",
];

/// Packages the program under test as such a version.
fn build(version: &str, file: &Path) -> Result<()> {
    let cargo_deb = CARGO_DEB.path().unwrap_or_default();
    let path = env::var_os("PATH").unwrap_or_default();
    let all = env::split_paths(&path).chain(cargo_deb.parent().map(Path::to_path_buf));
    let path = env::join_paths(all).map_err(|error| Error::new(error.to_string()))?;
    let profile = match FASTVPN.contains("/release/") {
        true => "release",
        false => "dev",
    };
    let mut command = Command::new(BUILD);
    command
        .args(["--no-build", "--strip", "--fast", "--profile", profile])
        .args(["--deb-version", version, "--output"])
        .arg(file)
        .env("PATH", path);
    let output = tried("start build-deb", command.output())?;
    check(output.status.success(), || {
        String::from_utf8_lossy(&output.stderr).into_owned()
    })
}

/// A machine, on which packages are installed.
struct Debian(Machine);

impl Debian {
    fn tell(&self, words: &str) -> Result<String> {
        self.0.0.tell(words)
    }

    /// `dpkg WORDS`.
    fn dpkg(&self, words: &str) -> Result<String> {
        self.tell(&format!("dpkg {words}"))
    }

    fn has(&self, path: &str) -> Result<bool> {
        Ok(self.0.0.run(&["test", "-e", path])?.status.success())
    }

    /// Whether the package's files are there, and are what they should be.
    fn check_files(&self) -> Result<()> {
        for file in INSTALLED {
            let path = file.split(' ').nth(1).unwrap_or_default();
            let found = self.tell(&format!("stat -c %a:%U:%G:%n {path}"))?;
            let expected = file.replace(' ', ":root:root:");
            check(found == expected, || format!("{found}, not {expected}"))?;
        }
        let query = "dpkg-query --show --showformat ${Conffiles} fastvpn";
        let conffiles = self.tell(query)?;
        check(conffiles.starts_with("/etc/fastvpn/example.toml "), || {
            conffiles.clone()
        })?;
        self.dpkg("--verify fastvpn").map(drop)
    }
}

/// Installed, it runs a tunnel. A new version goes on with it, without a loss; and a purge leaves
/// nothing but what the administrator has made.
#[testbed::trial(needs_root, long, package)]
fn a_package_is_installed_upgraded_and_purged() -> Result<()> {
    let hosts = hosts(1500)?;
    let before = inventory(&hosts.a)?;
    let directory = tried("make a directory", TempDir::new())?;
    let packages = directory.path().join("packages");
    tried("make a directory", fs::create_dir(&packages))?;
    for version in ["1.0-1", "1.0-2"] {
        build(version, &packages.join(format!("{version}.deb")))?;
    }
    let own = ("units/fastvpn@.service.d/test.conf", OVERRIDE);
    let systemd = Systemd::boot(&hosts.a, directory.path(), &[own], "", None)?;
    let debian = Debian(Machine(systemd));
    debian.dpkg("--install /run/packages/1.0-1.deb")?;
    debian.check_files()?;
    // Of this machine's units, systemd is to see this one alone.
    debian.tell("ln -s /usr/lib/systemd/system/fastvpn@.service /run/units/")?;
    debian.tell("systemctl daemon-reload")?;
    let write = [
        "sh",
        "-c",
        "printf %s \"$0\" > /etc/fastvpn/office.toml",
        FILE,
    ];
    check(debian.0.0.run(&write)?.status.success(), || {
        "no file".into()
    })?;
    debian.tell(&format!("systemctl start {SERVICE}"))?;
    let far = fastvpn(&hosts.b, "--peer 10.211.55.122")?;
    wait_for(&hosts.a, TUNNEL[1].into())?;
    // The administrator's changes stay.
    debian.tell("chmod 0750 /etc/fastvpn")?;
    debian.tell("cp /etc/fastvpn/office.toml /etc/fastvpn/example.toml")?;
    let old = debian.0.pid()?;
    Traffic(&hosts).survives(|_| {
        let installed = debian.dpkg("--install /run/packages/1.0-2.deb");
        installed.map(drop)
    })?;
    let (new, program) = (debian.0.pid()?, debian.0.program()?);
    check(new != old && program == "/usr/bin/fastvpn", || {
        format!("{program} in process {new}:\n{}", debian.0.log())
    })?;
    check(debian.0.number("NRestarts")? == 0, || debian.0.log())?;
    let mode = debian.tell("stat -c %a /etc/fastvpn")?;
    check(mode == "750", || mode.clone())?;
    debian.tell("cmp /etc/fastvpn/office.toml /etc/fastvpn/example.toml")?;
    let installed = debian.tell("dpkg-query --show --showformat ${Version} fastvpn")?;
    check(installed == "1.0-2", || installed.clone())?;
    // Removed, it runs no more.
    debian.dpkg("--remove fastvpn")?;
    wait_until("the tunnel has ended", || {
        Ok(inventory(&hosts.a)?.is_subset(&before))
    })?;
    nothing_left(&hosts.a, &before)?;
    check(debian.has("/etc/fastvpn/example.toml")?, || {
        "a file of the administrator's is gone".into()
    })?;
    debian.dpkg("--purge fastvpn")?;
    let found = "find /etc /usr /lib /var /run -xdev -name *fastvpn* -not -path /run/units/*";
    let left = debian.tell(found)?;
    let left: Vec<_> = left.lines().collect();
    check(left == ["/etc/fastvpn"], || format!("{left:?}"))?;
    let left = debian.tell("ls -A /etc/fastvpn")?;
    check(left == "office.toml", || left.clone())?;
    drop(debian);
    stop(far).map(drop)
}
