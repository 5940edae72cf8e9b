//! What the kernel does by itself: the cable alone, and VXLAN over it.

use fastvpn::error::Result;
use ipnet::IpNet;
use testbed::{Namespace, Pair, configure, ip};

use super::{Link, TUNNEL, TUNNEL_PREFIX, Target, UNDERLAY, UNDERLAY_MTU_BYTES};

/// RFC 7348: Ethernet, VXLAN, UDP and IPv4 headers.
const VXLAN_OVERHEAD_BYTES: u32 = 14 + 8 + 8 + 20;

const VXLAN_NAME: &str = "vxlan0";
const VXLAN_VNI: u32 = 42;
const VXLAN_PORT: u16 = 4789;

/// The cable itself: the bound of what any tunnel over it can do.
pub struct Veth;

impl Target for Veth {
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
            public_key: None,
            configuration: None,
            changes: None,
        })
    }
}

/// The kernel's own tunnel in UDP.
pub struct Vxlan;

impl Target for Vxlan {
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

    fn port(&self) -> Option<u16> {
        Some(VXLAN_PORT)
    }

    fn start(&self, pair: &Pair) -> Result<Link> {
        create(&pair.a, 0)?;
        create(&pair.b, 1)?;
        Ok(Link {
            address: TUNNEL[1].into(),
            processes: Default::default(),
            public_key: None,
            configuration: None,
            changes: None,
        })
    }
}

/// Makes the VXLAN interface of host `own`: 0 for `a`, 1 for `b`.
fn create(host: &Namespace, own: usize) -> Result<()> {
    let (local, remote) = (UNDERLAY[own], UNDERLAY[1 - own]);
    ip(
        host,
        &format!(
            "link add {VXLAN_NAME} type vxlan id {VXLAN_VNI} local {local} remote {remote} \
             dstport {VXLAN_PORT}"
        ),
    )?;
    let address = IpNet::new_assert(TUNNEL[own].into(), TUNNEL_PREFIX);
    let mtu = UNDERLAY_MTU_BYTES - VXLAN_OVERHEAD_BYTES;
    configure(host, VXLAN_NAME, &[address], mtu)
}
