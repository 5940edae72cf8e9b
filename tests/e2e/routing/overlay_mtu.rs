//! A path to one peer that is narrower than the tunnel: its senders are told,
//! and the other peers' are not.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};
use std::time::Duration;

use fastvpn::error::Result;
use ipnet::IpNet;
use nix::sys::socket::{getsockopt, setsockopt, sockopt};
use nix::{getsockopt_impl, setsockopt_impl, sockopt_impl};
use testbed::{CONTAINER_NAME, Namespace, StaticRoutes, UNDERLAY_NAME};

use crate::host::underlay::set_mtu;
use crate::icmp_error::{IcmpError, TOO_BIG};
use crate::packets::Tap;
use crate::site::{
    MTU_BYTES, Site, container, inside, large_ping, prefixes, tunnel, underlay, underlay_v6,
    wait_for_each_other,
};
use crate::support::{
    Tunnel, bulk, check, enlarge_receive_buffer, link, stop, tried, udp, wait_until,
};
use crate::tools::Stream;

#[testbed::trial(each_engine)]
fn one_narrow_path() -> Result<()> {
    one_narrow_path_over(Underlay::V4)
}

#[testbed::trial]
fn one_narrow_path_over_ipv6() -> Result<()> {
    one_narrow_path_over(Underlay::V6)
}

/// What the datagrams travel over.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Underlay {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Underlay {
    /// Bytes around each packet.
    pub fn overhead_bytes(self) -> u32 {
        match self {
            Self::V4 => 28,
            Self::V6 => 48,
        }
    }
}

/// Sites 1 and 3 are neighbours; site 2 is behind a router.
pub struct Network {
    underlay: Underlay,
    /// Site 1.
    pub near: Site,
    /// Site 2.
    pub far: Site,
    neighbour: Site,
    /// Its interface toward site 2 is `right`.
    router: Namespace,
    _bridge: Namespace,
}

const FAR: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(10, 211, 56, 2)),
    IpAddr::V6(Ipv6Addr::new(0xfd00, 0x56, 0, 0, 0, 0, 0, 2)),
];
const ROUTER: u8 = 254;
const FAR_ROUTER: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(10, 211, 56, ROUTER)),
    IpAddr::V6(Ipv6Addr::new(0xfd00, 0x56, 0, 0, 0, 0, 0, ROUTER as u16)),
];

fn near_underlay(number: u8) -> [IpAddr; 2] {
    [underlay(number).into(), underlay_v6(number).into()]
}

fn nets(addresses: [IpAddr; 2]) -> Vec<IpNet> {
    let net = |address: IpAddr| IpNet::new_assert(address, if address.is_ipv4() { 24 } else { 64 });
    addresses.map(net).to_vec()
}

impl Network {
    /// Makes it, without processes.
    pub fn new(underlay: Underlay) -> Result<Self> {
        let on_switch = [1, 3, ROUTER].map(|number| nets(near_underlay(number)));
        let switch = testbed::switch(&on_switch, MTU_BYTES)?;
        let mut hosts = switch.hosts.into_iter();
        let (Some(near), Some(neighbour), Some(router)) =
            (hosts.next(), hosts.next(), hosts.next())
        else {
            return crate::support::fail("three hosts");
        };
        let far = Namespace::new()?;
        testbed::join(&router, &far, "right", UNDERLAY_NAME)?;
        for (namespace, name, addresses) in
            [(&router, "right", FAR_ROUTER), (&far, UNDERLAY_NAME, FAR)]
        {
            let mut netlink = namespace.netlink()?;
            let index = link(namespace, name)?.index;
            netlink.set_up(index)?;
            for net in nets(addresses) {
                netlink.add_address(index, net)?;
            }
        }
        router.sysctl("net/ipv4/ip_forward", "1")?;
        router.sysctl("net/ipv6/conf/all/forwarding", "1")?;
        for family in [0, 1] {
            let (left, right) = (near_underlay(ROUTER)[family], FAR_ROUTER[family]);
            let behind = |addresses: [IpAddr; 2]| nets(addresses)[family].trunc();
            near.netlink()?.add_route(behind(FAR), Some(left), None)?;
            far.netlink()?
                .add_route(behind(near_underlay(1)), Some(right), None)?;
        }
        let site = |host: Namespace, number: u8| {
            Ok::<_, fastvpn::error::Error>(Site {
                number,
                container: container(&host, number)?,
                host,
            })
        };
        Ok(Self {
            underlay,
            near: site(near, 1)?,
            far: site(far, 2)?,
            neighbour: site(neighbour, 3)?,
            router,
            _bridge: switch.bridge,
        })
    }

