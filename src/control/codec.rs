//! Lines on a Unix stream socket, of bounded length and within bounded time: what
//! the control socket, its clients and both sides of a handoff speak. Descriptors may
//! come with a line (`SCM_RIGHTS`, unix(7)).
//!
//! Nothing here blocks for longer than the caller's deadline. Once that has passed,
//! [`Lines::receive`] and [`Lines::send`] do what can be done at once.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, recv, recvmsg, send, sendmsg,
};
use serde::Serialize;
use zeroize::Zeroizing;

/// A line without its line feed. Its memory is wiped, since a line may have keys in it.
pub type WipedBytes = Zeroizing<Vec<u8>>;

const CHUNK_BYTES: usize = 64 << 10;

/// Most descriptors in one message (`SCM_MAX_FD` in the kernel's include/net/scm.h).
const DESCRIPTORS_MAX: usize = 253;

const SEND_FLAGS: MsgFlags = MsgFlags::MSG_DONTWAIT.union(MsgFlags::MSG_NOSIGNAL);

/// One end of such a connection.
#[derive(Debug)]
pub struct Lines {
    incoming: Incoming,
    line_bytes_max: usize,
    /// What has come and was not looked at yet stands from `start` to `end`.
    chunk: Zeroizing<Vec<u8>>,
    start: usize,
    end: usize,
    /// What has come of a line that is not complete.
    partial: WipedBytes,
}

/// What comes in, until a deadline.
#[derive(Debug)]
struct Incoming {
    stream: UnixStream,
    deadline: Instant,
    /// What has come with the bytes, if that is wanted: else the kernel closes it.
    descriptors: Option<Vec<OwnedFd>>,
}

impl Lines {
    /// Lines on `stream`. Those that are received have at most `line_bytes_max`
    /// bytes.
    pub fn new(stream: UnixStream, line_bytes_max: usize) -> Self {
        let incoming = Incoming {
            stream,
            deadline: Instant::now(),
            descriptors: None,
        };
        Self {
            incoming,
            line_bytes_max,
            chunk: Zeroizing::new(vec![0; CHUNK_BYTES]),
            start: 0,
            end: 0,
            partial: WipedBytes::default(),
        }
    }

    /// The same, with descriptors.
    pub fn with_descriptors(stream: UnixStream, line_bytes_max: usize) -> Self {
        let mut lines = Self::new(stream, line_bytes_max);
        lines.incoming.descriptors = Some(Vec::new());
        lines
    }

    /// The stream, for its options and its end.
    pub fn stream(&self) -> &UnixStream {
        &self.incoming.stream
    }

