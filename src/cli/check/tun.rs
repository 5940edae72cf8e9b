//! The TUN device: made for real, in a namespace that nobody else sees.
//!
//! Opening /dev/net/tun has the kernel load its module if it is not there yet,
//! as a tunnel would.

use std::fs::OpenOptions;

use super::item::Item;
use super::read::{self, Tried};
use super::scratch;
use crate::io::tun;
use crate::packet::coalesce::TunOffloads;

const NODE: &str = "/dev/net/tun";

/// The names of the items.
pub const NAMES: [&str; 5] = [NODE, "TUN queues", "TUN TSO", "TUN USO", "TUN steering"];

/// Name of the device, in its namespace.
const PROBE_NAME: &str = "probe0";

/// What a device that could be made can do.
#[derive(Clone, Copy, Debug)]
pub struct Device {
    queues: u16,
    offloads: TunOffloads,
    steered: bool,
}

/// What was found.
#[derive(Clone, Debug)]
pub struct Facts {
    /// Whether the node can be opened.
    node: Tried<()>,
    /// CAP_MKNOD: a tunnel can make the node.
    may_make_node: bool,
    /// `None`: there was no namespace to try it in, or no node.
    device: Option<Tried<Device>>,
}

/// Whether the node can be opened. Asked before anything that makes a device:
/// that makes the node too, where there is none.
pub fn probe_node() -> Tried<()> {
    let node = OpenOptions::new().read(true).write(true).open(NODE);
    node.map(drop).map_err(|error| read::errno(&error))
}

/// Makes a device with at least two queues, if that is possible unseen, and
/// lets it go again. `node` is what [`probe_node`] found.
pub fn probe(node: Tried<()>, queues: u16, may_make_node: bool) -> Facts {
    let device = (node.is_ok() && scratch::enter().is_ok()).then(|| device(queues.max(2)));
    Facts {
        node,
        may_make_node,
        device,
    }
}

fn device(queues: u16) -> Tried<Device> {
    let wanted = TunOffloads {
        tcp: true,
        udp: true,
    };
    match tun::create(PROBE_NAME, queues, wanted) {
        Ok(tun) => Ok(Device {
            queues,
            offloads: tun.offloads,
            steered: tun.steered,
        }),
        Err(error) => Err(error.errno().unwrap_or(libc::EIO)),
    }
}

/// What it means.
pub fn items(facts: &Facts) -> Vec<Item> {
    let mut items = vec![node(facts)];
    let [_, rest @ ..] = NAMES;
    match &facts.device {
        Some(Ok(device)) => items.extend(device_items(device)),
        Some(Err(errno)) => {
            items.push(refused(*errno));
            let others = rest.iter().skip(1);
            items.extend(others.map(|name| Item::unknown(name, "there is no TUN device")));
        }
        None => {
            let why = match facts.node {
                Ok(()) => scratch::REFUSED,
                Err(_) => "/dev/net/tun cannot be opened",
            };
            items.extend(rest.iter().map(|name| Item::unknown(name, why)));
        }
    }
    items
}

fn node(facts: &Facts) -> Item {
    let cost = "no TUN device can be made: fastvpn does not start";
    let load = "load the kernel module tun (modprobe tun), or pass the device into the container";
    match facts.node {
        Ok(()) => Item::ok(NODE, "can be opened"),
        Err(libc::ENOENT) if facts.may_make_node => Item::degraded(
            NODE,
            "does not exist, but can be made (CAP_MKNOD)",
            "fastvpn makes it at start, unless a container's device rules forbid it",
            load,
        ),
        Err(errno @ (libc::EACCES | libc::EPERM)) => Item::missing(
            NODE,
            read::errno_text(errno),
            cost,
            "run as root, or chmod 666 it, which is safe: making interfaces takes CAP_NET_ADMIN \
             all the same; in a container, allow the device 10:200",
        ),
        Err(errno) => Item::missing(NODE, read::errno_text(errno), cost, load),
    }
}

fn refused(errno: i32) -> Item {
    Item::missing(
        "TUN queues",
        format!("a device was refused: {}", read::errno_text(errno)),
        "fastvpn does not start",
        match errno {
            libc::E2BIG => "ask for fewer --queues",
            libc::EINVAL => "a kernel with multi-queue TUN and virtio-net headers (Linux 3.8)",
            libc::EPERM => "see the container's security profile (SELinux, AppArmor)",
            libc::EMFILE => "raise the limit on open files (ulimit -n)",
            _ => "see the kernel's log (dmesg)",
        },
    )
}

fn device_items(device: &Device) -> [Item; 4] {
    let queues = device.queues;
    [
        Item::ok(
            "TUN queues",
            format!("{queues} queues with virtio-net headers"),
        ),
        if device.offloads.tcp {
            Item::ok("TUN TSO", "accepted")
        } else {
            Item::degraded(
                "TUN TSO",
                "refused",
                "TCP crosses the TUN packet by packet",
                "a kernel with TSO on TUN devices (Linux 2.6.27)",
            )
        },
        if device.offloads.udp {
            Item::ok("TUN USO", "accepted")
        } else {
            Item::degraded(
                "TUN USO",
                "refused",
                "UDP crosses the TUN packet by packet",
                "Linux 6.2 or later",
            )
        },
        if device.steered {
            Item::ok("TUN steering", "eBPF program installed")
        } else {
            Item::degraded(
                "TUN steering",
                "eBPF program refused",
                "the TUN driver picks queues: flows may be reordered unless both ends have the \
                 same --queues",
                "see CAP_BPF, or give both ends the same --queues",
            )
        },
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::check::item::Status::{self, Degraded, Missing, Ok as Good, Unknown};

    fn statuses(
        node: Tried<()>,
        may_make_node: bool,
        device: Option<Tried<Device>>,
    ) -> [Status; 5] {
        let items = items(&Facts {
            node,
            may_make_node,
            device,
        });
        let names: Vec<_> = items.iter().map(|item| item.name).collect();
        assert_eq!(names, NAMES);
        std::array::from_fn(|index| items[index].status)
    }

    const DEVICE: Device = Device {
        queues: 2,
        offloads: TunOffloads {
            tcp: true,
            udp: true,
        },
        steered: true,
    };

    #[test]
    fn every_state_has_every_item() {
        assert_eq!(statuses(Ok(()), false, Some(Ok(DEVICE))), [Good; 5]);
        assert_eq!(
            statuses(Ok(()), false, None),
            [Good, Unknown, Unknown, Unknown, Unknown]
        );
        assert_eq!(
            statuses(Err(libc::ENOENT), false, None),
            [Missing, Unknown, Unknown, Unknown, Unknown]
        );
        assert_eq!(statuses(Err(libc::ENOENT), true, None)[0], Degraded);
        assert_eq!(statuses(Err(libc::EACCES), true, None)[0], Missing);
        assert_eq!(
            statuses(Ok(()), false, Some(Err(libc::EPERM))),
            [Good, Missing, Unknown, Unknown, Unknown]
        );
        let old = Device {
            offloads: TunOffloads {
                tcp: true,
                udp: false,
            },
            steered: false,
            ..DEVICE
        };
        assert_eq!(
            statuses(Ok(()), false, Some(Ok(old))),
            [Good, Good, Good, Degraded, Degraded]
        );
    }
}
