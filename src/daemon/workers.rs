//! The workers: their threads, the table that they forward by, what they count,
//! and their descriptors.

mod thread;

use std::convert::Infallible;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded, unbounded};
use nix::sys::eventfd::{EfdFlags, EventFd};
use socket2::SockRef;

use self::thread::{Setup, Worker};
use crate::config::{Aqm, BusyPoll, Config, Dscp, Io, QueueLimit};
use crate::counters::{Counters, Snapshot};
use crate::dataplane::idle::Spin;
use crate::dataplane::inbound::ReceivedProbe;
use crate::dataplane::sessions::{Inbox, Sessions};
use crate::dataplane::table::Table;
use crate::dataplane::{Commands, Queueing, WorkerCommand};
use crate::error::{Error, Result};
use crate::io::tun::{Queue, Tun};
use crate::io::udp::{self, Port, UdpOffloads, WorkerSockets};
use crate::io::uring;
use crate::packet::batch::Limits;
use crate::packet::fq_codel;
use crate::packet::probe::Probe;
use crate::wire::Endpoint;

/// How long workers may take to take a new table.
const PUBLISH_WAIT_MAX: Duration = Duration::from_secs(5);

/// How many commands may wait for a worker before one more of each kind. For one that is
/// stuck that is a reset, a table and a stop: it finds the newest table whenever it looks.
const RESET_AFTER_MAX: usize = 0;
const TABLE_AFTER_MAX: usize = 1;
const STOP_AFTER_MAX: usize = usize::MAX;
/// Its asker waits before it asks again.
const ASK_AFTER_MAX: usize = usize::MAX;

/// What there is once in a namespace: the device and the sockets on the port.
pub struct Claimed {
    /// The device.
    pub device: Tun,
    /// The sockets.
    pub sockets: udp::Sockets,
}

/// A worker's TUN queue and sockets. The control thread has them, too: to start the
/// worker again, to hand it over to another process, and to send probes.
#[derive(Clone)]
pub struct WorkerFds {
    /// Its TUN queue.
    pub queue: Arc<Queue>,
    /// Its sockets.
    pub sockets: Arc<WorkerSockets>,
    /// Its own port, if it has one.
    pub own_port: Option<u16>,
}

impl WorkerFds {
    fn new(queue: Arc<Queue>, sockets: WorkerSockets) -> Self {
        let port = |send: &socket2::Socket| Some(send.local_addr().ok()?.as_socket()?.port());
        Self {
            queue,
            own_port: sockets.send.as_ref().and_then(port),
            sockets: Arc::new(sockets),
        }
    }

    /// Its socket to receive from.
    pub fn receive(&self) -> BorrowedFd<'_> {
        self.sockets.receive.as_fd()
    }

    /// Those of a worker with a port of its own on the loopback interface, and
    /// without a device.
    #[cfg(test)]
    pub fn on_loopback() -> Self {
        let socket =
            || std::os::fd::OwnedFd::from(std::net::UdpSocket::bind("127.0.0.1:0").unwrap());
        let sockets = WorkerSockets::new(socket().into(), Some(socket().into()));
        Self::new(Arc::new(Queue::from(socket())), sockets)
    }

    /// Sends a probe. Whether it arrives is for the answer to tell.
    pub fn send_probe(&self, from: Port, probe: Probe, to: SocketAddr) {
        let socket = SockRef::from(self.sockets.sender(from));
        let (packet, flags) = (probe.to_packet(0), libc::MSG_DONTWAIT);
        if let Err(error) = socket.send_to_with_flags(&packet, &to.into(), flags) {
            tracing::debug!("no probe to {to}: {error}");
        }
    }
}

/// How packets wait, in the data plane's own terms.
fn queueing(config: &Config) -> Queueing {
    Queueing {
        limit: match config.queue_limit {
            QueueLimit::Auto => None,
            QueueLimit::Bytes(bytes) => Some(bytes),
        },
        aqm: match config.aqm {
            Aqm::FqCodel => fq_codel::Aqm::FqCodel,
            Aqm::Off => fq_codel::Aqm::Off,
        },
        inherits_dscp: config.dscp == Dscp::Inherit,
    }
}

