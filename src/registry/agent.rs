//! The thread that keeps up with the registry, as the rest of the process sees it: options go
//! in, whole snapshots come out.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use arc_swap::ArcSwap;
use crossbeam_channel::{Receiver, bounded};

use super::shared::{Bell, Joined, Options, Shared, Stop};
use super::status::{Leases, Status};
use super::view::Snapshot;
use crate::error::{Error, Result};

/// See the module's documentation. Its thread ends with it; the registry keeps the host.
pub(crate) struct Agent {
    shared: Arc<Shared>,
    /// Something has changed.
    pub(crate) changed: Receiver<()>,
    /// The host has joined: once, and before anything changes.
    pub(crate) joined: Receiver<Joined>,
    /// Etcd was asked for the leases.
    pub(crate) leases_known: Receiver<()>,
    thread: Option<(Stop, JoinHandle<()>)>,
}

impl Agent {
    /// Starts to join.
    ///
    /// # Errors
    /// When there can be no more threads; when this program was built without a registry.
    pub(crate) fn start(options: Options) -> Result<Self> {
        let ((changed_sent, changed), (joined_sent, joined)) = (bounded(1), bounded(1));
        let (known_sent, leases_known) = bounded(1);
        let shared = Arc::new(Shared {
            snapshot: ArcSwap::default(),
            status: ArcSwap::default(),
            leases: ArcSwap::default(),
            leases_wanted: Bell::default(),
            leases_known: known_sent,
            end: Mutex::new(None),
            apply_us: AtomicU64::new(0),
            changed: changed_sent,
            joined: joined_sent,
        });
        Ok(Self {
            thread: Some(start_thread(options, Arc::clone(&shared))?),
            shared,
            changed,
            joined,
            leases_known,
        })
    }

    /// The peers that follow from the registry now.
    pub(crate) fn snapshot(&self) -> Arc<Snapshot> {
        self.shared.snapshot.load_full()
    }

    /// How it is going.
    pub(crate) fn status(&self) -> Arc<Status> {
        self.shared.status.load_full()
    }

    /// How long the hosts' leases last, as far as that was asked for.
    pub(crate) fn leases(&self) -> Arc<Leases> {
        self.shared.leases.load_full()
    }

    /// Has etcd asked for them; [`Self::leases_known`] says when that is done.
    pub(crate) fn ask_for_leases(&self) {
        #[cfg(feature = "registry")]
        self.shared.leases_wanted.notify_one();
    }

    /// Why this host has to leave the network, if it has to.
    pub(crate) fn end(&self) -> Option<Error> {
        let mut end = self
            .shared
            .end
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        end.take()
    }

    /// Notes how long it took to apply a snapshot: snapshots come the less often, the longer
    /// that is.
    pub(crate) fn note_cost(&self, cost: Duration) {
        let us = cost.as_micros().try_into().unwrap_or(u64::MAX);
        self.shared.apply_us.store(us, Relaxed);
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if let Some((stop, thread)) = self.thread.take() {
            #[allow(clippy::drop_non_drop, reason = "without a registry it is nothing")]
            drop(stop);
            if thread.join().is_err() {
                tracing::error!("the registry's thread panicked");
            }
        }
    }
}

#[cfg(feature = "registry")]
fn start_thread(options: Options, shared: Arc<Shared>) -> Result<(Stop, JoinHandle<()>)> {
    super::worker::start(options, shared)
}

#[cfg(not(feature = "registry"))]
fn start_thread(_: Options, _: Arc<Shared>) -> Result<(Stop, JoinHandle<()>)> {
    Err(super::left_out())
}
