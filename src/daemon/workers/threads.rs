//! Worker threads: started together, told together, ended together.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, TrySendError, bounded};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::engine_kind::EngineKind;
use crate::counters::Counters;
use crate::dataplane::idle::Spin;
use crate::dataplane::inbound::{Inbound, ReceivedProbe};
use crate::dataplane::table::Table;
use crate::dataplane::{self, WorkerCommand};
use crate::error::{Error, Result};
use crate::io::engine::Engine;
use crate::io::epoll::Epoll;
use crate::io::tun::Queue;
use crate::io::udp::WorkerSockets;
use crate::io::uring::Uring;
use crate::packet::batch::Limits;
use crate::packet::coalesce::TunOffloads;

/// Commands that may wait for a worker.
const COMMANDS_MAX: usize = 64;

/// What all workers have in common.
#[derive(Clone, Debug)]
pub struct Setup {
    /// GSO packets that the TUN device takes.
    pub tun: TunOffloads,
    /// How long batches may be.
    pub limits: Limits,
    /// What the workers run on.
    pub engine: EngineKind,
    /// How long to look for arrivals without sleeping.
    pub spin: Spin,
    /// Cores to pin workers to, in turn.
    pub cores: Vec<usize>,
    /// The first forwarding table.
    pub table: Arc<Table>,
    /// Takes the probes that come.
    pub probes: Sender<ReceivedProbe>,
}

struct Handle {
    thread: JoinHandle<()>,
    commands: Sender<WorkerCommand>,
    wake: Arc<EventFd>,
}

/// How long workers may take to take a new table, and how often they are told
/// of it if they have not done so with the last ones.
const PUBLISH_WAIT_MAX: Duration = Duration::from_secs(5);
const PUBLISH_WAIT_STEP: Duration = Duration::from_millis(1);

/// The running workers. Dropping them ends them.
pub struct Threads {
    workers: Vec<Handle>,
    /// Keeps workers that are ready from starting, until it is dropped.
    gate: Option<Sender<()>>,
    failures: Receiver<Error>,
}

impl Threads {
    /// Makes one worker per queue, with these sockets and counters, and waits
    /// until all are ready. They start with [`Self::go`].
    ///
    /// # Errors
    /// The first error of any worker; then all are ended again.
    pub fn start(
        queues: Vec<Queue>,
        sockets: Vec<WorkerSockets>,
        counters: Vec<Arc<Counters>>,
        setup: &Setup,
    ) -> Result<Self> {
        let count = queues.len();
        let (ready_sender, ready) = bounded(count);
        let (failure_sender, failures) = bounded(count);
        let (gate, start) = bounded::<()>(0);
        let mut threads = Self {
            workers: Vec::with_capacity(count),
            gate: Some(gate),
            failures,
        };
        let all = queues.into_iter().zip(sockets).zip(counters);
        for (index, ((queue, sockets), counters)) in all.enumerate() {
            let (commands, receiver) = bounded(COMMANDS_MAX);
            let wake = Arc::new(event_counter()?);
            let (worker_wake, setup) = (Arc::clone(&wake), setup.clone());
            let (ready, start, failures) =
                (ready_sender.clone(), start.clone(), failure_sender.clone());
            let worker = Worker {
                index,
                counters,
                setup,
                commands: receiver,
                ready,
                start,
                failures,
            };
            let thread = std::thread::Builder::new()
                .name(format!("fastvpn-{index}"))
                .spawn(move || worker.work(queue, sockets, worker_wake))
                .map_err(|error| {
                    Error::os("cannot start a worker thread", error)
                        .hint("raise the limit on processes (ulimit -u), or ask for fewer --queues")
                })?;
            threads.workers.push(Handle {
                thread,
                commands,
                wake,
            });
        }
        drop(ready_sender);
        for _ in 0..count {
            ready
                .recv()
                .map_err(|_| Error::new("a worker thread ended before it was ready"))??;
        }
        Ok(threads)
    }

    /// Lets the workers start.
    pub fn go(&mut self) {
        self.gate = None;
    }

    /// Gives all workers a new table, and waits until each of them forwards by
    /// it: nothing that is sent into the tunnel after this goes by an older one.
    pub fn publish(&self, table: &Arc<Table>) {
        let deadline = Instant::now() + PUBLISH_WAIT_MAX;
        let (sender, in_force) = bounded(0);
        let mut all_told = false;
        while !all_told && Instant::now() < deadline {
            all_told = self.tell(|| WorkerCommand::Table(Arc::clone(table), sender.clone()));
            if !all_told {
                std::thread::sleep(PUBLISH_WAIT_STEP);
            }
        }
        drop(sender);
        // Nothing is ever sent: it ends when the last worker has let go, or has
        // ended itself.
        let result = in_force.recv_deadline(deadline);
        if !all_told || result == Err(RecvTimeoutError::Timeout) {
            tracing::error!("a worker does not take the new table: is it stuck?");
        }
    }

