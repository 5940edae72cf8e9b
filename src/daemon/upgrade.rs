//! An upgrade: this process starts the program that is installed by now, with its own
//! options, and that process takes over ([`super::handoff`]).
//!
//! It is a child of this one and not of who asks for it: so it has the same environment,
//! limits and control group, and a service manager may take it for the service's main
//! process from then on.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::service_manager;
use crate::config::Config;
use crate::control::text::printable;
use crate::error::{Error, Result};

/// How long the new process may take, with a registry that it joins and names that it resolves.
const TIME_MAX: Duration = Duration::from_secs(60);

/// In the environment of a new process: it fails where there is no tunnel to take over.
const VARIABLE: &str = "FASTVPN_UPGRADE";

/// In the environment of what systemd starts, since version 248: the service's main process.
const MAIN_PID: &str = "SYSTEMD_EXEC_PID";

/// Whether another process has started this one to take over from it, and not to start anew.
pub fn is_upgrade() -> bool {
    std::env::var_os(VARIABLE).is_some()
}

/// Where the program was when this process began: what is installed later is there, too.
pub struct Program(std::io::Result<PathBuf>);

impl Program {
    /// To be asked before anything can have been installed.
    pub fn of_this_process() -> Self {
        Self(std::env::current_exe())
    }
}

/// A process that was started to take over. Dropping this kills it.
pub struct Upgrade {
    child: Child,
    deadline: Instant,
    /// It has taken over.
    is_over: bool,
}

impl Upgrade {
    /// Starts it.
    ///
    /// # Errors
    /// Where the tunnel would end with this process, or names the program that cannot be
    /// started.
    pub fn begin(program: &Program, config: &Config) -> Result<Self> {
        let pid = std::process::id();
        check_parent(pid, |name| std::env::var_os(name))?;
        let Program(Ok(path)) = program else {
            let what = "cannot start a new process: this one does not know its program's path";
            return Err(Error::new(what).hint("start one with --takeover"));
        };
        let given = std::env::args_os().skip(1).collect();
        let mut command = Command::new(path);
        command
            .args(arguments(config, given))
            .env(VARIABLE, "1")
            // That is this process's.
            .env_remove("WATCHDOG_PID")
            .stdin(Stdio::null());
        if std::env::var_os(MAIN_PID).is_some_and(|main| *main == *pid.to_string()) {
            // And so is this one, while the new process will be the service's.
            command.env_remove(MAIN_PID);
        }
        let child = command.spawn().map_err(|error| {
            let is_denied = error.kind() == std::io::ErrorKind::PermissionDenied;
            let error = Error::os(format!("cannot start {}", path.display()), error);
            match is_denied {
                true => {
                    error.hint("root needs the right to execute it: it has no CAP_DAC_OVERRIDE")
                }
                false => error,
            }
        })?;
        Ok(Self::of(child, Instant::now() + TIME_MAX))
    }

