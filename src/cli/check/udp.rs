//! UDP sockets: long trains there and back over the loopback interface, the
//! group of a shared port, and buffers.

use std::io::{self, IoSlice, IoSliceMut};
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;
use std::time::Duration;

use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, SockaddrIn, recvmsg, sendmsg, setsockopt,
    sockopt,
};

use super::item::Item;
use super::read::{self, Tried};
use super::scratch;
use crate::error::{Error, Result};
use crate::io::udp::{self, SOCKET_BUFFER_BYTES, UdpOffloads, WorkerSockets};

/// The names of the items.
pub const NAMES: [&str; 4] = ["UDP_SEGMENT", "UDP_GRO", "SO_REUSEPORT", "socket buffers"];

/// A train for the probe: bytes of each datagram, and how many of them.
const SEGMENT_BYTES: u16 = 1000;
const SEGMENTS: usize = 8;

/// How long what is sent over the loopback interface may take.
const ARRIVAL_MAX: Duration = Duration::from_millis(300);

/// How often a free port is looked for.
const PORT_TRIES_MAX: usize = 4;

/// What was found.
#[derive(Clone, Debug)]
pub struct Facts {
    /// A train sent.
    segment: Tried<()>,
    /// Datagrams in the first receive of it.
    gro: Option<Tried<usize>>,
    /// Whether the worker that the source port names got the datagram.
    group: Tried<bool>,
    /// `SO_RCVBUFFORCE` works.
    may_force: bool,
    /// `net.core.rmem_max` and `net.core.wmem_max` in bytes.
    receive_bytes_max: Option<usize>,
    send_bytes_max: Option<usize>,
}

/// Sends to itself, in a namespace of its own if there may be one.
pub fn probe() -> Facts {
    // Read first: namespaces but the first may not show them.
    let limit = |path| read::sysctl(path).and_then(|text| text.parse().ok());
    let receive_bytes_max = limit("net/core/rmem_max");
    let send_bytes_max = limit("net/core/wmem_max");
    // Without one the host's own loopback interface serves as well.
    let _ = scratch::enter();
    let (segment, gro) = match train() {
        Ok((segment, gro)) => (segment, gro),
        Err(error) => (Err(read::errno(&error)), None),
    };
    Facts {
        segment,
        gro,
        group: group().map_err(|error| error.errno().unwrap_or(libc::EIO)),
        may_force: may_force(),
        receive_bytes_max,
        send_bytes_max,
    }
}

/// Opens the sockets of `workers` workers on a free port of the loopback
/// address.
///
/// # Errors
/// As [`udp::open`].
pub fn open_on_loopback(workers: u16) -> Result<(Vec<WorkerSockets>, SocketAddr)> {
    let all = UdpOffloads {
        segment: true,
        gro: true,
    };
    let free_port = || UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr();
    let mut tries = 0;
    loop {
        tries += 1;
        let address = free_port()
            .map_err(|cause| Error::os("cannot open a UDP socket on 127.0.0.1", cause))?;
        match udp::open(address, workers, all) {
            // Somebody else was quicker.
            Err(error) if error.errno() == Some(libc::EADDRINUSE) && tries < PORT_TRIES_MAX => {}
            result => return result.map(|(sockets, _)| (sockets, address)),
        }
    }
}

/// Sends a train to itself. The outer error is the loopback interface's.
fn train() -> io::Result<(Tried<()>, Option<Tried<usize>>)> {
    let sender = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
    let receiver = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
    receiver.set_read_timeout(Some(ARRIVAL_MAX))?;
    let has_gro = setsockopt(&receiver, sockopt::UdpGroSegment, &true);
    let SocketAddr::V4(to) = receiver.local_addr()? else {
        return Err(io::ErrorKind::AddrNotAvailable.into());
    };
    let payload = [0; SEGMENT_BYTES as usize * SEGMENTS];
    let sent = sendmsg(
        sender.as_raw_fd(),
        &[IoSlice::new(&payload)],
        &[ControlMessage::UdpGsoSegments(&SEGMENT_BYTES)],
        MsgFlags::empty(),
        Some(&SockaddrIn::from(to)),
    );
    if let Err(errno) = sent {
        return Ok((
            Err(errno as i32),
            has_gro.err().map(|errno| Err(errno as i32)),
        ));
    }
    if let Err(errno) = has_gro {
        return Ok((Ok(()), Some(Err(errno as i32))));
    }
    let mut buffer = vec![0; payload.len()];
    let mut control = nix::cmsg_space!(i32);
    let mut room = [IoSliceMut::new(&mut buffer)];
    let received = recvmsg::<SockaddrIn>(
        receiver.as_raw_fd(),
        &mut room,
        Some(&mut control),
        MsgFlags::empty(),
    )?;
    let segment_bytes = received.cmsgs()?.find_map(|message| match message {
        ControlMessageOwned::UdpGroSegments(bytes) => usize::try_from(bytes).ok(),
        _ => None,
    });
    let bytes = segment_bytes.unwrap_or(received.bytes).max(1);
    Ok((Ok(()), Some(Ok(received.bytes.div_ceil(bytes)))))
}

