//! Somebody captures packets: a thread takes the copies that workers make of them
//! ([`crate::capture`]) and sends them to whoever asked, over the connection that they asked by.
//!
//! Nobody waits for a client that does not read: the thread does, the rings fill, and the
//! workers count what finds no room. The capture ends when the client has closed its
//! connection, however that came.

use std::collections::{BTreeMap, VecDeque};
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::capture::{Ring, frame};
use crate::control::codec::{Lines, to_line};
use crate::control::credentials::Asker;
use crate::control::protocol::{
    Answer, CaptureStatus, Capturing, Line, SNAPLEN_BYTES_MAX, SNAPLEN_BYTES_MIN,
};
use crate::counters::Counters;
use crate::error::{Error, Result};
use crate::packet::batch::NextHop;
use crate::routing::overlay::Overlay;

/// Bytes of each worker's ring. Many workers share [`RINGS_BYTES_MAX`].
const RING_BYTES_MAX: usize = 4 << 20;
const RING_BYTES_MIN: usize = 256 << 10;
const RINGS_BYTES_MAX: usize = 64 << 20;

/// How long the thread sleeps when there is little to do: a ring holds what comes meanwhile.
const PAUSE: Duration = Duration::from_millis(2);

/// Bytes that are sent at a time.
const CHUNK_BYTES: usize = 256 << 10;

/// While the client does not read, how often the thread looks whether the capture ends.
const SEND_PAUSE: Duration = Duration::from_millis(50);

/// How long the thread goes on sending what there is when the tunnel ends, which waits for it.
const END_TIME_MAX: Duration = Duration::from_millis(300);

/// How long it does when the client has ended the capture, unless the tunnel ends.
const CLIENT_TIME_MAX: Duration = Duration::from_secs(30);

/// Generations whose names are kept. Packets that have waited for longer, for a client that does
/// not read, have no peer any more, and never the wrong one.
const GENERATIONS_MAX: usize = 16;

/// The peers' names by their numbers.
type Names = BTreeMap<NextHop, String>;

/// A capture. Dropped, it ends, and all of it is gone.
pub struct Capture {
    asker: Asker,
    begun: Instant,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// What the control thread and the capture's thread share.
#[derive(Default)]
struct Shared {
    /// Why the capture is to end, if it is.
    end: Mutex<Option<&'static str>>,
    /// The peers' names, by the generation of the tables that number them so; the newest last.
    names: Mutex<VecDeque<(u16, Arc<Names>)>>,
    packets: AtomicU64,
    lost: AtomicU64,
}

/// What is captured.
pub struct Source<'a> {
    /// Name of the TUN device.
    pub tun: &'a str,
    /// The workers' taps.
    pub counters: &'a [Arc<Counters>],
    /// The peers.
    pub overlay: &'a Overlay,
    /// Who captures already.
    pub other: Option<&'a Capture>,
    /// Another process takes the tunnel over.
    pub is_leaving: bool,
}

/// Begins a capture; `None` if the client was told why not.
pub fn begin(
    source: &Source<'_>,
    mut connection: Lines,
    asker: Asker,
    snaplen_bytes: u32,
) -> Option<Capture> {
    let begun = match source.other {
        _ if source.is_leaving => {
            Err(Error::new("another process is taking over").hint("try again"))
        }
        Some(other) => {
            let what = format!(
                "{} captures already, and only one can at a time",
                other.asker
            );
            Err(Error::new(what))
        }
        None => Capture::new(source, &connection, asker, snaplen_bytes),
    };
    match begun {
        Ok(capture) => {
            tracing::info!(
                by = %asker,
                snaplen_bytes,
                "captures packets, {snaplen_bytes} bytes of each: {asker}"
            );
            Some(capture)
        }
        Err(error) => {
            // A line fits a fresh connection's buffer.
            if let Ok(line) = to_line(&Line::from(Err(error))) {
                let _ = connection.send(line, Instant::now());
            }
            None
        }
    }
}

impl Capture {
    fn new(
        source: &Source<'_>,
        connection: &Lines,
        asker: Asker,
        snaplen_bytes: u32,
    ) -> Result<Self> {
        if !(SNAPLEN_BYTES_MIN..=SNAPLEN_BYTES_MAX).contains(&snaplen_bytes) {
            let what = format!("snaplen_bytes is {SNAPLEN_BYTES_MIN} to {SNAPLEN_BYTES_MAX}");
            return Err(Error::new(what));
        }
        let cannot = |error| Error::os("cannot capture", error);
        let counters = source.counters.to_vec();
        // Workers are counted in 16 bits, as queues are.
        let answer = Answer::Capturing(Capturing {
            version: env!("CARGO_PKG_VERSION").into(),
            tun: source.tun.into(),
            workers: counters.len() as u16,
            snaplen_bytes,
        });
        let mut out = to_line(&Line::from(Ok(answer))).map_err(cannot)?.to_vec();
        out.push(b'\n');
        let stream = connection.stream().try_clone().map_err(cannot)?;
        stream.set_write_timeout(Some(SEND_PAUSE)).map_err(cannot)?;
        let shared = Arc::<Shared>::default();
        let mut capture = Self {
            asker,
            begun: Instant::now(),
            shared: Arc::clone(&shared),
            thread: None,
        };
        capture.set_peers(source.overlay);
        let mut told = Told {
            generation: source.overlay.generation,
            lost: 0,
        };
        told.tell_names(source.overlay.generation, &shared, &mut out);
        let sender = Sender {
            taps: Taps::attach(counters, snaplen_bytes as usize),
            stream,
            shared,
            out,
            sent: 0,
            told,
        };
        let thread = std::thread::Builder::new().name("capture".into());
        let thread = thread.spawn(move || sender.run(asker));
        capture.thread = Some(thread.map_err(cannot)?);
        Ok(capture)
    }