/// What tells a worker something.
#[derive(Clone)]
struct WorkerHandle {
    commands: Sender<WorkerCommand>,
    inbox: Arc<Inbox>,
    /// Wakes the thread, to read a command.
    wake: Arc<EventFd>,
}

impl WorkerHandle {
    /// Tells the worker, unless more than `waiting_max` commands wait for it. Returns whether
    /// it is told.
    fn tell(&self, command: WorkerCommand, waiting_max: usize) -> bool {
        if self.commands.len() > waiting_max {
            return false;
        }
        let _ = self.commands.send(command);
        self.wake();
        true
    }

    fn wake(&self) {
        // The counter cannot overflow: a worker empties it each time.
        let _ = self.wake.write(1);
    }
}

/// See the module's documentation.
pub struct Workers {
    /// What they are started with, and the table in force.
    pub(crate) setup: Setup,
    /// By worker, as are the counters. Both outlast the threads.
    pub descriptors: Vec<WorkerFds>,
    /// What the workers have counted.
    pub counters: Vec<Arc<Counters>>,
    /// Where a worker that fails says why.
    pub failures: Receiver<Option<Error>>,
    /// Offloads of the sockets.
    pub udp_offloads: UdpOffloads,
    /// Whether a flow's queue depends on the flow alone.
    pub is_steered: bool,
    /// Where workers that are told so find the newest table.
    published: Arc<Mutex<Arc<Table>>>,
    /// None while the workers are stopped.
    threads: Vec<JoinHandle<()>>,
    /// By worker, as long as its thread runs. The handshake thread has them, too.
    handles: Arc<Mutex<Vec<WorkerHandle>>>,
    /// Keeps workers that are ready from starting, until it is dropped.
    gate: Option<Sender<()>>,
    /// What the kernel has counted at each worker's socket.
    socket_drops: Vec<u32>,
}

impl Workers {
    /// Makes a worker for each queue. They wait for [`Self::go`]. `probes` takes the
    /// probes that they receive.
    ///
    /// # Errors
    /// When one of them cannot be started.
    pub fn new(
        config: &Config,
        claimed: Claimed,
        table: Arc<Table>,
        probes: Sender<ReceivedProbe>,
        sessions: Option<Sessions>,
    ) -> Result<Self> {
        let Claimed { device, sockets } = claimed;
        let udp = sockets.offloads;
        let all = device.queues.into_iter().zip(sockets.workers);
        let descriptors: Vec<_> = all
            .map(|(queue, sockets)| WorkerFds::new(Arc::new(queue), sockets))
            .collect();
        let mut limits = Limits::FULL;
        if !udp.segment {
            limits.segments_max = 1;
        }
        let setup = Setup {
            tun: device.offloads,
            limits,
            is_uring: is_uring(config.io),
            spin: match config.busy_poll {
                BusyPoll::Off => Spin::Off,
                BusyPoll::Auto => Spin::Auto,
                BusyPoll::For(duration) => Spin::For(duration),
            },
            queueing: queueing(config),
            cores: config.cores.0.clone(),
            table,
            probes,
            sessions,
        };
        // Another process that had these sockets has reported the drops so far.
        let drops = |worker: &WorkerFds| worker.sockets.drops().unwrap_or(0);
        let mut workers = Self {
            published: Arc::new(Mutex::new(Arc::clone(&setup.table))),
            setup,
            socket_drops: descriptors.iter().map(drops).collect(),
            counters: descriptors.iter().map(|_| Arc::default()).collect(),
            descriptors,
            threads: Vec::new(),
            handles: Arc::default(),
            gate: None,
            failures: crossbeam_channel::never(),
            udp_offloads: udp,
            is_steered: device.steered,
        };
        workers.start()?;
        Ok(workers)
    }

