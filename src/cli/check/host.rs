//! What this process may do here, and what the kernel has for a tunnel: tried, with
//! the tunnel's own code.

use std::fs::OpenOptions;
use std::net::{Ipv4Addr, UdpSocket};
use std::{fs, io, thread};

use nix::sched::{CloneFlags, unshare};

use super::item::Item;
use crate::error::{Error, Result, cause_text};
use crate::host::netlink::Netlink;
use crate::io::tun::{self, Tun, steering};
use crate::io::udp::{self, SOCKET_BUFFER_BYTES, UdpOffloads, WorkerSockets};
use crate::io::uring;
use crate::packet::coalesce::TunOffloads;
use crate::testbed::effective_capabilities;
use crate::wire::Mode;

/// Its bit in `CapEff` (linux/capability.h).
const CAP_MKNOD: u32 = 27;

/// All items.
pub(super) fn items(queues: u16) -> Vec<Item> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let mut items = vec![
        Item::info("kernel", format!("Linux {}", release.trim())),
        net_admin(),
        io_uring(queues),
    ];
    items.extend(tun(queues));
    items.push(tun_steering());
    items.extend(udp(queues));
    items
}

/// Asks the kernel to change an interface that there is not: it checks the right to
/// do so first, and says `EPERM` or `ENODEV`.
fn net_admin() -> Item {
    const NAME: &str = "CAP_NET_ADMIN";
    let tried = Netlink::open().and_then(|mut netlink| netlink.set_up(i32::MAX as u32));
    match tried {
        Err(error) if error.errno() == Some(libc::EPERM) => Item::degraded(
            NAME,
            "not effective in this network namespace",
            "no TUN device can be made: fastvpn does not start",
            "run as root, or: setcap cap_net_admin,cap_bpf+ep FASTVPN; in a user namespace, use \
             a network namespace of its own",
        )
        .missing(),
        _ => Item::ok(NAME, "effective"),
    }
}

/// As a start does: one ring to choose the engine, and then one for each worker.
fn io_uring(queues: u16) -> Item {
    const NAME: &str = "io_uring";
    let (tried, cost) = match uring::probe(1) {
        Ok(()) => (
            uring::probe(queues),
            "not every worker gets a ring: fastvpn may not start without --io epoll",
        ),
        none => (none, "epoll instead: more system calls, slower"),
    };
    match tried {
        Ok(()) => Item::ok(NAME, format!("usable by {queues} workers")),
        Err(error) => Item::failed(NAME, &error, cost, "Linux 6.1 or later"),
    }
}

/// The node, and a device with at least two queues in a namespace that nobody else
/// sees. To open the node has the kernel load its module, as a tunnel would.
fn tun(queues: u16) -> Vec<Item> {
    const NAMES: [&str; 2] = ["TUN queues", "TUN USO"];
    let unknown = |why| NAMES.map(|name| Item::unknown(name, why));
    let node = tun_node(
        OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/net/tun"),
    );
    let mut items = vec![node];
    if items[0].cost.is_some() {
        items.extend(unknown("/dev/net/tun cannot be opened"));
        return items;
    }
    let device = thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET).ok()?;
        let wanted = TunOffloads {
            tcp: true,
            udp: true,
        };
        Some(tun::create("probe0", queues.max(2), wanted))
    });
    items.extend(match device.join().ok().flatten() {
        None => unknown("needs root (CAP_SYS_ADMIN), to try it in a network namespace of its own"),
        Some(Ok(device)) => tun_device(&device),
        Some(Err(error)) => {
            let cost = "fastvpn does not start";
            let [_, uso] = unknown("there is no TUN device");
            let queues = Item::failed(NAMES[0], &error, cost, "see the kernel's log (dmesg)");
            [queues.missing(), uso]
        }
    });
    items
}

