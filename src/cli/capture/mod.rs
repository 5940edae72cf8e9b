//! `fastvpn capture`: packets of a running tunnel, into a file or onto the terminal.

mod filter;
mod pcapng;
mod view;

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions, Permissions};
use std::io::{self, BufRead, BufReader, BufWriter, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use self::filter::Filter;
use self::pcapng::{Packet, Section, Statistics, Writer};
use self::view::View;
use crate::capture::Direction;
use crate::capture::frame::{self, BODY_BYTES_MAX, HEADER_BYTES, Header};
use crate::config::{TUN_NAME_DEFAULT, default_control_path, parse_tun_name};
use crate::control::client::{Verdict, connect_trusted, parse, refused};
use crate::control::protocol::{Capturing, Request, SNAPLEN_BYTES_MAX, SNAPLEN_BYTES_MIN};
use crate::control::text::printable;
use crate::error::{Error, Result};

/// How long a tunnel may take to answer.
const PATIENCE: Duration = Duration::from_secs(30);

/// Longest answer.
const ANSWER_BYTES_MAX: u64 = 64 << 10;

/// Bytes that are read and written at a time.
const CHUNK_BYTES: usize = 256 << 10;

/// `fastvpn capture …`.
#[derive(Clone, Debug, Args)]
pub struct CaptureOptions {
    /// Name of the tunnel's TUN device [default: fastvpn0]
    #[arg(value_name = "NAME", value_parser = parse_tun_name)]
    name: Option<String>,

    /// The same
    #[arg(long, value_name = "NAME", value_parser = parse_tun_name, conflicts_with = "name")]
    tun: Option<String>,

    /// Path of the tunnel's control socket [default: /run/fastvpn/, named after the TUN]
    #[arg(long, value_name = "PATH")]
    control: Option<PathBuf>,

    /// Write a file that Wireshark and tshark read (pcapng), `-` for standard output; without,
    /// print a line for each packet
    #[arg(short = 'w', long, value_name = "FILE")]
    write: Option<PathBuf>,

    /// Only packets to and from this peer, named as `fastvpn peers` does; its port may be left out
    #[arg(long, value_name = "PEER")]
    peer: Option<String>,

    /// Only these packets, as in 'tcp port 443 and not host 10.1.0.1' (docs/capture.md)
    #[arg(long, value_name = "FILTER", value_parser = FilterText::parse)]
    filter: Option<FilterText>,

    /// End after so many packets
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    count: Option<u64>,

    /// Keep at most so many bytes of each packet, 128 to 65535
    #[arg(long, value_name = "BYTES", default_value_t = 256, value_parser = clap::value_parser!(
        u32).range(i64::from(SNAPLEN_BYTES_MIN)..=i64::from(SNAPLEN_BYTES_MAX)))]
    snaplen: u32,
}

/// A filter, and how it was written.
#[derive(Clone, Debug)]
struct FilterText {
    text: String,
    filter: Filter,
}

impl FilterText {
    fn parse(text: &str) -> std::result::Result<Self, String> {
        let (text, filter) = (text.to_string(), filter::parse(text)?);
        Ok(Self { text, filter })
    }
}

/// Captures until it is told to end.
///
/// # Errors
/// When no tunnel answers, or it refuses; when it ends before the capture does; when what was
/// captured cannot be written. Not when standard output is closed.
pub fn run(options: &CaptureOptions) -> Result<()> {
    let name = options.name.as_deref().or(options.tun.as_deref());
    let path = options
        .control
        .clone()
        .unwrap_or_else(|| default_control_path(name.unwrap_or(TUN_NAME_DEFAULT)));
    let (reader, capturing) = begin(&path, options.snaplen)?;
    let stream = reader.get_ref().try_clone();
    end_by_signal(stream.map_err(|error| Error::os("cannot capture", error))?)?;
    let mut capture = Capture {
        options,
        statistics: vec![Statistics::default(); capturing.workers.into()],
        told_lost: vec![0; capturing.workers.into()],
        peers: BTreeMap::new(),
        accepted: 0,
        comment: String::new(),
    };
    let ended = capture.run(reader, &capturing);
    if let Ok(_) | Err(Stop::Why(_)) = &ended {
        capture.sum_up();
    }
    match ended {
        Ok(()) | Err(Stop::NoReader) => Ok(()),
        Err(Stop::Why(error)) => Err(error),
    }
}

