//! A running tunnel handed over to another process, which goes on where the
//! first one stops: the same TUN queues, the same UDP sockets, the same
//! operators' socket.
//!
//! The successor asks over the operators' socket. Both sides then take turns:
//!
//! 1. The predecessor sends a [`Manifest`], one line of JSON.
//! 2. Successor: [`Step::Ready`]. Predecessor: the descriptors, one message for
//!    each worker and one for the operators' socket (`SCM_RIGHTS`, unix(7)).
//! 3. The successor makes its workers ready on them. It says which addresses it is
//!    about to give the device, one line of JSON, and gives it these: who carries
//!    on if it fails takes them back, and no others. [`Step::Go`].
//! 4. Predecessor: [`Step::Stopping`], at once. Its workers send what they hold
//!    and stop. [`Step::Done`], or [`Step::DoneReloadDue`]. Packets wait in the TUN queues and socket
//!    buffers meanwhile.
//! 5. Successor: [`Step::Taken`], and its workers start. The predecessor ends
//!    and leaves everything in place.
//!
//! Both have all descriptors from the second step on, so that either can carry
//! on when the other dies, and the steps say which of them does:
//!
//! - The successor fails before [`Step::Taken`], or is silent for too long: the
//!   predecessor runs on, or starts its workers again. It settles that by
//!   closing the connection to what it has not read by then, so that a
//!   successor that is only late cannot take the tunnel any more, and hears
//!   [`Step::Kept`].
//! - The predecessor dies before [`Step::Stopping`]: the successor fails. What
//!   ended the connection may be that the predecessor runs on.
//! - The predecessor dies after that, without [`Step::Kept`]: the successor
//!   carries on. Only what the predecessor's workers held is lost.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::net::{Shutdown, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use nix::cmsg_space;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use serde::{Deserialize, Serialize};
use socket2::Socket;

use crate::client;
use crate::device::tun::{Queue, Tun};
use crate::error::{Error, Result};
use crate::packet::coalesce;
use crate::transport::socket::{self, WorkerSockets};
use crate::transport::steering::WORKERS_MAX;

/// Version of all this. Processes of different versions do not take over from
/// each other.
pub const PROTOCOL: u32 = 3;

/// How long either side waits for the other, before it gives up.
const PATIENCE: Duration = Duration::from_secs(10);

/// How long the successor waits for the predecessor to stop: its keeper of
/// routes may be at a large table, and its workers at what they hold.
const STOP_TIME_MAX: Duration = Duration::from_secs(30);

/// How long the predecessor waits, stopped, for the successor to start.
const TAKE_TIME_MAX: Duration = Duration::from_secs(5);

/// Longest manifest: a million prefixes.
const MANIFEST_BYTES_MAX: u64 = 128 << 20;

/// Longest line of addresses: thousands.
const ADDRESSES_BYTES_MAX: usize = 256 << 10;

/// Descriptors in one message: TUN queue, shared socket, socket to send from.
const DESCRIPTORS_MAX: usize = 3;

/// What either side says by one byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Step {
    /// The successor can use what the manifest promises.
    Ready = b'r',
    /// Descriptors come with this byte.
    Descriptors = b'f',
    /// The successor has all it needs: stop.
    Go = b'g',
    /// The predecessor stops.
    Stopping = b's',
    /// The predecessor has stopped: start.
    Done = b'd',
    /// The same, and that a reload was asked for which is still to be done.
    DoneReloadDue = b'h',
    /// The successor starts: end.
    Taken = b't',
    /// The predecessor has started again.
    Kept = b'k',
}

/// What is handed over, in words.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Always true: the form of all answers on the operators' socket.
    pub ok: bool,
    /// [`PROTOCOL`].
    pub protocol: u32,
    /// Name of the TUN device.
    pub tun: String,
    /// Workers, each with descriptors of its own.
    pub workers: u16,
    /// Address and port of the UDP sockets.
    pub listen: SocketAddr,
    /// Super-packets that the TUN device passes: TCP, UDP.
    pub tun_offloads: [bool; 2],
    /// Offloads of the UDP sockets: `UDP_SEGMENT`, `UDP_GRO`.
    pub udp_offloads: [bool; 2],
    /// Which of the device's were asked of the kernel.
    pub tun_wanted: [bool; 2],
    /// Which of the sockets' were asked of the kernel.
    pub udp_wanted: [bool; 2],
    /// Whether a flow's queue depends on the flow alone.
    pub is_steered: bool,
    /// The addresses that the predecessor gave the device.
    pub addresses: Vec<IpNet>,
    /// Peers that operators added while it ran.
    pub runtime_peers: Vec<RuntimePeer>,
    /// Prefixes that operators gave configured peers, with the peers' names.
    pub runtime_prefixes: Vec<(IpNet, String)>,
}

