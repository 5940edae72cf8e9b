//! What the service manager that started this process is told, such as systemd, by
//! sd_notify(3): when the tunnel is up, how it is doing, that it is alive, that it ends, and
//! which process goes on with it. Nothing is told where nobody listens: `NOTIFY_SOCKET` is
//! not set then.
//!
//! It never waits for the manager, which may not read: what does not fit is said a second later,
//! where that matters. All of it is the control thread's to say, so who hears of it knows that its loop runs.
//! `WATCHDOG=1` says besides that each worker has read its commands since the last one: it
//! is asked to let go of a channel.

use std::convert::Infallible;
use std::ffi::OsStr;
use std::fmt::Write as _;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, never};
use sd_notify::NotifyState;

use super::tunnel::Tunnel;
use super::workers::Workers;
use crate::control::text::printable;

/// How often all workers are asked within the time after which the service manager takes
/// the process for stuck: one answer may be late.
const QUESTIONS: u32 = 3;

/// How long it may take to take in which process has the tunnel now: this one carries nothing
/// any more.
const HAND_OVER_TIME_MAX: Duration = Duration::from_secs(2);

/// See the module's documentation.
pub struct ServiceManager {
    socket: Option<Socket>,
    /// `READY=1` did not fit.
    is_ready_due: bool,
    /// What it was last told of the tunnel.
    status: String,
    /// `None` where it does not watch.
    watchdog: Option<Watchdog>,
}

struct Watchdog {
    interval: Duration,
    /// When to ask the workers again.
    next: Instant,
    /// Ends when all workers have answered; `None` when they have.
    asked: Option<Receiver<Infallible>>,
}

impl ServiceManager {
    /// The one that the environment names, if it does.
    pub fn from_environment() -> Self {
        let period = sd_notify::watchdog_enabled().filter(|period| !period.is_zero());
        Self {
            socket: std::env::var_os("NOTIFY_SOCKET").and_then(|name| {
                let socket = Socket::open(&name);
                let failed = |error| tracing::warn!("the service manager cannot be told: {error}");
                socket.map_err(failed).ok()
            }),
            is_ready_due: false,
            status: String::new(),
            watchdog: period.map(|period| Watchdog {
                interval: period / QUESTIONS,
                next: Instant::now(),
                asked: None,
            }),
        }
    }

    /// Whether somebody listens.
    pub fn is_there(&self) -> bool {
        self.socket.is_some()
    }

    /// The tunnel is not up yet: a registry's network has to be joined.
    pub fn joining(&self) {
        self.tell(&[NotifyState::Status("joining the registry's network")]);
    }

    /// The tunnel is up, or is done with a reload.
    pub fn ready(&mut self, tunnel: &Tunnel) {
        if self.is_there() {
            self.status = status(tunnel);
            let states = [NotifyState::Ready, NotifyState::Status(&self.status)];
            self.is_ready_due = !self.tell(&states);
        }
    }

    /// The configuration file is being read again.
    pub fn reloading(&self) {
        match NotifyState::monotonic_usec_now() {
            Ok(now) => {
                self.tell(&[NotifyState::Reloading, now]);
            }
            Err(error) => tracing::debug!("no monotonic clock: {error}"),
        }
    }

    /// The tunnel is about to go.
    pub fn stopping(&self) {
        self.tell(&[NotifyState::Stopping]);
    }

    /// Another process goes on with the tunnel, and this one ends.
    pub fn hand_over(&self, pid: u32) {
        if let Some(socket) = &self.socket {
            let patient = socket.wait_at_most(HAND_OVER_TIME_MAX);
            let told = patient.and_then(|()| socket.send(&[NotifyState::MainPid(pid)]));
            if let Err(error) = told {
                tracing::warn!(
                    %error,
                    "the service manager does not hear that process {pid} goes on: {error}"
                );
            }
        }
    }

    /// What is to be done every second.
    pub fn poll(&mut self, tunnel: &Tunnel, now: Instant) {
        if !self.is_there() {
            return;
        }
        if self.is_ready_due {
            self.ready(tunnel);
        }
        let status = status(tunnel);
        if status != self.status && self.tell(&[NotifyState::Status(&status)]) {
            self.status = status;
        }
        self.ask(&tunnel.workers, now);
    }

    fn ask(&mut self, workers: &Workers, now: Instant) {
        if let Some(watchdog) = &mut self.watchdog
            && watchdog.asked.is_none()
            && watchdog.next <= now
        {
            watchdog.asked = Some(workers.ask_all());
            watchdog.next = now + watchdog.interval;
        }
    }