/// Asks for packets. They come behind the answer.
fn begin(path: &Path, snaplen_bytes: u32) -> Result<(BufReader<UnixStream>, Capturing)> {
    let stream = connect_trusted(path, PATIENCE).map_err(|error| refused(path, error))?;
    let mut reader = BufReader::with_capacity(CHUNK_BYTES, stream);
    let mut line = String::new();
    let exchanged = serde_json::to_string(&Request::Capture { snaplen_bytes })
        .map_err(io::Error::from)
        .and_then(|request| {
            reader.get_ref().set_read_timeout(Some(PATIENCE))?;
            reader.get_mut().write_all((request + "\n").as_bytes())?;
            (&mut reader).take(ANSWER_BYTES_MAX).read_line(&mut line)?;
            reader.get_ref().set_read_timeout(None)
        });
    exchanged.map_err(|error| {
        let what = format!("no answer from the fastvpn at {}", path.display());
        Error::os(what, error).hint("its log may say more")
    })?;
    parse::<Verdict>(&line, path)?.check()?;
    let capturing = parse(&line, path)?;
    Ok((reader, capturing))
}

/// By SIGINT or SIGTERM the tunnel is told that no more is wanted: what it has still comes.
/// Another one ends this process.
fn end_by_signal(stream: UnixStream) -> Result<()> {
    let cannot = |error| Error::os("cannot watch signals", error);
    let mut signals = Signals::new([SIGINT, SIGTERM]).map_err(cannot)?;
    let wait = move || {
        let mut signals = signals.forever();
        signals.next();
        let _ = stream.shutdown(Shutdown::Write);
        if let Some(signal) = signals.next() {
            std::process::exit(128 + signal);
        }
    };
    let thread = std::thread::Builder::new().name("signals".into());
    thread.spawn(wait).map_err(cannot)?;
    Ok(())
}

/// Why no more comes of a capture.
enum Stop {
    /// Who reads standard output has seen enough.
    NoReader,
    /// It failed.
    Why(Error),
}

impl From<Error> for Stop {
    fn from(error: Error) -> Self {
        Self::Why(error)
    }
}

/// A file that was there before may be readable by others.
fn for_its_owner(file: File) -> io::Result<File> {
    if file.metadata()?.is_file() {
        file.set_permissions(Permissions::from_mode(0o600))?;
    }
    Ok(file)
}

/// What packets are written to.
enum Output {
    File(Writer<BufWriter<File>>),
    Lines(BufWriter<io::Stdout>),
}

/// A capture under way.
struct Capture<'a> {
    options: &'a CaptureOptions,
    /// By worker.
    statistics: Vec<Statistics>,
    /// By worker: what the file says is lost so far.
    told_lost: Vec<u64>,
    /// Names by number.
    peers: BTreeMap<u16, String>,
    /// Packets that were wanted.
    accepted: u64,
    /// What is said of the packet at hand.
    comment: String,
}