    /// Where a worker that fails later says so.
    pub fn failures(&self) -> &Receiver<Error> {
        &self.failures
    }

    /// Tells all workers that have not ended. A worker that has not taken its last
    /// commands yet is left out rather than waited for; `false` then.
    pub fn tell(&self, command: impl Fn() -> WorkerCommand) -> bool {
        let mut all = true;
        for worker in &self.workers {
            let told = worker.commands.try_send(command());
            all &= !matches!(told, Err(TrySendError::Full(_)));
            // The counter cannot overflow: a worker empties it each time.
            let _ = worker.wake.write(1);
        }
        all
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        // Those that have not started yet find the word to stop first.
        let gate = self.gate.take();
        if gate.is_some() {
            self.tell(|| WorkerCommand::Stop);
        }
        drop(gate);
        while !self.tell(|| WorkerCommand::Stop) {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        for worker in self.workers.drain(..) {
            if worker.thread.join().is_err() {
                tracing::error!("a worker thread panicked");
            }
        }
    }
}

fn event_counter() -> Result<EventFd> {
    let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
    EventFd::from_value_and_flags(0, flags).map_err(|errno| {
        Error::os("cannot create an event counter", errno.into())
            .hint("raise the limit on open files (ulimit -n), or ask for fewer --queues")
    })
}

/// What a worker thread takes with it.
struct Worker {
    index: usize,
    counters: Arc<Counters>,
    setup: Setup,
    commands: Receiver<WorkerCommand>,
    ready: Sender<Result<()>>,
    start: Receiver<()>,
    failures: Sender<Error>,
}

impl Worker {
    fn work(self, queue: Queue, sockets: WorkerSockets, wake: Arc<EventFd>) {
        let cores = &self.setup.cores;
        if let Some(&id) = cores.get(self.index % cores.len().max(1))
            && !core_affinity::set_for_current(core_affinity::CoreId { id })
        {
            tracing::warn!("cannot pin worker {} to core {id}", self.index);
        }
        let (limits, counters) = (self.setup.limits, Arc::clone(&self.counters));
        match self.setup.engine {
            EngineKind::Uring => self.run(Uring::new(queue, sockets, wake, limits, counters)),
            EngineKind::Epoll => self.run(Epoll::new(queue, sockets, wake, limits, counters)),
        }
    }

    /// Says that the engine is ready, or why it is not, and runs the loop.
    fn run(self, engine: Result<impl Engine>) {
        let mut engine = match engine {
            Ok(engine) => engine,
            Err(error) => return drop(self.ready.send(Err(error))),
        };
        let _ = self.ready.send(Ok(()));
        // Nothing is ever sent: the gate opens by being dropped.
        let _ = self.start.recv();
        let Setup { tun, spin, .. } = self.setup;
        let result = dataplane::run(
            self.index,
            &mut engine,
            &self.commands,
            self.setup.table,
            Inbound::new(tun, self.index, self.setup.probes),
            spin,
            &self.counters,
        );
        if let Err(error) = result {
            let _ = self.failures.send(error);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;
    use std::os::fd::OwnedFd;

    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
    use nix::unistd::{read, write};

    use super::*;
    use crate::io::uring;
    use crate::packet::icmp::TunnelAddresses;
    use crate::routing::overlay::Overlay;

    /// Another process goes on with what they have not read.
    #[test]
    fn workers_that_never_started_read_nothing() {
        for engine in [EngineKind::Epoll, EngineKind::Uring] {
            if engine == EngineKind::Uring && uring::probe(1).is_err() {
                continue;
            }
            let flags = SockFlag::SOCK_NONBLOCK;
            let (queue, device) =
                socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).unwrap();
            let receive = UdpSocket::bind("127.0.0.1:0").unwrap();
            receive.set_nonblocking(true).unwrap();
            let others = (queue.try_clone().unwrap(), receive.try_clone().unwrap());
            let sockets = WorkerSockets {
                receive: OwnedFd::from(receive).into(),
                send: None,
            };
            let setup = Setup {
                tun: TunOffloads {
                    tcp: true,
                    udp: true,
                },
                limits: Limits::FULL,
                engine,
                spin: Spin::Off,
                cores: Vec::new(),
                table: Arc::new(Overlay::default().table(TunnelAddresses::default(), false)),
                probes: bounded(1).0,
            };
            let counters = vec![Arc::default()];
            let threads =
                Threads::start(vec![Queue::from(queue)], vec![sockets], counters, &setup).unwrap();
            write(&device, &[1; 60]).unwrap();
            let to = others.1.local_addr().unwrap();
            others.1.send_to(&[1; 60], to).unwrap();
            drop(threads);
            assert_eq!(read(&others.0, &mut [0; 100]), Ok(60));
            assert_eq!(others.1.recv(&mut [0; 100]).unwrap(), 60);
        }
    }
}
