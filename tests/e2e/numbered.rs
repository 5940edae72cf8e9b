//! Numbered datagrams at an even, moderate rate, and a record of where each of
//! them arrived. Nothing on their way is ever short of room, so any loss is a
//! fault; see also [`crate::support::without_backlog_drops`].

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use fastvpn::error::{Error, Result};

use crate::support::{PATIENCE, check, enlarge_receive_buffer, fail, tried};

/// Between a datagram of each stream and the next.
const INTERVAL: Duration = Duration::from_millis(2);

/// How often a sink looks whether it is over.
const SINK_TIMEOUT: Duration = Duration::from_millis(50);

/// Bytes of the sinks' receive buffers, where we may have them.
const SINK_BYTES: usize = 4 << 20;

/// Bytes of a datagram, of which the first 16 say whose it is.
const DATAGRAM_BYTES: usize = 200;

/// Most datagrams of a stream: minutes at this rate.
const DATAGRAMS_MAX: u64 = 200_000;

/// A stream to be sent.
pub struct Stream {
    /// What it is called if it goes wrong.
    pub name: String,
    /// Where it is sent from. Several may share one.
    pub socket: UdpSocket,
    /// Where its datagrams go, in turn.
    pub to: Vec<SocketAddr>,
}

/// Where datagrams may arrive.
pub struct Sink {
    /// The number of its site.
    pub site: u8,
    /// The socket.
    pub socket: UdpSocket,
}

/// Where one stream's datagrams have arrived.
#[derive(Default)]
struct Arrivals {
    /// Site by number of datagram.
    sites: Vec<Option<u8>>,
    /// All datagrams before this one have arrived.
    complete: usize,
}

/// What all sinks have seen.
#[derive(Default)]
struct Record {
    streams: Vec<Arrivals>,
    /// The first thing that was wrong.
    fault: Option<String>,
}

impl Record {
    fn note(&mut self, site: u8, datagram: &[u8]) {
        let word = |at: usize| -> Option<u64> {
            Some(u64::from_le_bytes(
                datagram.get(at..at + 8)?.try_into().ok()?,
            ))
        };
        let (Some(stream), Some(number)) = (word(0), word(8)) else {
            self.blame(format!(
                "a datagram of {} bytes at site {site}",
                datagram.len()
            ));
            return;
        };
        let known = self.streams.get_mut(stream as usize);
        let Some(arrivals) = known.filter(|_| number < DATAGRAMS_MAX) else {
            self.blame(format!("datagram {number} of stream {stream}"));
            return;
        };
        if datagram != datagram_of(stream, number) {
            self.blame(format!("datagram {number} of stream {stream} was changed"));
            return;
        }
        let number = number as usize;
        if arrivals.sites.len() <= number {
            arrivals.sites.resize(number + 1, None);
        }
        if let Some(first) = arrivals.sites[number].replace(site) {
            self.blame(format!(
                "datagram {number} of stream {stream} arrived at site {first} and again at {site}"
            ));
            return;
        }
        while arrivals
            .sites
            .get(arrivals.complete)
            .is_some_and(Option::is_some)
        {
            arrivals.complete += 1;
        }
    }

    fn blame(&mut self, fault: String) {
        self.fault.get_or_insert(fault);
    }
}

fn datagram_of(stream: u64, number: u64) -> [u8; DATAGRAM_BYTES] {
    let mut bytes = [(number as u8).wrapping_mul(31) ^ stream as u8; DATAGRAM_BYTES];
    bytes[..8].copy_from_slice(&stream.to_le_bytes());
    bytes[8..16].copy_from_slice(&number.to_le_bytes());
    bytes
}

/// Streams that flow until they are finished.
pub struct Streams {
    names: Vec<String>,
    sent: Arc<Vec<AtomicU64>>,
    record: Arc<Mutex<Record>>,
    go_on: Arc<AtomicBool>,
    listen_on: Arc<AtomicBool>,
    sender: Option<JoinHandle<()>>,
    sinks: Vec<JoinHandle<io::Result<()>>>,
}

/// How many datagrams of each stream have been sent, at some time.
pub type Marks = Vec<u64>;

impl Streams {
    /// Starts to send.
    ///
    /// # Errors
    /// When a socket cannot be set up.
    pub fn start(streams: Vec<Stream>, sinks: Vec<Sink>) -> Result<Self> {
        let names = streams.iter().map(|stream| stream.name.clone()).collect();
        let sent: Arc<Vec<AtomicU64>> =
            Arc::new(streams.iter().map(|_| AtomicU64::new(0)).collect());
        let record = Record {
            streams: streams.iter().map(|_| Arrivals::default()).collect(),
            fault: None,
        };
        let record = Arc::new(Mutex::new(record));
        let go_on = Arc::new(AtomicBool::new(true));
        let listen_on = Arc::new(AtomicBool::new(true));
        let sinks = sinks
            .into_iter()
            .map(|sink| {
                enlarge_receive_buffer(&sink.socket, SINK_BYTES);
                let timeout = sink.socket.set_read_timeout(Some(SINK_TIMEOUT));
                tried("set a timeout", timeout)?;
                let (record, listen_on) = (Arc::clone(&record), Arc::clone(&listen_on));
                Ok(std::thread::spawn(move || {
                    listen(&sink, &record, &listen_on)
                }))
            })
            .collect::<Result<_>>()?;
        let (sending, going_on) = (Arc::clone(&sent), Arc::clone(&go_on));
        let blaming = Arc::clone(&record);
        let sender = std::thread::spawn(move || {
            if let Err(error) = send(&streams, &sending, &going_on) {
                lock(&blaming).blame(error.to_string());
            }
        });
        Ok(Self {
            names,
            sent,
            record,
            go_on,
            listen_on,
            sender: Some(sender),
            sinks,
        })
    }