    /// The descriptors that came with the lines so far, in their order.
    pub fn take_descriptors(&mut self) -> Vec<OwnedFd> {
        let descriptors = &mut self.incoming.descriptors;
        descriptors.as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// The next line, without its line feed; `None` at the end of the stream.
    ///
    /// # Errors
    /// `TimedOut` if none is complete in time: what has come of it is kept.
    /// `FileTooLarge` if it is too long.
    pub fn receive(&mut self, deadline: Instant) -> io::Result<Option<WipedBytes>> {
        self.incoming.deadline = deadline;
        loop {
            let waiting = self.chunk.get(self.start..self.end).unwrap_or_default();
            let line_end = waiting.iter().position(|byte| *byte == b'\n');
            let piece = line_end.map_or(waiting, |end| &waiting[..end]);
            if self.partial.len() + piece.len() > self.line_bytes_max {
                let text = format!("a line has more than {} bytes", self.line_bytes_max);
                return Err(io::Error::new(io::ErrorKind::FileTooLarge, text));
            }
            append(&mut self.partial, piece);
            if let Some(end) = line_end {
                self.start += end + 1;
                return Ok(Some(std::mem::take(&mut self.partial)));
            }
            (self.start, self.end) = (0, 0);
            self.end = self.incoming.read(&mut self.chunk)?;
            if self.end == 0 {
                return Ok(None);
            }
        }
    }

    /// Sends a line.
    ///
    /// # Errors
    /// `TimedOut` if the other end does not read all of it in time. Nothing can be sent
    /// after that.
    pub fn send(&mut self, line: impl Into<WipedBytes>, deadline: Instant) -> io::Result<()> {
        let mut line = line.into();
        append(&mut line, b"\n");
        let mut sent = 0;
        while sent < line.len() {
            sent += in_time(self.stream(), PollFlags::POLLOUT, deadline, || {
                send(self.stream().as_raw_fd(), &line[sent..], SEND_FLAGS)
            })?;
        }
        Ok(())
    }

    /// Sends a line of JSON with descriptors: these come with spaces before it.
    ///
    /// # Errors
    /// As [`Self::send`].
    pub fn send_with_descriptors(
        &mut self,
        line: WipedBytes,
        descriptors: &[BorrowedFd<'_>],
        deadline: Instant,
    ) -> io::Result<()> {
        for some in descriptors.chunks(DESCRIPTORS_MAX) {
            let raw: Vec<RawFd> = some.iter().map(|fd| fd.as_raw_fd()).collect();
            let (space, rights) = ([IoSlice::new(b" ")], [ControlMessage::ScmRights(&raw)]);
            let socket = self.stream().as_raw_fd();
            in_time(self.stream(), PollFlags::POLLOUT, deadline, || {
                sendmsg::<()>(socket, &space, &rights, SEND_FLAGS, None)
            })?;
        }
        self.send(line, deadline)
    }
}

/// A message as JSON.
///
/// # Errors
/// When it cannot be written so.
pub fn to_line(message: &impl Serialize) -> io::Result<WipedBytes> {
    struct Writer(WipedBytes);
    impl Write for Writer {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            append(&mut self.0, bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let mut writer = Writer(WipedBytes::default());
    serde_json::to_writer(&mut writer, message)?;
    Ok(writer.0)
}

/// Appends bytes. Memory that becomes too small is wiped, which a vector by itself would not do.
fn append(line: &mut WipedBytes, bytes: &[u8]) {
    let needed = line.len() + bytes.len();
    if needed > line.capacity() {
        let mut larger = WipedBytes::new(Vec::with_capacity(needed.max(2 * line.capacity())));
        larger.extend_from_slice(line);
        *line = larger;
    }
    line.extend_from_slice(bytes);
}

impl Read for Incoming {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        in_time(&self.stream, PollFlags::POLLIN, self.deadline, || {
            receive_some(&self.stream, into, self.descriptors.as_mut())
        })
    }
}

/// Does what the socket may not be ready for, within a time.
fn in_time<T>(
    stream: &UnixStream,
    events: PollFlags,
    deadline: Instant,
    mut call: impl FnMut() -> nix::Result<T>,
) -> io::Result<T> {
    loop {
        match call() {
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => {
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return Err(io::ErrorKind::TimedOut.into());
                }
                // In whole milliseconds, and not before the time is up.
                let up = left.saturating_add(Duration::from_millis(1));
                let timeout = PollTimeout::try_from(up).unwrap_or(PollTimeout::MAX);
                // If it fails, so does the next call, or the time is up.
                let _ = poll(&mut [PollFd::new(stream.as_fd(), events)], timeout);
            }
            result => return Ok(result?),
        }
    }
}

/// What there is at once. `descriptors`: where those go that come with it.
fn receive_some(
    stream: &UnixStream,
    into: &mut [u8],
    descriptors: Option<&mut Vec<OwnedFd>>,
) -> nix::Result<usize> {
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_CMSG_CLOEXEC;
    let Some(descriptors) = descriptors else {
        return recv(stream.as_raw_fd(), into, flags);
    };
    let mut control = nix::cmsg_space!([RawFd; DESCRIPTORS_MAX]);
    let mut parts = [IoSliceMut::new(into)];
    let message = recvmsg::<()>(stream.as_raw_fd(), &mut parts, Some(&mut control), flags)?;
    for part in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(received) = part {
            let received = received.into_iter();
            // SAFETY: the kernel has just made these descriptors for this process;
            // nobody else knows of them.
            descriptors.extend(received.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    Ok(message.bytes)
}

/// Whether the other side has closed the connection.
pub fn is_end(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::UnexpectedEof | io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset
    )
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    const LINE_BYTES_MAX: usize = 1000;
    const PATIENCE: Duration = Duration::from_secs(30);

    fn soon() -> Instant {
        Instant::now() + Duration::from_millis(50)
    }

    fn pair() -> (Lines, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (Lines::new(ours, LINE_BYTES_MAX), theirs)
    }

    #[test]
    fn lines_may_come_together_and_in_pieces() {
        let (mut lines, mut other) = pair();
        let mut next = |bytes: &[u8]| {
            other.write_all(bytes).unwrap();
            let line = lines.receive(Instant::now());
            line.map(|line| line.map(|line| String::from_utf8(line.to_vec()).unwrap()))
        };
        let late = |result: io::Result<_>| {
            assert_eq!(result.unwrap_err().kind(), io::ErrorKind::TimedOut);
        };
        assert_eq!(next(b"a\n\nbc\nd").unwrap().unwrap(), "a");
        assert_eq!(next(b"").unwrap().unwrap(), "");
        assert_eq!(next(b"").unwrap().unwrap(), "bc");
        late(next(b""));
        late(next(b"e"));
        assert_eq!(next(b"f\ng").unwrap().unwrap(), "def");
        // What has no end of line is not a line.
        drop(other);
        assert!(lines.receive(soon()).unwrap().is_none());
    }

    #[test]
    fn a_line_has_a_longest_length() {
        let longest = vec![b'x'; LINE_BYTES_MAX];
        for (bytes, is_taken) in [
            ([&longest[..], b"\n"].concat(), true),
            ([&longest[..], b"x\n"].concat(), false),
            ([&longest[..], b"x"].concat(), false),
        ] {
            let (mut lines, mut other) = pair();
            other.write_all(&bytes).unwrap();
            match lines.receive(soon()) {
                Ok(line) => assert!(is_taken && *line.unwrap() == longest),
                Err(error) => {
                    assert!(!is_taken && error.kind() == io::ErrorKind::FileTooLarge);
                }
            }
        }
    }

    /// More than fit one message, with a line longer than the socket's buffer.
    #[test]
    fn descriptors_come_with_a_line() {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        let long = [vec![b' '; 1 << 20], b"1".to_vec()].concat();
        let mut lines = Lines::with_descriptors(theirs, 2 << 20);
        let sent = std::thread::spawn(move || {
            let file = tempfile::tempfile().unwrap();
            let count = DESCRIPTORS_MAX + 2;
            let all: Vec<_> = std::iter::repeat_n(file.as_fd(), count).collect();
            ours.write_all(b"0\n").unwrap();
            let mut lines = Lines::new(ours, LINE_BYTES_MAX);
            let until = Instant::now() + PATIENCE;
            lines
                .send_with_descriptors(long.into(), &all, until)
                .unwrap();
            count
        });
        let mut next = || lines.receive(Instant::now() + PATIENCE).unwrap().unwrap();
        assert_eq!(*next(), b"0");
        assert_eq!(next().trim_ascii(), b"1");
        assert_eq!(lines.take_descriptors().len(), sent.join().unwrap());
    }

    /// A byte now and then is no excuse; nor is silence.
    #[test]
    fn a_line_has_its_time() {
        for is_silent in [true, false] {
            let (mut lines, mut other) = pair();
            let drip = std::thread::spawn(move || {
                while !is_silent && other.write_all(b" ").is_ok() {
                    std::thread::sleep(Duration::from_millis(1));
                }
                other
            });
            let error = lines.receive(soon()).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::TimedOut);
            drop(lines);
            drip.join().unwrap();
        }
    }

    /// It may be read by the byte, or not at all.
    #[test]
    fn sending_has_its_time() {
        let long = vec![b'x'; 2 << 20];
        for is_read in [true, false] {
            let (mut lines, mut other) = pair();
            other.set_read_timeout(Some(PATIENCE)).unwrap();
            let reader = std::thread::spawn(move || {
                let deadline = soon();
                while is_read && Instant::now() < deadline {
                    other.read_exact(&mut [0]).unwrap();
                    std::thread::sleep(Duration::from_millis(1));
                }
                other
            });
            let error = lines.send(long.clone(), soon()).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::TimedOut);
            let mut other = reader.join().unwrap();
            let rest = std::thread::spawn(move || {
                let mut rest = Vec::new();
                other.read_to_end(&mut rest).unwrap();
                rest
            });
            drop(lines);
            let rest = rest.join().unwrap();
            assert!(rest.len() < long.len() && rest.ends_with(b"x"));
        }
    }

    #[test]
    fn a_long_line_arrives_whole() {
        let long: Vec<u8> = (0..2 << 20).map(|at: u32| b'a' + (at % 23) as u8).collect();
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (mut ours, mut theirs) = (Lines::new(ours, 0), Lines::new(theirs, long.len()));
        let sent = long.clone();
        let sender = std::thread::spawn(move || ours.send(sent, Instant::now() + PATIENCE));
        // In many pieces, and some of them late.
        let mut received: io::Result<_> = Err(io::ErrorKind::TimedOut.into());
        while matches!(&received, Err(error) if error.kind() == io::ErrorKind::TimedOut) {
            received = theirs.receive(Instant::now());
        }
        assert!(received.unwrap() == Some(long.into()));
        sender.join().unwrap().unwrap();
    }
}
