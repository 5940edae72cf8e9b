//! io_uring: whether it is allowed, what it takes to set it up, and whether it
//! delivers. The engine itself is set up and given a frame
//! and a datagram, on a TUN device where one can be made unseen.

use std::io;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use io_uring::IoUring;
use ipnet::IpNet;
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

use super::item::Item;
use super::read::{self, Tried};
use super::{scratch, udp};
use crate::counters::Counters;
use crate::error::{Error, Result};
use crate::host::link::{self, LinkConfig};
use crate::host::netlink::Netlink;
use crate::io::engine::{Engine, Event};
use crate::io::tun::{self, Queue};
use crate::io::udp::WorkerSockets;
use crate::io::uring::Uring;
use crate::packet::coalesce::TunOffloads;
use crate::packet::train::Limits;

/// The names of the items.
pub const NAMES: [&str; 4] = [
    "io_uring",
    "io_uring flags",
    "TUN reads",
    "multishot receive",
];

/// How long the engine may take to deliver what is there already.
const DELIVERY_MAX: Duration = Duration::from_millis(500);

/// A network that nobody sees: TEST-NET-1 (RFC 5737) in a namespace of its own.
const OWN: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
const FAR: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 2);
const PROBE_NAME: &str = "probe0";

/// How a frame or a datagram came in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Delivery {
    AsMeant,
    Nothing,
}

/// What a running engine delivered.
#[derive(Clone, Copy, Debug)]
struct Delivered {
    read: Delivery,
    receive: Delivery,
    on_tun: bool,
}

/// What was found. What was not reached, after a failure, is `None`.
#[derive(Clone, Debug)]
pub struct Facts {
    /// `kernel.io_uring_disabled` and `kernel.io_uring_group` (Linux 6.6).
    disabled: Option<String>,
    group: Option<String>,
    /// A seccomp filter is in force.
    is_filtered: bool,
    /// A ring without any flag.
    plain: Tried<()>,
    /// A ring and its buffers as the engine sets them up.
    flags: Option<Tried<()>>,
    /// `Err`: there was nothing to try it on.
    delivered: Option<Tried<Delivered>>,
}

/// Sets an engine up as a tunnel does and has it deliver; where that fails, sets
/// up a plain ring to find out what it is that fails. In this order, since every
/// ring that is tried counts against the limit on locked memory for some time
/// after it is gone.
pub fn probe() -> Facts {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mut facts = Facts {
        disabled: read::sysctl("kernel/io_uring_disabled"),
        group: read::sysctl("kernel/io_uring_group"),
        is_filtered: read::status_field(&status, "Seccomp") == Some("2"),
        plain: Ok(()),
        flags: None,
        delivered: None,
    };
    let in_scratch = scratch::enter().is_ok();
    match probe_engine(in_scratch) {
        Ok(delivered) => {
            facts.flags = Some(Ok(()));
            facts.delivered = Some(delivered);
        }
        Err(refused) => {
            facts.plain = IoUring::new(8)
                .map(drop)
                .map_err(|error| read::errno(&error));
            facts.flags = facts.plain.is_ok().then_some(Err(refused));
        }
    }
    facts
}

/// The outer error is that of setting up, the inner one that of what is not
/// io_uring's.
fn probe_engine(in_scratch: bool) -> Tried<Tried<Delivered>> {
    let errno = |error: Error| error.errno().unwrap_or(libc::EIO);
    let (bench, parts) = Bench::new(in_scratch).map_err(errno)?;
    let engine = parts.engine(Arc::clone(&bench.wake)).map_err(errno)?;
    Ok(bench.deliver(engine).map_err(errno))
}

/// What feeds an engine.
struct Bench {
    device: Device,
    socket: UdpSocket,
    address: SocketAddr,
    wake: Arc<EventFd>,
}

/// What an engine reads frames from.
enum Device {
    /// A TUN device: what is sent to [`FAR`] comes out of it.
    Tun,
    /// In its place, the other end of a pair of sockets.
    Pair(OwnedFd),
}

/// What goes into an engine.
struct Parts {
    queue: Queue,
    sockets: WorkerSockets,
}

impl Parts {
    fn engine(self, wake: Arc<EventFd>) -> Result<Uring> {
        let counters = Arc::new(Counters::default());
        let Self { queue, sockets } = self;
        Uring::new(queue, sockets, wake, Limits::FULL, counters)
    }
}