/// A peer that operators added.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RuntimePeer {
    /// `HOST:PORT`.
    pub peer: String,
    /// Whether it takes what no prefix matches.
    pub is_default: bool,
    /// Its prefixes.
    pub prefixes: Vec<IpNet>,
}

/// What a successor gets.
pub struct Inherited {
    /// What it is.
    pub manifest: Manifest,
    /// The TUN queues.
    pub device: Tun,
    /// The workers' sockets.
    pub sockets: Vec<WorkerSockets>,
    /// Offloads of the sockets.
    pub udp: socket::Offloads,
    /// The operators' socket, if there is one.
    pub listener: Option<OwnedFd>,
    /// The predecessor, which still runs.
    pub predecessor: Predecessor,
}

/// The running process, as its successor sees it.
pub struct Predecessor(UnixStream);

impl Predecessor {
    /// Says which addresses the device is about to be given.
    ///
    /// # Errors
    /// When the predecessor has given this process up; it then runs on.
    pub fn will_add(&mut self, addresses: &[IpNet]) -> Result<()> {
        let line = serde_json::to_vec(addresses).map_err(|error| failed(error.into()))?;
        let line = [&line[..], b"\n"].concat();
        self.0.write_all(&line).map_err(failed)
    }

    /// Lets the predecessor stop; returns when the tunnel is this process's,
    /// because the predecessor has left it or has died. Tells whether a reload is
    /// due that it was asked for.
    ///
    /// # Errors
    /// When it does not stop; it then runs on.
    pub fn stop(mut self) -> Result<bool> {
        self.try_stop().map_err(|error| {
            let what = "the running process did not stop for its successor";
            Error::os(what, in_words(error))
        })
    }

    fn try_stop(&mut self) -> io::Result<bool> {
        let stream = &mut self.0;
        say(stream, Step::Go)?;
        hear(stream, Step::Stopping)?;
        stream.set_read_timeout(Some(STOP_TIME_MAX))?;
        let is_reload_due = match hear_or_end(stream)? {
            Some(byte) if byte == Step::Done as u8 => false,
            Some(byte) if byte == Step::DoneReloadDue as u8 => true,
            Some(_) => return Err(io::ErrorKind::InvalidData.into()),
            None => {
                tracing::warn!("the process that was to be taken over from has died; going on");
                return Ok(false);
            }
        };
        if say(stream, Step::Taken).is_ok() {
            return Ok(is_reload_due);
        }
        // It has died, or did not wait any longer.
        match hear_or_end(stream)? {
            None => Ok(is_reload_due),
            Some(_) => Err(io::Error::other("it did not wait for us any longer")),
        }
    }
}

/// Asks the process behind the operators' socket at `path` to hand its tunnel
/// over. `None`: there is none.
///
/// # Errors
/// When it refuses, or does not speak this version.
pub fn ask(path: &Path) -> Result<Option<Inherited>> {
    let stream = match client::connect(path, PATIENCE) {
        Ok(stream) => stream,
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
            ) =>
        {
            return Ok(None);
        }
        Err(error) => {
            return Err(Error::os(
                format!("cannot reach the running process at {}", path.display()),
                error,
            ));
        }
    };
    receive(stream).map(Some)
}

fn failed(error: io::Error) -> Error {
    Error::os("cannot take over from the running process", in_words(error))
}

/// What became of the other side.
fn in_words(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::UnexpectedEof
        | io::ErrorKind::BrokenPipe
        | io::ErrorKind::ConnectionReset => io::Error::other("it has closed the connection"),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
            io::Error::other("it does not answer")
        }
        _ => error,
    }
}

