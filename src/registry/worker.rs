//! What the registry's thread does: it connects to a member of etcd, keeps this host's keys
//! there, and follows what changes, until it is stopped. Whatever fails, it begins again, and
//! what is known stays in force meanwhile.

mod config;
mod leases;
mod own;

use std::collections::BTreeSet;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use ipnet::Ipv4Net;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::{interval, sleep, sleep_until};

use super::cache;
use super::client::{Client, Watch, Watched};
use super::entry::{Key, Keys};
use super::shared::{Joined, Options, Shared, Stop};
use super::status::Status;
use super::subnet_env::previous_subnet;
use super::view::{Pair, Policy, Snapshot, View};
use crate::error::{Error, Result};
use crate::wire::wireguard::keys::PrivateKey;

/// Pauses between attempts to connect: they grow up to the longest, of which a random part
/// is left out, so that hosts that have lost etcd together do not come back together.
const PAUSE_MIN: Duration = Duration::from_millis(200);
const PAUSE_MAX: Duration = Duration::from_secs(3);

/// How long etcd may take at a start before what was known last is used instead.
const BOOT_WAIT: Duration = Duration::from_secs(5);

/// Least time between two snapshots, and how many times as long as it takes to make and to
/// apply one.
const SNAPSHOT_INTERVAL: Duration = Duration::from_millis(50);
const SNAPSHOT_COST_FACTOR: u32 = 4;

/// Most time between two renewals of the lease.
const RENEWAL_INTERVAL_MAX: Duration = Duration::from_secs(600);

/// Least time between two writes of the cache.
const CACHE_INTERVAL: Duration = Duration::from_secs(10);

/// Why a connection's work has ended.
enum End {
    /// It is to be begun again.
    Lost(Error),
    /// This host has to leave the network.
    Fatal(Error),
}

impl From<Error> for End {
    fn from(error: Error) -> Self {
        Self::Lost(error)
    }
}

/// This host in the registry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Own {
    subnet: Ipv4Net,
    /// 0: none is known.
    lease: i64,
}

struct Worker {
    options: Options,
    keys: Keys,
    shared: Arc<Shared>,
    view: View,
    /// All of the registry was listed, and what has happened to it since can be watched.
    is_listed: bool,
    /// `None` until the network's configuration is known.
    policy: Option<Policy>,
    private_key: Option<PrivateKey>,
    own: Option<Own>,
    /// A lease that was to be this host's and is not used yet.
    spare_lease: Option<i64>,
    /// Subnets whose keys this user may not write.
    denied: BTreeSet<Ipv4Net>,
    /// The subnet that this host had before.
    previous: Option<Ipv4Net>,
    has_joined: bool,
    snapshot: Arc<Snapshot>,
    /// The view has changed since the last snapshot, and since the cache was written.
    is_stale: bool,
    is_cache_stale: bool,
    next_snapshot: Instant,
    status: Status,
    /// The warning that was logged last.
    warned: Option<String>,
    /// That prefixes were refused was logged.
    has_told_of_prefixes: bool,
    /// Etcd was asked for the hosts' leases.
    lease_look: Option<JoinHandle<()>>,
}

/// Starts the thread.
///
/// # Errors
/// When there can be no more threads.
pub(super) fn start(
    options: Options,
    shared: Arc<Shared>,
) -> Result<(Stop, thread::JoinHandle<()>)> {
    let cannot = |cause| Error::os("cannot start the registry's thread", cause);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(cannot)?;
    let mut worker = Worker::new(options, shared);
    let (stop, stopped) = oneshot::channel();
    let run = move || {
        runtime.block_on(worker.run(stopped));
        // A look-up of a name may still be under way, and nobody waits for it.
        runtime.shutdown_background();
    };
    let thread = thread::Builder::new().name("registry".into());
    Ok((stop, thread.spawn(run).map_err(cannot)?))
}

impl Worker {
    fn new(options: Options, shared: Arc<Shared>) -> Self {
        let keys = Keys::new(&options.prefix);
        let cached = cache::read(&options.cache, &options.prefix).unwrap_or_else(|error| {
            tracing::warn!(%error, "{error}");
            None
        });
        let (view, subnet) = match cached {
            Some(cached) => (cached.view, cached.subnet),
            None => (View::new(keys.clone()), None),
        };
        Self {
            previous: previous_subnet(&options.subnet_file).or(subnet),
            options,
            keys,
            shared,
            view,
            is_listed: false,
            policy: None,
            private_key: None,
            own: None,
            spare_lease: None,
            denied: BTreeSet::new(),
            has_joined: false,
            snapshot: Arc::default(),
            is_stale: false,
            is_cache_stale: false,
            next_snapshot: Instant::now(),
            status: Status::default(),
            warned: None,
            has_told_of_prefixes: false,
            lease_look: None,
        }
    }

