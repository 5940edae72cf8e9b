//! The one loop of the control thread: it waits for whatever may happen to the
//! tunnel, and handles one event after the other until the end.

use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, never, select, tick};
use signal_hook::consts::SIGHUP;

use super::handoff::{self, Handoff, NewProcess};
use super::service_manager::ServiceManager;
use super::start::Begun;
use super::tunnel::Tunnel;
use super::upgrade::{Program, Upgrade};
use super::{metrics, reload, requests, uapi};
use crate::control::credentials::Asker;
use crate::control::metrics::Server as MetricsServer;
use crate::control::protocol::{Answer, Changed, Request, Upgrading};
use crate::control::server::{CONNECTIONS_MAX, Call, Reply, Server};
use crate::control::uapi::server::Server as UapiServer;
use crate::error::{Error, Result};

/// How often peers are polled: who answers, what the paths take.
const POLL_INTERVAL: Duration = Duration::from_secs(1);

/// How often GSO batches of full size are tried again on paths that refused them.
const LIMITS_RESET_INTERVAL: Duration = Duration::from_secs(600);

/// How long a request waits for what etcd says of leases.
const LEASES_WAIT_MAX: Duration = Duration::from_secs(1);

/// How the run ended, if not by an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// By a signal or a request.
    Stopped,
    /// Another process carries on: device, sockets and routes are its now.
    HandedOver,
}

/// What this process runs.
pub struct Daemon {
    /// The tunnel.
    pub tunnel: Tunnel,
    /// The control socket, if there is one.
    control: Option<Server>,
    /// The socket for `wg`, if there is one.
    uapi: Option<UapiServer>,
    /// Serves metrics, if that is wanted.
    metrics: Option<MetricsServer>,
    /// While a new process gets ready to take over.
    handoff: Option<Handoff>,
    /// Requests for the peers, and until when etcd is waited for: at most
    /// [`CONNECTIONS_MAX`].
    waiting: Vec<(Reply, Instant)>,
    /// This process's program.
    program: Program,
    /// While a process that this one has started is to take over.
    upgrade: Option<Upgrade>,
    /// Who may have started this process.
    manager: ServiceManager,
}

impl Daemon {
    /// Nobody takes over yet.
    pub fn new(begun: Begun, program: Program, manager: ServiceManager) -> Self {
        let Begun {
            tunnel,
            control,
            uapi,
            metrics,
        } = begun;
        Self {
            uapi: uapi.or_else(|| uapi::serve(&tunnel.config)),
            tunnel,
            control,
            metrics,
            handoff: None,
            waiting: Vec::new(),
            program,
            upgrade: None,
            manager,
        }
    }

    /// Runs the tunnel until the end.
    ///
    /// # Errors
    /// When a worker fails.
    pub fn run(&mut self, signals: &Receiver<i32>) -> Result<End> {
        self.manager.ready(&self.tunnel);
        let end = self.handle_events(signals);
        if !matches!(end, Ok(End::HandedOver)) {
            self.manager.stopping();
        }
        end
    }

    fn handle_events(&mut self, signals: &Receiver<i32>) -> Result<End> {
        let poll = tick(POLL_INTERVAL);
        let limits_reset = tick(LIMITS_RESET_INTERVAL);
        let names = self.tunnel.peers.answers();
        loop {
            // An event may replace some of these.
            let failures = self.tunnel.workers.failures.clone();
            let control = self.control.as_ref();
            let calls = control.map_or_else(never, |server| server.calls.clone());
            let uapi = self.uapi.as_ref();
            let uapi_calls = uapi.map_or_else(never, |server| server.calls.clone());
            let metrics = self.metrics.as_ref();
            let metrics_calls = metrics.map_or_else(never, |server| server.calls.clone());
            let handoff = self.handoff.as_ref();
            let ready = handoff.map_or_else(never, |handoff| handoff.ready.clone());
            let probes = self.tunnel.peers.probes();
            let registry = self.tunnel.registry.as_ref();
            let agent = registry.map(|registry| &registry.agent);
            let leases = agent.map_or_else(never, |agent| agent.leases_known.clone());
            let registry = agent.map_or_else(never, |agent| agent.changed.clone());
            let workers_answers = self.manager.answers();
            let mut end = None;
            select! {
                recv(signals) -> signal => end = self.take_signal(signal.ok()),
                recv(failures) -> failure => return self.take_failure(failure.ok().flatten()),
                recv(calls) -> call => end = call.ok().and_then(|call| self.take_call(call)),
                recv(uapi_calls) -> call => if let Ok(call) = call {
                    let is_leaving = self.handoff.is_some();
                    let tunnel = &mut self.tunnel;
                    call.answer(|request, asker| uapi::answer(tunnel, request, asker, is_leaving));
                },
                recv(metrics_calls) -> call => if let Ok(call) = call {
                    metrics::answer(&mut self.tunnel, call);
                },
                recv(ready) -> ready => {
                    let ready = ready.unwrap_or_else(|_| Err(Error::new("its thread has ended")));
                    end = self.finish_handoff(ready)?;
                }
                recv(names) -> answer => if let Ok(answer) = answer {
                    self.tunnel.take_name(answer);
                },
                recv(probes) -> probe => if let Ok(probe) = probe {
                    self.tunnel.take_probe(probe);
                },
                // Nothing is ever sent: it ends.
                recv(workers_answers) -> _ => self.manager.all_answered(),
                // While another process takes over, it follows the registry by itself.
                recv(registry) -> _ => self.tunnel.take_registry()?,
                recv(leases) -> _ => self.answer_waiting(None),
                recv(poll) -> _ => {
                    self.tunnel.poll_registry();
                    self.tunnel.poll();
                    self.answer_waiting(Some(Instant::now()));
                    self.retry_uapi();
                    self.poll_upgrade();
                    self.manager.poll(&self.tunnel, Instant::now());
                    end = self.find_socket_removed();
                }
                recv(limits_reset) -> _ => self.tunnel.workers.reset_limits(),
            }
            if let Some(end) = end {
                return Ok(end);
            }
        }
    }

