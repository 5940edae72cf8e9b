//! A multi-queue TUN device with offloads (`Documentation/networking/tuntap.rst`
//! and `drivers/net/tun.c` in the kernel tree).

pub mod steering;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::net::if_::if_nametoindex;
use tun_rs::{DeviceBuilder, SyncDevice};

use crate::error::{Error, Result};
use crate::packet::coalesce::TunOffloads;

mod ioctl {
    // TUNSETOFFLOAD, TUNGETIFF, TUNGETDEVNETNS (Linux 5.2), `linux/if_tun.h`. The
    // second is declared to take an `unsigned int`, and fills a `struct ifreq`.
    nix::ioctl_write_int!(set_offload, b'T', 208);
    nix::ioctl_read_bad!(
        get_interface,
        nix::request_code_read!(b'T', 210, 4),
        libc::ifreq
    );
    nix::ioctl_none!(get_namespace, b'T', 227);
}

/// One queue of the device: a descriptor that reads and writes vnet packets with a
/// virtio-net header, without waiting.
#[derive(Debug)]
pub struct Queue(OwnedFd);

impl AsFd for Queue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Index of the device that `queue` belongs to, whatever it is called by now;
/// `None` once it has been moved to another network namespace than the calling
/// thread's.
///
/// # Errors
/// When the device has been deleted, or the kernel refuses.
pub fn index_of(queue: BorrowedFd<'_>) -> Result<Option<u32>> {
    /// Somebody may rename it between two steps.
    const ATTEMPTS: usize = 10;
    for _ in 0..ATTEMPTS {
        let failed = |error: io::Error| match error.raw_os_error() {
            Some(libc::EBADFD) => Error::new("the TUN device has been deleted"),
            _ => Error::os("cannot find the TUN device", error),
        };
        let name = name_of(queue).map_err(failed)?;
        match is_here(queue).map_err(failed)? {
            Some(false) => return Ok(None),
            // The name has to tell.
            None => return index_named(&name).map_err(failed),
            Some(true) => {}
        }
        if let Some(index) = index_named(&name).map_err(failed)? {
            return Ok(Some(index));
        }
    }
    Err(Error::new("the TUN device's name changes all the time"))
}

