//! A tunnel's life: set up or taken over, run until told to stop, taken down or
//! handed over.
//!
//! Read it from `event_loop` down: a `Daemon` waits for events and handles one
//! after the other. It owns a `tunnel`, the servers of the control socket and of `wg`'s, and a
//! `handoff` while another process takes over. The tunnel owns the state, in types that do not
//! know each other's insides: `peers` (who they are and what was last seen of
//! each), `host` (device, own addresses, routes) and `workers` (threads, tables,
//! counters). A handler that changes what workers forward by says so, and the tunnel
//! publishes a new table.
//!
//! `detach` has all that happen in the background, where that is wanted.
//!
//! `start`, `reload`, `requests`, `uapi` and `handoff` all make a `plan`, have it
//! checked against the host, and put it in force as a whole or not at all.
//!
//! Everything that is visible outside the process hangs on descriptors: the
//! TUN device, with its addresses and routes, goes when its last queue is
//! closed, and the ports with their sockets. So nothing is left behind,
//! however the process ends; but for the control socket's name, which the
//! next process to start removes.

mod announce;
mod capture;
mod detach;
mod device;
mod drop_log;
mod encryption;
mod event_loop;
mod follow;
pub mod handoff;
mod host;
mod key_text;
mod manifest;
mod memory;
mod metrics;
mod peers;
mod plan;
mod privileges;
mod reach;
mod registry;
mod reload;
mod requests;
mod resolve;
mod service_manager;
mod settings;
mod start;
mod tunnel;
mod uapi;
mod upgrade;
mod workers;

use std::time::Duration;

use crossbeam_channel::{Receiver, bounded};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use self::detach::Detached;
pub use self::detach::launch;
use self::event_loop::{Daemon, End};
use self::registry::Registry;
use self::service_manager::ServiceManager;
pub(crate) use self::settings::{default_mtu_bytes, listen_address};
use self::start::Begun;
pub use self::start::rehearse;
use self::upgrade::Program;
use crate::config::{Config, hide_memory};
use crate::control::summary;
use crate::counters::Snapshot;
use crate::error::{Error, Result};

/// How long a new process waits to be let in by the one that it takes over from.
const LET_IN_TIME_MAX: Duration = Duration::from_secs(10);

/// Runs a tunnel until SIGINT, SIGTERM, `fastvpn stop` or a new process ends it.
///
/// # Errors
/// When it cannot be set up, or when the device is taken away.
pub fn run(mut config: Config) -> Result<()> {
    let program = Program::of_this_process();
    // Looked up with all rights, as those do who look for it.
    let _ = config.control_path();
    // Before there are threads: each has rights of its own.
    privileges::reduce();
    let detached = config.detached.then(|| Detached::begin(&config));
    let signals = watch_signals()?;
    raise_descriptor_limit();
    memory::give_back_large_blocks();
    if config.interface.is_some() {
        // Keys come later.
        hide_memory();
    }
    let manager = ServiceManager::from_environment();
    if config.has_registry() {
        manager.joining();
    }
    let registry = match config.has_registry() {
        true => match registry::join(&mut config, &signals)? {
            Some(registry) => Some(registry),
            // A signal has ended the wait for it.
            None => return Ok(()),
        },
        false => None,
    };
    let mut daemon = Daemon::new(begin(config, registry)?, program, manager);
    if let Some(detached) = detached {
        detached.report_ready()?;
    }
    let end = daemon.run(&signals);
    let mut tun_queue_drops = 0;
    if matches!(end, Ok(End::HandedOver)) {
        // The new process counts from zero; what this process has seen is told.
        tracing::info!("handed over to a new process");
    } else {
        let link_stats = daemon.tunnel.host.link_stats();
        tun_queue_drops = link_stats.map_or(0, |stats| stats.tx_dropped);
        daemon.take_down();
    }
    log_summary(&daemon.tunnel.workers.snapshots(), tun_queue_drops);
    end.map(drop)
}

/// Logs what was carried and dropped.
fn log_summary(workers: &[Snapshot], tun_queue_drops: u64) {
    let total = summary::total(workers);
    let dropped = total.drops().map(|(_, count)| count).sum::<u64>() + tun_queue_drops;
    let mut lines = summary::lines(workers, tun_queue_drops).into_iter();
    if let Some(line) = lines.next() {
        tracing::info!(
            packets_sent = total.packets_sent,
            bytes_sent = total.bytes_sent,
            packets_received = total.packets_received,
            bytes_received = total.bytes_received,
            packets_dropped = dropped,
            "{line}"
        );
    }
    for line in lines {
        tracing::info!("{line}");
    }
}

/// Sets a tunnel up, or takes it over.
fn begin(config: Config, registry: Option<Registry>) -> Result<Begun> {
    if config.takeover {
        let old = handoff::ask(&config.control_path(), LET_IN_TIME_MAX)?;
        if let Some(inherited) = old {
            return handoff::take_over(config, registry, inherited);
        }
        if upgrade::is_upgrade() {
            // A stop in the meantime is to last.
            return Err(Error::new(
                "not upgraded: the process to take over from has ended",
            ));
        }
    }
    start::start(config, registry)
}

/// Five descriptors per worker: 256 workers need more than the usual 1024.
fn raise_descriptor_limit() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && soft < hard
    {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
}

/// SIGHUP, SIGINT and SIGTERM as messages.
fn watch_signals() -> Result<Receiver<i32>> {
    let mut signals = Signals::new([SIGHUP, SIGINT, SIGTERM])
        .map_err(|error| Error::os("cannot watch signals", error))?;
    let (sender, received) = bounded(4);
    let forward = move || {
        for signal in signals.forever() {
            // More reloads than fit say nothing new; but a signal to end must not be
            // lost behind them.
            if signal == SIGHUP {
                let _ = sender.try_send(signal);
            } else if sender.send(signal).is_err() {
                return;
            }
        }
    };
    let thread = std::thread::Builder::new().name("signals".into());
    thread
        .spawn(forward)
        .map_err(|error| Error::os("cannot start the signal thread", error))?;
    Ok(received)
}