    async fn run(&mut self, stopped: oneshot::Receiver<()>) {
        tokio::select! {
            _ = stopped => {}
            error = self.follow() => {
                let mut end = self.shared.end.lock().unwrap_or_else(PoisonError::into_inner);
                *end = Some(error);
                drop(end);
                let _ = self.shared.changed.try_send(());
            }
        }
        self.write_cache();
    }

    /// Connects to one member after the other, for good.
    async fn follow(&mut self) -> Error {
        let (started, mut pause) = (Instant::now(), PAUSE_MIN);
        let urls = self.options.access.urls.clone();
        for url in urls.iter().cycle() {
            let end = self.work(url).await;
            if std::mem::take(&mut self.status.is_connected) {
                pause = PAUSE_MIN;
            }
            match end {
                End::Fatal(error) => return error,
                End::Lost(error) => self.note_loss(&error),
            }
            if !self.has_joined && started.elapsed() >= BOOT_WAIT {
                self.join_by_cache();
            }
            sleep(with_jitter(pause)).await;
            pause = (pause * 2).min(PAUSE_MAX);
        }
        Error::new("there is no registry to follow")
    }

    fn note_loss(&mut self, error: &Error) {
        let text = error.to_string();
        // Once a loss; and before this host has joined, each reason once in a row.
        let is_said = self.warned.as_ref();
        match is_said.is_some_and(|warned| self.has_joined || *warned == text) {
            true => tracing::debug!("registry: {text}"),
            false => {
                let stays = if self.has_joined {
                    "; the peers stay as they are"
                } else {
                    ""
                };
                tracing::warn!(error = text, "registry: {text}{stays}; trying again");
            }
        }
        self.warned = Some(text.clone());
        self.status.error = Some(text);
        self.show_status();
    }

    /// Joins by what was known before, if that is enough.
    fn join_by_cache(&mut self) {
        let Some(previous) = self.previous else {
            return;
        };
        let own_ip = self.options.public_ip;
        let host = self.view.host(previous);
        let Some(host) = host.filter(|host| host.value.public_ip == own_ip) else {
            return;
        };
        let own = Own {
            subnet: previous,
            lease: host.lease,
        };
        if self.follow_config().is_err() {
            return;
        }
        tracing::warn!(
            file = %self.options.cache.display(),
            "registry: etcd has not answered, going on with what was known before: {}",
            self.options.cache.display()
        );
        self.own = Some(own);
        self.publish();
    }

    /// Connects to a member, and goes on until that fails.
    async fn work(&mut self, url: &str) -> End {
        match self.connect(url).await {
            Ok((client, watch)) => match self.watch(client, watch).await {
                Ok(never) => match never {},
                Err(end) => end,
            },
            Err(end) => end,
        }
    }

    /// Connects, takes in what has changed meanwhile, and makes sure of this host's keys.
    async fn connect(&mut self, url: &str) -> std::result::Result<(Client, Watch), End> {
        url.clone_into(&mut self.status.url);
        let mut client = Client::connect(&self.options.access, url).await?;
        let state = client.get(&self.keys.config()).await?;
        // Whatever fails from here on: nobody watches what happens meanwhile.
        let is_listed = std::mem::take(&mut self.is_listed);
        if !is_listed || self.view.is_strange(state.cluster, state.revision) {
            self.list(&mut client).await?;
        }
        self.follow_config()?;
        self.reserve(url).await;
        self.keep_own(&mut client).await?;
        let (first, end) = self.keys.range();
        let watch = client
            .watch(&first, &end, self.view.revision().saturating_add(1))
            .await?;
        self.is_listed = true;
        self.view.hold_again(Instant::now());
        self.publish();
        if self.warned.take().is_some() {
            tracing::info!(url, "registry: connected to etcd at {url}");
        }
        (self.status.is_connected, self.status.error) = (true, None);
        self.status.connections += 1;
        self.show_status();
        Ok((client, watch))
    }

    async fn list(&mut self, client: &mut Client) -> std::result::Result<(), End> {
        let (first, end) = self.keys.range();
        let listed = client.list(&first, &end).await?;
        if self.view.is_strange(listed.cluster, listed.revision) {
            tracing::warn!(
                hold_seconds = super::view::HOLD.as_secs(),
                "registry: this is another etcd, or an older state of it; hosts that it does not \
                 know are kept for {} s",
                super::view::HOLD.as_secs()
            );
        }
        let now = Instant::now();
        self.view
            .replace(listed.pairs, listed.cluster, listed.revision, now);
        (self.is_stale, self.is_cache_stale) = (true, true);
        Ok(())
    }

