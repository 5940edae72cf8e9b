//! What the kernel does by itself: the cable alone, and VXLAN over it.

use std::net::IpAddr;

use fastvpn::error::{Error, Result};
use fastvpn::host::netlink;
use fastvpn::testbed::{Namespace, Pair};
use ipnet::IpNet;

use super::{Contender, Link, TUNNEL, TUNNEL_PREFIX, UNDERLAY, UNDERLAY_MTU_BYTES};

/// RFC 7348: Ethernet, VXLAN, UDP and IPv4 headers.
const VXLAN_OVERHEAD_BYTES: u32 = 14 + 8 + 8 + 20;

const VXLAN_NAME: &str = "vxlan0";
const VXLAN_VNI: u32 = 42;
const VXLAN_PORT: u16 = 4789;

/// The cable itself: the bound of what any tunnel over it can do.
pub struct Veth;

impl Contender for Veth {
    fn key(&self) -> &'static str {
        "veth"
    }

    fn title(&self) -> &'static str {
        "bare veth"
    }

    fn detail(&self) -> String {
        format!("no tunnel, MTU {UNDERLAY_MTU_BYTES}")
    }

    fn missing(&self) -> Option<String> {
        None
    }

    fn start(&self, _pair: &Pair) -> Result<Link> {
        Ok(Link {
            address: UNDERLAY[1].into(),
            processes: Default::default(),
            configuration: None,
            changes: None,
        })
    }
}

/// The kernel's own tunnel in UDP.
pub struct Vxlan;

impl Contender for Vxlan {
    fn key(&self) -> &'static str {
        "vxlan"
    }

    fn title(&self) -> &'static str {
        "kernel VXLAN"
    }

    fn detail(&self) -> String {
        format!(
            "the kernel's defaults, MTU {}",
            UNDERLAY_MTU_BYTES - VXLAN_OVERHEAD_BYTES
        )
    }

    fn missing(&self) -> Option<String> {
        // The only way to know is to make one.
        let create = || {
            let namespace = Namespace::new()?;
            create(&namespace, 0)
        };
        create().err().map(|error| error.to_string())
    }

    fn start(&self, pair: &Pair) -> Result<Link> {
        create(&pair.a, 0)?;
        create(&pair.b, 1)?;
        Ok(Link {
            address: TUNNEL[1].into(),
            processes: Default::default(),
            configuration: None,
            changes: None,
        })
    }
}

/// Makes the VXLAN interface of host `own`: 0 for `a`, 1 for `b`.
fn create(host: &Namespace, own: usize) -> Result<()> {
    let mut netlink = host.netlink()?;
    let vxlan = netlink::Vxlan {
        vni: VXLAN_VNI,
        local: UNDERLAY[own].into(),
        remote: UNDERLAY[1 - own].into(),
        port: VXLAN_PORT,
    };
    netlink.create_vxlan(VXLAN_NAME, vxlan)?;
    let index = netlink
        .link_index(VXLAN_NAME)?
        .ok_or_else(|| Error::new(format!("interface {VXLAN_NAME} has vanished")))?;
    netlink.set_mtu(index, UNDERLAY_MTU_BYTES - VXLAN_OVERHEAD_BYTES)?;
    let address = IpAddr::from(TUNNEL[own]);
    netlink.add_address(index, IpNet::new_assert(address, TUNNEL_PREFIX))?;
    netlink.set_up(index)
}
