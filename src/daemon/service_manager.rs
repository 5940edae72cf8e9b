//! What the service manager that started this process is told, such as systemd, by
//! sd_notify(3): when the tunnel is up, how it is doing, that it is alive, that it ends, and
//! which process goes on with it. Nothing is told where nobody listens: `NOTIFY_SOCKET` is
//! not set then.
//!
//! All of it is the control thread's to say, so who hears of it knows that its loop runs.
//! `WATCHDOG=1` says besides that each worker has read its commands since the last one: it
//! is asked to let go of a channel.

use std::convert::Infallible;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, never};
use sd_notify::NotifyState;

use super::tunnel::Tunnel;
use super::workers::Workers;
use crate::control::text::printable;

/// How often all workers are asked within the time after which the service manager takes
/// the process for stuck: one answer may be late.
const QUESTIONS: u32 = 3;

/// See the module's documentation.
pub struct ServiceManager {
    is_there: bool,
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
            is_there: std::env::var_os("NOTIFY_SOCKET").is_some(),
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
        self.is_there
    }

    /// The tunnel is up, or is done with a reload.
    pub fn ready(&mut self, tunnel: &Tunnel) {
        if self.is_there {
            self.status = status(tunnel);
            self.tell(&[NotifyState::Ready, NotifyState::Status(&self.status)]);
        }
    }

    /// The configuration file is being read again.
    pub fn reloading(&self) {
        match NotifyState::monotonic_usec_now() {
            Ok(now) => self.tell(&[NotifyState::Reloading, now]),
            Err(error) => tracing::debug!("no monotonic clock: {error}"),
        }
    }

    /// The tunnel is about to go.
    pub fn stopping(&self) {
        self.tell(&[NotifyState::Stopping]);
    }

    /// Another process goes on with the tunnel, and this one ends.
    pub fn hand_over(&self, pid: u32) {
        self.tell(&[NotifyState::MainPid(pid)]);
    }

    /// What is to be done every second.
    pub fn poll(&mut self, tunnel: &Tunnel, now: Instant) {
        if !self.is_there {
            return;
        }
        let status = status(tunnel);
        if status != self.status {
            self.tell(&[NotifyState::Status(&status)]);
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

    fn tell(&self, states: &[NotifyState]) {
        // Without a socket's name in the environment, it does nothing.
        if let Err(error) = sd_notify::notify(states) {
            // It watches, and says so itself where it matters.
            tracing::debug!("the service manager cannot be told: {error}");
        }
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