impl Bench {
    fn new(in_scratch: bool) -> Result<(Self, Parts)> {
        let failed = |cause: io::Error| Error::os("cannot set up a probe", cause);
        let (queue, device) = match in_scratch.then(tun_queue) {
            Some(Ok(queue)) => (queue, Device::Tun),
            _ => {
                let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
                let (near, far) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)
                    .map_err(|errno| failed(errno.into()))?;
                (Queue::from(near), Device::Pair(far))
            }
        };
        let (mut sockets, address) = udp::open_on_loopback(1)?;
        let sockets = sockets.pop().ok_or_else(|| Error::new("no socket"))?;
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let wake = EventFd::from_value_and_flags(0, flags).map_err(|errno| failed(errno.into()))?;
        let bench = Self {
            device,
            socket: UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).map_err(failed)?,
            address,
            wake: Arc::new(wake),
        };
        Ok((bench, Parts { queue, sockets }))
    }

    /// Sends one of each and looks what the engine makes of it.
    fn deliver(&self, mut engine: Uring) -> Result<Delivered> {
        let failed = |cause: io::Error| Error::os("cannot feed a probe", cause);
        let (mut read, mut received) = (false, false);
        let deadline = Instant::now() + DELIVERY_MAX;
        while !(read && received) && Instant::now() < deadline {
            self.feed().map_err(failed)?;
            // Woken, the engine waits for nothing else.
            self.wake.write(1).map_err(|errno| failed(errno.into()))?;
            engine.submit()?;
            engine.wait()?;
            while let Some(event) = engine.next_event() {
                match event {
                    Event::Frame(frame) => {
                        read = true;
                        engine.recycle(frame);
                    }
                    Event::Datagrams { received: data, .. } => {
                        received = true;
                        engine.recycle(data);
                    }
                    Event::SendFailed(_) | Event::Wake => {}
                }
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        let delivery = |arrived| match arrived {
            false => Delivery::Nothing,
            true => Delivery::AsMeant,
        };
        Ok(Delivered {
            read: delivery(read),
            receive: delivery(received),
            on_tun: matches!(self.device, Device::Tun),
        })
    }

    fn feed(&self) -> io::Result<()> {
        const PAYLOAD: [u8; 32] = [0; 32];
        self.socket.send_to(&PAYLOAD, self.address)?;
        match &self.device {
            Device::Tun => self.socket.send_to(&PAYLOAD, (FAR, self.address.port()))?,
            Device::Pair(far) => nix::unistd::write(far, &PAYLOAD)?,
        };
        Ok(())
    }
}

/// The only queue of a device that is up.
fn tun_queue() -> Result<Queue> {
    let wanted = TunOffloads {
        tcp: true,
        udp: true,
    };
    let tun = tun::create(PROBE_NAME, 1, wanted)?;
    let config = LinkConfig {
        addresses: vec![IpNet::new_assert(OWN.into(), 24)],
        routes: Vec::new(),
        mtu_bytes: 1500,
        txqueuelen: 100,
    };
    let mut queues = tun.queues.into_iter();
    let queue = queues.next().ok_or_else(|| Error::new("no queue"))?;
    let mut netlink = Netlink::open()?;
    let index = tun::index_of(queue.as_fd())?;
    let index = index.ok_or_else(|| Error::new("the device is in another namespace"))?;
    link::bring_up(&mut netlink, index, &config, &[])?;
    Ok(queue)
}

/// What it means.
pub fn items(facts: &Facts) -> Vec<Item> {
    let delivered = facts.delivered.map(|delivered| delivered.ok());
    vec![
        usable(facts),
        step(NAMES[1], facts.flags, "single issuer, deferred task work"),
        delivery(
            NAMES[2],
            delivered.map(|found| found.map(|found| (found.read, found.on_tun))),
        ),
        delivery(
            NAMES[3],
            delivered.map(|found| found.map(|found| (found.receive, true))),
        ),
    ]
}

const KERNEL: &str = "Linux 6.1 or later";
const COST: &str = "epoll instead: more system calls, slower";

fn usable(facts: &Facts) -> Item {
    let parameter = |name: &str, value: &Option<String>| match value {
        Some(value) => format!(", {name}={value}"),
        None => String::new(),
    };
    let parameters = parameter("kernel.io_uring_disabled", &facts.disabled)
        + &parameter("kernel.io_uring_group", &facts.group);
    let Err(errno) = facts.plain else {
        return Item::ok(NAMES[0], format!("usable{parameters}"));
    };
    let found = format!("refused: {}{parameters}", read::errno_text(errno));
    let profile = "allow io_uring_setup, io_uring_enter and io_uring_register in the container's \
                   seccomp profile";
    let remedy = match (errno, facts.disabled.as_deref()) {
        (libc::EPERM, Some("2")) => "sysctl -w kernel.io_uring_disabled=0",
        (libc::EPERM, Some("1")) => {
            "sysctl -w kernel.io_uring_disabled=0, or join the group kernel.io_uring_group"
        }
        (libc::EPERM | libc::ENOSYS, _) if facts.is_filtered => profile,
        (libc::EPERM, _) => "see the machine's security modules (SELinux, AppArmor)",
        (libc::ENOSYS, _) => "a kernel with io_uring (CONFIG_IO_URING), Linux 6.1 or later",
        _ => of_limits(errno).unwrap_or(KERNEL),
    };
    Item::degraded(NAMES[0], found, COST, remedy)
}

/// What helps against a limit of the process.
fn of_limits(errno: i32) -> Option<&'static str> {
    match errno {
        libc::ENOMEM => Some("raise the limit on locked memory (ulimit -l)"),
        libc::EMFILE => Some("raise the limit on open files (ulimit -n)"),
        _ => None,
    }
}

