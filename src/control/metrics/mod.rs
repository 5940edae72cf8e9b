//! Metrics for Prometheus, and whether the tunnel is well, over HTTP (`--metrics`). Nothing is
//! counted for this: each scrape takes the numbers that `status` and `peers` show.
//!
//! - `http`: requests and responses as bytes; pure.
//! - `exposition`: a [`Snapshot`] as text; pure.
//! - `client`: one connection.
//! - `server`: the thread that serves them all.

mod client;
mod exposition;
mod http;
mod server;

use std::time::SystemTime;

use crossbeam_channel::Sender;

pub(crate) use self::server::{Listener, Server};
use super::protocol::{PeerStatus, Status};

#[doc(hidden)]
pub use self::http::{Page, Parsed, parse};

/// Peers that a snapshot has at the most, the first by their names: so is a scrape of bounded
/// size, some 5 MB.
pub(crate) const PEERS_SHOWN_MAX: usize = 5_000;

/// Whether the tunnel is ready, or why not, in words.
pub(crate) type Readiness = Result<(), &'static str>;

/// The tunnel at one time, in numbers.
#[derive(Debug)]
pub(crate) struct Snapshot {
    /// When that was.
    pub(crate) taken_at: SystemTime,
    /// As `status` has it.
    pub(crate) status: Status,
    /// As `peers` has them, [`PEERS_SHOWN_MAX`] at the most.
    pub(crate) peers: Vec<PeerStatus>,
    /// Whether it is ready.
    pub(crate) readiness: Readiness,
}

/// What a client wants to know of the control thread. If that drops the sender, it does not
/// tell.
#[derive(Debug)]
pub(crate) enum Call {
    /// All that there is.
    Snapshot(Sender<Box<Snapshot>>),
    /// Whether the tunnel is ready. That there is an answer says that the process is well.
    Readiness(Sender<Readiness>),
}
