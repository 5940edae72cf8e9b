//! The one loop of the control thread: it waits for whatever may happen to the
//! tunnel, and handles one event after the other until the end.

use std::time::Duration;

use crossbeam_channel::{Receiver, never, select, tick};
use signal_hook::consts::{SIGHUP, SIGTERM};

use super::control_socket::ControlSocket;
use super::handoff::{Handoff, NewProcess};
use super::tunnel::Tunnel;
use super::{reload, requests};
use crate::control::protocol::{Answer, Changed, Request};
use crate::control::server::Call;
use crate::error::{Error, Result};

/// How often peers are polled: who answers, what the paths take.
const POLL_INTERVAL: Duration = Duration::from_secs(1);

/// How often GSO batches of full size are tried again on paths that refused them.
const LIMITS_RESET_INTERVAL: Duration = Duration::from_secs(600);

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
    /// Where it is asked about it.
    pub control: ControlSocket,
    /// While a new process gets ready to take over.
    handoff: Option<Handoff>,
}

impl Daemon {
    /// Nobody takes over yet.
    pub fn new(tunnel: Tunnel, control: ControlSocket) -> Self {
        Self {
            tunnel,
            control,
            handoff: None,
        }
    }

    /// Runs the tunnel until the end.
    ///
    /// # Errors
    /// When a worker fails.
    pub fn run(&mut self, signals: &Receiver<i32>) -> Result<End> {
        let poll = tick(POLL_INTERVAL);
        let limits_reset = tick(LIMITS_RESET_INTERVAL);
        let names = self.tunnel.peers.answers();
        loop {
            // Some are others after each event.
            let failures = self.tunnel.workers.failures();
            let calls = self.control.calls();
            let handoff = self.handoff.as_ref();
            let ready = handoff.map_or_else(never, |handoff| handoff.ready().clone());
            let probes = self.tunnel.peers.probes();
            let mut end = None;
            select! {
                recv(signals) -> signal => end = self.take_signal(signal.ok()),
                recv(failures) -> failure => {
                    return Err(failure.unwrap_or_else(|_| Error::new("all workers have ended")));
                }
                recv(calls) -> call => end = call.ok().and_then(|call| self.take_call(call)),
                recv(ready) -> ready => {
                    let ready = ready.unwrap_or_else(|_| Err(Error::new("its thread has ended")));
                    end = self.finish_handoff(ready, signals)?;
                }
                recv(names) -> answer => if let Ok(answer) = answer {
                    self.tunnel.take_name(answer);
                },
                recv(probes) -> probe => if let Ok(probe) = probe {
                    self.tunnel.take_probe(probe);
                },
                recv(poll) -> _ => self.tunnel.poll(),
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
                self.reload_by_signal();
                None
            }
            (signal, _) => {
                let name = if signal == Some(SIGTERM) {
                    "SIGTERM"
                } else {
                    "SIGINT"
                };
                tracing::debug!("{name}: stopping");
                Some(End::Stopped)
            }
        }
    }

    /// Reloads; what came of it is in the log.
    pub fn reload_by_signal(&mut self) {
        let _ = reload::reload(&mut self.tunnel, "SIGHUP");
    }

    fn take_call(&mut self, call: Call) -> Option<End> {
        match call {
            Call::Takeover(connection, protocol) => match self.handoff {
                Some(_) => Handoff::refuse_second(connection),
                None => {
                    let (tunnel, control) = (&self.tunnel, &self.control);
                    self.handoff = Handoff::begin(tunnel, control, connection, protocol);
                }
            },
            Call::Request(Request::Stop {}, reply) => {
                tracing::info!("stopped by {}", reply.asker);
                reply.send(Ok(Answer::Changed(Changed::default())));
                return Some(End::Stopped);
            }
            Call::Request(request, reply) => {
                let answer = match self.handoff.is_some() && requests::is_change(&request) {
                    true => Err(Error::new("another process is taking over").hint("try again")),
                    false => requests::answer(&mut self.tunnel, request, reply.asker),
                };
                reply.send(answer);
            }
        }
        None
    }

    /// The process that takes over is `ready`, or has failed.
    fn finish_handoff(
        &mut self,
        ready: Result<NewProcess>,
        signals: &Receiver<i32>,
    ) -> Result<Option<End>> {
        let Some(handoff) = self.handoff.take() else {
            return Ok(None);
        };
        let is_reload_due = handoff.is_reload_due;
        if handoff.finish(&mut self.tunnel, &mut self.control, ready, signals)? {
            return Ok(Some(End::HandedOver));
        }
        if is_reload_due {
            self.reload_by_signal();
        }
        Ok(None)
    }

    /// Ends the tunnel: routes, device and control socket go.
    pub fn take_down(&mut self) {
        self.handoff = None;
        self.tunnel.take_down();
        // Last: a client that asked for the end waits for the socket to close.
        self.control.close(true);
    }
}