fn index_named(name: &str) -> io::Result<Option<u32>> {
    match if_nametoindex(name) {
        Ok(index) => Ok(Some(index)),
        Err(Errno::ENODEV) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

fn name_of(queue: BorrowedFd<'_>) -> io::Result<String> {
    // SAFETY: a `struct ifreq` is valid with all bytes zero.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // SAFETY: the descriptor is open, and the kernel writes one `struct ifreq`.
    unsafe { ioctl::get_interface(queue.as_raw_fd(), &raw mut request) }?;
    let name = request.ifr_name.iter().map(|&byte| byte as u8);
    let name = name.take_while(|&byte| byte != 0).collect();
    String::from_utf8(name).map_err(io::Error::other)
}

/// Whether the device is in the calling thread's network namespace; `None` if
/// the kernel does not tell, as before Linux 5.2.
fn is_here(queue: BorrowedFd<'_>) -> io::Result<Option<bool>> {
    // SAFETY: the descriptor is open, and the request has no argument.
    let namespace = match unsafe { ioctl::get_namespace(queue.as_raw_fd()) } {
        Err(Errno::EINVAL | Errno::EPERM) => return Ok(None),
        namespace => namespace?,
    };
    // SAFETY: the call returned a new descriptor that nobody else has.
    let namespace = File::from(unsafe { OwnedFd::from_raw_fd(namespace) });
    let its = namespace.metadata()?;
    let own = std::fs::metadata("/proc/thread-self/ns/net").ok();
    Ok(own.map(|own| (its.dev(), its.ino()) == (own.dev(), own.ino())))
}

/// Tests and probes put another descriptor in a queue's place: any that keeps
/// the boundaries of what is written, and does not wait.
impl From<OwnedFd> for Queue {
    fn from(fd: OwnedFd) -> Self {
        Self(fd)
    }
}

/// A new device and its queues. It exists as long as any queue does.
#[derive(Debug)]
pub struct Tun {
    /// One per worker.
    pub queues: Vec<Queue>,
    /// The GSO packets that pass in both directions.
    pub offloads: TunOffloads,
    /// Whether a flow's queue depends on the flow alone; see [`steering`].
    pub steered: bool,
}

/// Makes the device `name` with `queues` queues, down and without addresses.
/// `wanted` says which offloads to try.
///
/// # Errors
/// When the name is in use, or the privilege or `/dev/net/tun` is missing.
pub fn create(name: &str, queues: u16, wanted: TunOffloads) -> Result<Tun> {
    // Opening a name that exists would join that device, not make one.
    if if_nametoindex(name).is_ok() {
        return Err(Error::new(format!("interface {name} exists already"))
            .hint("stop what uses it, or choose another name with --tun"));
    }
    let failed = |error: io::Error| create_error(name, error);
    let first = DeviceBuilder::new()
        .name(name)
        .multi_queue(true)
        .offload(true)
        .enable(false)
        .build_sync()
        .map_err(failed)?;
    let usable = TunOffloads {
        tcp: wanted.tcp,
        udp: wanted.udp && first.udp_gso(),
    };
    let mut devices = Vec::with_capacity(usize::from(queues));
    for _ in 1..queues {
        devices.push(first.try_clone().map_err(failed)?);
    }
    devices.insert(0, first);
    let queues = devices
        .into_iter()
        .map(into_queue)
        .collect::<io::Result<Vec<_>>>()
        .map_err(failed)?;
    // The offloads belong to the device, not to the queue: set them last.
    if let Some(queue) = queues.first() {
        set_offloads(queue, usable).map_err(failed)?;
    }
    let steered = match queues.first() {
        Some(queue) if queues.len() > 1 => steering::install(queue)
            .inspect_err(|error| tracing::debug!("no eBPF steering: {error}"))
            .is_ok(),
        _ => true,
    };
    Ok(Tun {
        queues,
        offloads: usable,
        steered,
    })
}

fn into_queue(device: SyncDevice) -> io::Result<Queue> {
    // SAFETY: `into_raw_fd` gives up ownership of an open descriptor.
    let fd = unsafe { OwnedFd::from_raw_fd(device.into_raw_fd()) };
    let flags = OFlag::from_bits_truncate(fcntl(&fd, FcntlArg::F_GETFL)?);
    fcntl(&fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(Queue(fd))
}

fn set_offloads(queue: &Queue, offloads: TunOffloads) -> io::Result<()> {
    let mut flags = 0;
    if offloads.tcp {
        flags |= libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6;
    }
    if offloads.udp {
        flags |= libc::TUN_F_CSUM | libc::TUN_F_USO4 | libc::TUN_F_USO6;
    }
    // SAFETY: the descriptor is open, and the request takes a plain integer.
    unsafe { ioctl::set_offload(queue.as_fd().as_raw_fd(), flags.into()) }?;
    Ok(())
}

fn create_error(name: &str, error: io::Error) -> Error {
    match error.raw_os_error() {
        Some(libc::EACCES) => {
            Error::os("cannot open /dev/net/tun", error).hint("run as root or grant CAP_NET_ADMIN")
        }
        Some(libc::ENOTTY) => {
            Error::new("/dev/net/tun is not the TUN device, which is character device 10:200")
                .hint("remove what is there, and make it with `mknod /dev/net/tun c 10 200`")
        }
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => {
            Error::os("cannot open /dev/net/tun", error)
                .hint("load the kernel module tun, or pass the device into the container")
        }
        Some(libc::EPERM) => Error::os(format!("cannot create TUN device {name}"), error)
            .hint("run as root or grant CAP_NET_ADMIN"),
        Some(libc::EBUSY) => Error::os(format!("cannot create TUN device {name}"), error)
            .hint("stop what uses it, or choose another name with --tun"),
        Some(libc::E2BIG) => Error::os(format!("cannot create TUN device {name}"), error)
            .hint("ask for fewer --queues"),
        _ => Error::os(format!("cannot create TUN device {name}"), error),
    }
}