fn receive(mut stream: UnixStream) -> Result<Inherited> {
    let bounded = |stream: &UnixStream| {
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))
    };
    bounded(&stream).map_err(failed)?;
    let request = format!("{{\"command\":\"takeover\",\"protocol\":{PROTOCOL}}}\n");
    stream.write_all(request.as_bytes()).map_err(failed)?;
    let manifest = read_manifest(&mut stream)?;
    say(&mut stream, Step::Ready).map_err(failed)?;
    let mut queues = Vec::new();
    let mut sockets = Vec::new();
    for _ in 0..manifest.workers {
        let mut descriptors = receive_descriptors(&stream).map_err(failed)?.into_iter();
        let (Some(queue), Some(receive)) = (descriptors.next(), descriptors.next()) else {
            return Err(failed(io::ErrorKind::InvalidData.into()));
        };
        queues.push(Queue::from(queue));
        sockets.push(WorkerSockets {
            receive: Socket::from(receive),
            send: descriptors.next().map(Socket::from),
        });
    }
    let listener = receive_descriptors(&stream)
        .map_err(failed)?
        .into_iter()
        .next();
    let [tcp, udp] = manifest.tun_offloads;
    let [segment, gro] = manifest.udp_offloads;
    Ok(Inherited {
        device: Tun {
            queues,
            offloads: coalesce::Offloads { tcp, udp },
            steered: manifest.is_steered,
        },
        sockets,
        udp: socket::Offloads { segment, gro },
        listener,
        predecessor: Predecessor(stream),
        manifest,
    })
}

/// The line that the predecessor answers with. Byte by byte would do, but it
/// may be long; nothing follows it before we have answered.
fn read_manifest(stream: &mut UnixStream) -> Result<Manifest> {
    /// What any answer has, good or bad.
    #[derive(Deserialize)]
    struct Refusal {
        error: String,
    }
    let mut line = Vec::new();
    let mut chunk = [0; 4096];
    while line.last() != Some(&b'\n') {
        match stream.read(&mut chunk) {
            Ok(0) => return Err(failed(io::ErrorKind::UnexpectedEof.into())),
            Ok(bytes) => line.extend_from_slice(&chunk[..bytes]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(failed(error)),
        }
        if line.len() as u64 > MANIFEST_BYTES_MAX {
            return Err(failed(io::ErrorKind::InvalidData.into()));
        }
    }
    if let Ok(refusal) = serde_json::from_slice::<Refusal>(&line) {
        return Err(Error::new(format!(
            "the running process does not hand over: {}",
            refusal.error
        )));
    }
    let manifest: Manifest = serde_json::from_slice(&line)
        .map_err(|error| failed(io::Error::new(io::ErrorKind::InvalidData, error)))?;
    if manifest.protocol != PROTOCOL || manifest.workers == 0 || manifest.workers > WORKERS_MAX {
        return Err(
            Error::new("cannot take over: the running process is of another version")
                .hint("stop it, and start fastvpn without --takeover"),
        );
    }
    Ok(manifest)
}

/// The predecessor's side.
pub struct Successor(UnixStream);

/// The descriptors of one worker.
pub struct WorkerDescriptors<'a> {
    /// Its TUN queue.
    pub queue: BorrowedFd<'a>,
    /// Its sockets.
    pub receive: BorrowedFd<'a>,
    /// Its socket to send from, if it has one.
    pub send: Option<BorrowedFd<'a>>,
}

impl Successor {
    /// Who asked on this connection.
    ///
    /// # Errors
    /// When it speaks another version, or is gone.
    pub fn new(mut stream: UnixStream, protocol: u32) -> Result<Self> {
        stream
            .set_read_timeout(Some(PATIENCE))
            .and_then(|()| stream.set_write_timeout(Some(PATIENCE)))
            .map_err(lost)?;
        if protocol == PROTOCOL {
            return Ok(Self(stream));
        }
        let error = format!(
            "this process hands over by protocol {PROTOCOL}, not {protocol}; \
             stop it, and start the other without --takeover"
        );
        let answer = serde_json::json!({ "ok": false, "error": error });
        let _ = writeln!(stream, "{answer}");
        Err(Error::new(error))
    }

