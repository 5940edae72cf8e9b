//! A network in a process: namespaces joined by veth pairs, for the demo, the
//! tests and the benches.
//!
//! Nothing here has a name outside the process. A [`Namespace`] is held by a
//! descriptor alone and a [`Child`] dies with the process that started it, so
//! whatever happens, SIGKILL included, the kernel takes everything back.
//!
//! - [`user`]: the rights to do this without being root.
//! - [`namespace`]: one network namespace; run code and programs in it.
//! - [`process`]: the programs, and what they cost.
//! - [`traffic`]: what to send through it.

pub mod demo;
pub mod namespace;
pub mod process;
pub mod traffic;
pub mod user;

pub use namespace::Namespace;
pub use process::{Child, cpu_ns, cpu_seconds, rss_bytes, rss_peak_bytes};
pub use user::enter_user_namespace_if_needed;

use ipnet::IpNet;

use crate::error::{Error, Result};

/// Name of the underlay's interface in both namespaces of a [`Pair`].
pub const UNDERLAY_NAME: &str = "underlay0";

/// Name of the interface inside a [`container`].
pub const CONTAINER_NAME: &str = "eth0";

/// Two hosts with a cable between them.
pub struct Pair {
    /// The host that has the first address of each given pair.
    pub a: Namespace,
    /// The host that has the second one.
    pub b: Namespace,
}

/// Makes two namespaces joined by a veth pair called [`UNDERLAY_NAME`] on both
/// sides, with the given addresses (first for `a`, second for `b`) and MTU in
/// bytes.
///
/// # Errors
/// When rights are missing (see [`enter_user_namespace_if_needed`]) or the
/// kernel refuses an address or the MTU.
pub fn pair(addresses: &[(IpNet, IpNet)], mtu: u32) -> Result<Pair> {
    let (a, b) = (Namespace::new()?, Namespace::new()?);
    let (to_a, to_b): (Vec<_>, Vec<_>) = addresses.iter().copied().unzip();
    join(&a, &b, UNDERLAY_NAME, UNDERLAY_NAME)?;
    configure(&a, UNDERLAY_NAME, &to_a, mtu)?;
    configure(&b, UNDERLAY_NAME, &to_b, mtu)?;
    Ok(Pair { a, b })
}

/// Hosts on one switch.
pub struct Switch {
    /// The switch: a bridge whose ports are `port0`, `port1` and so on, one for
    /// each host.
    pub bridge: Namespace,
    /// The hosts, whose interfaces are called [`UNDERLAY_NAME`].
    pub hosts: Vec<Namespace>,
}

/// Makes as many namespaces as there are lists of addresses, each joined to one
/// switch by a veth pair of this MTU in bytes.
///
/// # Errors
/// As [`pair`]; when the kernel has no bridges.
pub fn switch(addresses: &[Vec<IpNet>], mtu: u32) -> Result<Switch> {
    const BRIDGE_NAME: &str = "switch0";
    let bridge = Namespace::new()?;
    let mut netlink = bridge.netlink()?;
    netlink.create_bridge(BRIDGE_NAME)?;
    configure(&bridge, BRIDGE_NAME, &[], mtu)?;
    let index = index_of(&bridge, BRIDGE_NAME)?;
    let mut hosts = Vec::with_capacity(addresses.len());
    for (number, addresses) in addresses.iter().enumerate() {
        let (host, port) = (Namespace::new()?, format!("port{number}"));
        join(&host, &bridge, UNDERLAY_NAME, &port)?;
        configure(&bridge, &port, &[], mtu)?;
        netlink.set_master(index_of(&bridge, &port)?, index)?;
        configure(&host, UNDERLAY_NAME, addresses, mtu)?;
        hosts.push(host);
    }
    Ok(Switch { bridge, hosts })
}

/// Puts a container behind a host: a namespace whose interface
/// [`CONTAINER_NAME`] is joined to the host's interface `host_name`, with
/// default routes to the host's addresses. Switches forwarding on in the host.
///
/// `addresses` are pairs of the host's and the container's address.
///
/// # Errors
/// As [`pair`].
pub fn container(
    host: &Namespace,
    host_name: &str,
    addresses: &[(IpNet, IpNet)],
    mtu: u32,
) -> Result<Namespace> {
    let container = Namespace::new()?;
    let (to_host, to_container): (Vec<_>, Vec<_>) = addresses.iter().copied().unzip();
    join(host, &container, host_name, CONTAINER_NAME)?;
    configure(host, host_name, &to_host, mtu)?;
    configure(&container, CONTAINER_NAME, &to_container, mtu)?;
    for router in to_host {
        let (anywhere, forwarding) = match router {
            IpNet::V4(_) => (IpNet::V4(Default::default()), "net/ipv4/ip_forward"),
            IpNet::V6(_) => (
                IpNet::V6(Default::default()),
                "net/ipv6/conf/all/forwarding",
            ),
        };
        host.sysctl(forwarding, "1")?;
        let mut netlink = container.netlink()?;
        netlink.add_route(anywhere, Some(router.addr()), None)?;
    }
    Ok(container)
}

/// Joins two namespaces by a veth pair; its ends stay down and bare.
///
/// # Errors
/// When a name is taken or the kernel refuses.
pub fn join(a: &Namespace, b: &Namespace, name_a: &str, name_b: &str) -> Result<()> {
    a.netlink()?.create_veth(name_a, name_b, Some(b.fd()))
}

fn index_of(namespace: &Namespace, name: &str) -> Result<u32> {
    namespace
        .netlink()?
        .link_index(name)?
        .ok_or_else(|| Error::new(format!("interface {name} has vanished")))
}

fn configure(namespace: &Namespace, name: &str, addresses: &[IpNet], mtu: u32) -> Result<()> {
    let index = index_of(namespace, name)?;
    if addresses
        .iter()
        .any(|address| matches!(address, IpNet::V6(_)))
    {
        // Without a link-local address, which waits up to two seconds for
        // duplicate address detection, the host does not find its neighbours
        // for packets that it forwards.
        namespace.sysctl(&format!("net/ipv6/conf/{name}/accept_dad"), "0")?;
    }
    let mut netlink = namespace.netlink()?;
    netlink.set_mtu(index, mtu)?;
    netlink.set_up(index)?;
    for address in addresses {
        netlink.add_address(index, *address)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