impl Capture<'_> {
    fn run(
        &mut self,
        mut reader: BufReader<UnixStream>,
        capturing: &Capturing,
    ) -> std::result::Result<(), Stop> {
        // What may have been there is overwritten only now that nothing refuses.
        self.find_peer(&mut reader)?;
        let mut output = self.open(capturing)?;
        let ended = self.copy(&mut reader, &mut output);
        if !matches!(ended, Err(Stop::NoReader)) {
            let finished = self.finish(&mut output);
            finished.map_err(|error| self.cannot_write(error))?;
        }
        ended
    }

    /// Takes in the peers' names, which come first. The one that is wanted must be among them.
    fn find_peer(&mut self, reader: &mut impl Read) -> std::result::Result<(), Stop> {
        let mut body = Vec::new();
        loop {
            match next_frame(reader, &mut body)?.kind {
                frame::PEERS => break,
                frame::END => self.ended(&String::from_utf8_lossy(&body))?,
                _ => {}
            }
        }
        self.take_peers(&body);
        let wanted = self.options.peer.as_deref();
        match wanted.filter(|wanted| !self.peers.values().any(|name| is_named(name, wanted))) {
            None => Ok(()),
            Some(unknown) => {
                let what = format!("there is no peer {}", printable(unknown));
                let error = Error::new(what).hint("`fastvpn peers` shows them");
                Err(error.into())
            }
        }
    }

    fn open(&self, capturing: &Capturing) -> std::result::Result<Output, Stop> {
        let Some(path) = &self.options.write else {
            return Ok(Output::Lines(BufWriter::new(io::stdout())));
        };
        let opened = match path.as_os_str() == "-" {
            // Not by way of io::Stdout, which looks for lines.
            true => io::stdout().as_fd().try_clone_to_owned().map(File::from),
            // Not for everybody's eyes.
            false => OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o600)
                .open(path)
                .and_then(for_its_owner),
        };
        let out = opened.map_err(|error| self.cannot_write(error))?;
        let section = Section {
            version: &capturing.version,
            tun: &capturing.tun,
            workers: capturing.workers,
            snaplen_bytes: capturing.snaplen_bytes,
            filter: self.options.filter.as_ref().map(|it| &*it.text),
        };
        let writer = Writer::new(BufWriter::with_capacity(CHUNK_BYTES, out), &section);
        let writer = writer.map_err(|error| self.cannot_write(error))?;
        Ok(Output::File(writer))
    }

    /// Copies what comes to where it is wanted, until the end.
    fn copy(
        &mut self,
        reader: &mut BufReader<UnixStream>,
        output: &mut Output,
    ) -> std::result::Result<(), Stop> {
        let mut body = Vec::new();
        while self.options.count.is_none_or(|count| self.accepted < count) {
            if reader.buffer().is_empty() {
                let flushed = output.flush();
                flushed.map_err(|error| self.cannot_write(error))?;
                wait_for_more(reader.get_ref(), output.as_fd())?;
            }
            let header = next_frame(reader, &mut body)?;
            match header.kind {
                frame::PACKET => self
                    .take_packet(&header, &body, output)
                    .map_err(|error| self.cannot_write(error))?,
                frame::COUNTS => self.take_counts(&header, &body),
                frame::PEERS => self.take_peers(&body),
                frame::END => return self.ended(&String::from_utf8_lossy(&body)),
                // Of a newer tunnel.
                _ => {}
            }
        }
        Ok(())
    }

    /// The tunnel sends no more.
    fn ended(&self, why: &str) -> std::result::Result<(), Stop> {
        // By a signal to this process.
        if why == frame::END_BY_CLIENT {
            return Ok(());
        }
        let what = format!("the capture has ended: {}", printable(why));
        Err(Error::new(what).into())
    }

    fn take_packet(&mut self, header: &Header, body: &[u8], output: &mut Output) -> io::Result<()> {
        let (Some(it), Some(direction)) = (
            self.statistics.get_mut(usize::from(header.worker)),
            header.direction(),
        ) else {
            return Ok(());
        };
        it.timestamp_ns = header.timestamp_ns;
        let peer = header.peer().and_then(|peer| self.peers.get(&peer));
        let peer = peer.map(String::as_str);
        let wanted = self.options.peer.as_deref();
        let is_peer = wanted.is_none_or(|wanted| peer.is_some_and(|peer| is_named(peer, wanted)));
        let filter = self.options.filter.as_ref();
        if !is_peer || filter.is_some_and(|it| !it.filter.wants(View::of(body).as_ref())) {
            return Ok(());
        }
        describe(header, peer, &mut self.comment);
        it.accepted += 1;
        self.accepted += 1;
        match output {
            Output::Lines(out) => {
                let line = line(header, direction, View::of(body).as_ref(), &self.comment);
                out.write_all(line.as_bytes())
            }
            Output::File(writer) => {
                let told_lost = &mut self.told_lost[usize::from(header.worker)];
                let lost = it.lost - std::mem::replace(told_lost, it.lost);
                writer.packet(&Packet {
                    worker: header.worker,
                    is_inbound: direction == Direction::In,
                    timestamp_ns: header.timestamp_ns,
                    packet_bytes: header.packet_bytes,
                    data: body,
                    lost,
                    comment: &self.comment,
                })
            }
        }
    }

    fn take_counts(&mut self, header: &Header, body: &[u8]) {
        let it = self.statistics.get_mut(usize::from(header.worker));
        if let (Some(it), Some((noted, lost))) = (it, frame::read_counts(body)) {
            (it.received, it.lost) = (noted.saturating_add(lost), lost.max(it.lost));
        }
    }

    /// Takes the peers' names in, as they are from now on.
    fn take_peers(&mut self, json: &[u8]) {
        let peers: BTreeMap<u16, String> = serde_json::from_slice(json).unwrap_or_default();
        let peers = peers.into_iter();
        self.peers = peers
            .map(|(number, name)| (number, printable(&name)))
            .collect();
    }

    /// Writes what is said at the end.
    fn finish(&mut self, output: &mut Output) -> io::Result<()> {
        if let Output::File(writer) = output {
            for (worker, statistics) in (0..).zip(&self.statistics) {
                writer.statistics(worker, statistics)?;
            }
        }
        output.flush()
    }

    /// Tells what came of the capture.
    fn sum_up(&self) {
        let sum = |of: fn(&Statistics) -> u64| self.statistics.iter().map(of).sum::<u64>();
        let lost = sum(|it| it.lost);
        // Not eprintln!, which panics when standard error is closed.
        let _ = writeln!(
            io::stderr(),
            "{} packets captured of {}, {lost} lost",
            self.accepted,
            // Those at the end may not be told any more.
            sum(|it| it.received).max(self.accepted + lost),
        );
    }

    fn cannot_write(&self, error: io::Error) -> Stop {
        if error.kind() == io::ErrorKind::BrokenPipe {
            return Stop::NoReader;
        }
        let what = match self.options.write.as_deref() {
            Some(path) if path.as_os_str() != "-" => format!("cannot write {}", path.display()),
            _ => "cannot write to standard output".into(),
        };
        Error::os(what, error).into()
    }
}

