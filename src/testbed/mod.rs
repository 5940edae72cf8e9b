//! Networks inside one machine: namespaces joined by veth pairs, programs in
//! them, and traffic between them. This is what the demo needs, and tests and benches
//! share it. What only they need is in the crate `testbed`.
//!
//! Nothing here has a name outside the process. A [`Namespace`] is held by a
//! descriptor alone and a [`Child`] dies with the process that started it, so
//! whatever happens, SIGKILL included, the kernel takes everything back.

pub mod demo;
mod namespace;
mod process;
pub mod traffic;
mod user;

pub use namespace::{Namespace, result_of};
pub use process::Child;
pub(crate) use user::effective_capabilities;
pub use user::enter_user_namespace_if_needed;

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use ipnet::IpNet;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{
    InfoData, InfoKind, InfoVeth, LinkAttribute, LinkInfo, LinkMessage,
};
use nix::sched::{CloneFlags, setns};

use crate::error::{Error, Result};

/// Name of the underlay's interface in both namespaces of a [`Pair`].
pub const UNDERLAY_NAME: &str = "underlay0";

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

/// Joins two namespaces by a veth pair; its ends stay down and bare.
///
/// # Errors
/// When a name is taken or the kernel refuses.
pub fn join(a: &Namespace, b: &Namespace, name_a: &str, name_b: &str) -> Result<()> {
    let name = |name: &str| LinkAttribute::IfName(name.to_string());
    let mut far_end = LinkMessage::default();
    far_end.attributes = vec![name(name_b), LinkAttribute::NetNsFd(b.fd().as_raw_fd())];
    let veth = InfoData::Veth(InfoVeth::Peer(far_end));
    let info = vec![LinkInfo::Kind(InfoKind::Veth), LinkInfo::Data(veth)];
    let mut message = LinkMessage::default();
    message.attributes = vec![name(name_a), LinkAttribute::LinkInfo(info)];
    let what = format!("cannot create interface {name_a}");
    let message = RouteNetlinkMessage::NewLink(message);
    a.netlink()?
        .request(message, NLM_F_CREATE | NLM_F_EXCL, &what)
}

/// Gives an interface its addresses and its MTU, and brings it up.
///
/// # Errors
/// When there is no such interface or the kernel refuses.
pub fn configure(namespace: &Namespace, name: &str, addresses: &[IpNet], mtu: u32) -> Result<()> {
    let mut netlink = namespace.netlink()?;
    let index = netlink
        .link_index(name)?
        .ok_or_else(|| Error::new(format!("there is no interface {name}")))?;
    if addresses.iter().any(|net| net.addr().is_ipv6()) {
        // Without a link-local address, which waits up to two seconds for
        // duplicate address detection, the host does not find its neighbours
        // for packets that it forwards.
        namespace.sysctl(&format!("net/ipv6/conf/{name}/accept_dad"), "0")?;
    }
    netlink.set_mtu(index, mtu)?;
    netlink.set_up(index)?;
    for address in addresses {
        netlink.add_address(index, *address)?;
    }
    Ok(())
}

/// Moves the calling thread into a network namespace.
///
/// # Errors
/// When rights are missing.
pub fn enter(namespace: BorrowedFd<'_>) -> io::Result<()> {
    Ok(setns(namespace, CloneFlags::CLONE_NEWNET)?)
}