fn step(name: &'static str, tried: Option<Tried<()>>, good: &str) -> Item {
    match tried {
        None => Item::unknown(name, "an earlier step failed"),
        Some(Ok(())) => Item::ok(name, good),
        Some(Err(errno)) => {
            let found = format!("refused: {}", read::errno_text(errno));
            Item::degraded(name, found, COST, of_limits(errno).unwrap_or(KERNEL))
        }
    }
}

/// `delivered`: how it came, and whether from what a tunnel would use.
fn delivery(name: &'static str, delivered: Option<Option<(Delivery, bool)>>) -> Item {
    match delivered {
        None => Item::unknown(name, "an earlier step failed"),
        Some(None) => Item::unknown(name, "the loopback interface carries nothing"),
        Some(Some((Delivery::AsMeant, true))) => Item::ok(name, "delivers"),
        Some(Some((Delivery::AsMeant, false))) => {
            Item::ok(name, "delivers, from a socket; on a TUN queue not probed")
        }
        Some(Some((Delivery::Nothing, _))) => Item::unknown(name, "nothing was delivered in time"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::check::item::Status::{self, Degraded, Ok as Good, Unknown};

    fn good() -> Facts {
        Facts {
            disabled: Some("0".into()),
            group: Some("-1".into()),
            is_filtered: false,
            plain: Ok(()),
            flags: Some(Ok(())),
            delivered: Some(Ok(Delivered {
                read: Delivery::AsMeant,
                receive: Delivery::AsMeant,
                on_tun: true,
            })),
        }
    }

    fn statuses(facts: &Facts) -> [Status; 4] {
        let items = items(facts);
        let names: Vec<_> = items.iter().map(|item| item.name).collect();
        assert_eq!(names, NAMES);
        std::array::from_fn(|index| items[index].status)
    }

    #[test]
    fn a_failure_leaves_the_later_steps_open() {
        assert_eq!(statuses(&good()), [Good; 4]);
        let mut facts = Facts {
            delivered: None,
            flags: Some(Err(libc::EINVAL)),
            ..good()
        };
        assert_eq!(statuses(&facts), [Good, Degraded, Unknown, Unknown]);
        facts.flags = None;
        facts.plain = Err(libc::ENOSYS);
        assert_eq!(statuses(&facts), [Degraded, Unknown, Unknown, Unknown]);
    }

    #[test]
    fn the_remedy_follows_who_forbids_it() {
        let remedy = |errno, disabled: Option<&str>, is_filtered| {
            let facts = Facts {
                plain: Err(errno),
                disabled: disabled.map(String::from),
                is_filtered,
                ..good()
            };
            let item = usable(&facts);
            assert_eq!(item.status, Degraded);
            assert!(item.cost.unwrap().contains("epoll"));
            item.remedy.unwrap()
        };
        assert!(remedy(libc::EPERM, Some("2"), true).contains("sysctl"));
        assert!(remedy(libc::EPERM, Some("1"), false).contains("io_uring_group"));
        assert!(remedy(libc::EPERM, Some("0"), true).contains("seccomp"));
        assert!(remedy(libc::ENOSYS, None, true).contains("seccomp"));
        assert!(remedy(libc::ENOSYS, None, false).contains("CONFIG_IO_URING"));
    }
}