/// Sends from the second worker's source port to a port with two workers.
fn group() -> Result<bool> {
    let failed = |cause| Error::os("cannot use a UDP socket on 127.0.0.1", cause);
    let (sockets, address) = open_on_loopback(2)?;
    let second = &sockets[1];
    let Some(sender) = &second.send else {
        return Err(failed(io::ErrorKind::AddrInUse.into()));
    };
    sender.send_to(&[0], &address.into()).map_err(failed)?;
    second.receive.set_nonblocking(false).map_err(failed)?;
    let patience = Some(ARRIVAL_MAX);
    second.receive.set_read_timeout(patience).map_err(failed)?;
    let mut byte = [std::mem::MaybeUninit::uninit()];
    Ok(second.receive.recv(&mut byte).is_ok())
}

fn may_force() -> bool {
    UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))
        .is_ok_and(|socket| setsockopt(&socket, sockopt::RcvBufForce, &SOCKET_BUFFER_BYTES).is_ok())
}

/// What it means.
pub fn items(facts: &Facts) -> Vec<Item> {
    vec![
        segment(facts),
        gro(facts),
        group_item(facts),
        buffers(facts),
    ]
}

fn segment(facts: &Facts) -> Item {
    const NAME: &str = NAMES[0];
    match facts.segment {
        Ok(()) => Item::ok(NAME, format!("{SEGMENTS} datagrams in one send")),
        Err(errno) => Item::degraded(
            NAME,
            format!("refused: {}", read::errno_text(errno)),
            "one datagram per send",
            "Linux 4.18 or later",
        ),
    }
}

fn gro(facts: &Facts) -> Item {
    const NAME: &str = NAMES[1];
    let degraded = |found: String| {
        Item::degraded(
            NAME,
            found,
            "one datagram per receive",
            "Linux 5.0 or later",
        )
    };
    match facts.gro {
        None => Item::unknown(NAME, "no train could be sent"),
        Some(Ok(1)) => degraded("one datagram in one receive".into()),
        Some(Ok(datagrams)) => Item::ok(NAME, format!("{datagrams} datagrams in one receive")),
        Some(Err(errno)) => degraded(format!("refused: {}", read::errno_text(errno))),
    }
}

fn group_item(facts: &Facts) -> Item {
    const NAME: &str = NAMES[2];
    let degraded = |found: String| {
        let cost = "fastvpn does not start with more than one queue";
        Item::degraded(NAME, found, cost, "--queues 1")
    };
    match facts.group {
        Ok(true) => Item::ok(NAME, "a BPF program picks the worker"),
        Ok(false) => Item::degraded(
            NAME,
            "the BPF program picks the wrong worker",
            "flows may be reordered",
            "--queues 1",
        ),
        Err(errno) => degraded(format!("refused: {}", read::errno_text(errno))),
    }
}

fn buffers(facts: &Facts) -> Item {
    const NAME: &str = NAMES[3];
    let wanted = SOCKET_BUFFER_BYTES;
    if facts.may_force {
        let found = format!("{} MiB, whatever net.core.rmem_max says", wanted >> 20);
        return Item::ok(NAME, found);
    }
    let (Some(receive), Some(send)) = (facts.receive_bytes_max, facts.send_bytes_max) else {
        return Item::unknown(NAME, "net.core.rmem_max and wmem_max do not show here");
    };
    let found = format!("net.core.rmem_max={receive}, wmem_max={send}");
    if receive >= wanted && send >= wanted {
        return Item::ok(NAME, found);
    }
    Item::degraded(
        NAME,
        found,
        "datagrams are lost when a worker has to wait for its core",
        format!("sysctl -w net.core.rmem_max={wanted} net.core.wmem_max={wanted}"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::check::item::Status::{self, Degraded, Ok as Good, Unknown};

    fn statuses(facts: &Facts) -> [Status; 4] {
        let items = items(facts);
        let names: Vec<_> = items.iter().map(|item| item.name).collect();
        assert_eq!(names, NAMES);
        std::array::from_fn(|index| items[index].status)
    }

    const GOOD: Facts = Facts {
        segment: Ok(()),
        gro: Some(Ok(SEGMENTS)),
        group: Ok(true),
        may_force: false,
        receive_bytes_max: Some(SOCKET_BUFFER_BYTES),
        send_bytes_max: Some(SOCKET_BUFFER_BYTES),
    };

    #[test]
    fn every_state_has_every_item() {
        assert_eq!(statuses(&GOOD), [Good; 4]);
        let old = Facts {
            segment: Err(libc::EINVAL),
            gro: None,
            group: Err(libc::ENOPROTOOPT),
            receive_bytes_max: Some(212_992),
            ..GOOD
        };
        assert_eq!(statuses(&old), [Degraded, Unknown, Degraded, Degraded]);
        let without_gro = Facts {
            gro: Some(Ok(1)),
            may_force: true,
            receive_bytes_max: Some(212_992),
            ..GOOD
        };
        assert_eq!(statuses(&without_gro), [Good, Degraded, Good, Good]);
        let hidden = Facts {
            send_bytes_max: None,
            ..GOOD
        };
        assert_eq!(statuses(&hidden)[3], Unknown);
    }

    #[test]
    fn a_group_on_the_loopback_interface_is_steered() {
        assert!(group().unwrap());
    }
}
