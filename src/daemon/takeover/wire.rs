//! Steps, lines and descriptors on the connection between the two.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use nix::cmsg_space;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, send, sendmsg};

use super::{Step, is_end};

/// Longest line of addresses: thousands.
const ADDRESSES_BYTES_MAX: usize = 256 << 10;

/// Descriptors in one message: TUN queue, shared socket, socket to send from.
const DESCRIPTORS_MAX: usize = 3;

/// As [`hear`], within what is left of the time for all of it.
pub(super) fn hear_until(stream: &UnixStream, step: Step, deadline: Instant) -> io::Result<()> {
    stream.set_read_timeout(Some(time_left(deadline)?))?;
    hear(stream, step)
}

/// The line of addresses; byte by byte, as a step may follow it at once.
pub(super) fn hear_addresses_until(
    mut stream: &UnixStream,
    deadline: Instant,
) -> io::Result<Vec<IpNet>> {
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
pub(super) fn write_all_until(
    mut stream: &UnixStream,
    mut bytes: &[u8],
    deadline: Instant,
) -> io::Result<()> {
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

pub(super) fn say(mut stream: &UnixStream, step: Step) -> io::Result<()> {
    stream.write_all(&[step as u8])
}

/// As [`say`], to one who may not read.
pub(super) fn say_at_once(stream: &UnixStream, step: Step) -> io::Result<()> {
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    send(stream.as_raw_fd(), &[step as u8], flags)?;
    Ok(())
}

pub(super) fn hear(stream: &UnixStream, step: Step) -> io::Result<()> {
    match hear_or_end(stream)? {
        Some(byte) if byte == step as u8 => Ok(()),
        Some(_) => Err(io::ErrorKind::InvalidData.into()),
        None => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

/// The next byte; `None` if the other side has ended.
pub(super) fn hear_or_end(mut stream: &UnixStream) -> io::Result<Option<u8>> {
    let mut byte = [0];
    match stream.read_exact(&mut byte) {
        Ok(()) => not_kept(byte[0]).map(Some),
        Err(error) if is_end(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

fn not_kept(byte: u8) -> io::Result<u8> {
    if byte == Step::Kept as u8 {
        let text = "it keeps the tunnel, or was told to stop; its log may say more";
        return Err(io::Error::other(text));
    }
    Ok(byte)
}

pub(super) fn send_descriptors<'a>(
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

pub(super) fn receive_descriptors(stream: &UnixStream) -> io::Result<Vec<OwnedFd>> {
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
    if not_kept(byte[0])? != Step::Descriptors as u8 {
        return Err(io::ErrorKind::InvalidData.into());
    }
    Ok(received)
}
