//! Datagrams inside the tunnel that look like a peer's outside: what comes out of
//! the device must not come in at the socket again, as somebody else's.

use std::net::{IpAddr, UdpSocket};

use fastvpn::error::Result;

use crate::operator::Operator;
use crate::packets::{TUNNEL_NAME, udp_packet};
use crate::routing::sources::{PORT, Victim, is_heard};
use crate::site::{Site, Sites, inside, prefixes, sites, underlay, underlay_v6};
use crate::support::{Tunnel, check, stop, tried, udp, wait_until};
use crate::tools::nft;

/// How many of a kind are tried.
const COUNT: u64 = 20;

/// A site's address outside the tunnel.
fn outside(number: u8, family: usize) -> IpAddr {
    match family {
        0 => underlay(number).into(),
        _ => underlay_v6(number).into(),
    }
}

/// Site 1 with its tunnel, which takes site 2 for the way to everywhere but to
/// site 3. The other two only send datagrams.
struct Scene {
    network: Sites,
    operator: Operator,
    /// Of the outer packets: IPv4 (0) or IPv6 (1).
    family: usize,
}

impl Scene {
    fn new(family: usize) -> Result<Self> {
        Ok(Self {
            network: sites(3)?,
            operator: Operator::new()?,
            family,
        })
    }

    fn start(&self, more: &[&str]) -> Result<Tunnel> {
        let bracketed = |number| match outside(number, self.family) {
            IpAddr::V4(address) => address.to_string(),
            IpAddr::V6(address) => format!("[{address}]"),
        };
        let peers = [bracketed(2), format!("{}={}", bracketed(3), prefixes(3))];
        let socket = self.operator.socket_text();
        // So that what site 2 may send passes the strict filter.
        let route = "172.18.2.0/24";
        let flags = ["--queues", "2", "--control", &socket, "--route", route];
        let tunnel = self.victim().start(&peers, &[&flags, more].concat())?;
        self.operator.wait()?;
        Ok(tunnel)
    }

    fn victim(&self) -> &Site {
        &self.network.all[0]
    }

    /// Site 2's socket, toward the victim's tunnel.
    fn attacker(&self) -> Result<UdpSocket> {
        let socket = udp(&self.network.all[1].host, outside(2, self.family), PORT)?;
        tried("connect", socket.connect((outside(1, self.family), PORT)))?;
        Ok(socket)
    }

    /// A datagram to the victim's tunnel, as a packet.
    fn datagram(&self, source: IpAddr, payload: &[u8]) -> Vec<u8> {
        udp_packet(source, outside(1, self.family), [PORT, PORT], payload)
    }

    /// What could stop it on its way through the victim's kernel, or not.
    fn set_reverse_path_filter(&self, value: &str) -> Result<()> {
        let host = &self.victim().host;
        for name in ["all", TUNNEL_NAME] {
            host.sysctl(&format!("net/ipv4/conf/{name}/rp_filter"), value)?;
        }
        Ok(())
    }
}

/// For all that could make them pass: the address of another peer, of the sender
/// itself, of this host, and of nobody.
#[testbed::trial(each_engine)]
fn nested_datagrams() -> Result<()> {
    for family in [0, 1] {
        let scene = Scene::new(family)?;
        let tunnel_end = scene.start(&[])?;
        let victim = Victim::new(scene.victim())?;
        let attacker = scene.attacker()?;
        let nobody = match family {
            0 => IpAddr::from([0u8; 4]),
            _ => IpAddr::from([0u8; 16]),
        };
        let sources = [3, 2, 1].map(|number| outside(number, family));
        for reverse_path_filter in ["0", "1", "2"] {
            scene.set_reverse_path_filter(reverse_path_filter)?;
            is_heard(&victim, &attacker, inside(2)[family])?;
            for source in sources.into_iter().chain([nobody]) {
                // As the peer whose address it is may send it.
                let number = if source == sources[1] { 2 } else { 3 };
                let inner = victim.packet(inside(number)[family], b"nested")?;
                let nested = scene.datagram(source, &inner);
                let before = scene.operator.dropped("source-not-allowed")?;
                for _ in 0..COUNT {
                    tried("send", attacker.send(&nested))?;
                }
                wait_until("all of them are dropped", || {
                    victim.hears_only(family, b"allowed")?;
                    Ok(scene.operator.dropped("source-not-allowed")? >= before + COUNT)
                })?;
            }
            is_heard(&victim, &attacker, inside(2)[family])?;
        }
        stop(tunnel_end)?;
    }
    Ok(())
}