    /// Hands everything over, and returns when the successor is ready to go on.
    /// Up to then nothing has changed but for the addresses that the device may
    /// have been given: `adding`, as soon as the successor says them.
    ///
    /// # Errors
    /// When the successor fails or does not answer.
    pub fn hand_over<'a>(
        &mut self,
        manifest: &Manifest,
        workers: impl Iterator<Item = WorkerDescriptors<'a>>,
        listener: Option<BorrowedFd<'_>>,
        adding: &OnceLock<Vec<IpNet>>,
    ) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        let stream = &mut self.0;
        let mut line = serde_json::to_vec(manifest).map_err(|error| lost(error.into()))?;
        line.push(b'\n');
        write_all_until(stream, &line, deadline).map_err(lost)?;
        hear_until(stream, Step::Ready, deadline).map_err(lost)?;
        for worker in workers {
            let given = [Some(worker.queue), Some(worker.receive), worker.send];
            send_descriptors(stream, given.into_iter().flatten()).map_err(lost)?;
        }
        send_descriptors(stream, listener.into_iter()).map_err(lost)?;
        let addresses = hear_addresses_until(stream, deadline).map_err(lost)?;
        // It is the first time that they are said.
        let _ = adding.set(addresses);
        hear_until(stream, Step::Go, deadline).map_err(lost)
    }

    /// Tells the successor that this process stops now.
    ///
    /// # Errors
    /// When it is gone.
    pub fn stopping(&mut self) -> Result<()> {
        say(&mut self.0, Step::Stopping).map_err(lost)
    }

    /// This process has stopped: lets the successor start, and reload if that is
    /// due; returns when it starts.
    ///
    /// # Errors
    /// When it does not, and never will: this process has to carry on.
    pub fn done(self, is_reload_due: bool) -> Result<()> {
        let step = match is_reload_due {
            true => Step::DoneReloadDue,
            false => Step::Done,
        };
        self.done_within(step, TAKE_TIME_MAX)
    }

    fn done_within(mut self, step: Step, time_max: Duration) -> Result<()> {
        let stream = &mut self.0;
        let deadline = Instant::now() + time_max;
        let heard = say(stream, step).and_then(|()| hear_until(stream, Step::Taken, deadline));
        let Err(error) = heard else {
            return Ok(());
        };
        // What it has said by now counts. More it cannot say.
        let _ = stream.shutdown(Shutdown::Read);
        if hear(stream, Step::Taken).is_ok() {
            return Ok(());
        }
        let _ = say(stream, Step::Kept);
        Err(lost(error))
    }
}

fn lost(error: io::Error) -> Error {
    let what = "the process that wanted to take over has failed";
    Error::os(what, in_words(error))
}

/// As [`hear`], within what is left of the time for all of it.
fn hear_until(stream: &mut UnixStream, step: Step, deadline: Instant) -> io::Result<()> {
    stream.set_read_timeout(Some(time_left(deadline)?))?;
    hear(stream, step)
}

/// The line of addresses; byte by byte, as a step may follow it at once.
fn hear_addresses_until(stream: &mut UnixStream, deadline: Instant) -> io::Result<Vec<IpNet>> {
    let mut line = Vec::new();
    while line.last() != Some(&b'\n') {
        stream.set_read_timeout(Some(time_left(deadline)?))?;
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        line.extend(byte);
        if line.len() > ADDRESSES_BYTES_MAX {
            return Err(io::ErrorKind::InvalidData.into());
        }
    }
    Ok(serde_json::from_slice(&line)?)
}

/// As [`Write::write_all`], however slowly the other side reads.
fn write_all_until(stream: &mut UnixStream, mut bytes: &[u8], deadline: Instant) -> io::Result<()> {
    while !bytes.is_empty() {
        stream.set_write_timeout(Some(time_left(deadline)?))?;
        match stream.write(bytes) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => bytes = &bytes[written..],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn time_left(deadline: Instant) -> io::Result<Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(io::ErrorKind::TimedOut.into());
    }
    Ok(left)
}

fn say(stream: &mut UnixStream, step: Step) -> io::Result<()> {
    stream.write_all(&[step as u8])
}