    /// The three ends, on paths that are all as wide as the switch.
    pub fn start(&self) -> Result<Vec<Tunnel>> {
        let family = usize::from(self.underlay == Underlay::V6);
        let peer = |number: u8| {
            let at = if number == 2 {
                FAR
            } else {
                near_underlay(number)
            }[family];
            let at = match at {
                IpAddr::V4(at) => at.to_string(),
                IpAddr::V6(at) => format!("[{at}]"),
            };
            format!("{at}={}", prefixes(number))
        };
        let flags: &[&str] = &["--queues", "2"];
        let tunnels = vec![
            self.near.start(&[peer(2), peer(3)], flags)?,
            self.far.start(&[peer(1)], flags)?,
            self.neighbour.start(&[peer(1)], flags)?,
        ];
        wait_for_each_other(&self.near, &self.far)?;
        wait_for_each_other(&self.near, &self.neighbour)?;
        Ok(tunnels)
    }

    /// MTU of the tunnel while all paths are wide.
    pub fn tunnel_mtu_bytes(&self) -> u32 {
        MTU_BYTES - self.underlay.overhead_bytes()
    }

    /// Makes the path to site 2 narrow, in the middle and at its end.
    pub fn narrow(&self, mtu_bytes: u32) -> Result<()> {
        set_mtu(&self.far.host, UNDERLAY_NAME, mtu_bytes)?;
        set_mtu(&self.router, "right", mtu_bytes)
    }
}

// linux/in.h, linux/in6.h: the same numbers in both families.
const PMTUDISC_DO: libc::c_int = libc::IP_PMTUDISC_DO;
const PMTUDISC_INTERFACE: libc::c_int = libc::IP_PMTUDISC_INTERFACE;

sockopt_impl!(
    MtuDiscover,
    SetOnly,
    libc::IPPROTO_IP,
    libc::IP_MTU_DISCOVER,
    libc::c_int
);
sockopt_impl!(
    MtuDiscoverV6,
    SetOnly,
    libc::IPPROTO_IPV6,
    libc::IPV6_MTU_DISCOVER,
    libc::c_int
);
sockopt_impl!(
    /// What the kernel takes for the MTU of a connected socket's path.
    PathMtuV6,
    GetOnly,
    libc::IPPROTO_IPV6,
    libc::IPV6_MTU,
    libc::c_int
);

/// Datagrams of exact sizes from one container to another.
pub struct Probe {
    sender: UdpSocket,
    receiver: UdpSocket,
    is_v4: bool,
}

impl Probe {
    /// `discovery`: what the sender does about long packets.
    pub fn open(from: &Site, to: &Site, family: usize, discovery: libc::c_int) -> Result<Self> {
        let (source, target) = (inside(from.number)[family], inside(to.number)[family]);
        let receiver = udp(&to.container, target, 0)?;
        enlarge_receive_buffer(&receiver, 1 << 20);
        let address = tried("read an address", receiver.local_addr())?;
        let sender = udp(&from.container, source, 0)?;
        tried("connect", sender.connect(address))?;
        let set = match target {
            IpAddr::V4(_) => setsockopt(&sender, MtuDiscover, &discovery),
            IpAddr::V6(_) => setsockopt(&sender, MtuDiscoverV6, &discovery),
        };
        tried("set MTU_DISCOVER", set.map_err(io::Error::from))?;
        Ok(Self {
            sender,
            receiver,
            is_v4: target.is_ipv4(),
        })
    }

    /// What the sender's kernel takes for the path's MTU.
    pub fn path_mtu_bytes(&self) -> Result<u32> {
        let mtu = match self.is_v4 {
            true => getsockopt(&self.sender, sockopt::IpMtu),
            false => getsockopt(&self.sender, PathMtuV6),
        };
        let mtu = tried("read the path MTU", mtu.map_err(io::Error::from))?;
        Ok(mtu as u32)
    }

    /// Sends a packet of this length, headers included.
    fn send(&self, packet_bytes: u32) -> io::Result<()> {
        let headers = if self.is_v4 { 28 } else { 48 };
        let payload = vec![7; packet_bytes as usize - headers];
        self.sender.send(&payload).map(drop)
    }