    /// Starts the threads, and waits until all are ready. They carry packets from
    /// [`Self::go`] on.
    ///
    /// # Errors
    /// The first error of any worker.
    pub fn start(&mut self) -> Result<()> {
        let (report, reports) = unbounded();
        let (gate, open) = bounded(0);
        (self.gate, self.failures) = (Some(gate), reports);
        let mut handles = Vec::new();
        for (index, descriptors) in self.descriptors.iter().enumerate() {
            let (sender, queue) = unbounded();
            let inbox = Arc::default();
            let wake = Arc::new(event_counter()?);
            let others = self.descriptors.iter().enumerate();
            let others = others.filter(|(other, _)| *other != index);
            let worker = Worker {
                index,
                descriptors: descriptors.clone(),
                others: others
                    .map(|(_, other)| Arc::clone(&other.sockets))
                    .collect(),
                counters: Arc::clone(&self.counters[index]),
                setup: self.setup.clone(),
                wake: Arc::clone(&wake),
                commands: Commands {
                    queue,
                    inbox: Arc::clone(&inbox),
                },
                gate: open.clone(),
                report: report.clone(),
            };
            self.threads.push(worker.spawn()?);
            handles.push(WorkerHandle {
                commands: sender,
                inbox,
                wake,
            });
        }
        *lock(&self.handles) = handles;
        drop(report);
        for _ in &self.threads {
            match self.failures.recv() {
                Ok(None) => {}
                Ok(Some(error)) => return Err(error),
                Err(_) => return Err(Error::new("a worker thread ended before it was ready")),
            }
        }
        Ok(())
    }

    /// Lets the workers start.
    pub fn go(&mut self) {
        self.gate = None;
    }