    /// Who captures, and what came of it so far.
    pub fn status(&self) -> CaptureStatus {
        CaptureStatus {
            pid: self.asker.pid,
            uid: self.asker.uid,
            seconds: self.begun.elapsed().as_secs(),
            packets: self.shared.packets.load(Ordering::Relaxed),
            lost: self.shared.lost.load(Ordering::Relaxed),
        }
    }

    /// Has the client told which peers there are, before the packets that workers note by a
    /// table of this overlay. Called before they have one.
    pub fn set_peers(&self, overlay: &Overlay) {
        let peers = overlay.peers().map(|(next_hop, peer)| {
            let identity = peer.secure.as_ref().and_then(|it| it.identity.clone());
            (next_hop, identity.unwrap_or_else(|| peer.name.to_string()))
        });
        let names = Arc::new(peers.collect());
        let mut all = lock(&self.shared.names);
        all.retain(|(generation, _)| *generation != overlay.generation);
        all.push_back((overlay.generation, names));
        if all.len() > GENERATIONS_MAX {
            all.pop_front();
        }
    }

    /// Whether it has ended.
    pub fn is_over(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Has it end, and the client told why. Does not wait for it.
    pub fn end(&self, why: &'static str) {
        lock(&self.shared.end).get_or_insert(why);
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        self.end("it was told to");
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the capture's thread panicked");
        }
    }
}

/// What workers note packets in. Dropped, they note nothing any more, and the rings are gone.
struct Taps(Vec<(Arc<Counters>, Arc<Ring>)>);

impl Taps {
    fn attach(counters: Vec<Arc<Counters>>, snaplen_bytes: usize) -> Self {
        let share = RINGS_BYTES_MAX / counters.len().max(1);
        let ring_bytes = share.clamp(RING_BYTES_MIN, RING_BYTES_MAX);
        let taps = counters.into_iter().map(|counters| {
            let ring = Arc::new(Ring::new(ring_bytes, snaplen_bytes));
            counters.tap.attach(Arc::clone(&ring));
            (counters, ring)
        });
        Self(taps.collect())
    }

    fn rings(&self) -> impl Iterator<Item = (u16, &Ring)> {
        (0..).zip(self.0.iter().map(|(_, ring)| &**ring))
    }

    /// Has workers note nothing more.
    fn turn_off(&self) {
        self.0
            .iter()
            .for_each(|(counters, _)| counters.tap.turn_off());
    }
}

impl Drop for Taps {
    fn drop(&mut self) {
        for (counters, ring) in self.0.drain(..) {
            counters.tap.detach(ring);
        }
    }
}

/// Why the thread ends.
enum End {
    /// The client has closed its side: it may still read.
    Client,
    /// It is gone.
    Gone,
    /// The control thread wants it.
    Told(&'static str),
}

/// The capture's thread.
struct Sender {
    taps: Taps,
    stream: UnixStream,
    shared: Arc<Shared>,
    /// What is to be sent; so much of it is sent.
    out: Vec<u8>,
    sent: usize,
    told: Told,
}

/// What the client knows.
struct Told {
    /// Of the names.
    generation: u16,
    /// How many packets are lost.
    lost: u64,
}

impl Told {
    /// Tells it the peers' names in a generation.
    fn tell_names(&mut self, generation: u16, shared: &Shared, frames: &mut Vec<u8>) {
        let all = lock(&shared.names);
        let names = all.iter().find(|(other, _)| *other == generation);
        let names = names.map(|(_, names)| Arc::clone(names));
        drop(all);
        // Keys that are numbers and values that are texts can be written.
        let json = serde_json::to_vec(&*names.unwrap_or_default()).unwrap_or_default();
        frame::write(frame::PEERS, 0, &json, frames);
        self.generation = generation;
    }
}

impl Sender {
    fn run(mut self, asker: Asker) {
        let end = self.carry();
        let why = match end {
            End::Client | End::Gone => frame::END_BY_CLIENT,
            End::Told(why) => why,
        };
        match end {
            End::Client => self.finish(why, CLIENT_TIME_MAX),
            End::Told(_) => self.finish(why, END_TIME_MAX),
            End::Gone => {}
        }
        let shared = Arc::clone(&self.shared);
        // Before it is said.
        drop(self);
        let [packets, lost] = [&shared.packets, &shared.lost].map(|it| it.load(Ordering::Relaxed));
        tracing::info!(
            by = %asker, why, packets, lost,
            "the capture has ended: {why}; {packets} packets, {lost} lost, by {asker}"
        );
    }

