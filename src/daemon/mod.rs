//! A tunnel's life: set up or taken over, run until told to stop, taken down or
//! handed over.
//!
//! Read it from `event_loop` down: a `Daemon` waits for events and handles one
//! after the other. It owns a `tunnel`, a `control_socket`, and a `handoff`
//! while another process takes over. The tunnel owns the state, in types that do not
//! know each other's insides: `peers` (who they are and what was last seen of
//! each), `host` (device, own addresses, routes) and `workers` (threads, tables,
//! counters). A handler that changes what workers forward by says so, and the tunnel
//! publishes a new table.
//!
//! `start`, `reload`, `requests` and `handoff` all make a `plan`, have it
//! checked against the host, and put it in force as a whole or not at all.
//!
//! Everything that is visible outside the process hangs on descriptors: the
//! TUN device, with its addresses and routes, goes when its last queue is
//! closed, and the ports with their sockets. So nothing is left behind,
//! however the process ends; but for the control socket's name, which the
//! next process to start removes.

mod announce;
mod control_socket;
mod device;
mod drop_log;
mod event_loop;
pub mod handoff;
mod host;
mod memory;
mod peers;
mod plan;
mod reach;
mod reload;
mod requests;
mod resolve;
mod settings;
mod start;
mod tunnel;
mod workers;

use std::sync::Arc;

use crossbeam_channel::{Receiver, bounded};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::{Handle, Signals};

use self::event_loop::{Daemon, End};
pub(crate) use self::settings::default_mtu_bytes;
pub use self::start::rehearse;
use crate::config::Config;
use crate::control::summary;
use crate::counters::{Counters, Snapshot};
use crate::error::{Error, Result};

/// Runs a tunnel until SIGINT, SIGTERM, an operator's word, or a new process ends
/// it.
///
/// # Errors
/// When it cannot be set up, or when the device is taken away.
pub fn run(config: Config) -> Result<()> {
    let signals = SignalWatch::start()?;
    raise_descriptor_limit();
    memory::give_back_large_blocks();
    let mut daemon = begin(config)?;
    let counters = daemon.tunnel.workers.counters().to_vec();
    let end = daemon.run(&signals.received);
    match end {
        // The new process counts from zero; what this process has seen is told.
        Ok(End::HandedOver) => tracing::info!("handed over to a new process"),
        Ok(End::Stopped) | Err(_) => {
            let link_stats = daemon.tunnel.host.link_stats();
            daemon.take_down();
            summarize(&counters, link_stats.map_or(0, |stats| stats.tx_dropped));
            return end.map(drop);
        }
    }
    summarize(&counters, 0);
    Ok(())
}

/// Sets a tunnel up, or takes it over.
fn begin(config: Config) -> Result<Daemon> {
    let mut prepared = start::prepare(config)?;
    if prepared.plan.config.takeover {
        if let Some(inherited) = handoff::ask(&prepared.plan.config.control_path())? {
            let (tunnel, control, is_reload_due) = handoff::take_over(prepared, inherited)?;
            let mut daemon = Daemon::new(tunnel, control);
            if is_reload_due {
                daemon.reload_by_signal();
            }
            return Ok(daemon);
        }
        prepared.suspend_nobody();
    }
    let (tunnel, control) = start::start(prepared)?;
    Ok(Daemon::new(tunnel, control))
}

fn summarize(counters: &[Arc<Counters>], tun_queue_drops: u64) {
    let snapshots: Vec<Snapshot> = counters.iter().map(|worker| worker.snapshot()).collect();
    for line in summary::lines(&snapshots, tun_queue_drops) {
        tracing::info!("{line}");
    }
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
struct SignalWatch {
    handle: Handle,
    received: Receiver<i32>,
}

impl SignalWatch {
    fn start() -> Result<Self> {
        let mut signals = Signals::new([SIGHUP, SIGINT, SIGTERM])
            .map_err(|error| Error::os("cannot watch signals", error))?;
        let handle = signals.handle();
        let (sender, received) = bounded(4);
        std::thread::Builder::new()
            .name("signals".into())
            .spawn(move || {
                for signal in signals.forever() {
                    // More signals than fit say nothing new; but the last one
                    // to end must not be lost behind reloads.
                    if signal == SIGHUP {
                        let _ = sender.try_send(signal);
                    } else if sender.send(signal).is_err() {
                        return;
                    }
                }
            })
            .map_err(|error| Error::os("cannot start the signal thread", error))?;
        Ok(Self { handle, received })
    }
}

impl Drop for SignalWatch {
    fn drop(&mut self) {
        self.handle.close();
    }
}
