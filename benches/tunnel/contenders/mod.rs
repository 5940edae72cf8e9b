//! What can be measured: links between the two hosts of a [`Pair`].

use std::net::IpAddr;

use fastvpn::error::Result;
use fastvpn::lab::{Child, Pair};

/// A link that is up. Dropping it takes it down and leaves nothing behind.
pub struct Link {
    /// Address of host `b` at the far end of the link, as host `a` reaches it.
    pub address: IpAddr,
    /// Processes that carry the link, at host `a` and at host `b`; empty when
    /// the kernel does it.
    pub processes: [Vec<Child>; 2],
}

/// A way to link two hosts.
pub trait Contender {
    /// Short and unique, as in `uring` or `vxlan`.
    fn key(&self) -> &'static str;
    /// As shown to a person.
    fn title(&self) -> &'static str;
    /// How it is run: flags, MTU, version.
    fn detail(&self) -> String;
    /// Why it cannot be measured on this machine, such as that its program is
    /// not installed; `None` when it can.
    fn missing(&self) -> Option<String>;
    /// Sets the link up and waits until it carries packets both ways.
    ///
    /// # Errors
    /// One line that names what failed.
    fn start(&self, pair: &Pair) -> Result<Link>;
}
