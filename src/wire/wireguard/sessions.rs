//! What the handshake thread and the workers share of sessions. The handshake thread puts
//! them in force and takes them out; workers look them up, without a lock, and note what
//! they have seen. A session that is stored here is in force for all workers at once, which
//! is why a response may leave as soon as its session is stored.
//!
//! All times are nanoseconds of `CLOCK_MONOTONIC`, as [`now_ns`] gives them; 0 stands for
//! never.
//!
//! [`now_ns`]: crate::clock::now_ns

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64};

use arc_swap::ArcSwapOption;

use super::session::Session;

/// The sessions of one peer, and what was last seen of it. It belongs to the peer and
/// outlives tables (see `dataplane/table.rs`).
#[derive(Debug, Default)]
pub struct PeerSessions {
    /// The one to send with.
    pub current: ArcSwapOption<Session>,
    /// As the responder: the one to send with once the initiator has used it.
    pub next: ArcSwapOption<Session>,
    /// Where its datagrams go: as configured, then wherever it last sent from.
    pub endpoint: ArcSwapOption<SocketAddr>,
    /// A worker has asked for a session, and the handshake thread has not seen it yet.
    pub is_wanted: AtomicBool,
    /// When anything was last sent to it in a session.
    pub sent_ns: AtomicU64,
    /// The same, of what was no keepalive.
    pub data_sent_ns: AtomicU64,
    /// When anything that is authentic last came from it in a session.
    pub received_ns: AtomicU64,
    /// The same, of what was no keepalive.
    pub data_received_ns: AtomicU64,
}

/// Sessions by the index that their messages name: this host's own. The low bits say the
/// place, the others are random.
#[derive(Debug)]
pub struct SessionMap {
    slots: Box<[ArcSwapOption<Session>]>,
}
