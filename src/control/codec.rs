//! Lines on a Unix stream socket, of bounded length and within bounded time: what
//! the control socket, its clients and both sides of a handoff speak. Descriptors may
//! come with a line (`SCM_RIGHTS`, unix(7)).
//!
//! Nothing here blocks for longer than the caller's deadline. With one that has
//! passed, [`Lines::receive`] and [`Lines::flush`] do what can be done at once.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, recv, recvmsg, send, sendmsg,
};

const CHUNK_BYTES: usize = 64 << 10;

/// Most descriptors in one message (`SCM_MAX_FD` in the kernel's include/net/scm.h).
const DESCRIPTORS_MAX: usize = 253;

const SEND_FLAGS: MsgFlags = MsgFlags::MSG_DONTWAIT.union(MsgFlags::MSG_NOSIGNAL);

/// One end of such a connection.
#[derive(Debug)]
pub struct Lines {
    stream: UnixStream,
    line_bytes_max: usize,
    /// What has come and is not part of a line that was returned.
    received: Vec<u8>,
    /// How much of it has no line feed.
    searched: usize,
    /// What is to be sent, and how much of it has been.
    sending: Vec<u8>,
    sent: usize,
    /// What has come with the bytes, if that is wanted: else the kernel closes it.
    descriptors: Option<Vec<OwnedFd>>,
}

impl Lines {
    /// Lines on `stream`. Those that are received have at most `line_bytes_max`
    /// bytes.
    pub fn new(stream: UnixStream, line_bytes_max: usize) -> Self {
        Self {
            stream,
            line_bytes_max,
            received: Vec::new(),
            searched: 0,
            sending: Vec::new(),
            sent: 0,
            descriptors: None,
        }
    }

    /// The same, with descriptors.
    pub fn with_descriptors(stream: UnixStream, line_bytes_max: usize) -> Self {
        Self {
            descriptors: Some(Vec::new()),
            ..Self::new(stream, line_bytes_max)
        }
    }

    /// The stream, for its options and its end.
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// The descriptors that came with the lines so far, in their order.
    pub fn take_descriptors(&mut self) -> Vec<OwnedFd> {
        self.descriptors
            .as_mut()
            .map(std::mem::take)
            .unwrap_or_default()
    }

    /// The next line, without its line feed; `None` at the end of the stream.
    ///
    /// # Errors
    /// `TimedOut` if none is complete in time: what has come of it is kept.
    /// `FileTooLarge` if it is too long.
    pub fn receive(&mut self, deadline: Instant) -> io::Result<Option<Vec<u8>>> {
        loop {
            if let Some(line) = self.take_line()? {
                return Ok(Some(line));
            }
            let filled = self.received.len();
            self.received.resize(filled + CHUNK_BYTES, 0);
            let read = in_time(&self.stream, PollFlags::POLLIN, deadline, || {
                let into = &mut self.received[filled..];
                receive_some(&self.stream, into, self.descriptors.as_mut())
            });
            self.received
                .truncate(filled + *read.as_ref().unwrap_or(&0));
            if read? == 0 {
                return Ok(None);
            }
        }
    }

    /// Whether [`Self::receive`] has a line without reading.
    pub fn has_line(&self) -> bool {
        self.received[self.searched..].contains(&b'\n')
    }

    /// Sends a line, and whatever of the one before it has not been sent.
    ///
    /// # Errors
    /// `TimedOut` if the other end does not read all of it in time; the rest is for
    /// [`Self::flush`].
    pub fn send(&mut self, mut line: Vec<u8>, deadline: Instant) -> io::Result<()> {
        line.push(b'\n');
        match self.is_flushed() {
            true => self.sending = line,
            false => self.sending.append(&mut line),
        }
        self.flush(deadline)
    }

    /// Sends a line of JSON with descriptors: these come with spaces before it.
    ///
    /// # Errors
    /// When the other end does not take all of it in time.
    pub fn send_with_descriptors(
        &mut self,
        line: Vec<u8>,
        descriptors: &[BorrowedFd<'_>],
        deadline: Instant,
    ) -> io::Result<()> {
        self.flush(deadline)?;
        for some in descriptors.chunks(DESCRIPTORS_MAX) {
            let raw: Vec<RawFd> = some.iter().map(|fd| fd.as_raw_fd()).collect();
            let (space, rights) = ([IoSlice::new(b" ")], [ControlMessage::ScmRights(&raw)]);
            in_time(&self.stream, PollFlags::POLLOUT, deadline, || {
                sendmsg::<()>(self.stream.as_raw_fd(), &space, &rights, SEND_FLAGS, None)
            })?;
        }
        self.send(line, deadline)
    }

    /// Sends what is left to send.
    ///
    /// # Errors
    /// As [`Self::send`].
    pub fn flush(&mut self, deadline: Instant) -> io::Result<()> {
        while !self.is_flushed() {
            self.sent += in_time(&self.stream, PollFlags::POLLOUT, deadline, || {
                send(
                    self.stream.as_raw_fd(),
                    &self.sending[self.sent..],
                    SEND_FLAGS,
                )
            })?;
        }
        // Long answers are rare: their memory is not kept for the next one.
        self.sending = Vec::new();
        self.sent = 0;
        Ok(())
    }

    /// Bytes that are held until the last of them has been sent.
    pub fn sending_bytes(&self) -> usize {
        self.sending.len()
    }

    /// Whether nothing is left to send.
    pub fn is_flushed(&self) -> bool {
        self.sent == self.sending.len()
    }

    fn take_line(&mut self) -> io::Result<Option<Vec<u8>>> {
        let unsearched = &self.received[self.searched..];
        let end = unsearched.iter().position(|byte| *byte == b'\n');
        let end = end.map(|end| self.searched + end);
        if end.unwrap_or(self.received.len()) > self.line_bytes_max {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        let Some(end) = end else {
            self.searched = self.received.len();
            return Ok(None);
        };
        let rest = self.received.split_off(end + 1);
        let mut line = std::mem::replace(&mut self.received, rest);
        line.truncate(end);
        self.searched = 0;
        Ok(Some(line))
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
                // If it fails, so does the next call, or the time is up.
                let _ = poll(&mut [PollFd::new(stream.as_fd(), events)], timeout(left));
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

/// For poll(2), in milliseconds: not before the time is up.
pub fn timeout(left: Duration) -> PollTimeout {
    let up = left.saturating_add(Duration::from_millis(1));
    PollTimeout::try_from(up).unwrap_or(PollTimeout::MAX)
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
            line.map(|line| line.map(|line| String::from_utf8(line).unwrap()))
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
        // What has no end of line is no line.
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
                Ok(line) => assert!(is_taken && line.unwrap() == longest),
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
            lines.send_with_descriptors(long, &all, until).unwrap();
            count
        });
        let mut next = || lines.receive(Instant::now() + PATIENCE).unwrap().unwrap();
        assert_eq!(next(), b"0");
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

    /// It may be read by the byte, or not at all; what is late goes out later.
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
            assert!(!lines.is_flushed());
            let mut other = reader.join().unwrap();
            let rest = std::thread::spawn(move || {
                let mut rest = Vec::new();
                other.read_to_end(&mut rest).unwrap();
                rest
            });
            lines.flush(Instant::now() + PATIENCE).unwrap();
            assert!(lines.is_flushed());
            drop(lines);
            let rest = rest.join().unwrap();
            assert!(rest.len() > long.len() / 2 && rest.ends_with(b"x\n"));
        }
    }
}
