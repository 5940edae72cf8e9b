//! The interface that datagrams leave by.

use std::net::IpAddr;

use super::ethtool::{Channels, Driver, Ethtool, Feature};
use super::item::Item;
use crate::error::Result;
use crate::host::netlink::{Netlink, RouteKind};

/// The names of the items.
pub const NAMES: [&str; 4] = [
    "interface",
    "NIC queues",
    "NIC checksums",
    "NIC UDP segmentation",
];

/// `RT_TABLE_MAIN` (`linux/rtnetlink.h`).
const TABLE_MAIN: u32 = 254;

/// What is known of the interface.
#[derive(Clone, Debug)]
pub struct Interface {
    /// Its name.
    pub name: String,
    mtu_bytes: u32,
    driver: Option<Driver>,
    channels: Option<Channels>,
    features: Option<Vec<Feature>>,
}

/// What was found.
#[derive(Clone, Debug)]
pub struct Facts {
    /// `None`: no route leads out.
    pub interface: Option<Interface>,
    /// Whether it is the way to a peer, or the default route's.
    has_peer: bool,
    /// Workers that can receive at a time.
    workers: usize,
}

/// Asks the kernel; sends nothing. `workers`: threads that could each serve a
/// receive queue.
pub fn probe(peer: Option<IpAddr>, workers: usize) -> Facts {
    Facts {
        interface: find(peer).unwrap_or_default(),
        has_peer: peer.is_some(),
        workers,
    }
}

fn find(peer: Option<IpAddr>) -> Result<Option<Interface>> {
    let mut netlink = Netlink::open()?;
    let index = match peer {
        Some(peer) => netlink.interface_to(peer)?,
        None => default_interface(&mut netlink)?,
    };
    let Some(link) = index.and_then(|index| netlink.link_by_index(index).transpose()) else {
        return Ok(None);
    };
    let link = link?;
    let ethtool = Ethtool::open().ok();
    let ethtool = ethtool.as_ref();
    Ok(Some(Interface {
        mtu_bytes: link.mtu,
        driver: ethtool.and_then(|ethtool| ethtool.driver(&link.name).ok()),
        channels: ethtool.and_then(|ethtool| ethtool.channels(&link.name).ok()),
        features: ethtool.and_then(|ethtool| ethtool.features(&link.name).ok()),
        name: link.name,
    }))
}

fn default_interface(netlink: &mut Netlink) -> Result<Option<u32>> {
    let is_default = |route: &crate::host::netlink::Route| {
        route.destination.prefix_len() == 0
            && route.kind == RouteKind::Unicast
            && route.table == TABLE_MAIN
    };
    // The kernel lists IPv4 first, and the best metric of a prefix first.
    let routes = netlink.routes()?;
    Ok(routes
        .iter()
        .find(|route| is_default(route))
        .and_then(|route| route.oif))
}

/// What it means.
pub fn items(facts: &Facts) -> Vec<Item> {
    let Some(interface) = &facts.interface else {
        let [first, rest @ ..] = NAMES;
        let first = if facts.has_peer {
            Item::info(first, "none: no route to the peer")
        } else {
            Item::info(first, "none: no default route")
        };
        let rest = rest
            .iter()
            .map(|name| Item::unknown(name, "there is no interface"));
        return std::iter::once(first).chain(rest).collect();
    };
    vec![
        describe(interface, facts.has_peer),
        queues(interface, facts.workers),
        checksums(interface),
        segmentation(interface),
    ]
}

fn describe(interface: &Interface, has_peer: bool) -> Item {
    let Interface {
        name, mtu_bytes, ..
    } = interface;
    let driver = match &interface.driver {
        Some(driver) => format!(", driver {}", driver.name),
        None => String::new(),
    };
    let way = if has_peer {
        "toward the peer"
    } else {
        "of the default route"
    };
    Item::ok(NAMES[0], format!("{name} {way}{driver}, MTU {mtu_bytes}"))
}

fn queues(interface: &Interface, workers: usize) -> Item {
    const NAME: &str = NAMES[1];
    let Some(channels) = interface.channels else {
        return Item::info(NAME, format!("{} does not say", interface.name));
    };
    let found = format!(
        "{} for receiving, {} for sending",
        channels.receive, channels.send
    );
    // Software alone hands packets on where they come from.
    let is_hardware = interface
        .driver
        .as_ref()
        .is_some_and(|driver| !driver.bus.is_empty());
    if !is_hardware {
        return Item::info(NAME, found);
    }
    let receive = channels.receive as usize;
    if receive >= workers {
        return Item::ok(NAME, found);
    }
    let name = &interface.name;
    let most = (channels.receive_max as usize).min(workers);
    let remedy = if most > receive {
        format!("ethtool -L {name} combined {most}")
    } else {
        format!("spread packets in software: RPS (/sys/class/net/{name}/queues/rx-0/rps_cpus)")
    };
    let cost = format!("{receive} of {workers} cores take datagrams from the NIC");
    Item::degraded(NAME, found, cost, remedy)
}

