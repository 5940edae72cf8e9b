//! An upgrade: this process starts the program that is installed by now, with its own
//! options, and that process takes over ([`super::handoff`]).
//!
//! It is a child of this one and not of who asks for it: so it has the same environment,
//! limits and control group, and a service manager may take it for the service's main
//! process from then on.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::{Command, ExitStatus, Stdio};

use crossbeam_channel::{Receiver, bounded};

use crate::config::Config;
use crate::error::{Error, Result};

/// Where the program was when this process began: what is installed later is there, too.
pub struct Program(std::io::Result<PathBuf>);

impl Program {
    /// To be asked before anything can have been installed.
    pub fn of_this_process() -> Self {
        Self(std::env::current_exe())
    }
}

/// A process that was started to take over.
pub struct Upgrade {
    /// Its process id.
    pub pid: u32,
    /// How it has ended. If it takes over, this process ends first.
    pub ended: Receiver<std::io::Result<ExitStatus>>,
}

impl Upgrade {
    /// Starts it.
    ///
    /// # Errors
    /// Names the program that cannot be started.
    pub fn begin(program: &Program, config: &Config) -> Result<Self> {
        let Program(Ok(path)) = program else {
            let what = "cannot start a new process: this one does not know its program's path";
            return Err(Error::new(what).hint("start one with --takeover"));
        };
        let given = std::env::args_os().skip(1).collect();
        let mut child = Command::new(path)
            .args(arguments(config, given))
            // That is this process's.
            .env_remove("WATCHDOG_PID")
            .stdin(Stdio::null())
            .spawn()
            .map_err(|error| Error::os(format!("cannot start {}", path.display()), error))?;
        let pid = child.id();
        let (sender, ended) = bounded(1);
        let thread = std::thread::Builder::new().name("upgrade".into());
        let wait = move || drop(sender.send(child.wait()));
        thread
            .spawn(wait)
            .map_err(|error| Error::os(format!("cannot wait for process {pid}"), error))?;
        Ok(Self { pid, ended })
    }
}

/// The new process's, of those that were `given` to this one.
fn arguments(config: &Config, given: Vec<OsString>) -> Vec<OsString> {
    let mut all = vec![OsString::from("--takeover")];
    if config.control.is_none() {
        // It may see less of the host, and would look for another.
        all.extend(["--control".into(), config.control_path().into_os_string()]);
    }
    let is_other = |argument: &OsString| {
        argument != "--takeover" && !argument.as_encoded_bytes().starts_with(b"--takeover=")
    };
    all.extend(given.into_iter().filter(is_other));
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_process_has_the_options_and_takes_over() {
        let words = |text: &str| text.split(' ').map(OsString::from).collect::<Vec<_>>();
        for given in ["wg0 -f", "--takeover wg0 -f", "wg0 --takeover=false -f"] {
            let mut config = Config::default();
            config.control = Some("/run/x.sock".into());
            assert_eq!(
                arguments(&config, words(given)),
                words("--takeover wg0 -f"),
                "{given}"
            );
            config.control = None;
            let path = config.control_path();
            let expected = format!("--takeover --control {} wg0 -f", path.display());
            assert_eq!(arguments(&config, words(given)), words(&expected));
        }
    }
}