impl Output {
    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::File(writer) => writer.flush(),
            Self::Lines(out) => out.flush(),
        }
    }

    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::File(writer) => writer.get_ref().get_ref().as_fd(),
            Self::Lines(out) => out.get_ref().as_fd(),
        }
    }
}

/// Waits until more comes from the tunnel, or nobody reads any more what is written: that is
/// seen here, though no packet may be wanted for long.
fn wait_for_more(stream: &UnixStream, out: BorrowedFd<'_>) -> std::result::Result<(), Stop> {
    let mut fds = [
        PollFd::new(stream.as_fd(), PollFlags::POLLIN),
        PollFd::new(out, PollFlags::empty()),
    ];
    // If it fails, whoever reads or writes next sees why.
    let _ = poll(&mut fds, PollTimeout::NONE);
    // What is asked for in any case: that is, an error or the end.
    match fds[1].any() {
        Some(true) => Err(Stop::NoReader),
        _ => Ok(()),
    }
}

/// Reads a frame: its header, and its body into `body`.
fn next_frame(reader: &mut impl Read, body: &mut Vec<u8>) -> Result<Header> {
    let mut header = [0; HEADER_BYTES];
    let mut read = || -> io::Result<Header> {
        reader.read_exact(&mut header)?;
        let header = Header::read(&header);
        let body_bytes = header.body_bytes as usize;
        if body_bytes > BODY_BYTES_MAX {
            return Err(io::ErrorKind::InvalidData.into());
        }
        body.resize(body_bytes, 0);
        reader.read_exact(body)?;
        Ok(header)
    };
    read().map_err(|error| {
        let what = "the tunnel has gone, or what it sends cannot be read";
        Error::os(what, error).hint("its log may say more")
    })
}

/// Whether a peer is the one that is wanted, which may be named without its port.
fn is_named(peer: &str, wanted: &str) -> bool {
    let host = peer.rsplit_once(':').map_or(peer, |(host, _)| host);
    let host = host.trim_start_matches('[').trim_end_matches(']');
    peer == wanted || host == wanted
}

/// Says of a packet what its own bytes do not, in a few words.
fn describe(header: &Header, peer: Option<&str>, comment: &mut String) {
    comment.clear();
    let mut say = |what: &str, value: &str| {
        if !comment.is_empty() {
            comment.push_str(", ");
        }
        comment.push_str(what);
        comment.push_str(value);
    };
    if let Some(peer) = peer {
        say("peer ", peer);
    }
    if header.gso_bytes > 0 {
        say("GSO ", &header.gso_bytes.to_string());
    }
    if let Some(reason) = header.reason_name() {
        say("dropped: ", reason);
    }
}

/// A packet in one line: time in UTC, direction, protocol, ends, length, and what is said
/// besides.
fn line(header: &Header, direction: Direction, view: Option<&View<'_>>, comment: &str) -> String {
    let (seconds, ns) = (
        header.timestamp_ns / 1_000_000_000,
        header.timestamp_ns % 1_000_000_000,
    );
    let (hours, minutes) = (seconds / 3600 % 24, seconds / 60 % 60);
    let direction = match direction {
        Direction::Out => "out",
        Direction::In => "in ",
    };
    let what = view.map_or("not IP".into(), ToString::to_string);
    let comment = match comment.is_empty() {
        true => String::new(),
        false => format!(" ({comment})"),
    };
    format!(
        "{hours:02}:{minutes:02}:{:02}.{:06} {direction} {what}, {} bytes{comment}\n",
        seconds % 60,
        ns / 1000,
        header.packet_bytes,
    )
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