/// A node that cannot be opened. With the right to, fastvpn makes a missing one.
fn tun_node(opened: io::Result<fs::File>) -> Item {
    const NAME: &str = "/dev/net/tun";
    let remedy = "run as root; load the kernel module tun (modprobe tun); in a container, pass the \
                  device in and allow it (10:200); or chmod 666 it, which is safe: making \
                  interfaces takes CAP_NET_ADMIN all the same";
    let Err(error) = opened else {
        return Item::ok(NAME, "can be opened");
    };
    let may_make = effective_capabilities().is_ok_and(|all| all & 1 << CAP_MKNOD != 0);
    if error.kind() == io::ErrorKind::NotFound && may_make {
        let found = "does not exist, but can be made (CAP_MKNOD)";
        let cost = "fastvpn makes it at start, unless a container's device rules forbid it";
        return Item::degraded(NAME, found, cost, remedy);
    }
    let cost = "no TUN device can be made: fastvpn does not start";
    Item::degraded(NAME, cause_text(&error), cost, remedy).missing()
}

fn tun_device(device: &Tun) -> [Item; 2] {
    let queues = device.queues.len();
    let cost = "UDP crosses the TUN packet by packet";
    [
        Item::ok(
            "TUN queues",
            format!("{queues} queues with virtio-net headers"),
        ),
        offload("TUN USO", device.offloads.udp, cost, "Linux 6.2 or later"),
    ]
}

fn offload(name: &'static str, is_on: bool, cost: &str, since: &str) -> Item {
    match is_on {
        true => Item::ok(name, "accepted"),
        false => Item::degraded(name, "refused", cost, since),
    }
}

fn tun_steering() -> Item {
    const NAME: &str = "TUN steering";
    match steering::probe() {
        Ok(()) => Item::ok(NAME, "the eBPF program loads"),
        Err(error) => Item::degraded(
            NAME,
            format!("the eBPF program does not load: {}", cause_text(&error)),
            "the TUN driver picks queues: flows may be reordered unless both ends have the same \
             --queues",
            "run as root outside of a user namespace, or: setcap cap_net_admin,cap_bpf+ep FASTVPN; \
             or see the seccomp profile and the kernel's lockdown",
        ),
    }
}

/// Sockets of workers that share a port of the loopback interface.
fn udp(queues: u16) -> Vec<Item> {
    const SHARED: &str = "SO_REUSEPORT";
    let (sockets, has) = match sockets(queues.max(2)) {
        Ok(opened) => opened,
        Err(error) => {
            let cost = "fastvpn does not start with more than one queue";
            let others = ["UDP_SEGMENT", "UDP_GRO", "socket buffers"];
            let others = others.map(|name| Item::unknown(name, "there are no sockets"));
            let mut items = vec![Item::failed(SHARED, &error, cost, "--queues 1")];
            items.extend(others);
            return items;
        }
    };
    let (sends, receives) = ("one datagram per send", "one datagram per receive");
    vec![
        Item::ok(SHARED, "a BPF program picks the worker"),
        offload("UDP_SEGMENT", has.segment, sends, "Linux 4.18 or later"),
        offload("UDP_GRO", has.gro, receives, "Linux 5.0 or later"),
        socket_buffers(&sockets[0]),
    ]
}

fn sockets(workers: u16) -> Result<(Vec<WorkerSockets>, UdpOffloads)> {
    let all = UdpOffloads {
        segment: true,
        gro: true,
    };
    let free_port = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0));
    let address = free_port.and_then(|socket| socket.local_addr());
    let address = address.map_err(|error| Error::os("cannot open a UDP socket", error))?;
    let sockets = udp::open(address, workers, all, Mode::Plain)?;
    Ok((sockets.workers, sockets.offloads))
}

fn socket_buffers(sockets: &WorkerSockets) -> Item {
    const NAME: &str = "socket buffers";
    let socket = &sockets.receive;
    // The kernel tells twice what was asked for (socket(7)).
    let of = |bytes: io::Result<usize>| bytes.unwrap_or(0) / 2;
    let (receive, send) = (of(socket.recv_buffer_size()), of(socket.send_buffer_size()));
    let found = format!(
        "{} KiB to receive, {} KiB to send",
        receive >> 10,
        send >> 10
    );
    let wanted = SOCKET_BUFFER_BYTES;
    match receive.min(send) >= wanted {
        true => Item::ok(NAME, found),
        false => Item::degraded(
            NAME,
            found,
            "datagrams are lost when a worker has to wait for its core",
            &format!("sysctl -w net.core.rmem_max={wanted} net.core.wmem_max={wanted}"),
        ),
    }
}