    fn take_signal(&mut self, signal: Option<i32>) -> Option<End> {
        match (signal, &mut self.handoff) {
            (Some(SIGHUP), Some(handoff)) => {
                tracing::info!("the reload waits: another process is taking over");
                handoff.is_reload_due = true;
                None
            }
            (Some(SIGHUP), None) => {
                self.reload();
                None
            }
            (signal, _) => {
                tracing::debug!("stopping by signal {}", signal.unwrap_or_default());
                Some(End::Stopped)
            }
        }
    }

    /// A worker has failed. One whose device is deleted ends the process in order where that
    /// is the way to end it.
    fn take_failure(&self, failure: Option<Error>) -> Result<End> {
        let config = &self.tunnel.config;
        if config.interface.is_some() && self.tunnel.is_device_deleted() {
            tracing::info!(
                interface = config.tun,
                "stopping: {} has been deleted",
                config.tun
            );
            return Ok(End::Stopped);
        }
        Err(failure.unwrap_or_else(|| Error::new("all workers have ended")))
    }

    /// An interface that only `wg` can talk to has a socket, if it had to wait for an old
    /// process to let go of it.
    fn retry_uapi(&mut self) {
        let config = &self.tunnel.config;
        if self.uapi.is_none() && config.interface.is_some() {
            self.uapi = uapi::retry(config);
        }
    }

    /// An interface that only `wg` can talk to ends with the socket's name.
    fn find_socket_removed(&self) -> Option<End> {
        let config = &self.tunnel.config;
        let uapi = self.uapi.as_ref().filter(|_| config.interface.is_some())?;
        (!uapi.has_name()).then(|| {
            tracing::info!(
                interface = config.tun,
                "stopping: the WireGuard socket of {} is gone",
                config.tun
            );
            End::Stopped
        })
    }

    /// What comes of it is in the log.
    fn reload(&mut self) {
        self.manager.reloading();
        let _ = reload::reload(&mut self.tunnel, "SIGHUP");
        self.manager.ready(&self.tunnel);
    }

    fn take_call(&mut self, call: Call) -> Option<End> {
        match call {
            Call::Takeover(connection, _) if self.handoff.is_some() => {
                Handoff::refuse_second(connection);
            }
            Call::Takeover(connection, protocol) => {
                let servers = (self.control.as_ref(), self.metrics.as_ref());
                self.handoff = Handoff::begin(&mut self.tunnel, servers, connection, protocol);
            }
            Call::Capture(connection, asker, snaplen_bytes) => {
                let is_leaving = self.handoff.is_some();
                let tunnel = &mut self.tunnel;
                tunnel.begin_capture(connection, asker, snaplen_bytes, is_leaving);
            }
            Call::Request(Request::Stop {}, reply) => {
                tracing::info!(by = %reply.asker, "stopped by {}", reply.asker);
                reply.send(Ok(Answer::Changed(Changed::default())));
                return Some(End::Stopped);
            }
            // The new process would not know of a change.
            Call::Request(request, reply)
                if self.handoff.is_some() && !requests::is_question(&request) =>
            {
                let error = Error::new("another process is taking over").hint("try again");
                reply.send(Err(error));
            }
            Call::Request(Request::Peers {}, reply)
                if self.waiting.len() < CONNECTIONS_MAX && self.tunnel.ask_for_leases() =>
            {
                self.waiting.push((reply, Instant::now() + LEASES_WAIT_MAX));
            }
            Call::Request(Request::Upgrade {}, reply) => {
                let answer = self.begin_upgrade(reply.asker);
                reply.send(answer.map(Answer::Upgrading));
            }
            Call::Request(request @ Request::Reload { dry_run: false }, reply) => {
                self.manager.reloading();
                let answer = requests::answer(&mut self.tunnel, request, reply.asker);
                self.manager.ready(&self.tunnel);
                reply.send(answer);
            }
            Call::Request(request, reply) => {
                let answer = requests::answer(&mut self.tunnel, request, reply.asker);
                reply.send(answer);
            }
        }
        None
    }

