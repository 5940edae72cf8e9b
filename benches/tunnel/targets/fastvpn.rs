//! fastvpn, with any flags, of any version.

use std::path::PathBuf;
use std::process::{Command, Stdio};

use fastvpn::error::{Error, Result};
use testbed::Pair;

use super::{Link, Target, UNDERLAY, daemon};
use crate::variant::{self, Variant};

/// The program that was built together with this bench.
pub(super) const PROGRAM: &str = env!("CARGO_BIN_EXE_fastvpn");

/// Key, title and flags of those that are always compared.
const BUILT_IN: [(&str, &str, &str); 4] = [
    ("uring", "fastvpn, io_uring", ""),
    ("epoll", "fastvpn, epoll", "--io epoll"),
    ("busy-poll", "fastvpn, busy polling", "--busy-poll auto"),
    (
        "no-offloads",
        "fastvpn without offloads",
        "--without tso,uso,udp-segment,udp-gro",
    ),
];

/// fastvpn with some flags.
pub struct Fastvpn {
    key: &'static str,
    title: &'static str,
    program: PathBuf,
    flags: Vec<String>,
    missing: Option<String>,
}

/// fastvpn as built, in the ways that are always compared.
///
/// # Errors
/// When the program cannot be started.
pub fn built_in() -> Result<Vec<Fastvpn>> {
    let program = PathBuf::from(PROGRAM);
    let help = help(&program)?;
    let make = |(key, title, flags): (&'static str, &'static str, &str)| {
        let flags: Vec<String> = flags.split_whitespace().map(String::from).collect();
        Fastvpn {
            key,
            title,
            program: program.clone(),
            missing: missing(&flags, &help),
            flags,
        }
    };
    Ok(BUILT_IN.map(make).into())
}

/// fastvpn as the command line wants it.
///
/// # Errors
/// When the program cannot be started, or does not know one of the flags.
pub fn from_variant(variant: Variant) -> Result<Fastvpn> {
    let program = variant.program.unwrap_or_else(|| PathBuf::from(PROGRAM));
    if let Some(reason) = missing(&variant.flags, &help(&program)?) {
        return Err(Error::new(format!(
            "cannot measure variant {}: {reason}",
            variant.name
        )));
    }
    // For the whole run, like the other targets' names.
    let key: &'static str = variant.name.leak();
    Ok(Fastvpn {
        key,
        title: key,
        program,
        flags: variant.flags,
        missing: None,
    })
}

/// What the program says about its flags.
fn help(program: &PathBuf) -> Result<String> {
    let output = Command::new(program)
        .arg("--help")
        .stdin(Stdio::null())
        .output()
        .map_err(|cause| Error::os(format!("cannot start {}", program.display()), cause))?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn missing(flags: &[String], help: &str) -> Option<String> {
    variant::unknown_flag(flags, help).map(|flag| format!("this fastvpn has no {flag}"))
}

impl Target for Fastvpn {
    fn key(&self) -> &'static str {
        self.key
    }

    fn title(&self) -> &'static str {
        self.title
    }

    fn detail(&self) -> String {
        let flags = match self.flags.join(" ") {
            flags if flags.is_empty() => "default flags".to_string(),
            flags => flags,
        };
        match self.program.as_os_str() == PROGRAM {
            true => flags,
            false => format!("{} with {flags}", self.program.display()),
        }
    }

    fn missing(&self) -> Option<String> {
        self.missing.clone()
    }

    fn port(&self) -> Option<u16> {
        // The default of --listen.
        Some(8285)
    }

    fn start(&self, pair: &Pair) -> Result<Link> {
        // Tunnel addresses and MTU are those that fastvpn gives itself.
        let commands = [UNDERLAY[1], UNDERLAY[0]].map(|peer| {
            let mut command = Command::new(&self.program);
            command.args(["--peer", &peer.to_string()]);
            command.args(&self.flags);
            command
        });
        daemon::start(pair, commands)
    }
}