impl Interface {
    fn feature(&self, name: &str) -> Option<&Feature> {
        let mut features = self.features.iter().flatten();
        features.find(|feature| feature.name == name)
    }
}

fn checksums(interface: &Interface) -> Item {
    const NAME: &str = NAMES[2];
    let is_active = |name| {
        interface
            .feature(name)
            .is_some_and(|feature| feature.is_active)
    };
    let name = &interface.name;
    if interface.features.is_none() {
        return Item::info(NAME, format!("{name} does not say"));
    }
    if is_active("tx-checksum-ip-generic") || is_active("tx-checksum-ipv4") {
        return Item::ok(NAME, "summed by the device when sending");
    }
    Item::degraded(
        NAME,
        "not summed by the device when sending",
        "the kernel sums every datagram, or (before Linux 6.11) refuses UDP_SEGMENT: one datagram \
         per send",
        format!("ethtool -K {name} tx on, if the device can"),
    )
}

fn segmentation(interface: &Interface) -> Item {
    const NAME: &str = NAMES[3];
    let name = &interface.name;
    match interface.feature("tx-udp-segmentation") {
        Some(feature) if feature.is_active => Item::ok(NAME, "trains are cut by the device"),
        Some(feature) if feature.is_available => Item::degraded(
            NAME,
            "switched off",
            "the kernel cuts every train before the driver",
            format!("ethtool -K {name} tx-udp-segmentation on"),
        ),
        Some(_) => Item::info(
            NAME,
            "the device has none: the kernel cuts trains before the driver",
        ),
        None => Item::info(NAME, format!("{name} does not say")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::check::item::Status::{self, Degraded, Info, Ok as Good, Unknown};

    fn statuses(facts: &Facts) -> [Status; 4] {
        let items = items(facts);
        let names: Vec<_> = items.iter().map(|item| item.name).collect();
        assert_eq!(names, NAMES);
        std::array::from_fn(|index| items[index].status)
    }

    fn feature(name: &str, is_available: bool, is_active: bool) -> Feature {
        Feature {
            name: name.into(),
            is_available,
            is_active,
        }
    }

    fn nic() -> Interface {
        Interface {
            name: "eth0".into(),
            mtu_bytes: 1500,
            driver: Some(Driver {
                name: "e1000".into(),
                bus: "0000:00:03.0".into(),
            }),
            channels: Some(Channels {
                receive: 4,
                send: 4,
                receive_max: 8,
            }),
            features: Some(vec![
                feature("tx-checksum-ip-generic", true, true),
                feature("tx-udp-segmentation", true, true),
            ]),
        }
    }

    fn facts(interface: Option<Interface>, workers: usize) -> Facts {
        Facts {
            interface,
            has_peer: true,
            workers,
        }
    }

    #[test]
    fn every_state_has_every_item() {
        assert_eq!(statuses(&facts(Some(nic()), 4)), [Good; 4]);
        assert_eq!(statuses(&facts(None, 4)), [Info, Unknown, Unknown, Unknown]);
        let silent = Interface {
            driver: None,
            channels: None,
            features: None,
            ..nic()
        };
        assert_eq!(statuses(&facts(Some(silent), 4)), [Good, Info, Info, Info]);
    }

    #[test]
    fn few_queues_of_hardware_hold_cores_back() {
        let item = queues(&nic(), 6);
        assert_eq!(item.status, Degraded);
        assert_eq!(item.remedy.unwrap(), "ethtool -L eth0 combined 6");
        let mut full = nic();
        full.channels = Some(Channels {
            receive: 1,
            send: 1,
            receive_max: 1,
        });
        assert!(queues(&full, 2).remedy.unwrap().contains("rx-0/rps_cpus"));
        full.driver = Some(Driver {
            name: "veth".into(),
            bus: String::new(),
        });
        assert_eq!(queues(&full, 2).status, Info);
    }

    #[test]
    fn features_that_are_off_and_features_that_are_not_there() {
        let mut nic = nic();
        nic.features = Some(vec![
            feature("tx-checksum-ipv4", true, false),
            feature("tx-udp-segmentation", true, false),
        ]);
        assert_eq!(
            statuses(&facts(Some(nic.clone()), 1)),
            [Good, Good, Degraded, Degraded]
        );
        nic.features = Some(vec![feature("tx-udp-segmentation", false, false)]);
        assert_eq!(segmentation(&nic).status, Info);
    }
}