    /// Ends the workers: they send what they hold.
    pub fn stop(&mut self) {
        // Before the gate opens: those that have not started find it first.
        self.tell(STOP_AFTER_MAX, || WorkerCommand::Stop);
        self.gate = None;
        lock(&self.handles).clear();
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a worker thread panicked");
            }
        }
    }

    /// Goes on with other sockets, one set for each worker, from [`Self::go`] on. Packets wait
    /// meanwhile.
    ///
    /// # Errors
    /// As [`Self::start`]; no worker runs then.
    pub fn replace_sockets(&mut self, sockets: Vec<WorkerSockets>) -> Result<()> {
        self.count_socket_drops();
        self.stop();
        for (worker, sockets) in self.descriptors.iter_mut().zip(sockets) {
            *worker = WorkerFds::new(Arc::clone(&worker.queue), sockets);
        }
        self.socket_drops.fill(0);
        self.start().inspect_err(|_| self.stop())
    }

    /// Ends the workers for good: the device goes with their last descriptor.
    pub fn close(&mut self) {
        self.stop();
        self.descriptors = Vec::new();
    }

    /// Tells all workers that have not ended, and for which no more than `waiting_max`
    /// commands wait: those say as much already.
    fn tell(&self, waiting_max: usize, command: impl Fn() -> WorkerCommand) {
        for (index, worker) in lock(&self.handles).iter().enumerate() {
            if !worker.tell(command(), waiting_max) {
                tracing::error!(
                    worker = index,
                    "worker {index} takes no commands: is it stuck?"
                );
            }
        }
    }

    /// Has the workers try again what waits for a session: for the handshake thread.
    pub fn session_waker(&self) -> impl Fn() + Send + use<> {
        let handles = Arc::clone(&self.handles);
        move || {
            for worker in lock(&handles).iter() {
                worker.inbox.put_sessions();
                worker.wake();
            }
        }
    }

    /// Has a worker take in a data message that has come to the handshake socket: for the
    /// handshake thread. It is lost if many wait.
    pub fn stray_taker(&self) -> impl Fn(Endpoint, &[u8]) + Send + use<> {
        let handles = Arc::clone(&self.handles);
        move |sender, datagram| {
            if let Some(worker) = lock(&handles).first() {
                worker.inbox.put_stray(sender, datagram);
                worker.wake();
            }
        }
    }

    /// The I/O engine's name.
    pub fn engine(&self) -> &'static str {
        match self.setup.is_uring {
            true => "io_uring",
            false => "epoll",
        }
    }

    /// The workers' own ports.
    pub fn own_ports(&self) -> Vec<u16> {
        let ports = self.descriptors.iter().map(|worker| worker.own_port);
        ports.flatten().collect()
    }

    /// Gives all workers a new table, and waits until each of them forwards by it:
    /// nothing that is sent into the tunnel after this goes by an older one.
    pub fn publish(&mut self, table: Arc<Table>) {
        let in_force = self.offer(Arc::clone(&table));
        // Nothing is ever sent: it ends when the last worker has let go, or has
        // ended itself.
        if in_force.recv_timeout(PUBLISH_WAIT_MAX) == Err(RecvTimeoutError::Timeout) {
            tracing::error!("a worker does not take the new table: is it stuck?");
        }
        // The old one is freed here: the workers have let go of it.
        self.setup.table = table;
    }

    /// Has workers that have not started begin with another table.
    pub fn begin_with(&mut self, table: Arc<Table>) {
        drop(self.offer(Arc::clone(&table)));
        self.setup.table = table;
    }

    /// Tells all workers to take a table. What is returned ends when they have.
    fn offer(&self, table: Arc<Table>) -> Receiver<Infallible> {
        let (sender, in_force) = bounded(0);
        *lock(&self.published) = table;
        let published = &self.published;
        self.tell(TABLE_AFTER_MAX, || {
            WorkerCommand::Table(Arc::clone(published), sender.clone())
        });
        in_force
    }

    /// Has GSO batches of full size tried again on all paths.
    pub fn reset_limits(&self) {
        self.tell(RESET_AFTER_MAX, || WorkerCommand::ResetLimits);
    }

    /// Asks all workers for a sign of life. What is returned ends when they have given it, or
    /// have ended; one that is stuck does neither. Wait for that before asking again.
    pub fn ask_all(&self) -> Receiver<Infallible> {
        let (sender, answered) = bounded(0);
        self.tell(ASK_AFTER_MAX, || WorkerCommand::Answer(sender.clone()));
        answered
    }

    /// What each worker has counted.
    pub fn snapshots(&self) -> Vec<Snapshot> {
        let counters = self.counters.iter();
        counters.map(|worker| worker.snapshot()).collect()
    }

    /// Adds to the counters what the kernel has dropped at the sockets since the
    /// last time.
    pub fn count_socket_drops(&mut self) {
        let counters = self.counters.iter().zip(&mut self.socket_drops);
        for (worker, (counters, seen)) in self.descriptors.iter().zip(counters) {
            if let Ok(drops) = worker.sockets.drops() {
                // The kernel's count wraps round.
                let fresh = drops.wrapping_sub(std::mem::replace(seen, drops));
                counters.drop_at_socket.add(fresh.into());
            }
        }
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Whether the workers use io_uring. Left to choose, they do where the kernel has
/// it and allows it; where not, one warning says why.
fn is_uring(io: Io) -> bool {
    let warn = |error: &Error| tracing::warn!(%error, "io_uring is not available here, using epoll: {error}");
    match io {
        Io::Uring => true,
        Io::Epoll => false,
        Io::Auto => uring::probe(1).inspect_err(warn).is_ok(),
    }
}

fn lock<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(super) fn event_counter() -> Result<EventFd> {
    let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
    EventFd::from_value_and_flags(0, flags).map_err(|errno| {
        Error::os("cannot create an event counter", errno.into())
            .hint("raise the limit on open files (ulimit -n), or ask for fewer --queues")
    })
}

#[cfg(test)]
#[path = "workers_tests.rs"]
mod tests;