    fn of(child: Child, deadline: Instant) -> Self {
        Self {
            child,
            deadline,
            is_over: false,
        }
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// How it has ended, if it has. One that takes too long is killed.
    pub fn find_ended(&mut self, now: Instant) -> Option<String> {
        match self.child.try_wait() {
            Ok(Some(status)) => Some(status.to_string()),
            Ok(None) if now < self.deadline => None,
            Ok(None) => {
                self.kill();
                Some(format!("killed after {} s", TIME_MAX.as_secs()))
            }
            Err(error) => Some(error.to_string()),
        }
    }

    /// It has the tunnel, and goes on without this process.
    pub fn leave(mut self) {
        self.is_over = true;
    }

    fn kill(&mut self) {
        // Neither fails for a child that nobody else has waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Upgrade {
    fn drop(&mut self) {
        if !self.is_over {
            self.kill();
        }
    }
}

/// Whether a new process would outlive this one, whose id is `pid`. `variable`: those of the
/// environment.
///
/// # Errors
/// Where it would not: a container ends with its process 1, and a service manager ends what is left
/// of a service when the main process ends, unless it is told which one is the main process now.
fn check_parent(pid: u32, variable: impl Fn(&str) -> Option<OsString>) -> Result<()> {
    if pid == 1 {
        let what = "cannot upgrade: this is process 1, and its container ends with it";
        return Err(Error::new(what).hint("start the container again with the new version"));
    }
    // Whatever a service starts has its environment, too, such as a shell in a terminal.
    let main = variable(MAIN_PID);
    if main.as_ref().is_some_and(|main| **main != *pid.to_string()) {
        return Ok(());
    }
    let is_systemds = main.is_some() || variable("INVOCATION_ID").is_some();
    match variable("NOTIFY_SOCKET") {
        Some(name) => service_manager::check_reachable(&name).map_err(|cause| {
            let name = printable(&name.to_string_lossy());
            let what = format!(
                "cannot upgrade: the service manager, at NOTIFY_SOCKET={name}, cannot be told of \
                 the new process"
            );
            Error::os(what, cause).hint("restart the service instead")
        }),
        None if is_systemds => {
            let what = "cannot upgrade: systemd would end the service with this process";
            let hint = "use Type=notify and NotifyAccess=main in its unit, or restart it";
            Err(Error::new(what).hint(hint))
        }
        None => Ok(()),
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
    use std::os::unix::net::UnixDatagram;

    use super::*;

    #[test]
    fn it_is_refused_where_the_new_process_would_end_with_this_one() {
        let check = |pid, set: &[(&str, &str)]| {
            check_parent(pid, |name| {
                let mut all = set.iter();
                let (_, value) = all.find(|(other, _)| *other == name)?;
                Some(value.into())
            })
        };
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("notify");
        let listening = UnixDatagram::bind(&path).unwrap();
        let socket = ("NOTIFY_SOCKET", path.to_str().unwrap());
        let nobodys = ("NOTIFY_SOCKET", "vsock:2:1234");
        let (invocation, main) = (("INVOCATION_ID", "0af1"), ("SYSTEMD_EXEC_PID", "7"));
        for set in [
            &[][..],
            &[socket],
            &[socket, invocation],
            &[socket, invocation, main],
            // Started by hand, in a terminal that is a service.
            &[invocation, ("SYSTEMD_EXEC_PID", "6")],
            &[nobodys, invocation, ("SYSTEMD_EXEC_PID", "6")],
        ] {
            check(7, set).unwrap();
            let error = check(1, set).unwrap_err().to_string();
            assert!(error.contains("process 1"), "{error}");
        }
        for set in [&[invocation][..], &[invocation, main]] {
            let error = check(7, set).unwrap_err().to_string();
            assert!(error.contains("Type=notify"), "{error}");
        }
        // Nobody hears of the new process: a name of another kind, a socket that was closed, and
        // one that is gone.
        drop(listening);
        let gone = ("NOTIFY_SOCKET", "/nowhere/notify");
        for socket in [nobodys, socket, gone] {
            for set in [&[socket][..], &[socket, invocation, main]] {
                let error = check(7, set).unwrap_err().to_string();
                assert!(error.contains(socket.1), "{error}");
            }
        }
    }

    #[test]
    fn a_new_process_that_hangs_is_killed() {
        let now = Instant::now();
        let sleep = || Command::new("sleep").arg("1000").spawn().unwrap();
        let exists = |pid: u32| std::path::Path::new(&format!("/proc/{pid}")).exists();
        let mut upgrade = Upgrade::of(sleep(), now + TIME_MAX);
        assert_eq!(upgrade.find_ended(now), None);
        let ended = upgrade.find_ended(now + TIME_MAX);
        assert_eq!(ended.as_deref(), Some("killed after 60 s"));
        assert!(!exists(upgrade.pid()));
        // Nor does it outlive this process's tunnel, unless it has that.
        let upgrade = Upgrade::of(sleep(), now + TIME_MAX);
        let pid = upgrade.pid();
        drop(upgrade);
        assert!(!exists(pid));
        let upgrade = Upgrade::of(sleep(), now + TIME_MAX);
        let pid = upgrade.pid();
        upgrade.leave();
        assert!(exists(pid));
        let pid = nix::unistd::Pid::from_raw(pid as i32);
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
        nix::sys::wait::waitpid(pid, None).unwrap();
    }

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
