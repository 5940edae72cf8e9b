//! The workers: their threads, the table that they forward by, what they count,
//! and further descriptors of what they have.

mod descriptors;
mod engine_kind;
mod threads;

use std::sync::Arc;

use crossbeam_channel::{Receiver, Sender};

pub use self::descriptors::WorkerFds;
use self::engine_kind::EngineKind;
use self::threads::{Setup, Threads};
use crate::config::{BusyPoll, Config};
use crate::counters::{Counters, Snapshot};
use crate::dataplane::WorkerCommand;
use crate::dataplane::idle::Spin;
use crate::dataplane::inbound::ReceivedProbe;
use crate::dataplane::table::Table;
use crate::error::{Error, Result};
use crate::io::tun::Tun;
use crate::io::udp::{self, WorkerSockets};
use crate::packet::batch::Limits;
use crate::packet::coalesce;

/// What there is once in a namespace: the device and the sockets on the port.
pub struct Claimed {
    /// The device.
    pub device: Tun,
    /// The workers' sockets.
    pub sockets: Vec<WorkerSockets>,
    /// Offloads of the sockets.
    pub udp: udp::UdpOffloads,
}

/// See the module's documentation.
pub struct Workers {
    /// `None` once they have been stopped.
    threads: Option<Threads>,
    /// What they are started with, and the table in force.
    setup: Setup,
    /// By worker. They outlast the threads.
    counters: Vec<Arc<Counters>>,
    descriptors: Arc<Vec<WorkerFds>>,
    /// What the kernel has counted at each worker's socket.
    socket_drops: Vec<u32>,
    udp_offloads: udp::UdpOffloads,
    /// Whether a flow's queue depends on the flow alone.
    pub is_steered: bool,
}

impl Workers {
    /// Makes a worker for each queue. They wait for [`Self::go`]. `probes` takes the
    /// probes that they receive.
    ///
    /// # Errors
    /// When one of them is not ready to start.
    pub fn new(
        config: &Config,
        claimed: Claimed,
        table: Arc<Table>,
        probes: Sender<ReceivedProbe>,
    ) -> Result<Self> {
        let Claimed {
            device,
            sockets,
            udp,
        } = claimed;
        let pairs = device.queues.iter().zip(&sockets);
        let descriptors: Vec<_> = pairs
            .map(|(queue, sockets)| WorkerFds::of(queue, sockets))
            .collect::<Result<_>>()?;
        let segments_max = match udp.segment {
            true => Limits::FULL.segments_max,
            false => 1,
        };
        let setup = Setup {
            tun: device.offloads,
            limits: Limits {
                segments_max,
                ..Limits::FULL
            },
            engine: EngineKind::choose(config.io),
            spin: match config.busy_poll {
                BusyPoll::Off => Spin::Off,
                BusyPoll::Auto => Spin::Auto,
                BusyPoll::For(duration) => Spin::For(duration),
            },
            cores: config.cores.0.clone(),
            table,
            probes,
        };
        // Another process that had these sockets has told of the drops so far.
        let drops = |worker: &WorkerFds| udp::drops(worker.receive()).unwrap_or(0);
        let socket_drops = descriptors.iter().map(drops).collect();
        let counters: Vec<Arc<Counters>> = descriptors.iter().map(|_| Arc::default()).collect();
        let threads = Threads::start(device.queues, sockets, counters.clone(), &setup)?;
        Ok(Self {
            threads: Some(threads),
            setup,
            counters,
            descriptors: Arc::new(descriptors),
            socket_drops,
            udp_offloads: udp,
            is_steered: device.steered,
        })
    }

    /// Lets the workers start.
    pub fn go(&mut self) {
        if let Some(threads) = &mut self.threads {
            threads.go();
        }
    }

    /// Ends the workers: they send what they hold.
    pub fn stop(&mut self) {
        self.threads = None;
    }

    /// Ends the workers for good: the device goes with their last descriptor.
    pub fn close(&mut self) {
        self.stop();
        self.descriptors = Arc::default();
    }

    /// Whether they have been stopped.
    pub fn are_stopped(&self) -> bool {
        self.threads.is_none()
    }

    /// Starts workers that have been stopped.
    ///
    /// # Errors
    /// When one of them is not ready to start.
    pub fn start_again(&mut self) -> Result<()> {
        let parts = self.descriptors.iter().map(WorkerFds::for_worker);
        let (queues, sockets) = parts.collect::<Result<Vec<_>>>()?.into_iter().unzip();
        let counters = self.counters.clone();
        self.threads = Some(Threads::start(queues, sockets, counters, &self.setup)?);
        self.go();
        Ok(())
    }

    /// Where a worker that fails says so.
    pub fn failures(&self) -> Receiver<Error> {
        let threads = self.threads.as_ref();
        threads.map_or_else(crossbeam_channel::never, |threads| {
            threads.failures().clone()
        })
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.counters.len()
    }

    /// What they run on.
    pub fn engine(&self) -> EngineKind {
        self.setup.engine
    }

    /// GSO packets that the TUN device takes.
    pub fn tun_offloads(&self) -> coalesce::TunOffloads {
        self.setup.tun
    }

    /// Offloads of the sockets.
    pub fn udp_offloads(&self) -> udp::UdpOffloads {
        self.udp_offloads
    }

    /// Descriptors, by worker.
    pub fn descriptors(&self) -> &Arc<Vec<WorkerFds>> {
        &self.descriptors
    }

    /// Each worker's own port, if it has one.
    pub fn own_ports(&self) -> Vec<Option<u16>> {
        self.descriptors.iter().map(WorkerFds::own_port).collect()
    }

    /// The table in force.
    pub fn table(&self) -> &Arc<Table> {
        &self.setup.table
    }

    /// Gives all workers a new table, and waits until they forward by it.
    pub fn publish(&mut self, table: Arc<Table>) {
        if let Some(threads) = &self.threads {
            threads.publish(&table);
        }
        // The old one is freed here: the workers have let go of it.
        self.setup.table = table;
    }

    /// Has GSO batches of full size tried again on all paths.
    pub fn reset_limits(&self) {
        if let Some(threads) = &self.threads {
            threads.tell(|| WorkerCommand::ResetLimits);
        }
    }

    /// The counters, by worker.
    pub fn counters(&self) -> &[Arc<Counters>] {
        &self.counters
    }

    /// What each worker has counted.
    pub fn snapshots(&self) -> Vec<Snapshot> {
        self.counters
            .iter()
            .map(|worker| worker.snapshot())
            .collect()
    }

    /// Adds to the counters what the kernel has dropped at the sockets since the
    /// last time.
    pub fn count_socket_drops(&mut self) {
        let counters = self.counters.iter().zip(&mut self.socket_drops);
        for (worker, (counters, seen)) in self.descriptors.iter().zip(counters) {
            if let Ok(drops) = udp::drops(worker.receive()) {
                // The kernel's count wraps round.
                let fresh = drops.wrapping_sub(std::mem::replace(seen, drops));
                counters.drop_at_socket.add(fresh.into());
            }
        }
    }
}