/// One datagram stays one, however many others are in it.
#[testbed::trial(each_engine)]
fn datagrams_nested_by_thousands() -> Result<()> {
    const BYTES_MAX: usize = 65_500;
    for (family, header_bytes) in [(0, 28), (1, 48)] {
        let scene = Scene::new(family)?;
        let tunnel_end = scene.start(&[])?;
        let victim = Victim::new(scene.victim())?;
        let attacker = scene.attacker()?;
        scene.set_reverse_path_filter("0")?;
        is_heard(&victim, &attacker, inside(2)[family])?;
        let mut onion = victim.packet(inside(2)[family], b"nested")?;
        while onion.len() + header_bytes <= BYTES_MAX {
            onion = scene.datagram(outside(2, family), &onion);
        }
        let received = scene.operator.counter("packets_received")?;
        let dropped = scene.operator.dropped("source-not-allowed")?;
        wait_until("it arrives", || {
            tried("send", attacker.send(&onion))?;
            victim.hears_only(family, b"allowed")?;
            let more = scene.operator.counter("packets_received")? - received;
            check(more == 0, || format!("{more} packets came of it"))?;
            Ok(scene.operator.dropped("source-not-allowed")? > dropped)
        })?;
        is_heard(&victim, &attacker, inside(2)[family])?;
        stop(tunnel_end)?;
    }
    Ok(())
}

/// No source is wrong inside the tunnel, and on its way to the socket a rule makes
/// it another peer's: the socket itself has to see to it. Also that of a process
/// that takes over.
#[testbed::trial(each_engine, long)]
fn nested_datagrams_behind_nat() -> Result<()> {
    for family in [0, 1] {
        let scene = Scene::new(family)?;
        let mut tunnel_end = scene.start(&[])?;
        let host = &scene.victim().host;
        scene.set_reverse_path_filter("0")?;
        let (name, peer) = (["ip", "ip6"][family], outside(3, family));
        nft(
            host,
            &format!(
                "table {name} nat {{ chain in {{ type nat hook input priority 100; \
                 iifname {TUNNEL_NAME} udp dport {PORT} snat to {peer}; }}; }}"
            ),
        )?;
        let victim = Victim::new(scene.victim())?;
        let attacker = scene.attacker()?;
        let inner = victim.packet(inside(3)[family], b"nested")?;
        // Each is a connection of its own for the rule.
        let nested = |port: u64| {
            let ports = [20_000 + port as u16, PORT];
            udp_packet(inside(2)[family], outside(1, family), ports, &inner)
        };
        for is_taken_over in [false, true] {
            if is_taken_over {
                let new = scene.start(&["--takeover"])?;
                let old = std::mem::replace(&mut tunnel_end, new);
                check(old.wait()?.status.success(), || "no takeover".into())?;
            }
            is_heard(&victim, &attacker, inside(2)[family])?;
            let before = scene.operator.dropped("at-socket")?;
            for port in 0..COUNT {
                tried("send", attacker.send(&nested(port)))?;
            }
            wait_until("all of them are dropped", || {
                victim.hears_only(family, b"allowed")?;
                Ok(scene.operator.dropped("at-socket")? >= before + COUNT)
            })?;
            is_heard(&victim, &attacker, inside(2)[family])?;
        }
        let ended = stop(tunnel_end)?;
        check(ended.dropped("at-socket") >= COUNT, || ended.log)?;
    }
    Ok(())
}