    /// Ends when all workers have answered, for [`Self::all_answered`].
    pub fn answers(&self) -> Receiver<Infallible> {
        let asked = self.watchdog.as_ref().and_then(|it| it.asked.clone());
        asked.unwrap_or_else(never)
    }

    /// All workers and this thread make progress.
    pub fn all_answered(&mut self) {
        if let Some(watchdog) = &mut self.watchdog {
            watchdog.asked = None;
        }
        self.tell(&[NotifyState::Watchdog]);
    }

    /// `false`: the manager has not read what it was told before, and may later.
    fn tell(&self, states: &[NotifyState]) -> bool {
        let Some(socket) = &self.socket else {
            return true;
        };
        match socket.send(states) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => false,
            Err(error) => {
                // It watches, and says so itself where it matters.
                tracing::debug!("the service manager cannot be told: {error}");
                true
            }
            Ok(()) => true,
        }
    }
}

/// Tells nothing, and finds out whether a service manager listens at `NOTIFY_SOCKET`'s `name`.
///
/// # Errors
/// When it does not, or may not be spoken to.
pub fn check_reachable(name: &OsStr) -> io::Result<()> {
    let Socket { socket, address } = Socket::open(name)?;
    socket.connect_addr(&address)
}

/// Where the service manager listens.
struct Socket {
    socket: UnixDatagram,
    address: SocketAddr,
}

impl Socket {
    /// `name`: a path, or an abstract name after `@` (unix(7)).
    fn open(name: &OsStr) -> io::Result<Self> {
        let address = match name.as_bytes() {
            [b'@', rest @ ..] => SocketAddr::from_abstract_name(rest)?,
            [b'/', ..] => SocketAddr::from_pathname(name)?,
            _ => {
                let what = "NOTIFY_SOCKET is neither a path nor an abstract name";
                return Err(io::Error::new(io::ErrorKind::Unsupported, what));
            }
        };
        let socket = UnixDatagram::unbound()?;
        socket.set_nonblocking(true)?;
        Ok(Self { socket, address })
    }

    /// From now on, it waits for that long.
    fn wait_at_most(&self, time_max: Duration) -> io::Result<()> {
        self.socket.set_write_timeout(Some(time_max))?;
        self.socket.set_nonblocking(false)
    }

    fn send(&self, states: &[NotifyState]) -> io::Result<()> {
        let mut text = String::new();
        for state in states {
            // A string takes everything.
            let _ = writeln!(text, "{state}");
        }
        let sent = self.socket.send_to_addr(text.as_bytes(), &self.address);
        sent.map(drop)
    }
}

/// A tunnel in one line.
fn status(tunnel: &Tunnel) -> String {
    let errors = [
        ("reload", &tunnel.reload_error),
        ("upgrade", &tunnel.upgrade_error),
    ];
    for (what, error) in errors {
        if let Some(error) = error {
            return format!("the last {what} failed: {}", printable(error));
        }
    }
    let (device, overlay) = (&tunnel.host.device.name, &tunnel.peers.overlay);
    let (peers, prefixes) = (overlay.peers().count(), overlay.prefixes().count());
    let listen = tunnel.settings.listen;
    printable(&format!(
        "{device}: listening on {listen}, peers: {peers}, prefixes: {prefixes}"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manager(name: &OsStr) -> ServiceManager {
        ServiceManager {
            socket: Some(Socket::open(name).unwrap()),
            is_ready_due: false,
            status: String::new(),
            watchdog: None,
        }
    }

    #[test]
    fn a_manager_that_does_not_read_is_not_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("notify");
        let abstract_name = format!("fastvpn-test-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&abstract_name).unwrap();
        let sockets = [
            (UnixDatagram::bind(&path), path.into_os_string()),
            (
                UnixDatagram::bind_addr(&address),
                format!("@{abstract_name}").into(),
            ),
        ];
        for (socket, name) in sockets {
            let (socket, manager) = (socket.unwrap(), manager(&name));
            while manager.tell(&[NotifyState::Ready]) {}
            let mut buffer = [0; 64];
            let received = socket.recv(&mut buffer).unwrap();
            assert_eq!(&buffer[..received], b"READY=1\n");
            assert!(manager.tell(&[NotifyState::Watchdog]));
            // Nor is one that has gone told again and again.
            drop(socket);
            assert!(manager.tell(&[NotifyState::Ready]));
        }
        let error = Socket::open(OsStr::new("vsock:2:1234")).err().unwrap();
        assert!(error.to_string().contains("NOTIFY_SOCKET"), "{error}");
    }
}
