//! The thread around [`Exchange`]: sleeps until a message, a request, a command or a timer is
//! due, and feeds it. Each turn does a bounded part of what waits, of each kind.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use crossbeam_channel::{Receiver, Sender};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::eventfd::EventFd;
use nix::sys::time::TimeSpec;
use socket2::Socket;

use super::counters::HandshakeCounters;
use super::exchange::Exchange;
use super::mismatch::Identities;
use super::outside::{Now, Outside};
use super::peers::{PeerConfig, PeerTimestamps};
use crate::clock;
use crate::io::message;
use crate::wire::Endpoint;
use crate::wire::wireguard::keys::PrivateKey;
use crate::wire::wireguard::sessions::WorkerRequest;

/// Receives that are handled in one turn. Each may bring several messages, if GRO has merged
/// them.
const MESSAGES_MAX: usize = 64;

/// Requests that are handled in one turn.
const REQUESTS_MAX: usize = 256;

/// How many times as long as a turn took, the socket is left alone after it, when more waits
/// and the host is under load. So a flood takes no more than a quarter of a core, which
/// workers may need, and the kernel drops the rest of it at little cost.
const REST_FACTOR: u32 = 3;

/// Bytes of the longest datagram.
const DATAGRAM_BYTES_MAX: usize = 1 << 16;

/// What the thread is told to do.
pub(super) enum Command {
    Peers(Vec<PeerConfig>),
    PrivateKey(Option<PrivateKey>),
    Identities(Option<Identities>),
    Socket(Arc<Socket>),
    Renew,
    Stop,
}

/// See the module's documentation.
pub(super) struct Thread {
    /// With what to drop once it is done.
    pub commands: Receiver<(Command, Sender<()>)>,
    pub requests: Receiver<WorkerRequest>,
    pub wake: Arc<EventFd>,
    pub exchange: Exchange,
    pub port: Port,
    /// When the socket is looked at again.
    pub rest_until: Option<Instant>,
}

/// Takes a data message and its sender.
pub(crate) type PassOn = Box<dyn Fn(Endpoint, &[u8]) + Send>;

/// The outside of an [`Exchange`].
pub(super) struct Port {
    pub socket: Arc<Socket>,
    pub wake_workers: Box<dyn Fn() + Send>,
    pub pass_on: PassOn,
    pub counters: Arc<HandshakeCounters>,
}

impl Outside for Port {
    fn send(&mut self, to: Endpoint, datagram: &[u8]) {
        let socket = self.socket.as_fd();
        let mut sent = message::send_datagram(socket, datagram, to);
        let is_full = matches!(sent, Err(Errno::EAGAIN | Errno::ENOBUFS));
        if sent.is_err() && !is_full && to.source.is_some() {
            // This host may have lost the address that the peer has called.
            sent = message::send_datagram(socket, datagram, to.address.into());
        }
        if sent.is_err() {
            self.counters.drop_send_error.add(1);
        }
    }

    fn wake_workers(&mut self) {
        (self.wake_workers)();
    }

    fn pass_on(&mut self, from: Endpoint, datagram: &mut [u8]) {
        (self.pass_on)(from, datagram);
    }
}

impl Thread {
    /// Runs until it is told to stop, and says how far it has come.
    pub(super) fn run(mut self) -> Vec<PeerTimestamps> {
        let mut buffer = vec![0; DATAGRAM_BYTES_MAX];
        loop {
            while let Ok((command, _done)) = self.commands.try_recv() {
                let (now, exchange, port) = (now(), &mut self.exchange, &mut self.port);
                match command {
                    Command::Peers(peers) => exchange.set_peers(now, peers, port),
                    Command::PrivateKey(key) => exchange.set_private_key(now, key, port),
                    Command::Identities(identities) => exchange.set_identities(identities),
                    Command::Socket(socket) => port.socket = socket,
                    Command::Renew => exchange.renew(now, port),
                    Command::Stop => return exchange.timestamps(),
                }
            }
            let began = Instant::now();
            let (has_requests, passed_on) = self.take_requests();
            let has_messages = self.take_messages(&mut buffer, MESSAGES_MAX - passed_on);
            let now = now();
            if self.exchange.next_ns().is_some_and(|ns| ns <= now.ns) {
                self.exchange.tick(now, &mut self.port);
            }
            if has_messages {
                self.exchange.note_backlog(now);
                self.rest_until = Some(Instant::now() + REST_FACTOR * began.elapsed());
            }
            if !has_requests {
                self.sleep(now);
            }
        }
    }

    /// Handles requests. Returns whether there may be more, and how many were messages: of
    /// those no more are handled than of the socket's, and none while that is left alone.
    fn take_requests(&mut self) -> (bool, usize) {
        let messages_max = match self.rest() {
            Some(_) => 0,
            None => MESSAGES_MAX,
        };
        let mut messages = 0;
        for _ in 0..REQUESTS_MAX {
            let Ok(request) = self.requests.try_recv() else {
                return (false, messages);
            };
            let (exchange, port) = (&mut self.exchange, &mut self.port);
            match request {
                WorkerRequest::Session(peer) => exchange.request(now(), &peer, port),
                WorkerRequest::Message(from, mut message) if messages < messages_max => {
                    messages += 1;
                    exchange.receive(now(), from, &mut message, port);
                }
                WorkerRequest::Message(..) => self.port.counters.drop_rate_limited.add(1),
            }
        }
        (true, messages)
    }

    /// Handles so many messages at the most. Returns whether there may be more.
    fn take_messages(&mut self, buffer: &mut [u8], messages_max: usize) -> bool {
        if self.rest().is_some() {
            return false;
        }
        self.rest_until = None;
        for _ in 0..messages_max {
            match message::receive(self.port.socket.as_fd(), buffer) {
                Ok(Some(received)) => {
                    let bytes = received.bytes.min(buffer.len());
                    let segment_bytes = received.control.segment_bytes.unwrap_or(bytes).max(1);
                    for datagram in buffer[..bytes].chunks_mut(segment_bytes) {
                        let (from, port) = (received.endpoint(), &mut self.port);
                        self.exchange.receive(now(), from, datagram, port);
                    }
                }
                Err(Errno::EAGAIN) => return false,
                // Cut short, or an error of an earlier send.
                Ok(None) | Err(_) => {}
            }
        }
        true
    }

    /// How much longer the socket is left alone.
    fn rest(&self) -> Option<Duration> {
        let rest = self.rest_until?.saturating_duration_since(Instant::now());
        Some(rest).filter(|rest| !rest.is_zero())
    }

    /// Waits until something is to be done. The socket is left alone while it rests.
    fn sleep(&self, now: Now) {
        let rest = self.rest();
        let due_ns = self.exchange.next_ns();
        let due = due_ns.map(|ns| Duration::from_nanos(ns.saturating_sub(now.ns)));
        let wait = [due, rest].into_iter().flatten().min();
        let mut sources = [
            PollFd::new(self.wake.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.port.socket.as_fd(), PollFlags::POLLIN),
        ];
        let watched = if rest.is_some() { 1 } else { 2 };
        let ready = ppoll(&mut sources[..watched], wait.map(TimeSpec::from), None);
        let is_woken = |source: &PollFd<'_>| source.any().unwrap_or(false);
        if ready.is_ok() && is_woken(&sources[0]) {
            // Whoever has written to it has put something into a channel before.
            let _ = self.wake.read();
        }
    }
}

/// The time, by the clock that workers note times by.
fn now() -> Now {
    Now {
        ns: clock::now_ns(),
        wall: SystemTime::now(),
    }
}

#[cfg(test)]
#[path = "thread_tests.rs"]
mod tests;