    /// Sends packets of this length until one has arrived.
    pub fn passes(&self, packet_bytes: u32) -> Result<()> {
        let mut buffer = vec![0; 2000];
        let headers = if self.is_v4 { 28 } else { 48 };
        let timeout = Some(Duration::from_millis(500));
        tried("set a timeout", self.receiver.set_read_timeout(timeout))?;
        wait_until(&format!("a packet of {packet_bytes} bytes passes"), || {
            // An error that an earlier one brought is told once.
            if self.send(packet_bytes).is_err() {
                return Ok(false);
            }
            let length = self.receiver.recv(&mut buffer);
            Ok(length.is_ok_and(|length| length + headers == packet_bytes as usize))
        })
    }

    /// Sends long packets until the sender's kernel has heard that this is the
    /// longest; such packets pass, and longer ones are refused.
    pub fn learns(&self, longest_bytes: u32, too_long_bytes: u32) -> Result<()> {
        let mut seen = 0;
        let learnt = wait_until("the sender learns", || {
            let _ = self.send(too_long_bytes);
            std::thread::sleep(Duration::from_millis(20));
            seen = self.path_mtu_bytes()?;
            Ok(seen == longest_bytes)
        });
        learnt.map_err(|error| {
            fastvpn::error::Error::new(format!("{error}: {seen}, not {longest_bytes} bytes"))
        })?;
        self.passes(longest_bytes)?;
        let refused = self.send(longest_bytes + 1);
        let errno = refused.as_ref().err().and_then(io::Error::raw_os_error);
        check(errno == Some(libc::EMSGSIZE), || {
            format!("{} bytes: {refused:?}", longest_bytes + 1)
        })?;
        let after = self.path_mtu_bytes()?;
        check(after == longest_bytes, || {
            format!("then {after}, not {longest_bytes} bytes")
        })
    }
}

/// A router on the way to one of two peers turns out to be narrow.
fn one_narrow_path_over(underlay: Underlay) -> Result<()> {
    const NARROW_BYTES: u32 = 1400;
    let network = Network::new(underlay)?;
    let tunnels = network.start()?;
    let (near, far, neighbour) = (&network.near, &network.far, &network.neighbour);
    let wide_bytes = network.tunnel_mtu_bytes();
    for family in [0, 1] {
        for to in [far, neighbour] {
            let probe = Probe::open(near, to, family, PMTUDISC_DO)?;
            probe.learns(wide_bytes, MTU_BYTES)?;
        }
    }
    let streams = [
        Stream::start(&near.container, &far.container, inside(2)[0])?,
        Stream::start(&far.container, &near.container, inside(1)[1])?,
        Stream::start(&near.container, &neighbour.container, inside(3)[0])?,
    ];
    streams.iter().try_for_each(Stream::wait_for_progress)?;
    network.narrow(NARROW_BYTES)?;
    streams.iter().try_for_each(Stream::wait_for_progress)?;

    let longest_bytes = NARROW_BYTES - underlay.overhead_bytes();
    for family in [0, 1] {
        let is_v4 = family == 0;
        // What may be fragmented still passes, as long as the tunnel takes it; over
        // IPv6 its sender has to do it (docs/mtu.md).
        if is_v4 && underlay == Underlay::V4 {
            let probe = Probe::open(near, far, family, PMTUDISC_INTERFACE)?;
            probe.passes(wide_bytes)?;
        }
        let tap = Tap::on_ethernet(&near.container, CONTAINER_NAME, is_v4)?;
        let probe = Probe::open(near, far, family, PMTUDISC_DO)?;
        probe.learns(longest_bytes, wide_bytes)?;
        // A second sender learns it from a report that this test looks at.
        let port = tried("read an address", probe.receiver.local_addr())?.port();
        let ignorant = Probe::open(near, far, family, libc::IP_PMTUDISC_PROBE)?;
        tried(
            "connect",
            ignorant.sender.connect((inside(2)[family], port)),
        )?;
        let mut error = None;
        wait_until("a report that a packet was too long", || {
            let _ = ignorant.send(wide_bytes);
            let is_it = |packet: &[u8]| {
                IcmpError::parse(packet).is_some_and(|error| {
                    error.is_about_port(port) && error.mtu_bytes() == longest_bytes
                })
            };
            error = tap
                .next_within(Duration::from_millis(500), is_it)?
                .as_deref()
                .and_then(IcmpError::parse);
            Ok(error.is_some())
        })?;
        check(
            error.as_ref().is_some_and(|error| {
                error.kind == TOO_BIG[family]
                    && error.intact
                    && error.from == tunnel(1)[family]
                    && error.to == inside(1)[family]
            }),
            || format!("{error:?}"),
        )?;
        // The other peer's path is as wide as ever.
        let probe = Probe::open(near, neighbour, family, PMTUDISC_DO)?;
        probe.passes(wide_bytes)?;
        let mtu = probe.path_mtu_bytes()?;
        check(mtu == wide_bytes, || {
            format!("{mtu} bytes to the neighbour")
        })?;
    }
    streams.iter().try_for_each(Stream::wait_for_progress)?;
    for stream in streams {
        stream.finish()?;
    }
    for family in [0, 1] {
        large_ping(&near.container, inside(2)[family], 20_000)?;
        bulk(&near.container, &far.container, inside(2)[family], 3)?;
        bulk(&far.container, &near.container, inside(1)[family], 3)?;
        // From the host itself, too.
        bulk(&near.host, &far.container, inside(2)[family], 3)?;
    }
    let mut ended = Vec::new();
    for tunnel in tunnels {
        ended.push(stop(tunnel)?);
    }
    check(ended[0].dropped("too-big") > 0, || ended[0].log.clone())?;
    check(ended[2].dropped("too-big") == 0, || ended[2].log.clone())
}