    /// How many of each have been sent. The next one may be on its way as well.
    pub fn marks(&self) -> Marks {
        let sent = self.sent.iter();
        sent.map(|sent| sent.load(Ordering::SeqCst)).collect()
    }

    /// Waits until `count` more of each stream have been sent, and all of those
    /// have arrived; returns how many that are.
    pub fn wait_for_more(&self, count: u64) -> Result<Marks> {
        let wanted: Marks = self.marks().iter().map(|sent| sent + count).collect();
        let deadline = Instant::now() + PATIENCE;
        while self
            .marks()
            .iter()
            .zip(&wanted)
            .any(|(sent, want)| sent < want)
        {
            self.is_well()?;
            check(Instant::now() < deadline, || "sending stands still".into())?;
            std::thread::sleep(INTERVAL);
        }
        self.wait_until_arrived(&self.marks())
    }

    fn wait_until_arrived(&self, marks: &Marks) -> Result<Marks> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            self.is_well()?;
            let missing = self.missing(marks);
            if missing.is_empty() {
                return Ok(marks.clone());
            }
            check(Instant::now() < deadline, || {
                format!("never arrived: {}", missing.join("; "))
            })?;
            std::thread::sleep(INTERVAL);
        }
    }

    /// Which datagrams below the marks have not arrived, in words.
    fn missing(&self, marks: &Marks) -> Vec<String> {
        let record = self.record();
        let streams = record.streams.iter().zip(marks).zip(&self.names);
        let missing = streams.filter(|((arrivals, mark), _)| (arrivals.complete as u64) < **mark);
        missing
            .map(|((arrivals, mark), name)| {
                let has_arrived =
                    |number: &u64| matches!(arrivals.sites.get(*number as usize), Some(Some(_)));
                let lost: Vec<_> = (0..*mark).filter(|number| !has_arrived(number)).collect();
                format!("{name}: {} of {mark}, the first {}", lost.len(), lost[0])
            })
            .collect()
    }

    fn is_well(&self) -> Result<()> {
        match &self.record().fault {
            Some(fault) => fail(fault.clone()),
            None => Ok(()),
        }
    }

    fn record(&self) -> MutexGuard<'_, Record> {
        lock(&self.record)
    }

    /// Checks where a stream's datagrams with these numbers arrived, each of
    /// which must have arrived somewhere.
    pub fn check_places(
        &self,
        stream: usize,
        numbers: std::ops::Range<u64>,
        allowed: &[u8],
    ) -> Result<()> {
        let record = self.record();
        let name = &self.names[stream];
        for number in numbers {
            let arrivals = &record.streams[stream].sites;
            match arrivals.get(number as usize).copied().flatten() {
                Some(site) if allowed.contains(&site) => {}
                Some(site) => {
                    return fail(format!(
                        "{name}: datagram {number} arrived at site {site}, not at {allowed:?}"
                    ));
                }
                None => return fail(format!("{name}: datagram {number} was lost")),
            }
        }
        Ok(())
    }

    /// Ends sending, and waits until all has arrived; returns how many of each
    /// there were.
    ///
    /// # Errors
    /// When one is lost, or arrived twice or changed.
    pub fn finish(&mut self) -> Result<Marks> {
        self.go_on.store(false, Ordering::SeqCst);
        if let Some(sender) = self.sender.take() {
            let panicked = |_| Error::new("the sender panicked");
            sender.join().map_err(panicked)?;
        }
        let marks = self.wait_until_arrived(&self.marks())?;
        // What comes twice comes late.
        std::thread::sleep(SINK_TIMEOUT);
        self.listen_on.store(false, Ordering::SeqCst);
        for sink in self.sinks.drain(..) {
            let heard = sink.join().map_err(|_| Error::new("a sink panicked"))?;
            tried("receive", heard)?;
        }
        self.is_well()?;
        Ok(marks)
    }
}

fn lock(record: &Mutex<Record>) -> MutexGuard<'_, Record> {
    record.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Drop for Streams {
    fn drop(&mut self) {
        self.go_on.store(false, Ordering::SeqCst);
        self.listen_on.store(false, Ordering::SeqCst);
        if let Some(sender) = self.sender.take() {
            let _ = sender.join();
        }
        for sink in self.sinks.drain(..) {
            let _ = sink.join();
        }
    }
}

fn send(streams: &[Stream], sent: &[AtomicU64], go_on: &AtomicBool) -> io::Result<()> {
    for number in 0..DATAGRAMS_MAX {
        if !go_on.load(Ordering::SeqCst) {
            return Ok(());
        }
        for (place, (stream, sent)) in streams.iter().zip(sent).enumerate() {
            let to = stream.to[number as usize % stream.to.len()];
            let datagram = datagram_of(place as u64, number);
            stream.socket.send_to(&datagram, to).map_err(|cause| {
                let what = format!("cannot send {} to {to}: {cause}", stream.name);
                io::Error::new(cause.kind(), what)
            })?;
            sent.store(number + 1, Ordering::SeqCst);
        }
        std::thread::sleep(INTERVAL);
    }
    Err(io::Error::other("too many datagrams for one test"))
}

fn listen(sink: &Sink, record: &Mutex<Record>, listen_on: &AtomicBool) -> io::Result<()> {
    let mut buffer = [0; DATAGRAM_BYTES + 1];
    while listen_on.load(Ordering::SeqCst) {
        match sink.socket.recv(&mut buffer) {
            Ok(length) => {
                lock(record).note(sink.site, &buffer[..length]);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