    /// Answers those who wait for etcd, whatever it has said: all, or whose time is up by `due`.
    fn answer_waiting(&mut self, due: Option<Instant>) {
        let is_due = |until: Instant| due.is_none_or(|due| until <= due);
        for (reply, until) in std::mem::take(&mut self.waiting) {
            if is_due(until) {
                let answer = requests::answer(&mut self.tunnel, Request::Peers {}, reply.asker);
                reply.send(answer);
            } else {
                self.waiting.push((reply, until));
            }
        }
    }

    /// Starts a process that is to take over.
    fn begin_upgrade(&mut self, asker: Asker) -> Result<Upgrading> {
        if let Some(pid) = self.upgrade.as_ref().map(Upgrade::pid) {
            let what = format!("process {pid} is about to take over already");
            return Err(Error::new(what).hint("try again"));
        }
        let upgrade = Upgrade::begin(&self.program, &self.tunnel.config)?;
        let pid = upgrade.pid();
        tracing::info!(by = %asker, "started process {pid} to take over, by {asker}");
        self.tunnel.upgrade_error = None;
        self.upgrade = Some(upgrade);
        Ok(Upgrading { pid })
    }

    /// Whether the process that was to take over has ended, or takes too long.
    fn poll_upgrade(&mut self) {
        let upgrade = self.upgrade.as_mut();
        let Some(how) = upgrade.and_then(|upgrade| upgrade.find_ended(Instant::now())) else {
            return;
        };
        let Some(upgrade) = self.upgrade.take() else {
            return;
        };
        let pid = upgrade.pid();
        let error = format!("process {pid} has not taken over ({how}); its log says why");
        tracing::error!(%error, "not upgraded: {error}");
        self.tunnel.upgrade_error = Some(error);
    }

    /// Has the service manager follow the process `pid`, which has the tunnel now. Another one
    /// that was to take over ends.
    fn leave_service_to(&mut self, pid: Option<u32>) {
        match self.upgrade.take() {
            Some(upgrade) if pid.is_none_or(|pid| pid == upgrade.pid()) => {
                self.manager.hand_over(upgrade.pid());
                upgrade.leave();
            }
            // It is not the service's.
            _ if self.manager.is_there() => tracing::warn!(
                "the service manager does not follow a process that this one has not started: \
                 use `fastvpn upgrade`"
            ),
            _ => {}
        }
    }

    /// The process that takes over is `ready`, or has failed.
    fn finish_handoff(&mut self, ready: Result<NewProcess>) -> Result<Option<End>> {
        let handoff = self.handoff.take();
        let is_over = match ready {
            Ok(new) => {
                // The new process opens its own.
                self.uapi = None;
                // Whoever connects from here on waits for the process that has the tunnel then.
                let metrics = self.metrics.take().map(MetricsServer::end);
                let is_over = handoff::hand_over(new, &mut self.tunnel, &mut self.control)?;
                if !is_over {
                    self.uapi = uapi::serve(&self.tunnel.config);
                    self.metrics = metrics.and_then(metrics::try_to_serve);
                }
                is_over
            }
            Err(error) => {
                tracing::error!(%error, "not handed over: {error}");
                false
            }
        };
        if is_over {
            self.leave_service_to(handoff.and_then(|handoff| handoff.pid));
            return Ok(Some(End::HandedOver));
        }
        if handoff.is_some_and(|handoff| handoff.is_reload_due) {
            self.reload();
        }
        Ok(None)
    }

    /// Ends the tunnel: routes, device and sockets go.
    pub fn take_down(&mut self) {
        // It would find nobody to take over from.
        self.upgrade = None;
        self.handoff = None;
        self.metrics = None;
        self.tunnel.take_down();
        // A client that asked for the end waits for the socket to close.
        self.control = None;
        // Last: once it is gone, another process may have all the rest.
        self.uapi = None;
    }
}
