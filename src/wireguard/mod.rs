//! WireGuard's handshakes: one thread that makes and renews the sessions of all peers, by the
//! rules of the paper's section 6.
//!
//! It has a socket of its own on the port that workers receive on, to which the kernel gives
//! all messages that are no data ([`crate::io::udp`]). So Diffie-Hellman operations never keep
//! a packet waiting, and a flood of handshakes fills nobody's queue but its own.
//!
//! ```text
//!            initiations, responses, cookies            data messages
//!                        |                                    |
//!   socket  ->  thread  ->  exchange  ->  sessions  <-  workers
//!                 ^            |     limiter, timers, peers       |
//!                 +------------+---- requests, what they note ----+
//! ```
//!
//! [`exchange`] is the protocol, without I/O: messages and times go in. It asks [`timers`] what
//! is due for a peer, [`limiter`] whether a stranger is worth an answer, and has [`peers`] put
//! sessions in force. [`thread`] feeds it. Workers find sessions in what
//! [`crate::wire::wireguard::sessions`] shares, seal and open by themselves, and note when they
//! have sent and received; at each tick the thread compares that with the timers. They ask by
//! [`WorkerRequest`] for a session that is not there.

mod counters;
mod exchange;
mod limiter;
mod mismatch;
mod outside;
mod peers;
mod thread;
mod timers;

#[cfg(test)]
mod test_network;

use std::sync::{Arc, PoisonError};
use std::thread::JoinHandle;
use std::time::SystemTime;

use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use nix::sys::eventfd::EventFd;
use socket2::Socket;

pub(crate) use self::counters::HandshakeCounters;
use self::exchange::{Exchange, Latest};
pub(crate) use self::mismatch::Identities;
pub(crate) use self::peers::PeerConfig;
pub use self::peers::PeerTimestamps;
use self::thread::{Command, PassOn, Thread};
pub(crate) use self::timers::Intervals;
use crate::error::{Error, Result};
use crate::wire::wireguard::keys::{PrivateKey, PublicKey};
use crate::wire::wireguard::sessions::{SessionMap, WorkerRequest};

/// What the handshake thread is started with.
pub(crate) struct Setup {
    /// This host's key. Without one there are no handshakes.
    pub private_key: Option<PrivateKey>,
    /// [`Intervals::of_this_build`], but for tests.
    pub intervals: Intervals,
    /// On the port that is listened on, non-blocking.
    pub socket: Arc<Socket>,
    /// Where workers look sessions up. It needs room for four indices per peer.
    pub map: Arc<SessionMap>,
    /// What workers ask for.
    pub requests: Receiver<WorkerRequest>,
    /// Non-blocking. Whoever sends a request writes to it.
    pub wake: Arc<EventFd>,
    /// Has all workers send what waits for a session. It is called once a session is in force
    /// for a peer with [`is_wanted`](crate::wire::wireguard::sessions::PeerSessions::is_wanted).
    pub wake_workers: Box<dyn Fn() + Send>,
    /// What another process knows of the peers, or this one did before.
    pub earlier: Vec<PeerTimestamps>,
    /// Takes a data message that came to this socket, behind a handshake message that GRO has
    /// merged it with, and its sender. It must not wait; what it cannot take is lost.
    pub pass_on: PassOn,
}

/// The handshake thread. Dropping this ends it, and with it all sessions.
pub(crate) struct Handshakes {
    commands: Sender<(Command, Sender<()>)>,
    wake: Arc<EventFd>,
    counters: Arc<HandshakeCounters>,
    latest: Arc<Latest>,
    thread: Option<JoinHandle<Vec<PeerTimestamps>>>,
}

impl Handshakes {
    /// Starts the thread, without peers.
    ///
    /// # Errors
    /// When there can be no more threads.
    pub(crate) fn start(setup: Setup) -> Result<Self> {
        let (commands, receiver) = unbounded();
        let (counters, latest) = (Arc::default(), Arc::default());
        let wake = Arc::clone(&setup.wake);
        let mut exchange = Exchange::new(
            setup.intervals,
            setup.private_key,
            setup.map,
            Arc::clone(&counters),
            Arc::clone(&latest),
        );
        exchange.go_on_after(setup.earlier);
        let thread = Thread {
            commands: receiver,
            requests: setup.requests,
            wake: setup.wake,
            exchange,
            port: thread::Port {
                socket: setup.socket,
                wake_workers: setup.wake_workers,
                pass_on: setup.pass_on,
                counters: Arc::clone(&counters),
            },
            rest_until: None,
        };
        let thread = std::thread::Builder::new()
            .name("fastvpn-keys".to_string())
            .spawn(move || thread.run())
            .map_err(|error| {
                Error::os("cannot start the handshake thread", error)
                    .hint("raise the limit on processes (ulimit -u)")
            })?;
        Ok(Self {
            commands,
            wake,
            counters,
            latest,
            thread: Some(thread),
        })
    }

    /// Makes the peers those that are given, and returns when it is so. What is known of
    /// peers that stay is kept, if they come with the same `sessions`; a changed preshared key
    /// is used by the next handshake; peers that are not among them lose their sessions.
    pub(crate) fn set_peers(&self, peers: Vec<PeerConfig>) {
        self.tell(Command::Peers(peers));
    }

    /// Makes new sessions with all peers whose endpoints are known: another process had those
    /// that there were.
    pub(crate) fn renew(&self) {
        self.tell(Command::Renew);
    }

    /// Changes this host's key, and returns when it is so. All sessions of the old one go, and
    /// peers that had one get a new one.
    pub(crate) fn set_private_key(&self, private_key: Option<PrivateKey>) {
        self.tell(Command::PrivateKey(private_key));
    }

    /// Says who is who, for the log: hosts whose keys follow from a shared secret. Returns when
    /// it is so.
    pub(crate) fn set_identities(&self, identities: Option<Identities>) {
        self.tell(Command::Identities(identities));
    }

    /// Goes on with another socket, such as on another port. Sessions stay.
    pub(crate) fn set_socket(&self, socket: Arc<Socket>) {
        self.tell(Command::Socket(socket));
    }

    /// When the latest handshake with a peer was completed: as the responder, when the peer
    /// first used the session.
    pub(crate) fn latest_handshake(&self, peer: &PublicKey) -> Option<SystemTime> {
        let latest = self.latest.lock().unwrap_or_else(PoisonError::into_inner);
        latest.get(peer).copied()
    }

    /// Ends the thread, and all sessions. Returns what whoever goes on has to know.
    pub(crate) fn end(mut self) -> Vec<PeerTimestamps> {
        self.join()
    }

    fn join(&mut self) -> Vec<PeerTimestamps> {
        let Some(thread) = self.thread.take() else {
            return Vec::new();
        };
        self.tell(Command::Stop);
        thread.join().unwrap_or_else(|_| {
            tracing::error!("the handshake thread panicked");
            Vec::new()
        })
    }

    /// What the thread has counted.
    pub(crate) fn counters(&self) -> &HandshakeCounters {
        &self.counters
    }

    /// Has the thread do something, and waits until it has. One that has panicked is past
    /// that.
    fn tell(&self, command: Command) {
        // Nothing is ever sent: it ends when the thread has dropped its end.
        let (done, is_done) = bounded(0);
        let _ = self.commands.send((command, done));
        let _ = self.wake.write(1);
        let _ = is_done.recv();
    }
}

impl Drop for Handshakes {
    fn drop(&mut self) {
        self.join();
    }
}