    /// Takes in changes, and does what is due, until something fails.
    async fn watch(
        &mut self,
        mut client: Client,
        mut watch: Watch,
    ) -> std::result::Result<std::convert::Infallible, End> {
        let (ttl_s, _) = self
            .status
            .lease
            .unwrap_or((self.options.ttl_s, Instant::now()));
        let third = Duration::from_secs(u64::try_from(ttl_s).unwrap_or(0)) / 3;
        let longest = RENEWAL_INTERVAL_MAX.min(third);
        let mut renewal = interval(longest.max(Duration::from_millis(500)));
        let mut housekeeping = interval(Duration::from_secs(1));
        let shared = Arc::clone(&self.shared);
        let mut cache_written = Instant::now();
        // It was renewed when the connection was made.
        renewal.tick().await;
        loop {
            tokio::select! {
                watched = watch.next() => match watched? {
                    Watched::Changes(changes, revision) => {
                        if self.take(changes, revision) {
                            self.keep_own(&mut client).await?;
                        }
                    }
                    Watched::Compacted => {
                        sleep(PAUSE_MIN).await;
                        self.list(&mut client).await?;
                        let (first, end) = self.keys.range();
                        watch = client.watch(&first, &end, self.view.revision().saturating_add(1)).await?;
                        self.keep_own(&mut client).await?;
                    }
                },
                () = sleep_until(self.next_snapshot.into()), if self.is_stale => self.publish(),
                _ = renewal.tick() => self.keep_own(&mut client).await?,
                () = shared.leases_wanted.notified() => self.look_at_leases(&client),
                _ = housekeeping.tick() => {
                    self.is_stale |= self.view.release(Instant::now());
                    if self.is_cache_stale && cache_written.elapsed() >= CACHE_INTERVAL {
                        self.write_cache();
                        cache_written = Instant::now();
                    }
                }
            }
        }
    }

    /// Takes in what a watch reports, pairs and whether they were deleted, up to a revision.
    /// Returns whether this host's own key is not as it should be.
    fn take(&mut self, changes: Vec<(Pair, bool)>, revision: i64) -> bool {
        let mut is_own = false;
        let mut is_config = false;
        self.status.events += changes.len() as u64;
        for (pair, is_deleted) in changes {
            let key = self.keys.parse(&pair.key);
            is_config |= key == Key::Config;
            if let (Key::Subnet(subnet), Some(own)) = (key, self.own)
                && subnet == own.subnet
            {
                is_own |= is_deleted || pair.lease != own.lease;
            }
            match is_deleted {
                true => self.view.delete(&pair.key, pair.mod_revision),
                false => drop(self.view.put(pair)),
            }
            (self.is_stale, self.is_cache_stale) = (true, true);
        }
        self.view.note_revision(revision);
        if is_config {
            // With a policy, which a watch comes after, it does not fail.
            let _ = self.follow_config();
        }
        is_own
    }

    /// Makes a snapshot of what is known and hands it over.
    fn publish(&mut self) {
        let (Some(policy), Some(own)) = (&self.policy, self.own) else {
            return;
        };
        let started = Instant::now();
        let snapshot = self.view.snapshot(policy, &self.snapshot);
        let is_new = snapshot.peers != self.snapshot.peers;
        self.snapshot = Arc::new(snapshot);
        self.shared.snapshot.store(Arc::clone(&self.snapshot));
        let joined = (!self.has_joined).then(|| Joined {
            network: policy.network.clone(),
            subnet: own.subnet,
            private_key: self.private_key.clone(),
        });
        self.show_status();
        if let Some(joined) = joined {
            self.has_joined = true;
            let _ = self.shared.joined.try_send(joined);
        }
        if is_new {
            let _ = self.shared.changed.try_send(());
        }
        let refused = self.snapshot.unused.prefixes_refused;
        if refused > 0 && !std::mem::replace(&mut self.has_told_of_prefixes, true) {
            tracing::warn!(
                count = refused,
                "registry: {refused} prefixes that hosts publish are not used: they are in no \
                 --registry-allow-prefix, or cover an address of a host's or of etcd's"
            );
        }
        self.is_stale = false;
        let apply = Duration::from_micros(self.shared.apply_us.load(Relaxed));
        let rest = SNAPSHOT_COST_FACTOR * (started.elapsed() + apply);
        self.next_snapshot = started + rest.clamp(SNAPSHOT_INTERVAL, PAUSE_MAX);
    }

    fn show_status(&mut self) {
        self.status.cluster = self.view.cluster();
        self.status.revision = self.view.revision();
        self.status.hosts = self.view.hosts().count();
        self.status.held = self.view.held();
        self.status.unused = self.snapshot.unused;
        self.shared.status.store(Arc::new(self.status.clone()));
    }

    fn write_cache(&mut self) {
        if !std::mem::take(&mut self.is_cache_stale) {
            return;
        }
        let subnet = self.own.map(|own| own.subnet);
        let options = &self.options;
        let written = cache::write(&options.cache, &options.prefix, &self.view, subnet);
        if let Err(error) = written {
            tracing::warn!(%error, "registry: {error}");
        }
    }
}

/// Half of a pause, and a random part of the rest.
fn with_jitter(pause: Duration) -> Duration {
    let mut byte = [128];
    // Without randomness it is three quarters.
    let _ = getrandom::fill(&mut byte);
    pause / 2 + pause * u32::from(byte[0]) / 512
}

#[cfg(test)]
mod tests;