/// The host's own interface is narrower than when the tunnel started: all peers
/// are behind it.
#[testbed::trial(each_engine)]
fn the_hosts_own_narrow_way() -> Result<()> {
    const NARROW_BYTES: u32 = 1400;
    let network = Network::new(Underlay::V4)?;
    let tunnels = network.start()?;
    let (near, neighbour) = (&network.near, &network.neighbour);
    let wide_bytes = network.tunnel_mtu_bytes();
    let stream = Stream::start(&near.container, &neighbour.container, inside(3)[0])?;
    stream.wait_for_progress()?;
    set_mtu(&near.host, UNDERLAY_NAME, NARROW_BYTES)?;
    stream.wait_for_progress()?;
    for family in [0, 1] {
        let probe = Probe::open(near, neighbour, family, PMTUDISC_DO)?;
        probe.learns(NARROW_BYTES - 28, wide_bytes)?;
    }
    let probe = Probe::open(near, neighbour, 0, PMTUDISC_INTERFACE)?;
    probe.passes(wide_bytes)?;
    stream.wait_for_progress()?;
    // Wide again: whoever tries long packets gets them through.
    set_mtu(&near.host, UNDERLAY_NAME, MTU_BYTES)?;
    for family in [0, 1] {
        let probe = Probe::open(near, neighbour, family, libc::IP_PMTUDISC_PROBE)?;
        probe.passes(wide_bytes)?;
    }
    stream.wait_for_progress()?;
    stream.finish()?;
    tunnels.into_iter().try_for_each(|end| stop(end).map(drop))
}

/// IPv6 inside has to have 1280 bytes (RFC 8200, section 5), even where the path
/// has less than that for it: what is that long is fragmented around.
#[testbed::trial(each_engine)]
fn too_narrow_for_ipv6_inside() -> Result<()> {
    const NARROW_BYTES: u32 = 1300;
    let network = Network::new(Underlay::V4)?;
    let tunnels = network.start()?;
    let (near, far) = (&network.near, &network.far);
    let wide_bytes = network.tunnel_mtu_bytes();
    let streams = [
        Stream::start(&near.container, &far.container, inside(2)[0])?,
        Stream::start(&near.container, &far.container, inside(2)[1])?,
    ];
    streams.iter().try_for_each(Stream::wait_for_progress)?;
    network.narrow(NARROW_BYTES)?;
    streams.iter().try_for_each(Stream::wait_for_progress)?;
    let probe = Probe::open(near, far, 0, PMTUDISC_DO)?;
    probe.learns(NARROW_BYTES - 28, wide_bytes)?;
    let probe = Probe::open(near, far, 1, PMTUDISC_DO)?;
    probe.learns(1280, wide_bytes)?;
    streams.iter().try_for_each(Stream::wait_for_progress)?;
    for stream in streams {
        stream.finish()?;
    }
    tunnels.into_iter().try_for_each(|end| stop(end).map(drop))
}