fn hear(stream: &mut UnixStream, step: Step) -> io::Result<()> {
    let mut byte = [0];
    stream.read_exact(&mut byte)?;
    if byte == [step as u8] {
        Ok(())
    } else {
        Err(io::ErrorKind::InvalidData.into())
    }
}

/// The next byte; `None` if the other side has ended.
fn hear_or_end(stream: &mut UnixStream) -> io::Result<Option<u8>> {
    let mut byte = [0];
    match stream.read_exact(&mut byte) {
        Ok(()) => Ok(Some(byte[0])),
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset
            ) =>
        {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

fn send_descriptors<'a>(
    stream: &UnixStream,
    descriptors: impl Iterator<Item = BorrowedFd<'a>>,
) -> io::Result<()> {
    let raw: Vec<RawFd> = descriptors.map(|fd| fd.as_raw_fd()).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control: &[ControlMessage<'_>] = if raw.is_empty() { &[] } else { &rights };
    let byte = [Step::Descriptors as u8];
    sendmsg::<()>(
        stream.as_fd().as_raw_fd(),
        &[IoSlice::new(&byte)],
        control,
        MsgFlags::MSG_NOSIGNAL,
        None,
    )?;
    Ok(())
}

fn receive_descriptors(stream: &UnixStream) -> io::Result<Vec<OwnedFd>> {
    let mut byte = [0];
    let mut control = cmsg_space!([RawFd; DESCRIPTORS_MAX]);
    let mut parts = [IoSliceMut::new(&mut byte)];
    let message = recvmsg::<()>(
        stream.as_fd().as_raw_fd(),
        &mut parts,
        Some(&mut control),
        MsgFlags::MSG_CMSG_CLOEXEC,
    )?;
    let mut received = Vec::new();
    for part in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(descriptors) = part {
            // SAFETY: the kernel has just made these descriptors for us;
            // nobody else knows of them.
            received.extend(
                descriptors
                    .into_iter()
                    .map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }),
            );
        }
    }
    let bytes = message.bytes;
    if bytes == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    if byte != [Step::Descriptors as u8] {
        return Err(io::ErrorKind::InvalidData.into());
    }
    Ok(received)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::UdpSocket;

    fn manifest(workers: u16) -> Manifest {
        Manifest {
            ok: true,
            protocol: PROTOCOL,
            tun: "fastvpn0".into(),
            workers,
            listen: "0.0.0.0:8285".parse().unwrap(),
            tun_offloads: [true, false],
            udp_offloads: [false, true],
            tun_wanted: [true, true],
            udp_wanted: [false, true],
            is_steered: true,
            addresses: vec!["10.244.0.1/16".parse().unwrap()],
            runtime_peers: vec![RuntimePeer {
                peer: "10.0.0.9:8285".into(),
                is_default: false,
                prefixes: vec!["10.9.0.0/16".parse().unwrap()],
            }],
            runtime_prefixes: Vec::new(),
        }
    }

    /// Eats the request that [`receive`] sends first.
    fn asked(stream: &mut UnixStream) {
        let mut byte = [0];
        while byte != [b'\n'] {
            stream.read_exact(&mut byte).unwrap();
        }
    }

    #[test]
    fn descriptors_change_hands() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let listener = UdpSocket::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let predecessor = std::thread::spawn(move || {
            let mut stream = ours;
            asked(&mut stream);
            let mut successor = Successor::new(stream, PROTOCOL).unwrap();
            let workers = (0..2).map(|index| WorkerDescriptors {
                queue: listener.as_fd(),
                receive: listener.as_fd(),
                send: (index == 1).then_some(listener.as_fd()),
            });
            let adding = OnceLock::new();
            successor
                .hand_over(&manifest(2), workers, Some(listener.as_fd()), &adding)
                .unwrap();
            successor.stopping().unwrap();
            successor.done(true).unwrap();
            adding.into_inner()
        });
        let mut inherited = receive(theirs).unwrap();
        assert_eq!(inherited.manifest, manifest(2));
        assert!(inherited.device.offloads.tcp && !inherited.device.offloads.udp);
        assert!(!inherited.udp.segment && inherited.udp.gro);
        assert_eq!(inherited.device.queues.len(), 2);
        assert!(inherited.listener.is_some());
        let [first, second] = &inherited.sockets[..] else {
            panic!("two workers")
        };
        let local = |socket: &Socket| socket.local_addr().unwrap().as_socket().unwrap();
        assert_eq!(local(&first.receive), address);
        assert!(first.send.is_none() && second.send.is_some());
        let adding = vec!["10.250.0.9/24".parse().unwrap()];
        inherited.predecessor.will_add(&adding).unwrap();
        let is_reload_due = inherited.predecessor.stop().unwrap();
        assert!(is_reload_due);
        assert_eq!(predecessor.join().unwrap(), Some(adding));
    }

    /// Both sides, as they are before [`Step::Go`].
    fn ready() -> (Successor, Predecessor) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        for stream in [&ours, &theirs] {
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
        }
        (Successor(ours), Predecessor(theirs))
    }

    /// Whatever the predecessor has said before it dies: who has heard that it
    /// stops goes on, who has not does not.
    #[test]
    fn a_predecessor_that_dies_is_outlived() {
        for (said, carries_on) in [
            ("", false),
            ("s", true),
            ("sd", true),
            ("sh", true),
            ("sk", false),
        ] {
            let (mut ours, predecessor) = ready();
            let successor = std::thread::spawn(move || predecessor.stop());
            hear(&mut ours.0, Step::Go).unwrap();
            ours.0.write_all(said.as_bytes()).unwrap();
            drop(ours);
            let result = successor.join().unwrap();
            assert_eq!(result.is_ok(), carries_on, "{said:?}: {result:?}");
        }
    }

    /// Either the predecessor hears that its successor starts, or the successor
    /// hears that it must not.
    #[test]
    fn a_late_successor_does_not_start() {
        let (mut ours, mut predecessor) = ready();
        ours.stopping().unwrap();
        let late = ours.done_within(Step::Done, Duration::from_millis(20));
        let error = late.unwrap_err().to_string();
        assert!(error.contains("does not answer"), "{error}");
        hear(&mut predecessor.0, Step::Stopping).unwrap();
        hear(&mut predecessor.0, Step::Done).unwrap();
        assert!(say(&mut predecessor.0, Step::Taken).is_err());
        hear(&mut predecessor.0, Step::Kept).unwrap();
        // One that is gone is not waited for, one that has just said so counts.
        let (ours, predecessor) = ready();
        drop(predecessor);
        assert!(ours.done(false).is_err());
        let (ours, mut predecessor) = ready();
        say(&mut predecessor.0, Step::Taken).unwrap();
        drop(predecessor);
        ours.done(false).unwrap();
    }

    #[test]
    fn who_fails_changes_nothing() {
        // A successor that goes away when it has seen the manifest.
        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(theirs);
        let mut successor = Successor::new(ours, PROTOCOL).unwrap();
        let nobody = std::iter::empty();
        assert!(
            successor
                .hand_over(&manifest(1), nobody, None, &OnceLock::new())
                .is_err()
        );
        // A predecessor that goes away, talks nonsense, or refuses.
        for (answer, says) in [
            ("", "closed"),
            ("nonsense\n", "cannot take over"),
            ("{\"ok\":false,\"error\":\"busy\"}\n", "busy"),
        ] {
            let (mut ours, theirs) = UnixStream::pair().unwrap();
            ours.write_all(answer.as_bytes()).unwrap();
            ours.shutdown(std::net::Shutdown::Write).unwrap();
            let text = receive(theirs).err().unwrap().to_string();
            assert!(text.contains(says), "{text}");
        }
    }

    #[test]
    fn other_versions_are_told_so() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        assert!(Successor::new(ours, PROTOCOL + 1).is_err());
        let mut answer = String::new();
        theirs.read_to_string(&mut answer).unwrap();
        assert!(answer.contains("\"ok\":false"), "{answer}");
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        let old = Manifest {
            protocol: PROTOCOL + 1,
            ..manifest(1)
        };
        let line = serde_json::to_string(&old).unwrap() + "\n";
        ours.write_all(line.as_bytes()).unwrap();
        let text = receive(theirs).err().unwrap().to_string();
        assert!(text.contains("another version"), "{text}");
    }
}