    /// Sends packets until the end.
    fn carry(&mut self) -> End {
        loop {
            self.fill();
            let is_little = self.out.len() < CHUNK_BYTES / 2;
            loop {
                if let Some(why) = *lock(&self.shared.end) {
                    return End::Told(why);
                }
                if self.has_client_ended() {
                    return End::Client;
                }
                match self.send() {
                    Ok(true) => break,
                    Ok(false) => _ = self.count(),
                    Err(_) => return End::Gone,
                }
            }
            if is_little {
                let fd = PollFd::new(self.stream.as_fd(), PollFlags::POLLIN);
                let pause = PollTimeout::try_from(PAUSE).unwrap_or(PollTimeout::ZERO);
                // If it fails, it is seen when the client is asked.
                let _ = poll(&mut [fd], pause);
            }
        }
    }

    /// Sends what is left, as far as there is time, and says why it is all.
    fn finish(&mut self, why: &str, time_max: Duration) {
        self.taps.turn_off();
        let mut deadline = Instant::now() + time_max;
        let mut is_said = false;
        loop {
            if lock(&self.shared.end).is_some() {
                deadline = deadline.min(Instant::now() + END_TIME_MAX);
            }
            match self.send() {
                Ok(true) if is_said => return,
                Ok(true) => {}
                Ok(false) if Instant::now() < deadline => continue,
                _ => return,
            }
            self.fill();
            if self.out.is_empty() || Instant::now() > deadline {
                frame::write(frame::END, 0, why.as_bytes(), &mut self.out);
                is_said = true;
            }
        }
    }

    /// Makes frames of what is new, when all has been sent.
    fn fill(&mut self) {
        let before = self.out.len();
        self.take();
        let lost = self.count();
        if self.out.len() > before || lost != std::mem::replace(&mut self.told.lost, lost) {
            for (worker, ring) in self.taps.rings() {
                frame::write_counts(worker, ring.counts(), &mut self.out);
            }
        }
    }

    /// Takes packets out of the rings, up to about [`CHUNK_BYTES`], by time. Where some workers
    /// have a new table already and some do not, all packets of a generation come together.
    fn take(&mut self) {
        let Self { taps, told, .. } = self;
        let mut all: Vec<_> = taps
            .rings()
            .map(|(worker, ring)| (worker, ring.unread()))
            .collect();
        while self.out.len() < CHUNK_BYTES {
            let next = all.iter_mut().filter_map(|(worker, unread)| {
                let (timestamp_ns, generation) = unread.peek()?;
                Some((generation, timestamp_ns, *worker, unread))
            });
            let first = next.min_by_key(|(generation, timestamp_ns, ..)| {
                (*generation != told.generation, *timestamp_ns)
            });
            let Some((generation, _, worker, unread)) = first else {
                break;
            };
            if generation != told.generation {
                told.tell_names(generation, &self.shared, &mut self.out);
            }
            unread.take(worker, &mut self.out);
        }
    }

    /// Brings what the control thread sees up to date, and returns how many packets are lost.
    fn count(&self) -> u64 {
        let counts = self.taps.rings().map(|(_, ring)| ring.counts());
        let sum = |(all, all_lost): (u64, u64), (noted, lost)| (all + noted, all_lost + lost);
        let (packets, lost) = counts.fold((0, 0), sum);
        self.shared.packets.store(packets, Ordering::Relaxed);
        self.shared.lost.store(lost, Ordering::Relaxed);
        lost
    }

    /// Sends of what there is as much as the client takes now; `true` if that is all.
    ///
    /// # Errors
    /// When there is no client any more.
    fn send(&mut self) -> io::Result<bool> {
        let rest = self.out.get(self.sent..).unwrap_or_default();
        if !rest.is_empty() {
            match (&self.stream).write(rest) {
                Ok(bytes) => self.sent += bytes,
                Err(error) => match error.kind() {
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => {}
                    _ => return Err(error),
                },
            }
        }
        let is_all = self.sent >= self.out.len();
        if is_all {
            self.sent = 0;
            self.out.clear();
        }
        Ok(is_all)
    }

    /// Whether the client has closed its connection, or its sending side. It has nothing to say.
    fn has_client_ended(&self) -> bool {
        let mut fds = [PollFd::new(self.stream.as_fd(), PollFlags::POLLIN)];
        if !matches!(poll(&mut fds, PollTimeout::ZERO), Ok(1..)) {
            return false;
        }
        matches!((&self.stream).read(&mut [0; 512]), Ok(0) | Err(_))
    }
}

fn lock<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
#[path = "capture_tests.rs"]
mod tests;
