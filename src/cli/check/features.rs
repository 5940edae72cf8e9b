//! What the kernel has for a tunnel: tried, with the tunnel's own code.

use std::fs::OpenOptions;
use std::io;
use std::net::{Ipv4Addr, UdpSocket};
use std::thread;

use nix::sched::{CloneFlags, unshare};

use super::report::Item;
use crate::error::{Error, Result, cause_text};
use crate::io::tun::{self, Tun, steering};
use crate::io::udp::{self, UdpOffloads};
use crate::io::uring;
use crate::packet::coalesce::TunOffloads;
use crate::testbed::effective_capabilities;

/// Name of the device that is tried, in its namespace.
const PROBE_NAME: &str = "probe0";

/// Its bit in `CapEff` (linux/capability.h).
const CAP_MKNOD: u32 = 27;

/// How often a free port is looked for.
const PORT_TRIES_MAX: usize = 4;

/// All items.
pub(super) fn items(queues: u16) -> Vec<Item> {
    let mut items = vec![io_uring(uring::probe())];
    items.extend(tun(queues));
    items.push(tun_steering(steering::probe()));
    items.extend(udp());
    items
}

fn io_uring(tried: Result<()>) -> Item {
    const NAME: &str = "io_uring";
    match tried {
        Ok(()) => Item::ok(NAME, "usable"),
        Err(error) => Item::degraded(
            NAME,
            error.fault(),
            "epoll instead: more system calls, slower",
            error.remedy().unwrap_or("Linux 6.1 or later"),
        ),
    }
}

/// The node, and a device with at least two queues in a namespace that nobody else
/// sees. To open the node has the kernel load its module, as a tunnel would.
fn tun(queues: u16) -> Vec<Item> {
    const NODE: &str = "/dev/net/tun";
    const NAMES: [&str; 3] = ["TUN queues", "TUN TSO", "TUN USO"];
    let unknown = |why: &str| NAMES.map(|name| Item::unknown(name, why));
    let mut items = Vec::new();
    match OpenOptions::new().read(true).write(true).open(NODE) {
        Ok(_) => items.push(Item::ok(NODE, "can be opened")),
        Err(error) => {
            items.push(tun_node(NODE, &error));
            items.extend(unknown("/dev/net/tun cannot be opened"));
            return items;
        }
    }
    let device = thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET).ok()?;
        let wanted = TunOffloads {
            tcp: true,
            udp: true,
        };
        Some(tun::create(PROBE_NAME, queues.max(2), wanted))
    });
    let device = device.join().ok().flatten();
    items.extend(match device {
        None => unknown("needs root (CAP_SYS_ADMIN), to try it in a network namespace of its own"),
        Some(Ok(device)) => tun_device(&device),
        Some(Err(error)) => {
            let mut items = unknown("there is no TUN device");
            let remedy = error.remedy().unwrap_or("see the kernel's log (dmesg)");
            let cost = "fastvpn does not start";
            items[0] = Item::missing(NAMES[0], error.fault(), cost, remedy);
            items
        }
    });
    items
}

/// A node that cannot be opened. With the right to, fastvpn makes a missing one.
fn tun_node(name: &'static str, error: &io::Error) -> Item {
    let remedy = "run as root; load the kernel module tun (modprobe tun); in a container, pass the \
                  device in and allow it (10:200); or chmod 666 it, which is safe: making \
                  interfaces takes CAP_NET_ADMIN all the same";
    let may_make = effective_capabilities().is_ok_and(|all| all & 1 << CAP_MKNOD != 0);
    if error.kind() == io::ErrorKind::NotFound && may_make {
        let found = "does not exist, but can be made (CAP_MKNOD)";
        let cost = "fastvpn makes it at start, unless a container's device rules forbid it";
        return Item::degraded(name, found, cost, remedy);
    }
    let cost = "no TUN device can be made: fastvpn does not start";
    Item::missing(name, cause_text(error), cost, remedy)
}

fn tun_device(device: &Tun) -> [Item; 3] {
    let offload = |is_on, name, cost, remedy| match is_on {
        true => Item::ok(name, "accepted"),
        false => Item::degraded(name, "refused", cost, remedy),
    };
    let queues = device.queues.len();
    [
        Item::ok(
            "TUN queues",
            format!("{queues} queues with virtio-net headers"),
        ),
        offload(
            device.offloads.tcp,
            "TUN TSO",
            "TCP crosses the TUN packet by packet",
            "a kernel with TSO on TUN devices (Linux 2.6.27)",
        ),
        offload(
            device.offloads.udp,
            "TUN USO",
            "UDP crosses the TUN packet by packet",
            "Linux 6.2 or later",
        ),
    ]
}

fn tun_steering(tried: io::Result<()>) -> Item {
    const NAME: &str = "TUN steering";
    match tried {
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

/// Sockets of two workers that share a port of the loopback interface.
fn udp() -> [Item; 3] {
    let tried = sockets();
    let offload = |name, is_on: fn(&UdpOffloads) -> bool, cost, since| match &tried {
        Ok(offloads) if is_on(offloads) => Item::ok(name, "accepted"),
        Ok(_) => Item::degraded(name, "refused", cost, since),
        Err(_) => Item::unknown(name, "there are no sockets"),
    };
    let (sends, receives) = ("one datagram per send", "one datagram per receive");
    let has_gro = |offloads: &UdpOffloads| offloads.gro;
    [
        offload(
            "UDP_SEGMENT",
            |all| all.segment,
            sends,
            "Linux 4.18 or later",
        ),
        offload("UDP_GRO", has_gro, receives, "Linux 5.0 or later"),
        match &tried {
            Ok(_) => Item::ok("SO_REUSEPORT", "a BPF program picks the worker"),
            Err(error) => Item::degraded(
                "SO_REUSEPORT",
                error.fault(),
                "fastvpn does not start with more than one queue",
                "--queues 1",
            ),
        },
    ]
}

fn sockets() -> Result<UdpOffloads> {
    let all = UdpOffloads {
        segment: true,
        gro: true,
    };
    let mut tries = 0;
    loop {
        tries += 1;
        let free_port = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0));
        let address = free_port.and_then(|socket| socket.local_addr());
        let address =
            address.map_err(|cause| Error::os("cannot open a UDP socket on 127.0.0.1", cause))?;
        match udp::open(address, 2, all) {
            // Somebody else was quicker.
            Err(error) if error.errno() == Some(libc::EADDRINUSE) && tries < PORT_TRIES_MAX => {}
            result => return result.map(|(_, offloads)| offloads),
        }
    }
}
