//! A worker's thread: it makes an I/O engine, says that it is ready, and runs the loop.

use std::sync::Arc;
use std::thread::JoinHandle;

use crossbeam_channel::{Receiver, Sender};
use nix::sys::eventfd::EventFd;

use super::WorkerFds;
use crate::counters::Counters;
use crate::dataplane::idle::Spin;
use crate::dataplane::inbound::{Inbound, ReceivedProbe};
use crate::dataplane::outbound::Outbound;
use crate::dataplane::sessions::Sessions;
use crate::dataplane::table::Table;
use crate::dataplane::{self, Commands, Queueing};
use crate::error::{Error, Result};
use crate::io::engine::Engine;
use crate::io::epoll::Epoll;
use crate::io::udp::WorkerSockets;
use crate::io::uring::Uring;
use crate::packet::batch::Limits;
use crate::packet::coalesce::TunOffloads;

/// What all workers have in common.
#[derive(Clone)]
pub(crate) struct Setup {
    /// GSO packets that the TUN device takes.
    pub tun: TunOffloads,
    /// How long batches may be.
    pub limits: Limits,
    /// Whether they run on io_uring; else on epoll.
    pub is_uring: bool,
    /// How long to look for arrivals without sleeping.
    pub spin: Spin,
    /// How packets wait for a socket.
    pub(crate) queueing: Queueing,
    /// Cores to pin workers to, in turn.
    pub cores: Vec<usize>,
    /// The table in force.
    pub table: Arc<Table>,
    /// Takes the probes that come.
    pub probes: Sender<ReceivedProbe>,
    /// In WireGuard mode.
    pub sessions: Option<Sessions>,
}

/// What a worker's thread takes with it.
pub(super) struct Worker {
    /// The worker's number.
    pub(super) index: usize,
    pub(super) descriptors: WorkerFds,
    /// The sockets of the other workers.
    pub(super) others: Vec<Arc<WorkerSockets>>,
    pub(super) counters: Arc<Counters>,
    pub(super) setup: Setup,
    pub(super) wake: Arc<EventFd>,
    pub(super) commands: Commands,
    /// Opens by being closed: nothing is ever sent.
    pub(super) gate: Receiver<()>,
    /// Takes `None` when the worker is ready, and the error that ends it.
    pub(super) report: Sender<Option<Error>>,
}

impl Worker {
    /// Starts the thread.
    ///
    /// # Errors
    /// When there can be no more of them.
    pub(super) fn spawn(self) -> Result<JoinHandle<()>> {
        let thread = std::thread::Builder::new().name(format!("fastvpn-{}", self.index));
        thread.spawn(move || self.work()).map_err(|error| {
            Error::os("cannot start a worker thread", error)
                .hint("raise the limit on processes (ulimit -u), or ask for fewer --queues")
        })
    }

    fn work(self) {
        let cores = &self.setup.cores;
        if let Some(&id) = cores.get(self.index % cores.len().max(1))
            && !core_affinity::set_for_current(core_affinity::CoreId { id })
        {
            tracing::warn!(
                worker = self.index,
                core = id,
                "cannot pin worker {} to core {id}",
                self.index
            );
        }
        let WorkerFds { queue, sockets, .. } = self.descriptors.clone();
        let (limits, wake) = (self.setup.limits, Arc::clone(&self.wake));
        let others = self.others.clone();
        let (counters, report) = (Arc::clone(&self.counters), self.report.clone());
        let result = match self.setup.is_uring {
            true => Uring::new(queue, sockets, others, wake, limits, counters)
                .and_then(|engine| self.run(engine)),
            false => Epoll::new(queue, sockets, others, wake, limits, counters)
                .and_then(|engine| self.run(engine)),
        };
        if let Err(error) = result {
            let _ = report.send(Some(error));
        }
    }

    /// The engine is ready: runs the loop, once the gate is open.
    fn run(self, mut engine: impl Engine) -> Result<()> {
        let _ = self.report.send(None);
        let _ = self.gate.recv();
        // The table is the loop's, which frees it when it gets another one.
        let Setup {
            tun,
            spin,
            queueing,
            table,
            probes,
            sessions,
            ..
        } = self.setup;
        let outbound = Outbound::new(self.index, queueing, sessions.clone(), &mut engine);
        dataplane::run(
            &mut engine,
            &self.commands,
            table,
            outbound,
            Inbound::new(tun, self.index, probes, sessions),
            spin,
            &self.counters,
        )
    }
}
