//! UDP datagrams between two sockets: every one must arrive, unchanged. A few
//! are sent and waited for before the next ones, so that no socket buffer on
//! the way is ever short and any loss is a fault.

use std::io::{self, IoSlice, IoSliceMut};
use std::net::{IpAddr, UdpSocket};
use std::os::fd::AsRawFd;
use std::time::Duration;

use fastvpn::error::{Error, Result};
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg, setsockopt, sockopt,
};
use testbed::Namespace;

use crate::support::{check, enlarge_receive_buffer, fail, noise, without_backlog_drops};

/// How long a datagram may take. Long, since a machine may be busy; short
/// against a test's patience, since a loss that the machine is to blame for is
/// made good by sending again.
const ARRIVAL_MAX: Duration = Duration::from_secs(30);

/// Most datagrams on their way at a time. Three of the largest, with what the
/// kernel accounts for them, fit into a receive buffer.
const WINDOW: usize = 8;
const WINDOW_BYTES_MAX: usize = 200_000;

/// Bytes of the receive buffer, where we may have it.
const BUFFER_BYTES: usize = 4 << 20;

/// Longest payload of a UDP datagram, and room to see one that has grown.
const PAYLOAD_BYTES_MAX: usize = 65_536;

/// Which order is expected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// As sent.
    Kept,
    /// Any within a window: whole datagrams and fragments may take different
    /// queues, since fragments lack the ports that queues are picked by.
    Any,
}

/// Two sockets connected to each other, one in each of two namespaces.
pub struct Channel {
    /// The sending end.
    pub sender: UdpSocket,
    /// The receiving end.
    pub receiver: UdpSocket,
}

impl Channel {
    /// Opens both ends.
    pub fn open(from: (&Namespace, IpAddr), to: (&Namespace, IpAddr)) -> Result<Self> {
        let open = || -> io::Result<Self> {
            let bind = |(namespace, address): (&Namespace, IpAddr)| {
                namespace.run(|| UdpSocket::bind((address, 0)))
            };
            let (sender, receiver) = (bind(from)?, bind(to)?);
            sender.connect(receiver.local_addr()?)?;
            receiver.connect(sender.local_addr()?)?;
            receiver.set_read_timeout(Some(ARRIVAL_MAX))?;
            // Without CAP_NET_ADMIN over the machine: as much as there is.
            enlarge_receive_buffer(&receiver, BUFFER_BYTES);
            Ok(Self { sender, receiver })
        };
        open().map_err(|cause| Error::os(format!("no sockets for {} and {}", from.1, to.1), cause))
    }

    /// Sends one datagram for each of `sizes` and takes them in.
    pub fn exchange(&self, sizes: &[usize], order: Order) -> Result<()> {
        let mut rest = sizes;
        while !rest.is_empty() {
            let mut bytes = 0;
            let fits = |size: &&usize| {
                bytes += **size;
                bytes <= WINDOW_BYTES_MAX
            };
            let count = rest.iter().take(WINDOW).take_while(fits).count().max(1);
            let (window, later) = rest.split_at(count);
            self.exchange_window(window, order)?;
            rest = later;
        }
        Ok(())
    }

    fn exchange_window(&self, sizes: &[usize], order: Order) -> Result<()> {
        let mut expected: Vec<Vec<u8>> = sizes
            .iter()
            .enumerate()
            .map(|(index, &size)| noise((index * 100_000 + size) as u64, size))
            .collect();
        for datagram in &expected {
            let sent = self.sender.send(datagram);
            sent.map_err(|cause| {
                Error::os(format!("cannot send {} bytes", datagram.len()), cause)
            })?;
        }
        let mut buffer = vec![0; PAYLOAD_BYTES_MAX];
        while !expected.is_empty() {
            let length = self.receiver.recv(&mut buffer).map_err(|cause| {
                let missing: Vec<usize> = expected.iter().map(Vec::len).collect();
                Error::os(format!("datagrams of {missing:?} bytes missing"), cause)
            })?;
            let received = &buffer[..length];
            let found = expected.iter().position(|datagram| datagram == received);
            match found {
                Some(index) if index == 0 || order == Order::Any => {
                    expected.remove(index);
                }
                Some(_) => return fail(format!("{length} bytes overtook, of {sizes:?}")),
                None => return fail(format!("{length} bytes that were not sent, of {sizes:?}")),
            }
        }
        Ok(())
    }

    /// Sends a batch: `bytes` of payload in one call, in datagrams of
    /// `segment` bytes but the last. `with_gro`: whether the receiver takes
    /// batches in. Its datagrams must be those sent, in their order.
    pub fn exchange_batch(&self, bytes: usize, segment: usize, with_gro: bool) -> Result<()> {
        let what = format!("batch of {bytes} bytes, {segment} each");
        setsockopt(&self.receiver, sockopt::UdpGroSegment, &with_gro)
            .map_err(|errno| Error::os("no UDP_GRO", errno.into()))?;
        let payload = noise((bytes * 2000 + segment) as u64, bytes);
        let size = u16::try_from(segment).map_err(|_| Error::new("segment too long"))?;
        sendmsg::<()>(
            self.sender.as_raw_fd(),
            &[IoSlice::new(&payload)],
            &[ControlMessage::UdpGsoSegments(&size)],
            MsgFlags::empty(),
            None,
        )
        .map_err(|errno| Error::os(format!("cannot send a {what}"), errno.into()))?;
        let mut expected = payload.chunks(segment);
        while expected.len() > 0 {
            let missing = expected.len();
            let (batch, segment_bytes) = self.receive_batch().map_err(|cause| {
                Error::os(format!("{what}: {missing} datagrams missing"), cause)
            })?;
            for datagram in batch.chunks(segment_bytes.max(1)) {
                check(expected.next() == Some(datagram), || {
                    format!("{what}: datagram {missing} from the end differs")
                })?;
            }
        }
        Ok(())
    }

    /// What one receive brings, and the size of the datagrams in it.
    fn receive_batch(&self) -> io::Result<(Vec<u8>, usize)> {
        let mut buffer = vec![0; PAYLOAD_BYTES_MAX];
        let mut control = nix::cmsg_space!(i32);
        let mut slices = [IoSliceMut::new(&mut buffer)];
        let fd = self.receiver.as_raw_fd();
        let message = recvmsg::<()>(fd, &mut slices, Some(&mut control), MsgFlags::empty())?;
        let length = message.bytes;
        let segment_bytes = message.cmsgs()?.find_map(|cmsg| match cmsg {
            ControlMessageOwned::UdpGroSegments(bytes) => usize::try_from(bytes).ok(),
            _ => None,
        });
        buffer.truncate(length);
        Ok((buffer, segment_bytes.unwrap_or(length)))
    }
}

/// One datagram of each of `sizes` from the first place to the second.
pub fn exchange(
    from: (&Namespace, IpAddr),
    to: (&Namespace, IpAddr),
    sizes: &[usize],
    order: Order,
) -> Result<()> {
    without_backlog_drops(|| Channel::open(from, to)?.exchange(sizes, order))
}

/// Batches of `(bytes, segment)` from the first place to the second, to a
/// receiver with `UDP_GRO` and one without.
pub fn exchange_batches(
    from: (&Namespace, IpAddr),
    to: (&Namespace, IpAddr),
    batches: &[(usize, usize)],
) -> Result<()> {
    for with_gro in [false, true] {
        without_backlog_drops(|| {
            let channel = Channel::open(from, to)?;
            batches
                .iter()
                .try_for_each(|&(bytes, segment)| channel.exchange_batch(bytes, segment, with_gro))
        })?;
    }
    Ok(())
}
